//! Every malformed input under `fixtures/bad`: the exact message, status 2, nothing written.

use crate::support::fixtures;
use crate::{Ran, cli};

/// What stderr says of each adapter, merged into the base it is for; `@` is the adapter's path.
#[rustfmt::skip]
const ADAPTERS: [(&str, &str); 35] = [
    ("a-1d",
     "error: @/adapter_model.safetensors: the adapter is malformed: \
      `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`: shape [8]; A of a \
      linear layer is rank × in"),
    ("a-3d",
     "error: @/adapter_model.safetensors: the adapter is malformed: \
      `base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight`: shape [4, 2]; B of a \
      convolution is out × rank × ones, as many as A has kernel dimensions"),
    ("a-without-b",
     "error: @/adapter_model.safetensors: the adapter is malformed: \
      `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight` has no partner \
      `base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight`"),
    ("b-without-a",
     "error: @/adapter_model.safetensors: the adapter is malformed: \
      `base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight` has no partner \
      `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`"),
    ("config-alpha-infinity",
     "error: @/adapter_config.json: not valid JSON: number out of range at line 2 column 21"),
    ("config-alpha-nan",
     "error: @/adapter_config.json: not valid JSON: expected value at line 2 column 17"),
    ("config-alpha-pattern-null-value",
     "error: @/adapter_config.json: `alpha_pattern.q_proj` must be a number, found nothing"),
    ("config-duplicate-key",
     "error: @/adapter_config.json: not what this file must hold: the key `lora_alpha` appears \
      twice at line 4 column 17"),
    ("config-invalid-json",
     "error: @/adapter_config.json: not valid JSON: EOF while parsing a list at line 7 column \
      2"),
    ("config-key-unknown",
     "error: @/adapter_config.json: the adapter uses what this version does not implement: \
      `use_mystery`: true: this field is unknown here and may change the result\nhint: if the \
      field cannot matter for the result, pass it over: --ignore-field NAME"),
    ("config-missing-lora-alpha",
     "error: @/adapter_config.json: `lora_alpha` must be a number, found nothing\nhint: \
      --alpha replaces an alpha that is missing; --scale makes an adapter stronger or weaker"),
    ("config-not-object",
     "error: @/adapter_config.json: `(top level)` must be an object, found []"),
    ("config-pattern-back-reference",
     "error: @/adapter_config.json: alpha_pattern: the pattern \"(?P<p>q)_proj(?P=p)?\" cannot \
      be used: it uses a group extension that is not supported"),
    ("config-pattern-catastrophic-look-ahead",
     "error: @/adapter_config.json: alpha_pattern: the pattern \"(a|b|ab)*(?=c)\" cannot be \
      used: it backtracks too far"),
    ("config-pattern-huge",
     "error: @/adapter_config.json: alpha_pattern: the pattern \"((a{500}){500}){500}\" cannot \
      be used: it is not valid, or too large"),
    ("config-pattern-invalid",
     "error: @/adapter_config.json: alpha_pattern: the pattern \"q_proj(\" cannot be used: it \
      is not a valid regular expression"),
    ("config-peft-type-missing",
     "error: @/adapter_config.json: `peft_type` must be a string, found nothing"),
    ("config-peft-type-unknown",
     "error: @/adapter_config.json: the adapter uses what this version does not implement: \
      peft_type LORAX: this method is unknown here"),
    ("config-r-fraction",
     "error: @/adapter_config.json: `r` must be a positive integer, found 2.5"),
    ("config-r-negative",
     "error: @/adapter_config.json: `r` must be a positive integer, found -2"),
    ("config-r-string",
     "error: @/adapter_config.json: `r` must be a positive integer, found \"2\""),
    ("config-r-zero",
     "error: @/adapter_config.json: `r` must be a positive integer, found 0"),
    ("config-rank-pattern-array",
     "error: @/adapter_config.json: `rank_pattern` must be an object of numbers, found \
      [\"q_proj\",2]"),
    ("config-rank-pattern-duplicate-key",
     "error: @/adapter_config.json: not what this file must hold: the key `q` appears twice at \
      line 5 column 34"),
    ("config-rank-pattern-string-value",
     "error: @/adapter_config.json: `rank_pattern.q_proj` must be a number, found \"2\""),
    ("config-use-rslora-string",
     "error: @/adapter_config.json: `use_rslora` must be a boolean, found \"yes\""),
    ("dtype-integer",
     "error: @/adapter_model.safetensors: the adapter is malformed: \
      `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`: dtype I8; a factor \
      must be F32, F16 or BF16"),
    ("inf",
     "error: @: tensor `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight` holds \
      1 values that are NaN or infinite, the first at element 5\nhint: training diverged or \
      the file is damaged; to merge it all the same, --allow-nonfinite"),
    ("key-unknown",
     "error: @/adapter_model.safetensors: the adapter uses what this version does not \
      implement: `base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight`: an unknown \
      kind of LoRA tensor"),
    ("nan",
     "error: @: tensor `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight` holds \
      1 values that are NaN or infinite, the first at element 5\nhint: training diverged or \
      the file is damaged; to merge it all the same, --allow-nonfinite"),
    ("no-config",
     "error: @/adapter_model.safetensors: no adapter_config.json beside it and no alpha given: \
      the scale alpha/rank is unknown\nhint: give the alpha that the adapter was trained with: \
      --alpha N"),
    ("no-tensors",
     "error: @/adapter_model.safetensors: no adapter tensors in it: none of its 0 tensors is \
      named `….lora_A.weight` or `….lora_B.weight`\nhint: the order is BASE ADAPTER; is this \
      file perhaps a base model?"),
    ("no-weights",
     "error: @: the directory holds no adapter: looked for adapter_model.safetensors and adapter_model.bin\nhint: \
      give the directory that holds adapter_model.safetensors; PEFT saves adapters with names \
      of their own in subdirectories"),
    ("rank-mismatch",
     "error: @/adapter_model.safetensors: the adapter is malformed: \
      `model.layers.0.self_attn.q_proj`: A [2, 4] and B [4, 3] do not agree on the rank"),
    ("rank-zero-tensors",
     "error: @/adapter_model.safetensors: the adapter is malformed: \
      `model.layers.0.self_attn.q_proj`: rank 0 is not between 1 and 65536"),
];

/// What stderr says of each sharded base; `@` is its path.
#[rustfmt::skip]
const INDICES: [(&str, &str); 11] = [
    ("index-invalid-json",
     "error: @/model.safetensors.index.json: not valid JSON: EOF while parsing an object at \
      line 8 column 0"),
    ("path-absolute",
     "error: @/model.safetensors.index.json: the shard `/x.safetensors` is not a plain file \
      name inside the index's directory: refused"),
    ("path-empty",
     "error: @/model.safetensors.index.json: the shard `` is not a plain file name inside the \
      index's directory: refused"),
    ("path-not-string",
     "error: @/model.safetensors.index.json: not what this file must hold: invalid type: \
      integer `2`, expected a string at line 7 column 10"),
    ("path-parent",
     "error: @/model.safetensors.index.json: the shard `../x.safetensors` is not a plain file \
      name inside the index's directory: refused"),
    ("shard-missing",
     "error: @/model.safetensors.index.json: the index names the shard \
      `model-00002-of-00002.safetensors`, which is missing\nhint: the download may be \
      incomplete; fetch the model again"),
    ("shard-truncated",
     "error: @/model-00002-of-00002.safetensors: not a valid safetensors file: tensor `b`: \
      ends at byte 64 of the data, the file has 56 (truncated?)\nhint: the download may be \
      incomplete; fetch the file again"),
    ("tensor-absent",
     "error: @/model.safetensors.index.json: the index places tensor `c` in \
      `model-00002-of-00002.safetensors`, which does not hold it"),
    ("weight-map-array",
     "error: @/model.safetensors.index.json: not what this file must hold: invalid type: \
      sequence, expected an object that maps tensor names to file names at line 5 column 16"),
    ("weight-map-duplicate-key",
     "error: @/model.safetensors.index.json: not what this file must hold: the tensor `a` \
      appears twice in weight_map"),
    ("weight-map-missing",
     "error: @/model.safetensors.index.json: not what this file must hold: missing field \
      `weight_map` at line 1 column 33"),
];

/// Adapters there that are merged: their factors tell what their configuration does not, or their
/// pattern is answered as Python answers it. The alpha that each is merged with.
const MERGED: [(&str, f64); 4] = [
    ("config-missing-r", 4.0),
    ("config-pattern-catastrophic", 4.0),
    ("config-pattern-look-ahead", 8.0),
    ("rank-not-config", 4.0),
];

/// A merge in an empty directory, which must stay so if the merge is refused.
fn merge(base: &str, adapter: &str, more: &[&str]) -> (Ran, Vec<String>) {
    let scratch = tempfile::tempdir().unwrap();
    let bad = fixtures().join("bad");
    let (base, adapter) = (bad.join(base), bad.join(adapter));
    let paths = [base.to_str().unwrap(), adapter.to_str().unwrap()];
    let ran = cli(scratch.path(), &[&["merge", "-q", "-o", "out"], &paths[..], more].concat());
    (ran, crate::support::names(scratch.path()))
}

fn refused((ran, written): (Ran, Vec<String>), path: &str) -> String {
    assert_eq!(written, [""; 0], "{path}");
    let bad = fixtures().join("bad");
    ran.refused(&bad).replace(path, "@")
}

fn entries(directory: &str) -> usize {
    std::fs::read_dir(fixtures().join("bad").join(directory)).unwrap().count()
}

#[test]
fn malformed_adapters() {
    for (name, expected) in ADAPTERS {
        let path = format!("adapter/{name}");
        let text = refused(merge("base", &path, &[]), &path);
        assert_eq!(text, format!("{expected}\n"), "{name}");
    }
    for (name, alpha) in MERGED {
        let (ran, _) = merge("base", &format!("adapter/{name}"), &["--json"]);
        assert_eq!(ran.code, Some(0), "{name}: {}", ran.stderr);
        let report: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
        let change = &report["targets"][0]["changes"][0];
        let rank = change["rank"].as_f64().unwrap();
        assert_eq!(change["scale"], alpha / rank, "{name}");
    }
    assert_eq!(entries("adapter"), ADAPTERS.len() + MERGED.len(), "an adapter without a message");
}

#[test]
fn malformed_indices() {
    for (name, expected) in INDICES {
        let path = format!("index/{name}");
        let text = refused(merge(&path, "adapter/config-missing-r", &[]), &path);
        assert_eq!(text, format!("{expected}\n"), "{name}");
    }
    // Two are no errors: the index decides, and it is said.
    let mut noted = 0;
    for (name, note) in [
        (
            "tensor-stale-duplicate",
            "note: `a` in model-00002-of-00002.safetensors is dropped: the index places it in \
             model-00001-of-00002.safetensors\n",
        ),
        (
            "tensor-unlisted",
            "note: `c` is in model-00002-of-00002.safetensors but not in the index; it is copied \
             and indexed\n",
        ),
    ] {
        let ran = cli(&fixtures().join("bad/index"), &["inspect", name]);
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        assert!(ran.stdout.ends_with(note), "{}", ran.stdout);
        noted += 1;
    }
    assert_eq!(entries("index"), INDICES.len() + noted, "an index without a message");
}

/// The containers' exact messages stand in the tests of the format; here, as base and as adapter,
/// each is refused with its name.
#[test]
fn malformed_containers() {
    let mut seen = 0;
    for entry in std::fs::read_dir(fixtures().join("bad")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if !name.ends_with(".safetensors") {
            continue;
        }
        seen += 1;
        let as_base = refused(merge(&name, "adapter/config-missing-r", &[]), &name);
        let as_adapter = refused(merge("base", &name, &["--alpha", "1"]), &name);
        assert_eq!(as_base, as_adapter);
        assert!(as_base.starts_with("error: @: not a valid safetensors file: "), "{as_base}");
    }
    assert!(seen >= 45, "fixtures are missing");
}

#[test]
fn non_finite_adapters_are_merged_when_allowed() {
    for name in ["nan", "inf"] {
        let path = format!("adapter/{name}");
        let (ran, written) = merge("base", &path, &["--allow-nonfinite"]);
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        assert!(written.contains(&"out/model.safetensors".to_owned()));
        let warning = " elements of the merged tensors are infinite or NaN\n";
        assert!(ran.stderr.ends_with(warning), "{}", ran.stderr);
    }
}
