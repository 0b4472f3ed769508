//! Activations as integers: blocks of 32 columns, each with its scale and its sum. A row's blocks
//! depend on that row alone.
//!
//! 8 bits are the scheme of ggml's Q8_1 with f32 scales: `d = max|x| / 127`, `q = round(x / d)`. 16 bits
//! are two int8 terms, `q = 256 * high + low`, for the same instructions twice; weights are read
//! once.

use crate::isa::{Isa, dispatch};

/// Columns of a block.
pub const BLOCK: usize = 32;

/// Bits of a quantised activation. 8 round as most CPU engines do and move a small model's choice
/// at some 4 % of positions; 16 are as good as f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    Int8,
    Int16,
}

impl Precision {
    /// int8 terms of one activation.
    pub(crate) fn terms(self) -> usize {
        match self {
            Self::Int8 => 1,
            Self::Int16 => 2,
        }
    }

    /// Largest integer: the low term of 16 bits reaches from -128 to 127, so the high one stays
    /// within int8.
    fn limit(self) -> f32 {
        match self {
            Self::Int8 => 127.0,
            Self::Int16 => 127.0 * 256.0,
        }
    }
}

/// Quantised rows; memory for the largest step is allocated once.
#[derive(Debug)]
pub struct Activation {
    pub(crate) precision: Precision,
    /// `[rows, columns / 32, terms, 32]`, the high term first
    pub(crate) q: Vec<i8>,
    /// Scale of each block. `[rows, columns / 32]`
    pub(crate) d: Vec<f32>,
    /// `d` times the sum of the block's integers. `[rows, columns / 32]`
    pub(crate) s: Vec<f32>,
    /// Sum of the block's integers. `[rows, columns / 32]`
    pub(crate) isum: Vec<i32>,
    pub(crate) columns: usize,
    pub(crate) rows: usize,
}

/// One row of an [`Activation`] to be written.
pub struct RowMut<'a> {
    precision: Precision,
    q: &'a mut [i8],
    d: &'a mut [f32],
    s: &'a mut [f32],
    isum: &'a mut [i32],
}

impl Activation {
    /// Memory for `capacity` numbers (rows times columns, of the largest step).
    #[must_use]
    pub fn with_capacity(capacity: usize, precision: Precision) -> Self {
        let n_blocks = capacity.div_ceil(BLOCK);
        Self {
            precision,
            q: vec![0; n_blocks * BLOCK * precision.terms()],
            d: vec![0.0; n_blocks],
            s: vec![0.0; n_blocks],
            isum: vec![0; n_blocks],
            columns: 0,
            rows: 0,
        }
    }

    /// Sets the shape of what follows.
    ///
    /// # Panics
    /// If the shape needs more than the capacity, or `columns` is not a multiple of 32.
    pub fn reshape(&mut self, rows: usize, columns: usize) {
        assert!(columns.is_multiple_of(BLOCK), "{columns} columns are not whole blocks");
        assert!(rows * columns <= self.d.len() * BLOCK, "{rows} x {columns} exceeds the capacity");
        self.rows = rows;
        self.columns = columns;
    }

    /// The rows `range`, to be written by one thread each.
    pub fn rows_mut(&mut self) -> impl Iterator<Item = RowMut<'_>> {
        let (n_blocks, precision) = (self.columns / BLOCK, self.precision);
        let width = self.columns * precision.terms();
        let (n, b) = (self.rows * width, self.rows * n_blocks);
        self.q[..n]
            .chunks_mut(width.max(1))
            .zip(self.d[..b].chunks_mut(n_blocks.max(1)))
            .zip(self.s[..b].chunks_mut(n_blocks.max(1)))
            .zip(self.isum[..b].chunks_mut(n_blocks.max(1)))
            .map(move |(((q, d), s), isum)| RowMut { precision, q, d, s, isum })
    }

    /// Quantises `input` (`[rows, columns]`, row-major).
    pub fn quantise(&mut self, isa: Isa, input: &[f32], rows: usize, columns: usize) {
        self.reshape(rows, columns);
        for (row, x) in self.rows_mut().zip(input.chunks(columns.max(1))) {
            quantise_row(isa, x, row);
        }
    }
}

/// Quantises one row.
pub fn quantise_row(isa: Isa, x: &[f32], row: RowMut<'_>) {
    dispatch!(isa, fn(x: &[f32], row: RowMut<'_>) => quantise_row_generic(x, row));
}

#[inline(always)]
fn quantise_row_generic(x: &[f32], row: RowMut<'_>) {
    let (terms, limit) = (row.precision.terms(), row.precision.limit());
    for (b, x) in x.chunks_exact(BLOCK).enumerate() {
        let q = &mut row.q[b * BLOCK * terms..(b + 1) * BLOCK * terms];
        let mut max = 0f32;
        // 0, or NaN if any value is NaN or infinite: it must reach the logits, where it is caught.
        let mut poison = 0f32;
        for &value in x {
            max = if value.abs() > max { value.abs() } else { max };
            poison += value * 0.0;
        }
        let d = max / limit + poison;
        let inverse = if max > 0.0 { 1.0 / d } else { 0.0 };
        let mut integers = [0i32; BLOCK];
        let mut sum = 0i32;
        for (integer, &value) in integers.iter_mut().zip(x) {
            // Ties go to even; 12582912 = 1.5 * 2^23 makes the mantissa the integer.
            let rounded = value * inverse + 12_582_912.0;
            *integer = (rounded.to_bits() as i32).wrapping_sub(0x4b40_0000);
            sum = sum.wrapping_add(*integer);
        }
        match row.precision {
            Precision::Int8 => {
                for (q, integer) in q.iter_mut().zip(integers) {
                    *q = integer as i8;
                }
            }
            Precision::Int16 => {
                let (high, low) = q.split_at_mut(BLOCK);
                for (k, &integer) in integers.iter().enumerate() {
                    high[k] = (integer.wrapping_add(128) >> 8) as i8;
                    low[k] = integer as i8;
                }
            }
        }
        row.d[b] = d;
        row.s[b] = d * sum as f32;
        row.isum[b] = sum;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRECISIONS: [Precision; 2] = [Precision::Int8, Precision::Int16];

    fn rows() -> Vec<f32> {
        let mut x: Vec<f32> =
            (0..4 * 64).map(|i| ((i * 7919 % 1000) as f32 - 500.0) / 37.0).collect();
        x[..32].fill(0.0);
        x[40] = -1e30;
        x
    }

    fn quantised(isa: Isa, precision: Precision, x: &[f32]) -> Activation {
        let mut activation = Activation::with_capacity(x.len(), precision);
        activation.quantise(isa, x, 4, 64);
        activation
    }

    #[test]
    fn quantised_blocks_are_within_half_a_step() {
        let x = rows();
        for precision in PRECISIONS {
            let a = quantised(Isa::detect(), precision, &x);
            let terms = precision.terms();
            for (b, x) in x.chunks(BLOCK).enumerate() {
                let q = &a.q[b * BLOCK * terms..][..BLOCK * terms];
                let integer = |k: usize| match precision {
                    Precision::Int8 => i32::from(q[k]),
                    Precision::Int16 => 256 * i32::from(q[k]) + i32::from(q[BLOCK + k]),
                };
                for (k, &value) in x.iter().enumerate() {
                    let back = a.d[b] * integer(k) as f32;
                    let bound = 0.5001 * a.d[b] + 1e-6 * value.abs();
                    assert!((back - value).abs() <= bound, "{precision:?}: {value} became {back}");
                }
                assert_eq!(a.isum[b], (0..BLOCK).map(integer).sum::<i32>());
            }
        }
    }

    #[test]
    fn all_instruction_sets_quantise_to_the_same_bits() {
        let x = rows();
        for precision in PRECISIONS {
            let first = quantised(Isa::Portable, precision, &x);
            for isa in Isa::available() {
                let other = quantised(isa, precision, &x);
                assert_eq!(first.q, other.q, "{isa:?}");
                assert_eq!(first.d, other.d, "{isa:?}");
                assert_eq!(first.s, other.s, "{isa:?}");
            }
        }
    }
}
