//! Q4_0: `w = d * (u - 8)`. In a file: f16 d, 16 bytes of nibbles.

use super::Format;
use super::blocks::{Blocks, Run, Scales, half_at, nibbles};

pub(crate) struct Q4_0;

impl Blocks for Q4_0 {
    const FORMAT: Format = Format::Q4_0;
    const BITS: usize = 4;
    const ZERO: i32 = 8;
    const SCALES: Scales = Scales::Plain;

    #[inline(always)]
    fn run(block: &[u8], _: usize) -> Run {
        Run { words: nibbles(&block[2..]), d: half_at(block, 0), ..Run::default() }
    }
}
