//! `lora-cli stamp`: records in an adapter which base it belongs to.

use std::path::PathBuf;

use clap::Args;
use lora_format::checkpoint::Checkpoint;
use lora_format::fingerprint::{self, Fingerprint, Verdict};
use lora_format::model::AdapterFormat;
use lora_format::native;
use lora_merge::output::refuse_input;
use serde::Serialize;

use super::{AdapterArguments, WriteArguments, refuse_damaged};
use crate::failure::{Failure, Outcome};
use crate::{printer, progress};

/// Record sampled values of the base in an adapter, so that merges can tell the right base
///
/// The output is of our own format: a PEFT directory has no place for it.
#[derive(Debug, Args)]
#[command(after_help = "Example:
  lora-cli stamp ./my-lora --base Llama-3-8B -o my-lora.safetensors")]
pub(crate) struct Arguments {
    /// The adapter
    adapter: PathBuf,
    /// The model it was trained on
    #[arg(long, value_name = "MODEL")]
    base: PathBuf,
    /// Where to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    write: WriteArguments,
    #[command(flatten)]
    adapter_options: AdapterArguments,
    /// Replace a fingerprint that the adapter has already and that says otherwise
    #[arg(long)]
    replace_fingerprint: bool,
    /// Print a report as JSON on stdout
    #[arg(long)]
    pub(crate) json: bool,
}

/// `lora-cli/stamp/1`
#[derive(Debug, Serialize)]
struct JsonReport {
    schema: &'static str,
    adapter: String,
    base: String,
    output: String,
    targets_sampled: usize,
    samples: usize,
}

/// An adapter that knows its base is not given another by mistake.
fn refuse_another_base(
    arguments: &Arguments,
    recorded: &Fingerprint,
    actual: &Fingerprint,
) -> Result<(), Failure> {
    let verdict = fingerprint::compare(recorded, |expected| {
        actual.targets.iter().find(|samples| samples.target == expected.target).cloned()
    });
    let Verdict::Different { equal, compared, .. } = verdict else { return Ok(()) };
    let message = format!(
        "{}: is stamped already, with another base than {} ({equal} of {compared} sampled values \
         agree)",
        arguments.adapter.display(),
        arguments.base.display()
    );
    Err(Failure::new(message, Some("if the new base is the right one, --replace-fingerprint")))
}

pub(crate) fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    let mut adapter = lora_format::read(
        &arguments.adapter,
        &arguments.adapter_options.read_options(Some(&arguments.base))?,
    )?;
    let base = Checkpoint::open(&arguments.base)?;
    printer::notes(adapter.notes.iter().chain(base.notes()));
    refuse_input(&arguments.output, &arguments.base)?;
    // A file of our own format may be stamped in place: nothing of it is lost.
    if adapter.format != AdapterFormat::Native {
        refuse_input(&arguments.output, &arguments.adapter)?;
    }
    refuse_damaged(&adapter)?;
    // What the output cannot hold need not be looked for in the base.
    native::check(&adapter)?;
    let fingerprint = lora_merge::identity::stamp(&adapter, &base)?;
    if let (Some(recorded), false) = (&adapter.base.fingerprint, arguments.replace_fingerprint) {
        refuse_another_base(arguments, recorded, &fingerprint)?;
    }
    let report = JsonReport {
        schema: "lora-cli/stamp/1",
        adapter: arguments.adapter.display().to_string(),
        base: arguments.base.display().to_string(),
        output: arguments.output.display().to_string(),
        targets_sampled: fingerprint.targets.len(),
        samples: fingerprint.targets.iter().map(|target| target.values.len()).sum(),
    };
    adapter.base.fingerprint = Some(fingerprint);
    progress::interruptible();
    let (overwrite, durability) = (arguments.write.overwrite(), arguments.write.durability());
    native::write(&adapter, &arguments.output, overwrite, durability)?;
    printer::talk(&format!(
        "stamped {} with {} values of {} targets → {}",
        report.adapter, report.samples, report.targets_sampled, report.output
    ));
    if arguments.json {
        printer::json(&report)?;
    }
    Ok(Outcome::Done)
}
