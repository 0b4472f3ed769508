//! Registries for the suite: real etcd, the embedded one in this process, and the embedded one over
//! gRPC; and a TCP proxy to cut a client off.

use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use evener_coordinator::cluster::embedded::{self, Embedded};
use evener_coordinator::cluster::embedded_grpc::{self, Remote, RemoteOptions};
use evener_coordinator::cluster::etcd::{self, Etcd};
use evener_coordinator::cluster::registry::{Registry, Revision};
use evener_proto::etcd as pb;
use evener_proto::etcd::kv_client::KvClient;
use evener_tests::Reserved;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::support::DEADLINE;

/// Which registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Etcd,
    Embedded,
    EmbeddedGrpc,
}

/// A running registry.
pub struct Rig {
    kind: Kind,
    port: Reserved,
    running: Running,
}

enum Running {
    Etcd(EtcdProcess),
    Embedded(Embedded),
    Served { registry: Embedded, stop: CancellationToken, task: JoinHandle<()> },
}

impl Rig {
    pub async fn start(kind: Kind) -> Self {
        let port = Reserved::new();
        let address = port.address();
        let running = match kind {
            Kind::Etcd => Running::Etcd(EtcdProcess::start(address)),
            Kind::Embedded => Running::Embedded(store(0)),
            Kind::EmbeddedGrpc => serve(address, store(0)).await,
        };
        let rig = Self { kind, port, running };
        rig.answers().await;
        rig
    }

    /// Waits until it can be read.
    async fn answers(&self) {
        let answers = async {
            while self.client().get("").await.is_err() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(DEADLINE, answers).await.expect("the registry answers");
    }

    /// A new client.
    pub fn client(&self) -> Registry {
        match &self.running {
            Running::Embedded(embedded) => Registry::new(Arc::new(embedded.clone())),
            Running::Etcd(_) | Running::Served { .. } => self.client_at(self.port.address()),
        }
    }

    /// A client that reaches it at `address`.
    pub fn client_at(&self, address: SocketAddr) -> Registry {
        let address = address.to_string();
        match self.kind {
            Kind::Etcd => {
                Registry::new(Arc::new(Etcd::new(&[address], etcd::Options::default()).unwrap()))
            }
            Kind::Embedded => panic!("the embedded registry has no address"),
            Kind::EmbeddedGrpc => {
                Registry::new(Arc::new(Remote::new(&address, &RemoteOptions::default()).unwrap()))
            }
        }
    }

    pub fn url(&self) -> String {
        self.url_at(self.port.address())
    }

    pub fn url_at(&self, address: SocketAddr) -> String {
        match self.kind {
            Kind::Etcd => format!("etcd://{address}"),
            Kind::Embedded => panic!("the embedded registry has no address"),
            Kind::EmbeddedGrpc => format!("embedded://{address}"),
        }
    }

    pub async fn proxy(&self) -> Proxy {
        Proxy::start(self.port.address()).await
    }

    /// Forgets what happened before `revision`.
    pub async fn compact(&self, revision: Revision) {
        match &self.running {
            Running::Etcd(_) => {
                let url = format!("http://{}", self.port.address());
                let mut client = KvClient::connect(url).await.unwrap();
                client.compact(pb::CompactionRequest { revision, physical: true }).await.unwrap();
            }
            Running::Embedded(embedded) | Running::Served { registry: embedded, .. } => {
                embedded.compact(revision);
            }
        }
    }

    /// Kills it, and starts it again where it was with what it knew.
    pub async fn restart(&mut self) {
        match &mut self.running {
            Running::Etcd(etcd) => etcd.restart(),
            Running::Embedded(_) => panic!("the embedded registry ends with its process"),
            Running::Served { registry, stop, task } => {
                stop.cancel();
                task.await.unwrap();
                let registry = registry.clone();
                self.running = serve(self.port.address(), registry).await;
            }
        }
        self.answers().await;
    }

    /// Kills it, and starts it again where it was with nothing.
    pub async fn lose_everything(&mut self) {
        match &mut self.running {
            Running::Etcd(etcd) => {
                etcd.kill();
                *etcd = EtcdProcess::start(self.port.address());
            }
            Running::Embedded(_) => panic!("the embedded registry ends with its process"),
            Running::Served { stop, task, .. } => {
                stop.cancel();
                task.await.unwrap();
                self.running = serve(self.port.address(), store(0)).await;
            }
        }
        self.answers().await;
    }
}

fn store(first_revision: Revision) -> Embedded {
    Embedded::start(embedded::Options { first_revision, ..embedded::Options::default() })
}

async fn serve(address: SocketAddr, registry: Embedded) -> Running {
    let listener = TcpListener::bind(address).await.unwrap();
    let stop = CancellationToken::new();
    let served = embedded_grpc::serve(listener, registry.clone(), stop.clone());
    let task = tokio::spawn(async move { served.await.unwrap() });
    Running::Served { registry, stop, task }
}

/// A real etcd with one member.
struct EtcdProcess {
    child: Child,
    address: SocketAddr,
    peer_port: Reserved,
    data: tempfile::TempDir,
}

impl EtcdProcess {
    fn start(address: SocketAddr) -> Self {
        let (peer_port, data) = (Reserved::new(), tempfile::tempdir().unwrap());
        let child = spawn_etcd(address, peer_port.address(), data.path());
        Self { child, address, peer_port, data }
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn restart(&mut self) {
        self.kill();
        self.child = spawn_etcd(self.address, self.peer_port.address(), self.data.path());
    }
}

impl Drop for EtcdProcess {
    fn drop(&mut self) {
        self.kill();
    }
}

fn spawn_etcd(client: SocketAddr, peer: SocketAddr, data: &std::path::Path) -> Child {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/fetch-etcd");
    let found = Command::new(script).stderr(Stdio::inherit()).output().unwrap();
    assert!(found.status.success(), "scripts/fetch-etcd found no etcd");
    let etcd = String::from_utf8(found.stdout).unwrap();
    let (client, peer) = (format!("http://{client}"), format!("http://{peer}"));
    Command::new(etcd.trim())
        .args(["--name", "one", "--log-level", "error", "--logger", "zap"])
        .arg("--data-dir")
        .arg(data)
        .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
        .args(["--initial-cluster", &format!("one={peer}")])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Passes connections on, until it is told to cut them.
pub struct Proxy {
    pub address: SocketAddr,
    open: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Proxy {
    async fn start(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (open, watched) = watch::channel(true);
        let task = tokio::spawn(async move {
            loop {
                let (near, _) = listener.accept().await.unwrap();
                if *watched.borrow() {
                    tokio::spawn(pass(near, target, watched.clone()));
                }
            }
        });
        Self { address, open, task }
    }

    /// Drops all connections, and every new one.
    pub fn cut(&self) {
        self.open.send_replace(false);
    }

    pub fn mend(&self) {
        self.open.send_replace(true);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn pass(mut near: TcpStream, target: SocketAddr, mut open: watch::Receiver<bool>) {
    let Ok(mut far) = TcpStream::connect(target).await else { return };
    tokio::select! {
        _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
        _ = open.wait_for(|open| !open) => {}
    }
}
