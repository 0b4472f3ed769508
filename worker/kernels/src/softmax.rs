//! Weights of a softmax over a row of logits: exponentials, not yet divided by their sum.

use crate::isa::{Isa, dispatch};
use crate::lanes::LANES;
use crate::math::exp;
use crate::peaks::STRETCH;

/// `e^((logit - highest) * scale)`; `highest` is the row's largest, `scale` finite.
#[inline(always)]
#[must_use]
pub fn weight(logit: f32, highest: f32, scale: f32) -> f32 {
    exp((logit - highest) * scale)
}

/// Replaces `weights` by the [`weight`] of each logit, and `sums` by their sum over each stretch of
/// 1024: sixteen lanes, then the lanes in order.
///
/// # Panics
/// If lengths disagree.
pub fn weigh(
    isa: Isa,
    logits: &[f32],
    highest: f32,
    scale: f32,
    weights: &mut [f32],
    sums: &mut [f64],
) {
    assert!(weights.len() == logits.len() && sums.len() == logits.len().div_ceil(STRETCH));
    dispatch!(isa, fn(
        logits: &[f32], highest: f32, scale: f32, weights: &mut [f32], sums: &mut [f64],
    ) => {
        let stretches = logits.chunks(STRETCH).zip(weights.chunks_mut(STRETCH)).zip(sums);
        for ((logits, weights), total) in stretches {
            let mut lanes = [0f64; LANES];
            let (logits, logits_left) = logits.as_chunks::<LANES>();
            let (weights, weights_left) = weights.as_chunks_mut::<LANES>();
            for (logits, weights) in logits.iter().zip(weights) {
                for lane in 0..LANES {
                    weights[lane] = weight(logits[lane], highest, scale);
                    lanes[lane] += f64::from(weights[lane]);
                }
            }
            for (lane, (logit, out)) in logits_left.iter().zip(weights_left).enumerate() {
                *out = weight(*logit, highest, scale);
                lanes[lane] += f64::from(*out);
            }
            *total = lanes.iter().sum();
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_exponentials_and_the_same_bits_everywhere() {
        let logits: Vec<f32> = (0..5003).map(|i| (i * 7919 % 5003) as f32 * -0.01).collect();
        let mut first: Option<(Vec<f32>, Vec<f64>)> = None;
        for isa in Isa::available() {
            let (mut weights, mut sums) = (vec![9.0; logits.len()], vec![9.0; 5]);
            weigh(isa, &logits, 0.0, 1.25, &mut weights, &mut sums);
            for (stretch, sum) in weights.chunks(STRETCH).zip(&sums) {
                let plain: f64 = stretch.iter().map(|&weight| f64::from(weight)).sum();
                assert!((plain - sum).abs() <= 1e-12 * plain);
            }
            for (&weight, &logit) in weights.iter().zip(&logits) {
                let truth = (f64::from(logit) * 1.25).exp();
                assert!((f64::from(weight) - truth).abs() < 2e-5 * truth, "{weight} {truth}");
            }
            let first = first.get_or_insert_with(|| (weights.clone(), sums.clone()));
            assert!(weights.iter().zip(&first.0).all(|(a, b)| a.to_bits() == b.to_bits()));
            assert!(sums.iter().zip(&first.1).all(|(a, b)| a.to_bits() == b.to_bits()));
        }
    }
}
