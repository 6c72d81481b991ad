//! One file per subcommand: its arguments, its work, its report.

mod adapter_output;
mod analysing;
pub(crate) mod check;
pub(crate) mod combine;
pub(crate) mod compare;
pub(crate) mod convert;
pub(crate) mod extract;
mod figures;
pub(crate) mod inspect;
mod making;
pub(crate) mod merge;
pub(crate) mod metadata;
mod rank_arguments;
pub(crate) mod resize;
pub(crate) mod spectrum;
pub(crate) mod stamp;
pub(crate) mod switch;
pub(crate) mod unmerge;
pub(crate) mod verify;

use std::path::Path;

use clap::Args;
use lora_format::container::safetensors::SafetensorsFile;
use lora_format::io::atomic::{self, Durability, Overwrite};
use lora_format::model::AdapterFormat;
use lora_format::native::{self, DigestVerdict};
use lora_format::{Adapter, ReadOptions, json, limits};
use lora_merge::output::refuse_input;
use serde_json::{Map, Value};

use crate::failure::Failure;

/// What every command that reads an adapter takes.
#[derive(Debug, Args)]
pub(crate) struct AdapterArguments {
    /// The alpha of an adapter whose configuration was lost (scale = alpha/rank)
    #[arg(long, value_name = "ALPHA", allow_negative_numbers = true)]
    pub(crate) alpha: Option<f64>,
    /// Pass over a field of adapter_config.json that is not known here
    #[arg(long, value_name = "NAME")]
    pub(crate) ignore_field: Vec<String>,
    /// Which groups of a fused projection were trained, for loralib's MergedLinear: true,false,true
    #[arg(long, value_name = "BOOLS", value_delimiter = ',')]
    pub(crate) enable_lora: Option<Vec<bool>>,
    /// The base given is the residual base that training began with (PiSSA, OLoRA, CorDA, LoftQ,
    /// LoRA-GA)
    #[arg(long)]
    pub(crate) residual_base: bool,
}

impl AdapterArguments {
    /// `base` is the model that the adapter is for, where it is known: some formats store rows in
    /// the order of its heads.
    pub(crate) fn read_options(&self, base: Option<&Path>) -> Result<ReadOptions, Failure> {
        Ok(ReadOptions {
            alpha: self.alpha,
            ignore_fields: self.ignore_field.clone(),
            enable_lora: self.enable_lora.clone(),
            residual_base: self.residual_base,
            base_config: base.map(config_of).transpose()?.flatten(),
        })
    }
}

/// The `config.json` of a model.
pub(crate) fn config_of(model: &Path) -> Result<Option<Map<String, Value>>, Failure> {
    let path = model.join("config.json");
    if !path.exists() {
        return Ok(None);
    }
    Ok(Some(json::read_object(&path, limits::CONFIG_BYTES)?))
}

/// Refuses an adapter of our own format whose data is not what was written: whatever reads it would
/// merge the damage, or seal it under a new digest.
pub(crate) fn refuse_damaged(adapter: &Adapter) -> Result<(), Failure> {
    if adapter.format != AdapterFormat::Native {
        return Ok(());
    }
    match native::verify_digest(&SafetensorsFile::open(&adapter.path)?)? {
        DigestVerdict::Intact { .. } => Ok(()),
        DigestVerdict::Damaged { recorded, actual } => {
            let message = format!(
                "{}: damaged: its data has the digest {actual}, it was written with {recorded}",
                adapter.path.display()
            );
            Err(Failure::new(message, Some("fetch the file again, or restore it from a copy")))
        }
    }
}

/// Refuses a table (`--csv`) that cannot be written in the end, or would replace what is read or
/// written besides.
pub(crate) fn check_table(
    table: Option<&Path>,
    write: &WriteArguments,
    output: Option<&Path>,
    inputs: &[&Path],
) -> Result<(), Failure> {
    let Some(path) = table else { return Ok(()) };
    check_file("--csv", path, write, inputs)?;
    if output.is_some_and(|output| is_same(output, path)) {
        let message = format!("{}: is where the adapter goes", path.display());
        return Err(Failure::new(message, Some("give --csv another path")));
    }
    Ok(())
}

/// Refuses a file that an option asks for, if it cannot be written in the end or would replace what is
/// read.
pub(crate) fn check_file(
    option: &str,
    path: &Path,
    write: &WriteArguments,
    inputs: &[&Path],
) -> Result<(), Failure> {
    let other = format!("give {option} another path");
    let parent = atomic::parent_of(path);
    if !parent.is_dir() {
        let message = format!("{option} {}: no such directory", parent.display());
        return Err(Failure::new(message, Some("create it first, or name another")));
    }
    atomic::refuse_existing(path, write.overwrite()).map_err(|error| {
        Failure::new(error.to_string(), Some(&format!("{other}, or replace it with --force")))
    })?;
    if path.is_dir() {
        let message = format!("{}: it is a directory", path.display());
        return Err(Failure::new(message, Some("name a file")));
    }
    for input in inputs {
        refuse_input(path, input).map_err(|error| Failure::new(error.to_string(), Some(&other)))?;
    }
    Ok(())
}

/// Whether two paths are one, as far as they say so.
pub(crate) fn is_same(one: &Path, other: &Path) -> bool {
    let directory = |path: &Path| std::fs::canonicalize(atomic::parent_of(path)).ok();
    one == other || one.file_name() == other.file_name() && directory(one) == directory(other)
}

/// A number and what there is of it.
pub(crate) fn counted(count: usize, one: &str, more: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { more })
}

/// How far a budget's allotment may be from the best, beside what it keeps of the energy: both sums of
/// σ², or of σ²/‖W₀‖² if gains are relative.
pub(crate) fn short_of_best(short: f64, kept: f64, relative: bool) -> String {
    if short <= 0.0 {
        return "no allotment of these bytes keeps more energy".to_owned();
    }
    let energy = if relative { "energy relative to the weights" } else { "energy" };
    let share = match 100.0 * short / kept {
        share if share < 0.01 => format!("{share:.1e} %"),
        share => format!("{share:.2} %"),
    };
    format!("no allotment of these bytes keeps {share} more {energy}")
}

/// What every command that writes takes.
#[derive(Debug, Args)]
pub(crate) struct WriteArguments {
    /// Replace an existing output
    #[arg(long)]
    pub(crate) force: bool,
    /// Do not wait until the output has reached the disk
    #[arg(long)]
    pub(crate) no_fsync: bool,
}

impl WriteArguments {
    pub(crate) fn overwrite(&self) -> Overwrite {
        if self.force { Overwrite::Replace } else { Overwrite::Never }
    }

    pub(crate) fn durability(&self) -> Durability {
        if self.no_fsync { Durability::Cached } else { Durability::Fsync }
    }
}
