//! The values of one checkpoint's parameters, mapped.

use std::ops::Range;

use lora_format::checkpoint::{Checkpoint, Location};
use lora_format::io::mmap::Mapping;

use crate::error::Result;
use crate::kernels::{self, FloatType, Isa};
use crate::numbers::float_type;
use crate::parameters::{Parameters, Source};
use crate::quantised::QuantisedWeight;

/// Elements that are decoded at once.
const RUN: usize = 8192;

/// Bytes, or elements, that are compared before their pages are given back.
const WINDOW: usize = 2 << 20;

/// A checkpoint with its files mapped.
#[derive(Debug)]
pub(super) struct Model<'a> {
    checkpoint: &'a Checkpoint,
    parameters: &'a Parameters,
    mappings: Vec<Mapping>,
    isa: Isa,
}

/// The values of one parameter.
#[derive(Clone, Copy, Debug)]
pub(super) enum Values<'a> {
    /// Stored as they are.
    Stored { mapping: &'a Mapping, start: usize, float: FloatType, isa: Isa },
    /// To be decoded.
    Quantised { weight: &'a QuantisedWeight, model: &'a Model<'a> },
}

impl<'a> Model<'a> {
    /// Maps every file.
    pub(super) fn open(
        checkpoint: &'a Checkpoint,
        parameters: &'a Parameters,
    ) -> Result<Model<'a>> {
        let shards = checkpoint.shards().iter();
        let mappings = shards.map(|shard| shard.file.map()).collect::<Result<_, _>>()?;
        Ok(Model { checkpoint, parameters, mappings, isa: Isa::detect() })
    }

    pub(super) fn parameters(&self) -> &'a Parameters {
        self.parameters
    }

    pub(super) fn checkpoint(&self) -> &'a Checkpoint {
        self.checkpoint
    }

    /// The bytes of a tensor.
    pub(super) fn bytes(&self, location: Location) -> &[u8] {
        &self.mappings[location.shard][self.range(location)]
    }

    /// Gives the pages of a tensor back.
    pub(super) fn release(&self, location: Location) {
        self.mappings[location.shard].release(self.range(location));
    }

    /// A tensor in its shard's file.
    fn range(&self, location: Location) -> Range<usize> {
        let info = self.checkpoint.info(location);
        let start = self.checkpoint.shards()[location.shard].file.header().data_start + info.start;
        start as usize..(start + info.bytes()) as usize
    }

    /// The values of a parameter; `None` unless they are of the three merge dtypes or quantised in
    /// a way that is known.
    pub(super) fn values(&self, source: Source) -> Option<Values<'_>> {
        match source {
            Source::Plain(location) => Some(Values::Stored {
                mapping: &self.mappings[location.shard],
                start: self.range(location).start,
                float: float_type(self.checkpoint.info(location).dtype)?,
                isa: self.isa,
            }),
            Source::Quantised(index) => {
                let weight = self.parameters.weight(index)?;
                Some(Values::Quantised { weight, model: self })
            }
            Source::Brought { .. } => None,
        }
    }
}

/// Whether two tensors have the same bytes.
pub(super) fn same_bytes(
    (first, at): (&Model<'_>, Location),
    (second, other): (&Model<'_>, Location),
) -> bool {
    let (ours, theirs) = (first.range(at), second.range(other));
    if ours.len() != theirs.len() {
        return false;
    }
    let (first, second) = (&first.mappings[at.shard], &second.mappings[other.shard]);
    (0..ours.len()).step_by(WINDOW).all(|from| {
        let to = ours.len().min(from + WINDOW);
        let (ours, theirs) =
            (ours.start + from..ours.start + to, theirs.start + from..theirs.start + to);
        let equal = first[ours.clone()] == second[theirs.clone()];
        first.release(ours);
        second.release(theirs);
        equal
    })
}

impl<'a> Values<'a> {
    /// The type that they are stored in; `None` of a quantised weight.
    pub(super) fn float(&self) -> Option<FloatType> {
        match self {
            Values::Stored { float, .. } => Some(*float),
            Values::Quantised { .. } => None,
        }
    }

    /// A run of elements as it is stored.
    pub(super) fn in_place(&self, elements: Range<usize>) -> Option<(&'a [u8], FloatType)> {
        match *self {
            Values::Stored { mapping, start, float, .. } => {
                Some((&mapping[bytes(start, elements, float)], float))
            }
            Values::Quantised { .. } => None,
        }
    }

    /// The elements from `first` on, exactly.
    pub(super) fn read(&self, first: usize, out: &mut [f32]) {
        match *self {
            Values::Stored { mapping, start, float, isa } => {
                let range = bytes(start, first..first + out.len(), float);
                kernels::difference(isa, &mapping[range], float, None, out);
            }
            Values::Quantised { weight, model } => {
                weight.read(&|part| model.bytes(part), first, out);
            }
        }
    }

    /// Maps the pages of elements that are about to be read, in one call.
    pub(super) fn populate(&self, elements: Range<usize>) {
        if let Values::Stored { mapping, start, float, .. } = *self {
            mapping.populate(bytes(start, elements, float));
        }
    }

    /// Gives pages back that will not be read again soon.
    pub(super) fn release(&self, elements: Range<usize>) {
        match *self {
            Values::Stored { mapping, start, float, .. } => {
                mapping.release(bytes(start, elements, float));
            }
            Values::Quantised { weight, model } => {
                let codes = weight.codes(elements.start, elements.len());
                if let Some(&part) = weight.parts.first() {
                    let start = model.range(part).start;
                    model.mappings[part.shard].release(start + codes.start..start + codes.end);
                }
            }
        }
    }

    /// Whether the first `elements` values are equal, NaN and NaN not being.
    pub(super) fn equal(&self, other: &Values<'_>, elements: usize) -> bool {
        let (mut ours, mut theirs) = (vec![0.0; RUN], vec![0.0; RUN]);
        (0..elements).step_by(WINDOW).all(|from| {
            let to = elements.min(from + WINDOW);
            self.populate(from..to);
            other.populate(from..to);
            let equal = (from..to).step_by(RUN).all(|first| {
                let count = RUN.min(to - first);
                self.read(first, &mut ours[..count]);
                other.read(first, &mut theirs[..count]);
                ours[..count] == theirs[..count]
            });
            self.release(from..to);
            other.release(from..to);
            equal
        })
    }
}

fn bytes(start: usize, elements: Range<usize>, float: FloatType) -> Range<usize> {
    let size = float.size();
    start + elements.start * size..start + elements.end * size
}
