//! `lora-cli merge`: what comes out, and what is said.

use crate::support::{fixtures, names, read_json, read_model, read_tensors};
use crate::{Scratch, cli, peft};

/// The first command of the README, with an adapter of our own format.
#[test]
fn two_files_in_the_current_directory() {
    let scratch = Scratch::new();
    scratch.cli(&["convert", "lora", "--to", "lora", "-o", "adapter.safetensors"]).done();
    let ran = scratch.cli(&["merge", "base.safetensors", "adapter.safetensors"]).done();
    assert!(ran.stderr.starts_with("merged 1 targets into base-merged.safetensors: "));
    let merged = read_tensors(&scratch.path("base-merged.safetensors"));
    let base = read_tensors(&scratch.path("base.safetensors"));
    assert_eq!(merged["model.norm.weight"], base["model.norm.weight"]);
    assert_ne!(merged["model.layers.0.q.weight"], base["model.layers.0.q.weight"]);
    assert_eq!(merged.len(), base.len());
}

/// The same with PEFT's file and its configuration beside it, and with the directory.
#[test]
fn a_peft_file_with_its_configuration_beside() {
    let scratch = Scratch::new();
    let weights = "lora/adapter_model.safetensors";
    scratch.cli(&["merge", "base.safetensors", weights]).done();
    scratch.cli(&["merge", "base.safetensors", "lora", "-o", "again.safetensors"]).done();
    let read = |name| std::fs::read(scratch.path(name)).unwrap();
    assert_eq!(read("base-merged.safetensors"), read("again.safetensors"));
    let named = scratch.path("adapter.safetensors");
    std::fs::copy(scratch.path(weights), &named).unwrap();
    std::fs::copy(scratch.path("lora/adapter_config.json"), scratch.path("adapter_config.json"))
        .unwrap();
    scratch
        .cli(&["merge", "base.safetensors", "adapter.safetensors", "-o", "third.safetensors"])
        .done();
    assert_eq!(read("third.safetensors"), read("again.safetensors"));
}

#[test]
fn a_lost_configuration_needs_an_alpha() {
    let scratch = Scratch::new();
    std::fs::remove_file(scratch.path("lora/adapter_config.json")).unwrap();
    let before = scratch.names();
    let text = scratch.cli(&["merge", "base.safetensors", "lora"]).refused(scratch.root());
    assert_eq!(
        text,
        "error: lora/adapter_model.safetensors: no adapter_config.json beside it and no alpha \
         given: the scale alpha/rank is unknown\n\
         hint: give the alpha that the adapter was trained with: --alpha N\n"
    );
    assert_eq!(scratch.names(), before);
    let ran = scratch.cli(&["merge", "base.safetensors", "lora", "--alpha", "8", "--json"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(ran.stderr.contains("note: the adapter records no alpha: 8 is used, as given\n"));
    let report: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(report["targets"][0]["changes"][0]["scale"], 2.0);
}

/// A directory in gives a directory out that transformers loads as it is.
#[test]
fn a_directory_gives_a_directory() {
    let scratch = tempfile::tempdir().unwrap();
    let (base, adapter) = (peft("llama-vanilla/base"), peft("llama-vanilla/adapter"));
    cli(scratch.path(), &["merge", &base, &adapter, "-o", "out"]).done();
    let out = scratch.path().join("out");
    assert_eq!(names(&out), names(base.as_ref()));
    for name in ["config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"] {
        let (ours, theirs) = (out.join(name), fixtures().join(&base).join(name));
        assert_eq!(std::fs::read(ours).unwrap(), std::fs::read(theirs).unwrap(), "{name}");
    }
    let ran = cli(scratch.path(), &["merge", &base, &adapter, "--dtype", "f32", "-o", "wide"]);
    assert!(ran.done().stderr.contains("note: config.json: dtype: bfloat16 → float32\n"));
    let config = read_json(&scratch.path().join("wide/config.json"));
    assert_eq!(config["dtype"], "float32");

    let (base, adapter) = (peft("llama-sharded/base"), peft("llama-sharded/adapter"));
    let arguments = ["merge", &base, &adapter, "--dtype", "f32", "--max-shard-size", "10kB"];
    let ran = cli(scratch.path(), &[&arguments[..], &["-o", "shards"]].concat()).done();
    let out = scratch.path().join("shards");
    let shards = names(&out).iter().filter(|name| name.ends_with(".safetensors")).count();
    assert!(shards > 3, "{:?}", names(&out));
    let note = format!("note: re-sharded into {shards} files\n");
    assert!(ran.stderr.contains(&note), "{}", ran.stderr);
    assert_eq!(read_model(&out).len(), read_model(base.as_ref()).len());
}

#[test]
fn the_default_name_comes_from_the_base() {
    let scratch = Scratch::with_directory();
    for (number, (base, output)) in [
        ("../base.safetensors", "base-merged.safetensors"),
        ("../base", "base-merged/"),
        ("../base/../base/", "base-merged/"),
    ]
    .into_iter()
    .enumerate()
    {
        let elsewhere = scratch.path(&number.to_string());
        std::fs::create_dir(&elsewhere).unwrap();
        cli(&elsewhere, &["merge", base, "../lora", "--no-fsync"]).done();
        assert!(names(&elsewhere).iter().any(|name| name == output), "{base}");
    }
    // From inside the base, whose name is then not on the command line.
    cli(&scratch.path("base"), &["merge", ".", "../lora"]).done();
    assert!(scratch.path("base/base-merged/config.json").exists());
}

#[test]
fn a_snapshot_of_the_hubs_cache_is_named_after_its_model() {
    let scratch = Scratch::with_directory();
    let snapshot = "models--org--Tiny-Llama/snapshots/0123abcd";
    std::fs::create_dir_all(scratch.path("models--org--Tiny-Llama/snapshots")).unwrap();
    std::fs::rename(scratch.path("base"), scratch.path(snapshot)).unwrap();
    scratch.cli(&["merge", snapshot, "lora"]).done();
    assert!(scratch.path("Tiny-Llama-merged/config.json").exists());
}

/// The hub's cache holds links to blobs: they are followed, and the output holds files.
#[cfg(unix)]
#[test]
fn links_are_followed() {
    let scratch = Scratch::with_directory();
    std::fs::create_dir_all(scratch.path("blobs")).unwrap();
    for name in ["model.safetensors", "config.json"] {
        let blob = scratch.path("blobs").join(name.replace('.', "_"));
        std::fs::rename(scratch.path("base").join(name), &blob).unwrap();
        std::os::unix::fs::symlink(&blob, scratch.path("base").join(name)).unwrap();
    }
    scratch.cli(&["merge", "base", "lora"]).done();
    for name in ["model.safetensors", "config.json"] {
        let found = scratch.path("base-merged").join(name).symlink_metadata().unwrap();
        assert!(found.is_file(), "{name}");
    }
}

#[test]
fn a_dry_run_writes_nothing_and_prints_the_plan() {
    let scratch = Scratch::with_directory();
    let before = scratch.names();
    let ran = scratch.cli(&["merge", "base", "lora", "--dry-run"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert_eq!(scratch.names(), before);
    for part in [
        "base + lora (peft) → base-merged\n",
        "1 × model.layers.*.q.weight  [16, 24] BF16  LoRA out×in rank 4 scale 1\n",
        "1 targets, 1 tensors copied, 0 converted\n",
        " in 1 safetensors files, 1 other files\n",
        "memory: at most ",
    ] {
        assert!(ran.stdout.contains(part), "{part:?} is not in {}", ran.stdout);
    }
    let ran = scratch.cli(&["merge", "base", "lora", "--dry-run", "--json"]);
    let report: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(report["status"], "planned");
    assert!(report["memory_bound_bytes"].as_u64().unwrap() >= 64 << 20);
    assert_eq!(scratch.names(), before);
    // What a merge would refuse, a dry run refuses too.
    scratch.cli(&["merge", "base", "lora"]).done();
    let text = scratch.cli(&["merge", "base", "lora", "--dry-run"]).refused(scratch.root());
    assert!(text.contains("error: base-merged: already exists\n"), "{text}");
}

#[test]
fn the_summary_says_what_survived_and_what_helps() {
    let scratch = Scratch::new();
    let ran = scratch.cli(&["merge", "base.safetensors", "lora", "--scale", "1e-4"]).done();
    for part in [
        "realised delta: ",
        "warning: rounding LOST 100 % of the change: in 1 of 1 targets",
        "model.layers.0.q.weight (BF16): ",
    ] {
        assert!(ran.stderr.contains(part), "{part} is not in {}", ran.stderr);
    }
    // In this order.
    let places: Vec<usize> =
        ["--dtype f32", "--dtype f16", "serving the adapter unmerged", "--rounding stochastic"]
            .iter()
            .map(|help| ran.stderr.find(help).unwrap_or_else(|| panic!("{help}: {}", ran.stderr)))
            .collect();
    assert!(places.is_sorted(), "{}", ran.stderr);
    let ran =
        scratch.cli(&["merge", "base.safetensors", "lora", "--dtype", "f32", "-o", "w"]).done();
    assert!(!ran.stderr.contains("warning"), "{}", ran.stderr);
    // Warnings are said even when quiet, and nothing else.
    let ran = scratch
        .cli(&["merge", "base.safetensors", "lora", "--scale", "1e-4", "-q", "-o", "q"])
        .done();
    assert!(ran.stderr.starts_with("warning: rounding LOST"), "{}", ran.stderr);
    let ran = scratch.cli(&["merge", "base.safetensors", "lora", "-q", "-o", "quiet"]).done();
    assert_eq!(ran.stderr, "");
    let ran = scratch.cli(&["merge", "base.safetensors", "lora", "--scale", "0", "-o", "z"]).done();
    let expected = "warning: the adapter's delta is zero everywhere: the output equals the base\n";
    assert!(ran.stderr.ends_with(expected), "{}", ran.stderr);
}

#[test]
fn stochastic_rounding_is_repeatable() {
    let scratch = Scratch::new();
    let run = |seed: &str, threads: &str, output: &str| {
        let rounding = ["--rounding", "stochastic", "--seed", seed, "--threads", threads];
        let merge = ["merge", "base.safetensors", "lora", "-o", output];
        scratch.cli(&[&merge[..], &rounding[..]].concat()).done();
        std::fs::read(scratch.path(output)).unwrap()
    };
    let first = run("7", "1", "a");
    assert_eq!(run("7", "3", "b"), first);
    assert_ne!(run("8", "3", "c"), first);
}

#[test]
fn the_adapters_tokenizer_is_announced() {
    let scratch = Scratch::with_directory();
    std::fs::write(scratch.path("base/tokenizer.json"), "base").unwrap();
    std::fs::write(scratch.path("lora/tokenizer.json"), "adapter").unwrap();
    let read =
        |out: &str| std::fs::read_to_string(scratch.path(out).join("tokenizer.json")).unwrap();
    let ran = scratch.cli(&["merge", "base", "lora", "-o", "a"]).done();
    assert!(ran.stderr.contains("note: from the adapter: tokenizer.json\n"), "{}", ran.stderr);
    assert_eq!(read("a"), "adapter");
    scratch.cli(&["merge", "base", "lora", "-o", "b", "--tokenizer", "base"]).done();
    assert_eq!(read("b"), "base");
    std::fs::remove_file(scratch.path("lora/tokenizer.json")).unwrap();
    let text = scratch
        .cli(&["merge", "base", "lora", "-o", "c", "--tokenizer", "adapter"])
        .refused(scratch.root());
    assert_eq!(
        text,
        "error: lora: no tokenizer and no chat template comes with it\n\
         hint: --tokenizer auto takes the base's where there is none\n"
    );
}
