//! Memory mapped for as long as somebody holds it: the ground rings stand on.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

#[derive(Debug)]
pub(crate) struct Mapping {
    base: NonNull<u8>, // page-aligned
    len: usize,
}

// SAFETY: the mapping is plain memory, owned until drop; who may touch which bytes is the ring's
// affair.
unsafe impl Send for Mapping {}
// SAFETY: as above; a shared reference only hands out the address.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Zeroed memory of this process.
    pub fn anonymous(len: usize) -> io::Result<Self> {
        Self::map(len, libc::MAP_ANONYMOUS, -1)
    }

    /// The first `len` bytes of a file that is at least as long, shared with whoever maps it too.
    pub fn of_file(file: &File, len: usize) -> io::Result<Self> {
        Self::map(len, 0, file.as_raw_fd())
    }

    fn map(len: usize, flags: libc::c_int, fd: libc::c_int) -> io::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = flags | libc::MAP_SHARED | libc::MAP_POPULATE;
        // SAFETY: a fresh mapping at an address of the kernel's choice overlaps nothing of ours.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, fd, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).expect("mmap without MAP_FIXED never maps page zero");
        Ok(Self { base, len })
    }

    pub fn base(&self) -> NonNull<u8> {
        self.base
    }

    pub fn len(&self) -> usize {
        self.len
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: base and len are what mmap returned, and nobody holds the mapping any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}
