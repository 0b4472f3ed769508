//! The command line as a client of a running cluster: readiness, status, and streamed answers.
//!
//! It speaks the public HTTP API only. An answer that stops early is an error here, never a short
//! answer.

use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use futures::StreamExt;
use reqwest::{Response, StatusCode};
use serde_json::{Value, json};

/// Longest wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait for a small answer.
const SHORT_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest silence within a stream; the server sends something at least this often.
const READ_TIMEOUT: Duration = Duration::from_secs(120);
/// Longest event line of a stream, bytes.
const MAX_EVENT_BYTES: usize = 4 << 20;

/// A cluster's HTTP address.
#[derive(Debug, Clone)]
pub struct Client {
    http: reqwest::Client,
    /// Without a trailing slash.
    url: String,
}

/// What a request asks for, beside its messages or prompt.
#[derive(Debug, Clone, Default)]
pub struct Sampling {
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub top_k: Option<u32>,
    pub seed: Option<u64>,
    pub max_tokens: Option<u32>,
    pub min_tokens: Option<u32>,
    pub ignore_eos: Option<bool>,
    /// OpenAI's object that says what the answer must be.
    pub response_format: Option<Value>,
}

/// The server's sentence where it would not answer.
#[derive(Debug)]
pub struct Refusal {
    pub status: u16,
    message: String,
}

impl std::error::Error for Refusal {}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

/// One event of a stream.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    Text(String),
    /// Why the answer ended: "stop" or "length".
    Finish(String),
    /// Tokens of prompt and answer.
    Usage {
        prompt: u64,
        completion: u64,
    },
}

impl Client {
    pub fn new(url: &str) -> anyhow::Result<Self> {
        let url = url.trim_end_matches('/');
        let url = url.strip_suffix("/v1").unwrap_or(url);
        let url = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
        if !url.starts_with("http://") {
            bail!("{url} cannot be reached: this client speaks http:// only");
        }
        let http = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
            .no_proxy()
            .build()
            .context("the HTTP client cannot be made")?;
        Ok(Self { http, url })
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    async fn get(&self, path: &str) -> anyhow::Result<Response> {
        let request = self.http.get(format!("{}{path}", self.url)).timeout(SHORT_TIMEOUT);
        request.send().await.map_err(|error| self.unreachable(&error))
    }

    fn unreachable(&self, error: &reqwest::Error) -> anyhow::Error {
        let why = if error.is_connect() {
            "nothing listens there; start one with `evener up --model ...`".to_owned()
        } else if error.is_timeout() {
            "it did not answer in time".to_owned()
        } else {
            chain(error)
        };
        anyhow!("no Evener cluster answers at {}: {why}", self.url)
    }

    /// Whether a model can be asked now; if not, what is missing.
    pub async fn ready(&self) -> anyhow::Result<Result<(), String>> {
        let response = self.get("/readyz").await?;
        if response.status().is_success() {
            return Ok(Ok(()));
        }
        let body: Value = response.json().await.unwrap_or_default();
        Ok(Err(message_of(&body).unwrap_or_else(|| "the cluster is not ready".to_owned())))
    }

    /// The body of `GET /status`.
    pub async fn status(&self) -> anyhow::Result<Value> {
        let response = self.get("/status").await?;
        let status = response.status();
        if !status.is_success() {
            bail!("{} answered GET /status with {status}", self.url);
        }
        response.json().await.context("the status is not JSON")
    }

    /// Names of the models served.
    pub async fn models(&self) -> anyhow::Result<Vec<String>> {
        let body: Value = refuse_errors(self.get("/v1/models").await?).await?.json().await?;
        let models = body["data"].as_array().map(Vec::as_slice).unwrap_or_default();
        Ok(models.iter().filter_map(|m| m["id"].as_str().map(str::to_owned)).collect())
    }

    /// `model`, or the one that is served.
    pub async fn model_or_only(&self, model: Option<&str>) -> anyhow::Result<String> {
        if let Some(model) = model {
            return Ok(model.to_owned());
        }
        match self.models().await?.as_slice() {
            [one] => Ok(one.clone()),
            [] => {
                let missing = self.ready().await?.err().unwrap_or_default();
                Err(anyhow!("{} serves no model yet: {missing}", self.url))
            }
            several => Err(anyhow!(
                "{} serves {}; choose one with --model",
                self.url,
                several.join(" and ")
            )),
        }
    }

    /// A streamed answer to `messages` (`[{role, content}, ...]`).
    pub async fn chat(
        &self,
        model: &str,
        messages: &Value,
        sampling: &Sampling,
    ) -> anyhow::Result<Answer> {
        let body = json!({ "model": model, "messages": messages });
        self.stream("/v1/chat/completions", body, sampling).await
    }

    /// A streamed continuation of `prompt`: text or token ids.
    pub async fn complete(
        &self,
        model: &str,
        prompt: &Value,
        sampling: &Sampling,
    ) -> anyhow::Result<Answer> {
        let body = json!({ "model": model, "prompt": prompt });
        self.stream("/v1/completions", body, sampling).await
    }

    async fn stream(
        &self,
        path: &str,
        mut body: Value,
        sampling: &Sampling,
    ) -> anyhow::Result<Answer> {
        body["stream"] = json!(true);
        body["stream_options"] = json!({ "include_usage": true });
        let fields = [
            ("temperature", sampling.temperature.map(|x| json!(x))),
            ("top_p", sampling.top_p.map(|x| json!(x))),
            ("top_k", sampling.top_k.map(|x| json!(x))),
            ("seed", sampling.seed.map(|x| json!(x))),
            ("max_tokens", sampling.max_tokens.map(|x| json!(x))),
            ("min_tokens", sampling.min_tokens.map(|x| json!(x))),
            ("ignore_eos", sampling.ignore_eos.map(|x| json!(x))),
            ("response_format", sampling.response_format.clone()),
        ];
        for (name, value) in fields {
            if let Some(value) = value {
                body[name] = value;
            }
        }
        let request = self.http.post(format!("{}{path}", self.url)).json(&body);
        let response = request.send().await.map_err(|error| self.unreachable(&error))?;
        let response = refuse_errors(response).await?;
        Ok(Answer { bytes: response.bytes_stream().boxed(), buffer: Vec::new(), finished: false })
    }
}

/// A stream of events; ends only after the server's `[DONE]`.
pub struct Answer {
    bytes: futures::stream::BoxStream<'static, reqwest::Result<bytes::Bytes>>,
    buffer: Vec<u8>,
    finished: bool,
}

impl Answer {
    /// The next events, or `None` once the answer is complete.
    ///
    /// # Errors
    /// The server's error event, or a stream that ended without `[DONE]`.
    pub async fn next(&mut self) -> anyhow::Result<Option<Vec<Event>>> {
        loop {
            if let Some(end) = self.buffer.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                match parse_line(&line, &mut self.finished)? {
                    Line::Nothing => continue,
                    Line::Events(events) => return Ok(Some(events)),
                    Line::Done => return Ok(None),
                }
            }
            if self.buffer.len() > MAX_EVENT_BYTES {
                bail!("the server sent an event of more than {MAX_EVENT_BYTES} bytes");
            }
            match self.bytes.next().await {
                Some(Ok(bytes)) => self.buffer.extend_from_slice(&bytes),
                Some(Err(error)) => {
                    bail!("the answer was interrupted: {}", chain(&error))
                }
                None => bail!("the answer was interrupted: the server closed the connection"),
            }
        }
    }

    /// The whole answer and its finish reason; each piece goes to `show` as it comes.
    pub async fn collect(mut self, mut show: impl FnMut(&str)) -> anyhow::Result<(String, String)> {
        let (mut text, mut finish) = (String::new(), String::new());
        while let Some(events) = self.next().await? {
            for event in events {
                match event {
                    Event::Text(piece) => {
                        show(&piece);
                        text.push_str(&piece);
                    }
                    Event::Finish(reason) => finish = reason,
                    Event::Usage { .. } => {}
                }
            }
        }
        Ok((text, finish))
    }
}

enum Line {
    Nothing,
    Events(Vec<Event>),
    Done,
}

fn parse_line(line: &[u8], finished: &mut bool) -> anyhow::Result<Line> {
    let line = std::str::from_utf8(line).context("the server sent an event that is not UTF-8")?;
    let Some(data) = line.trim_end().strip_prefix("data:").map(str::trim_start) else {
        return Ok(Line::Nothing);
    };
    if data == "[DONE]" {
        if !*finished {
            bail!("the answer was interrupted: the stream ended without a finish reason");
        }
        return Ok(Line::Done);
    }
    let chunk: Value =
        serde_json::from_str(data).context("the server sent an event that is not JSON")?;
    if chunk.get("error").is_some_and(|error| !error.is_null()) {
        let message = message_of(&chunk).unwrap_or_else(|| data.to_owned());
        bail!("the answer was interrupted: {message}");
    }
    let mut events = Vec::new();
    for choice in chunk["choices"].as_array().map(Vec::as_slice).unwrap_or_default() {
        let text = choice["delta"]["content"].as_str().or_else(|| choice["text"].as_str());
        if let Some(text) = text.filter(|text| !text.is_empty()) {
            events.push(Event::Text(text.to_owned()));
        }
        if let Some(reason) = choice["finish_reason"].as_str() {
            *finished = true;
            events.push(Event::Finish(reason.to_owned()));
        }
    }
    if let (Some(prompt), Some(completion)) =
        (chunk["usage"]["prompt_tokens"].as_u64(), chunk["usage"]["completion_tokens"].as_u64())
    {
        events.push(Event::Usage { prompt, completion });
    }
    Ok(if events.is_empty() { Line::Nothing } else { Line::Events(events) })
}

/// The server's sentence if it refused.
async fn refuse_errors(response: Response) -> anyhow::Result<Response> {
    let status = response.status();
    if status == StatusCode::OK {
        return Ok(response);
    }
    let text = response.text().await.unwrap_or_default();
    let body: Value = serde_json::from_str(&text).unwrap_or_default();
    let message = match message_of(&body) {
        Some(message) => format!("{message} (HTTP {})", status.as_u16()),
        None => format!("the server answered {status}: {}", text.trim()),
    };
    Err(Refusal { status: status.as_u16(), message }.into())
}

/// The sentence of an error body, or of a readiness body.
fn message_of(body: &Value) -> Option<String> {
    if let Some(message) = body["error"]["message"].as_str() {
        return Some(message.to_owned());
    }
    let missing: Vec<&str> = body["missing"].as_array()?.iter().filter_map(Value::as_str).collect();
    (!missing.is_empty()).then(|| missing.join("; "))
}

/// An error and what caused it; transport errors say little without their causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn answer(chunks: &[&str]) -> Answer {
        let chunks: Vec<_> =
            chunks.iter().map(|c| Ok(bytes::Bytes::from((*c).to_owned().into_bytes()))).collect();
        let bytes = futures::stream::iter(chunks).boxed();
        Answer { bytes, buffer: Vec::new(), finished: false }
    }

    fn collect(chunks: &[&str]) -> Result<(String, String), String> {
        futures::executor::block_on(answer(chunks).collect(|_| {})).map_err(|e| e.to_string())
    }

    const TEXT: &str = "data: {\"choices\":[{\"delta\":{\"content\":\"Par\"}}]}\n\n";
    const MORE: &str = "data: {\"choices\":[{\"text\":\"is\",\"finish_reason\":null}]}\n\n";
    const FINISH: &str = "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n";
    const DONE: &str = "data: [DONE]\n\n";

    #[test]
    fn events_may_be_cut_anywhere() {
        let whole = [": ping\n\n", TEXT, MORE, FINISH, DONE].concat();
        for at in 0..whole.len() {
            let (a, b) = whole.split_at(at);
            assert_eq!(collect(&[a, b]).unwrap(), ("Paris".to_owned(), "stop".to_owned()));
        }
    }

    #[test]
    fn an_answer_that_stops_early_is_an_error() {
        assert!(collect(&[TEXT]).unwrap_err().contains("interrupted"));
        assert!(collect(&[TEXT, DONE]).unwrap_err().contains("interrupted"));
        assert!(collect(&[TEXT, FINISH]).unwrap_err().contains("interrupted"));
        let error = "data: {\"error\":{\"message\":\"rank 1 is gone\"}}\n\n";
        assert!(collect(&[TEXT, error]).unwrap_err().contains("rank 1 is gone"));
    }
}
