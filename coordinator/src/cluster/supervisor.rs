//! Reconciles wanted groups with living ones: forms, follows and retires epochs while this
//! coordinator leads.
//!
//! One task owns all state here; tasks that talk to workers and to the registry report to it
//! through one channel. What should be done is decided by `placement.rs` and `formation.rs`; what
//! is published is built in `publish.rs`.

use std::time::Duration;

use evener_proto::ids::{Epoch, GroupId, ModelName, WorkerId};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::descriptions;

use super::formation::{Failure, Formation, Outcome};
use super::member::{self, Join, Peer, Told};
use super::membership::fold;
use super::placement::{self, Policy, Situation, Wanted};
use super::publish::Publisher;
use super::records::{Group, GroupState, Member, Worker};
use super::registry::{Error, FollowOptions, Registry, jitter};
use super::state::{Backoff, Lingering, Live, Shun, State};
use super::writer::Writer;

/// How groups are formed and followed.
#[derive(Debug, Clone)]
pub struct Options {
    pub placement: Policy,
    pub member: member::Options,
    /// For a group's ranks to connect and load together.
    pub join_timeout: Duration,
    /// Of every collective operation inside a group.
    pub step_timeout: Duration,
    /// For the ranks of a group that is taken over to confirm that it lives.
    pub adopt_timeout: Duration,
    /// Sequences a group runs at once; 0: the workers' default.
    pub max_sequences: u32,
    /// First pause before a group is formed again; doubles with each failure in a row, with jitter.
    pub backoff_min: Duration,
    pub backoff_max: Duration,
    /// A group that served this long has earned the first pause again.
    pub proven_after: Duration,
    /// How long a worker that did not answer is left alone at first; doubles likewise.
    pub shun_min: Duration,
    pub shun_max: Duration,
    /// How long the groups of a worker whose lease ended live on: if only the lease was lost, the
    /// worker is back soon.
    pub linger: Duration,
    pub follow: FollowOptions,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            placement: Policy::default(),
            member: member::Options::default(),
            join_timeout: Duration::from_secs(300),
            step_timeout: Duration::from_secs(10),
            adopt_timeout: Duration::from_secs(10),
            max_sequences: 0,
            backoff_min: Duration::from_millis(100),
            backoff_max: Duration::from_secs(10),
            proven_after: Duration::from_secs(10),
            shun_min: Duration::from_secs(2),
            shun_max: Duration::from_secs(30),
            linger: Duration::from_secs(3),
            follow: FollowOptions::default(),
        }
    }
}

/// What tasks report.
enum Event {
    Epoch { group: GroupId, attempt: u64, taken: Result<Epoch, Error> },
    Told { group: GroupId, attempt: u64, rank_idx: usize, told: Told },
    Left { group: GroupId, worker: WorkerId, left: Result<(), member::Error> },
    Described(descriptions::Answer),
}

pub(super) struct Supervisor {
    pub(super) options: Options,
    registry: Registry,
    pub(super) state: State,
    writer: Writer,
    last_arrival: Instant,
    pub(super) next_attempt: u64,
    reports: mpsc::Sender<Event>,
    /// LeaveGroup and Describe calls under way.
    calls: JoinSet<()>,
}

/// Supervises until `shutdown`. Groups live on then: coordinators come and go.
pub(super) async fn run(
    options: Options,
    state: State,
    registry: Registry,
    mut leading: watch::Receiver<bool>,
    mut publisher: Publisher,
    shutdown: CancellationToken,
) {
    const REPORTS: usize = 256;
    let (reports, mut events) = mpsc::channel(REPORTS);
    let mut follower = registry.follow(evener_proto::keys::PREFIX, options.follow.clone());
    let mut supervisor = Supervisor {
        state,
        writer: Writer::start(registry.clone(), options.backoff_max / 20),
        options,
        registry,
        last_arrival: Instant::now(),
        next_attempt: 0,
        reports,
        calls: JoinSet::new(),
    };
    loop {
        let wake = supervisor.reconcile(Instant::now());
        publisher.publish(&supervisor.state);
        tokio::select! {
            () = shutdown.cancelled() => return,
            followed = follower.next() => supervisor.followed(&followed, Instant::now()),
            Some(event) = events.recv() => supervisor.reported(event, Instant::now()),
            changed = leading.changed() => {
                // The election ends only at shutdown.
                if changed.is_err() {
                    shutdown.cancelled().await;
                    return;
                }
                supervisor.state.leading = *leading.borrow_and_update();
            }
            Some(_) = supervisor.calls.join_next(), if !supervisor.calls.is_empty() => {}
            () = tokio::time::sleep_until(wake) => {}
        }
    }
}

impl Supervisor {
    fn followed(&mut self, followed: &super::registry::Followed, now: Instant) {
        let before = std::mem::take(&mut self.state.view);
        let known = before.workers.clone();
        self.state.view = fold(before, followed);
        for worker in self.state.view.workers.values() {
            if known.get(&worker.id).is_none_or(|old| !old.is_same_process(worker)) {
                tracing::info!(worker = %worker.id, address = worker.grpc_address, "worker is here");
                self.last_arrival = now;
            }
        }
        for (id, worker) in known {
            if !self.state.view.workers.contains_key(&id) {
                tracing::info!(worker = %id, "worker's lease has ended");
                let lingering = Lingering { until: now + self.options.linger, worker };
                self.state.lingering.insert(id, lingering);
            }
        }
        // A worker that is gone, or another process under its name, starts with a clean sheet.
        let workers = &self.state.view.workers;
        self.state.lingering.retain(|id, _| !workers.contains_key(id));
        self.state.shunned.retain(|id, shun| {
            workers.get(id).is_some_and(|worker| worker.is_same_process(&shun.process))
        });
    }

    fn reported(&mut self, event: Event, now: Instant) {
        match event {
            Event::Epoch { group, attempt, taken } => self.epoch_taken(&group, attempt, taken, now),
            Event::Told { group, attempt, rank_idx, told } => {
                self.told(&group, attempt, rank_idx, told, now);
            }
            Event::Left { group, worker, left } => {
                if let Some(backoff) = self.state.backoff.get_mut(&group) {
                    backoff.n_leaving = backoff.n_leaving.saturating_sub(1);
                }
                if let Err(error @ member::Error::Unreachable { .. }) = left {
                    self.shun(&worker, &error.to_string(), now);
                }
            }
            Event::Described(answer) => self.state.descriptions.answered(answer, now),
        }
    }

    fn told(&mut self, id: &GroupId, attempt: u64, rank_idx: usize, told: Told, now: Instant) {
        let live = self.state.groups.get_mut(id).filter(|live| live.attempt == attempt);
        let Some(formation) = live.and_then(|live| live.formation.as_mut()) else { return };
        let epoch = formation.record.epoch;
        match formation.told(rank_idx, told, now) {
            Outcome::Going => {}
            Outcome::Ready => {
                tracing::info!(group = %id, %epoch, ranks = formation.ranks.len(), "group ready");
                for rank in &formation.ranks {
                    self.state.shunned.remove(&rank.worker);
                }
                self.writer.write(formation.record.clone());
            }
            Outcome::Failed(failure) => self.fail(id, &failure, now),
        }
    }

    /// Does what should be done now; returns when to look again.
    fn reconcile(&mut self, now: Instant) -> Instant {
        self.state.lingering.retain(|_, lingering| lingering.until > now);
        if self.state.follows() && !self.state.groups.is_empty() {
            tracing::info!(leader = self.state.view.leader, "another coordinator leads, following");
            self.state.groups.clear();
            self.state.backoff.clear();
            self.writer.clear();
        }
        self.adopt(now);
        let overdue: Vec<(GroupId, Failure)> = self
            .state
            .groups
            .iter()
            .filter_map(|(id, live)| Some((id.clone(), live.formation.as_ref()?.overdue(now)?)))
            .collect();
        for (id, failure) in overdue {
            self.fail(&id, &failure, now);
        }
        let again = self.place(now);
        self.describe(now);
        self.wake(again, now)
    }

    fn wake(&self, again: Option<Duration>, now: Instant) -> Instant {
        // Load changes each second, and so does the status page.
        const IDLE: Duration = Duration::from_secs(1);
        let state = &self.state;
        let backoffs = state.backoff.values().map(|backoff| backoff.not_before);
        let shuns = state.shunned.values().map(|shun| shun.until);
        let lingerings = state.lingering.values().map(|lingering| lingering.until);
        let formations = state.groups.values().filter_map(|live| live.formation.as_ref());
        let deadlines = formations.filter_map(Formation::deadline);
        let later = backoffs.chain(shuns).chain(lingerings).chain(deadlines).filter(|&at| at > now);
        later.chain(again.map(|wait| now + wait)).chain([now + IDLE]).min().unwrap_or(now + IDLE)
    }

    fn place(&mut self, now: Instant) -> Option<Duration> {
        let state = &self.state;
        let living = state.groups.iter().map(|(id, live)| (id.clone(), live.living())).collect();
        let shunned = state
            .shunned
            .iter()
            .filter(|(_, shun)| shun.until > now)
            .map(|(id, shun)| (id.clone(), shun.why.clone()))
            .collect();
        let lingering =
            state.lingering.iter().map(|(id, gone)| (id.clone(), gone.worker.clone())).collect();
        let situation = Situation {
            view: &state.view,
            living: &living,
            shunned: &shunned,
            lingering: &lingering,
            settled_for: now.saturating_duration_since(self.last_arrival),
        };
        let placement = placement::place(&situation, &self.options.placement);
        let may_place = state.leading && state.view.known && state.view.away.is_none();
        if may_place {
            for (id, why) in &placement.retire {
                let failure = Failure { why: why.clone(), unreachable: None };
                self.fail(id, &failure, now);
            }
            for wanted in &placement.form {
                let waits = self.state.backoff.get(&wanted.id);
                if waits.is_none_or(|backoff| backoff.is_over(now)) {
                    self.form(wanted.clone());
                }
            }
        }
        let again = placement.again;
        self.state.placement = placement;
        again
    }

    /// Begins an attempt: first of all, its epoch.
    fn form(&mut self, wanted: Wanted) {
        let workers = &self.state.view.workers;
        let members: Vec<(Worker, u32)> = wanted
            .members
            .iter()
            .filter_map(|(id, share)| workers.get(id).map(|worker| (worker.clone(), *share)))
            .collect();
        if members.len() != wanted.members.len() {
            return;
        }
        self.next_attempt += 1;
        let (attempt, group) = (self.next_attempt, wanted.id.clone());
        let (registry, reports) = (self.registry.clone(), self.reports.clone());
        let above = self.state.view.highest_epoch();
        let mut tasks = JoinSet::new();
        let id = group.clone();
        tasks.spawn(async move {
            let taken = registry.take_epoch(above).await;
            // The receiver ends only with the supervisor.
            let _ = reports.send(Event::Epoch { group: id, attempt, taken }).await;
        });
        let live = Live { attempt, wanted, members, formation: None, tasks };
        self.state.groups.insert(group, live);
    }

    fn epoch_taken(
        &mut self,
        id: &GroupId,
        attempt: u64,
        taken: Result<Epoch, Error>,
        now: Instant,
    ) {
        let Some(live) = self.state.groups.get_mut(id).filter(|live| live.attempt == attempt)
        else {
            return;
        };
        let epoch = match taken {
            Ok(epoch) => epoch,
            Err(error) => {
                let failure = Failure { why: error.to_string(), unreachable: None };
                return self.fail(id, &failure, now);
            }
        };
        let before = self.state.backoff.get(id).map(|backoff| backoff.why.clone());
        let record = Group {
            id: id.clone(),
            epoch,
            model: live.wanted.model.clone(),
            members: live.members.iter().map(|(worker, share)| member_of(worker, *share)).collect(),
            state: GroupState::Forming,
            reason: before.unwrap_or_default(),
            kv_blocks: 0,
            kv_block_len: 0,
            deterministic: false,
            kv_format: self.options.placement.kv_format,
            activations: self.options.placement.activations,
        };
        let members: Vec<&str> =
            live.members.iter().map(|(worker, _)| worker.id.as_str()).collect();
        tracing::info!(group = %id, %epoch, ?members, "forming group");
        self.writer.write(record.clone());
        let token: u128 = rand::random();
        let limit = self.options.join_timeout + self.options.member.join_answer_timeout;
        live.formation = Some(Formation::new(record, now, limit));
        self.join(id, format!("{token:032x}"));
    }

    /// Opens a stream to each rank of a group, all at once.
    pub(super) fn join(&mut self, id: &GroupId, token: String) {
        let Some(live) = self.state.groups.get_mut(id) else { return };
        let Some(formation) = &live.formation else { return };
        let peer = |(worker, share): &(Worker, u32)| Peer {
            worker_id: worker.id.to_string(),
            collective_address: worker.collective_address.clone(),
            host_id: worker.host_id.clone(),
            share: *share,
        };
        let peers: Vec<Peer> = live.members.iter().map(peer).collect();
        for (rank_idx, (worker, _)) in live.members.iter().enumerate() {
            let join = Join {
                group: id.clone(),
                epoch: formation.record.epoch,
                model: live.wanted.model.clone(),
                fingerprint: live.wanted.fingerprint.clone(),
                rank: rank_idx,
                peers: peers.clone(),
                token: token.clone(),
                join_timeout: self.options.join_timeout,
                step_timeout: self.options.step_timeout,
                max_sequences: self.options.max_sequences,
                kv_format: formation.record.kv_format,
                activations: formation.record.activations,
            };
            let (group, attempt, reports) = (id.clone(), live.attempt, self.reports.clone());
            let (address, options) = (worker.grpc_address.clone(), self.options.member.clone());
            live.tasks.spawn(async move {
                let report = |told| {
                    let group = group.clone();
                    reports.send(Event::Told { group, attempt, rank_idx, told })
                };
                let mut joined = match member::join(&address, join, &options).await {
                    Ok(joined) => joined,
                    Err(error) => {
                        let _ = report(Told::Failed(error)).await;
                        return;
                    }
                };
                loop {
                    let told = joined.next().await;
                    let last = told.is_last();
                    if report(told).await.is_err() || last {
                        return;
                    }
                }
            });
        }
    }

    /// Ends an epoch, whatever state it is in: tells its workers, writes it down, and sets when to
    /// try again.
    fn fail(&mut self, id: &GroupId, failure: &Failure, now: Instant) {
        let Some(live) = self.state.groups.remove(id) else { return };
        let Some(formation) = live.formation else {
            tracing::warn!(group = %id, why = failure.why, "no epoch could be taken");
            self.back_off(id, failure, Duration::ZERO, 0, now);
            return;
        };
        let epoch = formation.record.epoch;
        tracing::warn!(group = %id, %epoch, why = failure.why, "group retired");
        if let Some(worker) = &failure.unreachable {
            self.shun(worker, &failure.why, now);
        }
        self.back_off(id, failure, formation.ready_for(now), live.members.len(), now);
        let members = live.members.into_iter().map(|(worker, _)| (worker.id, worker.grpc_address));
        self.retire(formation.record, members.collect(), &failure.why);
    }

    pub(super) fn retire(&mut self, record: Group, members: Vec<(WorkerId, String)>, why: &str) {
        let (id, epoch) = (record.id.clone(), record.epoch);
        self.writer.write(Group { state: GroupState::Retired, reason: why.to_owned(), ..record });
        for (worker, address) in members {
            let (group, reason, reports) = (id.clone(), why.to_owned(), self.reports.clone());
            let options = self.options.member.clone();
            self.calls.spawn(async move {
                let left = member::leave(&address, epoch, &reason, &options).await;
                let _ = reports.send(Event::Left { group, worker, left }).await;
            });
        }
    }

    pub(super) fn back_off(
        &mut self,
        id: &GroupId,
        failure: &Failure,
        served: Duration,
        n_leaving: usize,
        now: Instant,
    ) {
        let before = self.state.backoff.get(id).map_or(0, |backoff| backoff.n_failures);
        let n_failures = if served >= self.options.proven_after { 1 } else { before + 1 };
        let pause = doubled(self.options.backoff_min, n_failures - 1, self.options.backoff_max);
        let not_before = now + jitter(pause);
        let why = failure.why.clone();
        let left_by = now + self.options.member.leave_timeout * 2;
        let backoff = Backoff { n_failures, not_before, n_leaving, left_by, why };
        self.state.backoff.insert(id.clone(), backoff);
    }

    fn shun(&mut self, id: &WorkerId, why: &str, now: Instant) {
        let Some(process) = self.state.view.workers.get(id).cloned() else { return };
        let before = self.state.shunned.get(id);
        if before.is_some_and(|shun| shun.until > now) {
            return;
        }
        let n_failures = before.map_or(0, |shun| shun.n_failures) + 1;
        let pause = doubled(self.options.shun_min, n_failures - 1, self.options.shun_max);
        tracing::warn!(worker = %id, why, "worker does not answer, left alone for {pause:?}");
        let shun = Shun { until: now + pause, why: why.to_owned(), n_failures, process };
        self.state.shunned.insert(id.clone(), shun);
    }

    /// Asks for the description of every deployed model that is not known yet.
    fn describe(&mut self, now: Instant) {
        let state = &mut self.state;
        let models: Vec<ModelName> = state.view.deployments.keys().cloned().collect();
        for model in models {
            let of_group = state.groups.values().find(|live| live.wanted.model == model);
            let file = of_group.map(|live| live.wanted.fingerprint.clone());
            let Some(file) = file.or_else(|| placement::fingerprint(&state.view, &model)) else {
                continue;
            };
            let holders = state.view.workers.values().filter(|worker| {
                state.shunned.get(&worker.id).is_none_or(|shun| shun.until <= now)
                    && worker.models.get(&model).is_some_and(|held| held.fingerprint == file)
            });
            let holders: Vec<String> = holders.map(|worker| worker.grpc_address.clone()).collect();
            let Some(address) = state.descriptions.ask(&model, &file, &holders, now) else {
                continue;
            };
            let (reports, options) = (self.reports.clone(), self.options.member.clone());
            self.calls.spawn(async move {
                let described = member::describe(&address, &model, &file, &options).await;
                let answer = descriptions::Answer { model, fingerprint: file, described };
                let _ = reports.send(Event::Described(answer)).await;
            });
        }
    }
}

fn member_of(worker: &Worker, share: u32) -> Member {
    Member {
        worker: worker.id.clone(),
        share,
        grpc_address: worker.grpc_address.clone(),
        resident_weight_bytes: 0,
        shard: String::new(),
        links: Vec::new(),
        load_ms: 0,
    }
}

fn doubled(first: Duration, times: u32, max: Duration) -> Duration {
    first.saturating_mul(1 << times.min(20)).min(max)
}
