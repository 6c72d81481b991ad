//! The loops over a tile.

use super::super::factors::{GROUPS, PANEL, Path};
use super::super::scalar::{self, Unit};
use super::super::stats::{Tally, TileStats};
use super::super::vector::Vector;
use super::super::{ROW_GROUP, Rounding, Tile, UNIT_ROWS};
use super::element::Element;
use super::epilogue::{self, Deltas, Double, Rows, Single};
use super::product::{self, Block, Place};

/// Bytes of a unit of the widest type.
const SCRATCH: usize = UNIT_ROWS * PANEL * 4;

/// [`merge_tile`](super::super::merge_tile) for one instruction set and one
/// pair of types.
#[inline(always)]
pub(crate) fn merge<V: Vector, B: Element, O: Element>(
    v: V,
    tile: &Tile<'_>,
    out: &mut [u8],
) -> TileStats {
    const { assert!(GROUPS.is_multiple_of(V::GROUPS_AT_ONCE)) };
    let &Tile { factors, region, base, .. } = tile;
    let mut tally = Tally::ZERO;
    let mut single = Block::splat(0.0_f32);
    match factors.path() {
        Path::F32 => {
            for (unit, place, first) in Units::of(tile) {
                product::single(v, factors, &place, &mut single);
                if unit.columns < PANEL {
                    single.pad(unit.columns, 0.0);
                }
                let base = &base[first * B::TYPE.size()..];
                let out = &mut out[first * O::TYPE.size()..];
                finish::<V, B, O>(v, &unit, Single(&single), base, out, &mut tally);
            }
        }
        Path::F64 => {
            let mut double = Block::splat(0.0_f64);
            for (unit, place, first) in Units::of(tile) {
                product::double(v, factors, &place, &mut single, &mut double);
                if unit.columns < PANEL {
                    double.pad(unit.columns, 0.0);
                }
                let deltas = Double { sums: &double, scale: factors.scale() };
                let base = &base[first * B::TYPE.size()..];
                let out = &mut out[first * O::TYPE.size()..];
                finish::<V, B, O>(v, &unit, deltas, base, out, &mut tally);
            }
        }
    }
    tally.finish((region.rows * region.cols) as u64)
}

/// The units of a tile in the order the contract fixes: groups of rows, then
/// panels, then units.
struct Units<'a> {
    tile: &'a Tile<'a>,
    group: usize,
    column: usize,
    row: usize,
}

impl<'a> Units<'a> {
    fn of(tile: &'a Tile<'a>) -> Self {
        Self { tile, group: 0, column: 0, row: 0 }
    }
}

impl Iterator for Units<'_> {
    /// The unit, its place in the tensor, and its first element in the tile.
    type Item = (Unit, Place, usize);

    #[inline(always)]
    fn next(&mut self) -> Option<Self::Item> {
        let &Tile { factors, region, base_type, out_type, rounding, .. } = self.tile;
        let mut group_end = region.rows.min(self.group + ROW_GROUP);
        if self.row >= group_end {
            self.column += PANEL;
            self.row = self.group;
        }
        if self.column >= region.cols {
            self.group += ROW_GROUP;
            self.column = 0;
            self.row = self.group;
            group_end = region.rows.min(self.group + ROW_GROUP);
        }
        if self.row >= region.rows || region.cols == 0 {
            return None;
        }
        let (row, column) = (self.row, self.column);
        self.row += UNIT_ROWS;
        let (tensor_row, tensor_column) = (region.row + row, region.col + column);
        let index_stride = factors.cols() as u64;
        let unit = Unit {
            rows: UNIT_ROWS.min(group_end - row),
            columns: PANEL.min(region.cols - column),
            base_type,
            out_type,
            stride: region.cols,
            rounding,
            first_index: tensor_row as u64 * index_stride + tensor_column as u64,
            index_stride,
        };
        let place = Place { row: tensor_row, rows: unit.rows, panel: tensor_column / PANEL };
        Some((unit, place, row * region.cols + column))
    }
}

/// Finishes a unit: fast if it can be, otherwise as the oracle does.
#[inline(always)]
fn finish<V: Vector, B: Element, O: Element>(
    v: V,
    unit: &Unit,
    deltas: impl Deltas,
    base: &[u8],
    out: &mut [u8],
    tally: &mut Tally,
) {
    let finished = match unit.rounding {
        Rounding::Stochastic { .. } => None,
        Rounding::Nearest if unit.columns == PANEL => {
            let base = Rows {
                bytes: base,
                stride: unit.stride,
            };
            let mut out = Rows {
                bytes: &mut *out,
                stride: unit.stride,
            };
            epilogue::finish::<V, B, O, false>(v, deltas, &base, &mut out, unit.rows, PANEL)
        }
        Rounding::Nearest => finish_partial::<V, B, O>(v, unit, deltas, base, out),
    };
    match finished {
        Some(finished) => {
            tally.add_unit(&finished.sums);
            tally.nonzero_delta += (unit.rows * unit.columns) as u64;
            tally.changed += u64::from(finished.changed);
        }
        None => scalar::finish_unit(
            unit,
            |row, column| deltas.get(row, column),
            base,
            out,
            tally,
        ),
    }
}

/// A unit narrower than a panel, by way of two padded copies.
#[inline(always)]
fn finish_partial<V: Vector, B: Element, O: Element>(
    v: V,
    unit: &Unit,
    deltas: impl Deltas,
    base: &[u8],
    out: &mut [u8],
) -> Option<epilogue::Finished> {
    let (base_size, out_size) = (B::TYPE.size(), O::TYPE.size());
    let mut padded_base = [0; SCRATCH];
    let mut padded_out = [0; SCRATCH];
    for row in 0..unit.rows {
        let bytes = unit.columns * base_size;
        padded_base[row * PANEL * base_size..][..bytes]
            .copy_from_slice(&base[row * unit.stride * base_size..][..bytes]);
    }
    let finished = epilogue::finish::<V, B, O, true>(
        v,
        deltas,
        &Rows {
            bytes: &padded_base,
            stride: PANEL,
        },
        &mut Rows {
            bytes: &mut padded_out,
            stride: PANEL,
        },
        unit.rows,
        unit.columns,
    )?;
    for row in 0..unit.rows {
        let bytes = unit.columns * out_size;
        out[row * unit.stride * out_size..][..bytes]
            .copy_from_slice(&padded_out[row * PANEL * out_size..][..bytes]);
    }
    Some(finished)
}
