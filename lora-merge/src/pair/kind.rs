//! What a parameter is to its layer, by its name, its shape and its neighbours' names.

use lora_format::vocabulary;

use crate::parameters::{Parameter, Parameters};

/// What a parameter is to its layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// The matrix of a linear layer.
    Linear,
    /// The kernel of a convolution of one to three dimensions: (out, in, …), a matrix of
    /// out × (in · kernel).
    Convolution,
    /// A table with a row for every token, position or other index.
    Embedding,
    /// The output head of a language model, with a row for every token.
    Head,
    /// What a norm multiplies by.
    Norm,
    /// What a layer adds.
    Bias,
    /// Matrices of several experts: (experts, rows, columns).
    Stack,
    /// Anything else: buffers, gates, learnt vectors.
    Other,
}

impl Kind {
    /// All of them, in the order of reports.
    pub const ALL: [Kind; 8] = [
        Kind::Linear,
        Kind::Convolution,
        Kind::Stack,
        Kind::Embedding,
        Kind::Head,
        Kind::Norm,
        Kind::Bias,
        Kind::Other,
    ];

    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Linear => "linear",
            Kind::Convolution => "convolution",
            Kind::Embedding => "embedding",
            Kind::Head => "head",
            Kind::Norm => "norm",
            Kind::Bias => "bias",
            Kind::Stack => "experts",
            Kind::Other => "other",
        }
    }
}

/// The kind of a parameter of a model.
pub(super) fn kind(parameter: &Parameter, model: &Parameters) -> Kind {
    let name = parameter.name.as_str();
    let (module, leaf) = name.rsplit_once('.').unwrap_or(("", name));
    let of_norm = is_norm(module);
    // Before the shapes: gpt-oss keeps the biases of its experts as a matrix.
    if leaf.ends_with("bias") || (leaf == "beta" && of_norm) {
        return Kind::Bias;
    }
    match parameter.shape.len() {
        1 if leaf == "weight" || of_norm && matches!(leaf, "gamma" | "scale" | "g") => Kind::Norm,
        2 if vocabulary::is_output_head(name) => Kind::Head,
        2 if vocabulary::is_input_embedding(name) => Kind::Embedding,
        2 if leaf == "weight" && is_table(module, model) => Kind::Embedding,
        2 if leaf.ends_with("weight") => Kind::Linear,
        3 if is_of_experts(name) => Kind::Stack,
        3..=5 if leaf == "weight" => Kind::Convolution,
        _ => Kind::Other,
    }
}

fn last(module: &str) -> &str {
    module.rsplit('.').next().unwrap_or(module)
}

/// Whether statistics or gains of a norm go by this module's name.
fn is_norm(module: &str) -> bool {
    let last = last(module).to_lowercase();
    let numbered_ln = |part: &str| {
        part.strip_prefix("ln").is_some_and(|rest| rest.is_empty() || rest.starts_with('_'))
    };
    last.contains("norm") || numbered_ln(&last) || last.ends_with("_ln")
}

/// Whether a module is a table of rows: it is called so, and has no bias, as tables never do and
/// the linear layers of diffusion transformers that are called embedders do.
fn is_table(module: &str, model: &Parameters) -> bool {
    let last = last(module).to_lowercase();
    let called = ["wpe", "wte", "relative_attention_bias"].contains(&last.as_str())
        || (last.contains("embed")
            && !["proj", "linear", "mapping", "norm"].iter().any(|other| last.contains(other)));
    called && model.find(&format!("{module}.bias")).is_none()
}

/// Whether the matrices of experts go by this name: `experts.gate_up_proj`,
/// `block_sparse_moe.input_linear.weight`.
fn is_of_experts(name: &str) -> bool {
    name.split('.').any(|part| part.ends_with("experts") || part.ends_with("moe"))
}
