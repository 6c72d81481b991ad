//! `lora-cli inspect`: adapters and models, from headers alone.

use crate::support::fixtures;
use crate::{Scratch, cli, peft};

fn inspect(path: &str) -> String {
    let ran = cli(&fixtures(), &["inspect", path]);
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""));
    ran.stdout
}

#[test]
fn an_adapter_in_peft_format() {
    let text = inspect("peft/llama-vanilla/adapter");
    assert!(text.starts_with("peft/llama-vanilla/adapter: adapter, format peft\n14 targets, "));
    for part in [
        "base: lora-fixtures/llama-vanilla, without a fingerprint\n",
        "2 × model.layers.*.self_attn.q_proj  LoRA  32 → 32  rank 8  alpha 16  scale 2  F32\n",
        "2 × model.layers.*.mlp.down_proj     ",
    ] {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
    let file = inspect("peft/llama-vanilla/adapter/adapter_model.safetensors");
    assert!(file.contains("\n14 targets, "), "{file}");
}

#[test]
fn an_adapter_in_our_format() {
    let text = inspect("native/plain.safetensors");
    assert!(text.starts_with("native/plain.safetensors: adapter, format lora 1.0\n"));
}

#[test]
fn models() {
    let text = inspect("peft/llama-vanilla/base");
    assert!(text.starts_with("peft/llama-vanilla/base: model, llama\n21 tensors, "), "{text}");
    assert!(text.contains(" in 1 file\n  BF16: "), "{text}");
    assert!(text.contains("2 × model.layers.*.self_attn.q_proj.weight"), "{text}");
    let text = inspect("peft/llama-sharded/base");
    assert!(text.contains(" in 3 files\n  F16: "), "{text}");
    let text = inspect("peft/llama-vanilla/base/model.safetensors");
    assert!(text.contains("21 tensors, "), "{text}");
}

/// Headers alone: data that is not there is not missed, as long as its length is.
#[cfg(unix)]
#[test]
fn data_is_not_read() {
    let scratch = Scratch::new();
    let path = scratch.path("huge.safetensors");
    let bytes: u64 = 1 << 40;
    let header =
        format!(r#"{{"w":{{"dtype":"F32","shape":[{}],"data_offsets":[0,{bytes}]}}}}"#, bytes / 4);
    let mut start = (header.len() as u64).to_le_bytes().to_vec();
    start.extend_from_slice(header.as_bytes());
    std::fs::write(&path, &start).unwrap();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    if file.set_len(start.len() as u64 + bytes).is_err() {
        println!("skipped: no sparse files of 1 TB here");
        return;
    }
    let began = std::time::Instant::now();
    let ran = scratch.cli(&["inspect", "huge.safetensors"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(ran.stdout.contains("1 tensors, 274877906944 parameters, 1099.51 GB in 1 file\n"));
    assert!(began.elapsed().as_secs() < 20);
}

#[test]
fn a_digest_is_intact_or_the_status_is_1() {
    let scratch = Scratch::new();
    scratch.cli(&["convert", "lora", "--to", "lora", "-o", "own.safetensors"]).done();
    let ran = scratch.cli(&["inspect", "own.safetensors", "--verify"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(ran.stdout.contains("digest: intact (sha256:"), "{}", ran.stdout);

    // One bit of a factor: still a well-formed adapter.
    let path = scratch.path("own.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[8 + header + 12] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let ran = scratch.cli(&["inspect", "own.safetensors", "--verify"]);
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    assert!(ran.stdout.contains("digest: DAMAGED\n  recorded sha256:"), "{}", ran.stdout);
    assert_eq!(scratch.cli(&["inspect", "own.safetensors"]).code, Some(0));
    // The damage is neither merged nor sealed under a new digest.
    for arguments in [
        &["merge", "base.safetensors", "own.safetensors", "-o", "x"][..],
        &["convert", "own.safetensors", "--to", "lora", "-o", "x"],
        &["stamp", "own.safetensors", "--base", "base.safetensors", "-o", "x"],
    ] {
        let text = scratch.cli(arguments).refused(scratch.root());
        assert!(
            text.contains("error: own.safetensors: damaged: its data has the digest"),
            "{text}"
        );
    }
    let ran = scratch.cli(&["inspect", "own.safetensors", "--verify", "--json"]);
    assert_eq!(ran.code, Some(1));
    let report: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(report["digest"]["intact"], false);
}

#[test]
fn only_our_format_has_a_digest() {
    let scratch = Scratch::new();
    assert_eq!(
        scratch.cli(&["inspect", "lora", "--verify"]).refused(scratch.root()),
        "error: lora: an adapter of format peft records no digest\n\
         hint: a file of our own format does: lora-cli convert ADAPTER --to lora -o FILE\n"
    );
    assert_eq!(
        scratch.cli(&["inspect", "base.safetensors", "--verify"]).refused(scratch.root()),
        "error: base.safetensors: a model records no digest to verify\n"
    );
}

#[test]
fn what_is_neither_is_said_to_be_neither() {
    let scratch = Scratch::new();
    std::fs::create_dir(scratch.path("empty")).unwrap();
    std::fs::write(scratch.path("model.gguf"), "GGUF").unwrap();
    assert_eq!(
        scratch.cli(&["inspect", "empty"]).refused(scratch.root()),
        "error: empty: neither an adapter (adapter_model.safetensors) nor a model \
         (model.safetensors, model.safetensors.index.json or a single *.safetensors file)\n\
         hint: PEFT saves adapters with names of their own in subdirectories\n"
    );
    assert_eq!(
        scratch.cli(&["inspect", "nowhere"]).refused(scratch.root()),
        "error: nowhere: no such file or directory\n"
    );
    assert_eq!(
        scratch.cli(&["inspect", "model.gguf"]).refused(scratch.root()),
        "error: model.gguf: not a valid GGUF file: the file ends within its version, after 4 bytes \
         (truncated?)\n"
    );
}

/// What cannot be merged can still be looked at, and is said to be unmergeable.
#[test]
fn an_adapter_that_cannot_be_merged_is_listed() {
    let scratch = Scratch::new();
    let ran = cli(scratch.root(), &["inspect", &peft("unsupported/alora")]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(ran.stdout.contains("lora_A.weight"), "{}", ran.stdout);
    assert!(
        ran.stdout.contains("`alora_invocation_tokens`: [5,6]: an activated"),
        "{}",
        ran.stdout
    );
}

/// Methods other than LoRA show their tensors.
#[test]
fn every_method_is_shown() {
    let scratch = Scratch::new();
    let shown = |case: &str| cli(scratch.root(), &["inspect", &peft(case)]).stdout;
    let text = shown("unsupported/dora");
    assert!(text.contains("q_proj  DoRA  16 → 16  rank 2  alpha 4  scale 2  F32\n"), "{text}");
    let text = shown("unsupported/ia3");
    assert!(text.contains("  IA³  F32 ["), "{text}");
}
