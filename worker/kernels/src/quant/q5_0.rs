//! Q5_0: `w = d * (u - 16)`. In a file: f16 d, 32 fifth bits, 16 bytes of nibbles.

use super::Format;
use super::blocks::{Blocks, Run, Scales, half_at, nibbles, word_at};

pub(crate) struct Q5_0;

impl Blocks for Q5_0 {
    const FORMAT: Format = Format::Q5_0;
    const BITS: usize = 5;
    const ZERO: i32 = 16;
    const SCALES: Scales = Scales::Plain;

    #[inline(always)]
    fn run(block: &[u8], _: usize) -> Run {
        let (words, fifths) = (nibbles(&block[6..]), word_at(block, 2));
        Run { words, fifths, d: half_at(block, 0), ..Run::default() }
    }
}
