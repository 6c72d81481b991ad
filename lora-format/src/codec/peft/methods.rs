//! PEFT's methods: which are read, what their tensors and configuration fields are called, and why
//! the others are refused.

/// A method whose adapters are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Method {
    Lora,
    AdaLora,
    LoHa,
    LoKr,
    Ia3,
    Oft,
    Vera,
    Miss,
    LayerNorm,
    Tokens,
    Bias,
    Hra,
    Boft,
    Hira,
    Delora,
    Gralora,
    C3a,
    Shira,
}

/// What a tensor is within its module.
pub(super) mod part {
    pub(crate) const A: &str = "A";
    pub(crate) const B: &str = "B";
    pub(crate) const B_BIAS: &str = "bias of B";
    pub(crate) const E: &str = "E";
    pub(crate) const EMBEDDING_A: &str = "A of an embedding";
    pub(crate) const EMBEDDING_B: &str = "B of an embedding";
    pub(crate) const MAGNITUDE: &str = "magnitude";
    pub(crate) const TOKENS: &str = "token rows";
    pub(crate) const W1: &str = "w1";
    pub(crate) const W1_A: &str = "w1_a";
    pub(crate) const W1_B: &str = "w1_b";
    pub(crate) const T1: &str = "t1";
    pub(crate) const W2: &str = "w2";
    pub(crate) const W2_A: &str = "w2_a";
    pub(crate) const W2_B: &str = "w2_b";
    pub(crate) const T2: &str = "t2";
    pub(crate) const GAIN: &str = "gain";
    pub(crate) const ROTATION: &str = "rotation";
    pub(crate) const EMBEDDING_ROTATION: &str = "rotation of an embedding";
    pub(crate) const LAMBDA_B: &str = "lambda_b";
    pub(crate) const LAMBDA_D: &str = "lambda_d";
    pub(crate) const BLOCK: &str = "block";
    pub(crate) const WEIGHT: &str = "weight";
    pub(crate) const BIAS: &str = "bias";
    pub(crate) const LAMBDA: &str = "lambda";
    pub(crate) const NORMS: &str = "norms";
    pub(crate) const HYBRID_A: &str = "A of the hybrid part";
    pub(crate) const HYBRID_B: &str = "B of the hybrid part";
    pub(crate) const INDICES: &str = "indices";
}

/// The ends of tensor names, and what such a tensor is.
type Suffixes = &'static [(&'static str, &'static str)];

const LORA_SUFFIXES: Suffixes = &[
    ("lora_A.weight", part::A),
    ("lora_B.weight", part::B),
    ("lora_B.bias", part::B_BIAS),
    ("lora_embedding_A", part::EMBEDDING_A),
    ("lora_embedding_B", part::EMBEDDING_B),
    ("lora_magnitude_vector", part::MAGNITUDE),
    ("lora_magnitude_vector.weight", part::MAGNITUDE),
    ("token_adapter.trainable_tokens_delta", part::TOKENS),
];
const ADALORA_SUFFIXES: Suffixes = &[
    ("lora_A", part::A),
    ("lora_B", part::B),
    ("lora_E", part::E),
    ("token_adapter.trainable_tokens_delta", part::TOKENS),
];
const LOHA_SUFFIXES: Suffixes = &[
    ("hada_w1_a", part::W1_A),
    ("hada_w1_b", part::W1_B),
    ("hada_t1", part::T1),
    ("hada_w2_a", part::W2_A),
    ("hada_w2_b", part::W2_B),
    ("hada_t2", part::T2),
];
const LOKR_SUFFIXES: Suffixes = &[
    ("lokr_w1", part::W1),
    ("lokr_w1_a", part::W1_A),
    ("lokr_w1_b", part::W1_B),
    ("lokr_w2", part::W2),
    ("lokr_w2_a", part::W2_A),
    ("lokr_w2_b", part::W2_B),
    ("lokr_t2", part::T2),
];
const OFT_SUFFIXES: Suffixes =
    &[("oft_R.weight", part::ROTATION), ("oft_embedding_R.weight", part::EMBEDDING_ROTATION)];
const VERA_SUFFIXES: Suffixes =
    &[("vera_lambda_b", part::LAMBDA_B), ("vera_lambda_d", part::LAMBDA_D)];
const HIRA_SUFFIXES: Suffixes = &[
    ("hira_A", part::A),
    ("hira_B", part::B),
    ("hira_embedding_A", part::EMBEDDING_A),
    ("hira_embedding_B", part::EMBEDDING_B),
];
const DELORA_SUFFIXES: Suffixes = &[
    ("delora_A", part::A),
    ("delora_B", part::B),
    ("delora_lambda", part::LAMBDA),
    ("delora_w_norm", part::NORMS),
];
const GRALORA_SUFFIXES: Suffixes = &[
    ("gralora_A", part::A),
    ("gralora_B", part::B),
    ("gralora_A_general.weight", part::HYBRID_A),
    ("gralora_B_general.weight", part::HYBRID_B),
];
const LAYER_NORM_SUFFIXES: Suffixes =
    &[("ln_tuning_layers.weight", part::WEIGHT), ("ln_tuning_layers.bias", part::BIAS)];

/// Fields of every configuration that steer training or say what was trained, which the tensors
/// say too.
const COMMON_FIELDS: [&str; 14] = [
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
];
const LORA_FIELDS: [&str; 24] = [
    "alpha_pattern",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "init_lora_weights",
    "loftq_config",
    // How unsloth packs the factors of fused experts: what reads it knows the base.
    "lora_B_layout",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "monteclora_config",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "unsloth_fused_expert_lora",
    "use_bdlora",
    "use_dora",
    "use_rslora",
    "velora_config",
];
const ADALORA_FIELDS: [&str; 9] = [
    "beta1",
    "beta2",
    "deltaT",
    "init_r",
    "orth_reg_weight",
    "target_r",
    "tfinal",
    "tinit",
    "total_step",
];
const LYCORIS_FIELDS: [&str; 11] = [
    "alpha",
    "alpha_pattern",
    "decompose_both",
    "decompose_factor",
    "init_weights",
    "module_dropout",
    "r",
    "rank_dropout",
    "rank_dropout_scale",
    "rank_pattern",
    "use_effective_conv2d",
];
const OFT_FIELDS: [&str; 10] = [
    "bias",
    "block_share",
    "coft",
    "eps",
    "init_weights",
    "module_dropout",
    "num_cayley_neumann_terms",
    "oft_block_size",
    "r",
    "use_cayley_neumann",
];
const VERA_FIELDS: [&str; 7] = [
    "bias",
    "d_initial",
    "init_weights",
    "projection_prng_key",
    "r",
    "save_projection",
    "vera_dropout",
];
const MISS_FIELDS: [&str; 6] =
    ["bias", "bone_dropout", "init_weights", "miss_dropout", "mini_r", "r"];

const BOFT_FIELDS: [&str; 6] = [
    "bias",
    "boft_block_num",
    "boft_block_size",
    "boft_dropout",
    "boft_n_butterfly_factor",
    "init_weights",
];
const DELORA_FIELDS: [&str; 7] = [
    "bias",
    "delora_lambda",
    "init_weights",
    "lambda_pattern",
    "module_dropout",
    "r",
    "rank_pattern",
];
const GRALORA_FIELDS: [&str; 7] =
    ["alpha", "bias", "gralora_dropout", "gralora_k", "hybrid_r", "init_weights", "r"];

impl Method {
    /// The method that a configuration's `peft_type` names, or why its adapters are refused.
    pub(super) fn of(peft_type: &str) -> Result<Method, &'static str> {
        Ok(match peft_type {
            "LORA" => Method::Lora,
            "ADALORA" => Method::AdaLora,
            "LOHA" => Method::LoHa,
            "LOKR" => Method::LoKr,
            "IA3" => Method::Ia3,
            "OFT" => Method::Oft,
            "VERA" => Method::Vera,
            // MiSS was called Bone before PEFT 0.18.
            "MISS" | "BONE" => Method::Miss,
            "LN_TUNING" => Method::LayerNorm,
            "TRAINABLE_TOKENS" => Method::Tokens,
            "BEFT" => Method::Bias,
            "HRA" => Method::Hra,
            "BOFT" => Method::Boft,
            "HIRA" => Method::Hira,
            "DELORA" => Method::Delora,
            "GRALORA" => Method::Gralora,
            "C3A" => Method::C3a,
            "SHIRA" => Method::Shira,
            other => return Err(why_refused(other)),
        })
    }

    /// The ends of its tensors' names.
    pub(super) fn suffixes(self) -> Suffixes {
        match self {
            Method::Lora => LORA_SUFFIXES,
            Method::AdaLora => ADALORA_SUFFIXES,
            Method::LoHa => LOHA_SUFFIXES,
            Method::LoKr => LOKR_SUFFIXES,
            Method::Ia3 => &[("ia3_l", part::GAIN)],
            Method::Oft => OFT_SUFFIXES,
            Method::Vera => VERA_SUFFIXES,
            Method::Miss => &[("miss_block", part::BLOCK), ("bone_block", part::BLOCK)],
            Method::LayerNorm => LAYER_NORM_SUFFIXES,
            Method::Tokens => &[("trainable_tokens_delta", part::TOKENS)],
            Method::Bias => &[("beft_bias", part::BIAS)],
            Method::Hra => &[("hra_u", part::ROTATION)],
            Method::Boft => &[("boft_R", part::ROTATION), ("boft_s", part::GAIN)],
            Method::Hira => HIRA_SUFFIXES,
            Method::Delora => DELORA_SUFFIXES,
            Method::Gralora => GRALORA_SUFFIXES,
            Method::C3a => &[("c3a_kernel", part::BLOCK)],
            Method::Shira => &[("shira_indices", part::INDICES), ("shira_weight", part::WEIGHT)],
        }
    }

    /// Whether its configuration may have the field, whatever its value.
    pub(super) fn knows(self, field: &str) -> bool {
        let own: &[&[&str]] = match self {
            Method::Lora => &[&LORA_FIELDS],
            Method::AdaLora => &[&LORA_FIELDS, &ADALORA_FIELDS],
            Method::LoHa | Method::LoKr => &[&LYCORIS_FIELDS],
            Method::Ia3 => &[&["feedforward_modules", "init_ia3_weights"]],
            Method::Oft => &[&OFT_FIELDS],
            Method::Vera => &[&VERA_FIELDS],
            Method::Miss => &[&MISS_FIELDS],
            Method::LayerNorm => &[],
            Method::Tokens => &[&["init_weights", "token_indices"]],
            Method::Bias => &[&["init_weights"]],
            Method::Hra => &[&["apply_GS", "bias", "init_weights", "r"]],
            Method::Boft => &[&BOFT_FIELDS],
            Method::Hira => &[&["hira_dropout", "init_weights", "r", "rank_pattern"]],
            Method::Delora => &[&DELORA_FIELDS],
            Method::Gralora => &[&GRALORA_FIELDS],
            Method::C3a => &[&["bias", "block_size", "block_size_pattern", "init_weights"]],
            Method::Shira => &[&["init_weights", "mask_type", "r", "random_seed"]],
        };
        COMMON_FIELDS.contains(&field) || own.iter().any(|fields| fields.contains(&field))
    }

    /// The field that holds alpha, of a method that has one.
    pub(super) fn alpha_field(self) -> Option<&'static str> {
        match self {
            Method::Lora | Method::AdaLora => Some("lora_alpha"),
            Method::LoHa | Method::LoKr | Method::Gralora => Some("alpha"),
            _ => None,
        }
    }
}

/// The first words of the tensor names of each method, to tell an adapter's tensor from one that
/// is stored in full. Those that merge to nothing this program knows are among them.
pub(super) const STEMS: &[&str] = &[
    "adamss_",
    "beft_",
    "boft_",
    "bone_",
    "c3a_",
    "deft_",
    "delora_",
    "dora_",
    "fourierft_",
    "frod_",
    "glora_",
    "gralora_",
    "hada_",
    "hira_",
    "hra_",
    "ia3_",
    "lily_",
    "ln_tuning_",
    "lokr_",
    "lora_",
    "miss_",
    "oft_",
    "osf_",
    "peanut_",
    "poly_",
    "psoft_",
    "pvera_",
    "randlora_",
    "road_",
    "shadow_",
    "shira_",
    "supertuning_",
    "tinylora_",
    "token_adapter",
    "trainable_tokens_",
    "unilora_",
    "vblora_",
    "vera_",
    "waveft_",
];

const CONTEXT: &str = "trained context (virtual tokens) is not a change of any weight, so nothing \
                       can be merged; serve the adapter with the model";

/// Why adapters of a method are refused. Each is either no change of a weight at all, or one that
/// is not implemented.
fn why_refused(peft_type: &str) -> &'static str {
    match peft_type {
        "PROMPT_TUNING" | "MULTITASK_PROMPT_TUNING" | "P_TUNING" | "PREFIX_TUNING" | "CPT" => {
            CONTEXT
        }
        "CARTRIDGE" => {
            "a trained key-value cache is not a change of any weight, so nothing can be merged; \
             serve the adapter with the model"
        }
        "ADAPTION_PROMPT" => {
            "gated attention over trained prompts is not a change of any weight, so nothing can \
             be merged"
        }
        "SHADOW" => {
            "a network that runs beside the base is not a change of any weight, so nothing can be \
             merged"
        }
        "XLORA" | "POLY" | "LILY" => {
            "adapters mixed per input by a trained router have no single merged weight"
        }
        "ADAMSS" => {
            "it changes the weight within clusters of the base's singular vectors: not implemented"
        }
        "DEFT" => "it projects directions out of the weight and adds others: not implemented",
        "FOURIERFT" | "WAVEFT" => {
            "the places of its coefficients are not in the file but come from PyTorch's random \
             numbers, which differ between versions"
        }
        "FROD" => {
            "it changes the weight in a basis that is computed from all layers of the base: not \
             implemented"
        }
        "GLORA" => "it multiplies and adds five trained matrices: not implemented",
        "OSF" => "it trains singular vectors of the weight itself: not implemented",
        "PEANUT" => "it computes its change by a network from the weight: not implemented",
        "PSOFT" => "it rotates within the weight's leading singular vectors: not implemented",
        "PVERA" => "a VeRA with factors that are sampled: not implemented",
        "RANDLORA" => "it adds many products of random factors: not implemented",
        "ROAD" => "it rotates pairs of output features: not implemented",
        "SUPERTUNING" => {
            "it adds to single elements of the weight, chosen by their magnitude: not implemented"
        }
        "TINYLORA" => {
            "it changes the weight within its singular vectors by random projections: not \
             implemented"
        }
        "UNILORA" => "it spreads one trained vector over all layers: not implemented",
        "VBLORA" => "it mixes its factors from a bank of vectors: not implemented",
        _ => "this method is unknown here",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `PeftType` of PEFT 0.21.2, and Bone, which it no longer has.
    const PEFT_TYPES: &[&str] = &[
        "PROMPT_TUNING",
        "MULTITASK_PROMPT_TUNING",
        "P_TUNING",
        "PREFIX_TUNING",
        "LORA",
        "ADALORA",
        "ADAMSS",
        "BOFT",
        "ADAPTION_PROMPT",
        "IA3",
        "BEFT",
        "LILY",
        "LOHA",
        "LOKR",
        "OFT",
        "POLY",
        "LN_TUNING",
        "VERA",
        "FROD",
        "PVERA",
        "FOURIERFT",
        "GLORA",
        "XLORA",
        "HRA",
        "VBLORA",
        "UNILORA",
        "CPT",
        "MISS",
        "RANDLORA",
        "ROAD",
        "TRAINABLE_TOKENS",
        "HIRA",
        "SHIRA",
        "C3A",
        "WAVEFT",
        "OSF",
        "DELORA",
        "GRALORA",
        "CARTRIDGE",
        "TINYLORA",
        "PSOFT",
        "PEANUT",
        "SHADOW",
        "SUPERTUNING",
        "DEFT",
        "BONE",
    ];

    #[test]
    fn every_method_is_read_or_refused_with_its_own_reason() {
        let unknown = why_refused("NO_SUCH_METHOD");
        let read = PEFT_TYPES.iter().filter(|name| match Method::of(name) {
            Ok(_) => true,
            Err(reason) => {
                assert_ne!(reason, unknown, "{name}");
                false
            }
        });
        assert_eq!(read.count(), 19);
    }

    #[test]
    fn every_suffix_is_known_for_an_adapters() {
        for peft_type in PEFT_TYPES {
            let Ok(method) = Method::of(peft_type) else { continue };
            for (suffix, _) in method.suffixes() {
                assert!(STEMS.iter().any(|stem| suffix.starts_with(stem)), "{suffix}");
            }
        }
    }
}
