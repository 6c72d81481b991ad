//! Names → jobs. Everything that can be wrong is found here, before a byte is written.
//!
//! Every component of every adapter is placed in a parameter of the base; what falls on one
//! parameter becomes one [`PlannedTarget`]: where its W comes from, the low-rank terms and
//! operators that change it, the rows that replace its own.

use std::collections::BTreeMap;

use lora_format::Dtype;
use lora_format::checkpoint::Checkpoint;
use lora_format::fingerprint::Verdict;
use lora_format::model::{Adapter, Component, Form, Note};

use crate::copies;
use crate::error::{Error, PlanProblem, Result};
use crate::experts;
use crate::fit;
use crate::identity;
use crate::layout::{self, Choices, OutputLayout};
use crate::loralib;
use crate::low_rank::Term;
use crate::operator::Matrix;
use crate::orientation::Orientation;
use crate::parameters::{Parameters, Source};
use crate::place::{self, Part, Placed};
use crate::quantised::QuantisedProblem;
use crate::report::ChangeReport;
use crate::spelled;
use crate::tied::{self, Tied};

/// What the user may ask of a merge's result.
#[derive(Clone, Debug, PartialEq)]
pub struct MergeOptions {
    /// Multiplies the weight of every adapter; 1 is as trained.
    pub scale: f64,
    /// The dtype of the output's floating-point tensors; `None` keeps each tensor's own.
    pub dtype: Option<Dtype>,
    /// The largest data size of an output shard, in bytes.
    pub shard_bytes: Option<u64>,
    /// Overrides `fan_in_fan_out` and the other evidence for square weights.
    pub fan_in_fan_out: Option<bool>,
    /// Merge though the base's fingerprint differs.
    pub allow_different_base: bool,
    /// What to do with a change of one of two tied tensors.
    pub tied: Tied,
    /// How the factors of fused experts are packed, where the files cannot say.
    pub moe_layout: Option<experts::Layout>,
}

impl Default for MergeOptions {
    fn default() -> Self {
        MergeOptions {
            scale: 1.0,
            dtype: None,
            shard_bytes: None,
            fan_in_fan_out: None,
            allow_different_base: false,
            tied: Tied::default(),
            moe_layout: None,
        }
    }
}

/// An adapter and how much of it: `Δ = weight · (f(W) − W)`.
#[derive(Clone, Debug)]
pub struct WeightedAdapter {
    /// The adapter.
    pub adapter: Adapter,
    /// Its weight; 1 is the adapter as trained.
    pub weight: f64,
    /// Whether it is taken out of a model that it was merged into: its changes are subtracted.
    pub undo: bool,
}

impl From<Adapter> for WeightedAdapter {
    fn from(adapter: Adapter) -> WeightedAdapter {
        WeightedAdapter { adapter, weight: 1.0, undo: false }
    }
}

/// A merge that can be run: every tensor of every adapter has its place in the base.
#[derive(Debug)]
pub struct MergePlan {
    /// The base model.
    pub base: Checkpoint,
    /// Its parameters.
    pub parameters: Parameters,
    /// The adapters, in the order in which their changes are added.
    pub adapters: Vec<WeightedAdapter>,
    /// One entry per parameter that changes, sorted by name.
    pub targets: Vec<PlannedTarget>,
    /// Prefixes that differ between adapters and base, with the number of modules.
    pub renames: BTreeMap<(String, String), usize>,
    /// What the base's identity check found, for every adapter.
    pub identity: Vec<Verdict>,
    /// The output files.
    pub output: OutputLayout,
    /// Whether the output's head and input embedding are no longer tied.
    pub untied: bool,
    /// The number of rows of the output's embedding, where it is not the base's.
    pub vocabulary: Option<usize>,
    /// What the user should know.
    pub notes: Vec<Note>,
    /// How often every component of every adapter is carried out: once, twice where it changes
    /// both of two tied tensors, or not at all where it is excused.
    pub(crate) uses: Vec<Vec<u64>>,
}

/// A parameter of the output that is not the base's.
#[derive(Clone, Debug)]
pub struct PlannedTarget {
    /// The base's parameter; `None` if the base has none of this name.
    pub parameter: Option<usize>,
    /// Its name in the output.
    pub name: String,
    /// Its shape in the output.
    pub shape: Vec<usize>,
    /// The dtype that it keeps unless another is asked for.
    pub dtype: Dtype,
    /// Where W comes from.
    pub source: Source,
    /// What stochastic rounding is keyed by: its name, of a head that stays tied its embedding's.
    pub(crate) key: String,
    /// Positions of a convolution's kernel; 1 of everything else.
    pub kernel: usize,
    /// Whether its first dimension counts matrices.
    pub stacked: bool,
    /// The matrices that it is a stack of, each with its changes; of all but fused experts, one.
    pub slabs: Vec<Slab>,
    /// What gives some of its rows.
    pub rows: Vec<Change>,
    /// Every component that has a part in it.
    pub changes: Vec<Change>,
}

/// What changes one matrix.
#[derive(Clone, Debug, Default)]
pub struct Slab {
    /// Low-rank terms.
    pub terms: Vec<Term>,
    /// Components that take more than factors.
    pub operators: Vec<OperatorChange>,
}

/// A component that an operator carries out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OperatorChange {
    /// The component.
    pub change: Change,
    /// The matrix that it changes, as it lies there.
    pub(crate) matrix: Matrix,
}

/// A component at work.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Change {
    /// Index of the adapter.
    pub adapter: usize,
    /// Index of its component.
    pub component: usize,
    /// The weight of its change.
    pub weight: f64,
    /// How it lies in the stored matrix; `None` of what replaces, and of parts of a stack.
    pub orientation: Option<Orientation>,
}

impl PlannedTarget {
    /// The rows and columns of one of its matrices: those of a vector are one row, a
    /// convolution's inputs and kernel positions are its columns.
    pub fn matrix(&self) -> (usize, usize) {
        match *self.shape.as_slice() {
            [] => (1, 1),
            [length] => (1, length),
            [_, rows, ref rest @ ..] if self.stacked => (rows, rest.iter().product()),
            [rows, ref rest @ ..] => (rows, rest.iter().product()),
        }
    }
}

impl MergePlan {
    /// Fits adapters to a base.
    ///
    /// # Errors
    /// [`Error::Plan`] with everything that does not fit, [`Error::DifferentBase`], or what reading
    /// sampled values of the base meets.
    pub fn new(
        base: Checkpoint,
        adapters: Vec<WeightedAdapter>,
        options: &MergeOptions,
    ) -> Result<MergePlan> {
        let refuse = |adapters: &[WeightedAdapter], base: &Checkpoint, problems| {
            let adapters = adapters.iter().map(|one| one.adapter.path.clone()).collect();
            Err(Error::Plan { adapters, base: base.path().to_owned(), problems })
        };
        let parameters = match Parameters::of(&base) {
            Ok(parameters) => parameters,
            Err(problems) => return refuse(&adapters, &base, problems),
        };
        let mut adapters = adapters;
        for one in &mut adapters {
            one.weight *= if one.undo { -options.scale } else { options.scale };
        }
        let undoes = adapters.iter().any(|one| one.undo);
        let mut problems = Vec::new();
        let mut placed = Vec::new();
        let mut renames = BTreeMap::new();
        let mut notes = Vec::new();
        for (index, one) in adapters.iter().enumerate() {
            let found = place::place(
                index,
                one,
                undoes,
                &parameters,
                base.config(),
                options.moe_layout,
                &mut problems,
            );
            placed.extend(found.placed);
            notes.extend(found.notes);
            for (rename, count) in found.renames {
                *renames.entry(rename).or_default() += count;
            }
        }
        spelled::reshape(&mut adapters, &placed, &parameters);
        loralib::expand(&mut adapters, &mut placed, &parameters, &mut problems);
        let ties =
            tied::resolve(&base, &parameters, &adapters, options.tied, &mut placed, &mut problems)?;
        let copies = copies::settle(
            &base,
            &parameters,
            &adapters,
            &ties,
            options.allow_different_base,
            &mut placed,
            &mut problems,
        )?;
        let inputs = fit::Inputs {
            base: &base,
            parameters: &parameters,
            adapters: &adapters,
            ties: &ties,
            options,
        };
        let (targets, superfluous) = fit::targets(&inputs, &placed, &mut problems);
        let vocabulary = fit::vocabulary(&parameters, &targets, &mut problems);
        if !problems.is_empty() {
            // Perhaps they are why a parameter was not found, or is of no use.
            let unread = parameters.unexplained().iter();
            let unread =
                unread.filter(|one| !matches!(one, QuantisedProblem::NothingQuantised { .. }));
            problems.extend(unread.cloned().map(PlanProblem::from));
            return refuse(&adapters, &base, problems);
        }
        let uses = uses(&adapters, &placed, &[&ties.repeated[..], &copies, &superfluous].concat())?;

        let mut identity = Vec::with_capacity(adapters.len());
        for (index, one) in adapters.iter().enumerate() {
            if undoes {
                // What is at hand is a merged model, not the base of any adapter.
                identity.push(Verdict::Unknown);
                continue;
            }
            let verdict = identity::check(&base, &parameters, index, &one.adapter, &placed)?;
            if !options.allow_different_base {
                identity::refuse_different(&verdict, &one.adapter, &base)?;
            }
            identity.push(verdict);
        }

        let choices =
            Choices { dtype: options.dtype, targets: &targets, shard_bytes: options.shard_bytes };
        let output = layout::lay_out(&base, &parameters, &choices)?;
        let notes = adapters
            .iter()
            .flat_map(|one| &one.adapter.notes)
            .chain(base.notes())
            .cloned()
            .chain(notes)
            .collect();
        Ok(MergePlan {
            base,
            parameters,
            adapters,
            targets,
            renames,
            identity,
            output,
            untied: ties.untied,
            vocabulary,
            notes,
            uses,
        })
    }

    /// A component of one of the adapters.
    pub fn component(&self, adapter: usize, component: usize) -> &Component {
        &self.adapters[adapter].adapter.components[component]
    }

    /// One component's part in a target, for reports.
    pub fn describe(&self, target: &PlannedTarget, change: &Change) -> ChangeReport {
        let component = self.component(change.adapter, change.component);
        let terms = target.slabs.iter().flat_map(|slab| &slab.terms);
        let own: Vec<&Term> = terms
            .filter(|term| (term.adapter, term.component) == (change.adapter, change.component))
            .collect();
        let (rank, scale) = match (&component.form, own.first()) {
            (Form::LowRank(form), _) => (Some(form.rank()), Some(form.scale() * change.weight)),
            (_, Some(term)) => (Some(term.rank()), Some(term.scale)),
            _ => (None, None),
        };
        ChangeReport {
            adapter: change.adapter,
            module: component.target.module.clone(),
            method: component.form.method(),
            rank,
            scale,
            weight: change.weight,
            // A vector has none.
            orientation: change.orientation.filter(|_| target.shape.len() > 1),
        }
    }

    /// The form of a term.
    pub(crate) fn form(&self, term: &Term) -> &Form {
        &self.component(term.adapter, term.component).form
    }
}

/// How often every component is carried out. One that is carried out nowhere is excused only as
/// the repetition of another, as the gain of a bias that the layer does not have, or as a copy of
/// the base where a merged model is at hand.
fn uses(
    adapters: &[WeightedAdapter],
    placed: &[Placed],
    superfluous: &[fit::Key],
) -> Result<Vec<Vec<u64>>> {
    let undoes = adapters.iter().any(|one| one.undo);
    let mut uses: Vec<Vec<u64>> =
        adapters.iter().map(|one| vec![0; one.adapter.components.len()]).collect();
    for place in placed {
        if superfluous.contains(&(place.adapter, place.component)) {
            continue;
        }
        let slot = &mut uses[place.adapter][place.component];
        match place.part {
            Part::Whole => *slot += 1,
            // Its parts are spread over matrices, and together they are the whole.
            Part::Slabs { .. } => *slot = 1,
        }
    }
    for (adapter, one) in adapters.iter().enumerate() {
        for (index, component) in one.adapter.components.iter().enumerate() {
            let excused = superfluous.contains(&(adapter, index))
                || (matches!(component.form, Form::Base(_)) && undoes)
                || (matches!(component.form, Form::Gain(_))
                    && component.target.parameter == "bias");
            if uses[adapter][index] == 0 && !excused {
                let tensor = component.target.name();
                let elements = component.form.tensors().iter().map(|t| t.elements() as u64).sum();
                let adapter = one.adapter.path.clone();
                return Err(Error::Unconsumed { adapter, tensor, used: 0, elements });
            }
        }
    }
    Ok(uses)
}
