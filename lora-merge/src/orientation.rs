//! Whether a weight is stored as (out, in), as Linear layers do, or as (in, out), as Conv1D does.
//!
//! The shape decides where it can. A square weight is decided by its siblings in the base (the
//! non-square weights of the same block, whose bias tells the output dimension, and the adapter's
//! own non-square targets), then by `model_type`, then by the trainer's `fan_in_fan_out`. Evidence
//! that contradicts itself is an error: a transposed delta of the right shape is the kind of
//! mistake that nobody notices.

use std::collections::BTreeMap;

use lora_format::{Shape, vocabulary};
use serde_json::{Map, Value};

use crate::error::{PlanProblem, ShapeCause};
use crate::names::is_number;
use crate::operator::Features;
use crate::parameters::Parameters;

/// How a weight is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Orientation {
    /// (out, in): Linear.
    OutIn,
    /// (in, out): Conv1D.
    InOut,
}

impl Orientation {
    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Orientation::OutIn => "out×in",
            Orientation::InOut => "in×out",
        }
    }
}

/// Model types whose blocks store weights as (in, out): those built of transformers' Conv1D.
const CONV1D_MODELS: [&str; 6] =
    ["gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "gpt-sw3"];

/// What the shape alone says.
pub(crate) enum FromShape {
    Decided(Orientation),
    Square,
    Misfit(PlanProblem),
    /// Nothing, and it has been said why.
    Unknown,
}

/// Compares a stored matrix with the features that a change has.
pub(crate) fn from_shape(
    parameter: &str,
    (rows, cols): (usize, usize),
    features: Features,
) -> FromShape {
    let Features { out, input } = features;
    let fits = |known: Option<usize>, stored: usize| known.is_none_or(|known| known == stored);
    let cause = match (fits(out, rows) && fits(input, cols), fits(input, rows) && fits(out, cols)) {
        (true, true) => return FromShape::Square,
        (true, false) => return FromShape::Decided(Orientation::OutIn),
        (false, true) => return FromShape::Decided(Orientation::InOut),
        (false, false)
            if vocabulary::is_either(parameter) && (fits(input, cols) || fits(out, rows)) =>
        {
            ShapeCause::ResizedVocabulary
        }
        (false, false) => ShapeCause::WrongBase,
    };
    FromShape::Misfit(misfit(parameter, &[rows, cols], features, cause))
}

/// The problem of a shape that does not fit.
pub(crate) fn misfit(
    parameter: &str,
    shape: &[usize],
    features: Features,
    cause: ShapeCause,
) -> PlanProblem {
    PlanProblem::Shape {
        parameter: parameter.to_owned(),
        shape: Shape(shape.to_vec()),
        out_features: features.out,
        in_features: features.input,
        cause,
    }
}

/// Decides square targets.
pub(crate) struct Judge<'a> {
    parameters: &'a Parameters,
    config: Option<&'a Map<String, Value>>,
    /// The trainer's word, or the user's.
    flag: Option<bool>,
    /// Whether the user insists on the flag.
    forced: bool,
    /// The adapter's non-square targets.
    decided: BTreeMap<&'a str, Orientation>,
}

impl<'a> Judge<'a> {
    pub(crate) fn new(
        parameters: &'a Parameters,
        config: Option<&'a Map<String, Value>>,
        trained: Option<bool>,
        user: Option<bool>,
        decided: BTreeMap<&'a str, Orientation>,
    ) -> Judge<'a> {
        let (flag, forced) = (user.or(trained), user.is_some());
        Judge { parameters, config, flag, forced, decided }
    }

    /// The orientation of the square weight `parameter`.
    pub(crate) fn square(&self, parameter: &str) -> Result<Orientation, PlanProblem> {
        let problem = |evidence: String| PlanProblem::Orientation {
            parameter: parameter.to_owned(),
            evidence,
        };
        let flag = self.flag.map(oriented);
        let siblings = self.siblings(parameter);
        let disagreeing =
            siblings.first().and_then(|first| siblings.iter().find(|other| other.1 != first.1));
        let (shown, who) = match (siblings.first(), disagreeing, self.model_type()) {
            (Some(first), Some(other), _) => {
                if let (true, Some(orientation)) = (self.forced, flag) {
                    return Ok(orientation);
                }
                let (a, b) = (first.1.name(), other.1.name());
                return Err(problem(format!("`{}` is {a}, `{}` is {b}", first.0, other.0)));
            }
            (Some(first), None, model) => {
                if let (Some((model, by_model)), false) = (model, self.forced)
                    && by_model != first.1
                {
                    let (a, b) = (first.1.name(), by_model.name());
                    let evidence =
                        format!("its sibling `{}` is {a}, model_type {model} means {b}", first.0);
                    return Err(problem(evidence));
                }
                (first.1, format!("its sibling `{}`", first.0))
            }
            (None, _, Some((model, by_model))) => match (self.forced, flag) {
                (true, Some(orientation)) => return Ok(orientation),
                _ => (by_model, format!("model_type {model}")),
            },
            (None, _, None) => return Ok(flag.unwrap_or(Orientation::OutIn)),
        };
        // PEFT keeps one flag for the whole adapter and overwrites it layer by layer, so where
        // the adapter's own shapes refute it, it says nothing about this layer. What the user says
        // is never refuted silently.
        let refuted = !self.forced && self.decided.values().any(|&other| Some(other) != flag);
        match flag {
            Some(flag) if flag != shown && !refuted => Err(problem(format!(
                "{who} means {}, fan_in_fan_out means {}",
                shown.name(),
                flag.name()
            ))),
            _ => Ok(shown),
        }
    }

    /// The model type with what it means. A composite (an encoder with a decoder, a tower beside a
    /// language model) means nothing for the whole.
    fn model_type(&self) -> Option<(&'a str, Orientation)> {
        let config = self.config?;
        let composite = config.values().any(|part| part.get("model_type").is_some());
        let model = config.get("model_type")?.as_str()?;
        (!composite).then(|| (model, oriented(CONV1D_MODELS.contains(&model))))
    }

    /// Non-square weights of the block that `parameter` is in, with what they show: targets of the
    /// adapter by their shapes, other weights by the length of their bias.
    fn siblings(&self, parameter: &str) -> Vec<(String, Orientation)> {
        let block = block_of(parameter);
        let mut found: Vec<(String, Orientation)> = self
            .decided
            .range(block..)
            .take_while(|entry| entry.0.starts_with(block))
            .filter(|entry| block_of(entry.0) == block)
            .map(|entry| ((*entry.0).to_owned(), *entry.1))
            .collect();
        for (_, sibling) in self.parameters.under(block) {
            let Some(stem) = sibling.name.strip_suffix(".weight") else {
                continue;
            };
            let [rows, cols] = *sibling.shape.as_slice() else {
                continue;
            };
            if rows == cols || block_of(&sibling.name) != block {
                continue;
            }
            let bias = self.parameters.find(&format!("{stem}.bias"));
            let length = bias.map(|index| self.parameters.get(index).elements());
            if length == Some(rows as u64) {
                found.push((sibling.name.clone(), Orientation::OutIn));
            } else if length == Some(cols as u64) {
                found.push((sibling.name.clone(), Orientation::InOut));
            }
        }
        found
    }
}

fn oriented(fan_in_fan_out: bool) -> Orientation {
    if fan_in_fan_out { Orientation::InOut } else { Orientation::OutIn }
}

/// The name up to and including its last layer number: `transformer.h.3` of
/// `transformer.h.3.attn.c_proj.weight`. A name without a number is its own block.
fn block_of(parameter: &str) -> &str {
    let mut end = None;
    let mut at = 0;
    for part in parameter.split('.') {
        at += part.len();
        if is_number(part) {
            end = Some(at);
        }
        at += 1;
    }
    &parameter[..end.unwrap_or(parameter.len())]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_ends_at_the_last_number() {
        assert_eq!(block_of("transformer.h.3.attn.c_proj.weight"), "transformer.h.3");
        assert_eq!(block_of("a.0.experts.12.w1.weight"), "a.0.experts.12");
        assert_eq!(block_of("lm_head.weight"), "lm_head.weight");
    }
}
