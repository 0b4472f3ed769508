//! bf16 weights with activations of one bf16 term: a pair of columns an instruction with
//! `vdpbf16ps`, which adds the odd one's product, then the even one's. Elsewhere the same two steps
//! with f32 multiply-adds: the same bits, but for subnormal sums, which the instruction takes as
//! zero.

use std::ops::Range;

use super::leaves::sum_leaves;
use super::terms::{GROUP, GROUP_BLOCK, widen};
use super::wide::{Bf16, Word};
use super::{Dense, Task};
use crate::activation::BLOCK;
use crate::isa::{Isa, dispatch};
use crate::matrix::TILE_ROWS;

type Lanes = [f32; TILE_ROWS];

/// One row's terms: a block of 32 every [`GROUP_BLOCK`] numbers.
#[derive(Clone, Copy)]
struct Row<'a>(&'a [u16]);

impl<'a> Row<'a> {
    fn new(task: &'a Task<'_>, row: usize) -> Self {
        Self(&task.terms.group(row / GROUP, task.columns)[row % GROUP * BLOCK..])
    }

    #[inline(always)]
    fn block(self, b: usize) -> &'a [u16] {
        &self.0[b * GROUP_BLOCK..][..BLOCK]
    }
}

pub(super) fn run(isa: Isa, w: &Dense, tiles: Range<usize>, rows: Range<usize>, task: &Task<'_>) {
    #[cfg(target_arch = "x86_64")]
    if matches!(isa, Isa::Avx512Amx | Isa::Avx512Vnni) && is_x86_feature_detected!("avx512bf16") {
        return run_pairs(w, tiles, rows, task);
    }
    for tile in tiles {
        let mut row = rows.start;
        while row < rows.end {
            if row + 4 <= rows.end {
                widened::<4>(isa, w, tile, row, task);
                row += 4;
            } else {
                widened::<1>(isa, w, tile, row, task);
                row += 1;
            }
        }
    }
}

/// M rows of activations with a tile, without the instruction.
fn widened<const M: usize>(isa: Isa, w: &Dense, tile: usize, row: usize, task: &Task<'_>) {
    let weights = w.tile(tile);
    dispatch!(isa, fn<M>(weights: &[u8], tile: usize, row: usize, task: &Task<'_>) => {
        let x: [Row<'_>; M] = std::array::from_fn(|m| Row::new(task, row + m));
        let block = |b: usize, acc: &mut [Lanes; M]| {
            let x = x.map(|x| x.block(b));
            for k in 0..BLOCK / 2 {
                let at = (b * BLOCK / 2 + k) * Bf16::BYTES;
                let pair = Bf16::pair(&weights[at..at + Bf16::BYTES]);
                for m in 0..M {
                    for (weights, column) in pair.iter().zip(Bf16::ORDER) {
                        crate::lanes::fma_scalar(&mut acc[m], widen(x[m][2 * k + column]), weights);
                    }
                }
            }
        };
        let same = |lanes: Lanes| lanes;
        let add_lanes =
            |a: Lanes, b: Lanes| -> Lanes { std::array::from_fn(|lane| a[lane] + b[lane]) };
        let store = |p, m, sums: &Lanes| task.store(p, row + m, tile, sums);
        sum_leaves!(M, task.sum, [0f32; TILE_ROWS], add_lanes, same, block, store);
    });
}

#[cfg(target_arch = "x86_64")]
fn run_pairs(w: &Dense, tiles: Range<usize>, rows: Range<usize>, task: &Task<'_>) {
    // A dot product takes some six cycles: few rows want several tiles at once.
    let most_tiles = if rows.len() < 8 { 4 } else { 2 };
    let mut tile = tiles.start;
    while tile < tiles.end {
        let n = match tiles.end - tile {
            4.. if most_tiles == 4 => 4,
            2.. => 2,
            _ => 1,
        };
        let mut row = rows.start;
        while row < rows.end {
            let m = match rows.end - row {
                8.. if most_tiles == 2 => 8,
                4.. => 4,
                _ => 1,
            };
            match (m, n) {
                (8, 2) => pass::<8, 2>(w, tile, row, task),
                (8, _) => pass::<8, 1>(w, tile, row, task),
                (4, 4) => pass::<4, 4>(w, tile, row, task),
                (4, 2) => pass::<4, 2>(w, tile, row, task),
                (4, _) => pass::<4, 1>(w, tile, row, task),
                (_, 4) => pass::<1, 4>(w, tile, row, task),
                (_, 2) => pass::<1, 2>(w, tile, row, task),
                _ => pass::<1, 1>(w, tile, row, task),
            }
            row += m;
        }
        tile += n;
    }
}

/// M rows of activations with T tiles.
#[cfg(target_arch = "x86_64")]
fn pass<const M: usize, const T: usize>(w: &Dense, tile: usize, row: usize, task: &Task<'_>) {
    let w: [&[u8]; T] = std::array::from_fn(|t| w.tile(tile + t));
    let x: [Row<'_>; M] = std::array::from_fn(|m| Row::new(task, row + m));
    let store = |p: usize, m: usize, sums: &[Lanes; T]| {
        for t in 0..T {
            task.store(p, row + m, tile + t, &sums[t]);
        }
    };
    // SAFETY: `run` saw that this CPU has AVX-512 with bf16.
    unsafe { dot_pairs(&w, &x, task, store) }
}

/// Bytes of each tile that a pass fetches ahead. Only the first one reads from memory; for others it is
/// a load too many, which does not show.
#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 2048;

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")]
fn dot_pairs<const M: usize, const T: usize>(
    w: &[&[u8]; T],
    x: &[Row<'_>; M],
    task: &Task<'_>,
    store: impl Fn(usize, usize, &[Lanes; T]),
) {
    use std::arch::x86_64::*;
    // SAFETY: both are 64 bytes of which every pattern is a value.
    let pairs = |v: __m512i| unsafe { std::mem::transmute::<__m512i, __m512bh>(v) };
    let block = |b: usize, acc: &mut [[__m512; T]; M]| {
        debug_assert!(w.iter().all(|w| w.len() >= (b + 1) * BLOCK * TILE_ROWS * 2));
        let x: [*const i32; M] = std::array::from_fn(|m| x[m].block(b).as_ptr().cast());
        for k in 0..BLOCK / 2 {
            // SAFETY: leaves cover the columns (`check_sum`), tiles and rows have them all; a
            // prefetch may point anywhere.
            unsafe {
                let weights: [__m512bh; T] = std::array::from_fn(|t| {
                    let at = w[t].as_ptr().add((b * BLOCK / 2 + k) * Bf16::BYTES);
                    _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD).cast());
                    pairs(_mm512_loadu_si512(at.cast()))
                });
                for m in 0..M {
                    let x = pairs(_mm512_set1_epi32(x[m].add(k).read_unaligned()));
                    for t in 0..T {
                        acc[m][t] = _mm512_dpbf16_ps(acc[m][t], weights[t], x);
                    }
                }
            }
        }
    };
    let add = |a: [__m512; T], b: [__m512; T]| -> [__m512; T] {
        std::array::from_fn(|t| _mm512_add_ps(a[t], b[t]))
    };
    let lanes = |sums: [__m512; T]| -> [Lanes; T] {
        std::array::from_fn(|t| {
            let mut out = [0f32; TILE_ROWS];
            // SAFETY: 16 floats.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), sums[t]) };
            out
        })
    };
    sum_leaves!(M, task.sum, [_mm512_setzero_ps(); T], add, lanes, block, store);
}
