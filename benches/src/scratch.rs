//! Files that come and go between runs.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use crate::Result;

/// Removes a file or directory, and flushes its file system, so that the next run pays for
/// nobody's dirty pages.
pub(crate) fn remove(path: &Path) -> Result<()> {
    match path.symlink_metadata() {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path)?,
        Ok(_) => fs::remove_file(path)?,
        Err(_) => {}
    }
    if let Some(directory) = path.parent() {
        rustix::fs::syncfs(File::open(directory)?)?;
    }
    Ok(())
}

/// Reads a file to its end, so that it is in the page cache.
pub(crate) fn warm(path: &Path) -> Result<()> {
    let mut file = File::open(path)?;
    let mut buffer = vec![0; 1 << 20];
    while file.read(&mut buffer)? > 0 {}
    Ok(())
}

/// `fsync` of a file, or of a directory and the files in it.
pub(crate) fn fsync(path: &Path) -> Result<()> {
    if path.is_dir() {
        for entry in fs::read_dir(path)? {
            File::open(entry?.path())?.sync_all()?;
        }
    }
    File::open(path)?.sync_all()?;
    Ok(())
}
