//! Which components the format holds, and what their tensors are called (`docs/FORMAT.md`,
//! section 2).
//!
//! A plain low-rank change bears the names that today's loaders know, after its module. Everything
//! else is named after its parameter, with an infix that no other loader matches, so that none
//! applies it wrongly.

use std::collections::BTreeSet;

use crate::error::AdapterProblem;
use crate::model::{Component, Form, Layer, LowRank, Target};
use crate::tensor::Tensor;

/// What a tensor is to its component.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Role {
    /// A of a plain low-rank change of a module's `weight`.
    PlainA,
    /// B of the same.
    PlainB,
    /// `s·rank`, for programs that read nothing but these three.
    Alpha,
    /// A of a low-rank change that other loaders must not apply.
    A,
    B,
    /// The same of an embedding, whose stored matrix has the product transposed.
    EmbeddingA,
    EmbeddingB,
    /// DoRA's m.
    Magnitude,
    /// The whole parameter.
    Value,
    /// Rows of it, and which they are.
    Rows,
    Indices,
    /// A change in full, and its s.
    Added,
    Scale,
}

impl Role {
    /// Every role with the end of its tensors' names. None is the end of another.
    const SUFFIXES: [(Role, &str); 13] = [
        (Role::PlainA, ".lora_A.weight"),
        (Role::PlainB, ".lora_B.weight"),
        (Role::Alpha, ".alpha"),
        (Role::A, ".lora:A"),
        (Role::B, ".lora:B"),
        (Role::EmbeddingA, ".lora:embedding_A"),
        (Role::EmbeddingB, ".lora:embedding_B"),
        (Role::Magnitude, ".lora:magnitude"),
        (Role::Value, ".lora:value"),
        (Role::Rows, ".lora:rows"),
        (Role::Indices, ".lora:indices"),
        (Role::Added, ".lora:added"),
        (Role::Scale, ".lora:scale"),
    ];

    /// Whether it is a factor, whose component has a scaling.
    pub(super) fn is_factor(self) -> bool {
        use Role::{A, B, EmbeddingA, EmbeddingB, PlainA, PlainB};
        matches!(self, PlainA | PlainB | A | B | EmbeddingA | EmbeddingB)
    }

    /// Whether its tensors are named after a module, whose `weight` is meant.
    fn is_plain(self) -> bool {
        matches!(self, Role::PlainA | Role::PlainB | Role::Alpha)
    }

    fn suffix(self) -> &'static str {
        Role::SUFFIXES.iter().find(|entry| entry.0 == self).map_or("", |entry| entry.1)
    }

    /// The name of the tensor of this role.
    pub(super) fn name(self, target: &Target) -> String {
        let suffix = self.suffix();
        if self.is_plain() {
            format!("{}{suffix}", target.module)
        } else {
            format!("{}{suffix}", target.name())
        }
    }

    /// The target and the role that a tensor's name says; `None` if it says none.
    pub(super) fn of(name: &str) -> Option<(Target, Role)> {
        let (role, owner) = Role::SUFFIXES
            .iter()
            .find_map(|&(role, suffix)| Some((role, name.strip_suffix(suffix)?)))?;
        let target = if role.is_plain() {
            Target::weight(owner)
        } else {
            let (module, parameter) = match owner.rsplit_once('.') {
                // As if of a module without a name.
                Some(("", _)) => return None,
                Some(parts) => parts,
                None => ("", owner),
            };
            Target { module: module.to_owned(), parameter: parameter.to_owned() }
        };
        is_nameable(&target, role).then_some((target, role))
    }
}

/// Whether the names of a target's tensors tell the target again.
fn is_nameable(target: &Target, role: Role) -> bool {
    let named = if role.is_plain() { &target.module } else { &target.parameter };
    !named.is_empty() && !target.parameter.contains('.')
}

/// The roles of a low-rank change: A, B.
pub(super) fn factor_roles(target: &Target, low_rank: &LowRank) -> [Role; 2] {
    match low_rank.layer {
        Layer::Embedding => [Role::EmbeddingA, Role::EmbeddingB],
        _ if is_plain(target, low_rank) => [Role::PlainA, Role::PlainB],
        _ => [Role::A, Role::B],
    }
}

/// The kind of layer that A belongs to, if it is no embedding.
pub(super) fn layer_of(a: &Tensor) -> Layer {
    if (3..=5).contains(&a.shape.len()) { Layer::Convolution } else { Layer::Linear }
}

/// Whether a loader that knows nothing of this format may apply it.
pub(super) fn is_plain(target: &Target, low_rank: &LowRank) -> bool {
    target.parameter == "weight"
        && low_rank.magnitude.is_none()
        && matches!(low_rank.layer, Layer::Linear | Layer::Convolution)
}

/// What an entry of `overrides` calls a component with a scaling: its module, if the parameter is
/// the module's `weight`, else the parameter.
pub(super) fn scaling_key(target: &Target) -> String {
    if target.parameter == "weight" { target.module.clone() } else { target.name() }
}

/// Whether the format can hold a component.
pub(super) fn is_held(component: &Component) -> bool {
    let Component { target, form } = component;
    let role = match form {
        Form::LowRank(low_rank) => {
            if low_rank.rank_gain.is_some() || low_rank.layer == Layer::Merged {
                return false;
            }
            factor_roles(target, low_rank)[0]
        }
        Form::Replaced(_) => Role::Value,
        Form::Rows { .. } => Role::Rows,
        Form::Added { .. } => Role::Added,
        _ => return false,
    };
    is_nameable(target, role)
}

/// The features that components make a file require.
pub(super) fn features(components: &[Component]) -> BTreeSet<&'static str> {
    let mut features = BTreeSet::new();
    for component in components {
        match &component.form {
            Form::LowRank(low_rank) => {
                features.insert(match low_rank.layer {
                    Layer::Convolution => "convolution",
                    Layer::Embedding => "embedding",
                    Layer::Linear | Layer::Merged => "low-rank",
                });
                if low_rank.magnitude.is_some() {
                    features.insert("magnitude");
                }
            }
            Form::Replaced(_) => drop(features.insert("replace")),
            Form::Rows { .. } => drop(features.insert("replace-rows")),
            Form::Added { .. } => drop(features.insert("add")),
            _ => {}
        }
    }
    features
}

/// What of several components of one parameter cannot act together (F30). They must be sorted by
/// target.
pub(super) fn clashes(components: &[Component]) -> Vec<AdapterProblem> {
    let same = |x: &Component, y: &Component| x.target == y.target;
    let mut problems = Vec::new();
    for group in components.chunk_by(same).filter(|group| group.len() > 1) {
        for (index, first) in group.iter().enumerate() {
            if let Some(second) = group[index + 1..].iter().find(|it| clash(&first.form, &it.form))
            {
                problems.push(AdapterProblem::Clash {
                    parameter: first.target.name(),
                    first: first.form.method(),
                    second: second.form.method(),
                });
            }
        }
    }
    problems
}

fn clash(first: &Form, second: &Form) -> bool {
    let rows = |form: &Form| matches!(form, Form::Rows { .. });
    let changes = |form: &Form| matches!(form, Form::LowRank(_) | Form::Added { .. });
    std::mem::discriminant(first) == std::mem::discriminant(second)
        || (rows(first) && changes(second))
        || (changes(first) && rows(second))
}
