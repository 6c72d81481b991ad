//! The zip archives of torch 1.6 and later.
//!
//! ```text
//! <name>/data.pkl       the pickle
//! <name>/byteorder      `little` or `big`; absent before torch 2.1
//! <name>/data/<key>     the bytes of one storage, aligned to 64
//! <name>/version, <name>/.data/serialization_id, …   not needed
//! ```
//!
//! Records of zip, zip64 among them, are parsed by `rawzip`, which has no dependencies and no
//! `unsafe` and gives ranges of a slice: what is needed here, where an entry is a range of a
//! mapped file and never unpacked. The larger `zip` crate is about what is refused here:
//! compression. What an archive may say is checked here, since to `rawzip` all of it is legal:
//! every entry is stored as it is, lies inside the file before the directory, overlaps no other,
//! has its name once and the same name in both places that hold it.

use std::collections::HashSet;
use std::ops::Range;

use rawzip::{CompressionMethod, ZipArchive, ZipFileHeaderRecord, ZipSliceArchive};

use super::problem::TorchProblem;
use crate::limits;

/// An entry: its path below the archive's directory, and where its bytes are.
#[derive(Debug)]
struct Entry {
    name: String,
    /// From its local header to the end of its data.
    span: Range<usize>,
    data: Range<usize>,
}

/// The entries of an archive.
#[derive(Debug)]
pub(super) struct Archive(Vec<Entry>);

impl Archive {
    /// Reads the directory of the archive that `bytes` is.
    pub(super) fn read(bytes: &[u8]) -> Result<Archive, TorchProblem> {
        let archive = ZipArchive::from_slice(bytes).map_err(unreadable)?;
        let after = (bytes.len() as u64).saturating_sub(archive.end_offset());
        if after > 0 {
            let (place, bytes) = ("the archive", after as usize);
            return Err(TorchProblem::TrailingBytes { place, bytes });
        }
        // Said first: such an archive has compressed entries too.
        let mut records = archive.entries().filter_map(Result::ok);
        if records.any(|record| is_in_directory(record.file_path().as_bytes(), b"constants.pkl")) {
            return Err(TorchProblem::TorchScript);
        }
        let mut entries = Vec::new();
        for record in archive.entries() {
            entries.push(entry(&archive, &record.map_err(unreadable)?)?);
            if entries.len() > limits::ARCHIVE_ENTRIES {
                let (found, limit) = (archive.entries_hint(), limits::ARCHIVE_ENTRIES as u64);
                let found = found.max(entries.len() as u64);
                return Err(TorchProblem::OverLimit { what: "entries", found, limit });
            }
        }
        if entries.len() as u64 != archive.entries_hint() {
            let (said, found) = (archive.entries_hint(), entries.len());
            let message = format!("its directory has {found} entries and claims {said}");
            return Err(TorchProblem::Archive { message });
        }
        refuse_overlap(&mut entries)?;
        strip_directory(&mut entries)?;
        Ok(Archive(entries))
    }

    /// Where the data of the entry called `name` is.
    pub(super) fn find(&self, name: &str) -> Option<Range<usize>> {
        self.0.iter().find(|entry| entry.name == name).map(|entry| entry.data.clone())
    }

    /// The storages: their keys, and where their bytes are.
    pub(super) fn storages(&self) -> impl Iterator<Item = (&str, Range<usize>)> {
        self.0.iter().filter_map(|entry| {
            entry.name.strip_prefix("data/").map(|key| (key, entry.data.clone()))
        })
    }
}

/// Whether a path is that of the file called `name` in the archive's one directory.
fn is_in_directory(path: &[u8], name: &[u8]) -> bool {
    let directory = path.strip_suffix(name).and_then(|directory| directory.strip_suffix(b"/"));
    directory.is_some_and(|directory| !directory.contains(&b'/'))
}

fn unreadable(error: rawzip::Error) -> TorchProblem {
    TorchProblem::Archive { message: error.to_string() }
}

fn entry(
    archive: &ZipSliceArchive<&[u8]>,
    record: &ZipFileHeaderRecord<'_>,
) -> Result<Entry, TorchProblem> {
    let path = record.file_path();
    if path.len() > limits::NAME_BYTES {
        let (found, limit) = (path.len() as u64, limits::NAME_BYTES as u64);
        return Err(TorchProblem::OverLimit { what: "bytes in an entry's name", found, limit });
    }
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).ok();
    let name = text(path.as_bytes()).ok_or(TorchProblem::EntryName)?;
    let (method, flags) = (record.compression_method(), record.flags());
    if method != CompressionMethod::STORE || flags.is_encrypted() {
        return Err(TorchProblem::Compressed { entry: name });
    }
    let (stored, claimed) = (record.compressed_size_hint(), record.uncompressed_size_hint());
    if stored != claimed {
        return Err(TorchProblem::EntrySize { entry: name, stored, claimed });
    }
    let Ok(found) = archive.get_entry(record.wayfinder()) else {
        return Err(TorchProblem::EntryBeyondFile { entry: name });
    };
    let (start, end) = found.compressed_data_range();
    if end > archive.directory_offset() {
        return Err(TorchProblem::EntryBeyondFile { entry: name });
    }
    let header = found.local_header();
    if header.file_path().as_bytes() != name.as_bytes() {
        let local = String::from_utf8_lossy(header.file_path().as_bytes()).into_owned();
        return Err(TorchProblem::EntryNamesDiffer { entry: name, local });
    }
    let (start, end) = (start as usize, end as usize);
    Ok(Entry { name, span: record.local_header_offset() as usize..end, data: start..end })
}

fn refuse_overlap(entries: &mut [Entry]) -> Result<(), TorchProblem> {
    entries.sort_by_key(|entry| (entry.span.start, entry.span.end));
    for pair in entries.windows(2) {
        if let [first, second] = pair
            && second.span.start < first.span.end
        {
            let (first, second) = (first.name.clone(), second.name.clone());
            return Err(TorchProblem::Overlap { first, second });
        }
    }
    Ok(())
}

/// Takes the directory that all entries lie in off their names.
fn strip_directory(entries: &mut [Entry]) -> Result<(), TorchProblem> {
    let is_pickle = |entry: &&Entry| is_in_directory(entry.name.as_bytes(), b"data.pkl");
    let pickle = entries.iter().find(is_pickle).ok_or(TorchProblem::NoPickle)?;
    let directory = pickle.name.trim_end_matches("data.pkl").to_owned();
    let mut names = HashSet::new();
    for entry in entries {
        let Some(name) = entry.name.strip_prefix(&directory) else {
            return Err(TorchProblem::OtherDirectory { entry: entry.name.clone(), directory });
        };
        entry.name = name.to_owned();
        if !names.insert(entry.name.clone()) {
            return Err(TorchProblem::DuplicateEntry { entry: entry.name.clone() });
        }
    }
    Ok(())
}
