//! Requests side by side, requests that nobody waits for any more, and requests that nobody should
//! send.

use evener_tests::{Cluster, ENDLESS, raw_request};
use futures::future::join_all;
use serde_json::{Value, json};

fn running(status: &Value) -> u64 {
    let workers = status["workers"].as_array().expect("a list of workers");
    workers.iter().filter_map(|w| w["load"]["running"].as_u64()).sum()
}

fn steps(status: &Value) -> u64 {
    let workers = status["workers"].as_array().expect("a list of workers");
    workers.iter().filter_map(|w| w["load"]["steps_total"].as_u64()).max().unwrap_or(0)
}

fn lead_tokens(status: &Value) -> u64 {
    let workers = status["workers"].as_array().expect("a list of workers");
    workers.iter().filter_map(|w| w["load"]["tokens_total"].as_u64()).max().unwrap_or(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_client_frees_its_sequence() {
    let cluster = Cluster::builder().start().await;
    let body = json!({
        "model": cluster.model, "prompt": ENDLESS, "max_tokens": 4000, "temperature": 0,
    });
    let mut stream = cluster.api.stream("/v1/completions", &body).await;
    stream.next().await.expect("a first event");
    cluster.api.until("the sequence runs", |status| running(status) == 1).await;
    drop(stream);
    cluster.api.until("the sequence is gone", |status| running(status) == 0).await;
    let status = cluster.api.status().await;
    let lead = cluster.worker(0).await;
    assert_eq!(lead["load"]["kv_blocks_free"], lead["load"]["kv_blocks_total"], "{status:#}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prompt_is_computed_once_for_a_user_and_gives_the_same_answer() {
    let cluster = Cluster::builder().workers(2).start().await;
    let prompt = "The evener shares the load of unequal horses. ".repeat(20);
    let ask = async |user: &str, tail: &str| {
        let body = json!({
            "model": cluster.model, "prompt": format!("{prompt}{tail}"), "max_tokens": 8,
            "temperature": 0, "logprobs": 2, "user": user,
        });
        let answer = cluster.api.ask("/v1/completions", &body).await;
        let usage = &answer["usage"];
        let n = |field: &Value| field.as_u64().expect("a number of tokens");
        let n_cached = n(&usage["prompt_tokens_details"]["cached_tokens"]);
        (answer["choices"].to_string(), n_cached, n(&usage["prompt_tokens"]))
    };
    let (first, n_cached, n_prompt) = ask("a", "First").await;
    assert_eq!(n_cached, 0);
    let (again, n_cached, _) = ask("a", "First").await;
    assert!(n_cached + 16 >= n_prompt, "{n_cached} of {n_prompt} tokens were cached");
    assert_eq!(again, first);
    let (_, n_cached, n_prompt) = ask("a", "Another").await;
    assert!(n_cached + 32 >= n_prompt, "{n_cached} of {n_prompt} tokens were cached");
    let (other, n_cached, _) = ask("b", "First").await;
    assert_eq!((other, n_cached), (first, 0), "users share nothing, and get the same");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_is_json_of_its_schema_and_one_that_cannot_be_is_refused() {
    let cluster = Cluster::builder().workers(2).start().await;
    let ask = |schema: &Value| {
        json!({
            "model": cluster.model, "n": 3, "seed": 5, "max_tokens": 120, "temperature": 0.8,
            "frequency_penalty": 0.2,
            "messages": [{"role": "user", "content": "Describe a horse as JSON."}],
            "response_format": {"type": "json_schema", "json_schema": {
                "name": "horse", "strict": true, "schema": schema,
            }},
        })
    };
    let schema = json!({
        "type": "object", "required": ["name", "colour", "age"], "additionalProperties": false,
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "colour": {"enum": ["schwarz", "weiß", "braun"]},
            "age": {"type": "integer", "minimum": 0, "maximum": 40},
        },
    });
    let answer = cluster.api.ask("/v1/chat/completions", &ask(&schema)).await;
    let choices = answer["choices"].as_array().expect("a list of choices");
    assert_eq!(choices.len(), 3);
    for choice in choices {
        assert_eq!(choice["finish_reason"], "stop", "{choice}");
        let text = choice["message"]["content"].as_str().expect("a text");
        let horse: Value = serde_json::from_str(text).expect("JSON");
        assert!(horse["age"].as_u64().is_some_and(|age| age <= 40), "{horse}");
        let colours = ["schwarz", "weiß", "braun"];
        assert!(horse["colour"].as_str().is_some_and(|c| colours.contains(&c)), "{horse}");
    }
    let again = cluster.api.ask("/v1/chat/completions", &ask(&schema)).await;
    assert_eq!(again["choices"], answer["choices"]);
    let (status, refused) =
        cluster.api.post("/v1/chat/completions", &ask(&json!({"type": "horse"}))).await;
    assert_eq!((status, &refused["error"]["param"]), (400, &json!("response_format")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_at_once_share_steps_and_get_the_answers_they_get_alone() {
    const TOKENS: u64 = 48;
    let cluster = Cluster::builder().shares("2:1").start().await;
    let prompts = [
        "The sea was calm and the",
        "def fibonacci(n):",
        "Water boils at",
        "My favourite colour is",
        "In the year 1900,",
        "The recipe needs two cups of",
    ];
    let body = |prompt: &str| {
        json!({
            "model": cluster.model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0,
            "logprobs": 1,
        })
    };
    let mut alone = Vec::new();
    for prompt in prompts {
        alone.push(cluster.api.ask("/v1/completions", &body(prompt)).await["choices"].clone());
    }
    let tokens: u64 = alone
        .iter()
        .map(|choices| choices[0]["logprobs"]["tokens"].as_array().map_or(0, Vec::len) as u64)
        .sum();
    assert!(tokens > 3 * TOKENS, "the prompts end too early to share anything: {tokens} tokens");
    // Load reports come each second: wait until the one that has seen all of it is in.
    let told = |status: &Value| running(status) == 0 && lead_tokens(status) >= tokens;
    let before = steps(&cluster.api.until("the answers alone are counted", told).await);

    let bodies: Vec<Value> = prompts.iter().map(|prompt| body(prompt)).collect();
    let together = join_all(bodies.iter().map(|b| cluster.api.ask("/v1/completions", b))).await;
    for (i, answer) in together.iter().enumerate() {
        assert_eq!(answer["choices"].to_string(), alone[i].to_string(), "{}", prompts[i]);
    }
    let told = |status: &Value| running(status) == 0 && lead_tokens(status) >= 2 * tokens;
    let after = steps(&cluster.api.until("the answers together are counted", told).await);
    let used = after - before;
    assert!(used * 2 < tokens, "{used} steps for {tokens} tokens: requests did not share them");
}

/// What must be refused, and the parameter that the refusal names.
fn bad_bodies(model: &str) -> Vec<(&'static str, Value, u16, &'static str)> {
    let chat = |change: &dyn Fn(&mut Value)| {
        let mut body = json!({"model": model, "messages": [{"role": "user", "content": "Hi"}]});
        change(&mut body);
        body
    };
    let set = |field: &'static str, value: Value| {
        chat(&move |body: &mut Value| body[field] = value.clone())
    };
    let long = "word ".repeat(9000);
    vec![
        ("unknown model", set("model", json!("gpt-none")), 404, "model"),
        ("model of the wrong type", set("model", json!(7)), 400, "model"),
        ("no messages", set("messages", json!([])), 400, "messages"),
        ("messages of the wrong type", set("messages", json!("Hi")), 400, "messages"),
        (
            "prompt longer than the context",
            set("messages", json!([{"role": "user", "content": long}])),
            400,
            "messages",
        ),
        ("n = 0", set("n", json!(0)), 400, "n"),
        ("n = 10^9", set("n", json!(1_000_000_000)), 400, "n"),
        ("n = 1.5", set("n", json!(1.5)), 400, "n"),
        ("negative max_tokens", set("max_tokens", json!(-1)), 400, "max_tokens"),
        ("temperature -1", set("temperature", json!(-1)), 400, "temperature"),
        ("temperature 1000", set("temperature", json!(1000)), 400, "temperature"),
        ("temperature as text", set("temperature", json!("hot")), 400, "temperature"),
        ("5 stop strings", set("stop", json!(["a", "b", "c", "d", "e"])), 400, "stop"),
        ("empty stop string", set("stop", json!([""])), 400, "stop"),
        ("unknown field", set("no_such_field", json!(1)), 400, "no_such_field"),
    ]
}

fn raw(body: &str) -> Vec<u8> {
    format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

fn error_of(answer: &str) -> (u16, Value) {
    let status = answer.split_ascii_whitespace().nth(1).and_then(|code| code.parse().ok());
    let body = answer.split_once("\r\n\r\n").map(|(_, body)| body).unwrap_or_default();
    let from = body.find('{').unwrap_or(0);
    let to = body.rfind('}').map_or(0, |at| at + 1);
    let json = serde_json::from_str(body.get(from..to).unwrap_or_default()).unwrap_or_default();
    (status.unwrap_or(0), json)
}

fn assert_error(what: &str, got: &(u16, Value), status: u16) {
    let (code, body) = got;
    assert_eq!(*code, status, "{what}: {body}");
    let error = body["error"].as_object().unwrap_or_else(|| panic!("{what}: {body}"));
    for key in ["message", "type", "param", "code"] {
        assert!(error.contains_key(key), "{what}: {key} is missing in {body}");
    }
    assert!(error["message"].as_str().is_some_and(|m| m.len() > 10), "{what}: {body}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_requests_are_refused_by_name_and_the_next_one_works() {
    let cluster = Cluster::builder().start().await;
    let good = json!({
        "model": cluster.model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2,
    });
    for (what, body, status, param) in bad_bodies(&cluster.model) {
        let got = cluster.api.post("/v1/chat/completions", &body).await;
        assert_error(what, &got, status);
        assert_eq!(got.1["error"]["param"], param, "{what}: {}", got.1);
        cluster.api.ask("/v1/chat/completions", &good).await;
    }
    let unknown = &bad_bodies(&cluster.model)[0].1;
    let (_, unknown) = cluster.api.post("/v1/chat/completions", unknown).await;
    assert!(unknown["error"]["message"].to_string().contains(&cluster.model), "{unknown}");
    let overflow = &bad_bodies(&cluster.model)[4].1;
    let (_, overflow) = cluster.api.post("/v1/chat/completions", overflow).await;
    assert_eq!(overflow["error"]["code"], "context_length_exceeded");

    let prompt = |prompt: Value| json!({"model": cluster.model, "prompt": prompt});
    for (what, ids) in [("beyond the vocabulary", json!([999_999_999])), ("negative", json!([-1]))]
    {
        let got = cluster.api.post("/v1/completions", &prompt(ids)).await;
        assert_error(what, &got, 400);
        assert_eq!(got.1["error"]["param"], "prompt", "{what}: {}", got.1);
    }

    let deep = format!("{{\"model\": {}1{}}}", "[".repeat(20_000), "]".repeat(20_000));
    for (what, bytes) in [
        ("invalid JSON", raw("{\"model\": ")),
        ("no JSON object", raw("[]")),
        ("NaN", raw("{\"model\": \"m\", \"messages\": [], \"temperature\": NaN}")),
        ("a number beyond all numbers", raw("{\"temperature\": 1e999}")),
        ("deep JSON", raw(&deep)),
    ] {
        let got = error_of(&raw_request(cluster.url(), &bytes).await);
        assert_error(what, &got, 400);
    }
    let huge = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\
                 Content-Type: application/json\r\nContent-Length: 104857600\r\n\r\n{";
    let got = error_of(&raw_request(cluster.url(), huge).await);
    assert_error("100 MB body", &got, 413);
    let unknown = cluster.api.get("/v1/nothing").await;
    assert_error("unknown path", &unknown, 404);
    let answer = raw_request(
        cluster.url(),
        b"DELETE /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    );
    assert_error("unknown method", &error_of(&answer.await), 405);

    cluster.api.ask("/v1/chat/completions", &good).await;
}
