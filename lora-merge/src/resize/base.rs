//! How large the base's weights are: ‖W₀‖_F of what each component changes.

use lora_format::checkpoint::Location;
use lora_format::io::mmap::Mapping;
use lora_format::model::Form;
use rayon::iter::{IntoParallelIterator, ParallelIterator};

use super::is_resizable;
use crate::error::Result;
use crate::kernels::with_ieee_floats;
use crate::numbers::{decode_bytes, float_type};
use crate::parameters::Source;
use crate::plan::MergePlan;

/// Elements whose sum one thread makes: the cut does not depend on the threads.
const SPAN: usize = 1 << 20;

/// Elements that are decoded at once.
const RUN: usize = 4096;

/// ‖W₀‖_F for every component of an adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct BaseNorms(pub(super) Vec<f64>);

impl BaseNorms {
    /// Sums the squares of the weights that the first adapter of a plan changes, in f64 and in a
    /// fixed order. A component that is spread over several matrices has all of them; one that
    /// changes both of two tied tensors has one. Those that are not resized have no norm: NaN.
    ///
    /// # Errors
    /// Files of the base that cannot be mapped.
    pub fn measure(plan: &MergePlan) -> Result<BaseNorms> {
        let shards = plan.base.shards().iter();
        let mappings: Vec<Mapping> =
            shards.map(|shard| shard.file.map()).collect::<lora_format::Result<_>>()?;
        let count = plan.adapters.first().map_or(0, |one| one.adapter.components.len());
        let mut norms = vec![f64::NAN; count];
        for (index, norm) in norms.iter_mut().enumerate() {
            let form = &plan.component(0, index).form;
            let Form::LowRank(low_rank) = form else { continue };
            if !is_resizable(form) {
                continue;
            }
            let elements = low_rank.out_features().saturating_mul(low_rank.in_features());
            let (mut covered, mut energy) = (0usize, 0.0);
            for target in &plan.targets {
                let (rows, cols) = target.matrix();
                for (slab, changes) in target.slabs.iter().enumerate() {
                    let own = changes.terms.iter().filter(|term| term.component == index);
                    let part: usize =
                        own.map(|term| term.left.rows.saturating_mul(term.right.cols)).sum();
                    // Copies of what is tied come after it has been covered.
                    if part > 0 && covered < elements {
                        covered = covered.saturating_add(part);
                        let first = slab * rows * cols;
                        energy += sum(plan, &mappings, target.source, first, rows * cols);
                    }
                }
            }
            if covered > 0 {
                *norm = energy.sqrt();
            }
        }
        Ok(BaseNorms(norms))
    }

    /// ‖W₀‖_F of a component; NaN if it has none.
    #[must_use]
    pub fn of(&self, component: usize) -> f64 {
        self.0.get(component).copied().unwrap_or(f64::NAN)
    }
}

/// Σ w² of a run of a parameter's elements.
fn sum(
    plan: &MergePlan,
    mappings: &[Mapping],
    source: Source,
    start: usize,
    elements: usize,
) -> f64 {
    let spans: Vec<f64> = (0..elements.div_ceil(SPAN))
        .into_par_iter()
        .map(|span| {
            let end = elements.min((span + 1) * SPAN);
            with_ieee_floats(|| {
                let mut values = [0.0; RUN];
                let runs = (span * SPAN..end).step_by(RUN).map(|first| {
                    let values = &mut values[..RUN.min(end - first)];
                    read(plan, mappings, source, start + first, values);
                    values.iter().map(|&value| f64::from(value) * f64::from(value)).sum::<f64>()
                });
                runs.sum()
            })
        })
        .collect();
    spans.into_iter().sum()
}

/// Decodes elements from `first` on. What is neither numbers nor quantised is not planned.
fn read(plan: &MergePlan, mappings: &[Mapping], source: Source, first: usize, values: &mut [f32]) {
    let bytes = |location: Location| {
        let info = plan.base.info(location);
        let start = plan.base.shards()[location.shard].file.header().data_start + info.start;
        &mappings[location.shard][start as usize..(start + info.bytes()) as usize]
    };
    let stored = |dtype, bytes: &[u8], values: &mut [f32]| match float_type(dtype) {
        Some(float) => decode_bytes(float, bytes, first, 1, values),
        None => values.fill(f32::NAN),
    };
    match source {
        Source::Plain(location) => stored(plan.base.info(location).dtype, bytes(location), values),
        Source::Quantised(index) => match plan.parameters.weight(index) {
            Some(weight) => weight.read(&bytes, first, values),
            None => values.fill(f32::NAN),
        },
        Source::Brought { adapter, component } => match &plan.component(adapter, component).form {
            Form::Replaced(tensor) | Form::Base(tensor) => {
                stored(tensor.dtype, tensor.bytes(), values);
            }
            _ => values.fill(f32::NAN),
        },
    }
}
