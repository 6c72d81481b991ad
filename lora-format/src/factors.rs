//! Two tensors → one low-rank component: the checks that every codec needs.

use crate::error::{AdapterProblem, Shape};
use crate::limits;
use crate::model::{Component, Form, LowRank, Scaling, Target};
use crate::tensor::Tensor;

/// The factors of one module, as they are found.
#[derive(Debug, Default)]
pub(crate) struct FactorTensors {
    pub(crate) a: Option<Tensor>,
    pub(crate) b: Option<Tensor>,
}

/// The component that `factors` form, or `None` with the reasons in `problems`. `names` are the
/// names that A and B have in the file, for the message when one is missing.
pub(crate) fn low_rank(
    module: &str,
    factors: FactorTensors,
    names: (String, String),
    scaling: Scaling,
    problems: &mut Vec<AdapterProblem>,
) -> Option<Component> {
    let (a, b) = match (factors.a, factors.b) {
        (Some(a), Some(b)) => (a, b),
        (Some(_), None) => {
            problems.push(AdapterProblem::MissingFactor { present: names.0, missing: names.1 });
            return None;
        }
        _ => {
            problems.push(AdapterProblem::MissingFactor { present: names.1, missing: names.0 });
            return None;
        }
    };
    let before = problems.len();
    for (factor, expected) in
        [(&a, "A of a linear layer is rank × in"), (&b, "B of a linear layer is out × rank")]
    {
        let tensor = factor.name.clone();
        if !factor.dtype.is_merge_float() {
            let dtype = factor.dtype;
            problems.push(AdapterProblem::FactorDtype { tensor, dtype });
        } else if factor.shape.len() != 2 {
            let shape = Shape(factor.shape.clone());
            problems.push(AdapterProblem::FactorShape { tensor, shape, expected });
        }
    }
    if problems.len() > before {
        return None;
    }
    let module = module.to_owned();
    let rank = a.shape[0];
    if b.shape[1] != rank {
        let (a, b) = (Shape(a.shape), Shape(b.shape));
        problems.push(AdapterProblem::RankMismatch { module, a, b });
        return None;
    }
    if !(1..=limits::RANK).contains(&rank) {
        problems.push(AdapterProblem::RankRange { module, rank, limit: limits::RANK });
        return None;
    }
    let low_rank = LowRank { a, b, scaling };
    let scale = low_rank.scale();
    if !scale.is_finite() {
        problems.push(AdapterProblem::Scale { module, scale });
        return None;
    }
    Some(Component { target: Target::weight(module), form: Form::LowRank(low_rank) })
}
