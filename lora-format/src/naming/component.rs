//! The component of a pipeline that a spelled module belongs to, as its prefix says.

/// A component that adapters have a strength of their own for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Component {
    /// The UNet or the transformer.
    Denoiser,
    /// A text encoder, by its number from 1.
    TextEncoder(u8),
}

/// What a module's name begins with in every spelling there is.
const PREFIXES: [(&str, Component); 15] = [
    ("lora_unet_", Component::Denoiser),
    ("lora_transformer_", Component::Denoiser),
    ("unet.", Component::Denoiser),
    ("transformer.", Component::Denoiser),
    ("diffusion_model.", Component::Denoiser),
    ("lora_te_", Component::TextEncoder(1)),
    ("lora_te1_", Component::TextEncoder(1)),
    ("lora_te2_", Component::TextEncoder(2)),
    ("lora_te3_", Component::TextEncoder(3)),
    ("text_encoder.", Component::TextEncoder(1)),
    ("text_encoder_2.", Component::TextEncoder(2)),
    ("text_encoder_3.", Component::TextEncoder(3)),
    ("text_encoders.clip_l.", Component::TextEncoder(1)),
    ("text_encoders.clip_g.", Component::TextEncoder(2)),
    ("text_encoders.t5xxl.", Component::TextEncoder(3)),
];

impl Component {
    /// The component of a module, if its name says one.
    pub fn of(module: &str) -> Option<Component> {
        PREFIXES.iter().find(|(prefix, _)| module.starts_with(prefix)).map(|entry| entry.1)
    }

    /// Whether a user's word means it: `unet` or `transformer`, `te` of every text encoder, `te1` to
    /// `te3` of one.
    pub fn is_called(self, word: &str) -> bool {
        match self {
            Component::Denoiser => word == "unet" || word == "transformer",
            Component::TextEncoder(number) => word == "te" || word == format!("te{number}"),
        }
    }

    /// The words that [`Component::is_called`] knows.
    pub const WORDS: [&str; 6] = ["unet", "transformer", "te", "te1", "te2", "te3"];
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_say_the_component() {
        let called = |module: &str, word: &str| {
            Component::of(module).is_some_and(|component| component.is_called(word))
        };
        assert!(called("lora_unet_mid_block", "unet") && called("transformer.x", "transformer"));
        assert!(called("lora_te2_text_model", "te") && called("lora_te2_text_model", "te2"));
        assert!(called("text_encoder.text_model", "te1") && !called("text_encoder.x", "te2"));
        assert!(!called("lora_te2_text_model", "unet"));
        assert_eq!(Component::of("model.layers.0.q_proj"), None);
    }
}
