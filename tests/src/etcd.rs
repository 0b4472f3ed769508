//! A real etcd on free ports, for one test.

use std::path::PathBuf;

use crate::process::Process;
use crate::{SOON, eventually, root};

/// A running etcd; killed on drop.
pub struct Etcd {
    address: String,
    _process: Process,
    _data: tempfile::TempDir,
}

impl Etcd {
    /// # Panics
    /// It has not been fetched, or does not come up.
    pub async fn start(mark: &str) -> Self {
        let data = tempfile::tempdir().expect("a temporary directory");
        let (client, peer) = (free_address(), free_address());
        let (client_url, peer_url) = (format!("http://{client}"), format!("http://{peer}"));
        let dir = data.path().display().to_string();
        let args = [
            ("--name", "test"),
            ("--data-dir", &dir),
            ("--listen-client-urls", &client_url),
            ("--advertise-client-urls", &client_url),
            ("--listen-peer-urls", &peer_url),
            ("--initial-advertise-peer-urls", &peer_url),
            ("--initial-cluster", &format!("test={peer_url}")),
            ("--log-level", "warn"),
        ];
        let args: Vec<&str> = args.iter().flat_map(|(flag, value)| [*flag, *value]).collect();
        let mut process = Process::start("etcd", &binary(), &args, mark);
        let ended = || process.has_ended();
        let mut ended = ended;
        eventually("etcd listens", SOON, || {
            assert!(!ended(), "etcd ended at once");
            let client = client.clone();
            async move { tokio::net::TcpStream::connect(client).await.ok() }
        })
        .await;
        Self { address: client, _process: process, _data: data }
    }

    /// host:port of its clients.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }
}

/// An address that was free a moment ago. etcd cannot be told to take any and say which.
pub(crate) fn free_address() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("a bound socket has an address").to_string()
}

fn binary() -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let fetched = root().join(".cache/etcd/usr/bin");
    let dirs = std::env::split_paths(&path).chain([fetched, root().join(".cache/etcd")]);
    dirs.map(|dir| dir.join("etcd"))
        .find(|file| file.is_file())
        .expect("etcd is on PATH or in .cache/etcd; run `make etcd`")
}
