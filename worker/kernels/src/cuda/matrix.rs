//! Weights on a device: packed here (FP8 in `fp8.rs`) as the kernels read them (`cuda/quantised.cu`,
//! `cuda/dense.cu`), at the true width of their format, and uploaded some rows at a time.

use std::ops::{ControlFlow, Range};

use super::fp8::Fp8;
use super::launch::Words;
use super::memory::Buffer;
use super::{Device, Error};
use crate::matrix::{TILE_ROWS, Unpacked};
use crate::quant::blocks::{Blocks, RUN, Run, Scales};
use crate::quant::{Format, with_blocks};

/// Tiles that are packed before they are uploaded.
const CHUNK_TILES: usize = 256;
/// Tiles that are worth a thread.
const LEAST_TILES: usize = 8;
/// Runs of a step.
pub(super) const STEP: usize = 4;
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
    Fp8(Fp8),
}

/// Planes, and the argument that tells a kernel of them.
#[derive(Debug)]
pub(super) struct Quantised {
    planes: [Buffer<u32>; 4], // quants, tops, scales, supers
    pub(super) argument: [u64; 6],
}

impl Words for Quantised {
    fn words(&self) -> &[u64] {
        &self.argument
    }
}

/// Words of a tile in each plane: its lanes' words of a run, of two runs, of four, or of a
/// super-block. Runs are padded to whole steps.
fn words_of_tile(bits: usize, scales: Scales, n_runs: usize, n_supers: usize) -> [usize; 4] {
    let fours = n_runs.div_ceil(STEP);
    let pairs = 2 * fours;
    let quants = if bits == 8 { 2 * 8 * TILE_ROWS * pairs } else { 8 * TILE_ROWS * pairs };
    let tops = match bits {
        5 => 2 * TILE_ROWS * pairs,
        6 => 4 * TILE_ROWS * pairs,
        _ => 0,
    };
    let (scales, supers) = match scales {
        Scales::Plain => (2 * TILE_ROWS * fours, 0),
        Scales::Min => (2 * TILE_ROWS * pairs, 0),
        Scales::Super => (2 * TILE_ROWS * fours, TILE_ROWS * n_supers),
        Scales::Halves => (2 * TILE_ROWS * fours, TILE_ROWS / 2 * n_supers),
    };
    [quants, tops, scales, supers]
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
            _ => match format {
                Format::Fp8 => Fp8::load(device, source, admit)?.map(Weights::Fp8),
                _ => load_dense(device, source, admit)?,
            }
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
            Weights::Fp8(fp8) => fp8.bytes(),
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
    let (mut staged_floats, mut staged_halves) = (Vec::new(), Vec::new());
    for first in (0..rows).step_by(CHUNK_TILES * TILE_ROWS) {
        let chunk = first..rows.min(first + CHUNK_TILES * TILE_ROWS);
        if admit(chunk.clone()).is_break() {
            return Ok(None);
        }
        let of_rows = chunk.map(|row| from.row_blocks(row));
        if is_f32 {
            staged_floats.clear();
            for bytes in of_rows {
                staged_floats.extend(bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)));
            }
            floats.upload(first * columns, &staged_floats)?;
        } else {
            staged_halves.clear();
            for bytes in of_rows {
                staged_halves.extend(bytes.as_chunks().0.iter().map(|&b| u16::from_le_bytes(b)));
            }
            halves.upload(first * columns, &staged_halves)?;
        }
    }
    if is_f32 {
        return Ok(Some(Weights::Floats(floats)));
    }
    halves.upload(rows * columns, &vec![0; (padded - rows) * columns])?;
    Ok(Some(Weights::Halves(halves)))
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
        let of_tile = words_of_tile(B::BITS, B::SCALES, n_runs, n_supers);
        let n_tiles = rows.div_ceil(TILE_ROWS);
        // The spare words may be fetched, and are not looked at.
        let [quants, tops, scales, supers] =
            of_tile.map(|words| device.buffer(words * n_tiles + TILE_ROWS));
        let planes = [quants?, tops?, scales?, supers?];
        let mut staged: [Vec<u32>; 4] = Default::default();
        for first in (0..n_tiles).step_by(CHUNK_TILES) {
            let tiles = first..n_tiles.min(first + CHUNK_TILES);
            if admit(tiles.start * TILE_ROWS..rows.min(tiles.end * TILE_ROWS)).is_break() {
                return Ok(None);
            }
            for (plane, words) in staged.iter_mut().zip(of_tile) {
                plane.clear();
                plane.resize(words * tiles.len(), 0);
            }
            pack::<B>(source, tiles, of_tile, &mut staged);
            for ((plane, staged), words) in planes.iter().zip(&staged).zip(of_tile) {
                plane.upload(words * first, staged)?;
            }
        }
        let pair = |low: usize, high: usize| low as u64 | (high as u64) << 32;
        let [quants, tops, scales, supers] = planes.each_ref().map(Buffer::address);
        let argument =
            [quants, tops, scales, supers, pair(rows, n_runs), pair(first_run, n_supers)];
        Ok(Some(Self { planes, argument }))
    }
}

/// Packs tiles into the planes' chunks, with all of the machine's processors.
fn pack<B: Blocks>(
    source: &Unpacked<'_>,
    tiles: Range<usize>,
    of_tile: [usize; 4],
    staged: &mut [Vec<u32>; 4],
) {
    let n_threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let share = tiles.len().div_ceil(n_threads).max(LEAST_TILES);
    let mut rest = staged.each_mut().map(Vec::as_mut_slice);
    std::thread::scope(|scope| {
        for first in tiles.clone().step_by(share) {
            let mine = first..tiles.end.min(first + share);
            let (planes, others) = split_planes(rest, of_tile, mine.len());
            rest = others;
            let work = move || pack_tiles::<B>(source, mine, of_tile, planes);
            if first + share < tiles.end {
                scope.spawn(work);
            } else {
                work();
            }
        }
    });
}

/// The first tiles of each plane, and the others.
fn split_planes(
    planes: [&mut [u32]; 4],
    of_tile: [usize; 4],
    n_tiles: usize,
) -> ([&mut [u32]; 4], [&mut [u32]; 4]) {
    let [a, b, c, d] = planes;
    let (a, a_rest) = a.split_at_mut(of_tile[0] * n_tiles);
    let (b, b_rest) = b.split_at_mut(of_tile[1] * n_tiles);
    let (c, c_rest) = c.split_at_mut(of_tile[2] * n_tiles);
    let (d, d_rest) = d.split_at_mut(of_tile[3] * n_tiles);
    ([a, b, c, d], [a_rest, b_rest, c_rest, d_rest])
}

fn pack_tiles<B: Blocks>(
    source: &Unpacked<'_>,
    tiles: Range<usize>,
    of_tile: [usize; 4],
    [quants, tops, scales, supers]: [&mut [u32]; 4],
) {
    let Unpacked { rows, columns, source: from } = *source;
    let first_run = from.first_column() / RUN;
    let (len, bytes) = (B::FORMAT.block_len() / RUN, B::FORMAT.block_bytes());
    for row in tiles.start * TILE_ROWS..rows.min(tiles.end * TILE_ROWS) {
        let tile = row / TILE_ROWS - tiles.start;
        let mut place = Place {
            quants: &mut quants[tile * of_tile[0]..][..of_tile[0]],
            tops: &mut tops[tile * of_tile[1]..][..of_tile[1]],
            scales: &mut scales[tile * of_tile[2]..][..of_tile[2]],
            supers: &mut supers[tile * of_tile[3]..][..of_tile[3]],
            row: row % TILE_ROWS,
        };
        let blocks = from.row_blocks(row);
        for run in 0..columns / RUN {
            let at = first_run + run;
            let packed = B::run(&blocks[at / len * bytes..][..bytes], at % len);
            place.put(B::BITS, B::SCALES, run, &packed);
            place.put_super(B::SCALES, at / SUPER_RUNS, &packed);
        }
    }
}

/// Where a row of a tile goes (`Quantised` of quantised.cu). Lane 4g + t of a warp multiplies rows g
/// and g + 8; words of the two stand side by side.
struct Place<'a> {
    quants: &'a mut [u32],
    tops: &'a mut [u32],
    scales: &'a mut [u32],
    supers: &'a mut [u32],
    row: usize,
}

impl Place<'_> {
    #[inline(always)]
    fn put(&mut self, bits: usize, scales: Scales, at: usize, run: &Run) {
        let (g, below) = (self.row % 8, self.row / 8);
        let (pair, of_pair) = (at / 2, at % 2 * 2 + below);
        for t in 0..4 {
            if bits == 8 {
                let to = &mut self.quants[(at * 32 + g * 4 + t) * 4 + 2 * below..][..2];
                to.copy_from_slice(&run.words[2 * t..2 * t + 2]);
            } else {
                self.quants[(pair * 32 + g * 4 + t) * 4 + of_pair] = run.words[t];
            }
        }
        match bits {
            5 => self.tops[(pair * 8 + g) * 4 + of_pair] = by_lanes(run.fifths),
            6 => {
                for half in 0..2 {
                    let to = &mut self.tops[(pair * 16 + g * 2 + half) * 4 + of_pair];
                    *to = run.words[4 + half];
                }
            }
            _ => {}
        }
        match scales {
            Scales::Plain => self.scales[at / 4 * 32 + g * 4 + at % 4] |= two(run.d, below),
            Scales::Min => {
                let to = &mut self.scales[(pair * 8 + g) * 4 + at % 2 * 2..][..2];
                to[0] |= two(run.d, below);
                to[1] |= two(run.m, below);
            }
            Scales::Super | Scales::Halves => {
                self.scales[at / 4 * 32 + g * 4 + at % 4] |=
                    u32::from(run.sc) << (8 * below) | u32::from(run.mc) << (16 + 8 * below);
            }
        }
    }

    /// The same from each run of a super-block.
    #[inline(always)]
    fn put_super(&mut self, scales: Scales, at: usize, run: &Run) {
        let (g, below) = (self.row % 8, self.row / 8);
        match scales {
            Scales::Plain | Scales::Min => {}
            Scales::Super => {
                let to = &mut self.supers[(at * 8 + g) * 2..][..2];
                to[0] |= two(run.d, below);
                to[1] |= two(run.m, below);
            }
            Scales::Halves => self.supers[at * 8 + g] |= two(run.d, below),
        }
    }
}

/// A half of a word that two rows share.
fn two(bits: u16, below: usize) -> u32 {
    u32::from(bits) << (16 * below)
}

/// Bits of columns in the order in which lanes take them: lane t finds those of its pairs of columns
/// 4t and 4t + 2, 4t + 1 and 4t + 3, and the same of 16 + 4t, at bits t, 4 + t, 8 + t and 12 + t, the
/// second of each pair 16 bits on.
fn by_lanes(fifths: u32) -> u32 {
    (0..32).fold(0, |to, column| {
        let (half, t, within) = (column / 16, column % 16 / 4, column % 4);
        let at = t + 4 * (2 * half + within % 2) + 16 * (within / 2);
        to | (fifths >> column & 1) << at
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_kept_at_the_true_width_of_their_format() {
        // Bits of a weight on the device; K-quants beside super-blocks of 256, as in the file but
        // for Q4_K's and Q5_K's scales, which take whole bytes.
        let bits = |words: [usize; 4]| {
            words.iter().sum::<usize>() as f64 * 32.0 / (TILE_ROWS * RUN * SUPER_RUNS) as f64
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
            let words = with_blocks!(
                format,
                B => words_of_tile(B::BITS, B::SCALES, SUPER_RUNS, 1),
                _ => [0; 4]
            );
            assert_eq!(bits(words), wanted, "{format:?}");
        }
    }
}
