//! The safetensors container: header reader, header writer, open files.
//!
//! ```text
//! ┌─────────────┬──────────────────────────────────┬──────────────────────────┐
//! │ N: u64 LE   │ header: N bytes of JSON          │ data: the tensors,       │
//! │ (8 bytes)   │ {"__metadata__":{…},"name":{…}…} │ contiguous, in any order │
//! └─────────────┴──────────────────────────────────┴──────────────────────────┘
//! ```
//!
//! The reader is our own because the reference crate keeps the last of two equal keys and does
//! not name the tensor that breaks a rule; the writer is our own because the crate's metadata
//! order changes from run to run. Tests hold both against the crate.

use std::fmt;
use std::fs::File;
use std::io::{Read, Seek};
use std::path::Path;
use std::sync::Arc;

use serde::de::{self, Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::dtype::Dtype;
use crate::error::{Error, HeaderProblem, IoContext, Result, Shape};
use crate::io::mmap::Mapping;
use crate::io::opened::OpenedFile;
use crate::limits;
use crate::tensor::Tensor;

/// The key of the file's own string map.
pub const METADATA: &str = "__metadata__";

/// One tensor of a header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub dtype: Dtype,
    /// Its shape, row-major; empty for a scalar.
    pub shape: Vec<usize>,
    /// Its first byte, counted from the start of the data.
    pub start: u64,
    /// One past its last byte, counted from the start of the data.
    pub end: u64,
}

impl TensorInfo {
    /// Its size in bytes.
    pub fn bytes(&self) -> u64 {
        self.end - self.start
    }

    /// Its number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&dimension| dimension as u64).product()
    }
}

/// A validated header: every byte of the data belongs to exactly one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// `__metadata__`, in file order.
    pub metadata: Vec<(String, String)>,
    /// The tensors, in data order.
    pub tensors: Vec<TensorInfo>,
    /// Where the data starts in the file: 8 + N.
    pub data_start: u64,
    /// Indices into `tensors`, sorted by name.
    by_name: Vec<u32>,
}

impl Header {
    /// Reads the header of an open file of `file_bytes` bytes.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Header`] with the rule that is broken.
    pub fn read(path: &Path, file: &mut impl Read, file_bytes: u64) -> Result<Header> {
        let invalid = |problem| Error::Header { path: path.to_owned(), problem };
        if file_bytes < 8 {
            return Err(invalid(HeaderProblem::TooShort { file_bytes }));
        }
        let mut length = [0; 8];
        file.read_exact(&mut length).at(path, "read")?;
        // Two common accidents, which a header length would describe poorly.
        if &length == b"version " {
            return Err(invalid(HeaderProblem::LfsPointer));
        }
        if length[0] == b'{' && matches!(length[1], b'"' | b' ' | b'\n' | b'\r' | b'\t') {
            return Err(invalid(HeaderProblem::JsonText));
        }
        let header_bytes = u64::from_le_bytes(length);
        if header_bytes > limits::HEADER_BYTES {
            let limit = limits::HEADER_BYTES;
            return Err(invalid(HeaderProblem::HeaderTooLong { header_bytes, limit }));
        }
        if header_bytes > file_bytes - 8 {
            return Err(invalid(HeaderProblem::HeaderBeyondFile { header_bytes, file_bytes }));
        }
        let mut text = vec![0; header_bytes as usize];
        file.read_exact(&mut text).at(path, "read")?;
        Header::parse(&text, file_bytes - 8 - header_bytes).map_err(invalid)
    }

    /// Parses the N header bytes of a file that has `data_bytes` bytes after them.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn parse(text: &[u8], data_bytes: u64) -> Result<Header, HeaderProblem> {
        if text.first() != Some(&b'{') {
            return Err(HeaderProblem::NotAnObject);
        }
        let utf8 = std::str::from_utf8(text)
            .map_err(|error| HeaderProblem::NotUtf8 { at: error.valid_up_to() })?;
        let raw: RawHeader = serde_json::from_str(utf8)
            .map_err(|error| HeaderProblem::Json { message: error.to_string() })?;
        if raw.metadata_maps > 1 {
            return Err(HeaderProblem::DuplicateMetadata);
        }
        let metadata = check_metadata(raw.metadata)?;
        let raw_tensors = raw.tensors.within("tensors", limits::TENSORS)?;
        within("bytes in a tensor name", raw.longest_name, limits::NAME_BYTES)?;
        let mut tensors = Vec::with_capacity(raw_tensors.len());
        for (name, tensor) in raw_tensors {
            tensors.push(check_tensor(name, tensor, data_bytes)?);
        }
        tensors.sort_by(|a, b| (a.start, a.end, &a.name).cmp(&(b.start, b.end, &b.name)));
        let by_name = index_by_name(&tensors)?;
        check_contiguous(&tensors, data_bytes)?;
        Ok(Header { metadata, tensors, data_start: 8 + text.len() as u64, by_name })
    }

    /// The position in [`Header::tensors`] of the tensor called `name`.
    pub fn position(&self, name: &str) -> Option<usize> {
        self.by_name
            .binary_search_by(|&index| self.tensors[index as usize].name.as_str().cmp(name))
            .ok()
            .map(|found| self.by_name[found] as usize)
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.position(name).map(|index| &self.tensors[index])
    }

    /// The metadata value under `key`.
    pub fn metadata_value(&self, key: &str) -> Option<&str> {
        self.metadata.iter().find(|entry| entry.0 == key).map(|entry| entry.1.as_str())
    }
}

fn within(what: &'static str, found: usize, limit: usize) -> Result<(), HeaderProblem> {
    if found > limit {
        return Err(HeaderProblem::OverLimit { what, found, limit });
    }
    Ok(())
}

fn check_metadata(metadata: Bounded<(String, String)>) -> Result<StringPairs, HeaderProblem> {
    let metadata = metadata.within("metadata entries", limits::METADATA_ENTRIES)?;
    let mut keys: Vec<&str> = metadata.iter().map(|entry| entry.0.as_str()).collect();
    keys.sort_unstable();
    if let Some(pair) = keys.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(HeaderProblem::DuplicateMetadataKey { key: pair[0].to_owned() });
    }
    Ok(metadata)
}

fn check_tensor(
    name: String,
    raw: RawTensor,
    data_bytes: u64,
) -> Result<TensorInfo, HeaderProblem> {
    let shape = Shape(raw.shape.0.within("dimensions of a tensor", limits::DIMENSIONS)?);
    let (start, end) = raw.data_offsets;
    let Ok(dtype) = raw.dtype.parse::<Dtype>() else {
        return Err(HeaderProblem::UnknownDtype { tensor: name, dtype: raw.dtype });
    };
    let Some(expected) = dtype.tensor_bytes(&shape.0) else {
        return Err(HeaderProblem::ShapeOverflow { tensor: name, shape });
    };
    if start > end {
        return Err(HeaderProblem::OffsetsReversed { tensor: name, start, end });
    }
    if end > data_bytes {
        return Err(HeaderProblem::OutOfRange { tensor: name, end, data_bytes });
    }
    if end - start != expected {
        let found = end - start;
        return Err(HeaderProblem::SizeMismatch { tensor: name, dtype, shape, expected, found });
    }
    Ok(TensorInfo { name, dtype, shape: shape.0, start, end })
}

fn index_by_name(tensors: &[TensorInfo]) -> Result<Vec<u32>, HeaderProblem> {
    let mut by_name: Vec<u32> = (0..tensors.len() as u32).collect();
    by_name.sort_unstable_by(|&a, &b| tensors[a as usize].name.cmp(&tensors[b as usize].name));
    for pair in by_name.windows(2) {
        let (first, second) = (&tensors[pair[0] as usize], &tensors[pair[1] as usize]);
        if first.name == second.name {
            return Err(HeaderProblem::DuplicateTensor { tensor: first.name.clone() });
        }
    }
    Ok(by_name)
}

/// `tensors` is in data order: each must begin where the one before ended.
fn check_contiguous(tensors: &[TensorInfo], data_bytes: u64) -> Result<(), HeaderProblem> {
    let mut covered = 0;
    for (index, tensor) in tensors.iter().enumerate() {
        if tensor.start < covered {
            let first = tensors[index - 1].name.clone();
            return Err(HeaderProblem::Overlap { first, second: tensor.name.clone() });
        }
        if tensor.start > covered {
            let bytes = tensor.start - covered;
            return Err(HeaderProblem::Hole { tensor: tensor.name.clone(), bytes });
        }
        covered = tensor.end;
    }
    if covered < data_bytes {
        return Err(HeaderProblem::TrailingBytes { bytes: data_bytes - covered });
    }
    Ok(())
}

/// What was found of something that has a limit: no more is kept than may be, the rest is counted.
pub(crate) struct Bounded<T> {
    kept: Vec<T>,
    found: usize,
}

impl Bounded<(String, String)> {
    /// The entries of an object of which at most `limit` may be.
    pub(crate) fn entries<'de, A: MapAccess<'de>>(
        mut access: A,
        limit: usize,
    ) -> Result<Bounded<(String, String)>, A::Error> {
        let mut entries = Bounded { kept: Vec::new(), found: 0 };
        while entries.found < limit {
            let Some(entry) = access.next_entry()? else {
                return Ok(entries);
            };
            entries.kept.push(entry);
            entries.found += 1;
        }
        while access.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {
            entries.found += 1;
        }
        Ok(entries)
    }
}

impl<T> Bounded<T> {
    /// All of it, if it is no more than may be.
    fn within(self, what: &'static str, limit: usize) -> Result<Vec<T>, HeaderProblem> {
        within(what, self.found, limit)?;
        Ok(self.kept)
    }

    /// All of it, or how much it is.
    pub(crate) fn all(self) -> Result<Vec<T>, usize> {
        if self.found > self.kept.len() { Err(self.found) } else { Ok(self.kept) }
    }
}

type StringPairs = Vec<(String, String)>;

/// A header as JSON says it, before any rule but the limits is checked; equal keys are all kept.
struct RawHeader {
    metadata_maps: usize,
    metadata: Bounded<(String, String)>,
    tensors: Bounded<(String, RawTensor)>,
    /// In bytes.
    longest_name: usize,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTensor {
    dtype: String,
    shape: Dimensions,
    data_offsets: (u64, u64),
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(RawHeaderVisitor)
    }
}

struct RawHeaderVisitor;

impl<'de> Visitor<'de> for RawHeaderVisitor {
    type Value = RawHeader;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<RawHeader, A::Error> {
        let mut header = RawHeader {
            metadata_maps: 0,
            metadata: Bounded { kept: Vec::new(), found: 0 },
            tensors: Bounded { kept: Vec::new(), found: 0 },
            longest_name: 0,
        };
        while let Some(Name { text, bytes }) = access.next_key()? {
            header.longest_name = header.longest_name.max(bytes);
            if text == METADATA {
                header.metadata_maps += 1;
                if header.metadata_maps == 1 {
                    header.metadata = access.next_value::<Metadata>()?.0;
                } else {
                    access.next_value::<IgnoredAny>()?;
                }
                continue;
            }
            header.tensors.found += 1;
            if bytes > limits::NAME_BYTES || header.tensors.found > limits::TENSORS {
                access.next_value::<IgnoredAny>()?;
                continue;
            }
            let tensor = access
                .next_value()
                .map_err(|error| de::Error::custom(format_args!("tensor `{text}`: {error}")))?;
            header.tensors.kept.push((text, tensor));
        }
        Ok(header)
    }
}

/// The name of a tensor, kept if it is no longer than it may be.
struct Name {
    text: String,
    bytes: usize,
}

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = Name;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_str<E>(self, text: &str) -> Result<Name, E> {
                let bytes = text.len();
                let text = if bytes > limits::NAME_BYTES { "" } else { text };
                Ok(Name { text: text.to_owned(), bytes })
            }
        }
        deserializer.deserialize_str(Text)
    }
}

/// A shape.
struct Dimensions(Bounded<usize>);

impl<'de> Deserialize<'de> for Dimensions {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Sequence;
        impl<'de> Visitor<'de> for Sequence {
            type Value = Dimensions;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a sequence")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Dimensions, A::Error> {
                let mut shape = Bounded { kept: Vec::new(), found: 0 };
                while let Some(dimension) = access.next_element()? {
                    shape.found += 1;
                    if shape.found <= limits::DIMENSIONS {
                        shape.kept.push(dimension);
                    }
                }
                Ok(Dimensions(shape))
            }
        }
        deserializer.deserialize_seq(Sequence)
    }
}

/// An object of strings as a list, so that equal keys are seen.
struct Metadata(Bounded<(String, String)>);

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = Metadata;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object that maps strings to strings")
            }

            fn visit_map<A: MapAccess<'de>>(self, access: A) -> Result<Metadata, A::Error> {
                Bounded::entries(access, limits::METADATA_ENTRIES).map(Metadata)
            }

            // MLX writes null if there is none, and the reference crate reads it as that.
            fn visit_unit<E>(self) -> Result<Metadata, E> {
                Ok(Metadata(Bounded { kept: Vec::new(), found: 0 }))
            }
        }
        deserializer.deserialize_any(Pairs)
    }
}

/// A tensor to be written: name, dtype and shape. Its place follows from its turn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Declared<'a> {
    /// The name.
    pub name: &'a str,
    /// The element type.
    pub dtype: Dtype,
    /// The shape.
    pub shape: &'a [usize],
    /// The size in bytes, which dtype and shape determine.
    pub bytes: u64,
}

/// The order in which a serialiser lays out tensors so that each is aligned to its dtype:
/// descending by dtype, then by name (the reference implementation's order).
pub fn storage_order(a: (Dtype, &str), b: (Dtype, &str)) -> std::cmp::Ordering {
    b.0.cmp(&a.0).then_with(|| a.1.cmp(b.1))
}

/// The first bytes of a file, up to its data: length and header for tensors laid out in the
/// order given. The same input gives the same bytes, always; the header is padded with spaces so
/// that the data starts at a multiple of 8.
pub fn encode_header<'a>(
    metadata: &[(String, String)],
    tensors: impl IntoIterator<Item = Declared<'a>>,
) -> Vec<u8> {
    let mut text = vec![0; 8];
    text.push(b'{');
    let mut separator: &[u8] = b"";
    if !metadata.is_empty() {
        push_json_string(&mut text, METADATA);
        text.push(b':');
        let mut inner: &[u8] = b"{";
        for (key, value) in metadata {
            text.extend_from_slice(inner);
            push_json_string(&mut text, key);
            text.push(b':');
            push_json_string(&mut text, value);
            inner = b",";
        }
        text.push(b'}');
        separator = b",";
    }
    let mut offset = 0;
    for tensor in tensors {
        text.extend_from_slice(separator);
        separator = b",";
        push_json_string(&mut text, tensor.name);
        text.extend_from_slice(b":{\"dtype\":\"");
        text.extend_from_slice(tensor.dtype.name().as_bytes());
        text.extend_from_slice(b"\",\"shape\":[");
        for (index, dimension) in tensor.shape.iter().enumerate() {
            if index > 0 {
                text.push(b',');
            }
            text.extend_from_slice(dimension.to_string().as_bytes());
        }
        let end = offset + tensor.bytes;
        text.extend_from_slice(format!("],\"data_offsets\":[{offset},{end}]}}").as_bytes());
        offset = end;
    }
    text.push(b'}');
    text.resize(text.len().next_multiple_of(8), b' ');
    let header_bytes = (text.len() - 8) as u64;
    text[..8].copy_from_slice(&header_bytes.to_le_bytes());
    text
}

/// [`encode_header`] for tensors that are at hand, in their order.
pub(crate) fn header_of(metadata: &[(String, String)], tensors: &[Tensor]) -> Vec<u8> {
    let declared = tensors.iter().map(|tensor| Declared {
        name: &tensor.name,
        dtype: tensor.dtype,
        shape: &tensor.shape,
        bytes: tensor.bytes().len() as u64,
    });
    encode_header(metadata, declared)
}

/// Appends `value` as a JSON string, escaped as serde_json escapes it.
fn push_json_string(text: &mut Vec<u8>, value: &str) {
    text.extend_from_slice(serde_json::Value::from(value).to_string().as_bytes());
}

/// An open safetensors file: its header read and validated, its data untouched.
#[derive(Debug)]
pub struct SafetensorsFile {
    opened: Arc<OpenedFile>,
    header: Header,
}

impl SafetensorsFile {
    /// Opens a file and reads its header.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Header`] with the rule that is broken.
    pub fn open(path: &Path) -> Result<SafetensorsFile> {
        SafetensorsFile::of(OpenedFile::open(path)?)
    }

    /// Reads the header of a file that was just opened.
    ///
    /// # Errors
    /// As for [`SafetensorsFile::open`].
    pub fn of(opened: OpenedFile) -> Result<SafetensorsFile> {
        let mut file = opened.file();
        file.rewind().at(opened.path(), "read")?;
        let header = Header::read(opened.path(), &mut file, opened.bytes())?;
        Ok(SafetensorsFile { opened: Arc::new(opened), header })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        self.opened.path()
    }

    /// The open file.
    pub fn file(&self) -> &File {
        self.opened.file()
    }

    /// Its size when it was opened.
    pub fn file_bytes(&self) -> u64 {
        self.opened.bytes()
    }

    /// Its header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Refuses a file that was written to since it was opened.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn ensure_unchanged(&self) -> Result<()> {
        self.opened.ensure_unchanged()
    }

    /// Maps the whole file.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn map(&self) -> Result<Mapping> {
        self.opened.map()
    }

    /// The file itself, which outlives this header as long as it is held.
    pub(crate) fn opened(&self) -> Arc<OpenedFile> {
        Arc::clone(&self.opened)
    }
}
