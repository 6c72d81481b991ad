//! Adapter names → parameters of the base: every prefix, and every way in which it cannot be told.

use lora_format::Dtype;
use lora_merge::MergeOptions;
use lora_merge::engine::RunOptions;
use serde_json::json;

use crate::Case;
use crate::support::{Factors, Prng, Tensor};

/// A base with these parameters, all 4 × 6.
fn base(names: &[&str]) -> Vec<Tensor> {
    let tensor = |(seed, name): (usize, &&str)| {
        let mut prng = Prng::new(seed as u64);
        Tensor::random(&mut prng, &format!("{name}.weight"), Dtype::F32, &[4, 6], 1.0)
    };
    names.iter().enumerate().map(tensor).collect()
}

fn adapter(modules: &[&str]) -> Vec<Factors> {
    let factors =
        |module: &&str| Factors::random(&mut Prng::new(99), module, (4, 6, 2), Dtype::F32, 0.1);
    modules.iter().map(factors).collect()
}

/// The parameters that the modules resolve to, in the adapter's sorted order.
fn resolved(names: &[&str], modules: &[&str]) -> Vec<String> {
    let case = Case::file(&base(names), &adapter(modules));
    let plan = case.plan(&MergeOptions::default()).unwrap();
    plan.targets.iter().map(|target| target.name.trim_end_matches(".weight").to_owned()).collect()
}

fn refusal(names: &[&str], modules: &[&str]) -> String {
    Case::file(&base(names), &adapter(modules)).refusal(&MergeOptions::default())
}

#[test]
fn prefixes_resolve_in_all_directions() {
    // (in the base, in the adapter)
    for (stored, named) in [
        ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
        // The base adds one.
        ("bert.encoder.layer.0.attention.self.query", "encoder.layer.0.attention.self.query"),
        ("model.layers.0.self_attn.q_proj", "layers.0.self_attn.q_proj"),
        ("transformer.h.0.attn.c_attn", "h.0.attn.c_attn"),
        ("thinker.model.layers.0.mlp.up_proj", "layers.0.mlp.up_proj"),
        // The adapter adds one.
        ("encoder.layer.0.attention.self.query", "bert.encoder.layer.0.attention.self.query"),
        ("layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
        ("h.0.attn.c_attn", "transformer.h.0.attn.c_attn"),
        ("model.layers.0.mlp.up_proj", "base_model.model.model.layers.0.mlp.up_proj"),
        ("model.layers.0.mlp.up_proj", "_orig_mod.model.layers.0.mlp.up_proj"),
        // Both differ.
        ("language_model.model.layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.up_proj"),
        ("model.language_model.layers.0.mlp.up_proj", "language_model.model.layers.0.mlp.up_proj"),
        ("model.language_model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        ("model.layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.up_proj"),
    ] {
        let others = [stored, "unrelated.0.x", "unrelated.1.up"];
        assert_eq!(resolved(&others, &[named]), [stored], "{named}");
    }
}

#[test]
fn an_exact_name_wins_over_a_suffix() {
    let names = ["layers.0.q", "model.layers.0.q", "vision.layers.0.q"];
    assert_eq!(resolved(&names, &["layers.0.q"]), ["layers.0.q"]);
    assert_eq!(resolved(&names, &["vision.layers.0.q"]), ["vision.layers.0.q"]);
}

#[test]
fn the_plan_counts_the_renamed_modules() {
    let names = ["bert.a.0.q", "bert.a.1.q", "cls.dense"];
    let case = Case::file(&base(&names), &adapter(&["a.0.q", "a.1.q"]));
    let plan = case.plan(&MergeOptions::default()).unwrap();
    let renames: Vec<_> = plan.renames.into_iter().collect();
    assert_eq!(renames, [((String::new(), "bert".to_owned()), 2)]);
}

/// A prefix that is no known wrapper stands before every module or before none, whichever side has
/// it: otherwise it is a tower of the model.
#[test]
fn a_prefix_of_some_modules_is_not_a_wrapper() {
    for (names, modules) in [
        (&["bert.a.0.q", "cls.dense"][..], &["a.0.q", "cls.dense"][..]),
        (&["vision.layers.0.q", "lang.layers.1.q"], &["layers.0.q", "layers.1.q"]),
        // One part is too little to mean this one.
        (&["visual.patch.proj"], &["proj"]),
        // A layer number is not part of a wrapper.
        (&["mlp.fc1"], &["encoder.layers.5.mlp.fc1"]),
        (&["encoder.layers.5.mlp.fc1"], &["mlp.fc1"]),
    ] {
        let text = refusal(names, modules);
        assert!(text.contains("the base has no such parameter"), "{text}");
    }
}

#[test]
fn ambiguity_is_an_error_that_shows_the_candidates() {
    let names = ["text_tower.layers.0.q_proj", "vision_tower.layers.0.q_proj", "other.x"];
    assert_eq!(
        refusal(&names, &["layers.0.q_proj"]),
        "adapter does not fit base.safetensors: `layers.0.q_proj`: fits several parameters of the \
         base: text_tower.layers.0.q_proj.weight, vision_tower.layers.0.q_proj.weight"
    );
    // Both candidates differ in wrappers alone.
    let names = ["model.layers.0.q", "language_model.layers.0.q"];
    let text = refusal(&names, &["llm.layers.0.q"]);
    assert!(text.contains("language_model.layers.0.q.weight, model.layers.0.q.weight"), "{text}");
}

#[test]
fn two_modules_on_one_parameter_are_an_error() {
    assert_eq!(
        refusal(&["model.layers.0.q"], &["layers.0.q", "model.layers.0.q"]),
        "adapter does not fit base.safetensors: `layers.0.q` and `model.layers.0.q` both resolve \
         to `model.layers.0.q.weight`"
    );
}

#[test]
fn what_is_not_there_is_listed_with_the_nearest_names() {
    let names = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"];
    let text = refusal(&names, &["model.layers.7.self_attn.q_proj", "model.layers.9.x"]);
    let expected = "adapter does not fit base.safetensors: 2 problems\n  \
        - `model.layers.7.self_attn.q_proj`: the base has no such parameter; nearest: \
        `model.layers.0.self_attn.q_proj.weight`, `model.layers.0.mlp.up_proj.weight`\n  \
        - `model.layers.9.x`: the base has no such parameter; nearest: \
        `model.layers.0.mlp.up_proj.weight`, `model.layers.0.self_attn.q_proj.weight`";
    assert_eq!(text, expected);
}

/// A tower that the base lacks is not a wrapper: the same suffix elsewhere is another layer.
#[test]
fn another_tower_is_not_a_prefix() {
    let names = ["model.layers.0.q_proj", "model.layers.1.q_proj"];
    let text = refusal(&names, &["model.layers.0.q_proj", "vision_tower.model.layers.1.q_proj"]);
    let unresolved = "`vision_tower.model.layers.1.q_proj`: the base has no such parameter";
    assert!(text.contains(unresolved), "{text}");
    let names = ["language_model.layers.0.q_proj", "language_model.layers.1.q_proj"];
    let modules = ["model.layers.0.q_proj", "vision_tower.layers.1.q_proj"];
    let text = refusal(&names, &modules);
    assert!(text.contains("`vision_tower.layers.1.q_proj`: the base has no such"), "{text}");
    // A short name such as `query` ends too many names to mean one of them.
    let text = refusal(&["query", "x.key"], &["encoder.query"]);
    assert!(text.contains("`encoder.query`: the base has no such parameter"), "{text}");
}

#[test]
fn a_part_of_a_name_is_not_a_suffix() {
    let text = refusal(&["model.layers.10.q_proj"], &["0.q_proj"]);
    assert!(text.contains("no such parameter"), "{text}");
    let text = refusal(&["model.layers.0.qq_proj"], &["q_proj"]);
    assert!(text.contains("no such parameter"), "{text}");
}

#[test]
fn a_tied_output_layer_is_an_error() {
    let names = ["model.embed_tokens", "model.layers.0.q"];
    let text = refusal(&names, &["lm_head"]);
    assert!(text.contains("`lm_head`: the base ties its output head"), "{text}");
    // Stored all the same, but tied on load.
    let mut tensors = base(&names);
    tensors.push(base(&["lm_head"]).remove(0));
    for module in ["lm_head", "model.embed_tokens"] {
        let config = json!({"tie_word_embeddings": true});
        let case = Case::directory(&config, &tensors, &adapter(&[module]));
        let text = case.refusal(&MergeOptions::default());
        assert!(text.contains("the base ties its output head"), "{text}");
        let config = json!({"tie_word_embeddings": false});
        let case = Case::directory(&config, &tensors, &adapter(&[module]));
        case.merge(&MergeOptions::default(), &RunOptions::default()).unwrap();
    }
}

#[test]
fn every_problem_is_listed_at_once() {
    let mut tensors = base(&["a.0.q", "a.0.k", "b.0.v", "c.0.v"]);
    tensors[1].dtype = Dtype::I32;
    let wrong = Factors::random(&mut Prng::new(1), "a.0.q", (5, 6, 2), Dtype::F32, 0.1);
    let mut factors = adapter(&["a.0.k", "0.v", "nowhere.z"]);
    factors.push(wrong);
    let text = Case::file(&tensors, &factors).refusal(&MergeOptions::default());
    for part in [
        "`0.v`: fits several parameters of the base: b.0.v.weight, c.0.v.weight",
        "`nowhere.z`: the base has no such parameter",
        "`a.0.k.weight`: the base stores it as I32",
        "`a.0.q.weight`: the base stores [4, 6], the adapter's change is 5 × 6",
    ] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
}

#[test]
fn shapes_that_do_not_fit_name_the_cause() {
    let factors = |module: &str, out, input| {
        vec![Factors::random(&mut Prng::new(2), module, (out, input, 2), Dtype::F32, 0.1)]
    };
    let refusal = |name: &str, shape: &[usize], factors: Vec<Factors>| {
        let base = [Tensor::zeros(&format!("{name}.weight"), Dtype::F32, shape)];
        let text = Case::file(&base, &factors).refusal(&MergeOptions::default());
        text.replace("adapter does not fit base.safetensors: ", "")
    };
    assert_eq!(
        refusal("model.layers.0.q_proj", &[8, 8], factors("model.layers.0.q_proj", 8, 16)),
        "`model.layers.0.q_proj.weight`: the base stores [8, 8], the adapter's change is 8 × 16: \
         neither this shape nor its transpose fits: is this the model that the adapter was trained \
         on?"
    );
    assert_eq!(
        refusal("lm_head", &[100, 8], factors("lm_head", 104, 8)),
        "`lm_head.weight`: the base stores [100, 8], the adapter's change is 104 × 8: one dimension \
         fits and the other does not: was the vocabulary resized for training?"
    );
    assert_eq!(
        refusal("mlp.experts.up_proj", &[4, 8, 16], factors("mlp.experts.up_proj", 8, 16)),
        "`mlp.experts.up_proj.weight`: the base stores [4, 8, 16], the adapter's change is 8 × 16: \
         the parameter is not a matrix, and the change is one of a linear layer"
    );
}

#[test]
fn a_base_quantised_in_an_unknown_way_is_refused_by_name() {
    for (dtype, name) in [(Dtype::U8, "U8"), (Dtype::I8, "I8"), (Dtype::F8_E4M3, "F8_E4M3")] {
        let base = [Tensor::zeros("m.0.q.weight", dtype, &[4, 6])];
        let config = json!({"quantization_config": {"quant_method": "unheard-of"}});
        let text =
            Case::directory(&config, &base, &adapter(&["m.0.q"])).refusal(&MergeOptions::default());
        let expected = format!("`m.0.q.weight`: the base stores it as {name}; only F32, F16 and");
        assert!(text.contains(&expected), "{text}");
        let expected = format!("`m.0.q.weight` ({name}): looks quantised, but belongs to no known");
        assert!(text.contains(&expected), "{text}");
    }
}

#[test]
fn an_adapter_without_targets_is_an_error() {
    let text = refusal(&["m.0.q"], &[]);
    assert!(text.contains("no adapter tensors in it"), "{text}");
}
