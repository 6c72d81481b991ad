//! AArch64: Advanced SIMD and the floating-point control register.

mod control;
mod neon;

use super::stats::{ConvertStats, TileStats};
use super::{Factors, FloatType, Isa, Tile, TileRegion};
#[cfg(test)]
pub(crate) use control::FLUSHING;
pub(crate) use control::{Control, IEEE, read_control, write_control};
use neon::Neon;

/// Whether this CPU runs `isa`.
pub(crate) fn supports(isa: Isa) -> bool {
    isa == Isa::Neon && Neon::new().is_some()
}

/// [`merge_tile`](super::merge_tile) and [`add_tile`](super::add_tile) if this CPU runs `isa`.
pub(crate) fn merge_tile(isa: Isa, tile: &Tile<'_>, out: &mut [u8]) -> Option<TileStats> {
    match isa {
        Isa::Neon => Some(Neon::new()?.merge_tile(tile, out)),
        Isa::Scalar | Isa::Avx2 | Isa::Avx512 => None,
    }
}

/// [`product_tile`](super::product_tile) if this CPU runs `isa`.
pub(crate) fn product_tile(
    isa: Isa,
    factors: &Factors,
    region: TileRegion,
    out: &mut [f64],
) -> Option<()> {
    match isa {
        Isa::Neon => Neon::new()?.product_tile(factors, region, out),
        Isa::Scalar | Isa::Avx2 | Isa::Avx512 => return None,
    }
    Some(())
}

/// [`convert`](super::convert) between different types if this CPU runs `isa`.
pub(crate) fn convert(
    isa: Isa,
    base: &[u8],
    base_type: FloatType,
    out: &mut [u8],
    out_type: FloatType,
) -> Option<ConvertStats> {
    match isa {
        Isa::Neon => Some(Neon::new()?.convert(base, base_type, out, out_type)),
        Isa::Scalar | Isa::Avx2 | Isa::Avx512 => None,
    }
}
