//! bf16 weights with `tdpbf16ps`: a tile register of 16 rows of activations (of two terms each: 8
//! rows) times one of 16 rows of weights, 32 columns at a time.
//!
//! The instruction's order, for a batch of any size: of a block of 32 columns the even ones in a
//! chain from zero, the odd ones in another, their sum added to the block before; subnormals are
//! zero. At the end of a leaf the terms' sums are added. Reading bounds a small batch, so there is
//! no other kernel for it.

use std::arch::asm;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::terms::{GROUP, GROUP_BLOCK};
use super::{Dense, Task};
use crate::activation::BLOCK;
use crate::linear::MAX_DEPTH;
use crate::matrix::TILE_ROWS;
use crate::tile_registers;

/// Weight tiles that stay in the second-level cache while all rows pass.
const KEPT_BYTES: usize = 1 << 20;

/// Bytes of a tile's block: one register.
const TILE_BLOCK: usize = TILE_ROWS * BLOCK * 2;

/// Bytes of each tile that the first pass fetches ahead.
const AHEAD: usize = 4096;

type Lanes = [f32; TILE_ROWS];

/// Products of up to two groups with two tiles: `[group][tile][row of the group]`.
#[repr(C, align(64))]
struct Products([[[Lanes; GROUP]; 2]; 2]);

/// Sums of leaves, `[depth][row][tile]`.
type Stack = [[MaybeUninit<[Lanes; 2]>; 2 * GROUP]; MAX_DEPTH];

/// Multiplies tiles with rows of TERMS terms.
///
/// # Safety
/// The CPU has what `Isa::Avx512Amx` says.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) unsafe fn run<const TERMS: usize>(
    w: &Dense,
    tiles: Range<usize>,
    rows: Range<usize>,
    task: &Task<'_>,
) {
    // SAFETY: by the caller's promise.
    let registers = unsafe { Registers::configure((rows.len() * TERMS).min(GROUP)) };
    let groups = rows.start * TERMS / GROUP..(rows.end * TERMS).div_ceil(GROUP);
    let kept = (KEPT_BYTES / w.tile_bytes()).max(2).next_multiple_of(2);
    let mut products = Products([[[[0.0; TILE_ROWS]; GROUP]; 2]; 2]);
    let mut stack: Stack = [const { [const { MaybeUninit::uninit() }; 2 * GROUP] }; MAX_DEPTH];
    let mut first = tiles.start;
    while first < tiles.end {
        let end = tiles.end.min(first + kept);
        for group in groups.clone().step_by(2) {
            for tile in (first..end).step_by(2) {
                let n_tiles = (end - tile).min(2);
                let pass = Pass { w, group, tile, n_tiles, end_row: rows.end, task };
                let (products, stack) = (&mut products, &mut stack);
                // SAFETY: by the caller's promise.
                unsafe {
                    match (group + 1 < groups.end, group == groups.start) {
                        (true, true) => pass.run::<TERMS, 2, true>(&registers, products, stack),
                        (true, false) => pass.run::<TERMS, 2, false>(&registers, products, stack),
                        (false, _) => pass.run::<TERMS, 1, true>(&registers, products, stack),
                    }
                }
            }
        }
        first = end;
    }
}

/// One or two groups of rows with two tiles; where there is one tile only, it is taken twice.
struct Pass<'a> {
    w: &'a Dense,
    group: usize,
    tile: usize,
    n_tiles: usize,
    end_row: usize,
    task: &'a Task<'a>,
}

impl Pass<'_> {
    /// FIRST passes find the tiles in memory and fetch ahead.
    ///
    /// # Safety
    /// The CPU has what `Isa::Avx512Amx` says.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn run<const TERMS: usize, const GROUPS: usize, const FIRST: bool>(
        &self,
        registers: &Registers,
        products: &mut Products,
        stack: &mut Stack,
    ) {
        let Self { w, group, tile, n_tiles, end_row, task } = *self;
        let weights = [w.tile(tile), w.tile(tile + n_tiles - 1)];
        let terms: [&[u16]; GROUPS] =
            std::array::from_fn(|g| task.terms.group(group + g, task.columns));
        let first_row = group * (GROUP / TERMS);
        let n_rows = (end_row - first_row).min(GROUPS * GROUP / TERMS);
        let n_blocks = task.sum.leaf_columns / BLOCK;
        let mut leaf = 0;
        for (part, &n_leaves) in task.sum.part_leaves.iter().enumerate() {
            let mut top = 0;
            for _ in 0..n_leaves {
                let at = leaf * n_blocks;
                let a = terms.map(|t| &t[at * GROUP_BLOCK..][..n_blocks * GROUP_BLOCK]);
                let b = weights.map(|w| &w[at * TILE_BLOCK..][..n_blocks * TILE_BLOCK]);
                registers.multiply::<GROUPS, FIRST>(&a, &b, products);
                for (row, sums) in stack[top][..n_rows].iter_mut().enumerate() {
                    sums.write(products.row::<TERMS>(row));
                }
                top += 1;
                for _ in 0..task.sum.merges[leaf] {
                    top -= 1;
                    let (left, right) = stack.split_at_mut(top);
                    merge(&mut left[top - 1][..n_rows], &right[0][..n_rows]);
                }
                leaf += 1;
            }
            for (row, sums) in stack[0][..if n_leaves > 0 { n_rows } else { 0 }].iter().enumerate()
            {
                // SAFETY: the part's first leaf wrote it.
                let sums = unsafe { sums.assume_init_ref() };
                for t in 0..n_tiles {
                    task.store(part, first_row + row, tile + t, &sums[t]);
                }
            }
        }
    }
}

/// Adds the upper of two sums to the lower one.
#[inline(always)]
fn merge(left: &mut [MaybeUninit<[Lanes; 2]>], right: &[MaybeUninit<[Lanes; 2]>]) {
    for (left, right) in left.iter_mut().zip(right) {
        // SAFETY: `check_sum` saw that merges leave at least one sum: both were written.
        let (left, right) = unsafe { (left.assume_init_mut(), right.assume_init_ref()) };
        for t in 0..2 {
            for lane in 0..TILE_ROWS {
                left[t][lane] += right[t][lane];
            }
        }
    }
}

impl Products {
    /// The sums of one row of activations: its terms' together.
    #[inline(always)]
    fn row<const TERMS: usize>(&self, row: usize) -> [Lanes; 2] {
        let (group, at) = (row * TERMS / GROUP, row * TERMS % GROUP);
        std::array::from_fn(|t| {
            let rows = &self.0[group][t];
            match TERMS {
                1 => rows[at],
                _ => std::array::from_fn(|lane| rows[at][lane] + rows[at + 1][lane]),
            }
        })
    }
}

/// Products (`2 * group + tile`) are in registers 0 to 3, activations in 4 and 5, weights in 6 and 7.
struct Registers(tile_registers::Registers);

impl Registers {
    /// For activations of up to `rows` term rows.
    ///
    /// # Safety
    /// The CPU has AMX, and the system lets us use it.
    unsafe fn configure(rows: usize) -> Self {
        let mut shapes = [(rows, 64); 8];
        shapes[6..].fill((16, 64));
        // SAFETY: by the caller's promise.
        Self(unsafe { tile_registers::Registers::configure(shapes) })
    }

    /// Blocks of one or two groups times those of two tiles, from zero.
    #[inline(always)]
    fn multiply<const GROUPS: usize, const FIRST: bool>(
        &self,
        a: &[&[u16]; GROUPS],
        b: &[&[u8]; 2],
        products: &mut Products,
    ) {
        let n_blocks = b[0].len() / TILE_BLOCK;
        assert!(n_blocks > 0 && b[1].len() == b[0].len());
        assert!(a.iter().all(|a| a.len() == n_blocks * GROUP_BLOCK));
        // SAFETY: the registers are configured; activations and weights have `n_blocks` blocks of
        // 1024 bytes each, products room for four registers; a prefetch may point anywhere.
        unsafe {
            if GROUPS == 2 {
                two_groups::<FIRST>([a[0].as_ptr(), a[GROUPS - 1].as_ptr()], b, n_blocks, products);
            } else {
                one_group(a[0].as_ptr(), b, n_blocks, products);
            }
        }
    }
}

/// # Safety
/// [`Registers`] are configured, and each pointer has `n_blocks` of 1024 bytes.
#[inline(always)]
unsafe fn two_groups<const FIRST: bool>(
    a: [*const u16; 2],
    b: &[&[u8]; 2],
    n_blocks: usize,
    out: &mut Products,
) {
    // SAFETY: by the caller's promise.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
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
            "prefetcht0 [{b0} + {ahead} + evener_line]",
            "prefetcht0 [{b1} + {ahead} + evener_line]",
            ".set evener_line, evener_line + 64",
            ".endr",
            "add {a0}, 1024",
            "add {a1}, 1024",
            "add {b0}, 1024",
            "add {b1}, 1024",
            "dec {n}",
            "jnz 2b",
            "tilestored [{c} + {row}], tmm0",
            "tilestored [{c} + {row} + 1024], tmm1",
            "tilestored [{c} + {row} + 2048], tmm2",
            "tilestored [{c} + {row} + 3072], tmm3",
            a0 = inout(reg) a[0] => _, a1 = inout(reg) a[1] => _,
            b0 = inout(reg) b[0].as_ptr() => _, b1 = inout(reg) b[1].as_ptr() => _,
            n = inout(reg) n_blocks => _, c = in(reg) out, row = in(reg) 64usize,
            ahead = const AHEAD, lines = const if FIRST { 16 } else { 0 },
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

/// # Safety
/// As [`two_groups`].
#[inline(always)]
unsafe fn one_group(a: *const u16, b: &[&[u8]; 2], n_blocks: usize, out: &mut Products) {
    // SAFETY: by the caller's promise.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "2:",
            "tileloadd tmm4, [{a} + {row}]",
            "tileloadd tmm6, [{b0} + {row}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b1} + {row}]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            ".set evener_line, 0",
            ".rept 16",
            "prefetcht0 [{b0} + {ahead} + evener_line]",
            "prefetcht0 [{b1} + {ahead} + evener_line]",
            ".set evener_line, evener_line + 64",
            ".endr",
            "add {a}, 1024",
            "add {b0}, 1024",
            "add {b1}, 1024",
            "dec {n}",
            "jnz 2b",
            "tilestored [{c} + {row}], tmm0",
            "tilestored [{c} + {row} + 1024], tmm1",
            a = inout(reg) a => _,
            b0 = inout(reg) b[0].as_ptr() => _, b1 = inout(reg) b[1].as_ptr() => _,
            n = inout(reg) n_blocks => _, c = in(reg) out, row = in(reg) 64usize,
            ahead = const AHEAD,
            out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}
