//! What a worker tells the registry about itself: its record once, its load each second.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use evener_proto::registry::{
    Device, HeldModel, Histogram, LoadReport, RecentSteps, Timeline, WorkerRecord,
};

use crate::backend::Kind;
use crate::engine::timeline::{BOUNDS_US, Counted, Reading};
use crate::epoch::Progress;
use crate::session::{Held, Session};
use crate::{host, metrics};

/// Addresses under which others reach a worker. host:port
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Addresses {
    pub grpc: String,
    pub collective: String,
}

/// What does not change while a worker runs.
#[must_use]
pub fn record(session: &Session, addresses: &Addresses) -> WorkerRecord {
    let options = session.options();
    WorkerRecord {
        worker_id: options.worker_id.to_string(),
        grpc_address: addresses.grpc.clone(),
        collective_address: addresses.collective.clone(),
        host_id: host::host_id(),
        device: Some(Device {
            kind: "cpu".to_owned(),
            name: host::processor(),
            threads: options.threads as u32,
            memory_bytes: metrics::available_memory_bytes().unwrap_or(0),
            backend: backend_name(options.backend).to_owned(),
        }),
        models: session.models().iter().map(held_model).collect(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        started_unix_ms: unix_ms(),
        pid: std::process::id(),
        draining: false,
    }
}

fn held_model(held: &Held) -> HeldModel {
    let description = &held.checkpoint.description;
    HeldModel {
        name: held.name.to_string(),
        fingerprint: description.fingerprint.clone(),
        weight_bytes: description.weight_bytes,
        n_layers: description.n_layers as u32,
        n_heads: description.n_heads as u32,
        n_kv_heads: description.n_kv_heads as u32,
        kv_bytes_per_token: description.kv_bytes_per_token,
        context_length: held.context_length as u32,
    }
}

fn backend_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Cpu => "cpu",
        Kind::Cuda(_) => "cuda",
        Kind::Reference => "reference",
    }
}

/// How a worker is now.
#[must_use]
pub fn load(session: &Session) -> LoadReport {
    let figures = session.figures();
    let load = figures.load();
    let (prompt_tokens_total, cached_tokens_total) = figures.prefix_tokens_total();
    let mut report = LoadReport {
        worker_id: session.options().worker_id.to_string(),
        unix_ms: unix_ms(),
        state: "idle".to_owned(),
        running: load.n_running,
        waiting: load.n_waiting,
        kv_blocks_total: load.kv_blocks_total,
        kv_blocks_free: load.kv_blocks_free,
        resident_weight_bytes: figures.resident_weight_bytes(),
        rss_bytes: metrics::rss_bytes(),
        tokens_per_s: figures.tokens_per_s(Instant::now()),
        tokens_total: figures.tokens_total(),
        steps_total: figures.steps_total(),
        preemptions_total: figures.preemptions_total(),
        kv_blocks_cached: load.kv_blocks_cached,
        prompt_tokens_total,
        cached_tokens_total,
        drafted_total: figures.drafted_total(),
        drafts_right_total: figures.drafts_right_total(),
        ..LoadReport::default()
    };
    let Some(epoch) = session.current() else { return report };
    let is_leaving = epoch.left.get().is_some();
    let state = match &*epoch.progress.borrow() {
        Progress::Ended(_) => return report,
        _ if is_leaving => "leaving",
        Progress::Ready(_) => "serving",
        Progress::Loading { bytes_done, bytes_total } => {
            report.load_bytes_done = *bytes_done;
            report.load_bytes_total = *bytes_total;
            "loading"
        }
        Progress::Connecting | Progress::Warming => "loading",
    };
    report.state = state.to_owned();
    report.epoch = epoch.number;
    report.rank = epoch.rank as u32;
    report.world_size = epoch.world_size as u32;
    report.shard.clone_from(&epoch.shard);
    report.timeline = Some(timeline(&epoch.timeline.read(Instant::now())));
    report
}

fn timeline(reading: &Reading) -> Timeline {
    let histogram = |counted: &Counted| {
        Some(Histogram { counts: counted.counts.to_vec(), sum_ns: counted.sum_ns })
    };
    let recent = &reading.recent;
    Timeline {
        bounds_us: BOUNDS_US.to_vec(),
        idle: histogram(&reading.idle),
        step: histogram(&reading.whole),
        compute: histogram(&reading.compute),
        wait: histogram(&reading.waited),
        transfer: histogram(&reading.transfer),
        queue: histogram(&reading.queued),
        tokens: reading.n_tokens,
        bytes_sent: reading.bytes_sent,
        bytes_received: reading.bytes_received,
        recent: Some(RecentSteps {
            span_ms: u32::try_from(reading.recent_span.as_millis()).unwrap_or(u32::MAX),
            steps: recent.n_steps,
            idle_ns: recent.idle_ns,
            step_ns: recent.whole_ns,
            compute_ns: recent.compute_ns,
            wait_ns: recent.waited_ns,
            transfer_ns: recent.transfer_ns,
        }),
    }
}

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_millis() as u64
}
