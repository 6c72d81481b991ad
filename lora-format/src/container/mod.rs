//! Raw containers: bytes ⇄ named tensors, for adapters and base models alike.

pub mod safetensors;
