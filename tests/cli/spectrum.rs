//! `lora-cli spectrum`: singular values, ranks, and where the energy lies.

use std::path::Path;

use lora_format::Dtype;
use serde_json::{Value, json};

use crate::support::{Factors, Prng, Tensor, write_adapter, write_tensors};
use crate::{Scratch, cli, peft};

pub(crate) fn report(ran: &crate::Ran) -> Value {
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    serde_json::from_str(&ran.stdout).unwrap()
}

pub(crate) fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|one| one.as_f64().unwrap()).collect()
}

/// Checks that an object has these members and no others.
pub(crate) fn members(value: &Value, names: &str) {
    let mut found: Vec<&str> = value.as_object().unwrap().keys().map(String::as_str).collect();
    let mut wanted: Vec<&str> = names.split_whitespace().collect();
    found.sort_unstable();
    wanted.sort_unstable();
    assert_eq!(found, wanted);
}

/// A base and a model that has some more: of `q` the matrix with these values on its diagonal, of
/// the norm 0.5 everywhere.
fn diagonal(scratch: &Scratch, values: &[f64]) {
    let still = Tensor::random(&mut Prng::new(3), "lm_head.weight", Dtype::F32, &[4, 8], 1.0);
    let norm =
        |value: f64| Tensor::new("model.layers.0.norm.weight", Dtype::F32, &[8], &[value; 8]);
    let mut q = vec![0.0; 48];
    q[1] = 3.0;
    let of =
        |q: &[f64]| Tensor::new("model.layers.0.self_attn.q_proj.weight", Dtype::F32, &[6, 8], q);
    let before = [of(&q), norm(2.0), still.clone()];
    write_tensors(&scratch.path("before.safetensors"), &before, &[]);
    for (index, value) in values.iter().enumerate() {
        q[index * 9] += value;
    }
    write_tensors(&scratch.path("after.safetensors"), &[of(&q), norm(2.5), still], &[]);
}

#[test]
fn a_pair_of_known_spectrum() {
    let scratch = Scratch::new();
    diagonal(&scratch, &[1.0, 4.0, 0.0, 2.0]);
    let ran = scratch.cli(&["spectrum", "before.safetensors", "after.safetensors", "--json"]);
    let report = report(&ran);
    assert_eq!(report["schema"], "lora-cli/spectrum/1");
    let [tensor] = report["tensors"].as_array().unwrap().as_slice() else { panic!("{report}") };
    assert_eq!(tensor["parameter"], "model.layers.0.self_attn.q_proj.weight");
    assert_eq!((&tensor["projection"], &tensor["depth"]), (&json!("q_proj"), &json!(0)));
    for (found, value) in numbers(&tensor["singular_values"]).iter().zip([4.0, 2.0, 1.0, 0.0]) {
        assert!((found - value).abs() < 1e-6, "{tensor}");
    }
    assert_eq!((&tensor["complete"], &tensor["known"]), (&json!(true), &json!(6)));
    assert_eq!((&tensor["r50"], &tensor["r90"], &tensor["r99"]), (&json!(1), &json!(2), &json!(3)));
    assert_eq!(tensor["energy"], 21.0);
    assert!((tensor["relative"].as_f64().unwrap() - (21.0f64 / 9.0).sqrt()).abs() < 1e-12);
    assert!((tensor["stable_rank"].as_f64().unwrap() - 21.0 / 16.0).abs() < 1e-6);
    let [other] = report["others"].as_array().unwrap().as_slice() else { panic!("{report}") };
    assert_eq!(
        (&other["parameter"], &other["energy"]),
        (&json!("model.layers.0.norm.weight"), &json!(2.0))
    );
    assert_eq!(other["relative"], 0.25);
    assert_eq!(report["unchanged"], json!(["lm_head.weight"]));
    assert_eq!(report["total"]["energy"], 23.0);
    assert!((report["by_projection"][0]["share"].as_f64().unwrap() - 21.0 / 23.0).abs() < 1e-12);

    members(
        &report,
        "schema base tuned adapter total by_projection by_depth tensors others unchanged passed_over \
         only_base only_tuned notes",
    );
    for group in [&report["total"], &report["by_projection"][0], &report["by_depth"][0]] {
        members(group, "name matrices others energy share relative r50 r90 r95 r99");
    }
    members(
        tensor,
        "parameter kind projection depth shape rows columns energy share relative rank complete known \
         r50 r90 r95 r99 stable_rank entropy_rank noise singular_values",
    );
    members(&tensor["noise"], "basis level storage bulk edge threshold rank strict lenient clear");
    members(other, "parameter kind projection depth shape energy share relative");

    let ran = scratch.cli(&["spectrum", "before.safetensors", "after.safetensors"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(
        ran.stdout.contains(": 1 matrices and 1 other tensors changed, 1 did not\n"),
        "{}",
        ran.stdout
    );
    assert!(ran.stdout.contains("q_proj"), "{}", ran.stdout);
    let ran = scratch.cli(&["spectrum", "before.safetensors", "before.safetensors"]);
    assert!(ran.stdout.ends_with(": nothing changed\n"), "{}", ran.stdout);
}

/// The factors' decomposition and that of the merged model's difference are the same.
#[test]
fn an_adapter_and_what_it_makes_of_its_base_have_one_spectrum() {
    let scratch = Scratch::new();
    let (base, adapter) = (peft("llama-vanilla/base"), peft("llama-vanilla/adapter"));
    let ran = scratch.cli(&["merge", &base, &adapter, "-o", "merged", "--dtype", "f32"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let by_factors = report(&scratch.cli(&["spectrum", &adapter, "--base", &base, "--json"]));
    let by_difference = report(&scratch.cli(&["spectrum", &base, "merged", "--json"]));
    let (ours, theirs) = (&by_factors["tensors"], &by_difference["tensors"]);
    assert!(ours.as_array().unwrap().len() > 3);
    assert_eq!(ours.as_array().unwrap().len(), theirs.as_array().unwrap().len());
    for (one, other) in ours.as_array().unwrap().iter().zip(theirs.as_array().unwrap()) {
        assert_eq!(one["parameter"], other["parameter"]);
        assert_eq!(one["shape"], other["shape"]);
        let (values, found) =
            (numbers(&one["singular_values"]), numbers(&other["singular_values"]));
        assert_eq!(values.len(), found.len());
        for (a, b) in values.iter().zip(&found) {
            assert!((a - b).abs() < 1e-5 * values[0], "{}: {a} {b}", one["parameter"]);
        }
        for member in ["relative", "stable_rank"] {
            let of = |one: &Value| one[member].as_f64().unwrap();
            assert!((of(one) / of(other) - 1.0).abs() < 1e-4, "{member} {one} {other}");
        }
    }
    // Without the base, the adapter's own names, and nothing relative.
    let alone = report(&scratch.cli(&["spectrum", &adapter, "--json"]));
    assert_eq!(alone["tensors"].as_array().unwrap().len(), ours.as_array().unwrap().len());
    assert_eq!(alone["tensors"][0]["relative"], Value::Null);
    assert_eq!(alone["tensors"][0]["singular_values"], ours[0]["singular_values"]);
}

/// Conv1D and embeddings are stored as (in, out).
#[test]
fn what_is_stored_transposed_has_the_stored_shape() {
    let scratch = Scratch::new();
    let ran =
        scratch.cli(&["spectrum", &peft("gpt2/adapter"), "--base", &peft("gpt2/base"), "--json"]);
    let report = report(&ran);
    for tensor in report["tensors"].as_array().unwrap() {
        assert!(tensor["relative"].is_number(), "{tensor}");
        let shape = numbers(&tensor["shape"]);
        let (rows, cols) = (tensor["rows"].as_f64().unwrap(), tensor["columns"].as_f64().unwrap());
        assert!(shape == [cols, rows], "{tensor}");
    }
}

/// Every file that can be written is what it says it is.
#[test]
fn tables_figures_and_pages() {
    let scratch = Scratch::new();
    let (base, adapter) = (peft("llama-vanilla/base"), peft("llama-vanilla/adapter"));
    let all = [
        "spectrum", &adapter, "--base", &base, "--csv", "t.csv", "--plot", "p.png", "--report",
        "r.html",
    ];
    let ran = scratch.cli(&all);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(ran.stderr.ends_with("wrote p.png, t.csv, r.html\n"), "{}", ran.stderr);
    let read = |name: &str| std::fs::read(scratch.path(name)).unwrap();
    assert!(read("p.png").starts_with(b"\x89PNG"));
    let csv = String::from_utf8(read("t.csv")).unwrap();
    assert_eq!(csv.lines().count(), 15);
    assert!(csv.starts_with("parameter,kind,projection,depth,shape,energy,"));
    let page = String::from_utf8(read("r.html")).unwrap();
    for part in [
        "<svg",
        "Singular values of ΔW",
        "Rank that holds 90 % of the energy",
        "Relative change",
        "Where the energy of the change lies",
        "model.layers.1.mlp.up_proj.weight",
    ] {
        assert!(page.contains(part), "{part}");
    }
    assert!(!page.contains("src=") && !page.contains("href="), "a page that loads something");
    // Nothing is replaced unless it is asked for.
    let ran = scratch.cli(&all);
    assert_eq!(ran.code, Some(2));
    assert!(ran.stderr.contains("--force"), "{}", ran.stderr);
    let ran = scratch.cli(&[&all[..], &["--force", "-q"]].concat());
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""));
    assert_eq!(read("r.html"), page.as_bytes());

    let plot = |tensor: &str| {
        let picture = ["spectrum", &adapter, "--plot", "q.svg", "--tensor", tensor, "--force"];
        scratch.cli(&picture)
    };
    assert_eq!(plot("1.self_attn.q_proj").code, Some(0));
    let svg = String::from_utf8(read("q.svg")).unwrap();
    assert!(svg.contains("model.layers.1.self_attn.q_proj") && svg.contains("r90 ="), "{svg}");
    let text = plot("q_proj").stderr;
    assert!(text.contains("error: --tensor q_proj: several, such as `model.layers.0."), "{text}");
    let text = plot("nothing").stderr;
    assert!(text.contains("no such tensor was analysed\nhint: there are 14: `model."), "{text}");
    let ran = scratch.cli(&["spectrum", &adapter, "--plot", "q.gif"]);
    assert!(ran.stderr.contains("q.gif: neither .svg nor .png"), "{}", ran.stderr);
    assert!(!scratch.path("q.gif").exists());
}

/// What cannot be written, or is not there to be drawn, is told before the analysis.
#[test]
fn outputs_are_checked_first() {
    let scratch = Scratch::with_directory();
    scratch.cli(&["merge", "base", "lora", "-o", "tuned", "--dtype", "f32"]).done();
    for (more, start) in [
        (&["--csv", "t.svg", "--plot", "./t.svg"][..], "error: --csv and --plot name one file: "),
        (&["--report", "page.txt"], "error: page.txt: a report is a page, and this is not .html\n"),
        (&["--report", "no/page.html"], "error: --report no: no such directory\nhint: create it"),
        (&["--csv", "base/config.json", "--force"], "error: base/config.json: the output would"),
        (&["--plot", "p.svg", "--tensor", "k"], "error: --tensor k: no such tensor was analysed\n"),
    ] {
        let command = ["spectrum", "base", "tuned"];
        let text = scratch.cli(&[&command[..], more].concat()).refused(scratch.root());
        assert!(text.starts_with(start), "{text} does not start with {start}");
        assert!(!text.contains("-o"), "{text}");
    }
}

#[test]
fn what_cannot_be_meant_is_refused() {
    let scratch = Scratch::new();
    let refused = |arguments: &[&str]| scratch.cli(arguments).refused(scratch.root());
    assert_eq!(
        refused(&["spectrum", "base.safetensors"]),
        "error: base.safetensors: a model, and a change needs two\n\
         hint: give the base and the fine-tuned model: lora-cli spectrum BASE FINETUNED\n"
    );
    assert_eq!(
        refused(&["spectrum", "base.safetensors", "lora"]),
        "error: lora: an adapter, and a model is needed here\n\
         hint: for an adapter: lora-cli spectrum ADAPTER --base MODEL\n"
    );
    assert!(refused(&["spectrum", "nowhere"]).contains("nowhere: no such file or directory"));
    assert!(refused(&["spectrum", "a", "b", "--base", "c"]).contains("--base is for an adapter"));
}

/// Changes that are no products of factors are listed, and so are those that are no matrix.
#[test]
fn what_has_no_spectrum_is_listed() {
    let root = Path::new(".");
    let dora = report(&cli(root, &["spectrum", &peft("unsupported/dora"), "--json"]));
    assert_eq!(dora["tensors"], json!([]));
    let passed = &dora["passed_over"][0];
    members(passed, "parameter reason");
    assert!(passed["reason"].as_str().unwrap().contains("DoRA"), "{dora}");
}

/// An adapter that was never trained: B is zero.
#[test]
fn an_adapter_that_changes_nothing() {
    let scratch = Scratch::new();
    let mut prng = Prng::new(5);
    let mut factors = Factors::random(&mut prng, "model.layers.0.q", (16, 24, 4), Dtype::F32, 0.3);
    factors.b = Tensor::new(&factors.b.name, Dtype::F32, &[16, 4], &[0.0; 64]);
    write_adapter(&scratch.path("fresh"), &[factors], &json!({}));
    let report = report(&scratch.cli(&["spectrum", "fresh", "--json"]));
    assert_eq!(report["unchanged"], json!(["model.layers.0.q.weight"]));
    assert_eq!((&report["tensors"], &report["total"]["energy"]), (&json!([]), &json!(0.0)));
}

#[test]
fn the_output_does_not_depend_on_the_number_of_threads() {
    let scratch = Scratch::new();
    let (base, adapter) = (peft("llama-vanilla/base"), peft("llama-vanilla/adapter"));
    let on = |threads: &str| {
        let arguments = ["spectrum", &adapter, "--base", &base, "--json", "--threads", threads];
        scratch.cli(&arguments).stdout
    };
    assert!(on("1").starts_with('{'));
    assert_eq!(on("1"), on("3"));
}
