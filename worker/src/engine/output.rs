//! What a lead tells a stream: one message per step, for all of the stream's sequences.

use std::time::Duration;

use super::scheduler::Refusal;
use super::sequence::Finish;

/// What one step did to the sequences of one stream.
#[derive(Debug, Clone, PartialEq)]
pub struct StepOutput {
    pub events: Vec<Event>,
    pub load: Load,
}

/// What one step did to one sequence, or one of the tokens that it brought: those of one sequence
/// stand one after the other. After `end` no event names it again.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    pub request_id: u64,
    pub token: Option<TokenOut>,
    /// Positions 1.. of the prompt, if asked for; in order, over one or more events.
    pub prompt_tokens: Vec<TokenOut>,
    /// With the first token: how many tokens of the prompt were in the cache.
    pub n_cached: u32,
    pub end: Option<End>,
    /// With an end that is a finish: since the sequence arrived.
    pub lead_time: Option<Duration>,
}

impl Event {
    /// Of a sequence that ends without a token.
    #[must_use]
    pub fn ended(request_id: u64, end: End) -> Self {
        let prompt_tokens = Vec::new();
        let (end, lead_time) = (Some(end), None);
        Self { request_id, token: None, prompt_tokens, n_cached: 0, end, lead_time }
    }
}

/// How a sequence ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    Finished(Finish),
    Refused(Refusal),
    /// Its grammar cannot go on.
    Failed {
        reason: String,
    },
}

/// A token, and its log-probability if asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenOut {
    pub id: u32,
    /// Natural, of the unmodified distribution.
    pub logprob: Option<f32>,
    /// The likeliest, best first.
    pub top: Vec<(u32, f32)>,
}

/// How busy a group is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Load {
    pub n_running: u32,
    pub n_waiting: u32,
    /// Cached ones included.
    pub kv_blocks_free: u32,
    pub kv_blocks_cached: u32,
    pub kv_blocks_total: u32,
}

/// Why a stream gets no more outputs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StreamEnd {
    #[error("the epoch ended: {reason}")]
    EpochOver { reason: String },
    #[error("{n_outputs} outputs were not read in time; the stream's sequences were cancelled")]
    Slow { n_outputs: usize },
    #[error("request id {request_id} is in use on this stream")]
    RequestIdInUse { request_id: u64 },
}
