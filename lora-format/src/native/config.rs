//! The JSON document in the metadata, field by field as `docs/FORMAT.md` numbers them.

use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

/// The whole document. Unknown members are kept out: a later minor version may add optional
/// ones, which an old reader ignores and an old writer drops.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Config {
    pub version: String,
    pub requires: Vec<String>,
    pub digest: String,
    /// There if any component has one.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "some_object")]
    pub scaling: Option<ScalingConfig>,
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "objects")]
    pub overrides: Vec<Override>,
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "objects")]
    pub forms: Vec<FormGroup>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fan_in_fan_out: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub names: Option<String>,
    #[serde(default, skip_serializing_if = "BaseConfig::is_empty", deserialize_with = "object")]
    pub base: BaseConfig,
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "some_object")]
    pub source: Option<SourceField>,
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub extensions: Map<String, Value>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ScalingConfig {
    #[serde(serialize_with = "number")]
    pub alpha: f64,
    pub rule: String,
}

/// Modules (or parameters that are no module's `weight`) whose scaling is not the file's default.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Override {
    #[serde(deserialize_with = "object")]
    pub scaling: ScalingConfig,
    pub modules: Vec<String>,
}

/// What the tensors of a form do not say: of all components of that form, or of those named.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FormGroup {
    pub form: String,
    pub facts: Map<String, Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modules: Option<Vec<String>>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct BaseConfig {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    /// A [`FingerprintConfig`], or whatever another algorithm records.
    pub fingerprint: Option<Value>,
}

impl BaseConfig {
    fn is_empty(&self) -> bool {
        self.name.is_none() && self.revision.is_none() && self.fingerprint.is_none()
    }
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FingerprintConfig {
    pub algorithm: String,
    #[serde(deserialize_with = "objects")]
    pub targets: Vec<TargetConfig>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TargetConfig {
    pub target: String,
    pub dtype: String,
    pub shape: Vec<usize>,
    /// The values as little-endian f32, in base64.
    pub values: String,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SourceField {
    pub format: String,
    pub config: Map<String, Value>,
}

/// A value from an object: derived readers take an array of the members' values, too.
fn object<'de, D: Deserializer<'de>, T: DeserializeOwned>(deserializer: D) -> Result<T, D::Error> {
    let members = Map::<String, Value>::deserialize(deserializer)?;
    serde_json::from_value(Value::Object(members)).map_err(D::Error::custom)
}

fn some_object<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: DeserializeOwned,
{
    object(deserializer).map(Some)
}

fn objects<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: DeserializeOwned,
{
    let all = Vec::<Map<String, Value>>::deserialize(deserializer)?;
    let read = |members| serde_json::from_value(Value::Object(members)).map_err(D::Error::custom);
    all.into_iter().map(read).collect()
}

/// An integral number is written as one: `16`, not `16.0`.
fn number<S: serde::Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    number_value(*value).serialize(serializer)
}

/// The same as a value; one that JSON cannot hold is `null`.
pub(super) fn number_value(value: f64) -> Value {
    /// Below this, every integral f64 is an integer that JSON readers hold exactly.
    const EXACT: f64 = 9_007_199_254_740_992.0;
    let negative_zero = value == 0.0 && value.is_sign_negative();
    if value.fract() == 0.0 && value.abs() < EXACT && !negative_zero {
        Value::from(value as i64)
    } else {
        Value::from(value)
    }
}
