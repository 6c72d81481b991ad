//! Why a merge cannot be planned or finished.

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;

use lora_format::naming::NamingProblem;
use lora_format::{Dtype, Shape};

use crate::names::numberless;
use crate::pair::PairProblem;
use crate::quantised::QuantisedProblem;

/// The result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Anything that stops a merge. Nothing has been left behind when one is returned.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read or written.
    #[error(transparent)]
    Format(#[from] lora_format::Error),
    /// The adapter does not fit the base; no byte was written.
    #[error("{}", list(adapters, base, problems))]
    Plan {
        /// The adapters.
        adapters: Vec<PathBuf>,
        /// The base model.
        base: PathBuf,
        /// Every problem found, in the adapter's order.
        problems: Vec<PlanProblem>,
    },
    /// The base is not the one the adapter was trained on.
    #[error(
        "{}: not the base that {} was trained on: {equal} of {compared} sampled values agree, the \
         first that differ are in `{first}`", base.display(), adapter.display()
    )]
    DifferentBase {
        /// The adapter.
        adapter: PathBuf,
        /// The base model in hand.
        base: PathBuf,
        /// Samples that agree.
        equal: usize,
        /// Samples compared.
        compared: usize,
        /// The first target that differs.
        first: String,
    },
    /// The adapter holds NaN or infinities.
    #[error(
        "{}: tensor `{tensor}` holds {count} values that are NaN or infinite, the first at \
         element {first}", adapter.display()
    )]
    NonFinite {
        /// The adapter.
        adapter: PathBuf,
        /// Its tensor.
        tensor: String,
        /// How many.
        count: usize,
        /// Flat index of the first.
        first: usize,
    },
    /// A weight that DoRA scales to a length has none.
    #[error(
        "the weights of output feature {feature} are all zero, and `{tensor}` scales them to a \
         length"
    )]
    ZeroNorm {
        /// The adapter's magnitudes.
        tensor: String,
        /// The output feature.
        feature: usize,
    },
    /// A vector that is only a direction has none.
    #[error("column {column} of `{tensor}` is zero, or a sum of those before it")]
    NoDirection {
        /// The adapter's vectors.
        tensor: String,
        /// The column.
        column: usize,
    },
    /// A finite value does not fit the output's dtype.
    #[error(
        "tensor `{tensor}`: at least {count} finite values become infinite in {dtype}, whose \
         largest is {}", largest(*dtype)
    )]
    Overflow {
        /// The base's tensor.
        tensor: String,
        /// How many, in the tile where it was noticed.
        count: u64,
        /// The output's dtype.
        dtype: Dtype,
    },
    /// The file system has too little room.
    #[error(
        "{}: the output needs {} and {} are free", directory.display(), Bytes(*needed),
        Bytes(*free)
    )]
    NoSpace {
        /// Where the output would go.
        directory: PathBuf,
        /// Bytes the output takes.
        needed: u64,
        /// Bytes available.
        free: u64,
    },
    /// The directory that the output would go into is not there.
    #[error("{}: no such directory", path.display())]
    NoDirectory {
        /// The directory.
        path: PathBuf,
    },
    /// The output path is, holds or lies in an input.
    #[error("{}: the output would replace or change the input {}", output.display(), input.display())]
    OutputIsInput {
        /// The output.
        output: PathBuf,
        /// The input.
        input: PathBuf,
    },
    /// `--force` was given, but what stands there is not what a merge wrote.
    #[error("{}: not replaced: {reason}", path.display())]
    NotReplaceable {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The adapter's tokenizer was asked for, and there is none.
    #[error("{}: no tokenizer and no chat template comes with it", paths(adapters))]
    NoTokenizer {
        /// The adapters.
        adapters: Vec<PathBuf>,
    },
    /// Two adapters bring different tokenizers.
    #[error("{} and {} bring different tokenizers", first.display(), second.display())]
    TokenizersDiffer {
        /// The first adapter's directory.
        first: PathBuf,
        /// The other's.
        second: PathBuf,
    },
    /// Shards were asked for where the output is one file.
    #[error("a single file cannot be sharded; give a directory as the base")]
    ShardsNeedDirectory,
    /// A tensor of an adapter was not used, or used more than once: a fault of this program.
    #[error(
        "{}: {used} of {elements} elements of tensor `{tensor}` were used: a fault of this \
         program; nothing was written", adapter.display()
    )]
    Unconsumed {
        /// The adapter.
        adapter: PathBuf,
        /// Its tensor.
        tensor: String,
        /// Elements that were used.
        used: u64,
        /// Elements that it has.
        elements: u64,
    },
    /// A changed tensor was not made as a whole: a fault of this program.
    #[error(
        "{written} of {elements} elements of `{tensor}` were made: a fault of this program; nothing \
         was written"
    )]
    Unwritten {
        /// The output's tensor.
        tensor: String,
        /// Elements that were made.
        written: u64,
        /// Elements that it has.
        elements: u64,
    },
    /// Two checkpoints cannot be compared.
    #[error("{} and {}: {problem}", base.display(), tuned.display())]
    Pair {
        /// The base model.
        base: PathBuf,
        /// The fine-tuned one.
        tuned: PathBuf,
        /// Why.
        problem: Box<PairProblem>,
    },
    /// The user interrupted the merge.
    #[error("interrupted")]
    Interrupted,
    /// An extraction cannot be done.
    #[error(transparent)]
    Extract(#[from] crate::extract::ExtractError),
    /// Threads could not be started.
    #[error("threads could not be started: {source}")]
    Threads {
        /// What the system said.
        source: rayon::ThreadPoolBuildError,
    },
}

/// One reason why an adapter does not fit a base.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages are the documentation")]
pub enum PlanProblem {
    #[error(
        "`{}`: the base has no such parameter{}",
        parameter_text(module, parameter),
        nearest_text(nearest)
    )]
    Unresolved { module: String, parameter: String, nearest: Vec<String> },
    #[error(transparent)]
    Naming(#[from] NamingProblem),
    #[error("`{module}`: {}", tied_text(embedding, head))]
    Tied { module: String, embedding: String, head: Option<String> },
    #[error(
        "`{embedding}`: untied, it would be the input embedding alone, and what its output head \
         is called in a model of this kind is not known"
    )]
    NamelessHead { embedding: String },
    #[error(
        "`{parameter}`: the adapter brings a copy of it as it was when training began, and the \
         base's values are others"
    )]
    OtherCopy { parameter: String },
    #[error(
        "`{parameter}`: the adapter brings {brought} in its place, the base has {stored}: only a \
         vocabulary or a head may have another number of rows"
    )]
    Replacement { parameter: String, stored: Shape, brought: Shape },
    #[error("`{parameter}`: {reason}")]
    Conflict { parameter: String, reason: String },
    #[error("`{module}`: {problem}")]
    Experts { module: String, problem: String },
    #[error("`{module}`: {open}; say how it is laid out with --moe-layout: {layouts}")]
    ExpertLayout { module: String, open: String, layouts: String },
    #[error("`{parameter}`: {}", irreversible_text(method))]
    Irreversible { parameter: String, method: &'static str },
    #[error("`{parameter}`: {problem}")]
    Form { parameter: String, problem: String },
    #[error("`{parameter}`: stored as {dtype} or quantised, so its values cannot be sampled")]
    Unsampled { parameter: String, dtype: Dtype },
    #[error(
        "`{parameter}`: the adapter has factors for some groups of its rows, and no file says for \
         which"
    )]
    Groups { parameter: String },
    #[error("`{parameter}`: stored twice, once quantised")]
    StoredTwice { parameter: String },
    #[error(transparent)]
    Quantised(#[from] QuantisedProblem),
    #[error(
        "`{parameter}` has {rows} rows and `{resized}` will have {new}: embedding and head must \
         grow together"
    )]
    Vocabulary { parameter: String, rows: usize, resized: String, new: usize },
    #[error("`{module}`: fits several parameters of the base: {}", candidates.join(", "))]
    Ambiguous { module: String, candidates: Vec<String> },
    #[error("`{first}` and `{second}` both resolve to `{parameter}`")]
    Collision { first: String, second: String, parameter: String },
    #[error(
        "`{parameter}`: the base stores {shape}, the adapter's change is {} × {}: {cause}",
        features_text(*out_features), features_text(*in_features)
    )]
    Shape {
        parameter: String,
        shape: Shape,
        out_features: Option<usize>,
        in_features: Option<usize>,
        cause: ShapeCause,
    },
    #[error("`{parameter}`: the base stores it as {dtype}; only F32, F16 and BF16 are merged into")]
    Dtype { parameter: String, dtype: Dtype },
    #[error(
        "`{parameter}` is square, and whether it is stored as (out, in) or (in, out) is contradictory: {evidence}"
    )]
    Orientation { parameter: String, evidence: String },
}

/// What most likely explains a shape that does not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShapeCause {
    /// Only the vocabulary dimension differs.
    ResizedVocabulary,
    /// The parameter is not a matrix.
    NotAMatrix,
    /// Neither orientation fits.
    WrongBase,
}

impl fmt::Display for ShapeCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ShapeCause::ResizedVocabulary => {
                "one dimension fits and the other does not: was the vocabulary resized for \
                 training?"
            }
            ShapeCause::NotAMatrix => {
                "the parameter is not a matrix, and the change is one of a linear layer"
            }
            ShapeCause::WrongBase => {
                "neither this shape nor its transpose fits: is this the model that the adapter \
                 was trained on?"
            }
        })
    }
}

fn nearest_text(nearest: &[String]) -> String {
    if nearest.is_empty() {
        return String::new();
    }
    format!("; nearest: {}", nearest.join(", "))
}

/// A module's weight is what every adapter means; other parameters are named.
fn parameter_text(module: &str, parameter: &str) -> String {
    if parameter == "weight" { module.to_owned() } else { format!("{module}.{parameter}") }
}

fn tied_text(embedding: &str, head: &Option<String>) -> String {
    let stored = match head {
        Some(head) => format!("`{head}` and `{embedding}` are two copies of it"),
        None => format!("`{embedding}` is the only copy"),
    };
    format!(
        "the base ties its output head to its input embedding ({stored}), so a change of one \
         would change the other"
    )
}

fn irreversible_text(method: &str) -> String {
    match method {
        "replaced" | "token rows" => {
            "the adapter replaced it, and the merged model no longer has what was there before"
                .to_owned()
        }
        method => format!("{method} depends on the weight as it was before the merge"),
    }
}

fn features_text(features: Option<usize>) -> String {
    features.map_or_else(|| "any".to_owned(), |features| features.to_string())
}

fn paths(paths: &[PathBuf]) -> String {
    let names: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
    names.join(" and ")
}

/// Problems that differ only in their numbers (of layers, of experts) are shown once and counted.
fn list(adapters: &[PathBuf], base: &std::path::Path, problems: &[PlanProblem]) -> String {
    const SHOWN: usize = 100;
    let verb = if adapters.len() == 1 { "does" } else { "do" };
    let text = format!("{} {verb} not fit {}:", paths(adapters), base.display());
    if let [only] = problems {
        return format!("{text} {only}");
    }
    let mut groups: Vec<(String, usize)> = Vec::new();
    let mut known: HashMap<String, usize> = HashMap::new();
    for problem in problems {
        let group = *known.entry(problem.kind()).or_insert_with(|| {
            groups.push((problem.to_string(), 0));
            groups.len() - 1
        });
        groups[group].1 += 1;
    }
    let mut lines = vec![format!("{text} {} problems", problems.len())];
    for (problem, count) in groups.iter().take(SHOWN) {
        let more = match count {
            1 => String::new(),
            count => format!(" (and {} more like it: --json lists all)", count - 1),
        };
        lines.push(format!("  - {problem}{more}"));
    }
    if groups.len() > SHOWN {
        lines.push(format!("  - and {} more kinds", groups.len() - SHOWN));
    }
    lines.join("\n")
}

impl PlanProblem {
    /// What problems have in common that are alike but for the layer: the name concerned without
    /// its numbers, and the rest of the text without the names that are only suggested.
    fn kind(&self) -> String {
        let text = self.to_string();
        let text = text.split("; nearest: ").next().unwrap_or_default();
        numberless(text)
    }
}

fn largest(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F16 => "65504",
        _ => "about 3.4e38",
    }
}

/// A number of bytes as messages print it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(&str, u64); 3] = [("GB", 1_000_000_000), ("MB", 1_000_000), ("kB", 1_000)];
        for (unit, size) in UNITS {
            if self.0 >= size {
                return write!(f, "{:.2} {unit}", self.0 as f64 / size as f64);
            }
        }
        write!(f, "{} B", self.0)
    }
}
