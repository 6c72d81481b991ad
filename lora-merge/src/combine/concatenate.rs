//! `Σ wᵢ·sᵢ·Bᵢ·Aᵢ` as one product: the Aᵢ one below the other, the Bᵢ side by side.
//!
//! The product has one scale s, so that Bᵢ takes the ratio `wᵢ·sᵢ/s` (and AdaLoRA's gains). Ratios
//! of powers of two cost nothing. Of the scales that make one adapter's ratio ±1, the one is taken
//! that leaves the fewest elements with another ratio. An element is exact if `s·b'` is `wᵢ·sᵢ·b`
//! with no rounding at all; the others are rounded once from f64.
//!
//! With `E = L − s·B'` and `F = A − A'` (zero unless a smaller dtype was asked for),
//!
//! ```text
//! L·A − s·B'·A' = E·A + s·B'·F = [E | s·B']·[A ; F]
//! ```
//!
//! whose norm comes from the Gram matrices of both, of 2R × 2R, without cancellation and without the
//! product.

use lora_format::model::{Form, Layer, LowRank, Scaling, ScalingRule};
use lora_format::{Dtype, Tensor, limits};
use ndarray::{Array2, ArrayView2, Axis, concatenate as join};

use super::{CombineProblem, Combined, Factors, Outcome, Part, Piece};
use crate::factored::{FactoredError, matrix, scaling};
use crate::kernels::{FloatType, with_ieee_floats};
use crate::numbers::float_type;

/// The changes of one parameter as one.
pub(super) fn concatenate(name: String, parts: &[Factors<'_>], dtype: Option<Dtype>) -> Outcome {
    fit(parts)?;
    with_ieee_floats(|| {
        let stack = Stack::of(parts)?;
        let kept = common(parts);
        let first = dtype.unwrap_or(kept);
        let mut stored = stack.store(first)?;
        if dtype.is_none() && first != Dtype::F32 && stored.rounded.iter().any(|&count| count > 0) {
            stored = stack.store(Dtype::F32)?;
        }
        let (energy, residual) = stack.measure(&stored);
        let template = parts.first().map(|part| part.form).ok_or(FactoredError::NotFactors)?;
        let form = stored.form(template, stack.scale)?;
        let described = parts.iter().zip(&stored.rounded).map(|(part, &rounded)| Part {
            adapter: part.adapter,
            rank: part.form.rank(),
            weight: part.weight,
            scale: part.form.scale(),
            rounded: Some(rounded),
        });
        let combined = Combined {
            name,
            rows: form.out_features(),
            cols: form.in_features(),
            parts: described.collect(),
            rank: form.rank(),
            dtype: stored.dtype,
            energy,
            residual,
            factoring: None,
            bytes: (form.a.bytes().len() + form.b.bytes().len()) as u64,
        };
        Ok((form, combined))
    })
}

/// Refuses changes of different matrices.
pub(super) fn fit(parts: &[Factors<'_>]) -> Result<(), CombineProblem> {
    let Some((first, rest)) = parts.split_first() else { return Ok(()) };
    let tail = |tensor: &Tensor, axis: usize| {
        let mut shape = tensor.shape.clone();
        if axis < shape.len() {
            shape.remove(axis);
        }
        shape
    };
    let kind = |form: &LowRank| (form.layer, tail(&form.b, 1), tail(&form.a, 0));
    for part in rest {
        if kind(first.form) != kind(part.form) {
            let (first, second) = (describe(first.form), describe(part.form));
            return Err(CombineProblem::Shapes { first, second });
        }
    }
    if parts.iter().any(|part| part.form.layer == Layer::Merged) {
        return Err(FactoredError::Groups.into());
    }
    Ok(())
}

fn describe(form: &LowRank) -> String {
    let layer = match form.layer {
        Layer::Linear | Layer::Merged => "linear layer",
        Layer::Embedding => "embedding",
        Layer::Convolution => "convolution",
    };
    format!("a {layer} of {} × {}", form.out_features(), form.in_features())
}

/// The dtype of all factors; f32, which holds the others exactly, if there are several.
pub(super) fn common(parts: &[Factors<'_>]) -> Dtype {
    let mut dtypes = parts.iter().flat_map(|part| [part.form.a.dtype, part.form.b.dtype]);
    let first = dtypes.next().unwrap_or(Dtype::F32);
    if dtypes.all(|dtype| dtype == first) { first } else { Dtype::F32 }
}

/// All factors in f64.
struct Stack {
    /// Bᵢ side by side, as they are stored: m × R.
    b: Array2<f64>,
    /// Aᵢ one below the other: R × n.
    a: Array2<f64>,
    /// wᵢ·sᵢ·g of every column of B.
    multipliers: Vec<f64>,
    /// Which part a column belongs to.
    owner: Vec<usize>,
    /// How many parts there are.
    parts: usize,
    /// s.
    scale: f64,
}

impl Stack {
    fn of(parts: &[Factors<'_>]) -> Result<Stack, CombineProblem> {
        let ranks = parts.iter().map(|part| part.form.rank());
        let rank = ranks.fold(0usize, usize::saturating_add);
        if rank > limits::RANK {
            return Err(CombineProblem::Rank { rank, limit: limits::RANK });
        }
        let (mut left, mut right) = (Vec::new(), Vec::new());
        let (mut multipliers, mut owner) = (Vec::new(), Vec::new());
        for (index, part) in parts.iter().enumerate() {
            let form = part.form;
            let rank = form.rank();
            left.push(matrix(&form.b, form.out_features(), rank)?);
            right.push(matrix(&form.a, rank, form.in_features())?);
            let multiplier = form.scale() * part.weight;
            let gains = match &form.rank_gain {
                Some(gain) => matrix(gain, 1, rank)?.into_iter().collect(),
                None => vec![1.0; rank],
            };
            multipliers.extend(gains.into_iter().map(|gain| multiplier * gain));
            owner.extend(std::iter::repeat_n(index, rank));
        }
        if multipliers.iter().any(|multiplier| !multiplier.is_finite()) {
            return Err(FactoredError::Overflow.into());
        }
        let views = |all: &[Array2<f64>], axis| {
            let views: Vec<ArrayView2<'_, f64>> = all.iter().map(|one| one.view()).collect();
            join(Axis(axis), &views).map_err(|_| FactoredError::NotFactors)
        };
        let scale = common_scale(&multipliers);
        let (b, a) = (views(&left, 1)?, views(&right, 0)?);
        Ok(Stack { b, a, multipliers, owner, parts: parts.len(), scale })
    }

    /// The factors in a dtype.
    fn store(&self, dtype: Dtype) -> Result<Stored, FactoredError> {
        let float = float_type(dtype).ok_or(FactoredError::NotFactors)?;
        let mut rounded = vec![0u64; self.parts];
        let mut b = Array2::zeros(self.b.dim());
        for (k, &multiplier) in self.multipliers.iter().enumerate() {
            let ratio = multiplier / self.scale;
            let exact = ratio.mul_add(self.scale, -multiplier) == 0.0;
            for (&old, new) in self.b.column(k).iter().zip(b.column_mut(k)) {
                let product = old * ratio;
                *new = nearest(float, product).ok_or(FactoredError::Unstorable { dtype })?;
                let is_exact = *new == product && old.mul_add(ratio, -product) == 0.0 && exact;
                rounded[self.owner[k]] += u64::from(!is_exact && old != 0.0);
            }
        }
        let mut a = Array2::zeros(self.a.dim());
        for ((old, mut new), &owner) in self.a.outer_iter().zip(a.outer_iter_mut()).zip(&self.owner)
        {
            for (&old, new) in old.iter().zip(&mut new) {
                *new = nearest(float, old).ok_or(FactoredError::Unstorable { dtype })?;
                rounded[owner] += u64::from(*new != old);
            }
        }
        Ok(Stored { a, b, dtype, rounded })
    }

    /// ‖L·A‖²_F and what the stored factors leave of it; see the head of this file.
    fn measure(&self, stored: &Stored) -> (f64, f64) {
        let multipliers =
            Array2::from_shape_fn((1, self.multipliers.len()), |(_, k)| self.multipliers[k]);
        let left = &self.b * &multipliers;
        let energy = square(left.view(), self.a.view());
        if stored.rounded.iter().all(|&count| count == 0) {
            return (energy, 0.0);
        }
        let kept = &stored.b * self.scale;
        let lost = &left - &kept;
        let outside = &self.a - &stored.a;
        let both = join(Axis(1), &[lost.view(), kept.view()])
            .and_then(|left| Ok((left, join(Axis(0), &[self.a.view(), outside.view()])?)));
        // Equal shapes: the join does not fail.
        let residual = both.map_or(f64::NAN, |(left, right)| square(left.view(), right.view()));
        (energy, residual.sqrt())
    }
}

/// ‖L·R‖²_F = Σ (LᵀL)∘(R·Rᵀ), not below 0.
fn square(left: ArrayView2<'_, f64>, right: ArrayView2<'_, f64>) -> f64 {
    (left.t().dot(&left) * right.dot(&right.t())).sum().max(0.0)
}

/// The nearest value of a dtype, if that is finite.
fn nearest(float: FloatType, value: f64) -> Option<f64> {
    let stored = f64::from(float.decode(float.encode(value)));
    stored.is_finite().then_some(stored)
}

/// The scale that leaves the fewest columns with a ratio that is no power of two; of equals, the
/// first column's.
fn common_scale(multipliers: &[f64]) -> f64 {
    let mut candidates: Vec<f64> = Vec::new();
    for multiplier in multipliers.iter().map(|multiplier| multiplier.abs()) {
        if multiplier.is_normal() && !candidates.contains(&multiplier) {
            candidates.push(multiplier);
        }
        // AdaLoRA's gains are all different: no candidate is better than another.
        if candidates.len() > CANDIDATES {
            break;
        }
    }
    let uneven = |scale: f64| {
        multipliers.iter().filter(|&&multiplier| !is_power_of_two(multiplier / scale)).count()
    };
    candidates.into_iter().min_by_key(|&scale| uneven(scale)).unwrap_or(1.0)
}

/// How many scales are tried.
const CANDIDATES: usize = 64;

fn is_power_of_two(value: f64) -> bool {
    const MANTISSA: u64 = (1 << 52) - 1;
    value == 0.0 || (value.is_normal() && value.to_bits() & MANTISSA == 0)
}

/// Factors as they are stored.
struct Stored {
    a: Array2<f64>,
    b: Array2<f64>,
    dtype: Dtype,
    /// Elements of every part that were rounded.
    rounded: Vec<u64>,
}

impl Stored {
    fn form(&self, template: &LowRank, scale: f64) -> Result<LowRank, FactoredError> {
        let rank = self.a.nrows();
        let tensor = |old: &Tensor, axis: usize, values: &Array2<f64>| {
            let mut shape = old.shape.clone();
            if let Some(length) = shape.get_mut(axis) {
                *length = rank;
            }
            let bytes = encode(values.iter().copied(), self.dtype)?;
            Tensor::new(old.name.clone(), self.dtype, shape, bytes).ok_or(FactoredError::NotFactors)
        };
        Ok(LowRank {
            a: tensor(&template.a, 0, &self.a)?,
            b: tensor(&template.b, 1, &self.b)?,
            scaling: scaling_of(scale, rank),
            layer: template.layer,
            rank_gain: None,
            magnitude: None,
        })
    }
}

/// alpha/rank where some alpha is exactly that, otherwise the scale itself.
fn scaling_of(scale: f64, rank: usize) -> Scaling {
    let found = scaling(scale, rank);
    if found.scale(rank) == scale {
        found
    } else {
        Scaling { alpha: scale, rule: ScalingRule::Direct }
    }
}

/// Values that the dtype holds as its bytes.
pub(super) fn encode(
    values: impl Iterator<Item = f64>,
    dtype: Dtype,
) -> Result<Vec<u8>, FactoredError> {
    let float = float_type(dtype).ok_or(FactoredError::NotFactors)?;
    let mut bytes = Vec::new();
    for value in values {
        bytes.extend_from_slice(&float.encode(value).to_le_bytes()[..float.size()]);
    }
    Ok(bytes)
}

/// `Σ wᵢ·sᵢ·Tᵢ` as `scale·T`, and how many elements were rounded. T is f32 unless the dtype of all
/// holds it exactly.
pub(super) fn add(pieces: &[Piece<'_>], scale: f64) -> Result<(Form, u64), CombineProblem> {
    let mut sum: Vec<f64> = Vec::new();
    let mut first: Option<&Tensor> = None;
    let mut dtype = None;
    for piece in pieces {
        let Form::Added { tensor, scale: own } = piece.form else { continue };
        let values = matrix(tensor, 1, tensor.elements())?;
        let known = first.get_or_insert(tensor);
        if known.shape != tensor.shape {
            let (first, second) = (format!("{:?}", known.shape), format!("{:?}", tensor.shape));
            return Err(CombineProblem::Shapes { first, second });
        }
        let same = *dtype.get_or_insert(tensor.dtype) == tensor.dtype;
        dtype = Some(if same { tensor.dtype } else { Dtype::F32 });
        sum.resize(values.len(), 0.0);
        let ratio = own * piece.weight / scale;
        sum.iter_mut().zip(&values).for_each(|(sum, value)| *sum += ratio * value);
    }
    let tensor = first.ok_or(FactoredError::NotFactors)?;
    let store = |dtype: Dtype| {
        let float = float_type(dtype).ok_or(FactoredError::NotFactors)?;
        let mut rounded = 0u64;
        for &value in &sum {
            let stored = nearest(float, value).ok_or(FactoredError::Unstorable { dtype })?;
            rounded += u64::from(stored != value);
        }
        Ok::<_, FactoredError>((dtype, rounded))
    };
    let (dtype, rounded) = match store(dtype.unwrap_or(Dtype::F32)) {
        Ok((dtype, 0)) => (dtype, 0),
        _ => store(Dtype::F32)?,
    };
    let bytes = encode(sum.iter().copied(), dtype)?;
    let tensor = Tensor::new(tensor.name.clone(), dtype, tensor.shape.clone(), bytes)
        .ok_or(FactoredError::NotFactors)?;
    Ok((Form::Added { tensor, scale }, rounded))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scale_leaves_the_fewest_ratios_that_round() {
        assert_eq!(common_scale(&[0.7, 0.3, 0.3, 0.6]), 0.3);
        assert_eq!(common_scale(&[-0.7, 0.3]), 0.7);
        assert_eq!(common_scale(&[0.0, 3.0]), 3.0);
        assert_eq!(common_scale(&[]), 1.0);
        assert!(is_power_of_two(-0.25) && !is_power_of_two(3.0));
    }

    #[test]
    fn squares_of_products_need_no_product() {
        let left = ndarray::array![[1.0, 2.0], [3.0, -1.0], [0.5, 4.0]];
        let right = ndarray::array![[1.0, -2.0], [0.25, 3.0]];
        let product = left.dot(&right);
        let expected: f64 = product.iter().map(|x| x * x).sum();
        assert!((square(left.view(), right.view()) - expected).abs() < 1e-12 * expected);
    }
}
