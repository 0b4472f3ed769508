//! Tiles of quantised weights: 16 rows side by side, at their true bit width.
//!
//! A run of 32 columns of 16 rows is eight vectors of 64 bytes; byte `lane * 4 + i` of vector `2 *
//! j + half` is column `16 * half + 4 * j + i` of row `lane`: what `vpdpbusd` wants. 4- and 5-bit
//! formats keep the vectors of a j as one: half 0 low, half 1 high; fifth bits are a mask of 64 for
//! each vector. 6-bit formats do so too, and have two more vectors: the two top bits of vectors 0 to
//! 3 and of 4 to 7, lowest first.
//!
//! A tile is one record of bytes that is read from end to end: run after run, each its quants and what
//! else it has; where runs share the scales of a super-block, those stand before its first run.

use half::f16;

use super::blocks::{Blocks, RUN, Scales};
use crate::linear::TileWeights;
use crate::matrix::TILE_ROWS;
use crate::memory::Stretch;

/// Runs of a super-block.
pub(super) const SUPER_RUNS: usize = 8;

/// Where the top bits of a run of 6-bit quants begin.
pub(crate) const TOPS: usize = 256;

/// Bytes of a run's fifth bits, of all rows of a tile.
pub(crate) const FIFTHS: usize = 64;

/// Bytes of a cache line. Records begin on one; their parts on half of one.
pub(crate) const LINE: usize = 64;

/// Bytes of one f16 of each row.
pub(super) const HALVES: usize = 2 * TILE_ROWS;

/// Packed weights of a matrix: `[tile, record]`.
#[derive(Debug)]
pub(crate) struct Tiles {
    pub(crate) bytes: Stretch,
    pub(crate) record: Record,
}

/// How long a tile's bytes are.
#[derive(Debug, Clone)]
pub(crate) struct Record {
    pub(super) n_runs: usize,
    /// Run of the first super-block at which rows begin: not 0 where a split fell inside it.
    pub(super) first_run: usize,
    len: usize,
}

/// Bytes of a run's quants, of all rows of a tile.
pub(crate) const fn quant_bytes(bits: usize) -> usize {
    match bits {
        8 => 512,
        6 => TOPS + 128,
        _ => 256,
    }
}

/// What stands where: a run is its quants, masks of fifth bits, and scales: f16 ones and mins or,
/// where a super-block's head has those, integer ones. A format has what it needs of them.
pub(super) trait Places: Blocks {
    /// `[8 masks of 64]`
    const FIFTHS_AT: usize = quant_bytes(Self::BITS);
    /// f16 bits: `[16]`, and mins `[16]`; or integers: `[2, 16]`.
    const SCALES_AT: usize = Self::FIFTHS_AT + if Self::BITS == 5 { FIFTHS } else { 0 };
    /// Bytes of a run.
    const RUN_BYTES: usize =
        Self::SCALES_AT + if Self::SCALES.is_super() { 2 * TILE_ROWS } else { Self::HALVES_BYTES };
    /// Bytes before the first run of a super-block.
    const HEAD_BYTES: usize = if Self::SCALES.is_super() { Self::HALVES_BYTES } else { 0 };
    /// Bytes of f16 scales and mins.
    const HALVES_BYTES: usize = if Self::SCALES.has_min() { 2 * HALVES } else { HALVES };

    /// Where run b begins, of rows that begin at run `first_run` of a super-block.
    #[inline(always)]
    fn run_at(first_run: usize, b: usize) -> usize {
        let n_heads = if Self::HEAD_BYTES > 0 { (first_run + b) / SUPER_RUNS + 1 } else { 0 };
        b * Self::RUN_BYTES + n_heads * Self::HEAD_BYTES
    }

    /// Where the head of its super-block begins; where runs have scales of their own, those.
    #[inline(always)]
    fn head_at(first_run: usize, b: usize) -> usize {
        if Self::HEAD_BYTES == 0 {
            return Self::run_at(first_run, b) + Self::SCALES_AT;
        }
        let block = (first_run + b) / SUPER_RUNS;
        let first = (block * SUPER_RUNS).saturating_sub(first_run);
        first * Self::RUN_BYTES + block * Self::HEAD_BYTES
    }
}

impl<B: Blocks> Places for B {}

impl Record {
    /// Of rows of `columns`, the first of which is `first_column` of a block.
    pub(crate) fn new<B: Blocks>(columns: usize, first_column: usize) -> Self {
        let (n_runs, first_run) = (columns / RUN, first_column / RUN);
        let len = match n_runs {
            0 => 0,
            _ => B::run_at(first_run, n_runs - 1) + B::RUN_BYTES,
        };
        Self { n_runs, first_run, len: len.next_multiple_of(LINE) }
    }

    /// Bytes of a tile.
    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

impl Tiles {
    /// One row as f32. A zero is +0.
    pub(crate) fn dequantise<B: Blocks>(&self, row: usize, out: &mut [f32]) {
        let w = self.tile(row / TILE_ROWS);
        let lane = row % TILE_ROWS;
        for (b, out) in out.chunks_exact_mut(RUN).enumerate() {
            for (k, out) in out.iter_mut().enumerate() {
                let (scale, min) = w.scale_and_min::<B>(b, lane, k / 16);
                *out = scale * (w.integer::<B>(b, lane, k) - B::ZERO) as f32 + min + 0.0;
            }
        }
    }

    pub(crate) fn tile(&self, tile: usize) -> TileWeights<'_> {
        let Record { first_run, len, .. } = self.record;
        TileWeights { bytes: &self.bytes[tile * len..(tile + 1) * len], first_run }
    }
}

/// Vector and byte of column k of a row.
#[inline(always)]
fn place(k: usize, lane: usize) -> (usize, usize) {
    (k % 16 / 4 * 2 + k / 16, lane * 4 + k % 4)
}

impl TileWeights<'_> {
    /// The bytes of run b and what follows.
    #[inline(always)]
    pub(crate) fn run<B: Blocks>(&self, b: usize) -> &[u8] {
        &self.bytes[B::run_at(self.first_run, b)..]
    }

    /// The f16 scales of run b, and what follows.
    #[inline(always)]
    pub(crate) fn head<B: Blocks>(&self, b: usize) -> &[u8] {
        &self.bytes[B::head_at(self.first_run, b)..]
    }

    /// Run behind the super-block of run b.
    #[inline(always)]
    pub(crate) fn block_end(&self, b: usize) -> usize {
        ((self.first_run + b) / SUPER_RUNS + 1) * SUPER_RUNS - self.first_run
    }

    /// The f16 scale of a row's run, and its min where the format has one.
    #[inline(always)]
    pub(crate) fn halves<B: Blocks>(&self, b: usize, lane: usize) -> [f32; 2] {
        let head = self.head::<B>(b);
        let half = |at: usize| {
            f16::from_bits(u16::from_ne_bytes([head[at + 2 * lane], head[at + 2 * lane + 1]]))
        };
        let min = if B::SCALES.has_min() { half(HALVES).to_f32() } else { 0.0 };
        [half(0).to_f32(), min]
    }

    /// Integer scales of both halves of a row's run, or its scale and its min.
    #[inline(always)]
    pub(crate) fn integer_scales<B: Blocks>(&self, b: usize, lane: usize) -> [i32; 2] {
        let scales = &self.run::<B>(b)[B::SCALES_AT..];
        [scales[lane], scales[TILE_ROWS + lane]].map(|scale| i32::from(scale as i8))
    }

    /// Scale and min of half a row's run; products of f16 and 6-bit integers are exact in f32.
    #[inline(always)]
    pub(crate) fn scale_and_min<B: Blocks>(
        &self,
        b: usize,
        lane: usize,
        half_run: usize,
    ) -> (f32, f32) {
        let [d, m] = self.halves::<B>(b, lane);
        if !B::SCALES.is_super() {
            return (d, m);
        }
        let integers = self.integer_scales::<B>(b, lane).map(|scale| scale as f32);
        match B::SCALES {
            Scales::Halves => (d * integers[half_run], 0.0),
            _ => (d * integers[0], -(m * integers[1])),
        }
    }

    /// The unsigned integer of a row's column.
    #[inline(always)]
    pub(crate) fn integer<B: Blocks>(&self, b: usize, lane: usize, k: usize) -> i32 {
        let (vector, byte) = place(k, lane);
        let run = self.run::<B>(b);
        if B::BITS == 8 {
            return i32::from(run[vector * 64 + byte]);
        }
        let low = (run[vector / 2 * 64 + byte] >> (vector % 2 * 4)) & 15;
        let top = match B::BITS {
            5 => (run[B::FIFTHS_AT + vector * 8 + byte / 8] >> (byte % 8)) & 1,
            6 => (run[TOPS + vector / 4 * 64 + byte] >> (vector % 4 * 2)) & 3,
            _ => 0,
        };
        i32::from(low | top << 4)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::{Format, with_blocks};

    #[test]
    fn the_parts_of_a_record_fill_it_and_do_not_overlap() {
        for format in Format::ALL {
            with_blocks!(format, B => check::<B>(), _ => {});
        }
    }

    fn check<B: Blocks>() {
        let first_runs = 0..B::FORMAT.block_len() / RUN;
        for (first_run, n_runs) in first_runs.flat_map(|first| (1..20).map(move |n| (first, n))) {
            let record = Record::new::<B>(n_runs * RUN, first_run * RUN);
            let mut n_parts = vec![0; record.len()];
            let mut heads = Vec::new();
            for b in 0..n_runs {
                let run = B::run_at(first_run, b);
                n_parts[run..run + B::RUN_BYTES].iter_mut().for_each(|n| *n += 1);
                let head = B::head_at(first_run, b);
                if B::HEAD_BYTES == 0 {
                    assert_eq!(head + B::HALVES_BYTES, run + B::RUN_BYTES);
                } else if heads.last() != Some(&head) {
                    heads.push(head);
                    n_parts[head..head + B::HEAD_BYTES].iter_mut().for_each(|n| *n += 1);
                }
            }
            let filled = n_parts.iter().take_while(|&&n| n == 1).count();
            assert!(n_parts[filled..].iter().all(|&n| n == 0), "{first_run} {n_runs}");
            assert!(record.len() - filled < LINE, "{first_run} {n_runs}");
        }
    }
}
