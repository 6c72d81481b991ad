//! Writing a PEFT directory: plain LoRA of linear layers.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::config::{self, ScalingTable};
use super::{A_SUFFIX, B_SUFFIX, CONFIG_FILE, MODEL_FILE, PREFIX, recorded_base};
use crate::container::safetensors::{Declared, encode_header, storage_order};
use crate::error::{Error, Result};
use crate::io::atomic::{self, Durability, Overwrite};
use crate::json;
use crate::model::{Adapter, AdapterFormat, Form, LowRank, ScalingRule};
use crate::pattern;

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
    for (target, factors) in adapter.plain_low_rank("PEFT")? {
        let module = &target.module;
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
    // The adapter is plain LoRA, so a field that makes PEFT read it as anything else is wrong.
    let changes = |(field, value): &(&String, &Value)| config::is_beyond_plain(field, value);
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
    let Ok(mut table) = ScalingTable::new(path, config, "lora_alpha") else {
        return false;
    };
    adapter.components.iter().all(|component| {
        let Form::LowRank(low_rank) = &component.form else {
            return false;
        };
        let rank = low_rank.rank();
        table.of(&component.target.module).is_ok_and(|configured| {
            configured.rank.unwrap_or(ScalingTable::DEFAULT_RANK) == rank
                && configured.scaling.scale(rank).to_bits() == low_rank.scale().to_bits()
        })
    })
}

/// A configuration for an adapter that did not come from PEFT.
fn describe(adapter: &Adapter) -> Result<Map<String, Value>> {
    let factors = adapter.plain_low_rank("PEFT")?;
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
    for (target, low_rank) in &factors {
        // Anchored: the name of one module may be a dotted suffix of another's.
        let key = pattern::exactly(&target.module);
        if low_rank.rank() as u64 != rank {
            rank_pattern.insert(key.clone(), json!(low_rank.rank()));
        }
        if alpha(low_rank).to_bits() != default_alpha.to_bits() {
            alpha_pattern.insert(key, json!(alpha(low_rank)));
        }
    }
    let modules: Vec<&str> = factors.iter().map(|(target, _)| target.module.as_str()).collect();
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
