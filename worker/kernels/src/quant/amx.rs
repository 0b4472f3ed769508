//! The dot products of many rows of activations with AMX tiles: 16 rows of activations by 16 rows
//! of weights by the 32 columns of a run, in one instruction of some 16 cycles.
//!
//! Integers are exact, so the bits are those of [`super::portable`]; only the float operations that
//! follow have an order, and it is the same one. They are the larger part of the time: vectors of
//! floats run at half their rate for some hundred nanoseconds after a tile instruction.
//!
//! Products can only go through memory, and a store of a tile that misses the first-level cache
//! costs three times the product. So work goes in windows of a scale's eight runs of one group:
//! their products, then their sums, again and again in the same 8 KB.
//!
//! Tile instructions are written as assembly, since their intrinsics are not stable.

use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::RefCell;
use std::ops::Range;

use super::avx512::{scales, vectors};
use super::blocks::{Blocks, RUN, Scales};
use crate::activation::GROUP;
use crate::linear::{Group, MAX_DEPTH, Sum, TileWeights, scale_runs};
use crate::matrix::TILE_ROWS;

/// Rows of activations from which tiles are faster than vectors.
pub(crate) const MIN_ROWS: usize = 5;

/// Runs of a window, at most.
const WINDOW: usize = 8;

/// Products of a run and a group, at most.
const MAX_PRODUCTS: usize = 2;

/// Groups that unpacked weights serve.
const MAX_GROUPS: usize = 8;

/// Products under way at once.
const ROTATION: usize = 4;

/// Products that are computed before the first of them is stored.
const LAG: usize = 2;

type Lanes = [f32; TILE_ROWS];
type Sums = [Lanes; GROUP];

/// A thread's working memory.
#[repr(C, align(4096))]
struct Scratch {
    /// Weights of a window as tiles of bytes. `[run, 8 or 16, 64]`
    weights: [[u8; 1024]; WINDOW],
    /// `[product, 16 rows of activations, 16 rows of weights]`
    products: [[[i32; TILE_ROWS]; GROUP]; LAG + MAX_PRODUCTS * WINDOW],
    scale: [Lanes; WINDOW],
    min: [Lanes; WINDOW],
    /// Of the current leaf.
    total: [Sums; MAX_GROUPS],
    stack: [[Sums; MAX_DEPTH]; MAX_GROUPS],
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

/// How a format's runs become products.
struct Shape<B, const TERMS: usize>(std::marker::PhantomData<B>);

impl<B: Blocks, const TERMS: usize> Shape<B, TERMS> {
    /// Weights of 4 bits times 16 still are bytes: both terms of an activation go into one product.
    const COMBINED: bool = B::BITS == 4 && TERMS == 2;
    /// Products of a run and a group.
    const PRODUCTS: usize = if Self::COMBINED { 1 } else { TERMS };
    /// Bytes of a row of activations in a product.
    const WIDTH: usize = if Self::COMBINED { 2 * RUN } else { RUN };
    /// Bytes from one row of activations to the next.
    const STRIDE: usize = RUN * TERMS;
    const SIGNED: bool = B::ZERO != 0;
}

/// Multiplies a tile with `rows` of the step, which begin a group.
///
/// # Safety
/// The CPU has AVX-512 and AMX, and the process has leave to use tiles.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub(crate) unsafe fn run_tile<'a, B: Blocks, const TERMS: usize>(
    w: &TileWeights<'_>,
    rows: Range<usize>,
    group: &dyn Fn(usize) -> Group<'a>,
    sum: &Sum<'_>,
    store: &dyn Fn(usize, usize, &Lanes),
) {
    debug_assert!(rows.start.is_multiple_of(GROUP));
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
                *slot = Some(group(first / GROUP + i));
            }
            let pass = Pass { w, groups: &groups, rows: first..first + n, sum, store, scratch };
            // SAFETY: the caller's promise.
            unsafe {
                if n <= 8 { pass.run::<B, TERMS, 8>() } else { pass.run::<B, TERMS, GROUP>() }
            }
            first += n;
        }
    });
}

/// One tile of weights and up to [`MAX_GROUPS`] groups of activations.
struct Pass<'a, 'b> {
    w: &'b TileWeights<'b>,
    groups: &'b [Option<Group<'a>>; MAX_GROUPS],
    rows: Range<usize>,
    sum: &'b Sum<'b>,
    store: &'b dyn Fn(usize, usize, &Lanes),
    scratch: &'b mut Scratch,
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
    unsafe fn run<B: Blocks, const TERMS: usize, const ROWS: usize>(mut self) {
        let n_groups = self.groups.iter().flatten().count();
        let leaf_runs = self.sum.leaf_columns / RUN;
        let n_runs = leaf_runs * self.sum.merges.len();
        // SAFETY: the caller's promise; scratch and activations hold what is addressed, see there.
        unsafe {
            configure(ROWS, Shape::<B, TERMS>::WIDTH);
            for total in &mut self.scratch.total[..n_groups] {
                *total = [[0.0; TILE_ROWS]; GROUP];
            }
            let mut place = Place::default();
            while place.run < n_runs {
                let end = place.run + self.scale_len::<TERMS>(place.run);
                self.unpack::<B, TERMS>(place.run..end);
                let mut next = place;
                for g in 0..n_groups {
                    next = place;
                    self.multiply::<B, TERMS>(place.run..end, g);
                    self.add::<B, TERMS, ROWS>(g, &mut next, end);
                }
                place = next;
            }
            asm!("tilerelease", options(nostack, nomem));
        }
    }

    /// Runs of the scale that begins at a run.
    fn scale_len<const TERMS: usize>(&self, run: usize) -> usize {
        let leaf_runs = self.sum.leaf_columns / RUN;
        scale_runs::<TERMS>().min(leaf_runs - run % leaf_runs)
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
    unsafe fn unpack<B: Blocks, const TERMS: usize>(&mut self, runs: Range<usize>) {
        let zero = _mm512_set1_epi8(B::ZERO as i8);
        let high = _mm512_set1_epi8(-16);
        for (i, b) in runs.enumerate() {
            // SAFETY: the tile has run b; a run's tile of bytes has 8 rows of 64, or 16.
            unsafe {
                let to = self.scratch.weights[i].as_mut_ptr();
                let put = |at: usize, v| {
                    let v = if Shape::<B, TERMS>::SIGNED { _mm512_sub_epi8(v, zero) } else { v };
                    if Shape::<B, TERMS>::COMBINED {
                        let shifted = _mm512_and_si512(_mm512_slli_epi16::<4>(v), high);
                        _mm512_store_si512(to.add(at * 64).cast(), shifted);
                        _mm512_store_si512(to.add((8 + at) * 64).cast(), v);
                    } else {
                        _mm512_store_si512(to.add(at * 64).cast(), v);
                    }
                };
                for j in 0..4 {
                    let (left, right) = vectors::<B, 1>(self.w, b, j);
                    put(j, left);
                    put(4 + j, right);
                }
                let (scale, min) = scales::<B>(self.w, b);
                _mm512_store_ps(self.scratch.scale[i].as_mut_ptr(), scale);
                let min = match B::SCALES {
                    Scales::Super => _mm512_sub_ps(_mm512_setzero_ps(), min),
                    Scales::Plain | Scales::Min | Scales::Halves => min,
                };
                _mm512_store_ps(self.scratch.min[i].as_mut_ptr(), min);
            }
        }
    }

    /// All products of a group in a window: run by run, of each term.
    unsafe fn multiply<B: Blocks, const TERMS: usize>(&mut self, runs: Range<usize>, g: usize) {
        let (products, stride) = (Shape::<B, TERMS>::PRODUCTS, Shape::<B, TERMS>::STRIDE);
        let group = self.groups[g].as_ref().expect("a group of the pass");
        let q = &group.q[runs.start * GROUP * stride..runs.end * GROUP * stride];
        let n = runs.len() * products;
        let input = |i: usize| {
            let (run, term) = (i / products, i % products);
            let q = q[run * GROUP * stride + term * RUN..].as_ptr();
            (q, self.scratch.weights[run].as_ptr())
        };
        // SAFETY: inputs are whole tiles: 16 rows of activations (groups are padded) and a run's
        // weights; there is room for LAG products before the first, which receive what nobody
        // reads.
        unsafe {
            let to = self.scratch.products.as_mut_ptr().cast::<u8>();
            let mut i = 0;
            while i + ROTATION <= n {
                let inputs = [input(i), input(i + 1), input(i + 2), input(i + 3)];
                four_products(Shape::<B, TERMS>::SIGNED, &inputs, stride, to.add(i * 1024));
                i += ROTATION;
            }
            store_last_two(to.add(i * 1024));
            while i < n {
                one_product(Shape::<B, TERMS>::SIGNED, input(i), stride, to.add((LAG + i) * 1024));
                i += 1;
            }
        }
    }

    /// Adds a group's products of a scale to its sums.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    fn add<B: Blocks, const TERMS: usize, const ROWS: usize>(
        &mut self,
        g: usize,
        place: &mut Place,
        end: usize,
    ) {
        let group = self.groups[g].as_ref().expect("a group of the pass");
        let n = end - place.run;
        add_scale::<B, TERMS, ROWS>(
            &self.scratch.products[LAG..],
            &self.scratch.scale[..n],
            &self.scratch.min[..n],
            &group.sum[place.run * GROUP..end * GROUP],
            &group.d[place.scale * GROUP..(place.scale + 1) * GROUP],
            &mut self.scratch.total[g],
        );
        place.run = end;
        place.scale += 1;
        if place.run.is_multiple_of(self.sum.leaf_columns / RUN) {
            self.end_leaf::<ROWS>(g, place);
        }
    }

    /// Merges a leaf's sum into the tree; stores the sum of a part that is complete.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
    fn end_leaf<const ROWS: usize>(&mut self, g: usize, place: &mut Place) {
        let (total, stack) = (&mut self.scratch.total[g], &mut self.scratch.stack[g]);
        for _ in 0..self.sum.merges[place.leaf] {
            place.top -= 1;
            for (total, left) in total[..ROWS].iter_mut().zip(&stack[place.top]) {
                for lane in 0..TILE_ROWS {
                    total[lane] += left[lane];
                }
            }
        }
        place.leaf += 1;
        place.in_part += 1;
        while self.sum.part_leaves[place.part] == 0 {
            place.part += 1;
        }
        if place.in_part == self.sum.part_leaves[place.part] {
            let rows =
                self.rows.start + g * GROUP..self.rows.end.min(self.rows.start + (g + 1) * GROUP);
            for (row, total) in rows.zip(&*total) {
                (self.store)(place.part, row, total);
            }
            (place.part, place.in_part, place.top) = (place.part + 1, 0, 0);
        } else {
            stack[place.top][..ROWS].copy_from_slice(&total[..ROWS]);
            place.top += 1;
        }
        total[..ROWS].fill([0.0; TILE_ROWS]);
    }
}

/// Adds the products of a scale's runs, scaled, to a leaf's sums.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
fn add_scale<B: Blocks, const TERMS: usize, const ROWS: usize>(
    products: &[[[i32; TILE_ROWS]; GROUP]],
    scale: &[Lanes],
    min: &[Lanes],
    sum: &[f32],
    d: &[f32],
    total: &mut Sums,
) {
    let has_min = B::SCALES.has_min();
    let mut acc = [_mm512_setzero_ps(); ROWS];
    for (i, ((scale, min), sum)) in scale.iter().zip(min).zip(sum.chunks_exact(GROUP)).enumerate() {
        // SAFETY: lanes are 16 floats, on cache lines of their own.
        unsafe {
            let (scale, min) = (_mm512_load_ps(scale.as_ptr()), _mm512_load_ps(min.as_ptr()));
            let products = &products[i * Shape::<B, TERMS>::PRODUCTS..];
            for row in 0..ROWS {
                let product = |term: usize| _mm512_load_si512(products[term][row].as_ptr().cast());
                let dot = if Shape::<B, TERMS>::PRODUCTS == 1 {
                    product(0)
                } else {
                    _mm512_add_epi32(_mm512_slli_epi32::<4>(product(0)), product(1))
                };
                acc[row] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, acc[row]);
                if has_min {
                    acc[row] = _mm512_fmadd_ps(min, _mm512_set1_ps(sum[row]), acc[row]);
                }
            }
        }
    }
    for row in 0..ROWS {
        // SAFETY: rows of 16 floats.
        unsafe {
            let total = total[row].as_mut_ptr();
            let sum = _mm512_fmadd_ps(acc[row], _mm512_set1_ps(d[row]), _mm512_load_ps(total));
            _mm512_store_ps(total, sum);
        }
    }
}

/// Palette 1: products in tiles 0 to 3, activations in 4 and 5, weights in 6 and 7.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// # Safety
/// The process has leave to use tiles.
unsafe fn configure(rows: usize, width: usize) {
    let mut config =
        Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    for tile in 0..8 {
        let (n, bytes) = match tile {
            0..4 => (rows, 64),
            4..6 => (rows, width),
            _ => (width / 4, 64),
        };
        config.rows[tile] = n as u8;
        config.row_bytes[tile] = bytes as u16;
    }
    // SAFETY: a valid configuration of 64 bytes; the caller's promise.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly)) };
}

/// Four products, each stored when two more are under way: a store right behind its product would
/// stall the next one.
///
/// # Safety
/// Inputs are whole tiles; four products fit at `to`.
#[inline(always)]
unsafe fn four_products(
    signed: bool,
    inputs: &[(*const i8, *const u8); 4],
    stride: usize,
    to: *mut u8,
) {
    macro_rules! products {
        ($multiply:literal) => {
            asm!(
                "tileloadd tmm4, [{a0} + {stride}]",
                "tileloadd tmm6, [{b0} + {line}]",
                "tilezero tmm0",
                concat!($multiply, " tmm0, tmm4, tmm6"),
                "tilestored [{to} + {line}], tmm2",
                "tileloadd tmm5, [{a1} + {stride}]",
                "tileloadd tmm7, [{b1} + {line}]",
                "tilezero tmm1",
                concat!($multiply, " tmm1, tmm5, tmm7"),
                "tilestored [{to} + {line} + 1024], tmm3",
                "tileloadd tmm4, [{a2} + {stride}]",
                "tileloadd tmm6, [{b2} + {line}]",
                "tilezero tmm2",
                concat!($multiply, " tmm2, tmm4, tmm6"),
                "tilestored [{to} + {line} + 2048], tmm0",
                "tileloadd tmm5, [{a3} + {stride}]",
                "tileloadd tmm7, [{b3} + {line}]",
                "tilezero tmm3",
                concat!($multiply, " tmm3, tmm5, tmm7"),
                "tilestored [{to} + {line} + 3072], tmm1",
                a0 = in(reg) inputs[0].0, b0 = in(reg) inputs[0].1,
                a1 = in(reg) inputs[1].0, b1 = in(reg) inputs[1].1,
                a2 = in(reg) inputs[2].0, b2 = in(reg) inputs[2].1,
                a3 = in(reg) inputs[3].0, b3 = in(reg) inputs[3].1,
                stride = in(reg) stride, line = in(reg) 64usize, to = in(reg) to,
                options(nostack),
            )
        };
    }
    // SAFETY: the caller's promise. Tiles 0 to 3 keep products from one call to the next; the
    // compiler itself uses none.
    unsafe { if signed { products!("tdpbssd") } else { products!("tdpbsud") } }
}

/// Stores what [`four_products`] left under way.
///
/// # Safety
/// Two products fit at `to`.
#[inline(always)]
unsafe fn store_last_two(to: *mut u8) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "tilestored [{to} + {line}], tmm2",
            "tilestored [{to} + {line} + 1024], tmm3",
            line = in(reg) 64usize, to = in(reg) to,
            options(nostack),
        );
    }
}

/// One product, stored at once.
///
/// # Safety
/// Inputs are whole tiles; a product fits at `to`.
#[inline(always)]
unsafe fn one_product(signed: bool, input: (*const i8, *const u8), stride: usize, to: *mut u8) {
    macro_rules! product {
        ($multiply:literal) => {
            asm!(
                "tileloadd tmm4, [{a} + {stride}]",
                "tileloadd tmm6, [{b} + {line}]",
                "tilezero tmm0",
                concat!($multiply, " tmm0, tmm4, tmm6"),
                "tilestored [{to} + {line}], tmm0",
                a = in(reg) input.0, b = in(reg) input.1,
                stride = in(reg) stride, line = in(reg) 64usize, to = in(reg) to,
                options(nostack),
            )
        };
    }
    // SAFETY: the caller's promise.
    unsafe { if signed { product!("tdpbssd") } else { product!("tdpbsud") } }
}
