//! The neutral model: what an adapter *is*, whatever format it came in.
//!
//! An [`Adapter`] is a list of [`Component`]s. A component changes one *parameter* of the base
//! model ([`Target`]) by one *form* ([`Form`]) of change. Codecs translate to and from this
//! model; the merge engine reads nothing else.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::error::Result;
use crate::fingerprint::BaseIdentity;
use crate::tensor::{MappedFile, Tensor};

/// A set of changes to the parameters of one base model.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// The file or directory it was read from.
    pub path: PathBuf,
    /// The format it was read from.
    pub format: AdapterFormat,
    /// The changes, sorted by module.
    pub components: Vec<Component>,
    /// What is known of the model it was trained on.
    pub base: BaseIdentity,
    /// Whether the trainer said that its targets store their weights as (in, out). Only a hint:
    /// trainers get it wrong, so shapes decide where they can.
    pub fan_in_fan_out: Option<bool>,
    /// The file's own string metadata, less what the format itself writes there.
    pub metadata: Vec<(String, String)>,
    /// The configuration of the format it first came from, every field of it.
    pub source: Option<SourceConfig>,
    /// Optional fields of other programs that a rewrite may carry along.
    pub extensions: Map<String, Value>,
    /// What the reader noticed and the user should know.
    pub notes: Vec<Note>,
}

impl Adapter {
    /// Refuses an adapter whose file was written to since it was opened. What its tensors hold in
    /// memory of their own cannot change.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn ensure_unchanged(&self) -> Result<()> {
        let mut checked: Vec<&Arc<MappedFile>> = Vec::new();
        for component in &self.components {
            let Form::LowRank(factors) = &component.form;
            for file in [&factors.a, &factors.b].into_iter().filter_map(Tensor::mapped_file) {
                // Nearly always one file for all of them.
                if !checked.iter().any(|known| Arc::ptr_eq(known, file)) {
                    file.ensure_unchanged()?;
                    checked.push(file);
                }
            }
        }
        Ok(())
    }
}

/// The formats that adapters are read from and written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AdapterFormat {
    /// Our own single file, `docs/FORMAT.md`.
    Native,
    /// A PEFT directory, or its `adapter_model.safetensors`.
    Peft,
}

impl AdapterFormat {
    /// The name that `--to` takes and that files record.
    pub fn name(self) -> &'static str {
        match self {
            AdapterFormat::Native => "lora",
            AdapterFormat::Peft => "peft",
        }
    }
}

impl fmt::Display for AdapterFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The configuration that another format's file had, verbatim.
#[derive(Clone, Debug, PartialEq)]
pub struct SourceConfig {
    /// Which format.
    pub format: AdapterFormat,
    /// Every field, in its order.
    pub config: Map<String, Value>,
}

/// One change to one parameter.
#[derive(Clone, Debug)]
pub struct Component {
    /// What is changed.
    pub target: Target,
    /// How it is changed.
    pub form: Form,
}

/// A parameter of the base model, as the adapter names it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Target {
    /// The module, without the wrapper prefix of the adapter's format:
    /// `model.layers.0.self_attn.q_proj`.
    pub module: String,
    /// The parameter within the module: `weight`.
    pub parameter: String,
}

impl Target {
    /// The `weight` of a module.
    pub fn weight(module: impl Into<String>) -> Target {
        Target { module: module.into(), parameter: "weight".to_owned() }
    }

    /// The parameter's full name: `model.layers.0.self_attn.q_proj.weight`.
    pub fn name(&self) -> String {
        format!("{}.{}", self.module, self.parameter)
    }
}

/// How a component changes its target.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Form {
    /// `W' = W0 + s·B·A` (Hu et al. 2021), the plain LoRA of a linear layer.
    LowRank(LowRank),
}

/// The factors of `s·B·A`.
#[derive(Clone, Debug)]
pub struct LowRank {
    /// A, rank × in.
    pub a: Tensor,
    /// B, out × rank.
    pub b: Tensor,
    /// Where s comes from.
    pub scaling: Scaling,
}

impl LowRank {
    /// The rank, from the shapes.
    pub fn rank(&self) -> usize {
        self.a.shape.first().copied().unwrap_or(0)
    }

    /// The number of input features.
    pub fn in_features(&self) -> usize {
        self.a.shape.get(1).copied().unwrap_or(0)
    }

    /// The number of output features.
    pub fn out_features(&self) -> usize {
        self.b.shape.first().copied().unwrap_or(0)
    }

    /// The multiplier s of B·A.
    pub fn scale(&self) -> f64 {
        self.scaling.scale(self.rank())
    }
}

/// An alpha and the rule that makes a scale of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scaling {
    /// The numerator.
    pub alpha: f64,
    /// The denominator.
    pub rule: ScalingRule,
}

/// How the scale follows from alpha and rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ScalingRule {
    /// `s = alpha / rank` (Hu et al. 2021).
    AlphaOverRank,
    /// `s = alpha / √rank`, rank-stabilised LoRA (Kalajdzievski 2023, arXiv 2312.03732).
    AlphaOverSqrtRank,
    /// `s = alpha`, for formats that store the multiplier itself.
    Direct,
}

impl ScalingRule {
    /// The name in our format.
    pub fn name(self) -> &'static str {
        match self {
            ScalingRule::AlphaOverRank => "alpha/rank",
            ScalingRule::AlphaOverSqrtRank => "alpha/sqrt-rank",
            ScalingRule::Direct => "direct",
        }
    }

    /// The rule of that name.
    pub fn from_name(name: &str) -> Option<ScalingRule> {
        [ScalingRule::AlphaOverRank, ScalingRule::AlphaOverSqrtRank, ScalingRule::Direct]
            .into_iter()
            .find(|rule| rule.name() == name)
    }
}

impl Scaling {
    /// The multiplier s, computed in f64 exactly as PEFT computes it.
    pub fn scale(self, rank: usize) -> f64 {
        match self.rule {
            ScalingRule::AlphaOverRank => self.alpha / rank as f64,
            ScalingRule::AlphaOverSqrtRank => self.alpha / (rank as f64).sqrt(),
            ScalingRule::Direct => self.alpha,
        }
    }
}

/// Something a reader noticed that does not stop it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the Display text is the documentation")]
pub enum Note {
    /// The configuration's rank is not the tensors' rank; the tensors' rank is used.
    RankDiffers { module: String, configured: usize, stored: usize },
    /// A pattern key matched no module.
    DeadPattern { field: &'static str, key: String },
    /// A configuration field was ignored on the user's word.
    IgnoredField { field: String },
    /// Several alpha keys match a module, with different values; the first was used.
    ContestedAlpha { module: String, alpha: String },
    /// The configuration gives no alpha; the user's was used.
    AlphaGiven { alpha: String },
    /// A tensor is in a shard but not in the index.
    NotInIndex { tensor: String, shard: String },
    /// A stale copy: the index places the tensor in another shard.
    StaleCopy { tensor: String, shard: String, indexed: String },
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Note::RankDiffers { module, configured, stored } => write!(
                f,
                "`{module}`: the configuration says rank {configured}, the tensors have rank \
                 {stored}; the scale uses {stored}"
            ),
            Note::DeadPattern { field, key } => {
                write!(f, "{field}: the key {key:?} matches none of the adapter's modules")
            }
            Note::IgnoredField { field } => {
                write!(f, "the configuration field `{field}` is ignored, as asked")
            }
            Note::ContestedAlpha { module, alpha } => write!(
                f,
                "`{module}`: several alpha_pattern keys match with different values; alpha {alpha} \
                 of the first is used, as PEFT does, but PEFT sorts the keys when it saves, so \
                 training may have used another"
            ),
            Note::AlphaGiven { alpha } => {
                write!(f, "the adapter records no alpha: {alpha} is used, as given")
            }
            Note::NotInIndex { tensor, shard } => {
                write!(f, "`{tensor}` is in {shard} but not in the index; it is copied and indexed")
            }
            Note::StaleCopy { tensor, shard, indexed } => {
                write!(f, "`{tensor}` in {shard} is dropped: the index places it in {indexed}")
            }
        }
    }
}
