//! What a worker counts: written by the engine and the session without locks, read for load
//! reports.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Instant;

use crate::engine::output::Load;

/// Figures of one worker over all its epochs.
#[derive(Debug, Default)]
pub struct Figures {
    n_running: AtomicU32,
    n_waiting: AtomicU32,
    kv_blocks_free: AtomicU32,
    kv_blocks_cached: AtomicU32,
    kv_blocks_total: AtomicU32,
    tokens_total: AtomicU64,
    steps_total: AtomicU64,
    preemptions_total: AtomicU64,
    prompt_tokens_total: AtomicU64,
    cached_tokens_total: AtomicU64,
    drafted_total: AtomicU64,
    drafts_right_total: AtomicU64,
    resident_weight_bytes: AtomicU64,
    last_reading: Mutex<Option<Reading>>,
}

#[derive(Debug, Clone, Copy)]
struct Reading {
    at: Instant,
    tokens_total: u64,
    tokens_per_s: f64,
}

impl Figures {
    pub(crate) fn set_load(&self, load: Load) {
        let Load { n_running, n_waiting, kv_blocks_free, kv_blocks_cached, kv_blocks_total } = load;
        self.n_running.store(n_running, Ordering::Relaxed);
        self.n_waiting.store(n_waiting, Ordering::Relaxed);
        self.kv_blocks_free.store(kv_blocks_free, Ordering::Relaxed);
        self.kv_blocks_cached.store(kv_blocks_cached, Ordering::Relaxed);
        self.kv_blocks_total.store(kv_blocks_total, Ordering::Relaxed);
    }

    /// The lead finished a step that generated `n_tokens`.
    pub(crate) fn stepped(&self, n_tokens: u64) {
        self.tokens_total.fetch_add(n_tokens, Ordering::Relaxed);
        self.steps_total.fetch_add(1, Ordering::Relaxed);
    }

    /// The lead preempted `n` sequences.
    pub(crate) fn preempted(&self, n: u64) {
        self.preemptions_total.fetch_add(n, Ordering::Relaxed);
    }

    /// The lead began to answer a prompt of `n_tokens`, of which `n_cached` were not computed.
    pub(crate) fn looked_up(&self, n_tokens: usize, n_cached: usize) {
        self.prompt_tokens_total.fetch_add(n_tokens as u64, Ordering::Relaxed);
        self.cached_tokens_total.fetch_add(n_cached as u64, Ordering::Relaxed);
    }

    /// The lead verified `n_drafts`, of which `n_right` were right.
    pub(crate) fn speculated(&self, n_drafts: u64, n_right: u64) {
        self.drafted_total.fetch_add(n_drafts, Ordering::Relaxed);
        self.drafts_right_total.fetch_add(n_right, Ordering::Relaxed);
    }

    pub(crate) fn set_resident_weight_bytes(&self, bytes: u64) {
        self.resident_weight_bytes.store(bytes, Ordering::Relaxed);
    }

    #[must_use]
    pub fn load(&self) -> Load {
        Load {
            n_running: self.n_running.load(Ordering::Relaxed),
            n_waiting: self.n_waiting.load(Ordering::Relaxed),
            kv_blocks_free: self.kv_blocks_free.load(Ordering::Relaxed),
            kv_blocks_cached: self.kv_blocks_cached.load(Ordering::Relaxed),
            kv_blocks_total: self.kv_blocks_total.load(Ordering::Relaxed),
        }
    }

    /// Generated since the start; lead only.
    #[must_use]
    pub fn tokens_total(&self) -> u64 {
        self.tokens_total.load(Ordering::Relaxed)
    }

    #[must_use]
    pub fn steps_total(&self) -> u64 {
        self.steps_total.load(Ordering::Relaxed)
    }

    /// Sequences whose blocks were taken back while they ran; lead only.
    #[must_use]
    pub fn preemptions_total(&self) -> u64 {
        self.preemptions_total.load(Ordering::Relaxed)
    }

    /// Tokens of prompts that got a first token, and of those the ones found in the cache; lead
    /// only.
    #[must_use]
    pub fn prefix_tokens_total(&self) -> (u64, u64) {
        let load = |n: &AtomicU64| n.load(Ordering::Relaxed);
        (load(&self.prompt_tokens_total), load(&self.cached_tokens_total))
    }

    /// Tokens that were drafted and verified; lead only.
    #[must_use]
    pub fn drafted_total(&self) -> u64 {
        self.drafted_total.load(Ordering::Relaxed)
    }

    /// Those of them that were right.
    #[must_use]
    pub fn drafts_right_total(&self) -> u64 {
        self.drafts_right_total.load(Ordering::Relaxed)
    }

    /// Weights in memory, whether an epoch uses them or not.
    #[must_use]
    pub fn resident_weight_bytes(&self) -> u64 {
        self.resident_weight_bytes.load(Ordering::Relaxed)
    }

    /// Generated per second since the reading before this one. Readings less than half a second
    /// apart give the same answer: they would only measure noise.
    #[must_use]
    pub fn tokens_per_s(&self, now: Instant) -> f64 {
        let tokens_total = self.tokens_total();
        let mut last = self.last_reading.lock().unwrap_or_else(PoisonError::into_inner);
        let (elapsed_s, before) = match *last {
            Some(reading) => (now.saturating_duration_since(reading.at).as_secs_f64(), reading),
            None => {
                *last = Some(Reading { at: now, tokens_total, tokens_per_s: 0.0 });
                return 0.0;
            }
        };
        if elapsed_s < 0.5 {
            return before.tokens_per_s;
        }
        let tokens_per_s = (tokens_total - before.tokens_total) as f64 / elapsed_s;
        *last = Some(Reading { at: now, tokens_total, tokens_per_s });
        tokens_per_s
    }
}

/// Resident memory of this process, bytes; 0 where the system does not say.
#[must_use]
pub fn rss_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    kib_field(&status, "VmRSS:").unwrap_or(0)
}

/// Memory that the machine could still give, bytes; none where the system does not say.
#[must_use]
pub fn available_memory_bytes() -> Option<u64> {
    kib_field(&std::fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable:")
}

/// Memory of the machine, bytes; none where the system does not say.
#[must_use]
pub fn total_memory_bytes() -> Option<u64> {
    kib_field(&std::fs::read_to_string("/proc/meminfo").ok()?, "MemTotal:")
}

/// `Name:   123 kB` to bytes.
fn kib_field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn tokens_per_second_cover_the_time_between_readings() {
        let (figures, start) = (Figures::default(), Instant::now());
        assert_eq!(figures.tokens_per_s(start), 0.0);
        figures.stepped(30);
        assert_eq!(figures.tokens_per_s(start + Duration::from_secs(2)), 15.0);
        figures.stepped(99);
        assert_eq!(figures.tokens_per_s(start + Duration::from_millis(2100)), 15.0);
        assert_eq!(figures.tokens_per_s(start + Duration::from_secs(3)), 99.0);
        assert_eq!(figures.steps_total(), 2);
    }

    #[test]
    fn memory_is_read_in_bytes() {
        let text = "MemTotal:       100 kB\nMemAvailable:   7 kB\n";
        assert_eq!(kib_field(text, "MemAvailable:"), Some(7 * 1024));
        assert_eq!(kib_field(text, "VmRSS:"), None);
        assert!(rss_bytes() > 0 && available_memory_bytes().unwrap() > 0);
    }
}
