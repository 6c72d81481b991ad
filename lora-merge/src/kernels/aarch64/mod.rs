//! AArch64: Advanced SIMD and the floating-point control register.

mod control;
mod neon;

use super::change::{Run, RunChange};
use super::generic::sweep::{Steps, difference as take_difference, run};
use super::stats::{ConvertStats, TileStats};
use super::sweep::{Pass, Rows, SweepScratch};
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

/// A pass of [`sweep`](mod@super::sweep) if this CPU runs `isa`, otherwise the pass back.
pub(crate) fn sweep<'a, const G: usize>(
    isa: Isa,
    pass: Pass<'a, G>,
    scratch: &mut SweepScratch,
) -> Option<Pass<'a, G>> {
    match isa {
        Isa::Neon => match Neon::new() {
            Some(v) => run(v, pass, scratch),
            None => return Some(pass),
        },
        Isa::Scalar | Isa::Avx2 | Isa::Avx512 => return Some(pass),
    }
    None
}

/// [`difference`](super::difference) if this CPU runs `isa`.
pub(crate) fn difference(isa: Isa, rows: Rows<'_>, out: &mut [f32]) -> Option<()> {
    match isa {
        Isa::Neon => take_difference(Neon::new()?, rows, out),
        Isa::Scalar | Isa::Avx2 | Isa::Avx512 => return None,
    }
    Some(())
}

/// [`energy`](super::energy) if this CPU runs `isa`.
pub(crate) fn energy(isa: Isa, a: &[f32]) -> Option<f64> {
    match isa {
        Isa::Neon => Some(Neon::new()?.energy(a)),
        Isa::Scalar | Isa::Avx2 | Isa::Avx512 => None,
    }
}

/// [`change`](super::change::change) if this CPU runs `isa`.
pub(crate) fn change(isa: Isa, run: Run<'_>, difference: &mut [f32]) -> Option<RunChange> {
    match isa {
        Isa::Neon => Some(Neon::new()?.change(run, difference)),
        Isa::Scalar | Isa::Avx2 | Isa::Avx512 => None,
    }
}

/// [`residual_energy`](super::residual_energy) if this CPU runs `isa`.
pub(crate) fn residual_energy(isa: Isa, a: &[f32], product: &[f64]) -> Option<f64> {
    match isa {
        Isa::Neon => Some(Neon::new()?.residual_energy(a, product)),
        Isa::Scalar | Isa::Avx2 | Isa::Avx512 => None,
    }
}
