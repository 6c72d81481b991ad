//! The small files of a model directory.

use std::path::Path;

use lora_format::Dtype;
use lora_merge::assets::{Assets, TokenizerSource};
use lora_merge::engine::RunOptions;
use lora_merge::{MergeOptions, MergePlan};
use serde_json::{Value, json};

use crate::Case;
use crate::support::{Factors, Prng, Tensor, names, read_json};

fn case(config: &Value) -> Case {
    let mut prng = Prng::new(60);
    let base = [
        Tensor::random(&mut prng, "m.0.q.weight", Dtype::Bf16, &[8, 12], 1.0),
        Tensor::random(&mut prng, "m.0.norm.weight", Dtype::F32, &[12], 1.0),
    ];
    Case::directory(
        config,
        &base,
        &[Factors::random(&mut prng, "m.0.q", (8, 12, 2), Dtype::F32, 0.1)],
    )
}

fn put(directory: &Path, files: &[(&str, &str)]) {
    for (name, text) in files {
        let path = directory.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
}

fn assets(plan: &MergePlan, tokenizer: TokenizerSource) -> Assets {
    Assets::plan(plan, tokenizer).unwrap()
}

/// The merged `config.json`, and what was said about it.
fn config(original: &Value, dtype: Option<Dtype>) -> (Value, Vec<String>) {
    let case = case(original);
    let options = MergeOptions { dtype, ..MergeOptions::default() };
    let changes = assets(&case.plan(&options).unwrap(), TokenizerSource::Auto).config_changes;
    let merged = case.merge(&options, &RunOptions::default()).unwrap();
    (read_json(&merged.output.join("config.json")), changes)
}

#[test]
fn the_dtype_entries_tell_the_truth() {
    let original = json!({"torch_dtype": "bfloat16", "hidden_size": 12});
    let (kept, changes) = config(&original, None);
    assert_eq!((kept, changes), (original.clone(), vec![]));
    for (dtype, name) in [(Dtype::F32, "float32"), (Dtype::F16, "float16")] {
        let (edited, changes) = config(&original, Some(dtype));
        assert_eq!(edited, json!({"torch_dtype": name, "hidden_size": 12}));
        assert_eq!(changes, [format!("torch_dtype: bfloat16 → {name}")]);
        let (edited, _) = config(&json!({"dtype": "bfloat16"}), Some(dtype));
        assert_eq!(edited, json!({ "dtype": name }));
    }
    // Wrong before: true after.
    let (edited, changes) = config(&json!({"dtype": "float32"}), None);
    assert_eq!(edited, json!({"dtype": "bfloat16"}));
    assert_eq!(changes, ["dtype: float32 → bfloat16"]);
    // Absent before: transformers would load float32.
    let (edited, changes) = config(&json!({"model_type": "x"}), None);
    assert_eq!(edited, json!({"model_type": "x", "torch_dtype": "bfloat16"}));
    assert_eq!(changes, ["torch_dtype added: bfloat16"]);
}

#[test]
fn nested_configurations_follow() {
    let original = json!({
        "model_type": "llava",
        "dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16", "rope_scaling": {"dtype": "untouched"}},
        "vision_config": {"torch_dtype": "float16", "inner_config": {"dtype": "bfloat16"}},
        "quantization_like": {"dtype": "bfloat16"},
    });
    let (edited, changes) = config(&original, Some(Dtype::F32));
    let expected = json!({
        "model_type": "llava",
        "dtype": "float32",
        "text_config": {"dtype": "float32", "rope_scaling": {"dtype": "untouched"}},
        "vision_config": {"torch_dtype": "float32", "inner_config": {"dtype": "float32"}},
        "quantization_like": {"dtype": "bfloat16"},
    });
    assert_eq!(edited, expected);
    assert_eq!(
        changes,
        [
            "dtype: bfloat16 → float32",
            "text_config.dtype: bfloat16 → float32",
            "vision_config.torch_dtype: float16 → float32",
            "vision_config.inner_config.dtype: bfloat16 → float32",
        ]
    );
    // The order of the keys is kept, and the file ends as transformers ends it.
    let case = case(&original);
    let options = MergeOptions { dtype: Some(Dtype::F32), ..MergeOptions::default() };
    let merged = case.merge(&options, &RunOptions::default()).unwrap();
    let text = std::fs::read_to_string(merged.output.join("config.json")).unwrap();
    assert!(text.starts_with("{\n  \"model_type\": \"llava\",\n  \"dtype\""), "{text}");
    assert!(text.ends_with("}\n"));
}

#[test]
fn a_stale_quantization_config_is_dropped_and_a_true_one_kept() {
    let quantised =
        json!({"torch_dtype": "bfloat16", "quantization_config": {"quant_method": "x"}});
    let (edited, changes) = config(&quantised, None);
    assert_eq!(edited, json!({"torch_dtype": "bfloat16"}));
    assert_eq!(changes, ["quantization_config removed: no tensor is quantised"]);

    let mut prng = Prng::new(61);
    let base = [
        Tensor::random(&mut prng, "m.0.q.weight", Dtype::Bf16, &[8, 12], 1.0),
        Tensor::zeros("m.0.up.weight", Dtype::F8_E4M3, &[8, 12]),
        Tensor::zeros("m.0.up.weight_scale_inv", Dtype::F32, &[1]),
    ];
    let factors = [Factors::random(&mut prng, "m.0.q", (8, 12, 2), Dtype::F32, 0.1)];
    let case = Case::directory(&quantised, &base, &factors);
    let merged = case.merge(&MergeOptions::default(), &RunOptions::default()).unwrap();
    assert_eq!(read_json(&merged.output.join("config.json")), quantised);
}

#[test]
fn files_come_from_an_allow_list_and_the_rest_is_listed() {
    let case = case(&json!({"torch_dtype": "bfloat16"}));
    let allowed = [
        ("generation_config.json", "{}"),
        ("tokenizer.json", "base"),
        ("tokenizer.model", "base"),
        ("vocab.txt", "base"),
        ("merges.txt", "base"),
        ("special_tokens_map.json", "{}"),
        ("chat_template.jinja", "base"),
        ("additional_chat_templates/tool.jinja", "base"),
        ("preprocessor_config.json", "{}"),
        ("modeling_x.py", "pass"),
        ("LICENSE", "text"),
        ("modules.json", "[]"),
        ("1_Pooling/config.json", "{}"),
    ];
    let refused = [
        ("README.md", "card"),
        ("optimizer.pt", "state"),
        ("pytorch_model.bin", "weights"),
        ("model.onnx", "weights"),
        ("other.safetensors", "weights"),
        ("checkpoint-10/optimizer.pt", "state"),
        ("1_Pooling/notes.txt", "x"),
    ];
    put(&case.base, &allowed);
    put(&case.base, &refused);
    put(&case.base, &[(".gitattributes", "x"), (".cache/huggingface/x", "x")]);
    let planned = assets(&case.plan(&MergeOptions::default()).unwrap(), TokenizerSource::Auto);
    assert_eq!(
        planned.left_behind,
        [
            "1_Pooling/notes.txt",
            "README.md",
            "checkpoint-10/",
            "model.onnx",
            "optimizer.pt",
            "other.safetensors",
            "pytorch_model.bin",
        ]
    );
    let merged = case.merge(&MergeOptions::default(), &RunOptions::default()).unwrap();
    let written = names(&merged.output);
    for (name, text) in allowed {
        assert!(written.iter().any(|found| found == name), "{name} is missing");
        assert_eq!(std::fs::read_to_string(merged.output.join(name)).unwrap(), text, "{name}");
    }
    let expected = allowed.len() + 2 /* weights, config */ + 2 /* directories */;
    assert_eq!(written.len(), expected, "{written:?}");
}

#[test]
fn the_adapters_tokenizer_and_template_win() {
    let case = case(&json!({}));
    put(&case.base, &[("tokenizer.json", "base"), ("vocab.json", "base"), (JINJA, "base")]);
    put(&case.adapter, &[("tokenizer.json", "adapter"), (JINJA, "adapter"), ("README.md", "x")]);
    let plan = case.plan(&MergeOptions::default()).unwrap();
    for (source, expected) in [
        (TokenizerSource::Auto, "adapter"),
        (TokenizerSource::Adapter, "adapter"),
        (TokenizerSource::Base, "base"),
    ] {
        let planned = assets(&plan, source);
        let text = |name: &str| std::fs::read_to_string(&planned.files[name]).unwrap();
        assert_eq!(text("tokenizer.json"), expected, "{source:?}");
        assert_eq!(text(JINJA), expected, "{source:?}");
        // Beside the adapter's vocabulary, a part of the base's would be read too.
        assert_eq!(planned.files.contains_key("vocab.json"), expected == "base", "{source:?}");
        assert!(!planned.files.contains_key("README.md"));
        let said: &[&str] = if expected == "base" { &[] } else { &[JINJA, "tokenizer.json"] };
        assert_eq!(planned.from_adapter, said, "{source:?}");
    }
    let merged = case.merge(&MergeOptions::default(), &RunOptions::default()).unwrap();
    assert_eq!(std::fs::read_to_string(merged.output.join(JINJA)).unwrap(), "adapter");
}

const JINJA: &str = "chat_template.jinja";

/// transformers takes the template file first: the base's must not shadow the one that the
/// adapter brings inside its tokenizer_config.json.
#[test]
fn a_template_inside_the_adapters_config_is_not_shadowed() {
    let case = case(&json!({}));
    put(&case.base, &[(JINJA, "base"), ("tokenizer_config.json", "{}")]);
    put(&case.adapter, &[("tokenizer_config.json", r#"{"chat_template": "adapter"}"#)]);
    let plan = case.plan(&MergeOptions::default()).unwrap();
    let planned = assets(&plan, TokenizerSource::Auto);
    assert!(!planned.files.contains_key(JINJA));
    assert_eq!(planned.left_behind, [JINJA]);
    let planned = assets(&plan, TokenizerSource::Base);
    assert!(planned.files.contains_key(JINJA));
    // Without a template of its own, the base's stays.
    put(&case.adapter, &[("tokenizer_config.json", "{}")]);
    assert!(assets(&plan, TokenizerSource::Auto).files.contains_key(JINJA));
}

#[test]
fn the_adapters_tokenizer_must_exist_to_be_asked_for() {
    let case = case(&json!({}));
    put(&case.base, &[("tokenizer.json", "base")]);
    let plan = case.plan(&MergeOptions::default()).unwrap();
    let error = Assets::plan(&plan, TokenizerSource::Adapter).unwrap_err();
    assert!(error.to_string().ends_with("no tokenizer and no chat template comes with it"));
}

#[test]
fn a_file_has_no_small_files() {
    let mut prng = Prng::new(62);
    let base = [Tensor::random(&mut prng, "m.0.q.weight", Dtype::F32, &[8, 12], 1.0)];
    let factors = [Factors::random(&mut prng, "m.0.q", (8, 12, 2), Dtype::F32, 0.1)];
    let case = Case::file(&base, &factors);
    put(&case.adapter, &[("tokenizer.json", "adapter")]);
    let planned = assets(&case.plan(&MergeOptions::default()).unwrap(), TokenizerSource::Auto);
    assert!(planned.files.is_empty() && planned.left_behind.is_empty());
}
