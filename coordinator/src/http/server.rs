//! Sockets of the API: accepts, bounds and owns the connections, and drains them on shutdown.

use std::convert::Infallible;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::available_parallelism;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;
use tracing::{debug, info, warn};

use super::socket::Socket;
use super::{App, Options, View, router};
use crate::generation::Runner;
use crate::group::stream::Streams;
use crate::metrics::Metrics;
use crate::text;

/// Head of a request, bytes; hyper refuses a larger one.
const MAX_HEAD_BYTES: usize = 64 << 10;
const MAX_HEADERS: usize = 100;
/// For error events and last bytes, once nothing more is waited for.
const CLOSING: Duration = Duration::from_secs(2);
/// After a failed accept (no descriptors left, say).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why the API cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the listening socket has no address: {0}")]
    Listener(#[source] std::io::Error),
}

/// Serves the API until `shutdown`, then drains: not ready at once, no new requests, and what is
/// being answered has `drain_timeout` to be finished.
///
/// # Errors
/// The listener is not one.
pub async fn run(
    listener: TcpListener,
    view: View,
    options: Options,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), Error> {
    let address = listener.local_addr().map_err(Error::Listener)?;
    let View { directory, status, figures } = view;
    let metrics = Metrics::new(figures, options.tracer.clone());
    let stop = CancellationToken::new();
    let runner = Runner {
        directory: directory.clone(),
        streams: Streams::new(options.stream.clone()),
        options: Arc::new(options.generation.clone()),
        metrics: metrics.clone(),
        stop: stop.clone(),
    };
    let app = App {
        requests: Arc::new(Semaphore::new(options.max_requests)),
        encoders: Arc::new(Semaphore::new(available_parallelism().map_or(1, Into::into))),
        options: Arc::new(options),
        directory,
        status,
        runner,
        texts: text::Cache::default(),
        metrics,
        draining: Arc::new(AtomicBool::new(false)),
    };
    info!(%address, "serving the API");
    let closing = CancellationToken::new();
    let mut server = Server {
        connections: JoinSet::new(),
        slots: Arc::new(Semaphore::new(app.options.max_connections)),
        router: router(app.clone()),
        header_timeout: app.options.header_timeout,
        write_timeout: app.options.write_timeout,
        closing: closing.clone(),
        listener,
    };
    server.serve_until(shutdown).await;
    app.draining.store(true, Ordering::Relaxed);
    info!(%address, "shutting down: finishing what is being answered");
    let deadline = Instant::now() + app.options.drain_timeout;
    let all = u32::try_from(app.options.max_requests).unwrap_or(u32::MAX);
    let finished = async {
        // Every permit back means that nothing is being answered. Late comers are refused.
        let _all = app.requests.acquire_many(all).await;
    };
    tokio::select! {
        () = server.serve_until(finished) => {}
        () = tokio::time::sleep_until(deadline) => {
            warn!(%address, "requests are still running after the drain timeout; ending them");
        }
    }
    stop.cancel();
    closing.cancel();
    server.close(Instant::now() + CLOSING).await;
    Ok(())
}

struct Server {
    listener: TcpListener,
    connections: JoinSet<()>,
    /// One permit a connection.
    slots: Arc<Semaphore>,
    router: Router,
    header_timeout: Duration,
    write_timeout: Duration,
    /// Lets connections finish their request and end.
    closing: CancellationToken,
}

impl Server {
    async fn serve_until(&mut self, event: impl Future<Output = ()> + Send) {
        let mut event = std::pin::pin!(event);
        loop {
            tokio::select! {
                () = &mut event => return,
                Some(_) = self.connections.join_next() => {}
                accepted = accept(&self.listener, &self.slots) => match accepted {
                    Ok((socket, slot)) => self.spawn(socket, slot),
                    Err(error) => {
                        warn!(%error, "cannot accept a connection");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
    }

    fn spawn(&mut self, socket: TcpStream, slot: OwnedSemaphorePermit) {
        // Tokens are small and each should leave at once.
        if let Err(error) = socket.set_nodelay(true) {
            debug!(%error, "cannot set TCP_NODELAY");
        }
        let service = self
            .router
            .clone()
            .map_request(|request: hyper::Request<Incoming>| request.map(Body::new))
            .map_err(|e: Infallible| match e {});
        let mut builder = hyper::server::conn::http1::Builder::new();
        builder
            .timer(TokioTimer::new())
            .header_read_timeout(self.header_timeout)
            .max_headers(MAX_HEADERS)
            .max_buf_size(MAX_HEAD_BYTES);
        let io = TokioIo::new(Socket::new(socket, self.write_timeout));
        let connection = builder.serve_connection(io, TowerToHyperService::new(service));
        let closing = self.closing.clone();
        self.connections.spawn(async move {
            let _slot = slot;
            let mut connection = std::pin::pin!(connection);
            let result = tokio::select! {
                result = &mut connection => result,
                () = closing.cancelled() => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            if let Err(error) = result {
                debug!(%error, "connection ended");
            }
        });
    }

    /// Waits for the connections to end, and ends those that do not.
    async fn close(mut self, deadline: Instant) {
        drop(self.listener);
        let all = async { while self.connections.join_next().await.is_some() {} };
        if tokio::time::timeout_at(deadline, all).await.is_err() {
            self.connections.shutdown().await;
        }
    }
}

async fn accept(
    listener: &TcpListener,
    slots: &Arc<Semaphore>,
) -> std::io::Result<(TcpStream, OwnedSemaphorePermit)> {
    let slot = slots.clone().acquire_owned().await.map_err(std::io::Error::other)?;
    let (socket, _) = listener.accept().await?;
    Ok((socket, slot))
}
