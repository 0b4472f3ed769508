//! The status page: workers, groups, deployments, registry and leader as JSON, for `GET /status`
//! and people.

use std::collections::BTreeMap;

use evener_proto::ids::WorkerId;
use serde_json::{Value, json};

use super::balance;
use super::figures;
use super::formation::Rank;
use super::publish::why_not;
use super::records::{Deployment, Group, GroupState, Member, Worker};
use super::state::State;
use crate::group::handle::Directory;

/// The whole page.
pub(super) fn page(state: &State, directory: &Directory) -> Value {
    let view = &state.view;
    let groups: Vec<Shown<'_>> = shown(state);
    let workers: Vec<Value> =
        view.workers.values().map(|worker| worker_page(state, &groups, worker)).collect();
    let deployments: Vec<Value> = view
        .deployments
        .values()
        .map(|deployment| deployment_page(state, directory, deployment))
        .collect();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "coordinator": state.identity,
        "leader": view.leader,
        "leading": state.leading,
        "registry": {
            "kind": state.registry.split([' ', ':']).next(),
            "at": state.registry,
            "healthy": view.known && view.away.is_none(),
            "error": view.away,
            "epoch": view.highest_epoch(),
            "ignored": view.n_ignored,
        },
        "ready": directory.missing.is_empty(),
        "missing": directory.missing,
        "workers": workers,
        "groups": groups.iter().map(|shown| group_page(state, shown)).collect::<Vec<_>>(),
        "deployments": deployments,
    })
}

/// A group as it lives here, or as it stands in the registry.
struct Shown<'a> {
    record: &'a Group,
    /// Only where this coordinator follows its ranks.
    ranks: Option<&'a [Rank]>,
}

fn shown(state: &State) -> Vec<Shown<'_>> {
    let mut shown = BTreeMap::new();
    for (id, record) in &state.view.groups {
        shown.insert(id, Shown { record, ranks: None });
    }
    for (id, live) in &state.groups {
        if let Some(formation) = &live.formation {
            shown.insert(id, Shown { record: &formation.record, ranks: Some(&formation.ranks) });
        }
    }
    shown.into_values().collect()
}

fn worker_page(state: &State, groups: &[Shown<'_>], worker: &Worker) -> Value {
    let load = state.view.loads.get(&worker.id).cloned().unwrap_or_default();
    let group = groups.iter().find_map(|shown| {
        let alive = shown.record.state != GroupState::Retired;
        let rank = shown.record.members.iter().position(|m| m.worker == worker.id && alive)?;
        Some((shown.record, rank))
    });
    let member = group.map(|(record, rank)| &record.members[rank]);
    let resident = member.map_or(0, |member| member.resident_weight_bytes);
    let shard = member.map(|member| member.shard.as_str()).unwrap_or_default();
    let models: Vec<Value> = worker
        .models
        .iter()
        .map(|(name, held)| {
            json!({
                "name": name.as_str(),
                "fingerprint": held.fingerprint,
                "weight_bytes": held.weight_bytes,
                "kv_bytes_per_token": held.kv_bytes_per_token,
                "context_length": held.context_length,
            })
        })
        .collect();
    json!({
        "id": worker.id.as_str(),
        "address": worker.grpc_address,
        "collective_address": worker.collective_address,
        "host": worker.host_id,
        "pid": worker.pid,
        "version": worker.version,
        "started_unix_ms": worker.started_unix_ms,
        "device": {
            "kind": worker.device.kind,
            "name": worker.device.name,
            "threads": worker.device.threads,
            "memory_bytes": worker.device.memory_bytes,
            "backend": worker.device.backend,
        },
        "models": models,
        "draining": worker.draining,
        "not_used": not_used(state, &worker.id),
        "group": group.map(|(record, _)| record.id.as_str()),
        "epoch": group.map(|(record, _)| record.epoch.get()),
        "rank": group.map(|(_, rank)| rank),
        "world_size": group.map(|(record, _)| record.members.len()),
        "share": member.map(|member| member.share),
        "shard": if load.shard.is_empty() { shard } else { &load.shard },
        "resident_weight_bytes": load.resident_weight_bytes.max(resident),
        "rss_bytes": load.rss_bytes,
        "load_ms": member.map(|member| member.load_ms),
        "state": if load.state.is_empty() { "unknown" } else { &load.state },
        "load": {
            "running": load.running,
            "waiting": load.waiting,
            "kv_blocks_total": load.kv_blocks_total,
            "kv_blocks_free": load.kv_blocks_free,
            "tokens_per_s": load.tokens_per_s,
            "tokens_total": load.tokens_total,
            "steps_total": load.steps_total,
            "preemptions_total": load.preemptions_total,
            "kv_blocks_cached": load.kv_blocks_cached,
            "prompt_tokens_total": load.prompt_tokens_total,
            "cached_tokens_total": load.cached_tokens_total,
            "drafted_total": load.drafted_total,
            "drafts_right_total": load.drafts_right_total,
            "load_bytes_done": load.load_bytes_done,
            "load_bytes_total": load.load_bytes_total,
            "reported_unix_ms": load.unix_ms,
        },
    })
}

fn not_used(state: &State, worker: &WorkerId) -> Option<String> {
    let now = tokio::time::Instant::now();
    state.shunned.get(worker).filter(|shun| shun.until > now).map(|shun| shun.why.clone())
}

fn group_page(state: &State, shown: &Shown<'_>) -> Value {
    let record = shown.record;
    let reason = match state.backoff.get(&record.id) {
        Some(backoff) if record.state != GroupState::Ready => backoff.why.as_str(),
        _ => record.reason.as_str(),
    };
    let members: Vec<Value> = record
        .members
        .iter()
        .enumerate()
        .map(|(rank_idx, member)| {
            member_page(rank_idx, member, shown.ranks.and_then(|ranks| ranks.get(rank_idx)))
        })
        .collect();
    json!({
        "id": record.id.as_str(),
        "model": record.model.as_str(),
        "epoch": record.epoch.get(),
        "state": record.state.as_str(),
        "reason": reason,
        "world_size": record.members.len(),
        "lead": record.members.first().map(|lead| lead.worker.as_str()),
        "kv_blocks": record.kv_blocks,
        "kv_block_len": record.kv_block_len,
        "kv_tokens": u64::from(record.kv_blocks) * u64::from(record.kv_block_len),
        "deterministic": record.deterministic,
        "kv_format": record.kv_format.name(),
        "activations": record.activations.name(),
        "balance": balance::judge(&figures::recent(state, record)).page(),
        "members": members,
    })
}

fn member_page(rank_idx: usize, member: &Member, rank: Option<&Rank>) -> Value {
    json!({
        "worker": member.worker.as_str(),
        "rank": rank_idx,
        "share": member.share,
        "address": member.grpc_address,
        "shard": member.shard,
        "resident_weight_bytes": member.resident_weight_bytes,
        "links": member.links,
        "load_ms": member.load_ms,
        "stage": rank.map(|rank| rank.progress.stage.as_str()),
        "bytes_done": rank.map(|rank| rank.progress.bytes_done),
        "bytes_total": rank.map(|rank| rank.progress.bytes_total),
        "detail": rank.map(|rank| rank.progress.detail.as_str()),
        "backend": rank.and_then(|rank| rank.ready.as_ref()).map(|ready| ready.backend.as_str()),
    })
}

fn deployment_page(state: &State, directory: &Directory, deployment: &Deployment) -> Value {
    let model = &deployment.model;
    let n_ready = directory.groups.iter().filter(|group| group.model == *model).count();
    let complete = n_ready >= deployment.replicas as usize;
    let missing = if complete { Vec::new() } else { why_not(state, model) };
    json!({
        "model": model.as_str(),
        "world_size": deployment.world_size,
        "shares": deployment.shares,
        "replicas": deployment.replicas,
        "ready_groups": n_ready,
        "described": state.descriptions.get(model).is_some(),
        "missing": missing,
    })
}
