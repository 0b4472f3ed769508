//! The dot products of runs with `vpdpbusd`: unsigned weights, signed activations, 16 rows in the
//! lanes.

use std::arch::x86_64::*;
use std::ops::Range;

use super::blocks::{Blocks, RUN, Scales};
use super::tiles::{FIFTHS, LINE, TOPS, quant_bytes};
use crate::linear::{Group, TileWeights};
use crate::matrix::TILE_ROWS;

/// Bytes of quants that are fetched ahead. Scales are fetched a tile ahead.
const AHEAD: usize = 8192;

type Sums<const M: usize> = [__m512; M];

/// Columns of a run that a dot product is of.
const ALL: u8 = 0;
const LEFT: u8 = 1;
const RIGHT: u8 = 2;

/// [`super::portable::runs`] to the bit.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
pub(crate) fn runs<B: Blocks, const M: usize, const TERMS: usize>(
    w: &TileWeights<'_>,
    runs: Range<usize>,
    x: &Group<'_>,
    first: usize,
) -> Sums<M> {
    debug_assert!(w.quants.len() >= runs.end * quant_bytes(B::BITS));
    debug_assert!(x.sum.len() >= runs.end * x.side && first + M <= x.side);
    let mut acc = [_mm512_setzero_ps(); M];
    // SAFETY: the tile has these runs (callers loop over its runs; asserted above in debug builds),
    // with scales for 16 rows, and every row of activations has 32 columns of each.
    unsafe {
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
    }
    acc
}

/// Adds run b's products to the sums.
///
/// # Safety
/// Weights and activations have run b.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
unsafe fn run<B: Blocks, const M: usize, const TERMS: usize>(
    w: &TileWeights<'_>,
    b: usize,
    x: &Group<'_>,
    first: usize,
    acc: &mut Sums<M>,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut offsets = [_mm512_setzero_si512(); M];
        if B::ZERO != 0 {
            let zero = _mm512_set1_epi16(-B::ZERO as i16);
            for row in 0..M {
                offsets[row] = _mm512_dpwssd_epi32(offsets[row], halves(x, b, first + row), zero);
            }
        }
        if x.fetches {
            fetch::<B>(w, b);
        }
        let dots = dots::<B, M, TERMS, ALL>(w, b, x, first, offsets);
        let (scale, min) = scales::<B>(w, b);
        for row in 0..M {
            acc[row] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[row]), scale, acc[row]);
            let sum = || _mm512_set1_ps(*x.sum.get_unchecked(b * x.side + first + row));
            acc[row] = match B::SCALES {
                Scales::Plain | Scales::Halves => acc[row],
                Scales::Min => _mm512_fmadd_ps(min, sum(), acc[row]),
                Scales::Super => _mm512_fnmadd_ps(min, sum(), acc[row]),
            };
        }
    }
}

/// Adds the products of runs of one super-block, which are summed as integers.
///
/// # Safety
/// Weights and activations have these runs, weights in one super-block.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
unsafe fn super_runs<B: Blocks, const M: usize, const TERMS: usize>(
    w: &TileWeights<'_>,
    runs: Range<usize>,
    x: &Group<'_>,
    first: usize,
    acc: &mut Sums<M>,
) {
    let nothing = [_mm512_setzero_si512(); M];
    let (mut sums, mut offsets) = (nothing, nothing);
    // SAFETY: the caller's promise.
    unsafe {
        for b in runs.clone() {
            if x.fetches {
                fetch::<B>(w, b);
            }
            let (left, right) = integer_scales(w, b);
            let add = |sums: &mut [__m512i; M], dots: [__m512i; M], scale| {
                for (sum, dot) in sums.iter_mut().zip(dots) {
                    *sum = _mm512_add_epi32(*sum, _mm512_mullo_epi32(dot, scale));
                }
            };
            add(&mut sums, dots::<B, M, TERMS, LEFT>(w, b, x, first, nothing), left);
            add(&mut sums, dots::<B, M, TERMS, RIGHT>(w, b, x, first, nothing), right);
        }
        // What zero's integer adds, from the sums of the activations.
        for b in runs.clone() {
            let (left, right) = integer_scales(w, b);
            let both = _mm512_mask_blend_epi16(0xaaaa_aaaa, left, _mm512_slli_epi32::<16>(right));
            let both = _mm512_mullo_epi16(both, _mm512_set1_epi16(B::ZERO as i16));
            for row in 0..M {
                offsets[row] = _mm512_dpwssd_epi32(offsets[row], halves(x, b, first + row), both);
            }
        }
        let d = w.d.as_ptr().add(w.scale_at::<B>(runs.start));
        let d = _mm512_cvtph_ps(_mm256_loadu_si256(d.cast()));
        for row in 0..M {
            let sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[row], offsets[row]));
            acc[row] = _mm512_fmadd_ps(sum, d, acc[row]);
        }
    }
}

/// Dot products of a run's columns, or of half of them, added to `from`. One activation term is
/// summed in two chains, two terms in one chain each.
///
/// # Safety
/// Weights and activations have run b.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn dots<B: Blocks, const M: usize, const TERMS: usize, const PART: u8>(
    w: &TileWeights<'_>,
    b: usize,
    x: &Group<'_>,
    first: usize,
    from: [__m512i; M],
) -> [__m512i; M] {
    let (mut one, mut two) = ([_mm512_setzero_si512(); M], from);
    for j in 0..4 {
        // SAFETY: the caller's promise.
        let (left, right) = unsafe { vectors::<B>(w, b, j) };
        for row in 0..M {
            let four = |term: usize, column: usize| {
                let at = x.place(TERMS, b, first + row) + term * RUN + column;
                // SAFETY: as above.
                _mm512_set1_epi32(unsafe { x.q.as_ptr().add(at).cast::<i32>().read_unaligned() })
            };
            let (one, two) = (&mut one[row], &mut two[row]);
            if PART != RIGHT {
                *one = _mm512_dpbusd_epi32(*one, left, four(0, 4 * j));
            }
            if TERMS == 2 {
                if PART != RIGHT {
                    *two = _mm512_dpbusd_epi32(*two, left, four(1, 4 * j));
                }
                if PART != LEFT {
                    *one = _mm512_dpbusd_epi32(*one, right, four(0, 16 + 4 * j));
                    *two = _mm512_dpbusd_epi32(*two, right, four(1, 16 + 4 * j));
                }
            } else if PART != LEFT {
                *two = _mm512_dpbusd_epi32(*two, right, four(0, 16 + 4 * j));
            }
        }
    }
    std::array::from_fn(|row| {
        let high = if TERMS == 1 { one[row] } else { _mm512_slli_epi32::<4>(one[row]) };
        _mm512_add_epi32(high, two[row])
    })
}

/// Brings near the quants that are read soon after run b's, and what run b of the next tile has
/// beside its own. Once a run and not at each load: between the products of few rows it would have
/// the compiler move their operands to the stack.
#[inline]
#[target_feature(enable = "avx512f")]
fn fetch<B: Blocks>(w: &TileWeights<'_>, b: usize) {
    let mut ahead = b * quant_bytes(B::BITS) + AHEAD;
    if ahead >= w.quants.len() {
        ahead += w.len - w.quants.len();
    }
    let ahead = w.quants.as_ptr().wrapping_add(ahead);
    for line in (0..quant_bytes(B::BITS)).step_by(LINE) {
        _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(line).cast());
    }
    fetch_scales::<B>(w, b);
}

/// Brings near what run b of the next tile has beside its quants: a processor sees where they go on
/// in a tile, but not where those of the next begin.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn fetch_scales<B: Blocks>(w: &TileWeights<'_>, b: usize) {
    let line = |of: *const u8, at: usize| {
        if at.is_multiple_of(LINE) {
            _mm_prefetch::<_MM_HINT_T0>(of.wrapping_add(at + w.len).cast());
        }
    };
    let halves = 2 * w.scale_at::<B>(b);
    line(w.d.as_ptr().cast(), halves);
    if B::SCALES.has_min() {
        line(w.m.as_ptr().cast(), halves);
    }
    if B::SCALES.is_super() {
        line(w.sc.as_ptr(), b * TILE_ROWS);
        line(w.mc.as_ptr(), b * TILE_ROWS);
    }
    if B::BITS == 5 {
        line(w.fifths.as_ptr(), b * FIFTHS);
    }
}

/// The sums of both halves of a row's run, in all lanes.
///
/// # Safety
/// The group has run b.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn halves(x: &Group<'_>, b: usize, row: usize) -> __m512i {
    // SAFETY: the caller's promise; a pair of 16 bits is 32, of any alignment.
    unsafe {
        let pair = x.halves.as_ptr().add(b * x.side + row).cast::<i32>();
        _mm512_set1_epi32(pair.read_unaligned())
    }
}

/// Integer scales of both halves of a run.
///
/// # Safety
/// The tile has run b.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn integer_scales(w: &TileWeights<'_>, b: usize) -> (__m512i, __m512i) {
    // SAFETY: scales are there for 16 rows of every run the tile has.
    unsafe {
        let signed = |of: &[u8]| {
            _mm512_cvtepi8_epi32(_mm_loadu_si128(of.as_ptr().add(b * TILE_ROWS).cast()))
        };
        (signed(w.sc), signed(w.mc))
    }
}

/// Scale and min of a run, min with the sign that its format stores.
///
/// # Safety
/// The tile has run b, and its runs have scales of their own.
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
        match B::SCALES {
            Scales::Plain | Scales::Halves => (half(w.d), _mm512_setzero_ps()),
            Scales::Min => (half(w.d), half(w.m)),
            Scales::Super => {
                (_mm512_mul_ps(half(w.d), integers(w.sc)), _mm512_mul_ps(half(w.m), integers(w.mc)))
            }
        }
    }
}

/// The 64 bytes at `at` of run b's quants.
///
/// # Safety
/// The tile has run b, and its quants have these bytes.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load<B: Blocks>(w: &TileWeights<'_>, b: usize, at: usize) -> __m512i {
    let at = b * quant_bytes(B::BITS) + at;
    // SAFETY: the caller's promise.
    unsafe { _mm512_loadu_si512(w.quants.as_ptr().add(at).cast()) }
}

/// Columns 4j to 4j + 3, low, and 16 + 4j to 16 + 4j + 3, high, of all rows of a format of 4 bits.
///
/// # Safety
/// The tile has run b.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn nibbles<B: Blocks>(w: &TileWeights<'_>, b: usize, j: usize) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe { load::<B>(w, b, j * 64) }
}

/// Columns 4j to 4j + 3 and 16 + 4j to 16 + 4j + 3 of all rows.
///
/// # Safety
/// The tile has run b.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) unsafe fn vectors<B: Blocks>(
    w: &TileWeights<'_>,
    b: usize,
    j: usize,
) -> (__m512i, __m512i) {
    // SAFETY: in bounds by the caller's promise.
    unsafe {
        let load = |at: usize| load::<B>(w, b, at);
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
