//! Prints what a step of the lead costs outside kernels and collective, as a whole and by part.
//!
//! `cargo run --release -p evener-worker --example step_overhead [sequences] [vocab]`. The engine is
//! the real one; the backend computes nothing but the peaks of logits that never change, and that is
//! taken out again.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use evener_collective::{Collective, Mesh, Options as MeshOptions};
use evener_kernels::Isa;
use evener_kernels::peaks::{n_peaks, peaks_of};
use evener_worker::backend::{Backend, Batch, Error as BackendError};
use evener_worker::engine::batch::Tables;
use evener_worker::engine::chosen::Chosen;
use evener_worker::engine::sampler::{Penalties, Sampling};
use evener_worker::engine::scheduler::{self, Scheduler};
use evener_worker::engine::sequence::{Origin, Spec};
use evener_worker::engine::step::{Limits, StepPlan};
use evener_worker::engine::{Lead, Rank, batch};

type Failure = Box<dyn std::error::Error>;

const CONTEXT: usize = 4096;
const STEPS: u32 = 2000;
/// As many as a lead lets wait by default.
const N_WAITING: usize = 256;
/// Tokens of the prompts that wait.
const LONG_PROMPT: usize = 4000;

fn main() -> Result<(), Failure> {
    let number = |at| std::env::args().nth(at).and_then(|word| word.parse::<usize>().ok());
    let (n_sequences, vocab) = (number(1).unwrap_or(8), number(2).unwrap_or(49_152));
    let limits = Limits {
        n_slots: n_sequences,
        max_batch_tokens: 512,
        max_sample_rows: n_sequences + 32,
        max_context: CONTEXT,
        n_kv_blocks: (n_sequences * CONTEXT / 16) as u32,
        vocab,
    };
    println!("{n_sequences} sequences, vocabulary of {vocab}, {STEPS} steps; us, p50 / p99");
    let greedy = Sampling::default();
    let top_k = Sampling { temperature: 0.8, top_k: 40, ..Sampling::default() };
    let warm = Sampling { temperature: 0.8, ..Sampling::default() };
    let top_p = Sampling { top_p: 0.9, ..warm.clone() };
    let min_p = Sampling { min_p: 0.05, ..warm.clone() };
    let penalties = Penalties { repetition: 1.1, ..Penalties::default() };
    let penalised = Sampling { penalties, ..top_k.clone() };
    let logprobs = Sampling { n_logprobs: Some(5), ..Sampling::default() };
    for (name, sampling) in [
        ("greedy", &greedy),
        ("top-k 40", &top_k),
        ("min-p 0.05", &min_p),
        ("temperature", &warm),
        ("top-p 0.9", &top_p),
        ("top-k 40, penalties", &penalised),
        ("greedy, logprobs", &logprobs),
    ] {
        show(&format!("whole step, {name}"), whole_step(&limits, sampling)?);
    }
    parts(&limits, &greedy)?;
    under_pressure(&limits, &greedy)
}

fn show(name: &str, mut took: Vec<Duration>) {
    took.sort_unstable();
    let at = |percent: usize| took.get(took.len() * percent / 100).copied().unwrap_or_default();
    let micros = |took: Duration| took.as_secs_f64() * 1e6;
    println!("{name:<34}{:>8.1} / {:.1}", micros(at(50)), micros(at(99)));
}

/// Logits that look like a model's: a bell curve, no two alike.
fn logits(rows: usize, vocab: usize) -> Vec<f32> {
    let mut x = 0x2545_f491_u32;
    let mut uniform = || {
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        x as f32 / u32::MAX as f32 - 0.5
    };
    (0..rows * vocab).map(|_| (0..6).map(|_| uniform()).sum::<f32>() * 4.0).collect()
}

/// Runs nothing, and notes how long it was left alone.
struct Idle {
    logits: Vec<f32>,
    n_rows: usize,
    vocab: usize,
    left_at: Option<Instant>,
    /// Time of the peaks since then.
    inside: Duration,
    gaps: Arc<Mutex<Vec<Duration>>>,
}

impl Backend for Idle {
    fn run(&mut self, batch: &Batch, _: &mut dyn Collective) -> Result<(), BackendError> {
        let is_decode = batch.tokens.len() == batch.sample_rows.len();
        if let Some(left_at) = self.left_at.filter(|_| is_decode) {
            let mut gaps = self.gaps.lock().unwrap_or_else(PoisonError::into_inner);
            gaps.push(left_at.elapsed().saturating_sub(self.inside));
        }
        self.n_rows = batch.sample_rows.len();
        self.inside = Duration::ZERO;
        self.left_at = Some(Instant::now());
        Ok(())
    }

    fn copy_block(&mut self, _: u32, _: u32) {}

    fn logits(&self) -> &[f32] {
        &self.logits[..self.n_rows * self.vocab]
    }

    fn peaks(&mut self, columns: usize, out: &mut Vec<f32>) {
        let began = Instant::now();
        out.resize(self.n_rows * n_peaks(columns), 0.0);
        let rows = self.logits.chunks_exact(columns).zip(out.chunks_exact_mut(n_peaks(columns)));
        rows.for_each(|(row, out)| peaks_of(Isa::detect(), row, out));
        self.inside += began.elapsed();
    }
}

/// From the end of one run of the backend to the beginning of the next.
fn whole_step(limits: &Limits, sampling: &Sampling) -> Result<Vec<Duration>, Failure> {
    let mesh = Mesh::local(1, 1, &MeshOptions::default())?.remove(0);
    let gaps = Arc::new(Mutex::new(Vec::with_capacity(STEPS as usize + 16)));
    let backend = Idle {
        logits: logits(limits.n_slots, limits.vocab),
        n_rows: 0,
        vocab: limits.vocab,
        left_at: None,
        inside: Duration::ZERO,
        gaps: Arc::clone(&gaps),
    };
    let whole = 0..limits.vocab;
    let rank = Rank::new(mesh, Box::new(backend), vec![whole], limits.clone());
    let options = scheduler::Options::new(limits.clone());
    let (handle, mut lead) = Lead::new(rank, options, Arc::default());
    let leading = std::thread::spawn(move || lead.run().map_err(|error| error.to_string()));
    let (requests, mut outputs) = handle.open(1 << 16)?;
    for id in 0..limits.n_slots as u64 {
        requests.submit(id, spec(id, sampling))?;
    }
    let mut n_left = limits.n_slots;
    while n_left > 0 {
        let output = outputs.blocking_recv().ok_or("the lead is gone")?;
        n_left -= output.events.iter().filter(|event| event.end.is_some()).count();
    }
    handle.leave()?;
    leading.join().map_err(|_| "the lead panicked")??;
    let mut gaps = gaps.lock().unwrap_or_else(PoisonError::into_inner);
    let n_cold = gaps.len() / 10;
    Ok(gaps.split_off(n_cold))
}

fn spec(id: u64, sampling: &Sampling) -> Spec {
    let sampling = Sampling { seed: id, ..sampling.clone() };
    let origin = Origin::default();
    Spec {
        prompt: vec![1, 2, 3 + id as u32],
        max_tokens: STEPS,
        sampling,
        prompt_logprobs: false,
        origin,
    }
}

/// Scheduling, the plan's form on the wire and the batch, each alone.
fn parts(limits: &Limits, sampling: &Sampling) -> Result<(), Failure> {
    let options = scheduler::Options::new(limits.clone());
    let mut scheduler = Scheduler::new(options);
    for id in 0..limits.n_slots as u64 {
        scheduler.submit(spec(id, sampling))?;
    }
    let mut plan = StepPlan::with_room(limits);
    let mut decoded = StepPlan::with_room(limits);
    let (mut tables, mut flat) = (Tables::new(limits), batch::with_room(limits));
    let (mut wire, mut committed) = (Vec::new(), Vec::new());
    let names = ["schedule", "encode", "decode (follower)", "tables to batch", "commit"];
    let mut took: [Vec<Duration>; 5] = Default::default();
    let mut step = 0;
    loop {
        let began = Instant::now();
        if !scheduler.schedule(&mut plan, usize::MAX) {
            break;
        }
        took[0].push(began.elapsed());
        step += 1;
        plan.step = step;
        took[1].push(timed(|| plan.encode(&mut wire)));
        let began = Instant::now();
        decoded.decode(&wire, limits)?;
        took[2].push(began.elapsed());
        let began = Instant::now();
        tables.apply(&decoded, &mut flat)?;
        took[3].push(began.elapsed());
        committed.clear();
        let chosen: Chosen = plan.entries.iter().map(|_| Some(9)).collect();
        took[4].push(timed(|| scheduler.commit(&plan, &chosen, &mut committed)));
    }
    for (name, took) in names.into_iter().zip(took) {
        show(name, took);
    }
    Ok(())
}

/// The same while as many wait as may, each with a long prompt, and no place becomes free; and what
/// it costs to take such a prompt in, whose blocks are named then.
fn under_pressure(limits: &Limits, sampling: &Sampling) -> Result<(), Failure> {
    let mut scheduler = Scheduler::new(scheduler::Options::new(limits.clone()));
    for id in 0..limits.n_slots as u64 {
        scheduler.submit(spec(id, sampling))?;
    }
    let (mut plan, mut committed) = (StepPlan::with_room(limits), Vec::new());
    let mut took: [Vec<Duration>; 2] = Default::default();
    for step in 0..STEPS {
        // Once all run.
        if scheduler.n_waiting() < N_WAITING && step > 0 {
            let first = 1000 + scheduler.n_waiting() as u32;
            let prompt = (0..LONG_PROMPT as u32).map(|i| (first + i) % limits.vocab as u32);
            let long = Spec { prompt: prompt.collect(), max_tokens: 1, ..spec(0, sampling) };
            let began = Instant::now();
            scheduler.submit(long)?;
            took[0].push(began.elapsed());
        }
        let began = Instant::now();
        scheduler.schedule(&mut plan, usize::MAX);
        if scheduler.n_waiting() == N_WAITING {
            took[1].push(began.elapsed());
        }
        committed.clear();
        let chosen: Chosen = plan.entries.iter().map(|_| Some(9)).collect();
        scheduler.commit(&plan, &chosen, &mut committed);
    }
    let [submit, schedule] = took;
    show(&format!("submit, {LONG_PROMPT} tokens"), submit);
    show(&format!("schedule, {N_WAITING} waiting"), schedule);
    Ok(())
}

fn timed(job: impl FnOnce()) -> Duration {
    let began = Instant::now();
    job();
    began.elapsed()
}
