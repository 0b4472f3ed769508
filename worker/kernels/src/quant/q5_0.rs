//! Q5_0: `w = d * (u - 16)`. In a file: f16 d, 32 fifth bits, 16 bytes of nibbles.

use super::Format;
use super::blocks::{Blocks, Run, Scales, half_at, nibbles, with_fifth_bits};

pub(crate) struct Q5_0;

impl Blocks for Q5_0 {
    const FORMAT: Format = Format::Q5_0;
    const BITS: usize = 5;
    const ZERO: i32 = 16;
    const SCALES: Scales = Scales::Plain;

    fn run(block: &[u8], _: usize) -> Run {
        let u = with_fifth_bits(nibbles(&block[6..]), &block[2..6]);
        Run { u, d: half_at(block, 0), m: 0, sc: 1, mc: 0 }
    }
}
