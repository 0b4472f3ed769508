//! What lead and followers have in common: one plan to one step of the backend.
//!
//! The same bytes give every rank the same batch; the shards of the logits meet at the lead.

use std::ops::Range;
use std::time::Duration;

use evener_collective::{Collective, Mesh, Tag};

use crate::backend::{Backend, Batch};

use super::Error;
use super::batch::Tables;
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
    /// Lead only, by rank: `[S, its vocabulary rows]` of the last step.
    shards: Vec<Vec<f32>>,
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
        let n_shards = if mesh.rank() == LEAD { vocab.len() } else { 0 };
        Self {
            tables: Tables::new(&limits),
            batch: Batch::default(),
            wire: Vec::new(),
            step: 0,
            shards: vec![Vec::new(); n_shards],
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
        self.backend.run(&self.batch, &mut self.mesh)?;
        let n_rows = self.batch.sample_rows.len();
        if n_rows == 0 {
            return Ok(());
        }
        let tag = Tag { step: self.step, op: LOGITS_OP };
        let logits = self.backend.logits();
        self.mesh.gather(tag, LEAD, logits, &mut self.shards)?;
        for (rank, (shard, vocab)) in self.shards.iter().zip(&self.vocab).enumerate() {
            let (got, expected) = (shard.len(), n_rows * vocab.len());
            if got != expected {
                return Err(Error::Logits { rank, got, expected });
            }
        }
        Ok(())
    }

    /// Lead: replaces `out` by the logits of the last step's `row_idx`-th sampled row. `[vocab]`
    pub fn logits(&self, row_idx: usize, out: &mut Vec<f32>) {
        out.clear();
        for (shard, vocab) in self.shards.iter().zip(&self.vocab) {
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
