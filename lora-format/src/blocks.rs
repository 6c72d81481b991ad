//! Block-diagonal matrices of which only the blocks are stored, and other rearrangements of rows.

use crate::limits;
use crate::tensor::Tensor;

/// The matrix of R × (C·count) that has the `count` equal blocks of rows of an R × C tensor on its
/// diagonal; `None` if the rows do not divide so, or there is no room for it.
pub(crate) fn block_diagonal(stored: &Tensor, count: usize) -> Option<Tensor> {
    let &[rows, columns] = stored.shape.as_slice() else {
        return None;
    };
    if !(1..=limits::BLOCKS).contains(&count) || rows % count != 0 {
        return None;
    }
    let width = columns.checked_mul(count)?;
    let line = columns.checked_mul(element_bytes(stored)?)?;
    let mut bytes = zeros(rows.checked_mul(line)?.checked_mul(count)?)?;
    if line > 0 {
        let per_block = rows / count;
        let lines = bytes.chunks_exact_mut(line * count).zip(stored.bytes().chunks_exact(line));
        for (row, (into, from)) in lines.enumerate() {
            let at = row / per_block * line;
            into[at..at + line].copy_from_slice(from);
        }
    }
    Tensor::new(stored.name.clone(), stored.dtype, vec![rows, width], bytes)
}

/// The matrix of `rows` × C whose block of rows number `places[i]` is the i-th of the stored ones
/// and whose other rows are 0.
pub(crate) fn spread_rows(stored: &Tensor, places: &[usize], rows: usize) -> Option<Tensor> {
    let &[stored_rows, columns] = stored.shape.as_slice() else {
        return None;
    };
    if places.is_empty() || stored_rows % places.len() != 0 {
        return None;
    }
    let block = (stored_rows / places.len()).checked_mul(columns)?;
    let block = block.checked_mul(element_bytes(stored)?)?;
    let mut bytes = zeros(rows.checked_mul(columns)?.checked_mul(element_bytes(stored)?)?)?;
    for (index, &place) in places.iter().enumerate() {
        let at = place.checked_mul(block)?;
        let from = stored.bytes().get(index * block..(index + 1) * block)?;
        bytes.get_mut(at..at.checked_add(block)?)?.copy_from_slice(from);
    }
    Tensor::new(stored.name.clone(), stored.dtype, vec![rows, columns], bytes)
}

/// The rows of a matrix in the order of `places`.
pub(crate) fn gather_rows(stored: &Tensor, places: &[usize]) -> Option<Tensor> {
    let &[_, columns] = stored.shape.as_slice() else {
        return None;
    };
    let line = columns.checked_mul(element_bytes(stored)?)?;
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(line.checked_mul(places.len())?).ok()?;
    for &place in places {
        let at = place.checked_mul(line)?;
        bytes.extend_from_slice(stored.bytes().get(at..at.checked_add(line)?)?);
    }
    Tensor::new(stored.name.clone(), stored.dtype, vec![places.len(), columns], bytes)
}

fn zeros(count: usize) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(count).ok()?;
    bytes.resize(count, 0);
    Some(bytes)
}

fn element_bytes(tensor: &Tensor) -> Option<usize> {
    usize::try_from(tensor.dtype.tensor_bytes(&[1])?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::Dtype;

    fn tensor(shape: [usize; 2]) -> Tensor {
        let values = (1..=shape[0] * shape[1]).flat_map(|value| (value as f32).to_le_bytes());
        Tensor::new("t".into(), Dtype::F32, shape.to_vec(), values.collect()).unwrap()
    }

    #[test]
    fn blocks_lie_on_the_diagonal() {
        let expanded = block_diagonal(&tensor([4, 2]), 2).unwrap();
        assert_eq!(expanded.shape, [4, 4]);
        let expected = [1., 2., 0., 0., 3., 4., 0., 0., 0., 0., 5., 6., 0., 0., 7., 8.]
            .map(|value: f32| value);
        assert_eq!(expanded.to_f32().unwrap(), expected);
        for count in [0, 3, limits::BLOCKS + 1] {
            assert!(block_diagonal(&tensor([4, 2]), count).is_none(), "{count}");
        }
        assert_eq!(block_diagonal(&tensor([4, 0]), 2).unwrap().shape, [4, 0]);
    }

    #[test]
    fn rows_are_spread_and_gathered() {
        let spread = spread_rows(&tensor([2, 1]), &[0, 2], 3).unwrap();
        assert_eq!(spread.to_f32().unwrap(), [1., 0., 2.]);
        assert!(spread_rows(&tensor([2, 1]), &[0, 3], 3).is_none());
        let gathered = gather_rows(&tensor([3, 1]), &[2, 0]).unwrap();
        assert_eq!(gathered.to_f32().unwrap(), [3., 1.]);
        assert!(gather_rows(&tensor([3, 1]), &[3]).is_none());
    }
}
