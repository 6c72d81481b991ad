//! Components → parameters: which parameter of the base every component of an adapter changes, or
//! that the output gains one.

use std::collections::BTreeMap;

use lora_format::model::{Component, Form, Note, Target};
use lora_format::vocabulary;
use serde_json::{Map, Value};

use crate::error::PlanProblem;
use crate::experts;
use crate::low_rank::Term;
use crate::names;
use crate::parameters::Parameters;
use crate::plan::WeightedAdapter;
use crate::resolve::{self, Resolution, Wanted};
use crate::spelled;

/// A component and the parameter that it changes.
#[derive(Clone, Debug)]
pub(crate) struct Placed {
    /// Index of the adapter.
    pub(crate) adapter: usize,
    /// Index of its component.
    pub(crate) component: usize,
    /// The base's parameter; `None` where the base has none of this name.
    pub(crate) parameter: Option<usize>,
    /// Which part of the parameter.
    pub(crate) part: Part,
}

/// Where in its parameter a component's change goes.
#[derive(Clone, Debug)]
pub(crate) enum Part {
    /// All of it.
    Whole,
    /// Terms in some of the matrices that the parameter is a stack of.
    Slabs {
        /// How many matrices it is.
        count: usize,
        /// The terms, with the index of the matrix. Their scales are the component's own.
        terms: Vec<(usize, Term)>,
    },
}

/// What [`place`] found.
pub(crate) struct Places {
    pub(crate) placed: Vec<Placed>,
    /// Prefixes that differ, with the number of modules.
    pub(crate) renames: BTreeMap<(String, String), usize>,
    /// What was taken for granted.
    pub(crate) notes: Vec<Note>,
}

/// Places every component of the adapter with index `adapter`. Where an adapter is taken out
/// (`undoes`), copies of the base mean nothing: W is what the merged model has.
pub(crate) fn place(
    adapter: usize,
    weighted: &WeightedAdapter,
    undoes: bool,
    parameters: &Parameters,
    config: Option<&Map<String, Value>>,
    layout: Option<experts::Layout>,
    problems: &mut Vec<PlanProblem>,
) -> Places {
    let contents = &weighted.adapter;
    if spelled::spells(contents) {
        let mut placed = spelled::place(adapter, contents, parameters, problems);
        placed.sort_by_key(|place| (place.component, place.parameter));
        refuse_overlaps(&placed, weighted, parameters, problems);
        return Places { placed, renames: BTreeMap::new(), notes: Vec::new() };
    }
    let experts::Found { mut placed, claimed, renames: mut prefixes, notes } =
        experts::place(adapter, contents, parameters, config, layout, problems);
    let rest: Vec<(usize, &Component)> = contents
        .components
        .iter()
        .enumerate()
        .filter(|(index, _)| claimed.binary_search(index).is_err())
        .filter(|(_, component)| !(undoes && matches!(component.form, Form::Base(_))))
        .collect();
    let wanted: Vec<Wanted<'_>> =
        rest.iter().map(|(_, component)| wanted(component, parameters)).collect();
    let Resolution { found, problems: unresolved, renames } = resolve::resolve(&wanted, parameters);
    problems.extend(unresolved);
    for (rename, count) in renames {
        *prefixes.entry(rename).or_default() += count;
    }
    let fits = !placed.is_empty() || found.iter().any(Option::is_some);
    let may_be_new = |target: &Target| fits && prefixes.is_empty() && is_new(target, parameters);
    for ((component, contents), (parameter, wanted)) in rest.iter().zip(found.iter().zip(&wanted)) {
        let (component, parameter) = (*component, *parameter);
        let place = Placed { adapter, component, parameter, part: Part::Whole };
        match (parameter, &contents.form) {
            (Some(_), _) => placed.push(place),
            (None, Form::Replaced(_)) if may_be_new(&contents.target) => placed.push(place),
            (None, Form::Replaced(_)) => {
                let Target { module, parameter } = contents.target.clone();
                problems.push(PlanProblem::Unresolved { module, parameter, nearest: Vec::new() });
            }
            // The gain of a bias that the layer does not have.
            (None, Form::Gain(_)) => {}
            (None, _) if wanted.optional => placed.push(place),
            // A problem stands for it.
            (None, _) => {}
        }
    }
    placed.sort_by_key(|place| (place.component, place.parameter));
    refuse_overlaps(&placed, weighted, parameters, problems);
    Places { placed, renames: prefixes, notes }
}

/// One adapter changes the parts of a parameter or the whole of it: experts that it names one by
/// one and again as the parameter's own change would be applied twice.
fn refuse_overlaps(
    placed: &[Placed],
    weighted: &WeightedAdapter,
    parameters: &Parameters,
    problems: &mut Vec<PlanProblem>,
) {
    let target = |place: &Placed| &weighted.adapter.components[place.component].target;
    let mut first: BTreeMap<usize, &Placed> = BTreeMap::new();
    for place in placed {
        let Some(parameter) = place.parameter else { continue };
        let Some(other) = first.insert(parameter, place) else { continue };
        // Those of one kind were looked at when they were placed.
        let whole = |place: &Placed| matches!(place.part, Part::Whole);
        if whole(place) != whole(other) && target(place) != target(other) {
            problems.push(PlanProblem::Collision {
                first: target(other).name(),
                second: target(place).name(),
                parameter: parameters.get(parameter).name.clone(),
            });
        }
    }
}

/// What a component asks the base for.
pub(crate) fn wanted<'a>(component: &'a Component, parameters: &Parameters) -> Wanted<'a> {
    let Target { module, parameter } = &component.target;
    let optional = match &component.form {
        // The base may have no head of this kind yet.
        Form::Replaced(_) => true,
        Form::Gain(_) => parameter == "bias",
        // A tied head may not be stored.
        _ => {
            vocabulary::is_output_head(&component.target.name())
                && parameters.all().iter().any(|one| vocabulary::is_input_embedding(&one.name))
        }
    };
    Wanted { module, parameter, optional }
}

/// Whether a parameter may be one that the base lacks: of a head that training put beside the
/// model. Not one of a module that the base has without it, nor of one whose name the base has
/// elsewhere, nor one of a numbered layer.
fn is_new(target: &Target, parameters: &Parameters) -> bool {
    let last = |module: &str| module.rsplit('.').next().unwrap_or(module).to_owned();
    let name = last(&target.module);
    let elsewhere = parameters.all().iter().any(|one| last(resolve::module_of(&one.name)) == name);
    !elsewhere
        && !resolve::has_module(&target.module, parameters)
        && !target.module.split('.').any(names::is_number)
}
