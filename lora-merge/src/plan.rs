//! Names → jobs. Everything that can be wrong is found here, before a byte is written.

use std::collections::{BTreeMap, HashMap};

use lora_format::Dtype;
use lora_format::checkpoint::{Checkpoint, Location};
use lora_format::fingerprint::Verdict;
use lora_format::model::{Adapter, Form, LowRank, Note};

use crate::error::{Error, PlanProblem, Result};
use crate::identity;
use crate::layout::{self, Choices, OutputLayout};
use crate::orientation::{FromShape, Judge, Orientation, from_shape};
use crate::resolve::{self, Resolution};

/// What the user may ask of a merge's result.
#[derive(Clone, Debug, PartialEq)]
pub struct MergeOptions {
    /// Multiplies every scale; 1 is the adapter as trained.
    pub scale: f64,
    /// The dtype of the output's floating-point tensors; `None` keeps each tensor's own.
    pub dtype: Option<Dtype>,
    /// The largest data size of an output shard, in bytes.
    pub shard_bytes: Option<u64>,
    /// Overrides `fan_in_fan_out` and the other evidence for square weights.
    pub fan_in_fan_out: Option<bool>,
    /// Merge though the base's fingerprint differs.
    pub allow_different_base: bool,
}

impl Default for MergeOptions {
    fn default() -> Self {
        MergeOptions {
            scale: 1.0,
            dtype: None,
            shard_bytes: None,
            fan_in_fan_out: None,
            allow_different_base: false,
        }
    }
}

/// A merge that can be run: every tensor of the adapter has its place in the base.
#[derive(Debug)]
pub struct MergePlan {
    /// The base model.
    pub base: Checkpoint,
    /// The adapter.
    pub adapter: Adapter,
    /// One entry per component, in the adapter's order.
    pub targets: Vec<PlannedTarget>,
    /// Prefixes that differ between adapter and base, with the number of modules.
    pub renames: BTreeMap<(String, String), usize>,
    /// What the base's identity check found.
    pub identity: Verdict,
    /// The output files.
    pub output: OutputLayout,
    /// What the user should know.
    pub notes: Vec<Note>,
}

/// A component with its place in the base.
#[derive(Clone, Debug)]
pub struct PlannedTarget {
    /// Index of the component in the adapter.
    pub component: usize,
    /// The base's parameter.
    pub location: Location,
    /// How the parameter is stored.
    pub orientation: Orientation,
    /// The multiplier of B·A, the user's scale included.
    pub scale: f64,
}

impl MergePlan {
    /// Fits an adapter to a base.
    ///
    /// # Errors
    /// [`Error::Plan`] with everything that does not fit, [`Error::DifferentBase`], or what reading
    /// sampled values of the base meets.
    pub fn new(base: Checkpoint, adapter: Adapter, options: &MergeOptions) -> Result<MergePlan> {
        let modules: Vec<&str> =
            adapter.components.iter().map(|c| c.target.module.as_str()).collect();
        let Resolution { locations, mut problems, renames } = resolve::resolve(&modules, &base);
        let orientations = orient(&base, &adapter, &locations, options, &mut problems);
        if !problems.is_empty() {
            let (adapter, base) = (adapter.path, base.path().to_owned());
            return Err(Error::Plan { adapter, base, problems });
        }

        let mut targets = Vec::with_capacity(locations.len());
        for (component, (location, orientation)) in locations.iter().zip(orientations).enumerate() {
            // Present: a missing one would have been a problem.
            let (Some(location), Some(orientation)) = (*location, orientation) else {
                continue;
            };
            let scale = match &adapter.components[component].form {
                Form::LowRank(factors) => factors.scale() * options.scale,
                _ => continue,
            };
            targets.push(PlannedTarget { component, location, orientation, scale });
        }

        let identity = identity::check(&base, &adapter, &targets)?;
        if let (Verdict::Different { equal, compared, first }, false) =
            (&identity, options.allow_different_base)
        {
            return Err(Error::DifferentBase {
                adapter: adapter.path,
                base: base.path().to_owned(),
                equal: *equal,
                compared: *compared,
                first: first.clone(),
            });
        }

        let by_location: HashMap<Location, usize> =
            targets.iter().enumerate().map(|(index, target)| (target.location, index)).collect();
        let choices = Choices {
            dtype: options.dtype,
            targets: &by_location,
            shard_bytes: options.shard_bytes,
        };
        let output = layout::lay_out(&base, &choices)?;
        let notes = adapter.notes.iter().chain(base.notes()).cloned().collect();
        Ok(MergePlan { base, adapter, targets, renames, identity, output, notes })
    }

    /// The factors of a target.
    pub fn factors(&self, target: &PlannedTarget) -> Option<&LowRank> {
        match &self.adapter.components[target.component].form {
            Form::LowRank(factors) => Some(factors),
            _ => None,
        }
    }

    /// The base's name of a target's parameter.
    pub fn parameter(&self, target: &PlannedTarget) -> &str {
        &self.base.info(target.location).name
    }
}

/// The orientation of every resolved component, or a problem for it.
fn orient(
    base: &Checkpoint,
    adapter: &Adapter,
    locations: &[Option<Location>],
    options: &MergeOptions,
    problems: &mut Vec<PlanProblem>,
) -> Vec<Option<Orientation>> {
    let mut orientations = vec![None; locations.len()];
    let mut decided = BTreeMap::new();
    let mut squares = Vec::new();
    for (index, (component, location)) in adapter.components.iter().zip(locations).enumerate() {
        let Some(location) = *location else { continue };
        let info = base.info(location);
        let Form::LowRank(factors) = &component.form else {
            continue;
        };
        if let Some(problem) = unmergeable(base, &info.name, info.dtype) {
            problems.push(problem);
            continue;
        }
        match from_shape(&info.name, &info.shape, factors) {
            FromShape::Decided(orientation) => {
                decided.insert(info.name.as_str(), orientation);
                orientations[index] = Some(orientation);
            }
            FromShape::Square => squares.push((index, info.name.as_str())),
            FromShape::Misfit(problem) => problems.push(problem),
        }
    }
    let judge = Judge::new(base, adapter.fan_in_fan_out, options.fan_in_fan_out, decided);
    for (index, parameter) in squares {
        match judge.square(parameter) {
            Ok(orientation) => orientations[index] = Some(orientation),
            Err(problem) => problems.push(problem),
        }
    }
    orientations
}

/// Why a delta cannot be added to this parameter whatever its shape.
fn unmergeable(base: &Checkpoint, parameter: &str, dtype: Dtype) -> Option<PlanProblem> {
    if dtype.bits() > 32 || dtype == Dtype::Bool {
        return Some(PlanProblem::Dtype { parameter: parameter.to_owned(), dtype });
    }
    if !dtype.is_merge_float() {
        let method = base
            .config()
            .and_then(|config| config.get("quantization_config")?.get("quant_method")?.as_str())
            .map(str::to_owned);
        let parameter = parameter.to_owned();
        return Some(PlanProblem::Quantised { parameter, dtype, method });
    }
    let head_or_embedding =
        parameter.ends_with("lm_head.weight") || resolve::is_input_embedding(parameter);
    (head_or_embedding && is_tied(base))
        .then(|| PlanProblem::Tied { module: parameter.trim_end_matches(".weight").to_owned() })
}

/// Whether the base ties its output layer to its input embedding: as its configuration says (of a
/// multimodal model, its text part), or, where that is silent because the model type has a default,
/// as the stored values do.
fn is_tied(base: &Checkpoint) -> bool {
    const FIELD: &str = "tie_word_embeddings";
    let said = base.config().and_then(|config| {
        let text = config.get("text_config").and_then(|text| text.get(FIELD));
        config.get(FIELD).or(text)?.as_bool()
    });
    said.unwrap_or_else(|| {
        let find = |wanted: &dyn Fn(&str) -> bool| {
            base.tensors().find(|(_, info)| wanted(&info.name)).map(|found| found.0)
        };
        let head = find(&|name| name.ends_with("lm_head.weight"));
        let embedding = find(&resolve::is_input_embedding);
        matches!((head, embedding), (Some(head), Some(embedding))
            if identity::same_values(base, head, embedding).unwrap_or(false))
    })
}
