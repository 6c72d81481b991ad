//! Block-diagonal matrices of which only the blocks are stored, and other rearrangements of rows.

use crate::error::{ExpansionLimit, ExpansionProblem};
use crate::limits;
use crate::model::Adapter;
use crate::tensor::Tensor;

/// What the factors of one adapter may still take once their zeros are written out.
#[derive(Clone, Debug)]
pub struct Expansions {
    taken: u64,
    limit: u64,
}

impl Expansions {
    /// Of an adapter that stores so many bytes.
    pub(crate) fn new(stored_bytes: u64) -> Expansions {
        let limit = stored_bytes.saturating_mul(limits::EXPANSION_FACTOR);
        Expansions { taken: 0, limit: limit.min(limits::EXPANSION_BYTES) }
    }

    /// Of an adapter that was read, some of whose factors may have been written out already.
    pub fn of(adapter: &Adapter) -> Expansions {
        let bytes = |wanted: &dyn Fn(&Tensor) -> bool| -> u64 {
            let tensors = adapter.components.iter().flat_map(|component| component.form.tensors());
            tensors.filter(|tensor| wanted(tensor)).map(|tensor| tensor.bytes().len() as u64).sum()
        };
        match bytes(&|tensor| tensor.mapped_file().is_some()) {
            // It was never in a file.
            0 => Expansions::new(bytes(&|_| true)),
            stored => Expansions {
                taken: bytes(&|tensor| tensor.mapped_file().is_none()),
                ..Expansions::new(stored)
            },
        }
    }

    /// The memory for so many rows of `tensor`, all zeros.
    fn zeros(
        &mut self,
        tensor: &Tensor,
        rows: usize,
        line: usize,
    ) -> Result<Vec<u8>, ExpansionProblem> {
        let bytes = (rows as u64).saturating_mul(line as u64);
        let after = self.taken.saturating_add(bytes);
        let mut zeros = Vec::new();
        let has_room = after <= self.limit
            && usize::try_from(bytes).is_ok_and(|count| {
                zeros.try_reserve_exact(count).map(|()| zeros.resize(count, 0)).is_ok()
            });
        if !has_room {
            let (tensor, taken, limit) = (tensor.name.clone(), self.taken, self.limit);
            return Err(ExpansionLimit { tensor, bytes, taken, limit }.into());
        }
        self.taken = after;
        Ok(zeros)
    }
}

/// Where a row of a stored matrix goes in the larger one that has zeros around it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Move {
    /// The row of the stored matrix.
    pub(crate) from: usize,
    /// The row of the larger one.
    pub(crate) to: usize,
    /// In which of the blocks of columns.
    pub(crate) block: usize,
}

/// The matrix of `rows` × (C·count) that has rows of an R × C tensor where `moves` say, and is 0
/// elsewhere.
pub(crate) fn scatter(
    stored: &Tensor,
    (rows, count): (usize, usize),
    moves: impl IntoIterator<Item = Move>,
    expansions: &mut Expansions,
) -> Result<Tensor, ExpansionProblem> {
    let &[_, columns] = stored.shape.as_slice() else {
        return Err(ExpansionProblem::Shape);
    };
    let line = element_bytes(stored).and_then(|size| columns.checked_mul(size));
    let sizes = line.zip(columns.checked_mul(count));
    let wide = line.and_then(|line| line.checked_mul(count));
    let (Some((line, width)), Some(wide)) = (sizes, wide) else {
        return Err(ExpansionProblem::Shape);
    };
    let mut bytes = expansions.zeros(stored, rows, wide)?;
    // Without columns there may be any number of rows.
    for Move { from, to, block } in moves.into_iter().take_while(|_| line > 0) {
        let from = stored.bytes().get(from * line..(from + 1) * line);
        let at = to * wide + block * line;
        match (from, bytes.get_mut(at..at + line)) {
            (Some(from), Some(into)) if block < count => into.copy_from_slice(from),
            _ => return Err(ExpansionProblem::Shape),
        }
    }
    Tensor::new(stored.name.clone(), stored.dtype, vec![rows, width], bytes)
        .ok_or(ExpansionProblem::Shape)
}

/// The matrix of R × (C·count) that has the `count` equal blocks of rows of an R × C tensor on its
/// diagonal.
pub(crate) fn block_diagonal(
    stored: &Tensor,
    count: usize,
    expansions: &mut Expansions,
) -> Result<Tensor, ExpansionProblem> {
    let &[rows, _] = stored.shape.as_slice() else {
        return Err(ExpansionProblem::Shape);
    };
    if !(1..=limits::BLOCKS).contains(&count) || rows % count != 0 {
        return Err(ExpansionProblem::Shape);
    }
    let per_block = rows / count;
    let moves = (0..rows).map(|row| Move { from: row, to: row, block: row / per_block });
    scatter(stored, (rows, count), moves, expansions)
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

    fn roomy() -> Expansions {
        Expansions::new(1000)
    }

    #[test]
    fn blocks_lie_on_the_diagonal() {
        let expanded = block_diagonal(&tensor([4, 2]), 2, &mut roomy()).unwrap();
        assert_eq!(expanded.shape, [4, 4]);
        let expected = [1., 2., 0., 0., 3., 4., 0., 0., 0., 0., 5., 6., 0., 0., 7., 8.]
            .map(|value: f32| value);
        assert_eq!(expanded.to_f32().unwrap(), expected);
        for count in [0, 3, limits::BLOCKS + 1] {
            let problem = block_diagonal(&tensor([4, 2]), count, &mut roomy()).unwrap_err();
            assert_eq!(problem, ExpansionProblem::Shape, "{count}");
        }
        assert_eq!(block_diagonal(&tensor([4, 0]), 2, &mut roomy()).unwrap().shape, [4, 0]);
        let endless = Tensor::new("t".into(), Dtype::F32, vec![1 << 60, 0], Vec::new()).unwrap();
        assert!(block_diagonal(&endless, 2, &mut roomy()).is_ok());
        assert_eq!(block_diagonal(&tensor([0, 4]), 2, &mut roomy()).unwrap().shape, [0, 8]);
    }

    #[test]
    fn rows_are_scattered_and_gathered() {
        let to = |from, to, block| Move { from, to, block };
        let scattered =
            scatter(&tensor([2, 1]), (3, 2), [to(0, 0, 0), to(1, 2, 1)], &mut roomy()).unwrap();
        assert_eq!(scattered.to_f32().unwrap(), [1., 0., 0., 0., 0., 2.]);
        for outside in [to(2, 0, 0), to(0, 3, 0), to(0, 0, 2)] {
            let problem = scatter(&tensor([2, 1]), (3, 2), [outside], &mut roomy()).unwrap_err();
            assert_eq!(problem, ExpansionProblem::Shape, "{outside:?}");
        }
        let gathered = gather_rows(&tensor([3, 1]), &[2, 0]).unwrap();
        assert_eq!(gathered.to_f32().unwrap(), [3., 1.]);
        assert!(gather_rows(&tensor([3, 1]), &[3]).is_none());
    }

    /// The limit is of all expansions of an adapter together.
    #[test]
    fn expansions_are_limited() {
        let stored = tensor([4, 2]);
        // Each takes 64 bytes.
        let mut expansions = Expansions::new(2);
        assert_eq!(expansions.limit, 128);
        for _ in 0..2 {
            block_diagonal(&stored, 2, &mut expansions).unwrap();
        }
        let problem = block_diagonal(&stored, 2, &mut expansions).unwrap_err();
        let limit = ExpansionLimit { tensor: "t".into(), bytes: 64, taken: 128, limit: 128 };
        assert_eq!(problem, limit.into());
        assert_eq!(
            problem.to_string(),
            "`t` is stored without its zeros and would take 64 bytes with them, after 128 for \
             others; the limit for an adapter of this size is 128"
        );
        assert_eq!(Expansions::new(u64::MAX).limit, limits::EXPANSION_BYTES);
    }
}
