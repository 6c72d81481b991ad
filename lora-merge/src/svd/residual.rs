//! How far factors are from the matrix that they stand for: the one number that cannot flatter.

use ndarray::ArrayView2;
use rayon::iter::{IntoParallelIterator, ParallelIterator};

use super::{Matrix, with_rows};
use crate::kernels::{self, Factors, Isa, Rows, TileRegion, with_ieee_floats};

/// Rows whose residual one task sums.
const SPAN: usize = 64;

/// Relative residuals below this are computed again from products in f64: those of the merge, whose
/// chains are f32, carry about 1e-7 of ‖A‖ themselves.
const FINE: f64 = 1e-3;

/// ‖A − B·A'‖²_F of factors as they are stored (`left` m × r, `right` r × n), over all elements of A
/// and in f64. `energy` is ‖A‖²_F.
#[must_use]
pub fn residual(
    matrix: &dyn Matrix,
    energy: f64,
    left: ArrayView2<'_, f32>,
    right: ArrayView2<'_, f32>,
    isa: Isa,
) -> f64 {
    let (rows, cols) = matrix.shape();
    let rank = left.ncols();
    let packed: Vec<f32> = left.iter().copied().collect();
    let factors = Factors::pack(rows, cols, rank, packed, 1.0, |k, columns, row| {
        row.iter_mut().zip(columns).for_each(|(out, col)| *out = right[[k, col]]);
    });
    let coarse = sum(matrix, isa, |first, product| {
        let region = TileRegion::full_width(&factors, first, product.len() / cols);
        kernels::product_tile(isa, &factors, region, product);
    });
    if coarse > FINE * FINE * energy {
        return coarse;
    }
    let b = faer::Mat::from_fn(rank, rows, |k, row| f64::from(left[[row, k]]));
    let a = faer::Mat::from_fn(cols, rank, |col, k| f64::from(right[[k, col]]));
    sum(matrix, isa, |first, product| {
        let count = product.len() / cols;
        // Row-major m × n is column-major n × m.
        let out = faer::MatMut::from_column_major_slice_mut(product, cols, count);
        let b = b.as_ref().subcols(first, count);
        faer::linalg::matmul::matmul(out, faer::Accum::Replace, a.as_ref(), b, 1.0, faer::Par::Seq);
    })
}

/// Σ (A − P)² with P made tile by tile: `fill(first, product)` makes whole rows from `first` on.
fn sum(matrix: &dyn Matrix, isa: Isa, fill: impl Fn(usize, &mut [f64]) + Sync) -> f64 {
    let (rows, cols) = matrix.shape();
    let parts: Vec<f64> = (0..rows.div_ceil(SPAN))
        .into_par_iter()
        .map(|part| {
            with_ieee_floats(|| {
                let end = ((part + 1) * SPAN).min(rows);
                let (mut room, mut sum) = (Vec::new(), 0.0);
                let (mut delta, mut product) = (Vec::new(), Vec::new());
                for start in (part * SPAN..end).step_by(8) {
                    let span = start..(start + 8).min(end);
                    product.resize(span.len() * cols, 0.0);
                    fill(start, &mut product);
                    delta.resize(span.len() * cols, 0.0);
                    with_rows(matrix, span, &mut room, |found| match found {
                        Rows::Plain(elements) => delta.copy_from_slice(elements),
                        Rows::Stored { tuned, tuned_type, base } => {
                            kernels::difference(isa, tuned, tuned_type, base, &mut delta);
                        }
                    });
                    sum += kernels::residual_energy(isa, &delta, &product);
                }
                sum
            })
        })
        .collect();
    parts.iter().sum()
}
