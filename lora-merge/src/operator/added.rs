//! A change stored in full: `W' = W + s·T`, the bias that `lora_bias` trains with B.

use std::ops::Range;

use lora_format::Tensor;

use super::shapes::{self, Fits, count, decode};
use super::{Features, Matrix, Operator};
use crate::kernels::Isa;

pub(super) fn features(tensor: &Tensor) -> Features {
    match *tensor.shape.as_slice() {
        [] => Features::default(),
        [out, ref rest @ ..] => {
            Features { out: Some(out), input: (!rest.is_empty()).then(|| count(rest)) }
        }
    }
}

pub(super) fn check(tensor: &Tensor, matrix: Matrix) -> Fits {
    let elements = matrix.rows.saturating_mul(matrix.cols);
    shapes::tensor(tensor, format!("{elements} values"), count(&tensor.shape) == elements)
}

pub(super) fn prepare(tensor: &Tensor, scale: f64, matrix: Matrix) -> Box<dyn Operator> {
    Box::new(Addition { cols: matrix.cols, scale, values: decode(tensor) })
}

struct Addition {
    cols: usize,
    scale: f64,
    values: Vec<f32>,
}

impl Operator for Addition {
    fn add_rows(&self, _: Isa, rows: Range<usize>, _: &[f32], weight: f64, delta: &mut [f64]) {
        let values = &self.values[rows.start * self.cols..rows.end * self.cols];
        for (delta, &value) in delta.iter_mut().zip(values) {
            *delta += weight * (self.scale * f64::from(value));
        }
    }
}
