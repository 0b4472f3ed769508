//! A request that is valid by construction, and its run: route, submit, forward tokens, resume if
//! interrupted.
//!
//! A token depends on (weights, prompt, seed, position) only. So when a group is lost, the prompt
//! with the tokens generated so far is submitted to another ready group and goes on with the very
//! tokens that would have come. Text of users is never logged here. Called by http; knows no HTTP.

use std::sync::Arc;
use std::time::{Duration, Instant};

use evener_proto::ids::{Epoch, GroupId, ModelName};
use rand::Rng;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::group::handle::{Directory, Model, ReadyGroup};
use crate::group::stream::{self, Finish, Refusal, Sampling, Sequence, Streams, Submit, Token};
use crate::metrics::Metrics;
use crate::router;
use crate::text::output::{Output, Piece, Placed};
use crate::text::tokenizer::Tokenizer;

/// Bounds of every run.
#[derive(Debug, Clone)]
pub struct Options {
    /// A new request waits this long for a ready group of its model. Default 5 s.
    pub ready_wait: Duration,
    /// An interrupted request waits this long for a group to go on with. Default 30 s.
    pub resume_wait: Duration,
    /// A request is interrupted at most this often without a token in between. Default 4.
    pub fruitless_attempts: u32,
    /// From start to end of one sequence. Default 600 s.
    pub deadline: Duration,
    /// Between two tries to reach groups, at first; doubled up to one second. Default 50 ms.
    pub backoff: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            ready_wait: Duration::from_secs(5),
            resume_wait: Duration::from_secs(30),
            fruitless_attempts: 4,
            deadline: Duration::from_secs(600),
            backoff: Duration::from_millis(50),
        }
    }
}

/// Why there is no answer, or no more of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("the prompt has no tokens; send at least one")]
    EmptyPrompt,
    #[error("token id {id} is out of range; the model {model} has the ids 0 to {}", vocab_size - 1)]
    UnknownToken { id: u32, vocab_size: u32, model: ModelName },
    #[error(
        "This model's maximum context length is {context} tokens. However, you requested {} tokens \
         ({prompt} in the prompt, {completion} for the completion). Shorten the prompt or ask for \
         a shorter completion.",
        prompt + completion
    )]
    ContextLength { context: u64, prompt: u64, completion: u64 },
    #[error(
        "{tokens} tokens need {needed} KV blocks of {block_len} tokens; the largest ready group of \
         {model} has {have}. Send at most {} tokens, prompt and completion together.",
        have * block_len
    )]
    KvBlocks { tokens: u64, needed: u64, have: u64, block_len: u64, model: ModelName },
    #[error("no group that serves {model} is ready{}", list(missing))]
    NotReady { model: ModelName, missing: Vec<String> },
    #[error("the group that generated this answer was lost ({attempts} times without a token)")]
    Lost { attempts: u32 },
    #[error("the group cannot take this request: {message}")]
    Invalid { message: String },
    #[error("the group's queue is full: {message}")]
    Overloaded { message: String },
    #[error("the group failed on this request: {message}")]
    Internal { message: String },
    #[error("this answer was read too slowly: {behind} steps stood unread")]
    SlowReader { behind: usize },
    #[error("the answer was not complete after {deadline:?}")]
    Deadline { deadline: Duration },
    #[error("this server is shutting down")]
    ShuttingDown,
}

fn list(missing: &[String]) -> String {
    if missing.is_empty() { String::new() } else { format!(": {}", missing.join("; ")) }
}

/// What a caller asks for, each field already within its own bounds.
#[derive(Clone)]
pub struct Params {
    pub prompt: Vec<u32>,
    /// Absent: what the context leaves.
    pub max_tokens: Option<u64>,
    pub temperature: f32,
    pub top_p: f32,
    /// 0 is off.
    pub top_k: u32,
    /// Absent: chosen at random.
    pub seed: Option<u64>,
    /// Absent: none; 0: of the chosen token only.
    pub n_logprobs: Option<u32>,
    pub prompt_logprobs: bool,
    /// None of them empty.
    pub stop: Arc<[String]>,
}

/// One sequence to generate. It fits the model.
#[derive(Clone)]
pub struct Generation {
    model: Arc<Model>,
    tokenizer: Arc<Tokenizer>,
    prompt: Arc<[u32]>,
    /// 0: only the prompt is wanted back.
    max_tokens: u32,
    sampling: Sampling,
    prompt_logprobs: bool,
    stop: Arc<[String]>,
}

impl Generation {
    /// # Errors
    /// The prompt is empty, has unknown tokens, or does not fit the context or the groups.
    pub fn new(
        model: &Arc<Model>,
        tokenizer: &Arc<Tokenizer>,
        directory: &Directory,
        params: Params,
    ) -> Result<Self, Error> {
        let vocab_size = model.vocab_size;
        if params.prompt.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        if let Some(&id) = params.prompt.iter().find(|&&id| id >= vocab_size) {
            return Err(Error::UnknownToken { id, vocab_size, model: model.name.clone() });
        }
        let prompt = params.prompt.len() as u64;
        let context = u64::from(model.context_length);
        // Even where no token is wanted, the engine makes one after reading the prompt.
        let least = params.max_tokens.unwrap_or(1).max(1);
        if prompt + least > context {
            return Err(Error::ContextLength { context, prompt, completion: least });
        }
        let largest = groups_of(model, directory).max_by_key(|group| kv_tokens(group));
        let mut room = context - prompt;
        if let Some(group) = largest {
            if kv_tokens(group) < prompt + least {
                return Err(too_many_blocks(group, prompt + least));
            }
            room = room.min(kv_tokens(group) - prompt);
        }
        let max_tokens = params.max_tokens.unwrap_or(room);
        Ok(Self {
            model: model.clone(),
            tokenizer: tokenizer.clone(),
            prompt: params.prompt.into(),
            max_tokens: u32::try_from(max_tokens).unwrap_or(model.context_length),
            sampling: Sampling {
                temperature: params.temperature,
                top_k: params.top_k,
                top_p: params.top_p,
                seed: params.seed.unwrap_or_else(|| rand::rng().random()),
                stop_token_ids: model.eos_token_ids.clone(),
                n_logprobs: params.n_logprobs,
            },
            prompt_logprobs: params.prompt_logprobs,
            stop: params.stop,
        })
    }

    /// The same request as another of its n choices: choice 0 has the request's own seed.
    #[must_use]
    pub fn choice(&self, idx: u32) -> Self {
        // Far apart (2^64 divided by the golden ratio), so that no sum with a position meets a
        // neighbour.
        let step = 0x9E37_79B9_7F4A_7C15u64.wrapping_mul(u64::from(idx));
        let mut other = self.clone();
        other.sampling.seed = self.sampling.seed.wrapping_add(step);
        other
    }

    #[must_use]
    pub fn n_prompt_tokens(&self) -> u64 {
        self.prompt.len() as u64
    }
}

fn kv_tokens(group: &ReadyGroup) -> u64 {
    u64::from(group.kv_blocks) * u64::from(group.kv_block_len)
}

fn too_many_blocks(group: &ReadyGroup, tokens: u64) -> Error {
    let block_len = u64::from(group.kv_block_len).max(1);
    let (needed, have) = (tokens.div_ceil(block_len), u64::from(group.kv_blocks));
    Error::KvBlocks { tokens, needed, have, block_len, model: group.model.clone() }
}

/// Ready groups that hold the very file of this model.
fn groups_of<'a>(
    model: &'a Model,
    directory: &'a Directory,
) -> impl Iterator<Item = &'a Arc<ReadyGroup>> {
    let same =
        directory.models.get(&model.name).is_some_and(|m| m.fingerprint == model.fingerprint);
    directory.groups.iter().filter(move |group| same && group.model == model.name)
}

/// What a run gives out, step by step.
#[derive(Clone, Default)]
pub struct Delta {
    /// All of positions 1.. of the prompt, once, if asked for.
    pub prompt_tokens: Vec<Token>,
    pub text: String,
    /// The tokens that `text` is made of.
    pub tokens: Vec<Placed<Token>>,
    /// Tokens generated in this step, those not (yet) shown included.
    pub n_generated: u64,
    /// With the last delta only.
    pub finish: Option<Finish>,
}

impl Delta {
    fn is_empty(&self) -> bool {
        self.text.is_empty()
            && self.tokens.is_empty()
            && self.prompt_tokens.is_empty()
            && self.n_generated == 0
            && self.finish.is_none()
    }
}

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
    #[must_use]
    pub fn run(&self, generation: Generation) -> Run {
        let output = Output::new(&generation.tokenizer, generation.stop.clone());
        let started = Instant::now();
        Run {
            runner: self.clone(),
            generation,
            output,
            generated: Vec::new(),
            prompt_tokens: Vec::new(),
            prompt_done: false,
            sequence: None,
            submitted: false,
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
    generation: Generation,
    output: Output<Token>,
    /// Every token the engine gave, shown or not.
    generated: Vec<u32>,
    prompt_tokens: Vec<Token>,
    prompt_done: bool,
    /// With the group it runs on.
    sequence: Option<(GroupId, Sequence)>,
    /// At least once.
    submitted: bool,
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
            stream::Error::Refused(Refusal::Overloaded(message)) if !began => {
                return Err(Error::Overloaded { message });
            }
            stream::Error::Refused(Refusal::Overloaded(_)) => {}
            stream::Error::Refused(Refusal::Internal(message)) => {
                return Err(Error::Internal { message });
            }
        }
        self.sequence = None;
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
        let wait = if self.submitted { options.resume_wait } else { options.ready_wait };
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
        let submit = self.submission();
        let sequence = self.runner.streams.submit(group, submit)?;
        if !self.generated.is_empty() {
            self.runner.metrics.resumed();
        }
        self.submitted = true;
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
                Some(group) if !self.submitted => Err(too_many_blocks(group, tokens)),
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
        let sampling = generation.sampling.clone();
        Submit { prompt, sampling, max_tokens: max_tokens.max(1), prompt_logprobs }
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
        }
        delta
    }

    fn count(&mut self, n_tokens: usize) {
        if n_tokens == 0 {
            return;
        }
        let now = Instant::now();
        let since = self.last_token_at.map(|at| (now - at).as_secs_f64());
        self.runner.metrics.generated(n_tokens as u64, since);
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
