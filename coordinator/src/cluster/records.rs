//! What stands in the registry, checked: the border between the messages of registry.proto and our
//! own types.

use std::collections::BTreeMap;

use bytes::Bytes;
use evener_proto::Message;
use evener_proto::activations::{self, Activations};
use evener_proto::ids::{Epoch, GroupId, ModelName, WorkerId};
use evener_proto::kv_format::{self, KvFormat};
use evener_proto::registry as pb;

/// A worker's load report has nothing to check: numbers, and words for people. Whether its
/// histograms are any is for figures.rs to see.
pub use evener_proto::registry::{Histogram, LoadReport as Load, Timeline};

/// Why a value is not a record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("not a {record}: {detail}")]
    Undecodable { record: &'static str, detail: String },
    #[error(transparent)]
    KvFormat(#[from] kv_format::Unknown),
    #[error(transparent)]
    Activations(#[from] activations::Unknown),
    #[error(transparent)]
    BadId(#[from] evener_proto::ids::Error),
    #[error("{record} has {field} {value}; {allowed}")]
    BadField { record: &'static str, field: &'static str, value: String, allowed: &'static str },
}

/// Most ranks a group may have.
pub const MAX_WORLD_SIZE: u32 = 1024;

/// A registered worker.
#[derive(Debug, Clone, PartialEq)]
pub struct Worker {
    pub id: WorkerId,
    /// host:port.
    pub grpc_address: String,
    /// host:port.
    pub collective_address: String,
    /// Equal on workers of one host.
    pub host_id: String,
    pub device: Device,
    pub models: BTreeMap<ModelName, Held>,
    pub version: String,
    pub started_unix_ms: u64,
    pub pid: u32,
    pub draining: bool,
}

impl Worker {
    /// Whether `other` is this very process: an id may come back with another one behind it.
    #[must_use]
    pub fn is_same_process(&self, other: &Worker) -> bool {
        self.pid == other.pid
            && self.started_unix_ms == other.started_unix_ms
            && self.grpc_address == other.grpc_address
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Device {
    pub kind: String,
    pub name: String,
    pub threads: u32,
    /// The worker may use; `None` if it does not say.
    pub memory_bytes: Option<u64>,
    pub backend: String,
}

/// A model file a worker holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// Hex; equal wherever the same file is held.
    pub fingerprint: String,
    /// Of the whole model.
    pub weight_bytes: u64,
    pub n_layers: u32,
    pub n_kv_heads: u32,
    /// Of the whole model, in f16.
    pub kv_bytes_per_token: u64,
    /// Tokens.
    pub context_length: u32,
}

/// What people asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deployment {
    pub model: ModelName,
    /// `None`: all workers that hold the model.
    pub world_size: Option<u32>,
    /// By rank; empty: equal.
    pub shares: Vec<u32>,
    /// Groups, at least 1.
    pub replicas: u32,
}

impl Deployment {
    /// One group of all workers that hold the model, with equal shares.
    #[must_use]
    pub fn of(model: ModelName) -> Self {
        Self { model, world_size: None, shares: Vec::new(), replicas: 1 }
    }

    /// # Errors
    /// Shares that cannot be: zero, more than [`MAX_WORLD_SIZE`], or not as many as the world size.
    pub fn check(&self) -> Result<(), Error> {
        let bad = |field, value: String, allowed| {
            Err(Error::BadField { record: "deployment", field, value, allowed })
        };
        let n_shares = u32::try_from(self.shares.len()).unwrap_or(u32::MAX);
        if self.shares.contains(&0) {
            return bad("shares", format!("{:?}", self.shares), "every share is 1 or more");
        }
        if n_shares > MAX_WORLD_SIZE || self.world_size.is_some_and(|n| n > MAX_WORLD_SIZE) {
            let n = self.world_size.unwrap_or(0).max(n_shares);
            return bad("world_size", n.to_string(), "at most 1024 ranks form a group");
        }
        if n_shares > 0 && self.world_size.is_some_and(|n| n != n_shares) {
            let (n, shares) = (self.world_size.unwrap_or(0), &self.shares);
            let value = format!("{shares:?} for a world size of {n}");
            return bad("shares", value, "give one share for each rank, or none");
        }
        if self.replicas == 0 || self.replicas > 1024 {
            return bad("replicas", self.replicas.to_string(), "1 to 1024 groups");
        }
        Ok(())
    }

    /// # Errors
    /// Not a deployment, or one that cannot be.
    pub fn decode(value: &[u8]) -> Result<Self, Error> {
        let message: pb::Deployment = decode("deployment", value)?;
        let deployment = Self {
            model: ModelName::parse(&message.model)?,
            world_size: (message.world_size != 0).then_some(message.world_size),
            shares: message.shares,
            replicas: message.replicas.max(1),
        };
        deployment.check()?;
        Ok(deployment)
    }

    #[must_use]
    pub fn encode(&self) -> Bytes {
        encode(&pb::Deployment {
            model: self.model.to_string(),
            world_size: self.world_size.unwrap_or(0),
            shares: self.shares.clone(),
            replicas: self.replicas,
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupState {
    Forming,
    Ready,
    Retired,
}

impl GroupState {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Forming => "forming",
            Self::Ready => "ready",
            Self::Retired => "retired",
        }
    }
}

/// One epoch of a group, as its coordinator wrote it down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    pub id: GroupId,
    pub epoch: Epoch,
    pub model: ModelName,
    /// By rank; the first leads. Never empty.
    pub members: Vec<Member>,
    pub state: GroupState,
    /// Why it is forming again or retired.
    pub reason: String,
    /// Of the group; 0 until ready.
    pub kv_blocks: u32,
    /// Tokens; 0 until ready.
    pub kv_block_len: u32,
    pub deterministic: bool,
    /// Asked of its ranks.
    pub kv_format: KvFormat,
    /// The same, of its CPU ranks.
    pub activations: Activations,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    pub worker: WorkerId,
    pub share: u32,
    pub grpc_address: String,
    /// 0 until ready.
    pub resident_weight_bytes: u64,
    /// Empty until ready.
    pub shard: String,
    /// By peer rank; empty until ready.
    pub links: Vec<String>,
    /// How long the rank took to be ready; 0 until it is.
    pub load_ms: u32,
}

impl Group {
    /// # Errors
    /// Not a group.
    pub fn decode(value: &[u8]) -> Result<Self, Error> {
        let message: pb::GroupRecord = decode("group record", value)?;
        let state = match message.state() {
            pb::group_record::State::Forming => GroupState::Forming,
            pb::group_record::State::Ready => GroupState::Ready,
            pb::group_record::State::Retired => GroupState::Retired,
            pb::group_record::State::Unspecified => {
                let value = message.state.to_string();
                let allowed = "forming, ready or retired";
                return Err(Error::BadField {
                    record: "group record",
                    field: "state",
                    value,
                    allowed,
                });
            }
        };
        if message.members.is_empty() {
            let (value, allowed) = ("[]".to_owned(), "at least one member");
            return Err(Error::BadField {
                record: "group record",
                field: "members",
                value,
                allowed,
            });
        }
        let member = |member: pb::GroupMember| -> Result<Member, Error> {
            Ok(Member {
                worker: WorkerId::parse(&member.worker_id)?,
                share: member.share,
                grpc_address: member.grpc_address,
                resident_weight_bytes: member.resident_weight_bytes,
                shard: member.shard,
                links: member.links,
                load_ms: member.load_ms,
            })
        };
        Ok(Self {
            id: GroupId::parse(&message.group_id)?,
            epoch: Epoch::parse(message.epoch)?,
            model: ModelName::parse(&message.model)?,
            members: message.members.into_iter().map(member).collect::<Result<_, _>>()?,
            state,
            reason: message.reason,
            kv_blocks: message.kv_blocks,
            kv_block_len: message.kv_block_len,
            deterministic: message.deterministic,
            kv_format: KvFormat::parse(&message.kv_format)?,
            activations: Activations::parse(&message.activations)?,
        })
    }

    #[must_use]
    pub fn encode(&self) -> Bytes {
        let member = |member: &Member| pb::GroupMember {
            worker_id: member.worker.to_string(),
            share: member.share,
            grpc_address: member.grpc_address.clone(),
            resident_weight_bytes: member.resident_weight_bytes,
            shard: member.shard.clone(),
            links: member.links.clone(),
            load_ms: member.load_ms,
        };
        let state = match self.state {
            GroupState::Forming => pb::group_record::State::Forming,
            GroupState::Ready => pb::group_record::State::Ready,
            GroupState::Retired => pb::group_record::State::Retired,
        };
        encode(&pb::GroupRecord {
            group_id: self.id.to_string(),
            epoch: self.epoch.get(),
            model: self.model.to_string(),
            members: self.members.iter().map(member).collect(),
            state: state.into(),
            reason: self.reason.clone(),
            kv_blocks: self.kv_blocks,
            kv_block_len: self.kv_block_len,
            deterministic: self.deterministic,
            kv_format: self.kv_format.name().to_owned(),
            activations: self.activations.name().to_owned(),
        })
    }
}

impl Worker {
    /// # Errors
    /// Not a worker record.
    pub fn decode(value: &[u8]) -> Result<Self, Error> {
        let message: pb::WorkerRecord = decode("worker record", value)?;
        let device = message.device.unwrap_or_default();
        let mut models = BTreeMap::new();
        for held in message.models {
            models.insert(
                ModelName::parse(&held.name)?,
                Held {
                    fingerprint: held.fingerprint,
                    weight_bytes: held.weight_bytes,
                    n_layers: held.n_layers,
                    n_kv_heads: held.n_kv_heads,
                    kv_bytes_per_token: held.kv_bytes_per_token,
                    context_length: held.context_length,
                },
            );
        }
        Ok(Self {
            id: WorkerId::parse(&message.worker_id)?,
            grpc_address: message.grpc_address,
            collective_address: message.collective_address,
            host_id: message.host_id,
            device: Device {
                kind: device.kind,
                name: device.name,
                threads: device.threads,
                memory_bytes: (device.memory_bytes != 0).then_some(device.memory_bytes),
                backend: device.backend,
            },
            models,
            version: message.version,
            started_unix_ms: message.started_unix_ms,
            pid: message.pid,
            draining: message.draining,
        })
    }
}

/// # Errors
/// Not a load report.
pub fn decode_load(value: &[u8]) -> Result<Load, Error> {
    decode("load report", value)
}

fn decode<M: Message + Default>(record: &'static str, value: &[u8]) -> Result<M, Error> {
    M::decode(value).map_err(|error| Error::Undecodable { record, detail: error.to_string() })
}

fn encode(message: &impl Message) -> Bytes {
    message.encode_to_vec().into()
}
