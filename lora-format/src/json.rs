//! Strict JSON: what `serde_json` reads, less duplicate keys.
//!
//! Two values under one key mean that two readers of the same file may act on different
//! configurations; the file is refused rather than one value chosen.

use std::fmt;
use std::path::Path;

use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use crate::error::{Error, Result};

/// A JSON value in which no object has the same key twice.
struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_any(StrictVisitor).map(Strict)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> std::result::Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> std::result::Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> std::result::Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> std::result::Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> std::result::Result<Value, E> {
        Number::from_f64(value)
            .map(Value::Number)
            .ok_or_else(|| E::custom("a number is out of range"))
    }

    fn visit_str<E>(self, value: &str) -> std::result::Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> std::result::Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> std::result::Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(Strict(value)) = access.next_element()? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> std::result::Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = access.next_key::<String>()? {
            let Strict(value) = access.next_value()?;
            if map.contains_key(&key) {
                return Err(de::Error::custom(format_args!("the key `{key}` appears twice")));
            }
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}

/// Parses one JSON document; `path` is only for the message.
///
/// # Errors
/// [`Error::Json`] with line and column: malformed, nested too deep, or a key twice.
pub fn parse(path: &Path, text: &[u8]) -> Result<Value> {
    serde_json::from_slice::<Strict>(text)
        .map(|strict| strict.0)
        .map_err(|source| Error::Json { path: path.to_owned(), source })
}

/// Reads a JSON document of at most `limit` bytes whose top level is an object.
///
/// # Errors
/// [`Error::Io`], [`Error::TooLarge`], [`Error::Json`], or [`Error::Config`] if the top level is
/// not an object.
pub fn read_object(path: &Path, limit: u64) -> Result<Map<String, Value>> {
    object(path, parse(path, &crate::io::read_limited(path, limit)?)?)
}

/// The object that `value` is.
///
/// # Errors
/// [`Error::Config`] if it is anything else.
pub fn object(path: &Path, value: Value) -> Result<Map<String, Value>> {
    match value {
        Value::Object(map) => Ok(map),
        other => Err(Error::config(path, "(top level)", "an object", &other)),
    }
}

/// A short rendering of a value for a message.
pub(crate) fn brief(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= 60 {
        return text;
    }
    text.chars().take(57).chain("...".chars()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn duplicates_are_refused_at_any_depth() {
        let path = Path::new("x.json");
        assert!(parse(path, br#"{"a":1,"b":{"a":1}}"#).is_ok());
        for text in [&br#"{"a":1,"a":2}"#[..], br#"[{"b":{"a":1,"a":1}}]"#] {
            let message = parse(path, text).unwrap_err().to_string();
            assert!(message.contains("appears twice"), "{message}");
        }
    }

    #[test]
    fn order_of_keys_survives() {
        let text = r#"{"z":1,"a":[1.5,null,"x"],"m":{"y":true,"b":-3}}"#;
        let value = parse(Path::new("x.json"), text.as_bytes()).unwrap();
        assert_eq!(value.to_string(), text);
    }
}
