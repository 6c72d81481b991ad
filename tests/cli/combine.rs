//! `combine`: several adapters as one, and what is said of it.

use std::path::Path;

use lora_format::Dtype;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::support::{
    Factors, Prng, Tensor, products, read_json, read_metadata, read_tensors, write_adapter,
    write_json, write_tensors,
};
use crate::{Scratch, cli, feature, peft};

/// `lora-cli/combine/1`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(dead_code, reason = "the members are there to be required")]
struct Report {
    schema: String,
    status: String,
    method: String,
    density: Option<f64>,
    seed: Option<u64>,
    adapters: Vec<Value>,
    output: Option<String>,
    output_format: String,
    targets: Vec<Target>,
    total: Total,
    others: Vec<Other>,
    left_out: Vec<String>,
    unmatched: Vec<String>,
    not_carried: Vec<String>,
    warnings: Vec<String>,
    notes: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(dead_code, reason = "the members are there to be required")]
struct Target {
    target: String,
    rows: u64,
    cols: u64,
    parts: Vec<Part>,
    rank: usize,
    dtype: String,
    energy: f64,
    residual: f64,
    relative: f64,
    optimal: Option<f64>,
    exact: Option<bool>,
    bytes: u64,
    reduced: Option<Reduced>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(dead_code, reason = "the members are there to be required")]
struct Part {
    adapter: usize,
    rank: usize,
    weight: f64,
    scale: f64,
    rounded: Option<u64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(dead_code, reason = "the members are there to be required")]
struct Reduced {
    rank: usize,
    kept: bool,
    energy: f64,
    residual: f64,
    optimal: f64,
    relative: f64,
    bytes: u64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(dead_code, reason = "the members are there to be required")]
struct Total {
    energy: f64,
    residual: f64,
    relative: f64,
    bytes: u64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(dead_code, reason = "the members are there to be required")]
struct Other {
    target: String,
    method: String,
    adapters: Vec<usize>,
    rounded: u64,
}

fn report(directory: &Path, arguments: &[&str]) -> Report {
    let ran = cli(directory, &[&["combine"], arguments, &["--json"]].concat());
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    serde_json::from_str(&ran.stdout).unwrap_or_else(|error| panic!("{error}: {}", ran.stdout))
}

/// `lora` of the scratch directory, of rank 4, and `other`, of rank 2 with a target of its own.
fn two() -> Scratch {
    let scratch = Scratch::new();
    let mut prng = Prng::new(5);
    let other = [
        Factors::random(&mut prng, "model.layers.0.q", (16, 24, 2), Dtype::F32, 0.3),
        Factors::random(&mut prng, "model.layers.0.v", (8, 24, 2), Dtype::F32, 0.3),
    ];
    write_adapter(&scratch.path("other"), &other, &json!({"lora_alpha": 4}));
    scratch
}

/// Integers in bf16: sums of their products are exact in every order, so that only a wrong change
/// changes a byte.
fn integers(scratch: &Scratch, name: &str, seed: u64, rank: usize, alpha: usize) {
    let mut prng = Prng::new(seed);
    let mut tensor = |shape: &[usize]| {
        let count = shape.iter().product();
        let values: Vec<f64> = (0..count).map(|_| prng.below(5) as f64 - 2.0).collect();
        Tensor::new("", Dtype::Bf16, shape, &values)
    };
    let factors = Factors {
        module: "model.layers.0.q".to_owned(),
        a: tensor(&[rank, 24]),
        b: tensor(&[16, rank]),
    };
    write_adapter(&scratch.path(name), &[factors], &json!({"lora_alpha": alpha}));
}

#[test]
fn the_merge_of_the_combined_is_the_merge_of_all() {
    let scratch = Scratch::new();
    integers(&scratch, "a", 1, 4, 4);
    integers(&scratch, "b", 2, 2, 8);
    for (index, (a, b)) in
        [("a@0.5", "b@2"), ("a@-1", "b@0.25"), ("a", "b@-0.125")].into_iter().enumerate()
    {
        for to in ["peft", "lora"] {
            let name = |kind: &str| format!("{kind}-{index}-{to}");
            let out = name("ab");
            scratch.cli(&["combine", a, b, "--to", to, "-o", &out, "-q"]).done();
            let merge = |adapters: &[&str], output: &str| {
                let arguments = [
                    &["merge", "base.safetensors"],
                    adapters,
                    &["--dtype", "f32", "-q", "-o", output],
                ];
                scratch.cli(&arguments.concat()).done();
                std::fs::read(scratch.path(output)).unwrap()
            };
            let (one, both) = (name("one.safetensors"), name("both.safetensors"));
            assert_eq!(merge(&[&out], &one), merge(&[a, b], &both), "{a} {b} {to}");
        }
    }
    let report = report(scratch.root(), &["a@0.5", "b@2", "--dry-run"]);
    let [target] = &report.targets[..] else { panic!("{report:?}") };
    assert_eq!((target.rank, target.dtype.as_str(), target.residual), (6, "BF16", 0.0));
    assert!(target.parts.iter().all(|part| part.rounded == Some(0)));
    assert_eq!(report.status, "planned");
    assert!(!scratch.path("dry").exists());
}

#[test]
fn decimal_weights_are_rounded_once_and_said() {
    let scratch = two();
    let ran = scratch.cli(&["combine", "lora@0.7", "other@0.3", "-o", "both"]).done();
    assert!(ran.stderr.contains("0.7 × lora: 1 targets, folded exactly\n"), "{}", ran.stderr);
    let line = "0.3 × other: 2 targets, 1 folded exactly and 1 rounded\n";
    assert!(ran.stderr.contains(line), "{}", ran.stderr);
    assert!(ran.stderr.contains("from rounding"), "{}", ran.stderr);

    // Against the products of the factors, in f64.
    let factors = |name: &str, module: &str| {
        let tensors = read_tensors(&scratch.path(name).join("adapter_model.safetensors"));
        let of = |suffix: &str| {
            tensors[&format!("base_model.model.model.layers.0.{module}.{suffix}.weight")].clone()
        };
        (of("lora_A"), of("lora_B"))
    };
    let product = |name: &str, module: &str, scale: f64| -> Vec<f64> {
        let (a, b) = factors(name, module);
        products(&a, &b, false).0.into_iter().map(|value| value * scale).collect()
    };
    let config = read_json(&scratch.path("both/adapter_config.json"));
    let scale = |module: &str, rank: f64| {
        let alphas = config["alpha_pattern"].as_object().unwrap();
        let own = alphas.iter().find(|(key, _)| key.contains(module)).map(|(_, value)| value);
        own.unwrap_or(&config["lora_alpha"]).as_f64().unwrap() / rank
    };
    let sum: Vec<f64> = product("lora", "q", 0.7)
        .into_iter()
        .zip(product("other", "q", 0.3 * 2.0))
        .map(|(x, y)| x + y)
        .collect();
    let found = product("both", "q", scale("\\.q", 6.0));
    let norm = |values: &[f64]| values.iter().map(|x| x * x).sum::<f64>().sqrt();
    let error: Vec<f64> = found.iter().zip(&sum).map(|(x, y)| x - y).collect();
    let relative = norm(&error) / norm(&sum);
    assert!(relative > 0.0 && relative < 1e-7, "{relative}");
    let report = report(scratch.root(), &["lora@0.7", "other@0.3", "--dry-run"]);
    assert!((report.targets[0].relative / relative - 1.0).abs() < 1e-3, "{report:?}");
    assert_eq!(report.targets[1].residual, 0.0);

    assert_eq!(config["task_type"], Value::Null);
    let mut modules: Vec<&str> =
        config["target_modules"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    modules.sort_unstable();
    assert_eq!(modules, ["model.layers.0.q", "model.layers.0.v"]);
    let metadata = read_metadata(&scratch.path("both/adapter_model.safetensors"));
    let inputs = json!([{"name": "lora", "weight": 0.7}, {"name": "other", "weight": 0.3}]);
    assert_eq!(serde_json::from_str::<Value>(&metadata["combined_from"]).unwrap(), inputs);
}

#[test]
fn a_reduced_sum_has_its_certificate() {
    let scratch = two();
    let arguments = ["lora", "other@-0.5", "--method", "svd", "--rank", "3", "-o", "small"];
    let report = report(scratch.root(), &arguments);
    let reduced = report.targets[0].reduced.as_ref().unwrap();
    assert_eq!((report.targets[0].rank, reduced.rank), (6, 3));
    assert!(reduced.relative > 0.0 && reduced.residual >= reduced.optimal);
    assert!(reduced.residual < reduced.optimal * 1.001, "{reduced:?}");
    // The second target has no more than 2 ranks.
    assert_eq!(report.targets[1].reduced.as_ref().unwrap().rank, 2);
    scratch.cli(&["merge", "base.safetensors", "lora", "-q", "-o", "m"]).done();
    // linear is the same with a policy, and exact without.
    scratch
        .cli(&[
            "combine",
            "lora",
            "other@-0.5",
            "--method",
            "linear",
            "--rank",
            "3",
            "-o",
            "l",
            "-q",
        ])
        .done();
    let file = "adapter_model.safetensors";
    assert_eq!(
        read_tensors(&scratch.path("l").join(file)),
        read_tensors(&scratch.path("small").join(file))
    );
    scratch.cli(&["combine", "lora", "other", "--method", "linear", "-o", "exact", "-q"]).done();
    scratch.cli(&["combine", "lora", "other", "-o", "cat", "-q"]).done();
    assert_eq!(
        read_tensors(&scratch.path("exact").join(file)),
        read_tensors(&scratch.path("cat").join(file))
    );
}

#[test]
fn elementwise_methods_do_not_depend_on_threads() {
    let scratch = two();
    for method in ["ties", "dare_linear", "dare_ties", "magnitude_prune"] {
        let make = |output: &str, more: &[&str]| {
            let arguments = ["combine", "lora", "other", "--method", method, "--density", "0.4"];
            scratch.cli(&[&arguments[..], &["-q", "-o", output], more].concat()).done();
            read_tensors(&scratch.path(output).join("adapter_model.safetensors"))
        };
        let one = make(&format!("{method}-1"), &["--threads", "1"]);
        assert_eq!(one, make(&format!("{method}-4"), &["--threads", "4"]), "{method}");
        let seeded = make(&format!("{method}-seed"), &["--seed", "9"]);
        assert_eq!(one == seeded, !method.starts_with("dare"), "{method}");
        let name = "base_model.model.model.layers.0.q.lora_A.weight";
        assert_eq!(one[name].shape, [4, 24], "the largest of the ranks");
    }
    let arguments = ["lora", "other", "--method", "ties", "--density", "0.4", "--energy", "0.9"];
    let report = report(scratch.root(), &[&arguments[..], &["--dry-run"]].concat());
    for target in &report.targets {
        let kept = 1.0 - target.relative * target.relative;
        assert!(kept > 0.899, "{target:?}");
        assert_eq!(target.exact, Some(true));
        assert!(target.residual >= target.optimal.unwrap() * 0.999);
    }
}

#[test]
fn adapters_of_a_trainer_combine_and_merge() {
    let scratch = tempfile::tempdir().unwrap();
    let root = scratch.path();
    // Linear layers of several ranks, an embedding, a convolution.
    let (first, second) = (peft("llama-rslora/adapter"), peft("llama-patterns/adapter"));
    let weighted = [format!("{first}@0.5"), format!("{second}@0.25")];
    let own = report(root, &[&weighted[0], &weighted[1], "-o", "llama"]);
    assert!(own.targets.len() > 5);
    assert!(own.targets.iter().all(|target| target.relative < 1e-7));
    cli(root, &["merge", &peft("llama-patterns/base"), "llama", "-q", "-o", "merged"]).done();
    for case in ["embedding", "conv2d"] {
        let adapter = feature(&format!("{case}/adapter"));
        let doubled = [format!("{adapter}@3"), format!("{adapter}@-2")];
        let made = report(root, &[&doubled[0], &doubled[1], "-o", case]);
        assert!(!made.targets.is_empty(), "{case}");
        let text = cli(root, &["inspect", case]);
        assert_eq!(text.code, Some(0), "{}", text.stderr);
    }
}

#[test]
fn weights_by_module_multiply() {
    let scratch = two();
    let arguments = ["lora@0.5", "other@2", "--weights-by", "v=0", "--weights-by", "x=1"];
    let report = report(scratch.root(), &[&arguments[..], &["--dry-run"]].concat());
    assert_eq!(report.left_out, ["model.layers.0.v.weight"]);
    assert_eq!(report.unmatched, ["x"]);
    assert_eq!(report.targets.len(), 1);
}

#[test]
fn what_does_not_combine_is_refused() {
    let scratch = two();
    let before = scratch.names();
    let refused = |arguments: &[&str]| {
        let all = [&["combine"], arguments, &["-o", "x"]].concat();
        let text = scratch.cli(&all).refused(scratch.root());
        assert_eq!(scratch.names(), before);
        text
    };
    let dora = feature("dora-linear/adapter");
    let text = refused(&[&dora, &dora]);
    assert!(text.contains("DoRA: its change depends on the weight"), "{text}");
    assert!(text.contains("hint: merge all of them into the base, and extract"), "{text}");
    for (arguments, words) in [
        (&["lora", "other", "--rank", "4"][..], "hint: for smaller ranks: --method svd"),
        (&["lora", "other", "--method", "svd"], "nothing says which ranks are wanted"),
        (&["lora", "other", "--method", "ties"], "which share of the elements stays"),
        (&["lora", "other", "--density", "0.5"], "--method cat drops nothing"),
        (&["lora", "other", "--method", "ties", "--density", "1.5"], "not above 0 and at most 1"),
        (&["lora", "other", "--weights-by", "q"], "it is not PATTERN=WEIGHT"),
        (&["lora@0", "other@0"], "every weight is 0"),
        (
            &["lora", "other", "--method", "ties", "--density", "0.5", "--budget", "1MB"],
            "a budget needs all of them",
        ),
    ] {
        let text = refused(arguments);
        assert!(text.contains(words), "{arguments:?}: {text}");
    }
    let text = scratch.cli(&["combine", "lora", "other", "-o", "other"]).refused(scratch.root());
    assert!(text.contains("other"), "{text}");
    assert!(scratch.path("other/adapter_config.json").exists());
}

#[test]
fn other_bases_are_refused_or_warned_of() {
    let scratch = two();
    let mut prng = Prng::new(77);
    let q = Tensor::random(&mut prng, "model.layers.0.q.weight", Dtype::Bf16, &[16, 24], 1.0);
    let v = Tensor::random(&mut prng, "model.layers.0.v.weight", Dtype::Bf16, &[8, 24], 1.0);
    write_tensors(&scratch.path("second.safetensors"), &[q, v], &[]);
    let stamp = |adapter: &str, base: &str, output: &str| {
        scratch.cli(&["stamp", adapter, "--base", base, "-o", output]).done();
    };
    stamp("lora", "base.safetensors", "one.safetensors");
    stamp("other", "second.safetensors", "two.safetensors");
    let arguments = ["combine", "one.safetensors", "two.safetensors", "-o", "x.safetensors"];
    let text = scratch.cli(&arguments).refused(scratch.root());
    assert!(text.contains("were trained on different bases: 0 of 16 sampled values"), "{text}");
    assert!(text.contains("hint: ") && text.contains("--allow-different-base"), "{text}");
    let ran = scratch.cli(&[&arguments[..], &["--allow-different-base"]].concat()).done();
    assert!(ran.stderr.contains("warning: "), "{}", ran.stderr);

    for (adapter, name) in [("lora", "org/one"), ("other", "org/two")] {
        let path = scratch.path(adapter).join("adapter_config.json");
        let mut config = read_json(&path);
        config["base_model_name_or_path"] = json!(name);
        write_json(&path, &config);
    }
    let ran = scratch.cli(&["combine", "lora", "other", "-o", "y"]).done();
    assert!(ran.stderr.contains("`org/one`") && ran.stderr.contains("`org/two`"), "{}", ran.stderr);
    let config = read_json(&scratch.path("y/adapter_config.json"));
    assert!(config.get("base_model_name_or_path").is_none_or(Value::is_null), "{config}");
}
