//! torchtune's adapters: the state dict that it saves as `adapter_model.pt`, with an
//! `adapter_config.json` beside it.
//!
//! Shapes are PEFT's, names are torchtune's own: `layers.N.attn.q_proj.lora_a.weight`,
//! `.lora_b.weight`, and `.magnitude` of DoRA. For Llama, Mistral and Gemma, torchtune computes with
//! the rows of q and k in the order of Meta's code (`codec/rearrange.rs`), so those of B, and the
//! magnitudes, are in that order too; for Qwen they are in transformers'. Which, and how many heads
//! there are, only the base's `config.json` says.
//!
//! torchtune's own export to PEFT reorders B whatever the model is, and magnitudes never; where it
//! differs from what is read here, its result is not what was trained (`convert_weights.py` at
//! bd2a0fc, next to `qwen2/_convert_weights.py`, which does not reorder).
//!
//! DoRA of a layer with a bias scales the bias as well, which transformers' DoRA does not: Qwen2's
//! q, k and v are refused with it. Phi-3's fused projections are split in torchtune and have no
//! names in transformers; it is refused, as every other model whose names are not known.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Map, Value, json};

use super::base::{Base, Heads};
use super::mlx::{common_scale, sort};
use super::{ReadOptions, WriteOptions, Written, existing, folding, rearrange};
use crate::container::TensorFile;
use crate::container::safetensors::header_of;
use crate::error::{AdapterProblem, BaseProblem, Error, Result, Shape, Unsupported};
use crate::factors::{self, FactorTensors};
use crate::fingerprint::BaseIdentity;
use crate::io::atomic::{self, Durability, Overwrite};
use crate::json;
use crate::limits;
use crate::model::{
    Adapter, AdapterFormat, Component, Form, Layer, LowRank, Note, Scaling, ScalingRule, Target,
};
use crate::tensor::Tensor;

/// The file that torchtune writes.
pub const TORCH_FILE: &str = "adapter_model.pt";
/// The file that is written here: torchtune opens it with `adapter_checkpoint`.
pub const SAFETENSORS_FILE: &str = "adapter.safetensors";
/// The configuration.
pub const CONFIG_FILE: &str = "adapter_config.json";

const FORMAT: &str = "torchtune";
const A_SUFFIX: &str = ".lora_a.weight";
const B_SUFFIX: &str = ".lora_b.weight";
const MAGNITUDE: &str = ".magnitude";

/// The names within a layer, torchtune's and transformers' (`_FROM_HF`).
const LAYER: [(&str, &str); 7] = [
    ("attn.q_proj", "self_attn.q_proj"),
    ("attn.k_proj", "self_attn.k_proj"),
    ("attn.v_proj", "self_attn.v_proj"),
    ("attn.output_proj", "self_attn.o_proj"),
    ("mlp.w1", "mlp.gate_proj"),
    ("mlp.w2", "mlp.down_proj"),
    ("mlp.w3", "mlp.up_proj"),
];
const HEAD: (&str, &str) = ("output", "lm_head");

/// The classes whose rows of q and k are in the order of Meta's code.
const PAIRED: [&str; 4] =
    ["LlamaForCausalLM", "MistralForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM"];
/// The classes whose rows are in transformers' order; Qwen2's q, k and v have biases.
const KEPT: [&str; 2] = [BIASED, "Qwen3ForCausalLM"];
const BIASED: &str = "Qwen2ForCausalLM";

/// Whether a file holds torchtune's factors.
pub(super) fn is_torchtune(file: &TensorFile) -> bool {
    file.any_name(|name| name.ends_with(A_SUFFIX) || name.ends_with(B_SUFFIX))
}

/// The file of a directory that torchtune wrote; `None` if there is none.
pub(super) fn file_in(directory: &Path) -> Option<std::path::PathBuf> {
    existing(directory, SAFETENSORS_FILE).or_else(|| existing(directory, TORCH_FILE))
}

/// Reads a directory with that file.
pub(super) fn read_directory(
    directory: &Path,
    file: &Path,
    options: &ReadOptions,
) -> Result<Adapter> {
    let mut adapter = read(TensorFile::open(file)?, options)?;
    adapter.path = directory.to_owned();
    Ok(adapter)
}

/// Reads the tensors with the configuration beside them, or with the user's alpha.
pub(super) fn read(file: TensorFile, options: &ReadOptions) -> Result<Adapter> {
    let path = file.path.clone();
    let meaningless = |option, reason| Error::Meaningless { path: path.clone(), option, reason };
    if options.residual_base {
        return Err(meaningless("residual base", "torchtune never changes the base"));
    }
    if options.enable_lora.is_some() {
        return Err(meaningless("enable_lora", "only loralib has fused projections"));
    }
    let mut notes = Vec::new();
    let config = existing(atomic::parent_of(&path), CONFIG_FILE);
    let config = match (config, options.alpha) {
        (Some(_), Some(_)) => return Err(meaningless("alpha", "the configuration gives it")),
        (Some(config), None) => {
            let fields = json::read_object(&config, limits::CONFIG_BYTES)?;
            Config::read(&config, &fields, options, &mut notes)?
        }
        (None, Some(alpha)) => {
            notes.push(Note::AlphaGiven { alpha: alpha.to_string() });
            Config { alpha, rank: None, base: None }
        }
        (None, None) => return Err(Error::AlphaUnknown { path }),
    };
    let metadata = file.own_metadata();
    let base = BaseIdentity { name: config.base.clone(), revision: None, fingerprint: None };
    let rows = Rows { path: &path, config: options.base_config.as_ref() };
    let mut reader = Reader { rows, config, problems: Vec::new(), notes };
    let components = reader.components(file.tensors)?;
    if !reader.problems.is_empty() {
        let problems = reader.problems;
        return Err(Error::Adapter { path, problems });
    }
    let notes = reader.notes;
    let mut adapter = Adapter::new(path, components, base);
    adapter.format = AdapterFormat::Torchtune;
    adapter.metadata = metadata;
    adapter.notes = notes;
    Ok(adapter)
}

/// What the configuration says that the adapter computes with.
struct Config {
    alpha: f64,
    rank: Option<usize>,
    base: Option<String>,
}

impl Config {
    fn read(
        path: &Path,
        fields: &Map<String, Value>,
        options: &ReadOptions,
        notes: &mut Vec<Note>,
    ) -> Result<Config> {
        /// What changes nothing: the names are the tensors', and the rest is for training.
        const NEUTRAL: [&str; 8] = [
            "base_model_name_or_path",
            "inference_mode",
            "lora_alpha",
            "lora_dropout",
            "peft_type",
            "r",
            "target_modules",
            "task_type",
        ];
        let mut features = Vec::new();
        for (field, value) in fields {
            let empty = matches!(value, Value::Null | Value::Bool(false));
            // Magnitudes show whether it is DoRA.
            if empty || field == "use_dora" || NEUTRAL.contains(&field.as_str()) {
                continue;
            }
            if options.ignore_fields.contains(field) {
                notes.push(Note::IgnoredField { field: field.clone() });
                continue;
            }
            let feature = format!("{field} = {}", json::brief(value));
            let reason = "no field that torchtune writes".to_owned();
            features.push(Unsupported { feature, reason });
        }
        if !features.is_empty() {
            return Err(Error::Unsupported { path: path.to_owned(), features });
        }
        let value = |field: &str| fields.get(field).unwrap_or(&Value::Null);
        let alpha = value("lora_alpha").as_f64().filter(|alpha| alpha.is_finite());
        let alpha = alpha
            .ok_or_else(|| Error::config(path, "lora_alpha", "a number", value("lora_alpha")))?;
        let rank = match value("r") {
            Value::Null => None,
            found => match found.as_u64().filter(|rank| (1..=limits::RANK as u64).contains(rank)) {
                Some(rank) => Some(rank as usize),
                None => return Err(Error::config(path, "r", "a rank", found)),
            },
        };
        let base = value("base_model_name_or_path").as_str().filter(|name| !name.is_empty());
        Ok(Config { alpha, rank, base: base.map(str::to_owned) })
    }
}

/// The order of rows, which the base decides.
struct Rows<'a> {
    path: &'a Path,
    config: Option<&'a Map<String, Value>>,
}

impl Rows<'_> {
    /// By how many heads the rows of a module are reordered; `None` if they are not.
    fn heads(&self, module: &str, dora: bool) -> Result<Option<usize>> {
        let heads = match module.rsplit('.').next() {
            Some("q_proj") => Some(Heads::Query),
            Some("k_proj") => Some(Heads::Key),
            _ => None,
        };
        let biased = heads.is_some() || module.ends_with(".v_proj");
        if heads.is_none() && !(dora && biased) {
            return Ok(None);
        }
        let base = Base::needed(self.path, self.config, || {
            format!("it decides in which order torchtune has the rows of `{module}`")
        })?;
        let class = base.class()?;
        if dora && biased && class == BIASED {
            let (feature, reason) = (
                format!("`{module}` by DoRA"),
                "torchtune scales the layer's \
                 bias too, which transformers' DoRA does not"
                    .to_owned(),
            );
            let features = vec![Unsupported { feature, reason }];
            return Err(Error::Unsupported { path: self.path.to_owned(), features });
        }
        if PAIRED.contains(&class) {
            return heads.map(|heads| base.heads(heads)).transpose();
        }
        if KEPT.contains(&class) {
            return Ok(None);
        }
        let architecture = class.to_owned();
        Err(base.problem(BaseProblem::Architecture { format: FORMAT, architecture }))
    }

    fn misfit(&self, module: &str, tensor: &Tensor, heads: usize) -> Error {
        let (module, rows) = (module.to_owned(), tensor.shape.first().copied().unwrap_or(0));
        let problem = BaseProblem::Heads { module, rows, heads };
        Error::Base { path: self.path.to_owned(), problem }
    }
}

/// The tensors of one module.
#[derive(Default)]
struct Parts {
    factors: FactorTensors,
    magnitude: Option<Tensor>,
}

struct Reader<'a> {
    rows: Rows<'a>,
    config: Config,
    problems: Vec<AdapterProblem>,
    notes: Vec<Note>,
}

impl Reader<'_> {
    fn components(&mut self, tensors: Vec<Tensor>) -> Result<Vec<Component>> {
        let mut modules: BTreeMap<String, Parts> = BTreeMap::new();
        for tensor in tensors {
            let name = tensor.name.clone();
            let found = [A_SUFFIX, B_SUFFIX, MAGNITUDE]
                .into_iter()
                .find_map(|suffix| Some((to_transformers(name.strip_suffix(suffix)?)?, suffix)));
            let Some((module, suffix)) = found else {
                self.problems.push(AdapterProblem::UnusedTensor { tensor: name });
                continue;
            };
            let parts = modules.entry(module).or_default();
            match suffix {
                A_SUFFIX => parts.factors.a = Some(tensor),
                B_SUFFIX => parts.factors.b = Some(tensor),
                _ => parts.magnitude = Some(tensor),
            }
        }
        let mut components = Vec::with_capacity(modules.len());
        for (module, parts) in modules {
            let built = self.low_rank(&module, parts)?;
            components.extend(built.map(|low_rank| {
                let target = Target::weight(module);
                Component { target, form: Form::LowRank(low_rank) }
            }));
        }
        Ok(components)
    }

    fn low_rank(&mut self, module: &str, mut parts: Parts) -> Result<Option<LowRank>> {
        if let Some(heads) = self.rows.heads(module, parts.magnitude.is_some())? {
            for tensor in [&mut parts.factors.b, &mut parts.magnitude].into_iter().flatten() {
                *tensor = rearrange::halved(tensor, heads)
                    .ok_or_else(|| self.rows.misfit(module, tensor, heads))?;
            }
        }
        let name = to_torchtune(module).unwrap_or_else(|| module.to_owned());
        let names = (format!("{name}{A_SUFFIX}"), format!("{name}{B_SUFFIX}"));
        let scaling = Scaling { alpha: self.config.alpha, rule: ScalingRule::AlphaOverRank };
        let built = factors::low_rank(module, parts.factors, names, scaling, &mut self.problems);
        let Some(mut low_rank) = built else { return Ok(None) };
        if let Some(configured) = self.config.rank.filter(|&rank| rank != low_rank.rank()) {
            let (module, stored) = (module.to_owned(), low_rank.rank());
            self.problems.push(AdapterProblem::ConfiguredRank { module, configured, stored });
            return Ok(None);
        }
        if let Some(magnitude) = parts.magnitude {
            let (tensor, dtype) = (magnitude.name.clone(), magnitude.dtype);
            if !dtype.is_merge_float() {
                self.problems.push(AdapterProblem::FactorDtype { tensor, dtype });
                return Ok(None);
            }
            if magnitude.shape != [low_rank.out_features()] {
                let shape = Shape(magnitude.shape);
                let expected = "a magnitude is one value per output feature";
                self.problems.push(AdapterProblem::FactorShape { tensor, shape, expected });
                return Ok(None);
            }
            low_rank.magnitude = Some(magnitude);
        }
        Ok(Some(low_rank))
    }
}

fn to_transformers(name: &str) -> Option<String> {
    if name == HEAD.0 {
        return Some(HEAD.1.to_owned());
    }
    let (number, inner) = numbered(name.strip_prefix("layers.")?)?;
    let (_, module) = LAYER.iter().find(|pair| pair.0 == inner)?;
    Some(format!("model.layers.{number}.{module}"))
}

fn to_torchtune(module: &str) -> Option<String> {
    if module == HEAD.1 {
        return Some(HEAD.0.to_owned());
    }
    let (number, inner) = numbered(module.strip_prefix("model.layers.")?)?;
    let (name, _) = LAYER.iter().find(|pair| pair.1 == inner)?;
    Some(format!("layers.{number}.{name}"))
}

/// A layer's number, in decimal without zeros before it, and what follows the dot.
fn numbered(text: &str) -> Option<(usize, &str)> {
    let (number, inner) = text.split_once('.')?;
    let value: usize = number.parse().ok()?;
    (value < limits::NAMED_INDEX && value.to_string() == number).then_some((value, inner))
}

/// Writes an adapter as a new directory with torchtune's state dict, as safetensors, and its
/// configuration. The same adapter gives the same bytes. If q or k have changes, the base's
/// `config.json` is needed.
///
/// torchtune has one alpha and one rank for all: other scales are multiplied into B (see
/// [`Written`]), and lower ranks filled up with zeros.
///
/// # Errors
/// [`Error::OutputExists`], [`Error::Io`], [`Error::Base`] if the base's configuration is missing or
/// of a model whose order of rows is not known, [`Error::Inexpressible`] for what torchtune has no
/// place for and, unless it is allowed, for what could only be written rounded.
pub fn write_directory(
    adapter: &Adapter,
    destination: &Path,
    options: &WriteOptions,
    overwrite: Overwrite,
    durability: Durability,
) -> Result<Written> {
    let mut writer = Writer { adapter, options, written: Written::default() };
    let (config, tensors) = writer.encode()?;
    let mut text = serde_json::to_string_pretty(&config)
        .map_err(|source| Error::Json { path: destination.to_owned(), source })?;
    text.push('\n');
    let mut metadata = adapter.metadata.clone();
    metadata.push(("format".to_owned(), "pt".to_owned()));
    metadata.sort();
    let header = header_of(&metadata, &tensors);
    let parts: Vec<&[u8]> =
        std::iter::once(header.as_slice()).chain(tensors.iter().map(Tensor::bytes)).collect();
    let staging = atomic::StagedDirectory::create(destination, overwrite)?;
    let inside = |name: &str| staging.path().join(name);
    atomic::write(&inside(SAFETENSORS_FILE), &parts, Overwrite::Never, durability)?;
    atomic::write(&inside(CONFIG_FILE), &[text.as_bytes()], Overwrite::Never, durability)?;
    adapter.ensure_unchanged()?;
    staging.commit(durability)?;
    Ok(writer.written)
}

struct Writer<'a> {
    adapter: &'a Adapter,
    options: &'a WriteOptions,
    written: Written,
}

impl<'a> Writer<'a> {
    fn refuse(&self, what: String) -> Error {
        Error::Inexpressible { path: self.adapter.path.clone(), format: FORMAT, what }
    }

    /// Every component with its name, if torchtune has a place for it.
    fn changes(&self) -> Result<Vec<(&'a str, String, &'a LowRank)>> {
        let mut changes = Vec::with_capacity(self.adapter.components.len());
        for component in &self.adapter.components {
            let target = &component.target;
            let name = to_torchtune(&target.module).filter(|_| target.parameter == "weight");
            match (&component.form, name) {
                (Form::LowRank(low_rank), Some(name))
                    if low_rank.layer == Layer::Linear && low_rank.rank_gain.is_none() =>
                {
                    changes.push((target.module.as_str(), name, low_rank));
                }
                (form, _) => {
                    let what = format!("a change of `{}` by {}", target.name(), form.method());
                    return Err(self.refuse(what));
                }
            }
        }
        if changes.is_empty() {
            return Err(self.refuse("an adapter without components".to_owned()));
        }
        Ok(changes)
    }

    fn encode(&mut self) -> Result<(Value, Vec<Tensor>)> {
        let adapter = self.adapter;
        let changes = self.changes()?;
        let rank = changes.iter().map(|change| change.2.rank()).max().unwrap_or(1);
        let scales: Vec<f64> = changes.iter().map(|change| change.2.scale()).collect();
        let scaling = Scaling {
            alpha: common_scale(&scales) * rank as f64,
            rule: ScalingRule::AlphaOverRank,
        };
        let mut tensors = Vec::with_capacity(2 * changes.len());
        let mut targets = BTreeSet::new();
        let mut names = BTreeSet::new();
        for (module, name, low_rank) in changes {
            if !names.insert(name.clone()) {
                return Err(self.refuse(format!("two changes of `{module}`")));
            }
            targets.extend(module.rsplit('.').next());
            tensors.extend(self.tensors(module, &name, low_rank, (scaling.scale(rank), rank))?);
        }
        sort(&mut tensors);
        let config = json!({
            "base_model_name_or_path": adapter.base.name,
            "lora_alpha": scaling.alpha,
            "peft_type": "LORA",
            "r": rank,
            "target_modules": targets,
        });
        Ok((config, tensors))
    }

    /// The tensors of one change, of the file's scale and rank.
    fn tensors(
        &mut self,
        module: &str,
        name: &str,
        low_rank: &LowRank,
        (unit, rank): (f64, usize),
    ) -> Result<Vec<Tensor>> {
        let scales = (low_rank.scale(), unit);
        let b = folding::fold(module, &low_rank.b, scales, self.options, &mut self.written)
            .map_err(|what| self.refuse(what))?;
        let a = rearrange::padded(&low_rank.a, rank, low_rank.in_features());
        let b = rearrange::padded(&b, low_rank.out_features(), rank);
        let Some((mut a, mut b)) = a.zip(b) else {
            return Err(self.refuse(format!("the factors of `{module}`")));
        };
        if rank > low_rank.rank() {
            let change = format!("`{module}`: zeros make its rank {rank}, the file's, exactly");
            self.written.changes.push(change);
        }
        let mut magnitude = low_rank.magnitude.clone();
        let config = self.options.base_config.as_ref();
        let rows = Rows { path: &self.adapter.path, config };
        if let Some(heads) = rows.heads(module, magnitude.is_some())? {
            for tensor in std::iter::once(&mut b).chain(&mut magnitude) {
                *tensor = rearrange::paired(tensor, heads)
                    .ok_or_else(|| rows.misfit(module, tensor, heads))?;
            }
        }
        a.name = format!("{name}{A_SUFFIX}");
        b.name = format!("{name}{B_SUFFIX}");
        let mut tensors = vec![a, b];
        if let Some(mut magnitude) = magnitude {
            magnitude.name = format!("{name}{MAGNITUDE}");
            tensors.push(magnitude);
        }
        Ok(tensors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_there_and_back() {
        for (name, module) in LAYER {
            let (name, module) = (format!("layers.10.{name}"), format!("model.layers.10.{module}"));
            assert_eq!(to_transformers(&name).as_ref(), Some(&module));
            assert_eq!(to_torchtune(&module), Some(name));
        }
        assert_eq!(to_transformers("output").as_deref(), Some("lm_head"));
        assert_eq!(to_transformers("layers.01.mlp.w1"), None);
        assert_eq!(to_transformers("decoder.layers.1.mlp.w1"), None);
        assert_eq!(to_torchtune("model.embed_tokens"), None);
    }
}
