//! The names that transformers' models give the two ends of a vocabulary: the input embedding and
//! the output head, which are often one tensor.
//!
//! A name can only tell what is usual. Names that mean something else elsewhere (`output`,
//! `decoder`, `proj_out`) count where transformers has them: beside the model, not inside it.

/// The last segment of an input embedding's module, which means nothing else in transformers.
const INPUTS: [&str; 12] = [
    "embed_in",
    "embed_tokens",
    "embeddings",
    "input_embeds_layer",
    "shared",
    "tok_embeddings",
    "token_embedding",
    "tokens_embed",
    "word_embedding",
    "word_embeddings",
    "word_embeddings_layer",
    "wte",
];

/// The end of an output head's module, which means nothing else in transformers.
const HEADS: [&str; 11] = [
    "cls.predictions.decoder",
    "embed_out",
    "generator_lm_head",
    "lm_head",
    "lm_head.decoder",
    "lm_head.out_proj",
    "lm_loss",
    "output_layer",
    "output_projection",
    "pred_layer.proj",
    "vocab_projector",
];

/// Output heads whose names are common inside models: whole modules, but for a part of a
/// multimodal model before them.
const OUTER_HEADS: [&str; 3] = ["decoder", "output", "proj_out"];

/// What else PEFT may save whole as one end of a vocabulary; too general to go by otherwise.
const GENERAL: [&str; 3] = ["decoder", "embedding", "output"];

/// The parts of a multimodal model that have a vocabulary and a head of their own.
const PARTS: [&str; 3] = ["language_model.", "text_model.", "thinker."];

/// Embeddings and the heads tied to them, as `_tied_weights_keys` of transformers 5.23 has them
/// where all classes with such an embedding agree. (`model.decoder.embed_tokens` is tied to
/// `lm_head` in OPT and to `proj_out` in Whisper.) Where a checkpoint has other names than the
/// class, they are the checkpoint's: of GPT-NeoX, `embed_out`.
const TIED: [(&str, &str); 19] = [
    ("backbone.embeddings.weight", "lm_head.weight"),
    ("distilbert.embeddings.word_embeddings.weight", "vocab_projector.weight"),
    ("electra.embeddings.word_embeddings.weight", "generator_lm_head.weight"),
    ("gpt_neox.embed_in.weight", "embed_out.weight"),
    ("gpt_neox_japanese.embed_in.weight", "embed_out.weight"),
    ("led.shared.weight", "lm_head.weight"),
    ("model.embed_tokens.weight", "lm_head.weight"),
    ("model.embeddings.tok_embeddings.weight", "decoder.weight"),
    ("model.language_model.embed_tokens.weight", "lm_head.weight"),
    ("model.language_model.shared.weight", "lm_head.weight"),
    ("model.shared.weight", "lm_head.weight"),
    ("model.text_model.embed_tokens.weight", "lm_head.weight"),
    ("prophetnet.word_embeddings.weight", "lm_head.weight"),
    ("roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"),
    ("shared.weight", "lm_head.weight"),
    ("transformer.tokens_embed.weight", "lm_head.weight"),
    ("transformer.word_embedding.weight", "lm_loss.weight"),
    ("transformer.word_embeddings.weight", "lm_head.weight"),
    ("transformer.wte.weight", "lm_head.weight"),
];

/// Whether a parameter is named as the input embedding of a language model.
///
/// ```
/// use lora_format::vocabulary::is_input_embedding;
///
/// assert!(is_input_embedding("model.embed_tokens.weight"));
/// assert!(!is_input_embedding("model.position_embeddings.weight"));
/// ```
pub fn is_input_embedding(parameter_name: &str) -> bool {
    parameter_name.strip_suffix(".weight").is_some_and(|module| INPUTS.contains(&last(module)))
}

/// Whether a parameter is named as the output head of a language model.
///
/// ```
/// use lora_format::vocabulary::is_output_head;
///
/// assert!(is_output_head("language_model.lm_head.weight"));
/// assert!(!is_output_head("encoder.layer.0.output.weight"));
/// ```
pub fn is_output_head(parameter_name: &str) -> bool {
    let Some(module) = parameter_name.strip_suffix(".weight") else {
        return false;
    };
    HEADS.iter().any(|head| {
        module.strip_suffix(head).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    }) || OUTER_HEADS.contains(&without_parts(module))
}

/// Whether a parameter is named as either end of a vocabulary: it has a row for every token.
pub fn is_either(parameter_name: &str) -> bool {
    is_input_embedding(parameter_name) || is_output_head(parameter_name)
}

/// The name that the tied output head of an embedding has among a model's parameters, whether or
/// not a checkpoint stores it; `None` where the embedding's name does not tell.
///
/// ```
/// use lora_format::vocabulary::head_of;
///
/// assert_eq!(head_of("gpt_neox.embed_in.weight").as_deref(), Some("embed_out.weight"));
/// assert_eq!(head_of("a.embed_tokens.weight"), None);
/// ```
pub fn head_of(embedding: &str) -> Option<String> {
    let inner = without_parts(embedding);
    let part = &embedding[..embedding.len() - inner.len()];
    let (_, head) = TIED.iter().find(|(name, _)| *name == inner)?;
    Some(format!("{part}{head}"))
}

/// Whether PEFT may save a module whole as one end of a vocabulary: if it was resized, no field of
/// the configuration says so.
pub(crate) fn may_be_saved_whole(module: &str) -> bool {
    let last = last(module);
    INPUTS.contains(&last) || HEADS.contains(&last) || GENERAL.contains(&last)
}

fn last(module: &str) -> &str {
    module.rsplit('.').next().unwrap_or(module)
}

fn without_parts(mut name: &str) -> &str {
    while let Some(rest) = PARTS.iter().find_map(|part| name.strip_prefix(part)) {
        name = rest;
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_count_at_a_dot_and_as_a_weight() {
        for name in [
            "wte.weight",
            "transformer.wte.weight",
            "shared.weight",
            "encoder.embed_tokens.weight",
            "bert.embeddings.word_embeddings.weight",
            "model.tok_embeddings.weight",
        ] {
            assert!(is_input_embedding(name), "{name}");
            assert!(!is_output_head(name), "{name}");
        }
        for name in [
            "lm_head.weight",
            "thinker.lm_head.weight",
            "language_model.output.weight",
            "output.weight",
            "proj_out.weight",
            "decoder.weight",
            "cls.predictions.decoder.weight",
        ] {
            assert!(is_output_head(name), "{name}");
            assert!(!is_input_embedding(name), "{name}");
        }
        for name in [
            "wte",
            "wte.bias",
            "awte.weight",
            "my_embed_tokens.weight",
            "embeddings.position_embeddings.weight",
            "model.embed_tokens_per_layer.weight",
            "generator_lm_heads.weight",
            "transformer_blocks.0.proj_out.weight",
            "layer.0.output.weight",
            "vae.decoder.weight",
            ".weight",
            "",
        ] {
            assert!(!is_input_embedding(name) && !is_output_head(name), "{name}");
        }
    }

    #[test]
    fn an_embedding_names_its_head() {
        for (embedding, head) in [
            ("model.embed_tokens.weight", "lm_head.weight"),
            ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
            ("model.language_model.embed_tokens.weight", "lm_head.weight"),
            ("thinker.model.embed_tokens.weight", "thinker.lm_head.weight"),
            ("text_model.model.embed_tokens.weight", "text_model.lm_head.weight"),
            ("transformer.wte.weight", "lm_head.weight"),
            ("transformer.word_embeddings.weight", "lm_head.weight"),
            ("gpt_neox.embed_in.weight", "embed_out.weight"),
            ("shared.weight", "lm_head.weight"),
            ("model.shared.weight", "lm_head.weight"),
        ] {
            assert_eq!(head_of(embedding).as_deref(), Some(head), "{embedding}");
        }
        for unknown in [
            "model.decoder.embed_tokens.weight",
            "embed_tokens.weight",
            "encoder.embed_tokens.weight",
            "wte.weight",
            "language_model.",
            "",
        ] {
            assert_eq!(head_of(unknown), None, "{unknown}");
        }
    }

    #[test]
    fn what_is_tied_is_an_embedding_and_a_head() {
        for (embedding, head) in TIED {
            assert!(is_input_embedding(embedding), "{embedding}");
            assert!(is_output_head(head), "{head}");
        }
    }

    #[test]
    fn a_module_that_peft_may_save_whole_is_told_by_its_last_segment() {
        for module in ["model.embed_tokens", "lm_head", "transformer.output_layer", "a.decoder"] {
            assert!(may_be_saved_whole(module), "{module}");
        }
        for module in ["a.self_attn", "a.out_proj", "embed_tokens.linear", ""] {
            assert!(!may_be_saved_whole(module), "{module}");
        }
    }
}
