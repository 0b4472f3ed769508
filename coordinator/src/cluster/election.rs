//! Which coordinator places groups: whoever holds the leader key, under a lease. All of them serve.
//!
//! A lease is not a lock: two coordinators may think they lead for a while. What keeps that
//! harmless is the epoch.

use std::time::Duration;

use evener_proto::keys;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::registry::{Error, Lease, Put, Registry, jitter};

/// How a coordinator stands for election.
#[derive(Debug, Clone)]
pub struct Options {
    /// Unique among coordinators and their restarts.
    pub identity: String,
    /// A dead leader is replaced this long after it last renewed. etcd grants 2 s at least.
    pub lease_ttl_s: u32,
    /// Between two looks whether the place is free.
    pub poll: Duration,
}

/// Stands for election until `shutdown`; says through `leading` whether this coordinator places.
pub async fn run(
    options: Options,
    registry: Registry,
    leading: watch::Sender<bool>,
    shutdown: CancellationToken,
) {
    let mut held: Option<Lease> = None;
    loop {
        let term = tokio::select! {
            term = stand(&options, &registry, &leading, &mut held) => term,
            () = shutdown.cancelled() => break,
        };
        leading.send_replace(false);
        match term {
            Ok(()) => {}
            Err(Error::LeaseGone(_)) => {
                held = None;
                tracing::warn!("leader lease gone, standing again");
            }
            Err(error) => tracing::debug!(%error, "election"),
        }
        tokio::select! {
            () = tokio::time::sleep(jitter(options.poll)) => {}
            () = shutdown.cancelled() => break,
        }
    }
    leading.send_replace(false);
    // So that the next leader need not wait for the lease to run out.
    if let Some(lease) = held {
        let _ = tokio::time::timeout(Duration::from_secs(1), registry.revoke(lease.id)).await;
    }
}

/// Takes the place if it is free, and keeps it as long as it can. `Ok`: somebody else has it.
async fn stand(
    options: &Options,
    registry: &Registry,
    leading: &watch::Sender<bool>,
    held: &mut Option<Lease>,
) -> Result<(), Error> {
    let standing = registry.get(keys::LEADER).await?;
    let mine = match standing.entries.iter().find(|entry| entry.key == keys::LEADER) {
        None => false,
        Some(entry) if entry.value == options.identity.as_bytes() => true,
        Some(_) => return Ok(()),
    };
    let lease = match *held {
        Some(lease) => lease,
        None => *held.insert(registry.grant(options.lease_ttl_s).await?),
    };
    // Counted from before the call: the registry counts from when it got it.
    let mut renewed = Instant::now();
    registry.keep_alive(lease.id).await?;
    if !mine {
        let put = Put::new(keys::LEADER, options.identity.clone()).leased(lease.id).only_at(0);
        if registry.put(put).await?.is_none() {
            return Ok(());
        }
    }
    tracing::info!(identity = options.identity, "leading");
    leading.send_replace(true);
    loop {
        let expires = renewed + lease.ttl;
        tokio::time::sleep(lease.ttl / 3).await;
        let asked = Instant::now();
        match tokio::time::timeout_at(expires, registry.keep_alive(lease.id)).await {
            Ok(Ok(())) => renewed = asked,
            // As long as the lease must still stand, one lost call is no lost election.
            Ok(Err(Error::Retryable { .. })) if Instant::now() < expires => {}
            Ok(Err(error)) => return Err(error),
            Err(_) => {
                return Err(Error::Retryable {
                    registry: registry.describe(),
                    call: "keep_alive",
                    detail: "the leader lease could not be renewed in time".to_owned(),
                });
            }
        }
    }
}
