//! The singular value decomposition of a product of factors, without the product.
//!
//! Of `ΔW = s·B·A`, m × n with inner dimension r, let `s·B·diag(g) = Q_B·R_B` and `Aᵀ = Q_A·R_A` (g
//! are AdaLoRA's gains, else ones). Then `ΔW = Q_B·C·Q_Aᵀ` with the r × r *core* `C = R_B·R_Aᵀ`, and
//! C's decomposition `U·diag(σ)·Vᵀ` is that of ΔW: `(Q_B·U)·diag(σ)·(Q_A·V)ᵀ`. Everything is f64; the
//! work is O((m + n)·r²) and the memory O((m + n)·r).
//!
//! A [truncation](FactoredSvd::truncate) is rounded to the dtype that it is stored in, and its
//! [`Certificate`] is that of the rounded factors B', A'. With `B' = Q_B·X + E` and
//! `A' = Y·Q_Aᵀ + F`, where E and F are what rounding has put outside the two bases,
//!
//! ```text
//! ‖ΔW − B'A'‖²_F = ‖C − X·Y‖²_F + ‖E·Y‖²_F + ‖X·F‖²_F + ‖E·F‖²_F
//! ```
//!
//! because the four parts are orthogonal to each other. That is exact up to f64 arithmetic: errors
//! of some 10⁻¹⁵·‖ΔW‖_F, where rounding to f32 alone leaves 10⁻⁸.
//!
//! What is no product of two factors is refused here: DoRA's magnitude, under which the best factors
//! are not those of the truncated ΔW, and loralib's fused groups, which are several products.

use lora_format::model::{Layer, LowRank, Scaling, ScalingRule};
use lora_format::{Dtype, Tensor};
use ndarray::{Array1, Array2, Axis, s};

use crate::kernels::with_ieee_floats;
use crate::numbers::{float_type, non_finite};
use crate::spectrum::Spectrum;
use crate::svd::dense::{NotConverged, dense};

/// A singular value is zero if it is no more than this times ‖s·B‖_F·‖A‖_F: what f64 arithmetic
/// leaves of one.
const ZERO: f64 = 8.0 * f64::EPSILON;

/// Factors that cannot be decomposed or stored.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum FactoredError {
    /// DoRA.
    #[error(
        "DoRA: its magnitudes scale W + s·B·A, and the best factors of a smaller rank under them \
         are not those of the truncated s·B·A"
    )]
    Magnitude,
    /// loralib's `MergedLinear`.
    #[error("the factors of several groups of rows in one pair of tensors")]
    Groups,
    /// The shapes are not those of the layer's factors, or the dtypes are none to compute with.
    #[error("its tensors are not the factors of a product")]
    NotFactors,
    /// A factor holds NaN or infinities.
    #[error(
        "tensor `{tensor}` holds {count} values that are NaN or infinite, the first at element \
         {first}"
    )]
    NonFinite {
        /// The tensor.
        tensor: String,
        /// How many.
        count: usize,
        /// Flat index of the first.
        first: usize,
    },
    /// The product is too large even for f64.
    #[error("the product of its factors overflows")]
    Overflow,
    /// A factor of the truncation has values that the dtype cannot hold.
    #[error("values of the new factors become infinite in {dtype}")]
    Unstorable {
        /// The dtype.
        dtype: Dtype,
    },
    /// A decomposition failed.
    #[error(transparent)]
    NotConverged(#[from] NotConverged),
}

/// `ΔW = L·R`, the change of one component in f64.
#[derive(Debug)]
pub struct Factored<'a> {
    form: &'a LowRank,
    /// L = s·B·diag(g), m × r.
    left: Array2<f64>,
    /// R = A, r × n.
    right: Array2<f64>,
}

impl<'a> Factored<'a> {
    /// The factors of a component. Of a convolution, n counts the kernel's positions; of an
    /// embedding, the matrix is dimension × vocabulary, the transpose of the stored one.
    ///
    /// # Errors
    /// [`FactoredError`] for what is no such product, or not finite.
    pub fn new(form: &'a LowRank) -> Result<Factored<'a>, FactoredError> {
        if form.magnitude.is_some() {
            return Err(FactoredError::Magnitude);
        }
        if form.layer == Layer::Merged {
            return Err(FactoredError::Groups);
        }
        let (rows, rank, cols) = (form.out_features(), form.rank(), form.in_features());
        let mut left = matrix(&form.b, rows, rank)?;
        let right = matrix(&form.a, rank, cols)?;
        let gain = match &form.rank_gain {
            Some(gain) => matrix(gain, 1, rank)?,
            None => Array2::ones((1, rank)),
        };
        left *= &(gain * form.scale());
        Ok(Factored { form, left, right })
    }

    /// m and n.
    #[must_use]
    pub fn dim(&self) -> (usize, usize) {
        (self.left.nrows(), self.right.ncols())
    }

    /// Some whole rows of ΔW.
    pub(crate) fn rows(&self, rows: std::ops::Range<usize>) -> Array2<f64> {
        with_ieee_floats(|| self.left.slice(s![rows, ..]).dot(&self.right))
    }

    /// The decomposition.
    ///
    /// # Errors
    /// [`FactoredError::Overflow`], [`FactoredError::NotConverged`].
    pub fn svd(&self) -> Result<FactoredSvd<'a>, FactoredError> {
        with_ieee_floats(|| {
            let library = dense();
            let (left_basis, left) = library.qr(self.left.view())?;
            let (right_basis, right) = library.qr(self.right.t())?;
            let core = left.dot(&right.t());
            let energy = squares(&core);
            let size = (squares(&self.left) * squares(&self.right)).sqrt();
            if !energy.is_finite() || !size.is_finite() {
                return Err(FactoredError::Overflow);
            }
            let svd = library.svd(core.view())?;
            let zero = ZERO * size;
            let values = svd.values.iter().map(|&value| if value > zero { value } else { 0.0 });
            Ok(FactoredSvd {
                form: self.form,
                dim: self.dim(),
                values: values.collect(),
                left_basis,
                right_basis,
                core,
                left: svd.left,
                right: svd.right,
            })
        })
    }
}

/// `ΔW = U·diag(σ)·Vᵀ`, with k = min(m, n, r) values.
#[derive(Debug)]
pub struct FactoredSvd<'a> {
    /// σ, descending. What is not told from the rounding of f64 is 0.
    pub values: Vec<f64>,
    form: &'a LowRank,
    dim: (usize, usize),
    /// Q_B, m × min(m, r).
    left_basis: Array2<f64>,
    /// Q_A, n × min(n, r).
    right_basis: Array2<f64>,
    /// C.
    core: Array2<f64>,
    /// C's left singular vectors, as columns.
    left: Array2<f64>,
    /// Its right ones, as rows.
    right: Array2<f64>,
}

/// The component of a smaller rank, and how good it is.
#[derive(Clone, Debug)]
pub struct Truncated {
    /// B' and A', with alpha/rank as the scale.
    pub form: LowRank,
    /// What they leave.
    pub certificate: Certificate,
}

/// How near factors are to ΔW: exact up to f64 arithmetic, of the factors as they are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Certificate {
    /// ‖ΔW‖²_F.
    pub energy: f64,
    /// ‖ΔW − B'A'‖_F.
    pub residual: f64,
    /// The least that any matrix of this rank leaves: (Σ_{i>rank} σᵢ²)^½ (Eckart–Young).
    pub optimal: f64,
}

impl Certificate {
    /// ‖ΔW‖²_F − ‖ΔW − B'A'‖²_F.
    #[must_use]
    pub fn captured(&self) -> f64 {
        self.energy - self.residual * self.residual
    }

    /// ‖ΔW − B'A'‖_F / ‖ΔW‖_F; 0 of a zero matrix that is kept.
    #[must_use]
    pub fn relative(&self) -> f64 {
        if self.residual == 0.0 { 0.0 } else { self.residual / self.energy.sqrt() }
    }

    /// What rounding the factors costs: residual − optimal, not below 0.
    #[must_use]
    pub fn excess(&self) -> f64 {
        (self.residual - self.optimal).max(0.0)
    }
}

impl FactoredSvd<'_> {
    /// m and n.
    #[must_use]
    pub fn dim(&self) -> (usize, usize) {
        self.dim
    }

    /// The spectrum of ΔW, which is complete.
    #[must_use]
    pub fn spectrum(&self) -> Spectrum {
        Spectrum::of_rank(self.dim.0, self.dim.1, self.values.clone())
    }

    /// The first left singular vectors as columns, m × rank.
    #[must_use]
    pub fn left(&self, rank: usize) -> Array2<f64> {
        self.left_basis.dot(&self.left.slice(s![.., ..rank.min(self.values.len())]))
    }

    /// The first right singular vectors as rows, rank × n.
    #[must_use]
    pub fn right(&self, rank: usize) -> Array2<f64> {
        self.right.slice(s![..rank.min(self.values.len()), ..]).dot(&self.right_basis.t())
    }

    /// The best approximation of this rank, 1 to k, as factors of the same layer: the roots of the
    /// singular values on both sides, `B'·A' = ΔW_r / scale`. Each factor keeps its dtype unless
    /// another is given. Of a zero matrix, the factors are zeros.
    ///
    /// A scale of 1 makes alpha the rank. A layer whose bias is changed too may share its scale with
    /// it, and keeps the one it has.
    ///
    /// # Errors
    /// [`FactoredError::Unstorable`].
    pub fn truncate(
        &self,
        rank: usize,
        dtype: Option<Dtype>,
        scale: f64,
    ) -> Result<Truncated, FactoredError> {
        with_ieee_floats(|| {
            let rank = rank.clamp(1, self.values.len().max(1));
            let scaling = scaling(scale, rank);
            let scale = scaling.scale(rank);
            let values = self.values.iter().take(rank);
            let roots: Array1<f64> = values.map(|value| (value / scale.abs()).sqrt()).collect();
            let b = self.left(rank) * &(&roots * scale.signum());
            let a = self.right(rank) * &roots.insert_axis(Axis(1));
            let (b, stored_b) = round(b, dtype.unwrap_or(self.form.b.dtype))?;
            let (a, stored_a) = round(a, dtype.unwrap_or(self.form.a.dtype))?;
            let certificate = self.certify(&(b * scale), &a, rank);
            let resized = |old: &Tensor, axis: usize, bytes: Vec<u8>| {
                let mut shape = old.shape.clone();
                shape[axis] = rank;
                Tensor::new(old.name.clone(), dtype.unwrap_or(old.dtype), shape, bytes)
                    .ok_or(FactoredError::NotFactors)
            };
            let form = LowRank {
                a: resized(&self.form.a, 0, stored_a)?,
                b: resized(&self.form.b, 1, stored_b)?,
                scaling,
                layer: self.form.layer,
                rank_gain: None,
                magnitude: None,
            };
            Ok(Truncated { form, certificate })
        })
    }

    /// What `b·a` leaves of ΔW; see the head of this file.
    fn certify(&self, b: &Array2<f64>, a: &Array2<f64>, rank: usize) -> Certificate {
        let inner_b = self.left_basis.t().dot(b);
        let inner_a = a.dot(&self.right_basis);
        let outer_b = b - &self.left_basis.dot(&inner_b);
        let outer_a = a - &inner_a.dot(&self.right_basis.t());
        // ‖E·F‖²_F is the inner product of EᵀE and F·Fᵀ.
        let outside = (outer_b.t().dot(&outer_b) * outer_a.dot(&outer_a.t())).sum();
        let parts = [
            squares(&(&self.core - &inner_b.dot(&inner_a))),
            squares(&outer_b.dot(&inner_a)),
            squares(&inner_b.dot(&outer_a)),
            f64::max(outside, 0.0),
        ];
        Certificate {
            energy: squares(&self.core),
            residual: parts.iter().sum::<f64>().sqrt(),
            optimal: self.spectrum().residual(rank),
        }
    }
}

/// alpha/rank for a scale; where no f64 is exactly that, as near as there is. A scale that nothing
/// can be divided by becomes 1.
pub(crate) fn scaling(scale: f64, rank: usize) -> Scaling {
    let scale = if scale.is_normal() { scale } else { 1.0 };
    let (rule, product) = (ScalingRule::AlphaOverRank, scale * rank as f64);
    let near = [product, product.next_down(), product.next_up()];
    let exact = near.into_iter().find(|alpha| alpha / rank as f64 == scale);
    Scaling { alpha: exact.unwrap_or(product), rule }
}

/// A tensor as a matrix, exactly.
pub(crate) fn matrix(
    tensor: &Tensor,
    rows: usize,
    cols: usize,
) -> Result<Array2<f64>, FactoredError> {
    if let Some((count, first)) = non_finite(tensor.dtype, tensor.bytes()) {
        let tensor = tensor.name.clone();
        return Err(FactoredError::NonFinite { tensor, count, first });
    }
    let values = tensor.to_f32().filter(|_| rows > 0 && cols > 0);
    let values = values.ok_or(FactoredError::NotFactors)?.into_iter().map(f64::from).collect();
    Array2::from_shape_vec((rows, cols), values).map_err(|_| FactoredError::NotFactors)
}

/// The values rounded to a dtype once, and their bytes.
fn round(mut matrix: Array2<f64>, dtype: Dtype) -> Result<(Array2<f64>, Vec<u8>), FactoredError> {
    let float = float_type(dtype).ok_or(FactoredError::NotFactors)?;
    let mut bytes = Vec::with_capacity(matrix.len() * float.size());
    for value in &mut matrix {
        let bits = float.encode(*value);
        *value = f64::from(float.decode(bits));
        if !value.is_finite() {
            return Err(FactoredError::Unstorable { dtype });
        }
        bytes.extend_from_slice(&bits.to_le_bytes()[..float.size()]);
    }
    Ok((matrix, bytes))
}

/// Σ x², row by row.
fn squares(matrix: &Array2<f64>) -> f64 {
    matrix.rows().into_iter().map(|row| row.dot(&row)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of (−1, 1), the same every time.
    fn values(seed: u64, count: usize) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    fn tensor(dtype: Dtype, shape: &[usize], values: &[f32]) -> Tensor {
        let float = float_type(dtype).unwrap();
        let bytes = values.iter().flat_map(|&value| {
            float.encode(f64::from(value)).to_le_bytes()[..float.size()].to_vec()
        });
        Tensor::new("t".to_owned(), dtype, shape.to_vec(), bytes.collect()).unwrap()
    }

    fn form(dtype: Dtype, (m, r, n): (usize, usize, usize), alpha: f64) -> LowRank {
        let a = tensor(dtype, &[r, n], &values(1, r * n));
        let b = tensor(dtype, &[m, r], &values(2, m * r));
        LowRank::linear(a, b, Scaling { alpha, rule: ScalingRule::AlphaOverRank })
    }

    /// s·B·diag(g)·A, element by element.
    fn product(form: &LowRank) -> Array2<f64> {
        let (m, r, n) = (form.out_features(), form.rank(), form.in_features());
        let (a, b) = (form.a.to_f32().unwrap(), form.b.to_f32().unwrap());
        let gain = form.rank_gain.as_ref().map(|gain| gain.to_f32().unwrap());
        Array2::from_shape_fn((m, n), |(row, col)| {
            let terms = (0..r).map(|k| {
                let gain = gain.as_ref().map_or(1.0, |gain| f64::from(gain[k]));
                f64::from(b[row * r + k]) * gain * f64::from(a[k * n + col])
            });
            form.scale() * terms.sum::<f64>()
        })
    }

    fn norm(matrix: &Array2<f64>) -> f64 {
        squares(matrix).sqrt()
    }

    /// The certificate against the product itself, formed and decomposed.
    fn check(form: &LowRank, rank: usize, dtype: Option<Dtype>) -> Truncated {
        let svd = Factored::new(form).unwrap().svd().unwrap();
        let delta = product(form);
        let truth = dense().svd(delta.view()).unwrap();
        let size = norm(&delta);
        for (index, value) in svd.values.iter().enumerate() {
            assert!((value - truth.values[index]).abs() <= 1e-13 * size, "{index}");
        }
        let (left, right) = (svd.left(rank), svd.right(rank));
        let one = Array2::<f64>::eye(left.ncols());
        assert!(norm(&(left.t().dot(&left) - &one)) < 1e-13);
        assert!(norm(&(right.dot(&right.t()) - &one)) < 1e-13);

        let truncated = svd.truncate(rank, dtype, 1.0).unwrap();
        let Truncated { form: new, certificate } = &truncated;
        assert_eq!((new.rank(), new.scale(), new.layer), (rank, 1.0, form.layer));
        let residual = norm(&(&delta - &product(new)));
        let tail: f64 = truth.values[rank.min(truth.values.len())..].iter().map(|v| v * v).sum();
        for (found, wanted) in [
            (certificate.residual, residual),
            (certificate.optimal, tail.sqrt()),
            (certificate.energy.sqrt(), size),
        ] {
            assert!((found - wanted).abs() <= 2e-14 * size, "{found} {wanted}");
        }
        assert!(certificate.residual >= certificate.optimal - 1e-14 * size);
        truncated
    }

    #[test]
    fn truncations_are_those_of_the_product() {
        for (m, r, n) in
            [(40usize, 8usize, 30usize), (30, 8, 40), (4, 8, 50), (50, 8, 4), (9, 1, 9), (1, 3, 1)]
        {
            let full = r.min(m).min(n);
            for rank in [1, full.div_ceil(2), full] {
                for alpha in [16.0, -3.0] {
                    check(&form(Dtype::F32, (m, r, n), alpha), rank, None);
                    check(&form(Dtype::Bf16, (m, r, n), alpha), rank, None);
                    check(&form(Dtype::F32, (m, r, n), alpha), rank, Some(Dtype::F16));
                }
            }
        }
    }

    #[test]
    fn a_scale_that_a_bias_shares_is_kept() {
        let form = form(Dtype::F32, (20, 6, 25), -2.1);
        let svd = Factored::new(&form).unwrap().svd().unwrap();
        for scale in [form.scale(), 2.0, 1.0 / 3.0] {
            let Truncated { form: new, certificate } = svd.truncate(6, None, scale).unwrap();
            assert_eq!(new.scale(), scale);
            let residual = norm(&(product(&form) - product(&new)));
            assert!((certificate.residual - residual).abs() < 1e-13);
            assert!(certificate.relative() < 1e-7);
        }
        assert_eq!(svd.truncate(3, None, 0.0).unwrap().form.scale(), 1.0);
    }

    #[test]
    fn rounding_is_in_the_certificate() {
        let excess = |dtype| {
            let truncated = check(&form(Dtype::F32, (60, 12, 70), 8.0), 12, Some(dtype));
            assert_eq!((truncated.form.a.dtype, truncated.form.b.dtype), (dtype, dtype));
            truncated.certificate.relative()
        };
        let (f32, f16, bf16) = (excess(Dtype::F32), excess(Dtype::F16), excess(Dtype::Bf16));
        assert!(f32 > 1e-9 && f32 < 1e-7, "{f32:e}");
        assert!(f16 > 1e-5 && f16 < 1e-3, "{f16:e}");
        assert!(bf16 > 1e-4 && bf16 < 1e-2, "{bf16:e}");
    }

    #[test]
    fn gains_and_layers_are_folded_in() {
        let scaling = Scaling { alpha: 4.0, rule: ScalingRule::AlphaOverRank };
        let gain = tensor(Dtype::F32, &[6], &[2.0, -1.0, 0.5, 0.0, 3.0, 1.0]);
        let form = LowRank { rank_gain: Some(gain), ..form(Dtype::F32, (20, 6, 25), 4.0) };
        let truncated = check(&form, 4, None);
        assert!(truncated.form.rank_gain.is_none());
        // One gain is zero: five values are left, and the rest is exactly zero.
        let values = Factored::new(&form).unwrap().svd().unwrap().values;
        assert_eq!(values.iter().filter(|value| **value > 0.0).count(), 5);

        let a = tensor(Dtype::F32, &[5, 4, 3, 3], &self::values(3, 180));
        let b = tensor(Dtype::F32, &[8, 5, 1, 1], &self::values(4, 40));
        let form = LowRank { layer: Layer::Convolution, ..LowRank::linear(a, b, scaling) };
        let new = check(&form, 2, None).form;
        assert_eq!((new.a.shape, new.b.shape), (vec![2, 4, 3, 3], vec![8, 2, 1, 1]));

        let a = tensor(Dtype::F16, &[5, 32], &self::values(5, 160));
        let b = tensor(Dtype::F32, &[8, 5], &self::values(6, 40));
        let form = LowRank { layer: Layer::Embedding, ..LowRank::linear(a, b, scaling) };
        let new = check(&form, 3, None).form;
        assert_eq!((new.a.dtype, new.b.dtype), (Dtype::F16, Dtype::F32));
    }

    #[test]
    fn dependent_factors_have_the_rank_that_they_have() {
        // The second half of B's columns repeats the first.
        let mut form = form(Dtype::F32, (64, 16, 48), 32.0);
        let mut b = form.b.to_f32().unwrap();
        for row in b.chunks_exact_mut(16) {
            row.copy_within(..8, 8);
        }
        form.b = tensor(Dtype::F32, &[64, 16], &b);
        let svd = Factored::new(&form).unwrap().svd().unwrap();
        assert_eq!(svd.values.iter().filter(|value| **value > 0.0).count(), 8);
        let certificate = check(&form, 8, None).certificate;
        assert_eq!(certificate.optimal, 0.0);
        assert!(certificate.relative() < 1e-7);
    }

    #[test]
    fn zeros_stay_zeros() {
        let mut form = form(Dtype::Bf16, (20, 4, 30), 8.0);
        form.b = tensor(Dtype::Bf16, &[20, 4], &[0.0; 80]);
        let Truncated { form, certificate } = check(&form, 1, None);
        assert!(
            form.a.to_f32().unwrap().iter().chain(&form.b.to_f32().unwrap()).all(|v| *v == 0.0)
        );
        assert_eq!((certificate, certificate.relative()), (Certificate::default(), 0.0));
    }

    #[test]
    fn what_cannot_be_decomposed_or_stored_is_refused() {
        let of = |form: &LowRank| Factored::new(form).unwrap_err();
        let good = form(Dtype::F32, (6, 2, 5), 2.0);
        let magnitude = Some(tensor(Dtype::F32, &[6], &[1.0; 6]));
        assert_eq!(of(&LowRank { magnitude, ..good.clone() }), FactoredError::Magnitude);
        let merged = LowRank { layer: Layer::Merged, ..good.clone() };
        assert_eq!(of(&merged), FactoredError::Groups);
        let mut short = good.clone();
        short.b = tensor(Dtype::F32, &[5, 3], &[1.0; 15]);
        assert_eq!(of(&short), FactoredError::NotFactors);
        let mut infinite = good.clone();
        let mut a = vec![1.0; 10];
        a[3] = f32::INFINITY;
        infinite.a = tensor(Dtype::F32, &[2, 5], &a);
        let tensor_name = "t".to_owned();
        let wanted = FactoredError::NonFinite { tensor: tensor_name, count: 1, first: 3 };
        assert_eq!(of(&infinite), wanted);

        let huge =
            LowRank { scaling: Scaling { alpha: 1e12, rule: ScalingRule::Direct }, ..good.clone() };
        let svd = Factored::new(&huge).unwrap().svd().unwrap();
        let refused = svd.truncate(1, Some(Dtype::F16), 1.0).unwrap_err();
        assert_eq!(refused, FactoredError::Unstorable { dtype: Dtype::F16 });
        assert!(svd.truncate(1, Some(Dtype::Bf16), 1.0).is_ok());
        let beyond =
            LowRank { scaling: Scaling { alpha: 1e300, rule: ScalingRule::Direct }, ..good };
        assert_eq!(Factored::new(&beyond).unwrap().svd().unwrap_err(), FactoredError::Overflow);
    }
}
