//! `lora-cli compare`: how alike the directions of two changes are.

use lora_format::Dtype;
use serde_json::{Value, json};

use crate::spectrum::{members, numbers, report};
use crate::support::{Factors, Prng, Tensor, write_adapter};
use crate::{Scratch, peft};

/// An adapter that has a fingerprint is not measured against another model.
#[test]
fn another_base_is_refused() {
    let scratch = Scratch::with_directory();
    let stamp = ["stamp", "lora", "--base", "base", "-o", "own.safetensors"];
    scratch.cli(&stamp).done();
    let mut prng = Prng::new(77);
    let other = [
        Tensor::random(&mut prng, "model.layers.0.q.weight", Dtype::Bf16, &[16, 24], 1.0),
        Tensor::random(&mut prng, "model.norm.weight", Dtype::Bf16, &[24], 1.0),
    ];
    crate::support::write_tensors(&scratch.path("other.safetensors"), &other, &[]);
    for command in [
        &["spectrum", "own.safetensors"][..],
        &["compare", "lora", "own.safetensors"],
        &["compare", "own.safetensors", "lora"],
    ] {
        let with = |more: &[&str]| scratch.cli(&[command, &["--base"], more].concat());
        assert_eq!(with(&["base"]).code, Some(0), "{command:?}");
        let text = with(&["other.safetensors"]).refused(scratch.root());
        let start = "error: other.safetensors: not the base that own.safetensors was trained on: ";
        let end = "hint: give the base that the adapter was trained on; if you are sure, \
                   --allow-different-base\n";
        assert!(text.starts_with(start) && text.ends_with(end), "{text}");
        let ran = with(&["other.safetensors", "--allow-different-base"]);
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    }
}

/// The default is written as the option takes it.
#[test]
fn the_help_says_how_ranks_are_given() {
    let help = Scratch::new().cli(&["compare", "--help"]);
    assert!(help.stdout.contains("[default: 4,64]"), "{}", help.stdout);
}

fn close(found: &Value, wanted: f64) -> bool {
    (found.as_f64().unwrap() - wanted).abs() < 1e-9
}

fn tensors(report: &Value) -> &[Value] {
    assert_eq!(report["schema"], "lora-cli/compare/1");
    report["tensors"].as_array().unwrap()
}

#[test]
fn an_adapter_against_itself() {
    let scratch = Scratch::new();
    let adapter = peft("llama-vanilla/adapter");
    let report = report(&scratch.cli(&["compare", &adapter, &adapter, "--json"]));
    assert_eq!(tensors(&report).len(), 14);
    for tensor in tensors(&report) {
        assert_eq!(tensor["ranks"], json!([8, 8]));
        for side in ["phi", "phi_left"] {
            let phi = tensor[side].as_array().unwrap();
            for row in phi {
                // Its first i directions are among its first j, or the other way round.
                assert!(row.as_array().unwrap().iter().all(|phi| close(phi, 1.0)), "{tensor}");
            }
            assert_eq!((phi.len(), phi[0].as_array().unwrap().len()), (8, 8));
        }
        assert!(close(&tensor["cosine"], 1.0));
        for distance in ["projection_distance", "geodesic_distance"] {
            assert!(close(&tensor[distance], 0.0), "{tensor}");
            assert!(close(&tensor[&format!("{distance}_left")], 0.0), "{tensor}");
        }
        assert_eq!(tensor["base_norm"], Value::Null);
    }
    assert!(close(&report["mean"]["phi"][7][7], 1.0));
    let few = scratch.cli(&["compare", &adapter, &adapter, "--top", "3"]);
    assert!(few.stdout.contains("φ(3, 3) = 1.000"), "{}", few.stdout);
}

/// Two adapters of one weight: A's rows have nothing but the first inputs, B's nothing but the last.
fn orthogonal(scratch: &Scratch) {
    let mut prng = Prng::new(9);
    for (name, inputs) in [("first", 0..12), ("last", 12..24)] {
        let mut factors =
            Factors::random(&mut prng, "model.layers.0.q", (16, 24, 4), Dtype::F32, 0.3);
        let mut a = factors.a.values();
        for (index, value) in a.iter_mut().enumerate() {
            if !inputs.contains(&(index % 24)) {
                *value = 0.0;
            }
        }
        factors.a = Tensor::new(&factors.a.name, Dtype::F32, &[4, 24], &a);
        write_adapter(&scratch.path(name), &[factors], &json!({}));
    }
}

#[test]
fn orthogonal_adapters() {
    let scratch = Scratch::new();
    orthogonal(&scratch);
    let report = report(&scratch.cli(&["compare", "first", "last", "--json"]));
    let [tensor] = tensors(&report) else { panic!("{report}") };
    for row in tensor["phi"].as_array().unwrap() {
        assert!(row.as_array().unwrap().iter().all(|phi| close(phi, 0.0)), "{tensor}");
    }
    assert!(close(&tensor["cosine"], 0.0));
    assert!(close(&tensor["projection_distance"], 2.0), "{tensor}");
    assert!(close(&tensor["geodesic_distance"], std::f64::consts::PI), "{tensor}");
    assert!(close(&tensor["random"], 4.0 / 24.0));
    // The outputs are another matter.
    assert!(tensor["phi_left"][3][3].as_f64().unwrap() > 0.01, "{tensor}");
}

/// Against its own merge, an adapter's directions are those of the difference; and what W0 has there
/// is what the definition says.
#[test]
fn an_adapter_against_its_merge() {
    let scratch = Scratch::new();
    for case in ["llama-vanilla", "gpt2"] {
        let (base, adapter) = (peft(&format!("{case}/base")), peft(&format!("{case}/adapter")));
        let merged = format!("merged-{case}");
        let ran = scratch.cli(&["merge", &base, &adapter, "-o", &merged, "--dtype", "f32"]);
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        let arguments =
            ["compare", &adapter, &merged, "--base", &base, "--ranks", "2,64", "--json"];
        let report = report(&scratch.cli(&arguments));
        assert!(tensors(&report).len() > 3);
        assert_eq!((&report["only_a"], &report["only_b"]), (&json!([]), &json!([])));
        members(
            &report,
            "schema a b base top mean by_projection tensors only_a only_b renamed passed_over notes",
        );
        for mean in [&report["mean"], &report["by_projection"][0]] {
            members(
                mean,
                "name tensors cosine phi phi_left random random_left projection_distance \
                 projection_distance_left geodesic_distance geodesic_distance_left",
            );
        }
        members(
            &report["tensors"][0],
            "parameter projection depth outputs inputs ranks norms cosine phi phi_left random \
             random_left angles angles_left projection_distance projection_distance_left \
             geodesic_distance geodesic_distance_left base_norm amplification_a amplification_b \
             not_amplified",
        );
        members(
            &report["tensors"][0]["amplification_a"][0],
            "rank through_change through_itself through_random factor",
        );
        for tensor in tensors(&report) {
            let [rank, other] = numbers(&tensor["ranks"])[..] else { panic!("{tensor}") };
            // A difference beside an adapter has as many directions as that.
            assert_eq!(rank, other);
            let last = rank as usize - 1;
            for side in ["phi", "phi_left"] {
                let phi = tensor[side][last][last].as_f64().unwrap();
                assert!((phi - 1.0).abs() < 1e-4, "{tensor}");
            }
            assert!((tensor["cosine"].as_f64().unwrap() - 1.0).abs() < 1e-6, "{tensor}");
            let (a, b) = (&tensor["amplification_a"], &tensor["amplification_b"]);
            assert_eq!((&a[0]["rank"], &a[1]["rank"]), (&json!(2), &json!(rank as usize)));
            for index in 0..2 {
                let of = |all: &Value, member: &str| all[index][member].as_f64().unwrap();
                let (one, other) = (of(a, "through_change"), of(b, "through_change"));
                assert!((one - other).abs() < 1e-2 * of(a, "through_itself"), "{tensor}");
                assert!(one <= of(a, "through_itself") * 1.0001, "{tensor}");
                let factor = numbers(&tensor["norms"])[0] / one;
                assert!((of(a, "factor") / factor - 1.0).abs() < 1e-9, "{tensor}");
            }
        }
    }
}

/// One adapter as two programs name its modules.
#[test]
fn a_change_of_prefix_is_found_and_told() {
    let scratch = Scratch::new();
    let write = |name: &str, prefix: &str| {
        let mut prng = Prng::new(4);
        let factors: Vec<Factors> = ["layers.0.mlp.up", "layers.1.mlp.up"]
            .iter()
            .map(|module| {
                let module = format!("{prefix}{module}");
                Factors::random(&mut prng, &module, (16, 24, 4), Dtype::F32, 0.3)
            })
            .collect();
        write_adapter(&scratch.path(name), &factors, &json!({}));
    };
    write("one", "model.");
    write("two", "language_model.model.");
    let ran = scratch.cli(&["compare", "one", "two", "--json"]);
    assert!(ran.stderr.contains("note: names differ in B: "), "{}", ran.stderr);
    let report = report(&ran);
    assert_eq!(tensors(&report).len(), 2);
    assert_eq!(report["tensors"][0]["parameter"], "model.layers.0.mlp.up.weight");
    assert_eq!(report["renamed"], json!({"a_prefix": "", "b_prefix": "language_model"}));
    assert!(close(&report["mean"]["phi"][3][3], 1.0));
}

#[test]
fn what_cannot_be_compared_is_refused() {
    let scratch = Scratch::new();
    let ran = scratch.cli(&["compare", &peft("llama-vanilla/adapter"), &peft("gpt2/adapter")]);
    assert_eq!(ran.code, Some(2));
    for part in [
        "have no target in common: the first changes `model.layers.0.mlp.down_proj.weight`, ",
        ", … (14), the second `transformer.h.0.attn.c_attn.weight`",
        "hint: if they name one model's modules in different ways, --base MODEL tells",
    ] {
        assert!(ran.stderr.contains(part), "{part}: {}", ran.stderr);
    }
    let ran =
        scratch.cli(&["compare", &peft("llama-vanilla/adapter"), &peft("llama-rslora/adapter")]);
    assert!(ran.stderr.contains("none of 6 common targets can be compared"), "{}", ran.stderr);
    assert_eq!(
        scratch.cli(&["compare", "lora", "base.safetensors"]).refused(scratch.root()),
        "error: base.safetensors: a model, and its change needs a base\n\
         hint: name the model it was trained from: --base MODEL\n"
    );
}

/// What has changed and is not compared is told, whatever it is.
#[test]
fn nothing_of_a_fine_tune_is_dropped_silently() {
    let scratch = Scratch::new();
    let mut prng = Prng::new(21);
    let mut of =
        |name: &str, shape: &[usize]| Tensor::random(&mut prng, name, Dtype::F32, shape, 0.5);
    let base = [
        of("model.layers.0.q.weight", &[16, 24]),
        of("model.layers.0.k.weight", &[16, 24]),
        of("model.layers.0.grown.weight", &[16, 24]),
        of("model.layers.0.q.bias", &[16]),
        of("model.norm.weight", &[24]),
        of("model.gone.weight", &[24, 24]),
    ];
    let mut tuned = |name: &str| {
        let mut tensors: Vec<Tensor> =
            base[..5].iter().map(|tensor| of(&tensor.name, &tensor.shape)).collect();
        tensors[2] = of("model.layers.0.grown.weight", &[20, 24]);
        tensors.push(of("model.new.weight", &[24, 24]));
        crate::support::write_tensors(&scratch.path(name), &tensors, &[]);
    };
    tuned("one.safetensors");
    tuned("two.safetensors");
    let mut values = base[1].values();
    values[5] = f64::NAN;
    let mut base = base.to_vec();
    base[1] = Tensor::new(&base[1].name, Dtype::F32, &[16, 24], &values);
    crate::support::write_tensors(&scratch.path("from.safetensors"), &base, &[]);
    let compare = ["compare", "one.safetensors", "two.safetensors", "--base", "from.safetensors"];
    let ran = scratch.cli(&[&compare[..], &["--json"]].concat());
    let report = report(&ran);
    let passed: Vec<(&str, &str)> = (report["passed_over"].as_array().unwrap())
        .iter()
        .map(|one| (one["parameter"].as_str().unwrap(), one["reason"].as_str().unwrap()))
        .collect();
    for (name, reason) in [
        ("model.layers.0.grown.weight", "became"),
        ("model.layers.0.q.bias", "is no matrix with directions"),
        ("model.norm.weight", "is no matrix with directions"),
        ("model.layers.0.k.weight", "are NaN or infinite"),
    ] {
        let told = passed.iter().any(|one| one.0 == name && one.1.contains(reason));
        assert!(told, "{name}: {passed:?}");
    }
    let notes = report["notes"].to_string();
    for name in ["`model.gone.weight`", "`model.new.weight`"] {
        assert!(notes.contains(name), "{notes}");
    }
}

/// A weight that cannot be met, and a module that the base does not have.
#[test]
fn what_is_not_measured_against_the_base_has_a_reason() {
    let scratch = Scratch::new();
    let mut prng = Prng::new(22);
    for name in ["one", "two"] {
        let factors = ["model.layers.0.q", "model.layers.0.other"]
            .map(|module| Factors::random(&mut prng, module, (16, 24, 4), Dtype::F32, 0.3));
        write_adapter(&scratch.path(name), &factors, &json!({}));
    }
    let mut weight =
        Tensor::random(&mut prng, "model.layers.0.q.weight", Dtype::F32, &[16, 24], 1.0);
    let mut values = weight.values();
    values[3] = f64::INFINITY;
    weight = Tensor::new(&weight.name, Dtype::F32, &[16, 24], &values);
    crate::support::write_tensors(&scratch.path("odd.safetensors"), &[weight], &[]);
    let ran = scratch.cli(&["compare", "one", "two", "--base", "odd.safetensors", "--json"]);
    let report = report(&ran);
    assert_eq!(tensors(&report).len(), 2);
    let notes = report["notes"].to_string();
    assert!(notes.contains("not measured against the base: `model.layers.0.other`"), "{notes}");
    assert!(notes.contains("2 targets have no amplification"), "{notes}");
    let reasons: Vec<&str> =
        tensors(&report).iter().map(|one| one["not_amplified"].as_str().unwrap()).collect();
    assert_eq!(
        reasons,
        [
            "the base has no such weight, or none that is read",
            "1 elements of the base's weight are NaN or infinite"
        ]
    );
}

#[test]
fn tables_figures_and_pages() {
    let scratch = Scratch::new();
    orthogonal(&scratch);
    let ran = scratch.cli(&[
        "compare",
        "first",
        "last",
        "--base",
        "base.safetensors",
        "--csv",
        "t.csv",
        "--plot",
        "p.svg",
        "--tensor",
        "q",
        "--report",
        "r.html",
    ]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(ran.stdout.contains("φ(4, 4) = 0.000 (unrelated: 0.167)"), "{}", ran.stdout);
    assert!(ran.stdout.contains("amplification"), "{}", ran.stdout);
    let read = |name: &str| std::fs::read_to_string(scratch.path(name)).unwrap();
    assert_eq!(read("t.csv").lines().count(), 2);
    assert!(read("p.svg").contains("first i of A"));
    let page = read("r.html");
    for part in ["How alike two changes are", "Input directions", "Amplification", "<svg"] {
        assert!(page.contains(part), "{part}");
    }
}
