//! How fast one core merges: a table of GB/s of base weights.
//!
//! ```text
//! cargo run --release -p lora-merge --example kernel_speed [-- ROWS COLS]
//! ```
//!
//! The default tile, 64×4096, stays in the second-level cache together with
//! its output. Give more rows to include main memory. `f32 path` has a scale
//! that is a power of two, `f64 path` one that is not; ranks above 64 take the
//! latter in any case.

use std::time::{Duration, Instant};

use lora_merge::kernels::{
    Factors, FloatType, Isa, Path, Rounding, TileRegion, convert, merge_tile,
};

/// Measured for at least this long, best of the passes.
const PATIENCE: Duration = Duration::from_millis(150);

fn main() {
    let mut sizes = std::env::args().skip(1).filter_map(|size| size.parse().ok());
    let rows = sizes.next().unwrap_or(64);
    let cols = sizes.next().unwrap_or(4096);
    println!("tile {rows}x{cols}, GB/s of base bytes per core");

    let cases = [
        (FloatType::Bf16, FloatType::Bf16),
        (FloatType::F16, FloatType::F16),
        (FloatType::F32, FloatType::F32),
        (FloatType::F32, FloatType::Bf16),
    ];
    println!("{:8} {:12} {:>5} {:>9} {:>9}", "isa", "types", "rank", "f32 path", "f64 path");
    for isa in Isa::available() {
        for (base_type, out_type) in cases {
            for rank in [4, 16, 64, 256] {
                let speed = |scale| merge_speed(isa, rows, cols, rank, scale, base_type, out_type);
                let (path, single) = speed(0.5);
                let (_, double) = speed(0.3);
                let single = if path == Path::F32 { format!("{single:.2}") } else { "-".into() };
                let types = format!("{base_type}→{out_type}");
                println!("{isa:8} {types:12} {rank:5} {single:>9} {double:>9.2}");
            }
        }
        let stochastic = Rounding::Stochastic { key: 1 };
        let factors = factors(rows, cols, 16, 0.5);
        let (base, mut out) = buffers(rows, cols, FloatType::Bf16, FloatType::Bf16);
        let region = TileRegion::full_width(&factors, 0, rows);
        let speed = throughput(base.len(), || {
            let (from, to) = (FloatType::Bf16, FloatType::Bf16);
            merge_tile(isa, &factors, region, &base, from, &mut out, to, stochastic);
        });
        println!(
            "{isa:8} bf16→bf16 stochastic, rank 16: {speed:.2}, {:.2} ns/element",
            2.0 / speed
        );
        for (from, to) in [(FloatType::F32, FloatType::Bf16), (FloatType::F16, FloatType::Bf16)] {
            let (base, mut out) = buffers(rows, cols, from, to);
            let speed = throughput(base.len(), || {
                convert(isa, &base, from, &mut out, to);
            });
            println!("{isa:8} convert {from}→{to}: {speed:.2}");
        }
    }
}

fn merge_speed(
    isa: Isa,
    rows: usize,
    cols: usize,
    rank: usize,
    scale: f64,
    base_type: FloatType,
    out_type: FloatType,
) -> (Path, f64) {
    let factors = factors(rows, cols, rank, scale);
    let (base, mut out) = buffers(rows, cols, base_type, out_type);
    let region = TileRegion::full_width(&factors, 0, rows);
    let speed = throughput(base.len(), || {
        let rounding = Rounding::Nearest;
        merge_tile(isa, &factors, region, &base, base_type, &mut out, out_type, rounding);
    });
    (factors.path(), speed)
}

/// GB/s of `bytes`, from the fastest of many passes.
fn throughput(bytes: usize, mut pass: impl FnMut()) -> f64 {
    pass();
    let start = Instant::now();
    let mut best = Duration::MAX;
    while start.elapsed() < PATIENCE {
        let start = Instant::now();
        pass();
        best = best.min(start.elapsed());
    }
    bytes as f64 / best.as_secs_f64() / 1e9
}

fn factors(rows: usize, cols: usize, rank: usize, scale: f64) -> Factors {
    let mut noise = Noise(rank as u64);
    let left: Vec<f32> = (0..rows * rank).map(|_| noise.next() * 0.02).collect();
    let right: Vec<f32> = (0..rank * cols).map(|_| noise.next() * 0.02).collect();
    Factors::new(rows, cols, rank, &left, &right, scale)
}

fn buffers(rows: usize, cols: usize, base: FloatType, out: FloatType) -> (Vec<u8>, Vec<u8>) {
    let mut noise = Noise(7);
    let bytes = (0..rows * cols)
        .flat_map(|_| {
            let bits = base.encode(f64::from(noise.next() * 0.05));
            bits.to_le_bytes().into_iter().take(base.size())
        })
        .collect();
    (bytes, vec![0; rows * cols * out.size()])
}

/// Numbers in [-1, 1) that look random.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        ((self.0 >> 40) as f32) / (1 << 23) as f32 - 1.0
    }
}
