//! `unmerge` and `switch`: adapters out of a model that they were merged into.

use lora_format::Dtype;
use serde_json::{Value, json};

use crate::support::{
    Factors, Prng, Tensor, encode, listing, read_tensors, ulp, write_adapter, write_tensors,
};
use crate::{Ran, Scratch, feature, feature_path, features};

const WEIGHT: &str = "model.layers.0.q.weight";

fn json_of(ran: &Ran) -> Value {
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    serde_json::from_str(&ran.stdout).unwrap()
}

fn tensors(scratch: &Scratch, path: &str) -> std::collections::BTreeMap<String, Tensor> {
    let path = scratch.path(path);
    if path.is_dir() { crate::support::read_model(&path) } else { read_tensors(&path) }
}

/// A bf16 base of values around 0.93 and an adapter whose delta is exact: `rows × columns` of
/// multiples of 1/2048, zero in the first column.
fn exact(scratch: &Scratch) -> Vec<f64> {
    let (rows, cols) = (16, 24);
    let mut prng = Prng::new(5);
    let values: Vec<f64> = (0..rows * cols).map(|_| 0.93 + 0.07 * prng.unit()).collect();
    let base = [Tensor::new(WEIGHT, Dtype::Bf16, &[rows, cols], &values)];
    write_tensors(&scratch.path("exact.safetensors"), &base, &[]);
    let b: Vec<f64> = (0..rows).map(|row| (row as f64 - 3.5) / 16.0).collect();
    let a: Vec<f64> = (0..cols).map(|col| col as f64 / 64.0).collect();
    let factors = Factors {
        module: "model.layers.0.q".to_owned(),
        a: Tensor::new("", Dtype::F32, &[1, cols], &a),
        b: Tensor::new("", Dtype::F32, &[rows, 1], &b),
    };
    write_adapter(&scratch.path("exact"), &[factors], &json!({}));
    b.iter().flat_map(|b| a.iter().map(move |a| a * b)).collect()
}

/// The report against a count over every value that the dtype has there.
#[test]
fn what_rounding_left_is_counted() {
    let scratch = Scratch::new();
    let delta = exact(&scratch);
    scratch.cli(&["merge", "exact.safetensors", "exact", "-o", "m.safetensors"]).done();
    let merged = tensors(&scratch, "m.safetensors")[WEIGHT].bits();
    // All values of bf16 from 1/8 to 4, which are positive: their bits are in their order.
    let candidates = encode(0.125, Dtype::Bf16)..=encode(4.0, Dtype::Bf16);
    let value = |bits: u32| f64::from(f32::from_bits(bits << 16));
    let possible: Vec<Vec<u32>> = merged
        .iter()
        .zip(&delta)
        .map(|(&merged, delta)| {
            let gives = |bits: &u32| encode(value(*bits) + delta, Dtype::Bf16) == merged;
            candidates.clone().filter(gives).collect()
        })
        .collect();
    let changed: Vec<usize> = (0..delta.len()).filter(|&at| delta[at] != 0.0).collect();
    assert_eq!(changed.len(), 16 * 23);
    let exact = changed.iter().filter(|&&at| possible[at].len() == 1).count();
    assert!(exact > 50 && exact + 50 < changed.len(), "{exact}: a weak test");

    let ran = scratch.cli(&["unmerge", "m.safetensors", "exact", "-o", "u", "--json"]);
    let report = json_of(&ran);
    let undone = json!({
        "elements": changed.len(),
        "exact": exact,
        "ambiguous": changed.len() - exact,
        "impossible": 0,
    });
    assert_eq!(report["targets"][0]["undone"], undone);
    let share = |part: usize| 100.0 * part as f64 / changed.len() as f64;
    let line = format!(
        "  taken out: if it was merged with this weight, {:.2} % of the changed elements are what \
         they were before, {:.2} % cannot be told from a neighbour\n",
        share(exact),
        share(changed.len() - exact),
    );
    assert!(ran.stderr.ends_with(&line), "{} does not end in {line}", ran.stderr);
    let base = tensors(&scratch, "exact.safetensors")[WEIGHT].bits();
    let undone = tensors(&scratch, "u")[WEIGHT].bits();
    for at in 0..delta.len() {
        let allowed = if delta[at] == 0.0 { vec![merged[at]] } else { possible[at].clone() };
        assert!(allowed.contains(&base[at]) && allowed.contains(&undone[at]), "{at}");
    }
}

/// What f32 holds of a bf16 base and a delta is enough to find every value again.
#[test]
fn by_way_of_f32_nothing_is_lost() {
    let scratch = Scratch::new();
    scratch.cli(&["merge", "base.safetensors", "lora@0.7", "--dtype", "f32", "-o", "m"]).done();
    scratch.cli(&["unmerge", "m", "lora@0.7", "--dtype", "bf16", "-o", "u"]).done();
    assert_eq!(tensors(&scratch, "u"), tensors(&scratch, "base.safetensors"));
    // And --scale is one of the weights.
    let scale = ["--scale", "0.7", "--dtype", "bf16", "-o", "s"];
    scratch.cli(&[&["unmerge", "m", "lora"], &scale[..]].concat()).done();
    assert_eq!(tensors(&scratch, "s"), tensors(&scratch, "base.safetensors"));
}

/// An f32 model comes back up to the spacing of what was merged.
#[test]
fn several_adapters_come_out_of_an_f32_model() {
    let scratch = Scratch::new();
    let adapters = ["two-lora/adapter-a", "two-lora/adapter-b"].map(feature);
    let [a, b] = [format!("{}@0.7", adapters[0]), format!("{}@0.3", adapters[1])];
    let base = feature("bases/llama");
    scratch.cli(&["merge", &base, &a, &b, "-o", "m"]).done();
    let report = json_of(&scratch.cli(&["unmerge", "m", &a, &b, "-o", "u", "--json"]));
    let (before, merged, after) = (
        crate::support::read_model(&feature_path("bases/llama")),
        tensors(&scratch, "m"),
        tensors(&scratch, "u"),
    );
    let mut differ = 0;
    let mut elements = 0;
    for (name, before) in &before {
        let (merged, after) = (merged[name].values(), after[name].values());
        for ((before, merged), after) in before.values().into_iter().zip(merged).zip(after) {
            elements += u64::from(before != merged);
            differ += u64::from(before != after);
            let step = ulp(before.abs().max(merged.abs()), Dtype::F32);
            assert!((before - after).abs() <= step, "{name}: {after} for {before}");
        }
    }
    let count = |field: &str| -> u64 {
        let targets = report["targets"].as_array().unwrap().iter();
        targets.map(|target| target["undone"][field].as_u64().unwrap()).sum()
    };
    assert_eq!(count("elements"), elements);
    assert_eq!(count("impossible"), 0);
    // Only what the report calls ambiguous can be off.
    assert!(differ <= count("ambiguous") && differ > 0, "{differ}");
    assert_eq!(count("exact") + count("ambiguous"), elements);
}

/// One pass and one rounding.
#[test]
fn switched_is_unmerged_and_merged() {
    let scratch = Scratch::new();
    let mut prng = Prng::new(8);
    let other = Factors::random(&mut prng, "model.layers.0.q", (16, 24, 2), Dtype::F32, 0.3);
    write_adapter(&scratch.path("other"), &[other], &json!({}));
    scratch.cli(&["merge", "base.safetensors", "lora@0.5", "--dtype", "f32", "-o", "m"]).done();
    let ran = scratch
        .cli(&["switch", "m", "--from", "lora@0.5", "--to", "other@2", "--dtype", "bf16", "-q"]);
    assert_eq!(ran.done().stderr, "");
    scratch.cli(&["merge", "base.safetensors", "other@2", "-o", "wanted"]).done();
    assert_eq!(tensors(&scratch, "m-switched.safetensors"), tensors(&scratch, "wanted"));
    // To the adapter that it holds.
    scratch.cli(&["merge", "base.safetensors", "lora", "-o", "bf16"]).done();
    scratch.cli(&["switch", "bf16", "--from", "lora", "--to", "lora", "-o", "same"]).done();
    assert_eq!(tensors(&scratch, "same"), tensors(&scratch, "bf16"));
    // What is put in may be saved in full.
    let (a, saved) = (feature("two-lora/adapter-a"), feature("modules-to-save/adapter"));
    let base = feature("bases/llama");
    scratch.cli(&["merge", &base, &a, "-o", "a"]).done();
    scratch.cli(&["switch", "a", "--from", &a, "--to", &saved, "-o", "b"]).done();
    let expected = read_tensors(&feature_path("modules-to-save/expected_f64.safetensors"));
    let switched = tensors(&scratch, "b");
    for (name, expected) in expected {
        for (ours, theirs) in switched[&name].values().into_iter().zip(expected.values()) {
            assert!((ours - theirs).abs() <= 5e-7, "{name}: {ours} for {theirs}");
        }
    }
}

#[test]
fn the_default_name_says_what_was_done() {
    let scratch = Scratch::with_directory();
    scratch.cli(&["unmerge", "base.safetensors", "lora"]).done();
    scratch.cli(&["unmerge", "base", "lora"]).done();
    scratch.cli(&["switch", "base", "--from", "lora", "--to", "lora@2"]).done();
    for path in
        ["base-unmerged.safetensors", "base-unmerged/config.json", "base-switched/config.json"]
    {
        assert!(scratch.path(path).is_file(), "{path}: {:?}", scratch.names());
    }
    let ran = scratch.cli(&["unmerge", "base", "lora", "-o", "x"]).done();
    assert!(ran.stderr.starts_with("unmerged 1 targets into x: "), "{}", ran.stderr);
    let ran = scratch.cli(&["switch", "base", "--from", "lora", "--to", "lora@2", "-o", "y"]);
    assert!(ran.done().stderr.starts_with("switched 1 targets into y: "));
    let ran = scratch.cli(&["unmerge", "base", "lora@2", "-o", "z", "--dry-run"]);
    assert!(ran.stdout.contains("rank 4 scale -2\n"), "{}", ran.stdout);
}

/// The copy of the base that PEFT saves beside the factors of an embedding is no change.
#[test]
fn copies_of_the_base_are_not_taken_out() {
    let scratch = Scratch::new();
    let (base, adapter) = (feature("bases/llama"), feature("embedding-saved-base/adapter"));
    scratch.cli(&["merge", &base, &adapter, "-o", "m"]).done();
    scratch.cli(&["unmerge", "m", &adapter, "-o", "u"]).done();
    let (before, merged) =
        (crate::support::read_model(&feature_path("bases/llama")), tensors(&scratch, "m"));
    for (name, after) in tensors(&scratch, "u") {
        let pairs = before[&name].values().into_iter().zip(merged[&name].values());
        for ((before, merged), after) in pairs.zip(after.values()) {
            let step = ulp(before.abs().max(merged.abs()), Dtype::F32);
            assert!((before - after).abs() <= step, "{name}: {after} for {before}");
        }
    }
}

const AFRESH: &str =
    "hint: only the base that it was merged into has what was there: merge into that afresh\n";

/// Methods whose change depends on the weight, and what was saved in full.
#[test]
fn what_cannot_be_taken_out_is_refused_by_name() {
    let scratch = Scratch::new();
    let before = listing(scratch.root());
    let features = features();
    let refusal = |arguments: &[&str]| {
        let text = scratch.cli(arguments).refused(&features);
        assert_eq!(listing(scratch.root()), before, "something was written");
        text
    };
    let unmerge = |base: &str, adapter: &str| {
        refusal(&["unmerge", &feature(base), &feature(adapter), "-o", "x"])
    };
    assert_eq!(
        unmerge("bases/llama", "dora-linear/adapter"),
        format!(
            "error: dora-linear/adapter does not fit bases/llama: 2 problems\n  \
             - `model.layers.0.mlp.down_proj.weight`: DoRA depends on the weight as it was before \
             the merge\n  \
             - `model.layers.0.self_attn.q_proj.weight`: DoRA depends on the weight as it was \
             before the merge\n{AFRESH}"
        )
    );
    let text = unmerge("bases/llama-bias", "ia3/adapter");
    for parameter in ["self_attn.k_proj.bias", "self_attn.k_proj.weight", "mlp.down_proj.weight"] {
        let line = format!(
            "  - `model.layers.0.{parameter}`: IA³ depends on the weight as it was before the \
             merge\n"
        );
        assert!(text.contains(&line), "{text}");
    }
    for (case, method) in
        [("hira", "HiRA"), ("hra", "HRA"), ("boft", "BOFT"), ("oft", "OFT"), ("miss-bat", "MiSS")]
    {
        let base = if case.starts_with('h') { "bases/layers" } else { "bases/llama" };
        let text = unmerge(base, &format!("{case}/adapter"));
        let reason = format!("`: {method} depends on the weight as it was before the merge\n");
        assert!(text.contains(&reason) && text.ends_with(AFRESH), "{case}: {text}");
    }
    for (adapter, parameter) in
        [("modules-to-save", "lm_head.weight"), ("tokens", "model.embed_tokens.weight")]
    {
        assert_eq!(
            unmerge("bases/llama", &format!("{adapter}/adapter")),
            format!(
                "error: {adapter}/adapter does not fit bases/llama: `{parameter}`: the adapter \
                 replaced it, and the merged model no longer has what was there before\n{AFRESH}"
            )
        );
    }
    // Nor can a method that needs the weight be put where another is taken out in the same pass.
    let (lora, dora) = (feature("two-lora/adapter-a"), feature("dora-linear/adapter"));
    let text =
        refusal(&["switch", &feature("bases/llama"), "--from", &lora, "--to", &dora, "-o", "x"]);
    let line = "`model.layers.0.self_attn.q_proj.weight`: DoRA depends on the weight as it was \
                before the merge\n";
    assert!(text.contains(line) && text.ends_with(AFRESH), "{text}");
}

#[test]
fn an_adapter_that_was_never_merged_is_noticed() {
    let scratch = Scratch::new();
    let (base, adapter) = (feature("bases/llama-bf16"), feature("two-lora-overlap/adapter-a"));
    scratch.cli(&["merge", &base, &adapter, "-o", "m"]).done();
    let ran = scratch.cli(&["unmerge", "m", &adapter, "-o", "right"]).done();
    assert!(!ran.stderr.contains("warning") && !ran.stderr.contains("fit no"), "{}", ran.stderr);
    let ran = scratch.cli(&["unmerge", "m", &format!("{adapter}@3"), "-o", "weight"]).done();
    let warning = "warning: 18.5 % of the elements are no result of merging this adapter with this \
                   weight into any BF16 model: was it merged at all, and with this weight?\n";
    assert!(ran.stderr.ends_with(warning), "{}", ran.stderr);
    assert!(ran.stderr.contains(", 18.52 % fit no value\n"), "{}", ran.stderr);
    let other = feature("three-lora/adapter-c");
    let ran = scratch.cli(&["unmerge", "m", &other, "-o", "other", "-q", "--json"]);
    let report = json_of(&ran);
    let warning = "of the elements are no result of merging this adapter";
    assert!(ran.stderr.contains(warning), "a warning is said even when quiet: {}", ran.stderr);
    let warnings = report["warnings"].as_array().unwrap();
    assert!(warnings.iter().any(|text| text.as_str().unwrap().contains(warning)), "{warnings:?}");
}
