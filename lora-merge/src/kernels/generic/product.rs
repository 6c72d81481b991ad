//! The product of the factors: four rows by one panel.

use super::super::UNIT_ROWS;
use super::super::factors::{CHUNK, Factors, GROUPS, LANES, PANEL, PanelRow};
use super::super::vector::Vector;

/// A unit's worth of intermediate results, in the first-level cache.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct Block<T>(pub(super) [[[T; LANES]; GROUPS]; UNIT_ROWS]);

impl<T: Copy> Block<T> {
    pub(super) fn splat(value: T) -> Self {
        Self([[[value; LANES]; GROUPS]; UNIT_ROWS])
    }

    /// Overwrites everything right of the first `columns` columns.
    pub(super) fn pad(&mut self, columns: usize, value: T) {
        for row in &mut self.0 {
            row.as_flattened_mut()[columns.min(PANEL)..].fill(value);
        }
    }
}

/// Where a unit lies in the tensor.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) row: usize,
    pub(super) rows: usize,
    pub(super) panel: usize,
}

/// Four rows of the left factor. Rows the unit does not have repeat its last
/// one: the lanes are independent and nobody reads the result.
#[inline(always)]
fn left_rows<'a>(factors: &'a Factors, place: &Place) -> [&'a [f32]; UNIT_ROWS] {
    std::array::from_fn(|row| factors.left_row(place.row + row.min(place.rows - 1)))
}

/// [`Path::F32`](super::super::Path): one chain.
#[inline(always)]
pub(super) fn single<V: Vector>(v: V, factors: &Factors, place: &Place, out: &mut Block<f32>) {
    chain(
        v,
        left_rows(factors, place),
        factors.right_panel(place.panel),
        out,
    );
}

/// [`Path::F64`](super::super::Path): chunk after chunk, summed in `f64`.
/// `chunk` is room for one of them.
#[inline(always)]
pub(super) fn double<V: Vector>(
    v: V,
    factors: &Factors,
    place: &Place,
    chunk: &mut Block<f32>,
    out: &mut Block<f64>,
) {
    let left = left_rows(factors, place);
    let right = factors.right_panel(place.panel);
    // Also right for rank 0, whose sum is zero.
    let first = factors.rank().min(CHUNK);
    chain(v, left.map(|row| &row[..first]), &right[..first], chunk);
    for row in 0..UNIT_ROWS {
        for group in 0..GROUPS {
            let term = v.widen(v.load(&chunk.0[row][group]));
            v.store_f64(term, &mut out.0[row][group]);
        }
    }
    for start in (CHUNK..factors.rank()).step_by(CHUNK) {
        let end = factors.rank().min(start + CHUNK);
        chain(v, left.map(|row| &row[start..end]), &right[start..end], chunk);
        for row in 0..UNIT_ROWS {
            for group in 0..GROUPS {
                let sum = v.load_f64(&out.0[row][group]);
                let term = v.widen(v.load(&chunk.0[row][group]));
                v.store_f64(v.add_f64(sum, term), &mut out.0[row][group]);
            }
        }
    }
}

/// `out = left · right`, every element a chain of fused multiply-adds in
/// order of k, from +0.
#[inline(always)]
fn chain<V: Vector>(v: V, left: [&[f32]; UNIT_ROWS], right: &[PanelRow], out: &mut Block<f32>) {
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
    out: &mut Block<f32>,
    first: usize,
) {
    // Equal lengths, said once, let the loop run without bounds checks.
    let left = left.map(|row| &row[..right.len()]);
    let mut sums = [[v.splat(0.0); COUNT]; UNIT_ROWS];
    for (k, right) in right.iter().enumerate() {
        let mut columns = [v.splat(0.0); COUNT];
        for group in 0..COUNT {
            columns[group] = v.load(&right.0[first + group]);
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
            v.store(sums[row][group], &mut out.0[row][first + group]);
        }
    }
}
