//! A base and its full fine-tune, parameter by parameter: which parameters are the same, what each
//! is to its layer, and how much it changed.
//!
//! [`Pairing::new`] reads the headers of both checkpoints and matches every parameter of one with
//! one of the other or lists it: as what only one side has, as what has another shape, as what is
//! stored in a type that is not compared. Nothing is left out silently. It reads values only where
//! names and configuration leave open whether two tensors are one (tied embeddings), and of
//! parameters that are not compared, to say whether their bytes are equal. [`Pairing::open`] maps the
//! files, [`Mapped::delta`] reads ΔW where it lies, in f32 and by rows, and [`measure`] sums it up.
//!
//! | file      | owns                                                     |
//! |-----------|----------------------------------------------------------|
//! | `names`   | which names mean the same parameter: changes of prefix   |
//! | `ends`    | tied embeddings and heads, of which a side may store one |
//! | `kind`    | what a parameter is to its layer                         |
//! | `model`   | the values of one checkpoint, plain or quantised         |
//! | `delta`   | ΔW of one pair                                           |
//! | `measure` | how much a parameter changed                             |
//! | `problem` | what is refused, and what is only noted                  |
//!
//! The base's names and shapes are those of the adapter that is made of the pairs. Values are f32,
//! f16 or bf16 on either side in any mix, or quantised in a way that [`quantised`](crate::quantised)
//! reads.

mod delta;
mod ends;
mod kind;
mod measure;
mod model;
mod names;
mod problem;
mod profile;

use std::collections::BTreeMap;

use lora_format::checkpoint::Checkpoint;
use lora_format::container::safetensors::TensorInfo;
use lora_format::{Dtype, Shape};

use crate::error::{Error, Result};
use crate::kernels::Isa;
use crate::orientation::{Judge, Orientation};
use crate::parameters::{Parameter, Parameters, Source};
use ends::{Ends, Match};
use model::Model;

pub use delta::{Delta, Stored};
pub use ends::Tie;
pub use kind::Kind;
pub use measure::{Change, NonFinite, measure};
pub use problem::{PairNote, PairProblem, Rename, Side};
pub use profile::profiles;

/// Base and fine-tune, parameter by parameter.
#[derive(Debug)]
pub struct Pairing {
    /// The model that training began with.
    pub base: Checkpoint,
    /// The model that it ended with.
    pub tuned: Checkpoint,
    /// Parameters that both have and that can be compared, sorted by the base's names.
    pub pairs: Vec<Pair>,
    /// Parameters that both have in types that are not compared, whose bytes are equal.
    pub identical: Vec<String>,
    /// Parameters that both have in types that are not compared, and that are not equal.
    pub incomparable: Vec<Incomparable>,
    /// Parameters that both have in shapes that nothing explains.
    pub reshaped: Vec<Reshaped>,
    /// Parameters that only the base has.
    pub only_base: Vec<String>,
    /// Parameters that only the fine-tuned model has.
    pub only_tuned: Vec<String>,
    /// Changes of prefix between the names.
    pub renames: Vec<Rename>,
    /// What was noticed besides.
    pub notes: Vec<PairNote>,
    base_parameters: Parameters,
    tuned_parameters: Parameters,
}

/// A parameter that both have.
#[derive(Clone, Debug, PartialEq)]
pub struct Pair {
    /// What the base calls it, or would if it stored it: the name that a change of it goes by.
    pub name: String,
    /// The base's parameter that has its values: `name`, but for a head that the base ties and does
    /// not store.
    pub base_name: String,
    /// The fine-tuned model's parameter that has its values.
    pub tuned_name: String,
    /// What it is to its layer.
    pub kind: Kind,
    /// The base's shape.
    pub shape: Vec<usize>,
    /// The fine-tuned model's: the same, but for the rows of a vocabulary.
    pub tuned_shape: Vec<usize>,
    /// The dtype that the base stores it in, or dequantises it to.
    pub base_dtype: Dtype,
    /// The fine-tuned model's.
    pub tuned_dtype: Dtype,
    /// Where the base's values are.
    pub base_source: Source,
    /// Where the fine-tuned model's are.
    pub tuned_source: Source,
    /// Whether the base stores a linear weight as (in, out), as transformers' Conv1D does. (How a
    /// stack of experts is stored is not decided here.)
    pub transposed: bool,
    /// What contradicts itself about that: then `transposed` is not to be relied on.
    pub orientation_doubt: Option<String>,
    /// What ties mean for it.
    pub tie: Tie,
}

/// A parameter that both have in types that are not compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Incomparable {
    /// The base's name.
    pub name: String,
    /// The fine-tuned model's.
    pub tuned_name: String,
    /// Its shape.
    pub shape: Shape,
    /// The base's dtype.
    pub base_dtype: Dtype,
    /// The fine-tuned model's.
    pub tuned_dtype: Dtype,
}

/// A parameter that has another shape in the fine-tuned model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reshaped {
    /// The base's name.
    pub name: String,
    /// The fine-tuned model's.
    pub tuned_name: String,
    /// The base's shape.
    pub shape: Shape,
    /// The fine-tuned model's.
    pub tuned_shape: Shape,
}

impl Pairing {
    /// Pairs up two checkpoints.
    ///
    /// # Errors
    /// [`Error::Pair`] if they have nothing in common, if their names can be matched in two equally
    /// good ways, or if one of them stores a parameter twice; [`Error::Format`] if a file cannot be
    /// mapped.
    pub fn new(base: Checkpoint, tuned: Checkpoint) -> Result<Pairing> {
        let refuse = |problem| Error::Pair {
            base: base.path().to_owned(),
            tuned: tuned.path().to_owned(),
            problem: Box::new(problem),
        };
        let parameters = |side, checkpoint| {
            Parameters::of(checkpoint)
                .map_err(|problems| refuse(PairProblem::Parameters { side, problems }))
        };
        let base_parameters = parameters(Side::Base, &base)?;
        let tuned_parameters = parameters(Side::Tuned, &tuned)?;
        let matching =
            names::pair_up(base_parameters.all(), tuned_parameters.all()).map_err(refuse)?;

        let mut lists = Lists::default();
        lists.note_names(&base_parameters, &tuned_parameters, &matching);
        let base_model = Model::open(&base, &base_parameters)?;
        let tuned_model = Model::open(&tuned, &tuned_parameters)?;
        let Ends { mut matches, absorbed } =
            ends::settle(&base_model, &tuned_model, &matching, &mut lists.notes);
        if matches.is_empty() {
            return Err(refuse(nothing_in_common(&base_parameters, &tuned_parameters)));
        }
        matches.sort_by(|a, b| a.name.cmp(&b.name));
        for one in &matches {
            lists.enter(one, &base_model, &tuned_model);
        }
        let only = |side: Side, parameters: &Parameters, index_of: &dyn Fn(&Match) -> usize| {
            let mut missing = vec![true; parameters.all().len()];
            matches.iter().for_each(|one| missing[index_of(one)] = false);
            let of_side = absorbed.iter().filter(|one| one.0 == side);
            of_side.for_each(|one| missing[one.1] = false);
            let missing = parameters.all().iter().zip(missing).filter(|one| one.1);
            missing.map(|(parameter, _)| parameter.name.clone()).collect()
        };
        let only_base = only(Side::Base, &base_parameters, &|one| one.base);
        let only_tuned = only(Side::Tuned, &tuned_parameters, &|one| one.tuned);
        drop((base_model, tuned_model));

        orient(&mut lists.pairs, &base, &base_parameters);
        let Lists { pairs, identical, incomparable, reshaped, notes } = lists;
        Ok(Pairing {
            base,
            tuned,
            pairs,
            identical,
            incomparable,
            reshaped,
            only_base,
            only_tuned,
            renames: matching.renames,
            notes,
            base_parameters,
            tuned_parameters,
        })
    }

    /// Maps the files of both.
    ///
    /// # Errors
    /// [`Error::Format`] if one of them cannot be mapped.
    pub fn open(&self) -> Result<Mapped<'_>> {
        let base = Model::open(&self.base, &self.base_parameters)?;
        let tuned = Model::open(&self.tuned, &self.tuned_parameters)?;
        Ok(Mapped { pairing: self, base, tuned, isa: Isa::detect() })
    }

    /// The base's parameters.
    pub fn base_parameters(&self) -> &Parameters {
        &self.base_parameters
    }

    /// The fine-tuned model's parameters.
    pub fn tuned_parameters(&self) -> &Parameters {
        &self.tuned_parameters
    }
}

impl Pair {
    /// Rows of the fine-tuned model's table that the base's does not have: added tokens.
    pub fn rows_added(&self) -> usize {
        self.first(&self.tuned_shape).saturating_sub(self.first(&self.shape))
    }

    /// Rows of the base's table that the fine-tuned model's does not have: padding, mostly.
    pub fn rows_removed(&self) -> usize {
        self.first(&self.shape).saturating_sub(self.first(&self.tuned_shape))
    }

    /// Rows and columns of the matrix that is compared; see [`Delta::shape`].
    pub fn matrix(&self) -> (usize, usize) {
        // Of a tensor without elements, dimensions may be anything.
        let product =
            |sizes: &[usize]| sizes.iter().fold(1, |all: usize, n| all.saturating_mul(*n));
        match (self.kind, self.shape.as_slice()) {
            (_, []) => (1, 1),
            (_, &[length]) => (1, length),
            (Kind::Stack, &[experts, rows, cols]) => (experts.saturating_mul(rows), cols),
            (_, &[rows, ref rest @ ..]) => (rows.min(self.first(&self.tuned_shape)), product(rest)),
        }
    }

    /// Elements that are compared.
    pub fn elements(&self) -> u64 {
        let (rows, cols) = self.matrix();
        (rows as u64).saturating_mul(cols as u64)
    }

    /// Whether one side is quantised, so that the differences include what quantising lost.
    pub fn is_quantised(&self) -> bool {
        let quantised = |source| matches!(source, Source::Quantised(_));
        quantised(self.base_source) || quantised(self.tuned_source)
    }

    fn first(&self, shape: &[usize]) -> usize {
        shape.first().copied().unwrap_or(1)
    }
}

/// A pairing with both models' files mapped.
#[derive(Debug)]
pub struct Mapped<'a> {
    pairing: &'a Pairing,
    base: Model<'a>,
    tuned: Model<'a>,
    isa: Isa,
}

impl<'a> Mapped<'a> {
    /// What is mapped.
    pub fn pairing(&self) -> &'a Pairing {
        self.pairing
    }

    /// ΔW of a pair, by its index among [`Pairing::pairs`].
    ///
    /// # Panics
    /// If there is no such pair.
    pub fn delta(&self, pair: usize) -> Delta<'_> {
        let pair = &self.pairing.pairs[pair];
        let (rows, cols) = pair.matrix();
        let base = self.base.values(pair.base_source);
        let tuned = self.tuned.values(pair.tuned_source);
        match (base, tuned) {
            (Some(base), Some(tuned)) => Delta { rows, cols, base, tuned, isa: self.isa },
            _ => unreachable!("only what can be read is a pair"),
        }
    }

    /// A tensor of the fine-tuned model as it is stored, by its name there: for what is kept whole.
    pub fn tuned_tensor(&self, name: &str) -> Option<(&TensorInfo, &[u8])> {
        let location = self.pairing.tuned.find(name)?;
        Some((self.pairing.tuned.info(location), self.tuned.bytes(location)))
    }

    /// Gives the pages of such a tensor back.
    pub fn release_tuned(&self, name: &str) {
        if let Some(location) = self.pairing.tuned.find(name) {
            self.tuned.release(location);
        }
    }
}

/// What becomes of the matches.
#[derive(Default)]
struct Lists {
    pairs: Vec<Pair>,
    identical: Vec<String>,
    incomparable: Vec<Incomparable>,
    reshaped: Vec<Reshaped>,
    notes: Vec<PairNote>,
}

impl Lists {
    fn note_names(&mut self, base: &Parameters, tuned: &Parameters, matching: &names::Matching) {
        for (side, parameters) in [(Side::Base, base), (Side::Tuned, tuned)] {
            let problems = parameters.unexplained().iter().cloned();
            self.notes.extend(problems.map(|problem| PairNote::Unreadable { side, problem }));
        }
        self.notes.extend(matching.renames.iter().cloned().map(PairNote::Renamed));
        if let Some(&(first, second)) = matching.respelled.first() {
            self.notes.push(PairNote::Respelled {
                parameters: matching.respelled.len(),
                base: base.get(first).name.clone(),
                tuned: tuned.get(second).name.clone(),
            });
        }
    }

    fn enter(&mut self, one: &Match, base_model: &Model<'_>, tuned_model: &Model<'_>) {
        let base = base_model.parameters().get(one.base);
        let tuned = tuned_model.parameters().get(one.tuned);
        let called = Parameter { name: one.name.clone(), ..base.clone() };
        let kind = kind::kind(&called, base_model.parameters());
        let table = matches!(kind, Kind::Embedding | Kind::Head)
            && tuned.shape.len() == 2
            && base.shape.get(1..) == tuned.shape.get(1..);
        if base.shape != tuned.shape && !table {
            self.reshaped.push(Reshaped {
                name: one.name.clone(),
                tuned_name: tuned.name.clone(),
                shape: Shape(base.shape.clone()),
                tuned_shape: Shape(tuned.shape.clone()),
            });
            return;
        }
        let readable =
            base_model.values(base.source).is_some() && tuned_model.values(tuned.source).is_some();
        if readable {
            self.pairs.push(Pair {
                name: one.name.clone(),
                base_name: base.name.clone(),
                tuned_name: tuned.name.clone(),
                kind,
                shape: base.shape.clone(),
                tuned_shape: tuned.shape.clone(),
                base_dtype: base.dtype,
                tuned_dtype: tuned.dtype,
                base_source: base.source,
                tuned_source: tuned.source,
                transposed: false,
                orientation_doubt: None,
                tie: one.tie,
            });
            return;
        }
        let equal = match (base.source, tuned.source) {
            (Source::Plain(ours), Source::Plain(theirs)) if base.dtype == tuned.dtype => {
                model::same_bytes((base_model, ours), (tuned_model, theirs))
            }
            _ => false,
        };
        if equal {
            self.identical.push(one.name.clone());
        } else {
            self.incomparable.push(Incomparable {
                name: one.name.clone(),
                tuned_name: tuned.name.clone(),
                shape: Shape(base.shape.clone()),
                base_dtype: base.dtype,
                tuned_dtype: tuned.dtype,
            });
        }
    }
}

fn nothing_in_common(base: &Parameters, tuned: &Parameters) -> PairProblem {
    let few = |parameters: &Parameters| {
        let names = parameters.all().iter().map(|one| one.name.clone());
        names.take(names::EXAMPLES).collect()
    };
    PairProblem::NothingInCommon {
        base: few(base),
        base_parameters: base.all().len(),
        tuned: few(tuned),
        tuned_parameters: tuned.all().len(),
    }
}

/// Finds the linear weights that are stored as (in, out): by the length of their own bias, by their
/// siblings and the model type as a merge decides of a square weight, else by the lack of a bias,
/// which transformers' Conv1D always has.
fn orient(pairs: &mut [Pair], base: &Checkpoint, parameters: &Parameters) {
    let judge = Judge::new(parameters, base.config(), None, None, BTreeMap::new());
    for pair in pairs {
        let (Kind::Linear, &[rows, cols]) = (pair.kind, pair.shape.as_slice()) else { continue };
        let stem = pair.base_name.strip_suffix(".weight");
        let bias = stem.and_then(|stem| parameters.find(&format!("{stem}.bias")));
        let bias = bias.map(|index| parameters.get(index).elements());
        let by_bias = [(rows, Orientation::OutIn), (cols, Orientation::InOut)]
            .into_iter()
            .find(|&(length, _)| rows != cols && bias == Some(length as u64));
        let judged = match by_bias {
            Some((_, orientation)) => Ok(orientation),
            None if stem.is_none() || (bias.is_none() && rows != cols) => Ok(Orientation::OutIn),
            None => judge.square(&pair.base_name),
        };
        match judged {
            Ok(orientation) => pair.transposed = orientation == Orientation::InOut,
            Err(doubt) => pair.orientation_doubt = Some(doubt.to_string()),
        }
    }
}
