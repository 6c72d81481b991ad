//! Reading W, wherever it is: a tensor of the base, a quantised weight, a tensor of the adapter.

use std::ops::Range;

use lora_format::Tensor;
use lora_format::checkpoint::{Checkpoint, Location};
use lora_format::io::mmap::Mapping;
use lora_format::model::Form;

use crate::error::Result;
use crate::kernels::FloatType;
use crate::numbers::{decode_bytes, float_type};
use crate::parameters::Source;
use crate::plan::MergePlan;
use crate::quantised::QuantisedWeight;

/// The base's files, mapped.
pub(super) struct Sources<'a> {
    plan: &'a MergePlan,
    mappings: Vec<Mapping>,
}

/// The values of one parameter.
#[derive(Clone, Copy)]
pub(super) enum Values<'a> {
    /// Stored as they are, in a mapped file.
    Mapped { mapping: &'a Mapping, start: usize, float: FloatType },
    /// Stored as they are, in an adapter's file or in memory.
    Tensor { tensor: &'a Tensor, float: FloatType },
    /// To be decoded.
    Quantised { weight: &'a QuantisedWeight, sources: &'a Sources<'a> },
}

impl<'a> Sources<'a> {
    pub(super) fn open(plan: &'a MergePlan) -> Result<Sources<'a>> {
        let shards = plan.base.shards().iter();
        let mappings = shards.map(|shard| shard.file.map()).collect::<Result<_, _>>()?;
        Ok(Sources { plan, mappings })
    }

    /// The mapping of a shard.
    pub(super) fn mapping(&self, shard: usize) -> &Mapping {
        &self.mappings[shard]
    }

    /// The bytes of a tensor of the base.
    pub(super) fn bytes(&self, location: Location) -> &[u8] {
        &self.mappings[location.shard][range(&self.plan.base, location)]
    }

    /// Where a parameter's values are. Its dtype is one that the kernels know: the planner looked.
    pub(super) fn values(&'a self, source: Source) -> Values<'a> {
        match source {
            Source::Plain(location) => Values::Mapped {
                mapping: &self.mappings[location.shard],
                start: range(&self.plan.base, location).start,
                float: known(self.plan.base.info(location).dtype),
            },
            Source::Quantised(index) => match self.plan.parameters.weight(index) {
                Some(weight) => Values::Quantised { weight, sources: self },
                None => unreachable!("indices come from the weights themselves"),
            },
            Source::Brought { adapter, component } => {
                match &self.plan.component(adapter, component).form {
                    Form::Replaced(tensor) | Form::Base(tensor) => {
                        Values::Tensor { tensor, float: known(tensor.dtype) }
                    }
                    _ => unreachable!("only what replaces is brought"),
                }
            }
        }
    }
}

fn known(dtype: lora_format::Dtype) -> FloatType {
    float_type(dtype).unwrap_or(FloatType::F32)
}

/// The bytes of a tensor in its shard's file.
fn range(base: &Checkpoint, location: Location) -> Range<usize> {
    let info = base.info(location);
    let start = base.shards()[location.shard].file.header().data_start + info.start;
    start as usize..(start + info.bytes()) as usize
}

impl<'a> Values<'a> {
    /// The type that [`Values::read`] gives.
    pub(super) fn float(&self) -> FloatType {
        match self {
            Values::Mapped { float, .. } | Values::Tensor { float, .. } => *float,
            Values::Quantised { .. } => FloatType::F32,
        }
    }

    /// The bytes of a run of elements: in place where they are stored so, decoded into `scratch`
    /// otherwise.
    pub(super) fn read<'s>(&self, elements: Range<usize>, scratch: &'s mut Scratch) -> &'s [u8]
    where
        'a: 's,
    {
        match *self {
            Values::Mapped { mapping, start, float } => {
                let range = bytes(start, &elements, float);
                mapping.populate(range.clone());
                &mapping[range]
            }
            Values::Tensor { tensor, float } => &tensor.bytes()[bytes(0, &elements, float)],
            Values::Quantised { weight, sources } => {
                scratch.floats.resize(elements.len(), 0.0);
                weight.read(&|part| sources.bytes(part), elements.start, &mut scratch.floats);
                scratch.bytes.clear();
                scratch.bytes.extend(scratch.floats.iter().flat_map(|value| value.to_le_bytes()));
                &scratch.bytes
            }
        }
    }

    /// The same as numbers.
    pub(super) fn read_f32(&self, elements: Range<usize>, out: &mut [f32]) {
        match *self {
            Values::Mapped { mapping, start, float } => {
                decode_bytes(float, &mapping[bytes(start, &elements, float)], 0, 1, out);
            }
            Values::Tensor { tensor, float } => {
                decode_bytes(float, &tensor.bytes()[bytes(0, &elements, float)], 0, 1, out);
            }
            Values::Quantised { weight, sources } => {
                weight.read(&|part| sources.bytes(part), elements.start, out);
            }
        }
    }

    /// Rounds values to what a quantised weight's scales can represent.
    pub(super) fn requantise(&self, first: usize, values: &[f32], out: &mut [f32]) {
        if let Values::Quantised { weight, sources } = self {
            weight.requantise(&|part| sources.bytes(part), first, values, out);
        }
    }

    /// Gives pages back that will not be read again.
    pub(super) fn release(&self, elements: Range<usize>) {
        if let Values::Mapped { mapping, start, float } = *self {
            mapping.release(bytes(start, &elements, float));
        }
    }

    /// Gives everything back when the last run has been read.
    pub(super) fn release_all(&self) {
        match self {
            Values::Mapped { .. } => {}
            Values::Tensor { tensor, .. } => tensor.release(),
            Values::Quantised { weight, sources } => {
                for &part in &weight.parts {
                    let range = range(&sources.plan.base, part);
                    sources.mappings[part.shard].release(range);
                }
            }
        }
    }
}

fn bytes(start: usize, elements: &Range<usize>, float: FloatType) -> Range<usize> {
    let size = float.size();
    start + elements.start * size..start + elements.end * size
}

/// Room for decoded values, kept from tile to tile.
#[derive(Default)]
pub(super) struct Scratch {
    floats: Vec<f32>,
    bytes: Vec<u8>,
}
