//! The masks of a step's structured sequences, computed on a thread of their own while the ranks
//! run the model, and joined before a token is chosen.
//!
//! A matcher travels to the thread with its task and comes back with the mask, so the thread keeps
//! nothing, and a sequence that goes takes its matcher with it.

use std::collections::HashMap;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use llguidance::{CancellationHandle, Matcher};

use super::scheduler::Scheduler;
use super::sequence::{Sequence, SequenceId};
use super::step::StepPlan;
use super::{Error, grammar};

/// Fuel bounds each mask to a few milliseconds; a step that waits so long for all of them fails
/// those that are not done.
const PATIENCE: Duration = Duration::from_secs(2);
/// Then they are cancelled, which is looked for every few microseconds.
const LAST_PATIENCE: Duration = Duration::from_secs(5);
/// Derivatives of deep expressions recurse.
const STACK_BYTES: usize = 16 << 20;

/// The structured sequences of a lead.
#[derive(Default)]
pub struct Masks {
    states: HashMap<SequenceId, State>,
    thread: Option<Thread>,
    /// How to stop what is with the thread; empty if nothing is.
    out: Vec<CancellationHandle>,
    /// Kept for its memory.
    tasks: Vec<Task>,
}

/// One sequence between steps.
#[derive(Default)]
struct State {
    /// None while it is with the thread.
    matcher: Option<Matcher>,
    /// Tokens of the output that the matcher has taken.
    n_taken: usize,
    /// Of the step in flight.
    mask: Vec<u32>,
    failure: Option<String>,
}

struct Task {
    id: SequenceId,
    matcher: Matcher,
    /// Those it has not taken yet.
    tokens: Vec<u32>,
    /// A bit for each token that may come next, once it is done.
    mask: Vec<u32>,
    failure: Option<String>,
}

struct Thread {
    /// Taken on drop, which ends the thread.
    jobs: Option<SyncSender<Vec<Task>>>,
    done: Receiver<Vec<Task>>,
    handle: Option<JoinHandle<()>>,
}

impl Masks {
    /// Sends the structured sequences that this plan brings to their next token to the thread.
    ///
    /// # Errors
    /// There is no thread.
    pub fn begin(&mut self, scheduler: &Scheduler, plan: &StepPlan) -> Result<(), Error> {
        for (entry_idx, entry) in plan.entries.iter().enumerate() {
            let sequence = scheduler.scheduled(entry_idx);
            if entry.start + entry.n_tokens == sequence.tokens.len() as u32 {
                self.put(sequence);
            }
        }
        if self.tasks.is_empty() {
            return Ok(());
        }
        let thread = match self.thread.take() {
            Some(thread) => thread,
            None => Thread::start()?,
        };
        let handles = self.tasks.iter().filter_map(|task| task.matcher.cancellation_handle());
        self.out.extend(handles);
        let sent = thread.jobs.as_ref().map(|jobs| jobs.send(std::mem::take(&mut self.tasks)));
        self.thread = Some(thread);
        match sent {
            Some(Ok(())) => Ok(()),
            Some(Err(_)) | None => Err(Error::Masks { what: "is gone" }),
        }
    }

    fn put(&mut self, sequence: &Sequence) {
        let Some(grammar) = &sequence.sampling.grammar else { return };
        let state = self
            .states
            .entry(sequence.id)
            .or_insert_with(|| State { matcher: Some(grammar.matcher()), ..State::default() });
        let Some(matcher) = state.matcher.take() else { return };
        let n_prompt = sequence.tokens.len() - sequence.n_output();
        let tokens = sequence.tokens[n_prompt + state.n_taken..].to_vec();
        state.n_taken += tokens.len();
        let mask = std::mem::take(&mut state.mask);
        self.tasks.push(Task { id: sequence.id, matcher, tokens, mask, failure: None });
    }

    /// Waits for the masks of the step in flight.
    ///
    /// # Errors
    /// The thread does not answer.
    pub fn join(&mut self) -> Result<(), Error> {
        if self.out.is_empty() {
            return Ok(());
        }
        let thread = self.thread.as_ref().ok_or(Error::Masks { what: "is gone" })?;
        let done = thread.done.recv_timeout(PATIENCE).or_else(|_| {
            self.out.iter().for_each(CancellationHandle::cancel);
            thread.done.recv_timeout(LAST_PATIENCE)
        });
        self.out.clear();
        self.tasks = done.map_err(|_| Error::Masks { what: "does not answer" })?;
        for Task { id, matcher, mask, failure, .. } in self.tasks.drain(..) {
            if let Some(state) = self.states.get_mut(&id) {
                (state.matcher, state.mask, state.failure) = (Some(matcher), mask, failure);
            }
        }
        Ok(())
    }

    /// What may come next, or why there is no telling; none of a sequence without a grammar.
    #[must_use]
    pub fn mask(&self, id: SequenceId) -> Option<Result<&[u32], &str>> {
        let state = self.states.get(&id)?;
        Some(state.failure.as_deref().map_or(Ok(state.mask.as_slice()), Err))
    }

    /// The sequence is gone.
    pub fn forget(&mut self, id: SequenceId) {
        self.states.remove(&id);
    }
}

impl std::fmt::Debug for Masks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Masks").field("n_sequences", &self.states.len()).finish_non_exhaustive()
    }
}

impl Thread {
    fn start() -> Result<Self, Error> {
        let (jobs, todo) = sync_channel::<Vec<Task>>(1);
        let (finished, done) = sync_channel(1);
        let work = move || {
            while let Ok(mut tasks) = todo.recv() {
                tasks.iter_mut().for_each(Task::run);
                if finished.send(tasks).is_err() {
                    return;
                }
            }
        };
        let builder = std::thread::Builder::new().name("masks".to_owned()).stack_size(STACK_BYTES);
        let handle = builder.spawn(work).map_err(|_| Error::Masks { what: "does not start" })?;
        Ok(Self { jobs: Some(jobs), done, handle: Some(handle) })
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(handle) = self.handle.take() {
            let _ = handle.join();
        }
    }
}

impl Task {
    fn run(&mut self) {
        self.mask.clear();
        let taken = self.matcher.consume_tokens(&self.tokens);
        match taken.and_then(|()| self.matcher.compute_mask_or_eos()) {
            Ok(mask) if !mask.is_zero() => self.mask.extend_from_slice(mask.as_slice()),
            Ok(_) => self.failure = Some("nothing can follow the answer so far".to_owned()),
            Err(error) => {
                let reason = grammar::plain(&error);
                self.failure = Some(format!("the grammar cannot go on: {reason}"));
            }
        }
    }
}
