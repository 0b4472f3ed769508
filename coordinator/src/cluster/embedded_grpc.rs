//! The embedded registry across processes: the gRPC service a coordinator offers, and the client
//! that speaks to it.
//!
//! Workers have their own small client (`worker/src/registration.rs`); this one is for further
//! coordinators.

use std::pin::Pin;
use std::time::Duration;

use evener_proto::registry as pb;
use evener_proto::registry::registry_client::RegistryClient;
use evener_proto::registry::registry_server::{Registry as Service, RegistryServer};
use futures::future::{BoxFuture, FutureExt};
use futures::{Stream, StreamExt};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Code, Request, Response, Status};

use super::embedded::Embedded;
use super::registry::{
    Backend, Change, Changes, Entry, Error, Lease, LeaseId, Put, Revision, Snapshot,
};

/// Serves `registry` on `listener` until `shutdown`; watches are ended then, calls have a second to
/// finish.
///
/// # Errors
/// The listener failed.
pub async fn serve(
    listener: TcpListener,
    registry: Embedded,
    shutdown: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    let service = RegistryServer::new(Offered { registry, shutdown: shutdown.clone() })
        .max_decoding_message_size(evener_proto::MAX_MESSAGE_BYTES)
        .max_encoding_message_size(evener_proto::MAX_MESSAGE_BYTES);
    let serving = Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(5)))
        .http2_keepalive_timeout(Some(Duration::from_secs(5)))
        .serve_with_incoming_shutdown(
            service,
            TcpIncoming::from(listener).with_nodelay(Some(true)),
            shutdown.clone().cancelled_owned(),
        );
    let grace = async {
        shutdown.cancelled().await;
        tokio::time::sleep(Duration::from_secs(1)).await;
    };
    tokio::select! {
        served = serving => served,
        () = grace => Ok(()),
    }
}

/// The service: translates, decides nothing.
struct Offered {
    registry: Embedded,
    shutdown: CancellationToken,
}

fn status(error: &Error) -> Status {
    let code = match error {
        Error::Retryable { .. } => Code::Unavailable,
        Error::LeaseGone(_) => Code::NotFound,
        Error::Compacted { .. } => Code::OutOfRange,
        Error::Terminal { .. } => Code::InvalidArgument,
    };
    Status::new(code, error.to_string())
}

fn lease_of(id: i64) -> Option<LeaseId> {
    (id != 0).then_some(LeaseId(id))
}

fn key_of(key: String) -> Result<String, Status> {
    const MAX_KEY_LEN: usize = 512;
    if key.is_empty() || key.len() > MAX_KEY_LEN {
        let len = key.len();
        return Err(Status::invalid_argument(format!(
            "a key has 1 to {MAX_KEY_LEN} bytes, not {len}"
        )));
    }
    Ok(key)
}

#[tonic::async_trait]
impl Service for Offered {
    async fn grant(
        &self,
        request: Request<pb::GrantRequest>,
    ) -> Result<Response<pb::GrantResponse>, Status> {
        let granted = self.registry.grant(request.into_inner().ttl_s).await;
        let lease = granted.map_err(|error| status(&error))?;
        let ttl_s = u32::try_from(lease.ttl.as_secs()).unwrap_or(u32::MAX);
        Ok(Response::new(pb::GrantResponse { lease_id: lease.id.0, ttl_s }))
    }

    async fn keep_alive(
        &self,
        request: Request<pb::KeepAliveRequest>,
    ) -> Result<Response<pb::KeepAliveResponse>, Status> {
        let id = LeaseId(request.into_inner().lease_id);
        self.registry.keep_alive(id).await.map_err(|error| status(&error))?;
        Ok(Response::new(pb::KeepAliveResponse { ttl_s: 0 }))
    }

    async fn revoke(
        &self,
        request: Request<pb::RevokeRequest>,
    ) -> Result<Response<pb::RevokeResponse>, Status> {
        let id = LeaseId(request.into_inner().lease_id);
        self.registry.revoke(id).await.map_err(|error| status(&error))?;
        Ok(Response::new(pb::RevokeResponse {}))
    }

    async fn put(
        &self,
        request: Request<pb::PutRequest>,
    ) -> Result<Response<pb::PutResponse>, Status> {
        let request = request.into_inner();
        let put = Put {
            key: key_of(request.key)?,
            value: request.value,
            lease: lease_of(request.lease_id),
            if_mod_revision: request.if_mod_revision,
        };
        let revision = self.registry.put(put).await.map_err(|error| status(&error))?;
        Ok(Response::new(pb::PutResponse {
            done: revision.is_some(),
            revision: revision.unwrap_or(0),
        }))
    }

    async fn delete(
        &self,
        request: Request<pb::DeleteRequest>,
    ) -> Result<Response<pb::DeleteResponse>, Status> {
        let request = request.into_inner();
        let deleted = self.registry.delete(key_of(request.key)?, request.if_mod_revision).await;
        let done = deleted.map_err(|error| status(&error))?;
        Ok(Response::new(pb::DeleteResponse { done, revision: 0 }))
    }

    async fn get(
        &self,
        request: Request<pb::GetRequest>,
    ) -> Result<Response<pb::GetResponse>, Status> {
        let got = self.registry.get(request.into_inner().prefix).await;
        let snapshot = got.map_err(|error| status(&error))?;
        let entry = |entry: Entry| pb::Entry {
            key: entry.key,
            value: entry.value,
            mod_revision: entry.mod_revision,
            lease_id: 0,
        };
        Ok(Response::new(pb::GetResponse {
            entries: snapshot.entries.into_iter().map(entry).collect(),
            revision: snapshot.revision,
        }))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<pb::WatchResponse, Status>> + Send>>;

    async fn watch(
        &self,
        request: Request<pb::WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let request = request.into_inner();
        let watched = self.registry.watch(request.prefix, request.from_revision).await;
        let changes = watched.map_err(|error| status(&error))?;
        let event = |change: Change| pb::Event {
            key: change.key,
            value: change.value,
            mod_revision: change.mod_revision,
        };
        let responses = changes.map(move |batch| match batch {
            Ok(batch) => Ok(pb::WatchResponse {
                revision: batch.iter().map(|change| change.mod_revision).max().unwrap_or(0),
                events: batch.into_iter().map(event).collect(),
            }),
            Err(error) => Err(status(&error)),
        });
        // Without this, open watches would hold up the shutdown.
        let ended = self.shutdown.clone().cancelled_owned();
        Ok(Response::new(Box::pin(responses.take_until(ended))))
    }
}

/// Deadlines of a client.
#[derive(Debug, Clone)]
pub struct RemoteOptions {
    pub connect_timeout: Duration,
    pub request_timeout: Duration,
}

impl Default for RemoteOptions {
    fn default() -> Self {
        Self { connect_timeout: Duration::from_secs(2), request_timeout: Duration::from_secs(3) }
    }
}

/// The embedded registry of another process.
#[derive(Debug, Clone)]
pub struct Remote {
    address: String,
    client: RegistryClient<Channel>,
    request_timeout: Duration,
}

impl Remote {
    /// A client of the registry at `address` (host:port); connects when first used, and again after
    /// a break.
    ///
    /// # Errors
    /// The address is none.
    pub fn new(address: &str, options: &RemoteOptions) -> Result<Self, Error> {
        let refused = |detail: String| Error::Terminal {
            registry: format!("embedded://{address}"),
            call: "connect",
            detail,
        };
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|error| refused(format!("{error}; expected HOST:PORT")))?
            .connect_timeout(options.connect_timeout)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(Duration::from_secs(2))
            .keep_alive_timeout(Duration::from_secs(4))
            .keep_alive_while_idle(true);
        let client = RegistryClient::new(endpoint.connect_lazy())
            .max_decoding_message_size(evener_proto::MAX_MESSAGE_BYTES);
        let request_timeout = options.request_timeout;
        Ok(Self { address: address.to_owned(), client, request_timeout })
    }

    fn error(&self, call: &'static str, status: &Status, asked: Asked) -> Error {
        let registry = self.describe();
        let detail = status.message().to_owned();
        match (status.code(), asked) {
            (Code::NotFound, Asked::Lease(lease)) => Error::LeaseGone(lease),
            (Code::OutOfRange, Asked::From(asked)) => Error::Compacted { asked },
            (Code::InvalidArgument | Code::Unimplemented, _) => {
                Error::Terminal { registry, call, detail }
            }
            (code, _) => Error::Retryable { registry, call, detail: format!("{code:?}: {detail}") },
        }
    }

    /// One call with its deadline.
    async fn call<T>(
        &self,
        call: &'static str,
        asked: Asked,
        answer: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Error> {
        match tokio::time::timeout(self.request_timeout, answer).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(self.error(call, &status, asked)),
            Err(_) => Err(Error::Retryable {
                registry: self.describe(),
                call,
                detail: format!("nothing within {:?}", self.request_timeout),
            }),
        }
    }
}

/// What a call was about, to class its refusal.
#[derive(Debug, Clone, Copy)]
enum Asked {
    Nothing,
    Lease(Option<LeaseId>),
    From(Revision),
}

impl Backend for Remote {
    fn describe(&self) -> String {
        format!("embedded://{}", self.address)
    }

    fn grant(&self, ttl_s: u32) -> BoxFuture<'_, Result<Lease, Error>> {
        let mut client = self.client.clone();
        async move {
            let answer = client.grant(pb::GrantRequest { ttl_s });
            let granted = self.call("grant", Asked::Nothing, answer).await?;
            let ttl = Duration::from_secs(u64::from(granted.ttl_s));
            Ok(Lease { id: LeaseId(granted.lease_id), ttl })
        }
        .boxed()
    }

    fn keep_alive(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), Error>> {
        let mut client = self.client.clone();
        async move {
            let answer = client.keep_alive(pb::KeepAliveRequest { lease_id: lease.0 });
            self.call("keep_alive", Asked::Lease(Some(lease)), answer).await.map(|_| ())
        }
        .boxed()
    }

    fn revoke(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), Error>> {
        let mut client = self.client.clone();
        async move {
            let answer = client.revoke(pb::RevokeRequest { lease_id: lease.0 });
            self.call("revoke", Asked::Nothing, answer).await.map(|_| ())
        }
        .boxed()
    }

    fn put(&self, put: Put) -> BoxFuture<'_, Result<Option<Revision>, Error>> {
        let mut client = self.client.clone();
        async move {
            let lease = put.lease;
            let answer = client.put(pb::PutRequest {
                key: put.key,
                value: put.value,
                lease_id: lease.map_or(0, |lease| lease.0),
                if_mod_revision: put.if_mod_revision,
            });
            let response = self.call("put", Asked::Lease(lease), answer).await?;
            Ok(response.done.then_some(response.revision))
        }
        .boxed()
    }

    fn delete(
        &self,
        key: String,
        if_mod_revision: Option<Revision>,
    ) -> BoxFuture<'_, Result<bool, Error>> {
        let mut client = self.client.clone();
        async move {
            let answer = client.delete(pb::DeleteRequest { key, if_mod_revision });
            Ok(self.call("delete", Asked::Nothing, answer).await?.done)
        }
        .boxed()
    }

    fn get(&self, prefix: String) -> BoxFuture<'_, Result<Snapshot, Error>> {
        let mut client = self.client.clone();
        async move {
            let answer = client.get(pb::GetRequest { prefix });
            let got = self.call("get", Asked::Nothing, answer).await?;
            let entry = |entry: pb::Entry| Entry {
                key: entry.key,
                value: entry.value,
                mod_revision: entry.mod_revision,
            };
            let entries = got.entries.into_iter().map(entry).collect();
            Ok(Snapshot { entries, revision: got.revision })
        }
        .boxed()
    }

    fn watch(&self, prefix: String, from: Revision) -> BoxFuture<'_, Result<Changes, Error>> {
        let mut client = self.client.clone();
        async move {
            let asked = Asked::From(from);
            let answer = client.watch(pb::WatchRequest { prefix, from_revision: from });
            let responses = self.call("watch", asked, answer).await?;
            let change = |event: pb::Event| Change {
                key: event.key,
                value: event.value,
                mod_revision: event.mod_revision,
            };
            let remote = self.clone();
            let changes = responses.map(move |response| match response {
                Ok(response) => Ok(response.events.into_iter().map(change).collect()),
                Err(status) => Err(remote.error("watch", &status, asked)),
            });
            let changes: Changes = Box::pin(changes);
            Ok(changes)
        }
        .boxed()
    }
}
