//! How the ranks of a group meet: the contract `Collective`, its options, errors and figures.
//!
//! `Mesh` is the one implementation: algorithms written once over a link to each peer (`local`,
//! `shm` or `tcp`). The engine thread calls it; nothing here is async, and no wait is without a
//! deadline.

mod abort;
mod bytes;
mod connect;
mod error;
mod exchange;
mod header;
mod hello;
mod history;
pub mod latency;
mod link;
mod mesh;
mod payload;
mod poll;
mod reduce;
mod rendezvous;
mod tree;

use std::time::Duration;

pub use abort::AbortHandle;
pub use connect::{GroupSpec, Peer, Transport};
pub use error::Error;
pub use header::Kind;
pub use history::Record;
pub use mesh::Mesh;
pub use rendezvous::Rendezvous;
pub use tree::{ReducePlan, SumTree};

#[cfg(target_endian = "big")]
compile_error!("the wire carries little-endian numbers as they lie in memory");

/// The most ranks a group may have.
pub const MAX_WORLD_SIZE: usize = 64;

/// Names one operation: all ranks call the same operations with the same tags in the same order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tag {
    pub step: u64,
    pub op: u32,
}

/// What the ranks of one epoch do together.
///
/// Every operation has a deadline. After any error every later operation fails with that first
/// error, and the links are closed so that the peers fail promptly too. Buffers of the wrong size
/// are a bug of the caller and panic.
pub trait Collective: Send {
    fn rank(&self) -> usize;
    fn world_size(&self) -> usize;
    fn epoch(&self) -> u64;

    /// Sum over canonical chunks, in the order the plan fixes: the same bits on every rank,
    /// whatever the split. `parts`: `[plan.n_parts(rank)][out.len()]`, f32; `out` is overwritten.
    fn all_reduce(
        &mut self,
        tag: Tag,
        plan: &ReducePlan,
        parts: &[f32],
        out: &mut [f32],
    ) -> Result<(), Error>;

    /// Every rank's bytes, to every rank. `out` gets one entry a rank; sizes may differ, none may
    /// pass `Options::max_message_bytes`.
    fn all_gather(&mut self, tag: Tag, mine: &[u8], out: &mut Vec<Vec<u8>>) -> Result<(), Error>;

    /// Every rank's numbers, to the root only. The root's `out` has one entry a rank, each but its
    /// own resized to what that rank sent; `out` of the others is left alone and may be empty.
    fn gather(
        &mut self,
        tag: Tag,
        root: usize,
        mine: &[f32],
        out: &mut [Vec<f32>],
    ) -> Result<(), Error>;

    /// The root's bytes, to all. A follower waits up to `wait` for it to begin, parked, so an idle
    /// group may wait long; once begun the step deadline holds. The root does not look at `wait`.
    fn broadcast(
        &mut self,
        tag: Tag,
        root: usize,
        bytes: &mut Vec<u8>,
        wait: Duration,
    ) -> Result<(), Error>;

    /// Returns once every rank has called it.
    fn barrier(&mut self, tag: Tag) -> Result<(), Error>;

    /// Looks, without waiting, whether a peer is lost or the group aborted. For a lead that is idle
    /// and so runs no operation in which it would notice.
    fn check(&mut self) -> Result<(), Error>;

    /// The deadline of later operations: longer while ranks still load, then the step's.
    fn set_step_timeout(&mut self, timeout: Duration);

    /// How long an operation that begins now may take.
    fn step_timeout(&self) -> Duration;

    fn abort_handle(&self) -> AbortHandle;

    /// "self", "local", "shm" or "tcp", by peer rank.
    fn links(&self) -> Vec<&'static str>;

    /// The last 4096 operations, oldest first: for the log after an abort.
    fn history(&self) -> Vec<Record>;

    /// What happened since the last call.
    fn take_stats(&mut self) -> Stats;
}

/// How a mesh behaves. All ranks of a group use the same `two_shot_bytes`.
#[derive(Clone, Debug)]
pub struct Options {
    /// Deadline of every operation.
    pub step_timeout: Duration,
    /// Deadline for all peers to be connected.
    pub join_timeout: Duration,
    /// Whether a wait begins by spinning; false where ranks outnumber cores.
    pub spin: bool,
    /// An all-reduce in which a rank would send more than this is done in two shots (world size >
    /// 2).
    pub two_shot_bytes: usize,
    /// Bound on what one rank may send where the receiver cannot know the size beforehand.
    pub max_message_bytes: usize,
    /// Capacity of each direction of a local or shm link; rounded up to a power of two, at least 4
    /// KiB.
    pub ring_bytes: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            step_timeout: Duration::from_secs(10),
            join_timeout: Duration::from_secs(30),
            spin: true,
            two_shot_bytes: 64 << 10,
            max_message_bytes: 64 << 20,
            ring_bytes: 256 << 10,
        }
    }
}

impl Options {
    /// What `ring_bytes` comes to: between 4 KiB and 1 GiB.
    pub(crate) fn ring_capacity(&self) -> usize {
        self.ring_bytes.clamp(4 << 10, 1 << 30).next_power_of_two()
    }
}

/// Figures since the last `take_stats`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    pub n_ops: u64,
    /// With headers.
    pub bytes_sent: u64,
    pub bytes_received: u64,
    /// Time in operations: waiting, moving bytes, adding up.
    pub spent: Duration,
    /// Of that, time in which no byte moved because a peer was not there yet.
    pub waited: Duration,
    /// How often a wait was long enough to sleep.
    pub n_parks: u64,
}
