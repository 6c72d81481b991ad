//! Windows of files in memory; the only `unsafe` code of this program.
//!
//! The probe maps two files: its input, which it does not write while it is mapped, and its
//! output, which it has just made and nobody else knows. Windows of the output never overlap.
#![expect(unsafe_code, reason = "mapping a file is a promise about the world, not about types")]

use std::fs::File;
use std::io;
use std::ops::Range;

use memmap2::{Advice, Mmap, MmapMut, MmapOptions, UncheckedAdvice};

/// A whole file, to be read.
pub(super) struct Input(Mmap);

impl Input {
    pub(super) fn new(file: &File) -> io::Result<Input> {
        // SAFETY: the file is the benchmark's own model, which nothing writes to or shortens
        // while the probe runs.
        Ok(Input(unsafe { MmapOptions::new().map(file)? }))
    }

    pub(super) fn bytes(&self, range: Range<usize>) -> &[u8] {
        &self.0[range]
    }

    /// Maps all pages of `range` in one call.
    pub(super) fn populate(&self, range: &Range<usize>) -> io::Result<()> {
        self.0.advise_range(Advice::PopulateRead, range.start, range.len())
    }

    /// Drops the pages of `range` from this process, not from the page cache.
    pub(super) fn release(&self, range: &Range<usize>) -> io::Result<()> {
        // SAFETY: the mapping is shared and read-only: dropped pages come back from the file with
        // the same contents.
        unsafe {
            self.0.unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, range.len())
        }
    }
}

/// A window of the output, to be written; unmapped when dropped.
pub(super) fn output_window(
    file: &File,
    range: &Range<usize>,
    huge_pages: bool,
) -> io::Result<MmapMut> {
    // SAFETY: the file belongs to this probe alone and is as long as the range demands; no two
    // workers are given overlapping ranges.
    let window =
        unsafe { MmapOptions::new().offset(range.start as u64).len(range.len()).map_mut(file)? };
    if huge_pages {
        window.advise(Advice::HugePage)?;
    }
    window.advise(Advice::PopulateWrite)?;
    Ok(window)
}
