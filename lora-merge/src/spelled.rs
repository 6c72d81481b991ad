//! Adapters that spell modules in another way than their model does: sd-scripts' flattened names,
//! diffusers' and ComfyUI's with a component before them.
//!
//! What a name means is looked up, never guessed: among the modules of the base's architecture if
//! it is one that [`lora_format::naming`] lists, else among the names that the base's own
//! parameters have once dots are underscores. A name may mean rows of a parameter (Flux' `to_q` is
//! part of `img_attn.qkv`) or several parameters (the other way round).

use std::collections::{BTreeMap, HashMap};

use lora_format::Adapter;
use lora_format::model::{Component, Form, Layer, LowRank};
use lora_format::naming::{BaseNames, BasePiece, Catalogue, Linked, Names, NamingProblem};

use crate::error::PlanProblem;
use crate::low_rank::{Factor, Stride, Term, View};
use crate::parameters::Parameters;
use crate::place::{Part, Placed};
use crate::plan::WeightedAdapter;

/// Whether an adapter spells its modules as some format does.
pub(crate) fn spells(adapter: &Adapter) -> bool {
    adapter.names.is_some()
}

/// Places every component of an adapter whose format spells modules.
pub(crate) fn place(
    adapter: usize,
    contents: &Adapter,
    parameters: &Parameters,
    problems: &mut Vec<PlanProblem>,
) -> Vec<Placed> {
    let dictionary = match Dictionary::new(contents, parameters) {
        Ok(dictionary) => dictionary,
        Err(problem) => {
            problems.push(problem.into());
            return Vec::new();
        }
    };
    let mut meanings: HashMap<&str, Result<Vec<BasePiece>, NamingProblem>> = HashMap::new();
    let mut placed = Vec::new();
    for (index, component) in contents.components.iter().enumerate() {
        let module = component.target.module.as_str();
        let meaning = meanings.entry(module).or_insert_with(|| dictionary.look_up(module));
        let pieces = match meaning {
            Ok(pieces) => pieces,
            Err(NamingProblem::Unknown { .. }) => {
                problems.push(PlanProblem::Unresolved {
                    module: module.to_owned(),
                    parameter: component.target.parameter.clone(),
                    nearest: dictionary.nearest(module),
                });
                continue;
            }
            Err(problem) => {
                problems.push(problem.clone().into());
                continue;
            }
        };
        let key = (adapter, index);
        match parts(key, component, pieces, parameters) {
            Ok(parts) => placed.extend(parts),
            Err(problem) => problems.push(problem),
        }
    }
    placed
}

/// What names can mean.
struct Dictionary<'a> {
    /// Of an architecture that is listed.
    listed: Option<(Linked, Names)>,
    own: BaseNames,
    parameters: &'a Parameters,
}

impl<'a> Dictionary<'a> {
    fn new(adapter: &Adapter, parameters: &'a Parameters) -> Result<Dictionary<'a>, NamingProblem> {
        let all = parameters.all();
        let shapes: BTreeMap<String, Vec<usize>> =
            all.iter().map(|one| (one.name.clone(), one.shape.clone())).collect();
        let linked = Catalogue::of_base(&shapes)?;
        let listed = linked.map(|linked| {
            let modules = adapter.components.iter().map(|one| one.target.module.as_str());
            let names = linked.catalogue().naming_of(modules).1;
            (linked, names)
        });
        let own = BaseNames::new(all.iter().map(|one| one.name.as_str()));
        Ok(Dictionary { listed, own, parameters })
    }

    /// The rows of the base's weights that a module is.
    fn look_up(&self, module: &str) -> Result<Vec<BasePiece>, NamingProblem> {
        if let Some((linked, names)) = &self.listed {
            match names.resolve(module) {
                Ok(resolved) => return linked.pieces(resolved),
                Err(NamingProblem::Unknown { .. }) => {}
                Err(problem) => return Err(problem),
            }
        }
        let name = self.own.resolve(module)?.to_owned();
        let index = self.parameters.find(&name);
        let shape = index.map(|index| &self.parameters.get(index).shape);
        let rows = shape.and_then(|shape| shape.first()).copied().unwrap_or(1);
        Ok(vec![BasePiece { name, row: 0, from: 0, rows, total: rows }])
    }

    fn nearest(&self, module: &str) -> Vec<String> {
        let listed = self.listed.iter().flat_map(|(_, names)| names.nearest(module));
        listed.map(|name| format!("`{name}`")).collect()
    }
}

/// A component in the rows that its module is.
fn parts(
    (adapter, index): (usize, usize),
    component: &Component,
    pieces: &[BasePiece],
    parameters: &Parameters,
) -> Result<Vec<Placed>, PlanProblem> {
    let parameter = component.target.parameter.as_str();
    let mut placed = Vec::with_capacity(pieces.len());
    for (number, piece) in pieces.iter().enumerate() {
        let name = match parameter {
            "bias" => Linked::bias_of(&piece.name).unwrap_or_default(),
            _ => piece.name.clone(),
        };
        let Some(found) = parameters.find(&name) else {
            return Err(PlanProblem::Unresolved {
                module: component.target.module.clone(),
                parameter: parameter.to_owned(),
                nearest: Vec::new(),
            });
        };
        let whole = pieces.len() == 1 && piece.rows == piece.total;
        let part = match &component.form {
            _ if whole => Part::Whole,
            Form::LowRank(form) if form.is_plain() => {
                let rank = form.rank();
                let term = Term {
                    adapter,
                    component: index,
                    left: View {
                        offset: piece.from * rank,
                        ..View::whole(Factor::B, piece.rows, rank)
                    },
                    right: View::whole(Factor::A, rank, form.in_features()),
                    rows: Stride { start: piece.row, step: 1 },
                    cols: Stride::ALL,
                    scale: form.scale(),
                    again: (number > 0).then_some(Factor::A),
                };
                let rows = piece.from.saturating_add(piece.rows);
                if rows > form.out_features() {
                    let problem = format!(
                        "{} output features in `{}`, and {rows} or more in the model",
                        form.out_features(),
                        component.target.module
                    );
                    return Err(PlanProblem::Form { parameter: name, problem });
                }
                Part::Slabs { count: 1, terms: vec![(0, term)] }
            }
            form => {
                let problem = format!(
                    "`{}` is a part of it, and a change of a part by {} is not implemented",
                    component.target.module,
                    form.method()
                );
                return Err(PlanProblem::Form { parameter: name, problem });
            }
        };
        placed.push(Placed { adapter, component: index, parameter: Some(found), part });
    }
    Ok(placed)
}

/// Factors of a 1×1 convolution fit a matrix, and those of a linear layer a 1×1 convolution:
/// models were rewritten from one to the other, and the loaders of these formats take both.
pub(crate) fn reshape(
    adapters: &mut [WeightedAdapter],
    placed: &[Placed],
    parameters: &Parameters,
) {
    for place in placed {
        let adapter = &mut adapters[place.adapter].adapter;
        let Some(index) = place.parameter.filter(|_| spells(adapter)) else { continue };
        let Form::LowRank(form) = &mut adapter.components[place.component].form else { continue };
        let shape = parameters.get(index).shape.as_slice();
        let ones = |shape: &[usize]| shape.iter().skip(2).all(|&length| length == 1);
        match (form.layer, shape.len()) {
            (Layer::Convolution, 2) if ones(&form.a.shape) && form.a.shape.len() > 2 => {
                set_dimensions(form, 2);
                form.layer = Layer::Linear;
            }
            (Layer::Linear, dimensions @ 3..) if ones(shape) => {
                set_dimensions(form, dimensions);
                form.layer = Layer::Convolution;
            }
            _ => {}
        }
    }
}

/// Gives both factors so many dimensions, those behind the second of length 1.
fn set_dimensions(form: &mut LowRank, dimensions: usize) {
    for factor in [&mut form.a, &mut form.b] {
        factor.shape.resize(dimensions, 1);
    }
}
