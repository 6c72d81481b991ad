//! Kernels.

mod environment;
mod factors;
mod float;
mod generic;
mod isa;
mod scalar;
mod stats;
mod stochastic;
#[cfg(test)]
mod testing;
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

pub use environment::with_ieee_floats;
pub use factors::{Factors, LANES, PANEL, Path};
pub use float::FloatType;
pub use isa::{Isa, UnknownIsa};
pub use stats::{ConvertStats, TileStats};

/// Rows of a unit: the rows whose statistics are summed in `f32`, and the rows
/// the product computes at once.
pub(crate) const UNIT_ROWS: usize = 4;

/// Rows that share a panel before the next panel is visited. Fixed by the
/// contract because the order of units decides the last bits of the sums.
pub(crate) const ROW_GROUP: usize = 64;

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
        Self {
            row,
            rows,
            col: 0,
            cols: factors.cols(),
        }
    }

    fn fits(&self, factors: &Factors) -> bool {
        let rows_fit = self
            .row
            .checked_add(self.rows)
            .is_some_and(|end| end <= factors.rows());
        let end = self.col.checked_add(self.cols);
        let cols_fit = end.is_some_and(|end| end <= factors.cols());
        let aligned = self.col.is_multiple_of(PANEL)
            && (self.cols.is_multiple_of(PANEL) || end == Some(factors.cols()));
        rows_fit && cols_fit && aligned
    }
}

/// Everything a kernel needs to know about one call, checked.
#[derive(Clone, Copy)]
pub(crate) struct Tile<'a> {
    factors: &'a Factors,
    region: TileRegion,
    base: &'a [u8],
    base_type: FloatType,
    out_type: FloatType,
    rounding: Rounding,
}

/// Merges one tile: `out = base + scale·left·right` over `region`.
///
/// `base` and `out` are `region.rows × region.cols` little-endian elements,
/// row-major without gaps, at any alignment. The bytes written and the
/// statistics are the same for every `isa`; one this CPU lacks runs as
/// [`Isa::Scalar`].
///
/// # Panics
///
/// If the region does not fit the tensor, or a buffer does not fit the region.
#[allow(
    clippy::too_many_arguments,
    reason = "two typed buffers and what relates them"
)]
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
    assert!(
        region.fits(factors),
        "{region:?} is not a tile of this tensor"
    );
    let bytes = |float: FloatType| {
        region
            .rows
            .checked_mul(region.cols)?
            .checked_mul(float.size())
    };
    assert_eq!(
        Some(base.len()),
        bytes(base_type),
        "base is not rows×cols of its type"
    );
    assert_eq!(
        Some(out.len()),
        bytes(out_type),
        "out is not rows×cols of its type"
    );
    let tile = Tile {
        factors,
        region,
        base,
        base_type,
        out_type,
        rounding,
    };
    with_ieee_floats(|| match native::merge_tile(isa, &tile, out) {
        Some(stats) => stats,
        None => scalar::merge_tile(&tile, out),
    })
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
    assert_eq!(
        base.len(),
        elements * base_type.size(),
        "base is not whole elements"
    );
    assert_eq!(
        out.len(),
        elements * out_type.size(),
        "out is not as many elements as base"
    );
    if base_type == out_type {
        out.copy_from_slice(base);
        return ConvertStats {
            elements: elements as u64,
            ..ConvertStats::default()
        };
    }
    with_ieee_floats(
        || match native::convert(isa, base, base_type, out, out_type) {
            Some(stats) => stats,
            None => scalar::convert(base, base_type, out, out_type),
        },
    )
}
