//! Files: bounded reads, mappings, atomic writes.

pub mod atomic;
pub mod mmap;
pub mod opened;

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::error::{Error, IoContext, Result};

/// Reads a whole file of at most `limit` bytes.
///
/// # Errors
/// [`Error::Io`], or [`Error::TooLarge`] before anything beyond the limit is held.
pub fn read_limited(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let file = File::open(path).at(path, "open")?;
    let mut bytes = Vec::new();
    // One byte more than allowed tells a file at the limit from one beyond it, also where the
    // length that the file system reports is not the length that it delivers.
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes).at(path, "read")?;
    if bytes.len() as u64 > limit {
        return Err(Error::TooLarge { path: path.to_owned(), limit });
    }
    Ok(bytes)
}
