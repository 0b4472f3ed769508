//! Cosines and sines of every position so far, each made once. By libm's own functions, so that all
//! machines turn by the same angle.

use evener_kernels::Pool;

use crate::model::config::Rope;

/// The rotations of positions `0..n_known`.
#[derive(Debug, Default)]
pub(super) struct Angles {
    /// Radians a position, by pair.
    frequencies: Vec<f64>,
    /// `[position, cosines of the pairs then their sines]`; memory of positions not yet seen is
    /// asked for but never touched.
    table: Vec<f32>,
    n_known: usize,
}

impl Angles {
    pub(super) fn new(rope: Option<Rope>, max_context: usize) -> Self {
        let Some(rope) = rope else { return Self::default() };
        let exponent = |pair: usize| -2.0 * pair as f64 / rope.dim as f64;
        let frequency = |pair| libm::pow(f64::from(rope.theta), exponent(pair));
        let frequencies: Vec<f64> = (0..rope.dim / 2).map(frequency).collect();
        let table = vec![0.0; max_context * 2 * frequencies.len()];
        Self { frequencies, table, n_known: 0 }
    }

    /// Makes what positions below `end` still lack.
    pub(super) fn extend(&mut self, pool: &mut Pool, end: usize) {
        let n = self.frequencies.len();
        if n == 0 || end <= self.n_known {
            return;
        }
        let (first, frequencies) = (self.n_known, &self.frequencies);
        let new = &mut self.table[first * 2 * n..end * 2 * n];
        pool.for_rows(new, 2 * n, &|row, angles| {
            let (cos, sin) = angles.split_at_mut(n);
            for (i, frequency) in frequencies.iter().enumerate() {
                let angle = (first + row) as f64 * frequency;
                cos[i] = libm::cos(angle) as f32;
                sin[i] = libm::sin(angle) as f32;
            }
        });
        self.n_known = end;
    }

    /// Cosines and sines of one position, by pair.
    pub(super) fn at(&self, position: usize) -> (&[f32], &[f32]) {
        let n = self.frequencies.len();
        assert!(position < self.n_known, "position {position} was not announced");
        self.table[position * 2 * n..][..2 * n].split_at(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn angles_do_not_depend_on_when_and_by_whom_they_were_made() {
        let rope = || {
            Some(Rope { dim: 8, theta: 10_000.0, pairs: crate::model::config::RopePairs::Halves })
        };
        let mut at_once = Angles::new(rope(), 600);
        at_once.extend(&mut Pool::new(1, false), 600);
        let (mut bit_by_bit, mut pool) = (Angles::new(rope(), 600), Pool::new(2, false));
        for end in [1, 3, 2, 599, 600] {
            bit_by_bit.extend(&mut pool, end);
        }
        for position in 0..600 {
            assert_eq!(at_once.at(position), bit_by_bit.at(position));
        }
        let (cos, sin) = at_once.at(7);
        assert!((cos[0] - 7f32.cos()).abs() < 1e-6 && (sin[0] - 7f32.sin()).abs() < 1e-6);
    }
}
