//! f32 weights, `[tile, column, 16 rows]`, multiplied with f32 activations: every format that has
//! no kernel of its own yet comes here dequantised. Exact, and 32 bits a weight.

use std::ops::{Deref, Range};

use crate::linear::Group;
use crate::matrix::{Source, TILE_ROWS};
use crate::memory::{Stretch, numbers};

/// Weights of a matrix.
#[derive(Debug)]
pub(crate) struct Tiles(pub(crate) Stretch);

impl Deref for Tiles {
    type Target = [f32];

    #[inline]
    fn deref(&self) -> &[f32] {
        numbers(&self.0)
    }
}

/// Bytes of a tile.
pub(crate) fn tile_bytes(columns: usize) -> usize {
    4 * TILE_ROWS * columns
}

/// Packs a tile's rows into its bytes. Rows that there are not weigh nothing.
pub(crate) fn pack(source: &dyn Source, columns: usize, rows: Range<usize>, tile: &mut [u8]) {
    let mut values = vec![0f32; columns];
    if rows.len() < TILE_ROWS {
        tile.fill(0);
    }
    for (lane, row) in rows.enumerate() {
        source.row_f32(row, &mut values);
        for (column, value) in tile.chunks_exact_mut(4 * TILE_ROWS).zip(&values) {
            column[4 * lane..4 * lane + 4].copy_from_slice(&value.to_ne_bytes());
        }
    }
}

/// Adds 32 columns' products to the sums of M rows of activations, column by column.
#[inline(always)]
pub(crate) fn block<const M: usize>(
    w: &[f32],
    b: usize,
    x: &Group<'_>,
    first: usize,
    acc: &mut [[f32; 16]; M],
) {
    let weights = &w[b * 32 * TILE_ROWS..(b + 1) * 32 * TILE_ROWS];
    for (k, weights) in weights.chunks_exact(TILE_ROWS).enumerate() {
        for row in 0..M {
            let x = x.x[(x.first + first + row) * x.columns + b * 32 + k];
            crate::lanes::fma_scalar(&mut acc[row], x, weights);
        }
    }
}
