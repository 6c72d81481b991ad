//! lora-format on the fixtures: the native format, the container, PEFT, malformed input.
//!
//! Rule numbers (F1 to F53) are those of `docs/FORMAT.md`.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail as tests do")]

mod bad;
mod foreign;
mod kohya;
mod native;
mod peft;
mod python;
mod safetensors;
mod torch;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use lora_format::{Adapter, ReadOptions};

fn read(path: &Path) -> lora_format::Result<Adapter> {
    lora_format::read(path, &ReadOptions::default())
}

/// The files (or directories) in `folder` whose names end with `suffix`, sorted; not `README.md`.
fn entries(folder: &Path, suffix: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut paths: Vec<PathBuf> =
        entries.filter(|path| name(path).ends_with(suffix) && name(path) != "README.md").collect();
    paths.sort();
    assert!(!paths.is_empty(), "{}", folder.display());
    paths
}

fn name(path: &Path) -> String {
    path.file_name().unwrap().to_string_lossy().into_owned()
}

/// What a row of a table says of a file that is accepted.
const OK: &str = "(read)";

/// Compares each path's outcome with its row. A path without a row fails, and a row without a path.
fn check_table<T>(
    folder: &Path,
    paths: &[PathBuf],
    table: &[(&str, &str)],
    open: impl Fn(&Path) -> lora_format::Result<T>,
) {
    let prefix = format!("{}/", folder.display());
    let mut found = String::new();
    let mut wrong = Vec::new();
    for path in paths {
        let key = path.to_string_lossy().replacen(&prefix, "", 1);
        let message = match open(path) {
            Ok(_) => OK.to_owned(),
            Err(error) => error.to_string().replace(&prefix, ""),
        };
        writeln!(found, "    ({key:?}, {message:?}),").unwrap();
        match table.iter().find(|row| row.0 == key) {
            Some(row) if row.1 == message => {}
            Some(row) => wrong.push(format!("{key}\n  expected {}\n  found    {message}", row.1)),
            None => wrong.push(format!("{key}: no row; found {message}")),
        }
    }
    for (key, _) in table {
        if !paths.iter().any(|path| path.ends_with(key)) {
            wrong.push(format!("{key}: no such file"));
        }
    }
    assert!(wrong.is_empty(), "{}\n\nall that was found:\n{found}", wrong.join("\n"));
}

/// A small generator of pseudo-random numbers (SplitMix64), so that every run sees the same.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Below `bound`.
    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next() as u8).collect()
    }

    /// Up to `most` characters, among them those that JSON escapes and UTF-16 sorts differently.
    fn text(&mut self, most: usize) -> String {
        const CHARS: [char; 16] = [
            'a', 'b', 'z', '.', '_', '0', '"', '\\', '/', '\n', '\u{1}', '\u{7f}', 'é', '层',
            '\u{ffee}', '😀',
        ];
        (0..self.below(most + 1)).map(|_| *self.pick(&CHARS)).collect()
    }
}
