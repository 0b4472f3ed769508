//! What two ranks say to each other before they are linked: hello, then accepted or refused.
//!
//! Frames are small, bounded, and read without blocking. Whatever does not parse ends its own
//! socket and nothing else.

use crate::link::shm::Offer;
use std::io::{ErrorKind, Read};
use std::net::TcpStream;

const MAGIC: u32 = u32::from_le_bytes(*b"EvHi");
const VERSION: u16 = 1;
const HEADER: usize = 12; // magic, version, kind, zero, body length
const MAX_BODY: usize = 1024;

/// The longest token a group may have, in bytes.
pub(crate) const MAX_TOKEN: usize = 256;
const MAX_REASON: usize = 512;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Frame {
    Hello(Hello),
    /// Linked by this socket.
    AcceptTcp,
    /// Linked by memory, if the dialler can open it; it answers with a verdict.
    AcceptShm(Offer),
    Verdict {
        is_open: bool,
    },
    Refuse(Refusal),
}

/// The dialler's first words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hello {
    pub epoch: u64,
    pub from: u32,
    pub to: u32,
    pub world_size: u32,
    pub wants_shm: bool,
    pub token: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    /// The same hello may be welcome later.
    pub may_retry: bool,
    pub reason: String,
}

/// Why a socket's frames cannot be read on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Bad {
    #[error("it does not speak our language: {0}")]
    Garbage(&'static str),
    #[error("it speaks version {got} of the hello, we speak {VERSION}")]
    Version { got: u16 },
    #[error("it hung up")]
    Ended,
    #[error("{0}")]
    Io(#[from] std::io::Error),
}

/// Reads one frame after another from a non-blocking socket, never a byte too many.
#[derive(Debug, Default)]
pub(crate) struct FrameReader {
    bytes: Vec<u8>, // header and body, as far as read
}

impl FrameReader {
    /// The next frame, or none yet.
    pub fn read(&mut self, mut socket: &TcpStream) -> Result<Option<Frame>, Bad> {
        loop {
            let due = self.due()?;
            let done = self.bytes.len();
            if done == due {
                let frame = decode(&self.bytes)?;
                self.bytes.clear();
                return Ok(Some(frame));
            }
            self.bytes.resize(due, 0);
            let read = socket.read(&mut self.bytes[done..]);
            self.bytes.truncate(done + *read.as_ref().unwrap_or(&0));
            match read {
                Ok(0) => return Err(Bad::Ended),
                Ok(_) => {}
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock => return Ok(None),
                    ErrorKind::Interrupted => {}
                    _ => return Err(error.into()),
                },
            }
        }
    }

    /// How many bytes to have read before looking again.
    fn due(&self) -> Result<usize, Bad> {
        if self.bytes.len() < HEADER {
            return Ok(HEADER);
        }
        let mut fields = Fields(&self.bytes);
        if fields.u32()? != MAGIC {
            return Err(Bad::Garbage("its first bytes are not ours"));
        }
        let (_version, _kind, _zero) = (fields.u16()?, fields.u8()?, fields.u8()?);
        let body = fields.u32()? as usize;
        if body > MAX_BODY {
            return Err(Bad::Garbage("its frame is too long"));
        }
        Ok(HEADER + body)
    }
}

impl Frame {
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::new();
        let kind: u8 = match self {
            Self::Hello(hello) => {
                body.extend(hello.epoch.to_le_bytes());
                for number in [hello.from, hello.to, hello.world_size] {
                    body.extend(number.to_le_bytes());
                }
                body.push(hello.wants_shm.into());
                put_text(&mut body, &hello.token, MAX_TOKEN);
                1
            }
            Self::AcceptTcp => 2,
            Self::AcceptShm(offer) => {
                body.extend(offer.key);
                body.extend((offer.capacity as u64).to_le_bytes());
                put_text(&mut body, &offer.name, MAX_TOKEN);
                3
            }
            Self::Verdict { is_open } => {
                body.push((*is_open).into());
                4
            }
            Self::Refuse(refusal) => {
                body.push(refusal.may_retry.into());
                put_text(&mut body, &refusal.reason, MAX_REASON);
                5
            }
        };
        let mut bytes = Vec::with_capacity(HEADER + body.len());
        bytes.extend(MAGIC.to_le_bytes());
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend([kind, 0]);
        bytes.extend((body.len() as u32).to_le_bytes());
        bytes.extend(body);
        bytes
    }
}

fn decode(bytes: &[u8]) -> Result<Frame, Bad> {
    let mut fields = Fields(bytes);
    let _magic = fields.u32()?;
    let version = fields.u16()?;
    let (kind, _zero, _len) = (fields.u8()?, fields.u8()?, fields.u32()?);
    if version != VERSION {
        return Err(Bad::Version { got: version });
    }
    let frame = match kind {
        1 => Frame::Hello(Hello {
            epoch: fields.u64()?,
            from: fields.u32()?,
            to: fields.u32()?,
            world_size: fields.u32()?,
            wants_shm: fields.bool()?,
            token: fields.text(MAX_TOKEN)?,
        }),
        2 => Frame::AcceptTcp,
        3 => Frame::AcceptShm(Offer {
            key: fields.array()?,
            capacity: usize::try_from(fields.u64()?)
                .map_err(|_| Bad::Garbage("a ring too large"))?,
            name: fields.text(MAX_TOKEN)?,
        }),
        4 => Frame::Verdict { is_open: fields.bool()? },
        5 => Frame::Refuse(Refusal { may_retry: fields.bool()?, reason: fields.text(MAX_REASON)? }),
        _ => return Err(Bad::Garbage("an unknown kind of frame")),
    };
    if fields.0.is_empty() { Ok(frame) } else { Err(Bad::Garbage("bytes after the last field")) }
}

/// Cuts what is too long: only reasons can be.
fn put_text(body: &mut Vec<u8>, text: &str, max: usize) {
    let text = &text[..text.floor_char_boundary(max)];
    body.extend((text.len() as u16).to_le_bytes());
    body.extend(text.as_bytes());
}

/// What is left of a frame.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], Bad> {
        let (array, rest) = self.0.split_first_chunk().ok_or(Bad::Garbage("a frame cut short"))?;
        self.0 = rest;
        Ok(*array)
    }

    fn u8(&mut self) -> Result<u8, Bad> {
        self.array().map(u8::from_le_bytes)
    }

    fn u16(&mut self) -> Result<u16, Bad> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, Bad> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, Bad> {
        self.array().map(u64::from_le_bytes)
    }

    fn bool(&mut self) -> Result<bool, Bad> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(Bad::Garbage("a yes or no that is neither")),
        }
    }

    fn text(&mut self, max: usize) -> Result<String, Bad> {
        let len = usize::from(self.u16()?);
        if len > max || len > self.0.len() {
            return Err(Bad::Garbage("a text too long"));
        }
        let (text, rest) = self.0.split_at(len);
        self.0 = rest;
        String::from_utf8(text.to_vec()).map_err(|_| Bad::Garbage("a text that is not UTF-8"))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn frames() -> Vec<Frame> {
        let token = "a secret".to_owned();
        vec![
            Frame::Hello(Hello { epoch: 7, from: 2, to: 1, world_size: 3, wants_shm: true, token }),
            Frame::AcceptTcp,
            Frame::AcceptShm(Offer { name: "evener-1f".into(), key: [9; 16], capacity: 4096 }),
            Frame::Verdict { is_open: true },
            Frame::Refuse(Refusal { may_retry: false, reason: "nö".into() }),
        ]
    }

    #[test]
    fn frames_come_back_as_sent() {
        for frame in frames() {
            assert_eq!(decode(&frame.encode()).unwrap(), frame);
        }
    }

    #[test]
    fn cut_or_prolonged_frames_are_garbage() {
        for bytes in frames().iter().map(Frame::encode) {
            for len in 0..bytes.len() {
                assert!(decode(&bytes[..len]).is_err(), "{len} of {}", bytes.len());
            }
            assert!(decode(&[bytes, vec![0]].concat()).is_err());
        }
    }

    #[test]
    fn a_long_reason_is_cut_to_fit() {
        let reason = "ü".repeat(2000);
        let bytes = Frame::Refuse(Refusal { may_retry: true, reason }).encode();
        assert!(bytes.len() <= HEADER + MAX_BODY);
        assert!(matches!(decode(&bytes), Ok(Frame::Refuse(Refusal { may_retry: true, .. }))));
    }
}
