//! `extract`: adapters from a base and its full fine-tune, and what is said of them.

use std::path::Path;

use lora_format::Dtype;
use serde_json::Value;

use crate::support::{Prng, Tensor, fixtures, read_tensors, write_tensors};
use crate::{Ran, Scratch, peft, text};

/// A base of two layers with norms, biases and an embedding, and a fine-tune of which the matrices
/// changed by `rank` components, and everything else a little.
struct Pair {
    scratch: Scratch,
}

const ROWS: usize = 48;
const COLS: usize = 40;

impl Pair {
    fn new(dtype: Dtype, rank: usize) -> Pair {
        let scratch = Scratch::new();
        let mut prng = Prng::new(11);
        let (mut base, mut tuned) = (Vec::new(), Vec::new());
        for layer in 0..2 {
            for module in ["q_proj", "down_proj"] {
                let name = format!("model.layers.{layer}.{module}.weight");
                let before = Tensor::random(&mut prng, &name, dtype, &[ROWS, COLS], 0.5);
                let b = prng.values(ROWS * rank, 0.3);
                let a = prng.values(rank * COLS, 0.3);
                let after: Vec<f64> = (0..ROWS * COLS)
                    .map(|at| {
                        let (row, col) = (at / COLS, at % COLS);
                        let product =
                            (0..rank).map(|k| b[row * rank + k] * a[k * COLS + col]).sum::<f64>();
                        before.values()[at] + product
                    })
                    .collect();
                tuned.push(Tensor::new(&name, dtype, &[ROWS, COLS], &after));
                base.push(before);
            }
            for (name, shape) in
                [("input_layernorm.weight", vec![COLS]), ("q_proj.bias", vec![ROWS])]
            {
                let name = format!("model.layers.{layer}.{name}");
                let before = Tensor::random(&mut prng, &name, dtype, &shape, 0.5);
                let after: Vec<f64> = before.values().iter().map(|value| value + 0.25).collect();
                tuned.push(Tensor::new(&name, dtype, &shape, &after));
                base.push(before);
            }
        }
        for (name, change) in [("model.embed_tokens.weight", 0.125), ("model.fixed.weight", 0.0)] {
            let before = Tensor::random(&mut prng, name, dtype, &[32, COLS], 0.5);
            let after: Vec<f64> = before.values().iter().map(|value| value + change).collect();
            tuned.push(Tensor::new(name, dtype, &[32, COLS], &after));
            base.push(before);
        }
        let pair = Pair { scratch };
        write_tensors(&pair.path("from.safetensors"), &base, &[]);
        write_tensors(&pair.path("to.safetensors"), &tuned, &[]);
        pair
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.scratch.root().join(name)
    }

    fn extract(&self, arguments: &[&str]) -> Ran {
        let first = ["extract", "from.safetensors", "to.safetensors"];
        self.scratch.cli(&[&first[..], arguments].concat())
    }

    fn report(&self, arguments: &[&str]) -> Value {
        let ran = self.extract(&[arguments, &["--json", "--force"]].concat());
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        serde_json::from_str(&ran.stdout).unwrap()
    }

    /// The largest difference of the fine-tune and the base with the adapter merged into it.
    fn difference(&self, adapter: &str, of: &[&str]) -> f64 {
        let merged = ["merge", "from.safetensors", adapter, "-o", "merged.safetensors", "--force"];
        let ran = self.scratch.cli(&merged);
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        let merged = read_tensors(&self.path("merged.safetensors"));
        let tuned = read_tensors(&self.path("to.safetensors"));
        let mut largest = 0.0f64;
        for (name, tensor) in &tuned {
            if of.iter().any(|part| name.contains(part)) {
                for (x, y) in tensor.values().iter().zip(merged[name].values()) {
                    largest = largest.max((x - y).abs());
                }
            }
        }
        largest
    }
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap()
}

/// Two models of one matrix each, 320 × 300: beyond the sizes that the Gram matrix is taken for. The
/// fine-tune has `rank` components more, each weaker than the one before by `falls`.
fn large(rank: usize, falls: f64) -> Scratch {
    const ROWS: usize = 320;
    const COLS: usize = 300;
    const NAME: &str = "model.layers.0.q_proj.weight";
    let scratch = Scratch::new();
    let mut prng = Prng::new(13);
    let base = prng.values(ROWS * COLS, 0.5);
    let (b, a) = (prng.values(ROWS * rank, 0.5), prng.values(rank * COLS, 0.5));
    let sizes: Vec<f64> = (0..rank).map(|k| falls.powi(k as i32)).collect();
    let tuned: Vec<f64> = (0..ROWS * COLS)
        .map(|at| {
            let (row, col) = (at / COLS, at % COLS);
            let part = |k: usize| sizes[k] * b[row * rank + k] * a[k * COLS + col];
            base[at] + (0..rank).map(part).sum::<f64>()
        })
        .collect();
    for (file, values) in [("from.safetensors", base), ("to.safetensors", tuned)] {
        let matrix = Tensor::new(NAME, Dtype::F32, &[ROWS, COLS], &values);
        write_tensors(&scratch.path(file), &[matrix], &[]);
    }
    scratch
}

/// The report of an extraction from `from` to `to`.
fn report(scratch: &Scratch, arguments: &[&str]) -> Value {
    let first = ["extract", "from.safetensors", "to.safetensors", "--json", "--force"];
    let ran = scratch.cli(&[&first[..], arguments].concat());
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    serde_json::from_str(&ran.stdout).unwrap()
}

#[test]
fn a_large_matrix_is_decomposed_as_far_as_it_is_asked_for() {
    let scratch = large(60, 0.9);
    let options = ["--rank", "8", "-o", "a.safetensors"];
    let leading = &report(&scratch, &options)["tensors"][0];
    let all = report(&scratch, &[&options[..], &["--exact"]].concat());
    let all = &all["tensors"][0];
    assert_eq!((&leading["exact"], &all["exact"]), (&Value::Bool(false), &Value::Bool(true)));
    let [best, found] = [all, leading].map(|one| number(&one["residual"]));
    assert!(found >= best * (1.0 - 1e-6) && found <= best * 1.01, "{found} {best}");
    assert!(number(&leading["optimal_residual_at_least"]) <= best * (1.0 + 1e-9));
    assert!(leading["products"].as_u64() < all["products"].as_u64());
}

/// All that there is of a large matrix of a low rank, without computing the zeros.
#[test]
fn the_rank_of_a_large_matrix_is_found() {
    let scratch = large(8, 0.9);
    for (policy, bound) in [
        (&["--rank", "auto"][..], "known"),
        (&["--sv-ratio", "1e4"], "known"),
        (&["--rank", "20"], "policy"),
    ] {
        let report = report(&scratch, &[policy, &["-o", "a.safetensors"]].concat());
        let found = &report["tensors"][0];
        assert_eq!((&found["rank"], &found["exact"]), (&Value::from(8), &Value::Bool(false)));
        assert!(number(&found["relative_error"]) < 1e-6, "{policy:?} {found}");
        assert_eq!(found["rank_decided_by"], bound);
    }
}

#[test]
fn a_share_of_all_values_is_found_in_a_large_matrix() {
    let scratch = large(60, 0.9);
    let options = ["--sv-cumulative", "0.8", "-o", "a.safetensors"];
    let unbound = &report(&scratch, &options)["tensors"][0];
    let values: Vec<f64> =
        unbound["singular_values"].as_array().unwrap().iter().map(number).collect();
    assert_eq!(values.len(), 300);
    let reached = |rank: usize| values[..rank].iter().sum::<f64>() / values.iter().sum::<f64>();
    let rank = unbound["rank"].as_u64().unwrap() as usize;
    assert!(reached(rank) >= 0.8 && reached(rank - 1) < 0.8, "{rank}");
    for (maximum, expected, bound) in [("40", rank, "policy"), ("5", 5, "maximum")] {
        let bounded = report(&scratch, &[&options[..], &["--max-rank", maximum]].concat());
        let found = &bounded["tensors"][0];
        assert_eq!(found["rank"].as_u64(), Some(expected as u64), "{maximum}");
        assert_eq!(found["rank_decided_by"], bound, "{maximum}");
    }
}

#[test]
fn a_known_rank_is_found_and_the_change_restored() {
    let pair = Pair::new(Dtype::F32, 3);
    for ranks in [["--rank", "auto"], ["--energy", "0.9999999"], ["--tolerance", "1e-4"]] {
        let report = pair.report(&[&ranks[..], &["-o", "a.safetensors"]].concat());
        let tensors = report["tensors"].as_array().unwrap();
        assert_eq!(tensors.len(), 4);
        for tensor in tensors {
            assert_eq!(tensor["rank"], 3, "{ranks:?} {tensor}");
            assert!(number(&tensor["relative_error"]) < 1e-5);
            assert_eq!(tensor["exact"], true);
        }
        assert!(pair.difference("a.safetensors", &["_proj.weight"]) < 1e-5);
    }
}

#[test]
fn the_certificate_is_the_error_of_the_file() {
    let pair = Pair::new(Dtype::F32, 12);
    for dtype in ["f32", "bf16", "f16"] {
        let report = pair.report(&["--rank", "5", "--dtype", dtype, "-o", "a.safetensors"]);
        let merged =
            ["merge", "from.safetensors", "a.safetensors", "-o", "m.safetensors", "--force"];
        assert_eq!(pair.scratch.cli(&merged).code, Some(0));
        let (merged, tuned) =
            (read_tensors(&pair.path("m.safetensors")), read_tensors(&pair.path("to.safetensors")));
        for tensor in report["tensors"].as_array().unwrap() {
            let name = tensor["parameter"].as_str().unwrap();
            let (x, y) = (tuned[name].values(), merged[name].values());
            let error = x.iter().zip(&y).map(|(x, y)| (x - y) * (x - y)).sum::<f64>().sqrt();
            let said = number(&tensor["residual"]);
            // The merge rounds to f32 once.
            assert!((error - said).abs() < 1e-5 * error, "{dtype} {name}: {error} {said}");
            let values: Vec<f64> =
                tensor["singular_values"].as_array().unwrap().iter().map(number).collect();
            let optimum = values[5..].iter().map(|value| value * value).sum::<f64>().sqrt();
            assert!((number(&tensor["optimal_residual_at_least"]) - optimum).abs() < 1e-9);
            assert!(said >= optimum * (1.0 - 1e-9) && said < optimum * 1.01);
        }
    }
}

#[test]
fn what_low_rank_does_not_hold_is_listed_or_stored() {
    let pair = Pair::new(Dtype::Bf16, 4);
    let report = pair.report(&["--rank", "4", "-o", "a.safetensors"]);
    let left: Vec<(&str, &str)> = report["left_out"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| (one["parameter"].as_str().unwrap(), one["kind"].as_str().unwrap()))
        .collect();
    assert_eq!(left.len(), 5);
    assert!(left.contains(&("model.embed_tokens.weight", "embedding")), "{left:?}");
    assert!(left.contains(&("model.layers.0.q_proj.bias", "bias")), "{left:?}");
    assert_eq!(report["unchanged"], 1);

    let full = ["--rank", "4", "--full", "norms,biases,embeddings", "-o", "b.safetensors"];
    let report = pair.report(&full);
    assert_eq!(report["whole"].as_array().unwrap().len(), 5);
    assert!(report["left_out"].as_array().unwrap().is_empty());
    assert_eq!(pair.difference("b.safetensors", &["norm", "bias", "embed", "fixed"]), 0.0);

    let one =
        pair.report(&["--rank", "4", "--full", r".*\.1\.input_layernorm", "-o", "c.safetensors"]);
    assert_eq!(one["whole"][0]["parameter"], "model.layers.1.input_layernorm.weight");
    let both = pair.report(&["--rank", "4", "--include", "embed_tokens", "-o", "d.safetensors"]);
    assert_eq!(both["tensors"].as_array().unwrap().len(), 5);
}

#[test]
fn a_budget_is_kept_to() {
    let pair = Pair::new(Dtype::F32, 20);
    let bytes = (ROWS + COLS) * 4 * 4 * 6;
    let report = pair.report(&["--budget", &bytes.to_string(), "-o", "a.safetensors"]);
    let ranks: Vec<u64> = report["tensors"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one["rank"].as_u64().unwrap())
        .collect();
    assert_eq!(ranks.iter().sum::<u64>(), 24);
    assert_eq!(report["budget"]["spent"], bytes as u64);
    let ran = pair.extract(&["--budget", "100", "--min-rank", "1", "-o", "b.safetensors"]);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    assert!(ran.stderr.contains("the minimum ranks alone take"), "{}", ran.stderr);
}

/// A change that has fewer ranks than are allotted gets those alone, pays for no others, and could not
/// have been given more.
#[test]
fn a_budget_is_not_spent_on_what_is_not_there() {
    let scratch = large(3, 0.9);
    let bytes = ((320 + 300) * 4 * 10).to_string();
    for minimum in ["0", "5"] {
        let options = ["--budget", &bytes, "--min-rank", minimum, "-o", "a.safetensors"];
        let report = report(&scratch, &options);
        assert_eq!(report["tensors"][0]["rank"], 3);
        assert_eq!(report["budget"]["spent"], (320 + 300) * 4 * 3);
        assert_eq!(report["budget"]["capped"].as_array().unwrap().len(), 0);
    }
}

#[test]
fn rules_decide_for_what_they_match() {
    let pair = Pair::new(Dtype::F32, 20);
    let rules = ["--rank", "6", "--rank-for", "down_proj=2", "--rank-for", r".*\.1\.q_proj=skip"];
    let report = pair.report(&[&rules[..], &["-o", "a.safetensors"]].concat());
    let ranks: Vec<(&str, u64)> = report["tensors"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| (one["parameter"].as_str().unwrap(), one["rank"].as_u64().unwrap()))
        .collect();
    assert_eq!(
        ranks,
        [
            ("model.layers.0.down_proj.weight", 2),
            ("model.layers.0.q_proj.weight", 6),
            ("model.layers.1.down_proj.weight", 2)
        ]
    );
    // By the name that is printed; and a rule that another one is before.
    let named = "model.layers.0.q_proj.weight=3";
    let rules = ["--rank", "6", "--rank-for", named, "--rank-for", "down_proj=2"];
    let shadowed = ["--rank-for", "0.down_proj=5", "-o", "a.safetensors"];
    let report = pair.report(&[&rules[..], &shadowed].concat());
    let ranks: Vec<&Value> =
        report["tensors"].as_array().unwrap().iter().map(|one| &one["rank"]).collect();
    assert_eq!(ranks, [2, 3, 2, 6]);
    let note = "--rank-for 0.down_proj decides for nothing: rules before it match the same";
    assert!(report["notes"].as_array().unwrap().contains(&Value::from(note)), "{report}");
    // What a rule skips, or what gets no factors anyway, need not have changed or be a layer.
    for rule in ["embed_tokens=skip", "fixed=skip", "fixed=3", "input_layernorm=skip"] {
        let ran = pair.extract(&["--rank", "6", "--rank-for", rule, "-o", "c.safetensors"]);
        assert_eq!(ran.code, Some(0), "{rule}: {}", ran.stderr);
        std::fs::remove_file(pair.path("c.safetensors")).unwrap();
    }
    let ran = pair.extract(&["--rank", "6", "--rank-for", "k_proj=2", "-o", "b.safetensors"]);
    assert_eq!(ran.code, Some(2));
    assert!(ran.stderr.contains("--rank-for k_proj"), "{}", ran.stderr);
}

#[test]
fn the_same_bytes_for_any_number_of_threads() {
    let pair = Pair::new(Dtype::Bf16, 30);
    let extract = |threads: &str, output: &str| {
        let ran = pair.extract(&["--rank", "8", "--threads", threads, "-o", output]);
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        std::fs::read(pair.path(output)).unwrap()
    };
    let one = extract("1", "one.safetensors");
    assert!(one == extract("2", "two.safetensors"));
    assert!(one == extract("7", "seven.safetensors"));
}

#[test]
fn a_peft_directory_says_the_same() {
    let pair = Pair::new(Dtype::F32, 9);
    pair.report(&["--rank", "4", "-o", "a.safetensors"]);
    pair.report(&["--rank", "4", "-o", "a", "--to", "peft"]);
    let merge = |adapter: &str| {
        let ran = pair.scratch.cli(&[
            "merge",
            "from.safetensors",
            adapter,
            "-o",
            "m.safetensors",
            "--force",
        ]);
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        std::fs::read(pair.path("m.safetensors")).unwrap()
    };
    assert!(merge("a.safetensors") == merge("a"));
}

/// Interrupted (here by a factor that f16 does not hold), damaged, and gone on with.
#[test]
fn finished_targets_are_taken_up_again() {
    const LAST: &str = "model.layers.1.q_proj.weight";
    let pair = Pair::new(Dtype::F32, 9);
    let tuned = pair.path("to.safetensors");
    let sound: Vec<Tensor> = read_tensors(&tuned).into_values().collect();
    let large: Vec<Tensor> = (sound.iter())
        .map(|tensor| match tensor.name.as_str() {
            LAST => {
                let values: Vec<f64> = tensor.values().iter().map(|x| x * 1e12).collect();
                Tensor::new(LAST, Dtype::F32, &[ROWS, COLS], &values)
            }
            name => tensor.renamed(name),
        })
        .collect();
    let time = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
    let put = |tensors: &[Tensor]| {
        write_tensors(&tuned, tensors, &[]);
        let file = std::fs::File::options().write(true).open(&tuned).unwrap();
        file.set_modified(time).unwrap();
    };
    let arguments = ["--rank", "4", "--dtype", "f16", "--threads", "1", "-o"];
    let extract = |output: &str, more: &[&str]| {
        let ran = pair.extract(&[&arguments[..], &[output], more].concat());
        (ran.code, ran.stderr)
    };
    put(&sound);
    assert_eq!(extract("whole.safetensors", &[]).0, Some(0));
    let whole = std::fs::read(pair.path("whole.safetensors")).unwrap();
    put(&large);
    let (code, stderr) = extract("a.safetensors", &[]);
    assert_eq!(code, Some(2));
    assert!(stderr.contains("hint: choose a dtype with a larger range"), "{stderr}");
    let kept = "note: 3 finished targets are kept in ./.a.safetensors.extract; --resume goes on from \
                there, a run without it removes them\n";
    assert!(stderr.contains(kept), "{stderr}");
    // A run that is refused before any work leaves them.
    for refused in [&["--full", "nroms"][..], &["--resume", "--full", "norms"]] {
        let (code, _) = extract("a.safetensors", refused);
        assert_eq!(code, Some(2), "{refused:?}");
    }
    let mistyped = pair.extract(&["--rank", "3", "-o", "a.safetensors", "--resume"]);
    let was = "another extraction: --rank was 4 and is 3\n";
    assert!(mistyped.stderr.contains(was), "{}", mistyped.stderr);
    put(&sound);
    let work = pair.path(".a.safetensors.extract");
    let mut parts: Vec<std::path::PathBuf> = (std::fs::read_dir(&work).unwrap())
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some())
        .collect();
    parts.sort();
    assert_eq!(parts.len(), 3);
    let kept: Vec<Vec<u8>> = parts.iter().map(|path| std::fs::read(path).unwrap()).collect();
    let again = |changed: [&[u8]; 3], equal: bool| {
        for (path, bytes) in parts.iter().zip(changed) {
            std::fs::write(path, bytes).unwrap();
        }
        // `--resume` removes them in the end.
        let copy = pair.path("copy");
        crate::support::copy_directory(&work, &copy);
        let (code, stderr) = extract("a.safetensors", &["--resume"]);
        assert_eq!(code, Some(0), "{stderr}");
        std::fs::rename(copy, &work).unwrap();
        let found = std::fs::read(pair.path("a.safetensors")).unwrap();
        assert_eq!(found == whole, equal);
        std::fs::remove_file(pair.path("a.safetensors")).unwrap();
    };
    let [first, second, third] = [0, 1, 2].map(|at| kept[at].as_slice());
    again([first, second, third], true);
    // Another pair's, and two that are damaged.
    again([second, &[], &third[..40]], true);
    // They are taken indeed.
    let mut other = second.to_vec();
    *other.last_mut().unwrap() ^= 1;
    again([first, &other, third], false);
    // Not of models that are read in another way.
    std::fs::write(
        work.join("signature"),
        std::fs::read_to_string(work.join("signature")).unwrap().replace(
            "q_proj.weight: linear [48, 40] (out, in)",
            "q_proj.weight: linear [48, 40] (in, out)",
        ),
    )
    .unwrap();
    let (code, stderr) = extract("a.safetensors", &["--resume"]);
    assert_eq!(code, Some(2));
    let was =
        "model.layers.0.q_proj.weight = model.layers.0.q_proj.weight was linear [48, 40] (in, out)";
    assert!(stderr.contains(was), "{stderr}");
}

/// A directory that has the name and is not ours is left alone.
#[test]
fn another_directory_is_not_removed() {
    let pair = Pair::new(Dtype::F32, 2);
    let work = pair.path(".a.safetensors.extract");
    std::fs::create_dir(&work).unwrap();
    std::fs::write(work.join("thesis.txt"), "years of work").unwrap();
    for more in [&["--resume"][..], &[], &["--force"]] {
        let ran = pair.extract(&[&["--rank", "4", "-o", "a.safetensors"], more].concat());
        assert_eq!(ran.code, Some(2));
        assert!(ran.stderr.contains("it is not the work of an extraction"), "{}", ran.stderr);
    }
    std::fs::remove_file(work.join("thesis.txt")).unwrap();
    let ran = pair.extract(&["--rank", "4", "-o", "a.safetensors"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
}

/// What cannot be written in the end is refused in the beginning: nothing is left behind or changed.
#[test]
fn outputs_are_checked_before_the_work() {
    let pair = Pair::new(Dtype::F32, 2);
    std::fs::write(pair.path("old.csv"), "mine").unwrap();
    let before = crate::support::listing(pair.scratch.root());
    let base = std::fs::read(pair.path("from.safetensors")).unwrap();
    for (more, why) in [
        (&["--csv", "old.csv"][..], "old.csv: already exists"),
        (&["--csv", "from.safetensors", "--force"], "the input"),
        (&["--csv", "to.safetensors", "--force"], "the input"),
        (&["--csv", "a.safetensors"], "is where the adapter goes"),
    ] {
        let ran = pair.extract(&[&["--rank", "4", "-o", "a.safetensors"], more].concat());
        assert_eq!(ran.code, Some(2), "{more:?}");
        assert!(ran.stderr.contains(why), "{}", ran.stderr);
    }
    assert_eq!(crate::support::listing(pair.scratch.root()), before);
    assert!(std::fs::read(pair.path("from.safetensors")).unwrap() == base);
    let budget = ["--budget", "1MB", "--resume", "-o", "a.safetensors"];
    let ran = pair.extract(&budget);
    assert_eq!(ran.code, Some(2));
    assert!(ran.stderr.contains("keeps none"), "{}", ran.stderr);
}

/// PEFT would look for every layer in a module that is replaced: that is told before the work.
#[test]
fn what_peft_has_no_place_for_is_refused_before_the_work() {
    let pair = Pair::new(Dtype::F32, 2);
    for (file, value) in [("from.safetensors", 1.0), ("to.safetensors", 2.0)] {
        let mut tensors: Vec<Tensor> = read_tensors(&pair.path(file)).into_values().collect();
        tensors.push(Tensor::new("model.token", Dtype::F32, &[COLS], &[value; COLS]));
        write_tensors(&pair.path(file), &tensors, &[]);
    }
    let full = ["--rank", "2", "--full", "model.token"];
    let ran = pair.extract(&[&full[..], &["-o", "a", "--to", "peft"]].concat());
    assert_eq!(ran.code, Some(2));
    assert!(ran.stderr.contains("PEFT cannot hold a change of"), "{}", ran.stderr);
    assert!(!ran.stderr.contains("finished targets"), "{}", ran.stderr);
    assert!(!pair.path("a").exists() && !pair.path(".a.extract").exists());
    let ran = pair.extract(&[&full[..], &["-o", "a.safetensors"]].concat());
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
}

#[test]
fn an_interrupted_extraction_goes_on() {
    let pair = Pair::new(Dtype::F32, 9);
    let whole = pair.report(&["--rank", "4", "-o", "whole.safetensors"]);
    // What an interrupted one leaves: its options and a finished target, here of another file.
    let ran = pair.extract(&["--rank", "4", "-o", "a.safetensors", "--resume"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let work = pair.path(".b.safetensors.extract");
    std::fs::create_dir(&work).unwrap();
    std::fs::write(work.join("signature"), "something else\n").unwrap();
    let ran = pair.extract(&["--rank", "4", "-o", "b.safetensors", "--resume"]);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    assert!(ran.stderr.contains("the work of another extraction"), "{}", ran.stderr);
    let ran = pair.extract(&["--rank", "4", "-o", "b.safetensors"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(!work.exists());
    let read = |name: &str| std::fs::read(pair.path(name)).unwrap();
    assert!(read("a.safetensors") == read("b.safetensors"));
    assert!(read("a.safetensors") == read("whole.safetensors"));
    assert_eq!(whole["schema"], "lora-cli/extract/1");
}

#[test]
fn what_cannot_be_extracted_is_refused() {
    let pair = Pair::new(Dtype::F32, 2);
    let refused = |arguments: &[&str], why: &str| {
        let ran = pair.extract(arguments);
        assert_eq!(ran.code, Some(2), "{arguments:?}");
        assert!(ran.stderr.contains(why), "{}", ran.stderr);
        assert!(
            !pair.path("x.safetensors").exists() && !pair.path(".x.safetensors.extract").exists()
        );
    };
    refused(&["-o", "x.safetensors"], "nothing says which ranks are wanted");
    refused(&["--rank", "4", "--energy", "0.9", "-o", "x.safetensors"], "several options");
    refused(&["--rank", "4", "--accuracy", "0", "-o", "x.safetensors"], "--accuracy 0");
    refused(&["--rank", "4", "--full", "no_such", "-o", "x.safetensors"], "--full no_such");
    let near = "--full nroms (nearest: `norms`)\nhint: --full takes norms, biases, embeddings and";
    refused(&["--rank", "4", "--full", "nroms", "-o", "x.safetensors"], near);
    let near = "--rank-for q_prj (nearest: `q_proj`)\nhint: `q_proj` matches every module";
    refused(&["--rank", "4", "--rank-for", "q_prj=2", "-o", "x.safetensors"], near);
    refused(&["--rank", "4", "-o", "to.safetensors", "--force"], "replace or change the input");
    let below_1 = "the tolerance must be at least 0 and below 1";
    refused(&["--tolerance", "10", "-o", "x.safetensors"], below_1);
    let rank_0 = "of 4 changes, what was asked for is met by rank 0";
    refused(&["--tolerance", "0.99", "--relative", "-o", "x.safetensors"], rank_0);
    let small = "one rank takes 352 bytes at least and the budget is 50";
    refused(&["--budget", "50", "-o", "x.safetensors"], small);
    refused(
        &["--rank", "4", "-o", "no/such/x.safetensors"],
        "error: no/such: no such directory\nhint: create it",
    );
    let adapter =
        pair.scratch.cli(&["extract", "from.safetensors", "lora", "--rank", "4", "-o", "x"]);
    let text = adapter.refused(pair.scratch.root());
    assert!(
        text.contains("lora: an adapter, and a model is needed here\nhint: an adapter's ranks are"),
        "{text}"
    );
    let same = pair.scratch.cli(&[
        "extract",
        "from.safetensors",
        "from.safetensors",
        "--rank",
        "4",
        "-o",
        "x.safetensors",
    ]);
    assert_eq!(same.code, Some(2));
    assert!(same.stderr.contains("nothing to extract"), "{}", same.stderr);
    let mut tensors: Vec<Tensor> =
        read_tensors(&pair.path("to.safetensors")).into_values().collect();
    let at = tensors.iter().position(|tensor| tensor.name.contains("q_proj.weight")).unwrap();
    let mut values = tensors[at].values();
    values[7] = f64::NAN;
    let name = tensors[at].name.clone();
    tensors[at] = Tensor::new(&name, Dtype::F32, &[ROWS, COLS], &values);
    write_tensors(&pair.path("to.safetensors"), &tensors, &[]);
    refused(&["--rank", "4", "-o", "x.safetensors"], "the first at element 7");
}

/// Texts count, name what they are about, and say of what a share is.
#[test]
fn the_text_names_the_most_changed() {
    let pair = Pair::new(Dtype::F32, 20);
    let mut tensors: Vec<Tensor> =
        read_tensors(&pair.path("to.safetensors")).into_values().collect();
    for tensor in &mut tensors {
        if tensor.name == "model.layers.1.q_proj.bias" {
            let values: Vec<f64> = tensor.values().iter().map(|value| value + 9.0).collect();
            *tensor = Tensor::new(&tensor.name, Dtype::F32, &[ROWS], &values);
        }
    }
    write_tensors(&pair.path("to.safetensors"), &tensors, &[]);
    let ran = pair.extract(&["--budget", "8KB", "-o", "a.safetensors", "--csv", "t.csv"]).done();
    for part in [
        "not in the adapter: 2 biases that changed by up to ",
        "% (`model.layers.1.q_proj.bias`): it is no matrix",
        "not in the adapter: 1 embedding that changed by ",
        "; 1 parameter did not change",
    ] {
        assert!(ran.stderr.contains(part), "{part}: {}", ran.stderr);
    }
    let budget = ran.stderr.lines().find(|line| line.starts_with("budget: ")).unwrap();
    assert!(budget.contains("; no allotment of these bytes keeps "), "{budget}");
    assert!(budget.ends_with(" energy"), "{budget}");
    // The table has the members of the report.
    let report = pair.report(&["--budget", "8KB", "-o", "a.safetensors"]);
    let table = std::fs::read_to_string(pair.path("t.csv")).unwrap();
    let mut lines = table.lines().map(|line| line.split(',').collect::<Vec<_>>());
    let columns = lines.next().unwrap();
    for (line, one) in lines.zip(report["tensors"].as_array().unwrap()) {
        assert_eq!((columns.len(), line.len()), (15, 15));
        for (column, cell) in columns.iter().zip(line) {
            match (*column, &one[*column]) {
                ("rows", _) => assert_eq!(cell, one["shape"][0].to_string()),
                ("cols", _) => assert_eq!(cell, one["shape"][1].to_string()),
                (_, Value::Number(number)) => {
                    assert_eq!(cell.parse::<f64>().unwrap(), number.as_f64().unwrap(), "{column}");
                }
                (_, value) => {
                    assert_eq!(cell.trim_matches('"'), value.to_string().trim_matches('"'))
                }
            }
        }
    }
}

#[test]
fn quiet_says_nothing() {
    let pair = Pair::new(Dtype::F32, 2);
    let ran = pair.extract(&["--rank", "2", "-o", "a.safetensors", "--quiet"]).done();
    assert_eq!(ran.stderr, "");
}

/// A merge has to be told what becomes of the other end.
#[test]
fn factors_of_a_tied_table_are_noted() {
    const TABLE: &str = "model.embed_tokens.weight";
    let scratch = Scratch::new();
    let mut prng = Prng::new(15);
    for model in ["from", "to"] {
        let directory = scratch.path(model);
        std::fs::create_dir(&directory).unwrap();
        let table = Tensor::random(&mut prng, TABLE, Dtype::F32, &[32, COLS], 0.5);
        write_tensors(&directory.join("model.safetensors"), &[table], &[]);
        let config = r#"{"model_type": "llama", "tie_word_embeddings": true}"#;
        std::fs::write(directory.join("config.json"), config).unwrap();
    }
    let extract = ["extract", "from", "to", "--rank", "4", "--include", "embed_tokens", "-o", "a"];
    let ran = scratch.cli(&extract).done();
    let note = format!("note: `{TABLE}` is tied to the output head: ");
    assert!(ran.stderr.contains(&note) && ran.stderr.contains("--tied both"), "{}", ran.stderr);
    let merge = ["merge", "from", "a", "-o", "merged"];
    assert_eq!(scratch.cli(&merge).code, Some(2));
    scratch.cli(&[&merge[..], &["--tied", "both"]].concat()).done();
}

#[test]
fn a_real_layout_with_conv1d() {
    let scratch = Scratch::new();
    for case in ["gpt2", "llama-f32"] {
        let (base, adapter) = (peft(&format!("{case}/base")), peft(&format!("{case}/adapter")));
        let run = |arguments: &[&str]| {
            let ran = scratch.cli(arguments);
            assert_eq!(ran.code, Some(0), "{case}: {}", ran.stderr);
        };
        run(&["merge", &base, &adapter, "-o", "merged", "--dtype", "f32", "--force"]);
        run(&["extract", &base, "merged", "--rank", "auto", "-o", "again.safetensors", "--force"]);
        run(&["merge", &base, "again.safetensors", "-o", "twice", "--dtype", "f32", "--force"]);
        let file =
            |name: &str| text(&scratch.root().join(name).join("model.safetensors")).to_owned();
        let (once, twice) =
            (read_tensors(Path::new(&file("merged"))), read_tensors(Path::new(&file("twice"))));
        for (name, tensor) in &once {
            let difference: f64 = (tensor.values().iter().zip(twice[name].values()))
                .map(|(x, y)| (x - y).abs())
                .fold(0.0, f64::max);
            assert!(difference < 1e-4, "{case} {name}: {difference}");
        }
    }
}

/// A table that the base has twice, one way or the other, is replaced in both places.
#[test]
fn a_table_that_is_the_head_too_is_stored_whole_as_both() {
    const TABLE: &str = "model.embed_tokens.weight";
    const HEAD: &str = "lm_head.weight";
    let scratch = Scratch::new();
    let mut prng = Prng::new(12);
    let of = |name: &str, values: &[f64]| Tensor::new(name, Dtype::F32, &[32, COLS], values);
    let (before, after) = (prng.values(32 * COLS, 0.5), prng.values(32 * COLS, 0.5));
    let norm = |value: f64| Tensor::new("model.norm.weight", Dtype::F32, &[COLS], &[value; COLS]);
    // Tied by the configuration: neither model stores the head.
    for (model, table, norm) in [("from", &before, norm(1.0)), ("to", &after, norm(2.0))] {
        let directory = scratch.path(model);
        std::fs::create_dir(&directory).unwrap();
        write_tensors(&directory.join("model.safetensors"), &[of(TABLE, table), norm], &[]);
        let config = r#"{"model_type": "llama", "tie_word_embeddings": true}"#;
        std::fs::write(directory.join("config.json"), config).unwrap();
    }
    // A copy in the base, and no head in the fine-tune.
    let base = [of(TABLE, &before), of(HEAD, &before), norm(1.0)];
    write_tensors(&scratch.path("from.safetensors"), &base, &[]);
    write_tensors(&scratch.path("to.safetensors"), &[of(TABLE, &after), norm(2.0)], &[]);
    for (from, to, merged, weights) in [
        ("from", "to", "merged", "merged/model.safetensors"),
        ("from.safetensors", "to.safetensors", "merged.safetensors", "merged.safetensors"),
    ] {
        let full = ["--rank", "4", "--full", "embeddings,norms", "-o", "a.safetensors", "--force"];
        let ran = scratch.cli(&[&["extract", from, to][..], &full].concat());
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        assert!(ran.stderr.contains(&format!("`{TABLE}` is `{HEAD}` too")), "{}", ran.stderr);
        let ran = scratch.cli(&["merge", from, "a.safetensors", "-o", merged]);
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        let tensors = read_tensors(&scratch.path(weights));
        let stored = of(TABLE, &after).values();
        assert!(tensors[TABLE].values() == stored);
        assert!(tensors.get(HEAD).is_none_or(|head| head.values() == stored));
        assert_eq!(tensors.contains_key(HEAD), from == "from.safetensors");
        assert_eq!(tensors["model.norm.weight"].values()[0], 2.0);
    }
}

/// A table that only the fine-tune ties became two parameters of the base, and is stored as both.
#[test]
fn a_fine_tune_that_ties_its_head_changed_both_ends() {
    const TABLE: &str = "model.embed_tokens.weight";
    const HEAD: &str = "lm_head.weight";
    let scratch = Scratch::new();
    let mut prng = Prng::new(14);
    let of = |name: &str, values: &[f64]| Tensor::new(name, Dtype::F32, &[32, COLS], values);
    let [table, head, after] = [(); 3].map(|()| prng.values(32 * COLS, 0.5));
    for (model, tensors, tied) in [
        ("from", vec![of(TABLE, &table), of(HEAD, &head)], false),
        ("to", vec![of(TABLE, &after)], true),
    ] {
        let directory = scratch.path(model);
        std::fs::create_dir(&directory).unwrap();
        write_tensors(&directory.join("model.safetensors"), &tensors, &[]);
        let config = format!(r#"{{"model_type": "llama", "tie_word_embeddings": {tied}}}"#);
        std::fs::write(directory.join("config.json"), config).unwrap();
    }
    let full = ["--rank", "4", "--full", "embeddings", "-o", "a.safetensors", "--json"];
    let ran = scratch.cli(&[&["extract", "from", "to"][..], &full].concat());
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let report: Value = serde_json::from_str(&ran.stdout).unwrap();
    let mut whole: Vec<&str> = (report["whole"].as_array().unwrap().iter())
        .map(|one| one["parameter"].as_str().unwrap())
        .collect();
    whole.sort_unstable();
    assert_eq!(whole, [HEAD, TABLE]);
    let ran = scratch.cli(&["merge", "from", "a.safetensors", "-o", "merged"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let merged = read_tensors(&scratch.path("merged/model.safetensors"));
    let stored = of(TABLE, &after).values();
    assert!(merged[TABLE].values() == stored && merged[HEAD].values() == stored);
}

/// A model in FP8, and the values that it stands for with something added to the first matrix.
fn quantised() -> (Scratch, String) {
    let scratch = Scratch::new();
    let case = fixtures().join("quantised/fp8-block");
    let mut tensors: Vec<Tensor> =
        read_tensors(&case.join("expected.safetensors")).into_values().collect();
    let mut prng = Prng::new(15);
    for tensor in &mut tensors {
        let (b, a) = (prng.values(tensor.shape[0], 0.5), prng.values(tensor.shape[1], 0.5));
        let cols = tensor.shape[1];
        let values: Vec<f64> = (tensor.values().iter().enumerate())
            .map(|(at, value)| value + b[at / cols] * a[at % cols])
            .collect();
        *tensor = Tensor::new(&tensor.name, Dtype::F32, &tensor.shape, &values);
    }
    write_tensors(&scratch.path("plain.safetensors"), &tensors, &[]);
    (scratch, text(&case.join("base")).to_owned())
}

#[test]
fn what_the_fine_tune_has_quantised_is_not_stored_whole() {
    let (scratch, model) = quantised();
    let from = ["extract", "plain.safetensors", &model, "-o", "x.safetensors", "--rank", "2"];
    let ran = scratch.cli(&[&from[..], &["--full", "q_proj"]].concat());
    assert_eq!(ran.code, Some(2));
    let expected = "q_proj.weight` cannot be stored whole: the fine-tuned model has it quantised";
    assert!(ran.stderr.contains(expected), "{}", ran.stderr);
    assert!(!scratch.path("x.safetensors").exists());
    let ran = scratch.cli(&from);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
}

/// The values of a quantised base are not those of any file: there is no fingerprint of them.
#[test]
fn a_quantised_base_is_extracted_from() {
    let (scratch, model) = quantised();
    for (to, output) in [("lora", "a.safetensors"), ("peft", "a")] {
        let ran = scratch.cli(&[
            "extract",
            &model,
            "plain.safetensors",
            "--rank",
            "1",
            "-o",
            output,
            "--to",
            to,
        ]);
        assert_eq!(ran.code, Some(0), "{to}: {}", ran.stderr);
        assert!(ran.stderr.contains("they include what quantising lost"), "{}", ran.stderr);
        let noted = ran.stderr.contains("note: no fingerprint of the base: ");
        assert_eq!(noted, to == "lora", "{}", ran.stderr);
        let merge = ["merge", &model, output, "-o", "m", "--dtype", "f32", "--force"];
        let ran = scratch.cli(&merge);
        assert_eq!(ran.code, Some(0), "{to}: {}", ran.stderr);
        let merged = crate::support::read_model(&scratch.path("m"));
        for (name, tensor) in read_tensors(&scratch.path("plain.safetensors")) {
            for (x, y) in tensor.values().iter().zip(merged[&name].values()) {
                assert!((x - y).abs() < 1e-5, "{name}: {x} {y}");
            }
        }
    }
}

/// Tolerances below what the leading values tell in f32, of values that fall that far.
#[test]
fn fine_tolerances_are_met_or_told() {
    let scratch = large(60, 0.7);
    let run = |arguments: &[&str]| {
        let first = ["extract", "from.safetensors", "to.safetensors", "--force"];
        let output = ["-o", "a.safetensors", "--json"];
        let ran = scratch.cli(&[&first[..], arguments, &output].concat());
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        let report: Value = serde_json::from_str(&ran.stdout).unwrap();
        (report["tensors"][0].clone(), ran.stderr)
    };
    for tolerance in ["1e-4", "1e-5", "1e-6"] {
        let (found, stderr) = run(&["--tolerance", tolerance]);
        let wanted: f64 = tolerance.parse().unwrap();
        assert_eq!(found["exact"], true);
        assert!(number(&found["relative_error"]) <= wanted * 1.001, "{tolerance}: {found}");
        assert!(!stderr.contains("a larger error than was asked for"), "{stderr}");
        let rank = found["rank"].as_u64().unwrap();
        let values: Vec<f64> =
            found["singular_values"].as_array().unwrap().iter().map(number).collect();
        let before = values[rank as usize - 1..].iter().map(|x| x * x).sum::<f64>().sqrt();
        assert!(before > wanted * number(&found["norm"]), "{tolerance}: a smaller rank does");
    }
    let (found, stderr) = run(&["--tolerance", "1e-4", "--dtype", "bf16"]);
    assert!(number(&found["relative_error"]) > 1e-4);
    assert!(stderr.contains("1 target has a larger error than was asked for"), "{stderr}");
    // Where a greatest rank leaves more anyway, the leading values are enough.
    let (found, stderr) = run(&["--tolerance", "1e-5", "--max-rank", "8"]);
    assert_eq!((&found["rank"], &found["exact"]), (&Value::from(8), &Value::Bool(false)));
    assert_eq!(found["rank_decided_by"], "maximum");
    assert!(!stderr.contains("a larger error than was asked for"), "{stderr}");
}

/// The estimate that is printed is the one that chose the rank.
#[test]
fn the_noise_estimate_is_the_one_that_chose() {
    let pair = Pair::new(Dtype::Bf16, 4);
    let small = pair.report(&["--rank", "auto", "-o", "a.safetensors"]);
    let scratch = large(300, 0.98);
    let large = report(&scratch, &["--rank", "auto", "-o", "a.safetensors"]);
    for one in small["tensors"].as_array().unwrap().iter().chain([&large["tensors"][0]]) {
        let threshold = number(&one["noise"]["threshold"]);
        let values: Vec<f64> =
            one["singular_values"].as_array().unwrap().iter().map(number).collect();
        let above = values.iter().filter(|&&value| value > threshold).count();
        assert_eq!(one["rank"].as_u64(), Some(above as u64), "{one}");
    }
}

/// The norms are told to be worth more only where that is known.
#[test]
fn norms_are_recommended_on_evidence() {
    const NAME: &str = "model.layers.0.q_proj.weight";
    const NORM: &str = "model.layers.0.input_layernorm.weight";
    for (share, recommended) in [(2.2, false), (4.0, true)] {
        let scratch = large(200, 0.999);
        for (file, change) in [("from.safetensors", 0.0), ("to.safetensors", share)] {
            let path = scratch.path(file);
            let matrix = read_tensors(&path).remove(NAME).unwrap();
            let norm = Tensor::new(NORM, Dtype::F32, &[300], &[1.0 + change; 300]);
            write_tensors(&path, &[norm, matrix], &[]);
        }
        let run = ["extract", "from.safetensors", "to.safetensors", "--rank", "40", "-o"];
        let ran = scratch.cli(&[&run[..], &["a.safetensors", "--force"]].concat());
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        assert_eq!(ran.stderr.contains("consider --full norms"), recommended, "{}", ran.stderr);
    }
}

#[test]
fn the_memory_bound_is_stated() {
    let scratch = large(60, 0.9);
    let bound = &report(&scratch, &["--rank", "4", "-o", "a.safetensors"])["memory_bound_bytes"];
    // The Gram matrix alone, and its eigenvectors.
    assert!(bound.as_u64().unwrap() > 2 * 300 * 300 * 8, "{bound}");
    let ran = scratch.cli(&[
        "extract",
        "from.safetensors",
        "to.safetensors",
        "--rank",
        "4",
        "-o",
        "b.safetensors",
    ]);
    assert!(ran.stderr.contains("memory: decomposing takes "), "{}", ran.stderr);
}
