//! bf16 weights with `tdpbf16ps`: a tile register of 16 rows of activations times one of 16 rows of
//! weights, 32 columns at a time.
//!
//! The instruction's order, for a batch of any size: of a block of 32 columns the even ones in a
//! chain from zero, the odd ones in another, their sum added to the block before; subnormals are
//! zero. Where activations have two terms, a block is taken with the first and then with the second.
//! Reading bounds a small batch, so there is no other kernel for it.
//!
//! Two groups of rows take turns with two tiles, a square of four sums in registers. What they read
//! comes from the second-level cache, where the activations of a chunk stay; of wide matrices only a
//! span of columns does, which all tiles of a piece go through before the next. What is next of the
//! tiles is fetched meanwhile.

use std::arch::asm;
use std::cell::RefCell;
use std::ops::Range;

use super::terms::{GROUP, GROUP_BLOCK};
use super::{Dense, SPAN_COLUMNS, Task};
use crate::activation::BLOCK;
use crate::linear::MAX_DEPTH;
use crate::matrix::TILE_ROWS;
use crate::tile_registers::{self, REGISTER};
use crate::windows::{LeafEnd, Window, windows};

/// Blocks of a window, and of a span. In shorter ones sums go to memory more often, which costs more
/// than it saves that weights would stay in the first-level cache.
const SPAN: usize = SPAN_COLUMNS / BLOCK;

/// Bytes of activations that are small enough to stay near as a whole.
const NEAR: usize = 1 << 20;

/// Squares of a pass in both directions: each two groups with two tiles.
const MAX_SQUARES: usize = 8;
const MAX_PAIRS: usize = 8;

/// Bytes of a tile's block: one register.
const TILE_BLOCK: usize = TILE_ROWS * BLOCK * 2;

/// Cache lines of a tile's block.
const LINES: usize = TILE_BLOCK / LINE;
const LINE: usize = 64;

const _: () = assert!(TILE_BLOCK == REGISTER && 2 * GROUP_BLOCK == REGISTER);

type Lanes = [f32; TILE_ROWS];

/// Sums of up to two groups with two tiles: `[group][tile][row of the group]`.
#[repr(C, align(64))]
struct Square([[[Lanes; GROUP]; 2]; 2]);

/// `[pair of tiles][pair of groups]`
type Squares = [[Square; MAX_SQUARES]; MAX_PAIRS];

/// A thread's working memory.
#[repr(C, align(64))]
struct Scratch {
    /// Of the current leaf.
    squares: Squares,
    /// Of leaves that wait for others.
    stack: [Squares; MAX_DEPTH],
}

thread_local! {
    static SCRATCH: RefCell<Box<Scratch>> = RefCell::new(Scratch::new());
}

impl Scratch {
    fn new() -> Box<Self> {
        // SAFETY: all of it is numbers, for which zeros are values.
        unsafe { Box::new_zeroed().assume_init() }
    }
}

/// Makes this thread's working memory.
pub(crate) fn prepare_thread() {
    SCRATCH.with(|_| ());
}

/// Multiplies tiles with rows of TERMS terms.
///
/// # Safety
/// The CPU has what `Isa::Avx512Amx` says.
pub(super) unsafe fn run<const TERMS: usize>(
    w: &Dense,
    tiles: Range<usize>,
    rows: Range<usize>,
    task: &Task<'_>,
) {
    // SAFETY: by the caller's promise.
    let _registers = unsafe { configure(rows.len().min(GROUP)) };
    let groups = rows.start / GROUP..rows.end.div_ceil(GROUP);
    SCRATCH.with_borrow_mut(|scratch| {
        for first in groups.clone().step_by(2 * MAX_SQUARES) {
            let groups = first..groups.end.min(first + 2 * MAX_SQUARES);
            for tile in tiles.clone().step_by(2 * MAX_PAIRS) {
                let tiles = tile..tiles.end.min(tile + 2 * MAX_PAIRS);
                let pass = Pass { w, groups: groups.clone(), tiles, end_row: rows.end, task };
                // SAFETY: by the caller's promise.
                unsafe { pass.run::<TERMS>(scratch) };
            }
        }
    });
}

/// Some groups of rows with some tiles, as squares; a tile alone is taken twice.
struct Pass<'a> {
    w: &'a Dense,
    groups: Range<usize>,
    tiles: Range<usize>,
    end_row: usize,
    task: &'a Task<'a>,
}

/// Which square of a pass.
#[derive(Clone, Copy)]
struct At {
    pair: usize,
    nth: usize,
}

impl Pass<'_> {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn run<const TERMS: usize>(&self, scratch: &mut Scratch) {
        let n_pairs = self.tiles.len().div_ceil(2);
        let columns = self.task.columns;
        let n_blocks = columns / BLOCK;
        let bytes = self.groups.len() * GROUP * columns * TERMS * 2;
        let span = if bytes <= NEAR { n_blocks } else { SPAN };
        let mut left = windows(self.task.sum, SPAN);
        while let Some(first) = left.clone().next() {
            let span = first.blocks.start..(first.blocks.start + span).min(n_blocks);
            let is_within = |window: &Window| window.blocks.end <= span.end;
            let n_windows = left.clone().take_while(is_within).count();
            for pair in 0..n_pairs {
                for (i, window) in left.clone().take(n_windows).enumerate() {
                    let next = if span.len() == n_blocks {
                        // Tile by tile: as far ahead whatever the leaves.
                        let at = window.blocks.start + SPAN.min(n_blocks);
                        (self.first_tile(pair) + at / n_blocks * 2, at % n_blocks)
                    } else if i + 1 < n_windows {
                        (self.first_tile(pair), window.blocks.end)
                    } else if pair + 1 < n_pairs {
                        (self.first_tile(pair + 1), span.start)
                    } else if window.blocks.end < n_blocks {
                        (self.tiles.start, window.blocks.end)
                    } else {
                        (self.tiles.end, 0)
                    };
                    let next = self.w.place(next.0, next.1 * TILE_BLOCK);
                    for nth in 0..self.groups.len().div_ceil(2) {
                        let at = At { pair, nth };
                        // SAFETY: the registers are configured.
                        unsafe { self.multiply::<TERMS>(&window, at, next, scratch) };
                        if let Some(end) = &window.leaf_end {
                            self.end_leaf(end, at, scratch);
                        }
                    }
                }
            }
            left.nth(n_windows - 1);
        }
    }

    fn first_tile(&self, pair: usize) -> usize {
        self.tiles.start + 2 * pair
    }

    /// Adds a window's products to a square; brings near its part of what is next of the tiles.
    ///
    /// # Safety
    /// The registers are configured.
    #[inline]
    unsafe fn multiply<const TERMS: usize>(
        &self,
        window: &Window,
        at: At,
        next: *const u8,
        scratch: &mut Scratch,
    ) {
        let n = window.blocks.len();
        let tile = self.first_tile(at.pair);
        let weights = [tile, (tile + 1).min(self.tiles.end - 1)].map(|tile| {
            let blocks = &self.w.tile(tile)[window.blocks.start * TILE_BLOCK..];
            blocks[..n * TILE_BLOCK].as_ptr()
        });
        let group = self.groups.start + 2 * at.nth;
        let last_group = (group + 1).min(self.groups.end - 1);
        let block = TERMS * GROUP_BLOCK;
        let terms = [group, last_group].map(|group| {
            let blocks = self.task.terms.group(group, self.task.columns);
            blocks[window.blocks.start * block..][..n * block].as_ptr()
        });
        let square = &mut scratch.squares[at.pair][at.nth];
        // Lines of each tile that this square fetches in a step. They go on from square to square:
        // fetched all at once they would hold up what is read.
        let n_squares = self.groups.len().div_ceil(2);
        let lines = LINES / n_squares.next_power_of_two();
        let next = [0, self.w.tile_bytes()]
            .map(|tile| next.wrapping_add(tile + at.nth * n * lines * LINE));
        // SAFETY: by the caller's promise; activations and weights have `n` blocks each; a prefetch
        // may point anywhere.
        unsafe {
            begin(square, window.begins_leaf);
            match (last_group > group, lines) {
                (false, LINES) => one_group::<TERMS, LINES>(terms[0], weights, n, next),
                (false, 8) => one_group::<TERMS, 8>(terms[0], weights, n, next),
                (false, 4) => one_group::<TERMS, 4>(terms[0], weights, n, next),
                (false, _) => one_group::<TERMS, 2>(terms[0], weights, n, next),
                (true, LINES) => two_groups::<TERMS, LINES>(terms, weights, n, next),
                (true, 8) => two_groups::<TERMS, 8>(terms, weights, n, next),
                (true, 4) => two_groups::<TERMS, 4>(terms, weights, n, next),
                (true, _) => two_groups::<TERMS, 2>(terms, weights, n, next),
            }
            keep(square);
        }
    }

    /// Merges a leaf's sums into the tree; stores those of a part that is complete.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    fn end_leaf(&self, end: &LeafEnd, At { pair, nth }: At, scratch: &mut Scratch) {
        let first_row = (self.groups.start + 2 * nth) * GROUP;
        let n_rows = (self.end_row - first_row).min(2 * GROUP);
        let first_tile = self.first_tile(pair);
        for t in 0..(self.tiles.end - first_tile).min(2) {
            for row in 0..n_rows {
                let (group, at) = (row / GROUP, row % GROUP);
                let mut sum = scratch.squares[pair][nth].0[group][t][at];
                for left in scratch.stack[end.left.clone()].iter().rev() {
                    let left = &left[pair][nth].0[group][t][at];
                    sum = std::array::from_fn(|lane| left[lane] + sum[lane]);
                }
                if end.is_whole {
                    self.task.store(end.part, first_row + row, first_tile + t, &sum);
                } else {
                    scratch.stack[end.left.start][pair][nth].0[group][t][at] = sum;
                }
            }
        }
    }
}

/// Sums (`2 * group + tile`) are in registers 0 to 3, activations of up to `rows` rows in 4 and 5,
/// weights in 6 and 7.
///
/// # Safety
/// The CPU has AMX, and the system lets us use it.
unsafe fn configure(rows: usize) -> tile_registers::Registers {
    let mut shapes = [(rows, 64); 8];
    shapes[6..].fill((16, 64));
    // SAFETY: by the caller's promise.
    unsafe { tile_registers::Registers::configure(shapes) }
}

/// Sums to registers: zeros, or what they were. No code until [`keep`] may use the registers.
///
/// # Safety
/// They are configured.
#[inline(always)]
unsafe fn begin(square: &Square, is_new: bool) {
    // SAFETY: by the caller's promise; a square has room for four registers.
    unsafe {
        if is_new {
            tile_registers::zero!(0, 1, 2, 3);
            return;
        }
        asm!(
            "tileloadd tmm0, [{c} + {row}]",
            "tileloadd tmm1, [{c} + {row} + 1024]",
            "tileloadd tmm2, [{c} + {row} + 2048]",
            "tileloadd tmm3, [{c} + {row} + 3072]",
            c = in(reg) square, row = in(reg) 64usize, options(nostack, preserves_flags),
        );
    }
}

/// Sums back to memory.
///
/// # Safety
/// As [`begin`].
#[inline(always)]
unsafe fn keep(square: &mut Square) {
    // SAFETY: as in `begin`.
    unsafe {
        asm!(
            "tilestored [{c} + {row}], tmm0",
            "tilestored [{c} + {row} + 1024], tmm1",
            "tilestored [{c} + {row} + 2048], tmm2",
            "tilestored [{c} + {row} + 3072], tmm3",
            c = in(reg) square, row = in(reg) 64usize, options(nostack, preserves_flags),
        );
    }
}

/// Adds the products of two groups with two tiles, and fetches so many lines of what is `next` of
/// each tile in every step.
///
/// # Safety
/// Registers are configured; weights have `n` blocks of 1024 bytes each, activations as many for
/// each term.
#[inline(always)]
unsafe fn two_groups<const TERMS: usize, const LINES: usize>(
    a: [*const u16; 2],
    b: [*const u8; 2],
    n: usize,
    next: [*const u8; 2],
) {
    // SAFETY: by the caller's promise.
    unsafe {
        asm!(
            "2:",
            "tileloadd tmm6, [{b0} + {row}]",
            "tileloadd tmm4, [{a0} + {row}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b1} + {row}]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{a1} + {row}]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            ".if {terms} == 2",
            "tileloadd tmm4, [{a0} + {row} + 1024]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{a1} + {row} + 1024]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            ".endif",
            ".set evener_line, 0",
            ".rept {lines}",
            "prefetcht1 [{next0} + evener_line]",
            "prefetcht1 [{next1} + evener_line]",
            ".set evener_line, evener_line + 64",
            ".endr",
            "add {next0}, 64 * {lines}",
            "add {next1}, 64 * {lines}",
            "add {a0}, 1024 * {terms}",
            "add {a1}, 1024 * {terms}",
            "add {b0}, 1024",
            "add {b1}, 1024",
            "dec {n}",
            "jnz 2b",
            a0 = inout(reg) a[0] => _, a1 = inout(reg) a[1] => _,
            b0 = inout(reg) b[0] => _, b1 = inout(reg) b[1] => _,
            next0 = inout(reg) next[0] => _, next1 = inout(reg) next[1] => _,
            n = inout(reg) n => _, row = in(reg) 64usize,
            terms = const TERMS, lines = const LINES,
            options(nostack),
        );
    }
}

/// # Safety
/// As [`two_groups`].
#[inline(always)]
unsafe fn one_group<const TERMS: usize, const LINES: usize>(
    a: *const u16,
    b: [*const u8; 2],
    n: usize,
    next: [*const u8; 2],
) {
    // SAFETY: by the caller's promise.
    unsafe {
        asm!(
            "2:",
            "tileloadd tmm6, [{b0} + {row}]",
            "tileloadd tmm4, [{a} + {row}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b1} + {row}]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            ".if {terms} == 2",
            "tileloadd tmm5, [{a} + {row} + 1024]",
            "tdpbf16ps tmm0, tmm5, tmm6",
            "tdpbf16ps tmm1, tmm5, tmm7",
            ".endif",
            ".set evener_line, 0",
            ".rept {lines}",
            "prefetcht1 [{next0} + evener_line]",
            "prefetcht1 [{next1} + evener_line]",
            ".set evener_line, evener_line + 64",
            ".endr",
            "add {next0}, 64 * {lines}",
            "add {next1}, 64 * {lines}",
            "add {a}, 1024 * {terms}",
            "add {b0}, 1024",
            "add {b1}, 1024",
            "dec {n}",
            "jnz 2b",
            a = inout(reg) a => _,
            b0 = inout(reg) b[0] => _, b1 = inout(reg) b[1] => _,
            next0 = inout(reg) next[0] => _, next1 = inout(reg) next[1] => _,
            n = inout(reg) n => _, row = in(reg) 64usize,
            terms = const TERMS, lines = const LINES,
            options(nostack),
        );
    }
}
