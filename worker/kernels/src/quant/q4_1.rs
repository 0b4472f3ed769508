//! Q4_1: 32 weights a block, `w = d * q + m`, q in 0..16. In a file: f16 d, f16 m, 16 bytes; byte j
//! holds q[j] low and q[j + 16] high.
//!
//! In a tile, byte `(j * 16 + lane) * 4 + i` of a block's 256 is the file's byte `4 * j + i` of row `lane`:
//! four columns of each of 16 rows in 64 bytes, as `vpdpbusd` wants them. 5 bits a weight, as in the file.

use half::f16;

use crate::linear::{Rows, TileWeights, integer};
use crate::matrix::{Aligned, Source, TILE_ROWS, Tiles};

const FILE_BLOCK: usize = 20;
/// Bytes of a tile's block.
pub(crate) const TILE_BLOCK: usize = 256;

pub(crate) fn pack(
    rows: usize,
    columns: usize,
    source: &dyn Source,
    on_row_tile: &mut dyn FnMut(usize),
) -> Tiles {
    let n_blocks = columns / 32;
    let n_tiles = rows.div_ceil(TILE_ROWS);
    let mut quants = Aligned::zeroed(n_tiles * n_blocks * TILE_BLOCK);
    let mut d = vec![0u16; n_tiles * n_blocks * TILE_ROWS];
    let mut m = d.clone();
    for row in 0..rows {
        let (tile, lane) = (row / TILE_ROWS, row % TILE_ROWS);
        let blocks = source.row_blocks(row).expect("checked by Matrix::pack");
        for (b, block) in blocks.chunks_exact(FILE_BLOCK).enumerate() {
            let at = tile * n_blocks + b;
            d[at * TILE_ROWS + lane] = u16::from_le_bytes([block[0], block[1]]);
            m[at * TILE_ROWS + lane] = u16::from_le_bytes([block[2], block[3]]);
            let quants = &mut quants[at * TILE_BLOCK..(at + 1) * TILE_BLOCK];
            for (j, four) in block[4..].chunks_exact(4).enumerate() {
                quants[(j * TILE_ROWS + lane) * 4..][..4].copy_from_slice(four);
            }
        }
        if lane + 1 == TILE_ROWS {
            on_row_tile(row + 1);
        }
    }
    Tiles::Q4_1 { quants, d, m }
}

pub(crate) fn dequantise(
    quants: &[u8],
    d: &[u16],
    m: &[u16],
    n_blocks: usize,
    tile: usize,
    lane: usize,
    out: &mut [f32],
) {
    for (b, out) in out.chunks_exact_mut(32).enumerate() {
        let at = tile * n_blocks + b;
        let scale = f16::from_bits(d[at * TILE_ROWS + lane]).to_f32();
        let min = f16::from_bits(m[at * TILE_ROWS + lane]).to_f32();
        for k in 0..16 {
            let byte = quants[at * TILE_BLOCK + ((k / 4) * TILE_ROWS + lane) * 4 + k % 4];
            out[k] = scale * f32::from(byte & 15) + min + 0.0;
            out[k + 16] = scale * f32::from(byte >> 4) + min + 0.0;
        }
    }
}

/// Adds one block's products to the sums of M rows of activations; the reference for the fast kernels.
#[inline(always)]
pub(crate) fn block_portable<const M: usize, const TERMS: usize>(
    w: &TileWeights<'_>,
    b: usize,
    x: &Rows<'_, M>,
    acc: &mut [[f32; 16]; M],
) {
    let quants = &w.quants[b * TILE_BLOCK..(b + 1) * TILE_BLOCK];
    let d = &w.d[b * TILE_ROWS..(b + 1) * TILE_ROWS];
    let m = &w.m[b * TILE_ROWS..(b + 1) * TILE_ROWS];
    for row in 0..M {
        let q = &x.q[row][b * 32 * TERMS..(b + 1) * 32 * TERMS];
        let (da, sa) = (x.d[row][b], x.s[row][b]);
        for lane in 0..TILE_ROWS {
            let mut dot = 0i32;
            for k in 0..16 {
                let byte = quants[((k / 4) * TILE_ROWS + lane) * 4 + k % 4];
                dot += i32::from(byte & 15) * integer::<TERMS>(q, k);
                dot += i32::from(byte >> 4) * integer::<TERMS>(q, k + 16);
            }
            let scale = f16::from_bits(d[lane]).to_f32() * da;
            let sum = (dot as f32).mul_add(scale, acc[row][lane]);
            acc[row][lane] = f16::from_bits(m[lane]).to_f32().mul_add(sa, sum);
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512 {
    use std::arch::x86_64::*;

    use super::TILE_BLOCK;
    use crate::linear::{Rows, TileWeights};

    /// [`super::block_portable`] with `vpdpbusd`: nibbles are unsigned, activations signed. One
    /// activation term is summed in two chains, two terms in one chain each.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
    pub(crate) fn block<const M: usize, const TERMS: usize>(
        w: &TileWeights<'_>,
        b: usize,
        x: &Rows<'_, M>,
        acc: &mut [__m512; M],
    ) {
        debug_assert!(w.quants.len() >= (b + 1) * TILE_BLOCK && w.d.len() >= (b + 1) * 16);
        // SAFETY: the tile has block b (callers loop over its blocks; asserted above in debug builds)
        // and every activation row has 32 columns of it.
        unsafe {
            let quants = w.quants.as_ptr().add(b * TILE_BLOCK);
            let low = _mm512_set1_epi8(15);
            let mut one = [_mm512_setzero_si512(); M];
            let mut two = [_mm512_setzero_si512(); M];
            for j in 0..4 {
                let packed = _mm512_loadu_si512(quants.add(j * 64).cast());
                if M == 1 {
                    _mm_prefetch::<_MM_HINT_T0>(quants.add(j * 64 + 6 * TILE_BLOCK).cast());
                }
                let first = _mm512_and_si512(packed, low);
                let second = _mm512_and_si512(_mm512_srli_epi16::<4>(packed), low);
                for row in 0..M {
                    let q = x.q[row].as_ptr().add(b * 32 * TERMS + j * 4);
                    let four =
                        |at: usize| _mm512_set1_epi32(q.add(at).cast::<i32>().read_unaligned());
                    one[row] = _mm512_dpbusd_epi32(one[row], first, four(0));
                    if TERMS == 1 {
                        two[row] = _mm512_dpbusd_epi32(two[row], second, four(16));
                    } else {
                        two[row] = _mm512_dpbusd_epi32(two[row], first, four(32));
                        one[row] = _mm512_dpbusd_epi32(one[row], second, four(16));
                        two[row] = _mm512_dpbusd_epi32(two[row], second, four(48));
                    }
                }
            }
            let d = _mm512_cvtph_ps(_mm256_loadu_si256(w.d.as_ptr().add(b * 16).cast()));
            let m = _mm512_cvtph_ps(_mm256_loadu_si256(w.m.as_ptr().add(b * 16).cast()));
            for row in 0..M {
                let high = if TERMS == 1 { one[row] } else { _mm512_slli_epi32::<8>(one[row]) };
                let dot = _mm512_cvtepi32_ps(_mm512_add_epi32(high, two[row]));
                let scale = _mm512_mul_ps(d, _mm512_set1_ps(*x.d[row].get_unchecked(b)));
                acc[row] = _mm512_fmadd_ps(dot, scale, acc[row]);
                let sum = _mm512_set1_ps(*x.s[row].get_unchecked(b));
                acc[row] = _mm512_fmadd_ps(m, sum, acc[row]);
            }
        }
    }
}
