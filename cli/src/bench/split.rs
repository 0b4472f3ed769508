//! How a model is laid out for one measurement: ranks, threads of each, and what carries their
//! sums.

use std::fmt;
use std::str::FromStr;

use crate::up::Shape;
use crate::values::{self, Shares, Transport};

/// `1x2`, `2x1/tcp`: ranks times threads, transport.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Split {
    pub shares: Vec<u32>,
    pub threads: usize,
    pub transport: Transport,
}

impl FromStr for Split {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refuse = || {
            format!(
                "`{text}` is no split; write RANKSxTHREADS or RANKSxTHREADS/TRANSPORT, such as 1x2 \
                 or 2x1/tcp"
            )
        };
        let (size, transport) = text.split_once('/').unwrap_or((text, "auto"));
        let (ranks, threads) = size.split_once('x').ok_or_else(refuse)?;
        let number = |text: &str| text.parse().ok().filter(|n| (1..=1024).contains(n));
        let (ranks, threads) = number(ranks).zip(number(threads)).ok_or_else(refuse)?;
        let transport = <Transport as clap::ValueEnum>::from_str(transport, true);
        Ok(Self { shares: vec![1; ranks], threads, transport: transport.map_err(|_| refuse())? })
    }
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.shares.len(), self.threads)?;
        match self.transport {
            Transport::Auto => {}
            transport => write!(f, "/{}", values::flag(transport))?,
        }
        if self.shares.iter().any(|&share| share != self.shares[0]) {
            write!(f, " {}", Shares(self.shares.clone()))?;
        }
        Ok(())
    }
}

impl serde::Serialize for Split {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Split {
    /// Of all ranks together.
    pub fn n_threads(&self) -> usize {
        self.shares.len() * self.threads
    }

    /// `shape` as this split lays it out.
    pub fn of(&self, shape: &Shape) -> Shape {
        Shape {
            workers: None,
            shares: Some(Shares(self.shares.clone())),
            threads: Some(self.threads),
            transport: self.transport,
            ..shape.clone()
        }
    }
}

/// One rank with all cores, then two ranks over shared memory and over TCP.
pub fn standard(n_cores: usize) -> Vec<Split> {
    let two = |transport| Split { shares: vec![1; 2], threads: (n_cores / 2).max(1), transport };
    let one = Split { shares: vec![1], threads: n_cores, transport: Transport::Auto };
    vec![one, two(Transport::Shm), two(Transport::Tcp)]
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_split_is_written_as_it_is_read() {
        for text in ["1x2", "2x1/shm", "4x8/tcp"] {
            assert_eq!(text.parse::<Split>().unwrap().to_string(), text);
        }
        for bad in ["", "2", "x", "0x1", "1x0", "2x1/rdma", "1x2x3"] {
            assert!(bad.parse::<Split>().unwrap_err().contains("2x1/tcp"), "{bad:?}");
        }
    }

    #[test]
    fn the_standard_splits_use_every_core_once() {
        let names = |n| standard(n).iter().map(Split::to_string).collect::<Vec<_>>();
        assert_eq!(names(2), ["1x2", "2x1/shm", "2x1/tcp"]);
        assert_eq!(names(8), ["1x8", "2x4/shm", "2x4/tcp"]);
    }
}
