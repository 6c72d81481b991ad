//! Names of tensors → the module they belong to and their role in its change.
//!
//! A name is a *stem*, the module as the format spells it, and a *suffix*, the tensor's role.
//! Suffixes are sd-scripts', LyCORIS', PEFT's as diffusers uses them, and those of diffusers before
//! it used PEFT; files mix them, so all are read alike.

use crate::tensor::Tensor;

/// What a tensor is to its module's change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Role {
    /// A of a low-rank change, rank × in….
    Down,
    /// B, out × rank….
    Up,
    /// The core between them, rank × rank × kernel.
    Mid,
    /// alpha, a scalar.
    Alpha,
    /// The magnitudes of weight decomposition (DoRA).
    Magnitude,
    /// A bias on B's side, scaled as the factors are.
    UpBias,
    /// B₁ of LoHa.
    HadaB1,
    /// A₁.
    HadaA1,
    /// B₂.
    HadaB2,
    /// A₂.
    HadaA2,
    /// The core of the first product.
    HadaCore1,
    /// The core of the second.
    HadaCore2,
    /// C of LoKr in full.
    KronLeft,
    /// B of a factored C.
    KronLeftB,
    /// A of it.
    KronLeftA,
    /// D in full.
    KronRight,
    /// B of a factored D.
    KronRightB,
    /// A of it.
    KronRightA,
    /// The core of a factored D.
    KronRightCore,
    /// A change of the weight in full.
    Diff,
    /// A change of the bias.
    DiffBias,
    /// A change of a norm's weight.
    Norm,
    /// A change of a norm's bias.
    NormBias,
    /// The weight itself, which replaces the base's.
    Whole,
    /// IA³'s gains less one.
    Gain,
    /// Whether they belong to inputs.
    OnInput,
}

/// Every suffix with its role; the first that fits decides, so longer ones come first where one
/// ends like another.
const SUFFIXES: [(&str, Role); 44] = [
    (".lora_down.weight", Role::Down),
    (".lora_up.weight", Role::Up),
    (".lora_mid.weight", Role::Mid),
    (".alpha", Role::Alpha),
    (".dora_scale", Role::Magnitude),
    // diffusers and what PEFT's training state has besides.
    (".lora_A.default.weight", Role::Down),
    (".lora_B.default.weight", Role::Up),
    (".lora_A.default_0.weight", Role::Down),
    (".lora_B.default_0.weight", Role::Up),
    (".lora_A.weight", Role::Down),
    (".lora_B.weight", Role::Up),
    (".lora_B.bias", Role::UpBias),
    (".lora_magnitude_vector.default.weight", Role::Magnitude),
    (".lora_magnitude_vector.weight", Role::Magnitude),
    (".lora_magnitude_vector", Role::Magnitude),
    // diffusers before it used PEFT: `….processor.to_q_lora.down.weight`, `….to_q.lora.down.weight`,
    // and of text encoders `….q_proj.lora_linear_layer.down.weight`.
    (".lora_linear_layer.down.weight", Role::Down),
    (".lora_linear_layer.up.weight", Role::Up),
    ("_lora.down.weight", Role::Down),
    ("_lora.up.weight", Role::Up),
    (".lora.down.weight", Role::Down),
    (".lora.up.weight", Role::Up),
    // x-flux.
    ("_lora1.down.weight", Role::Down),
    ("_lora1.up.weight", Role::Up),
    ("_lora2.down.weight", Role::Down),
    ("_lora2.up.weight", Role::Up),
    // LyCORIS.
    (".hada_w1_a", Role::HadaB1),
    (".hada_w1_b", Role::HadaA1),
    (".hada_w2_a", Role::HadaB2),
    (".hada_w2_b", Role::HadaA2),
    (".hada_t1", Role::HadaCore1),
    (".hada_t2", Role::HadaCore2),
    (".lokr_w1_a", Role::KronLeftB),
    (".lokr_w1_b", Role::KronLeftA),
    (".lokr_w1", Role::KronLeft),
    (".lokr_w2_a", Role::KronRightB),
    (".lokr_w2_b", Role::KronRightA),
    (".lokr_w2", Role::KronRight),
    (".lokr_t2", Role::KronRightCore),
    (".diff_b", Role::DiffBias),
    (".diff", Role::Diff),
    (".w_norm", Role::Norm),
    (".b_norm", Role::NormBias),
    (".set_weight", Role::Whole),
    (".on_input", Role::OnInput),
];

/// What is recognised and not implemented, with the reason.
const REFUSED: [(&str, &str); 15] = [
    (".oft_blocks", "OFT and BOFT of LyCORIS and sd-scripts rotate the outputs: not implemented"),
    (".rescale", "part of an OFT or BOFT of LyCORIS, which is not implemented"),
    (".oft_diag", "OFT of old LyCORIS: not implemented"),
    (".a1.weight", "GLoRA needs the base's own weight on both sides: not implemented"),
    (".a2.weight", "GLoRA: not implemented"),
    (".b1.weight", "GLoRA: not implemented"),
    (".b2.weight", "GLoRA: not implemented"),
    (".bm.weight", "GLoRA: not implemented"),
    (".reshape_weight", "the base's weight is given another shape first: not implemented"),
    (".bias_indices", "sparse biases of old LyCORIS: not implemented"),
    (".bias_values", "sparse biases of old LyCORIS: not implemented"),
    (".bias_size", "sparse biases of old LyCORIS: not implemented"),
    (".scalar", "a LyCORIS scalar that training had not multiplied into the factors yet"),
    (".lokr_t1", "LyCORIS writes no core of C, and no program reads one"),
    (".scale", "a trained norm scale of BFL's control adapters: not implemented"),
];

/// A name taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part<'a> {
    /// A stem and what the tensor is to it.
    Role(&'a str, Role),
    /// A name that is known, and why it is not read.
    Refused(&'static str),
    /// None of these formats has such names.
    Unknown,
}

/// Takes a name apart.
pub(super) fn part(name: &str) -> Part<'_> {
    if name.starts_with("bundle_emb.") {
        return Part::Refused("a textual-inversion embedding beside the change: not implemented");
    }
    let stem = |suffix: &str| name.strip_suffix(suffix).filter(|stem| !stem.is_empty());
    for (suffix, role) in SUFFIXES {
        if let Some(stem) = stem(suffix) {
            return Part::Role(stem, role);
        }
    }
    let refused = REFUSED.iter().find(|(suffix, _)| stem(suffix).is_some());
    refused.map_or(Part::Unknown, |(_, reason)| Part::Refused(reason))
}

/// Whether a name is one that only these formats have.
pub(super) fn is_characteristic(name: &str) -> bool {
    match part(name) {
        Part::Role(_, role) => {
            // PEFT's and loralib's own names.
            let shared = name.contains(".lora_A") || name.contains(".lora_B");
            !shared && !matches!(role, Role::Alpha) && !name.contains("lora_magnitude_vector")
        }
        Part::Refused(_) => name.ends_with(".oft_blocks") || name.ends_with(".a1.weight"),
        Part::Unknown => false,
    }
}

/// x-flux tells the two streams of a block by a number in the suffix; the stem keeps it.
pub(super) fn stem_of(tensor: &Tensor, stem: &str) -> String {
    for stream in ["_lora1", "_lora2"] {
        if tensor.name[stem.len()..].starts_with(stream) {
            return format!("{stem}{stream}");
        }
    }
    stem.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_apart() {
        let cases = [
            (
                "lora_unet_down_blocks_0_proj_in.lora_down.weight",
                "lora_unet_down_blocks_0_proj_in",
                Role::Down,
            ),
            ("unet.a.attn1.processor.to_q_lora.up.weight", "unet.a.attn1.processor.to_q", Role::Up),
            (
                "text_encoder.q_proj.lora_linear_layer.down.weight",
                "text_encoder.q_proj",
                Role::Down,
            ),
            ("lora_te_x.lokr_w1_a", "lora_te_x", Role::KronLeftB),
            ("transformer.x.lora_A.default.weight", "transformer.x", Role::Down),
            ("x.lora_magnitude_vector", "x", Role::Magnitude),
            ("x.diff_b", "x", Role::DiffBias),
        ];
        for (name, stem, role) in cases {
            assert_eq!(part(name), Part::Role(stem, role), "{name}");
        }
        assert_eq!(part(".alpha"), Part::Unknown);
        assert!(matches!(part("x.oft_blocks"), Part::Refused(_)));
        assert!(matches!(part("bundle_emb.cat.string_to_param.*"), Part::Refused(_)));
    }

    #[test]
    fn no_suffix_hides_another() {
        for (place, (suffix, role)) in SUFFIXES.iter().enumerate() {
            let name = format!("module{suffix}");
            let found = SUFFIXES.iter().position(|(other, _)| name.ends_with(other));
            assert_eq!(found.map(|at| SUFFIXES[at].1), Some(*role), "{suffix} at {place}");
        }
    }
}
