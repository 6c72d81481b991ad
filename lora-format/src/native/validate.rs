//! What the tensors of components without factors must be: the same for what is read and for what
//! is to be written.

use super::components::Role;
use crate::error::{AdapterProblem, Shape};
use crate::model::LowRank;
use crate::tensor::Tensor;

fn shape(name: &str, tensor: &Tensor, expected: &'static str) -> AdapterProblem {
    let shape = Shape(tensor.shape.clone());
    AdapterProblem::FactorShape { tensor: name.to_owned(), shape, expected }
}

/// A tensor to compute with is of floats.
pub(super) fn float(name: &str, tensor: &Tensor) -> Option<AdapterProblem> {
    let dtype = tensor.dtype;
    (!dtype.is_merge_float())
        .then(|| AdapterProblem::FactorDtype { tensor: name.to_owned(), dtype })
}

/// A of a kind of layer that its dimensions do not tell (F7, F24).
pub(super) fn layer(name: &str, a: &Tensor) -> Option<AdapterProblem> {
    let expected = "A of a linear layer has two dimensions, that of a convolution three to five";
    Some(shape(name, a, expected))
}

/// A vector beside the factors of a low-rank change (F26, F34, F36).
pub(super) fn gain(
    role: Role,
    name: &str,
    tensor: &Tensor,
    low_rank: &LowRank,
) -> Option<AdapterProblem> {
    let (length, expected) = match role {
        Role::RankGain => (Some(low_rank.rank()), "a gain is one value per rank"),
        Role::InMagnitude => (
            low_rank.a.shape.get(1).copied(),
            "a magnitude of inputs is one value per input feature",
        ),
        _ => (Some(low_rank.out_features()), "a magnitude is one value per output feature"),
    };
    let fits = || matches!(*tensor.shape, [found] if Some(found) == length);
    float(name, tensor).or_else(|| (!fits()).then(|| shape(name, tensor, expected)))
}

/// Rows of a parameter (F28).
pub(super) fn rows(name: &str, tensor: &Tensor) -> Option<AdapterProblem> {
    let fits = matches!(*tensor.shape, [count, _] if count > 0);
    let expected = "rows are a matrix of at least one";
    float(name, tensor).or_else(|| (!fits).then(|| shape(name, tensor, expected)))
}

/// Which rows they are (F28).
pub(super) fn indices(name: &str, indices: &[u64], rows: usize) -> Option<AdapterProblem> {
    let ascending = indices.windows(2).all(|pair| pair[0] < pair[1]);
    let fit = indices.last().is_none_or(|&last| i64::try_from(last).is_ok());
    (indices.len() != rows || !ascending || !fit)
        .then(|| AdapterProblem::RowIndices { tensor: name.to_owned() })
}

/// The s of a change in full (F29).
pub(super) fn scale(parameter: &str, scale: f64) -> Option<AdapterProblem> {
    (!scale.is_finite()).then(|| AdapterProblem::Scale { module: parameter.to_owned(), scale })
}
