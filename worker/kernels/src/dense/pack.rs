//! The layout of float tiles: one vector of 64 bytes after the other, 16 rows side by side.
//!
//! bf16 `[tile, column / 2, 16 rows, 2]`, what `vdpbf16ps` and a tile register want; f16 and f32
//! `[tile, column, 16 rows]`.

use std::ops::Range;

use half::{bf16, f16};

use crate::matrix::{Source, TILE_ROWS};
use crate::memory::Stretch;
use crate::quant::Format;

/// Packed float weights of a matrix.
#[derive(Debug)]
pub(crate) struct Dense {
    format: Format,
    columns: usize,
    bytes: Stretch,
}

impl Dense {
    /// Tiles that [`pack_tile`] wrote.
    pub(crate) fn new(format: Format, columns: usize, bytes: Stretch) -> Self {
        Self { format, columns, bytes }
    }

    pub(crate) fn format(&self) -> Format {
        self.format
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(super) fn tile_bytes(&self) -> usize {
        tile_bytes(self.format, self.columns)
    }

    pub(crate) fn tile(&self, tile: usize) -> &[u8] {
        let each = self.tile_bytes();
        &self.bytes[tile * each..(tile + 1) * each]
    }

    /// Where a tile's byte is, or would be: to be fetched, not to be read.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn place(&self, tile: usize, byte: usize) -> *const u8 {
        self.bytes.as_ptr().wrapping_add(tile * self.tile_bytes() + byte)
    }

    /// One row as f32. A zero is +0.
    pub(crate) fn dequantise(&self, row: usize, out: &mut [f32]) {
        let (w, lane) = (self.tile(row / TILE_ROWS), row % TILE_ROWS);
        for (k, out) in out.iter_mut().enumerate() {
            *out = weight(self.format, w, k, lane) + 0.0;
        }
    }
}

/// What a format without integer kernels is held as: numbers of FP8 are numbers of bf16 too.
pub(crate) fn format_of(source: Format) -> Format {
    if source == Format::Fp8 { Format::Bf16 } else { source }
}

/// Bytes of a tile.
pub(crate) fn tile_bytes(format: Format, columns: usize) -> usize {
    columns * TILE_ROWS * format.block_bytes()
}

/// A row's column of a tile.
#[inline(always)]
fn weight(format: Format, w: &[u8], k: usize, lane: usize) -> f32 {
    let two = |at: usize| [w[at], w[at + 1]];
    match format {
        Format::Bf16 => {
            bf16::from_le_bytes(two((k / 2 * TILE_ROWS + lane) * 4 + k % 2 * 2)).to_f32()
        }
        Format::F16 => f16::from_le_bytes(two((k * TILE_ROWS + lane) * 2)).to_f32(),
        _ => {
            let at = (k * TILE_ROWS + lane) * 4;
            f32::from_le_bytes([w[at], w[at + 1], w[at + 2], w[at + 3]])
        }
    }
}

/// Writes the tile of up to 16 rows. Rows that there are not weigh nothing.
pub(crate) fn pack_tile(format: Format, source: &dyn Source, rows: Range<usize>, out: &mut [u8]) {
    if rows.len() < TILE_ROWS {
        out.fill(0);
    }
    if source.format() != format {
        return pack_as_bf16(source, rows, out);
    }
    let mut blocks: [&[u8]; TILE_ROWS] = [&[]; TILE_ROWS];
    for (blocks, row) in blocks.iter_mut().zip(rows.clone()) {
        *blocks = source.row_blocks(row);
    }
    match format {
        Format::F16 => interleave::<2>(&blocks[..rows.len()], out),
        // Pairs of bf16 move together, as one f32 does.
        _ => interleave::<4>(&blocks[..rows.len()], out),
    }
}

/// Numbers of FP8, which bf16 holds as they are.
fn pack_as_bf16(source: &dyn Source, rows: Range<usize>, out: &mut [u8]) {
    let mut values = vec![0f32; out.len() / (2 * TILE_ROWS)];
    let of_row = |row| -> Vec<u8> {
        source.row_f32(row, &mut values);
        values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect()
    };
    let rows: Vec<Vec<u8>> = rows.map(of_row).collect();
    let mut bytes: [&[u8]; TILE_ROWS] = [&[]; TILE_ROWS];
    for (bytes, row) in bytes.iter_mut().zip(&rows) {
        *bytes = row;
    }
    interleave::<4>(&bytes[..rows.len()], out);
}

/// Puts elements of N bytes of up to 16 rows side by side, a stretch of columns at a time: the
/// stretch stays in the first-level cache for all rows.
fn interleave<const N: usize>(rows: &[&[u8]], out: &mut [u8]) {
    const STRETCH: usize = 64;
    for (i, out) in out.chunks_mut(STRETCH * TILE_ROWS * N).enumerate() {
        let (places, _) = out.as_chunks_mut::<N>();
        for (lane, row) in rows.iter().enumerate() {
            let (elements, _) = row[i * STRETCH * N..].as_chunks::<N>();
            for (element, places) in elements.iter().zip(places.chunks_exact_mut(TILE_ROWS)) {
                places[lane] = *element;
            }
        }
    }
}
