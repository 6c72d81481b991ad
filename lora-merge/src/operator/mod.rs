//! Changes that are not sums of low-rank terms: the methods whose `f(W) − W` needs W itself, or is
//! an elementwise or Kronecker product.
//!
//! An operator is prepared once per parameter and then asked, from several threads, for
//! `f(W) − W` of some whole rows of the stored matrix. All arithmetic is f64 in an order that
//! depends on the row alone, so the result does not depend on how the matrix is cut, nor on the
//! instruction set.
//!
//! | file           | method      | `f(W)`                     |
//! |----------------|-------------|----------------------------|
//! | `added`        | `lora_bias` | `W + s·T`                  |
//! | `dora`         | DoRA        | `m·V/‖V‖`, `V = W + s·B·A` |
//! | `tucker`       | LoCon       | `W + s·B·T·A`              |
//! | `hadamard`     | LoHa        | `W + s·(B₁A₁)⊙(B₂A₂)`      |
//! | `kronecker`    | LoKr        | `W + s·C⊗D`                |
//! | `gain`         | IA³         | `W ⊙ l`                    |
//! | `rotation`     | OFT         | `W·Rᵀ`                     |
//! | `tiled`        | MiSS        | `W + D`, `W + W·M + M`     |
//! | `proportional` | HiRA        | `W ⊙ (1 + s·B·A)`          |
//! | `reflections`  | HRA         | `W·H₁·H₂·…`                |
//! | `butterfly`    | BOFT        | `s ⊙ (W·Mᵀ)`               |
//! | `sparse`       | SHiRA       | `W + S`                    |
//! | `circulant`    | C³A         | `W + C/in`                 |
//! | `bounded`      | DeLoRA      | `W + B·D·A·diag(n)`        |
//! | `grid`         | GraLoRA     | `W + s·D`                  |
//!
//! `product` packs two factors for the kernels, `parallel` shares out the work of a preparation,
//! `shapes` words what does not fit, `features` tells the planner what an operator fits.
//!
//! The order of business: [`features()`] finds the matrix, [`check()`] refuses what does not fit
//! it, [`prepare`] may then rely on every shape, and [`Operator::add`] on everything.

mod added;
mod bounded;
mod butterfly;
mod circulant;
mod dora;
mod features;
#[cfg(test)]
mod fixtures;
mod gain;
mod grid;
mod hadamard;
mod kronecker;
mod parallel;
mod product;
mod proportional;
mod reflections;
mod rotation;
mod shapes;
mod sparse;
#[cfg(test)]
mod testing;
mod tiled;
mod tucker;

use std::ops::Range;

use lora_format::model::{Form, GainAxis};

use crate::error::Result;
use crate::kernels::{Isa, with_ieee_floats};
use crate::orientation::Orientation;

pub(crate) use features::{Features, check, features};

/// A prepared change of one parameter.
pub(crate) trait Operator: Send + Sync {
    /// Adds `weight · (f(W) − W)` of the given rows to `delta`. `base` holds the same rows of W;
    /// both are row-major and as wide as the stored matrix.
    fn add(&self, isa: Isa, rows: Range<usize>, base: &[f32], weight: f64, delta: &mut [f64]) {
        with_ieee_floats(|| self.add_rows(isa, rows, base, weight, delta));
    }

    /// [`Operator::add`] in the floating-point environment that it promises.
    fn add_rows(&self, isa: Isa, rows: Range<usize>, base: &[f32], weight: f64, delta: &mut [f64]);
}

/// The stored matrix that an operator changes: of a convolution (out, in·kernel), of a bias one
/// row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Matrix {
    /// Stored rows.
    pub(crate) rows: usize,
    /// Stored columns.
    pub(crate) cols: usize,
    /// Whether rows are output features.
    pub(crate) orientation: Orientation,
    /// Positions of a convolution's kernel; 1 of everything else.
    pub(crate) kernel: usize,
}

impl Matrix {
    /// Output features.
    pub(crate) fn out(self) -> usize {
        match self.orientation {
            Orientation::OutIn => self.rows,
            Orientation::InOut => self.cols,
        }
    }

    /// Input features; of a convolution, times the kernel's positions.
    pub(crate) fn input(self) -> usize {
        match self.orientation {
            Orientation::OutIn => self.cols,
            Orientation::InOut => self.rows,
        }
    }
}

/// Reads whole rows of W, as f32, into the buffer, which has the right length.
pub(crate) type ReadRows<'a> = dyn Fn(Range<usize>, &mut [f32]) -> Result<()> + Sync + 'a;

/// The operator of a form that fits the matrix, or `None` for a form that has none (low-rank
/// terms, replacements). Methods with norms read all of W once. At most so many threads are used,
/// the caller's included, and the result does not depend on how many.
///
/// # Errors
/// What `read` returns, [`crate::Error::ZeroNorm`] and [`crate::Error::NoDirection`].
///
/// # Panics
/// Perhaps, of a form that [`check()`] refuses.
pub(crate) fn prepare(
    form: &Form,
    matrix: Matrix,
    isa: Isa,
    threads: usize,
    read: &ReadRows<'_>,
) -> Result<Option<Box<dyn Operator>>> {
    with_ieee_floats(|| {
        Ok(match form {
            Form::LowRank(form) => match &form.magnitude {
                Some(magnitude) => {
                    let change = dora::Change::of_low_rank(form, matrix);
                    let reading = dora::Reading { isa, threads, read };
                    Some(dora::prepare(change, magnitude, GainAxis::Out, matrix, reading)?)
                }
                None => None,
            },
            Form::Tucker(form) => Some(tucker::prepare(form, matrix)),
            Form::Decomposed(form) => {
                let change = match &*form.change {
                    Form::LowRank(inner) => dora::Change::of_low_rank(inner, matrix),
                    inner => match prepare(inner, matrix, isa, threads, read)? {
                        Some(operator) => dora::Change::Operator(operator),
                        // Refused by `check`.
                        None => return Ok(None),
                    },
                };
                let reading = dora::Reading { isa, threads, read };
                Some(dora::prepare(change, &form.magnitude, form.axis, matrix, reading)?)
            }
            Form::Hadamard(form) => Some(hadamard::prepare(form, matrix)),
            Form::Kronecker(form) => Some(kronecker::prepare(form, matrix)),
            Form::Gain(form) => Some(gain::prepare(form, matrix)),
            Form::Rotation(form) => Some(rotation::prepare(form, matrix, threads)?),
            Form::Tiled(form) => Some(tiled::prepare(form, matrix)),
            Form::Proportional(form) => Some(proportional::prepare(form, matrix)),
            Form::Reflections(form) => Some(reflections::prepare(form, matrix)?),
            Form::Butterfly(form) => Some(butterfly::prepare(form, matrix, threads)?),
            Form::Sparse(form) => Some(sparse::prepare(form, matrix)),
            Form::Circulant(kernels) => Some(circulant::prepare(kernels, matrix)),
            Form::Bounded(form) => Some(bounded::prepare(form, matrix)),
            Form::Grid(form) => Some(grid::prepare(form, matrix)),
            Form::Added { tensor, scale } => Some(added::prepare(tensor, *scale, matrix)),
            _ => None,
        })
    })
}
