//! Rotary position embedding (Su et al. 2021, "RoFormer", section 3.2.2).

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
pub fn rotate(row: &mut [f32], head_dim: usize, pairs: Pairs, cos: &[f32], sin: &[f32]) {
    let n = cos.len();
    for head in row.chunks_exact_mut(head_dim) {
        for i in 0..n {
            let (a, b) = match pairs {
                Pairs::Adjacent => (2 * i, 2 * i + 1),
                Pairs::Halves => (i, i + n),
            };
            let (x, y) = (head[a], head[b]);
            head[a] = x.mul_add(cos[i], -(y * sin[i]));
            head[b] = x.mul_add(sin[i], y * cos[i]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotation_keeps_lengths_and_turns_each_pair_by_its_angle() {
        let (cos, sin): (Vec<f32>, Vec<f32>) =
            [0.3f32, 1.1].iter().map(|a| (a.cos(), a.sin())).unzip();
        for (pairs, partner) in [(Pairs::Adjacent, [1, 3]), (Pairs::Halves, [2, 3])] {
            let mut row = vec![1.0, 0.0, 0.0, 0.0, 9.0];
            rotate(&mut row, 5, pairs, &cos, &sin);
            assert!((row[0] - cos[0]).abs() < 1e-7 && (row[partner[0]] - sin[0]).abs() < 1e-7);
            assert_eq!(row[4], 9.0, "columns beyond the pairs do not turn");
        }
    }
}
