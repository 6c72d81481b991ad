//! DeLoRA (Bini et al. 2025, arXiv 2503.18225; PEFT's `delora_A`, `delora_B`, `delora_lambda` and
//! `delora_w_norm`):
//!
//! ```text
//! W' = W + B·D·A·diag(n),   D = diag(λ/(r·max(‖bₖ‖, 1e-4)·max(‖aₖ‖, 1e-4)))
//! ```
//!
//! with aₖ the rows of A, bₖ the columns of B, and n the norms that the columns of W had when
//! training began, which the file has.

use std::ops::Range;

use lora_format::model::Bounded;

use super::product::{self, Product};
use super::shapes::{self, Fits, count, decode, dim};
use super::{Features, Matrix, Operator};
use crate::kernels::{Factors, Isa};
use crate::orientation::Orientation;

/// What PEFT takes for the norm of shorter vectors.
const SHORTEST: f64 = 1e-4;

struct Delora {
    matrix: Matrix,
    product: Factors,
    norms: Vec<f64>,
}

pub(super) fn features(form: &Bounded) -> Features {
    let input = count(form.a.shape.get(1..).unwrap_or(&[]));
    Features { out: Some(dim(&form.b, 0)), input: Some(input) }
}

pub(super) fn check(form: &Bounded, matrix: Matrix) -> Fits {
    product::check_factors(&form.a, &form.b)?;
    let (out, input) = (dim(&form.b, 0), count(&form.a.shape[1..]));
    shapes::matrix(matrix, out, input)?;
    shapes::tensor(&form.bound, "1 value", count(&form.bound.shape) == 1)?;
    shapes::tensor(&form.norms, format!("{input} values"), count(&form.norms.shape) == input)
}

pub(super) fn prepare(form: &Bounded, matrix: Matrix) -> Box<dyn Operator> {
    let (a, mut b, rank) = (decode(&form.a), decode(&form.b), dim(&form.a, 0));
    let bound = decode(&form.bound).first().map_or(0.0, |&bound| f64::from(bound));
    let norm = |vector: &mut dyn Iterator<Item = &f32>| {
        let square: f64 = vector.map(|&value| f64::from(value) * f64::from(value)).sum();
        square.sqrt().max(SHORTEST)
    };
    for k in 0..rank {
        let a = norm(&mut a[k * matrix.input()..][..matrix.input()].iter());
        let gain = bound / rank as f64 / (a * norm(&mut b.iter().skip(k).step_by(rank)));
        for value in b.iter_mut().skip(k).step_by(rank) {
            *value = (f64::from(*value) * gain) as f32;
        }
    }
    let product = Product { b, a, rank, scale: 1.0 }.pack(matrix.orientation);
    let norms = decode(&form.norms).into_iter().map(f64::from).collect();
    Box::new(Delora { matrix, product, norms })
}

impl Operator for Delora {
    fn add_rows(&self, isa: Isa, rows: Range<usize>, _: &[f32], weight: f64, delta: &mut [f64]) {
        let cols = self.matrix.cols;
        let mut lines = delta.chunks_exact_mut(cols);
        let mut products = Vec::new();
        for run in product::runs(rows, cols) {
            products.resize(run.len() * cols, 0.0);
            product::rows(&self.product, isa, run.clone(), &mut products);
            for ((row, products), delta) in run.zip(products.chunks_exact(cols)).zip(&mut lines) {
                for (col, (product, delta)) in products.iter().zip(delta).enumerate() {
                    let input = match self.matrix.orientation {
                        Orientation::OutIn => col,
                        Orientation::InOut => row,
                    };
                    *delta += weight * (product * self.norms[input]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use lora_format::model::Form;

    use super::super::testing::{self, Noise, assert_change, assert_refused, at, floats};
    use super::*;

    #[test]
    fn terms_are_bounded() {
        let mut noise = Noise::new(1);
        let (out, input, rank) = (8, 30, 3);
        let mut a = floats(&mut noise, rank * input);
        // One too short for its norm to count.
        a[..input].iter_mut().for_each(|value| *value *= 1e-6);
        let form = Bounded {
            a: testing::tensor_of(&[rank, input], &a),
            b: testing::tensor(&mut noise, &[out, rank]),
            bound: testing::tensor_of(&[1], &[7.5]),
            norms: testing::tensor(&mut noise, &[input]),
        };
        let (a, b, n) = (at(&form.a), at(&form.b), at(&form.norms));
        let delta = |o: usize, i: usize| {
            let term = |k: usize| {
                let long_a = (0..input).fold(0.0_f64, |norm, i| norm.hypot(a(k * input + i)));
                let long_b = (0..out).fold(0.0_f64, |norm, o| norm.hypot(b(o * rank + k)));
                let bound = 7.5 / 3.0 / (long_a.max(1e-4) * long_b.max(1e-4));
                b(o * rank + k) * bound * a(k * input + i)
            };
            (0..rank).map(term).sum::<f64>() * n(i)
        };
        let base = floats(&mut noise, out * input);
        let wrapped = Form::Bounded(form.clone());
        assert_change(&wrapped, testing::out_in(out, input), &base, 1e-6, delta);
        assert_change(&wrapped, testing::in_out(input, out), &base, 1e-6, |i, o| delta(o, i));

        let short = Bounded { norms: testing::tensor_of(&[1], &[1.0]), ..form.clone() };
        let words = "expected 30 values, found [1]";
        assert_refused(&Form::Bounded(short), testing::out_in(out, input), words);
        let uneven = Bounded { b: testing::tensor(&mut noise, &[8, 2]), ..form };
        let words = "expected out × 3, found [8, 2]";
        assert_refused(&Form::Bounded(uneven), testing::out_in(out, input), words);
    }
}
