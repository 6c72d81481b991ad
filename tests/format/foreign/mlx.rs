//! mlx-lm is the reference: `expected.safetensors` holds weights before and after it fused them.

use std::collections::BTreeMap;
use std::path::Path;

use lora_format::codec::mlx::{CONFIG_FILE, MODEL_FILE, write_directory};
use lora_format::container::TensorFile;
use lora_format::io::atomic::{Durability, Overwrite};
use lora_format::model::{AdapterFormat, Form, Layer, LowRank};
use lora_format::{Adapter, Tensor, WriteOptions, Written};
use lora_tests::fixture;

use super::{assert_same, low_rank, writing};
use crate::read;

fn write(adapter: &Adapter, path: &Path, options: &WriteOptions) -> lora_format::Result<Written> {
    write_directory(adapter, path, options, Overwrite::Never, Durability::Cached)
}

fn tensors(path: &Path) -> BTreeMap<String, Tensor> {
    let file = TensorFile::open(path).unwrap();
    file.tensors.into_iter().map(|tensor| (tensor.name.clone(), tensor)).collect()
}

/// W' as the definition says, of a W stored as `out × in`.
fn merged(change: &LowRank, before: &[f32]) -> Vec<f64> {
    let (a, b) = (change.a.to_f32().unwrap(), change.b.to_f32().unwrap());
    let (rank, inside, out) = (change.rank(), change.in_features(), change.out_features());
    let mut after = vec![0.0; out * inside];
    for o in 0..out {
        let row = |i: usize| -> f64 {
            let product: f64 =
                (0..rank).map(|r| f64::from(b[o * rank + r]) * f64::from(a[r * inside + i])).sum();
            // An embedding is stored as vocabulary × dimension.
            let at = if change.layer == Layer::Embedding { i * out + o } else { o * inside + i };
            f64::from(before[at]) + change.scale() * product
        };
        let values: Vec<f64> = (0..inside).map(row).collect();
        let norm = values.iter().map(|it| it * it).sum::<f64>().sqrt();
        let gain =
            change.magnitude.as_ref().map_or(1.0, |it| f64::from(it.to_f32().unwrap()[o]) / norm);
        for (i, value) in values.into_iter().enumerate() {
            let at = if change.layer == Layer::Embedding { i * out + o } else { o * inside + i };
            after[at] = value * gain;
        }
    }
    after
}

#[test]
fn fused_weights_are_what_mlx_makes() {
    for (case, count) in [("lora", 4), ("dora", 2)] {
        let adapter = read(&fixture("mlx").join(case)).unwrap();
        assert_eq!((adapter.format, adapter.components.len()), (AdapterFormat::Mlx, count));
        assert_eq!(adapter.base.name.as_deref(), Some("lora-fixtures/tiny"));
        let expected = tensors(&fixture("mlx").join(case).join("expected.safetensors"));
        assert_eq!(expected.len(), 2 * count);
        for component in &adapter.components {
            let module = &component.target.module;
            let of = |suffix: &str| expected[&format!("{module}.{suffix}")].to_f32().unwrap();
            assert_close(&merged(low_rank(component), &of("before")), &of("after"), module);
        }
    }
}

#[test]
fn fused_experts_are_what_mlx_makes() {
    let adapter = read(&fixture("mlx/moe")).unwrap();
    let expected = tensors(&fixture("mlx/moe/expected.safetensors"));
    assert_eq!(adapter.components.len(), 3 + 3 + 1);
    for component in &adapter.components {
        let module = component.target.module.clone();
        let inner = module.strip_prefix("model.layers.0.mlp.").unwrap();
        let (stacked, expert) = match inner.strip_prefix("experts.") {
            None => ("gate".to_owned(), 0),
            Some(rest) => {
                let (number, name) = rest.split_once('.').unwrap();
                (format!("switch_mlp.{name}"), number.parse::<usize>().unwrap())
            }
        };
        let change = low_rank(component);
        let size = change.in_features() * change.out_features();
        let of = |suffix: &str| {
            let all = expected[&format!("model.layers.0.mlp.{stacked}.{suffix}")].to_f32().unwrap();
            all[expert * size..(expert + 1) * size].to_vec()
        };
        assert_close(&merged(change, &of("before")), &of("after"), &module);
    }
}

fn assert_close(found: &[f64], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (found, expected) in found.iter().zip(expected) {
        let expected = f64::from(*expected);
        assert!(
            (found - expected).abs() <= 1e-5 * (1.0 + expected.abs()),
            "{what}: {found} {expected}"
        );
    }
}

#[test]
fn there_and_back_to_the_bit() {
    let scratch = tempfile::tempdir().unwrap();
    for case in ["lora", "dora", "moe", "full"] {
        let source = fixture("mlx").join(case);
        let adapter = read(&source).unwrap();
        let path = scratch.path().join(case);
        let options = writing(&fixture("torchtune/base/config.json"));
        assert_eq!(write(&adapter, &path, &options).unwrap(), Written::default());
        assert_same(&adapter, &read(&path).unwrap());
        let (ours, theirs) = (tensors(&path.join(MODEL_FILE)), tensors(&source.join(MODEL_FILE)));
        assert_eq!(ours.keys().collect::<Vec<_>>(), theirs.keys().collect::<Vec<_>>());
        for (name, tensor) in &ours {
            super::assert_same_tensor(tensor, &theirs[name], name);
        }
        let config = |directory: &Path| super::config(&directory.join(CONFIG_FILE));
        let (ours, theirs) = (config(&path), config(&source));
        assert_eq!(ours["fine_tune_type"], theirs["fine_tune_type"]);
        if case != "full" {
            let (ours, theirs) = (&ours["lora_parameters"], &theirs["lora_parameters"]);
            assert_eq!((&ours["rank"], &ours["scale"]), (&theirs["rank"], &theirs["scale"]));
            let sorted = |keys: &serde_json::Value| {
                let mut keys: Vec<String> = serde_json::from_value(keys.clone()).unwrap();
                keys.sort();
                keys
            };
            assert_eq!(sorted(&ours["keys"]), sorted(&theirs["keys"]));
        }
        // Layer 1 of 2, or layer 0 of 2.
        assert_eq!(ours["num_layers"], if case == "moe" { 2 } else { 1 });
    }
}

#[test]
fn other_scales_and_ranks() {
    let scratch = tempfile::tempdir().unwrap();
    let adapter = read(&fixture("peft/llama-patterns/adapter")).unwrap();
    let ranks: Vec<usize> = adapter.components.iter().map(|it| low_rank(it).rank()).collect();
    assert!(ranks.iter().any(|&rank| rank != ranks[0]), "{ranks:?}");
    let path = scratch.path().join("adapter");
    let mut options = WriteOptions::default();
    let outcome = write(&adapter, &path, &options);
    if let Err(error) = outcome {
        assert!(error.to_string().contains("would have to be rounded"), "{error}");
        options.allow_lossy = true;
        let written = write(&adapter, &path, &options).unwrap();
        assert!(written.changes.iter().any(|change| change.ends_with("and rounded")));
    }
    let again = read(&path).unwrap();
    for (one, other) in adapter.components.iter().zip(&again.components) {
        let (one, other) = (low_rank(one), low_rank(other));
        let zeros = vec![0.0; one.in_features() * one.out_features()];
        let expected: Vec<f32> = merged(one, &zeros).into_iter().map(|it| it as f32).collect();
        assert_close(&merged(other, &zeros), &expected, "delta");
    }
}

#[test]
fn refused() {
    let scratch = tempfile::tempdir().unwrap();
    let message = |path: &Path| read(path).unwrap_err().to_string();
    assert!(message(&fixture("mlx/dora-embedding")).ends_with(
        "model.embed_tokens.m: DoRA of an embedding as mlx-lm has it, with one magnitude per \
             token"
    ));
    let with = |name: &str, edit: &dyn Fn(&mut serde_json::Map<String, serde_json::Value>)| {
        let path = scratch.path().join(name);
        std::fs::create_dir(&path).unwrap();
        let source = fixture("mlx/lora");
        std::fs::copy(source.join(MODEL_FILE), path.join(MODEL_FILE)).unwrap();
        let mut config = super::config(&source.join(CONFIG_FILE));
        edit(&mut config);
        std::fs::write(path.join(CONFIG_FILE), serde_json::to_vec(&config).unwrap()).unwrap();
        path
    };
    let parameter = |name: &'static str, value: serde_json::Value| {
        with(name, &move |config| config["lora_parameters"][name] = value.clone())
    };
    assert!(message(&parameter("alpha", 16.into())).contains("lora_parameters.alpha = 16: mlx-lm"));
    assert!(message(&parameter("strange", 1.into())).contains("strange = 1: an unknown field"));
    assert!(message(&parameter("rank", 3.into())).contains("says rank 3, the tensors have rank 2"));
    assert!(
        message(&parameter("scale", "x".into()))
            .contains("`lora_parameters.scale` must be a number")
    );
    let dora =
        with("dora", &|config| drop(config.insert("fine_tune_type".to_owned(), "dora".into())));
    assert!(message(&dora).contains("has no partner"), "{}", message(&dora));
    let other = with("other", &|config| drop(config.insert("fine_tune_type".to_owned(), 1.into())));
    assert!(message(&other).contains("must be `lora`, `dora` or `full`"));
    // The flag and the field names of 2024.
    let old = with("old", &|config| {
        config.remove("fine_tune_type");
        let layers = config.remove("num_layers").unwrap();
        config.insert("lora_layers".to_owned(), layers);
    });
    assert_same(&read(&old).unwrap(), &read(&fixture("mlx/lora")).unwrap());
    // An alpha that equals the rank changes nothing.
    let path = with("equal", &|config| config["lora_parameters"]["alpha"] = 2.into());
    assert!(matches!(read(&path).unwrap().components[0].form, Form::LowRank(_)));
}
