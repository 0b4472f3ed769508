//! The linear kernels against plain f64 arithmetic, and against themselves: the same bits on every
//! instruction set, with any number of threads, in any batch and over any split of the columns.
#![allow(clippy::unwrap_used)]

use evener_kernels::activation::{Activation, Precision};
use evener_kernels::linear::{Input, Projection, Sum, linear, linear_parts};
use evener_kernels::matrix::Source;
use evener_kernels::quant::Format;
use evener_kernels::{Isa, Matrix, Pool};
use half::f16;

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
        let rows = (0..rows)
            .map(|_| {
                (0..columns / format.block_len()).flat_map(|_| block(format, &mut noise)).collect()
            })
            .collect();
        Self { format, rows, first: 0 }
    }

    /// A weight as the format's definition in ggml has it, read without the kernels' code.
    fn weight(&self, row: usize, column: usize) -> f64 {
        let format = self.format;
        let block = &self.rows[row][column / format.block_len() * format.block_bytes()..];
        let half = |at: usize| f64::from(f16::from_le_bytes([block[at], block[at + 1]]).to_f32());
        let k = column % format.block_len();
        let nibble = |at: usize| {
            let byte = block[at + k % 16];
            f64::from(if k < 16 { byte & 15 } else { byte >> 4 })
        };
        let fifth = |at: usize| f64::from(block[at + k / 8] >> (k % 8) & 1) * 16.0;
        match format {
            Format::Q4_0 => half(0) * (nibble(2) - 8.0),
            Format::Q4_1 => half(0) * nibble(4) + half(2),
            Format::Q5_0 => half(0) * (nibble(6) + fifth(2) - 16.0),
            Format::Q5_1 => half(0) * (nibble(8) + fifth(4)) + half(2),
            Format::Q8_0 => half(0) * f64::from(block[2 + k] as i8),
            Format::Q4K | Format::Q5K => {
                let run = k / 32;
                let byte =
                    block[if format == Format::Q4K { 16 } else { 48 } + k / 64 * 32 + k % 32];
                let low = if run.is_multiple_of(2) { byte & 15 } else { byte >> 4 };
                let high = if format == Format::Q5K { block[16 + k % 32] >> run & 1 } else { 0 };
                let packed = &block[4..16];
                let (sc, mc) = if run < 4 {
                    (packed[run] & 63, packed[run + 4] & 63)
                } else {
                    let (a, b, c) = (packed[run + 4], packed[run - 4], packed[run]);
                    ((a & 15) | (b >> 6 << 4), (a >> 4) | (c >> 6 << 4))
                };
                let u = f64::from(low + 16 * high);
                half(0) * f64::from(sc) * u - half(2) * f64::from(mc)
            }
            Format::Q6K => {
                // 128 columns at a time: 32 of one nibble, 32 of the next bytes', 64 of the others.
                let (part, quarter, l) = (k / 128, k % 128 / 32, k % 32);
                let byte = block[64 * part + 32 * (quarter % 2) + l];
                let low = if quarter < 2 { byte & 15 } else { byte >> 4 };
                let high = block[128 + 32 * part + l] >> (2 * quarter) & 3;
                let sc = block[192 + k / 16] as i8;
                half(208) * f64::from(sc) * (f64::from(low + 16 * high) - 32.0)
            }
            Format::F32 => f64::from(f32::from_le_bytes(block[..4].try_into().unwrap())),
            other => panic!("no plain reading of {other:?} in this test"),
        }
    }
}

fn block(format: Format, noise: &mut Noise) -> Vec<u8> {
    let half = |noise: &mut Noise| f16::from_f32(noise.float() * 0.1).to_le_bytes();
    let bytes =
        |noise: &mut Noise, n: usize| (0..n).map(|_| noise.next() as u8).collect::<Vec<_>>();
    if format == Format::F32 {
        return noise.float().to_le_bytes().to_vec();
    }
    if format == Format::Q6K {
        return [bytes(noise, 208), half(noise).to_vec()].concat();
    }
    let n_halves = match format {
        Format::Q4_0 | Format::Q5_0 | Format::Q8_0 => 1,
        _ => 2,
    };
    let mut block: Vec<u8> = (0..n_halves).flat_map(|_| half(noise)).collect();
    block.extend(bytes(noise, format.block_bytes() - 2 * n_halves));
    block
}

impl Source for Random {
    fn format(&self) -> Format {
        self.format
    }

    fn row_blocks(&self, row: usize) -> &[u8] {
        &self.rows[row][self.first / self.format.block_len() * self.format.block_bytes()..]
    }

    fn first_column(&self) -> usize {
        self.first % self.format.block_len()
    }

    fn row_f32(&self, row: usize, out: &mut [f32]) {
        for (k, out) in out.iter_mut().enumerate() {
            *out = self.weight(row, self.first + k) as f32;
        }
    }
}

/// Every format with activations of either precision; f32 weights take f32 activations.
const CASES: [(Format, Precision); 17] = [
    (Format::Q4_0, Precision::Int8),
    (Format::Q4_0, Precision::Int12),
    (Format::Q4_1, Precision::Int8),
    (Format::Q4_1, Precision::Int12),
    (Format::Q5_0, Precision::Int8),
    (Format::Q5_0, Precision::Int12),
    (Format::Q5_1, Precision::Int8),
    (Format::Q5_1, Precision::Int12),
    (Format::Q8_0, Precision::Int8),
    (Format::Q8_0, Precision::Int12),
    (Format::Q4K, Precision::Int8),
    (Format::Q4K, Precision::Int12),
    (Format::Q5K, Precision::Int8),
    (Format::Q5K, Precision::Int12),
    (Format::Q6K, Precision::Int8),
    (Format::Q6K, Precision::Int12),
    (Format::F32, Precision::Int12),
];

const ROWS: usize = 40; // two whole tiles and a half one
const COLUMNS: usize = 768; // a half of it begins inside a block of 256
const TOKENS: usize = 89; // more than four groups of 16, and a rest

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
    let rows = x.len() / COLUMNS;
    let mut out = vec![f32::NAN; rows * matrix.rows()];
    let mut scratch = Activation::with_capacity(x.len() / COLUMNS, COLUMNS, precision);
    let input = Input { x, rows, columns: COLUMNS, scratch: &mut scratch };
    let mut pool = Pool::new(n_threads, false);
    linear(&mut pool, isa, input, &mut [Projection { weight: matrix, out: &mut out }]);
    out
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn products_are_those_of_plain_arithmetic_up_to_half_a_step() {
    let x = input(TOKENS);
    for (format, precision) in CASES {
        let random = Random::new(format, ROWS, COLUMNS);
        let matrix = Matrix::pack(ROWS, COLUMNS, &random);
        let out = multiply(Isa::detect(), 1, precision, &matrix, &x);
        for (token, x) in x.chunks(COLUMNS).enumerate() {
            for row in 0..ROWS {
                let weights: Vec<f64> = (0..COLUMNS).map(|k| random.weight(row, k)).collect();
                let want: f64 = weights.iter().zip(x).map(|(w, x)| w * f64::from(*x)).sum();
                // Each activation is off by at most half a step of its block's maximum (<= 1).
                let step = match (matrix.is_quantised(), precision) {
                    (true, Precision::Int8) => 0.5 / 127.0,
                    (true, Precision::Int12) => 0.5 / 2032.0,
                    (false, _) => 1e-6,
                };
                let bound = weights.iter().map(|w| w.abs()).sum::<f64>() * step + 1e-4;
                let got = f64::from(out[token * ROWS + row]);
                assert!(
                    (got - want).abs() <= bound,
                    "{format:?} {token} {row}: {got} {want} {bound}"
                );
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_batch_threads_or_instruction_set() {
    let x = input(TOKENS);
    for (format, precision) in CASES {
        let matrix = Matrix::pack(ROWS, COLUMNS, &Random::new(format, ROWS, COLUMNS));
        let alone: Vec<f32> = x
            .chunks(COLUMNS)
            .flat_map(|x| multiply(Isa::Portable, 1, precision, &matrix, x))
            .collect();
        for isa in Isa::available() {
            for (n_threads, n) in [(1, TOKENS), (2, 1), (3, 5), (2, 13), (1, 24), (3, TOKENS)] {
                let batch = multiply(isa, n_threads, precision, &matrix, &x[..n * COLUMNS]);
                assert_eq!(
                    bits(&batch),
                    bits(&alone[..n * ROWS]),
                    "{format:?} {isa:?} {n_threads} {n}"
                );
            }
        }
    }
}

/// Balanced over 6 leaves of 128 columns: ((0 1) 2) ((3 4) 5), by hand.
const MERGES: [u8; 6] = [0, 1, 1, 0, 1, 2];

#[test]
fn parts_of_a_split_sum_to_the_bits_of_the_whole() {
    let x = input(TOKENS);
    for (format, precision) in CASES {
        let mut random = Random::new(format, ROWS, COLUMNS);
        let whole = Matrix::pack(ROWS, COLUMNS, &random);
        let mut want = vec![0.0; TOKENS * ROWS];
        let mut scratch = Activation::with_capacity(x.len() / COLUMNS, COLUMNS, precision);
        let mut pool = Pool::new(2, false);
        linear_parts(
            &mut pool,
            Isa::detect(),
            Input { x: &x, rows: TOKENS, columns: COLUMNS, scratch: &mut scratch },
            Projection { weight: &whole, out: &mut want },
            &Sum { leaf_columns: 128, part_leaves: &[6], merges: &MERGES },
        );
        // The right half on another rank, whose columns begin at 384; and the left half as two
        // parts.
        random.first = 384;
        let right = Matrix::pack(ROWS, 384, &random);
        let halves: Vec<Vec<f32>> = (0..2)
            .map(|h| x.chunks(COLUMNS).flat_map(|x| x[h * 384..(h + 1) * 384].to_vec()).collect())
            .collect();
        let mut sum_right = vec![0.0; TOKENS * ROWS];
        linear_parts(
            &mut pool,
            Isa::Portable,
            Input { x: &halves[1], rows: TOKENS, columns: 384, scratch: &mut scratch },
            Projection { weight: &right, out: &mut sum_right },
            &Sum { leaf_columns: 128, part_leaves: &[3], merges: &[0, 1, 1] },
        );
        random.first = 0;
        let left = Matrix::pack(ROWS, 384, &random);
        let mut parts_left = vec![0.0; 2 * TOKENS * ROWS];
        linear_parts(
            &mut pool,
            Isa::detect(),
            Input { x: &halves[0], rows: TOKENS, columns: 384, scratch: &mut scratch },
            Projection { weight: &left, out: &mut parts_left },
            &Sum { leaf_columns: 128, part_leaves: &[2, 1], merges: &[0, 1, 0] },
        );
        let (first, second) = parts_left.split_at(TOKENS * ROWS);
        let sum: Vec<f32> =
            (0..sum_right.len()).map(|i| (first[i] + second[i]) + sum_right[i]).collect();
        assert_eq!(bits(&sum), bits(&want), "{format:?}");
    }
}

#[test]
fn rows_read_back_as_the_file_has_them() {
    for (format, _) in CASES {
        let random = Random::new(format, ROWS, COLUMNS);
        let matrix = Matrix::pack(ROWS, COLUMNS, &random);
        let mut out = vec![0.0; COLUMNS];
        for row in 0..ROWS {
            matrix.dequantise_row(row, &mut out);
            for (k, &got) in out.iter().enumerate() {
                let want = random.weight(row, k);
                assert!(
                    (f64::from(got) - want).abs() < 1e-6 * (1.0 + want.abs()),
                    "{format:?} {row} {k}: {got} {want}"
                );
            }
        }
    }
}

#[test]
fn a_nan_activation_reaches_the_output() {
    let mut x = input(1);
    x[100] = f32::NAN;
    let matrix = Matrix::pack(ROWS, COLUMNS, &Random::new(Format::Q4_1, ROWS, COLUMNS));
    for precision in [Precision::Int8, Precision::Int12] {
        let out = multiply(Isa::detect(), 1, precision, &matrix, &x);
        assert!(out.iter().all(|v| v.is_nan()), "{precision:?}");
    }
}
