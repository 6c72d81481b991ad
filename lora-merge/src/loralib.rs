//! loralib's factors, whose kind of layer only the base tells: those of a fused projection or of a
//! convolution become what every other adapter has.

use lora_format::ExpansionProblem;
use lora_format::codec::loralib::{self, Expansions};
use lora_format::model::{AdapterFormat, Form, Layer, LowRank};

use crate::error::PlanProblem;
use crate::parameters::Parameters;
use crate::place::Placed;
use crate::plan::WeightedAdapter;

/// Rewrites the components whose factors fit no matrix as they are. What cannot be rewritten is
/// taken out, with its problem.
pub(crate) fn expand(
    adapters: &mut [WeightedAdapter],
    placed: &mut Vec<Placed>,
    parameters: &Parameters,
    problems: &mut Vec<PlanProblem>,
) {
    let mut expansions: Vec<Expansions> =
        adapters.iter().map(|one| Expansions::of(&one.adapter)).collect();
    placed.retain(|place| {
        let adapter = &mut adapters[place.adapter].adapter;
        let Some(index) = place.parameter else { return true };
        let parameter = parameters.get(index);
        let is_loralib = adapter.format == AdapterFormat::Loralib;
        let Form::LowRank(stored) = &mut adapter.components[place.component].form else {
            return true;
        };
        let is_convolution = is_loralib && parameter.shape.len() == 4;
        if stored.layer != Layer::Merged && !is_convolution {
            return true;
        }
        match expanded(stored, &parameter.shape, &mut expansions[place.adapter]) {
            Ok(linear) => {
                *stored = linear;
                true
            }
            Err(ExpansionProblem::TooLarge(limit)) => {
                let problem = format!("a factor that takes too much memory: {limit}");
                problems.push(PlanProblem::Form { parameter: parameter.name.clone(), problem });
                false
            }
            Err(_) if stored.layer == Layer::Merged => {
                problems.push(PlanProblem::Groups { parameter: parameter.name.clone() });
                false
            }
            // The shapes are compared later, and shown.
            Err(_) => true,
        }
    });
}

/// The change that the factors form on a parameter of this shape. Where every group of a fused
/// projection has factors, the parameter has as many rows as they have together.
fn expanded(
    stored: &LowRank,
    shape: &[usize],
    expansions: &mut Expansions,
) -> Result<LowRank, ExpansionProblem> {
    match (stored.layer, shape) {
        (Layer::Merged, &[rows, cols]) => {
            let (&[a_rows, _], &[outputs, rank]) =
                (stored.a.shape.as_slice(), stored.b.shape.as_slice())
            else {
                return Err(ExpansionProblem::Shape);
            };
            // Conv1D stores (in, out).
            let all = outputs == rows || outputs == cols;
            let groups = a_rows.checked_div(rank).filter(|_| all).ok_or(ExpansionProblem::Shape)?;
            loralib::merged(stored, &vec![true; groups], expansions)
        }
        (Layer::Linear, &[..]) => loralib::convolution(stored, shape, expansions),
        _ => Err(ExpansionProblem::Shape),
    }
}
