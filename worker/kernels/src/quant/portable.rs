//! The dot product of a run in plain Rust: the reference of the fast kernels, and the kernel of
//! machines that have none.

use std::ops::Range;

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
        let (scale, min) = w.scale_and_min::<B>(b, lane, 0);
        let (second_scale, _) = w.scale_and_min::<B>(b, lane, 1);
        for row in 0..M {
            let at = b * GROUP + first + row;
            let q = &x.q[at * RUN * TERMS..(at + 1) * RUN * TERMS];
            let dot = |columns: Range<usize>| {
                columns.fold(0i32, |dot, k| dot + u[k] * integer(TERMS, q, k)) as f32
            };
            if B::SCALES == Scales::Halves {
                let sum = dot(0..RUN / 2).mul_add(scale, acc[row][lane]);
                acc[row][lane] = dot(RUN / 2..RUN).mul_add(second_scale, sum);
                continue;
            }
            let sum = dot(0..RUN).mul_add(scale, acc[row][lane]);
            acc[row][lane] = match B::SCALES {
                Scales::Plain | Scales::Halves => sum,
                Scales::Min | Scales::Super => min.mul_add(x.sum[at], sum),
            };
        }
    }
}
