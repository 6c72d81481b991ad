//! `lora-cli metadata`: the string metadata of a safetensors file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use lora_format::codec::peft;
use lora_format::container::safetensors::SafetensorsFile;
use lora_format::io::atomic::Overwrite;
use lora_format::{metadata, native};
use serde::Serialize;

use super::WriteArguments;
use crate::failure::{Failure, Outcome};
use crate::{printer, progress};

/// Show or change the metadata of a safetensors file: sd-scripts' ss_*, modelspec.*, …
///
/// The tensors keep their bytes and their order. sd-scripts' hashes and Stability's, where the file
/// has them, are computed anew.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  lora-cli metadata get style.safetensors
  lora-cli metadata get style.safetensors ss_output_name
  lora-cli metadata set style.safetensors modelspec.title='My style' ss_output_name=style --in-place
  lora-cli metadata remove style.safetensors ss_dataset_dirs -o clean.safetensors")]
pub(crate) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show all entries, or the value of one
    Get {
        /// A safetensors file, or a directory of PEFT
        file: PathBuf,
        /// The entry
        key: Option<String>,
        /// Print as JSON on stdout
        #[arg(long)]
        json: bool,
    },
    /// Set entries
    Set {
        /// A safetensors file, or a directory of PEFT
        file: PathBuf,
        /// KEY=VALUE
        #[arg(required = true, value_name = "KEY=VALUE")]
        entries: Vec<String>,
        #[command(flatten)]
        destination: Destination,
    },
    /// Remove entries
    Remove {
        /// A safetensors file, or a directory of PEFT
        file: PathBuf,
        /// The entries
        #[arg(required = true, value_name = "KEY")]
        keys: Vec<String>,
        #[command(flatten)]
        destination: Destination,
    },
}

#[derive(Debug, Args)]
struct Destination {
    /// Where to write
    #[arg(short, long, value_name = "FILE", required_unless_present = "in_place")]
    output: Option<PathBuf>,
    /// Replace the file itself, when the new one is complete
    #[arg(long, conflicts_with = "output")]
    in_place: bool,
    #[command(flatten)]
    write: WriteArguments,
}

impl Arguments {
    /// Whether errors are to be reported as JSON too.
    pub(crate) fn json(&self) -> bool {
        matches!(self.command, Command::Get { json: true, .. })
    }
}

/// `lora-cli/metadata/1`
#[derive(Debug, Serialize)]
struct JsonReport<'a> {
    schema: &'static str,
    file: String,
    metadata: BTreeMap<&'a str, &'a str>,
}

/// What our own format keeps in the metadata, and what every loader asks for.
const OURS: &str = native::CONFIG_KEY;

pub(crate) fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    match &arguments.command {
        Command::Get { file, key, json } => get(file, key.as_deref(), *json),
        Command::Set { file, entries, destination } => {
            let pairs = entries.iter().map(|entry| {
                entry.split_once('=').ok_or_else(|| {
                    let message = format!("`{entry}` is no KEY=VALUE");
                    Failure::new(message, Some("quote values with spaces: title='My style'"))
                })
            });
            let pairs = pairs.collect::<Result<Vec<(&str, &str)>, Failure>>()?;
            change(file, destination, |metadata| {
                for (key, value) in &pairs {
                    match metadata.iter_mut().find(|entry| entry.0 == *key) {
                        Some(entry) => (*value).clone_into(&mut entry.1),
                        None => metadata.push(((*key).to_owned(), (*value).to_owned())),
                    }
                }
                Ok(pairs.iter().map(|pair| pair.0.to_owned()).collect())
            })
        }
        Command::Remove { file, keys, destination } => change(file, destination, |metadata| {
            for key in keys {
                let before = metadata.len();
                metadata.retain(|entry| entry.0 != *key);
                if metadata.len() == before {
                    return Err(no_such_entry(file, key, metadata));
                }
            }
            Ok(keys.clone())
        }),
    }
}

/// The file that holds an adapter's tensors.
fn tensors_of(path: &Path) -> PathBuf {
    let inside = path.join(peft::MODEL_FILE);
    if inside.exists() { inside } else { path.to_owned() }
}

fn no_such_entry(file: &Path, key: &str, metadata: &[(String, String)]) -> Failure {
    let keys: Vec<&str> = metadata.iter().map(|entry| entry.0.as_str()).collect();
    let found = if keys.is_empty() { "none".to_owned() } else { keys.join(", ") };
    let message = format!("{}: no metadata entry `{key}`; it has {found}", file.display());
    Failure::new(message, None)
}

fn get(path: &Path, key: Option<&str>, json: bool) -> Result<Outcome, Failure> {
    let path = tensors_of(path);
    let file = SafetensorsFile::open(&path)?;
    let entries = &file.header().metadata;
    if let Some(key) = key {
        let Some(value) = file.header().metadata_value(key) else {
            return Err(no_such_entry(&path, key, entries));
        };
        if !json {
            printer::data(&format!("{value}\n"))?;
            return Ok(Outcome::Done);
        }
    }
    let wanted = entries.iter().filter(|entry| key.is_none_or(|key| entry.0 == key));
    let metadata: BTreeMap<&str, &str> =
        wanted.map(|(key, value)| (key.as_str(), value.as_str())).collect();
    if json {
        let file = path.display().to_string();
        printer::json(&JsonReport { schema: "lora-cli/metadata/1", file, metadata })?;
        return Ok(Outcome::Done);
    }
    let lines: String = metadata.iter().map(|(key, value)| format!("{key}: {value}\n")).collect();
    printer::data(&lines)?;
    Ok(Outcome::Done)
}

fn change(
    path: &Path,
    destination: &Destination,
    change: impl FnOnce(&mut Vec<(String, String)>) -> Result<Vec<String>, Failure>,
) -> Result<Outcome, Failure> {
    let path = tensors_of(path);
    let file = SafetensorsFile::open(&path)?;
    let mut entries = file.header().metadata.clone();
    let changed = change(&mut entries)?;
    let native = native::is_native(file.header());
    if let Some(key) = changed.iter().find(|key| native && [OURS, "format"].contains(&key.as_str()))
    {
        let message = format!("{}: `{key}` is what makes it a file of this format", path.display());
        return Err(Failure::new(message, Some("lora-cli convert writes it anew")));
    }
    progress::interruptible();
    let (output, overwrite) = match &destination.output {
        Some(output) => (output, destination.write.overwrite()),
        None => (&path, Overwrite::Replace),
    };
    metadata::rewrite(&file, &entries, output, overwrite, destination.write.durability())?;
    printer::talk(&format!("{}: {}", output.display(), changed.join(", ")));
    Ok(Outcome::Done)
}
