//! Stochastic rounding: the random number and the choice it makes.
//!
//! The number is a pure function of the key and of the element's place in the
//! whole tensor. Tiles and threads cannot change it, and no state is kept.

use super::float::FloatType;

/// The uniform number in [0, 1), a multiple of 2⁻⁵³, for one element:
///
/// ```text
/// mix(z) = z ← (z ⊕ z≫30)·0xBF58476D1CE4E5B9
///          z ← (z ⊕ z≫27)·0x94D049BB133111EB
///          z ⊕ z≫31
/// u      = (mix(mix(key) + (index + 1)·0x9E3779B97F4A7C15) ≫ 11) · 2⁻⁵³
/// ```
///
/// all modulo 2⁶⁴: the SplitMix64 generator, seeded by the mixed key and read
/// at `index`. Mixing the key first keeps neighbouring keys from sharing a
/// stream.
#[inline(always)]
pub(crate) fn uniform(key: u64, index: u64) -> f64 {
    const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;
    const ULP: f64 = 1.0 / (1u64 << 53) as f64;
    let z = mix(key).wrapping_add(index.wrapping_add(1).wrapping_mul(GOLDEN));
    (mix(z) >> 11) as f64 * ULP
}

#[inline(always)]
fn mix(z: u64) -> u64 {
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Rounds `value` to one of its two neighbours in `to`, the upper one with
/// probability `(value − lower) / (upper − lower)`.
///
/// Values the type holds stay as they are. Values beyond the largest finite
/// one have no upper neighbour to choose: those, and NaN, round to nearest.
#[inline(always)]
pub(crate) fn round(value: f64, to: FloatType, key: u64, index: u64) -> u32 {
    if value.is_nan() || value.abs() > to.max_finite() {
        return to.encode(value);
    }
    let (inner, exact) = to.truncate(value);
    if exact {
        return inner;
    }
    // Bit patterns order magnitudes, so the neighbours are `inner` and the
    // next one, and for negative values the next one is the lower. Arithmetic
    // in place of branches, which nobody could predict.
    let negative = u32::from(value < 0.0);
    let low = f64::from(to.decode(inner + negative));
    let high = f64::from(to.decode(inner + 1 - negative));
    // The probability is (value - low) / (high - low). The divisor is a power
    // of two and everything here is exact, so it may as well multiply.
    let up = uniform(key, index) * (high - low) < value - low;
    inner + (u32::from(up) ^ negative)
}

#[cfg(test)]
mod tests {
    use super::{round, uniform};
    use crate::kernels::FloatType;

    #[test]
    fn the_formula_is_pinned() {
        // SplitMix64 seeded with mix(0) = 0: its published first outputs.
        assert_eq!(uniform(0, 0), (0xE220_A839_7B1D_CDAF_u64 >> 11) as f64 / 2f64.powi(53));
        assert_eq!(uniform(0, 1), (0x6E78_9E6A_A1B9_65F4_u64 >> 11) as f64 / 2f64.powi(53));
    }

    #[test]
    fn numbers_are_uniform() {
        const COUNT: u64 = 100_000;
        for key in [0, 1, 2, u64::MAX] {
            let mut buckets = [0_u32; 64];
            for index in 0..COUNT {
                buckets[(uniform(key, index) * 64.0) as usize] += 1;
            }
            let expected = COUNT as f64 / 64.0;
            let chi_squared: f64 =
                buckets.iter().map(|&n| (f64::from(n) - expected).powi(2) / expected).sum();
            // 63 degrees of freedom: mean 63, deviation 11.2.
            assert!((20.0..120.0).contains(&chi_squared), "key {key}: {chi_squared}");
        }
    }

    #[test]
    fn the_mean_is_the_value() {
        const COUNT: u32 = 20_000;
        for float in FloatType::ALL {
            for value in [1.001_234_567_891, -0.033_333_333_3, 3.0e-8, 1.0 - 2f64.powi(-30)] {
                let ulp = {
                    let (inner, _) = float.truncate(value);
                    f64::from(float.decode(inner + 1)) - f64::from(float.decode(inner))
                };
                let sum: f64 = (0..COUNT)
                    .map(|index| f64::from(float.decode(round(value, float, 7, index.into()))))
                    .map(|rounded| (rounded - value) / ulp.abs())
                    .sum();
                // The deviation of one choice is at most half a unit.
                let deviations = sum / (0.5 * f64::from(COUNT).sqrt());
                assert!(deviations.abs() < 4.5, "{float} {value}: {deviations}");
            }
        }
    }

    #[test]
    fn exact_and_extreme_values_are_not_chosen() {
        for float in FloatType::ALL {
            for key in 0..50 {
                let max = float.infinity() - 1;
                assert_eq!(round(float.max_finite(), float, key, 3), max);
                assert_eq!(round(0.25, float, key, 3), float.encode(0.25));
                assert_eq!(round(f64::NAN, float, key, 3), float.canonical_nan());
                assert_eq!(round(f64::INFINITY, float, key, 3), float.infinity());
                assert_eq!(round(1e300, float, key, 3), float.infinity());
                let barely_more = float.max_finite() * (1.0 + 1e-9);
                assert_eq!(round(barely_more, float, key, 3), max);
                // Below the smallest subnormal: it or zero, with the sign kept.
                let tiny = -f64::from(float.decode(1)) * 0.5;
                let rounded = round(tiny, float, key, 3);
                assert!([0, 1].contains(&float.magnitude(rounded)));
                assert_ne!(rounded, float.magnitude(rounded));
            }
        }
    }
}
