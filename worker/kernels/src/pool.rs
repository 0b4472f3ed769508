//! The threads of one rank: spin, then park. The caller is thread 0; a step pays no system call
//! while threads spin.

use std::cell::UnsafeCell;
use std::hint::spin_loop;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

/// Spins before a waiting thread parks: about 50 us.
const SPINS: u32 = 20_000;

/// A fixed team of threads that run one closure at a time, together.
pub struct Pool {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
}

struct Shared {
    /// Counts jobs; a change wakes the helpers.
    generation: AtomicU64,
    job: UnsafeCell<Option<Job>>,
    /// Helpers that have not finished the current job.
    running: AtomicU32,
    panicked: AtomicBool,
    stop: AtomicBool,
    spin: bool,
    sleepers: Mutex<()>,
    wake: Condvar,
    /// Helpers parked on `wake`.
    n_parked: AtomicU32,
}

type Job = *const (dyn Fn(usize) + Sync);

// SAFETY: `job` is written only by the pool's owner while no helper runs (running == 0), and read
// by helpers only between the generation's increment (Release) and their decrement of `running`.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer in `job` is only used during `Pool::run`.
unsafe impl Send for Shared {}

impl Pool {
    /// `n_threads` threads, the caller included. With `spin` false helpers park at once and the
    /// caller yields: for machines with fewer cores than threads.
    ///
    /// # Panics
    /// If a thread cannot be started.
    #[must_use]
    pub fn new(n_threads: usize, spin: bool) -> Self {
        let shared = Arc::new(Shared {
            generation: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            running: AtomicU32::new(0),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            spin,
            sleepers: Mutex::new(()),
            wake: Condvar::new(),
            n_parked: AtomicU32::new(0),
        });
        let helpers = (1..n_threads.max(1))
            .map(|index| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new()
                    .name(format!("kernel-{index}"))
                    .spawn(move || shared.help(index))
                    .expect("the system refused a thread")
            })
            .collect();
        Self { shared, helpers }
    }

    /// Threads, the caller included.
    #[must_use]
    pub fn n_threads(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Runs `job(thread)` on every thread and returns when all are done.
    ///
    /// # Panics
    /// If `job` panicked on any thread.
    pub fn run(&mut self, job: &(dyn Fn(usize) + Sync)) {
        if self.helpers.is_empty() {
            job(0);
            return;
        }
        let shared = &*self.shared;
        // SAFETY: `&mut self` means no other run is under way, so no helper reads `job` now. The
        // lifetime is erased, but this function does not return (or unwind) before every helper has
        // finished.
        unsafe {
            *shared.job.get() = Some(std::mem::transmute::<&(dyn Fn(usize) + Sync), Job>(job));
        }
        shared.running.store(self.helpers.len() as u32, Ordering::Relaxed);
        shared.generation.fetch_add(1, Ordering::SeqCst);
        if shared.n_parked.load(Ordering::SeqCst) > 0 {
            let _guard = shared.sleepers.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            shared.wake.notify_all();
        }
        let mine = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| job(0)));
        while shared.running.load(Ordering::Acquire) > 0 {
            if shared.spin { spin_loop() } else { std::thread::yield_now() }
        }
        if let Err(panic) = mine {
            std::panic::resume_unwind(panic);
        }
        assert!(!shared.panicked.swap(false, Ordering::Relaxed), "a kernel thread panicked");
    }
}

impl Shared {
    fn help(&self, index: usize) {
        let mut seen = 0;
        loop {
            seen = self.next_generation(seen);
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            // SAFETY: the generation changed, so `job` was written before (Release/Acquire) and
            // stays valid until `running` reaches 0.
            let job = unsafe { (*self.job.get()).expect("a generation has a job") };
            let ran = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                // SAFETY: as above; the closure outlives `Pool::run`.
                unsafe { (*job)(index) }
            }));
            if ran.is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
            self.running.fetch_sub(1, Ordering::Release);
        }
    }

    fn next_generation(&self, seen: u64) -> u64 {
        for _ in 0..if self.spin { SPINS } else { 1 } {
            let now = self.generation.load(Ordering::Acquire);
            if now != seen {
                return now;
            }
            spin_loop();
        }
        let mut guard = self.sleepers.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        self.n_parked.fetch_add(1, Ordering::SeqCst);
        loop {
            let now = self.generation.load(Ordering::SeqCst);
            if now != seen {
                self.n_parked.fetch_sub(1, Ordering::SeqCst);
                return now;
            }
            guard = self.wake.wait(guard).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.generation.fetch_add(1, Ordering::SeqCst);
        {
            let _guard =
                self.shared.sleepers.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            self.shared.wake.notify_all();
        }
        for helper in self.helpers.drain(..) {
            // A helper catches its job's panics, so joining cannot fail in a way worth reporting.
            let _ = helper.join();
        }
    }
}

/// The part of `0..n` that `thread` of `n_threads` owns; parts differ by at most one.
#[must_use]
pub fn part(n: usize, thread: usize, n_threads: usize) -> std::ops::Range<usize> {
    n * thread / n_threads..n * (thread + 1) / n_threads
}

/// A slice that threads write disjoint parts of.
#[derive(Clone, Copy)]
pub(crate) struct Shards<'a, T> {
    pointer: *mut T,
    len: usize,
    marker: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: access goes through `range`, whose callers promise disjoint ranges.
unsafe impl<T: Send> Sync for Shards<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Shards<'_, T> {}

impl<'a, T> Shards<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { pointer: slice.as_mut_ptr(), len: slice.len(), marker: std::marker::PhantomData }
    }

    /// # Safety
    /// No two living results overlap.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn range(&self, range: std::ops::Range<usize>) -> &'a mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {}", self.len);
        // SAFETY: in bounds by the assertion, unique by the caller's promise, and alive for 'a.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.add(range.start), range.len()) }
    }

    /// # Safety
    /// As for [`Self::range`].
    pub(crate) unsafe fn set(&self, at: usize, value: T) {
        assert!(at < self.len, "{at} of {}", self.len);
        // SAFETY: in bounds by the assertion, nobody else's by the caller's promise.
        unsafe { *self.pointer.add(at) = value };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    #[test]
    fn every_thread_runs_every_job_once() {
        for (n_threads, spin) in [(1, true), (2, true), (2, false), (5, false)] {
            let mut pool = Pool::new(n_threads, spin);
            let counts: Vec<_> = (0..n_threads).map(|_| AtomicUsize::new(0)).collect();
            for _ in 0..500 {
                pool.run(&|thread| {
                    counts[thread].fetch_add(1, Ordering::Relaxed);
                });
            }
            assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 500));
        }
    }

    #[test]
    fn a_panic_on_a_helper_reaches_the_caller_and_the_pool_lives_on() {
        let mut pool = Pool::new(2, false);
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pool.run(&|thread| assert_ne!(thread, 1, "as the test wants"));
        }));
        assert!(result.is_err());
        pool.run(&|_| ());
    }
}
