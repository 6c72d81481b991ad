//! Low-rank adapters as data: the neutral model, our own file format, and the codecs of the
//! formats people have.
//!
//! ```text
//!   PEFT directory ──┐                              ┌── PEFT directory
//!                    ├─ codec ─▶ model::Adapter ─▶ codec ─┤
//!   our own file ────┘    (components: target, form)      └── our own file
//! ```
//!
//! Reading an adapter of any format:
//!
//! ```no_run
//! # fn main() -> Result<(), lora_format::Error> {
//! use lora_format::{ReadOptions, model::Form};
//!
//! let adapter = lora_format::read("adapter".as_ref(), &ReadOptions::default())?;
//! for component in &adapter.components {
//!     let Form::LowRank(factors) = &component.form else { continue };
//!     println!("{} rank {} scale {}", component.target.name(), factors.rank(), factors.scale());
//! }
//! # Ok(())
//! # }
//! ```
//!
//! The crate does no arithmetic and starts no threads. Inputs are untrusted: every length is
//! bounded ([`limits`]), every offset checked, nothing unknown is skipped, and malformed input is
//! an [`Error`] that says where.

mod blocks;
pub mod check;
pub mod checkpoint;
pub mod codec;
pub mod container;
mod dtype;
mod error;
mod factors;
pub mod fingerprint;
pub mod io;
pub mod json;
pub mod limits;
pub mod metadata;
pub mod model;
pub mod naming;
pub mod native;
pub mod pattern;
mod tensor;
pub mod vocabulary;

pub use codec::{ReadOptions, WriteOptions, Written, read};
pub use dtype::{Dtype, UnknownDtype};
pub use error::{
    AdapterProblem, BaseProblem, DetectProblem, Error, ExpansionLimit, ExpansionProblem,
    GgufProblem, HeaderProblem, IndexProblem, IoContext, Result, Shape, Unsupported,
};
pub use model::Adapter;
pub use tensor::{Tensor, map_all};
