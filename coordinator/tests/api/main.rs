//! The HTTP API from outside: a real server, real sockets, and leads that speak gRPC by a script.
#![allow(clippy::unwrap_used)]

mod generate;
mod lead;
mod tiny;
mod world;
