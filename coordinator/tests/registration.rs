//! The worker's side of the registry, on every registry: leases, records, load reports, the way back after a loss.
//!
//! Coordinator and worker may not know each other, so the worker's file is compiled in here by its path.
#![allow(clippy::unwrap_used)]

#[path = "../../worker/src/registration.rs"]
mod registration;

#[test]
fn compiles() {}
