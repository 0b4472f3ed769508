//! f32 weights, `[tile, column, 16 rows]`, multiplied with f32 activations: every format that has
//! no kernel of its own yet comes here dequantised. Exact, and 32 bits a weight.

use crate::linear::Group;
use crate::matrix::{Source, TILE_ROWS};

pub(crate) fn pack(rows: usize, columns: usize, source: &dyn Source) -> Vec<f32> {
    let mut weights = vec![0f32; rows.div_ceil(TILE_ROWS) * columns * TILE_ROWS];
    let mut values = vec![0f32; columns];
    for row in 0..rows {
        let (tile, lane) = (row / TILE_ROWS, row % TILE_ROWS);
        source.row_f32(row, &mut values);
        for (k, &value) in values.iter().enumerate() {
            weights[(tile * columns + k) * TILE_ROWS + lane] = value;
        }
    }
    weights
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
