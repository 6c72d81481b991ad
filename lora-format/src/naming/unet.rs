//! The UNets of Stable Diffusion 1, 2 and XL: sgm's numbering and diffusers'.
//!
//! sgm numbers `input_blocks` through: 0 is the first convolution, then per level two residual
//! blocks and a downsampler. `output_blocks` has three per level; the last one of a level also
//! holds the upsampler. diffusers numbers levels and what is in them.

use super::module::{Builder, Module, Part};

const RESNETS: usize = 2;
const KERNEL: usize = 3;

/// What tells one UNet from another.
pub(super) struct Unet {
    /// Channels of each level.
    pub(super) channels: &'static [usize],
    /// Transformer blocks in each attention of a level; none is no attention.
    pub(super) depths: &'static [usize],
    /// Transformer blocks in the middle.
    pub(super) middle: usize,
    /// Width of the text embeddings.
    pub(super) context: usize,
    /// Whether attention projects by linear layers, not by 1 × 1 convolutions.
    pub(super) linear: bool,
    /// Width of the added conditioning, of SDXL.
    pub(super) label: Option<usize>,
}

const LATENT: usize = 4;

/// The modules of a UNet.
pub(super) fn modules(unet: &Unet) -> Vec<Module> {
    let mut builder = Builder::new(Part::Denoiser);
    let first = unet.channels.first().copied().unwrap_or(0);
    ends(&mut builder, unet, first);
    let skips = down(&mut builder, unet, first);
    let last = unet.channels.last().copied().unwrap_or(0);
    for (at, name) in [(0, "mid_block.resnets.0"), (2, "mid_block.resnets.1")] {
        resnet(&mut builder, unet, &format!("middle_block.{at}"), name, (last, last));
    }
    attention(
        &mut builder,
        unet,
        ("middle_block.1", "mid_block.attentions.0"),
        (last, unet.middle),
    );
    up(&mut builder, unet, skips, last);
    builder.modules
}

fn time_width(unet: &Unet) -> usize {
    unet.channels.first().copied().unwrap_or(0).saturating_mul(4)
}

fn ends(builder: &mut Builder, unet: &Unet, first: usize) {
    let time = time_width(unet);
    builder.whole("time_embed.0", "time_embedding.linear_1", &[time, first]);
    builder.whole("time_embed.2", "time_embedding.linear_2", &[time, time]);
    if let Some(label) = unet.label {
        builder.whole("label_emb.0.0", "add_embedding.linear_1", &[time, label]);
        builder.whole("label_emb.0.2", "add_embedding.linear_2", &[time, time]);
    }
    builder.whole("input_blocks.0.0", "conv_in", &[first, LATENT, KERNEL, KERNEL]);
    builder.whole("out.0", "conv_norm_out", &[first]);
    builder.whole("out.2", "conv_out", &[LATENT, first, KERNEL, KERNEL]);
}

/// The way down; the channels that it leaves for the way up.
fn down(builder: &mut Builder, unet: &Unet, first: usize) -> Vec<usize> {
    let mut skips = vec![first];
    let mut width = first;
    let levels = unet.channels.len();
    for (level, (&channels, &depth)) in unet.channels.iter().zip(unet.depths).enumerate() {
        let start = 1 + (RESNETS + 1) * level;
        for at in 0..RESNETS {
            let original = format!("input_blocks.{}", start + at);
            let block = format!("down_blocks.{level}");
            let name = format!("{block}.resnets.{at}");
            resnet(builder, unet, &format!("{original}.0"), &name, (width, channels));
            width = channels;
            let name = format!("{block}.attentions.{at}");
            attention(builder, unet, (&format!("{original}.1"), &name), (width, depth));
            skips.push(width);
        }
        if level + 1 < levels {
            let original = format!("input_blocks.{}.0.op", start + RESNETS);
            let name = format!("down_blocks.{level}.downsamplers.0.conv");
            builder.whole(&original, &name, &[width, width, KERNEL, KERNEL]);
            skips.push(width);
        }
    }
    skips
}

fn up(builder: &mut Builder, unet: &Unet, mut skips: Vec<usize>, mut width: usize) {
    let levels = unet.channels.len();
    let reversed = unet.channels.iter().zip(unet.depths).rev();
    for (level, (&channels, &depth)) in reversed.enumerate() {
        for at in 0..=RESNETS {
            let original = format!("output_blocks.{}", (RESNETS + 1) * level + at);
            let block = format!("up_blocks.{level}");
            let wide = width.saturating_add(skips.pop().unwrap_or(0));
            let name = format!("{block}.resnets.{at}");
            resnet(builder, unet, &format!("{original}.0"), &name, (wide, channels));
            width = channels;
            let name = format!("{block}.attentions.{at}");
            attention(builder, unet, (&format!("{original}.1"), &name), (width, depth));
            if at == RESNETS && level + 1 < levels {
                // It comes after the attention, where there is one.
                let original = format!("{original}.{}.conv", 1 + usize::from(depth > 0));
                let name = format!("{block}.upsamplers.0.conv");
                builder.whole(&original, &name, &[width, width, KERNEL, KERNEL]);
            }
        }
    }
}

fn resnet(
    builder: &mut Builder,
    unet: &Unet,
    original: &str,
    name: &str,
    (width, out): (usize, usize),
) {
    let mut add = |from: &str, to: &str, shape: &[usize]| {
        builder.whole(&format!("{original}.{from}"), &format!("{name}.{to}"), shape);
    };
    add("in_layers.0", "norm1", &[width]);
    add("in_layers.2", "conv1", &[out, width, KERNEL, KERNEL]);
    add("emb_layers.1", "time_emb_proj", &[out, time_width(unet)]);
    add("out_layers.0", "norm2", &[out]);
    add("out_layers.3", "conv2", &[out, out, KERNEL, KERNEL]);
    if width != out {
        add("skip_connection", "conv_shortcut", &[out, width, 1, 1]);
    }
}

fn attention(
    builder: &mut Builder,
    unet: &Unet,
    (original, name): (&str, &str),
    (width, depth): (usize, usize),
) {
    if depth == 0 {
        return;
    }
    let mut add = |path: &str, shape: &[usize]| {
        builder.whole(&format!("{original}.{path}"), &format!("{name}.{path}"), shape);
    };
    let projection: &[usize] = if unet.linear { &[width, width] } else { &[width, width, 1, 1] };
    add("norm", &[width]);
    add("proj_in", projection);
    for at in 0..depth {
        let mut inner = |path: &str, shape: &[usize]| {
            add(&format!("transformer_blocks.{at}.{path}"), shape);
        };
        for norm in ["norm1", "norm2", "norm3"] {
            inner(norm, &[width]);
        }
        for (attention, context) in [("attn1", width), ("attn2", unet.context)] {
            inner(&format!("{attention}.to_q"), &[width, width]);
            inner(&format!("{attention}.to_k"), &[width, context]);
            inner(&format!("{attention}.to_v"), &[width, context]);
            inner(&format!("{attention}.to_out.0"), &[width, width]);
        }
        inner("ff.net.0.proj", &[width.saturating_mul(8), width]);
        inner("ff.net.2", &[width, width.saturating_mul(4)]);
    }
    add("proj_out", projection);
}
