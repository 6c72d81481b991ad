//! A tensor's bytes, wherever they are.

use std::ops::Range;
use std::sync::Arc;

use crate::container::safetensors::SafetensorsFile;
use crate::dtype::Dtype;
use crate::error::Result;
use crate::io::mmap::Mapping;
use crate::io::opened::OpenedFile;

/// A named tensor. Cloning shares the bytes.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// The name in the file it came from, or is to be written under.
    pub name: String,
    /// The element type.
    pub dtype: Dtype,
    /// The shape, row-major.
    pub shape: Vec<usize>,
    data: Data,
}

#[derive(Clone, Debug)]
enum Data {
    Mapped { file: Arc<MappedFile>, range: Range<usize> },
    // Not `Arc<[u8]>`, which could only be made by copying the bytes.
    Owned(Arc<Vec<u8>>),
}

/// A mapping with the file that it is of.
#[derive(Debug)]
pub struct MappedFile {
    opened: Arc<OpenedFile>,
    mapping: Mapping,
}

impl MappedFile {
    /// Maps an open file.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn of(opened: Arc<OpenedFile>) -> Result<MappedFile> {
        let mapping = opened.map()?;
        Ok(MappedFile { opened, mapping })
    }

    /// The whole file, as it was when it was opened or longer.
    pub fn bytes(&self) -> &[u8] {
        &self.mapping
    }

    /// Refuses a file that was written to since it was opened.
    pub(crate) fn ensure_unchanged(&self) -> Result<()> {
        self.opened.ensure_unchanged()
    }
}

impl Tensor {
    /// A tensor that owns its little-endian bytes, or `None` if their number does not fit.
    pub fn new(name: String, dtype: Dtype, shape: Vec<usize>, bytes: Vec<u8>) -> Option<Tensor> {
        (dtype.tensor_bytes(&shape) == Some(bytes.len() as u64)).then(|| Tensor {
            name,
            dtype,
            shape,
            data: Data::Owned(Arc::new(bytes)),
        })
    }

    /// A tensor whose little-endian bytes lie in `range` of a file, or `None` if they do not or their
    /// number does not fit.
    pub fn mapped(
        file: &Arc<MappedFile>,
        name: String,
        dtype: Dtype,
        shape: Vec<usize>,
        range: Range<usize>,
    ) -> Option<Tensor> {
        let found = file.bytes().get(range.clone())?.len() as u64;
        (dtype.tensor_bytes(&shape) == Some(found)).then(|| Tensor {
            name,
            dtype,
            shape,
            data: Data::Mapped { file: Arc::clone(file), range },
        })
    }

    /// Its little-endian bytes, row-major. No alignment is promised.
    pub fn bytes(&self) -> &[u8] {
        match &self.data {
            // In range: it was checked against the mapping's length when the tensor was made, or the
            // header was against the file's length, and the mapping is no shorter.
            Data::Mapped { file, range } => &file.mapping[range.clone()],
            Data::Owned(bytes) => bytes,
        }
    }

    /// The number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The elements as `f32`, exactly; `None` unless stored as F32, F16 or BF16.
    pub fn to_f32(&self) -> Option<Vec<f32>> {
        let bytes = self.bytes();
        let pairs = bytes.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
        Some(match self.dtype {
            Dtype::F32 => bytes
                .chunks_exact(4)
                .map(|word| f32::from_le_bytes([word[0], word[1], word[2], word[3]]))
                .collect(),
            Dtype::F16 => pairs.map(|bits| half::f16::from_bits(bits).to_f32()).collect(),
            Dtype::Bf16 => pairs.map(|bits| half::bf16::from_bits(bits).to_f32()).collect(),
            _ => return None,
        })
    }

    /// Drops a mapped tensor's pages from this process's resident set.
    pub fn release(&self) {
        if let Data::Mapped { file, range } = &self.data {
            file.mapping.release(range.clone());
        }
    }

    /// The file that its bytes lie in; `None` if it owns them.
    pub(crate) fn mapped_file(&self) -> Option<&Arc<MappedFile>> {
        match &self.data {
            Data::Mapped { file, .. } => Some(file),
            Data::Owned(_) => None,
        }
    }
}

/// Every tensor of a file, in data order, sharing one mapping. A component made of one is written
/// from where it lies.
///
/// # Errors
/// [`crate::Error::Io`] if the file cannot be mapped.
pub fn map_all(file: &SafetensorsFile) -> Result<Vec<Tensor>> {
    let mapped = Arc::new(MappedFile::of(file.opened())?);
    let header = file.header();
    let at = |offset: u64| (header.data_start + offset) as usize;
    Ok(header
        .tensors
        .iter()
        .map(|info| Tensor {
            name: info.name.clone(),
            dtype: info.dtype,
            shape: info.shape.clone(),
            data: Data::Mapped { file: Arc::clone(&mapped), range: at(info.start)..at(info.end) },
        })
        .collect())
}
