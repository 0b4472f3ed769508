//! The dot product of a run with `vpdpbusd`: unsigned weights, signed activations, 16 rows in the
//! lanes.

use std::arch::x86_64::*;

use super::blocks::{Blocks, RUN, Scales};
use super::tiles::{FIFTHS, TOPS, quant_bytes};
use crate::activation::GROUP;
use crate::linear::{Group, TileWeights};
use crate::matrix::TILE_ROWS;

/// Bytes that a lone row of activations fetches ahead.
const AHEAD: usize = 2048;

/// [`super::portable::run`] to the bit. One activation term is summed in two chains, two terms in
/// one chain each.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
pub(crate) fn run<B: Blocks, const M: usize, const TERMS: usize>(
    w: &TileWeights<'_>,
    b: usize,
    x: &Group<'_>,
    first: usize,
    acc: &mut [__m512; M],
) {
    if B::SCALES == Scales::Halves {
        return run_halves::<B, M, TERMS>(w, b, x, first, acc);
    }
    debug_assert!(w.quants.len() >= (b + 1) * quant_bytes(B::BITS));
    debug_assert!(x.q.len() >= (b + 1) * GROUP * RUN * TERMS && first + M <= GROUP);
    let at = b * GROUP + first;
    let (mut one, mut two) = ([_mm512_setzero_si512(); M], [_mm512_setzero_si512(); M]);
    // SAFETY: the tile has run b (callers loop over its runs; asserted above in debug builds), with
    // scales for 16 rows, and every row of activations has 32 columns of it.
    unsafe {
        if B::ZERO != 0 {
            for row in 0..M {
                let isum = x.isum.get_unchecked(2 * b * GROUP + first + row);
                let offset = isum.wrapping_mul(-B::ZERO);
                two[row] = _mm512_set1_epi32(offset);
            }
        }
        for j in 0..4 {
            let (left, right) = vectors::<B, M>(w, b, j);
            for row in 0..M {
                let q = x.q.as_ptr().add((at + row) * RUN * TERMS + j * 4);
                let four = |at: usize| _mm512_set1_epi32(q.add(at).cast::<i32>().read_unaligned());
                one[row] = _mm512_dpbusd_epi32(one[row], left, four(0));
                if TERMS == 1 {
                    two[row] = _mm512_dpbusd_epi32(two[row], right, four(16));
                } else {
                    two[row] = _mm512_dpbusd_epi32(two[row], left, four(RUN));
                    one[row] = _mm512_dpbusd_epi32(one[row], right, four(16));
                    two[row] = _mm512_dpbusd_epi32(two[row], right, four(RUN + 16));
                }
            }
        }
        let (scale, min) = scales::<B>(w, b);
        for row in 0..M {
            let high = if TERMS == 1 { one[row] } else { _mm512_slli_epi32::<4>(one[row]) };
            let dot = _mm512_cvtepi32_ps(_mm512_add_epi32(high, two[row]));
            acc[row] = _mm512_fmadd_ps(dot, scale, acc[row]);
            let sum = || _mm512_set1_ps(*x.sum.get_unchecked(at + row));
            acc[row] = match B::SCALES {
                Scales::Plain | Scales::Halves => acc[row],
                Scales::Min => _mm512_fmadd_ps(min, sum(), acc[row]),
                Scales::Super => _mm512_fnmadd_ps(min, sum(), acc[row]),
            };
        }
    }
}

/// As [`run`], for formats with a scale for each half of a run: one half after the other.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
fn run_halves<B: Blocks, const M: usize, const TERMS: usize>(
    w: &TileWeights<'_>,
    b: usize,
    x: &Group<'_>,
    first: usize,
    acc: &mut [__m512; M],
) {
    let at = b * GROUP + first;
    // SAFETY: as in `run`.
    unsafe {
        let (left_scale, right_scale) = scales::<B>(w, b);
        for (half, scale) in [left_scale, right_scale].into_iter().enumerate() {
            let (mut one, mut two) = ([_mm512_setzero_si512(); M], [_mm512_setzero_si512(); M]);
            for row in 0..M {
                let isum = |at: usize| *x.isum.get_unchecked(2 * b * GROUP + at + first + row);
                let isum = if half == 0 { isum(GROUP) } else { isum(0).wrapping_sub(isum(GROUP)) };
                two[row] = _mm512_set1_epi32(isum.wrapping_mul(-B::ZERO));
            }
            for j in 0..4 {
                let (left, right) = vectors::<B, M>(w, b, j);
                let u = if half == 0 { left } else { right };
                for row in 0..M {
                    let q = x.q.as_ptr().add((at + row) * RUN * TERMS + half * 16 + j * 4);
                    let four =
                        |at: usize| _mm512_set1_epi32(q.add(at).cast::<i32>().read_unaligned());
                    one[row] = _mm512_dpbusd_epi32(one[row], u, four(0));
                    if TERMS == 2 {
                        two[row] = _mm512_dpbusd_epi32(two[row], u, four(RUN));
                    }
                }
            }
            for row in 0..M {
                let high = if TERMS == 1 { one[row] } else { _mm512_slli_epi32::<4>(one[row]) };
                let dot = _mm512_cvtepi32_ps(_mm512_add_epi32(high, two[row]));
                acc[row] = _mm512_fmadd_ps(dot, scale, acc[row]);
            }
        }
    }
}

/// Scale and min of a run, min with the sign that its format stores; of [`Scales::Halves`] the
/// scales of both halves.
///
/// # Safety
/// The tile has run b.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c")]
pub(super) unsafe fn scales<B: Blocks>(w: &TileWeights<'_>, b: usize) -> (__m512, __m512) {
    // SAFETY: scales are there for every run the tile has.
    unsafe {
        let half = |of: &[u16]| {
            let of = of.as_ptr().add(w.scale_at::<B>(b));
            _mm512_cvtph_ps(_mm256_loadu_si256(of.cast()))
        };
        let integers = |of: &[u8]| {
            let bytes = _mm_loadu_si128(of.as_ptr().add(b * TILE_ROWS).cast());
            _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))
        };
        let signed = |of: &[u8]| {
            let bytes = _mm_loadu_si128(of.as_ptr().add(b * TILE_ROWS).cast());
            _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))
        };
        let scale = match B::SCALES {
            Scales::Plain | Scales::Min => half(w.d),
            Scales::Super => _mm512_mul_ps(half(w.d), integers(w.sc)),
            Scales::Halves => _mm512_mul_ps(half(w.d), signed(w.sc)),
        };
        let min = match B::SCALES {
            Scales::Plain => _mm512_setzero_ps(),
            Scales::Halves => _mm512_mul_ps(half(w.d), signed(w.mc)),
            Scales::Min => half(w.m),
            Scales::Super => _mm512_mul_ps(half(w.m), integers(w.mc)),
        };
        (scale, min)
    }
}

/// Columns 4j to 4j + 3 and 16 + 4j to 16 + 4j + 3 of all rows.
///
/// # Safety
/// The tile has run b.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) unsafe fn vectors<B: Blocks, const M: usize>(
    w: &TileWeights<'_>,
    b: usize,
    j: usize,
) -> (__m512i, __m512i) {
    // SAFETY: in bounds by the caller's promise; a prefetch may point anywhere.
    unsafe {
        let quants = w.quants.as_ptr().add(b * quant_bytes(B::BITS));
        let load = |at: usize| {
            if M == 1 {
                _mm_prefetch::<_MM_HINT_T0>(quants.wrapping_add(at + AHEAD).cast());
            }
            _mm512_loadu_si512(quants.add(at).cast())
        };
        if B::BITS == 8 {
            return (load(j * 128), load(j * 128 + 64));
        }
        let low = _mm512_set1_epi8(15);
        let packed = load(j * 64);
        let first = _mm512_and_si512(packed, low);
        let second = _mm512_and_si512(_mm512_srli_epi16::<4>(packed), low);
        if B::BITS == 4 {
            return (first, second);
        }
        if B::BITS == 6 {
            let tops = load(TOPS + j / 2 * 64);
            // Bits of vectors 2j and 2j + 1 to bits 4 and 5.
            let (first_top, second_top) = if j.is_multiple_of(2) {
                (_mm512_slli_epi16::<4>(tops), _mm512_slli_epi16::<2>(tops))
            } else {
                (tops, _mm512_srli_epi16::<2>(tops))
            };
            let mask = _mm512_set1_epi8(0x30);
            let with = |v, top| _mm512_or_si512(v, _mm512_and_si512(top, mask));
            return (with(first, first_top), with(second, second_top));
        }
        let masks = w.fifths.as_ptr().add(b * FIFTHS + j * 16).cast::<u64>();
        let sixteen = _mm512_set1_epi8(16);
        let with = |v, mask| _mm512_mask_add_epi8(v, mask, v, sixteen);
        (with(first, masks.read_unaligned()), with(second, masks.add(1).read_unaligned()))
    }
}
