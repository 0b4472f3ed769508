//! The HTTP API from outside: a real server, real sockets, and leads that speak gRPC by a script.
#![allow(clippy::unwrap_used)]

mod bad_input;
mod generate;
mod lead;
mod loss;
mod service;
mod tiny;
mod world;
