//! The logits of a step to the next token of each of its sequences, and to the log-probabilities
//! that were asked for. Between the sampler, which knows one row, and the lead, which knows
//! streams.
//!
//! Where the likeliest token is not enough, all ranks are asked about all sampled rows; a row of
//! which the answers cannot tell the token (a wide nucleus, a draw from the tail) is fetched whole.
//!
//! A row behind a draft is chosen from as if the draft were there. Its token counts if the row
//! before chose that very draft, so what comes out is what would have come one by one.

use std::collections::HashMap;

use evener_kernels::peaks::{n_peaks, peaks_of};

use super::Error;
use super::answer::Answer;
use super::ask::{Ask, RowAsk};
use super::chosen::Chosen;
use super::masks::Masks;
use super::output::TokenOut;
use super::penalties::Edits;
use super::rank::Rank;
use super::row::{Edit, Norm, Row, edit};
use super::sampler::{Candidate, Head, MAX_LOGPROBS, Sampling, beyond, choose};
use super::scheduler::Scheduler;
use super::sequence::{Sequence, SequenceId};
use super::step::{Entry, StepPlan};

/// So many times more candidates are looked at where those before were too few.
const WIDER: usize = 8;

/// Working memory, and the answer for one step.
#[derive(Debug, Default)]
pub struct Chooser {
    /// By entry of the plan: the tokens that follow, if the step reached the end of what is known.
    pub chosen: Chosen,
    /// By entry of the plan.
    pub choices: Vec<Choice>,
    /// Of all choices, one after the other, as many as were chosen.
    pub tokens: Vec<TokenOut>,
    /// The same before it is known which drafts were right.
    found: Vec<TokenOut>,
    /// Of the sequences that have any.
    edits: HashMap<SequenceId, Edits>,
    masks: Masks,
    ask: Ask,
    answer: Answer,
    whole: Whole,
    open: Vec<Open>,
    fetch: StepPlan,
}

/// What to tell about one entry.
#[derive(Debug, Default)]
pub struct Choice {
    /// Of [`Chooser::tokens`].
    pub n_tokens: usize,
    /// Of the positions that follow the entry's rows, where these are prompt.
    pub prompt_tokens: Vec<TokenOut>,
    /// Why the sequence cannot go on: its token means nothing.
    pub failure: Option<String>,
}

/// A row of which the answers did not tell the token, and what they did tell.
#[derive(Debug, Clone, Copy)]
struct Open {
    entry_idx: usize,
    row_idx: u32,
    /// Its place among the tokens found.
    found_idx: usize,
    position: u32,
    norm: Option<Norm>,
    total: u64,
}

/// A row that was fetched.
#[derive(Debug, Default)]
struct Whole {
    raw: Vec<f32>,
    edited: Vec<f32>,
    peaks: Vec<f32>,
    candidates: Vec<Candidate>,
    scratch: Vec<i32>,
    keys: Vec<u64>,
}

impl Chooser {
    /// Before the plan is run: what can be computed beside it.
    ///
    /// # Errors
    /// The epoch is over.
    pub fn begin(&mut self, scheduler: &Scheduler, plan: &StepPlan) -> Result<(), Error> {
        self.masks.begin(scheduler, plan)
    }

    /// Chooses for every entry of the plan in flight.
    ///
    /// # Errors
    /// The epoch is over.
    pub fn choose(
        &mut self,
        rank: &mut Rank,
        scheduler: &Scheduler,
        plan: &StepPlan,
    ) -> Result<(), Error> {
        self.chosen.clear();
        self.choices.clear();
        self.tokens.clear();
        if plan.asks {
            self.masks.join()?;
            self.ask_about(scheduler, plan, rank.limits().vocab);
            rank.ask(&self.ask)?;
        }
        let mut row_idx = 0;
        for (entry_idx, entry) in plan.entries.iter().enumerate() {
            let sequence = scheduler.scheduled(entry_idx);
            let choice = match plan.asks {
                true => self.choose_entry(rank, sequence, entry, entry_idx, row_idx)?,
                false => self.take_likeliest(rank, sequence, entry, row_idx)?,
            };
            row_idx += entry.n_sampled as usize;
            self.choices.push(choice);
        }
        if !self.open.is_empty() {
            self.look_wider(rank, scheduler)?;
        }
        self.keep_verified(scheduler);
        Ok(())
    }

    /// Lets go of what stands behind a draft that was not chosen.
    fn keep_verified(&mut self, scheduler: &Scheduler) {
        let mut found = self.found.drain(..);
        for (entry_idx, choice) in self.choices.iter_mut().enumerate() {
            let drafts = &scheduler.scheduled(entry_idx).drafts;
            let (n_found, mut is_right) = (std::mem::take(&mut choice.n_tokens), true);
            for (nth, token) in found.by_ref().take(n_found).enumerate() {
                if is_right {
                    is_right = drafts.get(nth) == Some(&token.id);
                    self.chosen.push(token.id);
                    self.tokens.push(token);
                    choice.n_tokens += 1;
                }
            }
            self.chosen.end_entry();
        }
    }

    /// The sequence is gone.
    pub fn forget(&mut self, id: SequenceId) {
        self.edits.remove(&id);
        self.masks.forget(id);
    }

    fn ask_about(&mut self, scheduler: &Scheduler, plan: &StepPlan, vocab: usize) {
        self.ask.clear();
        for (entry_idx, entry) in plan.entries.iter().enumerate() {
            let sequence = scheduler.scheduled(entry_idx);
            let sampling = &sequence.sampling;
            for i in 0..entry.n_sampled {
                let n_raw = sampling.n_logprobs.map(|n| n.min(MAX_LOGPROBS).min(vocab as u32));
                let known = sequence.tokens.get(next_position(entry, i) as usize);
                let row = match known {
                    Some(_) => RowAsk {
                        token: known.copied(),
                        n_raw: n_raw.or(Some(0)),
                        ..RowAsk::default()
                    },
                    None => {
                        let n_drafts = next_position(entry, i) as usize - sequence.tokens.len();
                        let drafts = &sequence.drafts[..n_drafts];
                        let (is_masked, may_go_on) = self.put_mask(sequence, vocab);
                        RowAsk {
                            n_top: sampling.n_head().min(vocab as u32),
                            total_scale: sampling.wants_total().then(|| sampling.scale()),
                            n_raw,
                            n_edits: self.put_edits(sequence, drafts, may_go_on),
                            is_masked,
                            ..RowAsk::default()
                        }
                    }
                };
                self.ask.rows.push(row);
            }
        }
    }

    /// Adds a sequence's mask to the ask. Says whether it has one, and whether any token but those
    /// that end it may come.
    fn put_mask(&mut self, sequence: &Sequence, vocab: usize) -> (bool, bool) {
        let stop_token_ids = &sequence.sampling.stop_token_ids;
        let Some(Ok(mask)) = self.masks.mask(sequence.id) else {
            return (false, stop_token_ids.len() < vocab);
        };
        let start = self.ask.masks.len();
        self.ask.masks.extend_from_slice(mask);
        self.ask.masks.resize(start + Ask::mask_words(vocab), 0);
        let n_allowed: u32 = mask.iter().map(|bits| bits.count_ones()).sum();
        let is_allowed = |token: u32| {
            mask.get(token as usize / 32).is_some_and(|bits| bits >> (token % 32) & 1 == 1)
        };
        let n_stops = stop_token_ids.iter().filter(|&&token| is_allowed(token)).count();
        (true, (n_allowed as usize) > n_stops)
    }

    /// Adds a sequence's edits, for the token behind these drafts, to the ask, and says how many.
    fn put_edits(&mut self, sequence: &Sequence, drafts: &[u32], may_go_on: bool) -> u32 {
        let (sampling, edits) = (&sequence.sampling, &mut self.ask.edits);
        let n_before = edits.len();
        let n_output = sequence.n_output();
        if sampling.has_edits() {
            let new = || Edits::new(sampling);
            let state = self.edits.entry(sequence.id).or_insert_with(new);
            let n_prompt = sequence.tokens.len() - n_output;
            state.take_in(&sequence.tokens, n_prompt, &sampling.penalties);
            state.ahead(drafts, &sampling.penalties, edits);
        }
        if n_output + drafts.len() < sampling.min_tokens as usize && may_go_on {
            edits.extend(sampling.stop_token_ids.iter().map(|&token| Edit::ban(token)));
        }
        (edits.len() - n_before) as u32
    }

    /// Of an entry whose sequence takes the likeliest token and wants to know no more.
    fn take_likeliest(
        &mut self,
        rank: &Rank,
        sequence: &Sequence,
        entry: &Entry,
        first_row_idx: usize,
    ) -> Result<Choice, Error> {
        let mut choice = Choice::default();
        for nth in 0..entry.n_sampled as usize {
            let id = rank.likeliest(first_row_idx + nth)?;
            self.found.push(TokenOut { id, logprob: None, top: Vec::new() });
            choice.n_tokens += 1;
            if sequence.drafts.get(nth) != Some(&id) {
                break;
            }
        }
        Ok(choice)
    }

    fn choose_entry(
        &mut self,
        rank: &mut Rank,
        sequence: &Sequence,
        entry: &Entry,
        entry_idx: usize,
        first_row_idx: usize,
    ) -> Result<Choice, Error> {
        let mut choice = Choice::default();
        if let Some(Err(reason)) = self.masks.mask(sequence.id) {
            choice.failure = Some(reason.to_owned());
        }
        let mut is_right = true;
        for i in 0..entry.n_sampled {
            let row_idx = first_row_idx + i as usize;
            let (asked, answer) = (self.ask.rows[row_idx], &mut self.answer);
            rank.take_answer(row_idx, &asked, answer)?;
            if let Some(id) = asked.token {
                let norm = answer.norm.zip(answer.token_logit);
                let logprob = norm.map(|(norm, logit)| norm.logprob(logit));
                choice.prompt_tokens.push(TokenOut { id, logprob, top: top(answer) });
                continue;
            }
            if !is_right {
                continue; // another token was chosen than the draft it stands behind
            }
            let Answer { candidates, is_all, total, .. } = &*answer;
            let (isa, is_all, total) = (rank.isa(), *is_all, *total);
            let head = Head { isa, candidates, is_all, total };
            let position = next_position(entry, i);
            if candidates.is_empty() {
                return Err(Error::NothingAllowed { position });
            }
            let nth = choice.n_tokens;
            choice.n_tokens += 1;
            let Some(chosen) = choose(&head, &sequence.sampling, position) else {
                let (row_idx, found_idx) = (row_idx as u32, self.found.len());
                let (norm, total) = (answer.norm, answer.total);
                self.open.push(Open { entry_idx, row_idx, found_idx, position, norm, total });
                // Its token is filled in once the row is here; until then its draft may be right.
                self.found.push(TokenOut { id: 0, logprob: None, top: top(answer) });
                continue;
            };
            let logprob = answer.norm.map(|norm| norm.logprob(candidates[chosen].raw));
            let id = candidates[chosen].token;
            is_right = sequence.drafts.get(nth) == Some(&id);
            self.found.push(TokenOut { id, logprob, top: top(answer) });
        }
        Ok(choice)
    }

    /// Decides the open rows by all of their logits.
    fn look_wider(&mut self, rank: &mut Rank, scheduler: &Scheduler) -> Result<(), Error> {
        self.fetch.clear();
        self.fetch.rows.extend(self.open.iter().map(|open| open.row_idx));
        rank.fetch(&mut self.fetch)?;
        for nth in 0..self.open.len() {
            let Open { entry_idx, row_idx, found_idx, position, norm, total } = self.open[nth];
            let sequence = scheduler.scheduled(entry_idx);
            rank.fetched(nth, &mut self.whole.raw);
            let vocab = self.whole.raw.len();
            let of_row = self.ask.iter(vocab).nth(row_idx as usize);
            let (_, edits, mask) = of_row.expect("an open row was asked about");
            let sampling = &sequence.sampling;
            let chosen = self.whole.choose(rank, edits, mask, (sampling, position), total)?;
            let token = &mut self.found[found_idx];
            token.id = chosen.token;
            token.logprob = norm.map(|norm| norm.logprob(chosen.raw));
        }
        self.open.clear();
        Ok(())
    }
}

impl Whole {
    /// The token at `position` of a sequence, of all candidates there are if need be.
    fn choose(
        &mut self,
        rank: &Rank,
        edits: &[Edit],
        mask: Option<&[u32]>,
        (sampling, position): (&Sampling, u32),
        total: u64,
    ) -> Result<Candidate, Error> {
        let Self { raw, edited, peaks, candidates, scratch, keys } = self;
        edited.clone_from(raw);
        edit(edited, 0, edits, mask);
        peaks.resize(n_peaks(edited.len()), 0.0);
        let isa = rank.isa();
        peaks_of(isa, edited, peaks);
        let row = Row::new(isa, 0, edited, peaks)?;
        if sampling.wants_tail() {
            row.likeliest(sampling.n_head() as usize, raw, candidates, scratch);
            let head = Head { isa, candidates, is_all: false, total };
            let at = beyond(&head, sampling, position);
            let token = row.passing(at, candidates, row.highest(), sampling.scale());
            let token = token.ok_or(Error::NothingAllowed { position })?;
            let [logit, raw] = [&*edited, &*raw].map(|row| row[token as usize]);
            return Ok(Candidate { token, logit, raw });
        }
        if sampling.wants_total() {
            row.reaching(sampling.nucleus(total), sampling.scale(), raw, candidates, keys);
            let head = Head { isa, candidates, is_all: false, total };
            if let Some(chosen) = choose(&head, sampling, position) {
                return Ok(candidates[chosen]);
            }
        }
        // At first as many as the peaks can tell from the rest.
        let mut n = peaks.len().max(sampling.top_k as usize);
        loop {
            row.likeliest(n, raw, candidates, scratch);
            let head = Head { isa, candidates, is_all: candidates.len() < n, total };
            if let Some(chosen) = choose(&head, sampling, position) {
                return Ok(candidates[chosen]);
            }
            if head.is_all {
                return Err(Error::NothingAllowed { position });
            }
            n *= WIDER;
        }
    }
}

/// The position that the `i`-th sampled row of an entry speaks of: the row of p, of p + 1.
fn next_position(entry: &Entry, i: u32) -> u32 {
    entry.start + entry.n_tokens - entry.n_sampled + i + 1
}

/// The likeliest alternatives.
fn top(answer: &Answer) -> Vec<(u32, f32)> {
    let Some(norm) = answer.norm else { return Vec::new() };
    answer.raw.iter().map(|likely| (likely.token, norm.logprob(likely.raw))).collect()
}
