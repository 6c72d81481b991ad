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
}

impl WorkDirectory {
    /// The directory that belongs to an output.
    #[must_use]
    pub fn path_for(output: &Path) -> PathBuf {
        let name = output.file_name().unwrap_or_default().to_string_lossy();
        atomic::parent_of(output).join(format!(".{name}.extract"))
    }

    /// Starts it, or goes on with it: `signature` says of which files and how it is made. What the
    /// pairing says of them, which the configurations decide too, is added to that. Without `resume`,
    /// what it holds is removed.
    ///
    /// # Errors
    /// [`ExtractError::OtherWork`] if it is of another extraction; [`ExtractError::NoWork`] if a
    /// directory of its name is none of ours; [`lora_format::Error::Io`].
    pub fn open(
        output: &Path,
        signature: &str,
        pairing: &Pairing,
        resume: bool,
    ) -> Result<WorkDirectory> {
        let path = WorkDirectory::path_for(output);
        let record = path.join(SIGNATURE);
        let signature = format!("{signature}{}", of_pairs(pairing));
        let io = |source| lora_format::Error::Io { path: path.clone(), action: "prepare", source };
        if path.symlink_metadata().is_ok() {
            match std::fs::read_to_string(&record) {
                Ok(found) if resume => return compared(path, &found, &signature),
                Ok(_) => std::fs::remove_dir_all(&path).map_err(io)?,
                // Begun, and interrupted before it was signed; anything else is somebody else's.
                Err(_) if std::fs::remove_dir(&path).is_ok() => {}
                Err(_) => return Err(ExtractError::NoWork { directory: path }.into()),
            }
        }
        std::fs::create_dir(&path).map_err(io)?;
        let parts = [signature.as_bytes()];
        atomic::write(&record, &parts, Overwrite::Never, Durability::Cached)?;
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

/// Goes on, if the signatures are equal.
fn compared(directory: PathBuf, found: &str, signature: &str) -> Result<WorkDirectory> {
    /// A configuration is one line.
    const SHOWN: usize = 120;
    if found == signature {
        return Ok(WorkDirectory { path: directory });
    }
    let short = |line: &str| match line.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line.to_owned(),
    };
    let line = |(old, new): (&str, &str)| {
        (old != new).then(|| format!("it was `{}` and is `{}`", short(old), short(new)))
    };
    let difference = found.lines().zip(signature.lines()).find_map(line);
    let difference = difference.unwrap_or_else(|| "the number of parameters".to_owned());
    Err(ExtractError::OtherWork { directory, difference }.into())
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
