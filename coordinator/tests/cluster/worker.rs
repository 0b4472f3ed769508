//! A scripted worker: a peer that speaks worker.proto and registers by the worker's own code, and
//! holds no model.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use evener_proto::registry as registry_pb;
use evener_proto::worker as pb;
use evener_proto::worker::worker_server::{Worker, WorkerServer};
use futures::stream;
use futures::{Stream, StreamExt};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio_stream::wrappers::{TcpListenerStream, WatchStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use crate::support::{self, MODEL};

/// Coordinator and worker may not know each other, so the worker's file is compiled in here by its
/// path.
#[path = "../../../worker/src/registration.rs"]
pub mod registration;

/// How it answers JoinGroup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// Loads, and is ready.
    Ready,
    /// Loads half and stays there.
    Stuck,
    Refuse,
    /// Never answers.
    Mute,
}

/// What it was asked, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Call {
    Join { epoch: u64, rank: u32, members: Vec<String>, shares: Vec<u32>, token: String },
    Leave { epoch: u64 },
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Serving {
    Idle,
    Epoch(u64),
    /// That epoch ended with this reason; in order if there is none.
    Ended(u64, Option<String>),
}

#[derive(Debug)]
struct Script {
    manner: Manner,
    calls: Vec<Call>,
}

struct Peer {
    script: Arc<Mutex<Script>>,
    calls: Arc<watch::Sender<usize>>,
    serving: Arc<watch::Sender<Serving>>,
}

/// Handle to a scripted worker.
pub struct ScriptedWorker {
    pub address: SocketAddr,
    script: Arc<Mutex<Script>>,
    calls: watch::Receiver<usize>,
    serving: Arc<watch::Sender<Serving>>,
    registered: CancellationToken,
    runtime: Option<Runtime>,
}

impl ScriptedWorker {
    /// Listens on `at` and registers in `registry` (`embedded://…` or `etcd://…`).
    pub async fn start_at(id: &str, registry: &str, manner: Manner, at: SocketAddr) -> Self {
        let runtime = support::runtime();
        let script = Arc::new(Mutex::new(Script { manner, calls: Vec::new() }));
        let (calls_sender, calls) = watch::channel(0);
        let (serving, _) = watch::channel(Serving::Idle);
        let serving = Arc::new(serving);
        let peer = Peer {
            script: Arc::clone(&script),
            calls: Arc::new(calls_sender),
            serving: Arc::clone(&serving),
        };
        let listener = runtime.spawn(TcpListener::bind(at)).await.unwrap().unwrap();
        let address = listener.local_addr().unwrap();
        runtime.spawn(async move {
            let server = tonic::transport::Server::builder();
            let incoming = TcpListenerStream::new(listener);
            server.serve_with_incoming(WorkerServer::new(peer), incoming).await.unwrap();
        });
        let registered = CancellationToken::new();
        let mut options = registration::Options::at(registration::Place::parse(registry).unwrap());
        options.lease_ttl_s = 2;
        options.load_interval = Duration::from_millis(200);
        let (record, load) = (record(id, address), load(Arc::clone(&serving)));
        runtime.spawn(registration::run(options, record, load, registered.clone()));
        Self { address, script, calls, serving, registered, runtime: Some(runtime) }
    }

    pub async fn start(id: &str, registry: &str) -> Self {
        Self::start_as(id, registry, Manner::Ready).await
    }

    pub async fn start_as(id: &str, registry: &str, manner: Manner) -> Self {
        let at = "127.0.0.1:0".parse().unwrap();
        Self::start_at(id, &format!("embedded://{registry}"), manner, at).await
    }

    pub fn set_manner(&self, manner: Manner) {
        self.script.lock().unwrap().manner = manner;
    }

    pub fn calls(&self) -> Vec<Call> {
        self.script.lock().unwrap().calls.clone()
    }

    pub async fn called(&mut self, what: &str, fits: impl Fn(&Call) -> bool) -> Call {
        let script = Arc::clone(&self.script);
        support::until(what, &mut self.calls, |_| {
            script.lock().unwrap().calls.iter().find(|call| fits(call)).cloned()
        })
        .await
    }

    /// Ends the epoch it serves, as after a failed step.
    pub fn fail_epoch(&self, reason: &str) {
        self.serving.send_modify(|serving| {
            if let Serving::Epoch(epoch) = *serving {
                *serving = Serving::Ended(epoch, Some(reason.to_owned()));
            }
        });
    }

    /// Goes on serving, and lets its registration end in order.
    pub fn unregister(&self) {
        self.registered.cancel();
    }

    /// Stops it as a debugger would: its sockets stay open and nothing answers, until the returned
    /// value is dropped.
    pub fn freeze(&self) -> std::sync::mpsc::Sender<()> {
        let (frozen, thaws) = std::sync::mpsc::channel();
        let runtime = self.runtime.as_ref().unwrap();
        // Its runtime has one thread, which waits here.
        runtime.spawn(async move { thaws.recv().unwrap_err() });
        frozen
    }

    /// Ends it as a kill would: sockets close, the lease runs out.
    pub fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for ScriptedWorker {
    fn drop(&mut self) {
        self.kill();
    }
}

fn record(id: &str, address: SocketAddr) -> registry_pb::WorkerRecord {
    let started = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    registry_pb::WorkerRecord {
        worker_id: id.to_owned(),
        grpc_address: address.to_string(),
        collective_address: format!("{id}:9"),
        host_id: "host".to_owned(),
        device: Some(registry_pb::Device { kind: "cpu".to_owned(), ..Default::default() }),
        models: vec![registry_pb::HeldModel {
            name: MODEL.to_owned(),
            fingerprint: "f00d".to_owned(),
            weight_bytes: 1000,
            context_length: 512,
            ..Default::default()
        }],
        version: "test".to_owned(),
        started_unix_ms: u64::try_from(started.as_millis()).unwrap(),
        pid: std::process::id(),
        draining: false,
    }
}

fn load(serving: Arc<watch::Sender<Serving>>) -> impl Fn() -> registry_pb::LoadReport + Send {
    move || match *serving.borrow() {
        Serving::Epoch(epoch) => registry_pb::LoadReport {
            state: "serving".to_owned(),
            epoch,
            rss_bytes: 4096,
            ..Default::default()
        },
        _ => registry_pb::LoadReport { state: "idle".to_owned(), ..Default::default() },
    }
}

impl Peer {
    fn call(&self, call: Call) -> Manner {
        let mut script = self.script.lock().unwrap();
        script.calls.push(call);
        self.calls.send_modify(|n| *n += 1);
        script.manner
    }
}

type Told = Pin<Box<dyn Stream<Item = Result<pb::JoinProgress, Status>> + Send>>;

#[tonic::async_trait]
impl Worker for Peer {
    async fn describe(
        &self,
        request: Request<pb::DescribeRequest>,
    ) -> Result<Response<pb::ModelDescription>, Status> {
        Ok(Response::new(pb::ModelDescription {
            model: request.into_inner().model,
            architecture: "llama".to_owned(),
            context_length: 512,
            vocab_size: 300,
            fingerprint: "f00d".to_owned(),
            tokenizer_json: "{}".into(),
            ..Default::default()
        }))
    }

    type JoinGroupStream = Told;

    async fn join_group(
        &self,
        request: Request<pb::JoinGroupRequest>,
    ) -> Result<Response<Told>, Status> {
        let asked = request.into_inner();
        let epoch = asked.epoch;
        let manner = self.call(Call::Join {
            epoch,
            rank: asked.rank,
            members: asked.members.iter().map(|member| member.worker_id.clone()).collect(),
            shares: asked.members.iter().map(|member| member.share).collect(),
            token: asked.token.clone(),
        });
        match manner {
            Manner::Refuse => return Err(Status::resource_exhausted("not enough memory")),
            Manner::Mute => std::future::pending().await,
            Manner::Ready | Manner::Stuck => {}
        }
        let standing = self.serving.borrow().clone();
        match standing {
            Serving::Epoch(served) if served == epoch => {}
            Serving::Epoch(served) | Serving::Ended(served, _) if served >= epoch => {
                return Err(Status::failed_precondition(format!("epoch {served} is later")));
            }
            _ if asked.token.is_empty() => {
                return Err(Status::failed_precondition(format!("epoch {epoch} is not served")));
            }
            _ => {
                self.serving.send_replace(Serving::Epoch(epoch));
            }
        }
        let loading = pb::JoinProgress {
            stage: pb::join_progress::Stage::Loading.into(),
            bytes_done: 1 << 20,
            bytes_total: 2 << 20,
            ..Default::default()
        };
        let mut told = vec![Ok(loading)];
        if manner == Manner::Ready {
            told.push(Ok(ready(asked.members.len())));
        }
        let changes = WatchStream::new(self.serving.subscribe());
        let end = changes.filter_map(move |serving| async move { ended(&serving, epoch) });
        // One end is enough; `None` is an end in order.
        let end = end.take(1).filter_map(|end| async move { end.map(Err) });
        Ok(Response::new(Box::pin(stream::iter(told).chain(end))))
    }

    async fn leave_group(
        &self,
        request: Request<pb::LeaveGroupRequest>,
    ) -> Result<Response<pb::LeaveGroupResponse>, Status> {
        let epoch = request.into_inner().epoch;
        self.call(Call::Leave { epoch });
        self.serving.send_modify(|serving| {
            if *serving == Serving::Epoch(epoch) {
                *serving = Serving::Ended(epoch, None);
            }
        });
        Ok(Response::new(pb::LeaveGroupResponse {}))
    }

    type GenerateStream = Pin<Box<dyn Stream<Item = Result<pb::GenerateResponse, Status>> + Send>>;

    async fn generate(
        &self,
        _request: Request<Streaming<pb::GenerateRequest>>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        Err(Status::unimplemented("a scripted worker generates nothing"))
    }

    async fn drain(
        &self,
        _request: Request<pb::DrainRequest>,
    ) -> Result<Response<pb::DrainResponse>, Status> {
        Ok(Response::new(pb::DrainResponse { unfinished: 0 }))
    }
}

/// Whether and how `epoch` is over: `Some(None)` in order, `Some(Some(status))` otherwise.
fn ended(serving: &Serving, epoch: u64) -> Option<Option<Status>> {
    match serving {
        Serving::Epoch(served) if *served == epoch => None,
        Serving::Ended(served, Some(why)) if *served == epoch => {
            Some(Some(Status::aborted(why.clone())))
        }
        _ => Some(None),
    }
}

fn ready(world_size: usize) -> pb::JoinProgress {
    pb::JoinProgress {
        stage: pb::join_progress::Stage::Ready.into(),
        ready: Some(pb::RankReady {
            resident_weight_bytes: 1000 / world_size as u64,
            kv_blocks: 12,
            group_kv_blocks: 10,
            kv_block_len: 16,
            shard: "heads".to_owned(),
            backend: "scripted".to_owned(),
            deterministic: true,
            links: vec!["local".to_owned(); world_size],
            load_ms: 70,
        }),
        ..Default::default()
    }
}
