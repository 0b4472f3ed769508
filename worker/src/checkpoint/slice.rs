//! What a rank holds of a tensor: rows of blocks as they lie in the file, cut at columns, and what is
//! kept of them.

use std::ops::Range;

use evener_kernels::quant::{Format, fp8};

use crate::model::program::Weight;

use super::Error;
use super::dequantize::{dequantize, first_not_finite};
use super::fault::printable;
use super::gguf::Gguf;
use super::kept::{Kept, row_bytes};

/// Rows and columns of a checkpoint tensor.
#[derive(Debug, Clone)]
pub struct Slice<'a> {
    /// Of the file's blocks.
    pub stored: Format,
    /// Of what is kept: the same, or made of it at load.
    pub format: Format,
    /// Rows of the slice.
    pub rows: usize,
    /// Columns of the slice.
    pub columns: usize,
    /// Columns of a row's first block that belong to the rank before: not 0 only where a format's
    /// blocks are longer than the unit of cuts (K-quants).
    pub first_column: usize,
    tensor: &'a str,
    first_row: usize,
    data: &'a [u8],            // of the whole tensor
    stride: usize,             // from row to row, in bytes
    block_bytes: Range<usize>, // of the slice's blocks, in a row
}

impl<'a> Slice<'a> {
    pub(super) fn new(gguf: &'a Gguf, weight: &Weight, kept: Kept) -> Result<Self, Error> {
        let tensor = gguf
            .tensor(&weight.tensor)
            .ok_or_else(|| Error::MissingTensor { tensor: weight.tensor.clone() })?;
        if tensor.shape != weight.shape {
            return Err(Error::TensorShape {
                tensor: printable(&tensor.name),
                got: tensor.shape,
                expected: weight.shape,
            });
        }
        let [n_rows, n_columns] = tensor.shape;
        let (rows, columns) = (&weight.rows, &weight.columns);
        assert!(rows.start <= rows.end && rows.end <= n_rows, "rows {rows:?} of {n_rows}");
        assert!(columns.start <= columns.end && columns.end <= n_columns, "columns {columns:?}");
        let stored = tensor.format;
        let (len, bytes) = (stored.block_len(), stored.block_bytes());
        Ok(Self {
            stored,
            format: kept.format_of(stored, weight.role),
            rows: rows.len(),
            columns: columns.len(),
            first_column: columns.start % len,
            tensor: &tensor.name,
            first_row: rows.start,
            data: &gguf.bytes()[tensor.bytes.clone()],
            stride: n_columns / len * bytes,
            block_bytes: columns.start / len * bytes..columns.end.div_ceil(len) * bytes,
        })
    }

    /// Name of the tensor it is cut from.
    #[must_use]
    pub fn tensor(&self) -> &'a str {
        self.tensor
    }

    /// The file's blocks that cover the slice's columns of its `i`-th row.
    #[must_use]
    pub fn row(&self, i: usize) -> &'a [u8] {
        assert!(i < self.rows, "row {i} of {}", self.rows);
        let start = (self.first_row + i) * self.stride;
        &self.data[start + self.block_bytes.start..start + self.block_bytes.end]
    }

    /// Bytes of all its rows, as they are kept.
    #[must_use]
    pub fn n_bytes(&self) -> usize {
        self.rows * self.row_bytes()
    }

    /// Bytes of one of its rows, as it is kept.
    #[must_use]
    pub fn row_bytes(&self) -> usize {
        if self.format == self.stored {
            self.block_bytes.len()
        } else {
            row_bytes(self.format, self.columns)
        }
    }

    /// Writes the `i`-th row's columns as f32: what is kept of them. `out.len()` is `columns`.
    pub fn dequantized_row(&self, i: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.columns, "one number a column");
        self.stored_row(i, out);
        if self.format == Format::Fp8 {
            let is_whole = out.len() * self.stored.block_bytes() == self.stride;
            let largest = if is_whole { fp8::largest(out) } else { self.largest_of_row(i) };
            fp8::round(out, fp8::scale_of(largest));
        }
    }

    /// The largest magnitude of the whole row, whoever holds the rest of it: its scale, and so what is
    /// kept of its numbers, is the same for every split.
    fn largest_of_row(&self, i: usize) -> f32 {
        let start = (self.first_row + i) * self.stride;
        let row = &self.data[start..start + self.stride];
        let mut some = [0.0; 256];
        let mut largest = 0f32;
        for blocks in row.chunks(some.len() * self.stored.block_bytes()) {
            let some = &mut some[..blocks.len() / self.stored.block_bytes()];
            dequantize(self.stored, blocks, some);
            largest = largest.max(fp8::largest(some));
        }
        largest
    }

    fn stored_row(&self, i: usize, out: &mut [f32]) {
        let blocks = self.row(i);
        let len = self.stored.block_len();
        let covered = blocks.len() / self.stored.block_bytes() * len;
        if self.first_column == 0 && covered == self.columns {
            return dequantize(self.stored, blocks, out);
        }
        let mut whole = [0.0; 256];
        for (b, block) in blocks.chunks_exact(self.stored.block_bytes()).enumerate() {
            dequantize(self.stored, block, &mut whole[..len]);
            let start = (b * len).max(self.first_column);
            let end = ((b + 1) * len).min(self.first_column + self.columns);
            let out = &mut out[start - self.first_column..end - self.first_column];
            out.copy_from_slice(&whole[start - b * len..end - b * len]);
        }
    }

    /// Looks for scales and weights that are not finite among its rows; backends call it while they
    /// load.
    ///
    /// # Errors
    /// The first such block.
    pub fn check_finite(&self, rows: Range<usize>) -> Result<(), Error> {
        let first_block = self.block_bytes.start / self.stored.block_bytes();
        for i in rows {
            if let Some(block) = first_not_finite(self.stored, self.row(i)) {
                return Err(Error::NotFinite {
                    tensor: printable(self.tensor),
                    row: self.first_row + i,
                    block: first_block + block,
                });
            }
        }
        Ok(())
    }
}
