//! One generation on its way through groups that come and go.
//!
//! A pull-driven state: whoever wants the next delta drives routing, submission and resumption, so
//! a request that nobody reads does nothing, and dropping it frees its sequence.

use std::sync::Arc;
use std::time::{Duration, Instant};

use evener_proto::ids::{Epoch, GroupId};
use evener_telemetry::{Kind, Span};
use rand::Rng;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::info;

use super::{Delta, Error, Generation, Options, groups_of, kv_tokens, too_many_blocks};
use crate::group::handle::{Directory, ReadyGroup};
use crate::group::stream::{self, Finish, Refusal, Sampling, Sequence, Streams, Submit, Token};
use crate::metrics::{Metrics, Tokens};
use crate::router;
use crate::text::output::{Output, Piece};

/// Runs generations; cheap to clone.
#[derive(Clone)]
pub struct Runner {
    pub directory: watch::Receiver<Arc<Directory>>,
    pub streams: Streams,
    pub options: Arc<Options>,
    pub metrics: Metrics,
    /// Ends every run with an error.
    pub stop: CancellationToken,
}

impl Runner {
    /// `span`: of the request, if it is traced.
    #[must_use]
    pub fn run(&self, generation: Generation, span: Option<&Span>) -> Run {
        let Generation { tokenizer, stop, sampling, .. } = &generation;
        let output = Output::new(tokenizer, stop.clone(), sampling.min_tokens);
        let started = Instant::now();
        let tokens = self.metrics.tokens(generation.model.name.as_str());
        Run {
            runner: self.clone(),
            tokens,
            generation,
            output,
            generated: Vec::new(),
            prompt_tokens: Vec::new(),
            prompt_done: false,
            sequence: None,
            span: span.cloned(),
            attempt: None,
            n_submissions: 0,
            waiting_since: started,
            started,
            last_token_at: None,
            failed_epoch: None,
            n_attempts: 0,
            n_fruitless: 0,
            finished: false,
        }
    }
}

/// One sequence on its way. Dropping it frees the sequence at the lead.
pub struct Run {
    runner: Runner,
    tokens: Tokens,
    generation: Generation,
    output: Output<Token>,
    /// Every token the engine gave, shown or not.
    generated: Vec<u32>,
    prompt_tokens: Vec<Token>,
    prompt_done: bool,
    /// With the group it runs on.
    sequence: Option<(GroupId, Sequence)>,
    /// Of the request and of the sequence, if they are traced.
    span: Option<Span>,
    attempt: Option<Span>,
    n_submissions: u32,
    /// Without a group, or without an answer from it.
    waiting_since: Instant,
    started: Instant,
    last_token_at: Option<Instant>,
    failed_epoch: Option<Epoch>,
    /// Since the last event.
    n_attempts: u32,
    n_fruitless: u32,
    finished: bool,
}

impl Run {
    /// What happens next; none after the delta with a finish.
    ///
    /// # Errors
    /// There is no answer, or no more of it; the run is over.
    pub async fn next(&mut self) -> Result<Option<Delta>, Error> {
        if self.finished {
            return Ok(None);
        }
        let result = self.advance().await;
        if !matches!(&result, Ok(delta) if delta.finish.is_none()) {
            self.finished = true;
            self.sequence = None; // frees it at the lead, if it still runs
            self.attempt = None;
            self.span = None;
        }
        result.map(Some)
    }

    async fn advance(&mut self) -> Result<Delta, Error> {
        if self.generation.max_tokens == 0 && !self.generation.prompt_logprobs {
            return Ok(Delta { finish: Some(Finish::Length), ..Delta::default() });
        }
        let deadline = self.runner.options.deadline;
        let stop = self.runner.stop.clone();
        let until = tokio::time::Instant::from_std(self.started + deadline);
        loop {
            let event = tokio::select! {
                event = self.event() => event?,
                () = stop.cancelled() => return Err(Error::ShuttingDown),
                () = tokio::time::sleep_until(until) => return Err(Error::Deadline { deadline }),
            };
            if let Some(event) = event {
                let delta = self.accept(event);
                if !delta.is_empty() {
                    return Ok(delta);
                }
            }
        }
    }

    /// The next event of the sequence; none if it was interrupted and is to be submitted again.
    async fn event(&mut self) -> Result<Option<stream::Event>, Error> {
        let Some((group, sequence)) = &mut self.sequence else {
            let max_tokens = self.generation.max_tokens as usize;
            if max_tokens > 0 && self.generated.len() >= max_tokens {
                // Interrupted between its last token and the word that it was the last.
                let finish = Some(Finish::Length);
                return Ok(Some(stream::Event { finish, ..stream::Event::default() }));
            }
            self.sequence = Some(self.place().await?);
            return Ok(None);
        };
        let epoch = sequence.epoch();
        let result = tokio::select! {
            result = sequence.next() => result,
            () = replaced(&mut self.runner.directory, group, epoch) => {
                let reason = "a newer epoch of its group is ready".to_owned();
                Err(stream::Error::Interrupted { epoch, reason })
            }
        };
        match result {
            Ok(event) => {
                self.n_attempts = 0;
                self.failed_epoch = None;
                if !event.tokens.is_empty() {
                    self.n_fruitless = 0;
                }
                Ok(Some(event))
            }
            Err(error) => self.interrupted(epoch, error).map(|()| None),
        }
    }

    /// Decides whether to go on elsewhere.
    fn interrupted(&mut self, epoch: Epoch, error: stream::Error) -> Result<(), Error> {
        let began = !self.generated.is_empty();
        match error {
            stream::Error::Unreachable { .. } => {}
            stream::Error::Interrupted { .. } => {
                self.n_fruitless += 1;
                if self.n_fruitless > self.runner.options.fruitless_attempts {
                    return Err(Error::Lost { attempts: self.n_fruitless });
                }
            }
            stream::Error::Overrun { behind } => return Err(Error::SlowReader { behind }),
            stream::Error::Refused(Refusal::Invalid(message)) => {
                return Err(Error::Invalid { message });
            }
            stream::Error::Refused(Refusal::Grammar(message)) => {
                let field = self.generation.grammar_field;
                return Err(Error::Field { field, error: Box::new(Error::Invalid { message }) });
            }
            stream::Error::Refused(Refusal::Overloaded(message)) if !began => {
                return Err(Error::Overloaded { message });
            }
            stream::Error::Refused(Refusal::Overloaded(_)) => {}
            stream::Error::Refused(Refusal::Internal(message)) => {
                return Err(Error::Internal { message });
            }
        }
        self.sequence = None;
        if let Some(attempt) = self.attempt.take() {
            attempt.fail();
        }
        self.failed_epoch = Some(epoch);
        if self.n_attempts == 0 {
            self.waiting_since = Instant::now();
        }
        self.n_attempts += 1;
        let n_generated = self.generated.len();
        info!(%epoch, n_generated, "sequence interrupted, looking for a group");
        Ok(())
    }

    /// Waits for a group and submits what is left to do.
    async fn place(&mut self) -> Result<(GroupId, Sequence), Error> {
        let options = self.runner.options.clone();
        let wait = if self.was_submitted() { options.resume_wait } else { options.ready_wait };
        let mut rested = false;
        loop {
            let directory = self.runner.directory.borrow_and_update().clone();
            self.runner.streams.prune(&directory);
            let until = self.waiting_since + wait;
            let late = Instant::now() >= until;
            if let Some(group) = self.choose(&directory)?
                && !(late && self.n_attempts > 0)
                && (rested || Some(group.epoch) != self.failed_epoch)
            {
                match self.submit(&group) {
                    Ok(sequence) => return Ok((group.id.clone(), sequence)),
                    Err(error) => self.interrupted(group.epoch, error)?,
                }
            }
            if late {
                let missing = directory.missing.clone();
                return Err(Error::NotReady { model: self.generation.model.name.clone(), missing });
            }
            self.back_off(&options, until).await;
            rested = true;
        }
    }

    fn submit(&mut self, group: &ReadyGroup) -> Result<Sequence, stream::Error> {
        self.attempt = self.span.as_ref().map(|span| {
            let attempt = span.child("generate", Kind::Client);
            attempt.set("evener.group", group.id.to_string());
            attempt.set("evener.epoch", group.epoch.get());
            attempt
        });
        let submit = self.submission();
        let sequence = self.runner.streams.submit(group, submit)?;
        if !self.generated.is_empty() {
            self.runner.metrics.resumed();
        }
        self.n_submissions += 1;
        Ok(sequence)
    }

    /// Sleeps until something may have changed.
    async fn back_off(&mut self, options: &Options, until: Instant) {
        let now = Instant::now();
        let most = if self.n_attempts == 0 {
            until.saturating_duration_since(now)
        } else {
            let doubled = options.backoff * 2u32.pow(self.n_attempts.min(5));
            doubled.min(Duration::from_secs(1)).mul_f64(rand::rng().random_range(0.5..1.0))
        };
        let most = most.min(until.saturating_duration_since(now));
        tokio::select! {
            changed = self.runner.directory.changed() => if changed.is_err() {
                tokio::time::sleep(most).await; // no more news: only time can help
            },
            () = tokio::time::sleep(most) => {}
        }
    }

    fn choose(&self, directory: &Directory) -> Result<Option<Arc<ReadyGroup>>, Error> {
        let generation = &self.generation;
        let ready: Vec<&Arc<ReadyGroup>> = groups_of(&generation.model, directory).collect();
        let tokens = generation.prompt.len() as u64 + u64::from(generation.max_tokens.max(1));
        let fitting: Vec<&Arc<ReadyGroup>> =
            ready.iter().copied().filter(|group| kv_tokens(group) >= tokens).collect();
        if fitting.is_empty() {
            // A request that has begun waits for a group as large as the one it had.
            return match ready.iter().max_by_key(|group| kv_tokens(group)) {
                Some(group) if !self.was_submitted() => Err(too_many_blocks(group, tokens)),
                _ => Ok(None),
            };
        }
        let candidates: Vec<router::Candidate> = fitting
            .iter()
            .map(|group| {
                let load = self.runner.streams.load(group.epoch);
                router::Candidate {
                    epoch: group.epoch,
                    in_flight: load.in_flight,
                    running: load.running,
                    waiting: load.waiting,
                }
            })
            .collect();
        let chosen = router::choose(&candidates, self.failed_epoch);
        Ok(chosen.map(|idx| fitting[idx].clone()))
    }

    /// Prompt and tokens so far, and what is left to generate.
    fn submission(&mut self) -> Submit {
        let generation = &self.generation;
        let mut prompt = Vec::with_capacity(generation.prompt.len() + self.generated.len());
        prompt.extend_from_slice(&generation.prompt);
        prompt.extend_from_slice(&self.generated);
        let max_tokens = generation.max_tokens - self.generated.len() as u32;
        let prompt_logprobs = generation.prompt_logprobs && !self.prompt_done;
        self.prompt_tokens.clear(); // a half-told prompt is told again from its start
        let n_resumed = self.generated.len() as u32;
        Submit {
            prompt,
            sampling: Sampling { n_resumed, ..generation.sampling.clone() },
            max_tokens: max_tokens.max(1),
            prompt_logprobs,
            origin: generation.origin.clone(),
            trace: self.attempt.as_ref().map(Span::context),
        }
    }

    fn accept(&mut self, event: stream::Event) -> Delta {
        let mut delta = Delta::default();
        let generation = &self.generation;
        if generation.prompt_logprobs && !self.prompt_done {
            self.prompt_tokens.extend(event.prompt_tokens);
            let wanted = generation.prompt.len() - 1;
            if self.prompt_tokens.len() >= wanted {
                self.prompt_tokens.truncate(wanted);
                delta.prompt_tokens = std::mem::take(&mut self.prompt_tokens);
                self.prompt_done = true;
                if generation.max_tokens == 0 {
                    delta.finish = Some(Finish::Length);
                    return delta;
                }
            }
        }
        if self.generated.is_empty() {
            // Not of a group that went on with it: usage is that of an undisturbed run.
            delta.n_cached = u64::from(event.n_cached).min(generation.prompt.len() as u64);
        }
        let room = generation.max_tokens as usize - self.generated.len();
        let mut tokens = event.tokens;
        tokens.truncate(room);
        self.count(tokens.len());
        delta.n_generated = tokens.len() as u64;
        let n_tokens = tokens.len();
        for (idx, token) in tokens.into_iter().enumerate() {
            self.generated.push(token.id);
            let ends = idx + 1 == n_tokens && event.finish == Some(Finish::Stop);
            if ends && self.generation.sampling.stop_token_ids.contains(&token.id) {
                break; // says that the text is over, and is none of it
            }
            let piece = self.output.push(token.id, token);
            if extend(&mut delta, piece) {
                delta.n_generated = idx as u64 + 1;
                delta.finish = Some(Finish::Stop);
                return delta;
            }
        }
        if let Some(finish) = event.finish {
            let stopped = extend(&mut delta, self.output.finish());
            delta.finish = Some(if stopped { Finish::Stop } else { finish });
            delta.lead_time = event.lead_time.filter(|_| self.n_submissions == 1);
        }
        delta
    }

    fn was_submitted(&self) -> bool {
        self.n_submissions > 0
    }

    fn count(&mut self, n_tokens: usize) {
        if n_tokens == 0 {
            return;
        }
        let now = Instant::now();
        let since = self.last_token_at.map(|at| (now - at).as_secs_f64());
        self.tokens.generated(n_tokens as u64, since);
        self.last_token_at = Some(now);
    }
}

/// Adds what may be shown; true if a stop string ended it.
fn extend(delta: &mut Delta, piece: Piece<Token>) -> bool {
    delta.text.push_str(&piece.text);
    delta.tokens.extend(piece.tokens);
    piece.stopped
}

/// Returns when the directory shows a newer epoch of this group: what the old one still says no
/// longer counts. Waits for ever otherwise; its caller has the deadline.
async fn replaced(directory: &mut watch::Receiver<Arc<Directory>>, id: &GroupId, epoch: Epoch) {
    let newer =
        |d: &Arc<Directory>| d.groups.iter().any(|group| group.id == *id && group.epoch > epoch);
    if directory.wait_for(newer).await.is_err() {
        std::future::pending::<()>().await;
    }
}
