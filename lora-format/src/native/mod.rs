//! Our own format: one self-contained safetensors file (`docs/FORMAT.md`).
//!
//! The factors of plain LoRA bear the names that today's loaders know, with an `.alpha` beside each
//! pair, so that a loader which knows nothing of this format computes the right delta. What such a
//! loader would apply wrongly bears names that it does not know. Everything else is one JSON
//! document in the file's metadata.

mod components;
mod config;
mod forms;
mod reader;
mod shapes;
mod validate;
mod writer;

pub use reader::{DigestVerdict, is_native, read, verify_digest};
pub use writer::{FORMAT, check, encode, write};

/// The metadata key that holds the configuration.
pub const CONFIG_KEY: &str = "lora_format";
/// The version this program writes.
pub const VERSION: &str = "1.0";
/// The features a reader of this version knows, sorted; a file that requires another is refused.
pub const FEATURES: [&str; 26] = [
    "add",
    "base",
    "bounded",
    "butterfly",
    "circulant",
    "convolution",
    "embedding",
    "experts",
    "gain",
    "grid",
    "hadamard",
    "in-magnitude",
    "kronecker",
    "low-rank",
    "magnitude",
    "merged",
    "proportional",
    "rank-gain",
    "reflections",
    "replace",
    "replace-rows",
    "rotation",
    "shared",
    "sparse",
    "tiled",
    "tucker",
];
