//! The exporter with a count of what became of its spans, and a word in the log when the collector
//! goes or comes back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{SpanData, SpanExporter};

/// Spans since the start. What was recorded and is in neither of the others waits, or found the
/// queue full.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    pub recorded: u64,
    /// The collector took them.
    pub exported: u64,
    /// The collector was away, or refused them.
    pub failed: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Shared {
    recorded: AtomicU64,
    exported: AtomicU64,
    failed: AtomicU64,
    is_away: AtomicBool,
}

impl Shared {
    pub(crate) fn recorded(&self) {
        self.recorded.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn read(&self) -> Counts {
        Counts {
            exported: self.exported.load(Ordering::Relaxed),
            failed: self.failed.load(Ordering::Relaxed),
            recorded: self.recorded.load(Ordering::Relaxed),
        }
    }

    fn ended(&self, n: u64, result: &OTelSdkResult) {
        match result {
            Ok(()) => {
                self.exported.fetch_add(n, Ordering::Relaxed);
                if self.is_away.swap(false, Ordering::Relaxed) {
                    tracing::info!("the collector of traces is back");
                }
            }
            Err(error) => {
                self.failed.fetch_add(n, Ordering::Relaxed);
                if !self.is_away.swap(true, Ordering::Relaxed) {
                    tracing::warn!(%error, "the collector of traces takes no spans; dropping them");
                }
            }
        }
    }
}

#[derive(Debug)]
pub(crate) struct Counting<E> {
    inner: E,
    counts: Arc<Shared>,
}

impl<E: SpanExporter> Counting<E> {
    pub(crate) fn new(inner: E, counts: Arc<Shared>) -> Self {
        Self { inner, counts }
    }
}

impl<E: SpanExporter> SpanExporter for Counting<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let n = batch.len() as u64;
        let result = self.inner.export(batch).await;
        self.counts.ended(n, &result);
        result
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}
