//! The parameters of a base as its model has them, however they are stored: a quantised weight is
//! one parameter, its codes and scales are none.

use std::collections::HashMap;

use lora_format::Dtype;
use lora_format::checkpoint::{Checkpoint, Location};

use crate::error::PlanProblem;
use crate::quantised::{self, QuantisedBase, QuantisedProblem, QuantisedWeight};

/// Every parameter of a base model, sorted by name.
#[derive(Debug)]
pub struct Parameters {
    list: Vec<Parameter>,
    quantised: Option<QuantisedBase>,
    unexplained: Vec<QuantisedProblem>,
}

/// One parameter of the model.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameter {
    /// Its name: `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// Its shape in the model.
    pub shape: Vec<usize>,
    /// The dtype it is stored in, or that its dequantisation has.
    pub dtype: Dtype,
    /// Where its values are.
    pub source: Source,
}

/// Where the values of a parameter come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// A tensor of the base.
    Plain(Location),
    /// A quantised weight of the base: its index among those of [`Parameters::quantised`].
    Quantised(usize),
    /// The only tensor of an adapter's component, which replaces what the base has.
    Brought {
        /// Index of the adapter.
        adapter: usize,
        /// Index of its component.
        component: usize,
    },
}

/// What a tensor of the base's files is to its model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// The parameter with this index, or the codes of it.
    Parameter(usize),
    /// What belongs to a quantised weight besides its codes, or to the quantisation as a whole.
    Part,
}

impl Parameters {
    /// The parameters of a base.
    ///
    /// # Errors
    /// Tensors that look quantised and do not fit together.
    pub fn of(base: &Checkpoint) -> Result<Parameters, Vec<PlanProblem>> {
        let (quantised, unexplained) = match quantised::find(base) {
            Ok(quantised) => (quantised, Vec::new()),
            // What cannot be read can still be copied, unless a change is meant for it.
            Err(problems) => (None, problems),
        };
        let mut parts: Vec<Location> = quantised.iter().flat_map(tensors).collect();
        parts.sort_unstable();
        let plain = base.tensors().filter(|(at, _)| parts.binary_search(at).is_err());
        let mut list: Vec<Parameter> = plain
            .map(|(location, info)| Parameter {
                name: info.name.clone(),
                shape: info.shape.clone(),
                dtype: info.dtype,
                source: Source::Plain(location),
            })
            .collect();
        if let Some(quantised) = &quantised {
            list.extend(quantised.weights.iter().enumerate().map(|(index, weight)| Parameter {
                name: weight.name.clone(),
                shape: weight.shape.clone(),
                dtype: weight.dtype,
                source: Source::Quantised(index),
            }));
            list.sort_by(|a, b| a.name.cmp(&b.name));
        }
        if let Some(pair) = list.windows(2).find(|pair| pair[0].name == pair[1].name) {
            return Err(vec![PlanProblem::StoredTwice { parameter: pair[0].name.clone() }]);
        }
        Ok(Parameters { list, quantised, unexplained })
    }

    /// The role of every tensor of the base's files.
    pub(crate) fn roles(&self) -> HashMap<Location, Role> {
        let mut roles = HashMap::new();
        if let Some(quantised) = &self.quantised {
            roles.extend(tensors(quantised).map(|location| (location, Role::Part)));
        }
        for (index, parameter) in self.list.iter().enumerate() {
            let location = match parameter.source {
                Source::Plain(location) => Some(location),
                Source::Quantised(weight) => {
                    self.weight(weight).and_then(|weight| weight.parts.first().copied())
                }
                Source::Brought { .. } => None,
            };
            roles.extend(location.map(|location| (location, Role::Parameter(index))));
        }
        roles
    }

    /// All of them, sorted by name.
    pub fn all(&self) -> &[Parameter] {
        &self.list
    }

    /// The parameter with this index.
    pub fn get(&self, index: usize) -> &Parameter {
        &self.list[index]
    }

    /// The index of the parameter called `name`.
    pub fn find(&self, name: &str) -> Option<usize> {
        self.list.binary_search_by(|parameter| parameter.name.as_str().cmp(name)).ok()
    }

    /// Those whose names begin with `prefix`, with their indices.
    pub fn under<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (usize, &'a Parameter)> {
        let first = self.list.partition_point(|parameter| parameter.name.as_str() < prefix);
        let rest = self.list.iter().enumerate().skip(first);
        rest.take_while(move |(_, parameter)| parameter.name.starts_with(prefix))
    }

    /// What the base stores quantised, and by which method.
    pub fn quantised(&self) -> Option<&QuantisedBase> {
        self.quantised.as_ref()
    }

    /// Why quantised tensors of the base cannot be read: then each is a parameter of its own.
    pub fn unexplained(&self) -> &[QuantisedProblem] {
        &self.unexplained
    }

    /// A quantised weight by its index.
    pub(crate) fn weight(&self, index: usize) -> Option<&QuantisedWeight> {
        self.quantised.as_ref()?.weights.get(index)
    }
}

impl Parameter {
    /// The number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&n| n as u64).product()
    }
}

/// Every tensor that a quantised base has besides its plain parameters.
fn tensors(base: &QuantisedBase) -> impl Iterator<Item = Location> {
    let parts = base.weights.iter().flat_map(|weight| &weight.parts);
    parts.chain(&base.dropped).copied()
}
