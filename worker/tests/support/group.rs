//! Runs a backend without an engine: ranks as threads over a local mesh, whole sequences, logits of
//! every position.

use std::ops::ControlFlow;
use std::time::Duration;

use evener_collective::{Collective, Kind as OpKind, Mesh, Record};
use evener_kernels::Isa;
use evener_kernels::peaks::{best, n_peaks, peaks_of};
use evener_worker::backend::{
    self, Activations, Backend, Batch, KV_BLOCK_LEN, Kind, KvFormat, Place, Span, introduce,
};
use evener_worker::checkpoint::Checkpoint;
use evener_worker::model::program::Program;
use evener_worker::model::{families, shard};

/// The device that tests of the CUDA backend run on: the card that EVENER_TEST_CARD numbers
/// (`make gpu-test`), else the emulation.
pub fn cuda() -> Kind {
    let card = std::env::var("EVENER_TEST_CARD").ok();
    let number = |text: String| text.parse().expect("EVENER_TEST_CARD is a card's number");
    Kind::Cuda(card.map_or(Place::Emulator, |text| Place::Card(number(text))))
}

/// How ranks sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Meet {
    OverHosts,
    /// Where their devices can.
    OnDevices,
}

/// How a model is run.
#[derive(Debug, Clone)]
pub struct Group<'a> {
    pub kind: Kind,
    /// One rank each.
    pub shares: &'a [u32],
    /// Of each rank.
    pub threads: usize,
    /// Tokens that each sequence may add to a step.
    pub chunk: usize,
    pub kv_format: KvFormat,
    pub activations: Activations,
}

/// What a step adds to a sequence.
#[derive(Debug, Clone, Copy)]
struct Piece {
    sequence: usize,
    start: usize,
    len: usize,
}

/// One thread of one CPU rank, token by token.
impl Default for Group<'_> {
    fn default() -> Self {
        Self {
            kind: Kind::Cpu,
            shares: &[1],
            threads: 1,
            chunk: 1,
            kv_format: KvFormat::F16,
            activations: Activations::Int12,
        }
    }
}

impl Group<'_> {
    /// Logits `[T, vocab]` of each sequence; all sequences share each step.
    pub fn logits(&self, checkpoint: &Checkpoint, sequences: &[&[u32]]) -> Vec<Vec<f32>> {
        let split = shard::split(&checkpoint.config, self.shares).unwrap();
        let program = |rank| families::compile(&checkpoint.config, &split, rank);
        self.run(checkpoint, &program, checkpoint.config.vocab, sequences)
    }

    /// The same for any program: `program(rank)`, whose vocabulary rows together are `vocab`.
    pub fn run(
        &self,
        checkpoint: &Checkpoint,
        program: &(dyn Fn(usize) -> Program + Sync),
        vocab: usize,
        sequences: &[&[u32]],
    ) -> Vec<Vec<f32>> {
        let kinds = vec![self.kind; self.shares.len()];
        self.run_mixed(&kinds, Meet::OverHosts, checkpoint, program, vocab, sequences)
    }

    /// The same with a backend of its own for each rank, whatever `kind` says.
    pub fn run_mixed(
        &self,
        kinds: &[Kind],
        meet: Meet,
        checkpoint: &Checkpoint,
        program: &(dyn Fn(usize) -> Program + Sync),
        vocab: usize,
        sequences: &[&[u32]],
    ) -> Vec<Vec<f32>> {
        let steps = steps(sequences, self.chunk);
        let meshes = Mesh::local(self.shares.len(), 1, &collective_options()).unwrap();
        let shards: Vec<Vec<Vec<f32>>> = std::thread::scope(|scope| {
            let ranks: Vec<_> = meshes
                .into_iter()
                .enumerate()
                .map(|(rank, mut mesh)| {
                    let steps = &steps;
                    scope.spawn(move || {
                        let mut backend =
                            self.load(kinds[rank], checkpoint, program(rank), sequences);
                        let says_nothing = meet == Meet::OverHosts;
                        introduce(backend.as_mut(), says_nothing, 0, &mut mesh).unwrap();
                        let logits = run_steps(backend.as_mut(), &mut mesh, sequences, steps);
                        let is_emulated = |kind| kind == &Kind::Cuda(Place::Emulator);
                        if meet == Meet::OnDevices && kinds.iter().all(is_emulated) {
                            let history = mesh.history();
                            let is_sum = |op: &Record| op.kind == OpKind::AllReduce;
                            assert!(!history.iter().any(is_sum), "a sum through the host");
                        }
                        (logits, backend, mesh)
                    })
                })
                .collect();
            // All have ended before one leaves: the others would hear of a lost rank.
            let ended: Vec<_> = ranks.into_iter().map(|rank| rank.join().unwrap()).collect();
            ended.into_iter().map(|(logits, ..)| logits).collect()
        });
        let widths: Vec<usize> =
            (0..self.shares.len()).map(|rank| program(rank).vocab.len()).collect();
        assert_eq!(widths.iter().sum::<usize>(), vocab, "the ranks share the vocabulary");
        let mut logits: Vec<Vec<f32>> = sequences.iter().map(|_| Vec::new()).collect();
        for (step, pieces) in steps.iter().enumerate() {
            let mut row = 0;
            for piece in pieces {
                for _ in 0..piece.len {
                    for (shard, &width) in shards.iter().zip(&widths) {
                        let of_row = &shard[step][row * width..(row + 1) * width];
                        logits[piece.sequence].extend(of_row);
                    }
                    row += 1;
                }
            }
        }
        logits
    }

    /// One rank's backend, before its first step.
    pub fn load(
        &self,
        kind: Kind,
        checkpoint: &Checkpoint,
        program: Program,
        sequences: &[&[u32]],
    ) -> Box<dyn Backend> {
        let (longest, chunk) = (longest(sequences), self.chunk);
        let options = backend::Options {
            threads: self.threads,
            max_batch_tokens: chunk * sequences.len(),
            max_sample_rows: chunk * sequences.len(),
            max_context: longest,
            kv_format: self.kv_format,
            activations: self.activations,
            spin: false,
            cores: Vec::new(),
        };
        let mut progress = |done, total| {
            assert!(done <= total);
            ControlFlow::Continue(())
        };
        let loaded = backend::load(kind, checkpoint, program, &options, &mut progress).unwrap();
        let n_blocks = longest.div_ceil(KV_BLOCK_LEN) * sequences.len();
        loaded.into_backend(n_blocks as u32).unwrap()
    }
}

fn collective_options() -> evener_collective::Options {
    // Loading and slow machines come before the first operation; a stuck rank still ends the test.
    let patience = Duration::from_secs(300);
    evener_collective::Options { step_timeout: patience, spin: false, ..Default::default() }
}

/// The first step of these sequences.
pub fn first_step(sequences: &[&[u32]], chunk: usize) -> Batch {
    batch(1, sequences, &steps(sequences, chunk)[0])
}

fn longest(sequences: &[&[u32]]) -> usize {
    sequences.iter().map(|tokens| tokens.len()).max().unwrap()
}

/// Each step takes the next `chunk` tokens of every sequence that has some left.
fn steps(sequences: &[&[u32]], chunk: usize) -> Vec<Vec<Piece>> {
    (0..longest(sequences))
        .step_by(chunk)
        .map(|start| {
            let piece = |(sequence, tokens): (usize, &&[u32])| {
                let len = tokens.len().saturating_sub(start).min(chunk);
                (len > 0).then_some(Piece { sequence, start, len })
            };
            sequences.iter().enumerate().filter_map(piece).collect()
        })
        .collect()
}

fn run_steps(
    backend: &mut dyn Backend,
    collective: &mut dyn Collective,
    sequences: &[&[u32]],
    steps: &[Vec<Piece>],
) -> Vec<Vec<f32>> {
    let mut logits = Vec::with_capacity(steps.len());
    for (index, pieces) in steps.iter().enumerate() {
        let batch = batch(index as u64 + 1, sequences, pieces);
        backend.run(&batch, collective).unwrap();
        logits.push(backend.logits().to_vec());
        check_likeliest(backend, batch.sample_rows.len());
    }
    logits
}

/// What a backend says of its logits is so of the logits that it gives.
fn check_likeliest(backend: &mut dyn Backend, n_rows: usize) {
    let columns = backend.logits().len() / n_rows;
    let (mut peaks, mut likeliest) = (Vec::new(), Vec::new());
    backend.likeliest(n_rows, columns, &mut peaks, &mut likeliest);
    backend.peaks(columns, &mut peaks);
    let (logits, n_peaks) = (backend.logits(), n_peaks(columns));
    for row in 0..n_rows {
        let logits = &logits[row * columns..][..columns];
        let peaks = &peaks[row * n_peaks..][..n_peaks];
        let mut expected = vec![0.0; n_peaks];
        peaks_of(Isa::detect(), logits, &mut expected);
        assert_eq!(peaks, expected);
        let (index, logit) = best(Isa::detect(), logits, peaks).unwrap_or((0, f32::NEG_INFINITY));
        assert_eq!(likeliest[2 * row..][..2], [logit, f32::from_bits(index as u32)]);
    }
}

/// Blocks of different sequences alternate and run backwards, so that no backend can ignore the
/// tables.
fn block_of(sequence: usize, index: usize, n_sequences: usize, n_blocks: usize) -> u32 {
    ((n_blocks - 1 - index) * n_sequences + sequence) as u32
}

fn batch(step: u64, sequences: &[&[u32]], pieces: &[Piece]) -> Batch {
    let n_blocks = longest(sequences).div_ceil(KV_BLOCK_LEN);
    let mut batch = Batch { step, ..Batch::default() };
    for piece in pieces {
        let end = piece.start + piece.len;
        let used = end.div_ceil(KV_BLOCK_LEN);
        batch.spans.push(Span {
            first_row: batch.tokens.len() as u32,
            n_rows: piece.len as u32,
            first_block: batch.block_tables.len() as u32,
            n_blocks: used as u32,
        });
        let block = |index| block_of(piece.sequence, index, sequences.len(), n_blocks);
        batch.block_tables.extend((0..used).map(block));
        let tokens = &sequences[piece.sequence][piece.start..end];
        for (position, &token) in (piece.start..end).zip(tokens) {
            let slot = block(position / KV_BLOCK_LEN) as usize * KV_BLOCK_LEN;
            batch.tokens.push(token);
            batch.positions.push(position as u32);
            batch.slots.push((slot + position % KV_BLOCK_LEN) as u32);
        }
    }
    batch.sample_rows = (0..batch.tokens.len() as u32).collect();
    batch
}
