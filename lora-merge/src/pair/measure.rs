//! How much a parameter changed: one pass over both sides, in f64, in a fixed order.

use rayon::iter::{IntoParallelIterator, ParallelIterator};

use super::delta::Delta;
use super::problem::Side;
use crate::kernels::{FloatType, Grid, RUN, RunChange, change, with_ieee_floats};

/// Elements whose sums one thread makes: the cut does not depend on the threads.
const SPAN: usize = 1 << 20;

/// How much a parameter changed.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Change {
    /// Elements compared.
    pub elements: u64,
    /// Elements whose values differ (+0 and −0 do not).
    pub changed: u64,
    /// ‖ΔW‖²_F, of the differences as [`Delta::read`] rounds them.
    pub energy: f64,
    /// ‖W0‖²_F.
    pub base_energy: f64,
    /// An estimate of the variance of an element of ΔW that storage alone accounts for: rounding to
    /// a grid of spacing u adds noise of variance u²/12. The mean, over all elements, of
    /// ulp(W1)²/12 of those that changed, plus ulp(W0)²/12 of the same if the base is stored with
    /// fewer bits of precision than the fine-tuned model. An element that did not change carries no
    /// noise that could be told from none; the steps of a quantised weight are not counted; spacings
    /// below 2⁻¹²⁶ count as that.
    pub storage_variance: f64,
    /// The largest |ΔW|.
    pub largest: f64,
    /// Elements of which one side is NaN or infinite, or whose difference is beyond f32. They are
    /// left out of the sums.
    pub non_finite: u64,
    /// The first of them.
    pub first_non_finite: Option<NonFinite>,
}

/// An element that is not a number to compute with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NonFinite {
    /// Its index in the row-major matrix of [`Delta::shape`].
    pub element: u64,
    /// The side that holds it; `None` if both are finite and their difference is not.
    pub side: Option<Side>,
}

impl Change {
    /// ‖ΔW‖_F / ‖W0‖_F; infinite if W0 is zero and ΔW is not.
    pub fn relative(&self) -> f64 {
        if self.energy == 0.0 { 0.0 } else { (self.energy / self.base_energy).sqrt() }
    }

    /// Whether no element changed.
    pub fn is_unchanged(&self) -> bool {
        self.changed == 0 && self.non_finite == 0
    }
}

/// Measures a parameter, on the threads of the current pool, and gives its pages back. The result
/// does not depend on the number of threads.
pub fn measure(delta: &Delta<'_>) -> Change {
    let spans = delta.len().div_ceil(SPAN);
    let sums: Vec<Sums> = (0..spans)
        .into_par_iter()
        .map(|span| with_ieee_floats(|| Sums::of(delta, span * SPAN)))
        .collect();
    let mut change = Change { elements: delta.len() as u64, ..Change::default() };
    let mut spacing = 0.0;
    for sums in sums {
        change.changed += sums.changed;
        change.energy += sums.energy;
        change.base_energy += sums.base_energy;
        spacing += sums.spacing;
        change.largest = change.largest.max(f64::from(sums.largest));
        change.non_finite += sums.non_finite;
        change.first_non_finite = change.first_non_finite.or(sums.first_non_finite);
    }
    if change.elements > 0 {
        change.storage_variance = spacing / 12.0 / change.elements as f64;
    }
    change
}

/// The sums of one span.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    changed: u64,
    energy: f64,
    base_energy: f64,
    /// Σ of squared spacings.
    spacing: f64,
    largest: f32,
    non_finite: u64,
    first_non_finite: Option<NonFinite>,
}

impl Sums {
    fn of(delta: &Delta<'_>, start: usize) -> Sums {
        let end = delta.len().min(start + SPAN);
        let (base_grid, tuned_grid) = grids(delta.base.float(), delta.tuned.float());
        delta.populate(start..end);
        let [mut base, mut tuned, mut difference] = [[0.0; RUN]; 3];
        let mut sums = Sums::default();
        for first in (start..end).step_by(RUN) {
            let count = RUN.min(end - first);
            let (base, tuned) = (&mut base[..count], &mut tuned[..count]);
            let difference = &mut difference[..count];
            delta.base.read(first, base);
            delta.tuned.read(first, tuned);
            let mut found = change(delta.isa, base, tuned, tuned_grid, base_grid, difference);
            if !found.largest.is_finite() {
                let (bad, at) = take_out(base, tuned, difference);
                sums.non_finite += bad;
                sums.first_non_finite = sums
                    .first_non_finite
                    .or(at.map(|(at, side)| NonFinite { element: (first + at) as u64, side }));
                found = change(delta.isa, base, tuned, tuned_grid, base_grid, difference);
            }
            sums.add(&found);
        }
        delta.release_elements(start..end);
        sums
    }

    fn add(&mut self, found: &RunChange) {
        self.changed += u64::from(found.changed);
        self.energy += found.energy;
        self.base_energy += found.base_energy;
        self.spacing += found.spacing;
        self.largest = self.largest.max(found.largest);
    }
}

/// Makes zeros of all elements whose difference is not finite, and gives their number and the first.
fn take_out(
    base: &mut [f32],
    tuned: &mut [f32],
    difference: &mut [f32],
) -> (u64, Option<(usize, Option<Side>)>) {
    let (mut count, mut first) = (0, None);
    for (at, ((base, tuned), difference)) in base.iter_mut().zip(tuned).zip(difference).enumerate()
    {
        if difference.is_finite() {
            continue;
        }
        let side = match (base.is_finite(), tuned.is_finite()) {
            (_, false) => Some(Side::Tuned),
            (false, true) => Some(Side::Base),
            (true, true) => None,
        };
        count += 1;
        first = first.or(Some((at, side)));
        (*base, *tuned, *difference) = (0.0, 0.0, 0.0);
    }
    (count, first)
}

/// The grids whose rounding is in ΔW: the base's (where it is the coarser one) and the fine-tuned
/// model's.
pub(super) fn grids(
    base: Option<FloatType>,
    tuned: Option<FloatType>,
) -> (Option<Grid>, Option<Grid>) {
    let (base, tuned) = (base.map(Grid::of), tuned.map(Grid::of));
    let coarser = |base: &Grid| tuned.is_some_and(|tuned| base.is_coarser_than(tuned));
    (base.filter(coarser), tuned)
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use lora_format::io::mmap::Mapping;

    use super::*;
    use crate::kernels::Isa;
    use crate::pair::model::Values;

    /// A file of pseudo-random numbers that is removed in the end.
    struct Scratch(std::path::PathBuf);

    impl Scratch {
        fn new(name: &str, count: usize, seed: u32) -> Scratch {
            let name = format!("lora-merge-{}-{name}", std::process::id());
            let path = std::env::temp_dir().join(name);
            let mut state = seed;
            let mut next = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                // Exponents from 112 to 127.
                ((state >> 16) & 0x87FF | 0x3800) as u16
            };
            let bytes: Vec<u8> = (0..count).flat_map(|_| next().to_le_bytes()).collect();
            std::fs::write(&path, bytes).unwrap();
            Scratch(path)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _already_gone = std::fs::remove_file(&self.0);
        }
    }

    #[test]
    fn the_sums_are_those_of_any_number_of_threads() {
        let (rows, cols) = (3, SPAN + 17);
        let files = [Scratch::new("base", rows * cols, 1), Scratch::new("tuned", rows * cols, 2)];
        let mappings =
            files.each_ref().map(|file| Mapping::new(&File::open(&file.0).unwrap()).unwrap());
        let values = mappings.each_ref().map(|mapping| Values::Stored {
            mapping,
            start: 0,
            float: FloatType::Bf16,
            isa: Isa::Scalar,
        });
        let [base, tuned] = values;
        let delta = Delta { rows, cols, base, tuned, isa: Isa::Scalar };
        let on = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| measure(&delta))
        };
        let one = on(1);
        assert_eq!(one.elements, (rows * cols) as u64);
        assert!(one.changed > one.elements / 2 && one.energy > 0.0 && one.storage_variance > 0.0);
        for threads in [2, 3, 8] {
            let other = on(threads);
            assert_eq!(one, other);
            for (a, b) in [
                (one.energy, other.energy),
                (one.base_energy, other.base_energy),
                (one.storage_variance, other.storage_variance),
            ] {
                assert_eq!(a.to_bits(), b.to_bits());
            }
        }
    }

    #[test]
    fn the_base_counts_where_its_grid_is_the_coarser_one() {
        let (f32, f16, bf16) = (Some(FloatType::F32), Some(FloatType::F16), Some(FloatType::Bf16));
        for (base, tuned, counted) in [
            (f32, bf16, [false, true]),
            (bf16, bf16, [false, true]),
            (bf16, f32, [true, true]),
            (bf16, f16, [true, true]),
            (f16, bf16, [false, true]),
            // Quantised.
            (None, bf16, [false, true]),
            (bf16, None, [false, false]),
        ] {
            let (base, tuned) = grids(base, tuned);
            assert_eq!([base.is_some(), tuned.is_some()], counted);
        }
    }
}
