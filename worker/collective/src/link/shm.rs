//! Two rings in a file under /dev/shm: the peer is another process of this host.
//!
//! The file has a random name and mode 0600, and loses its name as soon as both sides have mapped
//! it. The socket over which the two met stays open beside the rings: one byte on it wakes a
//! sleeper, and its end tells that the peer's process is gone, even by kill -9.

use super::local::RingPair;
use super::mapping::Mapping;
use super::{Fault, Link, State, Wants};
use crate::poll;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Arc;

const DIRECTORY: &str = "/dev/shm";
const PREFIX: &str = "evener-";
const KEY_BYTES: usize = 16;
const RINGS_AT: usize = 128; // the key lies before them

/// What the other side needs to find the memory; travels over the socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Offer {
    pub name: String,
    pub key: [u8; KEY_BYTES],
    pub capacity: usize, // of each ring: bytes, a power of two
}

/// The named file, until both sides have mapped it.
pub(crate) struct Offered {
    pub offer: Offer,
    mapping: Arc<Mapping>,
    _name: Name,
}

/// Takes the file's name back when dropped.
struct Name(PathBuf);

impl Drop for Name {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

pub(crate) fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn file_bytes(capacity: usize) -> usize {
    RINGS_AT + RingPair::bytes(capacity)
}

/// Makes the memory and names it.
pub(crate) fn offer(capacity: usize) -> io::Result<Offered> {
    let key = random::<KEY_BYTES>()?;
    let name = format!("{PREFIX}{:032x}", u128::from_le_bytes(random()?));
    let path = PathBuf::from(DIRECTORY).join(&name);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&path)?;
    let _name = Name(path);
    file.write_all(&key)?;
    // Written, not only sized: a full /dev/shm is an error here, not a SIGBUS in the middle of a
    // step.
    io::copy(&mut io::repeat(0).take((file_bytes(capacity) - KEY_BYTES) as u64), &mut file)?;
    let mapping = Arc::new(Mapping::of_file(&file, file_bytes(capacity))?);
    Ok(Offered { offer: Offer { name, key, capacity }, mapping, _name })
}

/// Maps what a peer offers, if it is what it says.
pub(crate) fn open(offer: &Offer) -> io::Result<Arc<Mapping>> {
    let refuse = |why: &str| Err(io::Error::new(io::ErrorKind::InvalidData, why));
    let is_ours = offer.name.strip_prefix(PREFIX);
    if !is_ours.is_some_and(|rest| rest.bytes().all(|byte| byte.is_ascii_alphanumeric())) {
        return refuse("the name offered is not one of ours");
    }
    if !offer.capacity.is_power_of_two() || offer.capacity > 1 << 30 {
        return refuse("the capacity offered is no power of two up to 1 GiB");
    }
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(PathBuf::from(DIRECTORY).join(&offer.name))?;
    let metadata = file.metadata()?;
    if !metadata.is_file() || metadata.size() != file_bytes(offer.capacity) as u64 {
        return refuse("the file offered has another size");
    }
    let mut key = [0; KEY_BYTES];
    file.read_exact(&mut key)?;
    if key != offer.key {
        return refuse("the file offered holds another key");
    }
    Ok(Arc::new(Mapping::of_file(&file, file_bytes(offer.capacity))?))
}

impl Offered {
    /// The peer has mapped it: the name goes, the link stands.
    pub fn into_link(self, socket: TcpStream) -> io::Result<Box<dyn Link>> {
        link(&self.mapping, self.offer.capacity, true, socket)
    }
}

pub(crate) fn opened_link(
    mapping: &Arc<Mapping>,
    capacity: usize,
    socket: TcpStream,
) -> io::Result<Box<dyn Link>> {
    link(mapping, capacity, false, socket)
}

fn link(
    mapping: &Arc<Mapping>,
    capacity: usize,
    first: bool,
    socket: TcpStream,
) -> io::Result<Box<dyn Link>> {
    socket.set_nonblocking(true)?;
    socket.set_nodelay(true)?;
    let rings = RingPair::at(mapping, RINGS_AT, capacity, first);
    Ok(Box::new(Shm { rings, socket, is_gone: false }))
}

struct Shm {
    rings: RingPair,
    socket: TcpStream,
    is_gone: bool, // the socket has ended
}

impl Shm {
    fn wake_peer(&self) {
        // A full socket buffer means that it has been woken often enough; an end is seen by
        // reading.
        let _ = (&self.socket).write(&[1]);
    }

    /// Reads away wake-ups, and sees the end.
    fn drain(&mut self) {
        let mut wakes = [0; 64];
        match (&self.socket).read(&mut wakes) {
            Ok(0) => self.is_gone = true,
            Ok(_) => {}
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => {}
                _ => self.is_gone = true,
            },
        }
    }
}

impl Link for Shm {
    fn kind(&self) -> &'static str {
        "shm"
    }

    fn try_send(&mut self, first: &[u8], second: &[u8]) -> Result<usize, Fault> {
        if self.is_gone {
            return Err(Fault::Gone);
        }
        let moved = self.rings.tx.push(first, second)?;
        if moved.wake {
            self.wake_peer();
        }
        Ok(moved.n)
    }

    fn try_recv(&mut self, first: &mut [u8], second: &mut [u8]) -> Result<usize, Fault> {
        let moved = self.rings.rx.pop(first, second)?;
        if moved.wake {
            self.wake_peer();
        }
        if moved.n == 0 && self.is_gone {
            return Err(Fault::Gone);
        }
        Ok(moved.n)
    }

    fn arm(&mut self, wants: Wants) -> bool {
        self.rings.arm(wants) || self.is_gone
    }

    fn disarm(&mut self) {
        self.rings.disarm();
    }

    fn watch(&self, _: Wants) -> Option<libc::pollfd> {
        Some(poll::watch(self.socket.as_raw_fd(), poll::POLLIN | poll::POLLRDHUP))
    }

    fn woken(&mut self, revents: i16) {
        if revents != 0 {
            self.drain();
        }
    }

    fn state(&mut self) -> State {
        self.drain();
        let State { is_closed, has_bytes } = self.rings.rx.state();
        State { is_closed: is_closed || self.is_gone, has_bytes }
    }

    fn close(&mut self) {
        self.rings.close();
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

impl Drop for Shm {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_offered_is_opened() {
        let offered = offer(4096).unwrap();
        let good = offered.offer.clone();
        assert!(open(&good).is_ok());
        let bad = [
            Offer { key: [0; KEY_BYTES], ..good.clone() },
            Offer { capacity: 8192, ..good.clone() },
            Offer { capacity: 4095, ..good.clone() },
            Offer { name: "../../etc/passwd".into(), ..good.clone() },
            Offer { name: format!("{PREFIX}../x"), ..good.clone() },
            Offer { name: format!("{PREFIX}0000"), ..good.clone() },
        ];
        for offer in bad {
            assert!(open(&offer).is_err(), "{offer:?}");
        }
        drop(offered);
        assert!(open(&good).is_err(), "the name is gone");
    }
}
