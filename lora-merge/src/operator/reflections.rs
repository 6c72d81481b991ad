//! HRA (Yuan et al. 2024, arXiv 2405.17484; PEFT's `hra_u`): `W' = W·H₁·H₂·…·Hᵣ` with a Householder
//! reflection `H = I − 2·u·uᵀ/‖u‖²` for every column u of the file's in × r.
//!
//! With `apply_GS` the columns are orthogonalised first, each against those before it, one after
//! the other (the modified Gram-Schmidt process); PEFT then writes the product as `I − 2·U·Uᵀ`,
//! which for orthonormal columns it is.
//!
//! A column of zeros, which PEFT divides by, is an error, and so is one that nothing is left of:
//! its direction would be rounding noise. PEFT's own initialisation repeats every column, so an
//! adapter that was orthogonalised and hardly trained is of that kind.

use std::ops::Range;

use lora_format::limits;
use lora_format::model::Reflections;

use super::shapes::{self, Fits, decode, dim};
use super::{Features, Matrix, Operator};
use crate::error::{Error, Result};
use crate::kernels::Isa;
use crate::orientation::Orientation;

/// What must be left of a column, relative to what it was: PEFT computes in f32.
const LEFT: f64 = 1e-6;

struct Hra {
    cols: usize,
    /// Unit vectors, one after the other.
    vectors: Vec<f64>,
}

pub(super) fn features(form: &Reflections) -> Features {
    Features { out: None, input: Some(dim(&form.vectors, 0)) }
}

pub(super) fn check(form: &Reflections, matrix: Matrix) -> Fits {
    let (vectors, input) = (&form.vectors, matrix.input());
    let rank = dim(vectors, 1);
    let fits = vectors.shape.len() == 2 && (1..=limits::RANK).contains(&rank) && input > 0;
    shapes::tensor(vectors, format!("{input} × rank"), fits && dim(vectors, 0) == input)?;
    if form.orthogonal {
        // Every column against those before it, twice its length each.
        shapes::work("orthogonal columns", &[input, rank, rank])?;
    }
    shapes::stored(matrix, Orientation::OutIn)
}

pub(super) fn prepare(form: &Reflections, matrix: Matrix) -> Result<Box<dyn Operator>> {
    let (cols, rank) = (matrix.cols, dim(&form.vectors, 1));
    let stored = decode(&form.vectors);
    let mut vectors: Vec<f64> = Vec::with_capacity(stored.len());
    for column in 0..rank {
        let elements = stored.iter().skip(column).step_by(rank);
        let mut vector: Vec<f64> = elements.map(|&value| f64::from(value)).collect();
        let before = dot(&vector, &vector).sqrt();
        if form.orthogonal {
            for known in vectors.chunks_exact(cols) {
                let along = dot(known, &vector);
                subtract(&mut vector, along, known);
            }
        }
        let norm = dot(&vector, &vector).sqrt();
        if norm == 0.0 || norm < LEFT * before {
            return Err(Error::NoDirection { tensor: form.vectors.name.clone(), column });
        }
        vectors.extend(vector.iter().map(|value| value / norm));
    }
    Ok(Box::new(Hra { cols, vectors }))
}

/// The inner product, added in order.
fn dot(left: &[f64], right: &[f64]) -> f64 {
    left.iter().zip(right).map(|(left, right)| left * right).sum()
}

/// `vector −= factor·other`.
fn subtract(vector: &mut [f64], factor: f64, other: &[f64]) {
    vector.iter_mut().zip(other).for_each(|(value, other)| *value -= factor * other);
}

impl Operator for Hra {
    fn add_rows(&self, _: Isa, _: Range<usize>, base: &[f32], weight: f64, delta: &mut [f64]) {
        let mut row = Vec::with_capacity(self.cols);
        let lines = base.chunks_exact(self.cols).zip(delta.chunks_exact_mut(self.cols));
        for (base, delta) in lines {
            row.clear();
            row.extend(base.iter().map(|&w| f64::from(w)));
            for vector in self.vectors.chunks_exact(self.cols) {
                let factor = 2.0 * dot(&row, vector);
                subtract(&mut row, factor, vector);
            }
            for ((reflected, &w), delta) in row.iter().zip(base).zip(delta) {
                *delta += weight * (reflected - f64::from(w));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use lora_format::model::Form;

    use super::super::testing::{self, Noise, assert_change, assert_refused, at, floats};
    use super::*;

    /// H of whole matrices: the product of all reflections.
    fn matrix(form: &Reflections) -> Vec<Vec<f64>> {
        let [n, rank] = form.vectors.shape[..] else { panic!("two dimensions") };
        let u = at(&form.vectors);
        let identity = |r: usize, c: usize| f64::from(r == c);
        let mut h: Vec<Vec<f64>> =
            (0..n).map(|r| (0..n).map(|c| identity(r, c)).collect()).collect();
        let mut done: Vec<Vec<f64>> = Vec::new();
        for k in 0..rank {
            let mut v: Vec<f64> = (0..n).map(|i| u(i * rank + k)).collect();
            for known in done.iter().filter(|_| form.orthogonal) {
                let along: f64 = known.iter().zip(&v).map(|(x, y)| x * y).sum();
                v = v.iter().zip(known).map(|(v, known)| v - along * known).collect();
            }
            let length = v.iter().fold(0.0_f64, |norm, value| norm.hypot(*value));
            v.iter_mut().for_each(|value| *value /= length);
            h = h
                .iter()
                .map(|row| {
                    let along: f64 = row.iter().zip(&v).map(|(x, y)| x * y).sum();
                    row.iter().zip(&v).map(|(x, v)| x - 2.0 * along * v).collect()
                })
                .collect();
            done.push(v);
        }
        h
    }

    #[test]
    fn rows_are_reflected() {
        let mut noise = Noise::new(1);
        let (out, input, rank) = (11, 20, 4);
        let base = floats(&mut noise, out * input);
        for orthogonal in [false, true] {
            let vectors = testing::tensor(&mut noise, &[input, rank]);
            let form = Reflections { vectors, orthogonal };
            let h = matrix(&form);
            let form = Form::Reflections(form);
            assert_change(&form, testing::out_in(out, input), &base, 1e-13, |r, c| {
                let row = &base[r * input..][..input];
                let sum: f64 = row.iter().zip(&h).map(|(&w, h)| f64::from(w) * h[c]).sum();
                sum - f64::from(row[c])
            });
        }
    }

    #[test]
    fn what_has_no_direction_is_an_error() {
        let matrix = testing::out_in(3, 2);
        let twice = testing::tensor_of(&[2, 2], &[1.0, 1.0, 3.0, 3.0]);
        let zero = testing::tensor_of(&[2, 2], &[1.0, 0.0, 3.0, 0.0]);
        let prepare = |vectors: &lora_format::Tensor, orthogonal| {
            prepare(&Reflections { vectors: vectors.clone(), orthogonal }, matrix)
        };
        assert!(prepare(&twice, false).is_ok());
        let refused = [prepare(&twice, true), prepare(&zero, false), prepare(&zero, true)];
        for result in refused {
            assert!(matches!(result.err(), Some(Error::NoDirection { column: 1, .. })));
        }
    }

    #[test]
    fn the_cost_of_orthogonal_columns_is_bounded() {
        let check = |input: usize, rank: usize, orthogonal| {
            let vectors = testing::unread(vec![input, rank]);
            check(&Reflections { vectors, orthogonal }, testing::out_in(3, input))
        };
        assert_eq!(check(28_672, 1024, true), Ok(()));
        assert_eq!(check(4096, 4096, false), Ok(()));
        let words = "multiplications for orthogonal columns, found 4096·4096·4096";
        assert!(check(4096, 4096, true).unwrap_err().ends_with(words));
        assert!(check(1, 65_537, false).unwrap_err().contains("expected 1 × rank"));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let vectors = testing::tensor_of(&[4, 1], &[1.0; 4]);
        let form = Form::Reflections(Reflections { vectors, orthogonal: false });
        assert_refused(&form, testing::out_in(3, 5), "expected 5 × rank, found [4, 1]");
        assert_refused(&form, testing::in_out(4, 3), "stored as out×in, found in×out");
    }
}
