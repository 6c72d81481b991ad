//! Lists what an adapter changes: target, rank and scale, one line each.
//!
//! ```text
//! cargo run -p lora-format --example list_targets -- path/to/adapter
//! ```
//!
//! Any format that lora-format reads will do: the model that `lora_format::read` returns is the
//! same for all of them. Tensors stay on disk until their bytes are asked for, so this is fast for
//! an adapter of any size.

use std::path::PathBuf;
use std::process::ExitCode;

use lora_format::{ReadOptions, model::Form};

fn main() -> ExitCode {
    let Some(path) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: list_targets ADAPTER");
        return ExitCode::from(2);
    };
    let adapter = match lora_format::read(&path, &ReadOptions::default()) {
        Ok(adapter) => adapter,
        // The message says which file, which tensor or field, what was expected, what was found.
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    for component in &adapter.components {
        // Later versions add forms, so a program says what it does with those it does not know.
        let Form::LowRank(factors) = &component.form else {
            println!("{}\tnot a pair of factors", component.target.name());
            continue;
        };
        println!("{}\trank {}\tscale {}", component.target.name(), factors.rank(), factors.scale());
    }
    adapter.notes.iter().for_each(|note| eprintln!("note: {note}"));
    ExitCode::SUCCESS
}
