//! Q4_1: `w = d * u + m`. In a file: f16 d, f16 m, 16 bytes of nibbles.

use super::Format;
use super::blocks::{Blocks, Run, Scales, half_at, nibbles};

pub(crate) struct Q4_1;

impl Blocks for Q4_1 {
    const FORMAT: Format = Format::Q4_1;
    const BITS: usize = 4;
    const ZERO: i32 = 0;
    const SCALES: Scales = Scales::Min;

    #[inline(always)]
    fn run(block: &[u8], _: usize) -> Run {
        let (d, m) = (half_at(block, 0), half_at(block, 2));
        Run { words: nibbles(&block[4..]), d, m, ..Run::default() }
    }
}
