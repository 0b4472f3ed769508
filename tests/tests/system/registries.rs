//! Coordinator and workers form the same cluster however they are started and wherever they meet.

use evener_tests::{Cluster, Registry};
use serde_json::json;

async fn answers(cluster: &Cluster) -> String {
    let body = json!({
        "model": cluster.model, "prompt": "One, two, three,", "max_tokens": 8, "temperature": 0,
    });
    let answer = cluster.api.ask("/v1/completions", &body).await;
    answer["choices"][0]["text"].as_str().expect("an answer has text").to_owned()
}

async fn check(cluster: &Cluster, registry: &str) -> String {
    let status = cluster.api.status().await;
    assert_eq!(status["registry"]["kind"], registry, "{status:#}");
    assert_eq!(status["registry"]["healthy"], true, "{status:#}");
    let members = status["groups"][0]["members"].as_array().expect("members");
    let names: Vec<&str> = members.iter().filter_map(|m| m["worker"].as_str()).collect();
    assert_eq!(names, ["w0", "w1", "w2"]);
    let shares: Vec<u64> = members.iter().filter_map(|m| m["share"].as_u64()).collect();
    assert_eq!(shares, [3, 2, 2]);
    answers(cluster).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn up_and_separate_processes_form_the_same_cluster_in_both_registries() {
    let mut texts = Vec::new();
    for (registry, name) in [(Registry::Embedded, "embedded"), (Registry::Etcd, "etcd")] {
        let up = Cluster::builder().shares("3:2:2").registry(registry).start().await;
        texts.push(check(&up, name).await);
        drop(up);
        let apart = Cluster::builder().shares("3:2:2").registry(registry).separately();
        texts.push(check(&apart.start().await, name).await);
    }
    assert!(texts.iter().all(|text| *text == texts[0]), "{texts:?}");
}
