//! Tied embeddings: one tensor that is both the input embedding and the output head.
//!
//! A change trained for one of the two would, merged into the tensor that both share, change the
//! other as well. Only the user can say what is wanted: two tensors from now on, or the change in
//! both. Where training kept the two tied, there is nothing to decide.

use lora_format::Tensor;
use lora_format::checkpoint::Checkpoint;
use lora_format::model::{Form, Layer};
use lora_format::vocabulary;
use serde_json::{Map, Value};

use crate::error::{PlanProblem, Result};
use crate::identity::{self, Copied};
use crate::parameters::Parameters;
use crate::place::Placed;
use crate::plan::WeightedAdapter;

/// What to do with a change of one of two tied tensors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tied {
    /// Refuse it.
    #[default]
    Refuse,
    /// Write both tensors, and only the one that was trained changes.
    Untie,
    /// Change what both share.
    Both,
}

/// What was decided about tied tensors.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Ties {
    /// Whether head and embedding of the output are no longer tied.
    pub(crate) untied: bool,
    /// The head that the output gains.
    pub(crate) head: Option<Head>,
    /// Embedding and stored head that stay one tensor: (embedding, head).
    pub(crate) shared: Option<(usize, usize)>,
    /// Components that only repeat what another one brings: the head beside an equal embedding.
    pub(crate) repeated: Vec<(usize, usize)>,
}

/// An output head that the base does not store: before any change, what it was tied to.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Head {
    /// Its name.
    pub(crate) name: String,
    /// The input embedding that it was tied to.
    pub(crate) embedding: usize,
}

/// The two tensors of a base that are tied.
struct Pair {
    embedding: usize,
    /// The head, if it is stored too.
    head: Option<usize>,
}

/// Which of a pair a component was trained for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Embedding,
    Head,
}

/// Where a component's change goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Route {
    /// Only where it was trained.
    Own,
    /// To both.
    Both,
}

/// Decides where changes of tied tensors go.
pub(crate) fn resolve(
    base: &Checkpoint,
    parameters: &Parameters,
    adapters: &[WeightedAdapter],
    choice: Tied,
    placed: &mut Vec<Placed>,
    problems: &mut Vec<PlanProblem>,
) -> Result<Ties> {
    let mut ties = Ties::default();
    let component = |place: &Placed| &adapters[place.adapter].adapter.components[place.component];
    let is_missing_head = |place: &Placed| {
        place.parameter.is_none()
            && vocabulary::is_output_head(&component(place).target.name())
            && !matches!(component(place).form, Form::Replaced(_))
    };
    let head_wanted = placed.iter().any(is_missing_head);
    let Some(pair) = pair(base, parameters, head_wanted)? else {
        // A head that is neither stored nor tied to anything.
        placed.retain(|place| {
            let missing = is_missing_head(place);
            if missing {
                let target = component(place).target.clone();
                let (module, parameter) = (target.module, target.parameter);
                problems.push(PlanProblem::Unresolved { module, parameter, nearest: Vec::new() });
            }
            !missing
        });
        refuse_unknown_ties(base, parameters, adapters, placed, problems);
        return Ok(ties);
    };
    let side = |place: &Placed| match place.parameter {
        Some(index) if index == pair.embedding => Some(Side::Embedding),
        Some(index) if Some(index) == pair.head => Some(Side::Head),
        None if vocabulary::is_output_head(&component(place).target.name()) => Some(Side::Head),
        _ => None,
    };
    ties.repeated = repeated(adapters, placed, &side);
    placed.retain(|place| !ties.repeated.contains(&(place.adapter, place.component)));
    let replaces = |wanted: Side| {
        placed.iter().any(|place| {
            side(place) == Some(wanted) && matches!(component(place).form, Form::Replaced(_))
        })
    };
    let both_replaced = replaces(Side::Embedding) && replaces(Side::Head);

    // Nothing of what is refused; of what is not of the pair, nothing inside.
    let mut routes: Vec<Option<Option<(Side, Route)>>> = Vec::with_capacity(placed.len());
    for place in placed.iter() {
        let Some(side) = side(place) else {
            routes.push(Some(None));
            continue;
        };
        let kind = std::mem::discriminant(&component(place).form);
        let repeats = ties.repeated.iter().any(|&(adapter, index)| {
            let other = &adapters[adapter].adapter.components[index].form;
            adapter == place.adapter && std::mem::discriminant(other) == kind
        });
        let route = match &component(place).form {
            // PEFT trains the rows of both; and what W is, both have in common.
            Form::Rows { .. } | Form::Base(_) => Some(Route::Both),
            // Two tensors, trained apart.
            Form::Replaced(_) if both_replaced => Some(Route::Own),
            // Saved under both names, they were one tensor.
            Form::Replaced(_) if repeats => Some(Route::Both),
            Form::Replaced(tensor) => {
                match identity::copied(base, parameters, pair.embedding, tensor)? {
                    // The rows that the base has are the base's.
                    Copied::Equal | Copied::Grown => Some(Route::Both),
                    Copied::Different => by(choice),
                }
            }
            // The same factors were saved for both.
            Form::LowRank(_) if repeats && side == Side::Embedding => Some(Route::Both),
            _ => by(choice),
        };
        if route.is_none() {
            problems.push(PlanProblem::Tied {
                module: component(place).target.module.clone(),
                embedding: parameters.get(pair.embedding).name.clone(),
                head: pair.head.map(|head| parameters.get(head).name.clone()),
            });
        }
        ties.untied |= route == Some(Route::Own);
        routes.push(route.map(|route| Some((side, route))));
    }
    // Asked for, even where nothing calls for it.
    let touched = routes.iter().any(|route| !matches!(route, Some(None)));
    ties.untied |= touched && choice == Tied::Untie;
    if ties.untied && pair.head.is_none() {
        let trained = placed.iter().find(|place| side(place) == Some(Side::Head));
        let embedding = &parameters.get(pair.embedding).name;
        let known = vocabulary::head_of(embedding)
            .or_else(|| trained.map(|place| component(place).target.name()));
        // The heads of masked language models have tied biases besides.
        let plain = |name: &String| name.ends_with("lm_head.weight") || name == "embed_out.weight";
        match known.filter(plain) {
            Some(name) => ties.head = Some(Head { name, embedding: pair.embedding }),
            None => {
                problems.push(PlanProblem::NamelessHead { embedding: embedding.clone() });
                return Ok(ties);
            }
        }
    }
    if !ties.untied {
        ties.shared = pair.head.map(|head| (pair.embedding, head));
    }

    let mut routed = Vec::with_capacity(placed.len());
    for (place, route) in placed.drain(..).zip(routes) {
        let to = |parameter: Option<usize>| Placed { parameter, ..place.clone() };
        match route {
            None => {}
            Some(None) => routed.push(place),
            Some(Some((Side::Embedding, Route::Own))) => routed.push(to(Some(pair.embedding))),
            Some(Some((Side::Head, Route::Own))) => routed.push(to(pair.head)),
            Some(Some((_, Route::Both))) => {
                routed.push(to(Some(pair.embedding)));
                if pair.head.is_some() || ties.untied {
                    routed.push(to(pair.head));
                }
            }
        }
    }
    *placed = routed;
    Ok(ties)
}

/// The user's choice as a route.
fn by(choice: Tied) -> Option<Route> {
    match choice {
        Tied::Refuse => None,
        Tied::Untie => Some(Route::Own),
        Tied::Both => Some(Route::Both),
    }
}

/// Heads that an adapter brings beside an equal embedding, bit for bit: PEFT saves both names of
/// a tensor, or of token rows, that are still tied, and with `ensure_weight_tying` the same factors
/// for both, those of the embedding transposed. (Copies of the base show nothing: of a tied base,
/// they are equal whatever was trained on them.)
fn repeated(
    adapters: &[WeightedAdapter],
    placed: &[Placed],
    side: &dyn Fn(&Placed) -> Option<Side>,
) -> Vec<(usize, usize)> {
    let form = |place: &Placed| &adapters[place.adapter].adapter.components[place.component].form;
    let equal = |head: &Form, embedding: &Form| match (head, embedding) {
        (Form::Replaced(a), Form::Replaced(b)) => {
            a.dtype == b.dtype && a.shape == b.shape && a.bytes() == b.bytes()
        }
        (Form::Rows { indices: a, rows: x }, Form::Rows { indices: b, rows: y }) => {
            a == b && x.dtype == y.dtype && x.shape == y.shape && x.bytes() == y.bytes()
        }
        (Form::LowRank(head), Form::LowRank(embedding)) => {
            head.layer == Layer::Linear
                && embedding.layer == Layer::Embedding
                && head.scale() == embedding.scale()
                && [&head.magnitude, &embedding.magnitude].iter().all(|one| one.is_none())
                && are_transposes(&head.a, &embedding.b)
                && are_transposes(&head.b, &embedding.a)
        }
        _ => false,
    };
    let heads = placed.iter().filter(|place| side(place) == Some(Side::Head));
    heads
        .filter(|head| {
            placed.iter().any(|embedding| {
                side(embedding) == Some(Side::Embedding)
                    && embedding.adapter == head.adapter
                    && equal(form(head), form(embedding))
            })
        })
        .map(|head| (head.adapter, head.component))
        .collect()
}

/// Whether one matrix is the other's transpose, bit for bit.
fn are_transposes(first: &Tensor, second: &Tensor) -> bool {
    let (&[rows, cols], &[height, width]) = (first.shape.as_slice(), second.shape.as_slice())
    else {
        return false;
    };
    let size = (first.dtype.bits() / 8) as usize;
    let (bytes, others) = (first.bytes(), second.bytes());
    first.dtype == second.dtype
        && (rows, cols) == (width, height)
        && bytes.chunks_exact(size).enumerate().all(|(at, element)| {
            let other = (at % cols) * rows + at / cols;
            others.get(other * size..(other + 1) * size) == Some(element)
        })
}

/// The tied tensors of a base, if it has any: as its configuration says, or, where that is silent
/// because the model type has a default, as the stored values do.
fn pair(base: &Checkpoint, parameters: &Parameters, head_wanted: bool) -> Result<Option<Pair>> {
    let find = |wanted: &dyn Fn(&str) -> bool| -> Vec<usize> {
        let all = parameters.all().iter().enumerate();
        all.filter(|(_, one)| wanted(&one.name)).map(|(index, _)| index).collect()
    };
    let embeddings = find(&vocabulary::is_input_embedding);
    let heads = find(&vocabulary::is_output_head);
    // Of several (a talker beside a thinker, a codec's tables), the one whose head is known.
    let known = |&embedding: &usize| {
        let head = vocabulary::head_of(&parameters.get(embedding).name)?;
        let stored = parameters.find(&head);
        stored.map(|head| Pair { embedding, head: Some(head) })
    };
    let pair = match (embeddings.as_slice(), heads.as_slice()) {
        ([], _) => return Ok(None),
        (&[embedding], []) => Pair { embedding, head: None },
        (&[embedding], &[head]) => Pair { embedding, head: Some(head) },
        (several, _) => {
            let main = several.iter().find_map(known);
            let shortest = several.iter().min_by_key(|&&index| parameters.get(index).name.len());
            match (main, shortest) {
                (Some(pair), _) => pair,
                (None, Some(&embedding)) => Pair { embedding, head: None },
                (None, None) => return Ok(None),
            }
        }
    };
    let tied = match (said(base), pair.head) {
        (Some(said), _) => said,
        (None, Some(head)) => identity::same_values(base, parameters, head, pair.embedding)?,
        // A model that generates has a head, and it is not stored.
        (None, None) => head_wanted || generates(base),
    };
    Ok(tied.then_some(pair))
}

/// What the configuration says of the model, or of its text part.
fn said(base: &Checkpoint) -> Option<bool> {
    const FIELD: &str = "tie_word_embeddings";
    let config = base.config()?;
    let parts = config.values().filter_map(Value::as_object);
    let nested = |part: &Map<String, Value>| part.get(FIELD)?.as_bool();
    let own = config.get(FIELD).and_then(Value::as_bool);
    own.or_else(|| config.get("text_config")?.get(FIELD)?.as_bool())
        .or_else(|| parts.filter_map(nested).next())
}

/// Whether the base's configuration names a class with an output head.
fn generates(base: &Checkpoint) -> bool {
    let architectures = base.config().and_then(|config| config.get("architectures")?.as_array());
    let mut names = architectures.into_iter().flatten().filter_map(|name| name.as_str());
    names.any(|name| {
        ["ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM"]
            .iter()
            .any(|ending| name.ends_with(ending))
    })
}

/// A base that says that it is tied, and in which none of the known names is: a change of anything
/// with a row for every token may be one of two.
fn refuse_unknown_ties(
    base: &Checkpoint,
    parameters: &Parameters,
    adapters: &[WeightedAdapter],
    placed: &[Placed],
    problems: &mut Vec<PlanProblem>,
) {
    let known = parameters.all().iter().any(|one| vocabulary::is_input_embedding(&one.name));
    let rows = base.config().and_then(|config| config.get("vocab_size")?.as_u64());
    let (Some(true), false, Some(rows)) = (said(base), known, rows) else { return };
    for place in placed {
        let Some(index) = place.parameter else { continue };
        let parameter = parameters.get(index);
        if parameter.shape.len() == 2 && parameter.shape.contains(&(rows as usize)) {
            let components = &adapters[place.adapter].adapter.components;
            problems.push(PlanProblem::Tied {
                module: components[place.component].target.module.clone(),
                embedding: parameter.name.clone(),
                head: None,
            });
        }
    }
}
