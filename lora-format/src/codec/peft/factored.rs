//! HiRA, DeLoRA and GraLoRA: low-rank factors that are not simply added.

use std::collections::BTreeMap;

use super::PREFIX;
use super::build::Builder;
use super::methods::part;
use super::tensors::Parts;
use crate::error::{AdapterProblem, Result, Shape};
use crate::factors::{self, FactorTensors};
use crate::limits;
use crate::model::{Bounded, Form, Grid, Layer, Scaling, ScalingRule, Target};

/// Builds the components of a HiRA adapter.
pub(super) fn build_proportional(
    builder: &mut Builder<'_>,
    modules: BTreeMap<String, Parts>,
) -> Result<()> {
    let scaling = Scaling { alpha: 1.0, rule: ScalingRule::Direct };
    for (module, mut parts) in modules {
        let is_embedding = parts.has(part::EMBEDDING_A) || parts.has(part::EMBEDDING_B);
        let (a, b, stem) = if is_embedding {
            (part::EMBEDDING_A, part::EMBEDDING_B, "hira_embedding")
        } else {
            (part::A, part::B, "hira")
        };
        let found = FactorTensors { a: parts.take(a), b: parts.take(b) };
        builder.reject_rest(parts);
        let layer = match &found.a {
            _ if is_embedding => Layer::Embedding,
            Some(a) if (3..=5).contains(&a.shape.len()) => Layer::Convolution,
            _ => Layer::Linear,
        };
        let name = |factor| format!("{PREFIX}{module}.{stem}_{factor}");
        let (names, problems) = ((name("A"), name("B")), &mut builder.problems);
        let built = factors::of_layer(&module, layer, found, names, scaling, problems);
        if let Some(low_rank) = built {
            builder.push(Target::weight(module), Form::Proportional(low_rank));
        }
    }
    Ok(())
}

/// Builds the components of a DeLoRA adapter.
pub(super) fn build_bounded(
    builder: &mut Builder<'_>,
    modules: BTreeMap<String, Parts>,
) -> Result<()> {
    let scaling = Scaling { alpha: 1.0, rule: ScalingRule::Direct };
    for (module, mut parts) in modules {
        let bound = builder.require(&module, &mut parts, part::LAMBDA);
        let norms = builder.require(&module, &mut parts, part::NORMS);
        let found = FactorTensors { a: parts.take(part::A), b: parts.take(part::B) };
        builder.reject_rest(parts);
        let name = |factor| format!("{PREFIX}{module}.delora_{factor}");
        let (names, problems) = ((name("A"), name("B")), &mut builder.problems);
        let built = factors::low_rank(&module, found, names, scaling, problems);
        let (Some(low_rank), Some(bound), Some(norms)) = (built, bound, norms) else { continue };
        let inputs = low_rank.in_features();
        if builder.check(&bound, |shape| shape == [1], "λ is one value")
            && builder.check(&norms, |shape| shape == [inputs], "the norms are one per input")
        {
            let form = Bounded { a: low_rank.a, b: low_rank.b, bound, norms };
            builder.push(Target::weight(module), Form::Bounded(form));
        }
    }
    Ok(())
}

/// Builds the components of a GraLoRA adapter: the grid, and the low-rank change of its hybrid
/// part. Both are scaled by alpha over the sum of their ranks.
pub(super) fn build_grids(
    builder: &mut Builder<'_>,
    modules: BTreeMap<String, Parts>,
) -> Result<()> {
    const ALPHA: f64 = 64.0;
    let alpha = builder.config.number("alpha")?.unwrap_or(ALPHA);
    let hybrid_rank = builder.config.count("hybrid_r")?.unwrap_or(0);
    for (module, mut parts) in modules {
        let a = builder.require(&module, &mut parts, part::A);
        let b = builder.require(&module, &mut parts, part::B);
        let hybrid = FactorTensors { a: parts.take(part::HYBRID_A), b: parts.take(part::HYBRID_B) };
        builder.reject_rest(parts);
        let (Some(a), Some(b)) = (a, b) else { continue };
        let cube = |shape: &[usize]| shape.len() == 3 && !shape.contains(&0);
        if !builder.check(&a, cube, "A is k × in/k × rank")
            || !builder.check(&b, cube, "B is k × rank × out/k")
        {
            continue;
        }
        let (fields, rank) = (a.shape[0], a.shape[2]);
        if b.shape[..2] != [fields, rank] || rank % fields != 0 {
            let (a, b) = (Shape(a.shape), Shape(b.shape));
            builder.problems.push(AdapterProblem::RankMismatch { module, a, b });
            continue;
        }
        let rank = rank.saturating_add(hybrid_rank);
        let scaling = Scaling { alpha, rule: ScalingRule::AlphaOverRank };
        let scale = scaling.scale(rank);
        if rank > limits::RANK {
            builder.problems.push(AdapterProblem::RankRange { module, rank, limit: limits::RANK });
            continue;
        }
        if !scale.is_finite() {
            builder.problems.push(AdapterProblem::Scale { module, scale });
            continue;
        }
        let target = Target::weight(&*module);
        builder.push(target.clone(), Form::Grid(Grid { a, b, scaling, rank }));
        if hybrid_rank == 0 && hybrid.a.is_none() && hybrid.b.is_none() {
            continue;
        }
        let name = |factor| format!("{PREFIX}{module}.gralora_{factor}_general.weight");
        let scaling = Scaling { alpha: scale, rule: ScalingRule::Direct };
        let (names, problems) = ((name("A"), name("B")), &mut builder.problems);
        let built = factors::low_rank(&module, hybrid, names, scaling, problems);
        let Some(low_rank) = built else { continue };
        let (configured, stored) = (hybrid_rank, low_rank.rank());
        if configured != stored {
            builder.problems.push(AdapterProblem::ConfiguredRank { module, configured, stored });
            continue;
        }
        builder.push(target, Form::LowRank(low_rank));
    }
    Ok(())
}
