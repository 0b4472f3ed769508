//! The view: membership, load, deployments and groups as folded from the registry so far. Pure.
//!
//! It believes what the registry says and judges nothing; `placement.rs` does. What it does not
//! understand it counts.

use std::collections::BTreeMap;

use bytes::Bytes;
use evener_proto::ids::{GroupId, ModelName, WorkerId};
use evener_proto::keys;

use super::records::{self, Deployment, Group, Load, Worker};
use super::registry::{Change, Followed};

/// Everything known of the cluster.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct View {
    pub workers: BTreeMap<WorkerId, Worker>,
    pub loads: BTreeMap<WorkerId, Load>,
    pub deployments: BTreeMap<ModelName, Deployment>,
    pub groups: BTreeMap<GroupId, Group>,
    /// Last epoch taken; 0: none.
    pub epoch: u64,
    /// Identity of the coordinator that places.
    pub leader: Option<String>,
    /// The registry has been read at least once.
    pub known: bool,
    /// What the registry last failed with, while it is away.
    pub away: Option<String>,
    /// Unknown keys and undecodable values met so far.
    pub n_ignored: u64,
}

impl View {
    /// The highest epoch anything in the view speaks of.
    #[must_use]
    pub fn highest_epoch(&self) -> u64 {
        let loads = self.loads.values().map(|load| load.epoch);
        let groups = self.groups.values().map(|group| group.epoch.get());
        loads.chain(groups).chain([self.epoch]).max().unwrap_or(0)
    }
}

/// The view after `event`.
#[must_use]
pub fn fold(mut view: View, event: &Followed) -> View {
    match event {
        Followed::Resync(snapshot) => {
            let n_ignored = view.n_ignored;
            view = View { known: true, away: view.away, n_ignored, ..View::default() };
            for entry in &snapshot.entries {
                apply(&mut view, &entry.key, Some(&entry.value));
            }
        }
        Followed::Changes(changes) => {
            for Change { key, value, .. } in changes {
                apply(&mut view, key, value.as_ref());
            }
        }
        Followed::Away(error) => view.away = Some(error.to_string()),
        Followed::Back => view.away = None,
    }
    view
}

fn apply(view: &mut View, key: &str, value: Option<&Bytes>) {
    if let Err(why) = try_apply(view, key, value) {
        view.n_ignored += 1;
        tracing::debug!(key, why, "ignored in the registry");
    }
}

fn try_apply(view: &mut View, key: &str, value: Option<&Bytes>) -> Result<(), String> {
    fn said<E: std::fmt::Display>(error: E) -> String {
        error.to_string()
    }
    if let Some(id) = key.strip_prefix(keys::WORKERS) {
        let id = WorkerId::parse(id).map_err(said)?;
        let worker = value.map(|value| Worker::decode(value)).transpose().map_err(said)?;
        set(&mut view.workers, id, worker, |id, worker| worker.id == *id)
    } else if let Some(id) = key.strip_prefix(keys::LOADS) {
        let id = WorkerId::parse(id).map_err(said)?;
        let load = value.map(|value| records::decode_load(value)).transpose().map_err(said)?;
        set(&mut view.loads, id, load, |id, load| load.worker_id == id.as_str())
    } else if let Some(model) = key.strip_prefix(keys::DEPLOYMENTS) {
        let model = ModelName::parse(model).map_err(said)?;
        let wanted = value.map(|value| Deployment::decode(value)).transpose().map_err(said)?;
        set(&mut view.deployments, model, wanted, |model, wanted| wanted.model == *model)
    } else if let Some(id) = key.strip_prefix(keys::GROUPS) {
        let id = GroupId::parse(id).map_err(said)?;
        let group = value.map(|value| Group::decode(value)).transpose().map_err(said)?;
        set(&mut view.groups, id, group, |id, group| group.id == *id)
    } else if key == keys::EPOCH {
        let text = value.map_or(Ok("0"), |value| std::str::from_utf8(value)).map_err(said)?;
        view.epoch = text.parse().map_err(said)?;
        Ok(())
    } else if key == keys::LEADER {
        let text = value.map(|value| std::str::from_utf8(value)).transpose().map_err(said)?;
        view.leader = text.map(str::to_owned);
        Ok(())
    } else {
        Err("unknown key".to_owned())
    }
}

/// Puts or deletes one record, if it says of itself what its key says.
fn set<K: Ord, V>(
    map: &mut BTreeMap<K, V>,
    key: K,
    value: Option<V>,
    fits: impl Fn(&K, &V) -> bool,
) -> Result<(), String> {
    match value {
        None => {
            map.remove(&key);
        }
        Some(value) if fits(&key, &value) => {
            map.insert(key, value);
        }
        Some(_) => return Err("the record names another than its key".to_owned()),
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use evener_proto::Message;
    use evener_proto::registry as pb;

    use super::*;
    use crate::cluster::registry::{Entry, Error, Snapshot};

    fn put(key: &str, value: impl Into<Bytes>) -> Followed {
        Followed::Changes(vec![Change {
            key: key.to_owned(),
            value: Some(value.into()),
            mod_revision: 1,
        }])
    }

    fn gone(key: &str) -> Followed {
        Followed::Changes(vec![Change { key: key.to_owned(), value: None, mod_revision: 2 }])
    }

    fn worker(id: &str) -> Vec<u8> {
        pb::WorkerRecord { worker_id: id.to_owned(), ..Default::default() }.encode_to_vec()
    }

    fn deployment(model: &str, shares: &[u32]) -> Vec<u8> {
        let shares = shares.to_vec();
        pb::Deployment { model: model.to_owned(), shares, ..Default::default() }.encode_to_vec()
    }

    fn load(id: &str, epoch: u64) -> Vec<u8> {
        pb::LoadReport { worker_id: id.to_owned(), epoch, ..Default::default() }.encode_to_vec()
    }

    fn group(id: &str, epoch: u64, state: pb::group_record::State) -> Vec<u8> {
        pb::GroupRecord {
            group_id: id.to_owned(),
            epoch,
            model: "m".to_owned(),
            members: vec![pb::GroupMember { worker_id: "w0".to_owned(), ..Default::default() }],
            state: state.into(),
            ..Default::default()
        }
        .encode_to_vec()
    }

    /// `workers / loads / deployments / groups / epoch / leader / ignored`, in short.
    fn brief(view: &View) -> String {
        fn ids<K: ToString, V>(map: &BTreeMap<K, V>) -> String {
            map.keys().map(ToString::to_string).collect::<Vec<_>>().join(",")
        }
        let groups: Vec<_> = view
            .groups
            .values()
            .map(|group| format!("{}@{} {}", group.id, group.epoch, group.state.as_str()))
            .collect();
        format!(
            "{} / {} / {} / {} / {} / {} / {}",
            ids(&view.workers),
            ids(&view.loads),
            ids(&view.deployments),
            groups.join(","),
            view.highest_epoch(),
            view.leader.as_deref().unwrap_or("-"),
            view.n_ignored,
        )
    }

    fn check(events: &[Followed], expect: &str) {
        let view = events.iter().fold(View::default(), fold);
        assert_eq!(brief(&view), expect, "after {events:?}");
    }

    #[test]
    fn a_view_is_what_was_put_and_not_deleted() {
        use pb::group_record::State;
        check(&[], " /  /  /  / 0 / - / 0");
        let w0 = put("evener/v1/workers/w0", worker("w0"));
        let w1 = put("evener/v1/workers/w1", worker("w1"));
        check(&[w0.clone(), w1.clone()], "w0,w1 /  /  /  / 0 / - / 0");
        check(&[w0.clone(), w1.clone(), gone("evener/v1/workers/w0")], "w1 /  /  /  / 0 / - / 0");
        check(&[gone("evener/v1/workers/w9")], " /  /  /  / 0 / - / 0");
        check(&[put("evener/v1/loads/w0", load("w0", 6))], " / w0 /  /  / 6 / - / 0");
        check(
            &[put("evener/v1/deployments/m", deployment("m", &[2, 1]))],
            " /  / m /  / 0 / - / 0",
        );
        check(
            &[
                put("evener/v1/groups/m:0", group("m:0", 3, State::Forming)),
                put("evener/v1/groups/m:0", group("m:0", 4, State::Ready)),
            ],
            " /  /  / m:0@4 ready / 4 / - / 0",
        );
        check(&[put(keys::EPOCH, "12"), put(keys::LEADER, "c1")], " /  /  /  / 12 / c1 / 0");
        check(&[put(keys::LEADER, "c1"), gone(keys::LEADER)], " /  /  /  / 0 / - / 0");
    }

    #[test]
    fn what_is_not_understood_is_counted_and_changes_nothing() {
        use pb::group_record::State;
        let known = put("evener/v1/workers/w0", worker("w0"));
        let strange = [
            put("evener/v1/weather", "rain"),
            put("evener/v1/workers/w0", &b"\xff\xff"[..]),
            put("evener/v1/workers/w0", worker("w1")),
            put("evener/v1/workers/a/b", worker("a/b")),
            put("evener/v1/groups/m:0", group("m:0", 0, State::Ready)),
            put("evener/v1/groups/m:0", group("m:0", 1, State::Unspecified)),
            put("evener/v1/deployments/m", deployment("m", &[1, 0])),
            put("evener/v1/epoch", "many"),
            put("evener/v1/leader", &b"\xff"[..]),
        ];
        for event in strange {
            check(&[known.clone(), event], "w0 /  /  /  / 0 / - / 1");
        }
    }

    #[test]
    fn a_resync_forgets_what_is_no_longer_there() {
        let entry = Entry {
            key: "evener/v1/workers/w1".to_owned(),
            value: worker("w1").into(),
            mod_revision: 9,
        };
        let resync = Followed::Resync(Snapshot { entries: vec![entry], revision: 9 });
        check(&[put("evener/v1/workers/w0", worker("w0")), resync], "w1 /  /  /  / 0 / - / 0");
    }

    #[test]
    fn the_view_outlives_an_absent_registry() {
        let away = Followed::Away(Error::LeaseGone(None));
        let view = fold(fold(View::default(), &put("evener/v1/workers/w0", worker("w0"))), &away);
        assert!(view.away.is_some());
        assert_eq!(view.workers.len(), 1);
        assert_eq!(fold(view, &Followed::Back).away, None);
    }
}
