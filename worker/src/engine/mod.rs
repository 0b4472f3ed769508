//! The loop of a rank, on its own OS thread: schedule, run, commit. No async from here down.
//!
//! The lead (rank 0) knows sequences, KV blocks and steps; a follower does what each plan says. Any
//! error ends the epoch: it is returned to the session, never repaired here.

pub mod answer;
pub mod ask;
pub mod batch;
mod chooser;
pub mod chosen;
mod draft_costs;
pub mod fairness;
pub mod follower;
pub mod grammar;
pub mod handle;
pub mod kv_blocks;
pub mod lead;
mod lookup;
mod lru;
mod masks;
pub mod names;
pub mod output;
mod pace;
mod penalties;
pub mod probe;
mod queue;
pub mod rank;
mod refusal;
pub mod row;
pub mod sampler;
pub mod scheduler;
pub mod sequence;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod simulation;
pub mod speculation;
pub mod step;
pub mod timeline;
mod traces;

pub use handle::{Handle, Outputs, Requests};
pub use lead::Lead;
pub use rank::Rank;

/// Why an epoch ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Backend(#[from] crate::backend::Error),
    #[error(transparent)]
    Collective(#[from] evener_collective::Error),
    #[error("the lead sent no step plan: {0}")]
    Plan(#[from] step::Error),
    #[error("the lead's step plan does not fit what came before: {0}")]
    Batch(#[from] batch::Error),
    #[error(transparent)]
    Row(#[from] row::Error),
    #[error("the lead's ask is none: {0}")]
    Ask(#[from] ask::Error),
    #[error(transparent)]
    Answer(#[from] answer::Nonsense),
    #[error("the thread that computes masks {what}")]
    Masks { what: &'static str },
    #[error("no token is allowed at position {position} of a sequence")]
    NothingAllowed { position: u32 },
    #[error("the lead sent {what} {got}; {expected} was due")]
    OutOfStep { what: &'static str, got: u64, expected: u64 },
    #[error("rank {rank} named token {got} of its {rows}")]
    Likeliest { rank: usize, got: u32, rows: usize },
    #[error("rank {rank} sent {got} numbers; {expected} were due")]
    Logits { rank: usize, got: usize, expected: usize },
}
