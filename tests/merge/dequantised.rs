//! Merging into quantised bases: the values that the library dequantises, plus the delta, in full
//! precision, and nothing of the quantisation left.

use std::collections::BTreeSet;
use std::path::PathBuf;

use lora_format::Dtype;
use lora_merge::MergeOptions;
use lora_merge::engine::RunOptions;
use serde_json::json;

use crate::merge;
use crate::support::{
    Factors, Prng, Tensor, fixtures, least, products, read_json, read_model, read_tensors, rounded,
    unit_roundoff, write_adapter,
};

fn cases() -> Vec<PathBuf> {
    let directory = fixtures().join("quantised");
    let mut cases: Vec<PathBuf> =
        std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    cases.sort();
    assert!(cases.len() >= 39, "fixtures are missing");
    cases
}

/// Targets the first, third, … matrix of a case.
fn factors(expected: &[&Tensor]) -> Vec<Factors> {
    let mut prng = Prng::new(0xC0DE);
    expected
        .iter()
        .filter(|tensor| tensor.shape.len() == 2 && tensor.name.ends_with(".weight"))
        .step_by(2)
        .map(|tensor| {
            let module = tensor.name.trim_end_matches(".weight");
            let size = (tensor.shape[0], tensor.shape[1], 3);
            Factors::random(&mut prng, module, size, Dtype::F32, 0.05)
        })
        .collect()
}

#[test]
fn a_delta_is_added_to_what_the_library_dequantises() {
    let mut targets = 0;
    for case in cases() {
        let label = case.file_name().unwrap().to_string_lossy().into_owned();
        let about = read_json(&case.join("case.json"));
        let expected = read_tensors(&case.join("expected.safetensors"));
        let base = read_model(&case.join("base"));
        let scratch = tempfile::tempdir().unwrap();
        let adapter = scratch.path().join("adapter");
        let factors = factors(&expected.values().collect::<Vec<_>>());
        if factors.is_empty() {
            // gpt-oss has no matrices: fused experts are tested with their adapters.
            assert_eq!(label, "mxfp4-gpt-oss");
            continue;
        }
        write_adapter(&adapter, &factors, &json!({}));
        for (number, dtype) in [Some(Dtype::F32), None].into_iter().enumerate() {
            let out = scratch.path().join(format!("out-{number}"));
            let options = MergeOptions { dtype, ..MergeOptions::default() };
            let run = RunOptions { tile_bytes: 1000, ..RunOptions::default() };
            let report = merge(&case.join("base"), &adapter, &out, &options, &run)
                .unwrap_or_else(|error| panic!("{label}: {error}"));
            assert_eq!(report.targets.len(), factors.len());
            assert!(report.targets.iter().all(|target| target.requantised.is_some()), "{label}");
            let merged = read_model(&out);

            // Every weight under its own name, every other plain tensor, and no part of a weight.
            let names: BTreeSet<&String> = merged.keys().collect();
            assert!(expected.keys().all(|name| names.contains(name)), "{label}: {names:?}");
            for name in names.iter().filter(|name| !expected.contains_key(**name)) {
                assert!(base[*name].dtype.is_merge_float(), "{label}: {name} is left");
            }
            for name in base.keys().filter(|name| name.ends_with("norm.weight")) {
                assert!(names.contains(name), "{label}: {name} is lost");
            }
            let config = out.join("config.json");
            let config = read_json(&config);
            assert!(config.get("quantization_config").is_none(), "{label}");

            for (name, weight) in &expected {
                let ours = &merged[name];
                assert_eq!(ours.shape, weight.shape, "{label} {name}");
                let own = about["dtype"].as_str().unwrap_or("F32");
                let stored = dtype.unwrap_or(ours.dtype);
                assert_eq!(ours.dtype, stored);
                if dtype.is_none() {
                    assert!(ours.dtype.name() == own || about.get("dtype").is_none(), "{label}");
                }
                let target = factors.iter().find(|one| format!("{}.weight", one.module) == *name);
                let delta = target.map(|one| products(&one.a, &one.b, false));
                targets += usize::from(delta.is_some());
                let gamma = 3.0 * 2f64.powi(-24) * 1.01;
                for (index, (&got, &value)) in
                    ours.values().iter().zip(&weight.values()).enumerate()
                {
                    let Some((product, absolute)) = &delta else {
                        let same =
                            got == rounded(value, stored) || (got.is_nan() && value.is_nan());
                        assert!(same, "{label} {name}[{index}]: {got} for {value}");
                        continue;
                    };
                    let wanted = value + product[index];
                    let bound = unit_roundoff(stored) * wanted.abs()
                        + (1.0 + unit_roundoff(stored)) * gamma * absolute[index]
                        + least(stored);
                    let off = (got - wanted).abs();
                    let same = off <= bound || (got.is_nan() && wanted.is_nan());
                    assert!(same, "{label} {name}[{index}]: {got} for {wanted}");
                }
            }
        }
    }
    assert!(targets > 40, "{targets}");
}
