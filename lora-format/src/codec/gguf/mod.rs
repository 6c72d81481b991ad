//! llama.cpp's LoRA adapters: a GGUF file with `general.type` = `adapter`.
//!
//! Of every changed tensor it holds `<tensor>.lora_a` and `<tensor>.lora_b`, and for all of them
//! one `adapter.lora.alpha`: the scale is alpha divided by the rank, which is the first dimension of
//! `lora_b` (`llama_adapter_lora_weight::get_scale`), or 1 if alpha is 0 or absent. Shapes are
//! PEFT's, but for
//!
//! - the rows of B of a rotary projection, which Llama and its relatives have in another order
//!   (`codec/rearrange.rs`): the base's `config.json` says how many heads there are;
//! - A of the token embedding, which is transposed;
//! - the experts of a layer, which are stacked: A experts × rank × in, B experts × out × rank.
//!
//! There is no room for DoRA, biases, whole parameters or anything but LoRA, and activation tokens
//! (aLoRA) have no place in our model: all are refused by name.

mod names;
mod writer;

use std::collections::BTreeMap;

use serde_json::Map;

pub use writer::write;

use self::names::{Architecture, EMBEDDING, Modules};
use super::base::{Base, Heads};
use super::{ReadOptions, rearrange};
use crate::container::gguf::{GgufFile, GgufValue};
use crate::error::{AdapterProblem, BaseProblem, Error, GgufProblem, Result, Shape, Unsupported};
use crate::factors::{self, FactorTensors};
use crate::fingerprint::BaseIdentity;
use crate::model::{
    Adapter, AdapterFormat, Component, Form, Layer, LowRank, Scaling, ScalingRule, Target,
};
use crate::tensor::Tensor;

const FORMAT: &str = "GGUF";
const ARCHITECTURE: &str = "general.architecture";
const TYPE: &str = "general.type";
const ADAPTER_TYPE: &str = "adapter.type";
const ALPHA: &str = "adapter.lora.alpha";
const INVOCATION: &str = "adapter.alora.invocation_tokens";
const QUANTIZATION_VERSION: &str = "general.quantization_version";
const BASE_COUNT: &str = "general.base_model.count";
const BASE_NAME: &str = "general.base_model.0.name";
const BASE_URL: &str = "general.base_model.0.repo_url";
const HUB: &str = "https://huggingface.co/";
const A_SUFFIX: &str = ".weight.lora_a";
const B_SUFFIX: &str = ".weight.lora_b";

/// Reads an adapter.
pub(super) fn read(file: &GgufFile, options: &ReadOptions) -> Result<Adapter> {
    refuse_options(file, options)?;
    let architecture = check_values(file)?;
    let scaling = scaling(file)?;
    let mut reader = Reader { file, options, architecture, scaling, problems: Vec::new() };
    let components = reader.components()?;
    if !reader.problems.is_empty() {
        let problems = reader.problems;
        return Err(Error::Adapter { path: file.path().to_owned(), problems });
    }
    let mut adapter = Adapter::new(file.path(), components, base_identity(file));
    adapter.format = AdapterFormat::Gguf;
    adapter.metadata = own_metadata(file);
    adapter.extensions = Map::new();
    Ok(adapter)
}

fn refuse_options(file: &GgufFile, options: &ReadOptions) -> Result<()> {
    let (option, reason) = if options.alpha.is_some() {
        ("alpha", "the file says what the scale is")
    } else if !options.ignore_fields.is_empty() {
        ("field to ignore", "the file has no configuration")
    } else if options.residual_base {
        ("residual base", "the file records no initialisation")
    } else if options.enable_lora.is_some() {
        ("enable_lora", "only loralib has fused projections")
    } else {
        return Ok(());
    };
    Err(Error::Meaningless { path: file.path().to_owned(), option, reason })
}

fn invalid(file: &GgufFile, problem: GgufProblem) -> Error {
    Error::Gguf { path: file.path().to_owned(), problem }
}

/// A string value.
fn text<'a>(file: &'a GgufFile, key: &str) -> Option<&'a str> {
    match file.value(key) {
        Some(GgufValue::String(text)) => Some(text),
        _ => None,
    }
}

/// That it is a LoRA adapter, and for which architecture.
fn check_values(file: &GgufFile) -> Result<&'static Architecture> {
    for (key, expected, wanted) in
        [(TYPE, "`adapter`", "adapter"), (ADAPTER_TYPE, "`lora`", "lora")]
    {
        if text(file, key) != Some(wanted) {
            let found = found(file.value(key));
            return Err(invalid(file, GgufProblem::Value { key: key.to_owned(), expected, found }));
        }
    }
    if file.value(INVOCATION).is_some() {
        let feature = INVOCATION.to_owned();
        let reason =
            "an activated LoRA acts only after certain tokens; it cannot be merged".to_owned();
        let features = vec![Unsupported { feature, reason }];
        return Err(Error::Unsupported { path: file.path().to_owned(), features });
    }
    let Some(name) = text(file, ARCHITECTURE) else {
        let (key, found) = (ARCHITECTURE.to_owned(), found(file.value(ARCHITECTURE)));
        return Err(invalid(file, GgufProblem::Value { key, expected: "a name", found }));
    };
    Architecture::named(name).ok_or_else(|| Error::Base {
        path: file.path().to_owned(),
        problem: BaseProblem::Architecture { format: FORMAT, architecture: name.to_owned() },
    })
}

/// A value as a message says it.
fn found(value: Option<&GgufValue>) -> String {
    match value {
        None => "nothing".to_owned(),
        Some(GgufValue::String(text)) => format!("`{}`", text.chars().take(60).collect::<String>()),
        Some(other) => format!("a value of type {}", other.type_name()),
    }
}

fn scaling(file: &GgufFile) -> Result<Scaling> {
    match file.value(ALPHA) {
        // `alpha ? … : adapter_scale`: without an alpha the product is added as it is.
        None | Some(GgufValue::F32(0.0)) => Ok(Scaling { alpha: 1.0, rule: ScalingRule::Direct }),
        Some(GgufValue::F32(alpha)) => {
            Ok(Scaling { alpha: f64::from(*alpha), rule: ScalingRule::AlphaOverRank })
        }
        other => {
            let (key, found) = (ALPHA.to_owned(), found(other));
            Err(invalid(file, GgufProblem::Value { key, expected: "an f32", found }))
        }
    }
}

/// What the file says of the base: its repository, or its name.
fn base_identity(file: &GgufFile) -> BaseIdentity {
    let repository = text(file, BASE_URL).and_then(|url| url.strip_prefix(HUB));
    let name = repository.or_else(|| text(file, BASE_NAME)).filter(|name| !name.is_empty());
    BaseIdentity { name: name.map(str::to_owned), revision: None, fingerprint: None }
}

/// The strings about the adapter itself.
fn own_metadata(file: &GgufFile) -> Vec<(String, String)> {
    let own = |key: &str| {
        key.starts_with("general.")
            && !key.starts_with("general.base_model.")
            && key != ARCHITECTURE
            && key != TYPE
    };
    let entries = file.values().iter().filter_map(|(key, value)| match value {
        GgufValue::String(text) if own(key) => Some((key.clone(), text.clone())),
        _ => None,
    });
    entries.collect()
}

struct Reader<'a> {
    file: &'a GgufFile,
    options: &'a ReadOptions,
    architecture: &'static Architecture,
    scaling: Scaling,
    problems: Vec<AdapterProblem>,
}

impl Reader<'_> {
    fn components(&mut self) -> Result<Vec<Component>> {
        let mut components = Vec::new();
        for (name, found) in self.factors()? {
            let Some(modules) = self.architecture.modules(&name) else {
                self.problems.extend(
                    [found.a, found.b]
                        .into_iter()
                        .flatten()
                        .map(|tensor| AdapterProblem::UnusedTensor { tensor: tensor.name }),
                );
                continue;
            };
            match modules {
                Modules::One(module) => self.push_one(&name, module, found, &mut components)?,
                Modules::Experts(before, after) => {
                    let module = |expert: usize| format!("{before}{expert}{after}");
                    self.push_experts(&name, module, found, &mut components);
                }
            }
        }
        Ok(components)
    }

    /// The factors by the name of their tensor, without `.weight`.
    fn factors(&mut self) -> Result<BTreeMap<String, FactorTensors>> {
        let mut factors: BTreeMap<String, FactorTensors> = BTreeMap::new();
        let mut features = Vec::new();
        for info in self.file.tensors() {
            let name = info.name.clone();
            let (module, is_a) = match (name.strip_suffix(A_SUFFIX), name.strip_suffix(B_SUFFIX)) {
                (Some(module), _) => (module, true),
                (_, Some(module)) => (module, false),
                _ if name.ends_with("_norm.weight") => {
                    let reason = "a whole norm, which llama.cpp passes over: what was trained is not \
                                  what it computes";
                    features.push(Unsupported { feature: name, reason: reason.to_owned() });
                    continue;
                }
                _ => {
                    self.problems.push(AdapterProblem::UnusedTensor { tensor: name });
                    continue;
                }
            };
            let Some(tensor) = self.file.tensor(info) else {
                let reason =
                    format!("stored as {}; factors are read as F32, F16 or BF16", info.kind);
                features.push(Unsupported { feature: name, reason });
                continue;
            };
            let found = factors.entry(module.to_owned()).or_default();
            if is_a {
                found.a = Some(tensor);
            } else {
                found.b = Some(tensor);
            }
        }
        if features.is_empty() {
            return Ok(factors);
        }
        Err(Error::Unsupported { path: self.file.path().to_owned(), features })
    }

    fn push_one(
        &mut self,
        name: &str,
        module: String,
        mut found: FactorTensors,
        components: &mut Vec<Component>,
    ) -> Result<()> {
        let layer = if name == EMBEDDING { Layer::Embedding } else { Layer::Linear };
        if layer == Layer::Embedding {
            // What is no matrix is refused as such below.
            found.a = found.a.map(|a| rearrange::transposed(&a).unwrap_or(a));
        }
        if let (Some(heads), Some(b)) = (self.architecture.paired_heads(name), &found.b) {
            found.b = Some(self.halved(&module, b, heads)?);
        }
        let built = self.build(name, &module, layer, found);
        components.extend(built.map(|low_rank| component(module, low_rank)));
        Ok(())
    }

    fn build(
        &mut self,
        name: &str,
        module: &str,
        layer: Layer,
        found: FactorTensors,
    ) -> Option<LowRank> {
        let names = (format!("{name}{A_SUFFIX}"), format!("{name}{B_SUFFIX}"));
        factors::of_layer(module, layer, found, names, self.scaling, &mut self.problems)
    }

    /// B with its rows in the order of transformers.
    fn halved(&self, module: &str, b: &Tensor, heads: Heads) -> Result<Tensor> {
        let base = Base::needed(self.file.path(), self.options.base_config.as_ref(), || {
            let name = self.architecture.name;
            format!(
                "the rows of `{module}` are in the order of {name}'s heads, and only it says how many there are"
            )
        })?;
        let class = base.class()?;
        if Architecture::of_class(class).is_none_or(|it| it.name != self.architecture.name) {
            let (adapter, base_class) = (self.architecture.name.to_owned(), class.to_owned());
            return Err(base.problem(BaseProblem::Disagrees { adapter, base: base_class }));
        }
        let heads = base.heads(heads)?;
        rearrange::halved(b, heads).ok_or_else(|| {
            let (module, rows) = (module.to_owned(), b.shape.first().copied().unwrap_or(0));
            base.problem(BaseProblem::Heads { module, rows, heads })
        })
    }

    /// The change of every expert.
    fn push_experts(
        &mut self,
        name: &str,
        module: impl Fn(usize) -> String,
        found: FactorTensors,
        components: &mut Vec<Component>,
    ) {
        let (Some(a), Some(b)) = (&found.a, &found.b) else {
            // Says which is missing.
            self.build(name, name, Layer::Linear, found);
            return;
        };
        let before = self.problems.len();
        let expected = "the factors of experts are stacked in three dimensions, alike";
        for factor in [a, b] {
            if factor.shape.len() != 3 || factor.shape.first() != a.shape.first() {
                let (tensor, shape) = (factor.name.clone(), Shape(factor.shape.clone()));
                self.problems.push(AdapterProblem::FactorShape { tensor, shape, expected });
            }
        }
        if self.problems.len() > before {
            return;
        }
        let (Some(all_a), Some(all_b)) = (rearrange::unstacked(a), rearrange::unstacked(b)) else {
            let (tensor, shape) = (a.name.clone(), Shape(a.shape.clone()));
            self.problems.push(AdapterProblem::FactorShape { tensor, shape, expected });
            return;
        };
        for (expert, (a, b)) in all_a.into_iter().zip(all_b).enumerate() {
            let module = module(expert);
            let found = FactorTensors { a: Some(a), b: Some(b) };
            match self.build(name, &module, Layer::Linear, found) {
                Some(low_rank) => components.push(component(module, low_rank)),
                // The others have the same.
                None => return,
            }
        }
    }
}

fn component(module: String, low_rank: LowRank) -> Component {
    Component { target: Target::weight(module), form: Form::LowRank(low_rank) }
}
