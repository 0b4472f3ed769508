//! From the supervisor's state to what others read: the directory of the request path. The status
//! page is `status.rs`.

use std::sync::Arc;

use evener_proto::ids::{Epoch, GroupId, ModelName};
use serde_json::Value;
use tokio::sync::watch;

use super::records::{Group, GroupState};
use super::state::State;
use super::{figures, status};
use crate::group::figures::Group as GroupFigures;
use crate::group::handle::{Directory, ReadyGroup};

/// The writing ends of all watches.
pub(super) struct Publisher {
    directory: watch::Sender<Arc<Directory>>,
    status: watch::Sender<Arc<Value>>,
    figures: watch::Sender<Arc<[GroupFigures]>>,
}

/// The reading ends.
pub(super) struct Publications {
    pub(super) directory: watch::Receiver<Arc<Directory>>,
    pub(super) status: watch::Receiver<Arc<Value>>,
    pub(super) figures: watch::Receiver<Arc<[GroupFigures]>>,
}

impl Publisher {
    /// With what is to be read before the supervisor has begun: whoever listens may be asked at
    /// once.
    pub(super) fn new(state: &State) -> (Self, Publications) {
        let first = directory(state);
        let (status, status_reader) = watch::channel(Arc::new(status::page(state, &first)));
        let (directory, directory_reader) = watch::channel(Arc::new(first));
        let (figures, figures_reader) = watch::channel(Arc::default());
        let readers = Publications {
            directory: directory_reader,
            status: status_reader,
            figures: figures_reader,
        };
        (Self { directory, status, figures }, readers)
    }

    /// Publishes what has changed.
    pub(super) fn publish(&mut self, state: &State) {
        let directory = directory(state);
        self.status.send_replace(Arc::new(status::page(state, &directory)));
        self.figures.send_replace(figures::groups(state).into());
        self.directory.send_if_modified(|standing| {
            let changed = !same(standing, &directory);
            if changed {
                *standing = Arc::new(directory);
            }
            changed
        });
    }
}

/// Whether readers would see no difference.
fn same(a: &Directory, b: &Directory) -> bool {
    fn groups(directory: &Directory) -> impl Iterator<Item = (&GroupId, Epoch)> {
        directory.groups.iter().map(|group| (&group.id, group.epoch))
    }
    fn models(directory: &Directory) -> impl Iterator<Item = (&ModelName, &str)> {
        directory.models.iter().map(|(name, model)| (name, model.fingerprint.as_str()))
    }
    a.missing == b.missing && groups(a).eq(groups(b)) && models(a).eq(models(b))
}

pub(super) fn directory(state: &State) -> Directory {
    let deployments = &state.view.deployments;
    let models = deployments
        .keys()
        .filter_map(|name| Some((name.clone(), Arc::clone(state.descriptions.get(name)?))))
        .collect();
    let mut directory = Directory { models, groups: Vec::new(), missing: Vec::new() };
    for record in ready_groups(state) {
        let described = directory.models.contains_key(&record.model);
        let lead = record.members.first().filter(|_| described);
        directory.groups.extend(lead.map(|lead| {
            Arc::new(ReadyGroup {
                id: record.id.clone(),
                epoch: record.epoch,
                model: record.model.clone(),
                lead_address: lead.grpc_address.clone(),
                world_size: record.members.len(),
                kv_blocks: record.kv_blocks,
                kv_block_len: record.kv_block_len,
                deterministic: record.deterministic,
            })
        }));
    }
    directory.missing = missing(state, &directory);
    directory
}

/// The epochs that serve now: this coordinator's own, or what the leader wrote down.
fn ready_groups(state: &State) -> Vec<&Group> {
    let own = state.groups.values().filter_map(|live| live.formation.as_ref());
    let own = own.filter(|formation| formation.is_ready()).map(|formation| &formation.record);
    let theirs = state.view.groups.values().filter(|record| {
        let alive = |worker| state.worker(worker).is_some();
        record.state == GroupState::Ready
            && !state.leading
            // What this coordinator follows itself it knows better, and what it saw fail too.
            && !state.groups.contains_key(&record.id)
            && !state.backoff.contains_key(&record.id)
            && record.members.iter().all(|member| alive(&member.worker))
    });
    own.chain(theirs).collect()
}

/// A sentence for each thing between now and every deployment being served.
fn missing(state: &State, directory: &Directory) -> Vec<String> {
    let view = &state.view;
    if !view.known {
        let why = view.away.as_deref().unwrap_or("no answer yet");
        return vec![format!("the registry ({}) has not been read: {why}", state.registry)];
    }
    if view.deployments.is_empty() {
        return vec!["no model is deployed".to_owned()];
    }
    let mut missing = Vec::new();
    for model in view.deployments.keys() {
        if !directory.groups.iter().any(|group| group.model == *model) {
            missing.extend(why_not(state, model));
        }
    }
    if !missing.is_empty() {
        if let Some(why) = &view.away {
            missing.push(format!("the registry is away, nothing new is placed: {why}"));
        } else if view.leader.is_none() {
            missing.push("no coordinator leads yet".to_owned());
        }
    }
    missing
}

/// Why a model is not served: all that is known.
pub(super) fn why_not(state: &State, model: &ModelName) -> Vec<String> {
    let mut why = Vec::new();
    if state.descriptions.get(model).is_none() {
        match state.descriptions.why_not(model) {
            Some(said) => why.push(format!("model {model} is not described: {said}")),
            None if state.view.workers.values().any(|w| w.models.contains_key(model)) => {
                why.push(format!("model {model} is not described yet"));
            }
            // Placement says that nobody holds it.
            None => {}
        }
    }
    let failed = |id: &GroupId| {
        let backoff = state.backoff.get(id)?;
        Some(format!("group {id} failed and is formed again: {}", backoff.why))
    };
    for (id, live) in state.groups.iter().filter(|(_, live)| live.model() == model) {
        match &live.formation {
            None => why.push(format!("group {id} takes an epoch")),
            Some(formation) if !formation.is_ready() => {
                why.extend(failed(id));
                let epoch = formation.record.epoch;
                why.push(format!("group {id} (epoch {epoch}) forms: {}", formation.sentence()));
            }
            Some(_) => {}
        }
    }
    if state.leading {
        let lacks = state.placement.missing.iter().filter(|(of, _)| of == model);
        why.extend(lacks.map(|(_, sentence)| sentence.clone()));
        let waiting = state.placement.form.iter().filter(|wanted| wanted.model == *model);
        let waiting = waiting.filter(|wanted| !state.groups.contains_key(&wanted.id));
        why.extend(waiting.filter_map(|wanted| failed(&wanted.id)));
    } else {
        for record in state.view.groups.values().filter(|record| record.model == *model) {
            let (id, epoch, is) = (&record.id, record.epoch, record.state.as_str());
            let because = if record.reason.is_empty() { "" } else { ": " };
            why.push(format!("group {id} (epoch {epoch}) is {is}{because}{}", record.reason));
        }
    }
    if why.is_empty() {
        why.push(format!("model {model} has no group yet"));
    }
    why
}
