//! What the shapes of an adapter's tensors say, and the words for what does not fit.

use std::fmt::Display;

use lora_format::Tensor;

use super::Matrix;
use crate::orientation::Orientation;

/// What a check returns: the reason, as "expected …, found …".
pub(super) type Fits = Result<(), String>;

/// The number of elements that dimensions span. A file may give any dimensions to a tensor without
/// elements, so the product may not fit.
pub(super) fn count(dimensions: &[usize]) -> usize {
    dimensions.iter().fold(1, |product, &length| product.saturating_mul(length))
}

/// A dimension, or 0 if there is no such dimension.
pub(super) fn dim(tensor: &Tensor, index: usize) -> usize {
    tensor.shape.get(index).copied().unwrap_or(0)
}

/// The elements. Other dtypes than floats have been refused by [`tensor`].
pub(super) fn decode(tensor: &Tensor) -> Vec<f32> {
    tensor.to_f32().unwrap_or_default()
}

/// Whether a tensor can be decoded, and whether its shape is as expected.
pub(super) fn tensor(tensor: &Tensor, expected: impl Display, fits: bool) -> Fits {
    let name = &tensor.name;
    if !tensor.dtype.is_merge_float() {
        return Err(format!("`{name}`: expected F32, F16 or BF16, found {}", tensor.dtype));
    }
    if !fits {
        return Err(format!("`{name}`: expected {expected}, found {:?}", tensor.shape));
    }
    Ok(())
}

/// Whether the matrix has these features.
pub(super) fn matrix(matrix: Matrix, out: usize, input: usize) -> Fits {
    if (matrix.out(), matrix.input()) == (out, input) && out > 0 && input > 0 {
        return Ok(());
    }
    Err(format!(
        "expected {out} outputs and {input} inputs, found {} and {}",
        matrix.out(),
        matrix.input()
    ))
}

/// Whether the matrix is stored this way. Methods that mix inputs do so within a row.
pub(super) fn stored(matrix: Matrix, expected: Orientation) -> Fits {
    if matrix.orientation == expected {
        return Ok(());
    }
    let (expected, found) = (expected.name(), matrix.orientation.name());
    Err(format!("expected a matrix stored as {expected}, found {found}"))
}

/// Multiplications that the preparation of one parameter may take: some twenty seconds of one core,
/// and more than the largest layers need with the settings that are in use.
const WORK: usize = 1 << 35;

/// Whether so many multiplications are few enough: their number is that of the factors, which may
/// be far more than the file has elements.
pub(super) fn work(what: &str, factors: &[usize]) -> Fits {
    if count(factors) <= WORK {
        return Ok(());
    }
    let found: Vec<String> = factors.iter().map(usize::to_string).collect();
    Err(format!("expected at most {WORK} multiplications for {what}, found {}", found.join("·")))
}

/// Whether a factor of the change is a number.
pub(super) fn scale(scale: f64) -> Fits {
    if scale.is_finite() { Ok(()) } else { Err(format!("expected a finite scale, found {scale}")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_bounded() {
        assert_eq!(work("it", &[32, 1024, 1024, 1024]), Ok(()));
        assert_eq!(work("it", &[usize::MAX, 0]), Ok(()));
        assert_eq!(
            work("it", &[33, 1024, 1024, 1024]).unwrap_err(),
            "expected at most 34359738368 multiplications for it, found 33·1024·1024·1024"
        );
        assert!(work("it", &[usize::MAX, usize::MAX]).is_err());
    }
}
