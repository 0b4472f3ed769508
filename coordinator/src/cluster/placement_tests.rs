//! Tables for `placement.rs`: who forms a group with whom, and what is said when nobody does.

use super::*;
use crate::cluster::records::Device;

const MIB: u64 = 1 << 20;

/// `id`, or `id!` draining, with `=file` of `m` instead of `f`, `~n` MiB of memory.
fn worker(spec: &str) -> Worker {
    let (spec, memory) = match spec.split_once('~') {
        Some((spec, memory)) => (spec, Some(memory.parse::<u64>().unwrap() * MIB)),
        None => (spec, None),
    };
    let (spec, file) = spec.split_once('=').unwrap_or((spec, "f"));
    let (id, draining) = match spec.strip_suffix('!') {
        Some(id) => (id, true),
        None => (spec, false),
    };
    let held = Held {
        fingerprint: file.to_owned(),
        weight_bytes: 90 * MIB,
        n_layers: 2,
        n_kv_heads: 8,
        kv_bytes_per_token: 4096,
        context_length: 2048,
    };
    let models = match file {
        "" => BTreeMap::new(),
        _ => BTreeMap::from([(model("m"), held.clone()), (model("n"), held)]),
    };
    Worker {
        id: WorkerId::parse(id).unwrap(),
        grpc_address: format!("{id}:1"),
        collective_address: format!("{id}:2"),
        host_id: "h".to_owned(),
        device: Device { memory_bytes: memory, ..Device::default() },
        models,
        version: String::new(),
        started_unix_ms: 1,
        pid: 1,
        draining,
    }
}

fn model(name: &str) -> ModelName {
    ModelName::parse(name).unwrap()
}

/// `m`, `m*2` (replicas), `m@3` (world size), `m 2:1` (shares).
fn deployment(spec: &str) -> Deployment {
    let (spec, shares) = match spec.split_once(' ') {
        Some((spec, shares)) => (spec, shares.split(':').map(|s| s.parse().unwrap()).collect()),
        None => (spec, Vec::new()),
    };
    let (spec, replicas) = spec.split_once('*').unwrap_or((spec, "1"));
    let (name, size) = match spec.split_once('@') {
        Some((name, size)) => (name, Some(size.parse().unwrap())),
        None => (spec, None),
    };
    Deployment { model: model(name), world_size: size, shares, replicas: replicas.parse().unwrap() }
}

/// `m:0 w0,w1`: that group lives with those members and equal shares.
fn living(spec: &str) -> (GroupId, Living) {
    let (id, members) = spec.split_once(' ').unwrap();
    let member = |id: &str| (WorkerId::parse(id).unwrap(), format!("{id}:1"), 1);
    let name = id.split(':').next().unwrap();
    let group = Living {
        model: model(name),
        fingerprint: "f".to_owned(),
        members: members.split(',').map(member).collect(),
    };
    (GroupId::parse(id).unwrap(), group)
}

struct Case<'a> {
    workers: &'a [&'a str],
    deployments: &'a [&'a str],
    living: &'a [&'a str],
    shunned: &'a [&'a str],
    lingering: &'a [&'a str],
    settled_ms: u64,
}

const CASE: Case<'static> = Case {
    workers: &[],
    deployments: &["m"],
    living: &[],
    shunned: &[],
    lingering: &[],
    settled_ms: 5000,
};

impl Case<'_> {
    fn place(&self) -> Placement {
        let mut view = View::default();
        for worker in self.workers.iter().map(|spec| worker(spec)) {
            view.workers.insert(worker.id.clone(), worker);
        }
        for deployment in self.deployments.iter().map(|spec| deployment(spec)) {
            view.deployments.insert(deployment.model.clone(), deployment);
        }
        let living = self.living.iter().map(|spec| living(spec)).collect();
        let shunned = self
            .shunned
            .iter()
            .map(|id| (WorkerId::parse(id).unwrap(), "it does not answer".to_owned()))
            .collect();
        let lingering = self.lingering.iter().map(|spec| worker(spec));
        let situation = Situation {
            view: &view,
            living: &living,
            shunned: &shunned,
            lingering: &lingering.map(|worker| (worker.id.clone(), worker)).collect(),
            settled_for: Duration::from_millis(self.settled_ms),
        };
        place(&situation, &Policy::default())
    }

    /// Groups to form as `m:0 w0/1,w1/1`, groups to end as `-m:0: why`, lacks as `?why`.
    fn check(&self, expect: &[&str]) {
        let placement = self.place();
        let mut found = Vec::new();
        for (id, why) in &placement.retire {
            found.push(format!("-{id}: {why}"));
        }
        for wanted in &placement.form {
            let members: Vec<_> =
                wanted.members.iter().map(|(worker, share)| format!("{worker}/{share}")).collect();
            found.push(format!("{} {}", wanted.id, members.join(",")));
        }
        for (_, why) in &placement.missing {
            found.push(format!("?{why}"));
        }
        assert_eq!(found, expect, "{:?} of {:?}", self.deployments, self.workers);
    }
}

#[test]
fn all_workers_that_hold_the_model_form_one_group_in_natural_order() {
    Case { workers: &["w0"], ..CASE }.check(&["m:0 w0/1"]);
    Case { workers: &["w10", "w2", "w1"], ..CASE }.check(&["m:0 w1/1,w2/1,w10/1"]);
    Case { workers: &["w0", "w1="], ..CASE }.check(&["m:0 w0/1"]);
    Case { workers: &["w0", "w1", "w2"], deployments: &["m*2"], ..CASE }
        .check(&["m:0 w0/1,w1/1", "m:1 w2/1"]);
}

#[test]
fn shares_go_to_ranks_and_ranks_follow_worker_ids() {
    Case { workers: &["w1", "w0"], deployments: &["m 2:1"], ..CASE }.check(&["m:0 w0/2,w1/1"]);
    Case { workers: &["w0", "w1", "w2"], deployments: &["m@2"], ..CASE }.check(&["m:0 w0/1,w1/1"]);
    Case { workers: &["w0", "w1", "w2"], deployments: &["m@1", "n@2"], ..CASE }
        .check(&["m:0 w0/1", "n:0 w1/1,w2/1"]);
}

#[test]
fn a_lack_is_told_in_a_sentence_that_teaches() {
    CASE.check(&["?model m is held by no worker: none is registered yet"]);
    Case { workers: &["w0=", "w1="], ..CASE }
        .check(&["?model m is held by none of 2 workers; they hold: nothing"]);
    Case { workers: &["w0"], deployments: &["x"], ..CASE }
        .check(&["?model x is held by none of 1 workers; they hold: m, n"]);
    Case { workers: &["w1", "w2"], deployments: &["m@3"], ..CASE }
        .check(&["?model m wants 3 workers, 2 hold it: w1, w2"]);
    Case { workers: &["w1"], deployments: &["m 2:1"], ..CASE }
        .check(&["?model m wants 2 workers with shares 2:1, 1 holds it: w1"]);
    Case { workers: &["w1", "w2!", "w3", "w4=g"], deployments: &["m@3"], shunned: &["w3"], ..CASE }
        .check(&["?model m wants 3 workers, 4 hold it: w1, w2, w3, w4; w2 is draining; \
             w3 is not used: it does not answer; w4 holds another file under this name"]);
    Case { workers: &["w0", "w1"], deployments: &["m@1", "n@2"], ..CASE }
        .check(&["m:0 w0/1", "?model n wants 2 workers, 2 hold it: w0, w1; w0 is in group m:0"]);
    Case { workers: &["w0"], shunned: &["w0"], ..CASE }.check(&[
        "?model m wants all workers that hold it, 1 holds it: w0; w0 is not used: it does not answer",
    ]);
}

#[test]
fn a_worker_that_cannot_hold_its_share_is_passed_over_with_the_numbers() {
    Case { workers: &["w0~46", "w1"], deployments: &["m@2"], ..CASE }.check(&["m:0 w0/1,w1/1"]);
    let too_small = "w0 may use 45.0 MiB and its share 1/2 needs 45.5 MiB (45.0 MiB weights, 0.5 MiB for the KV \
                     of 256 tokens)";
    Case { workers: &["w0~45", "w1"], deployments: &["m@2"], ..CASE }
        .check(&[&format!("?model m wants 2 workers, 2 hold it: w0, w1; {too_small}")]);
    Case { workers: &["w0~45", "w1", "w2"], deployments: &["m@2"], ..CASE }
        .check(&["m:0 w1/1,w2/1"]);
    Case { workers: &["w0~31", "w1"], deployments: &["m 1:2"], ..CASE }.check(&["m:0 w0/1,w1/2"]);
    Case { workers: &["w0~45", "w1~45"], ..CASE }.check(&[&format!(
        "?model m wants all workers that hold it, 2 hold it: w0, w1; {too_small}; \
         w1 may use 45.0 MiB and its share 1/1 needs 91.0 MiB (90.0 MiB weights, 1.0 MiB for the KV of 256 tokens)"
    )]);
}

#[test]
fn a_group_of_all_waits_until_workers_have_settled_and_one_of_a_number_does_not() {
    let unsettled = Case { workers: &["w0", "w1"], settled_ms: 400, ..CASE };
    unsettled.check(&["?model m waits 600.0ms more for workers to come; 2 hold it"]);
    assert_eq!(unsettled.place().again, Some(Duration::from_millis(600)));
    Case { deployments: &["m@2"], ..unsettled }.check(&["m:0 w0/1,w1/1"]);
}

#[test]
fn a_living_group_stays_as_it_is_while_its_members_do() {
    let two = Case { workers: &["w0", "w1"], living: &["m:0 w0,w1"], ..CASE };
    two.check(&[]);
    Case { workers: &["w0", "w1", "w2"], ..two }.check(&[]);
    Case { deployments: &["m 1:1"], ..two }.check(&[]);
    Case { shunned: &["w1"], ..two }.check(&[]);
    Case { workers: &["w0"], ..two }.check(&["-m:0: worker w1 is gone", "m:0 w0/1"]);
    Case { workers: &["w0"], lingering: &["w1"], ..two }.check(&[]);
    Case { workers: &["w0"], lingering: &["w1"], ..CASE }.check(&["m:0 w0/1"]);
    Case { workers: &["w0", "w1!"], ..two }.check(&["-m:0: worker w1 is draining", "m:0 w0/1"]);
    Case { workers: &["w0", "w1="], ..two }
        .check(&["-m:0: worker w1 does not hold m any more", "m:0 w0/1"]);
    Case { workers: &["w0", "w1=g"], ..two }
        .check(&["-m:0: worker w1 holds another file as m", "m:0 w0/1"]);
    Case { deployments: &["m 2:1"], ..two }
        .check(&["-m:0: model m is now wanted as 2 workers with shares 2:1", "m:0 w0/2,w1/1"]);
    Case { deployments: &["m@1"], ..two }
        .check(&["-m:0: model m is now wanted as 1 workers", "m:0 w0/1"]);
    Case { deployments: &[], ..two }.check(&["-m:0: model m is not deployed any more"]);
    Case { living: &["m:0 w0", "m:1 w1"], ..two }.check(&["-m:1: 1 groups of model m are wanted"]);
}

#[test]
fn most_holders_decide_which_file_is_served() {
    Case { workers: &["w0=g", "w1", "w2"], ..CASE }.check(&["m:0 w1/1,w2/1"]);
    Case { workers: &["w0=g", "w1=f"], ..CASE }.check(&["m:0 w1/1"]);
}

#[test]
fn a_name_too_long_for_a_group_is_said_to_be() {
    let name = "x".repeat(evener_proto::ids::MAX_ID_LEN);
    let placement = Case { deployments: &[&name], ..CASE }.place();
    assert!(placement.missing[0].1.contains("cannot be served under this name"));
}
