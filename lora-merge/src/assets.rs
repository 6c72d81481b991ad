//! The small files of a model directory: which go into the output, from where, and what changes in
//! `config.json`.
//!
//! Files are taken from an allow-list, so that a merge never drags along optimizer states, other
//! weights or caches; what is left behind is listed. Where the adapter brings a tokenizer or a chat
//! template, it is what the adapter was trained with, and wins.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use lora_format::checkpoint::{Checkpoint, Layout};
use lora_format::io::atomic::parent_of;
use lora_format::model::{Adapter, AdapterFormat};
use lora_format::{Dtype, IoContext};
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::layout::OutputLayout;
use crate::plan::MergePlan;

/// Whose tokenizer and chat template the output gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TokenizerSource {
    /// The adapter's where it brings one, else the base's.
    #[default]
    Auto,
    /// The base's.
    Base,
    /// The adapter's.
    Adapter,
}

/// The small files of an output directory.
#[derive(Clone, Debug, Default)]
pub struct Assets {
    /// Output name → file to copy.
    pub files: BTreeMap<String, PathBuf>,
    /// The new `config.json`, if the base has one and it must change.
    pub config: Option<Map<String, Value>>,
    /// What changes in `config.json`.
    pub config_changes: Vec<String>,
    /// Files that come from the adapter.
    pub from_adapter: Vec<String>,
    /// Files of the base that are not copied.
    pub left_behind: Vec<String>,
}

const CONFIG: &str = "config.json";
const JINJA: &str = "chat_template.jinja";

const TOKENIZER: [&str; 14] = [
    "added_tokens.json",
    "bpe.codes",
    "chat_template.json",
    JINJA,
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
];

const OTHERS: [&str; 9] = [
    "config_sentence_transformers.json",
    "feature_extractor_config.json",
    "generation_config.json",
    "modules.json",
    "preprocessor_config.json",
    "processor_config.json",
    "sentence_bert_config.json",
    "video_preprocessor_config.json",
    CONFIG,
];

fn is_tokenizer_file(name: &str) -> bool {
    TOKENIZER.contains(&name) || name.ends_with(".tiktoken") || name.starts_with("tokenizer.model.")
}

fn is_template(name: &str) -> bool {
    [JINJA, "chat_template.json"].contains(&name)
}

/// Whether the file holds a vocabulary, not only settings around one.
fn is_vocabulary(name: &str) -> bool {
    let settings = ["special_tokens_map.json", "tokenizer_config.json", "added_tokens.json"];
    is_tokenizer_file(name) && !is_template(name) && !settings.contains(&name)
}

fn is_other_asset(name: &str) -> bool {
    let legal = ["LICENSE", "LICENCE", "NOTICE", "USE_POLICY"];
    // Models with code of their own load only with it beside them.
    OTHERS.contains(&name)
        || name.ends_with(".py")
        || legal.iter().any(|prefix| name.to_ascii_uppercase().starts_with(prefix))
}

/// A module directory of sentence-transformers, such as `1_Pooling`.
fn is_module_directory(name: &str) -> bool {
    let digits = name.bytes().take_while(u8::is_ascii_digit).count();
    digits > 0 && name[digits..].starts_with('_')
}

impl Assets {
    /// The files that go with an output; none for a single-file output.
    ///
    /// # Errors
    /// [`Error::Format`] if a directory cannot be listed, [`Error::NoTokenizer`].
    pub fn plan(plan: &MergePlan, tokenizer: TokenizerSource) -> Result<Assets> {
        let base = &plan.base;
        let mut assets = Assets::default();
        if base.layout() == Layout::File {
            return Ok(assets);
        }
        assets.take_base(base)?;
        if tokenizer != TokenizerSource::Base {
            let adapters = plan.adapters.iter().map(|one| &one.adapter);
            let with: Vec<&Path> = adapters.filter_map(adapter_directory).collect();
            assets.take_tokenizers(&with)?;
        }
        if tokenizer == TokenizerSource::Adapter && assets.from_adapter.is_empty() {
            let adapters = plan.adapters.iter().map(|one| one.adapter.path.clone()).collect();
            return Err(Error::NoTokenizer { adapters });
        }
        if let Some(config) = base.config() {
            assets.edit_config(plan, config);
        }
        Ok(assets)
    }

    /// The size of all files, as far as it can be told.
    pub(crate) fn bytes(&self) -> u64 {
        let size = |path: &PathBuf| std::fs::metadata(path).map_or(0, |metadata| metadata.len());
        self.files.values().map(size).sum()
    }

    fn take_base(&mut self, base: &Checkpoint) -> Result<()> {
        let weights: BTreeSet<&str> =
            base.shards().iter().map(|shard| shard.name.as_str()).collect();
        for (name, path, directory) in list(base.path())? {
            if directory && is_module_directory(&name) {
                for (inner, path, directory) in list(&path)? {
                    let name = format!("{name}/{inner}");
                    let small = inner.ends_with(".json") || inner.ends_with(".safetensors");
                    if small && !directory && path.exists() {
                        self.files.insert(name, path);
                    } else {
                        self.left_behind.push(name);
                    }
                }
            } else if !directory
                && path.exists()
                && (is_tokenizer_file(&name) || is_other_asset(&name))
            {
                self.files.insert(name, path);
            } else if directory && name == "additional_chat_templates" {
                for (inner, path, directory) in list(&path)? {
                    let name = format!("{name}/{inner}");
                    if directory || !path.exists() {
                        self.left_behind.push(name);
                    } else {
                        self.files.insert(name, path);
                    }
                }
            } else if !weights.contains(name.as_str())
                && name != lora_format::checkpoint::INDEX_FILE
                && !name.starts_with('.')
            {
                self.left_behind.push(if directory { format!("{name}/") } else { name });
            }
        }
        Ok(())
    }

    /// The tokenizer of the adapters that bring one, if they agree on it.
    fn take_tokenizers(&mut self, directories: &[&Path]) -> Result<()> {
        let mut first: Option<(&Path, Vec<TokenizerFile>)> = None;
        for &directory in directories {
            let own: Vec<TokenizerFile> = list(directory)?
                .into_iter()
                .filter(|(name, _, is_directory)| !is_directory && is_tokenizer_file(name))
                .map(|(name, path, _)| (name, path))
                .collect();
            match &first {
                _ if own.is_empty() => {}
                None => first = Some((directory, own)),
                Some((other, files)) if !same_files(files, &own)? => {
                    let (first, second) = (other.to_path_buf(), directory.to_owned());
                    return Err(Error::TokenizersDiffer { first, second });
                }
                Some(_) => {}
            }
        }
        match first {
            Some((directory, files)) => self.take_tokenizer(directory, files),
            None => Ok(()),
        }
    }

    fn take_tokenizer(&mut self, directory: &Path, own: Vec<TokenizerFile>) -> Result<()> {
        // A vocabulary is a set of files that fit together: beside the adapter's, one of the base
        // would be read first, or add its tokens.
        if own.iter().any(|(name, ..)| is_vocabulary(name)) {
            let stays = |name: &String| !is_tokenizer_file(name) || is_template(name);
            let dropped: Vec<String> =
                self.files.keys().filter(|name| !stays(name)).cloned().collect();
            for name in dropped {
                self.files.remove(&name);
                if own.iter().all(|(other, ..)| *other != name) {
                    self.left_behind.push(name);
                }
            }
        }
        for (name, path) in own {
            self.files.insert(name.clone(), path);
            self.from_adapter.push(name);
        }
        // transformers prefers a template file to one inside tokenizer_config.json: the base's
        // file would shadow the template that the adapter brings inside its configuration.
        let has = |name: &str| self.from_adapter.iter().any(|file| file == name);
        if has("tokenizer_config.json") && !has(JINJA) {
            let path = directory.join("tokenizer_config.json");
            let config = lora_format::json::read_object(&path, lora_format::limits::CONFIG_BYTES)?;
            if config.contains_key("chat_template") && self.files.remove(JINJA).is_some() {
                self.left_behind.push(JINJA.to_owned());
            }
        }
        Ok(())
    }

    /// Makes `dtype`/`torch_dtype`, `tie_word_embeddings` and `vocab_size` true and removes a
    /// `quantization_config` that no longer holds.
    fn edit_config(&mut self, plan: &MergePlan, config: &Map<String, Value>) {
        let (base, layout) = (&plan.base, &plan.output);
        let mut edited = config.clone();
        if plan.untied {
            set_text_field(&mut edited, TIE, json!(false), &mut self.config_changes);
        }
        if let Some(rows) = plan.vocabulary {
            set_text_field(&mut edited, VOCABULARY, json!(rows), &mut self.config_changes);
        }
        if let Some(dtype) = main_dtype(layout) {
            let name = match dtype {
                Dtype::F32 => "float32",
                Dtype::F16 => "float16",
                _ => "bfloat16",
            };
            // A part of a model may be stored otherwise than the whole (a vision tower in f32):
            // its entry changes if everything was converted, or if it only repeated the whole's.
            let old = stated_dtype(config);
            let converted = layout
                .files
                .iter()
                .flat_map(|file| &file.tensors)
                .all(|tensor| !tensor.dtype.is_merge_float() || tensor.dtype == dtype);
            let stale = |stated: &str| converted || Some(stated) == old;
            set_dtype(&mut edited, name, "", &stale, &mut self.config_changes);
            if old.is_none() {
                let key = if edited.contains_key("dtype") { "dtype" } else { "torch_dtype" };
                edited.insert(key.to_owned(), json!(name));
                self.config_changes.push(format!("{key} added: {name}"));
            }
        }
        // Everything that could be read quantised is written in full precision.
        if plan.parameters.quantised().is_some() || !is_quantised(base) {
            remove_quantization(&mut edited, "", &mut self.config_changes);
        }
        if !self.config_changes.is_empty() {
            self.config = Some(edited);
        }
    }
}

const TIE: &str = "tie_word_embeddings";
const VOCABULARY: &str = "vocab_size";

/// Sets a field of the language model's configuration: of a multimodal model, where its text part
/// has it, and at the top too if it stands there.
fn set_text_field(
    config: &mut Map<String, Value>,
    field: &str,
    value: Value,
    changes: &mut Vec<String>,
) {
    let mut set = |config: &mut Map<String, Value>, at: &str| {
        let old = config.insert(field.to_owned(), value.clone());
        if old.as_ref() != Some(&value) {
            let old = old.map_or_else(|| "absent".to_owned(), |old| old.to_string());
            changes.push(format!("{at}{field}: {old} → {value}"));
        }
    };
    let nested = config.get_mut("text_config").and_then(Value::as_object_mut);
    let inside = nested.is_some();
    if let Some(text) = nested {
        set(text, "text_config.");
    }
    if !inside || config.contains_key(field) {
        set(config, "");
    }
}

/// A name and where the file is.
type TokenizerFile = (String, PathBuf);

/// Whether two sets of tokenizer files are the same, name by name and byte by byte.
fn same_files(first: &[TokenizerFile], second: &[TokenizerFile]) -> Result<bool> {
    if first.len() != second.len() {
        return Ok(false);
    }
    for ((name, path), (other_name, other)) in first.iter().zip(second) {
        let read = |path: &PathBuf| std::fs::read(path).at(path, "read");
        if name != other_name || read(path)? != read(other)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The dtype that a configuration states for the whole model.
fn stated_dtype(config: &Map<String, Value>) -> Option<&str> {
    ["dtype", "torch_dtype"].into_iter().find_map(|key| config.get(key)?.as_str())
}

/// Removes `quantization_config`, in nested model configurations too.
fn remove_quantization(config: &mut Map<String, Value>, at: &str, changes: &mut Vec<String>) {
    if config.shift_remove("quantization_config").is_some() {
        changes.push(format!("{at}quantization_config removed: no tensor is quantised"));
    }
    for (key, value) in config.iter_mut() {
        if let Value::Object(nested) = value
            && key.ends_with("_config")
        {
            remove_quantization(nested, &format!("{at}{key}."), changes);
        }
    }
}

/// Sets the top dtype entry and those nested ones that are stale.
fn set_dtype(
    config: &mut Map<String, Value>,
    dtype: &str,
    at: &str,
    stale: &dyn Fn(&str) -> bool,
    changes: &mut Vec<String>,
) {
    for key in ["dtype", "torch_dtype"] {
        if let Some(value) = config.get_mut(key)
            && value
                .as_str()
                .is_some_and(|old| old != dtype && old != "auto" && (at.is_empty() || stale(old)))
        {
            changes.push(format!("{at}{key}: {} → {dtype}", value.as_str().unwrap_or_default()));
            *value = json!(dtype);
        }
    }
    for (key, value) in config.iter_mut() {
        if let Value::Object(nested) = value
            && key.ends_with("_config")
            && key != "quantization_config"
        {
            set_dtype(nested, dtype, &format!("{at}{key}."), stale, changes);
        }
    }
}

/// The floating-point dtype that most bytes of the output have.
fn main_dtype(layout: &OutputLayout) -> Option<Dtype> {
    let mut bytes: BTreeMap<Dtype, u64> = BTreeMap::new();
    for tensor in layout.files.iter().flat_map(|file| &file.tensors) {
        if tensor.dtype.is_merge_float() {
            *bytes.entry(tensor.dtype).or_default() += tensor.bytes;
        }
    }
    bytes.into_iter().max_by_key(|entry| entry.1).map(|entry| entry.0)
}

/// Whether any tensor is stored as quantisers store them.
fn is_quantised(base: &Checkpoint) -> bool {
    const SUFFIXES: [&str; 10] = [
        ".SCB",
        ".absmax",
        ".g_idx",
        ".qweight",
        ".qzeros",
        ".weight_packed",
        ".weight_scale",
        ".weight_scale_inv",
        "_blocks",
        "_scales",
    ];
    base.tensors().any(|(_, info)| {
        let eight_bit = info.dtype.bits() <= 8 && info.dtype != Dtype::Bool;
        let weight = info.name.ends_with(".weight") && eight_bit;
        weight || SUFFIXES.iter().any(|suffix| info.name.ends_with(suffix))
    })
}

/// The directory whose tokenizer belongs to the adapter.
fn adapter_directory(adapter: &Adapter) -> Option<&Path> {
    if adapter.format != AdapterFormat::Peft {
        return None;
    }
    if adapter.path.is_dir() { Some(&adapter.path) } else { Some(parent_of(&adapter.path)) }
}

/// A file or directory in a model's directory that is neither its weights nor among the names that
/// the new output has: replacing the directory would lose it.
pub(crate) fn foreign_entry(model: &Checkpoint, new: &Assets) -> Result<Option<String>> {
    let weights = |name: &str| {
        name == lora_format::checkpoint::INDEX_FILE
            || model.shards().iter().any(|shard| shard.name == name)
    };
    for (name, path, is_directory) in list(model.path())? {
        if is_directory {
            for (inner, ..) in list(&path)? {
                let name = format!("{name}/{inner}");
                if !new.files.contains_key(&name) {
                    return Ok(Some(name));
                }
            }
        } else if !weights(&name) && !is_tokenizer_file(&name) && !new.files.contains_key(&name) {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

/// The entries of a directory, sorted: (name, path, is a directory). Links are followed.
fn list(directory: &Path) -> Result<Vec<(String, PathBuf, bool)>> {
    let mut entries = Vec::new();
    for entry in std::fs::read_dir(directory).at(directory, "list")? {
        let path = entry.at(directory, "list")?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let is_directory = path.is_dir();
        entries.push((name, path, is_directory));
    }
    entries.sort();
    Ok(entries)
}
