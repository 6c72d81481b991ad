//! The report, `lora-cli/merge/2` and its like; `docs/cli-json.md` describes it.

use clap::ValueEnum;
use lora_format::fingerprint::Verdict;
use lora_merge::parameters::Source;
use lora_merge::report::{ChangeReport, MergeReport, Realised, Recovered};
use serde::Serialize;

use super::{Making, RoundingChoice, job_counts, memory_bound, text};

/// What was done, or would be.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    schema: &'static str,
    status: &'static str,
    base: String,
    adapters: Vec<JsonAdapter>,
    output: String,
    dtype: String,
    rounding: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<u64>,
    quantised: Option<JsonQuantised>,
    untied: bool,
    vocabulary: Option<usize>,
    tensors: TensorCounts,
    output_bytes: u64,
    output_files: Vec<String>,
    other_files: Vec<String>,
    left_behind: Vec<String>,
    config_changes: Vec<String>,
    renames: Vec<Rename>,
    notes: Vec<String>,
    warnings: Vec<String>,
    memory_bound_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    seconds: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    threads: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    realised: Option<JsonRealised>,
    targets: Vec<JsonTarget>,
}

#[derive(Debug, Serialize)]
struct JsonAdapter {
    path: String,
    format: &'static str,
    weight: f64,
    identity: &'static str,
}

#[derive(Debug, Serialize)]
struct JsonQuantised {
    method: String,
    weights: usize,
    dropped: Vec<String>,
}

#[derive(Debug, Serialize)]
struct TensorCounts {
    merged: usize,
    copied: usize,
    converted: usize,
}

#[derive(Debug, Serialize)]
struct Rename {
    adapter_prefix: String,
    base_prefix: String,
    modules: usize,
}

#[derive(Debug, Serialize)]
struct JsonTarget {
    parameter: String,
    shape: Vec<usize>,
    source: &'static str,
    /// Null if the base has no such parameter.
    base_dtype: Option<&'static str>,
    changes: Vec<JsonChange>,
    #[serde(skip_serializing_if = "Option::is_none")]
    realised: Option<JsonRealised>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rounded: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    requantised: Option<JsonRealised>,
    #[serde(skip_serializing_if = "Option::is_none")]
    undone: Option<JsonRecovered>,
}

#[derive(Debug, Serialize)]
struct JsonChange {
    adapter: usize,
    module: String,
    method: &'static str,
    weight: f64,
    rank: Option<usize>,
    scale: Option<f64>,
    stored: Option<&'static str>,
}

#[derive(Debug, Serialize)]
struct JsonRealised {
    projection: Option<f64>,
    noise: Option<f64>,
    changed_share: f64,
    elements: u64,
    nonzero: u64,
    changed: u64,
    non_finite: u64,
}

#[derive(Debug, Serialize)]
struct JsonRecovered {
    elements: u64,
    exact: u64,
    ambiguous: u64,
    impossible: u64,
}

impl From<&Realised> for JsonRealised {
    fn from(realised: &Realised) -> JsonRealised {
        JsonRealised {
            projection: realised.projection(),
            noise: realised.noise(),
            changed_share: realised.changed_share(),
            elements: realised.elements,
            nonzero: realised.nonzero,
            changed: realised.changed,
            non_finite: realised.non_finite,
        }
    }
}

impl From<&Recovered> for JsonRecovered {
    fn from(found: &Recovered) -> JsonRecovered {
        let Recovered { elements, exact, ambiguous, impossible } = *found;
        JsonRecovered { elements, exact, ambiguous, impossible }
    }
}

impl From<ChangeReport> for JsonChange {
    fn from(change: ChangeReport) -> JsonChange {
        JsonChange {
            adapter: change.adapter,
            module: change.module,
            method: change.method,
            weight: change.weight,
            rank: change.rank,
            scale: change.scale,
            stored: change.orientation.map(|orientation| orientation.name()),
        }
    }
}

impl Report {
    pub(super) fn new(making: &Making<'_>, status: &'static str) -> Report {
        let Making { deed, arguments, plan, assets, output, run } = making;
        let (copied, converted) = job_counts(plan);
        let stochastic = arguments.engine.rounding == RoundingChoice::Stochastic;
        let identity = |verdict: &Verdict| match verdict {
            Verdict::Same => "same",
            Verdict::Reencoded => "re-encoded",
            Verdict::Unknown => "unknown",
            Verdict::Different { .. } => "different",
        };
        Report {
            schema: deed.schema(),
            status,
            base: plan.base.path().display().to_string(),
            adapters: plan
                .adapters
                .iter()
                .zip(&plan.identity)
                .map(|(one, verdict)| JsonAdapter {
                    path: one.adapter.path.display().to_string(),
                    format: one.adapter.format.name(),
                    weight: one.weight,
                    identity: identity(verdict),
                })
                .collect(),
            output: output.destination.display().to_string(),
            dtype: arguments
                .dtype
                .to_possible_value()
                .map_or_else(String::new, |value| value.get_name().to_owned()),
            rounding: if stochastic { "stochastic" } else { "nearest" },
            seed: stochastic.then_some(arguments.engine.seed),
            quantised: plan.parameters.quantised().map(|quantised| JsonQuantised {
                method: quantised.method.clone(),
                weights: quantised.weights.len(),
                dropped: quantised
                    .dropped
                    .iter()
                    .map(|&location| plan.base.info(location).name.clone())
                    .collect(),
            }),
            untied: plan.untied,
            vocabulary: plan.vocabulary,
            tensors: TensorCounts { merged: plan.targets.len(), copied, converted },
            output_bytes: plan.output.files.iter().map(|file| file.bytes).sum(),
            output_files: plan.output.files.iter().map(|file| file.name.clone()).collect(),
            other_files: assets.files.keys().cloned().collect(),
            left_behind: assets.left_behind.clone(),
            config_changes: assets.config_changes.clone(),
            renames: plan
                .renames
                .iter()
                .map(|((from, to), &modules)| Rename {
                    adapter_prefix: from.clone(),
                    base_prefix: to.clone(),
                    modules,
                })
                .collect(),
            notes: plan.notes.iter().map(ToString::to_string).collect(),
            warnings: text::identity_warnings(making),
            memory_bound_bytes: memory_bound(plan, run),
            seconds: None,
            threads: None,
            realised: None,
            targets: plan
                .targets
                .iter()
                .map(|target| JsonTarget {
                    parameter: target.name.clone(),
                    shape: target.shape.clone(),
                    source: match target.source {
                        Source::Plain(_) => "stored",
                        Source::Quantised(_) => "quantised",
                        Source::Brought { .. } => "adapter",
                    },
                    base_dtype: target
                        .parameter
                        .map(|index| plan.parameters.get(index).dtype.name()),
                    changes: target
                        .changes
                        .iter()
                        .map(|change| plan.describe(target, change).into())
                        .collect(),
                    realised: None,
                    rounded: None,
                    requantised: None,
                    undone: None,
                })
                .collect(),
        }
    }

    /// Adds what the work found.
    pub(super) fn fill(&mut self, report: &MergeReport, seconds: f64) {
        self.seconds = Some(seconds);
        self.threads = Some(report.threads);
        self.realised = Some((&report.realised).into());
        for (target, done) in self.targets.iter_mut().zip(&report.targets) {
            target.realised = Some((&done.realised).into());
            target.rounded = (target.source == "adapter").then_some(done.rounded);
            target.requantised = done.requantised.as_ref().map(JsonRealised::from);
            target.undone = done.undone.as_ref().map(JsonRecovered::from);
        }
    }

    /// Adds warnings.
    pub(super) fn warn(&mut self, warnings: Vec<String>) {
        self.warnings.extend(warnings);
    }
}
