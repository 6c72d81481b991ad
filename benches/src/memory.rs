//! Peak memory of merges of bases of different sizes, held against the bound.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::Result;
use crate::child::Runner;
use crate::compare::merge_arguments;
use crate::model::{self, FactorType, Shape};
use crate::scratch;
use crate::table::Table;

const MEBIBYTE: u64 = 1 << 20;

/// What a merge may use, whatever the size of the base.
fn bound(threads: usize, adapter_as_f32: u64, header_bytes: u64) -> u64 {
    64 * MEBIBYTE + 4 * MEBIBYTE * threads as u64 + adapter_as_f32 + 4 * header_bytes
}

/// Merges a base of each size with each number of threads; all files are removed afterwards.
/// Returns whether every peak stayed within the bound.
pub(crate) fn run(
    runner: &Runner,
    cli: &Path,
    directory: &Path,
    sizes: &[u64],
    threads: &[usize],
    rank: usize,
    markdown: bool,
) -> Result<bool> {
    let mut table = Table::new(&[
        "base GB",
        "threads",
        "rank",
        "adapter as f32 MiB",
        "headers KiB",
        "peak MiB",
        "bound MiB",
        "within",
    ]);
    let mut within = true;
    for &size in sizes {
        let parent = directory.join("memory");
        let base = model::base(&parent, &Shape::of_bytes(size))?;
        let adapter = model::adapter(&base, rank, FactorType::F32)?;
        let mut headers = 0;
        for file in base.files.iter().chain([&adapter.file]) {
            let mut length = [0; 8];
            File::open(file)?.read_exact(&mut length)?;
            headers += u64::from_le_bytes(length);
        }
        let out = parent.join("out.safetensors");
        for &threads in threads {
            scratch::remove(&out)?;
            let arguments =
                merge_arguments(base.argument(), &adapter.directory, &out, threads, false);
            let peak = runner.run(cli.as_os_str(), &arguments)?.peak_bytes;
            let bound = bound(threads, adapter.bytes_as_f32, headers);
            within &= peak <= bound;
            let mebibytes = |bytes: u64| format!("{:.1}", bytes as f64 / MEBIBYTE as f64);
            table.push(vec![
                format!("{:.2}", base.bytes as f64 / 1e9),
                threads.to_string(),
                rank.to_string(),
                mebibytes(adapter.bytes_as_f32),
                (headers / 1024).to_string(),
                mebibytes(peak),
                mebibytes(bound),
                if peak <= bound { "yes" } else { "NO" }.to_owned(),
            ]);
        }
        scratch::remove(&parent)?;
    }
    println!();
    println!("{}", table.render(markdown));
    Ok(within)
}
