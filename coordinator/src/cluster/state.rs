//! Everything the supervisor knows. It alone changes it; `publish.rs` and `status.rs` read it.

use std::collections::BTreeMap;

use evener_proto::ids::{GroupId, ModelName, WorkerId};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::descriptions::Descriptions;
use super::formation::Formation;
use super::membership::View;
use super::placement::{Living, Placement, Wanted};
use super::records::Worker;

/// Everything the supervisor knows; `publish.rs` reads it.
pub(super) struct State {
    pub(super) identity: String,
    pub(super) registry: String,
    pub(super) view: View,
    pub(super) leading: bool,
    pub(super) groups: BTreeMap<GroupId, Live>,
    pub(super) backoff: BTreeMap<GroupId, Backoff>,
    pub(super) shunned: BTreeMap<WorkerId, Shun>,
    pub(super) lingering: BTreeMap<WorkerId, Lingering>,
    pub(super) descriptions: Descriptions,
    pub(super) placement: Placement,
}

impl State {
    /// Before anything is known.
    pub(super) fn new(identity: String, registry: String) -> Self {
        Self {
            identity,
            registry,
            view: View::default(),
            leading: false,
            groups: BTreeMap::new(),
            backoff: BTreeMap::new(),
            shunned: BTreeMap::new(),
            lingering: BTreeMap::new(),
            descriptions: Descriptions::default(),
            placement: Placement::default(),
        }
    }

    /// A worker that is registered, or was a moment ago.
    pub(super) fn worker(&self, id: &WorkerId) -> Option<&Worker> {
        let lingering = || self.lingering.get(id).map(|lingering| &lingering.worker);
        self.view.workers.get(id).or_else(lingering)
    }

    /// Another coordinator is known to lead.
    pub(super) fn follows(&self) -> bool {
        !self.leading && self.view.leader.as_ref().is_some_and(|leader| *leader != self.identity)
    }
}

/// A group this coordinator forms or follows.
pub(super) struct Live {
    /// Tells its tasks' reports from those of an earlier attempt.
    pub(super) attempt: u64,
    pub(super) wanted: Wanted,
    pub(super) members: Vec<(Worker, u32)>,
    /// `None` until its epoch is taken.
    pub(super) formation: Option<Formation>,
    /// The streams of its ranks; they end with it.
    pub(super) tasks: JoinSet<()>,
}

impl Live {
    pub(super) fn model(&self) -> &ModelName {
        &self.wanted.model
    }

    pub(super) fn living(&self) -> Living {
        let member = |(worker, share): &(Worker, u32)| {
            (worker.id.clone(), worker.grpc_address.clone(), *share)
        };
        Living {
            model: self.wanted.model.clone(),
            fingerprint: self.wanted.fingerprint.clone(),
            members: self.members.iter().map(member).collect(),
        }
    }
}

/// What stands between a group that failed and its next attempt.
#[derive(Debug, Clone)]
pub(super) struct Backoff {
    pub(super) n_failures: u32,
    pub(super) not_before: Instant,
    /// LeaveGroups still under way: only then is it known who answers.
    pub(super) n_leaving: usize,
    /// They have answered or timed out by then.
    pub(super) left_by: Instant,
    pub(super) why: String,
}

impl Backoff {
    pub(super) fn is_over(&self, now: Instant) -> bool {
        self.not_before <= now && (self.n_leaving == 0 || self.left_by <= now)
    }
}

/// A worker that did not answer.
#[derive(Debug, Clone)]
pub(super) struct Shun {
    pub(super) until: Instant,
    pub(super) why: String,
    pub(super) n_failures: u32,
    pub(super) process: Worker,
}

/// A worker whose lease ended.
#[derive(Debug, Clone)]
pub(super) struct Lingering {
    pub(super) until: Instant,
    pub(super) worker: Worker,
}
