//! RMS norm with its residual addition (Zhang and Sennrich 2019, "Root Mean Square Layer
//! Normalization").

use crate::isa::{Isa, dispatch};
use crate::lanes::{LANES, fma, sum};
use crate::pool::{Pool, Shards, part};

/// `residual += delta` if given, then `out = residual / rms(residual) * weight`, row by row.
/// All but `weight` (`[columns]`) are `[rows, columns]`; columns are a multiple of 16.
///
/// # Panics
/// If shapes disagree.
pub fn rms_norm(
    pool: &mut Pool,
    isa: Isa,
    residual: &mut [f32],
    delta: Option<&[f32]>,
    weight: &[f32],
    eps: f32,
    out: &mut [f32],
) {
    let columns = weight.len();
    let rows = residual.len() / columns;
    assert!(columns.is_multiple_of(LANES) && residual.len() == rows * columns);
    assert!(out.len() == residual.len() && delta.is_none_or(|d| d.len() == residual.len()));
    let n_threads = if rows < 2 * pool.n_threads() { 1 } else { pool.n_threads() };
    let (residual, out) = (Shards::new(residual), Shards::new(out));
    let job = |thread: usize| {
        if thread >= n_threads {
            return;
        }
        let mine = part(rows, thread, n_threads);
        let range = mine.start * columns..mine.end * columns;
        // SAFETY: `part` gives each thread its own rows.
        let (residual, out) = unsafe { (residual.range(range.clone()), out.range(range.clone())) };
        let delta = delta.map(|delta| &delta[range]);
        norm_rows(isa, residual, delta, weight, eps, out);
    };
    if n_threads == 1 { job(0) } else { pool.run(&job) }
}

fn norm_rows(
    isa: Isa,
    residual: &mut [f32],
    delta: Option<&[f32]>,
    weight: &[f32],
    eps: f32,
    out: &mut [f32],
) {
    dispatch!(isa, fn(residual: &mut [f32], delta: Option<&[f32]>, weight: &[f32], eps: f32, out: &mut [f32]) =>
        norm_rows_generic(residual, delta, weight, eps, out));
}

#[inline(always)]
fn norm_rows_generic(
    residual: &mut [f32],
    delta: Option<&[f32]>,
    weight: &[f32],
    eps: f32,
    out: &mut [f32],
) {
    let columns = weight.len();
    if let Some(delta) = delta {
        for (r, d) in residual.iter_mut().zip(delta) {
            *r += d;
        }
    }
    for (row, out) in residual.chunks_exact(columns).zip(out.chunks_exact_mut(columns)) {
        let mut squares = [0f32; LANES];
        for x in row.chunks_exact(LANES) {
            fma(&mut squares, x, x);
        }
        let inverse = 1.0 / (sum(&squares) / columns as f32 + eps).sqrt();
        for ((out, x), w) in out.iter_mut().zip(row).zip(weight) {
            *out = x * inverse * w;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_normalised_alone_and_to_the_same_bits_everywhere() {
        let (rows, columns) = (9, 64);
        let x: Vec<f32> = (0..rows * columns).map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0).collect();
        let delta: Vec<f32> = x.iter().map(|v| 0.25 - v * v).collect();
        let weight: Vec<f32> = (0..columns).map(|i| 1.0 + i as f32 / 64.0).collect();
        let mut want = None;
        for isa in Isa::available() {
            for n_threads in [1, 2] {
                let (mut residual, mut out) = (x.clone(), vec![0.0; x.len()]);
                let pool = &mut Pool::new(n_threads, false);
                rms_norm(pool, isa, &mut residual, Some(&delta), &weight, 1e-5, &mut out);
                let want = want.get_or_insert_with(|| out.clone());
                assert!(out.iter().zip(want.iter()).all(|(a, b)| a.to_bits() == b.to_bits()));
                for (row, out) in residual.chunks(columns).zip(out.chunks(columns)) {
                    let mean =
                        row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / columns as f64;
                    for (k, &got) in out.iter().enumerate() {
                        let truth = f64::from(row[k]) / (mean + 1e-5).sqrt() * f64::from(weight[k]);
                        assert!((f64::from(got) - truth).abs() < 1e-5, "{got} {truth}");
                    }
                }
            }
        }
    }
}
