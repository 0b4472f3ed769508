//! One epoch of a group as its coordinator sees it grow: what each rank has told, and what follows
//! from it. Pure.

use std::time::Duration;

use evener_proto::ids::WorkerId;
use tokio::time::Instant;

use super::member::{Error, Progress, Ready, Stage, Told};
use super::records::{Group, GroupState};

/// An epoch, from the first JoinGroup to its end.
#[derive(Debug)]
pub struct Formation {
    /// As it stands in the registry, or will.
    pub record: Group,
    /// By rank.
    pub ranks: Vec<Rank>,
    /// All ranks must be ready by then.
    deadline: Instant,
    ready_since: Option<Instant>,
}

#[derive(Debug)]
pub struct Rank {
    pub worker: WorkerId,
    pub progress: Progress,
    pub ready: Option<Ready>,
}

/// What follows from what a rank told.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    Going,
    /// The last rank became ready, or what stands in the record has changed.
    Ready,
    Failed(Failure),
}

/// Why an epoch ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// A sentence.
    pub why: String,
    /// Who could not be reached.
    pub unreachable: Option<WorkerId>,
}

impl Formation {
    /// A new epoch, or (`record` is ready) one that lives already and is adopted; its ranks have
    /// until `deadline` to say so.
    #[must_use]
    pub fn new(record: Group, now: Instant, limit: Duration) -> Self {
        let asked =
            Progress { stage: Stage::Asked, bytes_done: 0, bytes_total: 0, detail: String::new() };
        let rank = |worker: &WorkerId| Rank {
            worker: worker.clone(),
            progress: asked.clone(),
            ready: None,
        };
        let ranks = record.members.iter().map(|member| rank(&member.worker)).collect();
        let ready_since = (record.state == GroupState::Ready).then_some(now);
        Self { record, ranks, deadline: now + limit, ready_since }
    }

    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.ready_since.is_some()
    }

    /// How long it has served.
    #[must_use]
    pub fn ready_for(&self, now: Instant) -> Duration {
        self.ready_since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }

    /// Until when every rank must have said that it is ready; `None` once they have.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.ranks.iter().any(|rank| rank.ready.is_none()).then_some(self.deadline)
    }

    /// Takes in what a rank told.
    pub fn told(&mut self, rank_idx: usize, told: Told, now: Instant) -> Outcome {
        let Some(rank) = self.ranks.get_mut(rank_idx) else { return Outcome::Going };
        let ready = match told {
            Told::Progress(progress) => {
                rank.progress = progress;
                return Outcome::Going;
            }
            Told::Left => {
                let why = format!("rank {rank_idx} ({}) left the group", rank.worker);
                return Outcome::Failed(Failure { why, unreachable: None });
            }
            Told::Failed(error) => return Outcome::Failed(failure(rank_idx, &rank.worker, &error)),
            Told::Ready(ready) => ready,
        };
        rank.progress.stage = Stage::Ready;
        rank.progress.bytes_total = rank.progress.bytes_total.max(ready.resident_weight_bytes);
        rank.progress.bytes_done = rank.progress.bytes_total;
        rank.ready = Some(ready);
        self.settle(now)
    }

    /// Once every rank is ready: writes what they said into the record, if they agree.
    fn settle(&mut self, now: Instant) -> Outcome {
        let said: Option<Vec<&Ready>> = self.ranks.iter().map(|rank| rank.ready.as_ref()).collect();
        let Some(said) = said else { return Outcome::Going };
        let first = said[0];
        let agree = |ready: &&Ready| {
            (ready.kv_blocks, ready.kv_block_len) == (first.kv_blocks, first.kv_block_len)
        };
        if !said.iter().all(agree) || first.kv_blocks == 0 || first.kv_block_len == 0 {
            let said: Vec<_> =
                said.iter().map(|r| format!("{} x {}", r.kv_blocks, r.kv_block_len)).collect();
            let why = format!("the ranks disagree on their KV blocks: {}", said.join(", "));
            return Outcome::Failed(Failure { why, unreachable: None });
        }
        self.record.kv_blocks = first.kv_blocks;
        self.record.kv_block_len = first.kv_block_len;
        self.record.deterministic = said.iter().all(|ready| ready.deterministic);
        self.record.state = GroupState::Ready;
        self.record.reason = String::new();
        for (member, ready) in self.record.members.iter_mut().zip(said) {
            member.resident_weight_bytes = ready.resident_weight_bytes;
            member.shard = ready.shard.clone();
            member.links = ready.links.clone();
            member.load_ms = ready.load_ms;
        }
        self.ready_since = self.ready_since.or(Some(now));
        Outcome::Ready
    }

    /// Whether the ranks took too long.
    #[must_use]
    pub fn overdue(&self, now: Instant) -> Option<Failure> {
        if self.deadline().is_none_or(|deadline| now < deadline) {
            return None;
        }
        let why = format!("not ready in time: {}", self.sentence());
        Some(Failure { why, unreachable: None })
    }

    /// How far the ranks are: `w0 loading 12.0 of 60.0 MiB, w1 ready`.
    #[must_use]
    pub fn sentence(&self) -> String {
        let said: Vec<String> = self.ranks.iter().map(said).collect();
        said.join(", ")
    }
}

fn said(rank: &Rank) -> String {
    let Progress { stage, bytes_done, bytes_total, .. } = rank.progress;
    let (id, stage_name) = (&rank.worker, stage.as_str());
    if stage == Stage::Loading && bytes_total > 0 {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        return format!("{id} {stage_name} {:.1} of {:.1} MiB", mib(bytes_done), mib(bytes_total));
    }
    format!("{id} {stage_name}")
}

fn failure(rank_idx: usize, worker: &WorkerId, error: &Error) -> Failure {
    let unreachable = matches!(error, Error::Unreachable { .. }).then(|| worker.clone());
    Failure { why: format!("rank {rank_idx} ({worker}): {error}"), unreachable }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use evener_proto::ids::{Epoch, GroupId, ModelName};

    use super::*;
    use crate::cluster::records::Member;

    fn formation(state: GroupState, now: Instant) -> Formation {
        let member = |id: &str| Member {
            worker: WorkerId::parse(id).unwrap(),
            share: 1,
            grpc_address: format!("{id}:1"),
            resident_weight_bytes: 0,
            shard: String::new(),
            links: vec![],
            load_ms: 0,
        };
        let record = Group {
            id: GroupId::parse("m:0").unwrap(),
            epoch: Epoch::parse(3).unwrap(),
            model: ModelName::parse("m").unwrap(),
            members: vec![member("w0"), member("w1")],
            state,
            reason: "before".to_owned(),
            kv_blocks: 0,
            kv_block_len: 0,
            deterministic: false,
            kv_format: evener_proto::KvFormat::default(),
            activations: evener_proto::Activations::default(),
        };
        Formation::new(record, now, Duration::from_secs(10))
    }

    fn ready(kv_blocks: u32, deterministic: bool) -> Told {
        Told::Ready(Ready {
            resident_weight_bytes: 7 << 20,
            kv_blocks,
            kv_block_len: 16,
            shard: "heads 0..3".to_owned(),
            backend: "cpu".to_owned(),
            deterministic,
            links: vec!["self".to_owned(), "shm".to_owned()],
            load_ms: 120,
        })
    }

    #[test]
    fn a_group_is_ready_when_its_last_rank_is() {
        let now = Instant::now();
        let mut group = formation(GroupState::Forming, now);
        assert_eq!(group.told(1, ready(40, true), now), Outcome::Going);
        assert!(!group.is_ready());
        assert_eq!(group.told(0, ready(40, false), now), Outcome::Ready);
        assert!(group.is_ready() && group.deadline().is_none());
        let record = &group.record;
        assert_eq!(
            (record.state, record.kv_blocks, record.deterministic),
            (GroupState::Ready, 40, false)
        );
        assert_eq!(record.members[1].resident_weight_bytes, 7 << 20);
        assert_eq!(record.members[1].load_ms, 120);
        assert_eq!(record.reason, "");
    }

    #[test]
    fn ranks_that_disagree_form_no_group() {
        let now = Instant::now();
        let mut group = formation(GroupState::Forming, now);
        let _ = group.told(0, ready(40, true), now);
        let Outcome::Failed(failure) = group.told(1, ready(41, true), now) else { panic!() };
        assert_eq!(failure.why, "the ranks disagree on their KV blocks: 40 x 16, 41 x 16");
    }

    #[test]
    fn a_rank_that_fails_or_leaves_ends_the_epoch_and_says_who() {
        let now = Instant::now();
        let unreachable =
            Error::Unreachable { address: "w1:1".to_owned(), detail: "refused".to_owned() };
        let refused = Error::Refused { address: "w1:1".to_owned(), detail: "no memory".to_owned() };
        for (told, why, who) in [
            (Told::Failed(unreachable), "rank 1 (w1): w1:1 does not answer: refused", Some("w1")),
            (Told::Failed(refused), "rank 1 (w1): no memory", None),
            (Told::Left, "rank 1 (w1) left the group", None),
        ] {
            for state in [GroupState::Forming, GroupState::Ready] {
                let outcome = formation(state, now).told(1, told.clone(), now);
                let Outcome::Failed(failure) = outcome else { panic!("{outcome:?}") };
                assert_eq!(failure.why, why);
                assert_eq!(failure.unreachable.as_ref().map(WorkerId::as_str), who);
            }
        }
    }

    #[test]
    fn a_missed_deadline_says_how_far_each_rank_came() {
        let now = Instant::now();
        let mut group = formation(GroupState::Forming, now);
        let loading = Progress {
            stage: Stage::Loading,
            bytes_done: 3 << 19,
            bytes_total: 60 << 20,
            detail: String::new(),
        };
        let _ = group.told(0, Told::Progress(loading), now);
        let _ = group.told(1, ready(40, true), now);
        assert_eq!(group.overdue(now + Duration::from_secs(9)), None);
        assert_eq!(
            group.overdue(now + Duration::from_secs(10)).unwrap().why,
            "not ready in time: w0 loading 1.5 of 60.0 MiB, w1 ready"
        );
        let _ = group.told(0, ready(40, true), now);
        assert_eq!(group.overdue(now + Duration::from_secs(99)), None);
    }

    #[test]
    fn an_adopted_group_serves_at_once_and_must_still_be_confirmed() {
        let now = Instant::now();
        let mut group = formation(GroupState::Ready, now);
        assert!(group.is_ready());
        assert!(group.overdue(now + Duration::from_secs(10)).is_some());
        let _ = group.told(0, ready(40, true), now);
        assert_eq!(group.told(1, ready(40, true), now), Outcome::Ready);
        assert_eq!(group.overdue(now + Duration::from_secs(10)), None);
    }
}
