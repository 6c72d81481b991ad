//! The leading singular values by randomised block Krylov iteration.
//!
//! ```text
//! V₁ random, orthonormal, n × b                     (of a wide matrix, from the range of Aᵀ)
//! Wⱼ = A·Vⱼ    Zⱼ = Aᵀ·Wⱼ                        one pass over A: kernels::sweep
//! Vⱼ₊₁ = orthonormal basis of Zⱼ less what lies in V₁ … Vⱼ
//! T = WᵀW = Vᵀ·AᵀA·V,  T = Q·diag(θ)·Qᵀ         in f64
//! σᵢ ≈ θᵢ^½     vᵢ ≈ V·qᵢ     uᵢ ≈ W·qᵢ/σᵢ
//! ```
//!
//! Small blocks win: for any block size up to the rank, about k/√ε products suffice (Chen, Epperly,
//! Meyer, Musco, Rao 2025, arXiv 2508.06486), and of all methods that use as many products, block
//! Krylov with Rayleigh–Ritz leaves least (Tropp, Webber 2023, arXiv 2306.12418). Each step costs
//! one pass over A, in f32; Gram matrices and eigenvalues are made in f64. The basis is
//! orthogonalised against all of itself, twice, by the same kernel with V for A.
//!
//! # The certificate
//!
//! With H = Vⱼ₊₁ᵀ·Zⱼ, AᵀA is [T, Hᵀ; H, C] in the basis (V, everything else), where H touches the
//! last block alone. If ‖A(I − VVᵀ)‖₂² ≤ μ then C ≼ μ·I, so the eigenvalues of AᵀA are at most
//! those of [T, Hᵀ; H, μI] and as many μ as there are further dimensions; the largest r of them
//! bound the energy that any rank-r approximation captures. μ is an estimate: the largest
//! eigenvalue of the last blocks of T, which is what A does to a space orthogonal to the earlier
//! ones. It is never taken to be more than what V leaves of the energy, which bounds μ for certain.
//! A second bound needs no estimate: θᵢ ≤ σᵢ², so what is left over is at least the sum of the θᵢ
//! behind the rank. The larger counts, less a margin for the rounding of W (f32), which shows where
//! hardly anything is left over.

use ndarray::{Array2, ArrayView2, s};
use rayon::iter::{
    IndexedParallelIterator, IntoParallelIterator, IntoParallelRefMutIterator, ParallelIterator,
};
use rayon::slice::{ParallelSlice, ParallelSliceMut};

use super::dense::NotConverged;
use super::{Decomposition, Goal, Matrix, SvdOptions, with_rows};
use crate::kernels::{
    BlockRow, LANES, Rows, SweepScratch, apply_transposed, sweep, with_ieee_floats,
};
use crate::spectrum::{Reached, Spectrum};

/// Parts that the rows are cut into, each with a Z of its own; fewer where these would be large.
const PARTS: usize = 16;

/// Bytes of all Z together.
const PARTIAL_BYTES: usize = 64 << 20;

/// A column of Z that shrinks below this share of its length (squared) when the basis is taken out
/// of it is rounding noise of f32.
const NEGLIGIBLE: f64 = 1e-11;

/// An energy left over below this share of the whole is rounding noise of f32: Σθ is summed from W,
/// whose elements carry relative errors of that order.
const FLOOR: f64 = 1e-6;

/// `None` if a decomposition that is worth it was not reached: the Gram matrix is cheaper then.
pub(super) fn decompose(
    matrix: &dyn Matrix,
    energy: f64,
    goal: Goal<'_>,
    options: &SvdOptions,
) -> Result<Option<Decomposition>, NotConverged> {
    // Wider blocks use the kernels better; narrow ones need fewer products.
    match goal {
        Goal::Rank(rank) if rank > 64 => Iteration::<2>::new(matrix, energy, options).run(goal),
        _ => Iteration::<1>::new(matrix, energy, options).run(goal),
    }
}

struct Iteration<'a, const G: usize> {
    matrix: &'a dyn Matrix,
    rows: usize,
    cols: usize,
    energy: f64,
    options: &'a SvdOptions,
    random: Random,
    /// V, a row each: l × n.
    basis: Vec<f32>,
    /// W, a row each: l × m.
    images: Vec<f32>,
    /// T, as far as it has been summed.
    gram: Array2<f64>,
    /// l.
    size: usize,
    /// H of the certificate: the coupling of the last block to the next one.
    coupling: Array2<f64>,
}

type Block<const G: usize> = Vec<BlockRow<G>>;

impl<'a, const G: usize> Iteration<'a, G> {
    const WIDTH: usize = G * LANES;

    fn new(matrix: &'a dyn Matrix, energy: f64, options: &'a SvdOptions) -> Self {
        let (rows, cols) = matrix.shape();
        Iteration {
            matrix,
            rows,
            cols,
            energy,
            options,
            random: Random(options.seed),
            basis: Vec::new(),
            images: Vec::new(),
            gram: Array2::zeros((0, 0)),
            size: 0,
            coupling: Array2::zeros((0, 0)),
        }
    }

    fn run(mut self, goal: Goal<'_>) -> Result<Option<Decomposition>, NotConverged> {
        let short = self.rows.min(self.cols);
        let limit = short * 3 / 8;
        let mut wanted = match goal {
            Goal::Rank(rank) => Some(rank),
            _ => None,
        };
        let mut next_look = match wanted {
            Some(rank) => (rank * 7 / 4).max(2 * Self::WIDTH),
            None => 4 * Self::WIDTH,
        };
        let mut block = self.start();
        self.orthonormalise(&mut block, None)?;
        loop {
            let (w, mut z) = self.sweep(&block);
            append(&mut self.basis, &block);
            append(&mut self.images, &w);
            self.size += Self::WIDTH;
            let last = z.clone();
            let exhausted = self.orthonormalise(&mut z, Some(&last))?;
            self.coupling = product(&z, &last);
            block = z;
            let full = self.size + Self::WIDTH > limit;
            if self.size < next_look && !exhausted && !full {
                continue;
            }
            let ritz = self.ritz()?;
            // Values near the end of the space are far from converged.
            let known = if exhausted { self.size.min(short) } else { self.size * 4 / 7 };
            if let Goal::Until { wanted: ask, vectors, maximum } = goal {
                let shown = if vectors { known } else { 0 };
                let shown = self.conclude(&ritz, known, shown)?;
                wanted = match ask(&shown) {
                    Reached::At(rank) => Some(rank.min(maximum)),
                    Reached::Beyond(_) if known >= maximum => Some(maximum),
                    Reached::Beyond(_) => None,
                };
            }
            if let Some(rank) = wanted
                && (exhausted || (rank <= known && self.is_accurate(&ritz, rank)?))
            {
                let rank = rank.min(known);
                return self.conclude(&ritz, known.max(rank), rank).map(Some);
            }
            if exhausted {
                let known = self.size.min(short);
                return self.conclude(&ritz, known, known).map(Some);
            }
            if full {
                return Ok(None);
            }
            let least = wanted.map_or(0, |rank| rank * 7 / 4);
            next_look = (self.size * 9 / 8).max(least).max(self.size + Self::WIDTH);
        }
    }

    /// The first block. Of a wide matrix it is taken from the row space, by Aᵀ: of a random vector's
    /// length only a share of m/n lies there, and what A does to later blocks, which the certificate
    /// goes by, would be as much too small.
    fn start(&mut self) -> Block<G> {
        if self.cols <= self.rows {
            return self.random_block(self.cols);
        }
        let mut w = self.random_block(self.rows);
        let isa = self.options.isa;
        self.in_parts(&mut w, |rows, w, z, scratch| {
            apply_transposed(isa, rows, self.cols, w, z, scratch);
        })
    }

    /// W = A·V and Z = Aᵀ·W of a block.
    fn sweep(&self, v: &Block<G>) -> (Block<G>, Block<G>) {
        let mut w = vec![BlockRow::ZERO; self.rows];
        let isa = self.options.isa;
        let z = self.in_parts(&mut w, |rows, w, z, scratch| {
            sweep(isa, rows, self.cols, v, w, z, scratch);
        });
        (w, z)
    }

    /// The sum of the Z that some rows of A at a time make with the same rows of W.
    fn in_parts(
        &self,
        w: &mut [BlockRow<G>],
        multiply: impl Fn(Rows<'_>, &mut [BlockRow<G>], &mut [BlockRow<G>], &mut SweepScratch) + Sync,
    ) -> Block<G> {
        let bytes = self.cols * size_of::<BlockRow<G>>();
        let parts = (PARTIAL_BYTES / bytes).clamp(1, PARTS).min(self.rows.div_ceil(64));
        let each = self.rows.div_ceil(parts).next_multiple_of(8);
        let zero = || vec![BlockRow::ZERO; self.cols];
        let one = |part: usize, w: &mut [BlockRow<G>], z: &mut Block<G>| {
            let (mut scratch, mut room) = (SweepScratch::new(), Vec::new());
            let first = part * each;
            // A few rows at a time where they have to be decoded.
            for (group, w) in w.chunks_mut(64).enumerate() {
                let start = first + group * 64;
                with_rows(self.matrix, start..start + w.len(), &mut room, |rows| {
                    multiply(rows, w, z, &mut scratch);
                });
            }
        };
        if rayon::current_num_threads() == 1 {
            // The same sums, without room for all of them.
            let (mut sum, mut z) = (zero(), zero());
            for (part, w) in w.chunks_mut(each).enumerate() {
                if part == 0 {
                    one(part, w, &mut sum);
                } else {
                    z.fill(BlockRow::ZERO);
                    one(part, w, &mut z);
                    add(&mut sum, &z);
                }
            }
            return sum;
        }
        let partial: Vec<Block<G>> = w
            .par_chunks_mut(each)
            .enumerate()
            .map(|(part, w)| {
                let mut z = zero();
                one(part, w, &mut z);
                z
            })
            .collect();
        sum(partial)
    }

    /// Makes a block orthonormal and orthogonal to the basis. Columns that the basis holds already
    /// are replaced by random ones; says whether all of them were, since then A maps the basis into
    /// itself and, the start having been random, nothing of A lies outside.
    ///
    /// `before` is the block's own past, which lengths are compared with.
    fn orthonormalise(
        &mut self,
        block: &mut Block<G>,
        before: Option<&Block<G>>,
    ) -> Result<bool, NotConverged> {
        let mut scale = before.map_or(0.0, |before| {
            let gram = product(before, before);
            gram.diag().iter().copied().fold(0.0, f64::max)
        });
        let mut exhausted = before.is_some();
        // Twice is enough (Giraud, Langou, Rozložník 2005); once more after a replacement.
        let mut clean = 0;
        let mut rounds = 0;
        while clean < 2 && rounds < 6 {
            rounds += 1;
            self.take_out_basis(block);
            let gram = product(block, block);
            let eigen = self.options.dense.symmetric_eigen(gram.view())?;
            let least = NEGLIGIBLE * scale.max(eigen.values[0]);
            let kept = eigen.values.iter().filter(|&&value| value > least).count();
            exhausted &= kept == 0;
            let mut turn = Array2::<f32>::zeros((Self::WIDTH, Self::WIDTH));
            for (index, &value) in eigen.values.iter().enumerate().take(kept) {
                let scaled = eigen.vectors.column(index).mapv(|x| (x / value.sqrt()) as f32);
                turn.column_mut(index).assign(&scaled);
            }
            rotate(block, &turn);
            if kept < Self::WIDTH {
                let length = (self.cols as f32).sqrt().recip();
                for row in block.iter_mut() {
                    for lane in row.0.as_flattened_mut().iter_mut().skip(kept) {
                        *lane = self.random.normal() as f32 * length;
                    }
                }
                clean = 0;
            } else {
                clean += 1;
            }
            // From here on the columns have length one.
            scale = 1.0;
        }
        Ok(exhausted)
    }

    /// X ← X − V·(Vᵀ·X), by the same kernel that sweeps A.
    fn take_out_basis(&self, block: &mut Block<G>) {
        if self.basis.is_empty() {
            return;
        }
        let isa = self.options.isa;
        let partial: Vec<Block<G>> = self
            .basis
            .par_chunks(64 * self.cols)
            .map(|vectors| {
                let mut inside = vec![BlockRow::ZERO; self.cols];
                let mut w = vec![BlockRow::ZERO; vectors.len() / self.cols];
                let mut scratch = SweepScratch::new();
                let rows = Rows::Plain(vectors);
                sweep(isa, rows, self.cols, block, &mut w, &mut inside, &mut scratch);
                inside
            })
            .collect();
        let inside = sum(partial);
        for (row, inside) in block.iter_mut().zip(&inside) {
            for (x, y) in row.0.as_flattened_mut().iter_mut().zip(inside.0.as_flattened()) {
                *x -= y;
            }
        }
    }

    fn random_block(&mut self, rows: usize) -> Block<G> {
        let mut block = vec![BlockRow::ZERO; rows];
        for row in &mut block {
            for lane in row.0.as_flattened_mut() {
                *lane = self.random.normal() as f32;
            }
        }
        block
    }

    /// Eigenvalues and eigenvectors of T = WᵀW.
    fn ritz(&mut self) -> Result<super::dense::Eigen, NotConverged> {
        let old = self.gram.nrows();
        let mut gram = Array2::zeros((self.size, self.size));
        gram.slice_mut(s![..old, ..old]).assign(&self.gram);
        let fresh = gram_rows(&self.images, self.rows, old);
        gram.slice_mut(s![old.., ..]).assign(&fresh);
        self.gram = gram;
        self.options.dense.symmetric_eigen(self.gram.view())
    }

    /// Whether the Frobenius error at a rank is within the accuracy asked for, as far as the
    /// certificate tells.
    fn is_accurate(&self, ritz: &super::dense::Eigen, rank: usize) -> Result<bool, NotConverged> {
        let captured: f64 = ritz.values[..rank].iter().sum();
        let found = self.energy - captured;
        if found <= FLOOR * self.energy {
            return Ok(true);
        }
        // Without the margin: it would make the last digits of a steep spectrum unreachable.
        let optimum = self.optimum(ritz, rank)?;
        let accuracy = 1.0 + self.options.accuracy;
        Ok(found <= accuracy * accuracy * optimum[rank])
    }

    /// Bounds from below on what is left over at ranks from 0 to `most`; see the certificate in the
    /// module's documentation.
    fn optimum(&self, ritz: &super::dense::Eigen, most: usize) -> Result<Vec<f64>, NotConverged> {
        let (size, width) = (self.size, Self::WIDTH);
        let inside: f64 = ritz.values.iter().sum();
        let outside = (self.energy - inside).max(0.0);
        let trailing = (3 * width).min(size);
        let corner = self.gram.slice(s![size - trailing.., size - trailing..]);
        let last = self.options.dense.symmetric_values(corner)?;
        let mu = last.first().copied().unwrap_or(0.0).min(outside);
        let mut bordered = Array2::zeros((size + width, size + width));
        bordered.slice_mut(s![..size, ..size]).assign(&self.gram);
        bordered.slice_mut(s![size.., size - width..size]).assign(&self.coupling);
        bordered.slice_mut(s![size.., size..]).diag_mut().fill(mu);
        let above = self.options.dense.symmetric_values(bordered.view())?;
        let further = self.rows.min(self.cols).saturating_sub(size + width);
        let mut bounds: Vec<f64> =
            above.into_iter().chain(std::iter::repeat_n(mu, further.min(most))).collect();
        bounds.sort_unstable_by(|a, b| b.total_cmp(a));
        let (mut captured, mut behind) = (0.0, ritz.values.iter().map(|x| x.max(0.0)).sum::<f64>());
        let mut optimum = vec![self.energy];
        for (bound, value) in bounds.iter().zip(&ritz.values).take(most) {
            captured += bound.max(0.0);
            behind -= value.max(0.0);
            optimum.push((self.energy - captured).max(behind));
        }
        Ok(optimum)
    }

    /// The first `known` values and the first `rank` components.
    fn conclude(
        &self,
        ritz: &super::dense::Eigen,
        known: usize,
        rank: usize,
    ) -> Result<Decomposition, NotConverged> {
        let values: Vec<f64> =
            ritz.values[..known].iter().map(|value| value.max(0.0).sqrt()).collect();
        let turn = ritz.vectors.slice(s![.., ..rank]);
        let right = combine(&self.basis, self.cols, turn, None);
        let left = combine(&self.images, self.rows, turn, Some(&values[..rank]));
        Ok(Decomposition {
            spectrum: Spectrum { rows: self.rows, cols: self.cols, energy: self.energy, values },
            left: left.reversed_axes().as_standard_layout().into_owned(),
            right,
            optimum: (self.optimum(ritz, known)?.into_iter())
                .map(|optimum| (optimum - FLOOR * self.energy).max(0.0))
                .collect(),
            exact: false,
            products: self.size,
        })
    }
}

/// The columns of a block, as rows behind those that are there.
fn append<const G: usize>(vectors: &mut Vec<f32>, block: &Block<G>) {
    let (length, start) = (block.len(), vectors.len());
    vectors.resize(start + length * G * LANES, 0.0);
    // A cache line of every vector at a time: they may all share one place in the cache.
    for (run, rows) in block.chunks(LANES).enumerate() {
        for lane in 0..G * LANES {
            let out = &mut vectors[start + lane * length + run * LANES..][..rows.len()];
            for (out, row) in out.iter_mut().zip(rows) {
                *out = row.0.as_flattened()[lane];
            }
        }
    }
}

/// The sum of blocks, in order.
fn sum<const G: usize>(partial: Vec<Block<G>>) -> Block<G> {
    const RUN: usize = 1024;
    let mut partial = partial.into_iter();
    let mut sum = partial.next().unwrap_or_default();
    let rest: Vec<Block<G>> = partial.collect();
    sum.par_chunks_mut(RUN).enumerate().for_each(|(run, sum)| {
        for block in &rest {
            add(sum, &block[run * RUN..][..sum.len()]);
        }
    });
    sum
}

/// X ← X + Y.
fn add<const G: usize>(x: &mut [BlockRow<G>], y: &[BlockRow<G>]) {
    for (x, y) in x.iter_mut().zip(y) {
        for (x, y) in x.0.as_flattened_mut().iter_mut().zip(y.0.as_flattened()) {
            *x += y;
        }
    }
}

/// XᵀY of two blocks, in f64.
fn product<const G: usize>(x: &Block<G>, y: &Block<G>) -> Array2<f64> {
    const RUN: usize = 1024;
    let width = G * LANES;
    let partial: Vec<Array2<f64>> = x
        .par_chunks(RUN)
        .zip(y.par_chunks(RUN))
        .map(|(x, y)| {
            with_ieee_floats(|| {
                let (x, y) = (widened(x), widened(y));
                // Row-major n × b is column-major b × n.
                let x = faer::MatRef::from_column_major_slice(&x, width, x.len() / width);
                let y = faer::MatRef::from_column_major_slice(&y, width, y.len() / width);
                let mut sum = faer::Mat::<f64>::zeros(width, width);
                let (mode, seq) = (faer::Accum::Replace, faer::Par::Seq);
                faer::linalg::matmul::matmul(sum.as_mut(), mode, x, y.transpose(), 1.0, seq);
                Array2::from_shape_fn((width, width), |(row, col)| sum[(row, col)])
            })
        })
        .collect();
    let mut sum = Array2::zeros((width, width));
    partial.iter().for_each(|part| sum += part);
    sum
}

fn widened<const G: usize>(rows: &[BlockRow<G>]) -> Vec<f64> {
    rows.iter().flat_map(|row| row.0.as_flattened()).map(|&x| f64::from(x)).collect()
}

/// X ← X·Q.
fn rotate<const G: usize>(block: &mut Block<G>, turn: &Array2<f32>) {
    block.par_iter_mut().with_min_len(512).for_each(|row| {
        let mut turned = BlockRow::<G>::ZERO;
        for (&x, turn) in row.0.as_flattened().iter().zip(turn.rows()) {
            for (y, &q) in turned.0.as_flattened_mut().iter_mut().zip(turn) {
                *y += x * q;
            }
        }
        *row = turned;
    });
}

/// Rows `first..` of X·Xᵀ in f64, of l vectors of `length` each.
fn gram_rows(vectors: &[f32], length: usize, first: usize) -> Array2<f64> {
    const RUN: usize = 512;
    let count = vectors.len() / length;
    // Not many at once: each is as large as the result.
    const TASKS: usize = 8;
    let runs = length.div_ceil(RUN);
    let each = runs.div_ceil(TASKS);
    let partial: Vec<Array2<f64>> = (0..runs.div_ceil(each))
        .into_par_iter()
        .map(|task| {
            with_ieee_floats(|| {
                let mut sum = faer::Mat::<f64>::zeros(count - first, count);
                for run in task * each..((task + 1) * each).min(runs) {
                    let span = run * RUN..((run + 1) * RUN).min(length);
                    // Columns are the vectors: their elements lie side by side.
                    let piece = faer::Mat::from_fn(span.len(), count, |element, vector| {
                        f64::from(vectors[vector * length + span.start + element])
                    });
                    faer::linalg::matmul::matmul(
                        sum.as_mut(),
                        faer::Accum::Add,
                        piece.as_ref().subcols(first, count - first).transpose(),
                        piece.as_ref(),
                        1.0,
                        faer::Par::Seq,
                    );
                }
                Array2::from_shape_fn((count - first, count), |(row, col)| sum[(row, col)])
            })
        })
        .collect();
    let mut partial = partial.into_iter();
    let mut sum = partial.next().unwrap_or_else(|| Array2::zeros((count - first, count)));
    partial.for_each(|part| sum += &part);
    sum
}

/// Qᵀ·X of l vectors of `length` each: r × length, row i divided by `divisors[i]` if there are any
/// (and zero if that is zero).
fn combine(
    vectors: &[f32],
    length: usize,
    turn: ArrayView2<'_, f64>,
    divisors: Option<&[f64]>,
) -> Array2<f32> {
    const RUN: usize = 512;
    let rank = turn.ncols();
    let divided = Array2::from_shape_fn((rank, turn.nrows()), |(row, col)| {
        let divisor = divisors.map_or(1.0, |divisors| divisors[row]);
        (if divisor > 0.0 { turn[[col, row]] / divisor } else { 0.0 }) as f32
    });
    let vectors = ArrayView2::from_shape((turn.nrows(), length), vectors);
    let Ok(vectors) = vectors else { unreachable!("as many vectors as the turn has rows") };
    let parts: Vec<Array2<f32>> = (0..length.div_ceil(RUN))
        .into_par_iter()
        .map(|run| divided.dot(&vectors.slice(s![.., run * RUN..((run + 1) * RUN).min(length)])))
        .collect();
    let mut out = Array2::zeros((rank, length));
    for (run, part) in parts.into_iter().enumerate() {
        out.slice_mut(s![.., run * RUN..((run + 1) * RUN).min(length)]).assign(&part);
    }
    out
}

/// A seeded generator: splitmix64, and normal numbers by Box and Muller.
struct Random(u64);

impl Random {
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((bits ^ (bits >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (2.0 * std::f64::consts::PI * self.uniform()).cos()
    }
}
