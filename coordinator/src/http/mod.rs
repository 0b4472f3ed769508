//! Evener's HTTP API: OpenAI's endpoints, health, metrics and status. The only home of axum.
//!
//! One file an endpoint; openai.rs has the wire types, error.rs alone chooses a status, server.rs
//! owns the sockets.

mod answer;
mod chat;
mod completions;
mod decoding;
mod error;
mod fields;
mod health;
mod json;
mod metrics;
mod models;
mod openai;
mod params;
mod server;
mod socket;
mod sse;
mod status;
mod structure;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderName, HeaderValue};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use evener_telemetry::{Span, Tracer};
use serde_json::Value;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tower_http::catch_panic::CatchPanicLayer;

use crate::generation::{self, Runner};
use crate::group::figures;
use crate::group::handle::{Directory, Model};
use crate::group::stream::{self, Origin};
use crate::metrics::Metrics;
use crate::text;
use error::Error;
use params::Common;
pub use server::{Error as ServerError, run};

/// Bytes of a body whose prompt is encoded where it was read: within a millisecond, of which two
/// changes of threads would take a fifth.
const SHORT_BODY: usize = 2048;

/// Bounds of the API.
#[derive(Debug, Clone)]
pub struct Options {
    /// Of a request. Default 8 MiB.
    pub max_body_bytes: usize,
    /// Nesting of a request's JSON, at most 120. Default 32.
    pub max_json_depth: usize,
    /// Prompts times choices of one request. Default 128.
    pub max_sequences: usize,
    /// Being answered at once; one more is shed with 429. Default 256.
    pub max_requests: usize,
    /// Open at once; more wait to be accepted. Default 1024.
    pub max_connections: usize,
    /// For the headers of a request, the first or the next of a connection. Default 30 s.
    pub header_timeout: Duration,
    /// For the body of a request. Default 30 s.
    pub body_timeout: Duration,
    /// For a client to take what is sent to it. Default 30 s.
    pub write_timeout: Duration,
    /// Silence in a stream after which a comment is sent. Default 15 s.
    pub keepalive: Duration,
    /// On shutdown, for what is being answered. Default 30 s.
    pub drain_timeout: Duration,
    /// Requests of different users share what is cached of equal prompts. One user can then tell,
    /// by the time an answer takes, what others asked. Default: they do not.
    pub share_prefixes: bool,
    /// Takes the spans of requests that are traced; off by default.
    pub tracer: Tracer,
    pub generation: generation::Options,
    pub stream: stream::Options,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            max_body_bytes: 8 << 20,
            max_json_depth: 32,
            max_sequences: 128,
            max_requests: 256,
            max_connections: 1024,
            header_timeout: Duration::from_secs(30),
            body_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(30),
            keepalive: Duration::from_secs(15),
            drain_timeout: Duration::from_secs(30),
            share_prefixes: false,
            tracer: Tracer::default(),
            generation: generation::Options::default(),
            stream: stream::Options::default(),
        }
    }
}

/// What the API knows of the cluster.
#[derive(Debug, Clone)]
pub struct View {
    pub directory: watch::Receiver<Arc<Directory>>,
    /// The body of `GET /status`.
    pub status: watch::Receiver<Arc<Value>>,
    /// For `GET /metrics`.
    pub figures: watch::Receiver<Arc<[figures::Group]>>,
}

/// What every endpoint can reach; cheap to clone.
#[derive(Clone)]
pub(crate) struct App {
    options: Arc<Options>,
    directory: watch::Receiver<Arc<Directory>>,
    status: watch::Receiver<Arc<Value>>,
    runner: Runner,
    texts: text::Cache,
    metrics: Metrics,
    /// One permit a request being answered.
    requests: Arc<Semaphore>,
    /// One permit a prompt being encoded: more at once than cores would only take memory.
    encoders: Arc<Semaphore>,
    draining: Arc<AtomicBool>,
}

impl App {
    fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// A place among the requests being answered.
    fn admit(&self) -> Result<OwnedSemaphorePermit, Error> {
        if self.is_draining() {
            return Err(Error::Draining);
        }
        let limit = self.options.max_requests;
        self.requests.clone().try_acquire_owned().map_err(|_| Error::TooManyRequests { limit })
    }

    fn model(&self, name: &str) -> Result<Arc<Model>, Error> {
        let directory = self.directory.borrow().clone();
        if directory.models.is_empty() {
            let mut missing = directory.missing.clone();
            if missing.is_empty() {
                missing.push("no model is served yet".to_owned());
            }
            return Err(Error::NotReady { missing });
        }
        let found = directory.models.values().find(|model| model.name.as_str() == name);
        found.cloned().ok_or_else(|| Error::UnknownModel {
            // The sender's text: shown short and escaped.
            asked: name.chars().take(128).flat_map(char::escape_default).collect(),
            known: directory.models.keys().map(ToString::to_string).collect(),
        })
    }

    fn origin(&self, common: &Common) -> Origin {
        let Common { user, cache_salt, priority, .. } = common;
        let salt = match self.options.share_prefixes {
            true => cache_salt.clone(),
            // Neither holds a control character, so no two pairs give one salt.
            false => format!("{user}\n{cache_salt}"),
        };
        Origin { user: user.clone(), salt, priority: *priority }
    }

    async fn text(
        &self,
        model: &Arc<Model>,
        param: &'static str,
    ) -> Result<Arc<text::ModelText>, Error> {
        let directory = self.directory.borrow().clone();
        let text = self.texts.get(model, directory.models.values()).await;
        text.map_err(|error| Error::Text { error, param })
    }

    /// Does the work on a prompt that came in `n_bytes`: off the runtime, unless it is short.
    async fn encode<T: Send + 'static>(
        &self,
        n_bytes: usize,
        work: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        if n_bytes <= SHORT_BODY {
            return work();
        }
        let _permit = self.encoders.acquire().await.map_err(|_| Error::Defect)?;
        tokio::task::spawn_blocking(work).await.map_err(|_| Error::Defect)?
    }

    fn check_sequences(&self, n_prompts: usize, n: u32) -> Result<(), Error> {
        let most = self.options.max_sequences;
        if n_prompts.saturating_mul(n as usize) <= most {
            return Ok(());
        }
        let message = format!("{n_prompts} prompts of `n` = {n} choices; at most {most} in all");
        Err(Error::field(if n_prompts > 1 { "prompt" } else { "n" }, message))
    }
}

fn router(app: App) -> Router {
    let tracer = app.options.tracer.clone();
    Router::new()
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/completions", post(completions::create))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::retrieve))
        .route("/livez", get(health::livez))
        .route("/readyz", get(health::readyz))
        .route("/metrics", get(metrics::show))
        .route("/status", get(status::show))
        .fallback(unknown_path)
        .method_not_allowed_fallback(unknown_method)
        .layer(CatchPanicLayer::custom(|_| Error::Defect.into_response()))
        .layer(middleware::from_fn_with_state(tracer, identify))
        .with_state(app)
}

async fn unknown_path(request: Request) -> Error {
    let path = request.uri().path().chars().take(128).flat_map(char::escape_default).collect();
    Error::UnknownPath { path }
}

async fn unknown_method(request: Request) -> Error {
    Error::UnknownMethod { method: request.method().as_str().chars().take(32).collect() }
}

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const MAX_REQUEST_ID_LEN: usize = 128;

/// Gives every response an id: the request's own, if it is a decent one; and a sampled request its
/// span, which ends when nobody works on the request any more.
async fn identify(State(tracer): State<Tracer>, mut request: Request, next: Next) -> Response {
    let decent = |value: &&HeaderValue| {
        let allowed = |b: &u8| b.is_ascii_alphanumeric() || b"-_.:".contains(b);
        (1..=MAX_REQUEST_ID_LEN).contains(&value.len()) && value.as_bytes().iter().all(allowed)
    };
    let id = request.headers().get(REQUEST_ID).filter(decent).cloned().unwrap_or_else(|| {
        let id = format!("req-{}", uuid::Uuid::new_v4().simple());
        HeaderValue::try_from(id).unwrap_or_else(|_| HeaderValue::from_static("req"))
    });
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let started = std::time::Instant::now();
    let span = begin_span(&tracer, &request, &id);
    if let Some(span) = &span {
        request.extensions_mut().insert(span.clone());
    }
    let mut response = next.run(request).await;
    if let Some(span) = span {
        let status = response.status();
        span.set("http.response.status_code", u64::from(status.as_u16()));
        if status.is_server_error() {
            span.fail();
        }
    }
    tracing::debug!(
        request_id = id.to_str().unwrap_or(""),
        %method,
        path = %path.escape_debug(),
        status = response.status().as_u16(),
        ms = started.elapsed().as_millis() as u64,
        "answered"
    );
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

/// Of a request that is sampled.
fn begin_span(tracer: &Tracer, request: &Request, id: &HeaderValue) -> Option<Span> {
    let (name, route) = match (request.method().as_str(), request.uri().path()) {
        ("POST", "/v1/chat/completions") => ("POST /v1/chat/completions", "/v1/chat/completions"),
        ("POST", "/v1/completions") => ("POST /v1/completions", "/v1/completions"),
        _ => return None,
    };
    let traceparent = request.headers().get("traceparent").and_then(|value| value.to_str().ok());
    let span = tracer.request(name, traceparent)?;
    span.set("http.route", route);
    span.set("evener.request_id", id.to_str().unwrap_or_default().to_owned());
    Some(span)
}
