//! The bytes of a checkpoint file: mapped, so that a rank touches only the pages of its slices.
//!
//! The one mmap of Evener. Whoever reads these bytes checks every length first.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::io::Write;
use std::ops::Deref;
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::Path;
use std::ptr::NonNull;

/// A file's bytes, or bytes that a caller already holds.
#[derive(Debug)]
pub enum FileBytes {
    Mapped(memmap2::Mmap),
    Owned(Vec<u8>),
    Repeated(Repeated),
}

/// Bytes of which the same pages of memory are seen again and again.
#[derive(Debug)]
pub struct Repeated {
    at: NonNull<u8>,
    len: usize,
}

/// A run of [`Repeated`]: of a pattern, from `first` on, over and over. Runs begin on pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) pattern: usize,
    /// Whole pages.
    pub(super) first: usize,
    pub(super) len: usize,
}

const PAGE: usize = 4096;

impl FileBytes {
    /// Maps a file read-only.
    ///
    /// # Errors
    /// What the system says; a directory or an empty file is an error too.
    pub fn map(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::other("it is not a regular file"));
        }
        if metadata.len() == 0 {
            return Err(io::Error::other("the file is empty"));
        }
        map(&file).map(Self::Mapped)
    }

    /// A head of whole pages, then pieces of patterns of whole pages, as one run of bytes.
    ///
    /// # Errors
    /// No memory, or no address space.
    pub(super) fn repeated(
        head: &[u8],
        patterns: &[Vec<u8>],
        pieces: &[Piece],
    ) -> io::Result<Self> {
        Repeated::new(head, patterns, pieces).map(Self::Repeated)
    }
}

impl Repeated {
    fn new(head: &[u8], patterns: &[Vec<u8>], pieces: &[Piece]) -> io::Result<Self> {
        let mut file = memory_file()?;
        let mut starts = Vec::with_capacity(patterns.len());
        let mut end = 0;
        for part in std::iter::once(head).chain(patterns.iter().map(Vec::as_slice)) {
            assert!(part.len().is_multiple_of(PAGE), "{} bytes are not whole pages", part.len());
            file.write_all(part)?;
            starts.push(end);
            end += part.len();
        }
        let pages = |piece: &Piece| piece.len.next_multiple_of(PAGE);
        let len = head.len() + pieces.iter().map(pages).sum::<usize>();
        let whole = Self { at: reserve(len)?, len };
        let mut at = 0;
        whole.show(&file, &mut at, 0, head.len())?;
        for piece in pieces {
            let (pattern, mut first) = (&patterns[piece.pattern], piece.first);
            let mut left = pages(piece);
            while left > 0 {
                let run = left.min(pattern.len() - first);
                whole.show(&file, &mut at, starts[piece.pattern + 1] + first, run)?;
                (left, first) = (left - run, 0);
            }
        }
        Ok(whole)
    }

    /// Puts a run of the file's pages at `at`, and `at` behind it.
    fn show(&self, file: &File, at: &mut usize, from: usize, len: usize) -> io::Result<()> {
        assert!(at.is_multiple_of(PAGE) && *at + len <= self.len, "{len} bytes at {at}");
        let flags = libc::MAP_PRIVATE | libc::MAP_FIXED;
        let offset = libc::off_t::try_from(from).map_err(io::Error::other)?;
        // SAFETY: the range lies within this map's own reservation, which nobody reads yet; the
        // file is this function's caller's alone and nobody writes to it any more.
        let mapped = unsafe {
            let start = self.at.as_ptr().add(*at).cast();
            libc::mmap(start, len, libc::PROT_READ, flags, file.as_raw_fd(), offset)
        };
        *at += len;
        if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// A file that has no name and no disk.
fn memory_file() -> io::Result<File> {
    // SAFETY: the name is a C string that lives for the call.
    let fd = unsafe { libc::memfd_create(c"evener-synthetic".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and ours alone.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Address space that nothing else will use.
fn reserve(len: usize) -> io::Result<NonNull<u8>> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new map at an address of the system's choice touches nothing that exists.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_NONE, flags, -1, 0) };
    match NonNull::new(at.cast()) {
        Some(pointer) if at != libc::MAP_FAILED => Ok(pointer),
        _ => Err(io::Error::last_os_error()),
    }
}

impl Drop for Repeated {
    fn drop(&mut self) {
        // SAFETY: the whole range is this value's own, and no borrow of it can be left.
        unsafe { libc::munmap(self.at.as_ptr().cast(), self.len) };
    }
}

// SAFETY: the bytes are only read, until the one owner drops them.
unsafe impl Send for Repeated {}
// SAFETY: as above.
unsafe impl Sync for Repeated {}

fn map(file: &File) -> io::Result<memmap2::Mmap> {
    // SAFETY: the map is private to readers and never written through. The file must not shrink or
    // change while it is mapped, as with every program that maps its model: replace a checkpoint by
    // renaming a new file over it, which leaves this map on the old one.
    unsafe { memmap2::Mmap::map(file) }
}

impl Deref for FileBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Owned(bytes) => bytes,
            // SAFETY: every page from `at` on for `len` bytes was mapped readable by `new`, and no
            // one writes to them.
            Self::Repeated(whole) => unsafe {
                std::slice::from_raw_parts(whole.at.as_ptr(), whole.len)
            },
        }
    }
}
