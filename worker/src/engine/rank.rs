//! What lead and followers have in common: one plan to one step of the backend.
//!
//! The same bytes give every rank the same batch; the shards of the logits meet at the lead.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use evener_collective::{Collective, Mesh, Tag};
use evener_kernels::Isa;
use evener_telemetry::Tracer;

use crate::backend::{Backend, Batch};

use super::answer::{Answer, Answers, Highest, Logits, Part};
use super::ask::{Ask, RowAsk};
use super::batch::{self, Tables};
use super::step::{Kind, Limits, StepPlan};
use super::timeline::{Step, Timeline};
use super::{Error, row, traces};

/// Rank that leads a group.
pub const LEAD: usize = 0;
/// Op number of the plan's broadcast; the backend's start at 1.
const PLAN_OP: u32 = 0;
/// Op numbers of what follows a forward pass, after all of the backend's: the ask, the largest
/// logits, and what the lead gathers.
const ASK_OP: u32 = u32::MAX - 2;
const HIGHEST_OP: u32 = u32::MAX - 1;
const GATHER_OP: u32 = u32::MAX;
/// How long a follower waits for an ask: the lead may still be at its masks.
const ASK_WAIT: Duration = Duration::from_secs(10);

/// One rank of a group, ready to step.
pub struct Rank {
    mesh: Mesh,
    backend: Box<dyn Backend>,
    limits: Limits,
    /// By rank: vocabulary rows of its logits.
    vocab: Vec<Range<usize>>,
    tables: Tables,
    batch: Batch,
    wire: Vec<u8>,
    /// Of the last plan.
    step: u64,
    isa: Isa,
    /// Of the last step's logits, `[S, peaks]`.
    peaks: Vec<f32>,
    /// Of the last step that asked nothing: the likeliest of our vocabulary rows. `[S, 2]`, the
    /// logit and the bits of the row's index. Else what we answered.
    mine: Vec<f32>,
    /// Lead only, by rank but our own: what it sent of the last step, as `mine` or whole rows.
    theirs: Vec<Vec<f32>>,
    ask: Asking,
    clock: Clock,
}

/// Where the time of steps is measured.
struct Clock {
    timeline: Arc<Timeline>,
    tracer: Tracer,
    /// The end of the last step.
    ended: Instant,
    /// Of the step under way.
    began: Instant,
    /// As far as it is known at its begin.
    step: Step,
}

impl Clock {
    fn new(timeline: Arc<Timeline>, tracer: Tracer) -> Self {
        let now = Instant::now();
        Self { timeline, tracer, ended: now, began: now, step: Step::default() }
    }
}

/// What serves asks; kept between steps.
#[derive(Default)]
struct Asking {
    wire: Vec<u8>,
    /// Follower only.
    ask: Ask,
    part: Part,
    /// By row.
    highest: Vec<Highest>,
    highest_wire: Vec<u8>,
    highest_of_all: Vec<Vec<u8>>,
    /// Lead only.
    answers: Answers,
}

impl Rank {
    /// `vocab`: by rank, the vocabulary rows of its logits.
    ///
    /// # Panics
    /// `vocab` does not have one range a rank.
    #[must_use]
    pub fn new(
        mesh: Mesh,
        backend: Box<dyn Backend>,
        vocab: Vec<Range<usize>>,
        limits: Limits,
    ) -> Self {
        assert_eq!(vocab.len(), mesh.world_size(), "one vocabulary range a rank");
        let is_lead = mesh.rank() == LEAD;
        Self {
            tables: Tables::new(&limits),
            batch: batch::with_room(&limits),
            wire: Vec::with_capacity(StepPlan::max_bytes(&limits)),
            step: 0,
            isa: Isa::detect(),
            peaks: Vec::new(),
            mine: Vec::with_capacity(2 * limits.max_sample_rows),
            theirs: vec![Vec::new(); if is_lead { vocab.len() } else { 0 }],
            ask: Asking::default(),
            clock: Clock::new(Arc::default(), Tracer::default()),
            mesh,
            backend,
            limits,
            vocab,
        }
    }

    /// Lead: numbers the plan, sends it, and does its own part.
    ///
    /// # Errors
    /// The epoch is over.
    pub fn lead(&mut self, plan: &mut StepPlan) -> Result<(), Error> {
        self.step += 1;
        if plan.kind == Kind::Run {
            self.begin_step(plan.tokens.len());
        }
        plan.epoch = self.mesh.epoch();
        plan.step = self.step;
        plan.encode(&mut self.wire);
        let tag = Tag { step: self.step, op: PLAN_OP };
        self.mesh.broadcast(tag, LEAD, &mut self.wire, Duration::ZERO)?;
        self.execute(plan)
    }

    /// Follower: waits up to `wait` for the next plan, parked, and does its part.
    ///
    /// # Errors
    /// The epoch is over.
    pub fn follow(&mut self, plan: &mut StepPlan, wait: Duration) -> Result<(), Error> {
        self.step += 1;
        let tag = Tag { step: self.step, op: PLAN_OP };
        self.mesh.broadcast(tag, LEAD, &mut self.wire, wait)?;
        plan.decode(&self.wire, &self.limits)?;
        let due = [("epoch", plan.epoch, self.mesh.epoch()), ("step", plan.step, self.step)];
        for (what, got, expected) in due {
            if got != expected {
                return Err(Error::OutOfStep { what, got, expected });
            }
        }
        if plan.kind == Kind::Run {
            self.begin_step(plan.tokens.len());
        }
        self.execute(plan)
    }

    /// Measures steps into `timeline` from here on, and those that are traced for `tracer` too.
    pub fn measure_into(&mut self, timeline: Arc<Timeline>, tracer: Tracer) {
        self.clock = Clock::new(timeline, tracer);
    }

    #[must_use]
    pub fn tracer(&self) -> &Tracer {
        &self.clock.tracer
    }

    #[must_use]
    pub fn timeline(&self) -> &Timeline {
        &self.clock.timeline
    }

    fn begin_step(&mut self, n_tokens: usize) {
        let before = self.mesh.take_stats();
        let began = &mut self.clock.step;
        // With what moved since the last step: the plan, on a follower.
        (began.bytes_sent, began.bytes_received) = (before.bytes_sent, before.bytes_received);
        began.n_tokens = n_tokens as u64;
        self.clock.began = Instant::now();
    }

    /// The step of `plan`, the last that ran, is over on this rank: it goes into the timeline.
    pub fn end_step(&mut self, plan: &StepPlan) {
        let stats = self.mesh.take_stats();
        let Clock { timeline, tracer, ended, began, step: begun } = &mut self.clock;
        let now = Instant::now();
        let waited = stats.waited.min(stats.spent);
        let step = Step {
            idle: *began - *ended,
            whole: now - *began,
            waited,
            transfer: stats.spent - waited,
            bytes_sent: begun.bytes_sent + stats.bytes_sent,
            bytes_received: begun.bytes_received + stats.bytes_received,
            n_tokens: begun.n_tokens,
        };
        *ended = now;
        timeline.step(&step);
        traces::record_step(tracer, plan, &step, self.mesh.rank());
    }

    fn execute(&mut self, plan: &StepPlan) -> Result<(), Error> {
        self.tables.apply(plan, &mut self.batch)?;
        if plan.kind == Kind::Rows {
            return self.gather_rows(&plan.rows);
        }
        if self.batch.tokens.is_empty() {
            return Ok(());
        }
        for copy in &plan.copies {
            self.backend.copy_block(copy.from, copy.to);
        }
        self.backend.run(&self.batch, &mut self.mesh)?;
        let n_rows = self.batch.sample_rows.len();
        if n_rows == 0 {
            return Ok(());
        }
        let columns = self.vocab[self.mesh.rank()].len();
        if plan.asks {
            self.backend.peaks(columns, &mut self.peaks);
            return match self.mesh.rank() {
                LEAD => Ok(()), // it asks when it knows what
                _ => self.hear(n_rows),
            };
        }
        // A rank without vocabulary rows has none; nobody asks it.
        self.backend.likeliest(n_rows, columns, &mut self.peaks, &mut self.mine);
        self.gather(|_, _| Some(2 * n_rows))
    }

    /// Brings what every rank found to the lead. `due`: by rank and its vocabulary rows, how many
    /// words, if that is known.
    fn gather(&mut self, due: impl Fn(usize, usize) -> Option<usize>) -> Result<(), Error> {
        if self.vocab.len() == 1 {
            return Ok(());
        }
        let tag = Tag { step: self.step, op: GATHER_OP };
        self.mesh.gather(tag, LEAD, &self.mine, &mut self.theirs)?;
        for (rank, (shard, vocab)) in self.theirs.iter().zip(&self.vocab).enumerate() {
            let got = shard.len();
            if let Some(expected) = due(rank, vocab.len()).filter(|&due| rank != LEAD && due != got)
            {
                return Err(Error::Logits { rank, got, expected });
            }
        }
        Ok(())
    }

    /// Lead: the likeliest token of the last step's `row_idx`-th sampled row, of equals the lowest.
    /// The step did not ask.
    ///
    /// # Errors
    /// Logits that are no numbers, or a rank that sent nonsense: the epoch is over.
    pub fn likeliest(&self, row_idx: usize) -> Result<u32, Error> {
        let mut best = (0, f32::NEG_INFINITY);
        for (rank, vocab) in self.vocab.iter().enumerate().filter(|(_, vocab)| !vocab.is_empty()) {
            let answers = self.words(rank);
            let (logit, got) = (answers[2 * row_idx], answers[2 * row_idx + 1].to_bits());
            if got as usize >= vocab.len() {
                return Err(Error::Likeliest { rank, got, rows: vocab.len() });
            }
            let token = vocab.start + got as usize;
            if !logit.is_finite() {
                return Err(row::Error::NotFinite { token, value: logit }.into());
            }
            if logit > best.1 {
                best = (token as u32, logit);
            }
        }
        Ok(best.0)
    }

    /// Lead: has all ranks answer about the sampled rows of the last step, which said that it asks.
    ///
    /// # Errors
    /// The epoch is over.
    pub fn ask(&mut self, ask: &Ask) -> Result<(), Error> {
        if self.vocab.len() > 1 {
            ask.encode(&mut self.ask.wire);
            let tag = Tag { step: self.step, op: ASK_OP };
            self.mesh.broadcast(tag, LEAD, &mut self.ask.wire, Duration::ZERO)?;
        }
        self.answer(ask)?;
        self.ask.answers.begin(self.vocab.len());
        Ok(())
    }

    /// Follower: waits for the ask and answers it.
    fn hear(&mut self, n_rows: usize) -> Result<(), Error> {
        let tag = Tag { step: self.step, op: ASK_OP };
        self.mesh.broadcast(tag, LEAD, &mut self.ask.wire, ASK_WAIT)?;
        let mut ask = std::mem::take(&mut self.ask.ask);
        ask.decode(&self.ask.wire, n_rows, &self.limits)?;
        self.answer(&ask)?;
        self.ask.ask = ask;
        Ok(())
    }

    fn answer(&mut self, ask: &Ask) -> Result<(), Error> {
        let Asking { part, highest, .. } = &mut self.ask;
        let own = &self.vocab[self.mesh.rank()];
        let logits = Logits::new(self.isa, own, self.backend.logits(), &self.peaks);
        part.prepare(&logits, ask, self.limits.vocab, highest)?;
        if self.vocab.len() > 1 && ask.wants_totals() {
            self.agree_on_highest()?;
        }
        let Asking { part, highest, .. } = &mut self.ask;
        let own = &self.vocab[self.mesh.rank()];
        let logits = Logits::new(self.isa, own, self.backend.logits(), &self.peaks);
        part.report(&logits, ask, highest, &mut self.mine)?;
        self.gather(|_, _| None)
    }

    /// Masses of all ranks are to be beside the same logit.
    fn agree_on_highest(&mut self) -> Result<(), Error> {
        let Asking { highest, highest_wire, highest_of_all, .. } = &mut self.ask;
        highest_wire.clear();
        for Highest { edited, raw } in &*highest {
            highest_wire.extend(edited.to_le_bytes());
            highest_wire.extend(raw.to_le_bytes());
        }
        let tag = Tag { step: self.step, op: HIGHEST_OP };
        self.mesh.all_gather(tag, highest_wire, highest_of_all)?;
        for (rank, theirs) in highest_of_all.iter().enumerate() {
            if theirs.len() != highest_wire.len() {
                let (got, expected) = (theirs.len() / 4, highest_wire.len() / 4);
                return Err(Error::Logits { rank, got, expected });
            }
            let (words, _) = theirs.as_chunks::<4>();
            for (highest, two) in highest.iter_mut().zip(words.chunks_exact(2)) {
                let [edited, raw] = [two[0], two[1]].map(f32::from_le_bytes);
                highest.raise(Highest { edited, raw });
            }
        }
        Ok(())
    }

    /// Lead: what all ranks answered about the next row of the ask, `row_idx`.
    ///
    /// # Errors
    /// A rank that sent nonsense: the epoch is over.
    pub fn take_answer(
        &mut self,
        row_idx: usize,
        asked: &RowAsk,
        out: &mut Answer,
    ) -> Result<(), Error> {
        let highest = self.ask.highest[row_idx];
        let words = |rank| match rank {
            LEAD => self.mine.as_slice(),
            _ => self.theirs[rank].as_slice(),
        };
        Ok(self.ask.answers.take(asked, highest, &self.vocab, words, out)?)
    }

    /// What a rank sent last.
    fn words(&self, rank: usize) -> &[f32] {
        if rank == LEAD { &self.mine } else { &self.theirs[rank] }
    }

    /// Lead: has whole sampled rows of the last step that ran brought here; `rows` of an otherwise
    /// empty plan says which. What was answered is forgotten.
    ///
    /// # Errors
    /// The epoch is over.
    pub fn fetch(&mut self, plan: &mut StepPlan) -> Result<(), Error> {
        plan.kind = Kind::Rows;
        match self.vocab.len() {
            1 => self.gather_rows(&plan.rows),
            _ => self.lead(plan),
        }
    }

    fn gather_rows(&mut self, rows: &[u32]) -> Result<(), Error> {
        let columns = self.vocab[self.mesh.rank()].len();
        let logits = self.backend.logits();
        self.mine.clear();
        for &row_idx in rows {
            let Some(row) = logits.get(row_idx as usize * columns..).filter(|_| columns > 0) else {
                continue;
            };
            self.mine.extend_from_slice(row.get(..columns).unwrap_or(&[]));
        }
        self.gather(|_, n| Some(n * rows.len()))
    }

    /// Lead: replaces `out` by the logits of the `nth` row that was fetched. `[vocab]`
    pub fn fetched(&self, nth: usize, out: &mut Vec<f32>) {
        out.clear();
        for (rank, vocab) in self.vocab.iter().enumerate() {
            out.extend_from_slice(&self.words(rank)[nth * vocab.len()..][..vocab.len()]);
        }
    }

    #[must_use]
    pub fn isa(&self) -> Isa {
        self.isa
    }

    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    #[must_use]
    pub fn mesh(&self) -> &Mesh {
        &self.mesh
    }

    pub fn mesh_mut(&mut self) -> &mut Mesh {
        &mut self.mesh
    }

    /// The device, for the next epoch.
    #[must_use]
    pub fn into_backend(self) -> Box<dyn Backend> {
        self.backend
    }
}
