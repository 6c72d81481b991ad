//! The one trait the vector algorithms need: sixteen lanes and what can be
//! done with them.
//!
//! Sixteen is a fact of the contract, not of a register: AVX-512 holds the
//! lanes in one register, AVX2 in two, NEON in four. An implementor is a
//! token whose existence proves that the CPU has the instructions, so the
//! methods are safe; they take it by value and it takes no space.

use super::factors::LANES;

/// Sixteen lanes of `f32`, and the operations of [`generic`](super::generic).
///
/// Every method is `#[inline(always)]` in every implementation, and so is
/// every function that calls one: only inside the `#[target_feature]` functions
/// at the bottom of the stack do the methods become single instructions.
/// Closures cannot promise to be inlined, so none may call a method.
pub(crate) trait Vector: Copy {
    /// Sixteen `f32`.
    type Floats: Copy;
    /// Sixteen `u32`.
    type Bits: Copy;
    /// Sixteen `f64`.
    type Doubles: Copy;
    /// Sixteen binary16 bit patterns, packed.
    type Halves: Copy;
    /// Sixteen yes-or-no answers.
    type Mask: Copy;

    /// How many groups of sixteen columns the product keeps in registers for
    /// four rows at a time; divides three.
    const GROUPS_AT_ONCE: usize;

    fn splat(self, value: f32) -> Self::Floats;
    fn load(self, from: &[f32; LANES]) -> Self::Floats;
    fn store(self, value: Self::Floats, to: &mut [f32; LANES]);
    /// Little-endian binary32.
    fn load_f32(self, from: &[u8; 64]) -> Self::Floats;
    fn store_f32(self, value: Self::Floats, to: &mut [u8; 64]);
    /// Little-endian bfloat16, exactly.
    fn load_bf16(self, from: &[u8; 32]) -> Self::Floats;
    /// The upper half of every lane; the lower half is dropped.
    fn store_bf16(self, value: Self::Floats, to: &mut [u8; 32]);
    fn load_halves(self, from: &[u8; 32]) -> Self::Halves;
    fn store_halves(self, value: Self::Halves, to: &mut [u8; 32]);
    /// Exact.
    fn widen_halves(self, value: Self::Halves) -> Self::Floats;
    /// To nearest, ties to even, subnormals included.
    fn narrow_to_halves(self, value: Self::Floats) -> Self::Halves;

    /// Hints that the element's cache line at byte `at`, which may lie beyond
    /// the end, will be read.
    fn will_read(self, bytes: &[u8], at: usize);
    /// Hints that it will be written.
    fn will_write(self, bytes: &mut [u8], at: usize);

    fn add(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    fn sub(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// `a · b + c`, one rounding.
    fn mul_add(self, a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;

    fn bits_of(self, value: Self::Floats) -> Self::Bits;
    fn floats_of(self, bits: Self::Bits) -> Self::Floats;
    fn add_bits(self, a: Self::Bits, b: u32) -> Self::Bits;
    fn and_bits(self, a: Self::Bits, b: u32) -> Self::Bits;
    /// `a + ((a ≫ 16) & 1)`: what turns rounding half up into half to even.
    fn add_parity_of_upper_half(self, a: Self::Bits) -> Self::Bits;

    fn is_nonzero(self, value: Self::Floats) -> Self::Mask;
    fn is_number(self, value: Self::Floats) -> Self::Mask;
    /// Both operands finite.
    fn is_less(self, a: Self::Floats, b: f32) -> Self::Mask;
    fn are_clear(self, value: Self::Bits, mask: u32) -> Self::Mask;
    fn are_equal(self, a: Self::Bits, b: Self::Bits) -> Self::Mask;
    fn none(self) -> Self::Mask;
    /// All lanes but the first `count`.
    fn beyond(self, count: usize) -> Self::Mask;
    fn not(self, mask: Self::Mask) -> Self::Mask;
    fn and(self, a: Self::Mask, b: Self::Mask) -> Self::Mask;
    fn or(self, a: Self::Mask, b: Self::Mask) -> Self::Mask;
    fn any(self, mask: Self::Mask) -> bool;
    fn count(self, mask: Self::Mask) -> u32;

    fn splat_f64(self, value: f64) -> Self::Doubles;
    fn load_f64(self, from: &[f64; LANES]) -> Self::Doubles;
    fn store_f64(self, value: Self::Doubles, to: &mut [f64; LANES]);
    fn widen(self, value: Self::Floats) -> Self::Doubles;
    /// To nearest, ties to even.
    fn narrow(self, value: Self::Doubles) -> Self::Floats;
    fn add_f64(self, a: Self::Doubles, b: Self::Doubles) -> Self::Doubles;
    fn mul_f64(self, a: Self::Doubles, b: Self::Doubles) -> Self::Doubles;
    /// `a · b + c`, one rounding.
    fn mul_add_f64(self, a: Self::Doubles, b: Self::Doubles, c: Self::Doubles) -> Self::Doubles;
}

/// `[f(0), f(1)]`, written out: what `array::from_fn` would do with a closure.
macro_rules! both {
    ($half:ident => $value:expr) => {
        $crate::kernels::vector::each!($half in 0, 1 => $value)
    };
}

/// The same for four registers.
macro_rules! four {
    ($quarter:ident => $value:expr) => {
        $crate::kernels::vector::each!($quarter in 0, 1, 2, 3 => $value)
    };
}

/// The same for eight registers.
#[allow(unused_macros, reason = "each target uses its own selection")]
macro_rules! eight {
    ($eighth:ident => $value:expr) => {
        $crate::kernels::vector::each!($eighth in 0, 1, 2, 3, 4, 5, 6, 7 => $value)
    };
}

macro_rules! each {
    ($index:ident in $($number:literal),* => $value:expr) => {
        [$({ let $index = $number; $value }),*]
    };
}

#[allow(unused_imports, reason = "each target uses its own selection")]
pub(crate) use {both, each, eight, four};
