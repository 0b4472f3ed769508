//! What the tests share: coordinators with short waits, and waiting for a named state with a
//! deadline.

use std::sync::Arc;
use std::time::Duration;

use evener_coordinator::cluster::records::Deployment;
use evener_coordinator::cluster::{self, Handles, member};
use evener_coordinator::config::Place;
use evener_coordinator::group::handle::{Directory, ReadyGroup};
use evener_proto::ids::ModelName;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Longest wait for anything; only a failing test waits so long.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// The model all scripted workers hold.
pub const MODEL: &str = "tiny";

/// Waits until `seen` finds what it looks for in a watched value.
pub async fn until<T, R>(
    what: &str,
    reader: &mut watch::Receiver<T>,
    mut seen: impl FnMut(&T) -> Option<R>,
) -> R
where
    T: Clone + std::fmt::Debug,
{
    let found = async {
        loop {
            let value = reader.borrow_and_update().clone();
            if let Some(found) = seen(&value) {
                return found;
            }
            reader.changed().await.expect("the watched side lives");
        }
    };
    match tokio::time::timeout(DEADLINE, found).await {
        Ok(found) => found,
        Err(_) => panic!("waited in vain for: {what}; last seen {:#?}", *reader.borrow()),
    }
}

/// A runtime of its own, so that dropping it is as sudden as a kill.
pub fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

pub fn deployment(world_size: Option<u32>, shares: &[u32]) -> Deployment {
    let model = ModelName::parse(MODEL).unwrap();
    Deployment { world_size, shares: shares.to_vec(), ..Deployment::of(model) }
}

/// Options with waits fit for tests.
pub fn options(registry: Place) -> cluster::Options {
    let mut options = cluster::Options::at(registry);
    options.leader_ttl_s = 2;
    options.leader_poll = Duration::from_millis(100);
    options.supervisor.placement.settle = Duration::from_millis(200);
    options.supervisor.backoff_min = Duration::from_millis(20);
    options.supervisor.backoff_max = Duration::from_millis(500);
    options.supervisor.linger = Duration::from_secs(1);
    options.supervisor.member = member::Options {
        connect_timeout: Duration::from_secs(1),
        leave_timeout: Duration::from_secs(1),
        join_answer_timeout: Duration::from_secs(2),
        keepalive_interval: Duration::from_millis(300),
        keepalive_timeout: Duration::from_millis(1000),
        ..member::Options::default()
    };
    options
}

/// A coordinator's cluster side, in a runtime of its own.
pub struct Coordinator {
    pub directory: watch::Receiver<Arc<Directory>>,
    pub status: watch::Receiver<Arc<serde_json::Value>>,
    pub handles: Handles,
    runtime: Option<Runtime>,
}

impl Coordinator {
    pub async fn start(options: cluster::Options) -> Self {
        let runtime = runtime();
        let started = runtime.spawn(cluster::start(options, CancellationToken::new()));
        let handles = started.await.unwrap().unwrap();
        Self {
            directory: handles.directory.clone(),
            status: handles.status.clone(),
            handles,
            runtime: Some(runtime),
        }
    }

    /// Starts once the address of its registry is free: who was killed there may still be going.
    pub async fn start_when_free(options: cluster::Options) -> Self {
        let Place::Embedded { listen } = options.registry else { panic!("no address to wait for") };
        let free = async {
            while tokio::net::TcpListener::bind(listen).await.is_err() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(DEADLINE, free).await.expect("the address becomes free");
        Self::start(options).await
    }

    /// With a registry of its own.
    pub async fn embedded(deployments: Vec<Deployment>) -> Self {
        let listen = "127.0.0.1:0".parse().unwrap();
        let options = options(Place::Embedded { listen });
        Self::start(cluster::Options { deployments, ..options }).await
    }

    /// Where workers and other coordinators find its registry.
    pub fn registry(&self) -> String {
        self.handles.registry_address.unwrap().to_string()
    }

    /// The one group that is ready, once there is one that `fits`.
    pub async fn ready(
        &mut self,
        what: &str,
        fits: impl Fn(&ReadyGroup) -> bool,
    ) -> Arc<ReadyGroup> {
        until(what, &mut self.directory, |directory| {
            directory.groups.iter().find(|group| fits(group)).cloned()
        })
        .await
    }

    /// Waits until something missing contains `text`.
    pub async fn missing(&mut self, text: &str) {
        until(text, &mut self.directory, |directory| {
            directory.missing.iter().any(|said| said.contains(text)).then_some(())
        })
        .await;
    }

    /// Ends it as a kill would: nothing is revoked, no stream is closed in order.
    pub fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        self.kill();
    }
}
