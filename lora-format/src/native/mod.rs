//! Our own format: one self-contained safetensors file (`docs/FORMAT.md`).
//!
//! The tensors bear the names that today's loaders know, with an `.alpha` beside each pair of
//! factors, so that a loader which knows nothing of this format computes the right delta or finds
//! nothing to load. Everything else is one JSON document in the file's metadata.

mod config;
mod reader;
mod writer;

pub use reader::{DigestVerdict, is_native, read, verify_digest};
pub use writer::{FORMAT, encode, write};

/// The metadata key that holds the configuration.
pub const CONFIG_KEY: &str = "lora_format";
/// The version this program writes.
pub const VERSION: &str = "1.0-draft";
/// The features a reader of this version knows; a file that requires another is refused.
pub const FEATURES: [&str; 1] = ["low-rank"];

/// Suffixes of the tensors of a plain low-rank component.
pub(crate) const A_SUFFIX: &str = ".lora_A.weight";
pub(crate) const B_SUFFIX: &str = ".lora_B.weight";
pub(crate) const ALPHA_SUFFIX: &str = ".alpha";
