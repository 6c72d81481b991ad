//! `lora-cli extract`: an adapter from a base and its full fine-tune.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, ValueEnum};
use lora_format::checkpoint::Checkpoint;
use lora_format::codec::peft;
use lora_format::io::atomic;
use lora_format::model::{Component, Form, Target};
use lora_format::{Adapter, Dtype, map_all};
use lora_merge::engine::Progress;
use lora_merge::extract::{
    ExtractOptions, ExtractReport, Extracted, Extraction, LeftOut, NoiseSummary, WorkDirectory,
};
use lora_merge::identity;
use lora_merge::output::refuse_input;
use lora_merge::pair::{Kind, Pairing};
use lora_merge::resize::Ranks;
use lora_merge::svd::SvdOptions;
use lora_merge::{Bytes, Error, PlanProblem};
use serde::Serialize;

use super::adapter_output::OutputFormat;
use super::analysing::model;
use super::rank_arguments::{RankArguments, RankChoice};
use super::{WriteArguments, check_table, counted, short_of_best};
use crate::failure::{Failure, Outcome};
use crate::{printer, progress};

/// Make an adapter of what a full fine-tune changed, and say how good it is
///
/// For every changed matrix, the best factors of the rank chosen, found by a truncated singular
/// value decomposition that is told to be within --accuracy of the optimum; the error of the
/// factors as they are stored is then computed over all elements. What low rank does not hold is
/// listed, or stored whole with --full.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  lora-cli extract Llama-3-8B Llama-3-8B-tuned --rank 32 -o tuned.safetensors
  lora-cli extract base tuned --energy 0.9 --max-rank 128 --full norms,biases --to peft -o ./tuned
  lora-cli extract base tuned --budget 50MB --dtype bf16 -o tuned.safetensors
  lora-cli extract base tuned --rank auto --rank-for 'lm_head=skip' -o tuned.safetensors --json")]
pub(crate) struct Arguments {
    /// The model that training began with
    base: PathBuf,
    /// The model that it ended with
    tuned: PathBuf,
    /// Where to write: a file for lora, a directory for peft
    #[arg(short, long, value_name = "PATH")]
    output: PathBuf,
    /// The format to write
    #[arg(long, value_enum, default_value_t = OutputFormat::Lora)]
    to: OutputFormat,
    #[command(flatten)]
    ranks: RankArguments,
    /// Store these whole: norms, biases, embeddings (and heads), or what a pattern matches
    #[arg(long, value_name = "KINDS", value_delimiter = ',', help_heading = "Options")]
    full: Vec<String>,
    /// Give factors to these tables or heads too
    #[arg(long, value_name = "PATTERN", help_heading = "Options")]
    include: Vec<String>,
    /// The dtype of the factors
    #[arg(long, value_enum, default_value_t = FactorType::F32, help_heading = "Options")]
    dtype: FactorType,
    /// How far above the smallest possible error the estimate may be: 0.01 is one per cent
    #[arg(
        long,
        value_name = "SHARE",
        default_value_t = 0.01,
        allow_negative_numbers = true,
        help_heading = "Options"
    )]
    accuracy: f64,
    /// Compute all singular values of every matrix: slow, and leaves no gap to estimate
    #[arg(long, help_heading = "Options")]
    exact: bool,
    /// Go on with an extraction that was interrupted
    #[arg(long, help_heading = "Options")]
    resume: bool,
    /// Threads [default: one per core]
    #[arg(
        long,
        value_name = "N",
        default_value_t = 0,
        hide_default_value = true,
        help_heading = "Options"
    )]
    threads: usize,
    /// Say nothing but errors and warnings
    #[arg(short, long, help_heading = "Options")]
    quiet: bool,
    #[command(flatten, next_help_heading = "Options")]
    write: WriteArguments,
    /// Write a table of all targets to a file, as comma-separated values
    #[arg(long, value_name = "FILE", help_heading = "Options")]
    csv: Option<PathBuf>,
    /// Print a report as JSON on stdout
    #[arg(long, help_heading = "Options")]
    pub(crate) json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum FactorType {
    #[value(alias = "float32")]
    F32,
    #[value(aliases = ["fp16", "float16"])]
    F16,
    #[value(alias = "bfloat16")]
    Bf16,
}

impl FactorType {
    fn dtype(self) -> Dtype {
        match self {
            FactorType::F32 => Dtype::F32,
            FactorType::F16 => Dtype::F16,
            FactorType::Bf16 => Dtype::Bf16,
        }
    }
}

pub(crate) fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    let (ranks, relative) = match arguments.ranks.choose()? {
        RankChoice::PerTensor(rules) => (Ranks::PerTensor(rules), arguments.ranks.relative()),
        RankChoice::Budget { bytes, limits } => {
            (Ranks::Budget { bytes, limits }, arguments.ranks.relative())
        }
    };
    if !(arguments.accuracy > 0.0 && arguments.accuracy <= 1.0) {
        let message = format!("--accuracy {}: not a share of the error", arguments.accuracy);
        return Err(Failure::new(message, Some("0.01 is one per cent above the optimum")));
    }
    if arguments.resume && matches!(ranks, Ranks::Budget { .. }) {
        return Err(Failure::new(
            "--resume: an extraction with a budget finishes no target before all are decomposed, and \
             keeps none",
            Some("start it afresh, without --resume"),
        ));
    }
    let output = &arguments.output;
    refuse_input(output, &arguments.base)?;
    refuse_input(output, &arguments.tuned)?;
    arguments.to.check_replaced(output, &arguments.write)?;
    let inputs = [arguments.base.as_path(), arguments.tuned.as_path()];
    check_table(arguments.csv.as_deref(), &arguments.write, Some(output), &inputs)?;
    let hint = "an adapter's ranks are reduced by lora-cli resize ADAPTER";
    let (base, tuned) = (model(&arguments.base, hint)?, model(&arguments.tuned, hint)?);
    printer::notes(base.notes().iter().chain(tuned.notes()));
    let signature = signature(arguments, &base, &tuned);
    let pairing = Pairing::new(base, tuned)?;
    let mut options = ExtractOptions {
        ranks,
        relative,
        dtype: arguments.dtype.dtype(),
        full: arguments.full.clone(),
        include: arguments.include.clone(),
        svd: SvdOptions {
            accuracy: arguments.accuracy,
            exact: arguments.exact,
            ..SvdOptions::default()
        },
        threads: arguments.threads,
    };
    let mapped = pairing.open()?;
    let mut work = WorkDirectory::open(output, &signature, &pairing, arguments.resume)?;
    let progress = Arc::new(Progress::default());
    let total = Extraction::total(&pairing);
    let made = progress::watch(total, arguments.quiet, &progress, || -> Result<_, Failure> {
        let extraction = Extraction::plan(&mapped, &mut options, &progress)?;
        if arguments.to == OutputFormat::Peft {
            // What PEFT has no place for is told before the work, not after.
            let mut outline = extraction.outline()?;
            add_siblings(&mut outline, &pairing)?;
            peft::check(&outline)?;
        }
        Ok(extraction.run(&mut work, &progress)?)
    });
    let made = made.and_then(|(mut adapter, report)| {
        let note = finish(arguments, &mut adapter, &pairing)?;
        arguments.to.write(&adapter, output, &arguments.write)?;
        Ok((adapter, report, note))
    });
    let (adapter, report, note) = match made {
        Ok(made) => made,
        Err(failure) => return Err(stopped(failure, work)),
    };
    work.remove()?;
    if let Some(path) = &arguments.csv {
        let (overwrite, durability) = (arguments.write.overwrite(), arguments.write.durability());
        atomic::write(path, &[csv(&report).as_bytes()], overwrite, durability)?;
    }
    let mut notes: Vec<String> = pairing.notes.iter().map(ToString::to_string).collect();
    for (side, list) in [("base", &pairing.only_base), ("fine-tuned model", &pairing.only_tuned)] {
        if !list.is_empty() {
            notes.push(format!("only the {side} has {} parameters: {}", list.len(), few(list)));
        }
    }
    let reshaped: Vec<String> = pairing.reshaped.iter().map(|one| one.name.clone()).collect();
    if !reshaped.is_empty() {
        notes.push(format!("of other shapes, and left out: {}", few(&reshaped)));
    }
    let incomparable: Vec<String> =
        pairing.incomparable.iter().map(|one| one.name.clone()).collect();
    if !incomparable.is_empty() {
        notes.push(format!("changed in dtypes that are not compared: {}", few(&incomparable)));
    }
    notes.extend(report.notes.iter().cloned());
    notes.extend(note);
    if report.quantised > 0 {
        notes.push(format!(
            "{} of the factored changes are of weights that one of the models has quantised: they \
             include what quantising lost",
            report.quantised
        ));
    }
    if !report.missed.is_empty() {
        notes.push(format!(
            "{} a larger error than was asked for, since factors are rounded to {}: {}",
            counted(report.missed.len(), "target has", "targets have"),
            arguments.dtype.dtype(),
            few(&report.missed)
        ));
    }
    printer::notes(&notes);
    let bytes: u64 = adapter.tensors().map(|tensor| tensor.bytes().len() as u64).sum();
    if arguments.json {
        printer::json(&describe(arguments, &pairing, &report, &notes, bytes))?;
    } else if !arguments.quiet {
        printer::talk(text(arguments, &report, bytes).trim_end());
    }
    Ok(Outcome::Done)
}

/// The first few of some names.
fn few(names: &[String]) -> String {
    let shown: Vec<String> = names.iter().take(3).map(|name| format!("`{name}`")).collect();
    let more = if names.len() > 3 { ", …" } else { "" };
    format!("{}{more}", shown.join(", "))
}

/// What the format wants besides the changes: the base's fingerprint, if its values can be sampled, else
/// a note that says why not; or the rest of the modules that PEFT saves whole.
fn finish(
    arguments: &Arguments,
    adapter: &mut Adapter,
    pairing: &Pairing,
) -> Result<Option<String>, Failure> {
    if arguments.to == OutputFormat::Peft {
        let siblings = add_siblings(adapter, pairing)?;
        let what = "unchanged, and stored because PEFT saves whole modules";
        return Ok((!siblings.is_empty()).then(|| format!("{what}: {}", few(&siblings))));
    }
    match identity::stamp(adapter, &pairing.base) {
        Ok(fingerprint) => adapter.base.fingerprint = Some(fingerprint),
        Err(Error::Plan { problems, .. })
            if problems.iter().all(|one| matches!(one, PlanProblem::Unsampled { .. })) =>
        {
            let problems: Vec<String> = problems.iter().map(ToString::to_string).collect();
            return Ok(Some(format!("no fingerprint of the base: {}", problems.join("; "))));
        }
        Err(error) => return Err(error.into()),
    }
    Ok(None)
}

/// An extraction that stopped: what it finished is kept for `--resume`, if it is anything.
fn stopped(failure: Failure, work: WorkDirectory) -> Failure {
    match work.len() {
        0 => {
            let _nothing_in_it = work.remove();
        }
        count => printer::talk(&format!(
            "note: {} kept in {}; --resume goes on from there, a run without it removes them",
            counted(count, "finished target is", "finished targets are"),
            work.path().display()
        )),
    }
    failure
}

/// What PEFT needs of the base besides, as components.
fn add_siblings(adapter: &mut Adapter, pairing: &Pairing) -> Result<Vec<String>, Failure> {
    let stored: Vec<&str> = pairing.base.tensors().map(|(_, info)| info.name.as_str()).collect();
    let needed: Vec<String> =
        peft::also_needed(adapter, &stored)?.into_iter().map(str::to_owned).collect();
    if needed.is_empty() {
        return Ok(needed);
    }
    for shard in pairing.base.shards() {
        for tensor in map_all(&shard.file)? {
            if needed.contains(&tensor.name) {
                let (module, parameter) =
                    tensor.name.rsplit_once('.').unwrap_or(("", tensor.name.as_str()));
                let target = Target { module: module.to_owned(), parameter: parameter.to_owned() };
                adapter.components.push(Component { target, form: Form::Replaced(tensor) });
            }
        }
    }
    adapter.components.sort_by(Component::compare);
    Ok(needed)
}

/// What decides the result, a line each: files by path, size and time, configurations and options.
fn signature(arguments: &Arguments, base: &Checkpoint, tuned: &Checkpoint) -> String {
    let mut lines = vec![format!("the version: {}", env!("CARGO_PKG_VERSION"))];
    for (side, model) in [("base", base), ("fine-tuned model", tuned)] {
        for shard in model.shards() {
            let path = shard.file.path();
            let metadata = std::fs::metadata(path);
            let size = metadata.as_ref().map_or(0, std::fs::Metadata::len);
            let changed = metadata.and_then(|metadata| metadata.modified()).ok();
            let since = changed.and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
            let seconds = since.map(|since| since.as_secs_f64()).unwrap_or_default();
            lines.push(format!(
                "a file of the {side}: {}, {size} bytes, changed at {seconds} s",
                absolute(path).display()
            ));
        }
        let config = model.config().and_then(|config| serde_json::to_string(config).ok());
        lines.push(format!("config.json of the {side}: {}", config.unwrap_or_default()));
    }
    let mut options = arguments.ranks.settings();
    for (name, list) in [("full", &arguments.full), ("include", &arguments.include)] {
        options.push((name, list.join(", ")));
    }
    options.push(("dtype", arguments.dtype.dtype().to_string()));
    options.push(("accuracy", arguments.accuracy.to_string()));
    options.push(("exact", arguments.exact.to_string()));
    lines.extend(options.into_iter().map(|(name, value)| match value.as_str() {
        "" => format!("--{name}: not given"),
        value => format!("--{name}: {value}"),
    }));
    lines.push(String::new());
    lines.join("\n")
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// How many lines of one kind the text shows.
const SHOWN: usize = 10;

fn text(arguments: &Arguments, report: &ExtractReport, bytes: u64) -> String {
    let mut lines = Vec::new();
    let mut worst: Vec<&Extracted> = report.targets.iter().collect();
    worst.sort_by(|a, b| b.relative().total_cmp(&a.relative()));
    if !worst.is_empty() {
        let width = worst.iter().take(SHOWN).map(|one| one.name.chars().count()).max();
        let width = width.unwrap_or(0).max(6);
        lines.push(format!(
            "{:width$}  {:>5}  {:>9}  {:>9}  {:>12}",
            "target", "rank", "‖ΔW‖/‖W₀‖", "error/‖ΔW‖", "above best"
        ));
        for one in worst.iter().take(SHOWN) {
            lines.push(format!(
                "{:width$}  {:>5}  {:>9}  {:>10}  {:>12}",
                one.name,
                one.rank,
                percent(relative_to_base(one)),
                percent(one.relative()),
                above(one),
            ));
        }
        if worst.len() > SHOWN {
            let rest = worst.len() - SHOWN;
            lines.push(format!("and {rest} more with smaller errors (--json lists them)"));
        }
        let change = |one: &&Extracted| relative_to_base(one);
        let hidden = worst.iter().skip(SHOWN).copied();
        let most = hidden.max_by(|a, b| change(a).total_cmp(&change(b)));
        let shown = worst.iter().take(SHOWN).map(change).fold(0.0, f64::max);
        if let Some(most) = most.filter(|most| change(most) > shown) {
            lines.push(format!(
                "of these, `{}` changed most: {} of ‖W₀‖",
                most.name,
                percent(relative_to_base(most))
            ));
        }
    }
    lines.extend(not_held(report));
    let unclear = report.targets.iter().filter_map(|one| one.noise.as_ref());
    let unclear = unclear.filter(|noise| !noise.clear).count();
    if unclear > 0 {
        lines.push(format!(
            "auto is a heuristic: {unclear} spectra have no clear end of signal (--json has the \
             estimates)"
        ));
    }
    if let Some((budget, spent, short)) = report.budget {
        let (spent, budget) = (Bytes(spent), Bytes(budget));
        let relative = arguments.ranks.relative();
        let kept = report.targets.iter().map(|one| {
            let by_base = relative && one.base_energy > 0.0;
            (one.energy - one.residual) / if by_base { one.base_energy } else { 1.0 }
        });
        let short = short_of_best(short, kept.sum(), relative);
        lines.push(format!("budget: {spent} of {budget} spent; {short}"));
        if !report.capped.is_empty() {
            lines.push(format!(
                "{} every rank that was computed: with more of them computed, more of the budget \
                 might go there",
                counted(report.capped.len(), "target was given", "targets were given")
            ));
        }
    }
    lines.push(format!(
        "memory: decomposing takes {} at most, beside the files and the adapter",
        Bytes(report.memory_bound)
    ));
    let total = Total::of(report);
    let of = if total.exact { "" } else { " (estimated)" };
    lines.push(format!(
        "all: {} of the energy of the factored changes kept, error {} of ‖ΔW‖, at most {} above \
         the best of these ranks{of}",
        percent(1.0 - total.relative * total.relative),
        percent(total.relative),
        match total.excess {
            excess if excess < 1.0 => percent(excess),
            // Hardly anything is left over: the share of the change is what can be told.
            _ => format!("{} of ‖ΔW‖", percent(total.gap())),
        },
    ));
    lines.push(format!(
        "wrote {} ({}): {} factored, {} whole, {}; {} not change",
        arguments.output.display(),
        arguments.to.name(),
        report.targets.len(),
        report.whole.len(),
        Bytes(bytes),
        counted(report.unchanged, "parameter did", "parameters did")
    ));
    lines.join("\n")
}

/// What changed and is not in the adapter, by kind; and what storing it would be worth.
fn not_held(report: &ExtractReport) -> Vec<String> {
    let mut kinds: BTreeMap<(Kind, &str), Vec<&LeftOut>> = BTreeMap::new();
    for one in &report.left_out {
        kinds.entry((one.kind, one.reason)).or_default().push(one);
    }
    let mut lines = Vec::new();
    for ((kind, reason), all) in kinds {
        let relative = |one: &LeftOut| one.change.relative();
        let most = all.iter().max_by(|a, b| relative(a).total_cmp(&relative(b)));
        let Some(most) = most else { continue };
        let bytes: u64 = all.iter().map(|one| one.change.elements * 2).sum();
        let by = if all.len() > 1 { "up to " } else { "" };
        lines.push(format!(
            "not in the adapter: {} that changed by {by}{} (`{}`): {reason}{}",
            of_kind(kind, all.len()),
            percent(relative(most)),
            most.name,
            match kind {
                Kind::Norm => format!("; --full norms stores them, about {}", Bytes(bytes)),
                Kind::Bias => format!("; --full biases stores them, about {}", Bytes(bytes)),
                Kind::Embedding | Kind::Head => format!(
                    "; --full embeddings stores them, about {}, --include PATTERN factors them",
                    Bytes(bytes)
                ),
                _ => String::new(),
            }
        ));
    }
    // What the norms' share is worth, against the most that four times the rank would add.
    let small: f64 = report
        .left_out
        .iter()
        .filter(|one| matches!(one.kind, Kind::Norm | Kind::Bias))
        .map(|one| one.change.relative().powi(2))
        .filter(|share| share.is_finite())
        .sum();
    let gained: f64 = report
        .targets
        .iter()
        .filter(|one| one.base_energy > 0.0)
        .map(|one| most_gained(one, 3 * one.rank) / one.base_energy)
        .sum();
    if small > gained && !report.targets.is_empty() {
        lines.push(
            "relative to the weights, the norms and biases left out changed by more than four times \
             the ranks would add: consider --full norms,biases"
                .to_owned(),
        );
    }
    lines
}

/// A number of parameters of a kind.
fn of_kind(kind: Kind, count: usize) -> String {
    let (one, more) = match kind {
        Kind::Linear => ("linear layer", "linear layers"),
        Kind::Convolution => ("convolution", "convolutions"),
        Kind::Embedding => ("embedding", "embeddings"),
        Kind::Head => ("head", "heads"),
        Kind::Norm => ("norm", "norms"),
        Kind::Bias => ("bias", "biases"),
        Kind::Stack => ("stack of experts", "stacks of experts"),
        Kind::Other => ("other parameter", "other parameters"),
    };
    counted(count, one, more)
}

/// A bound from above on the energy that so many ranks more would add: no value that was not computed is
/// larger than the last that was, and no more is left than is left over.
fn most_gained(one: &Extracted, ranks: usize) -> f64 {
    let known: Vec<f64> =
        one.values.iter().skip(one.rank).take(ranks).map(|value| value * value).collect();
    let last = one.values.last().map_or(f64::INFINITY, |value| value * value);
    let missing = (one.rows.min(one.cols).saturating_sub(one.rank)).min(ranks) - known.len();
    let unknown = if missing == 0 { 0.0 } else { missing as f64 * last };
    (known.iter().sum::<f64>() + unknown).min(one.residual)
}

fn relative_to_base(one: &Extracted) -> f64 {
    if one.energy == 0.0 { 0.0 } else { (one.energy / one.base_energy).sqrt() }
}

/// How far above the best error, as it can be told.
fn above(one: &Extracted) -> String {
    let about = if one.exact { "" } else { "≤ " };
    match one.excess() {
        Some(excess) if excess < 1.0 => format!("{about}{}", percent(excess)),
        // Hardly anything is left over: the share of the change is what can be told.
        _ => format!("≤ {} ‖ΔW‖", percent(one.gap())),
    }
}

fn percent(share: f64) -> String {
    let percent = share * 100.0;
    match percent {
        0.0 => "0 %".to_owned(),
        percent if percent.abs() < 0.01 => format!("{percent:.1e} %"),
        percent => format!("{percent:.2} %"),
    }
}

/// All factored changes as one vector.
struct Total {
    energy: f64,
    residual: f64,
    optimum: f64,
    relative: f64,
    excess: f64,
    exact: bool,
}

impl Total {
    /// How much further than the best error it is at most, as a share of ‖ΔW‖_F.
    fn gap(&self) -> f64 {
        ((self.residual.sqrt() - self.optimum.sqrt()) / self.energy.sqrt()).max(0.0)
    }

    fn of(report: &ExtractReport) -> Total {
        let sum = |of: fn(&Extracted) -> f64| report.targets.iter().map(of).sum::<f64>();
        let (energy, residual) = (sum(|one| one.energy), sum(|one| one.residual));
        let optimum = sum(|one| one.optimum);
        let ratio = |part: f64, whole: f64| if part > 0.0 { (part / whole).sqrt() } else { 0.0 };
        Total {
            energy,
            residual,
            optimum,
            relative: ratio(residual, energy),
            // One that rounding puts below its bound is no better for it, and makes no other better.
            excess: match sum(|one| one.residual.max(one.optimum)) {
                residual if residual > 0.0 => (ratio(residual, optimum) - 1.0).max(0.0),
                _ => 0.0,
            },
            exact: report.targets.iter().all(|one| one.exact),
        }
    }
}

/// The members of the report's `tensors` that are one number or text each, by the same names.
fn csv(report: &ExtractReport) -> String {
    let mut text =
        "parameter,rows,cols,rank,rank_decided_by,norm,base_norm,captured_energy,residual,\
                    relative_error,optimal_residual_at_least,gap_bound,gap_of_norm,exact,products\n"
            .to_owned();
    for one in &report.targets {
        let name = one.name.replace('"', "\"\"");
        text.push_str(&format!(
            "\"{name}\",{},{},{},{},{},{},{},{},{},{},{},{},{},{}\n",
            one.rows,
            one.cols,
            one.rank,
            one.bound,
            one.energy.sqrt(),
            one.base_energy.sqrt(),
            one.captured(),
            one.residual.sqrt(),
            one.relative(),
            one.optimum.sqrt(),
            one.excess().map(|excess| excess.to_string()).unwrap_or_default(),
            one.gap(),
            one.exact,
            one.products
        ));
    }
    text
}

/// `lora-cli/extract/1`; docs/cli-json.md describes it.
#[derive(Debug, Serialize)]
struct JsonReport<'a> {
    schema: &'static str,
    base: String,
    tuned: String,
    output: String,
    format: &'static str,
    bytes: u64,
    memory_bound_bytes: u64,
    tensors: Vec<JsonTensor<'a>>,
    total: JsonTotal,
    whole: Vec<JsonChange<'a>>,
    left_out: Vec<JsonChange<'a>>,
    unchanged: usize,
    only_base: &'a [String],
    only_tuned: &'a [String],
    reshaped: Vec<&'a str>,
    budget: Option<JsonBudget<'a>>,
    notes: &'a [String],
}

#[derive(Debug, Serialize)]
struct JsonTensor<'a> {
    parameter: &'a str,
    shape: [usize; 2],
    rank: usize,
    rank_decided_by: &'a str,
    norm: f64,
    base_norm: f64,
    captured_energy: f64,
    residual: f64,
    relative_error: f64,
    optimal_residual_at_least: f64,
    gap_bound: Option<f64>,
    gap_of_norm: f64,
    exact: bool,
    products: usize,
    singular_values: &'a [f64],
    noise: Option<&'a NoiseSummary>,
}

#[derive(Debug, Serialize)]
struct JsonTotal {
    norm: f64,
    residual: f64,
    relative_error: f64,
    captured_energy: f64,
    gap_bound: Option<f64>,
    exact: bool,
}

#[derive(Debug, Serialize)]
struct JsonChange<'a> {
    parameter: &'a str,
    kind: &'static str,
    elements: Option<u64>,
    changed: Option<u64>,
    norm: Option<f64>,
    relative: Option<f64>,
    reason: Option<&'static str>,
}

#[derive(Debug, Serialize)]
struct JsonBudget<'a> {
    bytes: u64,
    spent: u64,
    short_of_best: f64,
    capped: &'a [String],
}

fn describe<'a>(
    arguments: &Arguments,
    pairing: &'a Pairing,
    report: &'a ExtractReport,
    notes: &'a [String],
    bytes: u64,
) -> JsonReport<'a> {
    let total = Total::of(report);
    let finite = |value: f64| value.is_finite().then_some(value);
    JsonReport {
        schema: "lora-cli/extract/1",
        base: arguments.base.display().to_string(),
        tuned: arguments.tuned.display().to_string(),
        output: arguments.output.display().to_string(),
        format: arguments.to.name(),
        bytes,
        memory_bound_bytes: report.memory_bound,
        tensors: report
            .targets
            .iter()
            .map(|one| JsonTensor {
                parameter: &one.name,
                shape: [one.rows, one.cols],
                rank: one.rank,
                rank_decided_by: &one.bound,
                norm: one.energy.sqrt(),
                base_norm: one.base_energy.sqrt(),
                captured_energy: one.captured(),
                residual: one.residual.sqrt(),
                relative_error: one.relative(),
                optimal_residual_at_least: one.optimum.sqrt(),
                gap_bound: one.excess(),
                gap_of_norm: one.gap(),
                exact: one.exact,
                products: one.products,
                singular_values: &one.values,
                noise: one.noise.as_ref(),
            })
            .collect(),
        total: JsonTotal {
            norm: total.energy.sqrt(),
            residual: total.residual.sqrt(),
            relative_error: total.relative,
            captured_energy: 1.0 - total.relative * total.relative,
            gap_bound: (total.optimum > 0.0).then_some(total.excess),
            exact: total.exact,
        },
        whole: report
            .whole
            .iter()
            .map(|(name, kind, change)| JsonChange {
                parameter: name,
                kind: kind.name(),
                elements: change.map(|change| change.elements),
                changed: change.map(|change| change.changed),
                norm: change.map(|change| change.energy.sqrt()),
                relative: change.and_then(|change| finite(change.relative())),
                reason: None,
            })
            .collect(),
        left_out: report
            .left_out
            .iter()
            .map(|one| JsonChange {
                parameter: &one.name,
                kind: one.kind.name(),
                elements: Some(one.change.elements),
                changed: Some(one.change.changed),
                norm: Some(one.change.energy.sqrt()),
                relative: finite(one.change.relative()),
                reason: Some(one.reason),
            })
            .collect(),
        unchanged: report.unchanged,
        only_base: &pairing.only_base,
        only_tuned: &pairing.only_tuned,
        reshaped: pairing.reshaped.iter().map(|one| one.name.as_str()).collect(),
        budget: report.budget.map(|(bytes, spent, short_of_best)| JsonBudget {
            bytes,
            spent,
            short_of_best,
            capped: &report.capped,
        }),
        notes,
    }
}
