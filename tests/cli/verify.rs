//! `verify`: is a model what a merge makes?

use std::path::Path;

use lora_format::Dtype;
use serde_json::Value;

use crate::support::{Tensor, read_tensors, write_tensors};
use crate::{Ran, Scratch, feature};

const WEIGHT: &str = "model.layers.0.q.weight";

/// A merged model with its tensors changed by `change`.
fn tampered(scratch: &Scratch, name: &str, change: impl Fn(&mut Vec<Tensor>)) {
    if !scratch.path("m").exists() {
        scratch.cli(&["merge", "base.safetensors", "lora", "-o", "m"]).done();
    }
    let mut tensors: Vec<Tensor> = read_tensors(&scratch.path("m")).into_values().collect();
    change(&mut tensors);
    write_tensors(&scratch.path(name), &tensors, &[]);
}

/// Another value for one element of the target, by its bits.
fn with_element(tensors: &mut [Tensor], index: usize, change: impl Fn(u32) -> u32) {
    let tensor = tensors.iter_mut().find(|tensor| tensor.name == WEIGHT).unwrap();
    let mut bits = tensor.bits();
    bits[index] = change(bits[index]);
    *tensor = Tensor::of_bits(WEIGHT, tensor.dtype, &tensor.shape, &bits);
}

fn verify(scratch: &Scratch, merged: &str, more: &[&str]) -> Ran {
    let arguments = ["verify", merged, "--base", "base.safetensors", "--adapter", "lora"];
    scratch.cli(&[&arguments[..], more].concat())
}

/// The output of a run that agrees (0) or does not (1).
fn said(ran: &Ran, code: i32) -> &str {
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(code), ""), "{}", ran.stdout);
    &ran.stdout
}

#[test]
fn a_merge_agrees_with_itself() {
    let scratch = Scratch::with_directory();
    scratch.cli(&["merge", "base.safetensors", "lora", "-o", "m"]).done();
    let before = crate::support::listing(scratch.root());
    let ran = verify(&scratch, "m", &[]);
    let agrees = "agrees: 2 of 2 tensors are bit for bit what the merge makes\n";
    assert_eq!(said(&ran, 0), agrees);
    assert_eq!(crate::support::listing(scratch.root()), before, "something was written");
    // The dtype that the model has is the one that it was converted to.
    for dtype in ["f32", "f16"] {
        scratch.cli(&["merge", "base", "lora", "--dtype", dtype, "-o", dtype]).done();
        assert_eq!(said(&verify(&scratch, dtype, &[]), 0), agrees);
    }
    // Nor does it matter how the tensors are spread over files.
    scratch.cli(&["merge", "base", "lora", "--max-shard-size", "100B", "-o", "shards"]).done();
    assert!(scratch.path("shards/model.safetensors.index.json").is_file());
    assert_eq!(said(&verify(&scratch, "shards", &[]), 0), agrees);
}

#[test]
fn several_adapters_with_weights_and_the_choice_of_tied_tensors() {
    let scratch = Scratch::new();
    let base = feature("bases/llama");
    let adapters = [
        format!("{}@0.7", feature("two-lora/adapter-a")),
        format!("{}@0.3", feature("two-lora/adapter-b")),
    ];
    let [a, b] = adapters.each_ref().map(String::as_str);
    scratch.cli(&["merge", &base, a, b, "-o", "m"]).done();
    let ran = scratch.cli(&["verify", "m", "--base", &base, "--adapter", a, b]);
    assert_eq!(said(&ran, 0), "agrees: 12 of 12 tensors are bit for bit what the merge makes\n");
    let ran = scratch.cli(&["verify", "m", "--base", &base, "--adapter", a]);
    let text = said(&ran, 1);
    assert!(
        text.ends_with(
            "DIFFERS: 10 of 12 tensors are bit for bit what the merge makes, 2 differ\n"
        )
    );

    let (base, adapter) = (feature("bases/llama-tied"), feature("tied-embedding/adapter"));
    scratch.cli(&["merge", &base, &adapter, "--tied", "untie", "-o", "t"]).done();
    let tied = |choice| {
        let arguments = ["verify", "t", "--base", &base, "--adapter", &adapter, "--tied", choice];
        scratch.cli(&arguments)
    };
    said(&tied("untie"), 0);
    let ran = tied("both");
    assert!(said(&ran, 1).contains("`lm_head.weight`: not made by the merge\n"), "{}", ran.stdout);
}

/// Which way a value was rounded depends on the seed and on its place, and on nothing else.
#[test]
fn stochastic_rounding_is_repeated_from_its_seed() {
    let scratch = Scratch::with_directory();
    let rounding = ["--rounding", "stochastic", "--seed", "7"];
    let making = ["merge", "base.safetensors", "lora", "-o", "m"];
    scratch.cli(&[&making[..], &rounding].concat()).done();
    let agrees = "agrees: 2 of 2 tensors are bit for bit what the merge makes\n";
    assert_eq!(said(&verify(&scratch, "m", &rounding), 0), agrees);
    let threads = [&rounding[..], &["--threads", "3"]].concat();
    assert_eq!(said(&verify(&scratch, "m", &threads), 0), agrees);
    let differs = "DIFFERS: 1 of 2 tensors are bit for bit what the merge makes, 1 differ\n";
    for other in [&["--rounding", "stochastic", "--seed", "8"][..], &rounding[..2], &[]] {
        assert!(said(&verify(&scratch, "m", other), 1).ends_with(differs), "{other:?}");
    }
}

/// Integers are shown as such, to the last digit.
#[test]
fn integers_are_read_as_integers() {
    let scratch = Scratch::new();
    let positions = |value: i64| {
        let mut tensor = Tensor::zeros("model.positions", Dtype::I64, &[3]);
        tensor.data[8..16].copy_from_slice(&value.to_le_bytes());
        tensor
    };
    let path = scratch.path("base.safetensors");
    let mut base: Vec<Tensor> = read_tensors(&path).into_values().collect();
    base.push(positions(1 << 60));
    write_tensors(&path, &base, &[]);
    tampered(&scratch, "more", |tensors| {
        tensors.retain(|tensor| tensor.name != "model.positions");
        tensors.push(positions((1 << 60) + 1));
    });
    let line = "`model.positions`: 1 of 3 elements differ; the largest difference is at [1]: \
                1152921504606846976 \
                expected, 1152921504606846977 found\n";
    assert!(said(&verify(&scratch, "more", &[]), 1).starts_with(line));
    let ran = verify(&scratch, "more", &["--json"]);
    let report: Value = serde_json::from_str(said(&ran, 1)).unwrap();
    let different = &report["different"][0];
    assert_eq!(different["worst_expected"], 1_152_921_504_606_846_976_u64);
    assert_eq!(different["worst_found"], 1_152_921_504_606_846_977_u64);
}

#[test]
fn one_element_is_found_and_named() {
    let scratch = Scratch::new();
    tampered(&scratch, "one", |tensors| with_element(tensors, 3 * 24 + 5, |bits| bits + 1));
    let value = |name: &str| read_tensors(&scratch.path(name))[WEIGHT].values()[3 * 24 + 5];
    let norm =
        read_tensors(&scratch.path("one"))[WEIGHT].values().iter().map(|x| x * x).sum::<f64>();
    let relative = (value("m") - value("one")).abs() / norm.sqrt();
    let line = format!(
        "`{WEIGHT}`: 1 of 384 elements differ by {relative:.1e} of the tensor's norm and 1 ulp at \
         most; the largest difference is at [3, 5]: {} expected, {} found, 1 ulp\n",
        value("m"),
        value("one"),
    );
    let differs = "DIFFERS: 1 of 2 tensors are bit for bit what the merge makes, 1 differ\n";
    assert_eq!(said(&verify(&scratch, "one", &[]), 1), format!("{line}{differs}"));
    // Other programs' rounding may be allowed for, and is counted all the same.
    let within =
        "agrees: 1 of 2 tensors are bit for bit what the merge makes, 1 are within 1 ulp\n";
    assert_eq!(said(&verify(&scratch, "one", &["--ulp", "1"]), 0), within);

    // Of several, the one whose difference is largest, which need not be that of most values.
    let values = read_tensors(&scratch.path("m"))[WEIGHT].values();
    let by_size = |largest: bool| -> usize {
        let mut order: Vec<usize> = (0..values.len()).collect();
        order.sort_by(|&a, &b| values[a].abs().total_cmp(&values[b].abs()));
        if largest { order[values.len() - 1] } else { order[0] }
    };
    let (small, large) = (by_size(false), by_size(true));
    assert!(values[large].abs() > 100.0 * values[small].abs());
    tampered(&scratch, "two", |tensors| {
        with_element(tensors, small, |bits| bits + 3);
        with_element(tensors, large, |bits| bits - 1);
    });
    let ran = verify(&scratch, "two", &["--ulp", "2"]);
    let end = format!(
        " and 3 ulp at most; the largest difference is at [{}, {}]: {} expected, ",
        large / 24,
        large % 24,
        values[large]
    );
    let line = said(&ran, 1).lines().next().unwrap();
    assert!(line.contains(&end) && line.ends_with(" found, 1 ulp"), "{line} has no {end}");
    assert_eq!(said(&verify(&scratch, "two", &["--ulp", "3"]), 0).lines().count(), 1);

    // NaN is no number of values away from anything.
    tampered(&scratch, "nan", |tensors| with_element(tensors, 0, |_| 0x7FC0));
    let ran = verify(&scratch, "nan", &["--ulp", "100000"]);
    let text = said(&ran, 1);
    let start =
        format!("`{WEIGHT}`: 1 of 384 elements differ; the largest difference is at [0, 0]: ");
    assert!(text.starts_with(&start) && text.contains(" expected, NaN found\n"), "{text}");
}

/// What the adapter does not touch must be the base's.
#[test]
fn tensors_without_a_change_are_compared_too() {
    let scratch = Scratch::new();
    tampered(&scratch, "norm", |tensors| {
        let norm = tensors.iter_mut().find(|tensor| tensor.name == "model.norm.weight").unwrap();
        norm.data[23 * 2] ^= 1;
    });
    let ran = verify(&scratch, "norm", &[]);
    let text = said(&ran, 1);
    let start = "`model.norm.weight`: 1 of 24 elements differ by ";
    let end = "ulp at most; the largest difference is at [23]: ";
    assert!(text.starts_with(start) && text.contains(end), "{text}");
}

#[test]
fn tensors_that_are_missing_or_not_the_merges() {
    let scratch = Scratch::new();
    tampered(&scratch, "fewer", |tensors| tensors.retain(|tensor| tensor.name == WEIGHT));
    assert_eq!(
        said(&verify(&scratch, "fewer", &[]), 1),
        "`model.norm.weight`: missing\n\
         DIFFERS: 1 of 2 tensors are bit for bit what the merge makes, 1 are missing\n"
    );
    tampered(&scratch, "more", |tensors| tensors.push(tensors[1].renamed("lm_head.weight")));
    assert_eq!(
        said(&verify(&scratch, "more", &["--ulp", "9"]), 1),
        "`lm_head.weight`: not made by the merge\n\
         DIFFERS: 2 of 2 tensors are bit for bit what the merge makes, 1 are not made by the \
         merge\n"
    );
    tampered(&scratch, "shape", |tensors| tensors[0].shape = vec![24, 16]);
    assert_eq!(
        said(&verify(&scratch, "shape", &[]), 1),
        format!(
            "`{WEIGHT}`: BF16 [16, 24] expected, BF16 [24, 16] found\n\
             DIFFERS: 1 of 2 tensors are bit for bit what the merge makes, 1 have another shape \
             or dtype\n"
        )
    );
    tampered(&scratch, "dtype", |tensors| {
        tensors[0] = Tensor::new(WEIGHT, Dtype::F32, &[16, 24], &tensors[0].values());
    });
    assert_eq!(
        said(&verify(&scratch, "dtype", &[]), 1),
        format!(
            "`{WEIGHT}`: BF16 [16, 24] expected, F32 [16, 24] found\n\
             DIFFERS: 1 of 2 tensors are bit for bit what the merge makes, 1 have another shape \
             or dtype\n"
        )
    );
}

#[test]
fn the_report() {
    let scratch = Scratch::new();
    tampered(&scratch, "all", |tensors| {
        with_element(tensors, 30, |bits| bits + 1);
        tensors.retain(|tensor| tensor.name == WEIGHT);
        tensors.push(Tensor::zeros("x", Dtype::I32, &[2]));
    });
    let ran = verify(&scratch, "all", &["--json", "--ulp", "1"]);
    let report: Value = serde_json::from_str(said(&ran, 1)).unwrap();
    let values = |name: &str| read_tensors(&scratch.path(name))[WEIGHT].values()[30];
    assert_eq!(
        report,
        serde_json::json!({
            "schema": "lora-cli/verify/1",
            "merged": "all",
            "base": "base.safetensors",
            "agrees": false,
            "ulp": 1,
            "compared": 1,
            "different": [{
                "tensor": WEIGHT,
                "dtype": "BF16",
                "elements": 384,
                "different": 1,
                "steps": 1,
                "worst_index": [1, 6],
                "worst_expected": values("m"),
                "worst_found": values("all"),
                "worst_steps": 1,
                "relative": report["different"][0]["relative"],
            }],
            "missing": ["model.norm.weight"],
            "unexpected": ["x"],
            "reshaped": [],
            "renamed": null,
        })
    );
    let relative = report["different"][0]["relative"].as_f64().unwrap();
    let norm =
        read_tensors(&scratch.path("all"))[WEIGHT].values().iter().map(|x| x * x).sum::<f64>();
    let expected = (values("m") - values("all")).abs() / norm.sqrt();
    assert!((relative / expected - 1.0).abs() < 1e-12, "{relative} {expected}");
    let ran = verify(&scratch, "m", &["--json"]);
    let report: Value = serde_json::from_str(said(&ran, 0)).unwrap();
    assert_eq!(report["agrees"], true);
}

/// Another class of the same architecture saves it under a prefix, or without one.
#[test]
fn names_may_differ_by_a_prefix() {
    let scratch = Scratch::new();
    let renamed = |to: &str| {
        tampered(&scratch, to, |tensors| {
            for tensor in tensors.iter_mut() {
                let name = tensor.name.strip_prefix("model.").unwrap();
                let name =
                    if to == "longer" { format!("wrapped.model.{name}") } else { name.into() };
                *tensor = tensor.renamed(&name);
            }
        });
    };
    for (model, line, prefixes) in [
        (
            "longer",
            "names differ: `…` of the merge is `wrapped.…` of the model\n",
            ["", "wrapped."],
        ),
        ("shorter", "names differ: `model.…` of the merge is `…` of the model\n", ["model.", ""]),
    ] {
        renamed(model);
        let agrees = "agrees: 2 of 2 tensors are bit for bit what the merge makes\n";
        assert_eq!(said(&verify(&scratch, model, &[]), 0), format!("{line}{agrees}"));
        let report: Value =
            serde_json::from_str(said(&verify(&scratch, model, &["--json"]), 0)).unwrap();
        let [merge, found] = prefixes;
        let expected = serde_json::json!({"merge_prefix": merge, "model_prefix": found});
        assert_eq!(report["renamed"], expected);
    }
    // The rest is compared, and what is still missing is told.
    tampered(&scratch, "changed", |tensors| {
        with_element(tensors, 5, |bits| bits + 1);
        for tensor in tensors.iter_mut() {
            *tensor = tensor.renamed(&format!("bert.{}", tensor.name));
        }
        tensors.push(tensors[1].renamed("classifier.weight"));
    });
    let ran = verify(&scratch, "changed", &[]);
    let text = said(&ran, 1);
    assert!(text.contains("`classifier.weight`: not made by the merge"), "{text}");
    assert!(text.contains("1 of 384 elements differ by "), "{text}");
}

/// What cannot be merged cannot be verified either: an error, not a finding.
#[test]
fn a_merge_that_is_refused_is_an_error() {
    let scratch = Scratch::new();
    scratch.cli(&["merge", "base.safetensors", "lora", "-o", "m"]).done();
    let nowhere = "error: nowhere: no such file or directory\n";
    assert_eq!(verify(&scratch, "nowhere", &[]).refused(Path::new("/")), nowhere);
    let dora = feature("dora-linear/adapter");
    let text = scratch
        .cli(&["verify", "m", "--base", "base.safetensors", "--adapter", &dora])
        .refused(scratch.root());
    assert!(text.contains("does not fit base.safetensors: 2 problems\n"), "{text}");
}
