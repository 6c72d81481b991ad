//! [`Adapter`] → file. The same adapter gives the same bytes, always.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use sha2::{Digest, Sha256};

use super::components::{self, Role};
use super::config::{
    BaseConfig, Config, FingerprintConfig, Override, ScalingConfig, SourceField, TargetConfig,
};
use super::{CONFIG_KEY, VERSION, validate};
use crate::container::safetensors::{Declared, encode_header, storage_order};
use crate::dtype::Dtype;
use crate::error::{AdapterProblem, Error, Result};
use crate::factors::{self, FactorTensors};
use crate::fingerprint::ALGORITHM;
use crate::io::atomic::{AtomicFile, Durability, Overwrite};
use crate::model::{Adapter, Component, Form, Layer, LowRank, Scaling, Target};
use crate::tensor::Tensor;

/// This format, as messages name it.
pub const FORMAT: &str = "format version 1.0-draft";

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
    let tensors = lay_out(adapter);
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

/// The components, sorted, if the format can hold them all.
fn sound(adapter: &Adapter) -> Result<Vec<Component>> {
    let refuse = |what| Error::Inexpressible { path: adapter.path.clone(), format: FORMAT, what };
    if adapter.components.is_empty() {
        return Err(refuse("an adapter without components".to_owned()));
    }
    if let Some(Component { target, form }) =
        adapter.components.iter().find(|component| !components::is_held(component))
    {
        return Err(refuse(format!("a change of `{}` by {}", target.name(), form.method())));
    }
    let mut sorted = adapter.components.clone();
    sorted.sort_by(Component::compare);
    let mut problems = components::clashes(&sorted);
    for Component { target, form } in &sorted {
        match form {
            Form::LowRank(low_rank) => check_low_rank(target, low_rank, &mut problems),
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
            _ => {}
        }
    }
    if problems.is_empty() {
        Ok(sorted)
    } else {
        Err(Error::Adapter { path: adapter.path.clone(), problems })
    }
}

fn check_low_rank(target: &Target, low_rank: &LowRank, problems: &mut Vec<AdapterProblem>) {
    let [a, b] = components::factor_roles(target, low_rank);
    let [a, b] = [a.name(target), b.name(target)];
    let named = |tensor: &Tensor, name: &String| {
        let mut tensor = tensor.clone();
        tensor.name.clone_from(name);
        Some(tensor)
    };
    let factors = FactorTensors { a: named(&low_rank.a, &a), b: named(&low_rank.b, &b) };
    let (module, scaling) = (components::scaling_key(target), low_rank.scaling);
    if low_rank.layer != Layer::Embedding && components::layer_of(&low_rank.a) != low_rank.layer {
        problems.extend(validate::layer(&a, &low_rank.a));
        return;
    }
    let built =
        factors::of_layer(&module, low_rank.layer, factors, (a, b), scaling, &mut *problems);
    if built.is_none() {
        return;
    }
    if let Some(magnitude) = &low_rank.magnitude {
        let name = Role::Magnitude.name(target);
        problems.extend(validate::magnitude(&name, magnitude, low_rank.out_features()));
    }
    if components::is_plain(target, low_rank)
        && !naive_alpha(low_rank.scaling, low_rank.rank()).is_finite()
    {
        let value = low_rank.scale() * low_rank.rank() as f64;
        problems.push(AdapterProblem::AlphaRange { module, value });
    }
}

/// The tensors of every component, in storage order.
fn lay_out(adapter: &Adapter) -> Vec<OutputTensor<'_>> {
    let mut tensors = Vec::with_capacity(adapter.components.len() * 3);
    for Component { target, form } in &adapter.components {
        match form {
            Form::LowRank(low_rank) => {
                let [a, b] = components::factor_roles(target, low_rank);
                tensors.push(OutputTensor::of(a.name(target), &low_rank.a));
                tensors.push(OutputTensor::of(b.name(target), &low_rank.b));
                tensors.extend(
                    low_rank
                        .magnitude
                        .as_ref()
                        .map(|magnitude| OutputTensor::of(Role::Magnitude.name(target), magnitude)),
                );
                if components::is_plain(target, low_rank) {
                    let alpha = naive_alpha(low_rank.scaling, low_rank.rank());
                    let (name, bytes) = (Role::Alpha.name(target), alpha.to_le_bytes().to_vec());
                    tensors.push(OutputTensor::made(name, Dtype::F32, Vec::new(), bytes));
                }
            }
            Form::Replaced(tensor) => {
                tensors.push(OutputTensor::of(Role::Value.name(target), tensor));
            }
            Form::Rows { indices, rows } => {
                tensors.push(OutputTensor::of(Role::Rows.name(target), rows));
                let bytes: Vec<u8> = indices.iter().flat_map(|it| it.to_le_bytes()).collect();
                let (name, shape) = (Role::Indices.name(target), vec![indices.len()]);
                tensors.push(OutputTensor::made(name, Dtype::I64, shape, bytes));
            }
            Form::Added { tensor, scale } => {
                tensors.push(OutputTensor::of(Role::Added.name(target), tensor));
                let (name, bytes) = (Role::Scale.name(target), scale.to_le_bytes().to_vec());
                tensors.push(OutputTensor::made(name, Dtype::F64, Vec::new(), bytes));
            }
            // Refused before.
            _ => {}
        }
    }
    tensors.sort_by(|x, y| storage_order((x.dtype, &x.name), (y.dtype, &y.name)));
    tensors
}

/// The value of the `.alpha` tensor: what a loader that computes `alpha / rank` must find.
pub(super) fn naive_alpha(scaling: Scaling, rank: usize) -> f32 {
    (scaling.scale(rank) * rank as f64) as f32
}

fn describe(adapter: &Adapter, sound: &[Component], digest: &str) -> Result<Config> {
    let mut groups: BTreeMap<(&str, u64), (Scaling, Vec<String>)> = BTreeMap::new();
    for Component { target, form } in sound {
        let Form::LowRank(LowRank { scaling, .. }) = form else { continue };
        let key = (scaling.rule.name(), scaling.alpha.to_bits());
        let group = groups.entry(key).or_insert_with(|| (*scaling, Vec::new()));
        group.1.push(components::scaling_key(target));
    }
    // The commonest scaling is the file's default; of equals, the first in key order.
    let largest = groups.values().map(|group| group.1.len()).max();
    let default =
        groups.iter().find(|entry| Some(entry.1.1.len()) == largest).map(|entry| *entry.0);
    let default = default.and_then(|key| groups.remove(&key));
    let overrides = groups.into_values().map(|(scaling, mut modules)| {
        modules.sort();
        Override { scaling: scaling_config(scaling), modules }
    });
    Ok(Config {
        version: VERSION.to_owned(),
        requires: components::features(sound).into_iter().map(str::to_owned).collect(),
        digest: format!("sha256:{digest}"),
        scaling: default.map(|group| scaling_config(group.0)),
        overrides: overrides.collect(),
        fan_in_fan_out: adapter.fan_in_fan_out,
        base: base_config(adapter)?,
        source: adapter.source.as_ref().map(|source| SourceField {
            format: source.format.name().to_owned(),
            config: source.config.clone(),
        }),
        extensions: adapter.extensions.clone(),
    })
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
