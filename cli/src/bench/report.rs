//! Everything measured, as it is printed, drawn and written as JSON; and the ceilings that the
//! machine sets.

use evener_worker::measure::{Demand, Kind, Peak, Rate};
use serde::Serialize;

use super::http::Streams;
use super::llama_cpp::Pair;
use crate::values::{Activations, Kv};

/// One run of `evener bench`.
#[derive(Debug, Serialize)]
pub struct Report {
    pub version: &'static str,
    pub settings: Settings,
    pub machine: Machine,
    pub all_reduce: Vec<AllReduce>,
    pub kernels: Vec<Kernel>,
    pub models: Vec<Model>,
}

/// What all models were run with.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Settings {
    pub kv: Kv,
    pub activations: Activations,
    /// Positions of each sequence that decodes.
    pub context: usize,
    /// Of which figures are medians.
    pub runs: u32,
}

/// What the machine can do at most.
#[derive(Debug, Default, Serialize)]
pub struct Machine {
    pub cpu: String,
    pub n_cores: usize,
    /// Instruction set of the kernels.
    pub isa: &'static str,
    /// One for each number of threads measured, ascending.
    pub threads: Vec<Ceilings>,
}

/// What so many threads reach together.
#[derive(Debug, Clone, Serialize)]
pub struct Ceilings {
    pub n_threads: usize,
    /// Bytes per second.
    pub read_best: f64,
    pub read_median: f64,
    pub peaks: Vec<Instruction>,
}

/// The peak of one instruction.
#[derive(Debug, Clone, Serialize)]
pub struct Instruction {
    /// "int8", "bf16" or "f32".
    pub kind: &'static str,
    pub instruction: &'static str,
    pub ops_per_s: f64,
}

#[derive(Debug, Serialize)]
pub struct AllReduce {
    /// "local", "shm" or "tcp".
    pub link: &'static str,
    pub bytes: usize,
    /// Microseconds, of two ranks.
    pub p50_us: f64,
    pub p99_us: f64,
}

/// One linear layer alone.
#[derive(Debug, Serialize)]
pub struct Kernel {
    pub format: &'static str,
    pub rows: usize,
    pub columns: usize,
    /// Rows of activations.
    pub m: usize,
    /// "near": in caches; "far": in memory.
    pub place: &'static str,
    pub n_threads: usize,
    pub microseconds: f64,
    pub bytes_per_s: f64,
    pub ops_per_s: f64,
}

/// One model, laid out in several ways.
#[derive(Debug, Serialize)]
pub struct Model {
    pub model: String,
    pub quantization: String,
    pub note: Option<String>,
    /// Bytes that a step reads at least.
    pub step_bytes: u64,
    /// Weights that each token is multiplied with, the head's included.
    pub weights: u64,
    pub splits: Vec<Laid>,
}

/// One layout's figures.
#[derive(Debug, Serialize)]
pub struct Laid {
    /// "2x1/shm": ranks, threads of each, transport.
    pub split: String,
    pub n_ranks: usize,
    pub threads_per_rank: usize,
    pub backend: String,
    pub links: Vec<String>,
    /// Over all ranks.
    pub resident_weight_bytes: u64,
    /// From the start of the processes to the first request that could be taken.
    pub ready_s: f64,
    /// Of it, what the slowest rank took for its weights, where ranks say so.
    pub load_ms: Option<u32>,
    pub work: Vec<Work>,
    pub http: Vec<Streams>,
    /// In turn with llama-bench, if that was asked for.
    pub llama_cpp: Vec<Pair>,
}

/// One kind of work of the engine.
#[derive(Debug, Clone, Serialize)]
pub struct Work {
    /// "prefill" or "decode".
    pub what: &'static str,
    /// Tokens of the prompt, or sequences at once.
    pub n: usize,
    /// Of all sequences together.
    pub tok_s: Spread,
    /// Multiplications and additions of weights per second.
    pub ops_per_s: f64,
    /// Weights and KV cache read per second.
    pub bytes_per_s: f64,
    /// What memory delivered to readers right after the runs, bytes per second.
    pub read_bytes_per_s: f64,
    /// What that and the peaks allow, tokens per second.
    pub ceiling_tok_s: f64,
    /// The median's part of it.
    pub share: f64,
    /// "memory", or the arithmetic that bounds.
    pub bound: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Spread {
    /// # Panics
    /// Without values.
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let (n, max) = (values.len(), values.last().copied().unwrap_or(0.0));
        Self { median: values[n / 2], min: values[0], max }
    }

    pub fn show(&self) -> String {
        format!("{:.1} ({:.1} to {:.1})", self.median, self.min, self.max)
    }
}

impl Ceilings {
    pub fn new(n_threads: usize, read: Rate, peaks: &[Peak]) -> Self {
        let instruction = |peak: &Peak| Instruction {
            kind: peak.kind.name(),
            instruction: peak.instruction,
            ops_per_s: peak.ops_per_s,
        };
        Self {
            n_threads,
            read_best: read.best,
            read_median: read.median,
            peaks: peaks.iter().map(instruction).collect(),
        }
    }

    /// The same while memory delivers so many bytes per second.
    pub fn with_read(&self, read: f64) -> Self {
        Self { read_best: read, ..self.clone() }
    }

    /// The best that can be done with numbers of this kind, and what it is called. f32 can do the
    /// work of any kind, and on some machines does it faster.
    pub fn peak(&self, kind: Kind) -> (f64, &'static str) {
        let fits = |peak: &&Instruction| peak.kind == kind.name() || peak.kind == "f32";
        let peaks = self.peaks.iter().filter(fits).map(|peak| (peak.ops_per_s, peak.kind));
        peaks.max_by(|a, b| a.0.total_cmp(&b.0)).unwrap_or((f64::INFINITY, "nothing"))
    }
}

impl Machine {
    /// The ceilings of so many threads, or of as many as were measured.
    pub fn ceilings(&self, n_threads: usize) -> Option<&Ceilings> {
        let exact = self.threads.iter().find(|ceilings| ceilings.n_threads == n_threads);
        exact.or(self.threads.last())
    }
}

/// What one step does.
#[derive(Debug, Clone, Copy)]
struct Step {
    n_tokens: f64,
    ops: f64,
    bytes: f64,
}

impl Work {
    /// A prompt of `n` tokens that took `seconds`, once for each run. Every weight is read once and
    /// multiplied with every token, the head's with the last; of experts those that tokens take.
    pub fn prefill(n: usize, seconds: &[f64], demand: &Demand, ceilings: &Ceilings) -> Self {
        let weights = demand.layer_weights as f64 * n as f64 + demand.head_weights as f64;
        let cache = demand.kv_bytes_per_token as f64 * n as f64;
        let step =
            Step { n_tokens: n as f64, ops: 2.0 * weights, bytes: demand.bytes_of_step(n) + cache };
        Self::new("prefill", n, step, seconds, demand.arithmetic, ceilings)
    }

    /// Steps of `n` sequences that took `seconds` each, with `context` tokens in each one's cache.
    pub fn decode(
        n: usize,
        context: f64,
        seconds: &[f64],
        demand: &Demand,
        ceilings: &Ceilings,
    ) -> Self {
        let weights = (demand.layer_weights + demand.head_weights) as f64;
        let cache = demand.kv_bytes_per_token as f64 * context * n as f64;
        let step = Step {
            n_tokens: n as f64,
            ops: 2.0 * weights * n as f64,
            bytes: demand.bytes_of_step(n) + cache,
        };
        Self::new("decode", n, step, seconds, demand.arithmetic, ceilings)
    }

    fn new(
        what: &'static str,
        n: usize,
        step: Step,
        seconds: &[f64],
        arithmetic: Kind,
        ceilings: &Ceilings,
    ) -> Self {
        let tok_s = Spread::of(seconds.iter().map(|s| step.n_tokens / s).collect());
        let steps_s = tok_s.median / step.n_tokens;
        let (peak, name) = ceilings.peak(arithmetic);
        let (by_memory, by_peak) = (ceilings.read_best / step.bytes, peak / step.ops);
        let bound = if by_memory < by_peak { "memory" } else { name };
        let ceiling = by_memory.min(by_peak);
        Self {
            what,
            n,
            tok_s,
            ops_per_s: step.ops * steps_s,
            bytes_per_s: step.bytes * steps_s,
            read_bytes_per_s: ceilings.read_best,
            ceiling_tok_s: ceiling * step.n_tokens,
            share: steps_s / ceiling,
            bound,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(super) mod tests {
    use super::*;

    pub(in super::super) fn ceilings() -> Ceilings {
        let peak = |kind, instruction, ops_per_s| Instruction { kind, instruction, ops_per_s };
        Ceilings {
            n_threads: 2,
            read_best: 60e9,
            read_median: 55e9,
            peaks: vec![
                peak("int8", "vpdpbusd", 1.8e12),
                peak("int8", "tdpbusd", 12e12),
                peak("f32", "vfmadd (512)", 0.4e12),
            ],
        }
    }

    const DEMAND: Demand = Demand {
        layer_weights: 900_000_000,
        head_weights: 100_000_000,
        step_bytes: 600_000_000,
        expert_bytes: 0,
        experts: None,
        kv_bytes_per_token: 0,
        arithmetic: Kind::Int8,
    };

    #[test]
    fn one_sequence_is_bound_by_memory_and_a_prompt_by_arithmetic() {
        let decode = Work::decode(1, 16.0, &[0.02], &DEMAND, &ceilings());
        assert_eq!((decode.bound, decode.ceiling_tok_s), ("memory", 100.0));
        assert!((decode.share - 0.5).abs() < 1e-9 && (decode.bytes_per_s - 30e9).abs() < 1.0);
        let prefill = Work::prefill(512, &[1.0], &DEMAND, &ceilings());
        assert_eq!(prefill.bound, "int8");
        assert!((prefill.ops_per_s - 2.0 * (900e6 * 512.0 + 100e6)).abs() < 1e6);
        assert!((prefill.share - prefill.ops_per_s / 12e12).abs() < 1e-9);
    }

    #[test]
    fn the_cache_counts_as_memory_read() {
        let demand = Demand { kv_bytes_per_token: 65_536, ..DEMAND };
        let work = Work::decode(8, 8192.0, &[0.1], &demand, &ceilings());
        let bytes = 600e6 + 8.0 * 8192.0 * 65_536.0;
        assert!((work.ceiling_tok_s - 8.0 * 60e9 / bytes).abs() < 1e-6);
    }

    #[test]
    fn f32_does_what_no_instruction_does_faster() {
        assert_eq!(ceilings().peak(Kind::Bf16), (0.4e12, "f32"));
        assert_eq!(ceilings().peak(Kind::Int8), (12e12, "int8"));
    }

    #[test]
    fn the_median_stands_between_the_extremes() {
        let spread = Spread::of(vec![3.0, 1.0, 2.0]);
        assert_eq!((spread.min, spread.median, spread.max), (1.0, 2.0, 3.0));
    }
}
