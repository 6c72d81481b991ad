//! Typed access to `quantization_config`, which anybody may have written.

use lora_format::checkpoint::Checkpoint;
use serde_json::{Map, Value};

use super::QuantisedProblem;

/// An object within `config.json`, and where it stands there.
#[derive(Clone, Debug)]
pub(super) struct Fields<'a> {
    path: String,
    map: &'a Map<String, Value>,
}

type Result<T> = std::result::Result<T, QuantisedProblem>;

impl<'a> Fields<'a> {
    /// The quantisation configuration of a base: `quantization_config`, `compression_config` (the
    /// name that compressed-tensors used first), or either within `text_config`.
    pub(super) fn of(base: &'a Checkpoint) -> Result<Option<Fields<'a>>> {
        let Some(map) = base.config() else { return Ok(None) };
        let top = Fields { path: String::new(), map };
        for name in ["quantization_config", "compression_config"] {
            if let Some(found) = top.object(name)? {
                return Ok(Some(found));
            }
        }
        let Some(text) = top.text_model() else { return Ok(None) };
        for name in ["quantization_config", "compression_config"] {
            if let Some(found) = text.object(name)? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// The top level of the base's `config.json`.
    pub(super) fn top(base: &'a Checkpoint) -> Option<Fields<'a>> {
        base.config().map(|map| Fields { path: String::new(), map })
    }

    /// The configuration of the language model within a multimodal one's.
    pub(super) fn text_model(&self) -> Option<Fields<'a>> {
        let map = self.map.get("text_config")?.as_object()?;
        Some(Fields { path: self.name("text_config"), map })
    }

    /// The full name of a field, for messages.
    pub(super) fn name(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// Every field in file order.
    pub(super) fn keys(&self) -> impl Iterator<Item = &'a str> {
        self.map.keys().map(String::as_str)
    }

    /// A field that is there and not null.
    pub(super) fn value(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// An optional string.
    pub(super) fn string(&self, key: &str) -> Result<Option<&'a str>> {
        self.typed(key, "a string", Value::as_str)
    }

    /// An optional boolean.
    pub(super) fn boolean(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "a boolean", Value::as_bool)
    }

    /// An optional integer, of either sign.
    pub(super) fn integer(&self, key: &str) -> Result<Option<i64>> {
        self.typed(key, "an integer", Value::as_i64)
    }

    /// An optional integer of at least 1.
    pub(super) fn positive(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "a positive integer", |value| {
            usize::try_from(value.as_u64()?).ok().filter(|&number| number > 0)
        })
    }

    /// An optional object.
    pub(super) fn object(&self, key: &str) -> Result<Option<Fields<'a>>> {
        let map = self.typed(key, "an object", Value::as_object)?;
        Ok(map.map(|map| Fields { path: self.name(key), map }))
    }

    /// An optional list of strings.
    pub(super) fn strings(&self, key: &str) -> Result<Option<Vec<&'a str>>> {
        self.typed(key, "a list of strings", |value| {
            value.as_array()?.iter().map(Value::as_str).collect()
        })
    }

    /// An optional list of integers, each at least 1.
    pub(super) fn positives(&self, key: &str) -> Result<Option<Vec<usize>>> {
        self.typed(key, "a list of positive integers", |value| {
            let number = |value: &Value| usize::try_from(value.as_u64()?).ok();
            let list = value.as_array()?.iter().map(number).collect::<Option<Vec<usize>>>()?;
            list.iter().all(|&number| number > 0).then_some(list)
        })
    }

    /// A problem with the value of `key`.
    pub(super) fn problem(&self, key: &str, expected: &'static str) -> QuantisedProblem {
        let found = self.map.get(key).map_or("nothing".to_owned(), brief);
        QuantisedProblem::Config { field: self.name(key), expected, found }
    }

    fn typed<T>(
        &self,
        key: &str,
        expected: &'static str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        convert(value).map(Some).ok_or_else(|| self.problem(key, expected))
    }
}

/// A short rendering of a value for a message.
pub(super) fn brief(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= 60 {
        return text;
    }
    text.chars().take(57).chain("...".chars()).collect()
}
