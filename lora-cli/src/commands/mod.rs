//! One file per subcommand: its arguments, its work, its report.

mod adapter_output;
mod analysing;
pub(crate) mod combine;
pub(crate) mod compare;
pub(crate) mod convert;
pub(crate) mod extract;
mod figures;
pub(crate) mod inspect;
mod making;
pub(crate) mod merge;
mod rank_arguments;
pub(crate) mod resize;
pub(crate) mod spectrum;
pub(crate) mod stamp;
pub(crate) mod switch;
pub(crate) mod unmerge;
pub(crate) mod verify;

use clap::Args;
use lora_format::container::safetensors::SafetensorsFile;
use lora_format::io::atomic::{Durability, Overwrite};
use lora_format::model::AdapterFormat;
use lora_format::native::{self, DigestVerdict};
use lora_format::{Adapter, ReadOptions};

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
    pub(crate) fn read_options(&self) -> ReadOptions {
        ReadOptions {
            alpha: self.alpha,
            ignore_fields: self.ignore_field.clone(),
            enable_lora: self.enable_lora.clone(),
            residual_base: self.residual_base,
        }
    }
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
