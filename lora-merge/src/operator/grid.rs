//! GraLoRA (Jung et al. 2025, arXiv 2505.20355; PEFT's `gralora_A` and `gralora_B`): W in k × k
//! fields, each with a low-rank change of its own. With A of k × in/k × r, B of k × r × out/k, and
//! `t = r/k`,
//!
//! ```text
//! W'[p·out/k + o, q·in/k + i] = W[…] + s · Σ_{c < t} A[q, i, p·t + c]·B[p, q·t + c, o]
//! ```
//!
//! The sum is in f64, in order. The hybrid part, `gralora_A_general` and its B, is a component of
//! its own.

use std::ops::Range;

use lora_format::limits;
use lora_format::model::Grid;

use super::shapes::{self, Fits, decode, dim};
use super::{Features, Matrix, Operator};
use crate::kernels::Isa;
use crate::orientation::Orientation;

struct Gralora {
    matrix: Matrix,
    /// k.
    fields: usize,
    rank: usize,
    a: Vec<f32>,
    b: Vec<f32>,
    scale: f64,
}

pub(super) fn features(form: &Grid) -> Features {
    let product = |tensor, index| dim(tensor, 0).saturating_mul(dim(tensor, index));
    Features { out: Some(product(&form.b, 2)), input: Some(product(&form.a, 1)) }
}

pub(super) fn check(form: &Grid, matrix: Matrix) -> Fits {
    let (k, rank) = (dim(&form.a, 0), dim(&form.a, 2));
    let whole = k > 0 && (1..=limits::RANK).contains(&rank) && rank % k == 0;
    let expected = "k × in/k × rank, rank a multiple of k";
    shapes::tensor(&form.a, expected, whole && form.a.shape.len() == 3)?;
    let fits = form.b.shape.len() == 3 && form.b.shape.starts_with(&[k, rank]);
    shapes::tensor(&form.b, format!("{k} × {rank} × out/{k}"), fits)?;
    shapes::scale(form.scaling.scale(form.rank))?;
    let features = features(form);
    shapes::matrix(matrix, features.out.unwrap_or(0), features.input.unwrap_or(0))
}

pub(super) fn prepare(form: &Grid, matrix: Matrix) -> Box<dyn Operator> {
    Box::new(Gralora {
        matrix,
        fields: dim(&form.a, 0),
        rank: dim(&form.a, 2),
        a: decode(&form.a),
        b: decode(&form.b),
        scale: form.scaling.scale(form.rank),
    })
}

impl Gralora {
    fn element(&self, out: usize, input: usize) -> f64 {
        let (height, width) = (self.matrix.out() / self.fields, self.matrix.input() / self.fields);
        let (p, q) = (out / height, input / width);
        let terms = self.rank / self.fields;
        let a = &self.a[input * self.rank + p * terms..][..terms];
        let b = self.b[(p * self.rank + q * terms) * height..].iter();
        let b = b.skip(out % height).step_by(height);
        a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
    }
}

impl Operator for Gralora {
    fn add_rows(&self, _: Isa, rows: Range<usize>, _: &[f32], weight: f64, delta: &mut [f64]) {
        for (row, delta) in rows.zip(delta.chunks_exact_mut(self.matrix.cols)) {
            for (col, delta) in delta.iter_mut().enumerate() {
                let (out, input) = match self.matrix.orientation {
                    Orientation::OutIn => (row, col),
                    Orientation::InOut => (col, row),
                };
                *delta += weight * (self.scale * self.element(out, input));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use lora_format::model::{Form, Scaling, ScalingRule};

    use super::super::testing::{self, Noise, assert_change, assert_refused, at, floats};
    use super::*;

    fn form(noise: &mut Noise, a: &[usize], b: &[usize]) -> Grid {
        let scaling = Scaling { alpha: 3.0, rule: ScalingRule::AlphaOverRank };
        Grid { a: testing::tensor(noise, a), b: testing::tensor(noise, b), scaling, rank: 8 }
    }

    /// PEFT's forward pass, for every unit vector.
    #[test]
    fn fields_exchange_their_ranks() {
        let mut noise = Noise::new(1);
        for (k, rank, width, height) in [(2, 6, 5, 3), (3, 3, 2, 4), (1, 4, 7, 6)] {
            let form = form(&mut noise, &[k, width, rank], &[k, rank, height]);
            let (a, b, t) = (at(&form.a), at(&form.b), rank / k);
            let (out, input) = (k * height, k * width);
            let mut delta = vec![vec![0.0; out]; input];
            for (i, delta) in delta.iter_mut().enumerate() {
                let n = i / width;
                // blni, nir -> blnr; of the ranks j·t + s of field n to the ranks n·t + s of j.
                let mut mixed = vec![vec![0.0; rank]; k];
                for (j, mixed) in mixed.iter_mut().enumerate() {
                    let ranks = mixed[n * t..][..t].iter_mut().enumerate();
                    ranks.for_each(|(s, slot)| *slot = a(i * rank + j * t + s));
                }
                // bljr, jro -> bljo
                for (j, mixed) in mixed.iter().enumerate() {
                    for o in 0..height {
                        let term = |r: usize| mixed[r] * b((j * rank + r) * height + o);
                        delta[j * height + o] = 0.375 * (0..rank).map(term).sum::<f64>();
                    }
                }
            }
            let base = floats(&mut noise, out * input);
            let form = Form::Grid(form);
            assert_change(&form, testing::out_in(out, input), &base, 1e-14, |o, i| delta[i][o]);
            assert_change(&form, testing::in_out(input, out), &base, 1e-14, |i, o| delta[i][o]);
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let refuse = |a: &[usize], b: &[usize], words| {
            let form = Form::Grid(form(&mut Noise::new(2), a, b));
            assert_refused(&form, testing::out_in(6, 10), words);
        };
        refuse(&[2, 5, 3], &[2, 3, 3], "expected k × in/k × rank, rank a multiple of k");
        refuse(&[0, 5, 4], &[0, 4, 3], "expected k × in/k × rank, rank a multiple of k");
        refuse(&[2, 5, 4], &[2, 6, 3], "expected 2 × 4 × out/2, found [2, 6, 3]");
        refuse(&[2, 5, 4], &[2, 4, 4], "expected 8 outputs and 10 inputs, found 6 and 10");
    }
}
