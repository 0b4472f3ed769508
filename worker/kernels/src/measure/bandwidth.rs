//! What memory delivers to readers: loops over more than caches hold, on huge pages. Plain ones, and
//! ones that fetch ahead, which some processors need to reach what their memory has; the faster way
//! counts.

use std::hint::black_box;
use std::time::Instant;

use super::Rate;
use crate::isa::{Isa, dispatch};
use crate::pool::{Pool, part};

/// Bytes that all threads read together in one pass: beyond the last-level caches of today.
const BUFFER_BYTES: usize = 1 << 30;
const N_PASSES: usize = 9;
/// Of a look at what memory gives at the moment.
const N_BRIEF: usize = 2;
/// How far ahead is fetched, in bytes: as linear ops do.
const AHEAD: usize = 6144;
/// Bytes of a huge page.
const HUGE: usize = 2 << 20;

/// Memory to read from, on huge pages where the system has some.
pub struct Buffer {
    words: Vec<u64>,
    /// First word on a huge page.
    first: usize,
}

impl Buffer {
    /// # Panics
    /// If there is no memory for it.
    #[must_use]
    pub fn new() -> Self {
        let n = (BUFFER_BYTES + HUGE) / 8;
        let mut words: Vec<u64> = Vec::with_capacity(n);
        let first = words.as_ptr().align_offset(HUGE).min(HUGE / 8);
        #[cfg(target_os = "linux")]
        // SAFETY: the range lies within the vector's own allocation; advice changes no contents.
        // Refused advice costs speed, not correctness.
        unsafe {
            let start = words.as_mut_ptr().add(first).cast();
            libc::madvise(start, BUFFER_BYTES, libc::MADV_HUGEPAGE);
        }
        // Written once, so that pages are real and not the kernel's one page of zeros.
        words.extend(0..n as u64);
        Self { words, first }
    }

    /// Reads everything once, each thread its part.
    pub fn read(&self, pool: &mut Pool, isa: Isa) {
        self.read_by(pool, isa, sum::<false>);
    }

    fn read_by(&self, pool: &mut Pool, isa: Isa, sum: fn(Isa, &[u64]) -> u64) {
        let words = &self.words[self.first..self.first + BUFFER_BYTES / 8];
        let n_threads = pool.n_threads();
        pool.run(&|thread| {
            // Whole pages, so that threads share no line.
            let pages = part(BUFFER_BYTES / HUGE, thread, n_threads);
            let own = &words[pages.start * HUGE / 8..pages.end * HUGE / 8];
            black_box(sum(isa, black_box(own)));
        });
    }
}

impl Default for Buffer {
    fn default() -> Self {
        Self::new()
    }
}

/// Bytes per second that `n_threads` read together.
#[must_use]
pub fn read(buffer: &Buffer, n_threads: usize) -> Rate {
    passes(buffer, n_threads, N_PASSES)
}

/// The same at this moment, in a tenth of a second or so: memory that is shared gives now more and now
/// less, for minutes.
#[must_use]
pub fn read_now(buffer: &Buffer, n_threads: usize) -> f64 {
    passes(buffer, n_threads, N_BRIEF).best
}

fn passes(buffer: &Buffer, n_threads: usize, n: usize) -> Rate {
    let (mut pool, isa) = (Pool::new(n_threads, true), Isa::detect());
    buffer.read(&mut pool, isa);
    let mut pass = |sum| {
        let start = Instant::now();
        buffer.read_by(&mut pool, isa, sum);
        BUFFER_BYTES as f64 / start.elapsed().as_secs_f64()
    };
    // In turn, so that both meet the same neighbours.
    let passes = (0..n).map(|_| (pass(sum::<false>), pass(sum::<true>)));
    let (plain, fetching): (Vec<f64>, Vec<f64>) = passes.unzip();
    let (plain, fetching) = (Rate::of(plain), Rate::of(fetching));
    if fetching.median > plain.median { fetching } else { plain }
}

/// Independent sums, so that loads and not additions are waited for.
fn sum<const FETCHES: bool>(isa: Isa, words: &[u64]) -> u64 {
    let mut total = [0u64; 64];
    let into = &mut total;
    let ahead = if FETCHES { AHEAD } else { 0 };
    dispatch!(isa, fn(words: &[u64], ahead: usize, into: &mut [u64; 64]) => {
        let mut lanes = [0u64; 64];
        for chunk in words.as_chunks::<64>().0 {
            if ahead > 0 {
                fetch(chunk.as_ptr().wrapping_byte_add(ahead));
            }
            for (lane, value) in lanes.iter_mut().zip(chunk) {
                *lane = lane.wrapping_add(*value);
            }
        }
        *into = lanes;
    });
    total.iter().fold(0, |total, lane| total.wrapping_add(*lane))
}

/// Brings 512 bytes past the outer caches into the nearest; any address will do.
#[inline(always)]
fn fetch(at: *const u64) {
    #[cfg(target_arch = "x86_64")]
    for line in 0..8 {
        use std::arch::x86_64::{_MM_HINT_NTA, _mm_prefetch};
        // SAFETY: a prefetch reads nothing that a program could see.
        unsafe { _mm_prefetch::<_MM_HINT_NTA>(at.wrapping_byte_add(64 * line).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}
