//! LoCon with a core (LyCORIS' `lora_mid`, a Tucker decomposition of a convolution's change):
//! `ΔW[o, i, κ] = s·Σ_{j,k} B[o, j]·T[j, k, κ]·A[k, i]`.
//!
//! T and A are multiplied first; what is left is a product of two factors.

use std::ops::{Range, RangeInclusive};

use lora_format::limits;
use lora_format::model::Tucker;

use super::product::{self, Product};
use super::shapes::{self, Fits, count, dim};
use super::{Features, Matrix, Operator};
use crate::kernels::{Factors, Isa};

/// The ranks that a core may have.
const RANKS: RangeInclusive<usize> = 1..=limits::RANK;

struct Locon {
    cols: usize,
    product: Factors,
}

pub(super) fn features(form: &Tucker) -> Features {
    let kernel = count(form.core.shape.get(2..).unwrap_or(&[]));
    let input = dim(&form.a, 1).saturating_mul(kernel);
    Features { out: Some(dim(&form.b, 0)), input: Some(input) }
}

pub(super) fn check(form: &Tucker, matrix: Matrix) -> Fits {
    let Tucker { a, b, core, .. } = form;
    let (outer, inner) = (dim(b, 1), dim(a, 0));
    let plain = |shape: &[usize]| shape.len() >= 2 && count(&shape[2..]) == 1;
    shapes::tensor(b, "out × rank", plain(&b.shape) && RANKS.contains(&outer))?;
    shapes::tensor(a, "rank × in", plain(&a.shape) && RANKS.contains(&inner))?;
    let fits = core.shape.len() >= 3 && core.shape.starts_with(&[outer, inner]);
    shapes::tensor(core, format!("{outer} × {inner} × kernel"), fits)?;
    let Features { out, input } = features(form);
    shapes::matrix(matrix, out.unwrap_or(0), input.unwrap_or(0))?;
    // T·A is spread to rank × in·kernel, which should not dwarf out × in·kernel.
    let most = matrix.out().saturating_mul(16).min(limits::RANK);
    shapes::tensor(b, format!("out × at most {most}"), outer <= most)?;
    shapes::work("a product with its core", &[outer, inner, matrix.input()])?;
    shapes::scale(form.scaling.scale(form.rank()))
}

pub(super) fn prepare(form: &Tucker, matrix: Matrix) -> Box<dyn Operator> {
    let product = Product::of_tucker(form).pack(matrix.orientation);
    Box::new(Locon { cols: matrix.cols, product })
}

impl Operator for Locon {
    fn add_rows(&self, isa: Isa, rows: Range<usize>, _: &[f32], weight: f64, delta: &mut [f64]) {
        let start = rows.start;
        let mut products = Vec::new();
        for run in product::runs(rows, self.cols) {
            products.resize(run.len() * self.cols, 0.0);
            product::rows(&self.product, isa, run.clone(), &mut products);
            let delta = &mut delta[(run.start - start) * self.cols..];
            delta.iter_mut().zip(&products).for_each(|(delta, p)| *delta += weight * p);
        }
    }
}

#[cfg(test)]
mod tests {
    use lora_format::model::{Form, Scaling, ScalingRule};

    use super::super::testing::{self, Noise, assert_change, assert_refused, at, floats};
    use super::*;

    fn form(noise: &mut Noise, out: usize, input: usize, ranks: (usize, usize)) -> Tucker {
        Tucker {
            a: testing::tensor(noise, &[ranks.1, input, 1, 1]),
            b: testing::tensor(noise, &[out, ranks.0, 1, 1]),
            core: testing::tensor(noise, &[ranks.0, ranks.1, 2, 3]),
            scaling: Scaling { alpha: 5.0, rule: ScalingRule::AlphaOverRank },
        }
    }

    #[test]
    fn the_core_spreads_over_the_kernel() {
        let mut noise = Noise::new(1);
        let (out, input, kernel) = (7, 5, 6);
        let form = form(&mut noise, out, input, (3, 4));
        let (a, b, t) = (at(&form.a), at(&form.b), at(&form.core));
        let base = floats(&mut noise, out * input * kernel);
        let matrix = testing::convolution(out, input, kernel);
        // einsum("j k x, o j, k i -> o i x", core, b, a)
        assert_change(&Form::Tucker(form), matrix, &base, 1e-5, |o, column| {
            let (i, x) = (column / kernel, column % kernel);
            let pairs = (0..3).flat_map(|j| (0..4).map(move |k| (j, k)));
            let sum: f64 = pairs
                .map(|(j, k)| b(o * 3 + j) * t((j * 4 + k) * kernel + x) * a(k * input + i))
                .sum();
            5.0 / 4.0 * sum
        });
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut noise = Noise::new(2);
        let good = form(&mut noise, 4, 3, (2, 2));
        let matrix = testing::convolution(4, 3, 6);
        let refuse = |change: fn(&mut Tucker, &mut Noise), words: &str| {
            let mut form = good.clone();
            change(&mut form, &mut Noise::new(3));
            assert_refused(&Form::Tucker(form), matrix, words);
        };
        refuse(|form, noise| form.a = testing::tensor(noise, &[3, 3]), "expected 2 × 3 × kernel");
        refuse(|form, noise| form.b = testing::tensor(noise, &[5, 2]), "found 4 and 18");
        refuse(
            |form, noise| form.core = testing::tensor(noise, &[2, 2]),
            "expected 2 × 2 × kernel",
        );
        refuse(|form, _| form.scaling.alpha = f64::INFINITY, "expected a finite scale");
    }
}
