//! Sequences that wait for a slot and blocks, and whose turn it is. Pure.
//!
//! First whoever has the lowest priority number; among those, whoever ran before and was preempted;
//! then the user who was served least (`fairness`); then whoever came first.

use super::fairness::Fairness;
use super::sequence::{Sequence, SequenceId};

/// The waiting. Whoever fills it keeps it within bounds.
#[derive(Debug, Default)]
pub struct Queue {
    waiting: Vec<Sequence>,
}

impl Queue {
    #[must_use]
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    pub fn push(&mut self, sequence: Sequence) {
        self.waiting.push(sequence);
    }

    /// Where the one stands whose turn it is.
    #[must_use]
    pub fn next(&self, fairness: &Fairness) -> Option<usize> {
        let turn = |sequence: &Sequence| {
            let was_preempted = sequence.n_preempted > 0;
            let served = if was_preempted { 0 } else { fairness.served(sequence.account) };
            (sequence.priority, !was_preempted, served, sequence.id)
        };
        (0..self.waiting.len()).min_by_key(|&at| turn(&self.waiting[at]))
    }

    #[must_use]
    pub fn get(&self, at: usize) -> &Sequence {
        &self.waiting[at]
    }

    pub fn take(&mut self, at: usize) -> Sequence {
        self.waiting.swap_remove(at)
    }

    /// Takes a sequence out before its turn.
    pub fn remove(&mut self, id: SequenceId) -> Option<Sequence> {
        let at = self.waiting.iter().position(|sequence| sequence.id == id)?;
        Some(self.take(at))
    }

    pub fn iter(&self) -> impl Iterator<Item = &Sequence> {
        self.waiting.iter()
    }
}
