//! All singular values, from the eigenvalues of the Gram matrix of the short side in f64.
//!
//! Squaring a matrix halves the digits of its small singular values: in f64, values below 1e-8·σ₁
//! are rounding noise. Of f32 data, whose own rounding is at 6e-8·σ₁, that loses nothing (measured:
//! errors up to 4e-10·σ₁, where an f32 SVD has 4e-7).

use std::ops::Range;

use ndarray::{Array2, ArrayView2, s};
use rayon::iter::{
    IndexedParallelIterator, IntoParallelIterator, IntoParallelRefMutIterator, ParallelIterator,
};

use super::dense::NotConverged;
use super::{Decomposition, Goal, Matrix, SvdOptions, with_rows};
use crate::kernels::{self, Isa, Rows, with_ieee_floats};
use crate::spectrum::{Reached, Spectrum};

/// Rows that are widened to f64 at once.
const SLAB: usize = 256;

/// Rows and columns of a piece of the Gram matrix that one task makes.
const PIECE: usize = 256;

/// Partial sums of UᵀA, each as large as the whole.
const TASKS: usize = 8;

/// Slabs that are widened side by side.
const SLABS: usize = 4;

/// A bound on the bytes of a decomposition of which up to `rank` vectors are made: the Gram matrix and
/// what its eigenvectors take, then products with them; and slabs, of which every thread may have two.
pub(super) fn memory_bound(rows: usize, cols: usize, rank: usize, threads: usize) -> u64 {
    /// f64 matrices of the short side at one time: the Gram matrix, the solver's copy, its vectors, the
    /// vectors in our order, and its work. Measured at 2048 × 5504: the peak of the process was that
    /// of 7 of them, beside the files.
    const SQUARES: u64 = 8;
    let (short, long) = (rows.min(cols) as u64, rows.max(cols) as u64);
    let slabs = SLABS.max(2 * threads) as u64 * SLAB as u64 * cols as u64 * 16;
    let rank = short.min(rank as u64);
    let partial = if rows >= cols { 1 } else { TASKS as u64 };
    let vectors = rank * (8 * short + 8 * partial * long + 8 * (short + long));
    SQUARES * short * short * 8 + vectors + slabs
}

pub(super) fn decompose(
    matrix: &dyn Matrix,
    energy: f64,
    goal: Goal<'_>,
    options: &SvdOptions,
) -> Result<Decomposition, NotConverged> {
    let (rows, cols) = matrix.shape();
    let short = rows.min(cols);
    let tall = rows >= cols;
    let isa = options.isa;
    let gram = if tall { of_columns(matrix, isa) } else { of_rows(matrix, isa) };
    let spectrum = |squares: &[f64]| {
        let values = squares.iter().map(|square| square.max(0.0).sqrt()).collect();
        Spectrum { rows, cols, energy, values }
    };
    let mut found = Decomposition {
        spectrum: spectrum(&[]),
        left: Array2::zeros((rows, 0)),
        right: Array2::zeros((0, cols)),
        optimum: Vec::new(),
        exact: true,
        products: short,
    };
    if let Goal::Values = goal {
        found.spectrum = spectrum(&options.dense.symmetric_values(gram.view())?);
        found.optimum = left_over(&found.spectrum);
        return Ok(found);
    }
    let eigen = options.dense.symmetric_eigen(gram.view())?;
    found.spectrum = spectrum(&eigen.values);
    found.optimum = left_over(&found.spectrum);
    let with_vectors = |found: &mut Decomposition, rank: usize| {
        let vectors = eigen.vectors.slice(s![.., ..rank]);
        let values = &found.spectrum.values[..rank];
        if tall {
            found.left = times(matrix, vectors, values, isa);
            found.right = vectors.t().mapv(|x| x as f32);
        } else {
            found.left = vectors.mapv(|x| x as f32);
            found.right = transposed_times(matrix, vectors, values, isa);
        }
    };
    let rank = match goal {
        Goal::Rank(rank) => rank.min(short),
        Goal::Values => 0,
        Goal::Until { wanted, vectors, maximum } => {
            if vectors {
                // As many as anybody would ask for, not the whole matrix again.
                with_vectors(&mut found, maximum.min(short));
            }
            match wanted(&found) {
                Reached::At(rank) | Reached::Beyond(rank) => rank.min(maximum).min(short),
            }
        }
    };
    with_vectors(&mut found, rank);
    Ok(found)
}

/// Times the short side and ε·σ₁²: the error of a sum of computed eigenvalues. In products of integers up
/// to 700 × 600, of ranks 1 to 300, the sum of those that are zero was up to 0.2 of short·ε·σ₁².
const MARGIN: f64 = 4.0;

/// Bounds from below on what the best approximations of ranks 0, 1, … leave over: sums of the smallest
/// squares, less what they may be too large by. That is more than rounding of the sum: eigenvalues
/// that are zero come out as rounding noise, and half of that is above zero.
fn left_over(spectrum: &Spectrum) -> Vec<f64> {
    let largest = spectrum.largest().unwrap_or(0.0);
    let margin = MARGIN * spectrum.short_side() as f64 * f64::EPSILON * largest * largest;
    let mut optimum: Vec<f64> = Vec::with_capacity(spectrum.values.len() + 1);
    let mut behind = 0.0;
    optimum.push(0.0);
    for value in spectrum.values.iter().rev() {
        behind += value * value;
        optimum.push((behind - margin).max(0.0));
    }
    optimum.reverse();
    optimum
}

/// Rows widened to f64; faer stores by columns, so they are the columns of this.
fn widened(
    matrix: &dyn Matrix,
    rows: Range<usize>,
    isa: Isa,
    room: &mut Vec<f32>,
) -> faer::Mat<f64> {
    let cols = matrix.shape().1;
    let mut decoded = vec![0.0f32; rows.len() * cols];
    with_rows(matrix, rows.clone(), room, |found| match found {
        Rows::Plain(elements) => decoded.copy_from_slice(elements),
        Rows::Stored { tuned, tuned_type, base } => {
            kernels::difference(isa, tuned, tuned_type, base, &mut decoded);
        }
    });
    faer::Mat::from_fn(cols, rows.len(), |col, row| f64::from(decoded[row * cols + col]))
}

/// AᵀA, its lower half: slab after slab of rows, the pieces of the result shared out.
fn of_columns(matrix: &dyn Matrix, isa: Isa) -> Array2<f64> {
    let (rows, cols) = matrix.shape();
    let pieces = lower_pieces(cols);
    let mut sums: Vec<faer::Mat<f64>> =
        pieces.iter().map(|(down, across)| faer::Mat::zeros(down.len(), across.len())).collect();
    let slabs: Vec<Range<usize>> =
        (0..rows.div_ceil(SLAB)).map(|slab| slab * SLAB..((slab + 1) * SLAB).min(rows)).collect();
    for group in slabs.chunks(SLABS) {
        let slabs: Vec<faer::Mat<f64>> = group
            .into_par_iter()
            .map(|slab| with_ieee_floats(|| widened(matrix, slab.clone(), isa, &mut Vec::new())))
            .collect();
        sums.par_iter_mut().zip(&pieces).for_each(|(sum, (down, across))| {
            with_ieee_floats(|| {
                for slab in &slabs {
                    let slab = slab.as_ref();
                    multiply(
                        sum,
                        slab.subrows(down.start, down.len()),
                        slab.subrows(across.start, across.len()).transpose(),
                    );
                }
            });
        });
    }
    assemble(cols, &pieces, &sums)
}

/// A·Aᵀ, its lower half: each piece from the two slabs of rows that it takes.
fn of_rows(matrix: &dyn Matrix, isa: Isa) -> Array2<f64> {
    let (rows, _) = matrix.shape();
    let pieces = lower_pieces(rows);
    let sums: Vec<faer::Mat<f64>> = pieces
        .clone()
        .into_par_iter()
        .map(|(down, across)| {
            with_ieee_floats(|| {
                let mut sum = faer::Mat::zeros(down.len(), across.len());
                let mut room = Vec::new();
                let first = widened(matrix, down, isa, &mut room);
                let second = widened(matrix, across, isa, &mut room);
                multiply(&mut sum, first.as_ref().transpose(), second.as_ref());
                sum
            })
        })
        .collect();
    assemble(rows, &pieces, &sums)
}

fn multiply(sum: &mut faer::Mat<f64>, a: faer::MatRef<'_, f64>, b: faer::MatRef<'_, f64>) {
    faer::linalg::matmul::matmul(sum.as_mut(), faer::Accum::Add, a, b, 1.0, faer::Par::Seq);
}

/// The pieces of the lower half of an n × n matrix: (rows, columns).
fn lower_pieces(n: usize) -> Vec<(Range<usize>, Range<usize>)> {
    let spans: Vec<Range<usize>> =
        (0..n.div_ceil(PIECE)).map(|at| at * PIECE..((at + 1) * PIECE).min(n)).collect();
    let lower = |down: usize| (0..=down).map(move |across| (down, across));
    let places = (0..spans.len()).flat_map(lower);
    places.map(|(down, across)| (spans[down].clone(), spans[across].clone())).collect()
}

fn assemble(
    n: usize,
    pieces: &[(Range<usize>, Range<usize>)],
    sums: &[faer::Mat<f64>],
) -> Array2<f64> {
    let mut gram = Array2::zeros((n, n));
    for ((down, across), sum) in pieces.iter().zip(sums) {
        for (col, to) in across.clone().enumerate() {
            for (row, from) in down.clone().enumerate() {
                gram[[from, to]] = sum[(row, col)];
            }
        }
    }
    gram
}

/// A·V, columns divided by the values: m × k.
fn times(
    matrix: &dyn Matrix,
    vectors: ArrayView2<'_, f64>,
    values: &[f64],
    isa: Isa,
) -> Array2<f32> {
    let (rows, _) = matrix.shape();
    let rank = values.len();
    let vectors = faer::Mat::from_fn(vectors.nrows(), rank, |row, col| vectors[[row, col]]);
    let parts: Vec<faer::Mat<f64>> = (0..rows.div_ceil(SLAB))
        .into_par_iter()
        .map(|slab| {
            with_ieee_floats(|| {
                let span = slab * SLAB..((slab + 1) * SLAB).min(rows);
                let mut product = faer::Mat::zeros(span.len(), rank);
                let slab = widened(matrix, span, isa, &mut Vec::new());
                multiply(&mut product, slab.as_ref().transpose(), vectors.as_ref());
                product
            })
        })
        .collect();
    Array2::from_shape_fn((rows, rank), |(row, col)| {
        quotient(parts[row / SLAB][(row % SLAB, col)], values[col])
    })
}

/// UᵀA, rows divided by the values: k × n.
fn transposed_times(
    matrix: &dyn Matrix,
    vectors: ArrayView2<'_, f64>,
    values: &[f64],
    isa: Isa,
) -> Array2<f32> {
    let (rows, cols) = matrix.shape();
    let rank = values.len();
    let each = rows.div_ceil(TASKS).next_multiple_of(8);
    let partial: Vec<faer::Mat<f64>> = (0..rows.div_ceil(each))
        .into_par_iter()
        .map(|task| {
            with_ieee_floats(|| {
                let mut sum = faer::Mat::zeros(cols, rank);
                let end = ((task + 1) * each).min(rows);
                for start in (task * each..end).step_by(SLAB) {
                    let span = start..(start + SLAB).min(end);
                    let piece = faer::Mat::from_fn(span.len(), rank, |row, col| {
                        vectors[[span.start + row, col]]
                    });
                    let slab = widened(matrix, span, isa, &mut Vec::new());
                    multiply(&mut sum, slab.as_ref(), piece.as_ref());
                }
                sum
            })
        })
        .collect();
    Array2::from_shape_fn((rank, cols), |(row, col)| {
        let sum: f64 = partial.iter().map(|part| part[(col, row)]).sum();
        quotient(sum, values[row])
    })
}

fn quotient(product: f64, value: f64) -> f32 {
    if value > 0.0 { (product / value) as f32 } else { 0.0 }
}
