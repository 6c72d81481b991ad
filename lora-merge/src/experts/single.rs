//! Adapters of single experts (`experts.3.gate_proj`) on a base that has them in stacks, or under
//! the names of another transformers release.

use std::collections::HashMap;

use lora_format::Shape;
use lora_format::model::{Form, Layer, LowRank};

use super::base::{Block, Matrices, Stored};
use super::layout::Pair;
use super::names::{OfExpert, Projection, Sharing};
use super::{Context, Found, Lie};
use crate::error::PlanProblem;
use crate::low_rank::{Factor, Stride, View};
use crate::orientation::Orientation;
use crate::place::{Part, Placed};

/// What the change of an expert's matrix is a change of.
enum Home {
    /// A parameter that has the adapter's own name.
    Own(usize),
    /// A parameter with another name, or a part of it.
    Other(usize, Part),
}

/// Places the changes of single experts. What the base has under the adapter's own names is left
/// alone.
pub(super) fn place(
    context: &Context<'_>,
    components: &[(usize, OfExpert<'_>)],
    found: &mut Found,
    problems: &mut Vec<PlanProblem>,
) {
    let module = |component: usize| &context.contents.components[component].target.module;
    // Who changes an expert's projection, and whether under the base's own name.
    let mut taken: HashMap<(usize, usize, Projection), (usize, bool)> = HashMap::new();
    for &(component, expert) in components {
        let Some(number) = context.block_number(expert.container) else {
            continue;
        };
        let home = match place_one(context, component, expert, &context.base.blocks[number]) {
            Ok(Some(home)) => home,
            Ok(None) => continue,
            Err(problem) => {
                let module = module(component).clone();
                problems.push(PlanProblem::Experts { module, problem });
                found.claimed.push(component);
                continue;
            }
        };
        let (parameter, is_own) = match home {
            Home::Own(parameter) => (parameter, true),
            Home::Other(parameter, _) => (parameter, false),
        };
        // Components of one name are parts of one change, and those of the base's own names are
        // compared with each other where they are resolved.
        let others = overlapping(expert.projection)
            .iter()
            .filter_map(|&projection| taken.get(&(number, expert.expert, projection)));
        let mut others =
            others.filter(|(other, own)| module(*other) != module(component) && !(is_own && *own));
        if let Some(&(first, _)) = others.next() {
            problems.push(PlanProblem::Collision {
                first: module(first).clone(),
                second: module(component).clone(),
                parameter: context.parameters.get(parameter).name.clone(),
            });
            found.claimed.push(component);
            continue;
        }
        taken.insert((number, expert.expert, expert.projection), (component, is_own));
        if let Home::Other(parameter, part) = home {
            let (adapter, parameter) = (context.adapter, Some(parameter));
            found.placed.push(Placed { adapter, component, parameter, part });
            context.count(expert.container, found);
            found.claimed.push(component);
        }
    }
}

/// The projections that share elements with this one.
fn overlapping(projection: Projection) -> &'static [Projection] {
    match projection {
        Projection::GateUp => &[Projection::GateUp, Projection::Gate, Projection::Up],
        Projection::Gate => &[Projection::Gate, Projection::GateUp],
        Projection::Up => &[Projection::Up, Projection::GateUp],
        Projection::Down => &[Projection::Down],
    }
}

fn place_one(
    context: &Context<'_>,
    component: usize,
    of: OfExpert<'_>,
    block: &Block,
) -> Result<Option<Home>, String> {
    let component_of = &context.contents.components[component];
    let (stored, shared) = match block.stored(of.projection)? {
        Some(Stored::Each { parameters, .. }) => {
            let Some(&parameter) = parameters.get(&of.expert) else {
                return Ok(None);
            };
            let own = format!(".{}", tail(&component_of.target.module));
            let name = context.parameters.get(parameter).name.strip_suffix(".weight");
            let is_own = name.is_some_and(|name| format!(".{name}").ends_with(&own));
            return Ok(Some(match is_own {
                true => Home::Own(parameter),
                false => Home::Other(parameter, Part::Whole),
            }));
        }
        Some(stored) => (stored, false),
        None => match (of.projection, block.stored(Projection::GateUp)?) {
            (Projection::Gate | Projection::Up, Some(stored)) => (stored, true),
            _ => return Err(format!("the base has no {}", of.projection.name())),
        },
    };
    let Form::LowRank(form @ LowRank { layer: Layer::Linear, magnitude: None, .. }) =
        &component_of.form
    else {
        return Err(format!(
            "{} of one of the experts that the base has in one stack: only LoRA can change a part \
             of a parameter",
            component_of.form.method()
        ));
    };
    let ([rank, input], [out, also]) = (form.a.shape.as_slice(), form.b.shape.as_slice()) else {
        return Err("factors that are no matrices".to_owned());
    };
    let (rank, input, out) = (*rank, *input, *out);
    if rank != *also {
        return Err(format!("factors of rank {rank} and {also}"));
    }
    let projection = if shared { Projection::GateUp } else { of.projection };
    let all = stored.matrices(projection, context.parameters)?;
    if of.expert >= all.experts {
        return Err(format!("the base has {} experts, counted from 0", all.experts));
    }
    let outputs = if shared { out.saturating_mul(2) } else { out };
    let orientation = orientation(stored, block, &all, (outputs, input)).map_err(|cause| {
        let half = if shared { "half of the outputs of " } else { "" };
        format!(
            "the adapter's change is {out}×{input}, for {half}matrices that the base stores as \
             {}: {cause}",
            Shape(vec![all.experts, all.rows, all.cols])
        )
    })?;
    let rows = match (shared, stored.sharing(context.model, orientation)) {
        (false, _) => Stride::ALL,
        (true, Some(Sharing::Halves)) => {
            Stride { start: if of.projection == Projection::Up { out } else { 0 }, step: 1 }
        }
        (true, Some(Sharing::Interleaved)) => {
            Stride { start: usize::from(of.projection == Projection::Up), step: 2 }
        }
        (true, None) => {
            return Err("the base stores gate and up projections in one stack of experts × in × \
                        out, and its `model_type` is none whose order of outputs is known"
                .to_owned());
        }
    };
    let pair =
        Pair { rows: View::whole(Factor::B, out, rank), cols: View::whole(Factor::A, rank, input) };
    let lie = Lie { rows, transposed: orientation == Orientation::InOut, again: None };
    let term = pair.term((context.adapter, component), form.scale(), lie);
    Ok(match stored {
        Stored::Stack { parameter, .. } => {
            let terms = vec![(of.expert, term)];
            Some(Home::Other(*parameter, Part::Slabs { count: all.experts, terms }))
        }
        Stored::Each { parameters, .. } => {
            let part = Part::Slabs { count: 1, terms: vec![(0, term)] };
            parameters.get(&of.expert).map(|parameter| Home::Other(*parameter, part))
        }
    })
}

/// `experts.3.w1` and the part before, in which the releases differ.
fn tail(module: &str) -> &str {
    let start = module.rmatch_indices('.').nth(3).map_or(0, |found| found.0 + 1);
    &module[start..]
}

/// How a matrix of these outputs and inputs is stored.
fn orientation(
    stored: &Stored,
    block: &Block,
    all: &Matrices<'_>,
    (outputs, inputs): (usize, usize),
) -> Result<Orientation, &'static str> {
    let out_in = (outputs, inputs) == (all.rows, all.cols);
    let in_out = (inputs, outputs) == (all.rows, all.cols);
    let known = match stored {
        Stored::Each { .. } => Some(Orientation::OutIn),
        Stored::Stack { .. } => block.orientation(),
    };
    match (known, out_in, in_out) {
        (Some(Orientation::OutIn) | None, true, false) | (Some(Orientation::OutIn), true, true) => {
            Ok(Orientation::OutIn)
        }
        (Some(Orientation::InOut) | None, false, true) | (Some(Orientation::InOut), true, true) => {
            Ok(Orientation::InOut)
        }
        (None, true, true) => Err("it is square, and nothing in the base shows whether it stores \
                                   experts as (out, in) or as (in, out)"),
        _ => Err("is this the model that the adapter was trained on?"),
    }
}
