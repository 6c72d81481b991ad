//! x86-64: two vector widths and the floating-point control register.

mod avx2;
mod avx512;
mod control;

use super::stats::{ConvertStats, TileStats};
use super::{Factors, FloatType, Isa, Tile, TileRegion};
use avx2::Avx2;
use avx512::Avx512;
#[cfg(test)]
pub(crate) use control::FLUSHING;
pub(crate) use control::{Control, IEEE, read_control, write_control};

/// Whether this CPU runs `isa`.
pub(crate) fn supports(isa: Isa) -> bool {
    match isa {
        Isa::Avx2 => Avx2::new().is_some(),
        Isa::Avx512 => Avx512::new().is_some(),
        Isa::Scalar | Isa::Neon => false,
    }
}

/// [`merge_tile`](super::merge_tile) and [`add_tile`](super::add_tile) if this CPU runs `isa`.
pub(crate) fn merge_tile(isa: Isa, tile: &Tile<'_>, out: &mut [u8]) -> Option<TileStats> {
    match isa {
        Isa::Avx2 => Some(Avx2::new()?.merge_tile(tile, out)),
        Isa::Avx512 => Some(Avx512::new()?.merge_tile(tile, out)),
        Isa::Scalar | Isa::Neon => None,
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
        Isa::Avx2 => Avx2::new()?.product_tile(factors, region, out),
        Isa::Avx512 => Avx512::new()?.product_tile(factors, region, out),
        Isa::Scalar | Isa::Neon => return None,
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
        Isa::Avx2 => Some(Avx2::new()?.convert(base, base_type, out, out_type)),
        Isa::Avx512 => Some(Avx512::new()?.convert(base, base_type, out, out_type)),
        Isa::Scalar | Isa::Neon => None,
    }
}
