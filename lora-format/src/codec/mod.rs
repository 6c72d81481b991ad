//! One codec per adapter format: bytes ⇄ [`Adapter`].
//!
//! The format is detected from content: a safetensors file that carries our configuration is
//! ours; one whose tensors are named as PEFT names them, or that lies beside PEFT's configuration
//! under PEFT's name, is PEFT's; one with `lora_A` and `lora_B` alone is loralib's.

pub mod loralib;
pub mod peft;

use std::path::{Path, PathBuf};

use crate::container::safetensors::SafetensorsFile;
use crate::container::{Container, TensorFile};
use crate::error::{DetectProblem, Error, Result};
use crate::io::opened::OpenedFile;
use crate::model::Adapter;
use crate::native;

/// What the user may say about an adapter that its files do not.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ReadOptions {
    /// Alpha, for an adapter whose configuration was lost.
    pub alpha: Option<f64>,
    /// Configuration fields that may be ignored though they are unknown. A field that is known to
    /// change the result is refused all the same.
    pub ignore_fields: Vec<String>,
    /// The base given is the one that training began with, which the initialisation had changed
    /// (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA): the factors are valid on it.
    pub residual_base: bool,
    /// loralib's `enable_lora`: which of the equal groups of rows of a fused projection have a
    /// change.
    pub enable_lora: Option<Vec<bool>>,
}

/// Reads an adapter of any known format.
///
/// # Errors
/// [`Error::Unrecognised`] if it is none, and what the format's codec finds wrong.
pub fn read(path: &Path, options: &ReadOptions) -> Result<Adapter> {
    let unrecognised = |problem| Error::Unrecognised { path: path.to_owned(), problem };
    let Ok(metadata) = std::fs::metadata(path) else {
        return Err(unrecognised(DetectProblem::NotFound));
    };
    if metadata.is_dir() {
        return peft::read_directory(path, options);
    }
    let opened = OpenedFile::open(path)?;
    if Container::of(&opened)? == Container::Safetensors {
        let file = SafetensorsFile::of(opened)?;
        if native::is_native(file.header()) {
            let adapter = native::read(&file)?;
            refuse_options(path, options)?;
            return Ok(adapter);
        }
        return read_tensors(TensorFile::of_safetensors(&file)?, options);
    }
    read_tensors(TensorFile::of(opened)?, options)
}

/// Reads the tensors of another format, in whatever container.
fn read_tensors(file: TensorFile, options: &ReadOptions) -> Result<Adapter> {
    let config = peft::config_beside(&file.path);
    let named = file.path.file_name().is_some_and(|name| name == peft::MODEL_FILE);
    if peft::is_peft(&file) || (named && config.is_some()) {
        return peft::read_file(file, config.as_deref(), options);
    }
    if loralib::is_loralib(&file) {
        return match config {
            Some(config) => peft::read_file(file, Some(&config), options),
            None => loralib::read(file, options),
        };
    }
    let first = file.tensors.first().map(|tensor| tensor.name.clone());
    let problem = DetectProblem::NotAnAdapter { tensors: file.tensors.len(), first };
    Err(Error::Unrecognised { path: file.path, problem })
}

/// Our own format leaves nothing open that the user could say.
fn refuse_options(path: &Path, options: &ReadOptions) -> Result<()> {
    let (option, reason) = if options.alpha.is_some() {
        ("alpha", "the file records its own")
    } else if !options.ignore_fields.is_empty() {
        ("field to ignore", "a file of this format has no unknown fields to pass over")
    } else if options.residual_base {
        ("residual base", "the file records no initialisation")
    } else if options.enable_lora.is_some() {
        ("enable_lora", "only loralib has fused projections")
    } else {
        return Ok(());
    };
    Err(Error::Meaningless { path: path.to_owned(), option, reason })
}

/// The file called `name` in `directory`, if it is there.
pub(crate) fn existing(directory: &Path, name: &str) -> Option<PathBuf> {
    let path = directory.join(name);
    path.exists().then_some(path)
}
