//! One command serves the demo model, and it answers sensibly.

use std::path::Path;

use evener_tests::{Cluster, Process, SOON, evener};
use serde_json::{Value, json};

/// Plain enough that the small model names Paris and nothing else.
const QUESTION: &str = "What is the capital of France? Answer in one sentence.";

fn question(cluster: &Cluster) -> Value {
    json!({
        "model": cluster.model,
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": 32,
    })
}

async fn evener_says(args: &[&str]) -> evener_tests::Ended {
    Process::start("evener", &evener(), args, "verb").ended(SOON).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_unequal_workers_know_the_capital_of_france() {
    let cluster = Cluster::builder().shares("2:1").start().await;
    let answer = cluster.api.ask("/v1/chat/completions", &question(&cluster)).await;
    let text = answer["choices"][0]["message"]["content"].as_str().expect("an answer has text");
    assert!(text.contains("Paris"), "{text}");
    assert_eq!(answer["choices"][0]["finish_reason"], "stop", "{answer}");

    // The same through the command line.
    let url = cluster.url();
    let said = evener_says(&["chat", "--url", url, "-p", QUESTION, "--temperature", "0"]).await;
    assert!(said.status.success(), "{said:?}");
    assert_eq!(said.stdout.trim(), text.trim());

    // Load reports come each second; the first may be from before the group was ready.
    let serving = |worker: &Value| worker["state"] == "serving";
    let all_serve = |status: &Value| {
        status["workers"].as_array().is_some_and(|workers| workers.iter().all(serving))
    };
    cluster.api.until("both workers report that they serve", all_serve).await;
    let status = evener_says(&["status", "--url", url]).await;
    assert!(status.status.success(), "{status:?}");
    for expected in ["w0", "w1", "serving", "ready", "heads 0..6", "heads 6..9", "shm"] {
        assert!(status.stdout.contains(expected), "{expected} is missing in\n{}", status.stdout);
    }

    // Each rank holds its share of the weights and no more.
    let (one, two) = (cluster.worker(0).await, cluster.worker(1).await);
    let resident = |worker: &Value| worker["resident_weight_bytes"].as_u64().expect("a number");
    let whole = std::fs::metadata(evener_tests::model()).expect("the model is there").len();
    assert_eq!((one["share"].as_u64(), two["share"].as_u64()), (Some(2), Some(1)));
    let ratio = resident(&one) as f64 / resident(&two) as f64;
    assert!((1.8..2.2).contains(&ratio), "shares 2:1 gave {ratio}");
    let sum = (resident(&one) + resident(&two)) as f64 / whole as f64;
    assert!((0.8..1.2).contains(&sum), "together they hold {sum} of the file");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn up_asks_prints_the_answer_and_ends() {
    let model = evener_tests::model().display().to_string();
    let args = [
        "up",
        "--model",
        &model,
        "--workers",
        "2",
        "--threads",
        "1",
        "--listen",
        "127.0.0.1:0",
        "--ask",
        QUESTION,
        "--exit-after-answer",
    ];
    let mark = format!("ask-{}", std::process::id());
    let ended = Process::start("evener up", Path::new(&evener()), &args, &mark)
        .ended(evener_tests::READY)
        .await;
    assert!(ended.status.success(), "{ended:?}");
    assert!(ended.stdout.contains("Paris"), "{ended:?}");
    assert!(ended.stdout.contains("curl http://127.0.0.1:"), "{ended:?}");
    assert_eq!(evener_tests::living_processes_marked(&mark), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_reference_backend_serves_the_whole_system() {
    let cluster = Cluster::builder().option("--backend", "reference").start().await;
    let answer = cluster.api.ask("/v1/chat/completions", &question(&cluster)).await;
    let text = answer["choices"][0]["message"]["content"].as_str().expect("an answer has text");
    assert!(text.contains("Paris"), "{text}");
}
