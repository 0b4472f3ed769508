//! Writes group records, in the background and until it has worked: the registry may be away.
//!
//! A record never replaces one of a higher epoch, so that a coordinator that thinks it still leads
//! does no harm.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use evener_proto::ids::GroupId;
use evener_proto::keys;
use tokio::sync::Notify;
use tokio::task::AbortHandle;

use super::records::Group;
use super::registry::{Error, Put, Registry, jitter};

/// Handle to the writing task; the task ends with it.
#[derive(Debug)]
pub struct Writer {
    pending: Arc<Pending>,
    task: AbortHandle,
}

#[derive(Debug, Default)]
struct Pending {
    /// The latest record of each group: bounded by the number of groups.
    records: Mutex<BTreeMap<GroupId, Group>>,
    news: Notify,
}

impl Pending {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<GroupId, Group>> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Writer {
    #[must_use]
    pub fn start(registry: Registry, backoff: Duration) -> Self {
        let pending = Arc::new(Pending::default());
        let task = tokio::spawn(write_all(registry, Arc::clone(&pending), backoff)).abort_handle();
        Self { pending, task }
    }

    /// Writes `record`, in place of an earlier one of this group that is not written yet.
    pub fn write(&self, record: Group) {
        self.pending.lock().insert(record.id.clone(), record);
        self.pending.news.notify_one();
    }

    /// Forgets what is not written yet: somebody else leads now.
    pub fn clear(&self) {
        self.pending.lock().clear();
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn write_all(registry: Registry, pending: Arc<Pending>, backoff: Duration) {
    loop {
        let next = pending.lock().pop_first();
        let Some((id, record)) = next else {
            pending.news.notified().await;
            continue;
        };
        match write(&registry, &record).await {
            Ok(()) => {}
            Err(error @ Error::Terminal { .. }) => {
                tracing::error!(%error, group = %id, "group record refused");
            }
            Err(error) => {
                tracing::debug!(%error, group = %id, "group record not written yet");
                // What came in the meantime is newer.
                pending.lock().entry(id).or_insert(record);
                tokio::time::sleep(jitter(backoff)).await;
            }
        }
    }
}

async fn write(registry: &Registry, record: &Group) -> Result<(), Error> {
    let key = keys::group(&record.id);
    let snapshot = registry.get(&key).await?;
    let standing = snapshot.entries.iter().find(|entry| entry.key == key);
    let newer = standing
        .and_then(|entry| Group::decode(&entry.value).ok())
        .is_some_and(|standing| standing.epoch > record.epoch);
    if newer {
        tracing::info!(group = %record.id, epoch = %record.epoch, "a newer epoch is on record");
        return Ok(());
    }
    let mod_revision = standing.map_or(0, |entry| entry.mod_revision);
    let put = Put::new(key, record.encode()).only_at(mod_revision);
    match registry.put(put).await? {
        Some(_) => Ok(()),
        None => Err(Error::Retryable {
            registry: registry.describe(),
            call: "put",
            detail: "somebody else wrote this group's record".to_owned(),
        }),
    }
}
