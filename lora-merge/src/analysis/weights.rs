//! W0 of the parameters that a change belongs to: rows of a base, plain or quantised.
//!
//! A base is paired with itself, so that it is read the way a pair's base is.

use std::ops::Range;
use std::path::Path;

use lora_format::checkpoint::Checkpoint;
use lora_format::model::{Adapter, Form, Layer};
use lora_format::vocabulary;
use ndarray::{Array2, ArrayView2, s};

use crate::error::{Error, PlanProblem, Result};
use crate::kernels::Rows;
use crate::pair::{Delta, Kind, Mapped, Pair, Pairing, Tie};
use crate::resolve::{self, Wanted};
use crate::svd::Matrix;

/// Rows that are read at once.
const ROWS: usize = 64;

/// Opens a base by itself.
///
/// # Errors
/// [`Error::Format`] if it cannot be read, [`Error::Pair`] if it stores a parameter twice.
pub fn open(base: &Path) -> Result<Pairing> {
    Pairing::new(Checkpoint::open(base)?, Checkpoint::open(base)?)
}

/// What the base calls the targets of an adapter's components, in their order; `None` of what it
/// does not have, and why.
///
/// # Errors
/// [`Error::Plan`] if it has none of them.
pub(super) fn names(
    adapter: &Adapter,
    base: &Pairing,
) -> Result<(Vec<Option<String>>, Vec<PlanProblem>)> {
    let components = &adapter.components;
    let wanted: Vec<Wanted<'_>> = components
        .iter()
        .map(|component| Wanted {
            module: &component.target.module,
            parameter: &component.target.parameter,
            optional: false,
        })
        .collect();
    let resolution = resolve::resolve(&wanted, base.base_parameters());
    let names: Vec<Option<String>> = resolution
        .found
        .iter()
        .map(|found| found.map(|index| base.base_parameters().get(index).name.clone()))
        .collect();
    if !components.is_empty() && names.iter().all(Option::is_none) {
        return Err(Error::Plan {
            adapters: vec![adapter.path.clone()],
            base: base.base.path().to_owned(),
            problems: resolution.problems,
        });
    }
    Ok((names, resolution.problems))
}

/// The pair of a parameter by its name; of a tied head, that of its embedding.
pub(super) fn find(pairing: &Pairing, name: &str) -> Option<usize> {
    let by_name = pairing.pairs.binary_search_by(|pair| pair.name.as_str().cmp(name));
    let tied = || {
        let end = vocabulary::is_output_head(name) || vocabulary::is_input_embedding(name);
        pairing.pairs.iter().position(|pair| end && pair.tie == Tie::Both)
    };
    by_name.ok().or_else(tied)
}

/// Whether a matrix is stored as (in, out).
pub(super) fn is_transposed(pair: &Pair) -> bool {
    pair.transposed || pair.kind == Kind::Embedding
}

/// Whether a form says that its matrix is stored as (in, out).
pub(super) fn wants_transposed(form: &Form) -> bool {
    matches!(form, Form::LowRank(form) if form.layer == Layer::Embedding)
}

/// W0 of one parameter as it is stored.
#[derive(Clone, Copy, Debug)]
pub(super) struct Weight<'a>(pub(super) Delta<'a>);

impl<'a> Weight<'a> {
    /// W0 of a parameter.
    pub(super) fn of(mapped: &'a Mapped<'_>, pair: usize) -> Weight<'a> {
        Weight(mapped.delta(pair))
    }

    /// Uᵀ·W0·V (k × k) with U of the stored rows (m × k) and V of the stored columns (n × k).
    ///
    /// # Panics
    /// If they are of other lengths.
    pub(super) fn projected(&self, u: ArrayView2<'_, f64>, v: ArrayView2<'_, f64>) -> Array2<f64> {
        let (rows, cols) = self.0.shape();
        assert_eq!((u.nrows(), v.nrows()), (rows, cols), "vectors of the stored matrix");
        let mut sum = Array2::zeros((u.ncols(), v.ncols()));
        let mut block = vec![0.0; ROWS.min(rows) * cols];
        for first in (0..rows).step_by(ROWS) {
            let count = ROWS.min(rows - first);
            let block = &mut block[..count * cols];
            self.0.read_base(first, block);
            let block = Array2::from_shape_fn((count, cols), |(row, col)| {
                f64::from(block[row * cols + col])
            });
            sum += &u.slice(s![first..first + count, ..]).t().dot(&block.dot(&v));
        }
        self.0.release(0..rows);
        sum
    }
}

impl Matrix for Weight<'_> {
    fn shape(&self) -> (usize, usize) {
        self.0.shape()
    }

    fn stored(&self, rows: Range<usize>) -> Option<Rows<'_>> {
        let (_, (tuned, tuned_type)) = self.0.bytes(rows)?;
        Some(Rows::Stored { tuned, tuned_type, base: None })
    }

    fn read(&self, first: usize, out: &mut [f32]) {
        self.0.read_base(first, out);
    }

    fn release(&self, rows: Range<usize>) {
        self.0.release(rows);
    }
}
