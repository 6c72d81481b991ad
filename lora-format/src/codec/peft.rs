//! PEFT: a directory with `adapter_config.json` and `adapter_model.safetensors`.
//!
//! The codec knows every field that PEFT writes. A field that only steered training is passed
//! over; one that changes the merged weight is implemented or refused by name, and so is one that
//! is unknown, unless it holds nothing (null, false, empty). `target_modules` is never evaluated:
//! the tensors say what was trained.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::{ReadOptions, existing, open_safetensors};
use crate::container::safetensors::{
    Declared, Header, SafetensorsFile, encode_header, storage_order,
};
use crate::error::{AdapterProblem, DetectProblem, Error, IoContext, Result, Unsupported};
use crate::factors::{self, FactorTensors};
use crate::fingerprint::BaseIdentity;
use crate::io::atomic::{self, Durability, Overwrite};
use crate::json;
use crate::limits;
use crate::model::{
    Adapter, AdapterFormat, Component, Form, LowRank, Note, Scaling, ScalingRule, SourceConfig,
};
use crate::pattern::{self, PatternTable};
use crate::tensor;

/// The file names PEFT writes.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The tensors.
pub const MODEL_FILE: &str = "adapter_model.safetensors";

const PREFIX: &str = "base_model.model.";
const A_SUFFIX: &str = ".lora_A.weight";
const B_SUFFIX: &str = ".lora_B.weight";

/// Whether the tensors are named as PEFT's LoRA names them.
pub(super) fn is_peft(header: &Header) -> bool {
    header.tensors.iter().any(|tensor| {
        tensor.name.contains(".lora_A.")
            || tensor.name.contains(".lora_B.")
            || tensor.name.starts_with(PREFIX)
    })
}

/// The configuration beside a tensor file.
pub(super) fn config_beside(path: &Path) -> Option<PathBuf> {
    existing(atomic::parent_of(path), CONFIG_FILE)
}

/// Reads a PEFT directory.
pub(super) fn read_directory(path: &Path, options: &ReadOptions) -> Result<Adapter> {
    let unrecognised = |problem| Error::Unrecognised { path: path.to_owned(), problem };
    let Some(model) = existing(path, MODEL_FILE) else {
        let pickle = existing(path, "adapter_model.bin");
        // Without tensors, the configuration alone may say that this is no LoRA at all.
        if let Some(config) = existing(path, CONFIG_FILE) {
            let config = json::read_object(&config, limits::CONFIG_BYTES)?;
            check_fields(path, &config, options, &mut Vec::new())?;
        }
        return Err(unrecognised(match pickle {
            Some(_) => DetectProblem::PickleOnly { file: "adapter_model.bin".to_owned() },
            None => match adapters_inside(path)? {
                names if names.is_empty() => DetectProblem::NoAdapter,
                names => DetectProblem::AdaptersInside { names },
            },
        }));
    };
    let file = open_safetensors(&model)?;
    let mut adapter = read_file(&file, existing(path, CONFIG_FILE).as_deref(), options)?;
    adapter.path = path.to_owned();
    Ok(adapter)
}

/// Subdirectories that hold an adapter: PEFT saves one there unless it is called `default`.
fn adapters_inside(path: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(path).at(path, "list")? {
        let inner = entry.at(path, "list")?.path();
        if existing(&inner, MODEL_FILE).is_some() {
            names.push(format!("`{}`", inner.display()));
        }
    }
    names.sort();
    Ok(names)
}

/// Reads PEFT's tensors with the configuration at `config`, or with the user's alpha.
pub(super) fn read_file(
    file: &SafetensorsFile,
    config: Option<&Path>,
    options: &ReadOptions,
) -> Result<Adapter> {
    let path = file.path();
    let mut notes = Vec::new();
    let mut fields = match config {
        Some(config) => json::read_object(config, limits::CONFIG_BYTES)?,
        None => Map::new(),
    };
    if let Some(alpha) = options.alpha {
        if let Some(recorded) = fields.get("lora_alpha").filter(|value| !value.is_null()) {
            let expected = "absent when an alpha is given by hand";
            return Err(Error::config(config.unwrap_or(path), "lora_alpha", expected, recorded));
        }
        notes.push(Note::AlphaGiven { alpha: alpha.to_string() });
        fields.insert("lora_alpha".to_owned(), json!(alpha));
    } else if config.is_none() {
        return Err(Error::AlphaUnknown { path: path.to_owned() });
    }
    // With the alpha that the user gave: a configuration to write back must have one.
    let source =
        config.map(|_| SourceConfig { format: AdapterFormat::Peft, config: fields.clone() });
    if config.is_none() {
        fields.insert("peft_type".to_owned(), json!("LORA"));
    }
    let config_path = config.unwrap_or(path);
    check_fields(config_path, &fields, options, &mut notes)?;
    let components = read_components(file, config_path, &fields, &mut notes)?;
    Ok(Adapter {
        path: path.to_owned(),
        format: AdapterFormat::Peft,
        components,
        base: recorded_base(&fields),
        fan_in_fan_out: fields.get("fan_in_fan_out").and_then(Value::as_bool),
        metadata: file.header().metadata.iter().filter(|e| e.0 != "format").cloned().collect(),
        source,
        extensions: Map::new(),
        notes,
    })
}

fn read_components(
    file: &SafetensorsFile,
    config_path: &Path,
    fields: &Map<String, Value>,
    notes: &mut Vec<Note>,
) -> Result<Vec<Component>> {
    let mut modules: BTreeMap<String, FactorTensors> = BTreeMap::new();
    let mut problems = Vec::new();
    let mut unsupported: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for tensor in tensor::map_all(file)? {
        let name = tensor.name.strip_prefix(PREFIX).unwrap_or(&tensor.name).to_owned();
        let (module, is_a) = match (name.strip_suffix(A_SUFFIX), name.strip_suffix(B_SUFFIX)) {
            (Some(module), _) => (module, true),
            (_, Some(module)) => (module, false),
            _ => {
                unsupported.entry(explain_tensor(&name)).or_default().push(tensor.name);
                continue;
            }
        };
        if module.contains(".base_layer.") {
            unsupported.entry(INSIDE).or_default().push(tensor.name);
            continue;
        }
        if module.ends_with(".base_layer") {
            unsupported.entry(NESTED).or_default().push(tensor.name);
            continue;
        }
        if (3..=5).contains(&tensor.shape.len()) {
            unsupported.entry(CONVOLUTION).or_default().push(tensor.name);
            continue;
        }
        let factors = modules.entry(module.to_owned()).or_default();
        let slot = if is_a { &mut factors.a } else { &mut factors.b };
        if let Some(first) = slot.replace(tensor) {
            let second = slot.as_ref().map(|tensor| tensor.name.clone()).unwrap_or_default();
            problems.push(AdapterProblem::DuplicateFactor { first: first.name, second });
        }
    }
    if !unsupported.is_empty() {
        let features = unsupported.into_iter().map(|(reason, tensors)| summarise(reason, &tensors));
        return Err(Error::Unsupported {
            path: file.path().to_owned(),
            features: features.collect(),
        });
    }

    if modules.is_empty() {
        let problem = DetectProblem::NotAnAdapter { tensors: 0, first: None };
        return Err(Error::Unrecognised { path: file.path().to_owned(), problem });
    }
    let mut scaling = ScalingTable::new(config_path, fields)?;
    let mut components = Vec::with_capacity(modules.len());
    for (module, factors) in modules {
        let names = (format!("{PREFIX}{module}{A_SUFFIX}"), format!("{PREFIX}{module}{B_SUFFIX}"));
        let configured = scaling.of(&module)?;
        let built = factors::low_rank(&module, factors, names, configured.scaling, &mut problems);
        let Some(component) = built else { continue };
        let Form::LowRank(low_rank) = &component.form;
        let stored = low_rank.rank();
        match configured.rank.filter(|&rank| rank != stored) {
            // The tensors show that the keys are no longer in the order of training, so which
            // alpha was trained with cannot be known.
            Some(_) if configured.alpha_contested => {
                problems.push(AdapterProblem::PatternOrder { module });
            }
            Some(configured) => notes.push(Note::RankDiffers { module, configured, stored }),
            None if configured.alpha_contested => {
                let alpha = configured.scaling.alpha.to_string();
                notes.push(Note::ContestedAlpha { module, alpha });
            }
            None => {}
        }
        components.push(component);
    }
    if !problems.is_empty() {
        return Err(Error::Adapter { path: file.path().to_owned(), problems });
    }
    notes.extend(scaling.dead_patterns());
    Ok(components)
}

/// alpha and the configured rank of a module, by PEFT's rules.
struct ScalingTable {
    rank: Option<usize>,
    alpha: f64,
    rule: ScalingRule,
    ranks: PatternTable,
    alphas: PatternTable,
}

/// What the configuration says of one module.
struct Configured {
    rank: Option<usize>,
    scaling: Scaling,
    /// Several alpha keys match, with different values.
    alpha_contested: bool,
}

impl ScalingTable {
    fn new(path: &Path, fields: &Map<String, Value>) -> Result<ScalingTable> {
        let missing = Value::Null;
        let alpha = fields.get("lora_alpha").unwrap_or(&missing);
        let Some(alpha) = alpha.as_f64() else {
            return Err(Error::config(path, "lora_alpha", "a number", alpha));
        };
        let rank = match fields.get("r") {
            None => None,
            Some(value) => match value.as_u64() {
                Some(rank) if rank >= 1 => usize::try_from(rank).ok(),
                _ => return Err(Error::config(path, "r", "a positive integer", value)),
            },
        };
        let rule = match fields.get("use_rslora") {
            None | Some(Value::Null | Value::Bool(false)) => ScalingRule::AlphaOverRank,
            Some(Value::Bool(true)) => ScalingRule::AlphaOverSqrtRank,
            Some(other) => return Err(Error::config(path, "use_rslora", "a boolean", other)),
        };
        Ok(ScalingTable {
            rank,
            alpha,
            rule,
            ranks: PatternTable::compile(path, "rank_pattern", fields.get("rank_pattern"))?,
            alphas: PatternTable::compile(path, "alpha_pattern", fields.get("alpha_pattern"))?,
        })
    }

    fn of(&mut self, module: &str) -> Result<Configured> {
        let rank = self.ranks.lookup(module)?.map(|found| found.value as usize).or(self.rank);
        let alpha = self.alphas.lookup(module)?;
        let contested = alpha.is_some_and(|found| found.contested);
        let alpha = alpha.map_or(self.alpha, |found| found.value);
        let scaling = Scaling { alpha, rule: self.rule };
        Ok(Configured { rank, scaling, alpha_contested: contested })
    }

    fn dead_patterns(&self) -> impl Iterator<Item = Note> {
        let dead = |table: &PatternTable, field| -> Vec<Note> {
            table.dead_keys().map(|key| Note::DeadPattern { field, key: key.to_owned() }).collect()
        };
        dead(&self.ranks, "rank_pattern").into_iter().chain(dead(&self.alphas, "alpha_pattern"))
    }
}

/// Fields that PEFT writes and that do not change the merged weight, or are read elsewhere.
const PASSIVE: [&str; 27] = [
    "alpha_pattern",
    "arrow_config",
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "monteclora_config",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_rslora",
    "velora_config",
];

/// Values of `init_lora_weights` that leave the base alone.
const HARMLESS_INITS: [&str; 4] = ["gaussian", "orthogonal", "eva", "mica"];

/// Refuses every field that changes the merged weight in a way that is not implemented.
fn check_fields(
    path: &Path,
    fields: &Map<String, Value>,
    options: &ReadOptions,
    notes: &mut Vec<Note>,
) -> Result<()> {
    let missing = Value::Null;
    let kind = fields.get("peft_type").unwrap_or(&missing);
    let Some(kind) = kind.as_str() else {
        return Err(Error::config(path, "peft_type", "a string", kind));
    };
    let mut features = Vec::new();
    if kind != "LORA" {
        let feature = format!("peft_type {kind}");
        let reason = explain_method(kind).to_owned();
        features.push(Unsupported { feature, reason });
    } else {
        for (field, value) in fields {
            if PASSIVE.contains(&field.as_str()) && !is_active_method(field, value) {
                continue;
            }
            if let Some(reason) = explain_field(field, value) {
                if reason == UNKNOWN_FIELD && options.ignore_fields.contains(field) {
                    notes.push(Note::IgnoredField { field: field.clone() });
                } else {
                    let feature = format!("`{field}`: {}", json::brief(value));
                    features.push(Unsupported { feature, reason: reason.to_owned() });
                }
            }
        }
    }
    if features.is_empty() {
        return Ok(());
    }
    Err(Error::Unsupported { path: path.to_owned(), features })
}

/// Configurations of methods that need more than A and B: passive only while empty.
fn is_active_method(field: &str, value: &Value) -> bool {
    ["arrow_config", "monteclora_config", "velora_config"].contains(&field) && !is_empty(value)
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}

/// Why an unknown field is refused; the only ones that a user may have passed over.
const UNKNOWN_FIELD: &str = "this field is unknown here and may change the result";

/// Why `field` cannot be passed over, or `None` if its value means nothing.
fn explain_field(field: &str, value: &Value) -> Option<&'static str> {
    if field == "init_lora_weights" {
        return match value {
            Value::Null | Value::Bool(_) => None,
            Value::String(init) if HARMLESS_INITS.contains(&init.as_str()) => None,
            _ => Some(
                "this initialisation changes the base model itself, so the factors are only valid \
                 on that changed base; convert the adapter with PEFT's \
                 `path_initial_model_for_weight_conversion` first",
            ),
        };
    }
    if field == "bias" {
        return (value.as_str() != Some("none"))
            .then_some("trained biases replace those of the base: not implemented yet");
    }
    if is_empty(value) {
        return None;
    }
    Some(match field {
        "use_dora" => "DoRA rescales every row by a trained magnitude: not implemented yet",
        "lora_bias" => "a bias on B: not implemented yet",
        "modules_to_save" => {
            "modules trained in full replace those of the base: not implemented yet"
        }
        "trainable_token_indices" => "trained token rows: not implemented yet",
        "target_parameters" => "LoRA on bare parameters (fused experts): not implemented yet",
        "layer_replication" => {
            "layers that share weights receive different adapters, so no single weight can hold \
             the result"
        }
        "use_qalora" => "QALoRA pools its inputs; it has no merged weight",
        "use_bdlora" => "BD-LoRA's block-diagonal factors: not implemented yet",
        "kasa_config" => "KaSA truncates the base before it adds: not implemented yet",
        "alora_invocation_tokens" => {
            "an activated LoRA acts only after its invocation tokens; it has no merged weight"
        }
        "arrow_config" => "Arrow routes between adapters per token; it has no merged weight",
        "velora_config" | "monteclora_config" => {
            "this variant stores more than two factors: not implemented yet"
        }
        "megatron_config" => "factors split across a Megatron group: not implemented yet",
        "ensure_weight_tying" => "tied targets: not implemented yet",
        _ => UNKNOWN_FIELD,
    })
}

/// What a `peft_type` other than LORA is.
fn explain_method(kind: &str) -> &'static str {
    match kind {
        "PROMPT_TUNING" | "MULTITASK_PROMPT_TUNING" | "P_TUNING" | "PREFIX_TUNING" | "CPT" => {
            "trained context (virtual tokens) is not a change of any weight, so nothing can be \
             merged; serve the adapter with the model"
        }
        "ADAPTION_PROMPT" => {
            "gated attention over trained prompts is not a change of any weight, so nothing can \
             be merged"
        }
        "XLORA" | "POLY" => {
            "adapters mixed per input by a trained router have no single merged weight"
        }
        _ => "only LORA is implemented so far",
    }
}

const NESTED: &str = "LoRA on a bare parameter (fused experts): not implemented yet";
const INSIDE: &str = "LoRA on a part of a wrapped layer (MultiheadAttention): not implemented yet";
const CONVOLUTION: &str = "a convolution's factors: not implemented yet";

/// What a tensor that is neither A nor B of a linear layer is.
fn explain_tensor(name: &str) -> &'static str {
    let ends = |suffixes: &[&str]| suffixes.iter().any(|suffix| name.ends_with(suffix));
    let holds = |parts: &[&str]| parts.iter().any(|part| name.contains(part));
    if ends(&[".lora_embedding_A", ".lora_embedding_B"]) {
        "LoRA on an embedding: not implemented yet"
    } else if ends(&[".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".dora_scale"]) {
        "DoRA's magnitude: not implemented yet"
    } else if ends(&[".lora_B.bias"]) {
        "a bias on B (lora_bias): not implemented yet"
    } else if ends(&[".trainable_tokens_delta", ".trainable_tokens_index"]) {
        "trained token rows: not implemented yet"
    } else if holds(&[".lora_A.", ".lora_B."]) {
        "named after an adapter inside a training checkpoint; save the adapter with PEFT's \
         save_pretrained"
    } else if holds(&["lora_diag", "lora_velora", "lora_monteclora"]) {
        "a variant with more than two factors: not implemented yet"
    } else if holds(&["hada_", "lokr_", "ia3_", "oft_", "boft_", "vera_", "hra_", "miss_"]) {
        "a method other than LoRA: not implemented yet"
    } else if holds(&["lora_"]) {
        "an unknown kind of LoRA tensor"
    } else if ends(&[".base_layer.weight"]) {
        "a copy of the base's own tensor, which PEFT saves beside a targeted embedding or output \
         layer: not implemented yet (saving with save_embedding_layers=False leaves it out)"
    } else if ends(&[".bias"]) {
        "a trained bias: not implemented yet"
    } else {
        "a tensor stored in full (modules_to_save, or a resized embedding): not implemented yet"
    }
}

fn summarise(reason: &str, tensors: &[String]) -> Unsupported {
    let feature = match tensors {
        [only] => format!("`{only}`"),
        [first, .., last] => format!("{} tensors, `{first}` to `{last}`", tensors.len()),
        [] => String::new(),
    };
    Unsupported { feature, reason: reason.to_owned() }
}

/// The format that a native file's `source` names.
pub(crate) fn format_named(path: &Path, name: &str) -> Result<AdapterFormat> {
    if name == AdapterFormat::Peft.name() {
        return Ok(AdapterFormat::Peft);
    }
    Err(Error::config(path, "source.format", "`peft`", &Value::from(name)))
}

/// Writes an adapter as a new PEFT directory. The factors keep their bits; the configuration is
/// the one the adapter came with, corrected where the adapter says otherwise, or one that says the
/// same.
///
/// # Errors
/// [`Error::OutputExists`] (a directory is never replaced), [`Error::Io`],
/// [`Error::Inexpressible`].
pub fn write_directory(
    adapter: &Adapter,
    destination: &Path,
    overwrite: Overwrite,
    durability: Durability,
) -> Result<()> {
    let config = configuration(adapter)?;
    let mut text = serde_json::to_string_pretty(&config)
        .map_err(|source| Error::Json { path: destination.to_owned(), source })?;
    text.push('\n');

    let mut tensors = Vec::with_capacity(adapter.components.len() * 2);
    for component in &adapter.components {
        let Form::LowRank(factors) = &component.form;
        let module = &component.target.module;
        tensors.push((format!("{PREFIX}{module}{A_SUFFIX}"), &factors.a));
        tensors.push((format!("{PREFIX}{module}{B_SUFFIX}"), &factors.b));
    }
    tensors.sort_by(|x, y| storage_order((x.1.dtype, &x.0), (y.1.dtype, &y.0)));
    let mut metadata = adapter.metadata.clone();
    metadata.push(("format".to_owned(), "pt".to_owned()));
    metadata.sort();
    let declared = tensors.iter().map(|(name, tensor)| Declared {
        name,
        dtype: tensor.dtype,
        shape: &tensor.shape,
        bytes: tensor.bytes().len() as u64,
    });
    let header = encode_header(&metadata, declared);
    let mut parts: Vec<&[u8]> = vec![&header];
    parts.extend(tensors.iter().map(|(_, tensor)| tensor.bytes()));

    let staging = atomic::StagedDirectory::create(destination, overwrite)?;
    let inside = |name| staging.path().join(name);
    atomic::write(&inside(MODEL_FILE), &parts, Overwrite::Never, durability)?;
    atomic::write(&inside(CONFIG_FILE), &[text.as_bytes()], Overwrite::Never, durability)?;
    adapter.ensure_unchanged()?;
    staging.commit(durability)
}

/// The configuration that the adapter came with, corrected wherever it would have PEFT compute
/// another delta or name another base than the adapter does.
fn configuration(adapter: &Adapter) -> Result<Map<String, Value>> {
    let mut described = describe(adapter)?;
    let source = match &adapter.source {
        Some(source) if source.format == AdapterFormat::Peft => &source.config,
        _ => return Ok(described),
    };
    let mut config = source.clone();
    let mut wrong: Vec<&str> = Vec::new();
    if !gives_the_scales(&adapter.path, source, adapter) {
        wrong.extend(["r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"]);
    }
    let base = recorded_base(source);
    if base.name != adapter.base.name {
        wrong.push("base_model_name_or_path");
    }
    if base.revision != adapter.base.revision {
        wrong.push("revision");
    }
    if source.get("fan_in_fan_out").and_then(Value::as_bool) != adapter.fan_in_fan_out {
        wrong.push("fan_in_fan_out");
    }
    if source.get("peft_type").and_then(Value::as_str) != Some("LORA") {
        wrong.push("peft_type");
    }
    // The adapter is plain LoRA, so a field that makes PEFT read it as anything else is wrong. An
    // unknown field was read on the user's word, and stays.
    let changes = |(field, value): &(&String, &Value)| {
        let passive = PASSIVE.contains(&field.as_str()) && !is_active_method(field, value);
        !passive && explain_field(field, value).is_some_and(|reason| reason != UNKNOWN_FIELD)
    };
    wrong.extend(source.iter().filter(changes).map(|(field, _)| field.as_str()));
    for field in wrong {
        match described.remove(field) {
            Some(value) => drop(config.insert(field.to_owned(), value)),
            None => drop(config.shift_remove(field)),
        }
    }
    Ok(config)
}

/// Whether PEFT computes the adapter's ranks and scales from `config`, to the last bit.
fn gives_the_scales(path: &Path, config: &Map<String, Value>, adapter: &Adapter) -> bool {
    /// PEFT's rank where the configuration gives none.
    const DEFAULT_RANK: usize = 8;
    let Ok(mut table) = ScalingTable::new(path, config) else {
        return false;
    };
    adapter.components.iter().all(|component| {
        let Form::LowRank(low_rank) = &component.form;
        let rank = low_rank.rank();
        table.of(&component.target.module).is_ok_and(|configured| {
            configured.rank.unwrap_or(DEFAULT_RANK) == rank
                && configured.scaling.scale(rank).to_bits() == low_rank.scale().to_bits()
        })
    })
}

/// What a configuration says of the base.
fn recorded_base(fields: &Map<String, Value>) -> BaseIdentity {
    let text = |field: &str| fields.get(field).and_then(Value::as_str).map(str::to_owned);
    BaseIdentity {
        name: text("base_model_name_or_path").filter(|name| !name.is_empty()),
        revision: text("revision"),
        fingerprint: None,
    }
}

/// A configuration for an adapter that did not come from PEFT.
fn describe(adapter: &Adapter) -> Result<Map<String, Value>> {
    let factors: Vec<(&Component, &LowRank)> = adapter
        .components
        .iter()
        .map(|component| {
            let Form::LowRank(low_rank) = &component.form;
            (component, low_rank)
        })
        .collect();
    let sqrt = |low_rank: &LowRank| low_rank.scaling.rule == ScalingRule::AlphaOverSqrtRank;
    let rslora = factors.iter().all(|(_, low_rank)| sqrt(low_rank));
    // PEFT has one rule for the whole adapter: what the other rules mean is said as an alpha.
    let alpha = |low_rank: &LowRank| match low_rank.scaling.rule {
        _ if rslora => low_rank.scaling.alpha,
        ScalingRule::AlphaOverRank => low_rank.scaling.alpha,
        _ => alpha_of_scale(low_rank.scale(), low_rank.rank()),
    };
    let rank = commonest(factors.iter().map(|(_, low_rank)| low_rank.rank() as u64));
    let default_alpha = commonest(factors.iter().map(|(_, low_rank)| alpha(low_rank).to_bits()));
    let (Some(rank), Some(default_alpha)) = (rank, default_alpha.map(f64::from_bits)) else {
        return Err(Error::Inexpressible {
            path: adapter.path.clone(),
            format: "PEFT",
            what: "an adapter without components".to_owned(),
        });
    };
    let mut rank_pattern = Map::new();
    let mut alpha_pattern = Map::new();
    for (component, low_rank) in &factors {
        // Anchored: the name of one module may be a dotted suffix of another's.
        let key = pattern::exactly(&component.target.module);
        if low_rank.rank() as u64 != rank {
            rank_pattern.insert(key.clone(), json!(low_rank.rank()));
        }
        if alpha(low_rank).to_bits() != default_alpha.to_bits() {
            alpha_pattern.insert(key, json!(alpha(low_rank)));
        }
    }
    let modules: Vec<&str> = factors.iter().map(|(c, _)| c.target.module.as_str()).collect();
    let config = json!({
        "alpha_pattern": alpha_pattern,
        "base_model_name_or_path": adapter.base.name,
        "bias": "none",
        "fan_in_fan_out": adapter.fan_in_fan_out.unwrap_or(false),
        "inference_mode": true,
        "init_lora_weights": true,
        "lora_alpha": default_alpha,
        "lora_dropout": 0.0,
        "modules_to_save": null,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": rank_pattern,
        "revision": adapter.base.revision,
        "target_modules": modules,
        "task_type": null,
        "use_dora": false,
        "use_rslora": rslora,
    });
    json::object(&adapter.path, config)
}

/// The alpha whose quotient by the rank is `scale`; where no f64 is, the nearest to it.
fn alpha_of_scale(scale: f64, rank: usize) -> f64 {
    let rank = rank as f64;
    let product = scale * rank;
    let exact = |alpha: &f64| (alpha / rank).to_bits() == scale.to_bits();
    [product, product.next_down(), product.next_up()].into_iter().find(exact).unwrap_or(product)
}

/// The commonest value; of equally common ones the smallest.
fn commonest(values: impl Iterator<Item = u64>) -> Option<u64> {
    let mut counts: BTreeMap<u64, usize> = BTreeMap::new();
    for value in values {
        *counts.entry(value).or_default() += 1;
    }
    let most = counts.values().copied().max()?;
    counts.into_iter().find(|entry| entry.1 == most).map(|entry| entry.0)
}

/// Files of a PEFT directory that are not part of the adapter.
///
/// # Errors
/// [`Error::Io`].
pub fn other_files(directory: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(directory).at(directory, "list")? {
        let name = entry.at(directory, "list")?.file_name().to_string_lossy().into_owned();
        if name != CONFIG_FILE && name != MODEL_FILE {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}
