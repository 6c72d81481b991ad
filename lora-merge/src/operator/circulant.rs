//! C³A (Chen et al. 2024, arXiv 2407.19342; PEFT's `c3a_kernel`): `W' = W + C/in`, C made of
//! circulant blocks,
//!
//! ```text
//! C[p·b + i, q·b + j] = k[p, q, (j − i) mod b]
//! ```
//!
//! for kernels k of out/b × in/b × b. PEFT has torch's Fourier transform work that out in f32, and
//! rounds it to the base's dtype before it divides.

use std::ops::Range;

use lora_format::Tensor;

use super::shapes::{self, Fits, decode, dim};
use super::{Features, Matrix, Operator};
use crate::kernels::Isa;
use crate::orientation::Orientation;

struct C3a {
    cols: usize,
    block: usize,
    inputs: f64,
    kernels: Vec<f32>,
}

pub(super) fn features(kernels: &Tensor) -> Features {
    let [outs, ins, b] = [0, 1, 2].map(|index| dim(kernels, index));
    Features { out: Some(outs.saturating_mul(b)), input: Some(ins.saturating_mul(b)) }
}

pub(super) fn check(kernels: &Tensor, matrix: Matrix) -> Fits {
    shapes::tensor(kernels, "out/b × in/b × b", kernels.shape.len() == 3)?;
    let features = features(kernels);
    shapes::matrix(matrix, features.out.unwrap_or(0), features.input.unwrap_or(0))?;
    shapes::stored(matrix, Orientation::OutIn)
}

pub(super) fn prepare(kernels: &Tensor, matrix: Matrix) -> Box<dyn Operator> {
    Box::new(C3a {
        cols: matrix.cols,
        block: dim(kernels, 2),
        inputs: matrix.cols as f64,
        kernels: decode(kernels),
    })
}

impl Operator for C3a {
    fn add_rows(&self, _: Isa, rows: Range<usize>, _: &[f32], weight: f64, delta: &mut [f64]) {
        let (cols, b) = (self.cols, self.block);
        for (row, delta) in rows.zip(delta.chunks_exact_mut(cols)) {
            let kernels = self.kernels[row / b * cols..][..cols].chunks_exact(b);
            for (kernel, delta) in kernels.zip(delta.chunks_exact_mut(b)) {
                // A row of a block is the kernel, pushed right by as many places.
                let (before, after) = delta.split_at_mut(row % b);
                let pushed = after.iter_mut().chain(before);
                for (delta, &value) in pushed.zip(kernel) {
                    *delta += weight * (f64::from(value) / self.inputs);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use lora_format::model::Form;

    use super::super::testing::{self, Noise, assert_change, assert_refused, at, floats};

    #[test]
    fn blocks_are_circulant() {
        let mut noise = Noise::new(1);
        for (outs, ins, b) in [(2, 3, 4), (1, 1, 7), (3, 2, 1)] {
            let kernels = testing::tensor(&mut noise, &[outs, ins, b]);
            let base = floats(&mut noise, outs * ins * b * b);
            let (k, matrix) = (at(&kernels), testing::out_in(outs * b, ins * b));
            assert_change(&Form::Circulant(kernels), matrix, &base, 1e-15, |o, i| {
                k((o / b * ins + i / b) * b + (b + i % b - o % b) % b) / (ins * b) as f64
            });
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let refuse = |shape: &[usize], matrix, words| {
            let kernels = testing::tensor(&mut Noise::new(2), shape);
            assert_refused(&Form::Circulant(kernels), matrix, words);
        };
        refuse(&[2, 3, 4], testing::out_in(8, 8), "expected 8 outputs and 12 inputs");
        refuse(&[2, 3], testing::out_in(2, 3), "expected out/b × in/b × b, found [2, 3]");
        refuse(&[2, 3, 0], testing::out_in(2, 3), "expected 0 outputs and 0 inputs");
        refuse(&[2, 3, 4], testing::in_out(12, 8), "stored as out×in, found in×out");
    }
}
