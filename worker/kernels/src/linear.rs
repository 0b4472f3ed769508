//! `out = x * w^T` over packed tiles: whole rows, or leaf by leaf for a split sum.
//!
//! One kernel family for 1 to 8 rows of activations at a time. The order of float operations of an
//! output element: blocks of 32 columns in order within a leaf, leaves by the given merges. It does
//! not depend on how many rows, tiles or threads there are.

use std::mem::MaybeUninit;

use crate::activation::{Activation, BLOCK, Precision, quantise_row};
use crate::isa::{Isa, dispatch};
use crate::matrix::{Matrix, TILE_ROWS, Weights};
use crate::pool::{Pool, Shards, part};
use crate::quant::blocks::Blocks;
use crate::quant::{f32_tile, portable, with_blocks};

/// Most rows of activations that one pass over a tile serves.
const MAX_ROWS: usize = 8;

/// Deepest stack of leaf sums: trees of up to 2^15 leaves, nested once.
const MAX_DEPTH: usize = 32;

/// How the columns of a matrix are summed.
#[derive(Debug, Clone, Copy)]
pub struct Sum<'a> {
    /// Columns of a leaf, a multiple of 32.
    pub leaf_columns: usize,
    /// Leaves of each part; the output has one plane per part.
    pub part_leaves: &'a [usize],
    /// For each leaf: how often the two topmost sums are added once it is on the stack.
    pub merges: &'a [u8],
}

/// One weight of a fused group and where its products go: `[parts, rows of x, rows of w]`.
pub struct Projection<'a> {
    pub weight: &'a Matrix,
    pub out: &'a mut [f32],
}

/// The input of a linear op: `[rows, columns]` f32, and room for its int8 form.
pub struct Input<'a> {
    pub x: &'a [f32],
    pub rows: usize,
    pub columns: usize,
    pub scratch: &'a mut Activation,
}

/// One tile of one matrix; what its format does not have is empty.
#[derive(Clone, Copy)]
pub(crate) struct TileWeights<'a> {
    pub(crate) quants: &'a [u8],
    pub(crate) fifths: &'a [u8],
    pub(crate) d: &'a [u16],
    pub(crate) m: &'a [u16],
    pub(crate) sc: &'a [u8],
    pub(crate) mc: &'a [u8],
    /// Run of the first super-block at which the tile's rows begin.
    pub(crate) first_run: usize,
}

/// M rows of activations, in both forms.
pub(crate) struct Rows<'a, const M: usize> {
    pub(crate) q: [&'a [i8]; M],
    pub(crate) d: [&'a [f32]; M],
    pub(crate) s: [&'a [f32]; M],
    pub(crate) isum: [&'a [i32]; M],
    pub(crate) f32: [&'a [f32]; M],
}

/// Multiplies one input with several weights of the same width.
///
/// # Panics
/// If shapes disagree.
pub fn linear(pool: &mut Pool, isa: Isa, input: Input<'_>, projections: &mut [Projection<'_>]) {
    let columns = input.columns;
    let whole = Sum { leaf_columns: columns, part_leaves: &[1], merges: &[0] };
    run(pool, isa, input, projections, &whole);
}

/// Multiplies one input with one weight; the columns are summed by leaves into parts.
///
/// # Panics
/// If shapes disagree, or the leaves do not cover the columns.
pub fn linear_parts(
    pool: &mut Pool,
    isa: Isa,
    input: Input<'_>,
    projection: Projection<'_>,
    sum: &Sum<'_>,
) {
    run(pool, isa, input, &mut [projection], sum);
}

fn run(
    pool: &mut Pool,
    isa: Isa,
    input: Input<'_>,
    projections: &mut [Projection<'_>],
    sum: &Sum<'_>,
) {
    let Input { x, rows, columns, scratch } = input;
    assert_eq!(x.len(), rows * columns, "input of {rows} x {columns}");
    check_sum(sum, columns);
    if rows == 0 || columns == 0 {
        return;
    }
    if projections.iter().any(|p| p.weight.is_quantised()) {
        quantise(pool, isa, x, rows, columns, scratch);
    }
    let mut jobs: Vec<Job<'_>> = Vec::with_capacity(projections.len());
    for projection in projections {
        let weight = projection.weight;
        assert_eq!(weight.columns, columns, "weight's width");
        assert_eq!(projection.out.len(), sum.part_leaves.len() * rows * weight.rows, "output");
        jobs.push(Job { weight, out: Shards::new(projection.out) });
    }
    let n_tiles: usize = jobs.iter().map(|job| job.weight.n_tiles()).sum();
    let n_threads = pool.n_threads();
    let scratch = &*scratch;
    pool.run(&|thread| {
        let mine = part(n_tiles, thread, n_threads);
        let mut first = 0;
        for job in &jobs {
            let end = first + job.weight.n_tiles();
            for tile in mine.start.max(first)..mine.end.min(end) {
                job.tile(isa, tile - first, x, rows, scratch, sum);
            }
            first = end;
        }
    });
}

fn check_sum(sum: &Sum<'_>, columns: usize) {
    let n_leaves: usize = sum.part_leaves.iter().sum();
    assert_eq!(n_leaves * sum.leaf_columns, columns, "leaves do not cover the columns");
    assert_eq!(n_leaves, sum.merges.len(), "one merge count a leaf");
    assert!(sum.leaf_columns.is_multiple_of(BLOCK), "leaves are whole blocks");
    let mut leaf = 0;
    for &n in sum.part_leaves {
        let mut depth = 0usize;
        for &merges in &sum.merges[leaf..leaf + n] {
            depth += 1;
            assert!(depth <= MAX_DEPTH && usize::from(merges) < depth, "merges of no tree");
            depth -= usize::from(merges);
        }
        assert!(depth == 1 || n == 0, "a part's leaves do not merge into one sum");
        leaf += n;
    }
}

fn quantise(
    pool: &mut Pool,
    isa: Isa,
    x: &[f32],
    rows: usize,
    columns: usize,
    scratch: &mut Activation,
) {
    let n_threads = pool.n_threads();
    if rows < 2 * n_threads {
        scratch.quantise(isa, x, rows, columns);
        return;
    }
    scratch.reshape(rows, columns);
    let mut targets: Vec<_> = scratch.rows_mut().map(Some).collect();
    let targets = Shards::new(&mut targets);
    pool.run(&|thread| {
        let mine = part(rows, thread, n_threads);
        // SAFETY: `part` gives each thread its own rows.
        let targets = unsafe { targets.range(mine.clone()) };
        for (target, row) in targets.iter_mut().zip(mine) {
            let target = target.take().expect("each row is taken once");
            quantise_row(isa, &x[row * columns..(row + 1) * columns], target);
        }
    });
}

struct Job<'a> {
    weight: &'a Matrix,
    out: Shards<'a, f32>,
}

impl Job<'_> {
    fn tile(
        &self,
        isa: Isa,
        tile: usize,
        x: &[f32],
        rows: usize,
        scratch: &Activation,
        sum: &Sum<'_>,
    ) {
        let mut row = 0;
        while row < rows {
            let step = match rows - row {
                MAX_ROWS.. => {
                    self.rows::<MAX_ROWS>(isa, tile, x, row, rows, scratch, sum);
                    MAX_ROWS
                }
                4.. => {
                    self.rows::<4>(isa, tile, x, row, rows, scratch, sum);
                    4
                }
                2.. => {
                    self.rows::<2>(isa, tile, x, row, rows, scratch, sum);
                    2
                }
                _ => {
                    self.rows::<1>(isa, tile, x, row, rows, scratch, sum);
                    1
                }
            };
            row += step;
        }
    }

    fn rows<const M: usize>(
        &self,
        isa: Isa,
        tile: usize,
        x: &[f32],
        first: usize,
        rows: usize,
        scratch: &Activation,
        sum: &Sum<'_>,
    ) {
        let columns = self.weight.columns;
        let (n_blocks, terms) = (columns / BLOCK, scratch.precision.terms());
        let x = Rows::<M> {
            q: std::array::from_fn(|m| slice(&scratch.q, first + m, columns * terms)),
            d: std::array::from_fn(|m| slice(&scratch.d, first + m, n_blocks)),
            s: std::array::from_fn(|m| slice(&scratch.s, first + m, n_blocks)),
            isum: std::array::from_fn(|m| slice(&scratch.isum, first + m, n_blocks)),
            f32: std::array::from_fn(|m| slice(x, first + m, columns)),
        };
        let first_column = tile * TILE_ROWS;
        let n = (self.weight.rows - first_column).min(TILE_ROWS);
        let store = |p: usize, m: usize, values: &[f32; TILE_ROWS]| {
            let at = (p * rows + first + m) * self.weight.rows + first_column;
            // SAFETY: a tile's columns of the output belong to the one thread that runs this tile.
            unsafe { self.out.range(at..at + n) }.copy_from_slice(&values[..n]);
        };
        match &self.weight.weights {
            Weights::Quantised(tiles) => with_blocks!(self.weight.format, B => {
                let w = tiles.tile::<B>(tile);
                match scratch.precision {
                    Precision::Int8 => run_tile::<B, M, 1>(isa, &w, &x, sum, store),
                    Precision::Int16 => run_tile::<B, M, 2>(isa, &w, &x, sum, store),
                }
            }, _ => unreachable!("quantised formats have blocks")),
            Weights::F32(weights) => {
                let each = columns * TILE_ROWS;
                run_f32_tile(isa, &weights[tile * each..(tile + 1) * each], &x, sum, &store);
            }
        }
    }
}

/// A row's run, or nothing where this form of the activations was not made.
fn slice<T>(all: &[T], row: usize, len: usize) -> &[T] {
    all.get(row * len..(row + 1) * len).unwrap_or(&[])
}

/// The k-th integer of a block of activations, of one or two terms.
#[inline(always)]
pub(crate) fn integer<const TERMS: usize>(q: &[i8], k: usize) -> i32 {
    if TERMS == 1 { i32::from(q[k]) } else { 256 * i32::from(q[k]) + i32::from(q[BLOCK + k]) }
}

/// The loop over parts, leaves and blocks, for any block kernel and accumulator.
macro_rules! sum_leaves {
    ($M:ident, $sum:expr, $zero:expr, $add:expr, $lanes:expr, $block:expr, $store:expr) => {{
        // Not cleared: a tile is done in about a microsecond, and clearing this would show.
        let mut stack = [const { MaybeUninit::uninit() }; MAX_DEPTH];
        let n_blocks = $sum.leaf_columns / BLOCK;
        let (mut leaf, mut b) = (0, 0);
        for (p, &n_leaves) in $sum.part_leaves.iter().enumerate() {
            let mut top = 0;
            for _ in 0..n_leaves {
                let mut acc = [$zero; $M];
                for _ in 0..n_blocks {
                    $block(b, &mut acc);
                    b += 1;
                }
                stack[top].write(acc);
                top += 1;
                for _ in 0..$sum.merges[leaf] {
                    top -= 1;
                    let (left, right) =
                        // SAFETY: `check_sum` saw that merges leave at least one sum: both were
                        // written.
                        unsafe { (stack[top - 1].assume_init(), stack[top].assume_init()) };
                    for m in 0..$M {
                        acc[m] = $add(left[m], right[m]);
                    }
                    stack[top - 1].write(acc);
                }
                leaf += 1;
            }
            if n_leaves > 0 {
                let total =
                    // SAFETY: the first leaf wrote it.
                    unsafe { stack[0].assume_init() };
                for m in 0..$M {
                    $store(p, m, &$lanes(total[m]));
                }
            }
        }
    }};
}

#[inline(always)]
fn add_lanes(a: [f32; TILE_ROWS], b: [f32; TILE_ROWS]) -> [f32; TILE_ROWS] {
    std::array::from_fn(|lane| a[lane] + b[lane])
}

#[inline(always)]
fn run_tile_portable<B: Blocks, const M: usize, const TERMS: usize>(
    w: &TileWeights<'_>,
    x: &Rows<'_, M>,
    sum: &Sum<'_>,
    store: impl Fn(usize, usize, &[f32; TILE_ROWS]),
) {
    let same = |lanes: [f32; TILE_ROWS]| lanes;
    let dot = |b, acc: &mut _| portable::run::<B, M, TERMS>(w, b, x, acc);
    sum_leaves!(M, sum, [0f32; TILE_ROWS], add_lanes, same, dot, store);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn run_tile_avx2<B: Blocks, const M: usize, const TERMS: usize>(
    w: &TileWeights<'_>,
    x: &Rows<'_, M>,
    sum: &Sum<'_>,
    store: impl Fn(usize, usize, &[f32; TILE_ROWS]),
) {
    run_tile_portable::<B, M, TERMS>(w, x, sum, store);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn run_tile_avx512<B: Blocks, const M: usize, const TERMS: usize>(
    w: &TileWeights<'_>,
    x: &Rows<'_, M>,
    sum: &Sum<'_>,
    store: impl Fn(usize, usize, &[f32; TILE_ROWS]),
) {
    use std::arch::x86_64::{__m512, _mm512_add_ps, _mm512_setzero_ps, _mm512_storeu_ps};
    let lanes = |v: __m512| {
        let mut out = [0f32; TILE_ROWS];
        // SAFETY: 16 floats.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), v) };
        out
    };
    let dot = |b, acc: &mut _| crate::quant::avx512::run::<B, M, TERMS>(w, b, x, acc);
    sum_leaves!(M, sum, _mm512_setzero_ps(), _mm512_add_ps, lanes, dot, store);
}

#[inline]
fn run_tile<B: Blocks, const M: usize, const TERMS: usize>(
    isa: Isa,
    w: &TileWeights<'_>,
    x: &Rows<'_, M>,
    sum: &Sum<'_>,
    store: impl Fn(usize, usize, &[f32; TILE_ROWS]),
) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: an `Isa` other than Portable was detected on this CPU.
        Isa::Avx512Vnni => unsafe { run_tile_avx512::<B, M, TERMS>(w, x, sum, store) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { run_tile_avx2::<B, M, TERMS>(w, x, sum, store) },
        _ => run_tile_portable::<B, M, TERMS>(w, x, sum, store),
    }
}

type Store<'a> = &'a dyn Fn(usize, usize, &[f32; TILE_ROWS]);

fn run_f32_tile<const M: usize>(
    isa: Isa,
    w: &[f32],
    x: &Rows<'_, M>,
    sum: &Sum<'_>,
    store: Store<'_>,
) {
    dispatch!(isa, fn<M>(w: &[f32], x: &Rows<'_, M>, sum: &Sum<'_>, store: Store<'_>) => {
        let same = |lanes: [f32; TILE_ROWS]| lanes;
        let dot = |b, acc: &mut _| f32_tile::block(w, b, x, acc);
        sum_leaves!(M, sum, [0f32; TILE_ROWS], add_lanes, same, dot, store);
    });
}
