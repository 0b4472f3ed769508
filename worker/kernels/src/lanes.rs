//! Sixteen f32 lanes with a fixed order of additions, written so that the compiler makes vectors of
//! it.

/// Lanes of every vectorised sum.
pub(crate) const LANES: usize = 16;

pub(crate) type Lanes = [f32; LANES];

/// `acc + a * b` per lane, one rounding.
#[inline(always)]
pub(crate) fn fma(acc: &mut Lanes, a: &[f32], b: &[f32]) {
    for lane in 0..LANES {
        acc[lane] = a[lane].mul_add(b[lane], acc[lane]);
    }
}

/// `acc + a * b` per lane with one `a` for all, one rounding.
#[inline(always)]
pub(crate) fn fma_scalar(acc: &mut Lanes, a: f32, b: &[f32]) {
    for lane in 0..LANES {
        acc[lane] = a.mul_add(b[lane], acc[lane]);
    }
}

/// Sum of the lanes by halves: 8 + 8, 4 + 4, 2 + 2, 1 + 1.
#[inline(always)]
pub(crate) fn sum(lanes: &Lanes) -> f32 {
    let mut a = *lanes;
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            a[lane] += a[lane + width];
        }
        width /= 2;
    }
    a[0]
}
