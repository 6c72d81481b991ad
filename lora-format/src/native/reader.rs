//! File → [`Adapter`]. Every tensor and every module the configuration names must be accounted
//! for, and the `.alpha` tensors must agree with the configuration.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::config::{Config, FingerprintConfig, ScalingConfig};
use super::writer::{hexadecimal, naive_alpha};
use super::{A_SUFFIX, ALPHA_SUFFIX, B_SUFFIX, CONFIG_KEY, FEATURES};
use crate::codec::peft;
use crate::container::safetensors::{Header, SafetensorsFile};
use crate::error::{AdapterProblem, Error, Result, Unsupported};
use crate::factors::{self, FactorTensors};
use crate::fingerprint::{self, BaseIdentity, Fingerprint, TargetSamples};
use crate::model::{Adapter, AdapterFormat, Form, Scaling, ScalingRule, SourceConfig};
use crate::tensor::{self, Tensor};

/// Whether a safetensors file is of our format.
pub fn is_native(header: &Header) -> bool {
    header.metadata_value(CONFIG_KEY).is_some()
}

/// Reads an adapter of our format.
///
/// # Errors
/// [`Error::Version`], [`Error::Unsupported`] for a feature the file requires and this reader
/// does not know, [`Error::Adapter`] for tensors that do not form the components described.
pub fn read(file: &SafetensorsFile) -> Result<Adapter> {
    let path = file.path();
    let config = read_config(path, file.header())?;
    let default = scaling(path, "scaling", &config.scaling)?;
    let mut scalings = HashMap::new();
    for group in &config.overrides {
        let scaling = scaling(path, "overrides", &group.scaling)?;
        for module in &group.modules {
            if scalings.insert(module.as_str(), scaling).is_some() {
                let found = Value::from(module.as_str());
                return Err(Error::config(path, "overrides", "one entry per module", &found));
            }
        }
    }

    let mut problems = Vec::new();
    let mut modules: BTreeMap<String, FactorTensors> = BTreeMap::new();
    let mut alphas: BTreeMap<String, Tensor> = BTreeMap::new();
    for tensor in tensor::map_all(file)? {
        let module = |suffix| tensor.name.strip_suffix(suffix).map(str::to_owned);
        if let Some(module) = module(A_SUFFIX) {
            modules.entry(module).or_default().a = Some(tensor);
        } else if let Some(module) = module(B_SUFFIX) {
            modules.entry(module).or_default().b = Some(tensor);
        } else if let Some(module) = module(ALPHA_SUFFIX) {
            alphas.insert(module, tensor);
        } else {
            problems.push(AdapterProblem::UnusedTensor { tensor: tensor.name });
        }
    }

    let mut components = Vec::with_capacity(modules.len());
    for (module, factors) in modules {
        let scaling = scalings.remove(module.as_str()).unwrap_or(default);
        let alpha = alphas.remove(&module);
        let names = (format!("{module}{A_SUFFIX}"), format!("{module}{B_SUFFIX}"));
        let built = factors::low_rank(&module, factors, names, scaling, &mut problems);
        let Some(component) = built else { continue };
        let Form::LowRank(low_rank) = &component.form;
        check_alpha(&module, alpha, naive_alpha(scaling, low_rank.rank()), &mut problems);
        components.push(component);
    }
    let leftover = alphas.into_values();
    problems.extend(leftover.map(|tensor| AdapterProblem::UnusedTensor { tensor: tensor.name }));
    let mut unknown: Vec<&str> = scalings.into_keys().collect();
    unknown.sort_unstable();
    problems.extend(
        unknown.into_iter().map(|name| AdapterProblem::MissingModule { module: name.to_owned() }),
    );
    if !problems.is_empty() {
        return Err(Error::Adapter { path: path.to_owned(), problems });
    }

    let own = ["format", CONFIG_KEY];
    let metadata = &file.header().metadata;
    Ok(Adapter {
        path: path.to_owned(),
        format: AdapterFormat::Native,
        components,
        base: BaseIdentity {
            name: config.base.name,
            revision: config.base.revision,
            fingerprint: match config.base.fingerprint {
                Some(fingerprint) => read_fingerprint(path, fingerprint)?,
                None => None,
            },
        },
        fan_in_fan_out: config.fan_in_fan_out,
        metadata: metadata.iter().filter(|entry| !own.contains(&&*entry.0)).cloned().collect(),
        source: match config.source {
            Some(source) => Some(SourceConfig {
                format: peft::format_named(path, &source.format)?,
                config: source.config,
            }),
            None => None,
        },
        extensions: config.extensions,
        notes: Vec::new(),
    })
}

/// The configuration, checked for version and required features before anything is made of it.
fn read_config(path: &Path, header: &Header) -> Result<Config> {
    let text = header.metadata_value(CONFIG_KEY).unwrap_or_default();
    let value = crate::json::parse(path, text.as_bytes())?;
    let version = value.get("version").and_then(Value::as_str).unwrap_or("none");
    let known = version == super::VERSION || version == "1" || version.starts_with("1.");
    if !known {
        return Err(Error::Version { path: path.to_owned(), found: version.to_owned() });
    }
    let config: Config = serde_json::from_value(value)
        .map_err(|source| Error::Json { path: path.to_owned(), source })?;
    let features: Vec<Unsupported> = config
        .requires
        .iter()
        .filter(|feature| !FEATURES.contains(&feature.as_str()))
        .map(|feature| Unsupported {
            feature: format!("`{feature}`"),
            reason: "the file requires this feature of its reader; a newer version may know it"
                .to_owned(),
        })
        .collect();
    if !features.is_empty() {
        return Err(Error::Unsupported { path: path.to_owned(), features });
    }
    Ok(config)
}

fn scaling(path: &Path, field: &str, config: &ScalingConfig) -> Result<Scaling> {
    let Some(rule) = ScalingRule::from_name(&config.rule) else {
        let expected = "`alpha/rank`, `alpha/sqrt-rank` or `direct`";
        let found = Value::from(config.rule.as_str());
        return Err(Error::config(path, &format!("{field}.rule"), expected, &found));
    };
    Ok(Scaling { alpha: config.alpha, rule })
}

/// The `.alpha` tensor must be there, an f32 scalar, and say what the configuration says: a
/// loader that reads only the tensors must not compute another scale.
fn check_alpha(
    module: &str,
    tensor: Option<Tensor>,
    expected: f32,
    problems: &mut Vec<AdapterProblem>,
) {
    let name = format!("{module}{ALPHA_SUFFIX}");
    let Some(tensor) = tensor else {
        problems.push(AdapterProblem::MissingTensor { tensor: name });
        return;
    };
    let stored = match tensor.to_f32().as_deref() {
        Some(&[value]) if tensor.dtype == crate::Dtype::F32 => value,
        _ => f32::NAN,
    };
    if stored.to_bits() != expected.to_bits() {
        let module = module.to_owned();
        problems.push(AdapterProblem::AlphaMismatch { module, tensor: name, stored, expected });
    }
}

/// An unknown algorithm is no error: the identity is then unknown.
fn read_fingerprint(path: &Path, config: FingerprintConfig) -> Result<Option<Fingerprint>> {
    if config.algorithm != fingerprint::ALGORITHM {
        return Ok(None);
    }
    let mut targets = Vec::with_capacity(config.targets.len());
    for target in config.targets {
        let field = format!("base.fingerprint.{}", target.target);
        let invalid = |expected, found: &str| Error::config(path, &field, expected, &found.into());
        let dtype = target.dtype.parse().map_err(|_| invalid("a dtype", &target.dtype))?;
        let bytes = BASE64
            .decode(&target.values)
            .ok()
            .filter(|bytes| bytes.len() % 4 == 0)
            .ok_or_else(|| invalid("base64 of f32 values", &target.values))?;
        let words = bytes.chunks_exact(4).map(|word| [word[0], word[1], word[2], word[3]]);
        targets.push(TargetSamples {
            target: target.target,
            dtype,
            shape: target.shape,
            values: words.map(f32::from_le_bytes).collect(),
        });
    }
    Ok(Some(Fingerprint { targets }))
}

/// What a check of the recorded digest found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DigestVerdict {
    /// The data is what was written.
    Intact {
        /// The digest, with its algorithm: `sha256:…`.
        digest: String,
    },
    /// The data changed since it was written.
    Damaged {
        /// The digest the file records.
        recorded: String,
        /// The digest of its data.
        actual: String,
    },
}

/// Compares the recorded digest with that of the data: all bytes after the header.
///
/// # Errors
/// [`Error::Io`], or what [`read`] finds wrong with the configuration.
pub fn verify_digest(file: &SafetensorsFile) -> Result<DigestVerdict> {
    let recorded = read_config(file.path(), file.header())?.digest;
    let mapping = file.map()?;
    let data = &mapping[file.header().data_start as usize..];
    let actual = format!("sha256:{}", hexadecimal(&Sha256::digest(data)));
    Ok(if recorded == actual {
        DigestVerdict::Intact { digest: recorded }
    } else {
        DigestVerdict::Damaged { recorded, actual }
    })
}
