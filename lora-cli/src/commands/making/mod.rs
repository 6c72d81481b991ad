//! Making a model from another: what `merge`, `unmerge` and `switch` have in common.

mod json;
mod text;

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Instant;

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{Args, ValueEnum};
use lora_format::checkpoint::{Checkpoint, Layout};
use lora_format::model::Form;
use lora_format::naming::Component;
use lora_format::{Adapter, Dtype};
use lora_merge::assets::{Assets, TokenizerSource};
use lora_merge::engine::{Progress, RoundingMode, RunOptions};
use lora_merge::kernels::Isa;
use lora_merge::output::{self, OutputOptions};
use lora_merge::{MergeOptions, MergePlan, Tied, WeightedAdapter, experts};

use super::{AdapterArguments, WriteArguments, refuse_damaged};
use crate::failure::{Failure, Outcome};
use crate::{printer, progress};

/// What every command that makes a model takes.
#[derive(Debug, Args)]
pub(crate) struct MakeArguments {
    /// Where to write [default: the model's name with what was done, in the current directory]
    #[arg(short, long, value_name = "PATH")]
    output: Option<PathBuf>,
    #[command(flatten)]
    write: WriteArguments,
    #[command(flatten)]
    planning: PlanArguments,
    /// The dtype of the output's floating-point tensors
    #[arg(long, value_enum, default_value_t = DtypeChoice::Keep)]
    dtype: DtypeChoice,
    /// Whose tokenizer and chat template the output gets
    #[arg(long, value_enum, default_value_t = TokenizerChoice::Auto)]
    tokenizer: TokenizerChoice,
    /// The largest output shard, such as 5GB [default: the base's shards, 5GB where those grow]
    #[arg(long, value_name = "SIZE")]
    max_shard_size: Option<Size>,
    /// Print what would be done, and write nothing
    #[arg(long)]
    dry_run: bool,
    /// Print a report as JSON on stdout
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    engine: EngineArguments,
}

/// How adapters fit a model: what making one and checking one have in common.
#[derive(Debug, Args)]
pub(crate) struct PlanArguments {
    #[command(flatten)]
    adapter_options: AdapterArguments,
    /// Multiply every adapter's weight
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, allow_negative_numbers = true)]
    scale: f64,
    /// How square weights are stored, where the base leaves it open: true means (in, out)
    #[arg(long, value_name = "BOOL")]
    fan_in_fan_out: Option<bool>,
    /// What to do with a change of one of two tied tensors (input embedding, output head)
    #[arg(long, value_enum, default_value_t = TiedChoice::Refuse)]
    tied: TiedChoice,
    /// How the factors of fused experts are laid out, where shapes and configuration leave it open
    #[arg(long, value_name = "LAYOUT", value_parser = layouts())]
    moe_layout: Option<experts::Layout>,
    /// Merge though the base is not the one the adapter was trained on
    #[arg(long)]
    allow_different_base: bool,
}

/// How the work is carried out.
#[derive(Debug, Args)]
pub(crate) struct EngineArguments {
    /// How merged values are rounded: stochastic is unbiased but noisy
    #[arg(long, value_enum, default_value_t = RoundingChoice::Nearest)]
    rounding: RoundingChoice,
    /// The seed of stochastic rounding
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Merge an adapter that holds NaN or infinities
    #[arg(long)]
    allow_nonfinite: bool,
    /// Say nothing but errors and warnings
    #[arg(short, long)]
    pub(crate) quiet: bool,
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
enum TiedChoice {
    /// Refuse it
    Refuse,
    /// Write both tensors from now on: what was trained, if one was a target
    Untie,
    /// Change what both share
    Both,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum DtypeChoice {
    Keep,
    #[value(alias = "float32")]
    F32,
    #[value(aliases = ["fp16", "float16"])]
    F16,
    #[value(alias = "bfloat16")]
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
pub(crate) struct Size(u64);

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

/// `PATH` or `PATH@WEIGHT`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct AdapterArgument {
    path: PathBuf,
    weight: f64,
    /// Weights of components of a pipeline, by the user's words.
    components: Vec<(String, f64)>,
}

impl AdapterArgument {
    /// Where the adapter is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl FromStr for AdapterArgument {
    type Err = String;

    fn from_str(text: &str) -> Result<AdapterArgument, String> {
        let of = |path: &str, weight, components| AdapterArgument {
            path: path.into(),
            weight,
            components,
        };
        let whole = || of(text, 1.0, Vec::new());
        // A file may have an @ in its name.
        let Some((path, weight)) = text.rsplit_once('@').filter(|_| !Path::new(text).exists())
        else {
            return Ok(whole());
        };
        if weight.contains('=') && !path.is_empty() {
            return Ok(of(path, 1.0, component_weights(weight)?));
        }
        match weight.parse::<f64>() {
            Ok(weight) if weight.is_finite() && !path.is_empty() => {
                Ok(of(path, weight, Vec::new()))
            }
            _ => Err(format!("expected a number after the @, found `{weight}`")),
        }
    }
}

/// `unet=0.7,te=0.4`.
fn component_weights(text: &str) -> Result<Vec<(String, f64)>, String> {
    let one = |entry: &str| {
        let (word, weight) = entry
            .split_once('=')
            .ok_or_else(|| format!("expected COMPONENT=WEIGHT after the @, found `{entry}`"))?;
        if !Component::WORDS.contains(&word) {
            return Err(format!(
                "no component `{word}`: there are {}",
                Component::WORDS.join(", ")
            ));
        }
        match weight.parse::<f64>() {
            Ok(weight) if weight.is_finite() => Ok((word.to_owned(), weight)),
            _ => Err(format!("expected a number after `{word}=`, found `{weight}`")),
        }
    };
    text.split(',').map(one).collect()
}

/// An adapter in parts, each with the weight of its component; what no word means has weight 1.
pub(crate) fn by_component(
    adapter: Adapter,
    argument: &AdapterArgument,
) -> Result<Vec<WeightedAdapter>, Failure> {
    if argument.components.is_empty() {
        return Ok(vec![WeightedAdapter { adapter, weight: argument.weight, undo: false }]);
    }
    // The last word that means a component decides: `te=0.4,te2=0`.
    let weight_of = |module: &str| {
        let component = Component::of(module)?;
        argument.components.iter().rposition(|(word, _)| component.is_called(word))
    };
    for (index, (word, _)) in argument.components.iter().enumerate() {
        let means =
            |one: &lora_format::model::Component| weight_of(&one.target.module) == Some(index);
        if !adapter.components.iter().any(means) {
            let message = format!("{}: no module of `{word}` in it", argument.path.display());
            let hint = "lora-cli inspect shows its modules";
            return Err(Failure::new(message, Some(hint)));
        }
    }
    let mut parts: Vec<WeightedAdapter> = Vec::new();
    let places = (0..argument.components.len()).map(Some).chain([None]);
    for place in places {
        let mut part = adapter.clone();
        part.components.retain(|one| weight_of(&one.target.module) == place);
        if part.components.is_empty() {
            continue;
        }
        if !parts.is_empty() {
            part.notes.clear();
        }
        let weight = place.map_or(1.0, |place| argument.components[place].1);
        parts.push(WeightedAdapter { adapter: part, weight, undo: false });
    }
    Ok(parts)
}

/// The layouts of fused experts, with what each means as its help.
fn layouts() -> impl TypedValueParser<Value = experts::Layout> {
    let known =
        experts::Layout::ALL.map(|layout| PossibleValue::new(layout.name()).help(layout.meaning()));
    PossibleValuesParser::new(known).try_map(|name| name.parse::<experts::Layout>())
}

impl PlanArguments {
    /// Reads adapters for a base; `undo` says whether they are to be taken out.
    pub(crate) fn read(
        &self,
        base: &Path,
        adapters: &[AdapterArgument],
        undo: bool,
    ) -> Result<Vec<WeightedAdapter>, Failure> {
        if !self.scale.is_finite() {
            return Err(Failure::new(format!("--scale {} is not a number", self.scale), None));
        }
        let options = self.adapter_options.read_options(Some(base))?;
        let read = |argument: &AdapterArgument| {
            let adapter = lora_format::read(&argument.path, &options)?;
            let parts = by_component(adapter, argument)?;
            Ok(parts.into_iter().map(|part| WeightedAdapter { undo, ..part }).collect())
        };
        let read: Result<Vec<Vec<WeightedAdapter>>, Failure> = adapters.iter().map(read).collect();
        Ok(read?.into_iter().flatten().collect())
    }

    pub(crate) fn merge_options(&self) -> MergeOptions {
        MergeOptions {
            scale: self.scale,
            fan_in_fan_out: self.fan_in_fan_out,
            allow_different_base: self.allow_different_base,
            tied: match self.tied {
                TiedChoice::Refuse => Tied::Refuse,
                TiedChoice::Untie => Tied::Untie,
                TiedChoice::Both => Tied::Both,
            },
            moe_layout: self.moe_layout,
            ..MergeOptions::default()
        }
    }
}

impl EngineArguments {
    pub(crate) fn run_options(&self) -> Result<RunOptions, Failure> {
        let mut options = RunOptions {
            threads: self.threads,
            allow_non_finite: self.allow_nonfinite,
            rounding: match self.rounding {
                RoundingChoice::Nearest => RoundingMode::Nearest,
                RoundingChoice::Stochastic => RoundingMode::Stochastic { seed: self.seed },
            },
            ..RunOptions::default()
        };
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
}

impl MakeArguments {
    /// Reads adapters for a base; `undo` says whether they are to be taken out.
    pub(crate) fn read(
        &self,
        base: &Path,
        adapters: &[AdapterArgument],
        undo: bool,
    ) -> Result<Vec<WeightedAdapter>, Failure> {
        self.planning.read(base, adapters, undo)
    }

    fn merge_options(&self) -> MergeOptions {
        MergeOptions {
            dtype: match self.dtype {
                DtypeChoice::Keep => None,
                DtypeChoice::F32 => Some(Dtype::F32),
                DtypeChoice::F16 => Some(Dtype::F16),
                DtypeChoice::Bf16 => Some(Dtype::Bf16),
            },
            shard_bytes: self.max_shard_size.map(|size| size.0),
            ..self.planning.merge_options()
        }
    }

    fn tokenizer(&self) -> TokenizerSource {
        match self.tokenizer {
            TokenizerChoice::Auto => TokenizerSource::Auto,
            TokenizerChoice::Base => TokenizerSource::Base,
            TokenizerChoice::Adapter => TokenizerSource::Adapter,
        }
    }
}

/// What is done to a model, as names and messages say it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Deed {
    Merge,
    Unmerge,
    Switch,
}

impl Deed {
    /// The past participle: what the output's name ends in.
    fn done(self) -> &'static str {
        match self {
            Deed::Merge => "merged",
            Deed::Unmerge => "unmerged",
            Deed::Switch => "switched",
        }
    }

    fn schema(self) -> &'static str {
        match self {
            Deed::Merge => "lora-cli/merge/2",
            Deed::Unmerge => "lora-cli/unmerge/1",
            Deed::Switch => "lora-cli/switch/1",
        }
    }
}

/// A model about to be made.
struct Making<'a> {
    deed: Deed,
    arguments: &'a MakeArguments,
    plan: MergePlan,
    assets: Assets,
    output: OutputOptions,
    run: RunOptions,
}

/// Makes a model from the one at `base` and adapters.
pub(crate) fn make(
    deed: Deed,
    base: &Path,
    adapters: Vec<WeightedAdapter>,
    arguments: &MakeArguments,
) -> Result<Outcome, Failure> {
    let started = Instant::now();
    let base = Checkpoint::open(base)?;
    let plan = MergePlan::new(base, adapters, &arguments.merge_options())?;
    let assets = Assets::plan(&plan, arguments.tokenizer())?;
    let output = OutputOptions {
        destination: arguments.output.clone().unwrap_or_else(|| default_output(&plan.base, deed)),
        overwrite: arguments.write.overwrite(),
        durability: arguments.write.durability(),
    };
    let run = arguments.engine.run_options()?;
    output::check_destination(&plan, &assets, &output)?;
    let making = Making { deed, arguments, plan, assets, output, run };
    text::announce(&making);
    if arguments.dry_run {
        return dry_run(&making);
    }
    for one in &making.plan.adapters {
        refuse_damaged(&one.adapter)?;
    }
    let progress = Arc::new(Progress::default());
    let total = making.plan.output.files.iter().map(|file| file.bytes).sum();
    let Making { plan, assets, output, run, .. } = &making;
    let report = progress::watch(total, arguments.engine.quiet, &progress, || {
        output::write(plan, assets, output, run, &progress)
    })?;
    let seconds = started.elapsed().as_secs_f64();
    text::summarise(&making, &report, seconds);
    if arguments.json {
        let mut json = json::Report::new(&making, deed.done());
        json.fill(&report, seconds);
        json.warn(text::warnings(&making, &report));
        printer::json(&json)?;
    }
    Ok(Outcome::Done)
}

fn dry_run(making: &Making<'_>) -> Result<Outcome, Failure> {
    if making.arguments.json {
        printer::json(&json::Report::new(making, "planned"))?;
    } else {
        printer::data(&text::planned(making))?;
    }
    Ok(Outcome::Done)
}

/// The model's name with what was done to it, in the current directory: bases often lie where one
/// cannot or should not write.
fn default_output(base: &Checkpoint, deed: Deed) -> PathBuf {
    let (path, done) = (base.path(), deed.done());
    if base.layout() == Layout::File {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        return PathBuf::from(format!("{stem}-{done}.safetensors"));
    }
    let absolute = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    PathBuf::from(format!("{}-{done}", model_name(&absolute)))
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

/// Tensors copied and converted.
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
    let components = plan.adapters.iter().flat_map(|one| {
        let copies = if one.undo { 2 } else { 1 };
        one.adapter.components.iter().map(move |component| (component, copies))
    });
    let adapters: u64 = components
        .map(|(component, copies)| {
            let elements: u64 =
                component.form.tensors().iter().map(|tensor| tensor.elements() as u64).sum();
            // Factors are packed as f32; what is more than factors is kept as f64, and some of it
            // (the rotations of OFT) has two values for every one that is stored.
            let plain = matches!(component.form, Form::LowRank(_) | Form::Experts(_));
            elements * copies * if plain { 4 } else { 16 }
        })
        .sum();
    let headers: u64 = plan.base.shards().iter().map(|shard| shard.file.header().data_start).sum();
    64 * MIB + 4 * MIB * run.workers() as u64 + adapters + 4 * headers
}
