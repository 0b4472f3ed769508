//! A worker from outside: real workers on free ports, spoken to by gRPC as a coordinator does, with
//! a tiny random model.
#![allow(clippy::unwrap_used)]

use std::io::{Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use evener_proto::ids::{ModelName, WorkerId};
use evener_proto::worker as proto;
use evener_proto::worker::generate_request::Body;
use evener_proto::worker::join_progress::Stage;
use evener_proto::worker::sequence_error::Kind as ErrorKind;
use evener_proto::worker::worker_client::WorkerClient;
use evener_proto::worker::{FinishReason, GenerateRequest, GenerateResponse, JoinProgress};
use evener_worker::{Addresses, Options, Worker, backend, config};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

mod support;

use support::tiny_model::TinyModel;

const DEADLINE: Duration = Duration::from_secs(30);

async fn in_time<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(DEADLINE, future).await {
        Ok(value) => value,
        Err(_) => panic!("not in time: {what}"),
    }
}

/// A worker that runs in this process.
struct Running {
    addresses: Addresses,
    client: WorkerClient<Channel>,
    shutdown: CancellationToken,
    session: evener_worker::session::Session,
    task: JoinHandle<Result<(), evener_worker::Error>>,
}

impl Running {
    async fn start(options: Options) -> Self {
        let worker = Worker::open(options).await.unwrap();
        let (addresses, session) = (worker.addresses().clone(), worker.session().clone());
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(worker.run(shutdown.clone()));
        let channel = Channel::from_shared(format!("http://{}", addresses.grpc)).unwrap();
        let client = WorkerClient::new(channel.connect_lazy());
        Self { addresses, client, shutdown, session, task }
    }

    async fn stop(self) {
        self.shutdown.cancel();
        drop(self.client);
        in_time("the worker ends", self.task).await.unwrap().unwrap();
    }
}

/// Workers that hold one tiny model.
struct Cluster {
    workers: Vec<Running>,
    fingerprint: String,
    _directory: tempfile::TempDir,
    path: PathBuf,
}

fn options(name: &str, path: &std::path::Path) -> Options {
    let model = config::Model { name: ModelName::parse("tiny").unwrap(), path: path.to_owned() };
    Options {
        kv_memory_bytes: Some(4 << 20),
        max_batch_tokens: 40,
        max_running: 4,
        ..Options::new(WorkerId::parse(name).unwrap(), vec![model])
    }
}

impl Cluster {
    async fn start(n_workers: usize) -> Self {
        Self::with(n_workers, |_| {}).await
    }

    async fn with(n_workers: usize, change: fn(&mut Options)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("tiny.gguf");
        std::fs::write(&path, TinyModel { seed: 5, ..TinyModel::default() }.bytes()).unwrap();
        let mut workers = Vec::new();
        for i in 0..n_workers {
            let mut options = options(&format!("w{i}"), &path);
            change(&mut options);
            workers.push(Running::start(options).await);
        }
        let mut client = workers[0].client.clone();
        let request = proto::DescribeRequest { model: "tiny".to_owned() };
        let description = client.describe(request).await.unwrap().into_inner();
        let fingerprint = description.fingerprint;
        Self { workers, fingerprint, _directory: directory, path }
    }

    fn request(&self, epoch: u64, shares: &[u32], rank: usize) -> proto::JoinGroupRequest {
        let member = |(i, &share): (usize, &u32)| proto::Member {
            worker_id: format!("w{i}"),
            collective_address: self.workers[i].addresses.collective.clone(),
            host_id: "here".to_owned(),
            share,
        };
        proto::JoinGroupRequest {
            group_id: "g".to_owned(),
            epoch,
            model: "tiny".to_owned(),
            fingerprint: self.fingerprint.clone(),
            rank: rank as u32,
            members: shares.iter().enumerate().map(member).collect(),
            token: format!("secret {epoch}"),
            join_timeout_ms: 20_000,
            step_timeout_ms: 5_000,
            max_sequences: 0,
            kv_format: 0,
            activations: 0,
        }
    }

    async fn join_one(&self, request: proto::JoinGroupRequest) -> Result<Joined, Status> {
        let mut client = self.workers[request.rank as usize].client.clone();
        in_time("an answer to a join", client.join_group(request))
            .await
            .map(|response| Joined { stream: response.into_inner(), last: JoinProgress::default() })
    }

    /// Forms a group of the first workers, one share each, and waits until all are ready.
    async fn join(&self, epoch: u64, shares: &[u32]) -> Vec<Joined> {
        let mut all = Vec::new();
        for rank in 0..shares.len() {
            all.push(self.join_one(self.request(epoch, shares, rank)).await.unwrap());
        }
        for joined in &mut all {
            joined.ready().await;
        }
        all
    }

    async fn leave(&self, rank: usize, epoch: u64) {
        let request = proto::LeaveGroupRequest { epoch, reason: "test".to_owned() };
        let mut client = self.workers[rank].client.clone();
        in_time("an answer to a leave", client.leave_group(request)).await.unwrap();
    }

    async fn generate(&self, rank: usize, epoch: u64) -> Generation {
        let (requests, receiver) = mpsc::channel(64);
        // The answer only comes with the first request's stream open, so send before awaiting it.
        let mut client = self.workers[rank].client.clone();
        let stream = client.generate(ReceiverStream::new(receiver));
        let responses = in_time("a stream", stream).await.unwrap().into_inner();
        Generation { epoch, requests, responses }
    }

    async fn stop(self) {
        for worker in self.workers {
            worker.stop().await;
        }
    }
}

struct Joined {
    stream: Streaming<JoinProgress>,
    last: JoinProgress,
}

impl Joined {
    async fn ready(&mut self) -> proto::RankReady {
        while self.last.stage() != Stage::Ready {
            let next = in_time("progress", self.stream.message()).await;
            self.last = next.unwrap().expect("the stream stays open");
        }
        self.last.ready.clone().unwrap()
    }

    /// How the stream ends: OK or a status.
    async fn end(mut self) -> Result<(), Status> {
        while in_time("the end", self.stream.message()).await?.is_some() {}
        Ok(())
    }
}

struct Generation {
    epoch: u64,
    requests: mpsc::Sender<GenerateRequest>,
    responses: Streaming<GenerateResponse>,
}

fn submit(request_id: u64, prompt: &[u32], max_tokens: u32) -> proto::Submit {
    let sampling = proto::Sampling { top_p: 1.0, ..proto::Sampling::default() };
    let prompt = prompt.to_vec();
    proto::Submit {
        request_id,
        prompt,
        sampling: Some(sampling),
        max_tokens,
        prompt_logprobs: false,
        ..proto::Submit::default()
    }
}

impl Generation {
    async fn send(&self, body: Body) {
        let request = GenerateRequest { epoch: self.epoch, body: Some(body) };
        in_time("a request", self.requests.send(request)).await.unwrap();
    }

    async fn next(&mut self) -> Result<Option<GenerateResponse>, Status> {
        in_time("a response", self.responses.message()).await
    }

    /// Runs one sequence to its end.
    async fn tokens(&mut self, submit: proto::Submit) -> Vec<u32> {
        let request_id = submit.request_id;
        self.send(Body::Submit(submit)).await;
        let mut tokens = Vec::new();
        loop {
            let response = self.next().await.unwrap().expect("the stream stays open");
            assert_eq!(response.epoch, self.epoch);
            for event in response.events.iter().filter(|event| event.request_id == request_id) {
                assert_eq!(event.error, None);
                tokens.extend(event.tokens.iter().map(|token| token.id));
                if event.finish() != FinishReason::Running {
                    return tokens;
                }
            }
        }
    }

    /// The first error of a sequence.
    async fn refusal(&mut self, submit: proto::Submit) -> (ErrorKind, String) {
        let request_id = submit.request_id;
        self.send(Body::Submit(submit)).await;
        loop {
            let response = self.next().await.unwrap().expect("the stream stays open");
            for event in response.events {
                if let (true, Some(error)) = (event.request_id == request_id, event.error) {
                    return (error.kind(), error.message);
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn groups_of_any_shares_generate_the_same_tokens() {
    let cluster = Cluster::start(3).await;
    let mut expect: Option<Vec<Vec<u32>>> = None;
    for (epoch, shares) in [&[1][..], &[2, 1], &[1, 5], &[3, 2, 2]].into_iter().enumerate() {
        let epoch = epoch as u64 + 1;
        let joined = cluster.join(epoch, shares).await;
        let mut generation = cluster.generate(0, epoch).await;
        let mut all = Vec::new();
        for i in 0..4u64 {
            let prompt: Vec<u32> = (0..=20 * i as u32).map(|k| 3 + (k * 11) % 250).collect();
            let mut submit = submit(i, &prompt, 30);
            submit.sampling.as_mut().unwrap().temperature = i as f32 * 0.5;
            submit.sampling.as_mut().unwrap().seed = i;
            all.push(generation.tokens(submit).await);
        }
        assert!(all.iter().all(|tokens| tokens.len() == 30));
        assert_eq!(*expect.get_or_insert_with(|| all.clone()), all, "shares {shares:?}");
        for rank in 0..shares.len() {
            cluster.leave(rank, epoch).await;
        }
        for joined in joined {
            joined.end().await.unwrap();
        }
        let status = loop {
            match generation.next().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("a stream never ends cleanly under its owner"),
                Err(status) => break status,
            }
        };
        assert_eq!(status.code(), Code::Aborted, "{status}");
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn grammars_are_compiled_beside_the_stream_and_kept_or_refused() {
    use proto::grammar::Source;
    let cluster = Cluster::start(2).await;
    cluster.join(1, &[1, 2]).await[0].ready().await;
    let mut generation = cluster.generate(0, 1).await;
    let with = |id: u64, source: Option<Source>| {
        let mut submit = submit(id, &[9, 10], 40);
        let sampling = submit.sampling.as_mut().unwrap();
        sampling.grammar = Some(proto::Grammar { source });
        sampling.stop_token_ids = vec![2];
        submit
    };
    // The tiny model's tokens are bytes, in order from id 3 on.
    let letter = |c: char| c as u32 + 3;
    let yes = Some(Source::Regex("yes+".to_owned()));
    let tokens = generation.tokens(with(1, yes.clone())).await;
    assert_eq!(tokens[..3], ['y', 'e', 's'].map(letter));
    assert!(tokens[3..tokens.len() - 1].iter().all(|&token| token == letter('s')), "{tokens:?}");
    let cases = [
        (None, "no source"),
        (Some(Source::Regex("(".to_owned())), "unclosed group"),
        (Some(Source::JsonSchema("{\"type\": \"horse\"}".to_owned())), "horse"),
        (Some(Source::Lark("x".to_owned())), "cannot be used"),
    ];
    for (id, (source, says)) in (2..).zip(cases) {
        let (kind, message) = generation.refusal(with(id, source)).await;
        assert_eq!(kind, ErrorKind::Grammar);
        assert!(message.contains(says), "{message}");
    }
    // One that is cancelled while it waits is never heard of again, and its number may be reused.
    generation.send(Body::Submit(with(9, yes.clone()))).await;
    generation.send(Body::Cancel(proto::Cancel { request_id: 9 })).await;
    assert_eq!(generation.tokens(with(10, yes)).await, tokens);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_reference_backend_serves_too() {
    let cluster = Cluster::with(2, |o| o.backend = backend::Kind::Reference).await;
    let mut joined = cluster.join(1, &[1, 2]).await;
    let ready = joined[1].ready().await;
    assert_eq!(ready.backend, "reference");
    let tokens = cluster.generate(0, 1).await.tokens(submit(1, &[3, 4, 5], 10)).await;
    assert_eq!(tokens.len(), 10);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ready_rank_says_what_it_holds() {
    let cluster = Cluster::start(2).await;
    let mut joined = cluster.join(1, &[2, 1]).await;
    let ready = [joined[0].ready().await, joined[1].ready().await];
    assert_eq!(ready[0].group_kv_blocks, ready[1].group_kv_blocks);
    let least = ready.iter().map(|ready| ready.kv_blocks).min().unwrap();
    assert_eq!(ready[0].group_kv_blocks, least);
    assert!(ready[0].resident_weight_bytes > ready[1].resident_weight_bytes);
    assert!(ready.iter().all(|ready| ready.kv_block_len == 16 && !ready.shard.is_empty()));
    assert_eq!(ready[0].links[0], "self");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn describe_tells_all_and_names_the_models_it_knows() {
    let cluster = Cluster::start(1).await;
    let mut client = cluster.workers[0].client.clone();
    let request = |model: &str| proto::DescribeRequest { model: model.to_owned() };
    let description = client.describe(request("tiny")).await.unwrap().into_inner();
    assert_eq!((description.vocab_size, description.context_length), (270, 128));
    assert_eq!(description.licence, "apache-2.0");
    assert!(!description.tokenizer_json.is_empty() && description.weight_bytes > 0);
    let status = client.describe(request("other")).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    assert!(status.message().contains("tiny"), "{status}");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn joins_that_cannot_be_are_refused_with_a_reason() {
    let cluster = Cluster::start(1).await;
    let check = async |change: fn(&mut proto::JoinGroupRequest), code: Code, says: &str| {
        let mut request = cluster.request(9, &[1], 0);
        change(&mut request);
        let status = cluster.join_one(request).await.err().expect("a refusal");
        assert_eq!(status.code(), code, "{status}");
        assert!(status.message().contains(says), "{status}");
    };
    check(|r| r.epoch = 0, Code::InvalidArgument, "epoch 0").await;
    check(|r| r.model = "other".to_owned(), Code::NotFound, "tiny").await;
    check(|r| r.fingerprint = "00".to_owned(), Code::FailedPrecondition, "file").await;
    check(|r| r.members.clear(), Code::InvalidArgument, "among the 0 members").await;
    check(|r| r.members[0].share = 0, Code::InvalidArgument, "share of rank 0 is 0").await;
    check(|r| r.step_timeout_ms = 0, Code::InvalidArgument, "step_timeout_ms").await;
    check(|r| r.token.clear(), Code::FailedPrecondition, "without its token").await;
    check(|r| r.group_id = "a/b".to_owned(), Code::InvalidArgument, "group id").await;
    // And a good one is still accepted.
    cluster.join(9, &[1]).await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn epochs_only_grow() {
    let cluster = Cluster::start(2).await;
    let first = cluster.join(5, &[1, 1]).await;
    let stale = cluster.join_one(cluster.request(4, &[1, 1], 0)).await.err().unwrap();
    assert_eq!(stale.code(), Code::FailedPrecondition, "{stale}");
    // The same epoch attaches.
    cluster.join(5, &[1, 1]).await;
    // A higher one replaces it.
    let second = cluster.join(6, &[1, 1]).await;
    for joined in first {
        let status = joined.end().await.unwrap_err();
        assert_eq!(status.code(), Code::Aborted, "{status}");
    }
    let mut generation = cluster.generate(0, 5).await;
    generation.send(Body::Submit(submit(1, &[3], 3))).await;
    let status = generation.next().await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
    assert_eq!(cluster.generate(0, 6).await.tokens(submit(1, &[3], 3)).await.len(), 3);
    // Leaving an epoch that is not served changes nothing; leaving one that is not yet asked for
    // forbids it.
    cluster.leave(0, 5).await;
    assert_eq!(cluster.generate(0, 6).await.tokens(submit(1, &[3], 3)).await.len(), 3);
    cluster.leave(0, 8).await;
    let late = cluster.join_one(cluster.request(8, &[1, 1], 0)).await.err().unwrap();
    assert_eq!(late.code(), Code::FailedPrecondition, "{late}");
    drop(second);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_rank_0_generates_and_only_when_ready() {
    let cluster = Cluster::start(2).await;
    let check = async |rank, epoch, says: &str| {
        let mut generation = cluster.generate(rank, epoch).await;
        generation.send(Body::Submit(submit(1, &[3], 3))).await;
        let status = generation.next().await.unwrap_err();
        assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
        assert!(status.message().contains(says), "{status}");
    };
    check(0, 1, "idle").await;
    let waiting = cluster.join_one(cluster.request(1, &[1, 1], 0)).await.unwrap();
    check(0, 1, "not ready").await;
    let mut other = cluster.join_one(cluster.request(1, &[1, 1], 1)).await.unwrap();
    other.ready().await;
    check(1, 1, "only rank 0").await;
    drop(waiting);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rank_that_leaves_is_heard_and_the_next_epoch_keeps_the_weights() {
    let cluster = Cluster::start(2).await;
    let first = cluster.join(1, &[1, 1]).await;
    let mut generation = cluster.generate(0, 1).await;
    generation.send(Body::Submit(submit(1, &[3], 100))).await;
    generation.next().await.unwrap();
    // Only the follower is told.
    cluster.leave(1, 1).await;
    let mut ends = Vec::new();
    for joined in first {
        ends.push(joined.end().await);
    }
    assert_eq!(ends[0].as_ref().unwrap_err().code(), Code::Aborted, "{ends:?}");
    assert!(ends[1].is_ok(), "{ends:?}");
    while let Ok(Some(_)) = generation.next().await {}
    let resident = cluster.workers[0].session.figures().resident_weight_bytes();
    assert!(resident > 0, "weights stay");
    // From here on, reading the file again would be noticed.
    let mut file = std::fs::OpenOptions::new().write(true).open(&cluster.path).unwrap();
    file.seek(SeekFrom::End(-384)).unwrap();
    file.write_all(&[0xff; 384]).unwrap();
    // Nor does an epoch without peers lose them.
    let mut alone = cluster.request(2, &[1, 1], 0);
    alone.join_timeout_ms = 100;
    let alone = cluster.join_one(alone).await.unwrap();
    alone.end().await.unwrap_err();
    let mut second = cluster.join(3, &[1, 1]).await;
    assert_eq!(second[0].ready().await.resident_weight_bytes, resident);
    assert_eq!(cluster.generate(0, 3).await.tokens(submit(1, &[3], 9)).await.len(), 9);
    // Another split is read anew, so it would indeed have been noticed.
    let other = cluster.join_one(cluster.request(4, &[1], 0)).await.unwrap();
    let status = other.end().await.unwrap_err();
    assert!(status.message().contains("not finite"), "{status}");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_join_without_peers_ends_at_its_deadline_and_can_be_left() {
    let cluster = Cluster::start(2).await;
    let mut request = cluster.request(1, &[1, 1], 0);
    request.join_timeout_ms = 300;
    let status = cluster.join_one(request).await.unwrap().end().await.unwrap_err();
    assert_eq!(status.code(), Code::Aborted, "{status}");
    assert!(status.message().contains("[1]"), "it names the missing rank: {status}");

    let began = Instant::now();
    let joined = cluster.join_one(cluster.request(2, &[1, 1], 0)).await.unwrap();
    cluster.leave(0, 2).await;
    joined.end().await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(5), "not at the join's deadline");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_sequences_are_refused_and_the_stream_goes_on() {
    let cluster = Cluster::start(1).await;
    let _joined = cluster.join(1, &[1]).await;
    let mut generation = cluster.generate(0, 1).await;
    type Change = fn(&mut proto::Submit);
    let cases: [(Change, &str); 6] = [
        (|s| s.prompt.clear(), "empty"),
        (|s| s.max_tokens = 0, "max_tokens"),
        (|s| s.prompt = vec![270], "270"),
        (|s| s.max_tokens = 128, "128"),
        (|s| s.sampling.as_mut().unwrap().temperature = f32::NAN, "temperature"),
        (|s| s.sampling.as_mut().unwrap().n_logprobs = Some(21), "20"),
    ];
    for (i, (change, says)) in cases.into_iter().enumerate() {
        let mut bad = submit(i as u64, &[3], 3);
        change(&mut bad);
        let (kind, message) = generation.refusal(bad).await;
        assert_eq!(kind, ErrorKind::Invalid, "{message}");
        assert!(message.contains(says), "`{message}` does not say `{says}`");
    }
    assert_eq!(generation.tokens(submit(99, &[3], 3)).await.len(), 3);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_stream_frees_its_sequences() {
    let cluster = Cluster::start(1).await;
    let _joined = cluster.join(1, &[1]).await;
    for _ in 0..20 {
        let mut generation = cluster.generate(0, 1).await;
        for id in 0..8 {
            generation.send(Body::Submit(submit(id, &[3], 120))).await;
        }
        generation.next().await.unwrap();
    }
    let session = &cluster.workers[0].session;
    let is_free = || {
        let load = session.figures().load();
        load.n_running + load.n_waiting == 0 && load.kv_blocks_free == load.kv_blocks_total
    };
    let freed = async {
        while !is_free() {
            tokio::task::yield_now().await;
        }
    };
    in_time("all sequences are gone", freed).await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shutdown_finishes_what_runs_and_accepts_no_more() {
    let cluster = Cluster::start(2).await;
    let _joined = cluster.join(1, &[1, 1]).await;
    let mut generation = cluster.generate(0, 1).await;
    generation.send(Body::Submit(submit(1, &[3], 120))).await;
    generation.next().await.unwrap();
    cluster.workers[0].shutdown.cancel();
    let mut n_tokens = 1;
    let mut is_refused = false;
    generation.send(Body::Submit(submit(2, &[3], 120))).await;
    while let Ok(Some(response)) = generation.next().await {
        for event in response.events {
            n_tokens += event.tokens.len();
            is_refused |= event.request_id == 2 && event.error.is_some();
        }
    }
    assert!(n_tokens >= 120, "it was cut off after {n_tokens} tokens");
    assert!(is_refused || n_tokens >= 240, "it was taken in or refused");
    let Cluster { workers, .. } = cluster;
    for worker in workers {
        worker.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_cannot_start_says_why() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("bad.gguf");
    let check = async |options: Options, says: &str| {
        let error = Worker::open(options).await.err().expect("it must not start").to_string();
        assert!(error.contains(says), "`{error}` does not say `{says}`");
    };
    check(options("w0", &path), "bad.gguf").await;
    std::fs::write(&path, b"GGUFnonsense").unwrap();
    check(options("w0", &path), "bad.gguf").await;
    std::fs::write(&path, TinyModel::default().bytes()).unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let at = taken.local_addr().unwrap();
    check(Options { listen: at, ..options("w0", &path) }, "cannot listen").await;
    check(Options { collective_listen: at, ..options("w0", &path) }, "cannot listen").await;
    check(Options { threads: 0, ..options("w0", &path) }, "threads").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn too_little_kv_memory_is_said_so() {
    let cluster = Cluster::with(1, |o| o.kv_memory_bytes = Some(1000)).await;
    let joined = cluster.join_one(cluster.request(1, &[1], 0)).await.unwrap();
    let status = joined.end().await.unwrap_err();
    assert!(status.message().contains("1000"), "{status}");
    cluster.stop().await;
}
