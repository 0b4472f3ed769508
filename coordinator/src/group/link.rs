//! The task behind one stream: connects to a lead, writes requests, hands each answer to its
//! sequence.
//!
//! Generated types stop here. Spawned and owned by stream.rs.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use evener_proto::MAX_MESSAGE_BYTES;
use evener_proto::ids::Epoch;
use evener_proto::worker as wire;
use evener_proto::worker::worker_client::WorkerClient;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Endpoint;
use tracing::{debug, warn};

use super::handle::ReadyGroup;
use super::stream::{Error, Event, Finish, Grammar, Options, Refusal, Sampling, Submit, Token};

/// Shared with the handles of a stream.
#[derive(Default)]
pub struct Stats {
    pub in_flight: AtomicU32,
    pub running: AtomicU32,
    pub waiting: AtomicU32,
}

/// A request to be sent.
pub struct Command {
    pub id: u64,
    pub submit: Submit,
    pub events: mpsc::Sender<Result<Event, Error>>,
    pub broken: Arc<OnceLock<Error>>,
}

struct Waiting {
    events: mpsc::Sender<Result<Event, Error>>,
    broken: Arc<OnceLock<Error>>,
}

/// The task that owns one stream.
pub struct Link {
    epoch: Epoch,
    address: String,
    options: Arc<Options>,
    stats: Arc<Stats>,
    sequences: HashMap<u64, Waiting>,
    /// Not yet taken by the transport. Commands are taken only while it is short.
    outbox: VecDeque<wire::GenerateRequest>,
}

impl Link {
    pub fn new(group: &ReadyGroup, options: Arc<Options>, stats: Arc<Stats>) -> Self {
        Self {
            epoch: group.epoch,
            address: group.lead_address.clone(),
            options,
            stats,
            sequences: HashMap::new(),
            outbox: VecDeque::new(),
        }
    }

    pub async fn run(
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
    let Submit { prompt, sampling, max_tokens, prompt_logprobs, origin, trace } = submit;
    wire::Submit {
        request_id,
        prompt,
        sampling: Some(sampling_to_wire(sampling)),
        max_tokens,
        prompt_logprobs,
        user: origin.user,
        cache_salt: origin.salt,
        priority: origin.priority,
        traceparent: trace.map(|trace| trace.to_string()).unwrap_or_default(),
    }
}

fn sampling_to_wire(sampling: Sampling) -> wire::Sampling {
    let bias = |(id, bias)| wire::LogitBias { id, bias };
    wire::Sampling {
        temperature: sampling.temperature,
        top_k: sampling.top_k,
        top_p: sampling.top_p,
        seed: sampling.seed,
        stop_token_ids: sampling.stop_token_ids,
        n_logprobs: sampling.n_logprobs,
        min_p: sampling.min_p,
        repetition_penalty: sampling.repetition_penalty,
        presence_penalty: sampling.presence_penalty,
        frequency_penalty: sampling.frequency_penalty,
        logit_bias: sampling.logit_bias.into_iter().map(bias).collect(),
        min_tokens: sampling.min_tokens,
        n_resumed: sampling.n_resumed,
        grammar: sampling.grammar.map(grammar_to_wire),
    }
}

fn grammar_to_wire(grammar: Grammar) -> wire::Grammar {
    use wire::grammar::Source;
    let source = match grammar {
        Grammar::JsonSchema(text) => Source::JsonSchema(text.as_ref().to_owned()),
        Grammar::Regex(text) => Source::Regex(text.as_ref().to_owned()),
        Grammar::Lark(text) => Source::Lark(text.as_ref().to_owned()),
    };
    wire::Grammar { source: Some(source) }
}

/// The outer error breaks the stream: the lead does not speak our language.
fn from_wire(event: wire::SequenceEvent) -> Result<Result<Event, Error>, String> {
    if let Some(error) = event.error {
        use wire::sequence_error::Kind;
        let refusal = match error.kind() {
            Kind::Invalid => Refusal::Invalid(error.message),
            Kind::Overloaded => Refusal::Overloaded(error.message),
            Kind::Grammar => Refusal::Grammar(error.message),
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
        n_cached: event.cached_tokens,
        finish,
        lead_time: event.lead_us.map(Duration::from_micros),
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
