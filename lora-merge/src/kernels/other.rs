//! Targets without vector code: everything runs as [`Isa::Scalar`].

use super::change::{Run, RunChange};
use super::stats::{ConvertStats, TileStats};
use super::sweep::{Pass, Rows, SweepScratch};
use super::{Factors, FloatType, Isa, Tile, TileRegion};

/// No control register is known here, so there is nothing to save.
pub(crate) type Control = u32;

pub(crate) const IEEE: Control = 0;

#[cfg(test)]
pub(crate) const FLUSHING: Control = 0;

pub(crate) fn read_control() -> Control {
    IEEE
}

pub(crate) fn write_control(_: Control) {}

pub(crate) fn supports(_: Isa) -> bool {
    false
}

pub(crate) fn merge_tile(_: Isa, _: &Tile<'_>, _: &mut [u8]) -> Option<TileStats> {
    None
}

pub(crate) fn product_tile(_: Isa, _: &Factors, _: TileRegion, _: &mut [f64]) -> Option<()> {
    None
}

pub(crate) fn convert(
    _: Isa,
    _: &[u8],
    _: FloatType,
    _: &mut [u8],
    _: FloatType,
) -> Option<ConvertStats> {
    None
}

pub(crate) fn sweep<'a, const G: usize>(
    _: Isa,
    pass: Pass<'a, G>,
    _: &mut SweepScratch,
) -> Option<Pass<'a, G>> {
    Some(pass)
}

pub(crate) fn difference(_: Isa, _: Rows<'_>, _: &mut [f32]) -> Option<()> {
    None
}

pub(crate) fn energy(_: Isa, _: &[f32]) -> Option<f64> {
    None
}

pub(crate) fn change(_: Isa, _: Run<'_>, _: &mut [f32]) -> Option<RunChange> {
    None
}

pub(crate) fn residual_energy(_: Isa, _: &[f32], _: &[f64]) -> Option<f64> {
    None
}
