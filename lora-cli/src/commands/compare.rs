//! `lora-cli compare`: how alike the directions of two changes are.

use std::path::{Path, PathBuf};

use clap::Args;
use lora_format::Adapter;
use lora_merge::analysis::{
    Comparison, ComparisonOptions, Mean, Side, Subject, TargetComparison, compare, open_base,
};
use lora_merge::identity;
use lora_merge::pair::Pairing;
use lora_merge::similarity::Amplification;
use ndarray::Array2;
use serde::Serialize;

use super::analysing::{
    Grid, OutputArguments, Outputs, adapter, csv, dash, finite, model, plain, watch,
};
use super::spectrum::JsonPassed;
use super::{AdapterArguments, figures};
use crate::failure::{Failure, Outcome};
use crate::picture::number;
use crate::printer;

/// Compare the directions of two adapters or fine-tunes: subspace similarity, Grassmann distances
///
/// φ(i, j), from 0 to 1, is how much of the first i directions of A lies in the first j of B, for
/// directions of the input (right singular vectors, which the LoRA paper compares) and of the output.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  lora-cli compare ./style ./facts
  lora-cli compare ./seed-1 ./seed-2 --base Llama-3-8B --report similarity.html
  lora-cli compare ./my-lora Llama-3-8B-Instruct --base Llama-3-8B --top 16")]
pub(crate) struct Arguments {
    /// An adapter, or with --base a fine-tuned model
    a: PathBuf,
    /// Another
    b: PathBuf,
    /// The model that both were trained on; says also how much each amplifies what it has
    #[arg(long, value_name = "MODEL")]
    base: Option<PathBuf>,
    /// Compare with the base given though it is not the one that an adapter was trained on
    #[arg(long, requires = "base")]
    allow_different_base: bool,
    /// The most directions of each tensor
    #[arg(long, value_name = "K", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=4096))]
    top: u32,
    /// The numbers of directions that amplification is measured for
    #[arg(long, value_name = "R", value_delimiter = ',', default_value = "4,64", requires = "base", value_parser = clap::value_parser!(u32).range(1..=4096))]
    ranks: Vec<u32>,
    #[command(flatten)]
    pub(crate) output: OutputArguments,
    #[command(flatten)]
    adapter_options: AdapterArguments,
}

/// The report, `lora-cli/compare/1`; docs/cli-json.md describes it.
#[derive(Debug, Serialize)]
struct JsonReport<'a> {
    schema: &'static str,
    a: String,
    b: String,
    base: Option<String>,
    top: u32,
    mean: Option<JsonMean>,
    by_projection: Vec<JsonMean>,
    tensors: Vec<JsonTensor<'a>>,
    only_a: &'a [String],
    only_b: &'a [String],
    renamed: Option<JsonRename<'a>>,
    passed_over: Vec<JsonPassed<'a>>,
    notes: &'a [String],
}

#[derive(Debug, Serialize)]
struct JsonRename<'a> {
    a_prefix: &'a str,
    b_prefix: &'a str,
}

#[derive(Debug, Serialize)]
struct JsonMean {
    name: String,
    tensors: usize,
    cosine: f64,
    phi: Vec<Vec<f64>>,
    phi_left: Vec<Vec<f64>>,
    random: f64,
    random_left: f64,
    projection_distance: f64,
    projection_distance_left: f64,
    geodesic_distance: f64,
    geodesic_distance_left: f64,
}

#[derive(Debug, Serialize)]
struct JsonTensor<'a> {
    parameter: &'a str,
    projection: &'a str,
    depth: Option<usize>,
    outputs: usize,
    inputs: usize,
    ranks: [usize; 2],
    norms: [f64; 2],
    cosine: f64,
    phi: Vec<Vec<f64>>,
    phi_left: Vec<Vec<f64>>,
    random: f64,
    random_left: f64,
    angles: &'a [f64],
    angles_left: &'a [f64],
    projection_distance: f64,
    projection_distance_left: f64,
    geodesic_distance: f64,
    geodesic_distance_left: f64,
    base_norm: Option<f64>,
    amplification_a: Option<Vec<JsonAmplification>>,
    amplification_b: Option<Vec<JsonAmplification>>,
    not_amplified: Option<&'a str>,
}

#[derive(Debug, Serialize)]
struct JsonAmplification {
    rank: usize,
    through_change: f64,
    through_itself: Option<f64>,
    through_random: f64,
    factor: Option<f64>,
}

/// A path and what it turned out to be.
enum Input {
    Adapter(Box<Adapter>),
    Tuned(Box<Pairing>),
}

impl Input {
    fn open(arguments: &Arguments, path: &Path) -> Result<Input, Failure> {
        if let Some(adapter) = adapter(path, &arguments.adapter_options)? {
            return Ok(Input::Adapter(Box::new(adapter)));
        }
        let hint = "--base takes a model";
        match &arguments.base {
            Some(base) => {
                Ok(Input::Tuned(Box::new(Pairing::new(model(base, hint)?, model(path, hint)?)?)))
            }
            None => {
                // A path that is nothing at all is told as that.
                model(path, hint)?;
                let message = format!("{}: a model, and its change needs a base", path.display());
                Err(Failure::new(message, Some("name the model it was trained from: --base MODEL")))
            }
        }
    }

    fn notes(&self) -> Vec<String> {
        match self {
            Input::Adapter(adapter) => adapter.notes.iter().map(ToString::to_string).collect(),
            Input::Tuned(pairing) => {
                let mut notes: Vec<String> =
                    pairing.notes.iter().map(ToString::to_string).collect();
                let (tuned, base) = (pairing.tuned.path(), pairing.base.path());
                for (model, names) in [(tuned, &pairing.only_tuned), (base, &pairing.only_base)] {
                    if let Some(first) = names.first() {
                        let (path, more) = (model.display(), names.len());
                        notes.push(format!(
                            "{path}: {more} parameters that the other does not have: `{first}`{}",
                            if more > 1 { ", …" } else { "" }
                        ));
                    }
                }
                let grown = pairing.pairs.iter().filter(|one| one.rows_added() > 0);
                notes.extend(grown.map(|one| {
                    let rows = one.rows_added();
                    format!("`{}`: {rows} rows are new and are not compared", one.name)
                }));
                notes
            }
        }
    }
}

pub(crate) fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    let mut inputs = vec![arguments.a.as_path(), arguments.b.as_path()];
    inputs.extend(arguments.base.as_deref());
    arguments.output.check(&inputs)?;
    let (a, b) = (Input::open(arguments, &arguments.a)?, Input::open(arguments, &arguments.b)?);
    let mut notes = a.notes();
    notes.extend(b.notes());
    notes.dedup();
    let base = arguments.base.as_deref().map(open_base).transpose()?;
    if let (Some(base), false) = (&base, arguments.allow_different_base) {
        for input in [&a, &b] {
            if let Input::Adapter(adapter) = input {
                identity::refuse_other(adapter, &base.base)?;
            }
        }
    }
    let base = base.as_ref().map(Pairing::open).transpose()?;
    let (mapped_a, mapped_b) = (open_tuned(&a)?, open_tuned(&b)?);
    let options = ComparisonOptions {
        top: arguments.top as usize,
        ranks: arguments.ranks.iter().map(|&rank| rank as usize).collect(),
        ..ComparisonOptions::default()
    };
    let (subject_a, subject_b) = (subject(&a, mapped_a.as_ref()), subject(&b, mapped_b.as_ref()));
    let (Some(subject_a), Some(subject_b)) = (subject_a, subject_b) else {
        return Err(Failure::new("nothing to compare", None));
    };
    let comparison = watch(&arguments.output, None, |progress| {
        compare(subject_a, subject_b, base.as_ref(), &options, progress)
    })?;
    refuse_nothing(arguments, &comparison)?;
    notes.extend(comparison.notes.iter().cloned());
    notes.extend(unmet(&comparison));
    if let Some(rename) = &comparison.rename {
        notes.push(format!("names differ in B: {rename}"));
    }
    if !arguments.output.quiet {
        printer::notes(&notes);
    }
    let subject = format!("{} and {}", arguments.a.display(), arguments.b.display());
    arguments.output.write(&Outputs {
        csv: &|| table(&comparison),
        plot: &|tensor| figures::similarity(&comparison, tensor),
        page: &|| figures::comparison_page(&comparison, &subject),
        names: comparison.targets.iter().map(|one| one.name.as_str()).collect(),
    })?;
    if arguments.output.json {
        printer::json(&describe(arguments, &comparison, &notes))?;
    } else {
        printer::data(&text(&subject, &comparison))?;
    }
    Ok(Outcome::Done)
}

fn open_tuned(input: &Input) -> Result<Option<lora_merge::pair::Mapped<'_>>, Failure> {
    match input {
        Input::Tuned(pairing) => Ok(Some(pairing.open()?)),
        Input::Adapter(_) => Ok(None),
    }
}

fn subject<'a>(
    input: &'a Input,
    mapped: Option<&'a lora_merge::pair::Mapped<'a>>,
) -> Option<Subject<'a>> {
    match input {
        Input::Adapter(adapter) => Some(Subject::Adapter(adapter)),
        Input::Tuned(_) => mapped.map(Subject::Tuned),
    }
}

/// Two changes that have no target in common, or none that can be compared.
fn refuse_nothing(arguments: &Arguments, comparison: &Comparison) -> Result<(), Failure> {
    if !comparison.targets.is_empty() {
        return Ok(());
    }
    let (a, b) = (arguments.a.display(), arguments.b.display());
    if let (1.., Some(first)) = (comparison.common, comparison.passed.first()) {
        let message = format!(
            "{a} and {b}: none of {} common targets can be compared: `{}`: {}",
            comparison.common, first.name, first.reason
        );
        return Err(Failure::new(message, None));
    }
    let few = |names: &[String]| {
        let quoted: Vec<String> = names.iter().take(3).map(|name| format!("`{name}`")).collect();
        match (quoted.is_empty(), names.len() > quoted.len()) {
            (true, _) => "nothing".to_owned(),
            (_, true) => format!("{}, … ({})", quoted.join(", "), names.len()),
            (_, false) => quoted.join(", "),
        }
    };
    let message = format!(
        "{a} and {b} have no target in common: the first changes {}, the second {}",
        few(&comparison.only_a),
        few(&comparison.only_b)
    );
    let hint = match arguments.base {
        None => {
            "if they name one model's modules in different ways, --base MODEL tells which are the same"
        }
        Some(_) => "were both trained on this base?",
    };
    Err(Failure::new(message, Some(hint)))
}

/// Of how many targets it is not known how they meet the base's weight, and why of the first.
fn unmet(comparison: &Comparison) -> Option<String> {
    let mut unmet = comparison.targets.iter().filter_map(|one| Some((one, one.unmet.as_ref()?)));
    let (first, reason) = unmet.next()?;
    Some(match unmet.count() {
        0 => format!("`{}` has no amplification: {reason}", first.name),
        more => {
            format!(
                "{} targets have no amplification, such as `{}`: {reason}",
                more + 1,
                first.name
            )
        }
    })
}

fn rows(matrix: &Array2<f64>) -> Vec<Vec<f64>> {
    matrix.rows().into_iter().map(|row| row.to_vec()).collect()
}

fn describe_mean(mean: &Mean) -> JsonMean {
    JsonMean {
        name: mean.name.clone(),
        tensors: mean.targets,
        cosine: mean.cosine,
        phi: rows(&mean.input),
        phi_left: rows(&mean.output),
        random: mean.random[0],
        random_left: mean.random[1],
        projection_distance: mean.projection[0],
        projection_distance_left: mean.projection[1],
        geodesic_distance: mean.geodesic[0],
        geodesic_distance_left: mean.geodesic[1],
    }
}

fn describe_target(one: &TargetComparison) -> JsonTensor<'_> {
    let amplification = |all: &[Amplification]| {
        all.iter()
            .map(|one| JsonAmplification {
                rank: one.rank,
                through_change: one.through_change,
                through_itself: one.through_itself,
                through_random: one.through_random,
                factor: one.factor.and_then(finite),
            })
            .collect()
    };
    let amplified = one.amplified.as_ref();
    JsonTensor {
        parameter: &one.name,
        projection: &one.place.projection,
        depth: one.place.depth,
        outputs: one.shape.0,
        inputs: one.shape.1,
        ranks: one.ranks,
        norms: one.norms,
        cosine: one.cosine,
        phi: rows(&one.input.phi),
        phi_left: rows(&one.output.phi),
        random: one.input.random(),
        random_left: one.output.random(),
        angles: &one.input.angles,
        angles_left: &one.output.angles,
        projection_distance: one.input.projection_distance(),
        projection_distance_left: one.output.projection_distance(),
        geodesic_distance: one.input.geodesic_distance(),
        geodesic_distance_left: one.output.geodesic_distance(),
        base_norm: amplified.map(|one| one.base_norm),
        amplification_a: amplified.map(|one| amplification(&one.a)),
        amplification_b: amplified.map(|one| amplification(&one.b)),
        not_amplified: one.unmet.as_deref(),
    }
}

fn describe<'a>(
    arguments: &Arguments,
    comparison: &'a Comparison,
    notes: &'a [String],
) -> JsonReport<'a> {
    JsonReport {
        schema: "lora-cli/compare/1",
        a: arguments.a.display().to_string(),
        b: arguments.b.display().to_string(),
        base: arguments.base.as_ref().map(|base| base.display().to_string()),
        top: arguments.top,
        mean: comparison.mean().as_ref().map(describe_mean),
        by_projection: comparison.by_projection().iter().map(describe_mean).collect(),
        tensors: comparison.targets.iter().map(describe_target).collect(),
        only_a: &comparison.only_a,
        only_b: &comparison.only_b,
        renamed: comparison
            .rename
            .as_ref()
            .map(|rename| JsonRename { a_prefix: &rename.base, b_prefix: &rename.tuned }),
        passed_over: comparison
            .passed
            .iter()
            .map(|one| JsonPassed { parameter: &one.name, reason: &one.reason })
            .collect(),
        notes,
    }
}

/// A row per target; φ(k, k) for k from 1 on are in one cell each.
fn table(comparison: &Comparison) -> String {
    let header = [
        "parameter",
        "projection",
        "depth",
        "outputs",
        "inputs",
        "rank_a",
        "rank_b",
        "norm_a",
        "norm_b",
        "cosine",
        "phi",
        "phi_left",
        "random",
        "random_left",
        "projection_distance",
        "projection_distance_left",
        "geodesic_distance",
        "geodesic_distance_left",
        "factor_a",
        "factor_b",
        "phi_diagonal",
        "phi_left_diagonal",
    ];
    let diagonal =
        |side: &Side| side.phi.diag().iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    let factors = |all: Option<&[Amplification]>| {
        let all = all.unwrap_or_default().iter();
        all.map(|one| format!("{}:{}", one.rank, plain(one.factor))).collect::<Vec<_>>().join(" ")
    };
    let mut lines = vec![header.map(str::to_owned).to_vec()];
    for one in &comparison.targets {
        let (input, output, amplified) = (&one.input, &one.output, one.amplified.as_ref());
        let mut line = vec![
            one.name.clone(),
            one.place.projection.clone(),
            one.place.depth.map_or_else(String::new, |depth| depth.to_string()),
            one.shape.0.to_string(),
            one.shape.1.to_string(),
            one.ranks[0].to_string(),
            one.ranks[1].to_string(),
        ];
        let numbers = [
            one.norms[0],
            one.norms[1],
            one.cosine,
            input.whole(),
            output.whole(),
            input.random(),
            output.random(),
            input.projection_distance(),
            output.projection_distance(),
            input.geodesic_distance(),
            output.geodesic_distance(),
        ];
        line.extend(numbers.map(|number| plain(Some(number))));
        line.extend([
            factors(amplified.map(|one| one.a.as_slice())),
            factors(amplified.map(|one| one.b.as_slice())),
            diagonal(input),
            diagonal(output),
        ]);
        lines.push(line);
    }
    csv(lines)
}

/// How many rows of a table are shown.
const SHOWN: usize = 12;

fn fixed(value: f64) -> String {
    format!("{value:.3}")
}

fn text(subject: &str, comparison: &Comparison) -> String {
    let mut out = format!("{subject}: {} common targets", comparison.targets.len());
    for (which, names) in [("A", &comparison.only_a), ("B", &comparison.only_b)] {
        if !names.is_empty() {
            out.push_str(&format!(", {} only in {which}", names.len()));
        }
    }
    out.push('\n');
    if let Some(mean) = comparison.mean() {
        let (i, j) = mean.input.dim();
        let (first, whole) = (mean.input[[0, 0]], mean.input[[i - 1, j - 1]]);
        out.push_str(&format!(
            "φ(1, 1) = {first:.3}, φ({i}, {j}) = {whole:.3} (unrelated: {:.3}) of input directions \
             on average; cosine {:.3}\n\n",
            mean.random[0], mean.cosine
        ));
    }
    let header = [
        "projection",
        "tensors",
        "φ(1, 1)",
        "φ in",
        "unrelated",
        "φ out",
        "unrelated",
        "Grassmann in",
        "out",
        "cosine",
    ];
    let mut grid = Grid::new(&header);
    let means = comparison.by_projection();
    for mean in means.iter().take(SHOWN) {
        let last = |matrix: &Array2<f64>| matrix.last().copied().unwrap_or(0.0);
        let first = mean.input.first().copied().unwrap_or(0.0);
        grid.row(vec![
            mean.name.clone(),
            mean.targets.to_string(),
            fixed(first),
            fixed(last(&mean.input)),
            fixed(mean.random[0]),
            fixed(last(&mean.output)),
            fixed(mean.random[1]),
            fixed(mean.geodesic[0]),
            fixed(mean.geodesic[1]),
            fixed(mean.cosine),
        ]);
    }
    out.push_str(&grid.text(means.len().saturating_sub(SHOWN)));
    out.push('\n');
    out.push_str(&most_alike(comparison));
    if comparison.targets.iter().any(|one| one.amplified.is_some()) {
        out.push('\n');
        out.push_str(&amplification(comparison));
    }
    for one in comparison.passed.iter().take(SHOWN) {
        out.push_str(&format!("passed over: `{}`: {}\n", one.name, one.reason));
    }
    if let Some(rest) = comparison.passed.len().checked_sub(SHOWN).filter(|&rest| rest > 0) {
        out.push_str(&format!("passed over: and {rest} more (--json lists them)\n"));
    }
    out
}

/// The targets whose input directions have the most in common beyond what unrelated ones have.
fn most_alike(comparison: &Comparison) -> String {
    let mut order: Vec<&TargetComparison> = comparison.targets.iter().collect();
    let excess = |one: &TargetComparison| one.input.whole() - one.input.random();
    order.sort_by(|a, b| excess(b).total_cmp(&excess(a)).then_with(|| a.name.cmp(&b.name)));
    let mut grid =
        Grid::new(&["most alike", "directions", "φ(1, 1)", "φ in", "unrelated", "φ out", "cosine"]);
    for one in order.iter().take(SHOWN) {
        grid.row(vec![
            one.name.clone(),
            format!("{}, {}", one.ranks[0], one.ranks[1]),
            fixed(one.input.first()),
            fixed(one.input.whole()),
            fixed(one.input.random()),
            fixed(one.output.whole()),
            fixed(one.cosine),
        ]);
    }
    grid.text(order.len().saturating_sub(SHOWN))
}

/// Table 7 of the paper, of the targets that are amplified most.
fn amplification(comparison: &Comparison) -> String {
    let mut lines = Vec::new();
    for target in &comparison.targets {
        let Some(amplified) = &target.amplified else { continue };
        for (which, all) in [("A", &amplified.a), ("B", &amplified.b)] {
            let norm = target.norms[usize::from(which == "B")];
            lines.extend(all.iter().map(|one| (target, which, norm, amplified.base_norm, one)));
        }
    }
    lines.sort_by(|a, b| {
        let factor = |one: &Amplification| one.factor.unwrap_or(f64::INFINITY);
        factor(b.4).total_cmp(&factor(a.4)).then_with(|| a.0.name.cmp(&b.0.name))
    });
    let header = ["amplification", "of", "r", "‖ΔW‖", "‖UᵀW0V‖", "of W0's own", "random", "factor"];
    let mut grid = Grid::new(&header);
    for (target, which, norm, _, one) in lines.iter().take(SHOWN) {
        grid.row(vec![
            target.name.clone(),
            (*which).to_owned(),
            one.rank.to_string(),
            number(*norm),
            number(one.through_change),
            dash(one.through_itself, number),
            number(one.through_random),
            dash(one.factor, number),
        ]);
    }
    grid.text(lines.len().saturating_sub(SHOWN))
}
