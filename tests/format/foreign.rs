//! GGUF, mlx-lm's and torchtune's adapters: each against what its own program wrote or computed.

mod gguf;
mod mlx;
mod torchtune;

use std::path::Path;

use lora_format::model::{Component, Form, LowRank};
use lora_format::{Adapter, ReadOptions, Tensor, WriteOptions, json, limits};

/// A `config.json`.
fn config(path: &Path) -> serde_json::Map<String, serde_json::Value> {
    json::read_object(path, limits::CONFIG_BYTES).unwrap()
}

fn with_base(path: &Path) -> ReadOptions {
    ReadOptions { base_config: Some(config(path)), ..ReadOptions::default() }
}

fn writing(path: &Path) -> WriteOptions {
    WriteOptions { base_config: Some(config(path)), ..WriteOptions::default() }
}

fn low_rank(component: &Component) -> &LowRank {
    match &component.form {
        Form::LowRank(low_rank) => low_rank,
        form => panic!("{} by {}", component.target.name(), form.method()),
    }
}

fn assert_same_tensor(one: &Tensor, other: &Tensor, what: &str) {
    assert_eq!((one.dtype, &one.shape), (other.dtype, &other.shape), "{what}");
    assert!(one.bytes() == other.bytes(), "{what}");
}

/// That two adapters change the same parameters by the same bits, at the same scales.
fn assert_same(one: &Adapter, other: &Adapter) {
    assert_eq!(one.components.len(), other.components.len());
    for (first, second) in one.components.iter().zip(&other.components) {
        let name = first.target.name();
        assert_eq!(first.target, second.target);
        if let (Form::Replaced(first), Form::Replaced(second)) = (&first.form, &second.form) {
            assert_same_tensor(first, second, &name);
            continue;
        }
        let (first, second) = (low_rank(first), low_rank(second));
        assert_same_tensor(&first.a, &second.a, &name);
        assert_same_tensor(&first.b, &second.b, &name);
        assert_eq!(first.layer, second.layer, "{name}");
        assert_eq!(first.scale().to_bits(), second.scale().to_bits(), "{name}");
        assert_eq!(first.magnitude.is_some(), second.magnitude.is_some(), "{name}");
        if let (Some(first), Some(second)) = (&first.magnitude, &second.magnitude) {
            assert_same_tensor(first, second, &name);
        }
    }
}
