//! A weight matrix in kernel form: tiles of 16 rows, repacked once at load.
//!
//! A tile holds 16 output rows side by side, so that one vector instruction advances all of them
//! and each lane is one row's own sum.

use crate::quant::tiles::Tiles;
use crate::quant::{Format, f32_tile, with_blocks};

/// Rows of a tile: the lanes of a 512-bit vector.
pub const TILE_ROWS: usize = 16;

/// A packed matrix of `[rows, columns]`; columns are a multiple of 32.
#[derive(Debug)]
pub struct Matrix {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    /// Of the tiles: the source's, or F32 where that has no kernel of its own.
    pub(crate) format: Format,
    pub(crate) weights: Weights,
}

#[derive(Debug)]
pub(crate) enum Weights {
    /// Multiplied with integer activations.
    Quantised(Tiles),
    /// `[tile, column, 16]`, multiplied with f32 activations.
    F32(Vec<f32>),
}

/// Where a matrix's numbers come from.
pub trait Source {
    fn format(&self) -> Format;
    /// The blocks that cover one row.
    fn row_blocks(&self, row: usize) -> &[u8];
    /// Columns of a row's first block that are not part of it.
    fn first_column(&self) -> usize;
    /// The row as f32.
    fn row_f32(&self, row: usize, out: &mut [f32]);
}

impl Matrix {
    /// Packs a matrix.
    ///
    /// # Panics
    /// If `columns`, or where they begin in a block, is not a multiple of 32.
    #[must_use]
    pub fn pack(rows: usize, columns: usize, source: &dyn Source) -> Self {
        assert!(columns.is_multiple_of(32), "{columns} columns are not whole runs of 32");
        let first = source.first_column();
        assert!(first.is_multiple_of(32), "column {first} of a block begins no run of 32");
        let format = source.format();
        with_blocks!(format, B => {
            let tiles = Tiles::pack::<B>(rows, columns, source);
            Self { rows, columns, format, weights: Weights::Quantised(tiles) }
        }, _ => {
            let weights = f32_tile::pack(rows, columns, source);
            Self { rows, columns, format: Format::F32, weights: Weights::F32(weights) }
        })
    }

    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    #[must_use]
    pub fn columns(&self) -> usize {
        self.columns
    }

    #[must_use]
    pub fn n_tiles(&self) -> usize {
        self.rows.div_ceil(TILE_ROWS)
    }

    /// Whether it is multiplied with integer activations, or with f32.
    #[must_use]
    pub fn is_quantised(&self) -> bool {
        matches!(self.weights, Weights::Quantised(_))
    }

    /// Memory it occupies.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        match &self.weights {
            Weights::Quantised(tiles) => tiles.bytes() as u64,
            Weights::F32(weights) => 4 * weights.len() as u64,
        }
    }

    /// One row as f32, as the checkpoint's format defines it (a zero is +0).
    ///
    /// # Panics
    /// If there is no such row, or `out` is not its width.
    pub fn dequantise_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows && out.len() == self.columns, "row {row} of {}", self.rows);
        match &self.weights {
            Weights::Quantised(tiles) => with_blocks!(
                self.format,
                B => tiles.dequantise::<B>(row, out),
                _ => unreachable!("quantised formats have blocks")
            ),
            Weights::F32(weights) => {
                let first = row / TILE_ROWS * self.columns;
                for (k, out) in out.iter_mut().enumerate() {
                    *out = weights[(first + k) * TILE_ROWS + row % TILE_ROWS] + 0.0;
                }
            }
        }
    }
}

/// Bytes that begin on a cache line.
#[derive(Debug, Default)]
pub(crate) struct Aligned(Vec<Line>);

#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

impl Aligned {
    pub(crate) fn zeroed(len: usize) -> Self {
        assert!(len.is_multiple_of(64), "{len} bytes are not whole cache lines");
        Self(vec![Line([0; 64]); len / 64])
    }
}

impl std::ops::Deref for Aligned {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let len = self.0.len() * 64;
        // SAFETY: `Line` is 64 plain bytes without padding.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast::<u8>(), len) }
    }
}

impl std::ops::DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [u8] {
        let len = self.0.len() * 64;
        // SAFETY: `Line` is 64 plain bytes without padding, and the borrow is unique.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast::<u8>(), len) }
    }
}
