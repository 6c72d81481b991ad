//! The output on disk: staged beside its destination, complete under its name or not there.

use std::fs::File;
use std::path::{Path, PathBuf};

use lora_format::IoContext;
use lora_format::checkpoint::{Checkpoint, INDEX_FILE, Layout};
use lora_format::codec::peft;
use lora_format::io::atomic::{
    self, AtomicFile, Durability, Overwrite, StagedDirectory, parent_of,
};
use serde_json::{Map, Value};

use crate::assets::{self, Assets};
use crate::engine::{self, FileSink, OutputHandle, Progress, RunOptions};
use crate::error::{Error, Result};
use crate::plan::MergePlan;
use crate::report::MergeReport;

/// Where and how the output is written.
#[derive(Clone, Debug)]
pub struct OutputOptions {
    /// The file or directory to make.
    pub destination: PathBuf,
    /// Whether something there may be replaced.
    pub overwrite: Overwrite,
    /// Whether to wait for the disk.
    pub durability: Durability,
}

/// Refuses destinations that would damage an input or the user's other files, and file systems
/// that are too small.
///
/// # Errors
/// [`Error::OutputIsInput`], [`Error::NotReplaceable`], [`Error::NoSpace`], or
/// [`lora_format::Error::OutputExists`].
pub fn check_destination(plan: &MergePlan, assets: &Assets, options: &OutputOptions) -> Result<()> {
    let destination = &options.destination;
    if !parent_of(destination).is_dir() {
        return Err(Error::NoDirectory { path: parent_of(destination).to_owned() });
    }
    let shards = plan.base.shards().iter().map(|shard| shard.file.path());
    for input in shards.chain([plan.base.path()]) {
        refuse_input(destination, input)?;
    }
    for one in &plan.adapters {
        let adapter = one.adapter.path.as_path();
        refuse_input(destination, adapter)?;
        if adapter.is_file() {
            for name in [peft::MODEL_FILE, peft::CONFIG_FILE] {
                refuse_input(destination, &parent_of(adapter).join(name))?;
            }
        }
    }
    if destination.file_name().is_none() {
        let (path, reason) = (destination.clone(), "it has no name of its own".to_owned());
        return Err(Error::NotReplaceable { path, reason });
    }
    atomic::refuse_existing(destination, options.overwrite)?;
    ensure_replaceable(plan, assets, destination)?;
    let directory = parent_of(destination);
    let needed = plan.output.files.iter().map(|file| file.bytes).sum::<u64>() + assets.bytes();
    match free_bytes(directory) {
        Some(free) if free < needed => {
            Err(Error::NoSpace { directory: directory.to_owned(), needed, free })
        }
        _ => Ok(()),
    }
}

/// Runs a merge and puts the result in place.
///
/// # Errors
/// What [`check_destination`] refuses, [`Error::NonFinite`], [`Error::Overflow`],
/// [`Error::Interrupted`], or a file system's failure. Nothing is left behind.
pub fn write(
    plan: &MergePlan,
    assets: &Assets,
    options: &OutputOptions,
    run: &RunOptions,
    progress: &Progress,
) -> Result<MergeReport> {
    check_destination(plan, assets, options)?;
    if plan.base.layout() == Layout::File {
        let output = AtomicFile::create(&options.destination, options.overwrite)?;
        let handle = OutputHandle { path: &options.destination, file: output.file() };
        let report = engine::fill(plan, &FileSink(&[handle]), run, progress)?;
        if progress.is_cancelled() {
            return Err(Error::Interrupted);
        }
        output.commit(options.durability)?;
        return Ok(report);
    }
    write_directory(plan, assets, options, run, progress)
}

fn write_directory(
    plan: &MergePlan,
    assets: &Assets,
    options: &OutputOptions,
    run: &RunOptions,
    progress: &Progress,
) -> Result<MergeReport> {
    let staging = StagedDirectory::create(&options.destination, options.overwrite)?;
    let paths: Vec<PathBuf> =
        plan.output.files.iter().map(|file| staging.path().join(&file.name)).collect();
    let mut files = Vec::with_capacity(paths.len());
    for path in &paths {
        files.push(File::create_new(path).at(path, "create")?);
    }
    let handles: Vec<OutputHandle<'_>> =
        paths.iter().zip(&files).map(|(path, file)| OutputHandle { path, file }).collect();
    let report = engine::fill(plan, &FileSink(&handles), run, progress)?;
    for handle in &handles {
        finish_file(handle.file, handle.path, options.durability)?;
    }
    if let Some(index) = &plan.output.index {
        write_json(&staging.path().join(INDEX_FILE), index, options.durability)?;
    }
    for (name, source) in &assets.files {
        let target = staging.path().join(name);
        if let Some(edited) = assets.config.as_ref().filter(|_| name == "config.json") {
            write_json(&target, edited, options.durability)?;
            continue;
        }
        let parent = parent_of(&target);
        std::fs::create_dir_all(parent).at(parent, "create")?;
        std::fs::copy(source, &target).at(source, "copy")?;
        let copied = File::open(&target).at(&target, "open")?;
        finish_file(&copied, &target, options.durability)?;
    }
    for directory in assets.files.keys().filter_map(|name| name.split_once('/')) {
        if options.durability == Durability::Fsync {
            atomic::sync_directory(&staging.path().join(directory.0))?;
        }
    }
    if progress.is_cancelled() {
        return Err(Error::Interrupted);
    }
    // Once more, now that hours may have passed: what stands there may have gained files.
    ensure_replaceable(plan, assets, &options.destination)?;
    staging.commit(options.durability)?;
    Ok(report)
}

fn finish_file(file: &File, path: &Path, durability: Durability) -> Result<()> {
    if durability == Durability::Fsync {
        file.sync_all().at(path, "sync to disk")?;
    }
    Ok(())
}

/// Two-space indentation and a final newline, as transformers writes its JSON files.
fn write_json(path: &Path, value: &Map<String, Value>, durability: Durability) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value)
        .map_err(|source| lora_format::Error::Json { path: path.to_owned(), source })?;
    text.push('\n');
    std::fs::write(path, text).at(path, "write")?;
    let file = File::open(path).at(path, "open")?;
    finish_file(&file, path, durability)
}

/// Refuses an output that is an input, a directory that holds one, or a file that an input
/// directory holds. One that does not exist yet is none of these.
///
/// # Errors
/// [`Error::OutputIsInput`].
pub fn refuse_input(output: &Path, input: &Path) -> Result<()> {
    let (Ok(output_path), Ok(input_path)) = (output.canonicalize(), input.canonicalize()) else {
        return Ok(());
    };
    let inside = output_path.is_file() && output_path.parent() == Some(&input_path);
    if input_path.starts_with(&output_path) || inside {
        let (output, input) = (output.to_owned(), input.to_owned());
        return Err(Error::OutputIsInput { output, input });
    }
    Ok(())
}

/// Why what stands at the destination may not be replaced even on request: only a file by a file,
/// and a directory by a directory if it holds a model and nothing that a merge would not have
/// written.
fn ensure_replaceable(plan: &MergePlan, assets: &Assets, destination: &Path) -> Result<()> {
    match why_not_replaceable(plan, assets, destination)? {
        Some(reason) => Err(Error::NotReplaceable { path: destination.to_owned(), reason }),
        None => Ok(()),
    }
}

fn why_not_replaceable(
    plan: &MergePlan,
    assets: &Assets,
    destination: &Path,
) -> Result<Option<String>> {
    let Ok(found) = std::fs::metadata(destination) else {
        return Ok(None);
    };
    let reason = match (plan.base.layout() == Layout::File, found.is_dir()) {
        (true, false) => return Ok(None),
        (true, true) => "it is a directory, and the output is a file".to_owned(),
        (false, false) => "it is a file, and the output is a directory".to_owned(),
        (false, true) => match Checkpoint::open(destination) {
            Ok(model) if model.config().is_some() => {
                let Some(foreign) = assets::foreign_entry(&model, assets)? else {
                    return Ok(None);
                };
                format!("it holds {foreign}, which no merge writes")
            }
            _ => "it holds no model".to_owned(),
        },
    };
    Ok(Some(reason))
}

/// Bytes that an unprivileged user may still write to the file system of `directory`.
fn free_bytes(directory: &Path) -> Option<u64> {
    #[cfg(unix)]
    {
        let status = rustix::fs::statvfs(directory).ok()?;
        status.f_bavail.checked_mul(status.f_frsize)
    }
    #[cfg(not(unix))]
    {
        let _ = directory;
        None
    }
}
