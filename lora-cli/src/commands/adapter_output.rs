//! Where an adapter is written, and as what.

use std::path::Path;

use clap::ValueEnum;
use lora_format::codec::peft;
use lora_format::model::AdapterFormat;
use lora_format::{Adapter, Error, native};

use super::WriteArguments;
use crate::failure::Failure;

/// The formats that are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutputFormat {
    /// Our own single file
    Lora,
    /// A PEFT directory
    Peft,
}

impl OutputFormat {
    /// The one that an adapter of some format is written in if no other is asked for: its own, or
    /// ours if that is only read.
    pub(crate) fn of(format: AdapterFormat) -> OutputFormat {
        match format {
            AdapterFormat::Peft => OutputFormat::Peft,
            _ => OutputFormat::Lora,
        }
    }

    /// Its name, as `--to` takes it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            OutputFormat::Lora => AdapterFormat::Native.name(),
            OutputFormat::Peft => AdapterFormat::Peft.name(),
        }
    }

    /// What of an adapter it does not hold.
    pub(crate) fn not_carried(self, adapter: &Adapter) -> Result<Vec<String>, Failure> {
        let mut lost = Vec::new();
        if adapter.format == AdapterFormat::Peft && adapter.path.is_dir() {
            lost = peft::other_files(&adapter.path)?;
        }
        if self == OutputFormat::Peft {
            if adapter.base.fingerprint.is_some() {
                lost.push("the base's fingerprint (PEFT has no place for it)".to_owned());
            }
            lost.extend(adapter.extensions.keys().map(|name| format!("the extension `{name}`")));
        }
        Ok(lost)
    }

    /// Refuses what `--force` may not replace: a directory by a file or a file by a directory, and
    /// a directory that holds more than an adapter.
    pub(crate) fn check_replaced(
        self,
        output: &Path,
        write: &WriteArguments,
    ) -> Result<(), Failure> {
        let Ok(found) = std::fs::metadata(output) else {
            return Ok(());
        };
        if !write.force {
            return Err(Error::OutputExists { path: output.to_owned() }.into());
        }
        let refuse = |reason: &str| {
            let message = format!("{}: not replaced: {reason}", output.display());
            Err(Failure::new(message, Some("choose another -o, or remove it yourself")))
        };
        match (self, found.is_dir()) {
            (OutputFormat::Lora, true) => refuse("it is a directory, and the output is a file"),
            (OutputFormat::Peft, false) => refuse("it is a file, and the output is a directory"),
            (OutputFormat::Peft, true) if !output.join(peft::MODEL_FILE).exists() => {
                refuse("it holds no adapter")
            }
            (OutputFormat::Peft, true) => match peft::other_files(output)?.first() {
                Some(file) => refuse(&format!("it holds {file}, which is no part of an adapter")),
                None => Ok(()),
            },
            (OutputFormat::Lora, false) => Ok(()),
        }
    }

    /// Writes an adapter, complete or not at all.
    pub(crate) fn write(
        self,
        adapter: &Adapter,
        output: &Path,
        write: &WriteArguments,
    ) -> Result<(), Failure> {
        let (overwrite, durability) = (write.overwrite(), write.durability());
        match self {
            OutputFormat::Lora => native::write(adapter, output, overwrite, durability)?,
            OutputFormat::Peft => peft::write_directory(adapter, output, overwrite, durability)?,
        }
        Ok(())
    }
}
