//! Causal attention over a paged KV cache (Vaswani et al. 2017, section 3.2; pages as in Kwon et
//! al. 2023), grouped queries, exponentials by running maximum (Milakov and Gimelshein 2018).
//!
//! Each query's result is its own: its sequence is cut into splits of 256 positions, each summed
//! alone and added in order. Who computes a split, and which queries share the reading of it, is
//! chosen by the work there is and changes no bit.

mod cache;
mod simd;
mod tile;

use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

pub use cache::{BLOCK_LEN, Format, KvCache};

use crate::isa::Isa;
use crate::pool::{Pool, Shards};
use simd::dispatch_simd;
use tile::{Pages, Queries, SPLIT, State, TILE, add_split, merge};

/// Most queries of a unit of work: they share each split while it is in the cache.
const UNIT_QUERIES: usize = 128;

/// Most queries of a unit whose splits are spread over threads.
const SPREAD_QUERIES: usize = 16;

/// Neighbouring splits that one thread takes of such a unit.
const SPREAD_SPLITS: usize = 4;

/// A unit is spread if it is more than one part in so many, for each thread, of the work.
const PARTS_PER_THREAD: usize = 8;

/// Nothing is spread if whole units keep threads busy for so much of the time: what waits to be
/// merged goes through memory, and between cores.
const BUSY: f64 = 0.95;

/// Threads whose loads are told apart; more of them always spread.
const MAX_BALANCED: usize = 64;

/// Consecutive rows of one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    pub first_row: usize,
    pub n_rows: usize,
    /// Position of its first row.
    pub first_position: usize,
    /// Its run in the block tables: blocks of positions 0 to its last.
    pub first_block: usize,
}

/// The rows of a step, sequence by sequence.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    pub spans: &'a [Span],
    /// KV block ids.
    pub block_tables: &'a [u32],
}

/// Shapes of one attention op.
#[derive(Debug, Clone, Copy)]
pub struct Heads<'a> {
    /// KV head that each query head reads, ascending.
    pub kv_of_head: &'a [usize],
    pub head_dim: usize,
    pub scale: f32,
}

/// Memory of all threads, allocated once.
#[derive(Debug)]
pub struct Scratch {
    max_context: usize,
    head_dim: usize,
    /// By thread: scaled queries, weights, maxima, sums, accumulated values.
    own: Vec<f32>,
    /// `[slot]` of maxima, sums and values of [`SPREAD_QUERIES`]: splits that wait to be merged.
    /// Touched only where units are spread.
    parts: Vec<f32>,
    /// By spread unit: how many of its runs are done.
    done: Vec<AtomicU32>,
}

impl Scratch {
    #[must_use]
    pub fn new(n_threads: usize, max_context: usize, head_dim: usize) -> Self {
        let most_spread = PARTS_PER_THREAD * n_threads;
        // Units are spread only if there is somebody to share them with.
        let n_slots = if n_threads > 1 { most_spread * max_context.div_ceil(SPLIT) } else { 0 };
        Self {
            max_context,
            head_dim,
            own: vec![0.0; n_threads * Own::len(head_dim)],
            parts: vec![0.0; n_slots * part_len(head_dim)],
            done: (0..most_spread).map(|_| AtomicU32::new(0)).collect(),
        }
    }
}

/// Numbers of a slot in [`Scratch::parts`].
fn part_len(head_dim: usize) -> usize {
    SPREAD_QUERIES * (head_dim + 2)
}

/// Attends: q and out are `[rows, query heads, head_dim]`.
///
/// # Panics
/// If shapes disagree, a block is not in the cache, or a span is longer than the scratch's context.
pub fn attend(
    pool: &mut Pool,
    isa: Isa,
    cache: &KvCache,
    heads: Heads<'_>,
    rows: Rows<'_>,
    q: &[f32],
    out: &mut [f32],
    scratch: &mut Scratch,
) {
    assert_eq!(q.len(), out.len());
    assert!(heads.head_dim == cache.head_dim() && heads.head_dim == scratch.head_dim);
    for span in rows.spans {
        let context = span.first_position + span.n_rows;
        assert!(context <= scratch.max_context, "context {context} > {}", scratch.max_context);
        let blocks = &rows.block_tables[span.first_block..][..context.div_ceil(BLOCK_LEN)];
        assert!(blocks.iter().all(|&block| (block as usize) < cache.n_blocks()));
    }
    let work = Work::new(heads, rows, pool.n_threads());
    scratch.done.iter_mut().for_each(|done| *done.get_mut() = 0);
    let own_len = Own::len(heads.head_dim);
    let (own, parts) = (Shards::new(&mut scratch.own), Shards::new(&mut scratch.parts));
    let (done, out) = (&scratch.done[..], Shards::new(out));
    let next = AtomicUsize::new(0);
    pool.run(&|thread| {
        // SAFETY: each thread has its own stretch.
        let own = unsafe { own.range(thread * own_len..(thread + 1) * own_len) };
        let own = Own::new(own, heads.head_dim);
        let mut hand = Hand { isa, cache, heads, rows, q, out, own, parts, done };
        let mut mine = next.fetch_add(1, Ordering::Relaxed);
        let mut first = 0;
        work.for_each_unit(|unit| {
            while mine < first + unit.n_runs() {
                hand.run(unit, mine - first);
                mine = next.fetch_add(1, Ordering::Relaxed);
            }
            first += unit.n_runs();
        });
    });
}

/// What is to be done, cut into units.
struct Work<'a> {
    heads: Heads<'a>,
    rows: Rows<'a>,
    n_threads: usize,
    /// Sum of all units' costs.
    cost: usize,
    /// Whole units would leave threads idle.
    spreads: bool,
}

/// Rows of one span, for query heads that read one KV head.
#[derive(Debug, Clone, Copy)]
struct Unit<'a> {
    span: &'a Span,
    /// Of the span.
    first_row: usize,
    n_rows: usize,
    kv_head: usize,
    first_head: usize,
    n_heads: usize,
    spread: Option<Spread>,
}

/// Where a unit whose splits are spread over threads keeps them: its index, its first slot.
#[derive(Debug, Clone, Copy)]
struct Spread {
    index: usize,
    first_slot: usize,
}

impl Unit<'_> {
    fn n_queries(&self) -> usize {
        self.n_rows * self.n_heads
    }

    fn n_splits(&self) -> usize {
        (self.span.first_position + self.first_row + self.n_rows).div_ceil(SPLIT)
    }

    fn cost(&self) -> usize {
        self.n_splits() * self.n_queries().div_ceil(TILE / 2)
    }

    /// Pieces that are taken one by one.
    fn n_runs(&self) -> usize {
        if self.spread.is_some() { self.n_splits().div_ceil(SPREAD_SPLITS) } else { 1 }
    }

    /// Positions seen by its `query`; rows stand before heads.
    fn context(&self, query: usize) -> usize {
        self.span.first_position + self.first_row + query / self.n_heads + 1
    }
}

impl<'a> Work<'a> {
    fn new(heads: Heads<'a>, rows: Rows<'a>, n_threads: usize) -> Self {
        let mut work = Self { heads, rows, n_threads, cost: 0, spreads: false };
        let mut cost = 0;
        let mut loads = [0; MAX_BALANCED];
        let loads = &mut loads[..n_threads.min(MAX_BALANCED)];
        work.for_each_unit(|unit| {
            cost += unit.cost();
            // As they are taken: by whoever is free first.
            if let Some(free) = loads.iter_mut().min() {
                *free += unit.cost();
            }
        });
        let longest = loads.iter().max().copied().unwrap_or(0);
        work.cost = cost;
        work.spreads = (cost as f64) < BUSY * (n_threads * longest) as f64;
        work
    }

    /// The same units in the same order each time. Of a span those with the longest contexts come
    /// first, so that what is left at the end is small.
    fn for_each_unit(&self, mut f: impl FnMut(&Unit<'_>)) {
        let mut spread = Spread { index: 0, first_slot: 0 };
        for span in self.rows.spans {
            let mut first_head = 0;
            for same in self.heads.kv_of_head.chunk_by(|a, b| a == b) {
                for group in same.chunks(UNIT_QUERIES) {
                    let chunk = self.rows_per_unit(span.n_rows, group.len());
                    for first_row in (0..span.n_rows).step_by(chunk).rev() {
                        let n_rows = chunk.min(span.n_rows - first_row);
                        let (kv_head, n_heads) = (same[0], group.len());
                        let spread_to = None;
                        let mut unit = Unit {
                            span,
                            first_row,
                            n_rows,
                            kv_head,
                            first_head,
                            n_heads,
                            spread: spread_to,
                        };
                        if self.is_spread(&unit) {
                            unit.spread = Some(spread);
                            spread.index += 1;
                            spread.first_slot += unit.n_splits();
                        }
                        f(&unit);
                    }
                    first_head += group.len();
                }
            }
        }
    }

    fn rows_per_unit(&self, n_rows: usize, n_heads: usize) -> usize {
        let fair = (n_rows * self.heads.kv_of_head.len())
            .div_ceil(PARTS_PER_THREAD * self.n_threads * n_heads)
            .max(TILE.div_ceil(n_heads));
        fair.min((UNIT_QUERIES / n_heads).max(1))
    }

    /// Fewer than one unit in `PARTS_PER_THREAD * n_threads` is: slots and counters suffice.
    fn is_spread(&self, unit: &Unit<'_>) -> bool {
        self.spreads
            && unit.n_queries() <= SPREAD_QUERIES
            && unit.n_splits() > SPREAD_SPLITS
            && unit.cost() * PARTS_PER_THREAD * self.n_threads > self.cost
    }
}

/// One thread's scratch.
struct Own<'a> {
    q: &'a mut [f32],       // [UNIT_QUERIES + TILE, head_dim]
    weights: &'a mut [f32], // [TILE, SPLIT]
    max: &'a mut [f32],     // [UNIT_QUERIES + TILE]
    sum: &'a mut [f32],     // [UNIT_QUERIES + TILE]
    acc: &'a mut [f32],     // [UNIT_QUERIES + TILE, head_dim]
}

impl<'a> Own<'a> {
    const N: usize = UNIT_QUERIES + TILE;

    fn len(head_dim: usize) -> usize {
        // A cache line between threads.
        2 * Self::N * head_dim + 2 * Self::N + TILE * SPLIT + 16
    }

    fn new(all: &'a mut [f32], head_dim: usize) -> Self {
        let (q, rest) = all.split_at_mut(Self::N * head_dim);
        let (weights, rest) = rest.split_at_mut(TILE * SPLIT);
        let (max, rest) = rest.split_at_mut(Self::N);
        let (sum, rest) = rest.split_at_mut(Self::N);
        Self { q, weights, max, sum, acc: &mut rest[..Self::N * head_dim] }
    }

    /// Of no position yet.
    fn clear(&mut self, n_queries: usize, head_dim: usize) -> State {
        self.max[..n_queries].fill(f32::NEG_INFINITY);
        self.sum[..n_queries].fill(0.0);
        self.acc[..n_queries * head_dim].fill(0.0);
        State { max: self.max.as_mut_ptr(), sum: self.sum.as_mut_ptr(), acc: self.acc.as_mut_ptr() }
    }
}

/// One thread at work.
struct Hand<'a> {
    isa: Isa,
    cache: &'a KvCache,
    heads: Heads<'a>,
    rows: Rows<'a>,
    q: &'a [f32],
    out: Shards<'a, f32>,
    own: Own<'a>,
    parts: Shards<'a, f32>,
    done: &'a [AtomicU32],
}

impl Hand<'_> {
    /// The `run`-th run of a unit.
    fn run(&mut self, unit: &Unit<'_>, run: usize) {
        let mut contexts = [0; UNIT_QUERIES];
        let contexts = &mut contexts[..unit.n_queries()];
        contexts.iter_mut().enumerate().for_each(|(i, context)| *context = unit.context(i));
        self.load_queries(unit);
        let d = self.heads.head_dim;
        let Some(spread) = unit.spread else {
            let state = self.own.clear(unit.n_queries(), d);
            for split in 0..unit.n_splits() {
                self.add_split(unit, split, split + 1 < unit.n_splits(), contexts, state);
            }
            self.store(unit);
            return;
        };
        let splits = run * SPREAD_SPLITS..((run + 1) * SPREAD_SPLITS).min(unit.n_splits());
        for split in splits.clone() {
            let state = self.own.clear(unit.n_queries(), d);
            self.add_split(unit, split, split + 1 < splits.end, contexts, state);
            let part = self.part(spread.first_slot + split);
            let n = unit.n_queries();
            // SAFETY: this split's slot, which only this thread uses until the unit's counter says
            // that it is done.
            let part = unsafe { self.parts.range(part) };
            let (max, rest) = part.split_at_mut(SPREAD_QUERIES);
            let (sum, acc) = rest.split_at_mut(SPREAD_QUERIES);
            max[..n].copy_from_slice(&self.own.max[..n]);
            sum[..n].copy_from_slice(&self.own.sum[..n]);
            acc[..n * d].copy_from_slice(&self.own.acc[..n * d]);
        }
        let before = self.done[spread.index].fetch_add(1, Ordering::AcqRel) as usize;
        if before + 1 == unit.n_runs() {
            self.merge(unit, spread);
            self.store(unit);
        }
    }

    fn part(&self, slot: usize) -> Range<usize> {
        let len = part_len(self.heads.head_dim);
        slot * len..(slot + 1) * len
    }

    fn offset(&self, unit: &Unit<'_>, query: usize) -> usize {
        let row = unit.span.first_row + unit.first_row + query / unit.n_heads;
        let head = unit.first_head + query % unit.n_heads;
        (row * self.heads.kv_of_head.len() + head) * self.heads.head_dim
    }

    fn load_queries(&mut self, unit: &Unit<'_>) {
        let d = self.heads.head_dim;
        for query in 0..unit.n_queries() {
            let at = self.offset(unit, query);
            let to = &mut self.own.q[query * d..(query + 1) * d];
            for (scaled, q) in to.iter_mut().zip(&self.q[at..at + d]) {
                *scaled = q * self.heads.scale;
            }
        }
    }

    fn add_split(
        &mut self,
        unit: &Unit<'_>,
        split: usize,
        goes_on: bool,
        contexts: &[usize],
        state: State,
    ) {
        let mut pages = Pages::new();
        let n_blocks = unit.context(unit.n_queries() - 1).div_ceil(BLOCK_LEN);
        let blocks = &self.rows.block_tables[unit.span.first_block..][..n_blocks];
        let per_split = SPLIT / BLOCK_LEN;
        let of_split = &blocks[split * per_split..((split + 1) * per_split).min(n_blocks)];
        for (i, &block) in of_split.iter().enumerate() {
            [pages.k[i], pages.v[i]] = self.cache.pages(block as usize, unit.kv_head);
        }
        if goes_on {
            for (next, &block) in pages.next.iter_mut().zip(&blocks[(split + 1) * per_split..]) {
                *next = self.cache.pages(block as usize, unit.kv_head)[0];
            }
        }
        let (weights, q) = (self.own.weights.as_mut_ptr(), self.own.q.as_ptr());
        let queries = Queries { q, contexts, state, weights, head_dim: self.heads.head_dim };
        let (format, pages, first) = (self.cache.format(), &pages, split * SPLIT);
        dispatch_simd!(self.isa, fn(
            format: Format, pages: &Pages, first: usize, queries: Queries<'_>,
        ) => add_split);
    }

    /// Puts a unit's splits together, in order.
    fn merge(&mut self, unit: &Unit<'_>, spread: Spread) {
        let head_dim = self.heads.head_dim;
        let all = self.own.clear(unit.n_queries(), head_dim);
        for split in 0..unit.n_splits() {
            // SAFETY: all runs are done, so nobody writes these; the counter (AcqRel) ordered their
            // writes before this.
            let part = unsafe { self.parts.range(self.part(spread.first_slot + split)) };
            let (max, rest) = part.split_at_mut(SPREAD_QUERIES);
            let (sum, acc) = rest.split_at_mut(SPREAD_QUERIES);
            for query in 0..unit.n_queries() {
                // SAFETY: a query of the unit.
                let state = unsafe { of_query(all, query, head_dim) };
                let part = State {
                    max: &raw mut max[query],
                    sum: &raw mut sum[query],
                    acc: acc[query * head_dim..].as_mut_ptr(),
                };
                dispatch_simd!(self.isa, fn(
                    state: State, part: State, head_dim: usize,
                ) => merge);
            }
        }
    }

    /// Writes a unit's results.
    fn store(&self, unit: &Unit<'_>) {
        let d = self.heads.head_dim;
        for query in 0..unit.n_queries() {
            let at = self.offset(unit, query);
            // SAFETY: these columns belong to the one thread that completes the unit.
            let out = unsafe { self.out.range(at..at + d) };
            let sum = self.own.sum[query];
            for (out, acc) in out.iter_mut().zip(&self.own.acc[query * d..]) {
                // A zero's sign depends on how many masked positions were added: it is dropped.
                *out = acc / sum + 0.0;
            }
        }
    }
}

/// # Safety
/// There is such a query.
unsafe fn of_query(state: State, query: usize, head_dim: usize) -> State {
    // SAFETY: the caller's promise.
    unsafe {
        State {
            max: state.max.add(query),
            sum: state.sum.add(query),
            acc: state.acc.add(query * head_dim),
        }
    }
}

#[cfg(test)]
mod tests;
