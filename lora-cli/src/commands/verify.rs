//! `lora-cli verify`: is a model what a merge makes?

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use lora_format::checkpoint::Checkpoint;
use lora_merge::MergePlan;
use lora_merge::engine::Progress;
use lora_merge::verify::{self, Difference, Number, VerifyReport};
use serde::Serialize;

use super::making::{AdapterArgument, EngineArguments, PlanArguments};
use super::refuse_damaged;
use crate::failure::{Failure, Outcome};
use crate::{printer, progress};

/// Carry a merge out again and compare every element with a merged model
///
/// Exits with 1 if a tensor differs, is missing or is not the merge's, and shows the worst element.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  lora-cli verify Llama-3-8B-mine --base Llama-3-8B --adapter ./my-lora
  lora-cli verify merged --base base --adapter ./a@0.7 ./b@0.3 --ulp 1 --json
  lora-cli verify merged --base base --adapter ./a --rounding stochastic --seed 7")]
pub(crate) struct Arguments {
    /// The merged model
    merged: PathBuf,
    /// Its base
    #[arg(long)]
    base: PathBuf,
    /// The adapters that were merged, with their weights
    #[arg(long, required = true, num_args = 1.., value_name = "ADAPTER[@WEIGHT]")]
    adapter: Vec<AdapterArgument>,
    #[command(flatten)]
    planning: PlanArguments,
    /// How many values of the dtype an element may be off: 1 allows for other programs' rounding
    /// in bf16 and f16; in f32, values near zero may be thousands of steps apart
    #[arg(long, value_name = "STEPS", default_value_t = 0)]
    ulp: u64,
    /// Print a report as JSON on stdout
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    engine: EngineArguments,
}

/// The report, `lora-cli/verify/1`; docs/cli-json.md describes it.
#[derive(Debug, Serialize)]
struct JsonReport<'a> {
    schema: &'static str,
    merged: String,
    base: String,
    agrees: bool,
    ulp: u64,
    compared: usize,
    different: Vec<JsonDifference<'a>>,
    missing: &'a [String],
    unexpected: &'a [String],
    reshaped: Vec<JsonReshaped<'a>>,
    renamed: Option<JsonRenamed<'a>>,
}

#[derive(Debug, Serialize)]
struct JsonDifference<'a> {
    tensor: &'a str,
    dtype: &'static str,
    elements: u64,
    different: u64,
    worst_index: &'a [usize],
    worst_expected: JsonNumber,
    worst_found: JsonNumber,
    worst_steps: Option<u64>,
    steps: Option<u64>,
    relative: Option<f64>,
}

#[derive(Debug, Serialize)]
struct JsonRenamed<'a> {
    merge_prefix: &'a str,
    model_prefix: &'a str,
}

/// A number as JSON has it: one that is not finite is null.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum JsonNumber {
    Float(f64),
    Integer(i128),
}

impl From<Number> for JsonNumber {
    fn from(number: Number) -> JsonNumber {
        match number {
            Number::Float(value) => JsonNumber::Float(value),
            Number::Integer(value) => JsonNumber::Integer(value),
        }
    }
}

#[derive(Debug, Serialize)]
struct JsonReshaped<'a> {
    tensor: &'a str,
    expected_dtype: &'static str,
    expected_shape: &'a [usize],
    found_dtype: &'static str,
    found_shape: &'a [usize],
}

pub(crate) fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    let merged = Checkpoint::open(&arguments.merged)?;
    let base = Checkpoint::open(&arguments.base)?;
    let adapters = arguments.planning.read(&arguments.base, &arguments.adapter, false)?;
    for one in &adapters {
        refuse_damaged(&one.adapter)?;
    }
    let mut options = arguments.planning.merge_options();
    options.dtype = verify::common_dtype(&merged);
    let plan = MergePlan::new(base, adapters, &options)?;
    let run = arguments.engine.run_options()?;
    let progress = Arc::new(Progress::default());
    let total = plan.output.files.iter().map(|file| file.bytes).sum();
    let report = progress::watch(total, arguments.engine.quiet, &progress, || {
        verify::verify(&plan, &merged, &run, &progress)
    })?;
    let agrees = report.agrees(arguments.ulp);
    if arguments.json {
        printer::json(&describe(arguments, &report, agrees))?;
    } else {
        printer::data(&text(arguments, &report, agrees))?;
    }
    Ok(if agrees { Outcome::Done } else { Outcome::Finding })
}

fn describe<'a>(arguments: &Arguments, report: &'a VerifyReport, agrees: bool) -> JsonReport<'a> {
    JsonReport {
        schema: "lora-cli/verify/1",
        merged: arguments.merged.display().to_string(),
        base: arguments.base.display().to_string(),
        agrees,
        ulp: arguments.ulp,
        compared: report.compared,
        different: report
            .different
            .iter()
            .map(|one| JsonDifference {
                tensor: &one.tensor,
                dtype: one.dtype.name(),
                elements: one.elements,
                different: one.different,
                worst_index: &one.worst.index,
                worst_expected: one.worst.expected.into(),
                worst_found: one.worst.found.into(),
                worst_steps: one.worst.steps,
                steps: one.steps,
                relative: one.relative,
            })
            .collect(),
        missing: &report.missing,
        unexpected: &report.unexpected,
        reshaped: report
            .reshaped
            .iter()
            .map(|one| JsonReshaped {
                tensor: &one.tensor,
                expected_dtype: one.expected.0.name(),
                expected_shape: &one.expected.1.0,
                found_dtype: one.found.0.name(),
                found_shape: &one.found.1.0,
            })
            .collect(),
        renamed: report
            .renamed
            .as_ref()
            .map(|one| JsonRenamed { merge_prefix: &one.made, model_prefix: &one.found }),
    }
}

/// How many lines of one kind are shown; `--json` has them all.
const SHOWN: usize = 20;

fn text(arguments: &Arguments, report: &VerifyReport, agrees: bool) -> String {
    let mut lines = Vec::new();
    if let Some(renamed) = &report.renamed {
        let shown = |prefix: &str| format!("`{prefix}…`");
        lines.push(format!(
            "names differ: {} of the merge is {} of the model",
            shown(&renamed.made),
            shown(&renamed.found)
        ));
    }
    // What is within --ulp is no difference to show.
    let off = |one: &&Difference| one.steps.is_none_or(|steps| steps > arguments.ulp);
    let mut different: Vec<&Difference> = report.different.iter().filter(off).collect();
    different.sort_by(|a, b| b.worst.distance().total_cmp(&a.worst.distance()));
    let ulp = |steps: Option<u64>| steps.map_or(String::new(), |steps| format!(", {steps} ulp"));
    let differences = different.iter().map(|one| {
        let Difference { tensor, different, elements, worst, .. } = one;
        let norm = one.relative.map(|relative| format!("{relative:.1e} of the tensor's norm"));
        let steps = one.steps.map(|steps| format!("{steps} ulp at most"));
        let sizes: Vec<String> = norm.into_iter().chain(steps).collect();
        let by = if sizes.is_empty() { "" } else { " by " };
        format!(
            "`{tensor}`: {different} of {elements} elements differ{by}{}; the largest difference is \
             at {:?}: {} expected, {} found{}",
            sizes.join(" and "),
            worst.index,
            worst.expected,
            worst.found,
            ulp(worst.steps)
        )
    });
    push(&mut lines, differences.collect());
    let reshaped = report.reshaped.iter().map(|one| {
        let (expected, found) = (&one.expected, &one.found);
        format!(
            "`{}`: {} {} expected, {} {} found",
            one.tensor, expected.0, expected.1, found.0, found.1
        )
    });
    push(&mut lines, reshaped.collect());
    let missing = report.missing.iter().map(|name| format!("`{name}`: missing"));
    push(&mut lines, missing.collect());
    let unexpected = report.unexpected.iter();
    push(&mut lines, unexpected.map(|name| format!("`{name}`: not made by the merge")).collect());
    let equal = report.compared - report.different.len();
    let close = report.different.len() - different.len();
    let made = report.compared + report.missing.len() + report.reshaped.len();
    let mut words = vec![format!("{equal} of {made} tensors are bit for bit what the merge makes")];
    for (count, what) in [
        (close, format!("are within {} ulp", arguments.ulp)),
        (different.len(), "differ".to_owned()),
        (report.reshaped.len(), "have another shape or dtype".to_owned()),
        (report.missing.len(), "are missing".to_owned()),
        (report.unexpected.len(), "are not made by the merge".to_owned()),
    ] {
        if count > 0 {
            words.push(format!("{count} {what}"));
        }
    }
    let verdict = if agrees { "agrees" } else { "DIFFERS" };
    lines.push(format!("{verdict}: {}", words.join(", ")));
    lines.push(String::new());
    lines.join("\n")
}

fn push(lines: &mut Vec<String>, all: Vec<String>) {
    let rest = all.len().saturating_sub(SHOWN);
    lines.extend(all.into_iter().take(SHOWN));
    if rest > 0 {
        lines.push(format!("  and {rest} more (--json lists them)"));
    }
}
