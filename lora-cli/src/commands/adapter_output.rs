//! Where an adapter is written, and as what.

use std::path::Path;

use clap::ValueEnum;
use lora_format::codec::{self, WriteOptions, Written, gguf, kohya, loralib, mlx, peft, torchtune};
use lora_format::io::atomic;
use lora_format::model::AdapterFormat;
use lora_format::{Adapter, Error, native};
use lora_merge::Error as MergeError;

use super::WriteArguments;
use crate::failure::Failure;

/// The formats that are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutputFormat {
    /// Our own single file
    Lora,
    /// A PEFT directory
    Peft,
    /// A file of sd-scripts or LyCORIS
    Kohya,
    /// A file of diffusers
    Diffusers,
    /// A file with ComfyUI's generic names
    Comfy,
    /// A file of OneTrainer
    Onetrainer,
    /// loralib's state dict, as a safetensors file
    Loralib,
    /// A LoRA adapter of llama.cpp
    Gguf,
    /// A directory of mlx-lm
    Mlx,
    /// A directory of torchtune
    Torchtune,
}

impl OutputFormat {
    /// The one that an adapter of some format is written in if no other is asked for: its own, or
    /// ours if that is only read.
    pub(crate) fn of(format: AdapterFormat) -> OutputFormat {
        let written = OutputFormat::value_variants().iter().copied();
        written.into_iter().find(|it| it.format() == format).unwrap_or(OutputFormat::Lora)
    }

    /// The format.
    pub(crate) fn format(self) -> AdapterFormat {
        match self {
            OutputFormat::Lora => AdapterFormat::Native,
            OutputFormat::Peft => AdapterFormat::Peft,
            OutputFormat::Kohya => AdapterFormat::Kohya,
            OutputFormat::Diffusers => AdapterFormat::Diffusers,
            OutputFormat::Comfy => AdapterFormat::Comfy,
            OutputFormat::Onetrainer => AdapterFormat::OneTrainer,
            OutputFormat::Loralib => AdapterFormat::Loralib,
            OutputFormat::Gguf => AdapterFormat::Gguf,
            OutputFormat::Mlx => AdapterFormat::Mlx,
            OutputFormat::Torchtune => AdapterFormat::Torchtune,
        }
    }

    /// Its name, as `--to` takes it.
    pub(crate) fn name(self) -> &'static str {
        self.format().name()
    }

    /// The files that it writes in a directory, if it writes one.
    fn files(self) -> Option<&'static [&'static str]> {
        match self {
            OutputFormat::Peft => Some(&[peft::MODEL_FILE, peft::CONFIG_FILE]),
            OutputFormat::Mlx => Some(&[mlx::MODEL_FILE, mlx::CONFIG_FILE]),
            OutputFormat::Torchtune => Some(&[torchtune::SAFETENSORS_FILE, torchtune::CONFIG_FILE]),
            _ => None,
        }
    }

    /// What of an adapter it does not hold.
    pub(crate) fn not_carried(self, adapter: &Adapter) -> Result<Vec<String>, Failure> {
        let mut lost = Vec::new();
        if adapter.format == AdapterFormat::Peft && adapter.path.is_dir() {
            lost = peft::other_files(&adapter.path)?;
        }
        if self != OutputFormat::Lora {
            if adapter.base.fingerprint.is_some() {
                lost.push(format!("the base's fingerprint ({} has no place for it)", self.name()));
            }
            lost.extend(adapter.extensions.keys().map(|name| format!("the extension `{name}`")));
        }
        Ok(lost)
    }

    /// Refuses a path in a directory that is not there, and what `--force` may not replace: a
    /// directory by a file or a file by a directory, and a directory that holds more than an adapter.
    pub(crate) fn check_replaced(
        self,
        output: &Path,
        write: &WriteArguments,
    ) -> Result<(), Failure> {
        let Ok(found) = std::fs::metadata(output) else {
            let parent = atomic::parent_of(output);
            if !parent.is_dir() {
                return Err(MergeError::NoDirectory { path: parent.to_owned() }.into());
            }
            return Ok(());
        };
        if !write.force {
            return Err(Error::OutputExists { path: output.to_owned() }.into());
        }
        let refuse = |reason: &str| {
            let message = format!("{}: not replaced: {reason}", output.display());
            Err(Failure::new(message, Some("choose another -o, or remove it yourself")))
        };
        match (self.files(), found.is_dir()) {
            (None, true) => refuse("it is a directory, and the output is a file"),
            (Some(_), false) => refuse("it is a file, and the output is a directory"),
            (None, false) => Ok(()),
            (Some(files), true) => {
                if !files.iter().any(|file| output.join(file).exists()) {
                    return refuse("it holds no adapter");
                }
                let names = names(output)?;
                match names.iter().find(|name| !files.contains(&name.as_str())) {
                    Some(file) => {
                        refuse(&format!("it holds {file}, which is no part of an adapter"))
                    }
                    None => Ok(()),
                }
            }
        }
    }

    /// Writes an adapter, exactly, complete or not at all.
    pub(crate) fn write(
        self,
        adapter: &Adapter,
        output: &Path,
        write: &WriteArguments,
    ) -> Result<Written, Failure> {
        self.write_with(adapter, output, write, &WriteOptions::default())
    }

    /// The same, with what the user allows.
    pub(crate) fn write_with(
        self,
        adapter: &Adapter,
        output: &Path,
        write: &WriteArguments,
        options: &WriteOptions,
    ) -> Result<Written, Failure> {
        let (overwrite, durability) = (write.overwrite(), write.durability());
        let (adapter, respelled) = codec::respell(adapter, self.format(), None, options)?;
        let adapter = &adapter;
        let mut written = match self {
            OutputFormat::Lora => {
                native::write(adapter, output, overwrite, durability)?;
                Written::default()
            }
            OutputFormat::Peft => {
                peft::write_directory(adapter, output, overwrite, durability)?;
                Written::default()
            }
            OutputFormat::Loralib => {
                loralib::write(adapter, output, options, overwrite, durability)?
            }
            OutputFormat::Gguf => gguf::write(adapter, output, options, overwrite, durability)?,
            OutputFormat::Mlx => {
                mlx::write_directory(adapter, output, options, overwrite, durability)?
            }
            OutputFormat::Torchtune => {
                torchtune::write_directory(adapter, output, options, overwrite, durability)?
            }
            OutputFormat::Kohya
            | OutputFormat::Diffusers
            | OutputFormat::Comfy
            | OutputFormat::Onetrainer => {
                kohya::write(adapter, self.format(), output, options, overwrite, durability)?
            }
        };
        written.changes.splice(0..0, respelled.changes);
        Ok(written)
    }
}

/// The names in a directory, sorted.
fn names(directory: &Path) -> Result<Vec<String>, Failure> {
    let listed = std::fs::read_dir(directory).and_then(|entries| {
        entries
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<std::io::Result<Vec<String>>>()
    });
    let mut names = listed.map_err(|source| Error::Io {
        path: directory.to_owned(),
        action: "list",
        source,
    })?;
    names.sort();
    Ok(names)
}
