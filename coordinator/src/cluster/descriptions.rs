//! What is known of models, by name and file: asked for once, kept for good.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use evener_proto::ids::ModelName;
use tokio::time::Instant;

use super::member;
use crate::group::handle::Model;

/// Descriptions known, asked for, and refused.
#[derive(Debug, Default)]
pub struct Descriptions {
    models: BTreeMap<ModelName, Entry>,
}

/// At most one file is served under a name at a time, so one entry per name is kept.
#[derive(Debug, Default)]
struct Entry {
    known: Option<Arc<Model>>,
    /// The file asked for and not answered yet.
    asked: Option<String>,
    n_failures: usize,
    not_before: Option<Instant>,
    why: Option<String>,
}

/// What a worker answered.
#[derive(Debug)]
pub struct Answer {
    pub model: ModelName,
    pub fingerprint: String,
    pub described: Result<Model, member::Error>,
}

const PAUSE: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(10);

impl Descriptions {
    /// The last description of a model, of whichever file.
    #[must_use]
    pub fn get(&self, model: &ModelName) -> Option<&Arc<Model>> {
        self.models.get(model)?.known.as_ref()
    }

    /// Why the model is not described, if asking failed.
    #[must_use]
    pub fn why_not(&self, model: &ModelName) -> Option<&str> {
        self.models.get(model)?.why.as_deref()
    }

    /// Whom to ask now, if anybody; counts as asked.
    pub fn ask(
        &mut self,
        model: &ModelName,
        fingerprint: &str,
        holders: &[String],
        now: Instant,
    ) -> Option<String> {
        let entry = self.models.entry(model.clone()).or_default();
        let known = entry.known.as_ref().is_some_and(|known| known.fingerprint == fingerprint);
        let waits = entry.not_before.is_some_and(|at| at > now);
        if known || waits || entry.asked.is_some() || holders.is_empty() {
            return None;
        }
        entry.asked = Some(fingerprint.to_owned());
        // After a failure, the next holder's turn.
        Some(holders[entry.n_failures % holders.len()].clone())
    }

    /// Takes in an answer.
    pub fn answered(&mut self, answer: Answer, now: Instant) {
        let Answer { model, fingerprint, described } = answer;
        let entry = self.models.entry(model.clone()).or_default();
        if entry.asked.as_ref() == Some(&fingerprint) {
            entry.asked = None;
        }
        match described {
            Ok(described) => {
                tracing::info!(%model, fingerprint, "model described");
                *entry = Entry { known: Some(Arc::new(described)), ..Entry::default() };
            }
            Err(error) => {
                tracing::warn!(%model, %error, "model not described, asking again");
                let pause = PAUSE.saturating_mul(1 << entry.n_failures.min(10)).min(PAUSE_MAX);
                entry.n_failures += 1;
                entry.not_before = Some(now + pause);
                entry.why = Some(error.to_string());
            }
        }
    }
}
