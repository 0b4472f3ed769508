//! The same bits: any split, any transport, any number of threads.

use evener_tests::Cluster;
use serde_json::{Value, json};

const PROMPT: &str = "The evener is a bar of wood or metal that lets two unequal horses pull one \
                      load together. In a team of three, the";

/// Choices with the log-probability of every position of prompt and answer. JSON text of an f32 is
/// exact, so equal text is equal bits.
async fn answer(cluster: &Cluster) -> Value {
    let body = json!({
        "model": cluster.model,
        "prompt": PROMPT,
        "max_tokens": 24,
        "temperature": 0,
        "logprobs": 5,
        "echo": true,
    });
    let answer = cluster.api.ask("/v1/completions", &body).await;
    let choices = answer["choices"].clone();
    let positions = choices[0]["logprobs"]["token_logprobs"].as_array().map_or(0, Vec::len);
    assert!(positions > 40, "only {positions} positions: {answer}");
    choices
}

/// Every split of this model's 9 heads and 3 KV heads is uneven; 4 ranks replicate a KV head.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_split_gives_the_same_bits() {
    let splits = [
        ("1", "auto", "2"),
        ("1:1", "auto", "1"),
        ("1:1", "tcp", "2"),
        ("1:1:1", "auto", "1"),
        ("1:1:1:1", "tcp", "1"),
        ("1:1:1:1", "auto", "2"),
        ("2:1", "auto", "2"),
        ("2:1", "tcp", "1"),
        ("1:5", "auto", "1"),
        ("1:5", "tcp", "2"),
        ("3:2:2", "tcp", "1"),
        ("3:2:2", "auto", "2"),
    ];
    let whole = Cluster::builder().workers(1).start().await;
    let expected = answer(&whole).await;
    drop(whole);
    for (shares, transport, threads) in splits {
        let cluster = Cluster::builder()
            .shares(shares)
            .option("--transport", transport)
            .option("--threads", threads)
            .start()
            .await;
        let got = answer(&cluster).await;
        assert_eq!(
            got.to_string(),
            expected.to_string(),
            "shares {shares} over {transport} with {threads} threads"
        );
        let links = cluster.api.status().await["groups"][0]["members"].to_string();
        if shares != "1" {
            let link = if transport == "auto" { "shm" } else { "tcp" };
            assert!(links.contains(link), "{transport} should give {link}: {links}");
        }
    }
}

/// `--kv` and `--activations` are the group's: all its ranks take them, and the page says so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn formats_of_a_group_reach_all_its_ranks() {
    let start = |shares, kv, activations| {
        let cluster = Cluster::builder().shares(shares);
        cluster.option("--kv", kv).option("--activations", activations).start()
    };
    let whole = start("1", "int8", "int8").await;
    let expected = answer(&whole).await.to_string();
    drop(whole);
    let split = start("1:2", "int8", "int8").await;
    assert_eq!(answer(&split).await.to_string(), expected);
    let group = split.api.status().await["groups"][0].clone();
    assert_eq!(group["kv_format"], "int8", "{group:#}");
    assert_eq!(group["activations"], "int8", "{group:#}");
    drop(split);
    for (kv, activations) in [("f16", "int8"), ("int8", "int12")] {
        let other = start("1:2", kv, activations).await;
        let got = answer(&other).await.to_string();
        assert_ne!(got, expected, "KV in {kv}, activations in {activations}: one had no effect");
    }
}
