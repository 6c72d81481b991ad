//! The arithmetic of low-rank adapters: merging `W' = W0 + s·B·A` into a base model of any size in
//! constant memory.
//!
//! ```text
//!  Checkpoint ─┐                                                   ┌─▶ output files
//!              ├─▶ MergePlan ─▶ OutputLayout ─▶ engine: tiles ─▶ kernels
//!  Adapter ────┘   (resolve,     (files, offsets)                  └─▶ MergeReport
//!                   orientation)
//! ```
//!
//! Everything that can be wrong is found while planning, before a byte is written: every tensor of
//! the adapter has its parameter in the base, shapes fit, the base is the right one. The numerics
//! contract is stated in [`kernels`].

pub mod analysis;
pub mod assets;
pub mod budget;
pub mod combine;
mod copies;
pub mod engine;
mod error;
pub mod experts;
pub mod extract;
pub mod factored;
mod fit;
pub mod identity;
pub mod kernels;
pub mod layout;
mod loralib;
pub mod low_rank;
pub mod names;
pub mod noise;
mod numbers;
mod operator;
pub mod orientation;
pub mod output;
pub mod pair;
pub mod parameters;
mod place;
pub mod plan;
pub mod quantised;
pub mod rank;
pub mod report;
pub mod resize;
pub mod resolve;
mod schedule;
pub mod similarity;
pub mod spectrum;
mod spelled;
pub mod svd;
pub mod tied;
pub mod verify;

pub use error::{Bytes, Error, PlanProblem, Result, ShapeCause};
pub use plan::{MergeOptions, MergePlan, PlannedTarget, WeightedAdapter};
pub use tied::Tied;
