//! How alike the directions of two changes are, target by target, and how they meet the weights
//! that they change.
//!
//! A change is an m × n matrix of outputs × inputs, and its directions are its singular vectors:
//! those of the input (right, the span of A's rows, which the paper compares) and those of the output
//! (left, the span of B's columns). An adapter has as many as its rank; a difference of two models
//! has as many as the adapter that it is compared with, or as are asked for.

use std::collections::{BTreeMap, BTreeSet};

use lora_format::model::Adapter;
use ndarray::{Array2, s};
use rayon::iter::{IntoParallelRefIterator, ParallelIterator};

use super::adapter::{Changed, changes};
use super::place::{Place, places};
use super::product::Directions;
use super::spectra::is_matrix;
use super::weights::{self, Weight};
use super::{AnalysisError, PassedOver, Result, go_on, not_converged};
use crate::engine::Progress;
use crate::pair::{Mapped, Rename, measure};
use crate::similarity::{
    Amplification, amplification, geodesic_distance, principal_angles, projection_distance,
    random_similarity, subspace_similarity,
};
use crate::svd::{Goal, SvdOptions, decompose};

/// Values of a difference in f32 below this share of the largest are those of its rounding.
const NO_DIRECTION: f64 = 1e-6;

/// How two changes are compared.
#[derive(Clone, Debug)]
pub struct ComparisonOptions {
    /// The most directions of each target.
    pub top: usize,
    /// The numbers of directions that amplification is measured for.
    pub ranks: Vec<usize>,
    /// How decompositions are made.
    pub svd: SvdOptions,
}

impl Default for ComparisonOptions {
    fn default() -> Self {
        ComparisonOptions { top: 64, ranks: vec![4, 64], svd: SvdOptions::default() }
    }
}

/// One of the two changes.
#[derive(Clone, Copy, Debug)]
pub enum Subject<'a> {
    /// What an adapter adds.
    Adapter(&'a Adapter),
    /// What a fine-tuned model has over its base.
    Tuned(&'a Mapped<'a>),
}

/// How alike two changes are.
#[derive(Clone, Debug, Default)]
pub struct Comparison {
    /// Targets that both change, sorted by name.
    pub targets: Vec<TargetComparison>,
    /// Targets that only A changes.
    pub only_a: Vec<String>,
    /// Targets that only B changes.
    pub only_b: Vec<String>,
    /// The prefix of A's names that another one stands for in B's.
    pub rename: Option<Rename>,
    /// How many targets both change, compared or not.
    pub common: usize,
    /// What one or both change and that has no directions, or none that are known; sorted.
    pub passed: Vec<PassedOver>,
    /// What was noticed besides.
    pub notes: Vec<String>,
}

/// Two changes of one weight.
#[derive(Clone, Debug)]
pub struct TargetComparison {
    /// The parameter: the base's name, if there is a base; else A's.
    pub name: String,
    /// Where it is.
    pub place: Place,
    /// Outputs and inputs.
    pub shape: (usize, usize),
    /// How many directions of A and of B are compared.
    pub ranks: [usize; 2],
    /// ‖ΔW‖_F of A and of B.
    pub norms: [f64; 2],
    /// ⟨A, B⟩/(‖A‖·‖B‖) of what these directions hold: 1 if they are the same change, up to a factor;
    /// 0 if they have nothing in common.
    pub cosine: f64,
    /// The directions of the input: right singular vectors.
    pub input: Side,
    /// The directions of the output: left singular vectors.
    pub output: Side,
    /// How A and B meet the weight; `None` without a base, or if [`unmet`](Self::unmet) says why not.
    pub amplified: Option<Amplified>,
    /// Why how they meet the base's weight is not known.
    pub unmet: Option<String>,
}

/// Directions of one side of a matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct Side {
    /// φ(A, B, i, j) at (i−1, j−1).
    pub phi: Array2<f64>,
    /// The principal angles between all of A's and all of B's directions, ascending, in radians.
    pub angles: Vec<f64>,
    /// The dimension of the space.
    pub dimension: usize,
}

impl Side {
    /// Of two bases, n × I and n × J.
    fn of(
        a: &Array2<f64>,
        b: &Array2<f64>,
    ) -> std::result::Result<Side, crate::similarity::SimilarityError> {
        Ok(Side {
            phi: subspace_similarity(a.view(), b.view())?,
            angles: principal_angles(a.view(), b.view())?,
            dimension: a.nrows(),
        })
    }

    /// φ of all directions.
    #[must_use]
    pub fn whole(&self) -> f64 {
        self.phi.last().copied().unwrap_or(0.0)
    }

    /// φ of the first direction of each.
    #[must_use]
    pub fn first(&self) -> f64 {
        self.phi.first().copied().unwrap_or(0.0)
    }

    /// What φ of all directions is on average for unrelated ones.
    #[must_use]
    pub fn random(&self) -> f64 {
        random_similarity(self.dimension, self.phi.nrows(), self.phi.ncols()).min(1.0)
    }

    /// (Σ sin²θ)^½.
    #[must_use]
    pub fn projection_distance(&self) -> f64 {
        projection_distance(&self.angles)
    }

    /// (Σ θ²)^½.
    #[must_use]
    pub fn geodesic_distance(&self) -> f64 {
        geodesic_distance(&self.angles)
    }
}

/// How two changes meet the weight W0 that they change: table 7 of the paper.
#[derive(Clone, Debug, PartialEq)]
pub struct Amplified {
    /// ‖W0‖_F.
    pub base_norm: f64,
    /// In the directions of A, for every number of directions asked for that A has, and of all if it
    /// has fewer than the most that is asked for.
    pub a: Vec<Amplification>,
    /// In the directions of B.
    pub b: Vec<Amplification>,
}

/// The mean over targets.
#[derive(Clone, Debug)]
pub struct Mean {
    /// What the targets have in common.
    pub name: String,
    /// How many there are.
    pub targets: usize,
    /// The mean of φ of the input, as far as all targets have it.
    pub input: Array2<f64>,
    /// The mean of φ of the output.
    pub output: Array2<f64>,
    /// The mean of what φ of all directions is for unrelated ones: input, output.
    pub random: [f64; 2],
    /// The mean projection distance: input, output.
    pub projection: [f64; 2],
    /// The mean geodesic distance: input, output.
    pub geodesic: [f64; 2],
    /// The mean cosine.
    pub cosine: f64,
}

impl Comparison {
    /// The mean over all targets; `None` if there is none.
    #[must_use]
    pub fn mean(&self) -> Option<Mean> {
        Mean::of("all", &self.targets.iter().collect::<Vec<_>>())
    }

    /// The means of every projection, the most alike first.
    #[must_use]
    pub fn by_projection(&self) -> Vec<Mean> {
        let mut groups: BTreeMap<&str, Vec<&TargetComparison>> = BTreeMap::new();
        for target in &self.targets {
            groups.entry(&target.place.projection).or_default().push(target);
        }
        let mut means: Vec<Mean> =
            groups.into_iter().filter_map(|(name, targets)| Mean::of(name, &targets)).collect();
        let whole = |mean: &Mean| mean.input.last().copied().unwrap_or(0.0);
        means.sort_by(|a, b| whole(b).total_cmp(&whole(a)).then_with(|| a.name.cmp(&b.name)));
        means
    }
}

impl Mean {
    fn of(name: &str, targets: &[&TargetComparison]) -> Option<Mean> {
        let rows = targets.iter().map(|one| one.ranks[0]).min()?;
        let cols = targets.iter().map(|one| one.ranks[1]).min()?;
        let count = targets.len() as f64;
        let mean_phi = |side: &dyn Fn(&TargetComparison) -> &Side| {
            let mut mean = Array2::zeros((rows, cols));
            for target in targets {
                mean += &side(target).phi.slice(s![..rows, ..cols]);
            }
            mean / count
        };
        let mean = |value: &dyn Fn(&TargetComparison) -> f64| {
            targets.iter().map(|target| value(target)).sum::<f64>() / count
        };
        Some(Mean {
            name: name.to_owned(),
            targets: targets.len(),
            input: mean_phi(&|one| &one.input),
            output: mean_phi(&|one| &one.output),
            random: [mean(&|one| one.input.random()), mean(&|one| one.output.random())],
            projection: [
                mean(&|one| one.input.projection_distance()),
                mean(&|one| one.output.projection_distance()),
            ],
            geodesic: [
                mean(&|one| one.input.geodesic_distance()),
                mean(&|one| one.output.geodesic_distance()),
            ],
            cosine: mean(&|one| one.cosine),
        })
    }
}

/// One target of one change.
enum Target<'a> {
    Product(Changed<'a>),
    Delta(usize),
}

impl Target<'_> {
    fn is_delta(&self) -> bool {
        matches!(self, Target::Delta(_))
    }

    /// Its directions, or why they are not known.
    fn directions(
        &self,
        subject: Subject<'_>,
        name: &str,
        base: Option<&Mapped<'_>>,
        options: &ComparisonOptions,
        top: usize,
    ) -> Result<std::result::Result<Directions, String>> {
        match (self, subject) {
            (Target::Product(changed), _) => Ok(match changed.product(base) {
                Ok(product) => Ok(product.directions(top).map_err(not_converged(name))?),
                Err(reason) => Err(reason),
            }),
            (Target::Delta(index), Subject::Tuned(mapped)) => {
                of_delta(mapped, *index, options, top)
            }
            // Only a fine-tuned model has differences.
            (Target::Delta(_), Subject::Adapter(_)) => Ok(Err("an adapter is no model".to_owned())),
        }
    }
}

fn of_delta(
    mapped: &Mapped<'_>,
    index: usize,
    options: &ComparisonOptions,
    top: usize,
) -> Result<std::result::Result<Directions, String>> {
    let pair = &mapped.pairing().pairs[index];
    let delta = mapped.delta(index);
    let change = measure(&delta);
    if change.non_finite > 0 {
        return Ok(Err(format!("{} of its elements are NaN or infinite", change.non_finite)));
    }
    let (rows, cols) = delta.shape();
    if change.is_unchanged() {
        return Ok(Err("it did not change".to_owned()));
    }
    let top = Goal::Rank(top.min(rows.min(cols)));
    let found =
        decompose(&delta, change.energy, top, &options.svd).map_err(not_converged(&pair.name))?;
    let floor = NO_DIRECTION * found.spectrum.largest().unwrap_or(0.0);
    let count = found.spectrum.values.partition_point(|&value| value > floor);
    let count = count.min(found.left.ncols());
    let left = found.left.slice(s![.., ..count]).mapv(f64::from);
    let right = found.right.slice(s![..count, ..]).mapv(f64::from).reversed_axes();
    let mut spectrum = found.spectrum;
    let (output, input) = match weights::is_transposed(pair) {
        false => (left, right),
        true => {
            (spectrum.rows, spectrum.cols) = (cols, rows);
            (right, left)
        }
    };
    Ok(Ok(Directions { spectrum, output, input }))
}

/// The targets of a change by name.
fn targets<'a>(
    subject: Subject<'a>,
    base: Option<&Mapped<'_>>,
    notes: &mut Vec<String>,
) -> Result<BTreeMap<String, Target<'a>>> {
    Ok(match subject {
        Subject::Adapter(adapter) => {
            let (all, unknown) = changes(adapter, base)?;
            notes.extend(unknown);
            all.into_iter()
                .map(|changed| (changed.name.clone(), Target::Product(changed)))
                .collect()
        }
        Subject::Tuned(mapped) => {
            let pairs = mapped.pairing().pairs.iter().enumerate();
            let matrices =
                pairs.filter(|(_, pair)| is_matrix(pair) && pair.orientation_doubt.is_none());
            matrices.map(|(index, pair)| (pair.name.clone(), Target::Delta(index))).collect()
        }
    })
}

/// What of a change is no target, though it may have changed. An adapter's are all targets.
fn passed_over(subject: Subject<'_>, progress: &Progress) -> Result<Vec<PassedOver>> {
    let Subject::Tuned(mapped) = subject else { return Ok(Vec::new()) };
    let pairing = mapped.pairing();
    let pass = |name: &str, reason: String| PassedOver { name: name.to_owned(), reason };
    let mut passed: Vec<PassedOver> = pairing
        .reshaped
        .iter()
        .map(|one| pass(&one.name, format!("{} became {}", one.shape, one.tuned_shape)))
        .collect();
    passed.extend(pairing.incomparable.iter().map(|one| {
        pass(&one.name, format!("stored as {}, which is not compared", one.tuned_dtype))
    }));
    for (index, pair) in pairing.pairs.iter().enumerate() {
        let reason = match &pair.orientation_doubt {
            _ if !is_matrix(pair) => "it changed, and is no matrix with directions".to_owned(),
            Some(doubt) => format!("it changed, and which side is its input is not clear: {doubt}"),
            None => continue,
        };
        go_on(progress)?;
        if !measure(&mapped.delta(index)).is_unchanged() {
            passed.push(pass(&pair.name, reason));
        }
    }
    Ok(passed)
}

/// Compares two changes; with the `base` (by itself, see [`open_base`](super::open_base)), also with
/// what they change.
///
/// # Errors
/// [`AnalysisError`] if a decomposition fails, if the base has none of an adapter's targets, or if
/// the user stopped it. Two changes without a common target are none: they are a comparison without
/// targets.
pub fn compare(
    a: Subject<'_>,
    b: Subject<'_>,
    base: Option<&Mapped<'_>>,
    options: &ComparisonOptions,
    progress: &Progress,
) -> Result<Comparison> {
    let mut comparison = Comparison::default();
    let notes = &mut comparison.notes;
    let (of_a, mut of_b) = (targets(a, base, notes)?, targets(b, base, notes)?);
    if !of_a.keys().any(|name| of_b.contains_key(name)) {
        comparison.rename = common_rename(of_a.keys(), of_b.keys());
        if let Some(rename) = &comparison.rename {
            let renamed = of_b.into_iter().map(|(name, target)| match renamed(&name, rename) {
                Some(name) => (name, target),
                None => (name, target),
            });
            of_b = renamed.collect();
        }
    }
    comparison.passed = [passed_over(a, progress)?, passed_over(b, progress)?].concat();
    let passed: BTreeSet<String> =
        comparison.passed.iter().map(|passed| passed.name.clone()).collect();
    comparison.only_a = only(a, &of_a, &of_b, progress)?;
    comparison.only_b = only(b, &of_b, &of_a, progress)?;
    // What one of them passes over is not told to be unchanged there.
    comparison.only_a.retain(|name| !passed.contains(name));
    comparison.only_b.retain(|name| !passed.contains(name));
    let common: Vec<(&String, &Target<'_>, &Target<'_>)> =
        of_a.iter().filter_map(|(name, target)| Some((name, target, of_b.get(name)?))).collect();
    comparison.common = common.len();
    let one = |&(name, of_a, of_b): &(&String, &Target<'_>, &Target<'_>)| {
        go_on(progress)?;
        compare_target(name, (a, of_a), (b, of_b), base, options)
    };
    // Decompositions of differences and of weights use all threads by themselves.
    let by_factors = matches!((a, b, base), (Subject::Adapter(_), Subject::Adapter(_), None));
    let found: Vec<Result<_>> = match by_factors {
        true => common.par_iter().map(one).collect(),
        false => common.iter().map(one).collect(),
    };
    for found in found {
        match found? {
            Ok(target) => comparison.targets.push(target),
            Err(passed) => comparison.passed.push(passed),
        }
    }
    comparison.passed.sort();
    comparison.passed.dedup();
    let found = places(comparison.targets.iter().map(|target| target.name.as_str()));
    for (target, place) in comparison.targets.iter_mut().zip(found) {
        target.place = place;
    }
    Ok(comparison)
}

/// What only one of two changes has; a parameter that a fine-tuned model has unchanged is none.
fn only(
    subject: Subject<'_>,
    targets: &BTreeMap<String, Target<'_>>,
    others: &BTreeMap<String, Target<'_>>,
    progress: &Progress,
) -> Result<Vec<String>> {
    let mut only = Vec::new();
    for (name, target) in targets.iter().filter(|(name, _)| !others.contains_key(*name)) {
        go_on(progress)?;
        match (target, subject) {
            (Target::Delta(index), Subject::Tuned(mapped))
                if measure(&mapped.delta(*index)).is_unchanged() => {}
            _ => only.push(name.clone()),
        }
    }
    Ok(only)
}

type Compared = std::result::Result<TargetComparison, PassedOver>;

fn compare_target(
    name: &str,
    (subject_a, of_a): (Subject<'_>, &Target<'_>),
    (subject_b, of_b): (Subject<'_>, &Target<'_>),
    base: Option<&Mapped<'_>>,
    options: &ComparisonOptions,
) -> Result<Compared> {
    let pass = |reason: String| Ok(Err(PassedOver { name: name.to_owned(), reason }));
    let of =
        |target: &Target<'_>, subject, top| target.directions(subject, name, base, options, top);
    // A difference has no rank of its own: beside an adapter it has as many directions as that.
    let top = options.top;
    let beside = |adapter: &std::result::Result<Directions, String>| {
        adapter.as_ref().map_or(top, |one| one.count().max(1))
    };
    let (a, b) = match (of_a.is_delta(), of_b.is_delta()) {
        (true, false) => {
            let b = of(of_b, subject_b, top)?;
            (of(of_a, subject_a, beside(&b))?, b)
        }
        (false, true) => {
            let a = of(of_a, subject_a, top)?;
            let b = of(of_b, subject_b, beside(&a))?;
            (a, b)
        }
        _ => (of(of_a, subject_a, top)?, of(of_b, subject_b, top)?),
    };
    let (a, b) = match (a, b) {
        (Ok(a), Ok(b)) => (a, b),
        (Err(reason), _) => return pass(format!("A: {reason}")),
        (_, Err(reason)) => return pass(format!("B: {reason}")),
    };
    if a.shape() != b.shape() {
        let ((m, n), (k, l)) = (a.shape(), b.shape());
        return pass(format!("A changes a weight of {m} × {n}, B one of {k} × {l}"));
    }
    match (a.count(), b.count()) {
        (0, 0) => return pass("both changes are zero".to_owned()),
        (0, _) => return pass("A's change is zero".to_owned()),
        (_, 0) => return pass("B's change is zero".to_owned()),
        _ => {}
    }
    let similarity = |source| AnalysisError::Similarity { tensor: name.to_owned(), source };
    let input = Side::of(&a.input, &b.input).map_err(similarity)?;
    let output = Side::of(&a.output, &b.output).map_err(similarity)?;
    let met = match base {
        Some(base) => {
            let changed = [of_a, of_b].into_iter().find_map(|target| match target {
                Target::Product(changed) => Some(changed),
                Target::Delta(_) => None,
            });
            Some(amplify(name, changed, [&a, &b], base, options)?)
        }
        None => None,
    };
    let (amplified, unmet) = match met {
        Some(Ok(amplified)) => (Some(amplified), None),
        Some(Err(reason)) => (None, Some(reason)),
        None => (None, None),
    };
    Ok(Ok(TargetComparison {
        name: name.to_owned(),
        place: Place::default(),
        shape: a.shape(),
        ranks: [a.count(), b.count()],
        norms: [a.spectrum.norm(), b.spectrum.norm()],
        cosine: cosine(&a, &b),
        input,
        output,
        amplified,
        unmet,
    }))
}

/// ⟨A, B⟩/(‖A‖·‖B‖) of two matrices by their directions: Σᵢⱼ σᵢ·τⱼ·(uᵢ·xⱼ)·(vᵢ·yⱼ).
fn cosine(a: &Directions, b: &Directions) -> f64 {
    let outputs = a.output.t().dot(&b.output);
    let inputs = a.input.t().dot(&b.input);
    let mut sum = 0.0;
    for ((i, j), output) in outputs.indexed_iter() {
        sum += a.spectrum.values[i] * b.spectrum.values[j] * output * inputs[[i, j]];
    }
    let norm = |one: &Directions| one.spectrum.captured(one.count()).sqrt();
    (sum / (norm(a) * norm(b))).clamp(-1.0, 1.0)
}

/// What W0 has in the directions of both, or why that is not known.
fn amplify(
    name: &str,
    changed: Option<&Changed<'_>>,
    directions: [&Directions; 2],
    base: &Mapped<'_>,
    options: &ComparisonOptions,
) -> Result<std::result::Result<Amplified, String>> {
    let unmet = |reason: String| Ok(Err(reason));
    let Some(index) = weights::find(base.pairing(), name) else {
        return unmet("the base has no such weight, or none that is read".to_owned());
    };
    let pair = &base.pairing().pairs[index];
    let shape = directions[0].shape();
    let transposed = match changed {
        Some(changed) => changed.stored_transposed(Some(base), shape),
        None => Some(weights::is_transposed(pair)),
    };
    let weight = Weight::of(base, index);
    let (rows, cols) = weight.0.shape();
    let transposed = transposed
        .filter(|&transposed| shape == if transposed { (cols, rows) } else { (rows, cols) });
    let Some(transposed) = transposed else {
        let (outputs, inputs) = shape;
        return unmet(format!(
            "the base's weight is {rows} × {cols}, the change is one of {outputs} × {inputs}"
        ));
    };
    let measured = measure(&weight.0);
    if measured.non_finite > 0 {
        let count = measured.non_finite;
        return unmet(format!("{count} elements of the base's weight are NaN or infinite"));
    }
    let energy = measured.base_energy;
    let most = options.ranks.iter().copied().max().unwrap_or(0);
    let known = directions.map(|one| one.count().min(most));
    let most_known = Goal::Rank(known[0].max(known[1]));
    let own = decompose(&weight, energy, most_known, &options.svd).map_err(not_converged(name))?;
    let of = |which: usize| {
        let (one, count) = (directions[which], known[which]);
        let (output, input) = (one.output.slice(s![.., ..count]), one.input.slice(s![.., ..count]));
        let (u, v) = if transposed { (input, output) } else { (output, input) };
        let projected = weight.projected(u, v);
        let change = one.spectrum.norm();
        let all = amplification(projected.view(), change, energy, shape, &own.spectrum.values);
        let wanted = |rank: usize| options.ranks.contains(&rank) || rank == count && count < most;
        all.into_iter().filter(|one| wanted(one.rank)).collect()
    };
    Ok(Ok(Amplified { base_norm: energy.sqrt(), a: of(0), b: of(1) }))
}

/// The change of prefix that gives B's names most of A's: adapters of one model that different
/// wrappers saved.
fn common_rename<'a>(
    a: impl Iterator<Item = &'a String>,
    b: impl Iterator<Item = &'a String>,
) -> Option<Rename> {
    let (a, b): (Vec<&String>, Vec<&String>) = (a.collect(), b.collect());
    // Names with a common end have one of A's few prefixes before it, and one of B's.
    let mut ends: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for name in &b {
        ends.entry(last_parts(name)).or_default().push(name);
    }
    let mut ways: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    for name in &a {
        let others = ends.get(last_parts(name)).map(Vec::as_slice).unwrap_or_default();
        for other in others {
            let way = differing_prefixes(name, other);
            if !way.0.split('.').chain(way.1.split('.')).any(crate::names::is_number) {
                *ways.entry(way).or_default() += 1;
            }
        }
    }
    let best = ways.iter().map(|way| *way.1).max()?;
    let mut winners = ways.iter().filter(|way| *way.1 == best);
    let (&(ours, theirs), &parameters) = winners.next()?;
    // Two equally good ways are none.
    if winners.next().is_some() {
        return None;
    }
    Some(Rename { base: ours.to_owned(), tuned: theirs.to_owned(), parameters })
}

/// The last three parts of a name.
fn last_parts(name: &str) -> &str {
    name.rmatch_indices('.').nth(2).map_or(name, |(at, _)| &name[at + 1..])
}

/// What is before the longest common end of whole parts, without the dot.
fn differing_prefixes<'a>(a: &'a str, b: &'a str) -> (&'a str, &'a str) {
    let (mut left, mut right) = (a, b);
    loop {
        let (before_a, last_a) = left.rsplit_once('.').unwrap_or(("", left));
        let (before_b, last_b) = right.rsplit_once('.').unwrap_or(("", right));
        if last_a != last_b || left.is_empty() || right.is_empty() {
            return (left, right);
        }
        (left, right) = (before_a, before_b);
    }
}

/// B's name as A has it; `None` if the rename is not about it.
fn renamed(name: &str, rename: &Rename) -> Option<String> {
    let rest = match rename.tuned.as_str() {
        "" => name,
        prefix => name.strip_prefix(prefix)?.strip_prefix('.')?,
    };
    Some(match rename.base.as_str() {
        "" => rest.to_owned(),
        prefix => format!("{prefix}.{rest}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spectrum::Spectrum;
    use crate::svd::dense::dense;

    fn directions(m: usize, n: usize, values: &[f64], seed: usize) -> Directions {
        let wave = |rows: usize, seed: usize| {
            let matrix = Array2::from_shape_fn((rows, values.len()), |(row, col)| {
                ((row * row * 31 + col * 17 + row * col * 7 + seed * 5) % 23) as f64 - 11.0
            });
            dense().qr(matrix.view()).unwrap().0
        };
        Directions {
            spectrum: Spectrum::of_rank(m, n, values.to_vec()),
            output: wave(m, seed),
            input: wave(n, seed + 1),
        }
    }

    fn explicit(one: &Directions) -> Array2<f64> {
        let values = ndarray::Array1::from(one.spectrum.values[..one.count()].to_vec());
        (&one.output * &values).dot(&one.input.t())
    }

    #[test]
    fn the_cosine_is_that_of_the_matrices() {
        let (a, b) = (directions(20, 14, &[3.0, 1.0], 1), directions(20, 14, &[2.0, 1.5, 0.1], 9));
        let (x, y) = (explicit(&a), explicit(&b));
        let (product, norms) = ((&x * &y).sum(), (&x * &x).sum() * (&y * &y).sum());
        assert!((cosine(&a, &b) - product / norms.sqrt()).abs() < 1e-13);
        assert!((cosine(&a, &a) - 1.0).abs() < 1e-13);
    }

    #[test]
    fn one_change_of_prefix_is_found() {
        let names = |prefix: &str| -> Vec<String> {
            let tails = ["0.attn.q.weight", "1.attn.q.weight", "1.mlp.up.weight"];
            tails.iter().map(|tail| format!("{prefix}layers.{tail}")).collect()
        };
        let (a, b) = (names("model."), names("thinker.model."));
        let rename = common_rename(a.iter(), b.iter()).unwrap();
        assert_eq!((rename.base.as_str(), rename.tuned.as_str()), ("", "thinker"));
        let back: Vec<_> = b.iter().filter_map(|name| renamed(name, &rename)).collect();
        assert_eq!(back, a);
        let (a, b) = (names("base."), names("model."));
        let rename = common_rename(a.iter(), b.iter()).unwrap();
        assert_eq!((rename.base.as_str(), rename.tuned.as_str()), ("base", "model"));
        assert_eq!(renamed("model.x", &rename).unwrap(), "base.x");
        assert_eq!(renamed("models.x", &rename), None);
        let other = ["encoder.9.fc.weight".to_owned()];
        assert_eq!(common_rename(a.iter(), other.iter()), None);
    }
}
