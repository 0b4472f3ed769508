//! The loop of the lead rank: commands in, a plan to all ranks, logits to tokens, tokens out.
//!
//! It owns the scheduler and the streams. Commands are looked at between steps only, so nothing
//! changes under a plan in flight. So are plans made: half a microsecond for 32 decoding sequences
//! (`examples/step_overhead.rs`) is too little to hide behind the step before.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use evener_collective::Collective;
use tokio::sync::mpsc::error::TrySendError;

use super::Error;
use super::chooser::Chooser;
use super::handle::{self, Command, Handle, Sink, StreamId};
use super::output::{End, Event, Load, StepOutput, StreamEnd};
use super::pace::Pace;
use super::rank::{LEAD, Rank};
use super::scheduler::{Committed, Options, Scheduler};
use super::sequence::{SequenceId, Spec};
use super::speculation::Speculation;
use super::step::{Kind, StepPlan};
use super::traces::Traces;
use crate::metrics::Figures;

/// An idle lead sends a plan this often, so that followers know it is there.
pub const HEARTBEAT: Duration = Duration::from_millis(500);
/// An idle lead looks this often whether a peer is lost or the epoch aborted.
const IDLE_SLICE: Duration = Duration::from_millis(50);

/// The lead of a group.
pub struct Lead {
    rank: Rank,
    scheduler: Scheduler,
    commands: Receiver<Command>,
    streams: BTreeMap<StreamId, Stream>,
    owners: HashMap<SequenceId, Owner>,
    figures: Arc<Figures>,
    last_plan: Instant,
    plan: StepPlan,
    chooser: Chooser,
    committed: Vec<Committed>,
    /// Of the step in flight: sequences that could not be given a token, and why.
    failed: Vec<(SequenceId, String)>,
    pace: Pace,
    traces: Traces,
    speculation: Speculation,
}

struct Stream {
    sink: Sink,
    live: HashMap<u64, SequenceId>,
    /// What the next message will say.
    events: Vec<Event>,
}

#[derive(Clone, Copy)]
struct Owner {
    stream: StreamId,
    request_id: u64,
    /// Before the step in flight then had ended.
    arrived: Instant,
    /// For its first step.
    is_waiting: bool,
}

impl Lead {
    /// # Panics
    /// `rank` is not rank 0, or its limits are not those of `options`.
    #[must_use]
    pub fn new(rank: Rank, options: Options, figures: Arc<Figures>) -> (Handle, Self) {
        assert_eq!(rank.mesh().rank(), LEAD, "the lead is rank 0");
        assert_eq!(rank.limits(), &options.limits, "one set of limits");
        let (handle, commands) = handle::channel();
        let limits = options.limits.clone();
        let pace = Pace::new(options.max_stretch);
        let traces = Traces::new(rank.tracer().clone());
        let speculation = Speculation::new(options.max_drafts, limits.n_slots);
        let lead = Self {
            rank,
            scheduler: Scheduler::new(options),
            commands,
            streams: BTreeMap::new(),
            owners: HashMap::new(),
            figures,
            last_plan: Instant::now(),
            plan: StepPlan::with_room(&limits),
            chooser: Chooser::default(),
            committed: Vec::with_capacity(limits.max_sample_rows),
            failed: Vec::new(),
            pace,
            traces,
            speculation,
        };
        lead.figures.set_load(lead.load());
        (handle, lead)
    }

    /// Leads until told to leave.
    ///
    /// # Errors
    /// The epoch is over for another reason.
    pub fn run(&mut self) -> Result<(), Error> {
        let mut first = None;
        loop {
            while let Some(command) = first.take().or_else(|| self.commands.try_recv().ok()) {
                if matches!(command, Command::Leave) {
                    self.plan.clear();
                    self.plan.kind = Kind::Leave;
                    return self.rank.lead(&mut self.plan);
                }
                self.take(command);
            }
            self.drop_closed_streams();
            let (n_decoding, n_present) = (self.scheduler.n_decoding(), self.scheduler.n_present());
            let max_prefill = self.pace.max_prefill(n_decoding, n_present);
            self.speculation.draft(&mut self.scheduler, &self.pace);
            let n_preempted = self.scheduler.n_preemptions();
            let ran = self.scheduler.schedule(&mut self.plan, max_prefill);
            self.figures.preempted(self.scheduler.n_preemptions() - n_preempted);
            if ran {
                self.step()?;
            }
            self.flush();
            if !ran {
                first = self.idle()?;
            }
        }
    }

    /// Ends all streams, telling them why. For after the loop: sequences are left as they are, a
    /// step of theirs may have failed half way.
    pub fn end_streams(&mut self, reason: &str) {
        for stream in std::mem::take(&mut self.streams).into_values() {
            let _ = stream.sink.end.set(StreamEnd::EpochOver { reason: reason.to_owned() });
        }
    }

    /// The rank, once the loop has ended.
    #[must_use]
    pub fn into_rank(self) -> Rank {
        self.rank
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Open { stream, sink } => {
                let opened = Stream { sink, live: HashMap::new(), events: Vec::new() };
                self.streams.insert(stream, opened);
            }
            Command::Submit { stream, request_id, spec, arrived } => {
                self.submit(stream, request_id, *spec, arrived);
            }
            Command::Cancel { stream, request_id } => {
                let live = self.streams.get(&stream).and_then(|s| s.live.get(&request_id));
                if let Some(&id) = live {
                    self.scheduler.cancel(id);
                    self.forget(id);
                }
            }
            Command::Leave => unreachable!("the loop looks for it"),
        }
    }

    fn submit(&mut self, stream_id: StreamId, request_id: u64, spec: Spec, arrived: Instant) {
        let Some(stream) = self.streams.get_mut(&stream_id) else {
            return; // it ended, and its owner has been told or is gone
        };
        if stream.live.contains_key(&request_id) {
            self.end_stream(stream_id, Some(StreamEnd::RequestIdInUse { request_id }));
            return;
        }
        let trace = spec.origin.trace;
        match self.scheduler.submit(spec) {
            Ok(id) => {
                stream.live.insert(request_id, id);
                self.traces.submitted(id, trace, arrived);
                let owner = Owner { stream: stream_id, request_id, arrived, is_waiting: true };
                self.owners.insert(id, owner);
            }
            Err(refusal) => stream.events.push(Event::ended(request_id, End::Refused(refusal))),
        }
    }

    /// One step of all ranks, its tokens into the streams' next messages.
    fn step(&mut self) -> Result<(), Error> {
        let began = Instant::now();
        self.end_queueing(began);
        self.traces.plan(&self.scheduler, &mut self.plan, began);
        self.chooser.begin(&self.scheduler, &self.plan)?;
        self.rank.lead(&mut self.plan)?;
        self.last_plan = Instant::now();
        self.chooser.choose(&mut self.rank, &self.scheduler, &self.plan)?;
        self.rank.end_step(&self.plan);
        self.measure(began.elapsed());
        self.tell();
        let mut committed = std::mem::take(&mut self.committed);
        self.scheduler.commit(&self.plan, &self.chooser.chosen, &mut committed);
        self.figures.stepped(committed.len() as u64);
        for Committed { id, finish, .. } in committed.drain(..) {
            let Some(finish) = finish else { continue };
            if self.failed.iter().any(|(failed, _)| *failed == id) {
                continue;
            }
            let Owner { stream, request_id, arrived, .. } = self.owners[&id];
            self.forget(id);
            let stream = self.streams.get_mut(&stream).expect("an owner's stream is open");
            let mut events = stream.events.iter_mut().rev();
            let event = events.find(|event| event.request_id == request_id);
            let event = event.expect("it has just got a token");
            (event.end, event.lead_time) = (Some(End::Finished(finish)), Some(arrived.elapsed()));
        }
        self.committed = committed;
        self.end_failed();
        Ok(())
    }

    /// Counts how long the sequences waited that are in their first step now.
    fn end_queueing(&mut self, now: Instant) {
        for entry_idx in 0..self.plan.entries.len() {
            let sequence = self.scheduler.scheduled(entry_idx);
            if sequence.n_generated() == 0
                && let Some(owner) = self.owners.get_mut(&sequence.id)
                && std::mem::take(&mut owner.is_waiting)
            {
                self.rank.timeline().queued(now.saturating_duration_since(owner.arrived));
            }
        }
    }

    /// What was chosen, into the streams' next messages.
    fn tell(&mut self) {
        let mut tokens = self.chooser.tokens.drain(..);
        for (entry_idx, choice) in self.chooser.choices.drain(..).enumerate() {
            let sequence = self.scheduler.scheduled(entry_idx);
            let mut tokens = tokens.by_ref().take(choice.n_tokens);
            let mut token = tokens.next();
            if token.is_none() && choice.prompt_tokens.is_empty() {
                continue;
            }
            if let Some(reason) = choice.failure {
                self.failed.push((sequence.id, reason));
                tokens.for_each(drop);
                continue;
            }
            let is_first = token.is_some() && sequence.n_generated() == 0;
            let mut n_cached = if is_first { sequence.n_cached as u32 } else { 0 };
            let mut prompt_tokens = choice.prompt_tokens;
            if is_first {
                self.figures.looked_up(sequence.prompt_len, sequence.n_cached);
            }
            let Owner { stream, request_id, .. } = self.owners[&sequence.id];
            let stream = self.streams.get_mut(&stream).expect("an owner's stream is open");
            loop {
                let prompt_tokens = std::mem::take(&mut prompt_tokens);
                let n_cached = std::mem::take(&mut n_cached);
                let (end, lead_time) = (None, None);
                let event = Event { request_id, token, prompt_tokens, n_cached, end, lead_time };
                stream.events.push(event);
                token = tokens.next();
                if token.is_none() {
                    break;
                }
            }
        }
    }

    /// Ends the sequences that could not be given a token in the step just committed.
    fn end_failed(&mut self) {
        while let Some((id, reason)) = self.failed.pop() {
            let Some(&Owner { stream, request_id, .. }) = self.owners.get(&id) else { continue };
            self.scheduler.cancel(id);
            self.forget(id);
            let stream = self.streams.get_mut(&stream).expect("an owner's stream is open");
            stream.events.push(Event::ended(request_id, End::Failed { reason }));
        }
    }

    fn measure(&mut self, took: Duration) {
        let (mut n_drafts, mut n_right) = (0, 0);
        for (entry_idx, entry) in self.plan.entries.iter().enumerate() {
            let sequence = self.scheduler.scheduled(entry_idx);
            if !sequence.drafts.is_empty() {
                let n_right_here = self.chooser.choices[entry_idx].n_tokens - 1;
                self.speculation.verified(entry.slot, sequence, n_right_here);
                n_drafts += sequence.drafts.len();
                n_right += n_right_here;
            }
        }
        if n_drafts > 0 {
            self.speculation.observe(self.plan.entries.len(), n_drafts, took);
            self.figures.speculated(n_drafts as u64, n_right as u64);
            return;
        }
        // One token is a decode, or as cheap as one.
        let n_decodes = self.plan.entries.iter().filter(|entry| entry.n_tokens == 1).count();
        self.pace.observe(n_decodes, self.plan.tokens.len() - n_decodes, took);
    }

    /// Heartbeat if due; then waits a little for a command, watching the peers.
    fn idle(&mut self) -> Result<Option<Command>, Error> {
        if self.last_plan.elapsed() >= HEARTBEAT {
            self.plan.clear();
            self.rank.lead(&mut self.plan)?;
            self.last_plan = Instant::now();
        }
        self.rank.mesh_mut().check()?;
        Ok(self.commands.recv_timeout(IDLE_SLICE).ok())
    }

    /// Sends what there is to say. Never waits: a reader that lags too far loses its stream.
    fn flush(&mut self) {
        let load = self.load();
        self.figures.set_load(load);
        let mut ended = Vec::new();
        for (&stream_id, stream) in &mut self.streams {
            if stream.events.is_empty() {
                continue;
            }
            // The one allocation a message costs: the reader keeps the events. Steps with drafts
            // bring sometimes fewer and sometimes more of them.
            let most = stream.events.capacity().min(self.rank.limits().max_sample_rows);
            let room = Vec::with_capacity(most.max(stream.events.len()));
            let output = StepOutput { events: std::mem::replace(&mut stream.events, room), load };
            match stream.sink.outputs.try_send(output) {
                Ok(()) => {}
                Err(TrySendError::Full(_)) => {
                    let n_outputs = stream.sink.outputs.max_capacity();
                    ended.push((stream_id, Some(StreamEnd::Slow { n_outputs })));
                }
                Err(TrySendError::Closed(_)) => ended.push((stream_id, None)),
            }
        }
        for (stream, reason) in ended {
            self.end_stream(stream, reason);
        }
    }

    fn drop_closed_streams(&mut self) {
        let is_closed = |stream: &Stream| stream.sink.outputs.is_closed();
        while let Some(id) = self.streams.iter().find(|(_, s)| is_closed(s)).map(|(&id, _)| id) {
            self.end_stream(id, None);
        }
    }

    /// Cancels the sequences of a stream and lets go of it.
    fn end_stream(&mut self, stream: StreamId, reason: Option<StreamEnd>) {
        let Some(stream) = self.streams.remove(&stream) else { return };
        for id in stream.live.into_values() {
            self.scheduler.cancel(id);
            self.chooser.forget(id);
            self.traces.ended(id);
            self.owners.remove(&id);
        }
        if let Some(reason) = reason {
            // Before the sender is dropped, so that whoever sees the end finds the reason.
            let _ = stream.sink.end.set(reason);
        }
    }

    fn forget(&mut self, id: SequenceId) {
        self.chooser.forget(id);
        self.traces.ended(id);
        if let Some(Owner { stream, request_id, .. }) = self.owners.remove(&id)
            && let Some(stream) = self.streams.get_mut(&stream)
        {
            stream.live.remove(&request_id);
        }
    }

    fn load(&self) -> Load {
        Load {
            n_running: self.scheduler.n_running() as u32,
            n_waiting: self.scheduler.n_waiting() as u32,
            kv_blocks_free: self.scheduler.kv().n_available(),
            kv_blocks_cached: self.scheduler.kv().n_cached(),
            kv_blocks_total: self.scheduler.kv().n_total(),
        }
    }
}
