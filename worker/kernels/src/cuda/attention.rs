//! The paged cache of keys and values on a device, what writes to it, and attention over it.

use super::activations::{Forms, Making, STEP_COLUMNS};
use super::launch::{Arguments, Geometry};
use super::memory::Buffer;
use super::rows::launch;
use super::source::Shape;
use super::{Device, Error, View, kernels};
use crate::attention::{BLOCK_LEN, Format};

/// Positions of a split: what a block of threads takes at once.
#[must_use]
pub const fn split_len(kv_format: Format) -> usize {
    match kv_format {
        Format::F16 => 64,
        Format::F32 | Format::Int8 => 256,
    }
}

/// Query vectors that one block of [`attend_tiles`] takes of a KV head.
#[must_use]
pub const fn tile_vectors(head_dim: usize) -> usize {
    if head_dim <= 128 { 128 } else { 64 }
}

/// Whether [`merge`] makes these forms. Those of integers take a scale for 128 columns, which must be one
/// head's.
#[must_use]
pub fn merges_to(forms: Forms, shape: Shape) -> bool {
    let is_whole = !forms.bytes || shape.head_dim.is_multiple_of(STEP_COLUMNS);
    forms == Forms::PLAIN || shape.kv_format == Format::F16 && is_whole
}

/// A slot that is none: its row is not written.
pub const NO_SLOT: u32 = u32::MAX;
/// Words of an [`Item`] and of a [`Tile`].
pub const WORDS: usize = 4;

/// Query heads that one block of `attend` and `attend_plain` takes together.
const GROUP: usize = 8;
/// Warps of a block, of each.
const ATTEND_WARPS: usize = 4;
const PLAIN_WARPS: usize = 8;
const MERGE_WARPS: usize = 4;
/// Heads that a block of `rope_kv` takes.
const ROPE_HEADS: usize = 4;

/// Splits of one row's sequence, for one block of [`attend`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Item {
    pub row: u32,
    /// Both below 2^16. No splits: nothing is to be done, and nothing is written.
    pub first_split: u32,
    pub n_splits: u32,
    /// Of the row in its sequence.
    pub position: u32,
    /// Where the sequence's KV blocks begin in the tables.
    pub first_block: u32,
}

impl Item {
    /// As it lies in device memory.
    #[must_use]
    pub fn words(self) -> [u32; WORDS] {
        [self.row, self.first_split | self.n_splits << 16, self.position, self.first_block]
    }
}

/// Query vectors of one sequence's rows, whose positions follow each other, for one block of
/// [`attend_tiles`]: [`tile_vectors`] from `first_vector` on, counted row by row, the query heads of
/// a KV head side by side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tile {
    pub first_row: u32,
    pub n_rows: u32,
    pub first_vector: u32,
}

impl Tile {
    /// As it lies in device memory.
    #[must_use]
    pub fn words(self) -> [u32; WORDS] {
        [self.first_row, self.n_rows, self.first_vector, 0]
    }
}

/// One layer's keys and values.
#[derive(Debug)]
pub struct KvCache {
    pages: Buffer<u8>,
    page_bytes: usize,
    n_kv_heads: usize,
    shape: Shape,
}

impl KvCache {
    /// Memory for blocks of 16 positions; what lies in it is unknown.
    ///
    /// # Errors
    /// Too little memory.
    pub fn new(
        device: &Device,
        shape: Shape,
        n_blocks: usize,
        n_kv_heads: usize,
    ) -> Result<Self, Error> {
        let page_bytes = shape.kv_format.bytes_per_position(shape.head_dim) * BLOCK_LEN;
        let pages = device.buffer(n_blocks * n_kv_heads * page_bytes)?;
        Ok(Self { pages, page_bytes, n_kv_heads, shape })
    }

    /// Gives one block the keys and values of another.
    ///
    /// # Errors
    /// The device failed.
    ///
    /// # Panics
    /// If there is no such block, or both are one.
    pub fn copy_block(&self, from: usize, to: usize) -> Result<(), Error> {
        let bytes = self.n_kv_heads * self.page_bytes;
        self.pages.copy(to * bytes, &self.pages, from * bytes, bytes)
    }
}

/// How query heads read KV heads.
#[derive(Debug)]
pub struct Heads {
    /// Where the query heads of each KV head begin, and where the last end.
    starts: Buffer<u32>,
    n_heads: usize,
    n_kv_heads: usize,
}

impl Heads {
    /// Of a rank whose query head h reads KV head `kv_of_head[h]`.
    ///
    /// # Errors
    /// The device failed.
    ///
    /// # Panics
    /// If they do not ascend, or name a KV head that is not there.
    pub fn new(device: &Device, kv_of_head: &[usize], n_kv_heads: usize) -> Result<Self, Error> {
        assert!(kv_of_head.is_sorted(), "query heads travel with their KV heads, in order");
        assert!(kv_of_head.last().is_none_or(|&last| last < n_kv_heads), "a KV head too many");
        let before = |kv: usize| kv_of_head.partition_point(|&of| of < kv) as u32;
        let starts: Vec<u32> = (0..=n_kv_heads).map(before).collect();
        Ok(Self { starts: device.holding(&starts)?, n_heads: kv_of_head.len(), n_kv_heads })
    }
}

/// Where the rows of a step stand. What it names must be in the cache: the caller checked it.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// Of each row. `[rows]`
    pub positions: View<'a, u32>,
    /// Block id * 16 + offset, or [`NO_SLOT`]. `[rows]`
    pub slots: View<'a, u32>,
    /// Where each row's run of KV blocks begins in `tables`. `[rows]`
    pub first_blocks: View<'a, u32>,
    pub tables: View<'a, u32>,
}

/// How positions turn queries and keys.
#[derive(Debug, Clone, Copy)]
pub struct Rope<'a> {
    /// `[positions, cosines of the pairs then their sines]`
    pub angles: &'a Buffer<f32>,
    pub n_pairs: usize,
    /// Pairs of neighbours; else of the two halves.
    pub is_adjacent: bool,
}

/// Rotates queries in place, and writes rotated keys and values to their slots. q: `[rows, n_heads,
/// head_dim]`; k, v: `[rows, n_kv_heads, head_dim]`.
///
/// # Errors
/// The device failed.
///
/// # Panics
/// If shapes disagree.
pub fn rope_kv(
    [q, k, v]: [&Buffer<f32>; 3],
    n_heads: usize,
    rows: Rows<'_>,
    rope: Rope<'_>,
    cache: &KvCache,
) -> Result<(), Error> {
    let (n_rows, head_dim) = (rows.positions.len, cache.shape.head_dim);
    assert!(rows.slots.len == n_rows && q.len() >= n_rows * n_heads * head_dim);
    assert!(k.len().min(v.len()) >= n_rows * cache.n_kv_heads * head_dim);
    assert!(2 * rope.n_pairs <= head_dim, "more pairs than columns");
    let arguments = Arguments::new()
        .memory(q)
        .memory(k)
        .memory(v)
        .view(rows.positions)
        .view(rows.slots)
        .memory(rope.angles)
        .memory(&cache.pages)
        .number(n_heads)
        .number(cache.n_kv_heads)
        .number(rope.n_pairs)
        .number(usize::from(rope.is_adjacent));
    let n_blocks = (n_heads + cache.n_kv_heads).div_ceil(ROPE_HEADS);
    let geometry = Geometry::new(n_rows, n_blocks, 1).shared_floats(ROPE_HEADS * head_dim);
    // SAFETY: a warp a row and head, within the lengths asserted; positions and slots as `Rows`
    // says.
    unsafe { launch(cache.pages.device(), kernels::ROPE_KV, geometry, arguments) }
}

/// Numbers of what a block found of a head.
#[must_use]
pub const fn part_len(head_dim: usize) -> usize {
    head_dim + 4
}

/// Room for what blocks of [`attend`] found, until it is merged.
#[derive(Debug)]
pub struct Parts {
    numbers: Buffer<f32>, // [item][head][part_len]
    max_items: usize,
}

impl Parts {
    /// For so many items.
    ///
    /// # Errors
    /// Too little memory.
    pub fn new(
        device: &Device,
        max_items: usize,
        n_heads: usize,
        head_dim: usize,
    ) -> Result<Self, Error> {
        let numbers = device.buffer(max_items * n_heads * part_len(head_dim))?;
        Ok(Self { numbers, max_items })
    }
}

/// The queries of one attention op, `[rows, n_heads, head_dim]`.
#[derive(Debug, Clone, Copy)]
pub struct Queries<'a> {
    pub q: &'a Buffer<f32>,
    pub heads: &'a Heads,
    pub scale: f32,
}

impl Queries<'_> {
    fn check(&self, rows: Rows<'_>, cache: &KvCache) {
        let n = rows.positions.len * self.heads.n_heads * cache.shape.head_dim;
        assert!(self.q.len() >= n && rows.first_blocks.len == rows.positions.len);
        assert_eq!(self.heads.n_kv_heads, cache.n_kv_heads, "KV heads of another cache");
    }
}

/// Causal attention of rows, each over the splits of its items. `items`: [`Item`]s as words.
///
/// # Errors
/// The device failed.
///
/// # Panics
/// If shapes disagree.
pub fn attend(
    queries: Queries<'_>,
    rows: Rows<'_>,
    items: View<'_, u32>,
    cache: &KvCache,
    parts: &Parts,
) -> Result<(), Error> {
    queries.check(rows, cache);
    let (n_items, head_dim) = (items.len / WORDS, cache.shape.head_dim);
    let Heads { starts, n_heads, n_kv_heads } = queries.heads;
    assert!(n_items <= parts.max_items);
    assert!(parts.numbers.len() >= n_items * n_heads * part_len(head_dim));
    let arguments = Arguments::new()
        .memory(queries.q)
        .memory(&cache.pages)
        .view(items)
        .view(rows.tables)
        .memory(starts)
        .memory(&parts.numbers)
        .number(*n_heads)
        .number(*n_kv_heads)
        .float(queries.scale);
    let (kernel, shared) = match cache.shape.kv_format {
        Format::F16 => (kernels::ATTEND, GROUP * (ATTEND_WARPS + head_dim + 1)),
        Format::F32 | Format::Int8 => {
            let split = split_len(cache.shape.kv_format);
            let of_queries = GROUP * (head_dim + split + 3);
            (kernels::ATTEND_PLAIN, of_queries + PLAIN_WARPS * head_dim)
        }
    };
    let geometry = Geometry::new(n_items, *n_kv_heads, 1).shared_floats(shared);
    // SAFETY: rows, items and blocks are in their buffers, as `Rows` says; parts hold the items.
    unsafe { launch(cache.pages.device(), kernel, geometry, arguments) }
}

/// What [`attend`] found, to attention: of the rows that have items. `first_items`: where the items
/// of each row begin, and where the last end.
///
/// # Errors
/// The device failed.
///
/// # Panics
/// If shapes disagree.
pub fn merge(
    parts: &Parts,
    first_items: View<'_, u32>,
    heads: &Heads,
    to: Making<'_>,
) -> Result<(), Error> {
    assert_eq!(first_items.len, to.n_tokens + 1);
    let head_dim = to.columns / heads.n_heads.max(1);
    let arguments = Arguments::new()
        .memory(&parts.numbers)
        .view(first_items)
        .structure(&to.made())
        .number(heads.n_heads);
    let geometry = Geometry::new(to.n_tokens, heads.n_heads, 1);
    let geometry = geometry.shared_floats(MERGE_WARPS * part_len(head_dim));
    // SAFETY: a block a row and head, of columns that `made` has room for.
    unsafe { launch(parts.numbers.device(), kernels::MERGE_ATTENDED, geometry, arguments) }
}

/// What a block of `attend_tiles` shares: two stages of keys and values, how many positions each
/// vector sees and four words more, and queries that do not stay in registers.
const fn tile_shared_bytes(head_dim: usize) -> usize {
    let stage = if head_dim <= 128 { 64 } else { 32 };
    let queries = if head_dim <= 64 { 0 } else { tile_vectors(head_dim) * head_dim };
    2 * stage * head_dim * 4 + 4 * (tile_vectors(head_dim) + 4) + 2 * queries
}

/// Causal attention of many rows of a sequence at once, on tensor cores; of a cache in f16. `tiles`:
/// [`Tile`]s as words, those of the longest contexts first, that the last to run are short; `out`:
/// `[rows, n_heads, head_dim]`.
///
/// # Errors
/// The device failed.
///
/// # Panics
/// If shapes disagree, or the cache is kept otherwise.
pub fn attend_tiles(
    queries: Queries<'_>,
    rows: Rows<'_>,
    tiles: View<'_, u32>,
    cache: &KvCache,
    out: &Buffer<f32>,
) -> Result<(), Error> {
    queries.check(rows, cache);
    assert_eq!(cache.shape.kv_format, Format::F16, "tensor cores read f16");
    let Heads { starts, n_heads, n_kv_heads } = queries.heads;
    assert!(out.len() >= rows.positions.len * n_heads * cache.shape.head_dim);
    let arguments = Arguments::new()
        .memory(queries.q)
        .memory(&cache.pages)
        .view(tiles)
        .view(rows.positions)
        .view(rows.first_blocks)
        .view(rows.tables)
        .memory(starts)
        .memory(out)
        .number(*n_heads)
        .number(*n_kv_heads)
        .float(queries.scale);
    // All KV heads of the first tile, then of the next: the plan puts the longest first.
    let geometry = Geometry::new(*n_kv_heads, tiles.len / WORDS, 1);
    let geometry = geometry.shared_floats(tile_shared_bytes(cache.shape.head_dim) / 4);
    // SAFETY: rows and blocks are in their buffers, as `Rows` says; an output as asserted.
    unsafe { launch(cache.pages.device(), kernels::ATTEND_TILES, geometry, arguments) }
}
