//! One exchange: a message to some peers and one from some peers, all links moving together.
//!
//! Sending and receiving progress in one loop, so that large messages in both directions cannot
//! lock each other out of small rings. The algorithms in `mesh` are built of exchanges.

use crate::header::{Expect, Head};
use crate::link::{Fault, Link, Wants};
use crate::poll::{self, pollfd};
use crate::{AbortHandle, Error, Options, Stats};
use std::time::{Duration, Instant};

/// A wait spins this long, unless ranks outnumber cores: longer than a lead takes between two steps.
/// Then it yields the core, and at last it sleeps.
const SPIN: Duration = Duration::from_micros(200);
const YIELD: Duration = Duration::from_millis(2);
/// A sleep is cut into slices: whatever a wake-up might miss is found within one.
const SLICE: Duration = Duration::from_millis(20);

/// Where the bytes to send lie.
pub(crate) trait Outbox {
    /// Payload bytes for `peer`; none if it is sent nothing, not even a header.
    fn len(&self, peer: usize) -> Option<usize>;

    /// Payload from byte `done` on, as far as it lies in one run; not empty before the end.
    fn payload(&self, peer: usize, done: usize) -> &[u8];
}

/// Where received bytes go.
pub(crate) trait Inbox {
    fn expect(&self, peer: usize) -> Expect;

    /// The length of a payload that was expected `AtMost`, before its first byte.
    fn begin(&mut self, _peer: usize, _len: usize) {}

    /// Where the payload from byte `done` on goes, to its end.
    fn space(&mut self, peer: usize, done: usize) -> &mut [u8];
}

/// Until when, and from when on until when.
pub(crate) struct Limit {
    pub deadline: Instant,
    /// From the first byte moved on, this long instead.
    pub once_begun: Option<Duration>,
}

/// One peer's link, and how far the running exchange has come with it.
struct Edge {
    peer: usize,
    link: Box<dyn Link>,
    out_header: [u8; Head::BYTES],
    out_total: usize, // with header; 0: nothing to send
    out_done: usize,
    in_header: [u8; Head::BYTES],
    in_expect: Expect,
    in_total: usize, // with header; known once the header is there or the length was
    in_done: usize,
    in_begun: bool,     // the header is there and right
    is_unwatched: bool, // has ended in order: nothing on it would end a sleep
}

/// All links of a rank.
pub(crate) struct Fabric {
    rank: usize,
    edges: Vec<Edge>, // by peer rank, without our own
    options: Options,
    abort: AbortHandle,
    fds: Vec<pollfd>,
    pub stats: Stats,
}

impl Fabric {
    /// `links` by peer rank; none at `rank`, and only there.
    pub fn new(
        rank: usize,
        links: Vec<Option<Box<dyn Link>>>,
        options: Options,
        abort: AbortHandle,
    ) -> Self {
        let edges: Vec<Edge> = links
            .into_iter()
            .enumerate()
            .filter_map(|(peer, link)| Some(Edge::new(peer, link?)))
            .collect();
        let fds = Vec::with_capacity(edges.len() + 1);
        Self { rank, edges, options, abort, fds, stats: Stats::default() }
    }

    pub fn options(&self) -> &Options {
        &self.options
    }

    pub fn options_mut(&mut self) -> &mut Options {
        &mut self.options
    }

    pub fn abort(&self) -> &AbortHandle {
        &self.abort
    }

    pub fn kinds(&self) -> impl Iterator<Item = (usize, &'static str)> {
        self.edges.iter().map(|edge| (edge.peer, edge.link.kind()))
    }

    pub fn close(&mut self) {
        self.edges.iter_mut().for_each(|edge| edge.link.close());
    }

    /// Takes leave of the peers, as far as their links have room for it.
    pub fn leave(&mut self) {
        for edge in &mut self.edges {
            let _ = edge.link.try_send(&Head::bye(), &[]);
        }
        self.close();
    }

    /// Between operations: whether all peers are there.
    pub fn check_peers(&mut self) -> Result<(), Error> {
        match self
            .edges
            .iter_mut()
            .find_map(|edge| edge.link.state().is_closed.then_some(edge.peer))
        {
            Some(peer) => Err(lost(peer, &Fault::Closed)),
            None => Ok(()),
        }
    }

    /// Sends and receives until all is done, or fails by the first error or the limit.
    pub fn exchange(
        &mut self,
        head: &Head,
        outbox: &impl Outbox,
        inbox: &mut impl Inbox,
        limit: Limit,
    ) -> Result<(), Error> {
        for edge in &mut self.edges {
            edge.start(self.rank, head, outbox, inbox);
        }
        let mut wait = Wait { began: Instant::now(), idle_since: None, limit };
        loop {
            let mut n_moved = 0;
            let mut is_done = true;
            for edge in &mut self.edges {
                let sent = edge.send(outbox)?;
                let received = edge.receive(head, inbox)?;
                self.stats.bytes_sent += sent as u64;
                self.stats.bytes_received += received as u64;
                n_moved += sent + received;
                is_done &= edge.wants() == NOTHING;
            }
            if is_done {
                self.stats.waited += wait.resume();
                return Ok(());
            }
            if n_moved > 0 {
                self.stats.waited += wait.resume();
            } else {
                self.pause(head, &mut wait)?;
            }
        }
    }

    /// Nothing moved: waits a little, in the way that fits how long this lasts already.
    fn pause(&mut self, head: &Head, wait: &mut Wait) -> Result<(), Error> {
        self.abort.check()?;
        let now = Instant::now();
        let idle = now - *wait.idle_since.get_or_insert(now);
        if now >= wait.limit.deadline {
            let late = self.edges.iter().filter(|edge| edge.wants() != NOTHING);
            return Err(Error::Timeout {
                kind: head.kind,
                tag: head.tag,
                waited: now - wait.began,
                peers: late.map(|edge| edge.peer).collect(),
            });
        }
        if self.options.spin && idle < SPIN {
            std::hint::spin_loop();
        } else if idle < YIELD {
            std::thread::yield_now();
        } else {
            self.check_bystanders()?;
            self.park(SLICE.min(wait.limit.deadline - now));
        }
        Ok(())
    }

    /// Peers that the running operation wants nothing more of, but that fail while it waits for
    /// others: those may wait for them. A peer that has left something to be read has not failed,
    /// or is ahead.
    fn check_bystanders(&mut self) -> Result<(), Error> {
        for edge in &mut self.edges {
            edge.is_unwatched = false;
            if edge.wants() == NOTHING {
                let state = edge.link.state();
                if state.is_closed && !state.has_bytes {
                    return Err(lost(edge.peer, &Fault::Closed));
                }
                edge.is_unwatched = state.is_closed;
            }
        }
        Ok(())
    }

    /// Sleeps until a wanted link moves or ends, somebody aborts, or the time is over.
    fn park(&mut self, at_most: Duration) {
        self.stats.n_parks += 1;
        let mut is_ready = false;
        for edge in self.edges.iter_mut().filter(|edge| edge.wants() != NOTHING) {
            is_ready |= edge.link.arm(edge.wants());
        }
        if !is_ready {
            self.sleep(at_most);
        }
        for edge in self.edges.iter_mut().filter(|edge| edge.wants() != NOTHING) {
            edge.link.disarm();
        }
    }

    fn sleep(&mut self, at_most: Duration) {
        let watched = |edge: &&mut Edge| !edge.is_unwatched;
        self.fds.clear();
        self.fds.push(poll::watch(self.abort.bell().fd(), poll::POLLIN));
        for edge in self.edges.iter_mut().filter(watched) {
            self.fds.extend(edge.link.watch(edge.wants()));
        }
        poll::poll(&mut self.fds, at_most);
        if self.fds[0].revents != 0 {
            self.abort.bell().hush();
        }
        let mut polled = self.fds[1..].iter();
        for edge in self.edges.iter_mut().filter(watched) {
            if edge.link.watch(edge.wants()).is_some() {
                let fd = polled.next().expect("the same edges were watched just now");
                edge.link.woken(fd.revents);
            }
        }
    }
}

const NOTHING: Wants = Wants { send: false, recv: false };

fn lost(peer: usize, fault: &dyn std::fmt::Display) -> Error {
    Error::PeerLost { peer, detail: fault.to_string() }
}

struct Wait {
    began: Instant,
    idle_since: Option<Instant>,
    limit: Limit,
}

impl Wait {
    /// Bytes moved: returns how long none had.
    fn resume(&mut self) -> Duration {
        if let Some(within) = self.limit.once_begun.take() {
            self.limit.deadline = Instant::now() + within;
        }
        self.idle_since.take().map_or(Duration::ZERO, |since| since.elapsed())
    }
}

impl Edge {
    fn new(peer: usize, link: Box<dyn Link>) -> Self {
        Self {
            peer,
            link,
            out_header: [0; Head::BYTES],
            out_total: 0,
            out_done: 0,
            in_header: [0; Head::BYTES],
            in_expect: Expect::Nothing,
            in_total: 0,
            in_done: 0,
            in_begun: false,
            is_unwatched: false,
        }
    }

    fn start(&mut self, rank: usize, head: &Head, outbox: &impl Outbox, inbox: &impl Inbox) {
        let out_len = outbox.len(self.peer);
        self.out_total = out_len.map_or(0, |len| Head::BYTES + len);
        self.out_header = head.encode(rank, out_len.unwrap_or(0));
        self.out_done = 0;
        self.in_expect = inbox.expect(self.peer);
        self.in_total = match self.in_expect {
            Expect::Nothing => 0,
            Expect::Exactly(len) => Head::BYTES + len,
            Expect::AtMost { .. } => Head::BYTES,
        };
        self.in_done = 0;
        self.in_begun = false;
    }

    fn wants(&self) -> Wants {
        Wants { send: self.out_done < self.out_total, recv: self.in_done < self.in_total }
    }

    /// Returns the bytes sent now.
    fn send(&mut self, outbox: &impl Outbox) -> Result<usize, Error> {
        let before = self.out_done;
        while self.out_done < self.out_total {
            let header = &self.out_header[self.out_done.min(Head::BYTES)..];
            let done = self.out_done.saturating_sub(Head::BYTES);
            let payload = outbox.payload(self.peer, done);
            let sent = self.link.try_send(header, payload);
            let sent = sent.map_err(|fault| lost(self.peer, &fault))?;
            if sent == 0 {
                break;
            }
            self.out_done += sent;
        }
        Ok(self.out_done - before)
    }

    /// Returns the bytes received now. The header is checked as soon as it is there; where the
    /// length is fixed, the payload may come in with it.
    fn receive(&mut self, head: &Head, inbox: &mut impl Inbox) -> Result<usize, Error> {
        let before = self.in_done;
        while self.in_done < self.in_total {
            let header = &mut self.in_header[self.in_done.min(Head::BYTES)..];
            let done = self.in_done.saturating_sub(Head::BYTES);
            let space = if self.in_total > Head::BYTES {
                inbox.space(self.peer, done)
            } else {
                Default::default()
            };
            let received = self.link.try_recv(header, space);
            let received = received.map_err(|fault| lost(self.peer, &fault))?;
            if received == 0 {
                break;
            }
            self.in_done += received;
            if !self.in_begun && self.in_done >= Head::BYTES {
                self.in_begun = true;
                let len = head.check(&self.in_header, self.peer, self.in_expect)?;
                if let Expect::AtMost { .. } = self.in_expect {
                    inbox.begin(self.peer, len);
                    self.in_total = Head::BYTES + len;
                }
            }
        }
        Ok(self.in_done - before)
    }
}
