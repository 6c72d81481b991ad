//! Every bound on untrusted input, in one place.
//!
//! Each limit is far above what real models need and far below what would exhaust a machine;
//! exceeding one is an error that names it.

/// Bytes of a safetensors header: the safetensors specification's own limit.
pub const HEADER_BYTES: u64 = 100_000_000;
/// Tensors in one safetensors file.
pub const TENSORS: usize = 1_000_000;
/// Bytes of a tensor name.
pub const NAME_BYTES: usize = 16 * 1024;
/// Dimensions of a tensor.
pub const DIMENSIONS: usize = 16;
/// Entries of `__metadata__`.
pub const METADATA_ENTRIES: usize = 100_000;
/// Bytes of an `adapter_config.json`, a `config.json` or the configuration of our own format.
pub const CONFIG_BYTES: u64 = 32 * 1024 * 1024;
/// Bytes of a `model.safetensors.index.json`.
pub const INDEX_BYTES: u64 = HEADER_BYTES;
/// Shards that one index may name.
pub const SHARDS: usize = 10_000;
/// Keys of a `rank_pattern` or `alpha_pattern`.
pub const PATTERN_KEYS: usize = 100_000;
/// Keys among those that are true regular expressions rather than names.
pub const PATTERN_REGEXES: usize = 256;
/// Bytes of one pattern key.
pub const PATTERN_BYTES: usize = 4 * 1024;
/// Keys of one table that may look around, and so backtrack.
pub const PATTERN_LOOK_AROUNDS: usize = 16;
/// Steps that a backtracking pattern may take on one name before it is refused.
pub const PATTERN_STEPS: usize = 10_000;
/// Steps that all backtracking patterns of one table may take together, a step on a long name
/// counting as several.
pub const PATTERN_TOTAL_STEPS: u64 = 50_000_000;
/// Matches of other patterns that one table may try, a long name counting as several.
pub const PATTERN_MATCHES: u64 = 20_000_000;
/// The largest rank of a component.
pub const RANK: usize = 65_536;
/// Blocks of a block-diagonal factor that is stored without its zeros.
pub const BLOCKS: usize = 256;
/// Bytes that the factors of one adapter which are stored without their zeros may take together
/// once the zeros are written out. The largest adapters in use stay below: loralib's rank 64 on
/// the fused projections of GPT-2 XL takes 0.2 GB, BD-LoRA's on a model of 8 billion parameters
/// 0.4 GB.
pub const EXPANSION_BYTES: u64 = 1024 * 1024 * 1024;
/// The same as a multiple of the bytes that the adapter stores, if that is less: a convolution of
/// k × k takes up to k², with k up to 8.
pub const EXPANSION_FACTOR: u64 = 64;
/// Bytes of the pickle of a `torch.save` file; the storages lie outside it. A checkpoint of a
/// thousand tensors has a tenth of a megabyte.
pub const PICKLE_BYTES: usize = 32 * 1024 * 1024;
/// Instructions of a pickle. A tensor takes some 35; each holds less than 100 bytes of memory.
pub const PICKLE_INSTRUCTIONS: usize = 8_000_000;
/// Values of a pickle that may be begun inside one another. Python's own pickler stops at about
/// 1000.
pub const PICKLE_DEPTH: usize = 1000;
/// Dicts inside one another whose tensors are named.
pub const NESTING: usize = 64;
/// Parameters inside one another.
pub const PARAMETER_DEPTH: usize = 4;
/// Bytes of the module, or of the name in it, of a global that a pickle names.
pub const GLOBAL_BYTES: usize = 1024;
/// Parts and bytes of text of one value that lies beside the tensors of a pickle. What has more is
/// kept by name alone.
pub const PLAIN_VALUE: usize = 100_000;
/// The same of all such values of a file together.
pub const PLAIN_VALUES: usize = 2_000_000;
/// Entries of a zip archive: a tensor and a little more.
pub const ARCHIVE_ENTRIES: usize = TENSORS + 1000;
/// Bytes of the tensors of a `torch.save` file whose elements do not lie in order, once they do, as
/// a multiple of the file's: a transposed view takes what its storage does, an expanded one more.
pub const VIEW_COPY_FACTOR: u64 = 4;
/// Dimensions of a tensor of a GGUF file: ggml's own limit.
pub const GGUF_DIMENSIONS: usize = 4;
/// Bytes of one string value of a GGUF file; a tokenizer's template is the longest in use.
pub const GGUF_STRING_BYTES: usize = 16 * 1024 * 1024;
/// Elements of one array value of a GGUF file; a vocabulary has under a million.
pub const GGUF_ARRAY_ELEMENTS: usize = 16 * 1024 * 1024;
/// Layers and experts that a name may count.
pub const NAMED_INDEX: usize = 100_000;
