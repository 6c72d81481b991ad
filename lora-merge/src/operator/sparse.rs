//! SHiRA (Bhardwaj et al. 2024, arXiv 2406.13175; PEFT's `shira_weight` and `shira_indices`):
//! `W' = W + S`, values at given places. Those of one place add up, as in torch's sparse tensors.

use std::ops::Range;

use lora_format::model::Sparse;
use lora_format::{Dtype, Tensor};

use super::shapes::{self, Fits, count, decode};
use super::{Matrix, Operator};
use crate::kernels::Isa;
use crate::orientation::Orientation;

struct Shira {
    cols: usize,
    /// Where the values of every row begin, and where those of the last end.
    starts: Vec<usize>,
    /// Column and value, row by row, in the file's order.
    values: Vec<(usize, f32)>,
}

/// The indices, flat; negative ones, and those too large, as the largest.
fn indices(tensor: &Tensor) -> Option<Vec<usize>> {
    let bytes = tensor.bytes();
    let index = |index: i64| usize::try_from(index).unwrap_or(usize::MAX);
    Some(match tensor.dtype {
        Dtype::I32 => {
            let words = bytes.as_chunks().0.iter();
            words.map(|&word| index(i64::from(i32::from_le_bytes(word)))).collect()
        }
        Dtype::I64 => {
            let words = bytes.as_chunks().0.iter();
            words.map(|&word| index(i64::from_le_bytes(word))).collect()
        }
        _ => return None,
    })
}

pub(super) fn check(form: &Sparse, matrix: Matrix) -> Fits {
    let values = count(&form.values.shape);
    shapes::tensor(&form.values, "n values", form.values.shape.len() == 1)?;
    let Tensor { name, shape, dtype, .. } = &form.indices;
    let Some(indices) = indices(&form.indices) else {
        return Err(format!("`{name}`: expected I32 or I64, found {dtype}"));
    };
    if shape.as_slice() != [2, values] {
        return Err(format!("`{name}`: expected 2 × {values} indices, found {shape:?}"));
    }
    let (outs, ins) = indices.split_at(values);
    for (indices, length) in [(outs, matrix.out()), (ins, matrix.input())] {
        if let Some(index) = indices.iter().find(|&&index| index >= length) {
            return Err(format!("`{name}`: expected indices below {length}, found {index}"));
        }
    }
    Ok(())
}

pub(super) fn prepare(form: &Sparse, matrix: Matrix) -> Box<dyn Operator> {
    let values = decode(&form.values);
    let indices = indices(&form.indices).unwrap_or_default();
    let (outs, ins) = indices.split_at(values.len());
    let (rows, cols) = match matrix.orientation {
        Orientation::OutIn => (outs, ins),
        Orientation::InOut => (ins, outs),
    };
    // A counting sort: the values of a row keep their order.
    let mut starts = vec![0; matrix.rows + 1];
    rows.iter().for_each(|&row| starts[row + 1] += 1);
    for row in 0..matrix.rows {
        starts[row + 1] += starts[row];
    }
    let mut next = starts.clone();
    let mut sorted = vec![(0, 0.0); values.len()];
    for ((&row, &col), value) in rows.iter().zip(cols).zip(values) {
        sorted[next[row]] = (col, value);
        next[row] += 1;
    }
    Box::new(Shira { cols: matrix.cols, starts, values: sorted })
}

impl Operator for Shira {
    fn add_rows(&self, _: Isa, rows: Range<usize>, _: &[f32], weight: f64, delta: &mut [f64]) {
        for (row, delta) in rows.zip(delta.chunks_exact_mut(self.cols)) {
            for &(col, value) in &self.values[self.starts[row]..self.starts[row + 1]] {
                delta[col] += weight * f64::from(value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use lora_format::model::Form;

    use super::super::testing::{self, Noise, assert_change, assert_refused, at, floats};
    use super::*;

    fn form(values: &Tensor, indices: &[[i64; 2]], dtype: Dtype) -> Form {
        let flat = (0..2).flat_map(|side| indices.iter().map(move |pair| pair[side]));
        let bytes = match dtype {
            Dtype::I32 => flat.flat_map(|index| (index as i32).to_le_bytes()).collect(),
            _ => flat.flat_map(i64::to_le_bytes).collect(),
        };
        let shape = vec![2, indices.len()];
        let indices = Tensor::new("indices".to_owned(), dtype, shape, bytes).unwrap();
        Form::Sparse(Sparse { indices, values: values.clone() })
    }

    #[test]
    fn values_are_added_where_they_belong() {
        let mut noise = Noise::new(1);
        let values = testing::tensor(&mut noise, &[5]);
        let places = [[2, 3], [0, 0], [2, 1], [4, 3], [2, 3]];
        let (base, v) = (floats(&mut noise, 20), at(&values));
        for dtype in [Dtype::I32, Dtype::I64] {
            let form = form(&values, &places, dtype);
            let delta = |o: usize, i: usize| {
                let here = |n: &usize| places[*n] == [o as i64, i as i64];
                (0..5).filter(here).map(&v).sum()
            };
            assert_change(&form, testing::out_in(5, 4), &base, 0.0, delta);
            assert_change(&form, testing::in_out(4, 5), &base, 0.0, |i, o| delta(o, i));
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let values = testing::tensor_of(&[2], &[1.0; 2]);
        let matrix = testing::out_in(3, 4);
        let words = "expected indices below 3, found 3";
        assert_refused(&form(&values, &[[0, 3], [3, 0]], Dtype::I32), matrix, words);
        let words = "expected indices below 4";
        assert_refused(&form(&values, &[[0, -1], [0, 0]], Dtype::I64), matrix, words);
        let words = "expected 2 × 2 indices, found [2, 1]";
        assert_refused(&form(&values, &[[0, 0]], Dtype::I64), matrix, words);
        let form = form(&values, &[[0, 0]], Dtype::U64);
        assert_refused(&form, matrix, "expected I32 or I64, found U64");
    }
}
