//! Every answer that is a refusal, and the only place where a status is chosen.
//!
//! The body is OpenAI's: `{"error":{"message","type","param","code"}}`, all four keys always there.
//! No address, path or prompt text goes in.

use axum::Json;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::metrics::Outcome;
use crate::{generation, text};

const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");
/// Seconds a client should wait for a group or a place in the queue.
const RETRY_AFTER_S: u32 = 1;

/// Why a request is refused, as its sender should see it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The body or one of its fields.
    #[error("{message}")]
    Invalid { param: Option<String>, message: String },
    #[error("the model `{asked}` does not exist here; {}", served(known))]
    UnknownModel { asked: String, known: Vec<String> },
    #[error("there is no {path}; see /v1/chat/completions, /v1/completions and /v1/models")]
    UnknownPath { path: String },
    #[error("this path does not take {method}")]
    UnknownMethod { method: String },
    #[error("the body is larger than {limit} bytes")]
    BodyTooLarge { limit: usize },
    #[error("the body did not arrive within {seconds} s")]
    BodyTooSlow { seconds: u64 },
    #[error("{limit} requests are being answered, no more are taken; try again")]
    TooManyRequests { limit: usize },
    #[error("not ready: {}", missing.join("; "))]
    NotReady { missing: Vec<String> },
    #[error("this server is shutting down")]
    Draining,
    /// `param` is the field that the prompt came in.
    #[error("{error}")]
    Generation { error: generation::Error, param: &'static str },
    #[error("{error}")]
    Text { error: text::Error, param: &'static str },
    #[error("a defect of this server; its log has the details under this request's x-request-id")]
    Defect,
}

fn served(known: &[String]) -> String {
    match known {
        [] => "no model is served yet".to_owned(),
        names => format!("the models are: {}", names.join(", ")),
    }
}

impl Error {
    /// A field that is not as it should be.
    pub fn field(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Invalid { param: Some(param.into()), message: message.into() }
    }

    fn class(&self) -> Class {
        use StatusCode as S;
        use generation::Error as G;
        match self {
            Self::Invalid { param, .. } => Class::invalid(param.as_deref(), None),
            Self::UnknownModel { .. } => Class {
                status: S::NOT_FOUND,
                ..Class::invalid(Some("model"), Some("model_not_found"))
            },
            Self::UnknownPath { .. } => Class::status(S::NOT_FOUND),
            Self::UnknownMethod { .. } => Class::status(S::METHOD_NOT_ALLOWED),
            Self::BodyTooLarge { .. } => Class::status(S::PAYLOAD_TOO_LARGE),
            Self::BodyTooSlow { .. } => Class::status(S::REQUEST_TIMEOUT),
            Self::TooManyRequests { .. } => Class::shed(),
            Self::NotReady { .. } => Class::unavailable("not_ready"),
            Self::Draining => Class::unavailable("server_is_shutting_down"),
            Self::Defect => Class::defect(),
            Self::Text { error, param } => match error {
                text::Error::TooLong { .. } => {
                    Class::invalid(Some(param), Some("context_length_exceeded"))
                }
                text::Error::NoTemplate { .. }
                | text::Error::Template(
                    text::chat_template::Error::Raised { .. }
                    | text::chat_template::Error::OutOfFuel
                    | text::chat_template::Error::Failed { .. },
                )
                | text::Error::Tokenizer(
                    text::tokenizer::Error::Unencodable { .. } | text::tokenizer::Error::NoMark,
                ) => Class::invalid(Some(param), None),
                text::Error::Template(
                    text::chat_template::Error::TooLong { .. }
                    | text::chat_template::Error::Uncompilable { .. },
                )
                | text::Error::Tokenizer(text::tokenizer::Error::Unreadable { .. })
                | text::Error::Died { .. } => Class::defect(),
            },
            Self::Generation { error, param } => match error {
                G::EmptyPrompt | G::UnknownToken { .. } => Class::invalid(Some(param), None),
                G::Field { field, .. } => Class::invalid(Some(field), None),
                G::MinTokens { .. } => Class::invalid(Some("min_tokens"), None),
                G::ContextLength { .. } => {
                    Class::invalid(Some(param), Some("context_length_exceeded"))
                }
                G::KvBlocks { .. } => Class::invalid(Some(param), Some("kv_cache_exceeded")),
                G::Invalid { .. } => Class::invalid(None, None),
                G::NotReady { .. } | G::Lost { .. } => Class::unavailable("server_is_overloaded"),
                G::ShuttingDown => Class::unavailable("server_is_shutting_down"),
                G::Deadline { .. } => {
                    Class { retry: Retry::Never, ..Class::unavailable("deadline_exceeded") }
                }
                G::SlowReader { .. } => Class::invalid(None, Some("slow_reader")),
                G::Overloaded { .. } => Class::shed(),
                G::Internal { .. } => Class::defect(),
            },
        }
    }

    /// What the metrics call it, when it is the answer.
    #[must_use]
    pub fn outcome(&self) -> Outcome {
        match self.class().status {
            StatusCode::TOO_MANY_REQUESTS => Outcome::shed,
            StatusCode::SERVICE_UNAVAILABLE => Outcome::unavailable,
            status if status.is_client_error() => Outcome::invalid,
            _ => Outcome::failed,
        }
    }

    /// OpenAI's error object, also for an event in a stream.
    #[must_use]
    pub fn body(&self) -> Value {
        let class = self.class();
        json!({"error": {
            "message": self.to_string(),
            "type": class.kind,
            "param": class.param,
            "code": class.code,
        }})
    }
}

enum Retry {
    /// As the status says.
    Default,
    After,
    Never,
}

struct Class {
    status: StatusCode,
    kind: &'static str,
    param: Option<String>,
    code: Option<&'static str>,
    retry: Retry,
}

impl Class {
    fn status(status: StatusCode) -> Self {
        Self { status, ..Self::invalid(None, None) }
    }

    fn invalid(param: Option<&str>, code: Option<&'static str>) -> Self {
        Self {
            status: StatusCode::BAD_REQUEST,
            kind: "invalid_request_error",
            param: param.map(str::to_owned),
            code,
            retry: Retry::Default,
        }
    }

    fn shed() -> Self {
        Self {
            status: StatusCode::TOO_MANY_REQUESTS,
            kind: "rate_limit_error",
            param: None,
            code: Some("queue_full"),
            retry: Retry::After,
        }
    }

    fn unavailable(code: &'static str) -> Self {
        Self {
            status: StatusCode::SERVICE_UNAVAILABLE,
            kind: "service_unavailable_error",
            param: None,
            code: Some(code),
            retry: Retry::After,
        }
    }

    fn defect() -> Self {
        Self {
            status: StatusCode::INTERNAL_SERVER_ERROR,
            kind: "server_error",
            param: None,
            code: Some("internal_error"),
            retry: Retry::Never,
        }
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let class = self.class();
        // Probes ask again and again; the supervisor has said why it is not ready.
        let is_probe = matches!(self, Self::NotReady { .. });
        if class.status.is_server_error() && !is_probe {
            tracing::warn!(status = class.status.as_u16(), error = %self, "request failed");
        }
        let mut response = (class.status, Json(self.body())).into_response();
        let headers = response.headers_mut();
        match class.retry {
            Retry::Default => {}
            Retry::After => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from(RETRY_AFTER_S));
            }
            Retry::Never => {
                headers.insert(SHOULD_RETRY, HeaderValue::from_static("false"));
            }
        }
        // What is left of a body that was not read makes the connection useless.
        if matches!(self, Self::BodyTooLarge { .. } | Self::BodyTooSlow { .. }) {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}
