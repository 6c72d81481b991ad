//! Taking adapters out again, switching them, and verifying what a merge made.

use std::collections::BTreeMap;
use std::path::Path;

use lora_format::checkpoint::Checkpoint;
use lora_format::io::atomic::{Durability, Overwrite};
use lora_format::{Dtype, ReadOptions};
use lora_merge::assets::{Assets, TokenizerSource};
use lora_merge::engine::{Progress, RunOptions};
use lora_merge::output::{self, OutputOptions};
use lora_merge::report::{MergeReport, Recovered};
use lora_merge::verify::{Number, VerifyReport, verify};
use lora_merge::{MergeOptions, MergePlan, Result, WeightedAdapter};
use serde_json::json;

use crate::Case;
use crate::support::{Factors, Prng, Tensor, fixtures, read_model, write_adapter, write_tensors};

/// An adapter, its weight, and whether it is taken out.
type Part<'a> = (&'a Path, f64, bool);

fn plan(base: &Path, parts: &[Part<'_>]) -> Result<MergePlan> {
    let read = |&(path, weight, undo): &Part<'_>| {
        let adapter = lora_format::read(path, &ReadOptions::default())?;
        Ok(WeightedAdapter { adapter, weight, undo })
    };
    let adapters: Vec<WeightedAdapter> = parts.iter().map(read).collect::<Result<_>>()?;
    MergePlan::new(Checkpoint::open(base)?, adapters, &MergeOptions::default())
}

fn make(base: &Path, parts: &[Part<'_>], out: &Path) -> Result<MergeReport> {
    let plan = plan(base, parts)?;
    let assets = Assets::plan(&plan, TokenizerSource::Base)?;
    let options = OutputOptions {
        destination: out.to_owned(),
        overwrite: Overwrite::Never,
        durability: Durability::Cached,
    };
    output::write(&plan, &assets, &options, &RunOptions::default(), &Progress::default())
}

fn compare(merged: &Path, base: &Path, parts: &[Part<'_>]) -> VerifyReport {
    let plan = plan(base, parts).unwrap();
    let merged = Checkpoint::open(merged).unwrap();
    verify(&plan, &merged, &RunOptions::default(), &Progress::default()).unwrap()
}

/// A base of a few matrices and two adapters, small beside it.
fn case(dtype: Dtype, size: f64) -> Case {
    let mut prng = Prng::new(77);
    let names = ["m.0.q", "m.0.k", "m.1.q"];
    let base: Vec<Tensor> = names
        .iter()
        .map(|name| Tensor::random(&mut prng, &format!("{name}.weight"), dtype, &[60, 100], 1.0))
        .collect();
    let case = Case::file(&base, &[]);
    for (adapter, modules) in [("a", &names[..2]), ("b", &names[1..])] {
        let factors: Vec<Factors> = modules
            .iter()
            .map(|name| Factors::random(&mut prng, name, (60, 100, 4), Dtype::F32, size))
            .collect();
        write_adapter(&case.path(adapter), &factors, &json!({}));
    }
    case
}

fn elements(model: &BTreeMap<String, Tensor>) -> Vec<(String, Vec<f64>)> {
    model.iter().map(|(name, tensor)| (name.clone(), tensor.values())).collect()
}

/// What is called exact is exact; what differs was called ambiguous.
#[test]
fn an_unmerged_model_is_the_base_as_far_as_it_is_said_to_be() {
    for (dtype, size) in
        [(Dtype::Bf16, 0.1), (Dtype::Bf16, 0.02), (Dtype::F16, 0.1), (Dtype::F32, 0.1)]
    {
        let case = case(dtype, size);
        let (a, merged, back) =
            (case.path("a"), case.path("merged.safetensors"), case.path("back.safetensors"));
        make(&case.base, &[(&a, 1.0, false)], &merged).unwrap();
        let report = make(&merged, &[(&a, 1.0, true)], &back).unwrap();
        let mut total = Recovered::default();
        for target in &report.targets {
            total.add(target.undone.as_ref().unwrap());
        }
        assert_eq!(total.elements, 2 * 60 * 100);
        assert_eq!(total.exact + total.ambiguous + total.impossible, total.elements);
        assert_eq!(total.impossible, 0, "{dtype}: {total:?}");
        let (before, after) = (read_model(&case.base), read_model(&back));
        let mut different = 0;
        for ((name, before), (_, after)) in elements(&before).into_iter().zip(elements(&after)) {
            let pairs = before.iter().zip(&after);
            let off = pairs.filter(|(before, after)| before != after).count() as u64;
            assert!(name != "m.1.q.weight" || off == 0);
            different += off;
        }
        assert!(different <= total.ambiguous, "{dtype}: {different} differ, {total:?}");
        assert!(total.exact > total.elements / 2, "{dtype}: {total:?}");
        if dtype == Dtype::Bf16 {
            assert!(total.ambiguous > 0, "{total:?}");
        }
    }
}

/// A delta that is large beside the weights would have made them coarser: values too fine for that
/// are no result of its merge. (A small delta leaves no such trace.)
#[test]
fn what_was_never_merged_may_be_noticed() {
    let case = case(Dtype::Bf16, 0.3);
    let a = case.path("a");
    let impossible = |merged: &Path, back: &str| {
        let report = make(merged, &[(&a, 100.0, true)], &case.path(back)).unwrap();
        let undone = report.targets.iter().filter_map(|target| target.undone.as_ref());
        undone
            .map(|found| (found.impossible, found.elements))
            .fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
    };
    let (count, elements) = impossible(&case.base, "never.safetensors");
    assert!(count > elements / 2, "{count} of {elements}");
    let merged = case.path("merged.safetensors");
    make(&case.base, &[(&a, 100.0, false)], &merged).unwrap();
    let (count, elements) = impossible(&merged, "back.safetensors");
    assert_eq!((count, elements), (0, 2 * 60 * 100));
}

#[test]
fn a_switch_is_one_rounding_of_both_changes() {
    let case = case(Dtype::F32, 0.1);
    let (a, b) = (case.path("a"), case.path("b"));
    let merged = case.path("merged.safetensors");
    make(&case.base, &[(&a, 0.5, false)], &merged).unwrap();
    let switched = case.path("switched.safetensors");
    let report = make(&merged, &[(&a, 0.5, true), (&b, 2.0, false)], &switched).unwrap();
    // Only what `a` changed is taken out.
    let undone = report.targets.iter().filter(|target| target.undone.is_some()).count();
    assert_eq!((report.targets.len(), undone), (3, 2));
    let direct = case.path("direct.safetensors");
    make(&case.base, &[(&b, 2.0, false)], &direct).unwrap();
    let pairs = elements(&read_model(&switched)).into_iter().zip(elements(&read_model(&direct)));
    for ((name, switched), (_, direct)) in pairs {
        for (index, (switched, direct)) in switched.iter().zip(&direct).enumerate() {
            let close = (switched - direct).abs() <= 3e-7 * (1.0 + direct.abs());
            assert!(close, "{name}[{index}]: {switched}, {direct}");
        }
    }
}

#[test]
fn what_needs_the_weight_of_before_is_not_undone() {
    let features = fixtures().join("features");
    for (case, method) in [
        ("dora-linear", "DoRA depends on the weight as it was"),
        ("ia3", "IA³ depends on the weight as it was"),
        ("oft", "OFT depends on the weight as it was"),
        ("modules-to-save", "the adapter replaced it"),
        ("tokens", "the adapter replaced it"),
    ] {
        let adapter = features.join(case).join("adapter");
        let description = crate::support::read_json(&features.join(case).join("case.json"));
        let base = features.join(case).join(description["base"].as_str().unwrap());
        let error = plan(&base, &[(&adapter, 1.0, true)]).unwrap_err().to_string();
        assert!(error.contains(method), "{case}: {error}");
    }
}

#[test]
fn verification_finds_the_one_element_that_differs() {
    let case = case(Dtype::Bf16, 0.1);
    let (a, b) = (case.path("a"), case.path("b"));
    let merged = case.path("merged.safetensors");
    let parts: [Part<'_>; 2] = [(&a, 0.7, false), (&b, -0.3, false)];
    make(&case.base, &parts, &merged).unwrap();
    let report = compare(&merged, &case.base, &parts);
    assert!(report.agrees(0) && report.compared == 3 && report.different.is_empty());

    let mut tensors: Vec<Tensor> = read_model(&merged).into_values().collect();
    let mut bits = tensors[1].bits();
    bits[4 * 100 + 17] += 2;
    tensors[1] = Tensor::of_bits(&tensors[1].name, Dtype::Bf16, &[60, 100], &bits);
    let changed = case.path("changed.safetensors");
    write_tensors(&changed, &tensors, &[("format", "pt")]);
    let report = compare(&changed, &case.base, &parts);
    let [one] = report.different.as_slice() else { panic!("{report:?}") };
    assert_eq!((one.tensor.as_str(), one.different, one.steps), ("m.0.q.weight", 1, Some(2)));
    assert_eq!(one.worst.index, [4, 17]);
    assert_eq!(one.worst.found, Number::Float(tensors[1].values()[417]));
    assert!(!report.agrees(1) && report.agrees(2));

    // Another tensor, one too few, one of another shape.
    tensors.remove(0);
    tensors[1] = Tensor::zeros(&tensors[1].name, Dtype::Bf16, &[100, 60]);
    tensors.push(Tensor::zeros("more", Dtype::F32, &[1]));
    let other = case.path("other.safetensors");
    write_tensors(&other, &tensors, &[("format", "pt")]);
    let report = compare(&other, &case.base, &parts);
    assert_eq!(report.missing, ["m.0.k.weight"]);
    assert_eq!(report.unexpected, ["more"]);
    assert_eq!(report.reshaped[0].tensor, "m.1.q.weight");
    assert!(!report.agrees(u64::MAX));
}

/// PEFT saves a copy of a targeted embedding. Two adapters may bring the same one; where a merged
/// model is at hand, it says nothing.
#[test]
fn copies_of_the_base_do_not_stand_in_the_way() {
    let features = fixtures().join("features");
    let case = features.join("embedding-saved-base");
    let description = crate::support::read_json(&case.join("case.json"));
    let base = case.join(description["base"].as_str().unwrap());
    let adapter = case.join("adapter");
    let scratch = tempfile::tempdir().unwrap();
    let path = |name: &str| scratch.path().join(name);

    make(&base, &[(&adapter, 0.25, false), (&adapter, 0.75, false)], &path("twice")).unwrap();
    make(&base, &[(&adapter, 1.0, false)], &path("once")).unwrap();
    let pairs = elements(&read_model(&path("twice"))).into_iter();
    for ((name, twice), (_, once)) in pairs.zip(elements(&read_model(&path("once")))) {
        for (twice, once) in twice.iter().zip(&once) {
            assert!((twice - once).abs() <= 1e-6, "{name}: {twice}, {once}");
        }
    }
    let parts: [Part<'_>; 2] = [(&adapter, 1.0, true), (&adapter, 0.5, false)];
    make(&path("once"), &parts, &path("half")).unwrap();
    make(&base, &[(&adapter, 0.5, false)], &path("direct")).unwrap();
    let pairs = elements(&read_model(&path("half"))).into_iter();
    for ((name, switched), (_, direct)) in pairs.zip(elements(&read_model(&path("direct")))) {
        for (switched, direct) in switched.iter().zip(&direct) {
            assert!((switched - direct).abs() <= 1e-6, "{name}: {switched}, {direct}");
        }
    }
}
