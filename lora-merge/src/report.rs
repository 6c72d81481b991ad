//! What a merge did, as plain data.

use lora_format::Dtype;

use crate::kernels::TileStats;
use crate::numbers::{float_type, neighbour};
use crate::orientation::Orientation;

/// The result of a finished merge.
#[derive(Clone, Debug, PartialEq)]
pub struct MergeReport {
    /// One entry per parameter that changed, sorted by name.
    pub targets: Vec<TargetReport>,
    /// All targets together.
    pub realised: Realised,
    /// Tensors copied bit for bit.
    pub copied: usize,
    /// Tensors converted to another dtype.
    pub converted: usize,
    /// Bytes of the safetensors files.
    pub bytes: u64,
    /// Threads that worked.
    pub threads: usize,
}

/// What happened to one parameter.
#[derive(Clone, Debug, PartialEq)]
pub struct TargetReport {
    /// Its name.
    pub parameter: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// What changed it, in the adapters' order; empty of a head that was only untied.
    pub changes: Vec<ChangeReport>,
    /// The dtype it was written in.
    pub dtype: Dtype,
    /// What survived of its delta.
    pub realised: Realised,
    /// Elements of a replacement that the output's dtype had to round.
    pub rounded: u64,
    /// What would survive if the parameter were quantised again with the scales that it had, as a
    /// sample of it shows.
    pub requantised: Option<Realised>,
    /// How much of what the parameter was before a merge can be told, where one is undone.
    pub undone: Option<Recovered>,
}

/// One component's part in a parameter.
#[derive(Clone, Debug, PartialEq)]
pub struct ChangeReport {
    /// Index of the adapter.
    pub adapter: usize,
    /// The module as the adapter names it.
    pub module: String,
    /// The method.
    pub method: &'static str,
    /// The rank, of what has one.
    pub rank: Option<usize>,
    /// The multiplier of the product, the adapter's weight included, of what has one.
    pub scale: Option<f64>,
    /// The weight of the adapter.
    pub weight: f64,
    /// How the change lies in the stored matrix.
    pub orientation: Option<Orientation>,
}

/// The realised delta: what is left of the wanted delta Δ after rounding to the output's dtype.
///
/// With d = output − round(W0), the part of d along Δ is the *projection* p = ⟨d, Δ⟩ / ⟨Δ, Δ⟩ (1 is
/// all of it), and what is left over is noise: `‖d − p·Δ‖ / ‖Δ‖`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Realised {
    /// Elements of the parameter.
    pub elements: u64,
    /// Elements with Δ ≠ 0.
    pub nonzero: u64,
    /// Elements whose stored bits changed.
    pub changed: u64,
    /// Σ d·Δ.
    pub dot: f64,
    /// Σ d².
    pub realised_sq: f64,
    /// Σ Δ².
    pub wanted_sq: f64,
    /// Elements written that are infinite or NaN.
    pub non_finite: u64,
}

impl From<TileStats> for Realised {
    fn from(stats: TileStats) -> Realised {
        Realised {
            elements: stats.elements,
            nonzero: stats.nonzero_delta,
            changed: stats.changed,
            dot: stats.dot,
            realised_sq: stats.realised_sq,
            wanted_sq: stats.wanted_sq,
            non_finite: stats.non_finite,
        }
    }
}

impl Realised {
    /// Adds another parameter's.
    pub fn add(&mut self, other: &Realised) {
        self.elements += other.elements;
        self.nonzero += other.nonzero;
        self.changed += other.changed;
        self.dot += other.dot;
        self.realised_sq += other.realised_sq;
        self.wanted_sq += other.wanted_sq;
        self.non_finite += other.non_finite;
    }

    /// The share of Δ that survived; `None` if Δ is zero, or too large for its square to be finite.
    pub fn projection(&self) -> Option<f64> {
        let projection = self.dot / self.wanted_sq;
        (self.wanted_sq > 0.0 && projection.is_finite()).then_some(projection)
    }

    /// Noise relative to Δ; `None` if Δ is zero.
    pub fn noise(&self) -> Option<f64> {
        let projection = self.projection()?;
        let square = self.realised_sq / self.wanted_sq - projection * projection;
        square.is_finite().then(|| square.max(0.0).sqrt())
    }

    /// The share of elements that changed.
    pub fn changed_share(&self) -> f64 {
        if self.elements == 0 { 0.0 } else { self.changed as f64 / self.elements as f64 }
    }

    /// Whether the user should hear of it: a twentieth of the delta or more is lost, or the noise
    /// is a tenth of it or more.
    pub fn is_poor(&self) -> bool {
        self.projection().is_some_and(|projection| (projection - 1.0).abs() >= 0.05)
            || self.noise().is_some_and(|noise| noise >= 0.1)
    }
}

/// What a merge's rounding left of the weight before it.
///
/// The merged weight is `W' = round(W + Δ)`, and what is computed back is `round(W' − Δ)`. A value
/// W is *possible* if merging it gives W' again. Where several neighbouring values are, the one
/// that the merge began with cannot be told; where none is, W' is not what this adapter makes of
/// any value of this dtype.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// Elements with Δ ≠ 0.
    pub elements: u64,
    /// Those with exactly one possible value: they are what they were.
    pub exact: u64,
    /// Those with several: they may be off by a step of their dtype, or more where the merge grew
    /// them.
    pub ambiguous: u64,
    /// Those with none.
    pub impossible: u64,
}

impl Recovered {
    /// Of merged values and the delta that is added to take the adapter out, −Δ.
    pub(crate) fn of(dtype: Dtype, merged: &[f32], taken: &[f64]) -> Recovered {
        let Some(float) = float_type(dtype) else {
            return Recovered::default();
        };
        let mut found = Recovered::default();
        for (&merged, &taken) in merged.iter().zip(taken) {
            if taken == 0.0 {
                continue;
            }
            found.elements += 1;
            let bits = float.encode(f64::from(merged));
            let near = float.encode(f64::from(merged) + taken);
            let possible = |candidate: u32| {
                let value = f64::from(float.decode(candidate));
                value.is_finite() && float.encode(value - taken) == bits
            };
            let neighbours =
                [Some(near), neighbour(float, near, true), neighbour(float, near, false)];
            match neighbours.into_iter().flatten().filter(|&bits| possible(bits)).count() {
                0 => found.impossible += 1,
                1 => found.exact += 1,
                _ => found.ambiguous += 1,
            }
        }
        found
    }

    /// Adds another tile's or parameter's.
    pub fn add(&mut self, other: &Recovered) {
        self.elements += other.elements;
        self.exact += other.exact;
        self.ambiguous += other.ambiguous;
        self.impossible += other.impossible;
    }
}
