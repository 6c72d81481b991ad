//! Whether the base in hand is the base that the adapter was trained on.

use lora_format::checkpoint::{Checkpoint, Location};
use lora_format::fingerprint::{self, Fingerprint, TargetSamples, Verdict};
use lora_format::io::mmap::Mapping;
use lora_format::model::Adapter;

use crate::error::{Error, PlanProblem, Result};
use crate::plan::PlannedTarget;
use crate::resolve;

/// Compares the adapter's fingerprint with the base; reads a few pages per sampled target.
pub(crate) fn check(
    base: &Checkpoint,
    adapter: &Adapter,
    targets: &[PlannedTarget],
) -> Result<Verdict> {
    let Some(recorded) = &adapter.base.fingerprint else {
        return Ok(Verdict::Unknown);
    };
    let mut sampler = Sampler::new(base);
    let mut failure = None;
    let verdict = fingerprint::compare(recorded, |expected| {
        let target = targets
            .iter()
            .find(|target| adapter.components[target.component].target.name() == expected.target)?;
        match sampler.sample(&expected.target, target.location) {
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
pub(crate) fn same_values(base: &Checkpoint, first: Location, second: Location) -> Result<bool> {
    let mut sampler = Sampler::new(base);
    let first = sampler.sample("", first)?;
    Ok(first.is_some() && first == sampler.sample("", second)?)
}

/// The fingerprint of `base` for this adapter, as `docs/FORMAT.md` defines it.
///
/// # Errors
/// [`Error::Plan`] if a module of the adapter is not in the base, [`Error::Format`] if the base
/// cannot be read.
pub fn stamp(adapter: &Adapter, base: &Checkpoint) -> Result<Fingerprint> {
    let modules: Vec<&str> = adapter.components.iter().map(|c| c.target.module.as_str()).collect();
    let resolution = resolve::resolve(&modules, base);
    if !resolution.problems.is_empty() {
        let (adapter, base) = (adapter.path.clone(), base.path().to_owned());
        return Err(Error::Plan { adapter, base, problems: resolution.problems });
    }
    let mut sampler = Sampler::new(base);
    let mut targets = Vec::new();
    for index in fingerprint::sampled_targets(modules.len()) {
        let Some(location) = resolution.locations[index] else {
            continue;
        };
        let name = adapter.components[index].target.name();
        match sampler.sample(&name, location)? {
            Some(samples) => targets.push(samples),
            None => {
                let info = base.info(location);
                let (parameter, dtype) = (info.name.clone(), info.dtype);
                let problems = vec![PlanProblem::Quantised { parameter, dtype, method: None }];
                let (adapter, base) = (adapter.path.clone(), base.path().to_owned());
                return Err(Error::Plan { adapter, base, problems });
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

    /// `None` unless the parameter is stored as F32, F16 or BF16.
    fn sample(&mut self, target: &str, location: Location) -> Result<Option<TargetSamples>> {
        let shard = &self.base.shards()[location.shard];
        let slot = &mut self.mappings[location.shard];
        let mapping = match slot {
            Some(mapping) => mapping,
            None => slot.insert(shard.file.map()?),
        };
        let info = self.base.info(location);
        let start = (shard.file.header().data_start + info.start) as usize;
        let bytes = &mapping[start..start + info.bytes() as usize];
        Ok(fingerprint::sample(info.dtype, bytes).map(|values| TargetSamples {
            target: target.to_owned(),
            dtype: info.dtype,
            shape: info.shape.clone(),
            values,
        }))
    }
}
