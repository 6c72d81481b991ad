//! The transformers: Flux.1, Flux.2, Stable Diffusion 3, Wan 2.1, Qwen-Image, Z-Image.

use super::module::{Builder, Module, Part};

const HEAD: usize = 128;

/// The three projections of an attention, `width` rows each.
fn three(names: &[String; 3], width: usize) -> [(&str, usize); 3] {
    names.each_ref().map(|name| (name.as_str(), width))
}

fn joined(block: &str, names: [&str; 3]) -> [String; 3] {
    names.map(|name| format!("{block}.{name}"))
}

/// Flux.1, dev and schnell; schnell has no guidance embedding.
pub(super) fn flux1() -> Vec<Module> {
    const WIDTH: usize = 3072;
    let mut builder = Builder::new(Part::Denoiser);
    let into = |builder: &mut Builder, original: &str, name: &str, width| {
        let name = format!("time_text_embed.{name}_embedder");
        builder.whole(
            &format!("{original}.in_layer"),
            &format!("{name}.linear_1"),
            &[WIDTH, width],
        );
        builder.whole(&format!("{original}.out_layer"), &format!("{name}.linear_2"), &[WIDTH; 2]);
    };
    into(&mut builder, "time_in", "timestep", 256);
    into(&mut builder, "vector_in", "text", 768);
    builder.optional = true;
    into(&mut builder, "guidance_in", "guidance", 256);
    builder.optional = false;
    builder.whole("img_in", "x_embedder", &[WIDTH, 64]);
    builder.whole("txt_in", "context_embedder", &[WIDTH, 4096]);
    builder.swapped("final_layer.adaLN_modulation.1", "norm_out.linear", WIDTH, WIDTH);
    builder.whole("final_layer.linear", "proj_out", &[64, WIDTH]);
    for at in 0..19 {
        flux_double(&mut builder, at, WIDTH, false);
    }
    for at in 0..38 {
        flux1_single(&mut builder, at, WIDTH);
    }
    builder.modules
}

/// A block with two streams, of Flux.1 (modulated by itself) or Flux.2 (by layers that all share;
/// its first feed-forward layer makes the gate too).
fn flux_double(builder: &mut Builder, at: usize, width: usize, second: bool) {
    let original = format!("double_blocks.{at}");
    let block = format!("transformer_blocks.{at}");
    let streams = [
        ("img", "norm1", ["to_q", "to_k", "to_v"], "to_out.0", ["norm_q", "norm_k"], "ff"),
        (
            "txt",
            "norm1_context",
            ["add_q_proj", "add_k_proj", "add_v_proj"],
            "to_add_out",
            ["norm_added_q", "norm_added_k"],
            "ff_context",
        ),
    ];
    for (stream, modulation, projections, out, [norm_q, norm_k], ff) in streams {
        let names = joined(&format!("{block}.attn"), projections);
        let original = format!("{original}.{stream}");
        builder.fused(&format!("{original}_attn.qkv.weight"), width, &three(&names, width));
        let mut add = |from: &str, to: &str, shape: &[usize]| {
            builder.parameter(&format!("{original}_{from}"), &format!("{block}.{to}"), shape);
        };
        add("attn.norm.query_norm.scale", &format!("attn.{norm_q}"), &[HEAD]);
        add("attn.norm.key_norm.scale", &format!("attn.{norm_k}"), &[HEAD]);
        add("attn.proj.weight", &format!("attn.{out}"), &[width, width]);
        if second {
            add("mlp.0.weight", &format!("{ff}.linear_in"), &[6 * width, width]);
            add("mlp.2.weight", &format!("{ff}.linear_out"), &[width, 3 * width]);
        } else {
            add("mod.lin.weight", &format!("{modulation}.linear"), &[6 * width, width]);
            add("mlp.0.weight", &format!("{ff}.net.0.proj"), &[4 * width, width]);
            add("mlp.2.weight", &format!("{ff}.net.2"), &[width, 4 * width]);
        }
    }
}

fn flux1_single(builder: &mut Builder, at: usize, width: usize) {
    let original = format!("single_blocks.{at}");
    let block = format!("single_transformer_blocks.{at}");
    let [q, k, v] = joined(&format!("{block}.attn"), ["to_q", "to_k", "to_v"]);
    let mlp = format!("{block}.proj_mlp");
    builder.fused(
        &format!("{original}.linear1.weight"),
        width,
        &[(&q, width), (&k, width), (&v, width), (&mlp, 4 * width)],
    );
    let mut add = |from: &str, to: &str, shape: &[usize]| {
        builder.parameter(&format!("{original}.{from}"), &format!("{block}.{to}"), shape);
    };
    add("linear2.weight", "proj_out", &[width, 5 * width]);
    add("modulation.lin.weight", "norm.linear", &[3 * width, width]);
    add("norm.query_norm.scale", "attn.norm_q", &[HEAD]);
    add("norm.key_norm.scale", "attn.norm_k", &[HEAD]);
}

/// Flux.2 dev.
pub(super) fn flux2() -> Vec<Module> {
    const WIDTH: usize = 6144;
    let mut builder = Builder::new(Part::Denoiser);
    for (original, name) in [("time_in", "timestep"), ("guidance_in", "guidance")] {
        let name = format!("time_guidance_embed.{name}_embedder");
        builder.whole(&format!("{original}.in_layer"), &format!("{name}.linear_1"), &[WIDTH, 256]);
        builder.whole(&format!("{original}.out_layer"), &format!("{name}.linear_2"), &[WIDTH; 2]);
    }
    for (name, times) in [
        ("double_stream_modulation_img", 6),
        ("double_stream_modulation_txt", 6),
        ("single_stream_modulation", 3),
    ] {
        let shape = [times * WIDTH, WIDTH];
        builder.whole(&format!("{name}.lin"), &format!("{name}.linear"), &shape);
    }
    builder.whole("img_in", "x_embedder", &[WIDTH, 128]);
    builder.whole("txt_in", "context_embedder", &[WIDTH, 15_360]);
    builder.swapped("final_layer.adaLN_modulation.1", "norm_out.linear", WIDTH, WIDTH);
    builder.whole("final_layer.linear", "proj_out", &[128, WIDTH]);
    for at in 0..8 {
        flux_double(&mut builder, at, WIDTH, true);
    }
    for at in 0..48 {
        let mut add = |from: &str, to: &str, shape: &[usize]| {
            builder.parameter(
                &format!("single_blocks.{at}.{from}"),
                &format!("single_transformer_blocks.{at}.attn.{to}"),
                shape,
            );
        };
        add("linear1.weight", "to_qkv_mlp_proj", &[9 * WIDTH, WIDTH]);
        add("linear2.weight", "to_out", &[WIDTH, 4 * WIDTH]);
        add("norm.query_norm.scale", "norm_q", &[HEAD]);
        add("norm.key_norm.scale", "norm_k", &[HEAD]);
    }
    builder.modules
}

/// What tells one release of Stable Diffusion 3 from another.
pub(super) struct Sd3 {
    /// Blocks; the width is 64 times as many.
    pub(super) depth: usize,
    /// Whether queries and keys are normalised.
    pub(super) normalised: bool,
    /// Leading blocks with a second attention of the image stream.
    pub(super) dual: usize,
}

const SD3_HEAD: usize = 64;

/// Stable Diffusion 3 and 3.5.
pub(super) fn sd3(model: &Sd3) -> Vec<Module> {
    let width = SD3_HEAD.saturating_mul(model.depth);
    let mut builder = Builder::new(Part::Denoiser);
    for (original, name, from) in [("t_embedder", "timestep", 256), ("y_embedder", "text", 2048)] {
        let name = format!("time_text_embed.{name}_embedder");
        builder.whole(&format!("{original}.mlp.0"), &format!("{name}.linear_1"), &[width, from]);
        builder.whole(&format!("{original}.mlp.2"), &format!("{name}.linear_2"), &[width, width]);
    }
    builder.whole("x_embedder.proj", "pos_embed.proj", &[width, 16, 2, 2]);
    builder.same("context_embedder", &[width, 4096]);
    builder.swapped("final_layer.adaLN_modulation.1", "norm_out.linear", width, width);
    builder.whole("final_layer.linear", "proj_out", &[64, width]);
    for at in 0..model.depth {
        sd3_block(&mut builder, model, at, width);
    }
    builder.modules
}

fn sd3_block(builder: &mut Builder, model: &Sd3, at: usize, width: usize) {
    let image = format!("joint_blocks.{at}.x_block");
    let context = format!("joint_blocks.{at}.context_block");
    let block = format!("transformer_blocks.{at}");
    let last = at + 1 == model.depth;
    let mut attention = |from: &str, to: &str, projections, out: Option<&str>, norms: [&str; 2]| {
        let to = format!("{block}.{to}");
        let names = joined(&to, projections);
        builder.fused(&format!("{from}.qkv.weight"), width, &three(&names, width));
        if let Some(out) = out {
            builder.whole(&format!("{from}.proj"), &format!("{to}.{out}"), &[width, width]);
        }
        if model.normalised {
            for (original, norm) in ["ln_q", "ln_k"].iter().zip(norms) {
                let name = format!("{to}.{norm}");
                builder.whole(&format!("{from}.{original}"), &name, &[SD3_HEAD]);
            }
        }
    };
    let own = ["to_q", "to_k", "to_v"];
    let added = ["add_q_proj", "add_k_proj", "add_v_proj"];
    let norms = ["norm_q", "norm_k"];
    attention(&format!("{image}.attn"), "attn", own, Some("to_out.0"), norms);
    let out = (!last).then_some("to_add_out");
    attention(&format!("{context}.attn"), "attn", added, out, ["norm_added_q", "norm_added_k"]);
    let dual = at < model.dual;
    if dual {
        attention(&format!("{image}.attn2"), "attn2", own, Some("to_out.0"), norms);
    }
    let mut add = |from: &str, to: &str, shape: &[usize]| {
        builder.whole(from, &format!("{block}.{to}"), shape);
    };
    let modulations = if dual { 9 } else { 6 };
    let shape = [width.saturating_mul(modulations), width];
    add(&format!("{image}.adaLN_modulation.1"), "norm1.linear", &shape);
    let wide = width.saturating_mul(4);
    add(&format!("{image}.mlp.fc1"), "ff.net.0.proj", &[wide, width]);
    add(&format!("{image}.mlp.fc2"), "ff.net.2", &[width, wide]);
    let modulation = format!("{context}.adaLN_modulation.1");
    if last {
        // The last block ends the context stream: it has only shift and scale.
        let name = format!("{block}.norm1_context.linear");
        builder.swapped(&modulation, &name, width, width);
        return;
    }
    add(&modulation, "norm1_context.linear", &[width.saturating_mul(6), width]);
    add(&format!("{context}.mlp.fc1"), "ff_context.net.0.proj", &[wide, width]);
    add(&format!("{context}.mlp.fc2"), "ff_context.net.2", &[width, wide]);
}

/// What tells one Wan 2.1 from another.
pub(super) struct Wan {
    pub(super) width: usize,
    pub(super) wide: usize,
    pub(super) layers: usize,
}

/// Wan 2.1. What only the image-to-video models have is optional.
pub(super) fn wan(model: &Wan) -> Vec<Module> {
    let (width, wide) = (model.width, model.wide);
    let mut builder = Builder::new(Part::Denoiser);
    builder.same("patch_embedding", &[width, 16, 1, 2, 2]);
    let embedder = "condition_embedder";
    for (original, name, from) in
        [("time_embedding", "time_embedder", 256), ("text_embedding", "text_embedder", 4096)]
    {
        let name = format!("{embedder}.{name}");
        builder.whole(&format!("{original}.0"), &format!("{name}.linear_1"), &[width, from]);
        builder.whole(&format!("{original}.2"), &format!("{name}.linear_2"), &[width, width]);
    }
    let shape = [width.saturating_mul(6), width];
    builder.whole("time_projection.1", &format!("{embedder}.time_proj"), &shape);
    builder.whole("head.head", "proj_out", &[64, width]);
    builder.optional = true;
    let image: [(&str, &str, &[usize]); 4] = [
        ("0", "norm1", &[1280]),
        ("1", "ff.net.0.proj", &[1280, 1280]),
        ("3", "ff.net.2", &[width, 1280]),
        ("4", "norm2", &[width]),
    ];
    for (original, name, shape) in image {
        let name = format!("{embedder}.image_embedder.{name}");
        builder.whole(&format!("img_emb.proj.{original}"), &name, shape);
    }
    builder.optional = false;
    for at in 0..model.layers {
        wan_block(&mut builder, &format!("blocks.{at}"), width, wide);
    }
    builder.modules
}

fn wan_block(builder: &mut Builder, block: &str, width: usize, wide: usize) {
    let mut add = |from: &str, to: &str, shape: &[usize], optional: bool| {
        builder.optional = optional;
        builder.whole(&format!("{block}.{from}"), &format!("{block}.{to}"), shape);
    };
    for (from, to) in [("self_attn", "attn1"), ("cross_attn", "attn2")] {
        for (original, name) in [("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0")] {
            add(&format!("{from}.{original}"), &format!("{to}.{name}"), &[width, width], false);
        }
        add(&format!("{from}.norm_q"), &format!("{to}.norm_q"), &[width], false);
        add(&format!("{from}.norm_k"), &format!("{to}.norm_k"), &[width], false);
    }
    // diffusers counts the norms in the order of their use, the original does not.
    add("norm3", "norm2", &[width], false);
    add("ffn.0", "ffn.net.0.proj", &[wide, width], false);
    add("ffn.2", "ffn.net.2", &[width, wide], false);
    add("cross_attn.k_img", "attn2.add_k_proj", &[width, width], true);
    add("cross_attn.v_img", "attn2.add_v_proj", &[width, width], true);
    add("cross_attn.norm_k_img", "attn2.norm_added_k", &[width], true);
    builder.optional = false;
}

/// Qwen-Image. Its original files have diffusers' names.
pub(super) fn qwen_image() -> Vec<Module> {
    const WIDTH: usize = 3072;
    let mut builder = Builder::new(Part::Denoiser);
    let time = "time_text_embed.timestep_embedder";
    builder.same(&format!("{time}.linear_1"), &[WIDTH, 256]);
    builder.same(&format!("{time}.linear_2"), &[WIDTH, WIDTH]);
    builder.same("txt_norm", &[3584]);
    builder.same("img_in", &[WIDTH, 64]);
    builder.same("txt_in", &[WIDTH, 3584]);
    builder.same("norm_out.linear", &[2 * WIDTH, WIDTH]);
    builder.same("proj_out", &[64, WIDTH]);
    for at in 0..60 {
        let mut add = |path: &str, shape: &[usize]| {
            builder.same(&format!("transformer_blocks.{at}.{path}"), shape);
        };
        for norm in ["norm_q", "norm_k", "norm_added_q", "norm_added_k"] {
            add(&format!("attn.{norm}"), &[HEAD]);
        }
        for linear in ["to_q", "to_k", "to_v", "to_out.0"] {
            add(&format!("attn.{linear}"), &[WIDTH, WIDTH]);
        }
        for linear in ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"] {
            add(&format!("attn.{linear}"), &[WIDTH, WIDTH]);
        }
        for stream in ["img", "txt"] {
            add(&format!("{stream}_mod.1"), &[6 * WIDTH, WIDTH]);
            add(&format!("{stream}_mlp.net.0.proj"), &[4 * WIDTH, WIDTH]);
            add(&format!("{stream}_mlp.net.2"), &[WIDTH, 4 * WIDTH]);
        }
    }
    builder.modules
}

/// Z-Image.
pub(super) fn z_image() -> Vec<Module> {
    const WIDTH: usize = 3840;
    const TEXT: usize = 2560;
    let mut builder = Builder::new(Part::Denoiser);
    builder.whole("x_embedder", "all_x_embedder.2-1", &[WIDTH, 64]);
    builder.whole("final_layer.linear", "all_final_layer.2-1.linear", &[64, WIDTH]);
    let modulation = "all_final_layer.2-1.adaLN_modulation.1";
    builder.whole("final_layer.adaLN_modulation.1", modulation, &[WIDTH, 256]);
    builder.same("t_embedder.mlp.0", &[1024, 256]);
    builder.same("t_embedder.mlp.2", &[256, 1024]);
    builder.same("cap_embedder.0", &[TEXT]);
    builder.same("cap_embedder.1", &[WIDTH, TEXT]);
    for (kind, layers, modulated) in
        [("noise_refiner", 2, true), ("context_refiner", 2, false), ("layers", 30, true)]
    {
        for at in 0..layers {
            z_image_block(&mut builder, &format!("{kind}.{at}"), WIDTH, modulated);
        }
    }
    builder.modules
}

fn z_image_block(builder: &mut Builder, block: &str, width: usize, modulated: bool) {
    const WIDE: usize = 10_240;
    let attention = format!("{block}.attention");
    let names = joined(&attention, ["to_q", "to_k", "to_v"]);
    builder.fused(&format!("{attention}.qkv.weight"), width, &three(&names, width));
    let mut add = |from: &str, to: &str, shape: &[usize]| {
        builder.whole(&format!("{block}.{from}"), &format!("{block}.{to}"), shape);
    };
    add("attention.out", "attention.to_out.0", &[width, width]);
    add("attention.q_norm", "attention.norm_q", &[HEAD]);
    add("attention.k_norm", "attention.norm_k", &[HEAD]);
    for (name, shape) in [("w1", [WIDE, width]), ("w2", [width, WIDE]), ("w3", [WIDE, width])] {
        let name = format!("feed_forward.{name}");
        add(&name, &name, &shape);
    }
    for norm in ["attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"] {
        add(norm, norm, &[width]);
    }
    if modulated {
        add("adaLN_modulation.0", "adaLN_modulation.0", &[width.saturating_mul(4), 256]);
    }
}
