//! Forms ⇄ tensors by role, and *facts*: what their tensors do not say (`docs/FORMAT.md`,
//! section 7).
//!
//! The forms that section 2 of the document describes have neither: their roles have names of
//! their own, and their scalings stand apart.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};

use super::config::number_value;
use super::shapes::{self, block_of};
use crate::error::{AdapterProblem, Error, Result, Shape};
use crate::limits;
use crate::model::{
    Bounded, Butterfly, Candidate, Cores, Decomposed, Experts, Form, Gain, GainAxis, GainStored,
    Grid, Hadamard, Kronecker, KroneckerSide, Layer, LowRank, Reflections, Rotation, Scaling,
    ScalingRule, Shared, Sparse, Target, Tiled, TiledRule, Tucker,
};
use crate::tensor::Tensor;

/// A form as names and groups of facts call it: its name, and of experts the depth behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Label {
    pub(super) form: &'static str,
    /// How many wrappers lie inside; 0 of what is not nested.
    pub(super) depth: usize,
}

impl Label {
    /// `hadamard`, `experts.0`.
    pub(super) fn text(self) -> String {
        if self.form == EXPERTS {
            format!("{EXPERTS}.{}", self.depth)
        } else {
            self.form.to_owned()
        }
    }

    /// The label of that text.
    pub(super) fn of(text: &str) -> Option<Label> {
        let (name, depth) = match text.split_once('.') {
            Some((name, digits)) => (name, decimal(digits)?),
            None => (text, 0),
        };
        let form = shapes::form_named(name)?;
        let nested = text.len() > name.len();
        (nested == (form == EXPERTS)).then_some(Label { form, depth })
    }
}

const EXPERTS: &str = "experts";
/// The form whose components share factors.
pub(super) const SHARED: &str = "shared";

/// A number as it is written: without sign or leading zeros.
pub(super) fn decimal(digits: &str) -> Option<usize> {
    let number: usize = digits.parse().ok()?;
    (number.to_string() == digits).then_some(number)
}

/// A form in its parts.
pub(super) struct Parts<'a> {
    pub(super) label: Label,
    /// Its tensors by role; of VeRA, also those that other components share.
    pub(super) tensors: Vec<(&'static str, &'a Tensor)>,
    /// What they do not say; of VeRA, without the number of its factors.
    pub(super) facts: Map<String, Value>,
}

/// The parts of a form, or `None` of one that has no such names.
pub(super) fn take_apart(form: &Form) -> Option<Parts<'_>> {
    let mut facts = Map::new();
    let mut say = |name: &str, value: Value| drop(facts.insert(name.to_owned(), value));
    let mut depth = 0;
    let tensors = match form {
        Form::Decomposed(form) => {
            let mut parts = take_apart(&form.change)?;
            let decomposed = parts.tensors.iter().any(|entry| entry.0.ends_with("magnitude"));
            if decomposed || parts.label.form == EXPERTS {
                return None;
            }
            parts.tensors.push((magnitude_role(form.axis), &form.magnitude));
            return Some(parts);
        }
        Form::Bounded(form) => {
            vec![("A", &form.a), ("B", &form.b), ("bound", &form.bound), ("norms", &form.norms)]
        }
        Form::Butterfly(form) => vec![("generators", &form.generators), ("gain", &form.gain)],
        Form::Circulant(kernels) => vec![("kernels", kernels)],
        Form::Experts(form) => {
            depth = form.depth;
            say("candidates", form.candidates.iter().map(candidate_value).collect());
            vec![("A", &form.a), ("B", &form.b)]
        }
        Form::Gain(form) => {
            say("axis", axis_name(form.axis).into());
            say("stored", stored_name(form.stored).into());
            vec![("gain", &form.gain)]
        }
        Form::Grid(form) => {
            say("scaling", scaling_value(form.scaling));
            say("rank", form.rank.into());
            vec![("A", &form.a), ("B", &form.b)]
        }
        Form::Hadamard(form) => {
            say("scaling", scaling_value(form.scaling));
            say("rank", form.rank.into());
            let first = cores(&form.first, ["t1", "w1a", "w1b"]);
            first.chain(cores(&form.second, ["t2", "w2a", "w2b"])).collect()
        }
        Form::Kronecker(form) => {
            say("scaling", scaling_value(form.scaling));
            say("rank", form.rank.into());
            let left = side(&form.left, "w1", ["t1", "w1a", "w1b"]);
            left.into_iter().chain(side(&form.right, "w2", ["t2", "w2a", "w2b"])).collect()
        }
        Form::Proportional(form) => {
            say("scaling", scaling_value(form.scaling));
            proportional(form)?
        }
        Form::Reflections(form) => {
            say("orthogonal", form.orthogonal.into());
            vec![("vectors", &form.vectors)]
        }
        Form::Rotation(form) => {
            say("layer", layer_name(form.layer)?.into());
            if let Some(terms) = form.neumann_terms {
                say("neumann_terms", terms.into());
            }
            if let Some(radius) = form.radius {
                say("radius", number_value(radius));
            }
            vec![("generators", &form.generators)]
        }
        Form::Shared(form) => vec![
            ("A", &form.a),
            ("B", &form.b),
            ("in_gain", &form.in_gain),
            ("out_gain", &form.out_gain),
        ],
        Form::Sparse(form) => vec![("values", &form.values), ("indices", &form.indices)],
        Form::Tiled(form) => match form.rule {
            TiledRule::Add => vec![("block", &form.block)],
            TiledRule::Bat => vec![("bat", &form.block)],
        },
        Form::Tucker(form) => {
            say("scaling", scaling_value(form.scaling));
            vec![("A", &form.a), ("B", &form.b), ("mid", &form.core)]
        }
        Form::LowRank(_)
        | Form::Added { .. }
        | Form::Replaced(_)
        | Form::Rows { .. }
        | Form::Base(_) => return None,
    };
    Some(Parts { label: Label { form: form.name(), depth }, tensors, facts })
}

/// The role of the magnitudes of these features.
pub(super) fn magnitude_role(axis: GainAxis) -> &'static str {
    match axis {
        GainAxis::Out => "magnitude",
        GainAxis::In => "in_magnitude",
    }
}

fn cores<'a>(
    cores: &'a Cores,
    [core, b, a]: [&'static str; 3],
) -> impl Iterator<Item = (&'static str, &'a Tensor)> {
    let factors = [(b, &cores.b), (a, &cores.a)];
    cores.core.iter().map(move |tensor| (core, tensor)).chain(factors)
}

fn side<'a>(
    side: &'a KroneckerSide,
    full: &'static str,
    product: [&'static str; 3],
) -> Vec<(&'static str, &'a Tensor)> {
    match side {
        KroneckerSide::Full(tensor) => vec![(full, tensor)],
        KroneckerSide::Product(factors) => cores(factors, product).collect(),
    }
}

fn proportional(form: &LowRank) -> Option<Vec<(&'static str, &Tensor)>> {
    if form.magnitude.is_some() || form.rank_gain.is_some() {
        return None;
    }
    match form.layer {
        Layer::Embedding => Some(vec![("embedding_A", &form.a), ("embedding_B", &form.b)]),
        layer if layer == matrix_layer(&form.a) => Some(vec![("A", &form.a), ("B", &form.b)]),
        _ => None,
    }
}

/// The kind of layer that A's dimensions tell.
fn matrix_layer(a: &Tensor) -> Layer {
    if a.shape.len() > 2 { Layer::Convolution } else { Layer::Linear }
}

fn axis_name(axis: GainAxis) -> &'static str {
    match axis {
        GainAxis::In => "in",
        GainAxis::Out => "out",
    }
}

fn stored_name(stored: GainStored) -> &'static str {
    match stored {
        GainStored::Whole => "whole",
        GainStored::LessOne => "less-one",
    }
}

/// The name of a layer that is turned; of fused projections there is none.
fn layer_name(layer: Layer) -> Option<&'static str> {
    match layer {
        Layer::Linear => Some("linear"),
        Layer::Convolution => Some("convolution"),
        Layer::Embedding => Some("embedding"),
        Layer::Merged => None,
    }
}

fn scaling_value(scaling: Scaling) -> Value {
    let alpha = ("alpha".to_owned(), number_value(scaling.alpha));
    Map::from_iter([alpha, ("rule".to_owned(), scaling.rule.name().into())]).into()
}

fn candidate_value(candidate: &Candidate) -> Value {
    let scaling = ("scaling".to_owned(), scaling_value(candidate.scaling));
    Map::from_iter([scaling, ("rank".to_owned(), candidate.rank.into())]).into()
}

/// What the facts of a form must be, and its tensors beside the shapes that the table gives (F33 to
/// F52); `name` is what the tensor of a role is called.
pub(super) fn check(
    target: &Target,
    form: &Form,
    name: &dyn Fn(&str) -> String,
) -> Vec<AdapterProblem> {
    let parameter = target.name();
    let mut problems = Vec::new();
    let form = match form {
        Form::Decomposed(form) => &*form.change,
        form => form,
    };
    let mut scaled = |scaling: Scaling, rank: usize| {
        let module = parameter.clone();
        if !(1..=limits::RANK).contains(&rank) {
            let limit = limits::RANK;
            problems.push(AdapterProblem::RankRange { module, rank, limit });
        } else if !scaling.scale(rank).is_finite() {
            let scale = scaling.scale(rank);
            problems.push(AdapterProblem::Scale { module, scale });
        }
    };
    match form {
        Form::Tucker(form) => scaled(form.scaling, form.rank()),
        Form::Proportional(form) => scaled(form.scaling, form.rank()),
        Form::Hadamard(form) => scaled(form.scaling, form.rank),
        Form::Kronecker(form) => scaled(form.scaling, form.rank),
        Form::Grid(form) => scaled(form.scaling, form.rank),
        Form::Experts(form) => {
            form.candidates.iter().for_each(|it| scaled(it.scaling, it.rank));
        }
        Form::Rotation(Rotation { radius: Some(radius), .. })
            if !radius.is_finite() || *radius < 0.0 =>
        {
            let (parameter, radius) = (parameter.clone(), *radius);
            problems.push(AdapterProblem::Radius { parameter, radius });
        }
        _ => {}
    }
    if problems.is_empty() {
        problems.extend(misfit(target, form, name));
    }
    problems
}

/// What no product of lengths says.
fn misfit(target: &Target, form: &Form, name: &dyn Fn(&str) -> String) -> Option<AdapterProblem> {
    let wrong = |role: &str, tensor: &Tensor, expected| {
        let shape = Shape(tensor.shape.clone());
        AdapterProblem::FactorShape { tensor: name(role), shape, expected }
    };
    match form {
        Form::Rotation(form) => {
            let elements = form.generators.shape.get(1).copied().and_then(block_of);
            let expected = "its rows are the elements above a block's diagonal";
            let fits = elements == Some(form.block);
            (!fits).then(|| wrong("generators", &form.generators, expected))
        }
        Form::Grid(form) => {
            let whole = matches!(*form.a.shape, [k, _, rank] if k > 0 && rank % k == 0);
            (!whole).then(|| wrong("A", &form.a, "the rank is a multiple of k"))
        }
        Form::Shared(form) => {
            let more = form.out_gain.shape.first() > form.b.shape.first();
            let expected = "it has at most as many values as the shared B has rows";
            more.then(|| wrong("out_gain", &form.out_gain, expected))
        }
        Form::Experts(form) => {
            let named = form.candidates.iter().map(|candidate| candidate.parameter.as_str());
            if !named.eq(target.parameter.split('|'))
                || target.parameter.split('|').any(str::is_empty)
            {
                let (parameter, candidates) = (target.name(), form.candidates.len());
                return Some(AdapterProblem::Candidates { parameter, candidates });
            }
            let rows = form.a.shape.first().copied().unwrap_or(0);
            let whole = form.candidates.iter().all(|it| it.rank > 0 && rows % it.rank == 0);
            let expected = "its rows are a multiple of every candidate's rank";
            (!whole).then(|| wrong("A", &form.a, expected))
        }
        _ => None,
    }
}

/// The facts that a form must have, and those that it may.
fn members(form: &str) -> (&'static [&'static str], &'static [&'static str]) {
    match form {
        "experts" => (&["candidates"], &[]),
        "gain" => (&["axis", "stored"], &[]),
        "grid" | "hadamard" | "kronecker" => (&["scaling", "rank"], &[]),
        "proportional" | "tucker" => (&["scaling"], &[]),
        "reflections" => (&["orthogonal"], &[]),
        "rotation" => (&["layer"], &["neumann_terms", "radius"]),
        SHARED => (&["factors"], &[]),
        _ => (&[], &[]),
    }
}

/// Whether anything must be said of a form besides its tensors.
pub(super) fn has_facts(form: &str) -> bool {
    !members(form).0.is_empty()
}

/// What a group says of its components. What a form must have is there.
#[derive(Clone, Debug, Default)]
pub(super) struct Facts {
    axis: Option<GainAxis>,
    stored: Option<GainStored>,
    layer: Option<Layer>,
    neumann_terms: Option<usize>,
    radius: Option<f64>,
    orthogonal: Option<bool>,
    scaling: Option<Scaling>,
    rank: Option<usize>,
    candidates: Option<Vec<(Scaling, usize)>>,
    /// The number of the factors that a component shares.
    pub(super) factors: Option<usize>,
}

impl Facts {
    /// The facts of a group: each a member that the form has, of the kind that it must be (F33).
    ///
    /// # Errors
    /// [`Error::Config`].
    pub(super) fn of(path: &Path, label: Label, members: &Map<String, Value>) -> Result<Facts> {
        let (required, optional) = self::members(label.form);
        let wrong = |name: &str, expected, found: &Value| {
            Error::config(path, &format!("forms.{}.{name}", label.text()), expected, found)
        };
        let mut facts = Facts::default();
        for (name, value) in members.iter().filter(|entry| !entry.1.is_null()) {
            if !required.iter().chain(optional).any(|known| known == name) {
                return Err(wrong(name, "absent: the form has no such fact", value));
            }
            if !facts.set(name, value) {
                return Err(wrong(name, expected(name), value));
            }
        }
        let present = |name: &str| members.get(name).is_some_and(|value| !value.is_null());
        match required.iter().find(|name| !present(name)) {
            Some(missing) => Err(wrong(missing, expected(missing), &Value::Null)),
            None => Ok(facts),
        }
    }

    /// Whether the value is one that the fact may have.
    fn set(&mut self, name: &str, value: &Value) -> bool {
        fn put<T>(place: &mut Option<T>, value: Option<T>) -> bool {
            *place = value;
            place.is_some()
        }
        match name {
            "axis" => put(&mut self.axis, one_of(value, [GainAxis::In, GainAxis::Out], axis_name)),
            "stored" => {
                let all = [GainStored::Whole, GainStored::LessOne];
                put(&mut self.stored, one_of(value, all, stored_name))
            }
            "layer" => {
                let all = [Layer::Linear, Layer::Convolution, Layer::Embedding];
                put(&mut self.layer, one_of(value, all, |it| layer_name(it).unwrap_or_default()))
            }
            "neumann_terms" => put(&mut self.neumann_terms, count(value)),
            "radius" => put(&mut self.radius, value.as_f64()),
            "orthogonal" => put(&mut self.orthogonal, value.as_bool()),
            "scaling" => put(&mut self.scaling, scaling(value)),
            "rank" => put(&mut self.rank, count(value)),
            "factors" => put(&mut self.factors, count(value)),
            "candidates" => put(&mut self.candidates, candidates(value)),
            _ => false,
        }
    }
}

/// What a fact must be.
fn expected(name: &str) -> &'static str {
    match name {
        "axis" => "`in` or `out`",
        "stored" => "`whole` or `less-one`",
        "layer" => "`linear`, `convolution` or `embedding`",
        "orthogonal" => "a boolean",
        "radius" => "a number",
        "scaling" => "an object of `alpha` and `rule`",
        "candidates" => "a list of objects of `scaling` and `rank`",
        _ => "a count",
    }
}

fn one_of<T: Copy, const N: usize>(
    value: &Value,
    all: [T; N],
    name: impl Fn(T) -> &'static str,
) -> Option<T> {
    let text = value.as_str()?;
    all.into_iter().find(|&known| name(known) == text)
}

fn count(value: &Value) -> Option<usize> {
    usize::try_from(value.as_u64()?).ok()
}

fn scaling(value: &Value) -> Option<Scaling> {
    let object = value.as_object().filter(|object| object.len() == 2)?;
    let rule = ScalingRule::from_name(object.get("rule")?.as_str()?)?;
    Some(Scaling { alpha: object.get("alpha")?.as_f64()?, rule })
}

fn candidates(value: &Value) -> Option<Vec<(Scaling, usize)>> {
    let candidate = |value: &Value| {
        let object = value.as_object().filter(|object| object.len() == 2)?;
        Some((scaling(object.get("scaling")?)?, count(object.get("rank")?)?))
    };
    value.as_array()?.iter().map(candidate).collect()
}

/// The tensors of one component by role.
pub(super) type Roles = BTreeMap<&'static str, Tensor>;

/// The form of these tensors and facts, or `None` if one is missing; which, [`shapes::check`]
/// says. Of VeRA, `roles` has the shared factors, too.
pub(super) fn put_together(
    target: &Target,
    label: Label,
    mut roles: Roles,
    facts: &Facts,
) -> Option<Form> {
    for axis in [GainAxis::Out, GainAxis::In] {
        if let Some(magnitude) = roles.remove(magnitude_role(axis)) {
            let change = Box::new(put_together(target, label, roles, facts)?);
            return Some(Form::Decomposed(Decomposed { change, magnitude, axis }));
        }
    }
    let mut take = |role: &str| roles.remove(role);
    Some(match label.form {
        "bounded" => Form::Bounded(Bounded {
            a: take("A")?,
            b: take("B")?,
            bound: take("bound")?,
            norms: take("norms")?,
        }),
        "butterfly" => {
            Form::Butterfly(Butterfly { generators: take("generators")?, gain: take("gain")? })
        }
        "circulant" => Form::Circulant(take("kernels")?),
        EXPERTS => {
            let mut names = target.parameter.split('|');
            let candidate = |&(scaling, rank): &(Scaling, usize)| {
                // Of too many, the last are found to have no name.
                let parameter = names.next().unwrap_or_default().to_owned();
                Candidate { parameter, scaling, rank }
            };
            let candidates = facts.candidates.as_ref()?.iter().map(candidate).collect();
            Form::Experts(Experts { a: take("A")?, b: take("B")?, depth: label.depth, candidates })
        }
        "gain" => {
            Form::Gain(Gain { gain: take("gain")?, axis: facts.axis?, stored: facts.stored? })
        }
        "grid" => Form::Grid(Grid {
            a: take("A")?,
            b: take("B")?,
            scaling: facts.scaling?,
            rank: facts.rank?,
        }),
        "hadamard" => Form::Hadamard(Hadamard {
            first: Cores { b: take("w1a")?, a: take("w1b")?, core: take("t1") },
            second: Cores { b: take("w2a")?, a: take("w2b")?, core: take("t2") },
            scaling: facts.scaling?,
            rank: facts.rank?,
        }),
        "kronecker" => {
            let mut side = |full, [core, b, a]: [&str; 3]| {
                Some(match take(full) {
                    Some(tensor) => KroneckerSide::Full(tensor),
                    None => {
                        KroneckerSide::Product(Cores { b: take(b)?, a: take(a)?, core: take(core) })
                    }
                })
            };
            Form::Kronecker(Kronecker {
                left: side("w1", ["t1", "w1a", "w1b"])?,
                right: side("w2", ["t2", "w2a", "w2b"])?,
                scaling: facts.scaling?,
                rank: facts.rank?,
            })
        }
        "proportional" => {
            let scaling = facts.scaling?;
            let (a, b, layer) = match take("A") {
                Some(a) => (a, take("B")?, None),
                None => (take("embedding_A")?, take("embedding_B")?, Some(Layer::Embedding)),
            };
            let layer = layer.unwrap_or_else(|| matrix_layer(&a));
            Form::Proportional(LowRank { layer, ..LowRank::linear(a, b, scaling) })
        }
        "reflections" => Form::Reflections(Reflections {
            vectors: take("vectors")?,
            orthogonal: facts.orthogonal?,
        }),
        "rotation" => {
            let generators = take("generators")?;
            Form::Rotation(Rotation {
                block: block_of(*generators.shape.get(1)?)?,
                generators,
                layer: facts.layer?,
                neumann_terms: facts.neumann_terms,
                radius: facts.radius,
            })
        }
        SHARED => Form::Shared(Shared {
            a: take("A")?,
            b: take("B")?,
            in_gain: take("in_gain")?,
            out_gain: take("out_gain")?,
        }),
        "sparse" => Form::Sparse(Sparse { indices: take("indices")?, values: take("values")? }),
        "tiled" => {
            let (block, rule) = match take("block") {
                Some(block) => (block, TiledRule::Add),
                None => (take("bat")?, TiledRule::Bat),
            };
            Form::Tiled(Tiled { block, rule })
        }
        "tucker" => Form::Tucker(Tucker {
            a: take("A")?,
            b: take("B")?,
            core: take("mid")?,
            scaling: facts.scaling?,
        }),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_is_read_as_it_is_written() {
        for text in ["hadamard", "experts.0", "experts.12", "shared"] {
            assert_eq!(Label::of(text).map(Label::text).as_deref(), Some(text));
        }
        for text in
            ["experts", "experts.", "experts.01", "experts.+1", "hadamard.0", "low-rank", ""]
        {
            assert_eq!(Label::of(text), None, "{text}");
        }
    }

    #[test]
    fn every_fact_that_a_form_must_have_can_be_set() {
        let value = |name: &str| match name {
            "axis" => Value::from("in"),
            "stored" => "less-one".into(),
            "layer" => "convolution".into(),
            "orthogonal" => true.into(),
            "radius" => number_value(0.5),
            "scaling" => scaling_value(Scaling::of_rank(3)),
            "candidates" => Value::Array(Vec::new()),
            _ => 7.into(),
        };
        for form in
            ["experts.0", "gain", "grid", "proportional", "reflections", "rotation", "shared"]
        {
            let Some(label) = Label::of(form) else { panic!("{form}") };
            let (required, optional) = members(label.form);
            for name in required.iter().chain(optional) {
                assert!(Facts::default().set(name, &value(name)), "{name}");
                assert!(!Facts::default().set(name, &Value::from(vec![1])), "{name}");
            }
            assert!(has_facts(label.form));
        }
        assert!(!has_facts("butterfly"));
    }
}
