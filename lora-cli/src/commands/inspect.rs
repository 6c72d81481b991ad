//! `lora-cli inspect`: what an adapter or a model is, from its headers alone.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::Args;
use lora_format::checkpoint::{Checkpoint, Layout};
use lora_format::codec::peft;
use lora_format::container::safetensors::SafetensorsFile;
use lora_format::model::{Adapter, AdapterFormat, Form, LowRank};
use lora_format::native::{self, DigestVerdict};
use lora_format::{DetectProblem, Error, Tensor};
use lora_merge::Bytes;
use lora_merge::names::numberless;
use serde::Serialize;
use serde_json::{Map, Value};

use super::AdapterArguments;
use crate::failure::{Failure, Outcome};
use crate::printer;

/// Show what an adapter or a model holds, reading headers alone
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  lora-cli inspect ./my-lora
  lora-cli inspect my-lora.safetensors --verify
  lora-cli inspect Llama-3-8B --json")]
pub(crate) struct Arguments {
    /// An adapter or a model: a file or a directory
    path: PathBuf,
    /// Check the digest of an adapter of our own format; exit status 1 if it does not match
    #[arg(long)]
    verify: bool,
    /// The model that the adapter is for: GGUF and torchtune store rows in the order of its heads
    #[arg(long, value_name = "MODEL")]
    base: Option<PathBuf>,
    #[command(flatten)]
    adapter_options: AdapterArguments,
    /// Print everything as JSON on stdout
    #[arg(long)]
    pub(crate) json: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    let options = arguments.adapter_options.read_options(arguments.base.as_deref())?;
    match lora_format::read(&arguments.path, &options) {
        Ok(adapter) => inspect_adapter(arguments, &adapter),
        Err(Error::Unrecognised {
            problem: DetectProblem::NotAnAdapter { .. } | DetectProblem::NoAdapter,
            ..
        }) => match Checkpoint::open(&arguments.path) {
            Ok(model) => inspect_model(arguments, &model, None),
            Err(Error::Unrecognised { path, problem: DetectProblem::NoModel }) => {
                let message = format!(
                    "{}: neither an adapter (adapter_model.safetensors) nor a model \
                     (model.safetensors, model.safetensors.index.json or a single *.safetensors \
                     file)",
                    path.display()
                );
                let hint = "PEFT saves adapters with names of their own in subdirectories";
                Err(Failure::new(message, Some(hint)))
            }
            Err(error) => Err(error.into()),
        },
        // What cannot be merged yet can still be looked at.
        Err(error @ (Error::Unsupported { .. } | Error::AlphaUnknown { .. })) => {
            let inside = arguments.path.join(peft::MODEL_FILE);
            let path = if inside.exists() { &inside } else { &arguments.path };
            match Checkpoint::open(path) {
                Ok(tensors) => inspect_model(arguments, &tensors, Some(&error)),
                Err(_) => Err(error.into()),
            }
        }
        Err(error) => Err(error.into()),
    }
}

/// `lora-cli/inspect-adapter/2`
#[derive(Debug, Serialize)]
struct AdapterReport<'a> {
    schema: &'static str,
    path: String,
    format: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<&'static str>,
    base_name: Option<&'a str>,
    base_revision: Option<&'a str>,
    base_fingerprint: bool,
    fan_in_fan_out: Option<bool>,
    parameters: u64,
    bytes: u64,
    components: Vec<ComponentReport<'a>>,
    metadata: BTreeMap<&'a str, &'a str>,
    source: Option<&'a Map<String, Value>>,
    notes: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    digest: Option<DigestReport>,
}

#[derive(Debug, Serialize)]
struct ComponentReport<'a> {
    module: &'a str,
    parameter: &'a str,
    method: &'static str,
    rank: Option<usize>,
    alpha: Option<f64>,
    rule: Option<&'static str>,
    scale: Option<f64>,
    in_features: Option<usize>,
    out_features: Option<usize>,
    tensors: Vec<FactorReport<'a>>,
    parameters: u64,
}

/// A tensor of a component.
#[derive(Debug, Serialize)]
struct FactorReport<'a> {
    name: &'a str,
    dtype: &'static str,
    shape: &'a [usize],
}

#[derive(Debug, Serialize)]
struct DigestReport {
    intact: bool,
    recorded: String,
    actual: String,
}

fn inspect_adapter(arguments: &Arguments, adapter: &Adapter) -> Result<Outcome, Failure> {
    let mut components = Vec::with_capacity(adapter.components.len());
    for component in &adapter.components {
        let tensors = component.form.tensors();
        let low_rank = match &component.form {
            Form::LowRank(factors) => Some(factors),
            _ => None,
        };
        components.push(ComponentReport {
            module: &component.target.module,
            parameter: &component.target.parameter,
            method: component.form.method(),
            rank: low_rank.map(LowRank::rank),
            alpha: low_rank.map(|factors| factors.scaling.alpha),
            rule: low_rank.map(|factors| factors.scaling.rule.name()),
            scale: low_rank.map(LowRank::scale),
            in_features: low_rank.map(LowRank::in_features),
            out_features: low_rank.map(LowRank::out_features),
            parameters: tensors.iter().map(|tensor| tensor.elements() as u64).sum(),
            tensors: tensors
                .into_iter()
                .map(|tensor| FactorReport {
                    name: &tensor.name,
                    dtype: tensor.dtype.name(),
                    shape: &tensor.shape,
                })
                .collect(),
        });
    }
    let native = adapter.format == AdapterFormat::Native;
    let digest = match arguments.verify {
        true if native => Some(verify(&adapter.path)?),
        true => {
            let (path, format) = (adapter.path.display(), adapter.format);
            let message = format!("{path}: an adapter of format {format} records no digest");
            let hint = "a file of our own format does: lora-cli convert ADAPTER --to lora -o FILE";
            return Err(Failure::new(message, Some(hint)));
        }
        false => None,
    };
    // Some methods share tensors among all layers.
    let stored: BTreeMap<&str, &Tensor> =
        adapter.tensors().map(|tensor| (tensor.name.as_str(), tensor)).collect();
    let damaged = digest.as_ref().is_some_and(|digest| !digest.intact);
    let report = AdapterReport {
        schema: "lora-cli/inspect-adapter/2",
        path: adapter.path.display().to_string(),
        format: adapter.format.name(),
        version: native.then_some(native::VERSION),
        base_name: adapter.base.name.as_deref(),
        base_revision: adapter.base.revision.as_deref(),
        base_fingerprint: adapter.base.fingerprint.is_some(),
        fan_in_fan_out: adapter.fan_in_fan_out,
        parameters: stored.values().map(|tensor| tensor.elements() as u64).sum(),
        bytes: stored.values().map(|tensor| tensor.bytes().len() as u64).sum(),
        components,
        metadata: adapter.metadata.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect(),
        source: adapter.source.as_ref().map(|source| &source.config),
        notes: adapter.notes.iter().map(ToString::to_string).collect(),
        digest,
    };
    if arguments.json {
        printer::json(&report)?;
    } else {
        printer::data(&adapter_text(&report))?;
    }
    Ok(if damaged { Outcome::Finding } else { Outcome::Done })
}

fn verify(path: &Path) -> Result<DigestReport, Failure> {
    let file = SafetensorsFile::open(path)?;
    Ok(match native::verify_digest(&file)? {
        DigestVerdict::Intact { digest } => {
            DigestReport { intact: true, recorded: digest.clone(), actual: digest }
        }
        DigestVerdict::Damaged { recorded, actual } => {
            DigestReport { intact: false, recorded, actual }
        }
    })
}

fn adapter_text(report: &AdapterReport<'_>) -> String {
    let mut text = format!("{}: adapter, format {}", report.path, report.format);
    if let Some(version) = report.version {
        text.push_str(&format!(" {version}"));
    }
    text.push_str(&format!(
        "\n{} targets, {} parameters, {}\n",
        report.components.len(),
        report.parameters,
        Bytes(report.bytes)
    ));
    if let Some(name) = report.base_name {
        text.push_str(&format!("base: {name}"));
        if let Some(revision) = report.base_revision {
            text.push_str(&format!(" at {revision}"));
        }
        let stamped = if report.base_fingerprint { "with" } else { "without" };
        text.push_str(&format!(", {stamped} a fingerprint\n"));
    }
    text.push('\n');
    let mut groups: BTreeMap<(String, String), usize> = BTreeMap::new();
    for component in &report.components {
        let mut words = vec![component.method.to_owned()];
        let features = component.in_features.zip(component.out_features);
        words.extend(features.map(|(input, out)| format!("{input} → {out}")));
        words.extend(component.rank.map(|rank| format!("rank {rank}")));
        words.extend(component.alpha.map(|alpha| format!("alpha {alpha}")));
        words.extend(component.scale.map(|scale| format!("scale {scale}")));
        let tensors = component.tensors.iter();
        let mut stored: Vec<String> = match features {
            Some(_) => tensors.map(|tensor| tensor.dtype.to_owned()).collect(),
            None => tensors.map(|t| format!("{} {:?}", t.dtype, t.shape)).collect(),
        };
        stored.dedup();
        let what = format!("{}  {}", words.join("  "), stored.join("/"));
        let name = match component.parameter {
            "weight" => component.module.to_owned(),
            parameter => format!("{}.{parameter}", component.module),
        };
        *groups.entry((numberless(&name), what)).or_default() += 1;
    }
    let width = groups.keys().map(|key| key.0.chars().count()).max().unwrap_or(0);
    for ((module, what), count) in &groups {
        text.push_str(&format!("  {count:>5} × {module:width$}  {what}\n"));
    }
    for (key, value) in &report.metadata {
        text.push_str(&format!("metadata {key}: {value}\n"));
    }
    for note in &report.notes {
        text.push_str(&format!("note: {note}\n"));
    }
    match &report.digest {
        Some(digest) if digest.intact => {
            text.push_str(&format!("digest: intact ({})\n", digest.recorded));
        }
        Some(digest) => text.push_str(&format!(
            "digest: DAMAGED\n  recorded {}\n  actual   {}\n",
            digest.recorded, digest.actual
        )),
        None => {}
    }
    text
}

/// `lora-cli/inspect-model/1`
#[derive(Debug, Serialize)]
struct ModelReport<'a> {
    schema: &'static str,
    path: String,
    layout: &'static str,
    model_type: Option<&'a str>,
    parameters: u64,
    bytes: u64,
    dtypes: BTreeMap<&'static str, u64>,
    shards: Vec<ShardReport<'a>>,
    notes: Vec<String>,
    tensors: Vec<TensorReport<'a>>,
}

#[derive(Debug, Serialize)]
struct ShardReport<'a> {
    name: &'a str,
    bytes: u64,
    tensors: usize,
    metadata: BTreeMap<&'a str, &'a str>,
}

#[derive(Debug, Serialize)]
struct TensorReport<'a> {
    name: &'a str,
    dtype: &'static str,
    shape: &'a [usize],
    shard: &'a str,
}

/// Lists the tensors of a model, or of an adapter that is not understood for the reason given.
fn inspect_model(
    arguments: &Arguments,
    model: &Checkpoint,
    reason: Option<&Error>,
) -> Result<Outcome, Failure> {
    if arguments.verify {
        let message = format!("{}: a model records no digest to verify", model.path().display());
        return Err(Failure::new(message, None));
    }
    let mut dtypes: BTreeMap<&'static str, u64> = BTreeMap::new();
    let mut parameters = 0;
    let mut bytes = 0;
    for (_, info) in model.tensors() {
        *dtypes.entry(info.dtype.name()).or_default() += info.elements();
        parameters += info.elements();
        bytes += info.bytes();
    }
    let report = ModelReport {
        schema: "lora-cli/inspect-model/1",
        path: model.path().display().to_string(),
        layout: match model.layout() {
            _ if reason.is_some() => "adapter",
            Layout::File => "file",
            Layout::Directory => "directory",
            Layout::Sharded => "sharded",
        },
        model_type: model.config().and_then(|config| config.get("model_type")?.as_str()),
        parameters,
        bytes,
        dtypes,
        shards: model
            .shards()
            .iter()
            .map(|shard| ShardReport {
                name: &shard.name,
                bytes: shard.file.file_bytes(),
                tensors: shard.file.header().tensors.len(),
                metadata: shard
                    .file
                    .header()
                    .metadata
                    .iter()
                    .map(|(key, value)| (key.as_str(), value.as_str()))
                    .collect(),
            })
            .collect(),
        notes: model
            .notes()
            .iter()
            .map(ToString::to_string)
            .chain(reason.map(|reason| format!("an adapter that cannot be merged: {reason}")))
            .collect(),
        tensors: model
            .tensors()
            .map(|(location, info)| TensorReport {
                name: &info.name,
                dtype: info.dtype.name(),
                shape: &info.shape,
                shard: &model.shards()[location.shard].name,
            })
            .collect(),
    };
    if arguments.json {
        printer::json(&report)?;
    } else {
        printer::data(&model_text(&report))?;
    }
    Ok(Outcome::Done)
}

fn model_text(report: &ModelReport<'_>) -> String {
    let kind = if report.layout == "adapter" { "adapter" } else { "model" };
    let mut text = format!("{}: {kind}", report.path);
    if let Some(model_type) = report.model_type {
        text.push_str(&format!(", {model_type}"));
    }
    text.push_str(&format!(
        "\n{} tensors, {} parameters, {} in {} file{}\n",
        report.tensors.len(),
        report.parameters,
        Bytes(report.bytes),
        report.shards.len(),
        if report.shards.len() == 1 { "" } else { "s" }
    ));
    for (dtype, elements) in &report.dtypes {
        text.push_str(&format!("  {dtype}: {elements} elements\n"));
    }
    text.push('\n');
    let mut groups: BTreeMap<(String, String), usize> = BTreeMap::new();
    for tensor in &report.tensors {
        let what = format!("{:?} {}", tensor.shape, tensor.dtype);
        *groups.entry((numberless(tensor.name), what)).or_default() += 1;
    }
    let width = groups.keys().map(|key| key.0.chars().count()).max().unwrap_or(0);
    for ((name, what), count) in &groups {
        text.push_str(&format!("  {count:>5} × {name:width$}  {what}\n"));
    }
    for note in &report.notes {
        text.push_str(&format!("note: {note}\n"));
    }
    text
}
