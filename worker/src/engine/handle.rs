//! How others speak to a lead: bounded commands in, a bounded channel of outputs per stream out.
//!
//! Nothing here waits, so the engine thread and async callers can share it. Dropping the
//! [`Outputs`] of a stream cancels its sequences.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use tokio::sync::mpsc;

use super::output::{StepOutput, StreamEnd};
use super::sequence::Spec;

/// Commands that may wait for the lead to look; it does after every step.
const MAX_COMMANDS: usize = 1024;

/// Names a stream within an engine's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct StreamId(u64);

#[derive(Debug)]
pub(super) enum Command {
    Open { stream: StreamId, sink: Sink },
    Submit { stream: StreamId, request_id: u64, spec: Box<Spec>, arrived: Instant },
    Cancel { stream: StreamId, request_id: u64 },
    Leave,
}

/// The lead's end of a stream.
#[derive(Debug)]
pub(super) struct Sink {
    pub outputs: mpsc::Sender<StepOutput>,
    pub end: Arc<OnceLock<StreamEnd>>,
}

/// A lead, as seen from elsewhere. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Handle {
    commands: SyncSender<Command>,
    next_stream: Arc<AtomicU64>,
}

/// Why a command did not reach the lead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("{MAX_COMMANDS} commands wait for the lead already; try again later")]
    Busy,
    #[error("the epoch is over")]
    Over,
}

pub(super) fn channel() -> (Handle, Receiver<Command>) {
    let (commands, receiver) = sync_channel(MAX_COMMANDS);
    (Handle { commands, next_stream: Arc::default() }, receiver)
}

impl Handle {
    /// Opens a stream that holds up to `n_outputs` messages not yet read. A reader that falls
    /// further behind is cut off.
    ///
    /// # Errors
    /// The lead is gone or drowned.
    pub fn open(&self, n_outputs: usize) -> Result<(Requests, Outputs), Error> {
        let stream = StreamId(self.next_stream.fetch_add(1, Ordering::Relaxed));
        let (outputs, receiver) = mpsc::channel(n_outputs);
        let end = Arc::new(OnceLock::new());
        self.send(Command::Open { stream, sink: Sink { outputs, end: Arc::clone(&end) } })?;
        Ok((Requests { handle: self.clone(), stream }, Outputs { receiver, end }))
    }

    /// One sequence with a stream of its own; its events have request id 0.
    ///
    /// # Errors
    /// The lead is gone or drowned.
    pub fn submit(&self, spec: Spec, n_outputs: usize) -> Result<Outputs, Error> {
        let (requests, outputs) = self.open(n_outputs)?;
        requests.submit(0, spec)?;
        Ok(outputs)
    }

    /// Ends the epoch on all ranks once the running step is done.
    ///
    /// # Errors
    /// The lead is gone or drowned.
    pub fn leave(&self) -> Result<(), Error> {
        self.send(Command::Leave)
    }

    fn send(&self, command: Command) -> Result<(), Error> {
        self.commands.try_send(command).map_err(|error| match error {
            TrySendError::Full(_) => Error::Busy,
            TrySendError::Disconnected(_) => Error::Over,
        })
    }
}

/// The way in of a stream. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Requests {
    handle: Handle,
    stream: StreamId,
}

impl Requests {
    /// # Errors
    /// The lead is gone or drowned.
    pub fn submit(&self, request_id: u64, spec: Spec) -> Result<(), Error> {
        let (stream, spec, arrived) = (self.stream, Box::new(spec), Instant::now());
        self.handle.send(Command::Submit { stream, request_id, spec, arrived })
    }

    /// Its events stop; an id that is not live is ignored.
    ///
    /// # Errors
    /// The lead is gone or drowned.
    pub fn cancel(&self, request_id: u64) -> Result<(), Error> {
        self.handle.send(Command::Cancel { stream: self.stream, request_id })
    }
}

/// The way out of a stream.
#[derive(Debug)]
pub struct Outputs {
    receiver: mpsc::Receiver<StepOutput>,
    end: Arc<OnceLock<StreamEnd>>,
}

impl Outputs {
    /// The next message; none once the stream has ended.
    pub async fn recv(&mut self) -> Option<StepOutput> {
        self.receiver.recv().await
    }

    /// The same for a thread that may block.
    pub fn blocking_recv(&mut self) -> Option<StepOutput> {
        self.receiver.blocking_recv()
    }

    /// Why there are no more messages; meaningful after `recv` gave none.
    #[must_use]
    pub fn end(&self) -> StreamEnd {
        let unsaid = || StreamEnd::EpochOver { reason: "the lead is gone".to_owned() };
        self.end.get().cloned().unwrap_or_else(unsaid)
    }
}
