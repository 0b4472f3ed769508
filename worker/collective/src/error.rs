//! What can go wrong between ranks. Each is fatal to the epoch, never to the process.
//!
//! `Clone`, because a failed mesh answers every later call with the first error.

use crate::{Kind, Tag};
use std::time::Duration;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error(
        "{kind} of step {} op {} waited {} ms for ranks {peers:?}; they stall, or the step \
         deadline is too short",
        tag.step, tag.op, waited.as_millis()
    )]
    Timeout { kind: Kind, tag: Tag, waited: Duration, peers: Vec<usize> },

    #[error("aborted: {reason}")]
    Aborted { reason: String },

    #[error("rank {peer} is lost: {detail}")]
    PeerLost { peer: usize, detail: String },

    #[error("rank {peer} sent {field} {got} where {expected} was due; the ranks are out of step")]
    Mismatch { field: &'static str, expected: u64, got: u64, peer: usize },

    #[error(
        "rank {peer} wants to send {bytes} bytes; the bound is {max}, in whole units of {unit}"
    )]
    BadLength { peer: usize, bytes: u64, max: usize, unit: usize },

    #[error("{bytes} bytes to send; max_message_bytes is {max}")]
    TooLong { bytes: usize, max: usize },

    #[error("rank {peer} at {address} refused us: {reason}")]
    Refused { peer: usize, address: String, reason: String },

    #[error(
        "epoch {epoch}: ranks {missing:?} were not connected after {} ms; last: {detail}",
        waited.as_millis()
    )]
    JoinTimeout { epoch: u64, waited: Duration, missing: Vec<usize>, detail: String },

    #[error("epoch {epoch} is over: epoch {newest} was asked for")]
    EpochOver { epoch: u64, newest: u64 },

    #[error("group: {what} is {got}; {allowed}")]
    BadGroup { what: &'static str, got: String, allowed: &'static str },

    #[error("transport shm was asked for, but rank {peer} and we share no memory: {detail}")]
    NoSharedMemory { peer: usize, detail: String },

    #[error("{what}: {detail}")]
    Os { what: &'static str, detail: String },
}

impl Error {
    pub(crate) fn os(what: &'static str, error: &std::io::Error) -> Self {
        Self::Os { what, detail: error.to_string() }
    }
}
