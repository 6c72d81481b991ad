//! Matrices with known spectra, and what every decomposition of them must satisfy.

use ndarray::{Array1, Array2, s};

use super::dense::dense;
use super::*;
use crate::kernels::energy;

struct Random(u64);

impl Random {
    fn normal(&mut self) -> f64 {
        let mut uniform = || {
            self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut bits = self.0;
            bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            ((bits ^ (bits >> 31)) >> 11) as f64 / (1u64 << 53) as f64
        };
        let radius = (-2.0 * (1.0 - uniform()).ln()).sqrt();
        radius * (2.0 * std::f64::consts::PI * uniform()).cos()
    }

    fn matrix(&mut self, rows: usize, cols: usize) -> Array2<f64> {
        Array2::from_shape_fn((rows, cols), |_| self.normal())
    }
}

/// U·diag(σ)·Vᵀ with random U and V, rounded to f32.
fn with_spectrum(rows: usize, cols: usize, values: &[f64], seed: u64) -> Array2<f32> {
    let mut random = Random(seed);
    let (u, _) = dense().qr(random.matrix(rows, values.len()).view()).unwrap();
    let (v, _) = dense().qr(random.matrix(cols, values.len()).view()).unwrap();
    (&u * &Array1::from(values.to_vec())).dot(&v.t()).mapv(|x| x as f32)
}

fn spectra(short: usize) -> Vec<(&'static str, Vec<f64>)> {
    let all = 1..=short;
    vec![
        ("power law", all.clone().map(|i| (i as f64).powf(-0.5)).collect()),
        ("steep", all.clone().map(|i| 0.8f64.powi(i as i32)).collect()),
        ("flat", all.clone().map(|i| 1.0 - 0.5 * i as f64 / short as f64).collect()),
        ("rank 8", [1.0, 0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05].to_vec()),
        ("rank 20 and noise", all.clone().map(|i| if i <= 20 { 1.0 } else { 0.02 }).collect()),
        ("one huge", all.map(|i| if i == 1 { 1e6 } else { 1.0 }).collect()),
    ]
}

fn energy_of(matrix: &Array2<f32>) -> f64 {
    energy(Isa::detect(), matrix.as_slice().unwrap())
}

fn far_from_identity(vectors: &Array2<f32>) -> f64 {
    let vectors = vectors.mapv(f64::from);
    let product = vectors.dot(&vectors.t()) - Array2::<f64>::eye(vectors.nrows());
    product.iter().fold(0.0, |most: f64, x| most.max(x.abs()))
}

#[test]
fn errors_are_within_the_accuracy_and_above_the_bound() {
    for (rows, cols) in [(400, 300), (300, 640)] {
        for (name, values) in spectra(rows.min(cols)) {
            let matrix = with_spectrum(rows, cols, &values, 1);
            let whole = energy_of(&matrix);
            let exact = dense().singular_values(matrix.mapv(f64::from).view()).unwrap();
            for rank in [1, 4, 16, 48] {
                let what = format!("{name}, {rows} × {cols}, rank {rank}");
                let options = SvdOptions::default();
                let found = decompose(&matrix, whole, Goal::Rank(rank), &options).unwrap();
                let rank = if name == "rank 8" { rank.min(8) } else { rank };
                assert_eq!(found.rank(), rank, "{what}");
                assert!(far_from_identity(&found.right) < 2e-6, "{what}");
                let left = &found.left
                    * &Array1::from(found.spectrum.values[..rank].to_vec()).mapv(|x| x as f32);
                let error =
                    residual(&matrix, whole, left.view(), found.right.view(), options.isa).sqrt();
                let difference =
                    matrix.mapv(f64::from) - left.mapv(f64::from).dot(&found.right.mapv(f64::from));
                let truth = difference.iter().map(|x| x * x).sum::<f64>().sqrt();
                assert!((error - truth).abs() <= 1e-6 * truth + 1e-12 * whole.sqrt(), "{what}");
                let optimum = exact[rank..].iter().map(|x| x * x).sum::<f64>();
                let floor = 2e-6 * whole.sqrt();
                assert!(error <= 1.01 * optimum.sqrt() + floor, "{what}: {error} {optimum}");
                // The bound is below the truth.
                let bound = found.optimum[rank];
                assert!(bound <= optimum * (1.0 + 1e-6) + 1e-12 * whole, "{what}");
                for (value, exact) in found.spectrum.values[..rank].iter().zip(&exact) {
                    assert!(*value <= exact * (1.0 + 1e-5) + floor, "{what}");
                }
            }
        }
    }
}

#[test]
fn the_exact_decomposition_is_exact() {
    for (rows, cols) in [(90, 300), (300, 90), (257, 257), (1, 40), (40, 1), (3, 2000)] {
        let values: Vec<f64> = (1..=rows.min(cols)).map(|i| 1.0 / i as f64).collect();
        let matrix = with_spectrum(rows, cols, &values, 2);
        let whole = energy_of(&matrix);
        let options = SvdOptions { exact: true, ..SvdOptions::default() };
        let exact = dense().singular_values(matrix.mapv(f64::from).view()).unwrap();
        let values = decompose(&matrix, whole, Goal::Values, &options).unwrap();
        let rank = rows.min(cols).min(9);
        let found = decompose(&matrix, whole, Goal::Rank(rank), &options).unwrap();
        assert!(values.spectrum.is_complete() && values.exact && found.exact);
        for ((one, other), truth) in
            values.spectrum.values.iter().zip(&found.spectrum.values).zip(&exact)
        {
            assert!((one - truth).abs() < 1e-8 * exact[0]);
            assert!((other - truth).abs() < 1e-8 * exact[0]);
        }
        assert!(far_from_identity(&found.right) < 1e-6);
        assert!(far_from_identity(&found.left.t().to_owned()) < 1e-6);
        let product = (&found.left.mapv(f64::from) * &Array1::from(exact[..rank].to_vec()))
            .dot(&found.right.mapv(f64::from));
        let rest = (matrix.mapv(f64::from) - product).iter().map(|x| x * x).sum::<f64>();
        assert!((rest - found.optimum[rank]).abs() < 1e-7 * whole, "{rows} × {cols}");
    }
}

#[test]
fn the_same_for_any_number_of_threads() {
    let values: Vec<f64> = (1..=300).map(|i| (i as f64).powf(-0.5)).collect();
    let matrix = with_spectrum(420, 300, &values, 3);
    let whole = energy_of(&matrix);
    for exact in [false, true] {
        let options = SvdOptions { exact, ..SvdOptions::default() };
        let with = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| decompose(&matrix, whole, Goal::Rank(12), &options).unwrap())
        };
        let one = with(1);
        for threads in [2, 3, 8] {
            let many = with(threads);
            assert_eq!((&one.left, &one.right), (&many.left, &many.right));
            assert_eq!(one.spectrum, many.spectrum);
            assert_eq!(one.optimum, many.optimum);
        }
    }
}

#[test]
fn what_lies_below_rounding_is_looked_for() {
    // Aᵀ·A·v of the signal has no digit of the noise, which holds a part of the energy all the same.
    let values: Vec<f64> = (0..400).map(|i| if i < 8 { 1.0 } else { 1e-3 }).collect();
    let matrix = with_spectrum(500, 400, &values, 7);
    let whole = energy_of(&matrix);
    let found = decompose(&matrix, whole, Goal::Rank(20), &SvdOptions::default()).unwrap();
    assert_eq!(found.rank(), 20);
    assert!((found.spectrum.values[19] - 1e-3).abs() < 1e-4, "{:?}", found.spectrum.values);
}

#[test]
fn an_exhausted_space_is_noticed() {
    // Eight components of a matrix too large for the Gram matrix to be preferred.
    let matrix = with_spectrum(500, 400, &[3.0, 2.0, 2.0, 1.0, 1.0, 0.5, 0.25, 0.125], 4);
    let whole = energy_of(&matrix);
    let found = decompose(&matrix, whole, Goal::Rank(20), &SvdOptions::default()).unwrap();
    assert_eq!(found.rank(), 8);
    assert!((found.spectrum.values[7] - 0.125).abs() < 1e-6);
}

#[test]
fn zeros_and_columns_of_zeros() {
    let options = SvdOptions::default();
    let zero = Array2::<f32>::zeros((300, 400));
    let found = decompose(&zero, 0.0, Goal::Rank(4), &options).unwrap();
    assert_eq!((found.rank(), found.exact), (0, true));
    let mut matrix = with_spectrum(400, 300, &[2.0, 1.0], 5);
    matrix.slice_mut(s![.., 10..290]).fill(0.0);
    let whole = energy_of(&matrix);
    let found = decompose(&matrix, whole, Goal::Rank(2), &options).unwrap();
    let captured: f64 = found.spectrum.values[..2].iter().map(|x| x * x).sum();
    assert!((captured / whole - 1.0).abs() < 1e-6);
}

#[test]
fn the_goal_may_look_at_what_is_known() {
    let values: Vec<f64> = (1..=500).map(|i| (i as f64).powf(-1.0)).collect();
    let matrix = with_spectrum(600, 500, &values, 6);
    let whole = energy_of(&matrix);
    let wanted = |found: &Decomposition| found.spectrum.rank_for_energy(0.97);
    let goal = Goal::Until { wanted: &wanted, vectors: false, maximum: 500 };
    let found = decompose(&matrix, whole, goal, &SvdOptions::default()).unwrap();
    let exact = Spectrum { rows: 600, cols: 500, energy: whole, values };
    assert_eq!(Some(found.rank()), exact.rank_for_energy(0.97).at());
}

/// Products of small integers have all digits in f32: beyond their rank nothing at all is left over, and
/// a bound from below says so.
#[test]
fn the_exact_bound_is_not_above_the_truth() {
    for (rows, cols, rank, seed) in [
        (40, 48, 3, 1),
        (300, 260, 8, 2),
        (260, 300, 40, 3),
        (520, 900, 1, 4),
        (700, 600, 100, 5),
        (600, 700, 300, 6),
    ] {
        let mut random = Random(seed);
        let mut integers =
            |rows, cols| random.matrix(rows, cols).mapv(|x| (2.0 * x).round().clamp(-4.0, 4.0));
        let matrix = integers(rows, rank).dot(&integers(rank, cols)).mapv(|x| x as f32);
        let options = SvdOptions { exact: true, ..SvdOptions::default() };
        let found = decompose(&matrix, energy_of(&matrix), Goal::Values, &options).unwrap();
        let largest = found.spectrum.values[0];
        let noise = found.spectrum.remaining(rank) / (largest * largest);
        let of_margin = noise / (rows.min(cols) as f64 * f64::EPSILON);
        assert!(of_margin < 0.5, "{rows} × {cols}, rank {rank}: {of_margin}");
        assert!(found.optimum[rank..].iter().all(|&left| left == 0.0), "{rows} × {cols}");
        assert!(found.optimum[rank - 1] > 0.0);
    }
}

#[test]
fn the_memory_bound_counts_both_ways() {
    let (rows, cols) = (4096, 11008);
    // The Gram matrix, and what its eigenvectors take at least.
    let least = 3 * 4096 * 4096 * 8;
    assert!(memory_bound(rows, cols, 16, 1) > least);
    // Bases and images of 2048 vectors, which the iteration may come to.
    assert!(memory_bound(rows, cols, 16, 1) > (4096 + 11008) * 2048 * 4);
    // Components, in f32 and in f64 before that.
    let more = memory_bound(rows, cols, 4096, 1) - memory_bound(rows, cols, 2048, 1);
    assert!(more > (4096 + 11008) * 2048 * 4);
}
