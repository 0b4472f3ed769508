//! A request that is valid by construction; run.rs runs it: route, submit, forward tokens, resume
//! if interrupted.
//!
//! A token depends on (weights, prompt, seed, position) only. So when a group is lost, the prompt
//! with the tokens generated so far is submitted to another ready group and goes on with the very
//! tokens that would have come. Text of users is never logged here. Called by http; knows no HTTP.

mod run;

use std::sync::Arc;
use std::time::Duration;

use evener_proto::ids::ModelName;
use rand::Rng;

use crate::group::handle::{Directory, Model, ReadyGroup};
use crate::group::stream::{Finish, Grammar, Origin, Sampling, Token};
use crate::text::output::Placed;
use crate::text::tokenizer::Tokenizer;
pub use run::{Run, Runner};

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
    #[error("`{field}`: {error}")]
    Field { field: &'static str, error: Box<Error> },
    #[error("`min_tokens` is {min}, more than the {max} tokens that may be generated")]
    MinTokens { min: u32, max: u64 },
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
    pub decoding: Decoding,
    /// Absent: none; 0: of the chosen token only.
    pub n_logprobs: Option<u32>,
    pub prompt_logprobs: bool,
    pub origin: Origin,
}

/// How tokens are chosen, and what ends them.
#[derive(Debug, Clone, PartialEq)]
pub struct Decoding {
    pub temperature: f32,
    pub top_p: f32,
    /// 0 is off.
    pub top_k: u32,
    /// 0 is off.
    pub min_p: f32,
    /// 1 is off.
    pub repetition_penalty: f32,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    /// Each token once.
    pub logit_bias: Vec<(u32, f32)>,
    /// Absent: chosen at random.
    pub seed: Option<u64>,
    /// None of them empty.
    pub stop: Arc<[String]>,
    /// Beside the model's own.
    pub stop_token_ids: Vec<u32>,
    /// The model's own end nothing.
    pub ignore_eos: bool,
    /// Nothing but the length ends a sequence before so many tokens, and a grammar.
    pub min_tokens: u32,
    pub structure: Option<Structure>,
}

/// What an answer must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Structure {
    /// The request's field that says so.
    pub field: &'static str,
    pub grammar: Grammar,
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
    /// Where a refused grammar came from.
    grammar_field: &'static str,
    origin: Origin,
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
        if params.prompt.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        check_tokens(model, params.prompt.iter())?;
        let decoding = params.decoding;
        let of = |field| move |error| Error::Field { field, error: Box::new(error) };
        let biased = decoding.logit_bias.iter().map(|(id, _)| id);
        check_tokens(model, biased).map_err(of("logit_bias"))?;
        check_tokens(model, decoding.stop_token_ids.iter()).map_err(of("stop_token_ids"))?;
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
        if u64::from(decoding.min_tokens) > max_tokens {
            return Err(Error::MinTokens { min: decoding.min_tokens, max: max_tokens });
        }
        let mut stop_token_ids = decoding.stop_token_ids;
        if !decoding.ignore_eos {
            stop_token_ids.extend(&model.eos_token_ids);
        }
        stop_token_ids.sort_unstable();
        stop_token_ids.dedup();
        let structure = decoding.structure;
        let grammar_field = structure.as_ref().map_or("response_format", |given| given.field);
        Ok(Self {
            model: model.clone(),
            tokenizer: tokenizer.clone(),
            prompt: params.prompt.into(),
            max_tokens: u32::try_from(max_tokens).unwrap_or(model.context_length),
            sampling: Sampling {
                temperature: decoding.temperature,
                top_k: decoding.top_k,
                top_p: decoding.top_p,
                min_p: decoding.min_p,
                repetition_penalty: decoding.repetition_penalty,
                presence_penalty: decoding.presence_penalty,
                frequency_penalty: decoding.frequency_penalty,
                logit_bias: decoding.logit_bias,
                seed: decoding.seed.unwrap_or_else(|| rand::rng().random()),
                stop_token_ids,
                min_tokens: decoding.min_tokens,
                n_resumed: 0,
                grammar: structure.map(|given| given.grammar),
                n_logprobs: params.n_logprobs,
            },
            prompt_logprobs: params.prompt_logprobs,
            stop: decoding.stop,
            grammar_field,
            origin: params.origin,
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

/// Every one is a token of the model.
fn check_tokens<'a>(model: &Model, mut ids: impl Iterator<Item = &'a u32>) -> Result<(), Error> {
    let vocab_size = model.vocab_size;
    match ids.find(|&&id| id >= vocab_size) {
        Some(&id) => Err(Error::UnknownToken { id, vocab_size, model: model.name.clone() }),
        None => Ok(()),
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
    /// Tokens of the prompt that the first group had in its cache; with its first token only.
    pub n_cached: u64,
    /// With the last delta only.
    pub finish: Option<Finish>,
    /// With the finish, where one lead did it all: its time for it.
    pub lead_time: Option<Duration>,
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
