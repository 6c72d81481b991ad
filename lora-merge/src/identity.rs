//! Whether the base in hand is the base that the adapter was trained on.

use lora_format::Tensor;
use lora_format::checkpoint::{Checkpoint, Location};
use lora_format::fingerprint::{self, Fingerprint, TargetSamples, Verdict};
use lora_format::io::mmap::Mapping;
use lora_format::model::{Adapter, Component, Form};

use crate::error::{Error, PlanProblem, Result};
use crate::numbers::float_type;
use crate::parameters::{Parameter, Parameters, Source};
use crate::place::{Part, Placed, wanted};
use crate::resolve::{self, Wanted};

/// Compares an adapter's fingerprint with the base; reads a few pages per sampled target.
pub(crate) fn check(
    base: &Checkpoint,
    parameters: &Parameters,
    index: usize,
    adapter: &Adapter,
    placed: &[Placed],
) -> Result<Verdict> {
    compare(base, adapter, |target| {
        let place = placed.iter().find(|place| {
            // What is spread over a stack has no parameter of its own to sample.
            place.adapter == index
                && matches!(place.part, Part::Whole)
                && adapter.components[place.component].target.name() == target
        })?;
        Some(parameters.get(place.parameter?))
    })
}

/// Compares an adapter's fingerprint with the parameters of the base that its targets are.
fn compare<'a>(
    base: &Checkpoint,
    adapter: &Adapter,
    find: impl Fn(&str) -> Option<&'a Parameter>,
) -> Result<Verdict> {
    let Some(recorded) = &adapter.base.fingerprint else {
        return Ok(Verdict::Unknown);
    };
    let mut sampler = Sampler::new(base);
    let mut failure = None;
    let verdict = fingerprint::compare(recorded, |expected| {
        match sampler.sample(&expected.target, find(&expected.target)?) {
            Ok(samples) => samples,
            Err(error) => {
                failure = Some(error);
                None
            }
        }
    });
    failure.map_or(Ok(verdict), Err)
}

/// Refuses a base whose values are not those that the adapter's fingerprint has of its own, for what
/// reads both without planning a merge. Targets that the base does not have are not compared.
///
/// # Errors
/// [`Error::DifferentBase`]; [`Error::Plan`] if the base stores a parameter twice; [`Error::Format`] if
/// it cannot be read.
pub fn refuse_other(adapter: &Adapter, base: &Checkpoint) -> Result<()> {
    let parameters = Parameters::of(base).map_err(|problems| Error::Plan {
        adapters: vec![adapter.path.clone()],
        base: base.path().to_owned(),
        problems,
    })?;
    let components = &adapter.components;
    let targets: Vec<Wanted<'_>> =
        components.iter().map(|component| wanted(component, &parameters)).collect();
    let found = resolve::resolve(&targets, &parameters).found;
    let verdict = compare(base, adapter, |target| {
        let index = components.iter().position(|component| component.target.name() == target)?;
        Some(parameters.get(found[index]?))
    })?;
    refuse_different(&verdict, adapter, base)
}

/// [`Error::DifferentBase`], if that is the verdict.
pub(crate) fn refuse_different(
    verdict: &Verdict,
    adapter: &Adapter,
    base: &Checkpoint,
) -> Result<()> {
    let Verdict::Different { equal, compared, first } = verdict else { return Ok(()) };
    Err(Error::DifferentBase {
        adapter: adapter.path.clone(),
        base: base.path().to_owned(),
        equal: *equal,
        compared: *compared,
        first: first.clone(),
    })
}

/// Whether two parameters have the same shape, dtype and sampled values.
pub(crate) fn same_values(
    base: &Checkpoint,
    parameters: &Parameters,
    first: usize,
    second: usize,
) -> Result<bool> {
    let mut sampler = Sampler::new(base);
    let first = sampler.sample("", parameters.get(first))?;
    Ok(first.is_some() && first == sampler.sample("", parameters.get(second))?)
}

/// What a tensor that an adapter brings is to the base's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Copied {
    /// Its values, all of them.
    Equal,
    /// Its rows, and more behind them.
    Grown,
    /// Anything else.
    Different,
}

/// Compares a tensor with a parameter of the base, value by value. One of a wider dtype is equal
/// if the base's values are its own, rounded.
pub(crate) fn copied(
    base: &Checkpoint,
    parameters: &Parameters,
    index: usize,
    tensor: &Tensor,
) -> Result<Copied> {
    /// Elements compared at once, whose pages are then given back.
    const RUN: usize = 1 << 20;
    let parameter = parameters.get(index);
    let (Source::Plain(location), Some(own), Some(other)) =
        (parameter.source, float_type(parameter.dtype), float_type(tensor.dtype))
    else {
        return Ok(Copied::Different);
    };
    let same_rows = parameter.shape.get(1..) == tensor.shape.get(1..);
    if !same_rows || tensor.shape.first() < parameter.shape.first() {
        return Ok(Copied::Different);
    }
    let shard = &base.shards()[location.shard];
    let mapping = shard.file.map()?;
    let info = base.info(location);
    let start = (shard.file.header().data_start + info.start) as usize;
    let elements = info.elements() as usize;
    let mut first = 0;
    while first < elements {
        let end = elements.min(first + RUN);
        let range = start + first * own.size()..start + end * own.size();
        let stored = mapping[range.clone()].chunks_exact(own.size());
        let brought =
            tensor.bytes()[first * other.size()..end * other.size()].chunks_exact(other.size());
        let equal = stored.zip(brought).all(|(stored, brought)| {
            let value = f64::from(other.decode(word(brought)));
            own == other && stored == brought || own.encode(value) == word(stored)
        });
        mapping.release(range);
        tensor.release();
        if !equal {
            return Ok(Copied::Different);
        }
        first = end;
    }
    let grown = tensor.shape.first() > parameter.shape.first();
    Ok(if grown { Copied::Grown } else { Copied::Equal })
}

/// Two or four little-endian bytes.
fn word(bytes: &[u8]) -> u32 {
    bytes.iter().rev().fold(0, |word, &byte| word << 8 | u32::from(byte))
}

/// The fingerprint of `base` for this adapter, as `docs/FORMAT.md` defines it.
///
/// # Errors
/// [`Error::Plan`] if a module of the adapter is not in the base, [`Error::Format`] if the base
/// cannot be read.
pub fn stamp(adapter: &Adapter, base: &Checkpoint) -> Result<Fingerprint> {
    let refuse = |problems| Error::Plan {
        adapters: vec![adapter.path.clone()],
        base: base.path().to_owned(),
        problems,
    };
    let parameters = Parameters::of(base).map_err(refuse)?;
    // A head that the base does not store, since it is tied or new, has no values to sample; and
    // which parameter the factors of fused experts belong to, their name does not say.
    let mut wanted: Vec<Wanted<'_>> =
        adapter.components.iter().map(|component| wanted(component, &parameters)).collect();
    for (wanted, Component { form, .. }) in wanted.iter_mut().zip(&adapter.components) {
        wanted.optional |= matches!(form, Form::Experts(_));
    }
    let resolution = resolve::resolve(&wanted, &parameters);
    if !resolution.problems.is_empty() {
        return Err(refuse(resolution.problems));
    }
    let mut sampler = Sampler::new(base);
    let mut targets = Vec::new();
    for index in fingerprint::sampled_targets(wanted.len()) {
        let Some(found) = resolution.found[index] else {
            continue;
        };
        let name = adapter.components[index].target.name();
        let parameter = parameters.get(found);
        match sampler.sample(&name, parameter)? {
            Some(samples) => targets.push(samples),
            None => {
                let (parameter, dtype) = (parameter.name.clone(), parameter.dtype);
                return Err(refuse(vec![PlanProblem::Unsampled { parameter, dtype }]));
            }
        }
    }
    Ok(Fingerprint { targets })
}

/// Maps each shard once.
struct Sampler<'a> {
    base: &'a Checkpoint,
    mappings: Vec<Option<Mapping>>,
}

impl<'a> Sampler<'a> {
    fn new(base: &'a Checkpoint) -> Sampler<'a> {
        Sampler { base, mappings: base.shards().iter().map(|_| None).collect() }
    }

    fn bytes(&mut self, location: Location) -> Result<&[u8]> {
        let shard = &self.base.shards()[location.shard];
        let slot = &mut self.mappings[location.shard];
        let mapping = match slot {
            Some(mapping) => mapping,
            None => slot.insert(shard.file.map()?),
        };
        let info = self.base.info(location);
        let start = (shard.file.header().data_start + info.start) as usize;
        Ok(&mapping[start..start + info.bytes() as usize])
    }

    /// `None` unless the parameter is stored plainly as F32, F16 or BF16.
    fn sample(&mut self, target: &str, parameter: &Parameter) -> Result<Option<TargetSamples>> {
        let Source::Plain(location) = parameter.source else {
            return Ok(None);
        };
        let values = fingerprint::sample(parameter.dtype, self.bytes(location)?);
        Ok(values.map(|values| TargetSamples {
            target: target.to_owned(),
            dtype: parameter.dtype,
            shape: parameter.shape.clone(),
            values,
        }))
    }
}
