//! Q5_1: `w = d * u + m`. In a file: f16 d, f16 m, 32 fifth bits, 16 bytes of nibbles.

use super::Format;
use super::blocks::{Blocks, Run, Scales, half_at, nibbles, with_fifth_bits};

pub(crate) struct Q5_1;

impl Blocks for Q5_1 {
    const FORMAT: Format = Format::Q5_1;
    const BITS: usize = 5;
    const ZERO: i32 = 0;
    const SCALES: Scales = Scales::Min;

    fn run(block: &[u8], _: usize) -> Run {
        let u = with_fifth_bits(nibbles(&block[8..]), &block[4..8]);
        Run { u, d: half_at(block, 0), m: half_at(block, 2), sc: 1, mc: 1 }
    }
}
