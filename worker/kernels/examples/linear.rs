//! Speed of one linear op by format, precision and rows of activations: bytes of weights and
//! multiply-adds per second. The best of many runs.
//!
//! `cargo run --release -p evener-kernels --example linear [ROWS COLUMNS [THREADS]]`

use std::time::Instant;

use evener_kernels::activation::{Activation, Precision};
use evener_kernels::linear::{Input, Projection, Sum, linear_parts};
use evener_kernels::matrix::Source;
use evener_kernels::quant::Format;
use evener_kernels::{Isa, Matrix, Pool};

struct Constant(Format, Vec<u8>);

impl Source for Constant {
    fn format(&self) -> Format {
        self.0
    }
    fn row_blocks(&self, _: usize) -> &[u8] {
        &self.1
    }
    fn first_column(&self) -> usize {
        0
    }
    fn row_f32(&self, row: usize, out: &mut [f32]) {
        out.fill(row as f32);
    }
}

fn main() {
    let args: Vec<usize> = std::env::args().skip(1).flat_map(|a| a.parse()).collect();
    let at = |i: usize, default| args.get(i).copied().unwrap_or(default);
    let (rows, columns, n_threads) = (at(0, 1024), at(1, 2048), at(2, 1));
    let leaf = at(3, columns);
    println!("{rows} x {columns}, {n_threads} threads, leaves of {leaf}");
    for isa in Isa::available().into_iter().take(2) {
        for format in
            [Format::Q4_0, Format::Q4_1, Format::Q4K, Format::Q5_0, Format::Q6K, Format::Q8_0]
        {
            let blocks = vec![0x11; columns / format.block_len() * format.block_bytes()];
            let matrix = Matrix::pack(rows, columns, &Constant(format, blocks));
            for precision in [Precision::Int8, Precision::Int12] {
                print!("{:12} {:5} {precision:?}: ", isa.name(), format.name());
                for m in ms() {
                    let seconds = time(isa, n_threads, &matrix, precision, m, leaf);
                    let ops = 2.0 * (m * rows * columns) as f64 / seconds / 1e12;
                    let bytes = matrix.bytes() as f64 / seconds / 1e9;
                    print!(" {m}: {bytes:.1} GB/s {ops:.2} T;");
                }
                println!();
            }
        }
    }
}

fn ms() -> Vec<usize> {
    std::env::var("MS")
        .map_or(vec![1, 2, 4, 8, 16, 32, 128, 512], |s| s.split(",").flat_map(str::parse).collect())
}

fn time(
    isa: Isa,
    n_threads: usize,
    matrix: &Matrix,
    precision: Precision,
    m: usize,
    leaf: usize,
) -> f64 {
    let x: Vec<f32> = (0..m * matrix.columns()).map(|i| (i % 17) as f32 - 8.0).collect();
    let leaves = matrix.columns() / leaf;
    let mut merges: Vec<u8> = (0..leaves).map(|i| (i + 1).trailing_zeros() as u8).collect();
    let depth: usize = leaves - merges.iter().map(|&m| usize::from(m)).sum::<usize>();
    merges[leaves - 1] += depth as u8 - 1;
    let sum = Sum { leaf_columns: leaf, part_leaves: &[leaves], merges: &merges };
    let mut out = vec![0.0; m * matrix.rows()];
    let mut scratch = Activation::with_capacity(m, matrix.columns(), precision);
    let mut pool = Pool::new(n_threads, true);
    let (mut best, start) = (f64::MAX, Instant::now());
    while start.elapsed().as_millis() < 150 {
        let begin = Instant::now();
        let input = Input { x: &x, rows: m, columns: matrix.columns(), scratch: &mut scratch };
        linear_parts(&mut pool, isa, input, Projection { weight: matrix, out: &mut out }, &sum);
        best = best.min(begin.elapsed().as_secs_f64());
    }
    best
}
