//! How much a run of elements changed: all sums over it in one go, while it is in the nearest cache.
//!
//! # Contract
//!
//! For base elements w and fine-tuned ones t of one run, d = t − w rounded once to f32. The sums of
//! squares of w, of d and of the spacings are those of [`energy`](super::energy), over the run's
//! elements in their order. Everything else is done element by element, or does not depend on the
//! order. So the results are the same bits on every instruction set. Runs are of 1024 elements at
//! most: where a tensor is cut into runs shows in the last bits.

use super::float::FloatType;
use super::{Isa, native, with_ieee_floats};

/// Elements of a run, at most.
pub const RUN: usize = 1024;

/// The grid of a storage type, as far as its spacing goes.
#[derive(Clone, Copy, Debug)]
pub struct Grid {
    /// Bits of the significand after the leading one.
    fraction: i32,
    /// The smallest exponent that counts, biased as f32's: that of the type's smallest normal
    /// number, and no spacing is below that of f32.
    lowest: i32,
}

impl Grid {
    /// Of a storage type.
    #[must_use]
    pub fn of(float: FloatType) -> Grid {
        match float {
            FloatType::F32 => Grid { fraction: 23, lowest: 24 },
            FloatType::F16 => Grid { fraction: 10, lowest: 127 - 14 },
            FloatType::Bf16 => Grid { fraction: 7, lowest: 8 },
        }
    }

    /// Whether its steps are wider than another's.
    #[must_use]
    pub fn is_coarser_than(self, other: Grid) -> bool {
        self.fraction < other.fraction
    }

    /// ulp(value) where the difference is not zero, zero elsewhere; spacings below 2⁻¹²⁶ count as
    /// that.
    #[inline(always)]
    pub fn spacings(self, differences: &[f32], values: &[f32], out: &mut [f32]) {
        const EXPONENT: u32 = 0x7F80_0000;
        let (lowest, down) = (self.lowest << 23, self.fraction << 23);
        for ((out, difference), value) in out.iter_mut().zip(differences).zip(values) {
            let exponent = ((value.to_bits() & EXPONENT) as i32).max(lowest);
            let counted = -i32::from(*difference != 0.0);
            *out = f32::from_bits(((exponent - down) & counted) as u32);
        }
    }
}

/// What [`change`] found.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RunChange {
    /// Elements whose difference is not zero (a NaN is not).
    pub changed: u32,
    /// The largest |d|; a NaN if there is one. If it is not finite, no sum but `base_energy` has been
    /// made.
    pub largest: f32,
    /// Σ w².
    pub base_energy: f64,
    /// Σ d².
    pub energy: f64,
    /// Σ ulp² over the grids, of elements that changed.
    pub spacing: f64,
}

/// Measures one run. `tuned_grid` and `base_grid` say whose spacings are summed. The differences are
/// left in `difference`.
///
/// # Panics
/// If the slices are of different lengths, or longer than [`RUN`].
#[must_use]
pub fn change(
    isa: Isa,
    base: &[f32],
    tuned: &[f32],
    tuned_grid: Option<Grid>,
    base_grid: Option<Grid>,
    difference: &mut [f32],
) -> RunChange {
    assert!(base.len() <= RUN, "a run of {} elements", base.len());
    assert_eq!(base.len(), tuned.len(), "base and tuned are of different lengths");
    assert_eq!(base.len(), difference.len(), "no room for the differences");
    let run = Run { base, tuned, tuned_grid, base_grid };
    with_ieee_floats(|| match native::change(isa, run, difference) {
        Some(found) => found,
        None => measure(run, difference, super::sweep::scalar::energy),
    })
}

/// What a run consists of.
#[derive(Clone, Copy)]
pub(crate) struct Run<'a> {
    pub(crate) base: &'a [f32],
    pub(crate) tuned: &'a [f32],
    pub(crate) tuned_grid: Option<Grid>,
    pub(crate) base_grid: Option<Grid>,
}

/// [`change`], compiled for each instruction set: loops that compilers turn into vector
/// instructions, and the instruction set's own sum of squares.
#[inline(always)]
pub(crate) fn measure(
    run: Run<'_>,
    difference: &mut [f32],
    energy: impl Fn(&[f32]) -> f64,
) -> RunChange {
    let Run { base, tuned, .. } = run;
    let (mut changed, mut largest) = (0, 0);
    for ((difference, tuned), base) in difference.iter_mut().zip(tuned).zip(base) {
        let d = tuned - base;
        *difference = d;
        // With subnormals, a difference is zero only of equal values.
        changed += u32::from(d != 0.0);
        // The bits of magnitudes are ordered as they are, and below the sign bit.
        largest = i32::max(largest, d.abs().to_bits() as i32);
    }
    let largest = f32::from_bits(largest as u32);
    let base_energy = energy(base);
    let mut found = RunChange { changed, largest, base_energy, ..RunChange::default() };
    if changed == 0 || !largest.is_finite() {
        return found;
    }
    found.energy = energy(difference);
    let mut room = [0.0; RUN];
    let steps = &mut room[..base.len()];
    for (grid, values) in [(run.tuned_grid, tuned), (run.base_grid, base)] {
        if let Some(grid) = grid {
            grid.spacings(difference, values, steps);
            found.spacing += energy(steps);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{Noise, Taste, elements};
    use crate::numbers::neighbour;

    #[test]
    fn a_spacing_is_the_step_to_the_next_number() {
        for float in FloatType::ALL {
            let grid = Grid::of(float);
            let step = if float == FloatType::F32 { 65_521 } else { 1 };
            for bits in (0..float.infinity() - 1).step_by(step) {
                let (value, next) = (float.decode(bits), neighbour(float, bits, true).unwrap());
                let wanted = f64::from(float.decode(next)) - f64::from(value);
                let mut found = [0.0];
                grid.spacings(&[1.0], &[value], &mut found);
                assert_eq!(f64::from(found[0]), wanted.max(2f64.powi(-126)), "{float} {value:e}");
                grid.spacings(&[1.0], &[-value], &mut found);
                assert_eq!(f64::from(found[0]), wanted.max(2f64.powi(-126)), "{float} -{value:e}");
                grid.spacings(&[0.0], &[value], &mut found);
                assert_eq!(found, [0.0]);
            }
        }
    }

    #[test]
    fn every_instruction_set_finds_the_same() {
        let mut noise = Noise::new(77);
        let mut floats = |count, taste| -> Vec<f32> {
            let bytes = elements(&mut noise, FloatType::F32, count, taste);
            bytes.as_chunks().0.iter().map(|bits| f32::from_le_bytes(*bits)).collect()
        };
        let grids = [None, Some(Grid::of(FloatType::Bf16)), Some(Grid::of(FloatType::F16))];
        for length in (0..70).chain([96, 1000, RUN]) {
            for taste in [Taste::Plain, Taste::Sprinkled, Taste::Wild] {
                let (base, mut tuned) = (floats(length, taste), floats(length, taste));
                // Some do not change.
                tuned.iter_mut().zip(&base).step_by(3).for_each(|(tuned, base)| *tuned = *base);
                for (tuned_grid, base_grid) in [(0, 0), (1, 0), (1, 2), (0, 1)] {
                    let on = |isa| {
                        let mut difference = vec![0.0; length];
                        let (tuned_grid, base_grid) = (grids[tuned_grid], grids[base_grid]);
                        let found =
                            change(isa, &base, &tuned, tuned_grid, base_grid, &mut difference);
                        let sums = [found.base_energy, found.energy, found.spacing];
                        (found.changed, found.largest.is_nan(), sums.map(f64::to_bits))
                    };
                    for isa in Isa::available() {
                        assert_eq!(on(isa), on(Isa::Scalar), "{isa} {length} {taste:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn of_a_few_numbers() {
        let mut difference = [0.0; 4];
        let (base, tuned) = ([1.0, 2.0, -3.0, 0.0], [1.0, 2.5, -5.0, -0.0]);
        let grid = Some(Grid::of(FloatType::Bf16));
        for isa in Isa::available() {
            let found = change(isa, &base, &tuned, grid, None, &mut difference);
            assert_eq!(difference, [0.0, 0.5, -2.0, 0.0]);
            assert_eq!((found.changed, found.largest), (2, 2.0));
            assert_eq!((found.base_energy, found.energy), (14.0, 4.25));
            // Steps of 2⁻⁶ in [2, 4) and of 2⁻⁵ in [4, 8).
            assert_eq!(found.spacing, 2f64.powi(-12) + 2f64.powi(-10));
            let found = change(isa, &base, &[1.0, f32::NAN, 0.0, 0.0], grid, None, &mut difference);
            assert!(found.largest.is_nan() && found.base_energy == 14.0);
        }
    }
}
