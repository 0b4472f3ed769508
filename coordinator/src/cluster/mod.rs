//! The cluster side: registry, membership, placement, and the supervisor that forms groups.
//!
//! It publishes a [`Directory`] and a status page; it knows no request and no HTTP. [`start`] sets
//! it going.

mod balance;
mod descriptions;
pub mod election;
pub mod embedded;
pub mod embedded_grpc;
pub mod etcd;
mod figures;
mod formation;
pub mod member;
pub mod membership;
pub mod placement;
mod publish;
pub mod records;
pub mod registry;
mod state;
mod status;
pub mod supervisor;
mod takeover;
mod writer;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use evener_proto::keys;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use self::embedded::Embedded;
use self::embedded_grpc::Remote;
use self::etcd::Etcd;
use self::publish::{Publications, Publisher};
use self::records::Deployment;
use self::registry::{Put, Registry, jitter};
use self::state::State;
use crate::config::Place;
use crate::group::figures::Group as GroupFigures;
use crate::group::handle::Directory;

/// What the cluster side of a coordinator needs to know.
#[derive(Debug, Clone)]
pub struct Options {
    /// Unique among coordinators and their restarts.
    pub identity: String,
    pub registry: Place,
    pub etcd: etcd::Options,
    /// Deadlines towards another process's embedded registry.
    pub remote: embedded_grpc::RemoteOptions,
    /// Bounds of our own embedded registry.
    pub embedded: embedded::Options,
    /// Written to the registry at start.
    pub deployments: Vec<Deployment>,
    /// A dead leader is replaced this long after it last renewed.
    pub leader_ttl_s: u32,
    /// Between two looks whether the leader's place is free.
    pub leader_poll: Duration,
    pub supervisor: supervisor::Options,
}

impl Options {
    /// The defaults, at `registry`.
    #[must_use]
    pub fn at(registry: Place) -> Self {
        Self {
            identity: format!("{}-{}", std::process::id(), uuid::Uuid::new_v4().simple()),
            registry,
            etcd: etcd::Options::default(),
            remote: embedded_grpc::RemoteOptions::default(),
            embedded: embedded::Options::default(),
            deployments: Vec::new(),
            leader_ttl_s: 5,
            leader_poll: Duration::from_millis(500),
            supervisor: supervisor::Options::default(),
        }
    }
}

/// Why the cluster side could not start. Once started, nothing ends it but its shutdown.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot listen on {address} for the embedded registry: {source}")]
    Listen { address: SocketAddr, source: std::io::Error },
    #[error("the deployment of {model} cannot be: {source}")]
    Deployment { model: String, source: records::Error },
    #[error(transparent)]
    Registry(#[from] registry::Error),
}

/// What a started cluster side offers. Dropping it stops everything.
#[derive(Debug)]
pub struct Handles {
    pub directory: watch::Receiver<Arc<Directory>>,
    /// The body of `GET /status`.
    pub status: watch::Receiver<Arc<Value>>,
    /// What workers report of their work.
    pub figures: watch::Receiver<Arc<[GroupFigures]>>,
    /// Where the embedded registry listens, if it is ours.
    pub registry_address: Option<SocketAddr>,
    pub registry: Registry,
    tasks: JoinSet<()>,
}

impl Handles {
    /// Waits until all has ended after the shutdown; a task that panicked is one that has ended.
    pub async fn join(&mut self) {
        while let Some(ended) = self.tasks.join_next().await {
            if let Err(error) = ended {
                tracing::error!(%error, "a task of the cluster side failed");
            }
        }
    }
}

/// Connects to the registry, or starts one, and supervises until `shutdown`.
///
/// # Errors
/// An address that cannot be listened on or connected to, or a deployment that cannot be.
pub async fn start(options: Options, shutdown: CancellationToken) -> Result<Handles, Error> {
    for deployment in &options.deployments {
        let model = deployment.model.to_string();
        deployment.check().map_err(|source| Error::Deployment { model, source })?;
    }
    let mut tasks = JoinSet::new();
    let mut registry_address = None;
    let registry = match &options.registry {
        Place::Embedded { listen } => {
            let address = *listen;
            let failed = |source| Error::Listen { address, source };
            let listener = TcpListener::bind(address).await.map_err(failed)?;
            registry_address = Some(listener.local_addr().map_err(failed)?);
            let embedded = Embedded::start(options.embedded.clone());
            // It outlives the tasks that use it by the grace it gives to its callers.
            let serving = embedded_grpc::serve(listener, embedded.clone(), shutdown.clone());
            tasks.spawn(async move {
                if let Err(error) = serving.await {
                    tracing::error!(%error, "the embedded registry is no longer offered");
                }
            });
            Registry::new(Arc::new(embedded))
        }
        Place::Etcd { addresses } => {
            Registry::new(Arc::new(Etcd::new(addresses, options.etcd.clone())?))
        }
        Place::Remote { address } => {
            Registry::new(Arc::new(Remote::new(address, &options.remote)?))
        }
    };
    let (leading, leading_reader) = watch::channel(false);
    let election = election::Options {
        identity: options.identity.clone(),
        lease_ttl_s: options.leader_ttl_s,
        poll: options.leader_poll,
    };
    tasks.spawn(election::run(election, registry.clone(), leading, shutdown.clone()));
    let deploying = deploy(registry.clone(), options.deployments, shutdown.clone());
    tasks.spawn(deploying);
    let state = State::new(options.identity, registry.describe());
    let (publisher, publications) = Publisher::new(&state);
    tasks.spawn(supervisor::run(
        options.supervisor,
        state,
        registry.clone(),
        leading_reader,
        publisher,
        shutdown,
    ));
    let Publications { directory, status, figures } = publications;
    Ok(Handles { directory, status, figures, registry_address, registry, tasks })
}

/// Writes down what people asked for, until it has worked.
async fn deploy(registry: Registry, deployments: Vec<Deployment>, shutdown: CancellationToken) {
    const PAUSE: Duration = Duration::from_millis(500);
    for deployment in deployments {
        let key = keys::deployment(&deployment.model);
        loop {
            match registry.put(Put::new(key.clone(), deployment.encode())).await {
                Ok(_) => break,
                Err(error) => tracing::debug!(%error, "deployment not written yet"),
            }
            tokio::select! {
                () = tokio::time::sleep(jitter(PAUSE)) => {}
                () = shutdown.cancelled() => return,
            }
        }
    }
}
