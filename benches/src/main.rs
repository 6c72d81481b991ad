//! Measures merges against plain copies of the model.
//!
//! ```text
//! cargo build --release -p lora-cli
//! cargo run --release -p lora-bench -- --dir /dev/shm --rank 16,64
//! ```
//!
//! A merge has to read and write as many bytes as a copy; whatever it takes beyond that is its
//! own. So both are run in turn, on the same files, with the page cache warm.
//! `docs/performance.md` says more, and has results.

mod child;
mod compare;
mod machine;
mod memory;
mod model;
mod probe;
mod scratch;
mod table;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;

use child::Runner;
use compare::Comparison;
use model::{FactorType, Preset, Shape};

/// Whatever stops a benchmark; nobody handles it but `main`.
type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Measure merges against plain copies of the model.
#[derive(Debug, Parser)]
#[command(name = "lora-bench", max_term_width = 100)]
struct Arguments {
    /// Where to put models and outputs (in a folder `lora-bench`, which is kept for the next
    /// run); may be repeated to compare file systems
    #[arg(long, value_name = "DIR", default_values_os_t = [std::env::temp_dir()])]
    dir: Vec<PathBuf>,
    /// The shape of the base model
    #[arg(long, value_enum, default_value = "1b")]
    preset: Preset,
    /// Instead of a preset: TinyLlama's shape with as many layers as make N bytes
    #[arg(long, value_name = "N")]
    bytes: Option<u64>,
    /// Files of the base; one is merged as a file, more as a directory
    #[arg(long, value_name = "N")]
    shards: Option<usize>,
    /// Ranks of the adapter
    #[arg(long, value_delimiter = ',', default_value = "16")]
    rank: Vec<usize>,
    /// How the adapter stores its factors
    #[arg(long, value_enum, default_value = "f32")]
    factors: FactorType,
    /// Worker threads of the merge [default: 1 and one per core]
    #[arg(long, value_delimiter = ',')]
    threads: Vec<usize>,
    /// How often everything is run
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// The program to measure [default: lora-cli beside this program]
    #[arg(long, value_name = "PATH")]
    cli: Option<PathBuf>,
    /// Also measure PEFT, with this Python (which has torch, transformers and peft)
    #[arg(long, value_name = "PYTHON")]
    peft: Option<OsString>,
    /// Leave out the runs that wait for the disk (always left out on tmpfs, which has none)
    #[arg(long)]
    skip_fsync: bool,
    /// Instead: peak memory of merges of bases of these sizes in bytes
    #[arg(
        long,
        value_name = "SIZES",
        value_delimiter = ',',
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "1000000000,10000000000",
        conflicts_with = "probe"
    )]
    memory: Option<Vec<u64>>,
    /// Instead: copy the base by several strategies
    #[arg(long)]
    probe: bool,
    /// Print tables as Markdown
    #[arg(long)]
    markdown: bool,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}

/// False if a bound was not kept.
fn run(arguments: &Arguments) -> Result<bool> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    println!("lora-bench {}", words.join(" "));
    for line in machine::describe() {
        println!("{line}");
    }
    let mut within = true;
    for directory in &arguments.dir {
        let directory = directory.join("lora-bench");
        std::fs::create_dir_all(&directory)?;
        println!("file system of {}: {}", directory.display(), machine::file_system(&directory));
        within &= run_in(arguments, &directory)?;
    }
    for line in machine::describe().iter().filter(|line| line.starts_with("load")) {
        println!("{line} (at the end)");
    }
    Ok(within)
}

fn run_in(arguments: &Arguments, directory: &Path) -> Result<bool> {
    let flushes = !arguments.skip_fsync && machine::file_system(directory) != "tmpfs";
    let mut shape =
        arguments.bytes.map_or_else(|| Shape::preset(arguments.preset), Shape::of_bytes);
    shape.shards = arguments.shards.unwrap_or(shape.shards);
    if arguments.probe {
        let base = model::base(directory, &Shape { shards: 1, ..shape })?;
        let file = &base.directory.join("model.safetensors");
        scratch::warm(file)?;
        let table = probe::run(file, &directory.join("probe.out"), arguments.runs, flushes)?;
        println!("\n{}", table.render(arguments.markdown));
        return Ok(true);
    }
    let cli = cli(arguments)?;
    let runner = Runner::new(directory);
    println!("peak memory: {}", runner.method());
    let mut threads = arguments.threads.clone();
    if threads.is_empty() {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        threads = vec![1, cores];
        threads.dedup();
    }
    if let Some(sizes) = &arguments.memory {
        let rank = arguments.rank.first().copied().unwrap_or(16);
        return memory::run(&runner, &cli, directory, sizes, &threads, rank, arguments.markdown);
    }
    let base = model::base(directory, &shape)?;
    let comparison = Comparison {
        cli: &cli,
        threads: &threads,
        runs: arguments.runs,
        fsync: flushes,
        peft: arguments.peft.as_deref(),
    };
    for &rank in &arguments.rank {
        let adapter = model::adapter(&base, rank, arguments.factors)?;
        comparison.run(&runner, &base, &adapter, rank, arguments.markdown)?;
    }
    Ok(true)
}

/// The program to measure.
fn cli(arguments: &Arguments) -> Result<PathBuf> {
    let path = match &arguments.cli {
        Some(path) => path.clone(),
        None => std::env::current_exe()?.with_file_name("lora-cli"),
    };
    if !path.is_file() {
        let shown = path.display();
        return Err(format!(
            "no program at {shown}: `cargo build --release -p lora-cli`, or say --cli PATH"
        )
        .into());
    }
    Ok(path)
}
