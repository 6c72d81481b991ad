//! An open file that remembers what it was when it was opened.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::mmap::Mapping;
use crate::error::{IoContext, Result};

/// A file, and what it was when it was opened.
#[derive(Debug)]
pub struct OpenedFile {
    path: PathBuf,
    file: File,
    bytes: u64,
    modified: Option<SystemTime>,
}

impl OpenedFile {
    /// Opens a file for reading; a directory is none.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io).
    pub fn open(path: &Path) -> Result<OpenedFile> {
        let file = File::open(path).at(path, "open")?;
        let metadata = file.metadata().at(path, "inspect")?;
        if metadata.is_dir() {
            let source = std::io::Error::from(std::io::ErrorKind::IsADirectory);
            return Err(source).at(path, "open");
        }
        let (bytes, modified) = (metadata.len(), metadata.modified().ok());
        Ok(OpenedFile { path: path.to_owned(), file, bytes, modified })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file itself.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Its size when it was opened.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Refuses the file if it was written to since it was opened.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io).
    pub fn ensure_unchanged(&self) -> Result<()> {
        let metadata = self.file.metadata().at(&self.path, "inspect")?;
        if metadata.len() != self.bytes || metadata.modified().ok() != self.modified {
            let source = std::io::Error::other("the file was changed while it was being read");
            return Err(source).at(&self.path, "use");
        }
        Ok(())
    }

    /// Maps the whole file, of at least the length that it had when it was opened.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io).
    pub fn map(&self) -> Result<Mapping> {
        let mapping = Mapping::new(&self.file).at(&self.path, "map")?;
        if (mapping.len() as u64) < self.bytes {
            let source = std::io::Error::other("the file became shorter while it was open");
            return Err(source).at(&self.path, "map");
        }
        Ok(mapping)
    }
}
