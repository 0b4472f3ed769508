//! One linear layer alone: how fast each format multiplies 1 to many rows, with the weights near
//! (a core's second-level cache) or far (memory).

use std::time::Instant;

use super::bandwidth::Buffer;
use crate::activation::{Activation, Precision};
use crate::isa::Isa;
use crate::linear::{Input, Projection, linear};
use crate::matrix::{Matrix, Source};
use crate::pool::Pool;
use crate::quant::Format;

/// Measurements of each case, of which the best counts: whatever else the machine does only adds.
const N_NEAR: usize = 31;
const N_FAR: usize = 7;

/// Where the weights are when a run begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In caches, from the run before.
    Near,
    /// In memory: more than caches hold was read since.
    Far,
}

/// What to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Case {
    pub format: Format,
    /// Rows and columns of the weights; columns a multiple of 256.
    pub rows: usize,
    pub columns: usize,
    /// Rows of activations.
    pub m: usize,
    pub place: Place,
}

/// How fast it went.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Figure {
    pub case: Case,
    /// Seconds of the fastest run.
    pub seconds: f64,
    /// Of the weights in a file.
    pub weight_bytes: usize,
}

impl Figure {
    /// Of the weights.
    #[must_use]
    pub fn bytes_per_s(&self) -> f64 {
        self.weight_bytes as f64 / self.seconds
    }

    /// A multiplication and an addition for each weight and row of activations.
    #[must_use]
    pub fn ops_per_s(&self) -> f64 {
        2.0 * (self.case.rows * self.case.columns * self.case.m) as f64 / self.seconds
    }
}

/// Measures one format's weights of one shape with several numbers of rows of activations, of which
/// `precision` are the integers.
///
/// # Panics
/// If a shape cannot be, or the format is that of no file.
pub fn measure(
    pool: &mut Pool,
    far: &Buffer,
    precision: Precision,
    format: Format,
    [rows, columns]: [usize; 2],
    ms: &[usize],
    place: Place,
) -> Vec<Figure> {
    let isa = Isa::detect();
    let source = Random::new(format, rows, columns);
    let weight = Matrix::pack(rows, columns, &source);
    let most = ms.iter().copied().max().unwrap_or(0);
    let mut scratch = Activation::with_capacity(most, columns, precision);
    let mut figures = Vec::with_capacity(ms.len());
    for &m in ms {
        let x: Vec<f32> = (0..m * columns).map(|i| (i % 17) as f32 / 8.0 - 1.0).collect();
        let mut out = vec![0f32; m * rows];
        let mut run = |pool: &mut Pool| {
            if place == Place::Far {
                far.read(pool, isa);
            }
            let start = Instant::now();
            let input = Input { x: &x, rows: m, columns, scratch: &mut scratch };
            linear(pool, isa, input, &mut [Projection { weight: &weight, out: &mut out }]);
            start.elapsed().as_secs_f64()
        };
        run(pool);
        let n = if place == Place::Far { N_FAR } else { N_NEAR };
        let seconds = (0..n).map(|_| run(pool)).fold(f64::INFINITY, f64::min);
        figures.push(Figure {
            case: Case { format, rows, columns, m, place },
            seconds,
            weight_bytes: source.bytes.len(),
        });
    }
    figures
}

/// Blocks of random integers under scales that are small and finite.
struct Random {
    format: Format,
    row_bytes: usize,
    bytes: Vec<u8>,
}

impl Random {
    fn new(format: Format, rows: usize, columns: usize) -> Self {
        assert!(columns.is_multiple_of(256), "{columns} columns are not whole blocks");
        let row_bytes = columns / format.block_len() * format.block_bytes();
        let mut state = 1u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        };
        let mut bytes: Vec<u8> = (0..rows * row_bytes).map(|_| next()).collect();
        let (floats, each): (&[usize], u8) = match format {
            // The top byte of a float: a small one.
            Format::F32 => (&[3], 0x3c),
            Format::Bf16 => (&[1], 0x3c),
            Format::F16 => (&[1], 0x24),
            Format::Q4_0 | Format::Q5_0 | Format::Q8_0 => (&[1], 0x0c),
            Format::Q4_1 | Format::Q5_1 | Format::Q4K | Format::Q5K => (&[1, 3], 0x0c),
            Format::Q6K => (&[209], 0x0c),
            Format::Fp8 => unreachable!("a processor keeps FP8 as bf16"),
        };
        for block in bytes.chunks_exact_mut(format.block_bytes()) {
            floats.iter().for_each(|&at| block[at] = each);
        }
        Self { format, row_bytes, bytes }
    }
}

impl Source for Random {
    fn format(&self) -> Format {
        self.format
    }

    fn row_blocks(&self, row: usize) -> &[u8] {
        &self.bytes[row * self.row_bytes..(row + 1) * self.row_bytes]
    }

    fn first_column(&self) -> usize {
        0
    }

    /// Asked for where the format is held as f32: any small numbers will do.
    fn row_f32(&self, row: usize, out: &mut [f32]) {
        let bytes = self.row_blocks(row);
        let small = |i: usize| f32::from(bytes[i % bytes.len()]) / 4096.0;
        out.iter_mut().enumerate().for_each(|(i, out)| *out = small(i));
    }
}
