//! The low-rank factors of one tensor, packed for the kernels.
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
    /// `f32` chains of at most 64 ranks, scaled and summed in `f64`.
    F64,
}

/// A run of ranks that share a scale: one of several low-rank terms of a tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Segment {
    /// How many ranks, following those of the segment before.
    pub ranks: usize,
    /// What multiplies their product.
    pub scale: f64,
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
/// Several terms of one tensor lie side by side: their ranks follow each other,
/// and a [`Segment`] says which scale belongs to which.
#[derive(Clone, Debug)]
pub struct Factors {
    rows: usize,
    cols: usize,
    rank: usize,
    /// Each with at least one rank, unless it is the only one.
    segments: Vec<Segment>,
    path: Path,
    /// rows×rank, row-major; already multiplied by the scales on [`Path::F32`].
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
        left: Vec<f32>,
        scale: f64,
        fill: impl FnMut(usize, Range<usize>, &mut [f32]),
    ) -> Self {
        Self::pack_segments(rows, cols, &[Segment { ranks: rank, scale }], left, fill)
    }

    /// As [`Factors::pack`], for the sum of several terms: the ranks of `segments` follow each
    /// other in the columns of `left` and in the `k` of `fill`, and each segment has its own scale.
    ///
    /// Segments without ranks are left out, except a single one: it is what [`Factors::pack`]
    /// makes of rank 0.
    ///
    /// # Panics
    ///
    /// If `left` does not have the length its shape says.
    #[must_use]
    pub fn pack_segments(
        rows: usize,
        cols: usize,
        segments: &[Segment],
        mut left: Vec<f32>,
        mut fill: impl FnMut(usize, Range<usize>, &mut [f32]),
    ) -> Self {
        let segments = match segments {
            [only] => vec![*only],
            several => several.iter().copied().filter(|segment| segment.ranks > 0).collect(),
        };
        let rank = segments.iter().try_fold(0_usize, |rank, next| rank.checked_add(next.ranks));
        let elements = rank.and_then(|rank| rows.checked_mul(rank));
        assert_eq!(Some(left.len()), elements, "left factor is not rows×rank");
        let rank = rank.unwrap_or_default();
        let exact = rank <= CHUNK && scale_exactly(&mut left, &segments);
        let path = if exact { Path::F32 } else { Path::F64 };
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
        Self { rows, cols, rank, segments, path, left, right }
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

    /// Inner dimension of the product: the ranks of all segments.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The terms of the sum, in order.
    #[must_use]
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The scale Δ carries: that of the only segment. Several are scaled before they are summed,
    /// and their sum carries the scale 1.
    #[must_use]
    pub fn scale(&self) -> f64 {
        match self.segments[..] {
            [only] => only.scale,
            _ => 1.0,
        }
    }

    /// The accumulation path this tensor takes.
    #[must_use]
    pub fn path(&self) -> Path {
        self.path
    }

    /// Bytes held on the heap, for a memory budget.
    #[must_use]
    pub fn heap_bytes(&self) -> usize {
        self.segments.capacity() * size_of::<Segment>()
            + self.left.capacity() * size_of::<f32>()
            + self.right.capacity() * size_of::<PanelRow>()
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

/// Multiplies every segment of `left` by its scale, if all scales are powers of two and no element
/// rounds; else leaves `left` alone and says so.
fn scale_exactly(left: &mut [f32], segments: &[Segment]) -> bool {
    let scales: Vec<f64> = segments
        .iter()
        .flat_map(|segment| std::iter::repeat_n(segment.scale, segment.ranks))
        .collect();
    // Rank 0 has no rows to speak of, and chunks of zero elements do not exist.
    let rank = scales.len().max(1);
    let scaled = |element: f32, scale: f64| (f64::from(element) * scale) as f32;
    // False for NaN, which therefore takes the other path.
    let is_exact = |(&element, &scale): (&f32, &f64)| {
        f64::from(scaled(element, scale)) == f64::from(element) * scale
    };
    let exact = segments.iter().all(|segment| is_foldable(segment.scale))
        && left.chunks_exact(rank).all(|row| row.iter().zip(&scales).all(is_exact));
    if exact {
        for row in left.chunks_exact_mut(rank) {
            for (element, scale) in row.iter_mut().zip(&scales) {
                *element = scaled(*element, *scale);
            }
        }
    }
    exact
}

/// Whether `scale` is a power of two, up to its sign, with a normal `f32` for its value. Powers
/// beyond could underflow even in `f64`.
fn is_foldable(scale: f64) -> bool {
    const MANTISSA: u64 = (1 << 52) - 1;
    (f64::from(f32::MIN_POSITIVE)..=2f64.powi(127)).contains(&scale.abs())
        && scale.to_bits() & MANTISSA == 0
}
