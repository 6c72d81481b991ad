//! `resize`: adapters of smaller ranks, and what is said of them.

use std::path::Path;

use lora_format::Dtype;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::support::{
    Factors, Prng, Tensor, read_json, read_tensors, write_adapter, write_tensors,
};
use crate::{Ran, Scratch, cli, feature, peft};

/// `lora-cli/resize/1`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(dead_code, reason = "the members are there to be required")]
struct Report {
    schema: String,
    status: String,
    input: String,
    input_format: String,
    output: Option<String>,
    output_format: String,
    base: Option<String>,
    budget: Option<Budget>,
    targets: Vec<Target>,
    total: Total,
    unchanged: Vec<Unchanged>,
    shadowed: Vec<String>,
    not_carried: Vec<String>,
    notes: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Budget {
    bytes: u64,
    spent: u64,
    short_of_best: f64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(dead_code, reason = "the members are there to be required")]
struct Target {
    target: String,
    rows: u64,
    cols: u64,
    rank_before: usize,
    rank: usize,
    reason: String,
    noise: Option<Value>,
    kept: bool,
    energy: f64,
    captured: f64,
    residual: f64,
    optimal: f64,
    relative: f64,
    base_norm: Option<f64>,
    bytes_before: u64,
    bytes: u64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(dead_code, reason = "the members are there to be required")]
struct Total {
    energy: f64,
    captured: f64,
    residual: f64,
    optimal: f64,
    relative: f64,
    base_norm: Option<f64>,
    bytes_before: u64,
    bytes: u64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Unchanged {
    target: String,
    method: String,
    bytes: u64,
    skipped: bool,
}

fn report(ran: &Ran) -> Report {
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    serde_json::from_str(&ran.stdout).unwrap_or_else(|error| panic!("{error}: {}", ran.stdout))
}

fn ranks(report: &Report) -> Vec<usize> {
    report.targets.iter().map(|one| one.rank).collect()
}

const LLAMA: &str = "llama-vanilla/adapter";

/// The message is about `resize`, whose only path is an adapter.
#[test]
fn a_model_is_no_adapter() {
    let scratch = Scratch::with_directory();
    for model in ["base", "base.safetensors"] {
        let text =
            scratch.cli(&["resize", model, "--rank", "2", "-o", "x"]).refused(scratch.root());
        assert!(text.contains("\nhint: resize takes an adapter; "), "{text}");
    }
    let ran = scratch.cli(&["resize", "lora", "--rank", "2", "-o", "no/such/x"]);
    let text = ran.refused(scratch.root());
    assert!(text.starts_with("error: no/such: no such directory\nhint: create it first"), "{text}");
    let text =
        scratch.cli(&["resize", "lora", "--tolerance", "1", "-o", "x"]).refused(scratch.root());
    assert!(text.contains("at least 0 and below 1"), "{text}");
    let negative = scratch.cli(&["resize", "lora", "--rank", "2", "--max-rank", "-1", "-o", "x"]);
    assert!(negative.stderr.contains("invalid value '-1' for '--max-rank"), "{}", negative.stderr);
    assert!(!negative.stderr.contains("'-- -1'"), "{}", negative.stderr);
    // A dry run writes the table that it is asked for, and says that it wrote no adapter.
    let dry = ["resize", "lora", "--rank", "2", "--dry-run", "--csv", "t.csv"];
    let ran = scratch.cli(&dry);
    assert!(ran.stdout.contains("no adapter was written (--dry-run)"), "{}", ran.stdout);
    assert!(scratch.path("t.csv").is_file() && !scratch.path("x").exists());
}

#[test]
fn a_peft_directory_of_a_smaller_rank() {
    let scratch = Scratch::new();
    let adapter = peft(LLAMA);
    let ran = scratch.cli(&["resize", &adapter, "--rank", "3", "-o", "small", "--json"]);
    let report = report(&ran);
    assert_eq!((report.schema.as_str(), report.status.as_str()), ("lora-cli/resize/1", "resized"));
    assert_eq!((report.input_format.as_str(), report.output_format.as_str()), ("peft", "peft"));
    assert_eq!((report.targets.len(), report.unchanged.len()), (14, 0));
    for one in &report.targets {
        assert_eq!((one.rank_before, one.rank, one.kept), (8, 3, false));
        assert_eq!(one.bytes * 8, one.bytes_before * 3);
        // Rounding to f32 is all that the factors lack of the best ones.
        assert!(one.residual >= one.optimal * (1.0 - 1e-12));
        assert!(one.residual <= one.optimal * (1.0 + 1e-9), "{one:?}");
        assert!((one.captured + one.residual * one.residual - one.energy).abs() < 1e-9);
        assert!((one.relative - one.residual / one.energy.sqrt()).abs() < 1e-12);
    }
    assert_eq!(report.total.bytes * 8, report.total.bytes_before * 3);
    let config = read_json(&scratch.path("small/adapter_config.json"));
    assert_eq!((&config["r"], &config["lora_alpha"]), (&json!(3), &json!(3.0)));
    let tensors = read_tensors(&scratch.path("small/adapter_model.safetensors"));
    let original = read_tensors(&Path::new(&adapter).join("adapter_model.safetensors"));
    assert_eq!(tensors.keys().collect::<Vec<_>>(), original.keys().collect::<Vec<_>>());
    for (name, tensor) in &tensors {
        assert_eq!(tensor.dtype, original[name].dtype);
        assert!(tensor.shape.contains(&3));
    }
    // It is read again, and to make it larger leaves it as it is.
    let again = scratch.cli(&["resize", "small", "--rank", "8", "-o", "again"]);
    assert!(again.done().stderr.contains("14 targets keep their factors bit for bit"));
    assert_eq!(read_tensors(&scratch.path("again/adapter_model.safetensors")).len(), 28);
    for (name, tensor) in read_tensors(&scratch.path("again/adapter_model.safetensors")) {
        assert_eq!(tensor.data, tensors[&name].data, "{name}");
    }
}

/// A rank-8 adapter whose change has rank 3, scaled by 2, and an f32 base.
fn redundant(scratch: &Scratch) {
    let mut prng = Prng::new(5);
    let base = [Tensor::random(&mut prng, "m.q.weight", Dtype::F32, &[40, 48], 1.0)];
    write_tensors(&scratch.path("wide.safetensors"), &base, &[("format", "pt")]);
    let (mut a, b) = (prng.values(8 * 48, 0.5), prng.values(40 * 8, 0.5));
    for row in 3..8 {
        for col in 0..48 {
            a[row * 48 + col] = a[(row % 3) * 48 + col] * 0.5;
        }
    }
    let factors = Factors {
        module: "m.q".to_owned(),
        a: Tensor::new("", Dtype::F32, &[8, 48], &a),
        b: Tensor::new("", Dtype::F32, &[40, 8], &b),
    };
    write_adapter(&scratch.path("redundant"), &[factors], &json!({"lora_alpha": 16}));
}

#[test]
fn all_of_the_energy_is_the_same_merge() {
    let scratch = Scratch::new();
    redundant(&scratch);
    for (to, output) in [("peft", "exact"), ("lora", "exact.safetensors")] {
        let ran = scratch.cli(&[
            "resize",
            "redundant",
            "--energy",
            "1",
            "--to",
            to,
            "-o",
            output,
            "--json",
        ]);
        let report = report(&ran);
        assert_eq!((ranks(&report), report.targets[0].optimal), (vec![3], 0.0));
        assert!(report.total.relative < 1e-7 && report.total.relative > 0.0);
        for adapter in ["redundant", output] {
            scratch.cli(&["merge", "wide.safetensors", adapter, "-o", "m", "--force", "-q"]).done();
            std::fs::rename(scratch.path("m"), scratch.path(&format!("{adapter}-merged"))).unwrap();
        }
        let of = |name: &str| {
            read_tensors(&scratch.path(&format!("{name}-merged")))["m.q.weight"].values()
        };
        let base = read_tensors(&scratch.path("wide.safetensors"))["m.q.weight"].values();
        let (wanted, found) = (of("redundant"), of(output));
        assert!(wanted.iter().zip(&base).any(|(w, b)| (w - b).abs() > 0.1));
        for (one, other) in wanted.iter().zip(&found) {
            assert!((one - other).abs() < 1e-6, "{one} {other}");
        }
    }
}

#[test]
fn policies_rules_and_names_of_other_programs() {
    let scratch = Scratch::new();
    let adapter = peft(LLAMA);
    let planned = |more: &[&str]| {
        let arguments = [&["resize", adapter.as_str(), "--dry-run", "--json"], more].concat();
        report(&scratch.cli(&arguments))
    };
    let before = scratch.names();
    let all = planned(&["--energy", "0.6"]);
    assert_eq!(all.status, "planned");
    for one in &all.targets {
        assert!(one.captured >= 0.6 * one.energy * (1.0 - 1e-9) && one.rank < 8, "{one:?}");
    }
    // √0.6 of the norm is 0.6 of the energy.
    let norm = 0.6f64.sqrt().to_string();
    assert_eq!(ranks(&planned(&["--sv_fro", &norm])), ranks(&all));
    assert_eq!(ranks(&planned(&["--sv-ratio", "1"])), [1; 14]);
    assert_eq!(ranks(&planned(&["--sv_cumulative", "1"])), [8; 14]);
    let capped: Vec<usize> = ranks(&all).into_iter().map(|rank| rank.min(2)).collect();
    assert!(capped != ranks(&all), "no rank is above 2");
    assert_eq!(ranks(&planned(&["--energy", "0.6", "--max-rank", "2"])), capped);
    for one in planned(&["--tolerance", "0.7"]).targets {
        assert!(one.relative <= 0.7 + 1e-6);
    }
    let auto = planned(&["--rank", "auto"]);
    assert!(auto.targets.iter().all(|one| one.noise.is_some()));
    let rules = ["--rank", "4", "--rank-for", "q_proj=skip", "--rank-for", "v_proj=2"];
    let ruled = planned(&[&rules[..], &["--rank-for", "v_.*=1"]].concat());
    assert_eq!((ruled.unchanged.len(), ruled.shadowed), (2, vec!["v_.*".to_owned()]));
    let mistyped = ["resize", &adapter, "--dry-run", "--rank", "4", "--rank-for", "v_prj=2"];
    let text = scratch.cli(&mistyped).refused(scratch.root());
    assert!(
        text.starts_with("error: no module matches --rank-for v_prj (nearest: `v_proj`"),
        "{text}"
    );
    assert!(text.contains("\nhint: `q_proj` matches every module"), "{text}");
    assert!(ruled.unchanged.iter().all(|one| one.skipped && one.target.contains("q_proj")));
    assert!(ruled.unchanged.iter().all(|one| one.method == "LoRA" && one.bytes > 0));
    for one in &ruled.targets {
        assert_eq!(one.rank, if one.target.contains("v_proj") { 2 } else { 4 });
    }
    assert_eq!(scratch.names(), before, "a dry run wrote something");
}

#[test]
fn a_budget_is_kept() {
    let scratch = Scratch::new();
    let adapter = peft(LLAMA);
    let full = report(&scratch.cli(&["resize", &adapter, "--rank", "8", "--dry-run", "--json"]));
    let half = (full.total.bytes / 2).to_string();
    let arguments =
        ["resize", &adapter, "--budget", &half, "-o", "half", "--csv", "t.csv", "--json"];
    let report = report(&scratch.cli(&arguments));
    let budget = report.budget.unwrap();
    assert!(budget.bytes == full.total.bytes / 2 && budget.short_of_best >= 0.0);
    assert!(budget.spent <= budget.bytes && budget.spent == report.total.bytes);
    // Not one number for all: that would leave more.
    let even =
        self::report(&scratch.cli(&["resize", &adapter, "--rank", "4", "--dry-run", "--json"]));
    assert!(report.total.residual < even.total.residual);
    let table = std::fs::read_to_string(scratch.path("t.csv")).unwrap();
    let mut lines = table.lines();
    assert!(lines.next().unwrap().starts_with("target,rows,cols,rank_before,rank,reason,"));
    for (line, one) in lines.by_ref().zip(&report.targets) {
        let fields: Vec<&str> = line.split(',').collect();
        assert_eq!((fields[0], fields.len()), (one.target.as_str(), 15));
        assert_eq!((fields[4], fields[5]), (one.rank.to_string().as_str(), "budget"));
        assert_eq!(fields[9].parse::<f64>().unwrap(), one.residual);
    }
    assert_eq!(lines.next(), None);
    for (csv, more, message) in [
        ("t.csv", &[][..], "error: t.csv: already exists"),
        ("y", &[], "error: y: is where the adapter goes"),
        ("half/adapter_model.safetensors", &["--force"], "replace or change the input"),
    ] {
        let arguments = ["resize", "half", "--rank", "1", "-o", "y", "--csv", csv];
        let error = scratch.cli(&[&arguments[..], more].concat()).refused(scratch.root());
        assert!(error.contains(message) && !scratch.path("y").exists(), "{error}");
    }

    let error = scratch.cli(&["resize", &adapter, "--budget", "1KB", "-o", "x"]);
    let error = error.refused(scratch.root());
    assert!(error.starts_with("error: the minimum ranks alone take "), "{error}");
}

#[test]
fn a_base_makes_errors_relative_to_its_weights() {
    let scratch = Scratch::new();
    let (adapter, base) = (peft(LLAMA), peft("llama-vanilla/base"));
    let arguments =
        ["resize", &adapter, "--tolerance", "0.3", "--base", &base, "-o", "out", "--json"];
    // Shown relative to them; chosen so only if that is asked for.
    let shown = report(&scratch.cli(&arguments));
    for one in &shown.targets {
        assert!(one.residual <= 0.3 * one.energy.sqrt() * (1.0 + 1e-6));
    }
    let report = report(&scratch.cli(&[&arguments[..], &["--relative", "--force"]].concat()));
    assert_ne!(ranks(&report), ranks(&shown));
    let stored = read_tensors(&Path::new(&base).join("model.safetensors"));
    for one in &report.targets {
        let weight = stored.iter().find(|(name, _)| one.target.ends_with(name.as_str()));
        let weight = weight.unwrap_or_else(|| panic!("{}", one.target)).1;
        let norm = weight.values().iter().map(|value| value * value).sum::<f64>().sqrt();
        assert!((one.base_norm.unwrap() / norm - 1.0).abs() < 1e-12);
        assert!(one.relative <= 0.3 * (1.0 + 1e-6));
        assert!((one.relative - one.residual / norm).abs() < 1e-12);
    }
    let sum: f64 = report.targets.iter().map(|one| one.base_norm.unwrap().powi(2)).sum();
    assert!((report.total.base_norm.unwrap() / sum.sqrt() - 1.0).abs() < 1e-12);
    let wrong =
        scratch.cli(&["resize", &adapter, "--rank", "2", "--base", "base.safetensors", "-o", "x"]);
    assert!(wrong.refused(scratch.root()).contains("does not fit base.safetensors"));
    assert!(!scratch.path("x").exists());
}

#[test]
fn other_forms_pass_or_are_refused_by_name() {
    let scratch = Scratch::new();
    let dora = feature("dora-linear/adapter");
    let error = scratch.cli(&["resize", &dora, "--rank", "2", "-o", "x"]).refused(scratch.root());
    assert!(error.contains("DoRA: its magnitudes scale W + s·B·A"), "{error}");
    assert!(error.contains("hint: to leave a module as it is: --rank-for PATTERN=skip"), "{error}");
    let loha = feature("loha/adapter");
    let error = scratch.cli(&["resize", &loha, "--rank", "2", "-o", "x"]).refused(scratch.root());
    assert!(error.contains("LoHa: its change is no product of two factors"), "{error}");

    for (name, output) in [
        ("conv2d", "peft"),
        ("conv3d", "peft"),
        ("embedding", "peft"),
        ("lora-bias", "peft"),
        ("adalora", "peft"),
        ("modules-to-save", "peft"),
        ("bias-all", "lora"),
    ] {
        let adapter = feature(&format!("{name}/adapter"));
        let arguments = ["resize", &adapter, "--rank", "1", "--to", output, "-o", name, "--json"];
        let first = report(&cli(scratch.root(), &arguments));
        assert!(first.targets.iter().all(|one| one.rank == 1), "{name}");
        let passed = ["lora-bias", "modules-to-save", "bias-all"].contains(&name);
        assert_eq!(!first.unchanged.is_empty(), passed, "{name}");
        // What was written is what was certified.
        let arguments = ["resize", name, "--rank", "1", "--dry-run", "--json"];
        let second = report(&cli(scratch.root(), &arguments));
        assert_eq!(second.targets.len(), first.targets.len());
        for (one, other) in first.targets.iter().zip(&second.targets) {
            assert!((one.captured - other.energy).abs() <= 1e-6 * one.energy, "{name} {one:?}");
        }
    }
}

#[test]
fn ranks_that_cannot_be_meant_are_refused() {
    let scratch = Scratch::new();
    for (more, message) in [
        (&[][..], "nothing says which ranks are wanted"),
        (&["--rank", "2", "--energy", "0.5"], "several options say which ranks are wanted"),
        (&["--rank", "2", "--budget", "1MB"], "several options say which ranks are wanted"),
        (&["--rank", "0"], "`0`: the rank must be from 1"),
        (&["--rank", "energy:0.5"], "--rank energy:0.5: it is neither a rank nor auto"),
        (&["--energy", "1.5"], "`energy:1.5`: the share must be above 0"),
        (&["--energy", "-0.5"], "`energy:-0.5`: the share must be above 0"),
        (&["--sv_ratio", "0.5"], "`sv_ratio:0.5`: the ratio must be 1 or more"),
        (&["--rank", "2", "--rank-for", "q"], "`q`: it is not PATTERN=SETTINGS"),
        (&["--budget", "1MB", "--rank-for", "q=2"], "a budget chooses all ranks itself"),
        (&["--rank", "2", "--min-rank", "4", "--max-rank", "3"], "--min-rank 4 is above"),
        (&["--rank", "2", "--max-rank", "0"], "--max-rank 0 leaves nothing"),
        (&["--budget", "1MB", "--relative"], "--relative needs the base"),
    ] {
        let arguments = [&["resize", "lora", "-o", "x"], more].concat();
        let error = scratch.cli(&arguments).refused(scratch.root());
        assert!(error.starts_with(&format!("error: {message}")), "{more:?}: {error}");
        assert!(!scratch.path("x").exists());
    }
    // Refused before any work.
    scratch.cli(&["resize", "lora", "--rank", "2", "-o", "x"]).done();
    let error = scratch.cli(&["resize", "lora", "--rank", "2", "-o", "x"]).refused(scratch.root());
    assert!(error.starts_with("error: x: already exists\nhint: choose another -o"), "{error}");
    scratch.cli(&["resize", "lora", "--rank", "1", "-o", "x", "--force"]).done();
    let error = scratch.cli(&["resize", "lora", "--rank", "1", "-o", "lora", "--force"]);
    assert!(error.refused(scratch.root()).contains("would replace or change the input"));
}
