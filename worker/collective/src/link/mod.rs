//! A link: a non-blocking full-duplex byte stream to one peer. It knows nothing of messages.
//!
//! `local` and `shm` are two rings in memory, `tcp` is a socket. All sleeping is done by the mesh,
//! over all links at once: before it, each link is armed, so that the peer wakes us when bytes
//! move.

pub(crate) mod local;
mod mapping;
mod ring;
pub(crate) mod shm;
pub(crate) mod tcp;

/// Which directions have something left to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wants {
    pub send: bool,
    pub recv: bool,
}

/// What can be seen of the peer without reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct State {
    pub is_closed: bool,
    /// Bytes are there to be read; they arrived before any close.
    pub has_bytes: bool,
}

/// Why a link is of no more use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fault {
    #[error("the link was closed")]
    Closed,
    #[error("the process behind it is gone")]
    Gone,
    #[error("ring counters make no sense: {head} written, {tail} read, capacity {capacity}")]
    Corrupt { head: u64, tail: u64, capacity: u64 },
    #[error("{0}")]
    Io(#[from] std::io::Error),
}

pub(crate) trait Link: Send {
    /// "local", "shm" or "tcp".
    fn kind(&self) -> &'static str;

    /// Takes from `first`, then from `second`, what fits now. A closed link is an error at once.
    fn try_send(&mut self, first: &[u8], second: &[u8]) -> Result<usize, Fault>;

    /// Fills `first`, then `second`, with what is there now. Bytes sent before a close still
    /// arrive.
    fn try_recv(&mut self, first: &mut [u8], second: &mut [u8]) -> Result<usize, Fault>;

    /// Asks the peer to wake us. True if something wanted can already be done.
    fn arm(&mut self, wants: Wants) -> bool;

    fn disarm(&mut self);

    /// What to poll while asleep; none if the mesh's own bell is rung.
    fn watch(&self, wants: Wants) -> Option<libc::pollfd>;

    /// What poll found on it.
    fn woken(&mut self, revents: i16);

    /// Looks at the link without moving bytes.
    fn state(&mut self) -> State;

    /// The peer finds the link closed. Closing twice is harmless.
    fn close(&mut self);
}
