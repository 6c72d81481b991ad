//! Writing a PEFT directory: LoRA of linear layers, embeddings and convolutions, with DoRA's
//! magnitudes and biases on B; whole parameters; token rows.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::config::{self, Configuration, ScalingTable};
use super::layout::{self, Layout};
use super::methods::Method;
use super::small::TokenTable;
use super::{CONFIG_FILE, MODEL_FILE, recorded_base};
use crate::container::safetensors::{Declared, encode_header, storage_order};
use crate::error::{Error, Result};
use crate::io::atomic::{self, Durability, Overwrite};
use crate::json;
use crate::model::{Adapter, AdapterFormat, LowRank, ScalingRule};
use crate::pattern;

/// Writes an adapter as a new PEFT directory. The tensors keep their bits; the configuration is
/// the one the adapter came with, corrected where the adapter says otherwise, or one that says the
/// same.
///
/// A whole parameter other than a bias or an end of the vocabulary is written by `modules_to_save`,
/// which replaces modules. PEFT then looks for *every* parameter and buffer of such a module: one
/// that did not change must be among the components too, and [`also_needed`] says which are not.
/// PEFT refuses to load a directory that lacks one.
///
/// # Errors
/// [`Error::OutputExists`] (a directory is never replaced), [`Error::Io`],
/// [`Error::Inexpressible`] for what PEFT has no place for or would take for something else.
pub fn write_directory(
    adapter: &Adapter,
    destination: &Path,
    overwrite: Overwrite,
    durability: Durability,
) -> Result<()> {
    let (layout, config) = expressed(adapter)?;
    let mut text = serde_json::to_string_pretty(&config)
        .map_err(|source| Error::Json { path: destination.to_owned(), source })?;
    text.push('\n');

    let mut tensors = layout.tensors();
    tensors.sort_by(|x, y| storage_order((x.dtype, &x.name), (y.dtype, &y.name)));
    let mut metadata = adapter.metadata.clone();
    metadata.push(("format".to_owned(), "pt".to_owned()));
    metadata.sort();
    let declared = tensors.iter().map(|tensor| Declared {
        name: &tensor.name,
        dtype: tensor.dtype,
        shape: &tensor.shape,
        bytes: tensor.bytes.len() as u64,
    });
    let header = encode_header(&metadata, declared);
    let mut parts: Vec<&[u8]> = vec![&header];
    parts.extend(tensors.iter().map(|tensor| tensor.bytes));

    let staging = atomic::StagedDirectory::create(destination, overwrite)?;
    let inside = |name| staging.path().join(name);
    atomic::write(&inside(MODEL_FILE), &parts, Overwrite::Never, durability)?;
    atomic::write(&inside(CONFIG_FILE), &[text.as_bytes()], Overwrite::Never, durability)?;
    adapter.ensure_unchanged()?;
    staging.commit(durability)
}

/// Refuses what [`write_directory`] would refuse because PEFT has no place for it, or would take it for
/// something else. Values do not matter.
///
/// # Errors
/// [`Error::Inexpressible`].
pub fn check(adapter: &Adapter) -> Result<()> {
    expressed(adapter).map(|_| ())
}

/// Where PEFT has everything, and the configuration that says so.
fn expressed(adapter: &Adapter) -> Result<(Layout<'_>, Map<String, Value>)> {
    let layout = Layout::of(adapter)?;
    if let Some(what) = layout.misread() {
        return Err(layout::inexpressible(adapter, what));
    }
    let config = configuration(adapter, &layout)?;
    Ok((layout, config))
}

/// Which of a base's tensors a PEFT directory of this adapter must hold besides: the unchanged rest
/// of the modules that PEFT replaces whole, and of those that it would take for them because their
/// names end alike. `stored` names all tensors of the base, as the adapter names modules; a
/// component [`Form::Replaced`](crate::model::Form::Replaced) of each one returned, with the base's
/// own values, makes the directory complete.
///
/// # Errors
/// [`Error::Inexpressible`] for a component that PEFT has no place for.
pub fn also_needed<'b>(adapter: &Adapter, stored: &[&'b str]) -> Result<Vec<&'b str>> {
    Ok(Layout::of(adapter)?.missing(stored))
}

/// A configuration that says what the adapter is, whatever it came with.
pub(in crate::codec) fn described(adapter: &Adapter) -> Result<Map<String, Value>> {
    describe(adapter, &Layout::of(adapter)?)
}

/// The configuration that the adapter came with, corrected wherever it would have PEFT compute
/// another delta or name another base than the adapter does.
fn configuration(adapter: &Adapter, layout: &Layout<'_>) -> Result<Map<String, Value>> {
    let mut described = describe(adapter, layout)?;
    let source = match &adapter.source {
        Some(source)
            if source.format == AdapterFormat::Peft
                && source.config.get("peft_type").and_then(Value::as_str) == Some("LORA") =>
        {
            &source.config
        }
        // Another method's fields mean other things.
        _ => return Ok(described),
    };
    let mut config = source.clone();
    let mut wrong: Vec<&str> = Vec::new();
    if !gives_the_scales(adapter, source, layout) {
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
    let is = |field: &str, wanted: bool| {
        source.get(field).and_then(Value::as_bool).unwrap_or(false) == wanted
    };
    let fields = [
        ("bias", layout.bias_agrees(source.get("bias"))),
        ("lora_bias", is("lora_bias", layout.lora_bias())),
        ("modules_to_save", layout.saved_agree(source.get("modules_to_save"))),
        ("trainable_token_indices", rows_agree(adapter, source, layout)),
        ("use_dora", is("use_dora", layout.dora())),
    ];
    wrong.extend(fields.iter().filter(|field| !field.1).map(|field| field.0));
    // A field that makes PEFT read what the adapter does not hold is wrong.
    let changes = |(field, value): &(&String, &Value)| {
        config::is_beyond_plain(field, value) && fields.iter().all(|known| known.0 != *field)
    };
    wrong.extend(source.iter().filter(changes).map(|(field, _)| field.as_str()));
    if wrong.contains(&"target_parameters") {
        wrong.push("target_modules");
    }
    for field in wrong {
        match described.remove(field) {
            Some(value) => drop(config.insert(field.to_owned(), value)),
            None => drop(config.shift_remove(field)),
        }
    }
    Ok(config)
}

/// Whether PEFT computes the adapter's ranks and scales from `config`, to the last bit.
fn gives_the_scales(adapter: &Adapter, config: &Map<String, Value>, layout: &Layout<'_>) -> bool {
    let Ok(mut table) = ScalingTable::new(&adapter.path, config, "lora_alpha") else {
        return false;
    };
    layout.factors.iter().all(|(module, low_rank)| {
        let rank = low_rank.rank();
        table.of(module).is_ok_and(|configured| {
            configured.rank.unwrap_or(ScalingTable::DEFAULT_RANK) == rank
                && configured.scaling.scale(rank).to_bits() == low_rank.scale().to_bits()
        })
    })
}

/// Whether `config` gives the adapter's token rows their indices, in the same order.
fn rows_agree(adapter: &Adapter, config: &Map<String, Value>, layout: &Layout<'_>) -> bool {
    const FIELD: &str = "trainable_token_indices";
    if layout.rows.is_empty() {
        return config.get(FIELD).is_none_or(config::is_empty);
    }
    let configuration =
        Configuration { path: &adapter.path, fields: config, method: Method::Lora, recorded: true };
    TokenTable::of(&configuration, FIELD).is_ok_and(|table| {
        layout
            .rows
            .iter()
            .all(|(module, (indices, _))| table.rows(module, "").is_ok_and(|it| it == *indices))
    })
}

/// A configuration for an adapter that did not come from PEFT.
fn describe(adapter: &Adapter, layout: &Layout<'_>) -> Result<Map<String, Value>> {
    /// What PEFT takes for no module at all.
    const NO_TARGETS: &str = "dummy-target-modules";
    let factors = &layout.factors;
    let sqrt = |low_rank: &LowRank| low_rank.scaling.rule == ScalingRule::AlphaOverSqrtRank;
    let rslora = !factors.is_empty() && factors.values().all(|low_rank| sqrt(low_rank));
    // PEFT has one rule for the whole adapter: what the other rules mean is said as an alpha.
    let alpha = |low_rank: &LowRank| match low_rank.scaling.rule {
        _ if rslora => low_rank.scaling.alpha,
        ScalingRule::AlphaOverRank => low_rank.scaling.alpha,
        _ => alpha_of_scale(low_rank.scale(), low_rank.rank()),
    };
    let none = ScalingTable::DEFAULT_RANK as u64;
    let rank = commonest(factors.values().map(|low_rank| low_rank.rank() as u64)).unwrap_or(none);
    let default_alpha = commonest(factors.values().map(|low_rank| alpha(low_rank).to_bits()))
        .map_or(none as f64, f64::from_bits);
    let mut rank_pattern = Map::new();
    let mut alpha_pattern = Map::new();
    for (module, low_rank) in factors {
        // Anchored: the name of one module may be a dotted suffix of another's.
        let key = pattern::exactly(module);
        if low_rank.rank() as u64 != rank {
            rank_pattern.insert(key.clone(), json!(low_rank.rank()));
        }
        if alpha(low_rank).to_bits() != default_alpha.to_bits() {
            alpha_pattern.insert(key, json!(alpha(low_rank)));
        }
    }
    let modules: Vec<&&str> = factors.keys().collect();
    let targets = if modules.is_empty() { json!(NO_TARGETS) } else { json!(modules) };
    let saved = (!layout.saved.is_empty()).then_some(&layout.saved);
    let config = json!({
        "alpha_pattern": alpha_pattern,
        "base_model_name_or_path": adapter.base.name,
        "bias": layout.biases.name(),
        "fan_in_fan_out": adapter.fan_in_fan_out.unwrap_or(false),
        "inference_mode": true,
        "init_lora_weights": true,
        "lora_alpha": default_alpha,
        "lora_dropout": 0.0,
        "modules_to_save": saved,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": rank_pattern,
        "revision": adapter.base.revision,
        "target_modules": targets,
        "task_type": null,
        "use_dora": layout.dora(),
        "use_rslora": rslora,
    });
    let mut config = json::object(&adapter.path, config)?;
    if layout.lora_bias() {
        config.insert("lora_bias".to_owned(), json!(true));
    }
    if !layout.rows.is_empty() {
        let rows: BTreeMap<&str, &[u64]> =
            layout.rows.iter().map(|(module, rows)| (*module, rows.0)).collect();
        config.insert("trainable_token_indices".to_owned(), json!(rows));
    }
    Ok(config)
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
