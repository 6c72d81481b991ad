//! The files of torch before 1.6, which later versions still write on request.
//!
//! ```text
//! pickle   the magic number
//! pickle   the version of the protocol, 1001
//! pickle   {"protocol_version": 1001, "little_endian": …, "type_sizes": …}
//! pickle   what was saved
//! pickle   [key, …]: the storages
//! for every key: its number of elements (i64), then its elements
//! ```

use std::collections::HashMap;
use std::ops::Range;

use super::globals;
use super::problem::TorchProblem;
use super::view::StorageId;
use crate::container::pickle::{self, Node, Pickle, Value};
use crate::limits;

/// 0x1950a86a20f9469cfc6c, as a pickle stores it.
const MAGIC: [u8; 10] = [0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];
const PROTOCOL: i64 = 1001;

/// What a file holds: the pickle, and where each storage is.
pub(super) type Parts<'a> = (Pickle<'a>, HashMap<&'a str, Range<usize>>);

/// Reads the file that `bytes` is.
pub(super) fn read(bytes: &[u8]) -> Result<Parts<'_>, TorchProblem> {
    let mut position = 0;
    let mut next = || -> Result<Pickle<'_>, TorchProblem> {
        let pickle = pickle::read(bytes.get(position..).unwrap_or_default(), globals::may_call)?;
        position += pickle.bytes;
        Ok(pickle)
    };
    if next()?.root != Value::Long(&MAGIC) {
        return Err(TorchProblem::NotTorch);
    }
    if next()?.root != Value::Int(PROTOCOL) {
        return Err(TorchProblem::Preamble { what: "the version of the protocol" });
    }
    check_system(&next()?)?;
    let object = next()?;
    let keys = storage_keys(&next()?)?;
    let storages = walk(bytes, position, &keys, &element_sizes(&object)?)?;
    Ok((object, storages))
}

fn check_system(pickle: &Pickle<'_>) -> Result<(), TorchProblem> {
    let pairs = pickle.dict(pickle.root).unwrap_or_default();
    match pairs.iter().find(|pair| pair.0 == Value::Text("little_endian")) {
        Some((_, Value::Bool(true))) => Ok(()),
        Some((_, Value::Bool(false))) => Err(TorchProblem::BigEndian),
        _ => Err(TorchProblem::Preamble { what: "the description of the system" }),
    }
}

fn storage_keys<'a>(pickle: &Pickle<'a>) -> Result<Vec<&'a str>, TorchProblem> {
    let wrong = TorchProblem::Preamble { what: "the list of storages" };
    let Some(Node::List(items)) = pickle.node(pickle.root) else {
        return Err(wrong);
    };
    let key = |item: &Value<'a>| match item {
        Value::Text(key) => Some(*key),
        _ => None,
    };
    items.iter().map(key).collect::<Option<Vec<_>>>().ok_or(wrong)
}

/// The bytes of an element of every storage that the pickle refers to.
fn element_sizes<'a>(pickle: &Pickle<'a>) -> Result<HashMap<&'a str, u64>, TorchProblem> {
    let mut sizes = HashMap::new();
    for node in &pickle.nodes {
        if let Node::Persistent(id) = node {
            let storage = StorageId::of(pickle, *id)
                .map_err(|problem| TorchProblem::Unmeasured { problem })?;
            let size = storage.dtype.bits() / 8;
            if sizes.insert(storage.key, size).is_some_and(|other| other != size) {
                let (key, problem) = (storage.key.to_owned(), "has two element types");
                return Err(TorchProblem::Storage { key, problem });
            }
        }
    }
    Ok(sizes)
}

/// Where the storages are, one after the other from `position`.
fn walk<'a>(
    bytes: &[u8],
    mut position: usize,
    keys: &[&'a str],
    sizes: &HashMap<&str, u64>,
) -> Result<HashMap<&'a str, Range<usize>>, TorchProblem> {
    if keys.len() > limits::ARCHIVE_ENTRIES {
        let (found, limit) = (keys.len() as u64, limits::ARCHIVE_ENTRIES as u64);
        return Err(TorchProblem::OverLimit { what: "storages", found, limit });
    }
    let mut storages = HashMap::new();
    for key in keys {
        let wrong = |problem| TorchProblem::Storage { key: (*key).to_owned(), problem };
        let size = *sizes.get(key).ok_or_else(|| wrong("belongs to no tensor"))?;
        let rest = bytes.get(position..).unwrap_or_default();
        let (count, rest) = rest
            .split_first_chunk::<8>()
            .ok_or_else(|| wrong("is not in the file (truncated?)"))?;
        let length = u64::try_from(i64::from_le_bytes(*count)).ok();
        let length = length.and_then(|count| count.checked_mul(size));
        let length = length
            .and_then(|length| usize::try_from(length).ok())
            .filter(|&length| length <= rest.len())
            .ok_or_else(|| wrong("goes beyond the file (truncated?)"))?;
        let start = position + 8;
        position = start + length;
        if storages.insert(*key, start..position).is_some() {
            return Err(wrong("appears twice"));
        }
    }
    match bytes.len() - position {
        0 => Ok(storages),
        left => Err(TorchProblem::TrailingBytes { place: "the last storage", bytes: left }),
    }
}
