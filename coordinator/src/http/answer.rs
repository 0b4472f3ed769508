//! The sequences of one request, run side by side: as a stream of deltas, or collected into whole
//! choices.
//!
//! Shared by chat.rs and completions.rs; knows neither's objects.

use std::pin::Pin;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::body::to_bytes;
use axum::extract::Request;
use futures::stream::{self, SelectAll, Stream, StreamExt};
use tokio::sync::OwnedSemaphorePermit;

use super::App;
use super::error::Error;
use super::openai::{Head, Usage};
use crate::generation::{Delta, Generation, Run};
use crate::group::handle::Model;
use crate::group::stream::{Finish, Token};
use crate::metrics::{Observation, Outcome};
use crate::text::output::Placed;

/// A request's body, all of it.
///
/// # Errors
/// Too large or too slow.
pub async fn read_body(app: &App, request: Request) -> Result<bytes::Bytes, Error> {
    let limit = app.options.max_body_bytes;
    let claimed = request
        .headers()
        .get(axum::http::header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if claimed.is_some_and(|n| n > limit as u64) {
        return Err(Error::BodyTooLarge { limit });
    }
    let timeout = app.options.body_timeout;
    match tokio::time::timeout(timeout, to_bytes(request.into_body(), limit)).await {
        Ok(Ok(body)) => Ok(body),
        Ok(Err(_)) => Err(Error::BodyTooLarge { limit }),
        Err(_) => Err(Error::BodyTooSlow { seconds: timeout.as_secs() }),
    }
}

/// What stands at the head of every object of one answer.
#[must_use]
pub fn head(prefix: &str, object: &'static str, model: &Model) -> Head {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let fingerprint: String = model.fingerprint.chars().take(12).collect();
    Head {
        id: format!("{prefix}-{}", uuid::Uuid::new_v4().simple()),
        object,
        created: since_epoch.as_secs(),
        model: model.name.to_string(),
        system_fingerprint: format!("b-{fingerprint}"),
    }
}

/// OpenAI's word.
#[must_use]
pub fn reason(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop => "stop",
        Finish::Length => "length",
    }
}

type Deltas = Pin<Box<dyn Stream<Item = (usize, Result<Delta, crate::generation::Error>)> + Send>>;

/// The running sequences of one request, numbered in the order they were given.
pub struct Answer {
    deltas: SelectAll<Deltas>,
    /// Already taken from the stream, to see whether there is an answer at all.
    first: Option<(usize, Delta)>,
    prompt_param: &'static str,
    n_prompt_tokens: u64,
    n_generated: u64,
    /// By sequence: tokens of its prompt that were cached.
    n_cached: Vec<u64>,
    /// Sequences of one prompt.
    n_choices: usize,
    n_running: usize,
    /// Of the sequence that was longest at a lead, while it is known of all that ended.
    lead_time: Option<Duration>,
    /// Bytes have gone out: an error can only be an event.
    streamed: bool,
    observation: Observation,
    _permit: OwnedSemaphorePermit,
}

/// One whole choice.
#[derive(Default)]
pub struct Choice {
    pub prompt_tokens: Vec<Token>,
    pub text: String,
    pub tokens: Vec<Placed<Token>>,
    pub finish: Option<Finish>,
}

impl Answer {
    /// Starts the sequences, `n_choices` of each prompt in turn, and waits for the first word of
    /// any.
    ///
    /// # Errors
    /// There is no answer; what it was can still be told by a status.
    pub async fn begin(
        app: &App,
        generations: Vec<Generation>,
        n_choices: u32,
        n_prompt_tokens: u64,
        prompt_param: &'static str,
        observation: Observation,
        permit: OwnedSemaphorePermit,
    ) -> Result<Self, Error> {
        observation.prompt_tokens(n_prompt_tokens);
        let n_running = generations.len();
        let deltas = stream::select_all(generations.into_iter().enumerate().map(
            |(idx, generation)| -> Deltas {
                let run = app.runner.run(generation, observation.span());
                Box::pin(stream::unfold(run, move |mut run: Run| async move {
                    let result = run.next().await.transpose()?;
                    Some(((idx, result), run))
                }))
            },
        ));
        let mut answer = Self {
            deltas,
            first: None,
            prompt_param,
            n_prompt_tokens,
            n_generated: 0,
            n_cached: vec![0; n_running],
            n_choices: n_choices as usize,
            n_running,
            lead_time: Some(Duration::ZERO),
            streamed: false,
            observation,
            _permit: permit,
        };
        answer.first = answer.next().await?;
        Ok(answer)
    }

    /// The next delta of any sequence; none when all have finished.
    ///
    /// # Errors
    /// One of them cannot go on, so the answer cannot.
    pub async fn next(&mut self) -> Result<Option<(usize, Delta)>, Error> {
        if let Some(first) = self.first.take() {
            return Ok(Some(first));
        }
        let Some((idx, result)) = self.deltas.next().await else {
            if self.n_running > 0 {
                self.observation.end(Outcome::failed);
                return Err(Error::Defect);
            }
            self.observation.tokens(self.n_prompt_tokens, self.n_generated);
            self.observation.end(Outcome::ok);
            return Ok(None);
        };
        match result {
            Ok(delta) => {
                if delta.n_generated > 0 && self.n_generated == 0 {
                    self.observation.first_token();
                }
                self.n_generated += delta.n_generated;
                self.n_cached[idx] += delta.n_cached;
                if delta.finish.is_some() {
                    self.ended(delta.lead_time);
                }
                Ok(Some((idx, delta)))
            }
            Err(error) => {
                let error = Error::Generation { error, param: self.prompt_param };
                let broke_off = self.streamed && error.outcome() != Outcome::invalid;
                self.observation.end(if broke_off {
                    Outcome::interrupted
                } else {
                    error.outcome()
                });
                self.deltas.clear(); // frees the others
                Err(error)
            }
        }
    }

    /// One of the sequences did well, after so long at its lead.
    fn ended(&mut self, lead_time: Option<Duration>) {
        self.n_running -= 1;
        let both = self.lead_time.zip(lead_time);
        self.lead_time = both.map(|(longest, this)| longest.max(this));
        if let Some(lead_time) = self.lead_time
            && self.n_running == 0
        {
            self.observation.overhead(lead_time);
        }
    }

    /// From here on the client has seen a part of the answer.
    #[must_use]
    pub fn streamed(mut self) -> Self {
        self.streamed = true;
        self
    }

    /// So far.
    #[must_use]
    pub fn usage(&self) -> Usage {
        // What one choice computed is cached for the others: that is no saving of the prompt.
        let of_prompt = |choices: &[u64]| choices.iter().copied().min().unwrap_or(0);
        let n_cached = self.n_cached.chunks(self.n_choices).map(of_prompt).sum();
        Usage::new(self.n_prompt_tokens, self.n_generated, n_cached)
    }

    /// All choices, whole.
    ///
    /// # Errors
    /// One of them cannot go on.
    pub async fn collect(mut self, n_choices: usize) -> Result<(Vec<Choice>, Usage), Error> {
        let mut choices: Vec<Choice> = Vec::new();
        choices.resize_with(n_choices, Choice::default);
        while let Some((idx, delta)) = self.next().await? {
            let choice = &mut choices[idx];
            choice.prompt_tokens.extend(delta.prompt_tokens);
            choice.text.push_str(&delta.text);
            choice.tokens.extend(delta.tokens);
            choice.finish = choice.finish.or(delta.finish);
        }
        Ok((choices, self.usage()))
    }
}
