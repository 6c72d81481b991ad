//! Times one truncated decomposition of `tuned.safetensors − base.safetensors`, as `lora-cli extract`
//! makes it, and says what of the matrix its factors leave over.
//!
//! ```text
//! cargo build --release -p lora-bench --bin svd-bench
//! target/release/svd-bench PAIR_DIR --rank 64 --threads 2 --json
//! ```
//!
//! The time is from the mapped files to two f32 factors: the pass that measures ‖ΔW‖, and the
//! decomposition. It is the least of `--rounds`. `scripts/measure_svd_peers.py` runs this beside torch
//! and scikit-learn.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use lora_format::checkpoint::Checkpoint;
use lora_merge::pair::{Pairing, measure};
use lora_merge::svd::{Goal, SvdOptions, decompose, residual};
use ndarray::{Axis, s};

/// Time truncated decompositions of one pair of matrices.
#[derive(Debug, Parser)]
#[command(name = "svd-bench", max_term_width = 100)]
struct Arguments {
    /// A directory with base.safetensors and tuned.safetensors, of one tensor each
    pair: PathBuf,
    #[arg(long)]
    rank: usize,
    /// Threads [default: one per core]
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// How far above the smallest possible error the estimate may be
    #[arg(long, default_value_t = 0.01)]
    accuracy: f64,
    #[arg(long, default_value_t = 1)]
    rounds: usize,
    /// Print one line of JSON
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), Box<dyn std::error::Error>> {
    let open = |name: &str| Checkpoint::open(&arguments.pair.join(name));
    let pairing = Pairing::new(open("base.safetensors")?, open("tuned.safetensors")?)?;
    let mapped = pairing.open()?;
    if pairing.pairs.len() != 1 {
        return Err("the two files share more than one tensor, or none".into());
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(arguments.threads).build()?;
    let options = SvdOptions { accuracy: arguments.accuracy, ..SvdOptions::default() };
    let delta = mapped.delta(0);
    let (rows, cols) = delta.shape();
    let mut seconds = f64::INFINITY;
    let mut last = None;
    for _ in 0..arguments.rounds {
        let start = Instant::now();
        let (energy, found) = pool.install(|| {
            let energy = measure(&delta).energy;
            decompose(&delta, energy, Goal::Rank(arguments.rank), &options)
                .map(|found| (energy, found))
        })?;
        let rank = found.rank().min(arguments.rank);
        let values = found.spectrum.values.iter().take(rank).map(|&value| value as f32);
        let scale = ndarray::Array1::from_iter(values).insert_axis(Axis(1));
        let right = &found.right.slice(s![..rank, ..]) * &scale;
        seconds = seconds.min(start.elapsed().as_secs_f64());
        last = Some((energy, found, right));
    }
    let Some((energy, found, right)) = last else { return Err("no rounds".into()) };
    let left = found.left.slice(s![.., ..right.nrows()]);
    let over = pool.install(|| residual(&delta, energy, left, right.view(), options.isa));
    let relative = (over / energy).sqrt();
    // Of the products with ΔW and its transpose alone.
    let flops = 4.0 * rows as f64 * cols as f64 * found.products as f64;
    if arguments.json {
        let report = serde_json::json!({
            "seconds": seconds,
            "relative_error": relative,
            "products": found.products,
            "flops": flops,
        });
        println!("{report}");
    } else {
        println!(
            "{rows} × {cols}, rank {}: {seconds:.4} s, {} products, {:.1} GFLOP/s, error {relative:.6} \
             of ‖ΔW‖",
            arguments.rank,
            found.products,
            flops / seconds / 1e9
        );
    }
    Ok(())
}
