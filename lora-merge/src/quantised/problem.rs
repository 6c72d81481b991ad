//! What can be wrong with a quantised base.

use std::path::PathBuf;

use lora_format::{Dtype, Shape};

/// One reason why the quantised tensors of a base cannot be read as weights.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages are the documentation")]
pub enum QuantisedProblem {
    /// A field of `config.json` has the wrong type or an impossible value.
    #[error("config.json: `{field}`: expected {expected}, found {found}")]
    Config { field: String, expected: &'static str, found: String },
    /// A tensor that another one needs is not in the base.
    #[error("`{tensor}`: the base has no `{missing}` to go with it")]
    Missing { tensor: String, missing: String },
    #[error("`{tensor}`: expected {expected}, found {found}")]
    Dtype { tensor: String, expected: String, found: Dtype },
    #[error("`{tensor}`: expected shape {expected}, found {found}")]
    Shape { tensor: String, expected: String, found: Shape },
    /// The data of a tensor that describes others makes no sense.
    #[error("`{tensor}`: expected {expected}, found {found}")]
    Value { tensor: String, expected: String, found: String },
    /// The configuration and the tensors disagree.
    #[error("`{tensor}`: config.json says {config}, the tensors say {tensors}")]
    Contradiction { tensor: String, config: String, tensors: String },
    #[error("`{tensor}`: {what} is not supported")]
    Unsupported { tensor: String, what: String },
    /// Two ways of storing the same parameter, or the parameter both ways.
    #[error("`{parameter}` is stored twice: as {first} and as {second}")]
    Twice { parameter: String, first: String, second: String },
    /// It looks quantised, and no scheme explains it.
    #[error("`{tensor}` ({dtype}): looks quantised, but belongs to no known way of quantising")]
    Unexplained { tensor: String, dtype: Dtype },
    #[error("config.json says that the base is quantised ({method}); no quantised weight is in it")]
    NothingQuantised { method: String },
    #[error("{}: {message}", path.display())]
    Unreadable { path: PathBuf, message: String },
}
