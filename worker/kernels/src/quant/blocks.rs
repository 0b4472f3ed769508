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
}

/// A format of integers in blocks.
pub(crate) trait Blocks {
    const FORMAT: Format;
    /// Of u: 4, 5 or 8.
    const BITS: usize;
    const ZERO: i32;
    const SCALES: Scales;

    /// The `i`-th run of a file's block.
    fn run(block: &[u8], i: usize) -> Run;
}

/// 32 weights of a row, taken apart.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Run {
    pub(crate) u: [u8; RUN],
    /// f16 bits.
    pub(crate) d: u16,
    /// f16 bits; 0 where the format has no min.
    pub(crate) m: u16,
    /// 1 where scales are not [`Scales::Super`].
    pub(crate) sc: u8,
    pub(crate) mc: u8,
}

/// Little-endian f16 bits at `at`.
pub(crate) fn half_at(block: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([block[at], block[at + 1]])
}

/// Sixteen bytes that hold run columns 0 to 15 low and 16 to 31 high.
pub(crate) fn nibbles(bytes: &[u8]) -> [u8; RUN] {
    std::array::from_fn(|k| if k < 16 { bytes[k] & 15 } else { bytes[k - 16] >> 4 })
}

/// Adds the k-th bit of four bytes to the k-th weight, as its fifth bit.
pub(crate) fn with_fifth_bits(u: [u8; RUN], bits: &[u8]) -> [u8; RUN] {
    std::array::from_fn(|k| u[k] | ((bits[k / 8] >> (k % 8)) & 1) << 4)
}
