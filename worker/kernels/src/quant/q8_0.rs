//! Q8_0: `w = d * q`, q signed. In a file: f16 d, 32 bytes. Held as `u = q + 128`, since the dot
//! product instruction multiplies unsigned with signed bytes.

use super::Format;
use super::blocks::{Blocks, Run, Scales, half_at, word_at};

/// Turns q into q + 128, in four bytes.
const SIGNS: u32 = 0x8080_8080;

pub(crate) struct Q8_0;

impl Blocks for Q8_0 {
    const FORMAT: Format = Format::Q8_0;
    const BITS: usize = 8;
    const ZERO: i32 = 128;
    const SCALES: Scales = Scales::Plain;

    #[inline(always)]
    fn run(block: &[u8], _: usize) -> Run {
        let mut words = [0; 8];
        for (v, word) in words.iter_mut().enumerate() {
            *word = word_at(block, 2 + v % 2 * 16 + v / 2 * 4) ^ SIGNS;
        }
        Run { words, d: half_at(block, 0), ..Run::default() }
    }
}
