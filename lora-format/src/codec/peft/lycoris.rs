//! LoHa and LoKr, as PEFT and LyCORIS store them.

use std::collections::BTreeMap;

use super::build::Builder;
use super::config::{Configured, ScalingTable};
use super::methods::part;
use super::tensors::Parts;
use crate::error::{AdapterProblem, Result, Shape};
use crate::limits;
use crate::model::{Cores, Form, Hadamard, Kronecker, KroneckerSide, Target};
use crate::tensor::Tensor;

/// Builds the components of a LoHa adapter.
pub(super) fn build_hadamard(
    builder: &mut Builder<'_>,
    modules: BTreeMap<String, Parts>,
) -> Result<()> {
    let mut scaling = builder.scaling_table()?;
    for (module, mut parts) in modules {
        let configured = scaling.of(&module)?;
        let first = cores(builder, &module, &mut parts, [part::W1_A, part::W1_B, part::T1]);
        let second = cores(builder, &module, &mut parts, [part::W2_A, part::W2_B, part::T2]);
        builder.reject_rest(parts);
        let (Some(first), Some(second)) = (first, second) else { continue };
        let rank = rank(&first);
        if first.core.is_some() != second.core.is_some() || shape(&first) != shape(&second) {
            let [one, other] = [&first, &second].map(|cores| Shape(shape(cores)));
            builder.problems.push(AdapterProblem::ProductsDiffer { module, one, other });
            continue;
        }
        if let Some(rank) = checked_rank(builder, &module, &configured, Some(rank)) {
            let hadamard = Hadamard { first, second, scaling: configured.scaling, rank };
            builder.push(Target::weight(module), Form::Hadamard(hadamard));
        }
    }
    builder.notes.extend(scaling.dead_patterns());
    Ok(())
}

/// Builds the components of a LoKr adapter. Where both sides are stored in full, only the
/// configuration knows the rank that the scale divides by.
pub(super) fn build_kronecker(
    builder: &mut Builder<'_>,
    modules: BTreeMap<String, Parts>,
) -> Result<()> {
    let mut scaling = builder.scaling_table()?;
    for (module, mut parts) in modules {
        let configured = scaling.of(&module)?;
        // PEFT has no core on the left, so no such tensor is ever found.
        let left = [part::W1, part::W1_A, part::W1_B, part::T1];
        let right = [part::W2, part::W2_A, part::W2_B, part::T2];
        let left = side(builder, &module, &mut parts, left, 2..=2);
        let right = side(builder, &module, &mut parts, right, 2..=4);
        builder.reject_rest(parts);
        let (Some(left), Some(right)) = (left, right) else { continue };
        let stored = [&left, &right].map(|side| match side {
            KroneckerSide::Full(_) => None,
            KroneckerSide::Product(cores) => Some(rank(cores)),
        });
        if let [Some(configured), Some(stored)] = stored
            && configured != stored
        {
            builder.problems.push(AdapterProblem::ConfiguredRank { module, configured, stored });
            continue;
        }
        let stored = stored.into_iter().flatten().next();
        if let Some(rank) = checked_rank(builder, &module, &configured, stored) {
            let kronecker = Kronecker { left, right, scaling: configured.scaling, rank };
            builder.push(Target::weight(module), Form::Kronecker(kronecker));
        }
    }
    builder.notes.extend(scaling.dead_patterns());
    Ok(())
}

/// One side of a Kronecker product: full, or a product.
fn side(
    builder: &mut Builder<'_>,
    module: &str,
    parts: &mut Parts,
    [full, a, b, core]: [&'static str; 4],
    dimensions: std::ops::RangeInclusive<usize>,
) -> Option<KroneckerSide> {
    let Some(tensor) = parts.take(full) else {
        return cores(builder, module, parts, [a, b, core]).map(KroneckerSide::Product);
    };
    let fits = |shape: &[usize]| dimensions.contains(&shape.len()) && !shape.contains(&0);
    builder
        .check(&tensor, fits, "a side of a Kronecker product is a matrix, or that of a convolution")
        .then_some(KroneckerSide::Full(tensor))
}

/// A product of two matrices, or with a core of three tensors.
fn cores(
    builder: &mut Builder<'_>,
    module: &str,
    parts: &mut Parts,
    [b, a, core]: [&'static str; 3],
) -> Option<Cores> {
    let core = parts.take(core);
    let b = builder.require(module, parts, b)?;
    let a = builder.require(module, parts, a)?;
    let matrix = |shape: &[usize]| shape.len() == 2 && !shape.contains(&0);
    let deep = |shape: &[usize]| shape.len() >= 3 && shape.len() <= 5 && !shape.contains(&0);
    let sound = builder.check(&b, matrix, "it must be a matrix")
        & builder.check(&a, matrix, "it must be a matrix")
        & core
            .as_ref()
            .is_none_or(|core| builder.check(core, deep, "a core is rank × rank × kernel"));
    if !sound {
        return None;
    }
    let agree = match &core {
        None => b.shape[1] == a.shape[0],
        Some(core) => core.shape[0] == b.shape[0] && core.shape[1] == a.shape[0],
    };
    if !agree {
        let (a, b) = (Shape(a.shape), Shape(b.shape));
        builder.problems.push(AdapterProblem::RankMismatch { module: module.to_owned(), a, b });
        return None;
    }
    Some(Cores { b, a, core })
}

/// The rank of a product.
fn rank(cores: &Cores) -> usize {
    cores.a.shape.first().copied().unwrap_or(0)
}

/// The shape of a product: out × in, and the kernel that a core gives it.
fn shape(cores: &Cores) -> Vec<usize> {
    let out = if cores.core.is_some() { cores.b.shape[1] } else { cores.b.shape[0] };
    let kernel = cores.core.iter().flat_map(|core: &Tensor| core.shape.iter().skip(2));
    [out, cores.a.shape[1]].into_iter().chain(kernel.copied()).collect()
}

/// The rank that the scale divides by, if it and the scale make sense.
fn checked_rank(
    builder: &mut Builder<'_>,
    module: &str,
    configured: &Configured,
    stored: Option<usize>,
) -> Option<usize> {
    if let Some(stored) = stored {
        builder.compare_ranks(module, configured, stored);
    }
    let rank = stored.or(configured.rank).unwrap_or(ScalingTable::DEFAULT_RANK);
    let module = module.to_owned();
    if !(1..=limits::RANK).contains(&rank) {
        builder.problems.push(AdapterProblem::RankRange { module, rank, limit: limits::RANK });
        return None;
    }
    let scale = configured.scaling.scale(rank);
    if !scale.is_finite() {
        builder.problems.push(AdapterProblem::Scale { module, scale });
        return None;
    }
    Some(rank)
}
