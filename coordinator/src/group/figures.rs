//! What the workers of living groups last reported of their work, as numbers. The cluster side
//! publishes it, metrics read it; the status page is JSON of its own.

use std::sync::Arc;

use evener_proto::ids::{GroupId, ModelName};

/// One group that forms or serves.
#[derive(Debug, Clone, PartialEq)]
pub struct Group {
    pub id: GroupId,
    pub model: ModelName,
    pub is_ready: bool,
    /// None before its lead reported from this epoch.
    pub lead: Option<Lead>,
    /// Those that reported from this epoch.
    pub ranks: Vec<Rank>,
}

/// What only rank 0 knows. Totals are since its process started.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Lead {
    pub n_running: u32,
    pub n_waiting: u32,
    pub kv_blocks_total: u32,
    /// Cached ones included.
    pub kv_blocks_free: u32,
    pub kv_blocks_cached: u32,
    pub tokens_total: u64,
    pub preemptions_total: u64,
    /// Of prompts that got a first token.
    pub prompt_tokens_total: u64,
    pub cached_tokens_total: u64,
    /// Verified beside decodes, and those that were right.
    pub drafted_total: u64,
    pub drafts_right_total: u64,
    /// Of each sequence, from its arrival at the lead to its first step.
    pub queue: Option<Histogram>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Rank {
    pub rank: usize,
    pub resident_weight_bytes: u64,
    pub rss_bytes: u64,
    /// None from a worker that does not tell it.
    pub timeline: Option<Timeline>,
}

/// Where the time of a rank's steps went, since its epoch was ready.
#[derive(Debug, Clone, PartialEq)]
pub struct Timeline {
    pub idle: Histogram,
    pub step: Histogram,
    pub compute: Histogram,
    pub wait: Histogram,
    pub transfer: Histogram,
    pub tokens: u64,
    pub bytes_sent: u64,
    pub bytes_received: u64,
}

/// Of durations.
#[derive(Debug, Clone, PartialEq)]
pub struct Histogram {
    /// Upper bounds of all buckets but the last, seconds, rising.
    pub bounds_s: Arc<[f64]>,
    /// By bucket, each for itself; one more than bounds.
    pub counts: Vec<u64>,
    pub sum_s: f64,
}
