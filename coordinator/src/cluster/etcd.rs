//! The registry in etcd, over the few calls of its v3 API that `proto/etcd.proto` states.
//!
//! One call is one try at one member, with a deadline; a member that does not answer makes room for
//! the next. Trying again is the caller's: it knows whether that is safe.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use evener_proto::etcd as pb;
use evener_proto::etcd::kv_client::KvClient;
use evener_proto::etcd::lease_client::LeaseClient;
use evener_proto::etcd::watch_client::WatchClient;
use futures::future::{BoxFuture, FutureExt};
use futures::{StreamExt, stream};
use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status, Streaming};

use super::registry::{
    Backend, Change, Changes, Entry, Error, Lease, LeaseId, Put, Revision, Snapshot,
};

/// Deadlines towards etcd.
#[derive(Debug, Clone)]
pub struct Options {
    pub connect_timeout: Duration,
    /// Of one call to one member.
    pub request_timeout: Duration,
    /// Between two pings on an idle connection, and how long an answer may take. etcd refuses
    /// clients that ping more often than each 5 s.
    pub keepalive_interval: Duration,
    pub keepalive_timeout: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(1),
            request_timeout: Duration::from_secs(2),
            keepalive_interval: Duration::from_secs(6),
            keepalive_timeout: Duration::from_secs(3),
        }
    }
}

/// A client of one etcd cluster.
#[derive(Debug)]
pub struct Etcd {
    options: Options,
    members: Vec<(String, Channel)>,
    /// Index of the member in use.
    current: AtomicUsize,
}

/// What a call was about, to class its refusal.
#[derive(Debug, Clone, Copy)]
enum Asked {
    Nothing,
    Lease(Option<LeaseId>),
}

impl Etcd {
    /// A client of the cluster whose members listen at `addresses` (host:port); connects when first
    /// used.
    ///
    /// # Errors
    /// No address, or one that is none.
    pub fn new(addresses: &[String], options: Options) -> Result<Self, Error> {
        let refused = |detail: String| Error::Terminal {
            registry: format!("etcd://{}", addresses.join(",")),
            call: "connect",
            detail,
        };
        if addresses.is_empty() {
            return Err(refused("no address; expected HOST:PORT".to_owned()));
        }
        let mut members = Vec::new();
        for address in addresses {
            let endpoint = Endpoint::from_shared(format!("http://{address}"))
                .map_err(|error| refused(format!("{address}: {error}; expected HOST:PORT")))?
                .connect_timeout(options.connect_timeout)
                .tcp_nodelay(true)
                .http2_keep_alive_interval(options.keepalive_interval)
                .keep_alive_timeout(options.keepalive_timeout)
                .keep_alive_while_idle(true);
            members.push((address.clone(), endpoint.connect_lazy()));
        }
        Ok(Self { options, members, current: AtomicUsize::new(0) })
    }

    fn member(&self) -> (usize, &(String, Channel)) {
        let idx = self.current.load(Ordering::Relaxed) % self.members.len();
        (idx, &self.members[idx])
    }

    /// Turns away from member `idx`, unless somebody has done so already.
    fn turn_from(&self, idx: usize) {
        let next = (idx + 1) % self.members.len();
        let _ = self.current.compare_exchange(idx, next, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// One call to the current member, with its deadline, its failure classed.
    async fn call<T, F>(
        &self,
        call: &'static str,
        asked: Asked,
        ask: impl FnOnce(Channel) -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let (idx, (address, channel)) = self.member();
        let limit = self.options.request_timeout;
        let error = match tokio::time::timeout(limit, ask(channel.clone())).await {
            Ok(Ok(response)) => return Ok(response.into_inner()),
            Ok(Err(status)) => self.classed(address, call, asked, &status),
            Err(_) => self.retryable(address, call, format!("nothing within {limit:?}")),
        };
        if matches!(error, Error::Retryable { .. }) {
            self.turn_from(idx);
        }
        Err(error)
    }

    fn retryable(&self, address: &str, call: &'static str, detail: String) -> Error {
        Error::Retryable { registry: format!("etcd://{address}"), call, detail }
    }

    fn classed(&self, address: &str, call: &'static str, asked: Asked, status: &Status) -> Error {
        let detail = format!("{:?}: {}", status.code(), status.message());
        match (status.code(), asked) {
            (Code::NotFound, Asked::Lease(lease)) => Error::LeaseGone(lease),
            (
                Code::InvalidArgument
                | Code::Unimplemented
                | Code::PermissionDenied
                | Code::Unauthenticated,
                _,
            ) => Error::Terminal { registry: format!("etcd://{address}"), call, detail },
            _ => self.retryable(address, call, detail),
        }
    }

    async fn txn(
        &self,
        call: &'static str,
        asked: Asked,
        condition: pb::Compare,
        change: pb::request_op::Request,
    ) -> Result<pb::TxnResponse, Error> {
        let request = pb::TxnRequest {
            compare: vec![condition],
            success: vec![pb::RequestOp { request: Some(change) }],
            failure: vec![],
        };
        self.call(call, asked, |channel| async move { KvClient::new(channel).txn(request).await })
            .await
    }
}

/// The key stands at `revision`; 0: it is absent.
fn stands_at(key: &Bytes, revision: Revision) -> pb::Compare {
    pb::Compare {
        result: pb::compare::CompareResult::Equal.into(),
        target: pb::compare::CompareTarget::Mod.into(),
        key: key.clone(),
        target_union: Some(pb::compare::TargetUnion::ModRevision(revision)),
        range_end: Bytes::new(),
    }
}

/// The first key after all that start with `prefix`, as etcd's `range_end`.
fn after(prefix: &str) -> Bytes {
    let mut end = prefix.as_bytes().to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return end.into();
        }
    }
    // To the end of the key space.
    Bytes::from_static(b"\0")
}

/// etcd takes no empty key: the smallest is one zero byte.
fn first(prefix: &str) -> Bytes {
    if prefix.is_empty() { Bytes::from_static(b"\0") } else { Bytes::from(prefix.to_owned()) }
}

/// Keys are ours, so they are text; one that is not is shown as well as can be and ignored further
/// up.
fn text(key: &[u8]) -> String {
    String::from_utf8_lossy(key).into_owned()
}

fn revision_of(header: Option<&pb::ResponseHeader>) -> Revision {
    header.map_or(0, |header| header.revision)
}

impl Backend for Etcd {
    fn describe(&self) -> String {
        let addresses: Vec<&str> =
            self.members.iter().map(|(address, _)| address.as_str()).collect();
        format!("etcd://{}", addresses.join(","))
    }

    fn grant(&self, ttl_s: u32) -> BoxFuture<'_, Result<Lease, Error>> {
        let request = pb::LeaseGrantRequest { ttl: i64::from(ttl_s), id: 0 };
        async move {
            let granted = self.call("grant", Asked::Nothing, |channel| async move {
                LeaseClient::new(channel).lease_grant(request).await
            });
            let granted = granted.await?;
            let ttl = Duration::from_secs(u64::try_from(granted.ttl).unwrap_or(0));
            Ok(Lease { id: LeaseId(granted.id), ttl })
        }
        .boxed()
    }

    fn keep_alive(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), Error>> {
        async move {
            let once = stream::iter([pb::LeaseKeepAliveRequest { id: lease.0 }]);
            let kept = self.call("keep_alive", Asked::Lease(Some(lease)), |channel| async move {
                let answers = LeaseClient::new(channel).lease_keep_alive(once).await?;
                let first = answers.into_inner().message().await?;
                first.map(Response::new).ok_or_else(|| Status::unavailable("no answer"))
            });
            // A lease that is gone is answered, with no time to live.
            if kept.await?.ttl > 0 { Ok(()) } else { Err(Error::LeaseGone(Some(lease))) }
        }
        .boxed()
    }

    fn revoke(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), Error>> {
        async move {
            let request = pb::LeaseRevokeRequest { id: lease.0 };
            let revoked = self.call("revoke", Asked::Lease(Some(lease)), |channel| async move {
                LeaseClient::new(channel).lease_revoke(request).await
            });
            match revoked.await {
                Ok(_) | Err(Error::LeaseGone(_)) => Ok(()),
                Err(error) => Err(error),
            }
        }
        .boxed()
    }

    fn put(&self, put: Put) -> BoxFuture<'_, Result<Option<Revision>, Error>> {
        async move {
            let asked = Asked::Lease(put.lease);
            let request = pb::PutRequest {
                key: put.key.into(),
                value: put.value,
                lease: put.lease.map_or(0, |lease| lease.0),
            };
            let Some(revision) = put.if_mod_revision else {
                let done = self.call("put", asked, |channel| async move {
                    KvClient::new(channel).put(request).await
                });
                return Ok(Some(revision_of(done.await?.header.as_ref())));
            };
            let condition = stands_at(&request.key, revision);
            let change = pb::request_op::Request::RequestPut(request);
            let done = self.txn("put", asked, condition, change).await?;
            Ok(done.succeeded.then(|| revision_of(done.header.as_ref())))
        }
        .boxed()
    }

    fn delete(
        &self,
        key: String,
        if_mod_revision: Option<Revision>,
    ) -> BoxFuture<'_, Result<bool, Error>> {
        async move {
            let request = pb::DeleteRangeRequest { key: key.into(), range_end: Bytes::new() };
            let Some(revision) = if_mod_revision else {
                let done = self.call("delete", Asked::Nothing, |channel| async move {
                    KvClient::new(channel).delete_range(request).await
                });
                return done.await.map(|_| true);
            };
            let condition = stands_at(&request.key, revision);
            let change = pb::request_op::Request::RequestDeleteRange(request);
            Ok(self.txn("delete", Asked::Nothing, condition, change).await?.succeeded)
        }
        .boxed()
    }

    fn get(&self, prefix: String) -> BoxFuture<'_, Result<Snapshot, Error>> {
        async move {
            let request = pb::RangeRequest {
                key: first(&prefix),
                range_end: after(&prefix),
                limit: 0,
                revision: 0,
            };
            let got = self.call("get", Asked::Nothing, |channel| async move {
                let mut client = KvClient::new(channel)
                    .max_decoding_message_size(evener_proto::MAX_MESSAGE_BYTES);
                client.range(request).await
            });
            let got = got.await?;
            let entry = |kv: pb::KeyValue| Entry {
                key: text(&kv.key),
                value: kv.value,
                mod_revision: kv.mod_revision,
            };
            let revision = revision_of(got.header.as_ref());
            Ok(Snapshot { entries: got.kvs.into_iter().map(entry).collect(), revision })
        }
        .boxed()
    }

    fn watch(&self, prefix: String, from: Revision) -> BoxFuture<'_, Result<Changes, Error>> {
        async move {
            let (idx, (address, _)) = self.member();
            let opened = self.call("watch", Asked::Nothing, |channel| open(channel, prefix, from));
            let (created, rest) = opened.await?;
            // A revision from the future: this etcd has lost its data, or is another one.
            let is_ahead = from > revision_of(created.header.as_ref()) + 1;
            if is_ahead || created.compact_revision > 0 {
                return Err(Error::Compacted { asked: from });
            }
            let broken = |status: &Status| {
                self.turn_from(idx);
                self.classed(address, "watch", Asked::Nothing, status)
            };
            if created.canceled {
                return Err(broken(&Status::unavailable(created.cancel_reason)));
            }
            let place = self.describe();
            let changes = rest.filter_map(move |response| {
                let changes = response
                    .map_err(|status| Error::Retryable {
                        registry: place.clone(),
                        call: "watch",
                        detail: format!("{:?}: {}", status.code(), status.message()),
                    })
                    .and_then(|response| changes(response, from, &place));
                // Progress notes carry nothing.
                let news = !matches!(&changes, Ok(changes) if changes.is_empty());
                async move { news.then_some(changes) }
            });
            let changes: Changes = Box::pin(changes);
            Ok(changes)
        }
        .boxed()
    }
}

/// Opens a watch and waits until etcd says it stands. No fragments are asked for, so a response
/// holds whole revisions.
async fn open(
    channel: Channel,
    prefix: String,
    from: Revision,
) -> Result<Response<(pb::WatchResponse, Streaming<pb::WatchResponse>)>, Status> {
    let create = pb::WatchCreateRequest {
        key: first(&prefix),
        range_end: after(&prefix),
        start_revision: from,
        progress_notify: false,
    };
    let create = pb::watch_request::RequestUnion::CreateRequest(create);
    // The request side must stay open as long as the watch.
    let requests =
        stream::iter([pb::WatchRequest { request_union: Some(create) }]).chain(stream::pending());
    let mut request = Request::new(requests);
    // A member cut off from its cluster must end the watch instead of keeping silent.
    request.metadata_mut().insert("hasleader", MetadataValue::from_static("true"));
    let mut client =
        WatchClient::new(channel).max_decoding_message_size(evener_proto::MAX_MESSAGE_BYTES);
    let mut responses = client.watch(request).await?.into_inner();
    match responses.message().await? {
        Some(created) => Ok(Response::new((created, responses))),
        None => Err(Status::unavailable("it closed the stream")),
    }
}

fn changes(response: pb::WatchResponse, from: Revision, place: &str) -> Result<Vec<Change>, Error> {
    if response.compact_revision > 0 {
        return Err(Error::Compacted { asked: from });
    }
    if response.canceled {
        return Err(Error::Retryable {
            registry: place.to_owned(),
            call: "watch",
            detail: response.cancel_reason,
        });
    }
    let change = |event: pb::WatchEvent| {
        let deleted = event.r#type() == pb::watch_event::EventType::Delete;
        let kv = event.kv?;
        let value = (!deleted).then_some(kv.value);
        Some(Change { key: text(&kv.key), value, mod_revision: kv.mod_revision })
    };
    Ok(response.events.into_iter().filter_map(change).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_ends_before_the_next_key_that_does_not_start_with_it() {
        for (prefix, end) in [("a/", &b"a0"[..]), ("a", b"b"), ("", b"\0"), ("ab\u{7f}", b"ab\x80")]
        {
            assert_eq!(after(prefix), end, "{prefix:?}");
        }
    }
}
