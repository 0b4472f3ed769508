//! Registry keys: one prefix, one function per kind of record. Nobody else concatenates keys.

use crate::ids::{GroupId, ModelName, WorkerId};

/// Everything Evener writes stands under this.
pub const PREFIX: &str = "evener/v1/";
/// All [`WorkerRecord`](crate::registry::WorkerRecord)s.
pub const WORKERS: &str = "evener/v1/workers/";
/// All [`LoadReport`](crate::registry::LoadReport)s.
pub const LOADS: &str = "evener/v1/loads/";
/// All [`Deployment`](crate::registry::Deployment)s.
pub const DEPLOYMENTS: &str = "evener/v1/deployments/";
/// All [`GroupRecord`](crate::registry::GroupRecord)s.
pub const GROUPS: &str = "evener/v1/groups/";
/// Last epoch taken, decimal text.
pub const EPOCH: &str = "evener/v1/epoch";
/// Identity of the coordinator that places, leased.
pub const LEADER: &str = "evener/v1/leader";

#[must_use]
pub fn worker(id: &WorkerId) -> String {
    format!("{WORKERS}{id}")
}

#[must_use]
pub fn load(id: &WorkerId) -> String {
    format!("{LOADS}{id}")
}

#[must_use]
pub fn deployment(model: &ModelName) -> String {
    format!("{DEPLOYMENTS}{model}")
}

#[must_use]
pub fn group(id: &GroupId) -> String {
    format!("{GROUPS}{id}")
}
