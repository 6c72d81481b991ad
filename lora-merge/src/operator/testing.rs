//! Random forms and bases, and what every operator must pass.

use lora_format::model::{
    Bounded, Butterfly, Cores, Decomposed, Form, Gain, GainAxis, GainStored, Grid, Hadamard,
    Kronecker, KroneckerSide, Layer, LowRank, Reflections, Rotation, Scaling, ScalingRule, Tiled,
    TiledRule, Tucker,
};
use lora_format::{Dtype, Tensor};

use super::{Features, Matrix, check, features, prepare};
use crate::kernels::Isa;
use crate::orientation::Orientation;

/// Numbers that look random and are the same every time (xorshift64*).
pub(super) struct Noise(u64);

impl Noise {
    pub(super) fn new(seed: u64) -> Noise {
        Noise(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    fn bits(&mut self) -> u32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 32) as u32
    }

    fn below(&mut self, bound: u32) -> u32 {
        ((u64::from(self.bits()) * u64::from(bound)) >> 32) as u32
    }

    /// In [−1, 1), never zero.
    pub(super) fn float(&mut self) -> f32 {
        ((self.bits() >> 8) as f32 + 0.5) / (1 << 23) as f32 - 1.0
    }
}

/// A tensor of these values.
pub(super) fn tensor_of(shape: &[usize], values: &[f32]) -> Tensor {
    let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    Tensor::new("tensor".to_owned(), Dtype::F32, shape.to_vec(), bytes).unwrap()
}

/// A tensor of this shape that nothing but the shape is asked of.
pub(super) fn unread(shape: Vec<usize>) -> Tensor {
    let mut tensor = tensor_of(&[0], &[]);
    tensor.shape = shape;
    tensor
}

/// A tensor of values in [−1, 1).
pub(super) fn tensor(noise: &mut Noise, shape: &[usize]) -> Tensor {
    tensor_of(shape, &floats(noise, shape.iter().product()))
}

pub(super) fn floats(noise: &mut Noise, count: usize) -> Vec<f32> {
    (0..count).map(|_| noise.float()).collect()
}

/// A tensor as a function of its flat index, in f64.
pub(super) fn at(tensor: &Tensor) -> impl Fn(usize) -> f64 + use<> {
    let values = tensor.to_f32().unwrap();
    move |index| f64::from(values[index])
}

pub(super) fn out_in(rows: usize, cols: usize) -> Matrix {
    Matrix { rows, cols, orientation: Orientation::OutIn, kernel: 1 }
}

pub(super) fn in_out(rows: usize, cols: usize) -> Matrix {
    Matrix { rows, cols, orientation: Orientation::InOut, kernel: 1 }
}

pub(super) fn convolution(out: usize, channels: usize, kernel: usize) -> Matrix {
    Matrix { rows: out, cols: channels * kernel, orientation: Orientation::OutIn, kernel }
}

/// `f(W) − W` of the whole matrix, after making sure that it is the same from every instruction
/// set, however the matrix is cut, and that weights multiply it.
pub(super) fn change(form: &Form, matrix: Matrix, base: &[f32]) -> Vec<f64> {
    let Matrix { rows, cols, .. } = matrix;
    check(form, matrix).unwrap();
    let read = |range: std::ops::Range<usize>, buffer: &mut [f32]| {
        buffer.copy_from_slice(&base[range.start * cols..range.end * cols]);
        Ok(())
    };
    let mut noise = Noise::new(rows as u64);
    let mut result: Option<Vec<f64>> = None;
    for isa in Isa::available() {
        let threads = 1 + noise.below(3) as usize;
        let operator = prepare(form, matrix, isa, threads, &read).unwrap().unwrap();
        for cut in [rows, 1, 3, 7] {
            let mut delta = vec![0.0; base.len()];
            let mut start = 0;
            while start < rows {
                let length = (1 + noise.below(cut as u32) as usize).min(rows - start);
                let length = if cut == rows { rows } else { length };
                let elements = start * cols..(start + length) * cols;
                let (base, delta) = (&base[elements.clone()], &mut delta[elements]);
                operator.add(isa, start..start + length, base, 1.0, delta);
                start += length;
            }
            let known = result.get_or_insert_with(|| delta.clone());
            assert!(same_bits(known, &delta), "{isa} in runs of up to {cut} rows");
        }
        let before: Vec<f64> = (0..base.len()).map(|_| f64::from(noise.float())).collect();
        let mut delta = before.clone();
        operator.add(isa, 0..rows, base, -0.75, &mut delta);
        let whole = result.as_deref().unwrap();
        for ((found, before), change) in delta.iter().zip(before).zip(whole) {
            assert!((found - (before - 0.75 * change)).abs() <= 1e-15 * (1.0 + change.abs()));
        }
    }
    result.unwrap()
}

fn same_bits(left: &[f64], right: &[f64]) -> bool {
    left.iter().map(|value| value.to_bits()).eq(right.iter().map(|value| value.to_bits()))
}

/// Compares a change with a formula for the element of the stored matrix at a row and a column.
pub(super) fn assert_change(
    form: &Form,
    matrix: Matrix,
    base: &[f32],
    tolerance: f64,
    formula: impl Fn(usize, usize) -> f64,
) {
    let found = change(form, matrix, base);
    for (index, found) in found.into_iter().enumerate() {
        let (row, col) = (index / matrix.cols, index % matrix.cols);
        let expected = formula(row, col);
        assert!(
            (found - expected).abs() <= tolerance * (1.0 + expected.abs()),
            "({row}, {col}) of {matrix:?}: {found}, not {expected}"
        );
    }
}

/// Asserts that the form is refused with a text that contains all of `words`.
pub(super) fn assert_refused(form: &Form, matrix: Matrix, words: &str) {
    let problem = check(form, matrix).unwrap_err();
    assert!(problem.contains(words), "{problem}");
}

/// A form of any kind, of tensors that fit each other and a matrix only by luck.
fn any(noise: &mut Noise) -> Form {
    // Mostly two lengths, so that some forms are sound.
    let length = |noise: &mut Noise| match noise.below(40) {
        rare @ 0..9 => rare as usize,
        often => [2, 4][often as usize % 2],
    };
    let any = |noise: &mut Noise, usual: usize| {
        if noise.below(100) == 0 {
            // A tensor without elements may have any other dimensions.
            let mut shape = [usize::MAX; 4];
            shape[noise.below(4) as usize % usual] = 0;
            return Tensor::new("huge".to_owned(), Dtype::F32, shape[..usual].to_vec(), Vec::new())
                .unwrap_or_else(|| tensor_of(&[0, usize::MAX], &[]));
        }
        let dimensions = if noise.below(16) == 0 { noise.below(6) as usize } else { usual };
        let shape: Vec<usize> = (0..dimensions).map(|_| length(noise)).collect();
        tensor(noise, &shape)
    };
    let rule = [ScalingRule::AlphaOverRank, ScalingRule::Direct][noise.below(2) as usize];
    let scaling = Scaling { alpha: 2.0, rule };
    let flag = noise.below(2) == 0;
    let kind = noise.below(16);
    let low_rank = |noise: &mut Noise, magnitude: bool| {
        let usual = if flag { 2 } else { 4 };
        let (a, b) = (any(noise, usual), any(noise, 2));
        let layer = if flag { Layer::Linear } else { Layer::Convolution };
        let rank_gain = (noise.below(4) == 0).then(|| any(noise, 1));
        let magnitude = magnitude.then(|| any(noise, 1));
        LowRank { a, b, scaling, layer, rank_gain, magnitude }
    };
    match kind {
        0 | 1 => return Form::LowRank(low_rank(noise, true)),
        2 => return Form::Proportional(low_rank(noise, false)),
        _ => {}
    }
    let cores = |noise: &mut Noise, core: bool| Cores {
        b: any(noise, 2),
        a: any(noise, 2),
        core: core.then(|| any(noise, 4)),
    };
    match kind {
        3 => {
            let (first, second) = (cores(noise, flag), cores(noise, flag));
            return Form::Hadamard(Hadamard { first, second, scaling, rank: 2 });
        }
        4 => {
            let (left, right) = (cores(noise, false), cores(noise, flag));
            let (left, right) = (KroneckerSide::Product(left), KroneckerSide::Product(right));
            return Form::Kronecker(Kronecker { left, right, scaling, rank: 2 });
        }
        _ => {}
    }
    match kind {
        5 => {
            let left = KroneckerSide::Full(any(noise, 2));
            let dimensions = 2 + noise.below(3) as usize;
            let right = KroneckerSide::Full(any(noise, dimensions));
            Form::Kronecker(Kronecker { left, right, scaling, rank: noise.below(3) as usize })
        }
        6 => {
            let axis = if flag { GainAxis::In } else { GainAxis::Out };
            let dimensions = 2 + noise.below(3) as usize;
            Form::Gain(Gain { gain: any(noise, dimensions), axis, stored: GainStored::Whole })
        }
        7 => {
            let block = noise.below(5) as usize;
            let shape = [1 + noise.below(2) as usize, block * block.saturating_sub(1) / 2];
            let sound = noise.below(4) > 0;
            Form::Rotation(Rotation {
                generators: if sound { tensor(noise, &shape) } else { any(noise, 2) },
                block,
                layer: if flag { Layer::Linear } else { Layer::Embedding },
                neumann_terms: (noise.below(2) == 0).then(|| noise.below(7) as usize),
                radius: (noise.below(2) == 0).then_some(0.5),
            })
        }
        8 if flag => Form::Tiled(Tiled { block: any(noise, 2), rule: TiledRule::Add }),
        8 => Form::Tiled(Tiled { block: any(noise, 3), rule: TiledRule::Bat }),
        9 => Form::Reflections(Reflections { vectors: any(noise, 2), orthogonal: flag }),
        10 => Form::Butterfly(Butterfly { generators: any(noise, 4), gain: any(noise, 2) }),
        11 => Form::Circulant(any(noise, 3)),
        12 => {
            let (a, b) = (any(noise, 2), any(noise, 2));
            let bound = if flag { tensor(noise, &[1]) } else { any(noise, 1) };
            Form::Bounded(Bounded { a, b, bound, norms: any(noise, 1) })
        }
        13 => {
            let (a, b) = (any(noise, 2), any(noise, 2));
            Form::Tucker(Tucker { a, b, core: any(noise, 4), scaling })
        }
        14 => {
            let axis = if flag { GainAxis::In } else { GainAxis::Out };
            let change = Box::new(Form::LowRank(low_rank(noise, false)));
            Form::Decomposed(Decomposed { change, magnitude: any(noise, 1), axis })
        }
        _ => Form::Grid(Grid { a: any(noise, 3), b: any(noise, 3), scaling, rank: 2 }),
    }
}

/// Whatever passes the check can be prepared and added, and the features are those of the matrix.
#[test]
fn what_the_check_lets_through_works() {
    let mut noise = Noise::new(1);
    let mut worked = std::collections::BTreeMap::new();
    for _ in 0..100_000 {
        let form = any(&mut noise);
        let Features { out, input } = features(&form);
        let mut length = |usual: Option<usize>| {
            let random = [1, 2, 4, 8, 16, 32, 3, 12][noise.below(8) as usize];
            // Not of what a check must refuse and could not be allocated.
            usual.filter(|&length| noise.below(8) > 0 && length < 100).unwrap_or(random)
        };
        let (out_length, in_length, kernel) = (length(out), length(input), length(None));
        let matrix = match noise.below(3) {
            0 => out_in(out_length, in_length),
            1 => in_out(in_length, out_length),
            _ => Matrix { kernel, ..out_in(out_length, in_length) },
        };
        if check(&form, matrix).is_err() {
            continue;
        }
        assert!(out.is_none_or(|out| out == matrix.out()), "{form:?} of {matrix:?}");
        assert!(input.is_none_or(|input| input == matrix.input()), "{form:?} of {matrix:?}");
        let base = floats(&mut noise, matrix.rows * matrix.cols);
        let read = |range: std::ops::Range<usize>, buffer: &mut [f32]| {
            buffer.copy_from_slice(&base[range.start * matrix.cols..range.end * matrix.cols]);
            Ok(())
        };
        let isa = Isa::detect();
        if let Some(operator) = prepare(&form, matrix, isa, 2, &read).ok().flatten() {
            let mut delta = vec![0.0; base.len()];
            operator.add(isa, 0..matrix.rows, &base, 1.0, &mut delta);
            *worked.entry(form.method()).or_insert(0) += 1;
        }
    }
    // The luck was good enough for all of them.
    assert_eq!(worked.len(), 13, "{worked:?}");
    assert!(worked.values().all(|&times| times >= 20), "{worked:?}");
}
