//! `lora-cli merge`: an adapter into its base.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Instant;

use clap::{Args, ValueEnum};
use lora_format::Dtype;
use lora_format::checkpoint::{Checkpoint, Layout};
use lora_format::fingerprint::Verdict;
use lora_format::model::LowRank;
use lora_merge::assets::{Assets, TokenizerSource};
use lora_merge::engine::{Progress, RoundingMode, RunOptions};
use lora_merge::kernels::Isa;
use lora_merge::names::numberless;
use lora_merge::output::{self, OutputOptions};
use lora_merge::report::{MergeReport, Realised};
use lora_merge::{Bytes, MergeOptions, MergePlan};
use serde::Serialize;

use super::{AdapterArguments, WriteArguments, refuse_damaged};
use crate::failure::{Failure, Outcome};
use crate::{printer, progress};

/// Merge an adapter into its base model: W' = W0 + s·B·A
///
/// BASE is a safetensors file or a Hugging Face directory; the output is of the same kind. Every
/// tensor of the adapter is used, or nothing is written.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  lora-cli merge base.safetensors adapter.safetensors
  lora-cli merge Llama-3-8B ./my-lora -o Llama-3-8B-mine
  lora-cli merge Llama-3-8B ./my-lora --dry-run
  lora-cli merge Llama-3-8B ./my-lora --dtype f32 --scale 0.8 -o out")]
pub(crate) struct Arguments {
    /// The base model: a .safetensors file, or a directory with model.safetensors or shards
    base: PathBuf,
    /// The adapter: our own format, a PEFT directory, or an adapter_model.safetensors
    adapter: PathBuf,
    /// Where to write [default: BASE's name with -merged, in the current directory]
    #[arg(short, long, value_name = "PATH")]
    output: Option<PathBuf>,
    #[command(flatten)]
    write: WriteArguments,
    #[command(flatten)]
    adapter_options: AdapterArguments,
    /// Multiply the adapter's scale
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, allow_negative_numbers = true)]
    scale: f64,
    /// The dtype of the output's floating-point tensors
    #[arg(long, value_enum, default_value_t = DtypeChoice::Keep)]
    dtype: DtypeChoice,
    /// How merged values are rounded: stochastic is unbiased but noisy
    #[arg(long, value_enum, default_value_t = RoundingChoice::Nearest)]
    rounding: RoundingChoice,
    /// The seed of stochastic rounding
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Whose tokenizer and chat template the output gets
    #[arg(long, value_enum, default_value_t = TokenizerChoice::Auto)]
    tokenizer: TokenizerChoice,
    /// The largest output shard, such as 5GB [default: the base's shards, 5GB where those grow]
    #[arg(long, value_name = "SIZE")]
    max_shard_size: Option<Size>,
    /// How square weights are stored, where the base leaves it open: true means (in, out)
    #[arg(long, value_name = "BOOL")]
    fan_in_fan_out: Option<bool>,
    /// Merge an adapter that holds NaN or infinities
    #[arg(long)]
    allow_nonfinite: bool,
    /// Merge though the base is not the one the adapter was trained on
    #[arg(long)]
    allow_different_base: bool,
    /// Print what would be done, and write nothing
    #[arg(long)]
    dry_run: bool,
    /// Print a report as JSON on stdout
    #[arg(long)]
    pub(crate) json: bool,
    /// Say nothing but errors and warnings
    #[arg(short, long)]
    quiet: bool,
    /// Worker threads [default: one per core]
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    threads: usize,
    /// The kernels' instruction set: the bytes are the same for all
    #[arg(long, value_name = "ISA", hide = true)]
    isa: Option<String>,
    /// The tile size in bytes: the bytes written are the same for all
    #[arg(long, value_name = "BYTES", hide = true)]
    tile_bytes: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum DtypeChoice {
    Keep,
    F32,
    F16,
    Bf16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum RoundingChoice {
    Nearest,
    Stochastic,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum TokenizerChoice {
    /// The adapter's where it brings one
    Auto,
    Base,
    Adapter,
}

/// A number of bytes with an optional decimal or binary unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Size(u64);

impl FromStr for Size {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Size, &'static str> {
        const UNITS: [(&str, u64); 7] = [
            ("KIB", 1 << 10),
            ("MIB", 1 << 20),
            ("GIB", 1 << 30),
            ("KB", 1_000),
            ("MB", 1_000_000),
            ("GB", 1_000_000_000),
            ("B", 1),
        ];
        let upper = text.trim().to_ascii_uppercase();
        let (number, unit) = UNITS
            .iter()
            .find_map(|(name, unit)| Some((upper.strip_suffix(name)?, *unit)))
            .unwrap_or((&upper, 1));
        let number: f64 = number.trim().parse().map_err(|_| "expected a size such as 5GB")?;
        let bytes = number * unit as f64;
        if (1.0..=1e18).contains(&bytes) { Ok(Size(bytes as u64)) } else { Err("out of range") }
    }
}

pub(crate) fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    let started = Instant::now();
    if !arguments.scale.is_finite() {
        return Err(Failure::new(format!("--scale {} is not a number", arguments.scale), None));
    }
    let base = Checkpoint::open(&arguments.base)?;
    let read_options = arguments.adapter_options.read_options();
    let adapter = lora_format::read(&arguments.adapter, &read_options)?;
    let plan = MergePlan::new(base, adapter, &arguments.merge_options())?;
    let assets = Assets::plan(&plan.base, &plan.adapter, &plan.output, arguments.tokenizer())?;
    let output = OutputOptions {
        destination: arguments.output.clone().unwrap_or_else(|| default_output(&plan.base)),
        overwrite: arguments.write.overwrite(),
        durability: arguments.write.durability(),
    };
    let run = arguments.run_options()?;
    output::check_destination(&plan, &assets, &output)?;
    announce(arguments, &plan, &assets);
    if arguments.dry_run {
        return dry_run(arguments, &plan, &assets, &output, &run);
    }
    refuse_damaged(&plan.adapter)?;
    let progress = Arc::new(Progress::default());
    let total = plan.output.files.iter().map(|file| file.bytes).sum();
    let report = progress::watch(total, arguments.quiet, &progress, || {
        output::write(&plan, &assets, &output, &run, &progress)
    })?;
    let seconds = started.elapsed().as_secs_f64();
    summarise(arguments, &assets, &output, &report, seconds);
    if arguments.json {
        let mut json = JsonReport::new(arguments, &plan, &assets, &output, &run, "merged");
        json.fill(&report, seconds);
        json.warnings.extend(rounding_warnings(arguments, &report));
        printer::json(&json)?;
    }
    Ok(Outcome::Done)
}

impl Arguments {
    fn merge_options(&self) -> MergeOptions {
        MergeOptions {
            scale: self.scale,
            dtype: match self.dtype {
                DtypeChoice::Keep => None,
                DtypeChoice::F32 => Some(Dtype::F32),
                DtypeChoice::F16 => Some(Dtype::F16),
                DtypeChoice::Bf16 => Some(Dtype::Bf16),
            },
            shard_bytes: self.max_shard_size.map(|size| size.0),
            fan_in_fan_out: self.fan_in_fan_out,
            allow_different_base: self.allow_different_base,
        }
    }

    fn run_options(&self) -> Result<RunOptions, Failure> {
        let mut options = RunOptions {
            threads: self.threads,
            allow_non_finite: self.allow_nonfinite,
            ..RunOptions::default()
        };
        if self.rounding == RoundingChoice::Stochastic {
            options.rounding = RoundingMode::Stochastic { seed: self.seed };
        }
        if let Some(name) = &self.isa {
            options.isa = Isa::available()
                .into_iter()
                .find(|isa| isa.name() == name)
                .ok_or_else(|| Failure::new(format!("--isa {name}: not on this machine"), None))?;
        }
        if let Some(bytes) = self.tile_bytes {
            options.tile_bytes = bytes.max(1);
        }
        Ok(options)
    }

    fn tokenizer(&self) -> TokenizerSource {
        match self.tokenizer {
            TokenizerChoice::Auto => TokenizerSource::Auto,
            TokenizerChoice::Base => TokenizerSource::Base,
            TokenizerChoice::Adapter => TokenizerSource::Adapter,
        }
    }
}

/// The base's name with `-merged`, in the current directory: bases often lie where one cannot or
/// should not write.
fn default_output(base: &Checkpoint) -> PathBuf {
    let path = base.path();
    if base.layout() == Layout::File {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        return PathBuf::from(format!("{stem}-merged.safetensors"));
    }
    let absolute = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    PathBuf::from(format!("{}-merged", model_name(&absolute)))
}

/// A directory's name; of a snapshot in the hub's cache
/// (`models--org--name/snapshots/<commit>`), the model's.
fn model_name(directory: &Path) -> String {
    let name = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
    let parent = directory.parent();
    if parent.and_then(name).as_deref() == Some("snapshots")
        && let Some(cache) = parent.and_then(Path::parent).and_then(name)
        && let Some(model) =
            cache.strip_prefix("models--").and_then(|rest| rest.rsplit("--").next())
    {
        return model.to_owned();
    }
    name(directory).unwrap_or_else(|| "model".to_owned())
}

/// What the user should know before anything is written. Warnings are said even when quiet.
fn announce(arguments: &Arguments, plan: &MergePlan, assets: &Assets) {
    if let Some(warning) = identity_warning(plan) {
        printer::talk(&warning);
    }
    if arguments.quiet {
        return;
    }
    printer::notes(&plan.notes);
    for ((from, to), count) in &plan.renames {
        let quoted = |prefix: &str| {
            if prefix.is_empty() { "no prefix".to_owned() } else { format!("`{prefix}.`") }
        };
        printer::talk(&format!(
            "note: {count} modules have {} in the adapter and {} in the base",
            quoted(from),
            quoted(to)
        ));
    }
    if !assets.from_adapter.is_empty() {
        printer::talk(&format!("note: from the adapter: {}", assets.from_adapter.join(", ")));
    }
    for change in &assets.config_changes {
        printer::talk(&format!("note: config.json: {change}"));
    }
    if plan.output.resharded {
        printer::talk(&format!("note: re-sharded into {} files", plan.output.files.len()));
    }
    if !assets.left_behind.is_empty() {
        printer::talk(&format!("note: not copied: {}", assets.left_behind.join(", ")));
    }
}

/// What is doubtful about the base.
fn identity_warning(plan: &MergePlan) -> Option<String> {
    match &plan.identity {
        Verdict::Unknown => name_warning(plan),
        Verdict::Different { equal, compared, .. } => Some(format!(
            "warning: not the base that the adapter was trained on ({equal} of {compared} sampled \
             values agree); merging all the same, as asked"
        )),
        _ => None,
    }
}

/// Without a fingerprint only names can be compared, and those are often paths.
fn name_warning(plan: &MergePlan) -> Option<String> {
    let recorded = plan.adapter.base.name.as_deref()?;
    let last = |name: &str| name.trim_end_matches('/').rsplit('/').next().map(str::to_lowercase);
    let directory = plan.base.path().canonicalize().ok()?;
    let config_name = plan.base.config().and_then(|config| config.get("_name_or_path")?.as_str());
    let names = [Some(model_name(&directory)), config_name.map(str::to_owned)];
    if names.iter().flatten().any(|name| last(name) == last(recorded)) {
        return None;
    }
    Some(format!(
        "warning: the adapter was trained on `{recorded}`; whether this base is that model cannot \
         be told (whoever trained it can record that with `lora-cli stamp`)"
    ))
}

fn dry_run(
    arguments: &Arguments,
    plan: &MergePlan,
    assets: &Assets,
    output: &OutputOptions,
    run: &RunOptions,
) -> Result<Outcome, Failure> {
    if arguments.json {
        printer::json(&JsonReport::new(arguments, plan, assets, output, run, "planned"))?;
        return Ok(Outcome::Done);
    }
    let mut text = format!(
        "{} + {} ({}) → {}\n\n",
        plan.base.path().display(),
        plan.adapter.path.display(),
        plan.adapter.format,
        output.destination.display()
    );
    text.push_str(&target_table(plan));
    let bytes = plan.output.files.iter().map(|file| file.bytes).sum();
    let (copied, converted) = job_counts(plan);
    text.push_str(&format!(
        "\n{} targets, {copied} tensors copied, {converted} converted\n\
         output: {} in {} safetensors files, {} other files\n\
         memory: at most {}\n",
        plan.targets.len(),
        Bytes(bytes),
        plan.output.files.len(),
        assets.files.len(),
        Bytes(memory_bound(plan, run)),
    ));
    printer::data(&text)?;
    Ok(Outcome::Done)
}

fn job_counts(plan: &MergePlan) -> (usize, usize) {
    use lora_merge::layout::Job;
    let count = |job| {
        let tensors = plan.output.files.iter().flat_map(|file| &file.tensors);
        tensors.filter(|tensor| tensor.job == job).count()
    };
    (count(Job::Copy), count(Job::Convert))
}

/// The bound that the benchmark holds the engine to.
fn memory_bound(plan: &MergePlan, run: &RunOptions) -> u64 {
    const MIB: u64 = 1 << 20;
    let factors = plan.targets.iter().filter_map(|target| plan.factors(target));
    let adapter: u64 = factors.map(|f| 4 * (f.a.elements() + f.b.elements()) as u64).sum();
    let headers: u64 = plan.base.shards().iter().map(|shard| shard.file.header().data_start).sum();
    64 * MIB + 4 * MIB * run.workers() as u64 + adapter + 4 * headers
}

/// Targets that differ only in their layer number, a line together.
fn target_table(plan: &MergePlan) -> String {
    let mut groups: BTreeMap<(String, String), usize> = BTreeMap::new();
    for target in &plan.targets {
        let info = plan.base.info(target.location);
        let rank = plan.factors(target).map_or(0, LowRank::rank);
        let what = format!(
            "{:?} {} {}  rank {rank}  scale {}",
            info.shape,
            info.dtype,
            target.orientation.name(),
            target.scale
        );
        *groups.entry((numberless(&info.name), what)).or_default() += 1;
    }
    let width = groups.keys().map(|key| key.0.chars().count()).max().unwrap_or(0);
    let lines = groups
        .iter()
        .map(|((name, what), count)| format!("  {count:>5} × {name:width$}  {what}\n"));
    lines.collect()
}

fn summarise(
    arguments: &Arguments,
    assets: &Assets,
    output: &OutputOptions,
    report: &MergeReport,
    seconds: f64,
) {
    let realised = &report.realised;
    if !arguments.quiet {
        let mut text = format!(
            "merged {} targets into {}: {} in {seconds:.2} s",
            report.targets.len(),
            output.destination.display(),
            Bytes(report.bytes),
        );
        let others = assets.files.len();
        let copied = match (report.copied, report.converted) {
            (copied, 0) => format!("{copied} tensors copied bit for bit"),
            (copied, converted) => format!("{copied} tensors copied, {converted} converted"),
        };
        text.push_str(&format!("\n  {copied}, {others} other files"));
        if let Some(line) = realised_line(realised) {
            text.push_str(&format!("\n  {line}"));
        }
        printer::talk(&text);
    }
    for warning in rounding_warnings(arguments, report) {
        printer::talk(&warning);
    }
}

/// What the user should know of what was written.
fn rounding_warnings(arguments: &Arguments, report: &MergeReport) -> Vec<String> {
    let realised = &report.realised;
    let mut warnings = Vec::new();
    if realised.nonzero == 0 {
        let text = "warning: the adapter's delta is zero everywhere: the output equals the base";
        warnings.push(text.to_owned());
    } else if realised.is_poor() || report.targets.iter().any(|target| target.realised.is_poor()) {
        warnings.push(loss_warning(arguments, report));
    }
    if realised.non_finite > 0 {
        warnings.push(format!(
            "warning: {} elements of the merged tensors are infinite or NaN",
            realised.non_finite
        ));
    }
    warnings
}

fn realised_line(realised: &Realised) -> Option<String> {
    Some(format!(
        "realised delta: {}, {:.1} % of the elements changed",
        survival(realised)?,
        100.0 * realised.changed_share()
    ))
}

/// "98.2 % of it survived rounding, with noise of 22 % of it".
fn survival(realised: &Realised) -> Option<String> {
    let noise = realised.noise()?;
    let noise = if noise < 1.0 {
        format!("noise of {:.1} % of it", 100.0 * noise)
    } else {
        format!("noise {noise:.1} times as large as it")
    };
    let survived = 100.0 * realised.projection()?;
    Some(format!("{survived:.1} % of it survived rounding, with {noise}"))
}

/// What rounding did to the adapter, where it was worst, and what helps, best first. Loud where the
/// adapter is damaged, a line where a good merge has the ordinary noise of a coarse dtype.
fn loss_warning(arguments: &Arguments, report: &MergeReport) -> String {
    let realised = &report.realised;
    let lost = 1.0 - realised.projection().unwrap_or(1.0);
    let noise = realised.noise().unwrap_or(0.0);
    let stochastic = arguments.rounding == RoundingChoice::Stochastic;
    let mut poor: Vec<_> = report.targets.iter().filter(|t| t.realised.is_poor()).collect();
    let total = report.targets.len();
    if lost < 0.1 && noise < 0.5 {
        return format!(
            "note: the stored dtype is coarse beside the delta in {} of {total} targets (noise of \
             {:.0} % of the delta in all); --dtype f32 keeps it exactly",
            poor.len(),
            100.0 * noise
        );
    }
    let severity = |realised: &Realised| {
        let lost = (1.0 - realised.projection().unwrap_or(1.0)).abs();
        lost.max(realised.noise().unwrap_or(0.0))
    };
    poor.sort_by(|a, b| severity(&b.realised).total_cmp(&severity(&a.realised)));
    let mut text = if lost >= 0.1 {
        format!("warning: rounding LOST {:.0} % of this adapter", 100.0 * lost)
    } else {
        format!("warning: rounding drowned this adapter in noise {noise:.1} times as large as it")
    };
    text.push_str(&format!(
        ": in {} of {total} targets the delta is small beside the spacing of the stored values",
        poor.len()
    ));
    for target in poor.iter().take(3) {
        let survival = survival(&target.realised).unwrap_or_default();
        text.push_str(&format!("\n  {} ({}): {survival}", target.parameter, target.dtype));
    }
    let mut help = Vec::new();
    if poor.iter().any(|target| target.dtype != Dtype::F32) {
        help.push("--dtype f32 (keeps all of it)");
    }
    if poor.iter().any(|target| target.dtype == Dtype::Bf16) {
        help.push("--dtype f16 (8 times finer than bf16, if the model's values fit)");
    }
    help.push("serving the adapter unmerged");
    text.push_str(&format!("\n  what helps, best first: {}", help.join("; ")));
    if !stochastic {
        text.push_str(
            "\n  --rounding stochastic keeps the delta on average, at the price of noise that can \
             be several times the delta",
        );
    }
    text
}

/// The report, `lora-cli/merge/1`; docs/cli-json.md describes it.
#[derive(Debug, Serialize)]
struct JsonReport {
    schema: &'static str,
    status: &'static str,
    base: String,
    adapter: String,
    adapter_format: &'static str,
    output: String,
    identity: &'static str,
    dtype: String,
    rounding: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<u64>,
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
    module: String,
    parameter: String,
    shape: Vec<usize>,
    stored: &'static str,
    base_dtype: &'static str,
    rank: usize,
    alpha: f64,
    scale: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    realised: Option<JsonRealised>,
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

impl JsonReport {
    fn new(
        arguments: &Arguments,
        plan: &MergePlan,
        assets: &Assets,
        output: &OutputOptions,
        run: &RunOptions,
        status: &'static str,
    ) -> JsonReport {
        let (copied, converted) = job_counts(plan);
        let stochastic = arguments.rounding == RoundingChoice::Stochastic;
        JsonReport {
            schema: "lora-cli/merge/1",
            status,
            base: plan.base.path().display().to_string(),
            adapter: plan.adapter.path.display().to_string(),
            adapter_format: plan.adapter.format.name(),
            output: output.destination.display().to_string(),
            identity: match plan.identity {
                Verdict::Same => "same",
                Verdict::Reencoded => "re-encoded",
                Verdict::Unknown => "unknown",
                Verdict::Different { .. } => "different",
            },
            dtype: arguments
                .dtype
                .to_possible_value()
                .map_or_else(String::new, |value| value.get_name().to_owned()),
            rounding: if stochastic { "stochastic" } else { "nearest" },
            seed: stochastic.then_some(arguments.seed),
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
            warnings: identity_warning(plan).into_iter().collect(),
            memory_bound_bytes: memory_bound(plan, run),
            seconds: None,
            threads: None,
            realised: None,
            targets: plan
                .targets
                .iter()
                .map(|target| {
                    let info = plan.base.info(target.location);
                    let factors = plan.factors(target);
                    JsonTarget {
                        module: plan.adapter.components[target.component].target.module.clone(),
                        parameter: info.name.clone(),
                        shape: info.shape.clone(),
                        stored: target.orientation.name(),
                        base_dtype: info.dtype.name(),
                        rank: factors.map_or(0, LowRank::rank),
                        alpha: factors.map_or(0.0, |factors| factors.scaling.alpha),
                        scale: target.scale,
                        realised: None,
                    }
                })
                .collect(),
        }
    }

    fn fill(&mut self, report: &MergeReport, seconds: f64) {
        self.seconds = Some(seconds);
        self.threads = Some(report.threads);
        self.realised = Some((&report.realised).into());
        for (target, done) in self.targets.iter_mut().zip(&report.targets) {
            target.realised = Some((&done.realised).into());
        }
    }
}
