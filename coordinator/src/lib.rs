//! The coordinator knows text, requests and groups; never a tensor, never a model file.

pub mod cluster;
pub mod config;
pub mod group;
