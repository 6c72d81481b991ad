//! `lora-cli spectrum`: the intrinsic rank of a change, tensor by tensor.

use std::path::PathBuf;

use clap::Args;
use lora_merge::analysis::{
    Group, Spectra, SpectrumOptions, TensorSpectrum, of_adapter, of_pair, open_base, work,
};
use lora_merge::identity;
use lora_merge::noise::{Basis, NoiseEstimate};
use lora_merge::pair::Pairing;
use serde::Serialize;

use super::analysing::{
    Grid, OutputArguments, Outputs, adapter, csv, dash, finite, model, percent, plain, rank, watch,
};
use super::{AdapterArguments, figures};
use crate::failure::{Failure, Outcome};
use crate::picture::number;
use crate::printer;

/// Show the singular values of a change: how much rank it needs, and where its energy lies
///
/// The change is what a fine-tuned model has over its base, or what an adapter adds.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  lora-cli spectrum Llama-3-8B Llama-3-8B-Instruct
  lora-cli spectrum ./my-lora --base Llama-3-8B --report spectrum.html
  lora-cli spectrum base tuned --plot q.svg --tensor layers.0.self_attn.q_proj")]
pub(crate) struct Arguments {
    /// The base and the model that was fine-tuned from it, or one adapter
    #[arg(required = true, num_args = 1..=2, value_names = ["BASE FINETUNED | ADAPTER"])]
    paths: Vec<PathBuf>,
    /// The model that an adapter was trained on: its changes relative to that, by its names
    #[arg(long, value_name = "MODEL")]
    base: Option<PathBuf>,
    /// Compare with the base given though it is not the one the adapter was trained on
    #[arg(long, requires = "base")]
    allow_different_base: bool,
    /// All singular values of all matrices; otherwise of those whose short side is 2048 at most
    #[arg(long)]
    exact: bool,
    /// How many singular values of larger matrices
    #[arg(long, value_name = "K", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65536))]
    top: u32,
    #[command(flatten)]
    pub(crate) output: OutputArguments,
    #[command(flatten)]
    adapter_options: AdapterArguments,
}

/// The report, `lora-cli/spectrum/1`; docs/cli-json.md describes it.
#[derive(Debug, Serialize)]
struct JsonReport<'a> {
    schema: &'static str,
    base: Option<String>,
    tuned: Option<String>,
    adapter: Option<String>,
    total: JsonGroup<'a>,
    by_projection: Vec<JsonGroup<'a>>,
    by_depth: Vec<JsonGroup<'a>>,
    tensors: Vec<JsonTensor<'a>>,
    others: Vec<JsonOther<'a>>,
    unchanged: &'a [String],
    passed_over: Vec<JsonPassed<'a>>,
    only_base: &'a [String],
    only_tuned: &'a [String],
    notes: &'a [String],
}

#[derive(Debug, Serialize)]
struct JsonGroup<'a> {
    name: &'a str,
    matrices: usize,
    others: usize,
    energy: f64,
    share: f64,
    relative: Option<f64>,
    r50: Option<usize>,
    r90: Option<usize>,
    r95: Option<usize>,
    r99: Option<usize>,
}

#[derive(Debug, Serialize)]
struct JsonTensor<'a> {
    parameter: &'a str,
    kind: Option<&'static str>,
    projection: &'a str,
    depth: Option<usize>,
    shape: &'a [usize],
    rows: usize,
    columns: usize,
    energy: f64,
    share: f64,
    relative: Option<f64>,
    rank: Option<usize>,
    complete: bool,
    known: usize,
    r50: Option<usize>,
    r90: Option<usize>,
    r95: Option<usize>,
    r99: Option<usize>,
    stable_rank: Option<f64>,
    entropy_rank: Option<f64>,
    noise: Option<JsonNoise>,
    singular_values: &'a [f64],
}

#[derive(Debug, Serialize)]
struct JsonNoise {
    basis: &'static str,
    level: f64,
    storage: f64,
    bulk: Option<f64>,
    edge: f64,
    threshold: f64,
    rank: Option<usize>,
    strict: usize,
    lenient: usize,
    clear: bool,
}

#[derive(Debug, Serialize)]
struct JsonOther<'a> {
    parameter: &'a str,
    kind: Option<&'static str>,
    projection: &'a str,
    depth: Option<usize>,
    shape: &'a [usize],
    energy: f64,
    share: f64,
    relative: Option<f64>,
}

/// What was not analysed, and why.
#[derive(Debug, Serialize)]
pub(super) struct JsonPassed<'a> {
    pub(super) parameter: &'a str,
    pub(super) reason: &'a str,
}

/// What was analysed, and what is to be said of it.
struct Found {
    spectra: Spectra,
    subject: String,
    base: Option<PathBuf>,
    tuned: Option<PathBuf>,
    adapter: Option<PathBuf>,
    only_base: Vec<String>,
    only_tuned: Vec<String>,
    notes: Vec<String>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    let mut inputs: Vec<&std::path::Path> = arguments.paths.iter().map(PathBuf::as_path).collect();
    inputs.extend(arguments.base.as_deref());
    arguments.output.check(&inputs)?;
    let found = match arguments.paths.as_slice() {
        [base, tuned] => pair(arguments, base, tuned)?,
        [path, ..] => one(arguments, path)?,
        [] => return Err(Failure::new("nothing to analyse", None)),
    };
    let spectra = &found.spectra;
    if !arguments.output.quiet {
        printer::notes(&found.notes);
    }
    let names = spectra.tensors.iter().map(|one| one.name.as_str()).collect();
    arguments.output.write(&Outputs {
        csv: &|| table(spectra),
        plot: &|tensor| figures::spectrum(spectra, tensor),
        page: &|| figures::spectrum_page(spectra, &found.subject),
        names,
    })?;
    if arguments.output.json {
        printer::json(&describe(&found))?;
    } else {
        printer::data(&text(&found))?;
    }
    Ok(Outcome::Done)
}

/// A base and its fine-tune.
fn pair(
    arguments: &Arguments,
    base: &std::path::Path,
    tuned: &std::path::Path,
) -> Result<Found, Failure> {
    if let Some(other) = &arguments.base {
        let message = format!("--base {}: the base is the first of two models", other.display());
        return Err(Failure::new(message, Some("--base is for an adapter")));
    }
    let hint = "for an adapter: lora-cli spectrum ADAPTER --base MODEL";
    let pairing = Pairing::new(model(base, hint)?, model(tuned, hint)?)?;
    let names: Vec<&str> = pairing.pairs.iter().map(|pair| pair.name.as_str()).collect();
    arguments.output.check_tensor(&names)?;
    let mapped = pairing.open()?;
    let mut options = SpectrumOptions { top: arguments.top as usize, ..SpectrumOptions::default() };
    if arguments.exact {
        options.complete = usize::MAX;
        options.svd.exact = true;
    }
    let mut spectra = watch(&arguments.output, Some(work(&pairing)), |progress| {
        of_pair(&mapped, &options, progress)
    })?;
    let passed = &mut spectra.passed;
    let pass = |name: &str, reason: String| lora_merge::analysis::PassedOver {
        name: name.to_owned(),
        reason,
    };
    passed.extend(
        pairing
            .reshaped
            .iter()
            .map(|one| pass(&one.name, format!("{} became {}", one.shape, one.tuned_shape))),
    );
    passed.extend(pairing.incomparable.iter().map(|one| {
        pass(&one.name, format!("stored as {}, which is not compared", one.tuned_dtype))
    }));
    passed.sort();
    spectra.unchanged.extend(pairing.identical.iter().cloned());
    spectra.unchanged.sort();
    let mut notes: Vec<String> = pairing.notes.iter().map(ToString::to_string).collect();
    notes.extend(pairing.pairs.iter().filter(|one| one.rows_added() > 0).map(|one| {
        format!("`{}`: {} rows are new and are not compared", one.name, one.rows_added())
    }));
    Ok(Found {
        spectra,
        subject: format!("{} → {}", base.display(), tuned.display()),
        base: Some(base.to_owned()),
        tuned: Some(tuned.to_owned()),
        adapter: None,
        only_base: pairing.only_base.clone(),
        only_tuned: pairing.only_tuned.clone(),
        notes,
    })
}

/// An adapter.
fn one(arguments: &Arguments, path: &std::path::Path) -> Result<Found, Failure> {
    let Some(adapter) = adapter(path, &arguments.adapter_options)? else {
        let message = format!("{}: a model, and a change needs two", path.display());
        let hint = "give the base and the fine-tuned model: lora-cli spectrum BASE FINETUNED";
        return Err(Failure::new(message, Some(hint)));
    };
    let mut notes: Vec<String> = adapter.notes.iter().map(ToString::to_string).collect();
    let pairing = match &arguments.base {
        Some(base) => Some(open_base(base)?),
        None => None,
    };
    if let (Some(pairing), false) = (&pairing, arguments.allow_different_base) {
        identity::refuse_other(&adapter, &pairing.base)?;
    }
    let mapped = pairing.as_ref().map(Pairing::open).transpose()?;
    let spectra =
        watch(&arguments.output, None, |progress| of_adapter(&adapter, mapped.as_ref(), progress))?;
    notes.extend(spectra.notes.iter().cloned());
    if pairing.is_none() {
        notes.push("without --base, nothing is relative to ‖W0‖".to_owned());
    }
    Ok(Found {
        spectra,
        subject: path.display().to_string(),
        base: arguments.base.clone(),
        tuned: None,
        adapter: Some(path.to_owned()),
        only_base: Vec::new(),
        only_tuned: Vec::new(),
        notes,
    })
}

fn describe_group(group: &Group) -> JsonGroup<'_> {
    let rank = |which: usize| group.ranks.and_then(|ranks| ranks[which].at());
    JsonGroup {
        name: &group.name,
        matrices: group.matrices,
        others: group.others,
        energy: group.energy,
        share: group.share,
        relative: group.relative().and_then(finite),
        r50: rank(0),
        r90: rank(1),
        r95: rank(2),
        r99: rank(3),
    }
}

fn describe_tensor(one: &TensorSpectrum, whole: f64) -> JsonTensor<'_> {
    let spectrum = &one.spectrum;
    let [r50, r90, r95, r99] = one.ranks().map(|rank| rank.at());
    JsonTensor {
        parameter: &one.name,
        kind: one.kind.map(|kind| kind.name()),
        projection: &one.place.projection,
        depth: one.place.depth,
        shape: &one.shape,
        rows: spectrum.rows,
        columns: spectrum.cols,
        energy: spectrum.energy,
        share: spectrum.energy / whole,
        relative: one.relative().and_then(finite),
        rank: one.rank,
        complete: spectrum.is_complete(),
        known: spectrum.values.len(),
        r50,
        r90,
        r95,
        r99,
        stable_rank: spectrum.stable_rank(),
        entropy_rank: spectrum.entropy_rank(),
        noise: one.noise.as_ref().map(describe_noise),
        singular_values: &spectrum.values,
    }
}

fn describe_noise(noise: &NoiseEstimate) -> JsonNoise {
    JsonNoise {
        basis: match noise.basis {
            Basis::Nothing => "nothing",
            Basis::Storage => "storage",
            Basis::Bulk => "bulk",
            Basis::Precision => "precision",
        },
        level: noise.level,
        storage: noise.storage,
        bulk: noise.bulk.ok(),
        edge: noise.edge,
        threshold: noise.threshold,
        rank: noise.reached().at(),
        strict: noise.strict,
        lenient: noise.lenient,
        clear: noise.is_clear(),
    }
}

fn describe(found: &Found) -> impl Serialize + '_ {
    // Owned here, so that the groups can be borrowed while they are printed.
    struct Owned<'a>(&'a Found, Group, Vec<Group>, Vec<Group>);
    impl Serialize for Owned<'_> {
        fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            report(self.0, &self.1, &self.2, &self.3).serialize(serializer)
        }
    }
    let spectra = &found.spectra;
    let total = Group { name: "all".to_owned(), ..spectra.total() };
    Owned(found, total, spectra.by_projection(), spectra.by_depth())
}

fn report<'a>(
    found: &'a Found,
    total: &'a Group,
    by_projection: &'a [Group],
    by_depth: &'a [Group],
) -> JsonReport<'a> {
    let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
    let spectra = &found.spectra;
    let whole = spectra.energy();
    JsonReport {
        schema: "lora-cli/spectrum/1",
        base: path(&found.base),
        tuned: path(&found.tuned),
        adapter: path(&found.adapter),
        total: describe_group(total),
        by_projection: by_projection.iter().map(describe_group).collect(),
        by_depth: by_depth.iter().map(describe_group).collect(),
        tensors: spectra.tensors.iter().map(|one| describe_tensor(one, whole)).collect(),
        others: spectra
            .others
            .iter()
            .map(|one| JsonOther {
                parameter: &one.name,
                kind: one.kind.map(|kind| kind.name()),
                projection: &one.place.projection,
                depth: one.place.depth,
                shape: &one.shape,
                energy: one.energy,
                share: one.energy / whole,
                relative: one.relative().and_then(finite),
            })
            .collect(),
        unchanged: &spectra.unchanged,
        passed_over: spectra
            .passed
            .iter()
            .map(|one| JsonPassed { parameter: &one.name, reason: &one.reason })
            .collect(),
        only_base: &found.only_base,
        only_tuned: &found.only_tuned,
        notes: &found.notes,
    }
}

/// A row per changed tensor.
fn table(spectra: &Spectra) -> String {
    let header = [
        "parameter",
        "kind",
        "projection",
        "depth",
        "shape",
        "energy",
        "share",
        "relative",
        "rank",
        "known",
        "complete",
        "r50",
        "r90",
        "r95",
        "r99",
        "stable_rank",
        "entropy_rank",
        "noise_threshold",
        "noise_rank",
        "singular_values",
    ];
    let whole = spectra.energy();
    let shape =
        |shape: &[usize]| shape.iter().map(ToString::to_string).collect::<Vec<_>>().join("x");
    let count = |value: Option<usize>| value.map_or_else(String::new, |value| value.to_string());
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    for one in &spectra.tensors {
        let spectrum = &one.spectrum;
        let ranks = one.ranks().map(|rank| count(rank.at()));
        let noise = one.noise.as_ref();
        let mut row = vec![
            one.name.clone(),
            one.kind.map_or("", |kind| kind.name()).to_owned(),
            one.place.projection.clone(),
            count(one.place.depth),
            shape(&one.shape),
            plain(Some(spectrum.energy)),
            plain(Some(spectrum.energy / whole)),
            plain(one.relative()),
            count(one.rank),
            spectrum.values.len().to_string(),
            spectrum.is_complete().to_string(),
        ];
        row.extend(ranks);
        let values: Vec<String> = spectrum.values.iter().map(ToString::to_string).collect();
        row.extend([
            plain(spectrum.stable_rank()),
            plain(spectrum.entropy_rank()),
            plain(noise.map(|noise| noise.threshold)),
            count(noise.and_then(|noise| noise.reached().at())),
            values.join(" "),
        ]);
        rows.push(row);
    }
    for one in &spectra.others {
        let mut row = vec![
            one.name.clone(),
            one.kind.map_or("", |kind| kind.name()).to_owned(),
            one.place.projection.clone(),
            count(one.place.depth),
            shape(&one.shape),
            plain(Some(one.energy)),
            plain(Some(one.energy / whole)),
            plain(one.relative()),
        ];
        row.resize(header.len(), String::new());
        rows.push(row);
    }
    csv(rows)
}

/// How many rows of a table are shown.
const SHOWN: usize = 12;

fn text(found: &Found) -> String {
    let spectra = &found.spectra;
    let total = spectra.total();
    let mut out = format!("{}: ", found.subject);
    if total.matrices + total.others == 0 {
        out.push_str("nothing changed\n");
    } else {
        let relative = dash(total.relative(), |share| format!(", {} of ‖W0‖", percent(share)));
        let relative = if relative == "–" { "" } else { &relative };
        let others = match total.others {
            0 => String::new(),
            others => format!(" and {others} other tensors"),
        };
        out.push_str(&format!(
            "{} matrices{others} changed, {} did not\n‖ΔW‖ = {}{relative}\n",
            total.matrices,
            spectra.unchanged.len(),
            number(total.energy.sqrt()),
        ));
        out.push_str(
            "\nwhere the energy lies, with the medians of the ranks that hold 50 to 99 %\n",
        );
        out.push_str(&groups("projection", &spectra.by_projection()));
        let by_depth = spectra.by_depth();
        if by_depth.len() > 1 {
            out.push('\n');
            out.push_str(&groups("layer", &by_depth));
        }
        if !spectra.tensors.is_empty() {
            out.push('\n');
            out.push_str(&tensors(spectra));
        }
    }
    let lists = [
        ("only the base has", &found.only_base),
        ("only the fine-tuned model has", &found.only_tuned),
    ];
    for (what, names) in lists {
        if let Some(first) = names.first() {
            out.push_str(&format!("{what} {} tensors, such as `{first}`\n", names.len()));
        }
    }
    for one in spectra.passed.iter().take(SHOWN) {
        out.push_str(&format!("passed over: `{}`: {}\n", one.name, one.reason));
    }
    if let Some(rest) = spectra.passed.len().checked_sub(SHOWN).filter(|&rest| rest > 0) {
        out.push_str(&format!("passed over: and {rest} more (--json lists them)\n"));
    }
    out
}

fn groups(name: &str, groups: &[Group]) -> String {
    let mut grid =
        Grid::new(&[name, "tensors", "of ‖ΔW‖²", "‖ΔW‖/‖W0‖", "r50", "r90", "r95", "r99"]);
    for group in groups.iter().take(if name == "layer" { usize::MAX } else { SHOWN }) {
        let mut row = vec![
            group.name.clone(),
            (group.matrices + group.others).to_string(),
            percent(group.share),
            dash(group.relative(), percent),
        ];
        row.extend(match group.ranks {
            Some(ranks) => ranks.map(rank),
            None => ["–"; 4].map(str::to_owned),
        });
        grid.row(row);
    }
    grid.text(if name == "layer" { 0 } else { groups.len().saturating_sub(SHOWN) })
}

/// The tensors that changed most, relative to W0 if that is known.
fn tensors(spectra: &Spectra) -> String {
    let mut order: Vec<&TensorSpectrum> = spectra.tensors.iter().collect();
    let size = |one: &TensorSpectrum| one.relative().unwrap_or(one.spectrum.norm());
    order.sort_by(|a, b| size(b).total_cmp(&size(a)).then_with(|| a.name.cmp(&b.name)));
    let noisy = spectra.tensors.iter().any(|one| one.noise.is_some());
    let mut header =
        vec!["largest changes", "shape", "‖ΔW‖", "‖ΔW‖/‖W0‖", "r90", "r99", "stable", "entropy"];
    if noisy {
        header.push("signal");
    }
    let mut grid = Grid::new(&header);
    for one in order.iter().take(SHOWN) {
        let spectrum = &one.spectrum;
        let shape: Vec<String> = one.shape.iter().map(ToString::to_string).collect();
        let mut row = vec![
            one.name.clone(),
            shape.join(" × "),
            number(spectrum.norm()),
            dash(one.relative(), percent),
            rank(spectrum.r90()),
            rank(spectrum.r99()),
            dash(spectrum.stable_rank(), number),
            dash(spectrum.entropy_rank(), number),
        ];
        if noisy {
            row.push(dash(one.noise.as_ref(), |noise| {
                let doubt = if noise.is_clear() { "" } else { " ?" };
                format!("{}{doubt}", rank(noise.reached()))
            }));
        }
        grid.row(row);
    }
    let mut out = grid.text(order.len().saturating_sub(SHOWN));
    if noisy {
        out.push_str("signal: values above what storing and the bulk make of noise, a heuristic");
        let doubtful = |one: &TensorSpectrum| one.noise.as_ref().is_some_and(|n| !n.is_clear());
        out.push_str(match spectra.tensors.iter().any(doubtful) {
            true => "; ?: no gap says where it ends\n",
            false => "\n",
        });
    }
    if spectra.tensors.iter().any(|one| !one.spectrum.is_complete()) {
        out.push_str(
            "> and –: not told by the leading singular values alone; --exact computes all\n",
        );
    }
    out
}
