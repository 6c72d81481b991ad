//! Why two checkpoints cannot be compared, and what was noticed while they were paired up.

use std::fmt;

use crate::error::PlanProblem;
use crate::quantised::QuantisedProblem;

/// One of the two checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// The one that training began with.
    Base,
    /// The one that it ended with.
    Tuned,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Side::Base => "the base",
            Side::Tuned => "the fine-tuned model",
        })
    }
}

/// Why two checkpoints cannot be compared.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages are the documentation")]
pub enum PairProblem {
    #[error(
        "no parameter of one is in the other: the base has {} ({base_parameters} parameters), the \
         fine-tuned model has {} ({tuned_parameters})",
        few(base),
        few(tuned)
    )]
    NothingInCommon {
        base: Vec<String>,
        base_parameters: usize,
        tuned: Vec<String>,
        tuned_parameters: usize,
    },
    #[error(
        "two ways of matching the names are equally good, {} and {}: {}", ways[0], ways[1],
        both(examples)
    )]
    TwoPrefixes { ways: Box<[Rename; 2]>, examples: Vec<[(String, String); 2]> },
    #[error("{side}: {}", problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Parameters { side: Side, problems: Vec<PlanProblem> },
}

/// A prefix of the base's names that another one stands for in the fine-tuned model's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rename {
    /// The base's, without the dot after it; may be empty.
    pub base: String,
    /// The other's.
    pub tuned: String,
    /// Parameters whose names differ by it.
    pub parameters: usize,
}

impl fmt::Display for Rename {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |prefix: &str| match prefix {
            "" => "no prefix".to_owned(),
            prefix => format!("`{prefix}.`"),
        };
        let (base, tuned) = (shown(&self.base), shown(&self.tuned));
        write!(f, "{base} → {tuned} ({} parameters)", self.parameters)
    }
}

/// What was noticed while pairing up, and stops nothing.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum PairNote {
    /// Names were matched by a change of prefix.
    Renamed(Rename),
    /// One side spells a parameter as wrappers or old releases do.
    Respelled {
        /// Such parameters.
        parameters: usize,
        /// The first of them, as the base has it.
        base: String,
        /// As the fine-tuned model has it.
        tuned: String,
    },
    /// A side stores one of embedding and output head, and no configuration says whether the other
    /// is the same tensor; the stored values decided.
    TieFromValues {
        /// The side.
        side: Side,
        /// Whether it is.
        tied: bool,
        /// The parameter that is not stored.
        missing: String,
    },
    /// A side stores embedding and output head with different values, and its configuration says
    /// that they are one tensor. The stored values count.
    TieContradicted {
        /// The side.
        side: Side,
        /// The head.
        head: String,
    },
    /// A parameter that only one side stores repeats another one of that side.
    Repeats {
        /// The side.
        side: Side,
        /// The parameter.
        name: String,
        /// The one that it repeats, value by value.
        of: String,
    },
    /// Tensors that look quantised and cannot be read as weights.
    Unreadable {
        /// The side.
        side: Side,
        /// Why.
        problem: QuantisedProblem,
    },
}

impl fmt::Display for PairNote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PairNote::Renamed(rename) => {
                write!(f, "names differ in the fine-tuned model: {rename}")
            }
            PairNote::Respelled { parameters, base, tuned } => write!(
                f,
                "{parameters} parameters are spelled differently: `{base}` is `{tuned}` in the \
                 fine-tuned model"
            ),
            PairNote::TieFromValues { side, tied, missing } => {
                let verdict = match tied {
                    true => "taken as tied, since the values are alike",
                    false => "taken as missing, since the values are not alike",
                };
                write!(f, "`{missing}` is not stored in {side}: {verdict}")
            }
            PairNote::TieContradicted { side, head } => write!(
                f,
                "config.json says that {side} ties `{head}` to its input embedding, and the \
                 stored values differ: what is stored counts"
            ),
            PairNote::Repeats { side, name, of } => {
                write!(f, "`{name}`, which only {side} stores, repeats `{of}`")
            }
            PairNote::Unreadable { side, problem } => write!(f, "{side}: {problem}"),
        }
    }
}

fn few(names: &[String]) -> String {
    if names.is_empty() {
        return "none".to_owned();
    }
    let quoted: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
    quoted.join(", ")
}

fn both(examples: &[[(String, String); 2]]) -> String {
    let pair = |pair: &(String, String)| format!("`{}` = `{}`", pair.0, pair.1);
    let shown =
        examples.iter().map(|[first, second]| format!("{} or {}", pair(first), pair(second)));
    shown.collect::<Vec<_>>().join("; ")
}
