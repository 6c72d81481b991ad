//! The program as its users run it: arguments, files, streams, exit statuses.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test program: a panic is a failed test"
)]

mod adapters;
mod combine;
mod compare;
mod extract;
mod formats;
mod inspect;
mod json;
mod merge;
mod options;
mod outputs;
mod process;
mod quantised;
mod refusals;
mod resize;
mod several;
mod spectrum;
#[path = "../merge/support.rs"]
mod support;
mod tied;
mod undo;
mod verify;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use lora_format::Dtype;
use serde_json::json;

use support::{Factors, Prng, Tensor, fixtures, write_adapter, write_tensors};

/// What a run left.
#[derive(Debug)]
struct Ran {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Ran {
    fn of(output: &Output) -> Ran {
        Ran {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout.clone()).unwrap(),
            stderr: String::from_utf8(output.stderr.clone()).unwrap(),
        }
    }

    /// Done, with nothing on stdout.
    fn done(self) -> Ran {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        assert_eq!(self.stdout, "");
        self
    }

    /// An error: nothing on stdout; stderr without `prefix`.
    fn refused(self, prefix: &Path) -> String {
        assert_eq!(self.code, Some(2), "{}", self.stderr);
        assert_eq!(self.stdout, "");
        self.stderr.replace(&format!("{}/", prefix.display()), "")
    }
}

fn command(directory: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lora-cli"));
    command.current_dir(directory).stdin(Stdio::null());
    command
}

fn cli<S: AsRef<std::ffi::OsStr>>(directory: &Path, arguments: &[S]) -> Ran {
    Ran::of(&command(directory).args(arguments).output().unwrap())
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A path among the adapters that PEFT made.
fn peft(path: &str) -> String {
    text(&fixtures().join("peft").join(path)).to_owned()
}

/// The cases that show one feature each.
fn features() -> PathBuf {
    fixtures().join("features")
}

fn feature_path(path: &str) -> PathBuf {
    features().join(path)
}

fn feature(path: &str) -> String {
    text(&feature_path(path)).to_owned()
}

/// A scratch directory with `base.safetensors` and the PEFT directory `lora`.
struct Scratch {
    directory: tempfile::TempDir,
}

impl Scratch {
    fn new() -> Scratch {
        let scratch = Scratch { directory: tempfile::tempdir().unwrap() };
        let mut prng = Prng::new(1);
        let base = [
            Tensor::random(&mut prng, "model.layers.0.q.weight", Dtype::Bf16, &[16, 24], 1.0),
            Tensor::random(&mut prng, "model.norm.weight", Dtype::Bf16, &[24], 1.0),
        ];
        write_tensors(&scratch.path("base.safetensors"), &base, &[("format", "pt")]);
        let factors = Factors::random(&mut prng, "model.layers.0.q", (16, 24, 4), Dtype::F32, 0.3);
        write_adapter(&scratch.path("lora"), &[factors], &json!({}));
        scratch
    }

    /// The same with a base directory, `base`, beside.
    fn with_directory() -> Scratch {
        let scratch = Scratch::new();
        scratch.model("base");
        scratch
    }

    fn model(&self, name: &str) {
        std::fs::create_dir_all(self.path(name)).unwrap();
        let weights = self.path(name).join("model.safetensors");
        std::fs::copy(self.path("base.safetensors"), weights).unwrap();
        let config = r#"{"model_type": "llama", "torch_dtype": "bfloat16"}"#;
        std::fs::write(self.path(name).join("config.json"), config).unwrap();
    }

    fn root(&self) -> &Path {
        self.directory.path()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn cli<S: AsRef<std::ffi::OsStr>>(&self, arguments: &[S]) -> Ran {
        cli(self.root(), arguments)
    }

    fn names(&self) -> Vec<String> {
        support::names(self.root())
    }
}
