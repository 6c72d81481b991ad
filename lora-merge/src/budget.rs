//! One budget in bytes for the ranks of many matrices.
//!
//! A further rank of matrix j costs `bytes_per_rank` (a row and a column of its factors) and gains
//! σ²: the energy by which ‖ΔW − BA‖²_F falls, or its share of ‖W₀‖²_F if gains are relative. The
//! sum of the gains is to be as large as the budget allows.
//!
//! The allotment is greedy: always the rank with the largest gain per byte. Gains descend within a
//! matrix, so that this order never takes a value before a larger one of the same matrix, and it is
//! the order in which the fractional knapsack problem takes them. Hence
//!
//! - where all ranks cost the same, and at every budget that a prefix of the order fills exactly,
//!   no allotment gains more;
//! - otherwise the first rank that does not fit is passed over, smaller ones fill the rest, and the
//!   best allotment gains at most [`Allotment::short_of_best`] more, which is less than that one
//!   rank's gain. (The exact answer is a knapsack problem.)
//!
//! Both hold for the gains given: for the singular values that were computed, and for the sum of
//! squared errors of the weights, which is not the loss of a model. [`Allotment::capped`] lists
//! the matrices that were given all of the values that were computed and might take more.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

/// A matrix that ranks are allotted to.
#[derive(Clone, Debug)]
pub struct Candidate<'a> {
    /// Its name, for errors.
    pub name: &'a str,
    /// What each rank gains, descending and finite: σᵢ², divided by ‖W₀‖²_F if the budget is to
    /// be spent on relative errors.
    pub gains: &'a [f64],
    /// What one rank costs: (m + n)·(bytes per element).
    pub bytes_per_rank: u64,
    /// It gets at least this rank, whatever it gains.
    pub minimum: usize,
    /// It gets at most this rank: min(m, n), or a lower limit.
    pub maximum: usize,
}

/// Ranks for the candidates, in their order.
#[derive(Clone, Debug, PartialEq)]
pub struct Allotment {
    /// The ranks.
    pub ranks: Vec<usize>,
    /// What they cost together.
    pub bytes: u64,
    /// What they gain together, of the gains that are known.
    pub gained: f64,
    /// No allotment within the budget gains this much more. 0 where the greedy order filled the
    /// budget exactly or ended before it.
    pub short_of_best: f64,
    /// Indices of candidates that were given every value that is known, all worth something, and
    /// may have more: a larger computation might give them more, at the expense of others.
    pub capped: Vec<usize>,
}

/// No allotment exists.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BudgetError {
    /// The minimum ranks cost more than there is.
    #[error("the minimum ranks alone take {needed} bytes and the budget is {budget}")]
    MinimumExceeds {
        /// What they cost.
        needed: u64,
        /// What there is.
        budget: u64,
    },
    /// There is less than one rank of any matrix costs.
    #[error("one rank takes {least} bytes at least and the budget is {budget}")]
    Small {
        /// What the cheapest rank costs.
        least: u64,
        /// What there is.
        budget: u64,
    },
    /// A minimum is above the maximum.
    #[error("`{name}`: the minimum rank {minimum} is above the maximum {maximum}")]
    Limits {
        /// The candidate.
        name: String,
        /// Its minimum.
        minimum: usize,
        /// Its maximum.
        maximum: usize,
    },
}

/// Gives ranks to the candidates, so that all together cost at most `bytes`. Values that gain
/// nothing are not taken. Of equal gains per byte, the first candidate's goes first.
///
/// # Errors
/// [`BudgetError`] if the minimum ranks do not fit.
pub fn allot(candidates: &[Candidate<'_>], bytes: u64) -> Result<Allotment, BudgetError> {
    let mut needed = 0u64;
    for candidate in candidates {
        let Candidate { name, minimum, maximum, .. } = *candidate;
        if minimum > maximum {
            return Err(BudgetError::Limits { name: name.to_owned(), minimum, maximum });
        }
        let cost = candidate.bytes_per_rank.saturating_mul(minimum as u64);
        needed = needed.saturating_add(cost);
    }
    if needed > bytes {
        return Err(BudgetError::MinimumExceeds { needed, budget: bytes });
    }

    let mut ranks: Vec<usize> = candidates.iter().map(|candidate| candidate.minimum).collect();
    let mut left = bytes - needed;
    let next = |index: usize, ranks: &[usize]| Item::next(candidates, index, ranks[index]);
    let mut heap: BinaryHeap<Item> =
        (0..candidates.len()).filter_map(|index| next(index, &ranks)).collect();
    // What a fraction of the first rank that did not fit would have gained in the room left then,
    // less what was put there instead.
    let mut short_of_best: Option<f64> = None;
    while let Some(item) = heap.pop() {
        let cost = candidates[item.index].bytes_per_rank;
        if cost > left {
            short_of_best.get_or_insert(item.density() * left as f64);
            continue;
        }
        left -= cost;
        ranks[item.index] += 1;
        if let Some(room) = &mut short_of_best {
            *room -= item.gain;
        }
        heap.extend(next(item.index, &ranks));
    }

    let gained = candidates.iter().zip(&ranks).map(|(candidate, &rank)| {
        candidate.gains[..rank.min(candidate.gains.len())].iter().sum::<f64>()
    });
    let capped = candidates.iter().zip(&ranks).enumerate().filter(|(_, (candidate, rank))| {
        let Candidate { gains, maximum, .. } = *candidate;
        **rank >= gains.len() && **rank < *maximum && gains.last().is_none_or(|&last| last > 0.0)
    });
    Ok(Allotment {
        bytes: bytes - left,
        gained: gained.sum(),
        short_of_best: short_of_best.map_or(0.0, |room| room.max(0.0)),
        capped: capped.map(|(index, _)| index).collect(),
        ranks,
    })
}

/// The next rank of a candidate.
#[derive(Clone, Copy, Debug)]
struct Item {
    index: usize,
    gain: f64,
    bytes: u64,
}

impl Item {
    fn next(candidates: &[Candidate<'_>], index: usize, rank: usize) -> Option<Item> {
        let candidate = &candidates[index];
        let gain = *candidate.gains.get(rank).filter(|_| rank < candidate.maximum)?;
        (gain > 0.0).then_some(Item { index, gain, bytes: candidate.bytes_per_rank })
    }

    fn density(self) -> f64 {
        self.gain / self.bytes.max(1) as f64
    }
}

impl Ord for Item {
    fn cmp(&self, other: &Item) -> Ordering {
        let dense = self.density().total_cmp(&other.density());
        dense.then_with(|| other.index.cmp(&self.index))
    }
}

impl PartialOrd for Item {
    fn partial_cmp(&self, other: &Item) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Item {
    fn eq(&self, other: &Item) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Item {}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(gains: &[f64], bytes_per_rank: u64) -> Candidate<'_> {
        Candidate { name: "x", gains, bytes_per_rank, minimum: 0, maximum: 100 }
    }

    /// The most that any allotment gains.
    fn best(candidates: &[Candidate<'_>], bytes: u64) -> f64 {
        let Some((first, rest)) = candidates.split_first() else {
            return 0.0;
        };
        let most = first.gains.len().min(first.maximum);
        let choices = (first.minimum..=most).filter_map(|rank| {
            let left = bytes.checked_sub(rank as u64 * first.bytes_per_rank)?;
            Some(first.gains[..rank].iter().sum::<f64>() + best(rest, left))
        });
        choices.fold(f64::NEG_INFINITY, f64::max)
    }

    #[test]
    fn no_allotment_gains_more_than_the_bound_allows() {
        let mut state = 1u64;
        let mut random = |bound: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) % bound
        };
        let mut inexact = 0;
        for _ in 0..2000 {
            let lists: Vec<Vec<f64>> = (0..1 + random(4))
                .map(|_| {
                    let mut gains: Vec<f64> = (0..random(5)).map(|_| random(12) as f64).collect();
                    gains.sort_by(|a, b| b.total_cmp(a));
                    gains
                })
                .collect();
            let candidates: Vec<Candidate<'_>> = lists
                .iter()
                .map(|gains| {
                    let most = gains.len() as u64;
                    let minimum = random(most.min(1) + 1) as usize;
                    let maximum = minimum + random(5) as usize;
                    Candidate { name: "x", gains, bytes_per_rank: 1 + random(5), minimum, maximum }
                })
                .collect();
            let bytes = random(30);
            let Ok(allotment) = allot(&candidates, bytes) else {
                assert_eq!(best(&candidates, bytes), f64::NEG_INFINITY);
                continue;
            };
            let optimum = best(&candidates, bytes);
            let Allotment { gained, short_of_best, .. } = allotment;
            assert!(
                gained <= optimum && optimum <= gained + short_of_best + 1e-9,
                "{candidates:?} {bytes}: {allotment:?} {optimum}"
            );
            inexact += usize::from(gained < optimum);
            let cost = |(candidate, rank): (&Candidate<'_>, &usize)| {
                assert!((candidate.minimum..=candidate.maximum).contains(rank));
                candidate.bytes_per_rank * *rank as u64
            };
            let costs: u64 = candidates.iter().zip(&allotment.ranks).map(cost).sum();
            assert!(costs == allotment.bytes && costs <= bytes);
            // With the budget that it fills, if nothing was passed over, it is the best.
            if short_of_best == 0.0 {
                assert_eq!(gained, best(&candidates, allotment.bytes));
            }
            let equal: Vec<Candidate<'_>> = candidates
                .iter()
                .map(|candidate| Candidate { bytes_per_rank: 3, ..candidate.clone() })
                .collect();
            if let Ok(allotment) = allot(&equal, bytes) {
                assert_eq!(allotment.gained, best(&equal, bytes), "equal costs");
            }
        }
        assert!(inexact > 10, "the bound was put to use {inexact} times");
    }

    #[test]
    fn gain_per_byte_decides_and_small_ones_fill_the_rest() {
        // Per byte: 10, 8 | 9, 1 | 6.
        let (large, small, last) = ([100.0, 80.0], [9.0, 1.0], [6.0]);
        let candidates = [candidate(&large, 10), candidate(&small, 1), candidate(&last, 1)];
        let ranks = |bytes| allot(&candidates, bytes).unwrap().ranks;
        assert_eq!(ranks(0), [0, 0, 0]);
        assert_eq!(ranks(9), [0, 2, 1], "the large one does not fit");
        assert_eq!(ranks(10), [1, 0, 0]);
        assert_eq!(ranks(11), [1, 1, 0]);
        assert_eq!(ranks(21), [2, 1, 0]);
        assert_eq!(ranks(1000), [2, 2, 1]);
        let nine = allot(&candidates, 9).unwrap();
        assert_eq!((nine.bytes, nine.gained, nine.short_of_best), (3, 16.0, 90.0 - 16.0));
        let eleven = allot(&candidates, 11).unwrap();
        assert_eq!(eleven.short_of_best, 0.0);
    }

    #[test]
    fn what_ends_with_its_computed_values_is_listed() {
        let (rich, poor, done) = ([9.0, 8.0], [1.0, 0.5], [5.0, 0.0]);
        let mut candidates = [candidate(&rich, 1), candidate(&poor, 1), candidate(&done, 1)];
        let allotment = allot(&candidates, 3).unwrap();
        assert_eq!((allotment.ranks, allotment.capped), (vec![2, 0, 1], vec![0]));
        candidates[0].maximum = 2;
        assert!(allot(&candidates, 3).unwrap().capped.is_empty());
        // Nothing is known of it, so that it might take anything.
        let unknown = [candidate(&[], 1)];
        assert_eq!(allot(&unknown, 3).unwrap().capped, [0]);
    }

    #[test]
    fn minimum_ranks_come_first_or_are_refused() {
        let (strong, weak) = ([100.0, 90.0], [0.0]);
        let mut candidates = [candidate(&strong, 4), candidate(&weak, 3)];
        candidates[1].minimum = 2;
        let allotment = allot(&candidates, 10).unwrap();
        assert_eq!((allotment.ranks, allotment.bytes), (vec![1, 2], 10));
        assert_eq!(
            allot(&candidates, 5),
            Err(BudgetError::MinimumExceeds { needed: 6, budget: 5 })
        );
        candidates[1].maximum = 1;
        assert!(matches!(allot(&candidates, 10), Err(BudgetError::Limits { .. })));
        candidates[1] = Candidate { minimum: 3, bytes_per_rank: u64::MAX, ..candidate(&weak, 1) };
        assert!(matches!(allot(&candidates, 10), Err(BudgetError::MinimumExceeds { .. })));
    }

    #[test]
    fn equal_gains_go_to_the_first() {
        let gains = [1.0, 1.0];
        let candidates = [candidate(&gains, 2), candidate(&gains, 2), candidate(&gains, 2)];
        assert_eq!(allot(&candidates, 6).unwrap().ranks, [2, 1, 0]);
        assert_eq!(allot(&[], 6).unwrap().ranks, [0usize; 0]);
    }
}
