//! Scales that a format has no place for, multiplied into B.
//!
//! By a power of two that is exact, as long as no element overflows or loses bits below the
//! smallest normal number; anything else rounds and is refused unless the user allows it.

use half::{bf16, f16};

use super::{WriteOptions, Written};
use crate::dtype::Dtype;
use crate::tensor::Tensor;

/// Which of the `candidates`, each the scales that the format would give the changes, needs the
/// fewest inexact and then the fewest exact multiplications to give `scales`; of equals the first.
pub(super) fn choose(scales: &[f64], candidates: &[Vec<f64>]) -> Option<usize> {
    let cost = |units: &Vec<f64>| {
        let pairs = || scales.iter().zip(units).filter(|(scale, unit)| scale != unit);
        let inexact = pairs().filter(|(scale, unit)| !is_exact(**scale, **unit)).count();
        (inexact, pairs().count())
    };
    (0..candidates.len()).min_by_key(|&index| candidates.get(index).map(cost))
}

/// Whether `scale / unit` is a power of two.
fn is_exact(scale: f64, unit: f64) -> bool {
    const MANTISSA: u64 = (1 << 52) - 1;
    let factor = scale / unit;
    factor.is_normal()
        && factor.to_bits() & MANTISSA == 0
        && (unit * factor).to_bits() == scale.to_bits()
}

/// B of a change of scale `scale` for a file that gives it the scale `unit`.
///
/// # Errors
/// Why it cannot be written, if not exactly and that is not allowed.
pub(super) fn fold(
    module: &str,
    b: &Tensor,
    (scale, unit): (f64, f64),
    options: &WriteOptions,
    written: &mut Written,
) -> Result<Tensor, String> {
    if scale == unit {
        return Ok(b.clone());
    }
    let factor = scale / unit;
    let named = format!("the scale {scale} of `{module}`, where the file's gives {unit}");
    let Some((folded, kept)) = multiplied(b, factor).filter(|_| factor.is_finite()) else {
        return Err(named);
    };
    if kept && is_exact(scale, unit) {
        let change = "B is multiplied by the quotient, exactly";
        written.changes.push(format!("{named}: {change} ({factor})"));
    } else if options.allow_lossy {
        written.changes.push(format!("{named}: B is multiplied by {factor} and rounded"));
    } else {
        return Err(format!("{named} (B times {factor} would have to be rounded)"));
    }
    Ok(folded)
}

/// Every element times `factor`, rounded to the tensor's dtype, and whether none had to be; `None`
/// unless it is stored as F32, F16 or BF16.
fn multiplied(tensor: &Tensor, factor: f64) -> Option<(Tensor, bool)> {
    let mut exact = true;
    let mut bytes = Vec::with_capacity(tensor.bytes().len());
    // The product of an f32 and a power of two is exact in f64 wherever f32 could hold it.
    for value in tensor.to_f32()? {
        let product = f64::from(value) * factor;
        let kept = match tensor.dtype {
            Dtype::F32 => {
                let rounded = product as f32;
                bytes.extend(rounded.to_le_bytes());
                f64::from(rounded)
            }
            Dtype::F16 => {
                let rounded = f16::from_f64(product);
                bytes.extend(rounded.to_le_bytes());
                f64::from(rounded)
            }
            Dtype::Bf16 => {
                let rounded = bf16::from_f64(product);
                bytes.extend(rounded.to_le_bytes());
                f64::from(rounded)
            }
            _ => return None,
        };
        exact &= kept == product || (kept.is_nan() && value.is_nan());
    }
    let folded = Tensor::new(tensor.name.clone(), tensor.dtype, tensor.shape.clone(), bytes)?;
    Some((folded, exact))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn of(dtype: Dtype, values: &[f32]) -> Tensor {
        let bytes = |value: &f32| match dtype {
            Dtype::F16 => f16::from_f32(*value).to_le_bytes().to_vec(),
            Dtype::Bf16 => bf16::from_f32(*value).to_le_bytes().to_vec(),
            _ => value.to_le_bytes().to_vec(),
        };
        let data = values.iter().flat_map(bytes).collect();
        Tensor::new("b".to_owned(), dtype, vec![values.len()], data).unwrap()
    }

    fn folded(b: &Tensor, scale: f64, unit: f64, allow_lossy: bool) -> Result<Vec<f32>, String> {
        let options = WriteOptions { allow_lossy, ..WriteOptions::default() };
        let mut written = Written::default();
        fold("m", b, (scale, unit), &options, &mut written).map(|it| it.to_f32().unwrap())
    }

    #[test]
    fn powers_of_two_are_exact() {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            let b = of(dtype, &[1.5, -0.25, 0.0]);
            assert_eq!(folded(&b, 4.0, 2.0, false).unwrap(), [3.0, -0.5, 0.0]);
            assert_eq!(folded(&b, 0.3, 0.6, false).unwrap(), [0.75, -0.125, 0.0]);
            assert!(folded(&b, 3.0, 2.0, false).unwrap_err().contains("rounded"));
            assert_eq!(folded(&b, 3.0, 2.0, true).unwrap(), [2.25, -0.375, 0.0]);
        }
    }

    #[test]
    fn what_overflows_or_underflows_is_not() {
        let large = of(Dtype::F16, &[65504.0]);
        assert!(folded(&large, 2.0, 1.0, false).is_err());
        let small = of(Dtype::F16, &[3.0 * f16::MIN_POSITIVE_SUBNORMAL.to_f32()]);
        assert!(folded(&small, 1.0, 2.0, false).is_err());
        assert!(folded(&small, 1.0, 0.0, true).is_err(), "no factor");
    }

    #[test]
    fn the_cheapest_candidate() {
        let candidates = [vec![2.0; 3], vec![1.0; 3], vec![3.0; 3]];
        assert_eq!(choose(&[1.0, 1.0, 2.0], &candidates), Some(1));
        assert_eq!(choose(&[3.0, 3.0, 2.0], &candidates), Some(2));
    }
}
