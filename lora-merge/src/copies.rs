//! Copies of the base that adapters bring: PEFT saves one beside a targeted embedding or output
//! head. One that is the base's own says nothing; one with more rows is the base as it was when
//! training began, with its vocabulary grown; any other means another base.

use lora_format::checkpoint::Checkpoint;
use lora_format::model::Form;

use crate::error::{PlanProblem, Result};
use crate::fit::Key;
use crate::identity::{self, Copied};
use crate::parameters::Parameters;
use crate::place::Placed;
use crate::plan::WeightedAdapter;
use crate::tied::Ties;

/// Takes out the copies that equal the base, and gives their keys. The others are the W of their
/// parameter from here on.
pub(crate) fn settle(
    base: &Checkpoint,
    parameters: &Parameters,
    adapters: &[WeightedAdapter],
    ties: &Ties,
    allow_different_base: bool,
    placed: &mut Vec<Placed>,
    problems: &mut Vec<PlanProblem>,
) -> Result<Vec<Key>> {
    let mut equal = Vec::new();
    for place in placed.iter() {
        let form = &adapters[place.adapter].adapter.components[place.component].form;
        let Form::Base(copy) = form else { continue };
        // A head that the output gains is, before any change, the embedding that it was tied to.
        let tied = ties.head.as_ref().map(|head| head.embedding);
        let Some(index) = place.parameter.or(tied) else { continue };
        match identity::copied(base, parameters, index, copy)? {
            Copied::Equal => equal.push((place.adapter, place.component)),
            Copied::Grown => {}
            Copied::Different if allow_different_base => {}
            Copied::Different => {
                let parameter = parameters.get(index).name.clone();
                problems.push(PlanProblem::OtherCopy { parameter });
            }
        }
    }
    placed.retain(|place| !equal.contains(&(place.adapter, place.component)));
    Ok(equal)
}
