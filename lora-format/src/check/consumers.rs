//! What the programs that load adapters make of them.
//!
//! Read off vLLM (`lora/peft_helper.py`, `lora/lora_weights.py`, `lora/lora_model.py`), PEFT 0.21
//! (`utils/save_and_load.py`), llama.cpp (`src/llama-adapter.cpp`), ComfyUI (`comfy/lora.py`,
//! `comfy/weight_adapter`), mlx-lm (`tuner/utils.py`) and diffusers 0.42
//! (`loaders/lora_conversion_utils.py`).

use serde_json::{Map, Value};

use super::{Finding, Fix, Kind};
use crate::model::{Adapter, AdapterFormat, Component, Form, LowRank};
use crate::pattern;

/// A program that loads adapters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Consumer {
    /// vLLM.
    Vllm,
    /// transformers with PEFT.
    Transformers,
    /// llama.cpp.
    LlamaCpp,
    /// ComfyUI.
    ComfyUi,
    /// mlx-lm.
    Mlx,
    /// diffusers.
    Diffusers,
}

impl Consumer {
    /// All of them.
    pub const ALL: [Consumer; 6] = [
        Consumer::Vllm,
        Consumer::Transformers,
        Consumer::LlamaCpp,
        Consumer::ComfyUi,
        Consumer::Mlx,
        Consumer::Diffusers,
    ];

    /// The name that `--for` takes.
    pub fn name(self) -> &'static str {
        match self {
            Consumer::Vllm => "vllm",
            Consumer::Transformers => "transformers",
            Consumer::LlamaCpp => "llama.cpp",
            Consumer::ComfyUi => "comfyui",
            Consumer::Mlx => "mlx",
            Consumer::Diffusers => "diffusers",
        }
    }

    /// The formats that it loads; the first is the one to convert to.
    fn formats(self) -> &'static [AdapterFormat] {
        match self {
            Consumer::Vllm | Consumer::Transformers => &[AdapterFormat::Peft],
            Consumer::LlamaCpp => &[AdapterFormat::Gguf],
            Consumer::ComfyUi => {
                &[AdapterFormat::Comfy, AdapterFormat::Kohya, AdapterFormat::Diffusers]
            }
            Consumer::Mlx => &[AdapterFormat::Mlx],
            Consumer::Diffusers => &[AdapterFormat::Diffusers, AdapterFormat::Kohya],
        }
    }
}

pub(super) fn findings(adapter: &Adapter, consumer: Consumer) -> Vec<Finding> {
    let formats = consumer.formats();
    if !formats.contains(&adapter.format) {
        let (name, format) = (consumer.name(), adapter.format);
        return vec![Finding {
            kind: Kind::Refused,
            names: Vec::new(),
            what: format!("{name} does not load the format {format}"),
            fix: formats.first().map(|&format| Fix::Convert(format)),
        }];
    }
    match consumer {
        Consumer::Vllm => {
            let mut found = peft(adapter);
            found.extend(vllm(adapter));
            found
        }
        Consumer::Transformers => peft(adapter),
        Consumer::Diffusers => diffusers(adapter),
        // What these formats can say their programs load.
        Consumer::ComfyUi | Consumer::LlamaCpp | Consumer::Mlx => Vec::new(),
    }
}

/// The names of the components that satisfy a condition.
fn names(adapter: &Adapter, condition: impl Fn(&Component) -> bool) -> Vec<String> {
    let fitting = adapter.components.iter().filter(|one| condition(one));
    fitting.map(|one| one.target.name()).collect()
}

fn push(
    found: &mut Vec<Finding>,
    kind: Kind,
    names: Vec<String>,
    what: impl Into<String>,
    fix: Option<Fix>,
) {
    if !names.is_empty() {
        found.push(Finding { kind, names, what: what.into(), fix });
    }
}

/// PEFT builds the layers that `target_modules` names, and then drops every tensor that none of
/// them asks for, without a word.
fn peft(adapter: &Adapter) -> Vec<Finding> {
    let mut found = Vec::new();
    let Some(config) = adapter.source.as_ref().map(|source| &source.config) else {
        return found;
    };
    if let Some(targets) = Targets::of(config) {
        let ignored = names(adapter, |one| {
            matches!(one.form, Form::LowRank(_)) && !targets.name(&one.target.module)
        });
        let what = "is named by none of the `target_modules`, so PEFT builds no layer for it and \
                    drops its factors";
        push(&mut found, Kind::Ignored, ignored, what, Some(Fix::Convert(AdapterFormat::Peft)));
    }
    found
}

/// What `target_modules` names.
enum Targets {
    /// A name, or what it ends with after a dot.
    Names(Vec<String>),
    /// A pattern of whole names.
    Pattern(pattern::Whole),
}

impl Targets {
    /// `None` of what only the model decides (`all-linear`), or of a pattern that is not read here.
    fn of(config: &Map<String, Value>) -> Option<Targets> {
        match config.get("target_modules")? {
            Value::Array(names) => {
                let names = names.iter().filter_map(Value::as_str).map(str::to_owned);
                Some(Targets::Names(names.collect()))
            }
            Value::String(text) if text != "all-linear" => {
                pattern::Whole::compile(text).map(Targets::Pattern)
            }
            _ => None,
        }
    }

    fn name(&self, module: &str) -> bool {
        match self {
            Targets::Names(names) => names.iter().any(|name| {
                module
                    .strip_suffix(name.as_str())
                    .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
            }),
            Targets::Pattern(pattern) => pattern.matches(module),
        }
    }
}

/// vLLM's LoRA layers are one rank and one scale, from `r` and `lora_alpha`.
fn vllm(adapter: &Adapter) -> Vec<Finding> {
    /// What `--max-lora-rank` may be at most.
    const LARGEST_RANK: usize = 512;
    let mut found = Vec::new();
    let others = names(adapter, |one| !matches!(one.form, Form::LowRank(_)));
    let what = "is no LoRA of a linear layer or an embedding: vLLM refuses the adapter";
    push(&mut found, Kind::Refused, others, what, Some(Fix::Merge));
    let low_rank = |one: &Component, condition: &dyn Fn(&LowRank) -> bool| match &one.form {
        Form::LowRank(form) => condition(form),
        _ => false,
    };
    let dora = names(adapter, |one| low_rank(one, &|form| form.magnitude.is_some()));
    push(&mut found, Kind::Refused, dora, "uses DoRA, which vLLM refuses", Some(Fix::Merge));
    let large = names(adapter, |one| low_rank(one, &|form| form.rank() > LARGEST_RANK));
    let what = "has a rank above 512, the largest that --max-lora-rank may be";
    push(&mut found, Kind::Refused, large, what, Some(Fix::Merge));
    let config = adapter.source.as_ref().map(|source| &source.config);
    if let Some(scale) = config.and_then(configured_scale) {
        let other = names(adapter, |one| low_rank(one, &|form| form.scale() != scale));
        let what = format!(
            "has another scale than {scale}, which vLLM takes from `r` and `lora_alpha` for every \
             module: it does not read `alpha_pattern` and divides by one rank"
        );
        push(&mut found, Kind::Misread, other, what, Some(Fix::Merge));
    }
    for (field, what) in [
        ("bias", "vLLM refuses a `bias` other than none"),
        ("lora_bias", "vLLM refuses `lora_bias`"),
        ("modules_to_save", "vLLM refuses `modules_to_save`"),
    ] {
        let value = config.and_then(|config| config.get(field));
        let empty = match value {
            None | Some(Value::Null | Value::Bool(false)) => true,
            Some(Value::String(text)) => text == "none",
            Some(Value::Array(list)) => list.is_empty(),
            Some(_) => false,
        };
        if !empty {
            let names = vec![field.to_owned()];
            push(&mut found, Kind::Refused, names, what, Some(Fix::Merge));
        }
    }
    found
}

/// The scale that `r`, `lora_alpha` and `use_rslora` give.
fn configured_scale(config: &Map<String, Value>) -> Option<f64> {
    let rank = config.get("r")?.as_f64()?;
    let alpha = config.get("lora_alpha")?.as_f64()?;
    let root = config.get("use_rslora").and_then(Value::as_bool).unwrap_or(false);
    Some(alpha / if root { rank.sqrt() } else { rank })
}

/// diffusers loads LoRA and DoRA; LyCORIS' other methods are unknown to it, and it says so of some
/// and nothing of others.
fn diffusers(adapter: &Adapter) -> Vec<Finding> {
    let mut found = Vec::new();
    let others = names(adapter, |one| !matches!(one.form, Form::LowRank(_)));
    let what = "is no LoRA: diffusers knows no other method";
    push(&mut found, Kind::Refused, others, what, Some(Fix::Merge));
    found
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use serde_json::json;

    use super::*;

    fn targets(value: Value) -> Targets {
        let config = json!({ "target_modules": value });
        Targets::of(config.as_object().unwrap()).unwrap()
    }

    #[test]
    fn target_modules_are_read_as_peft_reads_them() {
        let list = targets(json!(["q_proj", "mlp.up_proj"]));
        assert!(list.name("model.layers.0.self_attn.q_proj") && list.name("q_proj"));
        assert!(list.name("model.layers.0.mlp.up_proj"));
        assert!(!list.name("model.layers.0.self_attn.xq_proj"));
        assert!(!list.name("model.layers.0.experts.up_proj"));
        let pattern = targets(json!(r"model\.layers\.\d+\.self_attn\.(q|v)_proj"));
        assert!(pattern.name("model.layers.11.self_attn.v_proj"));
        assert!(!pattern.name("x.model.layers.11.self_attn.v_proj"));
        let config = json!({ "target_modules": "all-linear" });
        assert!(Targets::of(config.as_object().unwrap()).is_none());
    }
}
