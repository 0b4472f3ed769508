//! The registry contract: leases, revisions, conditional puts and watches, whoever keeps them.
//!
//! `etcd.rs` and `embedded.rs` implement [`Backend`]; what is built on top of it (epochs, a watch
//! that survives breaks and compaction) is written once, here. It knows keys and bytes, not what
//! the values mean.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use evener_proto::ids::Epoch;
use evener_proto::keys;
use futures::future::BoxFuture;
use futures::{Stream, StreamExt};
use rand::Rng;
use tokio::sync::mpsc;

/// A point in the registry's history; grows with every change.
pub type Revision = i64;

/// A lease, as the registry numbers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LeaseId(pub i64);

/// A granted lease; the registry may grant longer than asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    pub id: LeaseId,
    pub ttl: Duration,
}

/// One key as it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub key: String,
    pub value: Bytes,
    pub mod_revision: Revision,
}

/// All keys under a prefix, in key order, at one revision.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Snapshot {
    pub entries: Vec<Entry>,
    pub revision: Revision,
}

/// One change of one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    pub key: String,
    /// `None`: deleted, or its lease ended.
    pub value: Option<Bytes>,
    pub mod_revision: Revision,
}

/// What to put.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Put {
    pub key: String,
    pub value: Bytes,
    pub lease: Option<LeaseId>,
    /// Put only if the key stands at this revision; 0: only if it is absent.
    pub if_mod_revision: Option<Revision>,
}

impl Put {
    #[must_use]
    pub fn new(key: impl Into<String>, value: impl Into<Bytes>) -> Self {
        Self { key: key.into(), value: value.into(), lease: None, if_mod_revision: None }
    }

    #[must_use]
    pub fn leased(mut self, lease: LeaseId) -> Self {
        self.lease = Some(lease);
        self
    }

    #[must_use]
    pub fn only_at(mut self, revision: Revision) -> Self {
        self.if_mod_revision = Some(revision);
        self
    }
}

/// What a registry call can fail with, classed where it enters.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Asking again, perhaps elsewhere, may work. The call may or may not have taken effect.
    #[error("the registry {registry} did not answer {call}: {detail}")]
    Retryable { registry: String, call: &'static str, detail: String },
    /// The lease has ended: everything under it is gone, register again.
    #[error("the registry has no lease {0:?} any more")]
    LeaseGone(Option<LeaseId>),
    /// The asked revision is no longer kept: read everything again.
    #[error("revision {asked} is no longer kept by the registry; read it anew")]
    Compacted { asked: Revision },
    /// Asking again will fail again.
    #[error("the registry {registry} refused {call}: {detail}")]
    Terminal { registry: String, call: &'static str, detail: String },
}

/// A bounded stream of changes; it ends with an error, or without one when the registry closes it.
pub type Changes = Pin<Box<dyn Stream<Item = Result<Vec<Change>, Error>> + Send>>;

/// What a registry must be able to do. Every call has its own deadline.
pub trait Backend: Send + Sync + 'static {
    /// Kind and place, for people: `etcd 10.0.0.1:2379`.
    fn describe(&self) -> String;
    fn grant(&self, ttl_s: u32) -> BoxFuture<'_, Result<Lease, Error>>;
    /// # Errors
    /// [`Error::LeaseGone`] if it has ended.
    fn keep_alive(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), Error>>;
    /// Ends a lease and deletes its keys; a lease that is gone is fine.
    fn revoke(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), Error>>;
    /// The new revision, or `None` if the condition did not hold.
    fn put(&self, put: Put) -> BoxFuture<'_, Result<Option<Revision>, Error>>;
    /// Whether the condition held; deleting an absent key is fine.
    fn delete(
        &self,
        key: String,
        if_mod_revision: Option<Revision>,
    ) -> BoxFuture<'_, Result<bool, Error>>;
    fn get(&self, prefix: String) -> BoxFuture<'_, Result<Snapshot, Error>>;
    /// Changes under `prefix` from revision `from` on. A stream item holds whole revisions, oldest
    /// first.
    ///
    /// # Errors
    /// [`Error::Compacted`], here or from the stream, if `from` is no longer kept or lies in a
    /// future that this registry has not seen (it lost its data).
    fn watch(&self, prefix: String, from: Revision) -> BoxFuture<'_, Result<Changes, Error>>;
}

/// Cheap handle to whichever registry was chosen.
#[derive(Clone)]
pub struct Registry {
    backend: Arc<dyn Backend>,
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Registry").field(&self.backend.describe()).finish()
    }
}

/// How [`Registry::follow`] waits between attempts.
#[derive(Debug, Clone)]
pub struct FollowOptions {
    /// First pause after a break; doubles up to `backoff_max`, with jitter.
    pub backoff_min: Duration,
    pub backoff_max: Duration,
    /// Items between the follower and its reader.
    pub queue: usize,
}

impl Default for FollowOptions {
    fn default() -> Self {
        Self {
            backoff_min: Duration::from_millis(100),
            backoff_max: Duration::from_secs(3),
            queue: 64,
        }
    }
}

/// What a follower tells its reader.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Followed {
    /// Forget what you knew: this is everything. Comes first, and again after compaction.
    Resync(Snapshot),
    Changes(Vec<Change>),
    /// The registry is away; what was told so far is the last known.
    Away(Error),
    /// It is back and nothing was missed.
    Back,
}

/// A watch that never ends; dropping it ends it.
#[derive(Debug)]
pub struct Follower {
    events: mpsc::Receiver<Followed>,
    task: tokio::task::JoinHandle<()>,
}

impl Follower {
    /// The next event; waits as long as nothing happens.
    pub async fn next(&mut self) -> Followed {
        match self.events.recv().await {
            Some(event) => event,
            // The task ends only when this reader is gone, or with the runtime.
            None => std::future::pending().await,
        }
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Registry {
    #[must_use]
    pub fn new(backend: Arc<dyn Backend>) -> Self {
        Self { backend }
    }

    /// Takes the next epoch: greater than every epoch taken before and than `above`. One of two
    /// contenders gets each number.
    ///
    /// # Errors
    /// [`Error::Retryable`] if the registry is away, or contenders won too many times in a row.
    pub async fn take_epoch(&self, above: u64) -> Result<Epoch, Error> {
        const MAX_LOSSES: usize = 64;
        for _ in 0..MAX_LOSSES {
            let snapshot = self.backend.get(keys::EPOCH.to_owned()).await?;
            let standing = snapshot.entries.iter().find(|entry| entry.key == keys::EPOCH);
            let (last, mod_revision) = match standing {
                None => (0, 0),
                Some(entry) => (self.parse_epoch(&entry.value)?, entry.mod_revision),
            };
            let next = last.max(above) + 1;
            let put = Put::new(keys::EPOCH, next.to_string()).only_at(mod_revision);
            if self.backend.put(put).await?.is_some() {
                return Ok(Epoch::parse(next).expect("one more than a number is not zero"));
            }
        }
        Err(Error::Retryable {
            registry: self.describe(),
            call: "take_epoch",
            detail: format!("another contender won {MAX_LOSSES} times in a row"),
        })
    }

    fn parse_epoch(&self, value: &[u8]) -> Result<u64, Error> {
        let text = std::str::from_utf8(value).ok();
        text.and_then(|text| text.parse::<u64>().ok()).filter(|&n| n < u64::MAX).ok_or_else(|| {
            Error::Terminal {
                registry: self.describe(),
                call: "take_epoch",
                detail: format!("{} holds {value:?}, not a number", keys::EPOCH),
            }
        })
    }

    /// Follows a prefix through breaks (resuming where it was) and compaction (reading everything
    /// anew).
    #[must_use]
    pub fn follow(&self, prefix: &str, options: FollowOptions) -> Follower {
        let (sender, events) = mpsc::channel(options.queue);
        let task = tokio::spawn(follow(self.clone(), prefix.to_owned(), options, sender));
        Follower { events, task }
    }

    #[must_use]
    pub fn describe(&self) -> String {
        self.backend.describe()
    }

    /// # Errors
    /// See [`Backend::grant`].
    pub async fn grant(&self, ttl_s: u32) -> Result<Lease, Error> {
        self.backend.grant(ttl_s).await
    }

    /// # Errors
    /// See [`Backend::keep_alive`].
    pub async fn keep_alive(&self, lease: LeaseId) -> Result<(), Error> {
        self.backend.keep_alive(lease).await
    }

    /// # Errors
    /// See [`Backend::revoke`].
    pub async fn revoke(&self, lease: LeaseId) -> Result<(), Error> {
        self.backend.revoke(lease).await
    }

    /// # Errors
    /// See [`Backend::put`].
    pub async fn put(&self, put: Put) -> Result<Option<Revision>, Error> {
        self.backend.put(put).await
    }

    /// # Errors
    /// See [`Backend::delete`].
    pub async fn delete(
        &self,
        key: &str,
        if_mod_revision: Option<Revision>,
    ) -> Result<bool, Error> {
        self.backend.delete(key.to_owned(), if_mod_revision).await
    }

    /// # Errors
    /// See [`Backend::get`].
    pub async fn get(&self, prefix: &str) -> Result<Snapshot, Error> {
        self.backend.get(prefix.to_owned()).await
    }

    /// # Errors
    /// See [`Backend::watch`].
    pub async fn watch(&self, prefix: &str, from: Revision) -> Result<Changes, Error> {
        self.backend.watch(prefix.to_owned(), from).await
    }
}

/// The reader of a [`Follower`] went away.
struct Unread;

async fn follow(
    registry: Registry,
    prefix: String,
    options: FollowOptions,
    sender: mpsc::Sender<Followed>,
) {
    let mut pause = options.backoff_min;
    let mut from: Option<Revision> = None;
    let mut away = false;
    loop {
        let before = from;
        let ended = follow_once(&registry, &prefix, &mut from, &mut away, &sender).await;
        let error = match ended {
            Err(Unread) => return,
            Ok(error) => error,
        };
        if let Error::Compacted { asked } = error {
            tracing::info!(asked, registry = registry.describe(), "watch compacted, reading anew");
            from = None;
        } else if !away {
            away = true;
            tracing::warn!(%error, "registry away, serving on from the last view");
            if sender.send(Followed::Away(error)).await.is_err() {
                return;
            }
        }
        if from != before && from.is_some() {
            pause = options.backoff_min;
        }
        tokio::time::sleep(jitter(pause)).await;
        pause = (pause * 2).min(options.backoff_max);
    }
}

/// One life of a watch: reads everything if need be, then passes changes on until it breaks.
async fn follow_once(
    registry: &Registry,
    prefix: &str,
    from: &mut Option<Revision>,
    away: &mut bool,
    sender: &mpsc::Sender<Followed>,
) -> Result<Error, Unread> {
    let start = match *from {
        Some(start) => start,
        None => {
            let snapshot = match registry.get(prefix).await {
                Ok(snapshot) => snapshot,
                Err(error) => return Ok(error),
            };
            let start = snapshot.revision + 1;
            sender.send(Followed::Resync(snapshot)).await.map_err(|_| Unread)?;
            *from = Some(start);
            start
        }
    };
    let mut changes = match registry.watch(prefix, start).await {
        Ok(changes) => changes,
        Err(error) => return Ok(error),
    };
    if std::mem::take(away) {
        tracing::info!(registry = registry.describe(), from = start, "registry is back");
        sender.send(Followed::Back).await.map_err(|_| Unread)?;
    }
    loop {
        match changes.next().await {
            Some(Ok(batch)) => {
                // From the changes themselves: a response's header may be ahead of what it carries.
                if let Some(last) = batch.iter().map(|change| change.mod_revision).max() {
                    *from = Some(last + 1);
                }
                sender.send(Followed::Changes(batch)).await.map_err(|_| Unread)?;
            }
            Some(Err(error)) => return Ok(error),
            None => {
                return Ok(Error::Retryable {
                    registry: registry.describe(),
                    call: "watch",
                    detail: "it closed the stream".to_owned(),
                });
            }
        }
    }
}

/// A pause between half and all of `pause`, so that those who broke together do not come back
/// together.
pub(crate) fn jitter(pause: Duration) -> Duration {
    pause.mul_f64(rand::rng().random_range(0.5..1.0))
}
