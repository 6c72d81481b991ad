//! The three storage types and their conversions, one element at a time.
//!
//! Everything here is integer arithmetic on bit patterns, so no rounding mode
//! and no flush-to-zero setting can reach it. There is one rounding
//! ([`FloatType::encode`]) and it starts from `f64`: every `f32` widens to
//! `f64` exactly, so a single routine serves both and cannot round twice.

use std::fmt;

/// How an element is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FloatType {
    /// IEEE binary32, four bytes.
    F32,
    /// IEEE binary16, two bytes.
    F16,
    /// bfloat16, the upper half of a binary32, two bytes.
    Bf16,
}

impl FloatType {
    /// All three, for tables and tests.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    /// Bytes per element.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// Stored mantissa bits, without the implicit one.
    const fn mantissa_bits(self) -> u32 {
        match self {
            Self::F32 => 23,
            Self::F16 => 10,
            Self::Bf16 => 7,
        }
    }

    /// Exponent bias; the smallest normal exponent is `1 - bias`.
    const fn bias(self) -> i32 {
        match self {
            Self::F32 | Self::Bf16 => 127,
            Self::F16 => 15,
        }
    }

    const fn sign_bit(self) -> u32 {
        match self {
            Self::F32 => 1 << 31,
            Self::F16 | Self::Bf16 => 1 << 15,
        }
    }

    /// The bits of +∞. Every larger magnitude is a NaN.
    #[must_use]
    pub const fn infinity(self) -> u32 {
        match self {
            Self::F32 => 0x7F80_0000,
            Self::F16 => 0x7C00,
            Self::Bf16 => 0x7F80,
        }
    }

    /// The one NaN this module ever produces: positive, quiet, empty payload.
    #[must_use]
    pub const fn canonical_nan(self) -> u32 {
        self.infinity() | (1 << (self.mantissa_bits() - 1))
    }

    /// The largest finite value.
    #[must_use]
    pub fn max_finite(self) -> f64 {
        f64::from(self.decode(self.infinity() - 1))
    }

    pub(crate) const fn magnitude(self, bits: u32) -> u32 {
        bits & (self.sign_bit() - 1)
    }

    /// Whether `bits` is neither infinite nor NaN.
    #[must_use]
    pub const fn is_finite(self, bits: u32) -> bool {
        self.magnitude(bits) < self.infinity()
    }

    /// Whether `bits` is ±∞.
    #[must_use]
    pub const fn is_infinite(self, bits: u32) -> bool {
        self.magnitude(bits) == self.infinity()
    }

    /// The value of a bit pattern, exactly; NaN payloads travel along.
    #[inline(always)]
    #[must_use]
    pub fn decode(self, bits: u32) -> f32 {
        match self {
            Self::F32 => f32::from_bits(bits),
            Self::Bf16 => f32::from_bits(bits << 16),
            Self::F16 => {
                let sign = (bits & 0x8000) << 16;
                let exponent = (bits >> 10) & 0x1F;
                let mantissa = bits & 0x3FF;
                let magnitude = match exponent {
                    // 2⁻²⁴ is far above the f32 subnormals: this is exact.
                    0 => (mantissa as f32 * f32::from_bits(0x3380_0000)).to_bits(),
                    31 => 0x7F80_0000 | (mantissa << 13),
                    _ => ((exponent + 112) << 23) | (mantissa << 13),
                };
                f32::from_bits(sign | magnitude)
            }
        }
    }

    /// The nearest bit pattern, ties to even, in one rounding. Overflow gives
    /// ±∞ and any NaN gives [`FloatType::canonical_nan`].
    #[inline(always)]
    #[must_use]
    pub fn encode(self, value: f64) -> u32 {
        if value.is_nan() {
            return self.canonical_nan();
        }
        let cut = self.cut(value);
        let up = cut.rest > cut.half || (cut.rest == cut.half && cut.kept & 1 == 1);
        // A carry out of the mantissa lands in the exponent, where it belongs.
        let magnitude = (cut.kept + u64::from(up)).min(u64::from(self.infinity()));
        cut.sign | magnitude as u32
    }

    /// The neighbour of a finite `value` towards zero, and whether it is
    /// `value` itself. Magnitudes above the largest finite value are not for
    /// this function.
    #[inline(always)]
    pub(crate) fn truncate(self, value: f64) -> (u32, bool) {
        let cut = self.cut(value);
        (cut.sign | cut.kept as u32, cut.rest == 0)
    }

    /// Splits a non-NaN `value` at the last bit this type can hold.
    #[inline(always)]
    fn cut(self, value: f64) -> Cut {
        let bits = value.to_bits();
        let biased = (bits >> 52) as i32 & 0x7FF;
        let fraction = bits & ((1 << 52) - 1);
        let (exponent, significand) = match biased {
            0 => (-1022, fraction),
            _ => (biased - 1023, fraction | (1 << 52)),
        };
        let mantissa_bits = self.mantissa_bits();
        // Below the smallest normal exponent the grid stops getting finer.
        let lowest = 1 - self.bias();
        let missing = (lowest - exponent).max(0) as u32;
        // 63 clears any significand and still leaves `half` a bit to sit on.
        let shift = (52 - mantissa_bits + missing).min(63);
        let field = (exponent.max(lowest) - lowest) as u64;
        Cut {
            sign: if bits >> 63 == 1 { self.sign_bit() } else { 0 },
            // The implicit one of a normal value adds itself to `field`.
            kept: (field << mantissa_bits) + (significand >> shift),
            rest: significand & ((1 << shift) - 1),
            half: 1 << (shift - 1),
        }
    }
}

/// A magnitude cut in two: what fits the storage type and what is left over.
struct Cut {
    sign: u32,
    kept: u64,
    rest: u64,
    half: u64,
}

impl fmt::Display for FloatType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::FloatType;
    use crate::kernels::testing::Noise;

    /// Rounds on the value side: to a multiple of the unit in the last place.
    fn nearest(float: FloatType, value: f64) -> f64 {
        let (digits, lowest) = match float {
            FloatType::F32 => (24, -126),
            FloatType::F16 => (11, -14),
            FloatType::Bf16 => (8, -126),
        };
        if value == 0.0 || !value.is_finite() {
            return value;
        }
        let exponent = ((value.to_bits() >> 52) as i32 & 0x7FF) - 1023;
        let ulp = 2f64.powi(exponent.max(lowest) + 1 - digits);
        let rounded = (value / ulp).round_ties_even() * ulp;
        if rounded.abs() > float.max_finite() { f64::INFINITY.copysign(value) } else { rounded }
    }

    fn check(float: FloatType, value: f64) {
        let bits = float.encode(value);
        let (got, wanted) = (f64::from(float.decode(bits)), nearest(float, value));
        assert_eq!(got.to_bits(), wanted.to_bits(), "{float} of {value:e}: {got:e}, {wanted:e}");
    }

    #[test]
    fn every_pattern_survives() {
        for float in [FloatType::F16, FloatType::Bf16] {
            for bits in 0..=0xFFFF {
                let value = float.decode(bits);
                let wanted = if value.is_nan() { float.canonical_nan() } else { bits };
                assert_eq!(float.encode(f64::from(value)), wanted);
                assert_eq!(float.is_finite(bits), value.is_finite());
                assert_eq!(float.is_infinite(bits), value.is_infinite());
            }
        }
    }

    #[test]
    fn decoding_agrees_with_its_definition() {
        for bits in 0..0x7C00_u32 {
            let (exponent, mantissa) = ((bits >> 10) as i32, f64::from(bits & 0x3FF));
            let wanted = match exponent {
                0 => mantissa * 2f64.powi(-24),
                _ => (1024.0 + mantissa) * 2f64.powi(exponent - 25),
            };
            assert_eq!(f64::from(FloatType::F16.decode(bits)), wanted);
            assert_eq!(f64::from(FloatType::F16.decode(bits | 0x8000)), -wanted);
        }
    }

    #[test]
    fn encoding_rounds_once() {
        let mut noise = Noise::new(6);
        for float in FloatType::ALL {
            for _ in 0..300_000 {
                let bits = u64::from(noise.bits()) << 32 | u64::from(noise.bits());
                // Exponents from below the subnormals to beyond the overflow.
                let exponent = 1023 - 160 + u64::from(noise.below(300));
                let value = f64::from_bits(bits & !(0x7FF << 52) | exponent << 52);
                check(float, value);
            }
        }
    }

    #[test]
    fn encoding_f32_agrees_everywhere() {
        for bits in (0..u32::MAX).step_by(2039) {
            let value = f32::from_bits(bits);
            if !value.is_nan() {
                for float in FloatType::ALL {
                    check(float, f64::from(value));
                }
                let parity = (bits >> 16) & 1;
                let by_carry = (bits + 0x7FFF + parity) >> 16;
                assert_eq!(FloatType::Bf16.encode(f64::from(value)), by_carry);
            }
        }
    }

    #[test]
    fn ties_and_their_neighbours() {
        for float in FloatType::ALL {
            let step = if float == FloatType::F32 { 65_521 } else { 1 };
            for bits in (0..float.infinity()).step_by(step) {
                let low = f64::from(float.decode(bits));
                // Beyond the largest finite value the tie is where the next
                // value would be.
                let high = match bits + 1 == float.infinity() {
                    true => low + (low - f64::from(float.decode(bits - 1))),
                    false => f64::from(float.decode(bits + 1)),
                };
                let middle = f64::midpoint(low, high);
                for value in [middle.next_down(), middle, middle.next_up()] {
                    check(float, value);
                    check(float, -value);
                }
            }
        }
    }

    #[test]
    fn encoding_to_f32_is_the_languages_cast() {
        let mut noise = Noise::new(7);
        for _ in 0..200_000 {
            let bits = u64::from(noise.bits()) << 32 | u64::from(noise.bits());
            let value = f64::from_bits(bits);
            if !value.is_nan() {
                assert_eq!(FloatType::F32.encode(value), (value as f32).to_bits());
            }
        }
    }

    #[test]
    fn truncating_brackets_the_value() {
        let mut noise = Noise::new(8);
        for float in FloatType::ALL {
            for _ in 0..100_000 {
                let value = f64::from(noise.float()) * 2f64.powi(noise.below(60) as i32 - 44);
                let (inner, exact) = float.truncate(value);
                let (low, high) = (float.decode(inner), float.decode(inner + 1));
                assert!(f64::from(low).abs() <= value.abs(), "{float} {value:e}");
                assert!(value.abs() < f64::from(high).abs());
                assert_eq!(exact, f64::from(low) == value);
            }
        }
    }
}
