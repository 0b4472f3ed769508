//! Q6_K: blocks of 256, `w = d * sc * (u - 32)` with 6-bit u and an int8 sc for each 16 columns. In
//! a file: 128 bytes of low nibbles, 64 bytes of the two top bits, 16 of sc, f16 d. Of each 128
//! columns, runs 0 and 1 are the low nibbles of 32 bytes each and runs 2 and 3 their high ones; the
//! top bits of all four share 32 bytes.

use super::Format;
use super::blocks::{Blocks, Run, Scales, half_at, word_at};

pub(crate) struct Q6K;

impl Blocks for Q6K {
    const FORMAT: Format = Format::Q6K;
    const BITS: usize = 6;
    const ZERO: i32 = 32;
    const SCALES: Scales = Scales::Halves;

    #[inline(always)]
    fn run(block: &[u8], i: usize) -> Run {
        let (part, i) = (i / 4, i % 4);
        let lows = &block[64 * part + 32 * (i % 2)..];
        let low = |at: usize| (word_at(lows, at) >> (i / 2 * 4)) & 0x0f0f_0f0f;
        let highs = &block[128 + 32 * part..];
        let top = |at: usize| (word_at(highs, at) >> (2 * i)) & 0x0303_0303;
        let mut words = [0; 8];
        for j in 0..4 {
            words[j] = low(4 * j) | low(16 + 4 * j) << 4;
            words[4 + j / 2] |= (top(4 * j) | top(16 + 4 * j) << 2) << (j % 2 * 4);
        }
        let sc = &block[192 + 8 * part + 2 * i..];
        Run { words, d: half_at(block, 208), sc: sc[0], mc: sc[1], ..Run::default() }
    }
}
