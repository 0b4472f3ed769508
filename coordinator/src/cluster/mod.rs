//! The cluster side: registry, membership, placement, and the supervisor that forms groups.
//!
//! It publishes a [`Directory`](crate::group::handle::Directory) and a status page; it knows no request and no HTTP.

pub mod embedded;
pub mod embedded_grpc;
pub mod membership;
pub mod placement;
pub mod records;
pub mod registry;
