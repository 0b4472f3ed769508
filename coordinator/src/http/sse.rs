//! An answer as server-sent events, and how one ends that cannot go on.
//!
//! Half an answer must never look like a whole one: after the error event the connection ends
//! without `[DONE]` and without the last chunk of the body, so that every client sees a failure.

use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use futures::stream::{Stream, StreamExt};

use super::error::Error;

/// Between the error event and the end of the connection: the event is to leave the socket's buffer
/// first.
const FLUSH: Duration = Duration::from_millis(100);
/// Tells proxies such as nginx not to hold events back.
const NO_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");

/// Why the body of a stream breaks off.
#[derive(Debug, thiserror::Error)]
#[error("the answer was broken off after its error event")]
struct BrokenOff;

enum State<S> {
    Running(S),
    /// The error event is out.
    Failed,
    Ended,
}

/// Sends each item as an event, and comments while there is none.
pub fn response<S>(chunks: S, keepalive: Duration) -> Response
where
    S: Stream<Item = Result<String, Error>> + Send + Unpin + 'static,
{
    let events = futures::stream::unfold(State::Running(chunks), move |state| async move {
        let mut chunks = match state {
            State::Running(chunks) => chunks,
            State::Failed => {
                tokio::time::sleep(FLUSH).await;
                return Some((Err(BrokenOff), State::Ended));
            }
            State::Ended => return None,
        };
        match tokio::time::timeout(keepalive, chunks.next()).await {
            Err(_) => Some((Ok(Bytes::from_static(b": ping\n\n")), State::Running(chunks))),
            Ok(Some(Ok(json))) => Some((Ok(event(&json)), State::Running(chunks))),
            Ok(Some(Err(error))) => Some((Ok(event(&error.body().to_string())), State::Failed)),
            Ok(None) => Some((Ok(Bytes::from_static(b"data: [DONE]\n\n")), State::Ended)),
        }
    });
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        (NO_BUFFERING, HeaderValue::from_static("no")),
    ];
    (headers, Body::from_stream(events)).into_response()
}

fn event(json: &str) -> Bytes {
    format!("data: {json}\n\n").into()
}
