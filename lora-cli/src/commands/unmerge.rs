//! `lora-cli unmerge`: adapters out of a model again.

use std::path::PathBuf;

use clap::Args;

use super::making::{self, AdapterArgument, Deed, MakeArguments};
use crate::failure::{Failure, Outcome};

/// Take adapters out of a model that they were merged into: W = W' − Σ weight·Δ
///
/// Only changes that add something can be subtracted: LoRA, LoHa, LoKr, VeRA, MiSS, biases of B.
/// What rounding at the time of the merge made uncertain is counted.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  lora-cli unmerge Llama-3-8B-mine ./my-lora -o Llama-3-8B
  lora-cli unmerge merged.safetensors ./style@0.7 ./facts@0.3")]
pub(crate) struct Arguments {
    /// The merged model
    merged: PathBuf,
    /// The adapters, with the weights that they were merged with
    #[arg(required = true, value_name = "ADAPTER[@WEIGHT]")]
    adapters: Vec<AdapterArgument>,
    #[command(flatten)]
    pub(crate) make: MakeArguments,
}

pub(crate) fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    let adapters = arguments.make.read(&arguments.merged, &arguments.adapters, true)?;
    making::make(Deed::Unmerge, &arguments.merged, adapters, &arguments.make)
}
