//! `lora-cli convert`: an adapter from one format to another.

use std::path::PathBuf;

use clap::Args;
use lora_format::codec::WriteOptions;
use lora_merge::output::refuse_input;
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
  lora-cli convert my-lora.safetensors --to peft -o ./my-lora-again")]
pub(crate) struct Arguments {
    /// The adapter
    adapter: PathBuf,
    /// The format to write
    #[arg(long, value_enum)]
    to: OutputFormat,
    /// Where to write: a directory for peft, else a file
    #[arg(short, long, value_name = "PATH")]
    output: PathBuf,
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

pub(crate) fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    let adapter = lora_format::read(&arguments.adapter, &arguments.adapter_options.read_options())?;
    let notes: Vec<String> = adapter.notes.iter().map(ToString::to_string).collect();
    let not_carried = arguments.to.not_carried(&adapter)?;
    refuse_damaged(&adapter)?;
    refuse_input(&arguments.output, &arguments.adapter)?;
    arguments.to.check_replaced(&arguments.output, &arguments.write)?;
    progress::interruptible();
    let options = WriteOptions { allow_lossy: arguments.allow_lossy, ..WriteOptions::default() };
    let written =
        arguments.to.write_with(&adapter, &arguments.output, &arguments.write, &options)?;
    printer::notes(notes.iter().chain(&written.changes));
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
            changes: written.changes,
            not_carried,
            notes,
        })?;
    }
    Ok(Outcome::Done)
}
