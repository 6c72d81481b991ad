//! The merge engine against independent arithmetic, and its promises about layouts, identities
//! and refusals.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test program: a panic is a failed test"
)]

mod assets;
mod bnb_gptq_awq;
mod bytes;
mod dequantised;
mod experts;
mod features;
mod fixtures;
mod identity;
mod kinds;
mod layout;
mod numerics;
mod orientation;
mod pair;
mod quantised;

mod realised;
mod resolve;
mod spelled;
mod strict;
mod support;
mod tied;
mod undo;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lora_format::ReadOptions;
use lora_format::checkpoint::Checkpoint;
use lora_format::io::atomic::{Durability, Overwrite};
use lora_merge::assets::{Assets, TokenizerSource};
use lora_merge::engine::{Progress, RunOptions};
use lora_merge::output::{self, OutputOptions};
use lora_merge::report::MergeReport;
use lora_merge::{MergeOptions, MergePlan, Result};
use serde_json::json;

use support::{Factors, Tensor, read_model, write_adapter, write_json, write_tensors};

fn plan(base: &Path, adapter: &Path, options: &MergeOptions) -> Result<MergePlan> {
    let base = Checkpoint::open(base)?;
    let adapter = lora_format::read(adapter, &ReadOptions::default())?;
    MergePlan::new(base, vec![adapter.into()], options)
}

fn write(
    plan: &MergePlan,
    tokenizer: TokenizerSource,
    output: &Path,
    run: &RunOptions,
) -> Result<MergeReport> {
    let assets = Assets::plan(plan, tokenizer)?;
    let options = OutputOptions {
        destination: output.to_owned(),
        overwrite: Overwrite::Never,
        durability: Durability::Cached,
    };
    output::write(plan, &assets, &options, run, &Progress::default())
}

fn merge(
    base: &Path,
    adapter: &Path,
    output: &Path,
    options: &MergeOptions,
    run: &RunOptions,
) -> Result<MergeReport> {
    write(&plan(base, adapter, options)?, TokenizerSource::Auto, output, run)
}

/// A scratch directory with a base and an adapter.
struct Case {
    directory: tempfile::TempDir,
    base: PathBuf,
    adapter: PathBuf,
}

impl Case {
    /// A base of one file and a PEFT directory.
    fn file(base: &[Tensor], adapter: &[Factors]) -> Case {
        let case = Case::at("base.safetensors");
        write_tensors(&case.base, base, &[("format", "pt")]);
        write_adapter(&case.adapter, adapter, &json!({}));
        case
    }

    /// A directory of one file and its configuration.
    fn directory(config: &serde_json::Value, base: &[Tensor], adapter: &[Factors]) -> Case {
        let case = Case::at("base");
        std::fs::create_dir(&case.base).unwrap();
        write_tensors(&case.base.join("model.safetensors"), base, &[("format", "pt")]);
        write_json(&case.base.join("config.json"), config);
        write_adapter(&case.adapter, adapter, &json!({}));
        case
    }

    /// A directory of shards, their index and a configuration.
    fn sharded(shards: &[&[Tensor]], adapter: &[Factors]) -> Case {
        let case = Case::at("base");
        std::fs::create_dir(&case.base).unwrap();
        let mut map = serde_json::Map::new();
        let mut total = 0;
        for (number, tensors) in shards.iter().enumerate() {
            let name = format!("model-{:05}-of-{:05}.safetensors", number + 1, shards.len());
            write_tensors(&case.base.join(&name), tensors, &[("format", "pt")]);
            for tensor in *tensors {
                map.insert(tensor.name.clone(), json!(name));
                total += tensor.data.len();
            }
        }
        let index = json!({"metadata": {"total_size": total}, "weight_map": map});
        write_json(&case.base.join("model.safetensors.index.json"), &index);
        write_json(&case.base.join("config.json"), &json!({"torch_dtype": "float32"}));
        write_adapter(&case.adapter, adapter, &json!({}));
        case
    }

    fn at(base: &str) -> Case {
        let directory = tempfile::tempdir().unwrap();
        let (base, adapter) = (directory.path().join(base), directory.path().join("adapter"));
        Case { directory, base, adapter }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn plan(&self, options: &MergeOptions) -> Result<MergePlan> {
        plan(&self.base, &self.adapter, options)
    }

    /// Merges into a new place and reads the result back.
    fn merge(&self, options: &MergeOptions, run: &RunOptions) -> Result<Merged> {
        let mut number = 0;
        let output = loop {
            let output = self.path(&format!("out-{number}"));
            if !output.exists() {
                break output;
            }
            number += 1;
        };
        let report = merge(&self.base, &self.adapter, &output, options, run)?;
        Ok(Merged { tensors: read_model(&output), output, report })
    }

    /// What planning refuses, as text, with the scratch directory's path removed.
    fn refusal(&self, options: &MergeOptions) -> String {
        let before = support::listing(self.directory.path());
        let error = match self.merge(options, &RunOptions::default()) {
            Ok(_) => panic!("merged what must be refused"),
            Err(error) => error,
        };
        assert_eq!(support::listing(self.directory.path()), before, "something was written");
        let root = format!("{}/", self.directory.path().display());
        error.to_string().replace(&root, "")
    }
}

/// A finished merge.
#[derive(Debug)]
struct Merged {
    output: PathBuf,
    report: MergeReport,
    tensors: BTreeMap<String, Tensor>,
}
