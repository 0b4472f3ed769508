//! One generation inside an engine: what was asked, the tokens so far, and how many of them are
//! computed.
//!
//! Only the lead rank has them. It does not know blocks of others, steps or streams of bytes.

use super::kv_blocks::BlockTable;
use super::sampler::Sampling;

/// Names a sequence within an engine's life; never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub u64);

/// What is to be generated.
#[derive(Debug, Clone, PartialEq)]
pub struct Spec {
    /// Token ids, at least one; on resumption it ends with the tokens already sent.
    pub prompt: Vec<u32>,
    /// Tokens to generate now, at least 1.
    pub max_tokens: u32,
    pub sampling: Sampling,
    /// Report the log-probability of every prompt token but the first.
    pub prompt_logprobs: bool,
}

/// Why a sequence ended by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// A stop token.
    Stop,
    /// `max_tokens` of them.
    Length,
}

/// A sequence that waits or runs.
#[derive(Debug)]
pub struct Sequence {
    pub id: SequenceId,
    pub sampling: Sampling,
    pub prompt_logprobs: bool,
    pub prompt_len: usize,
    pub max_tokens: usize,
    /// The prompt, then what was generated.
    pub tokens: Vec<u32>,
    /// Positions whose keys and values are in the cache.
    pub n_computed: usize,
    pub blocks: BlockTable,
}

impl Sequence {
    #[must_use]
    pub fn new(id: SequenceId, spec: Spec) -> Self {
        let Spec { prompt, max_tokens, sampling, prompt_logprobs } = spec;
        Self {
            id,
            sampling,
            prompt_logprobs,
            prompt_len: prompt.len(),
            max_tokens: max_tokens as usize,
            tokens: prompt,
            n_computed: 0,
            blocks: BlockTable::default(),
        }
    }

    #[must_use]
    pub fn n_generated(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }

    /// Tokens that count as the answer: those from before an interruption too.
    #[must_use]
    pub fn n_output(&self) -> usize {
        self.n_generated() + (self.sampling.n_resumed as usize).min(self.prompt_len)
    }

    /// Tokens that are known and not yet computed.
    #[must_use]
    pub fn n_pending(&self) -> usize {
        self.tokens.len() - self.n_computed
    }

    /// Its prompt is computed: from here one token a step.
    #[must_use]
    pub fn is_decoding(&self) -> bool {
        self.n_generated() > 0
    }

    /// Its tokens cannot be chosen, or told about, by the likeliest token alone.
    #[must_use]
    pub fn asks(&self) -> bool {
        self.sampling.asks() || self.prompt_logprobs
    }

    /// Positions that will ever be computed: all but that of the last token generated.
    #[must_use]
    pub fn max_positions(&self) -> usize {
        self.prompt_len + self.max_tokens - 1
    }

    /// Takes the next token in.
    pub fn push(&mut self, token: u32) -> Option<Finish> {
        self.tokens.push(token);
        if self.sampling.stop_token_ids.contains(&token) {
            return Some(Finish::Stop);
        }
        (self.n_generated() >= self.max_tokens).then_some(Finish::Length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequence(max_tokens: u32, stop: &[u32]) -> Sequence {
        let sampling = Sampling { stop_token_ids: stop.to_vec(), ..Sampling::default() };
        let spec = Spec { prompt: vec![5, 6, 7], max_tokens, sampling, prompt_logprobs: false };
        Sequence::new(SequenceId(1), spec)
    }

    #[test]
    fn it_ends_at_a_stop_token_or_its_length() {
        let mut s = sequence(3, &[9]);
        assert_eq!((s.push(1), s.push(9)), (None, Some(Finish::Stop)));
        let mut s = sequence(2, &[9]);
        assert_eq!((s.push(1), s.push(2)), (None, Some(Finish::Length)));
        let mut s = sequence(1, &[9]);
        assert_eq!(s.push(9), Some(Finish::Stop), "a stop token says more than the length");
    }

    #[test]
    fn a_stop_token_in_the_prompt_ends_nothing() {
        let mut s = sequence(2, &[6]);
        assert_eq!(s.push(1), None);
    }

    #[test]
    fn the_last_token_is_never_computed() {
        let mut s = sequence(2, &[]);
        assert_eq!((s.n_pending(), s.is_decoding()), (3, false));
        s.n_computed = 3;
        s.push(1);
        assert_eq!((s.n_pending(), s.is_decoding()), (1, true));
        s.n_computed = 4;
        assert_eq!((s.push(2), s.max_positions()), (Some(Finish::Length), s.n_computed));
    }
}
