//! The header on every message, and its check: a rank that is out of step is an error, never a
//! hang.

use crate::{Error, Tag};
use std::fmt;

const MAGIC: u32 = u32::from_le_bytes(*b"EvNc");
const BYE: u32 = u32::from_le_bytes(*b"EvBy");

/// What a message is part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    AllReduce = 1,
    /// First shot of a large all-reduce: each rank's parts, cut by element.
    ReduceScatter = 2,
    /// Its second shot: the summed slices.
    SliceGather = 3,
    AllGather = 4,
    Gather = 5,
    Broadcast = 6,
    Barrier = 7,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AllReduce => "all_reduce",
            Self::ReduceScatter => "reduce_scatter",
            Self::SliceGather => "slice_gather",
            Self::AllGather => "all_gather",
            Self::Gather => "gather",
            Self::Broadcast => "broadcast",
            Self::Barrier => "barrier",
        })
    }
}

/// What every message of one operation says, whoever sends it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Head {
    pub epoch: u64,
    pub tag: Tag,
    pub kind: Kind,
}

/// How long a payload may be.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Expect {
    Nothing,
    Exactly(usize),
    AtMost { bytes: usize, unit: usize },
}

impl Head {
    pub const BYTES: usize = 40;

    /// What a rank says that leaves after its last operation, so that peers which are still in
    /// theirs do not take it for lost.
    pub fn bye() -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[0..4].copy_from_slice(&BYE.to_le_bytes());
        bytes
    }

    pub fn encode(&self, sender: usize, len: usize) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[4..6].copy_from_slice(&(self.kind as u16).to_le_bytes());
        bytes[6..8].copy_from_slice(&(sender as u16).to_le_bytes());
        bytes[8..16].copy_from_slice(&self.epoch.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.tag.step.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.tag.op.to_le_bytes());
        bytes[32..40].copy_from_slice(&(len as u64).to_le_bytes());
        bytes
    }

    /// The payload's length, if the header is the one that is due from `peer`.
    pub fn check(
        &self,
        bytes: &[u8; Self::BYTES],
        peer: usize,
        expect: Expect,
    ) -> Result<usize, Error> {
        let number = |from: usize, n: usize| {
            let mut wide = [0; 8];
            wide[..n].copy_from_slice(&bytes[from..from + n]);
            u64::from_le_bytes(wide)
        };
        if number(0, 4) == u64::from(BYE) {
            return Err(Error::PeerLost { peer, detail: "it has left the group".into() });
        }
        let due = [
            ("magic", MAGIC.into(), number(0, 4)),
            ("epoch", self.epoch, number(8, 8)),
            ("step", self.tag.step, number(16, 8)),
            ("op", self.tag.op.into(), number(24, 4)),
            ("kind", self.kind as u64, number(4, 2)),
            ("sender", peer as u64, number(6, 2)),
            ("reserved", 0, number(28, 4)),
        ];
        for (field, expected, got) in due {
            if got != expected {
                return Err(Error::Mismatch { field, expected, got, peer });
            }
        }
        let got = number(32, 8);
        match expect {
            Expect::AtMost { bytes: max, unit } => {
                if got > max as u64 || got % unit as u64 != 0 {
                    return Err(Error::BadLength { peer, bytes: got, max, unit });
                }
            }
            Expect::Exactly(expected) => {
                if got != expected as u64 {
                    let expected = expected as u64;
                    return Err(Error::Mismatch { field: "length", expected, got, peer });
                }
            }
            Expect::Nothing => unreachable!("nothing is read from a peer that owes nothing"),
        }
        Ok(got as usize)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_damaged_field_is_named() {
        let tag = Tag { step: 7, op: 3 };
        let head = Head { epoch: 9, tag, kind: Kind::Gather };
        let good = head.encode(2, 64);
        assert_eq!(head.check(&good, 2, Expect::Exactly(64)).unwrap(), 64);
        let cases = [
            (0, "magic"),
            (4, "kind"),
            (6, "sender"),
            (8, "epoch"),
            (16, "step"),
            (24, "op"),
            (28, "reserved"),
            (39, "length"),
        ];
        for (at, name) in cases {
            let mut bad = good;
            bad[at] ^= 0x40;
            match head.check(&bad, 2, Expect::Exactly(64)) {
                Err(Error::Mismatch { field, peer: 2, .. }) => assert_eq!(field, name),
                other => panic!("byte {at}: {other:?}"),
            }
        }
    }

    #[test]
    fn an_unexpected_length_is_bounded_and_in_whole_units() {
        let head = Head { epoch: 1, tag: Tag::default(), kind: Kind::Gather };
        let expect = Expect::AtMost { bytes: 64, unit: 4 };
        for (len, ok) in [(0, true), (64, true), (6, false), (68, false), (usize::MAX, false)] {
            assert_eq!(head.check(&head.encode(1, len), 1, expect).is_ok(), ok, "{len}");
        }
    }
}
