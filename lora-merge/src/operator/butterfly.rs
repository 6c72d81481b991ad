//! BOFT (Liu et al. 2023, arXiv 2311.06243; PEFT's `boft_R` and `boft_s`):
//!
//! ```text
//! W' = s ⊙ (W·Mᵀ),   M = Mₘ₋₁·…·M₁·M₀,   Mᵢ = Pᵢ·diag(Rᵢ₁, Rᵢ₂, …)·Pᵢᵀ
//! R  = (I − Q)(I + Q)⁻¹,   Q = (G − Gᵀ)/2
//! ```
//!
//! with one gain s per output feature, which the bias has not. The file has every G in full. The
//! blocks divide in, or a convolution's in·kernel.
//!
//! Pᵢᵀ interleaves: of every 2ⁱ·b inputs it takes, in turn, b/2 of the first half and b/2 of the
//! second. P₀ is the identity; so a single factor, all that PEFT trains without its CUDA extension,
//! is a plain block-diagonal rotation.

use std::ops::Range;

use lora_format::model::Butterfly;

use super::rotation::{cayley, turn_row};
use super::shapes::{self, Fits, count, decode, dim};
use super::{Features, Matrix, Operator, parallel};
use crate::error::Result;
use crate::kernels::Isa;
use crate::orientation::Orientation;

struct Boft {
    cols: usize,
    block: usize,
    /// Rᵀ of all blocks, factor by factor.
    turns: Vec<f64>,
    gain: Vec<f64>,
}

pub(super) fn features(form: &Butterfly) -> Features {
    let input = dim(&form.generators, 1).saturating_mul(dim(&form.generators, 2));
    Features { out: Some(count(&form.gain.shape)), input: Some(input) }
}

pub(super) fn check(form: &Butterfly, matrix: Matrix) -> Fits {
    let (generators, out, input) = (&form.generators, matrix.out(), matrix.input());
    let [factors, blocks, b] = [0, 1, 2].map(|index| dim(generators, index));
    let square = generators.shape.len() == 4 && dim(generators, 3) == b;
    // The last factor shuffles 2^(factors − 1) blocks in parts of b/2.
    let period = u32::try_from(factors).ok().and_then(|m| 1_usize.checked_shl(m.checked_sub(1)?));
    let shuffles = match period {
        Some(1) => true,
        Some(period) => b % 2 == 0 && blocks % period == 0,
        None => false,
    };
    let whole = b > 0 && blocks > 0 && blocks.checked_mul(b) == Some(input);
    let expected = format!("factors × blocks × b × b of {input} inputs");
    shapes::tensor(generators, expected, square && shuffles && whole)?;
    shapes::work("its blocks", &[factors, blocks, b, b, b])?;
    let fits = out > 0 && count(&form.gain.shape) == out;
    shapes::tensor(&form.gain, format!("{out} values"), fits)?;
    shapes::stored(matrix, Orientation::OutIn)
}

pub(super) fn prepare(
    form: &Butterfly,
    matrix: Matrix,
    threads: usize,
) -> Result<Box<dyn Operator>> {
    let (cols, block) = (matrix.cols, dim(&form.generators, 2));
    let area = block * block;
    let generators = decode(&form.generators);
    let mut turns = vec![0.0; generators.len()];
    let work = turns.len().saturating_mul(block);
    parallel::fill(&mut turns, area, work, threads, |first, turns| {
        let blocks = generators[first * area..].chunks_exact(area);
        for (turn, g) in turns.chunks_exact_mut(area).zip(blocks) {
            // −Q, whose R is the transpose of Q's.
            let mirrored = |at: usize| at % block * block + at / block;
            let skew = |at| 0.5 * (f64::from(g[mirrored(at)]) - f64::from(g[at]));
            let q: Vec<f64> = (0..area).map(skew).collect();
            turn.copy_from_slice(&cayley(&q, block));
        }
        Ok(())
    })?;
    let gain = decode(&form.gain).into_iter().map(f64::from).collect();
    Ok(Box::new(Boft { cols, block, turns, gain }))
}

/// The input in place `at` of those that a factor turns, `Pᵀ·x`; its output goes back there.
fn interleaved(at: usize, factor: usize, block: usize) -> usize {
    if factor == 0 {
        return at;
    }
    let (parts, length) = (2 << factor, block / 2);
    let (period, part, within) = (at / length / parts, at / length % parts, at % length);
    let from = part / 2 + part % 2 * (parts / 2);
    (period * parts + from) * length + within
}

impl Operator for Boft {
    fn add_rows(&self, _: Isa, rows: Range<usize>, base: &[f32], weight: f64, delta: &mut [f64]) {
        let (cols, block) = (self.cols, self.block);
        let mut row = vec![0.0; cols];
        let mut source = vec![0.0; block];
        let mut turned = vec![0.0; block];
        let lines = base.chunks_exact(cols).zip(delta.chunks_exact_mut(cols));
        for (number, (base, delta)) in rows.zip(lines) {
            row.iter_mut().zip(base).for_each(|(slot, &w)| *slot = f64::from(w));
            for (factor, turns) in self.turns.chunks_exact(cols * block).enumerate() {
                for (first, turn) in (0..).step_by(block).zip(turns.chunks_exact(block * block)) {
                    for (at, slot) in (first..).zip(&mut source) {
                        *slot = row[interleaved(at, factor, block)];
                    }
                    turn_row(&source, turn, &mut turned);
                    for (at, &value) in (first..).zip(&turned) {
                        row[interleaved(at, factor, block)] = value;
                    }
                }
            }
            let gain = self.gain[number];
            for ((turned, &w), delta) in row.iter().zip(base).zip(delta) {
                *delta += weight * (gain * turned - f64::from(w));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use lora_format::model::Form;

    use super::super::testing::{self, Noise, assert_change, assert_refused, at, floats};
    use super::*;

    /// The order of PEFT's `block_butterfly_perm` for n inputs, as it is written there.
    fn order(n: usize, count: usize, half: usize) -> Vec<usize> {
        let size = n / count;
        let step = size / half;
        let parts = (0..step).step_by(2).chain((1..step).step_by(2));
        let within: Vec<usize> = parts.flat_map(|part| part * half..(part + 1) * half).collect();
        (0..n).step_by(size).flat_map(|first| within.iter().map(move |at| first + at)).collect()
    }

    #[test]
    fn factors_turn_shuffled_blocks() {
        let mut noise = Noise::new(1);
        for (factors, blocks, b) in [(1, 3, 5), (1, 4, 2), (2, 4, 6), (3, 4, 2), (3, 8, 4)] {
            let (out, n) = (7, blocks * b);
            let generators = testing::tensor(&mut noise, &[factors, blocks, b, b]);
            let gain = testing::tensor(&mut noise, &[out, 1]);
            let (g, s) = (at(&generators), at(&gain));
            let base = floats(&mut noise, out * n);
            let turned: Vec<Vec<f64>> = base
                .chunks(n)
                .map(|row| {
                    let mut x: Vec<f64> = row.iter().map(|&w| f64::from(w)).collect();
                    for factor in 0..factors {
                        let order = match factors {
                            1 => (0..n).collect(),
                            _ => order(n, blocks >> factor, b / 2),
                        };
                        // P has a 1 at (i, order[i]): y = Pᵀ·x, then D·y, then P·D·y.
                        let mut y = vec![0.0; n];
                        order.iter().zip(&x).for_each(|(&to, &value)| y[to] = value);
                        let mut z = vec![0.0; n];
                        for block in 0..blocks {
                            let first = (factor * blocks + block) * b * b;
                            let element = |r: usize, c: usize| g(first + r * b + c);
                            let q: Vec<f64> = (0..b * b)
                                .map(|at| (at / b, at % b))
                                .map(|(r, c)| (element(r, c) - element(c, r)) / 2.0)
                                .collect();
                            let rotation = cayley(&q, b);
                            for (r, row) in rotation.chunks(b).enumerate() {
                                let inputs = &y[block * b..][..b];
                                z[block * b + r] = row.iter().zip(inputs).map(|(r, y)| r * y).sum();
                            }
                        }
                        x = order.iter().map(|&from| z[from]).collect();
                    }
                    x
                })
                .collect();
            let form = Form::Butterfly(Butterfly { generators, gain });
            assert_change(&form, testing::out_in(out, n), &base, 1e-12, |r, c| {
                s(r) * turned[r][c] - f64::from(base[r * n + c])
            });
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut noise = Noise::new(2);
        let mut refuse = |shape: &[usize], matrix, words| {
            let generators = testing::tensor(&mut noise, shape);
            let gain = testing::tensor_of(&[2, 1], &[1.0; 2]);
            assert_refused(&Form::Butterfly(Butterfly { generators, gain }), matrix, words);
        };
        let words = "expected factors × blocks × b × b of 12 inputs";
        refuse(&[1, 3, 2, 2], testing::out_in(2, 12), words);
        refuse(&[2, 3, 4, 4], testing::out_in(2, 12), words);
        refuse(&[2, 4, 3, 3], testing::out_in(2, 12), words);
        refuse(&[0, 3, 4, 4], testing::out_in(2, 12), words);
        refuse(&[100, 6, 2, 2], testing::out_in(2, 12), words);
        refuse(&[1, 3, 4, 3], testing::out_in(2, 12), words);
        refuse(&[1, 3, 4, 4], testing::out_in(3, 12), "expected 3 values, found [2, 1]");
        refuse(&[1, 3, 4, 4], testing::in_out(12, 2), "stored as out×in, found in×out");
        let check = |shape: [usize; 4]| {
            let generators = testing::unread(shape.to_vec());
            let gain = testing::tensor_of(&[2, 1], &[1.0; 2]);
            let form = Form::Butterfly(Butterfly { generators, gain });
            super::super::check(&form, testing::out_in(2, shape[1] * shape[2]))
        };
        assert_eq!(check([4, 16, 512, 512]), Ok(()));
        let words = "multiplications for its blocks, found 1·1·4096·4096·4096";
        assert!(check([1, 1, 4096, 4096]).unwrap_err().ends_with(words));
    }
}
