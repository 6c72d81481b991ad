//! The GGUF container, versions 2 and 3: typed values, tensor descriptions, aligned data.
//!
//! ```text
//! ┌────────┬─────────┬─────────┬────────┬──────────────┬──────────────┬─────┬──────────────┐
//! │ "GGUF" │ version │ tensors │ values │ key, type,   │ name, ne,    │ pad │ data, each   │
//! │        │ u32     │ u64     │ u64    │ value; each  │ type, offset │     │ aligned      │
//! └────────┴─────────┴─────────┴────────┴──────────────┴──────────────┴─────┴──────────────┘
//! ```
//!
//! All little-endian: big-endian files are refused, and version 1, whose counts have another
//! width. The dimensions `ne` stand with the fastest first, so a row-major shape is `ne` reversed.
//! The layout is that of `gguf.cpp` of ggml and of its Python package gguf, against which the
//! tests hold both directions.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::dtype::Dtype;
use crate::error::{Error, GgufProblem, Result};
use crate::io::opened::OpenedFile;
use crate::limits;
use crate::tensor::{MappedFile, Tensor};

const MAGIC: &[u8; 4] = b"GGUF";
/// The version that is written.
const VERSION: u32 = 3;
/// The key of the alignment, and the alignment without it.
const ALIGNMENT_KEY: &str = "general.alignment";
const ALIGNMENT: u64 = 32;

/// A value of a GGUF file.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the variants are the types of the format")]
pub enum GgufValue {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    U64(u64),
    I64(i64),
    F64(f64),
    /// An array, checked and passed over.
    Array {
        /// The name of its elements' type.
        element: &'static str,
        /// How many there are.
        length: u64,
    },
}

/// The names of the value types, by their numbers.
const VALUE_TYPES: [&str; 13] =
    ["u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64", "f64"];

impl GgufValue {
    /// The name of its type.
    pub fn type_name(&self) -> &'static str {
        VALUE_TYPES.get(self.number() as usize).copied().unwrap_or("?")
    }

    fn number(&self) -> u32 {
        match self {
            GgufValue::U8(_) => 0,
            GgufValue::I8(_) => 1,
            GgufValue::U16(_) => 2,
            GgufValue::I16(_) => 3,
            GgufValue::U32(_) => 4,
            GgufValue::I32(_) => 5,
            GgufValue::F32(_) => 6,
            GgufValue::Bool(_) => 7,
            GgufValue::String(_) => 8,
            GgufValue::Array { .. } => 9,
            GgufValue::U64(_) => 10,
            GgufValue::I64(_) => 11,
            GgufValue::F64(_) => 12,
        }
    }

    fn push_to(&self, out: &mut Vec<u8>) {
        match self {
            GgufValue::U8(value) => out.push(*value),
            GgufValue::I8(value) => out.extend(value.to_le_bytes()),
            GgufValue::U16(value) => out.extend(value.to_le_bytes()),
            GgufValue::I16(value) => out.extend(value.to_le_bytes()),
            GgufValue::U32(value) => out.extend(value.to_le_bytes()),
            GgufValue::I32(value) => out.extend(value.to_le_bytes()),
            GgufValue::F32(value) => out.extend(value.to_le_bytes()),
            GgufValue::Bool(value) => out.push(u8::from(*value)),
            GgufValue::String(value) => push_string(out, value),
            GgufValue::U64(value) => out.extend(value.to_le_bytes()),
            GgufValue::I64(value) => out.extend(value.to_le_bytes()),
            GgufValue::F64(value) => out.extend(value.to_le_bytes()),
            // Refused before.
            GgufValue::Array { .. } => {}
        }
    }
}

/// An element type of ggml: its number, its name, and the elements and bytes of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GgmlType(&'static (u32, &'static str, u64, u64));

/// The types of ggml in use, as `GGML_QUANT_SIZES` of the Python package gguf 0.19.0 has them.
static GGML_TYPES: [(u32, &str, u64, u64); 34] = [
    (0, "F32", 1, 4),
    (1, "F16", 1, 2),
    (2, "Q4_0", 32, 18),
    (3, "Q4_1", 32, 20),
    (6, "Q5_0", 32, 22),
    (7, "Q5_1", 32, 24),
    (8, "Q8_0", 32, 34),
    (9, "Q8_1", 32, 40),
    (10, "Q2_K", 256, 84),
    (11, "Q3_K", 256, 110),
    (12, "Q4_K", 256, 144),
    (13, "Q5_K", 256, 176),
    (14, "Q6_K", 256, 210),
    (15, "Q8_K", 256, 292),
    (16, "IQ2_XXS", 256, 66),
    (17, "IQ2_XS", 256, 74),
    (18, "IQ3_XXS", 256, 98),
    (19, "IQ1_S", 256, 50),
    (20, "IQ4_NL", 32, 18),
    (21, "IQ3_S", 256, 110),
    (22, "IQ2_S", 256, 82),
    (23, "IQ4_XS", 256, 136),
    (24, "I8", 1, 1),
    (25, "I16", 1, 2),
    (26, "I32", 1, 4),
    (27, "I64", 1, 8),
    (28, "F64", 1, 8),
    (29, "IQ1_M", 256, 56),
    (30, "BF16", 1, 2),
    (34, "TQ1_0", 256, 54),
    (35, "TQ2_0", 256, 66),
    (39, "MXFP4", 32, 17),
    (40, "NVFP4", 64, 36),
    (41, "Q1_0", 128, 18),
];

impl GgmlType {
    fn numbered(number: u32) -> Option<GgmlType> {
        GGML_TYPES.iter().find(|row| row.0 == number).map(GgmlType)
    }

    fn of(dtype: Dtype) -> Option<GgmlType> {
        match dtype {
            Dtype::F32 => GgmlType::numbered(0),
            Dtype::F16 => GgmlType::numbered(1),
            Dtype::Bf16 => GgmlType::numbered(30),
            _ => None,
        }
    }

    /// The float type that it is, if it is one of the three that factors are stored in.
    pub fn dtype(self) -> Option<Dtype> {
        match self.0.0 {
            0 => Some(Dtype::F32),
            1 => Some(Dtype::F16),
            30 => Some(Dtype::Bf16),
            _ => None,
        }
    }

    /// Bytes of a tensor with these dimensions; `None` if the first is no whole number of blocks
    /// or the product overflows.
    fn bytes(self, dimensions: &[u64]) -> Option<u64> {
        let (_, _, block, size) = *self.0;
        let first = dimensions.first().copied().unwrap_or(1);
        let row = first.is_multiple_of(block).then_some(first / block)?.checked_mul(size)?;
        dimensions.iter().skip(1).try_fold(row, |product, &length| product.checked_mul(length))
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.1)
    }
}

/// A tensor of a GGUF file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GgufTensor {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub kind: GgmlType,
    /// `ne`, the fastest dimension first.
    pub dimensions: Vec<u64>,
    /// Where its bytes lie in the file.
    range: Range<usize>,
}

/// An open, mapped, validated GGUF file.
#[derive(Debug)]
pub struct GgufFile {
    path: PathBuf,
    version: u32,
    values: Vec<(String, GgufValue)>,
    tensors: Vec<GgufTensor>,
    mapped: Arc<MappedFile>,
}

impl GgufFile {
    /// Opens and checks a file.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Gguf`] with the rule that is broken.
    pub fn open(path: &Path) -> Result<GgufFile> {
        GgufFile::of(OpenedFile::open(path)?)
    }

    /// Checks a file that was just opened.
    ///
    /// # Errors
    /// As for [`GgufFile::open`].
    pub fn of(opened: OpenedFile) -> Result<GgufFile> {
        let path = opened.path().to_owned();
        let mapped = Arc::new(MappedFile::of(Arc::new(opened))?);
        match parse(mapped.bytes()) {
            Ok(Parsed { version, values, tensors }) => {
                Ok(GgufFile { path, version, values, tensors, mapped })
            }
            Err(problem) => Err(Error::Gguf { path, problem }),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its version, 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Its values, in file order.
    pub fn values(&self) -> &[(String, GgufValue)] {
        &self.values
    }

    /// The value under `key`.
    pub fn value(&self, key: &str) -> Option<&GgufValue> {
        self.values.iter().find(|entry| entry.0 == key).map(|entry| &entry.1)
    }

    /// Its tensors, in file order.
    pub fn tensors(&self) -> &[GgufTensor] {
        &self.tensors
    }

    /// The tensor, of row-major shape (`ne` reversed), where it lies; `None` unless it is stored as
    /// F32, F16 or BF16.
    pub fn tensor(&self, info: &GgufTensor) -> Option<Tensor> {
        let dtype = info.kind.dtype()?;
        let shape: Vec<usize> = info
            .dimensions
            .iter()
            .rev()
            .map(|&it| usize::try_from(it).ok())
            .collect::<Option<_>>()?;
        Tensor::mapped(&self.mapped, info.name.clone(), dtype, shape, info.range.clone())
    }
}

struct Parsed {
    version: u32,
    values: Vec<(String, GgufValue)>,
    tensors: Vec<GgufTensor>,
}

/// A tensor's description, before its place is checked.
struct Described {
    name: String,
    kind: GgmlType,
    dimensions: Vec<u64>,
    offset: u64,
    bytes: u64,
}

fn parse(file: &[u8]) -> Result<Parsed, GgufProblem> {
    let mut cursor = Cursor { bytes: file, at: 0 };
    if cursor.take(4, "its mark")? != MAGIC {
        return Err(GgufProblem::NotGguf);
    }
    let version = cursor.u32("its version")?;
    if version != 0 && version.trailing_zeros() >= 16 {
        return Err(GgufProblem::BigEndian);
    }
    if !(2..=VERSION).contains(&version) {
        return Err(GgufProblem::Version { found: version });
    }
    let tensor_count = cursor.count("tensors", "the number of tensors", limits::TENSORS)?;
    let value_count = cursor.count("values", "the number of values", limits::METADATA_ENTRIES)?;
    let values = read_values(&mut cursor, value_count)?;
    let described = read_descriptions(&mut cursor, tensor_count)?;
    let alignment = alignment(&values)?;
    let start = (cursor.at as u64).next_multiple_of(alignment);
    let tensors = place(described, alignment, start, file.len() as u64)?;
    Ok(Parsed { version, values, tensors })
}

fn read_values(
    cursor: &mut Cursor<'_>,
    count: usize,
) -> Result<Vec<(String, GgufValue)>, GgufProblem> {
    let mut values = Vec::new();
    let mut keys = BTreeSet::new();
    for _ in 0..count {
        let key = cursor.string("a key", limits::NAME_BYTES)?;
        let number = cursor.u32("a value's type")?;
        let value = cursor.value(number, &key)?;
        if !keys.insert(key.clone()) {
            return Err(GgufProblem::DuplicateKey { key });
        }
        values.push((key, value));
    }
    Ok(values)
}

fn read_descriptions(cursor: &mut Cursor<'_>, count: usize) -> Result<Vec<Described>, GgufProblem> {
    let mut described = Vec::new();
    let mut names = BTreeSet::new();
    for _ in 0..count {
        let name = cursor.string("a tensor's name", limits::NAME_BYTES)?;
        if !names.insert(name.clone()) {
            return Err(GgufProblem::DuplicateTensor { tensor: name });
        }
        let found = cursor.u32("a tensor's number of dimensions")? as usize;
        if found > limits::GGUF_DIMENSIONS {
            let (what, limit) = ("dimensions of a tensor", limits::GGUF_DIMENSIONS as u64);
            return Err(GgufProblem::OverLimit { what, found: found as u64, limit });
        }
        let dimensions: Vec<u64> =
            (0..found).map(|_| cursor.u64("a tensor's dimensions")).collect::<Result<_, _>>()?;
        let number = cursor.u32("a tensor's type")?;
        let Some(kind) = GgmlType::numbered(number) else {
            return Err(GgufProblem::TensorType { tensor: name, found: number });
        };
        let offset = cursor.u64("a tensor's offset")?;
        let Some(bytes) = kind.bytes(&dimensions) else {
            let kind = kind.to_string();
            return Err(GgufProblem::Dimensions { tensor: name, kind, dimensions });
        };
        described.push(Described { name, kind, dimensions, offset, bytes });
    }
    Ok(described)
}

fn alignment(values: &[(String, GgufValue)]) -> Result<u64, GgufProblem> {
    match values.iter().find(|entry| entry.0 == ALIGNMENT_KEY).map(|entry| &entry.1) {
        None => Ok(ALIGNMENT),
        Some(GgufValue::U32(alignment)) if alignment.is_power_of_two() => Ok(u64::from(*alignment)),
        Some(GgufValue::U32(found)) => Err(GgufProblem::Alignment { found: found.to_string() }),
        Some(other) => {
            Err(GgufProblem::Alignment { found: format!("a value of type {}", other.type_name()) })
        }
    }
}

/// Where the tensors lie: in the file, aligned, and none over another.
fn place(
    described: Vec<Described>,
    alignment: u64,
    start: u64,
    file_bytes: u64,
) -> Result<Vec<GgufTensor>, GgufProblem> {
    let mut tensors = Vec::with_capacity(described.len());
    for Described { name, kind, dimensions, offset, bytes } in described {
        if !offset.is_multiple_of(alignment) {
            return Err(GgufProblem::Misaligned { tensor: name, offset, alignment });
        }
        let first = start.checked_add(offset);
        let last = first.and_then(|first| first.checked_add(bytes));
        let (Some(first), Some(last)) = (first, last.filter(|&last| last <= file_bytes)) else {
            return Err(GgufProblem::OutOfRange { tensor: name, offset, bytes, file_bytes });
        };
        // Both are at most the length of a slice.
        tensors.push(GgufTensor { name, kind, dimensions, range: first as usize..last as usize });
    }
    let mut order: Vec<&GgufTensor> = tensors.iter().filter(|it| !it.range.is_empty()).collect();
    order.sort_by_key(|tensor| tensor.range.start);
    for pair in order.windows(2) {
        if let [first, second] = pair
            && second.range.start < first.range.end
        {
            let (first, second) = (first.name.clone(), second.name.clone());
            return Err(GgufProblem::Overlap { first, second });
        }
    }
    Ok(tensors)
}

/// A place in the file's bytes.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, count: usize, what: &'static str) -> Result<&'a [u8], GgufProblem> {
        let end = self.at.checked_add(count);
        match end.and_then(|end| Some((end, self.bytes.get(self.at..end)?))) {
            Some((end, taken)) => {
                self.at = end;
                Ok(taken)
            }
            None => Err(GgufProblem::Truncated { what, file_bytes: self.bytes.len() as u64 }),
        }
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], GgufProblem> {
        let taken = self.take(N, what)?;
        let file_bytes = self.bytes.len() as u64;
        taken.try_into().map_err(|_| GgufProblem::Truncated { what, file_bytes })
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, GgufProblem> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &'static str) -> Result<u64, GgufProblem> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A count of at most `limit`.
    fn count(
        &mut self,
        what: &'static str,
        place: &'static str,
        limit: usize,
    ) -> Result<usize, GgufProblem> {
        let found = self.u64(place)?;
        if found > limit as u64 {
            return Err(GgufProblem::OverLimit { what, found, limit: limit as u64 });
        }
        Ok(found as usize)
    }

    fn string_bytes(&mut self, what: &'static str, limit: usize) -> Result<&'a [u8], GgufProblem> {
        let found = self.u64(what)?;
        if found > limit as u64 {
            let what =
                if limit == limits::NAME_BYTES { "bytes in a name" } else { "bytes in a string" };
            return Err(GgufProblem::OverLimit { what, found, limit: limit as u64 });
        }
        self.take(found as usize, what)
    }

    fn string(&mut self, what: &'static str, limit: usize) -> Result<String, GgufProblem> {
        let bytes = self.string_bytes(what, limit)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => Err(GgufProblem::NotUtf8 { what }),
        }
    }

    fn value(&mut self, number: u32, key: &str) -> Result<GgufValue, GgufProblem> {
        const WHAT: &str = "a value";
        Ok(match number {
            0 => GgufValue::U8(u8::from_le_bytes(self.array(WHAT)?)),
            1 => GgufValue::I8(i8::from_le_bytes(self.array(WHAT)?)),
            2 => GgufValue::U16(u16::from_le_bytes(self.array(WHAT)?)),
            3 => GgufValue::I16(i16::from_le_bytes(self.array(WHAT)?)),
            4 => GgufValue::U32(self.u32(WHAT)?),
            5 => GgufValue::I32(i32::from_le_bytes(self.array(WHAT)?)),
            6 => GgufValue::F32(f32::from_le_bytes(self.array(WHAT)?)),
            7 => match self.array(WHAT)? {
                [0] => GgufValue::Bool(false),
                [1] => GgufValue::Bool(true),
                [found] => return Err(GgufProblem::Bool { key: key.to_owned(), found }),
            },
            8 => GgufValue::String(self.string(WHAT, limits::GGUF_STRING_BYTES)?),
            9 => self.elements(key)?,
            10 => GgufValue::U64(self.u64(WHAT)?),
            11 => GgufValue::I64(i64::from_le_bytes(self.array(WHAT)?)),
            12 => GgufValue::F64(f64::from_le_bytes(self.array(WHAT)?)),
            found => return Err(GgufProblem::ValueType { key: key.to_owned(), found }),
        })
    }

    /// An array's elements, passed over.
    fn elements(&mut self, key: &str) -> Result<GgufValue, GgufProblem> {
        const WHAT: &str = "an array";
        let number = self.u32(WHAT)?;
        let length = self.count("elements of an array", WHAT, limits::GGUF_ARRAY_ELEMENTS)?;
        let size = match number {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            8 => 0,
            9 => return Err(GgufProblem::NestedArray { key: key.to_owned() }),
            found => return Err(GgufProblem::ValueType { key: key.to_owned(), found }),
        };
        if number == 8 {
            for _ in 0..length {
                self.string_bytes(WHAT, limits::GGUF_STRING_BYTES)?;
            }
        } else {
            // At most 8 times a bounded number.
            self.take(length * size, WHAT)?;
        }
        let element = VALUE_TYPES.get(number as usize).copied().unwrap_or("?");
        Ok(GgufValue::Array { element, length: length as u64 })
    }
}

/// A GGUF file of version 3 in parts to write one after the other: the same input gives the same
/// bytes, always.
#[derive(Debug)]
pub struct Encoded<'a> {
    header: Vec<u8>,
    tensors: &'a [Tensor],
}

/// Zeros between tensors.
static PADDING: [u8; ALIGNMENT as usize] = [0; ALIGNMENT as usize];

impl<'a> Encoded<'a> {
    /// Describes `tensors`, in that order; `None` if one is not stored as F32, F16 or BF16, has
    /// more than four dimensions, all are too large to count their bytes, or a value is an array,
    /// whose elements are not kept.
    pub fn of(values: &[(String, GgufValue)], tensors: &'a [Tensor]) -> Option<Encoded<'a>> {
        let mut header = MAGIC.to_vec();
        header.extend(VERSION.to_le_bytes());
        header.extend((tensors.len() as u64).to_le_bytes());
        header.extend((values.len() as u64).to_le_bytes());
        for (key, value) in values {
            if matches!(value, GgufValue::Array { .. }) {
                return None;
            }
            push_string(&mut header, key);
            header.extend(value.number().to_le_bytes());
            value.push_to(&mut header);
        }
        let mut offset = 0u64;
        for tensor in tensors {
            if tensor.shape.len() > limits::GGUF_DIMENSIONS {
                return None;
            }
            push_string(&mut header, &tensor.name);
            header.extend((tensor.shape.len() as u32).to_le_bytes());
            for &length in tensor.shape.iter().rev() {
                header.extend((length as u64).to_le_bytes());
            }
            header.extend(GgmlType::of(tensor.dtype)?.0.0.to_le_bytes());
            header.extend(offset.to_le_bytes());
            let end = offset.checked_add(tensor.bytes().len() as u64)?;
            offset = end.checked_next_multiple_of(ALIGNMENT)?;
        }
        header.resize(header.len().next_multiple_of(ALIGNMENT as usize), 0);
        Some(Encoded { header, tensors })
    }

    /// The parts of the file.
    pub fn parts(&self) -> Vec<&[u8]> {
        let mut parts: Vec<&[u8]> = vec![&self.header];
        for tensor in self.tensors {
            let bytes = tensor.bytes();
            let padding = bytes.len().next_multiple_of(ALIGNMENT as usize) - bytes.len();
            parts.push(bytes);
            parts.extend(PADDING.get(..padding));
        }
        parts
    }
}

fn push_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn string(text: &str) -> Vec<u8> {
        let mut out = Vec::new();
        push_string(&mut out, text);
        out
    }

    /// A file of one tensor `t` of 2 F32, with `values` of which there are `count`.
    fn file(count: u64, values: &[u8]) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend(1u64.to_le_bytes());
        out.extend(count.to_le_bytes());
        out.extend(values);
        out.extend(description("t", &[2], 0, 0));
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend([0; 8]);
        out
    }

    fn description(name: &str, dimensions: &[u64], kind: u32, offset: u64) -> Vec<u8> {
        let mut out = string(name);
        out.extend((dimensions.len() as u32).to_le_bytes());
        dimensions.iter().for_each(|it| out.extend(it.to_le_bytes()));
        out.extend(kind.to_le_bytes());
        out.extend(offset.to_le_bytes());
        out
    }

    fn of_tensors(descriptions: &[Vec<u8>], data: usize) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((descriptions.len() as u64).to_le_bytes());
        out.extend(0u64.to_le_bytes());
        descriptions.iter().for_each(|it| out.extend(it));
        out.resize(out.len().next_multiple_of(32) + data, 0);
        out
    }

    fn value(key: &str, kind: u32, bytes: &[u8]) -> Vec<u8> {
        let mut out = string(key);
        out.extend(kind.to_le_bytes());
        out.extend(bytes);
        out
    }

    fn refusal(bytes: &[u8]) -> String {
        parse(bytes).err().unwrap().to_string()
    }

    #[test]
    fn marks_and_versions() {
        let good = file(0, &[]);
        assert!(parse(&good).is_ok());
        let with = |at: usize, bytes: &[u8]| {
            let mut file = good.clone();
            file[at..at + bytes.len()].copy_from_slice(bytes);
            refusal(&file)
        };
        assert_eq!(with(0, b"GGML"), "it does not begin with `GGUF`");
        assert_eq!(with(4, &[0, 0, 0, 3]), "big-endian files are not read");
        assert_eq!(with(4, &[1]), "version 1; versions 2 and 3 are read");
        assert_eq!(with(4, &[4]), "version 4; versions 2 and 3 are read");
        assert_eq!(with(8, &[0xff; 8]), "18446744073709551615 tensors, the limit is 1000000");
        assert_eq!(with(16, &[0xff; 8]), "18446744073709551615 values, the limit is 100000");
        assert_eq!(refusal(b"GG"), "the file ends within its mark, after 2 bytes (truncated?)");
    }

    #[test]
    fn every_prefix_of_a_file_is_refused() {
        let mut values = value("a", 8, &string("text"));
        values.extend(value("b", 9, &[5, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0]));
        let whole = file(2, &values);
        assert!(parse(&whole).is_ok());
        for length in 0..whole.len() {
            assert!(parse(&whole[..length]).is_err(), "{length}");
        }
    }

    #[test]
    fn values() {
        let refused = |kind, bytes: &[u8]| refusal(&file(1, &value("k", kind, bytes)));
        assert_eq!(refused(13, &[]), "`k`: a value of unknown type 13");
        assert_eq!(refused(7, &[2]), "`k`: a bool of value 2");
        assert_eq!(refused(9, &[9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]), "`k`: an array of arrays");
        let huge = [&[4u8, 0, 0, 0][..], &[0xff; 8]].concat();
        assert!(refused(9, &huge).contains("elements of an array, the limit is"));
        assert!(refused(8, &[0xff; 8]).contains("bytes in a string, the limit is"));
        assert_eq!(refused(8, &[1, 0, 0, 0, 0, 0, 0, 0, 0xff]), "a value is not UTF-8");
        let twice = value("k", 0, &[1]).repeat(2);
        assert_eq!(refusal(&file(2, &twice)), "the key `k` appears twice");
        let alignment = |bytes: [u8; 4]| refusal(&file(1, &value(ALIGNMENT_KEY, 4, &bytes)));
        assert_eq!(alignment([0; 4]), "`general.alignment` must be a power of two, found 0");
        assert_eq!(
            alignment([24, 0, 0, 0]),
            "`general.alignment` must be a power of two, found 24"
        );
    }

    #[test]
    fn tensors() {
        let one = |description| refusal(&of_tensors(&[description], 64));
        assert_eq!(one(description("t", &[2], 5, 0)), "tensor `t`: unknown type 5");
        assert_eq!(
            one(description("t", &[8], 0, 8)),
            "tensor `t`: offset 8 is not a multiple of the alignment 32"
        );
        assert_eq!(
            one(description("t", &[33], 8, 0)),
            "tensor `t`: [33] of Q8_0 is no whole number of bytes"
        );
        assert_eq!(
            one(description("t", &[1 << 32, 1 << 32], 0, 0)),
            "tensor `t`: [4294967296, 4294967296] of F32 is no whole number of bytes"
        );
        assert_eq!(
            one(description("t", &[1; 5], 0, 0)),
            "5 dimensions of a tensor, the limit is 4"
        );
        assert_eq!(
            one(description("t", &[17], 0, 0)),
            "tensor `t`: 68 bytes from offset 0 of the data are beyond the file's 128 (truncated?)"
        );
        assert!(one(description("t", &[1], 0, u64::MAX - 31)).contains("beyond the file"));
        let pair = |offset| [description("a", &[9], 0, 0), description("b", &[1], 0, offset)];
        assert_eq!(refusal(&of_tensors(&pair(32), 64)), "tensors `a` and `b` overlap");
        assert!(parse(&of_tensors(&pair(64), 68)).is_ok());
        let same = [description("a", &[1], 0, 0), description("a", &[1], 0, 32)];
        assert_eq!(refusal(&of_tensors(&same, 64)), "the tensor `a` appears twice");
    }

    #[test]
    fn what_is_written_is_read() {
        let values = vec![
            ("a".to_owned(), GgufValue::String("x".to_owned())),
            ("b".to_owned(), GgufValue::F32(0.5)),
            ("c".to_owned(), GgufValue::Bool(true)),
            ("d".to_owned(), GgufValue::I64(-3)),
        ];
        let tensor = |name: &str, dtype, shape: &[usize], bytes| {
            Tensor::new(name.to_owned(), dtype, shape.to_vec(), bytes).unwrap()
        };
        let tensors = [
            tensor("one", Dtype::F32, &[2, 3], (0..24).collect()),
            tensor("two", Dtype::Bf16, &[1], vec![1, 2]),
        ];
        let bytes = Encoded::of(&values, &tensors).unwrap().parts().concat();
        let parsed = parse(&bytes).unwrap();
        assert_eq!(parsed.values, values);
        assert_eq!(parsed.tensors[0].dimensions, [3, 2]);
        assert_eq!(bytes[parsed.tensors[0].range.clone()], *tensors[0].bytes());
        assert_eq!(bytes[parsed.tensors[1].range.clone()], [1, 2]);
    }
}
