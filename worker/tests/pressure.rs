//! What a sequence gets does not depend on a cache that is too small for its company, nor on what
//! others left in it: tokens and log-probabilities of a real (tiny) model, bit for bit, under
//! constant preemption and with prefixes from the cache.

#![allow(clippy::unwrap_used)]

mod support;

use std::ops::ControlFlow;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use evener_collective::{Mesh, Options as MeshOptions};
use evener_worker::backend::{self, Activations, KV_BLOCK_LEN, Kind, KvFormat};
use evener_worker::checkpoint::{Checkpoint, FileBytes};
use evener_worker::engine::output::Event;
use evener_worker::engine::sampler::Sampling;
use evener_worker::engine::sequence::{Origin, Spec};
use evener_worker::engine::step::Limits;
use evener_worker::engine::{Error, Handle, Lead, Outputs, Rank, follower, scheduler};
use evener_worker::metrics::Figures;
use evener_worker::model::{families, shard};

use support::tiny_model::TinyModel;

const CONTEXT: usize = 160;
const MAX_TOKENS: u32 = 56;
/// Enough for all that any test computes.
const PLENTY: u32 = 60 * (CONTEXT / KV_BLOCK_LEN) as u32;
/// Just enough for the longest alone.
const SCARCE: u32 = (CONTEXT / KV_BLOCK_LEN) as u32;

/// A lead and its followers, as threads.
struct Group {
    handle: Handle,
    threads: Vec<JoinHandle<Result<(), Error>>>,
    figures: Arc<Figures>,
}

impl Group {
    fn start(shares: &[u32], n_kv_blocks: u32) -> Self {
        Self::on(Kind::Cpu, KvFormat::F16, shares, n_kv_blocks)
    }

    fn on(kind: Kind, kv_format: KvFormat, shares: &[u32], n_kv_blocks: u32) -> Self {
        let mut ranks = ranks(kind, kv_format, shares, n_kv_blocks).into_iter();
        let lead = ranks.next().unwrap();
        let options = scheduler::Options::new(lead.limits().clone());
        let figures = Arc::new(Figures::default());
        let (handle, mut lead) = Lead::new(lead, options, Arc::clone(&figures));
        let mut threads = vec![std::thread::spawn(move || lead.run())];
        threads.extend(ranks.map(|mut rank| {
            std::thread::spawn(move || follower::run(&mut rank, &Figures::default()))
        }));
        Self { handle, threads, figures }
    }

    fn submit(&self, spec: Spec) -> Outputs {
        self.handle.submit(spec, 1024).unwrap()
    }

    /// Ends it; returns how many sequences were preempted.
    fn leave(self) -> u64 {
        self.handle.leave().unwrap();
        for thread in self.threads {
            thread.join().unwrap().unwrap();
        }
        self.figures.preemptions_total()
    }
}

fn ranks(kind: Kind, kv_format: KvFormat, shares: &[u32], n_kv_blocks: u32) -> Vec<Rank> {
    let format = candle_core::quantized::GgmlDType::Q8_0;
    let model = TinyModel { format, context_length: CONTEXT, ..TinyModel::default() };
    let checkpoint = Checkpoint::from_bytes(FileBytes::Owned(model.bytes())).unwrap();
    let split = shard::split(&checkpoint.config, shares).unwrap();
    let vocab: Vec<_> = split.shards.iter().map(|shard| shard.vocab.clone()).collect();
    let limits = Limits {
        n_slots: 8,
        max_batch_tokens: 48,
        max_sample_rows: 16,
        max_context: CONTEXT,
        n_kv_blocks,
        vocab: checkpoint.config.vocab,
    };
    let options = backend::Options {
        kv_format,
        activations: Activations::Int12,
        threads: 1,
        max_batch_tokens: limits.max_batch_tokens,
        max_sample_rows: limits.max_sample_rows,
        max_context: limits.max_context,
        spin: false,
        cores: Vec::new(),
    };
    let step_timeout = Duration::from_secs(60);
    let mesh_options = MeshOptions { step_timeout, spin: false, ..MeshOptions::default() };
    let meshes = Mesh::local(shares.len(), 1, &mesh_options).unwrap();
    let rank = |(rank, mesh)| {
        let program = families::compile(&checkpoint.config, &split, rank);
        let progress = &mut |_, _| ControlFlow::Continue(());
        let loaded = backend::load(kind, &checkpoint, program, &options, progress).unwrap();
        let backend = loaded.into_backend(limits.n_kv_blocks).unwrap();
        Rank::new(mesh, backend, vocab.clone(), limits.clone())
    };
    meshes.into_iter().enumerate().map(rank).collect()
}

/// Prompts of 1 to 101 tokens, many with a common beginning; greedy and not, some with
/// log-probabilities of the prompt.
fn specs() -> Vec<Spec> {
    let spec = |i: u32| {
        let (n_common, n_own) = ([0, 70, 35, 70, 0][i as usize % 5], 1 + i * 7 % 32);
        let common = (0..n_common).map(|k| 3 + k * 5 % 200);
        let prompt = common.chain((0..n_own).map(|k| 3 + (k * 11 + i) % 200)).collect();
        let temperature = if i.is_multiple_of(2) { 0.0 } else { 0.9 };
        let n_logprobs = Some(i % 3);
        let sampling = Sampling { temperature, seed: i.into(), n_logprobs, ..Sampling::default() };
        let origin = Origin { priority: i as i32 % 3, ..Origin::default() };
        Spec { prompt, max_tokens: MAX_TOKENS, sampling, prompt_logprobs: i % 4 == 3, origin }
    };
    (0..24).map(spec).collect()
}

/// What a client sees: tokens with the bits of their log-probabilities, those of the prompt first.
type Seen = Vec<(u32, Option<u32>, Vec<(u32, u32)>)>;

/// And how much of the prompt was cached.
fn collect(mut outputs: Outputs) -> (Seen, u32) {
    let (mut seen, mut n_cached) = (Vec::new(), 0);
    while let Some(output) = outputs.blocking_recv() {
        for Event { token, prompt_tokens, n_cached: n, end, .. } in output.events {
            n_cached += n;
            seen.extend(prompt_tokens.into_iter().chain(token).map(|token| {
                let top = token.top.into_iter().map(|(id, logprob)| (id, logprob.to_bits()));
                (token.id, token.logprob.map(f32::to_bits), top.collect())
            }));
            if end.is_some() {
                return (seen, n_cached);
            }
        }
    }
    panic!("the stream ended before the sequence");
}

/// Each in a cache of its own.
fn alone() -> Vec<Seen> {
    let group = Group::start(&[1], PLENTY);
    let alone = |(i, mut spec): (usize, Spec)| {
        spec.origin.salt = format!("{i}");
        let (seen, n_cached) = collect(group.submit(spec));
        assert_eq!(n_cached, 0);
        seen
    };
    let seen = specs().into_iter().enumerate().map(alone).collect();
    assert_eq!(group.leave(), 0);
    seen
}

#[test]
fn preemption_changes_no_bit() {
    let alone = alone();
    for shares in [&[1][..], &[2, 1]] {
        let group = Group::start(shares, SCARCE);
        let outputs: Vec<Outputs> = specs().into_iter().map(|spec| group.submit(spec)).collect();
        for (i, outputs) in outputs.into_iter().enumerate() {
            assert!(collect(outputs).0 == alone[i], "sequence {i} differs, shares {shares:?}");
        }
        let n_preempted = group.leave();
        println!("{n_preempted} preemptions with shares {shares:?}");
        assert!(n_preempted > 3, "{n_preempted} preemptions: the cache is not scarce");
    }
}

#[test]
fn a_prefix_from_the_cache_changes_no_bit() {
    let alone = alone();
    let group = Group::start(&[1, 1], PLENTY);
    let mut n_hits = 0;
    for round in 0..2 {
        for (i, spec) in specs().into_iter().enumerate() {
            let n_prompt = spec.prompt.len();
            let wants_all = spec.prompt_logprobs;
            let (seen, n_cached) = collect(group.submit(spec));
            assert!(seen == alone[i], "sequence {i} differs in round {round}");
            n_hits += usize::from(n_cached > 0);
            if round == 1 && !wants_all {
                let n_full = (n_prompt - 1) / KV_BLOCK_LEN * KV_BLOCK_LEN;
                assert_eq!(n_cached as usize, n_full, "all but the last, partial, block");
            }
        }
    }
    assert!(n_hits > 10, "{n_hits}");
    group.leave();
}

#[test]
fn choices_of_one_prompt_share_it_and_differ_by_seed_alone() {
    let cases = [
        (Kind::Cpu, KvFormat::F16),
        (Kind::Cpu, KvFormat::F32),
        (Kind::Cpu, KvFormat::Int8),
        (Kind::Reference, KvFormat::F32),
    ];
    let choice = |seed, salt: &str| {
        let mut spec = specs()[3].clone();
        (spec.prompt_logprobs, spec.sampling.seed) = (false, seed);
        // The reference's log-probabilities have other last bits in other company.
        spec.sampling.n_logprobs = None;
        spec.origin.salt = salt.to_owned();
        spec
    };
    for (kind, kv_format) in cases {
        let group = Group::on(kind, kv_format, &[2, 1], PLENTY);
        let alone: Vec<Seen> =
            (0..6).map(|seed| collect(group.submit(choice(seed, &format!("{seed}")))).0).collect();
        let outputs: Vec<_> = (0..6).map(|seed| group.submit(choice(seed, "one"))).collect();
        let together: Vec<(Seen, u32)> = outputs.into_iter().map(collect).collect();
        assert!(together.iter().map(|(seen, _)| seen).eq(&alone), "{kind:?} {kv_format:?}");
        // All but the last token: its full blocks are shared, their tail is copied.
        let n = choice(0, "").prompt.len() as u32 - 1;
        let n_cached: Vec<u32> = together.iter().map(|(_, n)| *n).collect();
        assert_eq!(n_cached, [0, n, n, n, n, n]);
        group.leave();
    }
}
