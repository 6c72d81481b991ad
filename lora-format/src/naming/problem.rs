//! Why a name has no one meaning.

use super::Part;

/// Why a name could not be resolved, or a base not linked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages are the documentation")]
pub enum NamingProblem {
    #[error("`{name}` is the name of no module")]
    Unknown { name: String },
    #[error("`{name}` can mean any of {}", candidates.join(", "))]
    Ambiguous { name: String, candidates: Vec<String> },
    #[error("the base does not have the component {part:?}")]
    NoPart { part: Part },
    #[error("the base has the component {part:?} in {found} layouts at once")]
    SeveralLayouts { part: Part, found: usize },
    #[error("the base does not have `{parameter}`")]
    NoParameter { parameter: String },
    #[error("the base fits several architectures: {}", candidates.join(", "))]
    SeveralArchitectures { candidates: Vec<String> },
}
