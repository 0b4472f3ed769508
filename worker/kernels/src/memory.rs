//! Large memory: anonymous pages, huge ones where the system gives them, so that a stream through
//! weights does not wait for address translation.
//!
//! Pages come zeroed, when they are first touched, on the node of the thread that touches them.

use std::io;
use std::ops::{Deref, DerefMut, Range};
use std::sync::Arc;

/// Of a huge page on x86-64, and on aarch64 with pages of 4 KiB.
const HUGE: usize = 2 << 20;

/// Zeroed bytes in pages of their own.
#[derive(Debug)]
pub struct Memory {
    mapping: *mut libc::c_void,
    mapped: usize,
    /// Where in the mapping its bytes begin: there is room before them to align them.
    before: usize,
    len: usize,
}

// SAFETY: it owns its pages, and they are reached by the borrows of the `Memory` only.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// `len` bytes that begin on a cache line; from 2 MiB on, on a huge page. None is occupied
    /// before it is touched.
    ///
    /// # Errors
    /// What the system says.
    pub fn zeroed(len: usize) -> io::Result<Self> {
        let alignment = if len < HUGE { 1 } else { HUGE };
        let mapped = len.max(1).checked_add(alignment - 1);
        let mapped = mapped.ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        // SAFETY: a new private mapping concerns no memory of anybody.
        let mapping = unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            libc::mmap(std::ptr::null_mut(), mapped, protection, flags, -1, 0)
        };
        if mapping == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let before = mapping.addr().next_multiple_of(alignment) - mapping.addr();
        if alignment == HUGE {
            // SAFETY: advice about pages of ours, inside the mapping. Where it is refused, pages
            // are small.
            unsafe { libc::madvise(mapping.add(before), len, libc::MADV_HUGEPAGE) };
        }
        Ok(Self { mapping, mapped, before, len })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: `zeroed` mapped it, and no borrow of it is left.
        unsafe { libc::munmap(self.mapping, self.mapped) };
    }
}

impl Deref for Memory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `before + len` bytes are mapped, readable and initialised.
        unsafe { std::slice::from_raw_parts(self.mapping.cast::<u8>().add(self.before), self.len) }
    }
}

impl DerefMut for Memory {
    fn deref_mut(&mut self) -> &mut [u8] {
        let start = self.mapping.cast::<u8>();
        // SAFETY: as above, writable, and the borrow is unique.
        unsafe { std::slice::from_raw_parts_mut(start.add(self.before), self.len) }
    }
}

/// Asks for huge pages under what is not touched yet of a slice that has some to itself. It is
/// advice: a smaller slice, or a system that does not have them, goes without.
pub fn prefer_huge<T>(slice: &[T]) {
    let bytes = slice.as_ptr_range();
    let start = bytes.start.addr().next_multiple_of(HUGE);
    let end = bytes.end.addr() / HUGE * HUGE;
    if start < end {
        let from_start = start - bytes.start.addr();
        let address = slice.as_ptr().cast::<u8>().wrapping_add(from_start).cast_mut();
        // SAFETY: whole pages of the slice, whose content the advice leaves as it is.
        unsafe { libc::madvise(address.cast(), end - start, libc::MADV_HUGEPAGE) };
    }
}

/// A run of bytes in memory that several share.
#[derive(Debug, Clone)]
pub(crate) struct Stretch {
    memory: Arc<Memory>,
    range: Range<usize>,
}

impl Stretch {
    /// # Panics
    /// If the memory does not have these bytes.
    pub(crate) fn new(memory: Arc<Memory>, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= memory.len(), "{range:?} of memory");
        Self { memory, range }
    }
}

impl Deref for Stretch {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        &self.memory[self.range.clone()]
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_zeroed_aligned_and_its_own() {
        for len in [0, 1, 4096, HUGE - 1, HUGE, 3 * HUGE + 5] {
            let mut memory = Memory::zeroed(len).unwrap();
            assert_eq!(memory.len(), len);
            assert!(memory.iter().all(|&byte| byte == 0));
            let alignment = if len < HUGE { 64 } else { HUGE };
            assert!(memory.as_ptr().addr().is_multiple_of(alignment), "{len}");
            let mut other = Memory::zeroed(len).unwrap();
            memory.fill(1);
            other.fill(2);
            assert!(memory.iter().all(|&byte| byte == 1));
        }
    }

    #[test]
    fn advice_leaves_memory_as_it_is() {
        for len in [0, 3, HUGE, 5 * HUGE / 8] {
            let mut slice: Vec<u64> = (0..len as u64).collect();
            prefer_huge(&slice);
            slice.push(len as u64);
            assert!(slice.iter().zip(0..).all(|(&value, at)| value == at));
        }
    }

    #[test]
    fn memory_that_no_machine_has_is_refused() {
        Memory::zeroed(usize::MAX).unwrap_err();
        Memory::zeroed(1 << 62).unwrap_err();
    }
}
