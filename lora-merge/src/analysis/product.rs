//! A change that is a product of two factors, and its singular value decomposition without forming
//! it.
//!
//! `s·B·A = (Q_B·R_B)·(Q_A·R_A)ᵀ`, and the SVD of the small core `R_B·R_Aᵀ` gives that of the
//! product: all in f64, of factors that f64 holds exactly, so that singular values are those of the
//! product as it is meant. All of a change that are products are side by side in one pair of factors.

use lora_format::Tensor;
use lora_format::model::{Form, Layer};
use ndarray::{Array2, ArrayView2, Axis, concatenate};

use crate::spectrum::Spectrum;
use crate::svd::dense::{NotConverged, dense};

/// Values below this share of the largest are those of directions that are not there.
const NO_DIRECTION: f64 = 1e-10;

/// A change `L·R` of a matrix of out × in; see [`Form`] for what that is of embeddings and
/// convolutions.
#[derive(Clone, Debug)]
pub struct Product {
    /// L, out × r, with the scale.
    pub left: Array2<f64>,
    /// R, r × in.
    pub right: Array2<f64>,
}

/// A matrix by its leading singular vectors.
#[derive(Clone, Debug)]
pub struct Directions {
    /// The singular values and the energy.
    pub spectrum: Spectrum,
    /// Directions of the output: left singular vectors of the out × in matrix, m × k.
    pub output: Array2<f64>,
    /// Directions of the input: right singular vectors, n × k.
    pub input: Array2<f64>,
}

impl Product {
    /// What a form adds, if that is a product whatever it is added to.
    ///
    /// `inputs` is the number of columns of the weight, if it is known: VeRA's factors are shared
    /// among layers, and do not say.
    ///
    /// # Errors
    /// Why it is none.
    pub fn of(form: &Form, inputs: Option<usize>) -> Result<Product, String> {
        let product = match form {
            Form::LowRank(form) if form.magnitude.is_some() => {
                return Err("DoRA's change depends on the whole of the weight".to_owned());
            }
            Form::LowRank(form) if form.layer == Layer::Merged => {
                return Err("a fused projection, of which only the base tells the parts".to_owned());
            }
            Form::LowRank(form) => {
                let rank = form.rank();
                let mut left = matrix(&form.b, form.out_features(), rank)?;
                let right = matrix(&form.a, rank, form.in_features())?;
                if let Some(gain) = &form.rank_gain {
                    left *= &matrix(gain, 1, rank)?;
                }
                left *= form.scale();
                Product { left, right }
            }
            Form::Shared(form) => {
                let &[rank, widest] = form.a.shape.as_slice() else {
                    return Err("its shared factor is no matrix".to_owned());
                };
                let Some(inputs) = inputs.filter(|&inputs| inputs <= widest) else {
                    return Err("how many inputs it has only the base tells".to_owned());
                };
                let outputs = form.out_gain.elements();
                let rows = form.b.shape.first().copied().unwrap_or(0);
                if outputs > rows {
                    return Err("its shared factor has too few rows".to_owned());
                }
                let all = matrix(&form.b, rows, rank)?;
                let mut left = all.slice(ndarray::s![..outputs, ..]).to_owned();
                left *= &matrix(&form.in_gain, 1, rank)?;
                left *= &matrix(&form.out_gain, outputs, 1)?;
                let right = matrix(&form.a, rank, widest)?;
                Product { left, right: right.slice(ndarray::s![.., ..inputs]).to_owned() }
            }
            other => {
                return Err(format!("a change by {} is no product of factors", other.method()));
            }
        };
        let finite = |factor: &Array2<f64>| factor.iter().all(|value| value.is_finite());
        if finite(&product.left) && finite(&product.right) {
            Ok(product)
        } else {
            Err("its factors hold NaN or infinities".to_owned())
        }
    }

    /// The sum of two products.
    ///
    /// # Errors
    /// If they are of different shapes.
    pub fn plus(self, other: &Product) -> Result<Product, String> {
        let differ = |_| "two of its changes have different shapes".to_owned();
        let join = |axis, one: ArrayView2<'_, f64>, two: ArrayView2<'_, f64>| {
            concatenate(Axis(axis), &[one, two]).map_err(differ)
        };
        Ok(Product {
            left: join(1, self.left.view(), other.left.view())?,
            right: join(0, self.right.view(), other.right.view())?,
        })
    }

    /// Outputs and inputs.
    #[must_use]
    pub fn shape(&self) -> (usize, usize) {
        (self.left.nrows(), self.right.ncols())
    }

    /// The number of columns of L.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.left.ncols()
    }

    /// The singular values, of which there are no more than the rank; the others are zero.
    ///
    /// # Errors
    /// [`NotConverged`].
    pub fn spectrum(&self) -> Result<Spectrum, NotConverged> {
        let (_, left) = dense().qr(self.left.view())?;
        let (_, right) = dense().qr(self.right.t())?;
        let values = dense().singular_values(left.dot(&right.t()).view())?;
        let (rows, cols) = self.shape();
        Ok(Spectrum::of_rank(rows, cols, values))
    }

    /// The singular value decomposition, with as many directions as there are, up to `top`.
    ///
    /// # Errors
    /// [`NotConverged`].
    pub fn directions(&self, top: usize) -> Result<Directions, NotConverged> {
        let (output, left) = dense().qr(self.left.view())?;
        let (input, right) = dense().qr(self.right.t())?;
        let svd = dense().svd(left.dot(&right.t()).view())?;
        let floor = NO_DIRECTION * svd.values.first().copied().unwrap_or(0.0);
        let known = svd.values.iter().take_while(|&&value| value > floor).count().min(top);
        let (rows, cols) = self.shape();
        Ok(Directions {
            output: output.dot(&svd.left.slice(ndarray::s![.., ..known])),
            input: input.dot(&svd.right.slice(ndarray::s![..known, ..]).t()),
            spectrum: Spectrum::of_rank(rows, cols, svd.values),
        })
    }
}

impl Directions {
    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.output.ncols()
    }

    /// Outputs and inputs.
    #[must_use]
    pub fn shape(&self) -> (usize, usize) {
        (self.output.nrows(), self.input.nrows())
    }
}

/// A tensor's elements as a matrix.
fn matrix(tensor: &Tensor, rows: usize, cols: usize) -> Result<Array2<f64>, String> {
    let Some(values) = tensor.to_f32() else {
        return Err(format!("`{}` is stored as {}", tensor.name, tensor.dtype));
    };
    let values = values.into_iter().map(f64::from).collect();
    Array2::from_shape_vec((rows, cols), values)
        .map_err(|_| format!("`{}` is not of {rows} × {cols} elements", tensor.name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(rows: usize, cols: usize, seed: u64) -> Array2<f64> {
        let mut state = seed;
        Array2::from_shape_fn((rows, cols), |_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
        })
    }

    #[test]
    fn the_decomposition_is_that_of_the_explicit_product() {
        for (m, n, rank) in [(30, 20, 5), (20, 30, 1), (6, 40, 12), (7, 7, 9)] {
            let product = Product { left: random(m, rank, 1), right: random(rank, n, 2) };
            let explicit = product.left.dot(&product.right);
            let dense = dense().svd(explicit.view()).unwrap();
            let found = product.directions(usize::MAX).unwrap();
            let k = rank.min(m).min(n);
            assert_eq!((found.count(), found.shape()), (k, (m, n)));
            assert_eq!(found.spectrum.values.len(), m.min(n));
            assert_eq!(product.spectrum().unwrap().values.len(), m.min(n));
            for (one, other) in found.spectrum.values.iter().zip(&dense.values) {
                assert!((one - other).abs() < 1e-12 * dense.values[0], "{one} {other}");
            }
            let values = ndarray::Array1::from(found.spectrum.values[..k].to_vec());
            let back = (&found.output * &values).dot(&found.input.t());
            assert!((back - &explicit).iter().all(|x| x.abs() < 1e-11));
            assert_eq!(product.directions(3).unwrap().count(), k.min(3));
        }
    }

    #[test]
    fn directions_that_are_not_there_are_not_counted() {
        let mut product = Product { left: random(10, 4, 1), right: random(4, 9, 2) };
        let twice = product.right.row(0).to_owned();
        product.right.row_mut(3).assign(&twice);
        assert_eq!(product.directions(usize::MAX).unwrap().count(), 3);
        product.left.fill(0.0);
        assert_eq!(product.directions(usize::MAX).unwrap().count(), 0);
        assert!(product.spectrum().unwrap().is_zero());
    }

    #[test]
    fn sums_of_products_are_side_by_side() {
        let one = Product { left: random(8, 2, 1), right: random(2, 6, 2) };
        let two = Product { left: random(8, 3, 3), right: random(3, 6, 4) };
        let explicit = one.left.dot(&one.right) + two.left.dot(&two.right);
        let sum = one.clone().plus(&two).unwrap();
        assert_eq!(sum.rank(), 5);
        assert!((sum.left.dot(&sum.right) - explicit).iter().all(|x| x.abs() < 1e-14));
        let other = Product { left: random(7, 3, 3), right: random(3, 6, 4) };
        assert!(one.plus(&other).is_err());
    }
}
