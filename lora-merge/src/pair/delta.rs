//! ΔW of one pair, read where it lies: tuned − base in f32, row by row.

use std::ops::Range;

use super::model::Values;
use crate::kernels::{self, FloatType, Isa, Rows, with_ieee_floats};

/// Elements of the base that are decoded at once, where it is not stored as numbers.
const RUN: usize = 4096;

/// ΔW of one pair as a matrix, and W0. Reads may come from any number of threads; nothing is kept
/// between them.
#[derive(Clone, Copy, Debug)]
pub struct Delta<'a> {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) base: Values<'a>,
    pub(super) tuned: Values<'a>,
    pub(super) isa: Isa,
}

/// A run of elements as it lies in a file, and the type of its elements.
pub type Stored<'a> = (&'a [u8], FloatType);

impl<'a> Delta<'a> {
    /// Rows and columns: of a matrix its own, of a convolution out × (in · kernel), of a stack
    /// (experts · rows) × columns, of a vector 1 × n. Of tables that differ in their rows, the rows
    /// that both have.
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// Reads whole rows of ΔW from `first_row` on: each element of the fine-tuned model minus the
    /// base's, both exact in f32, rounded once.
    ///
    /// # Panics
    /// If `out` is not whole rows, or ends beyond the last one.
    pub fn read(&self, first_row: usize, out: &mut [f32]) {
        let first = self.first_element(first_row, out.len());
        self.read_elements(first, out);
    }

    /// Reads whole rows of W0, exactly.
    ///
    /// # Panics
    /// As [`Delta::read`].
    pub fn read_base(&self, first_row: usize, out: &mut [f32]) {
        let first = self.first_element(first_row, out.len());
        self.base.populate(first..first + out.len());
        self.base.read(first, out);
    }

    /// Reads whole rows of the fine-tuned weight, exactly.
    ///
    /// # Panics
    /// As [`Delta::read`].
    pub fn read_tuned(&self, first_row: usize, out: &mut [f32]) {
        let first = self.first_element(first_row, out.len());
        self.tuned.populate(first..first + out.len());
        self.tuned.read(first, out);
    }

    /// Rows where they lie, the fine-tuned model's first; `None` if one side is quantised.
    ///
    /// # Panics
    /// If the rows end beyond the last one.
    pub fn bytes(&self, rows: Range<usize>) -> Option<(Stored<'a>, Stored<'a>)> {
        let elements = self.elements(rows);
        self.populate(elements.clone());
        Some((self.tuned.in_place(elements.clone())?, self.base.in_place(elements)?))
    }

    /// The same for the kernels that sweep over ΔW.
    ///
    /// # Panics
    /// If the rows end beyond the last one.
    pub fn stored(&self, rows: Range<usize>) -> Option<Rows<'a>> {
        let ((tuned, tuned_type), base) = self.bytes(rows)?;
        Some(Rows::Stored { tuned, tuned_type, base: Some(base) })
    }

    /// Gives back the pages of rows that will not be read again soon.
    ///
    /// # Panics
    /// If the rows end beyond the last one.
    pub fn release(&self, rows: Range<usize>) {
        self.release_elements(self.elements(rows));
    }

    /// The number of elements.
    pub(super) fn len(&self) -> usize {
        self.rows * self.cols
    }

    pub(super) fn read_elements(&self, first: usize, out: &mut [f32]) {
        let elements = first..first + out.len();
        self.populate(elements.clone());
        let stored = (self.tuned.in_place(elements.clone()), self.base.in_place(elements));
        if let (Some((tuned, tuned_type)), Some(base)) = stored {
            return kernels::difference(self.isa, tuned, tuned_type, Some(base), out);
        }
        self.tuned.read(first, out);
        let mut base = [0.0; RUN];
        for (run, out) in out.chunks_mut(RUN).enumerate() {
            let base = &mut base[..out.len()];
            self.base.read(first + run * RUN, base);
            with_ieee_floats(|| out.iter_mut().zip(base).for_each(|(out, base)| *out -= *base));
        }
    }

    pub(super) fn populate(&self, elements: Range<usize>) {
        self.base.populate(elements.clone());
        self.tuned.populate(elements);
    }

    pub(super) fn release_elements(&self, elements: Range<usize>) {
        self.base.release(elements.clone());
        self.tuned.release(elements);
    }

    fn elements(&self, rows: Range<usize>) -> Range<usize> {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        rows.start * self.cols..rows.end * self.cols
    }

    fn first_element(&self, first_row: usize, elements: usize) -> usize {
        let rows = elements.checked_div(self.cols).unwrap_or(0);
        assert_eq!(rows * self.cols, elements, "whole rows of {} elements", self.cols);
        self.elements(first_row..first_row + rows).start
    }
}
