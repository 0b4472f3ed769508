//! Zeroed memory for the KV cache: aligned to cache lines, in huge pages where the system gives
//! them, and not resident before it is touched.

use std::ptr::NonNull;

/// Owned bytes, zeroed at first.
#[derive(Debug)]
pub(super) struct Memory {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: it owns its bytes, like a Vec.
unsafe impl Send for Memory {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for Memory {}

impl Memory {
    /// # Panics
    /// If the system has no room for it.
    pub(super) fn zeroed(len: usize) -> Self {
        if len == 0 {
            return Self { start: NonNull::dangling(), len };
        }
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping of no file, anywhere.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, -1, 0) };
        assert!(start != libc::MAP_FAILED, "no memory for {len} bytes of KV cache");
        #[cfg(target_os = "linux")]
        // SAFETY: the mapping just made; advice changes no content, and may be declined.
        unsafe {
            libc::madvise(start, len, libc::MADV_HUGEPAGE);
        }
        Self { start: NonNull::new(start.cast()).expect("a mapping is not at 0"), len }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn as_ptr(&self) -> *const u8 {
        self.start.as_ptr()
    }

    /// For writing, which the caller must not do where another reads or writes.
    pub(super) fn as_mut_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: the mapping made in `zeroed`, whole, and nobody's any more.
            unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
        }
    }
}
