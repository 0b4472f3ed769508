//! A coordinator's options, each documented once, and the places a registry can be.

use std::net::SocketAddr;

use crate::cluster;

/// Everything a coordinator needs to know to run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where people reach the API.
    pub http_listen: SocketAddr,
    pub cluster: cluster::Options,
}

/// Which registry holds membership.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// Ours, in this process, offered to workers at `listen` (port 0: a free one).
    Embedded { listen: SocketAddr },
    /// The embedded registry of another coordinator: `embedded://HOST:PORT`.
    Remote { address: String },
}
