//! The floating-point environment the contract assumes.

use super::native::{Control, IEEE, read_control, write_control};

/// Runs `body` with the calling thread's floating-point control register at
/// its IEEE 754 default (round to nearest, subnormals neither flushed nor
/// read as zero, no traps) and restores the register afterwards, also when
/// `body` panics.
///
/// Libraries loaded into the same process may have set flush-to-zero behind
/// our back; [`merge_tile`](super::merge_tile) and [`convert`](super::convert)
/// therefore call this themselves.
pub fn with_ieee_floats<R>(body: impl FnOnce() -> R) -> R {
    let _restore = Restore(read_control());
    write_control(IEEE);
    body()
}

/// Puts the control register back when dropped.
struct Restore(Control);

impl Drop for Restore {
    fn drop(&mut self) {
        write_control(self.0);
    }
}
