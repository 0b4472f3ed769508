//! Reads little-endian numbers and strings out of bytes that may lie. No length is believed before
//! it is compared with the bytes left, and nothing is allocated by a length.

use std::ops::Range;

use super::fault::Fault;

/// A place in the file's bytes.
#[derive(Debug, Clone)]
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Offset of the next byte; after a fault, of the item that could not be read.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    pub(super) fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// The range of the next `n` bytes, which exist.
    pub(super) fn take(&mut self, n: u64) -> Result<Range<usize>, Fault> {
        let left = self.left();
        match usize::try_from(n) {
            Ok(n) if n <= left => {
                let range = self.at..self.at + n;
                self.at = range.end;
                Ok(range)
            }
            _ => Err(Fault::Truncated { needed: n, left: left as u64 }),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        let range = self.take(N as u64)?;
        let mut array = [0; N];
        array.copy_from_slice(&self.bytes[range]);
        Ok(array)
    }

    pub(super) fn magic(&mut self) -> Result<[u8; 4], Fault> {
        self.array()
    }

    pub(super) fn u8(&mut self) -> Result<u8, Fault> {
        self.array().map(u8::from_le_bytes)
    }

    pub(super) fn u16(&mut self) -> Result<u16, Fault> {
        self.array().map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Fault> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Fault> {
        self.array().map(u64::from_le_bytes)
    }

    /// A count of items that take at least `min_bytes` each.
    pub(super) fn count(&mut self, min_bytes: u64) -> Result<u64, Fault> {
        let start = self.at;
        let count = self.u64()?;
        let fits = self.left() as u64 / min_bytes;
        if count > fits {
            self.at = start;
            return Err(Fault::TooMany { count, fits });
        }
        Ok(count)
    }

    /// Where a string's bytes are; they are UTF-8.
    pub(super) fn string(&mut self, max_bytes: u64) -> Result<Range<usize>, Fault> {
        let start = self.at;
        let range = self.u64().and_then(|len| {
            if len > max_bytes {
                return Err(Fault::LongString { len, max: max_bytes });
            }
            self.take(len)
        });
        let range = range.inspect_err(|_| self.at = start)?;
        if std::str::from_utf8(&self.bytes[range.clone()]).is_err() {
            self.at = start;
            return Err(Fault::NotUtf8);
        }
        Ok(range)
    }
}
