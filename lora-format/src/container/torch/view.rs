//! A tensor as torch stores it: a storage, and how its elements lie in it.
//!
//! Element (i₀, i₁, …) is the storage's element `offset + Σ iₖ·strideₖ`. Where that is row-major
//! order the tensor is a slice of the file; otherwise (a transposed view) its elements are copied
//! into that order.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use super::globals::{self, Rebuild};
use super::problem::TensorProblem;
use crate::container::pickle::{Global, Node, Pickle, Value};
use crate::dtype::Dtype;
use crate::error::Shape;
use crate::limits;
use crate::tensor::{MappedFile, Tensor};

/// A storage as the pickle refers to it.
#[derive(Clone, Copy, Debug)]
pub(super) struct StorageId<'a> {
    pub(super) key: &'a str,
    /// U8 if the storage has no type.
    pub(super) dtype: Dtype,
    untyped: bool,
    elements: u64,
}

impl<'a> StorageId<'a> {
    /// Reads `("storage", class, key, device, elements)`, after which the legacy format has the
    /// view of another storage, or `None`.
    pub(super) fn of(pickle: &Pickle<'a>, id: Value<'a>) -> Result<StorageId<'a>, TensorProblem> {
        let arguments = || TensorProblem::Arguments { function: "persistent_load".to_owned() };
        let (class, key, elements) = match pickle.tuple(id) {
            Some(
                &[
                    Value::Text("storage"),
                    class,
                    Value::Text(key),
                    _,
                    Value::Int(elements),
                    ref view @ ..,
                ],
            ) => match view {
                [] | [Value::None] => (class, key, elements),
                _ => return Err(TensorProblem::StorageView),
            },
            _ => return Err(arguments()),
        };
        let Some(&Node::Global(class)) = pickle.node(class) else {
            return Err(arguments());
        };
        let untyped = globals::is_untyped(class);
        let dtype = if untyped { Some(Dtype::U8) } else { globals::storage_dtype(class) };
        let dtype = dtype.ok_or_else(|| TensorProblem::Dtype { name: class.path() })?;
        let elements = u64::try_from(elements).map_err(|_| arguments())?;
        Ok(StorageId { key, dtype, untyped, elements })
    }
}

/// A tensor of a storage.
#[derive(Debug)]
pub(super) struct View<'a> {
    storage: StorageId<'a>,
    dtype: Dtype,
    offset: u64,
    shape: Vec<usize>,
    strides: Vec<usize>,
}

impl<'a> View<'a> {
    /// What the call of a function that makes tensors stands for.
    pub(super) fn of(pickle: &Pickle<'a>, value: Value<'a>) -> Result<View<'a>, TensorProblem> {
        View::within(pickle, value, limits::PARAMETER_DEPTH)
    }

    /// Parameters hold tensors, which may be parameters.
    fn within(
        pickle: &Pickle<'a>,
        value: Value<'a>,
        depth: usize,
    ) -> Result<View<'a>, TensorProblem> {
        let wrong = |function: &str| TensorProblem::Arguments { function: function.to_owned() };
        let Some(&Node::Call { function, arguments }) = pickle.node(value) else {
            return Err(wrong("_rebuild_parameter"));
        };
        let arguments = pickle.tuple(arguments).ok_or_else(|| wrong(&function.path()))?;
        match (Rebuild::of(function), arguments) {
            (Some(Rebuild::Typed), &[storage, offset, shape, strides, ref rest @ ..]) => {
                let parts = [storage, offset, shape, strides];
                // requires_grad, backward_hooks, and what `is_plain` is about.
                let plain = rest.len() <= 3 && is_plain(pickle, rest.get(2));
                View::assemble(pickle, function, parts, None, plain)
            }
            (
                Some(Rebuild::Untyped),
                &[storage, offset, shape, strides, _, _, dtype, ref rest @ ..],
            ) => {
                let parts = [storage, offset, shape, strides];
                let plain = rest.len() <= 1 && is_plain(pickle, rest.first());
                View::assemble(pickle, function, parts, Some(dtype), plain)
            }
            (Some(Rebuild::Parameter), &[data, _, _]) if depth > 0 => {
                View::within(pickle, data, depth - 1)
            }
            (Some(Rebuild::ParameterWithState), &[data, _, _, state]) if depth > 0 => {
                if !is_plain(pickle, Some(&state)) {
                    return Err(TensorProblem::Attributes);
                }
                View::within(pickle, data, depth - 1)
            }
            (Some(Rebuild::Other(kind)), _) => {
                Err(TensorProblem::Kind { kind, function: function.path() })
            }
            _ => Err(wrong(&function.path())),
        }
    }

    fn assemble(
        pickle: &Pickle<'a>,
        function: Global<'a>,
        [storage, offset, shape, strides]: [Value<'a>; 4],
        dtype: Option<Value<'a>>,
        plain: bool,
    ) -> Result<View<'a>, TensorProblem> {
        let wrong = || TensorProblem::Arguments { function: function.path() };
        if !plain {
            return Err(TensorProblem::Metadata);
        }
        let Some(&Node::Persistent(id)) = pickle.node(storage) else {
            return Err(wrong());
        };
        let storage = StorageId::of(pickle, id)?;
        let dtype = match dtype {
            None if !storage.untyped => storage.dtype,
            Some(name) if storage.untyped => {
                let Some(&Node::Global(name)) = pickle.node(name) else {
                    return Err(wrong());
                };
                let unread = || TensorProblem::Dtype { name: name.path() };
                globals::dtype(name).ok_or_else(unread)?
            }
            _ => return Err(wrong()),
        };
        let Value::Int(offset) = offset else {
            return Err(wrong());
        };
        let offset = u64::try_from(offset).map_err(|_| wrong())?;
        let shape = sizes(pickle, shape, &wrong)?;
        let strides = sizes(pickle, strides, &wrong)?;
        if shape.len() != strides.len() {
            return Err(wrong());
        }
        Ok(View { storage, dtype, offset, shape, strides })
    }

    /// The tensor, of a file whose storages are at `storages`.
    pub(super) fn tensor(
        self,
        name: &str,
        file: &Arc<MappedFile>,
        storages: &HashMap<&str, Range<usize>>,
        copies: &mut Copies,
    ) -> Result<Tensor, TensorProblem> {
        let element = self.dtype.bits() / 8;
        let range = self.storage(storages)?;
        let elements = (range.len() as u64) / element;
        let last = self.last().filter(|&last| last <= elements);
        let out_of_range = || TensorProblem::Range {
            shape: Shape(self.shape.clone()),
            strides: Shape(self.strides.clone()),
            offset: self.offset,
            elements,
        };
        let bytes = self.dtype.tensor_bytes(&self.shape);
        let (Some(_), Some(bytes)) = (last, bytes) else {
            return Err(out_of_range());
        };
        let (element, name) = (element as usize, name.to_owned());
        // Within the storage, so within the address space.
        let start = range.start + self.offset as usize * element;
        if self.is_contiguous() || bytes == 0 {
            let range = start..start + bytes as usize;
            let tensor = Tensor::mapped(file, name, self.dtype, self.shape.clone(), range);
            return tensor.ok_or_else(out_of_range);
        }
        copies.take(bytes)?;
        let source = file.bytes().get(start..range.end).ok_or_else(out_of_range)?;
        let gathered = gather(source, element, &self.shape, &self.strides, bytes as usize);
        let tensor =
            gathered.and_then(|bytes| Tensor::new(name, self.dtype, self.shape.clone(), bytes));
        tensor.ok_or_else(out_of_range)
    }

    /// Where its storage is, which must be as long as the pickle says.
    fn storage(
        &self,
        storages: &HashMap<&str, Range<usize>>,
    ) -> Result<Range<usize>, TensorProblem> {
        let StorageId { key, dtype, elements, .. } = self.storage;
        let key = || key.to_owned();
        let range = storages.get(self.storage.key).cloned();
        let range = range.ok_or_else(|| TensorProblem::NoStorage { key: key() })?;
        let (expected, found) = (elements.saturating_mul(dtype.bits() / 8), range.len() as u64);
        if expected != found {
            return Err(TensorProblem::StorageSize { key: key(), expected, found });
        }
        Ok(range)
    }

    /// One past the last element of its storage that it uses; `None` if that cannot be counted.
    fn last(&self) -> Option<u64> {
        if self.shape.contains(&0) {
            return Some(self.offset);
        }
        let mut last = self.offset;
        for (&size, &stride) in self.shape.iter().zip(&self.strides) {
            last = last.checked_add((size as u64 - 1).checked_mul(stride as u64)?)?;
        }
        last.checked_add(1)
    }

    /// Whether its elements lie in row-major order without gaps.
    fn is_contiguous(&self) -> bool {
        let mut expected = 1usize;
        for (&size, &stride) in self.shape.iter().zip(&self.strides).rev() {
            if size != 1 && stride != expected {
                return false;
            }
            expected = expected.saturating_mul(size);
        }
        true
    }
}

/// Whether what torch sets apart from the numbers (the conjugate and negative bits, the attributes
/// of a parameter) is empty.
fn is_plain<'a>(pickle: &Pickle<'a>, value: Option<&Value<'a>>) -> bool {
    match value {
        None | Some(Value::None) => true,
        Some(&value) => pickle.dict(value).is_some_and(<[_]>::is_empty),
    }
}

fn sizes<'a>(
    pickle: &Pickle<'a>,
    value: Value<'a>,
    wrong: &impl Fn() -> TensorProblem,
) -> Result<Vec<usize>, TensorProblem> {
    let items = pickle.tuple(value).ok_or_else(wrong)?;
    if items.len() > limits::DIMENSIONS {
        let (found, limit) = (items.len(), limits::DIMENSIONS);
        return Err(TensorProblem::Dimensions { found, limit });
    }
    let size = |item: &Value<'a>| match item {
        Value::Int(size) => usize::try_from(*size).ok(),
        _ => None,
    };
    items.iter().map(size).collect::<Option<Vec<_>>>().ok_or_else(wrong)
}

/// What the elements that do not lie in order may take in memory once they do.
#[derive(Debug)]
pub(super) struct Copies {
    limit: u64,
    taken: u64,
}

impl Copies {
    /// Those of a file of so many bytes: an expanded view is larger than what it is a view of.
    pub(super) fn of_file(bytes: u64) -> Copies {
        Copies { limit: bytes.saturating_mul(limits::VIEW_COPY_FACTOR), taken: 0 }
    }

    fn take(&mut self, bytes: u64) -> Result<(), TensorProblem> {
        let (taken, limit) = (self.taken, self.limit);
        match taken.checked_add(bytes).filter(|&sum| sum <= limit) {
            Some(sum) => {
                self.taken = sum;
                Ok(())
            }
            None => Err(TensorProblem::Copy { bytes, taken, limit }),
        }
    }
}

/// The elements of a view in row-major order; `None` if one is not in `source`.
fn gather(
    source: &[u8],
    element: usize,
    shape: &[usize],
    strides: &[usize],
    bytes: usize,
) -> Option<Vec<u8>> {
    let mut gathered = Vec::with_capacity(bytes);
    let mut index = vec![0usize; shape.len()];
    let mut at = 0usize;
    while gathered.len() < bytes {
        let start = at.checked_mul(element)?;
        gathered.extend_from_slice(source.get(start..start.checked_add(element)?)?);
        // The next index, the last dimension running fastest. A stride along one element only may
        // be any number; what it adds is taken off again.
        for ((position, &size), &stride) in index.iter_mut().zip(shape).zip(strides).rev() {
            *position += 1;
            at = at.wrapping_add(stride);
            if *position < size {
                break;
            }
            at = at.wrapping_sub(stride.wrapping_mul(size));
            *position = 0;
        }
    }
    Some(gathered)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gathering_follows_the_strides() {
        let source: Vec<u8> = (0..12).collect();
        // The transpose of a matrix of 2 rows and 3 columns of two-byte elements.
        let transposed = gather(&source, 2, &[3, 2], &[1, 3], 12).unwrap();
        assert_eq!(transposed, [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]);
        // An expanded row.
        assert_eq!(gather(&source, 1, &[2, 3], &[0, 1], 6).unwrap(), [0, 1, 2, 0, 1, 2]);
        // The stride of a dimension of size 1 is never taken.
        assert_eq!(gather(&source, 1, &[2, 1], &[2, usize::MAX], 2).unwrap(), [0, 2]);
        assert_eq!(gather(&source, 1, &[2], &[12], 2), None);
    }

    #[test]
    fn copies_are_counted_together() {
        let mut copies = Copies::of_file(100);
        assert_eq!(copies.take(300), Ok(()));
        let problem = copies.take(101).unwrap_err();
        assert_eq!(
            problem.to_string(),
            "its elements do not lie in order, and in order they would take 101 bytes, after 300 \
             for others; the limit for a file of this size is 400"
        );
        assert_eq!(copies.take(100), Ok(()));
    }
}
