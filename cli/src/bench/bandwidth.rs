//! What this machine's memory can deliver: a plain read loop over more than any cache holds.

use std::hint::black_box;
use std::thread;
use std::time::{Duration, Instant};

/// Bytes each thread reads in one pass; beyond the second-level cache and, together, beyond most
/// third levels.
const BYTES_PER_THREAD: usize = 256 << 20;
const MIN_TIME: Duration = Duration::from_millis(600);

/// Bytes per second that `n_threads` read together from their own buffers.
pub fn read_bandwidth(n_threads: usize) -> f64 {
    let reader = || {
        // Written once, so that pages are real and not the kernel's one page of zeros.
        let buffer: Vec<u64> = (0..(BYTES_PER_THREAD / 8) as u64).collect();
        let (mut passes, start) = (0u32, Instant::now());
        while start.elapsed() < MIN_TIME || passes == 0 {
            black_box(sum(black_box(&buffer)));
            passes += 1;
        }
        f64::from(passes) * BYTES_PER_THREAD as f64 / start.elapsed().as_secs_f64()
    };
    thread::scope(|scope| {
        let readers: Vec<_> = (0..n_threads).map(|_| scope.spawn(reader)).collect();
        readers.into_iter().map(|r| r.join().expect("a reader only adds")).sum()
    })
}

/// Independent sums, so that loads and not additions are waited for.
fn sum(buffer: &[u64]) -> u64 {
    let mut lanes = [0u64; 32];
    for chunk in buffer.chunks_exact(lanes.len()) {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = lane.wrapping_add(*value);
        }
    }
    lanes.iter().fold(0, |total, lane| total.wrapping_add(*lane))
}
