//! The dot products of many rows of activations with AMX: a tile register of 16 rows of activations
//! times one of 16 rows of weights.
//!
//! Integers are exact, so the bits are those of [`super::portable`]; only the float operations that
//! follow have an order, and it is the same one. See [`crate::tile_registers`] for what costs time:
//! products can only go through memory, so work goes in windows of an activation scale's runs (8 at
//! most), whose weights, activations and products stay in the first-level cache.

mod runs;
mod segment;
mod super_blocks;

use std::arch::x86_64::*;
use std::cell::RefCell;
use std::ops::Range;

use super::blocks::Blocks;
use super::tiles::{LINE, Places, quant_bytes};
use crate::activation::GROUP;
use crate::linear::{Group, MAX_DEPTH, Sum, TileWeights, scale_runs};
use crate::matrix::TILE_ROWS;
use crate::pool;
use crate::tile_registers::{REGISTER, Registers};
use crate::windows::{LeafEnd, Window, windows};

/// Rows of activations from which tile registers are faster than vectors.
pub(crate) const MIN_ROWS: usize = 5;

/// int8 terms of an activation.
const TERMS: usize = 2;

/// Runs of a window, at most.
const WINDOW: usize = scale_runs::<TERMS>();

/// Tiles of weights that take turns with a window of several groups of activations.
const TILES: usize = 2;

/// Tiles of a pass, at most: so often a window of activations is read while it is near.
const MAX_TILES: usize = 8;

/// Sums of a pass, at most: of each tile with each group.
const MAX_SUMS: usize = TILES * MAX_GROUPS;

/// Groups that a window of unpacked weights serves.
const MAX_GROUPS: usize = 8;

type Lanes = [f32; TILE_ROWS];
type Sums = [Lanes; GROUP];
type Product = [[i32; TILE_ROWS]; GROUP];

/// A thread's working memory.
#[repr(C, align(4096))]
struct Scratch {
    /// Weights of a window as bytes.
    weights: [[[u8; REGISTER]; WINDOW]; TILES],
    products: [Product; MAX_PRODUCTS],
    /// Scales of its runs, and mins.
    scales: [[[Lanes; WINDOW]; 2]; TILES],
    /// Of a window's first part.
    acc: Sums,
    /// Of the current leaf.
    total: [Sums; MAX_SUMS],
    /// Those that are close in time are close in memory.
    stack: [[Sums; MAX_SUMS]; MAX_DEPTH],
}

/// Products that are stored before they are summed: of super-blocks four of each tile, of runs a
/// pair in each place.
const MAX_PRODUCTS: usize = 2 * segment::PLACES;

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

/// Multiplies tiles with `rows` of the step, which begin a group. `store` gets the tile, part, row
/// and sums.
///
/// # Safety
/// The CPU has what `Isa::Avx512Amx` says.
pub(crate) unsafe fn run_tiles<'a, B: Blocks>(
    tile: &dyn Fn(usize) -> TileWeights<'a>,
    tiles: Range<usize>,
    rows: Range<usize>,
    group: &dyn Fn(usize) -> Group<'a>,
    sum: &Sum<'_>,
    store: &dyn Fn(usize, usize, usize, &Lanes),
) {
    debug_assert!(rows.start.is_multiple_of(GROUP), "registers take whole groups");
    let n_groups = rows.len().div_ceil(GROUP).clamp(1, MAX_GROUPS);
    let at_once = (MAX_SUMS / n_groups / TILES * TILES).min(MAX_TILES);
    let mut configured: Option<(usize, Registers)> = None;
    SCRATCH.with_borrow_mut(|scratch| {
        for first_tile in tiles.clone().step_by(at_once) {
            let end = tiles.end.min(first_tile + at_once);
            let batch: [_; MAX_TILES] =
                std::array::from_fn(|t| tile((first_tile + t).min(end - 1)));
            let store = |t: usize, p, row, sums: &_| store(first_tile + t, p, row, sums);
            let mut first = rows.start;
            while first < rows.end {
                let n = rows_at_once(rows.end - first);
                let mut groups = [const { None }; MAX_GROUPS];
                for (i, slot) in groups.iter_mut().enumerate().take(n.div_ceil(GROUP)) {
                    let group = group(first / GROUP + i);
                    assert_eq!(group.side, GROUP, "registers take whole groups");
                    *slot = Some(group);
                }
                let registers = if n <= 8 { 8 } else { GROUP };
                if configured.as_ref().is_none_or(|(rows, _)| *rows != registers) {
                    drop(configured.take());
                    // SAFETY: the caller's promise.
                    configured = Some((registers, unsafe { configure::<B>(registers) }));
                }
                let pass = Pass {
                    tiles: &batch[..end - first_tile],
                    groups: &groups,
                    rows: first..first + n,
                    sum,
                    store: &store,
                    scratch,
                };
                // SAFETY: the caller's promise.
                unsafe { if n <= 8 { pass.run::<B, 8>() } else { pass.run::<B, GROUP>() } }
                first += n;
            }
        }
    });
}

/// Of so many rows: up to 8, or whole groups, or with the last of them what is more than half.
fn rows_at_once(n_left: usize) -> usize {
    let last = n_left % GROUP;
    let n = if n_left > GROUP && 0 < last && last <= 8 { n_left - last } else { n_left };
    n.min(MAX_GROUPS * GROUP)
}

/// # Safety
/// The CPU has what `Isa::Avx512Amx` says.
unsafe fn configure<B: Blocks>(rows: usize) -> Registers {
    // SAFETY: the caller's promise.
    unsafe {
        if B::SCALES.sums_integers() {
            super_blocks::configure(rows)
        } else {
            runs::configure::<B>(rows)
        }
    }
}

/// Up to [`MAX_TILES`] tiles of weights and [`MAX_GROUPS`] groups of activations, [`MAX_SUMS`] pairs at
/// most.
struct Pass<'a, 'b> {
    tiles: &'b [TileWeights<'b>],
    groups: &'b [Option<Group<'a>>; MAX_GROUPS],
    rows: Range<usize>,
    sum: &'b Sum<'b>,
    store: &'b dyn Fn(usize, usize, usize, &Lanes),
    scratch: &'b mut Scratch,
}

/// Whose sums: a tile's with a group; and where in the scratch they and the tile's weights are.
#[derive(Clone, Copy)]
struct At {
    group: usize,
    tile: usize,
    sums: usize,
    weights: usize,
}

impl Pass<'_, '_> {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,gfni")]
    unsafe fn run<B: Blocks, const ROWS: usize>(mut self) {
        let n_groups = self.groups.iter().flatten().count();
        // A group's part of a window is read again from the cache that is near; those of several
        // are not, so two tiles take turns with them.
        let side = if n_groups == 1 { 1 } else { TILES };
        for window in windows(self.sum, WINDOW) {
            for first in (0..self.tiles.len()).step_by(side) {
                let tiles = first..self.tiles.len().min(first + side);
                // SAFETY: tiles and activations have the runs of the window.
                unsafe { self.window::<B, ROWS>(&window, tiles, n_groups) };
            }
        }
    }

    /// One or two tiles times all groups.
    ///
    /// # Safety
    /// They have the runs of the window, and the registers are configured.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,gfni")]
    unsafe fn window<B: Blocks, const ROWS: usize>(
        &mut self,
        window: &Window,
        tiles: Range<usize>,
        n_groups: usize,
    ) {
        for (weights, tile) in tiles.clone().enumerate() {
            let (w, runs) = (&self.tiles[tile], window.blocks.clone());
            // SAFETY: the caller's promise.
            unsafe {
                if B::SCALES.sums_integers() {
                    super_blocks::unpack::<B>(w, runs, weights, self.scratch);
                } else {
                    runs::unpack::<B>(w, runs, weights, self.scratch);
                }
            }
        }
        let at = |nth: usize| {
            let (group, weights) = (nth / tiles.len(), nth % tiles.len());
            let tile = tiles.start + weights;
            At { group, tile, sums: group * self.tiles.len() + tile, weights }
        };
        let n = n_groups * tiles.len();
        let mut is_begun = false;
        for nth in 0..n {
            let this = at(nth);
            let w = &self.tiles[this.tile];
            let ahead = self.ahead::<B>(this.tile, window);
            let group = |at: At| self.groups[at.group].as_ref().expect("a group of the pass");
            // SAFETY: the caller's promise.
            unsafe {
                if B::SCALES.sums_integers() {
                    super_blocks::multiply::<B, ROWS>(w, window, group(this), this, self.scratch);
                } else {
                    let is_followed = window.blocks.len() == WINDOW && nth + 1 < n;
                    let next = if is_followed { at(nth + 1) } else { this };
                    let next = runs::operands(window, group(next), next.weights, self.scratch);
                    let between = runs::Between { is_begun, is_followed, ahead };
                    runs::multiply::<B, ROWS>(
                        window,
                        group(this),
                        this,
                        between,
                        next,
                        self.scratch,
                    );
                    is_begun = is_followed;
                }
            }
            // All of it but for what a block of assembly has fetched.
            let n_runs = window.blocks.len();
            let n_lines = (n_runs * B::RUN_BYTES + B::HEAD_BYTES).div_ceil(LINE);
            let fetched = match n_groups == 1 && !B::SCALES.sums_integers() {
                true => n_runs * quant_bytes(B::BITS) / LINE,
                false => 0,
            };
            for line in pool::part(n_lines - fetched, this.group, n_groups) {
                let line = ahead.wrapping_add((fetched + line) * LINE);
                _mm_prefetch::<_MM_HINT_T1>(line.cast());
            }
            if let Some(end) = &window.leaf_end {
                self.end_leaf::<ROWS>(this, end);
            }
        }
    }

    /// Weights of a tile to bring near in this window: its next, or its first of the pass after this.
    fn ahead<B: Blocks>(&self, tile: usize, window: &Window) -> *const u8 {
        let w = &self.tiles[tile];
        let end = B::run_at(w.first_run, window.blocks.end - 1) + B::RUN_BYTES;
        let is_last = end + LINE > w.bytes.len();
        w.bytes.as_ptr().wrapping_add(if is_last { self.tiles.len() * w.bytes.len() } else { end })
    }

    /// Merges a leaf's sum into the tree; stores the sum of a part that is complete.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
    fn end_leaf<const ROWS: usize>(&mut self, at: At, end: &LeafEnd) {
        let total = &mut self.scratch.total[at.sums];
        for row in 0..ROWS {
            // SAFETY: rows of 16 floats, on cache lines of their own.
            unsafe {
                let mut sum = _mm512_load_ps(total[row].as_ptr());
                for left in self.scratch.stack[end.left.clone()].iter().rev() {
                    sum = _mm512_add_ps(_mm512_load_ps(left[at.sums][row].as_ptr()), sum);
                }
                let to = if end.is_whole {
                    &mut total[row]
                } else {
                    &mut self.scratch.stack[end.left.start][at.sums][row]
                };
                _mm512_store_ps(to.as_mut_ptr(), sum);
            }
        }
        if end.is_whole {
            let first = self.rows.start + at.group * GROUP;
            for (row, total) in (first..self.rows.end.min(first + GROUP)).zip(&*total) {
                (self.store)(at.tile, end.part, row, total);
            }
        }
    }
}

/// Adds sums, times the scales of their rows, to those of the leaf so far.
#[inline]
#[target_feature(enable = "avx512f")]
fn add_scaled<const ROWS: usize>(
    sums: &[__m512; ROWS],
    d: &[f32; GROUP],
    total: &mut Sums,
    begins_leaf: bool,
) {
    for (row, &sum) in sums.iter().enumerate() {
        // SAFETY: rows of 16 floats, on cache lines of their own.
        unsafe {
            let to = total[row].as_mut_ptr();
            let from = if begins_leaf { _mm512_setzero_ps() } else { _mm512_load_ps(to) };
            _mm512_store_ps(to, _mm512_fmadd_ps(sum, _mm512_set1_ps(d[row]), from));
        }
    }
}

/// Keeps sums for later.
#[inline]
#[target_feature(enable = "avx512f")]
fn put<const ROWS: usize>(sums: &[__m512; ROWS], to: &mut Sums) {
    for (row, &sum) in sums.iter().enumerate() {
        // SAFETY: as above.
        unsafe { _mm512_store_ps(to[row].as_mut_ptr(), sum) };
    }
}
