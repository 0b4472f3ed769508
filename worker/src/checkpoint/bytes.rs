//! The bytes of a checkpoint file: mapped, so that a rank touches only the pages of its slices.
//!
//! The one mmap of Evener. Whoever reads these bytes checks every length first.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::path::Path;

/// A file's bytes, or bytes that a caller already holds.
#[derive(Debug)]
pub enum FileBytes {
    Mapped(memmap2::Mmap),
    Owned(Vec<u8>),
}

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
}

#[allow(unsafe_code)]
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
        }
    }
}
