//! Q5_1: `w = d * u + m`. In a file: f16 d, f16 m, 32 fifth bits, 16 bytes of nibbles.

use super::Format;
use super::blocks::{Blocks, Run, Scales, half_at, nibbles, word_at};

pub(crate) struct Q5_1;

impl Blocks for Q5_1 {
    const FORMAT: Format = Format::Q5_1;
    const BITS: usize = 5;
    const ZERO: i32 = 0;
    const SCALES: Scales = Scales::Min;

    #[inline(always)]
    fn run(block: &[u8], _: usize) -> Run {
        let (d, m) = (half_at(block, 0), half_at(block, 2));
        let (words, fifths) = (nibbles(&block[8..]), word_at(block, 4));
        Run { words, fifths, d, m, ..Run::default() }
    }
}
