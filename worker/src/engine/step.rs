//! What all ranks do next, and its form on the wire. The lead plans; followers decide nothing.
//!
//! A plan is a delta: ranks keep a block table per slot and learn only what is new. Bytes from a
//! peer are checked here against [`Limits`], and against the tables in `batch`, before anything
//! uses them.

use evener_telemetry::Context;

use crate::backend::KV_BLOCK_LEN;

const MAGIC: u32 = u32::from_le_bytes(*b"EvSP");
const HEAD_WORDS: usize = 14;
const ENTRY_WORDS: usize = 5;
const TRACE_WORDS: usize = 6;

/// What a plan asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kind {
    /// Run the model on the entries.
    Run,
    /// Send the lead whole rows of logits of the last step that ran.
    Rows,
    /// Nothing to do; the lead is there.
    #[default]
    Heartbeat,
    /// The epoch ends.
    Leave,
}

/// One step, the same on every rank.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StepPlan {
    pub epoch: u64,
    /// From 1, without gaps, heartbeats included.
    pub step: u64,
    pub kind: Kind,
    /// Whether an ask about the sampled rows follows; else only the likeliest token of each is
    /// wanted.
    pub asks: bool,
    /// Slots whose tables are dropped before the entries are looked at.
    pub freed_slots: Vec<u32>,
    /// Blocks copied, one after the other, before the entries run.
    pub copies: Vec<Copy>,
    /// One per sequence of this step.
    pub entries: Vec<Entry>,
    /// Token ids of all entries, one after the other.
    pub tokens: Vec<u32>,
    /// Blocks appended to the entries' tables, one entry after the other.
    pub blocks: Vec<u32>,
    /// Of [`Kind::Rows`]: indexes of sampled rows.
    pub rows: Vec<u32>,
    /// Spans for which the step counts; each rank records its part.
    pub traces: Vec<Context>,
}

/// A block that begins like another and goes on differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Copy {
    pub from: u32,
    pub to: u32,
}

/// One sequence's part in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    pub slot: u32,
    /// Position of its first token: where the slot is, 0 if it is new or was freed; or further, if
    /// the new blocks hold what comes before, the last of them by a copy if it is not full; or back
    /// among the rows sampled last, where these were drafts that were wrong.
    pub start: u32,
    /// At least 1. Drafts are the last of those that are sampled.
    pub n_tokens: u32,
    pub n_blocks: u32,
    /// Of its last rows the logits are wanted.
    pub n_sampled: u32,
}

/// What a plan may ask for at most; equal on all ranks of an epoch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Sequences at once.
    pub n_slots: usize,
    pub max_batch_tokens: usize,
    pub max_sample_rows: usize,
    /// Tokens of one sequence.
    pub max_context: usize,
    pub n_kv_blocks: u32,
    pub vocab: usize,
}

impl Limits {
    /// Blocks of the tables of all slots, each block as often as sequences share it.
    #[must_use]
    pub fn max_table_blocks(&self) -> usize {
        self.n_slots * self.max_context.div_ceil(KV_BLOCK_LEN)
    }
}

/// Why bytes are not a plan.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("a step plan has {got} bytes; {expected} were due")]
    Length { got: usize, expected: usize },
    #[error("a step plan has {what} {got}; {expected} was due")]
    Field { what: &'static str, got: u64, expected: u64 },
    #[error("a step plan has {what} {got}; at most {max} is allowed")]
    Bound { what: &'static str, got: u64, max: u64 },
    #[error("a step plan has {what} {got}; at least {min} is needed")]
    TooSmall { what: &'static str, got: u64, min: u64 },
}

impl StepPlan {
    /// An empty one with memory for any plan within `limits`.
    #[must_use]
    pub fn with_room(limits: &Limits) -> Self {
        Self {
            freed_slots: Vec::with_capacity(limits.n_slots),
            copies: Vec::with_capacity(limits.n_slots),
            entries: Vec::with_capacity(limits.n_slots),
            tokens: Vec::with_capacity(limits.max_batch_tokens),
            blocks: Vec::with_capacity(limits.max_table_blocks()),
            rows: Vec::with_capacity(limits.max_sample_rows),
            traces: Vec::with_capacity(limits.n_slots),
            ..Self::default()
        }
    }

    /// Most bytes of a plan within `limits`.
    #[must_use]
    pub fn max_bytes(limits: &Limits) -> usize {
        let Limits { n_slots, max_batch_tokens, max_sample_rows, .. } = *limits;
        let n_lists = max_batch_tokens + limits.max_table_blocks() + max_sample_rows;
        4 * (HEAD_WORDS + (1 + 2 + ENTRY_WORDS + TRACE_WORDS) * n_slots + n_lists)
    }

    /// Empties it, keeping its memory.
    pub fn clear(&mut self) {
        self.kind = Kind::Heartbeat;
        self.asks = false;
        self.freed_slots.clear();
        self.copies.clear();
        self.entries.clear();
        self.tokens.clear();
        self.blocks.clear();
        self.rows.clear();
        self.traces.clear();
    }

    #[must_use]
    pub fn n_sampled(&self) -> usize {
        self.entries.iter().map(|entry| entry.n_sampled as usize).sum()
    }

    /// Replaces `out` by the plan's bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let Self { epoch, step, kind, asks, .. } = self;
        let Self { freed_slots, copies, entries, tokens, blocks, rows, traces, .. } = self;
        out.clear();
        let mut word = |n: u32| out.extend_from_slice(&n.to_le_bytes());
        word(MAGIC);
        word(match kind {
            Kind::Run => 1,
            Kind::Heartbeat => 2,
            Kind::Leave => 3,
            Kind::Rows => 4,
        });
        word(u32::from(*asks));
        for wide in [*epoch, *step] {
            word(wide as u32);
            word((wide >> 32) as u32);
        }
        let counts = [
            freed_slots.len(),
            copies.len(),
            entries.len(),
            tokens.len(),
            blocks.len(),
            rows.len(),
            traces.len(),
        ];
        for n in counts {
            word(n as u32);
        }
        freed_slots.iter().for_each(|&slot| word(slot));
        copies.iter().flat_map(|copy| [copy.from, copy.to]).for_each(&mut word);
        for &Entry { slot, start, n_tokens, n_blocks, n_sampled } in entries {
            [slot, start, n_tokens, n_blocks, n_sampled].into_iter().for_each(&mut word);
        }
        tokens.iter().for_each(|&token| word(token));
        blocks.iter().for_each(|&block| word(block));
        rows.iter().for_each(|&row| word(row));
        traces.iter().flat_map(|trace| trace.words()).for_each(word);
    }

    /// Replaces the plan by what `bytes` say, if that is within `limits`. After an error the plan's
    /// content means nothing.
    ///
    /// # Errors
    /// The first thing that no lead would send.
    pub fn decode(&mut self, bytes: &[u8], limits: &Limits) -> Result<(), Error> {
        self.clear();
        if bytes.len() < 4 * HEAD_WORDS {
            return Err(Error::Length { got: bytes.len(), expected: 4 * HEAD_WORDS });
        }
        let mut words = bytes.chunks_exact(4).map(|four| {
            u32::from_le_bytes(four.try_into().expect("chunks_exact gives four bytes"))
        });
        let mut word = || words.next().expect("the length was checked");
        equal("magic", word(), MAGIC)?;
        self.kind = match word() {
            1 => Kind::Run,
            2 => Kind::Heartbeat,
            3 => Kind::Leave,
            4 => Kind::Rows,
            0 => return Err(Error::TooSmall { what: "kind", got: 0, min: 1 }),
            got => return Err(Error::Bound { what: "kind", got: got.into(), max: 4 }),
        };
        let asks = word();
        at_most("flag for an ask", asks as usize, 1)?;
        self.asks = asks == 1;
        self.epoch = u64::from(word()) | u64::from(word()) << 32;
        self.step = u64::from(word()) | u64::from(word()) << 32;
        let [n_freed, n_copies, n_entries, n_tokens, n_blocks, n_rows, n_traces] =
            [word(), word(), word(), word(), word(), word(), word()].map(|n| n as usize);
        at_most("number of freed slots", n_freed, limits.n_slots)?;
        at_most("number of copies", n_copies, limits.n_slots)?;
        at_most("number of entries", n_entries, limits.n_slots)?;
        at_most("number of tokens", n_tokens, limits.max_batch_tokens)?;
        at_most("number of blocks", n_blocks, limits.max_table_blocks())?;
        at_most("number of rows", n_rows, limits.max_sample_rows)?;
        at_most("number of traces", n_traces, limits.n_slots)?;
        let n_lists =
            n_freed + 2 * n_copies + ENTRY_WORDS * n_entries + n_tokens + n_blocks + n_rows;
        let n_words = HEAD_WORDS + n_lists + TRACE_WORDS * n_traces;
        if bytes.len() != 4 * n_words {
            return Err(Error::Length { got: bytes.len(), expected: 4 * n_words });
        }
        self.freed_slots.extend((0..n_freed).map(|_| word()));
        self.copies.extend((0..n_copies).map(|_| Copy { from: word(), to: word() }));
        self.entries.extend((0..n_entries).map(|_| {
            let [slot, start, n_tokens, n_blocks, n_sampled] =
                [word(), word(), word(), word(), word()];
            Entry { slot, start, n_tokens, n_blocks, n_sampled }
        }));
        self.tokens.extend((0..n_tokens).map(|_| word()));
        self.blocks.extend((0..n_blocks).map(|_| word()));
        self.rows.extend((0..n_rows).map(|_| word()));
        for _ in 0..n_traces {
            let words = [word(), word(), word(), word(), word(), word()];
            let missing = Error::TooSmall { what: "id of a trace", got: 0, min: 1 };
            self.traces.push(Context::from_words(words).ok_or(missing)?);
        }
        self.check(limits)
    }

    /// Every number against its bound, every count against the lists.
    fn check(&self, limits: &Limits) -> Result<(), Error> {
        let Limits { n_slots, max_sample_rows, max_context, n_kv_blocks, vocab, .. } = *limits;
        if self.kind == Kind::Run {
            at_least("number of entries", self.entries.len(), 1)?;
        } else {
            at_most("number of entries outside a run", self.entries.len(), 0)?;
        }
        for &slot in &self.freed_slots {
            at_most("freed slot", slot as usize, n_slots - 1)?;
        }
        let (mut n_tokens, mut n_blocks, mut n_sampled) = (0, 0, 0);
        for entry in &self.entries {
            at_most("slot", entry.slot as usize, n_slots - 1)?;
            at_least("entry without tokens", entry.n_tokens as usize, 1)?;
            at_most(
                "end of sequence",
                entry.start as usize + entry.n_tokens as usize,
                max_context,
            )?;
            at_most("sampled rows of an entry", entry.n_sampled as usize, entry.n_tokens as usize)?;
            let max_blocks = max_context.div_ceil(KV_BLOCK_LEN);
            at_most("blocks of an entry", entry.n_blocks as usize, max_blocks)?;
            n_tokens += entry.n_tokens as usize;
            n_blocks += entry.n_blocks as usize;
            n_sampled += entry.n_sampled as usize;
        }
        equal("sum of tokens", n_tokens as u32, self.tokens.len() as u32)?;
        equal("sum of blocks", n_blocks as u32, self.blocks.len() as u32)?;
        at_most("number of sampled rows", n_sampled, max_sample_rows)?;
        for &token in &self.tokens {
            at_most("token id", token as usize, vocab - 1)?;
        }
        let copied = self.copies.iter().flat_map(|copy| [&copy.from, &copy.to]);
        for &block in self.blocks.iter().chain(copied) {
            at_most("block", block as usize, n_kv_blocks as usize - 1)?;
        }
        for &row in &self.rows {
            at_most("row", row as usize, max_sample_rows - 1)?;
        }
        Ok(())
    }
}

fn equal(what: &'static str, got: u32, expected: u32) -> Result<(), Error> {
    if got == expected {
        return Ok(());
    }
    Err(Error::Field { what, got: got.into(), expected: expected.into() })
}

fn at_most(what: &'static str, got: usize, max: usize) -> Result<(), Error> {
    if got <= max {
        return Ok(());
    }
    Err(Error::Bound { what, got: got as u64, max: max as u64 })
}

fn at_least(what: &'static str, got: usize, min: usize) -> Result<(), Error> {
    if got >= min {
        return Ok(());
    }
    Err(Error::TooSmall { what, got: got as u64, min: min as u64 })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    const LIMITS: Limits = Limits {
        n_slots: 4,
        max_batch_tokens: 64,
        max_sample_rows: 16,
        max_context: 256,
        n_kv_blocks: 32,
        vocab: 1000,
    };

    fn plan() -> StepPlan {
        StepPlan {
            epoch: u64::MAX - 1,
            step: 1 << 40,
            kind: Kind::Run,
            asks: true,
            freed_slots: vec![3, 0],
            copies: vec![Copy { from: 9, to: 31 }],
            entries: vec![
                Entry { slot: 2, start: 17, n_tokens: 1, n_blocks: 0, n_sampled: 1 },
                Entry { slot: 0, start: 0, n_tokens: 20, n_blocks: 2, n_sampled: 0 },
            ],
            tokens: (100..121).collect(),
            blocks: vec![31, 7],
            rows: vec![15],
            traces: Context::from_words([1, 2, 3, 4, 5, 6]).into_iter().collect(),
        }
    }

    fn round_trip(plan: &StepPlan) -> Result<StepPlan, Error> {
        let mut bytes = vec![9; 3];
        plan.encode(&mut bytes);
        let mut decoded = StepPlan { tokens: vec![1, 2, 3], ..StepPlan::default() };
        decoded.decode(&bytes, &LIMITS).map(|()| decoded)
    }

    #[test]
    fn a_plan_survives_the_wire() {
        assert_eq!(round_trip(&plan()).unwrap(), plan());
        for kind in [Kind::Heartbeat, Kind::Leave, Kind::Rows] {
            let plan =
                StepPlan { epoch: 1, step: 2, kind, freed_slots: vec![1], ..Default::default() };
            assert_eq!(round_trip(&plan).unwrap(), plan);
        }
    }

    #[test]
    fn a_plan_outside_the_limits_is_refused_by_name() {
        let check = |change: fn(&mut StepPlan), expect: &str| {
            let mut plan = plan();
            change(&mut plan);
            let error = round_trip(&plan).unwrap_err().to_string();
            assert!(error.contains(expect), "`{error}` does not say `{expect}`");
        };
        check(|p| p.entries.clear(), "number of entries 0");
        check(|p| p.kind = Kind::Leave, "outside a run");
        check(|p| p.freed_slots[0] = 4, "freed slot 4");
        check(|p| p.freed_slots = vec![1; 5], "number of freed slots 5");
        check(|p| p.copies[0].from = 32, "block 32");
        check(|p| p.copies[0].to = u32::MAX, "block 4294967295");
        check(|p| p.copies = vec![p.copies[0]; 5], "number of copies 5");
        check(|p| p.entries[0].slot = 4, "slot 4");
        check(|p| p.entries[0].n_tokens = 0, "without tokens");
        check(|p| p.entries[0].start = 256, "end of sequence 257");
        check(|p| p.entries[0].start = u32::MAX, "end of sequence");
        check(|p| p.entries[0].n_sampled = 2, "sampled rows of an entry 2");
        check(|p| p.entries[1].n_sampled = 20, "number of sampled rows 21");
        check(|p| p.entries[1].n_blocks = 1, "sum of blocks 1");
        check(|p| p.entries[1].n_blocks = 17, "blocks of an entry 17");
        check(|p| p.entries[1].n_tokens = 19, "sum of tokens 20");
        check(|p| p.tokens.extend(0..64), "number of tokens 85");
        check(|p| p.tokens[5] = 1000, "token id 1000");
        check(|p| p.blocks[1] = 32, "block 32");
        check(|p| p.blocks = vec![0; 65], "number of blocks 65");
        check(|p| p.rows[0] = 16, "row 16");
        check(|p| p.rows = vec![0; 17], "number of rows 17");
        check(|p| p.traces = vec![p.traces[0]; 5], "number of traces 5");
        let mut bytes = Vec::new();
        plan().encode(&mut bytes);
        let trace_at = bytes.len() - 4 * TRACE_WORDS;
        bytes[trace_at..].fill(0);
        let error = StepPlan::default().decode(&bytes, &LIMITS).unwrap_err();
        assert!(error.to_string().contains("id of a trace 0"), "{error}");
    }

    #[test]
    fn damaged_bytes_are_an_error_or_a_plan_within_limits() {
        let mut rng = StdRng::seed_from_u64(7);
        let mut bytes = Vec::new();
        let mut decoded = StepPlan::default();
        for _ in 0..20_000 {
            plan().encode(&mut bytes);
            for _ in 0..rng.random_range(1..4) {
                let at = rng.random_range(0..bytes.len());
                bytes[at] = rng.random();
            }
            if rng.random_bool(0.2) {
                bytes.truncate(rng.random_range(0..bytes.len()));
            }
            if decoded.decode(&bytes, &LIMITS).is_ok() {
                decoded.check(&LIMITS).unwrap();
            }
        }
        for len in 0..200 {
            let garbage: Vec<u8> = (0..len).map(|_| rng.random()).collect();
            decoded.decode(&garbage, &LIMITS).unwrap_err();
        }
    }
}
