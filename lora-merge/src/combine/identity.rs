//! What may be said of a combined adapter: only what all of its inputs say, and what it is made of.

use lora_format::fingerprint::{self, BaseIdentity, Verdict};
use lora_format::model::{Adapter, AdapterFormat, Component, Form, SourceConfig};
use serde_json::{Map, Value, json};

use super::CombineError;
use crate::WeightedAdapter;

/// Metadata that names the inputs: a JSON list of file names and weights.
pub(super) const COMBINED_FROM: &str = "combined_from";

/// Entries of sd-scripts that are of the base, and not of one training.
const OF_THE_BASE: [&str; 7] = [
    "ss_base_model_version",
    "ss_v2",
    "ss_sd_model_name",
    "ss_sd_model_hash",
    "ss_new_sd_model_hash",
    "ss_vae_name",
    "ss_vae_hash",
];

/// Refuses adapters that spell the same module in different ways.
pub(super) fn same_spelling(adapters: &[WeightedAdapter]) -> Result<(), CombineError> {
    let Some((first, rest)) = adapters.split_first() else { return Ok(()) };
    for other in rest {
        let (one, two) = (spelling(&first.adapter), spelling(&other.adapter));
        if one != two {
            return Err(CombineError::Spelling {
                first: first.adapter.path.clone(),
                first_format: one,
                second: other.adapter.path.clone(),
                second_format: two,
            });
        }
    }
    Ok(())
}

/// The format that spells an adapter's modules; PEFT names them as their model does.
fn spelling(adapter: &Adapter) -> AdapterFormat {
    adapter.names.unwrap_or(AdapterFormat::Peft)
}

/// Compares the fingerprints with each other, and the names if there are none; what differs but is
/// no proof comes back as warnings.
pub(super) fn same_base(
    adapters: &[WeightedAdapter],
    allowed: bool,
) -> Result<Vec<String>, CombineError> {
    let mut warnings = Vec::new();
    for (index, first) in adapters.iter().enumerate() {
        for second in &adapters[index + 1..] {
            let (first, second) = (&first.adapter, &second.adapter);
            match compare(first, second) {
                Verdict::Different { equal, compared, first: target } => {
                    let error = CombineError::DifferentBase {
                        first: first.path.clone(),
                        second: second.path.clone(),
                        equal,
                        compared,
                        target,
                    };
                    if !allowed {
                        return Err(error);
                    }
                    warnings.push(format!("{error}; combined all the same, as asked"));
                }
                Verdict::Unknown => {
                    if let (Some(one), Some(two)) = (&first.base.name, &second.base.name)
                        && one != two
                    {
                        warnings.push(format!(
                            "{} was trained on `{one}` and {} on `{two}`; whether these are one \
                             base is not known",
                            first.path.display(),
                            second.path.display()
                        ));
                    }
                }
                Verdict::Same | Verdict::Reencoded => {}
            }
        }
    }
    Ok(warnings)
}

fn compare(first: &Adapter, second: &Adapter) -> Verdict {
    let (Some(first), Some(second)) = (&first.base.fingerprint, &second.base.fingerprint) else {
        return Verdict::Unknown;
    };
    fingerprint::compare(first, |expected| {
        second.targets.iter().find(|one| one.target == expected.target).cloned()
    })
}

/// The combined adapter. Its fingerprint is the first's if every input has one and none differs.
pub(super) fn adapter(adapters: &[WeightedAdapter], components: Vec<Component>) -> Adapter {
    let all = || adapters.iter().map(|one| &one.adapter);
    let stamped = all().all(|one| one.base.fingerprint.is_some());
    let one_base = |one: &Adapter| {
        all().all(|other| !matches!(compare(one, other), Verdict::Different { .. }))
    };
    let fingerprint = all().next().filter(|one| stamped && one_base(one));
    let base = BaseIdentity {
        name: agreed(all().map(|one| one.base.name.clone())),
        revision: agreed(all().map(|one| one.base.revision.clone())),
        fingerprint: fingerprint.and_then(|one| one.base.fingerprint.clone()),
    };
    let mut combined = Adapter::new("combined", components, base);
    combined.names = agreed(all().map(|one| one.names));
    combined.fan_in_fan_out = agreed(all().map(|one| one.fan_in_fan_out));
    combined.metadata = metadata(adapters);
    combined.source = source(adapters, &combined.components);
    combined
}

/// The value that all have.
fn agreed<T: PartialEq>(mut values: impl Iterator<Item = Option<T>>) -> Option<T> {
    let first = values.next()??;
    values.all(|value| value.as_ref() == Some(&first)).then_some(first)
}

/// The entries that all inputs have, less what is true of one training alone, and what the result
/// was made of.
fn metadata(adapters: &[WeightedAdapter]) -> Vec<(String, String)> {
    let Some((first, rest)) = adapters.split_first() else { return Vec::new() };
    let of_one = |key: &str| {
        let trained = key.starts_with("ss_") && !OF_THE_BASE.contains(&key);
        trained || key.starts_with("sshs_") || key.starts_with("modelspec.") || key == COMBINED_FROM
    };
    let shared = |entry: &&(String, String)| {
        !of_one(&entry.0) && rest.iter().all(|one| one.adapter.metadata.contains(entry))
    };
    let mut metadata: Vec<(String, String)> =
        first.adapter.metadata.iter().filter(shared).cloned().collect();
    let inputs: Vec<Value> = adapters
        .iter()
        .map(|one| {
            // The name alone: directories are the user's own affair.
            let name = one.adapter.path.file_name().unwrap_or_default().to_string_lossy();
            json!({"name": name, "weight": one.weight})
        })
        .collect();
    metadata.push((COMBINED_FROM.to_owned(), Value::from(inputs).to_string()));
    metadata
}

/// A configuration of PEFT's with what all inputs agree on and no trainer's field that describes one
/// input; the writer adds ranks and scales.
fn source(adapters: &[WeightedAdapter], components: &[Component]) -> Option<SourceConfig> {
    const AGREED: [&str; 2] = ["task_type", "auto_mapping"];
    let configs: Vec<&Map<String, Value>> =
        adapters.iter().map(lora_config).collect::<Option<_>>()?;
    let mut config = Map::new();
    config.insert("peft_type".to_owned(), json!("LORA"));
    for field in AGREED {
        let value = agreed(configs.iter().map(|config| config.get(field).cloned()));
        config.insert(field.to_owned(), value.unwrap_or(Value::Null));
    }
    config.insert("inference_mode".to_owned(), json!(true));
    config.insert("init_lora_weights".to_owned(), json!(true));
    config.insert("lora_dropout".to_owned(), json!(0.0));
    let low_rank = components.iter().filter(|one| matches!(one.form, Form::LowRank(_)));
    let modules: Vec<&str> = low_rank.map(|one| one.target.module.as_str()).collect();
    // The writer names a target where there is none.
    if modules.is_empty() {
        return None;
    }
    config.insert("target_modules".to_owned(), json!(modules));
    Some(SourceConfig { format: AdapterFormat::Peft, config })
}

/// The configuration of an adapter that PEFT wrote as LoRA.
fn lora_config(one: &WeightedAdapter) -> Option<&Map<String, Value>> {
    let source = one.adapter.source.as_ref()?;
    let is = source.format == AdapterFormat::Peft
        && source.config.get("peft_type").and_then(Value::as_str) == Some("LORA");
    is.then_some(&source.config)
}
