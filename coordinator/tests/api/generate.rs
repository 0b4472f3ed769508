//! What a request gets when nothing goes wrong.

use serde_json::{Value, json};

use crate::lead::Lead;
use crate::world::{World, alphabet, script, user};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

fn deltas(events: &[Value], index: u64) -> String {
    let choices = events.iter().flat_map(|event| event["choices"].as_array().unwrap());
    choices
        .filter(|choice| choice["index"] == index)
        .filter_map(|choice| choice["delta"]["content"].as_str().or(choice["text"].as_str()))
        .collect()
}

#[tokio::test]
async fn a_streamed_answer_is_the_whole_answer_in_pieces() {
    let lead = Lead::start(1, script(alphabet()));
    let world = World::start(&[&lead]).await;
    let request = json!({"messages": user("hello"), "max_tokens": 40, "seed": 5});
    let whole = world.post(CHAT, request.clone()).await.ok();
    let text = whole["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
    assert_eq!(text.len(), 40);
    assert_eq!(whole["object"], "chat.completion");
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
    assert_eq!(whole["usage"]["completion_tokens"], 40);

    let mut request = request;
    request["stream"] = json!(true);
    let answer = world.post(CHAT, request).await;
    assert_eq!(answer.headers["content-type"], "text/event-stream");
    let events = answer.events();
    assert_eq!(deltas(&events, 0), text);
    assert_eq!(events[0]["choices"][0]["delta"], json!({"role": "assistant", "content": null}));
    let reasons: Vec<&Value> =
        events.iter().map(|event| &event["choices"][0]["finish_reason"]).collect();
    let (last, before) = reasons.split_last().unwrap();
    assert_eq!(*last, "length");
    assert!(before.iter().all(|reason| reason.is_null()), "{before:?}");
    for event in &events {
        assert_eq!(event["id"], events[0]["id"]);
        assert_eq!(event["object"], "chat.completion.chunk");
        assert!(event.get("usage").is_none(), "usage was not asked for");
    }

    let request = json!({"prompt": "hello", "max_tokens": 40, "seed": 5});
    let whole = world.post(COMPLETIONS, request.clone()).await.ok();
    let text = whole["choices"][0]["text"].as_str().unwrap().to_owned();
    assert_eq!(text.len(), 40);
    let mut request = request;
    request["stream"] = json!(true);
    assert_eq!(deltas(&world.post(COMPLETIONS, request).await.events(), 0), text);
}
