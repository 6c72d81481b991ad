//! The product of the factors: four rows by one panel.

use super::super::factors::{CHUNK, Factors, GROUPS, LANES, PanelRow};
use super::super::vector::Vector;
use super::super::{ROW_GROUP, UNIT_ROWS};

/// Δ of one unit, before it is finished.
pub(super) type UnitBlock<T> = [[[T; LANES]; GROUPS]; UNIT_ROWS];

/// Units in a group of rows.
const UNITS: usize = ROW_GROUP / UNIT_ROWS;

/// Δ of a group of rows by one panel: small enough to stay in the first-level
/// cache beside a chunk of the right factor.
#[repr(align(64))]
pub(super) struct Block<T>(pub(super) [UnitBlock<T>; UNITS]);

/// Room for one chunk's chains.
#[repr(align(64))]
struct AlignedUnit(UnitBlock<f32>);

impl<T: Copy> Block<T> {
    pub(super) fn splat(value: T) -> Self {
        Self([[[[value; LANES]; GROUPS]; UNIT_ROWS]; UNITS])
    }
}

/// Where a group of rows by one panel lies in the tensor.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) row: usize,
    pub(super) rows: usize,
    pub(super) panel: usize,
}

impl Place {
    /// Four rows of the left factor, ranks `start..end`. Rows the tile does not
    /// have repeat its last one: the lanes are independent and nobody reads
    /// the result.
    #[inline(always)]
    fn left<'a>(
        &self,
        factors: &'a Factors,
        unit: usize,
        start: usize,
        end: usize,
    ) -> [&'a [f32]; UNIT_ROWS] {
        let mut rows: [&[f32]; UNIT_ROWS] = [&[]; UNIT_ROWS];
        for (row, left) in rows.iter_mut().enumerate() {
            let row = (unit * UNIT_ROWS + row).min(self.rows - 1);
            *left = &factors.left_row(self.row + row)[start..end];
        }
        rows
    }

    fn units(&self) -> usize {
        self.rows.div_ceil(UNIT_ROWS).min(UNITS)
    }
}

/// [`Path::F32`](super::super::Path): one chain.
#[inline(always)]
pub(super) fn single<V: Vector>(v: V, factors: &Factors, place: &Place, out: &mut Block<f32>) {
    let right = factors.right_panel(place.panel);
    for unit in 0..place.units() {
        let left = place.left(factors, unit, 0, factors.rank());
        chain(v, left, right, &mut out.0[unit]);
    }
}

/// The sums of a group of rows by one panel on [`Path::F64`](super::super::Path).
pub(super) struct Sums([Block<f64>; 2]);

impl Sums {
    /// The sum S of every element.
    const TOTAL: usize = 0;
    /// The sum so far of one of several segments. A single one is the total.
    const SEGMENT: usize = 1;

    pub(super) fn zero() -> Self {
        Self([Block::splat(0.0), Block::splat(0.0)])
    }

    #[inline(always)]
    pub(super) fn total(&self) -> &Block<f64> {
        &self.0[Self::TOTAL]
    }

    #[inline(always)]
    pub(super) fn total_mut(&mut self) -> &mut Block<f64> {
        &mut self.0[Self::TOTAL]
    }
}

/// [`Path::F64`](super::super::Path): chunk after chunk of one segment after
/// the other, summed in `f64`.
///
/// Every unit of the group takes its turn before the next chunk does, while
/// the chunk of the right factor is still in the first-level cache.
#[inline(always)]
pub(super) fn double<V: Vector>(v: V, factors: &Factors, place: &Place, out: &mut Sums) {
    let right = factors.right_panel(place.panel);
    let mut chunk = AlignedUnit([[[0.0_f32; LANES]; GROUPS]; UNIT_ROWS]);
    let several = factors.segments().len() > 1;
    let so_far = if several { Sums::SEGMENT } else { Sums::TOTAL };
    let mut first = 0;
    for (number, segment) in factors.segments().iter().enumerate() {
        let scale = v.splat_f64(segment.scale);
        let segment_end = first + segment.ranks;
        // Rank 0 has one chunk too, an empty one, whose sum is zero.
        for start in (first..segment_end.max(first + 1)).step_by(CHUNK) {
            let end = segment_end.min(start + CHUNK);
            let to = if end == segment_end { Sums::TOTAL } else { so_far };
            for unit in 0..place.units() {
                let left = place.left(factors, unit, start, end);
                let chunk = &mut chunk.0;
                chain(v, left, &right[start..end], chunk);
                for (row, chains) in chunk.iter().enumerate() {
                    for (group, result) in chains.iter().enumerate() {
                        let mut sum = v.widen(v.load(result));
                        if start > first {
                            sum = v.add_f64(v.load_f64(&out.0[so_far].0[unit][row][group]), sum);
                        }
                        if several && end == segment_end {
                            sum = v.mul_f64(scale, sum);
                            if number > 0 {
                                let total = &out.0[Sums::TOTAL].0[unit][row][group];
                                sum = v.add_f64(v.load_f64(total), sum);
                            }
                        }
                        v.store_f64(sum, &mut out.0[to].0[unit][row][group]);
                    }
                }
            }
        }
        first = segment_end;
    }
}

/// `out = left · right`, every element a chain of fused multiply-adds in
/// order of k, from +0.
#[inline(always)]
fn chain<V: Vector>(v: V, left: [&[f32]; UNIT_ROWS], right: &[PanelRow], out: &mut UnitBlock<f32>) {
    if V::GROUPS_AT_ONCE == GROUPS {
        chain_groups::<V, GROUPS>(v, left, right, out, 0);
    } else {
        for group in 0..GROUPS {
            chain_groups::<V, 1>(v, left, right, out, group);
        }
    }
}

/// The same for `COUNT` groups from `first` on, all accumulators in registers.
#[inline(always)]
fn chain_groups<V: Vector, const COUNT: usize>(
    v: V,
    left: [&[f32]; UNIT_ROWS],
    right: &[PanelRow],
    out: &mut UnitBlock<f32>,
    first: usize,
) {
    // Equal lengths, said once, let the loop run without bounds checks.
    let left = left.map(|row| &row[..right.len()]);
    let mut sums = [[v.splat(0.0); COUNT]; UNIT_ROWS];
    for (k, right) in right.iter().enumerate() {
        let mut columns = [v.splat(0.0); COUNT];
        for (group, columns) in columns.iter_mut().enumerate() {
            *columns = v.load(&right.0[first + group]);
        }
        for row in 0..UNIT_ROWS {
            let left = v.splat(left[row][k]);
            for group in 0..COUNT {
                sums[row][group] = v.mul_add(left, columns[group], sums[row][group]);
            }
        }
    }
    for row in 0..UNIT_ROWS {
        for group in 0..COUNT {
            v.store(sums[row][group], &mut out[row][first + group]);
        }
    }
    // The sums now live in memory and nowhere else. Left alone, the compiler
    // keeps them in registers for their next reader and spills the sums of the
    // next chain, inside its inner loop.
    std::hint::black_box(out);
}
