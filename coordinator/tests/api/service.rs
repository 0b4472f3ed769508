//! Models, health, metrics, status; what every response has; limits on connections and requests.

use std::time::Duration;

use evener_coordinator::group::figures;
use evener_proto::ids::{GroupId, ModelName};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::lead::Lead;
use crate::world::{MODEL, World, alphabet, options, script};

const COMPLETIONS: &str = "/v1/completions";

#[tokio::test]
async fn models_are_listed_and_found() {
    let lead = Lead::start(1, script(alphabet()));
    let world = World::start(&[&lead]).await;
    let list = world.get("/v1/models").await.ok();
    assert_eq!(list["object"], "list");
    let model = &list["data"][0];
    assert_eq!(model["id"], MODEL);
    assert_eq!((&model["object"], &model["owned_by"]), (&json!("model"), &json!("evener")));
    assert_eq!((&model["ready"], &model["deterministic"]), (&json!(true), &json!(true)));
    assert_eq!(model["created"], 1_700_000_000);
    assert_eq!(world.get("/v1/models/tiny").await.ok(), *model);
    for path in ["/v1/models/none", "/v1/models/a/b", "/v1/models/%ff"] {
        let answer = world.get(path).await;
        assert_eq!(answer.status, 404, "{path}");
        assert_eq!(answer.json()["error"]["code"], "model_not_found");
    }
    world.set_leads(&[]);
    assert_eq!(world.get("/v1/models/tiny").await.ok()["ready"], false);
}

#[tokio::test]
async fn readiness_says_what_is_missing() {
    let lead = Lead::start(1, script(alphabet()));
    let world = World::start(&[]).await;
    assert_eq!(world.get("/livez").await.status, 200);
    let answer = world.get("/readyz").await;
    assert_eq!(answer.status, 503);
    assert!(answer.headers.contains_key("retry-after"));
    let body = answer.json();
    assert_eq!(body["missing"], json!(["model tiny wants 2 workers, 0 hold it"]));
    assert!(body["error"]["message"].as_str().unwrap().contains("0 hold it"));
    world.set_leads(&[&lead]);
    let body = world.get("/readyz").await.ok();
    assert_eq!((&body["status"], &body["groups"]), (&json!("ready"), &json!(1)));
    // A second group that is missing is told and changes nothing.
    let mut directory = crate::world::directory(&[&lead]);
    directory.missing.push("group g2 is loading".to_owned());
    world.directory.send_replace(directory.into());
    assert_eq!(world.get("/readyz").await.ok()["missing"], json!(["group g2 is loading"]));
    // Nothing known at all.
    world.directory.send_replace(std::sync::Arc::default());
    assert_eq!(world.get("/readyz").await.status, 503);
    assert_eq!(world.post(COMPLETIONS, json!({"prompt": "x"})).await.status, 503);
    assert_eq!(world.get("/v1/models").await.ok()["data"], json!([]));
}

#[tokio::test]
async fn status_is_what_the_cluster_side_says() {
    let world = World::start(&[]).await;
    assert_eq!(world.get("/status").await.ok(), json!({"workers": []}));
    world.status.send_replace(json!({"workers": [{"id": "w0"}]}).into());
    assert_eq!(world.get("/status").await.ok()["workers"][0]["id"], "w0");
}

#[tokio::test]
async fn metrics_count_what_happened() {
    let lead = Lead::start(1, script(alphabet()));
    let world = World::start(&[&lead]).await;
    let body = json!({"prompt": [1, 2, 3], "max_tokens": 7});
    world.post(COMPLETIONS, body).await.ok();
    world.post(COMPLETIONS, json!({"prompt": 3})).await;
    let text = world.get("/metrics").await.text;
    for line in [
        "evener_requests_total{endpoint=\"completions\",outcome=\"ok\"} 1",
        "evener_requests_total{endpoint=\"completions\",outcome=\"invalid\"} 1",
        "evener_requests_running 0",
        "evener_prompt_tokens_total{model=\"tiny\"} 3",
        "evener_generation_tokens_total{model=\"tiny\"} 7",
        "evener_time_to_first_token_seconds_count{model=\"tiny\"} 1",
        "evener_inter_token_latency_seconds_count{model=\"tiny\"} 6",
        "evener_request_duration_seconds_count{model=\"tiny\"} 1",
        "evener_request_overhead_seconds_count{model=\"tiny\"} 1",
        "# UNIT evener_coordinator_cpu_seconds seconds",
        "evener_request_duration_seconds_count{model=\"\"} 1",
        "# HELP evener_migrations",
        "# EOF",
    ] {
        assert!(text.contains(line), "{line} is missing in\n{text}");
    }
}

#[tokio::test]
async fn metrics_show_what_workers_report_of_living_groups() {
    let world = World::start(&[]).await;
    assert!(!world.get("/metrics").await.text.contains("evener_step"));
    let histogram = |counts: [u64; 3]| figures::Histogram {
        bounds_s: [0.001, 0.5].into(),
        counts: counts.into(),
        sum_s: 2.5,
    };
    let timeline = figures::Timeline {
        idle: histogram([0, 0, 0]),
        step: histogram([1, 2, 3]),
        compute: histogram([0, 6, 0]),
        wait: histogram([6, 0, 0]),
        transfer: histogram([6, 0, 0]),
        tokens: 40,
        bytes_sent: 1000,
        bytes_received: 2000,
    };
    let rank = |rank| figures::Rank {
        rank,
        resident_weight_bytes: 7,
        rss_bytes: 8,
        timeline: Some(timeline.clone()),
    };
    let group = figures::Group {
        id: GroupId::parse("m:0").unwrap(),
        model: ModelName::parse("m").unwrap(),
        is_ready: true,
        lead: Some(figures::Lead {
            n_waiting: 3,
            kv_blocks_total: 10,
            kv_blocks_free: 8,
            kv_blocks_cached: 5,
            queue: Some(histogram([4, 0, 0])),
            ..figures::Lead::default()
        }),
        ranks: vec![rank(0), rank(1)],
    };
    world.figures.send_replace([group].into());
    let text = world.get("/metrics").await.text;
    let of = "model=\"m\",group=\"m:0\"";
    for line in [
        "# HELP evener_step_seconds Steps: compute, wait and transfer.".to_owned(),
        "# TYPE evener_step_seconds histogram".to_owned(),
        "# TYPE evener_collective_sent_bytes counter".to_owned(),
        format!("evener_group_ready{{{of}}} 1"),
        format!("evener_sequences_waiting{{{of}}} 3"),
        format!("evener_kv_blocks{{{of},state=\"used\"}} 2"),
        format!("evener_kv_blocks{{{of},state=\"cached\"}} 5"),
        format!("evener_kv_blocks{{{of},state=\"free\"}} 3"),
        format!("evener_kv_usage_ratio{{{of}}} 0.2"),
        format!("evener_queue_seconds_count{{{of}}} 4"),
        format!("evener_step_seconds_bucket{{le=\"0.001\",{of},rank=\"1\"}} 1"),
        format!("evener_step_seconds_bucket{{le=\"0.5\",{of},rank=\"1\"}} 3"),
        format!("evener_step_seconds_bucket{{le=\"+Inf\",{of},rank=\"1\"}} 6"),
        format!("evener_step_seconds_sum{{{of},rank=\"0\"}} 2.5"),
        format!("evener_step_wait_seconds_count{{{of},rank=\"0\"}} 6"),
        format!("evener_collective_sent_bytes_total{{{of},rank=\"1\"}} 1000"),
        format!("evener_rank_weights_bytes{{{of},rank=\"1\"}} 7"),
    ] {
        assert!(text.contains(&line), "{line} is missing in\n{text}");
    }
    world.figures.send_replace([].into());
    assert!(!world.get("/metrics").await.text.contains("evener_step"), "a group that is gone");
}

#[tokio::test]
async fn every_response_has_an_id_and_every_error_is_json() {
    let world = World::start(&[]).await;
    let requests = [
        (world.client.get(format!("{}/nowhere", world.url)), 404),
        (world.client.get(format!("{}/v1/../admin", world.url)), 404),
        (world.client.get(format!("{}//v1/models", world.url)), 404),
        (world.client.get(format!("{}/V1/models", world.url)), 404),
        (world.client.get(format!("{}/v1/completions", world.url)), 405),
        (world.client.post(format!("{}/v1/models", world.url)), 405),
        (world.client.delete(format!("{}/v1/models/tiny", world.url)), 405),
        (world.client.request(reqwest::Method::TRACE, format!("{}/v1/models", world.url)), 405),
        (
            world.client.request(
                reqwest::Method::from_bytes(b"QUERY").unwrap(),
                format!("{}/v1/chat/completions", world.url),
            ),
            405,
        ),
    ];
    let mut ids = std::collections::HashSet::new();
    for (request, status) in requests {
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), status, "{}", response.url());
        ids.insert(response.headers()["x-request-id"].clone());
        if status == 405 {
            assert!(response.headers().contains_key("allow"), "{}", response.url());
        }
        let body: serde_json::Value = response.json().await.unwrap();
        assert_eq!(body["error"]["type"], "invalid_request_error");
    }
    assert_eq!(ids.len(), 9);
    let url = format!("{}/livez", world.url);
    let given = world.client.get(&url).header("x-request-id", "mine-1").send().await.unwrap();
    assert_eq!(given.headers()["x-request-id"], "mine-1");
    let given = world.client.get(&url).header("x-request-id", "no good").send().await.unwrap();
    assert_ne!(given.headers()["x-request-id"], "no good");
}

#[tokio::test]
async fn one_request_too_many_is_shed_at_once() {
    let lead = Lead::start(1, script(alphabet()));
    lead.hold_at(8);
    let mut options = options();
    options.max_requests = 2;
    let world = World::with(&[&lead], options).await;
    let body = json!({"prompt": [1], "max_tokens": 20, "stream": true});
    let first = world.open(COMPLETIONS, body.clone()).await;
    let second = world.open(COMPLETIONS, body.clone()).await;
    let started = std::time::Instant::now();
    let third = world.post(COMPLETIONS, body.clone()).await;
    assert!(started.elapsed() < Duration::from_secs(1));
    assert_eq!(third.status, 429, "{}", third.text);
    assert!(third.headers.contains_key("retry-after"));
    assert_eq!(third.json()["error"]["type"], "rate_limit_error");
    drop(first);
    lead.let_go();
    assert!(second.text().await.unwrap().ends_with("[DONE]\n\n"));
    world.until_metric("evener_requests_running", 0.0).await;
    world.post(COMPLETIONS, body).await.events();
}

/// Writes raw bytes and reads until the server closes.
async fn raw(world: &World, bytes: &[u8]) -> String {
    let address = world.url.trim_start_matches("http://");
    let mut socket = tokio::net::TcpStream::connect(address).await.unwrap();
    let _ = socket.write_all(bytes).await; // it may close before all is written
    let mut answer = Vec::new();
    let reading = socket.read_to_end(&mut answer);
    let _ = tokio::time::timeout(Duration::from_secs(10), reading).await.expect("it closes");
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn requests_that_do_not_arrive_are_ended_by_a_timer() {
    let lead = Lead::start(1, script(alphabet()));
    let mut options = options();
    options.header_timeout = Duration::from_millis(300);
    options.body_timeout = Duration::from_millis(300);
    let world = World::with(&[&lead], options).await;
    // Headers that never end.
    raw(&world, b"GET /livez HTTP/1.1\r\nhost: x\r\n").await;
    // A body that never comes.
    let half = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{\"model\"";
    let answer = raw(&world, half).await;
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    assert!(answer.contains("\"invalid_request_error\""), "{answer}");
    world.post(COMPLETIONS, json!({"prompt": [1], "max_tokens": 1})).await.ok();
}

#[tokio::test]
async fn a_client_that_never_reads_is_dropped() {
    let lead = Lead::start(1, script(alphabet()));
    let mut options = options();
    options.write_timeout = Duration::from_millis(300);
    let world = World::with(&[&lead], options).await;
    // More than sockets hold: 128 sequences of 500 tokens with five rivals each.
    let body = json!({"model": MODEL, "prompt": vec!["x"; 128], "max_tokens": 500, "logprobs": 5,
                      "stream": true, "temperature": 0});
    let body = body.to_string();
    let head =
        format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}", body.len());
    let mut socket =
        tokio::net::TcpStream::connect(world.url.trim_start_matches("http://")).await.unwrap();
    socket.write_all(format!("{head}\r\n\r\n{body}").as_bytes()).await.unwrap();
    lead.until("the request is there", |lead| lead.submits().len() == 128).await;
    let cancelled = "evener_requests_total{endpoint=\"completions\",outcome=\"cancelled\"}";
    world.until_metric(cancelled, 1.0).await;
    world.until_metric("evener_requests_running", 0.0).await;
    world.post(COMPLETIONS, json!({"prompt": [1], "max_tokens": 1})).await.ok();
}

#[tokio::test]
async fn malformed_heads_are_refused() {
    let world = World::start(&[]).await;
    let huge = format!("GET /livez HTTP/1.1\r\nhost: x\r\na: {}\r\n\r\n", "x".repeat(200_000));
    let many = format!("GET /livez HTTP/1.1\r\nhost: x\r\n{}\r\n", "a: b\r\n".repeat(10_000));
    let nul = "GET /livez HTTP/1.1\r\nhost: x\r\na: b\0c\r\n\r\n".to_owned();
    for (head, statuses) in [(huge, ["431", "400"]), (many, ["431", "400"]), (nul, ["400", "400"])]
    {
        let answer = raw(&world, head.as_bytes()).await;
        let status = answer.split(' ').nth(1).unwrap_or("closed");
        assert!(statuses.contains(&status) || status == "closed", "{answer}");
    }
    assert_eq!(world.get("/livez").await.status, 200);
}

#[tokio::test]
async fn connections_over_the_limit_wait_for_a_place() {
    let mut options = options();
    options.max_connections = 2;
    let world = World::with(&[], options).await;
    let address = world.url.trim_start_matches("http://").to_owned();
    let first = tokio::net::TcpStream::connect(&address).await.unwrap();
    let second = tokio::net::TcpStream::connect(&address).await.unwrap();
    let mut third = tokio::net::TcpStream::connect(&address).await.unwrap();
    third.write_all(b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut byte = [0u8; 1];
    let early = tokio::time::timeout(Duration::from_millis(200), third.read(&mut byte)).await;
    assert!(early.is_err(), "answered beyond the limit");
    drop((first, second));
    let mut answer = String::new();
    let reading = third.read_to_string(&mut answer);
    tokio::time::timeout(Duration::from_secs(10), reading).await.unwrap().unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}
