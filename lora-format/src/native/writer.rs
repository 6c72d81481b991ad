//! [`Adapter`] → file. The same adapter gives the same bytes, always.

use std::collections::BTreeMap;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use sha2::{Digest, Sha256};

use super::config::{
    BaseConfig, Config, FingerprintConfig, Override, ScalingConfig, SourceField, TargetConfig,
};
use super::{A_SUFFIX, ALPHA_SUFFIX, B_SUFFIX, CONFIG_KEY, VERSION};
use crate::container::safetensors::{Declared, encode_header, storage_order};
use crate::dtype::Dtype;
use crate::error::{AdapterProblem, Error, Result};
use crate::fingerprint::ALGORITHM;
use crate::io::atomic::{AtomicFile, Durability, Overwrite};
use crate::model::{Adapter, Scaling};

/// This format, as messages name it.
pub const FORMAT: &str = "format version 1.0-draft";

/// Writes an adapter as one file, complete or not at all.
///
/// # Errors
/// [`Error::OutputExists`], [`Error::Io`], [`Error::Inexpressible`] for a component the format
/// cannot hold, [`Error::Adapter`] for a scale that no `.alpha` tensor can hold.
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
    shape: &'a [usize],
    data: OutputData<'a>,
}

#[derive(Debug)]
enum OutputData<'a> {
    Borrowed(&'a [u8]),
    Scalar([u8; 4]),
}

impl OutputTensor<'_> {
    /// The stored bytes.
    pub fn bytes(&self) -> &[u8] {
        match &self.data {
            OutputData::Borrowed(bytes) => bytes,
            OutputData::Scalar(bytes) => bytes,
        }
    }
}

/// The file's first bytes, up to its data, and the tensors that follow, in order.
///
/// # Errors
/// As [`write()`], less the file system's.
pub fn encode(adapter: &Adapter) -> Result<(Vec<u8>, Vec<OutputTensor<'_>>)> {
    let tensors = lay_out(adapter)?;
    let mut digest = Sha256::new();
    for tensor in &tensors {
        digest.update(tensor.bytes());
    }
    let config = describe(adapter, &hexadecimal(&digest.finalize()))?;
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
        shape: tensor.shape,
        bytes: tensor.bytes().len() as u64,
    });
    Ok((encode_header(&metadata, declared), tensors))
}

/// The tensors of every component, in storage order.
fn lay_out(adapter: &Adapter) -> Result<Vec<OutputTensor<'_>>> {
    let mut tensors = Vec::with_capacity(adapter.components.len() * 3);
    for (target, factors) in adapter.plain_low_rank(FORMAT)? {
        let module = &target.module;
        for (suffix, factor) in [(A_SUFFIX, &factors.a), (B_SUFFIX, &factors.b)] {
            tensors.push(OutputTensor {
                name: format!("{module}{suffix}"),
                dtype: factor.dtype,
                shape: &factor.shape,
                data: OutputData::Borrowed(factor.bytes()),
            });
        }
        let alpha = naive_alpha(factors.scaling, factors.rank());
        if !alpha.is_finite() {
            let value = factors.scale() * factors.rank() as f64;
            let problems = vec![AdapterProblem::AlphaRange { module: module.clone(), value }];
            return Err(Error::Adapter { path: adapter.path.clone(), problems });
        }
        tensors.push(OutputTensor {
            name: format!("{module}{ALPHA_SUFFIX}"),
            dtype: Dtype::F32,
            shape: &[],
            data: OutputData::Scalar(alpha.to_le_bytes()),
        });
    }
    tensors.sort_by(|x, y| storage_order((x.dtype, &x.name), (y.dtype, &y.name)));
    Ok(tensors)
}

/// The value of the `.alpha` tensor: what a loader that computes `alpha / rank` must find.
pub(super) fn naive_alpha(scaling: Scaling, rank: usize) -> f32 {
    (scaling.scale(rank) * rank as f64) as f32
}

fn describe(adapter: &Adapter, digest: &str) -> Result<Config> {
    let mut groups: BTreeMap<(&str, u64), (Scaling, Vec<String>)> = BTreeMap::new();
    for (target, factors) in adapter.plain_low_rank(FORMAT)? {
        let key = (factors.scaling.rule.name(), factors.scaling.alpha.to_bits());
        let group = groups.entry(key).or_insert_with(|| (factors.scaling, Vec::new()));
        group.1.push(target.module.clone());
    }
    // The commonest scaling is the file's default; of equals, the first in key order.
    let largest = groups.values().map(|group| group.1.len()).max();
    let default = groups
        .iter()
        .find(|(_, group)| Some(group.1.len()) == largest)
        .map(|(key, group)| (*key, group.0));
    let Some((default_key, default_scaling)) = default else {
        return Err(Error::Inexpressible {
            path: adapter.path.clone(),
            format: FORMAT,
            what: "an adapter without components".to_owned(),
        });
    };
    groups.remove(&default_key);
    let overrides = groups.into_values().map(|(scaling, mut modules)| {
        modules.sort();
        Override { scaling: scaling_config(scaling), modules }
    });
    Ok(Config {
        version: VERSION.to_owned(),
        requires: vec!["low-rank".to_owned()],
        digest: format!("sha256:{digest}"),
        scaling: scaling_config(default_scaling),
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
