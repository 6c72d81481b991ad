//! Targets without vector code: everything runs as [`Isa::Scalar`].

use super::stats::{ConvertStats, TileStats};
use super::{FloatType, Isa, Tile};

/// No control register is known here, so there is nothing to save.
#[derive(Clone, Copy)]
pub(crate) struct Control;

pub(crate) const IEEE: Control = Control;

pub(crate) fn read_control() -> Control {
    Control
}

pub(crate) fn write_control(_: Control) {}

pub(crate) fn supports(_: Isa) -> bool {
    false
}

pub(crate) fn merge_tile(_: Isa, _: &Tile<'_>, _: &mut [u8]) -> Option<TileStats> {
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
