//! The embedded registry: the contract of `registry.rs` in this process's memory, for one machine
//! and the first minute.
//!
//! It is not replicated and forgets everything when the coordinator ends; workers then register
//! again. Its history is bounded, so compaction is real here too. `embedded_grpc.rs` offers it to
//! other processes.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt};
use futures::stream;
use tokio::sync::watch;
use tokio::time::Instant;

use super::registry::{
    Backend, Change, Changes, Entry, Error, Lease, LeaseId, Put, Revision, Snapshot,
};

/// Bounds of an embedded registry.
#[derive(Debug, Clone)]
pub struct Options {
    /// Revision before the first change. The time of start, so that who knew an earlier life of
    /// this registry sees that its revisions are gone.
    pub first_revision: Revision,
    /// Changes kept for watchers that come back; older ones are compacted.
    pub max_history: usize,
    pub max_keys: usize,
    pub max_value_bytes: usize,
    /// Shortest lease, as etcd has one.
    pub min_ttl_s: u32,
    pub max_ttl_s: u32,
    pub max_leases: usize,
    /// How late a lease may be found expired.
    pub expiry_interval: Duration,
}

impl Default for Options {
    fn default() -> Self {
        let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let ms = since_epoch.map_or(0, |d| i64::try_from(d.as_millis()).unwrap_or(0));
        Self {
            first_revision: ms,
            max_history: 10_000,
            max_keys: 20_000,
            max_value_bytes: 1 << 20,
            min_ttl_s: 1,
            max_ttl_s: 3600,
            max_leases: 20_000,
            expiry_interval: Duration::from_millis(50),
        }
    }
}

#[derive(Debug)]
struct Stored {
    value: Bytes,
    mod_revision: Revision,
    lease: Option<LeaseId>,
}

#[derive(Debug)]
struct Held {
    ttl: Duration,
    deadline: Instant,
    keys: BTreeSet<String>,
}

/// The state itself: no clock, no I/O.
#[derive(Debug)]
struct Store {
    options: Options,
    entries: BTreeMap<String, Stored>,
    revision: Revision,
    /// Lowest revision a watch may start from.
    floor: Revision,
    history: VecDeque<Change>,
    leases: HashMap<LeaseId, Held>,
}

const NAME: &str = "embedded";

impl Store {
    fn new(options: Options) -> Self {
        Self {
            revision: options.first_revision,
            floor: options.first_revision + 1,
            options,
            entries: BTreeMap::new(),
            history: VecDeque::new(),
            leases: HashMap::new(),
        }
    }

    fn refuse(call: &'static str, detail: String) -> Error {
        Error::Terminal { registry: NAME.to_owned(), call, detail }
    }

    fn grant(&mut self, id: LeaseId, ttl_s: u32, now: Instant) -> Result<Lease, Error> {
        if self.leases.len() >= self.options.max_leases {
            return Err(Self::refuse("grant", format!("it holds {} leases", self.leases.len())));
        }
        let ttl_s = ttl_s.clamp(self.options.min_ttl_s, self.options.max_ttl_s);
        let ttl = Duration::from_secs(u64::from(ttl_s));
        self.leases.insert(id, Held { ttl, deadline: now + ttl, keys: BTreeSet::new() });
        Ok(Lease { id, ttl })
    }

    fn keep_alive(&mut self, id: LeaseId, now: Instant) -> Result<(), Error> {
        let held = self.leases.get_mut(&id).ok_or(Error::LeaseGone(Some(id)))?;
        held.deadline = now + held.ttl;
        Ok(())
    }

    /// Deletes the lease and, in one revision, its keys.
    fn revoke(&mut self, id: LeaseId) {
        let Some(held) = self.leases.remove(&id) else { return };
        if held.keys.is_empty() {
            return;
        }
        self.revision += 1;
        for key in held.keys {
            self.entries.remove(&key);
            self.record(key, None);
        }
        self.compact();
    }

    fn expire(&mut self, now: Instant) {
        let due: Vec<LeaseId> = self
            .leases
            .iter()
            .filter(|(_, held)| held.deadline <= now)
            .map(|(&id, _)| id)
            .collect();
        for id in due {
            self.revoke(id);
        }
    }

    fn put(&mut self, put: Put) -> Result<Option<Revision>, Error> {
        let standing = self.entries.get(&put.key);
        if put.value.len() > self.options.max_value_bytes {
            let (len, max) = (put.value.len(), self.options.max_value_bytes);
            return Err(Self::refuse("put", format!("{len} bytes; at most {max} are kept")));
        }
        if standing.is_none() && self.entries.len() >= self.options.max_keys {
            return Err(Self::refuse("put", format!("it holds {} keys", self.entries.len())));
        }
        if let Some(lease) = put.lease
            && !self.leases.contains_key(&lease)
        {
            return Err(Error::LeaseGone(Some(lease)));
        }
        let stands_at = standing.map_or(0, |stored| stored.mod_revision);
        if put.if_mod_revision.is_some_and(|asked| asked != stands_at) {
            return Ok(None);
        }
        // As in etcd, a key belongs to the lease it was last put under.
        if let Some(old) = standing.and_then(|stored| stored.lease)
            && let Some(held) = self.leases.get_mut(&old)
        {
            held.keys.remove(&put.key);
        }
        if let Some(held) = put.lease.and_then(|lease| self.leases.get_mut(&lease)) {
            held.keys.insert(put.key.clone());
        }
        self.revision += 1;
        let stored =
            Stored { value: put.value.clone(), mod_revision: self.revision, lease: put.lease };
        self.entries.insert(put.key.clone(), stored);
        self.record(put.key, Some(put.value));
        self.compact();
        Ok(Some(self.revision))
    }

    fn delete(&mut self, key: &str, if_mod_revision: Option<Revision>) -> bool {
        let standing = self.entries.get(key);
        let stands_at = standing.map_or(0, |stored| stored.mod_revision);
        if if_mod_revision.is_some_and(|asked| asked != stands_at) {
            return false;
        }
        let Some(stored) = self.entries.remove(key) else { return true };
        if let Some(held) = stored.lease.and_then(|lease| self.leases.get_mut(&lease)) {
            held.keys.remove(key);
        }
        self.revision += 1;
        self.record(key.to_owned(), None);
        self.compact();
        true
    }

    fn get(&self, prefix: &str) -> Snapshot {
        let entries = self
            .entries
            .range(prefix.to_owned()..)
            .take_while(|(key, _)| key.starts_with(prefix))
            .map(|(key, stored)| Entry {
                key: key.clone(),
                value: stored.value.clone(),
                mod_revision: stored.mod_revision,
            })
            .collect();
        Snapshot { entries, revision: self.revision }
    }

    /// Changes under `prefix` from `from` on, whole revisions, about `limit` at most; and where to
    /// go on.
    fn changes(
        &self,
        prefix: &str,
        from: Revision,
        limit: usize,
    ) -> Result<(Vec<Change>, Revision), Error> {
        if from < self.floor || from > self.revision + 1 {
            return Err(Error::Compacted { asked: from });
        }
        let first = self.history.partition_point(|change| change.mod_revision < from);
        let mut found: Vec<Change> = Vec::new();
        for change in self.history.iter().skip(first) {
            let full = found.len() >= limit;
            if full && found.last().is_some_and(|last| last.mod_revision != change.mod_revision) {
                return Ok((found, change.mod_revision));
            }
            if change.key.starts_with(prefix) {
                found.push(change.clone());
            }
        }
        Ok((found, self.revision + 1))
    }

    fn record(&mut self, key: String, value: Option<Bytes>) {
        self.history.push_back(Change { key, value, mod_revision: self.revision });
    }

    fn compact(&mut self) {
        while self.history.len() > self.options.max_history
            && let Some(oldest) = self.history.front().map(|change| change.mod_revision)
        {
            // A revision is kept whole or not at all.
            while self.history.front().is_some_and(|change| change.mod_revision == oldest) {
                self.history.pop_front();
            }
            self.floor = oldest + 1;
        }
    }
}

#[derive(Debug)]
struct Inner {
    store: Mutex<Store>,
    /// The revision reached; tells watchers to look again.
    reached: watch::Sender<Revision>,
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, Store> {
        // No code in Store panics half-way through a change that a later reader could trip over.
        self.store.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn change<T>(&self, f: impl FnOnce(&mut Store) -> T) -> T {
        let (result, revision) = {
            let mut store = self.lock();
            let result = f(&mut store);
            (result, store.revision)
        };
        self.reached.send_if_modified(|reached| {
            let news = revision > *reached;
            *reached = revision.max(*reached);
            news
        });
        result
    }
}

/// Handle to an embedded registry; the registry ends with its last handle.
#[derive(Debug, Clone)]
pub struct Embedded {
    inner: Arc<Inner>,
}

impl Embedded {
    /// Starts a registry, with the task that expires its leases. Needs a Tokio runtime.
    #[must_use]
    pub fn start(options: Options) -> Self {
        let expiry_interval = options.expiry_interval;
        let (reached, _) = watch::channel(options.first_revision);
        let inner = Arc::new(Inner { store: Mutex::new(Store::new(options)), reached });
        tokio::spawn(expire(Arc::downgrade(&inner), expiry_interval));
        Self { inner }
    }

    /// Forgets changes before `revision`, so that watches from there must read everything anew.
    pub fn compact(&self, revision: Revision) {
        let mut store = self.inner.lock();
        store.history.retain(|change| change.mod_revision >= revision);
        store.floor = store.floor.max(revision.min(store.revision + 1));
    }
}

async fn expire(inner: Weak<Inner>, interval: Duration) {
    loop {
        tokio::time::sleep(interval).await;
        let Some(inner) = inner.upgrade() else { return };
        inner.change(|store| store.expire(Instant::now()));
    }
}

/// Changes per stream item, about.
const BATCH: usize = 256;

impl Backend for Embedded {
    fn describe(&self) -> String {
        NAME.to_owned()
    }

    fn grant(&self, ttl_s: u32) -> BoxFuture<'_, Result<Lease, Error>> {
        // Random, so that a lease of an earlier life of this registry is not mistaken for one of
        // this.
        let id = LeaseId(rand::random_range(1..i64::MAX));
        let granted = self.inner.change(|store| store.grant(id, ttl_s, Instant::now()));
        futures::future::ready(granted).boxed()
    }

    fn keep_alive(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), Error>> {
        let kept = self.inner.change(|store| store.keep_alive(lease, Instant::now()));
        futures::future::ready(kept).boxed()
    }

    fn revoke(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), Error>> {
        self.inner.change(|store| store.revoke(lease));
        futures::future::ready(Ok(())).boxed()
    }

    fn put(&self, put: Put) -> BoxFuture<'_, Result<Option<Revision>, Error>> {
        futures::future::ready(self.inner.change(|store| store.put(put))).boxed()
    }

    fn delete(
        &self,
        key: String,
        if_mod_revision: Option<Revision>,
    ) -> BoxFuture<'_, Result<bool, Error>> {
        let done = self.inner.change(|store| store.delete(&key, if_mod_revision));
        futures::future::ready(Ok(done)).boxed()
    }

    fn get(&self, prefix: String) -> BoxFuture<'_, Result<Snapshot, Error>> {
        futures::future::ready(Ok(self.inner.lock().get(&prefix))).boxed()
    }

    /// A watcher is a cursor into the shared history: it queues nothing, and one that is too slow
    /// is compacted.
    fn watch(&self, prefix: String, from: Revision) -> BoxFuture<'_, Result<Changes, Error>> {
        let inner = Arc::clone(&self.inner);
        let reached = inner.reached.subscribe();
        if let Err(error) = inner.lock().changes(&prefix, from, 0) {
            return futures::future::ready(Err(error)).boxed();
        }
        let cursor = (inner, reached, prefix, from);
        let changes = stream::try_unfold(cursor, |(inner, mut reached, prefix, from)| async move {
            let mut from = from;
            loop {
                reached.borrow_and_update();
                let (found, next) = inner.lock().changes(&prefix, from, BATCH)?;
                from = next;
                if !found.is_empty() {
                    return Ok(Some((found, (inner, reached, prefix, from))));
                }
                if reached.changed().await.is_err() {
                    return Ok(None);
                }
            }
        });
        let changes: Changes = Box::pin(changes);
        futures::future::ready(Ok(changes)).boxed()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn store(max_history: usize) -> Store {
        Store::new(Options { first_revision: 0, max_history, ..Options::default() })
    }

    fn put(store: &mut Store, key: &str, lease: Option<LeaseId>) -> Revision {
        let mut put = Put::new(key, "v");
        put.lease = lease;
        store.put(put).unwrap().unwrap()
    }

    #[test]
    fn keys_of_a_lease_end_together_in_one_revision() {
        let mut store = store(100);
        let now = Instant::now();
        let lease = store.grant(LeaseId(7), 5, now).unwrap();
        put(&mut store, "a", Some(lease.id));
        put(&mut store, "b", Some(lease.id));
        store.expire(now + Duration::from_millis(4999));
        assert_eq!(store.get("").entries.len(), 2);
        store.keep_alive(lease.id, now + Duration::from_secs(4)).unwrap();
        store.expire(now + Duration::from_secs(8));
        assert_eq!(store.get("").entries.len(), 2, "kept alive until 9 s");
        store.expire(now + Duration::from_secs(9));
        assert!(store.get("").entries.is_empty());
        let (changes, next) = store.changes("", 3, 10).unwrap();
        let revisions: Vec<_> = changes.iter().map(|c| (c.key.as_str(), c.mod_revision)).collect();
        assert_eq!(revisions, [("a", 3), ("b", 3)]);
        assert_eq!(next, 4);
        assert_eq!(store.keep_alive(lease.id, now), Err(Error::LeaseGone(Some(lease.id))));
    }

    #[test]
    fn a_key_put_anew_outlives_the_lease_it_was_first_put_under() {
        let mut store = store(100);
        let now = Instant::now();
        let old = store.grant(LeaseId(1), 1, now).unwrap();
        let new = store.grant(LeaseId(2), 60, now).unwrap();
        put(&mut store, "w", Some(old.id));
        put(&mut store, "w", Some(new.id));
        store.expire(now + Duration::from_secs(2));
        assert_eq!(store.get("").entries.len(), 1);
    }

    #[test]
    fn history_is_bounded_and_says_what_it_forgot() {
        let mut store = store(3);
        for _ in 0..5 {
            put(&mut store, "k", None);
        }
        assert_eq!(store.changes("", 2, 10), Err(Error::Compacted { asked: 2 }));
        assert_eq!(store.changes("", 3, 10).unwrap().0.len(), 3);
        assert_eq!(store.changes("", 6, 10).unwrap(), (vec![], 6));
        assert_eq!(
            store.changes("", 7, 10),
            Err(Error::Compacted { asked: 7 }),
            "a revision from another life of the registry"
        );
    }

    #[test]
    fn a_full_batch_ends_between_revisions() {
        let mut store = store(100);
        for key in ["a", "b", "c"] {
            put(&mut store, key, None);
        }
        let (first, next) = store.changes("", 1, 2).unwrap();
        assert_eq!((first.len(), next), (2, 3));
        assert_eq!(store.changes("", next, 2).unwrap().0[0].key, "c");
    }

    #[test]
    fn limits_refuse_with_the_number() {
        let mut store =
            Store::new(Options { max_value_bytes: 3, max_keys: 1, ..Options::default() });
        let error = store.put(Put::new("k", "four")).unwrap_err();
        assert!(error.to_string().contains("4 bytes; at most 3"), "{error}");
        store.put(Put::new("k", "v")).unwrap();
        let error = store.put(Put::new("l", "v")).unwrap_err();
        assert!(error.to_string().contains("1 keys"), "{error}");
    }
}
