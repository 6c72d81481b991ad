//! The two ends of a vocabulary, of which a checkpoint may store one: the input embedding and the
//! output head that is tied to it.
//!
//! Fine-tuning may untie what the base ties, or the two may be saved by programs that differ in
//! which of two equal tensors they store. So a head that one side lacks is its embedding there, if
//! that side ties them, and an embedding that it lacks is its head. Whether it does,
//!
//! - the values say where both are stored,
//! - `tie_word_embeddings` of `config.json` says where one is; without it, the architecture, if one
//!   is named: classes that generate have a head, and one that is not stored is tied;
//! - without either, the values of the other side: a head that training made from an embedding still
//!   points where its rows point, one that began at random does not.

use lora_format::checkpoint::Checkpoint;
use lora_format::vocabulary;
use serde_json::{Map, Value};

use super::model::Model;
use super::names::Matching;
use super::problem::{PairNote, Side};

/// Rows that are compared to see whether a head was made from an embedding.
const SAMPLED_ROWS: usize = 64;

/// The least cosine between sampled rows of an embedding and of a head that was made from it. Of
/// random rows it is near 0, after fine-tuning near 1.
const LEAST_COSINE: f64 = 0.5;

/// What ties mean for a pair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tie {
    /// Nothing: it is a pair of its own.
    #[default]
    None,
    /// Both sides tie embedding and head: this pair is both.
    Both,
    /// Only the base ties it to the other end of the vocabulary: to change one and not the other,
    /// they must be untied.
    Base,
    /// Only the fine-tuned model ties it.
    Tuned,
}

/// One parameter of each model that are the same.
#[derive(Clone, Debug)]
pub(super) struct Match {
    pub(super) base: usize,
    pub(super) tuned: usize,
    /// What the base calls it, or would.
    pub(super) name: String,
    pub(super) tie: Tie,
}

/// What was decided about the ends.
pub(super) struct Ends {
    /// Everything that is a pair.
    pub(super) matches: Vec<Match>,
    /// Parameters that are not, and are not missing on the other side either: (side, index).
    pub(super) absorbed: Vec<(Side, usize)>,
}

/// The ends that one side stores, by index.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Stored {
    embedding: Option<usize>,
    head: Option<usize>,
}

/// Settles the ends of the vocabulary of two models whose other names are matched.
pub(super) fn settle(
    base: &Model<'_>,
    tuned: &Model<'_>,
    matching: &Matching,
    notes: &mut Vec<PairNote>,
) -> Ends {
    let own = |&(base_index, tuned_index): &(usize, usize)| Match {
        base: base_index,
        tuned: tuned_index,
        name: base.parameters().get(base_index).name.clone(),
        tie: Tie::None,
    };
    let mut ends = Ends { matches: matching.pairs.iter().map(own).collect(), absorbed: Vec::new() };
    let base_names: Vec<&str> =
        base.parameters().all().iter().map(|one| one.name.as_str()).collect();
    let tuned_names: Vec<&str> = matching.tuned_as_base.iter().map(String::as_str).collect();
    let (ours, theirs) = (stored(&base_names), stored(&tuned_names));
    // Two models whose embeddings are not each other's have ends that do not correspond.
    let apart = |base: Option<usize>, tuned: Option<usize>| {
        base.is_some()
            && tuned.is_some()
            && !ends.matches.iter().any(|one| Some(one.base) == base && Some(one.tuned) == tuned)
    };
    if !apart(ours.embedding, theirs.embedding) && !apart(ours.head, theirs.head) {
        let base_tied = tied(Side::Base, (base, ours), (tuned, theirs), notes);
        let tuned_tied = tied(Side::Tuned, (tuned, theirs), (base, ours), notes);
        let names = Names { base: &base_names, tuned: &tuned_names };
        ends.join((ours, base_tied), (theirs, tuned_tied), &names);
    }
    ends.absorb_repeats(Side::Base, base, &base_names, notes);
    ends.absorb_repeats(Side::Tuned, tuned, &tuned_names, notes);
    ends
}

/// What every parameter is called, in the base's terms.
struct Names<'a> {
    base: &'a [&'a str],
    tuned: &'a [&'a str],
}

impl Ends {
    fn join(
        &mut self,
        (ours, base_tied): (Stored, bool),
        (theirs, tuned_tied): (Stored, bool),
        names: &Names<'_>,
    ) {
        let name = |base: Option<usize>, tuned: Option<usize>| match (base, tuned) {
            (Some(base), _) => names.base[base].to_owned(),
            (None, Some(tuned)) => names.tuned[tuned].to_owned(),
            (None, None) => String::new(),
        };
        let (base_ends, tuned_ends) = (ours.with_tie(base_tied), theirs.with_tie(tuned_tied));
        if base_tied && tuned_tied {
            let (Some(base), Some(tuned)) = (base_ends.embedding, tuned_ends.embedding) else {
                return;
            };
            self.matches.retain(|one| !ours.contains(one.base) && !theirs.contains(one.tuned));
            let name = name(Some(base), Some(tuned));
            self.matches.push(Match { base, tuned, name, tie: Tie::Both });
            self.absorbed.extend(ours.iter().map(|index| (Side::Base, index)));
            self.absorbed.extend(theirs.iter().map(|index| (Side::Tuned, index)));
            return;
        }
        let tie = match (base_tied, tuned_tied) {
            (true, _) => Tie::Base,
            (_, true) => Tie::Tuned,
            _ => return,
        };
        for (base, tuned, name) in [
            (base_ends.embedding, tuned_ends.embedding, name(ours.embedding, theirs.embedding)),
            (base_ends.head, tuned_ends.head, name(ours.head, theirs.head)),
        ] {
            let (Some(base), Some(tuned)) = (base, tuned) else { continue };
            match self.matches.iter_mut().find(|one| (one.base, one.tuned) == (base, tuned)) {
                Some(known) => known.tie = tie,
                None => self.matches.push(Match { base, tuned, name, tie }),
            }
        }
    }

    /// Ends of a vocabulary that only one side stores, and that repeat what it has in a pair: of T5,
    /// `encoder.embed_tokens.weight` beside `shared.weight`.
    fn absorb_repeats(
        &mut self,
        side: Side,
        model: &Model<'_>,
        names: &[&str],
        notes: &mut Vec<PairNote>,
    ) {
        let index_of = |one: &Match| if side == Side::Base { one.base } else { one.tuned };
        let mut paired: Vec<usize> = self.matches.iter().map(index_of).collect();
        paired.sort_unstable();
        paired.dedup();
        for (index, name) in names.iter().enumerate() {
            let known = paired.binary_search(&index).is_ok()
                || self.absorbed.contains(&(side, index))
                || !vocabulary::is_either(name);
            if known {
                continue;
            }
            let of = paired
                .iter()
                .copied()
                .find(|&other| vocabulary::is_either(names[other]) && equal(model, index, other));
            if let Some(of) = of {
                let name = |index: usize| model.parameters().get(index).name.clone();
                notes.push(PairNote::Repeats { side, name: name(index), of: name(of) });
                self.absorbed.push((side, index));
            }
        }
    }
}

impl Stored {
    fn iter(self) -> impl Iterator<Item = usize> {
        self.embedding.into_iter().chain(self.head)
    }

    fn contains(self, index: usize) -> bool {
        self.iter().any(|one| one == index)
    }

    /// What each end is, stored or tied to the other.
    fn with_tie(self, tied: bool) -> Stored {
        match tied {
            true => Stored {
                embedding: self.embedding.or(self.head),
                head: self.head.or(self.embedding),
            },
            false => self,
        }
    }
}

/// The ends among these names. Of several embeddings (a talker beside a thinker, a codec's tables),
/// the one whose head is known.
fn stored(names: &[&str]) -> Stored {
    let find = |wanted: &dyn Fn(&str) -> bool| -> Vec<usize> {
        names.iter().enumerate().filter(|one| wanted(one.1)).map(|one| one.0).collect()
    };
    let embeddings = find(&vocabulary::is_input_embedding);
    let heads = find(&vocabulary::is_output_head);
    let known = |&embedding: &usize| {
        let head = vocabulary::head_of(names[embedding])?;
        let head = heads.iter().copied().find(|&index| names[index] == head)?;
        Some(Stored { embedding: Some(embedding), head: Some(head) })
    };
    match (embeddings.as_slice(), heads.as_slice()) {
        ([], &[head]) => Stored { embedding: None, head: Some(head) },
        ([], _) => Stored::default(),
        (&[embedding], []) => Stored { embedding: Some(embedding), head: None },
        (&[embedding], &[head]) => Stored { embedding: Some(embedding), head: Some(head) },
        (several, _) => several.iter().find_map(known).unwrap_or_else(|| Stored {
            embedding: several.iter().copied().min_by_key(|&index| names[index].len()),
            head: None,
        }),
    }
}

/// Whether a side ties its ends, as far as that means anything for what the other side stores.
fn tied(
    side: Side,
    (model, ends): (&Model<'_>, Stored),
    (other, theirs): (&Model<'_>, Stored),
    notes: &mut Vec<PairNote>,
) -> bool {
    let said = said(model.checkpoint());
    let known = || said.or_else(|| generates(model.checkpoint()));
    // What this side lacks, if the other one has it, and what it would be.
    let (missing, own) = match (ends, theirs) {
        (Stored { embedding: Some(embedding), head: Some(head) }, _) => {
            let equal = said != Some(false) && equal(model, embedding, head);
            if said == Some(true) && !equal {
                let head = model.parameters().get(head).name.clone();
                notes.push(PairNote::TieContradicted { side, head });
            }
            return equal;
        }
        (Stored { embedding: Some(own), head: None }, Stored { head: Some(theirs), .. })
        | (Stored { embedding: None, head: Some(own) }, Stored { embedding: Some(theirs), .. }) => {
            (theirs, own)
        }
        // No head is stored anywhere; the base's may be tied all the same.
        (Stored { embedding: Some(_), head: None }, _) => return known().unwrap_or(false),
        _ => return false,
    };
    if let Some(known) = known() {
        return known;
    }
    let tied = alike((model, own), (other, missing));
    let missing = other.parameters().get(missing).name.clone();
    notes.push(PairNote::TieFromValues { side, tied, missing });
    tied
}

/// Whether two parameters of a model have the same shape and values.
fn equal(model: &Model<'_>, first: usize, second: usize) -> bool {
    let (first, second) = (model.parameters().get(first), model.parameters().get(second));
    if first.shape != second.shape {
        return false;
    }
    match (model.values(first.source), model.values(second.source)) {
        (Some(ours), Some(theirs)) => ours.equal(&theirs, first.shape.iter().product()),
        _ => false,
    }
}

/// Whether the rows of two tables point the same way, on the whole: a sample of them.
fn alike((first, at): (&Model<'_>, usize), (second, other): (&Model<'_>, usize)) -> bool {
    let (ours, theirs) = (first.parameters().get(at), second.parameters().get(other));
    let (&[rows, cols], &[other_rows, other_cols]) =
        (ours.shape.as_slice(), theirs.shape.as_slice())
    else {
        return false;
    };
    let (Some(ours), Some(theirs)) = (first.values(ours.source), second.values(theirs.source))
    else {
        return false;
    };
    let rows = rows.min(other_rows);
    if cols != other_cols || rows == 0 {
        return false;
    }
    let (mut a, mut b) = (vec![0.0; cols], vec![0.0; cols]);
    let (mut dot, mut first, mut second) = (0.0, 0.0, 0.0);
    for row in (0..rows).step_by(rows.div_ceil(SAMPLED_ROWS)) {
        ours.read(row * cols, &mut a);
        theirs.read(row * cols, &mut b);
        for (&a, &b) in a.iter().zip(&b) {
            let (a, b) = (f64::from(a), f64::from(b));
            dot += a * b;
            first += a * a;
            second += b * b;
        }
    }
    ours.release(0..rows * cols);
    theirs.release(0..rows * cols);
    dot > LEAST_COSINE * (first * second).sqrt()
}

/// What the configuration says of the model, or of its text part.
fn said(model: &Checkpoint) -> Option<bool> {
    const FIELD: &str = "tie_word_embeddings";
    let config = model.config()?;
    let parts = config.values().filter_map(Value::as_object);
    let nested = |part: &Map<String, Value>| part.get(FIELD)?.as_bool();
    let own = config.get(FIELD).and_then(Value::as_bool);
    own.or_else(|| config.get("text_config")?.get(FIELD)?.as_bool())
        .or_else(|| parts.filter_map(nested).next())
}

/// Whether the class that the configuration names has an output head; `None` if it names none.
fn generates(model: &Checkpoint) -> Option<bool> {
    const ENDINGS: [&str; 4] =
        ["ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM"];
    let architectures = model.config()?.get("architectures")?.as_array()?;
    let mut names = architectures.iter().filter_map(Value::as_str).peekable();
    names.peek()?;
    Some(names.any(|name| ENDINGS.iter().any(|ending| name.ends_with(ending))))
}
