//! An adapter from a base and its full fine-tune: the best one of each rank, with a certificate.
//!
//! ```text
//! Pairing ─▶ measure every pair ─▶ which are factored, stored whole, left out
//!                                     │
//!                 svd::decompose ΔW ◀─┘    rank policy or budget
//!                        │
//!                        ▼
//!        B = U·diag(σ)^½, A = diag(σ)^½·Vᵀ, rounded ─▶ residual of what is stored, in f64
//! ```
//!
//! ΔW is read from the mapped files as often as the iteration needs it and never held: memory is
//! the vectors of the matrices in work ([`Extraction::memory_bound`]) and the adapter itself. What
//! low rank cannot hold (norms, biases, tables) is measured and listed, or stored whole if asked.

mod work;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

use lora_format::fingerprint::BaseIdentity;
use lora_format::model::{Component, Form, Layer, LowRank, Scaling, ScalingRule, Target};
use lora_format::pattern::PatternTable;
use lora_format::{Adapter, Dtype, Tensor, map_all, vocabulary};
use ndarray::{Array2, ArrayView2, s};
use serde_json::{Map, Value};

pub use work::WorkDirectory;

use crate::budget::{self, BudgetError, Candidate};
use crate::engine::Progress;
use crate::error::Result;
use crate::names::nearest;
use crate::noise::{self, NoiseEstimate, Storage};
use crate::numbers::float_type;
use crate::pair::{Change, Kind, Mapped, Pair, PairNote, Pairing, Side, Tie, measure, profiles};
use crate::parameters::Source;
use crate::rank::{Bound, Choice, RankError, RankLimits, RankPolicy, Ruling, choose};
use crate::resize::Ranks;
use crate::schedule::Schedule;
use crate::spectrum::{Reached, Spectrum, UNRESOLVED};
use crate::svd::{self, Decomposition, Goal, SvdOptions, decompose, residual};

/// What is extracted, and how.
#[derive(Debug)]
pub struct ExtractOptions {
    /// How ranks are chosen.
    pub ranks: Ranks,
    /// Whether tolerances and gains are relative to ‖W0‖_F instead of ‖ΔW‖_F.
    pub relative: bool,
    /// The dtype of the factors.
    pub dtype: Dtype,
    /// What is stored whole: `norms`, `biases`, `embeddings` (tables and heads) or patterns.
    pub full: Vec<String>,
    /// Patterns of tables and heads that get factors as linear layers do.
    pub include: Vec<String>,
    /// How decompositions are made.
    pub svd: SvdOptions,
    /// Threads; 0 for one per core.
    pub threads: usize,
}

/// An extraction cannot be done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExtractError {
    /// A parameter holds NaN or infinities.
    #[error(
        "`{name}`: {count} values are NaN, infinite or too far apart, the first at element {first}"
    )]
    NonFinite {
        /// The parameter.
        name: String,
        /// How many.
        count: u64,
        /// The index of the first.
        first: u64,
    },
    /// A factor does not fit the dtype.
    #[error("`{name}`: a factor holds values beyond the range of {dtype}")]
    Overflow {
        /// The parameter.
        name: String,
        /// The dtype.
        dtype: Dtype,
    },
    /// Patterns that match no parameter of the models.
    #[error("no parameter matches {}", patterns.join(", "))]
    Unmatched {
        /// The patterns, with the options that they were given to.
        patterns: Vec<String>,
    },
    /// The models do not differ in anything that was asked for.
    #[error("nothing to extract: {reason}")]
    Nothing {
        /// Why.
        reason: String,
    },
    /// Everything that was to get factors got none.
    #[error(
        "nothing to extract: of {changes} changes, what was asked for is met by rank 0, and nothing \
         is stored whole"
    )]
    NoRank {
        /// How many changes were to get factors.
        changes: usize,
    },
    /// A parameter that was to be stored whole is not stored plainly in the fine-tuned model.
    #[error("`{name}` cannot be stored whole: the fine-tuned model has it quantised")]
    Quantised {
        /// The parameter.
        name: String,
    },
    /// A parameter is in none of the report's lists, or in two: a fault of this program.
    #[error(
        "{accounted} of {parameters} parameters are accounted for: a fault of this program; nothing \
         was written"
    )]
    Unaccounted {
        /// Those that the report lists.
        accounted: usize,
        /// Those that were paired, or are new and stored whole.
        parameters: usize,
    },
    /// Ranks.
    #[error(transparent)]
    Rank(#[from] RankError),
    /// A budget.
    #[error(transparent)]
    Budget(#[from] BudgetError),
    /// A decomposition.
    #[error(transparent)]
    NotConverged(#[from] crate::svd::dense::NotConverged),
    /// What stands where the work is kept is none.
    #[error("{}: it is not the work of an extraction, and in its place", directory.display())]
    NoWork {
        /// The directory, or the file.
        directory: std::path::PathBuf,
    },
    /// Work that was kept of an interrupted extraction is of another one.
    #[error("{}: it holds the work of another extraction: {difference}", directory.display())]
    OtherWork {
        /// The directory.
        directory: std::path::PathBuf,
        /// What differs.
        difference: String,
    },
}

/// What was extracted.
#[derive(Clone, Debug, Default)]
pub struct ExtractReport {
    /// Parameters that got factors, sorted by name.
    pub targets: Vec<Extracted>,
    /// Parameters that are stored whole, with their changes.
    pub whole: Vec<(String, Kind, Option<Change>)>,
    /// Parameters that changed and are not in the adapter.
    pub left_out: Vec<LeftOut>,
    /// How many parameters did not change.
    pub unchanged: usize,
    /// [`Extraction::memory_bound`].
    pub memory_bound: u64,
    /// How many of the targets are quantised in one of the models.
    pub quantised: usize,
    /// Bytes of a budget that were there, that are spent, and that no allotment gains more than.
    pub budget: Option<(u64, u64, f64)>,
    /// Targets that a budget might have given more than was computed of them.
    pub capped: Vec<String>,
    /// Targets whose measured error is above what the policy asked for: their factors are rounded, or
    /// their values known too coarsely. Those that a greatest rank keeps above it are not meant.
    pub missed: Vec<String>,
    /// What the user should know.
    pub notes: Vec<String>,
}

/// A parameter's factors.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct Extracted {
    /// The base's name of it.
    pub name: String,
    /// Rows of ΔW.
    pub rows: usize,
    /// Columns of ΔW.
    pub cols: usize,
    /// The rank.
    pub rank: usize,
    /// What decided the rank.
    pub bound: String,
    /// ‖ΔW‖²_F.
    pub energy: f64,
    /// ‖W0‖²_F.
    pub base_energy: f64,
    /// ‖ΔW − B·A‖²_F of the stored factors, over all elements, in f64.
    pub residual: f64,
    /// A bound from below on the same of the best factors of this rank.
    pub optimum: f64,
    /// Whether the bound is exact; else it rests on an estimate.
    pub exact: bool,
    /// The leading singular values.
    pub values: Vec<f64>,
    /// Products with ΔW that it took.
    pub products: usize,
    /// The noise estimate of `--rank auto`.
    pub noise: Option<NoiseSummary>,
}

/// What [`NoiseEstimate`] says, as it is kept and reported.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct NoiseSummary {
    /// The standard deviation per element.
    pub level: f64,
    /// Values up to this are noise.
    pub threshold: f64,
    /// What decided the threshold, in lower case.
    pub basis: String,
    /// Whether there is a gap between signal and noise.
    pub clear: bool,
    /// The rank if the threshold were half as high again.
    pub strict: usize,
    /// The rank if the threshold were where the noise ends.
    pub lenient: usize,
}

impl From<NoiseEstimate> for NoiseSummary {
    fn from(noise: NoiseEstimate) -> NoiseSummary {
        let (basis, clear) = (format!("{:?}", noise.basis).to_lowercase(), noise.is_clear());
        let NoiseEstimate { level, threshold, strict, lenient, .. } = noise;
        NoiseSummary { level, threshold, basis, clear, strict, lenient }
    }
}

/// A parameter that changed and is not in the adapter.
#[derive(Clone, Debug)]
pub struct LeftOut {
    /// The base's name of it.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// How it changed.
    pub change: Change,
    /// Why it is not in the adapter.
    pub reason: &'static str,
}

impl Extracted {
    /// ‖ΔW − B·A‖_F / ‖ΔW‖_F.
    #[must_use]
    pub fn relative(&self) -> f64 {
        if self.energy > 0.0 { (self.residual / self.energy).sqrt() } else { 0.0 }
    }

    /// The share of the energy that the factors keep.
    #[must_use]
    pub fn captured(&self) -> f64 {
        if self.energy > 0.0 { 1.0 - self.residual / self.energy } else { 1.0 }
    }

    /// By what share the error may exceed the best one's; `None` where the best one's may be zero.
    #[must_use]
    pub fn excess(&self) -> Option<f64> {
        (self.optimum > 0.0).then(|| ((self.residual / self.optimum).sqrt() - 1.0).max(0.0))
    }

    /// How much further than the best error it is at most, as a share of ‖ΔW‖_F.
    #[must_use]
    pub fn gap(&self) -> f64 {
        let gap = (self.residual.sqrt() - self.optimum.sqrt()).max(0.0);
        if self.energy > 0.0 { gap / self.energy.sqrt() } else { 0.0 }
    }
}

/// What is to be done with one pair.
enum Fate {
    Unchanged,
    Factors(Choosing),
    Whole,
    LeftOut(&'static str),
}

#[derive(Clone, Copy)]
enum Choosing {
    Policy(RankPolicy, RankLimits),
    Budget { most: usize },
}

/// An extraction that is planned: every pair measured, every pattern matched.
pub struct Extraction<'a> {
    pairing: &'a Pairing,
    mapped: &'a Mapped<'a>,
    options: &'a ExtractOptions,
    changes: Vec<Change>,
    fates: Vec<Fate>,
    /// Parameters of the fine-tuned model alone that are stored whole.
    new_whole: Vec<String>,
    schedule: Schedule,
}

/// Why a change is left out to which a policy or a budget gives no rank.
const RANK_0: &str = "its rank was chosen to be 0";

/// What one target costs to read once, against decomposing it: for progress.
const DECOMPOSING: u64 = 8;

impl<'a> Extraction<'a> {
    /// The work in elements, as [`Progress`] counts it.
    #[must_use]
    pub fn total(pairing: &Pairing) -> u64 {
        pairing.pairs.iter().map(|pair| pair.elements() * (1 + DECOMPOSING)).sum()
    }

    /// Measures every pair and decides what becomes of it.
    ///
    /// # Errors
    /// [`Extract`](crate::error::Error::Extract), [`Interrupted`](crate::error::Error::Interrupted).
    pub fn plan(
        mapped: &'a Mapped<'a>,
        options: &'a mut ExtractOptions,
        progress: &Progress,
    ) -> Result<Extraction<'a>> {
        let pairing = mapped.pairing();
        refuse_unmatched(pairing, options)?;
        let schedule = Schedule::new(options.threads);
        let elements: Vec<u64> = pairing.pairs.iter().map(Pair::elements).collect();
        let changes: Vec<Change> = schedule.run(
            &elements,
            || progress.is_cancelled(),
            |index| {
                let change = measure(&mapped.delta(index));
                progress.add(elements[index]);
                Ok(change)
            },
        )?;
        for (pair, change) in pairing.pairs.iter().zip(&changes) {
            if let Some(first) = change.first_non_finite {
                let (name, count) = (pair.name.clone(), change.non_finite);
                return Err(ExtractError::NonFinite { name, count, first: first.element }.into());
            }
        }
        let (fates, new_whole) = decide(pairing, &changes, options)?;
        Ok(Extraction { pairing, mapped, options, changes, fates, new_whole, schedule })
    }

    /// A bound on what the decompositions hold at one time, in bytes: the largest ones side by side, as
    /// many as there are threads, or one on all threads; with a budget, the components of all of them
    /// until ranks are allotted. Neither the mapped files nor the factors that are done count.
    #[must_use]
    pub fn memory_bound(&self) -> u64 {
        let threads = self.schedule.threads();
        let groups = threads.min(self.targets().count()).max(1);
        let (mut each, mut alone, mut kept) = (Vec::new(), 0, 0);
        for (index, choosing) in self.targets() {
            let (rows, cols) = self.pairing.pairs[index].matrix();
            let short = rows.min(cols);
            let most = match choosing {
                Choosing::Budget { most } => most,
                Choosing::Policy(RankPolicy::Rank(rank), limits) => rank.max(limits.minimum),
                Choosing::Policy(_, limits) => limits.maximum.unwrap_or(short),
            };
            if let Choosing::Budget { .. } = choosing {
                kept += (rows + cols) as u64 * most.min(short) as u64 * 4;
            }
            each.push(svd::memory_bound(rows, cols, most, threads.div_ceil(groups)));
            alone = alone.max(svd::memory_bound(rows, cols, most, threads));
        }
        each.sort_unstable_by(|a, b| b.cmp(a));
        kept + alone.max(each.iter().take(groups).sum())
    }

    fn targets(&self) -> impl Iterator<Item = (usize, Choosing)> {
        self.fates.iter().enumerate().filter_map(|(index, fate)| match fate {
            Fate::Factors(choosing) => Some((index, *choosing)),
            _ => None,
        })
    }

    /// Decomposes, chooses ranks, rounds, certifies, and puts the adapter together. Finished targets
    /// are kept in `work`, which begins here, and those that it holds already are not made again.
    ///
    /// # Errors
    /// [`Extract`](crate::error::Error::Extract), [`Format`](crate::error::Error::Format),
    /// [`Interrupted`](crate::error::Error::Interrupted).
    pub fn run(
        &self,
        work: &mut WorkDirectory,
        progress: &Progress,
    ) -> Result<(Adapter, ExtractReport)> {
        work.begin()?;
        let work = &*work;
        let memory_bound = self.memory_bound();
        let mut report = ExtractReport { memory_bound, ..ExtractReport::default() };
        let targets: Vec<(usize, Choosing)> = self.targets().collect();
        let budget = match self.options.ranks {
            Ranks::Budget { bytes, limits } => Some((bytes, limits)),
            Ranks::PerTensor(_) => None,
        };
        let made = if let Some((bytes, limits)) = budget {
            self.run_budget(&targets, bytes, limits, progress, &mut report)?
        } else {
            self.in_parallel(&targets, progress, |index, choosing| {
                let pair = &self.pairing.pairs[index];
                if let Some(done) = work.take(index, pair, self.options.dtype) {
                    return Ok(done);
                }
                let (found, choice, noise) = self.decompose(index, choosing)?;
                let part = self.finish(index, &found, choice, noise)?;
                work.keep(index, &part)?;
                Ok(part)
            })?
        };
        let mut components = Vec::new();
        for (&(index, choosing), (extracted, a, b)) in targets.iter().zip(made) {
            if let Choosing::Policy(policy, _) = choosing
                && self.misses(index, policy, &extracted)
            {
                report.missed.push(extracted.name.clone());
            }
            if extracted.rank > 0 {
                if self.is_tied(&extracted.name) {
                    report.notes.push(format!(
                        "`{}` is tied to the output head: what is merged into one changes both, which \
                         a merge asks to be told: --tied both",
                        extracted.name
                    ));
                }
                report.quantised += usize::from(self.pairing.pairs[index].is_quantised());
                components.push(self.component(&self.pairing.pairs[index], extracted.rank, a, b));
                report.targets.push(extracted);
            } else {
                report.left_out.push(LeftOut {
                    name: extracted.name,
                    kind: self.pairing.pairs[index].kind,
                    change: self.changes[index],
                    reason: RANK_0,
                });
            }
        }
        if let Ranks::PerTensor(rules) = &self.options.ranks {
            report.notes.extend(rules.shadowed().map(|pattern| {
                format!("--rank-for {pattern} decides for nothing: rules before it match the same")
            }));
        }
        self.store_whole(&mut components, &mut report)?;
        for (index, fate) in self.fates.iter().enumerate() {
            let pair = &self.pairing.pairs[index];
            match fate {
                Fate::Unchanged => report.unchanged += 1,
                Fate::LeftOut(reason) => report.left_out.push(LeftOut {
                    name: pair.name.clone(),
                    kind: pair.kind,
                    change: self.changes[index],
                    reason,
                }),
                Fate::Factors(_) | Fate::Whole => {}
            }
        }
        report.unchanged += self.pairing.identical.len();
        self.balance(&report)?;
        if components.is_empty() {
            // There is nothing to go on from: the same would come out of it.
            work.empty()?;
            return Err(self.nothing(&report).into());
        }
        Ok((self.adapter(components), report))
    }

    /// Why there is no component.
    fn nothing(&self, report: &ExtractReport) -> ExtractError {
        let element = element_bytes(self.options.dtype);
        let sizes = self.targets().map(|(index, _)| {
            let (rows, cols) = self.pairing.pairs[index].matrix();
            (rows + cols) as u64 * element
        });
        let ranks = report.left_out.iter().filter(|one| one.reason == RANK_0).count();
        match (report.budget, sizes.min(), report.left_out.len()) {
            (Some((budget, ..)), Some(least), _) if budget < least => {
                BudgetError::Small { least, budget }.into()
            }
            _ if ranks > 0 => ExtractError::NoRank { changes: ranks },
            (_, _, 0) => {
                let reason = "no parameter that both models have differs".to_owned();
                ExtractError::Nothing { reason }
            }
            (_, _, count) => {
                let reason = format!("{count} parameters changed, and none of them was asked for");
                ExtractError::Nothing { reason }
            }
        }
    }

    /// The adapter without its values: every factor of rank 1 and zero, everything whole as it is. For
    /// asking whether a format has a place for it, before the work.
    ///
    /// # Errors
    /// [`Format`](crate::error::Error::Format) if a file cannot be mapped.
    pub fn outline(&self) -> Result<Adapter> {
        let mut components = Vec::new();
        for (index, _) in self.targets() {
            let pair = &self.pairing.pairs[index];
            let (rows, cols) = pair.matrix();
            let (left, right) = (Array2::zeros((rows, 1)), Array2::zeros((1, cols)));
            let (a, b) = self.factors(pair, left.view(), right.view());
            components.push(self.component(pair, 1, a, b));
        }
        self.store_whole(&mut components, &mut ExtractReport::default())?;
        Ok(self.adapter(components))
    }

    fn adapter(&self, components: Vec<Component>) -> Adapter {
        let base = &self.pairing.base;
        let name = base
            .config()
            .and_then(|config| config.get("_name_or_path"))
            .and_then(Value::as_str)
            .filter(|name| !name.is_empty())
            .map_or_else(|| base.path().display().to_string(), str::to_owned);
        let identity = BaseIdentity { name: Some(name), ..BaseIdentity::default() };
        let mut adapter = Adapter::new(self.pairing.tuned.path(), components, identity);
        if self.targets().any(|(index, _)| self.pairing.pairs[index].transposed) {
            adapter.fan_in_fan_out = Some(true);
        }
        adapter
    }

    /// All targets decomposed as far as the budget could reach, ranks allotted, then finished. Nothing
    /// is kept meanwhile: no target is finished before all are decomposed.
    fn run_budget(
        &self,
        targets: &[(usize, Choosing)],
        bytes: u64,
        limits: RankLimits,
        progress: &Progress,
        report: &mut ExtractReport,
    ) -> Result<Vec<Part>> {
        let found = self.in_parallel(targets, progress, |index, choosing| {
            self.decompose(index, choosing).map(|(found, ..)| found)
        })?;
        let size = element_bytes(self.options.dtype);
        let gains: Vec<Vec<f64>> = targets
            .iter()
            .zip(&found)
            .map(|(&(index, _), found)| {
                let mut gains = found.spectrum.gains();
                gains.truncate(found.rank());
                let reference = self.changes[index].base_energy;
                if self.options.relative && reference > 0.0 {
                    gains.iter_mut().for_each(|gain| *gain /= reference);
                }
                gains
            })
            .collect();
        let candidates: Vec<Candidate<'_>> = targets
            .iter()
            .zip(&gains)
            .map(|(&(index, choosing), gains)| {
                let pair = &self.pairing.pairs[index];
                let (rows, cols) = pair.matrix();
                let short = rows.min(cols);
                // Fewer components than were asked for are all that there are.
                let exhausted = matches!(choosing, Choosing::Budget { most }
                    if gains.len() < most.min(short));
                let most = if exhausted { gains.len() } else { short };
                let maximum = most.min(limits.maximum.unwrap_or(usize::MAX));
                Candidate {
                    name: &pair.name,
                    gains,
                    bytes_per_rank: (rows + cols) as u64 * size,
                    minimum: limits.minimum.min(maximum),
                    maximum,
                }
            })
            .collect();
        let allotment = budget::allot(&candidates, bytes).map_err(ExtractError::from)?;
        let ranks: Vec<usize> = allotment
            .ranks
            .iter()
            .zip(&found)
            .map(|(&rank, found)| rank.min(found.rank()))
            .collect();
        let spent =
            candidates.iter().zip(&ranks).map(|(of, &rank)| of.bytes_per_rank * rank as u64);
        report.budget = Some((bytes, spent.sum(), allotment.short_of_best));
        let name = |&index: &usize| candidates[index].name.to_owned();
        report.capped = allotment.capped.iter().map(name).collect();
        let costs: Vec<u64> =
            targets.iter().map(|&(index, _)| self.pairing.pairs[index].elements()).collect();
        self.schedule.run(
            &costs,
            || progress.is_cancelled(),
            |at| {
                let (index, found) = (targets[at].0, &found[at]);
                let choice = Choice { rank: ranks[at], bound: Bound::Policy };
                self.finish(index, found, choice, None)
            },
        )
    }

    /// Does something for every target, as [`Schedule`] shares them out; the results are in the
    /// targets' order.
    fn in_parallel<T: Send>(
        &self,
        targets: &[(usize, Choosing)],
        progress: &Progress,
        make: impl Fn(usize, Choosing) -> Result<T> + Sync,
    ) -> Result<Vec<T>> {
        let size = |at: usize| self.pairing.pairs[targets[at].0].elements();
        let costs: Vec<u64> = (0..targets.len()).map(size).collect();
        self.schedule.run(
            &costs,
            || progress.is_cancelled(),
            |at| {
                let (index, choosing) = targets[at];
                let made = make(index, choosing);
                let delta = self.mapped.delta(index);
                delta.release(0..delta.shape().0);
                progress.add(costs[at] * DECOMPOSING);
                made
            },
        )
    }

    fn decompose(
        &self,
        index: usize,
        choosing: Choosing,
    ) -> Result<(Decomposition, Choice, Option<NoiseEstimate>)> {
        let delta = self.mapped.delta(index);
        let change = &self.changes[index];
        let (rows, cols) = delta.shape();
        let reference = if self.options.relative { change.base_energy } else { change.energy };
        let mut svd = self.options.svd;
        let (policy, limits) = match choosing {
            Choosing::Policy(policy, limits) => (policy, limits),
            Choosing::Budget { most } => {
                let found =
                    decompose(&delta, change.energy, Goal::Rank(most.min(rows.min(cols))), &svd)
                        .map_err(ExtractError::from)?;
                let choice = Choice { rank: found.rank(), bound: Bound::Policy };
                return Ok((found, choice, None));
            }
        };
        let profiles = (policy == RankPolicy::Auto)
            .then(|| profiles(&delta))
            .map(|(energies, variances)| (energies, Storage::of(&variances)));
        let noise = |found: &Decomposition| {
            let (energies, storage) = profiles.as_ref()?;
            let (left, right) = (found.left.mapv(f64::from), found.right.t().mapv(f64::from));
            let rule = noise::Rule::default();
            let (left, right) = (left.view(), right.view());
            Some(noise::estimate_uneven(&found.spectrum, *storage, rule, energies, left, right))
        };
        let chosen = |found: &Decomposition| {
            let noise = noise(found);
            let norm = reference.sqrt();
            (choose(policy, &found.spectrum, noise.as_ref(), norm, limits), noise)
        };
        let short = rows.min(cols);
        let most = limits.maximum.unwrap_or(usize::MAX).min(short);
        // What chose the rank, with the vectors that were there then: fewer are returned.
        let last = Mutex::new(None);
        let wanted = |found: &Decomposition| {
            let (choice, noise) = chosen(found);
            *last.lock().unwrap_or_else(PoisonError::into_inner) = Some((choice, noise));
            if choice.bound.is_final() {
                Reached::At(choice.rank)
            } else {
                Reached::Beyond(choice.rank)
            }
        };
        svd.exact |= policy.needs_all() || self.is_fine(index, policy, most)?;
        let goal = match policy {
            RankPolicy::Rank(rank) => Goal::Rank(rank.max(limits.minimum).min(most).max(1)),
            _ => {
                let vectors = policy == RankPolicy::Auto;
                Goal::Until { wanted: &wanted, vectors, maximum: most }
            }
        };
        let found = decompose(&delta, change.energy, goal, &svd).map_err(ExtractError::from)?;
        let last = last.into_inner().unwrap_or_else(PoisonError::into_inner);
        let (mut choice, noise) = last.unwrap_or_else(|| chosen(&found));
        choice.rank = choice.rank.min(found.rank());
        Ok((found, choice, noise))
    }

    /// Whether a policy asks for less than single precision resolves in a decomposition of the leading
    /// values, so that only all of them tell which rank meets it. Where the greatest rank that is
    /// allowed leaves more than that, the others do too.
    fn is_fine(&self, index: usize, policy: RankPolicy, most: usize) -> Result<bool> {
        let change = &self.changes[index];
        let unresolved = UNRESOLVED * change.energy;
        if self.leaves(index, policy).is_none_or(|left| left >= unresolved) {
            return Ok(false);
        }
        let delta = self.mapped.delta(index);
        let (rows, cols) = delta.shape();
        if most.saturating_mul(4) > rows.min(cols) {
            return Ok(true);
        }
        let goal = Goal::Rank(most);
        let found = decompose(&delta, change.energy, goal, &self.options.svd);
        Ok(found.map_err(ExtractError::from)?.spectrum.remaining(most) < unresolved)
    }

    /// The energy that a policy allows to be left over, if it is one of those.
    fn leaves(&self, index: usize, policy: RankPolicy) -> Option<f64> {
        let change = &self.changes[index];
        let reference = if self.options.relative { change.base_energy } else { change.energy };
        policy.leaves(change.energy, reference.sqrt())
    }

    /// Whether the measured error is more than a policy asked for, by more than rounding to f32.
    fn misses(&self, index: usize, policy: RankPolicy, found: &Extracted) -> bool {
        /// Relative to what is asked for: ranks are chosen from values that are nearly right.
        const SLACK: f64 = 1e-3;
        let rounding = 4.0 * f64::from(f32::EPSILON).powi(2) * found.energy;
        found.bound != bound_name(Bound::Maximum)
            && self
                .leaves(index, policy)
                .is_some_and(|left| found.residual > left * (1.0 + SLACK) + rounding)
    }

    /// Factors as they are stored, and their certificate.
    fn finish(
        &self,
        index: usize,
        found: &Decomposition,
        choice: Choice,
        noise: Option<NoiseEstimate>,
    ) -> Result<Part> {
        let pair = &self.pairing.pairs[index];
        let change = &self.changes[index];
        let delta = self.mapped.delta(index);
        let (rows, cols) = delta.shape();
        let rank = choice.rank;
        let roots: Vec<f32> =
            found.spectrum.values.iter().take(rank).map(|value| value.sqrt() as f32).collect();
        let scale = ndarray::Array1::from(roots);
        let left = &found.left.slice(s![.., ..rank]) * &scale;
        let right = &found.right.slice(s![..rank, ..]) * &scale.insert_axis(ndarray::Axis(1));
        let left = self.rounded(&pair.name, left)?;
        let right = self.rounded(&pair.name, right)?;
        let isa = self.options.svd.isa;
        let residual = residual(&delta, change.energy, left.view(), right.view(), isa);
        let extracted = Extracted {
            name: pair.name.clone(),
            rows,
            cols,
            rank,
            bound: bound_name(choice.bound),
            energy: change.energy,
            base_energy: change.base_energy,
            residual,
            optimum: found.optimum.get(rank).copied().unwrap_or(0.0),
            exact: found.exact,
            values: found.spectrum.values.clone(),
            products: found.products,
            noise: noise.map(NoiseSummary::from),
        };
        let (a, b) = self.factors(pair, left.view(), right.view());
        Ok((extracted, a, b))
    }

    /// Values as the dtype will have them.
    fn rounded(&self, name: &str, factor: Array2<f32>) -> Result<Array2<f32>> {
        let dtype = self.options.dtype;
        let Some(float) = float_type(dtype) else { return Ok(factor) };
        let rounded = factor.mapv(|x| float.decode(float.encode(f64::from(x))));
        if rounded.iter().all(|x| x.is_finite()) {
            Ok(rounded)
        } else {
            Err(ExtractError::Overflow { name: name.to_owned(), dtype }.into())
        }
    }

    /// A and B of a parameter from the factors of its stored matrix.
    fn factors(
        &self,
        pair: &Pair,
        left: ArrayView2<'_, f32>,
        right: ArrayView2<'_, f32>,
    ) -> (Tensor, Tensor) {
        let (rank, dtype) = (left.ncols(), self.options.dtype);
        // Stored as (in, out), or as rows of a table: then the left factor is A's.
        let (a, b) = if is_swapped(pair) { (left.t(), right.t()) } else { (right, left) };
        let bytes = |factor: ArrayView2<'_, f32>| -> Vec<u8> {
            let float = float_type(dtype).unwrap_or(crate::kernels::FloatType::F32);
            let mut bytes = Vec::with_capacity(factor.len() * float.size());
            for &x in factor {
                bytes.extend_from_slice(&float.encode(f64::from(x)).to_le_bytes()[..float.size()]);
            }
            bytes
        };
        let (a_bytes, b_bytes) = (bytes(a), bytes(b));
        let [a_shape, b_shape] = shapes(pair, rank);
        let tensor = |name: &str, shape: Vec<usize>, bytes: Vec<u8>| {
            let Some(tensor) = Tensor::new(name.to_owned(), dtype, shape, bytes) else {
                unreachable!("as many bytes as the shape says")
            };
            tensor
        };
        (tensor("a", a_shape, a_bytes), tensor("b", b_shape, b_bytes))
    }

    fn component(&self, pair: &Pair, rank: usize, a: Tensor, b: Tensor) -> Component {
        let layer = match pair.kind {
            Kind::Convolution => Layer::Convolution,
            Kind::Embedding => Layer::Embedding,
            _ => Layer::Linear,
        };
        let scaling = Scaling { alpha: rank as f64, rule: ScalingRule::AlphaOverRank };
        let form = LowRank { layer, ..LowRank::linear(a, b, scaling) };
        Component { target: target(&pair.name), form: Form::LowRank(form) }
    }

    /// Other parameters of the base that a table is: the head that it is tied to in both models, by the
    /// name that the base has or would have for it, and copies that only the base stores.
    fn other_names(&self, table: &str) -> BTreeSet<String> {
        let mut names = BTreeSet::new();
        let pair = self.pairing.pairs.iter().find(|pair| pair.name == table);
        if pair.is_some_and(|pair| pair.tie == Tie::Both) {
            let mut stored = self.pairing.base_parameters().all().iter();
            let head = stored.find(|parameter| vocabulary::is_output_head(&parameter.name));
            names.extend(head.map(|head| head.name.clone()).or_else(|| vocabulary::head_of(table)));
        }
        names.extend(self.pairing.notes.iter().filter_map(|note| match note {
            PairNote::Repeats { side: Side::Base, name, of } if of == table => Some(name.clone()),
            _ => None,
        }));
        names
    }

    /// Whether a parameter is one of two that the base ties.
    fn is_tied(&self, name: &str) -> bool {
        let ends = vocabulary::is_input_embedding(name) || vocabulary::is_output_head(name);
        ends && !self.other_names(name).is_empty()
    }

    /// Parameters that are stored whole, as they lie in the fine-tuned model's files.
    fn store_whole(
        &self,
        components: &mut Vec<Component>,
        report: &mut ExtractReport,
    ) -> Result<()> {
        // A table that the fine-tuned model ties is what several parameters of the base became.
        let mut wanted: BTreeMap<&str, Vec<Whole>> = BTreeMap::new();
        for (index, fate) in self.fates.iter().enumerate() {
            if matches!(fate, Fate::Whole) {
                let pair = &self.pairing.pairs[index];
                let entry = (pair.name.clone(), pair.kind, Some(self.changes[index]));
                wanted.entry(&pair.tuned_name).or_default().push(entry);
            }
        }
        for name in &self.new_whole {
            wanted.entry(name).or_default().push((name.clone(), Kind::Other, None));
        }
        if wanted.is_empty() {
            return Ok(());
        }
        for shard in self.pairing.tuned.shards() {
            for tensor in map_all(&shard.file)? {
                for (name, kind, change) in wanted.remove(tensor.name.as_str()).unwrap_or_default()
                {
                    // A table that the base has under several names replaces all of them: no merge
                    // has to ask which is meant.
                    for other in self.other_names(&name) {
                        let form = Form::Replaced(tensor.clone());
                        components.push(Component { target: target(&other), form });
                        report
                            .notes
                            .push(format!("`{name}` is `{other}` too: it is stored as both"));
                    }
                    let form = Form::Replaced(tensor.clone());
                    components.push(Component { target: target(&name), form });
                    report.whole.push((name, kind, change));
                }
            }
        }
        Ok(())
    }

    /// Every parameter of both models is in one list of the report.
    fn balance(&self, report: &ExtractReport) -> Result<()> {
        let pairs = self.pairing.pairs.len() + self.pairing.identical.len();
        let parameters = pairs + self.new_whole.len();
        let ExtractReport { targets, whole, left_out, unchanged, .. } = report;
        let accounted = targets.len() + whole.len() + left_out.len() + unchanged;
        if accounted == parameters {
            Ok(())
        } else {
            Err(ExtractError::Unaccounted { accounted, parameters }.into())
        }
    }
}

/// A parameter to store whole: its name in the base, what it is, and how it changed if it is no new one.
type Whole = (String, Kind, Option<Change>);

/// A finished target: its report, A and B.
type Part = (Extracted, Tensor, Tensor);

/// Whether the left factor of a parameter's stored matrix is A's: it is stored as (in, out), or as the
/// rows of a table.
fn is_swapped(pair: &Pair) -> bool {
    pair.transposed || pair.kind == Kind::Embedding
}

/// The shapes of A and B of a rank.
fn shapes(pair: &Pair, rank: usize) -> [Vec<usize>; 2] {
    let (rows, cols) = pair.matrix();
    match pair.shape.as_slice() {
        [_, rest @ ..] if pair.kind == Kind::Convolution => {
            let ones = vec![1; rest.len().saturating_sub(1)];
            [[&[rank], rest].concat(), [&[rows, rank], ones.as_slice()].concat()]
        }
        _ if is_swapped(pair) => [vec![rank, rows], vec![cols, rank]],
        _ => [vec![rank, cols], vec![rows, rank]],
    }
}

fn target(name: &str) -> Target {
    let (module, parameter) = name.rsplit_once('.').unwrap_or(("", name));
    Target { module: module.to_owned(), parameter: parameter.to_owned() }
}

/// The names of kinds that `--full` takes.
const FULL_NORMS: &str = "norms";
const FULL_BIASES: &str = "biases";
const FULL_EMBEDDINGS: &str = "embeddings";

fn table(option: &'static str, patterns: &[String]) -> Result<PatternTable> {
    let map: Map<String, Value> =
        patterns.iter().map(|pattern| (pattern.clone(), Value::from(0))).collect();
    let path = std::path::Path::new("command line");
    Ok(PatternTable::compile(path, option, Some(&Value::Object(map)))?)
}

fn matches(table: &mut PatternTable, name: &str) -> Result<bool> {
    Ok(table.lookup(name)?.is_some() || table.lookup(module_of(name))?.is_some())
}

/// What `--full` asks for: the kinds, and the patterns of names.
fn split_full(full: &[String]) -> (Vec<&str>, Vec<String>) {
    let (kinds, patterns): (Vec<&String>, Vec<&String>) = full
        .iter()
        .partition(|name| [FULL_NORMS, FULL_BIASES, FULL_EMBEDDINGS].contains(&name.as_str()));
    (kinds.into_iter().map(String::as_str).collect(), patterns.into_iter().cloned().collect())
}

/// Refuses patterns that match no name: they are mistyped, and that is told before any work. One that
/// matches what did not change, or a table that gets no factors, is none of those.
fn refuse_unmatched(pairing: &Pairing, options: &mut ExtractOptions) -> Result<()> {
    let (_, patterns) = split_full(&options.full);
    let (mut full, mut include) =
        (table("--full", &patterns)?, table("--include", &options.include)?);
    let paired = pairing.pairs.iter().map(|pair| &pair.name).chain(&pairing.identical);
    for name in paired {
        matches(&mut full, name)?;
        matches(&mut include, name)?;
        if let Ranks::PerTensor(rules) = &mut options.ranks {
            rules.of_parameter(name).map_err(ExtractError::from)?;
        }
    }
    for name in &pairing.only_tuned {
        matches(&mut full, name)?;
    }
    let names = pairing.pairs.iter().map(|pair| &pair.name).chain(&pairing.identical);
    let names: Vec<&str> = names.chain(&pairing.only_tuned).map(String::as_str).collect();
    let kinds = [FULL_NORMS, FULL_BIASES, FULL_EMBEDDINGS];
    let unmatched = |option: &str, key: &str| {
        let kinds = kinds.iter().copied().filter(|_| option == "--full");
        describe_unmatched(option, key, names.iter().copied().chain(kinds))
    };
    let mut patterns: Vec<String> = full.dead_keys().map(|key| unmatched("--full", key)).collect();
    patterns.extend(include.dead_keys().map(|key| unmatched("--include", key)));
    if let Ranks::PerTensor(rules) = &options.ranks {
        patterns.extend(rules.unmatched().map(|key| unmatched("--rank-for", key)));
    }
    if patterns.is_empty() { Ok(()) } else { Err(ExtractError::Unmatched { patterns }.into()) }
}

/// A pattern that matches nothing, with what it may have meant.
pub(crate) fn describe_unmatched<'a>(
    option: &str,
    pattern: &str,
    names: impl IntoIterator<Item = &'a str>,
) -> String {
    let near: Vec<String> =
        nearest(pattern, names).into_iter().map(|part| format!("`{part}`")).collect();
    match near.is_empty() {
        true => format!("{option} {pattern}"),
        false => format!("{option} {pattern} (nearest: {})", near.join(", ")),
    }
}

/// The module of a parameter.
fn module_of(name: &str) -> &str {
    name.rsplit_once('.').map_or(name, |(module, _)| module)
}

fn decide(
    pairing: &Pairing,
    changes: &[Change],
    options: &mut ExtractOptions,
) -> Result<(Vec<Fate>, Vec<String>)> {
    let (kinds, patterns) = split_full(&options.full);
    let (mut full, mut include) =
        (table("--full", &patterns)?, table("--include", &options.include)?);
    let asked = |kind: &str| kinds.contains(&kind);
    let uniform = uniform_rank(pairing, changes, options);
    let mut fates = Vec::with_capacity(changes.len());
    for (pair, change) in pairing.pairs.iter().zip(changes) {
        let grown = pair.rows_added() + pair.rows_removed() > 0;
        if change.is_unchanged() && !grown {
            fates.push(Fate::Unchanged);
            continue;
        }
        let whole = match pair.kind {
            Kind::Norm => asked(FULL_NORMS),
            Kind::Bias => asked(FULL_BIASES),
            Kind::Embedding | Kind::Head => asked(FULL_EMBEDDINGS),
            _ => false,
        };
        if matches(&mut full, &pair.name)? || whole {
            // Its codes lie in a file, its values nowhere.
            if let Source::Quantised(_) = pair.tuned_source {
                return Err(ExtractError::Quantised { name: pair.name.clone() }.into());
            }
            fates.push(Fate::Whole);
            continue;
        }
        let included = matches(&mut include, &pair.name)?;
        fates.push(match pair.kind {
            _ if change.is_unchanged() => {
                Fate::LeftOut("its rows differ in number, its values do not")
            }
            Kind::Linear | Kind::Convolution if pair.orientation_doubt.is_some() => {
                Fate::LeftOut("it is not clear whether it is stored as (in, out)")
            }
            Kind::Linear | Kind::Convolution => choosing(&mut options.ranks, &pair.name, uniform)?,
            Kind::Embedding | Kind::Head if included && !grown => {
                choosing(&mut options.ranks, &pair.name, uniform)?
            }
            Kind::Embedding | Kind::Head if grown => Fate::LeftOut("its rows differ in number"),
            Kind::Embedding | Kind::Head => Fate::LeftOut("tables and heads were not asked for"),
            Kind::Stack => Fate::LeftOut("factors of fused experts are not made"),
            Kind::Norm | Kind::Bias | Kind::Other => Fate::LeftOut("it is no matrix"),
        });
    }
    let mut new_whole = Vec::new();
    for name in &pairing.only_tuned {
        if matches(&mut full, name)? {
            let tuned = pairing.tuned_parameters();
            let source = tuned.find(name).map(|index| tuned.get(index).source);
            if !matches!(source, Some(Source::Plain(_))) {
                return Err(ExtractError::Quantised { name: name.clone() }.into());
            }
            new_whole.push(name.clone());
        }
    }
    Ok((fates, new_whole))
}

/// How the rank of a parameter is chosen.
fn choosing(ranks: &mut Ranks, name: &str, uniform: usize) -> Result<Fate> {
    let rules = match ranks {
        Ranks::PerTensor(rules) => rules,
        Ranks::Budget { .. } => return Ok(Fate::Factors(Choosing::Budget { most: uniform })),
    };
    Ok(match rules.of_parameter(name).map_err(ExtractError::from)? {
        Ruling::Skip => Fate::LeftOut("a rule skips it"),
        Ruling::Choose(policy, limits) => Fate::Factors(Choosing::Policy(policy, limits)),
    })
}

fn bound_name(bound: Bound) -> String {
    format!("{bound:?}").to_lowercase()
}

/// Bytes of an element of a factor.
fn element_bytes(dtype: Dtype) -> u64 {
    float_type(dtype).map_or(4, |float| float.size() as u64)
}

/// The rank up to which a budget's targets are decomposed: four times what each would have if all
/// had the same, at least 16.
fn uniform_rank(pairing: &Pairing, changes: &[Change], options: &ExtractOptions) -> usize {
    let Ranks::Budget { bytes, limits } = options.ranks else { return 0 };
    let linear = |(pair, change): &(&Pair, &Change)| {
        matches!(pair.kind, Kind::Linear | Kind::Convolution) && !change.is_unchanged()
    };
    let per_rank: u64 = (pairing.pairs.iter().zip(changes))
        .filter(linear)
        .map(|(pair, _)| {
            let (rows, cols) = pair.matrix();
            (rows + cols) as u64 * element_bytes(options.dtype)
        })
        .sum();
    let each = bytes.checked_div(per_rank).unwrap_or(0);
    let most = usize::try_from(each.saturating_mul(4)).unwrap_or(usize::MAX).max(16);
    most.min(limits.maximum.unwrap_or(usize::MAX)).max(limits.minimum)
}

/// The spectrum of an extracted target, as far as it was computed.
impl Extracted {
    /// What is known of its singular values.
    #[must_use]
    pub fn spectrum(&self) -> Spectrum {
        let Extracted { rows, cols, energy, ref values, .. } = *self;
        Spectrum { rows, cols, energy, values: values.clone() }
    }
}
