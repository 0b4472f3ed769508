//! A layer's keys and values: paged, in one of three formats. Knows where a position stands and how
//! numbers are rounded on their way in; it does not know sequences.

use super::memory::Memory;
use super::simd::{Simd, dispatch_simd};
use crate::isa::Isa;
use crate::lanes::LANES;

/// Positions of a KV block: one per lane.
pub const BLOCK_LEN: usize = LANES;

/// Columns of a run of values: they stand together for all positions of a block.
pub(super) const RUN: usize = 4 * LANES;

/// Bytes in front of a page whose numbers have scales: one f32 per position.
pub(super) const SCALE_BYTES: usize = 4 * BLOCK_LEN;

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

    fn number_bytes(self) -> usize {
        match self {
            Self::F16 => 2,
            Self::F32 => 4,
            Self::Int8 => 1,
        }
    }
}

/// One layer's keys and values of a rank. A page holds one KV head's keys, or values, of one block;
/// with scales in front if the format has them. All pages of a head lie together, so that a sequence
/// whose blocks are neighbours is read as one stream.
#[derive(Debug)]
pub struct KvCache {
    /// `[kv head, block, (scale of each position), column, position in block]`: scores of a block's
    /// positions are lanes.
    k: Memory,
    /// `[kv head, block, (scale of each position), run of columns, position in block, column]`
    v: Memory,
    format: Format,
    n_blocks: usize,
    n_kv_heads: usize,
    head_dim: usize,
}

/// Writes into a cache from several threads.
#[derive(Clone, Copy)]
pub struct Writer<'a> {
    cache: &'a KvCache,
    isa: Isa,
}

impl KvCache {
    /// Zeroed memory for `n_blocks` blocks.
    ///
    /// # Panics
    /// If there is none, or `head_dim` is not a multiple of 32.
    #[must_use]
    pub fn new(format: Format, n_blocks: usize, n_kv_heads: usize, head_dim: usize) -> Self {
        assert!(head_dim.is_multiple_of(2 * LANES), "heads of {head_dim} columns");
        let len = n_blocks * n_kv_heads * format.page_bytes(head_dim);
        let (k, v) = (Memory::zeroed(len), Memory::zeroed(len));
        Self { k, v, format, n_blocks, n_kv_heads, head_dim }
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

    /// Writes one position's `[n_kv_heads, head_dim]` keys and values.
    ///
    /// # Panics
    /// If shapes disagree, or there is no such slot.
    pub fn write(&mut self, isa: Isa, slot: usize, k: &[f32], v: &[f32]) {
        // SAFETY: `&mut self`: nobody else writes or reads.
        unsafe { self.writer(isa).write(slot, k, v) }
    }

    /// For threads that share the writing.
    pub fn writer(&mut self, isa: Isa) -> Writer<'_> {
        Writer { cache: self, isa }
    }

    /// Where the keys and the values of a block begin.
    pub(super) fn pages(&self, block: usize, kv_head: usize) -> [*const u8; 2] {
        debug_assert!(block < self.n_blocks && kv_head < self.n_kv_heads);
        let at = (kv_head * self.n_blocks + block) * self.format.page_bytes(self.head_dim);
        debug_assert!(at < self.k.len());
        // SAFETY: within the memory, as asserted in debug builds and checked by `attend` and `write`.
        unsafe { [self.k.as_ptr().add(at), self.v.as_ptr().add(at)] }
    }
}

impl Writer<'_> {
    /// [`KvCache::write`].
    ///
    /// # Panics
    /// As there.
    ///
    /// # Safety
    /// No two threads write the same slot at once.
    pub unsafe fn write(&self, slot: usize, k: &[f32], v: &[f32]) {
        let cache = self.cache;
        let (block, at) = (slot / BLOCK_LEN, slot % BLOCK_LEN);
        let width = cache.n_kv_heads * cache.head_dim;
        assert!(block < cache.n_blocks && k.len() == width && v.len() == width, "slot {slot}");
        let page_bytes = cache.format.page_bytes(cache.head_dim);
        let heads = k.chunks_exact(cache.head_dim).zip(v.chunks_exact(cache.head_dim));
        for (head, (k, v)) in heads.enumerate() {
            let page = (head * cache.n_blocks + block) * page_bytes;
            // SAFETY: a page of the cache, by the assertion; this position of it is the caller's.
            let pages = unsafe { [cache.k.as_mut_ptr().add(page), cache.v.as_mut_ptr().add(page)] };
            let format = cache.format;
            dispatch_simd!(self.isa, fn(
                format: Format, pages: [*mut u8; 2], at: usize, k: &[f32], v: &[f32],
            ) => write_head);
        }
    }
}

/// Writes one head's keys and values of one position into their pages.
///
/// # Safety
/// The machine has `S`; the pages are of this format and of `k.len()` columns, and nobody else uses
/// this position of them.
#[inline(always)]
unsafe fn write_head<S: Simd>(
    format: Format,
    [k_page, v_page]: [*mut u8; 2],
    at: usize,
    k: &[f32],
    v: &[f32],
) {
    // SAFETY: `at` is a position of the page, columns and runs cover its numbers.
    unsafe {
        let header = if format == Format::Int8 { SCALE_BYTES } else { 0 };
        let (k_scale, v_scale) = match format {
            Format::Int8 => (inverse_scale(k), inverse_scale(v)),
            Format::F16 | Format::F32 => ([0.0; 2], [0.0; 2]),
        };
        if format == Format::Int8 {
            k_page.cast::<f32>().add(at).write(k_scale[0]);
            v_page.cast::<f32>().add(at).write(v_scale[0]);
        }
        let (k_page, v_page) = (k_page.add(header), v_page.add(header));
        let size = format.number_bytes();
        let mut rounded = [0u8; 4 * LANES];
        for (i, k) in k.chunks_exact(LANES).enumerate() {
            round::<S>(format, k, k_scale[1], &mut rounded);
            for (column, number) in rounded.chunks_exact(size).take(LANES).enumerate() {
                let to = k_page.add(((i * LANES + column) * BLOCK_LEN + at) * size);
                to.copy_from_nonoverlapping(number.as_ptr(), size);
            }
        }
        for (run, v) in v.chunks(RUN).enumerate() {
            let row = run * RUN * BLOCK_LEN + at * v.len();
            for (i, v) in v.chunks_exact(LANES).enumerate() {
                round::<S>(format, v, v_scale[1], &mut rounded);
                let to = v_page.add((row + i * LANES) * size);
                to.copy_from_nonoverlapping(rounded.as_ptr(), LANES * size);
            }
        }
    }
}

/// The scale of a row of int8 and what to multiply the row with.
#[inline(always)]
fn inverse_scale(row: &[f32]) -> [f32; 2] {
    let mut largest = [0f32; LANES];
    for row in row.chunks_exact(LANES) {
        for lane in 0..LANES {
            let magnitude = row[lane].abs();
            largest[lane] = if magnitude > largest[lane] { magnitude } else { largest[lane] };
        }
    }
    let largest = largest.iter().fold(0f32, |a, &b| if b > a { b } else { a });
    let scale = largest / 127.0;
    // A row of zeros, or one so small that its inverse is not finite, is kept as zeros.
    let inverse = 127.0 / largest;
    if inverse.is_finite() { [scale, inverse] } else { [0.0; 2] }
}

/// Sixteen numbers as `format` keeps them, at the front of `to`.
///
/// # Safety
/// The machine has `S`.
#[inline(always)]
unsafe fn round<S: Simd>(format: Format, x: &[f32], inverse: f32, to: &mut [u8; 4 * LANES]) {
    const LARGEST_F16: f32 = 65504.0;
    // Adding 1.5 * 2^23 rounds to the nearest integer, ties to even.
    const ROUND: f32 = 12_582_912.0;
    let to = to.as_mut_ptr();
    // SAFETY: `to` has room for sixteen f32, and so for sixteen of less; x has sixteen.
    unsafe {
        match format {
            Format::F32 => to.copy_from_nonoverlapping(x.as_ptr().cast(), 4 * LANES),
            Format::F16 => {
                let mut bounded = [0f32; LANES];
                for lane in 0..LANES {
                    let x = x[lane];
                    let x = if x > LARGEST_F16 { LARGEST_F16 } else { x };
                    bounded[lane] = if x < -LARGEST_F16 { -LARGEST_F16 } else { x };
                }
                S::store_f16(to.cast(), S::load(bounded.as_ptr()));
            }
            Format::Int8 => {
                for lane in 0..LANES {
                    let rounded = (x[lane] * inverse + ROUND) - ROUND;
                    to.add(lane).cast::<i8>().write(rounded as i8);
                }
            }
        }
    }
}
