//! A rank at work: weights, cache and buffers on a device, and what of a step is recorded.
//!
//! Everything a step's kernels are told lies in device memory at places that depend on the step's
//! sizes alone. So a decode step is padded to its bucket and runs as one graph, recorded when its
//! sizes come a second time; a step that meets other ranks through the host, or brings a prompt, is
//! launched op by op.

use std::cell::OnceCell;
use std::time::Duration;

use evener_collective::{Collective, Tag};
use evener_kernels::cuda::activations::Activations;
use evener_kernels::cuda::attention::{self, Heads, KvCache};
use evener_kernels::cuda::group::Group;
use evener_kernels::cuda::linear::{self, Parts};
use evener_kernels::cuda::{Buffer, Device, Error as DeviceError, Graph, Shape, rows};
use evener_kernels::peaks::n_peaks;

use super::angles::Angles;
use super::experts::{Products, Taking};
use super::fusion;
use super::graphs::{Choice, Graphs};
use super::plan::{Bounds, Layout, Plan, Sizes};
use super::step::Step;
use super::sums::{self, Sums};
use super::weights::Weights;
use crate::backend::{Backend, Batch, Error, KV_BLOCK_LEN, KvFormat, Options};
use crate::model::program::{BufferId, Op, Program};

/// Blocks of threads that attention is spread over, where sequences are long enough: some for each of a
/// large card's multiprocessors.
const ATTENTION_BLOCKS: usize = 2048;
/// Tokens of a tensor core's tile: buffers hold whole ones.
const TOKEN_TILE: usize = 8;

/// A rank at work.
pub(super) struct Rank {
    /// Dropped first, for they name the group.
    graphs: Graphs<Sizes, Graph>,
    /// Where this rank's device sums with the others' of the epoch. Dropped before memory that sums
    /// may still be queued for.
    group: Option<Group>,
    pub(super) device: Device,
    pub(super) weights: Weights,
    bounds: Bounds,
    /// The front of each is `[n_parts, T, columns]` of the current step.
    buffers: Vec<Buffer<f32>>,
    /// By [`BufferId`]: which of `buffers` it is.
    places: Vec<usize>,
    /// By layer.
    pub(super) caches: Vec<KvCache>,
    /// By op, what the device has to know of it.
    pub(super) prepared: Vec<Prepared>,
    /// By op: the linear op behind it that alone reads what it makes.
    pub(super) feeds: Vec<Option<usize>>,
    /// By op: the residual that a rank alone adds its product to.
    pub(super) residuals: Vec<Option<BufferId>>,
    pub(super) shape: Shape,
    pub(super) scratch: Scratch,
    pub(super) angles: Angles,
    plan: Plan,
    /// Rows of logits of the last run.
    n_sampled: usize,
    /// The last run's logits, once somebody asked for them.
    logits: OnceCell<Vec<f32>>,
    /// Parts and sum of an all-reduce with other ranks, on their way.
    on_host: [Vec<f32>; 2],
}

pub(super) enum Prepared {
    Nothing,
    Parts(Parts),
    Heads(Heads),
    Experts(Products),
}

/// Device memory that only a step uses.
pub(super) struct Scratch {
    pub(super) words: Buffer<u32>,
    pub(super) activations: Activations,
    pub(super) linear: linear::Scratch,
    pub(super) attended: Option<attention::Parts>,
    pub(super) taking: Taking,
    pub(super) sampled: Buffer<f32>, // [S, hidden]
    pub(super) logits: Buffer<f32>,  // [S, own vocabulary rows]
    candidates: Buffer<f32>,         // [S, candidates_len]
    best: Buffer<f32>,               // [S, 2]
    peaks: Buffer<f32>,              // [S, n_peaks]
}

/// Most tokens of a step, in whole tiles.
fn padded_tokens(options: &Options) -> usize {
    options.max_batch_tokens.next_multiple_of(TOKEN_TILE)
}

fn bounds(program: &Program, options: &Options, n_kv_blocks: usize) -> Bounds {
    let groups = program.ops.iter().filter_map(|op| match op {
        Op::Attention { kv_of_head, .. } => {
            let of = |kv: usize| kv_of_head.iter().filter(|&&head| head == kv).count();
            (0..program.n_kv_heads).map(of).max()
        }
        _ => None,
    });
    let max_tokens = padded_tokens(options);
    let enough_items = ATTENTION_BLOCKS.div_ceil(program.n_kv_heads.max(1));
    Bounds {
        max_tokens,
        max_samples: options.max_sample_rows.next_multiple_of(TOKEN_TILE),
        max_items: max_tokens.max(enough_items),
        enough_items,
        n_kv_blocks,
        group: groups.max().unwrap_or(0),
        split: attention::split_len(options.kv_format) as u32,
        has_tiles: options.kv_format == KvFormat::F16,
        tile_vectors: attention::tile_vectors(program.head_dim),
    }
}

/// What a rank allocates beside weights and cache, about.
pub(super) fn buffer_bytes(program: &Program, options: &Options) -> u64 {
    let bounds = bounds(program, options, 0);
    let widest = widest(program);
    let columns: usize = program.buffers.iter().map(|b| b.n_parts * b.columns).sum();
    let logits = bounds.max_samples * (program.vocab.len() + n_peaks(program.vocab.len()) + widest);
    let attended = bounds.max_items * n_heads(program) * attention::part_len(program.head_dim);
    let angles = options.max_context * program.head_dim;
    // Activations as f16 and as two of bf16: less than two words a number in all.
    let words = bounds.max_tokens * (columns + 2 * widest) + logits + attended + angles;
    (4 * words + 2 * linear::Scratch::len(widest)) as u64
}

fn widest(program: &Program) -> usize {
    program.buffers.iter().map(|buffer| buffer.columns).max().unwrap_or(0)
}

fn n_heads(program: &Program) -> usize {
    let of_op = |op: &Op| match op {
        Op::Attention { kv_of_head, .. } => Some(kv_of_head.len()),
        _ => None,
    };
    program.ops.iter().filter_map(of_op).max().unwrap_or(0)
}

impl Rank {
    pub(super) fn new(
        device: Device,
        weights: Weights,
        options: &Options,
        shape: Shape,
        n_kv_blocks: usize,
    ) -> Result<Self, DeviceError> {
        let program = &weights.program;
        let bounds = bounds(program, options, n_kv_blocks);
        let places = fusion::places(program);
        let mut buffers = Vec::new();
        for (id, b) in program.buffers.iter().enumerate() {
            let n = b.n_parts * bounds.max_tokens * b.columns;
            buffers.push(device.buffer(if places[id] == id { n } else { 0 })?);
        }
        let new_cache = |_| KvCache::new(&device, shape, n_kv_blocks, program.n_kv_heads);
        let caches = (0..program.n_layers).map(new_cache).collect::<Result<_, _>>()?;
        let prepare = |op| prepare(&device, program, op);
        let prepared = program.ops.iter().map(prepare).collect::<Result<_, _>>()?;
        let (widest, n_heads) = (widest(program), n_heads(program));
        let (max_samples, vocab) = (bounds.max_samples, program.vocab.len());
        // As many as all sequences of a step could have, each row with a table of its own at most.
        let max_table_blocks =
            bounds.max_tokens * options.max_context.div_ceil(KV_BLOCK_LEN).min(n_kv_blocks);
        let scratch = Scratch {
            words: device.buffer(Plan::max_words(&bounds, max_table_blocks))?,
            activations: Activations::new(&device, bounds.max_tokens.max(max_samples), widest)?,
            attended: match n_heads {
                0 => None,
                n => Some(attention::Parts::new(&device, bounds.max_items, n, shape.head_dim)?),
            },
            taking: Taking::new(&device, program, bounds.max_tokens)?,
            linear: linear::Scratch::new(&device, widest)?,
            sampled: device.buffer(max_samples * widest)?,
            logits: device.buffer(max_samples * vocab)?,
            candidates: device.buffer(max_samples * rows::candidates_len(vocab))?,
            best: device.buffer(2 * max_samples)?,
            peaks: device.buffer(max_samples * n_peaks(vocab))?,
        };
        let angles = Angles::new(&device, program, options.max_context)?;
        Ok(Self {
            graphs: Graphs::default(),
            group: None,
            bounds,
            buffers,
            places,
            caches,
            prepared,
            feeds: fusion::feeds(program),
            residuals: fusion::residuals(program),
            shape,
            scratch,
            angles,
            plan: Plan::default(),
            n_sampled: 0,
            logits: OnceCell::new(),
            on_host: [Vec::new(), Vec::new()],
            device,
            weights,
        })
    }

    pub(super) fn buffer(&self, id: BufferId) -> &Buffer<f32> {
        &self.buffers[self.places[id.0]]
    }

    fn n_columns(&self) -> usize {
        self.weights.program.vocab.len()
    }
}

fn prepare(device: &Device, program: &Program, op: &Op) -> Result<Prepared, DeviceError> {
    Ok(match op {
        Op::Linear { input, .. } | Op::Head { input, .. } => {
            Prepared::Parts(Parts::new(device, [program.buffers[input.0].columns])?)
        }
        Op::LinearParts { sum, .. } => {
            let columns = sum.part_leaves.iter().map(|n| n * sum.leaf_columns);
            Prepared::Parts(Parts::new(device, columns)?)
        }
        Op::Attention { kv_of_head, .. } => {
            Prepared::Heads(Heads::new(device, kv_of_head, program.n_kv_heads)?)
        }
        Op::Experts { input, sum, .. } => {
            Prepared::Experts(Products::new(device, program, *input, sum)?)
        }
        Op::Embed { .. }
        | Op::Norm { .. }
        | Op::RopeKv { .. }
        | Op::SiluGate { .. }
        | Op::Route { .. }
        | Op::Combine { .. }
        | Op::AllReduce { .. } => Prepared::Nothing,
    })
}

impl Rank {
    /// A step that asks nothing of the host, by its graph if there is one.
    fn run_on_devices(
        &mut self,
        sizes: Sizes,
        layout: Layout,
        n_tables: usize,
        pads: bool,
        mut sums: Option<&mut Sums<'_>>,
    ) -> Result<(), Error> {
        let choice = if pads { self.graphs.choose(sizes) } else { Choice::Run };
        let step = Step { rank: self, sizes, layout, n_tables, is_alone: sums.is_none() };
        match choice {
            Choice::Run => step.run(false, sums.as_deref_mut())?,
            Choice::Record => {
                let graph = self.device.record(|| step.run(true, sums.as_deref_mut()))?;
                self.graphs.keep(sizes, graph);
            }
            Choice::Replay => {}
        }
        if let (true, Some(graph)) = (pads, self.graphs.get(sizes)) {
            self.device.replay(graph)?;
        }
        match sums {
            Some(sums) => sums.wait(),
            None => Ok(()),
        }
    }
}

impl Backend for Rank {
    fn run(&mut self, batch: &Batch, collective: &mut dyn Collective) -> Result<(), Error> {
        let end = batch.positions.iter().max().map_or(0, |&last| last as usize + 1);
        self.angles.extend(end)?;
        self.logits.take();
        self.n_sampled = batch.sample_rows.len();
        let is_on_devices = collective.world_size() == 1 || self.group.is_some();
        // What goes through the host, or is looked at there, cannot be recorded.
        let is_looked_at = self.scratch.taking.is_used();
        let pads = is_on_devices && !is_looked_at && Plan::is_bucketed(batch, &self.bounds);
        let (sizes, layout) = self.plan.make(batch, &self.bounds, pads);
        self.scratch.words.upload(0, &self.plan.words)?;
        let n_tables = batch.block_tables.len();
        if is_on_devices {
            let group = self.group.take();
            let mut sums = group.as_ref().map(|group| Sums::new(group, batch.step, collective));
            let ran = self.run_on_devices(sizes, layout, n_tables, pads, sums.as_mut());
            // A group that did not get through a step is left.
            self.group = group.filter(|_| ran.is_ok());
            return ran;
        }
        let mut on_host = std::mem::take(&mut self.on_host);
        let step = Step { rank: self, sizes, layout, n_tables, is_alone: false };
        let ran = step.run_over_hosts(batch.step, collective, &mut on_host);
        self.on_host = on_host;
        ran
    }

    fn introduction(&self, is_lead: bool) -> Vec<u8> {
        let said = self.device.introduction().and_then(|about| {
            let Some(about) = about else { return Ok(Vec::new()) };
            let id = if is_lead { Some(self.device.name_group()?) } else { None };
            Ok(sums::introduction(about, self.bounds.max_tokens, id))
        });
        said.unwrap_or_else(|error| {
            tracing::warn!(%error, "sums go through the host");
            Vec::new()
        })
    }

    fn hear(
        &mut self,
        introductions: &[Vec<u8>],
        first_op: u32,
        collective: &mut dyn Collective,
    ) -> Result<(), Error> {
        // Recorded steps name the group of their epoch.
        self.graphs = Graphs::default();
        self.group = None;
        let Some(id) = sums::common(introductions) else { return Ok(()) };
        let tag = Tag { step: 0, op: first_op };
        let joined = sums::join(&self.device, &id, tag, collective)?;
        let mut all = Vec::new();
        collective.all_gather(tag, &[u8::from(joined.is_ok())], &mut all)?;
        match joined {
            Ok(group) if all.iter().all(|one| one == &[1]) => self.group = Some(group),
            Ok(_) => tracing::warn!("another rank's device cannot join; sums go through the host"),
            Err(error) => tracing::warn!(%error, "sums go through the host"),
        }
        Ok(())
    }

    fn time_ops(&mut self, batch: &Batch) -> Result<Vec<(String, Duration)>, Error> {
        let end = batch.positions.iter().max().map_or(0, |&last| last as usize + 1);
        self.angles.extend(end)?;
        let (sizes, layout) = self.plan.make(batch, &self.bounds, false);
        self.scratch.words.upload(0, &self.plan.words)?;
        let n_tables = batch.block_tables.len();
        Ok(Step { rank: self, sizes, layout, n_tables, is_alone: true }.time()?)
    }

    fn copy_block(&mut self, from: u32, to: u32) {
        for cache in &self.caches {
            // A device that failed says so in the step that follows.
            let _ = cache.copy_block(from as usize, to as usize);
        }
    }

    fn logits(&self) -> &[f32] {
        self.logits.get_or_init(|| {
            let mut logits = vec![f32::NAN; self.n_sampled * self.n_columns()];
            // Of a device that failed they stay NaN, which the engine takes as a failed step.
            let _ = self.scratch.logits.download(0, &mut logits);
            logits
        })
    }

    fn peaks(&mut self, columns: usize, out: &mut Vec<f32>) {
        out.clear();
        out.resize(self.n_sampled * n_peaks(columns), f32::NAN);
        let Scratch { logits, peaks, .. } = &self.scratch;
        let made = rows::peaks(logits, columns, peaks, self.n_sampled);
        let _ = made.and_then(|()| peaks.download(0, out));
    }

    fn likeliest(&mut self, n_rows: usize, columns: usize, _: &mut Vec<f32>, out: &mut Vec<f32>) {
        out.clear();
        if columns == 0 {
            out.extend((0..n_rows).flat_map(|_| [f32::NEG_INFINITY, 0.0]));
            return;
        }
        out.resize(2 * n_rows, f32::NAN);
        let Scratch { logits, candidates, best, .. } = &self.scratch;
        let made = rows::likeliest(logits, columns, candidates, best, n_rows);
        if made.and_then(|()| best.download(0, out)).is_err() {
            out.iter_mut().skip(1).step_by(2).for_each(|index| *index = 0.0);
        }
    }
}
