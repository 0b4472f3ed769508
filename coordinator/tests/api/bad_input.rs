//! Every bad request gets a 4xx in OpenAI's shape that names the field; the next good one works.

use serde_json::{Value, json};

use crate::lead::Lead;
use crate::tiny;
use crate::world::{Answer, CONTEXT, MODEL, World, alphabet, script, user};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

fn check_shape(answer: &Answer, status: u16) -> Value {
    assert_eq!(answer.status, status, "{}", answer.text);
    assert!(answer.headers.contains_key("x-request-id"));
    assert_eq!(answer.headers["content-type"], "application/json");
    let body = answer.json();
    let error = body["error"].as_object().unwrap_or_else(|| panic!("{body}"));
    let keys: Vec<&str> = error.keys().map(String::as_str).collect();
    assert_eq!(keys, ["message", "type", "param", "code"], "{body}");
    assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()));
    assert!(error["code"].is_string() || error["code"].is_null());
    assert_eq!(error["type"], "invalid_request_error", "{body}");
    body["error"].clone()
}

/// A good request, after a bad one.
async fn check_alive(world: &World) {
    let whole = world.post(COMPLETIONS, json!({"prompt": [1], "max_tokens": 2})).await.ok();
    assert_eq!(whole["usage"]["completion_tokens"], 2);
}

async fn check_table(path: &str, good: Value, table: Vec<(Value, &str)>) {
    let lead = Lead::start(1, script(alphabet()));
    let world = World::start(&[&lead]).await;
    world.post(path, good.clone()).await.ok();
    let n_submits = lead.submits().len();
    for (change, param) in table {
        let mut body = good.clone();
        for (key, value) in change.as_object().unwrap() {
            body[key] = value.clone();
        }
        let error = check_shape(&world.post(path, body).await, 400);
        assert_eq!(error["param"], param, "{change}: {error}");
    }
    assert_eq!(lead.submits().len(), n_submits, "a bad request reached the lead");
    check_alive(&world).await;
    assert_eq!(world.get("/readyz").await.status, 200);
    assert_eq!(world.metric("evener_requests_running").await, 0.0);
}

#[tokio::test]
async fn bad_fields_of_chat_are_named() {
    let good = json!({"messages": user("hi"), "max_tokens": 2});
    let message = |message: Value| json!({"messages": [message]});
    let with = |key: &str, value: Value| {
        let mut one = json!({"role": "user", "content": "x"});
        one[key] = value;
        json!({"messages": [one]})
    };
    let part = |part: Value| json!({"messages": [{"role": "user", "content": [part]}]});
    let table = vec![
        (json!({"messages": null}), "messages"),
        (json!({"messages": "hi"}), "messages"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": {}}), "messages"),
        (json!({"messages": vec![json!({"role": "user", "content": "x"}); 5000]}), "messages"),
        (message(json!(123)), "messages[0]"),
        (message(json!({})), "messages[0].role"),
        (with("role", json!(123)), "messages[0].role"),
        (with("role", json!("king")), "messages[0].role"),
        (with("role", json!("tool")), "messages[0].role"),
        (with("content", json!(123)), "messages[0].content"),
        (with("content", json!(null)), "messages[0].content"),
        (with("content", json!([])), "messages[0].content"),
        (with("content", json!({})), "messages[0].content"),
        (with("name", json!(3)), "messages[0].name"),
        (with("name", json!("a\nb")), "messages[0].name"),
        (with("tool_calls", json!([{}])), "messages[0].tool_calls"),
        (with("colour", json!("red")), "messages[0].colour"),
        (part(json!(3)), "messages[0].content[0]"),
        (
            part(json!({"type": "image_url", "image_url": {"url": "file://../x"}})),
            "messages[0].content[0].type",
        ),
        (part(json!({"type": "text"})), "messages[0].content[0].text"),
        (part(json!({"type": "text", "text": "x", "x": 1})), "messages[0].content[0].x"),
        (json!({"messages": user("forbidden")}), "messages"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"max_tokens": -5}), "max_tokens"),
        (json!({"max_tokens": 1.5}), "max_tokens"),
        (json!({"max_tokens": "1"}), "max_tokens"),
        (json!({"max_completion_tokens": 0}), "max_completion_tokens"),
        (json!({"max_completion_tokens": 3}), "max_tokens"),
        (json!({"top_logprobs": 21, "logprobs": true}), "top_logprobs"),
        (json!({"top_logprobs": -1, "logprobs": true}), "top_logprobs"),
        (json!({"top_logprobs": 1}), "top_logprobs"),
        (json!({"logprobs": 3}), "logprobs"),
        (json!({"n": 0}), "n"),
        (json!({"n": 1_000_000_000}), "n"),
        (json!({"temperature": -1}), "temperature"),
        (json!({"temperature": 1000}), "temperature"),
        (json!({"stop": ["a", "b", "c", "d", "e"]}), "stop"),
        (json!({"stream_options": {"include_usage": true}}), "stream_options"),
        (json!({"tools": [{"type": "function", "function": {"name": "f"}}]}), "tools"),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (json!({"response_format": {"type": "xml"}}), "response_format.type"),
        (json!({"guided_regex": "a", "guided_choice": ["a"]}), "guided_choice"),
        (json!({"guided_regex": "a", "ignore_eos": true}), "ignore_eos"),
        (json!({"response_format": 3}), "response_format"),
        (json!({"logit_bias": {"267": 1}}), "logit_bias"),
        (json!({"stop_token_ids": [267]}), "stop_token_ids"),
        (json!({"min_tokens": 3}), "min_tokens"),
        (json!({"presence_penalty": 2.1}), "presence_penalty"),
        (json!({"top_logprobs": 21, "logprobs": true}), "top_logprobs"),
        (json!({"modalities": ["audio"]}), "modalities"),
        (json!({"audio": {"voice": "x"}}), "audio"),
        (json!({"reasoning_effort": "low"}), "reasoning_effort"),
        (json!({"chat_template": "{{ x }}"}), "chat_template"),
        (json!({"chat_template_kwargs": {"messages": []}}), "chat_template_kwargs"),
        (json!({"prompt": "x"}), "prompt"),
        (json!({"echo": true}), "echo"),
    ];
    check_table(CHAT, good, table).await;
}

#[tokio::test]
async fn bad_fields_of_completions_are_named() {
    let good = json!({"prompt": "hi", "max_tokens": 2});
    let vocab = tiny::VOCAB_SIZE;
    let table = vec![
        (json!({"prompt": null}), "prompt"),
        (json!({"prompt": 3}), "prompt"),
        (json!({"prompt": ""}), "prompt"),
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": [[]]}), "prompt"),
        (json!({"prompt": [[[1]]]}), "prompt"),
        (json!({"prompt": [-1]}), "prompt"),
        (json!({"prompt": [vocab]}), "prompt"),
        (json!({"prompt": [4_294_967_296u64]}), "prompt"),
        (json!({"prompt": [1.5]}), "prompt"),
        (json!({"prompt": [1, "a"]}), "prompt"),
        (json!({"prompt": ["a", 1]}), "prompt"),
        (json!({"prompt": [[1], [vocab]]}), "prompt"),
        (json!({"prompt": [null]}), "prompt"),
        (json!({"prompt": vec![1; 100_000]}), "prompt"),
        (json!({"prompt": vec!["a"; 129]}), "prompt"),
        (json!({"prompt": ["a", "b"], "n": 100}), "prompt"),
        (json!({"max_tokens": -1}), "max_tokens"),
        (json!({"max_tokens": 9_223_372_036_854_775_808u64}), "max_tokens"),
        (json!({"logprobs": 6}), "logprobs"),
        (json!({"logprobs": true}), "logprobs"),
        (json!({"echo": 1}), "echo"),
        (json!({"best_of": 2}), "best_of"),
        (json!({"suffix": "x"}), "suffix"),
        (json!({"messages": user("x")}), "messages"),
        (json!({"top_logprobs": 1}), "top_logprobs"),
    ];
    check_table(COMPLETIONS, good, table).await;
}

#[tokio::test]
async fn what_is_longer_than_the_context_is_refused_in_the_words_clients_look_for() {
    let lead = Lead::start(1, script(alphabet()));
    let world = World::start(&[&lead]).await;
    let long = "x ".repeat(CONTEXT);
    for (path, body) in [
        (COMPLETIONS, json!({"prompt": vec![1; CONTEXT], "max_tokens": 1})),
        (COMPLETIONS, json!({"prompt": vec![1; CONTEXT], "max_tokens": 0, "echo": true})),
        (COMPLETIONS, json!({"prompt": vec![1; CONTEXT - 9], "max_tokens": 10})),
        (COMPLETIONS, json!({"prompt": [1], "max_tokens": i64::MAX})),
        (COMPLETIONS, json!({"prompt": long})),
        (CHAT, json!({"messages": user(&long)})),
        (CHAT, json!({"messages": user("x"), "max_completion_tokens": CONTEXT})),
    ] {
        let error = check_shape(&world.post(path, body).await, 400);
        assert_eq!(error["code"], "context_length_exceeded");
        let words = format!("This model's maximum context length is {CONTEXT} tokens. However, ");
        assert!(error["message"].as_str().unwrap().starts_with(&words), "{error}");
    }
    // One token less fits.
    let body = json!({"prompt": vec![1; CONTEXT - 9], "max_tokens": 9});
    world.post(COMPLETIONS, body).await.ok();
    let body = json!({"prompt": vec![1; CONTEXT - 1], "max_tokens": 1});
    world.post(COMPLETIONS, body).await.ok();
}

#[tokio::test]
async fn what_the_groups_cannot_hold_is_refused_with_their_size() {
    let lead = Lead::start(1, script(alphabet()));
    let world = World::start(&[&lead]).await;
    let mut directory = crate::world::directory(&[&lead]);
    let mut group = (*directory.groups[0]).clone();
    group.kv_blocks = 4; // 64 tokens
    directory.groups = vec![group.into()];
    world.directory.send_replace(directory.into());
    let body = json!({"prompt": vec![1; 60], "max_tokens": 5});
    let error = check_shape(&world.post(COMPLETIONS, body).await, 400);
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("65 tokens need 5 KV blocks"), "{message}");
    assert!(message.contains("at most 64 tokens"), "{message}");
    let body = json!({"prompt": vec![1; 60], "max_tokens": 4});
    world.post(COMPLETIONS, body).await.ok();
    // Who does not say how much gets what there is.
    let body = json!({"messages": user("x")});
    let whole = world.post(CHAT, body).await.ok();
    assert_eq!(whole["usage"]["total_tokens"], 64);
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn bodies_that_are_no_request_are_refused() {
    let lead = Lead::start(1, script(alphabet()));
    let world = World::start(&[&lead]).await;
    let deep = format!("{{\"a\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
    let objects = format!("{}1{}", "{\"a\":".repeat(100_000), "}".repeat(100_000));
    let bodies: Vec<Vec<u8>> = vec![
        b"".to_vec(),
        b"{".to_vec(),
        b"not json".to_vec(),
        b"[]".to_vec(),
        b"null".to_vec(),
        b"42".to_vec(),
        b"{\"model\":\"tiny\",\"model\":\"tiny\",\"prompt\":\"a\"}".to_vec(),
        b"{\"model\":\"tiny\",\"prompt\":\"a\"} x".to_vec(),
        b"{\"model\":\"tiny\",\"prompt\":\"a\",\"temperature\":NaN}".to_vec(),
        b"{\"model\":\"tiny\",\"prompt\":\"a\",\"temperature\":1e999}".to_vec(),
        b"{\"model\":\"tiny\",\"prompt\":\"\xff\xfe\"}".to_vec(),
        b"{\"model\":\"tiny\",\"prompt\":\"\\ud800\"}".to_vec(),
        deep.into_bytes(),
        objects.into_bytes(),
    ];
    for path in [COMPLETIONS, CHAT] {
        for body in &bodies {
            check_shape(&world.post_bytes(path, body.clone()).await, 400);
        }
    }
    check_alive(&world).await;
}

#[tokio::test]
async fn a_body_over_the_limit_is_refused_and_one_at_the_limit_is_read() {
    let lead = Lead::start(1, script(alphabet()));
    let mut options = crate::world::options();
    options.max_body_bytes = 20_000;
    let world = World::with(&[&lead], options).await;
    let body = |n: usize| {
        let head = format!("{{\"model\":\"{MODEL}\",\"prompt\":[1],\"max_tokens\":1,\"user\":\"");
        let tail = "\"}";
        format!("{head}{}{tail}{}", "u".repeat(64), " ".repeat(n - head.len() - tail.len() - 64))
    };
    world.post_bytes(COMPLETIONS, body(20_000)).await.ok();
    check_shape(&world.post_bytes(COMPLETIONS, body(20_001)).await, 413);
    // Without a length, in chunks.
    let chunked = |n: usize| {
        let pieces: Vec<Vec<u8>> = body(n).into_bytes().chunks(999).map(<[u8]>::to_vec).collect();
        reqwest::Body::wrap_stream(futures::stream::iter(
            pieces.into_iter().map(Ok::<_, std::io::Error>),
        ))
    };
    world.post_bytes(COMPLETIONS, chunked(20_000)).await.ok();
    check_shape(&world.post_bytes(COMPLETIONS, chunked(20_001)).await, 413);
    check_alive(&world).await;
}

#[tokio::test]
async fn a_hundred_megabytes_are_refused_before_they_are_read() {
    let lead = Lead::start(1, script(alphabet()));
    let world = World::start(&[&lead]).await;
    check_shape(&world.post_bytes(CHAT, vec![b' '; 100 << 20]).await, 413);
    check_alive(&world).await;
}

#[tokio::test]
async fn an_unknown_model_is_404_with_the_models_there_are() {
    let lead = Lead::start(1, script(alphabet()));
    let world = World::start(&[&lead]).await;
    let huge = "x".repeat(1_000_000);
    for name in ["nope", "../../etc/passwd", "a\nb", "", huge.as_str()] {
        for (path, mut body) in
            [(CHAT, json!({"messages": user("x")})), (COMPLETIONS, json!({"prompt": "x"}))]
        {
            body["model"] = json!(name);
            let error = check_shape(&world.post(path, body).await, 404);
            assert_eq!(
                (&error["code"], &error["param"]),
                (&json!("model_not_found"), &json!("model"))
            );
            let message = error["message"].as_str().unwrap();
            assert!(message.contains(MODEL), "{message}");
            assert!(message.len() < 1000 && !message.contains('\n'), "{message}");
        }
    }
    check_alive(&world).await;
}

#[tokio::test]
async fn a_model_without_a_template_says_where_to_go() {
    let lead = Lead::start(1, script(alphabet()));
    let world = World::start(&[&lead]).await;
    let mut directory = crate::world::directory(&[&lead]);
    let mut model = crate::world::model();
    model.chat_template = None;
    model.fingerprint = "11".to_owned();
    directory.models = [(model.name.clone(), model.into())].into();
    world.directory.send_replace(directory.into());
    let error = check_shape(&world.post(CHAT, json!({"messages": user("x")})).await, 400);
    assert!(error["message"].as_str().unwrap().contains("/v1/completions"), "{error}");
    check_alive(&world).await;
}
