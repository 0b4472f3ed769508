//! Who waits for whom: deliberately uneven groups are found out, in `/metrics`, `/status` and by
//! `evener status`.

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use evener_tests::{Cluster, ENDLESS, SOON, evener, eventually};
use serde_json::{Value, json};

/// Text of `GET /metrics`.
async fn metrics(cluster: &Cluster) -> String {
    let url = format!("{}/metrics", cluster.url());
    let client = reqwest::Client::builder().no_proxy().build().expect("an HTTP client");
    let response = client.get(url).send().await.expect("metrics are there");
    response.text().await.expect("they are text")
}

/// The value of a metric of this model's one group and `rank`.
fn of_rank(text: &str, cluster: &Cluster, name: &str, rank: usize) -> f64 {
    let model = &cluster.model;
    let start = format!("{name}{{model=\"{model}\",group=\"{model}:0\",rank=\"{rank}\"}} ");
    let value = text.lines().find_map(|line| line.strip_prefix(&start));
    let value = value.unwrap_or_else(|| panic!("{start} is missing in\n{text}"));
    value.parse().expect("a metric is a number")
}

/// Keeps the cluster busy until `verdict` holds of its group's balance.
async fn until_verdict(cluster: &Cluster, what: &str, holds: impl Fn(&Value) -> bool) -> Value {
    let is_over = AtomicBool::new(false);
    let busy = async {
        let body = json!({"model": cluster.model, "prompt": ENDLESS, "max_tokens": 64});
        while !is_over.load(Ordering::Relaxed) {
            cluster.api.ask("/v1/completions", &body).await;
        }
    };
    let watching = async {
        let holds = |status: &Value| holds(&status["groups"][0]["balance"]);
        let status = cluster.api.until(what, holds).await;
        is_over.store(true, Ordering::Relaxed);
        status["groups"][0]["balance"].clone()
    };
    tokio::join!(busy, watching).1
}

fn is_uneven_by(rank: usize) -> impl Fn(&Value) -> bool {
    move |balance| balance["state"] == "uneven" && balance["waited_for"]["rank"] == rank
}

fn proposed(balance: &Value) -> Vec<f64> {
    let shares = balance["proposed_shares"].as_array().expect("an uneven group has a proposal");
    shares.iter().map(|share| share.as_f64().expect("a share is a number")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_rank_with_too_large_a_share_is_named_and_even_shares_proposed() {
    let cluster = Cluster::builder().shares("3:1").start().await;
    let fresh = |status: &Value| status["groups"][0]["balance"]["state"] == "no_steps";
    cluster.api.until("a fresh group has no steps", fresh).await;
    let balance = until_verdict(&cluster, "rank 0 is waited for", is_uneven_by(0)).await;
    let shares = proposed(&balance);
    let ratio = shares[0] / shares[1];
    // The model's heads cannot be dealt out 3:1, and the machine has other things to do.
    assert!((0.5..=2.0).contains(&ratio), "two equal workers: {balance:#}");
    let [first, second] = [0, 1].map(|rank| balance["ranks"][rank]["wait"].as_f64());
    assert!(first < second, "the quick one waits: {balance:#}");

    let text = eventually("both ranks have told their steps", SOON, || async {
        let text = metrics(&cluster).await;
        let told = |rank| of_rank(&text, &cluster, "evener_step_seconds_count", rank) > 0.0;
        (told(0) && told(1)).then_some(text)
    })
    .await;
    for rank in [0, 1] {
        let sum = |part: &str| of_rank(&text, &cluster, &format!("evener_step{part}_sum"), rank);
        let whole = sum("_seconds");
        let parts = ["_compute_seconds", "_wait_seconds", "_transfer_seconds"].map(sum);
        // To the rounding of a decimal number.
        assert!((whole - parts.iter().sum::<f64>()).abs() < 1e-6 * whole, "{whole} {parts:?}");
        assert!(of_rank(&text, &cluster, "evener_collective_sent_bytes_total", rank) > 0.0);
    }
    let model = &cluster.model;
    assert!(text.contains(&format!("evener_queue_seconds_count{{model=\"{model}\"")), "{text}");
    assert!(text.contains("evener_prefix_hit_tokens_total{"), "{text}");

    let status = Command::new(evener()).args(["status", "--url", cluster.url()]).output();
    let said =
        String::from_utf8_lossy(&status.expect("the binary can be started").stdout).into_owned();
    assert!(said.contains("BALANCE") && said.contains("rank 0 is waited for"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn among_three_ranks_the_one_is_named_that_the_others_wait_for() {
    let cluster = Cluster::builder().shares("1:1:6").start().await;
    let balance = until_verdict(&cluster, "rank 2 is waited for", is_uneven_by(2)).await;
    let shares = proposed(&balance);
    let part = shares[2] / shares.iter().sum::<f64>();
    assert!(part < 0.6, "a smaller part than three quarters is proposed: {balance:#}");
}
