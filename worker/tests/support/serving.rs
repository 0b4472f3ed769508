//! A group that serves a tiny model on the CPU backend, its ranks as threads over local links.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use evener_collective::{Mesh, Options as MeshOptions};
use evener_worker::backend::{self, Kind};
use evener_worker::checkpoint::Checkpoint;
use evener_worker::engine::output::{End, TokenOut};
use evener_worker::engine::sequence::Spec;
use evener_worker::engine::step::Limits;
use evener_worker::engine::{Error, Handle, Lead, Rank, follower, scheduler};
use evener_worker::metrics::Figures;
use evener_worker::model::{families, shard};

/// Sequences at once.
pub const N_SLOTS: usize = 8;

pub struct Serving {
    pub handle: Handle,
    pub figures: Arc<Figures>,
    threads: Vec<JoinHandle<Result<(), Error>>>,
}

/// What came of one sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    pub tokens: Vec<TokenOut>,
    pub prompt_tokens: Vec<TokenOut>,
    pub end: Option<End>,
}

impl Outcome {
    pub fn ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|token| token.id).collect()
    }
}

impl Serving {
    /// Shares 1 : 2 : ... : `world_size`; blocks enough for all.
    pub fn start(checkpoint: &Checkpoint, world_size: usize) -> Self {
        let n_kv_blocks = N_SLOTS * checkpoint.config.context_length / backend::KV_BLOCK_LEN;
        Self::with_blocks(checkpoint, world_size, n_kv_blocks as u32)
    }

    pub fn with_blocks(checkpoint: &Checkpoint, world_size: usize, n_kv_blocks: u32) -> Self {
        Self::drafting(checkpoint, world_size, n_kv_blocks, 0)
    }

    /// The same with drafts.
    pub fn drafting(
        checkpoint: &Checkpoint,
        world_size: usize,
        n_kv_blocks: u32,
        max_drafts: usize,
    ) -> Self {
        let shares: Vec<u32> = (1..=world_size as u32).collect();
        let split = shard::split(&checkpoint.config, &shares).unwrap();
        let vocab: Vec<_> = split.shards.iter().map(|shard| shard.vocab.clone()).collect();
        let context = checkpoint.config.context_length;
        let limits = Limits {
            n_slots: N_SLOTS,
            max_batch_tokens: 64,
            max_sample_rows: 2 * N_SLOTS,
            max_context: context,
            n_kv_blocks,
            vocab: checkpoint.config.vocab,
        };
        let options = backend::Options {
            kv_format: backend::KvFormat::F32,
            activations: backend::Activations::Int12,
            threads: 1,
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
            let loaded = backend::load(Kind::Cpu, checkpoint, program, &options, progress).unwrap();
            let backend = loaded.into_backend(limits.n_kv_blocks).unwrap();
            Rank::new(mesh, backend, vocab.clone(), limits.clone())
        };
        let mut ranks = meshes.into_iter().enumerate().map(rank).collect::<Vec<_>>().into_iter();
        let options = scheduler::Options {
            max_waiting: 10_000,
            max_drafts,
            ..scheduler::Options::new(limits.clone())
        };
        let figures = Arc::new(Figures::default());
        let (handle, mut lead) = Lead::new(ranks.next().unwrap(), options, Arc::clone(&figures));
        let mut threads = vec![std::thread::spawn(move || {
            let result = lead.run();
            lead.end_streams(&format!("{result:?}"));
            result
        })];
        threads.extend(ranks.map(|mut rank| {
            std::thread::spawn(move || follower::run(&mut rank, &Figures::default()))
        }));
        Self { handle, figures, threads }
    }

    /// Submits all at once, and waits for their ends.
    pub fn run(&self, specs: impl IntoIterator<Item = Spec>) -> Vec<Outcome> {
        let (requests, mut outputs) = self.handle.open(1 << 16).unwrap();
        let nothing = Outcome { tokens: Vec::new(), prompt_tokens: Vec::new(), end: None };
        let mut outcomes = Vec::new();
        let mut n_left = 0;
        for (id, spec) in specs.into_iter().enumerate() {
            // No more than the lead's queue of commands holds.
            while n_left >= 512 {
                n_left -= take(&mut outputs, &mut outcomes);
            }
            requests.submit(id as u64, spec).unwrap();
            outcomes.push(nothing.clone());
            n_left += 1;
        }
        while n_left > 0 {
            n_left -= take(&mut outputs, &mut outcomes);
        }
        outcomes
    }

    pub fn leave(self) {
        self.handle.leave().unwrap();
        for thread in self.threads {
            thread.join().unwrap().unwrap();
        }
    }
}

/// Reads one message, and says how many sequences it ended.
fn take(outputs: &mut evener_worker::engine::Outputs, outcomes: &mut [Outcome]) -> usize {
    let Some(output) = outputs.blocking_recv() else { panic!("{:?}", outputs.end()) };
    let mut n_ended = 0;
    for event in output.events {
        let outcome = &mut outcomes[event.request_id as usize];
        outcome.tokens.extend(event.token);
        outcome.prompt_tokens.extend(event.prompt_tokens);
        n_ended += usize::from(event.end.is_some());
        outcome.end = event.end;
    }
    n_ended
}
