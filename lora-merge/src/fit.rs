//! Placed components → targets: what falls on one parameter, whether it can act together, and how
//! each change lies in the stored matrix.

use std::collections::BTreeMap;

use lora_format::checkpoint::Checkpoint;
use lora_format::model::{Component, Form, Layer};
use lora_format::vocabulary;
use lora_format::{Shape, Tensor};

use crate::error::{PlanProblem, ShapeCause};
use crate::low_rank::{self, Term};
use crate::names;
use crate::operator::{self, Features, Matrix};
use crate::orientation::{FromShape, Judge, Orientation, from_shape, misfit};
use crate::parameters::{Parameter, Parameters, Source};
use crate::place::{Part, Placed};
use crate::plan::{Change, MergeOptions, OperatorChange, PlannedTarget, Slab, WeightedAdapter};
use crate::resolve;
use crate::tied::Ties;

/// What the planning of targets needs to see.
pub(crate) struct Inputs<'a> {
    pub(crate) base: &'a Checkpoint,
    pub(crate) parameters: &'a Parameters,
    pub(crate) adapters: &'a [WeightedAdapter],
    pub(crate) ties: &'a Ties,
    pub(crate) options: &'a MergeOptions,
}

/// A parameter of the output with everything that falls on it.
struct Group<'a> {
    parameter: Option<usize>,
    name: String,
    placed: Vec<&'a Placed>,
    /// The base copy or the replacement, if one is brought.
    brought: Option<&'a Placed>,
}

/// The targets of a merge, sorted by name, and the components that have no part in them because
/// another one makes them superfluous.
pub(crate) fn targets(
    inputs: &Inputs<'_>,
    placed: &[Placed],
    problems: &mut Vec<PlanProblem>,
) -> (Vec<PlannedTarget>, Vec<Key>) {
    let mut superfluous = Vec::new();
    let groups = inputs.groups(placed, &mut superfluous, problems);
    let orientations = inputs.orientations(&groups, problems);
    let mut targets: Vec<PlannedTarget> = Vec::with_capacity(groups.len());
    for group in &groups {
        targets.extend(inputs.target(group, &orientations, problems));
    }
    if let Some(head) = &inputs.ties.head
        && targets.iter().all(|target| target.name != head.name)
    {
        // The head stays what the embedding was; only the embedding changes.
        let embedding = inputs.parameters.get(head.embedding);
        targets.push(PlannedTarget {
            parameter: None,
            name: head.name.clone(),
            shape: embedding.shape.clone(),
            dtype: embedding.dtype,
            source: embedding.source,
            key: head.name.clone(),
            kernel: 1,
            stacked: false,
            slabs: vec![Slab::default()],
            rows: Vec::new(),
            changes: Vec::new(),
        });
    }
    refuse_twins(&targets, problems);
    targets.sort_by(|a, b| a.name.cmp(&b.name));
    (targets, superfluous)
}

/// Two new parameters of one head under two names: `score.weight` and `model.score.weight`.
fn refuse_twins(targets: &[PlannedTarget], problems: &mut Vec<PlanProblem>) {
    let mut gained: BTreeMap<String, &PlannedTarget> = BTreeMap::new();
    for target in targets.iter().filter(|target| target.parameter.is_none()) {
        let parts: Vec<&str> = target.name.rsplit('.').take(2).collect();
        if let Some(first) = gained.insert(parts.join("."), target) {
            problems.push(PlanProblem::Conflict {
                parameter: target.name.clone(),
                reason: format!("and `{}` seem to be one, under two names", first.name),
            });
        }
    }
}

/// A component by the indices of its adapter and its own.
pub(crate) type Key = (usize, usize);

impl<'a> Inputs<'a> {
    fn component(&self, place: &Placed) -> &'a Component {
        &self.adapters[place.adapter].adapter.components[place.component]
    }

    fn weight(&self, place: &Placed) -> f64 {
        self.adapters[place.adapter].weight
    }

    fn adapter_name(&self, place: &Placed) -> String {
        self.adapters[place.adapter].adapter.path.display().to_string()
    }

    /// The placed components by parameter, less those that cannot act together.
    fn groups<'p>(
        &self,
        placed: &'p [Placed],
        superfluous: &mut Vec<Key>,
        problems: &mut Vec<PlanProblem>,
    ) -> Vec<Group<'p>> {
        let mut by_parameter: BTreeMap<(Option<usize>, String), Vec<&Placed>> = BTreeMap::new();
        for place in placed {
            let own = self.component(place).target.name();
            let name = match (place.parameter, &self.ties.head) {
                (Some(index), _) => self.parameters.get(index).name.clone(),
                (None, Some(head)) if vocabulary::is_either(&own) => head.name.clone(),
                (None, _) => own,
            };
            by_parameter.entry((place.parameter, name)).or_default().push(place);
        }
        let mut groups = Vec::with_capacity(by_parameter.len());
        for ((parameter, name), mut placed) in by_parameter {
            self.drop_superfluous(&mut placed, superfluous);
            if let Some(place) = placed.iter().find(|place| self.is_irreversible(place)) {
                problems.push(PlanProblem::Irreversible {
                    parameter: name,
                    method: self.component(place).form.method(),
                });
                continue;
            }
            match self.conflict(&placed) {
                Some(reason) => problems.push(PlanProblem::Conflict { parameter: name, reason }),
                None => {
                    let brought = placed.iter().copied().find(|place| {
                        matches!(self.component(place).form, Form::Replaced(_) | Form::Base(_))
                    });
                    groups.push(Group { parameter, name, placed, brought });
                }
            }
        }
        groups
    }

    /// Takes out what another component makes superfluous: a copy of the base that equals the one
    /// before it, and a change to be undone in what is replaced as a whole.
    fn drop_superfluous(&self, placed: &mut Vec<&Placed>, superfluous: &mut Vec<Key>) {
        let form = |place: &Placed| &self.component(place).form;
        let replaced = placed.iter().any(|place| matches!(form(place), Form::Replaced(_)));
        let first = placed.iter().find_map(|place| match form(place) {
            Form::Base(tensor) => Some(tensor),
            _ => None,
        });
        placed.retain(|place| {
            let kept = match (form(place), first) {
                (Form::Base(copy), Some(first)) => {
                    std::ptr::eq(copy, first)
                        || (copy.dtype, &copy.shape) != (first.dtype, &first.shape)
                        || copy.bytes() != first.bytes()
                }
                (form, _) => {
                    let undone = self.adapters[place.adapter].undo && form.is_additive();
                    !(replaced && undone)
                }
            };
            if !kept {
                superfluous.push((place.adapter, place.component));
            }
            kept
        });
    }

    /// Whether a change cannot be taken out of what it changed, or cannot be made where another is
    /// taken out: it needs the W of before.
    fn is_irreversible(&self, place: &Placed) -> bool {
        let form = &self.component(place).form;
        let undoes = self.adapters.iter().any(|one| one.undo);
        match form {
            _ if !undoes => false,
            Form::Replaced(_) | Form::Rows { .. } => self.adapters[place.adapter].undo,
            form => !form.is_additive(),
        }
    }

    /// Why these components cannot act on one parameter together.
    fn conflict(&self, placed: &[&Placed]) -> Option<String> {
        let of = |wanted: &dyn Fn(&Form) -> bool| -> Vec<&Placed> {
            placed.iter().copied().filter(|place| wanted(&self.component(place).form)).collect()
        };
        let replaced = of(&|form| matches!(form, Form::Replaced(_)));
        let copies = of(&|form| matches!(form, Form::Base(_)));
        let rows = of(&|form| matches!(form, Form::Rows { .. }));
        let changed = of(&is_delta);
        let dependent: Vec<&Placed> = changed
            .iter()
            .copied()
            .filter(|place| !self.component(place).form.is_additive())
            .collect();
        let names = |places: &[&Placed]| -> String {
            let mut names: Vec<String> =
                places.iter().map(|place| self.adapter_name(place)).collect();
            names.dedup();
            names.join(" and ")
        };
        if replaced.len() > 1 {
            return Some(format!("saved in full by {}; only one can be kept", names(&replaced)));
        }
        // Biases may be saved in full and have a trained addend besides, in one adapter.
        let foreign = |first: &&&Placed| {
            changed.iter().chain(&rows).any(|place| place.adapter != first.adapter)
        };
        if let Some(first) = replaced.first().filter(foreign) {
            return Some(format!(
                "saved in full by {} and changed by {}: a change of what was replaced is not \
                 defined",
                self.adapter_name(first),
                names(&[changed, rows].concat()),
            ));
        }
        if copies.len() > 1 {
            return Some(format!("{} bring different bases of it", names(&copies)));
        }
        if let [first, second, ..] = dependent.as_slice() {
            let method = |place: &Placed| self.component(place).form.method();
            return Some(format!(
                "{} of {} and {} of {} both depend on the weight that they change: their order \
                 would matter",
                method(first),
                self.adapter_name(first),
                method(second),
                self.adapter_name(second),
            ));
        }
        if !rows.is_empty() && !changed.is_empty() {
            return Some(format!(
                "{} gives some of its rows and {} changes all of them",
                names(&rows),
                names(&changed)
            ));
        }
        let mut seen: BTreeMap<u64, &Placed> = BTreeMap::new();
        for place in &rows {
            let Form::Rows { indices, .. } = &self.component(place).form else { continue };
            for &index in indices {
                if let Some(first) = seen.insert(index, place) {
                    return Some(format!("{} both give its row {index}", names(&[first, *place])));
                }
            }
        }
        let fixed: Vec<&Placed> = [replaced, rows].concat();
        let weighted = fixed.iter().find(|place| self.weight(place) != 1.0);
        weighted.map(|place| {
            format!(
                "{} replaces it, which a weight of {} cannot scale",
                self.adapter_name(place),
                self.weight(place)
            )
        })
    }

    /// What the base has of a group: its parameter, or the embedding that an output head was
    /// tied to.
    fn stored(&self, group: &Group<'_>) -> Option<&'a Parameter> {
        let head = self.ties.head.as_ref().filter(|head| head.name == group.name);
        let index = group.parameter.or(head.map(|head| head.embedding));
        index.map(|index| self.parameters.get(index))
    }

    /// The shape that a group's parameter has when its changes act.
    fn shape(&self, group: &Group<'_>) -> Vec<usize> {
        let brought = self.brought(group).map(|tensor| tensor.shape.clone());
        let stored = || self.stored(group).map(|parameter| parameter.shape.clone());
        brought.or_else(stored).unwrap_or_default()
    }

    fn brought(&self, group: &Group<'_>) -> Option<&'a Tensor> {
        group.brought.and_then(|place| match &self.component(place).form {
            Form::Replaced(tensor) | Form::Base(tensor) => Some(tensor),
            _ => None,
        })
    }

    /// How every whole component lies in its parameter.
    fn orientations(
        &self,
        groups: &[Group<'_>],
        problems: &mut Vec<PlanProblem>,
    ) -> BTreeMap<Key, Orientation> {
        let mut found = BTreeMap::new();
        for (adapter, one) in self.adapters.iter().enumerate() {
            let mut decided = BTreeMap::new();
            let mut squares = Vec::new();
            for group in groups {
                let shape = self.shape(group);
                for place in &group.placed {
                    let component = self.component(place);
                    let whole = matches!(place.part, Part::Whole);
                    if place.adapter != adapter || !whole || !is_delta(&component.form) {
                        continue;
                    }
                    let key = (place.adapter, place.component);
                    match lies(&group.name, &shape, &component.form) {
                        FromShape::Decided(orientation) => {
                            // What is stored with its kernel or as a table says nothing about
                            // linear layers.
                            if shape.len() == 2 && is_linear(&component.form) {
                                decided.insert(group.name.as_str(), orientation);
                            }
                            found.insert(key, orientation);
                        }
                        FromShape::Square => squares.push((key, group.name.as_str())),
                        FromShape::Misfit(problem) => problems.push(problem),
                        FromShape::Unknown => {}
                    }
                }
            }
            let (trained, user) = (one.adapter.fan_in_fan_out, self.options.fan_in_fan_out);
            let judge = Judge::new(self.parameters, self.base.config(), trained, user, decided);
            for (key, parameter) in squares {
                match judge.square(parameter) {
                    Ok(orientation) => drop(found.insert(key, orientation)),
                    Err(problem) => problems.push(problem),
                }
            }
        }
        found
    }

    fn target(
        &self,
        group: &Group<'_>,
        orientations: &BTreeMap<Key, Orientation>,
        problems: &mut Vec<PlanProblem>,
    ) -> Option<PlannedTarget> {
        let (brought, stored) = (self.brought(group), self.stored(group));
        let source = match (group.brought, stored) {
            (Some(place), _) => {
                Source::Brought { adapter: place.adapter, component: place.component }
            }
            (None, Some(parameter)) => parameter.source,
            // Nothing to change: resolution has reported it.
            (None, None) => return None,
        };
        let own = stored.map(|parameter| parameter.dtype);
        let dtype = own.or(brought.map(|tensor| tensor.dtype))?;
        let shape = self.shape(group);
        for dtype in [Some(dtype), brought.map(|tensor| tensor.dtype)].into_iter().flatten() {
            if !dtype.is_merge_float() {
                let parameter = group.name.clone();
                problems.push(PlanProblem::Dtype { parameter, dtype });
                return None;
            }
        }
        let slabs = group.placed.iter().find_map(|place| match place.part {
            Part::Slabs { count, .. } => Some(count),
            Part::Whole => None,
        });
        if let Some(problem) = self.reshaped(group, slabs.is_some()) {
            problems.push(problem);
            return None;
        }
        let embedding = self.ties.shared.filter(|pair| Some(pair.1) == group.parameter);
        let key = embedding.map_or(&group.name, |pair| &self.parameters.get(pair.0).name);
        let mut target = PlannedTarget {
            parameter: group.parameter,
            name: group.name.clone(),
            key: key.clone(),
            kernel: kernel(&shape, slabs),
            stacked: slabs.is_some() && shape.len() == 3,
            shape,
            dtype,
            source,
            slabs: vec![Slab::default(); slabs.unwrap_or(1)],
            rows: Vec::new(),
            changes: Vec::new(),
        };
        let (rows, cols) = target.matrix();
        for place in &group.placed {
            let component = self.component(place);
            let (adapter, weight) = (place.adapter, self.weight(place));
            let mut change =
                Change { adapter, component: place.component, weight, orientation: None };
            match (&place.part, &component.form) {
                (Part::Slabs { terms, .. }, _) => {
                    for (slab, term) in terms {
                        if *slab >= target.slabs.len() || !term.lies_within(rows, cols) {
                            let parameter = group.name.clone();
                            let problem = "factors that reach beyond it".to_owned();
                            problems.push(PlanProblem::Form { parameter, problem });
                            continue;
                        }
                        let scale = term.scale * weight;
                        target.slabs[*slab].terms.push(Term { scale, ..term.clone() });
                    }
                }
                (Part::Whole, Form::Replaced(_) | Form::Base(_)) => {}
                (Part::Whole, Form::Rows { .. }) => {
                    self.check_rows(&target, component, problems);
                    target.rows.push(change);
                }
                (Part::Whole, form) => {
                    let key = (place.adapter, place.component);
                    // Absent: a problem stands for it.
                    let Some(&orientation) = orientations.get(&key) else { continue };
                    change.orientation = Some(orientation);
                    let matrix = Matrix { rows, cols, orientation, kernel: target.kernel };
                    if target.stacked {
                        let (parameter, problem) = (group.name.clone(), SPLIT.to_owned());
                        problems.push(PlanProblem::Form { parameter, problem });
                        continue;
                    }
                    if let Err(problem) = operator::check(form, matrix) {
                        let parameter = group.name.clone();
                        problems.push(PlanProblem::Form { parameter, problem });
                        continue;
                    }
                    match low_rank::term(form, orientation, key, weight) {
                        Some(term) => target.slabs[0].terms.push(term.fit(rows, cols)),
                        None => target.slabs[0].operators.push(OperatorChange { change, matrix }),
                    }
                }
            }
            target.changes.push(change);
        }
        Some(target)
    }

    /// Why what is brought cannot take the place of what the base has. Only a vocabulary, or what
    /// a head gives, may have another number of rows; nothing else may differ.
    fn reshaped(&self, group: &Group<'_>, stacked: bool) -> Option<PlanProblem> {
        let (brought, stored) = (self.brought(group)?, self.stored(group)?);
        if brought.shape == stored.shape {
            return None;
        }
        let module = resolve::module_of(&group.name);
        let in_layer = module.split('.').any(names::is_number);
        let rows = !stored.shape.is_empty()
            && brought.shape.len() == stored.shape.len()
            && brought.shape[1..] == stored.shape[1..];
        // A vector by itself is a norm; beside a matrix it is the bias of a head.
        let of_head = stored.shape.len() == 2 || group.name.ends_with(".bias");
        let fits = rows && of_head && !in_layer && !stacked;
        (!fits).then(|| PlanProblem::Replacement {
            parameter: group.name.clone(),
            stored: Shape(stored.shape.clone()),
            brought: Shape(brought.shape.clone()),
        })
    }

    fn check_rows(
        &self,
        target: &PlannedTarget,
        component: &Component,
        problems: &mut Vec<PlanProblem>,
    ) {
        let Form::Rows { indices, rows } = &component.form else { return };
        let (stored, width) = target.matrix();
        let wrong = if rows.shape.as_slice() != [indices.len(), width] || target.shape.len() != 2 {
            Some(format!(
                "token rows of shape {} for {} tokens of width {width}",
                Shape(rows.shape.clone()),
                indices.len()
            ))
        } else {
            let beyond = indices.iter().find(|&&index| index >= stored as u64);
            beyond.map(|index| format!("a token row {index}, and the base has {stored}"))
        };
        if let Some(problem) = wrong {
            problems.push(PlanProblem::Form { parameter: target.name.clone(), problem });
        }
    }
}

const SPLIT: &str = "a change of the whole stack and changes of its parts cannot be combined";

/// What the shapes say of how a change lies in a stored parameter.
fn lies(parameter: &str, shape: &[usize], form: &Form) -> FromShape {
    let features = operator::features(form);
    let layer = match form {
        Form::LowRank(form) => Some(form.layer),
        _ => None,
    };
    let flat = |from: usize| shape[from..].iter().product::<usize>();
    let fits = |known: Option<usize>, stored: usize| known.is_none_or(|known| known == stored);
    let wrong = |cause| FromShape::Misfit(misfit(parameter, shape, features, cause));
    match (shape.len(), layer) {
        (2, Some(Layer::Embedding)) => {
            let Features { out, input } = features;
            match (fits(input, shape[0]), fits(out, shape[1])) {
                (true, true) => FromShape::Decided(Orientation::InOut),
                (false, true) => wrong(ShapeCause::ResizedVocabulary),
                _ => wrong(ShapeCause::WrongBase),
            }
        }
        // A problem stands for it already, or it was made linear.
        (_, Some(Layer::Merged)) => FromShape::Unknown,
        (2, Some(Layer::Linear) | None) => from_shape(parameter, (shape[0], shape[1]), features),
        // A bias: one value per output feature.
        (1, None) if fits(features.out, shape[0]) => FromShape::Decided(Orientation::InOut),
        (1, None) => wrong(ShapeCause::WrongBase),
        (3.., Some(Layer::Convolution) | None) => {
            match fits(features.out, shape[0]) && fits(features.input, flat(1)) {
                true => FromShape::Decided(Orientation::OutIn),
                false => wrong(ShapeCause::WrongBase),
            }
        }
        // AdaLoRA flattens a convolution's inputs and kernel itself.
        (4.., Some(Layer::Linear))
            if (features.out, features.input) == (Some(shape[0]), Some(flat(1))) =>
        {
            FromShape::Decided(Orientation::OutIn)
        }
        _ => wrong(ShapeCause::NotAMatrix),
    }
}

/// Whether a form changes what is there, rather than giving W or some of its rows.
fn is_delta(form: &Form) -> bool {
    !matches!(form, Form::Replaced(_) | Form::Base(_) | Form::Rows { .. })
}

/// Whether the form is of a linear layer, whose shape says how its kind stores weights.
fn is_linear(form: &Form) -> bool {
    match form {
        Form::LowRank(form) => form.layer == Layer::Linear,
        _ => true,
    }
}

fn kernel(shape: &[usize], slabs: Option<usize>) -> usize {
    match (shape, slabs) {
        ([_, _, kernel @ ..], None) => kernel.iter().product(),
        _ => 1,
    }
}

/// The rows of the output's embedding, if they are not as many as the base's; head and embedding
/// must agree.
pub(crate) fn vocabulary(
    parameters: &Parameters,
    targets: &[PlannedTarget],
    problems: &mut Vec<PlanProblem>,
) -> Option<usize> {
    let rows = |shape: &[usize]| shape.first().copied().unwrap_or(0);
    let resized = targets.iter().find(|target| {
        vocabulary::is_either(&target.name)
            && target
                .parameter
                .is_some_and(|index| rows(&parameters.get(index).shape) != rows(&target.shape))
    })?;
    let new = rows(&resized.shape);
    // Everything else that has a row per token must have as many.
    let sizes = targets.iter().map(|target| (target.name.as_str(), rows(&target.shape)));
    let kept = parameters
        .all()
        .iter()
        .enumerate()
        .filter(|(index, _)| targets.iter().all(|target| target.parameter != Some(*index)))
        .map(|(_, parameter)| (parameter.name.as_str(), rows(&parameter.shape)));
    for (name, rows) in sizes.chain(kept) {
        if vocabulary::is_either(name) && rows != new {
            problems.push(PlanProblem::Vocabulary {
                parameter: name.to_owned(),
                rows,
                resized: resized.name.clone(),
                new,
            });
        }
    }
    Some(new)
}
