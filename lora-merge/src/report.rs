//! What a merge did, as plain data.

use lora_format::Dtype;

use crate::kernels::TileStats;
use crate::orientation::Orientation;

/// The result of a finished merge.
#[derive(Clone, Debug, PartialEq)]
pub struct MergeReport {
    /// One entry per target, in the adapter's order.
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
    /// The base's name of it.
    pub parameter: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// The rank of its delta.
    pub rank: usize,
    /// The multiplier of B·A.
    pub scale: f64,
    /// How it is stored.
    pub orientation: Orientation,
    /// The dtype it was written in.
    pub dtype: Dtype,
    /// What survived of its delta.
    pub realised: Realised,
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
