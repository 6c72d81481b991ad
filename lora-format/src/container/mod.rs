//! Containers: files of named tensors, whatever they mean.

pub mod gguf;
mod pickle;
pub mod safetensors;
pub mod torch;

use std::io::{Read, Seek};
use std::path::{Path, PathBuf};

use crate::error::{DetectProblem, Error, IoContext, Result};
use crate::io::opened::OpenedFile;
use crate::tensor::{self, Tensor};
use safetensors::SafetensorsFile;
use torch::PlainValue;

/// The tensors of one file, mapped.
#[derive(Debug)]
pub struct TensorFile {
    /// The file.
    pub path: PathBuf,
    /// What kind of file it is.
    pub container: Container,
    /// Its tensors, in the order of their data, or of the dict that holds them in a pickle.
    pub tensors: Vec<Tensor>,
    /// The file's own string metadata; only safetensors files have any.
    pub metadata: Vec<(String, String)>,
    /// What it holds that is no tensor; only pickles hold any.
    pub values: Vec<(String, PlainValue)>,
}

/// The containers that tensors come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Container {
    /// A safetensors file.
    Safetensors,
    /// What `torch.save` wrote: a pickle, in a zip archive or bare.
    Torch,
    /// A GGUF file.
    Gguf,
}

impl Container {
    /// What the first bytes of a file show it to be. A safetensors file has no mark of its own, so
    /// whatever is none of the others may be one.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn of(opened: &OpenedFile) -> Result<Container> {
        let mut file = opened.file();
        let mut start = Vec::new();
        file.rewind().at(opened.path(), "read")?;
        file.take(512).read_to_end(&mut start).at(opened.path(), "read")?;
        Ok(Container::beginning(&start))
    }

    fn beginning(start: &[u8]) -> Container {
        match start {
            [b'P', b'K', 3 | 5, 4 | 6, ..] => Container::Torch,
            // A pickle of protocol 2 or later, as torch wrote before it wrote archives; followed by
            // zeros it is the length of a short safetensors header.
            [0x80, 2..=5, ..] if start.get(2..8).is_none_or(|rest| rest != [0; 6]) => {
                Container::Torch
            }
            [b'G', b'G', b'U', b'F', ..] => Container::Gguf,
            // The oldest format of torch, which its reader refuses by name.
            _ if torch::is_tar(start) => Container::Torch,
            _ => Container::Safetensors,
        }
    }
}

impl TensorFile {
    /// Opens a file of any container, as its first bytes show.
    ///
    /// # Errors
    /// [`Error::Io`], and what the container's reader finds wrong.
    pub fn open(path: &Path) -> Result<TensorFile> {
        TensorFile::of(OpenedFile::open(path)?)
    }

    /// The tensors of a file that was just opened.
    ///
    /// # Errors
    /// As for [`TensorFile::open`].
    pub fn of(opened: OpenedFile) -> Result<TensorFile> {
        match Container::of(&opened)? {
            Container::Safetensors => TensorFile::of_safetensors(&SafetensorsFile::of(opened)?),
            Container::Torch => torch::read(opened),
            Container::Gguf => {
                let path = opened.path();
                let suffix = path.extension().unwrap_or_default().to_string_lossy();
                let problem = DetectProblem::OtherContainer { suffix: format!(".{suffix}") };
                Err(Error::Unrecognised { path: path.to_owned(), problem })
            }
        }
    }

    /// The tensors of a safetensors file.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be mapped.
    pub fn of_safetensors(file: &SafetensorsFile) -> Result<TensorFile> {
        Ok(TensorFile {
            path: file.path().to_owned(),
            container: Container::Safetensors,
            tensors: tensor::map_all(file)?,
            metadata: file.header().metadata.clone(),
            values: Vec::new(),
        })
    }

    /// The metadata less what every writer puts there.
    pub(crate) fn own_metadata(&self) -> Vec<(String, String)> {
        self.metadata.iter().filter(|entry| entry.0 != "format").cloned().collect()
    }

    /// Whether any tensor's name satisfies `condition`.
    pub(crate) fn any_name(&self, condition: impl Fn(&str) -> bool) -> bool {
        self.tensors.iter().any(|tensor| condition(&tensor.name))
    }
}
