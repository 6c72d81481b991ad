//! FPCR, which decides about rounding and subnormals.

#![expect(unsafe_code, reason = "no safe access to FPCR exists")]

use std::arch::asm;

/// A value of FPCR.
pub(crate) type Control = u64;

/// Round to nearest, subnormals honoured, NaN payloads kept, no traps: the
/// value at process start.
pub(crate) const IEEE: Control = 0;

/// Flush-to-zero, for tests.
#[cfg(test)]
pub(crate) const FLUSHING: Control = 1 << 24;

/// The calling thread's FPCR.
pub(crate) fn read_control() -> Control {
    let value: u64;
    // SAFETY: reading FPCR has no effect but the read.
    unsafe {
        asm!("mrs {}, fpcr", out(reg) value, options(nostack, preserves_flags));
    }
    value
}

/// Sets the calling thread's FPCR.
pub(crate) fn write_control(value: Control) {
    // SAFETY: FPCR may be written from user space; `value` is `IEEE` or was
    // read from the same register.
    unsafe {
        asm!("msr fpcr, {}", in(reg) value, options(nostack, preserves_flags));
    }
}
