//! The neutral model: what an adapter *is*, whatever format it came in.
//!
//! An [`Adapter`] is a list of [`Component`]s. A component changes one *parameter* of the base
//! model ([`Target`]) by one *form* ([`Form`]) of change. Codecs translate to and from this
//! model; the merge engine reads nothing else.

use std::cmp::Ordering;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::fingerprint::BaseIdentity;
use crate::tensor::{MappedFile, Tensor};

/// A set of changes to the parameters of one base model.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// The file or directory it was read from.
    pub path: PathBuf,
    /// The format it was read from.
    pub format: AdapterFormat,
    /// The changes, sorted by module.
    pub components: Vec<Component>,
    /// What is known of the model it was trained on.
    pub base: BaseIdentity,
    /// Whether the trainer said that its targets store their weights as (in, out). Only a hint:
    /// trainers get it wrong, so shapes decide where they can.
    pub fan_in_fan_out: Option<bool>,
    /// The format whose spelling the modules have, if it is not the base's own: files of image
    /// models flatten their names, and which module is meant only their naming tells.
    pub names: Option<AdapterFormat>,
    /// The file's own string metadata, less what the format itself writes there.
    pub metadata: Vec<(String, String)>,
    /// The configuration of the format it first came from, every field of it.
    pub source: Option<SourceConfig>,
    /// Optional fields of other programs that a rewrite may carry along.
    pub extensions: Map<String, Value>,
    /// What the reader noticed and the user should know.
    pub notes: Vec<Note>,
}

impl Adapter {
    /// An adapter made in memory. `path` stands for it in messages; the components are sorted.
    pub fn new(
        path: impl Into<PathBuf>,
        mut components: Vec<Component>,
        base: BaseIdentity,
    ) -> Adapter {
        components.sort_by(Component::compare);
        Adapter {
            path: path.into(),
            format: AdapterFormat::Native,
            components,
            base,
            fan_in_fan_out: None,
            names: None,
            metadata: Vec::new(),
            source: None,
            extensions: Map::new(),
            notes: Vec::new(),
        }
    }

    /// Refuses an adapter whose file was written to since it was opened. What its tensors hold in
    /// memory of their own cannot change.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn ensure_unchanged(&self) -> Result<()> {
        let mut checked: Vec<&Arc<MappedFile>> = Vec::new();
        for file in self.tensors().filter_map(Tensor::mapped_file) {
            // Nearly always one file for all of them.
            if !checked.iter().any(|known| Arc::ptr_eq(known, file)) {
                file.ensure_unchanged()?;
                checked.push(file);
            }
        }
        Ok(())
    }

    /// The components of an adapter that is plain LoRA of linear layers throughout.
    ///
    /// # Errors
    /// [`Error::Inexpressible`] with the first component that is anything else.
    pub fn plain_low_rank<'a>(
        &'a self,
        format: &'static str,
    ) -> Result<Vec<(&'a Target, &'a LowRank)>> {
        let plain = |component: &'a Component| match &component.form {
            Form::LowRank(low_rank)
                if low_rank.is_plain() && component.target.parameter == "weight" =>
            {
                Ok((&component.target, low_rank))
            }
            form => Err(Error::Inexpressible {
                path: self.path.clone(),
                format,
                what: format!("a change of `{}` by {}", component.target.name(), form.method()),
            }),
        };
        self.components.iter().map(plain).collect()
    }

    /// Every tensor of every component. One that several components share comes once for each.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.components.iter().flat_map(|component| component.form.tensors())
    }
}

/// The formats that adapters are read from and written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AdapterFormat {
    /// Our own single file, `docs/FORMAT.md`.
    Native,
    /// A PEFT directory, or its `adapter_model.safetensors`.
    Peft,
    /// What `loralib.lora_state_dict` returns, as a safetensors file or a pickle.
    Loralib,
    /// A file of sd-scripts or LyCORIS.
    Kohya,
    /// A file of diffusers.
    Diffusers,
    /// A file with ComfyUI's generic names.
    Comfy,
    /// A file of OneTrainer.
    OneTrainer,
    /// A LoRA adapter of llama.cpp, a GGUF file.
    Gguf,
    /// A directory of mlx-lm's.
    Mlx,
    /// torchtune's state dict of an adapter.
    Torchtune,
}

impl AdapterFormat {
    const ALL: [AdapterFormat; 10] = [
        AdapterFormat::Native,
        AdapterFormat::Peft,
        AdapterFormat::Loralib,
        AdapterFormat::Kohya,
        AdapterFormat::Diffusers,
        AdapterFormat::Comfy,
        AdapterFormat::OneTrainer,
        AdapterFormat::Gguf,
        AdapterFormat::Mlx,
        AdapterFormat::Torchtune,
    ];

    /// The format of that name.
    pub fn from_name(name: &str) -> Option<AdapterFormat> {
        AdapterFormat::ALL.into_iter().find(|format| format.name() == name)
    }

    /// Whether its files have a configuration, which [`SourceConfig`] may carry.
    pub fn has_configuration(self) -> bool {
        matches!(self, AdapterFormat::Peft | AdapterFormat::Diffusers)
    }

    /// Whether it spells modules in a way of its own, not as the base names them.
    pub fn has_naming(self) -> bool {
        match self {
            AdapterFormat::Kohya
            | AdapterFormat::Diffusers
            | AdapterFormat::Comfy
            | AdapterFormat::OneTrainer => true,
            AdapterFormat::Native
            | AdapterFormat::Peft
            | AdapterFormat::Loralib
            | AdapterFormat::Gguf
            | AdapterFormat::Mlx
            | AdapterFormat::Torchtune => false,
        }
    }

    /// The name that `--to` takes and that files record.
    pub fn name(self) -> &'static str {
        match self {
            AdapterFormat::Native => "lora",
            AdapterFormat::Peft => "peft",
            AdapterFormat::Loralib => "loralib",
            AdapterFormat::Kohya => "kohya",
            AdapterFormat::Diffusers => "diffusers",
            AdapterFormat::Comfy => "comfy",
            AdapterFormat::OneTrainer => "onetrainer",
            AdapterFormat::Gguf => "gguf",
            AdapterFormat::Mlx => "mlx",
            AdapterFormat::Torchtune => "torchtune",
        }
    }
}

impl fmt::Display for AdapterFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The configuration that another format's file had, verbatim.
#[derive(Clone, Debug, PartialEq)]
pub struct SourceConfig {
    /// Which format.
    pub format: AdapterFormat,
    /// Every field, in its order.
    pub config: Map<String, Value>,
}

/// One change to one parameter.
#[derive(Clone, Debug)]
pub struct Component {
    /// What is changed.
    pub target: Target,
    /// How it is changed.
    pub form: Form,
}

impl Component {
    /// The order of an adapter's components: by target, of one target as they act, and of those
    /// that act together by the form's name.
    pub fn compare(&self, other: &Component) -> Ordering {
        self.target
            .cmp(&other.target)
            .then_with(|| self.form.precedence().cmp(&other.form.precedence()))
            .then_with(|| self.form.name().cmp(other.form.name()))
    }
}

/// A parameter of the base model, as the adapter names it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Target {
    /// The module, without the wrapper prefix of the adapter's format:
    /// `model.layers.0.self_attn.q_proj`; empty if the parameter is the model's own.
    pub module: String,
    /// The parameter within the module: `weight`.
    pub parameter: String,
}

impl Target {
    /// The `weight` of a module.
    pub fn weight(module: impl Into<String>) -> Target {
        Target { module: module.into(), parameter: "weight".to_owned() }
    }

    /// The parameter's full name: `model.layers.0.self_attn.q_proj.weight`.
    pub fn name(&self) -> String {
        if self.module.is_empty() {
            // A parameter of the model itself.
            return self.parameter.clone();
        }
        format!("{}.{}", self.module, self.parameter)
    }
}

/// How a component changes its target.
///
/// The formulas write W for the parameter as a matrix of out × in: of a convolution, in counts
/// the kernel's positions too; of an embedding, out is the embedding's dimension and in the
/// vocabulary, so that the stored matrix is Wᵀ.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Form {
    /// `W' = W + s·B·A` (Hu et al. 2021); with a magnitude, DoRA.
    LowRank(LowRank),
    /// `W' = W + s·B·A` of a bare parameter (PEFT's `target_parameters`), such as fused experts.
    Experts(Experts),
    /// `W' = W + (λb⊙B)·(λd⊙A)` with factors that all layers share (VeRA).
    Shared(Shared),
    /// `W' = W + s·B·T·A`, a convolution whose kernel has factors of its own (LoCon's `lora_mid`).
    Tucker(Tucker),
    /// `W' = m·V/‖V‖` with V the weight as another form changes it (DoRA of LyCORIS).
    Decomposed(Decomposed),
    /// `W' = W + s·(B₁A₁)⊙(B₂A₂)` (LoHa).
    Hadamard(Hadamard),
    /// `W' = W + s·C⊗D` (LoKr).
    Kronecker(Kronecker),
    /// `W' = W ⊙ l`, one gain per input or per output feature (IA³).
    Gain(Gain),
    /// `W' = W·Rᵀ`, a block-diagonal rotation of the inputs (OFT).
    Rotation(Rotation),
    /// `W' = W·H₁·H₂·…`, Householder reflections of the inputs (HRA).
    Reflections(Reflections),
    /// `W' = s ⊙ (W·R₁ᵀ·R₂ᵀ·…)`, rotations of the inputs block by block, shuffled (BOFT).
    Butterfly(Butterfly),
    /// `W' = W + D` tiled along the inputs (MiSS, formerly Bone).
    Tiled(Tiled),
    /// `W' = W ⊙ (1 + s·B·A)` (HiRA, Huang et al. 2025); PEFT knows no s, so it is 1.
    Proportional(LowRank),
    /// `W' = W + S`, single values at given places (SHiRA).
    Sparse(Sparse),
    /// `W' = W + C/in` with C made of circulant blocks (C³A, Chen et al. 2024, arXiv 2407.19342):
    /// the kernels k are out/b × in/b × b, and `C[p·b + i, q·b + j] = k[p, q, (j − i) mod b]`.
    Circulant(Tensor),
    /// `W' = W + B·diag(λ/(r·‖bₖ‖·‖aₖ‖))·A·diag(n)` (DeLoRA).
    Bounded(Bounded),
    /// `W' = W + s·D` with a low-rank D in every field of a grid (GraLoRA).
    Grid(Grid),
    /// `W' = W + s·T`, a change stored in full (`lora_bias`).
    Added {
        /// T, of the parameter's shape.
        tensor: Tensor,
        /// s.
        scale: f64,
    },
    /// `W' = T`: the parameter was trained in full. Its shape may differ from the base's.
    Replaced(Tensor),
    /// Rows of W' are given; the others are W's.
    Rows {
        /// The row that each row of the tensor replaces, ascending.
        indices: Vec<u64>,
        /// The rows.
        rows: Tensor,
    },
    /// A copy of the parameter as it was when training began: the W of the other components of
    /// the same target. PEFT saves one beside a targeted embedding or output layer.
    Base(Tensor),
}

impl Form {
    /// Its tensors.
    pub fn tensors(&self) -> Vec<&Tensor> {
        match self {
            Form::LowRank(form) | Form::Proportional(form) => {
                let optional = [form.rank_gain.as_ref(), form.magnitude.as_ref()];
                [&form.a, &form.b].into_iter().chain(optional.into_iter().flatten()).collect()
            }
            Form::Experts(form) => vec![&form.a, &form.b],
            Form::Tucker(form) => vec![&form.a, &form.b, &form.core],
            Form::Decomposed(form) => {
                form.change.tensors().into_iter().chain([&form.magnitude]).collect()
            }
            Form::Shared(form) => vec![&form.a, &form.b, &form.in_gain, &form.out_gain],
            Form::Hadamard(form) => {
                [&form.first, &form.second].into_iter().flat_map(Cores::tensors).collect()
            }
            Form::Kronecker(form) => {
                [&form.left, &form.right].into_iter().flat_map(KroneckerSide::tensors).collect()
            }
            Form::Gain(form) => vec![&form.gain],
            Form::Rotation(form) => vec![&form.generators],
            Form::Tiled(form) => vec![&form.block],
            Form::Reflections(form) => vec![&form.vectors],
            Form::Butterfly(form) => vec![&form.generators, &form.gain],
            Form::Sparse(form) => vec![&form.indices, &form.values],
            Form::Circulant(kernels) => vec![kernels],
            Form::Bounded(form) => vec![&form.a, &form.b, &form.bound, &form.norms],
            Form::Grid(form) => vec![&form.a, &form.b],
            Form::Added { tensor, .. } | Form::Replaced(tensor) | Form::Base(tensor) => {
                vec![tensor]
            }
            Form::Rows { rows, .. } => vec![rows],
        }
    }

    /// The method's name in messages and reports.
    pub fn method(&self) -> &'static str {
        match self {
            Form::LowRank(form) if form.magnitude.is_some() => "DoRA",
            Form::LowRank(form) if form.rank_gain.is_some() => "AdaLoRA",
            Form::LowRank(_) | Form::Experts(_) => "LoRA",
            Form::Tucker(_) => "LoCon",
            Form::Decomposed(_) => "DoRA",
            Form::Shared(_) => "VeRA",
            Form::Hadamard(_) => "LoHa",
            Form::Kronecker(_) => "LoKr",
            Form::Gain(_) => "IA³",
            Form::Rotation(_) => "OFT",
            Form::Tiled(_) => "MiSS",
            Form::Reflections(_) => "HRA",
            Form::Butterfly(_) => "BOFT",
            Form::Proportional(_) => "HiRA",
            Form::Sparse(_) => "SHiRA",
            Form::Circulant(_) => "C3A",
            Form::Bounded(_) => "DeLoRA",
            Form::Grid(_) => "GraLoRA",
            Form::Added { .. } => "added",
            Form::Replaced(_) => "replaced",
            Form::Rows { .. } => "token rows",
            Form::Base(_) => "base copy",
        }
    }

    /// The form's name in our format; of what is decomposed, that of the change.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Form::LowRank(_) => "low-rank",
            Form::Experts(_) => "experts",
            Form::Shared(_) => "shared",
            Form::Tucker(_) => "tucker",
            Form::Decomposed(form) => form.change.name(),
            Form::Hadamard(_) => "hadamard",
            Form::Kronecker(_) => "kronecker",
            Form::Gain(_) => "gain",
            Form::Rotation(_) => "rotation",
            Form::Reflections(_) => "reflections",
            Form::Butterfly(_) => "butterfly",
            Form::Tiled(_) => "tiled",
            Form::Proportional(_) => "proportional",
            Form::Sparse(_) => "sparse",
            Form::Circulant(_) => "circulant",
            Form::Bounded(_) => "bounded",
            Form::Grid(_) => "grid",
            Form::Added { .. } => "added",
            Form::Replaced(_) => "replaced",
            Form::Rows { .. } => "rows",
            Form::Base(_) => "base",
        }
    }

    /// Where it stands among the changes of one parameter: copies of the base and whole parameters
    /// come before what changes them.
    pub(crate) fn precedence(&self) -> usize {
        match self {
            Form::Base(_) => 0,
            Form::Replaced(_) => 1,
            Form::Rows { .. } => 2,
            Form::Experts(experts) => experts.depth.saturating_add(3),
            Form::Added { .. } => usize::MAX,
            _ => 3,
        }
    }

    /// Whether W' − W does not depend on W, so that the changes of several adapters add up and
    /// can be subtracted again.
    pub fn is_additive(&self) -> bool {
        match self {
            Form::LowRank(form) => form.magnitude.is_none(),
            Form::Tiled(form) => form.rule == TiledRule::Add,
            Form::Experts(_)
            | Form::Tucker(_)
            | Form::Shared(_)
            | Form::Hadamard(_)
            | Form::Kronecker(_)
            | Form::Sparse(_)
            | Form::Circulant(_)
            | Form::Bounded(_)
            | Form::Grid(_)
            | Form::Added { .. } => true,
            Form::Gain(_)
            | Form::Decomposed(_)
            | Form::Rotation(_)
            | Form::Reflections(_)
            | Form::Butterfly(_)
            | Form::Proportional(_)
            | Form::Replaced(_)
            | Form::Rows { .. }
            | Form::Base(_) => false,
        }
    }
}

/// The factors of `s·B·A`.
#[derive(Clone, Debug)]
pub struct LowRank {
    /// A, rank × in; of a convolution rank × in × kernel.
    pub a: Tensor,
    /// B, out × rank; of a convolution with ones behind.
    pub b: Tensor,
    /// Where s comes from.
    pub scaling: Scaling,
    /// What kind of layer it belongs to.
    pub layer: Layer,
    /// E of AdaLoRA's `B·diag(E)·A`, rank values.
    pub rank_gain: Option<Tensor>,
    /// m of DoRA's `W' = m·V/‖V‖` with `V = W + s·B·A` (Liu et al. 2024, arXiv 2402.09353): one
    /// value per output feature, and the norm over all inputs.
    pub magnitude: Option<Tensor>,
}

/// The kind of layer that a low-rank change belongs to: what its tensors' shapes mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layer {
    /// A matrix, stored as (out, in) or, by Conv1D, as (in, out).
    Linear,
    /// An embedding, stored as (vocabulary, dimension): A is rank × vocabulary, B dimension × rank.
    Embedding,
    /// A convolution, stored as (out, in, kernel…).
    Convolution,
    /// loralib's fused projections (`MergedLinear`): a weight of equal groups of rows, n of which
    /// have a change each. A is (n·rank) × in, B (n·rows) × rank; which n groups, no file says.
    /// [`crate::codec::loralib::merged`] makes a linear change of it.
    Merged,
}

impl LowRank {
    /// A change without further gains, of a linear layer.
    pub fn linear(a: Tensor, b: Tensor, scaling: Scaling) -> LowRank {
        LowRank { a, b, scaling, layer: Layer::Linear, rank_gain: None, magnitude: None }
    }

    /// Whether it is `s·B·A` and nothing more, of a linear layer.
    pub fn is_plain(&self) -> bool {
        self.layer == Layer::Linear && self.rank_gain.is_none() && self.magnitude.is_none()
    }

    /// The rank, from the shapes.
    pub fn rank(&self) -> usize {
        let rank = match self.layer {
            Layer::Merged => self.b.shape.get(1),
            Layer::Linear | Layer::Embedding | Layer::Convolution => self.a.shape.first(),
        };
        rank.copied().unwrap_or(0)
    }

    /// The number of input features; of a convolution, times the kernel's positions.
    pub fn in_features(&self) -> usize {
        self.a.shape.iter().skip(1).fold(1, |product, &length| product.saturating_mul(length))
    }

    /// The number of output features.
    pub fn out_features(&self) -> usize {
        self.b.shape.first().copied().unwrap_or(0)
    }

    /// The multiplier s of B·A.
    pub fn scale(&self) -> f64 {
        self.scaling.scale(self.rank())
    }
}

/// The factors of one bare parameter of a module, as PEFT's `target_parameters` stores them.
///
/// With E experts and rank r per expert, A has E·r rows, the expert in the outer place, and B has
/// r·E columns, the expert in the inner one (PEFT) or in the outer one (block-wise). Which of the
/// module's parameters it is, how that is stored and which packing B has, no file says: the base's
/// shapes decide, or the user.
#[derive(Clone, Debug)]
pub struct Experts {
    /// A, (E·r) × in.
    pub a: Tensor,
    /// B, out × (r·E).
    pub b: Tensor,
    /// How many wrappers lie inside this one: PEFT nests one per parameter, in the order in which
    /// the module registered them.
    pub depth: usize,
    /// The parameters of this module that the configuration names.
    pub candidates: Vec<Candidate>,
}

/// A parameter that factors may belong to, and what the configuration says of it: its patterns
/// match a parameter's full name, so two parameters of one module may have two scales.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// The parameter within the module: `gate_up_proj`.
    pub parameter: String,
    /// alpha, and the rule; the rank of the rule is r, not E·r.
    pub scaling: Scaling,
    /// r.
    pub rank: usize,
}

/// A low-rank change of a convolution with a core (Tucker decomposition, as LyCORIS' LoCon stores
/// it): `ΔW[o, i, κ] = s·Σ_{j,k} B[o, j]·T[j, k, κ]·A[k, i]`.
#[derive(Clone, Debug)]
pub struct Tucker {
    /// A, rank × in, with ones behind.
    pub a: Tensor,
    /// B, out × rank, with ones behind.
    pub b: Tensor,
    /// T, rank × rank × kernel.
    pub core: Tensor,
    /// Where s comes from.
    pub scaling: Scaling,
}

impl Tucker {
    /// The rank, from the shapes.
    pub fn rank(&self) -> usize {
        self.a.shape.first().copied().unwrap_or(0)
    }
}

/// Weight decomposition (DoRA, Liu et al. 2024, arXiv 2402.09353) where it is not PEFT's: of any
/// additive form, and with norms per output or per input feature (LyCORIS' `wd_on_out`).
///
/// `W' = m·V/‖V‖` with V = W + Δ. A low-rank change with norms per output is [`LowRank::magnitude`].
#[derive(Clone, Debug)]
pub struct Decomposed {
    /// Δ.
    pub change: Box<Form>,
    /// m, one value per feature: in or out values.
    pub magnitude: Tensor,
    /// The features that norms and magnitudes belong to. Of a convolution, the norm of an input
    /// channel is over outputs and kernel.
    pub axis: GainAxis,
}

/// VeRA (Kopiczko et al. 2024, arXiv 2310.11454): frozen random factors that all layers share, of
/// which each uses the first in columns of A and the first out rows of B, and two trained vectors.
#[derive(Clone, Debug)]
pub struct Shared {
    /// A, rank × (at least in).
    pub a: Tensor,
    /// B, (at least out) × rank.
    pub b: Tensor,
    /// λd, rank values: the gain of A's rows.
    pub in_gain: Tensor,
    /// λb, out values: the gain of B's rows.
    pub out_gain: Tensor,
}

/// LoHa (Hyeon-Woo et al. 2022, arXiv 2108.06098): the elementwise product of two low-rank
/// matrices.
#[derive(Clone, Debug)]
pub struct Hadamard {
    /// B₁·A₁.
    pub first: Cores,
    /// B₂·A₂.
    pub second: Cores,
    /// Where s comes from.
    pub scaling: Scaling,
    /// The rank that the scaling rule divides by.
    pub rank: usize,
}

/// A product `B·A`, or for a convolution `Σ t[i,j,…]·b[i,out]·a[j,in]` (a Tucker decomposition).
///
/// The files call B `w1_a` and A `w1_b`.
#[derive(Clone, Debug)]
pub struct Cores {
    /// B, out × rank; with a core, rank × out.
    pub b: Tensor,
    /// A, rank × in; of a convolution without a core, rank × (in·kernel).
    pub a: Tensor,
    /// The core t, rank (of B) × rank (of A) × kernel…; of a one-dimensional convolution with a
    /// 1 behind.
    pub core: Option<Tensor>,
}

impl Cores {
    fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        [&self.b, &self.a].into_iter().chain(&self.core)
    }
}

/// LoKr (Edalati et al. 2022, arXiv 2212.10650, as LyCORIS and PEFT store it): `s·C⊗D`.
///
/// A full D of three dimensions is that of a one-dimensional convolution, and there PEFT's product
/// is another one: it hands torch a C of two dimensions, torch takes it for 1 × rows × columns, and
/// the result, of D's rows × (C's rows · D's columns) × (C's columns · kernel), is only read as
/// out × in × kernel. The adapter was trained that way, so that is what it means.
#[derive(Clone, Debug)]
pub struct Kronecker {
    /// C.
    pub left: KroneckerSide,
    /// D; of a convolution, with the kernel's dimensions (a product has them in A's columns).
    pub right: KroneckerSide,
    /// Where s comes from.
    pub scaling: Scaling,
    /// The rank that the scaling rule divides by.
    pub rank: usize,
}

/// One side of a Kronecker product.
#[derive(Clone, Debug)]
pub enum KroneckerSide {
    /// Stored in full.
    Full(Tensor),
    /// Stored as a product.
    Product(Cores),
}

impl KroneckerSide {
    fn tensors(&self) -> Vec<&Tensor> {
        match self {
            KroneckerSide::Full(tensor) => vec![tensor],
            KroneckerSide::Product(cores) => cores.tensors().collect(),
        }
    }
}

/// IA³ (Liu et al. 2022, arXiv 2205.05638).
#[derive(Clone, Debug)]
pub struct Gain {
    /// l, one value per feature: 1 × in or out × 1; of a convolution 1 × channels × 1…, and all
    /// of a channel's kernel has its gain. Input gains of a grouped convolution are those of all
    /// its groups.
    pub gain: Tensor,
    /// What it multiplies.
    pub axis: GainAxis,
    /// What is stored.
    pub stored: GainStored,
}

/// How gains are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GainStored {
    /// l itself (PEFT).
    Whole,
    /// l − 1 (LyCORIS).
    LessOne,
}

/// The features that gains belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GainAxis {
    /// Input features: a feed-forward layer's l multiplies what comes in.
    In,
    /// Output features: l multiplies weight and bias. The bias has a component of its own, which
    /// means nothing where the layer has no bias.
    Out,
}

/// OFT (Qiu et al. 2023, arXiv 2306.07280): `W' = W·Rᵀ` turns every block of input features by an
/// R that Cayley makes of a skew-symmetric Q. Of a convolution, the blocks divide the in·kernel
/// columns of the stored matrix. Of an embedding, the dimension is turned, by R itself: the stored
/// matrix E becomes `E·R`.
///
/// PEFT's two ways of computing R are not approximations of each other but of each other's
/// inverse: exactly, `R = (I − Q)(I + Q)⁻¹`; as a series, that of `(I + Q)(I − Q)⁻¹`.
#[derive(Clone, Debug)]
pub struct Rotation {
    /// The strict upper triangles of Q, row by row: blocks × b(b−1)/2; one row if all share it.
    pub generators: Tensor,
    /// b, the features of one block.
    pub block: usize,
    /// What kind of layer it belongs to.
    pub layer: Layer,
    /// PEFT's `num_cayley_neumann_terms`; `None` is exact. Of n ≥ 4 terms the series is
    /// `I + 2Q + … + 2Qⁿ⁻² + Qⁿ⁻¹`, of 3 the same as of 4, of 2 `I + 2Q`, of fewer `I`.
    pub neumann_terms: Option<usize>,
    /// ε of constrained OFT: a Q whose Frobenius norm exceeds `ε/√(stored blocks)` is scaled down
    /// to it.
    pub radius: Option<f64>,
}

/// HRA (Yuan et al. 2024, arXiv 2405.17484): `H = I − 2·u·uᵀ/‖u‖²` for every column u.
#[derive(Clone, Debug)]
pub struct Reflections {
    /// The columns, in × rank; of a convolution, in counts the kernel's positions.
    pub vectors: Tensor,
    /// Whether the columns are first made orthogonal, in order (PEFT's `apply_GS`).
    pub orthogonal: bool,
}

/// BOFT (Liu et al. 2023, arXiv 2311.06243): factors of block-diagonal rotations,
/// `R = (I − Q)(I + Q)⁻¹` with `Q = (G − Gᵀ)/2`.
///
/// Of several factors, the one numbered i ≥ 1 acts on interleaved inputs, and puts its outputs back:
/// of every 2ⁱ·b inputs, in turn b/2 of the first half and b/2 of the second.
#[derive(Clone, Debug)]
pub struct Butterfly {
    /// G, factors × blocks × b × b.
    pub generators: Tensor,
    /// s, one value per output feature. The bias has none.
    pub gain: Tensor,
}

/// SHiRA (Bhardwaj et al. 2024, arXiv 2406.13175).
#[derive(Clone, Debug)]
pub struct Sparse {
    /// Output and input feature of every value, 2 × n integers.
    pub indices: Tensor,
    /// n values; those of one place add up.
    pub values: Tensor,
}

/// DeLoRA (Bini et al. 2025, arXiv 2503.18225). Norms of less than 1e-4 count as that.
#[derive(Clone, Debug)]
pub struct Bounded {
    /// A, rank × in; aₖ are its rows.
    pub a: Tensor,
    /// B, out × rank; bₖ are its columns.
    pub b: Tensor,
    /// λ, one value.
    pub bound: Tensor,
    /// n, the norms that the base's inputs had: in values.
    pub norms: Tensor,
}

/// GraLoRA (Jung et al. 2025, arXiv 2505.20355): W in k × k fields. With `t = rank/k`,
///
/// ```text
/// D[p·out/k + o, q·in/k + i] = Σ_{c < t} A[q, i, p·t + c]·B[p, q·t + c, o]
/// ```
///
/// Its hybrid part is a low-rank change of its own.
#[derive(Clone, Debug)]
pub struct Grid {
    /// A, k × in/k × rank.
    pub a: Tensor,
    /// B, k × rank × out/k.
    pub b: Tensor,
    /// Where s comes from.
    pub scaling: Scaling,
    /// What the scaling rule divides by: the rank, and that of the hybrid part.
    pub rank: usize,
}

/// MiSS (Kang 2024, arXiv 2409.15371).
#[derive(Clone, Debug)]
pub struct Tiled {
    /// The block D: rank × out, of `mini` rank × (a divisor of out); of `bat` M,
    /// out/rank × rank × rank.
    pub block: Tensor,
    /// How it changes the weight.
    pub rule: TiledRule,
}

/// The variants of MiSS.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TiledRule {
    /// `W'[o, i] = W[o, i] + D[i mod rank, o mod columns]`.
    Add,
    /// `W' = W + W·M + M`, block by square block of W, with one M for all blocks of the same
    /// outputs: `Σ_b W[p·r+a, q·r+b]·M[p,b,c] + M[p,a,c]` is added to `W[p·r+a, q·r+c]`.
    Bat,
}

/// An alpha and the rule that makes a scale of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scaling {
    /// The numerator.
    pub alpha: f64,
    /// The denominator.
    pub rule: ScalingRule,
}

/// How the scale follows from alpha and rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ScalingRule {
    /// `s = alpha / rank` (Hu et al. 2021).
    AlphaOverRank,
    /// `s = alpha / √rank`, rank-stabilised LoRA (Kalajdzievski 2023, arXiv 2312.03732).
    AlphaOverSqrtRank,
    /// `s = alpha`, for formats that store the multiplier itself.
    Direct,
}

impl ScalingRule {
    /// The name in our format.
    pub fn name(self) -> &'static str {
        match self {
            ScalingRule::AlphaOverRank => "alpha/rank",
            ScalingRule::AlphaOverSqrtRank => "alpha/sqrt-rank",
            ScalingRule::Direct => "direct",
        }
    }

    /// The rule of that name.
    pub fn from_name(name: &str) -> Option<ScalingRule> {
        [ScalingRule::AlphaOverRank, ScalingRule::AlphaOverSqrtRank, ScalingRule::Direct]
            .into_iter()
            .find(|rule| rule.name() == name)
    }
}

impl Scaling {
    /// The scale 1: an alpha that is the rank.
    pub fn of_rank(rank: usize) -> Scaling {
        Scaling { alpha: rank as f64, rule: ScalingRule::AlphaOverRank }
    }

    /// The multiplier s, computed in f64 exactly as PEFT computes it.
    pub fn scale(self, rank: usize) -> f64 {
        match self.rule {
            ScalingRule::AlphaOverRank => self.alpha / rank as f64,
            ScalingRule::AlphaOverSqrtRank => self.alpha / (rank as f64).sqrt(),
            ScalingRule::Direct => self.alpha,
        }
    }
}

/// Something a reader noticed that does not stop it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the Display text is the documentation")]
pub enum Note {
    /// The configuration's rank is not the tensors' rank; the tensors' rank is used.
    RankDiffers { module: String, configured: usize, stored: usize },
    /// A pattern key matched no module.
    DeadPattern { field: &'static str, key: String },
    /// A configuration field was ignored on the user's word.
    IgnoredField { field: String },
    /// Several alpha keys match a module, with different values; the first was used.
    ContestedAlpha { module: String, alpha: String },
    /// The configuration gives no alpha; the user's was used.
    AlphaGiven { alpha: String },
    /// A tensor is in a shard but not in the index.
    NotInIndex { tensor: String, shard: String },
    /// A stale copy: the index places the tensor in another shard.
    StaleCopy { tensor: String, shard: String, indexed: String },
    /// The adapter was trained on a base that its initialisation had changed, and the user says
    /// that the base given is that one.
    ResidualBase { init: String },
    /// PEFT adds a change twice, so the scale is twice what the configuration gives.
    AddedTwice { module: String },
    /// How the factors of fused experts were read, which their shapes do not show.
    ExpertLayout { module: String, reading: String, evidence: String },
    /// Training pruned a component's rank to 0.
    Pruned { module: String },
    /// Factors without an alpha: loaders give them the scale 1.
    NoAlpha { modules: usize },
    /// A tensor that only training needed, or that repeats another.
    PassedOver { tensor: String, reason: &'static str },
    /// A directory holds the adapter's tensors in two files; one was read.
    PickleBeside { file: &'static str, read: &'static str },
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Note::RankDiffers { module, configured, stored } => write!(
                f,
                "`{module}`: the configuration says rank {configured}, the tensors have rank \
                 {stored}; the scale uses {stored}"
            ),
            Note::DeadPattern { field, key } => {
                write!(f, "{field}: the key {key:?} matches none of the adapter's modules")
            }
            Note::IgnoredField { field } => {
                write!(f, "the configuration field `{field}` is ignored, as asked")
            }
            Note::ContestedAlpha { module, alpha } => write!(
                f,
                "`{module}`: several alpha_pattern keys match with different values; alpha {alpha} \
                 of the first is used, as PEFT does, but PEFT sorts the keys when it saves, so \
                 training may have used another"
            ),
            Note::AlphaGiven { alpha } => {
                write!(f, "the adapter records no alpha: {alpha} is used, as given")
            }
            Note::NotInIndex { tensor, shard } => {
                write!(f, "`{tensor}` is in {shard} but not in the index; it is copied and indexed")
            }
            Note::StaleCopy { tensor, shard, indexed } => {
                write!(f, "`{tensor}` in {shard} is dropped: the index places it in {indexed}")
            }
            Note::ResidualBase { init } => write!(
                f,
                "the initialisation {init:?} changed the base before training; the base given is \
                 taken for the changed one, as asked"
            ),
            Note::AddedTwice { module } => write!(
                f,
                "`{module}`: PEFT adds the change of a MultiheadAttention's output projection \
                 twice, in training and in merging; so it is added twice here"
            ),
            Note::ExpertLayout { module, reading, evidence } => {
                write!(f, "`{module}`: {reading}, as {evidence}")
            }
            Note::Pruned { module } => {
                write!(f, "`{module}`: training pruned its rank to 0, so nothing is added")
            }
            Note::NoAlpha { modules } => write!(
                f,
                "no alpha is recorded for {modules} modules: their scale is 1, as every loader of \
                 this format takes it"
            ),
            Note::PassedOver { tensor, reason } => write!(f, "`{tensor}` is passed over: {reason}"),
            Note::PickleBeside { file, read } => {
                write!(f, "{file} is not read: {read} lies beside it")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_format_is_found_by_its_name() {
        for format in AdapterFormat::ALL {
            assert_eq!(AdapterFormat::from_name(format.name()), Some(format));
        }
        assert_eq!(AdapterFormat::from_name("Kohya"), None);
    }
}
