//! One suite for the registry contract, run on each registry.

use std::collections::BTreeSet;
use std::time::Duration;

use evener_coordinator::cluster::registry::{
    Change, Error, FollowOptions, Followed, Follower, Put, Registry,
};
use evener_proto::registry::{LoadReport, WorkerRecord};
use evener_proto::{Message, keys};
use futures::StreamExt;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::rig::{Kind, Rig};
use crate::support::DEADLINE;
use crate::worker::registration;

macro_rules! on_each {
    ($($kind:ident as $module:ident: $($property:ident),+;)+) => {
        $(mod $module {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
                async fn $property() {
                    super::$property(super::Rig::start(super::Kind::$kind).await).await;
                }
            )+
        })+
    };
}

on_each! {
    Embedded as embedded:
        a_key_is_put_and_deleted_only_where_its_condition_holds,
        a_prefix_is_read_whole_in_order_and_alone,
        keys_end_with_their_lease,
        a_watch_tells_every_change_in_order_from_its_revision_on,
        a_watch_from_a_compacted_revision_says_so,
        each_epoch_is_taken_once;
    EmbeddedGrpc as embedded_over_grpc:
        a_key_is_put_and_deleted_only_where_its_condition_holds,
        a_prefix_is_read_whole_in_order_and_alone,
        keys_end_with_their_lease,
        a_watch_tells_every_change_in_order_from_its_revision_on,
        a_watch_from_a_compacted_revision_says_so,
        each_epoch_is_taken_once,
        a_follower_resumes_after_a_restart_and_misses_nothing,
        a_follower_reads_anew_after_compaction,
        a_follower_reads_anew_when_the_registry_lost_its_data,
        a_worker_is_registered_with_its_load_until_it_ends,
        a_worker_whose_lease_was_lost_registers_again_under_its_name;
    Etcd as etcd:
        a_key_is_put_and_deleted_only_where_its_condition_holds,
        a_prefix_is_read_whole_in_order_and_alone,
        keys_end_with_their_lease,
        a_watch_tells_every_change_in_order_from_its_revision_on,
        a_watch_from_a_compacted_revision_says_so,
        each_epoch_is_taken_once,
        a_follower_resumes_after_a_restart_and_misses_nothing,
        a_follower_reads_anew_after_compaction,
        a_follower_reads_anew_when_the_registry_lost_its_data,
        a_worker_is_registered_with_its_load_until_it_ends,
        a_worker_whose_lease_was_lost_registers_again_under_its_name;
}

async fn put(registry: &Registry, key: &str, value: &str) -> i64 {
    registry.put(Put::new(key, value.to_owned())).await.unwrap().unwrap()
}

/// `key=value` of everything under a prefix.
async fn read(registry: &Registry, prefix: &str) -> Vec<String> {
    let entries = registry.get(prefix).await.unwrap().entries;
    let text = |value: &[u8]| String::from_utf8_lossy(value).into_owned();
    entries.iter().map(|entry| format!("{}={}", entry.key, text(&entry.value))).collect()
}

/// Waits until a prefix reads as `expect`.
async fn reads(registry: &Registry, prefix: &str, expect: &[&str]) {
    let same = async {
        while read(registry, prefix).await != expect {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    if tokio::time::timeout(DEADLINE, same).await.is_err() {
        panic!("{prefix} still reads {:?}, not {expect:?}", read(registry, prefix).await);
    }
}

async fn a_key_is_put_and_deleted_only_where_its_condition_holds(rig: Rig) {
    let registry = rig.client();
    let absent = Put::new("k", "1").only_at(0);
    let first = registry.put(absent.clone()).await.unwrap().expect("it was absent");
    assert_eq!(registry.put(absent).await, Ok(None), "it is there now");
    let second = registry.put(Put::new("k", "2").only_at(first)).await.unwrap();
    let second = second.expect("it stood at its first revision");
    assert!(second > first);
    assert_eq!(registry.put(Put::new("k", "3").only_at(first)).await, Ok(None));
    assert_eq!(read(&registry, "k").await, ["k=2"]);
    assert_eq!(registry.get("k").await.unwrap().entries[0].mod_revision, second);
    assert_eq!(registry.delete("k", Some(first)).await, Ok(false));
    assert_eq!(registry.delete("k", Some(second)).await, Ok(true));
    assert_eq!(registry.delete("k", None).await, Ok(true), "absent is fine");
    assert!(read(&registry, "k").await.is_empty());
}

async fn a_prefix_is_read_whole_in_order_and_alone(rig: Rig) {
    let registry = rig.client();
    for key in ["a/2", "a/10", "b/1", "a", "a0", "a/1"] {
        put(&registry, key, "v").await;
    }
    assert_eq!(read(&registry, "a/").await, ["a/1=v", "a/10=v", "a/2=v"]);
    assert_eq!(registry.get("").await.unwrap().entries.len(), 6);
    let before = registry.get("zzz").await.unwrap();
    assert!(before.entries.is_empty());
    let next = put(&registry, "b/2", "v").await;
    assert_eq!(next, before.revision + 1, "revisions count every change");
}

async fn keys_end_with_their_lease(rig: Rig) {
    let registry = rig.client();
    let mut follower = registry.follow("l/", FollowOptions::default());
    assert!(matches!(follower_says(&mut follower).await, Followed::Resync(_)));
    let (kept, dropped) = (registry.grant(2).await.unwrap(), registry.grant(2).await.unwrap());
    registry.put(Put::new("l/kept", "v").leased(kept.id)).await.unwrap();
    registry.put(Put::new("l/a", "v").leased(dropped.id)).await.unwrap();
    registry.put(Put::new("l/b", "v").leased(dropped.id)).await.unwrap();
    let keeping = tokio::spawn({
        let registry = registry.clone();
        async move {
            loop {
                registry.keep_alive(kept.id).await.unwrap();
                tokio::time::sleep(Duration::from_millis(300)).await;
            }
        }
    });
    reads(&registry, "l/", &["l/kept=v"]).await;
    let mut gone = BTreeSet::new();
    while gone.len() < 2 {
        if let Followed::Changes(changes) = follower_says(&mut follower).await {
            gone.extend(changes.into_iter().filter(|c| c.value.is_none()).map(|c| c.key));
        }
    }
    assert_eq!(gone.into_iter().collect::<Vec<_>>(), ["l/a", "l/b"]);
    assert_eq!(registry.keep_alive(dropped.id).await, Err(Error::LeaseGone(Some(dropped.id))));
    let late = registry.put(Put::new("l/a", "v").leased(dropped.id)).await;
    assert_eq!(late, Err(Error::LeaseGone(Some(dropped.id))));
    keeping.abort();
    registry.revoke(kept.id).await.unwrap();
    assert!(read(&registry, "l/").await.is_empty(), "revoking deletes at once");
    assert_eq!(registry.revoke(kept.id).await, Ok(()), "twice is fine");
}

async fn follower_says(follower: &mut Follower) -> Followed {
    tokio::time::timeout(DEADLINE, follower.next()).await.expect("the follower says something")
}

/// `key=value@revision`, or `-key@revision`.
fn brief(changes: &[Change]) -> Vec<String> {
    let brief = |change: &Change| match &change.value {
        Some(value) => format!("{}={}", change.key, String::from_utf8_lossy(value)),
        None => format!("-{}", change.key),
    };
    changes.iter().map(brief).collect()
}

async fn a_watch_tells_every_change_in_order_from_its_revision_on(rig: Rig) {
    let registry = rig.client();
    put(&registry, "w/a", "0").await;
    let from = put(&registry, "w/a", "1").await;
    put(&registry, "other", "x").await;
    put(&registry, "w/b", "2").await;
    let mut changes = registry.watch("w/", from).await.unwrap();
    registry.delete("w/a", None).await.unwrap();
    put(&registry, "w/c", "3").await;
    let mut seen = Vec::new();
    while seen.len() < 4 {
        let next = tokio::time::timeout(DEADLINE, changes.next()).await.expect("a change");
        seen.extend(next.unwrap().unwrap());
    }
    assert_eq!(brief(&seen), ["w/a=1", "w/b=2", "-w/a", "w/c=3"]);
    assert_eq!(seen[0].mod_revision, from);
    assert!(seen.is_sorted_by_key(|change| change.mod_revision));
}

async fn a_watch_from_a_compacted_revision_says_so(rig: Rig) {
    let registry = rig.client();
    let old = put(&registry, "c/a", "0").await;
    let new = put(&registry, "c/a", "1").await;
    rig.compact(new).await;
    let error = match registry.watch("c/", old).await {
        Err(error) => error,
        Ok(mut changes) => {
            let next = tokio::time::timeout(DEADLINE, changes.next()).await.expect("an error");
            next.unwrap().unwrap_err()
        }
    };
    assert_eq!(error, Error::Compacted { asked: old });
    let mut changes = registry.watch("c/", new).await.unwrap();
    let next = tokio::time::timeout(DEADLINE, changes.next()).await.expect("a change");
    assert_eq!(brief(&next.unwrap().unwrap()), ["c/a=1"]);
}

async fn each_epoch_is_taken_once(rig: Rig) {
    const CONTENDERS: usize = 4;
    const EACH: usize = 8;
    let mut contenders = JoinSet::new();
    for _ in 0..CONTENDERS {
        let registry = rig.client();
        contenders.spawn(async move {
            let mut taken = Vec::new();
            while taken.len() < EACH {
                taken.push(registry.take_epoch(0).await.unwrap().get());
            }
            assert!(taken.is_sorted(), "{taken:?}");
            taken
        });
    }
    let all: BTreeSet<u64> = contenders.join_all().await.into_iter().flatten().collect();
    let expect: BTreeSet<u64> = (1..=(CONTENDERS * EACH) as u64).collect();
    assert_eq!(all, expect, "every number once, none left out");
    let registry = rig.client();
    assert_eq!(registry.take_epoch(100).await.unwrap().get(), 101, "above what was seen");
    assert_eq!(registry.take_epoch(7).await.unwrap().get(), 102);
}

fn quick() -> FollowOptions {
    FollowOptions {
        backoff_min: Duration::from_millis(20),
        backoff_max: Duration::from_millis(200),
        ..FollowOptions::default()
    }
}

/// What a follower says, without outages (a restart may be noticed more than once).
async fn next_news(follower: &mut Follower) -> Followed {
    loop {
        match follower_says(follower).await {
            Followed::Away(_) | Followed::Back => {}
            news => return news,
        }
    }
}

async fn a_follower_resumes_after_a_restart_and_misses_nothing(mut rig: Rig) {
    let registry = rig.client();
    put(&registry, "f/a", "0").await;
    let mut follower = registry.follow("f/", quick());
    let Followed::Resync(snapshot) = follower_says(&mut follower).await else { panic!() };
    assert_eq!(snapshot.entries.len(), 1);
    put(&registry, "f/b", "1").await;
    let Followed::Changes(changes) = follower_says(&mut follower).await else { panic!() };
    assert_eq!(brief(&changes), ["f/b=1"]);
    rig.restart().await;
    let other = rig.client();
    put(&other, "f/c", "2").await;
    other.delete("f/a", None).await.unwrap();
    let mut seen = Vec::new();
    while seen.len() < 2 {
        match next_news(&mut follower).await {
            Followed::Changes(changes) => seen.extend(brief(&changes)),
            news => panic!("{news:?}"),
        }
    }
    assert_eq!(seen, ["f/c=2", "-f/a"]);
}

async fn a_follower_reads_anew_after_compaction(rig: Rig) {
    let (registry, proxy) = (rig.client(), rig.proxy().await);
    put(&registry, "f/a", "0").await;
    let mut follower = rig.client_at(proxy.address).follow("f/", quick());
    assert!(matches!(follower_says(&mut follower).await, Followed::Resync(_)));
    // What it is told once shows that its watch stands.
    put(&registry, "f/a", "1").await;
    assert!(matches!(follower_says(&mut follower).await, Followed::Changes(_)));
    proxy.cut();
    let said = follower_says(&mut follower).await;
    assert!(matches!(said, Followed::Away(Error::Retryable { .. })), "{said:?}");
    put(&registry, "f/b", "2").await;
    registry.delete("f/a", None).await.unwrap();
    let last = put(&registry, "f/c", "3").await;
    rig.compact(last).await;
    proxy.mend();
    let Followed::Resync(snapshot) = next_news(&mut follower).await else { panic!() };
    let keys: Vec<_> = snapshot.entries.iter().map(|entry| entry.key.as_str()).collect();
    assert_eq!(keys, ["f/b", "f/c"], "and f/a is gone");
    put(&registry, "f/d", "4").await;
    let Followed::Changes(changes) = next_news(&mut follower).await else { panic!() };
    assert_eq!(brief(&changes), ["f/d=4"]);
}

async fn a_follower_reads_anew_when_the_registry_lost_its_data(mut rig: Rig) {
    let registry = rig.client();
    for n in 0..20 {
        put(&registry, "f/a", &n.to_string()).await;
    }
    let mut follower = registry.follow("f/", quick());
    assert!(matches!(follower_says(&mut follower).await, Followed::Resync(_)));
    rig.lose_everything().await;
    put(&rig.client(), "f/new", "0").await;
    loop {
        match next_news(&mut follower).await {
            // It may be read before or after the new key came.
            Followed::Resync(snapshot) => {
                assert!(snapshot.entries.iter().all(|entry| entry.key == "f/new"));
                if !snapshot.entries.is_empty() {
                    break;
                }
            }
            Followed::Changes(changes) => {
                assert_eq!(brief(&changes), ["f/new=0"]);
                break;
            }
            Followed::Away(_) | Followed::Back => {}
        }
    }
}

fn worker_options(url: &str) -> registration::Options {
    let mut options = registration::Options::at(registration::Place::parse(url).unwrap());
    options.lease_ttl_s = 2;
    options.load_interval = Duration::from_millis(100);
    options
}

fn record() -> WorkerRecord {
    WorkerRecord { worker_id: "w7".to_owned(), pid: 7, ..WorkerRecord::default() }
}

/// Waits until the worker stands there with a load report for which `fits` holds.
async fn stands(registry: &Registry, fits: impl Fn(&LoadReport) -> bool) {
    let stands = async {
        loop {
            let workers = registry.get(keys::WORKERS).await.unwrap().entries;
            let loads = registry.get(keys::LOADS).await.unwrap().entries;
            if let ([worker], [load]) = (workers.as_slice(), loads.as_slice()) {
                assert_eq!(worker.key, "evener/v1/workers/w7");
                assert_eq!(load.key, "evener/v1/loads/w7");
                assert_eq!(WorkerRecord::decode(worker.value.clone()).unwrap(), record());
                if fits(&LoadReport::decode(load.value.clone()).unwrap()) {
                    return;
                }
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(DEADLINE, stands).await.expect("the worker stands in the registry");
}

/// A load that counts its reports.
fn counted() -> impl Fn() -> LoadReport + Send {
    let n = std::cell::Cell::new(0);
    move || {
        n.set(n.get() + 1);
        LoadReport { steps_total: n.get(), ..LoadReport::default() }
    }
}

async fn a_worker_is_registered_with_its_load_until_it_ends(rig: Rig) {
    let (registry, proxy) = (rig.client(), rig.proxy().await);
    // The registry is away at first: a worker waits for it.
    proxy.cut();
    let shutdown = CancellationToken::new();
    let options = worker_options(&rig.url_at(proxy.address));
    let worker = tokio::spawn(registration::run(options, record(), counted(), shutdown.clone()));
    proxy.mend();
    stands(&registry, |load| load.worker_id == "w7" && load.unix_ms > 0).await;
    // Longer than the lease by as much as the reports tell.
    stands(&registry, |load| load.steps_total > 35).await;
    shutdown.cancel();
    tokio::time::timeout(DEADLINE, worker).await.unwrap().unwrap().unwrap();
    assert!(read(&registry, keys::PREFIX).await.is_empty(), "its lease is revoked");
}

async fn a_worker_whose_lease_was_lost_registers_again_under_its_name(rig: Rig) {
    let (registry, proxy) = (rig.client(), rig.proxy().await);
    let shutdown = CancellationToken::new();
    let options = worker_options(&rig.url_at(proxy.address));
    let worker = tokio::spawn(registration::run(options, record(), counted(), shutdown.clone()));
    stands(&registry, |load| load.steps_total > 1).await;
    proxy.cut();
    reads(&registry, keys::PREFIX, &[]).await;
    proxy.mend();
    stands(&registry, |load| load.steps_total > 10).await;
    assert!(!worker.is_finished());
    shutdown.cancel();
    tokio::time::timeout(DEADLINE, worker).await.unwrap().unwrap().unwrap();
}
