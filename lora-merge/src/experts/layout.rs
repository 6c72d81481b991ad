//! How the two factors of a stack of experts are laid out.
//!
//! PEFT stores the factors of E experts as two matrices: A of (E·r) × n, one expert's r rows after
//! the other's, and B of m × (r·E). Two things about them differ between the programs that write
//! them, and no shape shows either:
//!
//! **Which columns of B are whose** ([`Packing`]). PEFT reads B as m × r × E in every release
//! since 0.17, and so do vLLM, prime-rl, SkyRL and NeMo AutoModel: expert e has every E-th column
//! from e on. unsloth, until unsloth-zoo#1269 (2026-09-17), trained with B as m × E × r: expert e
//! has the r columns from e·r on. Since unsloth-zoo#1232 of the same day it writes which of them
//! it was into `adapter_config.json`: `lora_B_layout` is `rank_major` or `grouped_by_expert`.
//!
//! **Which dimension of the parameter A takes** ([`Side`]). A stack is stored as E × out × in, or
//! as E × in × out (`is_transposed` of its module in transformers 5: gpt-oss, Aria). PEFT up to
//! 0.18 does not know the difference: A always takes the dimension after the experts, so that of
//! an E × out × in stack A has the outputs. 0.19.0 looks at `is_transposed` the wrong way round: A
//! has the outputs of either. Since 0.19.1 A has the inputs of either, if the module says how it
//! is stored: gpt-oss in transformers 4 and Llama 4 do not, and are taken for E × out × in.
//! (`ParamWrapper` in PEFT's `tuners/lora/layer.py`.)

use std::fmt;
use std::str::FromStr;

use crate::low_rank::{Factor, View};
use crate::orientation::Orientation;

/// How the factors of fused experts are laid out: the user's word, where the files cannot say.
///
/// Shapes are never overruled: where they show which dimension A takes, only the columns of B are
/// a question, and where r or the number of experts is 1, not even those.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layout {
    /// PEFT since 0.19.1: A has the inputs; expert e has every E-th column of B.
    Peft,
    /// PEFT 0.19.0, and later releases of modules that store (E, in, out) without saying so: A has
    /// the outputs.
    Peft0190,
    /// PEFT up to 0.18: A has the dimension after the experts, whatever it is.
    Peft018,
    /// unsloth before its fix: expert e has columns e·r to e·r + r of B. A as [`Layout::Peft`].
    BlockWise,
    /// The same with A as [`Layout::Peft0190`].
    BlockWise0190,
    /// The same with A as [`Layout::Peft018`].
    BlockWise018,
}

impl Layout {
    /// All of them.
    pub const ALL: [Layout; 6] = [
        Layout::Peft,
        Layout::Peft0190,
        Layout::Peft018,
        Layout::BlockWise,
        Layout::BlockWise0190,
        Layout::BlockWise018,
    ];

    /// The name that `--moe-layout` takes.
    pub fn name(self) -> &'static str {
        match self {
            Layout::Peft => "peft",
            Layout::Peft0190 => "peft-0.19.0",
            Layout::Peft018 => "peft-0.18",
            Layout::BlockWise => "block-wise",
            Layout::BlockWise0190 => "block-wise-0.19.0",
            Layout::BlockWise018 => "block-wise-0.18",
        }
    }

    /// What it is, in a line of help.
    pub fn meaning(self) -> &'static str {
        match self {
            Layout::Peft => {
                "PEFT since 0.19.1: A has the experts' inputs, expert e every E-th column of B"
            }
            Layout::Peft0190 => {
                "PEFT 0.19.0, or later with experts stored (E, in, out) by a class that does not \
                 say so (gpt-oss in transformers 4, Llama 4): A has the experts' outputs"
            }
            Layout::Peft018 => {
                "PEFT up to 0.18: A has the first dimension after the experts, whichever it is"
            }
            Layout::BlockWise => {
                "unsloth until September 2026: expert e has r neighbouring columns of B; A as peft"
            }
            Layout::BlockWise0190 => "block-wise, with A as peft-0.19.0",
            Layout::BlockWise018 => "block-wise, with A as peft-0.18",
        }
    }

    pub(super) fn packing(self) -> Packing {
        match self {
            Layout::Peft | Layout::Peft0190 | Layout::Peft018 => Packing::RankMajor,
            Layout::BlockWise | Layout::BlockWise0190 | Layout::BlockWise018 => Packing::Blocks,
        }
    }

    /// The side that A takes of a stack stored so. Of one that does not show it, (E, out, in) is
    /// assumed, as PEFT does.
    pub(super) fn side(self, stored: Option<Orientation>) -> Side {
        let inputs = match stored {
            Some(Orientation::OutIn) | None => Side::Last,
            Some(Orientation::InOut) => Side::First,
        };
        match self {
            Layout::Peft | Layout::BlockWise => inputs,
            Layout::Peft0190 | Layout::BlockWise0190 => inputs.other(),
            Layout::Peft018 | Layout::BlockWise018 => Side::First,
        }
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Layout {
    type Err = String;

    fn from_str(name: &str) -> Result<Layout, String> {
        let known = Layout::ALL.into_iter().find(|layout| layout.name() == name);
        known.ok_or_else(|| {
            format!("no layout; there are {}", Layout::ALL.map(Layout::name).join(", "))
        })
    }
}

/// Which columns of B are whose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Packing {
    /// Column k·E + e is rank k of expert e.
    RankMajor,
    /// Column e·r + k is rank k of expert e.
    Blocks,
}

/// Which dimension of an expert's matrix A takes; B takes the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Side {
    /// Its rows: the dimension after the experts. The change is (B·A)ᵀ.
    First,
    /// Its columns. The change is B·A.
    Last,
}

impl Side {
    pub(super) const BOTH: [Side; 2] = [Side::First, Side::Last];

    pub(super) fn other(self) -> Side {
        match self {
            Side::First => Side::Last,
            Side::Last => Side::First,
        }
    }

    /// What A has of a stack stored so.
    pub(super) fn of(self, stored: Option<Orientation>) -> &'static str {
        match (self, stored) {
            (Side::First, Some(Orientation::InOut)) | (Side::Last, Some(Orientation::OutIn)) => {
                "the inputs"
            }
            (Side::First, Some(Orientation::OutIn)) | (Side::Last, Some(Orientation::InOut)) => {
                "the outputs"
            }
            (Side::First, None) => "the first dimension after the experts",
            (Side::Last, None) => "the last dimension",
        }
    }
}

/// `rows·cols`, the change of one matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pair {
    /// The matrix's rows × rank.
    pub(super) rows: View,
    /// Rank × the matrix's columns.
    pub(super) cols: View,
}

/// The shapes of the two factors of E experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stacked {
    pub(super) experts: usize,
    /// r, of one expert.
    pub(super) rank: usize,
    /// Columns of A.
    pub(super) a: usize,
    /// Rows of B.
    pub(super) b: usize,
}

impl Stacked {
    /// The change of one expert's matrix.
    pub(super) fn expert(self, expert: usize, packing: Packing, side: Side) -> Pair {
        let Stacked { experts, rank, a: width, b: height } = self;
        let offset = expert * rank * width;
        let a = View { offset, ..View::whole(Factor::A, rank, width) };
        let whole = View::whole(Factor::B, height, experts * rank);
        let b = match packing {
            Packing::RankMajor => View { offset: expert, cols: rank, col_stride: experts, ..whole },
            Packing::Blocks => View { offset: expert * rank, cols: rank, ..whole },
        };
        match side {
            Side::Last => Pair { rows: b, cols: a },
            Side::First => Pair { rows: a.transposed(), cols: b.transposed() },
        }
    }
}

impl Pair {
    /// That of `count` rows of the matrix from `start` on.
    pub(super) fn some_rows(self, start: usize, count: usize) -> Pair {
        let View { offset, row_stride, .. } = self.rows;
        let rows = View { offset: offset + start * row_stride, rows: count, ..self.rows };
        Pair { rows, ..self }
    }

    /// The change of the transpose.
    pub(super) fn transposed(self) -> Pair {
        Pair { rows: self.cols.transposed(), cols: self.rows.transposed() }
    }
}
