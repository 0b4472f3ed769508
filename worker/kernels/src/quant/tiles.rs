//! Tiles of quantised weights: 16 rows side by side, at their true bit width.
//!
//! A run of 32 columns of 16 rows is eight vectors of 64 bytes; byte `lane * 4 + i` of vector `2 *
//! j + half` is column `16 * half + 4 * j + i` of row `lane`: what `vpdpbusd` wants. 4- and 5-bit
//! formats keep the vectors of a j as one: half 0 low, half 1 high; fifth bits are a mask of 64 for
//! each vector.

use half::f16;

use super::blocks::{Blocks, RUN, Scales};
use crate::linear::TileWeights;
use crate::matrix::{Aligned, Source, TILE_ROWS};

/// Runs of a super-block.
const SUPER_RUNS: usize = 8;

/// Bytes of a run's fifth bits, of all rows of a tile.
pub(crate) const FIFTHS: usize = 64;

/// Packed weights of a matrix. Empty where a format has no such thing.
#[derive(Debug, Default)]
pub(crate) struct Tiles {
    /// `[tile, run, 256 or 512]`
    quants: Aligned,
    /// `[tile, run, 8 masks of 64]`
    fifths: Aligned,
    /// f16 bits: `[tile, run, 16]`, of super-blocks `[tile, super-block, 16]`.
    d: Vec<u16>,
    /// As `d`.
    m: Vec<u16>,
    /// `[tile, run, 16]`
    sc: Vec<u8>,
    /// `[tile, run, 16]`
    mc: Vec<u8>,
    n_runs: usize,
    /// Super-blocks that a row's runs touch.
    n_supers: usize,
    /// Run of the first super-block at which rows begin: not 0 where a split fell inside it.
    first_run: usize,
}

/// Bytes of a run's quants, of all rows of a tile.
pub(crate) const fn quant_bytes(bits: usize) -> usize {
    if bits == 8 { 512 } else { 256 }
}

impl Tiles {
    pub(crate) fn pack<B: Blocks>(rows: usize, columns: usize, source: &dyn Source) -> Self {
        let runs_per_block = B::FORMAT.block_len() / RUN;
        let mut tiles = Self::empty::<B>(rows, columns, source.first_column() / RUN);
        for row in 0..rows {
            let blocks = source.row_blocks(row);
            for b in 0..tiles.n_runs {
                let at = tiles.first_run + b;
                let bytes = B::FORMAT.block_bytes();
                let block = &blocks[at / runs_per_block * bytes..][..bytes];
                tiles.put::<B>(row, b, &B::run(block, at % runs_per_block));
            }
        }
        tiles
    }

    fn empty<B: Blocks>(rows: usize, columns: usize, first_run: usize) -> Self {
        let n_runs = columns / RUN;
        let n_tiles = rows.div_ceil(TILE_ROWS);
        let n_supers = (first_run + n_runs).div_ceil(SUPER_RUNS);
        let is_super = B::SCALES == Scales::Super;
        let n_scales = n_tiles * TILE_ROWS * if is_super { n_supers } else { n_runs };
        let n_integers = if is_super { n_tiles * n_runs * TILE_ROWS } else { 0 };
        let n_fifths = if B::BITS == 5 { n_tiles * n_runs * FIFTHS } else { 0 };
        Self {
            quants: Aligned::zeroed(n_tiles * n_runs * quant_bytes(B::BITS)),
            fifths: Aligned::zeroed(n_fifths),
            d: vec![0; n_scales],
            m: vec![0; if B::SCALES == Scales::Plain { 0 } else { n_scales }],
            sc: vec![0; n_integers],
            mc: vec![0; n_integers],
            n_runs,
            n_supers,
            first_run,
        }
    }

    fn put<B: Blocks>(&mut self, row: usize, b: usize, run: &super::blocks::Run) {
        let (tile, lane) = (row / TILE_ROWS, row % TILE_ROWS);
        let at = tile * self.n_runs + b;
        let scale_at = match B::SCALES {
            Scales::Plain | Scales::Min => at,
            Scales::Super => {
                self.sc[at * TILE_ROWS + lane] = run.sc;
                self.mc[at * TILE_ROWS + lane] = run.mc;
                tile * self.n_supers + (self.first_run + b) / SUPER_RUNS
            }
        };
        self.d[scale_at * TILE_ROWS + lane] = run.d;
        if B::SCALES != Scales::Plain {
            self.m[scale_at * TILE_ROWS + lane] = run.m;
        }
        let bytes = quant_bytes(B::BITS);
        let quants = &mut self.quants[at * bytes..(at + 1) * bytes];
        for (k, &u) in run.u.iter().enumerate() {
            let (vector, byte) = place(k, lane);
            if B::BITS == 8 {
                quants[vector * 64 + byte] = u;
            } else {
                quants[vector / 2 * 64 + byte] |= (u & 15) << (vector % 2 * 4);
            }
            if B::BITS == 5 && u & 16 != 0 {
                self.fifths[at * FIFTHS + vector * 8 + byte / 8] |= 1 << (byte % 8);
            }
        }
    }

    /// One row as f32. A zero is +0.
    pub(crate) fn dequantise<B: Blocks>(&self, row: usize, out: &mut [f32]) {
        let w = self.tile::<B>(row / TILE_ROWS);
        let lane = row % TILE_ROWS;
        for (b, out) in out.chunks_exact_mut(RUN).enumerate() {
            let (scale, min) = w.scale_and_min::<B>(b, lane);
            for (k, out) in out.iter_mut().enumerate() {
                *out = scale * (w.integer::<B>(b, lane, k) - B::ZERO) as f32 + min + 0.0;
            }
        }
    }

    pub(crate) fn tile<B: Blocks>(&self, tile: usize) -> TileWeights<'_> {
        let runs = tile * self.n_runs..(tile + 1) * self.n_runs;
        let scales = match B::SCALES {
            Scales::Plain | Scales::Min => runs.clone(),
            Scales::Super => tile * self.n_supers..(tile + 1) * self.n_supers,
        };
        fn part<'a, T>(all: &'a [T], range: &std::ops::Range<usize>, each: usize) -> &'a [T] {
            if all.is_empty() { all } else { &all[range.start * each..range.end * each] }
        }
        TileWeights {
            quants: part(&self.quants, &runs, quant_bytes(B::BITS)),
            fifths: part(&self.fifths, &runs, FIFTHS),
            d: part(&self.d, &scales, TILE_ROWS),
            m: part(&self.m, &scales, TILE_ROWS),
            sc: part(&self.sc, &runs, TILE_ROWS),
            mc: part(&self.mc, &runs, TILE_ROWS),
            first_run: self.first_run,
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        let Self { quants, fifths, d, m, sc, mc, .. } = self;
        quants.len() + fifths.len() + 2 * (d.len() + m.len()) + sc.len() + mc.len()
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
            Scales::Super => (self.first_run + b) / SUPER_RUNS * TILE_ROWS,
        }
    }

    /// Scale and min of a row's run; products of f16 and 6-bit integers are exact in f32.
    #[inline(always)]
    pub(crate) fn scale_and_min<B: Blocks>(&self, b: usize, lane: usize) -> (f32, f32) {
        let at = self.scale_at::<B>(b) + lane;
        let half = |bits: u16| f16::from_bits(bits).to_f32();
        match B::SCALES {
            Scales::Plain => (half(self.d[at]), 0.0),
            Scales::Min => (half(self.d[at]), half(self.m[at])),
            Scales::Super => {
                let integer = |of: &[u8]| f32::from(of[b * TILE_ROWS + lane]);
                (half(self.d[at]) * integer(self.sc), -(half(self.m[at]) * integer(self.mc)))
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
        let fifth = match B::BITS {
            5 => (self.fifths[b * FIFTHS + vector * 8 + byte / 8] >> (byte % 8)) & 1,
            _ => 0,
        };
        i32::from(low | fifth << 4)
    }
}
