//! LoKr (Edalati et al. 2022, arXiv 2212.10650; PEFT's `lokr_w1`, `lokr_w2` and their factors):
//!
//! ```text
//! W' = W + s·C⊗D,   (C⊗D)[l·K + k, m·N + n] = C[l, m]·D[k, n]
//! ```
//!
//! with D of K × N. Of a convolution, N counts the kernel's positions too: they are the fastest
//! dimensions of D and of W.
//!
//! Where D is stored with three dimensions, K × N × κ, it is a one-dimensional convolution's, and
//! `torch.kron` makes something else of it: C becomes 1 × L × M, and the product, of
//! K × (L·N) × (M·κ),
//!
//! ```text
//! P[k, l·N + n, m·κ + x] = C[l, m]·D[k, n, x]
//! ```
//!
//! is then reshaped to W's out × in × κ. See [`Kronecker`].

use std::ops::Range;

use lora_format::model::{Kronecker, KroneckerSide};

use super::product::{self, Product, transposed};
use super::shapes::{self, Fits, count, decode, dim};
use super::{Features, Matrix, Operator};
use crate::kernels::{Factors, Isa};
use crate::orientation::Orientation;

struct Lokr {
    cols: usize,
    left: Side,
    right: Side,
    scale: f64,
}

struct Reshaped {
    cols: usize,
    /// C, L × M.
    left: Side,
    /// D as (K·N) × κ.
    right: Side,
    /// L·N.
    middle: usize,
    scale: f64,
}

/// One side, as rows. A product stays one: it may be as large as W.
struct Side {
    rows: usize,
    cols: usize,
    values: Values,
}

enum Values {
    Full(Vec<f32>),
    Product(Factors),
}

impl Side {
    fn new(side: &KroneckerSide, orientation: Orientation) -> Side {
        let (rows, cols) = side_features(side);
        let values = match (side, orientation) {
            (KroneckerSide::Full(tensor), Orientation::OutIn) => Values::Full(decode(tensor)),
            (KroneckerSide::Full(tensor), Orientation::InOut) => {
                Values::Full(transposed(&decode(tensor), rows, cols))
            }
            (KroneckerSide::Product(cores), _) => {
                Values::Product(Product::of_cores(cores).pack(orientation))
            }
        };
        match orientation {
            Orientation::OutIn => Side { rows, cols, values },
            Orientation::InOut => Side { rows: cols, cols: rows, values },
        }
    }

    /// Some rows, in `buffer`.
    fn rows<'a>(&self, isa: Isa, rows: Range<usize>, buffer: &'a mut Vec<f64>) -> &'a [f64] {
        buffer.resize(rows.len() * self.cols, 0.0);
        match &self.values {
            Values::Full(values) => {
                let values = &values[rows.start * self.cols..][..buffer.len()];
                buffer.iter_mut().zip(values).for_each(|(slot, &value)| *slot = f64::from(value));
            }
            Values::Product(factors) => product::rows(factors, isa, rows, buffer),
        }
        buffer
    }
}

fn side_features(side: &KroneckerSide) -> (usize, usize) {
    match side {
        KroneckerSide::Full(tensor) => {
            (dim(tensor, 0), count(tensor.shape.get(1..).unwrap_or(&[])))
        }
        KroneckerSide::Product(cores) => product::core_features(cores),
    }
}

fn check_side(side: &KroneckerSide) -> Fits {
    match side {
        KroneckerSide::Full(tensor) => {
            let (rows, cols) = side_features(side);
            let fits = tensor.shape.len() >= 2 && rows > 0 && cols > 0;
            shapes::tensor(tensor, "a matrix", fits)
        }
        KroneckerSide::Product(cores) => product::check_cores(cores),
    }
}

/// K, N and κ of a D that PEFT's product takes for three-dimensional.
fn three_dimensions(side: &KroneckerSide) -> Option<[usize; 3]> {
    match side {
        KroneckerSide::Full(tensor) => tensor.shape.as_slice().try_into().ok(),
        KroneckerSide::Product(_) => None,
    }
}

pub(super) fn features(form: &Kronecker) -> Features {
    let (left, right) = (side_features(&form.left), side_features(&form.right));
    Features {
        out: Some(left.0.saturating_mul(right.0)),
        input: Some(left.1.saturating_mul(right.1)),
    }
}

pub(super) fn check(form: &Kronecker, matrix: Matrix) -> Fits {
    check_side(&form.left)?;
    check_side(&form.right)?;
    shapes::scale(form.scaling.scale(form.rank))?;
    if let KroneckerSide::Full(tensor) = &form.left {
        shapes::tensor(tensor, "a matrix", tensor.shape.len() == 2)?;
    }
    let features = features(form);
    shapes::matrix(matrix, features.out.unwrap_or(0), features.input.unwrap_or(0))?;
    match (three_dimensions(&form.right), matrix.orientation) {
        (Some(_), Orientation::InOut) => {
            Err("expected a convolution, found a matrix stored as (in, out)".to_owned())
        }
        _ => Ok(()),
    }
}

pub(super) fn prepare(form: &Kronecker, matrix: Matrix) -> Box<dyn Operator> {
    let (cols, scale) = (matrix.cols, form.scaling.scale(form.rank));
    let left = Side::new(&form.left, matrix.orientation);
    let right = Side::new(&form.right, matrix.orientation);
    match three_dimensions(&form.right) {
        None => Box::new(Lokr { cols, left, right, scale }),
        Some([_, n, kernel]) => {
            let middle = left.rows * n;
            let right = Side { rows: right.rows * n, cols: kernel, values: right.values };
            Box::new(Reshaped { cols, left, right, middle, scale })
        }
    }
}

impl Operator for Lokr {
    fn add_rows(&self, isa: Isa, rows: Range<usize>, _: &[f32], weight: f64, delta: &mut [f64]) {
        let (mut c, mut d) = (Vec::new(), Vec::new());
        let mut lines = delta.chunks_exact_mut(self.cols);
        let height = self.right.rows;
        for run in product::runs(rows, self.right.cols) {
            // C's row changes wherever D begins again.
            let mut first = run.start;
            while first < run.end {
                let (l, k) = (first / height, first % height);
                let length = (run.end - first).min(height - k);
                let c = self.left.rows(isa, l..l + 1, &mut c);
                let d = self.right.rows(isa, k..k + length, &mut d);
                for (d, delta) in d.chunks_exact(self.right.cols).zip(&mut lines) {
                    let blocks = delta.chunks_exact_mut(self.right.cols);
                    for (c, delta) in c.iter().zip(blocks) {
                        let c = self.scale * c;
                        d.iter().zip(delta).for_each(|(d, delta)| *delta += weight * (c * d));
                    }
                }
                first += length;
            }
        }
    }
}

impl Operator for Reshaped {
    fn add_rows(&self, isa: Isa, rows: Range<usize>, _: &[f32], weight: f64, delta: &mut [f64]) {
        let (mut c, mut d) = (Vec::new(), Vec::new());
        let kernel = self.right.cols;
        // Of P: a line has M·κ elements, and N lines share a row of C.
        let line = self.left.cols * kernel;
        let n = self.middle / self.left.rows;
        let mut at = rows.start * self.cols;
        let mut rest = delta;
        while !rest.is_empty() {
            let (number, start) = (at / line, at % line);
            let length = rest.len().min(line - start);
            let (k, middle) = (number / self.middle, number % self.middle);
            let c = self.left.rows(isa, middle / n..middle / n + 1, &mut c);
            let row = k * n + middle % n;
            let d = self.right.rows(isa, row..row + 1, &mut d);
            let (now, later) = rest.split_at_mut(length);
            for (x, delta) in (start..).zip(now) {
                *delta += weight * (self.scale * c[x / kernel] * d[x % kernel]);
            }
            (at, rest) = (at + length, later);
        }
    }
}

#[cfg(test)]
mod tests {
    use lora_format::model::{Cores, Form, Scaling, ScalingRule};

    use super::super::testing::{self, Noise, assert_change, assert_refused, at, floats};
    use super::*;

    fn form(left: KroneckerSide, right: KroneckerSide) -> Form {
        let scaling = Scaling { alpha: 5.0, rule: ScalingRule::AlphaOverRank };
        Form::Kronecker(Kronecker { left, right, scaling, rank: 4 })
    }

    fn full(noise: &mut Noise, shape: &[usize]) -> KroneckerSide {
        KroneckerSide::Full(testing::tensor(noise, shape))
    }

    fn product(noise: &mut Noise, out: usize, input: usize, rank: usize) -> KroneckerSide {
        let b = testing::tensor(noise, &[out, rank]);
        let a = testing::tensor(noise, &[rank, input]);
        KroneckerSide::Product(Cores { b, a, core: None })
    }

    /// A side, flat, in f64.
    fn values(side: &KroneckerSide) -> Vec<f64> {
        let (rows, cols) = side_features(side);
        match side {
            KroneckerSide::Full(tensor) => (0..rows * cols).map(at(tensor)).collect(),
            KroneckerSide::Product(Cores { b, a, .. }) => {
                let (b, a, rank) = (at(b), at(a), a.shape[0]);
                (0..rows * cols)
                    .map(|at| {
                        let term = |k| b(at / cols * rank + k) * a(k * cols + at % cols);
                        (0..rank).map(term).sum()
                    })
                    .collect()
            }
        }
    }

    #[test]
    fn every_element_of_the_one_is_multiplied_by_all_of_the_other() {
        let mut noise = Noise::new(1);
        for ((l, m), (k, n)) in [((3, 4), (5, 6)), ((1, 7), (9, 1)), ((8, 2), (1, 60))] {
            let lefts = [full(&mut noise, &[l, m]), product(&mut noise, l, m, 2)];
            let rights = [
                full(&mut noise, &[k, n]),
                full(&mut noise, &[k, n, 1, 1]),
                product(&mut noise, k, n, 3),
            ];
            let (out, input) = (l * k, m * n);
            let base = floats(&mut noise, out * input);
            for (left, right) in lefts.iter().flat_map(|l| rights.iter().map(move |r| (l, r))) {
                let (c, d) = (values(left), values(right));
                let delta = |o: usize, i: usize| 1.25 * c[o / k * m + i / n] * d[o % k * n + i % n];
                let form = form(left.clone(), right.clone());
                assert_change(&form, testing::out_in(out, input), &base, 1e-6, delta);
                assert_change(&form, testing::in_out(input, out), &base, 1e-6, |i, o| delta(o, i));
            }
        }
    }

    #[test]
    fn a_core_is_a_product() {
        let mut noise = Noise::new(2);
        let (l, m, k, n, rank, kernel) = (2, 3, 4, 5, 2, 6);
        let left = full(&mut noise, &[l, m]);
        let b = testing::tensor(&mut noise, &[rank, k]);
        let a = testing::tensor(&mut noise, &[rank, n]);
        let t = testing::tensor(&mut noise, &[rank, rank, 2, 3]);
        // einsum("i j k l, i p, j r -> p r k l", t, w_a, w_b)
        let mut d = vec![0.0; k * n * kernel];
        for (index, value) in d.iter_mut().enumerate() {
            let (p, r, x) = (index / (n * kernel), index / kernel % n, index % kernel);
            for i in 0..rank {
                for j in 0..rank {
                    let t = at(&t)((i * rank + j) * kernel + x);
                    *value += t * at(&b)(i * k + p) * at(&a)(j * n + r);
                }
            }
        }
        let c = values(&left);
        let form = form(left, KroneckerSide::Product(Cores { b, a, core: Some(t) }));
        let base = floats(&mut noise, l * k * m * n * kernel);
        let width = n * kernel;
        assert_change(&form, testing::convolution(l * k, m * n, kernel), &base, 1e-6, |o, i| {
            1.25 * c[o / k * m + i / width] * d[o % k * width + i % width]
        });
    }

    #[test]
    fn three_dimensions_are_reshaped_as_torch_does() {
        let mut noise = Noise::new(3);
        let (l, m, k, n, kernel) = (2, 3, 4, 5, 3);
        for left in [full(&mut noise, &[l, m]), product(&mut noise, l, m, 1)] {
            let right = full(&mut noise, &[k, n, kernel]);
            let (c, d) = (values(&left), values(&right));
            // P[a, j, x] = C[j / N, x / κ]·D[a, j % N, x % κ], of K × (L·N) × (M·κ).
            let mut p = Vec::new();
            for a in 0..k {
                for j in 0..l * n {
                    p.extend((0..m * kernel).map(|x| {
                        1.25 * c[j / n * m + x / kernel] * d[(a * n + j % n) * kernel + x % kernel]
                    }));
                }
            }
            let form = form(left, right);
            let width = m * n * kernel;
            let base = floats(&mut noise, p.len());
            let matrix = testing::convolution(l * k, m * n, kernel);
            assert_change(&form, matrix, &base, 1e-6, |o, i| p[o * width + i]);
            assert_refused(&form, testing::in_out(width, l * k), "expected a convolution");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut noise = Noise::new(4);
        let matrix = testing::out_in(4, 6);
        let (left, right) = (full(&mut noise, &[2, 2]), full(&mut noise, &[2, 4]));
        let words = "expected 4 outputs and 8 inputs, found 4 and 6";
        assert_refused(&form(left.clone(), right.clone()), matrix, words);
        let none = full(&mut noise, &[0, 2]);
        assert_refused(&form(none, right.clone()), matrix, "expected a matrix, found [0, 2]");
        let deep = full(&mut noise, &[2, 2, 1]);
        assert_refused(&form(deep, right), matrix, "expected a matrix, found [2, 2, 1]");
        let uneven = KroneckerSide::Product(Cores {
            b: testing::tensor(&mut noise, &[2, 2]),
            a: testing::tensor(&mut noise, &[1, 3]),
            core: None,
        });
        assert_refused(&form(left, uneven), matrix, "expected 2 × in, found [1, 3]");
    }
}
