//! Which components the format holds, and what their tensors are called (`docs/FORMAT.md`,
//! sections 2 and 7).
//!
//! A plain low-rank change bears the names that today's loaders know, after its module. Everything
//! else is named after its parameter, with an infix that no other loader matches, so that none
//! applies it wrongly.

use std::collections::BTreeSet;

use super::forms::{self, Label};
use super::shapes;
use crate::error::AdapterProblem;
use crate::model::{Component, Form, GainAxis, Layer, LowRank, Target};
use crate::tensor::Tensor;

/// What stands between a parameter's name and a role, where other loaders must not look.
const INFIX: &str = ".lora:";

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
    /// The same of fused projections.
    MergedA,
    MergedB,
    /// AdaLoRA's E.
    RankGain,
    /// DoRA's m, per output feature.
    Magnitude,
    /// The same per input feature.
    InMagnitude,
    /// The whole parameter.
    Value,
    /// The parameter as it was before training.
    Base,
    /// Rows of it, and which they are.
    Rows,
    Indices,
    /// A change in full, and its s.
    Added,
    Scale,
    /// A tensor of a form that has roles of its own.
    Of(Label, &'static str),
}

impl Role {
    /// Every role but those of forms, with the end of its tensors' names. None is the end of
    /// another.
    const SUFFIXES: [(Role, &str); 18] = [
        (Role::PlainA, ".lora_A.weight"),
        (Role::PlainB, ".lora_B.weight"),
        (Role::Alpha, ".alpha"),
        (Role::A, ".lora:A"),
        (Role::B, ".lora:B"),
        (Role::EmbeddingA, ".lora:embedding_A"),
        (Role::EmbeddingB, ".lora:embedding_B"),
        (Role::MergedA, ".lora:merged_A"),
        (Role::MergedB, ".lora:merged_B"),
        (Role::RankGain, ".lora:rank_gain"),
        (Role::Magnitude, ".lora:magnitude"),
        (Role::InMagnitude, ".lora:in_magnitude"),
        (Role::Value, ".lora:value"),
        (Role::Base, ".lora:base"),
        (Role::Rows, ".lora:rows"),
        (Role::Indices, ".lora:indices"),
        (Role::Added, ".lora:added"),
        (Role::Scale, ".lora:scale"),
    ];

    /// The roles of factors that `scaling` and `overrides` scale: A, B.
    pub(super) const FACTORS: [[Role; 2]; 4] = [
        [Role::PlainA, Role::PlainB],
        [Role::A, Role::B],
        [Role::EmbeddingA, Role::EmbeddingB],
        [Role::MergedA, Role::MergedB],
    ];

    /// Whether it is a factor, whose component has a scaling.
    pub(super) fn is_factor(self) -> bool {
        Role::FACTORS.as_flattened().contains(&self)
    }

    /// Whether its tensors are named after a module, whose `weight` is meant.
    fn is_plain(self) -> bool {
        matches!(self, Role::PlainA | Role::PlainB | Role::Alpha)
    }

    /// The name of the tensor of this role.
    pub(super) fn name(self, target: &Target) -> String {
        if let Role::Of(label, role) = self {
            return form_tensor(target, label, None, role);
        }
        let suffix = Role::SUFFIXES.iter().find(|entry| entry.0 == self).map_or("", |it| it.1);
        let owner = if self.is_plain() { target.module.clone() } else { target.name() };
        owner + suffix
    }

    /// The target and the role that a tensor's name says; `None` if it says none.
    pub(super) fn of(name: &str) -> Option<(Target, Role)> {
        let (owner, role) = Role::SUFFIXES
            .iter()
            .find_map(|&(role, suffix)| Some((name.strip_suffix(suffix)?, role)))
            .or_else(|| Role::of_form(name))?;
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

    fn of_form(name: &str) -> Option<(&str, Role)> {
        let (owner, rest) = name.rsplit_once(INFIX)?;
        let (label, role) = rest.rsplit_once('.')?;
        let label = Label::of(label)?;
        Some((owner, Role::Of(label, shapes::role_named(label.form, role)?)))
    }
}

/// A factor that several components share: the number of its pair, and whether it is A or B.
pub(super) fn shared_factor(name: &str) -> Option<(usize, &'static str)> {
    let (number, factor) = name.strip_prefix("lora:shared.")?.split_once('.')?;
    let factor = ["A", "B"].into_iter().find(|known| *known == factor)?;
    Some((forms::decimal(number)?, factor))
}

/// The name of such a factor.
pub(super) fn shared_name(number: usize, factor: &str) -> String {
    format!("lora:shared.{number}.{factor}")
}

/// The name of a tensor of a form; `factors` is the number of those that the component shares.
pub(super) fn form_tensor(
    target: &Target,
    label: Label,
    factors: Option<usize>,
    role: &str,
) -> String {
    match factors {
        Some(number) if role == "A" || role == "B" => shared_name(number, role),
        _ => format!("{}{INFIX}{}.{role}", target.name(), label.text()),
    }
}

/// Whether the names of a target's tensors tell the target again.
fn is_nameable(target: &Target, role: Role) -> bool {
    let named = if role.is_plain() { &target.module } else { &target.parameter };
    !named.is_empty() && !target.parameter.contains('.')
}

/// A low-rank change with what decomposes it, however the model has it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Factored<'a> {
    pub(super) low_rank: &'a LowRank,
    pub(super) magnitude: Option<&'a Tensor>,
    pub(super) in_magnitude: Option<&'a Tensor>,
}

impl<'a> Factored<'a> {
    /// The low-rank change that a form is; `None` of another, and of one decomposed twice.
    pub(super) fn of(form: &'a Form) -> Option<Factored<'a>> {
        match form {
            Form::LowRank(low_rank) => Some(Factored {
                low_rank,
                magnitude: low_rank.magnitude.as_ref(),
                in_magnitude: None,
            }),
            Form::Decomposed(form) => {
                let inner = Factored::of(&form.change)?;
                let is_bare = inner.magnitude.is_none() && inner.in_magnitude.is_none();
                let of = |axis| (form.axis == axis).then_some(&form.magnitude);
                let (magnitude, in_magnitude) = (of(GainAxis::Out), of(GainAxis::In));
                is_bare.then_some(Factored { magnitude, in_magnitude, ..inner })
            }
            _ => None,
        }
    }

    /// Whether a loader that knows nothing of this format may apply it.
    pub(super) fn is_plain(self, target: &Target) -> bool {
        target.parameter == "weight"
            && self.gains().next().is_none()
            && matches!(self.low_rank.layer, Layer::Linear | Layer::Convolution)
    }

    /// The roles of its factors: A, B.
    pub(super) fn roles(self, target: &Target) -> [Role; 2] {
        match self.low_rank.layer {
            Layer::Embedding => [Role::EmbeddingA, Role::EmbeddingB],
            Layer::Merged => [Role::MergedA, Role::MergedB],
            _ if self.is_plain(target) => [Role::PlainA, Role::PlainB],
            _ => [Role::A, Role::B],
        }
    }

    /// What it has besides factors.
    pub(super) fn gains(self) -> impl Iterator<Item = (Role, &'a Tensor)> {
        let gains = [
            (Role::RankGain, self.low_rank.rank_gain.as_ref()),
            (Role::Magnitude, self.magnitude),
            (Role::InMagnitude, self.in_magnitude),
        ];
        gains.into_iter().filter_map(|(role, tensor)| Some((role, tensor?)))
    }
}

/// The kind of layer that A belongs to, if its role does not say.
pub(super) fn layer_of(a: &Tensor) -> Layer {
    if (3..=5).contains(&a.shape.len()) { Layer::Convolution } else { Layer::Linear }
}

/// What the configuration calls a component where it scales it or states facts of it: its module,
/// if the parameter is the module's `weight`, else the parameter.
pub(super) fn short_name(target: &Target) -> String {
    if target.parameter == "weight" { target.module.clone() } else { target.name() }
}

/// Whether the format can hold a component.
pub(super) fn is_held(component: &Component) -> bool {
    let Component { target, form } = component;
    let role = match form {
        Form::Replaced(_) => Role::Value,
        Form::Base(_) => Role::Base,
        Form::Rows { .. } => Role::Rows,
        Form::Added { .. } => Role::Added,
        form => match (Factored::of(form), forms::take_apart(form)) {
            // No rule says how gains of several groups would act.
            (Some(it), _) if it.low_rank.layer == Layer::Merged && it.gains().next().is_some() => {
                return false;
            }
            (Some(factored), _) => factored.roles(target)[0],
            (None, Some(parts)) => Role::Of(parts.label, ""),
            (None, None) => return false,
        },
    };
    is_nameable(target, role)
}

/// The features that components make a file require.
pub(super) fn features(components: &[&Component]) -> BTreeSet<&'static str> {
    let mut features = BTreeSet::new();
    for Component { form, .. } in components.iter().copied() {
        let axis = match form {
            Form::Decomposed(form) => Some(form.axis),
            Form::LowRank(LowRank { magnitude: Some(_), .. }) => Some(GainAxis::Out),
            _ => None,
        };
        features.extend(axis.map(|axis| match axis {
            GainAxis::Out => "magnitude",
            GainAxis::In => "in-magnitude",
        }));
        let low_rank = Factored::of(form).map(|factored| factored.low_rank);
        features.extend(low_rank.and_then(|it| it.rank_gain.as_ref()).map(|_| "rank-gain"));
        features.insert(match (form, low_rank.map(|it| it.layer)) {
            (_, Some(Layer::Linear)) => "low-rank",
            (_, Some(Layer::Convolution)) => "convolution",
            (_, Some(Layer::Embedding)) => "embedding",
            (_, Some(Layer::Merged)) => "merged",
            (Form::Replaced(_), None) => "replace",
            (Form::Rows { .. }, None) => "replace-rows",
            (Form::Added { .. }, None) => "add",
            (form, None) => form.name(),
        });
    }
    features
}

/// What of several components of one parameter cannot act together (F30). They must be sorted by
/// target.
pub(super) fn clashes(components: &[&Component]) -> Vec<AdapterProblem> {
    let same = |x: &&Component, y: &&Component| x.target == y.target;
    let mut problems = Vec::new();
    for group in components.chunk_by(same).filter(|group| group.len() > 1) {
        for (index, first) in group.iter().enumerate() {
            let mut others = group.iter().skip(index + 1);
            if let Some(second) = others.find(|other| clash(&first.form, &other.form)) {
                problems.push(AdapterProblem::Clash {
                    parameter: first.target.name(),
                    first: first.form.method(),
                    second: second.form.method(),
                });
            }
        }
    }
    // A parameter of the model itself has the short name that a module's `weight` may have (F13).
    let own: BTreeSet<&str> = components
        .iter()
        .filter(|component| component.target.module.is_empty())
        .map(|component| component.target.parameter.as_str())
        .collect();
    let named = |component: &&&Component| {
        let Target { module, parameter } = &component.target;
        parameter == "weight" && own.contains(module.as_str())
    };
    let both: BTreeSet<&str> =
        components.iter().filter(named).map(|component| &*component.target.module).collect();
    problems
        .extend(both.into_iter().map(|name| AdapterProblem::ShortName { name: name.to_owned() }));
    problems
}

fn clash(first: &Form, second: &Form) -> bool {
    let rows = |form: &Form| matches!(form, Form::Rows { .. });
    let whole = |form: &Form| matches!(form, Form::Replaced(_) | Form::Base(_));
    let changes = |form: &Form| !rows(form) && !whole(form);
    let depends = |form: &Form| changes(form) && !form.is_additive();
    let same = match (first, second) {
        // Nested wrappers.
        (Form::Experts(first), Form::Experts(second)) => first.depth == second.depth,
        _ => first.name() == second.name(),
    };
    same || (whole(first) && whole(second))
        || (rows(first) && changes(second))
        || (changes(first) && rows(second))
        || (depends(first) && depends(second))
}
