//! The contract of a device: load a rank's slices, then run its program on one batch after another.
//!
//! `cpu` and `cuda` are ours and fast; `reference` is candle, slow and obvious. A backend knows
//! tensors and its rank; it does not know requests, sampling or the network beyond the collective it
//! is handed.

use std::ops::ControlFlow;
use std::time::Duration;

use evener_collective::{Collective, Tag};
use evener_kernels::Isa;
use evener_kernels::peaks::{best, n_peaks, peaks_of};

use crate::checkpoint::{self, Checkpoint};
use crate::model::program::Program;

mod cpu;
mod cuda;
mod reference;

pub use evener_kernels::activation::Precision as Activations;
pub use evener_kernels::attention::Format as KvFormat;
pub use evener_kernels::cuda::Place;

/// Tokens of one KV block.
pub const KV_BLOCK_LEN: usize = 16;

/// One step's work, flat. Built by `engine::batch`, the same on every rank.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// Number of the step in its epoch; tags the collectives.
    pub step: u64,
    /// Token ids. `[T]`
    pub tokens: Vec<u32>,
    /// Position of each token in its sequence. `[T]`
    pub positions: Vec<u32>,
    /// Where each token's k and v go: block id * [`KV_BLOCK_LEN`] + offset. `[T]`
    pub slots: Vec<u32>,
    /// One per sequence; their rows are consecutive, in order, and cover all T.
    pub spans: Vec<Span>,
    /// KV block ids; each span has its run.
    pub block_tables: Vec<u32>,
    /// Rows whose logits are wanted, ascending. `[S]`
    pub sample_rows: Vec<u32>,
}

/// The rows of one sequence in a [`Batch`]: consecutive positions of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    pub first_row: u32,
    pub n_rows: u32,
    /// Its run in `Batch::block_tables`: blocks for positions 0 to its last, in order.
    pub first_block: u32,
    pub n_blocks: u32,
}

impl Batch {
    /// Empties it, keeping its memory.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.slots.clear();
        self.spans.clear();
        self.block_tables.clear();
        self.sample_rows.clear();
    }
}

/// Which implementation runs the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Our kernels, on this machine's processor.
    Cpu,
    /// Our kernels on a card, or on its emulation.
    Cuda(Place),
    /// candle tensors: slow, obvious, the truth the others are tested against.
    Reference,
}

/// How a rank uses its device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Threads of the step, this rank's own; at least 1.
    pub threads: usize,
    /// Most tokens of one step: buffers are allocated for it.
    pub max_batch_tokens: usize,
    /// Most rows of one step whose logits are wanted.
    pub max_sample_rows: usize,
    /// Most tokens of one sequence.
    pub max_context: usize,
    /// How keys and values are kept. The reference backend keeps them as f32 whatever this says.
    pub kv_format: KvFormat,
    /// How finely the CPU backend rounds what it multiplies weights with; others have their own ways.
    pub activations: Activations,
    /// Spin while waiting for the other threads; false when ranks outnumber cores.
    pub spin: bool,
    /// Core of each thread, the first being the caller's, who is already there; empty: anywhere.
    pub cores: Vec<usize>,
}

/// A rank's weights in the device's own form, before its KV cache exists.
pub trait Loaded: Send {
    /// Bytes of weights this rank holds.
    fn resident_weight_bytes(&self) -> u64;
    /// Bytes of one KV block over all layers and this rank's KV heads; 0 if it caches none.
    fn kv_block_bytes(&self) -> u64;
    /// "cpu avx512-vnni", "reference", ...
    fn name(&self) -> String;
    /// Same bits whatever the batch, the threads and the split.
    fn deterministic(&self) -> bool;
    /// Bytes of the device's own memory that are free for a KV cache; none of a backend that uses
    /// the machine's.
    fn free_bytes(&self) -> Option<u64> {
        None
    }
    /// Allocates the KV cache and the step's buffers.
    ///
    /// # Errors
    /// Not enough memory.
    fn into_backend(self: Box<Self>, n_kv_blocks: u32) -> Result<Box<dyn Backend>, Error>;
}

/// What a device can do once a rank's weights are in it.
pub trait Backend: Send {
    /// Runs the program on `batch`, meeting the other ranks in `collective` (its all-reduces are
    /// numbered from 1 up in program order; op 0 is the engine's).
    ///
    /// # Errors
    /// A failed collective, or a device that failed. The epoch is over after either.
    fn run(&mut self, batch: &Batch, collective: &mut dyn Collective) -> Result<(), Error>;

    /// What this rank's device tells the others' before an epoch's first step, so that they may sum
    /// without their hosts; empty: it cannot. The lead's names the group.
    fn introduction(&self, _is_lead: bool) -> Vec<u8> {
        Vec::new()
    }

    /// Hears the introductions of all ranks, the same on each. What they make of it lasts until they
    /// are heard again. It may meet the others in ops of step 0 from `first_op` on.
    ///
    /// # Errors
    /// A failed collective.
    fn hear(
        &mut self,
        _introductions: &[Vec<u8>],
        _first_op: u32,
        _collective: &mut dyn Collective,
    ) -> Result<(), Error> {
        Ok(())
    }

    /// How long each op takes on `batch`, by what it makes, in program order: for measuring, and not
    /// in a group. Empty of a backend that does not tell.
    ///
    /// # Errors
    /// A device that failed.
    fn time_ops(&mut self, _batch: &Batch) -> Result<Vec<(String, Duration)>, Error> {
        Ok(Vec::new())
    }

    /// Gives one KV block the keys and values of another, in all layers.
    fn copy_block(&mut self, from: u32, to: u32);

    /// Logits of the last run: `[S, own vocabulary rows]`, f32.
    fn logits(&self) -> &[f32];

    /// Replaces `out` by the peaks ([`evener_kernels::peaks`]) of each row of `logits`, which has
    /// `columns`.
    fn peaks(&mut self, columns: usize, out: &mut Vec<f32>) {
        out.clear();
        if columns == 0 {
            return;
        }
        for row in self.logits().chunks_exact(columns) {
            let first = out.len();
            out.resize(first + n_peaks(columns), 0.0);
            peaks_of(Isa::detect(), row, &mut out[first..]);
        }
    }

    /// Replaces `out` by two words for each of the `n_rows` rows of the last run: its largest logit
    /// and the bits of the index, of equals the lowest ([`best`]); -infinity and 0 without columns.
    /// `peaks` is left with anything.
    fn likeliest(
        &mut self,
        n_rows: usize,
        columns: usize,
        peaks: &mut Vec<f32>,
        out: &mut Vec<f32>,
    ) {
        self.peaks(columns, peaks);
        let (isa, n_peaks) = (Isa::detect(), n_peaks(columns));
        out.clear();
        for row in 0..n_rows {
            let logits = &self.logits()[row * columns..][..columns];
            let found = best(isa, logits, &peaks[row * n_peaks..][..n_peaks]);
            let (index, logit) = found.unwrap_or((0, f32::NEG_INFINITY));
            out.extend([logit, f32::from_bits(index as u32)]);
        }
    }
}

/// Introduces the ranks' devices to each other, before an epoch's first step: ops of step 0 from
/// `first_op` on. All ranks do it; one that does not want its sums to leave the collective says
/// nothing.
///
/// # Errors
/// A failed collective.
pub fn introduce(
    backend: &mut dyn Backend,
    says_nothing: bool,
    first_op: u32,
    collective: &mut dyn Collective,
) -> Result<(), Error> {
    let is_lead = collective.rank() == 0;
    let mine = if says_nothing { Vec::new() } else { backend.introduction(is_lead) };
    let mut all = Vec::new();
    collective.all_gather(Tag { step: 0, op: first_op }, &mine, &mut all)?;
    backend.hear(&all, first_op + 1, collective)
}

/// Hears of bytes done and bytes in total while weights load; may stop it.
pub type Progress<'a> = dyn FnMut(u64, u64) -> ControlFlow<()> + Send + 'a;

/// Reads a rank's slices into the device's form. `progress(done, total)` counts bytes of the file
/// and may stop the loading.
///
/// # Errors
/// What is wrong with the checkpoint, or a stop asked for.
pub fn load(
    kind: Kind,
    checkpoint: &Checkpoint,
    program: Program,
    options: &Options,
    progress: &mut Progress<'_>,
) -> Result<Box<dyn Loaded>, LoadError> {
    match kind {
        Kind::Cpu => Ok(Box::new(cpu::load(checkpoint, program, options, progress)?)),
        Kind::Cuda(place) => cuda::load(place, checkpoint, program, options, progress),
        Kind::Reference => reference::load(checkpoint, program, progress),
    }
}

/// Why weights could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::Error),
    #[error("loading was stopped")]
    Stopped,
    #[error("the device failed: {reason}")]
    Device { reason: String },
}

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Collective(#[from] evener_collective::Error),
    #[error("the device failed: {reason}")]
    Device { reason: String },
}
