//! Finished targets of an extraction that is not finished: a hidden directory beside the output,
//! with a file for each, so that an interrupted extraction can go on.

use std::path::{Path, PathBuf};

use lora_format::container::safetensors::{Declared, SafetensorsFile, encode_header};
use lora_format::io::atomic::{self, Durability, Overwrite};
use lora_format::map_all;

use super::{ExtractError, Part};
use crate::error::Result;

const RECORD: &str = "lora.extract";
const SIGNATURE: &str = "signature";

/// Where finished targets are kept.
#[derive(Debug)]
pub struct WorkDirectory {
    path: PathBuf,
}

impl WorkDirectory {
    /// The directory that belongs to an output.
    #[must_use]
    pub fn path_for(output: &Path) -> PathBuf {
        let name = output.file_name().unwrap_or_default().to_string_lossy();
        atomic::parent_of(output).join(format!(".{name}.extract"))
    }

    /// Starts it, or goes on with it: `signature` says what is extracted, of which files and how.
    /// Without `resume`, what it holds is removed.
    ///
    /// # Errors
    /// [`ExtractError::OtherWork`] if it is of another extraction; [`lora_format::Error::Io`].
    pub fn open(output: &Path, signature: &str, resume: bool) -> Result<WorkDirectory> {
        let path = WorkDirectory::path_for(output);
        let record = path.join(SIGNATURE);
        let io = |source| lora_format::Error::Io { path: path.clone(), action: "prepare", source };
        if path.exists() && !resume {
            std::fs::remove_dir_all(&path).map_err(io)?;
        }
        if path.exists() {
            let found = std::fs::read_to_string(&record).map_err(io)?;
            if found != signature {
                let line = |(old, new): (&str, &str)| {
                    (old != new).then(|| format!("it was `{old}` and is `{new}`"))
                };
                let difference = found.lines().zip(signature.lines()).find_map(line);
                let difference = difference.unwrap_or_else(|| "its options".to_owned());
                return Err(ExtractError::OtherWork { directory: path, difference }.into());
            }
        } else {
            std::fs::create_dir(&path).map_err(io)?;
            let parts = [signature.as_bytes()];
            atomic::write(&record, &parts, Overwrite::Never, Durability::Cached)?;
        }
        Ok(WorkDirectory { path })
    }

    /// How many targets it holds.
    #[must_use]
    pub fn len(&self) -> usize {
        let entries = std::fs::read_dir(&self.path).into_iter().flatten().flatten();
        let done = entries.filter(|entry| {
            entry.path().extension().is_some_and(|extension| extension == "safetensors")
        });
        done.count()
    }

    /// Whether it holds none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn file(&self, index: usize) -> PathBuf {
        self.path.join(format!("{index:06}.safetensors"))
    }

    /// A target that was finished before.
    pub(super) fn take(&self, index: usize) -> Result<Option<Part>> {
        let path = self.file(index);
        if !path.exists() {
            return Ok(None);
        }
        let file = SafetensorsFile::open(&path)?;
        let record = file.header().metadata.iter().find(|entry| entry.0 == RECORD);
        let extracted = record.and_then(|entry| serde_json::from_str(&entry.1).ok());
        let mut tensors = map_all(&file)?.into_iter();
        let (a, b) = (tensors.next(), tensors.next());
        // What is not whole is made again.
        Ok(match (extracted, a, b) {
            (Some(extracted), Some(a), Some(b)) if a.name == "a" && b.name == "b" => {
                Some((extracted, a, b))
            }
            _ => None,
        })
    }

    /// Keeps a finished target.
    pub(super) fn keep(&self, index: usize, part: &Part) -> Result<()> {
        let (extracted, a, b) = part;
        let path = self.file(index);
        let record = serde_json::to_string(extracted)
            .map_err(|source| lora_format::Error::Json { path: path.clone(), source })?;
        let metadata = [(RECORD.to_owned(), record)];
        let declared = [a, b].map(|tensor| Declared {
            name: &tensor.name,
            dtype: tensor.dtype,
            shape: &tensor.shape,
            bytes: tensor.bytes().len() as u64,
        });
        let header = encode_header(&metadata, declared);
        let parts = [&header[..], a.bytes(), b.bytes()];
        atomic::write(&path, &parts, Overwrite::Replace, Durability::Cached)?;
        Ok(())
    }

    /// Removes it: the extraction is finished.
    ///
    /// # Errors
    /// [`lora_format::Error::Io`].
    pub fn remove(self) -> Result<()> {
        std::fs::remove_dir_all(&self.path).map_err(|source| {
            let path = self.path.clone();
            lora_format::Error::Io { path, action: "remove", source }.into()
        })
    }
}
