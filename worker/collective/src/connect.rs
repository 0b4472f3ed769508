//! How the ranks of an epoch find each other: rank i dials every lower rank and is dialled by every
//! higher one; each pair agrees on its transport.

use crate::hello::{Bad, Frame, FrameReader, Hello, MAX_TOKEN, Refusal};
use crate::link::{Link, shm, tcp};
use crate::poll;
use crate::rendezvous::Arrival;
use crate::{AbortHandle, Error, MAX_WORLD_SIZE, Mesh, Options, Rendezvous};
use std::io::Write;
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

const DIAL_TIMEOUT: Duration = Duration::from_millis(500);
/// For the few words after a hello was taken up: both sides are at it.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
const SLICE: Duration = Duration::from_millis(20);
const FIRST_BACKOFF: Duration = Duration::from_millis(5);
const LAST_BACKOFF: Duration = Duration::from_millis(200);

/// One rank of a group, as seen from here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// host:port of its rendezvous.
    pub address: String,
    /// Equal on two ranks of one host; empty: unknown, so shared by nobody.
    pub host_id: String,
}

/// What carries the bytes between two ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    /// Shared memory between ranks of one host, if it works; else tcp.
    #[default]
    Auto,
    Tcp,
    /// Shared memory, or fail.
    Shm,
}

/// The group to join. All ranks agree on everything but `rank`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupSpec {
    pub epoch: u64,
    pub rank: usize,
    /// Secret of this epoch.
    pub token: String,
    /// By rank, with ourselves; their number is the world size.
    pub peers: Vec<Peer>,
    pub transport: Transport,
}

impl GroupSpec {
    fn check(&self) -> Result<(), Error> {
        let bad = |what, got: usize, allowed| {
            let got = got.to_string();
            Err(Error::BadGroup { what, got, allowed })
        };
        if self.peers.is_empty() || self.peers.len() > MAX_WORLD_SIZE {
            return bad("world size", self.peers.len(), "1 to 64 are allowed");
        }
        if self.rank >= self.peers.len() {
            return bad("rank", self.rank, "it must be less than the world size");
        }
        if self.token.len() > MAX_TOKEN {
            return bad("token length", self.token.len(), "at most 256 bytes are allowed");
        }
        Ok(())
    }

    fn wants_shm(&self, peer: usize) -> bool {
        let (ours, theirs) = (&self.peers[self.rank].host_id, &self.peers[peer].host_id);
        match self.transport {
            Transport::Auto => ours == theirs && !ours.is_empty(),
            Transport::Tcp => false,
            Transport::Shm => true,
        }
    }
}

/// Why an attempt at one peer failed, and whether another may succeed.
enum Attempt {
    Again(String),
    Over(Error),
}

impl From<Bad> for Attempt {
    fn from(bad: Bad) -> Self {
        Self::Again(bad.to_string())
    }
}

impl From<std::io::Error> for Attempt {
    fn from(error: std::io::Error) -> Self {
        Self::Again(error.to_string())
    }
}

impl Rendezvous {
    /// Links this rank with all others of its epoch, by `options.join_timeout` or not at all. The
    /// mesh takes over `abort`.
    pub fn connect(
        &self,
        spec: &GroupSpec,
        options: &Options,
        abort: &AbortHandle,
    ) -> Result<Mesh, Error> {
        spec.check()?;
        self.ask_for(spec.epoch)?;
        let began = Instant::now();
        let deadline = began + options.join_timeout;
        let join = Join { spec, options, abort, began, deadline };
        let mut links: Vec<Option<Box<dyn Link>>> = spec.peers.iter().map(|_| None).collect();
        for (peer, link) in links.iter_mut().enumerate().take(spec.rank) {
            *link = Some(join.dial(peer)?);
        }
        self.admit_all(&join, &mut links)?;
        Ok(Mesh::new(spec.rank, spec.epoch, links, options.clone(), abort.clone()))
    }

    fn admit_all(&self, join: &Join<'_>, links: &mut [Option<Box<dyn Link>>]) -> Result<(), Error> {
        let mut last = "nobody else has dialled".to_owned();
        loop {
            let higher = join.spec.rank + 1..links.len();
            let missing: Vec<usize> = higher.filter(|&peer| links[peer].is_none()).collect();
            if missing.is_empty() {
                return Ok(());
            }
            let next = self.next_arrival(join.spec.epoch, join.deadline, join.abort)?;
            let Some(arrival) = next else {
                return Err(join.too_late(missing, last));
            };
            let from = arrival.hello.from;
            match join.admit(arrival, &missing) {
                Ok((peer, link)) => links[peer] = Some(link),
                Err(Attempt::Again(detail)) => last = format!("rank {from}: {detail}"),
                Err(Attempt::Over(error)) => return Err(error),
            }
        }
    }
}

/// One `connect` in progress.
struct Join<'a> {
    spec: &'a GroupSpec,
    options: &'a Options,
    abort: &'a AbortHandle,
    began: Instant,
    deadline: Instant,
}

impl Join<'_> {
    fn too_late(&self, missing: Vec<usize>, detail: String) -> Error {
        Error::JoinTimeout { epoch: self.spec.epoch, waited: self.began.elapsed(), missing, detail }
    }

    /// Until it answers: the peer may not have been asked to join yet.
    fn dial(&self, peer: usize) -> Result<Box<dyn Link>, Error> {
        let mut backoff = FIRST_BACKOFF;
        loop {
            self.abort.check()?;
            let detail = match self.dial_once(peer) {
                Ok(link) => return Ok(link),
                Err(Attempt::Over(error)) => return Err(error),
                Err(Attempt::Again(detail)) => detail,
            };
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.too_late(vec![peer], detail));
            }
            self.abort.pause(jittered(backoff).min(left));
            backoff = LAST_BACKOFF.min(backoff * 2);
        }
    }

    fn dial_once(&self, peer: usize) -> Result<Box<dyn Link>, Attempt> {
        let spec = self.spec;
        let address = &spec.peers[peer].address;
        let mut last = Attempt::Again(format!("{address} names no address"));
        let left = self.deadline.saturating_duration_since(Instant::now());
        for addr in address.to_socket_addrs()? {
            match TcpStream::connect_timeout(&addr, left.clamp(SLICE, DIAL_TIMEOUT)) {
                Ok(socket) => return self.greet(peer, socket),
                Err(error) => last = Attempt::Again(format!("{addr}: {error}")),
            }
        }
        Err(last)
    }

    /// The dialler's side of the hello.
    fn greet(&self, peer: usize, socket: TcpStream) -> Result<Box<dyn Link>, Attempt> {
        let mut talk = self.talk(socket)?;
        talk.say(&Frame::Hello(Hello {
            epoch: self.spec.epoch,
            from: self.spec.rank as u32,
            to: peer as u32,
            world_size: self.spec.peers.len() as u32,
            wants_shm: self.spec.wants_shm(peer),
            token: self.spec.token.clone(),
        }))?;
        match talk.hear(self.deadline)? {
            Frame::AcceptTcp => self.settle_for_tcp(peer, talk.socket, "it declined"),
            Frame::AcceptShm(offer) => {
                let opened = shm::open(&offer);
                talk.say(&Frame::Verdict { is_open: opened.is_ok() })?;
                match opened {
                    Ok(mapping) => Ok(shm::opened_link(&mapping, offer.capacity, talk.socket)?),
                    Err(error) => self.settle_for_tcp(peer, talk.socket, &error.to_string()),
                }
            }
            Frame::Refuse(Refusal { may_retry: true, reason }) => Err(Attempt::Again(reason)),
            Frame::Refuse(Refusal { may_retry: false, reason }) => {
                let address = self.spec.peers[peer].address.clone();
                Err(Attempt::Over(Error::Refused { peer, address, reason }))
            }
            Frame::Hello(_) | Frame::Verdict { .. } => {
                Err(Attempt::Again("it answered out of turn".into()))
            }
        }
    }

    /// The acceptor's side of the hello.
    fn admit(
        &self,
        arrival: Arrival,
        missing: &[usize],
    ) -> Result<(usize, Box<dyn Link>), Attempt> {
        if let Err(reason) = self.check_hello(&arrival.hello, missing) {
            arrival.refuse(false, &reason);
            return Err(Attempt::Again(format!("refused: {reason}")));
        }
        let peer = arrival.hello.from as usize;
        let mut talk = self.talk(arrival.socket)?;
        let detail = if !arrival.hello.wants_shm || !self.spec.wants_shm(peer) {
            talk.say(&Frame::AcceptTcp)?;
            "it declined".to_owned()
        } else {
            match shm::offer(self.options.ring_capacity()) {
                Ok(offered) => {
                    talk.say(&Frame::AcceptShm(offered.offer.clone()))?;
                    match talk.hear(self.deadline.min(Instant::now() + ANSWER_TIMEOUT))? {
                        Frame::Verdict { is_open: true } => {
                            return Ok((peer, offered.into_link(talk.socket)?));
                        }
                        Frame::Verdict { is_open: false } => "it could not open ours".to_owned(),
                        Frame::Hello(_)
                        | Frame::AcceptTcp
                        | Frame::AcceptShm(_)
                        | Frame::Refuse(_) => {
                            return Err(Attempt::Again("it answered out of turn".into()));
                        }
                    }
                }
                Err(error) => {
                    talk.say(&Frame::AcceptTcp)?;
                    error.to_string()
                }
            }
        };
        Ok((peer, self.settle_for_tcp(peer, talk.socket, &detail)?))
    }

    fn check_hello(&self, hello: &Hello, missing: &[usize]) -> Result<(), String> {
        let (rank, world_size) = (self.spec.rank, self.spec.peers.len());
        if !is_same_secret(&hello.token, &self.spec.token) {
            return Err(format!("the token is not that of epoch {}", hello.epoch));
        }
        if hello.world_size as usize != world_size {
            return Err(format!("world size {} is not ours, {world_size}", hello.world_size));
        }
        if hello.to as usize != rank {
            return Err(format!("this is rank {rank}, not {}", hello.to));
        }
        if !missing.contains(&(hello.from as usize)) {
            return Err(format!("rank {} is not awaited here", hello.from));
        }
        Ok(())
    }

    fn settle_for_tcp(
        &self,
        peer: usize,
        socket: TcpStream,
        detail: &str,
    ) -> Result<Box<dyn Link>, Attempt> {
        if self.spec.transport == Transport::Shm {
            let detail = detail.to_owned();
            return Err(Attempt::Over(Error::NoSharedMemory { peer, detail }));
        }
        Ok(tcp::link(socket, self.options.step_timeout)?)
    }

    fn talk(&self, socket: TcpStream) -> Result<Talk<'_>, Attempt> {
        socket.set_nonblocking(true)?;
        socket.set_nodelay(true)?;
        Ok(Talk { socket, reader: FrameReader::default(), abort: self.abort })
    }
}

/// The few frames before a link.
struct Talk<'a> {
    socket: TcpStream,
    reader: FrameReader,
    abort: &'a AbortHandle,
}

impl Talk<'_> {
    /// Frames are far smaller than a fresh socket's buffer.
    fn say(&mut self, frame: &Frame) -> Result<(), Attempt> {
        Ok(self.socket.write_all(&frame.encode())?)
    }

    fn hear(&mut self, deadline: Instant) -> Result<Frame, Attempt> {
        loop {
            if let Some(frame) = self.reader.read(&self.socket)? {
                return Ok(frame);
            }
            self.abort.check().map_err(Attempt::Over)?;
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Attempt::Again("it did not answer".into()));
            }
            let bell = poll::watch(self.abort.bell().fd(), poll::POLLIN);
            let socket = poll::watch(self.socket.as_raw_fd(), poll::POLLIN);
            poll::poll(&mut [bell, socket], left.min(SLICE));
        }
    }
}

/// Takes as long for any two secrets of the same length.
fn is_same_secret(one: &str, other: &str) -> bool {
    let differing = one.bytes().zip(other.bytes()).fold(0, |bits, (a, b)| bits | (a ^ b));
    one.len() == other.len() && std::hint::black_box(differing) == 0
}

/// Half to all of it, so that ranks that failed together do not try together.
fn jittered(backoff: Duration) -> Duration {
    let random = shm::random::<1>().map_or(255, |[byte]| byte);
    backoff / 2 + backoff / 2 * u32::from(random) / 255
}
