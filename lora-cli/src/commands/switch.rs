//! `lora-cli switch`: one adapter out of a model, another in, in one pass.

use std::path::PathBuf;

use clap::Args;

use super::making::{self, AdapterArgument, Deed, MakeArguments};
use crate::failure::{Failure, Outcome};

/// Replace merged adapters by others in one pass, rounded once: W'' = W' − ΔA + ΔB
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  lora-cli switch Llama-3-8B-french --from ./french --to ./german -o Llama-3-8B-german")]
pub(crate) struct Arguments {
    /// The merged model
    merged: PathBuf,
    /// The adapters that it holds, with the weights that they were merged with
    #[arg(long, required = true, num_args = 1.., value_name = "ADAPTER[@WEIGHT]")]
    from: Vec<AdapterArgument>,
    /// The adapters that it is to hold
    #[arg(long, required = true, num_args = 1.., value_name = "ADAPTER[@WEIGHT]")]
    to: Vec<AdapterArgument>,
    #[command(flatten)]
    pub(crate) make: MakeArguments,
}

pub(crate) fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    let mut adapters = arguments.make.read(&arguments.merged, &arguments.from, true)?;
    adapters.extend(arguments.make.read(&arguments.merged, &arguments.to, false)?);
    making::make(Deed::Switch, &arguments.merged, adapters, &arguments.make)
}
