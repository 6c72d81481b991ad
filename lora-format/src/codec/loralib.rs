//! loralib (microsoft/LoRA), the package of the LoRA paper: `lora_state_dict`, saved by torch or as
//! safetensors.
//!
//! The keys are `<module>.lora_A` and `<module>.lora_B`, with trained biases beside them. Nothing
//! else is stored: alpha comes from the user, and what kind of layer the factors belong to from
//! their shapes and the base's:
//!
//! - `Linear` and `Embedding` store what PEFT stores;
//! - `MergedLinear` stores the factors of n groups of rows, A (n·rank) × in and B (n·rows) × rank;
//!   [`merged`] makes a linear change of them;
//! - the convolutions store A (rank·k) × (in·k) and B (out·k) × (rank·k), whose product has the
//!   weight's elements in the weight's order; [`convolution`] makes a change of a convolution of
//!   them.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Map;

use super::{ReadOptions, WriteOptions, Written, folding};
use crate::blocks::{self, Move};
use crate::container::TensorFile;
use crate::container::safetensors::{header_of, storage_order};
use crate::error::{AdapterProblem, DetectProblem, Error, ExpansionProblem, Result};
use crate::factors::{self, FactorTensors};
use crate::fingerprint::BaseIdentity;
use crate::io::atomic::{AtomicFile, Durability, Overwrite};
use crate::limits;
use crate::model::{
    Adapter, AdapterFormat, Component, Form, Layer, LowRank, Note, Scaling, ScalingRule, Target,
};
use crate::tensor::Tensor;

pub use crate::blocks::Expansions;

const A_SUFFIX: &str = ".lora_A";
const B_SUFFIX: &str = ".lora_B";

/// Whether a file holds loralib's factors.
pub(super) fn is_loralib(file: &TensorFile) -> bool {
    file.any_name(|name| name.ends_with(A_SUFFIX) || name.ends_with(B_SUFFIX))
}

/// Reads a file of loralib's factors.
pub(super) fn read(file: TensorFile, options: &ReadOptions) -> Result<Adapter> {
    let path = &file.path;
    let meaningless = |option, reason| Error::Meaningless { path: path.to_owned(), option, reason };
    if !options.ignore_fields.is_empty() {
        return Err(meaningless("field to ignore", "loralib writes no configuration"));
    }
    if options.residual_base {
        return Err(meaningless("residual base", "loralib never changes the base"));
    }
    let Some(alpha) = options.alpha else {
        return Err(Error::AlphaUnknown { path: path.to_owned() });
    };
    let scaling = Scaling { alpha, rule: ScalingRule::AlphaOverRank };
    let mut modules: BTreeMap<String, FactorTensors> = BTreeMap::new();
    let mut components = Vec::new();
    let mut problems = Vec::new();
    let stored = file.tensors.iter().map(|tensor| tensor.bytes().len() as u64).sum();
    let metadata = file.own_metadata();
    for tensor in file.tensors {
        let module = |suffix| tensor.name.strip_suffix(suffix).map(str::to_owned);
        if let Some(module) = module(A_SUFFIX) {
            modules.entry(module).or_default().a = Some(tensor);
        } else if let Some(module) = module(B_SUFFIX) {
            modules.entry(module).or_default().b = Some(tensor);
        } else if let Some(module) = module(".bias") {
            let target = Target { module, parameter: "bias".to_owned() };
            components.push(Component { target, form: Form::Replaced(tensor) });
        } else {
            problems.push(AdapterProblem::UnusedTensor { tensor: tensor.name });
        }
    }
    let mut expansions = Expansions::new(stored);
    for (module, factors) in modules {
        let groups = options.enable_lora.as_deref();
        let built = low_rank(&module, factors, scaling, groups, &mut expansions, &mut problems);
        if let Some(low_rank) = built {
            let target = Target::weight(module);
            components.push(Component { target, form: Form::LowRank(low_rank) });
        }
    }
    if !problems.is_empty() {
        return Err(Error::Adapter { path: path.to_owned(), problems });
    }
    if components.is_empty() {
        let problem = DetectProblem::NotAnAdapter { tensors: 0, first: None };
        return Err(Error::Unrecognised { path: path.to_owned(), problem });
    }
    components.sort_by(|x, y| x.target.cmp(&y.target));
    Ok(Adapter {
        path: path.to_owned(),
        format: AdapterFormat::Loralib,
        components,
        base: BaseIdentity { name: None, revision: None, fingerprint: None },
        fan_in_fan_out: None,
        names: None,
        metadata,
        source: None,
        extensions: Map::new(),
        notes: vec![Note::AlphaGiven { alpha: alpha.to_string() }],
    })
}

/// Writes factors as loralib names them, as a safetensors file, complete or not at all. Which alpha
/// they must be loaded with, no file of loralib says: `written` does.
///
/// # Errors
/// [`Error::Inexpressible`] for what loralib has no layer for, or for scales that one alpha does not
/// give exactly unless that is allowed; [`Error::OutputExists`], [`Error::Io`].
pub fn write(
    adapter: &Adapter,
    destination: &Path,
    options: &WriteOptions,
    overwrite: Overwrite,
    durability: Durability,
) -> Result<Written> {
    let refuse =
        |what| Error::Inexpressible { path: adapter.path.clone(), format: "loralib", what };
    let alpha = common_alpha(adapter);
    let mut written = Written::default();
    let mut tensors = Vec::new();
    for Component { target, form } in &adapter.components {
        let mut put = |suffix: &str, mut tensor: Tensor| {
            tensor.name = format!("{}{suffix}", target.module);
            tensors.push(tensor);
        };
        match (target.parameter.as_str(), form) {
            ("weight", Form::LowRank(form)) if is_loralibs(form) => {
                let scales = (form.scale(), alpha / form.rank() as f64);
                let b = folding::fold(&target.module, &form.b, scales, options, &mut written)
                    .map_err(refuse)?;
                put(A_SUFFIX, form.a.clone());
                put(B_SUFFIX, b);
            }
            ("bias", Form::Replaced(tensor)) => put(".bias", tensor.clone()),
            _ => {
                return Err(refuse(format!(
                    "a change of `{}` by {}",
                    target.name(),
                    form.method()
                )));
            }
        }
    }
    tensors.sort_by(|x, y| storage_order((x.dtype, &x.name), (y.dtype, &y.name)));
    let mut metadata = adapter.metadata.clone();
    metadata.push(("format".to_owned(), "pt".to_owned()));
    metadata.sort();
    let header = header_of(&metadata, &tensors);
    let mut parts: Vec<&[u8]> = vec![&header];
    parts.extend(tensors.iter().map(Tensor::bytes));
    let file = AtomicFile::create(destination, overwrite)?;
    file.write_parts(&parts)?;
    adapter.ensure_unchanged()?;
    file.commit(durability)?;
    written.changes.push(format!("the file holds no alpha: load it with alpha {alpha}"));
    Ok(written)
}

/// Whether loralib has a layer whose state this is.
fn is_loralibs(form: &LowRank) -> bool {
    let layer = matches!(form.layer, Layer::Linear | Layer::Embedding | Layer::Merged);
    layer && form.rank_gain.is_none() && form.magnitude.is_none()
}

/// The alpha that gives most of the changes their scale.
fn common_alpha(adapter: &Adapter) -> f64 {
    let mut counts: BTreeMap<u64, usize> = BTreeMap::new();
    for component in &adapter.components {
        if let Form::LowRank(form) = &component.form {
            let alpha = form.scale() * form.rank() as f64;
            *counts.entry(alpha.to_bits()).or_default() += 1;
        }
    }
    let most = counts.values().copied().max();
    let found = counts.into_iter().find(|entry| Some(entry.1) == most);
    found.map_or(1.0, |entry| f64::from_bits(entry.0))
}

/// The change that two factors form. Those of a fused projection are told by A's rows, of which
/// there are n times as many as B has columns.
fn low_rank(
    module: &str,
    factors: FactorTensors,
    scaling: Scaling,
    enable_lora: Option<&[bool]>,
    expansions: &mut Expansions,
    problems: &mut Vec<AdapterProblem>,
) -> Option<LowRank> {
    let groups = match (&factors.a, &factors.b) {
        (Some(a), Some(b)) => fused_groups(a, b),
        _ => None,
    };
    if let (Some(groups), FactorTensors { a: Some(a), b: Some(b) }) = (groups, &factors) {
        for factor in [a, b] {
            if !factor.dtype.is_merge_float() {
                let (tensor, dtype) = (factor.name.clone(), factor.dtype);
                problems.push(AdapterProblem::FactorDtype { tensor, dtype });
                return None;
            }
        }
        let rank = b.shape[1];
        if !(1..=limits::RANK / groups).contains(&rank) {
            let module = module.to_owned();
            problems.push(AdapterProblem::RankRange { module, rank, limit: limits::RANK / groups });
            return None;
        }
        let scale = scaling.scale(rank);
        if !scale.is_finite() {
            problems.push(AdapterProblem::Scale { module: module.to_owned(), scale });
            return None;
        }
        let fused =
            LowRank { layer: Layer::Merged, ..LowRank::linear(a.clone(), b.clone(), scaling) };
        let Some(enable_lora) = enable_lora else {
            return Some(fused);
        };
        return merged(&fused, enable_lora, expansions)
            .map_err(|problem| problems.push(group_problem(module, groups, enable_lora, problem)))
            .ok();
    }
    let names = (format!("{module}{A_SUFFIX}"), format!("{module}{B_SUFFIX}"));
    let low_rank = factors::low_rank(module, factors, names, scaling, problems)?;
    // A fused projection with one enabled group looks like a linear layer of that group alone.
    match enable_lora.filter(|groups| enabled(groups) == 1 && groups.len() > 1) {
        Some(groups) => merged(&low_rank, groups, expansions)
            .map_err(|problem| problems.push(group_problem(module, 1, groups, problem)))
            .ok(),
        None => Some(low_rank),
    }
}

/// Makes linear changes of the fused projections of an adapter in our own format, on the user's
/// word which groups they are.
///
/// # Errors
/// [`Error::Meaningless`] if it has none, [`Error::Adapter`] if the groups do not fit.
pub(super) fn enable(adapter: &mut Adapter, groups: &[bool]) -> Result<()> {
    let mut expansions = Expansions::of(adapter);
    let mut problems = Vec::new();
    let mut found = false;
    for Component { target, form } in &mut adapter.components {
        let Form::LowRank(stored) = form else { continue };
        if stored.layer != Layer::Merged {
            continue;
        }
        found = true;
        let stored_groups = fused_groups(&stored.a, &stored.b).unwrap_or(1);
        match merged(stored, groups, &mut expansions) {
            Ok(linear) => *stored = linear,
            Err(problem) => {
                problems.push(group_problem(&target.module, stored_groups, groups, problem));
            }
        }
    }
    let path = adapter.path.clone();
    if !found {
        let (option, reason) = ("enable_lora", "it has no fused projections");
        return Err(Error::Meaningless { path, option, reason });
    }
    if problems.is_empty() { Ok(()) } else { Err(Error::Adapter { path, problems }) }
}

fn group_problem(
    module: &str,
    stored: usize,
    enable_lora: &[bool],
    problem: ExpansionProblem,
) -> AdapterProblem {
    match problem {
        ExpansionProblem::TooLarge(limit) => limit.into(),
        ExpansionProblem::Shape => {
            let (module, enabled) = (module.to_owned(), enabled(enable_lora));
            AdapterProblem::Groups { module, stored, enabled }
        }
    }
}

fn enabled(groups: &[bool]) -> usize {
    groups.iter().filter(|&&group| group).count()
}

/// The number of groups, at least 2, whose factors A and B hold.
fn fused_groups(a: &Tensor, b: &Tensor) -> Option<usize> {
    match (a.shape.as_slice(), b.shape.as_slice()) {
        (&[rows, _], &[outputs, rank])
            if rank > 0 && rows > rank && rows % rank == 0 && outputs % (rows / rank) == 0 =>
        {
            Some(rows / rank)
        }
        _ => None,
    }
}

/// The change of a linear layer that the factors of a fused projection form, whose groups with a
/// change `enable_lora` tells: B becomes block-diagonal, with rows of zeros for the other groups.
/// Where all groups have one, [`Layer::Merged`] needs no more than the weight's rows to be known.
///
/// # Errors
/// [`ExpansionProblem::Shape`] if the factors are not those of as many groups, and
/// [`ExpansionProblem::TooLarge`] if they take too much memory.
pub fn merged(
    fused: &LowRank,
    enable_lora: &[bool],
    expansions: &mut Expansions,
) -> Result<LowRank, ExpansionProblem> {
    let groups = enabled(enable_lora);
    let (&[rows, _], &[outputs, rank]) = (fused.a.shape.as_slice(), fused.b.shape.as_slice())
    else {
        return Err(ExpansionProblem::Shape);
    };
    if !(1..=limits::BLOCKS).contains(&groups)
        || rank.checked_mul(groups) != Some(rows)
        || outputs % groups != 0
    {
        return Err(ExpansionProblem::Shape);
    }
    let places: Vec<usize> = (0..enable_lora.len()).filter(|&group| enable_lora[group]).collect();
    let height = outputs / groups;
    let all_rows = height.checked_mul(enable_lora.len()).ok_or(ExpansionProblem::Shape)?;
    let moves = places.iter().enumerate().flat_map(|(block, &place)| {
        (0..height).map(move |row| Move {
            from: block * height + row,
            to: place * height + row,
            block,
        })
    });
    let b = blocks::scatter(&fused.b, (all_rows, groups), moves, expansions)?;
    let scaling = scaled_up(fused.scaling, groups);
    Ok(LowRank::linear(fused.a.clone(), b, scaling))
}

/// The change of a convolution of `shape`, (out, in, k, k), that loralib's factors form: their
/// product is (out·k) × (in·k) and has the weight's elements in the weight's order. So the k rows
/// of B that belong to one output lie side by side, and A stands k times on a diagonal.
///
/// # Errors
/// [`ExpansionProblem::Shape`] if the factors are not those of such a convolution, and
/// [`ExpansionProblem::TooLarge`] if they take too much memory.
pub fn convolution(
    stored: &LowRank,
    shape: &[usize],
    expansions: &mut Expansions,
) -> Result<LowRank, ExpansionProblem> {
    let &[out, inputs, kernel, other] = shape else {
        return Err(ExpansionProblem::Shape);
    };
    let (&[rank, a_columns], &[b_rows, columns]) =
        (stored.a.shape.as_slice(), stored.b.shape.as_slice())
    else {
        return Err(ExpansionProblem::Shape);
    };
    let fits = kernel == other
        && (1..=limits::BLOCKS).contains(&kernel)
        && rank == columns
        && rank % kernel == 0
        && inputs.checked_mul(kernel) == Some(a_columns)
        && out.checked_mul(kernel) == Some(b_rows)
        && kernel.checked_mul(rank).is_some_and(|rank| rank <= limits::RANK);
    if !fits {
        return Err(ExpansionProblem::Shape);
    }
    let mut b = stored.b.clone();
    b.shape = vec![out, kernel * rank, 1, 1];
    let moves = (0..kernel).flat_map(|block| {
        (0..rank).map(move |row| Move { from: row, to: block * rank + row, block })
    });
    let mut a = blocks::scatter(&stored.a, (kernel * rank, kernel), moves, expansions)?;
    a.shape = vec![kernel * rank, inputs, kernel, kernel];
    // alpha is over r = rank/k; of the rank that this form has, k·rank, that is the k²-th part.
    let scaling = scaled_up(stored.scaling, kernel * kernel);
    Ok(LowRank { layer: Layer::Convolution, ..LowRank::linear(a, b, scaling) })
}

/// The scaling of a form of `times` the rank, which means the same scale.
fn scaled_up(scaling: Scaling, times: usize) -> Scaling {
    Scaling { alpha: scaling.alpha * times as f64, ..scaling }
}
