//! The experts of gpt-oss: FP4 in blocks of 32 with one power of two each (OCP MXFP4).
//!
//! ```text
//! stored   X_blocks  U8 [experts, out, in/32, 16]    two FP4 per byte, the lower nibble first
//!          X_scales  U8 [experts, out, in/32]        e stands for 2^(e − 127)
//! weight   X            [experts, in, out]
//!
//! W[x,i,o] = fp4[x,o,i] · 2^(e[x,o,⌊i/32⌋] − 127)
//! ```
//!
//! (`convert_moe_packed_tensors` in transformers' `integrations/mxfp4.py`, which transposes at the
//! end.) Every element is exact in f32. Gate and up projections of `gate_up_proj` stay interleaved
//! along `out`, as the full-precision model has them.

use std::ops::Range;

use lora_format::Dtype;

use super::number::{Codes, E2M1, exponent};
use super::survey::{Part, Result, Survey};
use super::{QuantisedWeight, Scheme};

/// Elements that share a scale.
const BLOCK: usize = 32;
/// Bytes that hold their codes.
const BLOCK_BYTES: usize = BLOCK / 2;
/// Rows of codes that are decoded together, so that columns of the weight are written in pieces.
const TOGETHER: usize = 64;

/// A stack of matrices whose codes lie transposed.
#[derive(Clone, Debug)]
pub(super) struct Experts {
    /// Rows of the weight, `in`.
    rows: usize,
    /// Columns of the weight, `out`.
    columns: usize,
}

pub(super) fn find(survey: &mut Survey<'_>) {
    for (name, codes) in survey.ending_in("_blocks") {
        if codes.dtype() != Dtype::U8 {
            continue;
        }
        survey.claim(&codes);
        let weight = experts(survey, name, codes);
        survey.enter("mxfp4", weight);
    }
}

fn experts(survey: &mut Survey<'_>, name: &str, codes: Part<'_>) -> Result<QuantisedWeight> {
    let scales = survey.required(&codes, &format!("{name}_scales"))?;
    survey.claim(&scales);
    if let Some(method) = survey.method()
        && method != "mxfp4"
    {
        return Err(codes.contradiction(format!("quant_method `{method}`"), "MXFP4 experts"));
    }
    let [number, columns, blocks, BLOCK_BYTES] = *codes.shape() else {
        return Err(codes.wrong_shape(format!("[experts, out, in/{BLOCK}, {BLOCK_BYTES}]")));
    };
    if codes.shape().contains(&0) {
        return Err(codes.wrong_shape("without a 0".to_owned()));
    }
    scales.expect_dtype(&[Dtype::U8])?;
    scales.expect_shape(&[number, columns, blocks])?;
    // No overflow: half as many bytes are there.
    let rows = blocks * BLOCK;
    let scheme = Scheme::Experts(Experts { rows, columns });
    let (shape, dtype) = (vec![number, rows, columns], survey.model_dtype());
    Ok(QuantisedWeight::new(name.to_owned(), shape, dtype, &[codes, scales], scheme))
}

impl Experts {
    fn blocks(&self) -> usize {
        self.rows / BLOCK
    }

    pub(super) fn read(&self, parts: &[&[u8]], first: usize, out: &mut [f32]) {
        self.spans(first, out.len(), |row, columns, height, at| {
            let out = &mut out[at..at + height * columns.len()];
            self.read_rows(parts, row, columns, height, out);
        });
    }

    /// Decodes `height` rows from `row` on (counted through all matrices, all of one block), of
    /// them these columns.
    fn read_rows(
        &self,
        parts: &[&[u8]],
        row: usize,
        columns: Range<usize>,
        height: usize,
        out: &mut [f32],
    ) {
        let width = columns.len();
        let (matrix, row) = (row / self.rows, row % self.rows);
        let (block, within) = (row / BLOCK, row % BLOCK);
        let mut piece = [[0.0; TOGETHER]; BLOCK];
        for start in (0..width).step_by(TOGETHER) {
            let together = TOGETHER.min(width - start);
            for (offset, column) in columns.clone().skip(start).take(together).enumerate() {
                let at = (matrix * self.columns + column) * self.blocks() + block;
                let scale = exponent(parts[1][at]);
                let codes = &parts[0][at * BLOCK_BYTES..][..BLOCK_BYTES];
                let pairs = within / 2..(within + height).div_ceil(2);
                for pair in pairs {
                    let [low, high] = E2M1[usize::from(codes[pair])];
                    piece[2 * pair][offset] = low * scale;
                    piece[2 * pair + 1][offset] = high * scale;
                }
            }
            for line in 0..height {
                out[line * width + start..][..together]
                    .copy_from_slice(&piece[within + line][..together]);
            }
        }
    }

    /// Cuts a run of elements into rectangles: whole rows of one block together, parts of rows
    /// alone. `visit` is given the first row, the columns, the number of rows, and where the
    /// rectangle begins in the run.
    fn spans(
        &self,
        first: usize,
        count: usize,
        mut visit: impl FnMut(usize, Range<usize>, usize, usize),
    ) {
        let (mut row, mut column, mut done) = (first / self.columns, first % self.columns, 0);
        while done < count {
            let left = count - done;
            if column > 0 || left < self.columns {
                let end = self.columns.min(column + left);
                visit(row, column..end, 1, done);
                done += end - column;
                (row, column) = (row + 1, 0);
            } else {
                let height = (BLOCK - row % BLOCK).min(left / self.columns);
                visit(row, 0..self.columns, height, done);
                done += height * self.columns;
                row += height;
            }
        }
    }

    pub(super) fn requantise(
        &self,
        parts: &[&[u8]],
        first: usize,
        values: &[f32],
        out: &mut [f32],
    ) {
        for (element, (slot, &value)) in (first..).zip(out.iter_mut().zip(values)) {
            let (row, column) = (element / self.columns, element % self.columns);
            let (matrix, row) = (row / self.rows, row % self.rows);
            let at = (matrix * self.columns + column) * self.blocks() + row / BLOCK;
            let scale = exponent(parts[1][at]);
            *slot = Codes::E2m1.nearest(value / scale, 0.0) * scale;
        }
    }

    /// The codes of all matrices that the elements lie in: a row of the weight is spread over the
    /// whole of its matrix.
    pub(super) fn codes(&self, first: usize, count: usize) -> Range<usize> {
        let matrix = |element: usize| element / (self.rows * self.columns);
        let bytes = self.blocks() * BLOCK_BYTES * self.columns;
        matrix(first) * bytes..(matrix(first + count - 1) + 1) * bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_run_of_elements_follows_the_definition() {
        let (matrices, experts) = (2, Experts { rows: 3 * BLOCK, columns: TOGETHER + 7 });
        let (rows, columns) = (experts.rows, experts.columns);
        let mut state = 1_u32;
        let mut bytes = |count: usize, most: u32| -> Vec<u8> {
            let mut byte = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                ((state >> 8) % most) as u8
            };
            (0..count).map(|_| byte()).collect()
        };
        let scales = bytes(matrices * columns * rows / BLOCK, 250);
        let codes = bytes(scales.len() * BLOCK_BYTES, 256);
        let parts = [&codes[..], &scales[..]];
        let mut all = Vec::new();
        for matrix in 0..matrices {
            for row in 0..rows {
                for column in 0..columns {
                    let block = (matrix * columns + column) * rows / BLOCK + row / BLOCK;
                    let byte = codes[block * BLOCK_BYTES + row % BLOCK / 2];
                    let nibble = if row % 2 == 0 { byte & 15 } else { byte >> 4 };
                    let lut = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0_f64];
                    let sign = if nibble & 8 == 0 { 1.0 } else { -1.0 };
                    let scale = 2f64.powi(i32::from(scales[block]) - 127);
                    all.push(sign * lut[usize::from(nibble & 7)] * scale);
                }
            }
        }
        for first in (0..all.len()).step_by(89) {
            for count in [1, columns - 1, columns, 5 * columns + 3, all.len()] {
                let count = count.min(all.len() - first);
                let mut out = vec![f32::NAN; count];
                experts.read(&parts, first, &mut out);
                assert!(out.iter().zip(&all[first..]).all(|(&a, &b)| f64::from(a) == b));
            }
        }
    }
}
