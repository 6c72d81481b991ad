//! The metadata of files that image programs read: sd-scripts' hashes and Stability's modelspec.
//!
//! A1111 and its descendants identify an adapter by `sshs_model_hash`, so a file whose tensors
//! changed must not keep the old one.
//!
//! ```text
//! sshs_model_hash        SHA-256 of the tensors' bytes, in storage order
//! sshs_legacy_hash       8 digits of the SHA-256 of bytes 0x100000..0x110000 of the file that has
//!                        the same tensors and of the metadata only what begins with `ss_`
//! modelspec.hash_sha256  "0x" and the SHA-256 of the tensors' bytes
//! ```
//!
//! (sd-scripts, `library/train_util.py`, `precalculate_safetensors_hashes`; ModelSpec 1.0.1.)

use std::path::Path;

use sha2::{Digest, Sha256};

use crate::container::safetensors::{SafetensorsFile, header_of};
use crate::error::Result;
use crate::io::atomic::{AtomicFile, Durability, Overwrite};
use crate::tensor::{self, Tensor};

/// sd-scripts' hash of the tensors.
pub const MODEL_HASH: &str = "sshs_model_hash";
/// Its older, short one.
pub const LEGACY_HASH: &str = "sshs_legacy_hash";
/// Stability's.
pub const SPEC_HASH: &str = "modelspec.hash_sha256";

/// Where the bytes that the legacy hash is of begin in the file.
const LEGACY_START: usize = 0x10_0000;
/// How many they are.
const LEGACY_BYTES: usize = 0x1_0000;

/// Writes the tensors of a file with other metadata, complete or not at all; the destination may be
/// the file itself. The hashes that the metadata has are brought in line.
///
/// # Errors
/// [`Error::OutputExists`](crate::Error::OutputExists), [`Error::Io`](crate::Error::Io).
pub fn rewrite(
    file: &SafetensorsFile,
    metadata: &[(String, String)],
    destination: &Path,
    overwrite: Overwrite,
    durability: Durability,
) -> Result<()> {
    let tensors = tensor::map_all(file)?;
    let mut metadata = metadata.to_vec();
    refresh(&mut metadata, &tensors);
    metadata.sort();
    let header = header_of(&metadata, &tensors);
    let mut parts: Vec<&[u8]> = vec![&header];
    parts.extend(tensors.iter().map(Tensor::bytes));
    let output = AtomicFile::create(destination, overwrite)?;
    output.write_parts(&parts)?;
    file.ensure_unchanged()?;
    output.commit(durability)
}

/// Brings the hashes that `metadata` has in line with the tensors, which are in storage order. It
/// gains sd-scripts' if it has other entries of sd-scripts.
pub(crate) fn refresh(metadata: &mut Vec<(String, String)>, tensors: &[Tensor]) {
    let has = |key: &str| metadata.iter().any(|entry| entry.0 == key);
    let trained = metadata.iter().any(|entry| entry.0.starts_with("ss_"));
    let (of_trainer, of_spec) = (trained || has(MODEL_HASH), has(SPEC_HASH));
    let mut fresh: Vec<(&str, String)> = Vec::new();
    if of_trainer || of_spec {
        let hash = data_hash(tensors);
        if of_spec {
            fresh.push((SPEC_HASH, format!("0x{hash}")));
        }
        if of_trainer {
            fresh.push((MODEL_HASH, hash));
        }
    }
    if trained || has(LEGACY_HASH) {
        fresh.push((LEGACY_HASH, legacy_hash(metadata, tensors)));
    }
    for (key, value) in fresh {
        match metadata.iter_mut().find(|entry| entry.0 == key) {
            Some(entry) => entry.1 = value,
            None => metadata.push((key.to_owned(), value)),
        }
    }
}

/// The SHA-256 of the tensors' bytes, one after the other.
pub fn data_hash(tensors: &[Tensor]) -> String {
    let mut digest = Sha256::new();
    tensors.iter().for_each(|tensor| digest.update(tensor.bytes()));
    hexadecimal(&digest.finalize())
}

/// sd-scripts' short hash of a file with these tensors and the `ss_` entries of this metadata.
pub fn legacy_hash(metadata: &[(String, String)], tensors: &[Tensor]) -> String {
    let mut kept: Vec<(String, String)> =
        metadata.iter().filter(|entry| entry.0.starts_with("ss_")).cloned().collect();
    kept.sort();
    let header = header_of(&kept, tensors);
    let mut digest = Sha256::new();
    let (mut at, end) = (0, LEGACY_START + LEGACY_BYTES);
    for bytes in std::iter::once(&header[..]).chain(tensors.iter().map(Tensor::bytes)) {
        let from = LEGACY_START.saturating_sub(at).min(bytes.len());
        let to = end.saturating_sub(at).min(bytes.len());
        digest.update(&bytes[from..to]);
        at += bytes.len();
    }
    hexadecimal(&digest.finalize())[..8].to_owned()
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
