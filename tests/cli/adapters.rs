//! `convert` and `stamp`.

use serde_json::json;

use crate::support::{Prng, Tensor, names, read_json, read_tensors, write_json, write_tensors};
use crate::{Scratch, cli, peft};
use lora_format::Dtype;

/// PEFT → ours → PEFT: every tensor's bytes and every field of the configuration.
#[test]
fn conversion_both_ways_loses_nothing() {
    for case in ["llama-vanilla", "llama-patterns", "llama-rslora", "llama-f32", "gpt2", "llava"] {
        let scratch = tempfile::tempdir().unwrap();
        let adapter = peft(&format!("{case}/adapter"));
        let root = scratch.path();
        cli(root, &["convert", &adapter, "--to", "lora", "-o", "own.safetensors"]).done();
        cli(root, &["convert", "own.safetensors", "--to", "peft", "-o", "back"]).done();
        cli(root, &["convert", "back", "--to", "lora", "-o", "again.safetensors"]).done();
        let original = std::path::Path::new(&adapter);
        let weights = "adapter_model.safetensors";
        assert_eq!(
            read_tensors(&root.join("back").join(weights)),
            read_tensors(&original.join(weights)),
            "{case}"
        );
        let config = "adapter_config.json";
        assert_eq!(
            read_json(&root.join("back").join(config)),
            read_json(&original.join(config)),
            "{case}"
        );
        let read = |name: &str| std::fs::read(root.join(name)).unwrap();
        assert_eq!(read("own.safetensors"), read("again.safetensors"), "{case}");
        // And the merge is the same.
        let base = peft(&format!("{case}/base"));
        cli(root, &["merge", &base, &adapter, "-o", "a", "-q"]).done();
        cli(root, &["merge", &base, "own.safetensors", "-o", "b", "-q"]).done();
        for name in names(&root.join("a")) {
            if name.ends_with(".safetensors") {
                assert_eq!(read(&format!("a/{name}")), read(&format!("b/{name}")), "{case}");
            }
        }
    }
}

#[test]
fn what_a_conversion_leaves_behind_is_said() {
    let scratch = tempfile::tempdir().unwrap();
    let adapter = peft("llama-vanilla/adapter");
    let ran = cli(scratch.path(), &["convert", &adapter, "--to", "lora", "-o", "x.safetensors"]);
    assert!(ran.done().stderr.contains("note: not carried along: README.md\n"));
}

#[test]
fn an_unknown_field_is_refused_or_passed_over_by_name() {
    let scratch = Scratch::new();
    let path = scratch.path("lora/adapter_config.json");
    let mut config = read_json(&path);
    config["use_mystery"] = json!(true);
    write_json(&path, &config);
    let text = scratch.cli(&["merge", "base.safetensors", "lora"]).refused(scratch.root());
    assert!(text.contains("`use_mystery`: true: this field is unknown here"), "{text}");
    assert!(text.contains("hint: ") && text.contains("--ignore-field"), "{text}");
    let arguments = ["merge", "base.safetensors", "lora", "--ignore-field", "use_mystery"];
    let ran = scratch.cli(&arguments).done();
    let note = "note: the configuration field `use_mystery` is ignored, as asked\n";
    assert!(ran.stderr.starts_with(note), "{}", ran.stderr);
}

#[test]
fn a_stamped_adapter_knows_its_base() {
    let scratch = Scratch::new();
    let stamp = ["stamp", "lora", "--base", "base.safetensors", "-o", "stamped.safetensors"];
    let ran = scratch.cli(&stamp).done();
    let expected = "stamped lora with 16 values of 1 targets → stamped.safetensors\n";
    assert_eq!(ran.stderr, expected);
    let merge = |base: &str, output: &str| {
        scratch.cli(&["merge", base, "stamped.safetensors", "-o", output, "--json"])
    };
    let identity = |ran: crate::Ran| {
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        serde_json::from_str::<serde_json::Value>(&ran.stdout).unwrap()["adapters"][0]["identity"]
            .clone()
    };
    assert_eq!(identity(merge("base.safetensors", "a")), "same");
    scratch
        .cli(&["merge", "base.safetensors", "lora", "--scale", "0", "--dtype", "f32", "-o", "wide"])
        .done();
    assert_eq!(identity(merge("wide", "b")), "re-encoded");

    let mut prng = Prng::new(9);
    let other = [
        Tensor::random(&mut prng, "model.layers.0.q.weight", Dtype::Bf16, &[16, 24], 1.0),
        Tensor::random(&mut prng, "model.norm.weight", Dtype::Bf16, &[24], 1.0),
    ];
    write_tensors(&scratch.path("other.safetensors"), &other, &[]);
    let before = scratch.names();
    let arguments = ["merge", "other.safetensors", "stamped.safetensors", "-o", "c"];
    let text = scratch.cli(&arguments).refused(scratch.root());
    assert_eq!(
        text,
        "error: other.safetensors: not the base that stamped.safetensors was trained on: 0 of 16 \
         sampled values agree, the first that differ are in `model.layers.0.q.weight`\n\
         hint: give the base that the adapter was trained on; if you are sure, \
         --allow-different-base\n"
    );
    assert_eq!(scratch.names(), before);
    let ran = scratch.cli(&[&arguments[..], &["--allow-different-base"]].concat()).done();
    let warning = "warning: not the base that stamped.safetensors was trained on (0 of 16 sampled \
                   values agree); merging all the same, as asked\n";
    assert!(ran.stderr.contains(warning), "{}", ran.stderr);

    // Nor is it given another base by mistake.
    let stamp = ["stamp", "stamped.safetensors", "--base", "other.safetensors", "-o", "again"];
    let text = scratch.cli(&stamp).refused(scratch.root());
    assert_eq!(
        text,
        "error: stamped.safetensors: is stamped already, with another base than \
         other.safetensors (0 of 16 sampled values agree)\n\
         hint: if the new base is the right one, --replace-fingerprint\n"
    );
    scratch.cli(&[&stamp[..], &["--replace-fingerprint"]].concat()).done();
    scratch.cli(&["merge", "other.safetensors", "again", "-o", "d"]).done();
}

/// Without a fingerprint the recorded name is compared, and a mismatch is a warning.
#[test]
fn another_recorded_name_is_a_warning() {
    let scratch = Scratch::with_directory();
    let path = scratch.path("lora/adapter_config.json");
    let mut config = read_json(&path);
    for (name, warned) in
        [("org/Other", true), ("org/base", false), ("/home/x/Base/", false), ("", false)]
    {
        config["base_model_name_or_path"] = json!(name);
        write_json(&path, &config);
        let ran = scratch.cli(&["merge", "base", "lora", "--force"]).done();
        let warning = format!("warning: the adapter was trained on `{name}`; whether this base");
        assert_eq!(ran.stderr.contains(&warning), warned, "{name}: {}", ran.stderr);
    }
}
