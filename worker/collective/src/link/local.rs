//! Two rings in this process's memory: the peer is another thread. Wakes by the peer's bell.

use super::mapping::Mapping;
use super::ring::{self, Reader, Writer};
use super::{Fault, Link, State, Wants};
use crate::abort::Bell;
use std::sync::Arc;

/// Both directions over one mapping, without a way to wake: shared by `local` and `shm`.
pub(super) struct RingPair {
    pub tx: Writer,
    pub rx: Reader,
}

impl RingPair {
    /// The two rings lie one after the other from `offset`. The sides differ in `first`: who writes
    /// to the first ring.
    pub fn at(mapping: &Arc<Mapping>, offset: usize, capacity: usize, first: bool) -> Self {
        let second_offset = offset + ring::region_bytes(capacity);
        let (tx, rx) = if first { (offset, second_offset) } else { (second_offset, offset) };
        Self { tx: Writer::at(mapping, tx, capacity), rx: Reader::at(mapping, rx, capacity) }
    }

    pub const fn bytes(capacity: usize) -> usize {
        2 * ring::region_bytes(capacity)
    }

    pub fn arm(&mut self, wants: Wants) -> bool {
        (wants.recv && self.rx.arm()) | (wants.send && self.tx.arm())
    }

    pub fn disarm(&mut self) {
        self.rx.disarm();
        self.tx.disarm();
    }

    pub fn close(&mut self) {
        self.tx.close();
        self.rx.close();
    }
}

struct Local {
    rings: RingPair,
    peer: Arc<Bell>,
}

/// The two ends of a link between threads whose meshes have these bells.
pub(crate) fn pair(
    capacity: usize,
    bells: [&Arc<Bell>; 2],
) -> std::io::Result<(Box<dyn Link>, Box<dyn Link>)> {
    let mapping = Arc::new(Mapping::anonymous(RingPair::bytes(capacity))?);
    let end = |first: bool| {
        let rings = RingPair::at(&mapping, 0, capacity, first);
        Box::new(Local { rings, peer: bells[usize::from(first)].clone() })
    };
    Ok((end(true), end(false)))
}

impl Link for Local {
    fn kind(&self) -> &'static str {
        "local"
    }

    fn try_send(&mut self, first: &[u8], second: &[u8]) -> Result<usize, Fault> {
        let moved = self.rings.tx.push(first, second)?;
        if moved.wake {
            self.peer.ring();
        }
        Ok(moved.n)
    }

    fn try_recv(&mut self, first: &mut [u8], second: &mut [u8]) -> Result<usize, Fault> {
        let moved = self.rings.rx.pop(first, second)?;
        if moved.wake {
            self.peer.ring();
        }
        Ok(moved.n)
    }

    fn arm(&mut self, wants: Wants) -> bool {
        self.rings.arm(wants)
    }

    fn disarm(&mut self) {
        self.rings.disarm();
    }

    fn watch(&self, _: Wants) -> Option<libc::pollfd> {
        None
    }

    fn woken(&mut self, _: i16) {}

    fn state(&mut self) -> State {
        self.rings.rx.state()
    }

    fn close(&mut self) {
        self.rings.close();
        self.peer.ring();
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        self.close();
    }
}
