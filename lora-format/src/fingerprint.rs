//! The identity of the base model: a name, a revision, and sampled values.
//!
//! PEFT records a name, often a path on the trainer's machine. A name does not tell whether the
//! base in hand is the base that was trained on, so our format also records a few stored values
//! of every target (or of evenly chosen ones, if there are many). The samples survive what people
//! do to models (renaming tensors, re-sharding, re-encoding f32 as bf16), and tell what they must
//! not do: merge an adapter into another model of the same shapes.

use half::{bf16, f16};

use crate::dtype::Dtype;

/// The name of the sampling rule, in files.
pub const ALGORITHM: &str = "samples-1";
/// The most targets that are sampled.
pub const TARGETS: usize = 64;
/// Samples per target.
pub const SAMPLES: usize = 16;

/// What an adapter knows of the base it was trained on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BaseIdentity {
    /// The base's name, as the trainer recorded it.
    pub name: Option<String>,
    /// Its revision.
    pub revision: Option<String>,
    /// Its sampled values.
    pub fingerprint: Option<Fingerprint>,
}

/// Sampled values of a base model's targets.
#[derive(Clone, Debug, PartialEq)]
pub struct Fingerprint {
    /// One entry per sampled target, in the order of the adapter's sorted components.
    pub targets: Vec<TargetSamples>,
}

/// Sampled values of one parameter.
#[derive(Clone, Debug, PartialEq)]
pub struct TargetSamples {
    /// The target's full name, as the adapter names it.
    pub target: String,
    /// How the values were stored.
    pub dtype: Dtype,
    /// The parameter's shape.
    pub shape: Vec<usize>,
    /// The values at [`positions`], exactly.
    pub values: Vec<f32>,
}

/// Whether the base in hand is the base that was recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Every sample is equal and stored the same.
    Same,
    /// Every sample is equal after rounding to the coarser of the two dtypes.
    Reencoded,
    /// There is nothing to compare.
    Unknown,
    /// Some sample differs.
    Different {
        /// Samples that are equal, after rounding.
        equal: usize,
        /// Samples compared.
        compared: usize,
        /// The first target that differs, as the adapter names it.
        first: String,
    },
}

/// Which of `count` sorted targets are sampled: all of them up to [`TARGETS`], else that many,
/// evenly spaced: `floor(i·count/64)`.
pub fn sampled_targets(count: usize) -> impl Iterator<Item = usize> {
    let samples = count.min(TARGETS);
    (0..samples).map(move |index| index * count / samples)
}

/// The flat positions sampled in a tensor of `elements` elements: the golden-ratio sequence
/// `floor(frac((i+1)·φ)·elements)`, in 64-bit fixed point so that every implementation agrees.
/// Depends on nothing but the number of elements.
pub fn positions(elements: u64) -> impl Iterator<Item = u64> {
    /// The fractional part of the golden ratio times 2⁶⁴.
    const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;
    let samples = if elements == 0 { 0 } else { SAMPLES as u64 };
    (1..=samples).map(move |index| {
        let fraction = index.wrapping_mul(GOLDEN);
        ((u128::from(fraction) * u128::from(elements)) >> 64) as u64
    })
}

/// Samples a tensor's bytes; `None` unless it is stored as F32, F16 or BF16.
pub fn sample(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
    let width = (dtype.bits() / 8) as usize;
    let read = |position: u64| {
        let at = position as usize * width;
        let element = bytes.get(at..at + width)?;
        Some(match *element {
            [a, b] if dtype == Dtype::F16 => f16::from_le_bytes([a, b]).to_f32(),
            [a, b] => bf16::from_le_bytes([a, b]).to_f32(),
            [a, b, c, d] => f32::from_le_bytes([a, b, c, d]),
            _ => return None,
        })
    };
    dtype.is_merge_float().then(|| positions((bytes.len() / width) as u64).map(read).collect())?
}

impl TargetSamples {
    /// How many of these samples equal `other`'s, allowing for the coarser of the two dtypes.
    fn equal(&self, other: &TargetSamples) -> usize {
        let pairs = self.values.iter().zip(&other.values);
        pairs.filter(|&(&a, &b)| equal(a, self.dtype, b, other.dtype)).count()
    }
}

/// Whether one stored value can be the re-encoding of the other.
fn equal(a: f32, a_dtype: Dtype, b: f32, b_dtype: Dtype) -> bool {
    let same = |x: f32, y: f32| x == y || (x.is_nan() && y.is_nan());
    same(a, b) || same(round_to(b_dtype, a), b) || same(round_to(a_dtype, b), a)
}

fn round_to(dtype: Dtype, value: f32) -> f32 {
    match dtype {
        Dtype::F16 => f16::from_f32(value).to_f32(),
        Dtype::Bf16 => bf16::from_f32(value).to_f32(),
        _ => value,
    }
}

/// Compares recorded samples with those of the base in hand, which `actual` gives for a recorded
/// target (`None` where it cannot be found or sampled: then that target says nothing).
pub fn compare<'a>(
    recorded: &'a Fingerprint,
    mut actual: impl FnMut(&'a TargetSamples) -> Option<TargetSamples>,
) -> Verdict {
    let mut compared = 0;
    let mut matching = 0;
    let mut first = None;
    let mut reencoded = false;
    for expected in &recorded.targets {
        let Some(found) = actual(expected) else {
            continue;
        };
        let alike = expected.shape == found.shape;
        let equal = if alike { expected.equal(&found) } else { 0 };
        compared += expected.values.len();
        matching += equal;
        reencoded |= expected.dtype != found.dtype;
        // A shape differs even where neither side has an element to sample.
        if (!alike || equal < expected.values.len()) && first.is_none() {
            first = Some(expected.target.clone());
        }
    }
    match first {
        Some(first) => Verdict::Different { equal: matching, compared, first },
        None if compared == 0 => Verdict::Unknown,
        None if reencoded => Verdict::Reencoded,
        None => Verdict::Same,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(dtype: Dtype, values: &[f32]) -> Fingerprint {
        let target = TargetSamples {
            target: "x.weight".into(),
            dtype,
            shape: vec![values.len()],
            values: values.to_vec(),
        };
        Fingerprint { targets: vec![target] }
    }

    fn verdict(recorded: &Fingerprint, actual: &Fingerprint) -> Verdict {
        compare(recorded, |_| actual.targets.first().cloned())
    }

    #[test]
    fn positions_stay_inside_and_depend_on_the_count_alone() {
        for elements in [1, 2, 7, 4096, u64::MAX] {
            assert!(positions(elements).all(|position| position < elements));
            assert_eq!(positions(elements).count(), SAMPLES);
        }
        assert_eq!(positions(0).count(), 0);
        assert_eq!(positions(1000).take(3).collect::<Vec<_>>(), [618, 236, 854]);
    }

    #[test]
    fn few_targets_are_all_sampled_and_many_evenly() {
        assert_eq!(sampled_targets(3).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(sampled_targets(0).count(), 0);
        let chosen: Vec<_> = sampled_targets(36_096).collect();
        assert_eq!(chosen.len(), TARGETS);
        assert_eq!((chosen[0], chosen[1]), (0, 564));
    }

    #[test]
    fn the_four_verdicts() {
        let exact = [0.1, -2.5, 3.25e-5];
        let original = samples(Dtype::F32, &exact);
        assert_eq!(verdict(&original, &original), Verdict::Same);

        let rounded = exact.map(|value| bf16::from_f32(value).to_f32());
        assert_eq!(verdict(&original, &samples(Dtype::Bf16, &rounded)), Verdict::Reencoded);
        assert_eq!(verdict(&samples(Dtype::Bf16, &rounded), &original), Verdict::Reencoded);

        let other = samples(Dtype::F32, &[0.1, -2.5, 3.26e-5]);
        let expected = Verdict::Different { equal: 2, compared: 3, first: "x.weight".into() };
        assert_eq!(verdict(&original, &other), expected);

        assert_eq!(compare(&original, |_| None), Verdict::Unknown);

        let shaped = |shape: &[usize]| {
            let mut empty = samples(Dtype::F32, &[]);
            empty.targets[0].shape = shape.to_vec();
            empty
        };
        let expected = Verdict::Different { equal: 0, compared: 0, first: "x.weight".into() };
        assert_eq!(verdict(&shaped(&[0, 4]), &shaped(&[0, 8])), expected);
        assert_eq!(verdict(&shaped(&[0, 4]), &shaped(&[0, 4])), Verdict::Unknown);
    }
}
