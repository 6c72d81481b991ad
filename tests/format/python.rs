//! The second implementation, `scripts/lora_format.py`, held against this one.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use lora_tests::{fixture, root};
use serde_json::Value;

use crate::native::{describe, encoded, random_adapter, vectors};
use crate::peft::cases;
use crate::{Random, entries, name, read};

/// Runs the script; `None`, with a line that says so, where there is no Python with NumPy.
/// `LORA_PYTHON` names another interpreter than `python3`.
fn python(arguments: impl IntoIterator<Item = PathBuf>, command: &str) -> Option<Output> {
    let interpreter = std::env::var("LORA_PYTHON").unwrap_or_else(|_| "python3".into());
    let probe = Command::new(&interpreter).args(["-c", "import numpy"]).output();
    if !probe.is_ok_and(|output| output.status.success()) {
        println!("skipped: `{interpreter} -c 'import numpy'` fails");
        return None;
    }
    let script = root().join("scripts/lora_format.py");
    let mut process = Command::new(interpreter);
    process.arg("-B").arg(script).arg(command).args(arguments);
    Some(process.output().unwrap())
}

/// Has the script rewrite each file, and expects the same bytes.
fn rewritten_alike(paths: &[PathBuf], scratch: &Path) {
    let copy = |path: &PathBuf| scratch.join(format!("{}.copy", name(path)));
    let pairs = paths.iter().flat_map(|path| [path.clone(), copy(path)]);
    let Some(output) = python(pairs, "rewrite") else { return };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for path in paths {
        let (before, after) = (std::fs::read(path).unwrap(), std::fs::read(copy(path)).unwrap());
        assert!(before == after, "{}", name(path));
    }
}

fn documents(output: &Output) -> Vec<Value> {
    let values = serde_json::Deserializer::from_slice(&output.stdout).into_iter();
    let values: Result<Vec<Value>, _> = values.collect();
    values.unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)))
}

/// F3 to F53: both find the same in every vector.
#[test]
fn both_read_the_vectors_alike() {
    let Some(output) = python(vectors(), "read") else { return };
    let found = documents(&output);
    assert_eq!(found.len(), vectors().len());
    for (path, found) in vectors().iter().zip(found) {
        assert_eq!(found, describe(path), "{}", name(path));
    }
}

/// F5: what Python wrote, Python writes again (Rust does in `native.rs`).
#[test]
fn python_rewrites_the_vectors() {
    rewritten_alike(&vectors(), tempfile::tempdir().unwrap().path());
}

/// F5: what Rust wrote, Python writes again: adapters of anything, and PEFT's converted.
#[test]
fn python_rewrites_what_rust_wrote() {
    let scratch = tempfile::tempdir().unwrap();
    let mut random = Random(5);
    let mut adapters: Vec<_> = (0..300).map(|_| random_adapter(&mut random)).collect();
    adapters.extend(cases().iter().map(|case| read(&case.join("adapter")).unwrap()));
    let paths: Vec<PathBuf> =
        (0..adapters.len()).map(|number| scratch.path().join(format!("{number}"))).collect();
    for (path, adapter) in paths.iter().zip(&adapters) {
        std::fs::write(path, encoded(adapter)).unwrap();
    }
    rewritten_alike(&paths, scratch.path());
}

/// Every bad vector is refused by Python too, for the rule that its table gives.
#[test]
fn python_refuses_for_the_rule_that_is_broken() {
    let table = std::fs::read_to_string(fixture("native/bad/README.md")).unwrap();
    let files = entries(&fixture("native/bad"), ".safetensors");
    let Some(output) = python(files.clone(), "read") else { return };
    for (path, found) in files.iter().zip(documents(&output)) {
        let key = format!("| `{}` | ", name(path).trim_end_matches(".safetensors"));
        let row = table.lines().find_map(|line| line.strip_prefix(&key)).unwrap();
        let rule = row.split(' ').next().unwrap();
        if found["digest_matches"] == Value::Bool(false) {
            assert_eq!(rule, "F23");
        } else {
            assert_eq!(found["refused"], rule, "{}: {}", name(path), found["why"]);
        }
    }
}

/// F1, F2: Python refuses the malformed containers.
#[test]
fn python_refuses_the_bad_containers() {
    let files = entries(&fixture("bad"), ".safetensors");
    let Some(output) = python(files.clone(), "read") else { return };
    for (path, found) in files.iter().zip(documents(&output)) {
        assert!(found["refused"] == "F1" || found["refused"] == "F2", "{}: {found}", name(path));
    }
}
