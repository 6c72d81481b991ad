//! `lora-cli merge`: adapters into their base.

use std::path::PathBuf;

use clap::Args;

use super::making::{self, AdapterArgument, Deed, MakeArguments};
use crate::failure::{Failure, Outcome};

/// Merge adapters into their base model: W' = W0 + Σ weight·(f(W0) − W0)
///
/// BASE is a safetensors file or a Hugging Face directory, quantised or not; the output is of the
/// same kind, in full precision. Every tensor of every adapter is used, or nothing is written.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  lora-cli merge base.safetensors adapter.safetensors
  lora-cli merge Llama-3-8B ./my-lora -o Llama-3-8B-mine
  lora-cli merge Llama-3-8B ./my-lora --dry-run
  lora-cli merge Llama-3-8B ./style@0.7 ./facts@0.3 -o out
  lora-cli merge Llama-3-8B ./my-lora --dtype f32 --scale 0.8 -o out")]
pub(crate) struct Arguments {
    /// The base model: a .safetensors file, or a directory with model.safetensors or shards
    base: PathBuf,
    /// The adapters, each with a weight if that is not 1: our own format, a PEFT directory, or an
    /// adapter_model.safetensors. They are summed in this order and rounded once
    #[arg(required = true, value_name = "ADAPTER[@WEIGHT]")]
    adapters: Vec<AdapterArgument>,
    #[command(flatten)]
    pub(crate) make: MakeArguments,
}

pub(crate) fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    let adapters = arguments.make.read(&arguments.base, &arguments.adapters, false)?;
    making::make(Deed::Merge, &arguments.base, adapters, &arguments.make)
}
