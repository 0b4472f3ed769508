//! Speed of float weights: GB/s and TFLOPS by format and rows of activations, from the
//! second-level cache and from memory, beside what the machine can do in the same minute.
//!
//! `cargo run --release -p evener-kernels --example dense [THREADS] [int8|int12] [FORMAT] [ROWS]`

use std::hint::black_box;
use std::time::{Duration, Instant};

use evener_kernels::activation::{Activation, Precision};
use evener_kernels::linear::{Input, Projection, linear};
use evener_kernels::matrix::Source;
use evener_kernels::quant::Format;
use evener_kernels::{Isa, Matrix, Pool};

const COLUMNS: usize = 2048;
/// Of a matrix that comes from memory, much larger than what a core keeps.
const MEMORY_ROWS: usize = 64 * 1024;
/// Rows of a matrix that stays in the second-level cache, for each thread.
const CACHED_ROWS: usize = 192;
/// Rows of activations.
const BATCHES: [usize; 7] = [1, 2, 4, 8, 16, 32, 512];
const TIME: Duration = Duration::from_millis(400);

/// Random weights of any width: what they are does not matter for their speed.
struct Weights {
    format: Format,
    row: Vec<u8>,
}

impl Source for Weights {
    fn format(&self) -> Format {
        self.format
    }

    fn row_blocks(&self, _: usize) -> &[u8] {
        &self.row
    }

    fn first_column(&self) -> usize {
        0
    }

    fn row_f32(&self, _: usize, out: &mut [f32]) {
        out.fill(0.5);
    }
}

fn matrix(format: Format, rows: usize) -> Matrix {
    let value = |k: usize| 1.0 + (k * 37 % 64) as f32 / 64.0;
    let row = (0..COLUMNS).flat_map(|k| match format {
        Format::Bf16 => half::bf16::from_f32(value(k)).to_le_bytes().to_vec(),
        Format::F16 => half::f16::from_f32(value(k)).to_le_bytes().to_vec(),
        _ => value(k).to_le_bytes().to_vec(),
    });
    Matrix::pack(rows, COLUMNS, &Weights { format, row: row.collect() })
}

/// The shortest of many runs.
fn best(mut run: impl FnMut()) -> f64 {
    run();
    let (start, mut best) = (Instant::now(), f64::INFINITY);
    while start.elapsed() < TIME {
        let one = Instant::now();
        run();
        best = best.min(one.elapsed().as_secs_f64());
    }
    best
}

/// GB/s of plain sums over much memory.
fn bandwidth(pool: &mut Pool) -> f64 {
    let data = vec![1u64; 32 << 20];
    let n_threads = pool.n_threads();
    let seconds = best(|| {
        pool.run(&|thread| {
            let each = data.len() / n_threads;
            let mut sums = [0u64; 32];
            for chunk in data[thread * each..(thread + 1) * each].chunks_exact(32) {
                for (sum, value) in sums.iter_mut().zip(chunk) {
                    *sum = sum.wrapping_add(*value);
                }
            }
            black_box(sums);
        });
    });
    8.0 * data.len() as f64 / seconds / 1e9
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let n_threads = arguments.next().map_or(2, |n| n.parse().expect("a number of threads"));
    let precision = match arguments.next().as_deref() {
        Some("int8") => Precision::Int8,
        _ => Precision::Int12,
    };
    let only = arguments.next();
    let only_batch: Option<usize> =
        arguments.next().map(|n| n.parse().expect("a number of rows of activations"));
    let mut pool = Pool::new(n_threads, true);
    println!("{n_threads} threads, {precision:?}, {COLUMNS} columns");
    println!("memory reads at {:.1} GB/s", bandwidth(&mut pool));
    for format in [Format::Bf16, Format::F16, Format::F32] {
        if only.as_ref().is_some_and(|only| only != format.name()) {
            continue;
        }
        for (place, rows) in [("cache", CACHED_ROWS * n_threads), ("memory", MEMORY_ROWS)] {
            let matrix = matrix(format, rows);
            for isa in Isa::available().into_iter().filter(|isa| isa.name() != "portable") {
                for batch in BATCHES {
                    if only_batch.is_some_and(|only| only != batch) {
                        continue;
                    }
                    measure(&mut pool, isa, precision, place, format, &matrix, batch);
                }
            }
        }
    }
    println!("memory reads at {:.1} GB/s", bandwidth(&mut pool));
}

fn measure(
    pool: &mut Pool,
    isa: Isa,
    precision: Precision,
    place: &str,
    format: Format,
    matrix: &Matrix,
    batch: usize,
) {
    let x: Vec<f32> = (0..batch * COLUMNS).map(|i| (i % 97) as f32 / 97.0 - 0.5).collect();
    let mut out = vec![0.0; batch * matrix.rows()];
    let mut scratch = Activation::with_capacity(batch, COLUMNS, precision);
    let seconds = best(|| {
        let input = Input { x: &x, rows: batch, columns: COLUMNS, scratch: &mut scratch };
        linear(pool, isa, input, &mut [Projection { weight: matrix, out: &mut out }]);
    });
    println!(
        "{:5} {place:6} {:12} {batch:4} rows: {:6.1} GB/s {:7.3} TFLOPS",
        format.name(),
        isa.name(),
        matrix.bytes() as f64 / seconds / 1e9,
        2.0 * (batch * COLUMNS * matrix.rows()) as f64 / seconds / 1e12,
    );
}
