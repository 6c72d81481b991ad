//! What conversions read from the base's `config.json`.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{BaseProblem, Error, Result};
use crate::json;
use crate::limits;

/// The base's configuration, for an adapter at `path`.
#[derive(Clone, Copy)]
pub(super) struct Base<'a> {
    path: &'a Path,
    config: &'a Map<String, Value>,
}

impl<'a> Base<'a> {
    /// The configuration that was given; `reason` says what it is needed for.
    pub(super) fn needed(
        path: &'a Path,
        config: Option<&'a Map<String, Value>>,
        reason: impl FnOnce() -> String,
    ) -> Result<Base<'a>> {
        match config {
            Some(config) => Ok(Base { path, config }),
            None => {
                let problem = BaseProblem::Missing { reason: reason() };
                Err(Error::Base { path: path.to_owned(), problem })
            }
        }
    }

    /// A field of the language model: of `text_config` if it is there.
    fn field(&self, name: &str) -> Option<&'a Value> {
        let of = |map: &'a Map<String, Value>| map.get(name).filter(|value| !value.is_null());
        self.config
            .get("text_config")
            .and_then(Value::as_object)
            .and_then(of)
            .or_else(|| of(self.config))
    }

    pub(super) fn problem(&self, problem: BaseProblem) -> Error {
        Error::Base { path: self.path.to_owned(), problem }
    }

    /// The class that the model has in transformers, `LlamaForCausalLM`.
    pub(super) fn class(&self) -> Result<&'a str> {
        let field = self.field("architectures");
        field
            .and_then(Value::as_array)
            .and_then(|it| it.first())
            .and_then(Value::as_str)
            .ok_or_else(|| {
                let found = field.map_or_else(|| "nothing".to_owned(), json::brief);
                let expected = "a list that begins with the model's class";
                self.problem(BaseProblem::Field { field: "architectures", expected, found })
            })
    }

    /// A count, if the configuration has it.
    pub(super) fn count(&self, field: &'static str) -> Result<Option<usize>> {
        let Some(value) = self.field(field) else { return Ok(None) };
        let count = value.as_u64().filter(|&it| (1..=limits::NAMED_INDEX as u64).contains(&it));
        match count {
            Some(count) => Ok(Some(count as usize)),
            None => {
                let expected = "a count";
                let found = json::brief(value);
                Err(self.problem(BaseProblem::Field { field, expected, found }))
            }
        }
    }

    /// The heads of the queries, or of the keys.
    pub(super) fn heads(&self, of: Heads) -> Result<usize> {
        if of == Heads::Key
            && let Some(count) = self.count("num_key_value_heads")?
        {
            return Ok(count);
        }
        const FIELD: &str = "num_attention_heads";
        self.count(FIELD)?.ok_or_else(|| {
            let found = "nothing".to_owned();
            self.problem(BaseProblem::Field { field: FIELD, expected: "a count", found })
        })
    }

    /// How many experts a layer has.
    pub(super) fn experts(&self) -> Result<Option<usize>> {
        match self.count("num_local_experts")? {
            Some(count) => Ok(Some(count)),
            None => self.count("num_experts"),
        }
    }
}

/// The heads that the rows of a projection belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Heads {
    Query,
    Key,
}
