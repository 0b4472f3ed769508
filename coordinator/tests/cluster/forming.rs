//! The supervisor among scripted workers: groups are formed, followed, retired, formed again, and
//! taken over.

use std::sync::Arc;
use std::time::Duration;

use evener_coordinator::cluster;
use evener_coordinator::config::Place;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::rig::{Kind, Rig};
use crate::support::{Coordinator, MODEL, deployment, options, until};
use crate::worker::{Call, Manner, ScriptedWorker};

fn joins(worker: &ScriptedWorker) -> Vec<u64> {
    let epoch = |call: Call| match call {
        Call::Join { epoch, .. } => Some(epoch),
        Call::Leave { .. } => None,
    };
    worker.calls().into_iter().filter_map(epoch).collect()
}

#[tokio::test]
async fn workers_that_hold_a_deployed_model_form_a_group_in_the_order_of_their_ids() {
    let mut coordinator = Coordinator::embedded(vec![deployment(Some(2), &[2, 1])]).await;
    coordinator.missing("none is registered yet").await;
    let registry = coordinator.registry();
    let mut w1 = ScriptedWorker::start("w1", &registry).await;
    coordinator.missing("wants 2 workers with shares 2:1, 1 holds it: w1").await;
    let w0 = ScriptedWorker::start("w0", &registry).await;
    let group = coordinator.ready("a group of both", |group| group.world_size == 2).await;
    assert_eq!(group.id.as_str(), "tiny:0");
    assert_eq!(group.lead_address, w0.address.to_string());
    assert_eq!((group.kv_blocks, group.kv_block_len, group.deterministic), (10, 16, true));
    let call = w1.called("a join", |call| matches!(call, Call::Join { .. })).await;
    let Call::Join { epoch, rank, members, shares, token } = call else { unreachable!() };
    assert_eq!((epoch, rank), (group.epoch.get(), 1));
    assert_eq!(members, ["w0", "w1"]);
    assert_eq!(shares, [2, 1]);
    assert_eq!(token.len(), 32);
    let directory = coordinator.directory.borrow().clone();
    assert!(directory.missing.is_empty(), "{:?}", directory.missing);
    let model = directory.models.values().next().unwrap();
    assert_eq!((model.name.as_str(), model.context_length), (MODEL, 512));
}

#[tokio::test]
async fn the_status_page_can_be_read_before_the_supervisor_has_begun() {
    let listen = "127.0.0.1:0".parse().unwrap();
    let options = options(Place::Embedded { listen });
    // On the one thread of this test no task has run when this returns.
    let handles = cluster::start(options, CancellationToken::new()).await.unwrap();
    let page = handles.status.borrow().clone();
    assert_eq!((&page["ready"], &page["leading"]), (&false.into(), &false.into()), "{page:#}");
    assert_eq!((&page["workers"], &page["groups"]), (&json!([]), &json!([])));
    assert_eq!(page["missing"], json!(handles.directory.borrow().missing));
    assert!(page["missing"][0].as_str().unwrap().contains("has not been read"), "{page:#}");
}

#[tokio::test]
async fn progress_of_each_rank_is_told_while_a_group_forms() {
    let mut coordinator = Coordinator::embedded(vec![deployment(None, &[])]).await;
    let registry = coordinator.registry();
    let worker = ScriptedWorker::start_as("w0", &registry, Manner::Stuck).await;
    coordinator.missing("(epoch 1) forms: w0 loading 1.0 of 2.0 MiB").await;
    let member = until("progress on the status page", &mut coordinator.status, |page| {
        let member = &page["groups"][0]["members"][0];
        (member["stage"] == "loading").then(|| member.clone())
    })
    .await;
    assert_eq!(
        (&member["bytes_done"], &member["bytes_total"]),
        (&(1 << 20).into(), &(2 << 20).into())
    );
    assert_eq!(joins(&worker), [1]);
}

#[tokio::test]
async fn the_status_page_tells_of_workers_groups_deployments_and_registry() {
    let mut coordinator = Coordinator::embedded(vec![deployment(Some(2), &[3, 1])]).await;
    let registry = coordinator.registry();
    let _w0 = ScriptedWorker::start("w0", &registry).await;
    let w1 = ScriptedWorker::start("w1", &registry).await;
    let page = until("a ready page with loads", &mut coordinator.status, |page| {
        let serving = page["workers"].as_array()?.iter().filter(|w| w["state"] == "serving");
        (page["ready"] == true && serving.count() == 2).then(|| page.clone())
    })
    .await;
    let worker = &page["workers"][1];
    assert_eq!(worker["id"], "w1");
    assert_eq!(worker["address"], w1.address.to_string());
    assert_eq!((&worker["rank"], &worker["share"]), (&1.into(), &1.into()));
    assert_eq!(
        (&worker["resident_weight_bytes"], &worker["rss_bytes"]),
        (&500.into(), &4096.into())
    );
    assert_eq!(worker["load_ms"], 70);
    assert_eq!((&worker["shard"], &worker["device"]["kind"]), (&"heads".into(), &"cpu".into()));
    let group = &page["groups"][0];
    assert_eq!(
        (&group["state"], &group["lead"], &group["kv_tokens"]),
        (&"ready".into(), &"w0".into(), &160.into())
    );
    assert_eq!(group["members"][0]["links"], serde_json::json!(["local", "local"]));
    assert_eq!(page["deployments"][0]["ready_groups"], 1);
    assert_eq!(page["registry"]["kind"], "embedded");
    assert_eq!(page["registry"]["healthy"], true);
    assert_eq!(page["leader"], page["coordinator"]);
}

#[tokio::test]
async fn a_refused_join_is_told_and_tried_again_under_a_new_epoch() {
    let mut coordinator = Coordinator::embedded(vec![deployment(Some(2), &[])]).await;
    let registry = coordinator.registry();
    let mut w0 = ScriptedWorker::start("w0", &registry).await;
    let w1 = ScriptedWorker::start_as("w1", &registry, Manner::Refuse).await;
    coordinator.missing("rank 1 (w1): not enough memory").await;
    w0.called("to leave what could not be formed", |call| *call == Call::Leave { epoch: 1 }).await;
    w1.set_manner(Manner::Ready);
    let group = coordinator.ready("the group after all", |_| true).await;
    assert!(group.epoch.get() > 1);
    let epochs = joins(&w0);
    assert!(epochs.is_sorted_by(|a, b| a < b), "an epoch was used twice: {epochs:?}");
}

#[tokio::test]
async fn a_group_whose_stream_breaks_is_retired_and_formed_again() {
    let mut coordinator = Coordinator::embedded(vec![deployment(None, &[])]).await;
    let registry = coordinator.registry();
    let mut w0 = ScriptedWorker::start("w0", &registry).await;
    let mut w1 = ScriptedWorker::start("w1", &registry).await;
    let first = coordinator.ready("a group of both", |group| group.world_size == 2).await;
    w1.fail_epoch("a step missed its deadline");
    let epoch = first.epoch.get();
    w0.called("to leave", |call| *call == Call::Leave { epoch }).await;
    w1.called("to leave", |call| *call == Call::Leave { epoch }).await;
    let second = coordinator.ready("the next epoch", |group| group.epoch > first.epoch).await;
    assert_eq!((second.world_size, &second.id), (2, &first.id));
}

#[tokio::test]
async fn survivors_of_a_killed_worker_form_the_group_again_without_it() {
    let mut coordinator = Coordinator::embedded(vec![deployment(None, &[])]).await;
    let registry = coordinator.registry();
    let w0 = ScriptedWorker::start("w0", &registry).await;
    let mut w1 = ScriptedWorker::start("w1", &registry).await;
    let first = coordinator.ready("a group of both", |group| group.world_size == 2).await;
    let killed = std::time::Instant::now();
    w1.kill();
    let second = coordinator.ready("a group of one", |group| group.world_size == 1).await;
    assert!(second.epoch > first.epoch);
    assert_eq!(second.lead_address, w0.address.to_string());
    assert!(
        killed.elapsed() < std::time::Duration::from_secs(2),
        "the closed socket tells, not the lease"
    );
}

#[tokio::test]
async fn a_group_of_a_fixed_size_waits_for_its_worker_to_come_back() {
    let mut coordinator = Coordinator::embedded(vec![deployment(Some(2), &[])]).await;
    let registry = coordinator.registry();
    let _w0 = ScriptedWorker::start("w0", &registry).await;
    let mut w1 = ScriptedWorker::start("w1", &registry).await;
    let first = coordinator.ready("a group of both", |_| true).await;
    w1.kill();
    coordinator.missing("w1 is not used").await;
    coordinator.missing("wants 2 workers, 1 holds it: w0").await;
    assert!(coordinator.directory.borrow().groups.is_empty());
    let w1 = ScriptedWorker::start("w1", &registry).await;
    let second = coordinator.ready("a group of both again", |_| true).await;
    assert!(second.epoch > first.epoch && second.world_size == 2);
    assert_eq!(joins(&w1), [second.epoch.get()]);
}

#[tokio::test]
async fn a_worker_whose_registration_ends_leaves_its_group() {
    let mut coordinator = Coordinator::embedded(vec![deployment(None, &[])]).await;
    let registry = coordinator.registry();
    let _w0 = ScriptedWorker::start("w0", &registry).await;
    let mut w1 = ScriptedWorker::start("w1", &registry).await;
    let first = coordinator.ready("a group of both", |group| group.world_size == 2).await;
    w1.unregister();
    coordinator.ready("a group of one", |group| group.world_size == 1).await;
    let epoch = first.epoch.get();
    w1.called("to leave", |call| *call == Call::Leave { epoch }).await;
}

#[tokio::test]
async fn a_frozen_worker_is_noticed_and_left_out() {
    let mut coordinator = Coordinator::embedded(vec![deployment(None, &[])]).await;
    let registry = coordinator.registry();
    let w0 = ScriptedWorker::start("w0", &registry).await;
    let w1 = ScriptedWorker::start("w1", &registry).await;
    let first = coordinator.ready("a group of both", |group| group.world_size == 2).await;
    let frozen = w1.freeze();
    coordinator.missing("rank 1 (w1): ").await;
    let second = coordinator.ready("a group of one", |group| group.world_size == 1).await;
    assert!(second.epoch > first.epoch);
    assert_eq!(second.lead_address, w0.address.to_string());
    drop(frozen);
}

#[tokio::test]
async fn a_worker_that_never_answers_is_left_out() {
    let mut coordinator = Coordinator::embedded(vec![deployment(None, &[])]).await;
    let registry = coordinator.registry();
    let _w0 = ScriptedWorker::start_as("w0", &registry, Manner::Mute).await;
    let mut w1 = ScriptedWorker::start("w1", &registry).await;
    w1.called("a first try with both", |call| matches!(call, Call::Join { rank: 1, .. })).await;
    let group = coordinator.ready("a group of one", |group| group.world_size == 1).await;
    assert_eq!(group.lead_address, w1.address.to_string());
}

/// Two coordinators at one registry: the first leads and has formed a group, which the second
/// knows.
async fn two_coordinators(kind: Kind) -> (Rig, Coordinator, Coordinator, ScriptedWorker) {
    let rig = Rig::start(kind).await;
    let url = rig.url();
    let options = || {
        let mut options = options(Place::parse(&url).unwrap());
        options.deployments = vec![deployment(None, &[])];
        options
    };
    let mut first = Coordinator::start(options()).await;
    until("the first leads", &mut first.status, |page| (page["leading"] == true).then_some(()))
        .await;
    let mut second = Coordinator::start(options()).await;
    let at = "127.0.0.1:0".parse().unwrap();
    let worker = ScriptedWorker::start_at("w0", &url, Manner::Ready, at).await;
    let led = first.ready("the leader's group", |_| true).await;
    let followed = second.ready("the follower's group", |_| true).await;
    assert_eq!((followed.epoch, &followed.lead_address), (led.epoch, &led.lead_address));
    assert_eq!(second.status.borrow()["leading"], false);
    assert_eq!(joins(&worker).len(), 1, "only the leader joins");
    (rig, first, second, worker)
}

async fn the_next_leader_takes_over_living_groups_under_their_epoch(kind: Kind) {
    let (_rig, mut first, mut second, mut worker) = two_coordinators(kind).await;
    let group = second.ready("the group", |_| true).await;
    // From here on the follower's directory must never be without the group.
    let mut directory = second.directory.clone();
    directory.mark_unchanged();
    first.kill();
    let epoch = group.epoch.get();
    let attached = |call: &Call| matches!(call, Call::Join { epoch: e, token, .. } if *e == epoch && token.is_empty());
    worker.called("to attach", attached).await;
    until("the second leads", &mut second.status, |page| (page["leading"] == true).then_some(()))
        .await;
    assert!(!directory.has_changed().unwrap(), "{:?}", *directory.borrow());
    worker.fail_epoch("lost");
    let next = second.ready("the next epoch", |next| next.epoch > group.epoch).await;
    assert_eq!(next.id, group.id);
    let left: Vec<Call> =
        worker.calls().into_iter().filter(|call| *call == Call::Leave { epoch }).collect();
    assert_eq!(left.len(), 1, "only after it was lost");
}

#[tokio::test]
async fn the_next_leader_takes_over_living_groups_under_their_epoch_embedded() {
    the_next_leader_takes_over_living_groups_under_their_epoch(Kind::EmbeddedGrpc).await;
}

#[tokio::test]
async fn the_next_leader_takes_over_living_groups_under_their_epoch_etcd() {
    the_next_leader_takes_over_living_groups_under_their_epoch(Kind::Etcd).await;
}

#[tokio::test]
async fn without_its_registry_a_coordinator_serves_on_and_places_nothing_new() {
    let rig = Rig::start(Kind::Etcd).await;
    let proxy = rig.proxy().await;
    let mut options = options(Place::parse(&rig.url_at(proxy.address)).unwrap());
    options.deployments = vec![deployment(None, &[])];
    let mut coordinator = Coordinator::start(options).await;
    let at = "127.0.0.1:0".parse().unwrap();
    let worker = ScriptedWorker::start_at("w0", &rig.url(), Manner::Ready, at).await;
    let first = coordinator.ready("a group", |_| true).await;
    proxy.cut();
    // Longer than its own lease.
    until("it no longer leads", &mut coordinator.status, |page| {
        (page["registry"]["healthy"] == false && page["leading"] == false).then_some(())
    })
    .await;
    let directory = coordinator.directory.borrow().clone();
    assert_eq!(directory.groups[0].epoch, first.epoch, "it serves on");
    assert!(directory.missing.is_empty());
    worker.fail_epoch("lost");
    coordinator.missing("the registry is away, nothing new is placed").await;
    assert!(coordinator.directory.borrow().groups.is_empty());
    assert_eq!(joins(&worker), [first.epoch.get()]);
    proxy.mend();
    coordinator.ready("the next epoch", |group| group.epoch > first.epoch).await;
}

#[tokio::test]
async fn epochs_go_on_from_what_workers_serve_when_an_embedded_registry_starts_anew() {
    let mut coordinator = Coordinator::embedded(vec![deployment(None, &[])]).await;
    let listen = coordinator.handles.registry_address.unwrap();
    let worker = ScriptedWorker::start("w0", &listen.to_string()).await;
    let first = coordinator.ready("a group", |_| true).await;
    worker.fail_epoch("lost");
    let second = coordinator.ready("the next epoch", |group| group.epoch > first.epoch).await;
    coordinator.kill();
    let mut options = options(Place::Embedded { listen });
    options.deployments = vec![deployment(None, &[])];
    let mut coordinator = Coordinator::start_when_free(options).await;
    let third = coordinator.ready("a group again", |_| true).await;
    assert!(third.epoch > second.epoch, "{} after {}", third.epoch, second.epoch);
    assert_eq!(joins(&worker), [1, 2, 3]);
}

#[tokio::test]
async fn a_lost_lease_costs_a_group_its_member_only_if_the_worker_stays_away() {
    let rig = Rig::start(Kind::EmbeddedGrpc).await;
    let proxy = rig.proxy().await;
    let mut options = options(Place::parse(&rig.url()).unwrap());
    options.deployments = vec![deployment(None, &[])];
    options.supervisor.linger = Duration::from_secs(4);
    let mut coordinator = Coordinator::start(options).await;
    let at = "127.0.0.1:0".parse().unwrap();
    let _w0 = ScriptedWorker::start_at("w0", &rig.url(), Manner::Ready, at).await;
    let url = rig.url_at(proxy.address);
    let mut w1 = ScriptedWorker::start_at("w1", &url, Manner::Ready, at).await;
    let first = coordinator.ready("a group of both", |group| group.world_size == 2).await;
    let listed =
        |n: usize| move |page: &Arc<Value>| (page["workers"].as_array()?.len() == n).then_some(());
    proxy.cut();
    until("its lease to end", &mut coordinator.status, listed(1)).await;
    proxy.mend();
    until("it to register again", &mut coordinator.status, listed(2)).await;
    assert_eq!(coordinator.directory.borrow().groups[0].epoch, first.epoch, "nothing was lost");
    assert_eq!(joins(&w1), [first.epoch.get()]);
    proxy.cut();
    let second = coordinator.ready("a group of one", |group| group.world_size == 1).await;
    assert!(second.epoch > first.epoch);
    let epoch = first.epoch.get();
    w1.called("to leave", |call| *call == Call::Leave { epoch }).await;
}

#[tokio::test]
async fn what_cannot_be_is_refused_at_start_in_a_sentence() {
    let listen = "127.0.0.1:0".parse().unwrap();
    let mut bad_shares = options(Place::Embedded { listen });
    bad_shares.deployments = vec![deployment(Some(3), &[2, 1])];
    let error = cluster::start(bad_shares, CancellationToken::new()).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "the deployment of tiny cannot be: deployment has shares [2, 1] for a world size of 3; \
         give one share for each rank, or none"
    );
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = taken.local_addr().unwrap();
    let in_use = options(Place::Embedded { listen });
    let error = cluster::start(in_use, CancellationToken::new()).await.unwrap_err();
    assert!(error.to_string().starts_with(&format!("cannot listen on {listen}")), "{error}");
}
