//! `lora-cli convert`: an adapter from one format to another.

use std::path::{Path, PathBuf};

use clap::Args;
use lora_format::checkpoint::Checkpoint;
use lora_format::codec::{self, BaseShapes, WriteOptions};
use lora_merge::output::refuse_input;
use lora_merge::parameters::Parameters;
use serde::Serialize;

use super::adapter_output::OutputFormat;
use super::{AdapterArguments, WriteArguments, refuse_damaged};
use crate::failure::{Failure, Outcome};
use crate::{printer, progress};

/// Convert an adapter to another format without loss
///
/// The input's format is found from its content. Factors keep their bits, the configuration keeps
/// every field.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  lora-cli convert ./my-lora --to lora -o my-lora.safetensors
  lora-cli convert my-lora.safetensors --to peft -o ./my-lora-again
  lora-cli convert ./my-lora --to gguf --base Llama-3-8B -o my-lora.gguf
  lora-cli convert style.safetensors --to diffusers -o style-diffusers.safetensors")]
pub(crate) struct Arguments {
    /// The adapter
    adapter: PathBuf,
    /// The format to write
    #[arg(long, value_enum)]
    to: OutputFormat,
    /// Where to write: a directory for peft, mlx and torchtune, else a file
    #[arg(short, long, value_name = "PATH")]
    output: PathBuf,
    /// The model that the adapter is for: its names, and the heads of its config.json
    #[arg(long, value_name = "MODEL")]
    base: Option<PathBuf>,
    /// Write what the format cannot hold exactly as nearly as it can, and say what changed
    #[arg(long)]
    allow_lossy: bool,
    #[command(flatten)]
    write: WriteArguments,
    #[command(flatten)]
    adapter_options: AdapterArguments,
    /// Print a report as JSON on stdout
    #[arg(long)]
    pub(crate) json: bool,
}

/// `lora-cli/convert/2`
#[derive(Debug, Serialize)]
struct JsonReport {
    schema: &'static str,
    input: String,
    input_format: &'static str,
    output: String,
    output_format: &'static str,
    components: usize,
    changes: Vec<String>,
    not_carried: Vec<String>,
    notes: Vec<String>,
}

/// The parameters of a base and their shapes.
pub(super) fn shapes(base: &Path) -> Result<BaseShapes, Failure> {
    let base = Checkpoint::open(base)?;
    let parameters = Parameters::of(&base).map_err(|problems| {
        let message = format!("{}: its tensors do not fit together", base.path().display());
        let problems = problems.iter().map(ToString::to_string).collect();
        Failure::Error { message, hint: None, problems }
    })?;
    let all = parameters.all().iter();
    Ok(all.map(|parameter| (parameter.name.clone(), parameter.shape.clone())).collect())
}

pub(crate) fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    let base = arguments.base.as_deref();
    let read_options = arguments.adapter_options.read_options(base)?;
    let adapter = lora_format::read(&arguments.adapter, &read_options)?;
    let notes: Vec<String> = adapter.notes.iter().map(ToString::to_string).collect();
    let not_carried = arguments.to.not_carried(&adapter)?;
    refuse_damaged(&adapter)?;
    refuse_input(&arguments.output, &arguments.adapter)?;
    arguments.to.check_replaced(&arguments.output, &arguments.write)?;
    progress::interruptible();
    let options =
        WriteOptions { allow_lossy: arguments.allow_lossy, base_config: read_options.base_config };
    let shapes = base.map(shapes).transpose()?;
    let (spelled, respelled) =
        codec::respell(&adapter, arguments.to.format(), shapes.as_ref(), &options)?;
    let written =
        arguments.to.write_with(&spelled, &arguments.output, &arguments.write, &options)?;
    let changes: Vec<String> = respelled.changes.into_iter().chain(written.changes).collect();
    printer::notes(notes.iter().chain(&changes));
    if !not_carried.is_empty() {
        printer::talk(&format!("note: not carried along: {}", not_carried.join(", ")));
    }
    printer::talk(&format!(
        "read {} ({}), wrote {} ({}): {} targets",
        arguments.adapter.display(),
        adapter.format,
        arguments.output.display(),
        arguments.to.name(),
        adapter.components.len(),
    ));
    if arguments.json {
        printer::json(&JsonReport {
            schema: "lora-cli/convert/2",
            input: arguments.adapter.display().to_string(),
            input_format: adapter.format.name(),
            output: arguments.output.display().to_string(),
            output_format: arguments.to.name(),
            components: adapter.components.len(),
            changes,
            not_carried,
            notes,
        })?;
    }
    Ok(Outcome::Done)
}
