//! A step plan and the block tables of the slots to the backend's flat batch. The lead applies its
//! own plans by this code too, so that no rank can read a plan differently.

use crate::backend::{Batch, KV_BLOCK_LEN, Span};

use super::kv_blocks::blocks_for;
use super::step::{Copy, Entry, Limits, StepPlan};

/// What a rank remembers of the sequences: by slot, the blocks of the positions computed so far.
#[derive(Debug)]
pub struct Tables {
    slots: Vec<Slot>,
}

#[derive(Debug, Default)]
struct Slot {
    blocks: Vec<u32>,
    n_tokens: u32,
    /// The last of them that may be drafts, and be written over.
    n_unsure: u32,
    /// Most tokens that there were: so many have blocks.
    n_covered: u32,
    /// Step that last used it, so that no plan uses it twice.
    last_step: u64,
}

/// An empty batch with memory for any step within `limits`.
#[must_use]
pub fn with_room(limits: &Limits) -> Batch {
    Batch {
        step: 0,
        tokens: Vec::with_capacity(limits.max_batch_tokens),
        positions: Vec::with_capacity(limits.max_batch_tokens),
        slots: Vec::with_capacity(limits.max_batch_tokens),
        spans: Vec::with_capacity(limits.n_slots),
        block_tables: Vec::with_capacity(limits.max_table_blocks()),
        sample_rows: Vec::with_capacity(limits.max_sample_rows),
    }
}

/// Why a plan does not fit the tables: the ranks are out of step.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("slot {slot} is at position {at}; the plan starts at {start}")]
    Start { slot: u32, at: u32, start: u32 },
    #[error("slot {slot} has {got} blocks for {n_tokens} tokens; {expected} are due")]
    Blocks { slot: u32, got: usize, n_tokens: u32, expected: usize },
    #[error("slot {slot} is twice in one plan")]
    Twice { slot: u32 },
}

impl Tables {
    #[must_use]
    pub fn new(limits: &Limits) -> Self {
        let max_blocks = blocks_for(limits.max_context);
        let slot = || Slot { blocks: Vec::with_capacity(max_blocks), ..Slot::default() };
        Self { slots: (0..limits.n_slots).map(|_| slot()).collect() }
    }

    /// Takes in what is new in `plan` and replaces `batch` by the work of this step.
    ///
    /// # Errors
    /// The plan contradicts the tables. They mean nothing after that.
    pub fn apply(&mut self, plan: &StepPlan, batch: &mut Batch) -> Result<(), Error> {
        for &slot in &plan.freed_slots {
            let slot = &mut self.slots[slot as usize];
            slot.blocks.clear();
            (slot.n_tokens, slot.n_unsure, slot.n_covered) = (0, 0, 0);
        }
        batch.clear();
        batch.step = plan.step;
        batch.tokens.extend_from_slice(&plan.tokens);
        let mut blocks = plan.blocks.as_slice();
        for entry in &plan.entries {
            let (new, rest) = blocks.split_at(entry.n_blocks as usize);
            blocks = rest;
            self.slots[entry.slot as usize].extend(entry, new, plan)?;
            self.slots[entry.slot as usize].flatten(entry, batch);
        }
        Ok(())
    }
}

impl Slot {
    fn extend(&mut self, entry: &Entry, new_blocks: &[u32], plan: &StepPlan) -> Result<(), Error> {
        let &Entry { slot, start, n_tokens, n_sampled, .. } = entry;
        if self.last_step == plan.step {
            return Err(Error::Twice { slot });
        }
        self.last_step = plan.step;
        let at = std::mem::replace(&mut self.n_tokens, start + n_tokens);
        let earliest = at - std::mem::replace(&mut self.n_unsure, n_sampled.saturating_sub(1));
        self.n_covered = self.n_covered.max(self.n_tokens);
        self.blocks.extend_from_slice(new_blocks);
        let goes_on = (earliest..=at).contains(&start);
        if !goes_on && !self.is_behind_others(at, start, &plan.copies) {
            return Err(Error::Start { slot, at, start });
        }
        let expected = blocks_for(self.n_covered as usize);
        if self.blocks.len() != expected {
            let (got, n_tokens) = (self.blocks.len(), self.n_tokens);
            return Err(Error::Blocks { slot, got, n_tokens, expected });
        }
        Ok(())
    }

    /// Whether what lies between `at` and `start` was computed for others: in full blocks, which
    /// are among the new ones, and perhaps a part of one that is copied.
    fn is_behind_others(&self, at: u32, start: u32, copies: &[Copy]) -> bool {
        let is_full = |n: u32| n.is_multiple_of(KV_BLOCK_LEN as u32);
        let is_copied = || {
            let block = self.blocks.get(start as usize / KV_BLOCK_LEN);
            copies.iter().any(|copy| Some(&copy.to) == block)
        };
        start > at && is_full(at) && (is_full(start) || is_copied())
    }

    fn flatten(&self, entry: &Entry, batch: &mut Batch) {
        let first_row = batch.positions.len() as u32;
        let block_len = KV_BLOCK_LEN as u32;
        let blocks = &self.blocks[..blocks_for(self.n_tokens as usize)];
        for position in entry.start..entry.start + entry.n_tokens {
            let block = blocks[(position / block_len) as usize];
            batch.positions.push(position);
            batch.slots.push(block * block_len + position % block_len);
        }
        batch.spans.push(Span {
            first_row,
            n_rows: entry.n_tokens,
            first_block: batch.block_tables.len() as u32,
            n_blocks: blocks.len() as u32,
        });
        batch.block_tables.extend_from_slice(blocks);
        let end = first_row + entry.n_tokens;
        batch.sample_rows.extend(end - entry.n_sampled..end);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::step::Kind;

    const LIMITS: Limits = Limits {
        n_slots: 4,
        max_batch_tokens: 64,
        max_sample_rows: 64,
        max_context: 256,
        n_kv_blocks: 32,
        vocab: 1000,
    };

    fn plan(step: u64, entries: &[Entry], blocks: &[u32], freed: &[u32]) -> StepPlan {
        let n_tokens = entries.iter().map(|entry| entry.n_tokens).sum();
        StepPlan {
            epoch: 1,
            step,
            kind: Kind::Run,
            asks: false,
            rows: Vec::new(),
            freed_slots: freed.to_vec(),
            copies: Vec::new(),
            entries: entries.to_vec(),
            tokens: (0..n_tokens).collect(),
            blocks: blocks.to_vec(),
            traces: Vec::new(),
        }
    }

    fn entry(slot: u32, start: u32, n_tokens: u32, n_blocks: u32, n_sampled: u32) -> Entry {
        Entry { slot, start, n_tokens, n_blocks, n_sampled }
    }

    #[test]
    fn tables_grow_by_deltas_and_batches_hold_all() {
        let (mut tables, mut batch) = (Tables::new(&LIMITS), Batch::default());
        tables.apply(&plan(1, &[entry(1, 0, 18, 2, 1)], &[9, 4], &[]), &mut batch).unwrap();
        assert_eq!(batch.slots[15..], [9 * 16 + 15, 4 * 16, 4 * 16 + 1]);
        assert_eq!(batch.sample_rows, [17]);

        let both = [entry(1, 18, 1, 0, 1), entry(0, 0, 3, 1, 3)];
        tables.apply(&plan(2, &both, &[7], &[]), &mut batch).unwrap();
        assert_eq!(batch.step, 2);
        assert_eq!(batch.positions, [18, 0, 1, 2]);
        assert_eq!(batch.slots, [4 * 16 + 2, 7 * 16, 7 * 16 + 1, 7 * 16 + 2]);
        assert_eq!(batch.block_tables, [9, 4, 7]);
        let spans = [
            Span { first_row: 0, n_rows: 1, first_block: 0, n_blocks: 2 },
            Span { first_row: 1, n_rows: 3, first_block: 2, n_blocks: 1 },
        ];
        assert_eq!(batch.spans, spans);
        assert_eq!(batch.sample_rows, [0, 1, 2, 3]);
    }

    #[test]
    fn a_slot_goes_on_behind_full_blocks_of_others() {
        let (mut tables, mut batch) = (Tables::new(&LIMITS), Batch::default());
        tables.apply(&plan(1, &[entry(1, 32, 3, 3, 1)], &[9, 4, 8], &[]), &mut batch).unwrap();
        assert_eq!((&batch.positions[..], batch.slots[0]), (&[32, 33, 34][..], 8 * 16));
        assert_eq!(batch.block_tables, [9, 4, 8]);
        // And in the midst of one that is copied.
        let mut copying = plan(2, &[entry(2, 20, 1, 2, 1)], &[9, 5], &[]);
        copying.copies.push(Copy { from: 4, to: 5 });
        tables.apply(&copying, &mut batch).unwrap();
        assert_eq!((batch.slots[0], &batch.block_tables[..]), (5 * 16 + 4, &[9, 5][..]));
    }

    #[test]
    fn a_slot_goes_back_to_where_its_drafts_were_wrong() {
        let (mut tables, mut batch) = (Tables::new(&LIMITS), Batch::default());
        tables.apply(&plan(1, &[entry(1, 0, 15, 1, 1)], &[9], &[]), &mut batch).unwrap();
        // A token and four drafts, of which the first is right: two positions, and two blocks.
        tables.apply(&plan(2, &[entry(1, 15, 5, 1, 5)], &[4], &[]), &mut batch).unwrap();
        assert_eq!(batch.sample_rows, [0, 1, 2, 3, 4]);
        tables.apply(&plan(3, &[entry(1, 17, 1, 0, 1)], &[], &[]), &mut batch).unwrap();
        assert_eq!((&batch.positions[..], batch.slots[0]), (&[17][..], 4 * 16 + 1));
        // All are wrong: the second block stays, and is not read.
        tables.apply(&plan(4, &[entry(2, 0, 15, 1, 1)], &[7], &[]), &mut batch).unwrap();
        tables.apply(&plan(5, &[entry(2, 15, 4, 1, 4)], &[8], &[]), &mut batch).unwrap();
        tables.apply(&plan(6, &[entry(2, 16, 1, 0, 1)], &[], &[]), &mut batch).unwrap();
        assert_eq!(batch.block_tables, [7, 8]);
        let error = Error::Start { slot: 2, at: 17, start: 16 };
        assert_eq!(
            tables.apply(&plan(7, &[entry(2, 16, 1, 0, 1)], &[], &[]), &mut batch),
            Err(error)
        );
    }

    #[test]
    fn a_freed_slot_begins_anew_in_the_same_plan() {
        let (mut tables, mut batch) = (Tables::new(&LIMITS), Batch::default());
        tables.apply(&plan(1, &[entry(1, 0, 5, 1, 1)], &[9], &[]), &mut batch).unwrap();
        tables.apply(&plan(2, &[entry(1, 0, 2, 1, 1)], &[3], &[1]), &mut batch).unwrap();
        assert_eq!(batch.block_tables, [3]);
    }

    #[test]
    fn a_plan_that_contradicts_the_tables_is_refused() {
        let check = |entries: &[Entry], blocks: &[u32], expect: Error| {
            let (mut tables, mut batch) = (Tables::new(&LIMITS), Batch::default());
            tables.apply(&plan(1, &[entry(1, 0, 18, 2, 1)], &[9, 4], &[]), &mut batch).unwrap();
            assert_eq!(tables.apply(&plan(2, entries, blocks, &[]), &mut batch), Err(expect));
        };
        check(&[entry(1, 17, 1, 0, 1)], &[], Error::Start { slot: 1, at: 18, start: 17 });
        check(&[entry(0, 1, 1, 1, 1)], &[5], Error::Start { slot: 0, at: 0, start: 1 });
        check(&[entry(1, 32, 1, 1, 1)], &[5], Error::Start { slot: 1, at: 18, start: 32 });
        check(&[entry(0, 17, 1, 2, 1)], &[5, 6], Error::Start { slot: 0, at: 0, start: 17 });
        let blocks = |got, expected| Error::Blocks { slot: 1, got, n_tokens: 34, expected };
        check(&[entry(1, 18, 16, 0, 1)], &[], blocks(2, 3));
        check(&[entry(1, 18, 16, 2, 1)], &[5, 6], blocks(4, 3));
        let twice = [entry(1, 18, 1, 0, 1), entry(1, 19, 1, 0, 1)];
        check(&twice, &[], Error::Twice { slot: 1 });
    }
}
