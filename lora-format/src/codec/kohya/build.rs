//! The tensors of one module → its changes.

use std::collections::BTreeMap;

use super::roles::Role;
use crate::error::{AdapterProblem, Shape};
use crate::factors::{self, FactorTensors};
use crate::limits;
use crate::model::{
    Component, Cores, Decomposed, Form, Gain, GainAxis, GainStored, Hadamard, Kronecker,
    KroneckerSide, Layer, LowRank, Note, Scaling, ScalingRule, Target, Tucker,
};
use crate::tensor::Tensor;

/// The tensors of one module by role.
pub(super) type Roles = BTreeMap<Role, Tensor>;

/// What is gathered while a file is read.
#[derive(Default)]
pub(super) struct Builder {
    pub(super) components: Vec<Component>,
    pub(super) problems: Vec<AdapterProblem>,
    pub(super) notes: Vec<Note>,
    /// Modules whose factors have no alpha.
    pub(super) without_alpha: usize,
}

/// What a configuration says of a module's scale.
pub(super) type Configured<'a> = dyn FnMut(&str) -> Option<Scaling> + 'a;

impl Builder {
    /// Reads the changes of a module. `configured` gives the scale of factors that have no alpha of
    /// their own; where it gives none, the scale is 1, as every loader takes it.
    pub(super) fn module(
        &mut self,
        module: &str,
        mut roles: Roles,
        configured: &mut Configured<'_>,
    ) {
        let alpha = match roles.remove(&Role::Alpha) {
            Some(tensor) => match scalar(&tensor) {
                Some(alpha) => Some((alpha, tensor.name)),
                None => {
                    let (tensor, dtype, shape) = (tensor.name, tensor.dtype, tensor.shape);
                    let problem = AdapterProblem::Scalar { tensor, dtype, shape: Shape(shape) };
                    return self.problems.push(problem);
                }
            },
            None => None,
        };
        let mut scales = Scales { module, alpha, configured, used: false, missing: false };
        let magnitude = roles.remove(&Role::Magnitude);
        let change = self.change(module, &mut roles, &mut scales);
        let up_bias = roles.remove(&Role::UpBias);
        if let (Some(bias), Some(form)) = (up_bias, &change) {
            let scale = match form {
                Form::LowRank(form) => form.scale(),
                Form::Tucker(form) => form.scaling.scale(form.rank()),
                _ => 1.0,
            };
            self.push(module, "bias", Form::Added { tensor: bias, scale });
        }
        match (change, magnitude) {
            (Some(form), Some(magnitude)) => {
                if let Some(form) = self.decomposed(form, magnitude) {
                    self.push(module, "weight", form);
                }
            }
            (Some(form), None) => self.push(module, "weight", form),
            (None, Some(tensor)) => self.unused(tensor),
            (None, None) => {}
        }
        self.in_full(module, &mut roles);
        let Scales { alpha, used, missing, .. } = scales;
        self.without_alpha += usize::from(missing);
        match alpha {
            // LyCORIS writes one beside what has no scale.
            Some((_, tensor)) if !used => {
                let reason = "what it belongs to has no scale";
                self.notes.push(Note::PassedOver { tensor, reason });
            }
            _ => {}
        }
        for tensor in roles.into_values() {
            self.unused(tensor);
        }
    }

    /// The one change by factors that a module has.
    fn change(
        &mut self,
        module: &str,
        roles: &mut Roles,
        scales: &mut Scales<'_, '_>,
    ) -> Option<Form> {
        let has = |role: Role| roles.contains_key(&role);
        if has(Role::Down) || has(Role::Up) || has(Role::Mid) {
            return self.low_rank(module, roles, scales);
        }
        if has(Role::HadaA1) || has(Role::HadaB1) || has(Role::HadaA2) || has(Role::HadaB2) {
            return self.hadamard(module, roles, scales);
        }
        let left = has(Role::KronLeft) || has(Role::KronLeftA) || has(Role::KronLeftB);
        let right = has(Role::KronRight) || has(Role::KronRightA) || has(Role::KronRightB);
        if left || right {
            return self.kronecker(module, roles, scales);
        }
        // IA³'s gains lie in tensors that are called as any weight is; the flag tells.
        let gain = roles.remove(&Role::Gain)?;
        let Some(flag) = roles.remove(&Role::OnInput) else {
            self.unused(gain);
            return None;
        };
        let Some(on_input) = scalar(&flag) else {
            let (tensor, dtype, shape) = (flag.name, flag.dtype, Shape(flag.shape));
            self.problems.push(AdapterProblem::Scalar { tensor, dtype, shape });
            return None;
        };
        let axis = if on_input == 0.0 { GainAxis::Out } else { GainAxis::In };
        Some(Form::Gain(Gain { gain, axis, stored: GainStored::LessOne }))
    }

    fn low_rank(
        &mut self,
        module: &str,
        roles: &mut Roles,
        scales: &mut Scales<'_, '_>,
    ) -> Option<Form> {
        let (a, b) = (roles.remove(&Role::Down), roles.remove(&Role::Up));
        let core = roles.remove(&Role::Mid);
        let dimensions = a.as_ref().or(b.as_ref()).map_or(0, |tensor| tensor.shape.len());
        let layer = if dimensions > 2 { Layer::Convolution } else { Layer::Linear };
        let names = (format!("{module}: A"), format!("{module}: B"));
        let rank = a.as_ref().and_then(|a| a.shape.first().copied()).unwrap_or(0);
        if !self.check_rank(module, rank) {
            return None;
        }
        let scaling = scales.of(rank);
        if let (Some(core), Some(a), Some(b)) = (&core, &a, &b) {
            let (a, b, core) = (a.clone(), b.clone(), core.clone());
            return self.tucker(module, Tucker { a, b, core, scaling });
        }
        if let Some(core) = core {
            self.unused(core);
            return None;
        }
        let factors = FactorTensors { a, b };
        let low_rank =
            factors::of_layer(module, layer, factors, names, scaling, &mut self.problems)?;
        Some(Form::LowRank(low_rank))
    }

    fn tucker(&mut self, module: &str, form: Tucker) -> Option<Form> {
        let plain = |shape: &[usize]| shape.len() >= 2 && shape[2..].iter().all(|&n| n == 1);
        let core = |shape: &[usize]| (3..=5).contains(&shape.len()) && !shape.contains(&0);
        let sound = self.check(&form.a, plain, "A beside a core is rank × in, with ones behind")
            & self.check(&form.b, plain, "B beside a core is out × rank, with ones behind")
            & self.check(&form.core, core, "a core is rank × rank × kernel");
        if !sound {
            return None;
        }
        if form.core.shape[..2] != [form.b.shape[1], form.a.shape[0]] {
            let (a, b) = (Shape(form.a.shape), Shape(form.b.shape));
            self.problems.push(AdapterProblem::RankMismatch { module: module.to_owned(), a, b });
            return None;
        }
        let scale = form.scaling.scale(form.rank());
        self.check_scale(module, scale).then_some(Form::Tucker(form))
    }

    fn hadamard(
        &mut self,
        module: &str,
        roles: &mut Roles,
        scales: &mut Scales<'_, '_>,
    ) -> Option<Form> {
        let first = self.cores(module, roles, [Role::HadaB1, Role::HadaA1, Role::HadaCore1])?;
        let second = self.cores(module, roles, [Role::HadaB2, Role::HadaA2, Role::HadaCore2])?;
        if product_shape(&first) != product_shape(&second) {
            let (one, other) = (Shape(product_shape(&first)), Shape(product_shape(&second)));
            let module = module.to_owned();
            self.problems.push(AdapterProblem::ProductsDiffer { module, one, other });
            return None;
        }
        let rank = first.a.shape.first().copied().unwrap_or(0);
        let scaling = scales.of(rank);
        (self.check_rank(module, rank) && self.check_scale(module, scaling.scale(rank)))
            .then(|| Form::Hadamard(Hadamard { first, second, scaling, rank }))
    }

    fn kronecker(
        &mut self,
        module: &str,
        roles: &mut Roles,
        scales: &mut Scales<'_, '_>,
    ) -> Option<Form> {
        let left = self.side(
            module,
            roles,
            Role::KronLeft,
            // No program writes a core of C.
            [Role::KronLeftB, Role::KronLeftA, Role::Mid],
        )?;
        let right = self.side(
            module,
            roles,
            Role::KronRight,
            [Role::KronRightB, Role::KronRightA, Role::KronRightCore],
        )?;
        if let KroneckerSide::Full(tensor) = &right
            && tensor.shape.len() == 3
        {
            let (tensor, shape) = (tensor.name.clone(), Shape(tensor.shape.clone()));
            let expected = "of one-dimensional convolutions no two programs agree what it means";
            self.problems.push(AdapterProblem::FactorShape { tensor, shape, expected });
            return None;
        }
        let rank_of = |side: &KroneckerSide| match side {
            KroneckerSide::Product(cores) => cores.a.shape.first().copied(),
            KroneckerSide::Full(_) => None,
        };
        // Of two full sides there is no rank to divide by, and alpha means nothing.
        let Some(rank) = rank_of(&left).or_else(|| rank_of(&right)) else {
            let scaling = Scaling { alpha: 1.0, rule: ScalingRule::Direct };
            return Some(Form::Kronecker(Kronecker { left, right, scaling, rank: 1 }));
        };
        let scaling = scales.of(rank);
        (self.check_rank(module, rank) && self.check_scale(module, scaling.scale(rank)))
            .then(|| Form::Kronecker(Kronecker { left, right, scaling, rank }))
    }

    /// One side of a Kronecker product.
    fn side(
        &mut self,
        module: &str,
        roles: &mut Roles,
        full: Role,
        product: [Role; 3],
    ) -> Option<KroneckerSide> {
        match roles.remove(&full) {
            Some(tensor) => {
                let fits = |shape: &[usize]| (2..=5).contains(&shape.len()) && !shape.contains(&0);
                self.check(&tensor, fits, "a side of a Kronecker product is a matrix")
                    .then_some(KroneckerSide::Full(tensor))
            }
            None => self.cores(module, roles, product).map(KroneckerSide::Product),
        }
    }

    /// A product of two matrices, or with a core of three tensors.
    fn cores(&mut self, module: &str, roles: &mut Roles, [b, a, core]: [Role; 3]) -> Option<Cores> {
        let (b, a, core) = (roles.remove(&b), roles.remove(&a), roles.remove(&core));
        let (Some(b), Some(a)) = (b, a) else {
            let missing = format!("{module}: the other factor of a product");
            let present = module.to_owned();
            self.problems.push(AdapterProblem::MissingFactor { present, missing });
            return None;
        };
        let matrix = |shape: &[usize]| shape.len() == 2 && !shape.contains(&0);
        let deep = |shape: &[usize]| (3..=5).contains(&shape.len()) && !shape.contains(&0);
        let sound = self.check(&b, matrix, "it must be a matrix")
            & self.check(&a, matrix, "it must be a matrix")
            & core.as_ref().is_none_or(|it| self.check(it, deep, "a core is rank × rank × kernel"));
        if !sound {
            return None;
        }
        let agree = match &core {
            None => b.shape[1] == a.shape[0],
            Some(core) => core.shape[..2] == [b.shape[0], a.shape[0]],
        };
        if !agree {
            let (a, b) = (Shape(a.shape), Shape(b.shape));
            self.problems.push(AdapterProblem::RankMismatch { module: module.to_owned(), a, b });
            return None;
        }
        Some(Cores { b, a, core })
    }

    /// A change whose result is decomposed: magnitudes [out, 1…] or [1, in, 1…].
    fn decomposed(&mut self, form: Form, magnitude: Tensor) -> Option<Form> {
        let sizes: Vec<usize> = magnitude.shape.iter().copied().filter(|&n| n != 1).collect();
        let axis = match (magnitude.shape.as_slice(), sizes.as_slice()) {
            // diffusers has PEFT's vector; PEFT has one per output.
            ([_], _) => GainAxis::Out,
            ([_, rest @ ..], _) if rest.iter().all(|&n| n == 1) => GainAxis::Out,
            ([1, _, rest @ ..], _) if rest.iter().all(|&n| n == 1) => GainAxis::In,
            _ => {
                let (tensor, shape) = (magnitude.name, Shape(magnitude.shape));
                let expected = "magnitudes are [out, 1, …] or [1, in, 1, …]";
                self.problems.push(AdapterProblem::FactorShape { tensor, shape, expected });
                return None;
            }
        };
        if !self.check(&magnitude, |_| true, "magnitudes are numbers") {
            return None;
        }
        Some(match (form, axis) {
            (Form::LowRank(form), GainAxis::Out) => {
                // PEFT's is a vector.
                let mut vector = magnitude;
                vector.shape = vec![vector.elements()];
                Form::LowRank(LowRank { magnitude: Some(vector), ..form })
            }
            (form, axis) => {
                let mut magnitude = magnitude;
                if matches!(form, Form::LowRank(_)) {
                    magnitude.shape = vec![magnitude.elements()];
                }
                Form::Decomposed(Decomposed { change: Box::new(form), magnitude, axis })
            }
        })
    }

    /// What is stored in full: changes of weights and biases, and weights themselves.
    fn in_full(&mut self, module: &str, roles: &mut Roles) {
        let full = [
            (Role::Diff, "weight"),
            (Role::DiffBias, "bias"),
            (Role::Norm, "weight"),
            (Role::NormBias, "bias"),
        ];
        for (role, parameter) in full {
            let Some(tensor) = roles.remove(&role) else { continue };
            if self.check(&tensor, |_| true, "a change is a tensor of floats") {
                self.push(module, parameter, Form::Added { tensor, scale: 1.0 });
            }
        }
        if let Some(tensor) = roles.remove(&Role::Whole) {
            self.push(module, "weight", Form::Replaced(tensor));
        }
    }

    fn push(&mut self, module: &str, parameter: &str, form: Form) {
        let target = Target { module: module.to_owned(), parameter: parameter.to_owned() };
        self.components.push(Component { target, form });
    }

    fn unused(&mut self, tensor: Tensor) {
        self.problems.push(AdapterProblem::UnusedTensor { tensor: tensor.name });
    }

    /// Whether a factor has a dtype and shape that can be.
    fn check(
        &mut self,
        tensor: &Tensor,
        fits: impl Fn(&[usize]) -> bool,
        expected: &'static str,
    ) -> bool {
        let (name, shape) = (tensor.name.clone(), Shape(tensor.shape.clone()));
        if !tensor.dtype.is_merge_float() {
            let dtype = tensor.dtype;
            self.problems.push(AdapterProblem::FactorDtype { tensor: name, dtype });
            return false;
        }
        if !fits(&tensor.shape) {
            self.problems.push(AdapterProblem::FactorShape { tensor: name, shape, expected });
            return false;
        }
        true
    }

    fn check_rank(&mut self, module: &str, rank: usize) -> bool {
        let fits = (1..=limits::RANK).contains(&rank);
        if !fits {
            let (module, limit) = (module.to_owned(), limits::RANK);
            self.problems.push(AdapterProblem::RankRange { module, rank, limit });
        }
        fits
    }

    fn check_scale(&mut self, module: &str, scale: f64) -> bool {
        if !scale.is_finite() {
            self.problems.push(AdapterProblem::Scale { module: module.to_owned(), scale });
        }
        scale.is_finite()
    }
}

/// Where a module's scale comes from.
struct Scales<'a, 'c> {
    module: &'a str,
    alpha: Option<(f64, String)>,
    configured: &'a mut Configured<'c>,
    used: bool,
    missing: bool,
}

impl Scales<'_, '_> {
    fn of(&mut self, rank: usize) -> Scaling {
        self.used = true;
        let rule = ScalingRule::AlphaOverRank;
        if let Some((alpha, _)) = self.alpha {
            return Scaling { alpha, rule };
        }
        (self.configured)(self.module).unwrap_or_else(|| {
            self.missing = true;
            Scaling { alpha: rank as f64, rule }
        })
    }
}

/// The value of a tensor of one element; `None` of another.
pub(super) fn scalar(tensor: &Tensor) -> Option<f64> {
    use crate::dtype::Dtype;
    let bytes = tensor.bytes();
    if tensor.elements() != 1 {
        return None;
    }
    Some(match tensor.dtype {
        Dtype::F64 => f64::from_le_bytes(bytes.try_into().ok()?),
        Dtype::I64 => i64::from_le_bytes(bytes.try_into().ok()?) as f64,
        Dtype::I32 => f64::from(i32::from_le_bytes(bytes.try_into().ok()?)),
        Dtype::Bool | Dtype::U8 => f64::from(*bytes.first()?),
        Dtype::I8 => f64::from(i8::from_le_bytes([*bytes.first()?])),
        _ => f64::from(*tensor.to_f32()?.first()?),
    })
}

/// The shape of a product: out × in, and the kernel that a core gives it.
fn product_shape(cores: &Cores) -> Vec<usize> {
    let out = if cores.core.is_some() { cores.b.shape[1] } else { cores.b.shape[0] };
    let kernel = cores.core.iter().flat_map(|core| core.shape.iter().skip(2));
    [out, cores.a.shape[1]].into_iter().chain(kernel.copied()).collect()
}
