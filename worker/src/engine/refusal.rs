//! Which sequences are not taken in: those that could never run here, whatever else does. Pure.
//! Called by `scheduler`, which adds the one reason that passes: a full queue.

use super::kv_blocks::blocks_for;
use super::sequence::Spec;
use super::step::Limits;

/// Priorities go from minus this to this.
pub const MAX_PRIORITY: i32 = 100;

/// Why a sequence was not taken in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("the prompt is empty; at least one token is needed")]
    EmptyPrompt,
    #[error("max_tokens is 0; at least 1 is needed")]
    NothingToDo,
    #[error(
        "{prompt} prompt tokens and {max_tokens} to generate are more than the context of \
         {max_context} tokens"
    )]
    TooLong { prompt: usize, max_tokens: u32, max_context: usize },
    #[error(
        "{prompt} prompt tokens and {max_tokens} to generate need {needed} KV blocks; this group \
         has {total} of {} tokens",
        crate::backend::KV_BLOCK_LEN
    )]
    TooFewBlocks { prompt: usize, max_tokens: u32, needed: usize, total: u32 },
    #[error("token id {token} is outside the vocabulary of {vocab}")]
    BadToken { token: u32, vocab: usize },
    #[error("priority {priority} is not from -{MAX_PRIORITY} to {MAX_PRIORITY}")]
    BadPriority { priority: i32 },
    #[error("{waiting} sequences are waiting already; try again later")]
    Overloaded { waiting: usize },
}

/// # Errors
/// It could never run within these limits.
pub fn check(spec: &Spec, limits: &Limits) -> Result<(), Refusal> {
    let Limits { max_context, vocab, n_kv_blocks: total, .. } = *limits;
    let (prompt, max_tokens) = (spec.prompt.len(), spec.max_tokens);
    if prompt == 0 {
        return Err(Refusal::EmptyPrompt);
    }
    if max_tokens == 0 {
        return Err(Refusal::NothingToDo);
    }
    if prompt + max_tokens as usize > max_context {
        return Err(Refusal::TooLong { prompt, max_tokens, max_context });
    }
    let sampling = &spec.sampling;
    let biased = sampling.logit_bias.iter().map(|(token, _)| token);
    let mut named = spec.prompt.iter().chain(&sampling.stop_token_ids).chain(biased);
    if let Some(&token) = named.find(|&&token| token as usize >= vocab) {
        return Err(Refusal::BadToken { token, vocab });
    }
    let needed = blocks_for(prompt + max_tokens as usize - 1);
    if needed > total as usize {
        return Err(Refusal::TooFewBlocks { prompt, max_tokens, needed, total });
    }
    let priority = spec.origin.priority;
    if !(-MAX_PRIORITY..=MAX_PRIORITY).contains(&priority) {
        return Err(Refusal::BadPriority { priority });
    }
    Ok(())
}
