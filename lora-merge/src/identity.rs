//! Whether the base in hand is the base that the adapter was trained on.

use lora_format::Tensor;
use lora_format::checkpoint::{Checkpoint, Location};
use lora_format::fingerprint::{self, Fingerprint, TargetSamples, Verdict};
use lora_format::io::mmap::Mapping;
use lora_format::model::Adapter;

use crate::error::{Error, PlanProblem, Result};
use crate::parameters::{Parameter, Parameters, Source};
use crate::place::{Part, Placed};
use crate::resolve::{self, Wanted};

/// Compares an adapter's fingerprint with the base; reads a few pages per sampled target.
pub(crate) fn check(
    base: &Checkpoint,
    parameters: &Parameters,
    index: usize,
    adapter: &Adapter,
    placed: &[Placed],
) -> Result<Verdict> {
    let Some(recorded) = &adapter.base.fingerprint else {
        return Ok(Verdict::Unknown);
    };
    let mut sampler = Sampler::new(base);
    let mut failure = None;
    let verdict = fingerprint::compare(recorded, |expected| {
        let place = placed.iter().find(|place| {
            // What is spread over a stack has no parameter of its own to sample.
            place.adapter == index
                && matches!(place.part, Part::Whole)
                && adapter.components[place.component].target.name() == expected.target
        })?;
        match sampler.sample(&expected.target, parameters.get(place.parameter?)) {
            Ok(samples) => samples,
            Err(error) => {
                failure = Some(error);
                None
            }
        }
    });
    failure.map_or(Ok(verdict), Err)
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

/// Whether a tensor has the rows of a parameter, and perhaps more behind them.
pub(crate) fn begins_with(
    base: &Checkpoint,
    parameters: &Parameters,
    index: usize,
    tensor: &Tensor,
) -> Result<bool> {
    let parameter = parameters.get(index);
    let Source::Plain(location) = parameter.source else {
        return Ok(false);
    };
    let same_rows = parameter.shape.get(1..) == tensor.shape.get(1..);
    if !same_rows || tensor.shape.first() < parameter.shape.first() {
        return Ok(false);
    }
    let mut sampler = Sampler::new(base);
    let stored = sampler.bytes(location)?;
    let elements = stored.len() as u64 * 8 / parameter.dtype.bits();
    let beginning = elements * tensor.dtype.bits() / 8;
    let beginning = &tensor.bytes()[..beginning as usize];
    let stored = fingerprint::sample(parameter.dtype, stored);
    Ok(stored.is_some() && stored == fingerprint::sample(tensor.dtype, beginning))
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
    let wanted: Vec<Wanted<'_>> = adapter
        .components
        .iter()
        .map(|component| Wanted {
            module: &component.target.module,
            parameter: &component.target.parameter,
            optional: false,
        })
        .collect();
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
