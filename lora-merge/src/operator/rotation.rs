//! OFT (Qiu et al. 2023, arXiv 2306.07280; PEFT's `oft_R` and `oft_embedding_R`): `W' = W·Rᵀ`, of
//! an embedding stored as E, `E' = E·R`.
//!
//! R is block-diagonal, and its blocks divide the columns of the stored matrix, those of a
//! convolution being in·kernel. A block is made of a skew-symmetric Q, whose strict upper triangle
//! the file has:
//!
//! ```text
//! exactly          R = (I − Q)(I + Q)⁻¹
//! by n ≥ 4 terms   R = I + 2Q + 2Q² + … + 2Qⁿ⁻² + Qⁿ⁻¹      ≈ (I + Q)(I − Q)⁻¹
//! ```
//!
//! These are PEFT's, and each is the other's inverse. Its series of 3 terms is that of 4, of 2 terms
//! it is `I + 2Q`, of fewer `I`. Constrained OFT first scales Q down to the Frobenius norm
//! `ε/√blocks` if it exceeds that, blocks being those that are stored.

use std::ops::Range;

use lora_format::model::{Layer, Rotation};

use super::shapes::{self, Fits, count, decode, dim};
use super::{Features, Matrix, Operator, parallel};
use crate::error::Result;
use crate::kernels::Isa;
use crate::orientation::Orientation;

/// Terms beyond which a series is a mistake: each costs a product of all blocks, and further ones
/// are too small to matter or too large to make sense. PEFT's default is 5.
const MOST_TERMS: usize = 16;

/// Rows that are turned together, so that a block of R is fetched once for all of them.
const ROWS: usize = 16;

struct Oft {
    cols: usize,
    block: usize,
    /// For every block, or for all of them, the matrix that a row of the block is multiplied by.
    turns: Vec<f64>,
}

pub(super) fn features(form: &Rotation) -> Features {
    let blocks = dim(&form.generators, 0);
    // One row may turn every block.
    let turned = (blocks > 1).then(|| blocks.saturating_mul(form.block));
    match form.layer {
        Layer::Embedding => Features { out: turned, input: None },
        _ => Features { out: None, input: turned },
    }
}

pub(super) fn check(form: &Rotation, matrix: Matrix) -> Fits {
    let (generators, b) = (&form.generators, form.block);
    let triangle = b.checked_mul(b.saturating_sub(1)).map(|twice| twice / 2);
    let fits = generators.shape.len() == 2 && b > 0 && triangle == Some(dim(generators, 1));
    let expected = format!("blocks × {}", triangle.unwrap_or(usize::MAX));
    shapes::tensor(generators, expected, fits && dim(generators, 0) > 0)?;
    let expected = match form.layer {
        Layer::Embedding => Orientation::InOut,
        _ => Orientation::OutIn,
    };
    shapes::stored(matrix, expected)?;
    let blocks = dim(generators, 0);
    let whole = matrix.cols > 0 && matrix.cols.is_multiple_of(b);
    if !whole || (blocks != 1 && blocks != matrix.cols / b) {
        let found = matrix.cols;
        let of = if blocks == 1 { "blocks".to_owned() } else { format!("{blocks} blocks") };
        return Err(format!("expected {of} of {b} features, found {found} features"));
    }
    match form.neumann_terms {
        Some(terms) if terms > MOST_TERMS => {
            Err(format!("expected at most {MOST_TERMS} terms of the Neumann series, found {terms}"))
        }
        _ => shapes::work("its blocks", &[blocks, b, b, b, products(form)]),
    }
}

/// What a block costs, in products of two of its size: the exact one about as much as one.
fn products(form: &Rotation) -> usize {
    match form.neumann_terms {
        None => 1,
        Some(terms @ 0..3) => terms.min(1),
        Some(terms) => (terms - 2).max(2),
    }
}

pub(super) fn prepare(
    form: &Rotation,
    matrix: Matrix,
    threads: usize,
) -> Result<Box<dyn Operator>> {
    let b = form.block;
    let (stored, triangle) = (dim(&form.generators, 0), b * (b - 1) / 2);
    let generators = decode(&form.generators);
    let mut turns = vec![0.0; count(&[stored, b, b])];
    let work = turns.len().saturating_mul(b).saturating_mul(products(form));
    parallel::fill(&mut turns, b * b, work, threads, |first, turns| {
        for (number, turn) in (first..).zip(turns.chunks_exact_mut(b * b)) {
            // R is a function of Q, and so the R of Qᵀ = −Q is Rᵀ.
            let sign = if form.layer == Layer::Embedding { 1.0 } else { -1.0 };
            let mut q = skew(&generators[number * triangle..][..triangle], b, sign);
            if let Some(radius) = form.radius {
                project(&mut q, radius / (stored as f64).sqrt());
            }
            turn.copy_from_slice(&match form.neumann_terms {
                None => cayley(&q, b),
                Some(terms) => neumann(&q, b, terms),
            });
        }
        Ok(())
    })?;
    Ok(Box::new(Oft { cols: matrix.cols, block: b, turns }))
}

/// ±Q of its strict upper triangle.
fn skew(triangle: &[f32], b: usize, sign: f64) -> Vec<f64> {
    let mut q = vec![0.0; b * b];
    let places = (0..b).flat_map(|row| (row + 1..b).map(move |col| (row, col)));
    for ((row, col), &value) in places.zip(triangle) {
        q[row * b + col] = sign * f64::from(value);
        q[col * b + row] = -sign * f64::from(value);
    }
    q
}

/// Scales Q down to the ball of this radius.
fn project(q: &mut [f64], radius: f64) {
    let norm = q.iter().map(|value| value * value).sum::<f64>().sqrt();
    if norm > radius {
        q.iter_mut().for_each(|value| *value = radius * (*value / norm));
    }
}

/// PEFT's series of so many terms.
fn neumann(q: &[f64], b: usize, terms: usize) -> Vec<f64> {
    let mut r = identity(b);
    let add = |r: &mut [f64], factor: f64, power: &[f64]| {
        r.iter_mut().zip(power).for_each(|(sum, value)| *sum += factor * value);
    };
    if terms < 2 {
        return r;
    }
    add(&mut r, 2.0, q);
    if terms == 2 {
        return r;
    }
    let mut power = multiply(q, q, b);
    add(&mut r, 2.0, &power);
    for _ in 3..terms - 1 {
        power = multiply(&power, q, b);
        add(&mut r, 2.0, &power);
    }
    add(&mut r, 1.0, &multiply(&power, q, b));
    r
}

/// `R = (I − Q)(I + Q)⁻¹`, by elimination with partial pivoting of `(I + Q)·R = I − Q`, the two
/// being functions of Q and so in any order. The eigenvalues of Q are imaginary, so I + Q is never
/// singular.
pub(super) fn cayley(q: &[f64], b: usize) -> Vec<f64> {
    let mut left = q.to_vec();
    let mut right: Vec<f64> = q.iter().map(|value| -value).collect();
    for matrix in [&mut left, &mut right] {
        matrix.iter_mut().step_by(b + 1).for_each(|diagonal| *diagonal += 1.0);
    }
    for pivot in 0..b {
        let size = |row: usize| left[row * b + pivot].abs();
        let best = (pivot + 1..b).fold(pivot, |a, c| if size(c) > size(a) { c } else { a });
        for matrix in [&mut left, &mut right] {
            let (above, below) = matrix.split_at_mut((pivot + 1) * b);
            if best > pivot {
                above[pivot * b..].swap_with_slice(&mut below[(best - pivot - 1) * b..][..b]);
            }
        }
        for row in pivot + 1..b {
            let factor = left[row * b + pivot] / left[pivot * b + pivot];
            for (matrix, from) in [(&mut left, pivot), (&mut right, 0)] {
                let (above, below) = matrix.split_at_mut(row * b);
                let source = &above[pivot * b..][from..b];
                let target = &mut below[from..b];
                target.iter_mut().zip(source).for_each(|(value, pivot)| *value -= factor * pivot);
            }
        }
    }
    for row in (0..b).rev() {
        let (above, below) = right.split_at_mut((row + 1) * b);
        let target = &mut above[row * b..];
        for (known, solved) in (row + 1..b).zip(below.chunks_exact(b)) {
            let factor = left[row * b + known];
            target.iter_mut().zip(solved).for_each(|(value, solved)| *value -= factor * solved);
        }
        let diagonal = left[row * b + row];
        target.iter_mut().for_each(|value| *value /= diagonal);
    }
    right
}

fn identity(b: usize) -> Vec<f64> {
    (0..b * b).map(|at| if at % (b + 1) == 0 { 1.0 } else { 0.0 }).collect()
}

/// The product of two square matrices, every element added in order.
fn multiply(left: &[f64], right: &[f64], b: usize) -> Vec<f64> {
    let mut result = vec![0.0; b * b];
    for (left, result) in left.chunks(ROWS * b).zip(result.chunks_mut(ROWS * b)) {
        for (k, right) in right.chunks_exact(b).enumerate() {
            for (left, result) in left.chunks_exact(b).zip(result.chunks_exact_mut(b)) {
                let factor = left[k];
                result.iter_mut().zip(right).for_each(|(sum, value)| *sum += factor * value);
            }
        }
    }
    result
}

/// `turned = row·turn`, added in the order of the row.
pub(super) fn turn_row(row: &[f64], turn: &[f64], turned: &mut [f64]) {
    turned.fill(0.0);
    for (w, turn) in row.iter().zip(turn.chunks_exact(turned.len())) {
        turned.iter_mut().zip(turn).for_each(|(sum, turn)| *sum += w * turn);
    }
}

impl Operator for Oft {
    fn add_rows(&self, _: Isa, _: Range<usize>, base: &[f32], weight: f64, delta: &mut [f64]) {
        let (cols, b) = (self.cols, self.block);
        let mut turned = vec![0.0; ROWS * b];
        let groups = base.chunks(ROWS * cols).zip(delta.chunks_mut(ROWS * cols));
        for (base, delta) in groups {
            let mut turns = self.turns.chunks_exact(b * b).cycle();
            for first in (0..cols).step_by(b) {
                let Some(turn) = turns.next() else { return };
                turned.fill(0.0);
                for (k, turn) in turn.chunks_exact(b).enumerate() {
                    let rows = base.chunks_exact(cols).zip(turned.chunks_exact_mut(b));
                    for (base, turned) in rows {
                        let w = f64::from(base[first + k]);
                        turned.iter_mut().zip(turn).for_each(|(sum, turn)| *sum += w * turn);
                    }
                }
                let rows = base.chunks_exact(cols).zip(delta.chunks_exact_mut(cols));
                for ((base, delta), turned) in rows.zip(turned.chunks_exact(b)) {
                    let elements = base[first..][..b].iter().zip(&mut delta[first..][..b]);
                    for ((&w, delta), turned) in elements.zip(turned) {
                        *delta += weight * (turned - f64::from(w));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use lora_format::model::Form;

    use super::super::testing::{self, Noise, assert_change, assert_refused, floats};
    use super::*;

    fn form(noise: &mut Noise, blocks: usize, block: usize, size: f32) -> Rotation {
        let shape = [blocks, block * (block - 1) / 2];
        let values: Vec<f32> =
            floats(noise, count(&shape)).into_iter().map(|value| value * size).collect();
        Rotation {
            generators: testing::tensor_of(&shape, &values),
            block,
            layer: Layer::Linear,
            neumann_terms: None,
            radius: None,
        }
    }

    /// Q of a block, element by element.
    fn generator(form: &Rotation, block: usize) -> Vec<Vec<f64>> {
        let b = form.block;
        let values = decode(&form.generators);
        let mut q = vec![vec![0.0; b]; b];
        let first = block % form.generators.shape[0] * (b * (b - 1) / 2);
        let places = (0..b).flat_map(|row| (row + 1..b).map(move |col| (row, col)));
        for ((row, col), &value) in places.zip(&values[first..]) {
            q[row][col] = f64::from(value);
            q[col][row] = -q[row][col];
        }
        q
    }

    fn times(left: &[Vec<f64>], right: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let row = |row: &Vec<f64>| {
            let element = |col| row.iter().zip(right).map(|(x, other)| x * other[col]).sum();
            (0..right.len()).map(element).collect()
        };
        left.iter().map(row).collect()
    }

    fn plus(factor: f64, q: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let element = |r: usize, c: usize| f64::from(r == c) + factor * q[r][c];
        (0..q.len()).map(|r| (0..q.len()).map(|c| element(r, c)).collect()).collect()
    }

    /// R by `R·(I + Q) = I − Q`, that is, checked and not solved.
    #[test]
    fn cayley_solves_its_equation() {
        let mut noise = Noise::new(1);
        for (b, size) in [(1, 1.0), (2, 5.0), (3, 1.0), (8, 1.0), (33, 0.1), (20, 100.0)] {
            let form = form(&mut noise, 1, b, size);
            let rows = generator(&form, 0);
            let r = cayley(&skew(&decode(&form.generators), b, 1.0), b);
            let r: Vec<Vec<f64>> = r.chunks(b).map(<[f64]>::to_vec).collect();
            let (found, expected) = (times(&r, &plus(1.0, &rows)), plus(-1.0, &rows));
            for (found, expected) in found.iter().flatten().zip(expected.iter().flatten()) {
                assert!((found - expected).abs() < 1e-10 * f64::from(1.0 + size * size));
            }
            // A rotation keeps lengths.
            for row in &r {
                let length: f64 = row.iter().map(|value| value * value).sum();
                assert!((length - 1.0).abs() < 1e-10);
            }
        }
    }

    #[test]
    fn the_series_has_the_terms_that_peft_gives_it() {
        let mut noise = Noise::new(2);
        let b = 4;
        let form = form(&mut noise, 1, b, 0.5);
        let (q, flat) = (generator(&form, 0), skew(&decode(&form.generators), b, 1.0));
        let series = |factors: &[f64]| -> Vec<f64> {
            let mut sum = vec![0.0; b * b];
            let mut power = plus(0.0, &q);
            for factor in factors {
                let elements = power.iter().flatten();
                sum.iter_mut().zip(elements).for_each(|(sum, value)| *sum += factor * value);
                power = times(&power, &q);
            }
            sum
        };
        for (terms, factors) in [
            (0, &[1.0][..]),
            (1, &[1.0]),
            (2, &[1.0, 2.0]),
            (3, &[1.0, 2.0, 2.0, 1.0]),
            (4, &[1.0, 2.0, 2.0, 1.0]),
            (5, &[1.0, 2.0, 2.0, 2.0, 1.0]),
            (6, &[1.0, 2.0, 2.0, 2.0, 2.0, 1.0]),
        ] {
            for (found, expected) in neumann(&flat, b, terms).iter().zip(series(factors)) {
                assert!((found - expected).abs() < 1e-12, "{terms} terms");
            }
        }
    }

    #[test]
    fn blocks_of_columns_are_turned() {
        let mut noise = Noise::new(3);
        let (rows, blocks, b) = (37, 3, 4);
        let base = floats(&mut noise, rows * blocks * b);
        let w = |r: usize, c: usize| f64::from(base[r * blocks * b + c]);
        for (stored, terms, radius) in [
            (blocks, None, None),
            (1, Some(5), None),
            (blocks, Some(7), Some(0.3)),
            (1, None, Some(0.2)),
        ] {
            let mut form =
                Rotation { neumann_terms: terms, radius, ..form(&mut noise, stored, b, 0.3) };
            let turn: Vec<Vec<f64>> = (0..blocks)
                .map(|block| {
                    let mut q = skew(&decode(&form.generators)[block % stored * 6..][..6], b, 1.0);
                    if let Some(radius) = radius {
                        let norm = q.iter().map(|q| q * q).sum::<f64>().sqrt();
                        let most = radius / f64::from(stored as u32).sqrt();
                        let factor = (most / norm).min(1.0);
                        q.iter_mut().for_each(|q| *q *= factor);
                    }
                    terms.map_or_else(|| cayley(&q, b), |terms| neumann(&q, b, terms))
                })
                .collect();
            let matrix = testing::out_in(rows, blocks * b);
            let r = |block: usize, row: usize, col: usize| turn[block][row * b + col];
            assert_change(&Form::Rotation(form.clone()), matrix, &base, 1e-12, |row, c| {
                let block = c / b;
                let term = |k| w(row, block * b + k) * r(block, c % b, k);
                (0..b).map(term).sum::<f64>() - w(row, c)
            });
            form.layer = Layer::Embedding;
            let matrix = testing::in_out(rows, blocks * b);
            assert_change(&Form::Rotation(form.clone()), matrix, &base, 1e-12, |row, c| {
                let block = c / b;
                let term = |k| w(row, block * b + k) * r(block, k, c % b);
                (0..b).map(term).sum::<f64>() - w(row, c)
            });
        }
    }

    #[test]
    fn no_rotation_changes_nothing() {
        let mut noise = Noise::new(4);
        let base = floats(&mut noise, 24);
        for (block, neumann_terms) in [(4, None), (4, Some(5)), (1, None), (1, Some(9))] {
            let form = Rotation { neumann_terms, ..form(&mut noise, 1, block, 0.0) };
            let change = testing::change(&Form::Rotation(form), testing::out_in(3, 8), &base);
            assert_eq!(change, [0.0; 24]);
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut noise = Noise::new(5);
        let good = form(&mut noise, 2, 4, 0.1);
        let refuse = |form: Rotation, matrix, words| {
            assert_refused(&Form::Rotation(form), matrix, words);
        };
        refuse(good.clone(), testing::out_in(3, 12), "expected 2 blocks of 4 features");
        refuse(good.clone(), testing::in_out(3, 8), "expected a matrix stored as out×in");
        refuse(Rotation { block: 5, ..good.clone() }, testing::out_in(3, 10), "blocks × 10");
        let block = usize::MAX;
        refuse(Rotation { block, ..good.clone() }, testing::out_in(3, 8), "found [2, 6]");
        refuse(Rotation { block: 0, ..good.clone() }, testing::out_in(3, 8), "found [2, 6]");
        let series = |terms| Rotation { neumann_terms: Some(terms), ..good.clone() };
        for terms in [MOST_TERMS + 1, usize::MAX] {
            refuse(series(terms), testing::out_in(3, 8), "at most 16 terms");
        }
        assert_eq!(check(&series(MOST_TERMS), testing::out_in(3, 8)), Ok(()));
        let shared = form(&mut noise, 1, 4, 0.1);
        refuse(shared, testing::out_in(3, 6), "expected blocks of 4 features, found 6");
    }

    /// The blocks cost far more than the file has elements; what is in use passes.
    #[test]
    fn the_cost_of_the_blocks_is_bounded() {
        let check = |blocks: usize, block: usize, neumann_terms| {
            let generators = testing::unread(vec![blocks, block * (block - 1) / 2]);
            let layer = Layer::Linear;
            let form = Rotation { generators, block, layer, neumann_terms, radius: None };
            check(&form, testing::out_in(3, blocks * block))
        };
        for (blocks, block, terms) in [
            (400, 256, Some(5)),
            (100, 256, Some(16)),
            (1000, 256, None),
            (10, 1024, Some(5)),
            (28, 1024, None),
            (57_344, 32, Some(5)),
            (2, 1023, Some(16)),
        ] {
            assert_eq!(check(blocks, block, terms), Ok(()), "{blocks} blocks of {block}");
        }
        let words = "expected at most 34359738368 multiplications for its blocks, \
                     found 8·2048·2048·2048·3";
        assert_eq!(check(8, 2048, Some(5)).unwrap_err(), words);
        assert!(check(1, 4096, None).unwrap_err().ends_with("1·4096·4096·4096·1"));
        assert!(check(3, 1023, Some(256)).unwrap_err().contains("at most 16 terms"));
    }
}
