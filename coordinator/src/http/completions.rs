//! `POST /v1/completions`.
//!
//! The raw door: the prompt is the sender's to the last token, special tokens in its text included.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use evener_telemetry::Span;
use futures::stream::{self, Stream};
use serde_json::{Map, Value, json};

use super::answer::{self, Answer};
use super::chat::to_json;
use super::error::Error;
use super::fields::Fields;
use super::json::kind;
use super::openai::{CompletionChoice, CompletionLogprobs, Head, Object, Usage};
use super::params::{self, Common};
use super::{App, json as body_json, sse};
use crate::generation::{Delta, Generation, Params};
use crate::group::handle::Directory;
use crate::group::stream::Token;
use crate::metrics::{Endpoint, Observation};
use crate::text::output::Placed;
use crate::text::tokenizer::Tokenizer;
use crate::text::{self, ModelText};

const DEFAULT_MAX_TOKENS: i64 = 16;
const MAX_LOGPROBS: i64 = 5;

#[derive(Clone)]
enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
}

struct CompletionRequest {
    common: Common,
    prompts: Vec<Prompt>,
    max_tokens: u64,
    n_logprobs: Option<u32>,
    echo: bool,
}

/// Continues one prompt or many.
pub async fn create(State(app): State<App>, request: Request) -> Response {
    let observation = app.metrics.observe(Endpoint::completions);
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
    app.check_sequences(request.prompts.len(), request.common.n)?;
    let text = app.text(&model, "prompt").await?;
    let CompletionRequest { common, prompts, max_tokens, n_logprobs, echo } = request;
    let directory = app.directory.borrow().clone();
    let params = Params {
        prompt: Vec::new(),
        max_tokens: Some(max_tokens),
        decoding: common.decoding.clone(),
        n_logprobs,
        prompt_logprobs: echo && n_logprobs.is_some(),
        origin: app.origin(&common),
    };
    let prepared = {
        let (text, model) = (text.clone(), model.clone());
        let prepare = move || {
            prompts
                .into_iter()
                .map(|prompt| prepare(&model, &text, &directory, prompt, params.clone(), echo))
                .collect::<Result<Vec<_>, Error>>()
        };
        app.encode(n_bytes, prepare).await?
    };
    let n_prompt_tokens = prepared.iter().map(|(one, _)| one.n_prompt_tokens()).sum();
    let mut generations = Vec::new();
    let mut choices = Vec::new();
    for (generation, echo) in prepared {
        for idx in 0..common.n {
            generations.push(generation.choice(idx));
            choices.push(Choice { echo: echo.clone(), n_echo_chars: 0 });
        }
    }
    let answer =
        Answer::begin(app, generations, common.n, n_prompt_tokens, "prompt", observation, permit)
            .await?;
    let head = answer::head("cmpl", "text_completion", &model);
    let shape = Shape {
        tokenizer: text.tokenizer.clone(),
        logprobs: n_logprobs.is_some(),
        include_usage: common.include_usage,
        choices,
    };
    if common.stream {
        return Ok(sse::response(shape.stream(answer, head), app.options.keepalive));
    }
    shape.whole(answer, head).await
}

/// The prompt as it is shown before its completion.
struct Echo {
    ids: Vec<u32>,
    text: String,
}

fn prepare(
    model: &Arc<crate::group::handle::Model>,
    text: &ModelText,
    directory: &Directory,
    prompt: Prompt,
    mut params: Params,
    echo: bool,
) -> Result<(Generation, Option<Arc<Echo>>), Error> {
    let refuse = |error: text::Error| Error::Text { error, param: "prompt" };
    let (ids, shown) = match prompt {
        Prompt::Text(prompt) => (text.encode_prompt(&prompt).map_err(refuse)?, Some(prompt)),
        Prompt::Tokens(ids) => (ids, None),
    };
    params.prompt = ids.clone();
    let generation = Generation::new(model, &text.tokenizer, directory, params)
        .map_err(|error| Error::Generation { error, param: "prompt" })?;
    if !echo {
        return Ok((generation, None));
    }
    let text = match shown {
        Some(prompt) => prompt,
        None => text.tokenizer.decode(&ids, false).map_err(|e| refuse(e.into()))?,
    };
    Ok((generation, Some(Arc::new(Echo { ids, text }))))
}

struct Choice {
    /// Until it is shown.
    echo: Option<Arc<Echo>>,
    n_echo_chars: usize,
}

/// How this request wants its answer.
struct Shape {
    tokenizer: Arc<Tokenizer>,
    logprobs: bool,
    include_usage: bool,
    choices: Vec<Choice>,
}

impl Shape {
    async fn whole(mut self, answer: Answer, head: Head) -> Result<Response, Error> {
        let (collected, usage) = answer.collect(self.choices.len()).await?;
        let mut choices = Vec::with_capacity(collected.len());
        for (idx, choice) in collected.into_iter().enumerate() {
            let delta = Delta {
                prompt_tokens: choice.prompt_tokens,
                text: choice.text,
                tokens: choice.tokens,
                n_generated: 0,
                n_cached: 0,
                finish: Some(choice.finish.ok_or(Error::Defect)?),
                lead_time: None,
            };
            choices.push(self.choice(idx, delta));
        }
        Ok(Json(Object { head, choices, usage: Some(Some(usage)) }).into_response())
    }

    fn stream(
        self,
        answer: Answer,
        head: Head,
    ) -> impl Stream<Item = Result<String, Error>> + Send + Unpin + use<> {
        let state = (self, answer.streamed(), head, false);
        Box::pin(stream::try_unfold(state, |(mut shape, mut answer, head, ended)| async move {
            if ended {
                return Ok(None);
            }
            loop {
                let Some((idx, delta)) = answer.next().await? else {
                    if !shape.include_usage {
                        return Ok(None);
                    }
                    let chunk = shape.last_chunk(&head, answer.usage());
                    return Ok(Some((chunk, (shape, answer, head, true))));
                };
                let silent = delta.text.is_empty()
                    && delta.tokens.is_empty()
                    && delta.prompt_tokens.is_empty()
                    && delta.finish.is_none();
                if !silent {
                    let choices = vec![shape.choice(idx, delta)];
                    let usage = if shape.include_usage { Some(None) } else { None };
                    let chunk = to_json(&Object { head: head.clone(), choices, usage });
                    return Ok(Some((chunk, (shape, answer, head, ended))));
                }
            }
        }))
    }

    fn last_chunk(&self, head: &Head, usage: Usage) -> String {
        let choices = Vec::<CompletionChoice>::new();
        to_json(&Object { head: head.clone(), choices, usage: Some(Some(usage)) })
    }

    /// One choice of an answer or a chunk; the first of each index shows the prompt, if that is to
    /// be echoed.
    fn choice(&mut self, idx: usize, delta: Delta) -> CompletionChoice {
        let mut text = String::new();
        let mut logprobs = CompletionLogprobs::default();
        if let Some(echo) = self.choices[idx].echo.take() {
            text.push_str(&echo.text);
            self.choices[idx].n_echo_chars = echo.text.chars().count();
            if self.logprobs {
                self.echo_logprobs(&mut logprobs, &echo, &delta.prompt_tokens);
            }
        }
        text.push_str(&delta.text);
        let n_before = self.choices[idx].n_echo_chars;
        if self.logprobs {
            for Placed { token, offset_chars } in &delta.tokens {
                self.add(&mut logprobs, token.id, Some(token), n_before + offset_chars);
            }
        }
        CompletionChoice {
            index: u32::try_from(idx).unwrap_or(u32::MAX),
            text,
            logprobs: self.logprobs.then_some(logprobs),
            finish_reason: delta.finish.map(answer::reason),
        }
    }

    fn echo_logprobs(&self, logprobs: &mut CompletionLogprobs, echo: &Echo, known: &[Token]) {
        let mut decoder = self.tokenizer.decoder(false);
        let mut n_chars = 0;
        for (idx, &id) in echo.ids.iter().enumerate() {
            let known = idx.checked_sub(1).and_then(|before| known.get(before));
            self.add(logprobs, id, known, n_chars);
            n_chars += decoder.push(id).chars().count();
        }
    }

    fn add(&self, logprobs: &mut CompletionLogprobs, id: u32, known: Option<&Token>, at: usize) {
        logprobs.tokens.push(self.show(id));
        logprobs.token_logprobs.push(known.map(|token| token.logprob));
        logprobs.top_logprobs.push(known.map(|token| {
            let mut top = Map::new();
            let own = (token.id, token.logprob);
            // Best first; the token itself is always among them.
            for &(id, logprob) in token.top.iter().chain([&own]) {
                top.entry(self.show(id)).or_insert_with(|| json!(logprob));
            }
            top
        }));
        logprobs.text_offset.push(at);
    }

    /// A token as text; one that is half a character, in OpenAI's notation for bytes.
    fn show(&self, id: u32) -> String {
        let bytes = self.tokenizer.token_bytes(id);
        match String::from_utf8(bytes) {
            Ok(text) => text,
            Err(e) => {
                let hex = e.as_bytes().iter().map(|byte| format!("\\x{byte:02x}"));
                format!("bytes:{}", hex.collect::<String>())
            }
        }
    }
}

fn parse(body: &[u8], max_depth: usize) -> Result<CompletionRequest, Error> {
    let map = body_json::parse_object(body, max_depth)
        .map_err(|message| Error::Invalid { param: None, message })?;
    let mut fields = Fields::new("", map);
    let common = Common::take(&mut fields)?;
    let prompts = prompts(&mut fields)?;
    let max_tokens = fields.integer("max_tokens", 0..=i64::MAX)?.unwrap_or(DEFAULT_MAX_TOKENS);
    let n_logprobs = fields.integer("logprobs", 0..=MAX_LOGPROBS)?;
    let echo = fields.boolean("echo")?.unwrap_or(false);
    fields.inert("best_of", &[json!(1)])?;
    fields.inert("suffix", &[json!("")])?;
    let mut known = vec!["prompt", "echo", "best_of", "suffix"];
    known.extend(params::KNOWN);
    fields.finish(&known)?;
    Ok(CompletionRequest {
        common,
        prompts,
        max_tokens: u64::try_from(max_tokens).unwrap_or(0),
        n_logprobs: n_logprobs.and_then(|n| u32::try_from(n).ok()),
        echo,
    })
}

const PROMPT_FORMS: &str =
    "a string, an array of strings, an array of token ids, or an array of such arrays";

fn prompts(fields: &mut Fields) -> Result<Vec<Prompt>, Error> {
    let refuse = |got: &str| {
        Error::field(
            "prompt",
            format!("`prompt` must be {PROMPT_FORMS}, none of them empty; {got}"),
        )
    };
    let items = match fields.take("prompt") {
        Some(Value::String(text)) => return Ok(vec![Prompt::Text(text)]),
        Some(Value::Array(items)) => items,
        Some(other) => return Err(refuse(&format!("it is {}", kind(&other)))),
        None => return Err(refuse("it is missing")),
    };
    match items.first() {
        None => Err(refuse("it is an empty array")),
        Some(Value::Number(_)) => Ok(vec![tokens("prompt", items)?]),
        Some(_) => items
            .into_iter()
            .enumerate()
            .map(|(idx, item)| match item {
                Value::String(text) => Ok(Prompt::Text(text)),
                Value::Array(ids) if ids.is_empty() => {
                    Err(refuse(&format!("number {idx} is an empty array")))
                }
                Value::Array(ids) => tokens(&format!("prompt[{idx}]"), ids),
                other => Err(refuse(&format!("number {idx} is {}", kind(&other)))),
            })
            .collect(),
    }
}

fn tokens(name: &str, ids: Vec<Value>) -> Result<Prompt, Error> {
    let ids = ids.into_iter().enumerate().map(|(idx, id)| {
        id.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| {
            let got = if id.is_i64() || id.is_u64() { id.to_string() } else { kind(&id).into() };
            let message = format!("`{name}[{idx}]` must be a token id of the model; it is {got}");
            Error::field("prompt", message)
        })
    });
    Ok(Prompt::Tokens(ids.collect::<Result<_, _>>()?))
}
