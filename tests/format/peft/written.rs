//! What is written as our own format and as PEFT: the one holds everything, the other what its
//! writer knows, and the rest is refused by name before anything is written.

use std::collections::BTreeSet;
use std::path::Path;

use lora_format::codec::peft::{CONFIG_FILE, also_needed, write_directory};
use lora_format::fingerprint::BaseIdentity;
use lora_format::io::atomic::{Durability, Overwrite};
use lora_format::model::{AdapterFormat, Target};
use lora_format::model::{Component, Form, Layer, LowRank, Scaling, ScalingRule, SourceConfig};
use lora_format::{Adapter, Dtype, Tensor, native};
use lora_tests::fixture;
use serde_json::{Value, json};

use super::forms::{case, describe, options};
use crate::{entries, name, read};

/// Components with the bytes of their tensors, which must survive.
fn contents(adapter: &Adapter) -> Vec<(String, Vec<Vec<u8>>)> {
    let bytes = |component: &Component| {
        component.form.tensors().iter().map(|tensor| tensor.bytes().to_vec()).collect()
    };
    let lines = describe(adapter);
    assert_eq!(lines.len(), adapter.components.len());
    lines.into_iter().zip(adapter.components.iter().map(bytes)).collect()
}

fn write_peft(adapter: &Adapter, folder: &Path) -> lora_format::Result<()> {
    write_directory(adapter, folder, Overwrite::Never, Durability::Cached)
}

fn config(folder: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(folder.join(CONFIG_FILE)).unwrap()).unwrap()
}

/// PEFT's adapters of every feature survive the way to our format, and on to PEFT and back, with
/// their configuration; or PEFT's writer has no place for their method.
#[test]
fn every_feature_survives_or_is_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let mut refused: BTreeSet<String> = BTreeSet::new();
    let mut changed: Vec<(String, String)> = Vec::new();
    let mut survived = 0;
    for feature in entries(&fixture("features"), "") {
        let key = name(&feature);
        if key == "bases" {
            continue;
        }
        let case = case(&feature);
        let path = feature.join(case["adapters"][0]["path"].as_str().unwrap());
        let Ok(adapter) = lora_format::read(&path, &options(&case)) else { continue };
        let method = |error: &lora_format::Error| {
            assert!(matches!(error, lora_format::Error::Inexpressible { .. }), "{error}");
            error.to_string().rsplit_once(" by ").unwrap().1.to_owned()
        };
        let (file, folder) = (scratch.path().join(format!("{key}.x")), scratch.path().join(&key));
        native::write(&adapter, &file, Overwrite::Never, Durability::Cached).unwrap();
        let again = read(&file).unwrap();
        assert_eq!(contents(&again), contents(&adapter), "{key}");
        assert_eq!(again.source, adapter.source);
        if let Err(error) = write_peft(&again, &folder) {
            assert!(!folder.exists());
            let experts = key.starts_with("moe-") || key.starts_with("target-parameter");
            if !experts && !key.starts_with("multihead-attention") {
                refused.insert(method(&error));
            }
            continue;
        }
        let again = read(&folder).unwrap();
        assert_eq!(contents(&again), contents(&adapter), "{key}");
        survived += 1;
        let of_lora = adapter.source.as_ref().is_some_and(|it| it.config["peft_type"] == "LORA");
        let fields = changed_fields(&adapter, &config(&folder));
        if of_lora && !fields.is_empty() {
            changed.push((key, fields));
        }
    }
    let refused: Vec<&str> = refused.iter().map(String::as_str).collect();
    assert_eq!(
        refused,
        [
            "AdaLoRA",
            "BOFT",
            "C3A",
            "DeLoRA",
            "GraLoRA",
            "HRA",
            "HiRA",
            "IA³",
            "LoHa",
            "LoKr",
            "MiSS",
            "OFT",
            "SHiRA",
            "VeRA",
            "base copy"
        ]
    );
    let changed: Vec<(&str, &str)> = changed.iter().map(|(x, y)| (&**x, &**y)).collect();
    assert_eq!(changed, CHANGED);
    assert_eq!(survived, SURVIVED);
}

/// How many of the fixtures' adapters come back.
const SURVIVED: usize = 70;

/// Fields that mean nothing for what is written, or say in another way what the fields written say:
/// factors are written with their zeros, rows in ascending order.
const CHANGED: &[(&str, &str)] = &[
    ("bd-lora", "use_bdlora"),
    ("monteclora", "monteclora_config"),
    ("target-parameter-2d", "target_modules, target_parameters"),
    ("tied-ensured", "ensure_weight_tying"),
    ("tokens", "trainable_token_indices"),
    ("tokens-tied", "trainable_token_indices"),
    ("velora", "velora_config"),
];

/// The fields of the configuration that are not those that the adapter came with.
fn changed_fields(adapter: &Adapter, config: &Value) -> String {
    let Some(source) = &adapter.source else { return String::new() };
    let config = config.as_object().unwrap();
    let mut fields: Vec<&str> = Vec::new();
    for field in source.config.keys().chain(config.keys()) {
        if source.config.get(field) != config.get(field) && !fields.contains(&&**field) {
            fields.push(field);
        }
    }
    fields.join(", ")
}

fn tensor(shape: &[usize]) -> Tensor {
    let bytes = (0..shape.iter().product()).flat_map(|at: usize| (at as f32).to_le_bytes());
    Tensor::new(String::new(), Dtype::F32, shape.to_vec(), bytes.collect()).unwrap()
}

fn at(name: &str, form: Form) -> Component {
    let (module, parameter) = name.rsplit_once('.').unwrap_or(("", name));
    let target = Target { module: module.to_owned(), parameter: parameter.to_owned() };
    Component { target, form }
}

fn factors(shapes: [&[usize]; 2], layer: Layer) -> LowRank {
    let scaling = Scaling { alpha: 4.0, rule: ScalingRule::AlphaOverRank };
    LowRank { layer, ..LowRank::linear(tensor(shapes[0]), tensor(shapes[1]), scaling) }
}

/// LoRA of rank 2 on a linear layer of 3 × 4.
fn lora(module: &str) -> Component {
    at(&format!("{module}.weight"), Form::LowRank(factors([&[2, 4], &[3, 2]], Layer::Linear)))
}

fn replaced(name: &str) -> Component {
    at(name, Form::Replaced(tensor(&[3])))
}

fn rows(name: &str) -> Component {
    at(name, Form::Rows { indices: vec![1, 4], rows: tensor(&[2, 3]) })
}

fn added(module: &str, scale: f64) -> Component {
    at(&format!("{module}.bias"), Form::Added { tensor: tensor(&[3]), scale })
}

fn with_magnitude(mut component: Component) -> Component {
    let Form::LowRank(low_rank) = &mut component.form else { panic!() };
    low_rank.magnitude = Some(tensor(&[low_rank.out_features()]));
    component
}

fn made(components: Vec<Component>) -> Adapter {
    Adapter::new("made", components, BaseIdentity::default())
}

/// What an extraction makes comes back from a PEFT directory, and the configuration says so.
#[test]
fn extracted_forms_survive() {
    let convolution = |name: &str, kernel: &[usize]| {
        let ones = vec![1; kernel.len()];
        let (a, b) = ([&[2, 4], kernel].concat(), [&[3, 2], &*ones].concat());
        at(name, Form::LowRank(factors([&a, &b], Layer::Convolution)))
    };
    let embedding =
        || at("positions.weight", Form::LowRank(factors([&[2, 7], &[3, 2]], Layer::Embedding)));
    let layers = || {
        vec![
            lora("q"),
            convolution("c1.weight", &[3]),
            convolution("c2.weight", &[3, 2]),
            convolution("c3.weight", &[1, 2, 1]),
            embedding(),
        ]
    };
    let norm = || ["norm.weight", "norm.bias"].map(replaced);
    type Case = (&'static str, Vec<Component>, Value);
    let cases: Vec<Case> = vec![
        ("layers", layers(), json!({"target_modules": ["c1", "c2", "c3", "positions", "q"]})),
        (
            "magnitudes",
            layers().into_iter().map(with_magnitude).collect(),
            json!({"use_dora": true}),
        ),
        (
            "norms",
            norm().into(),
            json!({"modules_to_save": ["norm"], "target_modules": "dummy-target-modules"}),
        ),
        (
            "bare parameters",
            vec![replaced("experts.gate_up_proj")],
            json!({"modules_to_save": ["experts"]}),
        ),
        (
            "modules in modules",
            vec![
                replaced("vit.cls_token"),
                replaced("vit.patch.weight"),
                replaced("vit.patch.bias"),
            ],
            json!({"modules_to_save": ["vit"], "bias": "none"}),
        ),
        (
            "a vocabulary",
            vec![
                replaced("model.embed_tokens.weight"),
                replaced("lm_head.weight"),
                replaced("lm_head.bias"),
            ],
            json!({"modules_to_save": null, "bias": "none"}),
        ),
        (
            "biases of targets",
            vec![lora("q"), replaced("q.bias")],
            json!({"bias": "lora_only", "modules_to_save": null}),
        ),
        ("other biases", vec![lora("q"), replaced("k.bias")], json!({"bias": "all"})),
        ("biases of attention", vec![replaced("attn.in_proj_bias")], json!({"bias": "all"})),
        (
            "rows",
            vec![lora("q"), rows("model.embed_tokens.weight")],
            json!({"trainable_token_indices": {"model.embed_tokens": [1, 4]}}),
        ),
        ("added biases", vec![lora("q"), added("q", 2.0)], json!({"lora_bias": true})),
        (
            "everything",
            [
                layers(),
                norm().into(),
                vec![replaced("q.bias"), replaced("k.bias"), rows("e.weight")],
            ]
            .concat(),
            json!({"modules_to_save": ["norm"], "bias": "all"}),
        ),
    ];
    let scratch = tempfile::tempdir().unwrap();
    for (case, components, fields) in cases {
        let adapter = made(components);
        let folder = scratch.path().join(case);
        write_peft(&adapter, &folder).unwrap();
        let again = read(&folder).unwrap();
        assert_eq!(contents(&again), contents(&adapter), "{case}");
        assert_eq!(again.notes, [], "{case}");
        let config = config(&folder);
        for (field, value) in fields.as_object().unwrap() {
            assert_eq!(config[field], *value, "{case}");
        }
        // Through our own format, and with the configuration that was written first.
        let file = scratch.path().join(format!("{case}.safetensors"));
        native::write(&again, &file, Overwrite::Never, Durability::Cached).unwrap();
        let again = read(&file).unwrap();
        assert_eq!(contents(&again), contents(&adapter), "{case}");
        let second = scratch.path().join(format!("{case} again"));
        write_peft(&again, &second).unwrap();
        assert_eq!(super::json(&second.join(CONFIG_FILE)), config, "{case}");
    }
}

/// What PEFT has no place for, or would read as something else, is refused before anything is
/// written.
#[test]
fn what_peft_would_misread_is_refused() {
    let merged = |mut component: Component| {
        let Form::LowRank(low_rank) = &mut component.form else { panic!() };
        low_rank.layer = Layer::Merged;
        component
    };
    let embedding = at("e.weight", Form::LowRank(factors([&[2, 7], &[3, 2]], Layer::Embedding)));
    let cases: Vec<(Vec<Component>, &str)> = vec![
        (vec![], "an adapter without components"),
        (vec![merged(lora("q"))], "a change of `q.weight` by LoRA"),
        (vec![replaced("cls_token")], "a change of `cls_token` by replaced"),
        (vec![added("q", 2.0)], "a change of `q.bias` by added of whose weight there is no factor"),
        (
            vec![at("q.weight", Form::Added { tensor: tensor(&[3, 4]), scale: 1.0 })],
            "a change of `q.weight` by added",
        ),
        (vec![at("q.weight", Form::Base(tensor(&[3])))], "a change of `q.weight` by base copy"),
        (vec![rows("a.table")], "a change of `a.table` by token rows"),
        (vec![at("a.in_proj_weight", lora("a").form)], "a change of `a.in_proj_weight` by LoRA"),
        (vec![lora("q"), lora("q")], "a change of `q.weight` by LoRA"),
        (
            vec![lora("q"), with_magnitude(lora("k"))],
            "a change of `q.weight` by LoRA beside others by DoRA",
        ),
        (
            vec![lora("q"), replaced("q.weight")],
            "a change of `q.weight` by LoRA beside a replacement of the same module",
        ),
        (
            vec![lora("vit.q"), replaced("vit.cls_token")],
            "a change of `vit.q.weight` by LoRA inside a module that is replaced",
        ),
        (
            vec![lora("q"), lora("k"), added("q", 2.0)],
            "a change of `k.weight` by LoRA without a change of its bias that has the same scale, \
             beside others with one",
        ),
        (
            vec![lora("q"), added("q", 1.0)],
            "a change of `q.weight` by LoRA without a change of its bias that has the same scale, \
             beside others with one",
        ),
        (
            vec![embedding.clone(), added("e", 2.0)],
            "a change of `e.weight` by LoRA without a change of its bias that has the same scale, \
             beside others with one",
        ),
        (
            vec![embedding, rows("e.weight")],
            "a change of `e.weight` by LoRA beside rows of the same weight",
        ),
        (
            vec![rows("norm.weight"), replaced("norm.weight")],
            "a change of `norm.weight` by token rows beside a replacement of the same module",
        ),
        // PEFT compares the ends of names, and matches patterns.
        (
            vec![replaced("norm.weight"), lora("q_norm")],
            "`norm` in modules_to_save, by which PEFT would also understand `q_norm`",
        ),
        (
            vec![replaced("norm.weight"), lora("a_norm.q")],
            "`norm` in modules_to_save, by which PEFT would also understand `a_norm.q`",
        ),
        (
            vec![replaced("a.norm.weight"), lora("x.a_norm.q")],
            "`a.norm` in modules_to_save, by which PEFT would also understand `x.a_norm.q`",
        ),
        (
            vec![replaced("norm.weight"), replaced("q_norm.bias")],
            "`norm` in modules_to_save, by which PEFT would also understand `q_norm`",
        ),
        (
            vec![replaced("layer.weight"), lora("q")],
            "`layer` in modules_to_save, by which PEFT would also understand `.base_layer`",
        ),
        (vec![replaced("a+b.weight")], "`a+b` in modules_to_save, which PEFT takes for a pattern"),
        (
            vec![rows("emb.weight"), lora("x.emb")],
            "`emb` in trainable_token_indices, by which PEFT would also understand `x.emb`",
        ),
    ];
    let scratch = tempfile::tempdir().unwrap();
    for (components, expected) in cases {
        let folder = scratch.path().join("adapter");
        let message = write_peft(&made(components), &folder).unwrap_err().to_string();
        assert_eq!(message, format!("made: PEFT cannot hold {expected}"));
        assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 0, "{expected}");
    }
}

/// PEFT replaces modules, so the rest of a module that is replaced is needed, and of every other
/// one that has the end of its name.
#[test]
fn the_rest_of_a_replaced_module_is_named() {
    let stored = [
        "layers.0.input_norm.weight",
        "layers.0.q.weight",
        "lm_head.weight",
        "norm.bias",
        "norm.inner.scale",
        "norm.weight",
        "vision.layers.0.input_norm.weight",
    ];
    let needed = |components| also_needed(&made(components), &stored).unwrap();
    assert!(needed(vec![lora("layers.0.q"), replaced("lm_head.weight")]).is_empty());
    assert!(needed(vec![replaced("norm.bias")]).is_empty());
    let rest = ["norm.bias", "norm.inner.scale", "vision.layers.0.input_norm.weight"];
    assert_eq!(needed(vec![replaced("norm.weight"), replaced("layers.0.input_norm.weight")]), rest);
    assert_eq!(
        needed(vec![replaced("layers.0.input_norm.weight")]),
        ["vision.layers.0.input_norm.weight"]
    );
    let whole: Vec<Component> =
        stored.iter().filter(|name| name.contains("norm")).map(|name| replaced(name)).collect();
    assert!(needed(whole.clone()).is_empty());
    let scratch = tempfile::tempdir().unwrap();
    write_peft(&made(whole), &scratch.path().join("adapter")).unwrap();
}

/// A configuration that came along is kept where it says the same, and corrected where not.
#[test]
fn fields_beyond_plain_lora_are_kept_if_they_hold() {
    let scratch = tempfile::tempdir().unwrap();
    let mut count = 0;
    let mut fields_of = |components: Vec<Component>, fields: Value| -> Value {
        let mut adapter = made(components);
        let mut config =
            json!({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]});
        config.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let Value::Object(config) = config else { panic!() };
        adapter.source = Some(SourceConfig { format: AdapterFormat::Peft, config });
        count += 1;
        let folder = scratch.path().join(count.to_string());
        write_peft(&adapter, &folder).unwrap();
        assert_eq!(contents(&read(&folder).unwrap()), contents(&adapter));
        self::config(&folder)
    };
    let kept: Vec<(Vec<Component>, &str, Value)> = vec![
        (vec![lora("q"), replaced("a.norm.weight")], "modules_to_save", json!(["norm"])),
        (vec![lora("q"), replaced("head.dense.weight")], "modules_to_save", json!(["head"])),
        (
            vec![lora("q"), replaced("classifier.weight")],
            "modules_to_save",
            json!(["classifier", "score"]),
        ),
        (vec![lora("q"), replaced("lm_head.weight")], "modules_to_save", json!(["lm_head"])),
        (vec![lora("q"), replaced("q.bias")], "bias", json!("all")),
        (vec![lora("q"), rows("m.e.weight")], "trainable_token_indices", json!([1, 4])),
        (vec![lora("q"), rows("m.e.weight")], "trainable_token_indices", json!({"e": [1, 4]})),
        (vec![lora("q"), added("q", 2.0)], "lora_bias", json!(true)),
        (vec![with_magnitude(lora("q"))], "use_dora", json!(true)),
    ];
    for (components, field, value) in kept {
        assert_eq!(fields_of(components, json!({field: value}))[field], value);
    }
    let corrected: Vec<(Vec<Component>, &str, Value, Value)> = vec![
        (
            vec![lora("q"), replaced("norm.weight")],
            "modules_to_save",
            json!(["other"]),
            json!(["norm"]),
        ),
        (
            vec![lora("q"), replaced("norm.weight")],
            "modules_to_save",
            json!(["norm", "q"]),
            json!(["norm"]),
        ),
        (vec![lora("q")], "modules_to_save", json!(["norm"]), Value::Null),
        (vec![lora("q"), replaced("q.bias")], "bias", json!("none"), json!("lora_only")),
        (vec![lora("q"), replaced("k.bias")], "bias", json!("lora_only"), json!("all")),
        (vec![lora("q")], "bias", json!("all"), json!("none")),
        (
            vec![lora("q"), rows("e.weight")],
            "trainable_token_indices",
            json!([4, 1]),
            json!({"e": [1, 4]}),
        ),
        (vec![lora("q")], "trainable_token_indices", json!([4, 1]), Value::Null),
        (vec![lora("q"), added("q", 2.0)], "lora_bias", json!(false), json!(true)),
        (vec![lora("q")], "use_dora", json!(true), json!(false)),
    ];
    for (components, field, before, after) in corrected {
        assert_eq!(fields_of(components, json!({field: before}))[field], after, "{field}");
    }
    // Another method's configuration says nothing of LoRA.
    let norms = fields_of(vec![replaced("norm.weight")], json!({"peft_type": "LN_TUNING"}));
    assert_eq!(norms["target_modules"], "dummy-target-modules");
    // Factors of a bare parameter that are those of a layer.
    let bare = fields_of(
        vec![lora("q")],
        json!({"target_parameters": ["q.weight"], "target_modules": null}),
    );
    assert_eq!((&bare["target_modules"], bare.get("target_parameters")), (&json!(["q"]), None));
}
