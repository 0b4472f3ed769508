//! What a new leader does with the groups it finds on record: ready ones live on under their epoch,
//! others are retired.

use std::collections::BTreeSet;
use std::time::Duration;

use evener_proto::ids::WorkerId;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::formation::{Failure, Formation};
use super::placement::Wanted;
use super::records::{Group, GroupState, Worker};
use super::state::Live;
use super::supervisor::Supervisor;

impl Supervisor {
    /// Takes over what an earlier leader left: ready groups whose members are all here live on
    /// under their epoch.
    pub(super) fn adopt(&mut self, now: Instant) {
        if !self.state.leading || !self.state.view.known {
            return;
        }
        let left: Vec<Group> = self
            .state
            .view
            .groups
            .values()
            .filter(|group| group.state != GroupState::Retired)
            .filter(|group| !self.state.groups.contains_key(&group.id))
            .filter(|group| !self.state.backoff.contains_key(&group.id))
            .cloned()
            .collect();
        for record in left {
            match self.adoptable(&record) {
                Ok((members, fingerprint)) => self.take_over(record, members, fingerprint, now),
                Err(why) => {
                    tracing::warn!(group = %record.id, epoch = %record.epoch, why, "not taken over");
                    let members = &record.members;
                    let members: Vec<(WorkerId, String)> = members
                        .iter()
                        .map(|m| (m.worker.clone(), m.grpc_address.clone()))
                        .collect();
                    let failure = Failure { why: why.clone(), unreachable: None };
                    self.back_off(&record.id, &failure, Duration::ZERO, members.len(), now);
                    self.retire(record, members, &why);
                }
            }
        }
    }

    /// The members of a recorded group as they are registered now, and the file they serve.
    fn adoptable(&self, record: &Group) -> Result<(Vec<(Worker, u32)>, String), String> {
        if record.state != GroupState::Ready {
            return Err("the coordinator that formed it is gone".to_owned());
        }
        let mut members = Vec::new();
        let mut files = BTreeSet::new();
        for member in &record.members {
            let worker = self.state.worker(&member.worker);
            let Some(worker) = worker.filter(|w| w.grpc_address == member.grpc_address) else {
                return Err(format!("worker {} is gone", member.worker));
            };
            let Some(held) = worker.models.get(&record.model) else {
                return Err(format!(
                    "worker {} does not hold {} any more",
                    worker.id, record.model
                ));
            };
            files.insert(held.fingerprint.clone());
            members.push((worker.clone(), member.share));
        }
        match (files.pop_first(), files.pop_first()) {
            (Some(file), None) => Ok((members, file)),
            _ => Err(format!("its workers hold different files as {}", record.model)),
        }
    }

    fn take_over(
        &mut self,
        record: Group,
        members: Vec<(Worker, u32)>,
        fingerprint: String,
        now: Instant,
    ) {
        let id = record.id.clone();
        tracing::info!(group = %id, epoch = %record.epoch, "taking over group");
        self.next_attempt += 1;
        let wanted = Wanted {
            id: id.clone(),
            model: record.model.clone(),
            fingerprint,
            members: members.iter().map(|(worker, share)| (worker.id.clone(), *share)).collect(),
        };
        let formation = Formation::new(record, now, self.options.adopt_timeout);
        let live = Live {
            attempt: self.next_attempt,
            wanted,
            members,
            formation: Some(formation),
            tasks: JoinSet::new(),
        };
        self.state.groups.insert(id.clone(), live);
        // Attaching shows no secret: a worker that does not serve this epoch must refuse.
        self.join(&id, String::new());
    }
}
