//! [`Adapter`] → file. The same adapter gives the same bytes, always.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::components::{self, Factored, Role};
use super::config::{
    BaseConfig, Config, FingerprintConfig, FormGroup, Override, ScalingConfig, SourceField,
    TargetConfig,
};
use super::forms::{self, Parts, SHARED};
use super::{CONFIG_KEY, VERSION, shapes, validate};
use crate::container::safetensors::{Declared, encode_header, storage_order};
use crate::dtype::Dtype;
use crate::error::{AdapterProblem, Error, Result};
use crate::factors::{self, FactorTensors};
use crate::fingerprint::ALGORITHM;
use crate::io::atomic::{AtomicFile, Durability, Overwrite};
use crate::model::{Adapter, Component, Form, Layer, LowRank, Scaling, Target};
use crate::tensor::Tensor;

/// This format, as messages name it.
pub const FORMAT: &str = "format version 1.0";

/// Writes an adapter as one file, complete or not at all.
///
/// # Errors
/// [`Error::OutputExists`], [`Error::Io`], [`Error::Inexpressible`] for a component the format
/// cannot hold, [`Error::Adapter`] for tensors that do not form the component that they are in, or
/// a scale that no `.alpha` tensor can hold.
pub fn write(
    adapter: &Adapter,
    destination: &Path,
    overwrite: Overwrite,
    durability: Durability,
) -> Result<()> {
    let (header, tensors) = encode(adapter)?;
    let mut parts: Vec<&[u8]> = vec![&header];
    parts.extend(tensors.iter().map(OutputTensor::bytes));
    let output = AtomicFile::create(destination, overwrite)?;
    output.write_parts(&parts)?;
    adapter.ensure_unchanged()?;
    output.commit(durability)
}

/// A tensor as it will be stored.
#[derive(Debug)]
pub struct OutputTensor<'a> {
    name: String,
    dtype: Dtype,
    shape: Cow<'a, [usize]>,
    data: Cow<'a, [u8]>,
}

impl<'a> OutputTensor<'a> {
    /// The stored bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.data
    }

    fn of(name: String, tensor: &'a Tensor) -> OutputTensor<'a> {
        let (shape, data) = (Cow::from(&*tensor.shape), Cow::from(tensor.bytes()));
        OutputTensor { name, dtype: tensor.dtype, shape, data }
    }

    fn made(name: String, dtype: Dtype, shape: Vec<usize>, bytes: Vec<u8>) -> OutputTensor<'a> {
        OutputTensor { name, dtype, shape: shape.into(), data: bytes.into() }
    }
}

/// The file's first bytes, up to its data, and the tensors that follow, in order.
///
/// # Errors
/// As [`write()`], less the file system's.
pub fn encode(adapter: &Adapter) -> Result<(Vec<u8>, Vec<OutputTensor<'_>>)> {
    let sound = sound(adapter)?;
    let tensors = lay_out(&sound);
    let mut digest = Sha256::new();
    for tensor in &tensors {
        digest.update(tensor.bytes());
    }
    let config = describe(adapter, &sound, &hexadecimal(&digest.finalize()))?;
    let text = serde_json::to_string(&config)
        .map_err(|source| Error::Json { path: adapter.path.clone(), source })?;
    // `format: pt` is what transformers demands of any safetensors file.
    let mut metadata = vec![("format".to_owned(), "pt".to_owned()), (CONFIG_KEY.to_owned(), text)];
    let own = ["format", CONFIG_KEY];
    metadata.extend(adapter.metadata.iter().filter(|entry| !own.contains(&&*entry.0)).cloned());
    metadata.sort();
    let declared = tensors.iter().map(|tensor| Declared {
        name: &tensor.name,
        dtype: tensor.dtype,
        shape: &tensor.shape,
        bytes: tensor.bytes().len() as u64,
    });
    Ok((encode_header(&metadata, declared), tensors))
}

/// Whether the format can hold every component of an adapter, and the file could be read again.
///
/// # Errors
/// [`Error::Inexpressible`] with the first component that the format has no names for,
/// [`Error::Adapter`] for tensors that do not form the component that they are in.
pub fn check(adapter: &Adapter) -> Result<()> {
    sound(adapter).map(drop)
}

/// What is to be written.
struct Sound<'a> {
    /// The components, sorted.
    components: Vec<&'a Component>,
    /// The pairs of factors that components share, each once, in the order of the components.
    shared: Vec<[&'a Tensor; 2]>,
}

impl<'a> Sound<'a> {
    fn of(adapter: &'a Adapter) -> Sound<'a> {
        let mut components: Vec<&Component> = adapter.components.iter().collect();
        components.sort_by(|x, y| x.compare(y));
        let mut shared = Vec::new();
        for pair in components.iter().filter_map(|component| shared_pair(&component.form)) {
            if !shared.iter().any(|known| same_pair(*known, pair)) {
                shared.push(pair);
            }
        }
        Sound { components, shared }
    }

    /// The number of the factors that a component shares.
    fn factors(&self, form: &Form) -> Option<usize> {
        let pair = shared_pair(form)?;
        self.shared.iter().position(|known| same_pair(*known, pair))
    }
}

/// The factors of VeRA, which components share.
fn shared_pair(form: &Form) -> Option<[&Tensor; 2]> {
    match form {
        Form::Shared(form) => Some([&form.a, &form.b]),
        Form::Decomposed(form) => shared_pair(&form.change),
        _ => None,
    }
}

fn same_pair(first: [&Tensor; 2], second: [&Tensor; 2]) -> bool {
    let same = |x: &Tensor, y: &Tensor| {
        (x.dtype, &x.shape) == (y.dtype, &y.shape)
            && (std::ptr::eq(x.bytes(), y.bytes()) || x.bytes() == y.bytes())
    };
    same(first[0], second[0]) && same(first[1], second[1])
}

/// The components, if the format can hold them all.
fn sound(adapter: &Adapter) -> Result<Sound<'_>> {
    let refuse = |what| Error::Inexpressible { path: adapter.path.clone(), format: FORMAT, what };
    if adapter.components.is_empty() {
        return Err(refuse("an adapter without components".to_owned()));
    }
    if let Some(Component { target, form }) =
        adapter.components.iter().find(|component| !components::is_held(component))
    {
        return Err(refuse(format!("a change of `{}` by {}", target.name(), form.method())));
    }
    if let Some(format) = adapter.names.filter(|format| !format.has_naming()) {
        return Err(refuse(format!(
            "names as those of {format}, which spells none in its own way"
        )));
    }
    let source = adapter.source.as_ref().map(|source| source.format);
    if let Some(format) = source.filter(|format| !format.has_configuration()) {
        return Err(refuse(format!("a configuration of {format}, which has none")));
    }
    let sound = Sound::of(adapter);
    let mut problems = components::clashes(&sound.components);
    for Component { target, form } in sound.components.iter().copied() {
        match form {
            Form::Rows { indices, rows } => {
                let name = Role::Rows.name(target);
                problems.extend(validate::rows(&name, rows));
                let count = rows.shape.first().copied().unwrap_or(0);
                problems.extend(validate::indices(&Role::Indices.name(target), indices, count));
            }
            Form::Added { tensor, scale } => {
                problems.extend(validate::float(&Role::Added.name(target), tensor));
                problems.extend(validate::scale(&target.name(), *scale));
            }
            form => match Factored::of(form) {
                Some(factored) => check_low_rank(target, factored, &mut problems),
                None => problems.extend(check_form(target, form, sound.factors(form))),
            },
        }
    }
    if problems.is_empty() {
        Ok(sound)
    } else {
        Err(Error::Adapter { path: adapter.path.clone(), problems })
    }
}

/// What is wrong with a form that has roles of its own.
fn check_form(target: &Target, form: &Form, factors: Option<usize>) -> Vec<AdapterProblem> {
    let Some(parts) = forms::take_apart(form) else { return Vec::new() };
    let name = |role: &str| components::form_tensor(target, parts.label, factors, role);
    let problems = shapes::check(&target.name(), parts.label.form, &parts.tensors, &name);
    if problems.is_empty() { forms::check(target, form, &name) } else { problems }
}

fn check_low_rank(target: &Target, factored: Factored<'_>, problems: &mut Vec<AdapterProblem>) {
    let low_rank = factored.low_rank;
    let [a, b] = factored.roles(target).map(|role| role.name(target));
    let named = |tensor: &Tensor, name: &String| {
        let mut tensor = tensor.clone();
        tensor.name.clone_from(name);
        Some(tensor)
    };
    let factors = FactorTensors { a: named(&low_rank.a, &a), b: named(&low_rank.b, &b) };
    let (module, scaling) = (components::short_name(target), low_rank.scaling);
    let told = matches!(low_rank.layer, Layer::Embedding | Layer::Merged);
    if !told && components::layer_of(&low_rank.a) != low_rank.layer {
        problems.extend(validate::layer(&a, &low_rank.a));
        return;
    }
    let built =
        factors::of_layer(&module, low_rank.layer, factors, (a, b), scaling, &mut *problems);
    if built.is_none() {
        return;
    }
    for (role, gain) in factored.gains() {
        problems.extend(validate::gain(role, &role.name(target), gain, low_rank));
    }
    if factored.is_plain(target) && !naive_alpha(scaling, low_rank.rank()).is_finite() {
        let value = low_rank.scale() * low_rank.rank() as f64;
        problems.push(AdapterProblem::AlphaRange { module, value });
    }
}

/// The tensors of every component, in storage order.
fn lay_out<'a>(sound: &Sound<'a>) -> Vec<OutputTensor<'a>> {
    let mut tensors = Vec::with_capacity(sound.components.len() * 3);
    for (number, pair) in sound.shared.iter().enumerate() {
        for (factor, tensor) in ["A", "B"].into_iter().zip(pair) {
            tensors.push(OutputTensor::of(components::shared_name(number, factor), tensor));
        }
    }
    for Component { target, form } in sound.components.iter().copied() {
        lay_out_component(target, form, &mut tensors);
    }
    tensors.sort_by(|x, y| storage_order((x.dtype, &x.name), (y.dtype, &y.name)));
    tensors
}

fn lay_out_component<'a>(target: &Target, form: &'a Form, tensors: &mut Vec<OutputTensor<'a>>) {
    let mut of = |role: Role, tensor| tensors.push(OutputTensor::of(role.name(target), tensor));
    match form {
        Form::Replaced(tensor) => of(Role::Value, tensor),
        Form::Base(tensor) => of(Role::Base, tensor),
        Form::Rows { indices, rows } => {
            of(Role::Rows, rows);
            let bytes: Vec<u8> = indices.iter().flat_map(|it| it.to_le_bytes()).collect();
            let (name, shape) = (Role::Indices.name(target), vec![indices.len()]);
            tensors.push(OutputTensor::made(name, Dtype::I64, shape, bytes));
        }
        Form::Added { tensor, scale } => {
            of(Role::Added, tensor);
            let (name, bytes) = (Role::Scale.name(target), scale.to_le_bytes().to_vec());
            tensors.push(OutputTensor::made(name, Dtype::F64, Vec::new(), bytes));
        }
        form => match (Factored::of(form), forms::take_apart(form)) {
            (Some(factored), _) => {
                let [a, b] = factored.roles(target);
                of(a, &factored.low_rank.a);
                of(b, &factored.low_rank.b);
                factored.gains().for_each(|(role, gain)| of(role, gain));
                if factored.is_plain(target) {
                    let LowRank { scaling, .. } = *factored.low_rank;
                    let alpha = naive_alpha(scaling, factored.low_rank.rank());
                    let (name, bytes) = (Role::Alpha.name(target), alpha.to_le_bytes().to_vec());
                    tensors.push(OutputTensor::made(name, Dtype::F32, Vec::new(), bytes));
                }
            }
            (None, Some(parts)) => {
                let is_shared = |role| parts.label.form == SHARED && matches!(role, "A" | "B");
                for (role, tensor) in parts.tensors.iter().filter(|entry| !is_shared(entry.0)) {
                    of(Role::Of(parts.label, role), tensor);
                }
            }
            // Refused before.
            (None, None) => {}
        },
    }
}

/// The value of the `.alpha` tensor: what a loader that computes `alpha / rank` must find.
pub(super) fn naive_alpha(scaling: Scaling, rank: usize) -> f32 {
    (scaling.scale(rank) * rank as f64) as f32
}

fn describe(adapter: &Adapter, sound: &Sound<'_>, digest: &str) -> Result<Config> {
    let (scaling, overrides) = scalings(sound);
    Ok(Config {
        version: VERSION.to_owned(),
        requires: components::features(&sound.components).into_iter().map(str::to_owned).collect(),
        digest: format!("sha256:{digest}"),
        scaling,
        overrides,
        forms: form_groups(sound),
        fan_in_fan_out: adapter.fan_in_fan_out,
        names: adapter.names.map(|format| format.name().to_owned()),
        base: base_config(adapter)?,
        source: adapter.source.as_ref().map(|source| SourceField {
            format: source.format.name().to_owned(),
            config: source.config.clone(),
        }),
        extensions: adapter.extensions.clone(),
    })
}

/// Members of equal value, and the names of those that have it.
type Groups<K, V> = BTreeMap<K, (V, Vec<String>)>;

/// Takes out the commonest group; of equals, the first.
fn take_commonest<K: Ord + Clone, V>(groups: &mut Groups<K, V>) -> Option<V> {
    let largest = groups.values().map(|group| group.1.len()).max()?;
    let key = groups.iter().find(|entry| entry.1.1.len() == largest)?.0.clone();
    groups.remove(&key).map(|group| group.0)
}

/// The default scaling, and the overrides (F13).
fn scalings(sound: &Sound<'_>) -> (Option<ScalingConfig>, Vec<Override>) {
    let mut groups: Groups<(&str, u64), Scaling> = BTreeMap::new();
    for Component { target, form } in sound.components.iter().copied() {
        let Some(Factored { low_rank, .. }) = Factored::of(form) else { continue };
        let scaling = low_rank.scaling;
        let key = (scaling.rule.name(), scaling.alpha.to_bits());
        let group = groups.entry(key).or_insert_with(|| (scaling, Vec::new()));
        group.1.push(components::short_name(target));
    }
    let default = take_commonest(&mut groups).map(scaling_config);
    let overrides = groups.into_values().map(|(scaling, mut modules)| {
        modules.sort();
        Override { scaling: scaling_config(scaling), modules }
    });
    (default, overrides.collect())
}

/// What tensors do not say, form by form: of most of its components, then of the others (F32).
fn form_groups(sound: &Sound<'_>) -> Vec<FormGroup> {
    let mut forms: BTreeMap<String, Groups<String, Map<String, Value>>> = BTreeMap::new();
    for Component { target, form } in sound.components.iter().copied() {
        let None = Factored::of(form) else { continue };
        let Some(Parts { label, mut facts, .. }) = forms::take_apart(form) else { continue };
        if let Some(number) = sound.factors(form) {
            facts.insert("factors".to_owned(), number.into());
        }
        if !forms::has_facts(label.form) {
            continue;
        }
        let groups = forms.entry(label.text()).or_default();
        let key = Value::from(facts.clone()).to_string();
        let group = groups.entry(key).or_insert_with(|| (facts, Vec::new()));
        group.1.push(components::short_name(target));
    }
    let mut described = Vec::new();
    for (form, mut groups) in forms {
        let default = take_commonest(&mut groups);
        let group = |facts, modules| FormGroup { form: form.clone(), facts, modules };
        described.extend(default.map(|facts| group(facts, None)));
        described.extend(groups.into_values().map(|(facts, mut modules)| {
            modules.sort();
            group(facts, Some(modules))
        }));
    }
    described
}

fn scaling_config(scaling: Scaling) -> ScalingConfig {
    ScalingConfig { alpha: scaling.alpha, rule: scaling.rule.name().to_owned() }
}

fn base_config(adapter: &Adapter) -> Result<BaseConfig> {
    let base = &adapter.base;
    let fingerprint = base.fingerprint.as_ref().map(|fingerprint| FingerprintConfig {
        algorithm: ALGORITHM.to_owned(),
        targets: fingerprint
            .targets
            .iter()
            .map(|samples| TargetConfig {
                target: samples.target.clone(),
                dtype: samples.dtype.name().to_owned(),
                shape: samples.shape.clone(),
                values: BASE64.encode(
                    samples.values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>(),
                ),
            })
            .collect(),
    });
    let fingerprint = fingerprint
        .map(serde_json::to_value)
        .transpose()
        .map_err(|source| Error::Json { path: adapter.path.clone(), source })?;
    Ok(BaseConfig { name: base.name.clone(), revision: base.revision.clone(), fingerprint })
}

pub(super) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
