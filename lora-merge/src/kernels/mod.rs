//! The kernels: one tile of a base tensor in, one merged tile out.
//!
//! ```text
//! W′[m,n] = W0[m,n] + Δ[m,n]        Δ[m,n] = Σⱼ sⱼ · Σₖ L[m,k]·R[k,n]
//! ```
//!
//! [`Factors`] holds `L` (rows×rank) and `R` (rank×cols) of one tensor. Their
//! ranks `k` are divided into segments `j`, one for each low-rank term, with a
//! scale `sⱼ` each; as a rule there is one. [`merge_tile`] applies them to a
//! rectangle of `W0`. [`product_tile`] writes Δ itself, and [`add_tile`] applies
//! a Δ that comes from elsewhere. [`convert`] moves a tensor no adapter touches
//! to another storage type. Elements are f32, f16 or bf16, little-endian, at any
//! alignment. Nothing here reads a file, starts a thread or allocates per tile.
//!
//! | file            | owns                                                  |
//! |-----------------|-------------------------------------------------------|
//! | `factors`       | packing of `L` and `R`, choice of path                |
//! | `float`         | storage types, one element at a time                  |
//! | `scalar`        | the oracle: this contract in plain Rust               |
//! | `vector`        | the trait of sixteen lanes                            |
//! | `generic`       | the fast path, written once over that trait           |
//! | `x86_64`, `aarch64` | the trait for AVX2, AVX-512 and NEON              |
//! | `stochastic`    | the random numbers and the choice they make           |
//! | `stats`         | statistics and the order of their sums                |
//! | `environment`   | the floating-point control register                   |
//! | [`mod@sweep`]   | products with blocks of vectors; its own contract     |
//! | `testing`       | checks every instruction set passes                   |
//!
//! # Contract
//!
//! The bytes written depend on the factors, the base bytes, the types and the
//! rounding. They do not depend on the instruction set, on the partition into
//! tiles, on alignment, on threads, or on the floating-point settings of the
//! calling thread. Below, *fma* is a multiply-add with one rounding, every
//! operation rounds to nearest with ties to even, and subnormals are numbers
//! like any other.
//!
//! ## Accumulation
//!
//! The path is chosen once per tensor, from the factors alone.
//!
//! Segments without ranks are left out, unless there is only one segment to
//! begin with.
//!
//! * **[`Path::F32`]** if the rank, of all segments together, is at most 64,
//!   every `sⱼ` is ±2ⁱ with 2⁻¹²⁶ ≤ |sⱼ| ≤ 2¹²⁷, and every `sⱼ·L[m,k]` is exact
//!   in f32. With `L′[m,k] = sⱼ·L[m,k]` for the `j` that `k` belongs to, starting
//!   from `a = +0`, for k = 0, 1, … in order, whatever the segment:
//!   `a ← fma(L′[m,k], R[k,n], a)` in f32. Then `Δ = a`, and `v = W0 + Δ` as
//!   the exact sum of two real numbers.
//! * **[`Path::F64`]** otherwise. The ranks of every segment are cut, in order,
//!   into chunks of 64, the last one perhaps shorter; no chunk holds ranks of
//!   two segments. Every chunk is an f32 chain as above, over `L` as given. The
//!   results of a segment's chunks are widened and added in order in f64,
//!   beginning with the first: `Sⱼ`. (Without ranks, `Sⱼ = +0`.)
//!   * One segment: with `s` and `S` its `s₀` and `S₀`, `Δ = s·S`, rounded to
//!     f64, and `v = fma(s, S, W0)` in f64.
//!   * Several: the products `sⱼ·Sⱼ`, each rounded to f64, are added in order
//!     of j in f64, beginning with the first: `S`. Then `Δ = S`, and
//!     `v = W0 + S` in f64, which is the rule for one segment with `s = 1`.
//!
//! ## Elements
//!
//! 1. If `Δ = ±0`, the output is `W0` recoded: the same bits if the types are
//!    the same (−0 and NaN payloads survive), otherwise `W0` rounded to the
//!    output type.
//! 2. Otherwise, if `v` is NaN, the output is the canonical NaN: 0x7FC00000,
//!    0x7E00 or 0x7FC0 for f32, f16 or bf16.
//! 3. Otherwise the output is `v` rounded **once** to the output type. Values
//!    beyond its range become ±∞.
//!
//! Rounding a NaN in rule 1, or in [`convert`], gives the canonical NaN too.
//!
//! With [`Rounding::Stochastic`], rule 3 changes for finite `v`. Here `v` is
//! an f64: `W0 + Δ` rounded on [`Path::F32`], as above on [`Path::F64`]. If
//! the output type holds `v`, that is the output; if |v| exceeds its largest
//! finite value, rule 3 stands. Otherwise, with `lo < v < hi` its neighbours
//! there, the output is `hi` if `u < (v − lo)/(hi − lo)`, else `lo`; a zero
//! keeps the sign of `v`. For an element at row m and column n of the tensor,
//!
//! ```text
//! mix(z):  z ← (z ⊕ z≫30)·0xBF58476D1CE4E5B9
//!          z ← (z ⊕ z≫27)·0x94D049BB133111EB
//!          z ⊕ z≫31
//! index  = m·cols + n
//! u      = (mix(mix(key) + (index + 1)·0x9E3779B97F4A7C15) ≫ 11) · 2⁻⁵³
//! ```
//!
//! modulo 2⁶⁴, with ⊕ exclusive or and ≫ a logical shift.
//!
//! ## Statistics
//!
//! [`TileStats`] depends on the partition into tiles, since sums round, and on
//! nothing else. For each element let `w` be `W0` recoded to the output type,
//! `d = out − w` in f32, and δ = Δ rounded to f32.
//!
//! * Counted: `Δ ≠ 0`; bits of `out` and `w` differ; `out` infinite while `W0`
//!   and δ are finite; `out` not finite.
//! * Summed: d·δ, d² and δ², skipping elements whose d or δ is not finite.
//!
//! Rows of the tile form groups of 32, columns panels of 48, both counted from
//! the tile's first. A unit is up to four rows of a group by one panel. Units
//! go by group, then panel, then row. Inside a unit, column c of the panel
//! belongs to lane c mod 16; each lane sums in f32 from +0, rows in order and
//! in each row c in order, by `sum ← fma(d, δ, sum)` and likewise. After each
//! unit its lanes are widened and added to sixteen f64 lanes, which at the
//! end of the tile are added in order of lane, from +0. A NaN sum becomes the
//! positive quiet NaN.
//!
//! ## Δ on its own
//!
//! [`product_tile`] writes Δ as an f64: on [`Path::F32`] the chain's result,
//! widened, on [`Path::F64`] as above. A NaN is written as the positive quiet
//! NaN without payload.
//!
//! [`add_tile`] takes Δ as it is given, any f64, and `v = W0 + Δ` in f64.
//! Elements and statistics follow the rules above.
//!
//! The one after the other is [`merge_tile`], bytes and statistics, wherever
//! `v` is the same:
//!
//! * On [`Path::F32`], `v` is rounded to f64 before it is rounded to the output
//!   type. That makes no difference to [`Rounding::Stochastic`], nor to an
//!   output of f32, of whose sums f64 holds enough (53 ≥ 2·24 + 2 bits). To
//!   nearest and to 16 bits it does where the f64 is a tie and the exact sum is
//!   not, which takes a W0 and a Δ whose magnitudes are 2²⁸ apart or more.
//! * On [`Path::F64`] with one segment, `Δ = s·S` has been rounded, which the
//!   fused `v` avoids. They agree where that product is exact, as it is for a
//!   scale of ±2ⁱ short of underflow.
//! * On [`Path::F64`] with several segments they always agree.
//!
//! # Accuracy
//!
//! Let u be the unit roundoff of the output type, v₃₂ = 2⁻²⁴, and
//! γ = n·v₃₂ / (1 − n·v₃₂), where n is the length of the longest chain: the rank
//! on [`Path::F32`], the ranks of the largest segment but at most 64 on
//! [`Path::F64`]. With `Δ*` the exact Σⱼ sⱼ·Lⱼ·Rⱼ, rounding to nearest,
//!
//! ```text
//! |Δ − Δ*|         ≤ γ·T        where T = Σⱼ |sⱼ|·|Lⱼ|·|Rⱼ|
//! |W′ − (W0 + Δ*)| ≤ u·|W0 + Δ*| + (1 + u)·γ·T
//! ```
//!
//! up to overflow, underflow and the f64 roundings of [`Path::F64`] and of
//! [`add_tile`]: with c chunks in all segments together, at most c roundings of
//! every term and one of `v`, each 2⁻²⁹ of one in f32.
//!
//! Proof. A chain of n steps rounds n times, and the term that enters at step k
//! lives through the n − k roundings from there on. So the chain's result is
//! Σ L·R·(1 + θ) with |θ| ≤ γ for every term, and its error at most γ·|L|·|R|.
//! On [`Path::F32`] there is one chain and the scales are in it exactly. On
//! [`Path::F64`] scaling the chains' results and adding them scales and adds
//! the bounds, which gives γ·T. A term of a segment of c′ chunks is rounded in
//! c′ − 1 sums of chunks, in one product, and in one sum for every further
//! segment, of which there are at most c − c′: that is c. Finally `v` is off by
//! at most γ·T, and rounding it adds at most
//! u·|v| ≤ u·(|W0 + Δ*| + γ·T). ∎

mod change;
mod environment;
mod factors;
mod float;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod generic;
mod isa;
mod scalar;
mod stats;
mod stochastic;
pub mod sweep;
#[cfg(test)]
mod testing;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod vector;

#[cfg(target_arch = "aarch64")]
#[path = "aarch64/mod.rs"]
mod native;
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
#[path = "other.rs"]
mod native;
#[cfg(target_arch = "x86_64")]
#[path = "x86_64/mod.rs"]
mod native;

pub use change::{Grid, RUN, RunChange, change};
pub use environment::with_ieee_floats;
pub use factors::{Factors, LANES, PANEL, Path, Segment};
pub use float::FloatType;
pub use isa::{Isa, UnknownIsa};
pub use stats::{ConvertStats, TileStats};
pub(crate) use stochastic::uniform;
pub use sweep::{
    BlockRow, NonFinite, Rows, SweepScratch, apply, apply_transposed, difference, energy,
    non_finite, residual_energy, sweep,
};

/// Rows of a unit: the rows whose statistics are summed in `f32`, and the rows
/// the product computes at once.
pub(crate) const UNIT_ROWS: usize = 4;

/// Rows that share a panel before the next panel is visited. Fixed by the
/// contract because the order of units decides the last bits of the sums.
pub(crate) const ROW_GROUP: usize = 32;

/// How `W0 + Δ` becomes an element of the output type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Rounding {
    /// To nearest, ties to even.
    #[default]
    Nearest,
    /// Up or down at random, in proportion to the distance, so that the
    /// expected value is exact.
    Stochastic {
        /// Chooses the random numbers; together with the element's place in
        /// the tensor it determines them completely.
        key: u64,
    },
}

/// A rectangle of a tensor: `rows` from `row` on and `cols` from `col` on.
///
/// `col` is a multiple of [`PANEL`]; `cols` is one too unless the rectangle
/// reaches the tensor's last column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TileRegion {
    /// First row.
    pub row: usize,
    /// Number of rows.
    pub rows: usize,
    /// First column.
    pub col: usize,
    /// Number of columns.
    pub cols: usize,
}

impl TileRegion {
    /// Whole rows.
    #[must_use]
    pub fn full_width(factors: &Factors, row: usize, rows: usize) -> Self {
        Self { row, rows, col: 0, cols: factors.cols() }
    }

    fn fits(&self, rows: usize, cols: usize) -> bool {
        let rows_fit = self.row.checked_add(self.rows).is_some_and(|end| end <= rows);
        let end = self.col.checked_add(self.cols);
        let cols_fit = end.is_some_and(|end| end <= cols);
        let aligned = self.col.is_multiple_of(PANEL)
            && (self.cols.is_multiple_of(PANEL) || end == Some(cols));
        rows_fit && cols_fit && aligned
    }

    fn elements(&self) -> Option<usize> {
        self.rows.checked_mul(self.cols)
    }
}

/// Where the Δ of a tile comes from.
#[derive(Clone, Copy)]
pub(crate) enum Source<'a> {
    /// It is the product of these.
    Factors(&'a Factors),
    /// It was computed elsewhere: as many elements as the region has, in its
    /// order.
    Given(&'a [f64]),
}

/// Everything a kernel needs to know about one call, checked.
#[derive(Clone, Copy)]
pub(crate) struct Tile<'a> {
    source: Source<'a>,
    /// Columns of the whole tensor.
    cols: usize,
    region: TileRegion,
    base: &'a [u8],
    base_type: FloatType,
    out_type: FloatType,
    rounding: Rounding,
}

impl Tile<'_> {
    /// Merges the tile, once the buffers are known to fit it.
    fn merge(&self, isa: Isa, out: &mut [u8]) -> TileStats {
        let &Self { region, base, base_type, out_type, .. } = self;
        let bytes = |float: FloatType| region.elements()?.checked_mul(float.size());
        assert_eq!(Some(base.len()), bytes(base_type), "base is not rows×cols of its type");
        assert_eq!(Some(out.len()), bytes(out_type), "out is not rows×cols of its type");
        with_ieee_floats(|| match native::merge_tile(isa, self, out) {
            Some(stats) => stats,
            None => scalar::merge_tile(self, out),
        })
    }
}

/// Merges one tile: `out = base + Δ` over `region`, with Δ the product of the
/// factors.
///
/// `base` and `out` are `region.rows × region.cols` little-endian elements,
/// row-major without gaps, at any alignment. The bytes written and the
/// statistics are the same for every `isa`; one this CPU lacks runs as
/// [`Isa::Scalar`].
///
/// # Panics
///
/// If the region does not fit the tensor, or a buffer does not fit the region.
#[allow(clippy::too_many_arguments, reason = "two typed buffers and what relates them")]
pub fn merge_tile(
    isa: Isa,
    factors: &Factors,
    region: TileRegion,
    base: &[u8],
    base_type: FloatType,
    out: &mut [u8],
    out_type: FloatType,
    rounding: Rounding,
) -> TileStats {
    let (rows, cols) = (factors.rows(), factors.cols());
    assert!(region.fits(rows, cols), "{region:?} is not a tile of this tensor");
    let source = Source::Factors(factors);
    Tile { source, cols, region, base, base_type, out_type, rounding }.merge(isa, out)
}

/// Writes the Δ that [`merge_tile`] would add over `region`: `out` becomes its
/// `region.rows × region.cols` elements, row-major without gaps.
///
/// The bits written are the same for every `isa`.
///
/// # Panics
///
/// If the region does not fit the tensor, or `out` does not fit the region.
pub fn product_tile(isa: Isa, factors: &Factors, region: TileRegion, out: &mut [f64]) {
    let (rows, cols) = (factors.rows(), factors.cols());
    assert!(region.fits(rows, cols), "{region:?} is not a tile of this tensor");
    assert_eq!(Some(out.len()), region.elements(), "out is not rows×cols");
    with_ieee_floats(|| match native::product_tile(isa, factors, region, out) {
        Some(()) => {}
        None => scalar::product_tile(factors, region, out),
    });
}

/// Merges one tile with a Δ that was computed elsewhere: `out = base + delta`
/// over `region`, a tile of a tensor of `cols` columns.
///
/// `delta` has `region.rows × region.cols` elements, row-major without gaps, of
/// any value. Otherwise as [`merge_tile`].
///
/// # Panics
///
/// If the region does not fit the columns, or a buffer does not fit the region.
#[allow(clippy::too_many_arguments, reason = "three buffers and what relates them")]
pub fn add_tile(
    isa: Isa,
    cols: usize,
    region: TileRegion,
    delta: &[f64],
    base: &[u8],
    base_type: FloatType,
    out: &mut [u8],
    out_type: FloatType,
    rounding: Rounding,
) -> TileStats {
    // As many rows as can be counted element by element.
    let rows = usize::MAX / cols.max(1);
    assert!(region.fits(rows, cols), "{region:?} is not a tile of this tensor");
    assert_eq!(Some(delta.len()), region.elements(), "delta is not rows×cols");
    let source = Source::Given(delta);
    Tile { source, cols, region, base, base_type, out_type, rounding }.merge(isa, out)
}

/// Converts a tensor no adapter touches: to nearest, ties to even, NaN
/// canonical. Between equal types it copies bytes.
///
/// `base` and `out` hold the same number of little-endian elements, at any
/// alignment. As with [`merge_tile`], `isa` decides about speed only.
///
/// # Panics
///
/// If the buffers do not hold the same whole number of elements.
pub fn convert(
    isa: Isa,
    base: &[u8],
    base_type: FloatType,
    out: &mut [u8],
    out_type: FloatType,
) -> ConvertStats {
    let elements = base.len() / base_type.size();
    assert_eq!(base.len(), elements * base_type.size(), "base is not whole elements");
    assert_eq!(out.len(), elements * out_type.size(), "out is not as many elements as base");
    if base_type == out_type {
        out.copy_from_slice(base);
        return ConvertStats { elements: elements as u64, ..ConvertStats::default() };
    }
    with_ieee_floats(|| match native::convert(isa, base, base_type, out, out_type) {
        Some(stats) => stats,
        None => scalar::convert(base, base_type, out, out_type),
    })
}
