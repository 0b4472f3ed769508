//! `GET /status` as the command line reads it: tolerant of fields it does not know, empty where one is missing.

use serde::Deserialize;
use serde_json::Value;

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct View {
    pub version: String,
    pub registry: Registry,
    pub workers: Vec<Worker>,
    pub groups: Vec<Group>,
    /// What stands between now and ready, one sentence each.
    pub missing: Vec<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Registry {
    pub kind: String,
    pub healthy: bool,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Worker {
    pub id: String,
    pub device: Device,
    pub state: String,
    pub rank: Option<u32>,
    pub share: Option<u32>,
    pub shard: String,
    pub resident_weight_bytes: u64,
    pub rss_bytes: u64,
    pub load: Load,
    pub load_bytes_done: u64,
    pub load_bytes_total: u64,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Device {
    pub kind: String,
    pub backend: String,
    pub threads: u32,
    pub memory_bytes: u64,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Load {
    pub running: u32,
    pub waiting: u32,
    pub tokens_per_s: f64,
    pub steps_total: u64,
    pub tokens_total: u64,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Group {
    pub id: String,
    pub epoch: u64,
    pub model: String,
    pub state: String,
    pub reason: String,
    pub members: Vec<Member>,
    pub kv_blocks_used: u64,
    pub kv_blocks_total: u64,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Member {
    pub worker_id: String,
    pub links: Vec<String>,
}

impl View {
    pub fn read(status: &Value) -> Self {
        Self::deserialize(status).unwrap_or_default()
    }
}
