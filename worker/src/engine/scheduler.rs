//! Who takes part in the next step: iteration-level batching (Yu et al. 2022, Orca, section 3.1)
//! over paged KV blocks (Kwon et al. 2023, PagedAttention, section 4) with chunked prefill (Agrawal
//! et al. 2024, Sarathi-Serve). Pure: no clock, no I/O. Only the lead rank has one.
//!
//! The running stand in order of rank: priority, then admission. Each step goes through them in
//! that order; every decoding sequence gets its token, and prefill gets what is left of one token
//! budget, but no more than the caller allows beside decodes (`pace`). Blocks are taken as they are
//! needed. When there are none, the last in rank is preempted: its blocks go, its tokens stay, and
//! it is admitted again before its equals and computes them anew. So the first in rank always gets
//! on, and as each fits alone, everyone ends. The waiting are admitted (`queue` says whose turn it
//! is) while there are slots, and blocks for what is known of all running and one more each.
//!
//! A prompt whose beginning is in the cache (`kv_blocks`) starts behind it. If another sequence is
//! just computing a block that this one needs too, it waits for it; and of a block that a running
//! one has begun in the same way it gets a copy to write on. So the choices of one request compute
//! their prompt once.

use super::chosen::Chosen;
use super::fairness::Fairness;
use super::kv_blocks::{KvBlocks, blocks_for};
use super::names::Name;
use super::queue::Queue;
use super::refusal;
use super::sequence::{Finish, Sequence, SequenceId, Spec};
use super::step::{Copy, Entry, Kind, Limits, StepPlan};
use crate::backend::KV_BLOCK_LEN;

pub use super::refusal::{MAX_PRIORITY, Refusal};

/// Tokens that are worth the copy of a block.
const MIN_COPIED: usize = 4;

/// What bounds a lead.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// What a plan may hold; `n_slots` is how many sequences run at once.
    pub limits: Limits,
    /// Sequences that wait for a slot and blocks.
    pub max_waiting: usize,
    /// A step with decodes may last this many times as long as without prefill; more than 1.
    pub max_stretch: f64,
    /// Tokens drafted and verified with a sequence's next one, where that pays; 0 is off.
    pub max_drafts: usize,
    /// Fingerprint of the model: blocks of another are never found.
    pub model: String,
}

impl Options {
    /// The defaults.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self { limits, max_waiting: 256, max_stretch: 2.0, max_drafts: 0, model: String::new() }
    }
}

/// A lead's sequences and blocks.
#[derive(Debug)]
pub struct Scheduler {
    options: Options,
    kv: KvBlocks,
    waiting: Queue,
    fairness: Fairness,
    /// By slot: the running.
    slots: Vec<Option<Sequence>>,
    /// Slots of the running, in order of rank.
    order: Vec<u32>,
    free_slots: Vec<u32>,
    /// Freed since the last plan; the next one says so.
    freed_slots: Vec<u32>,
    /// By entry of the plan in flight.
    in_flight: Vec<u32>,
    next_id: u64,
    n_preemptions: u64,
}

/// What a step meant for one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Committed {
    pub id: SequenceId,
    pub token: u32,
    pub finish: Option<Finish>,
}

/// What is left of a step for prefill.
struct Room {
    tokens: usize,
    rows: usize,
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
            waiting: Queue::default(),
            fairness: Fairness::default(),
            slots: (0..n_slots).map(|_| None).collect(),
            order: Vec::with_capacity(n_slots),
            free_slots: (0..n_slots as u32).rev().collect(),
            freed_slots: Vec::with_capacity(n_slots),
            in_flight: Vec::with_capacity(n_slots),
            next_id: 0,
            n_preemptions: 0,
            options,
        }
    }

    /// Takes a sequence into the queue.
    ///
    /// # Errors
    /// It could never run here, or the queue is full.
    pub fn submit(&mut self, spec: Spec) -> Result<SequenceId, Refusal> {
        refusal::check(&spec, &self.options.limits)?;
        if self.waiting.len() >= self.options.max_waiting {
            return Err(Refusal::Overloaded { waiting: self.waiting.len() });
        }
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        let root = Name::root(&self.options.model, "", &spec.origin.salt);
        let account = self.fairness.enter(&spec.origin.user);
        self.waiting.push(Sequence::new(id, spec, root, account));
        Ok(id)
    }

    /// Forgets a sequence, waiting or running; false if it is not here. Not while a plan is in
    /// flight.
    pub fn cancel(&mut self, id: SequenceId) -> bool {
        assert!(self.in_flight.is_empty(), "a cancel waits for the end of the step");
        if let Some(sequence) = self.waiting.remove(id) {
            self.fairness.leave(sequence.account);
            return true;
        }
        let is_it = |&&slot: &&u32| self.at(slot).id == id;
        let Some(&slot) = self.order.iter().find(is_it) else { return false };
        let sequence = self.vacate(slot);
        self.fairness.leave(sequence.account);
        true
    }

    /// Plans the next step into `plan`; false, and an empty plan, if there is nothing to run. After
    /// true `commit` must follow. `max_prefill`: tokens of prefill beside decodes, at least 1.
    pub fn schedule(&mut self, plan: &mut StepPlan, max_prefill: usize) -> bool {
        assert!(self.in_flight.is_empty(), "the last step was not committed");
        plan.clear();
        // What decodes need is set aside: whatever prefill comes before them leaves it to them.
        let decoding = self.running().filter(|sequence| sequence.is_decoding());
        let n_decode_rows: usize = decoding.map(|sequence| 1 + sequence.drafts.len()).sum();
        let Limits { max_batch_tokens, max_sample_rows, .. } = self.options.limits;
        let most = if n_decode_rows > 0 { max_prefill.max(1) } else { usize::MAX };
        let mut room = Room {
            tokens: most.min(max_batch_tokens - n_decode_rows),
            rows: max_sample_rows - n_decode_rows,
        };
        let n_preemptions = self.n_preemptions;
        let mut rank = 0;
        while rank < self.order.len() {
            let slot = self.order[rank];
            if self.at(slot).is_decoding() {
                if self.make_blocks(slot, 1) == 1 {
                    self.make_blocks_for_drafts(slot);
                    self.put(slot, 1, plan);
                } else {
                    self.running_mut(slot as usize).drafts.clear();
                }
            } else {
                self.prefill(rank, &mut room, plan);
            }
            rank += 1;
        }
        // What was just preempted is not admitted in the same breath.
        let may_admit = self.n_preemptions == n_preemptions;
        while may_admit && room.tokens > 0 && room.rows > 0 {
            let Some(rank) = self.admit() else { break };
            self.prefill(rank, &mut room, plan);
        }
        if plan.entries.is_empty() {
            return false;
        }
        plan.freed_slots.append(&mut self.freed_slots);
        plan.kind = Kind::Run;
        true
    }

    /// Moves whose turn it is from the waiting to the running, if a slot and blocks are there.
    /// Returns its rank.
    fn admit(&mut self) -> Option<usize> {
        let &slot = self.free_slots.last()?;
        let at = self.waiting.next(&self.fairness)?;
        let sequence = self.waiting.get(at);
        let max_blocks = sequence.first_wanted() / KV_BLOCK_LEN;
        let found = self.kv.find(&sequence.chain, &sequence.tokens, max_blocks);
        let needed = blocks_for(sequence.tokens.len()) - found.n_blocks;
        let promised: usize = self.running().map(still_needed).sum();
        if needed + found.n_cached + promised > self.kv.n_available() as usize
            && !self.order.is_empty()
        {
            return None;
        }
        let mut sequence = self.waiting.take(at);
        sequence.reserve();
        let priority = sequence.priority;
        let rank = self.order.partition_point(|&other| self.at(other).priority <= priority);
        self.free_slots.pop();
        self.order.insert(rank, slot);
        self.slots[slot as usize] = Some(sequence);
        Some(rank)
    }

    /// The next piece of a prompt, as large as there is room for, behind what others computed.
    fn prefill(&mut self, rank: usize, room: &mut Room, plan: &mut StepPlan) {
        let slot = self.order[rank];
        self.adopt(slot);
        if room.tokens == 0 || self.is_being_computed(rank) {
            return;
        }
        if room.rows > 0 {
            self.copy_tail(slot, plan);
        }
        let sequence = self.at(slot);
        let n_unsampled = sequence.first_wanted() - sequence.n_computed;
        let n_tokens = sequence.n_pending().min(room.tokens).min(n_unsampled + room.rows);
        let n_tokens = self.make_blocks(slot, n_tokens);
        if n_tokens > 0 {
            room.tokens -= n_tokens;
            room.rows -= self.put(slot, n_tokens, plan);
        }
    }

    /// Takes over the blocks that continue a sequence and are in the cache by now.
    fn adopt(&mut self, slot: u32) {
        let sequence = self.slots[slot as usize].as_mut().expect("a running sequence");
        if sequence.n_computed < sequence.blocks.capacity() {
            return; // it is within a block
        }
        let max_blocks = sequence.first_wanted() / KV_BLOCK_LEN;
        let Sequence { blocks, chain, tokens, .. } = &mut *sequence;
        if self.kv.adopt(blocks, chain, tokens, max_blocks) > 0 {
            sequence.spare(sequence.blocks.capacity());
        }
    }

    /// Copies the block that a sequence comes to, if a running one has begun it in the same way.
    fn copy_tail(&mut self, slot: u32, plan: &mut StepPlan) {
        let Some((from, n_tokens)) = self.tail_of_another(slot) else { return };
        if self.make_blocks(slot, n_tokens) < n_tokens {
            return;
        }
        let sequence = self.slots[slot as usize].as_mut().expect("a running sequence");
        let &to = sequence.blocks.blocks().last().expect("it was just made");
        plan.copies.push(Copy { from, to });
        sequence.spare(sequence.n_computed + n_tokens);
    }

    /// A block that holds the next tokens of a sequence, behind the same beginning, and how many of
    /// them: not all of a block, so that it has something to add in this very step.
    fn tail_of_another(&self, slot: u32) -> Option<(u32, usize)> {
        let sequence = self.at(slot);
        let start = sequence.n_computed;
        if start < sequence.blocks.capacity() {
            return None;
        }
        let block_idx = start / KV_BLOCK_LEN;
        let end = sequence.first_wanted().min(start + KV_BLOCK_LEN - 1);
        let wanted = &sequence.tokens[start..end];
        let tail = |other: &Sequence| {
            let computed = other.tokens[..other.n_computed].get(start..)?;
            let n = wanted.iter().zip(computed).take_while(|(one, other)| one == other).count();
            let is_same = || other.chain.before(block_idx) == sequence.chain.before(block_idx);
            (n >= MIN_COPIED && is_same()).then(|| (other.blocks.blocks()[block_idx], n))
        };
        self.running().filter_map(tail).max_by_key(|&(_, n)| n)
    }

    /// Whether one before it in rank is computing the block that it would begin with, and will
    /// share it.
    fn is_being_computed(&self, rank: usize) -> bool {
        let sequence = self.at(self.order[rank]);
        let (block_idx, offset) =
            (sequence.n_computed / KV_BLOCK_LEN, sequence.n_computed % KV_BLOCK_LEN);
        let end = (block_idx + 1) * KV_BLOCK_LEN;
        if offset > 0 || end > sequence.first_wanted() || !sequence.blocks.is_on_path() {
            return false;
        }
        let name = sequence.chain.get(block_idx);
        self.order[..rank].iter().map(|&slot| self.at(slot)).any(|other| {
            let has_begun = other.n_planned > block_idx * KV_BLOCK_LEN;
            has_begun && other.blocks.is_on_path() && other.chain.get(block_idx) == name
        })
    }

    /// Gives a running sequence blocks for its next `n_tokens`, at the cost of those behind it in
    /// rank if need be. Returns for how many tokens there are blocks.
    fn make_blocks(&mut self, slot: u32, n_tokens: usize) -> usize {
        loop {
            let sequence = self.slots[slot as usize].as_mut().expect("a running sequence");
            let n_there = sequence.blocks.capacity() - sequence.n_computed;
            if n_there >= n_tokens {
                return n_tokens;
            }
            if self.kv.append(&mut sequence.blocks) {
                continue;
            }
            let &last = self.order.last().expect("this one runs");
            if last == slot {
                return n_there; // it keeps what it has until someone before it needs that
            }
            assert!(!self.in_flight.contains(&last), "what is planned stays");
            self.preempt(last);
        }
    }

    /// Gives a sequence blocks for its drafts too, at nobody's cost; else it has fewer drafts.
    fn make_blocks_for_drafts(&mut self, slot: u32) {
        // Everyone can still get the block of its next token.
        let n_spare = (self.kv.n_available() as usize).saturating_sub(self.order.len());
        let sequence = self.slots[slot as usize].as_mut().expect("a running sequence");
        let Sequence { blocks, drafts, n_computed, .. } = sequence;
        let n_needed = blocks_for(*n_computed + 1 + drafts.len());
        let n_missing = n_needed.saturating_sub(blocks.blocks().len());
        for _ in 0..n_missing.min(n_spare) {
            let is_there = self.kv.append(blocks);
            assert!(is_there, "an available block");
        }
        drafts.truncate(blocks.capacity() - *n_computed - 1);
    }

    fn preempt(&mut self, slot: u32) {
        let mut sequence = self.vacate(slot);
        sequence.forget_computed();
        self.waiting.push(sequence);
        self.n_preemptions += 1;
    }

    /// Adds the next `n_tokens` of a running sequence to the plan, and its drafts; returns how many
    /// rows are sampled.
    fn put(&mut self, slot: u32, n_tokens: usize, plan: &mut StepPlan) -> usize {
        let sequence = self.slots[slot as usize].as_mut().expect("a running sequence");
        let (start, end) = (sequence.n_computed, sequence.n_computed + n_tokens);
        let new_blocks = &sequence.blocks.blocks()[sequence.n_told..];
        let n_drafts = sequence.drafts.len();
        let n_sampled = (end + n_drafts).saturating_sub(sequence.first_wanted());
        plan.entries.push(Entry {
            slot,
            start: start as u32,
            n_tokens: (n_tokens + n_drafts) as u32,
            n_blocks: new_blocks.len() as u32,
            n_sampled: n_sampled as u32,
        });
        plan.blocks.extend_from_slice(new_blocks);
        plan.tokens.extend_from_slice(&sequence.tokens[start..end]);
        plan.tokens.extend_from_slice(&sequence.drafts);
        plan.asks |= n_sampled > 0 && sequence.asks();
        sequence.n_told = sequence.blocks.blocks().len();
        sequence.n_planned = end;
        self.in_flight.push(slot);
        n_sampled
    }

    /// The sequence of an entry of the plan in flight.
    #[must_use]
    pub fn scheduled(&self, entry_idx: usize) -> &Sequence {
        self.at(self.in_flight[entry_idx])
    }

    /// Ends the step in flight. `chosen`: by entry, what follows its sequence if the step reached
    /// its end: tokens that are its drafts, and one that need not be. Appends to `out` what was
    /// generated, in the order of the plan.
    pub fn commit(&mut self, plan: &StepPlan, chosen: &Chosen, out: &mut Vec<Committed>) {
        assert_eq!(chosen.n_entries(), plan.entries.len(), "one answer for each entry");
        self.in_flight.clear();
        for (entry_idx, entry) in plan.entries.iter().enumerate() {
            let tokens = chosen.of(entry_idx);
            let sequence = self.slots[entry.slot as usize].as_mut().expect("a running sequence");
            let is_at_end = sequence.n_planned == sequence.tokens.len();
            assert_eq!(!tokens.is_empty(), is_at_end, "tokens follow the last one");
            // Drafts that were right are computed; the places of others are written over.
            let n_right = tokens.len().saturating_sub(1);
            assert_eq!(sequence.drafts.get(..n_right), tokens.get(..n_right), "verified");
            let end = sequence.n_planned + n_right;
            sequence.drafts.clear();
            sequence.n_computed = end;
            if entry.n_sampled > 0 {
                sequence.n_sampled = end;
            }
            let n_new = end.saturating_sub(sequence.n_ever);
            sequence.n_ever = sequence.n_ever.max(end);
            self.fairness.charge(sequence.account, n_new + tokens.len());
            let mut finish = None;
            for &token in tokens {
                assert_eq!(finish, None, "nothing follows the end");
                finish = sequence.push(token);
                out.push(Committed { id: sequence.id, token, finish });
            }
            let Sequence { blocks, chain, tokens: known, .. } = &mut *sequence;
            self.kv.name_full(blocks, chain, known, end);
            if finish.is_some() {
                let sequence = self.vacate(entry.slot);
                self.fairness.leave(sequence.account);
            }
        }
        if cfg!(debug_assertions) {
            self.check_integrity();
        }
    }

    /// The one way out of the running: blocks and slot are free again.
    fn vacate(&mut self, slot: u32) -> Sequence {
        let mut sequence = self.slots[slot as usize].take().expect("a running sequence");
        self.kv.release(&mut sequence.blocks);
        self.order.retain(|&other| other != slot);
        self.free_slots.push(slot);
        self.freed_slots.push(slot);
        sequence
    }

    fn at(&self, slot: u32) -> &Sequence {
        self.slots[slot as usize].as_ref().expect("a running sequence")
    }

    /// In order of rank.
    fn running(&self) -> impl Iterator<Item = &Sequence> {
        self.order.iter().map(|&slot| self.at(slot))
    }

    #[must_use]
    pub fn n_decoding(&self) -> usize {
        self.running().filter(|sequence| sequence.is_decoding()).count()
    }

    /// Drafts that the next step has room for: none where prefill wants it.
    #[must_use]
    pub fn room_for_drafts(&self) -> usize {
        let n_decoding = self.n_decoding();
        let is_prefill_near = !self.waiting.is_empty() && !self.free_slots.is_empty();
        if n_decoding < self.order.len() || is_prefill_near {
            return 0;
        }
        let Limits { max_batch_tokens, max_sample_rows, .. } = self.options.limits;
        max_batch_tokens.min(max_sample_rows) - n_decoding
    }

    /// Decoding sequences with their slots. Not while a plan is in flight.
    pub fn decoding_mut(&mut self) -> impl Iterator<Item = (usize, &mut Sequence)> {
        assert!(self.in_flight.is_empty(), "drafts wait for the end of the step");
        let running = self.slots.iter_mut().enumerate();
        running.filter_map(|(slot, sequence)| {
            sequence.as_mut().filter(|sequence| sequence.is_decoding()).map(|it| (slot, it))
        })
    }

    /// # Panics
    /// Nothing runs there.
    pub fn running_mut(&mut self, slot: usize) -> &mut Sequence {
        self.slots[slot].as_mut().expect("a running sequence")
    }

    #[must_use]
    pub fn n_running(&self) -> usize {
        self.order.len()
    }

    #[must_use]
    pub fn n_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// The running, and those that wait for a place that is there.
    #[must_use]
    pub fn n_present(&self) -> usize {
        self.n_running() + self.n_waiting().min(self.free_slots.len())
    }

    #[must_use]
    pub fn n_preemptions(&self) -> u64 {
        self.n_preemptions
    }

    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.order.is_empty() && self.waiting.is_empty()
    }

    #[must_use]
    pub fn kv(&self) -> &KvBlocks {
        &self.kv
    }

    /// Every block, slot, user and place in the order is accounted for.
    ///
    /// # Panics
    /// One is not: a bug.
    pub fn check_integrity(&mut self) {
        let running = self.slots.iter().flatten();
        self.kv.check_integrity(running.clone().map(|sequence| &sequence.blocks));
        for sequence in running {
            let capacity = sequence.blocks.capacity();
            assert!(sequence.n_computed <= capacity, "{:?} has no blocks", sequence.id);
            assert!(sequence.n_computed < sequence.tokens.len(), "{:?} ended", sequence.id);
            assert!(sequence.n_told <= sequence.blocks.blocks().len(), "{:?}", sequence.id);
            assert!(sequence.drafts.is_empty(), "{:?} has old drafts", sequence.id);
        }
        for sequence in self.waiting.iter() {
            assert_eq!((sequence.n_computed, sequence.blocks.capacity()), (0, 0), "waiting");
        }
        for (slot, sequence) in (0..).zip(&self.slots) {
            let n_free = self.free_slots.iter().filter(|&&free| free == slot).count();
            let n_used = self.order.iter().filter(|&&used| used == slot).count();
            let expect = if sequence.is_some() { (0, 1) } else { (1, 0) };
            assert_eq!((n_free, n_used), expect, "slot {slot}");
        }
        assert!(self.running().is_sorted_by_key(|sequence| sequence.priority), "order of rank");
        assert!(self.fairness.n_users() <= self.n_running() + self.n_waiting(), "users");
    }
}

/// Blocks that a running sequence has yet to take for its known tokens and one more block.
fn still_needed(sequence: &Sequence) -> usize {
    (blocks_for(sequence.tokens.len()) + 1).saturating_sub(sequence.blocks.blocks().len())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
#[path = "scheduler_tests.rs"]
mod tests;
