//! Tiles of quantised weights: 16 rows side by side, at their true bit width.
//!
//! A run of 32 columns of 16 rows is eight vectors of 64 bytes; byte `lane * 4 + i` of vector `2 *
//! j + half` is column `16 * half + 4 * j + i` of row `lane`: what `vpdpbusd` wants. 4- and 5-bit
//! formats keep the vectors of a j as one: half 0 low, half 1 high; fifth bits are a mask of 64 for
//! each vector. 6-bit formats do so too, and have two more vectors: the two top bits of vectors 0 to
//! 3 and of 4 to 7, lowest first.
//!
//! A tile is one record of bytes, so that whoever reads it reads one stream.

use std::ops::Range;

use half::f16;

use super::blocks::{Blocks, RUN, Scales};
use crate::linear::TileWeights;
use crate::matrix::TILE_ROWS;
use crate::memory::{Stretch, numbers};

/// Runs of a super-block.
pub(super) const SUPER_RUNS: usize = 8;

/// Where the top bits of a run of 6-bit quants begin.
pub(crate) const TOPS: usize = 256;

/// Bytes of a run's fifth bits, of all rows of a tile.
pub(crate) const FIFTHS: usize = 64;

/// Parts of a record begin on a cache line.
pub(crate) const LINE: usize = 64;

/// Packed weights of a matrix: `[tile, record]`.
#[derive(Debug)]
pub(crate) struct Tiles {
    pub(crate) bytes: Stretch,
    pub(crate) record: Record,
}

/// What stands where in a tile's bytes. Empty where a format has no such thing.
#[derive(Debug, Clone)]
pub(crate) struct Record {
    /// `[run, 256 or 512]`
    pub(super) quants: Range<usize>,
    /// `[run, 8 masks of 64]`
    pub(super) fifths: Range<usize>,
    /// f16 bits: `[run, 16]`, of super-blocks `[super-block, 16]`.
    pub(super) d: Range<usize>,
    /// As `d`.
    pub(super) m: Range<usize>,
    /// `[run, 16]`
    pub(super) sc: Range<usize>,
    /// `[run, 16]`
    pub(super) mc: Range<usize>,
    len: usize,
    pub(super) n_runs: usize,
    /// Run of the first super-block at which rows begin: not 0 where a split fell inside it.
    pub(super) first_run: usize,
}

/// Bytes of a run's quants, of all rows of a tile.
pub(crate) const fn quant_bytes(bits: usize) -> usize {
    match bits {
        8 => 512,
        6 => TOPS + 128,
        _ => 256,
    }
}

impl Record {
    /// Of rows of `columns`, the first of which is `first_column` of a block.
    pub(crate) fn new<B: Blocks>(columns: usize, first_column: usize) -> Self {
        let (n_runs, first_run) = (columns / RUN, first_column / RUN);
        let is_super = B::SCALES.is_super();
        let n_scales = if is_super { (first_run + n_runs).div_ceil(SUPER_RUNS) } else { n_runs };
        let scales = 2 * TILE_ROWS * n_scales;
        let integers = if is_super { TILE_ROWS * n_runs } else { 0 };
        let mut len = 0;
        let mut part = |bytes: usize| {
            let start = len;
            len += bytes.next_multiple_of(LINE);
            start..start + bytes
        };
        Self {
            quants: part(n_runs * quant_bytes(B::BITS)),
            fifths: part(if B::BITS == 5 { n_runs * FIFTHS } else { 0 }),
            d: part(scales),
            m: part(if B::SCALES.has_min() { scales } else { 0 }),
            sc: part(integers),
            mc: part(integers),
            len,
            n_runs,
            first_run,
        }
    }

    /// Bytes of a tile.
    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

impl Tiles {
    /// One row as f32. A zero is +0.
    pub(crate) fn dequantise<B: Blocks>(&self, row: usize, out: &mut [f32]) {
        let w = self.tile::<B>(row / TILE_ROWS);
        let lane = row % TILE_ROWS;
        for (b, out) in out.chunks_exact_mut(RUN).enumerate() {
            for (k, out) in out.iter_mut().enumerate() {
                let (scale, min) = w.scale_and_min::<B>(b, lane, k / 16);
                *out = scale * (w.integer::<B>(b, lane, k) - B::ZERO) as f32 + min + 0.0;
            }
        }
    }

    pub(crate) fn tile<B: Blocks>(&self, tile: usize) -> TileWeights<'_> {
        let of = &self.record;
        let record = &self.bytes[tile * of.len..(tile + 1) * of.len];
        TileWeights {
            quants: &record[of.quants.clone()],
            fifths: &record[of.fifths.clone()],
            d: numbers(&record[of.d.clone()]),
            m: numbers(&record[of.m.clone()]),
            sc: &record[of.sc.clone()],
            mc: &record[of.mc.clone()],
            first_run: of.first_run,
            len: of.len,
        }
    }
}

/// Vector and byte of column k of a row.
#[inline(always)]
fn place(k: usize, lane: usize) -> (usize, usize) {
    (k % 16 / 4 * 2 + k / 16, lane * 4 + k % 4)
}

impl TileWeights<'_> {
    /// Where run b's f16 scales stand.
    #[inline(always)]
    pub(crate) fn scale_at<B: Blocks>(&self, b: usize) -> usize {
        match B::SCALES {
            Scales::Plain | Scales::Min => b * TILE_ROWS,
            Scales::Super | Scales::Halves => (self.first_run + b) / SUPER_RUNS * TILE_ROWS,
        }
    }

    /// Run behind the super-block of run b.
    #[inline(always)]
    pub(crate) fn block_end(&self, b: usize) -> usize {
        ((self.first_run + b) / SUPER_RUNS + 1) * SUPER_RUNS - self.first_run
    }

    /// Integer scales of both halves of a row's run.
    #[inline(always)]
    pub(crate) fn integer_scales(&self, b: usize, lane: usize) -> [i32; 2] {
        let at = b * TILE_ROWS + lane;
        [self.sc[at], self.mc[at]].map(|scale| i32::from(scale as i8))
    }

    /// Scale and min of half a row's run; products of f16 and 6-bit integers are exact in f32.
    #[inline(always)]
    pub(crate) fn scale_and_min<B: Blocks>(
        &self,
        b: usize,
        lane: usize,
        half_run: usize,
    ) -> (f32, f32) {
        let at = self.scale_at::<B>(b) + lane;
        let half = |bits: u16| f16::from_bits(bits).to_f32();
        match B::SCALES {
            Scales::Plain => (half(self.d[at]), 0.0),
            Scales::Min => (half(self.d[at]), half(self.m[at])),
            Scales::Super => {
                let integer = |of: &[u8]| f32::from(of[b * TILE_ROWS + lane]);
                (half(self.d[at]) * integer(self.sc), -(half(self.m[at]) * integer(self.mc)))
            }
            Scales::Halves => {
                let integers = if half_run == 0 { self.sc } else { self.mc };
                (half(self.d[at]) * f32::from(integers[b * TILE_ROWS + lane] as i8), 0.0)
            }
        }
    }

    /// The unsigned integer of a row's column.
    #[inline(always)]
    pub(crate) fn integer<B: Blocks>(&self, b: usize, lane: usize, k: usize) -> i32 {
        let (vector, byte) = place(k, lane);
        let quants = &self.quants[b * quant_bytes(B::BITS)..];
        if B::BITS == 8 {
            return i32::from(quants[vector * 64 + byte]);
        }
        let low = (quants[vector / 2 * 64 + byte] >> (vector % 2 * 4)) & 15;
        let top = match B::BITS {
            5 => (self.fifths[b * FIFTHS + vector * 8 + byte / 8] >> (byte % 8)) & 1,
            6 => (quants[TOPS + vector / 4 * 64 + byte] >> (vector % 4 * 2)) & 3,
            _ => 0,
        };
        i32::from(low | top << 4)
    }
}
