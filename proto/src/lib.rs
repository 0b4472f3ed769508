//! The contract between Evener's processes: generated messages, checked ids, registry keys.
//!
//! Nothing else is shared between coordinator and worker. Generated types stop at each crate's
//! border file.

pub mod activations;
pub mod ids;
pub mod keys;
pub mod kv_format;

pub use activations::Activations;
pub use kv_format::KvFormat;

/// Encoding and decoding of the messages below.
pub use prost::Message;

/// What a coordinator may ask of a worker (worker.proto).
#[allow(missing_docs, clippy::all)]
pub mod worker {
    tonic::include_proto!("evener.worker.v1");
}

/// What stands in the registry, and the embedded registry's service (registry.proto).
#[allow(missing_docs, clippy::all)]
pub mod registry {
    tonic::include_proto!("evener.registry.v1");
}

/// The part of etcd's v3 API that Evener speaks (etcd.proto).
#[allow(missing_docs, clippy::all)]
pub mod etcd {
    tonic::include_proto!("etcdserverpb");
}

/// Upper bound of one gRPC message, bytes. A large vocabulary's tokenizer.json is about 35 MB.
pub const MAX_MESSAGE_BYTES: usize = 96 << 20;
