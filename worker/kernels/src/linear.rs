//! `out = x * w^T` over packed tiles: whole rows, or leaf by leaf for a split sum.
//!
//! One kernel family for any number of rows of activations. The order of float operations of an
//! output element: runs of 32 columns in order within a scale (of formats whose runs are summed as
//! integers: super-blocks), scales in order within a leaf, leaves by the given merges. It does not
//! depend on how many rows, tiles or threads there are.

use std::mem::MaybeUninit;
use std::ops::Range;

use crate::activation::{Activation, BLOCK, GROUP, Precision};
use crate::dense;
use crate::isa::Isa;
use crate::matrix::{Matrix, TILE_ROWS, Weights};
use crate::pieces::Pieces;
use crate::pool::{Pool, Shards};
use crate::quant::blocks::Blocks;
use crate::quant::{portable, with_blocks};

#[cfg(target_arch = "x86_64")]
use crate::quant::{amx, avx512};

/// Most rows of activations that one pass of vectors over a tile serves.
const MAX_ROWS: usize = 8;

/// Deepest stack of leaf sums: trees of up to 2^15 leaves, nested once.
pub(crate) const MAX_DEPTH: usize = 32;

/// Most weights of a fused group.
const MAX_PROJECTIONS: usize = 8;

/// Bytes of activations that stay in a core's own cache while tiles pass by.
const CHUNK_BYTES: usize = 512 << 10;

/// Groups of a chunk at least, however wide they are: fewer, and unpacking weights for them takes as
/// long as multiplying.
const MIN_GROUPS: usize = 4;

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

/// One tile of one matrix.
#[derive(Clone, Copy)]
pub(crate) struct TileWeights<'a> {
    /// Run after run, as `quant::tiles` has them; the next tile follows.
    pub(crate) bytes: &'a [u8],
    /// Run of the first super-block at which the tile's rows begin.
    pub(crate) first_run: usize,
}

/// A group of rows of activations as integers; shapes as in [`Activation`].
#[derive(Clone, Copy)]
pub(crate) struct Group<'a> {
    /// Rows side by side.
    pub(crate) side: usize,
    pub(crate) q: &'a [i8],
    pub(crate) sum: &'a [f32],
    pub(crate) offset: &'a [i32],
    pub(crate) half_offsets: &'a [[i32; 2]],
    pub(crate) d: &'a [f32],
    /// Row of the step at which the group begins.
    pub(crate) first: usize,
    /// Whether its rows are the first to read a tile, and fetch what is read after it.
    pub(crate) fetches: bool,
}

impl Group<'_> {
    /// Where a row's run begins in `q`.
    #[inline(always)]
    pub(crate) fn place(&self, terms: usize, run: usize, row: usize) -> usize {
        (run * self.side + row) * BLOCK * terms
    }
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
        scratch.quantise(pool, isa, x, rows, columns, sum.leaf_columns);
    }
    let precision = scratch.precision;
    let mut formats = projections.iter().map(|p| p.weight.format);
    let has_spans = formats.clone().all(|format| dense::has_spans(isa, format, precision));
    if formats.any(|format| dense::needs_terms(isa, format, precision)) {
        scratch.terms.fill(pool, isa, precision, x, columns);
    }
    let mut jobs = [const { None }; MAX_PROJECTIONS];
    let mut n_tiles = [0; MAX_PROJECTIONS];
    let mut bytes = 0;
    assert!(projections.len() <= MAX_PROJECTIONS, "a fused group of {}", projections.len());
    let n_matrices = projections.len();
    for (i, projection) in projections.iter_mut().enumerate() {
        let weight = projection.weight;
        assert_eq!(weight.columns, columns, "weight's width");
        assert_eq!(projection.out.len(), sum.part_leaves.len() * rows * weight.rows, "output");
        jobs[i] = Some(Job { weight, out: Shards::new(projection.out) });
        n_tiles[i] = weight.n_tiles();
        bytes += weight.bytes() as usize;
    }
    let step = Step { isa, x, rows, scratch, sum };
    let n_tiles = &n_tiles[..n_matrices];
    let (chunk_rows, least_tiles) = step.piece(columns, has_spans);
    let n_threads = pool.n_threads();
    let pieces = Pieces::new(n_tiles, bytes, least_tiles, rows, chunk_rows, n_threads);
    pool.run(&|thread| {
        while let Some(piece) = pieces.take(thread) {
            for (i, job) in jobs.iter().flatten().enumerate() {
                job.tiles(&step, pieces.tiles(&piece, i), piece.rows.clone());
            }
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

struct Job<'a> {
    weight: &'a Matrix,
    out: Shards<'a, f32>,
}

/// What all tiles of a step have in common.
struct Step<'a> {
    isa: Isa,
    x: &'a [f32],
    rows: usize,
    scratch: &'a Activation,
    sum: &'a Sum<'a>,
}

impl<'a> Step<'a> {
    /// Rows of a piece, in whole groups, and the tiles that it has at least.
    fn piece(&self, columns: usize, has_spans: bool) -> (usize, usize) {
        let (columns, least_tiles) = match has_spans {
            true => (columns.min(dense::SPAN_COLUMNS), dense::least_tiles(self.rows)),
            false => (columns, 1),
        };
        let rows = CHUNK_BYTES / (columns * self.scratch.precision.terms());
        ((rows / GROUP).max(MIN_GROUPS) * GROUP, least_tiles)
    }

    fn group(&self, group: usize) -> Group<'a> {
        let (scratch, shape) = (self.scratch, self.scratch.shape);
        let runs = shape.n_runs * shape.side;
        Group {
            side: shape.side,
            q: slice(scratch.q(), group, shape.group_len(scratch.precision.terms())),
            sum: slice(&scratch.sum, group, runs),
            offset: slice(&scratch.offset, group, runs),
            half_offsets: slice(&scratch.half_offsets, group, runs),
            d: slice(&scratch.d, group, shape.n_scales * shape.side),
            first: group * GROUP,
            fetches: false,
        }
    }
}

/// Makes the working memory of a pool's threads. Any other would make its own in the first step that
/// has a part for it.
pub fn prepare(pool: &mut Pool) {
    pool.run(&|_| {
        #[cfg(target_arch = "x86_64")]
        {
            amx::prepare_thread();
            dense::amx::prepare_thread();
        }
    });
}

impl Job<'_> {
    fn tiles(&self, step: &Step<'_>, tiles: Range<usize>, rows: Range<usize>) {
        if let Weights::Dense(w) = &self.weight.weights {
            let task = dense::Task {
                x: step.x,
                terms: &step.scratch.terms,
                rows: step.rows,
                columns: self.weight.columns,
                sum: step.sum,
                out: self.out,
                out_columns: self.weight.rows,
            };
            return dense::run(step.isa, step.scratch.precision, w, tiles, rows, &task);
        }
        #[cfg(target_arch = "x86_64")]
        if step.isa == Isa::Avx512Amx
            && step.scratch.precision == Precision::Int12
            && rows.len() >= amx::MIN_ROWS
        {
            return self.tiles_by_registers(step, tiles, rows);
        }
        for tile in tiles {
            self.tile(step, tile, rows.clone());
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn tiles_by_registers(&self, step: &Step<'_>, tiles: Range<usize>, rows: Range<usize>) {
        let Weights::Quantised(weights) = &self.weight.weights else {
            unreachable!("`tiles` took the others")
        };
        let group = |group| step.group(group);
        with_blocks!(self.weight.format, B => {
            let tile = |tile| weights.tile(tile);
            let store = |tile, p, row, values: &_| self.store(step, tile, p, row, values);
            // SAFETY: this instruction set was detected on this CPU.
            unsafe { amx::run_tiles::<B>(&tile, tiles, rows, &group, step.sum, &store) };
        }, _ => unreachable!("quantised formats have blocks"));
    }

    fn store(
        &self,
        step: &Step<'_>,
        tile: usize,
        part: usize,
        row: usize,
        values: &[f32; TILE_ROWS],
    ) {
        let first_column = tile * TILE_ROWS;
        let n = (self.weight.rows - first_column).min(TILE_ROWS);
        let at = (part * step.rows + row) * self.weight.rows + first_column;
        // SAFETY: a tile's columns of some rows of the output belong to the one thread that runs
        // this piece.
        let out = unsafe { self.out.range(at..at + n) };
        put(out, values);
    }

    fn tile(&self, step: &Step<'_>, tile: usize, rows: Range<usize>) {
        let store = |p: usize, row: usize, values: &[f32; TILE_ROWS]| {
            self.store(step, tile, p, row, values);
        };
        match &self.weight.weights {
            Weights::Quantised(tiles) => with_blocks!(self.weight.format, B => {
                let w = tiles.tile(tile);
                match step.scratch.precision {
                    Precision::Int8 => self.integers::<B, 1>(step, &w, rows, store),
                    Precision::Int12 => self.integers::<B, 2>(step, &w, rows, store),
                }
            }, _ => unreachable!("quantised formats have blocks")),
            Weights::Dense(_) => unreachable!("`tiles` took them"),
        }
    }

    fn integers<B: Blocks, const TERMS: usize>(
        &self,
        step: &Step<'_>,
        w: &TileWeights<'_>,
        rows: Range<usize>,
        store: impl Fn(usize, usize, &[f32; TILE_ROWS]),
    ) {
        self.by_rows(step, rows, |x, row, n| match n {
            8 => run_tile::<B, 8, TERMS>(step.isa, w, x, row, step.sum, &store),
            4 => run_tile::<B, 4, TERMS>(step.isa, w, x, row, step.sum, &store),
            2 => run_tile::<B, 2, TERMS>(step.isa, w, x, row, step.sum, &store),
            _ => run_tile::<B, 1, TERMS>(step.isa, w, x, row, step.sum, &store),
        });
    }

    /// Calls `run` with 8, 4, 2 or 1 rows of a group at a time.
    fn by_rows(&self, step: &Step<'_>, rows: Range<usize>, run: impl Fn(&Group<'_>, usize, usize)) {
        let mut row = rows.start;
        while row < rows.end {
            let mut group = step.group(row / GROUP);
            let end = rows.end.min(group.first + GROUP);
            while row < end {
                let n = match end - row {
                    MAX_ROWS.. => MAX_ROWS,
                    4.. => 4,
                    2.. => 2,
                    _ => 1,
                };
                group.fetches = row == rows.start;
                run(&group, row - group.first, n);
                row += n;
            }
        }
    }
}

/// Copies a tile's values, or the first of them.
#[inline(always)]
pub(crate) fn put(out: &mut [f32], values: &[f32; TILE_ROWS]) {
    /// Apart, so that whole tiles need no call: the compiler would make both copies one.
    #[cold]
    #[inline(never)]
    fn put_some(out: &mut [f32], values: &[f32; TILE_ROWS]) {
        out.copy_from_slice(&values[..out.len()]);
    }
    match out.as_mut_array() {
        Some(out) => *out = *values,
        None => put_some(out, values),
    }
}

/// A group's run, or nothing where this form of the activations was not made.
fn slice<T>(all: &[T], group: usize, len: usize) -> &[T] {
    all.get(group * len..(group + 1) * len).unwrap_or(&[])
}

/// The k-th integer of a run of activations, of one or two terms, which begins with `q`.
#[inline(always)]
pub(crate) fn integer(terms: usize, q: &[i8], k: usize) -> i32 {
    if terms == 1 { i32::from(q[k]) } else { 16 * i32::from(q[k]) + i32::from(q[BLOCK + k]) }
}

/// The loop over parts, leaves and scales, for any kernel and accumulator. `$scale` adds the runs
/// of a scale to a leaf's sums.
macro_rules! sum_leaves {
    (
        $M:ident, $sum:expr, $scale_runs:expr, $zero:expr, $add:expr, $lanes:expr, $scale:expr,
        $store:expr
    ) => {{
        // Not cleared: a tile is done in about a microsecond, and clearing this would show.
        let mut stack = [const { MaybeUninit::uninit() }; MAX_DEPTH];
        let n_runs = $sum.leaf_columns / BLOCK;
        let (mut leaf, mut b, mut scale) = (0, 0, 0);
        for (p, &n_leaves) in $sum.part_leaves.iter().enumerate() {
            let mut top = 0;
            for _ in 0..n_leaves {
                let mut total = [$zero; $M];
                let leaf_end = b + n_runs;
                while b < leaf_end {
                    let end = leaf_end.min(b + $scale_runs);
                    $scale(scale, b..end, &mut total);
                    (b, scale) = (end, scale + 1);
                }
                for _ in 0..$sum.merges[leaf] {
                    top -= 1;
                    let left: [_; $M] =
                        // SAFETY: `check_sum` saw that merges find sums that were written.
                        unsafe { stack[top].assume_init() };
                    for m in 0..$M {
                        total[m] = $add(left[m], total[m]);
                    }
                }
                stack[top].write(total);
                top += 1;
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
    x: &Group<'_>,
    first: usize,
    sum: &Sum<'_>,
    store: impl Fn(usize, usize, &[f32; TILE_ROWS]),
) {
    let same = |lanes: [f32; TILE_ROWS]| lanes;
    let scale = |scale: usize, runs, total: &mut [[f32; TILE_ROWS]; M]| {
        let acc = portable::runs::<B, M, TERMS>(w, runs, x, first);
        for row in 0..M {
            let d = x.d[scale * x.side + first + row];
            for lane in 0..TILE_ROWS {
                total[row][lane] = acc[row][lane].mul_add(d, total[row][lane]);
            }
        }
    };
    let store = |p, m, lanes: &_| store(p, x.first + first + m, lanes);
    let scale_runs = scale_runs::<TERMS>();
    sum_leaves!(M, sum, scale_runs, [0f32; TILE_ROWS], add_lanes, same, scale, store);
}

/// Runs that may share a scale.
pub(crate) const fn scale_runs<const TERMS: usize>() -> usize {
    if TERMS == 1 { Precision::Int8.scale_runs() } else { Precision::Int12.scale_runs() }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn run_tile_avx2<B: Blocks, const M: usize, const TERMS: usize>(
    w: &TileWeights<'_>,
    x: &Group<'_>,
    first: usize,
    sum: &Sum<'_>,
    store: impl Fn(usize, usize, &[f32; TILE_ROWS]),
) {
    run_tile_portable::<B, M, TERMS>(w, x, first, sum, store);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn run_tile_avx512<B: Blocks, const M: usize, const TERMS: usize>(
    w: &TileWeights<'_>,
    x: &Group<'_>,
    first: usize,
    sum: &Sum<'_>,
    store: impl Fn(usize, usize, &[f32; TILE_ROWS]),
) {
    use std::arch::x86_64::{
        __m512, _mm512_add_ps, _mm512_fmadd_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
    };
    let lanes = |v: __m512| {
        let mut out = [0f32; TILE_ROWS];
        // SAFETY: 16 floats.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), v) };
        out
    };
    let scale = |scale: usize, runs, total: &mut [__m512; M]| {
        let acc = avx512::runs::<B, M, TERMS>(w, runs, x, first);
        let d: &[f32; M] = x.d[scale * x.side + first..].first_chunk().expect("a scale a row");
        for row in 0..M {
            total[row] = _mm512_fmadd_ps(acc[row], _mm512_set1_ps(d[row]), total[row]);
        }
    };
    let store = |p, m, lanes: &_| store(p, x.first + first + m, lanes);
    let zero = _mm512_setzero_ps();
    let scale_runs = scale_runs::<TERMS>();
    sum_leaves!(M, sum, scale_runs, zero, _mm512_add_ps, lanes, scale, store);
}

#[inline]
fn run_tile<B: Blocks, const M: usize, const TERMS: usize>(
    isa: Isa,
    w: &TileWeights<'_>,
    x: &Group<'_>,
    first: usize,
    sum: &Sum<'_>,
    store: impl Fn(usize, usize, &[f32; TILE_ROWS]),
) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: an `Isa` other than Portable was detected on this CPU.
        Isa::Avx512Amx | Isa::Avx512Vnni => unsafe {
            run_tile_avx512::<B, M, TERMS>(w, x, first, sum, store);
        },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { run_tile_avx2::<B, M, TERMS>(w, x, first, sum, store) },
        _ => run_tile_portable::<B, M, TERMS>(w, x, first, sum, store),
    }
}
