//! One parameter by an elementwise method: the changes are formed block by block, combined, and the
//! result is factored again.
//!
//! At most one m × n matrix of f32 is held at a time (a change whose largest elements are sought, or
//! the result), beside the factors in f64 and what the decomposition takes. Every change is formed
//! twice if it is pruned by magnitude, once if not. Blocks are cut by the shape alone, and sums made
//! in their order.

use lora_format::Dtype;
use lora_format::model::{LowRank, Scaling};
use ndarray::{Array1, Array2, Axis, s};
use rayon::iter::{IndexedParallelIterator, ParallelIterator};
use rayon::slice::ParallelSliceMut;

use super::concatenate::{common, encode, fit};
use super::elementwise::{self, Choice, Elementwise, Sparsifier};
use super::{CombineProblem, Combined, Factors, Outcome, Part};
use crate::factored::{Factored, FactoredError};
use crate::kernels::with_ieee_floats;
use crate::noise;
use crate::numbers::float_type;
use crate::rank::{self, RankLimits, RankPolicy, Ruling};
use crate::spectrum::Reached;
use crate::svd::{Decomposition, Goal, SvdOptions, decompose, residual};

/// Rows that are formed at a time.
const BLOCK: usize = 64;

/// What factoring a matrix met.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Factoring {
    /// The least that any matrix of this rank leaves, ‖·‖_F: of a decomposition that is not exact, a
    /// bound from below that rests on an estimate.
    pub optimal: f64,
    /// Whether all singular values were computed.
    pub exact: bool,
}

/// Combines the changes of one parameter.
pub(super) fn combine(
    name: String,
    parts: &[Factors<'_>],
    method: &Elementwise,
    ruling: Option<Ruling>,
    dtype: Option<Dtype>,
) -> Outcome {
    fit(parts)?;
    let template = parts.first().map(|part| part.form).ok_or(FactoredError::NotFactors)?;
    let matrix = formed(&name, parts, method)?;
    // In the order of the rows, whatever the threads.
    let energy: f64 =
        with_ieee_floats(|| matrix.iter().map(|&value| f64::from(value) * f64::from(value)).sum());
    if !energy.is_finite() {
        return Err(FactoredError::Overflow.into());
    }
    let largest = parts.iter().map(|part| part.form.rank()).max().unwrap_or(1);
    let (policy, limits) = match ruling {
        Some(Ruling::Choose(policy, limits)) => (policy, limits),
        Some(Ruling::Skip) | None => (RankPolicy::Rank(largest), RankLimits::default()),
    };
    let options = SvdOptions::default();
    let (found, rank) = factor(&matrix, energy, policy, limits, &options)?;
    let dtype = dtype.unwrap_or_else(|| common(parts));
    let (left, right) = roots(&found, rank, matrix.dim());
    let (left, right) = (rounded(left, dtype)?, rounded(right, dtype)?);
    let rank = right.nrows();
    let left_over = residual(&matrix, energy, left.view(), right.view(), options.isa);
    let form = form(template, &left, &right, dtype)?;
    let described = parts.iter().map(|part| Part {
        adapter: part.adapter,
        rank: part.form.rank(),
        weight: part.weight,
        scale: part.form.scale(),
        rounded: None,
    });
    let optimum = found.optimum.get(rank.min(found.rank())).copied().unwrap_or(0.0);
    let combined = Combined {
        name,
        rows: matrix.nrows(),
        cols: matrix.ncols(),
        parts: described.collect(),
        rank,
        dtype,
        energy,
        residual: left_over.sqrt(),
        factoring: Some(Factoring { optimal: optimum.sqrt(), exact: found.exact }),
        bytes: (form.a.bytes().len() + form.b.bytes().len()) as u64,
    };
    Ok((form, combined))
}

/// The combined matrix.
pub(super) fn formed(
    name: &str,
    parts: &[Factors<'_>],
    method: &Elementwise,
) -> Result<Array2<f32>, CombineProblem> {
    let factored: Vec<Factored<'_>> =
        parts.iter().map(|part| Factored::new(part.form)).collect::<Result<_, _>>()?;
    let mut choices = Vec::with_capacity(parts.len());
    for (part, one) in parts.iter().zip(&factored) {
        choices.push(match method.sparsifier {
            Sparsifier::Random { seed } => {
                Choice::Random { key: elementwise::key(seed, part.adapter, name) }
            }
            Sparsifier::Magnitude => {
                let matrix = by_blocks(one.dim(), |rows, out| {
                    let change = one.rows(rows);
                    out.iter_mut().zip(&change).for_each(|(out, &value)| *out = value as f32);
                })?;
                if matrix.iter().any(|value| !value.is_finite()) {
                    return Err(FactoredError::Overflow.into());
                }
                let keep = (method.density * matrix.len() as f64) as usize;
                elementwise::largest(&matrix, keep.min(matrix.len()), BLOCK)
            }
        });
    }
    let dim = factored.first().map(Factored::dim).ok_or(FactoredError::NotFactors)?;
    let matrix = by_blocks(dim, |rows, out| {
        let (block, first) = (rows.start / BLOCK, rows.start * dim.1);
        let changes: Vec<Vec<f64>> = factored
            .iter()
            .zip(&choices)
            .map(|(one, choice)| {
                let change: Vec<f32> = one.rows(rows.clone()).iter().map(|&x| x as f32).collect();
                elementwise::sparsify(choice, method.density, block, first, &change)
            })
            .collect();
        let mut values = vec![0.0; parts.len()];
        for (index, out) in out.iter_mut().enumerate() {
            for ((value, change), part) in values.iter_mut().zip(&changes).zip(parts) {
                *value = part.weight * change[index];
            }
            *out = elementwise::merge(method, &values) as f32;
        }
    })?;
    Ok(matrix)
}

/// A matrix whose blocks of rows are filled beside each other.
fn by_blocks(
    (rows, cols): (usize, usize),
    fill: impl Fn(std::ops::Range<usize>, &mut [f32]) + Sync,
) -> Result<Array2<f32>, FactoredError> {
    let count = rows.checked_mul(cols).ok_or(FactoredError::Overflow)?;
    let mut values = vec![0f32; count];
    values.par_chunks_mut((BLOCK * cols).max(1)).enumerate().for_each(|(block, out)| {
        let first = block * BLOCK;
        with_ieee_floats(|| fill(first..rows.min(first + BLOCK), out));
    });
    Array2::from_shape_vec((rows, cols), values).map_err(|_| FactoredError::NotFactors)
}

/// The decomposition as far as the policy asks for it, and the rank.
fn factor(
    matrix: &Array2<f32>,
    energy: f64,
    policy: RankPolicy,
    limits: RankLimits,
    options: &SvdOptions,
) -> Result<(Decomposition, usize), FactoredError> {
    let full = matrix.nrows().min(matrix.ncols());
    let chosen = |found: &Decomposition| {
        let noise = (policy == RankPolicy::Auto)
            .then(|| noise::estimate(&found.spectrum, 0.0, noise::Rule::default()));
        rank::choose(policy, &found.spectrum, noise.as_ref(), energy.sqrt(), limits)
    };
    let wanted = |found: &Decomposition| {
        let choice = chosen(found);
        if choice.bound.is_final() {
            Reached::At(choice.rank)
        } else {
            Reached::Beyond(choice.rank)
        }
    };
    let most = limits.maximum.unwrap_or(usize::MAX).min(full);
    let goal = match policy {
        RankPolicy::Rank(rank) => Goal::Rank(rank.max(limits.minimum).min(most).max(1).min(full)),
        _ => Goal::Until { wanted: &wanted, vectors: false, maximum: most },
    };
    let found = decompose(matrix, energy, goal, options)?;
    let rank = chosen(&found).rank.min(found.rank());
    Ok((found, rank))
}

/// The roots of the singular values on both sides; rank 1 of zeros where nothing is kept, for no
/// format knows rank 0.
fn roots(
    found: &Decomposition,
    rank: usize,
    (rows, cols): (usize, usize),
) -> (Array2<f32>, Array2<f32>) {
    let rank = rank.max(1).min(found.rank());
    if rank == 0 {
        return (Array2::zeros((rows, 1)), Array2::zeros((1, cols)));
    }
    let values = found.spectrum.values.iter().take(rank);
    let roots: Array1<f32> = values.map(|value| value.sqrt() as f32).collect();
    let left = &found.left.slice(s![.., ..rank]) * &roots;
    let right = &found.right.slice(s![..rank, ..]) * &roots.insert_axis(Axis(1));
    (left, right)
}

/// Values as the dtype will have them.
fn rounded(factor: Array2<f32>, dtype: Dtype) -> Result<Array2<f32>, FactoredError> {
    let float = float_type(dtype).ok_or(FactoredError::NotFactors)?;
    let rounded = factor.mapv(|value| float.decode(float.encode(f64::from(value))));
    if rounded.iter().all(|value| value.is_finite()) {
        Ok(rounded)
    } else {
        Err(FactoredError::Unstorable { dtype })
    }
}

fn form(
    template: &LowRank,
    left: &Array2<f32>,
    right: &Array2<f32>,
    dtype: Dtype,
) -> Result<LowRank, FactoredError> {
    let rank = right.nrows();
    let tensor = |old: &lora_format::Tensor, axis: usize, values: &Array2<f32>| {
        let mut shape = old.shape.clone();
        if let Some(length) = shape.get_mut(axis) {
            *length = rank;
        }
        let bytes = encode(values.iter().map(|&value| f64::from(value)), dtype)?;
        lora_format::Tensor::new(old.name.clone(), dtype, shape, bytes)
            .ok_or(FactoredError::NotFactors)
    };
    Ok(LowRank {
        a: tensor(&template.a, 0, right)?,
        b: tensor(&template.b, 1, left)?,
        scaling: Scaling::of_rank(rank),
        layer: template.layer,
        rank_gain: None,
        magnitude: None,
    })
}
