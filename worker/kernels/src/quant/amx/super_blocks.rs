//! Formats whose runs are summed as integers: a weight times its integer scale has 14 bits at most,
//! and a super-block of them fits 32 with any activations.
//!
//! `sc * u = 256 * high + low`, bytes both; times the two terms of an activation that makes four
//! products, each summed in one register over a window.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::avx512::{at, halves_of, head, integer_scales, vectors};
use super::super::blocks::{Blocks, RUN};
use super::{At, Product, Scratch, Sums, TERMS, Window, add_scaled, put};
use crate::linear::{Group, TileWeights};
use crate::tile_registers::{REGISTER, Registers, load, multiply, store, zero};

/// Bytes from one row of activations to the next.
const STRIDE: usize = RUN * TERMS;

/// Products in registers 0 to 3, activations in 4 and 5, weights in 6 and 7.
///
/// # Safety
/// The CPU has what `Isa::Avx512Amx` says.
pub(super) unsafe fn configure(rows: usize) -> Registers {
    let mut shapes = [(rows, 64); 8];
    shapes[4..6].fill((rows, RUN));
    shapes[6..].fill((RUN / 4, 64));
    // SAFETY: the caller's promise.
    unsafe { Registers::configure(shapes) }
}

/// The parts of a window that lie in one super-block.
fn parts<'a>(
    w: &'a TileWeights<'_>,
    window: Range<usize>,
) -> impl Iterator<Item = Range<usize>> + 'a {
    let mut start = window.start;
    std::iter::from_fn(move || {
        let runs = start..w.block_end(start).min(window.end);
        start = runs.end;
        (!runs.is_empty()).then_some(runs)
    })
}

/// Weights times their scales, as `[run, low or high byte, 8, 64]`.
///
/// # Safety
/// The tile has these runs.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
pub(super) unsafe fn unpack<B: Blocks>(
    w: &TileWeights<'_>,
    window: Range<usize>,
    t: usize,
    scratch: &mut Scratch,
) {
    let low = _mm512_set1_epi16(0xff);
    let zero = _mm512_set1_epi16(B::ZERO as i16);
    for (i, b) in window.enumerate() {
        let to = scratch.weights[t][i].as_mut_ptr();
        let put = |at: usize, v, scale| {
            let [even, odd] = [_mm512_and_si512(v, low), _mm512_srli_epi16::<8>(v)]
                .map(|u| _mm512_mullo_epi16(_mm512_sub_epi16(u, zero), scale));
            // Where the mask's bits are set, those of the first.
            let lows = _mm512_ternarylogic_epi32::<0xca>(low, even, _mm512_slli_epi16::<8>(odd));
            let highs = _mm512_ternarylogic_epi32::<0xca>(low, _mm512_srli_epi16::<8>(even), odd);
            // SAFETY: a run has 2 * 8 vectors of 64 bytes.
            unsafe {
                _mm512_store_si512(to.add(at * 64).cast(), lows);
                _mm512_store_si512(to.add(512 + at * 64).cast(), highs);
            }
        };
        // SAFETY: the caller's promise.
        unsafe {
            let run = at::<B>(w, b);
            let (left_scale, right_scale) = integer_scales::<B>(run);
            let twice = |v| _mm512_mask_blend_epi16(0xaaaa_aaaa, v, _mm512_slli_epi32::<16>(v));
            let (left_scale, right_scale) = (twice(left_scale), twice(right_scale));
            for j in 0..4 {
                let (left, right) = vectors::<B>(run, j);
                put(j, left, left_scale);
                put(4 + j, right, right_scale);
            }
        }
    }
}

/// Adds a tile's sums of a group in a window, times the scales of its rows, to the totals.
///
/// # Safety
/// The group has these runs, and the scratch their weights.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
pub(super) unsafe fn multiply<B: Blocks, const ROWS: usize>(
    w: &TileWeights<'_>,
    window: &Window,
    group: &Group<'_>,
    at: At,
    scratch: &mut Scratch,
) {
    let d = &group.d.as_chunks().0[window.idx];
    let all = &window.blocks;
    for (i, runs) in parts(w, all.clone()).enumerate() {
        let weights = &scratch.weights[at.weights][runs.start - all.start..];
        let products_at = scratch.products.as_mut_ptr().cast();
        // SAFETY: the caller's promise.
        unsafe { products(runs.clone(), group, weights, products_at) };
        // SAFETY: the tile has a scale for 16 rows of these runs.
        let scale = unsafe { halves_of(head::<B>(w, runs.start)) };
        let acc = add::<ROWS>(&scratch.products, scale, &scratch.acc, i == 0);
        if runs.end == all.end {
            add_scaled(&acc, d, &mut scratch.total[at.sums], window.begins_leaf);
        } else {
            put(&acc, &mut scratch.acc);
        }
    }
}

/// The products of one tile's runs with a group.
///
/// # Safety
/// The group has these runs, weights and products are of them.
#[inline(always)]
unsafe fn products(runs: Range<usize>, group: &Group<'_>, weights: &[[u8; REGISTER]], to: *mut u8) {
    // SAFETY: a group has 16 rows (it is padded) of each term, a run's weights are 2 * 512 bytes.
    unsafe {
        zero!(0, 1, 2, 3);
        for (b, weights) in runs.zip(weights) {
            let a = group.q[group.place(TERMS, b, 0)..].as_ptr();
            load!(4, a, STRIDE);
            load!(6, weights.as_ptr(), 64usize);
            multiply!("tdpbsud", 0, 4, 6);
            load!(5, a.add(RUN), STRIDE);
            multiply!("tdpbsud", 1, 5, 6);
            load!(7, weights.as_ptr().add(512), 64usize);
            multiply!("tdpbssd", 2, 4, 7);
            multiply!("tdpbssd", 3, 5, 7);
        }
        store!(0, to);
        store!(1, to.add(REGISTER));
        store!(2, to.add(2 * REGISTER));
        store!(3, to.add(3 * REGISTER));
    }
}

/// The products of a super-block, scaled, and the sums of the one before it.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
fn add<const ROWS: usize>(
    products: &[Product],
    d: __m512,
    sums: &Sums,
    is_first: bool,
) -> [__m512; ROWS] {
    std::array::from_fn(|row| {
        // SAFETY: rows of 16 numbers, on cache lines of their own.
        let product = |i: usize| unsafe { _mm512_load_si512(products[i][row].as_ptr().cast()) };
        let terms = |i: usize| _mm512_add_epi32(_mm512_slli_epi32::<4>(product(i)), product(i + 1));
        let dot = _mm512_add_epi32(_mm512_slli_epi32::<8>(terms(2)), terms(0));
        let from = if is_first {
            _mm512_setzero_ps()
        } else {
            // SAFETY: as above.
            unsafe { _mm512_load_ps(sums[row].as_ptr()) }
        };
        _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), d, from)
    })
}
