//! Methods that look at single elements of the changes.
//!
//! With Δᵢ of m × n for adapter i, wᵢ its weight and d the density:
//!
//! ```text
//! magnitude   Tᵢ[e] = Δᵢ[e] if |Δᵢ[e]| is among the floor(d·m·n) largest of Δᵢ, else 0
//! random      Tᵢ[e] = Δᵢ[e]/d with probability d, else 0              (DARE, drop and rescale)
//! election    γ[e]  = sign Σᵢ wᵢ·Tᵢ[e], or of Σᵢ sign(wᵢ·Tᵢ[e]); + of 0
//! without     Δ[e]  = Σᵢ wᵢ·Tᵢ[e]
//! with        Δ[e]  = Σ of the wᵢ·Tᵢ[e] whose sign is γ[e], divided by their number, or not
//! ```
//!
//! TIES (Yadav et al. 2023, arXiv 2306.01708) is magnitude and election, DARE (Yu et al. 2024,
//! arXiv 2311.03099) random, with or without election. PEFT applies the same to the *factors*, whose
//! product then has cross terms `Bᵢ·Aⱼ`; here they act on the changes. PEFT's functions, given the
//! changes `wᵢ·Δᵢ` and weights of one, compute what is computed here.
//!
//! Of equal magnitudes at the border, the first in row-major order stay. The random number of an
//! element is a function of seed, adapter, parameter and element alone.

use ndarray::Array2;

use crate::engine::stochastic_key;
use crate::kernels::uniform;

/// A method.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Elementwise {
    /// Which elements of each change stay.
    pub sparsifier: Sparsifier,
    /// The share of them, above 0 and at most 1.
    pub density: f64,
    /// Whether a sign is elected, and how; without it, the changes add up.
    pub election: Option<Election>,
    /// What becomes of the elements that have the elected sign.
    pub disjoint: Disjoint,
}

/// Which elements stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sparsifier {
    /// The largest.
    Magnitude,
    /// A random choice; they are divided by the density.
    Random {
        /// Of the choice.
        seed: u64,
    },
}

/// How a sign is elected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Election {
    /// By the sum of the weighted values.
    Total,
    /// By the number of weighted values with each sign.
    Frequency,
}

/// How elements of the elected sign are merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disjoint {
    /// To their mean.
    Mean,
    /// To their sum.
    Sum,
}

/// Which elements of one change stay, so far as that depends on the whole of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// Those whose magnitude, as bits of an f32, is above `bits`, and of those that equal it the
    /// first `equal`.
    Magnitude {
        /// |Δ| at the border.
        bits: u32,
        /// How many of that magnitude stay.
        equal: usize,
        /// How many of that magnitude there are before each block of rows.
        before: Vec<usize>,
    },
    /// Those whose random number is below the density.
    Random {
        /// Of the random numbers.
        key: u64,
    },
}

/// The key of one adapter's choice in one parameter.
pub(super) fn key(seed: u64, adapter: usize, parameter: &str) -> u64 {
    stochastic_key(seed, &format!("{adapter}:{parameter}"))
}

/// The choice of the `keep` largest of a matrix, in blocks of `block` rows.
pub(super) fn largest(matrix: &Array2<f32>, keep: usize, block: usize) -> Choice {
    const HALF: usize = 1 << 16;
    let bits = |value: &f32| value.abs().to_bits();
    // Two digits of 16 bits: finite magnitudes are ordered as their bits are.
    let mut high = vec![0usize; HALF];
    matrix.iter().for_each(|value| high[(bits(value) >> 16) as usize] += 1);
    let (first, above) = descend(&high, keep);
    let mut low = vec![0usize; HALF];
    let inside = matrix.iter().map(bits).filter(|bits| bits >> 16 == first);
    inside.for_each(|bits| low[(bits & 0xFFFF) as usize] += 1);
    let (second, more) = descend(&low, keep - above);
    let border = first << 16 | second;
    let mut before = Vec::new();
    let mut count = 0;
    for rows in matrix.axis_chunks_iter(ndarray::Axis(0), block) {
        before.push(count);
        count += rows.iter().filter(|value| bits(value) == border).count();
    }
    Choice::Magnitude { bits: border, equal: keep - above - more, before }
}

/// The bin that the `keep`-th largest lies in, and how many lie above that bin.
fn descend(bins: &[usize], keep: usize) -> (u32, usize) {
    let mut above = 0;
    for (bin, &count) in bins.iter().enumerate().rev() {
        if above + count >= keep {
            return (bin as u32, above);
        }
        above += count;
    }
    (0, above - bins.first().copied().unwrap_or(0))
}

/// A block of rows with 0 for what does not stay, and the rest rescaled.
pub(super) fn sparsify(
    choice: &Choice,
    density: f64,
    block: usize,
    first_element: usize,
    values: &[f32],
) -> Vec<f64> {
    match choice {
        Choice::Magnitude { bits, equal, before } => {
            let mut left = equal.saturating_sub(before.get(block).copied().unwrap_or(0));
            let stays = |value: f32, left: &mut usize| {
                let magnitude = value.abs().to_bits();
                if magnitude == *bits && *left > 0 {
                    *left -= 1;
                    return true;
                }
                magnitude > *bits
            };
            let value = |&value: &f32| if stays(value, &mut left) { f64::from(value) } else { 0.0 };
            values.iter().map(value).collect()
        }
        Choice::Random { key } => {
            let stays = |index: usize| uniform(*key, (first_element + index) as u64) < density;
            let value = |(index, &value): (usize, &f32)| {
                if stays(index) { f64::from(value) / density } else { 0.0 }
            };
            values.iter().enumerate().map(value).collect()
        }
    }
}

/// One element of the result from the adapters' weighted ones.
pub(super) fn merge(method: &Elementwise, values: &[f64]) -> f64 {
    let Some(election) = method.election else { return values.iter().sum() };
    let sign = |value: f64| if value == 0.0 { 0.0 } else { value.signum() };
    let ballot: f64 = match election {
        Election::Total => values.iter().sum(),
        Election::Frequency => values.iter().map(|&value| sign(value)).sum(),
    };
    let elected = if ballot >= 0.0 { 1.0 } else { -1.0 };
    let agreeing = values.iter().filter(|&&value| sign(value) == elected);
    let (count, sum) = agreeing.fold((0u32, 0.0), |(count, sum), value| (count + 1, sum + value));
    match method.disjoint {
        Disjoint::Mean => sum / f64::from(count.max(1)),
        Disjoint::Sum => sum,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn method(election: Option<Election>, disjoint: Disjoint) -> Elementwise {
        Elementwise { sparsifier: Sparsifier::Magnitude, density: 0.5, election, disjoint }
    }

    fn pruned(matrix: &Array2<f32>, keep: usize, block: usize) -> Vec<f64> {
        let choice = largest(matrix, keep, block);
        let mut result = Vec::new();
        let cols = matrix.ncols();
        for (index, rows) in matrix.axis_chunks_iter(ndarray::Axis(0), block).enumerate() {
            let values: Vec<f32> = rows.iter().copied().collect();
            result.extend(sparsify(&choice, 0.5, index, index * block * cols, &values));
        }
        result
    }

    #[test]
    fn the_largest_stay_and_of_equals_the_first() {
        let matrix = ndarray::array![[1.0f32, -3.0, 2.0], [2.0, -2.0, 0.5], [2.0, 0.0, 5.0]];
        for block in [1, 2, 5] {
            let kept = pruned(&matrix, 4, block);
            assert_eq!(kept, [0.0, -3.0, 2.0, 2.0, 0.0, 0.0, 0.0, 0.0, 5.0], "{block}");
            assert_eq!(pruned(&matrix, 0, block), [0.0; 9], "{block}");
            let all: Vec<f64> = matrix.iter().map(|&value| f64::from(value)).collect();
            assert_eq!(pruned(&matrix, 9, block), all, "{block}");
        }
    }

    #[test]
    fn pruning_agrees_with_sorting() {
        let value = |row: usize, col: usize| ((row * 7 + col * 13) % 11) as f32 - 5.25;
        let matrix = Array2::from_shape_fn((9, 8), |(row, col)| value(row, col) * 1.7e-3);
        for keep in 0..=72 {
            let mut order: Vec<usize> = (0..72).collect();
            let values: Vec<f32> = matrix.iter().copied().collect();
            order.sort_by(|&a, &b| values[b].abs().total_cmp(&values[a].abs()));
            let mut expected = vec![0.0; 72];
            order.iter().take(keep).for_each(|&at| expected[at] = f64::from(values[at]));
            assert_eq!(pruned(&matrix, keep, 4), expected, "{keep}");
        }
    }

    #[test]
    fn signs_are_elected_and_others_left_out() {
        let values = [3.0, -1.0, -1.0];
        let total = method(Some(Election::Total), Disjoint::Mean);
        assert_eq!(merge(&total, &values), 3.0);
        let frequency = method(Some(Election::Frequency), Disjoint::Sum);
        assert_eq!(merge(&frequency, &values), -2.0);
        assert_eq!(merge(&method(None, Disjoint::Mean), &values), 1.0);
        // A tie elects +, and zeros are no votes.
        assert_eq!(merge(&total, &[2.0, -2.0, 0.0]), 2.0);
        assert_eq!(merge(&total, &[0.0, 0.0]), 0.0);
        assert_eq!(merge(&total, &[1.0, 3.0, 0.0]), 2.0);
    }

    #[test]
    fn random_choices_have_their_share_and_mean() {
        let count = 200_000;
        let choice = Choice::Random { key: key(7, 0, "x.weight") };
        let values = vec![1.0f32; count];
        let kept = sparsify(&choice, 0.2, 0, 0, &values);
        let stay = kept.iter().filter(|&&value| value != 0.0).count() as f64;
        // Five standard deviations.
        let deviation = (count as f64 * 0.2 * 0.8).sqrt();
        assert!((stay - 0.2 * count as f64).abs() < 5.0 * deviation, "{stay}");
        assert!(kept.iter().all(|&value| value == 0.0 || value == 5.0));
        // Any cut gives the same.
        let tail = sparsify(&choice, 0.2, 3, 1000, &values[1000..]);
        assert_eq!(tail, kept[1000..]);
        assert_ne!(key(7, 0, "x"), key(7, 1, "x"));
        assert_ne!(key(7, 0, "x"), key(8, 0, "x"));
    }
}
