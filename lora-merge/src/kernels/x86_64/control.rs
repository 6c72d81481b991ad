//! MXCSR, which decides about rounding and subnormals.

#![expect(unsafe_code, reason = "no safe access to MXCSR exists")]

use std::arch::asm;

/// A value of MXCSR.
pub(crate) type Control = u32;

/// Round to nearest, subnormals honoured, every exception masked: the value
/// at process start.
pub(crate) const IEEE: Control = 0x1F80;

/// Flush-to-zero and denormals-are-zero, for tests.
#[cfg(test)]
pub(crate) const FLUSHING: Control = 0x8040;

/// The calling thread's MXCSR.
pub(crate) fn read_control() -> Control {
    let mut value = 0_u32;
    // SAFETY: `stmxcsr` stores four bytes at the address given, which is that
    // of a local `u32`.
    unsafe {
        asm!("stmxcsr [{}]", in(reg) &raw mut value, options(nostack, preserves_flags));
    }
    value
}

/// Sets the calling thread's MXCSR.
pub(crate) fn write_control(value: Control) {
    // SAFETY: `ldmxcsr` reads four bytes at the address given. `value` is
    // `IEEE` or was read from the same register, so no reserved bit is set.
    unsafe {
        asm!("ldmxcsr [{}]", in(reg) &raw const value, options(nostack, preserves_flags));
    }
}
