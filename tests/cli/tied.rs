//! `--tied`: an adapter changes one of two names of one tensor.

use std::collections::BTreeMap;

use crate::support::{Tensor, read_json, read_model, read_tensors};
use crate::{Scratch, feature, feature_path, features};

const HEAD: &str = "lm_head.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";

const TIED: &str = "the base ties its output head to its input embedding \
                    (`model.embed_tokens.weight` is the only copy), so a change of one would \
                    change the other";
const HINT: &str = "hint: --tied untie writes both tensors and changes only the trained one, which \
                    is what the adapter computes unmerged (a larger model; tie_word_embeddings \
                    becomes false); --tied both changes what they share, as PEFT's merge does with LoRA\n";

fn merge(scratch: &Scratch, case: &str, more: &[&str]) -> crate::Ran {
    let (base, adapter) = (feature("bases/llama-tied"), feature(&format!("{case}/adapter")));
    scratch.cli(&[&["merge", &base, &adapter][..], more].concat())
}

fn close(merged: &BTreeMap<String, Tensor>, expected: &BTreeMap<String, Tensor>) {
    assert!(!expected.is_empty());
    for (name, expected) in expected {
        for (ours, theirs) in merged[name].values().into_iter().zip(expected.values()) {
            assert!((ours - theirs).abs() <= 5e-7, "{name}: {ours} for {theirs}");
        }
    }
}

#[test]
fn what_would_change_both_is_refused_and_explained() {
    let scratch = Scratch::new();
    let before = scratch.names();
    for (case, module) in [("tied-embedding", "model.embed_tokens"), ("tied-head", "lm_head")] {
        for more in [&["-o", "x"][..], &["-o", "x", "--tied", "refuse"], &["--dry-run"]] {
            assert_eq!(
                merge(&scratch, case, more).refused(&features()),
                format!(
                    "error: {case}/adapter does not fit bases/llama-tied: `{module}`: {TIED}\n{HINT}"
                )
            );
        }
    }
    assert_eq!(
        merge(&scratch, "tied-embedding-and-head", &["-o", "x"]).refused(&features()),
        format!(
            "error: tied-embedding-and-head/adapter does not fit bases/llama-tied: 2 problems\n  \
             - `lm_head`: {TIED}\n  - `model.embed_tokens`: {TIED}\n{HINT}"
        )
    );
    assert_eq!(scratch.names(), before, "something was written");
}

#[test]
fn untied_both_tensors_are_written() {
    let base = read_model(&feature_path("bases/llama-tied"));
    assert!(!base.contains_key(HEAD));
    for (case, changed, kept) in [
        ("tied-embedding", EMBEDDING, Some(HEAD)),
        ("tied-head", HEAD, Some(EMBEDDING)),
        ("tied-embedding-and-head", EMBEDDING, None),
    ] {
        let scratch = Scratch::new();
        let ran = merge(&scratch, case, &["--tied", "untie", "-o", "out"]).done();
        let notes = "note: the output gains `lm_head.weight` [16, 12]\n\
                     note: input embedding and output head are no longer tied\n\
                     note: config.json: tie_word_embeddings: true → false\n";
        assert!(ran.stderr.starts_with(notes), "{case}: {}", ran.stderr);
        let merged = read_model(&scratch.path("out"));
        assert_eq!(merged.len(), base.len() + 1, "{case}");
        close(&merged, &read_tensors(&feature_path(case).join("expected_untie.safetensors")));
        assert_ne!(merged[changed].data, base[EMBEDDING].data, "{case}");
        if let Some(kept) = kept {
            assert_eq!(merged[kept].data, base[EMBEDDING].data, "{case}");
        }
        let config = read_json(&scratch.path("out/config.json"));
        assert_eq!(config["tie_word_embeddings"], false, "{case}");
    }
}

#[test]
fn both_change_what_they_share() {
    let base = read_model(&feature_path("bases/llama-tied"));
    for case in ["tied-embedding", "tied-head", "tied-embedding-and-head"] {
        let scratch = Scratch::new();
        let ran = merge(&scratch, case, &["--tied", "both", "-o", "out"]).done();
        assert!(!ran.stderr.contains("note: "), "{case}: {}", ran.stderr);
        let merged = read_model(&scratch.path("out"));
        assert_eq!(merged.len(), base.len(), "{case}");
        close(&merged, &read_tensors(&feature_path(case).join("expected_both.safetensors")));
        assert_ne!(merged[EMBEDDING].data, base[EMBEDDING].data, "{case}");
        let config = read_json(&scratch.path("out/config.json"));
        assert_eq!(config, read_json(&feature_path("bases/llama-tied/config.json")), "{case}");
    }
}

#[test]
fn the_report_says_it() {
    let scratch = Scratch::new();
    for (choice, untied, targets) in
        [("untie", true, vec![HEAD, EMBEDDING]), ("both", false, vec![EMBEDDING])]
    {
        let ran = merge(&scratch, "tied-embedding", &["--tied", choice, "-o", choice, "--json"]);
        let report: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
        assert_eq!(report["untied"], untied);
        let tables: Vec<&serde_json::Value> = report["targets"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|target| targets.iter().any(|&name| target["parameter"] == name))
            .collect();
        assert_eq!(tables.len(), targets.len());
        if untied {
            // The head is new, and nothing changes it.
            assert_eq!(tables[0]["changes"], serde_json::json!([]));
            assert_eq!(tables[0]["base_dtype"], serde_json::Value::Null);
        }
    }
}

/// Where an adapter keeps the two tied by itself there is nothing to decide.
#[test]
fn adapters_that_keep_them_tied_merge_without_a_choice() {
    let base = read_model(&feature_path("bases/llama-tied"));
    for case in ["tokens-tied", "vocabulary-tied"] {
        let scratch = Scratch::new();
        merge(&scratch, case, &["-o", "out"]).done();
        let merged = read_model(&scratch.path("out"));
        assert_eq!(merged.len(), base.len(), "{case}");
        close(&merged, &read_tensors(&feature_path(case).join("expected_f64.safetensors")));
        let config = read_json(&scratch.path("out/config.json"));
        assert_eq!(config["tie_word_embeddings"], true, "{case}");
    }
}
