//! Weights on a device: packed here as the kernels read them (`cuda/quantised.cu`, `cuda/dense.cu`),
//! at the true width of their format, and uploaded some rows at a time.

use std::ops::{ControlFlow, Range};

use super::launch::Words;
use super::memory::Buffer;
use super::{Device, Error};
use crate::matrix::{TILE_ROWS, Unpacked};
use crate::quant::blocks::{Blocks, RUN, Run, Scales};
use crate::quant::{Format, with_blocks};

/// Tiles that are packed before they are uploaded.
const CHUNK_TILES: usize = 64;
/// Runs that share a super-block's scales.
const SUPER_RUNS: usize = 8;

/// A matrix `[rows, columns]` on a device.
#[derive(Debug)]
pub struct Matrix {
    pub(super) format: Format,
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) weights: Weights,
}

#[derive(Debug)]
pub(super) enum Weights {
    Quantised(Quantised),
    /// bf16 and f16: `[rows, columns]`; of bf16 the rows are padded to whole tiles with zeros.
    Halves(Buffer<u16>),
    Floats(Buffer<f32>),
}

/// Planes `[tile][run][...]`, and the argument that tells a kernel of them.
#[derive(Debug)]
pub(super) struct Quantised {
    planes: [Buffer<u32>; 4], // quants, tops, scales, supers
    argument: [u64; 6],
}

impl Words for Quantised {
    fn words(&self) -> &[u64] {
        &self.argument
    }
}

/// Words of a tile's run in each plane; of the last, of a tile's super-block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Widths {
    quants: usize,
    tops: usize,
    scales: usize,
    supers: usize,
}

impl Widths {
    const fn of(bits: usize, scales: Scales) -> Self {
        let tops = match bits {
            5 => TILE_ROWS,
            6 => 2 * TILE_ROWS,
            _ => 0,
        };
        let quants = if bits == 8 { 8 * TILE_ROWS } else { 4 * TILE_ROWS };
        let (scales, supers) = match scales {
            Scales::Plain => (TILE_ROWS / 2, 0),
            Scales::Min => (TILE_ROWS, 0),
            Scales::Super => (TILE_ROWS / 2, TILE_ROWS),
            Scales::Halves => (TILE_ROWS / 2, TILE_ROWS / 2),
        };
        Self { quants, tops, scales, supers }
    }
}

impl Matrix {
    /// Packs and uploads. `admit` is called before rows are packed; when it breaks off there is no
    /// matrix.
    ///
    /// # Errors
    /// Too little memory, or the device failed.
    ///
    /// # Panics
    /// If the columns, or where they begin in a block, are not a multiple of 32.
    pub fn load(
        device: &Device,
        source: &Unpacked<'_>,
        admit: &mut dyn FnMut(Range<usize>) -> ControlFlow<()>,
    ) -> Result<Option<Self>, Error> {
        let Unpacked { rows, columns, source: from } = *source;
        assert!(columns.is_multiple_of(RUN), "{columns} columns are no whole runs");
        assert!(from.first_column().is_multiple_of(RUN), "a cut within a run");
        let format = from.format();
        let weights = with_blocks!(
            format,
            B => Quantised::load::<B>(device, source, admit)?.map(Weights::Quantised),
            _ => load_dense(device, source, admit)?
        );
        Ok(weights.map(|weights| Self { format, rows, columns, weights }))
    }

    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    #[must_use]
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Of device memory.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        (match &self.weights {
            Weights::Quantised(quantised) => {
                4 * quantised.planes.iter().map(Buffer::len).sum::<usize>()
            }
            Weights::Halves(numbers) => 2 * numbers.len(),
            Weights::Floats(numbers) => 4 * numbers.len(),
        }) as u64
    }
}

fn load_dense(
    device: &Device,
    source: &Unpacked<'_>,
    admit: &mut dyn FnMut(Range<usize>) -> ControlFlow<()>,
) -> Result<Option<Weights>, Error> {
    let Unpacked { rows, columns, source: from } = *source;
    let is_f32 = from.format() == Format::F32;
    let padded =
        if from.format() == Format::Bf16 { rows.next_multiple_of(TILE_ROWS) } else { rows };
    let (floats, halves) = match is_f32 {
        true => (device.buffer::<f32>(rows * columns)?, device.buffer::<u16>(0)?),
        false => (device.buffer::<f32>(0)?, device.buffer::<u16>(padded * columns)?),
    };
    for first in (0..rows).step_by(CHUNK_TILES * TILE_ROWS) {
        let chunk = first..rows.min(first + CHUNK_TILES * TILE_ROWS);
        if admit(chunk.clone()).is_break() {
            return Ok(None);
        }
        let bytes = chunk.clone().flat_map(|row| from.row_blocks(row));
        if is_f32 {
            let bytes: Vec<u8> = bytes.copied().collect();
            let numbers: Vec<f32> =
                bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
            floats.upload(first * columns, &numbers)?;
        } else {
            let bytes: Vec<u8> = bytes.copied().collect();
            let numbers: Vec<u16> =
                bytes.as_chunks().0.iter().map(|bytes| u16::from_le_bytes(*bytes)).collect();
            halves.upload(first * columns, &numbers)?;
        }
    }
    if is_f32 {
        return Ok(Some(Weights::Floats(floats)));
    }
    halves.upload(rows * columns, &vec![0; (padded - rows) * columns])?;
    Ok(Some(Weights::Halves(halves)))
}

/// One chunk of tiles, packed.
#[derive(Default)]
struct Staged {
    planes: [Vec<u32>; 4],
}

impl Quantised {
    fn load<B: Blocks>(
        device: &Device,
        source: &Unpacked<'_>,
        admit: &mut dyn FnMut(Range<usize>) -> ControlFlow<()>,
    ) -> Result<Option<Self>, Error> {
        let Unpacked { rows, columns, source: from } = *source;
        let (n_runs, first_run) = (columns / RUN, from.first_column() / RUN);
        let n_supers = (first_run + n_runs).div_ceil(SUPER_RUNS);
        let widths = Widths::of(B::BITS, B::SCALES);
        let of_tile = [
            widths.quants * n_runs,
            widths.tops * n_runs,
            widths.scales * n_runs,
            widths.supers * n_supers,
        ];
        let n_tiles = rows.div_ceil(TILE_ROWS);
        let [quants, tops, scales, supers] = of_tile.map(|words| device.buffer(words * n_tiles));
        let planes = [quants?, tops?, scales?, supers?];
        let mut staged = Staged::default();
        for first in (0..n_tiles).step_by(CHUNK_TILES) {
            let tiles = first..n_tiles.min(first + CHUNK_TILES);
            let of_rows = tiles.start * TILE_ROWS..rows.min(tiles.end * TILE_ROWS);
            if admit(of_rows.clone()).is_break() {
                return Ok(None);
            }
            for (plane, words) in staged.planes.iter_mut().zip(of_tile) {
                plane.clear();
                plane.resize(words * tiles.len(), 0);
            }
            for row in of_rows {
                let tile = row / TILE_ROWS - tiles.start;
                let [quants, tops, scales, supers] = staged.planes.each_mut();
                let mut place = Place {
                    quants: &mut quants[tile * of_tile[0]..][..of_tile[0]],
                    tops: &mut tops[tile * of_tile[1]..][..of_tile[1]],
                    scales: &mut scales[tile * of_tile[2]..][..of_tile[2]],
                    supers: &mut supers[tile * of_tile[3]..][..of_tile[3]],
                    row: row % TILE_ROWS,
                };
                let blocks = from.row_blocks(row);
                let (len, bytes) = (B::FORMAT.block_len() / RUN, B::FORMAT.block_bytes());
                for run in 0..n_runs {
                    let at = first_run + run;
                    let packed = B::run(&blocks[at / len * bytes..][..bytes], at % len);
                    place.put(B::BITS, B::SCALES, run, &packed);
                    place.put_super(B::SCALES, at / SUPER_RUNS, &packed);
                }
            }
            for ((plane, staged), words) in planes.iter().zip(&staged.planes).zip(of_tile) {
                plane.upload(words * tiles.start, staged)?;
            }
        }
        let pair = |low: usize, high: usize| low as u64 | (high as u64) << 32;
        let [quants, tops, scales, supers] = planes.each_ref().map(Buffer::address);
        let argument =
            [quants, tops, scales, supers, pair(rows, n_runs), pair(first_run, n_supers)];
        Ok(Some(Self { planes, argument }))
    }
}

/// Where a row of a tile goes. Lane 4g + t of a warp multiplies rows g and g + 8; words of the two
/// stand side by side.
struct Place<'a> {
    quants: &'a mut [u32],
    tops: &'a mut [u32],
    scales: &'a mut [u32],
    supers: &'a mut [u32],
    row: usize,
}

impl Place<'_> {
    fn put(&mut self, bits: usize, scales: Scales, at: usize, run: &Run) {
        let (g, below) = (self.row % 8, self.row / 8);
        let widths = Widths::of(bits, scales);
        let quants = &mut self.quants[at * widths.quants..][..widths.quants];
        for t in 0..4 {
            if bits == 8 {
                quants[(g * 4 + t) * 4 + 2 * below] = run.words[2 * t];
                quants[(g * 4 + t) * 4 + 2 * below + 1] = run.words[2 * t + 1];
            } else {
                quants[(g * 4 + t) * 2 + below] = run.words[t];
            }
        }
        let tops = &mut self.tops[at * widths.tops..][..widths.tops];
        match bits {
            5 => tops[2 * g + below] = run.fifths,
            6 => {
                tops[4 * g + below] = run.words[4];
                tops[4 * g + 2 + below] = run.words[5];
            }
            _ => {}
        }
        let to = &mut self.scales[at * widths.scales..][..widths.scales];
        match scales {
            Scales::Plain => to[g] |= u32::from(run.d) << (16 * below),
            Scales::Min => {
                to[2 * g] |= u32::from(run.d) << (16 * below);
                to[2 * g + 1] |= u32::from(run.m) << (16 * below);
            }
            Scales::Super | Scales::Halves => {
                to[g] |= u32::from(run.sc) << (8 * below) | u32::from(run.mc) << (16 + 8 * below);
            }
        }
    }

    /// The same from each run of a super-block.
    fn put_super(&mut self, scales: Scales, at: usize, run: &Run) {
        let (g, shift) = (self.row % 8, 16 * (self.row / 8));
        match scales {
            Scales::Plain | Scales::Min => {}
            Scales::Super => {
                let to = &mut self.supers[at * TILE_ROWS..][..TILE_ROWS];
                to[2 * g] |= u32::from(run.d) << shift;
                to[2 * g + 1] |= u32::from(run.m) << shift;
            }
            Scales::Halves => {
                self.supers[at * TILE_ROWS / 2..][..TILE_ROWS / 2][g] |= u32::from(run.d) << shift;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_kept_at_the_true_width_of_their_format() {
        // Bits of a weight on the device; K-quants beside super-blocks of 256, as in the file but
        // for Q4_K's and Q5_K's scales, which take whole bytes.
        let bits = |widths: Widths| {
            let of_run = widths.quants + widths.tops + widths.scales;
            let per_super = (SUPER_RUNS * of_run + widths.supers) as f64;
            per_super * 32.0 / (TILE_ROWS * RUN * SUPER_RUNS) as f64
        };
        for (format, wanted) in [
            (Format::Q4_0, 4.5),
            (Format::Q4_1, 5.0),
            (Format::Q5_0, 5.5),
            (Format::Q5_1, 6.0),
            (Format::Q8_0, 8.5),
            (Format::Q4K, 4.625),
            (Format::Q5K, 5.625),
            (Format::Q6K, 6.5625),
        ] {
            let got = with_blocks!(format, B => bits(Widths::of(B::BITS, B::SCALES)), _ => 0.0);
            assert_eq!(got, wanted, "{format:?}");
        }
    }
}
