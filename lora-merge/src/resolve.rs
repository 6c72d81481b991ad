//! Adapter module names → parameters of the base.
//!
//! An adapter names modules as its trainer's wrapper saw them; a checkpoint names them as another
//! class, another version or another wrapper saved them. Both agree on the end of the name. So a
//! module resolves to its exact name if the base has it, else to the parameters with which it
//! shares the longest dotted suffix, provided that what differs before it is a wrapper:
//!
//! - the base has a prefix that the adapter lacks (`bert.` before `encoder.layer.0…`), or the
//!   adapter one that the base lacks, without a layer number in it and the same for every module of
//!   the adapter, or
//! - both differ only in the names of known wrappers (`language_model.model.` against
//!   `model.language_model.`).
//!
//! More than one such parameter is an error that shows them; none is an error with the nearest
//! names. Nothing is guessed, and nothing is skipped.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::collections::hash_map::{Entry, HashMap};

use crate::error::PlanProblem;
use crate::names::is_number;
use crate::parameters::Parameters;

/// Module names that add nothing but a level: a difference in these is a difference of wrappers.
const WRAPPERS: [&str; 13] = [
    "_fsdp_wrapped_module",
    "_orig_mod",
    "backbone",
    "base_model",
    "language_model",
    "llm",
    "lm",
    "model",
    "module",
    "text_model",
    "thinker",
    "transformer",
    "wrapped_model",
];

/// How many nearest names an error shows.
const NEAREST: usize = 3;

/// How many unresolved modules are compared with every name of the base; on a wrong base all of
/// them are unresolved, and the first hundred say enough.
const COMPARED: usize = 100;

/// A parameter as an adapter names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Wanted<'a> {
    /// The module.
    pub module: &'a str,
    /// The parameter within it.
    pub parameter: &'a str,
    /// Whether the base may lack it.
    pub optional: bool,
}

/// Where the parameters that an adapter names are in a base.
#[derive(Debug, Default)]
pub struct Resolution {
    /// One index into [`Parameters`] per name, in the order given; `None` where a problem stands
    /// instead, or where an optional parameter is not there.
    pub found: Vec<Option<usize>>,
    /// What stands in the way.
    pub problems: Vec<PlanProblem>,
    /// Prefixes that differ, with the number of names: (adapter's, base's) → count.
    pub renames: BTreeMap<(String, String), usize>,
}

/// Resolves every name against the base's parameters. One name may come several times, and is
/// then one parameter.
pub fn resolve(wanted: &[Wanted<'_>], parameters: &Parameters) -> Resolution {
    let mut resolution = Resolution::default();
    let mut indices = Indices { parameters, by_parameter: BTreeMap::new() };
    for one in wanted {
        let Wanted { module, parameter, optional } = *one;
        if let Some(index) = parameters.find(&format!("{module}.{parameter}")) {
            resolution.found.push(Some(index));
            continue;
        }
        // A base that has the module has none of its parameters elsewhere.
        let found = match has_module(module, parameters) {
            true => Found::None,
            false => indices.of(parameter).resolve(module),
        };
        match found {
            Found::One { index, rename } => {
                *resolution.renames.entry(rename).or_default() += 1;
                resolution.found.push(Some(index));
            }
            Found::Several(candidates) => {
                let module = module.to_owned();
                resolution.problems.push(PlanProblem::Ambiguous { module, candidates });
                resolution.found.push(None);
            }
            Found::None if optional => resolution.found.push(None),
            Found::None => {
                let compare = resolution.problems.len() < COMPARED;
                resolution.problems.push(unresolved(one, indices.of(parameter), compare));
                resolution.found.push(None);
            }
        }
    }
    refuse_torn_modules(wanted, &mut indices, &mut resolution);
    refuse_uneven_prefixes(wanted, &mut indices, &mut resolution);
    refuse_collisions(wanted, parameters, &mut resolution);
    resolution
}

/// Whether the base has a parameter of exactly this module.
pub(crate) fn has_module(module: &str, parameters: &Parameters) -> bool {
    parameters.under(&format!("{module}.")).next().is_some()
}

/// The parameters of one module are those of one module of the base: a bias is not that of another
/// tower because this one's layer has none.
fn refuse_torn_modules(
    wanted: &[Wanted<'_>],
    indices: &mut Indices<'_>,
    resolution: &mut Resolution,
) {
    let mut stems: HashMap<&str, &str> = HashMap::new();
    let all = indices.parameters;
    // The weight speaks for its module, wherever it comes in the list.
    let weights_first = |one: &Wanted<'_>| one.parameter != "weight";
    let mut order: Vec<usize> = (0..wanted.len()).collect();
    order.sort_by_key(|&index| weights_first(&wanted[index]));
    for index in order {
        let (one, Some(found)) = (&wanted[index], resolution.found[index]) else { continue };
        let stem = module_of(&all.get(found).name);
        let first = *stems.entry(one.module).or_insert(stem);
        if first == stem {
            continue;
        }
        resolution.found[index] = None;
        if !one.optional {
            let compare = resolution.problems.len() < COMPARED;
            resolution.problems.push(unresolved(one, indices.of(one.parameter), compare));
        }
    }
}

/// A prefix that only one side has and that is no known wrapper must stand before every module:
/// one that stands before some of them is another tower of the model (`vision_tower.`).
fn refuse_uneven_prefixes(
    wanted: &[Wanted<'_>],
    indices: &mut Indices<'_>,
    resolution: &mut Resolution,
) {
    let found = resolution.found.iter().flatten().count();
    let even = resolution.renames.values().all(|&names| names == found);
    if even || resolution.renames.keys().all(is_wrapper_rename) {
        return;
    }
    for (one, slot) in wanted.iter().zip(&mut resolution.found) {
        let Some(found) = *slot else { continue };
        let stem = module_of(&indices.parameters.get(found).name);
        let shared = shared_suffix(stem, one.module);
        let rename = (prefix_before(one.module, shared), prefix_before(stem, shared));
        if stem != one.module && !is_wrapper_rename(&rename) {
            let compare = resolution.problems.len() < COMPARED;
            resolution.problems.push(unresolved(one, indices.of(one.parameter), compare));
            *slot = None;
        }
    }
    resolution.renames.retain(|rename, _| is_wrapper_rename(rename));
}

/// A module found among others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FoundModule {
    /// Its place among them.
    pub(crate) index: usize,
    /// Prefixes that differ, ours and theirs.
    pub(crate) rename: Option<(String, String)>,
}

/// Finds modules among `known` ones by the same rules. Names that fit several are a problem; for
/// those that fit none, the caller knows more to say.
pub(crate) fn modules(
    wanted: &[&str],
    known: &[&str],
    problems: &mut Vec<PlanProblem>,
) -> Vec<Option<FoundModule>> {
    let exact: HashMap<&str, usize> =
        known.iter().enumerate().map(|(index, &module)| (module, index)).collect();
    let mut stems: Vec<(&str, usize)> = exact.iter().map(|(&stem, &index)| (stem, index)).collect();
    stems.sort_by(|a, b| compare_reversed(a.0, b.0));
    let suffixes = SuffixIndex { parameter: String::new(), stems };
    let mut find = |module: &&str| {
        if let Some(&index) = exact.get(module) {
            return Some(FoundModule { index, rename: None });
        }
        match suffixes.resolve(module) {
            Found::One { index, rename } => Some(FoundModule { index, rename: Some(rename) }),
            Found::None => None,
            Found::Several(names) => {
                let candidates = names.iter().map(|name| name.trim_end_matches('.').to_owned());
                let (module, candidates) = ((*module).to_owned(), candidates.collect());
                problems.push(PlanProblem::Ambiguous { module, candidates });
                None
            }
        }
    };
    let found: Vec<Option<FoundModule>> = wanted.iter().map(&mut find).collect();
    // As in `refuse_uneven_prefixes`.
    let all = found.iter().flatten().count();
    let mut modules: BTreeMap<(String, String), usize> = BTreeMap::new();
    for rename in found.iter().flatten().filter_map(|found| found.rename.clone()) {
        *modules.entry(rename).or_default() += 1;
    }
    let even = |found: &FoundModule| {
        found.rename.as_ref().is_none_or(|it| is_wrapper_rename(it) || modules[it] == all)
    };
    found.into_iter().map(|found| found.filter(even)).collect()
}

fn is_wrapper_rename(rename: &(String, String)) -> bool {
    is_wrapper(&rename.0) && is_wrapper(&rename.1)
}

fn refuse_collisions(wanted: &[Wanted<'_>], parameters: &Parameters, resolution: &mut Resolution) {
    let mut taken: HashMap<usize, &Wanted<'_>> = HashMap::new();
    for (one, found) in wanted.iter().zip(&resolution.found) {
        let Some(found) = *found else { continue };
        match taken.entry(found) {
            Entry::Vacant(slot) => {
                slot.insert(one);
            }
            Entry::Occupied(slot)
                if (slot.get().module, slot.get().parameter) == (one.module, one.parameter) => {}
            Entry::Occupied(slot) => resolution.problems.push(PlanProblem::Collision {
                first: slot.get().module.to_owned(),
                second: one.module.to_owned(),
                parameter: parameters.get(found).name.clone(),
            }),
        }
    }
}

fn unresolved(wanted: &Wanted<'_>, suffixes: &SuffixIndex<'_>, compare: bool) -> PlanProblem {
    let nearest = if compare { suffixes.nearest(wanted.module) } else { Vec::new() };
    let (module, parameter) = (wanted.module.to_owned(), wanted.parameter.to_owned());
    PlanProblem::Unresolved { module, parameter, nearest }
}

fn is_wrapper(prefix: &str) -> bool {
    prefix.is_empty() || prefix.split('.').all(|part| WRAPPERS.contains(&part))
}

/// The module of a parameter.
pub(crate) fn module_of(name: &str) -> &str {
    name.rsplit_once('.').map_or("", |parts| parts.0)
}

enum Found {
    One { index: usize, rename: (String, String) },
    Several(Vec<String>),
    None,
}

/// One [`SuffixIndex`] per parameter name that was asked for.
struct Indices<'a> {
    parameters: &'a Parameters,
    by_parameter: BTreeMap<String, SuffixIndex<'a>>,
}

impl<'a> Indices<'a> {
    fn of(&mut self, parameter: &str) -> &SuffixIndex<'a> {
        let all = self.parameters;
        self.by_parameter
            .entry(parameter.to_owned())
            .or_insert_with(|| SuffixIndex::new(all, parameter))
    }
}

/// The modules that have a parameter of one name, sorted by their reversed names, so that those
/// with the longest common suffix are neighbours.
struct SuffixIndex<'a> {
    parameter: String,
    stems: Vec<(&'a str, usize)>,
}

impl<'a> SuffixIndex<'a> {
    fn new(parameters: &'a Parameters, parameter: &str) -> SuffixIndex<'a> {
        let mut stems: Vec<(&str, usize)> = parameters
            .all()
            .iter()
            .enumerate()
            .filter_map(|(index, entry)| {
                let (stem, last) = entry.name.rsplit_once('.')?;
                (last == parameter).then_some((stem, index))
            })
            .collect();
        stems.sort_by(|a, b| compare_reversed(a.0, b.0));
        SuffixIndex { parameter: parameter.to_owned(), stems }
    }

    fn resolve(&self, module: &str) -> Found {
        let at = self
            .stems
            .partition_point(|(stem, _)| compare_reversed(stem, module) == Ordering::Less);
        let shared = |index: usize| self.stems.get(index).map_or(0, |s| shared_suffix(s.0, module));
        let longest = shared(at).max(at.checked_sub(1).map_or(0, shared));
        if longest == 0 {
            return Found::None;
        }
        let mut first = at;
        while first > 0 && shared(first - 1) == longest {
            first -= 1;
        }
        let mut end = at;
        while shared(end) == longest {
            end += 1;
        }
        let ours = prefix_before(module, longest);
        // A one-part name such as `proj` ends too many names to mean one of them.
        let specific = module[module.len() - longest..].contains('.');
        let candidates: Vec<(&(&str, usize), String)> = self.stems[first..end]
            .iter()
            .map(|entry| (entry, prefix_before(entry.0, longest)))
            .filter(|(_, theirs)| {
                let wrappers = is_wrapper(&ours) && is_wrapper(theirs);
                // A numbered part belongs to a layer, not to a wrapper.
                let one_sided = (ours.is_empty() && !has_number(theirs))
                    || (theirs.is_empty() && !has_number(&ours));
                wrappers || (one_sided && specific)
            })
            .collect();
        match candidates.as_slice() {
            [] => Found::None,
            [((_, index), theirs)] => Found::One { index: *index, rename: (ours, theirs.clone()) },
            several => {
                let name = |candidate: &(&(&str, usize), String)| {
                    format!("{}.{}", candidate.0.0, self.parameter)
                };
                let mut names: Vec<String> = several.iter().map(name).collect();
                names.sort();
                Found::Several(names)
            }
        }
    }

    /// The names most like `module`: those that share most of its end and of its beginning.
    fn nearest(&self, module: &str) -> Vec<String> {
        let score = |stem: &str| {
            let ends = stem.bytes().rev().zip(module.bytes().rev());
            let begins = stem.bytes().zip(module.bytes());
            ends.take_while(|(a, b)| a == b).count() + begins.take_while(|(a, b)| a == b).count()
        };
        let mut best: Vec<(usize, &str)> = Vec::new();
        for (stem, _) in &self.stems {
            let candidate = (score(stem), *stem);
            let place = best.partition_point(|entry| {
                entry.0 > candidate.0 || (entry.0 == candidate.0 && entry.1 <= candidate.1)
            });
            best.insert(place, candidate);
            best.truncate(NEAREST);
        }
        best.into_iter()
            .filter(|entry| entry.0 > 0)
            .map(|entry| format!("`{}.{}`", entry.1, self.parameter))
            .collect()
    }
}

/// What stands before the last `suffix` bytes of a name, without the dot between.
fn prefix_before(name: &str, suffix: usize) -> String {
    name[..name.len() - suffix].trim_end_matches('.').to_owned()
}

fn has_number(prefix: &str) -> bool {
    prefix.split('.').any(is_number)
}

fn compare_reversed(a: &str, b: &str) -> Ordering {
    a.bytes().rev().cmp(b.bytes().rev())
}

/// The length in bytes of the longest common suffix that begins at a dotted part of both names.
fn shared_suffix(a: &str, b: &str) -> usize {
    let common = a.bytes().rev().zip(b.bytes().rev()).take_while(|(x, y)| x == y).count();
    let begins_part = |name: &str, length: usize| {
        length == name.len() || name.as_bytes()[name.len() - length - 1] == b'.'
    };
    (1..=common).rev().find(|&length| begins_part(a, length) && begins_part(b, length)).unwrap_or(0)
}
