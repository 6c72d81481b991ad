//! Sharing out the work of a preparation.

use std::thread;

use crate::error::Result;
use crate::kernels::with_ieee_floats;

/// Work, in multiplications, that is worth a thread.
const WORTH: usize = 1 << 22;

/// Fills `slots`, which are units of `unit` each, from several threads: `fill(first, piece)` fills
/// the units from `first` on. What a unit becomes must depend on its number alone.
pub(super) fn fill<T: Send>(
    slots: &mut [T],
    unit: usize,
    work: usize,
    fill: impl Fn(usize, &mut [T]) -> Result<()> + Sync,
) -> Result<()> {
    let units = slots.len() / unit;
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let threads = cores.min(work / WORTH).min(units);
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
