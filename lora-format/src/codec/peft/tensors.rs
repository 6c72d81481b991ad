//! Tensor names: which module a tensor belongs to and what it is there.

use std::collections::{BTreeMap, BTreeSet};

use super::PREFIX;
use super::config::{Configuration, is_empty, strings};
use super::methods::{Method, STEMS};
use crate::error::{AdapterProblem, Error, Result, Unsupported};
use crate::model::Note;
use crate::tensor::Tensor;
use crate::vocabulary;

/// An adapter's tensors by module and meaning.
#[derive(Default)]
pub(super) struct Sorted {
    /// The method's own tensors, by module as the file names it: wrappers leave `base_layer` in it.
    pub(super) modules: BTreeMap<String, Parts>,
    /// Tensors stored in full, by module and parameter.
    pub(super) full: BTreeMap<(String, String), Full>,
    /// VeRA's factors, which all modules share.
    pub(super) shared: Parts,
    /// Tensors that only training needed, or that repeat others.
    pub(super) passed_over: Vec<Note>,
}

/// The tensors of one module, by what they are.
#[derive(Default)]
pub(super) struct Parts(BTreeMap<&'static str, Tensor>);

impl Parts {
    pub(super) fn take(&mut self, part: &'static str) -> Option<Tensor> {
        self.0.remove(part)
    }

    pub(super) fn has(&self, part: &'static str) -> bool {
        self.0.contains_key(part)
    }

    pub(super) fn shape(&self, part: &'static str) -> Option<&[usize]> {
        self.0.get(part).map(|tensor| &*tensor.shape)
    }

    /// The name of any of them: all have the same beginning.
    pub(super) fn any_name(&self) -> Option<&str> {
        self.0.values().next().map(|tensor| &*tensor.name)
    }

    pub(super) fn into_rest(self) -> impl Iterator<Item = Tensor> {
        self.0.into_values()
    }

    fn insert(&mut self, part: &'static str, tensor: Tensor, problems: &mut Vec<AdapterProblem>) {
        let second = tensor.name.clone();
        if let Some(first) = self.0.insert(part, tensor) {
            problems.push(AdapterProblem::DuplicateFactor { first: first.name, second });
        }
    }
}

/// A parameter stored in full.
pub(super) enum Full {
    /// Trained, in place of the base's.
    Trained(Tensor),
    /// The base's, as it was when training began.
    Base(Tensor),
}

impl Full {
    pub(super) fn tensor(&self) -> &Tensor {
        match self {
            Full::Trained(tensor) | Full::Base(tensor) => tensor,
        }
    }
}

/// Sorts the tensors of a file.
///
/// # Errors
/// [`Error::Unsupported`] with every tensor that means nothing here, by reason.
pub(super) fn sort(
    tensors: Vec<Tensor>,
    config: &Configuration<'_>,
    problems: &mut Vec<AdapterProblem>,
) -> Result<Sorted> {
    let explained = Explained::of(config)?;
    let mut sorted = Sorted::default();
    let mut copies = Vec::new();
    let mut refused: BTreeMap<&'static str, Vec<String>> = BTreeMap::new();
    for tensor in tensors {
        if config.method == Method::Vera
            && let Some(part) = shared_part(&tensor.name)
        {
            sorted.shared.insert(part, tensor, problems);
            continue;
        }
        let name = tensor.name.strip_prefix(PREFIX).unwrap_or(&tensor.name);
        if let Some((module, part)) = find_part(config.method, name) {
            let module = module.to_owned();
            sorted.modules.entry(module).or_default().insert(part, tensor, problems);
        } else if let Some(reason) = explained.is_of_training(name) {
            sorted.passed_over.push(Note::PassedOver { tensor: tensor.name, reason });
        } else if let Some(reason) = why_refused(config, name) {
            refused.entry(reason).or_default().push(tensor.name);
        } else {
            match explained.stored_in_full(name) {
                Ok(Stored::Trained(module, parameter)) => {
                    sorted.insert((module, parameter), Full::Trained(tensor), problems);
                }
                Ok(Stored::Base(module, parameter)) => {
                    sorted.insert((module, parameter), Full::Base(tensor), problems);
                }
                Ok(Stored::Copy { module, parameter, original }) => {
                    copies.push(((module, parameter), original, tensor));
                }
                Err(reason) => refused.entry(reason).or_default().push(tensor.name),
            }
        }
    }
    for name in sorted.lone_copies() {
        refused.entry(LONE_COPY).or_default().push(name);
    }
    if !refused.is_empty() {
        let features = refused.into_iter().map(|(reason, tensors)| summarise(reason, &tensors));
        let path = config.path.to_owned();
        return Err(Error::Unsupported { path, features: features.collect() });
    }
    for (target, original, copy) in copies {
        sorted.pass_over_copy(&target, original, copy, problems);
    }
    Ok(sorted)
}

impl Sorted {
    fn insert(&mut self, target: (String, String), full: Full, problems: &mut Vec<AdapterProblem>) {
        let second = full.tensor().name.clone();
        if let Some(first) = self.full.insert(target, full) {
            let first = first.tensor().name.clone();
            problems.push(AdapterProblem::DuplicateFactor { first, second });
        }
    }

    /// Copies of a base's weight that no tensor of the method changes: PEFT saves one only beside
    /// its changes.
    fn lone_copies(&self) -> Vec<String> {
        let inner = |name: &str| -> String {
            let segments =
                name.split('.').filter(|it| !["base_layer", "token_adapter"].contains(it));
            segments.collect::<Vec<_>>().join(".")
        };
        let changed: BTreeSet<String> = self.modules.keys().map(|name| inner(name)).collect();
        let copies = self.full.iter().filter_map(|((module, _), full)| match full {
            Full::Base(tensor) => (!changed.contains(module)).then(|| tensor.name.clone()),
            Full::Trained(_) => None,
        });
        copies.collect()
    }

    /// modules_to_save keeps the original beside the trained module, and some settings save both
    /// under their inner names as well.
    fn pass_over_copy(
        &mut self,
        target: &(String, String),
        original: bool,
        copy: Tensor,
        problems: &mut Vec<AdapterProblem>,
    ) {
        let tensor = copy.name.clone();
        let reason = match self.full.get(target) {
            Some(Full::Trained(_)) if original => {
                "the module that the trained one replaces, as it was before"
            }
            Some(Full::Trained(trained))
                if trained.shape == copy.shape
                    && trained.dtype == copy.dtype
                    && trained.bytes() == copy.bytes() =>
            {
                "the trained module, a second time"
            }
            Some(Full::Trained(trained)) => {
                let first = trained.name.clone();
                problems.push(AdapterProblem::CopiesDiffer { first, second: tensor });
                return;
            }
            _ => {
                problems.push(AdapterProblem::UnusedTensor { tensor });
                return;
            }
        };
        self.passed_over.push(Note::PassedOver { tensor, reason });
    }
}

/// VeRA's own two, which belong to no module.
fn shared_part(name: &str) -> Option<&'static str> {
    use super::methods::part;
    match name {
        "base_model.vera_A" => Some(part::A),
        "base_model.vera_B" => Some(part::B),
        _ => None,
    }
}

/// The module and the meaning of a tensor of `method`.
fn find_part(method: Method, name: &str) -> Option<(&str, &'static str)> {
    method.suffixes().iter().find_map(|&(suffix, part)| {
        let module = name.strip_suffix(suffix)?.strip_suffix('.')?;
        (!module.is_empty()).then_some((module, part))
    })
}

/// What the configuration says of tensors that are not the method's own.
struct Explained<'a> {
    modules_to_save: Vec<&'a str>,
    biases: bool,
    /// Whether PEFT trained every bias, whatever it belongs to.
    all_biases: bool,
    velora: bool,
    monteclora: bool,
}

/// A parameter that is stored in full.
enum Stored {
    Trained(String, String),
    Base(String, String),
    /// The module that was trained once more, or that which it replaces.
    Copy {
        module: String,
        parameter: String,
        original: bool,
    },
}

impl<'a> Explained<'a> {
    fn of(config: &Configuration<'a>) -> Result<Explained<'a>> {
        let bias = config.text("bias")?;
        let set = |field| config.get(field).is_some_and(|value| !is_empty(value));
        Ok(Explained {
            modules_to_save: match config.get("modules_to_save") {
                None => Vec::new(),
                Some(value) => strings(value).ok_or_else(|| {
                    Error::config(config.path, "modules_to_save", "a list of names", value)
                })?,
            },
            biases: bias.is_some_and(|bias| bias != "none"),
            all_biases: bias == Some("all"),
            velora: set("velora_config"),
            monteclora: set("monteclora_config"),
        })
    }

    /// Why a tensor of the method means nothing for the merged weight.
    fn is_of_training(&self, name: &str) -> Option<&'static str> {
        if self.velora && name.ends_with(".lora_velora_embed") {
            Some("VeLoRA's projection, which only the backward pass uses")
        } else if self.monteclora && name.contains(".lora_monteclora_sampler.") {
            Some("MonteCLoRA's sampler, which only training uses")
        } else {
            None
        }
    }

    /// What a tensor stored in full is.
    fn stored_in_full(&self, name: &str) -> Result<Stored, &'static str> {
        let Some((path, parameter)) = name.rsplit_once('.') else {
            return Err("a tensor of no module");
        };
        // What PEFT puts around a module leaves its name in the path.
        let mut module: Vec<&str> = Vec::new();
        let (mut copied, mut trained_again, mut original) = (false, false, false);
        for segment in path.split('.') {
            match segment {
                "base_layer" => copied = true,
                "token_adapter" => {}
                "modules_to_save" => trained_again = true,
                "original_module" => original = true,
                _ => module.push(segment),
            }
        }
        let module = module.join(".");
        if module.is_empty() {
            return Err("a tensor of no module");
        }
        let parameter = parameter.to_owned();
        if trained_again || original {
            return Ok(Stored::Copy { module, parameter, original });
        }
        // MultiheadAttention's `in_proj_bias` is one of those that PEFT saved before 0.21.
        let is_trained_bias = (parameter == "bias" && self.biases)
            || (parameter.ends_with("_bias") && self.all_biases);
        let of_vocabulary = vocabulary::may_be_saved_whole(&module);
        if is_trained_bias
            || (!copied && is_saved(&self.modules_to_save, &module))
            || (of_vocabulary && (!copied || parameter == "bias"))
        {
            return Ok(Stored::Trained(module, parameter));
        }
        if copied && parameter != "bias" {
            let is_saved = of_vocabulary && parameter == "weight";
            return if is_saved { Ok(Stored::Base(module, parameter)) } else { Err(STRANGE_COPY) };
        }
        Err("a tensor stored in full that no field of the configuration speaks of \
             (modules_to_save, bias)")
    }
}

/// Whether a module lies in one of `modules_to_save`, by PEFT's rule: the end of a name.
pub(super) fn is_saved(modules_to_save: &[&str], module: &str) -> bool {
    let mut ends = module.match_indices('.').map(|(at, _)| at).chain([module.len()]);
    ends.any(|end| {
        modules_to_save.iter().any(|name| !name.is_empty() && module[..end].ends_with(name))
    })
}

const LONE_COPY: &str = "a copy of the base's weight beside no change of it";

const STRANGE_COPY: &str = "a copy of the base's parameter, of which PEFT saves only the weights of \
                            embeddings and output heads";

const CHECKPOINT: &str = "named after an adapter inside a training checkpoint; save the adapter \
                          with PEFT's save_pretrained";

/// Why a tensor that is not one of the method's own is not one stored in full either.
fn why_refused(config: &Configuration<'_>, name: &str) -> Option<&'static str> {
    let segments: Vec<&str> = name.split('.').collect();
    let is_stem = |segment: &&str| STEMS.iter().any(|stem| segment.starts_with(stem));
    let at = segments.iter().position(|segment| is_stem(segment) || *segment == "modules_to_save");
    let at = at?;
    let (stem, rest) = (segments[at], &segments[at + 1..]);
    // `lora_A.default.weight`, `ia3_l.default`, `modules_to_save.default.weight`.
    const OWN: [&str; 4] = ["weight", "bias", "base_layer", "trainable_tokens_delta"];
    let named = |adapter: &str| !OWN.contains(&adapter) && stem != "lora_monteclora_sampler";
    match (stem, rest) {
        ("modules_to_save", [adapter, _, ..]) if named(adapter) => return Some(CHECKPOINT),
        ("modules_to_save", _) | ("token_adapter", ["base_layer", ..]) => return None,
        ("token_adapter", ["trainable_tokens_delta", _]) => return Some(CHECKPOINT),
        (_, [adapter] | [adapter, "weight" | "bias"]) if named(adapter) => {
            return Some(CHECKPOINT);
        }
        _ => {}
    }
    Some(match stem {
        "lora_magnitude_vector" | "dora_scale" => {
            "DoRA's magnitude in a form that PEFT does not write"
        }
        "lora_diag" => "KaSA's diagonal, though the configuration has no `kasa_config`",
        "lora_velora_embed" => "VeLoRA's projection, though there is no `velora_config`",
        "lora_monteclora_sampler" => "MonteCLoRA's sampler, though there is no `monteclora_config`",
        "oft_r" | "oft_s" => {
            "OFT as PEFT wrote it before 0.16, with another parametrisation; PEFT itself no longer \
             reads it"
        }
        _ if !config.recorded => {
            "without adapter_config.json only LoRA's own tensors can be understood"
        }
        _ if stem.starts_with("lora_") && config.method == Method::Lora => {
            "an unknown kind of LoRA tensor"
        }
        _ => "a tensor of another method than the configuration names",
    })
}

pub(super) fn summarise(reason: &str, tensors: &[String]) -> Unsupported {
    let feature = match tensors {
        [only] => format!("`{only}`"),
        [first, .., last] => format!("{} tensors, `{first}` to `{last}`", tensors.len()),
        [] => String::new(),
    };
    Unsupported { feature, reason: reason.to_owned() }
}
