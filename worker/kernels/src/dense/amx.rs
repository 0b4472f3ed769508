//! bf16 weights with `tdpbf16ps`: a tile register of 16 rows of activations (of two terms each: 8
//! rows) times one of 16 rows of weights, 32 columns at a time.
//!
//! The instruction's order, for a batch of any size: of a block of 32 columns the even ones in a
//! chain from zero, the odd ones in another, their sum added to the block before; subnormals are
//! zero. At the end of a leaf the terms' sums are added. Reading bounds a small batch, so there is
//! no other kernel for it.
//!
//! A pass takes the groups of a chunk with two tiles. Work goes in windows of columns: what is next
//! of a tile is fetched while the first groups multiply it, and the sums of narrow windows wait in
//! memory.

use std::arch::asm;
use std::cell::RefCell;
use std::ops::Range;

use super::terms::{GROUP, GROUP_BLOCK};
use super::{Dense, Task};
use crate::activation::BLOCK;
use crate::linear::MAX_DEPTH;
use crate::matrix::TILE_ROWS;
use crate::tile_registers::{self, REGISTER};
use crate::windows::{LeafEnd, Window, windows};

/// Blocks of a window. Shorter ones, of which the weights stay in the first-level cache, were slower:
/// sums go to memory more often.
const WINDOW: usize = 64;

/// Squares of a pass, each two groups with two tiles.
const MAX_SQUARES: usize = 8;

/// Bytes of a tile's block: one register.
const TILE_BLOCK: usize = TILE_ROWS * BLOCK * 2;

const _: () = assert!(TILE_BLOCK == REGISTER && 2 * GROUP_BLOCK == REGISTER);

type Lanes = [f32; TILE_ROWS];

/// Sums of up to two groups with two tiles: `[group][tile][row of the group]`.
#[repr(C, align(64))]
struct Square([[[Lanes; GROUP]; 2]; 2]);

/// Sums of leaves that wait for others: `[tile][row]`.
type Left = [[Lanes; 2 * GROUP]; 2];

/// A thread's working memory.
#[repr(C, align(64))]
struct Scratch {
    /// Of the current leaf.
    squares: [Square; MAX_SQUARES],
    stack: [[Left; MAX_SQUARES]; MAX_DEPTH],
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
    let _registers = unsafe { configure((rows.len() * TERMS).min(GROUP)) };
    let groups = rows.start * TERMS / GROUP..(rows.end * TERMS).div_ceil(GROUP);
    SCRATCH.with_borrow_mut(|scratch| {
        for first in groups.clone().step_by(2 * MAX_SQUARES) {
            let groups = first..groups.end.min(first + 2 * MAX_SQUARES);
            for tile in tiles.clone().step_by(2) {
                let tiles = tile..tiles.end.min(tile + 2);
                let pass = Pass { w, groups: groups.clone(), tiles, end_row: rows.end, task };
                // SAFETY: by the caller's promise.
                unsafe { pass.run::<TERMS>(scratch) };
            }
        }
    });
}

/// Some groups of rows with two tiles, as squares; a tile alone is taken twice.
struct Pass<'a> {
    w: &'a Dense,
    groups: Range<usize>,
    tiles: Range<usize>,
    end_row: usize,
    task: &'a Task<'a>,
}

impl Pass<'_> {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn run<const TERMS: usize>(&self, scratch: &mut Scratch) {
        for window in windows(self.task.sum, WINDOW) {
            for (nth, group) in self.groups.clone().step_by(2).enumerate() {
                // SAFETY: the registers are configured.
                unsafe { self.multiply(&window, group, &mut scratch.squares[nth]) };
                if let Some(end) = &window.leaf_end {
                    self.end_leaf::<TERMS>(end, group, nth, scratch);
                }
            }
        }
    }

    /// Adds a window's products to a square.
    ///
    /// # Safety
    /// The registers are configured.
    #[inline]
    unsafe fn multiply(&self, window: &Window, group: usize, square: &mut Square) {
        let n = window.blocks.len();
        let last_group = (group + 1).min(self.groups.end - 1);
        let weights = [self.tiles.start, self.tiles.end - 1].map(|tile| {
            let blocks = &self.w.tile(tile)[window.blocks.start * TILE_BLOCK..];
            blocks[..n * TILE_BLOCK].as_ptr()
        });
        let terms = [group, last_group].map(|group| {
            let blocks = self.task.terms.group(group, self.task.columns);
            blocks[window.blocks.start * GROUP_BLOCK..][..n * GROUP_BLOCK].as_ptr()
        });
        // The first groups find the tiles in memory, and bring near what is next of them: in this
        // window of the columns or, of the tiles after these, the first.
        let is_last = window.blocks.end * BLOCK == self.task.columns;
        let to_next = match is_last {
            true => self.tiles.len() * self.w.tile_bytes() - window.blocks.start * TILE_BLOCK,
            false => n * TILE_BLOCK,
        };
        let (is_first, is_two) = (group == self.groups.start, last_group > group);
        // SAFETY: by the caller's promise; activations and weights have `n` blocks of 1024 bytes
        // each; a prefetch may point anywhere.
        unsafe {
            begin(square, window.begins_leaf);
            match (is_two, is_first) {
                (true, true) => two_groups::<true>(terms, weights, n, to_next),
                (true, false) => two_groups::<false>(terms, weights, n, to_next),
                (false, true) => one_group::<true>(terms[0], weights, n, to_next),
                (false, false) => one_group::<false>(terms[0], weights, n, to_next),
            }
            keep(square);
        }
    }

    /// Merges a leaf's sums into the tree; stores those of a part that is complete.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    fn end_leaf<const TERMS: usize>(
        &self,
        end: &LeafEnd,
        group: usize,
        nth: usize,
        scratch: &mut Scratch,
    ) {
        let first_row = group * (GROUP / TERMS);
        let n_rows = (self.end_row - first_row).min(2 * GROUP / TERMS);
        for t in 0..self.tiles.len() {
            for row in 0..n_rows {
                let mut sum = scratch.squares[nth].row::<TERMS>(t, row);
                for left in scratch.stack[end.left.clone()].iter().rev() {
                    let left = &left[nth][t][row];
                    sum = std::array::from_fn(|lane| left[lane] + sum[lane]);
                }
                if end.is_whole {
                    self.task.store(end.part, first_row + row, self.tiles.start + t, &sum);
                } else {
                    scratch.stack[end.left.start][nth][t][row] = sum;
                }
            }
        }
    }
}

impl Square {
    /// The sums of one row of activations with a tile: its terms' together.
    #[inline(always)]
    fn row<const TERMS: usize>(&self, tile: usize, row: usize) -> Lanes {
        let (group, at) = (row * TERMS / GROUP, row * TERMS % GROUP);
        let rows = &self.0[group][tile];
        match TERMS {
            1 => rows[at],
            _ => std::array::from_fn(|lane| rows[at][lane] + rows[at + 1][lane]),
        }
    }
}

/// Sums (`2 * group + tile`) are in registers 0 to 3, activations of up to `rows` term rows in 4 and
/// 5, weights in 6 and 7.
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

/// FIRST: fetches `to_next` bytes on.
///
/// # Safety
/// Registers are configured, and each pointer has `n` blocks of 1024 bytes.
#[inline(always)]
unsafe fn two_groups<const FIRST: bool>(
    a: [*const u16; 2],
    b: [*const u8; 2],
    n: usize,
    to_next: usize,
) {
    // SAFETY: by the caller's promise.
    unsafe {
        asm!(
            "2:",
            "tileloadd tmm4, [{a0} + {row}]",
            "tileloadd tmm6, [{b0} + {row}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b1} + {row}]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{a1} + {row}]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            ".set evener_line, 0",
            ".rept {lines}",
            "prefetcht1 [{b0} + {ahead} + evener_line]",
            "prefetcht1 [{b1} + {ahead} + evener_line]",
            ".set evener_line, evener_line + 64",
            ".endr",
            "add {a0}, 1024",
            "add {a1}, 1024",
            "add {b0}, 1024",
            "add {b1}, 1024",
            "dec {n}",
            "jnz 2b",
            a0 = inout(reg) a[0] => _, a1 = inout(reg) a[1] => _,
            b0 = inout(reg) b[0] => _, b1 = inout(reg) b[1] => _,
            n = inout(reg) n => _, row = in(reg) 64usize, ahead = in(reg) to_next,
            lines = const if FIRST { REGISTER / 64 } else { 0 },
            options(nostack),
        );
    }
}

/// # Safety
/// As [`two_groups`].
#[inline(always)]
unsafe fn one_group<const FIRST: bool>(a: *const u16, b: [*const u8; 2], n: usize, to_next: usize) {
    // SAFETY: by the caller's promise.
    unsafe {
        asm!(
            "2:",
            "tileloadd tmm4, [{a} + {row}]",
            "tileloadd tmm6, [{b0} + {row}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b1} + {row}]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            ".set evener_line, 0",
            ".rept {lines}",
            "prefetcht1 [{b0} + {ahead} + evener_line]",
            "prefetcht1 [{b1} + {ahead} + evener_line]",
            ".set evener_line, evener_line + 64",
            ".endr",
            "add {a}, 1024",
            "add {b0}, 1024",
            "add {b1}, 1024",
            "dec {n}",
            "jnz 2b",
            a = inout(reg) a => _,
            b0 = inout(reg) b[0] => _, b1 = inout(reg) b[1] => _,
            n = inout(reg) n => _, row = in(reg) 64usize, ahead = in(reg) to_next,
            lines = const if FIRST { REGISTER / 64 } else { 0 },
            options(nostack),
        );
    }
}
