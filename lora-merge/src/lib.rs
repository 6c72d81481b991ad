//! The arithmetic of low-rank adapters.

pub mod kernels;
