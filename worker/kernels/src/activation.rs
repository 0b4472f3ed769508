//! Activations as int8: blocks of 32 columns, each with its scale and its sum.
//!
//! The scheme of ggml's Q8_1 with f32 scales: `d = max|x| / 127`, `q = round(x / d)`. A row's blocks
//! depend on that row alone.

use crate::isa::{Isa, dispatch};

/// Columns of a block.
pub const BLOCK: usize = 32;

/// Quantised rows; memory for the largest step is allocated once.
#[derive(Debug)]
pub struct Activation {
    /// `[rows, columns]`
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
    q: &'a mut [i8],
    d: &'a mut [f32],
    s: &'a mut [f32],
    isum: &'a mut [i32],
}

impl Activation {
    /// Memory for `capacity` numbers (rows times columns, of the largest step).
    #[must_use]
    pub fn with_capacity(capacity: usize) -> Self {
        let n_blocks = capacity.div_ceil(BLOCK);
        Self {
            q: vec![0; capacity],
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
        assert!(rows * columns <= self.q.len(), "{rows} x {columns} exceeds the capacity");
        self.rows = rows;
        self.columns = columns;
    }

    /// The rows `range`, to be written by one thread each.
    pub fn rows_mut(&mut self) -> impl Iterator<Item = RowMut<'_>> {
        let n_blocks = self.columns / BLOCK;
        let (n, b) = (self.rows * self.columns, self.rows * n_blocks);
        self.q[..n]
            .chunks_mut(self.columns.max(1))
            .zip(self.d[..b].chunks_mut(n_blocks.max(1)))
            .zip(self.s[..b].chunks_mut(n_blocks.max(1)))
            .zip(self.isum[..b].chunks_mut(n_blocks.max(1)))
            .map(|(((q, d), s), isum)| RowMut { q, d, s, isum })
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
    for (b, x) in x.chunks_exact(BLOCK).enumerate() {
        let q = &mut row.q[b * BLOCK..(b + 1) * BLOCK];
        let mut max = 0f32;
        // 0, or NaN if any value is NaN or infinite: it must reach the logits, where it is caught.
        let mut poison = 0f32;
        for &value in x {
            max = if value.abs() > max { value.abs() } else { max };
            poison += value * 0.0;
        }
        let d = max / 127.0 + poison;
        let inverse = if max > 0.0 { 1.0 / d } else { 0.0 };
        let mut sum = 0i32;
        for (q, &value) in q.iter_mut().zip(x) {
            // Ties go to even; 12582912 = 1.5 * 2^23 makes the mantissa the integer.
            let rounded = (value * inverse + 12_582_912.0).to_bits() as i32 - 0x4b40_0000;
            *q = rounded as i8;
            sum += i32::from(*q);
        }
        row.d[b] = d;
        row.s[b] = d * sum as f32;
        row.isum[b] = sum;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows() -> Vec<f32> {
        let mut x: Vec<f32> =
            (0..4 * 64).map(|i| ((i * 7919 % 1000) as f32 - 500.0) / 37.0).collect();
        x[..32].fill(0.0);
        x[40] = -1e30;
        x
    }

    #[test]
    fn quantised_blocks_are_within_half_a_step() {
        let x = rows();
        let mut a = Activation::with_capacity(x.len());
        a.quantise(Isa::detect(), &x, 4, 64);
        for (i, &value) in x.iter().enumerate() {
            let d = a.d[i / BLOCK];
            let back = d * f32::from(a.q[i]);
            assert!((back - value).abs() <= 0.5001 * d, "{value} became {back} with step {d}");
        }
        assert_eq!(&a.q[..32], &[0; 32]);
        assert_eq!(a.isum[1], a.q[32..64].iter().map(|&q| i32::from(q)).sum::<i32>());
    }

    #[test]
    fn all_instruction_sets_quantise_to_the_same_bits() {
        let x = rows();
        let mut first = Activation::with_capacity(x.len());
        first.quantise(Isa::Portable, &x, 4, 64);
        for isa in Isa::available() {
            let mut other = Activation::with_capacity(x.len());
            other.quantise(isa, &x, 4, 64);
            assert_eq!(first.q, other.q, "{isa:?}");
            assert_eq!(first.d, other.d, "{isa:?}");
            assert_eq!(first.s, other.s, "{isa:?}");
        }
    }
}
