//! The model is data: a configuration and a split become a flat list of ops. No I/O, no tensors, no
//! threads.

pub mod config;
pub mod families;
pub mod program;
pub mod shard;
