//! The small number formats of codes and scales, and how to round to them.

use lora_format::Dtype;

use crate::kernels::FloatType;

/// What a code stands for before it is scaled.
///
/// A code takes 2, 4 or 8 bits; codes lie in a byte from its least significant bit up, so that an
/// i32 of packed codes needs no word arithmetic: safetensors is little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Codes {
    /// OCP FP8 E4M3: 1 sign, 4 exponent and 3 mantissa bits, bias 7, NaN and no infinity.
    E4m3,
    /// OCP FP8 E5M2: the upper half of an IEEE binary16.
    E5m2,
    /// OCP FP4 E2M1: ±{0, ½, 1, 1½, 2, 3, 4, 6}.
    E2m1,
    /// Two's complement.
    Int8,
    /// Unsigned, standing for the code less 2.
    Offset2,
    /// Unsigned, standing for the code less 8.
    Offset4,
    /// Unsigned, standing for the code less 128.
    Offset8,
}

impl Codes {
    /// Bits of a code.
    pub(super) fn bits(self) -> usize {
        match self {
            Codes::E4m3 | Codes::E5m2 | Codes::Int8 | Codes::Offset8 => 8,
            Codes::E2m1 | Codes::Offset4 => 4,
            Codes::Offset2 => 2,
        }
    }

    /// Decodes the codes `first .. first + out.len()` of `bytes`, each result being `map` of what
    /// the code stands for.
    ///
    /// # Panics
    /// If `bytes` holds fewer codes.
    #[inline(always)]
    pub(super) fn decode(
        self,
        bytes: &[u8],
        first: usize,
        out: &mut [f32],
        map: impl Fn(f32) -> f32,
    ) {
        match self {
            Codes::E4m3 => decode(&E4M3, bytes, first, out, map),
            Codes::E5m2 => decode(&E5M2, bytes, first, out, map),
            Codes::E2m1 => decode(&E2M1, bytes, first, out, map),
            Codes::Int8 => decode(&INT8, bytes, first, out, map),
            Codes::Offset2 => decode(&OFFSET2, bytes, first, out, map),
            Codes::Offset4 => decode(&OFFSET4, bytes, first, out, map),
            Codes::Offset8 => decode(&OFFSET8, bytes, first, out, map),
        }
    }

    /// What the nearest code to `value` stands for, ties to even, once `shift` (a zero point) is
    /// added: beyond the range, its end; for NaN, NaN.
    #[inline(always)]
    pub(super) fn nearest(self, value: f32, shift: f32) -> f32 {
        let (least, most) = match self {
            Codes::E4m3 => return nearest_float(value + shift, 3, -6, 448.0),
            Codes::E5m2 => return nearest_float(value + shift, 2, -14, 57_344.0),
            Codes::E2m1 => return nearest_float(value + shift, 1, 0, 6.0),
            Codes::Int8 | Codes::Offset8 => (-128.0, 127.0),
            Codes::Offset4 => (-8.0, 7.0),
            Codes::Offset2 => (-2.0, 1.0),
        };
        (value + shift).round_ties_even().clamp(least, most)
    }
}

/// As [`Codes::decode`], with the values of all codes that one byte holds.
#[inline(always)]
fn decode<const PER_BYTE: usize>(
    table: &[[f32; PER_BYTE]; 256],
    bytes: &[u8],
    first: usize,
    out: &mut [f32],
    map: impl Fn(f32) -> f32,
) {
    let bytes = &bytes[first / PER_BYTE..(first + out.len()).div_ceil(PER_BYTE)];
    // Codes of the first byte that come before `first`.
    let skipped = first % PER_BYTE;
    let (bytes, out) = if skipped == 0 {
        (bytes, out)
    } else {
        let (head, rest) = out.split_at_mut(out.len().min(PER_BYTE - skipped));
        let Some((&byte, bytes)) = bytes.split_first() else { return };
        for (slot, &value) in head.iter_mut().zip(&table[usize::from(byte)][skipped..]) {
            *slot = map(value);
        }
        (bytes, rest)
    };
    let (whole, tail) = out.as_chunks_mut::<PER_BYTE>();
    for (slots, &byte) in whole.iter_mut().zip(bytes) {
        *slots = table[usize::from(byte)].map(&map);
    }
    if let Some(&byte) = bytes.get(whole.len()) {
        for (slot, &value) in tail.iter_mut().zip(&table[usize::from(byte)]) {
            *slot = map(value);
        }
    }
}

/// The nearest multiple of the unit in the last place of a binary format without infinities:
/// `mantissa` stored bits, `lowest` the smallest normal exponent, `largest` the largest value.
#[inline(always)]
fn nearest_float(value: f32, mantissa: i32, lowest: i32, largest: f32) -> f32 {
    let value = value.clamp(-largest, largest);
    let exponent = ((value.to_bits() >> 23) & 0xFF) as i32 - 127;
    let unit = power_of_two(exponent.clamp(lowest, 127) - mantissa);
    (value / unit).round_ties_even() * unit
}

/// 2ⁿ for −126 ≤ n ≤ 127.
const fn power_of_two(n: i32) -> f32 {
    f32::from_bits(((n + 127) as u32) << 23)
}

const fn e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = ((code >> 3) as u32 & 15, code as u32 & 7);
    let magnitude = match (exponent, mantissa) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa as f32 * power_of_two(-9),
        _ => f32::from_bits(((exponent + 120) << 23) | (mantissa << 20)),
    };
    if code >> 7 == 1 { -magnitude } else { magnitude }
}

const fn e5m2(code: u8) -> f32 {
    let (exponent, mantissa) = ((code >> 2) as u32 & 31, code as u32 & 3);
    let magnitude = match (exponent, mantissa) {
        (31, 0) => f32::INFINITY,
        (31, _) => f32::NAN,
        (0, _) => mantissa as f32 * power_of_two(-16),
        _ => f32::from_bits(((exponent + 112) << 23) | (mantissa << 21)),
    };
    if code >> 7 == 1 { -magnitude } else { magnitude }
}

const fn e2m1(code: u8) -> f32 {
    let magnitude = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][(code & 7) as usize];
    if code & 8 == 8 { -magnitude } else { magnitude }
}

/// The values of the codes in every byte, by the value of a single code.
macro_rules! table {
    ($per_byte:literal, $value:expr) => {{
        let mut table = [[0.0; $per_byte]; 256];
        let bits = 8 / $per_byte;
        let mut byte = 0;
        while byte < 256 {
            let mut place = 0;
            while place < $per_byte {
                let code = (byte >> (place * bits)) & ((1 << bits) - 1);
                table[byte][place] = $value(code as u8);
                place += 1;
            }
            byte += 1;
        }
        table
    }};
}

const fn int8(code: u8) -> f32 {
    code.cast_signed() as f32
}

const fn offset2(code: u8) -> f32 {
    code as f32 - 2.0
}

const fn offset4(code: u8) -> f32 {
    code as f32 - 8.0
}

const fn offset8(code: u8) -> f32 {
    code as f32 - 128.0
}

static E4M3: [[f32; 1]; 256] = table!(1, e4m3);
static E5M2: [[f32; 1]; 256] = table!(1, e5m2);
static INT8: [[f32; 1]; 256] = table!(1, int8);
static OFFSET8: [[f32; 1]; 256] = table!(1, offset8);
static OFFSET2: [[f32; 4]; 256] = table!(4, offset2);
static OFFSET4: [[f32; 2]; 256] = table!(2, offset4);
/// Both values of every byte of FP4 codes, the lower nibble's first.
pub(super) static E2M1: [[f32; 2]; 256] = table!(2, e2m1);

/// How a scale is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ScaleType {
    Float(FloatType),
    /// FP8 E4M3, as NVFP4 has it.
    E4m3,
    /// A byte e that stands for 2^(e − 127).
    Exponent,
    /// OCP E8M0: as [`ScaleType::Exponent`], but 255 is NaN.
    E8m0,
}

impl ScaleType {
    /// The dtypes that [`ScaleType::of`] knows.
    pub(super) const DTYPES: [Dtype; 6] =
        [Dtype::F32, Dtype::F16, Dtype::Bf16, Dtype::F8_E4M3, Dtype::U8, Dtype::F8_E8M0];

    /// How a tensor of this dtype stores scales, U8 meaning exponents.
    pub(super) fn of(dtype: Dtype) -> Option<ScaleType> {
        Some(match dtype {
            Dtype::F32 => ScaleType::Float(FloatType::F32),
            Dtype::F16 => ScaleType::Float(FloatType::F16),
            Dtype::Bf16 => ScaleType::Float(FloatType::Bf16),
            Dtype::F8_E4M3 => ScaleType::E4m3,
            Dtype::U8 => ScaleType::Exponent,
            Dtype::F8_E8M0 => ScaleType::E8m0,
            _ => return None,
        })
    }

    /// The scale at `index`, exactly.
    ///
    /// # Panics
    /// If `bytes` ends before it.
    #[inline(always)]
    pub(super) fn at(self, bytes: &[u8], index: usize) -> f32 {
        match self {
            ScaleType::Float(FloatType::F32) => {
                let at = &bytes[index * 4..][..4];
                f32::from_le_bytes([at[0], at[1], at[2], at[3]])
            }
            ScaleType::Float(half) => {
                let at = &bytes[index * 2..][..2];
                half.decode(u32::from(u16::from_le_bytes([at[0], at[1]])))
            }
            ScaleType::E4m3 => E4M3[usize::from(bytes[index])][0],
            ScaleType::Exponent => exponent(bytes[index]),
            ScaleType::E8m0 if bytes[index] == 255 => f32::NAN,
            ScaleType::E8m0 => exponent(bytes[index]),
        }
    }
}

/// 2^(byte − 127); infinite for 255.
#[inline(always)]
pub(super) fn exponent(byte: u8) -> f32 {
    // 2⁻¹²⁷ is the one that f32 holds as a subnormal.
    if byte == 0 { f32::from_bits(1 << 22) } else { f32::from_bits(u32::from(byte) << 23) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Codes; 7] = [
        Codes::E4m3,
        Codes::E5m2,
        Codes::E2m1,
        Codes::Int8,
        Codes::Offset2,
        Codes::Offset4,
        Codes::Offset8,
    ];

    fn values(codes: Codes) -> Vec<f32> {
        let bytes: Vec<u8> = (0..=255).collect();
        let mut out = vec![0.0; 256 * 8 / codes.bits()];
        codes.decode(&bytes, 0, &mut out, |value| value);
        out
    }

    #[test]
    fn eight_bit_floats_follow_their_definition() {
        for code in 0..0x7F_u8 {
            let (exponent, mantissa) = (i32::from(code >> 3), f64::from(code & 7) / 8.0);
            let wanted = match exponent {
                0 => mantissa * 2f64.powi(-6),
                _ => (1.0 + mantissa) * 2f64.powi(exponent - 7),
            };
            assert_eq!(f64::from(e4m3(code)), wanted);
            assert_eq!(f64::from(e4m3(code | 0x80)), -wanted);
        }
        assert!(e4m3(0x7F).is_nan() && e4m3(0xFF).is_nan());
        for code in 0..=255_u8 {
            let half = FloatType::F16.decode(u32::from(code) << 8);
            assert!(e5m2(code) == half || (e5m2(code).is_nan() && half.is_nan()));
        }
    }

    #[test]
    fn every_run_of_codes_is_the_same_part_of_the_whole() {
        let bytes: Vec<u8> = (0..=255).collect();
        for codes in ALL {
            let all = values(codes);
            for first in 0..9 {
                for count in 0..20 {
                    let mut out = vec![9.0; count];
                    codes.decode(&bytes, first, &mut out, |value| 2.0 * value);
                    for (found, wanted) in out.iter().zip(&all[first..]) {
                        assert!(*found == 2.0 * wanted || wanted.is_nan());
                    }
                }
            }
        }
    }

    #[test]
    fn rounding_finds_the_nearest_of_all_codes() {
        for codes in ALL {
            let all: Vec<f32> = values(codes).into_iter().filter(|v| v.is_finite()).collect();
            let largest = all.iter().fold(0.0_f32, |a, b| a.max(b.abs()));
            for &value in &all {
                assert_eq!(codes.nearest(value, 0.0), value, "{codes:?}");
            }
            for step in -3000..=3000 {
                let value = largest * step as f32 / 2500.0;
                let rounded = codes.nearest(value, 0.0);
                assert!(all.contains(&rounded), "{codes:?}: {value} became {rounded}");
                let distance = |to: f32| (f64::from(to) - f64::from(value)).abs();
                let best = all.iter().map(|&to| distance(to)).fold(f64::INFINITY, f64::min);
                assert_eq!(distance(rounded), best, "{codes:?}: {value} became {rounded}");
            }
            assert!(codes.nearest(f32::NAN, 0.0).is_nan());
        }
    }

    #[test]
    fn ties_go_to_even() {
        assert_eq!(Codes::E2m1.nearest(2.5, 0.0), 2.0);
        assert_eq!(Codes::E2m1.nearest(3.5, 0.0), 4.0);
        assert_eq!(Codes::E2m1.nearest(0.25, 0.0), 0.0);
        assert_eq!(Codes::E4m3.nearest(17.0, 0.0), 16.0);
        assert_eq!(Codes::Offset4.nearest(2.5, 0.0), 2.0);
        assert_eq!(Codes::Offset4.nearest(2.5, 1.0), 4.0);
    }

    #[test]
    fn exponents_cover_the_range_of_f32() {
        for byte in 0..=254_u8 {
            assert_eq!(f64::from(exponent(byte)), 2f64.powi(i32::from(byte) - 127));
        }
        assert_eq!(exponent(255), f32::INFINITY);
        assert!(ScaleType::E8m0.at(&[255], 0).is_nan());
    }
}
