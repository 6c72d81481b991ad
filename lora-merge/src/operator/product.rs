//! A product of two factors, as the rows of a stored matrix.

use std::ops::{Range, RangeInclusive};

use lora_format::model::{Cores, LowRank, Tucker};
use lora_format::{Tensor, limits};

use crate::kernels::{Factors, Isa, TileRegion, product_tile};
use crate::orientation::Orientation;

use super::shapes::{self, Fits, count, decode, dim};

/// The ranks that a product may have.
const RANKS: RangeInclusive<usize> = 1..=limits::RANK;

/// `s·B·A`, decoded.
pub(super) struct Product {
    /// out × rank.
    pub(super) b: Vec<f32>,
    /// rank × in.
    pub(super) a: Vec<f32>,
    pub(super) rank: usize,
    pub(super) scale: f64,
}

impl Product {
    /// Of a low-rank form, its rank gains multiplied into B (rounded to f32, as all that the
    /// kernels' factors hold).
    pub(super) fn of_low_rank(form: &LowRank) -> Product {
        let rank = form.rank();
        let mut b = decode(&form.b);
        if let Some(gain) = &form.rank_gain {
            let gain = decode(gain);
            for row in b.chunks_exact_mut(rank) {
                row.iter_mut().zip(&gain).for_each(|(element, gain)| *element *= gain);
            }
        }
        Product { b, a: decode(&form.a), rank, scale: form.scale() }
    }

    /// Of two matrices, or of a Tucker decomposition: `Σᵢ b[i,out] · (Σⱼ t[i,j,κ]·a[j,in])`, the
    /// bracket in f64 and rounded to f32.
    pub(super) fn of_cores(cores: &Cores) -> Product {
        let Some(core) = &cores.core else {
            let rank = dim(&cores.b, 1);
            return Product { b: decode(&cores.b), a: decode(&cores.a), rank, scale: 1.0 };
        };
        let (rank, out) = (dim(&cores.b, 0), dim(&cores.b, 1));
        let b = transposed(&decode(&cores.b), rank, out);
        Product { b, a: spread(core, &cores.a), rank, scale: 1.0 }
    }

    /// Of a low-rank change of a convolution with a core, in the same way.
    pub(super) fn of_tucker(form: &Tucker) -> Product {
        let (rank, scale) = (dim(&form.b, 1), form.scaling.scale(form.rank()));
        Product { b: decode(&form.b), a: spread(&form.core, &form.a), rank, scale }
    }

    /// Packed for the kernels: the product as the matrix stores it.
    pub(super) fn pack(self, orientation: Orientation) -> Factors {
        let Product { b, a, rank, scale } = self;
        let (out, input) = (b.len() / rank, a.len() / rank);
        match orientation {
            Orientation::OutIn => Factors::pack(out, input, rank, b, scale, |k, columns, row| {
                row.copy_from_slice(&a[k * input..][columns]);
            }),
            Orientation::InOut => {
                let left = transposed(&a, rank, input);
                Factors::pack(input, out, rank, left, scale, |k, columns, row| {
                    row.iter_mut().zip(columns).for_each(|(slot, o)| *slot = b[o * rank + k]);
                })
            }
        }
    }
}

/// `Σₖ t[j,k,κ]·a[k,in]` as a matrix of j × (in·κ), summed in f64 and rounded to f32.
fn spread(core: &Tensor, a: &Tensor) -> Vec<f32> {
    let (rank, inner, input) = (dim(core, 0), dim(a, 0), dim(a, 1));
    let kernel = count(&core.shape[2..]);
    let (a, t) = (decode(a), decode(core));
    let mut right = Vec::with_capacity(rank * input * kernel);
    let mut sums = vec![0.0; kernel * input];
    for block in t.chunks_exact(inner * kernel) {
        sums.fill(0.0);
        for (t, a) in block.chunks_exact(kernel).zip(a.chunks_exact(input)) {
            for (&t, sums) in t.iter().zip(sums.chunks_exact_mut(input)) {
                let elements = sums.iter_mut().zip(a);
                elements.for_each(|(sum, &a)| *sum += f64::from(t) * f64::from(a));
            }
        }
        for feature in 0..input {
            right.extend(sums.iter().skip(feature).step_by(input).map(|&sum| sum as f32));
        }
    }
    right
}

/// The transpose of a matrix of `rows × cols`.
pub(super) fn transposed(matrix: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    let mut result = vec![0.0; matrix.len()];
    for (r, row) in matrix.chunks_exact(cols).enumerate() {
        for (c, &element) in row.iter().enumerate() {
            result[c * rows + r] = element;
        }
    }
    result
}

/// Writes rows of the product, which are `out.len() / rows.len()` wide.
pub(super) fn rows(factors: &Factors, isa: Isa, rows: Range<usize>, out: &mut [f64]) {
    product_tile(isa, factors, TileRegion::full_width(factors, rows.start, rows.len()), out);
}

/// Cuts rows into runs whose f64 stay in the cache.
pub(super) fn runs(rows: Range<usize>, cols: usize) -> impl Iterator<Item = Range<usize>> {
    const ELEMENTS: usize = 1 << 15;
    // The kernels compute four rows at once.
    let step = (ELEMENTS / cols).max(4);
    let end = rows.end;
    rows.step_by(step).map(move |first| first..end.min(first + step))
}

/// Output and input features that a low-rank form's shapes give.
pub(super) fn low_rank_features(form: &LowRank) -> (usize, usize) {
    (form.out_features(), form.in_features())
}

/// Whether A and B have one rank.
pub(super) fn check_factors(a: &Tensor, b: &Tensor) -> Fits {
    let rank = dim(a, 0);
    shapes::tensor(a, "rank × in…", RANKS.contains(&rank) && a.shape.len() >= 2)?;
    let ones = b.shape.iter().skip(2).all(|&length| length == 1);
    shapes::tensor(b, format!("out × {rank}"), dim(b, 1) == rank && dim(b, 0) > 0 && ones)
}

/// Whether a low-rank form is one.
pub(super) fn check_low_rank(form: &LowRank) -> Fits {
    check_factors(&form.a, &form.b)?;
    let rank = form.rank();
    if let Some(gain) = &form.rank_gain {
        shapes::tensor(gain, format!("{rank} values"), count(&gain.shape) == rank)?;
    }
    shapes::scale(form.scale())
}

/// Output and input features that a product's shapes give.
pub(super) fn core_features(cores: &Cores) -> (usize, usize) {
    match &cores.core {
        None => (dim(&cores.b, 0), count(cores.a.shape.get(1..).unwrap_or(&[]))),
        Some(core) => {
            let kernel = count(core.shape.get(2..).unwrap_or(&[]));
            (dim(&cores.b, 1), dim(&cores.a, 1).saturating_mul(kernel))
        }
    }
}

/// Whether a product is one.
pub(super) fn check_cores(cores: &Cores) -> Fits {
    let (a, b) = (&cores.a, &cores.b);
    let (out, input) = core_features(cores);
    let full = out > 0 && input > 0 && input < usize::MAX;
    let Some(core) = &cores.core else {
        let rank = dim(b, 1);
        let fits = b.shape.len() == 2 && RANKS.contains(&rank) && full;
        shapes::tensor(b, "out × rank", fits)?;
        return shapes::tensor(a, format!("{rank} × in"), dim(a, 0) == rank && a.shape.len() >= 2);
    };
    shapes::tensor(b, "rank × out", b.shape.len() == 2 && full)?;
    shapes::tensor(a, "rank × in", a.shape.len() == 2)?;
    let (rank, inner) = (dim(b, 0), dim(a, 0));
    let fits = core.shape.len() >= 3 && core.shape.starts_with(&[rank, inner]);
    shapes::tensor(core, format!("{rank} × {inner} × kernel"), fits && inner > 0)?;
    // The core is spread to rank × in·kernel, which should not dwarf out × in·kernel.
    let most = out.saturating_mul(16).min(limits::RANK);
    shapes::tensor(b, format!("at most {most} × out"), (1..=most).contains(&rank))?;
    shapes::work("a product with its core", &[rank, inner, input])
}
