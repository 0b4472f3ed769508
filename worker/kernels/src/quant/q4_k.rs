//! Q4_K: blocks of 256, `w = d * sc * u - dmin * mc` with 6-bit sc and mc of each run of 32. In a
//! file: f16 d, f16 dmin, 12 bytes of packed sc and mc, 128 bytes: each 32 of them hold one run low
//! and the next high.

use super::Format;
use super::blocks::{Blocks, Run, Scales, half_at};

pub(crate) struct Q4K;

impl Blocks for Q4K {
    const FORMAT: Format = Format::Q4K;
    const BITS: usize = 4;
    const ZERO: i32 = 0;
    const SCALES: Scales = Scales::Super;

    fn run(block: &[u8], i: usize) -> Run {
        let (sc, mc) = scale_and_min(&block[4..16], i);
        let u = pair_of_runs(&block[16..], i);
        Run { u, d: half_at(block, 0), m: half_at(block, 2), sc, mc }
    }
}

/// The i-th run of bytes that hold even runs low and odd runs high.
pub(super) fn pair_of_runs(bytes: &[u8], i: usize) -> [u8; 32] {
    let bytes = &bytes[i / 2 * 32..];
    std::array::from_fn(|k| if i.is_multiple_of(2) { bytes[k] & 15 } else { bytes[k] >> 4 })
}

/// The 6-bit scale and min of a run. Of the 12 bytes, 0..4 and 4..8 hold those of runs 0 to 3 in
/// their low six bits; 8..12 hold the low four bits of runs 4 to 7, whose high two bits are the
/// tops of 0..8.
pub(super) fn scale_and_min(packed: &[u8], i: usize) -> (u8, u8) {
    if i < 4 {
        return (packed[i] & 63, packed[i + 4] & 63);
    }
    let low = packed[i + 4];
    ((low & 15) | (packed[i - 4] >> 6) << 4, (low >> 4) | (packed[i] >> 6) << 4)
}
