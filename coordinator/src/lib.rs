//! The coordinator knows text, requests and groups; never a tensor, never a model file.

pub mod cluster;
pub mod config;
pub mod generation;
pub mod group;
pub mod http;
pub mod metrics;
pub mod router;
pub mod run;
pub mod text;
