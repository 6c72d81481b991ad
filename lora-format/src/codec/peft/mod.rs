//! PEFT: a directory with `adapter_config.json` and `adapter_model.safetensors`, or the
//! `adapter_model.bin` of earlier versions.
//!
//! Every field of the configuration and every tensor is understood, or refused by name: `config`
//! knows the fields, `methods` the methods, `tensors` takes the names apart, and what they hold
//! becomes components, method by method.

mod adalora;
mod build;
mod config;
mod factored;
mod layout;
mod lora;
mod lycoris;
mod methods;
mod rotation;
mod small;
mod tensors;
mod writer;

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

pub(super) use writer::described;
pub use writer::{also_needed, check, write_directory};

use self::config::Configuration;
use self::methods::Method;
use super::{ReadOptions, existing};
use crate::container::TensorFile;
use crate::error::{DetectProblem, Error, IoContext, Result};
use crate::fingerprint::BaseIdentity;
use crate::io::atomic;
use crate::json;
use crate::limits;
use crate::model::{Adapter, AdapterFormat, Note, Scaling, SourceConfig};

/// The file names PEFT writes.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The tensors.
pub const MODEL_FILE: &str = "adapter_model.safetensors";
/// The tensors as `torch.save` writes them, where there is no [`MODEL_FILE`].
pub const PICKLE_FILE: &str = "adapter_model.bin";

const PREFIX: &str = "base_model.model.";
const A_SUFFIX: &str = ".lora_A.weight";
const B_SUFFIX: &str = ".lora_B.weight";

/// Whether the tensors are named as PEFT's LoRA names them, or have the prefix of any of its
/// methods.
pub(super) fn is_peft(file: &TensorFile) -> bool {
    file.any_name(|name| {
        name.contains(".lora_A.") || name.contains(".lora_B.") || name.starts_with(PREFIX)
    })
}

/// The configuration beside a tensor file.
pub(super) fn config_beside(path: &Path) -> Option<PathBuf> {
    existing(atomic::parent_of(path), CONFIG_FILE)
}

/// Reads a PEFT directory.
pub(super) fn read_directory(path: &Path, options: &ReadOptions) -> Result<Adapter> {
    let unrecognised = |problem| Error::Unrecognised { path: path.to_owned(), problem };
    let Some(model) = model_file(path) else {
        // Without tensors, the configuration alone may say that this is no LoRA at all.
        if let Some(config) = existing(path, CONFIG_FILE) {
            let config = json::read_object(&config, limits::CONFIG_BYTES)?;
            config::check(path, &config, options, &mut Vec::new())?;
        }
        return Err(unrecognised(match adapters_inside(path)? {
            names if names.is_empty() => DetectProblem::NoAdapter,
            names => DetectProblem::AdaptersInside { names },
        }));
    };
    let file = TensorFile::open(&model)?;
    let mut adapter = read_file(file, existing(path, CONFIG_FILE).as_deref(), options)?;
    if model.ends_with(MODEL_FILE) && existing(path, PICKLE_FILE).is_some() {
        adapter.notes.push(Note::PickleBeside { file: PICKLE_FILE, read: MODEL_FILE });
    }
    adapter.path = path.to_owned();
    Ok(adapter)
}

/// The file that a PEFT directory keeps its tensors in. PEFT too looks for this one first.
fn model_file(directory: &Path) -> Option<PathBuf> {
    existing(directory, MODEL_FILE).or_else(|| existing(directory, PICKLE_FILE))
}

/// Subdirectories that hold an adapter: PEFT saves one there unless it is called `default`.
fn adapters_inside(path: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(path).at(path, "list")? {
        let inner = entry.at(path, "list")?.path();
        if model_file(&inner).is_some() {
            names.push(format!("`{}`", inner.display()));
        }
    }
    names.sort();
    Ok(names)
}

/// Reads PEFT's tensors with the configuration at `config`, or with the user's alpha.
pub(super) fn read_file(
    file: TensorFile,
    config: Option<&Path>,
    options: &ReadOptions,
) -> Result<Adapter> {
    let path = &file.path.clone();
    let mut notes = Vec::new();
    let mut fields = match config {
        Some(config) => json::read_object(config, limits::CONFIG_BYTES)?,
        None => Map::new(),
    };
    if let Some(alpha) = options.alpha {
        complete(&mut fields, alpha, path, config)?;
        notes.push(Note::AlphaGiven { alpha: alpha.to_string() });
    } else if config.is_none() {
        return Err(Error::AlphaUnknown { path: path.to_owned() });
    }
    if options.enable_lora.is_some() {
        return Err(Error::Meaningless {
            path: path.to_owned(),
            option: "enable_lora",
            reason: "only loralib has fused projections",
        });
    }
    // With the alpha that the user gave: a configuration to write back must have one.
    let source =
        config.map(|_| SourceConfig { format: AdapterFormat::Peft, config: fields.clone() });
    if config.is_none() {
        fields.insert("peft_type".to_owned(), json!("LORA"));
    }
    let recorded = config.is_some();
    let config_path = config.unwrap_or(path);
    let method = config::check(config_path, &fields, options, &mut notes)?;
    let configuration = Configuration { path: config_path, fields: &fields, method, recorded };
    let metadata = file.own_metadata();
    let components = build::read(file, configuration, &mut notes)?;
    Ok(Adapter {
        path: path.to_owned(),
        format: AdapterFormat::Peft,
        components,
        base: recorded_base(&fields),
        fan_in_fan_out: fields.get("fan_in_fan_out").and_then(Value::as_bool),
        names: None,
        metadata,
        source,
        extensions: Map::new(),
        notes,
    })
}

/// Puts the user's alpha where the configuration has none.
fn complete(
    fields: &mut Map<String, Value>,
    alpha: f64,
    path: &Path,
    config: Option<&Path>,
) -> Result<()> {
    let method = fields.get("peft_type").and_then(Value::as_str).map(Method::of);
    // What is wrong with the method is said later.
    let field = match method {
        Some(Ok(method)) => method.alpha_field().ok_or_else(|| Error::Meaningless {
            path: path.to_owned(),
            option: "alpha",
            reason: "its method has none",
        })?,
        _ => "lora_alpha",
    };
    if let Some(recorded) = fields.get(field).filter(|value| !value.is_null()) {
        let expected = "absent when an alpha is given by hand";
        return Err(Error::config(config.unwrap_or(path), field, expected, recorded));
    }
    fields.insert(field.to_owned(), json!(alpha));
    Ok(())
}

/// The scales that a configuration of PEFT gives, for the formats that record one.
pub(super) struct Scales(config::ScalingTable);

impl Scales {
    /// Of a LoRA configuration.
    pub(super) fn of(path: &Path, fields: &Map<String, Value>) -> Result<Scales> {
        config::ScalingTable::new(path, fields, "lora_alpha").map(Scales)
    }

    /// Of a module.
    pub(super) fn scaling(&mut self, module: &str) -> Result<Scaling> {
        Ok(self.0.of(module)?.scaling)
    }
}

/// What a configuration says of the base.
fn recorded_base(fields: &Map<String, Value>) -> BaseIdentity {
    let text = |field: &str| fields.get(field).and_then(Value::as_str).map(str::to_owned);
    BaseIdentity {
        name: text("base_model_name_or_path").filter(|name| !name.is_empty()),
        revision: text("revision"),
        fingerprint: None,
    }
}

/// Files of a PEFT directory that are not part of the adapter.
///
/// # Errors
/// [`Error::Io`].
pub fn other_files(directory: &Path) -> Result<Vec<String>> {
    let model = model_file(directory);
    let model = model.as_deref().and_then(Path::file_name).unwrap_or(MODEL_FILE.as_ref());
    let mut names = Vec::new();
    for entry in std::fs::read_dir(directory).at(directory, "list")? {
        let name = entry.at(directory, "list")?.file_name().to_string_lossy().into_owned();
        if name != CONFIG_FILE && model != &*name {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}
