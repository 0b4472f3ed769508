//! A lead rank as a coordinator sees it: a real gRPC server that speaks `Worker.Generate` and makes
//! tokens by a rule.
//!
//! It runs on a runtime of its own, so that it can die or fall silent like a process.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use evener_proto::worker as wire;
use evener_proto::worker::worker_server::{Worker, WorkerServer};
use futures::Stream;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

/// The token of a sequence at a position, given its prompt (with the tokens generated so far) and
/// its sampling.
pub type Rule = Arc<dyn Fn(&[u32], &wire::Sampling) -> u32 + Send + Sync>;

/// What a lead was asked.
#[derive(Debug, Clone)]
pub enum Seen {
    Submit(Box<wire::Submit>),
    Cancel,
}

/// How a lead behaves.
#[derive(Clone)]
pub struct Script {
    pub rule: Rule,
    pub stop_token: u32,
    /// Refuses every request with this.
    pub refusal: Option<wire::SequenceError>,
}

pub struct Lead {
    pub address: SocketAddr,
    pub epoch: u64,
    pub group: String,
    seen: Arc<Mutex<Vec<Seen>>>,
    /// A sequence may not grow past this position.
    limit: watch::Sender<usize>,
    end: Option<Sender<End>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

enum End {
    Die,
    /// Keeps its sockets and says nothing more, until it dies.
    FallSilent,
}

impl Lead {
    pub fn start(epoch: u64, script: Script) -> Self {
        let seen = Arc::<Mutex<Vec<Seen>>>::default();
        let (limit, limit_rx) = watch::channel(usize::MAX);
        let (end, ends) = channel();
        let (address_tx, address_rx) = channel();
        let service = Service { epoch, script, seen: seen.clone(), limit: limit_rx };
        let thread = std::thread::spawn(move || live(service, &address_tx, &ends));
        let address = address_rx.recv_timeout(Duration::from_secs(10)).unwrap();
        let group = format!("g{epoch}");
        Self { address, epoch, group, seen, limit, end: Some(end), thread: Some(thread) }
    }

    /// Instead of a group of its own.
    pub fn of_group(mut self, group: &str) -> Self {
        self.group = group.to_owned();
        self
    }

    /// No sequence grows past this many tokens, prompt included, until told otherwise.
    pub fn hold_at(&self, position: usize) {
        self.limit.send_replace(position);
    }

    pub fn let_go(&self) {
        self.limit.send_replace(usize::MAX);
    }

    /// Like `kill -9`: every socket closes.
    pub fn die(&mut self) {
        if let Some(end) = self.end.take() {
            end.send(End::Die).unwrap();
            self.thread.take().unwrap().join().unwrap();
        }
    }

    /// Like `kill -STOP`.
    pub fn fall_silent(&mut self) {
        self.end.as_ref().unwrap().send(End::FallSilent).unwrap();
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    pub fn submits(&self) -> Vec<wire::Submit> {
        let submit = |seen| match seen {
            Seen::Submit(submit) => Some(*submit),
            Seen::Cancel => None,
        };
        self.seen().into_iter().filter_map(submit).collect()
    }

    pub fn n_cancels(&self) -> usize {
        self.seen().iter().filter(|seen| matches!(seen, Seen::Cancel)).count()
    }

    /// Waits for a named state, at most ten seconds.
    pub async fn until(&self, state: &str, holds: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !holds(self) {
            assert!(Instant::now() < deadline, "never came: {state}; seen {:?}", self.seen());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

impl Drop for Lead {
    fn drop(&mut self) {
        self.die();
    }
}

fn live(service: Service, address: &Sender<SocketAddr>, ends: &Receiver<End>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        address.send(listener.local_addr().unwrap()).unwrap();
        let server = tonic::transport::Server::builder()
            .add_service(WorkerServer::new(service))
            .serve_with_incoming(TcpListenerStream::new(listener));
        tokio::pin!(server);
        loop {
            let tick = tokio::time::sleep(Duration::from_millis(1));
            tokio::select! {
                _ = &mut server => return,
                () = tick => match ends.try_recv() {
                    Ok(End::Die) | Err(std::sync::mpsc::TryRecvError::Disconnected) => return,
                    // This thread is the runtime: nothing moves any more.
                    Ok(End::FallSilent) => match ends.recv_timeout(Duration::from_secs(60)) {
                        Ok(_)
                        | Err(RecvTimeoutError::Disconnected | RecvTimeoutError::Timeout) => return,
                    },
                    Err(std::sync::mpsc::TryRecvError::Empty) => {}
                },
            }
        }
    });
    runtime.shutdown_background();
}

struct Service {
    epoch: u64,
    script: Script,
    seen: Arc<Mutex<Vec<Seen>>>,
    limit: watch::Receiver<usize>,
}

type Out<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Worker for Service {
    type JoinGroupStream = Out<wire::JoinProgress>;
    type GenerateStream = ReceiverStream<Result<wire::GenerateResponse, Status>>;

    async fn generate(
        &self,
        request: Request<Streaming<wire::GenerateRequest>>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let (out, out_rx) = mpsc::channel(4);
        let engine = Engine {
            epoch: self.epoch,
            script: self.script.clone(),
            seen: self.seen.clone(),
            limit: self.limit.clone(),
            running: BTreeMap::new(),
            known: BTreeMap::new(),
        };
        tokio::spawn(engine.run(request.into_inner(), out));
        Ok(Response::new(ReceiverStream::new(out_rx)))
    }

    async fn describe(
        &self,
        _: Request<wire::DescribeRequest>,
    ) -> Result<Response<wire::ModelDescription>, Status> {
        Err(Status::unimplemented("a lead in a test only generates"))
    }

    async fn join_group(
        &self,
        _: Request<wire::JoinGroupRequest>,
    ) -> Result<Response<Self::JoinGroupStream>, Status> {
        Err(Status::unimplemented("a lead in a test only generates"))
    }

    async fn leave_group(
        &self,
        _: Request<wire::LeaveGroupRequest>,
    ) -> Result<Response<wire::LeaveGroupResponse>, Status> {
        Err(Status::unimplemented("a lead in a test only generates"))
    }

    async fn drain(
        &self,
        _: Request<wire::DrainRequest>,
    ) -> Result<Response<wire::DrainResponse>, Status> {
        Err(Status::unimplemented("a lead in a test only generates"))
    }
}

struct Running {
    submit: wire::Submit,
    tokens: Vec<u32>,
    n_prompt_told: usize,
    /// Of the prompt, what an earlier one of its salt began with too.
    n_cached: u32,
}

struct Engine {
    epoch: u64,
    script: Script,
    seen: Arc<Mutex<Vec<Seen>>>,
    limit: watch::Receiver<usize>,
    running: BTreeMap<u64, Running>,
    /// By salt: the prompts so far.
    known: BTreeMap<String, Vec<Vec<u32>>>,
}

impl Engine {
    async fn run(
        mut self,
        mut requests: Streaming<wire::GenerateRequest>,
        out: mpsc::Sender<Result<wire::GenerateResponse, Status>>,
    ) {
        loop {
            let limit = *self.limit.borrow_and_update();
            let busy = self.running.values().any(|r| r.tokens.len() < limit);
            tokio::select! {
                biased;
                request = requests.message() => match request {
                    Ok(Some(request)) => {
                        if request.epoch != self.epoch {
                            let _ = out.send(Err(Status::failed_precondition("wrong epoch"))).await;
                            return;
                        }
                        if let Some(event) = self.take(request.body.unwrap()) {
                            let _ = out.send(Ok(self.message(vec![event]))).await;
                        }
                    }
                    Ok(None) | Err(_) => return,
                },
                _ = self.limit.changed() => {}
                () = tokio::task::yield_now(), if busy => {
                    let events = self.step(limit);
                    if out.send(Ok(self.message(events))).await.is_err() {
                        return;
                    }
                }
            }
        }
    }

    fn message(&self, events: Vec<wire::SequenceEvent>) -> wire::GenerateResponse {
        let running = self.running.len() as u32;
        let load = wire::LoadSnapshot { running, ..wire::LoadSnapshot::default() };
        wire::GenerateResponse { epoch: self.epoch, events, load: Some(load) }
    }

    fn take(&mut self, body: wire::generate_request::Body) -> Option<wire::SequenceEvent> {
        match body {
            wire::generate_request::Body::Submit(submit) => {
                self.seen.lock().unwrap().push(Seen::Submit(Box::new(submit.clone())));
                if let Some(error) = &self.script.refusal {
                    return Some(wire::SequenceEvent {
                        request_id: submit.request_id,
                        error: Some(error.clone()),
                        ..wire::SequenceEvent::default()
                    });
                }
                let tokens = submit.prompt.clone();
                let id = submit.request_id;
                let n_cached = self.remember(&submit);
                self.running.insert(id, Running { submit, tokens, n_prompt_told: 1, n_cached });
            }
            wire::generate_request::Body::Cancel(cancel) => {
                self.seen.lock().unwrap().push(Seen::Cancel);
                self.running.remove(&cancel.request_id);
            }
        }
        None
    }

    fn remember(&mut self, submit: &wire::Submit) -> u32 {
        let common = |other: &Vec<u32>| {
            submit.prompt.iter().zip(other).take_while(|(one, other)| one == other).count()
        };
        let known = self.known.entry(submit.cache_salt.clone()).or_default();
        let n_cached = known.iter().map(common).max().unwrap_or(0);
        known.push(submit.prompt.clone());
        n_cached.min(submit.prompt.len() - 1) as u32
    }

    fn step(&mut self, limit: usize) -> Vec<wire::SequenceEvent> {
        let mut events = Vec::new();
        for (&request_id, running) in &mut self.running {
            if running.tokens.len() >= limit {
                continue;
            }
            let mut event = wire::SequenceEvent { request_id, ..wire::SequenceEvent::default() };
            let Running { submit, tokens, n_prompt_told, n_cached } = running;
            let sampling = submit.sampling.clone().unwrap();
            if submit.prompt_logprobs && *n_prompt_told < submit.prompt.len() {
                // In two parts, as chunked prefill would tell it.
                let half = n_prompt_told.midpoint(submit.prompt.len()).max(*n_prompt_told + 1);
                let told = &submit.prompt[*n_prompt_told..half];
                event.prompt_tokens = told.iter().map(|&id| token(id, Some(1))).collect();
                *n_prompt_told = half;
                if half < submit.prompt.len() {
                    events.push(event);
                    continue;
                }
            }
            let id = (self.script.rule)(tokens, &sampling);
            tokens.push(id);
            event.tokens.push(token(id, sampling.n_logprobs));
            event.cached_tokens = std::mem::take(n_cached);
            let n_generated = (tokens.len() - submit.prompt.len()) as u32;
            if id == self.script.stop_token {
                event.finish = wire::FinishReason::Stop.into();
            } else if n_generated >= submit.max_tokens {
                event.finish = wire::FinishReason::Length.into();
            }
            event.lead_us = (event.finish != 0).then_some(1);
            events.push(event);
        }
        let ended = |event: &wire::SequenceEvent| event.finish != 0;
        for event in events.iter().filter(|event| ended(event)) {
            self.running.remove(&event.request_id);
        }
        events
    }
}

/// Logprobs that name the token: the chosen one has -id/1000, others are its successors.
fn token(id: u32, n_logprobs: Option<u32>) -> wire::TokenOut {
    let logprob = |id: u32| -(id as f32) / 1000.0;
    let Some(n) = n_logprobs else {
        return wire::TokenOut { id, ..wire::TokenOut::default() };
    };
    let top = (id..id + n).map(|id| wire::TokenLogprob { id: id % 256, logprob: logprob(id) });
    wire::TokenOut { id, logprob: logprob(id), top: top.collect() }
}
