//! Square weights: siblings, then model_type, then the flag; what contradicts itself is an error.

use lora_format::Dtype;
use lora_merge::MergeOptions;
use lora_merge::orientation::Orientation::{self, InOut, OutIn};
use serde_json::{Value, json};

use crate::Case;
use crate::support::{Factors, Prng, Tensor, write_adapter};

const SQUARE: &str = "h.0.attn.c_proj";

fn zeros(name: &str, shape: &[usize]) -> Tensor {
    Tensor::zeros(name, Dtype::F32, shape)
}

/// A base with the square weight and these others.
fn case(
    others: &[Tensor],
    config: &Value,
    flag: Option<bool>,
    targets: &[(&str, usize, usize)],
) -> Case {
    let mut base = vec![zeros(&format!("{SQUARE}.weight"), &[8, 8])];
    base.extend_from_slice(others);
    let case = Case::directory(config, &base, &[]);
    let mut factors = vec![Factors::random(&mut Prng::new(1), SQUARE, (8, 8, 2), Dtype::F32, 0.1)];
    for &(module, out, input) in targets {
        factors.push(Factors::random(&mut Prng::new(2), module, (out, input, 2), Dtype::F32, 0.1));
    }
    let extra = flag.map_or(json!({}), |flag| json!({"fan_in_fan_out": flag}));
    write_adapter(&case.adapter, &factors, &extra);
    case
}

fn decided(case: &Case, user: Option<bool>) -> Orientation {
    let options = MergeOptions { fan_in_fan_out: user, ..MergeOptions::default() };
    let plan = case.plan(&options).unwrap_or_else(|error| panic!("{error}"));
    let target = plan.targets.iter().find(|target| target.name == "h.0.attn.c_proj.weight");
    target.unwrap().changes[0].orientation.unwrap()
}

/// A fused projection of 8 inputs and 24 outputs, stored as Conv1D or Linear do, with its bias.
fn sibling(stored: Orientation, block: usize) -> Vec<Tensor> {
    let shape = if stored == InOut { [8, 24] } else { [24, 8] };
    let name = format!("h.{block}.attn.c_attn");
    vec![zeros(&format!("{name}.weight"), &shape), zeros(&format!("{name}.bias"), &[24])]
}

#[test]
fn nothing_known_means_linear_and_the_flag_is_believed() {
    let none = json!({});
    assert_eq!(decided(&case(&[], &none, None, &[]), None), OutIn);
    assert_eq!(decided(&case(&[], &none, Some(false), &[]), None), OutIn);
    assert_eq!(decided(&case(&[], &none, Some(true), &[]), None), InOut);
}

#[test]
fn a_bias_of_the_same_block_decides() {
    for stored in [InOut, OutIn] {
        let case = case(&sibling(stored, 0), &json!({}), None, &[]);
        assert_eq!(decided(&case, None), stored);
    }
    // Another block says nothing.
    let case = case(&sibling(InOut, 1), &json!({}), None, &[]);
    assert_eq!(decided(&case, None), OutIn);
}

#[test]
fn a_target_of_the_same_block_decides() {
    // No bias: the factors say which dimension is the output.
    let weight = [zeros("h.0.mlp.c_fc.weight", &[8, 32])];
    let found = decided(&case(&weight, &json!({}), None, &[("h.0.mlp.c_fc", 32, 8)]), None);
    assert_eq!(found, InOut);
    let found = decided(&case(&weight, &json!({}), None, &[("h.0.mlp.c_fc", 8, 32)]), None);
    assert_eq!(found, OutIn);
}

#[test]
fn the_model_type_decides_without_siblings() {
    for (model_type, expected) in [("gpt2", InOut), ("openai-gpt", InOut), ("llama", OutIn)] {
        let config = json!({"model_type": model_type});
        assert_eq!(decided(&case(&[], &config, None, &[]), None), expected, "{model_type}");
    }
}

/// What the user says decides over the model type and the adapter's flag, and never against what
/// siblings show.
#[test]
fn the_user_decides_what_siblings_leave_open() {
    let gpt2 = json!({"model_type": "gpt2"});
    let open = case(&[], &gpt2, Some(true), &[]);
    assert_eq!(decided(&open, Some(false)), OutIn);
    assert_eq!(decided(&open, Some(true)), InOut);
    // A sibling against the model type: the user's word for the sibling settles it.
    let torn = case(&sibling(InOut, 0), &json!({"model_type": "llama"}), None, &[]);
    assert_eq!(decided(&torn, Some(true)), InOut);
    for case in [torn, case(&sibling(InOut, 0), &gpt2, Some(true), &[])] {
        let options = MergeOptions { fan_in_fan_out: Some(false), ..MergeOptions::default() };
        assert!(
            case.refusal(&options).contains("its sibling `h.0.attn.c_attn.weight` means in×out")
        );
    }
}

/// An encoder beside a decoder: the type of the whole says nothing of either.
#[test]
fn a_composite_model_type_is_no_evidence() {
    let config = json!({
        "model_type": "vision-encoder-decoder",
        "encoder": {"model_type": "vit"},
        "decoder": {"model_type": "gpt2"},
    });
    assert_eq!(decided(&case(&sibling(InOut, 0), &config, None, &[]), None), InOut);
    assert_eq!(decided(&case(&sibling(OutIn, 0), &config, None, &[]), None), OutIn);
}

/// PEFT keeps one flag for an adapter of Conv1D and Linear layers: where the shapes refute it,
/// it is not believed.
#[test]
fn a_refuted_flag_is_no_contradiction() {
    let config = json!({"model_type": "gpt2"});
    let targets = [("h.0.attn.c_attn", 24, 8)];
    let case = case(&sibling(InOut, 0), &config, Some(false), &targets);
    assert_eq!(decided(&case, None), InOut);
}

#[test]
fn contradictions_are_errors_that_show_the_evidence() {
    let refusal = |case: Case| {
        let text = case.refusal(&MergeOptions::default());
        let heading = "adapter does not fit base: `h.0.attn.c_proj.weight` is square, and whether \
                       it is stored as (out, in) or (in, out) is contradictory: ";
        text.strip_prefix(heading).unwrap_or_else(|| panic!("{text}")).to_owned()
    };
    // The siblings contradict each other.
    let mut others = sibling(InOut, 0);
    others.push(zeros("h.0.mlp.up.weight", &[32, 8]));
    others.push(zeros("h.0.mlp.up.bias", &[32]));
    assert_eq!(
        refusal(case(&others, &json!({}), None, &[])),
        "`h.0.attn.c_attn.weight` is in×out, `h.0.mlp.up.weight` is out×in"
    );
    // A sibling contradicts the model type.
    let config = json!({"model_type": "llama"});
    assert_eq!(
        refusal(case(&sibling(InOut, 0), &config, None, &[])),
        "its sibling `h.0.attn.c_attn.weight` is in×out, model_type llama means out×in"
    );
    // The flag contradicts the sibling, or the model type.
    assert_eq!(
        refusal(case(&sibling(InOut, 0), &json!({}), Some(false), &[])),
        "its sibling `h.0.attn.c_attn.weight` means in×out, fan_in_fan_out means \
         out×in"
    );
    assert_eq!(
        refusal(case(&[], &json!({"model_type": "gpt2"}), Some(false), &[])),
        "model_type gpt2 means in×out, fan_in_fan_out means out×in"
    );
}
