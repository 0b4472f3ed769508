//! The one gRPC stream this coordinator has to the lead rank of a group: requests in, tokens out.
//!
//! All requests share it, told apart by number. Dropping a [`Sequence`] cancels it at the lead;
//! losing the lead interrupts every sequence of the stream. Generated types stop here. Called by
//! generation.rs; decides nothing about where a request goes or whether it is tried again.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use evener_proto::MAX_MESSAGE_BYTES;
use evener_proto::ids::Epoch;
use evener_proto::worker as wire;
use evener_proto::worker::worker_client::WorkerClient;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::AbortOnDropHandle;
use tonic::Streaming;
use tonic::transport::Endpoint;
use tracing::{debug, warn};

use super::handle::{Directory, ReadyGroup};

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
}

/// How a token is chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 is off.
    pub top_k: u32,
    /// 1 is off.
    pub top_p: f32,
    pub seed: u64,
    /// End the sequence; reported as its last token.
    pub stop_token_ids: Vec<u32>,
    /// Absent: no logprobs; 0: of the chosen token only.
    pub n_logprobs: Option<u32>,
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
}

/// What one step did to one sequence. After `finish` there is no more.
#[derive(Clone, Default)]
pub struct Event {
    /// Positions 1.. of the prompt, in order, over one or more events.
    pub prompt_tokens: Vec<Token>,
    pub tokens: Vec<Token>,
    pub finish: Option<Finish>,
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

#[derive(Default)]
struct Stats {
    in_flight: AtomicU32,
    running: AtomicU32,
    waiting: AtomicU32,
}

struct Command {
    id: u64,
    submit: Submit,
    events: mpsc::Sender<Result<Event, Error>>,
    broken: Arc<OnceLock<Error>>,
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
        let link = Link {
            epoch: group.epoch,
            address: group.lead_address.clone(),
            options: self.options.clone(),
            stats: stats.clone(),
            sequences: HashMap::new(),
            outbox: VecDeque::new(),
        };
        let task = AbortOnDropHandle::new(tokio::spawn(link.run(commands_rx, cancels_rx)));
        let entry =
            Arc::new(Entry { commands, cancels, stats, next_id: AtomicU64::new(1), _task: task });
        entries.insert(group.epoch, entry.clone());
        entry
    }
}

struct Waiting {
    events: mpsc::Sender<Result<Event, Error>>,
    broken: Arc<OnceLock<Error>>,
}

/// The task that owns one stream.
struct Link {
    epoch: Epoch,
    address: String,
    options: Arc<Options>,
    stats: Arc<Stats>,
    sequences: HashMap<u64, Waiting>,
    /// Not yet taken by the transport. Commands are taken only while it is short.
    outbox: VecDeque<wire::GenerateRequest>,
}

impl Link {
    async fn run(
        mut self,
        mut commands: mpsc::Receiver<Command>,
        mut cancels: mpsc::UnboundedReceiver<u64>,
    ) {
        let epoch = self.epoch;
        let error = match self.connect().await {
            Ok((requests, responses)) => {
                debug!(%epoch, lead = %self.address, "stream to lead opened");
                match self.serve(&mut commands, &mut cancels, requests, responses).await {
                    Ok(()) => return,
                    Err(reason) => Error::Interrupted { epoch, reason },
                }
            }
            Err(reason) => Error::Unreachable { epoch, reason },
        };
        warn!(%epoch, lead = %self.address, %error, sequences = self.sequences.len(), "lead lost");
        for waiting in self.sequences.into_values() {
            let _ = waiting.broken.set(error.clone());
        }
        // What had not been written never reached the lead.
        commands.close();
        while let Ok(command) = commands.try_recv() {
            let reason = error.to_string();
            let _ = command.broken.set(Error::Unreachable { epoch, reason });
        }
    }

    async fn connect(
        &self,
    ) -> Result<(mpsc::Sender<wire::GenerateRequest>, Streaming<wire::GenerateResponse>), String>
    {
        let opening = async {
            let channel = Endpoint::from_shared(format!("http://{}", self.address))
                .map_err(|e| format!("`{}` is no address: {e}", self.address))?
                .connect_timeout(self.options.connect_timeout)
                .http2_keep_alive_interval(self.options.keepalive_interval)
                .keep_alive_timeout(self.options.keepalive_timeout)
                .keep_alive_while_idle(true)
                .tcp_nodelay(true)
                .connect()
                .await
                .map_err(|e| chain(&e))?;
            let mut client = WorkerClient::new(channel)
                .max_decoding_message_size(MAX_MESSAGE_BYTES)
                .max_encoding_message_size(MAX_MESSAGE_BYTES);
            let (requests, requests_rx) = mpsc::channel(16);
            let responses = client
                .generate(ReceiverStream::new(requests_rx))
                .await
                .map_err(|status| describe(&status))?;
            Ok((requests, responses.into_inner()))
        };
        let timeout = self.options.connect_timeout;
        tokio::time::timeout(timeout, opening)
            .await
            .unwrap_or_else(|_| Err(format!("no answer within {timeout:?}")))
    }

    /// Runs until nobody holds this stream (Ok) or it breaks (why).
    async fn serve(
        &mut self,
        commands: &mut mpsc::Receiver<Command>,
        cancels: &mut mpsc::UnboundedReceiver<u64>,
        requests: mpsc::Sender<wire::GenerateRequest>,
        mut responses: Streaming<wire::GenerateResponse>,
    ) -> Result<(), String> {
        loop {
            // Never wait for the transport while answers wait to be read: with both directions
            // full that would be a deadlock.
            tokio::select! {
                command = commands.recv(), if self.outbox.len() < self.options.submit_queue => {
                    match command {
                        Some(command) => self.submit(command),
                        None => return Ok(()),
                    }
                }
                Some(id) = cancels.recv() => self.cancel(id),
                permit = requests.reserve(), if !self.outbox.is_empty() => {
                    let permit = permit.map_err(|_| "the lead closed the stream".to_owned())?;
                    if let Some(request) = self.outbox.pop_front() {
                        permit.send(request);
                    }
                }
                response = responses.message() => match response {
                    Ok(Some(response)) => self.deliver(response)?,
                    Ok(None) => return Err("the lead ended the stream".to_owned()),
                    Err(status) => return Err(describe(&status)),
                },
            }
        }
    }

    fn submit(&mut self, command: Command) {
        let Command { id, submit, events, broken } = command;
        if events.is_closed() {
            return;
        }
        self.sequences.insert(id, Waiting { events, broken });
        self.push(wire::generate_request::Body::Submit(to_wire(id, submit)));
    }

    fn cancel(&mut self, id: u64) {
        if self.sequences.remove(&id).is_some() {
            let cancel = wire::Cancel { request_id: id };
            self.push(wire::generate_request::Body::Cancel(cancel));
        }
    }

    fn push(&mut self, body: wire::generate_request::Body) {
        self.outbox.push_back(wire::GenerateRequest { epoch: self.epoch.get(), body: Some(body) });
    }

    fn deliver(&mut self, response: wire::GenerateResponse) -> Result<(), String> {
        if response.epoch != self.epoch.get() {
            let ours = self.epoch;
            return Err(format!("an answer of epoch {}, not {ours}", response.epoch));
        }
        if let Some(load) = response.load {
            self.stats.running.store(load.running, Ordering::Relaxed);
            self.stats.waiting.store(load.waiting, Ordering::Relaxed);
        }
        for event in response.events {
            let id = event.request_id;
            let Some(waiting) = self.sequences.get(&id) else {
                continue; // cancelled here, not yet there
            };
            let result = from_wire(event)?;
            let ended = !matches!(&result, Ok(event) if event.finish.is_none());
            match waiting.events.try_send(result) {
                Ok(()) if ended => {
                    self.sequences.remove(&id);
                }
                Ok(()) => {}
                Err(mpsc::error::TrySendError::Closed(_)) if ended => {
                    self.sequences.remove(&id);
                }
                Err(mpsc::error::TrySendError::Closed(_)) => self.cancel(id),
                Err(mpsc::error::TrySendError::Full(_)) => {
                    let behind = self.options.events_per_sequence;
                    let _ = waiting.broken.set(Error::Overrun { behind });
                    self.cancel(id);
                }
            }
        }
        Ok(())
    }
}

fn to_wire(request_id: u64, submit: Submit) -> wire::Submit {
    let Submit { prompt, sampling, max_tokens, prompt_logprobs } = submit;
    let Sampling { temperature, top_k, top_p, seed, stop_token_ids, n_logprobs } = sampling;
    let sampling = wire::Sampling { temperature, top_k, top_p, seed, stop_token_ids, n_logprobs };
    wire::Submit { request_id, prompt, sampling: Some(sampling), max_tokens, prompt_logprobs }
}

/// The outer error breaks the stream: the lead does not speak our language.
fn from_wire(event: wire::SequenceEvent) -> Result<Result<Event, Error>, String> {
    if let Some(error) = event.error {
        use wire::sequence_error::Kind;
        let refusal = match error.kind() {
            Kind::Invalid => Refusal::Invalid(error.message),
            Kind::Overloaded => Refusal::Overloaded(error.message),
            Kind::Internal | Kind::Unspecified => Refusal::Internal(error.message),
        };
        return Ok(Err(Error::Refused(refusal)));
    }
    let finish = match wire::FinishReason::try_from(event.finish) {
        Ok(wire::FinishReason::Running) => None,
        Ok(wire::FinishReason::Stop) => Some(Finish::Stop),
        Ok(wire::FinishReason::Length) => Some(Finish::Length),
        Err(_) => return Err(format!("the lead sent the unknown finish {}", event.finish)),
    };
    let token = |token: wire::TokenOut| Token {
        id: token.id,
        logprob: finite(token.logprob),
        top: token.top.into_iter().map(|top| (top.id, finite(top.logprob))).collect(),
    };
    Ok(Ok(Event {
        prompt_tokens: event.prompt_tokens.into_iter().map(token).collect(),
        tokens: event.tokens.into_iter().map(token).collect(),
        finish,
    }))
}

/// JSON has no infinity; OpenAI writes -9999 for a token that cannot come.
fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { -9999.0 }
}

fn describe(status: &tonic::Status) -> String {
    format!("{:?}: {}", status.code(), status.message())
}

/// An error with its causes; tonic's own text is only "transport error".
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
