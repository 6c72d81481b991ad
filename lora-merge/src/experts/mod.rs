//! Experts: adapters and bases agree on what an expert's matrices are, and not on how they are
//! kept.
//!
//! |                        | base: stacks                      | base: matrix by matrix          |
//! |------------------------|-----------------------------------|---------------------------------|
//! | adapter: stacks        | a term in every matrix            | cut apart: a term in every one  |
//! | adapter: by matrix     | a term in one matrix, or half one | the ordinary case               |
//!
//! A stack is one parameter E × out × in (`experts.gate_up_proj` of Mixtral, Qwen-MoE and most
//! others in transformers 5) or E × in × out (gpt-oss, Llama 4, Aria); adapters of stacks are what
//! PEFT calls `target_parameters`. Everything comes down to [`Term`]s: which elements of the
//! factors are whose (`layout`), what the base calls a matrix (`names`) and where it has it
//! (`base`).
//!
//! What the shapes of base and adapter decide, they decide. What they leave open is decided by
//! [`Layout`] if the user gave one, by what the adapter's configuration tells for certain
//! (`evidence`) otherwise, and not at all where it tells nothing: then the adapter is refused.

mod base;
mod evidence;
mod layout;
mod names;
mod single;
mod stacked;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};

use lora_format::model::{Adapter, Form, Note};
use serde_json::{Map, Value};

use crate::error::PlanProblem;
use crate::low_rank::{Factor, Stride, Term};
use crate::parameters::Parameters;
use crate::place::{Part, Placed};
use crate::resolve::{self, FoundModule, Resolution, Wanted};
use base::{Base, Block, Model};
use layout::Pair;
use names::OfExpert;

pub use layout::Layout;

/// What concerns experts, and what stands beside them under another name.
#[derive(Default)]
pub(crate) struct Found {
    pub(crate) placed: Vec<Placed>,
    /// The components that were dealt with, ascending.
    pub(crate) claimed: Vec<usize>,
    /// Prefixes that differ, with the number of modules.
    pub(crate) renames: BTreeMap<(String, String), usize>,
    /// What was taken for granted.
    pub(crate) notes: Vec<Note>,
}

/// Places the components that change experts.
pub(crate) fn place(
    adapter: usize,
    contents: &Adapter,
    parameters: &Parameters,
    config: Option<&Map<String, Value>>,
    layout: Option<Layout>,
    problems: &mut Vec<PlanProblem>,
) -> Found {
    let mut found = Found::default();
    let components = contents.components.iter().enumerate();
    let stacked = components
        .clone()
        .filter_map(|(index, component)| match &component.form {
            Form::Experts(form) => Some((index, component.target.module.as_str(), form)),
            _ => None,
        })
        .collect::<Vec<_>>();
    let single = components
        .filter(|(_, component)| component.target.parameter == "weight")
        .filter(|(_, component)| !matches!(component.form, Form::Experts(_)))
        .filter_map(|(index, component)| Some((index, names::of_expert(&component.target.module)?)))
        .collect::<Vec<(usize, OfExpert<'_>)>>();
    if !stacked.is_empty() || !single.is_empty() {
        let base = Base::of(parameters);
        let containers = stacked.iter().map(|entry| entry.1);
        let containers = containers.chain(single.iter().map(|entry| entry.1.container));
        let context = Context {
            adapter,
            contents,
            parameters,
            model: Model::new(config),
            layout,
            blocks: blocks(containers, &base, problems),
            base: &base,
        };
        stacked::place(&context, &stacked, &mut found, problems);
        single::place(&context, &single, &mut found, problems);
    }
    found.claimed.sort_unstable();
    place_beside(adapter, contents, parameters, &mut found, problems);
    found.claimed.sort_unstable();
    found
}

/// What placing experts needs to see.
struct Context<'a> {
    adapter: usize,
    contents: &'a Adapter,
    parameters: &'a Parameters,
    model: Model<'a>,
    layout: Option<Layout>,
    base: &'a Base,
    /// The base's block of every module that has experts, by the adapter's name for it.
    blocks: HashMap<String, FoundModule>,
}

impl Context<'_> {
    fn block(&self, container: &str) -> Option<&Block> {
        self.block_number(container).map(|number| &self.base.blocks[number])
    }

    /// Which of the base's blocks it is: several names may be names of one.
    fn block_number(&self, container: &str) -> Option<usize> {
        self.blocks.get(container).map(|block| block.index)
    }

    /// Notes that something was found in the block of this module.
    fn count(&self, container: &str, found: &mut Found) {
        let rename = self.blocks.get(container).and_then(|block| block.rename.clone());
        if let Some(rename) = rename {
            *found.renames.entry(rename).or_default() += 1;
        }
    }
}

/// Where the modules that have experts are in the base.
fn blocks<'a>(
    containers: impl Iterator<Item = &'a str>,
    base: &Base,
    problems: &mut Vec<PlanProblem>,
) -> HashMap<String, FoundModule> {
    let ours: Vec<&str> = containers.collect::<BTreeSet<_>>().into_iter().collect();
    let canonical: Vec<String> = ours.iter().map(|container| names::canonical(container)).collect();
    let wanted: Vec<&str> = canonical.iter().map(String::as_str).collect();
    let known: Vec<&str> = base.containers.iter().map(String::as_str).collect();
    let found = resolve::modules(&wanted, &known, problems);
    let pairs = ours.into_iter().zip(found);
    pairs.filter_map(|(ours, block)| Some((ours.to_owned(), block?))).collect()
}

/// Where a change lies in the matrix that it is a part of.
#[derive(Clone, Copy, Debug)]
struct Lie {
    /// The rows of the matrix that the change's rows are; its columns are all.
    rows: Stride,
    /// Whether the matrix is stored transposed.
    transposed: bool,
    /// The factor whose elements another part of the same change has used before.
    again: Option<Factor>,
}

impl Pair {
    /// The change as it is stored.
    fn term(self, (adapter, component): (usize, usize), scale: f64, lie: Lie) -> Term {
        let (pair, rows, cols) = match lie.transposed {
            false => (self, lie.rows, Stride::ALL),
            true => (self.transposed(), Stride::ALL, lie.rows),
        };
        let (left, right, again) = (pair.rows, pair.cols, lie.again);
        Term { adapter, component, left, right, rows, cols, scale, again }
    }
}

/// Places what stands beside the experts (routers, shared experts) where the base has it under
/// the name of another transformers release, and under none that the adapter gives it.
fn place_beside(
    adapter: usize,
    contents: &Adapter,
    parameters: &Parameters,
    found: &mut Found,
    problems: &mut Vec<PlanProblem>,
) {
    if !names::has_experts(parameters.all().iter().map(|parameter| parameter.name.as_str())) {
        return;
    }
    let open: Vec<(usize, Wanted<'_>)> = contents
        .components
        .iter()
        .enumerate()
        .filter(|(index, _)| found.claimed.binary_search(index).is_err())
        .map(|(index, component)| {
            let (module, parameter) = (&component.target.module, &component.target.parameter);
            (index, Wanted { module, parameter, optional: true })
        })
        .filter(|(_, wanted)| {
            parameters.find(&format!("{}.{}", wanted.module, wanted.parameter)).is_none()
        })
        .filter(|(_, wanted)| !names::other_names(wanted.module).is_empty())
        .collect();
    if open.is_empty() {
        return;
    }
    let as_named: Vec<Wanted<'_>> = open.iter().map(|entry| entry.1).collect();
    let as_named = resolve::resolve(&as_named, parameters).found;
    let open = open.into_iter().zip(as_named).filter(|(_, found)| found.is_none());
    let others: Vec<(usize, &str, String)> = open
        .flat_map(|((index, wanted), _)| {
            let names = names::other_names(wanted.module).into_iter();
            names.map(move |name| (index, wanted.parameter, name))
        })
        .collect();
    let wanted: Vec<Wanted<'_>> = others
        .iter()
        .map(|(_, parameter, module)| Wanted { module, parameter, optional: true })
        .collect();
    // What does not resolve is reported under the adapter's own name.
    let Resolution { found: resolved, renames, .. } = resolve::resolve(&wanted, parameters);
    let mut places: BTreeMap<usize, BTreeSet<usize>> = BTreeMap::new();
    for ((component, ..), parameter) in others.iter().zip(resolved) {
        places.entry(*component).or_default().extend(parameter);
    }
    let mut taken: BTreeMap<usize, &str> = BTreeMap::new();
    for (component, places) in places {
        // Several names in the base are as good as none.
        let Some(parameter) = places.first().copied().filter(|_| places.len() == 1) else {
            continue;
        };
        let module = contents.components[component].target.module.as_str();
        found.claimed.push(component);
        if let Some(first) = taken.insert(parameter, module).filter(|first| *first != module) {
            problems.push(PlanProblem::Collision {
                first: first.to_owned(),
                second: module.to_owned(),
                parameter: parameters.get(parameter).name.clone(),
            });
            continue;
        }
        let (parameter, part) = (Some(parameter), Part::Whole);
        found.placed.push(Placed { adapter, component, parameter, part });
    }
    for (rename, count) in renames {
        *found.renames.entry(rename).or_default() += count;
    }
}
