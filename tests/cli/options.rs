//! What the user may say that no file does: `--alpha` and `--enable-lora` for loralib,
//! `--moe-layout` for stacks of experts, `--residual-base`.

use crate::support::{copy_directory, read_json, read_model, read_tensors, write_json};
use crate::{Scratch, feature, feature_path, features};

/// The merged model is the case's expectation.
fn is_expected(scratch: &Scratch, output: &str, case: &str) {
    let merged = read_model(&scratch.path(output));
    let expected = read_tensors(&feature_path(case).join("expected_f64.safetensors"));
    assert!(!expected.is_empty());
    for (name, expected) in expected {
        for (ours, theirs) in merged[&name].values().into_iter().zip(expected.values()) {
            assert!((ours - theirs).abs() <= 5e-7, "{case}: {name}: {ours} for {theirs}");
        }
    }
}

#[test]
fn loralib_needs_an_alpha_and_the_groups_that_were_trained() {
    let scratch = Scratch::new();
    let base = feature("bases/loralib");
    let merge = |case: &str, more: &[&str]| {
        let adapter = feature(&format!("{case}/adapter/adapter.safetensors"));
        scratch.cli(&[&["merge", &base, &adapter][..], more].concat())
    };
    assert_eq!(
        merge("loralib-linear", &["-o", "x"]).refused(&features()),
        "error: loralib-linear/adapter/adapter.safetensors: no adapter_config.json beside it and \
         no alpha given: the scale alpha/rank is unknown\n\
         hint: give the alpha that the adapter was trained with: --alpha N\n"
    );
    let ran = merge("loralib-linear", &["--alpha", "6", "-o", "linear"]).done();
    let note = "note: the adapter records no alpha: 6 is used, as given\n";
    assert!(ran.stderr.starts_with(note), "{}", ran.stderr);
    is_expected(&scratch, "linear", "loralib-linear");

    let fused = "loralib-merged-linear";
    let text = merge(fused, &["--alpha", "6", "-o", "x"]).refused(&features());
    let problem = "`qkv.weight`: the adapter has factors for some groups of its rows, and no file \
                   says for which\n";
    let hint = "hint: say which groups were trained, as loralib's enable_lora does: --enable-lora \
                true,false,true\n";
    assert!(text.contains(problem) && text.ends_with(hint), "{text}");
    let groups = ["--alpha", "6", "-o", "fused", "--enable-lora", "true,false,true"];
    merge(fused, &groups).done();
    is_expected(&scratch, "fused", fused);
    let groups = ["--alpha", "6", "-o", "other", "--enable-lora", "true,true,false"];
    merge(fused, &groups).done();
    assert_ne!(read_model(&scratch.path("fused")), read_model(&scratch.path("other")));
    let groups = ["--alpha", "6", "-o", "x", "--enable-lora", "true,true,true"];
    let text = merge(fused, &groups).refused(&features());
    let problem = "`qkv`: the factors of 2 fused groups, and the 3 that enable_lora names do not \
                   fit them\n";
    assert!(text.ends_with(problem), "{text}");
    // Where every group has factors, none needs to be named.
    merge("loralib-merged-linear-all", &["--alpha", "6", "-o", "all"]).done();
    is_expected(&scratch, "all", "loralib-merged-linear-all");
    // What means nothing is not passed over.
    let (base, adapter) = (feature("bases/llama"), feature("two-lora/adapter-a"));
    assert_eq!(
        scratch
            .cli(&["merge", &base, &adapter, "--enable-lora", "true,false", "-o", "x"])
            .refused(&features()),
        "error: two-lora/adapter-a/adapter_model.safetensors: no enable_lora can be given for it: \
         only loralib has fused projections\n"
    );
    assert!(!scratch.path("x").exists());
}

/// Square experts show nothing; the release that wrote them does, and without it the user must.
#[test]
fn a_stack_of_experts_that_tells_nothing_needs_a_layout() {
    let scratch = Scratch::new();
    let case = "moe-layout-peft-018-square";
    let base = feature("bases/mixtral-fused-square");
    copy_directory(&feature_path(case).join("adapter"), &scratch.path("a"));
    scratch.cli(&["merge", &base, "a", "-o", "told"]).done();
    is_expected(&scratch, "told", case);
    let path = scratch.path("a/adapter_config.json");
    let mut config = read_json(&path);
    config.as_object_mut().unwrap().remove("peft_version").unwrap();
    write_json(&path, &config);
    let names = "peft, peft-0.19.0, peft-0.18, block-wise, block-wise-0.19.0, block-wise-0.18";
    assert_eq!(
        scratch.cli(&["merge", &base, "a", "-o", "x"]).refused(&features()),
        format!(
            "error: a does not fit bases/mixtral-fused-square: `model.layers.*.mlp.experts`: the \
             shapes fit A with the experts' inputs as well as with their outputs, and the files \
             do not say which it has; say how it is laid out with --moe-layout: {names}\n"
        )
    );
    assert!(!scratch.path("x").exists());
    let layout = |layout: &str| {
        scratch.cli(&["merge", &base, "a", "-o", layout, "--moe-layout", layout]).done();
        read_model(&scratch.path(layout))
    };
    let old = layout("peft-0.18");
    assert_eq!(old, read_model(&scratch.path("told")));
    assert_ne!(layout("peft"), old);
    let text = scratch
        .cli(&["merge", &base, "a", "-o", "x", "--moe-layout", "nonsense"])
        .refused(&features());
    assert!(text.contains(&format!("[possible values: {names}]\n")), "{text}");
}

#[test]
fn the_residual_base_is_taken_on_the_users_word() {
    let scratch = Scratch::new();
    let adapter = feature("pissa-raw/adapter");
    let merge = |base: &str, more: &[&str]| {
        scratch.cli(&[&["merge", &feature(base), &adapter][..], more].concat())
    };
    assert_eq!(
        merge("bases/llama", &["-o", "x"]).refused(&features()),
        "error: pissa-raw/adapter/adapter_config.json: the adapter uses what this version does not \
         implement: `init_lora_weights`: \"pissa\": this initialisation changes the base model \
         itself, so the factors are only valid on that changed base; convert the adapter with \
         PEFT's `path_initial_model_for_weight_conversion`, or give the changed base and \
         --residual-base\n"
    );
    let ran = merge("bases/llama-pissa", &["-o", "out", "--residual-base"]).done();
    let note = "note: the initialisation \"pissa\" changed the base before training; the base \
                given is taken for the changed one, as asked\n";
    assert!(ran.stderr.contains(note), "{}", ran.stderr);
    is_expected(&scratch, "out", "pissa-residual");
}
