//! Sweeps: what a block Krylov iteration needs of a matrix it reads row by row.
//!
//! ```text
//! W = A·V        Z ← Z + Aᵀ·W        A: rows×cols, V and Z: cols×16G, W: rows×16G
//! ```
//!
//! `A` is as a rule the difference of two stored tensors, far too large to hold
//! in `f32`. [`sweep`] makes both products in one pass over a run of its rows,
//! which is most of the cost of a step of the iteration; [`apply`] and
//! [`apply_transposed`] make one of them. [`difference`] hands out `A` itself,
//! [`energy`] and [`residual_energy`] sum its squares and those of what an
//! approximation leaves over, and [`non_finite`] finds what no singular value
//! decomposition accepts. Nothing here reads a file or starts a thread, and
//! nothing is refused: infinities and NaN go through as IEEE 754 says.
//!
//! # Contract
//!
//! Results depend on the values of `A`, `V`, `W` and `Z` alone, not on the
//! instruction set, on alignment, on threads, or on the floating-point settings
//! of the calling thread. They do not depend on how the rows are divided into
//! calls either, as long as the calls go by row and share one `Z`. As in
//! [`kernels`](super), *fma* is a multiply-add with one rounding, every
//! operation rounds to nearest with ties to even, and subnormals are numbers
//! like any other.
//!
//! ## Elements of `A`
//!
//! `A[i,k] = tuned[i,k] − base[i,k]`, both widened to f32, which is exact, and
//! subtracted with one rounding. Without a base, `A[i,k] = tuned[i,k]` widened.
//!
//! ## Products
//!
//! * The columns are cut into panels of 128, the last one perhaps shorter. In
//!   each panel, from `p = +0`, for its k in order: `p ← fma(A[i,k], V[k,j], p)`
//!   in f32. `W[i,j]` is the sum in f32 of the results of the panels in order,
//!   from +0.
//! * `Z[k,j] ← fma(A[i,k], W[i,j], Z[k,j])` in f32, for the rows i in order.
//!
//! A caller who divides rows among threads gives each part its own `Z`, cuts at
//! rows that do not depend on the number of threads, and adds the parts in
//! order.
//!
//! ## Sums of squares
//!
//! Element n of the slice belongs to lane n mod 32. Each lane sums in f64 from
//! +0, elements in order, by `s ← fma(x, x, s)`; then the lanes are added in
//! order, from +0. Here x is `a`, widened, or `a − p` rounded to f64, with p the
//! element of the product. Squares of f32 are exact in f64 and cannot overflow,
//! so [`energy`] is finite if and only if every element is.
//!
//! ## NaN
//!
//! Every NaN written or returned is the positive quiet one without payload.
//! (Which of several NaN a fused multiply-add passes on is otherwise up to the
//! compiler.)
//!
//! # Accuracy
//!
//! With v = 2⁻²⁴ and γ(n) = n·v / (1 − n·v), up to overflow and underflow,
//!
//! ```text
//! |W[i,j] − Σₖ A[i,k]·V[k,j]|  ≤ γ(min(cols, 128) + ⌈cols/128⌉) · Σₖ |A[i,k]|·|V[k,j]|
//! |Z[k,j] − Σᵢ A[i,k]·W[i,j]|  ≤ γ(rows) · Σᵢ |A[i,k]|·|W[i,j]|
//! ```
//!
//! with Z from zero and `W` as written. A term of a panel is rounded once in
//! every step of its chain from the one that it enters, and once in every sum
//! of panels after that.

pub(crate) mod scalar;
#[cfg(test)]
mod testing;

use super::factors::LANES;
use super::{FloatType, Isa, native, with_ieee_floats};

/// Columns whose products form one chain of fused multiply-adds.
pub(crate) const COLUMN_PANEL: usize = 128;

/// Lanes of a sum of squares.
pub(crate) const SQUARE_LANES: usize = 2 * LANES;

/// One row of a block of 16·G vectors: element k of each of them. G is 1 to 4.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C, align(64))]
pub struct BlockRow<const G: usize>(pub [[f32; LANES]; G]);

impl<const G: usize> BlockRow<G> {
    /// All zero.
    pub const ZERO: Self = Self([[0.0; LANES]; G]);
}

impl<const G: usize> Default for BlockRow<G> {
    fn default() -> Self {
        Self::ZERO
    }
}

/// Whole rows of a matrix, row-major without gaps.
#[derive(Clone, Copy, Debug)]
pub enum Rows<'a> {
    /// As they are.
    Plain(&'a [f32]),
    /// As they lie in files: little-endian elements at any alignment.
    Stored {
        /// The elements, or what `base` is subtracted from.
        tuned: &'a [u8],
        /// Their type.
        tuned_type: FloatType,
        /// What is subtracted, and its type.
        base: Option<(&'a [u8], FloatType)>,
    },
}

impl Rows<'_> {
    /// How many elements.
    ///
    /// # Panics
    ///
    /// If a buffer does not hold whole elements, or not as many as the other.
    fn elements(&self) -> usize {
        match *self {
            Self::Plain(elements) => elements.len(),
            Self::Stored { tuned, tuned_type, base } => {
                let count = tuned.len() / tuned_type.size();
                assert_eq!(tuned.len(), count * tuned_type.size(), "tuned is not whole elements");
                if let Some((base, base_type)) = base {
                    let size = base_type.size();
                    assert_eq!(base.len(), count * size, "base is not as many elements as tuned");
                }
                count
            }
        }
    }
}

/// Sixteen elements on a cache line of their own.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct Line(pub(crate) [f32; LANES]);

/// Room for some rows in `f32`, which a thread keeps from call to call.
///
/// It grows to what the widest matrix needs: [`SweepScratch::bytes`].
#[derive(Debug, Default)]
pub struct SweepScratch {
    lines: Vec<Line>,
}

impl SweepScratch {
    /// The most rows that are held at once.
    pub(crate) const ROWS: usize = 32;

    /// Empty.
    #[must_use]
    pub const fn new() -> Self {
        Self { lines: Vec::new() }
    }

    /// The most bytes it will hold for matrices of `cols` columns.
    #[must_use]
    pub const fn bytes(cols: usize) -> usize {
        cols.div_ceil(LANES).saturating_mul(Self::ROWS * size_of::<Line>())
    }

    /// How many rows to hold for blocks of 16·G vectors: few, to leave room in
    /// the second-level cache, unless `V` and `Z` do not fit it anyway and
    /// should be read for more rows at once.
    #[allow(dead_code, reason = "the oracle needs no room")]
    pub(crate) fn rows_for<const G: usize>(cols: usize) -> usize {
        const ROOM: usize = 3 << 19;
        let blocks = cols.saturating_mul(2 * size_of::<BlockRow<G>>());
        if blocks <= ROOM { Self::ROWS / 2 } else { Self::ROWS }
    }

    /// `count` lines that hold anything.
    #[allow(dead_code, reason = "the oracle needs no room")]
    pub(crate) fn lines(&mut self, count: usize) -> &mut [Line] {
        if self.lines.len() < count {
            self.lines.resize(count, Line([0.0; LANES]));
        }
        &mut self.lines[..count]
    }
}

/// Where the `W` of a pass comes from.
pub(crate) enum Left<'a, const G: usize> {
    /// It is `A·V` and goes here.
    Product(&'a [BlockRow<G>], &'a mut [BlockRow<G>]),
    /// It is given.
    Given(&'a [BlockRow<G>]),
}

impl<const G: usize> Left<'_, G> {
    /// The number of rows.
    pub(crate) fn rows(&self) -> usize {
        match self {
            Self::Product(_, w) => w.len(),
            Self::Given(w) => w.len(),
        }
    }
}

/// One pass over some rows, checked.
pub(crate) struct Pass<'a, const G: usize> {
    pub(crate) rows: Rows<'a>,
    pub(crate) cols: usize,
    pub(crate) left: Left<'a, G>,
    pub(crate) z: Option<&'a mut [BlockRow<G>]>,
}

impl<const G: usize> Pass<'_, G> {
    fn run(self, isa: Isa, scratch: &mut SweepScratch) {
        const { assert!(1 <= G && G <= 4, "a block has 16 to 64 vectors") };
        let elements = self.left.rows().checked_mul(self.cols);
        assert_eq!(Some(self.rows.elements()), elements, "the rows are not w.len()×cols");
        if let Left::Product(v, _) = &self.left {
            assert_eq!(v.len(), self.cols, "v does not have cols rows");
        }
        if let Some(z) = &self.z {
            assert_eq!(z.len(), self.cols, "z does not have cols rows");
        }
        with_ieee_floats(|| {
            if let Some(pass) = native::sweep(isa, self, scratch) {
                scalar::run(pass);
            }
        });
    }
}

/// `w = A·v` and `z += Aᵀ·w` for some rows of a matrix of `cols` columns.
///
/// `w` has one row for each of them; `v` and `z` have `cols` rows. The bits
/// written are the same for every `isa`; one this CPU lacks runs as
/// [`Isa::Scalar`].
///
/// # Panics
///
/// If a buffer does not have the length its shape says.
pub fn sweep<const G: usize>(
    isa: Isa,
    rows: Rows<'_>,
    cols: usize,
    v: &[BlockRow<G>],
    w: &mut [BlockRow<G>],
    z: &mut [BlockRow<G>],
    scratch: &mut SweepScratch,
) {
    Pass { rows, cols, left: Left::Product(v, w), z: Some(z) }.run(isa, scratch);
}

/// `w = A·v`, the first half of a [`sweep`].
///
/// # Panics
///
/// If a buffer does not have the length its shape says.
pub fn apply<const G: usize>(
    isa: Isa,
    rows: Rows<'_>,
    cols: usize,
    v: &[BlockRow<G>],
    w: &mut [BlockRow<G>],
    scratch: &mut SweepScratch,
) {
    Pass { rows, cols, left: Left::Product(v, w), z: None }.run(isa, scratch);
}

/// `z += Aᵀ·w`, the second half of a [`sweep`] with a `w` that is given.
///
/// # Panics
///
/// If a buffer does not have the length its shape says.
pub fn apply_transposed<const G: usize>(
    isa: Isa,
    rows: Rows<'_>,
    cols: usize,
    w: &[BlockRow<G>],
    z: &mut [BlockRow<G>],
    scratch: &mut SweepScratch,
) {
    Pass { rows, cols, left: Left::Given(w), z: Some(z) }.run(isa, scratch);
}

/// The elements of `A`: `out = tuned − base`, or `tuned` where there is no base.
///
/// The buffers hold equally many little-endian elements at any alignment.
///
/// # Panics
///
/// If they do not.
pub fn difference(
    isa: Isa,
    tuned: &[u8],
    tuned_type: FloatType,
    base: Option<(&[u8], FloatType)>,
    out: &mut [f32],
) {
    let rows = Rows::Stored { tuned, tuned_type, base };
    assert_eq!(out.len(), rows.elements(), "out is not as many elements as tuned");
    with_ieee_floats(|| match native::difference(isa, rows, out) {
        Some(()) => {}
        None => scalar::difference(rows, out),
    });
}

/// Σ a², summed in f64.
///
/// It depends on where the elements are cut into slices, since sums round, and
/// is finite if and only if all of them are.
#[must_use]
pub fn energy(isa: Isa, a: &[f32]) -> f64 {
    with_ieee_floats(|| native::energy(isa, a).unwrap_or_else(|| scalar::energy(a)))
}

/// Σ (a − p)², summed in f64, over elements `a` of a matrix and `product` of
/// what approximates it.
///
/// # Panics
///
/// If one has more elements than the other.
#[must_use]
pub fn residual_energy(isa: Isa, a: &[f32], product: &[f64]) -> f64 {
    assert_eq!(a.len(), product.len(), "a and product are of different lengths");
    with_ieee_floats(|| match native::residual_energy(isa, a, product) {
        Some(energy) => energy,
        None => scalar::residual_energy(a, product),
    })
}

/// Elements that are infinite or NaN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NonFinite {
    /// How many, at least one.
    pub count: usize,
    /// Index of the first.
    pub first: usize,
}

/// The infinite and NaN elements of `a`, if there are any.
///
/// [`energy`] tells whether to ask.
#[must_use]
pub fn non_finite(a: &[f32]) -> Option<NonFinite> {
    let first = a.iter().position(|element| !element.is_finite())?;
    let count = a[first..].iter().filter(|element| !element.is_finite()).count();
    Some(NonFinite { count, first })
}
