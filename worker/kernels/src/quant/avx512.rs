//! The dot products of runs with `vpdpbusd`: unsigned weights, signed activations, 16 rows in the
//! lanes.

use std::arch::x86_64::*;
use std::ops::Range;

use super::blocks::{Blocks, RUN, Scales};
use super::tiles::{HALVES, LINE, Places, TOPS};
use crate::activation::EIGHT;
use crate::linear::{Group, TileWeights};
use crate::matrix::TILE_ROWS;

/// How far ahead weights are fetched, in bytes: on Zen 5, 4 to 8 KiB are alike while memory is slow,
/// and 6 KiB the fastest while it is quick.
const AHEAD: usize = 6144;

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
    debug_assert!(w.bytes.len() >= B::run_at(w.first_run, runs.end - 1) + B::RUN_BYTES);
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
        for row in 0..M {
            offsets[row] = start::<B>(*x.offset.get_unchecked(b * x.side + first + row));
        }
        let weights = at::<B>(w, b);
        if x.fetches {
            fetch::<B>(weights);
        }
        let dots = dots::<B, M, TERMS, ALL>(weights, b, x, first, offsets);
        let (scale, min) = scales::<B>(weights, head::<B>(w, b));
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

/// What dot products begin with, so that weights count from their zero: `-ZERO` times the sum of the
/// activations, of which `offset` is `-EIGHT` times.
#[inline]
#[target_feature(enable = "avx512f")]
fn start<B: Blocks>(offset: i32) -> __m512i {
    const { assert!(B::ZERO == 0 || B::ZERO == EIGHT << (B::ZERO / EIGHT).trailing_zeros()) };
    if B::ZERO == 0 {
        return _mm512_setzero_si512();
    }
    let shift = (B::ZERO / EIGHT).trailing_zeros();
    _mm512_sllv_epi32(_mm512_set1_epi32(offset), _mm512_set1_epi32(shift as i32))
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
    let mut sums = [_mm512_setzero_si512(); M];
    // SAFETY: the caller's promise.
    unsafe {
        for b in runs.clone() {
            let weights = at::<B>(w, b);
            if x.fetches {
                fetch::<B>(weights);
            }
            let (left, right) = integer_scales::<B>(weights);
            let nothing = [_mm512_setzero_si512(); M];
            let (mut left_dots, mut right_dots) = (nothing, nothing);
            for row in 0..M {
                let [left, right] = *x.half_offsets.get_unchecked(b * x.side + first + row);
                (left_dots[row], right_dots[row]) = (start::<B>(left), start::<B>(right));
            }
            left_dots = dots::<B, M, TERMS, LEFT>(weights, b, x, first, left_dots);
            right_dots = dots::<B, M, TERMS, RIGHT>(weights, b, x, first, right_dots);
            for row in 0..M {
                let left = _mm512_mullo_epi32(left_dots[row], left);
                let right = _mm512_mullo_epi32(right_dots[row], right);
                sums[row] = _mm512_add_epi32(sums[row], _mm512_add_epi32(left, right));
            }
        }
        let d = halves_of(head::<B>(w, runs.start));
        for row in 0..M {
            acc[row] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[row]), d, acc[row]);
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
    weights: *const u8,
    b: usize,
    x: &Group<'_>,
    first: usize,
    from: [__m512i; M],
) -> [__m512i; M] {
    let (mut one, mut two) = ([_mm512_setzero_si512(); M], from);
    for j in 0..4 {
        // SAFETY: the caller's promise.
        let (left, right) = unsafe { vectors::<B>(weights, j) };
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

/// The bytes of run b.
///
/// # Safety
/// The tile has it.
#[inline(always)]
pub(super) unsafe fn at<B: Blocks>(w: &TileWeights<'_>, b: usize) -> *const u8 {
    // SAFETY: in bounds by the caller's promise.
    unsafe { w.bytes.as_ptr().add(B::run_at(w.first_run, b)) }
}

/// The f16 scales of run b.
///
/// # Safety
/// The tile has it.
#[inline(always)]
pub(super) unsafe fn head<B: Blocks>(w: &TileWeights<'_>, b: usize) -> *const u8 {
    // SAFETY: in bounds by the caller's promise.
    unsafe { w.bytes.as_ptr().add(B::head_at(w.first_run, b)) }
}

/// Brings near, past the outer caches, what is read soon after a run: into all of them it comes a
/// twentieth slower on Zen 5, into the second one a tenth. Once a run and not at each load: between
/// the products of few rows it would have the compiler move their operands to the stack.
#[inline]
#[target_feature(enable = "avx512f")]
fn fetch<B: Blocks>(run: *const u8) {
    for line in (0..B::RUN_BYTES).step_by(LINE) {
        _mm_prefetch::<_MM_HINT_NTA>(run.wrapping_add(AHEAD + line).cast());
    }
}

/// Integer scales of both halves of a run.
///
/// # Safety
/// It is one of a format with super-blocks.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn integer_scales<B: Blocks>(run: *const u8) -> (__m512i, __m512i) {
    // SAFETY: a run has 16 of each.
    unsafe {
        let scales = run.add(B::SCALES_AT);
        let signed = |of: *const u8| _mm512_cvtepi8_epi32(_mm_loadu_si128(of.cast()));
        (signed(scales), signed(scales.add(TILE_ROWS)))
    }
}

/// 16 f16 numbers.
///
/// # Safety
/// They are there.
#[inline]
#[target_feature(enable = "avx512f,f16c")]
pub(super) unsafe fn halves_of(at: *const u8) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(at.cast())) }
}

/// Scale and min of a run, min with the sign that its format stores.
///
/// # Safety
/// It is one of this format, and so is the head.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c")]
pub(super) unsafe fn scales<B: Blocks>(run: *const u8, head: *const u8) -> (__m512, __m512) {
    // SAFETY: scales are there for 16 rows.
    unsafe {
        match B::SCALES {
            Scales::Plain | Scales::Halves => (halves_of(head), _mm512_setzero_ps()),
            Scales::Min => (halves_of(head), halves_of(head.add(HALVES))),
            Scales::Super => {
                let (sc, mc) = integer_scales::<B>(run);
                let times = |halves, integers| _mm512_mul_ps(halves, _mm512_cvtepi32_ps(integers));
                (times(halves_of(head), sc), times(halves_of(head.add(HALVES)), mc))
            }
        }
    }
}

/// The 64 bytes at `at` of a run.
///
/// # Safety
/// The run has them.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load(run: *const u8, at: usize) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe { _mm512_loadu_si512(run.add(at).cast()) }
}

/// Columns 4j to 4j + 3, low, and 16 + 4j to 16 + 4j + 3, high, of all rows of a format of 4 bits.
///
/// # Safety
/// It is a run of one.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn nibbles(run: *const u8, j: usize) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe { load(run, j * 64) }
}

/// Columns 4j to 4j + 3 and 16 + 4j to 16 + 4j + 3 of all rows.
///
/// # Safety
/// It is a run of this format.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) unsafe fn vectors<B: Blocks>(run: *const u8, j: usize) -> (__m512i, __m512i) {
    // SAFETY: in bounds by the caller's promise.
    unsafe {
        let load = |at: usize| load(run, at);
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
        let masks = run.add(B::FIFTHS_AT + j * 16).cast::<u64>();
        let sixteen = _mm512_set1_epi8(16);
        let with = |v, mask| _mm512_mask_add_epi8(v, mask, v, sixteen);
        (with(first, masks.read_unaligned()), with(second, masks.add(1).read_unaligned()))
    }
}
