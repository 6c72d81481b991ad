//! Moving a tensor's elements: transposing, reordering the rows of rotary heads, stacking, adding
//! zeros. No value changes. Tensors without elements are not moved: their lengths say nothing of
//! their size, and may be anything.

use crate::limits;
use std::ops::Range;

use crate::tensor::Tensor;

/// The matrix transposed; `None` if it is none, or its elements are no whole bytes.
pub(super) fn transposed(tensor: &Tensor) -> Option<Tensor> {
    let &[rows, columns] = tensor.shape.as_slice() else { return None };
    let size = element_bytes(tensor)?;
    let source = tensor.bytes();
    if source.is_empty() {
        return None;
    }
    let mut bytes = Vec::with_capacity(source.len());
    for column in 0..columns {
        for row in 0..rows {
            let at = (row * columns + column) * size;
            bytes.extend_from_slice(source.get(at..at + size)?);
        }
    }
    Tensor::new(tensor.name.clone(), tensor.dtype, vec![columns, rows], bytes)
}

/// Rows of rotary heads as transformers orders them (the first halves of all pairs, then the second
/// halves) in the order of Meta's code, which ggml and torchtune use (pair by pair):
/// `reshape(heads, 2, d/2, …).swapaxes(1, 2)`. `None` if the rows do not divide into `heads` heads
/// of even size.
pub(super) fn paired(tensor: &Tensor, heads: usize) -> Option<Tensor> {
    let size = head_size(tensor, heads)?;
    reordered(tensor, |row| {
        let (head, within) = (row / size, row % size);
        head * size + within % 2 * (size / 2) + within / 2
    })
}

/// The inverse of [`paired`].
pub(super) fn halved(tensor: &Tensor, heads: usize) -> Option<Tensor> {
    let size = head_size(tensor, heads)?;
    reordered(tensor, |row| {
        let (head, within) = (row / size, row % size);
        head * size + within % (size / 2) * 2 + within / (size / 2)
    })
}

fn head_size(tensor: &Tensor, heads: usize) -> Option<usize> {
    let rows = *tensor.shape.first()?;
    let fits = heads > 0 && rows > 0 && rows.is_multiple_of(heads.checked_mul(2)?);
    fits.then(|| rows / heads)
}

/// The tensor whose row i is the row `source(i)` of `tensor`.
fn reordered(tensor: &Tensor, source: impl Fn(usize) -> usize) -> Option<Tensor> {
    let rows = *tensor.shape.first()?;
    let all = tensor.bytes();
    let size = all.len().checked_div(rows).filter(|&size| size > 0)?;
    let mut bytes = Vec::with_capacity(all.len());
    for row in 0..rows {
        let at = source(row) * size;
        bytes.extend_from_slice(all.get(at..at + size)?);
    }
    Tensor::new(tensor.name.clone(), tensor.dtype, tensor.shape.clone(), bytes)
}

/// Tensors of one shape and dtype in one with a dimension more; `None` if they are not.
pub(super) fn stacked(name: String, tensors: &[Tensor]) -> Option<Tensor> {
    let first = tensors.first()?;
    if tensors.iter().any(|it| it.shape != first.shape || it.dtype != first.dtype) {
        return None;
    }
    let mut shape = vec![tensors.len()];
    shape.extend_from_slice(&first.shape);
    let bytes = tensors.iter().flat_map(|tensor| tensor.bytes()).copied().collect();
    Tensor::new(name, first.dtype, shape, bytes)
}

/// The inverse of [`stacked`]; `None` for a tensor without dimensions or elements.
pub(super) fn unstacked(tensor: &Tensor) -> Option<Vec<Tensor>> {
    let (&count, shape) = tensor.shape.split_first()?;
    let all = tensor.bytes();
    let size = all.len().checked_div(count).filter(|&size| size > 0)?;
    let part = |index: usize| {
        let bytes = all.get(index * size..(index + 1) * size)?.to_vec();
        Tensor::new(format!("{}[{index}]", tensor.name), tensor.dtype, shape.to_vec(), bytes)
    };
    (0..count).map(part).collect()
}

/// The matrix with zeros below and to the right, `rows` × `columns`; `None` if it is larger, or the
/// zeros would be more than [`limits::EXPANSION_BYTES`] and [`limits::EXPANSION_FACTOR`] allow.
pub(super) fn padded(tensor: &Tensor, rows: usize, columns: usize) -> Option<Tensor> {
    let &[old_rows, old_columns] = tensor.shape.as_slice() else { return None };
    if (old_rows, old_columns) == (rows, columns) {
        return Some(tensor.clone());
    }
    let size = element_bytes(tensor)?;
    let missing = columns.checked_sub(old_columns)?.checked_mul(size)?;
    let total = rows.checked_mul(columns)?.checked_mul(size)?;
    let most = (tensor.bytes().len() as u64)
        .saturating_mul(limits::EXPANSION_FACTOR)
        .min(limits::EXPANSION_BYTES);
    if rows < old_rows || total == 0 || total as u64 > most {
        return None;
    }
    let mut bytes = Vec::with_capacity(total);
    let row_bytes = old_columns * size;
    for row in 0..old_rows {
        bytes.extend_from_slice(tensor.bytes().get(row * row_bytes..(row + 1) * row_bytes)?);
        bytes.resize(bytes.len() + missing, 0);
    }
    bytes.resize(total, 0);
    Tensor::new(tensor.name.clone(), tensor.dtype, vec![rows, columns], bytes)
}

/// Some rows of a tensor; `None` if it has not so many.
pub(super) fn rows(tensor: &Tensor, rows: Range<usize>) -> Option<Tensor> {
    let (&count, rest) = tensor.shape.split_first()?;
    let size = tensor.bytes().len().checked_div(count)?;
    let bytes = tensor.bytes().get(rows.start.checked_mul(size)?..rows.end.checked_mul(size)?)?;
    let mut shape = vec![rows.len()];
    shape.extend_from_slice(rest);
    Tensor::new(tensor.name.clone(), tensor.dtype, shape, bytes.to_vec())
}

/// Some columns of a matrix; `None` if it is none, or has not so many.
pub(super) fn columns(tensor: &Tensor, columns: Range<usize>) -> Option<Tensor> {
    let &[rows, all] = tensor.shape.as_slice() else { return None };
    let size = element_bytes(tensor)?;
    if columns.end > all || columns.start > columns.end || all == 0 {
        return None;
    }
    let mut bytes = Vec::with_capacity(rows.checked_mul(columns.len())?.checked_mul(size)?);
    for row in tensor.bytes().chunks_exact(all.checked_mul(size)?) {
        bytes.extend_from_slice(row.get(columns.start * size..columns.end * size)?);
    }
    Tensor::new(tensor.name.clone(), tensor.dtype, vec![rows, columns.len()], bytes)
}

/// Matrices of one width and dtype, one below the other; `None` if they are not.
pub(super) fn concatenated(tensors: &[Tensor]) -> Option<Tensor> {
    let first = tensors.first()?;
    let &[_, width] = first.shape.as_slice() else { return None };
    let mut rows = 0_usize;
    for tensor in tensors {
        let &[height, other] = tensor.shape.as_slice() else { return None };
        if other != width || tensor.dtype != first.dtype {
            return None;
        }
        rows = rows.checked_add(height)?;
    }
    let bytes = tensors.iter().flat_map(|tensor| tensor.bytes()).copied().collect();
    Tensor::new(first.name.clone(), first.dtype, vec![rows, width], bytes)
}

/// A matrix of `rows` rows with these blocks, each with its first row, one to the right of the
/// other, and zeros elsewhere; `None` if one does not lie in it or their dtypes differ.
pub(super) fn block_diagonal(rows: usize, blocks: &[(usize, Tensor)]) -> Option<Tensor> {
    let first = &blocks.first()?.1;
    let size = element_bytes(first)?;
    let mut width = 0_usize;
    for (start, block) in blocks {
        let &[height, columns] = block.shape.as_slice() else { return None };
        if block.dtype != first.dtype || start.checked_add(height)? > rows {
            return None;
        }
        width = width.checked_add(columns)?;
    }
    let row_bytes = width.checked_mul(size)?;
    let mut bytes = vec![0; rows.checked_mul(row_bytes)?];
    let mut before = 0;
    for (start, block) in blocks {
        let own = block.shape[1] * size;
        let target = bytes.chunks_exact_mut(row_bytes.max(1)).skip(*start);
        for (row, source) in target.zip(block.bytes().chunks_exact(own.max(1))) {
            row.get_mut(before..before + own)?.copy_from_slice(source);
        }
        before += own;
    }
    Tensor::new(first.name.clone(), first.dtype, vec![rows, width], bytes)
}

/// A tensor of zeros like another.
pub(super) fn zeros_like(tensor: &Tensor) -> Option<Tensor> {
    let bytes = vec![0; tensor.bytes().len()];
    Tensor::new(tensor.name.clone(), tensor.dtype, tensor.shape.clone(), bytes)
}

fn element_bytes(tensor: &Tensor) -> Option<usize> {
    let bits = tensor.dtype.bits() as usize;
    bits.is_multiple_of(8).then_some(bits / 8)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::dtype::Dtype;

    fn matrix(rows: usize, columns: usize) -> Tensor {
        let bytes = (0..rows * columns).flat_map(|it| (it as u16).to_le_bytes()).collect();
        Tensor::new("t".to_owned(), Dtype::F16, vec![rows, columns], bytes).unwrap()
    }

    fn numbers(tensor: &Tensor) -> Vec<u16> {
        tensor.bytes().chunks_exact(2).map(|it| u16::from_le_bytes([it[0], it[1]])).collect()
    }

    #[test]
    fn transposing() {
        let turned = transposed(&matrix(2, 3)).unwrap();
        assert_eq!((numbers(&turned), turned.shape), (vec![0, 3, 1, 4, 2, 5], vec![3, 2]));
    }

    #[test]
    fn rotary_heads() {
        // numpy: arange(8).reshape(2, 2, 2, 1).swapaxes(1, 2).reshape(8)
        let rows = matrix(8, 1);
        assert_eq!(numbers(&paired(&rows, 2).unwrap()), [0, 2, 1, 3, 4, 6, 5, 7]);
        // numpy: arange(12).reshape(2, 2, 3, 1).swapaxes(1, 2).reshape(12)
        let rows = matrix(12, 1);
        let there = paired(&rows, 2).unwrap();
        assert_eq!(numbers(&there), [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]);
        assert_eq!(numbers(&halved(&there, 2).unwrap()), numbers(&rows));
        assert!(paired(&rows, 5).is_none() && halved(&rows, 0).is_none());
        assert!(paired(&rows, 4).is_none(), "heads of odd size");
    }

    #[test]
    fn nothing_is_not_moved() {
        let empty = |shape: &[usize]| {
            Tensor::new("t".to_owned(), Dtype::F32, shape.to_vec(), Vec::new()).unwrap()
        };
        assert!(transposed(&empty(&[0, 1 << 50])).is_none());
        assert!(paired(&empty(&[1 << 50, 0]), 2).is_none());
        assert!(unstacked(&empty(&[1 << 50, 0, 0])).is_none());
        assert!(padded(&empty(&[1 << 50, 0]), 1 << 51, 0).is_none());
    }

    #[test]
    fn stacks_and_zeros() {
        let parts = [matrix(1, 2), matrix(1, 2)];
        let stack = stacked("s".to_owned(), &parts).unwrap();
        assert_eq!(stack.shape, [2, 1, 2]);
        let again = unstacked(&stack).unwrap();
        assert!(again.iter().zip(&parts).all(|(x, y)| x.bytes() == y.bytes()));
        assert!(stacked("s".to_owned(), &[matrix(1, 2), matrix(2, 1)]).is_none());
        let larger = padded(&matrix(2, 1), 3, 2).unwrap();
        assert_eq!(numbers(&larger), [0, 0, 1, 0, 0, 0]);
        assert!(padded(&matrix(2, 1), 1, 1).is_none());
        assert!(padded(&matrix(2, 1), 2, 65).is_none(), "too many zeros");
    }
}
