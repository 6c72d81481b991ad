//! Tied embeddings: one tensor that is both the input embedding and the output head.
//!
//! A change trained for one of the two would, merged into the tensor that both share, change the
//! other as well. Only the user can say what is wanted: two tensors from now on, or the change in
//! both.

use lora_format::Tensor;
use lora_format::checkpoint::Checkpoint;
use lora_format::model::{Form, Layer};

use crate::error::{PlanProblem, Result};
use crate::identity;
use crate::parameters::Parameters;
use crate::place::Placed;
use crate::plan::WeightedAdapter;
use crate::resolve;

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
    /// The head that the output gains, as a copy of the base's parameter with this index before
    /// any change.
    pub(crate) head: Option<Head>,
    /// Components that only repeat what another one brings: the head beside an equal embedding.
    pub(crate) repeated: Vec<(usize, usize)>,
}

/// An output head that the base does not store.
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
    let head_wanted = placed.iter().any(|place| {
        place.parameter.is_none() && resolve::is_head(&component(place).target.name())
    });
    let Some(pair) = pair(base, parameters, head_wanted)? else {
        // A head that is neither stored nor tied to anything.
        placed.retain(|place| {
            let component = component(place);
            let missing = place.parameter.is_none() && !matches!(component.form, Form::Replaced(_));
            if missing {
                let (module, parameter) =
                    (component.target.module.clone(), component.target.parameter.clone());
                problems.push(PlanProblem::Unresolved { module, parameter, nearest: Vec::new() });
            }
            !missing
        });
        return Ok(ties);
    };
    let is_head = |place: &Placed| {
        place.parameter.map_or_else(
            || resolve::is_head(&component(place).target.name()),
            |index| Some(index) == pair.head,
        )
    };
    let is_embedding = |place: &Placed| place.parameter == Some(pair.embedding);
    ties.repeated = repeated(adapters, placed, &is_head, &is_embedding);
    placed.retain(|place| !ties.repeated.contains(&(place.adapter, place.component)));
    let both_replaced = placed.iter().any(is_head)
        && placed.iter().any(is_embedding)
        && placed
            .iter()
            .filter(|place| is_head(place) || is_embedding(place))
            .all(|place| matches!(component(place).form, Form::Replaced(_)));

    let mut kept = Vec::with_capacity(placed.len());
    for place in placed.drain(..) {
        if !is_head(&place) && !is_embedding(&place) {
            kept.push(place);
            continue;
        }
        let shared = match &component(&place).form {
            // PEFT trains the rows of both.
            Form::Rows { .. } => Tied::Both,
            // They were tied in training, and are still.
            _ if ties.repeated.iter().any(|key| key.0 == place.adapter) => Tied::Both,
            // Only grown: the rows that the base has are the base's.
            Form::Replaced(tensor) if continues(base, parameters, &pair, tensor)? => Tied::Both,
            Form::Replaced(_) if both_replaced => Tied::Untie,
            _ => choice,
        };
        match shared {
            Tied::Refuse => {
                let component = component(&place);
                problems.push(PlanProblem::Tied {
                    module: component.target.module.clone(),
                    embedding: parameters.get(pair.embedding).name.clone(),
                    head: pair.head.map(|head| parameters.get(head).name.clone()),
                });
            }
            Tied::Untie => {
                ties.untied = true;
                if pair.head.is_none() {
                    let name = match is_head(&place) {
                        true => component(&place).target.name(),
                        false => "lm_head.weight".to_owned(),
                    };
                    ties.head.get_or_insert(Head { name, embedding: pair.embedding });
                }
                kept.push(place);
            }
            Tied::Both => {
                for parameter in [Some(pair.embedding), pair.head].into_iter().flatten() {
                    kept.push(Placed { parameter: Some(parameter), ..place.clone() });
                }
            }
        }
    }
    *placed = kept;
    Ok(ties)
}

/// Heads that an adapter brings beside an equal embedding, bit for bit: PEFT saves both names of
/// a tensor that is still tied, and with `ensure_weight_tying` the same factors for both, those of
/// the embedding transposed.
fn repeated(
    adapters: &[WeightedAdapter],
    placed: &[Placed],
    is_head: &dyn Fn(&Placed) -> bool,
    is_embedding: &dyn Fn(&Placed) -> bool,
) -> Vec<(usize, usize)> {
    let form = |place: &Placed| &adapters[place.adapter].adapter.components[place.component].form;
    let equal = |first: &Form, second: &Form| match (first, second) {
        (Form::Replaced(a), Form::Replaced(b)) | (Form::Base(a), Form::Base(b)) => {
            a.dtype == b.dtype && a.shape == b.shape && a.bytes() == b.bytes()
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
    placed
        .iter()
        .filter(|head| {
            is_head(head)
                && placed.iter().any(|embedding| {
                    is_embedding(embedding)
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

/// Whether a tensor begins with the base's own embedding, as far as sampled values tell.
fn continues(
    base: &Checkpoint,
    parameters: &Parameters,
    pair: &Pair,
    tensor: &Tensor,
) -> Result<bool> {
    identity::begins_with(base, parameters, pair.embedding, tensor)
}

/// The tied tensors of a base, if it has any: as its configuration says (of a multimodal model,
/// its text part), or, where that is silent because the model type has a default, as the stored
/// values do.
fn pair(base: &Checkpoint, parameters: &Parameters, head_wanted: bool) -> Result<Option<Pair>> {
    const FIELD: &str = "tie_word_embeddings";
    let find = |wanted: &dyn Fn(&str) -> bool| {
        parameters.all().iter().position(|parameter| wanted(&parameter.name))
    };
    let Some(embedding) = find(&resolve::is_input_embedding) else {
        return Ok(None);
    };
    let head = find(&resolve::is_head);
    let said = base.config().and_then(|config| {
        let text = config.get("text_config").and_then(|text| text.get(FIELD));
        config.get(FIELD).or(text)?.as_bool()
    });
    let tied = match (said, head) {
        (Some(said), _) => said,
        (None, Some(head)) => identity::same_values(base, parameters, head, embedding)?,
        // A model that generates has a head, and it is not stored.
        (None, None) => head_wanted || generates(base),
    };
    Ok(tied.then_some(Pair { embedding, head }))
}

/// Whether the base's configuration names a class with an output head.
fn generates(base: &Checkpoint) -> bool {
    let architectures = base.config().and_then(|config| config.get("architectures")?.as_array());
    let mut names = architectures.into_iter().flatten().filter_map(|name| name.as_str());
    names.any(|name| {
        ["ForCausalLM", "LMHeadModel", "ForConditionalGeneration"]
            .iter()
            .any(|ending| name.ends_with(ending))
    })
}
