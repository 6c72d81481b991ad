//! An adapter of smaller ranks: every low-rank change truncated to the best approximation of the rank
//! that a policy, or one budget for all, gives it.
//!
//! The changes are decomposed by their factors ([`crate::factored`]), so that no ΔW is ever formed.
//! Ranks never increase. A component whose rank and dtype stay as they are keeps its tensors bit for
//! bit, except that AdaLoRA's gains are always multiplied in. No component gets rank 0, which PEFT
//! does not know: a change of zeros gets factors of zeros of rank 1. New factors have the scale 1
//! (alpha = rank), except beside a change of the layer's bias, whose scale they share in PEFT.
//!
//! A tolerance is relative to ‖ΔW‖_F and a budget is spent on energies; if that is asked for, a tolerance
//! is relative to ‖W₀‖_F of the weight that is changed, and a budget is spent on the ratios of energies to
//! ‖W₀‖²_F. With a base, errors are reported relative to ‖W₀‖_F.
//!
//! What is stored in full (replaced parameters and rows, added changes, copies of the base) passes
//! through, and so does what a rule skips. Every other form is refused by name: DoRA, fused experts,
//! and methods whose change is no product of two factors.

mod base;

pub use base::BaseNorms;

use std::collections::BTreeSet;

use lora_format::model::{Adapter, Form, Layer, LowRank};
use lora_format::{Dtype, Tensor};
use rayon::iter::{IntoParallelIterator, IntoParallelRefIterator, ParallelIterator};

use crate::budget::{self, BudgetError, Candidate};
use crate::error::Error;
use crate::extract::describe_unmatched;
use crate::factored::{Certificate, Factored, FactoredError, FactoredSvd};
use crate::noise::{self, NoiseEstimate};
use crate::rank::{Bound, Choice, RankError, RankLimits, RankPolicy, RankRules, Ruling, choose};
use crate::spectrum::Spectrum;

/// How ranks are chosen.
#[derive(Debug)]
pub enum Ranks {
    /// For every component by itself.
    PerTensor(Box<RankRules>),
    /// For all together.
    Budget {
        /// What the factors may take: those of all components that are resized.
        bytes: u64,
        /// What every rank must keep to.
        limits: RankLimits,
    },
}

/// An adapter cannot be resized.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ResizeError {
    /// Components have forms that have no smaller rank, or factors that cannot be decomposed.
    #[error("{}", list(problems))]
    Components {
        /// What each of them is: name and reason.
        problems: Vec<(String, FormProblem)>,
    },
    /// A rule's pattern takes too long.
    #[error(transparent)]
    Rank(#[from] RankError),
    /// Patterns of rules that match no component.
    #[error("no module matches {}", patterns.join(", "))]
    Unmatched {
        /// The patterns, with what they may have meant.
        patterns: Vec<String>,
    },
    /// A budget cannot be kept.
    #[error(transparent)]
    Budget(#[from] BudgetError),
    /// Errors relative to a weight that has no size.
    #[error(
        "`{name}`: the base's weight is zero or not finite, and errors are to be relative to it"
    )]
    NoReference {
        /// The component.
        name: String,
    },
    /// The base does not fit, or cannot be read.
    #[error(transparent)]
    Base(#[from] Error),
}

/// Why one component cannot be resized.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum FormProblem {
    /// It is of another method.
    #[error("{0}: its change is no product of two factors of one rank")]
    Method(&'static str),
    /// Its factors.
    #[error(transparent)]
    Factors(#[from] FactoredError),
}

/// What was done.
#[derive(Clone, Debug)]
pub struct ResizeReport {
    /// The resized components, in the adapter's order.
    pub targets: Vec<Resized>,
    /// Those that passed through.
    pub unchanged: Vec<Unchanged>,
    /// Of a budget.
    pub spent: Option<Spent>,
    /// Patterns of rules that decided for no component, since rules before them match the same.
    pub shadowed: Vec<String>,
}

/// One component.
#[derive(Clone, Debug)]
pub struct Resized {
    /// The parameter, as the adapter names it.
    pub name: String,
    /// m.
    pub rows: usize,
    /// n; of a convolution, with the kernel's positions.
    pub cols: usize,
    /// The rank that it had.
    pub rank_before: usize,
    /// The rank that it has.
    pub rank: usize,
    /// What decided the rank.
    pub reason: Reason,
    /// What `auto` took for noise; `None` of other policies.
    pub noise: Option<NoiseEstimate>,
    /// Whether its tensors are those of the input, bit for bit.
    pub kept: bool,
    /// ‖ΔW‖_F², and what the factors leave of it.
    pub certificate: Certificate,
    /// ‖W₀‖_F, if there is a base.
    pub base_norm: Option<f64>,
    /// Bytes of its tensors before.
    pub bytes_before: u64,
    /// And after.
    pub bytes: u64,
}

/// What decided a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The policy, a limit or the shape.
    Chosen(Bound),
    /// The budget.
    Budget,
    /// The policy or the budget would have had more than the factors have.
    Full,
    /// ΔW is zero, or the policy would have dropped all of it: there is no rank below 1.
    Least,
}

/// A component that passed through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unchanged {
    /// The parameter, as the adapter names it.
    pub name: String,
    /// Its method.
    pub method: &'static str,
    /// Bytes of its tensors.
    pub bytes: u64,
    /// Whether a rule skipped it.
    pub skipped: bool,
}

/// What became of a budget.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spent {
    /// Bytes that there were.
    pub budget: u64,
    /// Bytes that the factors take.
    pub bytes: u64,
    /// No allotment gains this much more: see [`crate::budget`].
    pub short_of_best: f64,
}

impl Resized {
    /// What its errors are relative to: ‖W₀‖_F, or ‖ΔW‖_F without a base.
    #[must_use]
    pub fn reference(&self) -> f64 {
        self.base_norm.unwrap_or_else(|| self.certificate.energy.sqrt())
    }

    /// ‖ΔW − B'A'‖_F relative to [`Resized::reference`].
    #[must_use]
    pub fn relative(&self) -> f64 {
        let Certificate { residual, .. } = self.certificate;
        if residual == 0.0 { 0.0 } else { residual / self.reference() }
    }
}

impl ResizeReport {
    /// The certificate of all resized components as one vector: energies add up. The optimum is that
    /// of the same ranks.
    #[must_use]
    pub fn total(&self) -> Certificate {
        let sum = |of: &dyn Fn(&Certificate) -> f64| -> f64 {
            self.targets.iter().map(|one| of(&one.certificate)).sum()
        };
        Certificate {
            energy: sum(&|one| one.energy),
            residual: sum(&|one| one.residual * one.residual).sqrt(),
            optimal: sum(&|one| one.optimal * one.optimal).sqrt(),
        }
    }

    /// (Σ ‖W₀‖²_F)^½ of the resized components, if there is a base.
    #[must_use]
    pub fn base_norm(&self) -> Option<f64> {
        let squares: Option<f64> =
            self.targets.iter().map(|one| one.base_norm.map(|norm| norm * norm)).sum();
        squares.map(f64::sqrt)
    }

    /// What the ranks that were bought keep: Σ (‖ΔW‖² − residual²), of each divided by ‖W₀‖² if there is
    /// a base and `relative` holds.
    #[must_use]
    pub fn kept(&self, relative: bool) -> f64 {
        let gains = self.targets.iter().map(|one| {
            let kept = one.certificate.energy - one.certificate.residual.powi(2);
            kept / one.base_norm.filter(|_| relative).map_or(1.0, |norm| norm * norm)
        });
        gains.sum()
    }

    /// Bytes of all tensors, before and after.
    #[must_use]
    pub fn bytes(&self) -> (u64, u64) {
        let passed: u64 = self.unchanged.iter().map(|one| one.bytes).sum();
        let before: u64 = self.targets.iter().map(|one| one.bytes_before).sum();
        let after: u64 = self.targets.iter().map(|one| one.bytes).sum();
        (passed + before, passed + after)
    }
}

/// A component that is to be resized.
struct Job<'a> {
    /// Its index in the adapter.
    index: usize,
    name: String,
    form: &'a LowRank,
    /// s of its new factors.
    scale: f64,
    /// ‖W₀‖_F.
    base_norm: Option<f64>,
    /// ‖W₀‖_F, if its rank is chosen relative to that.
    reference: Option<f64>,
}

/// What becomes of a job's component.
struct Outcome {
    form: LowRank,
    kept: bool,
    reason: Reason,
    noise: Option<NoiseEstimate>,
    certificate: Certificate,
}

/// Resizes an adapter, on the threads of the current pool. The result does not depend on their
/// number. `dtype` is that of the new factors; without it, each factor keeps its own. `relative`: whether
/// tolerances and gains are relative to the weights of the base, if there is one.
///
/// # Errors
/// [`ResizeError`], with every component that cannot be resized.
pub fn resize(
    adapter: &Adapter,
    ranks: Ranks,
    dtype: Option<Dtype>,
    base: Option<&BaseNorms>,
    relative: bool,
) -> Result<(Adapter, ResizeReport), ResizeError> {
    let (mut rules, spending) = match ranks {
        Ranks::PerTensor(rules) => (Some(rules), None),
        Ranks::Budget { bytes, limits } => (None, Some((bytes, limits))),
    };
    // PEFT gives a change of the bias (`lora_bias`) the scale of the factors beside it.
    let added = adapter.components.iter().filter(|one| matches!(one.form, Form::Added { .. }));
    let biased: BTreeSet<&str> = added.map(|one| one.target.module.as_str()).collect();
    let mut jobs = Vec::new();
    let mut choices = Vec::new();
    let mut unchanged = Vec::new();
    let mut problems = Vec::new();
    for (index, component) in adapter.components.iter().enumerate() {
        let name = component.target.name();
        let ruling = rules.as_mut().map(|rules| rules.of_parameter(&name)).transpose()?;
        let pass = |skipped| Unchanged {
            name: name.clone(),
            method: component.form.method(),
            bytes: component.form.tensors().into_iter().map(size).sum(),
            skipped,
        };
        match (&component.form, ruling) {
            (_, Some(Ruling::Skip)) => unchanged.push(pass(true)),
            (Form::LowRank(form), ruling) => {
                let base_norm = base.map(|norms| norms.of(index));
                if base_norm.is_some_and(|norm| !(norm.is_finite() && norm > 0.0)) {
                    return Err(ResizeError::NoReference { name });
                }
                if let Some(Ruling::Choose(policy, limits)) = ruling {
                    choices.push((policy, limits));
                }
                let shared = biased.contains(component.target.module.as_str());
                let scale = if shared { form.scale() } else { 1.0 };
                let reference = base_norm.filter(|_| relative);
                jobs.push(Job { index, name, form, scale, base_norm, reference });
            }
            (Form::Replaced(_) | Form::Rows { .. } | Form::Added { .. } | Form::Base(_), _) => {
                unchanged.push(pass(false));
            }
            (form, _) => problems.push((name, FormProblem::Method(form.method()))),
        }
    }
    if !problems.is_empty() {
        return Err(ResizeError::Components { problems });
    }
    let shadowed = match &rules {
        Some(rules) => check_rules(rules, adapter)?,
        None => Vec::new(),
    };
    let mut spent = None;
    let outcomes = match spending {
        None => each(&jobs, &choices, dtype),
        Some((bytes, limits)) => {
            let (outcomes, all) = together(&jobs, bytes, limits, dtype)?;
            spent = Some(all);
            outcomes
        }
    };

    let mut resized = adapter.clone();
    let mut targets = Vec::with_capacity(jobs.len());
    for (job, outcome) in jobs.iter().zip(outcomes) {
        match outcome {
            Ok(outcome) => {
                targets.push(describe(job, &outcome));
                resized.components[job.index].form = Form::LowRank(outcome.form);
            }
            Err(problem) => problems.push((job.name.clone(), problem.into())),
        }
    }
    if !problems.is_empty() {
        return Err(ResizeError::Components { problems });
    }
    Ok((resized, ResizeReport { targets, unchanged, spent, shadowed }))
}

/// Refuses rules that match nothing; gives those that decided for nothing.
fn check_rules(rules: &RankRules, adapter: &Adapter) -> Result<Vec<String>, ResizeError> {
    let names: Vec<String> = adapter.components.iter().map(|one| one.target.name()).collect();
    let describe =
        |pattern| describe_unmatched("--rank-for", pattern, names.iter().map(String::as_str));
    let patterns: Vec<String> = rules.unmatched().map(describe).collect();
    if patterns.is_empty() {
        Ok(rules.shadowed().map(str::to_owned).collect())
    } else {
        Err(ResizeError::Unmatched { patterns })
    }
}

/// Every component by its own policy.
fn each(
    jobs: &[Job<'_>],
    choices: &[(RankPolicy, RankLimits)],
    dtype: Option<Dtype>,
) -> Vec<Result<Outcome, FactoredError>> {
    let one = |(job, &(policy, limits)): (&Job<'_>, &(RankPolicy, RankLimits))| {
        let svd = Factored::new(job.form)?.svd()?;
        let spectrum = svd.spectrum();
        let reference = job.reference.unwrap_or(spectrum.norm());
        let noise = (policy == RankPolicy::Auto)
            .then(|| noise::estimate(&spectrum, 0.0, noise::Rule::default()));
        let Choice { rank, bound } = choose(policy, &spectrum, noise.as_ref(), reference, limits);
        // What asks for more ranks than the factors have is not bound by the values they have not.
        let wanted = match policy {
            RankPolicy::Rank(wanted) if bound == Bound::Shape => wanted,
            _ => rank,
        };
        let outcome = finish(job, &svd, (rank.max(1), Reason::Chosen(bound)), wanted, dtype)?;
        Ok(Outcome { noise, ..outcome })
    };
    let pairs: Vec<_> = jobs.iter().zip(choices).collect();
    pairs.into_par_iter().map(one).collect()
}

type Together = (Vec<Result<Outcome, FactoredError>>, Spent);

/// All components by one budget: their values first, and when the ranks are known the factors, so
/// that no more decompositions are held at once than there are threads.
fn together(
    jobs: &[Job<'_>],
    bytes: u64,
    limits: RankLimits,
    dtype: Option<Dtype>,
) -> Result<Together, ResizeError> {
    let spectra: Vec<Result<Spectrum, FactoredError>> = jobs
        .par_iter()
        .map(|job| Factored::new(job.form)?.svd().map(|svd| svd.spectrum()))
        .collect();
    let failed = jobs.iter().zip(&spectra).filter_map(|(job, spectrum)| {
        let problem = spectrum.as_ref().err()?.clone();
        Some((job.name.clone(), problem.into()))
    });
    let problems: Vec<(String, FormProblem)> = failed.collect();
    if !problems.is_empty() {
        return Err(ResizeError::Components { problems });
    }
    let spectra: Vec<Spectrum> = spectra.into_iter().flatten().collect();
    let gains: Vec<Vec<f64>> = jobs
        .iter()
        .zip(&spectra)
        .map(|(job, spectrum)| {
            let unit = job.reference.unwrap_or(1.0);
            spectrum.values.iter().map(|value| (value / unit) * (value / unit)).collect()
        })
        .collect();
    let candidates: Vec<Candidate<'_>> = jobs
        .iter()
        .zip(&gains)
        .map(|(job, gains)| {
            let full = job.form.rank().min(gains.len());
            let maximum = limits.maximum.unwrap_or(full).clamp(1, full.max(1));
            Candidate {
                name: &job.name,
                gains: &gains[..full],
                bytes_per_rank: bytes_per_rank(job.form, dtype),
                minimum: limits.minimum.clamp(1, maximum),
                maximum,
            }
        })
        .collect();
    let allotment = budget::allot(&candidates, bytes)?;
    let spent =
        Spent { budget: bytes, bytes: allotment.bytes, short_of_best: allotment.short_of_best };
    let pairs: Vec<_> = jobs.iter().zip(&allotment.ranks).collect();
    let outcomes = pairs
        .into_par_iter()
        .map(|(job, &rank)| {
            let svd = Factored::new(job.form)?.svd()?;
            finish(job, &svd, (rank, Reason::Budget), rank, dtype)
        })
        .collect();
    Ok((outcomes, spent))
}

/// Gives a component its rank. `wanted` is what was asked for, beyond the rank of ΔW too.
fn finish(
    job: &Job<'_>,
    svd: &FactoredSvd<'_>,
    (rank, reason): (usize, Reason),
    wanted: usize,
    dtype: Option<Dtype>,
) -> Result<Outcome, FactoredError> {
    let (form, full) = (job.form, job.form.rank());
    let dropped = wanted == 0;
    let wanted = wanted.max(1);
    let stays = |tensor: &Tensor| dtype.is_none_or(|dtype| dtype == tensor.dtype);
    let is_zero = svd.values.iter().all(|&value| value == 0.0);
    if wanted >= full && form.rank_gain.is_none() && stays(&form.a) && stays(&form.b) {
        let energy = svd.values.iter().rev().map(|value| value * value).sum();
        let certificate = Certificate { energy, ..Certificate::default() };
        let reason = match reason {
            Reason::Chosen(Bound::Minimum) => reason,
            _ if is_zero || dropped => Reason::Least,
            _ => Reason::Full,
        };
        return Ok(Outcome { form: form.clone(), kept: true, reason, noise: None, certificate });
    }
    let truncated = svd.truncate(rank, dtype, job.scale)?;
    let least = is_zero || dropped;
    let reason = match reason {
        _ if least => Reason::Least,
        _ if wanted >= full => Reason::Full,
        reason => reason,
    };
    let certificate = truncated.certificate;
    Ok(Outcome { form: truncated.form, kept: false, reason, noise: None, certificate })
}

fn describe(job: &Job<'_>, outcome: &Outcome) -> Resized {
    let bytes = |form: &LowRank| {
        let factors = [Some(&form.a), Some(&form.b), form.rank_gain.as_ref()];
        factors.into_iter().flatten().map(size).sum()
    };
    Resized {
        name: job.name.clone(),
        rows: job.form.out_features(),
        cols: job.form.in_features(),
        rank_before: job.form.rank(),
        rank: outcome.form.rank(),
        reason: outcome.reason,
        noise: outcome.noise.clone(),
        kept: outcome.kept,
        certificate: outcome.certificate,
        base_norm: job.base_norm,
        bytes_before: bytes(job.form),
        bytes: bytes(&outcome.form),
    }
}

fn size(tensor: &Tensor) -> u64 {
    tensor.bytes().len() as u64
}

/// A row of A and a column of B.
fn bytes_per_rank(form: &LowRank, dtype: Option<Dtype>) -> u64 {
    let bytes = |elements: usize, own: Dtype| {
        (elements as u64).saturating_mul(dtype.unwrap_or(own).bits() / 8)
    };
    let (a, b) = (&form.a, &form.b);
    bytes(form.in_features(), a.dtype).saturating_add(bytes(form.out_features(), b.dtype))
}

/// Whether a component is one that [`resize`] decomposes: a low-rank change of a layer.
pub(crate) fn is_resizable(form: &Form) -> bool {
    matches!(form, Form::LowRank(form) if form.magnitude.is_none() && form.layer != Layer::Merged)
}

/// Problems, the first of many.
fn list(problems: &[(String, FormProblem)]) -> String {
    const SHOWN: usize = 10;
    let line = |(name, problem): &(String, FormProblem)| format!("`{name}`: {problem}");
    if let [only] = problems {
        return line(only);
    }
    let mut lines = vec![format!("{} components cannot be resized", problems.len())];
    lines.extend(problems.iter().take(SHOWN).map(|problem| format!("  - {}", line(problem))));
    if problems.len() > SHOWN {
        lines.push(format!("  - and {} more", problems.len() - SHOWN));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests;
