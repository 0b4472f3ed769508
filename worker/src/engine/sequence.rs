//! One generation inside an engine: what was asked, the tokens so far, and how many of them are
//! computed.
//!
//! Only the lead rank has them. It does not know blocks of others, steps or streams of bytes.

use evener_telemetry::Context;

use super::fairness::Account;
use super::kv_blocks::BlockTable;
use super::names::{Chain, Name};
use super::sampler::Sampling;
use super::speculation::MAX_DRAFTS;

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
    pub origin: Origin,
}

/// Whose a sequence is, and how urgent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Origin {
    /// Users share the engine fairly.
    pub user: String,
    /// Only sequences of equal salt share KV blocks.
    pub salt: String,
    /// Lower is sooner; 0 is ordinary.
    pub priority: i32,
    /// The span it is a part of, if its request is traced.
    pub trace: Option<Context>,
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
    pub priority: i32,
    pub account: Account,
    pub prompt_len: usize,
    pub max_tokens: usize,
    /// The prompt, then what was generated.
    pub tokens: Vec<u32>,
    /// What may follow them; verified with the next token. Only while it decodes.
    pub drafts: Vec<u32>,
    /// Names of the blocks that `tokens` fill.
    pub chain: Chain,
    pub blocks: BlockTable,
    /// Blocks of `blocks` that the ranks know of.
    pub n_told: usize,
    /// Positions whose keys and values are in the cache.
    pub n_computed: usize,
    /// The same once the step in flight is done, drafts left out.
    pub n_planned: usize,
    /// Positions that were ever computed, before a preemption too.
    pub n_ever: usize,
    /// Positions whose logits were looked at.
    pub n_sampled: usize,
    /// Prompt tokens that were in the cache when it first came to them.
    pub n_cached: usize,
    pub n_preempted: u32,
}

impl Sequence {
    /// `root`: where the names of its blocks begin.
    #[must_use]
    pub fn new(id: SequenceId, spec: Spec, root: Name, account: Account) -> Self {
        let Spec { prompt, max_tokens, sampling, prompt_logprobs, origin } = spec;
        let mut chain = Chain::new(root);
        chain.extend(&prompt);
        Self {
            id,
            sampling,
            prompt_logprobs,
            priority: origin.priority,
            account,
            prompt_len: prompt.len(),
            max_tokens: max_tokens as usize,
            tokens: prompt,
            drafts: Vec::new(),
            chain,
            blocks: BlockTable::default(),
            n_told: 0,
            n_computed: 0,
            n_planned: 0,
            n_ever: 0,
            n_sampled: 0,
            n_cached: 0,
            n_preempted: 0,
        }
    }

    /// Makes room for all it may come to, so that steps allocate nothing for it.
    pub fn reserve(&mut self) {
        let n_most = self.prompt_len + self.max_tokens;
        self.tokens.reserve_exact(n_most - self.tokens.len());
        self.chain.reserve(n_most);
        self.blocks.reserve(n_most);
        self.drafts.reserve_exact(MAX_DRAFTS);
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

    /// From here one token a step: its prompt, and what it had generated before a preemption, is
    /// computed.
    #[must_use]
    pub fn is_decoding(&self) -> bool {
        self.n_generated() > 0 && self.n_pending() == 1
    }

    /// The first position whose logits are still wanted: of a prompt whose log-probabilities are
    /// asked for, each once; else the last token's.
    #[must_use]
    pub fn first_wanted(&self) -> usize {
        if self.prompt_logprobs { self.n_sampled } else { self.tokens.len() - 1 }
    }

    /// Its tokens cannot be chosen, or told about, by the likeliest token alone.
    #[must_use]
    pub fn asks(&self) -> bool {
        self.sampling.asks() || self.prompt_logprobs
    }

    /// Goes on at `end`: what comes before was computed for others.
    pub fn spare(&mut self, end: usize) {
        self.n_cached += end.min(self.prompt_len).saturating_sub(self.n_ever);
        self.n_computed = end;
        self.n_planned = end;
        self.n_ever = self.n_ever.max(end);
    }

    /// What was computed is lost; what was generated, and what was told, is not.
    pub fn forget_computed(&mut self) {
        self.drafts.clear();
        self.n_told = 0;
        self.n_computed = 0;
        self.n_planned = 0;
        self.n_preempted += 1;
    }

    /// Takes the next token in.
    pub fn push(&mut self, token: u32) -> Option<Finish> {
        self.tokens.push(token);
        self.chain.extend(&self.tokens);
        if self.sampling.stop_token_ids.contains(&token) {
            return Some(Finish::Stop);
        }
        (self.n_generated() >= self.max_tokens).then_some(Finish::Length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::fairness::Fairness;

    fn sequence(max_tokens: u32, stop: &[u32]) -> Sequence {
        let sampling = Sampling { stop_token_ids: stop.to_vec(), ..Sampling::default() };
        let origin = Origin::default();
        let prompt = vec![5, 6, 7];
        let spec = Spec { prompt, max_tokens, sampling, prompt_logprobs: false, origin };
        let account = Fairness::default().enter("");
        Sequence::new(SequenceId(1), spec, Name::root("", "", ""), account)
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
    fn it_decodes_when_all_but_the_last_token_is_computed() {
        let mut s = sequence(3, &[]);
        assert_eq!((s.n_pending(), s.is_decoding(), s.first_wanted()), (3, false, 2));
        s.n_computed = 3;
        s.push(1);
        assert_eq!((s.n_pending(), s.is_decoding(), s.first_wanted()), (1, true, 3));
        s.forget_computed();
        assert_eq!((s.n_pending(), s.is_decoding(), s.first_wanted()), (4, false, 3));
    }
}
