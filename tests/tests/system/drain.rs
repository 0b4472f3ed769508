//! SIGTERM: what runs is finished, nothing new is taken, everything ends with status 0.

use evener_tests::{Cluster, ENDLESS, End, SOON, eventually, text_of};
use serde_json::json;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_runs_is_finished_before_the_end() {
    let mut cluster = Cluster::builder().start().await;
    let body = json!({
        "model": cluster.model, "prompt": ENDLESS, "max_tokens": 200, "temperature": 0,
    });
    let undisturbed = cluster.api.stream("/v1/completions", &body).await.rest().await;
    let mut stream = cluster.api.stream("/v1/completions", &body).await;
    let mut events = vec![stream.next().await.expect("the stream runs")];
    cluster.terminate();
    eventually("readiness is off", SOON, || async {
        match cluster.api.try_get("/readyz").await {
            Some((200, _)) => None,
            Some((_, _)) | None => Some(()),
        }
    })
    .await;
    let (rest, end) = stream.rest().await;
    events.extend(rest);
    assert_eq!(end, End::Done);
    assert_eq!(text_of(&events), text_of(&undisturbed.0));
    let ended = cluster.ended(SOON).await;
    assert!(ended.status.success(), "{ended:?}");
    cluster.until_no_process_is_left().await;
}
