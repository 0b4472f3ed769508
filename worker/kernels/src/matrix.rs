//! A weight matrix in kernel form: tiles of 16 rows, repacked once at load.
//!
//! A tile holds 16 output rows side by side, so that one vector instruction advances all of them and
//! each lane is one row's own sum.

use crate::quant::{Format, f32_tile, q4_1, q8_0};

/// Rows of a tile: the lanes of a 512-bit vector.
pub const TILE_ROWS: usize = 16;

/// A packed matrix of `[rows, columns]`; columns are a multiple of 32.
#[derive(Debug)]
pub struct Matrix {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) tiles: Tiles,
}

/// Tile storage by format. Scales are f16 bits, `[tile, block, 16]`.
#[derive(Debug)]
pub(crate) enum Tiles {
    /// Quants `[tile, block, 256 bytes]`; see `quant/q4_1.rs`.
    Q4_1 { quants: Aligned, d: Vec<u16>, m: Vec<u16> },
    /// Quants `[tile, block, 512 bytes]`; see `quant/q8_0.rs`.
    Q8_0 { quants: Aligned, d: Vec<u16> },
    /// `[tile, column, 16]`: any format without a kernel of its own, dequantised.
    F32 { weights: Vec<f32> },
}

/// Where a matrix's numbers come from.
pub trait Source {
    fn format(&self) -> Format;
    /// The blocks of one row, when the row is a whole number of blocks.
    fn row_blocks(&self, row: usize) -> Option<&[u8]>;
    /// The same row as f32.
    fn row_f32(&self, row: usize, out: &mut [f32]);
}

impl Matrix {
    /// Packs a matrix. `on_row_tile` is called after each 16 rows with the rows done so far.
    ///
    /// # Panics
    /// If `columns` is not a multiple of 32.
    #[must_use]
    pub fn pack(
        rows: usize,
        columns: usize,
        source: &dyn Source,
        on_row_tile: &mut dyn FnMut(usize),
    ) -> Self {
        assert!(columns.is_multiple_of(32), "{columns} columns are not whole blocks of 32");
        let native = rows == 0 || source.row_blocks(0).is_some();
        let tiles = match source.format() {
            Format::Q4_1 if native => q4_1::pack(rows, columns, source, on_row_tile),
            Format::Q8_0 if native => q8_0::pack(rows, columns, source, on_row_tile),
            _ => f32_tile::pack(rows, columns, source, on_row_tile),
        };
        Self { rows, columns, tiles }
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

    /// Whether it is multiplied with int8 activations, or with f32.
    #[must_use]
    pub fn is_quantised(&self) -> bool {
        !matches!(self.tiles, Tiles::F32 { .. })
    }

    /// Memory it occupies.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let bytes = match &self.tiles {
            Tiles::Q4_1 { quants, d, m } => quants.len() + 2 * (d.len() + m.len()),
            Tiles::Q8_0 { quants, d } => quants.len() + 2 * d.len(),
            Tiles::F32 { weights } => 4 * weights.len(),
        };
        bytes as u64
    }

    /// One row as f32, as the checkpoint's format defines it (a zero is +0).
    pub fn dequantise_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows && out.len() == self.columns, "row {row} of {}", self.rows);
        let (tile, lane) = (row / TILE_ROWS, row % TILE_ROWS);
        match &self.tiles {
            Tiles::Q4_1 { quants, d, m } => {
                q4_1::dequantise(quants, d, m, self.columns / 32, tile, lane, out);
            }
            Tiles::Q8_0 { quants, d } => {
                q8_0::dequantise(quants, d, self.columns / 32, tile, lane, out);
            }
            Tiles::F32 { weights } => {
                for (k, out) in out.iter_mut().enumerate() {
                    *out = weights[(tile * self.columns + k) * TILE_ROWS + lane] + 0.0;
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
