//! DoRA (Liu et al. 2024, arXiv 2402.09353; PEFT's `lora_magnitude_vector`):
//!
//! ```text
//! W' = m·V/‖V‖,   V = W + s·B·A
//! ```
//!
//! with one magnitude and one norm per output feature, over all its inputs: of a matrix stored as
//! (out, in) and of a convolution's (out, in·kernel) a norm per row; of one stored as (in, out),
//! and of an embedding, a norm per column. LyCORIS decomposes other changes than low-rank ones too,
//! and may have one magnitude and norm per input feature instead; of a convolution, the norm of an
//! input channel is over outputs and kernel. PEFT divides by the norm as it is, without an epsilon,
//! and so does this; a norm of zero is an error.
//!
//! # Norms
//!
//! V is W widened to f64 plus the kernels' f64 Δ. The squares are added in f64, each rounded before
//! it is added, in this order:
//!
//! * per row: column c belongs to lane c mod 8; each lane adds its columns in order from +0; then
//!   the lanes are added in order.
//! * per column: the rows form blocks of 1024, the last one perhaps shorter; each block adds its
//!   rows in order from +0; then the blocks are added in order; then, of an input channel, the
//!   columns of its kernel in order.
//!
//! The order depends on the matrix alone, so threads and tiles may be as they like.

use std::ops::Range;

use lora_format::Tensor;
use lora_format::model::{Decomposed, Form, GainAxis, LowRank};

use super::product::{self, Product};
use super::shapes::{self, Fits, count, decode};
use super::{Features, Matrix, Operator, ReadRows, parallel};
use crate::error::{Error, Result};
use crate::kernels::{Factors, Isa};
use crate::orientation::Orientation;

/// Accumulators of a row's norm.
const LANES: usize = 8;

/// Rows of a block of a column's norm.
const BLOCK: usize = 1024;

struct Dora {
    cols: usize,
    change: Change,
    axis: Axis,
    /// `m/‖V‖` of every feature.
    factor: Vec<f64>,
}

/// V − W.
pub(super) enum Change {
    /// Of a low-rank form.
    Product(Factors),
    /// Of another one.
    Operator(Box<dyn Operator>),
}

impl Change {
    pub(super) fn of_low_rank(form: &LowRank, matrix: Matrix) -> Change {
        Change::Product(Product::of_low_rank(form).pack(matrix.orientation))
    }

    /// Writes whole rows of it; `base` has the same rows of W.
    fn rows(&self, isa: Isa, rows: Range<usize>, base: &[f32], out: &mut [f64]) {
        match self {
            Change::Product(factors) => product::rows(factors, isa, rows, out),
            Change::Operator(operator) => {
                out.fill(0.0);
                operator.add_rows(isa, rows, base, 1.0, out);
            }
        }
    }

    /// Multiplications per element, roughly.
    fn work(&self) -> usize {
        match self {
            Change::Product(factors) => factors.rank(),
            // A guess: more threads than it is worth cost little.
            Change::Operator(_) => 32,
        }
    }
}

/// Which elements of the stored matrix belong to one feature.
#[derive(Clone, Copy)]
enum Axis {
    /// A row.
    Row,
    /// So many columns side by side.
    Columns(usize),
}

impl Axis {
    fn of(axis: GainAxis, matrix: Matrix) -> Axis {
        match (axis, matrix.orientation) {
            (GainAxis::Out, Orientation::OutIn) | (GainAxis::In, Orientation::InOut) => Axis::Row,
            (GainAxis::Out, Orientation::InOut) => Axis::Columns(1),
            (GainAxis::In, Orientation::OutIn) => Axis::Columns(matrix.kernel.max(1)),
        }
    }
}

pub(super) fn features(form: &LowRank) -> Features {
    let (out, input) = product::low_rank_features(form);
    Features { out: Some(out), input: Some(input) }
}

/// Of all low-rank forms, with and without magnitude.
pub(super) fn check(form: &LowRank, matrix: Matrix) -> Fits {
    product::check_low_rank(form)?;
    let (out, input) = product::low_rank_features(form);
    shapes::matrix(matrix, out, input)?;
    match &form.magnitude {
        Some(m) => shapes::tensor(m, format!("{out} values"), count(&m.shape) == out),
        None => Ok(()),
    }
}

/// Of a weight that is decomposed after a change, which was checked by itself.
pub(super) fn check_decomposed(form: &Decomposed, matrix: Matrix) -> Fits {
    let nested = match &*form.change {
        Form::LowRank(inner) => inner.magnitude.is_some(),
        Form::Tucker(_) | Form::Hadamard(_) | Form::Kronecker(_) => false,
        _ => true,
    };
    if nested {
        return Err(format!("expected a change that adds up, found {}", form.change.method()));
    }
    let features = match form.axis {
        GainAxis::Out => matrix.out(),
        GainAxis::In => matrix.input() / matrix.kernel.max(1),
    };
    let fits = count(&form.magnitude.shape) == features;
    shapes::tensor(&form.magnitude, format!("{features} values"), fits)
}

/// How W is read through.
pub(super) struct Reading<'a> {
    pub(super) isa: Isa,
    pub(super) threads: usize,
    pub(super) read: &'a ReadRows<'a>,
}

pub(super) fn prepare(
    change: Change,
    magnitude: &Tensor,
    axis: GainAxis,
    matrix: Matrix,
    reading: Reading<'_>,
) -> Result<Box<dyn Operator>> {
    let axis = Axis::of(axis, matrix);
    let values = Values { cols: matrix.cols, change: &change, reading };
    let squares = match axis {
        Axis::Row => values.row_squares(matrix.rows)?,
        Axis::Columns(1) => values.column_squares(matrix.rows)?,
        Axis::Columns(together) => {
            let squares = values.column_squares(matrix.rows)?;
            squares.chunks(together).map(|columns| columns.iter().sum()).collect()
        }
    };
    let factors = decode(magnitude).into_iter().zip(squares).enumerate();
    let factor = factors
        .map(|(feature, (m, square))| {
            let norm = square.sqrt();
            if norm == 0.0 {
                let tensor = magnitude.name.clone();
                return Err(Error::ZeroNorm { tensor, feature });
            }
            Ok(f64::from(m) / norm)
        })
        .collect::<Result<Vec<f64>>>()?;
    Ok(Box::new(Dora { cols: matrix.cols, change, axis, factor }))
}

/// V, to be read through once.
struct Values<'a> {
    cols: usize,
    change: &'a Change,
    reading: Reading<'a>,
}

impl Values<'_> {
    /// The sums of squares of V's rows.
    fn row_squares(&self, rows: usize) -> Result<Vec<f64>> {
        let mut squares = vec![0.0; rows];
        let threads = self.reading.threads;
        parallel::fill(&mut squares, 1, self.work(rows), threads, |first, squares| {
            self.visit(first..first + squares.len(), |row, values| {
                let mut lanes = [0.0; LANES];
                for eight in values.chunks(LANES) {
                    lanes.iter_mut().zip(eight).for_each(|(sum, v)| *sum += v * v);
                }
                squares[row - first] = lanes.iter().sum();
            })
        })?;
        Ok(squares)
    }

    /// The sums of squares of V's columns.
    fn column_squares(&self, rows: usize) -> Result<Vec<f64>> {
        let mut blocks = vec![0.0; rows.div_ceil(BLOCK) * self.cols];
        let threads = self.reading.threads;
        parallel::fill(&mut blocks, self.cols, self.work(rows), threads, |first, blocks| {
            let start = first * BLOCK;
            let end = rows.min(start + blocks.len() / self.cols * BLOCK);
            self.visit(start..end, |row, values| {
                let block = &mut blocks[(row - start) / BLOCK * self.cols..][..self.cols];
                block.iter_mut().zip(values).for_each(|(sum, v)| *sum += v * v);
            })
        })?;
        let mut squares = vec![0.0; self.cols];
        for block in blocks.chunks_exact(self.cols) {
            squares.iter_mut().zip(block).for_each(|(sum, part)| *sum += part);
        }
        Ok(squares)
    }

    /// Shows rows of V, in order.
    fn visit(&self, rows: Range<usize>, mut show: impl FnMut(usize, &[f64])) -> Result<()> {
        let (mut base, mut values) = (Vec::new(), Vec::new());
        for run in product::runs(rows, self.cols) {
            let elements = run.len() * self.cols;
            base.resize(elements, 0.0);
            values.resize(elements, 0.0);
            (self.reading.read)(run.clone(), &mut base)?;
            self.change.rows(self.reading.isa, run.clone(), &base, &mut values);
            values.iter_mut().zip(&base).for_each(|(delta, &w)| *delta += f64::from(w));
            run.zip(values.chunks_exact(self.cols)).for_each(|(row, values)| show(row, values));
        }
        Ok(())
    }

    /// Multiplications, roughly.
    fn work(&self, rows: usize) -> usize {
        rows.saturating_mul(self.cols).saturating_mul(self.change.work())
    }
}

impl Operator for Dora {
    fn add_rows(&self, isa: Isa, rows: Range<usize>, base: &[f32], weight: f64, delta: &mut [f64]) {
        let cols = self.cols;
        let start = rows.start;
        let add = |factor: f64, w: f32, product: f64, delta: &mut f64| {
            let w = f64::from(w);
            *delta += weight * (factor * (w + product) - w);
        };
        let mut lines = base.chunks_exact(cols).zip(delta.chunks_exact_mut(cols));
        let mut products = Vec::new();
        for run in product::runs(rows, cols) {
            products.resize(run.len() * cols, 0.0);
            let w = &base[(run.start - start) * cols..][..run.len() * cols];
            self.change.rows(isa, run.clone(), w, &mut products);
            for ((row, products), (base, delta)) in
                run.zip(products.chunks_exact(cols)).zip(&mut lines)
            {
                let elements = base.iter().zip(products).zip(delta);
                match self.axis {
                    Axis::Row => {
                        let factor = self.factor[row];
                        elements.for_each(|((&w, &p), delta)| add(factor, w, p, delta));
                    }
                    Axis::Columns(1) => elements
                        .zip(&self.factor)
                        .for_each(|(((&w, &p), delta), &factor)| add(factor, w, p, delta)),
                    Axis::Columns(together) => {
                        let factors =
                            self.factor.iter().flat_map(|f| std::iter::repeat_n(*f, together));
                        elements
                            .zip(factors)
                            .for_each(|(((&w, &p), delta), factor)| add(factor, w, p, delta));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use lora_format::model::{Cores, Hadamard, Layer, Scaling, ScalingRule};

    use super::super::testing::{self, Noise, assert_change, assert_refused, at, floats};
    use super::*;

    fn form(noise: &mut Noise, out: usize, input: usize, rank: usize) -> LowRank {
        let scaling = Scaling { alpha: 3.0, rule: ScalingRule::AlphaOverRank };
        let a = testing::tensor(noise, &[rank, input]);
        let b = testing::tensor(noise, &[out, rank]);
        let magnitude = Some(testing::tensor(noise, &[out]));
        LowRank { magnitude, ..LowRank::linear(a, b, scaling) }
    }

    /// V as a matrix of out × in, in f64, from a W of (out, in).
    fn values(form: &LowRank, w: impl Fn(usize, usize) -> f64) -> Vec<Vec<f64>> {
        let (a, b, rank) = (at(&form.a), at(&form.b), form.rank());
        let (out, input) = (form.out_features(), form.in_features());
        let e = form.rank_gain.as_ref().map(at);
        let delta = |o: usize, i: usize| {
            let term = |k| b(o * rank + k) * e.as_ref().map_or(1.0, |e| e(k)) * a(k * input + i);
            form.scale() * (0..rank).map(term).sum::<f64>()
        };
        (0..out).map(|o| (0..input).map(|i| w(o, i) + delta(o, i)).collect()).collect()
    }

    fn norm(row: &[f64]) -> f64 {
        row.iter().fold(0.0_f64, |norm, value| norm.hypot(*value))
    }

    #[test]
    fn outputs_get_their_magnitudes() {
        let mut noise = Noise::new(1);
        for (out, input, rank) in [(7, 13, 3), (50, 100, 8), (5, 1, 1), (1, 300, 70)] {
            let mut form = form(&mut noise, out, input, rank);
            let base = floats(&mut noise, out * input);
            let m = at(form.magnitude.as_ref().unwrap());

            let v = values(&form, |o, i| f64::from(base[o * input + i]));
            let wrapped = Form::LowRank(form.clone());
            assert_change(&wrapped, testing::out_in(out, input), &base, 2e-5, |o, i| {
                m(o) * v[o][i] / norm(&v[o]) - f64::from(base[o * input + i])
            });

            // The same of a stored transpose, with gains of the ranks.
            form.rank_gain = Some(testing::tensor(&mut noise, &[rank, 1]));
            let v = values(&form, |o, i| f64::from(base[i * out + o]));
            form.layer = Layer::Embedding;
            let wrapped = Form::LowRank(form);
            assert_change(&wrapped, testing::in_out(input, out), &base, 2e-5, |i, o| {
                m(o) * v[o][i] / norm(&v[o]) - f64::from(base[i * out + o])
            });
        }
    }

    #[test]
    fn inputs_get_their_magnitudes() {
        let mut noise = Noise::new(6);
        let (out, channels, kernel) = (7, 5, 4);
        for kernel in [1, kernel] {
            let input = channels * kernel;
            let mut change = form(&mut noise, out, input, 3);
            change.magnitude = None;
            let base = floats(&mut noise, out * input);
            let v = values(&change, |o, i| f64::from(base[o * input + i]));
            let magnitude = testing::tensor(&mut noise, &[channels]);
            let m = at(&magnitude);
            let norm = |channel: usize| {
                let values = v.iter().flat_map(|row| &row[channel * kernel..][..kernel]);
                values.fold(0.0_f64, |norm, value| norm.hypot(*value))
            };
            let change = Box::new(Form::LowRank(change));
            let form = Form::Decomposed(Decomposed { change, magnitude, axis: GainAxis::In });
            let matrix = match kernel {
                1 => testing::out_in(out, input),
                _ => testing::convolution(out, channels, kernel),
            };
            assert_change(&form, matrix, &base, 2e-5, |o, i| {
                let channel = i / kernel;
                m(channel) * v[o][i] / norm(channel) - f64::from(base[o * input + i])
            });
        }
    }

    #[test]
    fn other_changes_are_decomposed_too() {
        let mut noise = Noise::new(7);
        let (out, input, rank) = (6, 9, 2);
        let cores = |noise: &mut Noise| Cores {
            b: testing::tensor(noise, &[out, rank]),
            a: testing::tensor(noise, &[rank, input]),
            core: None,
        };
        let (first, second) = (cores(&mut noise), cores(&mut noise));
        let scaling = Scaling { alpha: 3.0, rule: ScalingRule::AlphaOverRank };
        let element = |cores: &Cores, o: usize, i: usize| -> f64 {
            let (b, a) = (at(&cores.b), at(&cores.a));
            (0..rank).map(|k| b(o * rank + k) * a(k * input + i)).sum()
        };
        let base = floats(&mut noise, out * input);
        let v = |o: usize, i: usize| {
            let delta = 1.5 * element(&first, o, i) * element(&second, o, i);
            f64::from(base[o * input + i]) + delta
        };
        let magnitude = testing::tensor(&mut noise, &[out]);
        let m = at(&magnitude);
        let hadamard = Hadamard { first: first.clone(), second: second.clone(), scaling, rank };
        let change = Box::new(Form::Hadamard(hadamard));
        let form = Form::Decomposed(Decomposed { change, magnitude, axis: GainAxis::Out });
        assert_change(&form, testing::out_in(out, input), &base, 2e-5, |o, i| {
            let norm = (0..input).fold(0.0_f64, |norm, i| norm.hypot(v(o, i)));
            m(o) * v(o, i) / norm - f64::from(base[o * input + i])
        });
    }

    #[test]
    fn norms_are_the_same_from_any_number_of_threads() {
        let mut noise = Noise::new(2);
        let (rows, cols) = (4 * BLOCK + 77, 40);
        let base = floats(&mut noise, rows * cols);
        let form = form(&mut noise, rows, cols, 2);
        let read = |range: Range<usize>, buffer: &mut [f32]| {
            buffer.copy_from_slice(&base[range.start * cols..range.end * cols]);
            Ok(())
        };
        let change = Change::of_low_rank(&form, testing::out_in(rows, cols));
        let reading = Reading { isa: Isa::Scalar, threads: 1, read: &read };
        let values = Values { cols, change: &change, reading };
        let mut rows_alone = vec![0.0; rows];
        let mut blocks = vec![vec![0.0_f64; cols]; rows.div_ceil(BLOCK)];
        let show = |row: usize, values: &[f64]| {
            let lane = |lane| values.iter().skip(lane).step_by(8).map(|v| v * v).sum::<f64>();
            rows_alone[row] = (0..8).map(lane).sum();
            let block = &mut blocks[row / BLOCK];
            block.iter_mut().zip(values).for_each(|(sum, v)| *sum += v * v);
        };
        values.visit(0..rows, show).unwrap();
        let columns_alone: Vec<f64> =
            (0..cols).map(|col| blocks.iter().map(|block| block[col]).sum()).collect();
        assert_eq!(values.row_squares(rows).unwrap(), rows_alone);
        assert_eq!(values.column_squares(rows).unwrap(), columns_alone);
    }

    #[test]
    fn a_feature_without_length_is_named() {
        let mut noise = Noise::new(3);
        let mut form = form(&mut noise, 3, 4, 1);
        form.b = testing::tensor_of(&[3, 1], &[1.0, 0.0, 1.0]);
        let magnitude = form.magnitude.clone().unwrap();
        for matrix in [testing::out_in(3, 4), testing::in_out(4, 3)] {
            let zero = |_: Range<usize>, buffer: &mut [f32]| {
                buffer.fill(0.0);
                Ok(())
            };
            let reading = Reading { isa: Isa::Scalar, threads: 1, read: &zero };
            let change = Change::of_low_rank(&form, matrix);
            let result = prepare(change, &magnitude, GainAxis::Out, matrix, reading);
            assert!(matches!(result.err(), Some(Error::ZeroNorm { feature: 1, .. })));
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut noise = Noise::new(4);
        let good = form(&mut noise, 4, 6, 2);
        let matrix = testing::out_in(4, 6);
        let refuse = |change: fn(&mut LowRank, &mut Noise), words: &str| {
            let mut form = good.clone();
            change(&mut form, &mut Noise::new(5));
            assert_refused(&Form::LowRank(form), matrix, words);
        };
        refuse(|form, noise| form.b = testing::tensor(noise, &[4, 3]), "expected out × 2");
        refuse(|form, noise| form.b = testing::tensor(noise, &[4, 2, 3]), "expected out × 2");
        refuse(|form, noise| form.b = testing::tensor(noise, &[5, 2]), "found 4 and 6");
        refuse(|form, noise| form.a = testing::tensor(noise, &[0, 6]), "expected rank × in");
        refuse(|form, noise| form.a = testing::tensor(noise, &[2]), "expected rank × in");
        refuse(
            |form, noise| form.magnitude = Some(testing::tensor(noise, &[6])),
            "expected 4 values, found [6]",
        );
        refuse(
            |form, noise| form.rank_gain = Some(testing::tensor(noise, &[3])),
            "expected 2 values, found [3]",
        );
        refuse(|form, _| form.scaling.alpha = f64::NAN, "expected a finite scale");
        refuse(|form, _| form.a.dtype = lora_format::Dtype::I32, "found I32");
    }
}
