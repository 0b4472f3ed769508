//! The cluster side from outside: registries, registration, and the supervisor among scripted workers.
#![allow(clippy::unwrap_used)]

mod forming;
mod support;
mod worker;
