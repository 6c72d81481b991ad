//! What an adapter holds, whatever loads it.

use super::{Finding, Kind};
use crate::model::{Adapter, Form, LowRank};
use crate::tensor::Tensor;

/// Scales beyond this are seldom meant: alpha/rank is 0.25 to 4 in nearly all adapters there are.
const LARGE_SCALE: f64 = 64.0;

pub(super) fn findings(adapter: &Adapter) -> Vec<Finding> {
    let mut found = Vec::new();
    let mut report = |kind, names: Vec<String>, what: &str| {
        if !names.is_empty() {
            found.push(Finding { kind, names, what: what.to_owned(), fix: None });
        }
    };
    let mut broken: Vec<String> = adapter
        .tensors()
        .filter(|tensor| !is_finite(tensor))
        .map(|tensor| tensor.name.clone())
        .collect();
    broken.sort();
    broken.dedup();
    report(Kind::Damaged, broken, "holds values that are no finite numbers");

    let factors: Vec<(String, &LowRank)> = adapter
        .components
        .iter()
        .filter_map(|one| match &one.form {
            Form::LowRank(form) => Some((one.target.name(), form)),
            _ => None,
        })
        .collect();
    let of = |condition: &dyn Fn(&LowRank) -> bool| -> Vec<String> {
        let fitting = factors.iter().filter(|(_, form)| condition(form));
        fitting.map(|(name, _)| name.clone()).collect()
    };
    let zero = |form: &LowRank| is_zero(&form.b) || is_zero(&form.a);
    report(
        Kind::Suspicious,
        of(&zero),
        "changes nothing: a factor is zero, as before the first step of training",
    );
    report(Kind::Suspicious, of(&|form| form.scale() == 0.0), "changes nothing: its scale is 0");
    report(
        Kind::Suspicious,
        of(&|form| form.scale().abs() > LARGE_SCALE),
        "has a scale of more than 64: was alpha taken for the scale, or multiplied by the rank twice?",
    );
    report(Kind::Suspicious, of(&|form| form.scale() < 0.0), "has a negative scale");
    report(
        Kind::Suspicious,
        of(&|form| form.rank() > form.in_features().min(form.out_features())),
        "has a rank greater than the weight's: `lora-cli resize` makes it smaller without loss",
    );
    found
}

/// Whether every element is a finite number; of what is no float, always.
fn is_finite(tensor: &Tensor) -> bool {
    let finite = tensor.to_f32().is_none_or(|values| values.iter().all(|value| value.is_finite()));
    tensor.release();
    finite
}

/// Whether every element is ±0.
fn is_zero(tensor: &Tensor) -> bool {
    let zero = tensor.to_f32().is_some_and(|values| values.iter().all(|&value| value == 0.0));
    tensor.release();
    zero
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::dtype::Dtype;
    use crate::fingerprint::BaseIdentity;
    use crate::model::{Component, Scaling, ScalingRule, Target};

    fn tensor(shape: &[usize], value: f32) -> Tensor {
        let count: usize = shape.iter().product();
        let bytes = (0..count).flat_map(|_| value.to_le_bytes()).collect();
        Tensor::new("tensor".to_owned(), Dtype::F32, shape.to_vec(), bytes).unwrap()
    }

    fn found(a: f32, b: f32, rank: usize, alpha: f64) -> Vec<Kind> {
        let scaling = Scaling { alpha, rule: ScalingRule::AlphaOverRank };
        let form = LowRank::linear(tensor(&[rank, 4], a), tensor(&[5, rank], b), scaling);
        let component = Component { target: Target::weight("m"), form: Form::LowRank(form) };
        let base = BaseIdentity { name: None, revision: None, fingerprint: None };
        let adapter = Adapter::new("adapter", vec![component], base);
        findings(&adapter).into_iter().map(|finding| finding.kind).collect()
    }

    #[test]
    fn what_training_would_not_leave_is_found() {
        assert_eq!(found(1.0, 1.0, 2, 2.0), []);
        assert_eq!(found(f32::NAN, 1.0, 2, 2.0), [Kind::Damaged]);
        assert_eq!(found(1.0, f32::INFINITY, 2, 2.0), [Kind::Damaged]);
        assert_eq!(found(1.0, -0.0, 2, 2.0), [Kind::Suspicious]);
        assert_eq!(found(1.0, 1.0, 2, 0.0), [Kind::Suspicious]);
        assert_eq!(found(1.0, 1.0, 2, 1000.0), [Kind::Suspicious]);
        assert_eq!(found(1.0, 1.0, 2, -1.0), [Kind::Suspicious]);
        assert_eq!(found(1.0, 1.0, 5, 2.0), [Kind::Suspicious]);
    }
}
