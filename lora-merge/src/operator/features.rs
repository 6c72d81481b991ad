//! What the planner needs before there is an operator: the matrix that a form's tensors ask for,
//! and whether the one that was found is it.

use lora_format::model::Form;

use super::shapes::count;
use super::{
    Matrix, added, bounded, butterfly, circulant, dora, gain, grid, hadamard, kronecker,
    proportional, reflections, rotation, sparse, tiled, tucker,
};

/// The features that a form's tensors fix; `None` where any number would fit, or where only
/// another file says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Features {
    /// Output features.
    pub(crate) out: Option<usize>,
    /// Input features; of a convolution, times the kernel's positions.
    pub(crate) input: Option<usize>,
}

/// The features that the form's tensors fix. Of tensors that [`check`] would refuse, any.
pub(crate) fn features(form: &Form) -> Features {
    match form {
        Form::LowRank(form) | Form::Proportional(form) => dora::features(form),
        Form::Tucker(form) => tucker::features(form),
        Form::Decomposed(form) => features(&form.change),
        Form::Hadamard(form) => hadamard::features(form),
        Form::Kronecker(form) => kronecker::features(form),
        Form::Gain(form) => gain::features(form),
        Form::Rotation(form) => rotation::features(form),
        Form::Tiled(form) => tiled::features(form),
        Form::Reflections(form) => reflections::features(form),
        Form::Butterfly(form) => butterfly::features(form),
        Form::Circulant(kernels) => circulant::features(kernels),
        Form::Bounded(form) => bounded::features(form),
        Form::Grid(form) => grid::features(form),
        Form::Added { tensor, .. } => added::features(tensor),
        Form::Shared(form) => Features { out: Some(count(&form.out_gain.shape)), input: None },
        _ => Features::default(),
    }
}

/// Whether the form's tensors are what its method needs, and fit the matrix: all that [`prepare`]
/// and [`Operator`] rely on. Forms without an operator, other than low-rank ones, always pass.
///
/// [`prepare`]: super::prepare
/// [`Operator`]: super::Operator
///
/// # Errors
/// The reason, as "expected …, found …".
pub(crate) fn check(form: &Form, matrix: Matrix) -> Result<(), String> {
    match form {
        Form::LowRank(form) => dora::check(form, matrix),
        Form::Tucker(form) => tucker::check(form, matrix),
        Form::Decomposed(form) => {
            check(&form.change, matrix)?;
            dora::check_decomposed(form, matrix)
        }
        Form::Hadamard(form) => hadamard::check(form, matrix),
        Form::Kronecker(form) => kronecker::check(form, matrix),
        Form::Gain(form) => gain::check(form, matrix),
        Form::Rotation(form) => rotation::check(form, matrix),
        Form::Tiled(form) => tiled::check(form, matrix),
        Form::Proportional(form) => proportional::check(form, matrix),
        Form::Reflections(form) => reflections::check(form, matrix),
        Form::Butterfly(form) => butterfly::check(form, matrix),
        Form::Sparse(form) => sparse::check(form, matrix),
        Form::Circulant(kernels) => circulant::check(kernels, matrix),
        Form::Bounded(form) => bounded::check(form, matrix),
        Form::Grid(form) => grid::check(form, matrix),
        Form::Added { tensor, .. } => added::check(tensor, matrix),
        _ => Ok(()),
    }
}
