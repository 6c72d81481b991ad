//! Adapters of LyCORIS, with their flattened names, against what LyCORIS merges them to
//! (`fixtures/kohya`, made by `scripts/make_kohya_fixtures.py`).

use std::collections::BTreeMap;
use std::path::PathBuf;

use lora_merge::MergeOptions;
use lora_merge::engine::RunOptions;

use crate::support::{Tensor, fixtures, read_model, read_tensors, write_tensors};
use crate::{TokenizerSource, plan, write};

/// LyCORIS computes in f32, in another order, and adds an epsilon to norms.
const TOLERANCE: f64 = 3e-6;

fn cases() -> Vec<PathBuf> {
    let mut cases: Vec<PathBuf> = std::fs::read_dir(fixtures().join("kohya"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir())
        .collect();
    cases.sort();
    assert_eq!(cases.len(), 14, "fixtures are missing");
    cases
}

fn merged(base: &std::path::Path, adapter: &std::path::Path) -> BTreeMap<String, Tensor> {
    let scratch = tempfile::tempdir().unwrap();
    let out = scratch.path().join("out.safetensors");
    let plan = plan(base, adapter, &MergeOptions::default()).unwrap();
    write(&plan, TokenizerSource::Auto, &out, &RunOptions::default()).unwrap();
    read_model(&out)
}

#[test]
fn every_kind_of_lycoris_merges_to_what_lycoris_makes() {
    let base = fixtures().join("kohya/base.safetensors");
    for case in cases() {
        let expected = read_tensors(&case.join("merged.safetensors"));
        let before = read_tensors(&base);
        let found = merged(&base, &case.join("adapter.safetensors"));
        assert_eq!(found.len(), before.len());
        for (name, tensor) in &found {
            let Some(expected) = expected.get(name) else {
                assert_eq!(tensor, &before[name], "{name} of {}", case.display());
                continue;
            };
            assert_ne!(tensor, &before[name], "{name} of {}", case.display());
            let pairs = tensor.values().into_iter().zip(expected.values());
            let worst = pairs.map(|(x, y)| (x - y).abs()).fold(0.0, f64::max);
            assert!(worst < TOLERANCE, "{name} of {}: {worst:e}", case.display());
        }
    }
}

#[test]
fn a_linear_layer_and_a_1x1_convolution_take_each_others_factors() {
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name);
    let base = read_tensors(&fixtures().join("kohya/base.safetensors"));
    let adapter = read_tensors(&fixtures().join("kohya/locon/adapter.safetensors"));
    let reshaped = |tensor: &Tensor, shape: &[usize]| Tensor {
        shape: shape.to_vec(),
        ..tensor.renamed(&tensor.name)
    };
    let expected = merged(
        &fixtures().join("kohya/base.safetensors"),
        &fixtures().join("kohya/locon/adapter.safetensors"),
    );
    // The projection's weight without its kernel, and the query's factors with one.
    let changed: Vec<Tensor> = base
        .values()
        .map(|tensor| match tensor.name.ends_with("proj_in.weight") {
            true => reshaped(tensor, &tensor.shape[..2]),
            false => tensor.renamed(&tensor.name),
        })
        .collect();
    write_tensors(&at("base.safetensors"), &changed, &[]);
    let changed: Vec<Tensor> = adapter
        .values()
        .map(|tensor| match tensor.name.contains("to_q.lora_") {
            true => reshaped(tensor, &[tensor.shape[0], tensor.shape[1], 1, 1]),
            false => tensor.renamed(&tensor.name),
        })
        .collect();
    write_tensors(&at("adapter.safetensors"), &changed, &[]);
    let found = merged(&at("base.safetensors"), &at("adapter.safetensors"));
    for (name, tensor) in &expected {
        assert_eq!(found[name].data, tensor.data, "{name}");
    }
}

#[test]
fn a_name_that_means_nothing_or_two_things_is_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name);
    let base = read_tensors(&fixtures().join("kohya/base.safetensors"));
    let adapter = fixtures().join("kohya/locon/adapter.safetensors");
    let refused = |tensors: Vec<Tensor>| {
        write_tensors(&at("base.safetensors"), &tensors, &[]);
        plan(&at("base.safetensors"), &adapter, &MergeOptions::default()).unwrap_err().to_string()
    };
    let without = base.values().filter(|tensor| !tensor.name.contains("to_q"));
    let error = refused(without.map(|tensor| tensor.renamed(&tensor.name)).collect());
    assert!(error.contains("`lora_unet_down_blocks_0_to_q`"), "{error}");
    let mut twice: Vec<Tensor> = base.values().map(|it| it.renamed(&it.name)).collect();
    twice.push(base["down_blocks.0.to_q.weight"].renamed("down.blocks_0.to_q.weight"));
    let error = refused(twice);
    assert!(error.contains("can mean any of") && error.contains("down.blocks_0.to_q"), "{error}");
}
