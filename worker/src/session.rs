//! A worker's place in groups: Idle, Loading, Serving, Leaving. It starts the thread of an epoch,
//! watches it and aborts it; what happens inside is `epoch`'s.
//!
//! Called by `service` and by shutdown. Epochs only grow: a higher one replaces a lower one, and
//! what is asked for a lower one is refused.

use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use evener_collective::{AbortHandle, GroupSpec, Peer, Rendezvous};
use evener_proto::ids::{Epoch as EpochNumber, GroupId, ModelName, WorkerId};
use tokio::sync::watch;

use crate::backend::{self, Activations, KvFormat};
use crate::checkpoint::Checkpoint;
use crate::config::{self, Cores};
use crate::engine::Handle;
use crate::engine::grammar::{self, Compiler};
use crate::epoch::{Ended, Epoch, Handover, Life, Progress, Spec, max_sample_rows};
use crate::host;
use crate::metrics::Figures;
use crate::model::shard;

/// How long the lead may take to end an epoch in good order before it is aborted.
const LEAVE_GRACE: Duration = Duration::from_millis(500);
/// How long an aborted epoch may take to end; a step of a slow backend is in it.
const ABORT_GRACE: Duration = Duration::from_secs(10);
/// No step for so long: the group is not at work.
const QUIET: Duration = Duration::from_millis(300);
const QUIET_POLL: Duration = Duration::from_millis(20);

/// What a coordinator asks of a worker.
#[derive(Debug, Clone)]
pub struct Join {
    pub group_id: GroupId,
    pub epoch: EpochNumber,
    pub model: ModelName,
    pub fingerprint: String,
    pub rank: usize,
    /// By rank.
    pub members: Vec<Member>,
    pub token: String,
    pub join_timeout: Duration,
    pub step_timeout: Duration,
    /// Sequences at once; none: this worker's default.
    pub max_sequences: Option<usize>,
    /// Of every rank's KV cache.
    pub kv_format: KvFormat,
    /// Of every CPU rank's products.
    pub activations: Activations,
}

/// One rank of a group.
#[derive(Debug, Clone)]
pub struct Member {
    pub worker_id: WorkerId,
    /// host:port of its rendezvous.
    pub collective_address: String,
    pub host_id: String,
    pub share: u32,
}

/// Why a worker does not join, lead or leave.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("epoch {asked} is over here: epoch {newest} has been asked for")]
    Stale { asked: u64, newest: u64 },
    #[error("epoch {epoch} has ended: {reason}")]
    Ended { epoch: u64, reason: String },
    #[error("epoch {asked} is not served here; {serving}")]
    NotServed { asked: u64, serving: String },
    #[error("epoch {epoch} is not ready yet")]
    NotReady { epoch: u64 },
    #[error("this worker is rank {rank}; only rank 0 takes sequences")]
    NotLead { rank: usize },
    #[error("model `{model}` is not held here; held are: {held}")]
    UnknownModel { model: ModelName, held: String },
    #[error("model `{model}` here is the file {held}; the group wants {wanted}")]
    OtherFile { model: ModelName, held: String, wanted: String },
    #[error("rank {rank} is not among the {world_size} members")]
    BadRank { rank: usize, world_size: usize },
    #[error("rank {rank} of epoch {epoch} was {was} when it was first asked for")]
    OtherRank { epoch: u64, rank: usize, was: usize },
    #[error(transparent)]
    Split(#[from] shard::Error),
    #[error("this worker is draining")]
    Draining,
    #[error("no thread or handle for the epoch: {reason}")]
    Os { reason: String },
}

/// A model file that this worker can serve.
#[derive(Debug, Clone)]
pub struct Held {
    pub name: ModelName,
    pub checkpoint: Arc<Checkpoint>,
    /// Most tokens of one sequence here.
    pub context_length: usize,
    /// Made when the first grammar comes.
    compiler: Arc<OnceLock<Result<Compiler, grammar::Error>>>,
}

impl Held {
    #[must_use]
    pub fn new(name: ModelName, checkpoint: Arc<Checkpoint>, max_context: Option<usize>) -> Self {
        let own = checkpoint.config.context_length;
        let context_length = max_context.map_or(own, |max| max.min(own));
        Self { name, checkpoint, context_length, compiler: Arc::default() }
    }

    /// Compiles grammars for the model's vocabulary. The first call takes a while.
    ///
    /// # Errors
    /// The model's tokenizer is not one that grammars are for.
    pub fn compiler(&self) -> Result<&Compiler, &grammar::Error> {
        let about = &self.checkpoint.description;
        let new = || Compiler::new(&about.tokenizer_json, &about.eos_token_ids);
        self.compiler.get_or_init(new).as_ref()
    }
}

/// A worker's place in groups. Cheap to clone.
#[derive(Clone)]
pub struct Session(Arc<Inner>);

struct Inner {
    options: config::Options,
    models: Vec<Held>,
    rendezvous: Arc<Rendezvous>,
    figures: Arc<Figures>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Highest epoch that was joined or left.
    newest: u64,
    current: Option<Arc<Epoch>>,
    /// Where the newest epoch's thread leaves its weights.
    handover: Option<Receiver<Handover>>,
    is_draining: bool,
}

impl Session {
    #[must_use]
    pub fn new(options: config::Options, models: Vec<Held>, rendezvous: Rendezvous) -> Self {
        Self(Arc::new(Inner {
            options,
            models,
            rendezvous: Arc::new(rendezvous),
            figures: Arc::default(),
            state: Mutex::default(),
        }))
    }

    /// # Errors
    /// The model is not held here.
    pub fn model(&self, name: &ModelName) -> Result<&Held, Error> {
        self.0.models.iter().find(|held| held.name == *name).ok_or_else(|| Error::UnknownModel {
            model: name.clone(),
            held: self
                .0
                .models
                .iter()
                .map(|held| held.name.as_str())
                .collect::<Vec<_>>()
                .join(", "),
        })
    }

    #[must_use]
    pub fn models(&self) -> &[Held] {
        &self.0.models
    }

    #[must_use]
    pub fn options(&self) -> &config::Options {
        &self.0.options
    }

    #[must_use]
    pub fn figures(&self) -> &Figures {
        &self.0.figures
    }

    /// Becomes a rank of a group, or attaches to the epoch that is served already.
    ///
    /// # Errors
    /// The epoch is not newer, or this worker cannot do what is asked.
    pub fn join(&self, join: Join) -> Result<Arc<Epoch>, Error> {
        let asked = join.epoch.get();
        let mut state = self.state();
        if let Some(current) = state.current.as_ref().filter(|current| current.number == asked) {
            return attach(current, &join);
        }
        if asked <= state.newest {
            return Err(Error::Stale { asked, newest: state.newest });
        }
        if join.token.is_empty() {
            let serving = "attaching to it without its token cannot begin it".to_owned();
            return Err(Error::NotServed { asked, serving });
        }
        if state.is_draining {
            return Err(Error::Draining);
        }
        let (checkpoint, spec) = self.check(&join)?;
        let epoch = Arc::new(Epoch {
            number: asked,
            group_id: join.group_id.to_string(),
            model: join.model.to_string(),
            rank: join.rank,
            world_size: join.members.len(),
            shard: spec.split.shards[join.rank].describe(),
            abort: AbortHandle::new().map_err(|error| Error::Os { reason: error.to_string() })?,
            left: OnceLock::new(),
            lead: OnceLock::new(),
            timeline: Arc::default(),
            progress: watch::Sender::new(Progress::Connecting),
        });
        let (sender, handover) = sync_channel(1);
        if let Some(replaced) = &state.current {
            replaced.abort.abort(&format!("epoch {asked} replaces it"));
        }
        let life = Life {
            spec,
            epoch: Arc::clone(&epoch),
            checkpoint,
            rendezvous: Arc::clone(&self.0.rendezvous),
            figures: Arc::clone(&self.0.figures),
            previous: state.handover.take(),
            handover: sender,
        };
        let thread = std::thread::Builder::new().name(format!("epoch-{asked}"));
        // Not joined: its end is told by `progress`, and the next epoch waits for its handover.
        thread.spawn(|| life.run()).map_err(|error| Error::Os { reason: error.to_string() })?;
        tracing::info!(epoch = asked, rank = join.rank, world_size = epoch.world_size, "joining");
        state.newest = asked;
        state.handover = Some(handover);
        state.current = Some(Arc::clone(&epoch));
        Ok(epoch)
    }

    /// What this worker would have to do, if it can.
    fn check(&self, join: &Join) -> Result<(Arc<Checkpoint>, Spec), Error> {
        let held = self.model(&join.model)?;
        let checkpoint = Arc::clone(&held.checkpoint);
        let fingerprint = &checkpoint.description.fingerprint;
        if *fingerprint != join.fingerprint {
            return Err(Error::OtherFile {
                model: join.model.clone(),
                held: fingerprint.clone(),
                wanted: join.fingerprint.clone(),
            });
        }
        let world_size = join.members.len();
        let Some(own) = join.members.get(join.rank) else {
            return Err(Error::BadRank { rank: join.rank, world_size });
        };
        let shares: Vec<u32> = join.members.iter().map(|member| member.share).collect();
        let split = shard::split(&checkpoint.config, &shares)?;
        let is_local = |member: &&Member| !own.host_id.is_empty() && member.host_id == own.host_id;
        let n_local_ranks = join.members.iter().filter(is_local).count().max(1);
        let options = &self.0.options;
        let max_running = join.max_sequences.unwrap_or(options.max_running);
        let max_running = max_running.clamp(1, options.max_batch_tokens);
        let n_cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let peer = |member: &Member| Peer {
            address: member.collective_address.clone(),
            host_id: member.host_id.clone(),
        };
        let spec = Spec {
            group: GroupSpec {
                epoch: join.epoch.get(),
                rank: join.rank,
                token: join.token.clone(),
                peers: join.members.iter().map(peer).collect(),
                transport: options.transport,
            },
            shares,
            split,
            join_timeout: join.join_timeout,
            step_timeout: join.step_timeout,
            backend: options.backend,
            backend_options: backend::Options {
                threads: options.threads,
                max_batch_tokens: options.max_batch_tokens,
                max_sample_rows: max_sample_rows(max_running),
                max_context: held.context_length,
                kv_format: join.kv_format,
                activations: join.activations,
                spin: n_local_ranks * options.threads <= n_cores,
                cores: cores_of(options, n_local_ranks),
            },
            max_running,
            max_waiting: options.max_waiting,
            max_stretch: options.max_stretch,
            max_drafts: options.max_drafts,
            kv_memory_bytes: options.kv_memory_bytes,
            n_local_ranks,
            tracer: options.tracer.clone(),
        };
        Ok((checkpoint, spec))
    }

    /// The lead of the epoch that is served.
    ///
    /// # Errors
    /// Another epoch, another rank, or not ready.
    pub fn lead(&self, epoch: u64) -> Result<Handle, Error> {
        let state = self.state();
        let not_served = |serving| Error::NotServed { asked: epoch, serving };
        let Some(current) = &state.current else {
            return Err(not_served("this worker is idle".to_owned()));
        };
        if current.number != epoch {
            return Err(not_served(format!("epoch {} is", current.number)));
        }
        let progress = current.progress.borrow();
        match &*progress {
            Progress::Ended(Ended::Left { reason } | Ended::Failed { reason }) => {
                Err(Error::Ended { epoch, reason: reason.clone() })
            }
            Progress::Connecting | Progress::Loading { .. } | Progress::Warming => {
                Err(Error::NotReady { epoch })
            }
            Progress::Ready(_) => {
                current.lead.get().cloned().ok_or(Error::NotLead { rank: current.rank })
            }
        }
    }

    /// Ends an epoch, in good order if it can be. An epoch that is not served is not an error.
    pub async fn leave(&self, epoch: u64, reason: &str) {
        let current = {
            let mut state = self.state();
            // A join that was overtaken by its own end must not revive it.
            state.newest = state.newest.max(epoch);
            state.current.clone().filter(|current| current.number == epoch)
        };
        if let Some(current) = current {
            end(&current, reason).await;
        }
    }

    /// Accepts no more, and waits up to `timeout` for what runs. Returns how many sequences still
    /// do.
    pub async fn drain(&self, timeout: Duration) -> u32 {
        self.state().is_draining = true;
        let deadline = Instant::now() + timeout;
        let figures = &self.0.figures;
        let (mut n_steps, mut quiet_since) = (figures.steps_total(), Instant::now());
        loop {
            let load = figures.load();
            let unfinished = load.n_running + load.n_waiting;
            // A follower does not know sequences; that no step comes is all it can see.
            if n_steps != figures.steps_total() {
                (n_steps, quiet_since) = (figures.steps_total(), Instant::now());
            }
            let is_quiet = quiet_since.elapsed() >= QUIET || !self.is_serving();
            if (unfinished == 0 && is_quiet) || Instant::now() >= deadline {
                return unfinished;
            }
            tokio::time::sleep(QUIET_POLL).await;
        }
    }

    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.state().is_draining
    }

    /// The model that an epoch serves here.
    #[must_use]
    pub fn served(&self, epoch: u64) -> Option<&Held> {
        let state = self.state();
        let current = state.current.as_ref().filter(|current| current.number == epoch)?;
        self.0.models.iter().find(|held| held.name.as_str() == current.model)
    }

    /// Drains, then leaves whatever group this is.
    pub async fn shut_down(&self, timeout: Duration) -> u32 {
        let unfinished = self.drain(timeout).await;
        let current = self.state().current.clone();
        if let Some(current) = current {
            end(&current, "the worker shuts down").await;
        }
        unfinished
    }

    /// The epoch that was asked for last, served or over.
    #[must_use]
    pub fn current(&self) -> Option<Arc<Epoch>> {
        self.state().current.clone()
    }

    fn is_serving(&self) -> bool {
        let current = self.current();
        current.is_some_and(|epoch| matches!(&*epoch.progress.borrow(), Progress::Ready(_)))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(current) = &state.current {
            current.abort.abort("the worker is gone");
        }
    }
}

fn attach(current: &Arc<Epoch>, join: &Join) -> Result<Arc<Epoch>, Error> {
    let epoch = current.number;
    if let Progress::Ended(Ended::Left { reason } | Ended::Failed { reason }) =
        &*current.progress.borrow()
    {
        return Err(Error::Ended { epoch, reason: reason.clone() });
    }
    if current.rank != join.rank {
        return Err(Error::OtherRank { epoch, rank: join.rank, was: current.rank });
    }
    Ok(Arc::clone(current))
}

/// Asks a ready lead to tell all ranks; whoever is not ready, or is not told in time, is aborted.
async fn end(epoch: &Epoch, reason: &str) {
    let _ = epoch.left.set(reason.to_owned());
    let mut progress = epoch.progress.subscribe();
    let has_ended = |progress: &Progress| matches!(progress, Progress::Ended(_));
    let is_ready = matches!(&*progress.borrow(), Progress::Ready(_));
    if is_ready {
        if let Some(lead) = epoch.lead.get() {
            let _ = lead.leave();
        }
        if tokio::time::timeout(LEAVE_GRACE, progress.wait_for(has_ended)).await.is_ok() {
            return;
        }
    }
    epoch.abort.abort(reason);
    if tokio::time::timeout(ABORT_GRACE, progress.wait_for(has_ended)).await.is_err() {
        tracing::warn!(epoch = epoch.number, "an aborted epoch has not ended yet");
    }
}

/// Core of each thread; none where the system is to choose.
fn cores_of(options: &config::Options, n_local_ranks: usize) -> Vec<usize> {
    match &options.cores {
        Cores::Anywhere => Vec::new(),
        Cores::On(cores) => cores[..options.threads].to_vec(),
        Cores::Auto => {
            let cores = host::cores();
            let fits = n_local_ranks == 1 && options.threads == cores.len();
            if fits { cores } else { Vec::new() }
        }
    }
}
