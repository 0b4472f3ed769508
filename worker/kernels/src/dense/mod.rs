//! Weights that are floats: bf16, f16 and f32 at their true width, in tiles of 16 rows.
//!
//! Three arithmetics, one for all batch sizes of a machine:
//! * [`wide`]: weights widened to f32, activations as they are, fused multiply-adds. Every f16 and
//!   f32 weight, and bf16 without AMX. The same bits on every instruction set.
//! * [`amx`]: bf16 on AMX. Activations as one or two bf16 terms; the order is the instruction's.
//! * [`pairs`]: bf16 with activations of one bf16 term ([`Precision::Int8`]) without AMX, by
//!   `vdpbf16ps` where the machine has it.
//!
//! So bf16 gives other bits on a machine with AMX than on one without; on each of them an output
//! depends on its row and the weights alone.

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
mod leaves;
mod pack;
mod pairs;
mod terms;
mod wide;

use std::ops::Range;

use crate::activation::Precision;
use crate::isa::Isa;
use crate::linear::{Sum, put};
use crate::matrix::TILE_ROWS;
use crate::pool::Shards;
use crate::quant::Format;

pub(crate) use pack::{Dense, format_of, pack_tile, tile_bytes};
pub(crate) use terms::Terms;

/// What tiles are multiplied with, and where the products go.
pub(crate) struct Task<'a> {
    /// `[rows, columns]`
    pub(crate) x: &'a [f32],
    /// `x` in bf16, where [`needs_terms`] said so.
    pub(crate) terms: &'a Terms,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) sum: &'a Sum<'a>,
    /// `[parts, rows, out_columns]`
    pub(crate) out: Shards<'a, f32>,
    /// Rows of the weight matrix.
    pub(crate) out_columns: usize,
}

impl Task<'_> {
    /// Writes one part of one row's products with a tile.
    #[inline(always)]
    fn store(&self, part: usize, row: usize, tile: usize, values: &[f32; TILE_ROWS]) {
        let first = tile * TILE_ROWS;
        let n = (self.out_columns - first).min(TILE_ROWS);
        let at = (part * self.rows + row) * self.out_columns + first;
        // SAFETY: a tile's columns of the output belong to the one thread that runs this tile.
        put(unsafe { self.out.range(at..at + n) }, values);
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Arithmetic {
    Wide,
    Amx,
    Pairs,
}

fn arithmetic(isa: Isa, format: Format, precision: Precision) -> Arithmetic {
    match (format, isa, precision) {
        (Format::Bf16, Isa::Avx512Amx, _) => Arithmetic::Amx,
        (Format::Bf16, _, Precision::Int8) => Arithmetic::Pairs,
        _ => Arithmetic::Wide,
    }
}

/// Whether weights of this format are multiplied with bf16 terms.
pub(crate) fn needs_terms(isa: Isa, format: Format, precision: Precision) -> bool {
    arithmetic(isa, format, precision) != Arithmetic::Wide
}

/// Whether wide matrices are multiplied a span of columns at a time.
pub(crate) fn has_spans(isa: Isa, format: Format, precision: Precision) -> bool {
    arithmetic(isa, format, precision) == Arithmetic::Amx
}

/// Columns of a span, of which a chunk of rows stays near.
pub(crate) const SPAN_COLUMNS: usize = 2048;

/// Tiles that are worth taking at once for so many rows: pairs, and more of them where spans of
/// activations are read again for each.
pub(crate) fn least_tiles(rows: usize) -> usize {
    if rows <= 2 * terms::GROUP { 2 } else { 8 }
}

/// Multiplies some tiles with some rows, which begin at a multiple of 16.
pub(crate) fn run(
    isa: Isa,
    precision: Precision,
    w: &Dense,
    tiles: Range<usize>,
    rows: Range<usize>,
    task: &Task<'_>,
) {
    debug_assert!(rows.start.is_multiple_of(terms::GROUP));
    match arithmetic(isa, w.format(), precision) {
        Arithmetic::Wide => wide::run(isa, w, tiles, rows, task),
        Arithmetic::Pairs => pairs::run(isa, w, tiles, rows, task),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: this `Isa` was detected on this CPU.
        Arithmetic::Amx => unsafe {
            match precision {
                Precision::Int8 => amx::run::<1>(w, tiles, rows, task),
                Precision::Int12 => amx::run::<2>(w, tiles, rows, task),
            }
        },
        #[cfg(not(target_arch = "x86_64"))]
        Arithmetic::Amx => unreachable!("only x86 has AMX"),
    }
}
