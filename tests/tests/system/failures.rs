//! A worker that dies is heard: no stream ends cleanly short of its end, and the cluster heals.

use evener_tests::{Cluster, ENDLESS, End, SOON, text_of};
use serde_json::{Value, json};

fn body(cluster: &Cluster) -> Value {
    json!({"model": cluster.model, "prompt": ENDLESS, "max_tokens": 400, "temperature": 0})
}

/// Kills the worker of `rank` while a stream runs.
async fn a_kill_is_not_seen_as_a_short_answer(rank: usize) {
    let cluster = Cluster::builder().shares("2:1").start().await;
    let body = body(&cluster);
    let undisturbed = cluster.api.stream("/v1/completions", &body).await.rest().await;
    assert_eq!(undisturbed.1, End::Done);
    let whole = text_of(&undisturbed.0);
    assert!(undisturbed.0.len() > 100, "too short to be disturbed: {whole}");

    let mut stream = cluster.api.stream("/v1/completions", &body).await;
    let mut events = Vec::new();
    for _ in 0..10 {
        events.push(stream.next().await.expect("the stream runs"));
    }
    let killed = cluster.kill(rank).await;
    let (rest, end) = stream.rest().await;
    events.extend(rest);
    let text = text_of(&events);
    let failed = events.last().is_some_and(|event| !event["error"].is_null());
    println!("after the kill of rank {rank} the stream ended with {end:?}");
    match end {
        End::Done => assert_eq!(text, whole, "the stream came to its end with another text"),
        End::Broken => {
            assert!(failed, "the stream broke without an error event: {events:?}");
            assert!(whole.starts_with(&text), "{text:?} is not a beginning of {whole:?}");
        }
    }

    // `evener up` starts the worker again, and the group is formed again under a new epoch.
    cluster
        .api
        .until("a new process has the rank", |status| {
            let members = status["groups"][0]["members"].as_array().map_or(0, Vec::len);
            let workers = status["workers"].as_array().expect("a list of workers");
            let fresh = workers.iter().filter(|w| w["pid"].as_u64() != Some(killed)).count();
            status["groups"][0]["state"] == "ready" && members == 2 && fresh == 2
        })
        .await;
    cluster.api.until_ready(SOON).await;
    let again = cluster.api.stream("/v1/completions", &body).await.rest().await;
    assert_eq!((text_of(&again.0), again.1), (whole, End::Done));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_follower_is_heard_and_replaced() {
    a_kill_is_not_seen_as_a_short_answer(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_lead_is_heard_and_replaced() {
    a_kill_is_not_seen_as_a_short_answer(0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn children_end_with_a_parent_that_is_killed() {
    let cluster = Cluster::builder().start().await;
    cluster.kill_parent();
    cluster.until_no_process_is_left().await;
}
