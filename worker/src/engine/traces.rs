//! Sequences whose requests are traced: the span of the phase each is in, and the spans of steps.
//!
//! The lead tells all ranks in the plan for which spans a step counts, and each rank records its
//! own part. Not every step: the first [`N_FIRST`] of a sequence, then each [`EACH`]th, and
//! [`MAX_STEPS`] in all. Nothing is done where nothing is traced.

use std::collections::HashMap;
use std::time::{Duration, Instant, SystemTime};

use evener_telemetry::{Context, Finished, Kind, Tracer, Value};

use super::scheduler::Scheduler;
use super::sequence::SequenceId;
use super::step::StepPlan;
use super::timeline::Step;

const N_FIRST: u32 = 16;
const EACH: u32 = 16;
const MAX_STEPS: u32 = 64;

/// The traced sequences of a lead.
#[derive(Debug)]
pub(super) struct Traces {
    tracer: Tracer,
    sequences: HashMap<SequenceId, Traced>,
}

#[derive(Debug)]
struct Traced {
    /// Of whoever submitted it.
    parent: Context,
    phase: Phase,
    /// Of the phase.
    context: Context,
    since: Instant,
    /// Steps it took part in, and those that have a span.
    n_steps: u32,
    n_spans: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Queue,
    Prefill,
    Decode,
}

impl Traces {
    pub(super) fn new(tracer: Tracer) -> Self {
        Self { tracer, sequences: HashMap::new() }
    }

    /// A sequence was taken in; it is traced if `parent` is there.
    pub(super) fn submitted(&mut self, id: SequenceId, parent: Option<Context>, now: Instant) {
        let Some(parent) = parent.filter(|_| self.tracer.is_on()) else { return };
        let (phase, context) = (Phase::Queue, parent.child());
        let traced = Traced { parent, phase, context, since: now, n_steps: 0, n_spans: 0 };
        self.sequences.insert(id, traced);
    }

    /// Says in a plan which spans it counts for.
    pub(super) fn plan(&mut self, scheduler: &Scheduler, plan: &mut StepPlan, now: Instant) {
        if self.sequences.is_empty() {
            return;
        }
        for entry_idx in 0..plan.entries.len() {
            let sequence = scheduler.scheduled(entry_idx);
            let Some(traced) = self.sequences.get_mut(&sequence.id) else { continue };
            let phase = if sequence.n_generated() > 0 { Phase::Decode } else { Phase::Prefill };
            if traced.phase != phase {
                traced.end_phase(&self.tracer, now);
                (traced.phase, traced.since) = (phase, now);
                traced.context = traced.parent.child();
            }
            if traced.is_due() {
                traced.n_spans += 1;
                plan.traces.push(traced.context);
            }
            traced.n_steps += 1;
        }
    }

    /// A sequence is over, however.
    pub(super) fn ended(&mut self, id: SequenceId) {
        if !self.sequences.is_empty()
            && let Some(traced) = self.sequences.remove(&id)
        {
            traced.end_phase(&self.tracer, Instant::now());
        }
    }
}

/// What was under way when the epoch ended has spans too.
impl Drop for Traces {
    fn drop(&mut self) {
        let now = Instant::now();
        self.sequences.values().for_each(|traced| traced.end_phase(&self.tracer, now));
    }
}

impl Traced {
    fn is_due(&self) -> bool {
        self.n_spans < MAX_STEPS && (self.n_steps < N_FIRST || self.n_steps.is_multiple_of(EACH))
    }

    fn end_phase(&self, tracer: &Tracer, now: Instant) {
        let name = match self.phase {
            Phase::Queue => "queue",
            Phase::Prefill => "prefill",
            Phase::Decode => "decode",
        };
        tracer.record(Finished {
            name,
            context: self.context,
            parent: Some(self.parent),
            kind: Kind::Internal,
            start: wall_clock(self.since),
            end: wall_clock(now),
            failed: false,
            attributes: vec![("evener.steps", u64::from(self.n_steps).into())],
        });
    }
}

/// One rank's part in a step that has just ended, for each of the spans it counts for.
pub(super) fn record_step(tracer: &Tracer, plan: &StepPlan, step: &Step, rank: usize) {
    if plan.traces.is_empty() {
        return;
    }
    let end = SystemTime::now();
    let micros = |duration: Duration| Value::from(duration.as_micros() as u64);
    for &parent in &plan.traces {
        tracer.record(Finished {
            name: "step",
            context: parent.child(),
            parent: Some(parent),
            kind: Kind::Internal,
            start: end - step.whole,
            end,
            failed: false,
            attributes: vec![
                ("evener.rank", (rank as u64).into()),
                ("evener.step", plan.step.into()),
                ("evener.sequences", (plan.entries.len() as u64).into()),
                ("evener.tokens", step.n_tokens.into()),
                ("evener.compute_us", micros(step.compute())),
                ("evener.wait_us", micros(step.waited)),
                ("evener.transfer_us", micros(step.transfer)),
                ("evener.bytes_sent", step.bytes_sent.into()),
                ("evener.bytes_received", step.bytes_received.into()),
            ],
        });
    }
}

fn wall_clock(at: Instant) -> SystemTime {
    SystemTime::now() - at.elapsed()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_steps_have_spans_then_some_and_never_too_many() {
        let parent = Context::root();
        let (phase, since) = (Phase::Decode, Instant::now());
        let mut traced =
            Traced { parent, phase, context: parent.child(), since, n_steps: 0, n_spans: 0 };
        let mut due = Vec::new();
        while traced.n_steps < 10_000 {
            if traced.is_due() {
                traced.n_spans += 1;
                due.push(traced.n_steps);
            }
            traced.n_steps += 1;
        }
        assert_eq!(due.len(), MAX_STEPS as usize);
        assert!(due[..N_FIRST as usize].iter().copied().eq(0..N_FIRST));
        assert_eq!(due[N_FIRST as usize..][..3], [16, 32, 48]);
    }
}
