//! mlx-lm's adapters: a directory with `adapters.safetensors` and `adapter_config.json`.
//!
//! Factors are stored as they multiply a row of inputs: `lora_a` in × rank, `lora_b` rank × out, the
//! transposes of ours; of an embedding, vocabulary × rank and rank × dimension. Of the experts of a
//! layer (`SwitchLinear`) they are stacked, and not transposed: experts × rank × in and experts ×
//! out × rank. One `scale` for all multiplies the product as it is. `m` is DoRA's magnitude; that of
//! an embedding has one value per token, which is another method than PEFT's and is refused.
//! `fine_tune_type` = `full` stores whole parameters.
//!
//! Of the configuration only what the adapter computes with is read: the rest are the arguments of
//! the training program. mlx-lm until May 2024 multiplied `scale` by `alpha / rank`, if
//! `lora_parameters` had an alpha, and now ignores it; where the two differ, the file does not say
//! which was meant.
//!
//! Module names are those of transformers where mlx-lm's models have the same, as nearly all with
//! `model.layers` do; experts are renamed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::base::Base;
use super::{ReadOptions, WriteOptions, Written, existing, folding, rearrange};
use crate::container::TensorFile;
use crate::container::safetensors::{header_of, storage_order};
use crate::error::{AdapterProblem, DetectProblem, Error, Result, Shape, Unsupported};
use crate::factors::{self, FactorTensors};
use crate::fingerprint::BaseIdentity;
use crate::io::atomic::{self, Durability, Overwrite};
use crate::json;
use crate::limits;
use crate::model::{
    Adapter, AdapterFormat, Component, Form, Layer, LowRank, Note, Scaling, ScalingRule, Target,
};
use crate::tensor::Tensor;
use crate::vocabulary;

/// The file names of mlx-lm.
pub const MODEL_FILE: &str = "adapters.safetensors";
/// The configuration.
pub const CONFIG_FILE: &str = "adapter_config.json";

const FORMAT: &str = "mlx";
const A_SUFFIX: &str = ".lora_a";
const B_SUFFIX: &str = ".lora_b";
const M_SUFFIX: &str = ".m";

/// mlx-lm's experts and transformers', by what stands before the number.
const EXPERTS: [(&str, &str); 6] = [
    ("mlp.switch_mlp.gate_proj", "mlp.experts.{}.gate_proj"),
    ("mlp.switch_mlp.up_proj", "mlp.experts.{}.up_proj"),
    ("mlp.switch_mlp.down_proj", "mlp.experts.{}.down_proj"),
    ("block_sparse_moe.switch_mlp.gate_proj", "block_sparse_moe.experts.{}.w1"),
    ("block_sparse_moe.switch_mlp.up_proj", "block_sparse_moe.experts.{}.w3"),
    ("block_sparse_moe.switch_mlp.down_proj", "block_sparse_moe.experts.{}.w2"),
];

/// Whether a directory holds mlx-lm's files.
pub(super) fn is_mlx_directory(directory: &Path) -> bool {
    existing(directory, MODEL_FILE).is_some()
}

/// Whether a file holds mlx-lm's factors.
pub(super) fn is_mlx(file: &TensorFile) -> bool {
    file.any_name(|name| name.ends_with(A_SUFFIX) || name.ends_with(B_SUFFIX))
        || file.path.file_name().is_some_and(|name| name == MODEL_FILE)
}

/// Reads a directory.
pub(super) fn read_directory(directory: &Path, options: &ReadOptions) -> Result<Adapter> {
    let Some(model) = existing(directory, MODEL_FILE) else {
        let problem = DetectProblem::NoAdapter;
        return Err(Error::Unrecognised { path: directory.to_owned(), problem });
    };
    let mut adapter = read(TensorFile::open(&model)?, options)?;
    adapter.path = directory.to_owned();
    Ok(adapter)
}

/// Reads the tensors with the configuration beside them, or with the user's alpha.
pub(super) fn read(file: TensorFile, options: &ReadOptions) -> Result<Adapter> {
    let path = file.path.clone();
    let meaningless = |option, reason| Error::Meaningless { path: path.clone(), option, reason };
    if options.residual_base {
        return Err(meaningless("residual base", "mlx-lm never changes the base"));
    }
    if options.enable_lora.is_some() {
        return Err(meaningless("enable_lora", "only loralib has fused projections"));
    }
    let mut notes = Vec::new();
    let config = existing(atomic::parent_of(&path), CONFIG_FILE);
    let (config, fields) = match (&config, options.alpha) {
        (Some(_), Some(_)) => {
            return Err(meaningless("alpha", "the configuration gives the scale"));
        }
        (Some(config), None) => Config::read(
            config,
            &json::read_object(config, limits::CONFIG_BYTES)?,
            options,
            &mut notes,
        )?,
        (None, Some(alpha)) => {
            notes.push(Note::AlphaGiven { alpha: alpha.to_string() });
            let scaling = Scaling { alpha, rule: ScalingRule::AlphaOverRank };
            (Config { kind: Kind::Lora, scaling, rank: None }, None)
        }
        (None, None) => return Err(Error::AlphaUnknown { path }),
    };
    let metadata = file.own_metadata();
    let mut reader = Reader {
        config,
        components: Vec::new(),
        problems: Vec::new(),
        features: Vec::new(),
        notes,
    };
    match reader.config.kind {
        Kind::Full => reader.read_whole(file.tensors),
        Kind::Lora | Kind::Dora => reader.read_factors(file.tensors),
    }
    if !reader.features.is_empty() {
        return Err(Error::Unsupported { path, features: reader.features });
    }
    if !reader.problems.is_empty() {
        return Err(Error::Adapter { path, problems: reader.problems });
    }
    let base = BaseIdentity { name: fields, revision: None, fingerprint: None };
    let mut adapter = Adapter::new(path, reader.components, base);
    adapter.format = AdapterFormat::Mlx;
    adapter.metadata = metadata;
    adapter.notes = reader.notes;
    Ok(adapter)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Lora,
    Dora,
    Full,
}

/// What the configuration says that the adapter computes with.
struct Config {
    kind: Kind,
    scaling: Scaling,
    rank: Option<usize>,
}

impl Config {
    /// The configuration, and the base's name.
    fn read(
        path: &Path,
        fields: &Map<String, Value>,
        options: &ReadOptions,
        notes: &mut Vec<Note>,
    ) -> Result<(Config, Option<String>)> {
        let name = fields.get("model").and_then(Value::as_str).filter(|name| !name.is_empty());
        let name = name.map(str::to_owned);
        let kind = Config::kind(path, fields)?;
        if kind == Kind::Full {
            let scaling = Scaling { alpha: 1.0, rule: ScalingRule::Direct };
            return Ok((Config { kind, scaling, rank: None }, name));
        }
        let parameters = match fields.get("lora_parameters") {
            Some(Value::Object(parameters)) => parameters,
            other => {
                let other = other.unwrap_or(&Value::Null);
                return Err(Error::config(path, "lora_parameters", "an object", other));
            }
        };
        let number = |field: &str| {
            let value = parameters.get(field).unwrap_or(&Value::Null);
            let number = value.as_f64().filter(|number| number.is_finite());
            let name = format!("lora_parameters.{field}");
            number.ok_or_else(|| Error::config(path, &name, "a number", value))
        };
        let (scale, rank) = (number("scale")?, number("rank")?);
        if rank.fract() != 0.0 || !(1.0..=limits::RANK as f64).contains(&rank) {
            let found = parameters.get("rank").unwrap_or(&Value::Null);
            return Err(Error::config(path, "lora_parameters.rank", "a whole number", found));
        }
        let mut features = Vec::new();
        for (field, value) in parameters {
            let reason = match field.as_str() {
                "rank" | "scale" | "dropout" | "keys" => continue,
                "alpha" if value.as_f64() == Some(rank) => continue,
                "alpha" => {
                    "mlx-lm multiplied the scale by alpha / rank until May 2024 and ignores alpha \
                     now; which was meant, the file does not say"
                }
                _ => "an unknown field",
            };
            if options.ignore_fields.iter().any(|ignored| ignored == field) {
                notes.push(Note::IgnoredField { field: field.clone() });
                continue;
            }
            let feature = format!("lora_parameters.{field} = {}", json::brief(value));
            features.push(Unsupported { feature, reason: reason.to_owned() });
        }
        if !features.is_empty() {
            return Err(Error::Unsupported { path: path.to_owned(), features });
        }
        let scaling = Scaling { alpha: scale, rule: ScalingRule::Direct };
        Ok((Config { kind, scaling, rank: Some(rank as usize) }, name))
    }

    fn kind(path: &Path, fields: &Map<String, Value>) -> Result<Kind> {
        const FIELD: &str = "fine_tune_type";
        match fields.get(FIELD) {
            // Before there were types, DoRA was a flag.
            None => {
                let dora = fields.get("use_dora").and_then(Value::as_bool).unwrap_or(false);
                Ok(if dora { Kind::Dora } else { Kind::Lora })
            }
            Some(value) => match value.as_str() {
                Some("lora") => Ok(Kind::Lora),
                Some("dora") => Ok(Kind::Dora),
                Some("full") => Ok(Kind::Full),
                _ => Err(Error::config(path, FIELD, "`lora`, `dora` or `full`", value)),
            },
        }
    }
}

/// The tensors of one module.
#[derive(Default)]
struct Parts {
    factors: FactorTensors,
    magnitude: Option<Tensor>,
}

struct Reader {
    config: Config,
    components: Vec<Component>,
    problems: Vec<AdapterProblem>,
    features: Vec<Unsupported>,
    notes: Vec<Note>,
}

impl Reader {
    /// Parameters that were trained in full.
    fn read_whole(&mut self, tensors: Vec<Tensor>) {
        for tensor in tensors {
            let Some((module, parameter)) = tensor.name.rsplit_once('.') else {
                self.problems.push(AdapterProblem::UnusedTensor { tensor: tensor.name });
                continue;
            };
            // mlx-lm stacks experts and turns the kernels of convolutions; a quantised base has
            // `scales` and `biases` beside its weights.
            let known = tensor.shape.len() <= 2
                && matches!(parameter, "weight" | "bias")
                && tensor.dtype.is_merge_float();
            if !known {
                let (feature, reason) = (
                    tensor.name,
                    "a whole parameter whose layout in \
                     transformers is not known"
                        .to_owned(),
                );
                self.features.push(Unsupported { feature, reason });
                continue;
            }
            let target = Target { module: module.to_owned(), parameter: parameter.to_owned() };
            self.components.push(Component { target, form: Form::Replaced(tensor) });
        }
    }

    fn read_factors(&mut self, tensors: Vec<Tensor>) {
        let mut modules: BTreeMap<String, Parts> = BTreeMap::new();
        for tensor in tensors {
            let name = tensor.name.clone();
            let found = [A_SUFFIX, B_SUFFIX, M_SUFFIX]
                .into_iter()
                .find_map(|suffix| Some((name.strip_suffix(suffix)?.to_owned(), suffix)));
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
        for (module, parts) in modules {
            if experts_of(&module).is_some() {
                self.push_experts(&module, parts);
            } else {
                self.push_layer(module, parts);
            }
        }
    }

    fn build(&mut self, module: &str, layer: Layer, found: FactorTensors) -> Option<LowRank> {
        let names = (format!("{module}{A_SUFFIX}"), format!("{module}{B_SUFFIX}"));
        let scaling = self.config.scaling;
        let built = factors::of_layer(module, layer, found, names, scaling, &mut self.problems)?;
        if let Some(configured) = self.config.rank.filter(|&rank| rank != built.rank()) {
            let (module, stored) = (module.to_owned(), built.rank());
            self.problems.push(AdapterProblem::ConfiguredRank { module, configured, stored });
            return None;
        }
        Some(built)
    }

    fn push_layer(&mut self, module: String, parts: Parts) {
        let is_embedding = vocabulary::is_input_embedding(&format!("{module}.weight"));
        let layer = if is_embedding { Layer::Embedding } else { Layer::Linear };
        // What is no matrix stays, and is refused as such.
        let turned = |it: Tensor| rearrange::transposed(&it).unwrap_or(it);
        let FactorTensors { a, b } = parts.factors;
        let found = FactorTensors { a: a.map(turned), b: b.map(turned) };
        let Some(mut low_rank) = self.build(&module, layer, found) else { return };
        let missing = || format!("{module}{M_SUFFIX}");
        match (self.config.kind, parts.magnitude) {
            (Kind::Dora, Some(m)) if is_embedding => {
                let reason = "DoRA of an embedding as mlx-lm has it, with one magnitude per token";
                self.features.push(Unsupported { feature: m.name, reason: reason.to_owned() });
                return;
            }
            (Kind::Dora, Some(m)) if m.shape == [low_rank.out_features()] => {
                if !m.dtype.is_merge_float() {
                    let (tensor, dtype) = (m.name, m.dtype);
                    self.problems.push(AdapterProblem::FactorDtype { tensor, dtype });
                    return;
                }
                low_rank.magnitude = Some(m);
            }
            (Kind::Dora, Some(m)) => {
                let (tensor, shape) = (m.name, Shape(m.shape));
                let expected = "a magnitude is one value per output feature";
                self.problems.push(AdapterProblem::FactorShape { tensor, shape, expected });
                return;
            }
            (Kind::Dora, None) => {
                let (present, missing) = (format!("{module}{A_SUFFIX}"), missing());
                self.problems.push(AdapterProblem::MissingFactor { present, missing });
                return;
            }
            (_, Some(m)) => {
                self.problems.push(AdapterProblem::UnusedTensor { tensor: m.name });
                return;
            }
            (_, None) => {}
        }
        let target = Target::weight(module);
        self.components.push(Component { target, form: Form::LowRank(low_rank) });
    }

    fn push_experts(&mut self, module: &str, parts: Parts) {
        let FactorTensors { a: Some(a), b: Some(b) } = &parts.factors else {
            self.build(module, Layer::Linear, parts.factors);
            return;
        };
        if let Some(m) = parts.magnitude {
            self.problems.push(AdapterProblem::UnusedTensor { tensor: m.name });
            return;
        }
        let three = a.shape.len() == 3 && b.shape.len() == 3 && a.shape.first() == b.shape.first();
        let stacks =
            if three { rearrange::unstacked(a).zip(rearrange::unstacked(b)) } else { None };
        let Some((all_a, all_b)) = stacks else {
            let (tensor, shape) = (a.name.clone(), Shape(a.shape.clone()));
            let expected = "A of experts is experts × rank × in, and B experts × out × rank";
            self.problems.push(AdapterProblem::FactorShape { tensor, shape, expected });
            return;
        };
        let Some((before, after)) = experts_of(module) else { return };
        for (expert, (a, b)) in all_a.into_iter().zip(all_b).enumerate() {
            let name = format!("{before}{expert}{after}");
            let found = FactorTensors { a: Some(a), b: Some(b) };
            let Some(low_rank) = self.build(&name, Layer::Linear, found) else { return };
            let target = Target::weight(name);
            self.components.push(Component { target, form: Form::LowRank(low_rank) });
        }
    }
}

/// What stands before and after the expert's number in transformers' name for mlx-lm's module.
fn experts_of(module: &str) -> Option<(String, &'static str)> {
    EXPERTS.iter().find_map(|(stacked, name)| {
        let outer = module.strip_suffix(stacked).filter(|it| it.ends_with('.'))?;
        let (before, after) = name.split_once("{}")?;
        Some((format!("{outer}{before}"), after))
    })
}

/// mlx-lm's module for one of transformers', and the number of the expert.
fn place(module: &str) -> (String, Option<usize>) {
    let found = EXPERTS.iter().find_map(|(stacked, name)| {
        let (before, after) = name.split_once("{}")?;
        let (outer, number) = module.strip_suffix(after)?.rsplit_once(before)?;
        let expert: usize = number.parse().ok()?;
        let known =
            outer.ends_with('.') && expert < limits::NAMED_INDEX && expert.to_string() == number;
        known.then(|| (format!("{outer}{stacked}"), Some(expert)))
    });
    found.unwrap_or_else(|| (module.to_owned(), None))
}

/// Writes an adapter as a new directory for mlx-lm. The same adapter gives the same bytes. Without
/// the base's `config.json`, `num_layers` is −1, which means all; an adapter of a layer that has
/// none acts as if it were not there.
///
/// mlx-lm has one scale and one rank for all: other scales are multiplied into B (see [`Written`]),
/// and lower ranks filled up with zeros.
///
/// # Errors
/// [`Error::OutputExists`], [`Error::Io`], [`Error::Inexpressible`] for what mlx-lm has no place for
/// and, unless it is allowed, for what could only be written rounded.
pub fn write_directory(
    adapter: &Adapter,
    destination: &Path,
    options: &WriteOptions,
    overwrite: Overwrite,
    durability: Durability,
) -> Result<Written> {
    let mut writer = Writer { adapter, options, written: Written::default() };
    let whole = |component: &Component| matches!(component.form, Form::Replaced(_));
    let full = !adapter.components.is_empty() && adapter.components.iter().all(whole);
    let (config, tensors) = if full { writer.whole()? } else { writer.factors()? };
    let mut text = serde_json::to_string_pretty(&config)
        .map_err(|source| Error::Json { path: destination.to_owned(), source })?;
    text.push('\n');
    let mut metadata = adapter.metadata.clone();
    metadata.push(("format".to_owned(), "mlx".to_owned()));
    metadata.sort();
    let parts = header_of(&metadata, &tensors);
    let parts: Vec<&[u8]> =
        std::iter::once(parts.as_slice()).chain(tensors.iter().map(Tensor::bytes)).collect();
    let staging = atomic::StagedDirectory::create(destination, overwrite)?;
    let inside = |name: &str| -> PathBuf { staging.path().join(name) };
    atomic::write(&inside(MODEL_FILE), &parts, Overwrite::Never, durability)?;
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

/// The factors of every expert of one module, or of the module itself.
type Group = BTreeMap<Option<usize>, (Tensor, Tensor)>;

impl<'a> Writer<'a> {
    fn refuse(&self, what: String) -> Error {
        Error::Inexpressible { path: self.adapter.path.clone(), format: FORMAT, what }
    }

    fn refuse_form(&self, component: &Component) -> Error {
        let (name, method) = (component.target.name(), component.form.method());
        self.refuse(format!("a change of `{name}` by {method}"))
    }

    /// The last layers that have a change, as far as it is known how many there are.
    fn layers<'m>(&self, modules: impl Iterator<Item = &'m str>) -> Result<i64> {
        let first = modules.filter_map(|module| Some(layer_of(module)?.0)).min();
        let (Some(config), Some(first)) = (&self.options.base_config, first) else { return Ok(-1) };
        let base = Base::needed(&self.adapter.path, Some(config), String::new)?;
        let count = base.count("num_hidden_layers")?.filter(|&count| count > first);
        Ok(count.map_or(-1, |count| (count - first) as i64))
    }

    fn whole(&mut self) -> Result<(Value, Vec<Tensor>)> {
        let mut tensors = Vec::with_capacity(self.adapter.components.len());
        for component in &self.adapter.components {
            let target = &component.target;
            let known = place(&target.module).1.is_none()
                && !target.module.is_empty()
                && matches!(target.parameter.as_str(), "weight" | "bias");
            match &component.form {
                Form::Replaced(tensor)
                    if known && tensor.shape.len() <= 2 && tensor.dtype.is_merge_float() =>
                {
                    let mut tensor = tensor.clone();
                    tensor.name = target.name();
                    tensors.push(tensor);
                }
                _ => return Err(self.refuse_form(component)),
            }
        }
        sort(&mut tensors);
        let modules = self.adapter.components.iter().map(|it| it.target.module.as_str());
        let layers = self.layers(modules)?;
        Ok((self.config("full", layers, Value::Null), tensors))
    }

    fn config(&self, kind: &str, layers: i64, parameters: Value) -> Value {
        json!({
            "fine_tune_type": kind,
            "lora_parameters": parameters,
            "model": self.adapter.base.name,
            "num_layers": layers,
        })
    }

    fn factors(&mut self) -> Result<(Value, Vec<Tensor>)> {
        let adapter = self.adapter;
        let changes = self.changes()?;
        let dora = changes.iter().filter(|change| change.1.magnitude.is_some()).count();
        if dora != 0 && dora != changes.len() {
            return Err(self.refuse("DoRA of some modules and plain LoRA of others".to_owned()));
        }
        let scales: Vec<f64> = changes.iter().map(|change| change.1.scale()).collect();
        let scale = common_scale(&scales);
        let rank = changes.iter().map(|change| change.1.rank()).max().unwrap_or(1);
        let mut groups: BTreeMap<String, Group> = BTreeMap::new();
        let mut tensors = Vec::new();
        for (module, low_rank) in &changes {
            let (stacked, expert) = place(module);
            let pair = self.pair(module, low_rank, scale, rank)?;
            if groups.entry(stacked).or_default().insert(expert, pair).is_some() {
                return Err(self.refuse(format!("two changes of `{module}`")));
            }
            if let Some(m) = &low_rank.magnitude {
                let mut m = m.clone();
                m.name = format!("{module}{M_SUFFIX}");
                tensors.push(m);
            }
        }
        let keys: BTreeSet<String> = groups
            .keys()
            .map(|module| layer_of(module).map_or(module.as_str(), |it| it.1).to_owned())
            .collect();
        for (module, group) in groups {
            let (mut a, mut b) = self.laid_out(&module, &group)?;
            a.name = format!("{module}{A_SUFFIX}");
            b.name = format!("{module}{B_SUFFIX}");
            tensors.extend([a, b]);
        }
        sort(&mut tensors);
        let modules = adapter.components.iter().map(|it| it.target.module.as_str());
        let layers = self.layers(modules)?;
        let parameters = json!({ "dropout": 0.0, "keys": keys, "rank": rank, "scale": scale });
        let kind = if dora > 0 { "dora" } else { "lora" };
        Ok((self.config(kind, layers, parameters), tensors))
    }

    /// Every component, if mlx-lm has a place for it.
    fn changes(&self) -> Result<Vec<(&'a str, &'a LowRank)>> {
        let mut changes = Vec::with_capacity(self.adapter.components.len());
        for component in &self.adapter.components {
            let target = &component.target;
            let is_embedding = vocabulary::is_input_embedding(&target.name());
            let layer = if is_embedding { Layer::Embedding } else { Layer::Linear };
            match &component.form {
                Form::LowRank(low_rank)
                    if target.parameter == "weight"
                        && low_rank.rank_gain.is_none()
                        && low_rank.layer == layer
                        && (low_rank.magnitude.is_none()
                            || (!is_embedding && place(&target.module).1.is_none())) =>
                {
                    changes.push((target.module.as_str(), low_rank));
                }
                _ => return Err(self.refuse_form(component)),
            }
        }
        if changes.is_empty() {
            return Err(self.refuse("an adapter without components".to_owned()));
        }
        Ok(changes)
    }

    /// A and B, of the file's scale and rank.
    fn pair(
        &mut self,
        module: &str,
        low_rank: &LowRank,
        unit: f64,
        rank: usize,
    ) -> Result<(Tensor, Tensor)> {
        let scales = (low_rank.scale(), unit);
        let b = folding::fold(module, &low_rank.b, scales, self.options, &mut self.written)
            .map_err(|what| self.refuse(what))?;
        let a = rearrange::padded(&low_rank.a, rank, low_rank.in_features());
        let b = rearrange::padded(&b, low_rank.out_features(), rank);
        if rank > low_rank.rank() {
            let change = format!("`{module}`: zeros make its rank {rank}, the file's, exactly");
            self.written.changes.push(change);
        }
        a.zip(b).ok_or_else(|| self.refuse(format!("the factors of `{module}`")))
    }

    /// The tensors of one module as mlx-lm stores them.
    fn laid_out(&self, module: &str, group: &Group) -> Result<(Tensor, Tensor)> {
        let refuse = || self.refuse(format!("the factors of `{module}`"));
        if let Some((a, b)) = group.get(&None) {
            return rearrange::transposed(a).zip(rearrange::transposed(b)).ok_or_else(refuse);
        }
        let complete = group.keys().flatten().enumerate().all(|(index, &expert)| index == expert);
        if !complete {
            return Err(self.refuse(format!("changes of some of the experts of `{module}`")));
        }
        let (all_a, all_b): (Vec<Tensor>, Vec<Tensor>) = group.values().cloned().unzip();
        rearrange::stacked(module.to_owned(), &all_a)
            .zip(rearrange::stacked(module.to_owned(), &all_b))
            .ok_or_else(refuse)
    }
}

/// The one of an adapter's scales that leaves the fewest others to multiply into B.
pub(super) fn common_scale(scales: &[f64]) -> f64 {
    /// How many are tried.
    const TRIED: usize = 16;
    let mut counts: BTreeMap<u64, usize> = BTreeMap::new();
    for scale in scales.iter().filter(|scale| **scale != 0.0) {
        *counts.entry(scale.to_bits()).or_default() += 1;
    }
    let order: BTreeSet<(std::cmp::Reverse<usize>, u64)> =
        counts.into_iter().map(|(bits, count)| (std::cmp::Reverse(count), bits)).collect();
    let tried: Vec<f64> =
        order.into_iter().take(TRIED).map(|entry| f64::from_bits(entry.1)).collect();
    let candidates: Vec<Vec<f64>> = tried.iter().map(|&scale| vec![scale; scales.len()]).collect();
    let chosen = folding::choose(scales, &candidates).and_then(|index| tried.get(index));
    chosen.copied().unwrap_or(1.0)
}

/// The number of a module's layer, and its name within.
fn layer_of(module: &str) -> Option<(usize, &str)> {
    let rest = match module.split_once(".layers.") {
        Some((_, rest)) => rest,
        None => module.strip_prefix("layers.")?,
    };
    let (number, inner) = rest.split_once('.')?;
    Some((number.parse().ok()?, inner))
}

/// In the order of a serialiser.
pub(super) fn sort(tensors: &mut [Tensor]) {
    tensors.sort_by(|x, y| storage_order((x.dtype, &x.name), (y.dtype, &y.name)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_are_renamed() {
        let module = "model.layers.3.block_sparse_moe.experts.11.w2";
        let stacked = "model.layers.3.block_sparse_moe.switch_mlp.down_proj";
        assert_eq!(place(module), (stacked.to_owned(), Some(11)));
        let before = "model.layers.3.block_sparse_moe.experts.".to_owned();
        assert_eq!(experts_of(stacked), Some((before, ".w2")));
        let other = "model.layers.3.mlp.experts.01.up_proj";
        assert_eq!(place(other), (other.to_owned(), None));
        assert_eq!(experts_of("model.layers.3.mlp.gate_proj"), None);
    }

    #[test]
    fn layers_are_counted() {
        assert_eq!(layer_of("model.layers.3.mlp.up_proj"), Some((3, "mlp.up_proj")));
        assert_eq!(layer_of("layers.3.mlp.up_proj"), Some((3, "mlp.up_proj")));
        assert_eq!(layer_of("lm_head"), None);
    }

    #[test]
    fn one_scale_for_all() {
        assert_eq!(common_scale(&[2.0, 2.0, 4.0]), 2.0);
        assert_eq!(
            common_scale(&[3.0, 3.0, 2.0, 4.0, 1.0]),
            1.0,
            "two are inexact, of 2 and 4 as well"
        );
        assert_eq!(common_scale(&[0.0]), 1.0);
    }
}
