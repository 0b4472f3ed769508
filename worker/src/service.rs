//! The gRPC server: checks epochs, translates, calls the session; decides nothing.
//!
//! With sampling.rs the only file that knows worker.proto's types.

mod compile;
mod sampling;

use std::pin::Pin;
use std::time::Duration;

use evener_proto::MAX_MESSAGE_BYTES;
use evener_proto::ids::{Epoch, GroupId, ModelName, WorkerId};
use evener_proto::worker as proto;
use evener_proto::worker::worker_server::{Worker, WorkerServer};
use evener_telemetry::{Context, Incoming};
use futures::Stream;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::backend::{Activations, KV_BLOCK_LEN, KvFormat};
use crate::engine::handle;
use crate::engine::output::{End, Event, StepOutput, StreamEnd, TokenOut};
use crate::engine::sampler::Sampling;
use crate::engine::scheduler::Refusal;
use crate::engine::sequence::{Finish, Origin, Spec};
use crate::engine::{Outputs, Requests};
use crate::epoch::{Ended, Progress};
use crate::session::{self, Held, Join, Member, Session};
use compile::{Compiled, Compiling};

/// Longest a coordinator may have ranks wait for each other.
const MAX_TIMEOUT: Duration = Duration::from_secs(3600);
/// Messages on their way to a caller, beyond what the engine keeps for it.
const N_IN_FLIGHT: usize = 8;
/// Longest name of a user, or salt.
const MAX_LABEL_BYTES: usize = 4096;
/// How long a cancel is tried for while the lead does not look at its commands.
const CANCEL_TRIES: u32 = 500;
const CANCEL_PAUSE: Duration = Duration::from_millis(10);

/// The service over a session.
#[derive(Clone)]
pub struct Service {
    session: Session,
}

type BoxStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Service {
    #[must_use]
    pub fn server(session: Session) -> WorkerServer<Self> {
        WorkerServer::new(Self { session })
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }
}

#[tonic::async_trait]
impl Worker for Service {
    type JoinGroupStream = BoxStream<proto::JoinProgress>;
    type GenerateStream = BoxStream<proto::GenerateResponse>;

    async fn describe(
        &self,
        request: Request<proto::DescribeRequest>,
    ) -> Result<Response<proto::ModelDescription>, Status> {
        let name = ModelName::parse(&request.get_ref().model).map_err(invalid)?;
        let held = self.session.model(&name).map_err(refusal)?;
        Ok(Response::new(description(held)))
    }

    async fn join_group(
        &self,
        request: Request<proto::JoinGroupRequest>,
    ) -> Result<Response<Self::JoinGroupStream>, Status> {
        let join = join(request.into_inner())?;
        let epoch = self.session.join(join).map_err(refusal)?;
        let (sender, receiver) = mpsc::channel(N_IN_FLIGHT);
        let (progress, shard) = (epoch.progress.subscribe(), epoch.shard.clone());
        // Ends with the epoch, or when the caller is gone.
        tokio::spawn(report_progress(progress, shard, sender));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn leave_group(
        &self,
        request: Request<proto::LeaveGroupRequest>,
    ) -> Result<Response<proto::LeaveGroupResponse>, Status> {
        let proto::LeaveGroupRequest { epoch, reason } = request.into_inner();
        let reason = if reason.is_empty() { "no reason given".to_owned() } else { reason };
        self.session.leave(epoch, &reason).await;
        Ok(Response::new(proto::LeaveGroupResponse {}))
    }

    async fn generate(
        &self,
        request: Request<Streaming<proto::GenerateRequest>>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let (sender, receiver) = mpsc::channel(N_IN_FLIGHT);
        // Ends with the caller's stream or the epoch.
        tokio::spawn(generate(self.session.clone(), request.into_inner(), sender));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn drain(
        &self,
        request: Request<proto::DrainRequest>,
    ) -> Result<Response<proto::DrainResponse>, Status> {
        let timeout = Duration::from_millis(request.get_ref().timeout_ms.into()).min(MAX_TIMEOUT);
        let unfinished = self.session.drain(timeout).await;
        Ok(Response::new(proto::DrainResponse { unfinished }))
    }
}

// ---- JoinGroup

fn join(request: proto::JoinGroupRequest) -> Result<Join, Status> {
    let timeout = |what: &str, ms: u32| match ms {
        0 => Err(invalid(format!("{what} is 0; every wait needs a deadline"))),
        ms => Ok(Duration::from_millis(ms.into()).min(MAX_TIMEOUT)),
    };
    let member = |member: proto::Member| -> Result<Member, Status> {
        Ok(Member {
            worker_id: WorkerId::parse(&member.worker_id).map_err(invalid)?,
            collective_address: member.collective_address,
            host_id: member.host_id,
            share: member.share,
        })
    };
    Ok(Join {
        group_id: GroupId::parse(&request.group_id).map_err(invalid)?,
        epoch: Epoch::parse(request.epoch).map_err(invalid)?,
        model: ModelName::parse(&request.model).map_err(invalid)?,
        fingerprint: request.fingerprint,
        rank: request.rank as usize,
        members: request.members.into_iter().map(member).collect::<Result<_, _>>()?,
        token: request.token,
        join_timeout: timeout("join_timeout_ms", request.join_timeout_ms)?,
        step_timeout: timeout("step_timeout_ms", request.step_timeout_ms)?,
        max_sequences: (request.max_sequences > 0).then_some(request.max_sequences as usize),
        kv_format: kv_format(request.kv_format)?,
        activations: activations(request.activations)?,
    })
}

fn kv_format(number: i32) -> Result<KvFormat, Status> {
    Ok(match evener_proto::KvFormat::from_wire(number).map_err(invalid)? {
        evener_proto::KvFormat::F16 => KvFormat::F16,
        evener_proto::KvFormat::F32 => KvFormat::F32,
        evener_proto::KvFormat::Int8 => KvFormat::Int8,
    })
}

fn activations(number: i32) -> Result<Activations, Status> {
    Ok(match evener_proto::Activations::from_wire(number).map_err(invalid)? {
        evener_proto::Activations::Int12 => Activations::Int12,
        evener_proto::Activations::Int8 => Activations::Int8,
    })
}

async fn report_progress(
    mut progress: watch::Receiver<Progress>,
    shard: String,
    sender: mpsc::Sender<Result<proto::JoinProgress, Status>>,
) {
    loop {
        let now = progress.borrow_and_update().clone();
        let message = match now {
            Progress::Ended(Ended::Left { .. }) => return,
            Progress::Ended(Ended::Failed { reason }) => {
                let _ = sender.send(Err(Status::aborted(reason))).await;
                return;
            }
            now => join_progress(now, &shard),
        };
        if sender.send(Ok(message)).await.is_err() {
            return;
        }
        tokio::select! {
            changed = progress.changed() => if changed.is_err() { return },
            () = sender.closed() => return,
        }
    }
}

fn join_progress(progress: Progress, shard: &str) -> proto::JoinProgress {
    use proto::join_progress::Stage;
    let stage = |stage: Stage, detail: String| proto::JoinProgress {
        stage: stage.into(),
        detail,
        ..proto::JoinProgress::default()
    };
    match progress {
        Progress::Connecting => {
            stage(Stage::Connecting, "connecting to the other ranks".to_owned())
        }
        Progress::Loading { bytes_done, bytes_total } => proto::JoinProgress {
            bytes_done,
            bytes_total,
            ..stage(Stage::Loading, format!("loading {shard}"))
        },
        Progress::Warming => stage(Stage::Warming, "first step".to_owned()),
        Progress::Ready(ready) => proto::JoinProgress {
            ready: Some(proto::RankReady {
                resident_weight_bytes: ready.resident_weight_bytes,
                kv_blocks: ready.kv_blocks,
                group_kv_blocks: ready.group_kv_blocks,
                kv_block_len: KV_BLOCK_LEN as u32,
                shard: shard.to_owned(),
                backend: ready.backend,
                deterministic: ready.deterministic,
                links: ready.links.into_iter().map(str::to_owned).collect(),
                load_ms: ready.load_ms,
            }),
            ..stage(Stage::Ready, format!("ready: {shard}"))
        },
        Progress::Ended(_) => stage(Stage::Unspecified, "ended".to_owned()),
    }
}

// ---- Generate

/// The two directions of one stream, for as long as it lives.
async fn generate(
    session: Session,
    mut requests: Streaming<proto::GenerateRequest>,
    sender: mpsc::Sender<Result<proto::GenerateResponse, Status>>,
) {
    let end = match requests.message().await {
        Ok(Some(first)) => converse(&session, first, &mut requests, &sender).await,
        Ok(None) => return,
        Err(status) => Err(status),
    };
    if let Err(status) = end {
        let _ = sender.send(Err(status)).await;
    }
}

async fn converse(
    session: &Session,
    first: proto::GenerateRequest,
    requests: &mut Streaming<proto::GenerateRequest>,
    sender: &mpsc::Sender<Result<proto::GenerateResponse, Status>>,
) -> Result<(), Status> {
    let epoch = first.epoch;
    let lead = session.lead(epoch).map_err(refusal)?;
    let opened = lead.open(session.options().max_unread_outputs);
    let (ins, mut outs): (Requests, Outputs) = opened.map_err(unreachable_lead)?;
    let send = async |response| sender.send(Ok(response)).await.map_err(|_| Status::cancelled(""));
    let mut compiling = Compiling::default();
    let mut next = Some(first);
    let mut are_requests_open = true;
    loop {
        if let Some(request) = next.take()
            && let Some(error) = take_request(session, epoch, &ins, &mut compiling, request).await?
        {
            send(proto::GenerateResponse { epoch, events: vec![error], load: None }).await?;
        }
        tokio::select! {
            request = requests.message(), if are_requests_open => match request? {
                Some(request) => next = Some(request),
                // Half-closed: no more requests, but the running ones still have their tokens.
                None => are_requests_open = false,
            },
            compiled = compiling.next(), if !compiling.is_empty() => {
                if let Some(error) = compiled.and_then(|done| submit_compiled(&ins, done)) {
                    send(proto::GenerateResponse { epoch, events: vec![error], load: None }).await?;
                }
            }
            output = outs.recv() => match output {
                Some(output) => send(response(epoch, output)).await?,
                None => return Err(stream_end(&outs.end())),
            },
            () = sender.closed() => return Ok(()),
        }
    }
}

/// Hands a request on whose grammar was waited for.
fn submit_compiled(ins: &Requests, compiled: Compiled) -> Option<proto::SequenceEvent> {
    let Compiled { request_id, mut spec, grammar } = compiled;
    match grammar {
        Ok(grammar) => spec.sampling.grammar = Some(grammar),
        Err(message) => {
            return Some(error_event(request_id, proto::sequence_error::Kind::Grammar, message));
        }
    }
    submit(ins, request_id, spec)
}

fn submit(ins: &Requests, request_id: u64, spec: Spec) -> Option<proto::SequenceEvent> {
    match ins.submit(request_id, spec) {
        // Of one that is over the outputs end too, and say why.
        Ok(()) | Err(handle::Error::Over) => None,
        Err(error @ handle::Error::Busy) => {
            let kind = proto::sequence_error::Kind::Overloaded;
            Some(error_event(request_id, kind, error.to_string()))
        }
    }
}

/// Passes one request on; an error event if it was refused before it came to the lead.
async fn take_request(
    session: &Session,
    epoch: u64,
    ins: &Requests,
    compiling: &mut Compiling,
    request: proto::GenerateRequest,
) -> Result<Option<proto::SequenceEvent>, Status> {
    use proto::generate_request::Body;
    if request.epoch != epoch {
        return Err(Status::failed_precondition(format!(
            "this stream is of epoch {epoch}; the request is of epoch {}",
            request.epoch
        )));
    }
    match request.body {
        None => Err(invalid("a request has neither submit nor cancel")),
        Some(Body::Submit(mut wanted)) => {
            let request_id = wanted.request_id;
            let refused = |kind, message: String| Ok(Some(error_event(request_id, kind, message)));
            if session.is_draining() {
                let message = session::Error::Draining.to_string();
                return refused(proto::sequence_error::Kind::Overloaded, message);
            }
            let source = match sampling::source(wanted.sampling.as_mut()) {
                Ok(source) => source,
                Err(message) => return refused(proto::sequence_error::Kind::Grammar, message),
            };
            let spec = match spec(wanted) {
                Ok(spec) => spec,
                Err(message) => return refused(proto::sequence_error::Kind::Invalid, message),
            };
            let Some(source) = source else { return Ok(submit(ins, request_id, spec)) };
            // An epoch that is over says so by the end of the outputs.
            let Some(held) = session.served(epoch) else { return Ok(None) };
            match compiling.begin(held.clone(), source, request_id, spec) {
                Ok(()) => Ok(None),
                Err(message) => refused(proto::sequence_error::Kind::Overloaded, message),
            }
        }
        Some(Body::Cancel(cancel)) => {
            if compiling.cancel(cancel.request_id) {
                return Ok(None);
            }
            for _ in 0..CANCEL_TRIES {
                match ins.cancel(cancel.request_id) {
                    Ok(()) | Err(handle::Error::Over) => return Ok(None),
                    Err(handle::Error::Busy) => tokio::time::sleep(CANCEL_PAUSE).await,
                }
            }
            // Ending the stream cancels everything of it.
            Err(Status::resource_exhausted("the lead does not take the cancel"))
        }
    }
}

fn spec(submit: proto::Submit) -> Result<Spec, String> {
    let n_prompt = submit.prompt.len();
    let sampling = match submit.sampling {
        Some(sampling) => sampling::parse(sampling, n_prompt)?,
        None => Sampling::default(),
    };
    Ok(Spec {
        prompt: submit.prompt,
        max_tokens: submit.max_tokens,
        sampling,
        prompt_logprobs: submit.prompt_logprobs,
        origin: Origin {
            trace: trace(&submit.traceparent),
            ..origin(submit.user, submit.cache_salt, submit.priority)?
        },
    })
}

fn origin(user: String, salt: String, priority: i32) -> Result<Origin, String> {
    for (what, text) in [("user", &user), ("cache_salt", &salt)] {
        if text.len() > MAX_LABEL_BYTES {
            return Err(format!("{what} is {} bytes; {MAX_LABEL_BYTES} are allowed", text.len()));
        }
    }
    Ok(Origin { user, salt, priority, trace: None })
}

/// The span that a request is a part of, if it is sampled.
fn trace(traceparent: &str) -> Option<Context> {
    let incoming = Incoming::parse(traceparent)?;
    incoming.sampled.then_some(incoming.context)
}

fn response(epoch: u64, output: StepOutput) -> proto::GenerateResponse {
    let StepOutput { events, load } = output;
    let mut told: Vec<proto::SequenceEvent> = Vec::with_capacity(events.len());
    for event in events.into_iter().map(event) {
        match told.last_mut().filter(|last| goes_on(last, &event)) {
            Some(last) => {
                last.tokens.extend(event.tokens);
                last.finish = event.finish;
                last.lead_us = event.lead_us;
            }
            None => told.push(event),
        }
    }
    proto::GenerateResponse {
        epoch,
        events: told,
        load: Some(proto::LoadSnapshot {
            running: load.n_running,
            waiting: load.n_waiting,
            kv_blocks_free: load.kv_blocks_free,
            kv_blocks_total: load.kv_blocks_total,
        }),
    }
}

/// Whether `next` is about another token of the same step and sequence.
fn goes_on(last: &proto::SequenceEvent, next: &proto::SequenceEvent) -> bool {
    let runs = last.finish == i32::from(proto::FinishReason::Running) && last.error.is_none();
    runs && last.request_id == next.request_id && next.error.is_none()
}

fn event(event: Event) -> proto::SequenceEvent {
    let Event { request_id, token, prompt_tokens, n_cached, end, lead_time } = event;
    let finish = match end {
        Some(End::Refused(refusal)) => {
            let kind = match refusal {
                Refusal::Overloaded { .. } => proto::sequence_error::Kind::Overloaded,
                Refusal::EmptyPrompt
                | Refusal::NothingToDo
                | Refusal::TooLong { .. }
                | Refusal::TooFewBlocks { .. }
                | Refusal::BadToken { .. }
                | Refusal::BadPriority { .. } => proto::sequence_error::Kind::Invalid,
            };
            return error_event(request_id, kind, refusal.to_string());
        }
        Some(End::Failed { reason }) => {
            return error_event(request_id, proto::sequence_error::Kind::Grammar, reason);
        }
        Some(End::Finished(Finish::Stop)) => proto::FinishReason::Stop,
        Some(End::Finished(Finish::Length)) => proto::FinishReason::Length,
        None => proto::FinishReason::Running,
    };
    proto::SequenceEvent {
        request_id,
        tokens: token.into_iter().map(token_out).collect(),
        finish: finish.into(),
        error: None,
        prompt_tokens: prompt_tokens.into_iter().map(token_out).collect(),
        cached_tokens: n_cached,
        lead_us: lead_time.map(|time| u64::try_from(time.as_micros()).unwrap_or(u64::MAX)),
    }
}

fn token_out(token: TokenOut) -> proto::TokenOut {
    let top = |(id, logprob)| proto::TokenLogprob { id, logprob };
    proto::TokenOut {
        id: token.id,
        logprob: token.logprob.unwrap_or(0.0),
        top: token.top.into_iter().map(top).collect(),
    }
}

fn error_event(
    request_id: u64,
    kind: proto::sequence_error::Kind,
    message: String,
) -> proto::SequenceEvent {
    let error = Some(proto::SequenceError { kind: kind.into(), message });
    proto::SequenceEvent { request_id, error, ..proto::SequenceEvent::default() }
}

// ---- Describe

fn description(held: &Held) -> proto::ModelDescription {
    let description = held.checkpoint.description.clone();
    let (bos, eos) = (description.bos, description.eos);
    proto::ModelDescription {
        model: held.name.to_string(),
        architecture: description.architecture,
        quantization: description.quantization,
        licence: description.licence,
        tokenizer_json: description.tokenizer_json.into(),
        chat_template: description.chat_template,
        bos_token_id: bos.as_ref().map(|token| token.id),
        add_bos_token: description.add_bos,
        eos_token_ids: description.eos_token_ids,
        context_length: held.context_length as u32,
        vocab_size: description.vocab as u32,
        n_layers: description.n_layers as u32,
        n_heads: description.n_heads as u32,
        n_kv_heads: description.n_kv_heads as u32,
        n_parameters: description.n_parameters,
        weight_bytes: description.weight_bytes,
        kv_bytes_per_token: description.kv_bytes_per_token,
        fingerprint: description.fingerprint,
        bos_token: bos.map(|token| token.text).unwrap_or_default(),
        eos_token: eos.map(|token| token.text).unwrap_or_default(),
    }
}

// ---- Status

fn invalid(error: impl std::fmt::Display) -> Status {
    Status::invalid_argument(error.to_string())
}

fn refusal(error: session::Error) -> Status {
    use session::Error;
    let message = error.to_string();
    match error {
        Error::Stale { .. }
        | Error::Ended { .. }
        | Error::NotServed { .. }
        | Error::NotReady { .. }
        | Error::NotLead { .. }
        | Error::OtherRank { .. }
        | Error::OtherFile { .. } => Status::failed_precondition(message),
        Error::UnknownModel { .. } => Status::not_found(message),
        Error::BadRank { .. } | Error::Split(_) => Status::invalid_argument(message),
        Error::Draining => Status::unavailable(message),
        Error::Os { .. } => Status::internal(message),
    }
}

fn unreachable_lead(error: handle::Error) -> Status {
    let message = error.to_string();
    match error {
        handle::Error::Busy => Status::resource_exhausted(message),
        handle::Error::Over => Status::aborted(message),
    }
}

fn stream_end(end: &StreamEnd) -> Status {
    let message = end.to_string();
    match end {
        StreamEnd::EpochOver { .. } => Status::aborted(message),
        StreamEnd::Slow { .. } => Status::resource_exhausted(message),
        StreamEnd::RequestIdInUse { .. } => Status::invalid_argument(message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::output::Load;

    fn token(request_id: u64, id: u32, end: Option<End>) -> Event {
        let token = Some(TokenOut { id, logprob: None, top: Vec::new() });
        let lead_time = end.as_ref().map(|_| Duration::from_millis(7));
        let prompt_tokens = Vec::new();
        Event { request_id, token, prompt_tokens, n_cached: 0, end, lead_time }
    }

    #[test]
    fn tokens_of_one_step_and_sequence_are_one_event() {
        let refused = End::Refused(Refusal::NothingToDo);
        let events = vec![
            token(1, 10, None),
            token(1, 11, None),
            token(1, 12, Some(End::Finished(Finish::Stop))),
            token(2, 20, None),
            Event { token: None, ..token(2, 0, Some(refused)) },
            token(2, 21, None), // another request of that number
        ];
        let load = Load::default();
        let response = response(3, StepOutput { events, load });
        let brief = |event: &proto::SequenceEvent| {
            let ids: Vec<u32> = event.tokens.iter().map(|token| token.id).collect();
            (event.request_id, ids, event.finish(), event.lead_us, event.error.is_some())
        };
        let (running, stop) = (proto::FinishReason::Running, proto::FinishReason::Stop);
        let expect = [
            (1, vec![10, 11, 12], stop, Some(7000), false),
            (2, vec![20], running, None, false),
            (2, vec![], running, None, true),
            (2, vec![21], running, None, false),
        ];
        assert!(response.events.iter().map(brief).eq(expect));
    }
}
