//! A step allocates nothing: backend, follower and plans not at all, the lead one message a stream.
//!
//! The allocator of this binary counts for all its threads, so its tests take turns.

#![allow(clippy::unwrap_used)]
// The one way to see allocations is to be the allocator.
#![allow(unsafe_code)]

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use evener_collective::{Collective, Mesh, Options as MeshOptions};
use evener_worker::backend::{self, Kind};
use evener_worker::checkpoint::{Checkpoint, FileBytes};
use evener_worker::engine::sampler::Sampling;
use evener_worker::engine::sequence::{Origin, Spec};
use evener_worker::engine::step::{Entry, Kind as PlanKind, Limits, StepPlan};
use evener_worker::engine::{Lead, Rank, follower, scheduler};
use evener_worker::metrics::Figures;
use evener_worker::model::{families, shard};

use support::tiny_model::TinyModel;

struct Counting;

static N_ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        N_ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `GlobalAlloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        N_ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        N_ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, new_size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// One test at a time: another's allocations would count.
static TURN: Mutex<()> = Mutex::new(());

const THREADS: usize = 2;
const N_SEQUENCES: usize = 8;
const CONTEXT: usize = 256;

fn limits(vocab: usize) -> Limits {
    Limits {
        n_slots: N_SEQUENCES,
        max_batch_tokens: 64,
        max_sample_rows: 16,
        max_context: CONTEXT,
        n_kv_blocks: (N_SEQUENCES * CONTEXT / backend::KV_BLOCK_LEN) as u32,
        vocab,
    }
}

/// Ranks of the CPU backend over local links.
fn ranks(world_size: usize) -> Vec<Rank> {
    let model = TinyModel {
        format: candle_core::quantized::GgmlDType::Q8_0,
        context_length: CONTEXT,
        vocab: 2000,
        ..TinyModel::default()
    };
    let checkpoint = Checkpoint::from_bytes(FileBytes::Owned(model.bytes())).unwrap();
    let shares: Vec<u32> = (1..=world_size as u32).collect();
    let split = shard::split(&checkpoint.config, &shares).unwrap();
    let vocab: Vec<_> = split.shards.iter().map(|shard| shard.vocab.clone()).collect();
    let limits = limits(checkpoint.config.vocab);
    let options = backend::Options {
        kv_format: backend::KvFormat::F16,
        activations: backend::Activations::Int12,
        threads: THREADS,
        max_batch_tokens: limits.max_batch_tokens,
        max_sample_rows: limits.max_sample_rows,
        max_context: limits.max_context,
        spin: false,
        cores: Vec::new(),
    };
    let mesh_options = MeshOptions {
        step_timeout: Duration::from_secs(60),
        spin: false,
        ..MeshOptions::default()
    };
    let meshes = Mesh::local(world_size, 1, &mesh_options).unwrap();
    let rank = |(rank, mesh)| {
        let program = families::compile(&checkpoint.config, &split, rank);
        let progress = &mut |_, _| ControlFlow::Continue(());
        let loaded = backend::load(Kind::Cpu, &checkpoint, program, &options, progress).unwrap();
        let backend = loaded.into_backend(limits.n_kv_blocks).unwrap();
        Rank::new(mesh, backend, vocab.clone(), limits.clone())
    };
    meshes.into_iter().enumerate().map(rank).collect()
}

/// Every sequence's next `n_tokens`, from `start`.
fn fill(plan: &mut StepPlan, n_sequences: u32, start: u32, n_tokens: u32, next_block: &mut u32) {
    let block_len = backend::KV_BLOCK_LEN as u32;
    plan.clear();
    plan.kind = PlanKind::Run;
    for slot in 0..n_sequences {
        let n_blocks = (start + n_tokens).div_ceil(block_len) - start.div_ceil(block_len);
        plan.blocks.extend(*next_block..*next_block + n_blocks);
        *next_block += n_blocks;
        plan.tokens.extend((start..start + n_tokens).map(|at| 3 + (at * 7 + slot) % 200));
        plan.entries.push(Entry { slot, start, n_tokens, n_blocks, n_sampled: 1 });
    }
}

#[test]
fn a_step_of_backend_and_followers_allocates_nothing() {
    const PROMPT: u32 = 7;
    const WARM: u32 = 20;
    const STEPS: u32 = 60; // over several borders of KV blocks
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    for world_size in [1, 2] {
        for n_sequences in [1, 3, N_SEQUENCES as u32] {
            let mut ranks = ranks(world_size);
            let (lead, followers) = ranks.split_first_mut().unwrap();
            let n_allocated = std::thread::scope(|scope| {
                for rank in followers {
                    scope.spawn(|| follower::run(rank, &Figures::default()).unwrap());
                }
                let (mut plan, mut next_block) = (StepPlan::with_room(lead.limits()), 0);
                fill(&mut plan, n_sequences, 0, PROMPT, &mut next_block);
                lead.lead(&mut plan).unwrap();
                let mut before = 0;
                for step in 0..WARM + STEPS {
                    if step == WARM {
                        before = N_ALLOCATIONS.load(Ordering::Relaxed);
                    }
                    fill(&mut plan, n_sequences, PROMPT + step, 1, &mut next_block);
                    lead.lead(&mut plan).unwrap();
                    for row_idx in 0..n_sequences as usize {
                        assert!((lead.likeliest(row_idx).unwrap() as usize) < lead.limits().vocab);
                    }
                }
                let n_allocated = N_ALLOCATIONS.load(Ordering::Relaxed) - before;
                plan.clear();
                plan.kind = PlanKind::Leave;
                lead.lead(&mut plan).unwrap();
                n_allocated
            });
            assert_eq!(
                n_allocated, 0,
                "in {STEPS} steps of {n_sequences} sequences on {world_size} ranks"
            );
        }
    }
}

/// Allocations of a lead with one stream of sequences that choose by `sampling`, and its steps.
/// With drafts, tokens come faster than one a step.
fn of_a_lead(world_size: usize, sampling: &Sampling, max_drafts: usize) -> (u64, u64) {
    let (warm, n_steps) = if max_drafts == 0 { (40, 120) } else { (16, 24) };
    let mut ranks = ranks(world_size).into_iter();
    let lead = ranks.next().unwrap();
    let abort = lead.mesh().abort_handle();
    let options =
        scheduler::Options { max_drafts, ..scheduler::Options::new(lead.limits().clone()) };
    let figures = Arc::new(Figures::default());
    let (handle, mut lead) = Lead::new(lead, options, Arc::clone(&figures));
    std::thread::scope(|scope| {
        for mut rank in ranks {
            scope.spawn(move || follower::run(&mut rank, &Figures::default()));
        }
        let leading = scope.spawn(move || lead.run());
        let (requests, mut outputs) = handle.open(1024).unwrap();
        for id in 0..N_SEQUENCES as u64 {
            let (prompt, max_tokens) = (vec![5, 6, 7 + id as u32], CONTEXT as u32 - 20);
            let sampling = Sampling { seed: id, ..sampling.clone() };
            let spec = Spec {
                prompt,
                max_tokens,
                sampling,
                prompt_logprobs: false,
                origin: Origin::default(),
            };
            requests.submit(id, spec).unwrap();
        }
        let (mut before, mut first_step) = (0, 0);
        let counted = loop {
            let output = outputs.blocking_recv().expect("the lead goes on");
            assert!(output.events.iter().all(|event| event.end.is_none()), "none ends meanwhile");
            let (steps, allocations) =
                (figures.steps_total(), N_ALLOCATIONS.load(Ordering::Relaxed));
            if output.events.len() >= N_SEQUENCES && first_step == 0 && steps >= warm {
                (before, first_step) = (allocations, steps);
            }
            // Whether drafts pay is measured, so on a busy machine they may be few at first.
            let is_drafted = max_drafts == 0 || figures.drafts_right_total() > 10;
            if first_step > 0 && steps >= first_step + n_steps && is_drafted {
                break (allocations - before, steps - first_step);
            }
        };
        drop((requests, outputs));
        let left = handle.leave();
        if left.is_err() {
            abort.abort("the test is over");
        }
        leading.join().unwrap().unwrap();
        counted
    })
}

#[test]
fn a_step_of_the_lead_allocates_one_message_a_stream() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let greedy = Sampling::default();
    let top_k = Sampling { temperature: 0.8, top_k: 40, top_p: 0.95, ..Sampling::default() };
    // Their tokens are often told by whole rows only.
    let warm = Sampling { temperature: 0.8, ..Sampling::default() };
    let top_p = Sampling { top_p: 0.9, ..warm.clone() };
    // What repeats itself is drafted.
    let always_9 = Sampling { logit_bias: vec![(9, 100.0)], ..Sampling::default() };
    for world_size in [1, 2] {
        let cases = [(&greedy, 0), (&top_k, 0), (&warm, 0), (&top_p, 0), (&always_9, 4)];
        for (sampling, max_drafts) in cases {
            let (n, steps) = of_a_lead(world_size, sampling, max_drafts);
            // The channel takes a block of memory for 32 messages, and gives most back; a step may
            // be under way at either end.
            let bound = steps + steps / 16 + 2;
            assert!(
                n <= bound,
                "{n} allocations in {steps} steps, {world_size} ranks, {max_drafts} drafts: \
                 {sampling:?}"
            );
        }
    }
}
