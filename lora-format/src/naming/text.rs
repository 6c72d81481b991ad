//! Text encoders: CLIP in transformers' names and in OpenCLIP's, and T5.

use super::module::{Builder, Module, Part};

/// What tells one CLIP text model from another.
pub(super) struct Clip {
    /// Width of a token.
    pub(super) width: usize,
    /// Layers that transformers' model has.
    pub(super) layers: usize,
    /// Whether the original file is OpenCLIP's.
    pub(super) open: bool,
}

const VOCABULARY: usize = 49_408;

/// The modules of a CLIP text model. The position embedding and the text projection are not among
/// them: OpenCLIP stores bare parameters there, the projection transposed.
pub(super) fn clip(part: Part, clip: &Clip) -> Vec<Module> {
    let mut builder = Builder::new(part);
    let width = clip.width;
    let mut add = |open: &str, name: &str, shape: &[usize]| {
        let name = format!("text_model.{name}");
        let original = if clip.open { open } else { &name };
        builder.whole(original, &name, shape);
    };
    add("token_embedding", "embeddings.token_embedding", &[VOCABULARY, width]);
    add("ln_final", "final_layer_norm", &[width]);
    for layer in 0..clip.layers {
        let open = format!("transformer.resblocks.{layer}");
        let name = format!("encoder.layers.{layer}");
        let mut inner = |from: &str, to: &str, shape: &[usize]| {
            add(&format!("{open}.{from}"), &format!("{name}.{to}"), shape);
        };
        let wide = width.saturating_mul(4);
        inner("ln_1", "layer_norm1", &[width]);
        inner("ln_2", "layer_norm2", &[width]);
        inner("mlp.c_fc", "mlp.fc1", &[wide, width]);
        inner("mlp.c_proj", "mlp.fc2", &[width, wide]);
        inner("attn.out_proj", "self_attn.out_proj", &[width, width]);
    }
    for layer in 0..clip.layers {
        let attention = format!("text_model.encoder.layers.{layer}.self_attn");
        let names = ["q_proj", "k_proj", "v_proj"].map(|each| format!("{attention}.{each}"));
        if clip.open {
            let original = format!("transformer.resblocks.{layer}.attn.in_proj_weight");
            let parts = names.each_ref().map(|name| (name.as_str(), width));
            builder.fused(&original, width, &parts);
        } else {
            names.iter().for_each(|name| builder.same(name, &[width, width]));
        }
    }
    builder.modules
}

/// The encoder of T5 v1.1 XXL. Its files have transformers' names everywhere.
pub(super) fn t5() -> Vec<Module> {
    const WIDTH: usize = 4096;
    const WIDE: usize = 10_240;
    const LAYERS: usize = 24;
    let mut builder = Builder::new(Part::T5);
    builder.same("shared", &[32_128, WIDTH]);
    builder.same("encoder.final_layer_norm", &[WIDTH]);
    for layer in 0..LAYERS {
        let block = format!("encoder.block.{layer}.layer");
        for each in ["q", "k", "v", "o"] {
            builder.same(&format!("{block}.0.SelfAttention.{each}"), &[WIDTH, WIDTH]);
        }
        if layer == 0 {
            let name = format!("{block}.0.SelfAttention.relative_attention_bias");
            builder.same(&name, &[32, 64]);
        }
        builder.same(&format!("{block}.0.layer_norm"), &[WIDTH]);
        builder.same(&format!("{block}.1.layer_norm"), &[WIDTH]);
        for each in ["wi_0", "wi_1"] {
            builder.same(&format!("{block}.1.DenseReluDense.{each}"), &[WIDE, WIDTH]);
        }
        builder.same(&format!("{block}.1.DenseReluDense.wo"), &[WIDTH, WIDE]);
    }
    builder.modules
}
