//! The names of llama.cpp for the modules of transformers' models, by architecture.
//!
//! The pairs are those of `gguf.get_tensor_name_map` of the Python package gguf 0.19.0; which
//! architectures have the rows of their rotary heads reordered is read off `undo_permute` of
//! llama.cpp's converters. `{}` stands for the number of an expert, all of which share one tensor.

use crate::codec::base::Heads;
use crate::limits;

/// A model architecture of llama.cpp.
#[derive(Debug)]
pub(super) struct Architecture {
    /// `general.architecture`.
    pub(super) name: &'static str,
    /// The classes of transformers that are converted to it.
    classes: &'static [&'static str],
    /// Whether rows of q and k are stored pair by pair.
    paired: bool,
    /// Whether an output head has a name; llama.cpp reads none for the others.
    head: bool,
    /// The names within a layer.
    tables: &'static [&'static [Pair]],
}

/// A name within `blk.N.` and within `model.layers.N.`.
type Pair = (&'static str, &'static str);

const ATTENTION: &[Pair] = &[
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
];
const GATED: &[Pair] =
    &[("ffn_gate", "mlp.gate_proj"), ("ffn_up", "mlp.up_proj"), ("ffn_down", "mlp.down_proj")];
const FUSED: &[Pair] = &[
    ("attn_qkv", "self_attn.qkv_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_up", "mlp.gate_up_proj"),
    ("ffn_down", "mlp.down_proj"),
];
const UNGATED: &[Pair] = &[("ffn_up", "mlp.c_fc"), ("ffn_down", "mlp.c_proj")];
const EXPERTS: &[Pair] = &[
    ("ffn_gate_inp", "mlp.gate"),
    ("ffn_gate_exps", "mlp.experts.{}.gate_proj"),
    ("ffn_up_exps", "mlp.experts.{}.up_proj"),
    ("ffn_down_exps", "mlp.experts.{}.down_proj"),
];
const SHARED_EXPERT: &[Pair] = &[
    ("ffn_gate_inp_shexp", "mlp.shared_expert_gate"),
    ("ffn_gate_shexp", "mlp.shared_expert.gate_proj"),
    ("ffn_up_shexp", "mlp.shared_expert.up_proj"),
    ("ffn_down_shexp", "mlp.shared_expert.down_proj"),
];
const MIXTRAL: &[Pair] = &[
    ("ffn_gate_inp", "block_sparse_moe.gate"),
    ("ffn_gate_exps", "block_sparse_moe.experts.{}.w1"),
    ("ffn_up_exps", "block_sparse_moe.experts.{}.w3"),
    ("ffn_down_exps", "block_sparse_moe.experts.{}.w2"),
];

const fn plain(
    name: &'static str,
    classes: &'static [&'static str],
    tables: &'static [&'static [Pair]],
) -> Architecture {
    Architecture { name, classes, paired: false, head: true, tables }
}

static ARCHITECTURES: &[Architecture] = &[
    Architecture {
        paired: true,
        ..plain(
            "llama",
            &["LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM"],
            &[ATTENTION, GATED, MIXTRAL],
        )
    },
    Architecture { paired: true, ..plain("granite", &["GraniteForCausalLM"], &[ATTENTION, GATED]) },
    Architecture { paired: true, ..plain("smollm3", &["SmolLM3ForCausalLM"], &[ATTENTION, GATED]) },
    plain("qwen2", &["Qwen2ForCausalLM"], &[ATTENTION, GATED]),
    plain("qwen3", &["Qwen3ForCausalLM"], &[ATTENTION, GATED]),
    plain("qwen2moe", &["Qwen2MoeForCausalLM"], &[ATTENTION, EXPERTS, SHARED_EXPERT]),
    plain("qwen3moe", &["Qwen3MoeForCausalLM"], &[ATTENTION, EXPERTS]),
    Architecture { head: false, ..plain("gemma", &["GemmaForCausalLM"], &[ATTENTION, GATED]) },
    Architecture { head: false, ..plain("gemma2", &["Gemma2ForCausalLM"], &[ATTENTION, GATED]) },
    plain("gemma3", &["Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"], &[ATTENTION, GATED]),
    plain("phi3", &["Phi3ForCausalLM"], &[FUSED]),
    plain("starcoder2", &["Starcoder2ForCausalLM"], &[ATTENTION, UNGATED]),
];

/// Where llama.cpp has a module of transformers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// The tensor, without `.weight`.
    pub(super) tensor: String,
    /// Which of the experts that share the tensor it is.
    pub(super) expert: Option<usize>,
}

/// A module of transformers, or one for each expert.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Modules {
    One(String),
    /// The name before and after the expert's number.
    Experts(String, &'static str),
}

/// The input embedding in GGUF.
pub(super) const EMBEDDING: &str = "token_embd";
const ENDS: [Pair; 2] = [(EMBEDDING, "model.embed_tokens"), ("output", "lm_head")];

impl Architecture {
    pub(super) fn named(name: &str) -> Option<&'static Architecture> {
        ARCHITECTURES.iter().find(|it| it.name == name)
    }

    /// The one that a class of transformers is converted to.
    pub(super) fn of_class(class: &str) -> Option<&'static Architecture> {
        ARCHITECTURES.iter().find(|it| it.classes.contains(&class))
    }

    /// The heads that the rows of a tensor are reordered by.
    pub(super) fn paired_heads(&self, tensor: &str) -> Option<Heads> {
        let heads = match tensor.rsplit_once('.')?.1 {
            "attn_q" => Heads::Query,
            "attn_k" => Heads::Key,
            _ => return None,
        };
        self.paired.then_some(heads)
    }

    /// All names within a layer.
    fn pairs(&self) -> impl Iterator<Item = &'static Pair> + use<> {
        self.tables.iter().flat_map(|table| table.iter())
    }

    /// Where a module of transformers is; of the language model in a multimodal one too.
    pub(super) fn place(&self, module: &str) -> Option<Place> {
        let text = ["model.language_model.", "language_model.model."]
            .into_iter()
            .find_map(|prefix| module.strip_prefix(prefix));
        let module = match text {
            Some(rest) => format!("model.{rest}"),
            None => module.strip_prefix("language_model.").unwrap_or(module).to_owned(),
        };
        if let Some((end, _)) = ENDS.iter().find(|pair| pair.1 == module) {
            let known = self.head || *end == EMBEDDING;
            return known.then(|| Place { tensor: (*end).to_owned(), expert: None });
        }
        let (layer, inner) = numbered(module.strip_prefix("model.layers.")?)?;
        self.pairs().find_map(|(tensor, name)| {
            let expert = match name.split_once("{}") {
                None => (*name == inner).then_some(None)?,
                Some((before, after)) => {
                    let number = inner.strip_prefix(before)?.strip_suffix(after)?;
                    Some(index(number)?)
                }
            };
            Some(Place { tensor: format!("blk.{layer}.{tensor}"), expert })
        })
    }

    /// The module, or modules, of a tensor without `.weight`.
    pub(super) fn modules(&self, tensor: &str) -> Option<Modules> {
        if let Some((end, module)) = ENDS.iter().find(|pair| pair.0 == tensor) {
            let known = self.head || *end == EMBEDDING;
            return known.then(|| Modules::One((*module).to_owned()));
        }
        let (layer, inner) = numbered(tensor.strip_prefix("blk.")?)?;
        let (_, name) = self.pairs().find(|pair| pair.0 == inner)?;
        Some(match name.split_once("{}") {
            None => Modules::One(format!("model.layers.{layer}.{name}")),
            Some((before, after)) => {
                Modules::Experts(format!("model.layers.{layer}.{before}"), after)
            }
        })
    }
}

/// The number before the first dot, and what follows.
fn numbered(text: &str) -> Option<(usize, &str)> {
    let (number, rest) = text.split_once('.')?;
    Some((index(number)?, rest))
}

/// A number as it is written in names: decimal, without zeros before it.
fn index(text: &str) -> Option<usize> {
    let value: usize = text.parse().ok()?;
    (value < limits::NAMED_INDEX && value.to_string() == text).then_some(value)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn place(architecture: &str, module: &str) -> Option<(String, Option<usize>)> {
        let place = Architecture::named(architecture)?.place(module)?;
        Some((place.tensor, place.expert))
    }

    #[test]
    fn names_there_and_back() {
        for architecture in ARCHITECTURES {
            for (tensor, name) in architecture.pairs() {
                let module = format!("model.layers.12.{}", name.replace("{}", "7"));
                let place = architecture.place(&module).unwrap();
                assert_eq!(place.tensor, format!("blk.12.{tensor}"));
                let again = match architecture.modules(&place.tensor).unwrap() {
                    Modules::One(name) => name,
                    Modules::Experts(before, after) => format!("{before}7{after}"),
                };
                assert_eq!(again, module);
            }
        }
    }

    #[test]
    fn ends_and_strangers() {
        let embedding = Some(("token_embd".to_owned(), None));
        assert_eq!(place("gemma", "model.embed_tokens"), embedding);
        assert_eq!(place("gemma3", "model.language_model.embed_tokens"), embedding);
        assert_eq!(place("gemma", "lm_head"), None);
        assert_eq!(place("llama", "lm_head"), Some(("output".to_owned(), None)));
        let gate = Some(("blk.3.ffn_gate_exps".to_owned(), Some(5)));
        assert_eq!(place("llama", "model.layers.3.block_sparse_moe.experts.5.w1"), gate);
        for module in [
            "model.layers.03.mlp.up_proj",
            "model.layers.+3.mlp.up_proj",
            "model.layers.3.mlp",
            "model.layers.99999999999.mlp.up_proj",
            "model.layers.3.mlp.experts.x.up_proj",
            "layers.3.mlp.up_proj",
        ] {
            assert_eq!(place("llama", module), None, "{module}");
        }
    }
}
