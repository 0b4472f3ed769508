//! Where in a row of logits the largest stand, found in one pass: the peaks.
//!
//! A row is cut into stretches of 1024 logits, and of each stretch the sixteen lanes keep their
//! maxima. The likeliest token lies in the first stretch with the highest peak; the k likeliest lie
//! in stretches with one of the k highest, so nobody looks at the whole row a second time.

use crate::isa::{Isa, dispatch};
use crate::lanes::LANES;
use crate::pool::{Pool, Shards, WORTH_SHARING, part};

/// Logits of a stretch.
pub const STRETCH: usize = 1024;

/// Peaks of one row of `columns` logits.
#[must_use]
pub fn n_peaks(columns: usize) -> usize {
    columns.div_ceil(STRETCH) * LANES
}

/// Replaces `out` (`[rows, n_peaks(columns)]`) by the peaks of `logits` (`[rows, columns]`). A lane
/// that holds a NaN or an infinity peaks at NaN; one that holds nothing, at -infinity.
///
/// # Panics
/// If shapes disagree.
pub fn peaks(pool: &mut Pool, isa: Isa, logits: &[f32], columns: usize, out: &mut [f32]) {
    let (rows, n_stretches) = (out.len() / n_peaks(columns).max(1), columns.div_ceil(STRETCH));
    assert!(logits.len() == rows * columns && out.len() == rows * n_peaks(columns));
    let out = Shards::new(out);
    // All rows of a thread's own columns: they are in its cache, for it has just computed them.
    let job = |thread, n_threads| {
        let mine = part(n_stretches, thread, n_threads);
        for (row, logits) in logits.chunks_exact(columns.max(1)).enumerate() {
            let first = row * n_stretches;
            // SAFETY: `part` gives each thread its own stretches of every row.
            let out =
                unsafe { out.range((first + mine.start) * LANES..(first + mine.end) * LANES) };
            let end = columns.min(mine.end * STRETCH);
            peaks_of(isa, &logits[mine.start * STRETCH..end], out);
        }
    };
    let n_threads = pool.n_threads();
    match n_threads > 1 && logits.len() >= 8 * WORTH_SHARING {
        true => pool.run(&|thread| job(thread, n_threads)),
        false => job(0, 1),
    }
}

/// The same for one row, by the calling thread.
///
/// # Panics
/// If shapes disagree.
pub fn peaks_of(isa: Isa, logits: &[f32], out: &mut [f32]) {
    assert_eq!(out.len(), n_peaks(logits.len()), "peaks of {} logits", logits.len());
    dispatch!(isa, fn(logits: &[f32], out: &mut [f32]) => {
        for (stretch, out) in logits.chunks(STRETCH).zip(out.chunks_exact_mut(LANES)) {
            let mut highest = [f32::NEG_INFINITY; LANES];
            // 0, or NaN once a value is NaN or infinite.
            let mut poison = [0f32; LANES];
            let (whole, rest) = stretch.as_chunks::<LANES>();
            for values in whole {
                for lane in 0..LANES {
                    let value = values[lane];
                    highest[lane] = if value > highest[lane] { value } else { highest[lane] };
                    poison[lane] = value.mul_add(0.0, poison[lane]);
                }
            }
            for (lane, &value) in rest.iter().enumerate() {
                highest[lane] = if value > highest[lane] { value } else { highest[lane] };
                poison[lane] = value.mul_add(0.0, poison[lane]);
            }
            for lane in 0..LANES {
                out[lane] = highest[lane] + poison[lane];
            }
        }
    });
}

/// The index of the largest logit of a row and the logit, of equals the lowest index; if a logit is
/// not finite, the first such. None of a row without logits.
#[must_use]
pub fn best(isa: Isa, logits: &[f32], peaks: &[f32]) -> Option<(usize, f32)> {
    let (highest, poison) = highest(isa, peaks);
    if poison.is_nan() {
        let at = logits.iter().position(|logit| !logit.is_finite())?;
        return Some((at, logits[at]));
    }
    let stretch = peaks.iter().position(|&peak| peak == highest)? / LANES;
    let first = stretch * STRETCH;
    let within = &logits.get(first..)?[..STRETCH.min(logits.len() - first)];
    let at = first + first_at_least(isa, within, highest)?;
    Some((at, logits[at]))
}

/// Calls `take` with the index of every logit of a row that is at least `least`, in order.
pub fn at_least(
    isa: Isa,
    logits: &[f32],
    peaks: &[f32],
    least: f32,
    mut take: impl FnMut(usize, f32),
) {
    for (stretch, peaks) in peaks.chunks_exact(LANES).enumerate() {
        if !peaks.iter().any(|&peak| peak >= least) {
            continue;
        }
        let mut at = stretch * STRETCH;
        let end = logits.len().min(at + STRETCH);
        while let Some(next) = first_at_least(isa, &logits[at..end], least) {
            let found = at + next;
            // With it the rest of its sixteen.
            at = end.min((found / LANES + 1) * LANES);
            for (found, &logit) in (found..).zip(&logits[found..at]) {
                if logit >= least {
                    take(found, logit);
                }
            }
        }
    }
}

/// The highest peak, and 0 or else NaN if any is NaN.
fn highest(isa: Isa, peaks: &[f32]) -> (f32, f32) {
    dispatch!(isa, fn(peaks: &[f32]) -> (f32, f32) => {
        let mut highest = [f32::NEG_INFINITY; LANES];
        let mut is_nan = [false; LANES];
        for peaks in peaks.as_chunks::<LANES>().0 {
            for lane in 0..LANES {
                let peak = peaks[lane];
                highest[lane] = if peak > highest[lane] { peak } else { highest[lane] };
                is_nan[lane] |= peak.is_nan();
            }
        }
        let most = highest.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
        (most, if is_nan.contains(&true) { f32::NAN } else { 0.0 })
    })
}

/// Index of the first that is at least `least`.
fn first_at_least(isa: Isa, logits: &[f32], least: f32) -> Option<usize> {
    dispatch!(isa, fn(logits: &[f32], least: f32) -> Option<usize> => {
        let (whole, rest) = logits.as_chunks::<LANES>();
        for (at, values) in whole.iter().enumerate() {
            let mut any = false;
            for lane in 0..LANES {
                any |= values[lane] >= least;
            }
            if any {
                let lane = values.iter().position(|&value| value >= least)?;
                return Some(at * LANES + lane);
            }
        }
        let lane = rest.iter().position(|&value| value >= least)?;
        Some(whole.len() * LANES + lane)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Few values, so that equals are common.
    fn noise(seed: u32, n: usize) -> Vec<f32> {
        let mut x = seed.wrapping_mul(2_654_435_761) | 1;
        (0..n)
            .map(|_| {
                x ^= x << 13;
                x ^= x >> 17;
                x ^= x << 5;
                (x % 3000) as f32 - 1500.0
            })
            .collect()
    }

    fn of(isa: Isa, logits: &[f32]) -> Vec<f32> {
        let mut out = vec![9.0; n_peaks(logits.len())];
        peaks_of(isa, logits, &mut out);
        out
    }

    #[test]
    fn the_best_is_the_first_of_the_largest() {
        for (seed, n) in [(1, 1), (2, 15), (3, 16), (4, 1023), (5, 1024), (6, 1025), (7, 49_152)] {
            let logits = noise(seed, n);
            let mut want = 0;
            for (at, &logit) in logits.iter().enumerate() {
                want = if logit > logits[want] { at } else { want };
            }
            for isa in Isa::available() {
                let got = best(isa, &logits, &of(isa, &logits));
                assert_eq!(got, Some((want, logits[want])), "{n} {isa:?}");
            }
        }
        for isa in Isa::available() {
            assert_eq!(best(isa, &[], &of(isa, &[])), None);
            let zeros = [-0.0, 0.0, -0.0];
            assert_eq!(best(isa, &zeros, &of(isa, &zeros)).map(|(at, _)| at), Some(0));
        }
    }

    #[test]
    fn a_number_that_is_none_is_found_first() {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 17, 1500, 2999] {
                let mut logits = noise(3, 3000);
                logits[at] = value;
                for isa in Isa::available() {
                    let found = best(isa, &logits, &of(isa, &logits));
                    assert!(found.is_some_and(|(i, v)| i == at && !v.is_finite()), "{value} {at}");
                }
            }
        }
    }

    #[test]
    fn all_that_are_at_least_so_large_are_given_in_order() {
        let logits = noise(9, 5000);
        for isa in Isa::available() {
            for least in [-2000.0, 0.0, 1300.0, 1499.0, 1500.0] {
                let mut got = Vec::new();
                at_least(isa, &logits, &of(isa, &logits), least, |at, value| got.push((at, value)));
                let want: Vec<_> = logits.iter().copied().enumerate().collect();
                let want: Vec<_> = want.into_iter().filter(|(_, v)| *v >= least).collect();
                assert_eq!(got, want, "{least}");
            }
        }
    }

    #[test]
    fn threads_change_nothing() {
        let (rows, columns) = (9, 5000);
        let logits = noise(11, rows * columns);
        let mut want = Vec::new();
        for row in logits.chunks(columns) {
            want.extend(of(Isa::Portable, row));
        }
        for n_threads in [1, 2, 3, 7] {
            let mut out = vec![0.0; rows * n_peaks(columns)];
            peaks(&mut Pool::new(n_threads, false), Isa::detect(), &logits, columns, &mut out);
            assert_eq!(out, want, "{n_threads}");
        }
    }
}
