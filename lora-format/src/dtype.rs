//! Element types as safetensors stores them.

use std::fmt;
use std::str::FromStr;

/// The element type of a stored tensor.
///
/// The variants stand in the order of the safetensors reference implementation (ascending
/// alignment), because the order decides where a serialiser places a tensor: descending by this
/// order, then by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs, non_camel_case_types)]
#[non_exhaustive]
pub enum Dtype {
    Bool,
    F4,
    F6_E2M3,
    F6_E3M2,
    U8,
    I8,
    F8_E5M2,
    F8_E4M3,
    F8_E8M0,
    F8_E4M3Fnuz,
    F8_E5M2Fnuz,
    I16,
    U16,
    F16,
    Bf16,
    I32,
    U32,
    F32,
    C64,
    F64,
    I64,
    U64,
}

/// Every dtype with its name in a safetensors header and its size in bits.
const TABLE: [(Dtype, &str, u64); 22] = [
    (Dtype::Bool, "BOOL", 8),
    (Dtype::F4, "F4", 4),
    (Dtype::F6_E2M3, "F6_E2M3", 6),
    (Dtype::F6_E3M2, "F6_E3M2", 6),
    (Dtype::U8, "U8", 8),
    (Dtype::I8, "I8", 8),
    (Dtype::F8_E5M2, "F8_E5M2", 8),
    (Dtype::F8_E4M3, "F8_E4M3", 8),
    (Dtype::F8_E8M0, "F8_E8M0", 8),
    (Dtype::F8_E4M3Fnuz, "F8_E4M3FNUZ", 8),
    (Dtype::F8_E5M2Fnuz, "F8_E5M2FNUZ", 8),
    (Dtype::I16, "I16", 16),
    (Dtype::U16, "U16", 16),
    (Dtype::F16, "F16", 16),
    (Dtype::Bf16, "BF16", 16),
    (Dtype::I32, "I32", 32),
    (Dtype::U32, "U32", 32),
    (Dtype::F32, "F32", 32),
    (Dtype::C64, "C64", 64),
    (Dtype::F64, "F64", 64),
    (Dtype::I64, "I64", 64),
    (Dtype::U64, "U64", 64),
];

impl Dtype {
    /// All dtypes, in storage order.
    pub fn all() -> impl Iterator<Item = Dtype> {
        TABLE.iter().map(|row| row.0)
    }

    /// The name in a safetensors header, e.g. `BF16`.
    pub fn name(self) -> &'static str {
        TABLE[self as usize].1
    }

    /// The size of one element in bits (sub-byte types exist).
    pub fn bits(self) -> u64 {
        TABLE[self as usize].2
    }

    /// Whether this is one of the three types that adapters and their targets are stored in.
    pub fn is_merge_float(self) -> bool {
        matches!(self, Dtype::F32 | Dtype::F16 | Dtype::Bf16)
    }

    /// Bytes of a tensor of this type and shape, or `None` if the product overflows or a
    /// sub-byte tensor does not fill whole bytes.
    pub fn tensor_bytes(self, shape: &[usize]) -> Option<u64> {
        let elements = shape
            .iter()
            .try_fold(1u64, |product, &dimension| product.checked_mul(dimension as u64))?;
        let bits = elements.checked_mul(self.bits())?;
        bits.is_multiple_of(8).then_some(bits / 8)
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The dtype name is not one that safetensors defines.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown dtype `{0}`")]
pub struct UnknownDtype(pub String);

impl FromStr for Dtype {
    type Err = UnknownDtype;

    fn from_str(name: &str) -> Result<Self, UnknownDtype> {
        TABLE
            .iter()
            .find(|row| row.1 == name)
            .map(|row| row.0)
            .ok_or_else(|| UnknownDtype(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_follows_the_enum_and_the_reference_crate() {
        for (index, dtype) in Dtype::all().enumerate() {
            assert_eq!(dtype as usize, index);
            assert_eq!(dtype.name().parse(), Ok(dtype));
            let reference: safetensors::Dtype =
                serde_json::from_value(serde_json::Value::String(dtype.name().into())).unwrap();
            assert_eq!(reference.bitsize() as u64, dtype.bits());
            for other in Dtype::all() {
                let other_reference: safetensors::Dtype =
                    serde_json::from_value(serde_json::Value::String(other.name().into())).unwrap();
                assert_eq!(dtype.cmp(&other), reference.cmp(&other_reference));
            }
        }
    }
}
