//! The dot product of some runs in plain Rust: the reference of the fast kernels, and the kernel of
//! machines that have none.

use std::ops::Range;

use super::blocks::{Blocks, RUN};
use crate::linear::{Group, TileWeights, integer};
use crate::matrix::TILE_ROWS;

type Lanes = [f32; TILE_ROWS];

/// The products of an activation scale's runs with M rows of activations, in the weights' scales.
#[inline(always)]
pub(crate) fn runs<B: Blocks, const M: usize, const TERMS: usize>(
    w: &TileWeights<'_>,
    runs: Range<usize>,
    x: &Group<'_>,
    first: usize,
) -> [Lanes; M] {
    let mut acc = [[0.0; TILE_ROWS]; M];
    if !B::SCALES.sums_integers() {
        for b in runs {
            run::<B, M, TERMS>(w, b, x, first, &mut acc);
        }
        return acc;
    }
    let mut start = runs.start;
    while start < runs.end {
        let end = w.block_end(start).min(runs.end);
        super_runs::<B, M, TERMS>(w, start..end, x, first, &mut acc);
        start = end;
    }
    acc
}

/// Adds run b's products to the sums of M rows of activations.
#[inline(always)]
fn run<B: Blocks, const M: usize, const TERMS: usize>(
    w: &TileWeights<'_>,
    b: usize,
    x: &Group<'_>,
    first: usize,
    acc: &mut [Lanes; M],
) {
    for lane in 0..TILE_ROWS {
        let u: [i32; RUN] = std::array::from_fn(|k| w.integer::<B>(b, lane, k) - B::ZERO);
        let (scale, min) = w.scale_and_min::<B>(b, lane, 0);
        for row in 0..M {
            let q = &x.q[x.place(TERMS, b, first + row)..];
            let dot = (0..RUN).fold(0i32, |dot, k| dot + u[k] * integer(TERMS, q, k));
            acc[row][lane] = (dot as f32).mul_add(scale, acc[row][lane]);
            if B::SCALES.has_min() {
                let sum = x.sum[b * x.side + first + row];
                acc[row][lane] = min.mul_add(sum, acc[row][lane]);
            }
        }
    }
}

/// Adds the products of runs of one super-block, which are summed as integers.
#[inline(always)]
fn super_runs<B: Blocks, const M: usize, const TERMS: usize>(
    w: &TileWeights<'_>,
    runs: Range<usize>,
    x: &Group<'_>,
    first: usize,
    acc: &mut [Lanes; M],
) {
    for lane in 0..TILE_ROWS {
        let mut dots = [0i32; M];
        for b in runs.clone() {
            let [left, right] = w.integer_scales::<B>(b, lane);
            let u: [i32; RUN] = std::array::from_fn(|k| {
                let scale = if k < RUN / 2 { left } else { right };
                scale * (w.integer::<B>(b, lane, k) - B::ZERO)
            });
            for row in 0..M {
                let q = &x.q[x.place(TERMS, b, first + row)..];
                for (k, u) in u.iter().enumerate() {
                    dots[row] = dots[row].wrapping_add(u.wrapping_mul(integer(TERMS, q, k)));
                }
            }
        }
        let [d, _] = w.halves::<B>(runs.start, lane);
        for row in 0..M {
            acc[row][lane] = (dots[row] as f32).mul_add(d, acc[row][lane]);
        }
    }
}
