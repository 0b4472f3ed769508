//! What happens when a client goes away, a lead is lost, or the server is told to stop.

use std::time::{Duration, Instant};

use evener_proto::worker as wire;
use serde_json::{Value, json};

use crate::lead::{Lead, Script};
use crate::world::{World, alphabet, events, options, script, user};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

fn request() -> Value {
    json!({"prompt": [1, 2], "max_tokens": 60, "seed": 3, "logprobs": 0})
}

fn streamed() -> Value {
    let mut request = request();
    request["stream"] = json!(true);
    request
}

/// What the tests' leads say to [`request`], undisturbed.
fn expected() -> String {
    (2..62).map(|position| char::from(b'a' + ((position + 3) % 26) as u8)).collect()
}

/// Reads a stream until some text is there.
async fn until_text(response: &mut reqwest::Response, n: usize) -> String {
    let mut body = String::new();
    while body.matches("\"text\":\"").count() < n {
        let chunk = response.chunk().await.unwrap().expect("the stream goes on");
        body.push_str(std::str::from_utf8(&chunk).unwrap());
    }
    body
}

/// Reads the rest; the error is how the connection ended, if not well.
async fn rest(
    mut response: reqwest::Response,
    mut body: String,
) -> (String, Option<reqwest::Error>) {
    loop {
        match response.chunk().await {
            Ok(Some(chunk)) => body.push_str(std::str::from_utf8(&chunk).unwrap()),
            Ok(None) => return (body, None),
            Err(error) => return (body, Some(error)),
        }
    }
}

fn text_of(body: &str) -> String {
    let body = body.trim_end_matches("data: [DONE]\n\n");
    events(body)
        .iter()
        .filter_map(|event| event["choices"][0]["text"].as_str().map(str::to_owned))
        .collect()
}

#[tokio::test]
async fn a_client_that_goes_away_frees_its_sequence() {
    let lead = Lead::start(1, script(alphabet()));
    lead.hold_at(8);
    let world = World::start(&[&lead]).await;
    // In the middle of a stream.
    let mut response = world.open(COMPLETIONS, streamed()).await;
    until_text(&mut response, 2).await;
    drop(response);
    lead.until("the stream's sequence is cancelled", |lead| lead.n_cancels() == 1).await;
    // Before the first token, streamed or not; two choices are two sequences.
    for (stream, n, cancels) in [(true, 1, 2), (false, 1, 3), (false, 2, 5)] {
        let n_submits = lead.submits().len();
        let body =
            json!({"prompt": "hello world hello", "max_tokens": 5, "stream": stream, "n": n});
        lead.hold_at(1);
        let asking = tokio::spawn({
            let (client, url) = (world.client.clone(), format!("{}{COMPLETIONS}", world.url));
            let mut body = body;
            body["model"] = json!(crate::world::MODEL);
            async move { client.post(url).json(&body).send().await.map(|r| r.status()) }
        });
        lead.until("the request has come", |lead| lead.submits().len() == n_submits + n).await;
        asking.abort();
        lead.until("it is cancelled", |lead| lead.n_cancels() == cancels).await;
    }
    let cancelled = "evener_requests_total{endpoint=\"completions\",outcome=\"cancelled\"}";
    world.until_metric(cancelled, 4.0).await;
    world.until_metric("evener_requests_running", 0.0).await;
    lead.let_go();
    world.post(COMPLETIONS, request()).await.ok();
}

#[tokio::test]
async fn a_lost_lead_costs_a_pause_and_no_token() {
    let mut first = Lead::start(1, script(alphabet()));
    let second = Lead::start(2, script(alphabet()));
    first.hold_at(20);
    let world = World::start(&[&first, &second]).await;
    let mut response = world.open(COMPLETIONS, streamed()).await;
    let body = until_text(&mut response, 10).await;
    first.die();
    let (body, error) = rest(response, body).await;
    assert!(error.is_none(), "{error:?}");
    assert!(body.ends_with("data: [DONE]\n\n"));
    assert_eq!(text_of(&body), expected());
    let resumed = second.submits().remove(0);
    assert_eq!(resumed.prompt.len(), 20, "prompt and what was generated before");
    assert_eq!(resumed.max_tokens, 42);
    let sampling = resumed.sampling.unwrap();
    assert_eq!((sampling.seed, sampling.n_resumed), (3, 18), "and which of them were generated");
    assert_eq!(world.metric("evener_migrations_total").await, 1.0);
    let n_overheads = "evener_request_overhead_seconds_count{model=\"tiny\"}";
    assert_eq!(world.metric(n_overheads).await, 0.0, "the time of two leads is not one's");
    // Not streamed, the same; usage counts each token once.
    let whole = world.post(COMPLETIONS, request()).await.ok();
    assert_eq!(whole["choices"][0]["text"], expected());
    assert_eq!(whole["usage"]["completion_tokens"], 60);
    assert_eq!(world.metric(n_overheads).await, 1.0);
}

#[tokio::test]
async fn a_request_waits_for_its_group_to_be_formed_again() {
    let mut first = Lead::start(1, script(alphabet()));
    first.hold_at(20);
    let world = World::start(&[&first]).await;
    let mut response = world.open(COMPLETIONS, streamed()).await;
    let body = until_text(&mut response, 10).await;
    first.die();
    world.set_leads(&[]);
    let again = Lead::start(2, script(alphabet()));
    world.set_leads(&[&again]);
    let (body, error) = rest(response, body).await;
    assert!(error.is_none(), "{error:?}");
    assert_eq!(text_of(&body), expected());
}

#[tokio::test]
async fn a_newer_epoch_of_the_group_silences_the_older() {
    let old = Lead::start(1, script(alphabet()));
    old.hold_at(20);
    let world = World::start(&[&old]).await;
    let mut response = world.open(COMPLETIONS, streamed()).await;
    let body = until_text(&mut response, 10).await;
    // The old lead lives and says nothing; the registry has moved on.
    let new = Lead::start(2, script(alphabet())).of_group("g1");
    world.set_leads(&[&new]);
    let (body, error) = rest(response, body).await;
    assert!(error.is_none(), "{error:?}");
    assert_eq!(text_of(&body), expected());
}

#[tokio::test]
async fn a_silent_lead_is_noticed_within_seconds() {
    let mut first = Lead::start(1, script(alphabet()));
    let second = Lead::start(2, script(alphabet()));
    first.hold_at(20);
    let world = World::start(&[&first, &second]).await;
    let mut response = world.open(COMPLETIONS, streamed()).await;
    let body = until_text(&mut response, 10).await;
    let started = Instant::now();
    first.fall_silent();
    let (body, error) = rest(response, body).await;
    assert!(error.is_none(), "{error:?}");
    assert_eq!(text_of(&body), expected());
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
}

#[tokio::test]
async fn a_stream_that_cannot_go_on_ends_with_an_error_and_not_cleanly() {
    let mut options = options();
    options.generation.resume_wait = Duration::from_millis(300);
    let mut lead = Lead::start(1, script(alphabet()));
    lead.hold_at(20);
    let world = World::with(&[&lead], options).await;
    for (path, body) in [
        (COMPLETIONS, streamed()),
        (CHAT, json!({"messages": user("h"), "stream": true, "max_tokens": 400, "seed": 3})),
    ] {
        let mut lead = if path == CHAT {
            let lead = Lead::start(9, script(alphabet()));
            lead.hold_at(60);
            world.set_leads(&[&lead]);
            lead
        } else {
            std::mem::replace(&mut lead, Lead::start(7, script(alphabet())))
        };
        let mut response = world.open(path, body).await;
        assert_eq!(response.status(), 200);
        let head = response.chunk().await.unwrap().unwrap();
        let head = String::from_utf8(head.to_vec()).unwrap();
        lead.die();
        world.set_leads(&[]);
        let (body, error) = rest(response, head).await;
        assert!(error.is_some(), "the connection must not end well: {body}");
        assert!(!body.contains("[DONE]"), "{body}");
        let events = events(&body);
        let (last, before) = events.split_last().unwrap();
        assert_eq!(last["error"]["type"], "service_unavailable_error");
        assert_eq!(last["error"].as_object().unwrap().len(), 4);
        assert!(before.iter().all(|event| event["choices"][0]["finish_reason"].is_null()));
    }
    let interrupted = "evener_requests_total{endpoint=\"completions\",outcome=\"interrupted\"}";
    assert_eq!(world.metric(interrupted).await, 1.0);
}

#[tokio::test]
async fn without_a_group_the_answer_is_503_and_when_to_come_back() {
    let mut options = options();
    options.generation.resume_wait = Duration::from_millis(300);
    let mut lead = Lead::start(1, script(alphabet()));
    let world = World::with(&[], options).await;
    let check = |answer: crate::world::Answer| {
        assert_eq!(answer.status, 503, "{}", answer.text);
        assert_eq!(answer.json()["error"]["type"], "service_unavailable_error");
        let wait: u32 = answer.headers["retry-after"].to_str().unwrap().parse().unwrap();
        assert!((1..=120).contains(&wait));
    };
    let answer = world.post(COMPLETIONS, streamed()).await;
    assert!(answer.text.contains("0 hold it"), "says what is missing: {}", answer.text);
    check(answer);
    check(world.post(COMPLETIONS, request()).await);
    // A lead that is listed and dead.
    lead.die();
    world.set_leads(&[&lead]);
    check(world.post(COMPLETIONS, streamed()).await);
    // One that comes while the request waits.
    let asking = world.post(COMPLETIONS, request());
    let lead = Lead::start(2, script(alphabet()));
    let (answer, ()) = tokio::join!(asking, async { world.set_leads(&[&lead]) });
    answer.ok();
}

#[tokio::test]
async fn a_request_that_kills_every_lead_is_given_up() {
    let mut options = options();
    options.generation.fruitless_attempts = 2;
    let world = World::with(&[], options).await;
    // Each lead dies as soon as it has the request.
    let (mut leads, asking) = (Vec::new(), world.post(COMPLETIONS, request()));
    for epoch in 1..=3 {
        let lead = Lead::start(epoch, script(alphabet()));
        lead.hold_at(0);
        leads.push(lead);
    }
    let killing = async {
        for lead in &mut leads {
            world.set_leads(&[&*lead]);
            lead.until("it has the request", |lead| lead.submits().len() == 1).await;
            lead.die();
        }
    };
    let (answer, ()) = tokio::join!(asking, killing);
    assert_eq!(answer.status, 503, "{}", answer.text);
    assert!(answer.text.contains("3 times"), "{}", answer.text);
}

#[tokio::test]
async fn a_lead_s_refusal_reaches_the_client_with_its_meaning() {
    use wire::sequence_error::Kind;
    for (kind, status, code) in [
        (Kind::Invalid, 400, Value::Null),
        (Kind::Overloaded, 429, json!("queue_full")),
        (Kind::Internal, 500, json!("internal_error")),
    ] {
        let error = wire::SequenceError { kind: kind.into(), message: "because".to_owned() };
        let lead = Lead::start(1, Script { refusal: Some(error), ..script(alphabet()) });
        let world = World::start(&[&lead]).await;
        for body in [request(), streamed()] {
            let answer = world.post(COMPLETIONS, body).await;
            assert_eq!(answer.status, status, "{}", answer.text);
            assert_eq!(answer.json()["error"]["code"], code);
            assert!(answer.text.contains("because"));
            assert_eq!(answer.headers.contains_key("retry-after"), status == 429);
        }
    }
}

#[tokio::test]
async fn shutdown_finishes_what_runs_and_takes_nothing_new() {
    let lead = Lead::start(1, script(alphabet()));
    lead.hold_at(20);
    let world = World::start(&[&lead]).await;
    let mut response = world.open(COMPLETIONS, streamed()).await;
    let body = until_text(&mut response, 5).await;
    assert_eq!(world.get("/readyz").await.status, 200);
    world.shutdown.cancel();
    let deadline = Instant::now() + Duration::from_secs(5);
    while world.get("/readyz").await.status != 503 {
        assert!(Instant::now() < deadline, "never became unready");
    }
    assert_eq!(world.get("/livez").await.status, 200);
    assert_eq!(world.post(COMPLETIONS, request()).await.status, 503);
    lead.let_go();
    let (body, error) = rest(response, body).await;
    assert!(error.is_none(), "{error:?}");
    assert_eq!(text_of(&body), expected());
    let ended = tokio::time::timeout(Duration::from_secs(5), world.server).await;
    ended.expect("ends when the last request has").unwrap().unwrap();
}

#[tokio::test]
async fn shutdown_ends_what_outlasts_the_drain_with_an_error() {
    let mut options = options();
    options.drain_timeout = Duration::from_millis(200);
    let lead = Lead::start(1, script(alphabet()));
    lead.hold_at(20);
    let world = World::with(&[&lead], options).await;
    let mut response = world.open(COMPLETIONS, streamed()).await;
    let body = until_text(&mut response, 5).await;
    world.shutdown.cancel();
    let (body, error) = rest(response, body).await;
    assert!(error.is_some(), "{body}");
    let last = events(&body).pop().unwrap();
    assert_eq!(last["error"]["code"], "server_is_shutting_down");
    world.server.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_reader_too_slow_is_cancelled_and_others_go_on() {
    let mut options = options();
    options.stream.events_per_sequence = 64;
    let lead = Lead::start(1, script(alphabet()));
    let world = World::with(&[&lead], options).await;
    // Fill the socket: events are large with five rivals a token, and nobody reads.
    let mut open = Vec::new();
    for _ in 0..2 {
        let body = json!({"prompt": vec!["x"; 128], "max_tokens": 500, "stream": true,
                          "logprobs": 5, "temperature": 0});
        open.push(world.open(COMPLETIONS, body).await);
    }
    lead.until("unread sequences are cancelled", |lead| lead.n_cancels() > 0).await;
    world.post(COMPLETIONS, request()).await.ok();
}
