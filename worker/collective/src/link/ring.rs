//! A lock-free byte ring between one writer and one reader, over memory that two threads or two
//! processes share.
//!
//! `head` counts bytes ever written, `tail` bytes ever read; each side owns one counter and its
//! data. A side about to sleep raises its flag and looks again; the other side, having moved bytes,
//! lowers the flag it finds raised and rings the bell. Two sequentially consistent fences make sure
//! that one of the two sees the other. Nothing read from the memory is trusted: the peer may be a
//! broken process.

use super::mapping::Mapping;
use super::{Fault, State};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

/// Published in pieces, so that the reader works while the writer still copies.
const PIECE: usize = 16 << 10;

const WRITER_CLOSED: u32 = 1;
const READER_CLOSED: u32 = 2;

/// Two cache lines, because processors fetch them in pairs.
#[repr(C, align(128))]
struct Line<T>(T);

/// All zero is an empty ring.
#[repr(C)]
struct Control {
    head: Line<AtomicU64>,         // stored by the writer only
    tail: Line<AtomicU64>,         // stored by the reader only
    reader_waits: Line<AtomicU32>, // raised by the reader, lowered by either
    writer_waits: Line<AtomicU32>, // raised by the writer, lowered by either
    closed: Line<AtomicU32>,       // WRITER_CLOSED, READER_CLOSED
}

/// How many bytes of memory a ring takes. `capacity` is a power of two.
pub(crate) const fn region_bytes(capacity: usize) -> usize {
    size_of::<Control>() + capacity.next_multiple_of(align_of::<Control>())
}

/// What a push or pop came to.
pub(crate) struct Moved {
    pub n: usize,
    /// The peer sleeps for this: ring its bell.
    pub wake: bool,
}

/// The memory of one ring, kept mapped.
struct Region {
    control: NonNull<Control>,
    data: NonNull<u8>,
    capacity: usize,
    _mapping: Arc<Mapping>,
}

// SAFETY: the pointers are into the mapping that the region keeps alive, wherever it moves to.
unsafe impl Send for Region {}

impl Region {
    fn at(mapping: &Arc<Mapping>, offset: usize, capacity: usize) -> Self {
        assert!(capacity.is_power_of_two(), "capacity {capacity} is a power of two");
        assert!(offset.is_multiple_of(align_of::<Control>()), "offset {offset} is aligned");
        let end = offset.checked_add(region_bytes(capacity));
        assert!(end.is_some_and(|end| end <= mapping.len()), "the ring lies inside the mapping");
        // SAFETY: offset and the ring's whole length lie inside the mapping, as asserted.
        let base = unsafe { mapping.base().add(offset) };
        // SAFETY: the control block is the first part of the ring.
        let data = unsafe { base.add(size_of::<Control>()) };
        Self { control: base.cast(), data, capacity, _mapping: mapping.clone() }
    }

    fn control(&self) -> &Control {
        // SAFETY: aligned and inside the mapping (see `at`), made of atomics for which every bit
        // pattern is valid, and only ever accessed as atomics.
        unsafe { self.control.as_ref() }
    }

    fn closed(&self, flag: u32) -> bool {
        self.control().closed.0.load(Ordering::Acquire) & flag != 0
    }

    fn close(&self, flag: u32) {
        self.control().closed.0.fetch_or(flag, Ordering::SeqCst);
    }

    /// Bytes in the ring, if the counters make sense.
    fn filled(&self, head: u64, tail: u64) -> Result<usize, Fault> {
        let capacity = self.capacity as u64;
        let filled = head.wrapping_sub(tail);
        if filled > capacity {
            Err(Fault::Corrupt { head, tail, capacity })
        } else {
            Ok(filled as usize)
        }
    }

    /// Where byte number `count` lies, and how many follow it before the ring wraps.
    fn place(&self, count: u64) -> (NonNull<u8>, usize) {
        let at = count as usize & (self.capacity - 1);
        // SAFETY: `at` is less than the capacity.
        (unsafe { self.data.add(at) }, self.capacity - at)
    }

    /// Whether the other side sleeps and is to be woken, now that we have moved bytes.
    fn should_wake(&self, flag: &AtomicU32) -> bool {
        fence(Ordering::SeqCst);
        flag.load(Ordering::Relaxed) != 0 && flag.swap(0, Ordering::Relaxed) != 0
    }
}

pub(crate) struct Writer {
    region: Region,
    head: u64,
    tail_seen: u64,
}

impl Writer {
    /// On zeroed memory, or memory whose ring is still empty and new.
    pub fn at(mapping: &Arc<Mapping>, offset: usize, capacity: usize) -> Self {
        Self { region: Region::at(mapping, offset, capacity), head: 0, tail_seen: 0 }
    }

    pub fn push(&mut self, first: &[u8], second: &[u8]) -> Result<Moved, Fault> {
        if self.region.closed(READER_CLOSED) {
            return Err(Fault::Closed);
        }
        let n = self.copy_in(first)?;
        let n = if n == first.len() { n + self.copy_in(second)? } else { n };
        if n == 0 {
            return Ok(Moved { n, wake: false });
        }
        self.publish();
        Ok(Moved { n, wake: self.region.should_wake(&self.region.control().reader_waits.0) })
    }

    /// Published later, but for whole pieces.
    fn copy_in(&mut self, bytes: &[u8]) -> Result<usize, Fault> {
        let mut done = 0;
        while done < bytes.len() {
            let rest = &bytes[done..];
            let mut free = self.region.capacity - self.region.filled(self.head, self.tail_seen)?;
            if free < rest.len() {
                free = self.free()?;
            }
            let (to, until_wrap) = self.region.place(self.head);
            let n = rest.len().min(free).min(until_wrap).min(PIECE);
            if n == 0 {
                break;
            }
            // SAFETY: n bytes from `to` lie before the wrap, and are free: the reader has read them
            // and does not look at them until `head` says so. The source is memory of our own.
            unsafe { std::ptr::copy_nonoverlapping(rest.as_ptr(), to.as_ptr(), n) };
            self.head += n as u64;
            done += n;
            if n == PIECE {
                self.publish();
            }
        }
        Ok(done)
    }

    fn publish(&self) {
        self.region.control().head.0.store(self.head, Ordering::Release);
    }

    fn free(&mut self) -> Result<usize, Fault> {
        self.tail_seen = self.region.control().tail.0.load(Ordering::Acquire);
        Ok(self.region.capacity - self.region.filled(self.head, self.tail_seen)?)
    }

    /// Announces sleep. True if there is room already, or nobody to wait for.
    pub fn arm(&mut self) -> bool {
        self.region.control().writer_waits.0.store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.region.closed(READER_CLOSED) || self.free().map_or(true, |free| free > 0)
    }

    pub fn disarm(&mut self) {
        self.region.control().writer_waits.0.store(0, Ordering::Relaxed);
    }

    pub fn close(&self) {
        self.region.close(WRITER_CLOSED);
    }
}

pub(crate) struct Reader {
    region: Region,
    tail: u64,
    head_seen: u64,
}

impl Reader {
    /// On zeroed memory, or memory whose ring nobody has read from.
    pub fn at(mapping: &Arc<Mapping>, offset: usize, capacity: usize) -> Self {
        Self { region: Region::at(mapping, offset, capacity), tail: 0, head_seen: 0 }
    }

    pub fn pop(&mut self, first: &mut [u8], second: &mut [u8]) -> Result<Moved, Fault> {
        let n = self.copy_out(first)?;
        let n = if n == first.len() { n + self.copy_out(second)? } else { n };
        if n == 0 {
            // Closed before the last look at `head`: nothing can have come in between.
            if self.region.closed(WRITER_CLOSED) && self.filled()? == 0 {
                return Err(Fault::Closed);
            }
            return Ok(Moved { n, wake: false });
        }
        self.publish();
        Ok(Moved { n, wake: self.region.should_wake(&self.region.control().writer_waits.0) })
    }

    fn copy_out(&mut self, bytes: &mut [u8]) -> Result<usize, Fault> {
        let mut done = 0;
        while done < bytes.len() {
            let rest = &mut bytes[done..];
            let mut filled = self.region.filled(self.head_seen, self.tail)?;
            if filled < rest.len() {
                filled = self.filled()?;
            }
            let (from, until_wrap) = self.region.place(self.tail);
            let n = rest.len().min(filled).min(until_wrap).min(PIECE);
            if n == 0 {
                break;
            }
            // SAFETY: n bytes from `from` lie before the wrap and were written before `head` was
            // stored; the writer leaves them alone until `tail` says so. The target is memory of
            // our own.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), rest.as_mut_ptr(), n) };
            self.tail += n as u64;
            done += n;
            if n == PIECE {
                self.publish();
            }
        }
        Ok(done)
    }

    fn publish(&self) {
        self.region.control().tail.0.store(self.tail, Ordering::Release);
    }

    fn filled(&mut self) -> Result<usize, Fault> {
        self.head_seen = self.region.control().head.0.load(Ordering::Acquire);
        self.region.filled(self.head_seen, self.tail)
    }

    /// Announces sleep. True if bytes are there already, or nobody to wait for.
    pub fn arm(&mut self) -> bool {
        self.region.control().reader_waits.0.store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.region.closed(WRITER_CLOSED) || self.filled().map_or(true, |filled| filled > 0)
    }

    pub fn disarm(&mut self) {
        self.region.control().reader_waits.0.store(0, Ordering::Relaxed);
    }

    /// A ring with broken counters counts as closed.
    pub fn state(&mut self) -> State {
        let is_closed = self.region.closed(WRITER_CLOSED);
        match self.filled() {
            Ok(filled) => State { is_closed, has_bytes: filled > 0 },
            Err(_) => State { is_closed: true, has_bytes: false },
        }
    }

    pub fn close(&self) {
        self.region.close(READER_CLOSED);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};
    use std::thread;

    fn ring(capacity: usize) -> (Writer, Reader) {
        let mapping = Arc::new(Mapping::anonymous(region_bytes(capacity)).unwrap());
        (Writer::at(&mapping, 0, capacity), Reader::at(&mapping, 0, capacity))
    }

    #[test]
    fn bytes_arrive_in_order_through_any_capacity() {
        let seed: u64 = rand::random();
        println!("seed {seed}");
        for capacity in [1, 8, 4096, 65536] {
            let n_bytes = 40_000 + 10 * capacity;
            let (mut writer, mut reader) = ring(capacity);
            let sender = thread::spawn(move || {
                let mut rng = StdRng::seed_from_u64(seed);
                let mut sent = 0;
                while sent < n_bytes {
                    let n = rng.random_range(1..=n_bytes - sent).min(3 * capacity);
                    let bytes: Vec<u8> =
                        (sent..sent + n).map(|i| (i * 7 + i / 251) as u8).collect();
                    let (first, second) = bytes.split_at(rng.random_range(0..=n));
                    sent += writer.push(first, second).unwrap().n;
                    thread::yield_now();
                }
                writer.close();
            });
            let mut rng = StdRng::seed_from_u64(!seed);
            let mut got = Vec::new();
            loop {
                let mut first = vec![0; rng.random_range(1..=2 * capacity)];
                let mut second = vec![0; rng.random_range(0..=capacity)];
                match reader.pop(&mut first, &mut second) {
                    Ok(Moved { n, .. }) => {
                        first.extend(second);
                        got.extend_from_slice(&first[..n]);
                    }
                    Err(Fault::Closed) => break,
                    Err(other) => panic!("{other}"),
                }
                thread::yield_now();
            }
            sender.join().unwrap();
            assert_eq!(got.len(), n_bytes);
            assert!((0..n_bytes).all(|i| got[i] == (i * 7 + i / 251) as u8), "capacity {capacity}");
        }
    }

    #[test]
    fn a_sleeper_is_woken_once_and_never_forgotten() {
        let (mut writer, mut reader) = ring(8);
        assert!(!writer.push(b"ab", b"").unwrap().wake, "nobody sleeps");
        assert!(reader.arm(), "bytes are there");
        reader.disarm();
        let mut into = [0; 8];
        assert_eq!(reader.pop(&mut into, &mut []).unwrap().n, 2);
        assert!(!reader.arm(), "empty");
        assert!(writer.push(b"c", b"").unwrap().wake);
        assert!(!writer.push(b"defghij", b"k").unwrap().wake, "already woken");
        assert!(!writer.arm(), "full");
        assert!(reader.pop(&mut into[..1], &mut []).unwrap().wake);
        assert!(writer.arm(), "room");
    }

    #[test]
    fn counters_that_make_no_sense_are_an_error() {
        let (writer, mut reader) = ring(8);
        writer.region.control().head.0.store(9, Ordering::Release);
        let fault = reader.pop(&mut [0; 4], &mut []);
        assert!(matches!(fault, Err(Fault::Corrupt { head: 9, tail: 0, capacity: 8 })));
    }

    #[test]
    fn either_side_sees_the_other_close() {
        let (mut writer, mut reader) = ring(8);
        writer.push(b"xy", b"").unwrap();
        writer.close();
        assert_eq!(reader.pop(&mut [0; 4], &mut []).unwrap().n, 2, "what was sent still arrives");
        assert!(matches!(reader.pop(&mut [0; 4], &mut []), Err(Fault::Closed)));
        reader.close();
        assert!(matches!(writer.push(b"z", b""), Err(Fault::Closed)));
    }
}
