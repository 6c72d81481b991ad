//! The singular values of every changed matrix, and where the energy of the change lies.
//!
//! Matrices with a short side of up to [`SpectrumOptions::complete`] have all of their singular
//! values, by the eigenvalues of their Gram matrix in f64; of larger ones the leading
//! [`SpectrumOptions::top`] are known, and what the others would tell is not guessed. An adapter's
//! are complete: they are as many as its rank, and zeros.
//!
//! A stack of experts is one matrix, its experts below each other. What is not a matrix (norms,
//! biases) has its energy alone.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use lora_format::model::{Adapter, Form};
use lora_format::{Dtype, Tensor};
use rayon::iter::{IntoParallelRefIterator, ParallelIterator};

use super::adapter::{Changed, changes};
use super::place::{Place, places};
use super::{PassedOver, Result, go_on, not_converged};
use crate::engine::Progress;
use crate::noise::{self, NoiseEstimate, Rule};
use crate::pair::{Change, Delta, Kind, Mapped, Pair, Pairing, measure};
use crate::schedule::Schedule;
use crate::spectrum::{Reached, Spectrum};
use crate::svd::{Goal, SvdOptions, decompose};

/// How far spectra are computed.
#[derive(Clone, Debug)]
pub struct SpectrumOptions {
    /// The largest short side of a matrix whose spectrum is computed whole; `usize::MAX` for all.
    pub complete: usize,
    /// How many values of larger ones.
    pub top: usize,
    /// Which values are called noise.
    pub rule: Rule,
    /// How decompositions are made.
    pub svd: SvdOptions,
}

impl Default for SpectrumOptions {
    fn default() -> Self {
        SpectrumOptions {
            complete: 2048,
            top: 256,
            rule: Rule::default(),
            svd: SvdOptions::default(),
        }
    }
}

/// What a change is made of.
#[derive(Clone, Debug, Default)]
pub struct Spectra {
    /// Changed matrices, sorted by name.
    pub tensors: Vec<TensorSpectrum>,
    /// What changed and is no matrix, sorted by name.
    pub others: Vec<OtherChange>,
    /// Parameters that did not change.
    pub unchanged: Vec<String>,
    /// What was not analysed.
    pub passed: Vec<PassedOver>,
    /// What was noticed besides.
    pub notes: Vec<String>,
}

/// One changed matrix.
#[derive(Clone, Debug)]
pub struct TensorSpectrum {
    /// The parameter, as the base calls it.
    pub name: String,
    /// Where it is.
    pub place: Place,
    /// What it is to its layer; `None` where no base tells.
    pub kind: Option<Kind>,
    /// Its shape as it is stored; of an adapter without a base, outputs and inputs.
    pub shape: Vec<usize>,
    /// The singular values of ΔW.
    pub spectrum: Spectrum,
    /// ‖W0‖²_F, if there is a base.
    pub base_energy: Option<f64>,
    /// The rank of an adapter's factors.
    pub rank: Option<usize>,
    /// The noise of a difference of stored weights, taken as even across rows and columns: no vectors are
    /// made here, and [`noise::estimate_uneven`], by which an extraction chooses ranks, needs them.
    pub noise: Option<NoiseEstimate>,
    /// How a pair's elements changed.
    pub change: Option<Change>,
}

/// A change that is no matrix, or is not decomposed.
#[derive(Clone, Debug)]
pub struct OtherChange {
    /// The parameter, as the base calls it.
    pub name: String,
    /// Where it is.
    pub place: Place,
    /// What it is to its layer; `None` where no base tells.
    pub kind: Option<Kind>,
    /// Its shape.
    pub shape: Vec<usize>,
    /// ‖ΔW‖².
    pub energy: f64,
    /// ‖W0‖², if there is a base.
    pub base_energy: Option<f64>,
}

/// Changes of one projection, or of one layer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Group {
    /// What they have in common.
    pub name: String,
    /// Matrices.
    pub matrices: usize,
    /// What is no matrix.
    pub others: usize,
    /// ‖ΔW‖² of all of them.
    pub energy: f64,
    /// Its part of the whole change's.
    pub share: f64,
    /// ‖W0‖² of those that changed, if all are known.
    pub base_energy: Option<f64>,
    /// The medians of the matrices' r50, r90, r95 and r99 (of an even number, the lower one);
    /// `None` without matrices.
    pub ranks: Option<[Reached; 4]>,
}

impl Group {
    /// ‖ΔW‖/‖W0‖.
    #[must_use]
    pub fn relative(&self) -> Option<f64> {
        relative(self.energy, self.base_energy)
    }
}

impl TensorSpectrum {
    /// ‖ΔW‖_F/‖W0‖_F; infinite if W0 is zero.
    #[must_use]
    pub fn relative(&self) -> Option<f64> {
        relative(self.spectrum.energy, self.base_energy)
    }

    /// r50, r90, r95 and r99.
    #[must_use]
    pub fn ranks(&self) -> [Reached; 4] {
        let spectrum = &self.spectrum;
        [spectrum.r50(), spectrum.r90(), spectrum.r95(), spectrum.r99()]
    }
}

impl OtherChange {
    /// ‖ΔW‖/‖W0‖; infinite if W0 is zero.
    #[must_use]
    pub fn relative(&self) -> Option<f64> {
        relative(self.energy, self.base_energy)
    }
}

fn relative(energy: f64, base: Option<f64>) -> Option<f64> {
    base.map(|base| if energy == 0.0 { 0.0 } else { (energy / base).sqrt() })
}

impl Spectra {
    /// ‖ΔW‖² of all that was analysed.
    #[must_use]
    pub fn energy(&self) -> f64 {
        let matrices: f64 = self.tensors.iter().map(|one| one.spectrum.energy).sum();
        matrices + self.others.iter().map(|one| one.energy).sum::<f64>()
    }

    /// Everything together.
    #[must_use]
    pub fn total(&self) -> Group {
        self.groups(|_| Some(String::new())).pop().unwrap_or_default()
    }

    /// By projection, the one with the most energy first.
    #[must_use]
    pub fn by_projection(&self) -> Vec<Group> {
        let mut groups = self.groups(|place| Some(place.projection.clone()));
        groups.sort_by(|a, b| b.energy.total_cmp(&a.energy).then_with(|| a.name.cmp(&b.name)));
        groups
    }

    /// By layer, in their order; what is in none is left out.
    #[must_use]
    pub fn by_depth(&self) -> Vec<Group> {
        // The zeros sort numbers as numbers.
        let mut groups = self.groups(|place| place.depth.map(|depth| format!("{depth:020}")));
        for group in &mut groups {
            let depth = group.name.trim_start_matches('0');
            group.name = if depth.is_empty() { "0" } else { depth }.to_owned();
        }
        groups
    }

    fn groups(&self, key: impl Fn(&Place) -> Option<String>) -> Vec<Group> {
        #[derive(Default)]
        struct Members<'a> {
            matrices: Vec<&'a TensorSpectrum>,
            others: Vec<&'a OtherChange>,
        }
        let mut members: BTreeMap<String, Members<'_>> = BTreeMap::new();
        for one in &self.tensors {
            if let Some(key) = key(&one.place) {
                members.entry(key).or_default().matrices.push(one);
            }
        }
        for one in &self.others {
            if let Some(key) = key(&one.place) {
                members.entry(key).or_default().others.push(one);
            }
        }
        let whole = self.energy();
        let group = |(name, of): (String, Members<'_>)| {
            let energies = of.matrices.iter().map(|one| (one.spectrum.energy, one.base_energy));
            let energies =
                energies.chain(of.others.iter().map(|one| (one.energy, one.base_energy)));
            let (mut energy, mut base_energy) = (0.0, Some(0.0));
            for (change, base) in energies {
                energy += change;
                base_energy = base_energy.zip(base).map(|(sum, base)| sum + base);
            }
            let share = if whole > 0.0 { energy / whole } else { 0.0 };
            let ranks = (!of.matrices.is_empty()).then(|| {
                let all: Vec<[Reached; 4]> = of.matrices.iter().map(|one| one.ranks()).collect();
                std::array::from_fn(|which| median(all.iter().map(|ranks| ranks[which]).collect()))
            });
            let (matrices, others) = (of.matrices.len(), of.others.len());
            Group { name, matrices, others, energy, share, base_energy, ranks }
        };
        members.into_iter().map(group).collect()
    }

    /// Names, and what follows from all of them together.
    fn settle(mut self) -> Spectra {
        let names = self.tensors.iter().map(|one| one.name.as_str());
        let names = names.chain(self.others.iter().map(|one| one.name.as_str()));
        let mut found = places(names).into_iter();
        let all = self.tensors.iter_mut().map(|one| &mut one.place);
        let all = all.chain(self.others.iter_mut().map(|one| &mut one.place));
        for place in all {
            *place = found.next().unwrap_or_default();
        }
        self
    }
}

/// The lower median; what is only known to be larger comes after what is known.
fn median(mut ranks: Vec<Reached>) -> Reached {
    ranks.sort_by(|a, b| match (a, b) {
        (Reached::At(a), Reached::At(b)) | (Reached::Beyond(a), Reached::Beyond(b)) => a.cmp(b),
        (Reached::At(_), Reached::Beyond(_)) => Ordering::Less,
        (Reached::Beyond(_), Reached::At(_)) => Ordering::Greater,
    });
    ranks.get(ranks.len().saturating_sub(1) / 2).copied().unwrap_or(Reached::At(0))
}

/// The bytes of both models that [`of_pair`] works through.
#[must_use]
pub fn work(pairing: &Pairing) -> u64 {
    pairing.pairs.iter().map(bytes).sum()
}

fn bytes(pair: &Pair) -> u64 {
    let of = |dtype: Dtype| dtype.tensor_bytes(&pair.shape).unwrap_or(0);
    of(pair.base_dtype).saturating_add(of(pair.tuned_dtype))
}

/// What fine-tuning changed, on as many threads as the current pool has. Its progress is counted in the bytes of [`work`].
///
/// # Errors
/// [`AnalysisError`](super::AnalysisError) if a decomposition fails or the user stopped it.
pub fn of_pair(
    mapped: &Mapped<'_>,
    options: &SpectrumOptions,
    progress: &Progress,
) -> Result<Spectra> {
    let pairs = &mapped.pairing().pairs;
    let costs: Vec<u64> = pairs.iter().map(Pair::elements).collect();
    let schedule = Schedule::new(rayon::current_num_threads());
    let analysed = |index: usize| {
        let delta = mapped.delta(index);
        let found = of_one(&pairs[index], &delta, options);
        delta.release(0..delta.shape().0);
        progress.add(bytes(&pairs[index]));
        Ok(found)
    };
    let found = schedule.run(&costs, || progress.is_cancelled(), analysed)?;
    let mut spectra = Spectra::default();
    for (pair, found) in pairs.iter().zip(found) {
        spectra.enter(&pair.name, found?);
    }
    Ok(spectra.settle())
}

/// What became of one parameter.
enum Found {
    Unchanged,
    Matrix(Box<TensorSpectrum>),
    Other(OtherChange),
    /// Why it was not analysed.
    Passed(String),
}

impl Spectra {
    fn enter(&mut self, name: &str, found: Found) {
        match found {
            Found::Unchanged => self.unchanged.push(name.to_owned()),
            Found::Matrix(one) => self.tensors.push(*one),
            Found::Other(one) => self.others.push(one),
            Found::Passed(reason) => {
                self.passed.push(PassedOver { name: name.to_owned(), reason });
            }
        }
    }
}

fn of_one(pair: &Pair, delta: &Delta<'_>, options: &SpectrumOptions) -> Result<Found> {
    let change = measure(delta);
    if change.non_finite > 0 {
        let reason = format!("{} of its elements are NaN or infinite", change.non_finite);
        return Ok(Found::Passed(reason));
    }
    if change.is_unchanged() {
        return Ok(Found::Unchanged);
    }
    if is_matrix(pair) {
        return Ok(Found::Matrix(Box::new(of_delta(pair, delta, change, options)?)));
    }
    Ok(Found::Other(OtherChange {
        name: pair.name.clone(),
        place: Place::default(),
        kind: Some(pair.kind),
        shape: pair.shape.clone(),
        energy: change.energy,
        base_energy: Some(change.base_energy),
    }))
}

/// Whether a change of it has directions.
pub(super) fn is_matrix(pair: &Pair) -> bool {
    let (rows, cols) = pair.matrix();
    !matches!(pair.kind, Kind::Norm | Kind::Bias) && rows.min(cols) > 1
}

fn of_delta(
    pair: &Pair,
    delta: &Delta<'_>,
    change: Change,
    options: &SpectrumOptions,
) -> Result<TensorSpectrum> {
    let (rows, cols) = delta.shape();
    let short = rows.min(cols);
    let goal =
        if short <= options.complete { Goal::Values } else { Goal::Rank(options.top.min(short)) };
    let spectrum = decompose(delta, change.energy, goal, &options.svd)
        .map_err(not_converged(&pair.name))?
        .spectrum;
    let noise = noise::estimate(&spectrum, change.storage_variance.sqrt(), options.rule);
    Ok(TensorSpectrum {
        name: pair.name.clone(),
        place: Place::default(),
        kind: Some(pair.kind),
        shape: pair.shape.clone(),
        spectrum,
        base_energy: Some(change.base_energy),
        rank: None,
        noise: Some(noise),
        change: Some(change),
    })
}

/// What an adapter changes; with the base (by itself, see [`open_base`](super::open_base)), relative
/// to it and by its names.
///
/// # Errors
/// [`AnalysisError::Merge`](super::AnalysisError::Merge) if the base has none of its targets.
pub fn of_adapter(
    adapter: &Adapter,
    base: Option<&Mapped<'_>>,
    progress: &Progress,
) -> Result<Spectra> {
    let (all, notes) = changes(adapter, base)?;
    let analyse = |changed: &Changed<'_>| -> Result<Found> {
        go_on(progress)?;
        let pair = changed.pair(base);
        let kind = pair.map(|pair| pair.kind);
        let base_energy = || {
            let measured = measure(&base?.delta(changed.base?));
            (measured.non_finite == 0).then_some(measured.base_energy)
        };
        let (name, place) = (changed.name.clone(), Place::default());
        match changed.product(base) {
            Ok(product) => {
                let (outputs, inputs) = product.shape();
                let fits = changed.stored_transposed(base, (outputs, inputs)).is_some();
                let own = || vec![outputs, inputs];
                let spectrum = product.spectrum().map_err(not_converged(&name))?;
                if spectrum.is_zero() {
                    return Ok(Found::Unchanged);
                }
                Ok(Found::Matrix(Box::new(TensorSpectrum {
                    place,
                    kind,
                    shape: pair.filter(|_| fits).map_or_else(own, |pair| pair.shape.clone()),
                    spectrum,
                    base_energy: if fits { base_energy() } else { None },
                    rank: Some(product.rank()),
                    noise: None,
                    change: None,
                    name,
                })))
            }
            Err(reason) => Ok(match stored_energy(changed, base) {
                Some((energy, shape)) => {
                    let base_energy = base_energy();
                    Found::Other(OtherChange { name, place, kind, shape, energy, base_energy })
                }
                None => Found::Passed(reason),
            }),
        }
    };
    let found: Vec<Result<Found>> = all.par_iter().map(analyse).collect();
    let mut spectra = Spectra { notes, ..Spectra::default() };
    for (changed, found) in all.iter().zip(found) {
        spectra.enter(&changed.name, found?);
    }
    Ok(spectra.settle())
}

/// The energy of a change that is stored whole, and its shape.
fn stored_energy(changed: &Changed<'_>, base: Option<&Mapped<'_>>) -> Option<(f64, Vec<usize>)> {
    let [component] = changed.components.as_slice() else { return None };
    match &component.form {
        Form::Added { tensor, scale } => {
            let values = tensor.to_f32()?;
            let energy: f64 = values.iter().map(|&x| (f64::from(x) * scale).powi(2)).sum();
            energy.is_finite().then(|| (energy, tensor.shape.clone()))
        }
        Form::Replaced(tensor) => {
            let energy = replaced_energy(tensor, changed.pair(base)?, &base?.delta(changed.base?))?;
            Some((energy, tensor.shape.clone()))
        }
        _ => None,
    }
}

/// ‖T − W0‖² of a tensor of the base's shape.
fn replaced_energy(tensor: &Tensor, pair: &Pair, base: &Delta<'_>) -> Option<f64> {
    if tensor.shape != pair.shape {
        return None;
    }
    let values = tensor.to_f32()?;
    let (rows, cols) = base.shape();
    let (mut own, mut energy) = (vec![0.0; cols], 0.0);
    for (row, values) in values.chunks_exact(cols.max(1)).take(rows).enumerate() {
        base.read_base(row, &mut own);
        let differences = values.iter().zip(&own).map(|(x, w)| f64::from(*x) - f64::from(*w));
        energy += differences.map(|difference| difference * difference).sum::<f64>();
    }
    base.release(0..rows);
    energy.is_finite().then_some(energy)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, values: &[f64], base_energy: Option<f64>) -> TensorSpectrum {
        TensorSpectrum {
            name: name.to_owned(),
            place: Place::default(),
            kind: None,
            shape: vec![8, 4],
            spectrum: Spectrum::of_rank(8, 4, values.to_vec()),
            base_energy,
            rank: Some(values.len()),
            noise: None,
            change: None,
        }
    }

    #[test]
    fn energies_add_up_by_projection_and_by_depth() {
        let other = OtherChange {
            name: "l.0.norm.weight".to_owned(),
            place: Place::default(),
            kind: Some(Kind::Norm),
            shape: vec![4],
            energy: 6.0,
            base_energy: Some(24.0),
        };
        let spectra = Spectra {
            tensors: vec![
                tensor("l.0.q.weight", &[3.0, 1.0], Some(1000.0)),
                tensor("l.10.q.weight", &[2.0], Some(96.0)),
                tensor("l.2.v.weight", &[8.0], None),
            ],
            others: vec![other],
            ..Spectra::default()
        }
        .settle();
        assert_eq!(spectra.energy(), 84.0);
        let shown = |groups: Vec<Group>| -> Vec<(String, f64, Option<f64>)> {
            groups.into_iter().map(|g| (g.name, g.energy, g.base_energy)).collect()
        };
        assert_eq!(
            shown(spectra.by_projection()),
            [
                ("v".to_owned(), 64.0, None),
                ("q".to_owned(), 14.0, Some(1096.0)),
                ("norm".to_owned(), 6.0, Some(24.0)),
            ]
        );
        assert_eq!(
            shown(spectra.by_depth()),
            [
                ("0".to_owned(), 16.0, Some(1024.0)),
                ("2".to_owned(), 64.0, None),
                ("10".to_owned(), 4.0, Some(96.0)),
            ]
        );
        let total = spectra.total();
        assert_eq!((total.matrices, total.others, total.share), (3, 1, 1.0));
        assert_eq!(total.ranks, Some([Reached::At(1); 4]));
        assert_eq!(spectra.by_depth()[0].relative(), Some(0.125));
        assert_eq!(spectra.by_projection()[2].ranks, None);
    }

    #[test]
    fn unknown_ranks_are_larger_than_known_ones() {
        let (at, beyond) = (Reached::At, Reached::Beyond);
        assert_eq!(median(vec![beyond(4), at(9), at(3)]), at(9));
        assert_eq!(median(vec![beyond(4), at(9), beyond(3)]), beyond(3));
        assert_eq!(median(vec![at(2), at(1)]), at(1));
    }
}
