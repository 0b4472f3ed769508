//! Where the time of a rank's steps goes: counted by its own thread, read by others for reports.
//!
//! One writer, the engine thread, which neither allocates nor locks here and pays under a
//! microsecond a step (`examples/timeline_cost.rs`). It judges nothing: who waits for whom is for
//! those to say who see all ranks.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Upper bounds of all buckets but the last, which has none; microseconds.
pub const BOUNDS_US: [u64; 18] = [
    10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000,
    500_000, 1_000_000, 2_500_000, 10_000_000,
];
const N_BUCKETS: usize = BOUNDS_US.len() + 1;

/// What counts as recent.
const WINDOW: Duration = Duration::from_secs(30);
/// Readings closer together than this give the window no new point.
const MIN_GAP: Duration = Duration::from_millis(500);

/// One step of one rank.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Step {
    /// From the end of the step before.
    pub idle: Duration,
    /// From the plan to the end. On the lead the choice of tokens is a part of it.
    pub whole: Duration,
    /// In the collective: no byte moved, for a peer was not there yet.
    pub waited: Duration,
    /// In the collective, without waiting: bytes moved, and sums were made of them.
    pub transfer: Duration,
    pub bytes_sent: u64,
    pub bytes_received: u64,
    pub n_tokens: u64,
}

impl Step {
    /// Everything outside the collective.
    #[must_use]
    pub fn compute(&self) -> Duration {
        self.whole.saturating_sub(self.waited + self.transfer)
    }
}

/// Figures of one rank in one epoch.
#[derive(Debug, Default)]
pub struct Timeline {
    idle: Histogram,
    whole: Histogram,
    compute: Histogram,
    waited: Histogram,
    transfer: Histogram,
    /// Lead only: of each sequence, from its arrival to its first step.
    queued: Histogram,
    n_tokens: AtomicU64,
    bytes_sent: AtomicU64,
    bytes_received: AtomicU64,
    /// What readers saw, oldest first. The engine never touches it.
    seen: Mutex<VecDeque<(Instant, Totals)>>,
}

/// How often a duration fell into each bucket. One writer.
#[derive(Debug, Default)]
struct Histogram {
    counts: [AtomicU64; N_BUCKETS],
    sum_ns: AtomicU64,
}

/// A histogram as it was read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counted {
    /// By bucket, each for itself.
    pub counts: [u64; N_BUCKETS],
    pub sum_ns: u64,
}

/// Sums over steps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    pub n_steps: u64,
    pub idle_ns: u64,
    pub whole_ns: u64,
    pub compute_ns: u64,
    pub waited_ns: u64,
    pub transfer_ns: u64,
}

/// All of it at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reading {
    pub idle: Counted,
    pub whole: Counted,
    pub compute: Counted,
    pub waited: Counted,
    pub transfer: Counted,
    pub queued: Counted,
    pub n_tokens: u64,
    pub bytes_sent: u64,
    pub bytes_received: u64,
    /// Of the last half minute, as far as there were readings.
    pub recent: Totals,
    pub recent_span: Duration,
}

impl Timeline {
    /// Only the rank's own thread calls it.
    pub fn step(&self, step: &Step) {
        self.idle.observe(step.idle);
        self.whole.observe(step.whole);
        self.compute.observe(step.compute());
        self.waited.observe(step.waited);
        self.transfer.observe(step.transfer);
        add(&self.n_tokens, step.n_tokens);
        add(&self.bytes_sent, step.bytes_sent);
        add(&self.bytes_received, step.bytes_received);
    }

    /// A sequence came to its first step. Only the lead's own thread calls it.
    pub fn queued(&self, waited: Duration) {
        self.queued.observe(waited);
    }

    /// Reads all, and notes it for later readings of what is recent. Callers come about once a
    /// second.
    #[must_use]
    pub fn read(&self, now: Instant) -> Reading {
        let load = |n: &AtomicU64| n.load(Ordering::Relaxed);
        let mut reading = Reading {
            idle: self.idle.read(),
            whole: self.whole.read(),
            compute: self.compute.read(),
            waited: self.waited.read(),
            transfer: self.transfer.read(),
            queued: self.queued.read(),
            n_tokens: load(&self.n_tokens),
            bytes_sent: load(&self.bytes_sent),
            bytes_received: load(&self.bytes_received),
            ..Reading::default()
        };
        let totals = reading.totals();
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.back().is_none_or(|(at, _)| now.saturating_duration_since(*at) >= MIN_GAP) {
            seen.push_back((now, totals));
        }
        while seen.len() > 1 && now.saturating_duration_since(seen[0].0) > WINDOW {
            seen.pop_front();
        }
        if let Some((since, before)) = seen.front() {
            reading.recent = totals.since(before);
            reading.recent_span = now.saturating_duration_since(*since);
        }
        reading
    }
}

impl Reading {
    fn totals(&self) -> Totals {
        Totals {
            n_steps: self.whole.counts.iter().sum(),
            idle_ns: self.idle.sum_ns,
            whole_ns: self.whole.sum_ns,
            compute_ns: self.compute.sum_ns,
            waited_ns: self.waited.sum_ns,
            transfer_ns: self.transfer.sum_ns,
        }
    }
}

impl Totals {
    fn since(&self, before: &Self) -> Self {
        Self {
            n_steps: self.n_steps.saturating_sub(before.n_steps),
            idle_ns: self.idle_ns.saturating_sub(before.idle_ns),
            whole_ns: self.whole_ns.saturating_sub(before.whole_ns),
            compute_ns: self.compute_ns.saturating_sub(before.compute_ns),
            waited_ns: self.waited_ns.saturating_sub(before.waited_ns),
            transfer_ns: self.transfer_ns.saturating_sub(before.transfer_ns),
        }
    }
}

impl Histogram {
    fn observe(&self, duration: Duration) {
        let ns = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        let us = ns.div_ceil(1000); // a bound belongs to its bucket
        let bucket = BOUNDS_US.iter().position(|&bound| us <= bound).unwrap_or(N_BUCKETS - 1);
        add(&self.counts[bucket], 1);
        add(&self.sum_ns, ns);
    }

    fn read(&self) -> Counted {
        Counted {
            counts: std::array::from_fn(|at| self.counts[at].load(Ordering::Relaxed)),
            sum_ns: self.sum_ns.load(Ordering::Relaxed),
        }
    }
}

/// With one writer no locked instruction is needed.
fn add(total: &AtomicU64, n: u64) {
    total.store(total.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn step() -> Step {
        Step {
            idle: ms(1),
            whole: ms(10),
            waited: ms(3),
            transfer: ms(2),
            bytes_sent: 100,
            bytes_received: 200,
            n_tokens: 4,
        }
    }

    #[test]
    fn a_duration_falls_into_the_bucket_of_the_first_bound_that_is_not_less() {
        let check = |duration: Duration, expect: usize| {
            let histogram = Histogram::default();
            histogram.observe(duration);
            let counted = histogram.read();
            let at = counted.counts.iter().position(|&n| n == 1);
            assert_eq!(at, Some(expect), "{duration:?}");
            assert_eq!(counted.sum_ns, duration.as_nanos() as u64);
        };
        check(Duration::ZERO, 0);
        check(Duration::from_micros(10), 0);
        check(Duration::from_nanos(10_001), 1);
        check(ms(1), 6);
        check(Duration::from_secs(10), N_BUCKETS - 2);
        check(Duration::from_secs(3600), N_BUCKETS - 1);
    }

    #[test]
    fn compute_waiting_and_transfer_are_the_whole_step() {
        let timeline = Timeline::default();
        (0..3).for_each(|_| timeline.step(&step()));
        timeline.queued(ms(7));
        let reading = timeline.read(Instant::now());
        let Reading { whole, compute, waited, transfer, .. } = reading;
        assert_eq!(whole.sum_ns, 30_000_000);
        assert_eq!(compute.sum_ns + waited.sum_ns + transfer.sum_ns, whole.sum_ns);
        assert_eq!((reading.n_tokens, reading.bytes_sent, reading.bytes_received), (12, 300, 600));
        assert_eq!(reading.queued.counts.iter().sum::<u64>(), 1);
    }

    #[test]
    fn recent_is_what_came_within_the_window_before_a_reading() {
        let (timeline, start) = (Timeline::default(), Instant::now());
        assert_eq!(timeline.read(start).recent, Totals::default());
        for second in 1..=100 {
            timeline.step(&step());
            let reading = timeline.read(start + Duration::from_secs(second));
            assert_eq!(reading.recent.n_steps, second.min(WINDOW.as_secs()));
            assert_eq!(reading.recent.waited_ns, 3_000_000 * reading.recent.n_steps);
            assert_eq!(reading.recent_span.as_secs(), second.min(WINDOW.as_secs()));
        }
        let later = timeline.read(start + Duration::from_secs(200));
        assert_eq!(later.recent.n_steps, 0, "a group that rests has no recent steps");
        let seen = timeline.seen.lock().map(|seen| seen.len());
        assert!(seen.is_ok_and(|n| n <= 1 + (WINDOW.as_millis() / MIN_GAP.as_millis()) as usize));
    }
}
