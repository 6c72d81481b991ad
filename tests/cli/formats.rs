//! Adapters of every format: converted, merged, checked; their metadata.

use std::path::Path;

use serde_json::Value;

use crate::support::{Tensor, fixtures, names, read_metadata, read_tensors, write_tensors};
use crate::{Ran, Scratch, cli, feature, peft, text};

fn of(path: &str) -> String {
    text(&fixtures().join(path)).to_owned()
}

/// All weights of a merged model.
fn merged(root: &Path, base: &str, adapter: &[&str]) -> Vec<u8> {
    let mut arguments = vec!["merge", base];
    arguments.extend(adapter);
    arguments.extend(["-o", "merged", "-q", "--force"]);
    cli(root, &arguments).done();
    let merged = root.join("merged");
    if merged.is_file() {
        return std::fs::read(&merged).unwrap();
    }
    let weights = names(&merged).into_iter().filter(|name| name.ends_with(".safetensors"));
    weights.flat_map(|name| std::fs::read(merged.join(name)).unwrap()).collect()
}

#[test]
fn a_language_models_adapter_goes_through_every_format() {
    let scratch = tempfile::tempdir().unwrap();
    let root = scratch.path();
    let (base, adapter) = (peft("llama-vanilla/base"), peft("llama-vanilla/adapter"));
    let expected = merged(root, &base, &[&adapter]);
    for (format, output, more) in [
        ("lora", "own.safetensors", vec![]),
        ("gguf", "adapter.gguf", vec![]),
        ("mlx", "mlx", vec![]),
        ("torchtune", "torchtune", vec![]),
        ("loralib", "loralib.safetensors", vec!["--alpha", "16"]),
    ] {
        let converted =
            ["convert", &adapter, "--to", format, "--base", &base, "-o", output, "--no-fsync"];
        let said = cli(root, &converted).done().stderr;
        assert!(said.contains(&format!("(peft), wrote {output} ({format})")), "{said}");
        let mut again = vec![output];
        again.extend(more.clone());
        assert_eq!(merged(root, &base, &again), expected, "{format}");
        let back = format!("{format}-back");
        let mut arguments = vec!["convert", output, "--to", "peft", "--base", &base, "-o", &back];
        arguments.extend(more);
        cli(root, &arguments).done();
        assert_eq!(merged(root, &base, &[&back]), expected, "{format} and back");
        let inspected = cli(root, &["inspect", &back]);
        assert_eq!(inspected.code, Some(0));
    }
}

#[test]
fn an_image_models_adapter_goes_through_ours_and_back() {
    let scratch = tempfile::tempdir().unwrap();
    let root = scratch.path();
    let base = of("kohya/base.safetensors");
    for case in ["locon", "locon-tucker", "loha-dora", "lokr", "ia3", "full"] {
        let adapter = of(&format!("kohya/{case}/adapter.safetensors"));
        cli(root, &["convert", &adapter, "--to", "lora", "-o", "own", "--force"]).done();
        cli(root, &["convert", "own", "--to", "kohya", "-o", "back", "--force"]).done();
        let (before, after) = (read_tensors(Path::new(&adapter)), read_tensors(&root.join("back")));
        for (name, tensor) in &before {
            // An alpha beside what has no scale means nothing.
            let Some(found) = after.get(name) else {
                assert!(name.ends_with(".alpha"), "{case}: {name}");
                continue;
            };
            let scalar = tensor.shape.iter().product::<usize>() == 1;
            assert!(found == tensor || scalar, "{case}: {name}");
        }
        let expected = merged(root, &base, &[&adapter]);
        assert_eq!(merged(root, &base, &["own"]), expected, "{case}");
        assert_eq!(merged(root, &base, &["back"]), expected, "{case}");
    }
}

#[test]
fn what_a_format_cannot_hold_is_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let root = scratch.path();
    let refused = |arguments: &[&str]| cli(root, arguments).refused(root);
    let dora = feature("dora-linear/adapter");
    let error = refused(&["convert", &dora, "--to", "loralib", "-o", "x"]);
    assert!(error.contains("loralib cannot hold a change of") && error.contains("DoRA"), "{error}");
    let llama = peft("llama-vanilla/adapter");
    let error = refused(&["convert", &llama, "--to", "gguf", "-o", "x"]);
    assert!(error.contains("the base's config.json is needed"), "{error}");
    assert!(error.contains("--base MODEL"), "{error}");
    let error = refused(&["convert", &llama, "--to", "kohya", "-o", "x"]);
    assert!(error.contains("no names of kohya for it"), "{error}");
    // Every module its own scale: one alpha is not enough, unless it may be rounded.
    let patterns = peft("llama-patterns/adapter");
    let base = peft("llama-patterns/base");
    let arguments = ["convert", &patterns, "--to", "mlx", "--base", &base, "-o", "x"];
    let error = refused(&arguments);
    assert!(error.contains("--allow-lossy"), "{error}");
    let mut lossy = arguments.to_vec();
    lossy.push("--allow-lossy");
    let said = cli(root, &lossy).done().stderr;
    assert!(said.contains("and rounded"), "{said}");
}

fn findings(ran: &Ran) -> Vec<(String, String, String)> {
    let report: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(report["schema"], "lora-cli/check/1");
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let findings = report["findings"].as_array().unwrap();
    findings.iter().map(|it| (text(&it["kind"]), text(&it["what"]), text(&it["fix"]))).collect()
}

#[test]
fn a_sound_adapter_passes_and_others_say_why_not() {
    let scratch = tempfile::tempdir().unwrap();
    let root = scratch.path();
    let (base, adapter) = (peft("llama-vanilla/base"), peft("llama-vanilla/adapter"));
    let sound = cli(root, &["check", &adapter, "--base", &base, "--for", "vllm,transformers"]);
    assert_eq!((sound.code, sound.stdout.ends_with("nothing found\n")), (Some(0), true));
    // A format that the program does not load, and the command that was tried.
    let ran = cli(root, &["check", &adapter, "--base", &base, "--for", "llama.cpp", "--json"]);
    assert_eq!(ran.code, Some(1));
    let [(kind, _, fix)] = &findings(&ran)[..] else { panic!("{}", ran.stdout) };
    assert_eq!(kind, "refused");
    assert_eq!(*fix, format!("lora-cli convert {adapter} --to gguf --base {base} -o OUT"));
    // vLLM has one scale.
    let patterns = peft("llama-patterns/adapter");
    let ran = cli(root, &["check", &patterns, "--for", "vllm", "--json"]);
    assert_eq!(ran.code, Some(1));
    assert!(findings(&ran).iter().any(|it| it.0 == "misread" && it.1.contains("alpha_pattern")));
    let ran = cli(root, &["check", &feature("dora-linear/adapter"), "--for", "vllm", "--json"]);
    assert!(findings(&ran).iter().any(|it| it.0 == "refused" && it.1.contains("DoRA")));
    // Another base.
    let other = peft("gpt2/base");
    let ran = cli(root, &["check", &adapter, "--base", &other, "--json"]);
    assert_eq!(ran.code, Some(1));
    assert!(findings(&ran).iter().all(|it| it.1.starts_with("does not fit the base")));
}

#[test]
fn factors_that_are_zero_or_no_numbers_are_found() {
    let scratch = Scratch::new();
    let path = scratch.path("lora/adapter_model.safetensors");
    let tensors = read_tensors(&path);
    let write = |value: f64| {
        let changed: Vec<Tensor> = tensors
            .values()
            .map(|tensor| match tensor.name.contains("lora_B") {
                true => {
                    let count: usize = tensor.shape.iter().product();
                    Tensor::new(&tensor.name, tensor.dtype, &tensor.shape, &vec![value; count])
                }
                false => tensor.renamed(&tensor.name),
            })
            .collect();
        write_tensors(&path, &changed, &[("format", "pt")]);
        cli(scratch.root(), &["check", "lora"])
    };
    let zero = write(0.0);
    assert_eq!(zero.code, Some(1));
    assert!(zero.stdout.contains("suspicious: `model.layers.0.q.weight`: changes nothing"));
    let nan = write(f64::NAN);
    assert!(nan.stdout.contains("damaged: "), "{}", nan.stdout);
}

#[test]
fn metadata_is_shown_and_changed() {
    let scratch = tempfile::tempdir().unwrap();
    let root = scratch.path();
    let adapter = of("kohya/locon/adapter.safetensors");
    let set = ["metadata", "set", &adapter, "modelspec.title=My = style", "-o", "new.safetensors"];
    cli(root, &set).done();
    let new = root.join("new.safetensors");
    assert_eq!(read_tensors(&new), read_tensors(Path::new(&adapter)));
    let metadata = read_metadata(&new);
    assert_eq!(metadata["modelspec.title"], "My = style");
    assert_eq!(metadata["ss_network_module"], "lycoris.kohya");
    // sd-scripts' hash of the tensors, which it had not.
    assert_eq!(metadata["sshs_model_hash"].len(), 64);
    let get = cli(root, &["metadata", "get", "new.safetensors", "modelspec.title"]);
    assert_eq!(get.stdout, "My = style\n");
    let before = std::fs::read(&new).unwrap();
    let remove = ["metadata", "remove", "new.safetensors", "modelspec.title", "--in-place"];
    cli(root, &remove).done();
    assert!(!read_metadata(&new).contains_key("modelspec.title"));
    assert_ne!(std::fs::read(&new).unwrap(), before);
    let error = cli(root, &remove).refused(root);
    assert!(error.contains("no metadata entry `modelspec.title`"), "{error}");
    // What makes a file one of ours stays.
    cli(root, &["convert", &adapter, "--to", "lora", "-o", "own.safetensors"]).done();
    let error = cli(root, &["metadata", "remove", "own.safetensors", "lora_format", "--in-place"]);
    assert!(error.refused(root).contains("is what makes it a file of this format"));
}

#[test]
fn components_have_weights_of_their_own() {
    let scratch = tempfile::tempdir().unwrap();
    let root = scratch.path();
    let base = read_tensors(Path::new(&of("kohya/base.safetensors")));
    let adapter = read_tensors(Path::new(&of("kohya/locon/adapter.safetensors")));
    // The convolution's factors, as a text encoder's.
    let spell = |tensor: &Tensor| match tensor.name.contains("_conv1.") {
        true => tensor.renamed(&tensor.name.replace("lora_unet_", "lora_te_")),
        false => tensor.renamed(&tensor.name),
    };
    let scaled = |unet: f64, te: f64| -> Vec<Tensor> {
        let alphas = adapter.values().map(spell).map(|tensor| {
            let weight = if tensor.name.starts_with("lora_te_") { te } else { unet };
            match tensor.name.ends_with(".alpha") {
                true => {
                    let values: Vec<f64> = tensor.values().iter().map(|it| it * weight).collect();
                    Tensor::new(&tensor.name, tensor.dtype, &tensor.shape, &values)
                }
                false => tensor,
            }
        });
        alphas.collect()
    };
    let base: Vec<Tensor> = base.values().map(|tensor| tensor.renamed(&tensor.name)).collect();
    write_tensors(&root.join("base.safetensors"), &base, &[]);
    write_tensors(&root.join("style.safetensors"), &scaled(1.0, 1.0), &[]);
    write_tensors(&root.join("scaled.safetensors"), &scaled(0.5, 0.25), &[]);
    let merged = |adapter: &str| merged(root, "base.safetensors", &[adapter]);
    assert_eq!(merged("style.safetensors@unet=0.5,te=0.25"), merged("scaled.safetensors"));
    assert_ne!(merged("style.safetensors@unet=0.5"), merged("scaled.safetensors"));
    let refused = |adapter: &str| {
        let ran = cli(root, &["merge", "base.safetensors", adapter, "-o", "x"]);
        assert_eq!(ran.code, Some(2));
        ran.stderr
    };
    assert!(refused("style.safetensors@te2=1").contains("no module of `te2` in it"));
    assert!(refused("style.safetensors@vae=1").contains("no component `vae`"));
}
