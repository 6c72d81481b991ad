//! Two tensors → one low-rank change: the checks that every codec needs.

use crate::error::{AdapterProblem, Shape};
use crate::limits;
use crate::model::{Layer, LowRank, Scaling};
use crate::tensor::Tensor;

/// The factors of one module, as they are found.
#[derive(Debug, Default)]
pub(crate) struct FactorTensors {
    pub(crate) a: Option<Tensor>,
    pub(crate) b: Option<Tensor>,
}

/// The change of a linear layer that `factors` form, or `None` with the reasons in `problems`.
/// `names` are the names that A and B have in the file, for the message when one is missing.
pub(crate) fn low_rank(
    module: &str,
    factors: FactorTensors,
    names: (String, String),
    scaling: Scaling,
    problems: &mut Vec<AdapterProblem>,
) -> Option<LowRank> {
    of_layer(module, Layer::Linear, factors, names, scaling, problems)
}

/// The same of a layer of another kind.
pub(crate) fn of_layer(
    module: &str,
    layer: Layer,
    factors: FactorTensors,
    names: (String, String),
    scaling: Scaling,
    problems: &mut Vec<AdapterProblem>,
) -> Option<LowRank> {
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
    let (a_is, b_is) = match layer {
        Layer::Embedding => {
            ("A of an embedding is rank × vocabulary", "B of an embedding is dimension × rank")
        }
        Layer::Convolution => (
            "A of a convolution is rank × in × kernel",
            "B of a convolution is out × rank × ones, as many as A has kernel dimensions",
        ),
        Layer::Merged => (
            "A of fused projections is (groups·rank) × in",
            "B of fused projections is (groups·rows) × rank",
        ),
        Layer::Linear => ("A of a linear layer is rank × in", "B of a linear layer is out × rank"),
    };
    let dimensions = if layer == Layer::Convolution { a.shape.len() } else { 2 };
    let fits = |shape: &[usize]| shape.len() == dimensions;
    let b_fits = |shape: &[usize]| fits(shape) && shape.iter().skip(2).all(|&length| length == 1);
    let checks = [(&a, fits(&a.shape), a_is), (&b, b_fits(&b.shape), b_is)];
    for (factor, shape_fits, expected) in checks {
        let tensor = factor.name.clone();
        if !factor.dtype.is_merge_float() {
            let dtype = factor.dtype;
            problems.push(AdapterProblem::FactorDtype { tensor, dtype });
        } else if !shape_fits {
            let shape = Shape(factor.shape.clone());
            problems.push(AdapterProblem::FactorShape { tensor, shape, expected });
        }
    }
    if problems.len() > before {
        return None;
    }
    let module = module.to_owned();
    let (rank, agree) = match layer {
        Layer::Merged => (b.shape[1], groups_agree(&a.shape, &b.shape)),
        _ => (a.shape[0], b.shape[1] == a.shape[0]),
    };
    if !agree {
        let (a, b) = (Shape(a.shape), Shape(b.shape));
        problems.push(AdapterProblem::RankMismatch { module, a, b });
        return None;
    }
    if !(1..=limits::RANK).contains(&rank) {
        problems.push(AdapterProblem::RankRange { module, rank, limit: limits::RANK });
        return None;
    }
    let low_rank = LowRank { layer, ..LowRank::linear(a, b, scaling) };
    let scale = low_rank.scale();
    if !scale.is_finite() {
        problems.push(AdapterProblem::Scale { module, scale });
        return None;
    }
    Some(low_rank)
}

/// Whether A, (n·rank) × in, and B, (n·rows) × rank, are of the same number of groups.
fn groups_agree(a: &[usize], b: &[usize]) -> bool {
    match (a, b) {
        (&[rows, _], &[outputs, rank]) if rows > 0 && rank > 0 && rows % rank == 0 => {
            outputs % (rows / rank) == 0
        }
        _ => false,
    }
}
