//! Strict accounting: what cannot be used entirely is refused, and nothing appears.

use lora_format::Dtype;
use lora_merge::MergeOptions;
use lora_merge::engine::RunOptions;

use crate::Case;
use crate::support::{
    Factors, Prng, Tensor, copy_directory, fixtures, listing, read_model, read_tensors,
    write_tensors,
};

/// A copy of a fixture in a scratch directory.
fn copy(name: &str) -> Case {
    let case = Case::at("base");
    let fixture = fixtures().join("peft").join(name);
    copy_directory(&fixture.join("base"), &case.base);
    copy_directory(&fixture.join("adapter"), &case.adapter);
    case
}

/// Removing any one target from the base stops the merge, whatever the others are.
#[test]
fn a_tensor_missing_from_the_base_stops_the_merge() {
    let expected = fixtures().join("peft/llama-vanilla/expected.safetensors");
    for target in read_tensors(&expected).keys() {
        let case = copy("llama-vanilla");
        let weights = case.base.join("model.safetensors");
        let left: Vec<Tensor> =
            read_tensors(&weights).into_values().filter(|tensor| tensor.name != *target).collect();
        write_tensors(&weights, &left, &[("format", "pt")]);
        let text = case.refusal(&MergeOptions::default());
        let module = target.trim_end_matches(".weight");
        assert!(text.contains(&format!("`{module}`: the base has no such parameter")), "{text}");
    }
}

/// One tensor more in the adapter stops the merge, and is named.
#[test]
fn an_extra_adapter_tensor_stops_the_merge() {
    let extras = [
        ("base_model.model.model.norm.weight", "stored in full"),
        ("base_model.model.model.layers.0.self_attn.q_proj.bias", "stored in full"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", ""),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "lora_embedding_B"),
        ("something", "a tensor of no module"),
    ];
    for (name, reason) in extras {
        let case = copy("llama-vanilla");
        let weights = case.adapter.join("adapter_model.safetensors");
        let mut tensors: Vec<Tensor> = read_tensors(&weights).into_values().collect();
        tensors.push(Tensor::zeros(name, Dtype::F32, &[2, 2]));
        write_tensors(&weights, &tensors, &[("format", "pt")]);
        let text = case.refusal(&MergeOptions::default());
        assert!(text.contains(name) && text.contains(reason), "{text}");
    }
    // A complete pair for a module that the base lacks.
    let case = copy("llama-vanilla");
    let weights = case.adapter.join("adapter_model.safetensors");
    let mut tensors: Vec<Tensor> = read_tensors(&weights).into_values().collect();
    let prefix = "base_model.model.model.layers.9.self_attn.q_proj";
    tensors.push(Tensor::zeros(&format!("{prefix}.lora_A.weight"), Dtype::F32, &[2, 24]));
    tensors.push(Tensor::zeros(&format!("{prefix}.lora_B.weight"), Dtype::F32, &[24, 2]));
    write_tensors(&weights, &tensors, &[("format", "pt")]);
    let text = case.refusal(&MergeOptions::default());
    assert!(text.contains("`model.layers.9.self_attn.q_proj`: the base has no such"), "{text}");
    assert!(text.contains("nearest: `model.layers."), "{text}");
}

#[test]
fn a_factor_without_its_partner_stops_the_merge() {
    let case = copy("llama-f32");
    let weights = case.adapter.join("adapter_model.safetensors");
    let mut tensors: Vec<Tensor> = read_tensors(&weights).into_values().collect();
    let removed = tensors.pop().unwrap().name;
    write_tensors(&weights, &tensors, &[("format", "pt")]);
    let text = case.refusal(&MergeOptions::default());
    assert!(text.contains("has no partner") && text.contains(&removed), "{text}");
}

/// NaN and infinities in the adapter: refused with the place, merged when allowed.
#[test]
fn non_finite_factors_are_refused_unless_allowed() {
    let mut prng = Prng::new(70);
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let base = [Tensor::random(&mut prng, "m.weight", Dtype::F32, &[4, 6], 1.0)];
            let mut factors = Factors::random(&mut prng, "m", (4, 6, 2), dtype, 0.1);
            let mut values = factors.b.values();
            values[3] = value;
            factors.b = Tensor::new("", dtype, &[4, 2], &values);
            let case = Case::file(&base, &[factors]);
            let text = case.refusal(&MergeOptions::default());
            let expected = "adapter: tensor `base_model.model.m.lora_B.weight` holds 1 values that \
                            are NaN or infinite, the first at element 3";
            assert_eq!(text, expected, "{dtype} {value}");
            let run = RunOptions { allow_non_finite: true, ..RunOptions::default() };
            let merged = case.merge(&MergeOptions::default(), &run).unwrap();
            assert_eq!(merged.report.realised.non_finite, 6, "{dtype} {value}");
        }
    }
}

/// A failure in the middle of writing leaves nothing behind either.
#[test]
fn a_failure_while_writing_leaves_nothing() {
    let mut prng = Prng::new(71);
    let mut last = vec![0.0; 4000];
    last[3999] = 1e30;
    let base = [
        Tensor::random(&mut prng, "m.weight", Dtype::F32, &[40, 60], 1.0),
        Tensor::new("z", Dtype::F32, &[4000], &last),
    ];
    let factors = || [Factors::random(&mut Prng::new(72), "m", (40, 60, 2), Dtype::F32, 0.1)];
    let shards = Case::sharded(&[&base[..1], &base[1..]], &factors());
    for case in [Case::file(&base, &factors()), shards] {
        let before = listing(case.directory.path());
        for (threads, tile_bytes) in [(1, 64), (3, 4096)] {
            let run = RunOptions { threads, tile_bytes, ..RunOptions::default() };
            let options = MergeOptions { dtype: Some(Dtype::F16), ..MergeOptions::default() };
            let error = case.merge(&options, &run).map(|_| ()).unwrap_err();
            assert!(error.to_string().contains("tensor `z`"), "{error}");
            assert_eq!(listing(case.directory.path()), before);
        }
    }
}

/// A module saved in full that the base lacks is new only beside changes that fit the base, and
/// never inside a layer: otherwise the base is another one.
#[test]
fn what_is_saved_in_full_does_not_make_up_for_a_wrong_base() {
    let features = fixtures().join("features");
    let other = features.join("bases/gpt-oss");
    for (case, named) in [
        ("ln-tuning", "`model.layers.0.input_layernorm`"),
        ("modules-to-save-classifier", "`model.layers.0.mlp.down_proj`"),
    ] {
        let adapter = features.join(case).join("adapter");
        // Of a base with other names, not even the modules of the same name are enough.
        let renamed = tempfile::tempdir().unwrap();
        let tensors: Vec<Tensor> = read_model(&other)
            .into_values()
            .map(|tensor| {
                let name = tensor.name.replace("layers", "blocks").replace("norm", "scale");
                tensor.renamed(&name)
            })
            .collect();
        let base = renamed.path().join("base.safetensors");
        write_tensors(&base, &tensors, &[("format", "pt")]);
        let error = crate::plan(&base, &adapter, &MergeOptions::default()).unwrap_err();
        let text = error.to_string();
        assert!(text.contains(named) && text.contains("no such parameter"), "{case}: {text}");
    }
}

/// A bias is not that of another tower because this one's layer has none.
#[test]
fn the_parameters_of_a_module_are_those_of_one_module() {
    let mut prng = Prng::new(31);
    let tensor = |prng: &mut Prng, name: &str, shape: &[usize]| {
        Tensor::random(prng, name, Dtype::F32, shape, 1.0)
    };
    let base = [
        tensor(&mut prng, "model.layers.0.fc.weight", &[4, 6]),
        tensor(&mut prng, "thinker.model.layers.0.fc.weight", &[4, 6]),
        tensor(&mut prng, "thinker.model.layers.0.fc.bias", &[4]),
    ];
    let case = Case::file(
        &base,
        &[Factors::random(&mut prng, "model.layers.0.fc", (4, 6, 2), Dtype::F32, 0.1)],
    );
    let weights = case.adapter.join("adapter_model.safetensors");
    let mut tensors: Vec<Tensor> = read_tensors(&weights).into_values().collect();
    tensors.push(tensor(&mut prng, "base_model.model.model.layers.0.fc.base_layer.bias", &[4]));
    write_tensors(&weights, &tensors, &[("format", "pt")]);
    let config = case.adapter.join("adapter_config.json");
    let mut fields = crate::support::read_json(&config);
    fields["bias"] = serde_json::json!("all");
    crate::support::write_json(&config, &fields);
    let text = case.refusal(&MergeOptions::default());
    assert!(text.contains("`model.layers.0.fc.bias`: the base has no such parameter"), "{text}");
}

/// Only a vocabulary or a head may be replaced by something of another size.
#[test]
fn what_replaces_a_parameter_has_its_shape() {
    let mut prng = Prng::new(32);
    let base = [
        Tensor::random(&mut prng, "model.layers.0.q.weight", Dtype::F32, &[4, 6], 1.0),
        Tensor::random(&mut prng, "model.norm.weight", Dtype::F32, &[6], 1.0),
        Tensor::random(&mut prng, "score.weight", Dtype::F32, &[2, 6], 1.0),
    ];
    let replaced = |name: &str, shape: &[usize]| {
        let mut prng = Prng::new(33);
        let factors = Factors::random(&mut prng, "model.layers.0.q", (4, 6, 2), Dtype::F32, 0.1);
        let case = Case::file(&base, &[factors]);
        let weights = case.adapter.join("adapter_model.safetensors");
        let mut tensors: Vec<Tensor> = read_tensors(&weights).into_values().collect();
        let name = format!("base_model.model.{name}");
        tensors.push(Tensor::random(&mut prng, &name, Dtype::F32, shape, 1.0));
        write_tensors(&weights, &tensors, &[("format", "pt")]);
        let config = case.adapter.join("adapter_config.json");
        let mut fields = crate::support::read_json(&config);
        fields["modules_to_save"] = serde_json::json!(["norm", "score", "q"]);
        crate::support::write_json(&config, &fields);
        case
    };
    for (name, shape) in [
        ("model.norm.weight", &[77][..]),
        ("model.norm.weight", &[6, 6]),
        ("score.weight", &[2, 7]),
        ("score.weight", &[12]),
    ] {
        let text = replaced(name, shape).refusal(&MergeOptions::default());
        assert!(text.contains("only a vocabulary or a head may have"), "{name} {shape:?}: {text}");
    }
    let merged = replaced("score.weight", &[5, 6]);
    let merged = merged.merge(&MergeOptions::default(), &RunOptions::default()).unwrap();
    assert_eq!(merged.tensors["score.weight"].shape, [5, 6]);
}
