//! Masses of a softmax: exponentials as integers, so that a sum has the same bits in whatever order
//! and in however many parts it is added up, on one rank or on many.

use crate::isa::{Isa, dispatch};
use crate::lanes::LANES;
use crate::math::{self, exp};

/// Logits whose bins are found before they are counted.
const COUNTED: usize = 256;

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

/// The [`mass`] of each logit, in order: vectors of them at a time, as one by one costs much more.
pub fn masses(
    isa: Isa,
    mut logits: impl Iterator<Item = f32>,
    highest: f32,
    scale: f32,
) -> impl Iterator<Item = u64> {
    type Masses = [u64; LANES];
    let (mut found, mut n_found, mut at) = ([0; LANES], 0, 0);
    std::iter::from_fn(move || {
        if at == n_found {
            let mut some = [highest; LANES];
            (n_found, at) = (0, 0);
            for (place, logit) in some.iter_mut().zip(logits.by_ref()) {
                *place = logit;
                n_found += 1;
            }
            found = dispatch!(isa, fn(some: [f32; LANES], highest: f32, scale: f32) -> Masses => {
                let mut found = [0; LANES];
                for lane in 0..LANES {
                    found[lane] = mass(some[lane], highest, scale);
                }
                found
            });
        }
        at += 1;
        found[..n_found].get(at - 1).copied()
    })
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

/// Adds to each bin the logits that are so many steps of `1 / scale`, rounded, below `highest`, and to
/// the last all that are further below. `highest` is the row's largest logit, `scale` positive and
/// finite.
///
/// # Panics
/// If there are no bins, or more than 2^22.
pub fn count(isa: Isa, logits: &[f32], highest: f32, scale: f32, bins: &mut [u32]) {
    assert!((1..=1 << 22).contains(&bins.len()), "{} bins", bins.len());
    let last = (bins.len() - 1) as f32;
    for logits in logits.chunks(COUNTED) {
        type At = [u32; COUNTED];
        let places = dispatch!(isa, fn(logits: &[f32], highest: f32, scale: f32, last: f32) -> At => {
            let mut places = [0; COUNTED];
            for (place, &logit) in places.iter_mut().zip(logits) {
                let steps = (highest - logit) * scale;
                let steps = if steps < last { steps } else { last };
                *place = (steps + math::ROUND).to_bits().wrapping_sub(math::ROUND.to_bits());
            }
            places
        });
        for &place in &places[..logits.len()] {
            bins[place as usize] += 1;
        }
    }
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
            assert_eq!(masses(isa, logits.iter().copied(), 0.0, 0.7).sum::<u64>(), expect);
            for cut in [0, 1, 16, 1000, 5003] {
                let (left, right) = logits.split_at(cut);
                let sum = total(isa, left, 0.0, 0.7) + total(isa, right, 0.0, 0.7);
                assert_eq!(sum, expect, "{isa:?} {cut}");
            }
        }
    }

    #[test]
    fn masses_come_in_order_however_many() {
        let logits = logits();
        for isa in Isa::available() {
            for n in [0, 1, 15, 16, 17, 100] {
                let mut got = masses(isa, logits[..n].iter().copied(), 0.0, 0.7);
                for &logit in &logits[..n] {
                    assert_eq!(got.next(), Some(mass(logit, 0.0, 0.7)), "{isa:?} {n}");
                }
                assert_eq!(got.next(), None, "{isa:?} {n}");
            }
        }
    }

    #[test]
    fn every_logit_is_counted_in_the_bin_it_is_nearest_to() {
        let logits = logits();
        for isa in Isa::available() {
            let mut bins = [0; 100];
            count(isa, &logits, 0.0, 4.0, &mut bins);
            let mut expect = [0; 100];
            for logit in &logits {
                expect[((logit * -4.0).round_ties_even() as usize).min(99)] += 1;
            }
            assert_eq!(bins, expect, "{isa:?}");
        }
    }

    #[test]
    fn the_largest_row_does_not_overflow() {
        let logits = vec![1.0; MAX_LOGITS];
        assert_eq!(total(Isa::detect(), &logits, 1.0, 1.0), ONE * MAX_LOGITS as u64);
    }
}
