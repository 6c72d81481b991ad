//! The experts that a base has: as stacks, or matrix by matrix.

use std::collections::{BTreeMap, HashMap};

use lora_format::Shape;
use serde_json::{Map, Value};

use super::names::{self, OfExpert, OfStack, Projection, Sharing};
use crate::orientation::Orientation;
use crate::parameters::Parameters;

/// What the base's configuration says of its experts.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Model<'a> {
    kinds: [Option<&'a str>; 2],
}

impl<'a> Model<'a> {
    pub(super) fn new(config: Option<&'a Map<String, Value>>) -> Model<'a> {
        let kind = |config: Option<&'a Map<String, Value>>| config?.get("model_type")?.as_str();
        let text = config.and_then(|config| config.get("text_config")?.as_object());
        Model { kinds: [kind(text), kind(config)] }
    }

    fn is(&self, kinds: &[&str]) -> bool {
        self.kinds.iter().flatten().any(|kind| kinds.contains(kind))
    }

    /// How a stack of gate and up projections that is stored so is shared. Of transformers'
    /// classes only gpt-oss interleaves; but what is stored as (E, in, out) is of a class of its
    /// own each time, so there the class must be known.
    fn sharing(&self, stored: Orientation) -> Option<Sharing> {
        const INTERLEAVED: [&str; 1] = ["gpt_oss"];
        const HALVES: [&str; 7] = [
            "aria",
            "aria_text",
            "llama4",
            "llama4_text",
            "openai_privacy_filter",
            "qwen3_vl_moe",
            "qwen3_vl_moe_text",
        ];
        match stored {
            _ if self.is(&INTERLEAVED) => Some(Sharing::Interleaved),
            Orientation::OutIn => Some(Sharing::Halves),
            Orientation::InOut => self.is(&HALVES).then_some(Sharing::Halves),
        }
    }

    /// Whether a stack that is stored as (E, in, out) lies so in the memory of every transformers
    /// release: Qwen3-VL-MoE's is transposed by transformers 5.
    pub(super) fn keeps_in_out(&self) -> bool {
        const KEPT: [&str; 6] =
            ["gpt_oss", "llama4", "llama4_text", "aria", "aria_text", "openai_privacy_filter"];
        self.is(&KEPT)
    }
}

/// The experts of one layer.
#[derive(Debug, Default)]
pub(super) struct Block {
    /// Everything stored of each projection; more than one thing is once too much.
    stored: BTreeMap<Projection, Vec<Stored>>,
}

/// One projection of all experts.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Stored {
    /// A parameter E × rows × columns.
    Stack {
        parameter: usize,
        shape: [usize; 3],
        /// How gate and up share it, where its name says so.
        sharing: Option<Sharing>,
        /// Whether transformers 5 has it so in memory.
        as_in_memory: bool,
    },
    /// Parameters out × in, by expert.
    Each {
        parameters: BTreeMap<usize, usize>,
        /// What they are called, with `*` for the expert.
        called: String,
    },
}

/// One projection of all experts as matrices of one shape.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Matrices<'a> {
    pub(super) stored: &'a Stored,
    pub(super) experts: usize,
    pub(super) rows: usize,
    pub(super) cols: usize,
}

/// The experts of all layers.
#[derive(Debug, Default)]
pub(super) struct Base {
    /// The modules that have them, as transformers 5 names them.
    pub(super) containers: Vec<String>,
    pub(super) blocks: Vec<Block>,
    /// The block that each stack belongs to.
    stacks: HashMap<usize, usize>,
}

impl Base {
    pub(super) fn of(parameters: &Parameters) -> Base {
        let mut base = Base::default();
        let mut known = HashMap::new();
        for (index, parameter) in parameters.all().iter().enumerate() {
            match *parameter.shape.as_slice() {
                [experts, rows, cols] => {
                    let Some(OfStack { container, projection, sharing, as_in_memory }) =
                        names::of_stack(&parameter.name)
                    else {
                        continue;
                    };
                    let (number, block) = base.block(&mut known, &container);
                    let shape = [experts, rows, cols];
                    let stack = Stored::Stack { parameter: index, shape, sharing, as_in_memory };
                    block.stored.entry(projection).or_default().push(stack);
                    base.stacks.insert(index, number);
                }
                [_, _] => {
                    let module = parameter.name.strip_suffix(".weight");
                    let Some(OfExpert { container, expert, projection }) =
                        module.and_then(names::of_expert)
                    else {
                        continue;
                    };
                    let called = numbered(&parameter.name[container.len()..], expert);
                    let stored =
                        base.block(&mut known, container).1.stored.entry(projection).or_default();
                    let same = stored.iter_mut().find_map(|stored| match stored {
                        Stored::Each { parameters, called: other } if *other == called => {
                            Some(parameters)
                        }
                        _ => None,
                    });
                    match same {
                        Some(parameters) => drop(parameters.insert(expert, index)),
                        None => stored.push(Stored::Each {
                            parameters: BTreeMap::from([(expert, index)]),
                            called,
                        }),
                    }
                }
                _ => {}
            }
        }
        base
    }

    fn block(
        &mut self,
        known: &mut HashMap<String, usize>,
        container: &str,
    ) -> (usize, &mut Block) {
        let container = names::canonical(container);
        let number = *known.entry(container).or_insert_with_key(|container| {
            self.containers.push(container.clone());
            self.blocks.push(Block::default());
            self.blocks.len() - 1
        });
        (number, &mut self.blocks[number])
    }

    /// The block that a stack belongs to.
    pub(super) fn block_of(&self, parameter: usize) -> Option<&Block> {
        self.stacks.get(&parameter).map(|&block| &self.blocks[block])
    }
}

fn numbered(name: &str, expert: usize) -> String {
    let number = expert.to_string();
    let parts = name.split('.').map(|part| if part == number { "*" } else { part });
    parts.collect::<Vec<_>>().join(".")
}

impl Block {
    /// What is stored of a projection; nothing is `None`.
    pub(super) fn stored(&self, projection: Projection) -> Result<Option<&Stored>, String> {
        match self.stored.get(&projection).map(Vec::as_slice) {
            None | Some([]) => Ok(None),
            Some([one]) => Ok(Some(one)),
            Some(_) => Err(format!("the base stores the {} twice", projection.name())),
        }
    }

    /// A projection of every expert, if they are all there and of one shape.
    pub(super) fn matrices(
        &self,
        projection: Projection,
        parameters: &Parameters,
    ) -> Result<Option<Matrices<'_>>, String> {
        match self.stored(projection)? {
            None => Ok(None),
            Some(stored) => stored.matrices(projection, parameters).map(Some),
        }
    }

    /// How the block's stacks are stored, where their own shapes show it: what goes into the down
    /// projection is half of what the gate and the up projection give.
    pub(super) fn orientation(&self) -> Option<Orientation> {
        let only = |projection| self.stored(projection).ok().flatten();
        let (gate_up, down) = (only(Projection::GateUp)?, only(Projection::Down)?);
        let (
            Stored::Stack { shape: [_, rows, cols], .. },
            Stored::Stack { shape: [_, down_rows, down_cols], .. },
        ) = (gate_up, down)
        else {
            return None;
        };
        let twice = |length: usize| length.checked_mul(2);
        let out_in = cols == down_rows && Some(*rows) == twice(*down_cols);
        let in_out = rows == down_cols && Some(*cols) == twice(*down_rows);
        match (out_in, in_out) {
            (true, false) => Some(Orientation::OutIn),
            (false, true) => Some(Orientation::InOut),
            _ => None,
        }
    }
}

impl Stored {
    pub(super) fn matrices(
        &self,
        projection: Projection,
        parameters: &Parameters,
    ) -> Result<Matrices<'_>, String> {
        let (experts, rows, cols) = match self {
            Stored::Stack { shape: [experts, rows, cols], .. } => (*experts, *rows, *cols),
            Stored::Each { parameters: each, .. } => {
                let shape = |index: &usize| parameters.get(*index).shape.as_slice();
                let Some((_, first)) = each.first_key_value() else {
                    return Err(format!("the base has no {}", projection.name()));
                };
                if let Some(missing) = (0..each.len()).find(|expert| !each.contains_key(expert)) {
                    return Err(format!(
                        "the base has the {} of {} experts, and not of expert {missing}",
                        projection.name(),
                        each.len()
                    ));
                }
                if let Some(other) = each.values().find(|other| shape(other) != shape(first)) {
                    return Err(format!(
                        "`{}` is {} and `{}` is {}: the experts of a stack are of one shape",
                        parameters.get(*first).name,
                        Shape(shape(first).to_vec()),
                        parameters.get(*other).name,
                        Shape(shape(other).to_vec()),
                    ));
                }
                // Only matrices were collected.
                (each.len(), shape(first)[0], shape(first)[1])
            }
        };
        Ok(Matrices { stored: self, experts, rows, cols })
    }

    /// How gate and up share what is stored so.
    pub(super) fn sharing(&self, model: Model<'_>, stored: Orientation) -> Option<Sharing> {
        match self {
            Stored::Stack { sharing, .. } => sharing.or_else(|| model.sharing(stored)),
            // Taken out of gpt-oss' stack as they are.
            Stored::Each { .. } => Some(Sharing::Interleaved),
        }
    }
}
