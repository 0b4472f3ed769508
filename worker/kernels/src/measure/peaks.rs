//! Most operations per second that the cores' instructions give, from registers, with nothing
//! else to do. A multiplication and an addition count as two operations.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::isa::Isa;
use crate::pool::Pool;

/// Of one measurement: long beside starting threads, short beside the system's time slices.
const MIN_SECONDS: f64 = 1e-3;
const N_MEASUREMENTS: usize = 100;

/// What is multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Int8,
    Bf16,
    F32,
}

impl Kind {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Int8 => "int8",
            Self::Bf16 => "bf16",
            Self::F32 => "f32",
        }
    }
}

/// The most that threads together reach with one instruction.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Peak {
    pub kind: Kind,
    /// Its mnemonic, or what stands in for one.
    pub instruction: &'static str,
    pub n_threads: usize,
    /// Best of several measurements.
    pub ops_per_s: f64,
}

/// One loop of one instruction.
#[derive(Clone, Copy)]
struct Loop {
    kind: Kind,
    instruction: &'static str,
    ops_per_round: usize,
    /// Runs so many rounds.
    run: fn(usize),
}

/// The peaks of every instruction that this machine has.
#[must_use]
pub fn measure(n_threads: usize) -> Vec<Peak> {
    let mut pool = Pool::new(n_threads, true);
    loops().into_iter().map(|one| measure_loop(&mut pool, one)).collect()
}

fn measure_loop(pool: &mut Pool, one: Loop) -> Peak {
    let n_threads = pool.n_threads();
    // Of the slowest thread, from its own start: how long threads take to begin is not meant.
    let mut time = |rounds: usize| {
        let slowest = AtomicU64::new(0);
        pool.run(&|_| {
            let start = Instant::now();
            (one.run)(rounds);
            slowest.fetch_max(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
        });
        slowest.into_inner().max(1) as f64 / 1e9
    };
    let mut rounds = 1024;
    while time(rounds) < MIN_SECONDS {
        rounds *= 2;
    }
    let best = (0..N_MEASUREMENTS).map(|_| time(rounds)).fold(f64::INFINITY, f64::min);
    let ops = (rounds * one.ops_per_round * n_threads) as f64;
    let Loop { kind, instruction, .. } = one;
    Peak { kind, instruction, n_threads, ops_per_s: ops / best }
}

fn loops() -> Vec<Loop> {
    let isa = Isa::detect();
    #[cfg(target_arch = "x86_64")]
    if isa != Isa::Portable {
        return x86::loops(isa);
    }
    let run = portable_f32;
    let instruction = match isa {
        Isa::Portable => "multiply-add",
        other => other.name(),
    };
    vec![Loop { kind: Kind::F32, instruction, ops_per_round: 2 * PORTABLE_LANES, run }]
}

const PORTABLE_LANES: usize = 64;

/// Whatever the compiler makes of a plain loop; a multiplication and an addition, since a fused one
/// may be a library call here.
fn portable_f32(rounds: usize) {
    let (a, b) = black_box((1.0001f32, 0.0001f32));
    let mut lanes = [0f32; PORTABLE_LANES];
    for _ in 0..rounds {
        for lane in &mut lanes {
            *lane = *lane * a + b;
        }
    }
    black_box(lanes);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    use super::super::amx;
    use super::{Kind, Loop};
    use crate::isa::Isa;

    /// Independent accumulators: enough to hide the latency of two units.
    const CHAINS: usize = 12;

    pub(super) fn loops(isa: Isa) -> Vec<Loop> {
        let of = |kind, instruction, ops, run| {
            let ops_per_round = CHAINS * ops;
            Loop { kind, instruction, ops_per_round, run }
        };
        let mut loops = Vec::new();
        if isa == Isa::Avx2 {
            // SAFETY: `Isa::detect` saw AVX2 and FMA.
            let int8 = |rounds| unsafe { int8_avx2(rounds) };
            // SAFETY: as above.
            let f32 = |rounds| unsafe { f32_avx2(rounds) };
            loops.push(of(Kind::Int8, "vpmaddubsw", 64, int8));
            loops.push(of(Kind::F32, "vfmadd (256)", 16, f32));
        } else {
            // SAFETY: `Isa::detect` saw AVX-512 F and VNNI.
            let int8 = |rounds| unsafe { int8_avx512(rounds) };
            loops.push(of(Kind::Int8, "vpdpbusd", 128, int8));
            if is_x86_feature_detected!("avx512bf16") {
                // SAFETY: just seen.
                let bf16 = |rounds| unsafe { bf16_avx512(rounds) };
                loops.push(of(Kind::Bf16, "vdpbf16ps", 64, bf16));
            }
            // SAFETY: `Isa::detect` saw AVX-512 F.
            let f32 = |rounds| unsafe { f32_avx512(rounds) };
            loops.push(of(Kind::F32, "vfmadd (512)", 32, f32));
        }
        if isa == Isa::Avx512Amx {
            let tile = |kind, instruction, ops_per_round, run| Loop {
                kind,
                instruction,
                ops_per_round,
                run,
            };
            loops.push(tile(Kind::Int8, "tdpbusd", amx::OPS_INT8, amx::int8));
            loops.push(tile(Kind::Bf16, "tdpbf16ps", amx::OPS_BF16, amx::bf16));
        }
        loops
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    fn int8_avx512(rounds: usize) {
        let (a, b) = black_box((_mm512_set1_epi8(3), _mm512_set1_epi8(5)));
        let mut acc = [_mm512_setzero_si512(); CHAINS];
        for _ in 0..rounds {
            for acc in &mut acc {
                *acc = _mm512_dpbusd_epi32(*acc, a, b);
            }
        }
        black_box(acc);
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    fn bf16_avx512(rounds: usize) {
        let small = _mm512_set1_ps(1e-3);
        let factor = _mm512_cvtne2ps_pbh(small, small);
        let (a, b) = black_box((factor, factor));
        let mut acc = [_mm512_setzero_ps(); CHAINS];
        for _ in 0..rounds {
            for acc in &mut acc {
                *acc = _mm512_dpbf16_ps(*acc, a, b);
            }
        }
        black_box(acc);
    }

    #[target_feature(enable = "avx512f")]
    fn f32_avx512(rounds: usize) {
        let (a, b) = black_box((_mm512_set1_ps(1e-3), _mm512_set1_ps(1e-3)));
        let mut acc = [_mm512_setzero_ps(); CHAINS];
        for _ in 0..rounds {
            for acc in &mut acc {
                *acc = _mm512_fmadd_ps(a, b, *acc);
            }
        }
        black_box(acc);
    }

    /// Products of bytes, added by pairs, then by fours: what AVX2 needs for what `vpdpbusd` does.
    #[target_feature(enable = "avx2")]
    fn int8_avx2(rounds: usize) {
        let (a, b) = black_box((_mm256_set1_epi8(3), _mm256_set1_epi8(5)));
        let ones = black_box(_mm256_set1_epi16(1));
        let mut acc = [_mm256_setzero_si256(); CHAINS];
        for _ in 0..rounds {
            // The same product again and again would be computed once.
            let a = black_box(a);
            for acc in &mut acc {
                let product = _mm256_madd_epi16(_mm256_maddubs_epi16(a, black_box(b)), ones);
                *acc = _mm256_add_epi32(*acc, product);
            }
        }
        black_box(acc);
    }

    #[target_feature(enable = "avx2,fma")]
    fn f32_avx2(rounds: usize) {
        let (a, b) = black_box((_mm256_set1_ps(1e-3), _mm256_set1_ps(1e-3)));
        let mut acc = [_mm256_setzero_ps(); CHAINS];
        for _ in 0..rounds {
            for acc in &mut acc {
                *acc = _mm256_fmadd_ps(a, b, *acc);
            }
        }
        black_box(acc);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_machine_has_a_peak_of_floats_and_all_are_plausible() {
        let peaks = measure(1);
        assert!(peaks.iter().any(|peak| peak.kind == Kind::F32));
        for Peak { instruction, ops_per_s, .. } in peaks {
            // From a slow core under load to a fast one: 0.05 to 50 TOPS.
            assert!((5e7..5e13).contains(&ops_per_s), "{instruction}: {ops_per_s}");
        }
    }
}
