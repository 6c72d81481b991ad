//! MiSS (Kang 2024, arXiv 2409.15371, formerly Bone; PEFT's `miss_block`): a small block D of
//! r × columns laid over the whole of W,
//!
//! ```text
//! W'[o, i] = W[o, i] + D[i mod r, o mod columns]
//! ```
//!
//! where columns is out, or of `mini` a divisor of it; r need not divide in. The variant `bat`
//! changes W in blocks of r × r, with one M for all blocks of the same outputs:
//!
//! ```text
//! W'[p·r + a, q·r + c] = W[p·r + a, q·r + c] + Σ_b W[p·r + a, q·r + b]·M[p, b, c] + M[p, a, c]
//! ```

use std::ops::Range;

use lora_format::model::{Tiled, TiledRule};

use super::product::transposed;
use super::shapes::{self, Fits, decode, dim};
use super::{Features, Matrix, Operator};
use crate::kernels::Isa;
use crate::orientation::Orientation;

/// A tile repeated down and across the stored matrix.
struct Tile {
    cols: usize,
    rows: usize,
    width: usize,
    values: Vec<f32>,
}

struct Bat {
    cols: usize,
    rank: usize,
    /// M.
    blocks: Vec<f32>,
}

pub(super) fn features(form: &Tiled) -> Features {
    let out = match form.rule {
        // The columns may be repeated.
        TiledRule::Add => None,
        TiledRule::Bat => Some(dim(&form.block, 0).saturating_mul(dim(&form.block, 1))),
    };
    Features { out, input: None }
}

pub(super) fn check(form: &Tiled, matrix: Matrix) -> Fits {
    let (block, out, input) = (&form.block, matrix.out(), matrix.input());
    match form.rule {
        TiledRule::Add => {
            let (rank, columns) = (dim(block, 0), dim(block, 1));
            let fits = block.shape.len() == 2 && columns > 0 && out > 0 && out % columns == 0;
            let expected = format!("at most {input} × a divisor of {out}");
            shapes::tensor(block, expected, fits && (1..=input).contains(&rank))
        }
        TiledRule::Bat => {
            let rank = dim(block, 1);
            let whole = rank > 0 && out > 0 && out % rank == 0 && input % rank == 0;
            let fits = whole && block.shape == [out / rank, rank, rank];
            shapes::tensor(block, format!("{out}/r × r × r, r a divisor of {input}"), fits)?;
            shapes::stored(matrix, Orientation::OutIn)
        }
    }
}

pub(super) fn prepare(form: &Tiled, matrix: Matrix) -> Box<dyn Operator> {
    let values = decode(&form.block);
    let (cols, rank, columns) = (matrix.cols, dim(&form.block, 0), dim(&form.block, 1));
    match (form.rule, matrix.orientation) {
        (TiledRule::Add, Orientation::OutIn) => {
            let values = transposed(&values, rank, columns);
            Box::new(Tile { cols, rows: columns, width: rank, values })
        }
        (TiledRule::Add, Orientation::InOut) => {
            Box::new(Tile { cols, rows: rank, width: columns, values })
        }
        (TiledRule::Bat, _) => Box::new(Bat { cols, rank: columns, blocks: values }),
    }
}

impl Operator for Tile {
    fn add_rows(&self, _: Isa, rows: Range<usize>, _: &[f32], weight: f64, delta: &mut [f64]) {
        for (row, delta) in rows.zip(delta.chunks_exact_mut(self.cols)) {
            let values = &self.values[row % self.rows * self.width..][..self.width];
            for delta in delta.chunks_mut(self.width) {
                let elements = delta.iter_mut().zip(values);
                elements.for_each(|(delta, &value)| *delta += weight * f64::from(value));
            }
        }
    }
}

impl Operator for Bat {
    fn add_rows(&self, _: Isa, rows: Range<usize>, base: &[f32], weight: f64, delta: &mut [f64]) {
        let (cols, rank) = (self.cols, self.rank);
        let mut change = vec![0.0; rank];
        let lines = base.chunks_exact(cols).zip(delta.chunks_exact_mut(cols));
        for (row, (base, delta)) in rows.zip(lines) {
            let block = &self.blocks[row / rank * rank * rank..][..rank * rank];
            let own = &block[row % rank * rank..][..rank];
            for (base, delta) in base.chunks_exact(rank).zip(delta.chunks_exact_mut(rank)) {
                change.fill(0.0);
                for (&w, block) in base.iter().zip(block.chunks_exact(rank)) {
                    let (w, elements) = (f64::from(w), change.iter_mut().zip(block));
                    elements.for_each(|(sum, &value)| *sum += w * f64::from(value));
                }
                for ((sum, &own), delta) in change.iter().zip(own).zip(delta) {
                    *delta += weight * (sum + f64::from(own));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use lora_format::Tensor;
    use lora_format::model::Form;

    use super::super::testing::{self, Noise, assert_change, assert_refused, at, floats};
    use super::*;

    fn form(block: &Tensor, rule: TiledRule) -> Form {
        Form::Tiled(Tiled { block: block.clone(), rule })
    }

    #[test]
    fn a_tile_is_laid_over_the_matrix() {
        let mut noise = Noise::new(1);
        let (out, input) = (12, 17);
        for (rank, columns) in [(4, 12), (17, 12), (1, 12), (5, 3), (3, 1)] {
            let block = testing::tensor(&mut noise, &[rank, columns]);
            let base = floats(&mut noise, out * input);
            let d = at(&block);
            let delta = |o: usize, i: usize| d(i % rank * columns + o % columns);
            let form = form(&block, TiledRule::Add);
            assert_change(&form, testing::out_in(out, input), &base, 0.0, delta);
            assert_change(&form, testing::in_out(input, out), &base, 0.0, |i, o| delta(o, i));
        }
    }

    #[test]
    fn bat_multiplies_square_blocks() {
        let mut noise = Noise::new(2);
        let (out, input) = (12, 18);
        for rank in [1, 2, 3, 6] {
            let block = testing::tensor(&mut noise, &[out / rank, rank, rank]);
            let base = floats(&mut noise, out * input);
            let m = at(&block);
            let form = form(&block, TiledRule::Bat);
            assert_change(&form, testing::out_in(out, input), &base, 1e-14, |o, i| {
                let m = |b: usize| m(o / rank * rank * rank + b * rank + i % rank);
                let w = |b: usize| f64::from(base[o * input + i / rank * rank + b]);
                m(o % rank) + (0..rank).map(|b| w(b) * m(b)).sum::<f64>()
            });
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut noise = Noise::new(3);
        let matrix = testing::out_in(6, 8);
        let mut refuse = |shape: &[usize], rule, words| {
            assert_refused(&form(&testing::tensor(&mut noise, shape), rule), matrix, words);
        };
        refuse(&[4, 4], TiledRule::Add, "expected at most 8 × a divisor of 6, found [4, 4]");
        refuse(&[9, 6], TiledRule::Add, "found [9, 6]");
        refuse(&[0, 6], TiledRule::Add, "found [0, 6]");
        refuse(&[4, 0], TiledRule::Add, "found [4, 0]");
        refuse(&[6], TiledRule::Add, "found [6]");
        refuse(&[2, 3, 3], TiledRule::Bat, "expected 6/r × r × r, r a divisor of 8");
        refuse(&[3, 2, 3], TiledRule::Bat, "found [3, 2, 3]");
        let block = testing::tensor(&mut noise, &[3, 2, 2]);
        let words = "expected a matrix stored as out×in, found in×out";
        assert_refused(&form(&block, TiledRule::Bat), testing::in_out(8, 6), words);
    }
}
