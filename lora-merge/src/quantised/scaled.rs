//! Codes times scales: the arithmetic that FP8, FP4 and plain integers share.

use std::ops::Range;

use super::grid::Grid;
use super::number::{Codes, ScaleType};

/// A matrix of which each element is `(code − zero) · scale`, with one scale and zero per block:
///
/// ```text
/// W[i,j] = (code[i,j] − zero[b]) · s[b]        s[b] = scale[b]  or  scale[b] / global
/// ```
///
/// in f32, every operation rounded. Codes lie in rows of whole bytes.
#[derive(Clone, Debug)]
pub(super) struct Scaled {
    /// What a code stands for. Part 0.
    pub(super) codes: Codes,
    /// Bytes from one row of codes to the next.
    pub(super) row_bytes: usize,
    /// Which elements share a scale.
    pub(super) grid: Grid,
    /// How the scales are stored. Part 1.
    pub(super) scale: ScaleType,
    /// The zero points, if there are any.
    pub(super) zero: Option<Zero>,
    /// The part that holds one f32 by which all scales are divided.
    pub(super) global: Option<usize>,
    /// Which scale of its row each column has, if that does not follow from `grid`, which is then
    /// one block per row.
    pub(super) order: Option<Order>,
}

/// Zero points: integers that are subtracted from the codes, one per scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Zero {
    /// One signed byte each, in this part.
    Int8 {
        /// The part.
        part: usize,
    },
    /// Packed along the rows of this part's matrix, like the codes along the columns of theirs:
    /// an i32 of column g holds those of 32 ÷ bits consecutive rows for group g.
    Packed {
        /// The part.
        part: usize,
        /// Bits of each; they stand for themselves less 2^(bits − 1).
        bits: usize,
        /// Groups of a row.
        groups: usize,
    },
}

/// A table of i32 that gives the group of every column (`g_idx`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Order {
    /// The part that holds it.
    pub(super) part: usize,
    /// The number of groups.
    pub(super) groups: usize,
}

/// The scale and the zero point of one element.
#[derive(Clone, Copy)]
struct Affine {
    scale: f32,
    zero: f32,
}

impl Affine {
    #[inline(always)]
    fn value(self, code: f32) -> f32 {
        (code - self.zero) * self.scale
    }

    /// The representable value nearest to `value`.
    #[inline(always)]
    fn nearest(self, codes: Codes, value: f32) -> f32 {
        if self.scale == 0.0 && !value.is_nan() {
            return 0.0;
        }
        self.value(codes.nearest(value / self.scale, self.zero))
    }
}

impl Scaled {
    pub(super) fn read(&self, parts: &[&[u8]], first: usize, out: &mut [f32]) {
        let global = self.global(parts);
        self.grid.runs(first, out.len(), |run, at| {
            let row = &parts[0][run.row * self.row_bytes..][..self.row_bytes];
            let out = &mut out[at..at + run.count];
            match self.order {
                None => {
                    let affine = self.affine(parts, global, run.row, run.scale);
                    self.codes.decode(row, run.column, out, |code| affine.value(code));
                }
                Some(order) => {
                    self.codes.decode(row, run.column, out, |code| code);
                    for (column, element) in (run.column..).zip(out) {
                        let scale = run.row * order.groups + order.group(parts, column);
                        *element = self.affine(parts, global, run.row, scale).value(*element);
                    }
                }
            }
        });
    }

    pub(super) fn requantise(
        &self,
        parts: &[&[u8]],
        first: usize,
        values: &[f32],
        out: &mut [f32],
    ) {
        let global = self.global(parts);
        self.grid.runs(first, out.len(), |run, at| {
            let run_of = at..at + run.count;
            let elements = out[run_of.clone()].iter_mut().zip(&values[run_of]);
            match self.order {
                None => {
                    let affine = self.affine(parts, global, run.row, run.scale);
                    for (element, &value) in elements {
                        *element = affine.nearest(self.codes, value);
                    }
                }
                Some(order) => {
                    for (column, (element, &value)) in (run.column..).zip(elements) {
                        let scale = run.row * order.groups + order.group(parts, column);
                        let affine = self.affine(parts, global, run.row, scale);
                        *element = affine.nearest(self.codes, value);
                    }
                }
            }
        });
    }

    /// The bytes of part 0 with the codes of `count` > 0 elements from `first` on.
    pub(super) fn codes(&self, first: usize, count: usize) -> Range<usize> {
        let bit = |element: usize| {
            let (row, column) = (element / self.grid.columns, element % self.grid.columns);
            (row * self.row_bytes, column * self.codes.bits())
        };
        let ((first_row, first_bit), (last_row, last_bit)) = (bit(first), bit(first + count - 1));
        first_row + first_bit / 8..last_row + last_bit / 8 + 1
    }

    fn global(&self, parts: &[&[u8]]) -> Option<f32> {
        let part = self.global?;
        Some(ScaleType::Float(crate::kernels::FloatType::F32).at(parts[part], 0))
    }

    #[inline(always)]
    fn affine(&self, parts: &[&[u8]], global: Option<f32>, row: usize, scale: usize) -> Affine {
        let stored = self.scale.at(parts[1], scale);
        let zero = match self.zero {
            None => 0.0,
            Some(Zero::Int8 { part }) => f32::from(parts[part][scale].cast_signed()),
            Some(Zero::Packed { part, bits, groups }) => {
                let per_word = 32 / bits;
                let word = row / per_word * groups + scale % groups;
                let bit = row % per_word * bits;
                let byte = u32::from(parts[part][word * 4 + bit / 8]);
                let code = (byte >> (bit % 8)) & ((1 << bits) - 1);
                code as f32 - (1 << (bits - 1)) as f32
            }
        };
        Affine { scale: global.map_or(stored, |global| stored / global), zero }
    }
}

impl Order {
    /// The group of a column. The table was checked when it was found, but the file may have been
    /// written to since.
    #[inline(always)]
    fn group(&self, parts: &[&[u8]], column: usize) -> usize {
        let at = &parts[self.part][column * 4..][..4];
        let group = u32::from_le_bytes([at[0], at[1], at[2], at[3]]);
        (group as usize).min(self.groups - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::FloatType;

    const COLUMNS: usize = 8;

    fn scaled(order: Option<Order>) -> Scaled {
        let grid = Grid { rows: 2, columns: COLUMNS, block: [1, COLUMNS], single: false };
        let (codes, scale) = (Codes::Offset4, ScaleType::Float(FloatType::F32));
        Scaled { codes, row_bytes: 4, grid, scale, zero: None, global: None, order }
    }

    /// The file may be written to after the table was checked: no index of it leads astray.
    #[test]
    fn a_table_that_has_changed_reads_some_scale() {
        let order = Order { part: 2, groups: 2 };
        let table: Vec<u8> = [0_i32, 1, 2, -1, i32::MAX, i32::MIN, 1, 0]
            .iter()
            .flat_map(|index| index.to_le_bytes())
            .collect();
        let scales: Vec<u8> =
            [1.0_f32, 2.0, 3.0, 4.0].iter().flat_map(|s| s.to_le_bytes()).collect();
        let mut out = [0.0; 2 * COLUMNS];
        scaled(Some(order)).read(&[&[0x99; 8], &scales, &table], 0, &mut out);
        assert_eq!(out[..COLUMNS], [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.0]);
        assert_eq!(out[COLUMNS..], [3.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 3.0]);
    }

    #[test]
    fn values_beyond_the_range_become_its_end() {
        let scales: Vec<u8> = [0.5_f32, 0.0].iter().flat_map(|s| s.to_le_bytes()).collect();
        let values = [9.0, -9.0, 0.3, 0.25, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, -0.6];
        let mut out = [0.0; COLUMNS];
        let parts: [&[u8]; 2] = [&[0; 8], &scales];
        scaled(None).requantise(&parts, 0, &values, &mut out);
        assert_eq!(out[..6], [3.5, -4.0, 0.5, 0.0, 3.5, -4.0]);
        assert!(out[6].is_nan());
        assert_eq!(out[7], -0.5);
        // A scale of 0 represents nothing else.
        scaled(None).requantise(&parts, COLUMNS, &values[..6], &mut out[..6]);
        assert_eq!(out[..6], [0.0; 6]);
    }
}
