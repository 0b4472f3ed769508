//! A real etcd on free ports, for one test.

use std::path::PathBuf;

use crate::ports::Reserved;
use crate::process::Process;
use crate::{SOON, root};

/// A running etcd; killed on drop.
pub struct Etcd {
    address: String,
    _ports: [Reserved; 2],
    _process: Process,
    _data: tempfile::TempDir,
}

impl Etcd {
    /// # Panics
    /// It has not been fetched, or does not come up.
    pub async fn start(mark: &str) -> Self {
        let data = tempfile::tempdir().expect("a temporary directory");
        let ports = [Reserved::new(), Reserved::new()];
        let [client, peer] = ports.each_ref().map(|port| port.address().to_string());
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
        let connect = || async { tokio::net::TcpStream::connect(&client).await.ok() };
        process.lives_until("etcd listens", SOON, connect).await;
        Self { address: client, _ports: ports, _process: process, _data: data }
    }

    /// host:port of its clients.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }
}

fn binary() -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let fetched = root().join(".cache/etcd/usr/bin");
    let dirs = std::env::split_paths(&path).chain([fetched, root().join(".cache/etcd")]);
    dirs.map(|dir| dir.join("etcd"))
        .find(|file| file.is_file())
        .expect("etcd is on PATH or in .cache/etcd; run `make etcd`")
}
