//! Adapters that PEFT made: ours against f64 within the stated bound, PEFT's own f32 merge within
//! twice that, and everything else bit for bit.

use std::collections::BTreeSet;
use std::path::PathBuf;

use lora_format::Dtype;
use lora_merge::MergeOptions;
use lora_merge::engine::RunOptions;
use lora_merge::orientation::Orientation;

use crate::merge;
use crate::support::{
    Tensor, fixtures, least, products, read_json, read_model, read_tensors, unit_roundoff,
};

/// Every case with a merge as its answer.
fn cases() -> Vec<PathBuf> {
    let mut cases: Vec<PathBuf> = std::fs::read_dir(fixtures().join("peft"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("case.json").exists())
        .collect();
    cases.sort();
    assert!(cases.len() >= 15, "fixtures are missing");
    cases
}

#[test]
fn peft_adapters_merge_within_the_bound() {
    for case in cases() {
        for dtype in [None, Some(Dtype::F32), Some(Dtype::Bf16), Some(Dtype::F16)] {
            check(&case, dtype);
        }
    }
}

fn check(case: &std::path::Path, dtype: Option<Dtype>) {
    let scratch = tempfile::tempdir().unwrap();
    let out = scratch.path().join("out");
    let (base_path, adapter_path) = (case.join("base"), case.join("adapter"));
    let options = MergeOptions { dtype, ..MergeOptions::default() };
    let report = merge(&base_path, &adapter_path, &out, &options, &RunOptions::default())
        .unwrap_or_else(|error| panic!("{}: {error}", case.display()));

    let base = read_model(&base_path);
    let adapter = read_tensors(&adapter_path.join("adapter_model.safetensors"));
    let merged = read_model(&out);
    let exact = read_tensors(&case.join("expected_f64.safetensors"));
    let peft = read_tensors(&case.join("expected.safetensors"));
    let description = read_json(&case.join("case.json"));
    let targets = description["targets"].as_array().unwrap();

    let names = |tensors: &std::collections::BTreeMap<String, Tensor>| -> BTreeSet<String> {
        tensors.keys().cloned().collect()
    };
    assert_eq!(names(&merged), names(&base), "{}", case.display());
    let expected: BTreeSet<&str> = targets.iter().map(|t| t["tensor"].as_str().unwrap()).collect();
    let reported: BTreeSet<&str> = report.targets.iter().map(|t| t.parameter.as_str()).collect();
    assert_eq!(reported, expected, "{}", case.display());
    assert_eq!(report.targets.len(), expected.len());

    for target in targets {
        let name = target["tensor"].as_str().unwrap();
        let at = format!("{} {name} {dtype:?}", case.display());
        let done = report.targets.iter().find(|done| done.parameter == name).unwrap();
        let transposed = target["transposed"].as_bool().unwrap();
        let orientation = if transposed { Orientation::InOut } else { Orientation::OutIn };
        // PEFT saves an untied head in full beside its factors: the copy has no rank.
        let ranked: Vec<_> = done.changes.iter().filter(|change| change.rank.is_some()).collect();
        let [change] = ranked.as_slice() else { panic!("{at}: {done:?}") };
        let (rank, scale) = (change.rank.unwrap(), change.scale.unwrap());
        assert_eq!(change.orientation, Some(orientation), "{at}");
        assert_eq!(scale, target["scale"].as_f64().unwrap(), "{at}");
        assert_eq!(rank as u64, target["rank"].as_u64().unwrap(), "{at}");
        let (ours, exact, peft) = (&merged[name], exact[name].values(), peft[name].values());
        assert_eq!(ours.shape, base[name].shape, "{at}");
        assert_eq!(ours.dtype, dtype.unwrap_or(base[name].dtype), "{at}");
        assert_eq!(done.dtype, ours.dtype, "{at}");

        let prefix = target["adapter_prefix"].as_str().unwrap();
        let factor = |which: &str| &adapter[&format!("{prefix}.{which}.weight")];
        let (_, absolute) = products(factor("lora_A"), factor("lora_B"), transposed);
        let rank = rank as f64;
        let gamma = rank * 2f64.powi(-24) / (1.0 - rank * 2f64.powi(-24));
        for (index, &got) in ours.values().iter().enumerate() {
            let (wanted, peft) = (exact[index], peft[index]);
            let accumulated = gamma * scale.abs() * absolute[index];
            let bound = |dtype| unit_roundoff(dtype) * wanted.abs() + accumulated;
            let tiny = least(ours.dtype);
            let off = (got - wanted).abs();
            assert!(off <= bound(ours.dtype) + tiny, "{at}[{index}]: {got} for {wanted}");
            let off = (peft - wanted).abs();
            assert!(off <= 2.0 * bound(Dtype::F32) + tiny, "PEFT {at}[{index}]: {peft}, {wanted}");
        }
    }
    for (name, tensor) in &base {
        if expected.contains(name.as_str()) {
            continue;
        }
        match dtype.filter(|_| tensor.dtype.is_merge_float()) {
            Some(dtype) if dtype != tensor.dtype => {
                let converted = Tensor::new(name, dtype, &tensor.shape, &tensor.values());
                assert_eq!(merged[name], converted, "{} {name}", case.display());
            }
            _ => assert_eq!(&merged[name], tensor, "{} {name}", case.display()),
        }
    }
}

/// f16's range is the smaller: converting what does not fit is an error elsewhere, so the cases
/// above must all fit.
#[test]
fn one_case_is_stored_in_each_dtype() {
    let dtypes: BTreeSet<Dtype> =
        cases().iter().flat_map(|case| read_model(&case.join("base"))).map(|t| t.1.dtype).collect();
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        assert!(dtypes.contains(&dtype), "{dtype}");
    }
}
