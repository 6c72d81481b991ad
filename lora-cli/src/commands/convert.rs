//! `lora-cli convert`: an adapter from one format to another.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use lora_format::codec::peft;
use lora_format::model::AdapterFormat;
use lora_format::native;
use lora_merge::output::refuse_input;
use serde::Serialize;

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
    to: Format,
    /// Where to write: a file for lora, a directory for peft
    #[arg(short, long, value_name = "PATH")]
    output: PathBuf,
    #[command(flatten)]
    write: WriteArguments,
    #[command(flatten)]
    adapter_options: AdapterArguments,
    /// Print a report as JSON on stdout
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Our own single file
    Lora,
    /// A PEFT directory
    Peft,
}

/// `lora-cli/convert/1`
#[derive(Debug, Serialize)]
struct JsonReport {
    schema: &'static str,
    input: String,
    input_format: &'static str,
    output: String,
    output_format: &'static str,
    components: usize,
    not_carried: Vec<String>,
    notes: Vec<String>,
}

/// What `--force` may not replace: a directory by a file or a file by a directory, and a directory
/// that holds more than an adapter.
fn check_replaced(arguments: &Arguments) -> Result<(), Failure> {
    let output = &arguments.output;
    let Ok(found) = std::fs::metadata(output) else {
        return Ok(());
    };
    if !arguments.write.force {
        return Ok(());
    }
    let refuse = |reason: &str| {
        let message = format!("{}: not replaced: {reason}", output.display());
        Err(Failure::new(message, Some("choose another -o, or remove it yourself")))
    };
    match (arguments.to, found.is_dir()) {
        (Format::Lora, true) => refuse("it is a directory, and the output is a file"),
        (Format::Peft, false) => refuse("it is a file, and the output is a directory"),
        (Format::Peft, true) if !output.join(peft::MODEL_FILE).exists() => {
            refuse("it holds no adapter")
        }
        (Format::Peft, true) => match peft::other_files(output)?.first() {
            Some(file) => refuse(&format!("it holds {file}, which no conversion writes")),
            None => Ok(()),
        },
        (Format::Lora, false) => Ok(()),
    }
}

pub(crate) fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    let adapter = lora_format::read(&arguments.adapter, &arguments.adapter_options.read_options())?;
    let notes: Vec<String> = adapter.notes.iter().map(ToString::to_string).collect();
    let mut not_carried = Vec::new();
    if adapter.format == AdapterFormat::Peft && adapter.path.is_dir() {
        not_carried = peft::other_files(&adapter.path)?;
    }
    if arguments.to == Format::Peft && adapter.base.fingerprint.is_some() {
        not_carried.push("the base's fingerprint (PEFT has no place for it)".to_owned());
    }
    if arguments.to == Format::Peft {
        not_carried.extend(adapter.extensions.keys().map(|name| format!("the extension `{name}`")));
    }
    refuse_damaged(&adapter)?;
    refuse_input(&arguments.output, &arguments.adapter)?;
    check_replaced(arguments)?;
    progress::interruptible();
    let (overwrite, durability) = (arguments.write.overwrite(), arguments.write.durability());
    let (output, format) = match arguments.to {
        Format::Lora => {
            native::write(&adapter, &arguments.output, overwrite, durability)?;
            (&arguments.output, AdapterFormat::Native)
        }
        Format::Peft => {
            peft::write_directory(&adapter, &arguments.output, overwrite, durability)?;
            (&arguments.output, AdapterFormat::Peft)
        }
    };
    printer::notes(&notes);
    if !not_carried.is_empty() {
        printer::talk(&format!("note: not carried along: {}", not_carried.join(", ")));
    }
    printer::talk(&format!(
        "read {} ({}), wrote {} ({format}): {} targets",
        arguments.adapter.display(),
        adapter.format,
        output.display(),
        adapter.components.len(),
    ));
    if arguments.json {
        printer::json(&JsonReport {
            schema: "lora-cli/convert/1",
            input: arguments.adapter.display().to_string(),
            input_format: adapter.format.name(),
            output: output.display().to_string(),
            output_format: format.name(),
            components: adapter.components.len(),
            not_carried,
            notes,
        })?;
    }
    Ok(Outcome::Done)
}
