//! Sharing out the work of a preparation.

use std::thread;

use crate::error::Result;
use crate::kernels::with_ieee_floats;

/// Work, in multiplications, that is worth a thread.
const WORTH: usize = 1 << 22;

/// Fills `slots`, which are units of `unit` each, from at most so many threads: `fill(first,
/// piece)` fills the units from `first` on. What a unit becomes must depend on its number alone.
pub(super) fn fill<T: Send>(
    slots: &mut [T],
    unit: usize,
    work: usize,
    threads: usize,
    fill: impl Fn(usize, &mut [T]) -> Result<()> + Sync,
) -> Result<()> {
    let units = slots.len() / unit;
    let threads = threads.min(work / WORTH).min(units);
    if threads <= 1 {
        return fill(0, slots);
    }
    let each = units.div_ceil(threads);
    let fill = &fill;
    thread::scope(|scope| {
        let workers: Vec<_> = slots
            .chunks_mut(each * unit)
            .enumerate()
            .map(|(number, piece)| {
                // A thread may begin with other floating-point settings than this one's.
                scope.spawn(move || with_ieee_floats(|| fill(number * each, piece)))
            })
            .collect();
        workers.into_iter().try_for_each(|worker| {
            worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn no_more_threads_than_given() {
        for (threads, work, most) in
            [(1, usize::MAX, 1), (3, usize::MAX, 3), (64, usize::MAX, 7), (64, 2 * WORTH, 2)]
        {
            let seen = Mutex::new(BTreeSet::new());
            let mut slots = vec![0; 14];
            fill(&mut slots, 2, work, threads, |first, slots| {
                // Threads' ids are ordered by nothing but their text.
                seen.lock().unwrap().insert(format!("{:?}", thread::current().id()));
                let units = (first..).zip(slots.chunks_mut(2));
                units.for_each(|(number, unit)| unit.fill(number));
                Ok(())
            })
            .unwrap();
            assert_eq!(slots, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]);
            assert!(seen.lock().unwrap().len() <= most, "{threads} threads");
        }
    }
}
