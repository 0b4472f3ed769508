//! Weights of eight bits on a device (`quant/fp8.rs`): rounded, packed as the kernels read them
//! (`cuda/fp8.cu`), and uploaded some rows at a time.

use std::ops::{ControlFlow, Range};

use super::launch::Words;
use super::matrix::STEP;
use super::memory::Buffer;
use super::{Device, Error};
use crate::matrix::{TILE_ROWS, Unpacked};
use crate::quant::blocks::RUN;
use crate::quant::fp8::{encode, largest, scale_of};

/// Rows that are packed before they are uploaded.
const CHUNK_ROWS: usize = 256 * TILE_ROWS;
/// Rows that are worth a thread.
const LEAST_ROWS: usize = 32;

/// Codes and scales, and the argument that tells a kernel of them.
#[derive(Debug)]
pub(super) struct Fp8 {
    codes: Buffer<u8>, // [rows, columns padded to whole steps], rows padded to whole tiles
    scales: Buffer<f32>, // [rows], padded: 2^-24 times each
    pub(super) argument: [u64; 3],
}

impl Words for Fp8 {
    fn words(&self) -> &[u64] {
        &self.argument
    }
}

/// Bytes from a row to the next.
pub(super) fn stride(columns: usize) -> usize {
    columns.next_multiple_of(STEP * RUN)
}

impl Fp8 {
    /// As [`super::matrix::Matrix::load`].
    pub(super) fn load(
        device: &Device,
        source: &Unpacked<'_>,
        admit: &mut dyn FnMut(Range<usize>) -> ControlFlow<()>,
    ) -> Result<Option<Self>, Error> {
        let Unpacked { rows, columns, .. } = *source;
        let (padded, stride) = (rows.next_multiple_of(TILE_ROWS), stride(columns));
        let codes = device.buffer::<u8>(padded * stride)?;
        let scales = device.buffer::<f32>(padded)?;
        codes.clear()?;
        scales.clear()?;
        let (mut staged, mut staged_scales) = (Vec::new(), Vec::new());
        for first in (0..rows).step_by(CHUNK_ROWS) {
            let chunk = first..rows.min(first + CHUNK_ROWS);
            if admit(chunk.clone()).is_break() {
                return Ok(None);
            }
            staged.clear();
            staged.resize(chunk.len() * stride, 0);
            staged_scales.clear();
            staged_scales.resize(chunk.len(), 0.0);
            pack(source, chunk, &mut staged, &mut staged_scales);
            codes.upload(first * stride, &staged)?;
            scales.upload(first, &staged_scales)?;
        }
        let shape = rows as u64 | ((columns / RUN) as u64) << 32;
        let argument = [codes.address(), scales.address(), shape];
        Ok(Some(Self { codes, scales, argument }))
    }

    /// Of device memory.
    pub(super) fn bytes(&self) -> usize {
        self.codes.len() + 4 * self.scales.len()
    }
}

/// Packs rows, with all of the machine's processors.
fn pack(source: &Unpacked<'_>, rows: Range<usize>, codes: &mut [u8], scales: &mut [f32]) {
    let stride = stride(source.columns);
    let n_threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let share = rows.len().div_ceil(n_threads).max(LEAST_ROWS);
    let shares = codes.chunks_mut(share * stride).zip(scales.chunks_mut(share));
    std::thread::scope(|scope| {
        for (first, (codes, scales)) in rows.step_by(share).zip(shares) {
            scope.spawn(move || {
                let mut row = vec![0.0; source.columns];
                let places = codes.chunks_exact_mut(stride).zip(scales);
                for (at, (codes, scale)) in (first..).zip(places) {
                    source.source.row_f32(at, &mut row);
                    *scale = pack_row(&row, codes);
                }
            });
        }
    });
}

/// One row; 2^-24 times its scale.
fn pack_row(row: &[f32], codes: &mut [u8]) -> f32 {
    let scale = scale_of(largest(row));
    let inverse = 1.0 / scale;
    for (run, codes) in row.as_chunks::<RUN>().0.iter().zip(codes.as_chunks_mut::<RUN>().0) {
        let of_run = run.map(|x| encode(x * inverse));
        *codes = std::array::from_fn(|byte| of_run[column_of(byte)]);
    }
    scale / (1 << 24) as f32
}

/// The column of a run that stands in a byte of it.
const fn column_of(byte: usize) -> usize {
    let (t, half, within) = (byte / 8, byte / 4 % 2, byte % 4);
    16 * half + 4 * t + [0, 2, 1, 3][within]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_column_of_a_run_has_a_byte() {
        let mut columns: Vec<usize> = (0..RUN).map(column_of).collect();
        assert_eq!(columns[..8], [0, 2, 1, 3, 16, 18, 17, 19], "lane 0");
        columns.sort_unstable();
        assert!(columns.into_iter().eq(0..RUN));
    }
}
