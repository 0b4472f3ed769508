//! Where peers that are other processes arrive: one listener a worker, for all its epochs.
//!
//! A thread accepts, reads hellos, and keeps those that come before their epoch's `connect` asks
//! for them, boundedly many and for a bounded time. Epochs older than the newest asked for are
//! refused.

use crate::abort::Bell;
use crate::hello::{Bad, Frame, FrameReader, Hello, Refusal};
use crate::poll;
use crate::{AbortHandle, Error};
use std::io::{ErrorKind, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

const HELLO_TIMEOUT: Duration = Duration::from_secs(2);
const KEPT_FOR: Duration = Duration::from_secs(30);
const MAX_UNHEARD: usize = 128; // sockets whose hello is not complete
const MAX_KEPT: usize = 128; // hellos nobody has asked for yet
const SLICE: Duration = Duration::from_millis(20);

/// Owns the listener and its thread; both end with it. Meshes live on.
#[derive(Debug)]
pub struct Rendezvous {
    shared: Arc<Shared>,
    local_addr: SocketAddr,
    thread: Option<JoinHandle<()>>,
}

/// A peer that has said hello and waits for an answer.
#[derive(Debug)]
pub(crate) struct Arrival {
    pub hello: Hello,
    pub socket: TcpStream, // non-blocking
    since: Instant,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    has_changed: Condvar,
    bell: Bell,
    is_over: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    newest: Option<u64>, // epoch asked for
    kept: Vec<Arrival>,
}

impl Rendezvous {
    /// Listens on exactly this address; port 0 takes a free one.
    pub fn bind(addr: SocketAddr) -> Result<Self, Error> {
        let listen = || -> std::io::Result<(TcpListener, SocketAddr)> {
            let listener = TcpListener::bind(addr)?;
            listener.set_nonblocking(true)?;
            let local_addr = listener.local_addr()?;
            Ok((listener, local_addr))
        };
        let (listener, local_addr) = listen().map_err(|error| Error::Os {
            what: "listening for peers",
            detail: format!("{addr}: {error}"),
        })?;
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            has_changed: Condvar::new(),
            bell: Bell::new()?,
            is_over: AtomicBool::new(false),
        });
        let acceptor = Acceptor { listener, shared: shared.clone(), unheard: Vec::new() };
        let thread = thread::Builder::new()
            .name("rendezvous".into())
            .spawn(move || acceptor.run())
            .map_err(|error| Error::os("starting the rendezvous thread", &error))?;
        Ok(Self { shared, local_addr, thread: Some(thread) })
    }

    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// From now on `epoch` is the newest, and older ones are refused.
    pub(crate) fn ask_for(&self, epoch: u64) -> Result<(), Error> {
        let mut state = self.shared.lock();
        if let Some(newest) = state.newest.filter(|&newest| newest > epoch) {
            return Err(Error::EpochOver { epoch, newest });
        }
        state.newest = Some(epoch);
        for over in state.kept.extract_if(.., |arrival| arrival.hello.epoch < epoch) {
            over.refuse(false, &over_reason(over.hello.epoch, epoch));
        }
        Ok(())
    }

    /// The next arrival for `epoch`; none at the deadline.
    pub(crate) fn next_arrival(
        &self,
        epoch: u64,
        deadline: Instant,
        abort: &AbortHandle,
    ) -> Result<Option<Arrival>, Error> {
        let mut state = self.shared.lock();
        loop {
            abort.check()?;
            if let Some(newest) = state.newest.filter(|&newest| newest > epoch) {
                return Err(Error::EpochOver { epoch, newest });
            }
            state.kept.retain(|arrival| !arrival.is_stale());
            if let Some(at) = state.kept.iter().position(|arrival| arrival.hello.epoch == epoch) {
                return Ok(Some(state.kept.remove(at)));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let woken = self.shared.has_changed.wait_timeout(state, left.min(SLICE));
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for Rendezvous {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::Release);
        self.shared.bell.ring();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Arrival {
    pub fn refuse(&self, may_retry: bool, reason: &str) {
        refuse(&self.socket, may_retry, reason);
    }

    /// The dialler has given up, or sent what it should not have sent yet.
    fn is_stale(&self) -> bool {
        !matches!(self.socket.peek(&mut [0]), Err(error) if error.kind() == ErrorKind::WouldBlock)
    }
}

fn over_reason(epoch: u64, newest: u64) -> String {
    format!("epoch {epoch} is over: epoch {newest} was asked for")
}

/// One small frame fits into any fresh socket's buffer; a dialler that is gone needs no answer.
fn refuse(mut socket: &TcpStream, may_retry: bool, reason: &str) {
    let refusal = Refusal { may_retry, reason: reason.to_owned() };
    let _ = socket.write(&Frame::Refuse(refusal).encode());
}

/// The thread behind the listener.
struct Acceptor {
    listener: TcpListener,
    shared: Arc<Shared>,
    unheard: Vec<Unheard>,
}

/// A socket that has not said hello.
struct Unheard {
    socket: TcpStream,
    reader: FrameReader,
    since: Instant,
}

impl Acceptor {
    fn run(mut self) {
        let mut fds = Vec::new();
        loop {
            fds.clear();
            fds.push(poll::watch(self.shared.bell.fd(), poll::POLLIN));
            fds.push(poll::watch(self.listener.as_raw_fd(), poll::POLLIN));
            let sockets = self.unheard.iter().map(|one| one.socket.as_raw_fd());
            fds.extend(sockets.map(|fd| poll::watch(fd, poll::POLLIN)));
            poll::poll(&mut fds, Duration::from_millis(250));
            if self.shared.is_over.load(Ordering::Acquire) {
                return;
            }
            self.accept();
            self.hear();
            self.prune();
        }
    }

    fn accept(&mut self) {
        loop {
            match self.listener.accept() {
                Ok((socket, _)) => {
                    if self.unheard.len() < MAX_UNHEARD && socket.set_nonblocking(true).is_ok() {
                        let reader = FrameReader::default();
                        self.unheard.push(Unheard { socket, reader, since: Instant::now() });
                    }
                }
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock => return,
                    ErrorKind::Interrupted | ErrorKind::ConnectionAborted => {}
                    // Out of descriptors or memory: the listener stays readable, so do not spin.
                    _ => {
                        let bell = poll::watch(self.shared.bell.fd(), poll::POLLIN);
                        return poll::poll(&mut [bell], Duration::from_millis(50));
                    }
                },
            }
        }
    }

    fn hear(&mut self) {
        for mut one in std::mem::take(&mut self.unheard) {
            match one.reader.read(&one.socket) {
                Ok(None) if one.since.elapsed() < HELLO_TIMEOUT => self.unheard.push(one),
                Ok(Some(Frame::Hello(hello))) => self.keep(hello, one.socket),
                Err(bad @ Bad::Version { .. }) => refuse(&one.socket, false, &bad.to_string()),
                // Late or not a hello: dropped, and with it closed.
                Ok(None | Some(_)) | Err(Bad::Garbage(_) | Bad::Ended | Bad::Io(_)) => {}
            }
        }
    }

    fn keep(&self, hello: Hello, socket: TcpStream) {
        let arrival = Arrival { hello, socket, since: Instant::now() };
        let mut state = self.shared.lock();
        let epoch = arrival.hello.epoch;
        if let Some(newest) = state.newest.filter(|&newest| newest > epoch) {
            arrival.refuse(false, &over_reason(epoch, newest));
        } else if state.kept.len() >= MAX_KEPT {
            arrival.refuse(true, "too many peers wait here already");
        } else {
            state.kept.push(arrival);
            self.shared.has_changed.notify_all();
        }
    }

    fn prune(&self) {
        let mut state = self.shared.lock();
        state.kept.retain(|arrival| !arrival.is_stale());
        for late in state.kept.extract_if(.., |arrival| arrival.since.elapsed() > KEPT_FOR) {
            let epoch = late.hello.epoch;
            late.refuse(true, &format!("nobody here has joined epoch {epoch} yet"));
        }
    }
}
