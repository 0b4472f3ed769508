//! Which workers should form which groups, or why they cannot. Pure.
//!
//! A living group stays as it is while its members do; everything else is decided anew each time.
//! The supervisor acts on what is returned here, and people read the sentences.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use evener_proto::activations::Activations;
use evener_proto::ids::{GroupId, ModelName, WorkerId};
use evener_proto::kv_format::KvFormat;

use super::membership::View;
use super::records::{Deployment, Held, Worker};

/// What placement keeps to.
#[derive(Debug, Clone)]
pub struct Policy {
    /// A group of "all workers" is formed when no worker has come for this long.
    pub settle: Duration,
    /// Tokens of KV a rank must be able to hold beside its weights.
    pub min_kv_tokens: u32,
    /// How the groups' ranks keep keys and values.
    pub kv_format: KvFormat,
    /// How finely the groups' processors round what they multiply weights with.
    pub activations: Activations,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            settle: Duration::from_secs(1),
            min_kv_tokens: 256,
            kv_format: KvFormat::default(),
            activations: Activations::default(),
        }
    }
}

/// A group as it lives now, ready or on its way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Living {
    pub model: ModelName,
    pub fingerprint: String,
    /// By rank: worker, gRPC address, share.
    pub members: Vec<(WorkerId, String, u32)>,
}

/// What is decided on.
#[derive(Debug, Clone)]
pub struct Situation<'a> {
    pub view: &'a View,
    pub living: &'a BTreeMap<GroupId, Living>,
    /// Workers that are registered and still not to be used, and why.
    pub shunned: &'a BTreeMap<WorkerId, String>,
    /// Workers whose lease ended a moment ago: they may be back under it soon, so their groups live
    /// on.
    pub lingering: &'a BTreeMap<WorkerId, Worker>,
    /// Since a worker last came.
    pub settled_for: Duration,
}

/// A group to form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    pub id: GroupId,
    pub model: ModelName,
    pub fingerprint: String,
    /// By rank: worker and share.
    pub members: Vec<(WorkerId, u32)>,
}

/// What should be done now.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Placement {
    /// Living groups that must end, and why.
    pub retire: Vec<(GroupId, String)>,
    pub form: Vec<Wanted>,
    /// Why a deployment has not all its groups, a sentence each.
    pub missing: Vec<(ModelName, String)>,
    /// Look again after this long, even if nothing happens.
    pub again: Option<Duration>,
}

/// Compares the situation with what people asked for.
#[must_use]
pub fn place(situation: &Situation<'_>, policy: &Policy) -> Placement {
    let Situation { view, living, .. } = *situation;
    let mut placement = Placement::default();
    let mut taken: BTreeMap<&WorkerId, &GroupId> = BTreeMap::new();
    let mut kept: BTreeSet<&GroupId> = BTreeSet::new();
    for (id, group) in living {
        match must_end(id, group, situation) {
            Some(reason) => placement.retire.push((id.clone(), reason)),
            None => {
                kept.insert(id);
                taken.extend(group.members.iter().map(|(worker, ..)| (worker, id)));
            }
        }
    }
    let mut chosen: BTreeMap<WorkerId, GroupId> =
        taken.into_iter().map(|(worker, group)| (worker.clone(), group.clone())).collect();
    for deployment in view.deployments.values() {
        for replica in 0..deployment.replicas {
            let id = match group_id(&deployment.model, replica) {
                Ok(id) => id,
                Err(why) => {
                    placement.missing.push((deployment.model.clone(), why));
                    break;
                }
            };
            if kept.contains(&id) {
                continue;
            }
            let unplaced = deployment.replicas - replica;
            let search = Search { situation, policy, chosen: &chosen };
            match search.members(deployment, unplaced) {
                Ok((fingerprint, members)) => {
                    chosen.extend(members.iter().map(|(worker, _)| (worker.clone(), id.clone())));
                    let model = deployment.model.clone();
                    placement.form.push(Wanted { id, model, fingerprint, members });
                }
                Err(Lack { why, again }) => {
                    placement.missing.push((deployment.model.clone(), why));
                    placement.again = placement.again.into_iter().chain(again).min();
                    break;
                }
            }
        }
    }
    placement
}

/// The id of a model's `replica`th group.
///
/// # Errors
/// A sentence: the model's name is too long.
pub fn group_id(model: &ModelName, replica: u32) -> Result<GroupId, String> {
    GroupId::parse(&format!("{model}:{replica}"))
        .map_err(|error| format!("model {model} cannot be served under this name: {error}"))
}

/// Why a living group cannot stay as it is.
fn must_end(id: &GroupId, group: &Living, situation: &Situation<'_>) -> Option<String> {
    let Situation { view, lingering, .. } = *situation;
    let model = &group.model;
    let Some(deployment) = view.deployments.get(model) else {
        return Some(format!("model {model} is not deployed any more"));
    };
    let wanted = (0..deployment.replicas).any(|n| group_id(model, n).as_ref() == Ok(id));
    if !wanted {
        return Some(format!("{} groups of model {model} are wanted", deployment.replicas));
    }
    let shares: Vec<u32> = group.members.iter().map(|&(_, _, share)| share).collect();
    let n = u32::try_from(shares.len()).unwrap_or(u32::MAX);
    if deployment.world_size.is_some_and(|wanted| wanted != n)
        || (!deployment.shares.is_empty() && deployment.shares != shares)
    {
        return Some(format!("model {model} is now wanted as {}", shape(deployment)));
    }
    for (worker, address, _) in &group.members {
        let Some(record) = view.workers.get(worker).or_else(|| lingering.get(worker)) else {
            return Some(format!("worker {worker} is gone"));
        };
        if record.grpc_address != *address {
            return Some(format!("worker {worker} came back at {}", record.grpc_address));
        }
        if record.draining {
            return Some(format!("worker {worker} is draining"));
        }
        match record.models.get(model) {
            None => return Some(format!("worker {worker} does not hold {model} any more")),
            Some(held) if held.fingerprint != group.fingerprint => {
                return Some(format!("worker {worker} holds another file as {model}"));
            }
            Some(_) => {}
        }
    }
    None
}

fn shape(deployment: &Deployment) -> String {
    match (deployment.world_size, deployment.shares.as_slice()) {
        (None, []) => "all workers that hold it".to_owned(),
        (Some(n), []) => format!("{n} workers"),
        (_, shares) => {
            let shares: Vec<_> = shares.iter().map(ToString::to_string).collect();
            format!("{} workers with shares {}", shares.len(), shares.join(":"))
        }
    }
}

/// Why no group can be formed now.
struct Lack {
    why: String,
    again: Option<Duration>,
}

/// The search for one group's members.
struct Search<'a> {
    situation: &'a Situation<'a>,
    policy: &'a Policy,
    chosen: &'a BTreeMap<WorkerId, GroupId>,
}

type Members = (String, Vec<(WorkerId, u32)>);

impl Search<'_> {
    /// Members by rank for one of `unplaced` groups still to be formed.
    fn members(&self, deployment: &Deployment, unplaced: u32) -> Result<Members, Lack> {
        let model = &deployment.model;
        let lack = |why| Lack { why, again: None };
        let Some((fingerprint, holders)) = self.holders(model) else {
            return Err(lack(self.nobody_holds(model)));
        };
        let mut obstacles = Vec::new();
        let mut free: Vec<(&Worker, &Held)> = Vec::new();
        for &(worker, held) in &holders {
            match self.obstacle(worker, held, &fingerprint) {
                None => free.push((worker, held)),
                Some(obstacle) => obstacles.push(obstacle),
            }
        }
        free.sort_by_cached_key(|(worker, _)| natural(worker.id.as_str()));
        let n_shares = (!deployment.shares.is_empty()).then_some(deployment.shares.len());
        let exact = n_shares.or(deployment.world_size.map(|n| n as usize));
        loop {
            let n = exact.unwrap_or_else(|| free.len().div_ceil(unplaced as usize));
            if n == 0 || free.len() < n {
                let why = self.too_few(deployment, &holders, &obstacles);
                return Err(lack(why));
            }
            let shares = match deployment.shares.as_slice() {
                [] => vec![1; n],
                shares => shares.to_vec(),
            };
            // A worker that cannot hold its share makes room for the next, if there is one.
            match self.first_too_small(&free[..n], &shares) {
                Some((idx, sentence)) => {
                    obstacles.push(sentence);
                    free.remove(idx);
                }
                None => {
                    if exact.is_none() && self.situation.settled_for < self.policy.settle {
                        let again = self.policy.settle - self.situation.settled_for;
                        let why = format!(
                            "model {model} waits {again:.1?} more for workers to come; {n} hold it"
                        );
                        return Err(Lack { why, again: Some(again) });
                    }
                    let ids = free[..n].iter().map(|(worker, _)| worker.id.clone());
                    return Ok((fingerprint, ids.zip(shares).collect()));
                }
            }
        }
    }

    /// Everyone who holds the model, and the fingerprint most of them hold.
    fn holders(&self, model: &ModelName) -> Option<(String, Vec<(&Worker, &Held)>)> {
        let holders: Vec<(&Worker, &Held)> = self
            .situation
            .view
            .workers
            .values()
            .filter_map(|worker| worker.models.get(model).map(|held| (worker, held)))
            .collect();
        Some((fingerprint(self.situation.view, model)?, holders))
    }

    /// What keeps a holder from being used.
    fn obstacle(&self, worker: &Worker, held: &Held, fingerprint: &str) -> Option<String> {
        let id = &worker.id;
        if let Some(group) = self.chosen.get(id) {
            return Some(format!("{id} is in group {group}"));
        }
        if let Some(why) = self.situation.shunned.get(id) {
            return Some(format!("{id} is not used: {why}"));
        }
        if worker.draining {
            return Some(format!("{id} is draining"));
        }
        if held.fingerprint != fingerprint {
            return Some(format!("{id} holds another file under this name"));
        }
        None
    }

    fn first_too_small(
        &self,
        free: &[(&Worker, &Held)],
        shares: &[u32],
    ) -> Option<(usize, String)> {
        let total: u128 = shares.iter().map(|&share| u128::from(share)).sum();
        for (idx, (&(worker, held), &share)) in free.iter().zip(shares).enumerate() {
            let Some(memory) = worker.device.memory_bytes else { continue };
            let of_share = |bytes: u128| bytes * u128::from(share) / total;
            let weights = of_share(u128::from(held.weight_bytes));
            let tokens = self.policy.min_kv_tokens.min(held.context_length.max(1));
            let n_heads = u64::from(held.n_layers) * u64::from(held.n_kv_heads);
            let per_token = self.policy.kv_format.bytes_per_token(held.kv_bytes_per_token, n_heads);
            let kv = of_share(u128::from(per_token) * u128::from(tokens));
            if weights + kv > u128::from(memory) {
                let sentence = format!(
                    "{} may use {} and its share {share}/{total} needs {} ({} weights, {} for the KV of \
                     {tokens} tokens)",
                    worker.id,
                    mib(u128::from(memory)),
                    mib(weights + kv),
                    mib(weights),
                    mib(kv),
                );
                return Some((idx, sentence));
            }
        }
        None
    }

    fn nobody_holds(&self, model: &ModelName) -> String {
        let view = self.situation.view;
        if view.workers.is_empty() {
            return format!("model {model} is held by no worker: none is registered yet");
        }
        let held: BTreeSet<&str> =
            view.workers.values().flat_map(|w| w.models.keys()).map(ModelName::as_str).collect();
        let held: Vec<&str> = held.into_iter().collect();
        let n = view.workers.len();
        format!(
            "model {model} is held by none of {n} workers; they hold: {}",
            if held.is_empty() { "nothing".to_owned() } else { held.join(", ") }
        )
    }

    fn too_few(
        &self,
        deployment: &Deployment,
        holders: &[(&Worker, &Held)],
        obstacles: &[String],
    ) -> String {
        let mut ids: Vec<&str> = holders.iter().map(|(worker, _)| worker.id.as_str()).collect();
        ids.sort_by_cached_key(|id| natural(id));
        let n = ids.len();
        let mut why = format!(
            "model {} wants {}, {n} {} it: {}",
            deployment.model,
            shape(deployment),
            if n == 1 { "holds" } else { "hold" },
            ids.join(", "),
        );
        for obstacle in obstacles {
            why.push_str("; ");
            why.push_str(obstacle);
        }
        why
    }
}

/// The fingerprint under which most workers hold a model; all of a group must hold the same.
#[must_use]
pub fn fingerprint(view: &View, model: &ModelName) -> Option<String> {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for held in view.workers.values().filter_map(|worker| worker.models.get(model)) {
        *counts.entry(&held.fingerprint).or_default() += 1;
    }
    let most = counts.into_iter().max_by_key(|&(text, n)| (n, Reverse(text)));
    most.map(|(text, _)| text.to_owned())
}

fn mib(bytes: u128) -> String {
    // Exact enough for people up to 2^53 bytes.
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// A sort key under which `w2` comes before `w10`.
fn natural(text: &str) -> Vec<(u64, String)> {
    let mut runs: Vec<(u64, String)> = Vec::new();
    let mut chars = text.chars().peekable();
    while let Some(&c) = chars.peek() {
        let digits = c.is_ascii_digit();
        let mut run = String::new();
        while let Some(c) = chars.next_if(|c| c.is_ascii_digit() == digits) {
            run.push(c);
        }
        // Numbers come before words; a number too large to be one counts as the largest.
        let number = if digits { run.parse().unwrap_or(u64::MAX - 1) } else { u64::MAX };
        runs.push((number, run));
    }
    runs
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
#[path = "placement_tests.rs"]
mod tests;
