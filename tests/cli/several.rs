//! Several adapters with weights: `A@0.7 B@0.3`.

use lora_format::Dtype;
use serde_json::{Value, json};

use crate::support::{
    Factors, Prng, Tensor, encode, read_model, read_tensors, write_adapter, write_json,
    write_tensors,
};
use crate::{Scratch, feature, feature_path, features, text};

const WEIGHT: &str = "model.layers.0.q.weight";

/// The adapters `a` and `b` for the scratch base, of rank 1, whose deltas are exact in f64 for
/// weights that are powers of two. Returns the deltas.
fn exact_pair(scratch: &Scratch) -> [Vec<f64>; 2] {
    let mut prng = Prng::new(3);
    let mut adapter = |name: &str| {
        let mut values = |count: usize| -> Vec<f64> {
            (0..count).map(|_| prng.between(1, 63) as f64 / 128.0 - 0.25).collect()
        };
        let (b, a) = (values(16), values(24));
        let factors = Factors {
            module: "model.layers.0.q".to_owned(),
            a: Tensor::new("", Dtype::F32, &[1, 24], &a),
            b: Tensor::new("", Dtype::F32, &[16, 1], &b),
        };
        write_adapter(&scratch.path(name), &[factors], &json!({}));
        b.iter().flat_map(|b| a.iter().map(move |a| a * b)).collect()
    };
    [adapter("a"), adapter("b")]
}

fn bits(scratch: &Scratch, path: &str) -> Vec<u32> {
    read_tensors(&scratch.path(path))[WEIGHT].bits()
}

/// The sum of all changes is rounded, not each.
#[test]
fn changes_are_summed_before_one_rounding() {
    let scratch = Scratch::new();
    let [a, b] = exact_pair(&scratch);
    scratch.cli(&["merge", "base.safetensors", "a@0.5", "b@-0.25", "-o", "both"]).done();
    let base = read_tensors(&scratch.path("base.safetensors"))[WEIGHT].values();
    let wanted: Vec<u32> = (0..base.len())
        .map(|at| encode(base[at] + 0.5 * a[at] - 0.25 * b[at], Dtype::Bf16))
        .collect();
    assert_eq!(bits(&scratch, "both"), wanted);
    // One after the other is rounded twice, and shows it.
    scratch.cli(&["merge", "base.safetensors", "a@0.5", "-o", "first"]).done();
    scratch.cli(&["merge", "first", "b@-0.25", "-o", "second"]).done();
    assert_ne!(bits(&scratch, "second"), wanted);
    // --scale multiplies every weight.
    let scaled = ["merge", "base.safetensors", "a", "b@-0.5", "--scale", "0.5", "-o", "scaled"];
    scratch.cli(&scaled).done();
    assert_eq!(bits(&scratch, "scaled"), wanted);
    // A weight of 0 is no change.
    scratch.cli(&["merge", "base.safetensors", "a@0.5", "b@0", "-o", "zero"]).done();
    assert_eq!(bits(&scratch, "zero"), bits(&scratch, "first"));
}

/// PEFT's adapters, against the closed form.
#[test]
fn the_sum_is_that_of_the_closed_form() {
    for (case, base, weights) in [
        ("two-lora", "bases/llama", &["adapter-a@0.7", "adapter-b@0.3"][..]),
        ("two-lora-negative", "bases/llama", &["adapter-a", "adapter-b@-0.5"]),
        ("three-lora", "bases/llama", &["adapter-a@0.5", "adapter-b@0.25", "adapter-c@0.25"]),
        ("lora-dora", "bases/llama", &[]),
        ("lora-ia3", "bases/llama-bias", &[]),
    ] {
        let scratch = Scratch::new();
        let description = crate::support::read_json(&feature_path(case).join("case.json"));
        let given = description["adapters"].as_array().unwrap().iter();
        let from_case: Vec<String> = given
            .map(|one| format!("{}@{}", one["path"].as_str().unwrap(), one["weight"]))
            .collect();
        let adapters: Vec<String> = match weights {
            [] => from_case,
            weights => weights.iter().map(|&one| one.to_owned()).collect(),
        };
        let adapters: Vec<String> =
            adapters.iter().map(|one| feature(&format!("{case}/{one}"))).collect();
        let base = feature(base);
        let mut arguments = vec!["merge", &base, "-o", "out"];
        arguments.extend(adapters.iter().map(String::as_str));
        scratch.cli(&arguments).done();
        let merged = read_model(&scratch.path("out"));
        let expected = read_tensors(&feature_path(case).join("expected_f64.safetensors"));
        assert!(!expected.is_empty());
        for (name, expected) in expected {
            for (ours, theirs) in merged[&name].values().into_iter().zip(expected.values()) {
                assert!((ours - theirs).abs() <= 5e-7, "{case}: {name}: {ours} for {theirs}");
            }
        }
    }
}

#[test]
fn the_plan_and_the_report_show_the_weights() {
    let scratch = Scratch::new();
    exact_pair(&scratch);
    let merge = ["merge", "base.safetensors", "a@0.5", "b@-0.25", "lora", "-o", "out"];
    let ran = scratch.cli(&[&merge[..], &["--dry-run"]].concat());
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let first = "base.safetensors + a × 0.5 (peft) + b × -0.25 (peft) + lora (peft) → out\n";
    assert!(ran.stdout.starts_with(first), "{}", ran.stdout);
    let row = "[16, 24] BF16  LoRA out×in rank 1 scale 0.5, LoRA out×in rank 1 scale -0.25, LoRA \
               out×in rank 4 scale 1\n";
    assert!(ran.stdout.contains(row), "{}", ran.stdout);
    let ran = scratch.cli(&[&merge[..], &["--json"]].concat());
    let report: Value = serde_json::from_str(&ran.stdout).unwrap();
    let of = |list: &Value, field: &str| -> Vec<Value> {
        list.as_array().unwrap().iter().map(|one| one[field].clone()).collect()
    };
    assert_eq!(of(&report["adapters"], "path"), ["a", "b", "lora"]);
    assert_eq!(of(&report["adapters"], "weight"), [0.5, -0.25, 1.0]);
    let changes = &report["targets"][0]["changes"];
    assert_eq!(of(changes, "adapter"), [0, 1, 2]);
    assert_eq!(of(changes, "weight"), [0.5, -0.25, 1.0]);
    assert_eq!(of(changes, "scale"), [0.5, -0.25, 1.0]);
}

/// What stands after the last @ is a weight, unless the whole is a file.
#[test]
fn an_at_sign_in_a_name() {
    let scratch = Scratch::new();
    exact_pair(&scratch);
    for (from, to) in [("a", "style@v2"), ("b", "style")] {
        std::fs::rename(scratch.path(from), scratch.path(to)).unwrap();
    }
    let merged = |adapter: &str, output: &str| {
        scratch.cli(&["merge", "base.safetensors", adapter, "-o", output]).done();
        bits(&scratch, output)
    };
    let (plain, half) = (merged("style@v2", "plain"), merged("style@v2@0.5", "half"));
    assert_eq!(merged("style@v2@1", "one"), plain);
    assert_ne!(half, plain);
    assert_ne!(merged("style@2", "other"), plain);
    // A directory called like an adapter with its weight is that directory.
    std::fs::rename(scratch.path("style@v2"), scratch.path("style@2")).unwrap();
    assert_eq!(merged("style@2", "exists"), plain);
}

#[test]
fn weights_that_are_none() {
    let scratch = Scratch::new();
    let before = scratch.names();
    for (argument, weight) in [
        ("lora@x", "x"),
        ("lora@", ""),
        ("lora@inf", "inf"),
        ("lora@NaN", "NaN"),
        ("lora@0,5", "0,5"),
        ("@2", "2"),
    ] {
        let text = scratch.cli(&["merge", "base.safetensors", argument]).refused(scratch.root());
        assert_eq!(
            text,
            format!(
                "error: invalid value '{argument}' for '<ADAPTER[@WEIGHT]>...': expected a number \
                 after the @, found `{weight}`\n\nFor more information, try '--help'.\n"
            )
        );
    }
    // No weight, but a name that is nowhere.
    assert_eq!(
        scratch.cli(&["merge", "base.safetensors", "nowhere@0.5"]).refused(scratch.root()),
        "error: nowhere: no such file or directory\n"
    );
    assert_eq!(scratch.names(), before);
}

const ORDER: &str = "hint: merge one of them alone, and the other into the result, if that order \
                     is what you want\n";
const REPLACED: &str = "hint: a weight and --scale act on changes; what an adapter holds in full \
                        is taken as it is\n";

/// What has no meaning together is refused with the names of both, and nothing is written.
#[test]
fn conflicts_are_named() {
    let scratch = Scratch::new();
    let features = features();
    let conflict = |base: &str, adapters: &[&str]| {
        let base = feature(base);
        let adapters: Vec<String> = adapters.iter().map(|one| feature(one)).collect();
        let mut arguments = vec!["merge", &base, "-o", "x"];
        arguments.extend(adapters.iter().map(String::as_str));
        let before = scratch.names();
        let text = scratch.cli(&arguments).refused(&features);
        assert_eq!(scratch.names(), before, "something was written");
        text
    };
    let both = "DoRA of dora-linear/adapter and DoRA of dora-rslora/adapter both depend on the \
                weight that they change: their order would matter";
    assert_eq!(
        conflict("bases/llama", &["dora-linear/adapter", "dora-rslora/adapter"]),
        format!(
            "error: dora-linear/adapter and dora-rslora/adapter do not fit bases/llama: 2 \
             problems\n  - `model.layers.0.mlp.down_proj.weight`: {both}\n  \
             - `model.layers.0.self_attn.q_proj.weight`: {both}\n{ORDER}"
        )
    );
    let saved = feature_path("modules-to-save/adapter");
    crate::support::copy_directory(&saved, &scratch.path("copy"));
    let arguments = ["merge", &feature("bases/llama"), text(&saved), "copy", "-o", "x"];
    assert_eq!(
        scratch.cli(&arguments).refused(&features),
        format!(
            "error: modules-to-save/adapter and copy do not fit bases/llama: `lm_head.weight`: \
             saved in full by modules-to-save/adapter and copy; only one can be kept\n{ORDER}"
        )
    );
    assert_eq!(
        conflict("bases/llama", &["modules-to-save-embedding/adapter", "tokens/adapter"]),
        format!(
            "error: modules-to-save-embedding/adapter and tokens/adapter do not fit bases/llama: \
             `model.embed_tokens.weight`: saved in full by modules-to-save-embedding/adapter and \
             changed by tokens/adapter: a change of what was replaced is not defined\n{ORDER}"
        )
    );
    assert_eq!(
        conflict("bases/llama", &["tokens/adapter", "embedding-saved-base/adapter"]),
        format!(
            "error: tokens/adapter and embedding-saved-base/adapter do not fit bases/llama: \
             `model.embed_tokens.weight`: tokens/adapter gives some of its rows and \
             embedding-saved-base/adapter changes all of them\n{ORDER}"
        )
    );
    // Two adapters may each give rows of their own, but no row twice.
    assert_eq!(
        conflict("bases/llama", &["tokens/adapter", "tokens/adapter"]),
        format!(
            "error: tokens/adapter and tokens/adapter do not fit bases/llama: \
             `model.embed_tokens.weight`: tokens/adapter both give its row 2\n{ORDER}"
        )
    );
    let tokens: Vec<String> = ["tokens/adapter", "tokens-only/adapter"].map(feature).into();
    let merge = ["merge", &feature("bases/llama"), &tokens[0], &tokens[1], "-o", "rows"];
    scratch.cli(&merge).done();
    // What replaces cannot be weighted.
    for (adapter, parameter) in
        [("modules-to-save", "lm_head.weight"), ("tokens", "model.embed_tokens.weight")]
    {
        assert_eq!(
            conflict("bases/llama", &[&format!("{adapter}/adapter@0.5")]),
            format!(
                "error: {adapter}/adapter does not fit bases/llama: `{parameter}`: \
                 {adapter}/adapter replaces it, which a weight of 0.5 cannot scale\n{REPLACED}"
            )
        );
    }
}

#[test]
fn tokenizers_must_agree() {
    let scratch = Scratch::with_directory();
    exact_pair(&scratch);
    for (name, text) in [("a", "one"), ("b", "two")] {
        std::fs::write(scratch.path(name).join("tokenizer.json"), text).unwrap();
    }
    assert_eq!(
        scratch.cli(&["merge", "base", "a", "b", "-o", "x"]).refused(scratch.root()),
        "error: a and b bring different tokenizers\nhint: take the base's: --tokenizer base\n"
    );
    scratch.cli(&["merge", "base", "a", "b", "-o", "base-s", "--tokenizer", "base"]).done();
    assert!(!scratch.path("base-s/tokenizer.json").exists());
    std::fs::write(scratch.path("b/tokenizer.json"), "one").unwrap();
    scratch.cli(&["merge", "base", "a", "b", "lora", "-o", "same"]).done();
    assert_eq!(std::fs::read_to_string(scratch.path("same/tokenizer.json")).unwrap(), "one");
}

/// A file of our own format beside a PEFT directory.
#[test]
fn formats_can_be_mixed() {
    let scratch = Scratch::new();
    let [a, b] = exact_pair(&scratch);
    scratch.cli(&["convert", "a", "--to", "lora", "-o", "own.safetensors"]).done();
    scratch.cli(&["merge", "base.safetensors", "own.safetensors@0.5", "b@0.5", "-o", "m"]).done();
    let base = read_tensors(&scratch.path("base.safetensors"))[WEIGHT].values();
    let wanted: Vec<u32> = (0..base.len())
        .map(|at| encode(base[at] + 0.5 * a[at] + 0.5 * b[at], Dtype::Bf16))
        .collect();
    assert_eq!(bits(&scratch, "m"), wanted);
}

/// Every adapter must be of this base, and what is not is named.
#[test]
fn every_adapter_is_held_against_the_base() {
    let scratch = Scratch::with_directory();
    exact_pair(&scratch);
    let stamp = ["stamp", "b", "--base", "base", "-o", "stamped.safetensors"];
    scratch.cli(&stamp).done();
    let mut prng = Prng::new(9);
    let other = [
        Tensor::random(&mut prng, WEIGHT, Dtype::Bf16, &[16, 24], 1.0),
        Tensor::random(&mut prng, "model.norm.weight", Dtype::Bf16, &[24], 1.0),
    ];
    write_tensors(&scratch.path("other.safetensors"), &other, &[]);
    let merge = ["merge", "other.safetensors", "a", "stamped.safetensors", "-o", "x"];
    let text = scratch.cli(&merge).refused(scratch.root());
    let start = "error: other.safetensors: not the base that stamped.safetensors was trained on: ";
    assert!(text.starts_with(start), "{text}");
    // One warning for each recorded name that is not the base's.
    let name = |adapter: &str, name: &str| {
        let path = scratch.path(adapter).join("adapter_config.json");
        let mut config = crate::support::read_json(&path);
        config["base_model_name_or_path"] = json!(name);
        write_json(&path, &config);
    };
    name("a", "org/one");
    name("b", "org/two");
    let ran = scratch.cli(&["merge", "base", "a", "b", "-o", "y"]).done();
    for name in ["org/one", "org/two"] {
        let warning = format!("warning: the adapter was trained on `{name}`; whether this base");
        assert!(ran.stderr.contains(&warning), "{}", ran.stderr);
    }
}
