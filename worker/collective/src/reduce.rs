//! Carries out a reduce plan's additions, element by element, a cache-sized block at a time.
//!
//! The order is fixed per element, so blocks and vector lanes change no bit.

use crate::ReducePlan;
use crate::tree::{Add, Operand};

const BLOCK: usize = 1024; // elements; a block of each slot stays in the first-level cache

/// Numbers `sum` needs beside its operands.
pub(crate) fn scratch_len(plan: &ReducePlan) -> usize {
    (plan.n_slots() - 1) * BLOCK
}

/// `out` = the plan's sum of `part(i)`, each as long as `out`. `scratch` is at least `scratch_len`.
pub(crate) fn sum<'a>(
    plan: &ReducePlan,
    part: impl Fn(usize) -> &'a [f32],
    out: &mut [f32],
    scratch: &mut [f32],
) {
    if plan.adds().is_empty() {
        out.copy_from_slice(part(0));
        return;
    }
    for (block_idx, out) in out.chunks_mut(BLOCK).enumerate() {
        let at = block_idx * BLOCK;
        let n = out.len();
        for add in plan.adds() {
            add_block(add, |i| &part(i)[at..at + n], out, scratch);
        }
    }
}

/// Slot 0 is `out`, slot i is the i-th block of `scratch`, counted from one.
fn add_block<'a>(
    add: &Add,
    part: impl Fn(usize) -> &'a [f32],
    out: &mut [f32],
    scratch: &mut [f32],
) {
    let n = out.len();
    let (into, above): (&mut [f32], &[f32]) = if add.into == 0 {
        (out, scratch)
    } else {
        let (below, above) = scratch.split_at_mut(add.into * BLOCK);
        (&mut below[(add.into - 1) * BLOCK..][..n], above)
    };
    let right = match add.right {
        Operand::Part(i) => part(i),
        Operand::Slot(_) => &above[..n],
    };
    match add.left {
        Operand::Part(i) => {
            for ((sum, left), right) in into.iter_mut().zip(part(i)).zip(right) {
                *sum = left + right;
            }
        }
        Operand::Slot(_) => {
            for (sum, right) in into.iter_mut().zip(right) {
                *sum += right;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SumTree;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};
    use std::ops::Range;

    /// The sum of `leaves[part]` by the stack program that kernels use.
    fn by_stack(tree: &SumTree, part: Range<usize>, leaves: &[Vec<f32>], len: usize) -> Vec<f32> {
        let mut stack: Vec<Vec<f32>> = Vec::new();
        for (leaf, n_merges) in part.clone().zip(tree.merges(part)) {
            stack.push(leaves[leaf].clone());
            for _ in 0..n_merges {
                let (right, left) = (stack.pop(), stack.pop());
                let pairs = left.iter().flatten().zip(right.iter().flatten());
                stack.push(pairs.map(|(left, right)| left + right).collect());
            }
        }
        assert_eq!(stack.len(), 1);
        let sum = stack.remove(0);
        assert_eq!(sum.len(), len);
        sum
    }

    fn bits(numbers: &[f32]) -> Vec<u32> {
        numbers.iter().map(|number| number.to_bits()).collect()
    }

    fn random_ranges(rng: &mut StdRng, n_leaves: usize, world_size: usize) -> Vec<Range<usize>> {
        let mut cuts: Vec<usize> =
            (1..world_size).map(|_| rng.random_range(0..=n_leaves)).collect();
        cuts.extend([0, n_leaves]);
        cuts.sort_unstable();
        cuts.windows(2).map(|pair| pair[0]..pair[1]).collect()
    }

    #[test]
    fn any_split_gives_the_bits_of_the_whole_tree() {
        let seed: u64 = rand::random();
        println!("seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        for _ in 0..300 {
            let groups: Vec<usize> =
                (0..rng.random_range(1..6)).map(|_| rng.random_range(1..12)).collect();
            let tree = SumTree::nested(&groups);
            let len = [0, 1, 5, 1024, 2500][rng.random_range(0..5)];
            let leaves: Vec<Vec<f32>> = (0..tree.n_leaves())
                .map(|_| {
                    let scale = 10f32.powi(rng.random_range(-6..6));
                    (0..len).map(|_| rng.random_range(-1.0..1.0) * scale).collect()
                })
                .collect();
            let whole = by_stack(&tree, 0..tree.n_leaves(), &leaves, len);

            let world_size = rng.random_range(1..9);
            let ranges = random_ranges(&mut rng, tree.n_leaves(), world_size);
            let plan = ReducePlan::new(&tree, &ranges);
            let parts: Vec<Vec<f32>> = (0..world_size)
                .flat_map(|rank| plan.parts(rank).to_vec())
                .map(|part| by_stack(&tree, part, &leaves, len))
                .collect();
            let mut out = vec![f32::NAN; len];
            let mut scratch = vec![f32::NAN; scratch_len(&plan)];
            sum(&plan, |i| &parts[i], &mut out, &mut scratch);
            assert_eq!(bits(&out), bits(&whole), "{groups:?} {ranges:?}");
        }
    }

    #[test]
    fn any_order_adds_in_rank_order() {
        let parts = [[1e8f32], [1.0], [-1e8], [0.25]];
        let plan = ReducePlan::any_order(4);
        let mut out = [0.0];
        let mut scratch = vec![0.0; scratch_len(&plan)];
        sum(&plan, |i| &parts[i], &mut out, &mut scratch);
        assert_eq!(out, [((1e8f32 + 1.0) - 1e8) + 0.25]);
    }
}
