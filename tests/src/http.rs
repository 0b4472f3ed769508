//! The HTTP API as a client sees it: JSON in and out, streams event by event, and raw bytes for
//! what no client would send.

use std::time::Duration;

use futures::StreamExt;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{SOON, eventually};

/// A served API.
#[derive(Debug, Clone)]
pub struct Api {
    pub url: String,
    http: reqwest::Client,
}

impl Api {
    /// # Panics
    /// No HTTP client can be made.
    #[must_use]
    pub fn at(url: &str) -> Self {
        let http = reqwest::Client::builder().no_proxy().build().expect("an HTTP client");
        Self { url: url.to_owned(), http }
    }

    /// Status and JSON of a GET; `None` if nobody answers.
    pub async fn try_get(&self, path: &str) -> Option<(u16, Value)> {
        let request = self.http.get(format!("{}{path}", self.url)).timeout(Duration::from_secs(10));
        let response = request.send().await.ok()?;
        let status = response.status().as_u16();
        Some((status, response.json().await.ok()?))
    }

    /// # Panics
    /// Nobody answers, or not with JSON.
    pub async fn get(&self, path: &str) -> (u16, Value) {
        let answer = self.try_get(path).await;
        answer.unwrap_or_else(|| panic!("GET {path} brought no JSON"))
    }

    /// Status and JSON of a POST.
    ///
    /// # Panics
    /// Nobody answers, or not with JSON.
    pub async fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let request = self.http.post(format!("{}{path}", self.url)).timeout(SOON).json(body);
        let response = request.send().await.unwrap_or_else(|e| panic!("POST {path}: {e}"));
        let status = response.status().as_u16();
        let text = response.text().await.unwrap_or_else(|e| panic!("POST {path}: {e}"));
        let json = serde_json::from_str(&text);
        (status, json.unwrap_or_else(|e| panic!("POST {path}: {e} in {text}")))
    }

    /// The answer to a request that must succeed.
    ///
    /// # Panics
    /// It does not.
    pub async fn ask(&self, path: &str, body: &Value) -> Value {
        let (status, answer) = self.post(path, body).await;
        assert_eq!(status, 200, "POST {path} {body}: {answer}");
        answer
    }

    /// Begins a stream.
    ///
    /// # Panics
    /// It is refused.
    pub async fn stream(&self, path: &str, body: &Value) -> Stream {
        let mut body = body.clone();
        body["stream"] = Value::Bool(true);
        let request = self.http.post(format!("{}{path}", self.url)).json(&body);
        let response = request.send().await.unwrap_or_else(|e| panic!("POST {path}: {e}"));
        let status = response.status().as_u16();
        if status != 200 {
            panic!("POST {path} {body}: {status} {}", response.text().await.unwrap_or_default());
        }
        let bytes = response.bytes_stream().map(|piece| piece.map(|bytes| bytes.to_vec()));
        Stream { bytes: bytes.boxed(), buffer: Vec::new() }
    }

    /// Body of `GET /status`.
    pub async fn status(&self) -> Value {
        self.get("/status").await.1
    }

    /// Waits for a state of the cluster, named for the day it does not come.
    pub async fn until(&self, what: &str, holds: impl Fn(&Value) -> bool) -> Value {
        eventually(what, SOON, || async {
            let (_, status) = self.try_get("/status").await?;
            holds(&status).then_some(status)
        })
        .await
    }

    /// Waits until the model can be asked.
    pub async fn until_ready(&self, deadline: Duration) {
        eventually("ready", deadline, || async {
            let (status, _) = self.try_get("/readyz").await?;
            (status == 200).then_some(())
        })
        .await;
    }
}

/// A stream of events being read.
pub struct Stream {
    bytes: futures::stream::BoxStream<'static, reqwest::Result<Vec<u8>>>,
    buffer: Vec<u8>,
}

/// How a stream ended.
#[derive(Debug, Clone, PartialEq)]
pub enum End {
    /// `[DONE]`.
    Done,
    /// The connection broke or was closed without it.
    Broken,
}

impl Stream {
    /// The next event's JSON, or how the stream ended.
    ///
    /// # Panics
    /// An event that is not JSON, or none within [`SOON`].
    pub async fn next(&mut self) -> Result<Value, End> {
        loop {
            if let Some(at) = self.buffer.windows(2).position(|two| two == b"\n\n") {
                let event: Vec<u8> = self.buffer.drain(..at + 2).collect();
                let event = String::from_utf8(event).expect("events are UTF-8");
                let data: String =
                    event.lines().filter_map(|line| line.strip_prefix("data:")).collect();
                match data.trim() {
                    "" => continue,
                    "[DONE]" => return Err(End::Done),
                    json => {
                        return Ok(serde_json::from_str(json)
                            .unwrap_or_else(|e| panic!("{e} in the event {json}")));
                    }
                }
            }
            let bytes = tokio::time::timeout(SOON, self.bytes.next()).await;
            match bytes.expect("a stream says something within a minute") {
                Some(Ok(bytes)) => self.buffer.extend_from_slice(&bytes),
                Some(Err(_)) | None => return Err(End::Broken),
            }
        }
    }

    /// Everything to the end: events and how it ended.
    pub async fn rest(mut self) -> (Vec<Value>, End) {
        let mut events = Vec::new();
        loop {
            match self.next().await {
                Ok(event) => events.push(event),
                Err(end) => return (events, end),
            }
        }
    }
}

/// The text of a stream's events.
#[must_use]
pub fn text_of(events: &[Value]) -> String {
    let pieces = events.iter().filter_map(|event| {
        let choice = &event["choices"][0];
        choice["delta"]["content"].as_str().or_else(|| choice["text"].as_str())
    });
    pieces.collect()
}

/// Sends bytes as they are and reads whatever comes back until the server closes or `SOON` has
/// passed.
///
/// # Panics
/// Nobody listens.
pub async fn raw_request(url: &str, bytes: &[u8]) -> String {
    let address = url.strip_prefix("http://").expect("the URL of a test is plain HTTP");
    let mut socket = tokio::net::TcpStream::connect(address).await.expect("the server listens");
    // The server may answer and close before it has read everything.
    let _ = socket.write_all(bytes).await;
    let mut answer = Vec::new();
    let read = tokio::time::timeout(SOON, socket.read_to_end(&mut answer)).await;
    assert!(read.is_ok(), "the server neither closed nor answered in full");
    String::from_utf8_lossy(&answer).into_owned()
}
