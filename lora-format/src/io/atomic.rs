//! Files that appear complete under their final name, or not at all.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use tempfile::{NamedTempFile, TempDir};

use crate::error::{Error, IoContext, Result};

/// What to do if the destination exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overwrite {
    /// Refuse, also if it appears while we write.
    Never,
    /// Replace it in one step.
    Replace,
}

/// Whether the data must have reached the disk before the file gets its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// `fsync` the file before the rename and its directory after it.
    Fsync,
    /// Leave it to the operating system.
    Cached,
}

/// A file under construction: a temporary file beside its destination that a rename moves into
/// place. Dropped before [`commit`](AtomicFile::commit), it is removed.
#[derive(Debug)]
pub struct AtomicFile {
    temporary: NamedTempFile,
    destination: PathBuf,
    overwrite: Overwrite,
}

impl AtomicFile {
    /// Starts a file beside `destination`.
    ///
    /// # Errors
    /// [`Error::OutputExists`], or [`Error::Io`] if the directory cannot be written to.
    pub fn create(destination: &Path, overwrite: Overwrite) -> Result<AtomicFile> {
        refuse_existing(destination, overwrite)?;
        let directory = parent_of(destination);
        let name = destination.file_name().unwrap_or_default().to_string_lossy();
        let mut builder = tempfile::Builder::new();
        // A name that no model glob matches: tools that look for `*.safetensors` must not see it.
        let prefix = format!(".{name}.");
        builder.prefix(&prefix).suffix(".partial");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // Temporary files default to 0600; the umask still applies to this.
            builder.permissions(std::fs::Permissions::from_mode(0o666));
        }
        let temporary = builder.tempfile_in(directory).at(directory, "create a file in")?;
        Ok(AtomicFile { temporary, destination: destination.to_owned(), overwrite })
    }

    /// The open temporary file.
    pub fn file(&self) -> &File {
        self.temporary.as_file()
    }

    /// Appends `parts` in order.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Interrupted`] after [`interrupt`].
    pub fn write_parts(&self, parts: &[&[u8]]) -> Result<()> {
        let mut writer = std::io::BufWriter::new(self.file());
        for chunk in parts.iter().flat_map(|part| part.chunks(CHUNK)) {
            if INTERRUPTED.load(Ordering::Relaxed) {
                return Err(Error::Interrupted);
            }
            writer.write_all(chunk).at(&self.destination, "write")?;
        }
        writer.flush().at(&self.destination, "write")
    }

    /// Where the temporary file is.
    pub fn temporary_path(&self) -> &Path {
        self.temporary.path()
    }

    /// Gives the file its name.
    ///
    /// # Errors
    /// [`Error::OutputExists`] if another process made the destination meanwhile, or
    /// [`Error::Io`]; in both cases the temporary file is removed.
    pub fn commit(self, durability: Durability) -> Result<()> {
        let AtomicFile { temporary, destination, overwrite } = self;
        if durability == Durability::Fsync {
            temporary.as_file().sync_all().at(&destination, "sync to disk")?;
        }
        let renamed = match overwrite {
            Overwrite::Never => temporary.persist_noclobber(&destination),
            Overwrite::Replace => temporary.persist(&destination),
        };
        if let Err(failure) = renamed {
            if failure.error.kind() == std::io::ErrorKind::AlreadyExists {
                return Err(Error::OutputExists { path: destination });
            }
            return Err(failure.error).at(&destination, "rename into place");
        }
        if durability == Durability::Fsync {
            sync_directory(parent_of(&destination))?;
        }
        Ok(())
    }
}

/// A directory under construction beside its destination. Dropped before
/// [`commit`](StagedDirectory::commit), it is removed with all it holds.
#[derive(Debug)]
pub struct StagedDirectory {
    temporary: TempDir,
    destination: PathBuf,
    overwrite: Overwrite,
}

impl StagedDirectory {
    /// Starts a directory beside `destination`.
    ///
    /// # Errors
    /// [`Error::OutputExists`], or [`Error::Io`] if the parent cannot be written to.
    pub fn create(destination: &Path, overwrite: Overwrite) -> Result<StagedDirectory> {
        refuse_existing(destination, overwrite)?;
        let parent = parent_of(destination);
        let name = destination.file_name().unwrap_or_default().to_string_lossy();
        let mut builder = tempfile::Builder::new();
        let prefix = format!(".{name}.");
        builder.prefix(&prefix).suffix(".partial");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            builder.permissions(std::fs::Permissions::from_mode(0o777));
        }
        let temporary = builder.tempdir_in(parent).at(parent, "create a directory in")?;
        Ok(StagedDirectory { temporary, destination: destination.to_owned(), overwrite })
    }

    /// Where to put the files.
    pub fn path(&self) -> &Path {
        self.temporary.path()
    }

    /// Gives the directory its name. A directory in its place is moved aside first and removed
    /// after, so that a complete directory stands under the name at every moment but one rename.
    ///
    /// # Errors
    /// [`Error::OutputExists`] if something took the name meanwhile, or [`Error::Io`].
    pub fn commit(self, durability: Durability) -> Result<()> {
        let StagedDirectory { temporary, destination, overwrite } = self;
        if durability == Durability::Fsync {
            sync_directory(temporary.path())?;
        }
        let parent = parent_of(&destination);
        let mut replaced = None;
        if overwrite == Overwrite::Replace && destination.symlink_metadata().is_ok() {
            let name = destination.file_name().unwrap_or_default();
            let aside = tempfile::Builder::new()
                .prefix(".replaced.")
                .suffix(".partial")
                .tempdir_in(parent)
                .at(parent, "create a directory in")?;
            std::fs::rename(&destination, aside.path().join(name))
                .at(&destination, "move aside")?;
            replaced = Some(aside);
        }
        // A rename onto an existing empty directory would succeed: look once more.
        let renamed = refuse_existing(&destination, Overwrite::Never).and_then(|()| {
            std::fs::rename(temporary.path(), &destination).at(&destination, "rename into place")
        });
        if let Err(error) = renamed {
            if let Some(aside) = replaced {
                let name = destination.file_name().unwrap_or_default();
                let old = aside.path().join(name);
                if std::fs::rename(old, &destination).is_err() {
                    // Better a stray directory than the user's data removed.
                    let _kept = aside.keep();
                }
            }
            return Err(error);
        }
        // The name it had is gone; nothing is left for the guard to remove.
        let _renamed_away = temporary.keep();
        if durability == Durability::Fsync {
            sync_directory(parent)?;
        }
        Ok(())
    }
}

/// Bytes written between two looks at [`INTERRUPTED`].
const CHUNK: usize = 8 << 20;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Makes every [`AtomicFile::write_parts`] of this process fail with [`Error::Interrupted`], now and
/// from now on; what was written is removed. For the signal handler of a program about to end.
pub fn interrupt() {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// Writes `parts` in order as one file that appears complete or not at all.
///
/// # Errors
/// As [`AtomicFile::create`] and [`AtomicFile::commit`].
pub fn write(
    destination: &Path,
    parts: &[&[u8]],
    overwrite: Overwrite,
    durability: Durability,
) -> Result<()> {
    let output = AtomicFile::create(destination, overwrite)?;
    output.write_parts(parts)?;
    output.commit(durability)
}

/// Refuses a destination that exists, unless it may be replaced.
///
/// # Errors
/// [`Error::OutputExists`].
pub fn refuse_existing(destination: &Path, overwrite: Overwrite) -> Result<()> {
    // `symlink_metadata`: a dangling link is in the way too.
    if overwrite == Overwrite::Never && destination.symlink_metadata().is_ok() {
        return Err(Error::OutputExists { path: destination.to_owned() });
    }
    Ok(())
}

/// The directory that holds `path`; `.` for a bare name.
pub fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Makes the entries of a directory durable (a no-op where the platform has no such call).
///
/// # Errors
/// [`Error::Io`].
pub fn sync_directory(directory: &Path) -> Result<()> {
    #[cfg(unix)]
    File::open(directory).and_then(|handle| handle.sync_all()).at(directory, "sync to disk")?;
    #[cfg(not(unix))]
    let _ = directory;
    Ok(())
}
