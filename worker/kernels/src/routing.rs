//! Mixtures of experts: which experts a token takes, and the sum of what they make of it.

use crate::isa::{Isa, dispatch};
use crate::math::exp;
use crate::pool::Pool;

/// The experts of one token and their weights: those of the `n` largest logits, of equals the first,
/// and the softmax of these. `out`: their numbers, ascending, as floats; then their weights. `[2 n]`
///
/// # Panics
/// If there are fewer logits than `n`.
pub fn route(logits: &[f32], out: &mut [f32]) {
    let n = out.len() / 2;
    assert!(out.len() == 2 * n && n <= logits.len(), "{n} of {} experts", logits.len());
    let (experts, weights) = out.split_at_mut(n);
    let is_ahead = |a: usize, b: usize| logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
    // Few of few: an expert is taken if fewer than n are ahead of it. Of logits that are no numbers
    // none is ahead, and the first are taken: what they make of the token is caught at the end.
    let taken = (0..logits.len())
        .filter(|&e| (0..logits.len()).filter(|&other| is_ahead(other, e)).count() < n);
    for (place, e) in experts.iter_mut().zip(taken) {
        *place = e as f32;
    }
    let highest = experts.iter().fold(f32::NEG_INFINITY, |max, &e| max.max(logits[e as usize]));
    let mut sum = 0.0;
    for (weight, &e) in weights.iter_mut().zip(&*experts) {
        *weight = exp(logits[e as usize] - highest);
        sum += *weight;
    }
    weights.iter_mut().for_each(|weight| *weight /= sum);
}

/// `out[t] = ` sum over k, in order, of `weights[t][k] * outputs[t][k]`: `outputs` is
/// `[rows, n, columns]`, `routes` as [`route`] makes them `[rows, 2 n]`, `out` `[rows, columns]`.
///
/// # Panics
/// If shapes disagree.
pub fn combine(
    pool: &mut Pool,
    isa: Isa,
    outputs: &[f32],
    routes: &[f32],
    columns: usize,
    out: &mut [f32],
) {
    let rows = out.len() / columns;
    let n = routes.len() / (2 * rows).max(1);
    assert_eq!(outputs.len(), rows * n * columns, "{rows} rows of {n} outputs");
    pool.for_rows(out, columns, &|row, out| {
        let weights = &routes[(2 * row + 1) * n..][..n];
        add_weighted(isa, &outputs[row * n * columns..][..n * columns], weights, out);
    });
}

fn add_weighted(isa: Isa, outputs: &[f32], weights: &[f32], out: &mut [f32]) {
    dispatch!(isa, fn(outputs: &[f32], weights: &[f32], out: &mut [f32]) => {
        out.fill(0.0);
        for (outputs, &weight) in outputs.chunks_exact(out.len()).zip(weights) {
            for (out, &value) in out.iter_mut().zip(outputs) {
                *out = weight.mul_add(value, *out);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routes(logits: &[f32], n: usize) -> Vec<f32> {
        let mut out = vec![f32::NAN; 2 * n];
        route(logits, &mut out);
        out
    }

    #[test]
    fn a_token_takes_the_likeliest_experts_in_their_order() {
        let logits = [8f32, 1.0, 4.0, 8.0, 2.0].map(f32::ln);
        let got = routes(&logits, 3);
        assert_eq!(got[..3], [0.0, 2.0, 3.0]);
        for (weight, want) in got[3..].iter().zip([0.4, 0.2, 0.4]) {
            assert!((weight - want).abs() < 1e-6, "{got:?}");
        }
        assert_eq!(routes(&[1.0, 1.0, 1.0], 2), [0.0, 1.0, 0.5, 0.5], "of equals the first");
        assert_eq!(routes(&[3.0, -1e30], 1), [0.0, 1.0]);
        assert_eq!(routes(&[-1e30, 3.0], 2), [0.0, 1.0, 0.0, 1.0]);
    }

    #[test]
    fn broken_logits_choose_experts_that_exist_and_break_their_weights() {
        for logits in [[f32::NAN; 4], [0.0, f32::NAN, 1.0, 2.0]] {
            let got = routes(&logits, 2);
            assert!(got[..2].iter().all(|&e| (0.0..4.0).contains(&e)), "{got:?}");
        }
        assert!(routes(&[f32::NAN; 4], 2)[2..].iter().all(|weight| weight.is_nan()));
    }

    #[test]
    fn outputs_are_added_in_order_on_every_instruction_set_to_the_bit() {
        let (rows, n, columns) = (5, 3, 37);
        let outputs: Vec<f32> =
            (0..rows * n * columns).map(|i| (i * 7919 % 1000) as f32 * 0.013 - 5.0).collect();
        let routes: Vec<f32> = (0..rows * 2 * n).map(|i| (i * 31 % 17) as f32 * 0.05).collect();
        let mut want = vec![0.0; rows * columns];
        combine(&mut Pool::new(1, true), Isa::Portable, &outputs, &routes, columns, &mut want);
        for (at, &got) in want.iter().enumerate() {
            let (row, column) = (at / columns, at % columns);
            let term = |k: usize| {
                let weight = routes[(2 * row + 1) * n + k];
                f64::from(weight) * f64::from(outputs[(row * n + k) * columns + column])
            };
            let truth: f64 = (0..n).map(term).sum();
            assert!((f64::from(got) - truth).abs() < 1e-5, "{got} {truth}");
        }
        for isa in Isa::available() {
            let mut out = vec![f32::NAN; rows * columns];
            combine(&mut Pool::new(2, false), isa, &outputs, &routes, columns, &mut out);
            assert_eq!(out, want, "{isa:?}");
        }
    }
}
