//! Finished targets of an extraction that is not finished: a hidden directory beside the output,
//! with a file for each, so that an interrupted extraction can go on.

use std::path::{Path, PathBuf};

use lora_format::container::safetensors::{Declared, SafetensorsFile, encode_header};
use lora_format::io::atomic::{self, Durability, Overwrite};
use lora_format::{Dtype, Tensor, map_all};

use super::{ExtractError, Extracted, Part, shapes};
use crate::error::Result;
use crate::pair::{Pair, Pairing};

const RECORD: &str = "lora.extract";
const SIGNATURE: &str = "signature";

/// Where finished targets are kept.
#[derive(Debug)]
pub struct WorkDirectory {
    path: PathBuf,
    signature: String,
    /// Whether what it holds is of this extraction.
    begun: bool,
}

impl WorkDirectory {
    /// The directory that belongs to an output.
    #[must_use]
    pub fn path_for(output: &Path) -> PathBuf {
        let name = output.file_name().unwrap_or_default().to_string_lossy();
        atomic::parent_of(output).join(format!(".{name}.extract"))
    }

    /// Looks at what is there; nothing is changed before [`Extraction::run`](super::Extraction::run).
    /// `signature` says of which files and how it is made. What the pairing says of them, which the
    /// configurations decide too, is added to that. With `resume`, what it holds is gone on from;
    /// without, it is removed when this extraction begins.
    ///
    /// # Errors
    /// [`ExtractError::OtherWork`] if it is of another extraction; [`ExtractError::NoWork`] if a
    /// directory of its name is none of ours.
    pub fn open(
        output: &Path,
        signature: &str,
        pairing: &Pairing,
        resume: bool,
    ) -> Result<WorkDirectory> {
        let path = WorkDirectory::path_for(output);
        let signature = format!("{signature}{}", of_pairs(pairing));
        let mut begun = false;
        if path.symlink_metadata().is_ok() {
            match std::fs::read_to_string(path.join(SIGNATURE)) {
                Ok(found) if resume => {
                    refuse_other(&path, &found, &signature)?;
                    begun = true;
                }
                Ok(_) => {}
                // Begun, and interrupted before it was signed; anything else is somebody else's.
                Err(_) if std::fs::read_dir(&path).is_ok_and(|mut all| all.next().is_none()) => {}
                Err(_) => return Err(ExtractError::NoWork { directory: path }.into()),
            }
        }
        Ok(WorkDirectory { path, signature, begun })
    }

    /// Makes it, unless this extraction goes on with it.
    pub(super) fn begin(&mut self) -> Result<()> {
        if self.begun {
            return Ok(());
        }
        let path = &self.path;
        let io = |source| lora_format::Error::Io { path: path.clone(), action: "prepare", source };
        if path.symlink_metadata().is_ok() {
            std::fs::remove_dir_all(path).map_err(io)?;
        }
        std::fs::create_dir(path).map_err(io)?;
        self.begun = true;
        let parts = [self.signature.as_bytes()];
        atomic::write(&path.join(SIGNATURE), &parts, Overwrite::Never, Durability::Cached)?;
        Ok(())
    }

    /// Removes the targets that it holds.
    pub(super) fn empty(&self) -> Result<()> {
        let io =
            |source| lora_format::Error::Io { path: self.path.clone(), action: "empty", source };
        for part in self.parts() {
            std::fs::remove_file(part).map_err(io)?;
        }
        Ok(())
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files of the targets that it holds, if they are of this extraction.
    fn parts(&self) -> impl Iterator<Item = PathBuf> {
        let entries = self.begun.then(|| std::fs::read_dir(&self.path).into_iter().flatten());
        let paths = entries.into_iter().flatten().flatten().map(|entry| entry.path());
        paths.filter(|path| path.extension().is_some_and(|extension| extension == "safetensors"))
    }

    /// How many targets of this extraction it holds.
    #[must_use]
    pub fn len(&self) -> usize {
        self.parts().count()
    }

    /// Whether it holds none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn file(&self, index: usize) -> PathBuf {
        self.path.join(format!("{index:06}.safetensors"))
    }

    /// A target that was finished before, of this pair and with factors of this dtype. What is damaged
    /// or of another pair is made again.
    pub(super) fn take(&self, index: usize, pair: &Pair, dtype: Dtype) -> Option<Part> {
        let file = SafetensorsFile::open(&self.file(index)).ok()?;
        let record = file.header().metadata.iter().find(|entry| entry.0 == RECORD)?;
        let extracted: Extracted = serde_json::from_str(&record.1).ok()?;
        let mut tensors = map_all(&file).ok()?.into_iter();
        let (a, b) = (tensors.next()?, tensors.next()?);
        let [a_shape, b_shape] = shapes(pair, extracted.rank);
        let is = |tensor: &Tensor, name: &str, shape: &[usize]| {
            tensor.name == name && tensor.dtype == dtype && tensor.shape == shape
        };
        let own = extracted.name == pair.name
            && (extracted.rows, extracted.cols) == pair.matrix()
            && is(&a, "a", &a_shape)
            && is(&b, "b", &b_shape);
        own.then_some((extracted, a, b))
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

    /// Removes it, if the extraction began: it is finished.
    ///
    /// # Errors
    /// [`lora_format::Error::Io`].
    pub fn remove(self) -> Result<()> {
        if !self.begun {
            return Ok(());
        }
        std::fs::remove_dir_all(&self.path).map_err(|source| {
            let path = self.path.clone();
            lora_format::Error::Io { path, action: "remove", source }.into()
        })
    }
}

/// Refuses work with another signature: `found` is the one that it has. Lines are a name, a colon and
/// a value; what is said is the first that differs.
fn refuse_other(directory: &Path, found: &str, signature: &str) -> Result<()> {
    /// A configuration is one line.
    const SHOWN: usize = 120;
    if found == signature {
        return Ok(());
    }
    let short = |line: &str| match line.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line.to_owned(),
    };
    let line = |(old, new): (&str, &str)| {
        if old == new {
            return None;
        }
        Some(match (old.split_once(": "), new.split_once(": ")) {
            (Some((name, old)), Some((same, new))) if name == same => {
                format!("{name} was {} and is {}", short(old), short(new))
            }
            _ => format!("it was `{}` and is `{}`", short(old), short(new)),
        })
    };
    let difference = found.lines().zip(signature.lines()).find_map(line);
    let difference = difference.unwrap_or_else(|| "the number of parameters".to_owned());
    Err(ExtractError::OtherWork { directory: directory.to_owned(), difference }.into())
}

/// What decides where a part's factors belong and how they lie: a line for each pair.
fn of_pairs(pairing: &Pairing) -> String {
    let line = |pair: &Pair| {
        let Pair { name, tuned_name, kind, shape, transposed, tie, .. } = pair;
        let order = if *transposed { "(in, out)" } else { "(out, in)" };
        format!("{name} = {tuned_name}: {} {shape:?} {order}, tied {tie:?}\n", kind.name())
    };
    pairing.pairs.iter().map(line).collect()
}
