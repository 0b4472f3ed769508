//! Formats with a float scale for each run: every run's products become floats.
//!
//! Weights of 4 bits times 16 still are bytes, so that both terms of an activation go into one
//! product; wider ones need a product for each term. Of half a window, the products of both tiles
//! are stored one after the other and then summed.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::avx512::{scales, vectors};
use super::super::blocks::{Blocks, RUN, Scales};
use super::{Lanes, Product, Scratch, Sums, TERMS, WINDOW, Window, add_scaled, put};
use crate::activation::GROUP;
use crate::linear::{Group, TileWeights};
use crate::tile_registers::{REGISTER, Registers, load, multiply, store, zero};

/// Runs whose products are stored before they are summed.
const HALF: usize = WINDOW / 2;

/// Products that are under way before the first of them is stored.
const LAG: usize = 2;

/// Bytes from one row of activations to the next.
const STRIDE: usize = RUN * TERMS;

/// How a format's runs become products.
struct Shape<B>(std::marker::PhantomData<B>);

impl<B: Blocks> Shape<B> {
    const COMBINED: bool = B::BITS == 4;
    /// Products of a run and a group.
    const PRODUCTS: usize = if Self::COMBINED { 1 } else { TERMS };
    const SIGNED: bool = B::ZERO != 0;
}

/// Products in registers 0 to 3, activations in 4 and 5, weights in 6 and 7.
///
/// # Safety
/// The CPU has what `Isa::Avx512Amx` says.
pub(super) unsafe fn configure<B: Blocks>(rows: usize) -> Registers {
    let width = if Shape::<B>::COMBINED { 2 * RUN } else { RUN };
    let (product, activations, weights) = ((rows, 64), (rows, width), (width / 4, 64));
    let shapes = [product, product, product, product, activations, activations, weights, weights];
    // SAFETY: the caller's promise.
    unsafe { Registers::configure(shapes) }
}

/// Weights as `[run, 8, 64]` bytes; of 4 bits, before them the same times 16.
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
    let zero = _mm512_set1_epi8(B::ZERO as i8);
    let high = _mm512_set1_epi8(-16);
    for (i, b) in window.enumerate() {
        let to = scratch.weights[t][i].as_mut_ptr();
        let put = |at: usize, v| {
            let v = if Shape::<B>::SIGNED { _mm512_sub_epi8(v, zero) } else { v };
            // SAFETY: 16 vectors of 64 bytes.
            unsafe {
                if Shape::<B>::COMBINED {
                    let shifted = _mm512_and_si512(_mm512_slli_epi16::<4>(v), high);
                    _mm512_store_si512(to.add(at * 64).cast(), shifted);
                    _mm512_store_si512(to.add((8 + at) * 64).cast(), v);
                } else {
                    _mm512_store_si512(to.add(at * 64).cast(), v);
                }
            }
        };
        // SAFETY: the caller's promise; lanes are 16 floats.
        unsafe {
            for j in 0..4 {
                let (left, right) = vectors::<B, 1>(w, b, j);
                put(j, left);
                put(4 + j, right);
            }
            let (scale, min) = scales::<B>(w, b);
            _mm512_store_ps(scratch.scale[t][i].as_mut_ptr(), scale);
            let min = match B::SCALES {
                Scales::Super => _mm512_sub_ps(_mm512_setzero_ps(), min),
                _ => min,
            };
            _mm512_store_ps(scratch.min[t][i].as_mut_ptr(), min);
        }
    }
}

/// Adds a window's sums of a group, times the scales of its rows, to the totals of each tile.
///
/// # Safety
/// The group has these runs, and the scratch their weights.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
pub(super) unsafe fn multiply<B: Blocks, const ROWS: usize>(
    n_tiles: usize,
    window: &Window,
    group: &Group<'_>,
    g: usize,
    scratch: &mut Scratch,
) {
    let d = &group.d.as_chunks().0[window.scale];
    let runs = &window.runs;
    let mut first = 0;
    let at_once = if n_tiles == 1 { WINDOW } else { HALF };
    while first < runs.len() {
        let half = first..runs.len().min(first + at_once);
        let run = runs.start + first;
        // SAFETY: the caller's promise.
        unsafe { products::<B>(n_tiles, run, half.clone(), group, scratch) };
        for t in 0..n_tiles {
            let products = &scratch.products[LAG + t * Shape::<B>::PRODUCTS..];
            let apart = n_tiles * Shape::<B>::PRODUCTS;
            let scale = &scratch.scale[t][half.clone()];
            let min = &scratch.min[t][half.clone()];
            let sum = &group.sum[run * GROUP..];
            let acc = add::<B, ROWS>(products, apart, scale, min, sum, &scratch.acc[t], first == 0);
            if half.end == runs.len() {
                add_scaled(&acc, d, &mut scratch.total[g][t], window.begins_leaf);
            } else {
                put(&acc, &mut scratch.acc[t]);
            }
        }
        first = half.end;
    }
}

/// Products of some of a window's runs: `[run, tile, term]` behind [`LAG`] of no meaning. Each is
/// stored when two more are under way.
///
/// # Safety
/// As [`multiply`].
#[inline(always)]
unsafe fn products<B: Blocks>(
    n_tiles: usize,
    first_run: usize,
    runs: Range<usize>,
    group: &Group<'_>,
    scratch: &mut Scratch,
) {
    let mut to = scratch.products.as_mut_ptr().cast::<u8>();
    // The register of the product before.
    let mut last = 3;
    macro_rules! multiply_all {
        ($multiply:literal) => {
            // A product of register `$a` with weights in `$b`, and the store of an older one.
            macro_rules! product {
                ($sum:literal, $a:literal, $b:literal, $older:literal) => {
                    zero!($sum);
                    multiply!($multiply, $sum, $a, $b);
                    store!($older, to);
                    to = to.add(REGISTER);
                };
            }
            for (i, at) in runs.enumerate() {
                let a = group.q[group.place(TERMS, first_run + i, 0)..].as_ptr();
                if Shape::<B>::COMBINED {
                    for t in 0..n_tiles {
                        let b = scratch.weights[t][at].as_ptr();
                        load!(4, a, STRIDE);
                        load!(6, b, 64usize);
                        match last {
                            3 => {
                                product!(0, 4, 6, 2);
                            }
                            0 => {
                                product!(1, 4, 6, 3);
                            }
                            1 => {
                                product!(2, 4, 6, 0);
                            }
                            _ => {
                                product!(3, 4, 6, 1);
                            }
                        }
                        last = (last + 1) % 4;
                    }
                } else {
                    load!(4, a, STRIDE);
                    load!(5, a.add(RUN), STRIDE);
                    for t in 0..n_tiles {
                        load!(6, scratch.weights[t][at].as_ptr(), 64usize);
                        if last == 3 {
                            product!(0, 4, 6, 2);
                            product!(1, 5, 6, 3);
                        } else {
                            product!(2, 4, 6, 0);
                            product!(3, 5, 6, 1);
                        }
                        last = (last + 2) % 4;
                    }
                }
            }
        };
    }
    // SAFETY: a group has 16 rows (it is padded) of each term; a run's weights are 1024 bytes, or
    // 512 that are read; the products of a window and those under way have room.
    unsafe {
        if Shape::<B>::SIGNED {
            multiply_all!("tdpbssd");
        } else {
            multiply_all!("tdpbsud");
        }
        match last {
            3 => {
                store!(2, to);
                store!(3, to.add(REGISTER));
            }
            0 => {
                store!(3, to);
                store!(0, to.add(REGISTER));
            }
            1 => {
                store!(0, to);
                store!(1, to.add(REGISTER));
            }
            _ => {
                store!(1, to);
                store!(2, to.add(REGISTER));
            }
        }
    }
}

/// One tile's products of some runs, scaled, and the sums of those before them.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
fn add<B: Blocks, const ROWS: usize>(
    products: &[Product],
    apart: usize,
    scale: &[Lanes],
    min: &[Lanes],
    sum: &[f32],
    sums: &Sums,
    is_first: bool,
) -> [__m512; ROWS] {
    let mut acc = [_mm512_setzero_ps(); ROWS];
    if !is_first {
        for row in 0..ROWS {
            // SAFETY: rows of 16 floats.
            acc[row] = unsafe { _mm512_load_ps(sums[row].as_ptr()) };
        }
    }
    for (i, ((scale, min), sum)) in scale.iter().zip(min).zip(sum.chunks_exact(GROUP)).enumerate() {
        let products = &products[i * apart..];
        // SAFETY: lanes are 16 floats, on cache lines of their own.
        unsafe {
            let (scale, min) = (_mm512_load_ps(scale.as_ptr()), _mm512_load_ps(min.as_ptr()));
            for row in 0..ROWS {
                let product = |term: usize| _mm512_load_si512(products[term][row].as_ptr().cast());
                let dot = if Shape::<B>::COMBINED {
                    product(0)
                } else {
                    _mm512_add_epi32(_mm512_slli_epi32::<4>(product(0)), product(1))
                };
                acc[row] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, acc[row]);
                if B::SCALES.has_min() {
                    acc[row] = _mm512_fmadd_ps(min, _mm512_set1_ps(sum[row]), acc[row]);
                }
            }
        }
    }
    acc
}
