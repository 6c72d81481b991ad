//! Independent pieces of work of known cost, shared out among threads.
//!
//! The matrices of a model are many, and each one's work is a chain of short parallel steps. To run
//! all of them on one pool wastes half of it: a thread that waits for a step's end takes up another
//! matrix meanwhile and cannot go on with the first until that one is done. So the threads are cut
//! into groups that share nothing, as many groups as there are threads if there is work for all of
//! them, and every group takes the largest piece that is left (Graham's LPT rule: at most a third
//! longer than the best schedule). A piece so large that it would keep a group busy long after the
//! others runs first, on all threads.
//!
//! The results do not depend on any of this, as long as the work's own do not depend on the number
//! of threads.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::error::{Error, Result};

/// A piece is large if it takes longer than the others would on their groups, by this factor.
const LARGE: f64 = 1.25;

/// Threads, and how pieces of work are shared among them.
pub(crate) struct Schedule {
    threads: usize,
}

impl Schedule {
    /// On so many threads; one per core for 0.
    pub(crate) fn new(threads: usize) -> Schedule {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        Schedule { threads: if threads == 0 { cores() } else { threads } }
    }

    /// How many threads there are.
    pub(crate) fn threads(&self) -> usize {
        self.threads
    }

    /// Does all pieces, of which `costs` says how long each takes in any unit; the results are in
    /// the order of the costs. `make` is called within a pool of the threads that are for it.
    ///
    /// # Errors
    /// The first piece's that failed, in their order; [`Error::Interrupted`] if some were not begun
    /// because `cancelled` said so; [`Error::Threads`].
    pub(crate) fn run<T: Send>(
        &self,
        costs: &[u64],
        cancelled: impl Fn() -> bool + Sync,
        make: impl Fn(usize) -> Result<T> + Sync,
    ) -> Result<Vec<T>> {
        let mut order: Vec<usize> = (0..costs.len()).collect();
        order.sort_by_key(|&at| std::cmp::Reverse(costs[at]));
        let large = self.large(&order, costs);
        let slots: Vec<Mutex<Option<Result<T>>>> = costs.iter().map(|_| Mutex::new(None)).collect();
        let stop = AtomicUsize::new(0);
        let work = |pool: &ThreadPool, queue: &[usize], next: &AtomicUsize| {
            while let Some(&at) = queue.get(next.fetch_add(1, Ordering::Relaxed)) {
                if stop.load(Ordering::Relaxed) > 0 || cancelled() {
                    return;
                }
                let made = pool.install(|| make(at));
                stop.fetch_add(usize::from(made.is_err()), Ordering::Relaxed);
                if let Ok(mut slot) = slots[at].lock() {
                    *slot = Some(made);
                }
            }
        };
        let (first, rest) = order.split_at(large);
        if !first.is_empty() {
            work(&pool(self.threads)?, first, &AtomicUsize::new(0));
        }
        let groups = self.threads.min(rest.len());
        let pools = (0..groups)
            .map(|group| pool(self.threads / groups + usize::from(group < self.threads % groups)))
            .collect::<Result<Vec<_>>>()?;
        let next = AtomicUsize::new(0);
        let (work, next) = (&work, &next);
        std::thread::scope(|scope| {
            for pool in &pools {
                scope.spawn(move || work(pool, rest, next));
            }
        });
        let made: Vec<Option<Result<T>>> =
            slots.into_iter().map(|slot| slot.into_inner().unwrap_or(None)).collect();
        // A failure stopped the others: it is what there is to say.
        if made.iter().any(|one| matches!(one, Some(Err(_)))) {
            return made.into_iter().flatten().collect();
        }
        made.into_iter().map(|one| one.unwrap_or(Err(Error::Interrupted))).collect()
    }

    /// How many of the pieces, the largest first, run on all threads.
    fn large(&self, order: &[usize], costs: &[u64]) -> usize {
        let mut left: f64 = costs.iter().map(|&cost| cost as f64).sum();
        let mut count = 0;
        for &at in order {
            let groups = self.threads.min(order.len() - count) as f64;
            let cost = costs[at] as f64;
            if groups < 2.0 || cost * groups <= LARGE * left {
                break;
            }
            left -= cost;
            count += 1;
        }
        count
    }
}

fn pool(threads: usize) -> Result<ThreadPool> {
    ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .map_err(|source| Error::Threads { source })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn results_are_in_order_whatever_the_threads() {
        let costs: Vec<u64> = (0..40).map(|at| at * 7 % 11 + 1).collect();
        for threads in [1, 2, 3, 16, 64] {
            let made = Schedule::new(threads).run(&costs, || false, |at| Ok(at * at)).unwrap();
            assert_eq!(made, (0..40).map(|at| at * at).collect::<Vec<_>>());
        }
        assert!(Schedule::new(4).run(&[], || false, Ok).unwrap().is_empty());
    }

    #[test]
    fn every_thread_is_in_one_group() {
        for (pieces, expected) in [(3, [3, 3, 2].as_slice()), (20, &[1; 8])] {
            let seen = Mutex::new(BTreeSet::new());
            let barrier = std::sync::Barrier::new(expected.len());
            Schedule::new(8)
                .run(
                    &vec![1; pieces],
                    || false,
                    |at| {
                        // The first pieces are held until every group has one.
                        if at < expected.len() {
                            barrier.wait();
                            seen.lock().unwrap().insert((at, rayon::current_num_threads()));
                        }
                        Ok(())
                    },
                )
                .unwrap();
            let mut sizes: Vec<usize> =
                seen.into_inner().unwrap().into_iter().map(|(_, size)| size).collect();
            sizes.sort_unstable_by(|a, b| b.cmp(a));
            assert_eq!(sizes, expected);
        }
    }

    #[test]
    fn a_large_piece_has_all_threads() {
        let threads = Mutex::new(vec![0; 9]);
        let costs = [1, 1, 1, 1, 50, 1, 1, 1, 1];
        Schedule::new(4)
            .run(
                &costs,
                || false,
                |at| {
                    threads.lock().unwrap()[at] = rayon::current_num_threads();
                    Ok(())
                },
            )
            .unwrap();
        assert_eq!(threads.into_inner().unwrap(), [1, 1, 1, 1, 4, 1, 1, 1, 1]);
    }

    #[test]
    fn a_failure_is_told_and_stops_the_rest() {
        let failed = Schedule::new(2).run(
            &[1; 100],
            || false,
            |at| match at {
                3 => Err(Error::Threads { source: pool_error() }),
                _ => Ok(at),
            },
        );
        assert!(matches!(failed, Err(Error::Threads { .. })));
        let cancelled = Schedule::new(2).run(&[1; 100], || true, |_| Ok(()));
        assert!(matches!(cancelled, Err(Error::Interrupted)));
    }

    fn pool_error() -> rayon::ThreadPoolBuildError {
        ThreadPoolBuilder::new()
            .spawn_handler(|_| Err(std::io::Error::other("none")))
            .build()
            .unwrap_err()
    }
}
