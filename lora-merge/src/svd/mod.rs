//! Singular value decompositions of matrices that are read row by row, as far as they are asked for.
//!
//! | file       | owns                                                                   |
//! |------------|------------------------------------------------------------------------|
//! | `krylov`   | the leading part: randomised block Krylov iteration, and its certificate |
//! | `gram`     | all of it: eigenvalues of the Gram matrix in f64                        |
//! | `block`    | blocks of vectors, and the inner products in between                     |
//! | `residual` | ‖A − B·A'‖_F of factors as they will be stored                          |
//! | `dense`    | decompositions of what fits in memory, behind one trait                 |
//!
//! A matrix is never copied: [`Matrix`] hands out its rows, as they lie in mapped files if it can,
//! and [`crate::kernels::sweep()`] works on those.
//!
//! **Which when.** A truncated decomposition takes about 2.25·r products with A and as many with
//! Aᵀ; the Gram matrix takes as many as A has columns. Beyond a rank of a quarter of the short side,
//! and for short sides up to 256, the Gram matrix is cheaper, and exact.
//!
//! **Determinism.** Rows are cut into parts by the shape alone and sums are made in their order, so
//! the result does not depend on the number of threads. It does depend on the processor, in the
//! last bits, because the dense library's kernels do.

mod block;
pub mod dense;
mod gram;
mod krylov;
mod residual;
#[cfg(test)]
mod testing;

use std::ops::Range;

use ndarray::Array2;

pub use residual::residual;

use crate::kernels::{Isa, Rows};
use crate::spectrum::{Reached, Spectrum};
use dense::{Dense, NotConverged};

/// A matrix that is read by rows, from any thread.
pub trait Matrix: Sync {
    /// Rows and columns.
    fn shape(&self) -> (usize, usize);

    /// Whole rows in place, if they lie somewhere.
    fn stored(&self, rows: Range<usize>) -> Option<Rows<'_>>;

    /// Whole rows from `first` on as f32, as many as `out` has room for.
    fn read(&self, first: usize, out: &mut [f32]);

    /// Says that rows will not be needed for a while.
    fn release(&self, _rows: Range<usize>) {}
}

impl Matrix for crate::pair::Delta<'_> {
    fn shape(&self) -> (usize, usize) {
        crate::pair::Delta::shape(self)
    }

    fn stored(&self, rows: Range<usize>) -> Option<Rows<'_>> {
        crate::pair::Delta::stored(self, rows)
    }

    fn read(&self, first: usize, out: &mut [f32]) {
        crate::pair::Delta::read(self, first, out);
    }

    fn release(&self, rows: Range<usize>) {
        crate::pair::Delta::release(self, rows);
    }
}

impl Matrix for Array2<f32> {
    fn shape(&self) -> (usize, usize) {
        self.dim()
    }

    fn stored(&self, rows: Range<usize>) -> Option<Rows<'_>> {
        let cols = self.ncols();
        self.as_slice().map(|elements| Rows::Plain(&elements[rows.start * cols..rows.end * cols]))
    }

    fn read(&self, first: usize, out: &mut [f32]) {
        let elements = self.iter().skip(first * self.ncols());
        out.iter_mut().zip(elements).for_each(|(out, element)| *out = *element);
    }
}

/// How a decomposition is made.
#[derive(Clone, Copy, Debug)]
pub struct SvdOptions {
    /// The instruction set of the kernels.
    pub isa: Isa,
    /// A truncated decomposition goes on until its Frobenius error is estimated to be within this
    /// share of the optimum.
    pub accuracy: f64,
    /// Always by the Gram matrix.
    pub exact: bool,
    /// Of the random start.
    pub seed: u64,
    /// The library for what fits in memory.
    pub dense: &'static dyn Dense,
}

impl Default for SvdOptions {
    fn default() -> Self {
        SvdOptions {
            isa: Isa::detect(),
            accuracy: 0.01,
            exact: false,
            seed: 0x6C6F_7261,
            dense: dense::dense(),
        }
    }
}

/// How much of a decomposition is wanted.
#[derive(Clone, Copy)]
pub enum Goal<'a> {
    /// This many components, or fewer where all others are zero but for rounding.
    Rank(usize),
    /// All singular values, and no vectors.
    Values,
    /// As many components as this says when it is shown what is known so far; it may be shown more
    /// and more. `vectors` are formed for it only if it looks at them.
    Until {
        /// Says which rank is wanted.
        wanted: &'a (dyn Fn(&Decomposition) -> Reached + Sync),
        /// Whether it looks at the vectors.
        vectors: bool,
        /// No more components than this, whatever it says.
        maximum: usize,
    },
}

/// `A ≈ U·diag(σ)·Vᵀ`.
#[derive(Clone, Debug)]
pub struct Decomposition {
    /// The singular values that are known, at least as many as there are vectors. Those of a
    /// truncated decomposition are Ritz values: none is larger than the true one.
    pub spectrum: Spectrum,
    /// U, m × k, orthonormal columns; those that belong to σ = 0 are zero.
    pub left: Array2<f32>,
    /// Vᵀ, k × n, orthonormal rows.
    pub right: Array2<f32>,
    /// For every rank from 0 to k: a bound from below on the energy that the best approximation of
    /// that rank leaves over, ‖A − A_r‖²_F. Of an exact decomposition it is that energy. Of a
    /// truncated one it rests on an estimate: see [`Decomposition::exact`].
    pub optimum: Vec<f64>,
    /// Whether all singular values were computed. Otherwise `optimum` assumes that no direction
    /// outside the Krylov space is stretched more than the ones last found in it.
    pub exact: bool,
    /// How many vectors A was multiplied with, and Aᵀ.
    pub products: usize,
}

impl Decomposition {
    /// The number of components that have vectors.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.right.nrows()
    }

    /// By what share the Frobenius error `residual` of a rank-r approximation may exceed the best
    /// one's: `None` where that cannot be told, since the best one's may be zero.
    #[must_use]
    pub fn excess(&self, rank: usize, residual: f64) -> Option<f64> {
        let optimum = self.optimum.get(rank)?.sqrt();
        (optimum > 0.0).then(|| (residual / optimum - 1.0).max(0.0))
    }
}

/// Decomposes a matrix whose energy ‖A‖²_F is known and finite, on the threads of the current pool.
///
/// # Errors
/// [`NotConverged`].
pub fn decompose(
    matrix: &dyn Matrix,
    energy: f64,
    goal: Goal<'_>,
    options: &SvdOptions,
) -> Result<Decomposition, NotConverged> {
    let (rows, cols) = matrix.shape();
    let short = rows.min(cols);
    if energy == 0.0 || short == 0 {
        return Ok(Decomposition {
            spectrum: Spectrum { rows, cols, energy: 0.0, values: vec![0.0; short] },
            left: Array2::zeros((rows, 0)),
            right: Array2::zeros((0, cols)),
            optimum: vec![0.0],
            exact: true,
            products: 0,
        });
    }
    let wide = match goal {
        Goal::Rank(rank) => rank.saturating_mul(4) > short,
        Goal::Values => true,
        Goal::Until { .. } => false,
    };
    if !(options.exact || wide || short <= SMALL)
        && let Some(found) = krylov::decompose(matrix, energy, goal, options)?
    {
        return Ok(found);
    }
    gram::decompose(matrix, energy, goal, options)
}

/// A bound on the bytes that a decomposition takes from which up to `rank` components are asked for:
/// of the iteration, and of the Gram matrix, which may be made after that was given up.
#[must_use]
pub fn memory_bound(rows: usize, cols: usize, rank: usize, threads: usize) -> u64 {
    krylov::memory_bound(rows, cols).max(gram::memory_bound(rows, cols, rank, threads))
}

/// Short sides up to which the Gram matrix costs less than an iteration.
const SMALL: usize = 256;

/// Rows that one task reads at a time, as f32 where they do not lie in place.
fn with_rows<R>(
    matrix: &dyn Matrix,
    rows: Range<usize>,
    room: &mut Vec<f32>,
    work: impl FnOnce(Rows<'_>) -> R,
) -> R {
    match matrix.stored(rows.clone()) {
        Some(stored) => work(stored),
        None => {
            room.resize(rows.len() * matrix.shape().1, 0.0);
            matrix.read(rows.start, room);
            work(Rows::Plain(room))
        }
    }
}
