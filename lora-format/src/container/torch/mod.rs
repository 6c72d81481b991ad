//! What `torch.save` writes: a pickle of the objects, and the bytes of their storages.
//!
//! Both formats are read, the zip archive of torch 1.6 and later (`archive`) and the one before
//! (`legacy`); the tar archives of the first versions are refused. The pickle is taken as data
//! (`container/pickle.rs`): nothing in it is executed, and a pickle that calls what no file of
//! tensors needs is refused as a whole, by the rule in `globals`. `state` says which tensors a
//! file has and what they are called; `view` where their bytes are. A tensor is a slice of the
//! mapped file wherever its elements lie in order.
//!
//! Refused by name: big-endian files, compressed archives, TorchScript, quantised, sparse and
//! complex tensors and those of classes of their own, conjugated or negated views.

mod archive;
mod globals;
mod legacy;
mod problem;
mod state;
mod view;

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

pub use self::problem::{TensorProblem, TorchProblem};
pub use self::state::PlainValue;
pub use super::pickle::PickleProblem;

use self::archive::Archive;
use self::view::{Copies, View};
use super::pickle::{self, Pickle};
use super::{Container, TensorFile};
use crate::error::{Error, Result};
use crate::io::opened::OpenedFile;
use crate::limits;
use crate::tensor::MappedFile;

/// Where the mark of a tar archive is.
const TAR_MARK: Range<usize> = 257..262;

/// Whether a file begins as a tar archive does. No safetensors file does: the name of a tar's first
/// entry is no length of a header.
pub(super) fn is_tar(start: &[u8]) -> bool {
    let length = start.first_chunk().map(|bytes| u64::from_le_bytes(*bytes));
    start.get(TAR_MARK) == Some(b"ustar")
        && length.is_some_and(|length| length > limits::HEADER_BYTES)
}

/// Reads an open file.
///
/// # Errors
/// [`Error::Io`], or [`Error::Torch`] with the rule that is broken.
pub(super) fn read(opened: OpenedFile) -> Result<TensorFile> {
    let path = opened.path().to_owned();
    let file = Arc::new(MappedFile::of(Arc::new(opened))?);
    read_mapped(&path, &file).map_err(|problem| Error::Torch { path, problem })
}

fn read_mapped(path: &Path, file: &Arc<MappedFile>) -> Result<TensorFile, TorchProblem> {
    let bytes = file.bytes();
    if is_tar(bytes) {
        return Err(TorchProblem::Tar);
    }
    let archive = if bytes.starts_with(b"PK") { Some(Archive::read(bytes)?) } else { None };
    let (pickle, storages) = match &archive {
        Some(archive) => {
            (archived_pickle(bytes, archive)?, archive.storages().collect::<HashMap<_, _>>())
        }
        None => legacy::read(bytes)?,
    };
    let state = state::read(&pickle)?;
    let mut copies = Copies::of_file(bytes.len() as u64);
    let mut tensors = Vec::with_capacity(state.tensors.len());
    for (name, value) in state.tensors {
        let tensor = View::of(&pickle, value)
            .and_then(|view| view.tensor(&name, file, &storages, &mut copies));
        match tensor {
            Ok(tensor) => tensors.push(tensor),
            Err(problem) => return Err(TorchProblem::Tensor { tensor: name, problem }),
        }
    }
    Ok(TensorFile {
        path: path.to_owned(),
        container: Container::Torch,
        tensors,
        metadata: Vec::new(),
        values: state.values,
    })
}

/// The pickle of an archive.
fn archived_pickle<'a>(bytes: &'a [u8], archive: &Archive) -> Result<Pickle<'a>, TorchProblem> {
    let entry = |name: &str| archive.find(name).and_then(|range| bytes.get(range));
    match entry("byteorder") {
        None | Some(b"little") => {}
        Some(b"big") => return Err(TorchProblem::BigEndian),
        Some(_) => return Err(TorchProblem::Preamble { what: "the entry `byteorder`" }),
    }
    let text = entry("data.pkl").ok_or(TorchProblem::NoPickle)?;
    let pickle = pickle::read(text, globals::may_call)?;
    match text.len() - pickle.bytes {
        0 => Ok(pickle),
        bytes => Err(TorchProblem::TrailingBytes { place: "the pickle", bytes }),
    }
}
