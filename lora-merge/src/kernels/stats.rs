//! What a merge or a conversion did to a tile, and the fixed order in which
//! the sums are formed.

use super::factors::LANES;

/// What merging a tile did, element by element.
///
/// With `w` the base value rounded to the output type, `d = out − w` is the
/// change that was realised and Δ the change that was wanted. The three sums
/// skip elements whose `d` or Δ is not finite.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TileStats {
    /// Elements written.
    pub elements: u64,
    /// Elements with Δ ≠ 0.
    pub nonzero_delta: u64,
    /// Elements whose output bits differ from those of `w`.
    pub changed: u64,
    /// Σ d·Δ.
    pub dot: f64,
    /// Σ d².
    pub realised_sq: f64,
    /// Σ Δ².
    pub wanted_sq: f64,
    /// Elements that became infinite although base and Δ were finite.
    pub overflowed: u64,
    /// Elements written that are infinite or NaN.
    pub non_finite: u64,
}

impl TileStats {
    /// Adds another tile. The sums are `f64` additions: merge in a fixed order
    /// to get the same bits every time.
    pub fn merge(&mut self, other: &Self) {
        self.elements += other.elements;
        self.nonzero_delta += other.nonzero_delta;
        self.changed += other.changed;
        self.dot = canonical(self.dot + other.dot);
        self.realised_sq = canonical(self.realised_sq + other.realised_sq);
        self.wanted_sq = canonical(self.wanted_sq + other.wanted_sq);
        self.overflowed += other.overflowed;
        self.non_finite += other.non_finite;
    }
}

/// What a conversion did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConvertStats {
    /// Elements written.
    pub elements: u64,
    /// Elements whose value is not the value read. NaN to NaN does not count.
    pub changed: u64,
    /// Finite elements that became infinite.
    pub overflowed: u64,
}

impl ConvertStats {
    /// Adds another part of the same tensor.
    pub fn merge(&mut self, other: &Self) {
        self.elements += other.elements;
        self.changed += other.changed;
        self.overflowed += other.overflowed;
    }
}

/// The three sums of one unit, one `f32` per lane.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LaneSums {
    pub(crate) dot: [f32; LANES],
    pub(crate) realised_sq: [f32; LANES],
    pub(crate) wanted_sq: [f32; LANES],
}

impl LaneSums {
    pub(crate) const ZERO: Self =
        Self { dot: [0.0; LANES], realised_sq: [0.0; LANES], wanted_sq: [0.0; LANES] };
}

/// The running statistics of a tile: `f64` lanes and plain counters.
#[derive(Clone, Debug)]
pub(crate) struct Tally {
    dot: [f64; LANES],
    realised_sq: [f64; LANES],
    wanted_sq: [f64; LANES],
    pub(crate) nonzero_delta: u64,
    pub(crate) changed: u64,
    pub(crate) overflowed: u64,
    pub(crate) non_finite: u64,
}

impl Tally {
    pub(crate) const ZERO: Self = Self {
        dot: [0.0; LANES],
        realised_sq: [0.0; LANES],
        wanted_sq: [0.0; LANES],
        nonzero_delta: 0,
        changed: 0,
        overflowed: 0,
        non_finite: 0,
    };

    /// Widens the lanes of a finished unit and adds them.
    #[inline(always)]
    pub(crate) fn add_unit(&mut self, unit: &LaneSums) {
        for lane in 0..LANES {
            self.dot[lane] += f64::from(unit.dot[lane]);
            self.realised_sq[lane] += f64::from(unit.realised_sq[lane]);
            self.wanted_sq[lane] += f64::from(unit.wanted_sq[lane]);
        }
    }

    /// Sums the lanes, lowest first.
    pub(crate) fn finish(&self, elements: u64) -> TileStats {
        let sum = |lanes: &[f64; LANES]| canonical(lanes.iter().fold(0.0, |sum, lane| sum + lane));
        TileStats {
            elements,
            nonzero_delta: self.nonzero_delta,
            changed: self.changed,
            dot: sum(&self.dot),
            realised_sq: sum(&self.realised_sq),
            wanted_sq: sum(&self.wanted_sq),
            overflowed: self.overflowed,
            non_finite: self.non_finite,
        }
    }
}

/// Sums of huge squares may reach ∞ and then NaN, and so may Δ. The sign and
/// the payload of such a NaN are the CPU's choice. Replacing it keeps the bits
/// equal everywhere.
#[inline(always)]
pub(crate) fn canonical(value: f64) -> f64 {
    if value.is_nan() { f64::NAN } else { value }
}
