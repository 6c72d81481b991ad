//! How the formats spell a module.
//!
//! Read off kohya-ss/sd-scripts 48d368f (`networks/lora*.py`), kohya-ss/musubi-tuner 30c658c,
//! ComfyUI a125cd8 (`comfy/lora.py`), OneTrainer 23df383 and diffusers 0.42.1
//! (`loaders/lora_conversion_utils.py`).

use std::borrow::Cow;

use super::{Architecture, Module, Part};

/// A format's way of spelling modules.
///
/// What follows the module (`.lora_down.weight`, `.lora_A.weight`, …) is not part of the spelling;
/// the codecs take it off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Naming {
    /// sd-scripts and musubi-tuner: `lora_unet_…`, `lora_te1_…`, dots as underscores.
    Kohya,
    /// OneTrainer's older files: diffusers' names behind `lora_unet_`, `lora_transformer_`,
    /// `lora_te1_`, dots as underscores.
    OneTrainer,
    /// SimpleTuner's LyCORIS files: diffusers' names of the denoiser behind `lycoris_`, dots as
    /// underscores.
    Lycoris,
    /// diffusers: `unet.…`, `transformer.…`, `text_encoder.…`, `text_encoder_2.…`.
    Diffusers,
    /// diffusers' older files: `unet.….attn1.processor.to_q_lora`.
    Processor,
    /// ComfyUI: `diffusion_model.` and the original path;
    /// `text_encoders.clip_l.transformer.…`.
    Comfy,
    /// x-flux: `double_blocks.0.processor.qkv_lora1`. Only Flux.1 has it.
    XFlux,
    /// The denoiser's original path and nothing before it, as in Flux.1's control adapters.
    Original,
    /// The denoiser's diffusers path, with nothing or PEFT's `base_model.model.` before it.
    Peft,
}

impl Naming {
    /// All of them. Where several spell a set of names alike, [`super::detect`] keeps the first.
    pub const ALL: [Naming; 9] = [
        Naming::Kohya,
        Naming::OneTrainer,
        Naming::Lycoris,
        Naming::Diffusers,
        Naming::Processor,
        Naming::Comfy,
        Naming::XFlux,
        Naming::Original,
        Naming::Peft,
    ];
}

/// One of the two cuts into modules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// diffusers' or transformers'.
    Diffusers,
    /// The original checkpoint's.
    Original,
}

/// One spelling of all modules of a component.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Style {
    prefix: &'static str,
    pub(super) side: Side,
    rewrite: Rewrite,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rewrite {
    None,
    /// '.' → '_'.
    Flat,
    /// diffusers' attention processors.
    Processor,
    XFlux,
}

impl Style {
    fn new(prefix: &'static str, side: Side, rewrite: Rewrite) -> Style {
        Style { prefix, side, rewrite }
    }

    /// A path of this style's side as it is spelled; `None` if the format has no name for it.
    pub(super) fn spell(&self, path: &str) -> Option<String> {
        let path: Cow<'_, str> = match self.rewrite {
            Rewrite::None => path.into(),
            Rewrite::Flat => path.replace('.', "_").into(),
            Rewrite::Processor => processor(path)?.into(),
            Rewrite::XFlux => x_flux(path)?.into(),
        };
        Some(format!("{}{path}", self.prefix))
    }

    /// The rows of an original parameter that this style's name for it means, if not all.
    pub(super) fn rows(&self, module: &Module, total: usize) -> usize {
        // x-flux changes query, key and value alone of what `linear1` fuses: its first
        // three of seven equal parts.
        let part = self.rewrite == Rewrite::XFlux && module.original.ends_with(".linear1.weight");
        if part { total / 7 * 3 } else { total }
    }
}

/// `….attn1.to_q` → `….attn1.processor.to_q_lora`, and of text encoders
/// `….self_attn.q_proj` → `….self_attn.to_q_lora`.
fn processor(path: &str) -> Option<String> {
    for name in ["to_q", "to_k", "to_v", "to_out"] {
        let inner = if name == "to_out" { "to_out.0" } else { name };
        for attention in ["attn1", "attn2"] {
            if let Some(stem) = path.strip_suffix(&format!(".{attention}.{inner}")) {
                return Some(format!("{stem}.{attention}.processor.{name}_lora"));
            }
        }
    }
    for (name, old) in
        [("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("out_proj", "to_out")]
    {
        if let Some(stem) = path.strip_suffix(&format!(".self_attn.{name}")) {
            return Some(format!("{stem}.self_attn.{old}_lora"));
        }
    }
    None
}

fn x_flux(path: &str) -> Option<String> {
    for (original, name) in [
        ("img_attn.qkv", "qkv_lora1"),
        ("txt_attn.qkv", "qkv_lora2"),
        ("img_attn.proj", "proj_lora1"),
        ("txt_attn.proj", "proj_lora2"),
        ("linear1", "qkv_lora"),
        ("linear2", "proj_lora"),
    ] {
        if let Some(stem) = path.strip_suffix(&format!(".{original}")) {
            return Some(format!("{stem}.processor.{name}"));
        }
    }
    None
}

/// The spellings of a component: the first is written, all are read. None if the naming has no
/// names for the component.
pub(super) fn styles(architecture: Architecture, part: Part, naming: Naming) -> Vec<Style> {
    if part == Part::Denoiser {
        return denoiser(architecture, naming);
    }
    let prefixes: &[&'static str] = match naming {
        Naming::Kohya => kohya_text(architecture, part),
        Naming::OneTrainer => one_trainer_text(architecture, part),
        Naming::Diffusers | Naming::Processor => diffusers_text(architecture, part),
        Naming::Comfy => match part {
            Part::ClipL => &["text_encoders.clip_l.transformer."],
            Part::ClipG => &["text_encoders.clip_g.transformer."],
            Part::ClipH => &["text_encoders.clip_h.transformer."],
            Part::T5 => &["text_encoders.t5xxl.transformer."],
            Part::Denoiser => &[],
        },
        Naming::Lycoris | Naming::XFlux | Naming::Original | Naming::Peft => &[],
    };
    let rewrite = match naming {
        Naming::Kohya | Naming::OneTrainer => Rewrite::Flat,
        Naming::Processor => Rewrite::Processor,
        _ => Rewrite::None,
    };
    prefixes.iter().map(|prefix| Style::new(prefix, Side::Diffusers, rewrite)).collect()
}

fn denoiser(architecture: Architecture, naming: Naming) -> Vec<Style> {
    use Side::{Diffusers, Original};
    let unet = architecture.has_unet();
    let flat = |prefix, side| Style::new(prefix, side, Rewrite::Flat);
    let plain = |prefix, side| Style::new(prefix, side, Rewrite::None);
    match naming {
        Naming::Kohya => {
            // sd-scripts builds SD1 and SD2 as diffusers does, and musubi-tuner Z-Image's blocks;
            // everything else as the original. ComfyUI reads both.
            let diffusers_first = matches!(
                architecture,
                Architecture::Sd1 | Architecture::Sd2 | Architecture::ZImage
            );
            let sides = if diffusers_first { [Diffusers, Original] } else { [Original, Diffusers] };
            sides.map(|side| flat("lora_unet_", side)).to_vec()
        }
        Naming::OneTrainer if unet => vec![flat("lora_unet_", Diffusers)],
        Naming::OneTrainer => vec![flat("lora_transformer_", Diffusers)],
        Naming::Lycoris => vec![flat("lycoris_", Diffusers)],
        Naming::Diffusers if unet => vec![plain("unet.", Diffusers)],
        Naming::Diffusers => vec![plain("transformer.", Diffusers)],
        Naming::Processor if unet => {
            vec![Style::new("unet.", Diffusers, Rewrite::Processor)]
        }
        Naming::Processor => Vec::new(),
        // Z-Image is also trained as diffusers cuts it, and saved behind ComfyUI's prefix.
        Naming::Comfy if architecture == Architecture::ZImage => {
            [Original, Diffusers].map(|side| plain("diffusion_model.", side)).to_vec()
        }
        Naming::Comfy => vec![plain("diffusion_model.", Original)],
        Naming::XFlux if architecture == Architecture::Flux1 => {
            let prefixes = ["", "diffusion_model."];
            prefixes.map(|prefix| Style::new(prefix, Original, Rewrite::XFlux)).to_vec()
        }
        Naming::XFlux => Vec::new(),
        Naming::Original => vec![plain("", Original)],
        Naming::Peft => vec![plain("", Diffusers), plain("base_model.model.", Diffusers)],
    }
}

fn kohya_text(architecture: Architecture, part: Part) -> &'static [&'static str] {
    match part {
        Part::ClipL if architecture == Architecture::Sd1 => &["lora_te_", "lora_te1_"],
        Part::ClipH => &["lora_te_", "lora_te1_"],
        Part::ClipL => &["lora_te1_"],
        Part::ClipG => &["lora_te2_"],
        Part::T5 => &["lora_te3_"],
        Part::Denoiser => &[],
    }
}

fn one_trainer_text(architecture: Architecture, part: Part) -> &'static [&'static str] {
    match part {
        // It numbers the encoders that the pipeline has; T5 is the second of Flux.1.
        Part::T5 if architecture == Architecture::Flux1 => &["lora_te2_"],
        _ => kohya_text(architecture, part),
    }
}

fn diffusers_text(architecture: Architecture, part: Part) -> &'static [&'static str] {
    match part {
        Part::ClipL | Part::ClipH => &["text_encoder."],
        Part::ClipG => &["text_encoder_2."],
        Part::T5 if architecture == Architecture::Flux1 => &["text_encoder_2."],
        Part::T5 => &["text_encoder_3."],
        Part::Denoiser => &[],
    }
}
