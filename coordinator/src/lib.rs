//! The coordinator knows text, requests and groups; never a tensor, never a model file.
//!
//! [`run`] is a whole coordinator: the cluster side forms groups and publishes them, the request
//! side serves them.

pub mod cluster;
pub mod config;
pub mod generation;
pub mod group;
pub mod http;
pub mod metrics;
pub mod router;
pub mod text;

use std::net::SocketAddr;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

pub use config::Options;

/// Why a coordinator does not start, or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot listen on {address} for the API: {source}; choose another address")]
    Listen { address: SocketAddr, source: std::io::Error },
    #[error(transparent)]
    Cluster(#[from] cluster::Error),
    #[error(transparent)]
    Http(#[from] http::ServerError),
}

/// Runs a coordinator until `shutdown`; then finishes what is being answered, up to the option's
/// deadline.
///
/// # Errors
/// An address that cannot be listened on, a registry that cannot be, or a deployment that cannot
/// be.
pub async fn run(options: Options, shutdown: CancellationToken) -> Result<(), Error> {
    let address = options.http_listen;
    let listener = TcpListener::bind(address).await;
    let listener = listener.map_err(|source| Error::Listen { address, source })?;
    // The cluster side outlives the requests: they may need another group until their end.
    let cluster_shutdown = CancellationToken::new();
    let _stop_on_return = cluster_shutdown.clone().drop_guard();
    let mut cluster = cluster::start(options.cluster, cluster_shutdown.clone()).await?;
    let view = http::View {
        directory: cluster.directory.clone(),
        status: cluster.status.clone(),
        figures: cluster.figures.clone(),
    };
    http::run(listener, view, options.http, shutdown.cancelled_owned()).await?;
    cluster_shutdown.cancel();
    cluster.join().await;
    Ok(())
}
