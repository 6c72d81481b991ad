//! The loops over a tile.

use super::super::factors::{Factors, GROUPS, PANEL, Path};
use super::super::scalar::{self, Unit};
use super::super::stats::{Tally, TileStats, canonical};
use super::super::vector::Vector;
use super::super::{ROW_GROUP, Rounding, Source, Tile, TileRegion, UNIT_ROWS};
use super::element::Element;
use super::epilogue::{self, Deltas, Double, Rows, Single};
use super::product::{self, Block, Place, Sums};

/// Bytes of a unit of the widest type.
const SCRATCH: usize = UNIT_ROWS * PANEL * 4;

/// [`merge_tile`](super::super::merge_tile) and
/// [`add_tile`](super::super::add_tile) for one instruction set and one pair of
/// types.
#[inline(always)]
pub(crate) fn merge<V: Vector, B: Element, O: Element>(
    v: V,
    tile: &Tile<'_>,
    out: &mut [u8],
) -> TileStats {
    const { assert!(GROUPS.is_multiple_of(V::GROUPS_AT_ONCE)) };
    match tile.source {
        Source::Factors(factors) if factors.path() == Path::F32 => {
            merge_single::<V, B, O>(v, tile, factors, out)
        }
        _ => merge_double::<V, B, O>(v, tile, out),
    }
}

#[inline(always)]
fn merge_single<V: Vector, B: Element, O: Element>(
    v: V,
    tile: &Tile<'_>,
    factors: &Factors,
    out: &mut [u8],
) -> TileStats {
    let mut tally = Tally::ZERO;
    let mut deltas = Block::splat(0.0_f32);
    for band in Bands::of(tile.region) {
        product::single(v, factors, &band.place(tile.region), &mut deltas);
        for (number, deltas) in deltas.0.iter().enumerate().take(band.units()) {
            finish::<V, B, O>(v, tile, &band.unit(tile, number), Single(deltas), out, &mut tally);
        }
    }
    tally.finish((tile.region.rows * tile.region.cols) as u64)
}

/// On [`Path::F64`], and where Δ comes from elsewhere, which is a sum that is
/// already there.
#[inline(always)]
fn merge_double<V: Vector, B: Element, O: Element>(
    v: V,
    tile: &Tile<'_>,
    out: &mut [u8],
) -> TileStats {
    let mut tally = Tally::ZERO;
    let mut sums = Sums::zero();
    let scale = match tile.source {
        Source::Factors(factors) => factors.scale(),
        Source::Given(_) => 1.0,
    };
    for band in Bands::of(tile.region) {
        match tile.source {
            Source::Factors(factors) => {
                product::double(v, factors, &band.place(tile.region), &mut sums);
            }
            Source::Given(delta) => band.gather(tile.region, delta, sums.total_mut()),
        }
        for (number, sums) in sums.total().0.iter().enumerate().take(band.units()) {
            let deltas = Double { sums, scale };
            finish::<V, B, O>(v, tile, &band.unit(tile, number), deltas, out, &mut tally);
        }
    }
    tally.finish((tile.region.rows * tile.region.cols) as u64)
}

/// [`product_tile`](super::super::product_tile) for one instruction set.
#[inline(always)]
pub(crate) fn product<V: Vector>(v: V, factors: &Factors, region: TileRegion, out: &mut [f64]) {
    match factors.path() {
        Path::F32 => {
            let mut deltas = Block::splat(0.0_f32);
            for band in Bands::of(region) {
                product::single(v, factors, &band.place(region), &mut deltas);
                band.scatter(region, &deltas, 1.0, out);
            }
        }
        Path::F64 => {
            let mut sums = Sums::zero();
            for band in Bands::of(region) {
                product::double(v, factors, &band.place(region), &mut sums);
                band.scatter(region, sums.total(), factors.scale(), out);
            }
        }
    }
}

/// A group of rows by one panel, in the coordinates of the tile.
#[derive(Clone, Copy)]
struct Band {
    row: usize,
    rows: usize,
    column: usize,
    columns: usize,
}

impl Band {
    #[inline(always)]
    fn place(&self, region: TileRegion) -> Place {
        let panel = (region.col + self.column) / PANEL;
        Place { row: region.row + self.row, rows: self.rows, panel }
    }

    /// Copies the band out of the Δ of its tile, zeros to the right of it.
    #[inline(always)]
    fn gather(&self, region: TileRegion, delta: &[f64], block: &mut Block<f64>) {
        for (row, to) in block.0.as_flattened_mut().iter_mut().enumerate().take(self.rows) {
            let from = &delta[(self.row + row) * region.cols + self.column..][..self.columns];
            let to = to.as_flattened_mut();
            match from.first_chunk::<PANEL>() {
                Some(from) => to.copy_from_slice(from),
                None => {
                    to[..self.columns].copy_from_slice(from);
                    to[self.columns..].fill(0.0);
                }
            }
        }
    }

    /// Writes `scale · block` to the band's place in the Δ of its tile.
    #[inline(always)]
    fn scatter<T: Copy + Into<f64>>(
        &self,
        region: TileRegion,
        block: &Block<T>,
        scale: f64,
        delta: &mut [f64],
    ) {
        for (row, from) in block.0.as_flattened().iter().enumerate().take(self.rows) {
            let to = &mut delta[(self.row + row) * region.cols + self.column..][..self.columns];
            for (to, from) in to.iter_mut().zip(from.as_flattened()) {
                *to = canonical(scale * (*from).into());
            }
        }
    }

    fn units(&self) -> usize {
        self.rows.div_ceil(UNIT_ROWS)
    }

    /// One of the units, top to bottom, and its first element in the tile.
    #[inline(always)]
    fn unit(&self, tile: &Tile<'_>, number: usize) -> (Unit, usize) {
        let &Tile { cols, region, base_type, out_type, rounding, .. } = tile;
        let row = self.row + number * UNIT_ROWS;
        let index_stride = cols as u64;
        let (tensor_row, tensor_column) = (region.row + row, region.col + self.column);
        let unit = Unit {
            rows: UNIT_ROWS.min(self.row + self.rows - row),
            columns: self.columns,
            base_type,
            out_type,
            stride: region.cols,
            rounding,
            first_index: tensor_row as u64 * index_stride + tensor_column as u64,
            index_stride,
        };
        (unit, row * region.cols + self.column)
    }
}

/// The bands of a tile in the order the contract fixes: panels within groups
/// of rows.
struct Bands {
    rows: usize,
    cols: usize,
    row: usize,
    column: usize,
}

impl Bands {
    fn of(region: TileRegion) -> Self {
        Self { rows: region.rows, cols: region.cols, row: 0, column: 0 }
    }
}

impl Iterator for Bands {
    type Item = Band;

    #[inline(always)]
    fn next(&mut self) -> Option<Band> {
        if self.column >= self.cols {
            self.column = 0;
            self.row += ROW_GROUP;
        }
        if self.row >= self.rows || self.cols == 0 {
            return None;
        }
        let (row, column) = (self.row, self.column);
        self.column += PANEL;
        let rows = ROW_GROUP.min(self.rows - row);
        let columns = PANEL.min(self.cols - column);
        Some(Band { row, rows, column, columns })
    }
}

/// Finishes a unit: fast if it can be, otherwise as the oracle does.
#[inline(always)]
fn finish<V: Vector, B: Element, O: Element>(
    v: V,
    tile: &Tile<'_>,
    &(ref unit, first): &(Unit, usize),
    deltas: impl Deltas,
    out: &mut [u8],
    tally: &mut Tally,
) {
    let base = &tile.base[first * B::TYPE.size()..];
    let out = &mut out[first * O::TYPE.size()..];
    let finished = match unit.rounding {
        Rounding::Stochastic { .. } => None,
        Rounding::Nearest if unit.columns == PANEL => {
            let base = Rows { bytes: base, stride: unit.stride };
            let mut out = Rows { bytes: &mut *out, stride: unit.stride };
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
        None if keep::<B, O>(unit, deltas, base, out) => {}
        None => {
            // The types again, as constants the oracle is compiled for.
            let unit = Unit { base_type: B::TYPE, out_type: O::TYPE, ..*unit };
            let delta = |row, column| deltas.get(row, column);
            scalar::finish_unit(&unit, delta, base, out, tally);
        }
    }
}

/// Copies a unit that no adapter reaches: every Δ zero, nothing to convert and
/// nothing to count. Whole blocks of such units are common where an adapter
/// covers one part of a fused projection.
#[inline(always)]
fn keep<B: Element, O: Element>(
    unit: &Unit,
    deltas: impl Deltas,
    base: &[u8],
    out: &mut [u8],
) -> bool {
    if B::TYPE != O::TYPE || !deltas.are_zero() {
        return false;
    }
    let size = B::TYPE.size();
    for row in 0..unit.rows {
        let bytes = row * unit.stride * size..(row * unit.stride + unit.columns) * size;
        if !B::are_finite(&base[bytes.clone()]) {
            return false;
        }
        out[bytes.clone()].copy_from_slice(&base[bytes]);
    }
    true
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
        &Rows { bytes: &padded_base, stride: PANEL },
        &mut Rows { bytes: &mut padded_out, stride: PANEL },
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
