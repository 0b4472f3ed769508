//! A coordinator's options, each documented once, and the places a registry can be.

use std::net::SocketAddr;

use crate::{cluster, http};

/// Everything a coordinator needs to know to run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where people reach the API.
    pub http_listen: SocketAddr,
    pub http: http::Options,
    pub cluster: cluster::Options,
}

/// Which registry holds membership.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// Ours, in this process, offered to workers at `listen` (port 0: a free one).
    Embedded { listen: SocketAddr },
    /// The members of one etcd cluster: `etcd://HOST:PORT[,HOST:PORT]`.
    Etcd { addresses: Vec<String> },
    /// The embedded registry of another coordinator: `embedded://HOST:PORT`.
    Remote { address: String },
}

/// Why text names no registry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no registry; expected etcd://HOST:PORT[,HOST:PORT] or embedded://HOST:PORT")]
pub struct BadPlace {
    text: String,
}

impl Place {
    /// Parses where to find a registry that is not ours.
    ///
    /// # Errors
    /// Neither form.
    pub fn parse(text: &str) -> Result<Self, BadPlace> {
        let bad = || BadPlace { text: text.to_owned() };
        let address = |part: &str| {
            let (host, port) = part.rsplit_once(':').ok_or_else(bad)?;
            let port = port.parse::<u16>().map_err(|_| bad())?;
            let usable =
                !host.is_empty() && !host.contains(['/', '@', ' ', ',', '?', '#']) && port != 0;
            usable.then(|| part.to_owned()).ok_or_else(bad)
        };
        if let Some(rest) = text.strip_prefix("etcd://") {
            let addresses = rest.split(',').map(address).collect::<Result<_, _>>()?;
            return Ok(Self::Etcd { addresses });
        }
        let rest = text.strip_prefix("embedded://").ok_or_else(bad)?;
        Ok(Self::Remote { address: address(rest)? })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn places_are_checked_when_parsed() {
        let addresses = vec!["a:1".to_owned(), "b:2".to_owned()];
        assert_eq!(Place::parse("etcd://a:1,b:2").unwrap(), Place::Etcd { addresses });
        let address = "[::1]:7000".to_owned();
        assert_eq!(Place::parse("embedded://[::1]:7000").unwrap(), Place::Remote { address });
        for bad in [
            "",
            "embedded",
            "etcd://",
            "etcd://a",
            "etcd://a:0",
            "etcd://a:99999",
            "etcd://a:1,,b:2",
            "embedded://a:1,b:2",
            "http://a:1",
            "embedded://u@a:1",
        ] {
            assert!(Place::parse(bad).is_err(), "{bad} was accepted");
        }
    }
}
