//! From Δ to stored bytes and statistics, for one unit at full speed.

use super::super::UNIT_ROWS;
use super::super::factors::{GROUPS, LANES, PANEL};
use super::super::scalar::Delta;
use super::super::stats::LaneSums;
use super::super::vector::Vector;
use super::element::Element;
use super::product::UnitBlock;

/// Δ of a whole unit, on either path.
pub(super) trait Deltas: Copy {
    /// Sixteen lanes of `base + Δ` and Δ, each rounded once to `f32`.
    fn add<V: Vector>(
        self,
        v: V,
        base: V::Floats,
        row: usize,
        group: usize,
    ) -> (V::Floats, V::Floats);

    /// Whether every Δ of the unit is zero.
    fn are_zero(self) -> bool;

    /// Δ of one element, for [`scalar`](super::super::scalar).
    fn get(self, row: usize, column: usize) -> Delta;
}

/// Δ on [`Path::F32`](super::super::Path).
#[derive(Clone, Copy)]
pub(super) struct Single<'a>(pub(super) &'a UnitBlock<f32>);

impl Deltas for Single<'_> {
    #[inline(always)]
    fn add<V: Vector>(
        self,
        v: V,
        base: V::Floats,
        row: usize,
        group: usize,
    ) -> (V::Floats, V::Floats) {
        let delta = v.load(&self.0[row][group]);
        (v.add(base, delta), delta)
    }

    #[inline(always)]
    fn are_zero(self) -> bool {
        self.0.as_flattened().as_flattened().iter().all(|delta| *delta == 0.0)
    }

    #[inline(always)]
    fn get(self, row: usize, column: usize) -> Delta {
        Delta::Single(self.0[row][column / LANES][column % LANES])
    }
}

/// Δ on [`Path::F64`](super::super::Path), and Δ that is given: with scale 1.
#[derive(Clone, Copy)]
pub(super) struct Double<'a> {
    pub(super) sums: &'a UnitBlock<f64>,
    pub(super) scale: f64,
}

impl Deltas for Double<'_> {
    #[inline(always)]
    fn add<V: Vector>(
        self,
        v: V,
        base: V::Floats,
        row: usize,
        group: usize,
    ) -> (V::Floats, V::Floats) {
        let sum = v.load_f64(&self.sums[row][group]);
        let scale = v.splat_f64(self.scale);
        let total = v.mul_add_f64(scale, sum, v.widen(base));
        (v.narrow(total), v.narrow(v.mul_f64(scale, sum)))
    }

    #[inline(always)]
    fn are_zero(self) -> bool {
        self.sums.as_flattened().as_flattened().iter().all(|sum| self.scale * sum == 0.0)
    }

    #[inline(always)]
    fn get(self, row: usize, column: usize) -> Delta {
        Delta::Double { sum: self.sums[row][column / LANES][column % LANES], scale: self.scale }
    }
}

/// The bytes of a unit: whole panel rows, `stride` elements apart.
pub(super) struct Rows<Bytes> {
    pub(super) bytes: Bytes,
    pub(super) stride: usize,
}

/// How far ahead the rows are fetched into the first-level cache.
const AHEAD: usize = 2 * PANEL;

impl Rows<&[u8]> {
    #[inline(always)]
    fn row<E: Element>(&self, row: usize) -> &[u8] {
        let size = E::TYPE.size();
        &self.bytes[row * self.stride * size..][..PANEL * size]
    }

    /// Fetches the row's part two panels on.
    #[inline(always)]
    fn expect<V: Vector, E: Element>(&self, v: V, row: usize) {
        let first = (row * self.stride + AHEAD) * E::TYPE.size();
        for line in (0..PANEL * E::TYPE.size()).step_by(64) {
            v.will_read(self.bytes, first + line);
        }
    }
}

impl Rows<&mut [u8]> {
    #[inline(always)]
    fn row<E: Element>(&mut self, row: usize) -> &mut [u8] {
        let size = E::TYPE.size();
        &mut self.bytes[row * self.stride * size..][..PANEL * size]
    }

    #[inline(always)]
    fn expect<V: Vector, E: Element>(&mut self, v: V, row: usize) {
        let first = (row * self.stride + AHEAD) * E::TYPE.size();
        for line in (0..PANEL * E::TYPE.size()).step_by(64) {
            v.will_write(self.bytes, first + line);
        }
    }
}

/// What the fast path found in a unit it vouches for.
pub(super) struct Finished {
    pub(super) sums: LaneSums,
    pub(super) changed: u32,
}

/// Writes a unit, or gives up: `None` means that some Δ is zero or that
/// something is not finite, and that the bytes written do not count.
///
/// `PARTIAL` units have fewer than [`PANEL`] columns. Right of them `base` holds
/// zeros, and so does Δ unless a factor is not finite, which ends in `None`.
/// Zeros leave no trace in the statistics.
#[inline(always)]
pub(super) fn finish<V: Vector, B: Element, O: Element, const PARTIAL: bool>(
    v: V,
    deltas: impl Deltas,
    base: &Rows<&[u8]>,
    out: &mut Rows<&mut [u8]>,
    rows: usize,
    columns: usize,
) -> Option<Finished> {
    let mut dot = v.splat(0.0);
    let mut realised_sq = v.splat(0.0);
    let mut wanted_sq = v.splat(0.0);
    let mut sound = v.beyond(0);
    let mut unchanged = 0;
    for row in 0..rows.min(UNIT_ROWS) {
        if !PARTIAL {
            // Rows are too far apart, and visited too briefly, for the CPU to
            // foresee the panel after next.
            base.expect::<V, B>(v, row);
            out.expect::<V, O>(v, row);
        }
        let base = base.row::<B>(row);
        let out = out.row::<O>(row);
        for group in 0..GROUPS {
            let base = B::load(v, base, group);
            let (mut total, wanted) = deltas.add(v, base, row, group);

            let mut nonzero = v.is_nonzero(wanted);
            let mut ties = O::ties(v, total);
            if PARTIAL {
                let padding = v.beyond(columns.saturating_sub(group * LANES));
                nonzero = v.or(nonzero, padding);
                ties = v.and(ties, v.not(padding));
            }
            sound = v.and(sound, nonzero);
            if B::TYPE != O::TYPE {
                sound = v.and(sound, O::keeps_nans(v, total));
            }

            if v.any(ties) {
                total = settle::<V, O>(v, base, |lane| deltas.get(row, group * LANES + lane));
            }
            let (merged, packed) = O::round_untied(v, total);
            O::store(v, packed, out, group);

            let unmerged = if B::TYPE == O::TYPE { base } else { O::round(v, base).0 };
            let realised = v.sub(merged, unmerged);
            dot = v.mul_add(realised, wanted, dot);
            realised_sq = v.mul_add(realised, realised, realised_sq);
            wanted_sq = v.mul_add(wanted, wanted, wanted_sq);
            unchanged += v.count(v.are_equal(v.bits_of(merged), v.bits_of(unmerged)));
        }
    }
    // A square is infinite or NaN if anything was, and a sum of squares stays
    // so: x − x tells, without a test for every element.
    let trace = v.add(v.sub(realised_sq, realised_sq), v.sub(wanted_sq, wanted_sq));
    if v.any(v.not(v.and(sound, v.is_number(trace)))) {
        return None;
    }
    let mut sums = LaneSums::ZERO;
    v.store(dot, &mut sums.dot);
    v.store(realised_sq, &mut sums.realised_sq);
    v.store(wanted_sq, &mut sums.wanted_sq);
    let lanes = (rows.min(UNIT_ROWS) * PANEL) as u32;
    Some(Finished { sums, changed: lanes - unchanged })
}

/// The rounded values of sixteen lanes among which some may be ties, as `f32`:
/// rounding them again changes nothing.
#[cold]
#[inline(always)]
fn settle<V: Vector, O: Element>(
    v: V,
    base: V::Floats,
    delta: impl Fn(usize) -> Delta,
) -> V::Floats {
    let mut lanes = [0.0; LANES];
    v.store(base, &mut lanes);
    for (lane, value) in lanes.iter_mut().enumerate() {
        *value = O::TYPE.decode(O::TYPE.encode(delta(lane).added_to_once(*value)));
    }
    v.load(&lanes)
}
