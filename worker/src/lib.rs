//! One rank of a group. A worker knows tensors and its rank; never a chat template.
//!
//! A process is a [`Worker`]: opened from its options, then run until shutdown.

pub mod backend;
pub mod checkpoint;
pub mod config;
pub mod engine;
pub mod epoch;
pub mod host;
pub mod measure;
pub mod metrics;
pub mod model;
pub mod registration;
mod report;
pub mod service;
pub mod session;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use evener_collective::Rendezvous;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

pub use config::Options;
pub use report::Addresses;

use checkpoint::Checkpoint;
use session::{Held, Session};

/// A caller that says nothing for so long is gone.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(4);
/// How long open calls may take to end once everything they wait for has ended.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Why a worker does not start, or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Options(#[from] config::Error),
    #[error("model `{name}`: {source}")]
    Model { name: evener_proto::ids::ModelName, source: checkpoint::Error },
    #[error("cannot listen on {address}: {reason}; choose another address or port 0")]
    Listen { address: SocketAddr, reason: String },
    #[error("the gRPC server failed: {0}")]
    Server(#[from] tonic::transport::Error),
    #[error("registration: {0}")]
    Registration(#[from] registration::Error),
    #[error("a task of the worker panicked: {reason}")]
    Panicked { reason: String },
}

/// A worker that listens, and has not begun to serve.
pub struct Worker {
    session: Session,
    listener: TcpListener,
    addresses: Addresses,
}

/// Opens and runs a worker until `shutdown`.
///
/// # Errors
/// It could not start, or its server failed.
pub async fn run(options: Options, shutdown: CancellationToken) -> Result<(), Error> {
    Worker::open(options).await?.run(shutdown).await
}

impl Worker {
    /// Checks the options and the model files, and listens.
    ///
    /// # Errors
    /// What could not be, in one sentence.
    pub async fn open(options: Options) -> Result<Self, Error> {
        options.check()?;
        let mut models = Vec::new();
        for config::Model { name, path } in options.models.clone() {
            let open = move || Checkpoint::open_and_keep(&path, options.kept);
            let opened = tokio::task::spawn_blocking(open).await;
            let opened = opened.map_err(|error| Error::Panicked { reason: error.to_string() })?;
            let checkpoint =
                opened.map_err(|source| Error::Model { name: name.clone(), source })?;
            if !checkpoint.unused_tensors.is_empty() {
                let tensors = checkpoint.unused_tensors.join(", ");
                tracing::warn!(model = %name, tensors, "the file has tensors that are not used");
            }
            models.push(Held::new(name, Arc::new(checkpoint), options.max_context));
        }
        let bad_address =
            |address: SocketAddr| move |reason: String| Error::Listen { address, reason };
        let listener = TcpListener::bind(options.listen).await;
        let listener = listener.map_err(|e| bad_address(options.listen)(e.to_string()))?;
        let bound =
            listener.local_addr().map_err(|e| bad_address(options.listen)(e.to_string()))?;
        let rendezvous = Rendezvous::bind(options.collective_listen)
            .map_err(|e| bad_address(options.collective_listen)(e.to_string()))?;
        let addresses = Addresses {
            grpc: advertised(bound, options.advertise_host.as_deref()),
            collective: advertised(rendezvous.local_addr(), options.advertise_host.as_deref()),
        };
        tracing::info!(grpc = addresses.grpc, collective = addresses.collective, "listening");
        Ok(Self { session: Session::new(options, models, rendezvous), listener, addresses })
    }

    #[must_use]
    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    #[must_use]
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Serves until `shutdown`; then lets running sequences finish up to the option's deadline,
    /// leaves its group, and revokes its registration.
    ///
    /// # Errors
    /// The server or a task failed.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), Error> {
        let Self { session, listener, addresses } = self;
        let stop = CancellationToken::new();
        let _stop_on_return = stop.clone().drop_guard();
        let registering = session.options().registry.clone().map(|registry| {
            let record = report::record(&session, &addresses);
            let (session, stop) = (session.clone(), stop.clone());
            let load = move || report::load(&session);
            tokio::spawn(registration::run(registry, record, load, stop))
        });
        let mut server = tokio::spawn(
            Server::builder()
                .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
                .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
                .serve_with_incoming_shutdown(
                    service::Service::server(session.clone()),
                    TcpIncoming::from(listener).with_nodelay(Some(true)),
                    stop.clone().cancelled_owned(),
                ),
        );
        tokio::select! {
            () = shutdown.cancelled() => {}
            ended = &mut server => return joined(ended)?.map_err(Error::from),
        }
        let drain_timeout = session.options().drain_timeout;
        let unfinished = session.shut_down(drain_timeout).await;
        if unfinished > 0 {
            tracing::warn!(unfinished, "sequences were cut off at the drain deadline");
        }
        stop.cancel();
        if let Some(registering) = registering {
            joined(registering.await)??;
        }
        match tokio::time::timeout(CLOSE_TIMEOUT, &mut server).await {
            Ok(ended) => joined(ended)?.map_err(Error::from),
            Err(_) => {
                server.abort(); // a caller that does not hang up; nothing is owed to it
                Ok(())
            }
        }
    }
}

fn joined<T>(result: Result<T, tokio::task::JoinError>) -> Result<T, Error> {
    result.map_err(|error| Error::Panicked { reason: error.to_string() })
}

/// host:port by which others reach `bound`.
fn advertised(bound: SocketAddr, host: Option<&str>) -> String {
    match (host, bound.ip()) {
        (Some(host), _) => format!("{host}:{}", bound.port()),
        // Everywhere is no address to dial; this machine is the best guess.
        (None, IpAddr::V4(ip)) if ip.is_unspecified() => format!("127.0.0.1:{}", bound.port()),
        (None, IpAddr::V6(ip)) if ip.is_unspecified() => format!("[::1]:{}", bound.port()),
        (None, _) => bound.to_string(),
    }
}
