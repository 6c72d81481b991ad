//! One codec per adapter format: bytes ⇄ [`Adapter`].
//!
//! The format is detected from content: a safetensors file that carries our configuration is
//! ours; one whose tensors are named as PEFT names them, or that lies beside PEFT's configuration
//! under PEFT's name, is PEFT's; one with `lora_A` and `lora_B` alone is loralib's.

pub mod loralib;
pub mod peft;

use std::path::{Path, PathBuf};

use crate::container::safetensors::SafetensorsFile;
use crate::error::{DetectProblem, Error, Result};
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
    let file = open_safetensors(path)?;
    if native::is_native(file.header()) {
        let adapter = native::read(&file)?;
        refuse_options(path, options)?;
        return Ok(adapter);
    }
    let config = peft::config_beside(path);
    let named = path.file_name().is_some_and(|name| name == peft::MODEL_FILE);
    if peft::is_peft(file.header()) || (named && config.is_some()) {
        return peft::read_file(&file, config.as_deref(), options);
    }
    if loralib::is_loralib(file.header()) {
        return match config {
            Some(config) => peft::read_file(&file, Some(&config), options),
            None => loralib::read(&file, options),
        };
    }
    let tensors = &file.header().tensors;
    Err(unrecognised(DetectProblem::NotAnAdapter {
        tensors: tensors.len(),
        first: tensors.first().map(|tensor| tensor.name.clone()),
    }))
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

/// Opens a safetensors file, and says of a file that is plainly something else what it is.
pub(crate) fn open_safetensors(path: &Path) -> Result<SafetensorsFile> {
    let suffix = path.extension().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    if ["bin", "pt", "pth", "ckpt", "gguf", "npz"].contains(&suffix.as_str()) {
        let problem = DetectProblem::OtherContainer { suffix: format!(".{suffix}") };
        return Err(Error::Unrecognised { path: path.to_owned(), problem });
    }
    SafetensorsFile::open(path)
}

/// The file called `name` in `directory`, if it is there.
pub(crate) fn existing(directory: &Path, name: &str) -> Option<PathBuf> {
    let path = directory.join(name);
    path.exists().then_some(path)
}
