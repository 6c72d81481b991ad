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
//! one pass over A, in f32; Gram matrices and eigenvalues are made in f64. Zⱼ lies in the last two
//! blocks and the next one, but for rounding: those two are taken out of it first, and when what is
//! left has length one, the whole basis, by the same kernel with V for A.
//!
//! # The certificate
//!
//! With H = Vⱼ₊₁ᵀ·Zⱼ, AᵀA is [T, Hᵀ; H, C] in the basis (V, everything else), where H touches the
//! last block alone. If ‖A(I − VVᵀ)‖₂² ≤ μ then C ≼ μ·I, so the eigenvalues of AᵀA are at most
//! those of [T, Hᵀ; H, μI] and as many μ as there are further dimensions; the largest r of them
//! bound the energy that any rank-r approximation captures.
//!
//! μ is an estimate. AᵀA outside the basis goes on as the block tridiagonal T does: were its blocks to
//! stay as the last diagonal block D and the coupling H, its norm would be at most ‖D‖ + 2‖H‖ (a bulk of
//! noise comes near that), but they shrink. μ = ‖D‖ + [`COUPLINGS`]·‖H‖, and never more than what V
//! leaves of the energy, which bounds it for certain. A second bound needs no estimate: θᵢ ≤ σᵢ², so
//! what is left over is at least the sum of the θᵢ behind the rank. The larger counts, less a margin for
//! the rounding of W (f32), which shows where hardly anything is left over.

use ndarray::{Array2, ArrayView2, s};
use rayon::iter::{IndexedParallelIterator, ParallelIterator};
use rayon::slice::ParallelSliceMut;

use super::block::{Vectors, add, energies, gram, product, rotate, sum};
use super::dense::{Eigen, NotConverged};
use super::{Decomposition, Goal, Matrix, SvdOptions, with_rows};
use crate::kernels::{BlockRow, LANES, Rows, SweepScratch, apply_transposed, sweep};
use crate::spectrum::{Reached, Spectrum};

/// Parts that the rows are cut into at most, each with a Z of its own.
const PARTS: usize = 16;

/// Rows of a part, at least: making Z and adding it up should cost little.
const PART_ROWS: usize = 512;

/// Bytes of all Z together, at most.
const PARTIAL_BYTES: usize = 64 << 20;

/// A column of Z that shrinks below this share of its length (squared) when the basis is taken out
/// of it is rounding noise of f32.
const NEGLIGIBLE: f64 = 1e-11;

/// An energy left over below this share of the whole is rounding noise of f32: Σθ is summed from W,
/// whose elements carry relative errors of that order.
const FLOOR: f64 = 1e-6;

/// Of ‖H‖ in μ. Measured where the iteration would stop, on 302 cases: synthetic spectra of all kinds
/// up to 4096 × 11008 and changes of real fine-tunes, ranks 4 to 256. With 1.5 the bound was never above
/// the truth, with 1 in 15 of them; μ = ‖D‖ alone was too small in 42, and 1.5·‖D‖ in bulks of noise.
const COUPLINGS: f64 = 1.5;

/// By how much the estimated excess shrinks with a further block, about, where that has not been seen.
const SHRINKS: f64 = 2.0;

/// How many vectors a basis has at most, beyond which the Gram matrix of the short side is cheaper.
fn largest_basis(short: usize) -> usize {
    short / 2
}

/// A bound on the bytes of the largest basis there can be: its vectors and their images, as often again
/// turned into singular vectors; T with what its sums and its eigenvalues take; all Z.
pub(super) fn memory_bound(rows: usize, cols: usize) -> u64 {
    /// Matrices of the size of T at one time: the partial sums of its rows, or T, [T, Hᵀ; H, μI] and
    /// what a solver copies of both.
    const SQUARES: u64 = 12;
    let vectors = largest_basis(rows.min(cols)) as u64;
    let (rows, cols) = (rows as u64, cols as u64);
    2 * (rows + cols) * vectors * 4 + SQUARES * vectors * vectors * 8 + PARTIAL_BYTES as u64
}

/// `None` if a decomposition that is worth it was not reached: the Gram matrix is cheaper then.
pub(super) fn decompose(
    matrix: &dyn Matrix,
    energy: f64,
    goal: Goal<'_>,
    options: &SvdOptions,
) -> Result<Option<Decomposition>, NotConverged> {
    Iteration::new(matrix, energy, options).run(goal)
}

/// Vectors in a block. Blocks of 32 use the kernels better and need about a tenth more products: they
/// took as long at rank 256, longer at 128 and below, and left more over.
const WIDTH: usize = LANES;

type Block = super::block::Block<1>;

struct Iteration<'a> {
    matrix: &'a dyn Matrix,
    rows: usize,
    cols: usize,
    energy: f64,
    options: &'a SvdOptions,
    random: Random,
    /// V, n × l.
    basis: Vectors,
    /// W, m × l.
    images: Vectors,
    /// T, as far as it has been summed; its lower half.
    gram: Array2<f64>,
    /// l.
    size: usize,
    /// H of the certificate: the coupling of the last block to the next one.
    coupling: Array2<f64>,
}

/// What a basis tells of the singular values.
struct Look {
    /// θ, all of them.
    values: Vec<f64>,
    /// Bounds from below on what is left over at ranks from 0 on.
    optimum: Vec<f64>,
}

impl<'a> Iteration<'a> {
    fn new(matrix: &'a dyn Matrix, energy: f64, options: &'a SvdOptions) -> Self {
        let (rows, cols) = matrix.shape();
        Iteration {
            matrix,
            rows,
            cols,
            energy,
            options,
            random: Random(options.seed),
            basis: Vectors::new(cols),
            images: Vectors::new(rows),
            gram: Array2::zeros((0, 0)),
            size: 0,
            coupling: Array2::zeros((0, 0)),
        }
    }

    fn run(mut self, goal: Goal<'_>) -> Result<Option<Decomposition>, NotConverged> {
        let short = self.rows.min(self.cols);
        let limit = largest_basis(short);
        let mut wanted = match goal {
            Goal::Rank(rank) => Some(rank),
            _ => None,
        };
        // A rank that is chosen by the values needs better ones than a given rank.
        let accuracy = match goal {
            Goal::Until { .. } => self.options.accuracy / 10.0,
            _ => self.options.accuracy,
        };
        let mut next_look = match wanted {
            Some(rank) if rank > 64 => rank * 15 / 8,
            Some(rank) => rank * 3 / 2 + WIDTH,
            None => 4 * WIDTH,
        };
        let mut last: Option<(usize, f64)> = None;
        let mut block = self.start();
        self.orthonormalise(&mut block)?;
        loop {
            let nothing_new = self.step(&mut block)?;
            let full = self.size + WIDTH > limit;
            if self.size < next_look && !nothing_new && !full {
                continue;
            }
            let look = self.look()?;
            // Where nothing is left over, the values that are rounding noise are left out.
            let complete = self.left_over(&look, self.size) == 0.0;
            let least = look.values[0] * f64::from(f32::EPSILON).powi(2);
            let told = look.values.partition_point(|&value| value > least).min(short);
            let exhausted = complete && nothing_new && wanted.is_none_or(|rank| self.size >= rank);
            // Values near the end of the space are far from converged.
            let known = if exhausted { told } else { self.size * 4 / 7 };
            if let Goal::Until { wanted: ask, vectors, maximum } = goal {
                let shown = if vectors { known } else { 0 };
                let shown = self.conclude(&look, known, shown)?;
                wanted = match ask(&shown) {
                    Reached::At(rank) => Some(rank.min(maximum)),
                    Reached::Beyond(_) if known >= maximum => Some(maximum),
                    Reached::Beyond(_) => None,
                };
            }
            let excess = wanted.map(|rank| self.excess(&look, rank.min(self.size)));
            if exhausted {
                let rank = wanted.map_or(known, |rank| rank.min(known));
                return self.conclude(&look, known, rank).map(Some);
            }
            let enough = match goal {
                Goal::Until { .. } => known,
                _ => self.size,
            };
            if let (Some(rank), Some(excess)) = (wanted, excess)
                && rank <= enough
                && excess <= accuracy
            {
                let rank = if complete { rank.min(told) } else { rank };
                return self.conclude(&look, known.max(rank), rank).map(Some);
            }
            if full {
                return Ok(None);
            }
            let more = self.blocks_to_go(excess.map(|excess| excess / accuracy), last);
            last = excess.map(|excess| (self.size, excess / accuracy));
            let least = match goal {
                Goal::Until { .. } => wanted.map_or(0, |rank| rank * 7 / 4),
                _ => 0,
            };
            next_look = least.max(self.size + more * WIDTH);
        }
    }

    /// Adds a block to the basis and makes the next one of it, which may hold nothing new.
    fn step(&mut self, block: &mut Block) -> Result<bool, NotConverged> {
        let (w, mut z) = self.sweep(block);
        self.basis.append(block);
        self.images.append(&w);
        self.size += WIDTH;
        let past = z.clone();
        let nothing_new = self.orthonormalise(&mut z)?;
        self.coupling = product(&z, &past);
        *block = z;
        Ok(nothing_new)
    }

    /// How many more blocks should bring an excess down to 1, in units of the accuracy, if it goes on to
    /// shrink as it has since an earlier look. Looks are not free, and neither are blocks.
    fn blocks_to_go(&self, excess: Option<f64>, last: Option<(usize, f64)>) -> usize {
        let most = (self.size / (6 * WIDTH)).max(1);
        let Some(excess) = excess.filter(|excess| excess.is_finite()) else { return most };
        let shrinks = match last {
            Some((size, before)) if before.is_finite() && before > excess => {
                (before / excess).powf(WIDTH as f64 / (self.size - size) as f64)
            }
            _ => SHRINKS,
        };
        let more = excess.ln() / shrinks.max(1.1).ln();
        (more.ceil().max(1.0) as usize).min(most)
    }

    /// The first block. Of a wide matrix it is taken from the row space, by Aᵀ: of a random vector's
    /// length only a share of m/n lies there, and what A does to later blocks, which the certificate
    /// goes by, would be as much too small.
    fn start(&mut self) -> Block {
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
    fn sweep(&self, v: &Block) -> (Block, Block) {
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
        w: &mut [BlockRow<1>],
        multiply: impl Fn(Rows<'_>, &mut [BlockRow<1>], &mut [BlockRow<1>], &mut SweepScratch) + Sync,
    ) -> Block {
        let bytes = self.cols * size_of::<BlockRow<1>>();
        let parts = (PARTIAL_BYTES / bytes).clamp(1, PARTS).min(self.rows.div_ceil(PART_ROWS));
        let each = self.rows.div_ceil(parts).next_multiple_of(8);
        let zero = || vec![BlockRow::ZERO; self.cols];
        let one = |part: usize, w: &mut [BlockRow<1>], z: &mut Block| {
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
        let partial: Vec<Block> = w
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
    /// are replaced by random ones; says whether all of them were: then A maps the basis into itself
    /// as far as f32 tells, and either nothing of A lies outside or it is small.
    fn orthonormalise(&mut self, block: &mut Block) -> Result<bool, NotConverged> {
        /// A length (squared) that has shrunk no further keeps its digits: Kahan and Parlett's rule.
        const KEEPS: f64 = 0.25;
        let past = self.size > 0;
        let isa = self.options.isa;
        let mut least = NEGLIGIBLE * energies(block).into_iter().fold(0.0, f64::max);
        let mut nothing_new = false;
        // What AᵀA makes lies in the last two blocks and the next one, but for rounding.
        let mut first = self.size.saturating_sub(2 * WIDTH);
        for round in 0..6 {
            self.basis.take_out_of(isa, block, first);
            let eigen = self.options.dense.symmetric_eigen(gram(block).view())?;
            if !past && round == 0 {
                least = NEGLIGIBLE * eigen.values[0];
            }
            let kept = eigen.values.iter().filter(|&&value| value > least).count();
            if round == 0 {
                nothing_new = past && kept == 0;
            }
            let mut turn = Array2::<f32>::zeros((WIDTH, WIDTH));
            for (index, &value) in eigen.values.iter().enumerate().take(kept) {
                let scaled = eigen.vectors.column(index).mapv(|x| (x / value.sqrt()) as f32);
                turn.column_mut(index).assign(&scaled);
            }
            rotate(isa, block, &turn);
            if kept < WIDTH {
                let length = (self.cols as f32).sqrt().recip();
                for row in block.iter_mut() {
                    for lane in row.0.as_flattened_mut().iter_mut().skip(kept) {
                        *lane = self.random.normal() as f32 * length;
                    }
                }
            } else if round > 0 && eigen.values[WIDTH - 1] >= KEEPS {
                break;
            }
            // From here on the columns have length one, and all of the basis is looked at.
            least = NEGLIGIBLE;
            first = 0;
        }
        Ok(nothing_new)
    }

    fn random_block(&mut self, rows: usize) -> Block {
        let mut block = vec![BlockRow::ZERO; rows];
        for row in &mut block {
            for lane in row.0.as_flattened_mut() {
                *lane = self.random.normal() as f32;
            }
        }
        block
    }

    /// Brings T = WᵀW up to date, and takes its eigenvalues and the certificate's.
    fn look(&mut self) -> Result<Look, NotConverged> {
        let old = self.gram.nrows();
        let mut gram = Array2::zeros((self.size, self.size));
        gram.slice_mut(s![..old, ..old]).assign(&self.gram);
        gram.slice_mut(s![old.., ..]).assign(&self.images.gram_rows(old));
        self.gram = gram;
        let dense = self.options.dense;
        let (values, above) =
            rayon::join(|| dense.symmetric_values(self.gram.view()), || self.bordered());
        let values = values?;
        let optimum = self.optimum(&values, &above?);
        Ok(Look { values, optimum })
    }

    /// The eigenvalues of [T, Hᵀ; H, μI] and as many μ as there are further dimensions, descending: see
    /// the certificate in the module's documentation.
    fn bordered(&self) -> Result<Vec<f64>, NotConverged> {
        let (size, width, dense) = (self.size, WIDTH, self.options.dense);
        let outside = (self.energy - self.gram.diag().sum()).max(0.0);
        let largest = |matrix: ArrayView2<'_, f64>| -> Result<f64, NotConverged> {
            Ok(dense.symmetric_values(matrix)?.first().map_or(0.0, |value| value.max(0.0)))
        };
        let last = largest(self.gram.slice(s![size - width.., size - width..]))?;
        let coupling = largest(self.coupling.t().dot(&self.coupling).view())?.sqrt();
        let mu = (last + COUPLINGS * coupling).min(outside);
        let mut bordered = Array2::zeros((size + width, size + width));
        bordered.slice_mut(s![..size, ..size]).assign(&self.gram);
        bordered.slice_mut(s![size.., size - width..size]).assign(&self.coupling);
        bordered.slice_mut(s![size.., size..]).diag_mut().fill(mu);
        let mut above = dense.symmetric_values(bordered.view())?;
        let further = self.rows.min(self.cols).saturating_sub(size + width);
        above.extend(std::iter::repeat_n(mu, further.min(size)));
        above.sort_unstable_by(|a, b| b.total_cmp(a));
        Ok(above)
    }

    /// Bounds from below on what is left over at ranks from 0 to l.
    fn optimum(&self, values: &[f64], above: &[f64]) -> Vec<f64> {
        let (mut captured, mut behind) = (0.0, values.iter().map(|x| x.max(0.0)).sum::<f64>());
        let mut optimum = vec![self.energy];
        for (bound, value) in above.iter().zip(values) {
            captured += bound.max(0.0);
            behind -= value.max(0.0);
            optimum.push((self.energy - captured).max(behind));
        }
        optimum
    }

    /// What the leading directions leave of the energy, as far as that is told from rounding.
    fn left_over(&self, look: &Look, rank: usize) -> f64 {
        let found = self.energy - look.values[..rank].iter().sum::<f64>();
        if found <= FLOOR * self.energy { 0.0 } else { found }
    }

    /// By what share the Frobenius error at a rank may exceed the optimum, as far as the certificate
    /// tells.
    fn excess(&self, look: &Look, rank: usize) -> f64 {
        let found = self.left_over(look, rank);
        if found == 0.0 {
            return 0.0;
        }
        // Without the margin: it would make the last digits of a steep spectrum unreachable.
        match look.optimum[rank] {
            optimum if optimum > 0.0 => (found / optimum).sqrt() - 1.0,
            _ => f64::INFINITY,
        }
    }

    /// The first `known` values and the first `rank` components.
    fn conclude(
        &self,
        look: &Look,
        known: usize,
        rank: usize,
    ) -> Result<Decomposition, NotConverged> {
        let values: Vec<f64> =
            look.values[..known].iter().map(|value| value.max(0.0).sqrt()).collect();
        let (left, right) = if rank == 0 {
            (Array2::zeros((self.rows, 0)), Array2::zeros((0, self.cols)))
        } else {
            let Eigen { vectors, .. } = self.options.dense.symmetric_eigen(self.gram.view())?;
            let turn = vectors.slice(s![.., ..rank]);
            let left = self.images.combine(turn, Some(&values[..rank]));
            let left = left.reversed_axes().as_standard_layout().into_owned();
            (left, self.basis.combine(turn, None))
        };
        let margin = FLOOR * self.energy;
        Ok(Decomposition {
            spectrum: Spectrum { rows: self.rows, cols: self.cols, energy: self.energy, values },
            left,
            right,
            optimum: look.optimum[..=known].iter().map(|x| (x - margin).max(0.0)).collect(),
            exact: false,
            products: self.size,
        })
    }
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
