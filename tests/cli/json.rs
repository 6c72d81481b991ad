//! `--json`: every report has exactly the members that docs/cli-json.md lists.
#![allow(dead_code, reason = "the members are there to be required")]

use std::collections::BTreeMap;

use lora_format::Dtype;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::support::{Factors, Prng, Tensor, fixtures, read_tensors, write_adapter, write_tensors};
use crate::{Ran, Scratch, cli, feature, peft};

/// `lora-cli/merge/2`, `lora-cli/unmerge/1` and `lora-cli/switch/1`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Merge {
    schema: String,
    status: String,
    base: String,
    adapters: Vec<AdapterReport>,
    output: String,
    dtype: String,
    rounding: String,
    seed: Option<u64>,
    #[serde(deserialize_with = "present")]
    quantised: Option<Quantised>,
    untied: bool,
    #[serde(deserialize_with = "present")]
    vocabulary: Option<u64>,
    tensors: Tensors,
    output_bytes: u64,
    output_files: Vec<String>,
    other_files: Vec<String>,
    left_behind: Vec<String>,
    config_changes: Vec<String>,
    renames: Vec<Rename>,
    notes: Vec<String>,
    warnings: Vec<String>,
    memory_bound_bytes: u64,
    seconds: Option<f64>,
    threads: Option<u64>,
    realised: Option<Realised>,
    targets: Vec<Target>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct AdapterReport {
    path: String,
    format: String,
    weight: f64,
    identity: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Quantised {
    method: String,
    weights: u64,
    dropped: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Tensors {
    merged: u64,
    copied: u64,
    converted: u64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rename {
    adapter_prefix: String,
    base_prefix: String,
    modules: u64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Target {
    parameter: String,
    shape: Vec<u64>,
    source: String,
    #[serde(deserialize_with = "present")]
    base_dtype: Option<String>,
    changes: Vec<Change>,
    realised: Option<Realised>,
    rounded: Option<u64>,
    requantised: Option<Realised>,
    undone: Option<Undone>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Change {
    adapter: u64,
    module: String,
    method: String,
    weight: f64,
    #[serde(deserialize_with = "present")]
    rank: Option<u64>,
    #[serde(deserialize_with = "present")]
    scale: Option<f64>,
    #[serde(deserialize_with = "present")]
    stored: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Undone {
    elements: u64,
    exact: u64,
    ambiguous: u64,
    impossible: u64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Realised {
    #[serde(deserialize_with = "present")]
    projection: Option<f64>,
    #[serde(deserialize_with = "present")]
    noise: Option<f64>,
    changed_share: f64,
    elements: u64,
    nonzero: u64,
    changed: u64,
    non_finite: u64,
}

/// `lora-cli/verify/1`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Verify {
    schema: String,
    merged: String,
    base: String,
    agrees: bool,
    ulp: u64,
    compared: u64,
    different: Vec<Difference>,
    missing: Vec<String>,
    unexpected: Vec<String>,
    reshaped: Vec<Reshaped>,
    #[serde(deserialize_with = "present")]
    renamed: Option<serde_json::Value>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Difference {
    tensor: String,
    dtype: String,
    elements: u64,
    different: u64,
    #[serde(deserialize_with = "present")]
    steps: Option<u64>,
    worst_index: Vec<u64>,
    #[serde(deserialize_with = "present")]
    worst_expected: Option<f64>,
    #[serde(deserialize_with = "present")]
    worst_found: Option<f64>,
    #[serde(deserialize_with = "present")]
    worst_steps: Option<u64>,
    #[serde(deserialize_with = "present")]
    relative: Option<f64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Reshaped {
    tensor: String,
    expected_dtype: String,
    expected_shape: Vec<u64>,
    found_dtype: String,
    found_shape: Vec<u64>,
}

/// `lora-cli/inspect-adapter/2`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct InspectAdapter {
    schema: String,
    path: String,
    format: String,
    version: Option<String>,
    #[serde(deserialize_with = "present")]
    base_name: Option<String>,
    #[serde(deserialize_with = "present")]
    base_revision: Option<String>,
    base_fingerprint: bool,
    #[serde(deserialize_with = "present")]
    fan_in_fan_out: Option<bool>,
    parameters: u64,
    bytes: u64,
    components: Vec<Component>,
    metadata: BTreeMap<String, String>,
    #[serde(deserialize_with = "present")]
    source: Option<Map<String, Value>>,
    notes: Vec<String>,
    digest: Option<Digest>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Component {
    module: String,
    parameter: String,
    method: String,
    #[serde(deserialize_with = "present")]
    rank: Option<u64>,
    #[serde(deserialize_with = "present")]
    alpha: Option<f64>,
    #[serde(deserialize_with = "present")]
    rule: Option<String>,
    #[serde(deserialize_with = "present")]
    scale: Option<f64>,
    #[serde(deserialize_with = "present")]
    in_features: Option<u64>,
    #[serde(deserialize_with = "present")]
    out_features: Option<u64>,
    tensors: Vec<Factor>,
    parameters: u64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Factor {
    name: String,
    dtype: String,
    shape: Vec<u64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Digest {
    intact: bool,
    recorded: String,
    actual: String,
}

/// `lora-cli/inspect-model/1`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct InspectModel {
    schema: String,
    path: String,
    layout: String,
    #[serde(deserialize_with = "present")]
    model_type: Option<String>,
    parameters: u64,
    bytes: u64,
    dtypes: BTreeMap<String, u64>,
    shards: Vec<Shard>,
    notes: Vec<String>,
    tensors: Vec<Stored>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Shard {
    name: String,
    bytes: u64,
    tensors: u64,
    metadata: BTreeMap<String, String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    name: String,
    dtype: String,
    shape: Vec<u64>,
    shard: String,
}

/// `lora-cli/convert/2`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Convert {
    schema: String,
    input: String,
    input_format: String,
    output: String,
    output_format: String,
    components: u64,
    changes: Vec<String>,
    not_carried: Vec<String>,
    notes: Vec<String>,
}

/// `lora-cli/stamp/1`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stamp {
    schema: String,
    adapter: String,
    base: String,
    output: String,
    targets_sampled: u64,
    samples: u64,
}

/// `lora-cli/error/1`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Error {
    schema: String,
    error: String,
    #[serde(deserialize_with = "present")]
    hint: Option<String>,
    problems: Vec<String>,
}

/// A member that may be null but must be there.
fn present<'de, T: Deserialize<'de>, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    Option::deserialize(deserializer)
}

fn report<T: DeserializeOwned>(ran: &Ran, code: i32) -> T {
    assert_eq!(ran.code, Some(code), "{}", ran.stderr);
    assert!(ran.stdout.ends_with("}\n"), "{}", ran.stdout);
    serde_json::from_str(&ran.stdout).unwrap_or_else(|error| panic!("{error}: {}", ran.stdout))
}

#[test]
fn a_merge() {
    let scratch = tempfile::tempdir().unwrap();
    let (base, adapter) = (peft("llama-sharded/base"), peft("llama-sharded/adapter"));
    let merge = ["merge", &base, &adapter, "-o", "out", "--json"];
    let ran = cli(scratch.path(), &[&merge[..], &["--threads", "2", "--dtype", "f32"]].concat());
    let merged: Merge = report(&ran, 0);
    assert_eq!(merged.schema, "lora-cli/merge/2");
    assert_eq!(merged.status, "merged");
    let [one] = merged.adapters.as_slice() else { panic!("{:?}", merged.adapters) };
    assert_eq!((&merged.base, &one.path), (&base, &adapter));
    assert_eq!((one.format.as_str(), one.identity.as_str(), one.weight), ("peft", "unknown", 1.0));
    assert_eq!((merged.output.as_str(), merged.dtype.as_str()), ("out", "f32"));
    assert!(merged.quantised.is_none() && merged.vocabulary.is_none() && !merged.untied);
    assert_eq!((merged.rounding.as_str(), merged.seed), ("nearest", None));
    assert_eq!((merged.tensors.merged, merged.tensors.copied), (6, 0));
    assert_eq!(merged.tensors.converted, 15);
    assert_eq!(merged.output_files.len(), 3);
    let bytes = |name: &String| std::fs::metadata(scratch.path().join("out").join(name)).unwrap();
    let written: u64 = merged.output_files.iter().map(|name| bytes(name).len()).sum();
    assert_eq!(merged.output_bytes, written);
    assert_eq!(merged.other_files, ["config.json", "generation_config.json"]);
    assert_eq!(merged.config_changes, ["dtype: float16 → float32"]);
    assert!(merged.left_behind.is_empty() && merged.renames.is_empty());
    assert!(merged.seconds.unwrap() > 0.0);
    assert_eq!(merged.threads, Some(2));
    let realised = merged.realised.unwrap();
    assert!((realised.projection.unwrap() - 1.0).abs() < 1e-3);
    assert_eq!(merged.targets.len(), 6);
    let target = &merged.targets[0];
    let [change] = target.changes.as_slice() else { panic!("{:?}", target.changes) };
    assert_eq!(target.parameter, format!("{}.weight", change.module));
    assert_eq!((target.source.as_str(), target.base_dtype.as_deref()), ("stored", Some("F16")));
    assert_eq!((change.method.as_str(), change.stored.as_deref()), ("LoRA", Some("out×in")));
    assert_eq!((change.rank, change.scale, change.weight), (Some(5), Some(2.0), 1.0));
    assert_eq!(change.adapter, 0);
    let elements: u64 = merged
        .targets
        .iter()
        .map(|target| {
            let realised = target.realised.as_ref().unwrap();
            assert_eq!(realised.elements, target.shape.iter().product::<u64>());
            realised.elements
        })
        .sum();
    assert_eq!(realised.elements, elements);

    let arguments = ["merge", &base, &adapter, "--json", "--dry-run", "--rounding", "stochastic"];
    let planned: Merge = report(&cli(scratch.path(), &arguments), 0);
    assert_eq!((planned.status.as_str(), planned.output.as_str()), ("planned", "base-merged"));
    assert_eq!((planned.rounding.as_str(), planned.seed), ("stochastic", Some(0)));
    assert!(planned.seconds.is_none() && planned.threads.is_none());
    assert!(planned.realised.is_none() && planned.targets[0].realised.is_none());
}

#[test]
fn a_merge_of_renamed_modules() {
    let scratch = tempfile::tempdir().unwrap();
    let (base, adapter) = (peft("llava/base"), peft("llava/adapter"));
    let ran = cli(scratch.path(), &["merge", &base, &adapter, "-o", "out", "--json"]);
    let merged: Merge = report(&ran, 0);
    assert_eq!(merged.renames[0].adapter_prefix, "model.language_model");
    assert_eq!(merged.renames[0].base_prefix, "language_model.model");
    assert_eq!(merged.renames[0].modules, 4);
    assert!(merged.targets[0].changes[0].module.starts_with("model.language_model."));
    assert!(merged.targets[0].parameter.starts_with("language_model.model."));
}

/// JSON has no infinity: what has no value is null.
#[test]
fn a_merge_without_a_delta() {
    let scratch = Scratch::new();
    let ran = scratch.cli(&["merge", "base.safetensors", "lora", "--scale", "0", "--json"]);
    let merged: Merge = report(&ran, 0);
    let realised = merged.realised.unwrap();
    assert_eq!((realised.projection, realised.noise, realised.nonzero), (None, None, 0));
}

/// What an adapter brings in full, a head that the output gains, a vocabulary that grows.
#[test]
fn a_merge_that_replaces() {
    let scratch = tempfile::tempdir().unwrap();
    let (base, adapter) = (feature("bases/llama-bf16"), feature("modules-to-save/adapter"));
    let ran = cli(scratch.path(), &["merge", &base, &adapter, "-o", "out", "--json"]);
    let merged: Merge = report(&ran, 0);
    let head = merged.targets.iter().find(|one| one.parameter == "lm_head.weight").unwrap();
    assert_eq!((head.source.as_str(), head.base_dtype.as_deref()), ("adapter", Some("BF16")));
    assert!(head.rounded.unwrap() > 0 && head.requantised.is_none() && head.undone.is_none());
    let [change] = head.changes.as_slice() else { panic!("{:?}", head.changes) };
    assert_eq!((change.method.as_str(), change.stored.as_deref()), ("replaced", None));
    assert_eq!((change.rank, change.scale, change.weight), (None, None, 1.0));
    assert!(merged.targets.iter().all(|one| one.rounded.is_some() == (one.source == "adapter")));
    assert!(merged.warnings.iter().any(|text| text.contains("were rounded to the base's dtype")));

    let (base, adapter) = (feature("bases/llama"), feature("vocabulary/adapter"));
    let ran = cli(scratch.path(), &["merge", &base, &adapter, "-o", "grown", "--json"]);
    let merged: Merge = report(&ran, 0);
    assert_eq!((merged.vocabulary, merged.untied), (Some(20), false));
    assert_eq!(merged.config_changes, ["vocab_size: 16 → 20"]);

    let adapter = feature("modules-to-save-classifier/adapter");
    let ran = cli(scratch.path(), &["merge", &base, &adapter, "-o", "new", "--json"]);
    let merged: Merge = report(&ran, 0);
    let score = merged.targets.iter().find(|one| one.parameter == "score.weight").unwrap();
    assert_eq!((score.source.as_str(), score.base_dtype.as_deref()), ("adapter", None));
    assert_eq!(score.shape, [2, 12]);
}

#[test]
fn a_merge_into_a_quantised_base() {
    let scratch = Scratch::new();
    let base = fixtures().join("quantised/gptq-4/base");
    let mut prng = Prng::new(4);
    let module = "model.layers.0.self_attn.q_proj";
    let factors = Factors::random(&mut prng, module, (72, 32, 2), Dtype::F32, 0.1);
    write_adapter(&scratch.path("a"), &[factors], &serde_json::json!({}));
    let base = base.to_str().unwrap();
    let merged: Merge = report(&scratch.cli(&["merge", base, "a", "-o", "out", "--json"]), 0);
    let quantised = merged.quantised.unwrap();
    assert_eq!((quantised.method.as_str(), quantised.weights), ("gptq", 2));
    assert_eq!((merged.tensors.merged, merged.tensors.converted, merged.tensors.copied), (1, 1, 1));
    let target = &merged.targets[0];
    assert_eq!((target.source.as_str(), target.base_dtype.as_deref()), ("quantised", Some("F16")));
    assert_eq!(target.requantised.as_ref().unwrap().elements, 72 * 32);
    assert!(target.rounded.is_none() && target.undone.is_none());
}

/// The members of `merge`, with what was taken out.
#[test]
fn an_unmerge_and_a_switch() {
    let scratch = Scratch::new();
    scratch.cli(&["merge", "base.safetensors", "lora@0.5", "-o", "m"]).done();
    let unmerge = ["unmerge", "m", "lora@0.5", "--json"];
    let unmerged: Merge = report(&scratch.cli(&[&unmerge[..], &["-o", "u"]].concat()), 0);
    assert_eq!(unmerged.schema, "lora-cli/unmerge/1");
    assert_eq!((unmerged.status.as_str(), unmerged.base.as_str()), ("unmerged", "m"));
    let [one] = unmerged.adapters.as_slice() else { panic!("{:?}", unmerged.adapters) };
    assert_eq!((one.path.as_str(), one.weight, one.identity.as_str()), ("lora", -0.5, "unknown"));
    let target = &unmerged.targets[0];
    assert_eq!(target.changes[0].scale, Some(-0.5));
    let undone = target.undone.as_ref().unwrap();
    assert_eq!(undone.elements, target.realised.as_ref().unwrap().nonzero);
    assert_eq!(undone.exact + undone.ambiguous + undone.impossible, undone.elements);
    assert!(undone.exact > 0 && undone.ambiguous > 0 && undone.impossible == 0, "{undone:?}");
    let planned: Merge = report(&scratch.cli(&[&unmerge[..], &["--dry-run"]].concat()), 0);
    assert_eq!(
        (planned.schema.as_str(), planned.status.as_str()),
        ("lora-cli/unmerge/1", "planned")
    );
    assert!(planned.targets[0].undone.is_none());

    let switch = ["switch", "m", "--from", "lora@0.5", "--to", "lora@2", "--json", "-o", "s"];
    let switched: Merge = report(&scratch.cli(&switch), 0);
    assert_eq!(
        (switched.schema.as_str(), switched.status.as_str()),
        ("lora-cli/switch/1", "switched")
    );
    let weights: Vec<f64> = switched.adapters.iter().map(|one| one.weight).collect();
    assert_eq!(weights, [-0.5, 2.0]);
    let adapters: Vec<u64> = switched.targets[0].changes.iter().map(|one| one.adapter).collect();
    assert_eq!(adapters, [0, 1]);
    assert_eq!(switched.targets[0].undone.as_ref().unwrap().elements, undone.elements);
}

#[test]
fn a_verification() {
    let scratch = Scratch::new();
    scratch.cli(&["merge", "base.safetensors", "lora", "-o", "m"]).done();
    let verify = |merged: &str, code| -> Verify {
        let arguments = ["verify", merged, "--base", "base.safetensors", "--adapter", "lora"];
        report(&scratch.cli(&[&arguments[..], &["--json", "--ulp", "1"]].concat()), code)
    };
    let agrees = verify("m", 0);
    assert_eq!(agrees.schema, "lora-cli/verify/1");
    assert_eq!((agrees.merged.as_str(), agrees.base.as_str()), ("m", "base.safetensors"));
    assert_eq!((agrees.agrees, agrees.ulp, agrees.compared), (true, 1, 2));
    assert!(agrees.different.is_empty() && agrees.missing.is_empty());
    assert!(agrees.unexpected.is_empty() && agrees.reshaped.is_empty());

    let mut tensors: Vec<Tensor> = read_tensors(&scratch.path("m")).into_values().collect();
    let mut bits = tensors[0].bits();
    bits[0] = 0x7FC0;
    tensors[0] = Tensor::of_bits(&tensors[0].name, Dtype::Bf16, &[16, 24], &bits);
    tensors[1].shape = vec![4, 6];
    tensors.push(tensors[1].renamed("more"));
    write_tensors(&scratch.path("other"), &tensors, &[]);
    let differs = verify("other", 1);
    assert_eq!((differs.agrees, differs.compared), (false, 1));
    let [one] = differs.different.as_slice() else { panic!("{:?}", differs.different) };
    assert_eq!((one.tensor.as_str(), one.dtype.as_str()), ("model.layers.0.q.weight", "BF16"));
    assert_eq!((one.elements, one.different, one.worst_index.as_slice()), (384, 1, &[0, 0][..]));
    // JSON has no NaN.
    assert!(one.worst_expected.is_some() && one.worst_found.is_none() && one.steps.is_none());
    assert!(one.worst_steps.is_none() && one.relative.is_none());
    assert_eq!(differs.unexpected, ["more"]);
    let [one] = differs.reshaped.as_slice() else { panic!("{:?}", differs.reshaped) };
    assert_eq!((one.tensor.as_str(), one.expected_dtype.as_str()), ("model.norm.weight", "BF16"));
    assert_eq!(
        (one.expected_shape.as_slice(), one.found_shape.as_slice()),
        (&[24][..], &[4, 6][..])
    );
    std::fs::remove_file(scratch.path("other")).unwrap();
    write_tensors(&scratch.path("other"), &tensors[..1], &[]);
    assert_eq!(verify("other", 1).missing, ["model.norm.weight"]);
}

/// What has no rank, alpha or scale has null there, and its tensors.
#[test]
fn an_inspected_adapter_of_other_methods() {
    let shown = |case: &str| -> InspectAdapter {
        report(&cli(&fixtures(), &["inspect", &feature(case), "--json"]), 0)
    };
    let ia3 = shown("ia3/adapter");
    let [first, ..] = ia3.components.as_slice() else { panic!("{:?}", ia3.components) };
    assert_eq!(first.method, "IA³");
    assert!(first.rank.is_none() && first.alpha.is_none() && first.rule.is_none());
    assert!(first.scale.is_none() && first.in_features.is_none() && first.out_features.is_none());
    let dora = shown("dora-linear/adapter");
    let [first, ..] = dora.components.as_slice() else { panic!("{:?}", dora.components) };
    assert_eq!((first.method.as_str(), first.tensors.len()), ("DoRA", 3));
    assert_eq!(first.tensors[2].shape, [first.out_features.unwrap()]);
    let elements = |factor: &Factor| factor.shape.iter().product::<u64>();
    for component in dora.components.iter().chain(&ia3.components) {
        assert_eq!(component.parameters, component.tensors.iter().map(elements).sum::<u64>());
        assert!(component.tensors.iter().all(|factor| factor.dtype == "F32"));
        assert!(component.tensors.iter().all(|factor| factor.name.contains(&component.module)));
    }
    // What is refused is shown as tensors, with the reason.
    let ran = cli(&fixtures(), &["inspect", &feature("alora/adapter"), "--json"]);
    let alora: InspectModel = report(&ran, 0);
    assert_eq!((alora.layout.as_str(), alora.tensors.len()), ("adapter", 4));
    assert!(alora.notes.iter().any(|note| note.contains("invocation tokens")), "{:?}", alora.notes);
}

#[test]
fn an_inspected_adapter() {
    let ran = cli(&fixtures(), &["inspect", "peft/llama-patterns/adapter", "--json"]);
    let adapter: InspectAdapter = report(&ran, 0);
    assert_eq!(adapter.schema, "lora-cli/inspect-adapter/2");
    assert_eq!((adapter.format.as_str(), adapter.version), ("peft", None));
    assert_eq!(adapter.base_name.as_deref(), Some("lora-fixtures/llama-patterns"));
    assert_eq!(adapter.fan_in_fan_out, Some(false));
    assert!(adapter.base_revision.is_none() && !adapter.base_fingerprint);
    assert_eq!(adapter.components.len(), 14);
    assert_eq!(adapter.parameters, adapter.components.iter().map(|c| c.parameters).sum::<u64>());
    assert_eq!(adapter.bytes, 4 * adapter.parameters);
    for component in &adapter.components {
        assert_eq!(component.method, "LoRA");
        assert_eq!(component.rule.as_deref(), Some("alpha/rank"));
        let (alpha, rank) = (component.alpha.unwrap(), component.rank.unwrap());
        assert_eq!(component.scale, Some(alpha / rank as f64));
        let [a, b] = component.tensors.as_slice() else { panic!("{:?}", component.tensors) };
        assert_eq!((a.shape[0], b.shape[1]), (rank, rank));
        let features = (component.in_features.unwrap(), component.out_features.unwrap());
        assert_eq!(features, (a.shape[1], b.shape[0]));
        assert_eq!(component.parameters, rank * (features.0 + features.1));
    }
    assert_eq!(adapter.source.unwrap()["peft_type"], "LORA");
    assert!(!adapter.notes.is_empty() && adapter.digest.is_none());

    let scratch = Scratch::new();
    scratch.cli(&["stamp", "lora", "--base", "base.safetensors", "-o", "own.safetensors"]).done();
    let ran = scratch.cli(&["inspect", "own.safetensors", "--json", "--verify"]);
    let adapter: InspectAdapter = report(&ran, 0);
    assert_eq!((adapter.format.as_str(), adapter.version.as_deref()), ("lora", Some("1.0")));
    assert!(adapter.base_fingerprint);
    let digest = adapter.digest.unwrap();
    assert!(digest.intact && digest.recorded == digest.actual);
}

#[test]
fn an_inspected_model() {
    for (path, layout, shards) in [
        ("peft/llama-vanilla/base", "directory", 1),
        ("peft/llama-sharded/base", "sharded", 3),
        ("peft/llama-vanilla/base/model.safetensors", "file", 1),
    ] {
        let model: InspectModel = report(&cli(&fixtures(), &["inspect", path, "--json"]), 0);
        assert_eq!(model.schema, "lora-cli/inspect-model/1");
        assert_eq!((model.path.as_str(), model.layout.as_str()), (path, layout));
        assert_eq!(model.model_type.as_deref(), Some("llama"));
        assert_eq!((model.shards.len(), model.tensors.len()), (shards, 21));
        assert_eq!(model.dtypes.values().sum::<u64>(), model.parameters);
        assert_eq!(model.bytes, 2 * model.parameters);
        assert_eq!(model.shards.iter().map(|shard| shard.tensors).sum::<u64>(), 21);
        let named = |stored: &Stored| model.shards.iter().any(|shard| shard.name == stored.shard);
        assert!(model.tensors.iter().all(named));
        assert!(model.tensors.iter().map(|tensor| &tensor.name).is_sorted());
    }
}

#[test]
fn a_conversion_and_a_stamp() {
    let scratch = Scratch::new();
    std::fs::write(scratch.path("lora/README.md"), "card").unwrap();
    let ran = scratch.cli(&["convert", "lora", "--to", "lora", "-o", "own.safetensors", "--json"]);
    let converted: Convert = report(&ran, 0);
    assert_eq!(converted.schema, "lora-cli/convert/2");
    assert_eq!((converted.input.as_str(), converted.input_format.as_str()), ("lora", "peft"));
    assert_eq!(converted.output, "own.safetensors");
    assert_eq!((converted.output_format.as_str(), converted.components), ("lora", 1));
    assert_eq!(converted.not_carried, ["README.md"]);

    let stamp = ["stamp", "own.safetensors", "--base", "base.safetensors", "--json"];
    let ran = scratch.cli(&[&stamp[..], &["-o", "stamped.safetensors"]].concat());
    let stamped: Stamp = report(&ran, 0);
    assert_eq!(stamped.schema, "lora-cli/stamp/1");
    assert_eq!(
        (stamped.adapter.as_str(), stamped.base.as_str()),
        ("own.safetensors", "base.safetensors")
    );
    assert_eq!(stamped.output, "stamped.safetensors");
    assert_eq!((stamped.targets_sampled, stamped.samples), (1, 16));

    let ran =
        scratch.cli(&["convert", "stamped.safetensors", "--to", "peft", "-o", "back", "--json"]);
    let converted: Convert = report(&ran, 0);
    let lost = ["the base's fingerprint (peft has no place for it)"];
    assert_eq!(converted.not_carried, lost);
}

/// An error is one report too, on stdout, and the same text on stderr.
#[test]
fn an_error() {
    let scratch = Scratch::new();
    std::fs::write(scratch.path("there"), "x").unwrap();
    for arguments in [
        &["merge", "nowhere", "lora", "--json"][..],
        &["merge", "base.safetensors", "lora", "-o", "there", "--json"],
        &["inspect", "nowhere", "--json"],
        &["convert", "base.safetensors", "--to", "peft", "-o", "x", "--json"],
        &["stamp", "lora", "--base", "nowhere", "-o", "x", "--json"],
        &["unmerge", "nowhere", "lora", "--json"],
        &["switch", "base.safetensors", "--from", "nowhere", "--to", "lora", "--json"],
        &["verify", "nowhere", "--base", "base.safetensors", "--adapter", "lora", "--json"],
    ] {
        let ran = scratch.cli(arguments);
        let error: Error = report(&ran, 2);
        assert_eq!(error.schema, "lora-cli/error/1");
        let mut text = format!("error: {}\n", error.error);
        if let Some(hint) = error.hint {
            text.push_str(&format!("hint: {hint}\n"));
        }
        assert!(ran.stderr.ends_with(&text), "{} does not end in {text}", ran.stderr);
        assert!(error.problems.is_empty());
    }
}

/// The message counts problems that are alike; the report lists each.
#[test]
fn a_misfit_lists_every_module() {
    let scratch = Scratch::new();
    let ran = cli(
        scratch.root(),
        &["merge", "base.safetensors", &peft("llama-vanilla/adapter"), "--json"],
    );
    let error: Error = report(&ran, 2);
    assert_eq!(error.problems.len(), 14);
    assert!(error.problems.iter().all(|problem| problem.contains("nearest: ")));
    assert!(error.error.contains("like it: --json lists all)"), "{}", error.error);
}
