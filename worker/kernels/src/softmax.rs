//! Masses of a softmax: exponentials as integers, so that a sum has the same bits in whatever order
//! and in however many parts it is added up, on one rank or on many.

use crate::isa::{Isa, dispatch};
use crate::lanes::LANES;
use crate::math::exp;

/// The mass of a row's largest logit. A logit 2^45 times less likely than it has none.
pub const ONE: u64 = 1 << 44;
/// Most logits of a row: so many of the largest mass still fit 64 bits.
pub const MAX_LOGITS: usize = 1 << 19;

/// Adding 1.5 * 2^52 to a number of less than 2^51 rounds it to an integer, which then stands in
/// the low bits.
const ROUND: f64 = 6_755_399_441_055_744.0;

/// `e^((logit - highest) * scale)` of [`ONE`], rounded; `highest` is the row's largest logit,
/// `scale` positive and finite.
#[inline(always)]
#[must_use]
pub fn mass(logit: f32, highest: f32, scale: f32) -> u64 {
    biased(logit, highest, scale) - ROUND.to_bits()
}

#[inline(always)]
fn biased(logit: f32, highest: f32, scale: f32) -> u64 {
    // The product is exact, so it matters not whether it and the sum are fused.
    (f64::from(exp((logit - highest) * scale)) * ONE as f64 + ROUND).to_bits()
}

/// The sum of the [`mass`] of each logit.
///
/// # Panics
/// If there are more than [`MAX_LOGITS`].
#[must_use]
pub fn total(isa: Isa, logits: &[f32], highest: f32, scale: f32) -> u64 {
    assert!(logits.len() <= MAX_LOGITS, "{} logits", logits.len());
    let biased = dispatch!(isa, fn(logits: &[f32], highest: f32, scale: f32) -> u64 => {
        let mut lanes = [0u64; LANES];
        let (whole, rest) = logits.as_chunks::<LANES>();
        for logits in whole {
            for lane in 0..LANES {
                lanes[lane] = lanes[lane].wrapping_add(biased(logits[lane], highest, scale));
            }
        }
        for (lane, &logit) in rest.iter().enumerate() {
            lanes[lane] = lanes[lane].wrapping_add(biased(logit, highest, scale));
        }
        lanes.iter().fold(0u64, |sum, &lane| sum.wrapping_add(lane))
    });
    biased.wrapping_sub(ROUND.to_bits().wrapping_mul(logits.len() as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logits() -> Vec<f32> {
        (0..5003).map(|i| (i * 7919 % 5003) as f32 * -0.01).collect()
    }

    #[test]
    fn masses_are_exponentials() {
        for &logit in &logits() {
            let truth = (f64::from(logit) * 1.25).exp();
            let got = mass(logit, 0.0, 1.25) as f64 / ONE as f64;
            assert!((got - truth).abs() < 2e-5 * truth + 0.5 / ONE as f64, "{got} {truth}");
        }
        assert_eq!(mass(3.5, 3.5, f32::MAX), ONE);
        assert_eq!(mass(f32::MIN, f32::MAX, 0.01), 0);
        assert_eq!(mass(-31.3, 0.0, 1.0), 0, "less than half of the least mass");
    }

    #[test]
    fn a_total_is_the_same_on_every_machine_and_in_any_parts() {
        let logits = logits();
        let expect: u64 = logits.iter().map(|&logit| mass(logit, 0.0, 0.7)).sum();
        for isa in Isa::available() {
            assert_eq!(total(isa, &logits, 0.0, 0.7), expect, "{isa:?}");
            for cut in [0, 1, 16, 1000, 5003] {
                let (left, right) = logits.split_at(cut);
                let sum = total(isa, left, 0.0, 0.7) + total(isa, right, 0.0, 0.7);
                assert_eq!(sum, expect, "{isa:?} {cut}");
            }
        }
    }

    #[test]
    fn the_largest_row_does_not_overflow() {
        let logits = vec![1.0; MAX_LOGITS];
        assert_eq!(total(Isa::detect(), &logits, 1.0, 1.0), ONE * MAX_LOGITS as u64);
    }
}
