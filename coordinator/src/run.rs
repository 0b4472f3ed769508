//! A coordinator from start to end: listen, join the cluster, serve, drain. The request side is handed in.

use std::net::SocketAddr;
use std::sync::Arc;

use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::cluster::{self, Handles};
use crate::config::Options;
use crate::group::handle::Directory;

/// Why a coordinator could not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot listen on {address}: {source}")]
    Listen { address: SocketAddr, source: std::io::Error },
    #[error(transparent)]
    Cluster(#[from] cluster::Error),
}

/// What the request side is given.
#[derive(Debug)]
pub struct Serving {
    pub listener: TcpListener,
    pub directory: watch::Receiver<Arc<Directory>>,
    /// The body of `GET /status`.
    pub status: watch::Receiver<Arc<Value>>,
    /// Cancelled when no more requests should be taken: finish those that run, then return.
    pub shutdown: CancellationToken,
}

/// A coordinator that listens and has begun to look for its cluster.
#[derive(Debug)]
pub struct Coordinator {
    http_address: SocketAddr,
    listener: TcpListener,
    handles: Handles,
    cluster_shutdown: CancellationToken,
}

impl Coordinator {
    /// # Errors
    /// An address that cannot be listened on, or a registry or deployment that cannot be.
    pub async fn start(options: Options) -> Result<Self, Error> {
        let address = options.http_listen;
        let failed = |source| Error::Listen { address, source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let http_address = listener.local_addr().map_err(failed)?;
        let cluster_shutdown = CancellationToken::new();
        let handles = cluster::start(options.cluster, cluster_shutdown.clone()).await?;
        Ok(Self { http_address, listener, handles, cluster_shutdown })
    }

    #[must_use]
    pub fn http_address(&self) -> SocketAddr {
        self.http_address
    }

    /// Where workers find the embedded registry, if it is ours.
    #[must_use]
    pub fn registry_address(&self) -> Option<SocketAddr> {
        self.handles.registry_address
    }

    /// Lets `serve` serve until `shutdown`; the cluster side goes on until it has drained.
    pub async fn run<T>(
        self,
        serve: impl AsyncFnOnce(Serving) -> T,
        shutdown: CancellationToken,
    ) -> T {
        let Self { listener, mut handles, cluster_shutdown, .. } = self;
        let serving = Serving {
            listener,
            directory: handles.directory.clone(),
            status: handles.status.clone(),
            shutdown,
        };
        let served = serve(serving).await;
        cluster_shutdown.cancel();
        handles.join().await;
        served
    }
}
