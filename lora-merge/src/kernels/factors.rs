//! The two low-rank factors of one tensor, packed for the kernels.
//!
//! Owns the layout (`right` in panels of [`PANEL`] columns) and the choice of
//! accumulation path, which looks at the data and at nothing else: the same
//! adapter takes the same path on every machine and in every tile.

use std::ops::Range;

/// Columns per packed panel of the right factor: three groups of
/// [`LANES`] columns.
pub const PANEL: usize = GROUPS * LANES;

/// Columns the kernels treat as one vector, whatever the register width.
pub const LANES: usize = 16;

/// Vectors per panel.
pub(crate) const GROUPS: usize = 3;

/// Ranks accumulated in one `f32` chain; see "Accumulation" in the module
/// documentation.
pub(crate) const CHUNK: usize = 64;

/// How Δ is accumulated for a whole tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Path {
    /// One `f32` chain, the scale folded into the left factor exactly.
    F32,
    /// `f32` chains of 64 ranks summed in `f64`, then one fused `f64` multiply-add.
    F64,
}

/// One row `k` of a panel: `right[k, 48·panel ..][..48]`, zero-padded, on a
/// cache-line boundary so that no load straddles two lines.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub(crate) struct PanelRow(pub(crate) [[f32; LANES]; GROUPS]);

/// `scale · left · right`, ready for [`merge_tile`](super::merge_tile).
///
/// `left` is rows×rank and `right` is rank×cols. For a linear layer those are
/// B (out×r) and A (r×in); for a transposed (Conv1D) weight, Aᵀ and Bᵀ.
#[derive(Clone, Debug)]
pub struct Factors {
    rows: usize,
    cols: usize,
    rank: usize,
    scale: f64,
    path: Path,
    /// rows×rank, row-major; already multiplied by the scale on [`Path::F32`].
    left: Vec<f32>,
    /// Panel after panel, `rank` rows each.
    right: Vec<PanelRow>,
}

impl Factors {
    /// Packs `left` (rows×rank) and `right` (rank×cols), both row-major.
    ///
    /// # Panics
    ///
    /// If a slice does not have the length its shape says.
    #[must_use]
    pub fn new(
        rows: usize,
        cols: usize,
        rank: usize,
        left: &[f32],
        right: &[f32],
        scale: f64,
    ) -> Self {
        assert_eq!(Some(right.len()), rank.checked_mul(cols), "right factor is not rank×cols");
        Self::pack(rows, cols, rank, left.to_vec(), scale, |k, columns, row| {
            row.copy_from_slice(&right[k * cols..][columns]);
        })
    }

    /// As [`Factors::new`], without holding the right factor twice: `fill(k, columns, row)` writes
    /// those columns of its row `k` into `row`.
    ///
    /// # Panics
    ///
    /// If `left` does not have the length its shape says.
    #[must_use]
    pub fn pack(
        rows: usize,
        cols: usize,
        rank: usize,
        mut left: Vec<f32>,
        scale: f64,
        mut fill: impl FnMut(usize, Range<usize>, &mut [f32]),
    ) -> Self {
        assert_eq!(Some(left.len()), rows.checked_mul(rank), "left factor is not rows×rank");
        let path =
            if rank <= CHUNK && scale_exactly(&mut left, scale) { Path::F32 } else { Path::F64 };
        let panels = cols.div_ceil(PANEL);
        let mut right = Vec::with_capacity(panels * rank);
        for panel in 0..panels {
            let first = panel * PANEL;
            let width = PANEL.min(cols - first);
            for k in 0..rank {
                let mut row = PanelRow([[0.0; LANES]; GROUPS]);
                fill(k, first..first + width, &mut row.0.as_flattened_mut()[..width]);
                right.push(row);
            }
        }
        Self { rows, cols, rank, scale, path, left, right }
    }

    /// Rows of the whole tensor.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns of the whole tensor.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Inner dimension of the product.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The scale Δ carries.
    #[must_use]
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// The accumulation path this tensor takes.
    #[must_use]
    pub fn path(&self) -> Path {
        self.path
    }

    /// Bytes held on the heap, for a memory budget.
    #[must_use]
    pub fn heap_bytes(&self) -> usize {
        self.left.capacity() * size_of::<f32>() + self.right.capacity() * size_of::<PanelRow>()
    }

    /// Row `row` of the left factor, `rank` long.
    #[inline(always)]
    pub(crate) fn left_row(&self, row: usize) -> &[f32] {
        &self.left[row * self.rank..][..self.rank]
    }

    /// Panel `panel` of the right factor, `rank` rows long.
    #[inline(always)]
    pub(crate) fn right_panel(&self, panel: usize) -> &[PanelRow] {
        &self.right[panel * self.rank..][..self.rank]
    }
}

/// Multiplies `left` by a scale that is a power of two if no element rounds; else leaves it alone
/// and says so.
fn scale_exactly(left: &mut [f32], scale: f64) -> bool {
    const MANTISSA: u64 = (1 << 52) - 1;
    // Powers of two beyond f32's own range could underflow even in f64.
    let reasonable = (f64::from(f32::MIN_POSITIVE)..=2f64.powi(127)).contains(&scale.abs());
    let scaled = |element: f32| (f64::from(element) * scale) as f32;
    let exact = reasonable
        && scale.to_bits() & MANTISSA == 0
        // False for NaN, which therefore takes the other path.
        && left.iter().all(|&element| f64::from(scaled(element)) == f64::from(element) * scale);
    if exact {
        for element in left.iter_mut() {
            *element = scaled(*element);
        }
    }
    exact
}
