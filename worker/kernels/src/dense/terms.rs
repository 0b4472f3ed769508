//! Activations as bf16: one term, rounded to nearest, or a second one for what the first left out
//! (16 bits of mantissa). In the order in which a tile register reads them.

use crate::activation::{BLOCK, Precision};
use crate::isa::{Isa, dispatch};
use crate::memory::Memory;
use crate::pool::{Pool, Shards, part};

/// Rows of activations side by side: those of a tile register.
pub(crate) const GROUP: usize = 16;

/// Numbers of one term of a group's block.
pub(crate) const GROUP_BLOCK: usize = GROUP * BLOCK;

/// One term of a row's block.
#[repr(C, align(64))]
struct Line([u16; BLOCK]);

/// Rows of activations in bf16. Memory comes with the first use: most models need none.
#[derive(Debug, Default)]
pub(crate) struct Terms {
    /// `[row / 16, column / 32, term, row % 16, 32]`, bf16 bits.
    memory: Option<Memory>,
    /// Terms of a number.
    n: usize,
}

impl Terms {
    /// Rounds `x`, `[rows, columns]`.
    pub(crate) fn fill(
        &mut self,
        pool: &mut Pool,
        isa: Isa,
        precision: Precision,
        x: &[f32],
        columns: usize,
    ) {
        self.n = precision.terms();
        let rows = x.len() / columns;
        let n_groups = rows.div_ceil(GROUP);
        let group_lines = columns / BLOCK * self.n * GROUP;
        let out = Shards::new(&mut self.lines_mut(n_groups * group_lines)[..]);
        let work = |groups: std::ops::Range<usize>| {
            for group in groups {
                let first = group * GROUP;
                let x = &x[first * columns..rows.min(first + GROUP) * columns];
                // SAFETY: each group is one thread's.
                let out = unsafe { out.range(group * group_lines..(group + 1) * group_lines) };
                match precision {
                    Precision::Int8 => fill_group::<1>(isa, x, columns, out),
                    Precision::Int12 => fill_group::<2>(isa, x, columns, out),
                }
            }
        };
        let n_threads = pool.n_threads();
        if n_groups < n_threads {
            work(0..n_groups);
        } else {
            pool.run(&|thread| work(part(n_groups, thread, n_threads)));
        }
    }

    /// Room for `n` lines: grown to the largest step so far.
    fn lines_mut(&mut self, n: usize) -> &mut [Line] {
        let bytes = n * size_of::<Line>();
        if self.memory.as_ref().is_none_or(|memory| memory.len() < bytes) {
            self.memory = Some(Memory::zeroed(bytes).expect("the system gives memory for a step"));
        }
        let memory = self.memory.as_mut().expect("there is memory now");
        // SAFETY: a `Line` is 64 plain bytes; memory begins on a cache line and has that many.
        unsafe { std::slice::from_raw_parts_mut(memory.as_mut_ptr().cast(), n) }
    }

    /// A group's blocks, of each term 16 x 32.
    #[inline(always)]
    pub(crate) fn group(&self, group: usize, columns: usize) -> &[u16] {
        let bytes = columns * self.n * GROUP * 2;
        let memory: &[u8] = self.memory.as_deref().unwrap_or_default();
        let bytes = &memory[group * bytes..(group + 1) * bytes];
        // SAFETY: plain numbers; memory and groups begin on cache lines.
        unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), bytes.len() / 2) }
    }
}

/// Block by block: a row at a time would write to one cache line in sixteen.
fn fill_group<const TERMS: usize>(isa: Isa, x: &[f32], columns: usize, out: &mut [Line]) {
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Avx512Amx {
        // SAFETY: `Isa::Avx512Amx` was detected on this CPU.
        return unsafe { fill_group_avx512::<TERMS>(x, columns, out) };
    }
    dispatch!(isa, fn<TERMS>(x: &[f32], columns: usize, out: &mut [Line]) => {
        for (b, lines) in out.chunks_exact_mut(TERMS * GROUP).enumerate() {
            for (row, x) in x.chunks_exact(columns).enumerate() {
                let mut low = [0f32; BLOCK];
                put(&x[b * BLOCK..(b + 1) * BLOCK], &mut low, &mut lines[row]);
                if TERMS == 2 {
                    put(&low, &mut [0f32; BLOCK], &mut lines[GROUP + row]);
                }
            }
        }
    });
}

/// [`fill_group`] with the instructions for it, which take subnormals as zero.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn fill_group_avx512<const TERMS: usize>(x: &[f32], columns: usize, out: &mut [Line]) {
    use std::arch::x86_64::*;
    for (b, lines) in out.chunks_exact_mut(TERMS * GROUP).enumerate() {
        for (row, x) in x.chunks_exact(columns).enumerate() {
            let x = &x[b * BLOCK..(b + 1) * BLOCK];
            // SAFETY: 32 floats are read, and a line of 64 bytes a term is written.
            unsafe {
                let halves = [_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(16))];
                let round = |halves: [__m512; 2]| {
                    std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(
                        halves[1], halves[0],
                    ))
                };
                let high = round(halves);
                _mm512_store_si512(lines[row].0.as_mut_ptr().cast(), high);
                if TERMS == 2 {
                    let widen = |half: __m256i| {
                        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)))
                    };
                    let low = [
                        _mm512_sub_ps(halves[0], widen(_mm512_castsi512_si256(high))),
                        _mm512_sub_ps(halves[1], widen(_mm512_extracti64x4_epi64::<1>(high))),
                    ];
                    _mm512_store_si512(lines[GROUP + row].0.as_mut_ptr().cast(), round(low));
                }
            }
        }
    }
}

/// Rounds a block, and says what that left out. Plain loops, which become vectors.
#[inline(always)]
fn put(block: &[f32], rest: &mut [f32; BLOCK], line: &mut Line) {
    let mut rounded = [0u16; BLOCK];
    for k in 0..BLOCK {
        rounded[k] = round(block[k]);
    }
    for k in 0..BLOCK {
        rest[k] = block[k] - widen(rounded[k]);
    }
    line.0 = rounded;
}

/// bf16 bits, to nearest, ties to even. NaN stays NaN.
#[inline(always)]
pub(crate) fn round(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    let is_nan = bits & 0x7fff_ffff > 0x7f80_0000;
    if is_nan { (bits >> 16 | 0x40) as u16 } else { rounded as u16 }
}

#[inline(always)]
pub(crate) fn widen(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_to_nearest_even_and_keeps_nan() {
        for bits in (0..=u32::MAX).step_by(65_521) {
            let x = f32::from_bits(bits);
            let want = half::bf16::from_f32(x);
            assert_eq!(widen(round(x)).is_nan(), x.is_nan(), "{bits:x}");
            assert!(x.is_nan() || round(x) == want.to_bits(), "{bits:x}");
        }
    }

    #[test]
    fn two_terms_leave_less_than_a_hundred_thousandth() {
        for i in 1..10_000 {
            let x = (i as f32).sqrt() * if i % 2 == 0 { 1e-3 } else { -1e5 };
            let high = round(x);
            let low = round(x - widen(high));
            assert!((x - widen(high) - widen(low)).abs() <= x.abs() / 131_072.0);
        }
    }
}
