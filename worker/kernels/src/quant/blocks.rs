//! What quantised formats have in common: weights `scale * (u - ZERO) + min`, u unsigned, with one
//! scale and one min for each run of 32 columns of a row.
//!
//! A format's file says how its blocks come apart into runs; packing, reading back and the dot
//! products are written once, in `tiles.rs`, `portable.rs` and `avx512.rs`.

use super::Format;

/// Weights of a run.
pub(crate) const RUN: usize = 32;

/// How scale and min of a run are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scales {
    /// `scale = d`, no min.
    Plain,
    /// `scale = d`, `min = m`.
    Min,
    /// `scale = d * sc`, `min = -(m * mc)`: f16 d and m of 256 columns, integers of each run.
    Super,
    /// No min; `scale = d * sc` in a run's first half and `d * mc` in its second: f16 d of 256
    /// columns, signed integers.
    Halves,
}

impl Scales {
    pub(crate) const fn has_min(self) -> bool {
        matches!(self, Self::Min | Self::Super)
    }

    /// Whether the runs of a super-block are summed as integers before they become floats: their
    /// integer scales are too many to do it run by run.
    pub(crate) const fn sums_integers(self) -> bool {
        matches!(self, Self::Halves)
    }

    /// Whether f16 scales are those of 256 columns.
    pub(crate) const fn is_super(self) -> bool {
        matches!(self, Self::Super | Self::Halves)
    }
}

/// A format of integers in blocks.
pub(crate) trait Blocks {
    const FORMAT: Format;
    /// Of u: 4, 5, 6 or 8.
    const BITS: usize;
    const ZERO: i32;
    const SCALES: Scales;

    /// The `i`-th run of a file's block.
    fn run(block: &[u8], i: usize) -> Run;
}

/// 32 weights of a row, taken apart four columns at a time.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Run {
    /// A row's share of a tile's vectors. Of 8 bits: word `2j + half` is u of columns `16 half + 4j`
    /// and the three after it. Of fewer: word j is the low four bits of columns `4j..`, with those
    /// of columns `16 + 4j..` above them. Of 6 bits: words 4 and 5 are the two top bits of vectors
    /// 0 to 3 and 4 to 7, lowest first. Other words are 0.
    pub(crate) words: [u32; 8],
    /// Bit k is column k's fifth.
    pub(crate) fifths: u32,
    /// f16 bits.
    pub(crate) d: u16,
    /// f16 bits; 0 where the format has no min.
    pub(crate) m: u16,
    /// Of [`Scales::Super`] and, as i8, of [`Scales::Halves`].
    pub(crate) sc: u8,
    pub(crate) mc: u8,
}

/// Little-endian f16 bits at `at`.
#[inline(always)]
pub(crate) fn half_at(block: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([block[at], block[at + 1]])
}

/// Four bytes at `at`, the first lowest.
#[inline(always)]
pub(crate) fn word_at(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

/// Words of sixteen bytes that hold run columns 0 to 15 low and 16 to 31 high.
#[inline(always)]
pub(crate) fn nibbles(bytes: &[u8]) -> [u32; 8] {
    let word = |j: usize| word_at(bytes, 4 * j);
    [word(0), word(1), word(2), word(3), 0, 0, 0, 0]
}
