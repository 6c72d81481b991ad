//! What can be wrong with a file that `torch.save` wrote.

use crate::container::pickle::PickleProblem;
use crate::error::Shape;

/// Why a file is not read as one that `torch.save` wrote.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages are the documentation")]
pub enum TorchProblem {
    #[error("a tar archive: the format of torch before 0.1.10, which is not read; save it again")]
    Tar,
    #[error("a zip archive that cannot be read: {message}")]
    Archive { message: String },
    #[error("a zip archive with no `data.pkl`: not one that torch.save wrote")]
    NoPickle,
    #[error("a TorchScript archive: a program, not a file of tensors")]
    TorchScript,
    #[error("the entry `{entry}` lies outside the archive's directory `{directory}`")]
    OtherDirectory { entry: String, directory: String },
    #[error("the entry `{entry}` appears twice")]
    DuplicateEntry { entry: String },
    #[error("an entry's name is not UTF-8")]
    EntryName,
    #[error("the entry `{entry}` is called `{local}` where its data begins")]
    EntryNamesDiffer { entry: String, local: String },
    #[error("the entry `{entry}` is compressed or encrypted; torch stores its entries as they are")]
    Compressed { entry: String },
    #[error("the entry `{entry}` takes {stored} bytes and claims {claimed}")]
    EntrySize { entry: String, stored: u64, claimed: u64 },
    #[error("the entry `{entry}` goes beyond the archive's data (truncated?)")]
    EntryBeyondFile { entry: String },
    #[error("the entries `{first}` and `{second}` overlap")]
    Overlap { first: String, second: String },
    #[error("{bytes} bytes after {place} belong to no tensor")]
    TrailingBytes { place: &'static str, bytes: usize },
    #[error("its numbers are big-endian, and only little-endian ones are read")]
    BigEndian,
    #[error("{found} {what}, the limit is {limit}")]
    OverLimit { what: &'static str, found: u64, limit: u64 },
    #[error(transparent)]
    Pickle(#[from] PickleProblem),
    #[error("a pickle, but not one that torch.save wrote")]
    NotTorch,
    #[error("{what} is not as torch writes it")]
    Preamble { what: &'static str },
    #[error("the storage `{key}` {problem}")]
    Storage { key: String, problem: &'static str },
    #[error("a storage, and what follows it, cannot be found: {problem}")]
    Unmeasured { problem: TensorProblem },
    #[error("it holds {found}, not a dict of tensors")]
    NotADict { found: String },
    #[error("{} holds tensors and has the key {key}, which is not a string", dict(at))]
    Key { at: String, key: String },
    #[error("`{at}` is a list or a tuple of tensors, which have no names there")]
    Unnamed { at: String },
    #[error("`{name}` appears twice")]
    DuplicateName { name: String },
    #[error("{} is, once more, {}: its tensors would have two names", dict(second), dict(first))]
    SharedDict { first: String, second: String },
    #[error("tensor `{tensor}`: {problem}")]
    Tensor { tensor: String, problem: TensorProblem },
}

fn dict(at: &str) -> String {
    if at.is_empty() { "the outermost dict".to_owned() } else { format!("the dict `{at}`") }
}

/// Why a tensor is not read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages are the documentation")]
pub enum TensorProblem {
    #[error("{kind} (made by `{function}`), which is not read")]
    Kind { kind: &'static str, function: String },
    #[error("its type `{name}` is not read")]
    Dtype { name: String },
    #[error("the arguments of `{function}` are not as torch writes them")]
    Arguments { function: String },
    #[error("it is a parameter with attributes of its own, which are not read")]
    Attributes,
    #[error("it is stored conjugated or negated, which is not read")]
    Metadata,
    #[error("its storage is a view of another, which is not read")]
    StorageView,
    #[error("its storage `{key}` is not in the file")]
    NoStorage { key: String },
    #[error("its storage `{key}` should have {expected} bytes, the file has {found}")]
    StorageSize { key: String, expected: u64, found: u64 },
    #[error("{found} dimensions, the limit is {limit}")]
    Dimensions { found: usize, limit: usize },
    #[error(
        "shape {shape} with strides {strides} from element {offset} goes beyond its storage of \
         {elements} elements"
    )]
    Range { shape: Shape, strides: Shape, offset: u64, elements: u64 },
    #[error(
        "its elements do not lie in order, and in order they would take {bytes} bytes{}; the limit \
         for a file of this size is {limit}",
        if *taken == 0 { String::new() } else { format!(", after {taken} for others") }
    )]
    Copy { bytes: u64, taken: u64, limit: u64 },
}
