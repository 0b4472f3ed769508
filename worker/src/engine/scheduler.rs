//! Who takes part in the next step: iteration-level batching (Yu et al. 2022, Orca, section 3.1)
//! over paged KV blocks (Kwon et al. 2023, PagedAttention, section 4). Pure: no clock, no I/O.
//!
//! Each step gives every decoding sequence its token and the rest of one token budget to prefill,
//! first come first served. A sequence is admitted once all blocks it may ever need can be promised
//! to it, so that nothing has to be preempted. Only the lead rank has a scheduler.

use std::collections::VecDeque;

use super::kv_blocks::{KvBlocks, blocks_for};
use super::sequence::{Finish, Sequence, SequenceId, Spec};
use super::step::{Entry, Kind, Limits, StepPlan};

/// What bounds a lead.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// What a plan may hold; `n_slots` is how many sequences run at once.
    pub limits: Limits,
    /// Sequences that wait for a slot and blocks.
    pub max_waiting: usize,
}

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
    #[error("{waiting} sequences are waiting already; try again later")]
    Overloaded { waiting: usize },
}

/// A lead's sequences and blocks.
#[derive(Debug)]
pub struct Scheduler {
    options: Options,
    kv: KvBlocks,
    waiting: VecDeque<Sequence>,
    /// In order of admission.
    running: Vec<Running>,
    free_slots: Vec<u32>,
    /// Freed since the last plan; the next one says so.
    freed_slots: Vec<u32>,
    /// By entry of the plan in flight: index into `running`.
    in_flight: Vec<usize>,
    /// Of a commit: those of `running` that ended. Kept for its memory, as is `slots`.
    finished: Vec<usize>,
    /// Of `check_integrity`.
    slots: Vec<u32>,
    next_id: u64,
}

#[derive(Debug)]
struct Running {
    slot: u32,
    sequence: Sequence,
}

/// What a step meant for one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Committed {
    pub id: SequenceId,
    pub token: u32,
    pub finish: Option<Finish>,
}

impl Scheduler {
    /// # Panics
    /// A step could not hold one row of every running sequence: the caller's options contradict.
    #[must_use]
    pub fn new(options: Options) -> Self {
        let Limits { n_slots, max_batch_tokens, max_sample_rows, n_kv_blocks, .. } = options.limits;
        assert!(n_slots > 0, "at least one sequence can run");
        assert!(max_batch_tokens >= n_slots, "a step holds a token of every running sequence");
        assert!(max_sample_rows >= n_slots, "a step samples a row of every running sequence");
        Self {
            kv: KvBlocks::new(n_kv_blocks),
            waiting: VecDeque::with_capacity(options.max_waiting),
            running: Vec::with_capacity(n_slots),
            free_slots: (0..n_slots as u32).rev().collect(),
            freed_slots: Vec::with_capacity(n_slots),
            in_flight: Vec::with_capacity(n_slots),
            finished: Vec::with_capacity(n_slots),
            slots: Vec::with_capacity(n_slots),
            next_id: 0,
            options,
        }
    }

    /// Takes a sequence into the queue.
    ///
    /// # Errors
    /// It could never run here, or the queue is full.
    pub fn submit(&mut self, spec: Spec) -> Result<SequenceId, Refusal> {
        self.check(&spec)?;
        if self.waiting.len() >= self.options.max_waiting {
            return Err(Refusal::Overloaded { waiting: self.waiting.len() });
        }
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        self.waiting.push_back(Sequence::new(id, spec));
        Ok(id)
    }

    fn check(&self, spec: &Spec) -> Result<(), Refusal> {
        let Limits { max_context, vocab, .. } = self.options.limits;
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
        let total = self.kv.n_total();
        if needed > total as usize {
            return Err(Refusal::TooFewBlocks { prompt, max_tokens, needed, total });
        }
        Ok(())
    }

    /// Forgets a sequence, waiting or running; false if it is not here. Not while a plan is in
    /// flight.
    pub fn cancel(&mut self, id: SequenceId) -> bool {
        assert!(self.in_flight.is_empty(), "a cancel waits for the end of the step");
        if let Some(at) = self.waiting.iter().position(|sequence| sequence.id == id) {
            self.waiting.remove(at);
            return true;
        }
        let at = self.running.iter().position(|running| running.sequence.id == id);
        if let Some(at) = at {
            self.retire(at);
        }
        at.is_some()
    }

    /// Plans the next step into `plan`; false, and an empty plan, if there is nothing to run. After
    /// true `commit` must follow.
    pub fn schedule(&mut self, plan: &mut StepPlan) -> bool {
        assert!(self.in_flight.is_empty(), "the last step was not committed");
        plan.clear();
        plan.freed_slots.append(&mut self.freed_slots);
        let mut room = Room {
            tokens: self.options.limits.max_batch_tokens,
            rows: self.options.limits.max_sample_rows,
        };
        // Decodes first: prefill, however much there is, only gets what they leave.
        for at in 0..self.running.len() {
            if self.running[at].sequence.is_decoding() {
                self.put(at, 1, &mut room, plan);
            }
        }
        for at in 0..self.running.len() {
            if !self.running[at].sequence.is_decoding() {
                self.prefill(at, &mut room, plan);
            }
        }
        while room.tokens > 0 && room.rows > 0 && self.admit() {
            self.prefill(self.running.len() - 1, &mut room, plan);
        }
        if plan.entries.is_empty() {
            self.freed_slots.append(&mut plan.freed_slots);
            return false;
        }
        plan.kind = Kind::Run;
        true
    }

    /// Moves the head of the queue to the running, if a slot and all its blocks are there.
    fn admit(&mut self) -> bool {
        let (Some(sequence), Some(&slot)) = (self.waiting.front_mut(), self.free_slots.last())
        else {
            return false;
        };
        let n_blocks = blocks_for(sequence.max_positions());
        if !self.kv.reserve(&mut sequence.blocks, n_blocks) {
            return false;
        }
        self.free_slots.pop();
        let mut sequence = self.waiting.pop_front().expect("it was looked at");
        sequence.tokens.reserve_exact(sequence.max_tokens);
        self.running.push(Running { slot, sequence });
        true
    }

    /// The next piece of a prompt, as large as there is room for.
    fn prefill(&mut self, at: usize, room: &mut Room, plan: &mut StepPlan) {
        let sequence = &self.running[at].sequence;
        let n_pending = sequence.n_pending();
        let mut n_tokens = n_pending.min(room.tokens);
        if sequence.prompt_logprobs {
            n_tokens = n_tokens.min(room.rows);
        } else if n_tokens == n_pending && room.rows == 0 {
            n_tokens -= 1; // its last row would have to be sampled
        }
        if n_tokens > 0 {
            self.put(at, n_tokens, room, plan);
        }
    }

    /// Adds the next `n_tokens` of a running sequence to the plan.
    fn put(&mut self, at: usize, n_tokens: usize, room: &mut Room, plan: &mut StepPlan) {
        let Running { slot, sequence } = &mut self.running[at];
        let (start, end) = (sequence.n_computed, sequence.n_computed + n_tokens);
        let n_blocks = blocks_for(end) - sequence.blocks.blocks().len();
        for _ in 0..n_blocks {
            plan.blocks.push(self.kv.append(&mut sequence.blocks));
        }
        plan.tokens.extend_from_slice(&sequence.tokens[start..end]);
        let n_sampled = match sequence.prompt_logprobs && !sequence.is_decoding() {
            true => n_tokens,
            false => usize::from(end == sequence.tokens.len()),
        };
        plan.asks |= n_sampled > 0 && sequence.asks();
        room.tokens -= n_tokens;
        room.rows -= n_sampled;
        plan.entries.push(Entry {
            slot: *slot,
            start: start as u32,
            n_tokens: n_tokens as u32,
            n_blocks: n_blocks as u32,
            n_sampled: n_sampled as u32,
        });
        self.in_flight.push(at);
    }

    /// The sequence of an entry of the plan in flight.
    #[must_use]
    pub fn scheduled(&self, entry_idx: usize) -> &Sequence {
        &self.running[self.in_flight[entry_idx]].sequence
    }

    /// Ends the step in flight. `tokens`: by entry, the next token of its sequence if the step
    /// reached it. Appends to `out` what was generated, in the order of the plan.
    pub fn commit(&mut self, plan: &StepPlan, tokens: &[Option<u32>], out: &mut Vec<Committed>) {
        assert_eq!(tokens.len(), plan.entries.len(), "one answer for each entry");
        let scheduled = std::mem::take(&mut self.in_flight);
        for ((entry, &at), &token) in plan.entries.iter().zip(&scheduled).zip(tokens) {
            let sequence = &mut self.running[at].sequence;
            sequence.n_computed += entry.n_tokens as usize;
            assert_eq!(token.is_some(), sequence.n_pending() == 0, "a token follows the last one");
            let Some(token) = token else { continue };
            let finish = sequence.push(token);
            out.push(Committed { id: sequence.id, token, finish });
            if finish.is_some() {
                self.finished.push(at);
            }
        }
        self.finished.sort_unstable();
        while let Some(at) = self.finished.pop() {
            self.retire(at);
        }
        self.in_flight = scheduled;
        self.in_flight.clear();
        if cfg!(debug_assertions) {
            self.check_integrity();
        }
    }

    /// The one way out of the running: blocks and slot are free again.
    fn retire(&mut self, at: usize) {
        let Running { slot, mut sequence } = self.running.remove(at);
        self.kv.release(&mut sequence.blocks);
        self.free_slots.push(slot);
        self.freed_slots.push(slot);
    }

    #[must_use]
    pub fn n_running(&self) -> usize {
        self.running.len()
    }

    #[must_use]
    pub fn n_waiting(&self) -> usize {
        self.waiting.len()
    }

    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    #[must_use]
    pub fn kv(&self) -> &KvBlocks {
        &self.kv
    }

    /// free + used = all, for blocks and for slots.
    ///
    /// # Panics
    /// It does not hold: a bug.
    pub fn check_integrity(&mut self) {
        self.kv.check_integrity(self.running.iter().map(|running| &running.sequence.blocks));
        let slots = &mut self.slots;
        slots.clear();
        slots.extend(self.running.iter().map(|running| running.slot));
        slots.extend(&self.free_slots);
        slots.sort_unstable();
        assert!(slots.iter().copied().eq(0..self.options.limits.n_slots as u32), "slots");
        for Running { sequence, .. } in &self.running {
            let n_blocks = sequence.blocks.blocks().len();
            assert_eq!(n_blocks, blocks_for(sequence.n_computed), "blocks of {:?}", sequence.id);
        }
    }
}

/// What is left of a step.
struct Room {
    tokens: usize,
    rows: usize,
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::backend::Batch;
    use crate::engine::batch::Tables;
    use crate::engine::sampler::Sampling;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};
    use std::collections::HashMap;

    fn options(n_kv_blocks: u32) -> Options {
        let limits = Limits {
            n_slots: 4,
            max_batch_tokens: 32,
            max_sample_rows: 6,
            max_context: 200,
            n_kv_blocks,
            vocab: 1000,
        };
        Options { limits, max_waiting: 5 }
    }

    fn spec(prompt_len: usize, max_tokens: u32) -> Spec {
        let prompt = (0..prompt_len as u32).collect();
        Spec { prompt, max_tokens, sampling: Sampling::default(), prompt_logprobs: false }
    }

    /// (slot, start, tokens, sampled)
    type Brief = (u32, u32, u32, u32);

    /// One step in which every sampled token is 7.
    fn step(scheduler: &mut Scheduler) -> (Vec<Brief>, Vec<Committed>) {
        let (mut plan, mut out) = (StepPlan::default(), Vec::new());
        if scheduler.schedule(&mut plan) {
            let tokens: Vec<_> = (0..plan.entries.len())
                .map(|at| {
                    let end = plan.entries[at].start + plan.entries[at].n_tokens;
                    (end as usize == scheduler.scheduled(at).tokens.len()).then_some(7)
                })
                .collect();
            scheduler.commit(&plan, &tokens, &mut out);
        }
        let entry = |e: &Entry| (e.slot, e.start, e.n_tokens, e.n_sampled);
        (plan.entries.iter().map(entry).collect(), out)
    }

    #[test]
    fn decodes_come_first_and_prefill_gets_the_rest() {
        let mut scheduler = Scheduler::new(options(64));
        scheduler.submit(spec(3, 9)).unwrap();
        assert_eq!(step(&mut scheduler).0, [(0, 0, 3, 1)]);
        scheduler.submit(spec(100, 1)).unwrap();
        scheduler.submit(spec(2, 2)).unwrap();
        assert_eq!(step(&mut scheduler).0, [(0, 3, 1, 1), (1, 0, 31, 0)]);
        assert_eq!(step(&mut scheduler).0, [(0, 4, 1, 1), (1, 31, 31, 0)]);
        assert_eq!(step(&mut scheduler).0, [(0, 5, 1, 1), (1, 62, 31, 0)]);
        let (entries, committed) = step(&mut scheduler);
        assert_eq!(entries, [(0, 6, 1, 1), (1, 93, 7, 1), (2, 0, 2, 1)]);
        let finish = committed.iter().map(|c| c.finish).collect::<Vec<_>>();
        assert_eq!(finish, [None, Some(Finish::Length), None]);
    }

    #[test]
    fn a_sequence_waits_until_all_its_blocks_are_there() {
        let mut scheduler = Scheduler::new(options(4));
        scheduler.submit(spec(1, 48)).unwrap(); // three blocks
        let second = scheduler.submit(spec(17, 1)).unwrap(); // two
        scheduler.submit(spec(1, 1)).unwrap(); // one, but it came later
        assert_eq!(step(&mut scheduler).0.len(), 1);
        assert_eq!((scheduler.n_running(), scheduler.n_waiting()), (1, 2));
        assert!(scheduler.cancel(second));
        assert_eq!(step(&mut scheduler).0.len(), 2);
    }

    #[test]
    fn prompt_logprobs_sample_every_row_within_bounds() {
        let mut scheduler = Scheduler::new(options(64));
        scheduler.submit(Spec { prompt_logprobs: true, ..spec(15, 3) }).unwrap();
        scheduler.submit(spec(40, 3)).unwrap();
        assert_eq!(step(&mut scheduler).0, [(0, 0, 6, 6)]);
        assert_eq!(step(&mut scheduler).0, [(0, 6, 6, 6)]);
        assert_eq!(step(&mut scheduler).0, [(0, 12, 3, 3), (1, 0, 29, 0)]);
        assert_eq!(step(&mut scheduler).0, [(0, 15, 1, 1), (1, 29, 11, 1)]);
    }

    #[test]
    fn what_can_never_run_is_refused_and_a_full_queue_says_so() {
        let check = |spec: Spec, expect: &str| {
            let error = Scheduler::new(options(8)).submit(spec).unwrap_err().to_string();
            assert!(error.contains(expect), "{error}");
        };
        check(spec(0, 1), "empty");
        check(spec(1, 0), "max_tokens is 0");
        check(spec(100, 101), "context of 200 tokens");
        check(spec(100, u32::MAX), "context of 200 tokens");
        check(spec(100, 100), "need 13 KV blocks; this group has 8");
        check(Spec { prompt: vec![1, 1000], ..spec(1, 1) }, "token id 1000");
        let sampling = Sampling { stop_token_ids: vec![1001], ..Sampling::default() };
        check(Spec { sampling, ..spec(1, 1) }, "token id 1001");
        let sampling = Sampling { logit_bias: vec![(1002, 1.0)], ..Sampling::default() };
        check(Spec { sampling, ..spec(1, 1) }, "token id 1002");
        let mut scheduler = Scheduler::new(options(64));
        for _ in 0..5 {
            scheduler.submit(spec(1, 1)).unwrap();
        }
        let refused = scheduler.submit(spec(1, 1));
        assert_eq!(refused, Err(Refusal::Overloaded { waiting: 5 }));
    }

    #[test]
    fn ids_that_are_gone_cancel_nothing() {
        let mut scheduler = Scheduler::new(options(64));
        let id = scheduler.submit(spec(1, 1)).unwrap();
        assert!(scheduler.cancel(id));
        assert!(!scheduler.cancel(id));
        assert_eq!(scheduler.n_waiting(), 0);
    }

    /// Random arrivals, lengths and cancels; a follower's tables are kept beside the lead.
    #[test]
    fn every_sequence_ends_and_every_block_comes_back() {
        let seed = 20_261_123;
        println!("seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        let mut scheduler = Scheduler::new(options(24));
        let (mut tables, mut batch) = (Tables::new(&options(24).limits), Batch::default());
        let (mut plan, mut wire) = (StepPlan::default(), Vec::new());
        let mut live: HashMap<SequenceId, usize> = HashMap::new(); // tokens still to come
        let (mut n_done, mut n_cancelled, mut n_steps) = (0, 0, 0);
        while n_steps < 30_000 || !scheduler.is_idle() {
            if n_steps < 30_000 && rng.random_bool(0.3) {
                let max_tokens = rng.random_range(1..60);
                let prompt_logprobs = rng.random_bool(0.1);
                let spec = Spec { prompt_logprobs, ..spec(rng.random_range(1..140), max_tokens) };
                if let Ok(id) = scheduler.submit(spec) {
                    live.insert(id, max_tokens as usize);
                }
            }
            if rng.random_bool(0.05)
                && let Some(&id) = live.keys().min()
            {
                assert!(scheduler.cancel(id), "a live sequence can be cancelled");
                live.remove(&id);
                n_cancelled += 1;
            }
            n_steps += 1;
            if !scheduler.schedule(&mut plan) {
                assert!(scheduler.is_idle(), "what can run does run");
                continue;
            }
            plan.step = n_steps;
            plan.encode(&mut wire);
            plan.decode(&wire, &options(24).limits).unwrap();
            tables.apply(&plan, &mut batch).unwrap();
            let mut slots = batch.slots.clone();
            slots.sort_unstable();
            slots.dedup();
            assert_eq!(slots.len(), batch.tokens.len(), "no two tokens share a place");
            let tokens: Vec<_> = (0..plan.entries.len())
                .map(|at| scheduler.scheduled(at).n_pending() == plan.entries[at].n_tokens as usize)
                .map(|is_last| is_last.then(|| rng.random_range(0..1000)))
                .collect();
            let mut out = Vec::new();
            scheduler.commit(&plan, &tokens, &mut out);
            for Committed { id, finish, .. } in out {
                let left = live.get_mut(&id).expect("only live sequences get tokens");
                *left -= 1;
                assert_eq!(finish.is_some(), *left == 0);
                if finish.is_some() {
                    live.remove(&id);
                    n_done += 1;
                }
            }
        }
        scheduler.check_integrity();
        assert_eq!(scheduler.kv().n_available(), 24);
        assert!(live.is_empty() && n_done > 1000 && n_cancelled > 100, "{n_done} {n_cancelled}");
    }
}
