//! The threads of one rank: they spin, then yield, then park. The caller is thread 0; a step pays
//! no system call while threads spin, and what they read next comes nearer meanwhile.

use std::cell::UnsafeCell;
use std::hint::spin_loop;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::ahead::{Ahead, Next};
use crate::cores;

/// A wait spins this long: longer than what lies between two jobs of a step, or two steps.
const SPIN: Duration = Duration::from_micros(200);
/// From its beginning on, it then yields the core this long before it parks: long enough for a
/// large all-reduce.
const YIELD: Duration = Duration::from_millis(4);
/// Looks between two looks at the clock.
const LOOKS: usize = 32;

/// Elements of a cheap op that are worth the other threads' while: below, one thread is done sooner
/// than all have met.
pub const WORTH_SHARING: usize = 4 << 10;

/// A fixed team of threads that run one closure at a time, together.
pub struct Pool {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
    /// The caller's.
    ahead: Ahead,
}

/// What the caller writes and what the helpers write lie two cache lines apart: processors fetch
/// lines in pairs.
#[repr(C, align(128))]
struct Line<T>(T);

struct Shared {
    /// Counts jobs; a change wakes the helpers.
    generation: Line<AtomicU64>,
    job: UnsafeCell<Option<Job>>,
    /// Helpers that have not finished the current job.
    running: Line<AtomicU32>,
    panicked: AtomicBool,
    stop: AtomicBool,
    spin: bool,
    sleepers: Mutex<()>,
    wake: Condvar,
    /// Helpers parked on `wake`.
    n_parked: AtomicU32,
    /// By thread, what it will read.
    next: Box<[Line<Next>]>,
}

type Job = *const (dyn Fn(usize) + Sync);

// SAFETY: `job` is written only by the pool's owner while no helper runs (running == 0), and read
// by helpers only between the generation's increment (Release) and their decrement of `running`.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer in `job` is only used during `Pool::run`.
unsafe impl Send for Shared {}

impl Pool {
    /// `n_threads` threads, the caller included. With `spin` false a wait yields the core from its
    /// beginning: for machines with fewer cores than threads.
    ///
    /// # Panics
    /// If a thread cannot be started.
    #[must_use]
    pub fn new(n_threads: usize, spin: bool) -> Self {
        Self::start(n_threads, spin, &[])
    }

    /// One thread a core, each pinned to its own but for the caller, who is thread 0 on `cores[0]`
    /// and pins itself. A core that the system refuses leaves its thread free.
    ///
    /// # Panics
    /// If a thread cannot be started.
    #[must_use]
    pub fn on_cores(cores: &[usize], spin: bool) -> Self {
        Self::start(cores.len(), spin, cores)
    }

    fn start(n_threads: usize, spin: bool, cores: &[usize]) -> Self {
        let shared = Arc::new(Shared {
            generation: Line(AtomicU64::new(0)),
            job: UnsafeCell::new(None),
            running: Line(AtomicU32::new(0)),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            spin,
            sleepers: Mutex::new(()),
            wake: Condvar::new(),
            n_parked: AtomicU32::new(0),
            next: (0..n_threads.max(1)).map(|_| Line(Next::default())).collect(),
        });
        let helpers = (1..n_threads.max(1))
            .map(|index| {
                let shared = Arc::clone(&shared);
                let core = cores.get(index).copied();
                std::thread::Builder::new()
                    .name(format!("kernel-{index}"))
                    .spawn(move || {
                        if let Some(core) = core {
                            let _ = cores::pin(&[core]);
                        }
                        shared.help(index);
                    })
                    .expect("the system refused a thread")
            })
            .collect();
        Self { shared, helpers, ahead: Ahead::default() }
    }

    /// Threads, the caller included.
    #[must_use]
    pub fn n_threads(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Says what each thread will read after what it is about to do, `bytes(thread, n_threads)`: from
    /// the end of the next job on its core brings that while it waits.
    pub fn read_next<'a>(&mut self, bytes: impl Fn(usize, usize) -> &'a [u8]) {
        let n_threads = self.n_threads();
        for (thread, next) in self.shared.next.iter().enumerate() {
            next.0.tell(bytes(thread, n_threads));
        }
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
        shared.running.0.store(self.helpers.len() as u32, Ordering::Relaxed);
        shared.generation.0.fetch_add(1, Ordering::SeqCst);
        if shared.n_parked.load(Ordering::SeqCst) > 0 {
            shared.wake_all();
        }
        let mine = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| job(0)));
        self.ahead.follow(&shared.next[0].0);
        // Never parks: a helper that lost its core gets it back by our yields.
        while !shared.watch(&mut self.ahead, || shared.running.0.load(Ordering::Acquire) == 0) {}
        if let Err(panic) = mine {
            std::panic::resume_unwind(panic);
        }
        assert!(!shared.panicked.swap(false, Ordering::Relaxed), "a kernel thread panicked");
    }

    /// Calls `job(row, its columns)` for every row of `out` (`[rows, columns]`): here, or shared by
    /// all threads if that is worth their while.
    ///
    /// # Panics
    /// If `job` panicked on any thread, or `out` is no whole rows.
    pub fn for_rows<T: Send>(
        &mut self,
        out: &mut [T],
        columns: usize,
        job: &(dyn Fn(usize, &mut [T]) + Sync),
    ) {
        if out.is_empty() {
            return;
        }
        assert!(out.len().is_multiple_of(columns), "{} is no whole rows of {columns}", out.len());
        let (n_rows, n_threads) = (out.len() / columns, self.n_threads());
        if n_threads == 1 || n_rows == 1 || out.len() < WORTH_SHARING {
            out.chunks_exact_mut(columns).enumerate().for_each(|(row, out)| job(row, out));
            return;
        }
        let out = Shards::new(out);
        self.run(&|thread| {
            let mine = part(n_rows, thread, n_threads);
            // SAFETY: `part` gives each thread its own rows.
            let out = unsafe { out.range(mine.start * columns..mine.end * columns) };
            mine.zip(out.chunks_exact_mut(columns)).for_each(|(row, out)| job(row, out));
        });
    }
}

impl Shared {
    fn help(&self, index: usize) {
        let (mut seen, mut ahead) = (0, Ahead::default());
        loop {
            seen = self.next_generation(seen, &mut ahead);
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
            ahead.follow(&self.next[index].0);
            self.running.0.fetch_sub(1, Ordering::Release);
        }
    }

    /// Spins, then yields, until `is_so`; false if it was not for as long as is worth it.
    fn watch(&self, ahead: &mut Ahead, is_so: impl Fn() -> bool) -> bool {
        let mut began = None;
        let mut yields = !self.spin;
        loop {
            for _ in 0..if yields { 1 } else { LOOKS } {
                if is_so() {
                    return true;
                }
                spin_loop();
                ahead.fetch();
            }
            let waited = began.get_or_insert_with(Instant::now).elapsed();
            if waited >= YIELD {
                return false;
            }
            yields |= waited >= SPIN;
            if yields {
                std::thread::yield_now();
            }
        }
    }

    fn next_generation(&self, seen: u64, ahead: &mut Ahead) -> u64 {
        if self.watch(ahead, || self.generation.0.load(Ordering::Acquire) != seen) {
            return self.generation.0.load(Ordering::Acquire);
        }
        let mut guard = self.sleepers.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        self.n_parked.fetch_add(1, Ordering::SeqCst);
        loop {
            let now = self.generation.0.load(Ordering::SeqCst);
            if now != seen {
                self.n_parked.fetch_sub(1, Ordering::SeqCst);
                return now;
            }
            guard = self.wake.wait(guard).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }

    fn wake_all(&self) {
        let _guard = self.sleepers.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        self.wake.notify_all();
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.generation.0.fetch_add(1, Ordering::SeqCst);
        self.shared.wake_all();
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
#[allow(clippy::unwrap_used)]
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

    #[test]
    fn threads_work_on_after_they_have_parked() {
        for spin in [true, false] {
            let mut pool = Pool::new(3, spin);
            let count = AtomicUsize::new(0);
            let job = |_| {
                count.fetch_add(1, Ordering::Relaxed);
            };
            for _ in 0..3 {
                pool.run(&job);
                let deadline = Instant::now() + Duration::from_secs(20);
                while pool.shared.n_parked.load(Ordering::SeqCst) < 2 {
                    assert!(Instant::now() < deadline, "idle helpers never parked");
                    std::thread::yield_now();
                }
            }
            assert_eq!(count.into_inner(), 9);
        }
    }

    #[test]
    fn each_helper_is_on_its_own_core() {
        let mut cores = cores::allowed();
        cores.truncate(4);
        let mut pool = Pool::on_cores(&cores, false);
        let seen: Vec<Mutex<Vec<usize>>> = cores.iter().map(|_| Mutex::default()).collect();
        pool.run(&|thread| *seen[thread].lock().unwrap() = cores::allowed());
        for (thread, seen) in seen.into_iter().enumerate().skip(1) {
            assert_eq!(seen.into_inner().unwrap(), [cores[thread]]);
        }
    }

    #[test]
    fn every_row_is_done_once_whoever_does_it() {
        for (n_threads, rows, columns) in [(1, 3, 5), (2, 3, 5), (2, 1, 9000), (3, 1000, 7)] {
            let mut pool = Pool::new(n_threads, false);
            let mut out = vec![0usize; rows * columns];
            pool.for_rows(&mut out, columns, &|row, out| {
                out.iter_mut().for_each(|value| *value += row + 1);
            });
            assert!(out.iter().enumerate().all(|(at, &value)| value == at / columns + 1));
            pool.for_rows(&mut [0usize; 0], columns, &|_, _| panic!("there is no row"));
        }
    }
}
