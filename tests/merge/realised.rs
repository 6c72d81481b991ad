//! What the report says survived, against f64 sums over the files.

use lora_format::Dtype;
use lora_merge::MergeOptions;
use lora_merge::engine::{RoundingMode, RunOptions};
use lora_merge::report::Realised;

use crate::Case;
use crate::support::{Factors, Prng, Tensor, products, rounded, ulp};

struct Expected {
    projection: f64,
    noise: f64,
    changed: u64,
    nonzero: u64,
}

/// From the stored values alone.
fn expected(base: &Tensor, factors: &Factors, merged: &Tensor) -> Expected {
    let (delta, _) = products(&factors.a, &factors.b, false);
    let (mut dot, mut realised, mut wanted) = (0.0, 0.0, 0.0);
    let (mut changed, mut nonzero) = (0, 0);
    for ((weight, delta), output) in base.values().iter().zip(&delta).zip(merged.values()) {
        let change = output - rounded(*weight, merged.dtype);
        dot += change * delta;
        realised += change * change;
        wanted += delta * delta;
        changed += u64::from(change != 0.0);
        nonzero += u64::from(*delta != 0.0);
    }
    let projection = dot / wanted;
    let noise = (realised / wanted - projection * projection).max(0.0).sqrt();
    Expected { projection, noise, changed, nonzero }
}

fn case(prng: &mut Prng, dtype: Dtype, size: f64) -> (Tensor, Factors, Case) {
    let base = Tensor::random(prng, "m.weight", dtype, &[96, 200], 1.0);
    let factors = Factors::random(prng, "m", (96, 200, 8), Dtype::F32, size);
    let copy = Factors { module: "m".to_owned(), a: factors.a.clone(), b: factors.b.clone() };
    let case = Case::file(std::slice::from_ref(&base), &[copy]);
    (base, factors, case)
}

fn close(found: f64, expected: f64, at: &str) {
    assert!((found - expected).abs() <= 1e-4 * (1.0 + expected), "{at}: {found}, not {expected}");
}

#[test]
fn the_report_is_what_the_files_say() {
    let mut prng = Prng::new(20);
    for dtype in [Dtype::Bf16, Dtype::F16, Dtype::F32] {
        for out in [None, Some(Dtype::Bf16), Some(Dtype::F16), Some(Dtype::F32)] {
            for size in [0.3, 0.02, 0.004] {
                for rounding in [RoundingMode::Nearest, RoundingMode::Stochastic { seed: 3 }] {
                    let (base, factors, case) = case(&mut prng, dtype, size);
                    let options = MergeOptions { dtype: out, ..MergeOptions::default() };
                    let run = RunOptions { rounding, threads: 2, ..RunOptions::default() };
                    let merged = case.merge(&options, &run).unwrap();
                    let report = merged.report.targets[0].realised;
                    let at = format!("{dtype} → {out:?}, {size}, {rounding:?}");
                    let expected = expected(&base, &factors, &merged.tensors["m.weight"]);
                    close(report.projection().unwrap(), expected.projection, &at);
                    // Noise of f32 output is near the accuracy of the sums themselves.
                    let found = report.noise().unwrap();
                    assert!(
                        (found - expected.noise).abs() <= 2e-3 * (1.0 + expected.noise),
                        "{at}"
                    );
                    assert_eq!(report.elements, 96 * 200);
                    assert_eq!(report.nonzero, expected.nonzero, "{at}");
                    assert_eq!(report.changed, expected.changed, "{at}");
                    assert_eq!(report.non_finite, 0);
                    assert_eq!(merged.report.realised, report, "one target is all targets");
                }
            }
        }
    }
}

/// The case that nobody tells users of: the delta is far below the spacing of bf16.
#[test]
fn bf16_swallows_a_small_delta_and_stochastic_rounding_keeps_it_noisily() {
    let mut prng = Prng::new(21);
    let base = Tensor::new("m.weight", Dtype::Bf16, &[256, 256], &[1.0 / 3.0; 256 * 256]);
    // Deltas of about a thirtieth of the distance between neighbours.
    let size = (ulp(1.0 / 3.0, Dtype::Bf16) / 30.0 / 4.0).sqrt();
    let factors = Factors::random(&mut prng, "m", (256, 256, 4), Dtype::F32, 2.0 * size);
    let copy = Factors { module: "m".to_owned(), a: factors.a.clone(), b: factors.b.clone() };
    let case = Case::file(std::slice::from_ref(&base), &[copy]);

    let nearest = case.merge(&MergeOptions::default(), &RunOptions::default()).unwrap();
    let lost = nearest.report.realised;
    assert!(lost.projection().unwrap() < 0.05, "{:?}", lost.projection());
    assert!(lost.is_poor());

    let rounding = RoundingMode::Stochastic { seed: 5 };
    let run = RunOptions { rounding, ..RunOptions::default() };
    let noisy = case.merge(&MergeOptions::default(), &run).unwrap();
    let kept = noisy.report.realised;
    assert!((kept.projection().unwrap() - 1.0).abs() < 0.15, "{:?}", kept.projection());
    assert!(kept.noise().unwrap() > 2.0, "{:?}", kept.noise());
    assert!(kept.is_poor());

    let options = MergeOptions { dtype: Some(Dtype::F32), ..MergeOptions::default() };
    let wide = case.merge(&options, &RunOptions::default()).unwrap().report.realised;
    assert!((wide.projection().unwrap() - 1.0).abs() < 1e-3);
    assert!(!wide.is_poor());
}

#[test]
fn no_delta_has_no_projection() {
    let none = Realised::default();
    assert_eq!((none.projection(), none.noise()), (None, None));
    assert_eq!(none.changed_share(), 0.0);
    assert!(!none.is_poor());
}
