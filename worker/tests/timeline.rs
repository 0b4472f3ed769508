//! The step timeline of whole groups: ranks as threads over local links, whose devices take as long
//! as they are told to.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use evener_collective::{Collective, Mesh, Options as MeshOptions, Tag};
use evener_telemetry::Tracer;
use evener_worker::backend::{Backend, Batch, Error as BackendError};
use evener_worker::engine::sampler::Sampling;
use evener_worker::engine::sequence::{Origin, Spec};
use evener_worker::engine::step::Limits;
use evener_worker::engine::timeline::{Reading, Timeline};
use evener_worker::engine::{Lead, Rank, follower, scheduler};
use evener_worker::metrics::Figures;

const VOCAB: usize = 64;
const N_TOKENS: u32 = 30;
const PROMPT: [u32; 3] = [1, 2, 3];

/// Has a device that computes for a while, then meets the others. The thread is parked meanwhile:
/// a busy machine makes it late by little.
struct Slow {
    world_size: usize,
    takes: Duration,
    logits: Vec<f32>,
    n_rows: usize,
}

impl Backend for Slow {
    fn run(&mut self, batch: &Batch, collective: &mut dyn Collective) -> Result<(), BackendError> {
        let until = Instant::now() + self.takes;
        while let Some(left) = until.checked_duration_since(Instant::now()) {
            std::thread::park_timeout(left);
        }
        collective.barrier(Tag { step: batch.step, op: 1 })?;
        self.n_rows = batch.sample_rows.len();
        Ok(())
    }

    fn copy_block(&mut self, _: u32, _: u32) {}

    fn logits(&self) -> &[f32] {
        &self.logits[..self.n_rows * VOCAB / self.world_size]
    }

    fn peaks(&mut self, columns: usize, out: &mut Vec<f32>) {
        use evener_kernels::peaks::{n_peaks, peaks_of};
        out.resize(self.n_rows * n_peaks(columns), 0.0);
        let rows = self.logits.chunks_exact(columns).zip(out.chunks_exact_mut(n_peaks(columns)));
        rows.for_each(|(row, out)| peaks_of(evener_kernels::Isa::detect(), row, out));
    }
}

/// One sequence on a group whose ranks compute for so long a step; what each rank then says.
fn run(takes: &[Duration]) -> Vec<Reading> {
    let world_size = takes.len();
    let limits = Limits {
        n_slots: 2,
        max_batch_tokens: 16,
        max_sample_rows: 4,
        max_context: 64,
        n_kv_blocks: 8,
        vocab: VOCAB,
    };
    let step_timeout = Duration::from_secs(30);
    let options = MeshOptions { step_timeout, spin: false, ..MeshOptions::default() };
    let meshes = Mesh::local(world_size, 1, &options).unwrap();
    let width = VOCAB / world_size;
    let vocab: Vec<_> = (0..world_size).map(|rank| rank * width..(rank + 1) * width).collect();
    let timelines: Vec<Arc<Timeline>> = (0..world_size).map(|_| Arc::default()).collect();
    let mut ranks = meshes.into_iter().enumerate().map(|(rank, mesh)| {
        let logits = (0..limits.max_sample_rows * width).map(|at| (at % width) as f32).collect();
        let backend = Slow { world_size, takes: takes[rank], logits, n_rows: 0 };
        let mut it = Rank::new(mesh, Box::new(backend), vocab.clone(), limits.clone());
        it.measure_into(Arc::clone(&timelines[rank]), Tracer::default());
        it
    });
    let options = scheduler::Options::new(limits.clone());
    let (handle, mut lead) = Lead::new(ranks.next().unwrap(), options, Arc::default());
    std::thread::scope(|scope| {
        for mut rank in ranks {
            scope.spawn(move || follower::run(&mut rank, &Figures::default()).unwrap());
        }
        let leading = scope.spawn(move || lead.run());
        let spec = Spec {
            prompt: PROMPT.to_vec(),
            max_tokens: N_TOKENS,
            sampling: Sampling::default(),
            prompt_logprobs: false,
            origin: Origin::default(),
        };
        // What is recent begins here.
        let began = Instant::now();
        timelines.iter().for_each(|timeline| assert_eq!(timeline.read(began).recent.n_steps, 0));
        let mut outputs = handle.submit(spec, 1024).unwrap();
        while outputs.blocking_recv().unwrap().events.iter().all(|event| event.end.is_none()) {}
        handle.leave().unwrap();
        leading.join().unwrap().unwrap();
    });
    timelines.iter().map(|timeline| timeline.read(Instant::now())).collect()
}

#[test]
fn the_quick_wait_for_the_slow_and_every_nanosecond_is_told_once() {
    const QUICK: Duration = Duration::from_micros(300);
    const SLOW: Duration = Duration::from_millis(8);
    for slow in [0, 1] {
        let takes = [0, 1].map(|rank| if rank == slow { SLOW } else { QUICK });
        let readings = run(&takes);
        for (rank, reading) in readings.iter().enumerate() {
            let Reading { whole, compute, waited, transfer, recent, .. } = reading;
            assert_eq!(recent.n_steps, u64::from(N_TOKENS), "rank {rank}: one step a token");
            assert_eq!(whole.counts.iter().sum::<u64>(), recent.n_steps);
            assert_eq!(whole.sum_ns, compute.sum_ns + waited.sum_ns + transfer.sum_ns);
            assert_eq!(reading.n_tokens, PROMPT.len() as u64 + u64::from(N_TOKENS) - 1);
            let least = takes[rank].as_nanos() as u64 * recent.n_steps;
            assert!(compute.sum_ns >= least, "rank {rank} computed {} ns", compute.sum_ns);
            assert!(reading.bytes_sent > 0 && reading.bytes_received > 0);
            let n_queued = reading.queued.counts.iter().sum::<u64>();
            assert_eq!(n_queued, u64::from(rank == 0), "only the lead knows sequences");
        }
        let [slow, quick] = [slow, 1 - slow].map(|rank| readings[rank].waited.sum_ns);
        let difference = (SLOW - QUICK).as_nanos() as u64 * u64::from(N_TOKENS);
        // Half, for a machine that is busy with other things too.
        assert!(quick > slow + difference / 2, "waited {quick} and {slow} of {difference} ns");
    }
}

#[test]
fn a_group_of_one_waits_for_nobody() {
    let readings = run(&[Duration::from_micros(500)]);
    assert_eq!(readings[0].recent.n_steps, u64::from(N_TOKENS));
    assert_eq!(readings[0].waited.sum_ns, 0);
    assert_eq!((readings[0].bytes_sent, readings[0].bytes_received), (0, 0));
}
