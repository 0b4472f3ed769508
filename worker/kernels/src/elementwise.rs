//! Gated activation.

use crate::isa::{Isa, dispatch};
use crate::math::exp;
use crate::pool::{Pool, Shards, part};

/// Elements that are worth waking the other threads for.
const WORTH_SHARING: usize = 4 << 10;

/// `out = silu(gate) * up`, element by element (Shazeer 2020, "GLU Variants Improve Transformer").
///
/// # Panics
/// If lengths disagree.
pub fn silu_gate(pool: &mut Pool, isa: Isa, gate: &[f32], up: &[f32], out: &mut [f32]) {
    let n = out.len();
    assert!(gate.len() == n && up.len() == n);
    if n < WORTH_SHARING {
        silu_gate_part(isa, gate, up, out);
        return;
    }
    let n_threads = pool.n_threads();
    let out = Shards::new(out);
    pool.run(&|thread| {
        let mine = part(n, thread, n_threads);
        // SAFETY: `part` gives each thread its own elements.
        let out = unsafe { out.range(mine.clone()) };
        silu_gate_part(isa, &gate[mine.clone()], &up[mine], out);
    });
}

fn silu_gate_part(isa: Isa, gate: &[f32], up: &[f32], out: &mut [f32]) {
    dispatch!(isa, fn(gate: &[f32], up: &[f32], out: &mut [f32]) => {
        for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
            *out = gate / (1.0 + exp(-gate)) * up;
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silu_gate_is_silu_times_up_on_every_instruction_set_to_the_bit() {
        let gate: Vec<f32> = (0..40_000).map(|i| (i as f32 - 20_000.0) * 0.005).collect();
        let up: Vec<f32> = gate.iter().map(|g| g * 0.3 - 1.0).collect();
        let mut first = vec![0.0; gate.len()];
        silu_gate(&mut Pool::new(1, true), Isa::Portable, &gate, &up, &mut first);
        for (i, &got) in first.iter().enumerate() {
            let g = f64::from(gate[i]);
            let truth = g / (1.0 + (-g).exp()) * f64::from(up[i]);
            assert!((f64::from(got) - truth).abs() <= 1e-6 * truth.abs() + 1e-30, "{got} {truth}");
        }
        for isa in Isa::available() {
            let mut out = vec![0.0; gate.len()];
            silu_gate(&mut Pool::new(2, false), isa, &gate, &up, &mut out);
            assert!(out.iter().zip(&first).all(|(a, b)| a.to_bits() == b.to_bits()), "{isa:?}");
        }
    }
}
