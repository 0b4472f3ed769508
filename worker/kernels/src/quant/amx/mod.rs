//! The dot products of many rows of activations with AMX: a tile register of 16 rows of activations
//! times one of 16 rows of weights.
//!
//! Integers are exact, so the bits are those of [`super::portable`]; only the float operations that
//! follow have an order, and it is the same one. See [`crate::tile_registers`] for what costs time:
//! products can only go through memory, so work goes in windows of an activation scale's runs (8 at
//! most), whose weights, activations and products stay in the first-level cache.

mod runs;
mod super_blocks;

use std::arch::x86_64::*;
use std::cell::RefCell;
use std::ops::Range;

use super::blocks::{Blocks, RUN};
use crate::activation::GROUP;
use crate::linear::{Group, MAX_DEPTH, Sum, TileWeights, scale_runs};
use crate::matrix::TILE_ROWS;
use crate::tile_registers::REGISTER;

/// Rows of activations from which tile registers are faster than vectors.
pub(crate) const MIN_ROWS: usize = 5;

/// int8 terms of an activation.
const TERMS: usize = 2;

/// Runs of a window, at most.
const WINDOW: usize = scale_runs::<TERMS>();

/// Tiles of weights that share a window of activations, at most.
const TILES: usize = 2;

/// Tiles of a format's weights to multiply at a time. Where each run is one product, or rows are
/// few, reading activations for every tile costs less than keeping two tiles.
pub(crate) const fn tiles_at_once<B: Blocks>(rows: usize) -> usize {
    if B::BITS == 4 || rows <= GROUP { 1 } else { TILES }
}

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
    scale: [[Lanes; WINDOW]; TILES],
    min: [[Lanes; WINDOW]; TILES],
    /// Of a window's first part.
    acc: [Sums; TILES],
    /// Of the current leaf.
    total: [[Sums; TILES]; MAX_GROUPS],
    /// Those that are close in time are close in memory.
    stack: [[[Sums; TILES]; MAX_GROUPS]; MAX_DEPTH],
}

/// Products that are stored before they are summed.
const MAX_PRODUCTS: usize = 18;

thread_local! {
    static SCRATCH: RefCell<Box<Scratch>> = RefCell::new(Scratch::new());
}

impl Scratch {
    fn new() -> Box<Self> {
        // SAFETY: all of it is numbers, for which zeros are values.
        unsafe { Box::new_zeroed().assume_init() }
    }
}

/// Multiplies one or two tiles with `rows` of the step, which begin a group. `store` gets which
/// tile, part, row and sums.
///
/// # Safety
/// The CPU has what `Isa::Avx512Amx` says.
pub(crate) unsafe fn run_tiles<'a, B: Blocks>(
    tiles: &[TileWeights<'_>],
    rows: Range<usize>,
    group: &dyn Fn(usize) -> Group<'a>,
    sum: &Sum<'_>,
    store: &dyn Fn(usize, usize, usize, &Lanes),
) {
    debug_assert!(rows.start.is_multiple_of(GROUP) && (1..=TILES).contains(&tiles.len()));
    SCRATCH.with_borrow_mut(|scratch| {
        let mut first = rows.start;
        while first < rows.end {
            let n = match rows.end - first {
                n @ ..=8 => n,
                n if n > GROUP && n % GROUP > 0 && n % GROUP <= 8 => n / GROUP * GROUP,
                n => n,
            };
            let n = n.min(MAX_GROUPS * GROUP);
            let mut groups = [const { None }; MAX_GROUPS];
            for (i, slot) in groups.iter_mut().enumerate().take(n.div_ceil(GROUP)) {
                let group = group(first / GROUP + i);
                assert_eq!(group.side, GROUP, "registers take whole groups");
                *slot = Some(group);
            }
            let pass = Pass { tiles, groups: &groups, rows: first..first + n, sum, store, scratch };
            // SAFETY: the caller's promise.
            unsafe { if n <= 8 { pass.run::<B, 8>() } else { pass.run::<B, GROUP>() } }
            first += n;
        }
    });
}

/// One or two tiles of weights and up to [`MAX_GROUPS`] groups of activations.
struct Pass<'a, 'b> {
    tiles: &'b [TileWeights<'b>],
    groups: &'b [Option<Group<'a>>; MAX_GROUPS],
    rows: Range<usize>,
    sum: &'b Sum<'b>,
    store: &'b dyn Fn(usize, usize, usize, &Lanes),
    scratch: &'b mut Scratch,
}

/// Runs of one activation scale.
struct Window {
    runs: Range<usize>,
    scale: usize,
    begins_leaf: bool,
}

/// How far the sums have come; the same for all groups of a window.
#[derive(Clone, Copy, Default)]
struct Place {
    run: usize,
    scale: usize,
    leaf: usize,
    part: usize,
    /// Leaves of the part that are done.
    in_part: usize,
    /// Sums on the stack.
    top: usize,
}

impl Pass<'_, '_> {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    unsafe fn run<B: Blocks, const ROWS: usize>(mut self) {
        let n_groups = self.groups.iter().flatten().count();
        let leaf_runs = self.sum.leaf_columns / RUN;
        let n_runs = leaf_runs * self.sum.merges.len();
        // SAFETY: the caller's promise.
        let _registers = unsafe {
            if B::SCALES.sums_integers() {
                super_blocks::configure(ROWS)
            } else {
                runs::configure::<B>(ROWS)
            }
        };
        let mut place = Place::default();
        while place.run < n_runs {
            let end = place.run + WINDOW.min(leaf_runs - place.run % leaf_runs);
            let window = place.run..end;
            for (t, w) in self.tiles.iter().enumerate() {
                // SAFETY: tiles and activations have the runs of the window.
                unsafe {
                    if B::SCALES.sums_integers() {
                        super_blocks::unpack::<B>(w, window.clone(), t, self.scratch);
                    } else {
                        runs::unpack::<B>(w, window.clone(), t, self.scratch);
                    }
                }
            }
            let mut next = place;
            for g in 0..n_groups {
                next = place;
                let group = self.groups[g].as_ref().expect("a group of the pass");
                let window = Window {
                    runs: window.clone(),
                    scale: place.scale,
                    begins_leaf: place.run.is_multiple_of(leaf_runs),
                };
                let (tiles, scratch) = (self.tiles, &mut *self.scratch);
                // SAFETY: as above.
                unsafe {
                    if B::SCALES.sums_integers() {
                        super_blocks::multiply::<B, ROWS>(tiles, &window, group, g, scratch);
                    } else {
                        runs::multiply::<B, ROWS>(tiles.len(), &window, group, g, scratch);
                    }
                }
                next.run = end;
                next.scale += 1;
                if end.is_multiple_of(leaf_runs) {
                    self.end_leaf::<ROWS>(g, &mut next);
                }
            }
            place = next;
        }
    }

    /// Merges a leaf's sum into the tree; stores the sum of a part that is complete.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
    fn end_leaf<const ROWS: usize>(&mut self, g: usize, place: &mut Place) {
        let last = self.rows.end.min(self.rows.start + (g + 1) * GROUP);
        let rows = self.rows.start + g * GROUP..last;
        let merges = usize::from(self.sum.merges[place.leaf]);
        place.leaf += 1;
        place.in_part += 1;
        while self.sum.part_leaves[place.part] == 0 {
            place.part += 1;
        }
        let is_whole = place.in_part == self.sum.part_leaves[place.part];
        let left = place.top - merges..place.top;
        for t in 0..self.tiles.len() {
            let total = &mut self.scratch.total[g][t];
            for row in 0..ROWS {
                // SAFETY: rows of 16 floats, on cache lines of their own.
                unsafe {
                    let mut sum = _mm512_load_ps(total[row].as_ptr());
                    for left in self.scratch.stack[left.clone()].iter().rev() {
                        sum = _mm512_add_ps(_mm512_load_ps(left[g][t][row].as_ptr()), sum);
                    }
                    let to = if is_whole {
                        &mut total[row]
                    } else {
                        &mut self.scratch.stack[left.start][g][t][row]
                    };
                    _mm512_store_ps(to.as_mut_ptr(), sum);
                }
            }
            if is_whole {
                for (row, total) in rows.clone().zip(&*total) {
                    (self.store)(t, place.part, row, total);
                }
            }
        }
        place.top -= merges;
        if is_whole {
            (place.part, place.in_part, place.top) = (place.part + 1, 0, 0);
        } else {
            place.top += 1;
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
