//! The system from outside: real processes of the real binary, driven as people and clients drive
//! it.
//!
//! A test says what cluster it wants and gets one on free ports, with its logs kept for the day it
//! fails: `Cluster::builder().workers(3).shares("3:2:2").start().await`. Everything is killed on
//! drop. No test sleeps; each waits for a named state with a deadline.

mod binary;
mod cluster;
mod etcd;
mod http;
mod ports;
mod process;

pub use binary::{evener, model, root};
pub use cluster::{Builder, Cluster, Registry};
pub use etcd::Etcd;
pub use http::{Api, End, Stream, raw_request, text_of};
pub use ports::Reserved;
pub use process::{Ended, Process, living_processes_marked};

use std::time::Duration;

/// Longest wait for a cluster to be ready. Loading takes a second or two; a busy machine may be ten
/// times slower.
pub const READY: Duration = Duration::from_secs(90);
/// Longest wait for anything else to happen.
pub const SOON: Duration = Duration::from_secs(60);

/// A prompt that the demo model goes on with for as long as it may: no test hangs on when a story
/// ends.
pub const ENDLESS: &str = "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25";

/// Waits until `probe` answers, or panics with `what` was waited for.
pub async fn eventually<T, F>(what: &str, deadline: Duration, probe: impl FnMut() -> F) -> T
where
    F: Future<Output = Option<T>>,
{
    let found = within(deadline, probe).await;
    found.unwrap_or_else(|| panic!("{what}: not within {} s", deadline.as_secs()))
}

/// What `probe` answers once it does; `None` if it did not before the deadline.
async fn within<T, F>(deadline: Duration, mut probe: impl FnMut() -> F) -> Option<T>
where
    F: Future<Output = Option<T>>,
{
    const INTERVAL: Duration = Duration::from_millis(25);
    let waited = async {
        let mut interval = tokio::time::interval(INTERVAL);
        loop {
            interval.tick().await;
            if let Some(answer) = probe().await {
                return answer;
            }
        }
    };
    tokio::time::timeout(deadline, waited).await.ok()
}
