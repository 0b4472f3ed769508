//! Q4_K: blocks of 256, `w = d * sc * u - dmin * mc` with 6-bit sc and mc of each run of 32. In a
//! file: f16 d, f16 dmin, 12 bytes of packed sc and mc, 128 bytes: each 32 of them hold one run low
//! and the next high.

use super::Format;
use super::blocks::{Blocks, Run, Scales, half_at, word_at};

/// The low nibble of each of four bytes.
const LOW: u32 = 0x0f0f_0f0f;

pub(crate) struct Q4K;

impl Blocks for Q4K {
    const FORMAT: Format = Format::Q4K;
    const BITS: usize = 4;
    const ZERO: i32 = 0;
    const SCALES: Scales = Scales::Super;

    #[inline(always)]
    fn run(block: &[u8], i: usize) -> Run {
        let (sc, mc) = scale_and_min(&block[4..16], i);
        let (words, d, m) = (pair_of_runs(&block[16..], i), half_at(block, 0), half_at(block, 2));
        Run { words, d, m, sc, mc, ..Run::default() }
    }
}

/// Words of the i-th run of bytes that hold even runs low and odd runs high.
#[inline(always)]
pub(super) fn pair_of_runs(bytes: &[u8], i: usize) -> [u32; 8] {
    let bytes = &bytes[i / 2 * 32..][..32];
    let mut words = [0; 8];
    for j in 0..4 {
        let word = |j: usize| (word_at(bytes, 4 * j) >> (i % 2 * 4)) & LOW;
        words[j] = word(j) | word(4 + j) << 4;
    }
    words
}

/// The 6-bit scale and min of a run. Of the 12 bytes, 0..4 and 4..8 hold those of runs 0 to 3 in
/// their low six bits; 8..12 hold the low four bits of runs 4 to 7, whose high two bits are the
/// tops of 0..8.
#[inline(always)]
pub(super) fn scale_and_min(packed: &[u8], i: usize) -> (u8, u8) {
    let byte = |at: usize| (word_at(packed, at) >> (i % 4 * 8)) as u8;
    let (scale, min, low) = (byte(0), byte(4), byte(8));
    if i < 4 {
        return (scale & 63, min & 63);
    }
    ((low & 15) | scale >> 6 << 4, (low >> 4) | min >> 6 << 4)
}
