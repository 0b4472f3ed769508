//! Speed of quantised weights: TOPS, GB/s and nanoseconds of a thread for 16 rows of 16 weights, by
//! rows of activations. A matrix of few rows comes from a core's own cache, one of 500,000 from
//! memory, and the two differ.
//!
//! `cargo run --release -p evener-kernels --example linear FORMAT ROWS COLUMNS BATCH,.. THREADS`

use std::time::{Duration, Instant};

use evener_kernels::activation::{Activation, Precision};
use evener_kernels::linear::{Input, Projection, linear};
use evener_kernels::matrix::Source;
use evener_kernels::quant::Format;
use evener_kernels::{Isa, Matrix, Pool};

const USAGE: &str = "usage: linear FORMAT ROWS COLUMNS BATCH,.. THREADS";
const TIME: Duration = Duration::from_secs(1);

/// Random weights: what they are does not matter for their speed.
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

fn main() {
    let mut words = std::env::args().skip(1);
    let name = words.next().expect(USAGE);
    let format = Format::ALL.into_iter().find(|format| format.name().eq_ignore_ascii_case(&name));
    let format = format.expect("a format such as q4_0");
    let mut number = || words.next().expect(USAGE).parse::<usize>().expect("a number");
    let (rows, columns) = (number(), number());
    let batches = words.next().expect(USAGE);
    let n_threads = words.next().expect(USAGE).parse().expect("a number of threads");

    let n_bytes = columns / format.block_len() * format.block_bytes();
    // Bytes that are no infinite scale in any format.
    let row = (0..n_bytes as u32).map(|i| i.wrapping_mul(2_654_435_761).to_be_bytes()[0] & 0x3f);
    let weight = Matrix::pack(rows, columns, &Weights { format, row: row.collect() });
    let (mut pool, isa) = (Pool::new(n_threads, true), Isa::detect());
    for batch in batches.split(',') {
        let batch: usize = batch.parse().expect("a number of rows of activations");
        let mut scratch = Activation::with_capacity(batch, columns, Precision::Int12);
        let x: Vec<f32> = (0..batch * columns).map(|i| (i % 17) as f32 / 8.0 - 1.0).collect();
        let mut out = vec![0f32; batch * rows];
        let (start, mut seconds) = (Instant::now(), f64::INFINITY);
        while start.elapsed() < TIME {
            let one = Instant::now();
            let input = Input { x: &x, rows: batch, columns, scratch: &mut scratch };
            let projection = Projection { weight: &weight, out: &mut out };
            linear(&mut pool, isa, input, &mut [projection]);
            seconds = seconds.min(one.elapsed().as_secs_f64());
        }
        let n_units = (rows / 16 * columns / 32 * batch.div_ceil(16)) as f64;
        println!(
            "{:5} {rows} x {columns} {batch:4} rows: {:7.3} TOPS {:6.2} GB/s {:6.2} ns",
            format.name(),
            2.0 * (rows * columns * batch) as f64 / seconds / 1e12,
            weight.bytes() as f64 / seconds / 1e9,
            1e9 * seconds * n_threads as f64 / n_units,
        );
    }
}
