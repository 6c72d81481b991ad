//! Matrices cut into blocks that share one scale.

use super::survey::{Part, Result};

/// A stack of row-major matrices of equal shape, cut into blocks from the upper left corner on;
/// blocks at the right and lower edges may be smaller. One scale per block, row-major.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Grid {
    /// Rows of one matrix.
    pub(super) rows: usize,
    /// Columns of every matrix.
    pub(super) columns: usize,
    /// Rows and columns of a block. A block does not reach from one matrix into the next.
    pub(super) block: [usize; 2],
    /// Whether one scale serves all matrices: `block` is then a whole one.
    pub(super) single: bool,
}

/// Consecutive elements of one row and one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// Row, counted through all matrices.
    pub(super) row: usize,
    /// First column.
    pub(super) column: usize,
    /// Number of elements.
    pub(super) count: usize,
    /// Index of the block's scale.
    pub(super) scale: usize,
}

impl Grid {
    /// The grid that the shape of `scale` shows for codes that stand for a `shape` of at least two
    /// dimensions.
    ///
    /// With `blocks`, the sizes that the configuration allows, the scales must be one per block of
    /// one of them. Without, blocks are of 128×128 if the numbers fit, and otherwise of equal size.
    pub(super) fn of(
        codes: &Part<'_>,
        shape: &[usize],
        scale: &Part<'_>,
        blocks: &[[usize; 2]],
    ) -> Result<Grid> {
        let [stack @ .., rows, columns] = shape else {
            return Err(codes.wrong_shape("of at least two dimensions".to_owned()));
        };
        let (rows, columns) = (*rows, *columns);
        if rows == 0 || columns == 0 || stack.contains(&0) {
            return Err(codes.wrong_shape("without a 0".to_owned()));
        }
        let whole = [rows, columns];
        let grid = |block| Grid { rows, columns, block, single: false };
        let numbers =
            |[height, width]: [usize; 2]| [rows.div_ceil(height), columns.div_ceil(width)];
        // One scale for a whole stack is one per block only if a block may be a whole matrix.
        let one = scale.info.elements() == 1 && stack.iter().any(|&matrices| matrices > 1);
        if one && (blocks.is_empty() || blocks.contains(&whole)) {
            return Ok(Grid { single: true, ..grid(whole) });
        }
        let fits = |block: [usize; 2]| are_scales(scale.shape(), stack, numbers(block));
        // Of several that fit, one that leaves no smaller block at an edge.
        let divides = |[height, width]: [usize; 2]| {
            rows.is_multiple_of(height) && columns.is_multiple_of(width)
        };
        let fitting = || blocks.iter().copied().filter(|&block| fits(block));
        if let Some(block) = fitting().find(|&block| divides(block)).or(fitting().next()) {
            return Ok(grid(block));
        }
        if let Some(&[height, width]) = blocks.first() {
            let wanted = numbers([height, width]);
            let wanted: Vec<usize> = stack.iter().copied().chain(wanted).collect();
            return Err(scale.wrong_shape(format!("{wanted:?} (blocks of {height}×{width})")));
        }
        if fits([128, 128]) {
            return Ok(grid([128, 128]));
        }
        let [down, across] = match scale.shape().strip_prefix(stack) {
            Some([]) => [1, 1],
            Some(&[down]) => [down, 1],
            Some(&[down, across]) => [down, across],
            _ => [0, 0],
        };
        let equal = |number: usize, of: usize| number > 0 && of.is_multiple_of(number);
        if equal(down, rows) && equal(across, columns) {
            return Ok(grid([rows / down, columns / across]));
        }
        Err(scale.wrong_shape(format!("one scale per block of {shape:?}")))
    }

    /// Rows and columns of the scales of one matrix.
    pub(super) fn scales(&self) -> [usize; 2] {
        [self.rows.div_ceil(self.block[0]), self.columns.div_ceil(self.block[1])]
    }

    /// Calls `visit` for the runs that the elements `first .. first + count` consist of, with
    /// where each lies in them.
    #[inline(always)]
    pub(super) fn runs(&self, first: usize, count: usize, mut visit: impl FnMut(Run, usize)) {
        let [height, width] = self.block;
        let [down, across] = self.scales();
        let (mut row, mut column) = (first / self.columns, first % self.columns);
        let mut done = 0;
        while done < count {
            let above = match self.single {
                true => 0,
                false => (row / self.rows * down + row % self.rows / height) * across,
            };
            let end = self.columns.min(column + (count - done));
            let mut block = column / width;
            while column < end {
                let stop = end.min((block + 1) * width);
                let scale = above + block;
                visit(Run { row, column, count: stop - column, scale }, done);
                done += stop - column;
                column = stop;
                block += 1;
            }
            column = 0;
            row += 1;
        }
    }
}

/// Whether a shape is that of `down` × `across` scales for each of a stack of matrices. Trailing
/// dimensions of 1 may be missing.
fn are_scales(shape: &[usize], stack: &[usize], [down, across]: [usize; 2]) -> bool {
    match shape.strip_prefix(stack) {
        Some([]) => [down, across] == [1, 1],
        Some(&[number]) => [down, across] == [number, 1],
        Some(&[first, second]) => [down, across] == [first, second],
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What scale an element has, straight from the definition.
    fn scale_of(grid: &Grid, element: usize) -> usize {
        let (row, column) = (element / grid.columns, element % grid.columns);
        let (matrix, row) = (row / grid.rows, row % grid.rows);
        let [down, across] = grid.scales();
        if grid.single {
            return 0;
        }
        matrix * down * across + row / grid.block[0] * across + column / grid.block[1]
    }

    #[test]
    fn runs_cover_every_element_once_with_its_scale() {
        for (rows, columns, block) in
            [(5, 7, [2, 3]), (5, 7, [5, 7]), (1, 1, [4, 4]), (6, 4, [1, 4]), (3, 8, [1, 2])]
        {
            for single in [false, true] {
                let block = if single { [rows, columns] } else { block };
                let grid = Grid { rows, columns, block, single };
                let elements = 3 * rows * columns;
                for first in 0..=elements {
                    for count in 0..=elements - first {
                        let mut covered = 0;
                        grid.runs(first, count, |run, at| {
                            assert_eq!(at, covered);
                            for offset in 0..run.count {
                                let element = run.row * columns + run.column + offset;
                                assert_eq!(element, first + covered);
                                assert_eq!(run.scale, scale_of(&grid, element));
                                covered += 1;
                            }
                        });
                        assert_eq!(covered, count);
                    }
                }
            }
        }
    }
}
