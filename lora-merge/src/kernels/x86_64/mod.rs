//! x86-64: two vector widths and the floating-point control register.

mod avx2;
mod avx512;
mod control;

use super::change::{Run, RunChange};
use super::generic::sweep::{Steps, difference as take_difference, run};
use super::stats::{ConvertStats, TileStats};
use super::sweep::{Pass, Rows, SweepScratch};
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

/// A pass of [`sweep`](mod@super::sweep) if this CPU runs `isa`, otherwise the pass back.
pub(crate) fn sweep<'a, const G: usize>(
    isa: Isa,
    pass: Pass<'a, G>,
    scratch: &mut SweepScratch,
) -> Option<Pass<'a, G>> {
    match isa {
        Isa::Avx2 => match Avx2::new() {
            Some(v) => run(v, pass, scratch),
            None => return Some(pass),
        },
        Isa::Avx512 => match Avx512::new() {
            Some(v) => run(v, pass, scratch),
            None => return Some(pass),
        },
        Isa::Scalar | Isa::Neon => return Some(pass),
    }
    None
}

/// [`difference`](super::difference) if this CPU runs `isa`.
pub(crate) fn difference(isa: Isa, rows: Rows<'_>, out: &mut [f32]) -> Option<()> {
    match isa {
        Isa::Avx2 => take_difference(Avx2::new()?, rows, out),
        Isa::Avx512 => take_difference(Avx512::new()?, rows, out),
        Isa::Scalar | Isa::Neon => return None,
    }
    Some(())
}

/// [`energy`](super::energy) if this CPU runs `isa`.
pub(crate) fn energy(isa: Isa, a: &[f32]) -> Option<f64> {
    match isa {
        Isa::Avx2 => Some(Avx2::new()?.energy(a)),
        Isa::Avx512 => Some(Avx512::new()?.energy(a)),
        Isa::Scalar | Isa::Neon => None,
    }
}

/// [`change`](super::change::change) if this CPU runs `isa`.
pub(crate) fn change(isa: Isa, run: Run<'_>, difference: &mut [f32]) -> Option<RunChange> {
    match isa {
        Isa::Avx2 => Some(Avx2::new()?.change(run, difference)),
        Isa::Avx512 => Some(Avx512::new()?.change(run, difference)),
        Isa::Scalar | Isa::Neon => None,
    }
}

/// [`residual_energy`](super::residual_energy) if this CPU runs `isa`.
pub(crate) fn residual_energy(isa: Isa, a: &[f32], product: &[f64]) -> Option<f64> {
    match isa {
        Isa::Avx2 => Some(Avx2::new()?.residual_energy(a, product)),
        Isa::Avx512 => Some(Avx512::new()?.residual_energy(a, product)),
        Isa::Scalar | Isa::Neon => None,
    }
}
