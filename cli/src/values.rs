//! Checked values of options: shares, sizes, registries. Parsed once at the command line, never
//! checked again.

use std::fmt;
use std::str::FromStr;

use evener_proto::KvFormat;
use evener_worker::checkpoint::Kept;
use evener_worker::measure::Precision;
use serde::Serialize;

/// Weights of the ranks in a split, `2:1`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shares(pub Vec<u32>);

impl FromStr for Shares {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let share = |part: &str| match part.trim().parse::<u32>() {
            Ok(0) => Err(format!("a share of `{text}` is 0; every worker needs at least 1")),
            Ok(n) => Ok(n),
            Err(_) => Err(format!(
                "`{part}` in `{text}` is not a share; write whole numbers from 1 up, such as 2:1"
            )),
        };
        text.split(':').map(share).collect::<Result<_, _>>().map(Self)
    }
}

impl fmt::Display for Shares {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts: Vec<String> = self.0.iter().map(u32::to_string).collect();
        f.write_str(&parts.join(":"))
    }
}

/// What each rank's memory reads, in GB/s, `4300:50`.
#[derive(Debug, Clone, PartialEq)]
pub struct Reads(pub Vec<f64>);

impl FromStr for Reads {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let rate = |part: &str| match part.trim().parse::<f64>() {
            Ok(rate) if rate.is_finite() && rate > 0.0 => Ok(rate),
            _ => Err(format!(
                "`{part}` in `{text}` is no number of GB/s; write one above 0 for each worker, such as 4300:50"
            )),
        };
        text.split(':').map(rate).collect::<Result<_, _>>().map(Self)
    }
}

impl fmt::Display for Reads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts: Vec<String> = self.0.iter().map(f64::to_string).collect();
        f.write_str(&parts.join(":"))
    }
}

/// Cores, written `auto`, `none` or as a list such as `0-3,8`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cores {
    Auto,
    None,
    List(Vec<usize>),
}

/// Above any core's number.
const MAX_CORES: usize = 1024;

impl FromStr for Cores {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => return Ok(Self::Auto),
            "none" => return Ok(Self::None),
            _ => {}
        }
        let mut cores = Vec::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            match (first.trim().parse::<usize>(), last.trim().parse::<usize>()) {
                (Ok(first), Ok(last)) if first <= last && last < MAX_CORES => {
                    cores.extend(first..=last);
                }
                _ => {
                    return Err(format!(
                        "`{part}` in `{text}` names no cores; write auto, none, or numbers and \
                         ranges below {MAX_CORES} such as 0-3,8"
                    ));
                }
            }
        }
        let mut sorted = cores.clone();
        sorted.sort_unstable();
        match sorted.windows(2).find(|two| two[0] == two[1]) {
            Some(twice) => Err(format!("core {} is twice in `{text}`", twice[0])),
            None => Ok(Self::List(cores)),
        }
    }
}

impl fmt::Display for Cores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::None => f.write_str("none"),
            Self::List(cores) => {
                let parts: Vec<String> = cores.iter().map(usize::to_string).collect();
                f.write_str(&parts.join(","))
            }
        }
    }
}

/// A number of bytes, written `1.5GiB`, `512MiB`, `64MB` or plain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

const UNITS: [(&str, u64); 7] = [
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("KB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
];

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refuse =
            || format!("`{text}` is not a size; write for example 512MiB, 1.5GiB or 1000000");
        let (number, unit) = UNITS
            .iter()
            .find_map(|&(name, unit)| text.strip_suffix(name).map(|number| (number, unit)))
            .unwrap_or((text.strip_suffix('B').unwrap_or(text), 1));
        let number: f64 = number.trim().parse().map_err(|_| refuse())?;
        let bytes = number * unit as f64;
        if !(bytes >= 1.0 && bytes < u64::MAX as f64) {
            return Err(refuse());
        }
        Ok(Self(bytes as u64))
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, unit) = match self.0 {
            n if n >= 1 << 30 => ("GiB", 1u64 << 30),
            n if n >= 1 << 20 => ("MiB", 1 << 20),
            n if n >= 1 << 10 => ("KiB", 1 << 10),
            n => return write!(f, "{n} B"),
        };
        write!(f, "{:.1} {name}", self.0 as f64 / unit as f64)
    }
}

/// Where membership and load stand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Registry {
    /// In the coordinator that reads this.
    Embedded,
    /// In the coordinator at this `host:port`.
    EmbeddedAt(String),
    /// In an etcd cluster; `host:port` of its members.
    Etcd(Vec<String>),
}

impl FromStr for Registry {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let address = |text: &str| match text.rsplit_once(':') {
            Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok_and(|p| p > 0) => {
                Ok(text.to_owned())
            }
            _ => Err(format!("`{text}` is not HOST:PORT, for example 127.0.0.1:2379")),
        };
        if text == "embedded" {
            Ok(Self::Embedded)
        } else if let Some(rest) = text.strip_prefix("embedded://") {
            address(rest).map(Self::EmbeddedAt)
        } else if let Some(rest) = text.strip_prefix("etcd://") {
            rest.split(',').map(address).collect::<Result<_, _>>().map(Self::Etcd)
        } else {
            Err(format!(
                "`{text}` is not a registry; write embedded, embedded://HOST:PORT or \
                 etcd://HOST:PORT[,HOST:PORT]"
            ))
        }
    }
}

impl fmt::Display for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedded => f.write_str("embedded"),
            Self::EmbeddedAt(address) => write!(f, "embedded://{address}"),
            Self::Etcd(addresses) => write!(f, "etcd://{}", addresses.join(",")),
        }
    }
}

/// What computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backend {
    /// Evener's own kernels.
    Cpu,
    /// Every operation in plain candle tensors: slow, obvious, the truth the others are tested
    /// against.
    Reference,
}

/// What a worker computes on, written `cpu`, `cuda:N` or `auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    Cpu,
    /// The driver's card of this number.
    Cuda(usize),
    /// The first card, if there is one; else the processor.
    Auto,
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| text.parse().ok().filter(|&n: &usize| n < 1024);
        match (text, text.strip_prefix("cuda:").and_then(number)) {
            ("cpu", _) => Ok(Self::Cpu),
            ("auto", _) => Ok(Self::Auto),
            ("cuda", _) => Ok(Self::Cuda(0)),
            (_, Some(n)) => Ok(Self::Cuda(n)),
            (_, None) => Err(format!("`{text}` is no device; write cpu, cuda:N or auto")),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(n) => write!(f, "cuda:{n}"),
            Self::Auto => f.write_str("auto"),
        }
    }
}

impl Serialize for Device {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// How ranks of one host talk to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// Shared memory within a host, TCP between hosts.
    Auto,
    /// TCP everywhere.
    Tcp,
    /// Shared memory, or refuse.
    Shm,
}

/// How keys and values are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kv {
    /// Half precision.
    F16,
    /// As computed.
    F32,
    /// Eight bits, with a scale for each token and KV head.
    Int8,
}

impl From<Kv> for KvFormat {
    fn from(kv: Kv) -> Self {
        match kv {
            Kv::F16 => Self::F16,
            Kv::F32 => Self::F32,
            Kv::Int8 => Self::Int8,
        }
    }
}

/// How finely processors round what they multiply weights with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Activations {
    /// To 12 bits; not at all where weights are not quantised.
    Int12,
    /// To 8 bits, or bf16 where weights are bf16, as other engines do: prompts and batches are faster,
    /// and a small model chooses another token at 4 of 100 positions.
    Int8,
}

impl From<Activations> for evener_proto::Activations {
    fn from(activations: Activations) -> Self {
        match activations {
            Activations::Int12 => Self::Int12,
            Activations::Int8 => Self::Int8,
        }
    }
}

impl From<Activations> for Precision {
    fn from(activations: Activations) -> Self {
        match activations {
            Activations::Int12 => Self::Int12,
            Activations::Int8 => Self::Int8,
        }
    }
}

/// How weights are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Weights {
    /// As the file has them.
    Stored,
    /// Matrices in F32, F16 or BF16 rounded to eight bits (e4m3), with a scale for each row; not the
    /// embedding, nor the head. On a processor, which has no arithmetic for them, they take the room
    /// of BF16.
    Fp8,
}

impl From<Weights> for Kept {
    fn from(weights: Weights) -> Self {
        match weights {
            Weights::Stored => Self::AsStored,
            Weights::Fp8 => Self::Fp8,
        }
    }
}

macro_rules! written_as_text {
    ($($name:ident),*) => {$(
        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
    )*};
}
written_as_text!(Shares, Reads, Registry, Cores);

impl Serialize for Bytes {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

/// The value of a flag as text.
pub fn flag(value: impl clap::ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |v| v.get_name().to_owned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_whole_numbers_from_one() {
        assert_eq!("3:2:2".parse::<Shares>().unwrap(), Shares(vec![3, 2, 2]));
        for bad in ["", ":", "2:", "1:0", "a:1", "-1", "1.5"] {
            assert!(bad.parse::<Shares>().is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn cores_are_numbers_and_ranges_named_once() {
        for (text, same) in [("auto", "auto"), ("none", "none"), ("3", "3"), ("0-2,7", "0,1,2,7")] {
            assert_eq!(text.parse::<Cores>().unwrap().to_string(), same);
        }
        for bad in ["", "a", "1-", "3-1", "0,0", "0-2,1", "1024", "-1"] {
            assert!(bad.parse::<Cores>().is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [("1", 1), ("64MB", 64_000_000), ("1.5KiB", 1536), ("2 GiB", 2 << 30)]
        {
            assert_eq!(text.parse::<Bytes>().unwrap(), Bytes(bytes), "{text}");
        }
        for bad in ["", "0", "-1", "x", "1XB", "nan", "1e300"] {
            assert!(bad.parse::<Bytes>().is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn registries_are_written_as_they_are_read() {
        for good in ["embedded", "embedded://h:1", "etcd://a:1,b:2"] {
            assert_eq!(good.parse::<Registry>().unwrap().to_string(), good);
        }
        for bad in
            ["", "etcd", "etcd://", "etcd://a", "etcd://a:0", "embedded://:1", "consul://a:1"]
        {
            assert!(bad.parse::<Registry>().is_err(), "{bad:?} was accepted");
        }
    }
}
