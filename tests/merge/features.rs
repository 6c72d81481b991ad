//! Every feature of PEFT and loralib: adapters that the libraries wrote, against their own merged
//! weights and against the closed form in f64 (`fixtures/features`, made by
//! `scripts/make_feature_fixtures.py`).

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use lora_format::checkpoint::Checkpoint;
use lora_format::io::atomic::{Durability, Overwrite};
use lora_format::{Adapter, Dtype, ReadOptions, native};
use lora_merge::engine::RunOptions;
use lora_merge::kernels::Isa;
use lora_merge::report::MergeReport;
use lora_merge::{MergeOptions, MergePlan, Tied, WeightedAdapter};
use serde_json::Value;

use crate::support::{Tensor, fixtures, read_json, read_model, read_tensors};
use crate::{TokenizerSource, write};

/// How far f32 results may be from the closed form: a few roundings of values of size one.
const CLOSED_FORM: f64 = 5e-7;

/// How a fixture ended.
#[derive(Clone, Debug, PartialEq)]
enum Outcome {
    Merged,
    Refused(String),
    Wrong(String),
}

fn cases() -> Vec<PathBuf> {
    let mut cases: Vec<PathBuf> = std::fs::read_dir(fixtures().join("features"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("case.json").exists())
        .collect();
    cases.sort();
    assert!(cases.len() >= 150, "fixtures are missing");
    cases
}

fn name(case: &Path) -> String {
    case.file_name().unwrap().to_string_lossy().into_owned()
}

fn read_options(description: &Value) -> ReadOptions {
    let given = &description["options"];
    let groups = given["enable_lora"].as_array();
    ReadOptions {
        alpha: given["alpha"].as_f64(),
        enable_lora: groups
            .map(|groups| groups.iter().map(|group| group.as_bool().unwrap()).collect()),
        ..ReadOptions::default()
    }
}

fn merge_options(description: &Value) -> MergeOptions {
    let given = &description["options"];
    MergeOptions {
        dtype: Some(Dtype::F32),
        fan_in_fan_out: given["fan_in_fan_out"].as_bool(),
        moe_layout: given["moe_layout"].as_str().and_then(|layout| layout.parse().ok()),
        ..MergeOptions::default()
    }
}

/// What a merge made: its report, the tensors and the configuration.
type Made = (MergeReport, BTreeMap<String, Tensor>, Option<Value>);

/// Merges a case and reads the result.
fn run(
    case: &Path,
    description: &Value,
    options: &MergeOptions,
    engine: &RunOptions,
) -> Result<Made, String> {
    run_with(case, description, options, engine, &|adapter| adapter)
}

/// The same with what `change` makes of the adapters.
fn run_with(
    case: &Path,
    description: &Value,
    options: &MergeOptions,
    engine: &RunOptions,
    change: &dyn Fn(Adapter) -> Adapter,
) -> Result<Made, String> {
    let scratch = tempfile::tempdir().unwrap();
    let base = case.join(description["base"].as_str().unwrap());
    let mut adapters = Vec::new();
    for adapter in description["adapters"].as_array().unwrap() {
        let path = case.join(adapter["path"].as_str().unwrap());
        let weight = adapter["weight"].as_f64().unwrap();
        let adapter = lora_format::read(&path, &read_options(description));
        let adapter = change(adapter.map_err(|error| error.to_string())?);
        adapters.push(WeightedAdapter { weight, ..adapter.into() });
    }
    let base = Checkpoint::open(&base).map_err(|error| error.to_string())?;
    let plan = MergePlan::new(base, adapters, options).map_err(|error| error.to_string())?;
    let out = scratch.path().join("out");
    let report = write(&plan, TokenizerSource::Auto, &out, engine).map_err(|e| e.to_string())?;
    let config = out.join("config.json");
    let config = config.exists().then(|| read_json(&config));
    Ok((report, read_model(&out), config))
}

/// The member of a case's description, of one reading where it has several.
fn member<'a>(description: &'a Value, field: &str, reading: Option<&str>) -> &'a Value {
    reading.map_or(&description[field], |reading| &description[field][reading])
}

fn names(value: &Value) -> BTreeSet<String> {
    let names = value.as_array().unwrap().iter();
    names.map(|name| name.as_str().unwrap().to_owned()).collect()
}

fn outcome(case: &Path, options: &MergeOptions, reading: Option<&str>) -> Outcome {
    let description = read_json(&case.join("case.json"));
    match run(case, &description, options, &RunOptions::default()) {
        Err(error) => Outcome::Refused(error),
        Ok(made) => match compare(case, &description, reading, &made) {
            Ok(()) => Outcome::Merged,
            Err(wrong) => Outcome::Wrong(wrong),
        },
    }
}

fn compare(
    case: &Path,
    description: &Value,
    reading: Option<&str>,
    (_, merged, config): &Made,
) -> Result<(), String> {
    if description.get("changed").is_none() {
        return Err("merged, and there is no expectation".to_owned());
    }
    let base = read_model(&case.join(description["base"].as_str().unwrap()));
    let changed = names(member(description, "changed", reading));
    let added = names(member(description, "added", reading));
    let file = |name: &str| {
        let path = case.join(name);
        path.exists().then(|| read_tensors(&path))
    };
    let exact = reading.map_or("f64", |reading| reading);
    let exact = file(&format!("expected_{exact}.safetensors")).unwrap();
    let peft = file("expected.safetensors").filter(|_| reading.is_none());
    let tolerance = description["peft_tolerance"].as_f64();
    let wanted: BTreeSet<&String> = base.keys().chain(&added).collect();
    let found: BTreeSet<&String> = merged.keys().collect();
    if wanted != found {
        let difference: Vec<_> = wanted.symmetric_difference(&found).collect();
        return Err(format!("other tensors than expected: {difference:?}"));
    }
    for (name, tensor) in merged {
        if !changed.contains(name) && !added.contains(name) {
            let before = &base[name];
            let same = match before.dtype.is_merge_float() {
                true => before.values() == tensor.values(),
                false => before == tensor,
            };
            if !same {
                return Err(format!("{name} changed"));
            }
            continue;
        }
        let closed = Some((&exact, CLOSED_FORM));
        for (expected, limit) in closed.into_iter().chain(peft.as_ref().zip(tolerance)) {
            let expected = &expected[name];
            if expected.shape != tensor.shape {
                return Err(format!("{name}: {:?} for {:?}", tensor.shape, expected.shape));
            }
            for (index, (ours, theirs)) in tensor.values().iter().zip(expected.values()).enumerate()
            {
                let off = (ours - theirs).abs();
                if off.is_nan() || off > limit {
                    return Err(format!("{name}[{index}]: {ours} for {theirs}"));
                }
            }
        }
    }
    for (field, value) in member(description, "config_changes", reading).as_object().unwrap() {
        // Which class reads a model is not the merge's to say.
        let found = config.as_ref().and_then(|config| config.get(field));
        if field != "architectures" && found != Some(value) {
            return Err(format!("config.json: {field} is {found:?}, not {value}"));
        }
    }
    Ok(())
}

/// The readings of a change of tied tensors.
const READINGS: [(&str, Tied); 2] = [("untie", Tied::Untie), ("both", Tied::Both)];

/// Methods that are refused by name, though the libraries can merge them.
const NOT_MERGED: [&str; 5] = ["glora", "kasa", "randlora", "road", "vblora"];

/// The one whose head repeats its embedding: there is nothing to decide.
const ENSURED: &str = "tied-ensured";

/// Whether a fixture's adapter must be refused.
fn is_refused(case: &Path, description: &Value) -> bool {
    let name = name(case);
    let family = name.split('-').next().unwrap_or_default();
    NOT_MERGED.contains(&family) || description.get("refused").is_some()
}

/// Whether a fixture's adapter is for the user to decide about.
fn has_readings(description: &Value) -> bool {
    description["changed"].is_object()
}

#[test]
fn every_adapter_merges_as_its_library_does_or_is_refused() {
    let mut wrong = Vec::new();
    for case in cases() {
        let description = read_json(&case.join("case.json"));
        let options = merge_options(&description);
        let mut check = |reading: Option<&str>, options: &MergeOptions, refused: bool| {
            let (name, found) = (name(&case), outcome(&case, options, reading));
            let right = match &found {
                Outcome::Merged => !refused,
                Outcome::Refused(_) => refused,
                Outcome::Wrong(_) => false,
            };
            if !right {
                wrong.push(format!("{name} {}: {found:?}", reading.unwrap_or_default()));
            }
        };
        if has_readings(&description) {
            let ensured = name(&case) == ENSURED;
            for (reading, tied) in READINGS {
                let options = MergeOptions { tied, ..options.clone() };
                check(Some(reading), &options, false);
            }
            check(Some("both"), &options, !ensured);
        } else {
            check(None, &options, is_refused(&case, &description));
        }
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

/// Every kind of change is entered into the account of what was used, and without its entry no
/// merge succeeds.
#[test]
fn a_merge_that_leaves_a_kind_of_change_out_fails() {
    let mut methods: BTreeMap<&'static str, usize> = BTreeMap::new();
    for case in cases() {
        let description = read_json(&case.join("case.json"));
        if is_refused(&case, &description) {
            continue;
        }
        let tied = if has_readings(&description) { Tied::Both } else { Tied::Refuse };
        let options = MergeOptions { tied, ..merge_options(&description) };
        let (report, _, _) = run(&case, &description, &options, &RunOptions::default())
            .unwrap_or_else(|error| panic!("{}: {error}", name(&case)));
        let used: BTreeSet<&'static str> = report
            .targets
            .iter()
            .flat_map(|target| &target.changes)
            .map(|change| change.method)
            .collect();
        for method in used {
            let faulty = RunOptions { fault: Some(method), ..RunOptions::default() };
            match run(&case, &description, &options, &faulty) {
                Ok(_) => panic!("{}: merged without its {method}", name(&case)),
                Err(error) => assert!(error.contains("were used"), "{}: {error}", name(&case)),
            }
            *methods.entry(method).or_default() += 1;
        }
    }
    // Every form that the neutral model has is among them.
    assert!(methods.len() >= 12, "{methods:?}");
}

/// An adapter in our own format merges to the same bytes as the one that it was made of, whatever
/// the method; and is refused where that one is.
#[test]
fn a_copy_in_our_own_format_merges_alike() {
    let scratch = tempfile::tempdir().unwrap();
    let number = std::cell::Cell::new(0);
    let copied = |adapter: Adapter| {
        let path = scratch.path().join(format!("{}.safetensors", number.get()));
        number.set(number.get() + 1);
        native::write(&adapter, &path, Overwrite::Never, Durability::Cached).unwrap();
        lora_format::read(&path, &ReadOptions::default()).unwrap()
    };
    let mut merged = 0;
    for case in cases() {
        let description = read_json(&case.join("case.json"));
        let tied = if has_readings(&description) { Tied::Both } else { Tied::Refuse };
        let options = MergeOptions { tied, ..merge_options(&description) };
        let engine = RunOptions::default();
        let original = run(&case, &description, &options, &engine);
        let copy = run_with(&case, &description, &options, &engine, &copied);
        match (original, copy) {
            (Ok((_, tensors, config)), Ok((_, copied, as_copied))) => {
                assert_eq!((tensors, config), (copied, as_copied), "{}", name(&case));
                merged += 1;
            }
            (Err(_), Err(_)) => {}
            // That its factors are not those of a matrix, only loralib's own file says.
            (Ok(_), Err(error)) if name(&case) == "loralib-conv2d" => {
                assert!(error.contains("conv"), "{error}");
            }
            (original, copy) => panic!("{}: {:?} {:?}", name(&case), original.err(), copy.err()),
        }
    }
    assert!(merged >= 120, "{merged}");
}

/// The base of an adapter of fused experts is known by its other targets.
#[test]
fn an_adapter_of_experts_is_stamped() {
    let case = fixtures().join("features/moe-qwen3-moe-fused");
    let description = read_json(&case.join("case.json"));
    let adapter = lora_format::read(&case.join("adapter"), &ReadOptions::default()).unwrap();
    let base = Checkpoint::open(&case.join(description["base"].as_str().unwrap())).unwrap();
    let fingerprint = lora_merge::identity::stamp(&adapter, &base).unwrap();
    assert!(adapter.components.iter().any(|component| component.target.parameter.contains('|')));
    let targets: Vec<&str> = fingerprint.targets.iter().map(|it| it.target.as_str()).collect();
    assert_eq!(targets, ["model.layers.0.self_attn.q_proj.weight"]);
}

/// Threads, tiles and instruction sets change nothing.
#[test]
fn the_bytes_depend_on_nothing_else() {
    for case in cases() {
        let description = read_json(&case.join("case.json"));
        if is_refused(&case, &description) {
            continue;
        }
        let tied = if has_readings(&description) { Tied::Both } else { Tied::Refuse };
        for dtype in [None, Some(Dtype::Bf16)] {
            let options = MergeOptions { tied, dtype, ..merge_options(&description) };
            let made = |engine: &RunOptions| {
                run(&case, &description, &options, engine)
                    .unwrap_or_else(|error| panic!("{}: {error}", name(&case)))
                    .1
            };
            let whole = made(&RunOptions { threads: 1, ..RunOptions::default() });
            for (threads, tile_bytes, isa) in
                [(3, 64, Isa::Scalar), (2, 1000, Isa::detect()), (1, 4096, Isa::Scalar)]
            {
                let engine = RunOptions { threads, tile_bytes, isa, ..RunOptions::default() };
                assert_eq!(made(&engine), whole, "{} {isa} {tile_bytes}", name(&case));
            }
        }
    }
}

/// `docs/methods.md` says of every fixture what is true.
#[test]
fn the_table_in_the_docs_is_right() {
    let text = std::fs::read_to_string(fixtures().join("../docs/methods.md")).unwrap();
    let mut listed: BTreeMap<String, bool> = BTreeMap::new();
    for line in text.lines().filter(|line| line.starts_with("| ")) {
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        let status = cells.iter().position(|cell| ["merged", "refused"].contains(cell));
        let Some(status) = status else { continue };
        let cases = cells[status + 1..].join(" ");
        for case in cases.split('`').skip(1).step_by(2) {
            let merged = cells[status] == "merged";
            let twice = listed.insert(case.to_owned(), merged).is_some();
            assert!(!twice, "{case} is in two rows");
        }
    }
    for case in cases() {
        let description = read_json(&case.join("case.json"));
        let merged = !is_refused(&case, &description);
        assert_eq!(listed.get(&name(&case)), Some(&merged), "{}", name(&case));
    }
}

/// Factors that are valid only on the base that their initialisation left behind merge into that
/// one, on the user's word.
#[test]
fn a_residual_base_is_merged_into_when_it_is_named() {
    for (raw, residual) in [("pissa-raw", "pissa-residual"), ("olora-raw", "olora-residual")] {
        let directory = |name: &str| fixtures().join("features").join(name);
        let case = directory(residual);
        let description = read_json(&case.join("case.json"));
        let base = case.join(description["base"].as_str().unwrap());
        let adapter = directory(raw).join("adapter");
        let options = MergeOptions { dtype: Some(Dtype::F32), ..MergeOptions::default() };
        let read = ReadOptions { residual_base: true, ..ReadOptions::default() };
        let plan = |read: &ReadOptions| {
            let adapter = lora_format::read(&adapter, read).map_err(|error| error.to_string())?;
            let base = Checkpoint::open(&base).unwrap();
            MergePlan::new(base, vec![adapter.into()], &options).map_err(|error| error.to_string())
        };
        assert!(plan(&ReadOptions::default()).unwrap_err().contains("--residual-base"));
        let plan = plan(&read).unwrap();
        let scratch = tempfile::tempdir().unwrap();
        let out = scratch.path().join("out");
        let report = write(&plan, TokenizerSource::Auto, &out, &RunOptions::default()).unwrap();
        let made = (report, read_model(&out), None);
        compare(&case, &description, None, &made).unwrap_or_else(|wrong| panic!("{raw}: {wrong}"));
    }
}
