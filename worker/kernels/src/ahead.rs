//! What threads read after what they do now, brought near while they wait for each other.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Most bytes that are brought: a part of a second-level cache.
const MOST: usize = 256 << 10;
/// Bytes between two looks whether the wait is over: so few that nobody waits for them.
const AT_ONCE: usize = 512;
const LINE: usize = 64;

/// Where a thread is told what it reads next. Written by the pool's owner while no job runs, read by
/// the thread before it reports a job done.
#[derive(Debug, Default)]
pub(crate) struct Next {
    start: AtomicUsize,
    len: AtomicUsize,
}

/// How much of it a thread has not brought yet: addresses.
#[derive(Debug, Default)]
pub(crate) struct Ahead {
    told: usize,
    left: Range<usize>,
}

impl Next {
    pub(crate) fn tell(&self, bytes: &[u8]) {
        self.start.store(bytes.as_ptr().addr(), Ordering::Relaxed);
        self.len.store(bytes.len().min(MOST), Ordering::Relaxed);
    }
}

impl Ahead {
    /// Begins with what comes next, if that is something else than before.
    pub(crate) fn follow(&mut self, next: &Next) {
        let start = next.start.load(Ordering::Relaxed);
        if start != self.told {
            self.told = start;
            self.left = start..start + next.len.load(Ordering::Relaxed);
        }
    }

    /// Brings a little of what is left.
    #[inline]
    pub(crate) fn fetch(&mut self) {
        let end = self.left.end.min(self.left.start + AT_ONCE);
        (self.left.start..end).step_by(LINE).for_each(fetch);
        self.left.start = end;
    }
}

/// Begins to bring a line to the second-level cache.
#[inline(always)]
fn fetch(address: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        let line = std::ptr::without_provenance(address);
        // SAFETY: a prefetch reads nothing that a program could see, and may point anywhere.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_next_is_brought_once_and_no_more_than_a_cache_holds() {
        let bytes = vec![0; 2 * MOST];
        let (next, mut ahead) = (Next::default(), Ahead::default());
        ahead.follow(&next);
        ahead.fetch();
        for (bytes, expected) in [(&bytes[..700], 700), (&bytes[64..], MOST), (&bytes[..0], 0)] {
            next.tell(bytes);
            for turn in 0..2 {
                ahead.follow(&next);
                let mut brought = 0;
                while !ahead.left.is_empty() {
                    let before = ahead.left.len();
                    ahead.fetch();
                    brought += before - ahead.left.len();
                }
                assert_eq!(brought, if turn == 0 { expected } else { 0 });
                ahead.fetch();
            }
        }
    }
}
