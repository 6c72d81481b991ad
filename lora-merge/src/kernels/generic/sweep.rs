//! The passes of [`sweep`](super::super::sweep), some rows at a time.
//!
//! A pass goes by block of rows and, in each, by panel of columns. It brings a
//! panel into lines of `f32` and multiplies it by `V` while it is in the
//! first-level cache. Only when a block's last panel is done is its `W` known.
//! The lines wait for it, in the second-level cache: they go on to `Z` panel by
//! panel, each just before the next block takes its place. Meanwhile the
//! kernels ask for the elements of the panel to come, since arithmetic and
//! memory take about equally long.
//!
//! The chains of the contract go through memory from panel to panel and from
//! block to block, so none of this shows in the results.

use super::super::change::{Run, RunChange};
use super::super::factors::LANES;
use super::super::sweep::{BlockRow, COLUMN_PANEL, Left, Line, Pass, Rows, SweepScratch, scalar};
use super::super::vector::Vector;
use super::source::{Place, Source, with_source};

/// The steps, as an instruction set has compiled them for itself.
pub(crate) trait Steps: Vector {
    /// Rows the kernels keep in registers, for blocks of 16·G vectors at index
    /// G: as many as share a group of lines.
    const GROUP_ROWS: [usize; 5];

    fn pack<S: Source>(self, source: S, place: &Place, lines: &mut [Line]);
    fn product<const G: usize>(
        self,
        lines: &[Line],
        x: &[BlockRow<G>],
        w: &mut [BlockRow<G>],
        ahead: &mut Ahead<'_>,
    );
    fn transposed<const G: usize>(
        self,
        lines: &[Line],
        w: &[BlockRow<G>],
        z: &mut [BlockRow<G>],
        ahead: &mut Ahead<'_>,
    );
    fn settle<const G: usize>(self, z: &mut [BlockRow<G>]);
    fn difference<S: Source>(self, source: S, out: &mut [f32]);
    fn energy(self, a: &[f32]) -> f64;
    fn change(self, run: Run<'_>, difference: &mut [f32]) -> RunChange;
    fn residual_energy(self, a: &[f32], product: &[f64]) -> f64;
}

/// A whole [`Pass`].
pub(crate) fn run<V: Steps, const G: usize>(v: V, pass: Pass<'_, G>, scratch: &mut SweepScratch) {
    let Pass { rows, cols, mut left, mut z } = pass;
    let count = left.rows();
    if count == 0 {
        return;
    }
    let group_rows = V::GROUP_ROWS[G];
    let block_rows = SweepScratch::rows_for::<G>(cols) / group_rows * group_rows;
    // Lines that wait for their `W` need a place for every panel.
    let waits = z.is_some() && matches!(left, Left::Product(..));
    let kept = if waits { cols } else { cols.min(COLUMN_PANEL) };
    let lines = scratch.lines(block_rows * kept.div_ceil(LANES));
    let panel_lines = block_rows * (COLUMN_PANEL / LANES);

    // Rows that the last group lacks. Where A is +0 they leave `Z` alone: not
    // even a −0 changes if −0 is added to it.
    let blank = BlockRow([[-0.0; LANES]; G]);
    let mut before = [blank; SweepScratch::ROWS];
    let mut current = [blank; SweepScratch::ROWS];
    let mut rows_before = 0;
    // One turn more than there are blocks if the last one has to wait.
    let mut row = 0;
    while row < count || rows_before > 0 {
        let rows_now = block_rows.min(count - row);
        current.fill(blank);
        match &left {
            Left::Product(..) => current[..rows_now].fill(BlockRow::ZERO),
            Left::Given(w) => current[..rows_now].copy_from_slice(&w[row..][..rows_now]),
        }
        let last = row + rows_now == count && (!waits || rows_now == 0);
        for col in (0..cols).step_by(COLUMN_PANEL) {
            let panel = col..cols.min(col + COLUMN_PANEL);
            let group_lines = panel.len().div_ceil(LANES) * group_rows;
            let lines = match waits {
                true => &mut lines[col / COLUMN_PANEL * panel_lines..],
                false => &mut *lines,
            };
            let next = Next { rows, cols, row, count: rows_now, block_rows, col, total: count };
            if let Some(z) = &mut z
                && waits
            {
                for first in (0..rows_before).step_by(group_rows) {
                    let lines = &lines[first / group_rows * group_lines..][..group_lines];
                    let w = &before[first..first + group_rows];
                    let mut ahead = next.group(first, group_rows, Half::First);
                    v.transposed(lines, w, &mut z[panel.clone()], &mut ahead);
                }
            }
            for first in (0..rows_now).step_by(group_rows) {
                let lines = &mut lines[first / group_rows * group_lines..][..group_lines];
                let (row, rows_left) = (row + first, rows_now - first);
                let place = Place {
                    stride: cols,
                    row,
                    rows: rows_left.min(group_rows),
                    col,
                    cols: panel.len(),
                    group_rows,
                };
                with_source!(rows, v.pack(&place, lines));
                let w = &mut current[first..first + group_rows];
                let half = if waits { Half::Second } else { Half::Both };
                let mut ahead = next.group(first, group_rows, half);
                match (&left, &mut z) {
                    (Left::Product(x, _), _) => {
                        v.product(lines, &x[panel.clone()], w, &mut ahead);
                    }
                    (Left::Given(_), Some(z)) => {
                        v.transposed(lines, w, &mut z[panel.clone()], &mut ahead);
                    }
                    (Left::Given(_), None) => {}
                }
            }
            if let Some(z) = &mut z
                && last
            {
                v.settle(&mut z[panel]);
            }
        }
        if let Left::Product(_, w) = &mut left {
            v.settle(&mut current[..rows_now]);
            w[row..][..rows_now].copy_from_slice(&current[..rows_now]);
            // What the last group lacks was multiplied along.
            current[rows_now..].fill(blank);
        }
        row += rows_now;
        rows_before = if waits { rows_now } else { 0 };
        std::mem::swap(&mut before, &mut current);
    }
}

/// [`difference`](super::super::sweep::difference).
pub(crate) fn difference<V: Steps>(v: V, rows: Rows<'_>, out: &mut [f32]) {
    with_source!(rows, v.difference(out));
}

/// Which of the two kernels that visit a panel asks for the next one.
#[derive(Clone, Copy, PartialEq)]
enum Half {
    First,
    Second,
    /// There is only one.
    Both,
}

/// Where a pass is, to tell what it will read next.
#[derive(Clone, Copy)]
struct Next<'a> {
    rows: Rows<'a>,
    cols: usize,
    row: usize,
    count: usize,
    block_rows: usize,
    col: usize,
    total: usize,
}

impl<'a> Next<'a> {
    /// The elements of the next panel in the rows from `first` on: of this
    /// block, or of the next one when this was the last panel.
    #[inline(always)]
    fn group(&self, first: usize, group_rows: usize, half: Half) -> Ahead<'a> {
        let (row, col, count) = match self.col + COLUMN_PANEL < self.cols {
            true => (self.row, self.col + COLUMN_PANEL, self.count),
            false => (self.row + self.count, 0, self.block_rows),
        };
        let end = (row + count).min(self.total);
        let row = (row + first).min(end);
        let rows = (end - row).min(group_rows);
        let side = |bytes: &'a [u8], size: usize| Side {
            bytes,
            at: (row * self.cols + col) * size,
            stride: self.cols * size,
            width: COLUMN_PANEL * size,
        };
        let sides = match self.rows {
            Rows::Stored { tuned, tuned_type, base } => {
                let (base, base_type) = base.unwrap_or((&[], tuned_type));
                [side(tuned, tuned_type.size()), side(base, base_type.size())]
            }
            // Whoever has made them `f32` has them at hand.
            Rows::Plain(_) => [side(&[], 0); 2],
        };
        let steps = COLUMN_PANEL / LANES;
        let (step, steps) = match half {
            Half::First => (0, 2 * steps),
            Half::Second => (steps, 2 * steps),
            Half::Both => (0, steps),
        };
        Ahead { sides, rows, step, steps }
    }
}

/// Elements to ask for, a few rows at every step: all at once would be more
/// than the memory can keep track of.
pub(crate) struct Ahead<'a> {
    sides: [Side<'a>; 2],
    rows: usize,
    step: usize,
    steps: usize,
}

/// The same rectangle of `tuned` or of `base`, in bytes.
#[derive(Clone, Copy)]
struct Side<'a> {
    /// Empty if there is nothing to ask for.
    bytes: &'a [u8],
    at: usize,
    stride: usize,
    width: usize,
}

impl Ahead<'_> {
    #[inline(always)]
    fn step<V: Vector>(&mut self, v: V) {
        const CACHE_LINE: usize = 64;
        for row in self.step * self.rows / self.steps..(self.step + 1) * self.rows / self.steps {
            for side in self.sides {
                if side.bytes.is_empty() {
                    continue;
                }
                let at = side.at + row * side.stride;
                for at in (at..at + side.width).step_by(CACHE_LINE) {
                    v.will_read(side.bytes, at);
                }
            }
        }
        self.step += 1;
    }
}

/// Adds a panel's part to R rows of `W`, C groups of lanes at a time.
#[inline(always)]
pub(crate) fn product<V: Vector, const G: usize, const R: usize, const C: usize>(
    v: V,
    lines: &[Line],
    x: &[BlockRow<G>],
    w: &mut [BlockRow<G>],
    ahead: &mut Ahead<'_>,
) {
    let blocks = lines.as_chunks::<R>().0;
    let (whole, rest) = x.as_chunks::<LANES>();
    let Some(w) = w.first_chunk_mut::<R>() else { return };
    for first in (0..G).step_by(C) {
        let mut sums = [[v.splat(0.0); C]; R];
        for (block, x) in blocks.iter().zip(whole) {
            if first == 0 {
                ahead.step(v);
            }
            for (k, x) in x.iter().enumerate() {
                extend(v, block, k, x, first, &mut sums);
            }
        }
        if let Some(block) = blocks.get(whole.len()) {
            for (k, x) in rest.iter().take(LANES).enumerate() {
                extend(v, block, k, x, first, &mut sums);
            }
        }
        for (w, sums) in w.iter_mut().zip(&sums) {
            for (w, sum) in w.0[first..].iter_mut().zip(sums) {
                v.store(v.add(v.load(w), *sum), w);
            }
        }
    }
}

/// One step of R·C chains of [`product`].
#[inline(always)]
fn extend<V: Vector, const G: usize, const R: usize, const C: usize>(
    v: V,
    block: &[Line; R],
    k: usize,
    x: &BlockRow<G>,
    first: usize,
    sums: &mut [[V::Floats; C]; R],
) {
    let mut vectors = [v.splat(0.0); C];
    for (vector, x) in vectors.iter_mut().zip(&x.0[first..]) {
        *vector = v.load(x);
    }
    for r in 0..R {
        let a = v.splat(block[r].0[k]);
        for c in 0..C {
            sums[r][c] = v.mul_add(a, vectors[c], sums[r][c]);
        }
    }
}

/// Adds R rows' part to a panel of `Z`: C groups of lanes and K rows of `Z` at
/// a time, K·C chains that do not wait for each other. K divides sixteen.
#[inline(always)]
pub(crate) fn transposed<
    V: Vector,
    const G: usize,
    const R: usize,
    const C: usize,
    const K: usize,
>(
    v: V,
    lines: &[Line],
    w: &[BlockRow<G>],
    z: &mut [BlockRow<G>],
    ahead: &mut Ahead<'_>,
) {
    let blocks = lines.as_chunks::<R>().0;
    let Some(w) = w.first_chunk::<R>() else { return };
    let (whole, rest) = z.as_chunks_mut::<LANES>();
    for first in (0..G).step_by(C) {
        let mut weights = [[v.splat(0.0); C]; R];
        for (weights, w) in weights.iter_mut().zip(w) {
            for (weight, w) in weights.iter_mut().zip(&w.0[first..]) {
                *weight = v.load(w);
            }
        }
        for (block, z) in blocks.iter().zip(whole.iter_mut()) {
            if first == 0 {
                ahead.step(v);
            }
            for (part, z) in z.as_chunks_mut::<K>().0.iter_mut().enumerate() {
                accumulate(v, block, part * K, first, &weights, z);
            }
        }
        if let Some(block) = blocks.get(whole.len()) {
            for (k, z) in rest.iter_mut().take(LANES).enumerate() {
                accumulate(v, block, k, first, &weights, std::array::from_mut(z));
            }
        }
    }
}

/// R steps of K·C chains of [`transposed`].
#[inline(always)]
fn accumulate<V: Vector, const G: usize, const R: usize, const C: usize, const K: usize>(
    v: V,
    block: &[Line; R],
    first_k: usize,
    first: usize,
    weights: &[[V::Floats; C]; R],
    z: &mut [BlockRow<G>; K],
) {
    const { assert!(R <= 16, "four times four rows are written out below") };
    let mut sums = [[v.splat(0.0); C]; K];
    for (sums, z) in sums.iter_mut().zip(z.iter()) {
        for (sum, z) in sums.iter_mut().zip(&z.0[first..]) {
            *sum = v.load(z);
        }
    }
    // In parts: the compiler does not unroll as much as this at once, and
    // would keep the weights in memory.
    extend_all(v, block, first_k, 0, weights, &mut sums);
    extend_all(v, block, first_k, 4, weights, &mut sums);
    extend_all(v, block, first_k, 8, weights, &mut sums);
    extend_all(v, block, first_k, 12, weights, &mut sums);
    for (z, sums) in z.iter_mut().zip(&sums) {
        for (z, sum) in z.0[first..].iter_mut().zip(sums) {
            v.store(*sum, z);
        }
    }
}

/// The steps of at most four rows.
#[inline(always)]
fn extend_all<V: Vector, const R: usize, const C: usize, const K: usize>(
    v: V,
    block: &[Line; R],
    first_k: usize,
    first_row: usize,
    weights: &[[V::Floats; C]; R],
    sums: &mut [[V::Floats; C]; K],
) {
    for r in first_row..R.min(first_row + 4) {
        for (k, sums) in sums.iter_mut().enumerate() {
            let a = v.splat(block[r].0[first_k + k]);
            for c in 0..C {
                sums[c] = v.mul_add(a, weights[r][c], sums[c]);
            }
        }
    }
}

/// Makes every NaN the canonical one.
#[inline(always)]
pub(crate) fn settle<V: Vector, const G: usize>(v: V, rows: &mut [BlockRow<G>]) {
    let mut sound = v.beyond(0);
    for row in rows.iter() {
        for group in &row.0 {
            sound = v.and(sound, v.is_number(v.load(group)));
        }
    }
    if v.any(v.not(sound)) {
        scalar::canonical_rows(rows);
    }
}
