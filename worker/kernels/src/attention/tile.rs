//! One split of a sequence for a tile of queries: scores, exponentials, weighted values. The inner
//! loops of attention; which queries and which blocks is `attend`'s business.
//!
//! Per query, in this order and no other: a score is one chain over the columns; the exponentials
//! are summed by lane over the blocks and then by halves; each column of the values is one chain
//! over the positions; the split's result is then added to those before it. How many queries or
//! blocks are taken at a time changes none of these chains.

use super::cache::{BLOCK_LEN, Format, RUN, SCALE_BYTES};
use super::simd::{Simd, each};
use crate::lanes::{LANES, sum};
use crate::math::exp;

/// Positions whose scores share a maximum; splits are merged in order.
pub(super) const SPLIT: usize = 256;

const BLOCKS: usize = SPLIT / BLOCK_LEN;

/// Most queries of a tile.
pub(super) const TILE: usize = 8;

/// Most blocks that are fetched ahead of those in work.
const MOST_AHEAD: usize = 8;

/// The pages of one split of one KV head, and of what is read after it.
#[derive(Clone, Copy)]
pub(super) struct Pages {
    pub k: [*const u8; BLOCKS],
    pub v: [*const u8; BLOCKS],
    /// First keys of the split after this.
    pub next: [*const u8; MOST_AHEAD],
}

impl Pages {
    pub(super) fn new() -> Self {
        let null = std::ptr::null();
        Self { k: [null; BLOCKS], v: [null; BLOCKS], next: [null; MOST_AHEAD] }
    }
}

/// What queries have gathered so far: sums relative to the exponential of the maximum.
#[derive(Clone, Copy)]
pub(super) struct State {
    pub max: *mut f32, // [queries]
    pub sum: *mut f32, // [queries]
    pub acc: *mut f32, // [queries, head_dim]
}

/// Queries, what they see, and where they work.
#[derive(Clone, Copy)]
pub(super) struct Queries<'a> {
    /// `[queries, head_dim]`, scaled; readable up to a multiple of [`TILE`] queries.
    pub q: *const f32,
    /// Positions that each sees of its sequence.
    pub contexts: &'a [usize],
    /// Room up to a multiple of [`TILE`] queries.
    pub state: State,
    /// `[TILE, SPLIT]`
    pub weights: *mut f32,
    pub head_dim: usize,
}

/// Adds a split's positions, from `first` on, to the state of every query that sees any.
///
/// # Safety
/// The machine has `S`; pages exist for all blocks that a query sees, in this format; the pointers
/// have the room stated, and nobody else uses what they reach.
#[inline(always)]
pub(super) unsafe fn add_split<S: Simd>(
    format: Format,
    pages: &Pages,
    first: usize,
    queries: Queries<'_>,
) {
    // SAFETY: the caller's promise.
    unsafe {
        match format {
            Format::F16 => add_tiles::<S, F16>(pages, first, queries),
            Format::F32 => add_tiles::<S, F32>(pages, first, queries),
            Format::Int8 => add_tiles::<S, Int8>(pages, first, queries),
        }
    }
}

/// Adds `part`, which stands for later positions, to `state`.
///
/// # Safety
/// The machine has `S`; both are of one query each, with `head_dim` columns.
#[inline(always)]
pub(super) unsafe fn merge<S: Simd>(state: State, part: State, head_dim: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        let (keep, take) = advance(state, *part.max, *part.sum);
        for column in (0..head_dim).step_by(LANES) {
            let part = S::load(part.acc.add(column));
            add_scaled::<S>(state.acc.add(column), keep, part, take);
        }
    }
}

/// How numbers of a page are read.
trait Number {
    const BYTES: usize;
    const HEADER: usize;
    /// Blocks that are fetched ahead of those in work, [`MOST_AHEAD`] at most: 8 to 16 KiB of heads of
    /// 64 columns.
    const AHEAD: usize;
    /// # Safety
    /// As [`Simd`].
    unsafe fn load<S: Simd>(from: *const u8) -> S::V;
}

struct F16;
struct F32;
struct Int8;

impl Number for F16 {
    const BYTES: usize = 2;
    const HEADER: usize = 0;
    const AHEAD: usize = 4;
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const u8) -> S::V {
        // SAFETY: the trait's promise.
        unsafe { S::load_f16(from) }
    }
}

impl Number for F32 {
    const BYTES: usize = 4;
    const HEADER: usize = 0;
    const AHEAD: usize = 4;
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const u8) -> S::V {
        // SAFETY: the trait's promise.
        unsafe { S::load(from.cast()) }
    }
}

impl Number for Int8 {
    const BYTES: usize = 1;
    const HEADER: usize = SCALE_BYTES;
    const AHEAD: usize = 8;
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const u8) -> S::V {
        // SAFETY: the trait's promise.
        unsafe { S::load_i8(from) }
    }
}

#[inline(always)]
unsafe fn add_tiles<S: Simd, N: Number>(pages: &Pages, first: usize, queries: Queries<'_>) {
    let mut at = 0;
    while at < queries.contexts.len() {
        let left = queries.contexts.len() - at;
        // SAFETY: the caller's promise.
        unsafe {
            at += if const { S::TILE >= 8 } && left > 6 {
                tile::<S, N, 8>(pages, first, queries, at)
            } else if const { S::TILE >= 8 } && left > 4 {
                tile::<S, N, 6>(pages, first, queries, at)
            } else if const { S::TILE >= 4 } && left > 3 {
                tile::<S, N, 4>(pages, first, queries, at)
            } else if const { S::TILE >= 4 } && left == 3 {
                tile::<S, N, 3>(pages, first, queries, at)
            } else if const { S::TILE >= 4 } && left == 2 {
                tile::<S, N, 2>(pages, first, queries, at)
            } else {
                tile::<S, N, 1>(pages, first, queries, at)
            }
        }
    }
}

/// Queries `at` and up to R from there; R.
#[inline(always)]
unsafe fn tile<S: Simd, N: Number, const R: usize>(
    pages: &Pages,
    first: usize,
    queries: Queries<'_>,
    at: usize,
) -> usize {
    let visible: [usize; R] = each(|r| {
        let context = queries.contexts.get(at + r).copied().unwrap_or(0);
        context.saturating_sub(first).min(SPLIT)
    });
    let n_visible = visible.iter().fold(0, |a, &b| a.max(b));
    if n_visible == 0 {
        return R;
    }
    let d = queries.head_dim;
    // SAFETY: the caller's promise; all offsets are of queries below the next multiple of TILE.
    unsafe {
        let q = queries.q.add(at * d);
        let state = State {
            max: queries.state.max.add(at),
            sum: queries.state.sum.add(at),
            acc: queries.state.acc.add(at * d),
        };
        score::<S, N, R>(pages, n_visible.div_ceil(BLOCK_LEN), q, d, queries.weights);
        let factors = soften::<S, N, R>(pages, n_visible, &visible, queries.weights, state);
        mix::<S, N, R>(pages, n_visible, queries.weights, d, &factors, state.acc);
    }
    R
}

/// Blocks, or runs of sixteen columns, that R queries have registers for at a time.
const fn width<S: Simd>(n_queries: usize) -> usize {
    S::ACCUMULATORS / n_queries
}

/// Products of the queries and the keys of all blocks.
#[inline(always)]
unsafe fn score<S: Simd, N: Number, const R: usize>(
    pages: &Pages,
    n_blocks: usize,
    q: *const f32,
    d: usize,
    weights: *mut f32,
) {
    let mut block = 0;
    // SAFETY: the caller's promise.
    unsafe {
        if const { width::<S>(R) >= 2 } {
            while block + 2 <= n_blocks {
                score_blocks::<S, N, R, 2>(pages, n_blocks, block, q, d, weights);
                block += 2;
            }
        }
        while block < n_blocks {
            score_blocks::<S, N, R, 1>(pages, n_blocks, block, q, d, weights);
            block += 1;
        }
    }
}

/// P blocks at a time, one or two: more of them are more streams than memory follows well.
#[inline(always)]
unsafe fn score_blocks<S: Simd, N: Number, const R: usize, const P: usize>(
    pages: &Pages,
    n_blocks: usize,
    block: usize,
    q: *const f32,
    d: usize,
    weights: *mut f32,
) {
    // Columns of a cache line.
    let step = const { 64 / (LANES * N::BYTES) };
    // SAFETY: blocks below `n_blocks` have pages of `d` columns; d is a multiple of 32.
    unsafe {
        let (mut keys, mut ahead) = ([std::ptr::null(); P], [std::ptr::null(); P]);
        for p in 0..P {
            keys[p] = pages.k[block + p].add(N::HEADER);
            let next = match block + p + N::AHEAD {
                next if next < n_blocks => pages.k[next],
                next => pages.v[(next - n_blocks).min(n_blocks - 1)],
            };
            if N::HEADER > 0 {
                // Scales are wanted once all scores are there.
                S::prefetch(pages.k[block + p]);
                S::prefetch(pages.v[block + p]);
            }
            ahead[p] = next.wrapping_add(N::HEADER);
        }
        let mut acc = [[S::splat(0.0); P]; R];
        let (mut column, page_lines) = (0, d / step);
        while column < d {
            // One page after the other, as memory likes it, though blocks are read side by side.
            let line = column / step * P;
            let fetched = if line < page_lines {
                ahead[0].wrapping_add(line * 64)
            } else {
                ahead[P - 1].wrapping_add((line - page_lines) * 64)
            };
            for p in 0..P {
                S::prefetch(fetched.wrapping_add(p * 64));
            }
            for column in column..column + step {
                let mut k = [S::splat(0.0); P];
                for p in 0..P {
                    k[p] = N::load::<S>(keys[p].add(column * LANES * N::BYTES));
                }
                for r in 0..R {
                    let q = S::splat(*q.add(r * d + column));
                    for p in 0..P {
                        acc[r][p] = S::fma(q, k[p], acc[r][p]);
                    }
                }
            }
            column += step;
        }
        for r in 0..R {
            for p in 0..P {
                S::store(weights.add(r * SPLIT + (block + p) * LANES), acc[r][p]);
            }
        }
    }
}

/// Turns scores into weights and moves maximum and sum on. What the sums so far and the split's
/// are to be multiplied with.
#[inline(always)]
unsafe fn soften<S: Simd, N: Number, const R: usize>(
    pages: &Pages,
    n_visible: usize,
    visible: &[usize; R],
    weights: *mut f32,
    state: State,
) -> [(f32, f32); R] {
    let n_blocks = n_visible.div_ceil(BLOCK_LEN);
    let mut factors = [(0.0, 0.0); R];
    // SAFETY: the caller's promise; a page with scales begins with one for each position.
    unsafe {
        let highest = mask_and_compare::<S, N, R>(pages, n_blocks, visible, weights);
        for r in 0..R {
            let weights = weights.add(r * SPLIT);
            // A query that sees nothing here has no maximum; its weights are 0.
            let base = S::splat(greater(highest[r], f32::MIN));
            let mut total = S::splat(0.0);
            for block in 0..n_blocks {
                // Memory is not to rest meanwhile: it fetches values after those that scores did.
                if N::AHEAD + r < n_blocks {
                    let lines = pages.v[N::AHEAD + r].wrapping_add(N::HEADER + block * 2 * 64);
                    S::prefetch(lines);
                    S::prefetch(lines.wrapping_add(64));
                }
                let at = weights.add(block * LANES);
                let mut weight = S::exp(S::sub(S::load(at), base));
                total = S::add(total, weight);
                if N::HEADER > 0 {
                    weight = S::mul(weight, S::load(pages.v[block].cast()));
                }
                S::store(at, weight);
            }
            let state = State { max: state.max.add(r), sum: state.sum.add(r), ..state };
            factors[r] = advance(state, highest[r], sum(&S::to_array(total)));
        }
    }
    factors
}

/// Completes the scores of all queries, hides what they do not see, and finds their maxima.
#[inline(always)]
unsafe fn mask_and_compare<S: Simd, N: Number, const R: usize>(
    pages: &Pages,
    n_blocks: usize,
    visible: &[usize; R],
    weights: *mut f32,
) -> [f32; R] {
    let mut maxima = [f32::NEG_INFINITY; R];
    // SAFETY: the caller's promise.
    unsafe {
        let mut highest = [S::splat(f32::NEG_INFINITY); R];
        for block in 0..n_blocks {
            for r in 0..R {
                let at = weights.add(r * SPLIT + block * LANES);
                let mut scores = S::load(at);
                if N::HEADER > 0 {
                    scores = S::mul(scores, S::load(pages.k[block].cast()));
                }
                let is_masked = visible[r] < (block + 1) * BLOCK_LEN;
                if is_masked {
                    scores = S::mask_from(scores, visible[r].saturating_sub(block * BLOCK_LEN));
                }
                if N::HEADER > 0 || is_masked {
                    S::store(at, scores);
                }
                highest[r] = S::max(scores, highest[r]);
            }
        }
        for r in 0..R {
            let mut lanes = S::to_array(highest[r]);
            let mut width = LANES / 2;
            while width > 0 {
                for lane in 0..width {
                    lanes[lane] = greater(lanes[lane], lanes[lane + width]);
                }
                width /= 2;
            }
            maxima[r] = lanes[0];
        }
    }
    maxima
}

#[inline(always)]
fn greater(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// Moves maximum and sum on by those of later positions; what old and new sums are to be multiplied
/// with.
#[inline(always)]
unsafe fn advance(state: State, max: f32, sum: f32) -> (f32, f32) {
    // SAFETY: the caller's promise.
    unsafe {
        let highest = greater(*state.max, max);
        let base = greater(highest, f32::MIN);
        let (keep, take) = (exp(*state.max - base), exp(max - base));
        *state.max = highest;
        *state.sum = sum.mul_add(take, *state.sum * keep);
        (keep, take)
    }
}

/// `acc = acc * keep + part * take`
#[inline(always)]
unsafe fn add_scaled<S: Simd>(acc: *mut f32, keep: f32, part: S::V, take: f32) {
    // SAFETY: the caller's promise.
    unsafe {
        let kept = S::mul(S::load(acc), S::splat(keep));
        S::store(acc, S::fma(part, S::splat(take), kept));
    }
}

/// Adds the values of all visible positions, weighted, to `acc`.
#[inline(always)]
unsafe fn mix<S: Simd, N: Number, const R: usize>(
    pages: &Pages,
    n_visible: usize,
    weights: *const f32,
    d: usize,
    factors: &[(f32, f32); R],
    acc: *mut f32,
) {
    for run in (0..d).step_by(RUN) {
        let columns = RUN.min(d - run);
        let mut column = 0;
        // SAFETY: the caller's promise.
        unsafe {
            if const { width::<S>(R) >= 4 } && columns == RUN {
                mix_columns::<S, N, R, 4>(pages, n_visible, weights, d, [run, 0], factors, acc);
                column = columns;
            }
            if const { width::<S>(R) >= 2 } {
                while column < columns {
                    let at = [run, column];
                    mix_columns::<S, N, R, 2>(pages, n_visible, weights, d, at, factors, acc);
                    column += 2 * LANES;
                }
            }
            while const { width::<S>(R) < 2 } && column < columns {
                let at = [run, column];
                mix_columns::<S, N, R, 1>(pages, n_visible, weights, d, at, factors, acc);
                column += LANES;
            }
        }
    }
}

/// C times sixteen columns, from `column` of a run.
#[inline(always)]
unsafe fn mix_columns<S: Simd, N: Number, const R: usize, const C: usize>(
    pages: &Pages,
    n_visible: usize,
    weights: *const f32,
    d: usize,
    [run, column]: [usize; 2],
    factors: &[(f32, f32); R],
    acc: *mut f32,
) {
    let row_bytes = RUN.min(d - run) * N::BYTES;
    let run_at = |run: usize| N::HEADER + run * BLOCK_LEN * N::BYTES;
    let n_blocks = n_visible.div_ceil(BLOCK_LEN);
    // SAFETY: visible positions have pages, whose runs have rows of `row_bytes`.
    unsafe {
        let mut sums = [[S::splat(0.0); C]; R];
        for block in 0..n_blocks {
            let values = pages.v[block].add(run_at(run) + column * N::BYTES);
            let ahead = match block + N::AHEAD {
                next if next < n_blocks => pages.v[next].wrapping_add(run_at(run)),
                next if run + RUN < d => {
                    pages.v[(next - n_blocks).min(n_blocks - 1)].wrapping_add(run_at(run + RUN))
                }
                next => pages.next[(next - n_blocks).min(N::AHEAD - 1)].wrapping_add(N::HEADER),
            };
            let ahead = ahead.wrapping_add(column * N::BYTES);
            let weights = weights.add(block * BLOCK_LEN);
            for at in 0..BLOCK_LEN.min(n_visible - block * BLOCK_LEN) {
                for line in 0..const { (C * LANES * N::BYTES).div_ceil(64) } {
                    S::prefetch(ahead.wrapping_add(at * row_bytes + line * 64));
                }
                let mut v = [S::splat(0.0); C];
                for c in 0..C {
                    v[c] = N::load::<S>(values.add(at * row_bytes + c * LANES * N::BYTES));
                }
                for r in 0..R {
                    let weight = S::splat(*weights.add(r * SPLIT + at));
                    for c in 0..C {
                        sums[r][c] = S::fma(weight, v[c], sums[r][c]);
                    }
                }
            }
        }
        for r in 0..R {
            for c in 0..C {
                let acc = acc.add(r * d + run + column + c * LANES);
                add_scaled::<S>(acc, factors[r].0, sums[r][c], factors[r].1);
            }
        }
    }
}
