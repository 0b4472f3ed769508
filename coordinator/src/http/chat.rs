//! `POST /v1/chat/completions`.

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use evener_telemetry::Span;
use futures::stream::{self, Stream};
use serde_json::{Value, json};

use super::answer::{self, Answer};
use super::error::Error;
use super::fields::Fields;
use super::json::kind;
use super::openai::{
    ChatChoice, ChatChunkChoice, ChatDelta, ChatLogprob, ChatLogprobs, ChatMessage, ChatToken,
    Head, Object, Usage,
};
use super::params::{self, Common};
use super::{App, json as body_json, sse};
use crate::generation::{Delta, Generation, Params};
use crate::group::stream::Token;
use crate::metrics::{Endpoint, Observation};
use crate::text::chat_template::{Message, Role};
use crate::text::output::Placed;
use crate::text::tokenizer::Tokenizer;

/// Most messages of one conversation.
const MAX_MESSAGES: usize = 4096;
const MAX_TOP_LOGPROBS: i64 = 20;
/// Longest name of a participant, in characters.
const MAX_NAME_CHARS: usize = 64;
const ROLES: &str = "`system`, `developer`, `user` or `assistant`";

struct ChatRequest {
    common: Common,
    messages: Vec<Message>,
    max_tokens: Option<u64>,
    /// Absent: none; 0: of the chosen token only.
    n_logprobs: Option<u32>,
}

/// Answers a conversation.
pub async fn create(State(app): State<App>, request: Request) -> Response {
    let observation = app.metrics.observe(Endpoint::chat_completions);
    if let Some(span) = request.extensions().get::<Span>() {
        observation.trace(span);
    }
    match respond(&app, request, observation.clone()).await {
        Ok(response) => response,
        Err(error) => {
            observation.end(error.outcome());
            error.into_response()
        }
    }
}

async fn respond(app: &App, request: Request, observation: Observation) -> Result<Response, Error> {
    let body = answer::read_body(app, request).await?;
    let request = parse(&body, app.options.max_json_depth)?;
    let n_bytes = body.len();
    drop(body);
    let permit = app.admit()?;
    let model = app.model(&request.common.model)?;
    observation.model(model.name.as_str());
    app.check_sequences(1, request.common.n)?;
    let text = app.text(&model, "messages").await?;
    let ChatRequest { common, messages, max_tokens, n_logprobs } = request;
    let prompt = {
        let text = text.clone();
        let encode = move || text.encode_chat(&messages);
        let work = move || encode().map_err(|error| Error::Text { error, param: "messages" });
        app.encode(n_bytes, work).await?
    };
    let params = Params {
        prompt,
        max_tokens,
        decoding: common.decoding.clone(),
        n_logprobs,
        prompt_logprobs: false,
        origin: app.origin(&common),
    };
    let directory = app.directory.borrow().clone();
    let generation = Generation::new(&model, &text.tokenizer, &directory, params)
        .map_err(|error| Error::Generation { error, param: "messages" })?;
    let n_prompt_tokens = generation.n_prompt_tokens();
    let generations = (0..common.n).map(|idx| generation.choice(idx)).collect();
    let answer =
        Answer::begin(app, generations, common.n, n_prompt_tokens, "messages", observation, permit)
            .await?;
    let shape = Shape {
        tokenizer: text.tokenizer.clone(),
        logprobs: n_logprobs.is_some(),
        include_usage: common.include_usage,
    };
    if common.stream {
        let head = answer::head("chatcmpl", "chat.completion.chunk", &model);
        return Ok(sse::response(shape.stream(answer, head, common.n), app.options.keepalive));
    }
    let head = answer::head("chatcmpl", "chat.completion", &model);
    shape.whole(answer, head, common.n).await
}

/// How this request wants its answer.
struct Shape {
    tokenizer: std::sync::Arc<Tokenizer>,
    logprobs: bool,
    include_usage: bool,
}

impl Shape {
    async fn whole(self, answer: Answer, head: Head, n: u32) -> Result<Response, Error> {
        let (choices, usage) = answer.collect(n as usize).await?;
        let choices = (0..)
            .zip(choices)
            .map(|(index, choice)| {
                Ok(ChatChoice {
                    index,
                    logprobs: self.logprobs(choice.tokens),
                    message: ChatMessage { role: "assistant", content: choice.text, refusal: None },
                    finish_reason: choice.finish.map(answer::reason).ok_or(Error::Defect)?,
                })
            })
            .collect::<Result<Vec<_>, Error>>()?;
        Ok(Json(Object { head, choices, usage: Some(Some(usage)) }).into_response())
    }

    fn stream(
        self,
        answer: Answer,
        head: Head,
        n: u32,
    ) -> impl Stream<Item = Result<String, Error>> + Send + Unpin + use<> {
        let opening: std::collections::VecDeque<String> = (0..n)
            .map(|index| {
                let delta = ChatDelta { role: Some("assistant"), content: Some(None) };
                let choice = ChatChunkChoice { index, delta, logprobs: None, finish_reason: None };
                self.chunk(&head, vec![choice])
            })
            .collect();
        let state = (self, answer.streamed(), head, opening, false);
        Box::pin(stream::try_unfold(
            state,
            |(shape, mut answer, head, mut opening, ended)| async move {
                if let Some(chunk) = opening.pop_front() {
                    return Ok(Some((chunk, (shape, answer, head, opening, ended))));
                }
                if ended {
                    return Ok(None);
                }
                loop {
                    let Some((idx, delta)) = answer.next().await? else {
                        if !shape.include_usage {
                            return Ok(None);
                        }
                        let chunk = shape.last_chunk(&head, answer.usage());
                        return Ok(Some((chunk, (shape, answer, head, opening, true))));
                    };
                    if let Some(choice) = shape.choice(idx as u32, delta) {
                        let chunk = shape.chunk(&head, vec![choice]);
                        return Ok(Some((chunk, (shape, answer, head, opening, ended))));
                    }
                }
            },
        ))
    }

    /// None if there is nothing to show.
    fn choice(&self, index: u32, delta: Delta) -> Option<ChatChunkChoice> {
        if delta.text.is_empty() && delta.tokens.is_empty() && delta.finish.is_none() {
            return None;
        }
        let content = if delta.text.is_empty() { None } else { Some(Some(delta.text)) };
        Some(ChatChunkChoice {
            index,
            delta: ChatDelta { role: None, content },
            logprobs: if delta.tokens.is_empty() { None } else { self.logprobs(delta.tokens) },
            finish_reason: delta.finish.map(answer::reason),
        })
    }

    fn chunk(&self, head: &Head, choices: Vec<ChatChunkChoice>) -> String {
        let usage = if self.include_usage { Some(None) } else { None };
        to_json(&Object { head: head.clone(), choices, usage })
    }

    fn last_chunk(&self, head: &Head, usage: Usage) -> String {
        let choices = Vec::<ChatChunkChoice>::new();
        to_json(&Object { head: head.clone(), choices, usage: Some(Some(usage)) })
    }

    fn logprobs(&self, tokens: Vec<Placed<Token>>) -> Option<ChatLogprobs> {
        if !self.logprobs {
            return None;
        }
        let content = tokens
            .into_iter()
            .map(|placed| ChatLogprob {
                token: self.token(placed.token.id, placed.token.logprob),
                top_logprobs: placed
                    .token
                    .top
                    .iter()
                    .map(|&(id, logprob)| self.token(id, logprob))
                    .collect(),
            })
            .collect();
        Some(ChatLogprobs { content, refusal: None })
    }

    fn token(&self, id: u32, logprob: f32) -> ChatToken {
        let bytes = self.tokenizer.token_bytes(id);
        ChatToken { token: String::from_utf8_lossy(&bytes).into_owned(), logprob, bytes }
    }
}

/// The wire types hold nothing that could fail.
pub(super) fn to_json<C: serde::Serialize>(object: &Object<C>) -> String {
    serde_json::to_string(object).expect("strings, numbers and lists always serialise")
}

fn parse(body: &[u8], max_depth: usize) -> Result<ChatRequest, Error> {
    let map = body_json::parse_object(body, max_depth)
        .map_err(|message| Error::Invalid { param: None, message })?;
    let mut fields = Fields::new("", map);
    let common = Common::take(&mut fields)?;
    let messages = messages(&mut fields)?;
    let newer = fields.integer("max_completion_tokens", 1..=i64::MAX)?;
    let older = fields.integer("max_tokens", 1..=i64::MAX)?;
    if newer.is_some() && older.is_some() && newer != older {
        let message = "`max_completion_tokens` and `max_tokens` differ; send only the first";
        return Err(Error::field("max_tokens", message));
    }
    let wanted = fields.boolean("logprobs")?.unwrap_or(false);
    let top = fields.integer("top_logprobs", 0..=MAX_TOP_LOGPROBS)?;
    if top.is_some_and(|n| n > 0) && !wanted {
        let message = "`top_logprobs` is allowed only with `\"logprobs\": true`";
        return Err(Error::field("top_logprobs", message));
    }
    refuse_unimplemented(&mut fields)?;
    let mut known = vec!["messages", "max_completion_tokens", "top_logprobs"];
    known.extend(params::KNOWN);
    fields.finish(&known)?;
    Ok(ChatRequest {
        common,
        messages,
        max_tokens: newer.or(older).and_then(|n| u64::try_from(n).ok()),
        n_logprobs: wanted.then(|| u32::try_from(top.unwrap_or(0)).unwrap_or(0)),
    })
}

fn refuse_unimplemented(fields: &mut Fields) -> Result<(), Error> {
    fields.inert("tools", &[json!([])])?;
    fields.inert("functions", &[json!([])])?;
    fields.inert("tool_choice", &[json!("none"), json!("auto")])?;
    fields.inert("function_call", &[json!("none"), json!("auto")])?;
    fields.inert("parallel_tool_calls", &[json!(true), json!(false)])?;
    fields.inert("modalities", &[json!(["text"])])?;
    let rest = [
        "audio",
        "prediction",
        "reasoning_effort",
        "verbosity",
        "web_search_options",
        "prompt_cache_retention",
        "chat_template",
        "chat_template_kwargs",
    ];
    rest.iter().try_for_each(|field| fields.inert(field, &[]))
}

fn messages(fields: &mut Fields) -> Result<Vec<Message>, Error> {
    let allowed = format!("`messages` must be an array of 1 to {MAX_MESSAGES} messages");
    let items = match fields.take("messages") {
        Some(Value::Array(items)) if (1..=MAX_MESSAGES).contains(&items.len()) => items,
        Some(Value::Array(items)) => {
            return Err(Error::field("messages", format!("{allowed}; it has {}", items.len())));
        }
        Some(other) => {
            return Err(Error::field("messages", format!("{allowed}, not {}", kind(&other))));
        }
        None => return Err(Error::field("messages", format!("{allowed}; it is missing"))),
    };
    items.into_iter().enumerate().map(|(idx, item)| message(idx, item)).collect()
}

fn message(idx: usize, item: Value) -> Result<Message, Error> {
    let name = format!("messages[{idx}]");
    let Value::Object(map) = item else {
        let message =
            format!("`{name}` must be an object with `role` and `content`, not {}", kind(&item));
        return Err(Error::field(name, message));
    };
    let mut fields = Fields::new(name, map);
    let role = match fields.take("role") {
        Some(Value::String(role)) => match role.as_str() {
            "system" | "developer" => Role::System,
            "user" => Role::User,
            "assistant" => Role::Assistant,
            "tool" | "function" => {
                let name = fields.name("role");
                let message = format!("`{name}`: tools are not supported; allowed is {ROLES}");
                return Err(Error::field(name, message));
            }
            _ => {
                let name = fields.name("role");
                let message = format!("`{name}` must be {ROLES}");
                return Err(Error::field(name, message));
            }
        },
        other => {
            let name = fields.name("role");
            let got = other.as_ref().map_or("missing", kind);
            return Err(Error::field(&name, format!("`{name}` must be {ROLES}; it is {got}")));
        }
    };
    let content = content(&mut fields)?;
    let participant = fields.label("name", MAX_NAME_CHARS)?;
    // An assistant's message may come back as the SDK gave it: with empty fields.
    fields.inert("tool_calls", &[json!([])])?;
    fields.inert("annotations", &[json!([])])?;
    for field in ["function_call", "refusal", "audio", "tool_call_id"] {
        fields.inert(field, &[])?;
    }
    fields.finish(&["role", "content", "name"])?;
    Ok(Message { role, content, name: participant })
}

/// A string, or text parts, which are joined by line breaks.
fn content(fields: &mut Fields) -> Result<String, Error> {
    let name = fields.name("content");
    let allowed = "a string or an array of `{\"type\": \"text\", \"text\": \"...\"}`";
    let parts = match fields.take("content") {
        Some(Value::String(text)) => return Ok(text),
        Some(Value::Array(parts)) if !parts.is_empty() => parts,
        other => {
            let got = match &other {
                None => "missing or null",
                Some(Value::Array(_)) => "an empty array",
                Some(value) => kind(value),
            };
            return Err(Error::field(&name, format!("`{name}` must be {allowed}; it is {got}")));
        }
    };
    let mut texts = Vec::with_capacity(parts.len());
    for (idx, part) in parts.into_iter().enumerate() {
        let name = format!("{name}[{idx}]");
        let Value::Object(map) = part else {
            let message = format!("`{name}` must be an object, not {}", kind(&part));
            return Err(Error::field(name, message));
        };
        let mut part = Fields::new(&name, map);
        if part.take("type") != Some(json!("text")) {
            let name = part.name("type");
            let message = format!("`{name}` must be \"text\": only text is supported");
            return Err(Error::field(name, message));
        }
        match part.take("text") {
            Some(Value::String(text)) => texts.push(text),
            _ => {
                let name = part.name("text");
                return Err(Error::field(&name, format!("`{name}` must be a string")));
            }
        }
        part.finish(&["type", "text"])?;
    }
    Ok(texts.join("\n"))
}
