//! Blocks of bytes to f32, one row at a time: plain and safe, for tables, vectors and checks. The
//! fast kernels have their own layouts; candle's formulas agree with these bit by bit (tests).
//!
//! Layouts are ggml's (`ggml-common.h`); d is a block's scale, m its minimum.

use evener_kernels::quant::Format;
use half::{bf16, f16};

/// Writes the weights of whole blocks. `out.len()` is blocks times block length.
///
/// # Panics
/// The lengths do not belong together.
pub(super) fn dequantize(format: Format, blocks: &[u8], out: &mut [f32]) {
    let n_blocks = blocks.len() / format.block_bytes();
    assert_eq!(blocks.len(), n_blocks * format.block_bytes(), "whole blocks");
    assert_eq!(out.len(), n_blocks * format.block_len(), "one number a weight");
    match format {
        Format::F32 => floats(blocks, out, f32::from_le_bytes),
        Format::F16 => floats(blocks, out, |bytes| f16::from_le_bytes(bytes).to_f32()),
        Format::Bf16 => floats(blocks, out, |bytes| bf16::from_le_bytes(bytes).to_f32()),
        Format::Q4_0 => each_block(format, blocks, out, q4_0),
        Format::Q4_1 => each_block(format, blocks, out, q4_1),
        Format::Q5_0 => each_block(format, blocks, out, q5_0),
        Format::Q5_1 => each_block(format, blocks, out, q5_1),
        Format::Q8_0 => each_block(format, blocks, out, q8_0),
        Format::Q4K => each_block(format, blocks, out, q4_k),
        Format::Q5K => each_block(format, blocks, out, q5_k),
        Format::Q6K => each_block(format, blocks, out, q6_k),
        Format::Fp8 => unreachable!("no file has it"),
    }
}

fn floats<const BYTES: usize>(bytes: &[u8], out: &mut [f32], number: impl Fn([u8; BYTES]) -> f32) {
    for (&bytes, out) in bytes.as_chunks().0.iter().zip(out) {
        *out = number(bytes);
    }
}

fn each_block(format: Format, blocks: &[u8], out: &mut [f32], weights: fn(&[u8], &mut [f32])) {
    let blocks = blocks.chunks_exact(format.block_bytes());
    for (block, out) in blocks.zip(out.chunks_exact_mut(format.block_len())) {
        weights(block, out);
    }
}

/// The first of a row's blocks whose floats are not finite: its scales, or its one weight.
pub(super) fn first_not_finite(format: Format, blocks: &[u8]) -> Option<usize> {
    match format {
        Format::F32 => find::<4>(blocks, |b| f32::from_le_bytes(*b).is_finite()),
        Format::Bf16 => find::<2>(blocks, |b| bf16::from_le_bytes(*b).is_finite()),
        Format::F16 => find::<2>(blocks, |b| halves_are_finite(b, &[0])),
        Format::Q4_0 => find::<18>(blocks, |b| halves_are_finite(b, &[0])),
        Format::Q5_0 => find::<22>(blocks, |b| halves_are_finite(b, &[0])),
        Format::Q8_0 => find::<34>(blocks, |b| halves_are_finite(b, &[0])),
        Format::Q4_1 => find::<20>(blocks, |b| halves_are_finite(b, &[0, 2])),
        Format::Q5_1 => find::<24>(blocks, |b| halves_are_finite(b, &[0, 2])),
        Format::Q4K => find::<144>(blocks, |b| halves_are_finite(b, &[0, 2])),
        Format::Q5K => find::<176>(blocks, |b| halves_are_finite(b, &[0, 2])),
        Format::Q6K => find::<210>(blocks, |b| halves_are_finite(b, &[208])),
        Format::Fp8 => unreachable!("no file has it"),
    }
}

/// The first block that is not finite. All are read before any is searched for: a loop without an
/// exit is vectors.
#[inline(always)]
fn find<const BYTES: usize>(
    blocks: &[u8],
    is_finite: impl Fn(&[u8; BYTES]) -> bool,
) -> Option<usize> {
    let (blocks, rest) = blocks.as_chunks::<BYTES>();
    assert!(rest.is_empty(), "whole blocks");
    if blocks.iter().fold(true, |all, block| all & is_finite(block)) {
        return None;
    }
    blocks.iter().position(|block| !is_finite(block))
}

#[inline(always)]
fn halves_are_finite<const BYTES: usize>(block: &[u8; BYTES], offsets: &[usize]) -> bool {
    const EXPONENT: u16 = 0x7c00;
    let half = |at: usize| u16::from_le_bytes([block[at], block[at + 1]]);
    offsets.iter().fold(true, |all, &at| all & (half(at) & EXPONENT != EXPONENT))
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// d, then 16 bytes: low halves are weights 0 to 15, high halves 16 to 31.
fn q4_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (i, &byte) in block[2..18].iter().enumerate() {
        out[i] = f32::from(i16::from(byte & 15) - 8) * d;
        out[i + 16] = f32::from(i16::from(byte >> 4) - 8) * d;
    }
}

fn q4_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (i, &byte) in block[4..20].iter().enumerate() {
        out[i] = f32::from(byte & 15) * d + m;
        out[i + 16] = f32::from(byte >> 4) * d + m;
    }
}

/// d, 32 fifth bits, then nibbles as in Q4_0.
fn q5_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    let high = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
    for (i, &byte) in block[6..22].iter().enumerate() {
        out[i] = f32::from(fifth(high, i, byte & 15) - 16) * d;
        out[i + 16] = f32::from(fifth(high, i + 16, byte >> 4) - 16) * d;
    }
}

fn q5_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    let high = u32::from_le_bytes([block[4], block[5], block[6], block[7]]);
    for (i, &byte) in block[8..24].iter().enumerate() {
        out[i] = f32::from(fifth(high, i, byte & 15)) * d + m;
        out[i + 16] = f32::from(fifth(high, i + 16, byte >> 4)) * d + m;
    }
}

fn fifth(high: u32, i: usize, low: u8) -> i16 {
    i16::from(low) | ((high >> i) as i16 & 1) << 4
}

fn q8_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (out, &byte) in out.iter_mut().zip(&block[2..34]) {
        *out = f32::from(byte as i8) * d;
    }
}

/// Scale and minimum of sub-block `j` of 8, 6 bits each in 12 bytes.
fn scale_min(j: usize, packed: &[u8]) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        let scale = (packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4);
        let min = (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4);
        (scale, min)
    };
    (f32::from(scale), f32::from(min))
}

/// d, dmin, 12 bytes of scales and minima, then 4 runs of 32 bytes: low halves are one sub-block of
/// 32 weights, high halves the next.
fn q4_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let (packed, quants) = (&block[4..16], &block[16..144]);
    for j in 0..8 {
        let (scale, min) = scale_min(j, packed);
        let (scale, min) = (d * scale, dmin * min);
        for i in 0..32 {
            let byte = quants[j / 2 * 32 + i];
            let quant = if j % 2 == 0 { byte & 15 } else { byte >> 4 };
            out[j * 32 + i] = scale * f32::from(quant) - min;
        }
    }
}

/// As Q4_K, with 32 bytes of fifth bits before the nibbles: bit j of byte i belongs to sub-block j.
fn q5_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let (packed, high, quants) = (&block[4..16], &block[16..48], &block[48..176]);
    for j in 0..8 {
        let (scale, min) = scale_min(j, packed);
        let (scale, min) = (d * scale, dmin * min);
        for i in 0..32 {
            let byte = quants[j / 2 * 32 + i];
            let low = if j % 2 == 0 { byte & 15 } else { byte >> 4 };
            let quant = low | (high[i] >> j & 1) << 4;
            out[j * 32 + i] = scale * f32::from(quant) - min;
        }
    }
}

/// 128 bytes of low nibbles, 64 of upper bit pairs, 16 signed scales, d. In two halves of 128
/// weights, each four runs of 32.
fn q6_k(block: &[u8], out: &mut [f32]) {
    let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = half_at(block, 208);
    for (at, out) in out.iter_mut().enumerate() {
        let (half, run, i) = (at / 128, at / 32 % 4, at % 32);
        let byte = low[half * 64 + run % 2 * 32 + i];
        let nibble = if run < 2 { byte & 15 } else { byte >> 4 };
        let pair = high[half * 32 + i] >> (2 * run) & 3;
        let quant = i16::from(nibble | pair << 4) - 32;
        let scale = scales[half * 8 + run * 2 + i / 16] as i8;
        *out = d * f32::from(scale) * f32::from(quant);
    }
}
