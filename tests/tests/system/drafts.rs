//! Drafts bring several tokens a step, and through all of the system no other answer.

use evener_tests::{Cluster, text_of};
use serde_json::{Value, json};

const TEXT: &str = "The old ferry left the harbour at six in the morning, as it had done every day \
                    for forty years. Its captain knew each rock of the strait by name, and each \
                    passenger by the way they walked. On that Tuesday there were eleven of them.";

fn bodies(model: &str) -> Vec<Value> {
    let request = format!("Repeat the following text word for word.\n\n{TEXT}");
    let messages = json!([{ "role": "user", "content": request }]);
    let body = |more: Value| {
        let mut body = json!({ "model": model, "messages": messages, "max_tokens": 64, "seed": 5 });
        let more = more.as_object().expect("an object").clone();
        body.as_object_mut().expect("an object").extend(more);
        body
    };
    vec![
        body(json!({ "temperature": 0, "logprobs": true, "top_logprobs": 2 })),
        body(json!({ "temperature": 0, "stop": ["by name"] })),
        body(json!({ "temperature": 0.2, "n": 3, "frequency_penalty": 0.1 })),
        body(json!({ "temperature": 0.2, "top_p": 0.9, "min_tokens": 60 })),
        body(json!({ "temperature": 0, "guided_regex": "(The|A) old [a-z ,]+\\." })),
    ]
}

/// What is said, and what it costs: ids and times left out.
async fn answers(cluster: &Cluster) -> Vec<String> {
    let mut answers = Vec::new();
    for body in bodies(&cluster.model) {
        let answer = cluster.api.ask("/v1/chat/completions", &body).await;
        answers.push(format!("{} {}", answer["choices"], answer["usage"]["completion_tokens"]));
        if body["n"].is_null() {
            let stream = cluster.api.stream("/v1/chat/completions", &body).await;
            answers.push(text_of(&stream.rest().await.0));
        }
    }
    answers
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_with_drafts_is_the_answer_without() {
    let plain = Cluster::builder().workers(2).start().await;
    let expected = answers(&plain).await;
    drop(plain);
    let cluster = Cluster::builder().workers(2).option("--speculate", "8").start().await;
    for (got, expected) in answers(&cluster).await.iter().zip(&expected) {
        assert_eq!(got, expected);
    }
    let figure = |status: &Value, name: &str| {
        let workers = status["workers"].as_array().expect("a list of workers");
        workers.iter().filter_map(|w| w["load"][name].as_u64()).max().unwrap_or(0)
    };
    cluster
        .api
        .until("the lead reports its drafts", |status| figure(status, "drafts_right_total") > 50)
        .await;
}
