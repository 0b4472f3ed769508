//! Q8_0: `w = d * q`, q signed. In a file: f16 d, 32 bytes. Held as `u = q + 128`, since the dot
//! product instruction multiplies unsigned with signed bytes.

use super::Format;
use super::blocks::{Blocks, Run, Scales, half_at};

pub(crate) struct Q8_0;

impl Blocks for Q8_0 {
    const FORMAT: Format = Format::Q8_0;
    const BITS: usize = 8;
    const ZERO: i32 = 128;
    const SCALES: Scales = Scales::Plain;

    fn run(block: &[u8], _: usize) -> Run {
        let u = std::array::from_fn(|k| block[2 + k] ^ 128);
        Run { u, d: half_at(block, 0), m: 0, sc: 1, mc: 0 }
    }
}
