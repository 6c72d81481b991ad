//! `adapter_config.json`: every field is known, and one that changes the merged weight is read or
//! refused by name. An unknown field is refused too, unless it holds nothing (null, false, empty)
//! or the user passes it over. `target_modules` is never evaluated: the tensors say what was
//! trained.

use std::path::Path;

use serde_json::{Map, Value};

use super::methods::Method;
use crate::codec::ReadOptions;
use crate::error::{Error, Result, Unsupported};
use crate::json;
use crate::model::{Note, Scaling, ScalingRule};
use crate::pattern::PatternTable;

/// A configuration whose fields were checked.
#[derive(Clone, Copy)]
pub(super) struct Configuration<'a> {
    pub(super) path: &'a Path,
    pub(super) fields: &'a Map<String, Value>,
    pub(super) method: Method,
    /// Whether there is a file. Without one only alpha is known.
    pub(super) recorded: bool,
}

impl<'a> Configuration<'a> {
    pub(super) fn get(&self, field: &str) -> Option<&'a Value> {
        self.fields.get(field).filter(|value| !value.is_null())
    }

    /// A field of a type; absent and null mean `None`.
    fn typed<T>(
        &self,
        field: &str,
        expected: &'static str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(field) else {
            return Ok(None);
        };
        let wrong = || Error::config(self.path, field, expected, value);
        read(value).map(Some).ok_or_else(wrong)
    }

    pub(super) fn flag(&self, field: &str) -> Result<Option<bool>> {
        self.typed(field, "a boolean", Value::as_bool)
    }

    pub(super) fn count(&self, field: &str) -> Result<Option<usize>> {
        let read = |value: &Value| value.as_u64().and_then(|count| usize::try_from(count).ok());
        self.typed(field, "a whole number", read)
    }

    pub(super) fn number(&self, field: &str) -> Result<Option<f64>> {
        self.typed(field, "a number", Value::as_f64)
    }

    pub(super) fn text(&self, field: &str) -> Result<Option<&'a str>> {
        self.typed(field, "a string", Value::as_str)
    }

    pub(super) fn object(&self, field: &str) -> Result<Option<&'a Map<String, Value>>> {
        self.typed(field, "an object", Value::as_object)
    }

    /// A list of names; absent and null mean none.
    pub(super) fn names(&self, field: &str) -> Result<Vec<&'a str>> {
        Ok(self.typed(field, "a list of names", strings)?.unwrap_or_default())
    }

    /// What a field that is there holds, for a message.
    pub(super) fn describe(&self, field: &str) -> String {
        let value = self.get(field).map_or_else(|| "absent".to_owned(), json::brief);
        format!("`{field}`: {value}")
    }
}

/// The strings of a list.
pub(super) fn strings(value: &Value) -> Option<Vec<&str>> {
    value.as_array()?.iter().map(Value::as_str).collect()
}

/// Checks that every field is understood, and returns the method.
pub(super) fn check(
    path: &Path,
    fields: &Map<String, Value>,
    options: &ReadOptions,
    notes: &mut Vec<Note>,
) -> Result<Method> {
    let refuse = |features| Error::Unsupported { path: path.to_owned(), features };
    let missing = Value::Null;
    let kind = fields.get("peft_type").unwrap_or(&missing);
    let Some(kind) = kind.as_str() else {
        return Err(match adapter_hub(fields) {
            Some(reason) => refuse(vec![Unsupported {
                feature: "an adapter of AdapterHub's library".to_owned(),
                reason: reason.to_owned(),
            }]),
            None => Error::config(path, "peft_type", "a string", kind),
        });
    };
    let method = Method::of(kind).map_err(|reason| {
        let feature = format!("peft_type {kind}");
        refuse(vec![Unsupported { feature, reason: reason.to_owned() }])
    })?;
    let mut features = Vec::new();
    for (field, value) in fields {
        match standing(method, field, value) {
            Standing::Understood => {}
            Standing::Unknown if options.ignore_fields.contains(field) => {
                notes.push(Note::IgnoredField { field: field.clone() });
            }
            Standing::Residual(_) if options.residual_base => {
                let init = value.as_str().unwrap_or_default().to_owned();
                notes.push(Note::ResidualBase { init });
            }
            Standing::Residual(reason) | Standing::Refused(reason) => {
                let feature = format!("`{field}`: {}", json::brief(value));
                features.push(Unsupported { feature, reason: reason.to_owned() });
            }
            Standing::Unknown => {
                let feature = format!("`{field}`: {}", json::brief(value));
                let reason = "this field is unknown here and may change the result".to_owned();
                features.push(Unsupported { feature, reason });
            }
        }
    }
    if features.is_empty() { Ok(method) } else { Err(refuse(features)) }
}

/// What is made of a field with its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// It is read, or means nothing for the merged weight.
    Understood,
    /// It means that the adapter belongs to another base than it names.
    Residual(&'static str),
    Refused(&'static str),
    Unknown,
}

fn standing(method: Method, field: &str, value: &Value) -> Standing {
    let is_lora = matches!(method, Method::Lora | Method::AdaLora);
    if is_lora && field == "init_lora_weights" {
        return initialisation(value);
    }
    if is_empty(value) {
        return Standing::Understood;
    }
    let refused = match field {
        "layer_replication" => {
            "layers that share weights receive different adapters, so no single weight can hold \
             the result"
        }
        "use_qalora" => "QALoRA pools its inputs; it has no merged weight",
        "kasa_config" => {
            "KaSA truncates the singular values of the base before it adds: not implemented"
        }
        "alora_invocation_tokens" => {
            "an activated LoRA acts only after its invocation tokens; it has no merged weight"
        }
        "arrow_config" => "Arrow routes between adapters per token; it has no merged weight",
        "megatron_config" => "factors split across a Megatron group: not implemented",
        _ if method.knows(field) => return Standing::Understood,
        _ => return Standing::Unknown,
    };
    if is_lora { Standing::Refused(refused) } else { Standing::Unknown }
}

/// What an initialisation did to the base. PEFT compares some names without their case.
fn initialisation(value: &Value) -> Standing {
    let name = match value {
        Value::Null | Value::Bool(_) => return Standing::Understood,
        Value::String(name) => name.as_str(),
        _ => return Standing::Unknown,
    };
    let lower = name.to_ascii_lowercase();
    match name {
        "eva" | "orthogonal" => Standing::Understood,
        _ if ["gaussian", "mica"].contains(&&*lower) => Standing::Understood,
        "loftq" => Standing::Residual(
            "LoftQ quantises the base, so the factors are only valid on that quantised base; give \
             that base and --residual-base",
        ),
        _ if name == "lora_ga"
            || lower == "olora"
            || ["pissa", "corda"].iter().any(|init| name.starts_with(init)) =>
        {
            Standing::Residual(
                "this initialisation changes the base model itself, so the factors are only valid \
                 on that changed base; convert the adapter with PEFT's \
                 `path_initial_model_for_weight_conversion`, or give the changed base and \
                 --residual-base",
            )
        }
        _ => Standing::Refused("this initialisation is unknown here and may change the base"),
    }
}

/// Whether a field makes PEFT read plain LoRA as something else, so that it does not belong beside
/// plain LoRA. Unknown fields were let through on the user's word, and stay.
pub(super) fn is_beyond_plain(field: &str, value: &Value) -> bool {
    const READ: [&str; 9] = [
        "ensure_weight_tying",
        "lora_bias",
        "modules_to_save",
        "monteclora_config",
        "target_parameters",
        "trainable_token_indices",
        "use_bdlora",
        "use_dora",
        "velora_config",
    ];
    match field {
        "bias" => value.as_str() != Some("none"),
        _ if READ.contains(&field) => !is_empty(value),
        _ => matches!(
            standing(Method::Lora, field, value),
            Standing::Refused(_) | Standing::Residual(_)
        ),
    }
}

pub(super) fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}

/// Why an adapter of AdapterHub's `adapters` library is refused, if the configuration is of one:
/// it has no `peft_type`, and the method's own configuration lies within.
fn adapter_hub(fields: &Map<String, Value>) -> Option<&'static str> {
    let within = fields.get("config").and_then(Value::as_object).unwrap_or(fields);
    let architecture = within.get("architecture");
    if within.contains_key("reduction_factor") || within.contains_key("non_linearity") {
        let named = architecture.and_then(Value::as_str);
        return Some(match named {
            Some("lora") => "its LoRA is not read; save the adapter with PEFT",
            _ => {
                "a bottleneck adapter has a nonlinearity between its two matrices, so no change of \
                 a weight does what it does"
            }
        });
    }
    architecture.is_some().then_some("its methods are not read; save the adapter with PEFT")
}

/// alpha and the configured rank of a module, by PEFT's rules.
pub(super) struct ScalingTable {
    rank: Option<usize>,
    alpha: f64,
    rule: ScalingRule,
    ranks: PatternTable,
    alphas: PatternTable,
}

/// What the configuration says of one module.
pub(super) struct Configured {
    pub(super) rank: Option<usize>,
    pub(super) scaling: Scaling,
    /// Several alpha keys match, with different values.
    pub(super) alpha_contested: bool,
}

impl ScalingTable {
    /// PEFT's rank where the configuration gives none.
    pub(super) const DEFAULT_RANK: usize = 8;

    /// The table of a configuration whose field `alpha_field` is alpha.
    pub(super) fn new(
        path: &Path,
        fields: &Map<String, Value>,
        alpha_field: &'static str,
    ) -> Result<ScalingTable> {
        let missing = Value::Null;
        let alpha = fields.get(alpha_field).unwrap_or(&missing);
        let Some(alpha) = alpha.as_f64() else {
            return Err(Error::config(path, alpha_field, "a number", alpha));
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

    /// What is said of the module (or, of a bare parameter, the parameter) called `name`.
    pub(super) fn of(&mut self, name: &str) -> Result<Configured> {
        let rank = self.ranks.lookup(name)?.map(|found| found.value as usize).or(self.rank);
        let alpha = self.alphas.lookup(name)?;
        let contested = alpha.is_some_and(|found| found.contested);
        let alpha = alpha.map_or(self.alpha, |found| found.value);
        let scaling = Scaling { alpha, rule: self.rule };
        Ok(Configured { rank, scaling, alpha_contested: contested })
    }

    pub(super) fn dead_patterns(&self) -> impl Iterator<Item = Note> {
        let dead = |table: &PatternTable, field| -> Vec<Note> {
            table.dead_keys().map(|key| Note::DeadPattern { field, key: key.to_owned() }).collect()
        };
        dead(&self.ranks, "rank_pattern").into_iter().chain(dead(&self.alphas, "alpha_pattern"))
    }
}
