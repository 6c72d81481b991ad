//! Which names of two checkpoints mean the same parameter.
//!
//! 1. Equal names.
//! 2. Names that are equal once they are spelled alike: without the parts that wrappers insert
//!    (`_orig_mod`, `_fsdp_wrapped_module`, `_checkpoint_wrapped_module`), and with a norm's `gamma`
//!    and `beta` as `weight` and `bias`, as transformers has loaded old checkpoints of BERT for
//!    years.
//! 3. Names that differ by a prefix, in what is left. What stands before the first number of a name
//!    is its prefix as far as the two differ in it; every two names whose rest is equal, and whose
//!    shapes are, speak for a change of prefix. The one with most votes is taken, then the next one
//!    among the names still left, provided that it
//!    - explains more than half of all parameters of the smaller checkpoint, or
//!    - is a change of wrappers alone (`model.`, `language_model.model.`).
//!
//! Two changes with equally many votes that would match the same parameter differently are an error
//! where they explain the model, and are not used where they concern a few names: those are listed
//! as what only one side has. Nothing is guessed.

use std::borrow::Cow;
use std::collections::HashMap;

use super::problem::{PairProblem, Rename};
use crate::names::is_number;
use crate::parameters::Parameter;

/// Module names that training wrappers insert anywhere in a name.
const INSERTED: [&str; 3] = ["_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod"];

/// Module names that add nothing but a level around a model, as in `resolve`.
const WRAPPERS: [&str; 13] = [
    "_forward_module",
    "backbone",
    "base_model",
    "language_model",
    "llm",
    "lm",
    "model",
    "module",
    "policy",
    "text_model",
    "thinker",
    "transformer",
    "wrapped_model",
];

/// The most changes of prefix that one pair of checkpoints has.
const RENAMES: usize = 16;

/// How many couples of names with one rest are compared: as many towers as eight on each side. Of
/// more, the rest says nothing.
const COUPLES: usize = 64;

/// How many changes of prefix are looked at more closely at once: those with most votes.
const CANDIDATES: usize = 16;

/// How many examples an error shows.
pub(super) const EXAMPLES: usize = 3;

/// Which parameters are the same.
#[derive(Debug, Default)]
pub(super) struct Matching {
    /// Indices of the base's and the fine-tuned model's, ascending by the former.
    pub(super) pairs: Vec<(usize, usize)>,
    /// Pairs whose names only had to be spelled alike.
    pub(super) respelled: Vec<(usize, usize)>,
    /// Changes of prefix, in the order in which they were found.
    pub(super) renames: Vec<Rename>,
    /// What the base would call every parameter of the fine-tuned model.
    pub(super) tuned_as_base: Vec<String>,
}

/// Pairs up the parameters of two models by their names.
///
/// # Errors
/// [`PairProblem::TwoPrefixes`].
pub(super) fn pair_up(base: &[Parameter], tuned: &[Parameter]) -> Result<Matching, PairProblem> {
    let (base_names, tuned_names) = (spelled(base), spelled(tuned));
    let mut work = Work {
        base,
        tuned,
        base_names: &base_names,
        tuned_names: &tuned_names,
        base_taken: vec![false; base.len()],
        tuned_taken: vec![false; tuned.len()],
        pairs: Vec::new(),
    };
    work.equal(&|index| &base[index].name, &|index| &tuned[index].name);
    let equal = work.pairs.len();
    work.equal(&|index| &base_names[index], &|index| &tuned_names[index]);
    let respelled = work.pairs[equal..].to_vec();
    let renames = work.by_prefix()?;

    let mut pairs = work.pairs;
    pairs.sort_unstable();
    let mut tuned_as_base: Vec<String> =
        tuned_names.iter().map(|name| as_base(name, &renames)).collect();
    for &(base_index, tuned_index) in &pairs {
        tuned_as_base[tuned_index].clone_from(&base[base_index].name);
    }
    Ok(Matching { pairs, respelled, renames, tuned_as_base })
}

/// A name of the fine-tuned model with the base's prefix.
fn as_base(name: &str, renames: &[Rename]) -> String {
    let stripped = |rename: &Rename| {
        let rest = (!rename.tuned.is_empty()).then(|| after(name, &rename.tuned)).flatten()?;
        Some(joined(&rename.base, rest))
    };
    renames.iter().find_map(stripped).unwrap_or_else(|| name.to_owned())
}

struct Work<'a> {
    base: &'a [Parameter],
    tuned: &'a [Parameter],
    base_names: &'a [Cow<'a, str>],
    tuned_names: &'a [Cow<'a, str>],
    base_taken: Vec<bool>,
    tuned_taken: Vec<bool>,
    pairs: Vec<(usize, usize)>,
}

/// A change of prefix: the base's and the other's.
type Change<'a> = (&'a str, &'a str);

/// A change of prefix with what speaks for it.
struct Candidate<'a> {
    change: Change<'a>,
    votes: usize,
    /// What it makes equal.
    matched: Vec<(usize, usize)>,
}

impl<'a> Work<'a> {
    fn take(&mut self, base: usize, tuned: usize) {
        self.base_taken[base] = true;
        self.tuned_taken[tuned] = true;
        self.pairs.push((base, tuned));
    }

    fn left(taken: &[bool]) -> impl Iterator<Item = usize> {
        taken.iter().enumerate().filter(|entry| !entry.1).map(|entry| entry.0)
    }

    /// Takes names that are equal among those left.
    fn equal<'n>(&mut self, base: &dyn Fn(usize) -> &'n str, tuned: &dyn Fn(usize) -> &'n str) {
        let theirs: HashMap<&str, usize> =
            Self::left(&self.tuned_taken).map(|index| (tuned(index), index)).collect();
        let found: Vec<(usize, usize)> = Self::left(&self.base_taken)
            .filter_map(|index| Some((index, *theirs.get(base(index))?)))
            .collect();
        found.into_iter().for_each(|(base, tuned)| self.take(base, tuned));
    }

    fn by_prefix(&mut self) -> Result<Vec<Rename>, PairProblem> {
        let smaller = self.base.len().min(self.tuned.len());
        let explains = |votes: usize| 2 * votes > smaller;
        let mut renames = Vec::new();
        while renames.len() < RENAMES {
            let mut votes: Vec<(Change<'a>, usize)> = self.votes().into_iter().collect();
            votes.retain(|&((base, tuned), votes)| {
                explains(votes) || (is_wrapper(base) && is_wrapper(tuned))
            });
            votes.sort_unstable_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(&b.0)));
            votes.truncate(CANDIDATES);
            let candidates: Vec<Candidate<'a>> = votes
                .into_iter()
                .map(|(change, votes)| Candidate { change, votes, matched: self.matched(change) })
                .collect();
            let mut chosen = None;
            for candidate in &candidates {
                match candidate.rival(&candidates) {
                    None => {
                        chosen = Some(candidate);
                        break;
                    }
                    Some(rival) if explains(candidate.votes) => {
                        return Err(self.two_prefixes(candidate, rival));
                    }
                    Some(_) => {}
                }
            }
            let Some(candidate) = chosen else { break };
            renames.push(Rename { parameters: candidate.matched.len(), ..candidate.rename() });
            for &(base, tuned) in &candidate.matched {
                self.take(base, tuned);
            }
        }
        Ok(renames)
    }

    fn two_prefixes(&self, first: &Candidate<'_>, second: &Candidate<'_>) -> PairProblem {
        let named = |(base, tuned): (usize, usize)| {
            (self.base[base].name.clone(), self.tuned[tuned].name.clone())
        };
        let examples = first.contradictions(second).map(|couples| couples.map(named));
        PairProblem::TwoPrefixes {
            ways: Box::new([first.rename(), second.rename()]),
            examples: examples.take(EXAMPLES).collect(),
        }
    }

    /// How many couples of names left speak for each change of prefix.
    fn votes(&self) -> HashMap<Change<'a>, usize> {
        let by_rest = |names: &'a [Cow<'a, str>], taken: &[bool]| {
            let mut rests: HashMap<&'a str, Vec<usize>> = HashMap::new();
            for index in Self::left(taken) {
                rests.entry(rest_of(&names[index])).or_default().push(index);
            }
            rests
        };
        let theirs = by_rest(self.tuned_names, &self.tuned_taken);
        let mut votes: HashMap<Change<'a>, usize> = HashMap::new();
        for (rest, ours) in by_rest(self.base_names, &self.base_taken) {
            let Some(theirs) = theirs.get(rest) else { continue };
            if ours.len().saturating_mul(theirs.len()) > COUPLES {
                continue;
            }
            for &ours in &ours {
                for &theirs in theirs {
                    if same_but_rows(&self.base[ours].shape, &self.tuned[theirs].shape) {
                        let change = change(&self.base_names[ours], &self.tuned_names[theirs]);
                        *votes.entry(change).or_default() += 1;
                    }
                }
            }
        }
        votes
    }

    /// The names left that a change of prefix makes equal.
    fn matched(&self, (base, tuned): Change<'_>) -> Vec<(usize, usize)> {
        let rests: HashMap<&str, usize> = Self::left(&self.tuned_taken)
            .filter_map(|index| Some((after(&self.tuned_names[index], tuned)?, index)))
            .collect();
        Self::left(&self.base_taken)
            .filter_map(|index| Some((index, *rests.get(after(&self.base_names[index], base)?)?)))
            .collect()
    }
}

impl<'a> Candidate<'a> {
    fn rename(&self) -> Rename {
        let (base, tuned) = self.change;
        Rename { base: base.to_owned(), tuned: tuned.to_owned(), parameters: self.votes }
    }

    /// Another one with as many votes that would match something differently.
    fn rival<'c>(&self, candidates: &'c [Candidate<'a>]) -> Option<&'c Candidate<'a>> {
        candidates.iter().find(|other| {
            other.votes == self.votes
                && other.change != self.change
                && self.contradictions(other).next().is_some()
        })
    }

    /// Couples of both that share one parameter and not the other.
    fn contradictions(&self, other: &Candidate<'_>) -> impl Iterator<Item = [(usize, usize); 2]> {
        let by_base: HashMap<usize, usize> = other.matched.iter().copied().collect();
        let by_tuned: HashMap<usize, usize> =
            other.matched.iter().map(|&(base, tuned)| (tuned, base)).collect();
        self.matched.iter().filter_map(move |&(base, tuned)| {
            match (by_base.get(&base), by_tuned.get(&tuned)) {
                (Some(&other), _) if other != tuned => Some([(base, tuned), (base, other)]),
                (_, Some(&other)) if other != base => Some([(base, tuned), (other, tuned)]),
                _ => None,
            }
        })
    }
}

/// Names spelled alike. Where two of one checkpoint would become one, they stay as they are.
fn spelled(parameters: &[Parameter]) -> Vec<Cow<'_, str>> {
    let mut names: Vec<Cow<'_, str>> = parameters.iter().map(|one| spelling(&one.name)).collect();
    let mut counts: HashMap<&str, usize> = HashMap::new();
    names.iter().for_each(|name| *counts.entry(name).or_default() += 1);
    let twice: Vec<bool> = names.iter().map(|name| counts[name.as_ref()] > 1).collect();
    for ((name, twice), parameter) in names.iter_mut().zip(twice).zip(parameters) {
        if twice {
            *name = Cow::Borrowed(&parameter.name);
        }
    }
    names
}

fn spelling(name: &str) -> Cow<'_, str> {
    let (module, leaf) = name.rsplit_once('.').unwrap_or(("", name));
    let norm = module.rsplit('.').next().is_some_and(|last| last.to_lowercase().contains("norm"));
    let leaf = match leaf {
        "gamma" if norm => "weight",
        "beta" if norm => "bias",
        other => other,
    };
    let inserted = |part: &&str| INSERTED.contains(part);
    if !name.ends_with(leaf) || module.split('.').any(|part| inserted(&part)) {
        let parts = module.split('.').filter(|part| !inserted(part) && !part.is_empty());
        return Cow::Owned(parts.chain([leaf]).collect::<Vec<_>>().join("."));
    }
    Cow::Borrowed(name)
}

/// What two names of one parameter must have in common: all from the first number on, or module and
/// parameter where there is none.
fn rest_of(name: &str) -> &str {
    let mut starts = vec![0];
    starts.extend(name.match_indices('.').map(|(at, _)| at + 1));
    let numbered = starts.iter().find(|&&at| name[at..].split('.').next().is_some_and(is_number));
    let start = numbered.copied().unwrap_or_else(|| starts[starts.len().saturating_sub(2)]);
    &name[start..]
}

/// What two names differ in before their longest common end.
fn change<'a>(base: &'a str, tuned: &'a str) -> Change<'a> {
    let common = base.bytes().rev().zip(tuned.bytes().rev()).take_while(|(a, b)| a == b).count();
    let begins_part = |name: &str, length: usize| {
        length == name.len() || name.as_bytes()[name.len() - length - 1] == b'.'
    };
    let shared = (1..=common)
        .rev()
        .find(|&length| begins_part(base, length) && begins_part(tuned, length))
        .unwrap_or(0);
    let before = |name: &'a str| name[..name.len() - shared].trim_end_matches('.');
    (before(base), before(tuned))
}

/// The rest of a name after a prefix, if it begins with it.
fn after<'n>(name: &'n str, prefix: &str) -> Option<&'n str> {
    match prefix {
        "" => Some(name),
        prefix => name.strip_prefix(prefix)?.strip_prefix('.'),
    }
}

fn joined(prefix: &str, rest: &str) -> String {
    if prefix.is_empty() { rest.to_owned() } else { format!("{prefix}.{rest}") }
}

fn is_wrapper(prefix: &str) -> bool {
    prefix.is_empty() || prefix.split('.').all(|part| WRAPPERS.contains(&part))
}

/// Whether shapes are equal, or those of tables that differ in their rows.
fn same_but_rows(first: &[usize], second: &[usize]) -> bool {
    first == second || (first.len() == 2 && second.len() == 2 && first[1] == second[1])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_cut_at_their_first_number() {
        for (name, rest) in [
            ("bert.encoder.layer.0.output.dense.weight", "0.output.dense.weight"),
            ("model.layers.11.mlp.experts.3.w1.weight", "11.mlp.experts.3.w1.weight"),
            ("model.embed_tokens.weight", "embed_tokens.weight"),
            ("norm.weight", "norm.weight"),
            ("logit_scale", "logit_scale"),
            ("0.weight", "0.weight"),
            ("", ""),
            ("a..", "."),
        ] {
            assert_eq!(rest_of(name), rest, "{name}");
        }
    }

    #[test]
    fn a_change_of_prefix_is_what_stands_before_the_common_parts() {
        for (base, tuned, expected) in [
            ("a.w", "model.a.w", ("", "model")),
            ("bert.a.w", "a.w", ("bert", "")),
            ("x.a.w", "y.z.a.w", ("x", "y.z")),
            ("model.a.w", "model.language_model.a.w", ("model", "model.language_model")),
            ("aa.w", "a.w", ("aa", "a")),
            ("a.w", "a.w", ("", "")),
            ("a", "b", ("a", "b")),
        ] {
            assert_eq!(change(base, tuned), expected, "{base} {tuned}");
        }
    }

    #[test]
    fn spellings() {
        for (name, alike) in [
            ("_orig_mod.model.a.weight", "model.a.weight"),
            (
                "model._fsdp_wrapped_module.0._checkpoint_wrapped_module.a.weight",
                "model.0.a.weight",
            ),
            ("LayerNorm.gamma", "LayerNorm.weight"),
            ("a.layernorm_before.beta", "a.layernorm_before.bias"),
            ("a.ls1.gamma", "a.ls1.gamma"),
            ("norm.a.gamma", "norm.a.gamma"),
            ("gamma", "gamma"),
            ("_orig_mod", "_orig_mod"),
        ] {
            assert_eq!(spelling(name), alike);
        }
    }

    #[test]
    fn what_would_become_one_name_stays_apart() {
        let named = |name: &str| Parameter {
            name: name.to_owned(),
            shape: vec![1],
            dtype: lora_format::Dtype::F32,
            source: crate::parameters::Source::Quantised(0),
        };
        let list = ["_orig_mod.a.w", "_orig_mod.b.w", "a.w"].map(named);
        assert_eq!(spelled(&list), ["_orig_mod.a.w", "b.w", "a.w"]);
    }
}
