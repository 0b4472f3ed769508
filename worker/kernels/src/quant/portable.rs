//! The dot product of a run in plain Rust: the reference of the fast kernels, and the kernel of
//! machines that have none.

use super::blocks::{Blocks, RUN, Scales};
use crate::activation::GROUP;
use crate::linear::{Group, TileWeights, integer};
use crate::matrix::TILE_ROWS;

/// Adds run b's products to the sums of M rows of activations.
#[inline(always)]
pub(crate) fn run<B: Blocks, const M: usize, const TERMS: usize>(
    w: &TileWeights<'_>,
    b: usize,
    x: &Group<'_>,
    first: usize,
    acc: &mut [[f32; TILE_ROWS]; M],
) {
    for lane in 0..TILE_ROWS {
        let u: [i32; RUN] = std::array::from_fn(|k| w.integer::<B>(b, lane, k) - B::ZERO);
        let (scale, min) = w.scale_and_min::<B>(b, lane);
        for row in 0..M {
            let at = b * GROUP + first + row;
            let q = &x.q[at * RUN * TERMS..(at + 1) * RUN * TERMS];
            let mut dot = 0i32;
            for (k, &u) in u.iter().enumerate() {
                dot += u * integer(TERMS, q, k);
            }
            let sum = (dot as f32).mul_add(scale, acc[row][lane]);
            acc[row][lane] = match B::SCALES {
                Scales::Plain => sum,
                Scales::Min | Scales::Super => min.mul_add(x.sum[at], sum),
            };
        }
    }
}
