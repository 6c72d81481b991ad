//! Quantised bases: dequantised, changed and written in full precision.

use std::path::{Path, PathBuf};

use lora_format::Dtype;
use serde_json::{Value, json};

use crate::support::{
    Factors, Prng, fixtures, least, products, read_json, read_model, read_tensors, write_adapter,
};
use crate::{Scratch, text};

/// A fixture, the module that is changed, its shape, what the note says of the base, and the dtype
/// of the output.
type Case = (&'static str, &'static str, (usize, usize), &'static str, Dtype);

const CASES: [Case; 7] = [
    (
        "bnb-nf4-nested",
        "mlp.down_proj",
        (24, 40),
        "7 quantised weights (bitsandbytes)",
        Dtype::Bf16,
    ),
    ("bnb-int8", "self_attn.k_proj", (12, 24), "7 quantised weights (bitsandbytes)", Dtype::Bf16),
    ("gptq-4", "self_attn.q_proj", (72, 32), "2 quantised weights (gptq)", Dtype::F16),
    ("awq", "self_attn.q_proj", (96, 32), "2 quantised weights (awq)", Dtype::F16),
    ("fp8-block", "self_attn.q_proj", (131, 40), "2 quantised weights (fp8)", Dtype::Bf16),
    (
        "ct-float-tensor",
        "self_attn.q_proj",
        (20, 36),
        "1 quantised weights (compressed-tensors)",
        Dtype::Bf16,
    ),
    (
        "ct-pack4-group",
        "self_attn.q_proj",
        (20, 96),
        "2 quantised weights (compressed-tensors)",
        Dtype::Bf16,
    ),
];

fn case(name: &str) -> PathBuf {
    fixtures().join("quantised").join(name)
}

fn factors(module: &str, (out, input): (usize, usize)) -> Factors {
    let mut prng = Prng::new(4);
    let module = format!("model.layers.0.{module}");
    Factors::random(&mut prng, &module, (out, input, 2), Dtype::F32, 0.1)
}

fn adapter(directory: &Path, module: &str, shape: (usize, usize)) {
    write_adapter(directory, &[factors(module, shape)], &json!({}));
}

/// In f32: the values that the format's own library dequantises to, plus B·A.
#[test]
fn the_output_is_what_its_library_dequantises_and_the_change() {
    for (name, module, shape, weights, _) in CASES {
        let scratch = Scratch::new();
        adapter(&scratch.path("a"), module, shape);
        let base = case(name).join("base");
        let ran = scratch.cli(&["merge", text(&base), "a", "--dtype", "f32", "-o", "out"]).done();
        let note = format!("note: {weights} are written in full precision\n");
        assert!(ran.stderr.starts_with(&note), "{name}: {}", ran.stderr);
        let removed = "note: config.json: quantization_config removed: no tensor is quantised\n";
        assert!(ran.stderr.contains(removed), "{name}: {}", ran.stderr);
        let mut config = read_json(&base.join("config.json"));
        config.as_object_mut().unwrap().remove("quantization_config").unwrap();
        for field in ["dtype", "torch_dtype"] {
            if config.get(field).is_some() {
                config[field] = json!("float32");
            }
        }
        assert_eq!(read_json(&scratch.path("out/config.json")), config, "{name}");

        let merged = read_model(&scratch.path("out"));
        let expected = read_tensors(&case(name).join("expected.safetensors"));
        let factors = factors(module, shape);
        let target = format!("{}.weight", factors.module);
        let (delta, absolute) = products(&factors.a, &factors.b, false);
        for (weight, expected) in &expected {
            let ours = merged[weight].values();
            let exact = expected.values();
            if *weight != target {
                assert_eq!(ours, exact, "{name}: {weight}");
                continue;
            }
            for at in 0..exact.len() {
                let wanted = exact[at] + delta[at];
                let bound = 2f64.powi(-23) * (wanted.abs() + absolute[at]);
                assert!((ours[at] - wanted).abs() <= bound, "{name}: {} for {wanted}", ours[at]);
            }
        }
        // Nothing that belongs to the quantisation is left, and nothing else is gone.
        let parts = ["absmax", "quant_", "SCB", "_format", "qweight", "qzeros", "scale", "g_idx"];
        for left in merged.keys() {
            let known = expected.contains_key(left)
                || (left.ends_with(".weight") && merged[left].dtype == Dtype::F32);
            assert!(known && !parts.iter().any(|part| left.contains(part)), "{name}: {left}");
        }
        for plain in ["model.norm.weight", "lm_head.weight"] {
            assert_eq!(
                merged.contains_key(plain),
                read_model(&base).contains_key(plain),
                "{name}: {plain}"
            );
        }
    }
}

/// Without --dtype: the dtype that the method itself dequantises to, rounded once.
#[test]
fn the_dtype_is_the_methods_own() {
    for (name, module, shape, _, dtype) in CASES {
        let scratch = Scratch::new();
        adapter(&scratch.path("a"), module, shape);
        let base = case(name).join("base");
        scratch.cli(&["merge", text(&base), "a", "-o", "out"]).done();
        scratch.cli(&["merge", text(&base), "a", "-o", "wide", "--dtype", "f32"]).done();
        let (merged, wide) = (read_model(&scratch.path("out")), read_model(&scratch.path("wide")));
        for (weight, tensor) in read_tensors(&case(name).join("expected.safetensors")) {
            assert_eq!(merged[&weight].dtype, dtype, "{name}");
            let half = crate::support::unit_roundoff(dtype);
            let wide = wide[&weight].values();
            for (ours, wide) in merged[&weight].values().into_iter().zip(wide) {
                assert!((ours - wide).abs() <= half * 1.001 * wide.abs() + least(dtype), "{name}");
            }
            assert_eq!(merged[&weight].shape, tensor.shape, "{name}");
        }
    }
}

/// What quantising again would lose is said, and is not done.
#[test]
fn the_report() {
    for (name, module, shape, weights, dtype) in CASES {
        let scratch = Scratch::new();
        adapter(&scratch.path("a"), module, shape);
        let base = case(name).join("base");
        let ran = scratch.cli(&["merge", text(&base), "a", "-o", "out", "--json"]);
        assert_eq!(ran.code, Some(0), "{name}: {}", ran.stderr);
        let report: Value = serde_json::from_str(&ran.stdout).unwrap();
        let quantised = &report["quantised"];
        let said = format!(
            "{} quantised weights ({})",
            quantised["weights"],
            quantised["method"].as_str().unwrap()
        );
        assert_eq!(said, weights, "{name}");
        let target = &report["targets"][0];
        assert_eq!(target["source"], "quantised", "{name}");
        assert_eq!(target["base_dtype"], dtype.name(), "{name}");
        let again = &target["requantised"];
        let (kept, noise) =
            (again["projection"].as_f64().unwrap(), again["noise"].as_f64().unwrap());
        // Coarse steps: some of the delta is lost, or drowned.
        assert!((0.5..1.3).contains(&kept) && noise > 0.02, "{name}: {again}");
        let realised = &target["realised"];
        assert!(realised["noise"].as_f64().unwrap() < noise, "{name}: {realised}");
        let line = format!(
            "  quantised again with the scales that it had, the model would keep {:.1} % of the \
             delta, with noise of {:.0} % of it\n",
            100.0 * kept,
            100.0 * noise
        );
        assert!(ran.stderr.contains(&line), "{name}: {} lacks {line}", ran.stderr);
    }
    // Nothing of the kind of a base that is not quantised.
    let scratch = Scratch::new();
    let ran = scratch.cli(&["merge", "base.safetensors", "lora", "--json"]);
    let report: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(report["quantised"], Value::Null);
    assert!(report["targets"][0].get("requantised").is_none());
    assert!(!ran.stderr.contains("quantised"), "{}", ran.stderr);
}

#[test]
fn a_dry_run_says_what_is_quantised() {
    let scratch = Scratch::new();
    adapter(&scratch.path("a"), "self_attn.q_proj", (72, 32));
    let base = case("gptq-4").join("base");
    let ran = scratch.cli(&["merge", text(&base), "a", "--dry-run"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let row = "1 × model.layers.*.self_attn.q_proj.weight  [72, 32] F16 quantised  LoRA out×in \
               rank 2 scale 1\n";
    assert!(ran.stdout.contains(row), "{}", ran.stdout);
    assert!(ran.stdout.contains("\n1 targets, 1 tensors copied, 1 converted\n"), "{}", ran.stdout);
}

/// `verify` dequantises too; `unmerge` has nothing to do there.
#[test]
fn a_quantised_merge_is_verified() {
    let scratch = Scratch::new();
    adapter(&scratch.path("a"), "self_attn.q_proj", (72, 32));
    let base = case("gptq-4").join("base");
    scratch.cli(&["merge", text(&base), "a", "-o", "m"]).done();
    let verify =
        |adapter: &str| scratch.cli(&["verify", "m", "--base", text(&base), "--adapter", adapter]);
    let ran = verify("a");
    let agrees = "agrees: 3 of 3 tensors are bit for bit what the merge makes\n";
    assert_eq!((ran.code, ran.stdout.as_str()), (Some(0), agrees));
    assert_eq!(verify("a@0.9").code, Some(1));
    // The merged model is an ordinary one.
    scratch.cli(&["unmerge", "m", "a", "-o", "u"]).done();
    let expected = read_tensors(&case("gptq-4").join("expected.safetensors"));
    let undone = read_model(&scratch.path("u"));
    for (name, tensor) in expected {
        for (ours, theirs) in undone[&name].values().into_iter().zip(tensor.values()) {
            assert!((ours - theirs).abs() <= 1e-3, "{name}: {ours} for {theirs}");
        }
    }
}

/// What the configuration and the tensors disagree about is not guessed.
#[test]
fn a_contradiction_is_refused() {
    let scratch = Scratch::new();
    adapter(&scratch.path("a"), "self_attn.q_proj", (131, 40));
    crate::support::copy_directory(&case("fp8-block").join("base"), &scratch.path("odd"));
    let config = scratch.path("odd/config.json");
    let mut fields = read_json(&config);
    fields["quantization_config"] = json!({"quant_method": "gptq", "bits": 4, "group_size": 128});
    crate::support::write_json(&config, &fields);
    let before = scratch.names();
    let text = scratch.cli(&["merge", "odd", "a", "-o", "x"]).refused(scratch.root());
    assert!(text.starts_with("error: a does not fit odd: "), "{text}");
    let reason = "`model.layers.0.self_attn.q_proj.weight`: config.json says quant_method `gptq`, \
                  the tensors say 8-bit floats\n";
    assert!(text.contains(reason), "{text}");
    assert_eq!(scratch.names(), before);
}
