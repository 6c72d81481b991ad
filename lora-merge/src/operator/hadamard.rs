//! LoHa (Hyeon-Woo et al. 2022, arXiv 2108.06098; PEFT's `hada_w1_a` to `hada_w2_b`, `hada_t1` and
//! `hada_t2`): `W' = W + s·(B₁A₁)⊙(B₂A₂)`.
//!
//! Of a convolution, the products are (out, in·kernel): either A has all of in·kernel, or a core
//! spreads it over the kernel.

use std::ops::Range;

use lora_format::model::Hadamard;

use super::product::{self, Product};
use super::shapes::{self, Fits};
use super::{Features, Matrix, Operator};
use crate::kernels::{Factors, Isa};

struct Loha {
    cols: usize,
    first: Factors,
    second: Factors,
    scale: f64,
}

pub(super) fn features(form: &Hadamard) -> Features {
    let (out, input) = product::core_features(&form.first);
    Features { out: Some(out), input: Some(input) }
}

pub(super) fn check(form: &Hadamard, matrix: Matrix) -> Fits {
    shapes::scale(form.scaling.scale(form.rank))?;
    for cores in [&form.first, &form.second] {
        product::check_cores(cores)?;
        let (out, input) = product::core_features(cores);
        shapes::matrix(matrix, out, input)?;
    }
    Ok(())
}

pub(super) fn prepare(form: &Hadamard, matrix: Matrix) -> Box<dyn Operator> {
    Box::new(Loha {
        cols: matrix.cols,
        first: Product::of_cores(&form.first).pack(matrix.orientation),
        second: Product::of_cores(&form.second).pack(matrix.orientation),
        scale: form.scaling.scale(form.rank),
    })
}

impl Operator for Loha {
    fn add_rows(&self, isa: Isa, rows: Range<usize>, _: &[f32], weight: f64, delta: &mut [f64]) {
        let start = rows.start;
        let (mut first, mut second) = (Vec::new(), Vec::new());
        for run in product::runs(rows, self.cols) {
            let elements = run.len() * self.cols;
            first.resize(elements, 0.0);
            second.resize(elements, 0.0);
            product::rows(&self.first, isa, run.clone(), &mut first);
            product::rows(&self.second, isa, run.clone(), &mut second);
            let delta = &mut delta[(run.start - start) * self.cols..][..elements];
            for ((first, second), delta) in first.iter().zip(&second).zip(delta) {
                *delta += weight * (self.scale * (first * second));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use lora_format::model::{Cores, Form, Scaling, ScalingRule};

    use super::super::testing::{self, Noise, assert_change, assert_refused, at, floats};
    use super::*;

    fn form(first: Cores, second: Cores) -> Form {
        let scaling = Scaling { alpha: 5.0, rule: ScalingRule::AlphaOverRank };
        Form::Hadamard(Hadamard { first, second, scaling, rank: 3 })
    }

    fn flat(noise: &mut Noise, out: usize, input: usize, rank: usize) -> Cores {
        let b = testing::tensor(noise, &[out, rank]);
        Cores { b, a: testing::tensor(noise, &[rank, input]), core: None }
    }

    #[test]
    fn two_products_are_multiplied() {
        let mut noise = Noise::new(1);
        let (out, input) = (9, 70);
        let (first, second) = (flat(&mut noise, out, input, 3), flat(&mut noise, out, input, 4));
        let element = |cores: &Cores, rank: usize| {
            let (b, a) = (at(&cores.b), at(&cores.a));
            move |o: usize, i: usize| -> f64 {
                (0..rank).map(|k| b(o * rank + k) * a(k * input + i)).sum()
            }
        };
        let (p, q) = (element(&first, 3), element(&second, 4));
        let delta = |o, i| 5.0 / 3.0 * p(o, i) * q(o, i);
        let form = form(first, second);
        let base = floats(&mut noise, out * input);
        assert_change(&form, testing::out_in(out, input), &base, 1e-5, delta);
        assert_change(&form, testing::in_out(input, out), &base, 1e-5, |i, o| delta(o, i));
        assert_change(&form, testing::convolution(out, input / 7, 7), &base, 1e-5, delta);
    }

    #[test]
    fn cores_spread_over_the_kernel() {
        let mut noise = Noise::new(2);
        let (out, input, rank, kernel) = (6, 5, 3, 6);
        let mut cores = || Cores {
            b: testing::tensor(&mut noise, &[rank, out]),
            a: testing::tensor(&mut noise, &[rank, input]),
            core: Some(testing::tensor(&mut noise, &[rank, rank, 2, 3])),
        };
        let (first, second) = (cores(), cores());
        // einsum("i j k l, j r, i p -> p r k l", t, w_b, w_a)
        let element = |cores: &Cores| {
            let (b, a, t) = (at(&cores.b), at(&cores.a), at(cores.core.as_ref().unwrap()));
            move |p: usize, column: usize| -> f64 {
                let (r, position) = (column / kernel, column % kernel);
                let pairs = (0..rank).flat_map(|i| (0..rank).map(move |j| (i, j)));
                pairs
                    .map(|(i, j)| {
                        t((i * rank + j) * kernel + position) * b(i * out + p) * a(j * input + r)
                    })
                    .sum()
            }
        };
        let (p, q) = (element(&first), element(&second));
        let base = floats(&mut noise, out * input * kernel);
        let matrix = testing::convolution(out, input, kernel);
        assert_change(&form(first, second), matrix, &base, 1e-5, |o, i| {
            5.0 / 3.0 * p(o, i) * q(o, i)
        });
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut noise = Noise::new(3);
        let matrix = testing::out_in(4, 6);
        let good = flat(&mut noise, 4, 6, 2);
        let wide = flat(&mut noise, 4, 7, 2);
        let words = "expected 4 outputs and 7 inputs, found 4 and 6";
        assert_refused(&form(good.clone(), wide), matrix, words);
        let uneven = Cores { a: testing::tensor(&mut noise, &[3, 6]), ..good.clone() };
        assert_refused(&form(uneven, good.clone()), matrix, "expected 2 × in, found [3, 6]");
        let core = Some(testing::tensor(&mut noise, &[3, 2, 1, 1]));
        let cores = Cores { b: testing::tensor(&mut noise, &[2, 4]), core, ..good.clone() };
        assert_refused(&form(good, cores), matrix, "expected 2 × 2 × kernel, found [3, 2, 1, 1]");
    }
}
