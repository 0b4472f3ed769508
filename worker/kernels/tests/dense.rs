//! bf16, f16 and f32 weights: against plain f64 arithmetic, against the order of operations that
//! each arithmetic is defined by, bit for bit, and against themselves over batches, threads and
//! splits.
#![allow(clippy::unwrap_used)]

use evener_kernels::activation::{Activation, Precision};
use evener_kernels::linear::{Input, Projection, Sum, linear, linear_parts};
use evener_kernels::matrix::Source;
use evener_kernels::quant::Format;
use evener_kernels::{Isa, Matrix, Pool};
use half::{bf16, f16};

struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u32 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }

    fn float(&mut self) -> f32 {
        self.next() as f32 / (1u32 << 30) as f32 - 1.0
    }
}

/// A random matrix in a file's layout, with its columns from `first` on visible.
struct Random {
    format: Format,
    rows: Vec<Vec<u8>>,
    first: usize,
}

impl Random {
    fn new(format: Format, rows: usize, columns: usize) -> Self {
        let mut noise = Noise(rows as u64 * 31 + columns as u64);
        let mut weight = |_| {
            let value = noise.float() * 0.1;
            match format {
                Format::Bf16 => bf16::from_f32(value).to_le_bytes().to_vec(),
                Format::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
                _ => value.to_le_bytes().to_vec(),
            }
        };
        let rows = (0..rows).map(|_| (0..columns).flat_map(&mut weight).collect()).collect();
        Self { format, rows, first: 0 }
    }

    fn weight(&self, row: usize, column: usize) -> f32 {
        let n = self.format.block_bytes();
        let bytes = &self.rows[row][column * n..(column + 1) * n];
        match self.format {
            Format::Bf16 => bf16::from_le_bytes(bytes.try_into().unwrap()).to_f32(),
            Format::F16 => f16::from_le_bytes(bytes.try_into().unwrap()).to_f32(),
            _ => f32::from_le_bytes(bytes.try_into().unwrap()),
        }
    }
}

impl Source for Random {
    fn format(&self) -> Format {
        self.format
    }

    fn row_blocks(&self, row: usize) -> &[u8] {
        &self.rows[row][self.first * self.format.block_bytes()..]
    }

    fn first_column(&self) -> usize {
        0
    }

    fn row_f32(&self, row: usize, out: &mut [f32]) {
        for (k, out) in out.iter_mut().enumerate() {
            *out = self.weight(row, self.first + k);
        }
    }
}

const CASES: [(Format, Precision); 4] = [
    (Format::Bf16, Precision::Int8),
    (Format::Bf16, Precision::Int12),
    (Format::F16, Precision::Int12),
    (Format::F32, Precision::Int12),
];

const ROWS: usize = 9 * 16 + 7;
const COLUMNS: usize = 384;
const TOKENS: usize = 51;

fn input(tokens: usize) -> Vec<f32> {
    let mut noise = Noise(7);
    (0..tokens * COLUMNS).map(|_| noise.float()).collect()
}

fn multiply(
    isa: Isa,
    n_threads: usize,
    precision: Precision,
    matrix: &Matrix,
    x: &[f32],
) -> Vec<f32> {
    let sum = Sum { leaf_columns: matrix.columns(), part_leaves: &[1], merges: &[0] };
    multiply_parts(isa, n_threads, precision, matrix, x, &sum)
}

fn multiply_parts(
    isa: Isa,
    n_threads: usize,
    precision: Precision,
    matrix: &Matrix,
    x: &[f32],
    sum: &Sum<'_>,
) -> Vec<f32> {
    let columns = matrix.columns();
    let rows = x.len() / columns;
    let mut out = vec![f32::NAN; sum.part_leaves.len() * rows * matrix.rows()];
    let mut scratch = Activation::with_capacity(rows, columns, precision);
    let input = Input { x, rows, columns, scratch: &mut scratch };
    let mut pool = Pool::new(n_threads, false);
    let projection = Projection { weight: matrix, out: &mut out };
    if sum.part_leaves == [1] {
        linear(&mut pool, isa, input, &mut [projection]);
    } else {
        linear_parts(&mut pool, isa, input, projection, sum);
    }
    out
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|v| v.to_bits()).collect()
}

/// Relative error of a rounded activation.
fn rounding(precision: Precision, format: Format) -> f64 {
    match (format, precision) {
        (Format::Bf16, Precision::Int8) => f64::powi(2.0, -8),
        (Format::Bf16, Precision::Int12) => f64::powi(2.0, -17),
        _ => 0.0,
    }
}

#[test]
fn products_are_those_of_plain_arithmetic_up_to_the_rounding_of_activations() {
    let x = input(TOKENS);
    for (format, precision) in CASES {
        let random = Random::new(format, ROWS, COLUMNS);
        let matrix = Matrix::pack(ROWS, COLUMNS, &random);
        for isa in Isa::available() {
            let out = multiply(isa, 1, precision, &matrix, &x);
            for (token, x) in x.chunks(COLUMNS).enumerate() {
                for row in 0..ROWS {
                    let products =
                        (0..COLUMNS).map(|k| f64::from(random.weight(row, k)) * f64::from(x[k]));
                    let want: f64 = products.clone().sum();
                    let magnitude: f64 = products.map(f64::abs).sum();
                    // A chain of n f32 additions is off by less than n half units of the sum.
                    let adding = COLUMNS as f64 * f64::powi(2.0, -24);
                    let bound = magnitude * (rounding(precision, format) + adding);
                    let got = f64::from(out[token * ROWS + row]);
                    let what = format!("{format:?} {precision:?} {isa:?} {token} {row}");
                    assert!((got - want).abs() <= bound, "{what}: {got} {want} {bound}");
                }
            }
        }
    }
}

/// bf16 and f16 are half as large as f32: nothing is widened in memory.
#[test]
fn weights_are_held_at_their_true_width() {
    for (format, _) in CASES {
        let matrix = Matrix::pack(160, COLUMNS, &Random::new(format, 160, COLUMNS));
        assert_eq!(matrix.bytes() as usize, 160 * COLUMNS * format.block_bytes(), "{format:?}");
        assert!(!matrix.is_quantised());
    }
}

#[test]
fn rows_read_back_as_the_file_has_them() {
    for (format, _) in CASES {
        let random = Random::new(format, ROWS, COLUMNS);
        let matrix = Matrix::pack(ROWS, COLUMNS, &random);
        let mut out = vec![0.0; COLUMNS];
        for row in [0, 15, 16, 39, ROWS - 1] {
            matrix.dequantise_row(row, &mut out);
            let want: Vec<f32> = (0..COLUMNS).map(|k| random.weight(row, k) + 0.0).collect();
            assert_eq!(bits(&out), bits(&want), "{format:?} {row}");
        }
    }
}

/// Whether two instruction sets give the same bits: all do for f16 and f32, and for bf16 those
/// without tile registers.
fn same_over(format: Format, a: Isa, b: Isa) -> bool {
    format != Format::Bf16 || has_tiles(a) == has_tiles(b)
}

fn has_tiles(isa: Isa) -> bool {
    isa.name() == "avx512-amx"
}

#[test]
fn bits_do_not_depend_on_batch_or_threads() {
    let x = input(TOKENS);
    for (format, precision) in CASES {
        let matrix = Matrix::pack(ROWS, COLUMNS, &Random::new(format, ROWS, COLUMNS));
        let isas = Isa::available();
        let alone: Vec<Vec<f32>> = isas
            .iter()
            .map(|&isa| {
                x.chunks(COLUMNS).flat_map(|x| multiply(isa, 1, precision, &matrix, x)).collect()
            })
            .collect();
        for (isa, alone_here) in isas.iter().zip(&alone) {
            for (other, alone) in isas.iter().zip(&alone) {
                let equal = bits(alone_here) == bits(alone);
                assert!(equal || !same_over(format, *isa, *other), "{format:?} {isa:?} {other:?}");
            }
            for tokens in [2, 3, 5, 8, 9, 16, 17, 31, TOKENS] {
                for n_threads in [1, 2, 3] {
                    let x = &x[..tokens * COLUMNS];
                    let batch = multiply(*isa, n_threads, precision, &matrix, x);
                    let equal = bits(&batch) == bits(&alone_here[..tokens * ROWS]);
                    assert!(equal, "{format:?} {precision:?} {isa:?} {tokens} {n_threads}");
                }
            }
        }
    }
}

/// Merges of a balanced tree over n leaves: the left half is the larger one.
fn balanced(n: usize) -> Vec<u8> {
    if n == 1 {
        return vec![0];
    }
    let mut merges = balanced(n.div_ceil(2));
    merges.extend(balanced(n / 2));
    *merges.last_mut().unwrap() += 1;
    merges
}

#[test]
fn parts_of_a_split_sum_to_the_bits_of_the_whole() {
    let x = input(TOKENS);
    for (format, precision) in CASES {
        for isa in Isa::available() {
            for leaf_columns in [32, 64, 192] {
                let mut random = Random::new(format, ROWS, COLUMNS);
                let whole = Matrix::pack(ROWS, COLUMNS, &random);
                let n_leaves = COLUMNS / leaf_columns;
                let multiply = |matrix: &Matrix, x: &[f32], parts: &[usize]| {
                    let merges: Vec<u8> = parts.iter().flat_map(|&n| balanced(n)).collect();
                    let sum = Sum { leaf_columns, part_leaves: parts, merges: &merges };
                    multiply_parts(isa, 2, precision, matrix, x, &sum)
                };
                let want = multiply(&whole, &x, &[n_leaves]);
                let half = COLUMNS / 2;
                let mut halves = [Vec::new(), Vec::new()];
                for (h, out) in halves.iter_mut().enumerate() {
                    let x: Vec<f32> = x
                        .chunks(COLUMNS)
                        .flat_map(|x| x[h * half..(h + 1) * half].to_vec())
                        .collect();
                    random.first = h * half;
                    *out = multiply(&Matrix::pack(ROWS, half, &random), &x, &[n_leaves / 2]);
                }
                let sum: Vec<f32> = halves[0].iter().zip(&halves[1]).map(|(a, b)| a + b).collect();
                assert_eq!(bits(&sum), bits(&want), "{format:?} {isa:?} {leaf_columns}");
                // Two parts of one matrix: what a rank with two subtrees sends.
                if n_leaves > 1 {
                    let parts = multiply(&whole, &x, &[n_leaves / 2, n_leaves / 2]);
                    let (a, b) = parts.split_at(TOKENS * ROWS);
                    let sum: Vec<f32> = a.iter().zip(b).map(|(a, b)| a + b).collect();
                    assert_eq!(bits(&sum), bits(&want), "{format:?} {isa:?} {leaf_columns}");
                }
            }
        }
    }
}

/// Wide ones are multiplied a span of columns at a time, leaves longer and shorter than it, and many
/// tiles and rows in several passes.
#[test]
fn a_wide_matrix_has_the_same_bits_for_a_row_alone_and_for_many() {
    let (rows, columns, tokens) = (16 * 18 + 5, 4608, 300);
    let random = Random::new(Format::Bf16, rows, columns);
    let matrix = Matrix::pack(rows, columns, &random);
    let x: Vec<f32> = input(tokens * columns / COLUMNS + 1)[..tokens * columns].to_vec();
    for precision in [Precision::Int8, Precision::Int12] {
        for leaf_columns in [128, 2304, 4608] {
            let n_leaves = columns / leaf_columns;
            let merges = balanced(n_leaves);
            let sum = Sum { leaf_columns, part_leaves: &[n_leaves], merges: &merges };
            let many = multiply_parts(Isa::detect(), 2, precision, &matrix, &x, &sum);
            for token in [0, 17, 127, 128, 299] {
                let x = &x[token * columns..(token + 1) * columns];
                let alone = multiply_parts(Isa::detect(), 1, precision, &matrix, x, &sum);
                let of_many = &many[token * rows..(token + 1) * rows];
                assert_eq!(bits(&alone), bits(of_many), "{precision:?} {leaf_columns} {token}");
            }
        }
    }
}

/// As the tile instruction has it: subnormals are zero.
fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0.0 } else { x }
}

/// What `tdpbf16ps` is documented to do to one element, over blocks of 32 columns with each term.
fn tile_sum(weights: &[f32], terms: &[&[f32]]) -> f32 {
    let mut sum = 0.0;
    for (b, w) in weights.chunks(32).enumerate() {
        for term in terms {
            let x = &term[b * 32..(b + 1) * 32];
            let chain = |first: usize| {
                let add = |acc, k: usize| flush(flush(w[k]).mul_add(flush(x[k]), acc));
                (first..32).step_by(2).fold(0f32, add)
            };
            sum = flush(sum + flush(chain(0) + chain(1)));
        }
    }
    sum
}

fn rounded(x: f32) -> f32 {
    bf16::from_f32(x).to_f32()
}

/// The order of operations each arithmetic is defined by, in plain code.
fn defined(format: Format, precision: Precision, has_tiles: bool, w: &[f32], x: &[f32]) -> f32 {
    let high: Vec<f32> = x.iter().map(|&x| rounded(x)).collect();
    let low: Vec<f32> = x.iter().zip(&high).map(|(x, high)| rounded(x - high)).collect();
    match (format, precision) {
        (Format::Bf16, Precision::Int8) if has_tiles => tile_sum(w, &[&high]),
        (Format::Bf16, Precision::Int12) if has_tiles => tile_sum(w, &[&high, &low]),
        (Format::Bf16, _) => {
            let x = if precision == Precision::Int8 { &high } else { x };
            let pairs = w.chunks(2).zip(x.chunks(2));
            pairs.fold(0.0, |acc, (w, x)| w[0].mul_add(x[0], w[1].mul_add(x[1], acc)))
        }
        _ => w.iter().zip(x).fold(0.0, |acc, (w, x)| w.mul_add(*x, acc)),
    }
}

#[test]
fn bits_are_those_of_the_documented_order() {
    let x = input(11);
    for (format, precision) in CASES {
        let random = Random::new(format, ROWS, COLUMNS);
        let matrix = Matrix::pack(ROWS, COLUMNS, &random);
        for isa in Isa::available() {
            let out = multiply(isa, 1, precision, &matrix, &x);
            for (token, x) in x.chunks(COLUMNS).enumerate() {
                for row in 0..ROWS {
                    let w: Vec<f32> = (0..COLUMNS).map(|k| random.weight(row, k)).collect();
                    let want = defined(format, precision, has_tiles(isa), &w, x);
                    let got = out[token * ROWS + row];
                    let what = format!("{format:?} {precision:?} {isa:?} {token} {row}");
                    assert_eq!(got.to_bits(), want.to_bits(), "{what}: {got} {want}");
                }
            }
        }
    }
}

#[test]
fn activations_that_are_not_finite_reach_the_output() {
    for bad in [f32::NAN, f32::INFINITY] {
        let mut x = input(2);
        x[100] = bad;
        for (format, precision) in CASES {
            let matrix = Matrix::pack(ROWS, COLUMNS, &Random::new(format, ROWS, COLUMNS));
            for isa in Isa::available() {
                let out = multiply(isa, 1, precision, &matrix, &x);
                let (first, second) = out.split_at(ROWS);
                assert!(first.iter().all(|v| !v.is_finite()), "{format:?} {isa:?}");
                assert!(second.iter().all(|v| v.is_finite()), "{format:?} {isa:?}");
            }
        }
    }
}

/// As a rank holds of a matrix that has fewer rows than the group has shares.
#[test]
fn a_matrix_without_rows_multiplies_to_nothing() {
    for (format, precision) in CASES {
        let matrix = Matrix::pack(0, COLUMNS, &Random::new(format, 0, COLUMNS));
        for isa in Isa::available() {
            for n_threads in [1, 2] {
                assert!(multiply(isa, n_threads, precision, &matrix, &input(3)).is_empty());
            }
        }
    }
}
