//! The one gRPC stream this coordinator has to the lead rank of a group: requests in, tokens out.
//!
//! All requests share it, told apart by number. Dropping a [`Sequence`] cancels it at the lead;
//! losing the lead interrupts every sequence of the stream. link.rs is the task behind it. Called
//! by generation.rs; decides nothing about where a request goes or whether it is tried again.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use evener_proto::ids::Epoch;
use evener_telemetry::Context;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use super::handle::{Directory, ReadyGroup};
use super::link::{Command, Link, Stats};

/// Bounds of every stream.
#[derive(Debug, Clone)]
pub struct Options {
    /// For connecting to a lead and opening the stream. Default 2 s.
    pub connect_timeout: Duration,
    /// Between HTTP/2 pings; with the timeout below, a silent lead is noticed in their sum. Default
    /// 1 s.
    pub keepalive_interval: Duration,
    /// For the answer to a ping. Default 1 s.
    pub keepalive_timeout: Duration,
    /// Requests waiting to be written to one stream. Default 256.
    pub submit_queue: usize,
    /// Events that a slow reader may fall behind before its sequence is cancelled. Default 4096.
    pub events_per_sequence: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(2),
            keepalive_interval: Duration::from_secs(1),
            keepalive_timeout: Duration::from_secs(1),
            submit_queue: 256,
            events_per_sequence: 4096,
        }
    }
}

/// What a lead needs to generate.
#[derive(Clone)]
pub struct Submit {
    /// Token ids, at least one.
    pub prompt: Vec<u32>,
    pub sampling: Sampling,
    /// At least 1; prompt + max_tokens <= context.
    pub max_tokens: u32,
    /// Report every prompt position but the first.
    pub prompt_logprobs: bool,
    pub origin: Origin,
    /// The span it is a part of, if it is traced.
    pub trace: Option<Context>,
}

/// Whose a sequence is, and how urgent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Origin {
    /// Users share a lead fairly.
    pub user: String,
    /// Only sequences of equal salt share what is cached of prompts.
    pub salt: String,
    /// Lower is sooner; within [`MAX_PRIORITY`].
    pub priority: i32,
}

/// Priorities go from minus this to this.
pub const MAX_PRIORITY: i32 = 100;

/// How a token is chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 is off.
    pub top_k: u32,
    /// 1 is off.
    pub top_p: f32,
    /// 0 is off.
    pub min_p: f32,
    /// 1 is off.
    pub repetition_penalty: f32,
    /// 0 is off.
    pub presence_penalty: f32,
    /// 0 is off.
    pub frequency_penalty: f32,
    /// Each token once.
    pub logit_bias: Vec<(u32, f32)>,
    pub seed: u64,
    /// End the sequence; reported as its last token.
    pub stop_token_ids: Vec<u32>,
    /// None of them comes before so many tokens.
    pub min_tokens: u32,
    /// Of the prompt's last tokens: so many were generated before an interruption.
    pub n_resumed: u32,
    /// What the output must be.
    pub grammar: Option<Grammar>,
    /// Absent: no logprobs; 0: of the chosen token only.
    pub n_logprobs: Option<u32>,
}

/// What an output must be; the lead compiles it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Grammar {
    /// JSON that fits this schema, which is JSON text itself.
    JsonSchema(Arc<str>),
    /// Text that this expression matches as a whole.
    Regex(Arc<str>),
    /// Text of this language, in llguidance's variant of Lark.
    Lark(Arc<str>),
}

/// A token and what it was chosen from.
#[derive(Clone, PartialEq)]
pub struct Token {
    pub id: u32,
    /// Natural log; meaningless unless logprobs were asked for.
    pub logprob: f32,
    /// Best first.
    pub top: Vec<(u32, f32)>,
}

/// Why a sequence ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// A stop token, which is the last of the tokens.
    Stop,
    /// max_tokens or the context.
    Length,
}

/// Why a lead will not generate for this request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// It can never run there.
    Invalid(String),
    /// The queue is full.
    Overloaded(String),
    Internal(String),
    /// The grammar cannot be used, or not any longer.
    Grammar(String),
}

/// What one step did to one sequence. After `finish` there is no more.
#[derive(Clone, Default)]
pub struct Event {
    /// Positions 1.. of the prompt, in order, over one or more events.
    pub prompt_tokens: Vec<Token>,
    pub tokens: Vec<Token>,
    /// With the first token: how many of the prompt's were in the lead's cache.
    pub n_cached: u32,
    pub finish: Option<Finish>,
    /// With the finish: since the request arrived at the lead.
    pub lead_time: Option<Duration>,
}

/// Why a sequence ended badly.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("the lead of epoch {epoch} could not be reached: {reason}")]
    Unreachable { epoch: Epoch, reason: String },
    #[error("the stream to the lead of epoch {epoch} broke: {reason}")]
    Interrupted { epoch: Epoch, reason: String },
    #[error("the reader fell {behind} events behind")]
    Overrun { behind: usize },
    #[error("the lead refused: {0:?}")]
    Refused(Refusal),
}

/// One running request. Dropping it cancels it at the lead.
pub struct Sequence {
    id: u64,
    events: mpsc::Receiver<Result<Event, Error>>,
    /// Set before the events' sender goes, if that was not a finish.
    broken: Arc<OnceLock<Error>>,
    cancels: mpsc::UnboundedSender<u64>,
    stats: Arc<Stats>,
    epoch: Epoch,
    ended: bool,
}

impl Sequence {
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The next step of this sequence.
    ///
    /// # Errors
    /// The lead refused it, or the stream is gone; nothing comes after that.
    pub async fn next(&mut self) -> Result<Event, Error> {
        let result = match self.events.recv().await {
            Some(result) => result,
            None => Err(self.broken.get().cloned().unwrap_or_else(|| Error::Interrupted {
                epoch: self.epoch,
                reason: "the stream was closed".to_owned(),
            })),
        };
        self.ended |= !matches!(&result, Ok(event) if event.finish.is_none());
        result
    }
}

impl Drop for Sequence {
    fn drop(&mut self) {
        self.stats.in_flight.fetch_sub(1, Ordering::Relaxed);
        // Closed first, so that a submission not yet read is seen to be unwanted.
        self.events.close();
        if !self.ended {
            // Fails only when the stream is gone, and the sequence with it.
            let _ = self.cancels.send(self.id);
        }
    }
}

/// Load of one group, as far as this coordinator knows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Load {
    pub in_flight: u32,
    pub running: u32,
    pub waiting: u32,
}

struct Entry {
    commands: mpsc::Sender<Command>,
    /// One message per dropped sequence at most, so it is bounded by the sequences in flight.
    cancels: mpsc::UnboundedSender<u64>,
    stats: Arc<Stats>,
    next_id: AtomicU64,
    _task: AbortOnDropHandle<()>,
}

/// The streams of this coordinator, one per epoch, opened when first needed.
#[derive(Clone)]
pub struct Streams {
    options: Arc<Options>,
    entries: Arc<Mutex<HashMap<Epoch, Arc<Entry>>>>,
}

impl Streams {
    #[must_use]
    pub fn new(options: Options) -> Self {
        Self { options: Arc::new(options), entries: Arc::default() }
    }

    /// Starts a sequence on a group; how it goes is told by [`Sequence::next`].
    ///
    /// # Errors
    /// The stream went between two words, or its queue is full.
    pub fn submit(&self, group: &ReadyGroup, submit: Submit) -> Result<Sequence, Error> {
        let entry = self.entry(group);
        let (events_tx, events) = mpsc::channel(self.options.events_per_sequence);
        let broken = Arc::<OnceLock<Error>>::default();
        let id = entry.next_id.fetch_add(1, Ordering::Relaxed);
        let command = Command { id, submit, events: events_tx, broken: broken.clone() };
        entry.commands.try_send(command).map_err(|e| match e {
            mpsc::error::TrySendError::Full(_) => {
                let bound = self.options.submit_queue;
                Error::Refused(Refusal::Overloaded(format!(
                    "{bound} requests already wait to be sent to this group"
                )))
            }
            mpsc::error::TrySendError::Closed(_) => Error::Unreachable {
                epoch: group.epoch,
                reason: "the stream has just closed".to_owned(),
            },
        })?;
        entry.stats.in_flight.fetch_add(1, Ordering::Relaxed);
        Ok(Sequence {
            id,
            events,
            broken,
            cancels: entry.cancels.clone(),
            stats: entry.stats.clone(),
            epoch: group.epoch,
            ended: false,
        })
    }

    /// What is known of a group's load; zero if this coordinator has no stream to it.
    #[must_use]
    pub fn load(&self, epoch: Epoch) -> Load {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.get(&epoch).map_or_else(Load::default, |entry| Load {
            in_flight: entry.stats.in_flight.load(Ordering::Relaxed),
            running: entry.stats.running.load(Ordering::Relaxed),
            waiting: entry.stats.waiting.load(Ordering::Relaxed),
        })
    }

    /// Closes streams that nobody uses and whose epoch is no longer ready.
    pub fn prune(&self, directory: &Directory) {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.retain(|epoch, entry| {
            entry.stats.in_flight.load(Ordering::Relaxed) > 0
                || directory.groups.iter().any(|group| group.epoch == *epoch)
        });
    }

    fn entry(&self, group: &ReadyGroup) -> Arc<Entry> {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = entries.get(&group.epoch)
            && !entry.commands.is_closed()
        {
            return entry.clone();
        }
        let (commands, commands_rx) = mpsc::channel(self.options.submit_queue);
        let (cancels, cancels_rx) = mpsc::unbounded_channel();
        let stats = Arc::<Stats>::default();
        let link = Link::new(group, self.options.clone(), stats.clone());
        let task = AbortOnDropHandle::new(tokio::spawn(link.run(commands_rx, cancels_rx)));
        let entry =
            Arc::new(Entry { commands, cancels, stats, next_id: AtomicU64::new(1), _task: task });
        entries.insert(group.epoch, entry.clone());
        entry
    }
}
