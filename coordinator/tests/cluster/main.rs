//! The cluster side from outside: registries, registration, and the supervisor among scripted
//! workers.
#![allow(clippy::unwrap_used)]

mod forming;
mod rig;
mod suite;
mod support;
mod worker;
