//! `GET /status` as the command line reads it: tolerant of fields it does not know, empty where one
//! is missing.

use anyhow::Context;
use serde::Deserialize;
use serde_json::Value;

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct View {
    pub version: String,
    pub registry: Registry,
    /// Every deployment is served.
    pub ready: bool,
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
    /// "idle", "loading", "serving", "leaving", or "unknown" before its first report.
    pub state: String,
    pub draining: bool,
    pub rank: Option<u32>,
    pub share: Option<u32>,
    pub shard: String,
    pub resident_weight_bytes: u64,
    pub rss_bytes: u64,
    pub load: Load,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Device {
    pub kind: String,
    pub backend: String,
    pub threads: u32,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Load {
    pub running: u32,
    pub waiting: u32,
    pub kv_blocks_total: u32,
    pub kv_blocks_free: u32,
    pub tokens_per_s: f64,
    pub load_bytes_done: u64,
    pub load_bytes_total: u64,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Group {
    pub id: String,
    pub epoch: u64,
    pub model: String,
    /// "forming", "ready" or "retired".
    pub state: String,
    pub reason: String,
    pub members: Vec<Member>,
    pub kv_blocks: u32,
    pub kv_format: String,
    pub balance: Balance,
}

/// Who waits for whom in a group.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Balance {
    /// "alone", "unknown", "no_steps", "balanced" or "uneven".
    pub state: String,
    /// A sentence for people.
    pub verdict: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Member {
    pub worker: String,
    /// host:port at which it answers coordinators.
    pub address: String,
    /// By peer rank.
    pub links: Vec<String>,
    /// While it joins: "connecting", "loading", ...
    pub stage: Option<String>,
    pub bytes_done: Option<u64>,
    pub bytes_total: Option<u64>,
    pub backend: Option<String>,
    /// What loading its weights took; 0 or absent where it is not known.
    pub load_ms: Option<u32>,
}

impl View {
    /// # Errors
    /// Not a status page, or one of a version that tells it otherwise.
    pub fn read(status: &Value) -> anyhow::Result<Self> {
        Self::deserialize(status).context("the status page is not what this version knows")
    }

    /// Where a worker is a member of a group that lives.
    pub fn member(&self, worker: &str) -> Option<&Member> {
        let mut groups = self.groups.iter().filter(|group| group.state != "retired");
        groups.find_map(|group| group.members.iter().find(|member| member.worker == worker))
    }

    /// Blocks in use in a group, as its lead last reported.
    pub fn kv_blocks_used(&self, group: &Group) -> u32 {
        let lead = group.members.first().map(|lead| lead.worker.as_str());
        self.workers
            .iter()
            .find(|worker| Some(worker.id.as_str()) == lead)
            .map_or(0, |lead| lead.load.kv_blocks_total.saturating_sub(lead.load.kv_blocks_free))
    }
}
