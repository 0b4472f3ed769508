//! exp without libm: the same bits on every machine and instruction set, and vectorisable.

pub(crate) const LOW: f32 = -87.3;
pub(crate) const HIGH: f32 = 88.3;
pub(crate) const LN2_HIGH: f32 = 0.693_145_75;
pub(crate) const LN2_LOW: f32 = 1.428_606_8e-6;
/// Adding 1.5 * 2^23 rounds to the nearest integer.
pub(crate) const ROUND: f32 = 12_582_912.0;
/// Of e^r, highest power first.
pub(crate) const POLYNOMIAL: [f32; 7] =
    [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];

/// Bits of 2^n, n being what [`ROUND`] was added to: it stands in the sum's low bits, and taking it
/// from there can be vectorised, which a conversion that saturates is not.
#[inline(always)]
pub(crate) fn power_of_2_bits(raised: f32) -> u32 {
    raised.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23
}

/// e^x for any finite x or -infinity; relative error below 3e-7 (tested). Saturates: 0 below -87.3,
/// a value near f32::MAX above 88.3.
///
/// Cody and Waite's two-step reduction by ln 2, then a degree-6 polynomial on [-ln2/2, ln2/2].
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let clamped = if x < LOW { LOW } else { x };
    let clamped = if clamped > HIGH { HIGH } else { clamped };
    let raised = clamped.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = raised - ROUND;
    let r = n.mul_add(-LN2_HIGH, clamped);
    let r = n.mul_add(-LN2_LOW, r);
    let mut p = POLYNOMIAL[0];
    for term in &POLYNOMIAL[1..] {
        p = p.mul_add(r, *term);
    }
    let scale = f32::from_bits(power_of_2_bits(raised));
    let y = p * scale;
    if x < LOW { 0.0 } else { y }
}

#[cfg(test)]
mod tests {
    use super::exp;

    #[test]
    fn exp_is_within_three_ulp_of_the_true_value() {
        let mut worst = 0f64;
        for i in -873_000..=883_000i32 {
            let x = i as f32 * 1e-4;
            let truth = f64::from(x).exp();
            worst = worst.max(((f64::from(exp(x)) - truth) / truth).abs());
        }
        assert!(worst < 3e-7, "relative error {worst:e}");
    }

    #[test]
    fn exp_of_masked_scores_is_exactly_zero() {
        assert_eq!(exp(f32::NEG_INFINITY).to_bits(), 0);
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(1e30).is_finite());
    }
}
