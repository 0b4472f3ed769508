//! A layer's keys and values: paged, in one of three formats. Knows where a position stands and how
//! numbers are rounded on their way in; it does not know sequences.

use std::io;
use std::sync::atomic::{AtomicPtr, Ordering};

use super::simd::{Simd, dispatch_simd, each};
use crate::isa::Isa;
use crate::lanes::LANES;
use crate::math::ROUND;
use crate::memory::Memory;
use crate::pool::{Pool, part};

/// Positions of a KV block: one per lane.
pub const BLOCK_LEN: usize = LANES;

/// Columns of a run of values: they stand together for all positions of a block.
pub(super) const RUN: usize = 4 * LANES;

/// Bytes in front of a page whose numbers have scales: one f32 per position.
pub(super) const SCALE_BYTES: usize = 4 * BLOCK_LEN;

/// Neighbouring blocks whose pages lie together. A sequence in neighbouring blocks is read as long
/// streams, one for each head; and the first block of each head lies near that of the others, so that
/// a short one occupies few huge pages.
const NEIGHBOURS: usize = 64;

/// Fewer rows are written by the caller's thread alone.
const MIN_SHARED_ROWS: usize = 8;

/// How keys and values are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Format {
    /// To the nearest, ties to even; beyond 65504 saturated.
    #[default]
    F16,
    /// As computed.
    F32,
    /// Symmetric, one scale for each position and KV head: the largest magnitude over 127.
    Int8,
}

impl Format {
    pub const ALL: [Self; 3] = [Self::F16, Self::F32, Self::Int8];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::F32 => "f32",
            Self::Int8 => "int8",
        }
    }

    /// Bytes of one position's keys and values of one KV head.
    #[must_use]
    pub fn bytes_per_position(self, head_dim: usize) -> usize {
        2 * match self {
            Self::F16 => 2 * head_dim,
            Self::F32 => 4 * head_dim,
            Self::Int8 => head_dim + SCALE_BYTES / BLOCK_LEN,
        }
    }

    fn page_bytes(self, head_dim: usize) -> usize {
        self.bytes_per_position(head_dim) / 2 * BLOCK_LEN
    }
}

/// One layer's keys and values of a rank. A page holds one KV head's keys, or values, of one block;
/// with scales in front if the format has them.
#[derive(Debug)]
pub struct KvCache {
    /// `[64 blocks, keys then values, kv head, block of the 64, page]`. A page of keys is `[(scale of
    /// each position), column, position in block]`: scores of a block's positions are lanes. One of
    /// values is `[(scale of each position), run of columns, position in block, column]`.
    memory: Memory,
    format: Format,
    n_blocks: usize,
    n_kv_heads: usize,
    head_dim: usize,
}

impl KvCache {
    /// Zeroed memory for `n_blocks` blocks.
    ///
    /// # Errors
    /// The system has none.
    ///
    /// # Panics
    /// If `head_dim` is not a multiple of 32.
    pub fn new(
        format: Format,
        n_blocks: usize,
        n_kv_heads: usize,
        head_dim: usize,
    ) -> io::Result<Self> {
        assert!(head_dim.is_multiple_of(2 * LANES), "heads of {head_dim} columns");
        let n_pages = 2 * n_kv_heads * n_blocks.next_multiple_of(NEIGHBOURS);
        let memory = Memory::zeroed(n_pages * format.page_bytes(head_dim))?;
        Ok(Self { memory, format, n_blocks, n_kv_heads, head_dim })
    }

    #[must_use]
    pub fn format(&self) -> Format {
        self.format
    }

    pub(super) fn head_dim(&self) -> usize {
        self.head_dim
    }

    pub(super) fn n_blocks(&self) -> usize {
        self.n_blocks
    }

    /// Writes the `[rows, n_kv_heads, head_dim]` keys and values of rows; each goes to a slot of its
    /// own.
    ///
    /// # Panics
    /// If shapes disagree, or there is no such slot.
    pub fn write(&mut self, pool: &mut Pool, isa: Isa, slots: &[u32], k: &[f32], v: &[f32]) {
        let width = self.n_kv_heads * self.head_dim;
        assert!(k.len() == slots.len() * width && v.len() == k.len(), "a row for each slot");
        let in_cache = |&slot: &u32| (slot as usize) < self.n_blocks * BLOCK_LEN;
        assert!(slots.iter().all(in_cache), "slots are in the cache");
        if slots.len() < MIN_SHARED_ROWS || width == 0 {
            let memory = self.memory.as_mut_ptr();
            self.write_rows(memory, isa, slots, k, v);
            return;
        }
        // Threads write places of their own, which share no slice.
        let memory = AtomicPtr::new(self.memory.as_mut_ptr());
        let (cache, n_threads) = (&*self, pool.n_threads());
        pool.run(&|thread| {
            let rows = part(slots.len(), thread, n_threads);
            let numbers = rows.start * width..rows.end * width;
            let memory = memory.load(Ordering::Relaxed);
            cache.write_rows(memory, isa, &slots[rows], &k[numbers.clone()], &v[numbers]);
        });
    }

    /// Of checked rows, to the memory of keys and values; whoever calls it has borrowed that uniquely,
    /// and has other rows than other threads.
    fn write_rows(&self, memory: *mut u8, isa: Isa, slots: &[u32], k: &[f32], v: &[f32]) {
        let d = self.head_dim;
        for (row, &slot) in slots.iter().enumerate() {
            let (block, at) = (slot as usize / BLOCK_LEN, slot as usize % BLOCK_LEN);
            for head in 0..self.n_kv_heads {
                let from = (row * self.n_kv_heads + head) * d;
                let (k, v) = (&k[from..from + d], &v[from..from + d]);
                // SAFETY: a page of the cache, as `write` asserted.
                let pages = self.places(block, head).map(|at| unsafe { memory.add(at) });
                match self.format {
                    Format::F16 => dispatch_simd!(isa, fn(
                        pages: [*mut u8; 2], at: usize, k: &[f32], v: &[f32],
                    ) => write_head::<ToF16>),
                    Format::F32 => dispatch_simd!(isa, fn(
                        pages: [*mut u8; 2], at: usize, k: &[f32], v: &[f32],
                    ) => write_head::<ToF32>),
                    Format::Int8 => dispatch_simd!(isa, fn(
                        pages: [*mut u8; 2], at: usize, k: &[f32], v: &[f32],
                    ) => write_head::<ToInt8>),
                }
            }
        }
    }

    /// Gives one block the keys and values of another.
    ///
    /// # Panics
    /// If there is no such block.
    pub fn copy_block(&mut self, from: usize, to: usize) {
        assert!(from.max(to) < self.n_blocks, "blocks are in the cache");
        let page_bytes = self.format.page_bytes(self.head_dim);
        for head in 0..self.n_kv_heads {
            for (from, to) in self.places(from, head).into_iter().zip(self.places(to, head)) {
                self.memory.copy_within(from..from + page_bytes, to);
            }
        }
    }

    /// Where the keys and the values of a block begin.
    pub(super) fn pages(&self, block: usize, kv_head: usize) -> [*const u8; 2] {
        debug_assert!(block < self.n_blocks && kv_head < self.n_kv_heads);
        // SAFETY: within the memory, as asserted in debug builds and checked by `attend` and `write`.
        self.places(block, kv_head).map(|at| unsafe { self.memory.as_ptr().add(at) })
    }

    /// Where in the memory the keys and the values of a block begin.
    fn places(&self, block: usize, kv_head: usize) -> [usize; 2] {
        let (first, at) = (block / NEIGHBOURS * 2 * self.n_kv_heads, block % NEIGHBOURS);
        let page = |head: usize| (first + head) * NEIGHBOURS + at;
        let pages = [page(kv_head), page(self.n_kv_heads + kv_head)];
        pages.map(|page| page * self.format.page_bytes(self.head_dim))
    }
}

/// How numbers are rounded.
trait Rounding {
    type Number: Copy + Default;
    /// The scale of a row, if its page has scales, and what to multiply the row with.
    fn scale(row: &[f32]) -> Option<[f32; 2]>;
    /// # Safety
    /// The machine has `S`.
    unsafe fn round<S: Simd>(x: &[f32], inverse: f32) -> [Self::Number; LANES];
}

struct ToF16;
struct ToF32;
struct ToInt8;

impl Rounding for ToF16 {
    type Number = u16;

    #[inline(always)]
    fn scale(_: &[f32]) -> Option<[f32; 2]> {
        None
    }

    #[inline(always)]
    unsafe fn round<S: Simd>(x: &[f32], _: f32) -> [u16; LANES] {
        const LARGEST: f32 = 65504.0;
        let bounded: [f32; LANES] = each(|lane| {
            let x = if x[lane] > LARGEST { LARGEST } else { x[lane] };
            if x < -LARGEST { -LARGEST } else { x }
        });
        let mut rounded = [0; LANES];
        // SAFETY: the caller's promise; both have sixteen lanes.
        unsafe { S::store_f16(rounded.as_mut_ptr(), S::load(bounded.as_ptr())) };
        rounded
    }
}

impl Rounding for ToF32 {
    type Number = f32;

    #[inline(always)]
    fn scale(_: &[f32]) -> Option<[f32; 2]> {
        None
    }

    #[inline(always)]
    unsafe fn round<S: Simd>(x: &[f32], _: f32) -> [f32; LANES] {
        each(|lane| x[lane])
    }
}

impl Rounding for ToInt8 {
    type Number = i8;

    #[inline(always)]
    fn scale(row: &[f32]) -> Option<[f32; 2]> {
        let mut largest = [0f32; LANES];
        for row in row.chunks_exact(LANES) {
            for lane in 0..LANES {
                let magnitude = row[lane].abs();
                largest[lane] = if magnitude > largest[lane] { magnitude } else { largest[lane] };
            }
        }
        let largest = largest.iter().fold(0f32, |a, &b| if b > a { b } else { a });
        let inverse = 127.0 / largest;
        // A row of zeros, or one so small that its inverse is not finite, is kept as zeros.
        Some(if inverse.is_finite() { [largest / 127.0, inverse] } else { [0.0; 2] })
    }

    #[inline(always)]
    unsafe fn round<S: Simd>(x: &[f32], inverse: f32) -> [i8; LANES] {
        each(|lane| ((x[lane] * inverse + ROUND) - ROUND) as i8)
    }
}

/// Writes one head's keys and values of one position into their pages.
///
/// # Safety
/// The machine has `S`; the pages are of this format and of `k.len()` columns, and nobody else uses
/// this position of them.
#[inline(always)]
unsafe fn write_head<S: Simd, R: Rounding>(pages: [*mut u8; 2], at: usize, k: &[f32], v: &[f32]) {
    let mut inverses = [1.0; 2];
    let mut numbers: [*mut R::Number; 2] = [pages[0].cast(), pages[1].cast()];
    for part in 0..2 {
        let row = [k, v][part];
        let Some([scale, inverse]) = R::scale(row) else { continue };
        inverses[part] = inverse;
        // SAFETY: pages with scales begin with one for each position.
        unsafe {
            pages[part].cast::<f32>().add(at).write(scale);
            numbers[part] = pages[part].add(SCALE_BYTES).cast();
        }
    }
    for (i, k) in k.chunks_exact(LANES).enumerate() {
        // SAFETY: `at` is a position of the page; chunks are of its columns.
        unsafe {
            let rounded = R::round::<S>(k, inverses[0]);
            let to = numbers[0].add(i * LANES * BLOCK_LEN + at);
            for column in 0..LANES {
                to.add(column * BLOCK_LEN).write(rounded[column]);
            }
        }
    }
    for (run, v) in v.chunks(RUN).enumerate() {
        let row = run * RUN * BLOCK_LEN + at * v.len();
        for (i, v) in v.chunks_exact(LANES).enumerate() {
            // SAFETY: as above; a run has a row for each position.
            unsafe {
                let rounded = R::round::<S>(v, inverses[1]);
                numbers[1].add(row + i * LANES).cast::<[R::Number; LANES]>().write(rounded);
            }
        }
    }
}
