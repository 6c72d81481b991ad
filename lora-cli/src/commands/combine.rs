//! `lora-cli combine`: several adapters as one.

use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args, ValueEnum};
use lora_format::Adapter;
use lora_merge::combine::{
    self, CombineError, CombineOptions, CombineReport, Combined, Disjoint, Election, Elementwise,
    Method, Sparsifier, WeightRules,
};
use lora_merge::engine::Progress;
use lora_merge::output::refuse_input;
use lora_merge::resize::{self, Ranks, ResizeReport, Resized};
use lora_merge::{Bytes, WeightedAdapter};
use serde::Serialize;

use super::adapter_output::OutputFormat;
use super::making::{AdapterArgument, by_component};
use super::rank_arguments::{RankArguments, RankChoice};
use super::resize::{DtypeChoice, percent, ratio};
use super::{AdapterArguments, WriteArguments, refuse_damaged};
use crate::failure::{Failure, Outcome};
use crate::{printer, progress};

/// Combine adapters of one base into one adapter, and say how exact it is
///
/// The weighted sum of the changes is one product of factors side by side: exact, of the sum of the
/// ranks. A rank policy reduces that to the best approximation. The other methods act on the changes
/// themselves, element by element, and are factored again.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  lora-cli combine ./style@0.7 ./subject@0.3 -o ./both
  lora-cli combine a b c@-0.5 --method svd --energy 0.99 --max-rank 64 --to lora -o abc.safetensors
  lora-cli combine a b --method ties --density 0.2 -o ./ties
  lora-cli combine a b --weights-by '.*\\.mlp\\..*=0' --dry-run --json")]
pub(crate) struct Arguments {
    /// The adapters, each with an optional weight: PATH@WEIGHT
    #[arg(required = true, num_args = 2.., value_name = "ADAPTER[@WEIGHT]")]
    adapters: Vec<AdapterArgument>,
    /// Where to write: a file for lora, a directory for peft
    #[arg(short, long, value_name = "PATH", required_unless_present = "dry_run")]
    output: Option<PathBuf>,
    /// The format to write [default: peft if all inputs are, otherwise lora]
    #[arg(long, value_enum)]
    to: Option<OutputFormat>,
    /// How they are combined
    #[arg(long, value_enum, default_value_t = MethodChoice::Cat)]
    method: MethodChoice,
    /// The share of elements that stay, for methods that drop some
    #[arg(long, value_name = "SHARE", allow_negative_numbers = true)]
    density: Option<f64>,
    /// How ties and dare_ties elect a sign
    #[arg(long, value_enum, default_value_t = ElectionChoice::Total)]
    election: ElectionChoice,
    /// What ties and dare_ties make of the values that have it
    #[arg(long, value_enum, default_value_t = DisjointChoice::Mean)]
    disjoint: DisjointChoice,
    /// Seed of dare_linear and dare_ties
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Multiply the weights of modules that match; the first pattern that matches decides
    #[arg(long, value_name = "PATTERN=WEIGHT")]
    weights_by: Vec<String>,
    /// Combine adapters that were trained on different bases
    #[arg(long)]
    allow_different_base: bool,
    /// The dtype of the factors [keep: the inputs', or f32 where that is not exact]
    #[arg(long, value_enum, default_value_t = DtypeChoice::Keep)]
    dtype: DtypeChoice,
    /// Print what would be done, and write nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    write: WriteArguments,
    #[command(flatten)]
    adapter_options: AdapterArguments,
    /// Print a report as JSON on stdout
    #[arg(long)]
    pub(crate) json: bool,
    /// Say nothing but errors and warnings
    #[arg(short, long)]
    quiet: bool,
    /// Worker threads [default: one per core]
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    threads: usize,
    // Last, for it has a heading of its own.
    #[command(flatten)]
    ranks: RankArguments,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
enum MethodChoice {
    /// The sum of the changes, exact: ranks add up
    Cat,
    /// The sum, reduced to the ranks that a policy gives
    Svd,
    /// The sum: as cat, or as svd if a rank policy is given
    Linear,
    /// TIES: the largest elements of each change, the elected sign, their mean
    Ties,
    /// DARE: elements dropped at random, the others rescaled, and added up
    DareLinear,
    /// DARE with TIES' election
    DareTies,
    /// The largest elements of each change, added up
    MagnitudePrune,
}

impl MethodChoice {
    fn name(self) -> &'static str {
        match self {
            MethodChoice::Cat => "cat",
            MethodChoice::Svd => "svd",
            MethodChoice::Linear => "linear",
            MethodChoice::Ties => "ties",
            MethodChoice::DareLinear => "dare_linear",
            MethodChoice::DareTies => "dare_ties",
            MethodChoice::MagnitudePrune => "magnitude_prune",
        }
    }

    /// Whether it acts on single elements of the changes.
    fn is_elementwise(self) -> bool {
        !matches!(self, MethodChoice::Cat | MethodChoice::Svd | MethodChoice::Linear)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ElectionChoice {
    /// By the sum of the weighted values
    Total,
    /// By the number of values with each sign
    Frequency,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum DisjointChoice {
    /// Their mean
    Mean,
    /// Their sum
    Sum,
}

impl From<CombineError> for Failure {
    fn from(error: CombineError) -> Failure {
        let message = error.to_string();
        match error {
            CombineError::Merge(error) => error.into(),
            CombineError::Components { problems } => {
                let not_additive = problems
                    .iter()
                    .any(|(_, problem)| matches!(problem, combine::CombineProblem::NotAdditive(_)));
                let hint = not_additive.then(|| {
                    "merge all of them into the base, and extract one adapter from the result: \
                     lora-cli merge, lora-cli extract"
                        .to_owned()
                });
                let problems =
                    problems.iter().map(|(name, problem)| format!("`{name}`: {problem}")).collect();
                Failure::Error { message, hint, problems }
            }
            CombineError::Spelling { .. } => Failure::new(
                message,
                Some("adapters of one format combine; merging takes adapters of any"),
            ),
            CombineError::DifferentBase { .. } => Failure::new(
                message,
                Some(
                    "a change fits the base it was trained on; if you are sure, --allow-different-base",
                ),
            ),
            _ => Failure::new(message, None),
        }
    }
}

pub(crate) fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    let (method, reduced) = plan(arguments)?;
    let options = CombineOptions {
        weights: match &arguments.weights_by[..] {
            [] => None,
            rules => Some(WeightRules::new(rules.iter().map(String::as_str))?),
        },
        // A sum that is to be reduced is rounded to the dtype once, at the end.
        dtype: if reduced.is_some() {
            Some(lora_format::Dtype::F32)
        } else {
            arguments.dtype.dtype()
        },
        allow_different_base: arguments.allow_different_base,
    };
    let adapters = read(arguments)?;
    let peft =
        adapters.iter().all(|one| OutputFormat::of(one.adapter.format) == OutputFormat::Peft);
    let format = arguments.to.unwrap_or(if peft { OutputFormat::Peft } else { OutputFormat::Lora });
    if let Some(output) = &arguments.output {
        for argument in &arguments.adapters {
            refuse_input(output, argument.path())?;
        }
        format.check_replaced(output, &arguments.write)?;
    }
    let progress = Arc::new(Progress::default());
    let total = combine::amount(&adapters);
    let made = progress::watch(total, arguments.quiet, &progress, || {
        lora_merge::analysis::on_threads(arguments.threads, || {
            let (combined, report) = combine::combine(&adapters, method, options, &progress)?;
            let Some(ranks) = reduced else { return Ok((combined, report, None)) };
            let dtype = arguments.dtype.dtype().unwrap_or_else(|| common_dtype(&adapters));
            let (resized, reduction) = resize::resize(&combined, ranks, Some(dtype), None, false)?;
            Ok::<_, Failure>((resized, report, Some(reduction)))
        })
    });
    let (combined, report, reduction) = made?;
    if progress.is_cancelled() {
        return Err(Failure::Interrupted);
    }
    // What was computed from files that changed meanwhile is of neither state.
    for one in &adapters {
        one.adapter.ensure_unchanged()?;
    }
    let not_carried = format.not_carried(&combined)?;
    if let (Some(output), false) = (&arguments.output, arguments.dry_run) {
        let written = format.write(&combined, output, &arguments.write)?;
        printer::notes(&written.changes);
    }
    talk(&adapters, &report, reduction.as_ref(), &not_carried);
    if arguments.json {
        printer::json(&describe(
            arguments,
            &adapters,
            format,
            (&report, reduction.as_ref()),
            &not_carried,
        ))?;
        return Ok(Outcome::Done);
    }
    let text = text(arguments, &adapters, &report, reduction.as_ref(), format);
    if arguments.dry_run {
        printer::data(&text)?;
    } else if !arguments.quiet {
        printer::talk(text.trim_end());
    }
    Ok(Outcome::Done)
}

/// The method, and the ranks that a sum is reduced to.
fn plan(arguments: &Arguments) -> Result<(Method, Option<Ranks>), Failure> {
    let choice = arguments.method;
    let name = choice.name();
    if arguments.ranks.relative() {
        return Err(Failure::new("--relative needs a base, and combine reads none", None));
    }
    if !choice.is_elementwise() {
        if arguments.density.is_some() {
            return Err(Failure::new(
                format!("--method {name} drops nothing: leave --density out"),
                None,
            ));
        }
        let ranks = match (choice, arguments.ranks.is_given()) {
            (MethodChoice::Cat, true) => {
                return Err(Failure::new(
                    "--method cat is exact and has the sum of all ranks",
                    Some("for smaller ranks: --method svd"),
                ));
            }
            (MethodChoice::Cat | MethodChoice::Linear, _) if !arguments.ranks.is_given() => None,
            _ => Some(match arguments.ranks.choose()? {
                RankChoice::PerTensor(rules) => Ranks::PerTensor(rules),
                RankChoice::Budget { bytes, limits } => Ranks::Budget { bytes, limits },
            }),
        };
        return Ok((Method::Concatenate, ranks));
    }
    let density = match arguments.density {
        Some(density) if density > 0.0 && density <= 1.0 => density,
        Some(density) => {
            return Err(Failure::new(
                format!("--density {density} is not above 0 and at most 1"),
                None,
            ));
        }
        None => {
            return Err(Failure::new(
                format!("--method {name} needs to know which share of the elements stays"),
                Some("for instance --density 0.2"),
            ));
        }
    };
    let elected = matches!(choice, MethodChoice::Ties | MethodChoice::DareTies);
    let random = matches!(choice, MethodChoice::DareLinear | MethodChoice::DareTies);
    let method = Elementwise {
        sparsifier: if random {
            Sparsifier::Random { seed: arguments.seed }
        } else {
            Sparsifier::Magnitude
        },
        density,
        election: elected.then_some(match arguments.election {
            ElectionChoice::Total => Election::Total,
            ElectionChoice::Frequency => Election::Frequency,
        }),
        disjoint: match arguments.disjoint {
            DisjointChoice::Mean => Disjoint::Mean,
            DisjointChoice::Sum => Disjoint::Sum,
        },
    };
    let ranks = match arguments.ranks.is_given() {
        false => None,
        true => match arguments.ranks.choose()? {
            RankChoice::PerTensor(rules) => Some(rules),
            RankChoice::Budget { .. } => {
                return Err(Failure::new(
                    format!(
                        "--method {name} chooses the ranks of one matrix after the other, and a \
                             budget needs all of them"
                    ),
                    Some("give a policy, and resize the result: lora-cli resize --budget"),
                ));
            }
        },
    };
    Ok((Method::Elementwise { method, ranks }, None))
}

fn read(arguments: &Arguments) -> Result<Vec<WeightedAdapter>, Failure> {
    let options = arguments.adapter_options.read_options(None)?;
    let read = |argument: &AdapterArgument| {
        let adapter = lora_format::read(argument.path(), &options)?;
        refuse_damaged(&adapter)?;
        by_component(adapter, argument)
    };
    let read: Result<Vec<Vec<WeightedAdapter>>, Failure> =
        arguments.adapters.iter().map(read).collect();
    Ok(read?.into_iter().flatten().collect())
}

/// The dtype of all factors, or f32.
fn common_dtype(adapters: &[WeightedAdapter]) -> lora_format::Dtype {
    let mut dtypes =
        adapters.iter().flat_map(|one| &one.adapter.components).filter_map(|one| match &one.form {
            lora_format::model::Form::LowRank(form) => Some([form.a.dtype, form.b.dtype]),
            _ => None,
        });
    let first = dtypes.next().map_or(lora_format::Dtype::F32, |pair| pair[0]);
    if dtypes.flatten().all(|dtype| dtype == first) { first } else { lora_format::Dtype::F32 }
}

/// What is said in any case.
fn talk(
    adapters: &[WeightedAdapter],
    report: &CombineReport,
    reduction: Option<&ResizeReport>,
    not_carried: &[String],
) {
    for one in adapters {
        printer::notes(&one.adapter.notes);
    }
    for warning in &report.warnings {
        printer::talk(&format!("warning: {warning}"));
    }
    if !not_carried.is_empty() {
        printer::talk(&format!("note: not carried along: {}", not_carried.join(", ")));
    }
    for pattern in &report.unmatched {
        printer::talk(&format!("note: no module matches {pattern:?}"));
    }
    for pattern in reduction.into_iter().flat_map(|reduction| &reduction.shadowed) {
        printer::talk(&format!(
            "note: {pattern:?} decides for no module: rules before it match the same"
        ));
    }
}

/// How many targets the text shows.
const SHOWN: usize = 10;

fn text(
    arguments: &Arguments,
    adapters: &[WeightedAdapter],
    report: &CombineReport,
    reduction: Option<&ResizeReport>,
    format: OutputFormat,
) -> String {
    let mut lines = Vec::new();
    for (index, one) in adapters.iter().enumerate() {
        lines.push(adapter_line(index, one, report));
    }
    lines.extend(worst(report, reduction));
    if !report.others.is_empty() {
        let rounded: u64 = report.others.iter().map(|one| one.rounded).sum();
        let rounded = match rounded {
            0 => String::new(),
            count => format!(", {count} elements of them rounded to f32"),
        };
        lines.push(format!("{} components without factors{rounded}", report.others.len()));
    }
    if !report.left_out.is_empty() {
        lines.push(format!("{} parameters left out: their weights are 0", report.left_out.len()));
    }
    let (energy, residual, optimal) = totals(report);
    let error = percent(ratio(residual, energy.sqrt()));
    lines.push(match (reduction, arguments.method.is_elementwise()) {
        (None, false) if residual == 0.0 => "all: the sum of the changes, exactly".to_owned(),
        (None, false) => format!("all: error {error} of ‖Σ‖, from rounding"),
        (None, true) => {
            let optimal = percent(ratio(optimal, energy.sqrt()));
            format!("all: error {error} of the combined changes, optimal {optimal}")
        }
        (Some(reduction), _) => {
            let total = reduction.total();
            let relative = ratio(total.residual, total.energy.sqrt());
            let optimal = percent(ratio(total.optimal, total.energy.sqrt()));
            format!(
                "all: error {} of ‖Σ‖, optimal {optimal}; {} of the energy kept (the sum itself: \
                 {error})",
                percent(relative),
                percent(1.0 - relative * relative)
            )
        }
    });
    let bytes = match reduction {
        Some(reduction) => reduction.bytes().1,
        None => report.targets.iter().map(|one| one.bytes).sum(),
    };
    let done = match (&arguments.output, arguments.dry_run) {
        (Some(output), false) => format!("wrote {} ({})", output.display(), format.name()),
        _ => "nothing was written (--dry-run)".to_owned(),
    };
    let (count, method) = (adapters.len(), arguments.method.name());
    lines.push(format!(
        "combined {count} adapters by {method}, {done}: {} targets, {}",
        report.targets.len(),
        Bytes(bytes)
    ));
    lines.push(String::new());
    lines.join("\n")
}

fn adapter_line(index: usize, one: &WeightedAdapter, report: &CombineReport) -> String {
    let parts =
        || report.targets.iter().flat_map(|one| &one.parts).filter(|part| part.adapter == index);
    let targets = parts().count();
    let rounded: Vec<u64> = parts().filter_map(|part| part.rounded).collect();
    let folded = match rounded.iter().filter(|&&count| count > 0).count() {
        _ if rounded.is_empty() => String::new(),
        0 => ", folded exactly".to_owned(),
        some => format!(", {} folded exactly and {some} rounded", targets - some),
    };
    format!("{} × {}: {targets} targets{folded}", one.weight, one.adapter.path.display())
}

/// A table of the targets with the largest errors.
fn worst(report: &CombineReport, reduction: Option<&ResizeReport>) -> Vec<String> {
    // Name, ranks before, rank, relative error, relative optimum.
    let mut rows: Vec<(&str, String, f64, f64)> = Vec::new();
    match reduction {
        Some(reduction) => {
            for one in reduction.targets.iter().filter(|one| !one.kept) {
                let Resized { name, rank_before, rank, certificate, .. } = one;
                let optimal = ratio(certificate.optimal, certificate.energy.sqrt());
                rows.push((name, format!("{rank_before} → {rank}"), one.relative(), optimal));
            }
        }
        None => {
            for one in &report.targets {
                let Some(factoring) = one.factoring else { continue };
                let optimal = ratio(factoring.optimal, one.energy.sqrt());
                let ranks: Vec<String> =
                    one.parts.iter().map(|part| part.rank.to_string()).collect();
                let ranks = format!("{} → {}", ranks.join("+"), one.rank);
                rows.push((&one.name, ranks, one.relative(), optimal));
            }
        }
    }
    if rows.is_empty() {
        return Vec::new();
    }
    rows.sort_by(|a, b| b.2.total_cmp(&a.2));
    let shown = rows.iter().take(SHOWN);
    let width = shown.clone().map(|row| row.0.chars().count()).max().unwrap_or(0).max(6);
    let mut lines =
        vec![format!("{:width$}  {:>12}  {:>10}  {:>10}", "target", "rank", "error", "optimal")];
    for (name, ranks, relative, optimal) in shown {
        let padding = " ".repeat(width.saturating_sub(name.chars().count()));
        let (relative, optimal) = (percent(*relative), percent(*optimal));
        lines.push(format!("{name}{padding}  {ranks:>12}  {relative:>10}  {optimal:>10}"));
    }
    if rows.len() > SHOWN {
        let rest = rows.len() - SHOWN;
        lines.push(format!("and {rest} more with smaller errors (--json lists them)"));
    }
    lines
}

/// ‖·‖²_F of all targets, and the norms of what is left over and of the least that could be.
fn totals(report: &CombineReport) -> (f64, f64, f64) {
    let sum = |of: &dyn Fn(&Combined) -> f64| -> f64 { report.targets.iter().map(of).sum() };
    let optimal = |one: &Combined| one.factoring.map_or(0.0, |factoring| factoring.optimal);
    (
        sum(&|one| one.energy),
        sum(&|one| one.residual * one.residual).sqrt(),
        sum(&|one| optimal(one) * optimal(one)).sqrt(),
    )
}

/// The report, `lora-cli/combine/1`; docs/cli-json.md describes it.
#[derive(Debug, Serialize)]
struct JsonReport<'a> {
    schema: &'static str,
    status: &'static str,
    method: &'static str,
    density: Option<f64>,
    seed: Option<u64>,
    adapters: Vec<JsonAdapter>,
    output: Option<String>,
    output_format: &'static str,
    targets: Vec<JsonTarget<'a>>,
    total: JsonTotal,
    others: Vec<JsonOther<'a>>,
    left_out: &'a [String],
    unmatched: Vec<&'a str>,
    not_carried: &'a [String],
    warnings: &'a [String],
    notes: Vec<String>,
}

#[derive(Debug, Serialize)]
struct JsonAdapter {
    path: String,
    format: &'static str,
    weight: f64,
}

#[derive(Debug, Serialize)]
struct JsonTarget<'a> {
    target: &'a str,
    rows: usize,
    cols: usize,
    parts: Vec<JsonPart>,
    rank: usize,
    dtype: &'static str,
    energy: f64,
    residual: f64,
    relative: f64,
    optimal: Option<f64>,
    exact: Option<bool>,
    bytes: u64,
    reduced: Option<JsonReduced>,
}

#[derive(Debug, Serialize)]
struct JsonPart {
    adapter: usize,
    rank: usize,
    weight: f64,
    scale: f64,
    rounded: Option<u64>,
}

#[derive(Debug, Serialize)]
struct JsonReduced {
    rank: usize,
    kept: bool,
    energy: f64,
    residual: f64,
    optimal: f64,
    relative: f64,
    bytes: u64,
}

#[derive(Debug, Serialize)]
struct JsonTotal {
    energy: f64,
    residual: f64,
    relative: f64,
    bytes: u64,
}

#[derive(Debug, Serialize)]
struct JsonOther<'a> {
    target: &'a str,
    method: &'static str,
    adapters: &'a [usize],
    rounded: u64,
}

fn describe<'a>(
    arguments: &Arguments,
    adapters: &[WeightedAdapter],
    format: OutputFormat,
    (report, reduction): (&'a CombineReport, Option<&'a ResizeReport>),
    not_carried: &'a [String],
) -> JsonReport<'a> {
    let random = matches!(arguments.method, MethodChoice::DareLinear | MethodChoice::DareTies);
    let (energy, residual, bytes) = match reduction {
        Some(reduction) => {
            let total = reduction.total();
            (total.energy, total.residual, reduction.bytes().1)
        }
        None => {
            let (energy, residual, _) = totals(report);
            (energy, residual, report.targets.iter().map(|one| one.bytes).sum())
        }
    };
    let more = reduction.into_iter().flat_map(|reduction| &reduction.shadowed);
    JsonReport {
        schema: "lora-cli/combine/1",
        status: if arguments.dry_run { "planned" } else { "combined" },
        method: arguments.method.name(),
        density: arguments.density,
        seed: random.then_some(arguments.seed),
        adapters: adapters
            .iter()
            .map(|one| JsonAdapter {
                path: one.adapter.path.display().to_string(),
                format: one.adapter.format.name(),
                weight: one.weight,
            })
            .collect(),
        output: arguments.output.as_ref().map(|path| path.display().to_string()),
        output_format: format.name(),
        targets: report
            .targets
            .iter()
            .map(|one| {
                let reduced = reduction.and_then(|reduction| {
                    reduction.targets.iter().find(|reduced| reduced.name == one.name)
                });
                target(one, reduced)
            })
            .collect(),
        total: JsonTotal { energy, residual, relative: ratio(residual, energy.sqrt()), bytes },
        others: report
            .others
            .iter()
            .map(|one| JsonOther {
                target: &one.name,
                method: one.method,
                adapters: &one.adapters,
                rounded: one.rounded,
            })
            .collect(),
        left_out: &report.left_out,
        unmatched: report.unmatched.iter().chain(more).map(String::as_str).collect(),
        not_carried,
        warnings: &report.warnings,
        notes: notes(adapters.iter().map(|one| &one.adapter)),
    }
}

fn notes<'a>(adapters: impl Iterator<Item = &'a Adapter>) -> Vec<String> {
    adapters.flat_map(|one| one.notes.iter().map(ToString::to_string)).collect()
}

fn target<'a>(one: &'a Combined, reduced: Option<&Resized>) -> JsonTarget<'a> {
    let parts = one.parts.iter().map(|part| JsonPart {
        adapter: part.adapter,
        rank: part.rank,
        weight: part.weight,
        scale: part.scale,
        rounded: part.rounded,
    });
    JsonTarget {
        target: &one.name,
        rows: one.rows,
        cols: one.cols,
        parts: parts.collect(),
        rank: one.rank,
        dtype: one.dtype.name(),
        energy: one.energy,
        residual: one.residual,
        relative: one.relative(),
        optimal: one.factoring.map(|factoring| factoring.optimal),
        exact: one.factoring.map(|factoring| factoring.exact),
        bytes: one.bytes,
        reduced: reduced.map(|reduced| JsonReduced {
            rank: reduced.rank,
            kept: reduced.kept,
            energy: reduced.certificate.energy,
            residual: reduced.certificate.residual,
            optimal: reduced.certificate.optimal,
            relative: reduced.relative(),
            bytes: reduced.bytes,
        }),
    }
}
