//! Causal attention over a paged KV cache (Vaswani et al. 2017, section 3.2; pages as in Kwon et
//! al.
//! 2023), grouped queries.
//!
//! Each query's result is its own: scores for all positions, one maximum, exponentials, their sum
//! and the weighted values, every sum over positions in position order. Queries of one KV head are
//! taken four at a time only to read the cache once.

use crate::isa::{Isa, dispatch};
use crate::lanes::{LANES, Lanes, fma_scalar, sum};
use crate::math::exp;
use crate::pool::{Pool, Shards};

/// Positions of a KV block: one per lane.
pub const BLOCK_LEN: usize = LANES;

/// Queries that share one pass over the cache.
const QUERIES: usize = 4;

/// Columns of the values accumulated at a time; head sizes are a multiple of it.
const VALUE_COLUMNS: usize = 32;

/// Rows of a span that one thread takes at a time.
const CHUNK_ROWS: usize = 16;

/// One layer's keys and values of a rank, f32.
#[derive(Debug)]
pub struct KvCache {
    /// `[block, kv head, column, position in block]`: scores of a block's positions are lanes.
    k: Vec<f32>,
    /// `[block, kv head, position in block, column]`
    v: Vec<f32>,
    n_kv_heads: usize,
    head_dim: usize,
}

/// Consecutive rows of one sequence.
#[derive(Debug, Clone, Copy)]
pub struct Span<'a> {
    pub first_row: usize,
    pub n_rows: usize,
    /// Position of its first row.
    pub first_position: usize,
    /// KV blocks of positions 0 to its last.
    pub blocks: &'a [u32],
}

/// Shapes of one attention op.
#[derive(Debug, Clone, Copy)]
pub struct Heads<'a> {
    /// KV head that each query head reads, ascending.
    pub kv_of_head: &'a [usize],
    pub head_dim: usize,
    pub scale: f32,
}

/// Scratch of all threads, allocated once: scores of four queries each.
#[derive(Debug)]
pub struct Scratch {
    scores: Vec<f32>,
    queries: Vec<f32>,
    max_context: usize,
}

impl Scratch {
    #[must_use]
    pub fn new(n_threads: usize, max_context: usize, head_dim: usize) -> Self {
        let max_context = max_context.next_multiple_of(BLOCK_LEN);
        Self {
            scores: vec![0.0; n_threads * QUERIES * max_context],
            queries: vec![0.0; n_threads * QUERIES * head_dim],
            max_context,
        }
    }
}

impl KvCache {
    /// Zeroed memory for `n_blocks` blocks.
    #[must_use]
    pub fn new(n_blocks: usize, n_kv_heads: usize, head_dim: usize) -> Self {
        let len = n_blocks * n_kv_heads * head_dim * BLOCK_LEN;
        Self { k: vec![0.0; len], v: vec![0.0; len], n_kv_heads, head_dim }
    }

    /// Writes one position's `[n_kv_heads, head_dim]` keys and values.
    pub fn write(&mut self, slot: usize, k: &[f32], v: &[f32]) {
        let (block, at) = (slot / BLOCK_LEN, slot % BLOCK_LEN);
        let size = self.head_dim * BLOCK_LEN;
        for head in 0..self.n_kv_heads {
            let base = (block * self.n_kv_heads + head) * size;
            let from = head * self.head_dim..(head + 1) * self.head_dim;
            for (column, &value) in k[from.clone()].iter().enumerate() {
                self.k[base + column * BLOCK_LEN + at] = value;
            }
            self.v[base + at * self.head_dim..][..self.head_dim].copy_from_slice(&v[from]);
        }
    }

    fn page(&self, block: u32, head: usize) -> std::ops::Range<usize> {
        let size = self.head_dim * BLOCK_LEN;
        let base = (block as usize * self.n_kv_heads + head) * size;
        base..base + size
    }
}

/// Attends: q and out are `[rows, query heads, head_dim]`.
///
/// # Panics
/// If shapes disagree, or a span is longer than the scratch's context.
pub fn attend(
    pool: &mut Pool,
    isa: Isa,
    cache: &KvCache,
    heads: Heads<'_>,
    spans: &[Span<'_>],
    q: &[f32],
    out: &mut [f32],
    scratch: &mut Scratch,
) {
    assert_eq!(q.len(), out.len());
    assert!(heads.head_dim == cache.head_dim && heads.head_dim.is_multiple_of(VALUE_COLUMNS));
    let n_threads = pool.n_threads();
    let max_context = scratch.max_context;
    let (scores, queries) = (Shards::new(&mut scratch.scores), Shards::new(&mut scratch.queries));
    let out = Shards::new(out);
    pool.run(&|thread| {
        let (n, m) = (QUERIES * max_context, QUERIES * heads.head_dim);
        // SAFETY: each thread has its own stretch.
        let scores = unsafe { scores.range(thread * n..(thread + 1) * n) };
        // SAFETY: as above.
        let queries = unsafe { queries.range(thread * m..(thread + 1) * m) };
        let mut work = Work { cache, heads, q, out, scores, queries, max_context };
        let mut item = 0;
        for span in spans {
            for chunk in (0..span.n_rows).step_by(CHUNK_ROWS) {
                for group in heads.kv_of_head.chunk_by(|a, b| a == b) {
                    if item % n_threads == thread {
                        let rows = chunk..(chunk + CHUNK_ROWS).min(span.n_rows);
                        let first_head = heads.kv_of_head.partition_point(|&kv| kv < group[0]);
                        work.chunk(isa, span, rows, group[0], first_head..first_head + group.len());
                    }
                    item += 1;
                }
            }
        }
    });
}

struct Work<'a> {
    cache: &'a KvCache,
    heads: Heads<'a>,
    q: &'a [f32],
    out: Shards<'a, f32>,
    scores: &'a mut [f32],
    queries: &'a mut [f32],
    max_context: usize,
}

/// One query: where its heads' columns stand and how many positions it sees.
#[derive(Clone, Copy)]
struct Query {
    offset: usize,
    context: usize,
}

impl Work<'_> {
    fn chunk(
        &mut self,
        isa: Isa,
        span: &Span<'_>,
        rows: std::ops::Range<usize>,
        kv_head: usize,
        heads: std::ops::Range<usize>,
    ) {
        let width = self.heads.kv_of_head.len() * self.heads.head_dim;
        let mut group = [Query { offset: 0, context: 0 }; QUERIES];
        let mut n = 0;
        for row in rows {
            for head in heads.clone() {
                let offset = (span.first_row + row) * width + head * self.heads.head_dim;
                group[n] = Query { offset, context: span.first_position + row + 1 };
                n += 1;
                if n == QUERIES {
                    self.group(isa, span.blocks, kv_head, &group);
                    n = 0;
                }
            }
        }
        if n > 0 {
            self.group(isa, span.blocks, kv_head, &group[..n]);
        }
    }

    fn group(&mut self, isa: Isa, blocks: &[u32], kv_head: usize, group: &[Query]) {
        match group.len() {
            1 => self.queries::<1>(isa, blocks, kv_head, group),
            2 => self.queries::<2>(isa, blocks, kv_head, group),
            3 => self.queries::<3>(isa, blocks, kv_head, group),
            _ => self.queries::<QUERIES>(isa, blocks, kv_head, group),
        }
    }

    fn queries<const R: usize>(
        &mut self,
        isa: Isa,
        blocks: &[u32],
        kv_head: usize,
        group: &[Query],
    ) {
        let head_dim = self.heads.head_dim;
        for (r, query) in group.iter().enumerate() {
            let q = &self.q[query.offset..query.offset + head_dim];
            for (scaled, q) in self.queries[r * head_dim..].iter_mut().zip(q) {
                *scaled = q * self.heads.scale;
            }
        }
        let contexts: [usize; R] = std::array::from_fn(|r| group[r].context);
        let longest = contexts.iter().fold(0, |a, &b| a.max(b));
        assert!(longest <= self.max_context, "context of {longest} exceeds {}", self.max_context);
        let blocks = &blocks[..longest.div_ceil(BLOCK_LEN)];
        let (queries, scores, stride) = (&*self.queries, &mut *self.scores, self.max_context);
        let cache = self.cache;
        let sums = &mut [0f32; R];
        dispatch!(isa, fn<R>(
            cache: &KvCache, blocks: &[u32], kv_head: usize, contexts: [usize; R], queries: &[f32],
            scores: &mut [f32], stride: usize, sums: &mut [f32; R],
        ) => weigh(cache, blocks, kv_head, contexts, queries, scores, stride, sums));
        // SAFETY: a query's columns of the output belong to the one thread that took its chunk.
        let mut out: [&mut [f32]; R] = std::array::from_fn(|r| unsafe {
            self.out.range(group[r].offset..group[r].offset + head_dim)
        });
        let (out, scores, sums) = (&mut out, &*scores, &*sums);
        dispatch!(isa, fn<R>(
            cache: &KvCache, blocks: &[u32], kv_head: usize, scores: &[f32], stride: usize,
            sums: &[f32; R], out: &mut [&mut [f32]; R],
        ) => mix(cache, blocks, kv_head, scores, stride, sums, out));
    }
}

/// Scores of all positions, then their exponentials and sums.
#[inline(always)]
fn weigh<const R: usize>(
    cache: &KvCache,
    blocks: &[u32],
    kv_head: usize,
    contexts: [usize; R],
    queries: &[f32],
    scores: &mut [f32],
    stride: usize,
    sums: &mut [f32; R],
) {
    let head_dim = cache.head_dim;
    let mut highest = [f32::NEG_INFINITY; R];
    for (i, &block) in blocks.iter().enumerate() {
        let keys = &cache.k[cache.page(block, kv_head)];
        let mut acc = [[0f32; LANES]; R];
        for (column, keys) in keys.chunks_exact(LANES).enumerate() {
            for r in 0..R {
                fma_scalar(&mut acc[r], queries[r * head_dim + column], keys);
            }
        }
        for r in 0..R {
            let visible = contexts[r].saturating_sub(i * BLOCK_LEN);
            for lane in 0..LANES {
                let score = if lane < visible { acc[r][lane] } else { f32::NEG_INFINITY };
                highest[r] = if score > highest[r] { score } else { highest[r] };
                scores[r * stride + i * BLOCK_LEN + lane] = score;
            }
        }
    }
    for r in 0..R {
        let mut lanes: Lanes = [0.0; LANES];
        for scores in scores[r * stride..][..blocks.len() * BLOCK_LEN].chunks_exact_mut(LANES) {
            for lane in 0..LANES {
                scores[lane] = exp(scores[lane] - highest[r]);
                lanes[lane] += scores[lane];
            }
        }
        sums[r] = sum(&lanes);
    }
}

/// Values weighted by the exponentials, position by position, over their sum.
#[inline(always)]
fn mix<const R: usize>(
    cache: &KvCache,
    blocks: &[u32],
    kv_head: usize,
    scores: &[f32],
    stride: usize,
    sums: &[f32; R],
    out: &mut [&mut [f32]; R],
) {
    let head_dim = cache.head_dim;
    for first in (0..head_dim).step_by(VALUE_COLUMNS) {
        let mut acc = [[0f32; VALUE_COLUMNS]; R];
        for (i, &block) in blocks.iter().enumerate() {
            let values = &cache.v[cache.page(block, kv_head)];
            for (at, values) in values.chunks_exact(head_dim).enumerate() {
                let values = &values[first..first + VALUE_COLUMNS];
                for r in 0..R {
                    let weight = scores[r * stride + i * BLOCK_LEN + at];
                    for column in 0..VALUE_COLUMNS {
                        acc[r][column] = weight.mul_add(values[column], acc[r][column]);
                    }
                }
            }
        }
        for r in 0..R {
            for column in 0..VALUE_COLUMNS {
                out[r][first + column] = acc[r][column] / sums[r];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD_DIM: usize = 32;
    const KV_OF_HEAD: [usize; 5] = [0, 0, 0, 1, 1];

    fn noise(seed: usize, n: usize) -> Vec<f32> {
        let mut x = (seed as u32).wrapping_mul(2_654_435_761) | 1;
        (0..n)
            .map(|_| {
                x ^= x << 13;
                x ^= x >> 17;
                x ^= x << 5;
                (x % 2001) as f32 / 1000.0 - 1.0
            })
            .collect()
    }

    /// Two sequences of 37 and 5 positions, in scattered blocks.
    fn cache() -> (KvCache, Vec<Vec<u32>>) {
        let mut cache = KvCache::new(8, 2, HEAD_DIM);
        let tables = vec![vec![5, 0, 3], vec![7]];
        for (s, (table, len)) in tables.iter().zip([37, 5]).enumerate() {
            for p in 0..len {
                let kv = noise(100 * s + p, 4 * HEAD_DIM);
                let slot = table[p / BLOCK_LEN] as usize * BLOCK_LEN + p % BLOCK_LEN;
                cache.write(slot, &kv[..2 * HEAD_DIM], &kv[2 * HEAD_DIM..]);
            }
        }
        (cache, tables)
    }

    fn attend_rows(isa: Isa, n_threads: usize, first: usize, n: usize) -> Vec<f32> {
        let (cache, tables) = cache();
        let width = KV_OF_HEAD.len() * HEAD_DIM;
        let all_q: Vec<f32> = (0..37).flat_map(|p| noise(1000 + p, width)).collect();
        let q: Vec<f32> =
            [&all_q[first * width..(first + n) * width], &all_q[..2 * width]].concat();
        let mut out = vec![f32::NAN; q.len()];
        let spans = [
            Span { first_row: 0, n_rows: n, first_position: first, blocks: &tables[0] },
            Span { first_row: n, n_rows: 2, first_position: 3, blocks: &tables[1] },
        ];
        let heads = Heads { kv_of_head: &KV_OF_HEAD, head_dim: HEAD_DIM, scale: 0.25 };
        let mut scratch = Scratch::new(n_threads, 37, HEAD_DIM);
        attend(
            &mut Pool::new(n_threads, false),
            isa,
            &cache,
            heads,
            &spans,
            &q,
            &mut out,
            &mut scratch,
        );
        out.truncate(n * width);
        out
    }

    #[test]
    fn attention_matches_a_plain_computation_in_f64() {
        let out = attend_rows(Isa::detect(), 1, 0, 37);
        let width = KV_OF_HEAD.len() * HEAD_DIM;
        for row in [0, 1, 15, 16, 36] {
            let q = noise(1000 + row, width);
            for (head, &kv) in KV_OF_HEAD.iter().enumerate() {
                let kv_rows: Vec<_> = (0..=row).map(|p| noise(p, 4 * HEAD_DIM)).collect();
                let dot = |k: &[f32]| -> f64 {
                    let q = &q[head * HEAD_DIM..][..HEAD_DIM];
                    q.iter().zip(k).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() * 0.25
                };
                let weights: Vec<f64> =
                    kv_rows.iter().map(|r| dot(&r[kv * HEAD_DIM..][..HEAD_DIM]).exp()).collect();
                let total: f64 = weights.iter().sum();
                for column in 0..HEAD_DIM {
                    let value = |r: &[f32]| f64::from(r[(2 + kv) * HEAD_DIM + column]);
                    let want: f64 =
                        kv_rows.iter().zip(&weights).map(|(r, w)| w * value(r)).sum::<f64>()
                            / total;
                    let got = f64::from(out[row * width + head * HEAD_DIM + column]);
                    assert!((got - want).abs() < 1e-5, "row {row} head {head}: {got} {want}");
                }
            }
        }
    }

    #[test]
    fn a_query_gets_the_same_bits_in_any_batch_on_any_threads_and_instruction_set() {
        let whole = attend_rows(Isa::Portable, 1, 0, 37);
        let width = KV_OF_HEAD.len() * HEAD_DIM;
        for isa in Isa::available() {
            for (n_threads, first, n) in
                [(1, 0, 37), (2, 0, 37), (3, 20, 17), (1, 36, 1), (2, 7, 2)]
            {
                let part = attend_rows(isa, n_threads, first, n);
                for (i, (a, b)) in part.iter().zip(&whole[first * width..]).enumerate() {
                    assert_eq!(a.to_bits(), b.to_bits(), "{isa:?} {n_threads} {first}+{n} at {i}");
                }
            }
        }
    }
}
