//! Errors that say where: file, tensor or field, what was expected, what was found.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::container::torch::TorchProblem;
use crate::dtype::Dtype;

/// The result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Anything that can be wrong with a file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was tried, as a verb phrase that the path completes.
        action: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// A file is larger than its kind can be.
    #[error("{}: larger than the limit of {limit} bytes for a file of this kind", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The bound, in bytes.
        limit: u64,
    },
    /// Malformed JSON.
    #[error("{}: {}: {source}", path.display(), json_kind(source))]
    Json {
        /// The file.
        path: PathBuf,
        /// Line, column and cause.
        source: serde_json::Error,
    },
    /// The configuration inside a file of our own format is malformed.
    #[error("{}: the configuration in its metadata (`lora_format`): {source}", path.display())]
    Configuration {
        /// The file.
        path: PathBuf,
        /// What is wrong; line and column count within the configuration.
        source: serde_json::Error,
    },
    /// A malformed safetensors header.
    #[error("{}: not a valid safetensors file: {problem}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// Which rule is broken.
        problem: HeaderProblem,
    },
    /// A file that `torch.save` wrote, or that looks like one, cannot be read.
    #[error("{}: {problem}", path.display())]
    Torch {
        /// The file.
        path: PathBuf,
        /// Which rule is broken.
        problem: TorchProblem,
    },
    /// A malformed GGUF file.
    #[error("{}: not a valid GGUF file: {problem}", path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
        /// Which rule is broken.
        problem: GgufProblem,
    },
    /// What is missing or wrong in the base's `config.json`, which a conversion needs.
    #[error("{}: {problem}", path.display())]
    Base {
        /// The adapter.
        path: PathBuf,
        /// What is needed and what was found.
        problem: BaseProblem,
    },
    /// A malformed shard index.
    #[error("{}: {problem}", path.display())]
    Index {
        /// The index file.
        path: PathBuf,
        /// Which rule is broken.
        problem: IndexProblem,
    },
    /// A configuration field has the wrong type or value.
    #[error("{}: `{field}` must be {expected}, found {found}", path.display())]
    Config {
        /// The configuration file.
        path: PathBuf,
        /// The field.
        field: String,
        /// What it must be.
        expected: &'static str,
        /// What it is.
        found: String,
    },
    /// The file does not look like any format that is read here.
    #[error("{}: {problem}", path.display())]
    Unrecognised {
        /// The file or directory.
        path: PathBuf,
        /// What was looked for and what is there.
        problem: DetectProblem,
    },
    /// The adapter uses what this version does not implement; nothing was skipped.
    #[error("{}: {}", path.display(), list_unsupported(features))]
    Unsupported {
        /// The adapter.
        path: PathBuf,
        /// Every such feature.
        features: Vec<Unsupported>,
    },
    /// The adapter's tensors do not form components.
    #[error("{}: {}", path.display(), list("the adapter is malformed", problems))]
    Adapter {
        /// The adapter.
        path: PathBuf,
        /// Every problem found.
        problems: Vec<AdapterProblem>,
    },
    /// A pattern key cannot be evaluated safely.
    #[error("{}: {field}: the pattern {key:?} cannot be used: {problem}", path.display())]
    Pattern {
        /// The configuration file.
        path: PathBuf,
        /// `rank_pattern` or `alpha_pattern`.
        field: &'static str,
        /// The pattern.
        key: String,
        /// Why.
        problem: String,
    },
    /// An adapter without its configuration, and no alpha given instead.
    #[error(
        "{}: no adapter_config.json beside it and no alpha given: the scale alpha/rank is unknown",
        path.display()
    )]
    AlphaUnknown {
        /// The adapter's tensor file.
        path: PathBuf,
    },
    /// The user says something of an adapter that its format leaves no room for.
    #[error("{}: no {option} can be given for it: {reason}", path.display())]
    Meaningless {
        /// The adapter.
        path: PathBuf,
        /// What was given.
        option: &'static str,
        /// Why it has no meaning.
        reason: &'static str,
    },
    /// The file needs a newer reader.
    #[error("{}: format version {found}: this program reads versions 1.x", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: String,
    },
    /// [`interrupt`](crate::io::atomic::interrupt) was called.
    #[error("interrupted")]
    Interrupted,
    /// The output exists and may not be replaced.
    #[error("{}: already exists", path.display())]
    OutputExists {
        /// The destination.
        path: PathBuf,
    },
    /// Module names cannot be spelled as a format spells them.
    #[error("{}: {}", path.display(), list(&format!("no names of {format} for it"), problems))]
    Names {
        /// The adapter.
        path: PathBuf,
        /// The format that was asked for.
        format: &'static str,
        /// Every name that stands in the way.
        problems: Vec<String>,
    },
    /// The target format has no way to say what the adapter holds.
    #[error("{}: {format} cannot hold {what}", path.display())]
    Inexpressible {
        /// The adapter.
        path: PathBuf,
        /// The format that was asked for.
        format: &'static str,
        /// What would be lost.
        what: String,
    },
}

impl Error {
    /// The same of another file, where the reader of the one names the other.
    pub(crate) fn about(mut self, file: &Path) -> Error {
        if let Error::Unsupported { path, .. } = &mut self {
            *path = file.to_owned();
        }
        self
    }

    /// An [`Error::Config`].
    pub fn config(path: &Path, field: &str, expected: &'static str, found: &Value) -> Error {
        Error::Config {
            path: path.to_owned(),
            field: field.to_owned(),
            expected,
            found: match found {
                Value::Null => "nothing".to_owned(),
                value => crate::json::brief(value),
            },
        }
    }
}

/// Whether a document is malformed, or well-formed and not what was expected.
fn json_kind(error: &serde_json::Error) -> &'static str {
    if error.is_data() { "not what this file must hold" } else { "not valid JSON" }
}

/// Attaches a path and an action to an `io::Error`.
pub trait IoContext<T> {
    /// `action` is a verb phrase that the path completes: "open", "create a file in".
    fn at(self, path: &Path, action: &'static str) -> Result<T>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn at(self, path: &Path, action: &'static str) -> Result<T> {
        self.map_err(|source| Error::Io { path: path.to_owned(), action, source })
    }
}

/// A shape as messages print it: `[out, in]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape(pub Vec<usize>);

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

/// Which rule of the safetensors format a header breaks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages are the documentation")]
pub enum HeaderProblem {
    #[error("it is a Git LFS pointer, not the file that the pointer stands for")]
    LfsPointer,
    #[error("it is JSON text")]
    JsonText,
    #[error("the file has {file_bytes} bytes; the header length alone takes 8")]
    TooShort { file_bytes: u64 },
    #[error("the header length {header_bytes} is over the limit of {limit} bytes")]
    HeaderTooLong { header_bytes: u64, limit: u64 },
    #[error("the header says {header_bytes} bytes, the file has {file_bytes} in all (truncated?)")]
    HeaderBeyondFile { header_bytes: u64, file_bytes: u64 },
    #[error("the header does not begin with `{{`")]
    NotAnObject,
    #[error("the header is not UTF-8 (at byte {at})")]
    NotUtf8 { at: usize },
    #[error("the header is not the JSON it must be: {message}")]
    Json { message: String },
    #[error("the tensor `{tensor}` appears twice")]
    DuplicateTensor { tensor: String },
    #[error("`__metadata__` appears twice")]
    DuplicateMetadata,
    #[error("the metadata key `{key}` appears twice")]
    DuplicateMetadataKey { key: String },
    #[error("tensor `{tensor}`: unknown dtype `{dtype}`")]
    UnknownDtype { tensor: String, dtype: String },
    #[error("tensor `{tensor}`: shape {shape} is too large to count its bytes")]
    ShapeOverflow { tensor: String, shape: Shape },
    #[error("tensor `{tensor}`: offsets end before they begin ({start} > {end})")]
    OffsetsReversed { tensor: String, start: u64, end: u64 },
    #[error("tensor `{tensor}`: {dtype} {shape} takes {expected} bytes, its offsets span {found}")]
    SizeMismatch { tensor: String, dtype: Dtype, shape: Shape, expected: u64, found: u64 },
    #[error(
        "tensor `{tensor}`: ends at byte {end} of the data, the file has {data_bytes} (truncated?)"
    )]
    OutOfRange { tensor: String, end: u64, data_bytes: u64 },
    #[error("tensors `{first}` and `{second}` overlap")]
    Overlap { first: String, second: String },
    #[error("{bytes} bytes before tensor `{tensor}` belong to no tensor")]
    Hole { tensor: String, bytes: u64 },
    #[error("{bytes} bytes after the last tensor belong to no tensor")]
    TrailingBytes { bytes: u64 },
    #[error("{found} {what}, the limit is {limit}")]
    OverLimit { what: &'static str, found: usize, limit: usize },
}

/// Which rule of the GGUF format a file breaks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages are the documentation")]
pub enum GgufProblem {
    #[error("it does not begin with `GGUF`")]
    NotGguf,
    #[error("big-endian files are not read")]
    BigEndian,
    #[error("version {found}; versions 2 and 3 are read")]
    Version { found: u32 },
    #[error("the file ends within {what}, after {file_bytes} bytes (truncated?)")]
    Truncated { what: &'static str, file_bytes: u64 },
    #[error("{found} {what}, the limit is {limit}")]
    OverLimit { what: &'static str, found: u64, limit: u64 },
    #[error("{what} is not UTF-8")]
    NotUtf8 { what: &'static str },
    #[error("the key `{key}` appears twice")]
    DuplicateKey { key: String },
    #[error("`{key}`: a value of unknown type {found}")]
    ValueType { key: String, found: u32 },
    #[error("`{key}`: a bool of value {found}")]
    Bool { key: String, found: u8 },
    #[error("`{key}`: an array of arrays")]
    NestedArray { key: String },
    #[error("`{key}` must be {expected}, found {found}")]
    Value { key: String, expected: &'static str, found: String },
    #[error("`general.alignment` must be a power of two, found {found}")]
    Alignment { found: String },
    #[error("the tensor `{tensor}` appears twice")]
    DuplicateTensor { tensor: String },
    #[error("tensor `{tensor}`: unknown type {found}")]
    TensorType { tensor: String, found: u32 },
    #[error("tensor `{tensor}`: {dimensions:?} of {kind} is no whole number of bytes")]
    Dimensions { tensor: String, kind: String, dimensions: Vec<u64> },
    #[error("tensor `{tensor}`: offset {offset} is not a multiple of the alignment {alignment}")]
    Misaligned { tensor: String, offset: u64, alignment: u64 },
    #[error(
        "tensor `{tensor}`: {bytes} bytes from offset {offset} of the data are beyond the file's \
         {file_bytes} (truncated?)"
    )]
    OutOfRange { tensor: String, offset: u64, bytes: u64, file_bytes: u64 },
    #[error("tensors `{first}` and `{second}` overlap")]
    Overlap { first: String, second: String },
}

/// What a conversion needs to know of the base and does not.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages are the documentation")]
pub enum BaseProblem {
    #[error("the base's config.json is needed: {reason}")]
    Missing { reason: String },
    #[error("the base's config.json: `{field}` must be {expected}, found {found}")]
    Field { field: &'static str, expected: &'static str, found: String },
    #[error("{format} names for the architecture `{architecture}` are not known")]
    Architecture { format: &'static str, architecture: String },
    #[error(
        "the adapter is for the architecture `{adapter}`, the base's config.json is of `{base}`"
    )]
    Disagrees { adapter: String, base: String },
    #[error("`{module}`: {rows} rows of B do not divide into {heads} heads of even size")]
    Heads { module: String, rows: usize, heads: usize },
}

/// Which rule a `model.safetensors.index.json` breaks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages are the documentation")]
pub enum IndexProblem {
    #[error("the index names the shard `{shard}`, which is missing")]
    MissingShard { shard: String },
    #[error("the shard `{shard}` is not a plain file name inside the index's directory: refused")]
    OutsideDirectory { shard: String },
    #[error("the index places tensor `{tensor}` in `{shard}`, which does not hold it")]
    MissingTensor { tensor: String, shard: String },
    #[error("the index names no tensors")]
    Empty,
    #[error("the index names {found} shards, the limit is {limit}")]
    TooManyShards { found: usize, limit: usize },
    #[error("the index names {found} tensors, the limit is {limit}")]
    TooManyTensors { found: usize, limit: usize },
    #[error(
        "the tensor `{tensor}` is in both {first} and {second}, and the index does not say which \
         is meant"
    )]
    Twice { tensor: String, first: String, second: String },
}

/// Why a path could not be opened as an adapter or a model.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages are the documentation")]
pub enum DetectProblem {
    #[error("no such file or directory")]
    NotFound,
    #[error(
        "the directory holds no model: looked for model.safetensors, \
         model.safetensors.index.json and a single *.safetensors file"
    )]
    NoModel,
    #[error(
        "the directory holds several safetensors files and no index: {}", files.join(", ")
    )]
    SeveralModels { files: Vec<String> },
    #[error(
        "the directory holds only {file}, one shard of several, and no \
         model.safetensors.index.json: the model is incomplete"
    )]
    OneOfSeveral { file: String },
    #[error(
        "the directory holds no adapter: looked for adapter_model.safetensors and adapter_model.bin"
    )]
    NoAdapter,
    #[error(
        "the directory holds no adapter_model.safetensors, but {} {}", names.join(", "),
        if names.len() == 1 { "does" } else { "do" }
    )]
    AdaptersInside { names: Vec<String> },
    #[error(
        "the directory holds only {file}: pickled checkpoints are not read yet; \
         save it as safetensors"
    )]
    PickleOnly { file: String },
    #[error("a {suffix} file: only safetensors files are read yet")]
    OtherContainer { suffix: String },
    #[error(
        "no adapter tensors in it: none of its {tensors} tensors is named \
         `….lora_A.weight` or `….lora_B.weight`{}",
        example(first)
    )]
    NotAnAdapter { tensors: usize, first: Option<String> },
}

fn example(first: &Option<String>) -> String {
    first.as_ref().map_or_else(String::new, |name| format!(" (the first is `{name}`)"))
}

/// A feature that is recognised but not implemented.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unsupported {
    /// The configuration field with its value, or the tensor name.
    pub feature: String,
    /// What it is and why it cannot be skipped.
    pub reason: String,
}

impl fmt::Display for Unsupported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.feature, self.reason)
    }
}

/// Why an adapter's tensors do not form a component.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages are the documentation")]
pub enum AdapterProblem {
    #[error("`{present}` has no partner `{missing}`")]
    MissingFactor { present: String, missing: String },
    #[error("`{tensor}`: dtype {dtype}; a factor must be F32, F16 or BF16")]
    FactorDtype { tensor: String, dtype: Dtype },
    #[error("`{tensor}`: shape {shape}; {expected}")]
    FactorShape { tensor: String, shape: Shape, expected: &'static str },
    #[error("`{module}`: A {a} and B {b} do not agree on the rank")]
    RankMismatch { module: String, a: Shape, b: Shape },
    #[error("`{module}`: rank {rank} is not between 1 and {limit}")]
    RankRange { module: String, rank: usize, limit: usize },
    #[error("`{module}`: the scale {scale} is not a finite number")]
    Scale { module: String, scale: f64 },
    #[error("`{module}`: scale times rank is {value:e}, more than an F32 `.alpha` tensor can hold")]
    AlphaRange { module: String, value: f64 },
    #[error("`{tensor}`: {dtype} {shape}; it must be an F32 scalar, of shape []")]
    AlphaTensor { tensor: String, dtype: Dtype, shape: Shape },
    #[error("`{module}`: the tensor `{tensor}` holds {stored}, the configuration gives {expected}")]
    AlphaMismatch { module: String, tensor: String, stored: f32, expected: f32 },
    #[error("`{tensor}`: {dtype} {shape}; it must be one number")]
    Scalar { tensor: String, dtype: Dtype, shape: Shape },
    #[error("`{tensor}` is missing; every pair of factors has an `.alpha` beside it")]
    MissingTensor { tensor: String },
    #[error("the configuration names the module `{module}`, which has no tensors")]
    MissingModule { module: String },
    #[error("two tensors mean the same factor: `{first}` and `{second}`")]
    DuplicateFactor { first: String, second: String },
    #[error(
        "`{module}`: several alpha_pattern keys match with different values, and its rank shows \
         that the keys were reordered after training (PEFT sorts them when it saves): which alpha \
         was trained with cannot be known"
    )]
    PatternOrder { module: String },
    #[error("`{tensor}` belongs to no component")]
    UnusedTensor { tensor: String },
    #[error("`{first}` and `{second}` should be equal and are not")]
    CopiesDiffer { first: String, second: String },
    #[error(
        "`{module}`: A has {rows} rows, not a multiple of the rank {configured} that the \
         configuration gives its parameter"
    )]
    ExpertRank { module: String, configured: usize, rows: usize },
    #[error("`{module}`: the configuration says rank {configured}, the tensors have rank {stored}")]
    ConfiguredRank { module: String, configured: usize, stored: usize },
    #[error(
        "`{module}`: the factors of {stored} fused groups, and the {enabled} that enable_lora \
         names do not fit them"
    )]
    Groups { module: String, stored: usize, enabled: usize },
    #[error(transparent)]
    Expansion(#[from] ExpansionLimit),
    #[error("`{tensor}`: dtype {dtype}; indices must be I32 or I64")]
    IndexDtype { tensor: String, dtype: Dtype },
    #[error("`{module}`: its two products are {one} and {other}, and should be alike")]
    ProductsDiffer { module: String, one: Shape, other: Shape },
    #[error("`{tensor}` has {rows} rows, and the configuration gives it {indices} tokens")]
    TokenCount { tensor: String, rows: usize, indices: usize },
    #[error("`{tensor}`: the configuration does not say which tokens it holds")]
    NoTokens { tensor: String },
    #[error("`{tensor}`: the configuration's token tables {first:?} and {second:?} both fit it")]
    ContestedTokens { tensor: String, first: String, second: String },
    #[error(
        "`{tensor}`: the indices of rows must be I64, ascending, none twice or negative, and as \
         many as there are rows"
    )]
    RowIndices { tensor: String },
    #[error("`{tensor}`: {dtype} {shape}; it must be an F64 scalar, of shape []")]
    ScaleTensor { tensor: String, dtype: Dtype, shape: Shape },
    #[error(
        "`{tensor}`: a name that other loaders do not know, for factors that they can apply: plain \
         factors are named `.lora_A.weight` and `.lora_B.weight`"
    )]
    NeedlessName { tensor: String },
    #[error("`{parameter}`: the tensors {roles} do not make up a change of the form {form}")]
    FormRoles { parameter: String, form: &'static str, roles: String },
    #[error("`{tensor}`: shape {found}; beside the form's other tensors it must be {expected}")]
    FormShape { tensor: String, found: Shape, expected: &'static str },
    #[error("`{parameter}`: {candidates} candidates for the parameters that its name lists")]
    Candidates { parameter: String, candidates: usize },
    #[error("`{parameter}`: the configuration has no {what}")]
    NoFacts { parameter: String, what: &'static str },
    #[error("`{parameter}`: the radius {radius} is not a finite number of at least 0")]
    Radius { parameter: String, radius: f64 },
    #[error("`{name}` is both a parameter of the model and a module with a `weight`")]
    ShortName { name: String },
    #[error("`{parameter}`: {first} and {second} cannot both act on it")]
    Clash { parameter: String, first: &'static str, second: &'static str },
}

/// A factor that is stored without its zeros would take too much memory with them
/// ([`limits::EXPANSION_BYTES`](crate::limits::EXPANSION_BYTES)).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{tensor}` is stored without its zeros and would take {bytes} bytes with them{}; the limit \
     for an adapter of this size is {limit}",
    after(*taken)
)]
pub struct ExpansionLimit {
    /// The factor, as it is named in the file.
    pub tensor: String,
    /// What it would take.
    pub bytes: u64,
    /// What the adapter's other factors took before.
    pub taken: u64,
    /// What all may take together.
    pub limit: u64,
}

fn after(taken: u64) -> String {
    if taken == 0 { String::new() } else { format!(", after {taken} for others") }
}

/// Why factors that are stored without their zeros cannot be written out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ExpansionProblem {
    /// The shapes are not those of such factors.
    #[error("the shapes are not those of such factors")]
    Shape,
    /// They would take too much memory.
    #[error(transparent)]
    TooLarge(#[from] ExpansionLimit),
}

fn list_unsupported(features: &[Unsupported]) -> String {
    list("the adapter uses what this version does not implement", features)
}

/// One problem inline, several as a list; long lists end with their number.
fn list<T: fmt::Display>(heading: &str, items: &[T]) -> String {
    const SHOWN: usize = 20;
    if let [only] = items {
        return format!("{heading}: {only}");
    }
    let mut text = format!("{heading}, in {} places:", items.len());
    for item in items.iter().take(SHOWN) {
        text.push_str("\n  - ");
        text.push_str(&item.to_string());
    }
    if items.len() > SHOWN {
        text.push_str(&format!("\n  - and {} more", items.len() - SHOWN));
    }
    text
}
