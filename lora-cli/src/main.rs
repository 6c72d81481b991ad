//! `lora-cli`: merge, inspect, convert and check low-rank adapters.
//!
//! stdout carries data, stderr talk. Exit status: 0 done, 1 a check found something, 2 an error,
//! 130 interrupted.

mod commands;
mod failure;
mod picture;
mod printer;
mod progress;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use failure::{Failure, Outcome};

/// Merge, inspect, convert and check low-rank adapters (LoRA).
#[derive(Debug, Parser)]
#[command(name = "lora-cli", version, propagate_version = true, max_term_width = 100)]
#[command(after_help = "Exit status: 0 done, 1 a check found something, 2 an error, \
                        130 interrupted.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Merge(commands::merge::Arguments),
    Extract(commands::extract::Arguments),
    Unmerge(commands::unmerge::Arguments),
    Switch(commands::switch::Arguments),
    Verify(commands::verify::Arguments),
    Inspect(commands::inspect::Arguments),
    Check(commands::check::Arguments),
    Spectrum(commands::spectrum::Arguments),
    Compare(commands::compare::Arguments),
    Convert(commands::convert::Arguments),
    Resize(commands::resize::Arguments),
    Metadata(commands::metadata::Arguments),
    Combine(commands::combine::Arguments),
    Stamp(commands::stamp::Arguments),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let (json, result) = match &cli.command {
        Command::Extract(arguments) => (arguments.json, commands::extract::run(arguments)),
        Command::Merge(arguments) => (arguments.make.json, commands::merge::run(arguments)),
        Command::Unmerge(arguments) => (arguments.make.json, commands::unmerge::run(arguments)),
        Command::Switch(arguments) => (arguments.make.json, commands::switch::run(arguments)),
        Command::Verify(arguments) => (arguments.json, commands::verify::run(arguments)),
        Command::Check(arguments) => (arguments.json, commands::check::run(arguments)),
        Command::Inspect(arguments) => (arguments.json, commands::inspect::run(arguments)),
        Command::Spectrum(arguments) => (arguments.output.json, commands::spectrum::run(arguments)),
        Command::Compare(arguments) => (arguments.output.json, commands::compare::run(arguments)),
        Command::Convert(arguments) => (arguments.json, commands::convert::run(arguments)),
        Command::Resize(arguments) => (arguments.json, commands::resize::run(arguments)),
        Command::Metadata(arguments) => (arguments.json(), commands::metadata::run(arguments)),
        Command::Combine(arguments) => (arguments.json, commands::combine::run(arguments)),
        Command::Stamp(arguments) => (arguments.json, commands::stamp::run(arguments)),
    };
    match result {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::Finding) => ExitCode::from(1),
        Err(Failure::Interrupted) => {
            printer::talk("interrupted; no output was written");
            ExitCode::from(130)
        }
        // Whoever read our output has had enough of it.
        Err(Failure::ClosedPipe) => ExitCode::SUCCESS,
        Err(Failure::Error { message, hint, problems }) => {
            if json {
                let _closed =
                    printer::json(&failure::ErrorReport::new(&message, hint.as_deref(), &problems));
            }
            printer::talk(&format!("error: {message}"));
            if let Some(hint) = hint {
                printer::talk(&format!("hint: {hint}"));
            }
            ExitCode::from(2)
        }
    }
}
