//! Activations as integers: runs of 32 columns, each with its sum, and a scale for one or several
//! runs. A row's integers depend on that row and on the op's leaves alone.
//!
//! 8 bits are the scheme of ggml's Q8_1: a scale for each run, `q = round(x / d)`. 12 bits are two
//! int8 terms, `q = 16 * high + low`, with a scale for up to eight runs of a leaf.

#[cfg(target_arch = "x86_64")]
mod avx512;

use crate::dense::Terms;
use crate::isa::{Isa, dispatch};
use crate::memory::Memory;
use crate::pool::{Pool, Shards, part};

/// Columns of a run.
pub const BLOCK: usize = 32;

/// Rows that stand side by side in memory.
pub(crate) const GROUP: usize = 16;

/// Of so few rows all stand side by side, without room for others: each thread reads them, tile by
/// tile, from its nearest cache.
const FEW: usize = 4;

/// The least zero that weights count from; others are it times a power of two.
pub(crate) const EIGHT: i32 = 8;

/// 1.5 * 2^23: adding it rounds, ties to even, and makes the mantissa the integer.
const MAGIC: f32 = 12_582_912.0;
const MAGIC_BITS: i32 = 0x4b40_0000;

/// Numbers below which quantising is left to one thread.
const SMALL: usize = 4 * 1024;

/// Bits of a quantised activation. 8 round as most CPU engines do and move a small model's choice
/// at some 4 % of positions; 12 are as good as f32 to within a few in a thousand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    Int8,
    Int12,
}

impl Precision {
    /// int8 terms of one activation.
    pub(crate) const fn terms(self) -> usize {
        match self {
            Self::Int8 => 1,
            Self::Int12 => 2,
        }
    }

    /// Runs that may share a scale.
    pub(crate) const fn scale_runs(self) -> usize {
        match self {
            Self::Int8 => 1,
            Self::Int12 => 8,
        }
    }

    /// Largest integer: the low term of 12 bits reaches from -8 to 7.
    fn limit(self) -> f32 {
        match self {
            Self::Int8 => 127.0,
            Self::Int12 => 127.0 * 16.0,
        }
    }
}

/// Quantised rows in groups of 16; memory for the largest step is allocated once.
#[derive(Debug)]
pub struct Activation {
    pub(crate) precision: Precision,
    /// `[group, run, side rows, terms, 32]`, the high term first; see [`Shape::place`].
    q: Memory,
    /// Sums of a run's integers. `[group, run, side rows]`
    pub(crate) sum: Vec<f32>,
    /// The sums of runs' integers, `-EIGHT` times: what dot products with weights that count from 8
    /// begin with. `[group, run, side rows]`
    pub(crate) offset: Vec<i32>,
    /// The same of each half of a run. `[group, run, side rows, 2]`
    pub(crate) half_offsets: Vec<[i32; 2]>,
    /// Scales. `[group, scale, side rows]`
    pub(crate) d: Vec<f32>,
    /// The rows in bf16, for weights that want them so.
    pub(crate) terms: Terms,
    pub(crate) shape: Shape,
}

/// How many runs and scales a row has.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Shape {
    pub(crate) rows: usize,
    /// Rows that stand side by side: [`GROUP`], or all of few.
    pub(crate) side: usize,
    pub(crate) n_runs: usize,
    pub(crate) leaf_runs: usize,
    pub(crate) n_scales: usize,
    scale_runs: usize,
}

impl Shape {
    fn new(rows: usize, columns: usize, leaf_columns: usize, precision: Precision) -> Self {
        assert!(leaf_columns.is_multiple_of(BLOCK), "leaves of {leaf_columns} are not whole runs");
        assert!(columns.is_multiple_of(leaf_columns.max(1)), "{columns} columns of whole leaves");
        let (n_runs, leaf_runs) = (columns / BLOCK, leaf_columns / BLOCK);
        let scale_runs = precision.scale_runs();
        let n_scales = leaf_runs.div_ceil(scale_runs) * (columns / leaf_columns.max(1));
        let side = if rows <= FEW { rows } else { GROUP };
        Self { rows, side, n_runs, leaf_runs, n_scales, scale_runs }
    }

    /// Integers of a group of rows.
    pub(crate) fn group_len(&self, terms: usize) -> usize {
        self.n_runs * self.side * BLOCK * terms
    }

    /// Where a row's run begins among its group's integers.
    pub(crate) fn place(&self, terms: usize, run: usize, lane: usize) -> usize {
        (run * self.side + lane) * BLOCK * terms
    }

    /// The runs of a scale.
    fn runs_of(&self, scale: usize) -> std::ops::Range<usize> {
        let per_leaf = self.leaf_runs.div_ceil(self.scale_runs);
        let (leaf, i) = (scale / per_leaf, scale % per_leaf);
        let first = leaf * self.leaf_runs + i * self.scale_runs;
        first..(first + self.scale_runs).min((leaf + 1) * self.leaf_runs)
    }
}

impl Activation {
    /// Memory for steps of up to `rows` rows of up to `columns` columns.
    #[must_use]
    pub fn with_capacity(rows: usize, columns: usize, precision: Precision) -> Self {
        let runs = rows.next_multiple_of(GROUP) * columns.div_ceil(BLOCK);
        Self {
            precision,
            q: Memory::zeroed(runs * BLOCK * precision.terms()).expect("memory for activations"),
            sum: vec![0.0; runs],
            offset: vec![0; runs],
            half_offsets: vec![[0; 2]; runs],
            d: vec![0.0; runs],
            terms: Terms::default(),
            shape: Shape::default(),
        }
    }

    /// Quantises `input` (`[rows, columns]`, row-major), whose columns are summed by leaves.
    ///
    /// # Panics
    /// If the shape needs more than the capacity, or leaves are not whole runs of 32.
    pub fn quantise(
        &mut self,
        pool: &mut Pool,
        isa: Isa,
        input: &[f32],
        rows: usize,
        columns: usize,
        leaf_columns: usize,
    ) {
        let shape = Shape::new(rows, columns, leaf_columns, self.precision);
        let n_runs = rows.next_multiple_of(GROUP) * shape.n_runs;
        assert!(n_runs <= self.sum.len(), "{rows} x {columns} exceeds the capacity");
        assert_eq!(input.len(), rows * columns, "input of {rows} x {columns}");
        self.shape = shape;
        let precision = self.precision;
        let len = self.q.len();
        let q =
            // SAFETY: bytes are integers of 8 bits, and the borrow of `self` is unique.
            unsafe { std::slice::from_raw_parts_mut(self.q.as_mut_ptr().cast::<i8>(), len) };
        let target = Target {
            precision,
            shape,
            q: Shards::new(q),
            sum: Shards::new(&mut self.sum),
            offset: Shards::new(&mut self.offset),
            half_offsets: Shards::new(&mut self.half_offsets),
            d: Shards::new(&mut self.d),
        };
        let target = &target;
        if input.len() < SMALL {
            return quantise_scales(isa, input, target, 0..shape.n_scales);
        }
        let n_threads = pool.n_threads();
        pool.run(&|thread| {
            quantise_scales(isa, input, target, part(shape.n_scales, thread, n_threads));
        });
    }

    pub(crate) fn q(&self) -> &[i8] {
        // SAFETY: bytes are integers of 8 bits.
        unsafe { std::slice::from_raw_parts(self.q.as_ptr().cast::<i8>(), self.q.len()) }
    }
}

/// Where integers go; threads write different scales.
struct Target<'a> {
    precision: Precision,
    shape: Shape,
    q: Shards<'a, i8>,
    sum: Shards<'a, f32>,
    offset: Shards<'a, i32>,
    half_offsets: Shards<'a, [i32; 2]>,
    d: Shards<'a, f32>,
}

fn quantise_scales(isa: Isa, x: &[f32], to: &Target<'_>, scales: std::ops::Range<usize>) {
    #[cfg(target_arch = "x86_64")]
    if matches!(isa, Isa::Avx512Amx | Isa::Avx512Vnni) {
        // SAFETY: this instruction set was detected on this CPU.
        return unsafe { quantise_avx512(x, to, scales) };
    }
    dispatch!(isa, fn(x: &[f32], to: &Target<'_>, scales: std::ops::Range<usize>) =>
    match to.precision {
        Precision::Int8 => quantise_rows::<1>(x, to, scales, scale_of, quantise_run::<1>),
        Precision::Int12 => quantise_rows::<2>(x, to, scales, scale_of, quantise_run::<2>),
    });
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn quantise_avx512(x: &[f32], to: &Target<'_>, scales: std::ops::Range<usize>) {
    let scale_of = |x: &[f32], limit: f32| avx512::scale_of(x, limit);
    match to.precision {
        Precision::Int8 => {
            let run = |x: &[f32], inverse, q: [&mut [i8]; 1]| avx512::quantise_run(x, inverse, q);
            quantise_rows::<1>(x, to, scales, scale_of, run);
        }
        Precision::Int12 => {
            let run = |x: &[f32], inverse, q: [&mut [i8]; 2]| avx512::quantise_run(x, inverse, q);
            quantise_rows::<2>(x, to, scales, scale_of, run);
        }
    }
}

#[inline(always)]
fn quantise_rows<const TERMS: usize>(
    x: &[f32],
    to: &Target<'_>,
    scales: std::ops::Range<usize>,
    scale_of: impl Fn(&[f32], f32) -> (f32, f32),
    quantise_run: impl Fn(&[f32], f32, [&mut [i8]; TERMS]) -> [i32; 2],
) {
    let shape = to.shape;
    let columns = shape.n_runs * BLOCK;
    for row in 0..shape.rows {
        let (group, lane) = (row / GROUP, row % GROUP);
        for scale in scales.clone() {
            let runs = shape.runs_of(scale);
            let x = &x[row * columns..][runs.start * BLOCK..runs.end * BLOCK];
            let (d, inverse) = scale_of(x, to.precision.limit());
            let at = (group * shape.n_scales + scale) * shape.side + lane;
            // SAFETY: every thread has scales of its own, and with them runs of its own.
            unsafe { to.d.set(at, d) };
            for (run, x) in runs.zip(x.chunks_exact(BLOCK)) {
                let first = group * shape.group_len(TERMS) + shape.place(TERMS, run, lane);
                let term = |t: usize| first + t * BLOCK..first + (t + 1) * BLOCK;
                // SAFETY: as above.
                let q = std::array::from_fn(|t| unsafe { to.q.range(term(t)) });
                let sums = quantise_run(x, inverse, q);
                let sum = sums[0].wrapping_add(sums[1]);
                let offset = |sum: i32| sum.wrapping_mul(-EIGHT);
                let at = (group * shape.n_runs + run) * shape.side + lane;
                // SAFETY: as above.
                unsafe { to.sum.set(at, sum as f32) };
                // SAFETY: as above.
                unsafe { to.offset.set(at, offset(sum)) };
                // SAFETY: as above.
                unsafe { to.half_offsets.set(at, sums.map(offset)) };
            }
        }
    }
}

/// Scale and its inverse. A scale is NaN if any value is NaN or infinite: it must reach the logits,
/// where it is caught.
#[inline(always)]
fn scale_of(x: &[f32], limit: f32) -> (f32, f32) {
    let (mut max, mut poison) = ([0f32; 16], [0f32; 16]);
    for x in x.chunks_exact(16) {
        for i in 0..16 {
            max[i] = if x[i].abs() > max[i] { x[i].abs() } else { max[i] };
            poison[i] += x[i] * 0.0;
        }
    }
    let max = max.iter().fold(0f32, |a, &b| if b > a { b } else { a });
    let d = max / limit + poison.iter().sum::<f32>();
    (d, if max > 0.0 { 1.0 / d } else { 0.0 })
}

/// Rounds a run; returns the sums of the integers of both its halves.
#[inline(always)]
fn quantise_run<const TERMS: usize>(x: &[f32], inverse: f32, q: [&mut [i8]; TERMS]) -> [i32; 2] {
    let mut integers = [0i32; BLOCK];
    for (integer, &value) in integers.iter_mut().zip(x) {
        let rounded = value * inverse + MAGIC;
        *integer = (rounded.to_bits() as i32).wrapping_sub(MAGIC_BITS);
    }
    if TERMS == 1 {
        for (q, integer) in q[0].iter_mut().zip(integers) {
            *q = integer as i8;
        }
    } else {
        for (q, integer) in q[0].iter_mut().zip(integers) {
            *q = (integer.wrapping_add(8) >> 4) as i8;
        }
        for (q, integer) in q[1].iter_mut().zip(integers) {
            *q = (integer.wrapping_add(8) & 15).wrapping_sub(8) as i8;
        }
    }
    // Of a poisoned row they are anything.
    let sum = |integers: &[i32]| integers.iter().fold(0i32, |a, &b| a.wrapping_add(b));
    [sum(&integers[..BLOCK / 2]), sum(&integers[BLOCK / 2..])]
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const PRECISIONS: [Precision; 2] = [Precision::Int8, Precision::Int12];
    const ROWS: usize = 18;
    /// Two leaves of ten runs: scales of eight runs and of two.
    const COLUMNS: usize = 640;

    fn rows() -> Vec<f32> {
        let mut x: Vec<f32> =
            (0..ROWS * COLUMNS).map(|i| ((i * 7919 % 1000) as f32 - 500.0) / 37.0).collect();
        x[..256].fill(0.0);
        x[300] = -1e30;
        x
    }

    fn quantised(isa: Isa, n_threads: usize, precision: Precision, x: &[f32]) -> Activation {
        let mut activation = Activation::with_capacity(ROWS, COLUMNS, precision);
        let mut pool = Pool::new(n_threads, false);
        activation.quantise(&mut pool, isa, x, ROWS, COLUMNS, COLUMNS / 2);
        activation
    }

    #[test]
    fn quantised_runs_are_within_half_a_step() {
        let x = rows();
        for precision in PRECISIONS {
            let a = quantised(Isa::detect(), 1, precision, &x);
            let terms = precision.terms();
            for (row, x) in x.chunks(COLUMNS).enumerate() {
                for scale in 0..a.shape.n_scales {
                    let d = a.d[(row / GROUP * a.shape.n_scales + scale) * GROUP + row % GROUP];
                    for run in a.shape.runs_of(scale) {
                        let at = (row / GROUP * a.shape.n_runs + run) * GROUP + row % GROUP;
                        let q = &a.q()[row / GROUP * a.shape.group_len(terms)..];
                        let q = &q[a.shape.place(terms, run, row % GROUP)..];
                        let integer = |k: usize| crate::linear::integer(terms, q, k);
                        for (k, &value) in x[run * BLOCK..][..BLOCK].iter().enumerate() {
                            let back = d * integer(k) as f32;
                            let bound = 0.5001 * d + 1e-6 * value.abs();
                            assert!((back - value).abs() <= bound, "{precision:?} {value} {back}");
                        }
                        let sum = (0..BLOCK).map(integer).sum::<i32>();
                        assert_eq!(a.sum[at], sum as f32);
                        assert_eq!(a.offset[at], -8 * sum);
                        let left = (0..BLOCK / 2).map(integer).sum::<i32>();
                        assert_eq!(a.half_offsets[at], [-8 * left, -8 * (sum - left)]);
                    }
                }
            }
        }
    }

    #[test]
    fn all_instruction_sets_and_threads_quantise_to_the_same_bits() {
        let x = rows();
        for precision in PRECISIONS {
            let first = quantised(Isa::Portable, 1, precision, &x);
            for isa in Isa::available() {
                let other = quantised(isa, 3, precision, &x);
                assert_eq!(first.q(), other.q(), "{isa:?}");
                assert_eq!(first.d, other.d, "{isa:?}");
                assert_eq!(first.sum, other.sum, "{isa:?}");
                assert_eq!(first.offset, other.offset, "{isa:?}");
                assert_eq!(first.half_offsets, other.half_offsets, "{isa:?}");
            }
        }
    }
}
