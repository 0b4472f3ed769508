//! What lead and followers have in common: one plan to one step of the backend.
//!
//! The same bytes give every rank the same batch; the shards of the logits meet at the lead.

use std::ops::Range;
use std::time::Duration;

use evener_collective::{Collective, Mesh, Tag};
use evener_kernels::Isa;
use evener_kernels::peaks::{self, n_peaks, peaks_of};

use crate::backend::{Backend, Batch};

use super::Error;
use super::batch::{self, Tables};
use super::sampler::{self, Row};
use super::step::{Limits, StepPlan};

/// Rank that leads a group.
pub const LEAD: usize = 0;
/// Op number of the plan's broadcast; the backend's start at 1.
const PLAN_OP: u32 = 0;
/// Op number of the logits' gather, after all of the backend's.
const LOGITS_OP: u32 = u32::MAX;

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
    /// Of the last step's logits, `[S, peaks]`, if they were looked at.
    peaks: Vec<f32>,
    /// Of the last step that wanted no more: the likeliest of our vocabulary rows. `[S, 2]`, the
    /// logit and the bits of the row's index.
    likeliest: Vec<f32>,
    /// Lead only, by rank but our own: what it sent of the last step, `[S, its vocabulary rows]` or
    /// as `likeliest`.
    shards: Vec<Vec<f32>>,
    /// Lead only: a row of logits put together, and its peaks.
    row: Vec<f32>,
    row_peaks: Vec<f32>,
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
        let room = if is_lead { limits.vocab } else { 0 };
        Self {
            tables: Tables::new(&limits),
            batch: batch::with_room(&limits),
            wire: Vec::with_capacity(StepPlan::max_bytes(&limits)),
            step: 0,
            isa: Isa::detect(),
            peaks: Vec::new(),
            likeliest: Vec::with_capacity(2 * limits.max_sample_rows),
            shards: vec![Vec::new(); if is_lead { vocab.len() } else { 0 }],
            row: Vec::with_capacity(room),
            row_peaks: Vec::with_capacity(n_peaks(room)),
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
        self.execute(plan)
    }

    fn execute(&mut self, plan: &StepPlan) -> Result<(), Error> {
        self.tables.apply(plan, &mut self.batch)?;
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
        let alone = self.vocab.len() == 1;
        if alone || !plan.whole_logits {
            self.backend.peaks(columns, &mut self.peaks);
        }
        if !plan.whole_logits {
            self.find_likeliest(n_rows, columns);
        }
        if alone {
            return Ok(());
        }
        let tag = Tag { step: self.step, op: LOGITS_OP };
        let logits = match plan.whole_logits {
            true => self.backend.logits(),
            false => &self.likeliest,
        };
        self.mesh.gather(tag, LEAD, logits, &mut self.shards)?;
        for (rank, (shard, vocab)) in self.shards.iter().zip(&self.vocab).enumerate() {
            let of_row = if plan.whole_logits { vocab.len() } else { 2 };
            let (got, expected) = (shard.len(), n_rows * of_row);
            if rank != LEAD && got != expected {
                return Err(Error::Logits { rank, got, expected });
            }
        }
        Ok(())
    }

    fn find_likeliest(&mut self, n_rows: usize, columns: usize) {
        self.likeliest.clear();
        let (logits, n_peaks) = (self.backend.logits(), n_peaks(columns));
        for row in 0..n_rows {
            let peaks = &self.peaks[row * n_peaks..][..n_peaks];
            let best = peaks::best(self.isa, &logits[row * columns..][..columns], peaks);
            // A rank without vocabulary rows has none; nobody asks it.
            let (token, logit) = best.unwrap_or((0, f32::NEG_INFINITY));
            self.likeliest.extend([logit, f32::from_bits(token as u32)]);
        }
    }

    /// Lead: the likeliest token of the last step's `row_idx`-th sampled row, of equals the lowest.
    /// The step did not want whole logits.
    ///
    /// # Errors
    /// Logits that are no numbers, or a rank that sent nonsense: the epoch is over.
    pub fn likeliest(&self, row_idx: usize) -> Result<u32, Error> {
        let mut best = (0, f32::NEG_INFINITY);
        for (rank, vocab) in self.vocab.iter().enumerate().filter(|(_, vocab)| !vocab.is_empty()) {
            let answers = if rank == LEAD { &self.likeliest } else { &self.shards[rank] };
            let (logit, got) = (answers[2 * row_idx], answers[2 * row_idx + 1].to_bits());
            if got as usize >= vocab.len() {
                return Err(Error::Likeliest { rank, got, rows: vocab.len() });
            }
            let token = vocab.start + got as usize;
            if !logit.is_finite() {
                return Err(sampler::Error::NotFinite { token, value: logit }.into());
            }
            if logit > best.1 {
                best = (token as u32, logit);
            }
        }
        Ok(best.0)
    }

    /// Lead: the last step's `row_idx`-th sampled row. The step wanted whole logits.
    ///
    /// # Errors
    /// Logits that are no numbers: the epoch is over.
    pub fn row(&mut self, row_idx: usize) -> Result<Row<'_>, Error> {
        if let [vocab] = self.vocab.as_slice() {
            let (n, n_peaks) = (vocab.len(), n_peaks(vocab.len()));
            let logits = &self.backend.logits()[row_idx * n..][..n];
            let peaks = &self.peaks[row_idx * n_peaks..][..n_peaks];
            return Ok(Row::new(self.isa, logits, peaks)?);
        }
        let mut row = std::mem::take(&mut self.row);
        self.logits(row_idx, &mut row);
        self.row = row;
        self.row_peaks.resize(n_peaks(self.row.len()), 0.0);
        peaks_of(self.isa, &self.row, &mut self.row_peaks);
        Ok(Row::new(self.isa, &self.row, &self.row_peaks)?)
    }

    /// Lead: replaces `out` by the logits of the last step's `row_idx`-th sampled row. The step
    /// wanted whole logits. `[vocab]`
    pub fn logits(&self, row_idx: usize, out: &mut Vec<f32>) {
        out.clear();
        for (rank, vocab) in self.vocab.iter().enumerate() {
            let shard = if rank == LEAD { self.backend.logits() } else { &self.shards[rank] };
            out.extend_from_slice(&shard[row_idx * vocab.len()..][..vocab.len()]);
        }
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
