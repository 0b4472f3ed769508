//! Where the messages of each operation come from and go to, in place: no copies but those the
//! links make.

use crate::ReducePlan;
use crate::bytes;
use crate::exchange::{Inbox, Outbox};
use crate::header::Expect;
use std::ops::Range;

/// How the elements of a two-shot all-reduce are cut: in runs of whole cache lines, by rank.
#[derive(Clone, Copy)]
pub(crate) struct Slices {
    pub len: usize,
    pub world_size: usize,
}

impl Slices {
    pub fn of(self, rank: usize) -> Range<usize> {
        let step = self.len.div_ceil(self.world_size).next_multiple_of(16);
        (rank * step).min(self.len)..((rank + 1) * step).min(self.len)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum To {
    All,
    One(usize),
    Nobody,
}

/// The same bytes to whoever is sent any.
pub(crate) struct Plain<'a> {
    pub bytes: &'a [u8],
    pub to: To,
}

impl Outbox for Plain<'_> {
    fn len(&self, peer: usize) -> Option<usize> {
        let is_sent = self.to == To::All || self.to == To::One(peer);
        is_sent.then_some(self.bytes.len())
    }

    fn payload(&self, _: usize, done: usize) -> &[u8] {
        &self.bytes[done..]
    }
}

/// To each peer, its slice of each of our parts.
pub(crate) struct Columns<'a> {
    pub parts: &'a [f32], // [n_parts][slices.len]
    pub n_parts: usize,
    pub slices: Slices,
}

impl Outbox for Columns<'_> {
    fn len(&self, peer: usize) -> Option<usize> {
        let width = self.slices.of(peer).len();
        (self.n_parts > 0).then_some(self.n_parts * width * size_of::<f32>())
    }

    fn payload(&self, peer: usize, done: usize) -> &[u8] {
        let slice = self.slices.of(peer);
        let row_bytes = slice.len() * size_of::<f32>();
        if done == self.n_parts * row_bytes {
            return &[];
        }
        let (row, within) = (done / row_bytes, done % row_bytes);
        &bytes::of(&self.parts[row * self.slices.len..][slice])[within..]
    }
}

/// From each peer, as many vectors as it has parts, each `width` long.
pub(crate) struct Parts<'a> {
    pub plan: &'a ReducePlan,
    pub width: usize,
    pub received: &'a mut [f32], // [n_parts_of_all][width]
}

impl Parts<'_> {
    fn range(&self, peer: usize) -> Range<usize> {
        let parts = self.plan.part_range(peer);
        parts.start * self.width..parts.end * self.width
    }
}

impl Inbox for Parts<'_> {
    fn expect(&self, peer: usize) -> Expect {
        match self.plan.n_parts(peer) {
            0 => Expect::Nothing,
            _ => Expect::Exactly(self.range(peer).len() * size_of::<f32>()),
        }
    }

    fn space(&mut self, peer: usize, done: usize) -> &mut [u8] {
        let range = self.range(peer);
        &mut bytes::of_mut(&mut self.received[range])[done..]
    }
}

/// From each peer, its slice of the sum, around our own.
pub(crate) struct Around<'a> {
    pub before: &'a mut [f32],
    pub after: &'a mut [f32],
    pub slice: Range<usize>, // our own
    pub slices: Slices,
}

impl Inbox for Around<'_> {
    fn expect(&self, peer: usize) -> Expect {
        Expect::Exactly(self.slices.of(peer).len() * size_of::<f32>())
    }

    fn space(&mut self, peer: usize, done: usize) -> &mut [u8] {
        let range = self.slices.of(peer);
        let slice = if range.start < self.slice.start {
            &mut self.before[range]
        } else {
            &mut self.after[range.start - self.slice.end..range.end - self.slice.end]
        };
        &mut bytes::of_mut(slice)[done..]
    }
}

/// From each peer, bytes.
pub(crate) struct Blobs<'a> {
    pub out: &'a mut [Vec<u8>],
    pub max: usize,
}

impl Inbox for Blobs<'_> {
    fn expect(&self, _: usize) -> Expect {
        Expect::AtMost { bytes: self.max, unit: 1 }
    }

    fn begin(&mut self, peer: usize, len: usize) {
        self.out[peer].resize(len, 0);
    }

    fn space(&mut self, peer: usize, done: usize) -> &mut [u8] {
        &mut self.out[peer][done..]
    }
}

/// From each peer, numbers.
pub(crate) struct Numbers<'a> {
    pub out: &'a mut [Vec<f32>],
    pub max: usize,
}

impl Inbox for Numbers<'_> {
    fn expect(&self, _: usize) -> Expect {
        Expect::AtMost { bytes: self.max, unit: size_of::<f32>() }
    }

    fn begin(&mut self, peer: usize, len: usize) {
        self.out[peer].resize(len / size_of::<f32>(), 0.0);
    }

    fn space(&mut self, peer: usize, done: usize) -> &mut [u8] {
        &mut bytes::of_mut(&mut self.out[peer])[done..]
    }
}

/// From the root, bytes.
pub(crate) struct Blob<'a> {
    pub root: usize,
    pub max: usize,
    pub out: &'a mut Vec<u8>,
}

impl Inbox for Blob<'_> {
    fn expect(&self, peer: usize) -> Expect {
        if peer == self.root {
            Expect::AtMost { bytes: self.max, unit: 1 }
        } else {
            Expect::Nothing
        }
    }

    fn begin(&mut self, _: usize, len: usize) {
        self.out.resize(len, 0);
    }

    fn space(&mut self, _: usize, done: usize) -> &mut [u8] {
        &mut self.out[done..]
    }
}

/// From each peer, a header.
pub(crate) struct Empty;

impl Inbox for Empty {
    fn expect(&self, _: usize) -> Expect {
        Expect::Exactly(0)
    }

    fn space(&mut self, _: usize, _: usize) -> &mut [u8] {
        &mut []
    }
}

/// From nobody, anything.
pub(crate) struct Deaf;

impl Inbox for Deaf {
    fn expect(&self, _: usize) -> Expect {
        Expect::Nothing
    }

    fn space(&mut self, _: usize, _: usize) -> &mut [u8] {
        &mut []
    }
}
