//! Q5_K: as Q4_K with a fifth bit of each weight. In a file: f16 d, f16 dmin, 12 bytes of packed sc
//! and mc, 32 bytes whose i-th bits are the fifth bits of run i, 128 bytes of nibbles as in Q4_K.

use super::Format;
use super::blocks::{Blocks, Run, Scales, half_at};
use super::q4_k::{pair_of_runs, scale_and_min};

pub(crate) struct Q5K;

impl Blocks for Q5K {
    const FORMAT: Format = Format::Q5K;
    const BITS: usize = 5;
    const ZERO: i32 = 0;
    const SCALES: Scales = Scales::Super;

    fn run(block: &[u8], i: usize) -> Run {
        let (sc, mc) = scale_and_min(&block[4..16], i);
        let (low, fifth) = (pair_of_runs(&block[48..], i), &block[16..48]);
        let u = std::array::from_fn(|k| low[k] | ((fifth[k] >> i) & 1) << 4);
        Run { u, d: half_at(block, 0), m: half_at(block, 2), sc, mc }
    }
}
