//! Keeps this worker in the registry: a lease, its WorkerRecord, and a LoadReport each second under
//! the same lease.
//!
//! A registry that is away is waited for, for ever and with backoff; a lease that is gone is
//! replaced under the same identity. Serving never depends on it. It speaks to etcd and to a
//! coordinator's embedded registry by the few calls it needs; the coordinator has its own, fuller
//! client.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use evener_proto::etcd::kv_client::KvClient;
use evener_proto::etcd::lease_client::LeaseClient;
use evener_proto::ids::WorkerId;
use evener_proto::registry::registry_client::RegistryClient;
use evener_proto::registry::{LoadReport, WorkerRecord};
use evener_proto::{Message, etcd, keys, registry};
use futures::StreamExt;
use tokio_util::bytes::Bytes;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status};

/// How a worker registers.
#[derive(Debug, Clone)]
pub struct Options {
    pub registry: Place,
    /// How long the registry keeps this worker without hearing of it. etcd grants 2 s at least.
    pub lease_ttl_s: u32,
    /// Between two load reports.
    pub load_interval: Duration,
    pub connect_timeout: Duration,
    /// Of one call; several must fit into the lease.
    pub request_timeout: Duration,
    /// First pause after a failed call; doubles up to `backoff_max`, with jitter.
    pub backoff_min: Duration,
    pub backoff_max: Duration,
}

impl Options {
    /// The defaults, at `registry`.
    #[must_use]
    pub fn at(registry: Place) -> Self {
        Self {
            registry,
            lease_ttl_s: 5,
            load_interval: Duration::from_secs(1),
            connect_timeout: Duration::from_secs(1),
            request_timeout: Duration::from_millis(1500),
            backoff_min: Duration::from_millis(100),
            backoff_max: Duration::from_secs(2),
        }
    }
}

/// Where the registry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// `etcd://HOST:PORT[,HOST:PORT]`: the members of one etcd cluster.
    Etcd(Vec<Address>),
    /// `embedded://HOST:PORT`: the registry inside a coordinator.
    Embedded(Address),
}

/// A checked host:port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address(String);

/// Why this worker is not registered, or could not be.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "`{text}` is no registry; expected etcd://HOST:PORT[,HOST:PORT] or embedded://HOST:PORT"
    )]
    BadPlace { text: String },
    #[error(transparent)]
    BadId(#[from] evener_proto::ids::Error),
    #[error("the registry at {at} did not answer {call}: {detail}")]
    Retryable { at: String, call: &'static str, detail: String },
    #[error("the lease is gone")]
    LeaseGone,
    #[error("the registry at {at} refused {call}: {detail}")]
    Terminal { at: String, call: &'static str, detail: String },
}

impl Place {
    /// # Errors
    /// Neither form.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let bad = || Error::BadPlace { text: text.to_owned() };
        let endpoint = |part: &str| {
            let (host, port) = part.rsplit_once(':').ok_or_else(bad)?;
            let port = port.parse::<u16>().map_err(|_| bad())?;
            let known = !host.is_empty() && !host.contains(['/', '@', ' ', ',']) && port != 0;
            let usable = Endpoint::from_shared(format!("http://{part}")).is_ok();
            if known && usable { Ok(Address(part.to_owned())) } else { Err(bad()) }
        };
        if let Some(rest) = text.strip_prefix("etcd://") {
            return Ok(Self::Etcd(rest.split(',').map(endpoint).collect::<Result<_, _>>()?));
        }
        let rest = text.strip_prefix("embedded://").ok_or_else(bad)?;
        Ok(Self::Embedded(endpoint(rest)?))
    }
}

/// Keeps `record` and what `load` says registered until `shutdown`, then revokes the lease.
///
/// # Errors
/// The record's id could not stand in a key. Nothing else ends it.
pub async fn run(
    options: Options,
    record: WorkerRecord,
    load: impl Fn() -> LoadReport + Send,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    let id = WorkerId::parse(&record.worker_id)?;
    let mut registration = Registration {
        client: Client::new(&options),
        lease: None,
        record: (keys::worker(&id), encode(&record)),
        load_key: keys::load(&id),
        options,
    };
    let mut pause = registration.options.backoff_min;
    let mut away = false;
    while !shutdown.is_cancelled() {
        let report = LoadReport { worker_id: id.to_string(), unix_ms: unix_ms(), ..load() };
        let registered = tokio::select! {
            registered = registration.renew(&report) => registered,
            () = shutdown.cancelled() => break,
        };
        let wait = match registered {
            Ok(()) => {
                if std::mem::take(&mut away) {
                    tracing::info!(worker = %id, "registry is back");
                }
                pause = registration.options.backoff_min;
                registration.options.load_interval
            }
            Err(error) => {
                away = registration.cope(&error, away);
                let wait = jitter(pause);
                pause = (pause * 2).min(registration.options.backoff_max);
                wait
            }
        };
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = shutdown.cancelled() => break,
        }
    }
    registration.revoke().await;
    Ok(())
}

struct Held {
    lease_id: i64,
    /// Keep-alives come three to a lease.
    renew_every: Duration,
    renewed: Instant,
    /// The WorkerRecord stands under this lease.
    recorded: bool,
}

struct Registration {
    options: Options,
    client: Client,
    lease: Option<Held>,
    record: (String, Bytes),
    load_key: String,
}

impl Registration {
    /// Brings the registry up to date: lease, record, load.
    async fn renew(&mut self, report: &LoadReport) -> Result<(), Error> {
        if self.lease.is_none() {
            let (lease_id, ttl) = self.client.grant(self.options.lease_ttl_s).await?;
            let renewed = Instant::now();
            self.lease = Some(Held { lease_id, renew_every: ttl / 3, renewed, recorded: false });
        }
        let renewed = self.renew_held(report).await;
        // Only the registry says that a lease is gone.
        if matches!(renewed, Err(Error::LeaseGone)) {
            self.lease = None;
        }
        renewed
    }

    async fn renew_held(&mut self, report: &LoadReport) -> Result<(), Error> {
        let Some(held) = &mut self.lease else { return Ok(()) };
        let begun = Instant::now();
        if held.renewed.elapsed() >= held.renew_every {
            self.client.keep_alive(held.lease_id).await?;
            held.renewed = begun;
        }
        // The load goes first: who sees the worker also sees which epoch it serves.
        self.client.put(self.load_key.clone(), encode(report), held.lease_id).await?;
        if !held.recorded {
            let (key, value) = self.record.clone();
            self.client.put(key, value, held.lease_id).await?;
            held.recorded = true;
            tracing::info!(registry = self.client.at(), lease = held.lease_id, "registered");
        }
        Ok(())
    }

    /// Logs a failure once per outage and turns to the next endpoint; says whether the registry
    /// counts as away.
    fn cope(&mut self, error: &Error, was_away: bool) -> bool {
        if matches!(error, Error::LeaseGone) {
            tracing::warn!("lease gone, registering again");
            return was_away;
        }
        if matches!(error, Error::Terminal { .. }) {
            tracing::error!(%error, "registration refused, trying again");
        } else if !was_away {
            tracing::warn!(%error, "registry away, trying on");
        }
        self.client.turn();
        true
    }

    async fn revoke(&mut self) {
        if let Some(held) = self.lease.take()
            && let Err(error) = self.client.revoke(held.lease_id).await
        {
            tracing::debug!(%error, "lease not revoked, it will run out");
        }
    }
}

/// The few calls a worker makes, to either registry.
struct Client {
    kind: Kind,
    timeout: Duration,
}

enum Kind {
    Etcd { members: Vec<(String, Channel)>, current: usize },
    Embedded { at: String, client: RegistryClient<Channel> },
}

impl Client {
    fn new(options: &Options) -> Self {
        let channel = |endpoint: &Address| {
            Endpoint::from_shared(format!("http://{}", endpoint.0))
                .expect("Place::parse made one of the same text")
                .connect_timeout(options.connect_timeout)
                .tcp_nodelay(true)
                .connect_lazy()
        };
        let kind = match &options.registry {
            Place::Etcd(members) => Kind::Etcd {
                members: members.iter().map(|m| (m.0.clone(), channel(m))).collect(),
                current: 0,
            },
            Place::Embedded(at) => {
                Kind::Embedded { at: at.0.clone(), client: RegistryClient::new(channel(at)) }
            }
        };
        Self { kind, timeout: options.request_timeout }
    }

    fn at(&self) -> &str {
        match &self.kind {
            Kind::Etcd { members, current } => &members[*current].0,
            Kind::Embedded { at, .. } => at,
        }
    }

    /// The next endpoint, if there are several.
    fn turn(&mut self) {
        if let Kind::Etcd { members, current } = &mut self.kind {
            *current = (*current + 1) % members.len();
        }
    }

    fn kv(members: &[(String, Channel)], current: usize) -> KvClient<Channel> {
        KvClient::new(members[current].1.clone())
    }

    fn leases(members: &[(String, Channel)], current: usize) -> LeaseClient<Channel> {
        LeaseClient::new(members[current].1.clone())
    }

    async fn grant(&self, ttl_s: u32) -> Result<(i64, Duration), Error> {
        match &self.kind {
            Kind::Etcd { members, current } => {
                let mut client = Self::leases(members, *current);
                let request = etcd::LeaseGrantRequest { ttl: i64::from(ttl_s), id: 0 };
                let granted = self.call("grant", client.lease_grant(request)).await?;
                Ok((granted.id, Duration::from_secs(u64::try_from(granted.ttl).unwrap_or(1))))
            }
            Kind::Embedded { client, .. } => {
                let mut client = client.clone();
                let granted =
                    self.call("grant", client.grant(registry::GrantRequest { ttl_s })).await?;
                Ok((granted.lease_id, Duration::from_secs(u64::from(granted.ttl_s))))
            }
        }
    }

    async fn keep_alive(&self, lease_id: i64) -> Result<(), Error> {
        match &self.kind {
            Kind::Etcd { members, current } => {
                let mut client = Self::leases(members, *current);
                let once = futures::stream::iter([etcd::LeaseKeepAliveRequest { id: lease_id }]);
                let answer = async {
                    let mut answers = client.lease_keep_alive(once).await?.into_inner();
                    let first = answers.next().await;
                    first
                        .unwrap_or_else(|| Err(Status::unavailable("no answer")))
                        .map(Response::new)
                };
                // A lease that is gone is answered, with no time to live.
                let kept = self.call("keep_alive", answer).await?;
                if kept.ttl > 0 { Ok(()) } else { Err(Error::LeaseGone) }
            }
            Kind::Embedded { client, .. } => {
                let mut client = client.clone();
                let request = registry::KeepAliveRequest { lease_id };
                self.call("keep_alive", client.keep_alive(request)).await.map(|_| ())
            }
        }
    }

    async fn put(&self, key: String, value: Bytes, lease_id: i64) -> Result<(), Error> {
        match &self.kind {
            Kind::Etcd { members, current } => {
                let mut client = Self::kv(members, *current);
                let request = etcd::PutRequest { key: Bytes::from(key), value, lease: lease_id };
                self.call("put", client.put(request)).await.map(|_| ())
            }
            Kind::Embedded { client, .. } => {
                let mut client = client.clone();
                let request = registry::PutRequest { key, value, lease_id, if_mod_revision: None };
                self.call("put", client.put(request)).await.map(|_| ())
            }
        }
    }

    async fn revoke(&self, lease_id: i64) -> Result<(), Error> {
        match &self.kind {
            Kind::Etcd { members, current } => {
                let mut client = Self::leases(members, *current);
                let request = etcd::LeaseRevokeRequest { id: lease_id };
                self.call("revoke", client.lease_revoke(request)).await.map(|_| ())
            }
            Kind::Embedded { client, .. } => {
                let mut client = client.clone();
                let request = registry::RevokeRequest { lease_id };
                self.call("revoke", client.revoke(request)).await.map(|_| ())
            }
        }
    }

    /// One call with its deadline, its failure classed.
    async fn call<T>(
        &self,
        call: &'static str,
        answer: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Error> {
        let at = || self.at().to_owned();
        let status = match tokio::time::timeout(self.timeout, answer).await {
            Ok(Ok(response)) => return Ok(response.into_inner()),
            Ok(Err(status)) => status,
            Err(_) => {
                let detail = format!("nothing within {:?}", self.timeout);
                return Err(Error::Retryable { at: at(), call, detail });
            }
        };
        let detail = format!("{:?}: {}", status.code(), status.message());
        Err(match status.code() {
            Code::NotFound => Error::LeaseGone,
            Code::InvalidArgument
            | Code::Unimplemented
            | Code::PermissionDenied
            | Code::Unauthenticated => Error::Terminal { at: at(), call, detail },
            _ => Error::Retryable { at: at(), call, detail },
        })
    }
}

fn encode(message: &impl Message) -> Bytes {
    message.encode_to_vec().into()
}

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// Between half and all of `pause`, so that workers who lost the registry together do not come back
/// together.
fn jitter(pause: Duration) -> Duration {
    let random = RandomState::new().build_hasher().finish();
    let fraction = 0.5 + f64::from((random >> 33) as u32) / f64::from(1u32 << 31) / 2.0;
    pause.mul_f64(fraction)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn places_are_checked_when_parsed() {
        for good in ["etcd://127.0.0.1:2379", "etcd://a:1,b:2", "embedded://[::1]:7000"] {
            Place::parse(good).unwrap();
        }
        for bad in [
            "",
            "etcd://",
            "etcd://a",
            "etcd://a:0",
            "etcd://a:99999",
            "embedded://a:1,b:2x",
            "http://a:1",
            "etcd://a:1,,b:2",
            "embedded://u@a:1",
            "embedded://a:1/x",
        ] {
            let error = Place::parse(bad).unwrap_err().to_string();
            assert!(error.contains("expected etcd://"), "{bad}: {error}");
        }
    }

    #[test]
    fn jitter_stays_between_half_and_all() {
        for _ in 0..1000 {
            let pause = jitter(Duration::from_secs(1));
            assert!(pause >= Duration::from_millis(500) && pause <= Duration::from_secs(1));
        }
    }
}
