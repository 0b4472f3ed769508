//! [`super::quantise_row`] with vectors of 16.

use std::arch::x86_64::*;

use super::{BLOCK, MAGIC, MAGIC_BITS};

/// Scale and its inverse of some whole runs.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) fn scale_of(x: &[f32], limit: f32) -> (f32, f32) {
    let zero = _mm512_setzero_ps();
    let (mut max, mut poison) = (zero, zero);
    for x in x.chunks_exact(16) {
        // SAFETY: 16 floats.
        let x = unsafe { _mm512_loadu_ps(x.as_ptr()) };
        max = _mm512_max_ps(_mm512_abs_ps(x), max);
        poison = _mm512_add_ps(poison, _mm512_mul_ps(x, zero));
    }
    let max = _mm512_reduce_max_ps(max);
    let d = max / limit + _mm512_reduce_add_ps(poison);
    (d, if max > 0.0 { 1.0 / d } else { 0.0 })
}

/// Rounds a run; returns the sums of the integers of both its halves.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) fn quantise_run<const TERMS: usize>(
    x: &[f32],
    inverse: f32,
    q: [&mut [i8]; TERMS],
) -> [i32; 2] {
    assert!(x.len() == BLOCK && q.iter().all(|q| q.len() == BLOCK), "a run");
    std::array::from_fn(|half| {
        // SAFETY: 16 floats and, of each term, 16 bytes.
        unsafe {
            let x = _mm512_loadu_ps(x.as_ptr().add(16 * half));
            let scaled = _mm512_mul_ps(x, _mm512_set1_ps(inverse));
            let rounded = _mm512_castps_si512(_mm512_add_ps(scaled, _mm512_set1_ps(MAGIC)));
            let integers = _mm512_sub_epi32(rounded, _mm512_set1_epi32(MAGIC_BITS));
            let put = |term: usize, integers| {
                let to = q[term].as_ptr().add(16 * half).cast_mut();
                _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(integers));
            };
            if TERMS == 1 {
                put(0, integers);
            } else {
                let eight = _mm512_set1_epi32(8);
                let raised = _mm512_add_epi32(integers, eight);
                put(0, _mm512_srai_epi32::<4>(raised));
                let low = _mm512_and_si512(raised, _mm512_set1_epi32(15));
                put(1, _mm512_sub_epi32(low, eight));
            }
            _mm512_reduce_add_epi32(integers)
        }
    })
}
