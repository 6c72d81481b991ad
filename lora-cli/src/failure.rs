//! How a command can end, and the hint that gets the user going again.

use std::io;

use lora_format::{
    BaseProblem, DetectProblem, Dtype, Error as FormatError, HeaderProblem, IndexProblem,
};
use lora_merge::budget::BudgetError;
use lora_merge::extract::ExtractError;
use lora_merge::{Error as MergeError, PlanProblem};
use serde::Serialize;

/// How a command ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It did what it was asked.
    Done,
    /// It did, and what it was asked to look for is there.
    Finding,
}

/// How a command ended badly.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Something is wrong.
    Error {
        /// What and where.
        message: String,
        /// What to do about it.
        hint: Option<String>,
        /// Every problem by itself, where the message counts those that are alike.
        problems: Vec<String>,
    },
    /// The user stopped it.
    Interrupted,
    /// The reader of our output went away.
    ClosedPipe,
}

/// An error as `--json` prints it.
#[derive(Debug, Serialize)]
pub(crate) struct ErrorReport<'a> {
    schema: &'static str,
    error: &'a str,
    hint: Option<&'a str>,
    problems: &'a [String],
}

impl<'a> ErrorReport<'a> {
    pub(crate) fn new(
        error: &'a str,
        hint: Option<&'a str>,
        problems: &'a [String],
    ) -> ErrorReport<'a> {
        ErrorReport { schema: "lora-cli/error/1", error, hint, problems }
    }
}

impl Failure {
    /// A failure without a hint of its own.
    pub(crate) fn new(message: impl Into<String>, hint: Option<&str>) -> Failure {
        let hint = hint.map(str::to_owned);
        Failure::Error { message: message.into(), hint, problems: Vec::new() }
    }

    /// What writing to stdout met.
    pub(crate) fn from_stdout(error: io::Error) -> Failure {
        if error.kind() == io::ErrorKind::BrokenPipe {
            return Failure::ClosedPipe;
        }
        Failure::new(format!("cannot write to stdout: {error}"), None)
    }
}

impl From<FormatError> for Failure {
    fn from(error: FormatError) -> Failure {
        if matches!(error, FormatError::Interrupted) {
            return Failure::Interrupted;
        }
        let (hint, message) = (format_hint(&error), error.to_string());
        Failure::Error { message, hint, problems: Vec::new() }
    }
}

impl From<MergeError> for Failure {
    fn from(error: MergeError) -> Failure {
        match error {
            MergeError::Interrupted => Failure::Interrupted,
            MergeError::Format(error) => error.into(),
            error => {
                let problems = match &error {
                    MergeError::Plan { problems, .. } => {
                        problems.iter().map(ToString::to_string).collect()
                    }
                    _ => Vec::new(),
                };
                let (hint, message) = (merge_hint(&error), error.to_string());
                Failure::Error { message, hint, problems }
            }
        }
    }
}

fn format_hint(error: &FormatError) -> Option<String> {
    let text = match error {
        FormatError::AlphaUnknown { .. } => {
            "give the alpha that the adapter was trained with: --alpha N"
        }
        FormatError::Base { problem: BaseProblem::Missing { .. }, .. } => {
            "name the directory of the model that the adapter is for: --base MODEL"
        }
        FormatError::Names { .. } => {
            "name the model that the adapter is for, and its own names decide: --base MODEL"
        }
        FormatError::Inexpressible { what, .. }
            if what.contains("rounded") || what.contains("exactly") =>
        {
            "--allow-lossy writes the nearest and lists what changed"
        }
        FormatError::OutputExists { .. } => "choose another -o, or replace it with --force",
        FormatError::Config { field, .. } if field == "lora_alpha" => {
            "--alpha replaces an alpha that is missing; --scale makes an adapter stronger or weaker"
        }
        FormatError::Unsupported { features, .. }
            if features.iter().all(|f| f.reason.contains("this field is unknown here")) =>
        {
            "if the field cannot matter for the result, pass it over: --ignore-field NAME"
        }
        FormatError::Unsupported { features, .. }
            if features.iter().any(|f| f.reason.contains("not implemented")) =>
        {
            "until it is, PEFT's merge_and_unload can merge it"
        }
        FormatError::Unrecognised { path, problem } => match problem {
            DetectProblem::NoAdapter if path.join("config.json").exists() => {
                "this directory holds a model; the order is BASE ADAPTER"
            }
            DetectProblem::NotFound if path.is_relative() && path.components().count() == 2 => {
                "if this is a name on the Hugging Face Hub, download it first: hf download NAME"
            }
            DetectProblem::NotAnAdapter { .. } => {
                "the order is BASE ADAPTER; is this file perhaps a base model?"
            }
            DetectProblem::NoAdapter => {
                "give the directory that holds adapter_model.safetensors; PEFT saves adapters with \
                 names of their own in subdirectories"
            }
            DetectProblem::OneOfSeveral { .. } => {
                "fetch model.safetensors.index.json and the other shards too"
            }
            DetectProblem::AdaptersInside { .. } => "give that directory instead",
            DetectProblem::SeveralModels { .. } => "name one of the files instead of the directory",
            _ => return None,
        },
        FormatError::Index { problem: IndexProblem::MissingShard { .. }, .. } => {
            "the download may be incomplete; fetch the model again"
        }
        FormatError::Header { problem: HeaderProblem::LfsPointer, .. } => {
            "fetch the file itself: git lfs pull"
        }
        FormatError::Header { problem: HeaderProblem::JsonText, .. } => {
            "is this an index or a configuration? give the directory that holds it"
        }
        FormatError::Io { action, source, .. }
            if action.starts_with("create a") && source.kind() == io::ErrorKind::NotFound =>
        {
            "the directory does not exist; create it first"
        }
        FormatError::Io { action, source, .. }
            if matches!(
                source.kind(),
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem
            ) && (action.starts_with("create") || *action == "prepare") =>
        {
            "nothing may be written there: choose another -o"
        }
        FormatError::Header { problem, .. } if problem.to_string().contains("truncated?") => {
            "the download may be incomplete; fetch the file again"
        }
        FormatError::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
            "the disk is full; nothing was left behind"
        }
        _ => return None,
    };
    Some(text.to_owned())
}

fn merge_hint(error: &MergeError) -> Option<String> {
    let text = match error {
        MergeError::DifferentBase { .. } => {
            "give the base that the adapter was trained on; if you are sure, --allow-different-base"
        }
        MergeError::NonFinite { .. } => {
            "training diverged or the file is damaged; to merge it all the same, --allow-nonfinite"
        }
        MergeError::Overflow { dtype: Dtype::F16, .. } => {
            "choose a dtype with a larger range: --dtype bf16 or f32"
        }
        MergeError::Overflow { .. } => {
            "the delta itself is out of range: check --scale and the adapter's alpha"
        }
        MergeError::NoSpace { .. } => "write to another file system with -o",
        MergeError::NoDirectory { .. } => "create it first, or choose another -o",
        MergeError::OutputIsInput { .. } => "choose another -o",
        MergeError::NotReplaceable { .. } => "choose another -o, or remove it yourself",
        MergeError::NoTokenizer { .. } => "--tokenizer auto takes the base's where there is none",
        MergeError::TokenizersDiffer { .. } => "take the base's: --tokenizer base",
        MergeError::Plan { problems, .. } => return problems.iter().find_map(problem_hint),
        MergeError::Extract(error) => return extract_hint(error).map(str::to_owned),
        _ => return None,
    };
    Some(text.to_owned())
}

/// How patterns are written.
pub(crate) const PATTERNS: &str = "`q_proj` matches every module whose last part it is; a pattern that \
                                   should match inside a name begins and ends with .*";

fn extract_hint(error: &ExtractError) -> Option<&'static str> {
    Some(match error {
        ExtractError::NonFinite { .. } => {
            "training diverged or the file is damaged; no factors of such a change exist"
        }
        ExtractError::Overflow { .. } => "choose a dtype with a larger range: --dtype bf16 or f32",
        ExtractError::Unmatched { patterns }
            if patterns.iter().any(|one| one.starts_with("--full")) =>
        {
            "--full takes norms, biases, embeddings and patterns; `q_proj` matches every module whose \
             last part it is, .*mlp.* what has mlp in its name"
        }
        ExtractError::Unmatched { .. } => PATTERNS,
        ExtractError::Nothing { .. } => {
            "--full stores norms, biases and embeddings, --include factors tables and heads; are \
             these the base and its fine-tune?"
        }
        ExtractError::Quantised { .. } => {
            "give a fine-tuned model in full precision, or leave it out of --full"
        }
        ExtractError::NoRank { .. } => "ask for a smaller error, or a larger budget",
        ExtractError::Budget(BudgetError::Small { .. }) => "give a larger --budget",
        ExtractError::Budget(_) => "give a larger --budget, or a smaller --min-rank",
        ExtractError::NoWork { .. } => "choose another -o, or move it away",
        ExtractError::OtherWork { .. } => {
            "give the models and options that it was begun with; or start afresh without --resume, \
             which removes that work"
        }
        _ => return None,
    })
}

fn problem_hint(problem: &PlanProblem) -> Option<String> {
    let text = match problem {
        PlanProblem::Unresolved { .. } => {
            "is this the base that the adapter was trained on? `lora-cli inspect` shows the names \
             on both sides"
        }
        PlanProblem::Orientation { .. } => {
            "say how square weights are stored: --fan-in-fan-out true for (in, out) as in GPT-2's \
             Conv1D, false for (out, in)"
        }
        PlanProblem::Tied { .. } => {
            "--tied untie writes both tensors and changes only the trained one, which is what the \
             adapter computes unmerged (a larger model; tie_word_embeddings becomes false); --tied \
             both changes what they share, as PEFT's merge does with LoRA"
        }
        PlanProblem::Groups { .. } => {
            "say which groups were trained, as loralib's enable_lora does: --enable-lora \
             true,false,true"
        }
        PlanProblem::OtherCopy { .. } => {
            "merge into the base that the adapter was trained on; if you are sure, \
             --allow-different-base takes the adapter's copy for the base"
        }
        PlanProblem::NamelessHead { .. } => "--tied both keeps them one tensor",
        PlanProblem::Irreversible { .. } => {
            "only the base that it was merged into has what was there: merge into that afresh"
        }
        PlanProblem::Conflict { reason, .. } if reason.contains("cannot scale") => {
            "a weight and --scale act on changes; what an adapter holds in full is taken as it is"
        }
        PlanProblem::Conflict { .. } => {
            "merge one of them alone, and the other into the result, if that order is what you want"
        }
        _ => return None,
    };
    Some(text.to_owned())
}
