//! `lora-cli resize`: an adapter of smaller ranks.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use lora_format::checkpoint::Checkpoint;
use lora_format::io::atomic;
use lora_format::{Adapter, DetectProblem, Dtype, Error};
use lora_merge::factored::FactoredError;
use lora_merge::noise::{Basis, NoiseEstimate};
use lora_merge::output::refuse_input;
use lora_merge::rank::Bound;
use lora_merge::resize::{
    self, BaseNorms, FormProblem, Ranks, Reason, ResizeError, ResizeReport, Resized,
};
use lora_merge::{Bytes, MergeOptions, MergePlan, Tied, WeightedAdapter};
use serde::Serialize;

use super::adapter_output::OutputFormat;
use super::rank_arguments::{RankArguments, RankChoice};
use super::{
    AdapterArguments, WriteArguments, check_table, counted, refuse_damaged, short_of_best,
};
use crate::failure::{Failure, Outcome, PATTERNS};
use crate::{printer, progress};

/// Reduce an adapter's ranks to the best approximation, and say how good it is
///
/// Factors are decomposed as they are, without forming the change. Ranks never increase: what is
/// asked for more than it has keeps its factors bit for bit.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  lora-cli resize ./my-lora --rank 16 -o ./my-lora-16
  lora-cli resize ./my-lora --energy 0.95 --max-rank 32 --to lora -o small.safetensors
  lora-cli resize ./my-lora --budget 20MB --relative --base Llama-3-8B -o ./my-lora-20mb
  lora-cli resize ./my-lora --tolerance 0.1 --rank-for 'q_proj=8' --dry-run --json")]
pub(crate) struct Arguments {
    /// The adapter
    adapter: PathBuf,
    /// Where to write: a file for lora, a directory for peft
    #[arg(short, long, value_name = "PATH", required_unless_present = "dry_run")]
    output: Option<PathBuf>,
    /// The format to write [default: the input's]
    #[arg(long, value_enum)]
    to: Option<OutputFormat>,
    /// The model it was trained on: errors are shown relative to its weights; --relative chooses
    /// ranks by them too
    #[arg(long, value_name = "MODEL")]
    base: Option<PathBuf>,
    /// Compare with the base given though it is not the one the adapter was trained on
    #[arg(long, requires = "base")]
    allow_different_base: bool,
    /// The dtype of the new factors
    #[arg(long, value_enum, default_value_t = DtypeChoice::Keep)]
    dtype: DtypeChoice,
    /// Print what would be done, and write no adapter; a table is written if --csv asks for it
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    write: WriteArguments,
    #[command(flatten)]
    adapter_options: AdapterArguments,
    /// Write a table of all targets to a file, as comma-separated values
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
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
pub(super) enum DtypeChoice {
    /// As they are
    Keep,
    #[value(alias = "float32")]
    F32,
    #[value(aliases = ["fp16", "float16"])]
    F16,
    #[value(alias = "bfloat16")]
    Bf16,
}

impl DtypeChoice {
    pub(super) fn dtype(self) -> Option<Dtype> {
        match self {
            DtypeChoice::Keep => None,
            DtypeChoice::F32 => Some(Dtype::F32),
            DtypeChoice::F16 => Some(Dtype::F16),
            DtypeChoice::Bf16 => Some(Dtype::Bf16),
        }
    }
}

impl From<ResizeError> for Failure {
    fn from(error: ResizeError) -> Failure {
        let message = error.to_string();
        match error {
            ResizeError::Base(error) => error.into(),
            ResizeError::Components { problems } => {
                let hint = skippable(&problems).then(|| SKIP.to_owned());
                let problems =
                    problems.iter().map(|(name, problem)| format!("`{name}`: {problem}")).collect();
                Failure::Error { message, hint, problems }
            }
            ResizeError::Budget(_) => Failure::new(
                message,
                Some(
                    "a change keeps at least one rank: give a larger --budget, or a smaller --min-rank",
                ),
            ),
            ResizeError::Unmatched { .. } => Failure::new(message, Some(PATTERNS)),
            ResizeError::NoReference { .. } => {
                Failure::new(message, Some("leave --base out to measure against the changes"))
            }
            _ => Failure::new(message, None),
        }
    }
}

const SKIP: &str =
    "to leave a module as it is: --rank-for PATTERN=skip, with a policy for the rest";

/// Whether these are forms that have no smaller rank, and not factors that are damaged or a dtype
/// that is too small.
fn skippable(problems: &[(String, FormProblem)]) -> bool {
    problems.iter().all(|(_, problem)| {
        matches!(
            problem,
            FormProblem::Method(_)
                | FormProblem::Factors(FactoredError::Magnitude | FactoredError::Groups)
        )
    })
}

pub(crate) fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    let choice = arguments.ranks.choose()?;
    if arguments.ranks.relative() && arguments.base.is_none() {
        return Err(Failure::new(
            "--relative needs the base that errors are to be relative to",
            Some("give it: --base MODEL"),
        ));
    }
    let options = arguments.adapter_options.read_options(arguments.base.as_deref())?;
    let adapter = lora_format::read(&arguments.adapter, &options).map_err(not_read)?;
    refuse_damaged(&adapter)?;
    let format = arguments.to.unwrap_or(OutputFormat::of(adapter.format));
    if let Some(output) = &arguments.output {
        refuse_input(output, &arguments.adapter)?;
        if let Some(base) = &arguments.base {
            refuse_input(output, base)?;
        }
        format.check_replaced(output, &arguments.write)?;
    }
    let inputs: Vec<&Path> = [Some(&arguments.adapter), arguments.base.as_ref()]
        .into_iter()
        .flatten()
        .map(PathBuf::as_path)
        .collect();
    check_table(arguments.csv.as_deref(), &arguments.write, arguments.output.as_deref(), &inputs)?;
    let norms = match &arguments.base {
        Some(base) => Some(measure(arguments, &adapter, base)?),
        None => None,
    };
    let ranks = match choice {
        RankChoice::PerTensor(rules) => Ranks::PerTensor(rules),
        RankChoice::Budget { bytes, limits } => Ranks::Budget { bytes, limits },
    };
    let dtype = arguments.dtype.dtype();
    let (resized, report) = lora_merge::analysis::on_threads(arguments.threads, || {
        resize::resize(&adapter, ranks, dtype, norms.as_ref(), arguments.ranks.relative())
    })?;
    let not_carried = format.not_carried(&adapter)?;

    progress::interruptible();
    if let (Some(output), false) = (&arguments.output, arguments.dry_run) {
        let written = format.write(&resized, output, &arguments.write)?;
        printer::notes(&written.changes);
    }
    if let Some(path) = &arguments.csv {
        let (overwrite, durability) = (arguments.write.overwrite(), arguments.write.durability());
        atomic::write(path, &[csv(&report).as_bytes()], overwrite, durability)?;
    }
    printer::notes(&adapter.notes);
    if !not_carried.is_empty() {
        printer::talk(&format!("note: not carried along: {}", not_carried.join(", ")));
    }
    for pattern in &report.shadowed {
        let why = "rules before it match the same";
        printer::talk(&format!("note: --rank-for {pattern} decides for nothing: {why}"));
    }
    if arguments.json {
        printer::json(&describe(arguments, &adapter, format, &report, &not_carried))?;
        return Ok(Outcome::Done);
    }
    let text = text(arguments, &report, format);
    if arguments.dry_run {
        printer::data(&text)?;
    } else if !arguments.quiet {
        printer::talk(text.trim_end());
    }
    Ok(Outcome::Done)
}

/// A model in the adapter's place is told as one.
fn not_read(error: Error) -> Failure {
    match &error {
        Error::Unrecognised { path, problem }
            if matches!(problem, DetectProblem::NotAnAdapter { .. })
                || matches!(problem, DetectProblem::NoAdapter)
                    && path.join("config.json").exists() =>
        {
            let hint = "resize takes an adapter; of a fine-tuned model, lora-cli extract BASE \
                        FINETUNED makes one";
            Failure::new(error.to_string(), Some(hint))
        }
        _ => error.into(),
    }
}

/// The norms of the base's weights. Which of two tied tensors is meant does not matter: they are
/// equal.
fn measure(arguments: &Arguments, adapter: &Adapter, base: &Path) -> Result<BaseNorms, Failure> {
    let options = MergeOptions {
        allow_different_base: arguments.allow_different_base,
        tied: Tied::Both,
        ..MergeOptions::default()
    };
    let adapters = vec![WeightedAdapter::from(adapter.clone())];
    let plan = MergePlan::new(Checkpoint::open(base)?, adapters, &options)?;
    Ok(BaseNorms::measure(&plan)?)
}

/// How many targets the text shows.
const SHOWN: usize = 10;

fn text(arguments: &Arguments, report: &ResizeReport, format: OutputFormat) -> String {
    let mut lines = Vec::new();
    let of = if arguments.base.is_some() { "‖W₀‖" } else { "‖ΔW‖" };
    let mut worst: Vec<&Resized> = report.targets.iter().filter(|one| !one.kept).collect();
    // The sort is stable: equal errors stay in the adapter's order.
    worst.sort_by(|a, b| b.relative().total_cmp(&a.relative()));
    if !worst.is_empty() {
        let name = |one: &Resized| one.name.chars().count();
        let width = worst.iter().take(SHOWN).map(|one| name(one)).max().unwrap_or(0).max(6);
        let heading = format!("error/{of}");
        lines
            .push(format!("{:width$}  {:>12}  {heading:>10}  {:>10}", "target", "rank", "optimal"));
        for one in worst.iter().take(SHOWN) {
            let rank = format!("{} → {}", one.rank_before, one.rank);
            let optimal = ratio(one.certificate.optimal, one.reference());
            let padding = " ".repeat(width.saturating_sub(name(one)));
            lines.push(format!(
                "{}{padding}  {rank:>12}  {:>10}  {:>10}",
                one.name,
                percent(one.relative()),
                percent(optimal)
            ));
        }
        if worst.len() > SHOWN {
            let rest = worst.len() - SHOWN;
            lines.push(format!("and {rest} more with smaller errors (--json lists them)"));
        }
    }
    let kept = report.targets.len() - worst.len();
    if kept > 0 {
        lines.push(format!(
            "{} factors bit for bit",
            counted(kept, "target keeps its", "targets keep their")
        ));
    }
    let least = report.targets.iter().filter(|one| one.reason == Reason::Least).count();
    if least > 0 {
        let least = counted(least, "target keeps", "targets keep");
        lines.push(format!(
            "{least} rank 1, the least there is: their change is zero, or all of it \
             would have been dropped"
        ));
    }
    if !report.unchanged.is_empty() {
        let skipped = report.unchanged.iter().filter(|one| one.skipped).count();
        let skipped = match skipped {
            0 => String::new(),
            count => format!(", {count} of them by a rule"),
        };
        let count = report.unchanged.len();
        let count = counted(count, "component passes", "components pass");
        lines.push(format!("{count} through unchanged{skipped}"));
    }
    let unclear = report.targets.iter().filter_map(|one| one.noise.as_ref());
    let unclear = unclear.filter(|noise| !noise.is_clear()).count();
    if unclear > 0 {
        lines.push(format!(
            "auto is a heuristic: {unclear} spectra have no clear end of signal (--json has the \
             estimates)"
        ));
    }
    if let Some(spent) = report.spent {
        let short = short_of_best(
            spent.short_of_best,
            report.kept(arguments.ranks.relative()),
            arguments.ranks.relative(),
        );
        let (bytes, budget) = (Bytes(spent.bytes), Bytes(spent.budget));
        lines.push(format!("budget: {bytes} of {budget} spent; {short}"));
    }
    let total = report.total();
    let relative = ratio(total.residual, total.energy.sqrt());
    let of_base = match report.base_norm() {
        Some(norm) => format!(" ({} of ‖W₀‖)", percent(ratio(total.residual, norm))),
        None => String::new(),
    };
    lines.push(format!(
        "all: error {} of ‖ΔW‖{of_base}, optimal {}; {} of the energy kept",
        percent(relative),
        percent(ratio(total.optimal, total.energy.sqrt())),
        percent(1.0 - relative * relative)
    ));
    let (before, after) = report.bytes();
    let done = match (&arguments.output, arguments.dry_run) {
        (Some(output), false) => format!("wrote {} ({})", output.display(), format.name()),
        _ if arguments.csv.is_some() => "no adapter was written (--dry-run)".to_owned(),
        _ => "nothing was written (--dry-run)".to_owned(),
    };
    lines.push(format!(
        "read {}, {done}: {}, {} → {}",
        arguments.adapter.display(),
        counted(report.targets.len(), "target", "targets"),
        Bytes(before),
        Bytes(after)
    ));
    lines.push(String::new());
    lines.join("\n")
}

/// A share of something that may be zero, of which there is none then.
pub(super) fn ratio(part: f64, whole: f64) -> f64 {
    if part == 0.0 { 0.0 } else { part / whole }
}

pub(super) fn percent(share: f64) -> String {
    let percent = share * 100.0;
    match percent {
        0.0 => "0 %".to_owned(),
        percent if percent.abs() < 0.01 => format!("{percent:.1e} %"),
        percent => format!("{percent:.2} %"),
    }
}

/// One line for each resized target; numbers with all their digits.
fn csv(report: &ResizeReport) -> String {
    let mut text = "target,rows,cols,rank_before,rank,reason,kept,energy,captured,residual,\
                    optimal,relative,base_norm,bytes_before,bytes\n"
        .to_owned();
    for one in &report.targets {
        let certificate = &one.certificate;
        let fields = [
            quoted(&one.name),
            one.rows.to_string(),
            one.cols.to_string(),
            one.rank_before.to_string(),
            one.rank.to_string(),
            reason(one.reason).to_owned(),
            one.kept.to_string(),
            certificate.energy.to_string(),
            certificate.captured().to_string(),
            certificate.residual.to_string(),
            certificate.optimal.to_string(),
            one.relative().to_string(),
            one.base_norm.map(|norm| norm.to_string()).unwrap_or_default(),
            one.bytes_before.to_string(),
            one.bytes.to_string(),
        ];
        text.push_str(&fields.join(","));
        text.push('\n');
    }
    text
}

/// A field of comma-separated values (RFC 4180).
fn quoted(field: &str) -> String {
    if field.contains([',', '"', '\n', '\r']) {
        format!("\"{}\"", field.replace('"', "\"\""))
    } else {
        field.to_owned()
    }
}

fn reason(reason: Reason) -> &'static str {
    match reason {
        Reason::Chosen(Bound::Minimum) => "minimum",
        Reason::Chosen(Bound::Maximum) => "maximum",
        Reason::Chosen(Bound::Shape) => "shape",
        Reason::Chosen(_) => "policy",
        Reason::Budget => "budget",
        Reason::Full => "full",
        Reason::Least => "least",
    }
}

/// The report, `lora-cli/resize/1`; docs/cli-json.md describes it.
#[derive(Debug, Serialize)]
struct JsonReport<'a> {
    schema: &'static str,
    status: &'static str,
    input: String,
    input_format: &'static str,
    output: Option<String>,
    output_format: &'static str,
    base: Option<String>,
    budget: Option<JsonBudget>,
    targets: Vec<JsonTarget<'a>>,
    total: JsonTotal,
    unchanged: Vec<JsonUnchanged<'a>>,
    shadowed: &'a [String],
    not_carried: &'a [String],
    notes: Vec<String>,
}

#[derive(Debug, Serialize)]
struct JsonBudget {
    bytes: u64,
    spent: u64,
    short_of_best: f64,
}

#[derive(Debug, Serialize)]
struct JsonTarget<'a> {
    target: &'a str,
    rows: usize,
    cols: usize,
    rank_before: usize,
    rank: usize,
    reason: &'static str,
    noise: Option<JsonNoise>,
    kept: bool,
    energy: f64,
    captured: f64,
    residual: f64,
    optimal: f64,
    relative: f64,
    base_norm: Option<f64>,
    bytes_before: u64,
    bytes: u64,
}

#[derive(Debug, Serialize)]
struct JsonNoise {
    basis: &'static str,
    level: f64,
    edge: f64,
    threshold: f64,
    strict: usize,
    lenient: usize,
    clear: bool,
}

#[derive(Debug, Serialize)]
struct JsonTotal {
    energy: f64,
    captured: f64,
    residual: f64,
    optimal: f64,
    relative: f64,
    base_norm: Option<f64>,
    bytes_before: u64,
    bytes: u64,
}

#[derive(Debug, Serialize)]
struct JsonUnchanged<'a> {
    target: &'a str,
    method: &'static str,
    bytes: u64,
    skipped: bool,
}

impl From<&NoiseEstimate> for JsonNoise {
    fn from(noise: &NoiseEstimate) -> JsonNoise {
        let basis = match noise.basis {
            Basis::Nothing => "nothing",
            Basis::Storage => "storage",
            Basis::Bulk => "bulk",
            Basis::Precision => "precision",
        };
        let NoiseEstimate { level, edge, threshold, strict, lenient, .. } = *noise;
        JsonNoise { basis, level, edge, threshold, strict, lenient, clear: noise.is_clear() }
    }
}

impl<'a> From<&'a Resized> for JsonTarget<'a> {
    fn from(one: &'a Resized) -> JsonTarget<'a> {
        JsonTarget {
            target: &one.name,
            rows: one.rows,
            cols: one.cols,
            rank_before: one.rank_before,
            rank: one.rank,
            reason: reason(one.reason),
            noise: one.noise.as_ref().map(JsonNoise::from),
            kept: one.kept,
            energy: one.certificate.energy,
            captured: one.certificate.captured(),
            residual: one.certificate.residual,
            optimal: one.certificate.optimal,
            relative: one.relative(),
            base_norm: one.base_norm,
            bytes_before: one.bytes_before,
            bytes: one.bytes,
        }
    }
}

fn describe<'a>(
    arguments: &Arguments,
    adapter: &Adapter,
    format: OutputFormat,
    report: &'a ResizeReport,
    not_carried: &'a [String],
) -> JsonReport<'a> {
    let total = report.total();
    let base_norm = report.base_norm().filter(|_| arguments.base.is_some());
    let (bytes_before, bytes) = report.bytes();
    JsonReport {
        schema: "lora-cli/resize/1",
        status: if arguments.dry_run { "planned" } else { "resized" },
        input: arguments.adapter.display().to_string(),
        input_format: adapter.format.name(),
        output: arguments.output.as_ref().map(|path| path.display().to_string()),
        output_format: format.name(),
        base: arguments.base.as_ref().map(|path| path.display().to_string()),
        budget: report.spent.map(|spent| JsonBudget {
            bytes: spent.budget,
            spent: spent.bytes,
            short_of_best: spent.short_of_best,
        }),
        targets: report.targets.iter().map(JsonTarget::from).collect(),
        total: JsonTotal {
            energy: total.energy,
            captured: total.captured(),
            residual: total.residual,
            optimal: total.optimal,
            relative: ratio(total.residual, base_norm.unwrap_or(total.energy.sqrt())),
            base_norm,
            bytes_before,
            bytes,
        },
        unchanged: report
            .unchanged
            .iter()
            .map(|one| JsonUnchanged {
                target: &one.name,
                method: one.method,
                bytes: one.bytes,
                skipped: one.skipped,
            })
            .collect(),
        shadowed: &report.shadowed,
        not_carried,
        notes: adapter.notes.iter().map(ToString::to_string).collect(),
    }
}
