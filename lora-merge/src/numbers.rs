//! Stored numbers → f32, exactly.

use lora_format::{Dtype, Tensor};

use crate::kernels::FloatType;

/// The kernels' name of a dtype they know.
pub(crate) fn float_type(dtype: Dtype) -> Option<FloatType> {
    match dtype {
        Dtype::F32 => Some(FloatType::F32),
        Dtype::F16 => Some(FloatType::F16),
        Dtype::Bf16 => Some(FloatType::Bf16),
        _ => None,
    }
}

/// The dtype that the kernels call this.
pub(crate) fn dtype_of(float: FloatType) -> Dtype {
    match float {
        FloatType::F32 => Dtype::F32,
        FloatType::F16 => Dtype::F16,
        FloatType::Bf16 => Dtype::Bf16,
    }
}

/// Every `step`-th element of a tensor from `first` on, until `values` is full. The dtype was
/// checked when the tensor was read.
pub(crate) fn decode_into(tensor: &Tensor, first: usize, step: usize, values: &mut [f32]) {
    let float = float_type(tensor.dtype).unwrap_or(FloatType::F32);
    decode_bytes(float, tensor.bytes(), first, step, values);
}

/// The same of bytes.
pub(crate) fn decode_bytes(
    float: FloatType,
    bytes: &[u8],
    first: usize,
    step: usize,
    values: &mut [f32],
) {
    let width = float.size();
    let number = |element: &[u8]| match *element {
        [a, b] => float.decode(u32::from(u16::from_le_bytes([a, b]))),
        [a, b, c, d] => f32::from_le_bytes([a, b, c, d]),
        _ => f32::NAN,
    };
    if step == 1 {
        let elements = bytes[first * width..][..values.len() * width].chunks_exact(width);
        for (value, element) in values.iter_mut().zip(elements) {
            *value = number(element);
        }
        return;
    }
    for (index, value) in values.iter_mut().enumerate() {
        let at = (first + index * step) * width;
        *value = number(&bytes[at..at + width]);
    }
}

/// How many elements have all exponent bits set, and the first of them.
pub(crate) fn non_finite(dtype: Dtype, bytes: &[u8]) -> Option<(usize, usize)> {
    let pair = |at: &[u8]| u32::from(u16::from_le_bytes([at[0], at[1]]));
    let word = |at: &[u8]| u32::from_le_bytes([at[0], at[1], at[2], at[3]]);
    let scan = |width: usize, mask: u32, read: &dyn Fn(&[u8]) -> u32| {
        let bad = |element: &[u8]| read(element) & mask == mask;
        let count = bytes.chunks_exact(width).filter(|&element| bad(element)).count();
        let first = bytes.chunks_exact(width).position(bad)?;
        Some((count, first))
    };
    match dtype {
        Dtype::F16 => scan(2, 0x7C00, &pair),
        Dtype::Bf16 => scan(2, 0x7F80, &pair),
        _ => scan(4, 0x7F80_0000, &word),
    }
}

/// The bits of the next finite value above or below.
pub(crate) fn neighbour(float: FloatType, bits: u32, above: bool) -> Option<u32> {
    let sign_bit = 1 << (float.size() * 8 - 1);
    let (sign, magnitude) = (bits & sign_bit, bits & (sign_bit - 1));
    if magnitude == 0 {
        return Some(if above { 1 } else { sign_bit | 1 });
    }
    let grows = above == (sign == 0);
    let magnitude = if grows { magnitude + 1 } else { magnitude - 1 };
    (magnitude < float.infinity()).then_some(sign | magnitude)
}

/// How many values of the type lie from one to the other; `None` if one of them is NaN.
pub(crate) fn steps_between(float: FloatType, first: u32, second: u32) -> Option<u64> {
    let place = |bits: u32| {
        let sign_bit = 1 << (float.size() * 8 - 1);
        let magnitude = bits & (sign_bit - 1);
        let signed =
            if bits & sign_bit == 0 { i64::from(magnitude) } else { -i64::from(magnitude) };
        (magnitude <= float.infinity()).then_some(signed)
    };
    Some(place(first)?.abs_diff(place(second)?))
}
