//! Q5_K: as Q4_K with a fifth bit of each weight. In a file: f16 d, f16 dmin, 12 bytes of packed sc
//! and mc, 32 bytes whose i-th bits are the fifth bits of run i, 128 bytes of nibbles as in Q4_K.

use super::Format;
use super::blocks::{Blocks, Run, Scales, half_at, word_at};
use super::q4_k::{pair_of_runs, scale_and_min};

pub(crate) struct Q5K;

impl Blocks for Q5K {
    const FORMAT: Format = Format::Q5K;
    const BITS: usize = 5;
    const ZERO: i32 = 0;
    const SCALES: Scales = Scales::Super;

    #[inline(always)]
    fn run(block: &[u8], i: usize) -> Run {
        let (sc, mc) = scale_and_min(&block[4..16], i);
        let (words, fifths) = (pair_of_runs(&block[48..], i), bits_of(&block[16..48], i));
        Run { words, fifths, d: half_at(block, 0), m: half_at(block, 2), sc, mc }
    }
}

/// The i-th bits of 32 bytes.
#[inline(always)]
fn bits_of(bytes: &[u8], i: usize) -> u32 {
    let mut bits = 0;
    for j in 0..8 {
        let four = (word_at(bytes, 4 * j) >> i) & 0x0101_0101;
        // Byte k's bit goes to bit 24 + k of the product; no two sums meet, so nothing carries.
        bits |= (four.wrapping_mul(0x0102_0408) >> 24 & 15) << (4 * j);
    }
    bits
}
