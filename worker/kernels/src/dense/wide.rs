//! Weights widened to f32, f32 activations, fused multiply-adds: an output is one chain over a
//! leaf's columns in order, of bf16 each odd column before its even one (as `vdpbf16ps` has it).
//!
//! A multiply-add takes four cycles and two start in each, so a pass works on several tiles at once
//! where there are few rows.

use std::ops::Range;

use super::leaves::sum_leaves;
use super::{Dense, Task};
use crate::activation::BLOCK;
use crate::isa::Isa;
use crate::matrix::TILE_ROWS;
use crate::quant::Format;

type Lanes = [f32; TILE_ROWS];

/// A weight's type in a tile, read two columns at a time.
pub(super) trait Word {
    /// Of two columns of 16 rows.
    const BYTES: usize;
    /// Which of the two columns is added first, and which second.
    const ORDER: [usize; 2];

    /// Both columns, in order of addition.
    fn pair(bytes: &[u8]) -> [Lanes; 2];

    /// # Safety
    /// `BYTES` bytes, and AVX-512.
    #[cfg(target_arch = "x86_64")]
    unsafe fn pair_avx512(at: *const u8) -> [std::arch::x86_64::__m512; 2];
}

pub(super) struct Bf16;
struct F16;
struct F32;

impl Word for Bf16 {
    const BYTES: usize = 64;
    const ORDER: [usize; 2] = [1, 0];

    #[inline(always)]
    fn pair(bytes: &[u8]) -> [Lanes; 2] {
        let (words, _) = bytes.as_chunks::<4>();
        let odd = |lane: usize| f32::from_bits(u32::from_le_bytes(words[lane]) & 0xffff_0000);
        let even = |lane: usize| f32::from_bits(u32::from_le_bytes(words[lane]) << 16);
        [std::array::from_fn(odd), std::array::from_fn(even)]
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn pair_avx512(at: *const u8) -> [std::arch::x86_64::__m512; 2] {
        use std::arch::x86_64::*;
        // SAFETY: by the caller's promise.
        unsafe {
            let both = _mm512_loadu_si512(at.cast());
            let odd = _mm512_and_si512(both, _mm512_set1_epi32(0xffff_0000_u32 as i32));
            [_mm512_castsi512_ps(odd), _mm512_castsi512_ps(_mm512_slli_epi32::<16>(both))]
        }
    }
}

impl Word for F16 {
    const BYTES: usize = 64;
    const ORDER: [usize; 2] = [0, 1];

    #[inline(always)]
    fn pair(bytes: &[u8]) -> [Lanes; 2] {
        let (words, _) = bytes.as_chunks::<2>();
        // The exponent's bias differs by 112; the product is exact, of subnormals too.
        let value = |at: usize| {
            let bits = u32::from(u16::from_le_bytes(words[at]));
            let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits(0x7780_0000);
            f32::from_bits(magnitude.to_bits() | (bits & 0x8000) << 16)
        };
        [std::array::from_fn(value), std::array::from_fn(|lane| value(TILE_ROWS + lane))]
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn pair_avx512(at: *const u8) -> [std::arch::x86_64::__m512; 2] {
        use std::arch::x86_64::*;
        // SAFETY: by the caller's promise.
        unsafe {
            let column = |i: usize| _mm512_cvtph_ps(_mm256_loadu_si256(at.add(32 * i).cast()));
            [column(0), column(1)]
        }
    }
}

impl Word for F32 {
    const BYTES: usize = 128;
    const ORDER: [usize; 2] = [0, 1];

    #[inline(always)]
    fn pair(bytes: &[u8]) -> [Lanes; 2] {
        let (words, _) = bytes.as_chunks::<4>();
        let value = |at: usize| f32::from_le_bytes(words[at]);
        [std::array::from_fn(value), std::array::from_fn(|lane| value(TILE_ROWS + lane))]
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn pair_avx512(at: *const u8) -> [std::arch::x86_64::__m512; 2] {
        use std::arch::x86_64::*;
        // SAFETY: by the caller's promise.
        unsafe { [_mm512_loadu_ps(at.cast()), _mm512_loadu_ps(at.add(64).cast())] }
    }
}

pub(super) fn run(isa: Isa, w: &Dense, tiles: Range<usize>, rows: Range<usize>, task: &Task<'_>) {
    match w.format() {
        Format::Bf16 => run_words::<Bf16>(isa, w, tiles, rows, task),
        Format::F16 => run_words::<F16>(isa, w, tiles, rows, task),
        _ => run_words::<F32>(isa, w, tiles, rows, task),
    }
}

/// Tiles outside, rows inside: a pass's tiles stay in the cache for all rows.
fn run_words<W: Word>(
    isa: Isa,
    w: &Dense,
    tiles: Range<usize>,
    rows: Range<usize>,
    task: &Task<'_>,
) {
    let is_wide = matches!(isa, Isa::Avx512Amx | Isa::Avx512Vnni);
    // As many accumulators as registers bear.
    let (most_rows, most_tiles) = match rows.len() {
        8.. if is_wide => (8, 2),
        4.. => (4, if is_wide { 4 } else { 1 }),
        2.. => (2, if is_wide { 4 } else { 2 }),
        _ => (1, 4),
    };
    let mut tile = tiles.start;
    while tile < tiles.end {
        let n = match tiles.end - tile {
            4.. if most_tiles == 4 => 4,
            2.. if most_tiles >= 2 => 2,
            _ => 1,
        };
        let mut row = rows.start;
        while row < rows.end {
            let m = match rows.end - row {
                8.. if most_rows == 8 => 8,
                4.. if most_rows >= 4 => 4,
                2.. => 2,
                _ => 1,
            };
            match (m, n) {
                (8, 2) => pass::<W, 8, 2>(isa, w, tile, row, task),
                (8, _) => pass::<W, 8, 1>(isa, w, tile, row, task),
                (4, 4) => pass::<W, 4, 4>(isa, w, tile, row, task),
                (4, 2) => pass::<W, 4, 2>(isa, w, tile, row, task),
                (4, _) => pass::<W, 4, 1>(isa, w, tile, row, task),
                (2, 4) => pass::<W, 2, 4>(isa, w, tile, row, task),
                (2, 2) => pass::<W, 2, 2>(isa, w, tile, row, task),
                (2, _) => pass::<W, 2, 1>(isa, w, tile, row, task),
                (_, 4) => pass::<W, 1, 4>(isa, w, tile, row, task),
                (_, 2) => pass::<W, 1, 2>(isa, w, tile, row, task),
                _ => pass::<W, 1, 1>(isa, w, tile, row, task),
            }
            row += m;
        }
        tile += n;
    }
}

/// M rows of activations with T tiles.
fn pass<W: Word, const M: usize, const T: usize>(
    isa: Isa,
    w: &Dense,
    tile: usize,
    row: usize,
    task: &Task<'_>,
) {
    let columns = task.columns;
    let w: [&[u8]; T] = std::array::from_fn(|t| w.tile(tile + t));
    let x: [&[f32]; M] = std::array::from_fn(|m| &task.x[(row + m) * columns..][..columns]);
    let store = |p: usize, m: usize, sums: &[Lanes; T]| {
        for t in 0..T {
            task.store(p, row + m, tile + t, &sums[t]);
        }
    };
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: an `Isa` other than Portable was detected on this CPU.
        Isa::Avx512Amx | Isa::Avx512Vnni => unsafe { avx512::<W, M, T>(&w, &x, task, store) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { avx2::<W, M, T>(&w, &x, task, store) },
        _ => portable::<W, M, T>(&w, &x, task, store),
    }
}

/// Adds the products of 32 columns.
#[inline(always)]
fn add_block<W: Word, const M: usize, const T: usize>(
    w: &[&[u8]; T],
    x: &[&[f32]; M],
    b: usize,
    acc: &mut [[Lanes; T]; M],
) {
    for k in b * BLOCK / 2..(b + 1) * BLOCK / 2 {
        for t in 0..T {
            let pair = W::pair(&w[t][k * W::BYTES..(k + 1) * W::BYTES]);
            for m in 0..M {
                for (weights, column) in pair.iter().zip(W::ORDER) {
                    crate::lanes::fma_scalar(&mut acc[m][t], x[m][2 * k + column], weights);
                }
            }
        }
    }
}

#[inline(always)]
fn portable<W: Word, const M: usize, const T: usize>(
    w: &[&[u8]; T],
    x: &[&[f32]; M],
    task: &Task<'_>,
    store: impl Fn(usize, usize, &[Lanes; T]),
) {
    let block = |b, acc: &mut _| add_block::<W, M, T>(w, x, b, acc);
    let add = |a: [Lanes; T], b: [Lanes; T]| -> [Lanes; T] {
        std::array::from_fn(|t| std::array::from_fn(|lane| a[t][lane] + b[t][lane]))
    };
    let same = |sums: [Lanes; T]| sums;
    sum_leaves!(M, task.sum, [[0f32; TILE_ROWS]; T], add, same, block, store);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn avx2<W: Word, const M: usize, const T: usize>(
    w: &[&[u8]; T],
    x: &[&[f32]; M],
    task: &Task<'_>,
    store: impl Fn(usize, usize, &[Lanes; T]),
) {
    portable::<W, M, T>(w, x, task, store);
}

/// Bytes of each tile that a pass fetches ahead. Only the first one reads from memory; others fetch
/// what is near.
#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 2048;

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
fn avx512<W: Word, const M: usize, const T: usize>(
    w: &[&[u8]; T],
    x: &[&[f32]; M],
    task: &Task<'_>,
    store: impl Fn(usize, usize, &[Lanes; T]),
) {
    use std::arch::x86_64::*;
    let block = |b: usize, acc: &mut [[__m512; T]; M]| {
        debug_assert!(w.iter().all(|w| w.len() >= (b + 1) * BLOCK / 2 * W::BYTES));
        debug_assert!(x.iter().all(|x| x.len() >= (b + 1) * BLOCK));
        for k in b * BLOCK / 2..(b + 1) * BLOCK / 2 {
            // SAFETY: leaves cover the columns (`check_sum`), tiles and rows have them all; a
            // prefetch may point anywhere.
            unsafe {
                let pairs: [[__m512; 2]; T] = std::array::from_fn(|t| {
                    let at = w[t].as_ptr().add(k * W::BYTES);
                    for line in 0..W::BYTES / 64 {
                        let ahead = at.wrapping_add(AHEAD + 64 * line);
                        _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
                    }
                    W::pair_avx512(at)
                });
                for (i, column) in W::ORDER.into_iter().enumerate() {
                    for m in 0..M {
                        let x = _mm512_set1_ps(*x[m].get_unchecked(2 * k + column));
                        for t in 0..T {
                            acc[m][t] = _mm512_fmadd_ps(pairs[t][i], x, acc[m][t]);
                        }
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
