//! Sixteen f32 lanes as attention uses them, on AVX-512, AVX2 and plain Rust. Every operation rounds
//! once and the same way on all three, so bodies written over this trait give equal bits.

use half::f16;

use crate::lanes::LANES;
use crate::math;

/// One instruction set's lanes.
///
/// # Safety
/// Its functions may only run where the machine has the instruction set; pointers must be good for
/// the sixteen values (any alignment).
pub(super) unsafe trait Simd {
    type V: Copy;

    /// Values that its registers hold as sums beside what goes into them.
    const ACCUMULATORS: usize;
    /// Queries that it takes at a time; at most [`super::tile::TILE`].
    const TILE: usize;

    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(from: *const f32) -> Self::V;
    unsafe fn store(to: *mut f32, v: Self::V);
    unsafe fn load_f16(from: *const u8) -> Self::V;
    unsafe fn load_i8(from: *const u8) -> Self::V;
    /// To the nearest f16, ties to even.
    unsafe fn store_f16(to: *mut u16, v: Self::V);
    /// `a * b + c`, one rounding.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    /// `a > b ? a : b` per lane.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// Lanes from `n` on become minus infinity.
    unsafe fn mask_from(v: Self::V, n: usize) -> Self::V;
    /// `a < b ? a : b` per lane.
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// 2 to the power of a lane, which is a whole number of a normal number's exponent.
    unsafe fn power_of_2(v: Self::V) -> Self::V;
    /// 0 where `x` is below `bound`, else `v`.
    unsafe fn zero_below(v: Self::V, x: Self::V, bound: f32) -> Self::V;
    /// Brings a cache line into the first-level cache; any address will do.
    unsafe fn prefetch(at: *const u8);

    unsafe fn to_array(v: Self::V) -> [f32; LANES];

    /// [`math::exp`] per lane.
    #[inline(always)]
    unsafe fn exp(x: Self::V) -> Self::V {
        use math::{HIGH, LN2_HIGH, LN2_LOW, LOW, POLYNOMIAL, ROUND};
        // SAFETY: the trait's promise.
        unsafe {
            let splat = |x: f32| Self::splat(x);
            let clamped = Self::min(splat(HIGH), Self::max(splat(LOW), x));
            let n = Self::fma(clamped, splat(std::f32::consts::LOG2_E), splat(ROUND));
            let n = Self::sub(n, splat(ROUND));
            let r = Self::fma(n, splat(-LN2_HIGH), clamped);
            let r = Self::fma(n, splat(-LN2_LOW), r);
            let mut p = splat(POLYNOMIAL[0]);
            for term in &POLYNOMIAL[1..] {
                p = Self::fma(p, r, splat(*term));
            }
            Self::zero_below(Self::mul(p, Self::power_of_2(n)), x, LOW)
        }
    }
}

/// `f` of each index. The library's functions of this kind are calls that compute without the
/// instruction set they are called from.
#[inline(always)]
pub(super) fn each<T: Copy + Default, const N: usize>(f: impl Fn(usize) -> T) -> [T; N] {
    let mut all = [T::default(); N];
    for (i, one) in all.iter_mut().enumerate() {
        *one = f(i);
    }
    all
}

/// Whatever the machine is.
pub(super) struct Plain;

// SAFETY: plain Rust; the pointers are the callers' promise.
unsafe impl Simd for Plain {
    type V = [f32; LANES];

    const ACCUMULATORS: usize = 1;
    const TILE: usize = 1;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        [x; LANES]
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::V {
        // SAFETY: the trait's promise.
        unsafe { from.cast::<Self::V>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, v: Self::V) {
        // SAFETY: the trait's promise.
        unsafe { to.cast::<Self::V>().write_unaligned(v) }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> Self::V {
        // SAFETY: the trait's promise.
        let bits = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        each(|i| f16::from_bits(bits[i]).to_f32_const())
    }

    #[inline(always)]
    unsafe fn load_i8(from: *const u8) -> Self::V {
        // SAFETY: the trait's promise.
        let numbers = unsafe { from.cast::<[i8; LANES]>().read_unaligned() };
        each(|i| f32::from(numbers[i]))
    }

    #[inline(always)]
    unsafe fn store_f16(to: *mut u16, v: Self::V) {
        let bits: [u16; LANES] = each(|i| f16::from_f32_const(v[i]).to_bits());
        // SAFETY: the trait's promise.
        unsafe { to.cast::<[u16; LANES]>().write_unaligned(bits) }
    }

    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        each(|i| a[i].mul_add(b[i], c[i]))
    }

    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        each(|i| a[i] * b[i])
    }

    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        each(|i| a[i] + b[i])
    }

    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        each(|i| a[i] - b[i])
    }

    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        each(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    unsafe fn mask_from(v: Self::V, n: usize) -> Self::V {
        each(|i| if i < n { v[i] } else { f32::NEG_INFINITY })
    }

    #[inline(always)]
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
        each(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    unsafe fn power_of_2(v: Self::V) -> Self::V {
        each(|i| f32::from_bits(math::power_of_2_bits(v[i] + math::ROUND)))
    }

    #[inline(always)]
    unsafe fn zero_below(v: Self::V, x: Self::V, bound: f32) -> Self::V {
        each(|i| if x[i] < bound { 0.0 } else { v[i] })
    }

    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}

    #[inline(always)]
    unsafe fn to_array(v: Self::V) -> [f32; LANES] {
        v
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{LANES, Simd, each};

    /// AVX-512 F: one register for all lanes.
    pub(in super::super) struct Avx512;

    // SAFETY: intrinsics of AVX-512 F; the instruction set and the pointers are the callers' promise.
    #[allow(clippy::undocumented_unsafe_blocks)] // each block is one intrinsic under that promise
    unsafe impl Simd for Avx512 {
        type V = __m512;

        const ACCUMULATORS: usize = 16;
        const TILE: usize = 8;

        #[inline(always)]
        unsafe fn splat(x: f32) -> Self::V {
            unsafe { _mm512_set1_ps(x) }
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self::V {
            // SAFETY: the trait's promise.
            unsafe { _mm512_loadu_ps(from) }
        }

        #[inline(always)]
        unsafe fn store(to: *mut f32, v: Self::V) {
            unsafe { _mm512_storeu_ps(to, v) }
        }

        #[inline(always)]
        unsafe fn load_f16(from: *const u8) -> Self::V {
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
        }

        #[inline(always)]
        unsafe fn load_i8(from: *const u8) -> Self::V {
            // SAFETY: the trait's promise.
            unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))) }
        }

        #[inline(always)]
        unsafe fn store_f16(to: *mut u16, v: Self::V) {
            const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
            unsafe { _mm256_storeu_si256(to.cast(), _mm512_cvtps_ph::<NEAREST>(v)) }
        }

        #[inline(always)]
        unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }

        #[inline(always)]
        unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: the trait's promise.
            unsafe { _mm512_mul_ps(a, b) }
        }

        #[inline(always)]
        unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
            unsafe { _mm512_add_ps(a, b) }
        }

        #[inline(always)]
        unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
            unsafe { _mm512_sub_ps(a, b) }
        }

        #[inline(always)]
        unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: the trait's promise.
            unsafe { _mm512_max_ps(a, b) }
        }

        #[inline(always)]
        unsafe fn mask_from(v: Self::V, n: usize) -> Self::V {
            let keep = ((1u32 << n.min(LANES)) - 1) as u16;
            unsafe { _mm512_mask_mov_ps(_mm512_set1_ps(f32::NEG_INFINITY), keep, v) }
        }

        #[inline(always)]
        unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
            unsafe { _mm512_min_ps(a, b) }
        }

        #[inline(always)]
        unsafe fn power_of_2(v: Self::V) -> Self::V {
            // SAFETY: the trait's promise.
            unsafe {
                let n = _mm512_add_epi32(_mm512_cvttps_epi32(v), _mm512_set1_epi32(127));
                _mm512_castsi512_ps(_mm512_slli_epi32::<23>(n))
            }
        }

        #[inline(always)]
        unsafe fn zero_below(v: Self::V, x: Self::V, bound: f32) -> Self::V {
            unsafe {
                let below = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(x, _mm512_set1_ps(bound));
                _mm512_mask_mov_ps(v, below, _mm512_setzero_ps())
            }
        }

        #[inline(always)]
        unsafe fn prefetch(at: *const u8) {
            // SAFETY: the trait's promise.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
        }

        #[inline(always)]
        unsafe fn to_array(v: Self::V) -> [f32; LANES] {
            unsafe { std::mem::transmute(v) }
        }
    }

    /// AVX2, FMA and F16C: two registers for all lanes.
    pub(in super::super) struct Avx2;

    // SAFETY: intrinsics of AVX2, FMA and F16C; the instruction set and the pointers are the callers'
    // promise.
    #[allow(clippy::undocumented_unsafe_blocks)] // each block is one intrinsic under that promise
    unsafe impl Simd for Avx2 {
        type V = [__m256; 2];

        const ACCUMULATORS: usize = 4;
        const TILE: usize = 4;

        #[inline(always)]
        unsafe fn splat(x: f32) -> Self::V {
            unsafe { [_mm256_set1_ps(x); 2] }
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self::V {
            // SAFETY: the trait's promise.
            unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
        }

        #[inline(always)]
        unsafe fn store(to: *mut f32, v: Self::V) {
            unsafe {
                _mm256_storeu_ps(to, v[0]);
                _mm256_storeu_ps(to.add(8), v[1]);
            }
        }

        #[inline(always)]
        unsafe fn load_f16(from: *const u8) -> Self::V {
            // SAFETY: the trait's promise.
            unsafe {
                let (low, high) = (_mm_loadu_si128(from.cast()), from.add(16).cast());
                [_mm256_cvtph_ps(low), _mm256_cvtph_ps(_mm_loadu_si128(high))]
            }
        }

        #[inline(always)]
        unsafe fn load_i8(from: *const u8) -> Self::V {
            unsafe {
                let (low, high) = (_mm_loadl_epi64(from.cast()), from.add(8).cast());
                let wide = [_mm256_cvtepi8_epi32(low), _mm256_cvtepi8_epi32(_mm_loadl_epi64(high))];
                [_mm256_cvtepi32_ps(wide[0]), _mm256_cvtepi32_ps(wide[1])]
            }
        }

        #[inline(always)]
        unsafe fn store_f16(to: *mut u16, v: Self::V) {
            const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT;
            // SAFETY: the trait's promise.
            unsafe {
                _mm_storeu_si128(to.cast(), _mm256_cvtps_ph::<NEAREST>(v[0]));
                _mm_storeu_si128(to.add(8).cast(), _mm256_cvtps_ph::<NEAREST>(v[1]));
            }
        }

        #[inline(always)]
        unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
            unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
        }

        #[inline(always)]
        unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: the trait's promise.
            unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
        }

        #[inline(always)]
        unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
            unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
        }

        #[inline(always)]
        unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
            unsafe { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
        }

        #[inline(always)]
        unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: the trait's promise.
            unsafe { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
        }

        #[inline(always)]
        unsafe fn mask_from(v: Self::V, n: usize) -> Self::V {
            let lanes: [f32; LANES] = unsafe { std::mem::transmute(v) };
            let masked = each(|i| if i < n { lanes[i] } else { f32::NEG_INFINITY });
            unsafe { std::mem::transmute::<[f32; LANES], Self::V>(masked) }
        }

        #[inline(always)]
        unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: the trait's promise.
            unsafe { [_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])] }
        }

        #[inline(always)]
        unsafe fn power_of_2(v: Self::V) -> Self::V {
            unsafe {
                let bias = _mm256_set1_epi32(127);
                let low = _mm256_add_epi32(_mm256_cvttps_epi32(v[0]), bias);
                let high = _mm256_add_epi32(_mm256_cvttps_epi32(v[1]), bias);
                [
                    _mm256_castsi256_ps(_mm256_slli_epi32::<23>(low)),
                    _mm256_castsi256_ps(_mm256_slli_epi32::<23>(high)),
                ]
            }
        }

        #[inline(always)]
        unsafe fn zero_below(v: Self::V, x: Self::V, bound: f32) -> Self::V {
            // SAFETY: the trait's promise.
            unsafe {
                let bound = _mm256_set1_ps(bound);
                let below = [
                    _mm256_cmp_ps::<_CMP_LT_OQ>(x[0], bound),
                    _mm256_cmp_ps::<_CMP_LT_OQ>(x[1], bound),
                ];
                [_mm256_andnot_ps(below[0], v[0]), _mm256_andnot_ps(below[1], v[1])]
            }
        }

        #[inline(always)]
        unsafe fn prefetch(at: *const u8) {
            // SAFETY: the trait's promise.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
        }

        #[inline(always)]
        unsafe fn to_array(v: Self::V) -> [f32; LANES] {
            unsafe { std::mem::transmute(v) }
        }
    }
}

/// Calls `body::<S>`, compiled for the instruction set of `isa`, with its lanes for `S`.
macro_rules! dispatch_simd {
    ($isa:expr, fn($($arg:ident: $ty:ty),* $(,)?) => $body:ident $(::<$($generic:ty),+>)?) => {{
        use $crate::attention::simd;
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
        fn avx512($($arg: $ty),*) {
            // SAFETY: the instruction set is there, by the attribute; the rest is the caller's.
            unsafe { $body::<simd::Avx512 $($(, $generic)+)?>($($arg),*) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c")]
        fn avx2($($arg: $ty),*) {
            // SAFETY: as above.
            unsafe { $body::<simd::Avx2 $($(, $generic)+)?>($($arg),*) }
        }
        fn portable($($arg: $ty),*) {
            // SAFETY: as above.
            unsafe { $body::<simd::Plain $($(, $generic)+)?>($($arg),*) }
        }
        match $isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `Isa` values other than Portable come from `Isa::detect` or
            // `Isa::available`, which checked the CPU's features.
            $crate::isa::Isa::Avx512Amx | $crate::isa::Isa::Avx512Vnni => unsafe {
                avx512($($arg),*)
            },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            $crate::isa::Isa::Avx2 => unsafe { avx2($($arg),*) },
            #[cfg(not(target_arch = "x86_64"))]
            _ => portable($($arg),*),
            #[cfg(target_arch = "x86_64")]
            $crate::isa::Isa::Portable => portable($($arg),*),
        }
    }};
}
pub(super) use dispatch_simd;
