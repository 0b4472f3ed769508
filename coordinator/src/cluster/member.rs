//! One worker as the supervisor reaches it: describe, join, leave. The border for worker.proto on
//! the cluster side.
//!
//! It decides nothing: it tells what the worker said, and whether the worker could be reached at
//! all.

use std::error::Error as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use evener_proto::activations::Activations;
use evener_proto::ids::{Epoch, GroupId, ModelName};
use evener_proto::kv_format::KvFormat;
use evener_proto::worker as pb;
use evener_proto::worker::worker_client::WorkerClient;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};

use crate::group::handle::Model;

/// Deadlines towards workers.
#[derive(Debug, Clone)]
pub struct Options {
    pub connect_timeout: Duration,
    /// Of Describe: a worker may have to read a large tokenizer first.
    pub describe_timeout: Duration,
    /// Until JoinGroup begins to answer.
    pub join_answer_timeout: Duration,
    /// Of LeaveGroup: aborting a rank that loads takes a worker some seconds. Pings tell sooner who
    /// is frozen.
    pub leave_timeout: Duration,
    /// Between two pings on an idle connection, and how long an answer may take: how a frozen
    /// worker is noticed.
    pub keepalive_interval: Duration,
    pub keepalive_timeout: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(2),
            describe_timeout: Duration::from_secs(60),
            join_answer_timeout: Duration::from_secs(10),
            leave_timeout: Duration::from_secs(12),
            keepalive_interval: Duration::from_secs(1),
            keepalive_timeout: Duration::from_secs(3),
        }
    }
}

/// Why a worker did not do as asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// It may be dead, frozen, or cut off.
    #[error("{address} does not answer: {detail}")]
    Unreachable { address: String, detail: String },
    /// It answered, and said no.
    #[error("{detail}")]
    Refused { address: String, detail: String },
    /// It answered with something that cannot be.
    #[error("{address} described {model} wrongly: {detail}")]
    BadDescription { address: String, model: String, detail: String },
}

impl Error {
    fn unreachable(address: &str, detail: impl Into<String>) -> Self {
        Self::Unreachable { address: address.to_owned(), detail: detail.into() }
    }

    /// Sorts what the worker said from what the network said: only the latter carries a source.
    fn from_status(address: &str, status: &Status) -> Self {
        let Some(source) = status.source() else {
            let said = status.message();
            let detail =
                if said.is_empty() { format!("{:?}", status.code()) } else { said.to_owned() };
            return Self::Refused { address: address.to_owned(), detail };
        };
        let mut last: &dyn std::error::Error = source;
        while let Some(deeper) = last.source() {
            last = deeper;
        }
        Self::unreachable(address, last.to_string())
    }
}

/// What one rank is asked to become.
#[derive(Debug, Clone)]
pub struct Join {
    pub group: GroupId,
    pub epoch: Epoch,
    pub model: ModelName,
    pub fingerprint: String,
    pub rank: usize,
    /// By rank.
    pub peers: Vec<Peer>,
    /// Secret of the epoch; empty when attaching to one that lives already.
    pub token: String,
    pub join_timeout: Duration,
    pub step_timeout: Duration,
    /// Running at once; 0: the worker's default.
    pub max_sequences: u32,
    pub kv_format: KvFormat,
    pub activations: Activations,
}

/// A member as its peers must know it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    pub worker_id: String,
    pub collective_address: String,
    pub host_id: String,
    pub share: u32,
}

/// How far a rank has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    Asked,
    Connecting,
    Loading,
    Warming,
    Ready,
}

impl Stage {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Asked => "asked to join",
            Self::Connecting => "connecting",
            Self::Loading => "loading",
            Self::Warming => "warming up",
            Self::Ready => "ready",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    pub stage: Stage,
    pub bytes_done: u64,
    pub bytes_total: u64,
    /// One line for people.
    pub detail: String,
}

/// What a rank says when it is ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ready {
    pub resident_weight_bytes: u64,
    /// Of the group.
    pub kv_blocks: u32,
    /// Tokens.
    pub kv_block_len: u32,
    pub shard: String,
    pub backend: String,
    pub deterministic: bool,
    /// By peer rank.
    pub links: Vec<String>,
    /// From the join to ready.
    pub load_ms: u32,
}

/// What a rank told about an epoch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Told {
    Progress(Progress),
    Ready(Ready),
    /// It left as asked.
    Left,
    /// The epoch has ended for it, or never began.
    Failed(Error),
}

async fn connect(address: &str, options: &Options) -> Result<WorkerClient<Channel>, Error> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|error| Error::unreachable(address, format!("no address: {error}")))?
        .connect_timeout(options.connect_timeout)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(options.keepalive_interval)
        .keep_alive_timeout(options.keepalive_timeout)
        .keep_alive_while_idle(true);
    // Not the endpoint's own limit alone: it does not bound the HTTP/2 handshake.
    let connected = tokio::time::timeout(options.connect_timeout * 2, endpoint.connect()).await;
    let channel = match connected {
        Ok(Ok(channel)) => channel,
        Ok(Err(error)) => {
            let mut last: &dyn std::error::Error = &error;
            while let Some(deeper) = last.source() {
                last = deeper;
            }
            return Err(Error::unreachable(address, last.to_string()));
        }
        Err(_) => return Err(Error::unreachable(address, "no connection in time")),
    };
    Ok(WorkerClient::new(channel)
        .max_decoding_message_size(evener_proto::MAX_MESSAGE_BYTES)
        .max_encoding_message_size(evener_proto::MAX_MESSAGE_BYTES))
}

async fn within<T>(
    address: &str,
    limit: Duration,
    answer: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, Error> {
    match tokio::time::timeout(limit, answer).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(Error::from_status(address, &status)),
        Err(_) => Err(Error::unreachable(address, format!("nothing within {limit:?}"))),
    }
}

/// Asks the worker at `address` for everything about a model.
///
/// # Errors
/// Unreachable, refused, or an answer about another file than `fingerprint`.
pub async fn describe(
    address: &str,
    model: &ModelName,
    fingerprint: &str,
    options: &Options,
) -> Result<Model, Error> {
    let mut client = connect(address, options).await?;
    let request = pb::DescribeRequest { model: model.to_string() };
    let limit = options.describe_timeout;
    let described = within(address, limit, client.describe(request)).await?;
    let bad = |detail: String| Error::BadDescription {
        address: address.to_owned(),
        model: model.to_string(),
        detail,
    };
    if described.fingerprint != fingerprint {
        let given = &described.fingerprint;
        return Err(bad(format!("fingerprint {given}, registered as {fingerprint}")));
    }
    if described.context_length == 0 || described.vocab_size == 0 {
        let (context, vocabulary) = (described.context_length, described.vocab_size);
        return Err(bad(format!("a context of {context} and a vocabulary of {vocabulary} tokens")));
    }
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH);
    Ok(Model {
        name: model.clone(),
        architecture: described.architecture,
        quantization: described.quantization,
        licence: described.licence,
        tokenizer_json: described.tokenizer_json.into(),
        chat_template: described.chat_template,
        bos_token_id: described.bos_token_id,
        add_bos_token: described.add_bos_token,
        bos_token: described.bos_token,
        eos_token: described.eos_token,
        eos_token_ids: described.eos_token_ids,
        context_length: described.context_length,
        vocab_size: described.vocab_size,
        n_parameters: described.n_parameters,
        weight_bytes: described.weight_bytes,
        fingerprint: described.fingerprint,
        created_unix_s: since_epoch.map_or(0, |since| since.as_secs()),
    })
}

/// The stream on which a rank tells of one epoch.
#[derive(Debug)]
pub struct Joined {
    address: String,
    said: tonic::Streaming<pb::JoinProgress>,
}

/// Asks the worker at `address` to become one rank.
///
/// # Errors
/// Unreachable or refused.
pub async fn join(address: &str, join: Join, options: &Options) -> Result<Joined, Error> {
    let mut client = connect(address, options).await?;
    let limit = options.join_answer_timeout;
    let said = within(address, limit, client.join_group(request(join))).await?;
    Ok(Joined { address: address.to_owned(), said })
}

impl Joined {
    /// What the rank tells next; after [`Told::Left`] and [`Told::Failed`] there is no more.
    pub async fn next(&mut self) -> Told {
        match self.said.message().await {
            Ok(Some(progress)) => told(&self.address, progress).unwrap_or_else(Told::Failed),
            Ok(None) => Told::Left,
            Err(status) => Told::Failed(Error::from_status(&self.address, &status)),
        }
    }
}

impl Told {
    #[must_use]
    pub fn is_last(&self) -> bool {
        matches!(self, Self::Left | Self::Failed(_))
    }
}

fn request(join: Join) -> pb::JoinGroupRequest {
    let millis = |wait: Duration| u32::try_from(wait.as_millis()).unwrap_or(u32::MAX);
    let member = |peer: Peer| pb::Member {
        worker_id: peer.worker_id,
        collective_address: peer.collective_address,
        host_id: peer.host_id,
        share: peer.share,
    };
    pb::JoinGroupRequest {
        group_id: join.group.to_string(),
        epoch: join.epoch.get(),
        model: join.model.to_string(),
        fingerprint: join.fingerprint,
        rank: u32::try_from(join.rank).unwrap_or(u32::MAX),
        members: join.peers.into_iter().map(member).collect(),
        token: join.token,
        join_timeout_ms: millis(join.join_timeout),
        step_timeout_ms: millis(join.step_timeout),
        max_sequences: join.max_sequences,
        kv_format: join.kv_format.to_wire(),
        activations: join.activations.to_wire(),
    }
}

fn told(address: &str, said: pb::JoinProgress) -> Result<Told, Error> {
    let stage = match said.stage() {
        pb::join_progress::Stage::Connecting | pb::join_progress::Stage::Unspecified => {
            Stage::Connecting
        }
        pb::join_progress::Stage::Loading => Stage::Loading,
        pb::join_progress::Stage::Warming => Stage::Warming,
        pb::join_progress::Stage::Ready => {
            let Some(ready) = said.ready else {
                let detail = "it says it is ready, and not what it holds".to_owned();
                return Err(Error::Refused { address: address.to_owned(), detail });
            };
            return Ok(Told::Ready(Ready {
                resident_weight_bytes: ready.resident_weight_bytes,
                kv_blocks: ready.group_kv_blocks,
                kv_block_len: ready.kv_block_len,
                shard: ready.shard,
                backend: ready.backend,
                deterministic: ready.deterministic,
                links: ready.links,
                load_ms: ready.load_ms,
            }));
        }
    };
    Ok(Told::Progress(Progress {
        stage,
        bytes_done: said.bytes_done,
        bytes_total: said.bytes_total,
        detail: said.detail,
    }))
}

/// Ends an epoch on the worker at `address`.
///
/// # Errors
/// Unreachable or refused.
pub async fn leave(
    address: &str,
    epoch: Epoch,
    reason: &str,
    options: &Options,
) -> Result<(), Error> {
    let left = async {
        let mut client = connect(address, options).await?;
        let request = pb::LeaveGroupRequest { epoch: epoch.get(), reason: reason.to_owned() };
        within(address, options.leave_timeout, client.leave_group(request)).await
    };
    match tokio::time::timeout(options.leave_timeout, left).await {
        Ok(left) => left.map(|_| ()),
        Err(_) => {
            Err(Error::unreachable(address, format!("nothing within {:?}", options.leave_timeout)))
        }
    }
}
