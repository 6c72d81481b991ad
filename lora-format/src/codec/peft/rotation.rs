//! OFT, BOFT and HRA: rotations and reflections of the inputs.

use std::collections::BTreeMap;

use super::build::Builder;
use super::config::Configuration;
use super::methods::part;
use super::tensors::Parts;
use crate::error::{AdapterProblem, Error, Result, Unsupported};
use crate::model::{Butterfly, Form, Layer, Reflections, Rotation, Target};

/// How PEFT computes the rotations of an adapter.
struct Rule {
    neumann_terms: Option<usize>,
    radius: Option<f64>,
    share: bool,
}

impl Rule {
    fn of(config: &Configuration<'_>) -> Result<Rule> {
        let series = config.flag("use_cayley_neumann")?.unwrap_or(true);
        let refuse = |feature, reason: &str| {
            let features = vec![Unsupported { feature, reason: reason.to_owned() }];
            Error::Unsupported { path: config.path.to_owned(), features }
        };
        if config.get("oft_block_size").is_none() {
            return Err(refuse(
                config.describe("oft_block_size"),
                "OFT as PEFT wrote it before 0.16, with another parametrisation; PEFT itself no \
                 longer reads it",
            ));
        }
        // PEFT itself only warns, and then computes another rotation than was trained.
        if series && version(config.text("peft_version")?) < (0, 18) {
            return Err(refuse(
                config.describe("peft_version"),
                "before PEFT 0.18 the series that `use_cayley_neumann` stands for was another: \
                 merge it with the version that trained it",
            ));
        }
        let terms = config.count("num_cayley_neumann_terms")?.unwrap_or(5);
        let constrained = config.flag("coft")?.unwrap_or(false);
        let radius = config.number("eps")?.unwrap_or(6e-5);
        Ok(Rule {
            neumann_terms: series.then_some(terms),
            radius: constrained.then_some(radius),
            share: config.flag("block_share")?.unwrap_or(false),
        })
    }
}

/// The first two numbers of a version; PEFT records its own since 0.18.
fn version(text: Option<&str>) -> (u64, u64) {
    let mut numbers = text.unwrap_or_default().split('.').map(|part| part.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// Builds the components of an OFT adapter.
pub(super) fn build(builder: &mut Builder<'_>, modules: BTreeMap<String, Parts>) -> Result<()> {
    let rule = Rule::of(&builder.config)?;
    for (module, mut parts) in modules {
        let (generators, layer) = match parts.take(part::ROTATION) {
            Some(generators) => (Some(generators), Layer::Linear),
            None => (parts.take(part::EMBEDDING_ROTATION), Layer::Embedding),
        };
        builder.reject_rest(parts);
        let Some(generators) = generators else { continue };
        let fits = |shape: &[usize]| {
            matches!(shape, &[rows, columns]
                if rows > 0 && block_of(columns).is_some() && (rows == 1 || !rule.share))
        };
        let expected = if rule.share {
            "with block_share it is one row of the b(b−1)/2 elements above a diagonal"
        } else {
            "every row holds the b(b−1)/2 elements above a block's diagonal"
        };
        if !builder.check(&generators, fits, expected) {
            continue;
        }
        let Some(block) = block_of(generators.shape[1]) else { continue };
        if rule.radius.is_some_and(|radius| !radius.is_finite() || radius < 0.0) {
            let scale = rule.radius.unwrap_or_default();
            builder.problems.push(AdapterProblem::Scale { module, scale });
            continue;
        }
        let (neumann_terms, radius) = (rule.neumann_terms, rule.radius);
        let rotation = Rotation { generators, block, layer, neumann_terms, radius };
        builder.push(Target::weight(module), Form::Rotation(rotation));
    }
    Ok(())
}

/// Builds the components of an HRA adapter.
pub(super) fn build_reflections(
    builder: &mut Builder<'_>,
    modules: BTreeMap<String, Parts>,
) -> Result<()> {
    let orthogonal = builder.config.flag("apply_GS")?.unwrap_or(false);
    for (module, mut parts) in modules {
        let Some(vectors) = builder.require(&module, &mut parts, part::ROTATION) else { continue };
        builder.reject_rest(parts);
        let matrix = |shape: &[usize]| shape.len() == 2 && !shape.contains(&0);
        if builder.check(&vectors, matrix, "the vectors are in × rank") {
            let form = Form::Reflections(Reflections { vectors, orthogonal });
            builder.push(Target::weight(module), form);
        }
    }
    Ok(())
}

/// Builds the components of a BOFT adapter.
pub(super) fn build_butterflies(builder: &mut Builder<'_>, modules: BTreeMap<String, Parts>) {
    for (module, mut parts) in modules {
        let generators = builder.require(&module, &mut parts, part::ROTATION);
        let gain = builder.require(&module, &mut parts, part::GAIN);
        builder.reject_rest(parts);
        let (Some(generators), Some(gain)) = (generators, gain) else { continue };
        let fits = |shape: &[usize]| {
            matches!(shape, [_, _, rows, columns] if rows == columns) && !shape.contains(&0)
        };
        let vector = |shape: &[usize]| matches!(shape, [_, 1] | [1, _]);
        if builder.check(&generators, fits, "boft_R is factors × blocks × b × b")
            && builder.check(&gain, vector, "boft_s is out × 1, of a convolution 1 × out")
        {
            let form = Form::Butterfly(Butterfly { generators, gain });
            builder.push(Target::weight(module), form);
        }
    }
}

/// The b of which b(b−1)/2 is `elements`.
fn block_of(elements: usize) -> Option<usize> {
    let root = elements.checked_mul(8)?.checked_add(1)?.isqrt();
    let block = root.div_ceil(2);
    (block.checked_mul(block - 1)? / 2 == elements).then_some(block)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_sizes_follow_from_the_elements() {
        for block in 1..1000 {
            assert_eq!(block_of(block * (block - 1) / 2), Some(block));
        }
        for elements in [2, 4, 5, 7, 27, usize::MAX] {
            assert_eq!(block_of(elements), None);
        }
    }

    #[test]
    fn versions_compare_by_two_numbers() {
        assert_eq!(version(None), (0, 0));
        assert!(version(Some("0.17.1")) < (0, 18));
        assert!(version(Some("0.18.0.dev0@abc")) >= (0, 18));
        assert!(version(Some("1.0")) >= (0, 18));
    }
}
