//! HiRA (Huang et al. 2025; PEFT's `hira_A`, `hira_B` and their embedding's namesakes):
//! `W' = W ⊙ (1 + s·B·A)`.
//!
//! A convolution's B·A is (out, in·kernel), an embedding's lies transposed, as in LoRA.

use std::ops::Range;

use lora_format::model::LowRank;

use super::product::{self, Product};
use super::shapes::Fits;
use super::{Matrix, Operator, dora};
use crate::kernels::{Factors, Isa};

struct Hira {
    cols: usize,
    product: Factors,
}

pub(super) fn check(form: &LowRank, matrix: Matrix) -> Fits {
    dora::check(form, matrix)?;
    match form.magnitude {
        None => Ok(()),
        Some(_) => Err("expected no magnitudes, found some".to_owned()),
    }
}

pub(super) fn prepare(form: &LowRank, matrix: Matrix) -> Box<dyn Operator> {
    let product = Product::of_low_rank(form).pack(matrix.orientation);
    Box::new(Hira { cols: matrix.cols, product })
}

impl Operator for Hira {
    fn add_rows(&self, isa: Isa, rows: Range<usize>, base: &[f32], weight: f64, delta: &mut [f64]) {
        let start = rows.start;
        let mut products = Vec::new();
        for run in product::runs(rows, self.cols) {
            let elements = (run.start - start) * self.cols..(run.end - start) * self.cols;
            products.resize(elements.len(), 0.0);
            product::rows(&self.product, isa, run, &mut products);
            let pairs = base[elements.clone()].iter().zip(&products);
            for ((&w, product), delta) in pairs.zip(&mut delta[elements]) {
                *delta += weight * (f64::from(w) * product);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use lora_format::model::{Form, Scaling, ScalingRule};

    use super::super::testing::{self, Noise, assert_change, assert_refused, at, floats};
    use super::*;

    #[test]
    fn weights_change_in_proportion() {
        let mut noise = Noise::new(1);
        let (out, input, rank) = (9, 40, 3);
        let (a, b) = (
            testing::tensor(&mut noise, &[rank, input]),
            testing::tensor(&mut noise, &[out, rank]),
        );
        let scaling = Scaling { alpha: 1.0, rule: ScalingRule::Direct };
        let form = LowRank::linear(a.clone(), b.clone(), scaling);
        let (a, b, base) = (at(&a), at(&b), floats(&mut noise, out * input));
        let p = |o: usize, i: usize| -> f64 {
            (0..rank).map(|k| b(o * rank + k) * a(k * input + i)).sum()
        };
        let wrapped = Form::Proportional(form.clone());
        assert_change(&wrapped, testing::out_in(out, input), &base, 1e-6, |o, i| {
            p(o, i) * f64::from(base[o * input + i])
        });
        assert_change(&wrapped, testing::in_out(input, out), &base, 1e-6, |i, o| {
            p(o, i) * f64::from(base[i * out + o])
        });
        let magnitude = Some(testing::tensor(&mut noise, &[out]));
        let form = Form::Proportional(LowRank { magnitude, ..form });
        assert_refused(&form, testing::out_in(out, input), "expected no magnitudes");
    }
}
