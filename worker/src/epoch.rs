//! One epoch of a rank on its own OS thread, from the first dial to the last step.
//!
//! Loading and connecting go on together; then the ranks agree on what all of them can hold, step
//! once to warm up, and serve. The session starts it, watches it and may abort it at every stage.

use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, SyncSender};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use evener_collective::{
    AbortHandle, Collective, GroupSpec, Mesh, Options as MeshOptions, Rendezvous, Tag, Transport,
};
use evener_telemetry::Tracer;
use tokio::sync::watch;

use crate::backend::{self, Backend, KV_BLOCK_LEN, Loaded};
use crate::checkpoint::Checkpoint;
use crate::engine::ask::Ask;
use crate::engine::kv_blocks::blocks_for;
use crate::engine::step::{Entry, Kind, Limits, StepPlan};
use crate::engine::timeline::Timeline;
use crate::engine::{self, Handle, Lead, Rank, follower, scheduler};
use crate::metrics::{self, Figures};
use crate::model::families;
use crate::model::shard::Split;

/// Rows sampled in a step beyond one of each running sequence: for log-probabilities of prompts.
const EXTRA_SAMPLE_ROWS: usize = 32;
/// A group that cannot hold this many tokens is not worth forming.
const MIN_KV_TOKENS: usize = 256;
/// Share of the available memory that a host's KV caches take unless told otherwise.
const KV_MEMORY_FRACTION: u64 = 4;

/// Ops of step 0: ranks agree on what they can do, then introduce their devices.
const AGREE_OP: u32 = 0;
const INTRODUCE_OP: u32 = 1;

/// Share of a device's free memory that goes to the KV cache unless told otherwise: the rest is for
/// what libraries and graphs take.
const DEVICE_KV_SHARE: (u64, u64) = (9, 10);

/// Operations of the collective that are logged when an epoch fails.
const N_LOGGED: usize = 64;

/// What a rank is to do in an epoch; checked by the session.
#[derive(Debug, Clone)]
pub struct Spec {
    pub group: GroupSpec,
    /// By rank.
    pub shares: Vec<u32>,
    pub split: Split,
    pub join_timeout: Duration,
    pub step_timeout: Duration,
    pub backend: backend::Kind,
    pub backend_options: backend::Options,
    /// Sequences at once, as far as this rank is concerned.
    pub max_running: usize,
    pub max_waiting: usize,
    pub max_stretch: f64,
    pub max_drafts: usize,
    pub kv_memory_bytes: Option<u64>,
    /// Ranks of this group on this host.
    pub n_local_ranks: usize,
    pub tracer: Tracer,
}

/// How far an epoch is.
#[derive(Debug, Clone, PartialEq)]
pub enum Progress {
    Connecting,
    Loading { bytes_done: u64, bytes_total: u64 },
    Warming,
    Ready(Ready),
    Ended(Ended),
}

/// What a ready rank has to tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ready {
    pub resident_weight_bytes: u64,
    /// What this rank could hold.
    pub kv_blocks: u32,
    /// What all ranks can.
    pub group_kv_blocks: u32,
    pub backend: String,
    pub deterministic: bool,
    /// By peer rank.
    pub links: Vec<&'static str>,
    /// From the join to here.
    pub load_ms: u32,
}

/// How an epoch ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// It was asked to, here or by the lead.
    Left {
        reason: String,
    },
    Failed {
        reason: String,
    },
}

/// Why an epoch never served, or stopped serving.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the epoch before did not end within {} ms", waited.as_millis())]
    PreviousStuck { waited: Duration },
    #[error("loading weights: {0}")]
    Load(#[from] backend::LoadError),
    #[error("connecting: {0}")]
    Connect(evener_collective::Error),
    #[error(transparent)]
    Collective(#[from] evener_collective::Error),
    #[error(transparent)]
    Backend(#[from] backend::Error),
    #[error(transparent)]
    Engine(#[from] engine::Error),
    #[error(
        "{needed} bytes are needed for the smallest KV cache, of {tokens} tokens; this rank may \
         use {budget}: give it more memory for KV, or fewer ranks to this host"
    )]
    KvMemory { needed: u64, tokens: usize, budget: u64 },
    #[error("rank {rank} sent {got} bytes about its capacity; {expected} were due")]
    Capacity { rank: usize, got: usize, expected: usize },
    #[error("the engine panicked: {what}")]
    Panicked { what: String },
}

/// An epoch as the session sees it. Lives on after its end, to say how it ended.
#[derive(Debug)]
pub struct Epoch {
    pub number: u64,
    pub group_id: String,
    pub model: String,
    pub rank: usize,
    pub world_size: usize,
    /// One line: what this rank holds.
    pub shard: String,
    pub abort: AbortHandle,
    /// Set before it is ended on purpose: why.
    pub left: OnceLock<String>,
    /// Set on the lead before it says Ready.
    pub lead: OnceLock<Handle>,
    /// Of its steps since it was ready.
    pub timeline: Arc<Timeline>,
    pub progress: watch::Sender<Progress>,
}

/// A rank's weights. They outlive an epoch: a group that re-forms with the same split finds them
/// loaded.
pub struct Device {
    key: Key,
    about: About,
    form: Form,
}

enum Form {
    Loaded(Box<dyn Loaded>),
    /// With a KV cache of so many blocks, which stays as it was first made.
    Ready(Box<dyn Backend>, u32),
}

/// All that a loaded backend depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Key {
    fingerprint: String,
    shares: Vec<u32>,
    rank: usize,
    kind: backend::Kind,
    options: backend::Options,
}

#[derive(Debug, Clone)]
struct About {
    resident_weight_bytes: u64,
    name: String,
    deterministic: bool,
}

/// What is handed from an epoch's thread to the next.
pub type Handover = Option<Box<Device>>;

/// Everything the thread owns.
pub struct Life {
    pub spec: Spec,
    pub epoch: Arc<Epoch>,
    pub checkpoint: Arc<Checkpoint>,
    pub rendezvous: Arc<Rendezvous>,
    pub figures: Arc<Figures>,
    /// The epoch before, already aborted.
    pub previous: Option<Receiver<Handover>>,
    pub handover: SyncSender<Handover>,
}

impl Life {
    /// Lives it. Never panics, and always says how it ended.
    pub fn run(self) {
        let Self { epoch, figures, handover, .. } = &self;
        let number = epoch.number;
        let mut device: Handover = None;
        let lived = catch_unwind(AssertUnwindSafe(|| self.live(&mut device)));
        let result = lived.unwrap_or_else(|payload| {
            device = None; // whatever state it is in
            Err(Error::Panicked { what: panic_text(payload.as_ref()) })
        });
        let ended = match (result, epoch.left.get()) {
            (Ok(()), reason) => {
                let reason = reason.map_or("the lead left", String::as_str).to_owned();
                tracing::info!(epoch = number, reason, "epoch left");
                Ended::Left { reason }
            }
            (Err(error), Some(reason)) => {
                tracing::info!(epoch = number, reason, %error, "epoch left");
                Ended::Left { reason: reason.clone() }
            }
            (Err(error), None) => {
                tracing::warn!(epoch = number, rank = epoch.rank, %error, "epoch failed");
                Ended::Failed { reason: error.to_string() }
            }
        };
        // Peers that still wait for us hear of it at once.
        epoch.abort.abort(match &ended {
            Ended::Left { reason } | Ended::Failed { reason } => reason,
        });
        figures.set_load(engine::output::Load::default());
        let resident = device.as_ref().map_or(0, |device| device.about.resident_weight_bytes);
        figures.set_resident_weight_bytes(resident);
        epoch.progress.send_replace(Progress::Ended(ended));
        // Nobody takes it if the session is gone; then it is freed here.
        let _ = handover.send(device);
    }

    /// `device` is what stays loaded, however it ends.
    fn live(&self, device: &mut Handover) -> Result<(), Error> {
        let began = Instant::now();
        *device = self.take_previous()?;
        let mut mesh = self.connect_and_load(device)?;
        let loaded_at = Instant::now();
        // The others may still be loading: until Ready the deadline is the join's.
        let left = self.spec.join_timeout.saturating_sub(began.elapsed());
        let join_deadline = left.max(self.spec.step_timeout);
        mesh.set_step_timeout(join_deadline);
        self.take_core();
        let loaded = device.as_ref().expect("connect_and_load left it there");
        let kv_blocks = loaded.capacity(&self.spec)?;
        let limits = self.agree(&mut mesh, kv_blocks)?;
        self.epoch.progress.send_replace(Progress::Warming);
        let Device { key, about, form } = *device.take().expect("it was there");
        let (mut backend, n_kv_blocks) = form.into_backend(limits.n_kv_blocks)?;
        let says_nothing = self.spec.group.transport != Transport::Auto;
        backend::introduce(backend.as_mut(), says_nothing, INTRODUCE_OP, &mut mesh)?;
        let allocated_at = Instant::now();
        let mut ready = Ready {
            resident_weight_bytes: about.resident_weight_bytes,
            kv_blocks,
            group_kv_blocks: limits.n_kv_blocks,
            backend: about.name.clone(),
            deterministic: about.deterministic,
            links: mesh.links(),
            load_ms: 0,
        };
        let vocab = self.spec.split.shards.iter().map(|shard| shard.vocab.clone()).collect();
        let mut rank = Rank::new(mesh, backend, vocab, limits.clone());
        let (rank, result) = match warm_up(&mut rank, self.epoch.rank, join_deadline) {
            Ok(()) => {
                rank.mesh_mut().set_step_timeout(self.spec.step_timeout);
                let timeline = Arc::clone(&self.epoch.timeline);
                rank.measure_into(timeline, self.spec.tracer.clone());
                ready.load_ms = self.log_ready(&ready, [began, loaded_at, allocated_at]);
                self.serve(rank, limits, ready)
            }
            Err(error) => (rank, Err(error)),
        };
        if result.is_err() && self.epoch.left.get().is_none() {
            log_history(rank.mesh(), self.epoch.number);
        }
        let has_failed =
            matches!(&result, Err(engine::Error::Backend(backend::Error::Device { .. })));
        if !has_failed {
            let form = Form::Ready(rank.into_backend(), n_kv_blocks);
            *device = Some(Box::new(Device { key, about, form }));
        }
        Ok(result?)
    }

    /// This thread is thread 0 of the rank. Not earlier: threads that it starts inherit its core.
    fn take_core(&self) {
        let Some(&core) = self.spec.backend_options.cores.first() else { return };
        if let Err(error) = evener_kernels::cores::pin(&[core]) {
            tracing::warn!(core, %error, "not pinned; threads run anywhere");
        }
    }

    /// Says how long it took to get here since `began`, and to which part; gives the milliseconds.
    fn log_ready(&self, ready: &Ready, [began, loaded, allocated]: [Instant; 3]) -> u32 {
        let total = began.elapsed();
        let bytes = ready.resident_weight_bytes;
        tracing::info!(
            epoch = self.epoch.number,
            rank = self.epoch.rank,
            weight_bytes = bytes,
            connect_and_load_ms = (loaded - began).as_millis() as u64,
            agree_and_allocate_ms = (allocated - loaded).as_millis() as u64,
            warm_ms = allocated.elapsed().as_millis() as u64,
            "ready in {} ms ({:.2} GB/s of weights)",
            total.as_millis(),
            bytes as f64 / 1e9 / total.as_secs_f64(),
        );
        u32::try_from(total.as_millis()).unwrap_or(u32::MAX)
    }

    /// Waits for the thread of the epoch before and takes its weights over, if they are the same.
    fn take_previous(&self) -> Result<Handover, Error> {
        let Some(previous) = &self.previous else { return Ok(None) };
        let waited = self.spec.join_timeout;
        let device = previous.recv_timeout(waited).map_err(|_| Error::PreviousStuck { waited })?;
        Ok(device.filter(|device| device.key == self.key()))
    }

    fn key(&self) -> Key {
        Key {
            fingerprint: self.checkpoint.description.fingerprint.clone(),
            shares: self.spec.shares.clone(),
            rank: self.epoch.rank,
            kind: self.spec.backend,
            options: self.spec.backend_options.clone(),
        }
    }

    /// Either one failing makes the other give up; what is loaded by then stays in `device`.
    fn connect_and_load(&self, device: &mut Handover) -> Result<Mesh, Error> {
        let abort = &self.epoch.abort;
        let (rendezvous, group) = (&self.rendezvous, &self.spec.group);
        let options = self.mesh_options();
        let (connected, loaded) = std::thread::scope(|scope| {
            let connecting = scope.spawn(move || {
                let result = rendezvous.connect(group, &options, abort);
                result.inspect_err(|error| abort.abort(&error.to_string()))
            });
            let loaded = self.load(device);
            if let Err(error) = &loaded {
                abort.abort(&error.to_string());
            }
            let connected = connecting.join().unwrap_or_else(|payload| {
                let reason = panic_text(payload.as_ref());
                Err(evener_collective::Error::Aborted { reason })
            });
            (connected, loaded)
        });
        match (connected, loaded) {
            (Ok(mesh), Ok(())) => Ok(mesh),
            // Whoever was told to give up only says so; the other knows why.
            (Err(evener_collective::Error::Aborted { .. }), Err(error)) => Err(error),
            (Err(error), _) => Err(Error::Connect(error)),
            (Ok(_), Err(error)) => Err(error),
        }
    }

    fn mesh_options(&self) -> MeshOptions {
        let defaults = MeshOptions::default();
        let vocab = self.checkpoint.config.vocab;
        let max_rows = self.spec.backend_options.max_sample_rows;
        let logits_bytes = 4 * vocab * max_rows;
        let most = logits_bytes.max(Ask::max_bytes(vocab, max_rows));
        MeshOptions {
            step_timeout: self.spec.step_timeout,
            join_timeout: self.spec.join_timeout,
            spin: self.spec.backend_options.spin,
            max_message_bytes: defaults.max_message_bytes.max(most),
            ..defaults
        }
    }

    /// Loads this rank's slices into `device`, unless they are there already.
    fn load(&self, device: &mut Handover) -> Result<(), Error> {
        if device.is_none() {
            let (config, split) = (&self.checkpoint.config, &self.spec.split);
            let program = families::compile(config, split, self.epoch.rank);
            let epoch = &*self.epoch;
            let mut progress = |bytes_done, bytes_total| {
                epoch.progress.send_replace(Progress::Loading { bytes_done, bytes_total });
                match epoch.abort.is_aborted() {
                    true => ControlFlow::Break(()),
                    false => ControlFlow::Continue(()),
                }
            };
            let (kind, options) = (self.spec.backend, &self.spec.backend_options);
            let loaded = backend::load(kind, &self.checkpoint, program, options, &mut progress)?;
            let about = About {
                resident_weight_bytes: loaded.resident_weight_bytes(),
                name: loaded.name(),
                deterministic: loaded.deterministic(),
            };
            *device = Some(Box::new(Device { key: self.key(), about, form: Form::Loaded(loaded) }));
        }
        let resident = device.as_ref().map_or(0, |device| device.about.resident_weight_bytes);
        self.figures.set_resident_weight_bytes(resident);
        Ok(())
    }

    /// The ranks tell each other what they can do; all go by the least of it.
    fn agree(&self, mesh: &mut Mesh, kv_blocks: u32) -> Result<Limits, Error> {
        let Spec { backend_options: own, max_running, .. } = &self.spec;
        let mine =
            [kv_blocks, *max_running as u32, own.max_batch_tokens as u32, own.max_context as u32];
        let bytes: Vec<u8> = mine.iter().flat_map(|n| n.to_le_bytes()).collect();
        let mut all = Vec::new();
        mesh.all_gather(Tag { step: 0, op: AGREE_OP }, &bytes, &mut all)?;
        let mut least = mine;
        for (rank, theirs) in all.iter().enumerate() {
            if theirs.len() != bytes.len() {
                let (got, expected) = (theirs.len(), bytes.len());
                return Err(Error::Capacity { rank, got, expected });
            }
            for (least, four) in least.iter_mut().zip(theirs.chunks_exact(4)) {
                let four = four.try_into().expect("chunks_exact gives four bytes");
                *least = (*least).min(u32::from_le_bytes(four));
            }
        }
        let [n_kv_blocks, max_running, max_batch_tokens, max_context] = least;
        let n_slots = (max_running.min(max_batch_tokens) as usize).max(1);
        Ok(Limits {
            n_slots,
            max_batch_tokens: max_batch_tokens as usize,
            max_sample_rows: max_sample_rows(n_slots),
            max_context: max_context as usize,
            n_kv_blocks,
            vocab: self.checkpoint.config.vocab,
        })
    }

    /// Leads or follows until the end; gives the rank back for its device.
    fn serve(
        &self,
        mut rank: Rank,
        limits: Limits,
        ready: Ready,
    ) -> (Rank, Result<(), engine::Error>) {
        if self.epoch.rank != engine::rank::LEAD {
            self.epoch.progress.send_replace(Progress::Ready(ready));
            let result = follower::run(&mut rank, &self.figures);
            return (rank, result);
        }
        let options = scheduler::Options {
            limits,
            max_waiting: self.spec.max_waiting,
            max_stretch: self.spec.max_stretch,
            max_drafts: self.spec.max_drafts,
            model: self.checkpoint.description.fingerprint.clone(),
        };
        let (handle, mut lead) = Lead::new(rank, options, Arc::clone(&self.figures));
        let _ = self.epoch.lead.set(handle);
        self.epoch.progress.send_replace(Progress::Ready(ready));
        let result = lead.run();
        let reason = match &result {
            Ok(()) => self.epoch.left.get().map_or("left", String::as_str).to_owned(),
            Err(error) => error.to_string(),
        };
        lead.end_streams(&reason);
        (lead.into_rank(), result)
    }
}

/// Rows whose logits a step may want.
pub fn max_sample_rows(n_slots: usize) -> usize {
    n_slots + EXTRA_SAMPLE_ROWS
}

impl Device {
    /// KV blocks that this rank could hold.
    fn capacity(&self, spec: &Spec) -> Result<u32, Error> {
        match &self.form {
            Form::Ready(_, n_kv_blocks) => Ok(*n_kv_blocks),
            Form::Loaded(loaded) => {
                let fraction = KV_MEMORY_FRACTION * spec.n_local_ranks as u64;
                let budget = spec.kv_memory_bytes.unwrap_or_else(|| match loaded.free_bytes() {
                    Some(free) => free / DEVICE_KV_SHARE.1 * DEVICE_KV_SHARE.0,
                    None => metrics::available_memory_bytes().unwrap_or(u64::MAX) / fraction,
                });
                let max_context = spec.backend_options.max_context;
                kv_capacity(loaded.kv_block_bytes(), budget, spec.max_running, max_context)
            }
        }
    }
}

impl Form {
    fn into_backend(self, n_kv_blocks: u32) -> Result<(Box<dyn Backend>, u32), backend::Error> {
        match self {
            Self::Loaded(loaded) => Ok((loaded.into_backend(n_kv_blocks)?, n_kv_blocks)),
            Self::Ready(backend, n_kv_blocks) => Ok((backend, n_kv_blocks)),
        }
    }
}

/// Blocks of `block_bytes` in `budget`, but no more than all sequences could ever use.
fn kv_capacity(
    block_bytes: u64,
    budget: u64,
    max_running: usize,
    max_context: usize,
) -> Result<u32, Error> {
    let wanted = (max_running * blocks_for(max_context)).min(1 << 24) as u32;
    if block_bytes == 0 {
        return Ok(wanted);
    }
    let least = blocks_for(MIN_KV_TOKENS.min(max_context));
    let held = budget / block_bytes;
    if held < least as u64 {
        let needed = block_bytes * least as u64;
        return Err(Error::KvMemory { needed, tokens: least * KV_BLOCK_LEN, budget });
    }
    Ok(held.min(wanted.into()) as u32)
}

/// One small step of all ranks, so that the first request does not pay for first touches.
fn warm_up(rank: &mut Rank, index: usize, wait: Duration) -> Result<(), engine::Error> {
    let mut plan = StepPlan::default();
    if index != engine::rank::LEAD {
        rank.follow(&mut plan, wait)?;
        return rank.follow(&mut plan, wait);
    }
    plan.kind = Kind::Run;
    let n_tokens = rank.limits().max_batch_tokens.min(rank.limits().max_context).min(4) as u32;
    plan.tokens.resize(n_tokens as usize, 0);
    plan.blocks.push(0);
    plan.entries.push(Entry { slot: 0, start: 0, n_tokens, n_blocks: 1, n_sampled: 1 });
    rank.lead(&mut plan)?;
    plan.clear();
    plan.freed_slots.push(0);
    rank.lead(&mut plan)
}

/// The last operations, for whoever lays the histories of two ranks side by side.
fn log_history(mesh: &Mesh, epoch: u64) {
    let history = mesh.history();
    for record in &history[history.len().saturating_sub(N_LOGGED)..] {
        tracing::debug!(epoch, rank = mesh.rank(), %record, "before the failure");
    }
}

fn panic_text(payload: &(dyn std::any::Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "without a message".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kv_capacity_is_what_fits_and_no_more_than_can_be_used() {
        let check = |block_bytes, budget, expect: Option<u32>| {
            let capacity = kv_capacity(block_bytes, budget, 4, 1000);
            assert_eq!(capacity.ok(), expect, "{block_bytes} {budget}");
        };
        check(1000, 100_000, Some(100));
        check(1000, 100_999, Some(100));
        check(1000, u64::MAX, Some(4 * 63));
        check(0, 0, Some(4 * 63)); // a rank without KV heads bounds nobody
        check(1000, 16_000, Some(16));
        check(1000, 15_999, None);
        check(1 << 40, 1, None);
    }
}
