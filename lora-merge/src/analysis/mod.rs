//! What a change of weights is made of, as plain data: section 7 of the LoRA paper (Hu et al., arXiv
//! 2106.09685) for adapters and for full fine-tunes.
//!
//! [`Spectra`] has the singular values of every changed matrix and where the energy of the change
//! lies (table 5: which weights should we pick). [`Comparison`] has how alike the directions of two
//! changes are (figures 3 and 4) and how they meet the weights they change (table 7).
//!
//! A change is an adapter, whose products of factors are decomposed in
//! f64 without forming them, or a [pair](crate::pair) of models, whose difference is decomposed where
//! it lies. What is neither, or not a matrix, is listed: as a change without directions, or as passed
//! over with the reason.
//!
//! | file         | owns                                                   |
//! |--------------|--------------------------------------------------------|
//! | `place`      | projection and depth, from a name                      |
//! | `product`    | s·B·A as a matrix, and its decomposition               |
//! | `weights`    | W0 by itself                                           |
//! | `adapter`    | the components of an adapter, by the parameter changed |
//! | `spectra`    | singular values, ranks, energy by kind and depth       |
//! | `comparison` | similarity of subspaces, amplification                 |

mod adapter;
mod comparison;
mod place;
mod product;
mod spectra;
mod weights;

pub use comparison::{
    Amplified, Comparison, ComparisonOptions, Mean, Side, Subject, TargetComparison, compare,
};
pub use place::{Place, places};
pub use product::{Directions, Product};
pub use spectra::{
    Group, OtherChange, Spectra, SpectrumOptions, TensorSpectrum, of_adapter, of_pair, work,
};
pub use weights::open as open_base;

use crate::engine::Progress;
use crate::error::Error;
use crate::similarity::SimilarityError;
use crate::svd::dense::NotConverged;

/// Why an analysis was given up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AnalysisError {
    /// A file could not be read, models do not fit, or the user stopped it.
    #[error(transparent)]
    Merge(#[from] Error),
    /// A decomposition failed.
    #[error("`{tensor}`: {source}")]
    NotConverged {
        /// Of what.
        tensor: String,
        /// How.
        source: NotConverged,
    },
    /// Directions could not be compared.
    #[error("`{tensor}`: {source}")]
    Similarity {
        /// Of what.
        tensor: String,
        /// How.
        source: SimilarityError,
    },
}

/// The result of an analysis.
pub type Result<T> = std::result::Result<T, AnalysisError>;

/// Something that was not analysed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PassedOver {
    /// Its name.
    pub name: String,
    /// Why.
    pub reason: String,
}

fn not_converged(tensor: &str) -> impl Fn(NotConverged) -> AnalysisError {
    move |source| AnalysisError::NotConverged { tensor: tensor.to_owned(), source }
}

/// Stops when the user asked for it.
fn go_on(progress: &Progress) -> Result<()> {
    if progress.is_cancelled() { Err(Error::Interrupted.into()) } else { Ok(()) }
}

/// Does work on so many threads, one per core for 0. No result depends on how many.
pub fn on_threads<T: Send>(threads: usize, work: impl FnOnce() -> T + Send) -> T {
    match rayon::ThreadPoolBuilder::new().num_threads(threads).build() {
        Ok(pool) => pool.install(work),
        Err(_) => work(),
    }
}
