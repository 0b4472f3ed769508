//! The loop over parts, leaves and blocks of 32 columns, for any accumulator of M rows.

/// `$block(b, &mut acc)` adds the products of a block; `$add` adds two sums of one row, `$lanes`
/// takes a sum out of its registers, and `$store(part, row, &lanes)` gets it.
macro_rules! sum_leaves {
    ($M:ident, $sum:expr, $zero:expr, $add:expr, $lanes:expr, $block:expr, $store:expr) => {{
        // Not cleared: a pass is done in some microseconds, and clearing this would show.
        let mut stack = [const { std::mem::MaybeUninit::uninit() }; $crate::linear::MAX_DEPTH];
        let n_blocks = $sum.leaf_columns / $crate::activation::BLOCK;
        let (mut leaf, mut b) = (0, 0);
        for (p, &n_leaves) in $sum.part_leaves.iter().enumerate() {
            let mut top = 0;
            for _ in 0..n_leaves {
                let mut acc = [$zero; $M];
                for _ in 0..n_blocks {
                    $block(b, &mut acc);
                    b += 1;
                }
                for _ in 0..$sum.merges[leaf] {
                    top -= 1;
                    let left: [_; $M] =
                        // SAFETY: `check_sum` saw that merges find sums that were written.
                        unsafe { stack[top].assume_init() };
                    for m in 0..$M {
                        acc[m] = $add(left[m], acc[m]);
                    }
                }
                stack[top].write(acc);
                top += 1;
                leaf += 1;
            }
            if n_leaves > 0 {
                let total: [_; $M] =
                    // SAFETY: the part's leaves were merged into the first place.
                    unsafe { stack[0].assume_init() };
                for m in 0..$M {
                    $store(p, m, &$lanes(total[m]));
                }
            }
        }
    }};
}
pub(crate) use sum_leaves;
