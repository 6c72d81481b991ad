//! One codec per adapter format: bytes ⇄ [`Adapter`].
//!
//! The format is detected from content: a safetensors file that carries our configuration is
//! ours; one whose tensors are named as PEFT names them, or that lies beside PEFT's configuration
//! under PEFT's name, is PEFT's; one with `lora_A` and `lora_B` alone is loralib's, with `lora_a`
//! and `lora_b` mlx-lm's, and with `lora_a.weight` and `lora_b.weight` torchtune's. A GGUF file is
//! one of llama.cpp's; what else image trainers write is [`kohya`]'s.

mod base;
mod folding;
pub mod gguf;
pub mod kohya;
pub mod loralib;
pub mod mlx;
pub mod peft;
mod rearrange;
mod respell;
pub mod torchtune;

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

pub use respell::{BaseShapes, respell};

use crate::container::gguf::GgufFile;
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
    /// The base's `config.json`, for formats that store rows in the order of its heads.
    pub base_config: Option<Map<String, Value>>,
}

/// What the user may say about the adapter to be written in another format.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct WriteOptions {
    /// What the format cannot hold exactly may be rounded; [`Written`] says what was.
    pub allow_lossy: bool,
    /// The base's `config.json`.
    pub base_config: Option<Map<String, Value>>,
}

/// What a writer had to say in another way than the adapter does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// One line each: scales multiplied into B and zeros added, exactly; if it was allowed, what
    /// was rounded.
    pub changes: Vec<String>,
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
        if existing(path, peft::MODEL_FILE).is_none() && mlx::is_mlx_directory(path) {
            return mlx::read_directory(path, options);
        }
        if existing(path, peft::MODEL_FILE).is_none()
            && let Some(file) = torchtune::file_in(path)
        {
            return torchtune::read_directory(path, &file, options);
        }
        return peft::read_directory(path, options);
    }
    let opened = OpenedFile::open(path)?;
    if Container::of(&opened)? == Container::Safetensors {
        let file = SafetensorsFile::of(opened)?;
        if native::is_native(file.header()) {
            let mut adapter = native::read(&file)?;
            refuse_options(path, options)?;
            if let Some(groups) = &options.enable_lora {
                loralib::enable(&mut adapter, groups)?;
            }
            return Ok(adapter);
        }
        return read_tensors(TensorFile::of_safetensors(&file)?, options);
    }
    if Container::of(&opened)? == Container::Gguf {
        return gguf::read(&GgufFile::of(opened)?, options);
    }
    read_tensors(TensorFile::of(opened)?, options)
}

/// Reads the tensors of another format, in whatever container.
fn read_tensors(file: TensorFile, options: &ReadOptions) -> Result<Adapter> {
    let config = peft::config_beside(&file.path);
    let named = file
        .path
        .file_name()
        .is_some_and(|name| name == peft::MODEL_FILE || name == peft::PICKLE_FILE);
    // Names that these share with PEFT are PEFT's where its configuration lies beside them.
    if kohya::is_kohya(&file) && config.is_none() {
        return kohya::read(file, options);
    }
    if peft::is_peft(&file) || (named && config.is_some()) {
        return peft::read_file(file, config.as_deref(), options);
    }
    if loralib::is_loralib(&file) {
        return match config {
            Some(config) => peft::read_file(file, Some(&config), options),
            None => loralib::read(file, options),
        };
    }
    if mlx::is_mlx(&file) {
        return mlx::read(file, options);
    }
    if torchtune::is_torchtune(&file) {
        return torchtune::read(file, options);
    }
    let first = file.tensors.first().map(|tensor| tensor.name.clone());
    let problem = DetectProblem::NotAnAdapter { tensors: file.tensors.len(), first };
    Err(Error::Unrecognised { path: file.path, problem })
}

/// Our own format leaves nothing open that the user could say, but for fused projections.
fn refuse_options(path: &Path, options: &ReadOptions) -> Result<()> {
    let (option, reason) = if options.alpha.is_some() {
        ("alpha", "the file records its own")
    } else if !options.ignore_fields.is_empty() {
        ("field to ignore", "a file of this format has no unknown fields to pass over")
    } else if options.residual_base {
        ("residual base", "the file records no initialisation")
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
