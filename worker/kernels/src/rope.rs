//! Rotary position embedding (Su et al. 2021, "RoFormer", section 3.2.2).

use crate::isa::{Isa, dispatch};

/// Which columns of a head form a rotated pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pairs {
    /// (0, 1), (2, 3), ...
    Adjacent,
    /// (0, d/2), (1, d/2 + 1), ...
    Halves,
}

/// Rotates every head of one row in place. `row` is `[heads, head_dim]`; `cos` and `sin` are those
/// of the row's position, one per pair; columns beyond the pairs stay as they are.
///
/// # Panics
/// If a head has fewer columns than its pairs, or `cos` and `sin` differ in length.
pub fn rotate(isa: Isa, row: &mut [f32], head_dim: usize, pairs: Pairs, cos: &[f32], sin: &[f32]) {
    assert!(cos.len() == sin.len() && 2 * cos.len() <= head_dim, "{} pairs", cos.len());
    dispatch!(isa, fn(row: &mut [f32], head_dim: usize, pairs: Pairs, cos: &[f32], sin: &[f32]) => {
        for head in row.chunks_exact_mut(head_dim) {
            match pairs {
                Pairs::Adjacent => adjacent(head, cos, sin),
                Pairs::Halves => halves(head, cos, sin),
            }
        }
    });
}

#[inline(always)]
fn adjacent(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (pairs, _) = head.as_chunks_mut::<2>();
    for ((pair, &cos), &sin) in pairs.iter_mut().zip(cos).zip(sin) {
        *pair = turn(*pair, cos, sin);
    }
}

#[inline(always)]
fn halves(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (xs, ys) = head.split_at_mut(cos.len());
    for (((x, y), &cos), &sin) in xs.iter_mut().zip(ys).zip(cos).zip(sin) {
        [*x, *y] = turn([*x, *y], cos, sin);
    }
}

#[inline(always)]
fn turn([x, y]: [f32; 2], cos: f32, sin: f32) -> [f32; 2] {
    [x.mul_add(cos, -(y * sin)), x.mul_add(sin, y * cos)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotation_keeps_lengths_and_turns_each_pair_by_its_angle() {
        let (cos, sin): (Vec<f32>, Vec<f32>) =
            [0.3f32, 1.1].iter().map(|a| (a.cos(), a.sin())).unzip();
        for isa in Isa::available() {
            for (pairs, partner) in [(Pairs::Adjacent, [1, 3]), (Pairs::Halves, [2, 3])] {
                let mut row = vec![1.0, 0.0, 0.0, 0.0, 9.0];
                rotate(isa, &mut row, 5, pairs, &cos, &sin);
                assert!((row[0] - cos[0]).abs() < 1e-7 && (row[partner[0]] - sin[0]).abs() < 1e-7);
                assert_eq!(row[4], 9.0, "columns beyond the pairs do not turn");
            }
        }
    }

    #[test]
    fn every_instruction_set_turns_to_the_same_bits() {
        let angles: Vec<f32> = (0..37).map(|i| i as f32 * 0.31).collect();
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|a| (a.cos(), a.sin())).unzip();
        for pairs in [Pairs::Adjacent, Pairs::Halves] {
            let row: Vec<f32> = (0..3 * 80).map(|i| (i * 37 % 101) as f32 / 7.0 - 6.0).collect();
            let mut want = row.clone();
            for head in want.chunks_exact_mut(80) {
                for i in 0..37 {
                    let (a, b) = match pairs {
                        Pairs::Adjacent => (2 * i, 2 * i + 1),
                        Pairs::Halves => (i, i + 37),
                    };
                    [head[a], head[b]] = turn([head[a], head[b]], cos[i], sin[i]);
                }
            }
            for isa in Isa::available() {
                let mut got = row.clone();
                rotate(isa, &mut got, 80, pairs, &cos, &sin);
                assert!(got.iter().zip(&want).all(|(a, b)| a.to_bits() == b.to_bits()), "{isa:?}");
            }
        }
    }
}
