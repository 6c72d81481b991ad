//! Blocks of vectors as the sweeps take them, and sets of vectors one after the other.
//!
//! A block is b = 16·G vectors side by side: row k holds element k of each. What is large is done in
//! f32 by the kernels; inner products are summed in f64. All sums are cut by the shapes alone and added
//! in order, so that nothing depends on the number of threads.

use faer::linalg::matmul::matmul;
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::{Accum, Mat, MatRef, Par};
use ndarray::{Array2, ArrayView2};
use rayon::iter::{
    IndexedParallelIterator, IntoParallelIterator, IntoParallelRefMutIterator, ParallelIterator,
};
use rayon::slice::{ParallelSlice, ParallelSliceMut};

use crate::kernels::{BlockRow, Isa, LANES, Rows, SweepScratch, apply, sweep, with_ieee_floats};

/// n × b.
pub(super) type Block<const G: usize> = Vec<BlockRow<G>>;

/// Rows that one task works on.
const RUN: usize = 1024;

fn flattened<const G: usize>(rows: &[BlockRow<G>]) -> Vec<f32> {
    let mut flat = Vec::with_capacity(rows.len() * G * LANES);
    rows.iter().for_each(|row| flat.extend_from_slice(row.0.as_flattened()));
    flat
}

fn widened<const G: usize>(rows: &[BlockRow<G>]) -> Vec<f64> {
    let mut wide = Vec::with_capacity(rows.len() * G * LANES);
    for row in rows {
        wide.extend(row.0.as_flattened().iter().map(|&x| f64::from(x)));
    }
    wide
}

/// X ← X + s·Y, s = ±1.
fn add_scaled<const G: usize>(x: &mut [BlockRow<G>], y: &[BlockRow<G>], s: f32) {
    for (x, y) in x.iter_mut().zip(y) {
        for (x, y) in x.0.as_flattened_mut().iter_mut().zip(y.0.as_flattened()) {
            *x += s * y;
        }
    }
}

/// X ← X + Y.
pub(super) fn add<const G: usize>(x: &mut [BlockRow<G>], y: &[BlockRow<G>]) {
    add_scaled(x, y, 1.0);
}

/// The sum of blocks, in order.
pub(super) fn sum<const G: usize>(parts: Vec<Block<G>>) -> Block<G> {
    let mut parts = parts.into_iter();
    let mut sum = parts.next().unwrap_or_default();
    let rest: Vec<Block<G>> = parts.collect();
    sum.par_chunks_mut(RUN).enumerate().for_each(|(run, sum)| {
        rest.iter().for_each(|part| add(sum, &part[run * RUN..][..sum.len()]));
    });
    sum
}

/// ‖x‖² of each vector of a block.
pub(super) fn energies<const G: usize>(block: &[BlockRow<G>]) -> Vec<f64> {
    let mut sums = vec![0.0f64; G * LANES];
    for row in block {
        for (sum, &x) in sums.iter_mut().zip(row.0.as_flattened()) {
            *sum += f64::from(x) * f64::from(x);
        }
    }
    sums
}

/// XᵀY of two blocks, b × b.
pub(super) fn product<const G: usize>(x: &[BlockRow<G>], y: &[BlockRow<G>]) -> Array2<f64> {
    let runs = x.par_chunks(RUN).zip(y.par_chunks(RUN));
    let parts = runs.map(|(x, y)| with_ieee_floats(|| inner::<G>(&widened(x), &widened(y))));
    total::<G>(parts.collect())
}

/// XᵀX of a block.
pub(super) fn gram<const G: usize>(x: &[BlockRow<G>]) -> Array2<f64> {
    let parts = x.par_chunks(RUN).map(|x| {
        with_ieee_floats(|| {
            let x = widened(x);
            inner::<G>(&x, &x)
        })
    });
    total::<G>(parts.collect())
}

/// XᵀY of some rows.
fn inner<const G: usize>(x: &[f64], y: &[f64]) -> Mat<f64> {
    let width = G * LANES;
    // Row-major n × b is column-major b × n.
    let x = MatRef::from_column_major_slice(x, width, x.len() / width);
    let y = MatRef::from_column_major_slice(y, width, y.len() / width);
    let mut part = Mat::zeros(width, width);
    matmul(part.as_mut(), Accum::Replace, x, y.transpose(), 1.0, Par::Seq);
    part
}

fn total<const G: usize>(parts: Vec<Mat<f64>>) -> Array2<f64> {
    Array2::from_shape_fn((G * LANES, G * LANES), |at| parts.iter().map(|part| part[at]).sum())
}

/// X ← X·Q, Q b × b.
pub(super) fn rotate<const G: usize>(isa: Isa, block: &mut [BlockRow<G>], turn: &Array2<f32>) {
    let mut by = vec![BlockRow::<G>::ZERO; G * LANES];
    for (row, turn) in by.iter_mut().zip(turn.rows()) {
        row.0.as_flattened_mut().iter_mut().zip(turn).for_each(|(out, x)| *out = *x);
    }
    block.par_chunks_mut(RUN).for_each(|rows| {
        let flat = flattened(rows);
        apply(isa, Rows::Plain(&flat), G * LANES, &by, rows, &mut SweepScratch::new());
    });
}

/// Vectors of equal length, one after the other: l × n.
#[derive(Debug)]
pub(super) struct Vectors {
    length: usize,
    elements: Vec<f32>,
}

impl Vectors {
    pub(super) fn new(length: usize) -> Vectors {
        Vectors { length, elements: Vec::new() }
    }

    /// The vectors of a block, behind those that are there.
    pub(super) fn append<const G: usize>(&mut self, block: &[BlockRow<G>]) {
        let start = self.elements.len();
        self.elements.resize(start + self.length * G * LANES, 0.0);
        // A cache line of every vector at a time: they may all share one place in the cache.
        for (run, rows) in block.chunks(LANES).enumerate() {
            for lane in 0..G * LANES {
                let first = start + lane * self.length + run * LANES;
                let out = &mut self.elements[first..][..rows.len()];
                for (out, row) in out.iter_mut().zip(rows) {
                    *out = row.0.as_flattened()[lane];
                }
            }
        }
    }

    /// X ← X − V·(Vᵀ·X) for a block X and the vectors V from `first` on.
    pub(super) fn take_out_of<const G: usize>(
        &self,
        isa: Isa,
        block: &mut [BlockRow<G>],
        first: usize,
    ) {
        /// Vectors that one task takes.
        const TASK: usize = 64;
        let vectors = &self.elements[first * self.length..];
        let parts: Vec<Block<G>> = vectors
            .par_chunks(TASK * self.length)
            .map(|vectors| {
                let mut inside = vec![BlockRow::ZERO; self.length];
                let mut w = vec![BlockRow::ZERO; vectors.len() / self.length];
                let mut scratch = SweepScratch::new();
                let rows = Rows::Plain(vectors);
                sweep(isa, rows, self.length, block, &mut w, &mut inside, &mut scratch);
                inside
            })
            .collect();
        if parts.is_empty() {
            return;
        }
        let inside = sum(parts);
        add_scaled(block, &inside, -1.0);
    }

    /// Rows `first..` of V·Vᵀ, whose upper half is left out: (l − first) × l.
    pub(super) fn gram_rows(&self, first: usize) -> Array2<f64> {
        /// Elements of every vector that are widened at once.
        const SPAN: usize = 256;
        /// Not many at once: each makes a matrix as large as the result.
        const TASKS: usize = 8;
        let count = self.elements.len().checked_div(self.length).unwrap_or(0);
        let spans = self.length.div_ceil(SPAN);
        let each = spans.div_ceil(TASKS).max(1);
        let parts: Vec<Mat<f64>> = (0..spans.div_ceil(each))
            .into_par_iter()
            .map(|task| {
                with_ieee_floats(|| {
                    let mut sum = Mat::zeros(count - first, count);
                    let mut room = Vec::new();
                    for span in task * each..((task + 1) * each).min(spans) {
                        let span = span * SPAN..((span + 1) * SPAN).min(self.length);
                        room.clear();
                        for vector in self.elements.chunks_exact(self.length) {
                            room.extend(vector[span.clone()].iter().map(|&x| f64::from(x)));
                        }
                        let all = MatRef::from_column_major_slice(&room, span.len(), count);
                        let (old, new) = all.split_at_col(first);
                        let (left, right) = sum.as_mut().split_at_col_mut(first);
                        matmul(left, Accum::Add, new.transpose(), old, 1.0, Par::Seq);
                        let whole = BlockStructure::Rectangular;
                        triangular::matmul(
                            right,
                            BlockStructure::TriangularLower,
                            Accum::Add,
                            new.transpose(),
                            whole,
                            new,
                            whole,
                            1.0,
                            Par::Seq,
                        );
                    }
                    sum
                })
            })
            .collect();
        Array2::from_shape_fn((count - first, count), |(row, col)| {
            parts.iter().map(|part| part[(row, col)]).sum()
        })
    }

    /// Qᵀ·V: r × n, row i divided by `divisors[i]` if there are any (and zero if that is zero).
    pub(super) fn combine(
        &self,
        turn: ArrayView2<'_, f64>,
        divisors: Option<&[f64]>,
    ) -> Array2<f32> {
        const SPAN: usize = 512;
        let (count, rank) = turn.dim();
        let divided = Mat::from_fn(count, rank, |row, col| {
            let divisor = divisors.map_or(1.0, |divisors| divisors[col]);
            (if divisor > 0.0 { turn[[row, col]] / divisor } else { 0.0 }) as f32
        });
        // Column-major n × l.
        let vectors = MatRef::from_column_major_slice(&self.elements, self.length, count);
        let mut parts: Vec<Mat<f32>> =
            (0..self.length.div_ceil(SPAN)).map(|_| Mat::new()).collect();
        parts.par_iter_mut().enumerate().for_each(|(part, out)| {
            let first = part * SPAN;
            let span = vectors.subrows(first, SPAN.min(self.length - first));
            *out = Mat::zeros(span.nrows(), rank);
            with_ieee_floats(|| {
                matmul(out.as_mut(), Accum::Replace, span, divided.as_ref(), 1.0, Par::Seq);
            });
        });
        let mut out = Array2::zeros((rank, self.length));
        for (mut row, col) in out.rows_mut().into_iter().zip(0..) {
            let elements = parts.iter().flat_map(|part| part.col(col).iter());
            row.iter_mut().zip(elements).for_each(|(out, x)| *out = *x);
        }
        out
    }
}
