//! One request: sent, timed token by token, and its failure classed.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::statistics::Served;
use crate::client::{Client, Event, Refusal, Sampling};

#[derive(Debug, Clone)]
pub struct Asker {
    pub client: Client,
    pub model: String,
    pub n_output: u32,
    /// What answers must be; it ends them where they are complete.
    pub schema: Option<Value>,
    pub timeout: Duration,
}

/// Why there is no whole answer.
#[derive(Debug)]
pub struct Failure {
    /// A word or two, to count by.
    pub kind: String,
    pub message: String,
}

impl Asker {
    /// The answer's figures and its text. `heard` is told of tokens as they come.
    pub async fn ask(
        &self,
        prompt: &str,
        heard: impl Fn(u64),
    ) -> Result<(Served, String), Failure> {
        match tokio::time::timeout(self.timeout, self.answer(prompt, heard)).await {
            Ok(result) => result,
            Err(_) => Err(Failure {
                kind: "timed out".to_owned(),
                message: format!("no whole answer came in {:?}", self.timeout),
            }),
        }
    }

    async fn answer(&self, prompt: &str, heard: impl Fn(u64)) -> Result<(Served, String), Failure> {
        let response_format = self.schema.as_ref().map(|schema| {
            let named = json!({ "name": "bench", "schema": schema, "strict": true });
            json!({ "type": "json_schema", "json_schema": named })
        });
        let sampling = Sampling {
            temperature: Some(0.0),
            max_tokens: Some(self.n_output),
            min_tokens: Some(self.n_output),
            // A schema says itself where an answer ends.
            ignore_eos: response_format.is_none().then_some(true),
            response_format,
            ..Sampling::default()
        };
        let sent = Instant::now();
        let answer = self.client.complete(&self.model, &json!(prompt), &sampling).await;
        let mut answer = answer.map_err(|error| {
            let kind = match error.downcast_ref::<Refusal>().map(|refusal| refusal.status) {
                Some(429) => "refused".to_owned(),
                Some(status) => format!("HTTP {status}"),
                None => "unreachable".to_owned(),
            };
            Failure { kind, message: error.to_string() }
        })?;
        let (mut first, mut last, mut gaps) = (None, sent, Vec::new());
        let (mut text, mut n_prompt, mut n_output, mut n_heard) = (String::new(), 0, 0, 0);
        let cut = |error: anyhow::Error| Failure {
            kind: "interrupted".to_owned(),
            message: error.to_string(),
        };
        while let Some(events) = answer.next().await.map_err(cut)? {
            let now = Instant::now();
            for event in events {
                match event {
                    Event::Text(piece) => {
                        if first.is_some() {
                            gaps.push((now - last).as_secs_f64());
                        }
                        first.get_or_insert(now);
                        last = now;
                        text.push_str(&piece);
                        n_heard += 1;
                        heard(1);
                    }
                    // The last tokens may have had no text.
                    Event::Finish(_) => {
                        first.get_or_insert(now);
                        last = now;
                    }
                    Event::Usage { prompt, completion } => {
                        (n_prompt, n_output) = (prompt, completion);
                    }
                }
            }
        }
        let Some(first) = first.filter(|_| n_output > 0) else {
            let message = "the answer told no token count (usage)".to_owned();
            return Err(Failure { kind: "without usage".to_owned(), message });
        };
        // Some came together with others, or without text.
        heard(n_output.saturating_sub(n_heard));
        let (ttft, e2e) = ((first - sent).as_secs_f64(), (last - sent).as_secs_f64());
        Ok((Served { ttft, gaps, e2e, n_prompt, n_output }, text))
    }
}
