//! Which module of which architecture a name in a diffusion adapter means, and how another
//! format spells it. Strings and shapes only; no tensor is read.
//!
//! - A [`Catalogue`] is the list of an architecture's [`Module`]s, generated from its block
//!   structure, each under its name in diffusers or transformers and its parameter in the original
//!   single-file checkpoint. One side may be rows of the other: diffusers' `attn.to_q` of Flux.1
//!   is the first 3072 rows of `img_attn.qkv.weight`.
//! - A [`Naming`] is how a format spells modules. [`Catalogue::names`] is the dictionary of one
//!   naming: spelled name → [`Resolved`], the rows of which modules it means.
//! - [`Catalogue::spell`] and [`Catalogue::pieces`] go back, into any naming.
//! - [`Catalogue::of_base`] recognises a base by its own parameters, and [`Linked::pieces`] gives
//!   the rows of the base's parameters that a resolved name means. For a base of no architecture
//!   listed here, [`BaseNames`] knows the spellings that follow from its own names.
//! - [`detect`] lists which architectures and namings fit an adapter's names.
//!
//! ```
//! use lora_format::naming::{Architecture, Catalogue, Naming};
//!
//! let catalogue = Catalogue::of(Architecture::Flux1);
//! let kohya = catalogue.names(Naming::Kohya);
//! let fused = kohya.resolve("lora_unet_double_blocks_0_img_attn_qkv")?;
//! let split = catalogue.pieces(&fused, Naming::Diffusers).unwrap();
//! assert_eq!(split[1].name, "transformer.transformer_blocks.0.attn.to_k");
//! assert_eq!((split[1].from, split[1].rows), (3072, 3072));
//! # Ok::<(), lora_format::naming::NamingProblem>(())
//! ```
//!
//! '.' → '_' is not injective, and formats share spellings. What a name means is therefore looked
//! up among all that the architecture has, and two meanings are an error, not a choice. A name that
//! nobody listed is unknown; it is never guessed.
//!
//! The lists are checked against diffusers' models and its conversions of checkpoints
//! (`scripts/check_naming.py`).

mod base;
mod catalogue;
mod component;
mod detection;
mod module;
mod problem;
mod spelling;
mod text;
mod transformer;
mod unet;

#[cfg(test)]
mod tests;

pub use base::{BaseNames, BasePiece, Layout, Linked};
pub use catalogue::{Architecture, Catalogue, Names, Piece, Resolved, SpelledPiece};
pub use component::Component;
pub use detection::{Detection, Observed, detect};
pub use module::{Module, Part, Run};
pub use problem::NamingProblem;
pub use spelling::{Naming, Side};
