//! Several adapters of one base as one adapter: the weighted sum of their changes, exactly, or what
//! an elementwise method makes of them.
//!
//! | file          | owns                                                                      |
//! |---------------|---------------------------------------------------------------------------|
//! | `concatenate` | `Σ wᵢ·sᵢ·Bᵢ·Aᵢ` as one product: factors side by side, scales folded into B |
//! | `elementwise` | TIES, DARE and magnitude pruning of the changes themselves                |
//! | `dense`       | one target's changes formed, combined and factored again                  |
//! | `identity`    | what may be said of the result: base, configuration, metadata             |
//!
//! Changes add up only if they do not depend on the weight: DoRA, IA³, OFT and their like are
//! refused by name. What an adapter stores in full (saved modules, rows, copies of the base) is
//! carried along if all that have it agree, and cannot be weighted. A form that is additive but no
//! product of two factors passes, scaled, where one adapter alone changes the parameter.
//!
//! Parameters are matched by name; adapters that spell names in different formats are refused.

mod concatenate;
mod dense;
mod elementwise;
mod identity;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lora_format::model::{Adapter, AdapterFormat, Component, Form, LowRank, Target};
use lora_format::pattern::PatternTable;
use lora_format::{Dtype, Tensor};
use rayon::iter::{IntoParallelRefIterator, ParallelIterator};
use serde_json::{Map, Value};

use crate::WeightedAdapter;
use crate::engine::Progress;
use crate::error::Error;
use crate::factored::FactoredError;
use crate::rank::{RankError, RankRules};

pub use dense::Factoring;
pub use elementwise::{Disjoint, Election, Elementwise, Sparsifier};

/// How adapters are combined.
#[derive(Debug)]
pub enum Method {
    /// `Σ wᵢ·ΔWᵢ` as one product of rank Σ rᵢ.
    Concatenate,
    /// An elementwise method on the ΔWᵢ, factored again.
    Elementwise {
        /// The method.
        method: Elementwise,
        /// The ranks of the factors; without them, a target has the largest of its inputs' ranks.
        ranks: Option<Box<RankRules>>,
    },
}

/// What else is asked for.
#[derive(Debug, Default)]
pub struct CombineOptions {
    /// Weights by module, on top of those of the adapters.
    pub weights: Option<WeightRules>,
    /// The dtype of the factors; without it, that of the inputs as far as it holds the result
    /// exactly, otherwise f32.
    pub dtype: Option<Dtype>,
    /// Combine adapters whose fingerprints say that they were trained on different bases.
    pub allow_different_base: bool,
}

/// Adapters cannot be combined.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CombineError {
    /// Components that have no sum.
    #[error("{}", list(problems))]
    Components {
        /// What each of them is: name and reason.
        problems: Vec<(String, CombineProblem)>,
    },
    /// Names of different kinds.
    #[error(
        "{} names its modules as {first_format} does and {} as {second_format} does: which are the \
         same is not known here",
        first.display(), second.display()
    )]
    Spelling {
        /// One adapter.
        first: PathBuf,
        /// Its format.
        first_format: AdapterFormat,
        /// Another.
        second: PathBuf,
        /// Its format.
        second_format: AdapterFormat,
    },
    /// Fingerprints that differ.
    #[error(
        "{} and {} were trained on different bases: {equal} of {compared} sampled values agree, \
         the first that differ are in `{target}`",
        first.display(), second.display()
    )]
    DifferentBase {
        /// One adapter.
        first: PathBuf,
        /// Another.
        second: PathBuf,
        /// Samples that agree.
        equal: usize,
        /// Samples compared.
        compared: usize,
        /// The first target that differs.
        target: String,
    },
    /// Fewer than two adapters.
    #[error("there is nothing to combine: give two adapters or more")]
    Few,
    /// Nothing has a weight.
    #[error("every weight is 0: nothing is left")]
    Empty,
    /// A weight that is no number.
    #[error("a weight of {weight} is not finite")]
    Weight {
        /// The weight.
        weight: f64,
    },
    /// A rule for weights is not written as one.
    #[error("`{rule}`: {problem}")]
    Rule {
        /// The rule.
        rule: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Rules for ranks.
    #[error(transparent)]
    Rank(#[from] RankError),
    /// Reading, or an interruption.
    #[error(transparent)]
    Merge(#[from] Error),
}

impl From<lora_format::Error> for CombineError {
    fn from(error: lora_format::Error) -> CombineError {
        CombineError::Merge(error.into())
    }
}

/// Why one parameter's changes cannot be combined.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum CombineProblem {
    /// f(W) − W depends on W.
    #[error(
        "{0}: its change depends on the weight, so that changes of several adapters do not add up"
    )]
    NotAdditive(&'static str),
    /// Additive, but there is more than one change, or a method that needs factors.
    #[error("{0}: its change is no product of two factors, and only such changes are combined")]
    NotFactors(&'static str),
    /// Factors that are damaged or cannot be stored.
    #[error(transparent)]
    Factors(#[from] FactoredError),
    /// Changes of different shapes or kinds of layer.
    #[error("{first} in one adapter and {second} in another")]
    Shapes {
        /// The first's.
        first: String,
        /// Another's.
        second: String,
    },
    /// Stored in full with different values.
    #[error(
        "several adapters store it in full ({0}), with different values: there is no sum of those"
    )]
    Replaced(&'static str),
    /// Stored in full and weighted.
    #[error(
        "{method}: it is stored in full, and what is stored in full cannot be weighted (its weights \
         add up to {sum})"
    )]
    Weighted {
        /// The method.
        method: &'static str,
        /// The sum of the weights.
        sum: f64,
    },
    /// Stored in full by one and changed by another.
    #[error("one adapter stores it in full, another changes it")]
    ReplacedAndChanged,
    /// More ranks than a format holds.
    #[error("a rank of {rank} is more than {limit}")]
    Rank {
        /// The sum of the ranks.
        rank: usize,
        /// The limit.
        limit: usize,
    },
}

/// Weights by module: `PATTERN=WEIGHT`; the first pattern that matches multiplies the weight.
/// Patterns match as the keys of PEFT's `alpha_pattern` do ([`lora_format::pattern`]).
#[derive(Debug)]
pub struct WeightRules {
    table: PatternTable,
}

impl WeightRules {
    /// Reads the rules.
    ///
    /// # Errors
    /// [`CombineError::Rule`], [`CombineError::Merge`] for patterns that cannot be compiled.
    pub fn new<'a>(rules: impl IntoIterator<Item = &'a str>) -> Result<WeightRules, CombineError> {
        let mut patterns = Map::new();
        for rule in rules {
            let fail = |problem| CombineError::Rule { rule: rule.to_owned(), problem };
            // The last one: a pattern may hold `=`, as look-around does.
            let (pattern, weight) =
                rule.rsplit_once('=').ok_or_else(|| fail("it is not PATTERN=WEIGHT"))?;
            let weight: f64 = weight.parse().map_err(|_| fail("the weight is no number"))?;
            if !weight.is_finite() {
                return Err(fail("the weight is not finite"));
            }
            if pattern.is_empty() {
                return Err(fail("the pattern is empty"));
            }
            if patterns.insert(pattern.to_owned(), Value::from(weight)).is_some() {
                return Err(fail("another rule has the same pattern"));
            }
        }
        let patterns = Value::Object(patterns);
        let table =
            PatternTable::compile(Path::new("command line"), "weight rules", Some(&patterns))?;
        Ok(WeightRules { table })
    }

    fn of(&mut self, target: &Target) -> Result<f64, CombineError> {
        let name = if target.module.is_empty() { &target.parameter } else { &target.module };
        Ok(self.table.lookup(name)?.map_or(1.0, |found| found.value))
    }
}

/// What was done.
#[derive(Clone, Debug, Default)]
pub struct CombineReport {
    /// Parameters with factors, in the result's order.
    pub targets: Vec<Combined>,
    /// Other components of the result.
    pub others: Vec<Other>,
    /// Parameters whose weights are all 0.
    pub left_out: Vec<String>,
    /// Patterns of weight and rank rules that no module matched.
    pub unmatched: Vec<String>,
    /// What the user should know.
    pub warnings: Vec<String>,
}

/// One parameter with factors.
#[derive(Clone, Debug)]
pub struct Combined {
    /// The parameter.
    pub name: String,
    /// m.
    pub rows: usize,
    /// n; of a convolution, with the kernel's positions.
    pub cols: usize,
    /// The adapters' parts.
    pub parts: Vec<Part>,
    /// The rank of the result.
    pub rank: usize,
    /// The dtype of its factors.
    pub dtype: Dtype,
    /// ‖·‖²_F of what is to be represented: the weighted sum, or the elementwise method's matrix.
    pub energy: f64,
    /// ‖that − s·B·A‖_F of the factors as they are stored.
    pub residual: f64,
    /// Of an elementwise method: what factoring met.
    pub factoring: Option<Factoring>,
    /// Bytes of its factors.
    pub bytes: u64,
}

impl Combined {
    /// The residual relative to the norm; 0 if there is none.
    #[must_use]
    pub fn relative(&self) -> f64 {
        if self.residual == 0.0 { 0.0 } else { self.residual / self.energy.sqrt() }
    }
}

/// What one adapter gives to a parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Part {
    /// Index of the adapter.
    pub adapter: usize,
    /// Its rank.
    pub rank: usize,
    /// Its weight, with the rules'.
    pub weight: f64,
    /// Its own s.
    pub scale: f64,
    /// Elements of its factors that had to be rounded; 0 of what is exact. `None` of an elementwise
    /// method, which keeps no factors.
    pub rounded: Option<u64>,
}

/// A component without factors.
#[derive(Clone, Debug, PartialEq)]
pub struct Other {
    /// The parameter.
    pub name: String,
    /// Its method.
    pub method: &'static str,
    /// Indices of the adapters that have it.
    pub adapters: Vec<usize>,
    /// Elements that had to be rounded.
    pub rounded: u64,
}

/// A component of one of the adapters.
#[derive(Clone, Copy)]
struct Piece<'a> {
    adapter: usize,
    form: &'a Form,
    weight: f64,
}

/// A low-rank piece.
#[derive(Clone, Copy)]
struct Factors<'a> {
    adapter: usize,
    form: &'a LowRank,
    weight: f64,
}

/// What became of one parameter.
type Outcome = Result<(LowRank, Combined), CombineProblem>;

/// How much [`combine`] reports to its `Progress`: what the ΔW of all parameters would take in f32.
#[must_use]
pub fn amount(adapters: &[WeightedAdapter]) -> u64 {
    let mut sizes: BTreeMap<&Target, u64> = BTreeMap::new();
    for component in adapters.iter().flat_map(|one| &one.adapter.components) {
        if let Form::LowRank(form) = &component.form {
            sizes.insert(&component.target, bytes_formed(form));
        }
    }
    sizes.values().fold(0, |sum, size| sum.saturating_add(*size))
}

fn bytes_formed(form: &LowRank) -> u64 {
    let elements = (form.out_features() as u64).saturating_mul(form.in_features() as u64);
    elements.saturating_mul(4)
}

/// Combines adapters, on the threads of the current pool. The result does not depend on their
/// number.
///
/// # Errors
/// [`CombineError`], with every component that cannot be combined.
pub fn combine(
    adapters: &[WeightedAdapter],
    method: Method,
    mut options: CombineOptions,
    progress: &Progress,
) -> Result<(Adapter, CombineReport), CombineError> {
    if adapters.len() < 2 {
        return Err(CombineError::Few);
    }
    if let Some(one) = adapters.iter().find(|one| !one.weight.is_finite()) {
        return Err(CombineError::Weight { weight: one.weight });
    }
    identity::same_spelling(adapters)?;
    let warnings = identity::same_base(adapters, options.allow_different_base)?;
    let mut report = CombineReport { warnings, ..CombineReport::default() };
    let mut sorted = Sorted::of(adapters, options.weights.as_mut(), &method, &mut report)?;
    let (forms, combined) = factors(&mut sorted, method, &options, progress, &mut report)?;
    let mut components = others(&sorted, &forms, &mut report)?;
    report.targets = combined;
    for (target, form) in forms {
        components.push(Component { target: target.clone(), form: Form::LowRank(form) });
    }
    if components.is_empty() {
        return Err(CombineError::Empty);
    }
    if let Some(weights) = &options.weights {
        report.unmatched.extend(weights.table.dead_keys().map(str::to_owned));
    }
    Ok((identity::adapter(adapters, components), report))
}

/// The components of all adapters by parameter and by what is done with them.
#[derive(Default)]
struct Sorted<'a> {
    factors: BTreeMap<&'a Target, Vec<Factors<'a>>>,
    added: BTreeMap<&'a Target, Vec<Piece<'a>>>,
    whole: BTreeMap<&'a Target, Vec<Piece<'a>>>,
    alone: BTreeMap<&'a Target, Piece<'a>>,
}

impl<'a> Sorted<'a> {
    fn of(
        adapters: &'a [WeightedAdapter],
        mut rules: Option<&mut WeightRules>,
        method: &Method,
        report: &mut CombineReport,
    ) -> Result<Sorted<'a>, CombineError> {
        let mut pieces: BTreeMap<&Target, Vec<Piece<'_>>> = BTreeMap::new();
        for (adapter, one) in adapters.iter().enumerate() {
            for Component { target, form } in &one.adapter.components {
                let rule = rules.as_mut().map_or(Ok(1.0), |rules| rules.of(target))?;
                let weight = one.weight * rule;
                pieces.entry(target).or_default().push(Piece { adapter, form, weight });
            }
        }
        let mut sorted = Sorted::default();
        let mut problems = Vec::new();
        for (target, pieces) in pieces {
            let weighs = |piece: &Piece<'_>| piece.weight != 0.0 || is_whole(piece.form);
            let pieces: Vec<Piece<'_>> = pieces.into_iter().filter(weighs).collect();
            if pieces.is_empty() {
                report.left_out.push(target.name());
            }
            if let Err(problem) = sorted.sort(target, pieces, method) {
                problems.push((target.name(), problem));
            }
        }
        if problems.is_empty() { Ok(sorted) } else { Err(CombineError::Components { problems }) }
    }

    fn sort(
        &mut self,
        target: &'a Target,
        pieces: Vec<Piece<'a>>,
        method: &Method,
    ) -> Result<(), CombineProblem> {
        let count = pieces.len();
        let whole: Vec<usize> = pieces
            .iter()
            .filter(|one| matches!(one.form, Form::Replaced(_)))
            .map(|one| one.adapter)
            .collect();
        let changes = |one: &&Piece<'_>| !is_whole(one.form);
        if !whole.is_empty()
            && pieces.iter().filter(changes).any(|one| !whole.contains(&one.adapter))
        {
            return Err(CombineProblem::ReplacedAndChanged);
        }
        for piece in pieces {
            let Piece { adapter, form, weight } = piece;
            match form {
                Form::LowRank(form) if form.magnitude.is_none() => {
                    self.factors.entry(target).or_default().push(Factors { adapter, form, weight });
                }
                Form::Added { .. } => self.added.entry(target).or_default().push(piece),
                form if is_whole(form) => self.whole.entry(target).or_default().push(piece),
                form if !form.is_additive() => {
                    return Err(CombineProblem::NotAdditive(form.method()));
                }
                form if count == 1
                    && matches!(method, Method::Concatenate)
                    && scaled(form, 1.0).is_some() =>
                {
                    self.alone.insert(target, piece);
                }
                form => return Err(CombineProblem::NotFactors(form.method())),
            }
        }
        Ok(())
    }
}

/// Whether a component is stored in full: a value, and no change.
fn is_whole(form: &Form) -> bool {
    matches!(form, Form::Replaced(_) | Form::Rows { .. } | Form::Base(_))
}

/// A form that has a scale of its own, with the scale times `weight`.
fn scaled(form: &Form, weight: f64) -> Option<Form> {
    let mut form = form.clone();
    let scaling = match &mut form {
        Form::Tucker(form) => &mut form.scaling,
        Form::Hadamard(form) => &mut form.scaling,
        Form::Kronecker(form) => &mut form.scaling,
        Form::Grid(form) => &mut form.scaling,
        _ => return None,
    };
    scaling.alpha *= weight;
    Some(form)
}

type Job<'a> = (&'a Target, Vec<Factors<'a>>);
type Forms<'a> = BTreeMap<&'a Target, LowRank>;

/// The low-rank changes.
fn factors<'a>(
    sorted: &mut Sorted<'a>,
    method: Method,
    options: &CombineOptions,
    progress: &Progress,
    report: &mut CombineReport,
) -> Result<(Forms<'a>, Vec<Combined>), CombineError> {
    let jobs: Vec<Job<'a>> = std::mem::take(&mut sorted.factors).into_iter().collect();
    let outcomes: Vec<Outcome> = match method {
        Method::Concatenate => beside_each_other(&jobs, progress, |target, parts| {
            concatenate::concatenate(target.name(), parts, options.dtype)
        })?,
        Method::Elementwise { method, mut ranks } => {
            // One parameter after the other, each on all threads: that bounds the memory.
            let mut outcomes = Vec::with_capacity(jobs.len());
            for (target, parts) in &jobs {
                if progress.is_cancelled() {
                    return Err(Error::Interrupted.into());
                }
                let ruling = ranks.as_mut().map(|ranks| ranks.of(module(target))).transpose()?;
                outcomes.push(dense::combine(target.name(), parts, &method, ruling, options.dtype));
                progress.add(parts.first().map_or(0, |part| bytes_formed(part.form)));
            }
            if let Some(ranks) = &ranks {
                report.unmatched.extend(ranks.unmatched().map(str::to_owned));
            }
            outcomes
        }
    };
    let mut forms = BTreeMap::new();
    let mut combined = Vec::with_capacity(jobs.len());
    let mut problems = Vec::new();
    for ((target, _), outcome) in jobs.into_iter().zip(outcomes) {
        match outcome {
            Ok((form, one)) => {
                forms.insert(target, form);
                combined.push(one);
            }
            Err(problem) => problems.push((target.name(), problem)),
        }
    }
    if !problems.is_empty() {
        return Err(CombineError::Components { problems });
    }
    Ok((forms, combined))
}

/// Jobs that are small enough to run beside each other.
fn beside_each_other(
    jobs: &[Job<'_>],
    progress: &Progress,
    work: impl Fn(&Target, &[Factors<'_>]) -> Outcome + Sync,
) -> Result<Vec<Outcome>, CombineError> {
    let one = |(target, parts): &Job<'_>| {
        if progress.is_cancelled() {
            return Err(CombineError::from(Error::Interrupted));
        }
        let outcome = work(target, parts);
        progress.add(parts.first().map_or(0, |part| bytes_formed(part.form)));
        Ok(outcome)
    };
    jobs.par_iter().map(one).collect()
}

/// What a rule's pattern is held against.
fn module(target: &Target) -> &str {
    if target.module.is_empty() { &target.parameter } else { &target.module }
}

/// Components without factors.
fn others(
    sorted: &Sorted<'_>,
    forms: &Forms<'_>,
    report: &mut CombineReport,
) -> Result<Vec<Component>, CombineError> {
    let mut components = Vec::new();
    let mut problems = Vec::new();
    for (&target, pieces) in &sorted.added {
        // PEFT gives a change of the bias the scale of the factors beside it.
        let beside = forms.iter().find(|(other, _)| other.module == target.module);
        let scale = beside.map_or(1.0, |(_, form)| form.scale());
        match concatenate::add(pieces, scale) {
            Ok((form, rounded)) => {
                report.others.push(describe(target, &form, pieces, rounded));
                components.push(Component { target: target.clone(), form });
            }
            Err(problem) => problems.push((target.name(), problem)),
        }
    }
    for (&target, pieces) in &sorted.whole {
        // One of each kind: a parameter may have a copy of the base and rows.
        for kind in ["replaced", "token rows", "base copy"] {
            let pieces: Vec<Piece<'_>> =
                pieces.iter().copied().filter(|piece| piece.form.method() == kind).collect();
            match agreed(&pieces) {
                Ok(None) => {}
                Ok(Some(form)) => {
                    report.others.push(describe(target, form, &pieces, 0));
                    components.push(Component { target: target.clone(), form: form.clone() });
                }
                Err(problem) => problems.push((target.name(), problem)),
            }
        }
    }
    for (&target, piece) in &sorted.alone {
        if let Some(form) = scaled(piece.form, piece.weight) {
            report.others.push(describe(target, &form, &[*piece], 0));
            components.push(Component { target: target.clone(), form });
        }
    }
    if problems.is_empty() { Ok(components) } else { Err(CombineError::Components { problems }) }
}

fn describe(target: &Target, form: &Form, pieces: &[Piece<'_>], rounded: u64) -> Other {
    let adapters = pieces.iter().map(|piece| piece.adapter).collect();
    Other { name: target.name(), method: form.method(), adapters, rounded }
}

/// What all adapters that store a parameter in full agree on. `W + Σ wᵢ·(T − W)` is T only if the
/// weights add up to 1; where each of them is 1, all of them want T.
fn agreed<'a>(pieces: &[Piece<'a>]) -> Result<Option<&'a Form>, CombineProblem> {
    /// Decimal weights such as 0.7 and 0.3 do not add up to 1 in binary.
    const NEARLY: f64 = 1e-9;
    let Some((first, rest)) = pieces.split_first() else { return Ok(None) };
    let method = first.form.method();
    if !rest.iter().all(|piece| same(first.form, piece.form)) {
        return Err(CombineProblem::Replaced(method));
    }
    let sum: f64 = pieces.iter().map(|piece| piece.weight).sum();
    let whole = (sum - 1.0).abs() <= NEARLY || pieces.iter().all(|piece| piece.weight == 1.0);
    // A copy of the base is no change: it has no weight.
    if whole || matches!(first.form, Form::Base(_)) {
        Ok(Some(first.form))
    } else {
        Err(CombineProblem::Weighted { method, sum })
    }
}

fn same(first: &Form, second: &Form) -> bool {
    let equal =
        |a: &Tensor, b: &Tensor| a.dtype == b.dtype && a.shape == b.shape && a.bytes() == b.bytes();
    match (first, second) {
        (Form::Replaced(a), Form::Replaced(b)) | (Form::Base(a), Form::Base(b)) => equal(a, b),
        (Form::Rows { indices: at, rows: a }, Form::Rows { indices: bt, rows: b }) => {
            at == bt && equal(a, b)
        }
        _ => false,
    }
}

/// Problems, the first of many.
fn list(problems: &[(String, CombineProblem)]) -> String {
    const SHOWN: usize = 10;
    let line = |(name, problem): &(String, CombineProblem)| format!("`{name}`: {problem}");
    if let [only] = problems {
        return line(only);
    }
    let mut lines = vec![format!("{} parameters cannot be combined", problems.len())];
    lines.extend(problems.iter().take(SHOWN).map(|problem| format!("  - {}", line(problem))));
    if problems.len() > SHOWN {
        lines.push(format!("  - and {} more", problems.len() - SHOWN));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests;
