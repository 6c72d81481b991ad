//! The same bytes for any number of threads, any tile size, any instruction set.

use std::path::{Path, PathBuf};

use lora_format::Dtype;
use lora_merge::MergeOptions;
use lora_merge::engine::{DEFAULT_TILE_BYTES, RoundingMode, RunOptions};
use lora_merge::kernels::Isa;
use lora_merge::report::MergeReport;

use crate::support::{Factors, Prng, Tensor, fixtures, read_model};
use crate::{Case, merge};

const NEAREST: RoundingMode = RoundingMode::Nearest;
const STOCHASTIC: RoundingMode = RoundingMode::Stochastic { seed: 20_260_801 };

/// The files of a merge, with their contents.
fn files(output: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    if output.is_file() {
        return vec![(PathBuf::new(), std::fs::read(output).unwrap())];
    }
    let entries = std::fs::read_dir(output).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = entries
        .map(|path| (path.strip_prefix(output).unwrap().to_owned(), std::fs::read(&path).unwrap()))
        .collect();
    files.sort();
    files
}

/// Everything that a report says except the number of threads.
fn comparable(report: &MergeReport) -> MergeReport {
    MergeReport { threads: 0, ..report.clone() }
}

fn check(base: &Path, adapter: &Path, dtype: Option<Dtype>, rounding: RoundingMode) {
    let scratch = tempfile::tempdir().unwrap();
    let options = MergeOptions { dtype, ..MergeOptions::default() };
    let mut number = 0;
    let mut run = |isa, threads, tile_bytes| {
        let output = scratch.path().join(number.to_string());
        number += 1;
        let run = RunOptions { threads, isa, rounding, tile_bytes, ..RunOptions::default() };
        let report = merge(base, adapter, &output, &options, &run).unwrap();
        (files(&output), report)
    };
    let (oracle, first) = run(Isa::Scalar, 1, DEFAULT_TILE_BYTES);
    for isa in Isa::available() {
        for (threads, tile_bytes) in [
            (1, DEFAULT_TILE_BYTES),
            (2, DEFAULT_TILE_BYTES),
            (7, DEFAULT_TILE_BYTES),
            (1, 1),
            (7, 1),
            (2, 100),
            (7, 100),
            (1, 4096),
            (2, 4096),
        ] {
            let (found, report) = run(isa, threads, tile_bytes);
            let at = format!("{} {isa} {threads} threads, {tile_bytes}", adapter.display());
            assert!(found == oracle, "{at}: other bytes");
            if tile_bytes == DEFAULT_TILE_BYTES {
                assert_eq!(comparable(&report), comparable(&first), "{at}");
            }
            // The sums of other tiles are rounded elsewhere; the counts are not.
            for (a, b) in report.targets.iter().zip(&first.targets) {
                let (a, b) = (a.realised, b.realised);
                assert_eq!((a.elements, a.nonzero), (b.elements, b.nonzero), "{at}");
                assert_eq!((a.changed, a.non_finite), (b.changed, b.non_finite), "{at}");
                assert!((a.dot - b.dot).abs() <= 1e-6 * b.wanted_sq.max(1e-300), "{at}");
            }
        }
    }
}

#[test]
fn real_adapters_give_the_same_bytes() {
    for name in ["llama-sharded", "gpt2-mixed", "llama-rslora", "llama-f32"] {
        let case = fixtures().join("peft").join(name);
        let (base, adapter) = (case.join("base"), case.join("adapter"));
        check(&base, &adapter, None, NEAREST);
    }
}

#[test]
fn conversions_and_stochastic_rounding_give_the_same_bytes() {
    for name in ["llama-sharded", "gpt2-mixed"] {
        let case = fixtures().join("peft").join(name);
        let (base, adapter) = (case.join("base"), case.join("adapter"));
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            for rounding in [NEAREST, STOCHASTIC] {
                check(&base, &adapter, Some(dtype), rounding);
            }
        }
    }
}

/// Rows wider than a panel and a tile, ranks beyond one chain, odd sizes, an unaligned file.
#[test]
fn awkward_shapes_give_the_same_bytes() {
    let mut prng = Prng::new(1);
    for (out, input, rank, dtype) in [
        (5, 48 * 3 + 1, 3, Dtype::Bf16),
        (33, 97, 70, Dtype::F16),
        (1, 2001, 1, Dtype::Bf16),
        (130, 1, 8, Dtype::F32),
        (67, 145, 129, Dtype::F32),
    ] {
        let base = [
            // Three bytes first: nothing after them is aligned.
            Tensor::zeros("odd", Dtype::U8, &[3]),
            Tensor::random(&mut prng, "h.0.w.weight", dtype, &[out, input], 1.0),
            Tensor::random(&mut prng, "other", Dtype::F32, &[1000], 1.0),
        ];
        let factors = Factors::random(&mut prng, "h.0.w", (out, input, rank), Dtype::F32, 0.1);
        let case = Case::file(&base, &[factors]);
        check(&case.base, &case.adapter, None, NEAREST);
        check(&case.base, &case.adapter, Some(Dtype::Bf16), STOCHASTIC);
    }
}

/// Stochastic rounding is keyed by tensor and element, so the layout of the files does not matter;
/// and the seed does.
#[test]
fn stochastic_rounding_does_not_see_the_files() {
    let mut prng = Prng::new(2);
    let names = ["model.layers.0.a", "model.layers.0.b", "model.layers.1.a"];
    let tensors: Vec<Tensor> = names
        .iter()
        .map(|name| {
            Tensor::random(&mut prng, &format!("{name}.weight"), Dtype::Bf16, &[40, 60], 1.0)
        })
        .collect();
    let factors = || {
        let mut prng = Prng::new(3);
        names.map(|name| Factors::random(&mut prng, name, (40, 60, 4), Dtype::F32, 0.02))
    };
    let single = Case::file(&tensors, &factors());
    let reversed: Vec<Tensor> = tensors.iter().rev().cloned().collect();
    let reordered = Case::file(&reversed, &factors());
    let sharded = Case::sharded(&[&tensors[1..2], &tensors[2..], &tensors[..1]], &factors());
    let options = MergeOptions::default();
    let run = |rounding| RunOptions { rounding, ..RunOptions::default() };
    let expected = single.merge(&options, &run(STOCHASTIC)).unwrap().tensors;
    assert_eq!(reordered.merge(&options, &run(STOCHASTIC)).unwrap().tensors, expected);
    assert_eq!(sharded.merge(&options, &run(STOCHASTIC)).unwrap().tensors, expected);
    let resharded = MergeOptions { shard_bytes: Some(5000), ..MergeOptions::default() };
    let merged = sharded.merge(&resharded, &run(STOCHASTIC)).unwrap();
    assert_eq!(merged.tensors, expected);
    assert_eq!(read_model(&merged.output), expected);

    let other = RoundingMode::Stochastic { seed: 1 };
    assert_ne!(single.merge(&options, &run(other)).unwrap().tensors, expected);
    assert_ne!(single.merge(&options, &run(NEAREST)).unwrap().tensors, expected);
    // Equal tensors under different names get different random numbers.
    let equal = names.map(|name| tensors[0].renamed(&format!("{name}.weight")));
    let same = || {
        names.map(|name| Factors::random(&mut Prng::new(4), name, (40, 60, 4), Dtype::F32, 0.02))
    };
    let merged = Case::file(&equal, &same()).merge(&options, &run(STOCHASTIC)).unwrap().tensors;
    assert_ne!(merged["model.layers.0.a.weight"].data, merged["model.layers.0.b.weight"].data);
    let merged = Case::file(&equal, &same()).merge(&options, &run(NEAREST)).unwrap().tensors;
    assert_eq!(merged["model.layers.0.a.weight"].data, merged["model.layers.0.b.weight"].data);
}
