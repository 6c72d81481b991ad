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

use lora_format::checkpoint::{Checkpoint, Location};

use crate::error::PlanProblem;
use crate::names::is_number;

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

/// The parameter that every module of an adapter uses.
const PARAMETER: &str = ".weight";

/// How many nearest names an error shows.
const NEAREST: usize = 3;

/// How many unresolved modules are compared with every name of the base; on a wrong base all of
/// them are unresolved, and the first hundred say enough.
const COMPARED: usize = 100;

/// Where the modules of an adapter are in a base.
#[derive(Debug, Default)]
pub struct Resolution {
    /// One location per module, in the order given; `None` where a problem stands instead.
    pub locations: Vec<Option<Location>>,
    /// What stands in the way.
    pub problems: Vec<PlanProblem>,
    /// Prefixes that differ, with the number of modules: (adapter's, base's) → count.
    pub renames: BTreeMap<(String, String), usize>,
}

/// Resolves every module of an adapter, sorted by name, against the base.
pub fn resolve(modules: &[&str], base: &Checkpoint) -> Resolution {
    let mut resolution = Resolution::default();
    let mut suffixes = None;
    for module in modules {
        if let Some(location) = base.find(&format!("{module}{PARAMETER}")) {
            resolution.locations.push(Some(location));
            continue;
        }
        let suffixes = suffixes.get_or_insert_with(|| SuffixIndex::new(base));
        match suffixes.resolve(module) {
            Found::One { location, rename } => {
                *resolution.renames.entry(rename).or_default() += 1;
                resolution.locations.push(Some(location));
            }
            Found::Several(candidates) => {
                let module = (*module).to_owned();
                resolution.problems.push(PlanProblem::Ambiguous { module, candidates });
                resolution.locations.push(None);
            }
            Found::None => {
                let compare = resolution.problems.len() < COMPARED;
                resolution.problems.push(unresolved(module, base, suffixes, compare));
                resolution.locations.push(None);
            }
        }
    }
    refuse_uneven_prefixes(modules, base, &mut resolution);
    refuse_collisions(modules, base, &mut resolution);
    resolution
}

/// A prefix that only one side has and that is no known wrapper must stand before every module:
/// one that stands before some of them is another tower of the model (`vision_tower.`).
fn refuse_uneven_prefixes(modules: &[&str], base: &Checkpoint, resolution: &mut Resolution) {
    let found = resolution.locations.iter().flatten().count();
    let even = resolution.renames.values().all(|&modules| modules == found);
    if even || resolution.renames.keys().all(is_wrapper_rename) {
        return;
    }
    let suffixes = SuffixIndex::new(base);
    for (module, location) in modules.iter().zip(&mut resolution.locations) {
        let Some(found) = *location else { continue };
        let stem = stem(base, found);
        let shared = shared_suffix(stem, module);
        let rename = (prefix_before(module, shared), prefix_before(stem, shared));
        if stem != *module && !is_wrapper_rename(&rename) {
            let compare = resolution.problems.len() < COMPARED;
            resolution.problems.push(unresolved(module, base, &suffixes, compare));
            *location = None;
        }
    }
    resolution.renames.retain(|rename, _| is_wrapper_rename(rename));
}

fn is_wrapper_rename(rename: &(String, String)) -> bool {
    is_wrapper(&rename.0) && is_wrapper(&rename.1)
}

fn refuse_collisions(modules: &[&str], base: &Checkpoint, resolution: &mut Resolution) {
    let mut taken: HashMap<Location, &str> = HashMap::new();
    for (module, location) in modules.iter().zip(&resolution.locations) {
        let Some(location) = *location else { continue };
        match taken.entry(location) {
            Entry::Vacant(slot) => {
                slot.insert(module);
            }
            Entry::Occupied(slot) => resolution.problems.push(PlanProblem::Collision {
                first: (*slot.get()).to_owned(),
                second: (*module).to_owned(),
                parameter: base.info(location).name.clone(),
            }),
        }
    }
}

fn unresolved(
    module: &str,
    base: &Checkpoint,
    suffixes: &SuffixIndex<'_>,
    compare: bool,
) -> PlanProblem {
    let last = module.rsplit('.').next().unwrap_or(module);
    if last == "lm_head" && base.tensors().any(|(_, info)| is_input_embedding(&info.name)) {
        return PlanProblem::Tied { module: module.to_owned() };
    }
    for suffix in [".qweight", ".weight_packed"] {
        if let Some(location) = base.find(&format!("{module}{suffix}")) {
            let info = base.info(location);
            let (parameter, dtype) = (info.name.clone(), info.dtype);
            return PlanProblem::Quantised { parameter, dtype, method: None };
        }
    }
    let nearest = if compare { suffixes.nearest(module) } else { Vec::new() };
    PlanProblem::Unresolved { module: module.to_owned(), nearest }
}

/// Whether this is the input embedding of a language model.
pub(crate) fn is_input_embedding(name: &str) -> bool {
    ["embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight"]
        .iter()
        .any(|ending| name.ends_with(ending))
}

fn is_wrapper(prefix: &str) -> bool {
    prefix.is_empty() || prefix.split('.').all(|part| WRAPPERS.contains(&part))
}

/// A parameter's module name.
fn stem(base: &Checkpoint, location: Location) -> &str {
    let name = &base.info(location).name;
    name.strip_suffix(PARAMETER).unwrap_or(name)
}

enum Found {
    One { location: Location, rename: (String, String) },
    Several(Vec<String>),
    None,
}

/// The base's modules sorted by their reversed names, so that those with the longest common
/// suffix are neighbours.
struct SuffixIndex<'a> {
    stems: Vec<(&'a str, Location)>,
}

impl<'a> SuffixIndex<'a> {
    fn new(base: &'a Checkpoint) -> SuffixIndex<'a> {
        let mut stems: Vec<(&str, Location)> = base
            .tensors()
            .filter_map(|(location, info)| Some((info.name.strip_suffix(PARAMETER)?, location)))
            .collect();
        stems.sort_by(|a, b| compare_reversed(a.0, b.0));
        SuffixIndex { stems }
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
        let candidates: Vec<(&(&str, Location), String)> = self.stems[first..end]
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
            [((_, location), theirs)] => {
                Found::One { location: *location, rename: (ours, theirs.clone()) }
            }
            several => {
                let name = |candidate: &(&(&str, Location), String)| {
                    format!("{}{PARAMETER}", candidate.0.0)
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
            .map(|entry| format!("`{}{PARAMETER}`", entry.1))
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
