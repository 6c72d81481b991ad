//! The algorithms, written once over [`Vector`](super::vector::Vector).
//!
//! They are the fast path and only that. Whatever they cannot vouch for (a
//! zero Δ, an infinity, a NaN, a rounding tie) they notice and hand to
//! [`scalar`](super::scalar), which is compiled here a second time under the
//! instruction set in use.

mod convert;
mod element;
mod epilogue;
mod merge;
mod product;
mod source;
mod squares;
pub(crate) mod sweep;

pub(crate) use convert::convert;
pub(crate) use element::{Bf16, Element, F16, F32};
pub(crate) use merge::{merge, product};
pub(crate) use source::{Difference, Place, Source, Stored, difference, pack};
pub(crate) use squares::{energy, residual_energy};

/// Calls `$function::<Base, Out>($arguments)` with the marker types of two
/// [`FloatType`](super::float::FloatType)s.
macro_rules! with_types {
    ($base:expr, $out:expr, $token:ident.$function:ident($($argument:expr),*)) => {{
        use $crate::kernels::float::FloatType;
        use $crate::kernels::generic::{Bf16, F16, F32};
        match ($base, $out) {
            (FloatType::F32, FloatType::F32) => $token.$function::<F32, F32>($($argument),*),
            (FloatType::F32, FloatType::F16) => $token.$function::<F32, F16>($($argument),*),
            (FloatType::F32, FloatType::Bf16) => $token.$function::<F32, Bf16>($($argument),*),
            (FloatType::F16, FloatType::F32) => $token.$function::<F16, F32>($($argument),*),
            (FloatType::F16, FloatType::F16) => $token.$function::<F16, F16>($($argument),*),
            (FloatType::F16, FloatType::Bf16) => $token.$function::<F16, Bf16>($($argument),*),
            (FloatType::Bf16, FloatType::F32) => $token.$function::<Bf16, F32>($($argument),*),
            (FloatType::Bf16, FloatType::F16) => $token.$function::<Bf16, F16>($($argument),*),
            (FloatType::Bf16, FloatType::Bf16) => $token.$function::<Bf16, Bf16>($($argument),*),
        }
    }};
}
pub(crate) use with_types;
