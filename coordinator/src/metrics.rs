//! What the request side counts, with unit and help; read by `GET /metrics`. What workers report
//! stands beside it (groups.rs).
//!
//! Label values are bounded: endpoints, outcomes and deployed models, never ids or text.

mod groups;
mod process;
mod spans;

use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use evener_telemetry::{Span, Tracer};
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use tokio::sync::watch;

use crate::group::figures::Group;
use groups::Groups;
use process::Process;
use spans::Spans;

/// Histogram bounds in seconds, those of OpenTelemetry's generative AI conventions.
const DURATION_S: [f64; 14] =
    [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92];
const FIRST_TOKEN_S: [f64; 16] =
    [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0];
const PER_TOKEN_S: [f64; 13] =
    [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5];
const OVERHEAD_S: [f64; 16] = [
    0.000_05, 0.000_1, 0.000_15, 0.000_2, 0.000_3, 0.000_4, 0.000_6, 0.001, 0.001_5, 0.002, 0.003,
    0.005, 0.01, 0.03, 0.1, 1.0,
];

/// Which endpoint a request went to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Endpoint {
    #[allow(non_camel_case_types)]
    chat_completions,
    #[allow(non_camel_case_types)]
    completions,
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Outcome {
    /// Answered in full.
    #[allow(non_camel_case_types)]
    ok,
    /// The request's own fault: a 4xx, but not 429.
    #[allow(non_camel_case_types)]
    invalid,
    /// Shed with 429.
    #[allow(non_camel_case_types)]
    shed,
    /// No group in time: 503.
    #[allow(non_camel_case_types)]
    unavailable,
    /// The client went away.
    #[allow(non_camel_case_types)]
    cancelled,
    /// A stream that had begun ended with an error event.
    #[allow(non_camel_case_types)]
    interrupted,
    /// A defect of ours: 500.
    #[allow(non_camel_case_types)]
    failed,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    endpoint: Endpoint,
    outcome: Outcome,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfModel {
    /// Empty where a request named none that is deployed.
    model: Arc<str>,
}

type Histograms = Family<OfModel, Histogram, fn() -> Histogram>;

/// All of them; cheap to clone.
#[derive(Clone)]
pub struct Metrics {
    registry: Arc<Registry>,
    requests: Family<Labels, Counter>,
    running: Gauge<i64, AtomicI64>,
    prompt_tokens: Family<OfModel, Counter>,
    generation_tokens: Family<OfModel, Counter>,
    resumptions: Counter,
    first_token_s: Histograms,
    per_token_s: Histograms,
    duration_s: Histograms,
    overhead_s: Histograms,
}

impl Metrics {
    /// `groups`: what workers report.
    #[must_use]
    pub fn new(groups: watch::Receiver<Arc<[Group]>>, tracer: Tracer) -> Self {
        let mut registry = Registry::with_prefix("evener");
        let requests = Family::<Labels, Counter>::default();
        registry.register("requests", "Requests by endpoint and how they ended", requests.clone());
        let running = Gauge::<i64, AtomicI64>::default();
        registry.register("requests_running", "Requests being answered now", running.clone());
        let prompt_tokens = Family::<OfModel, Counter>::default();
        let help = "Prompt tokens of accepted requests";
        registry.register("prompt_tokens", help, prompt_tokens.clone());
        let generation_tokens = Family::<OfModel, Counter>::default();
        registry.register("generation_tokens", "Tokens generated", generation_tokens.clone());
        let resumptions = Counter::default();
        let help = "Sequences continued on a group after theirs was lost";
        registry.register("migrations", help, resumptions.clone());
        let first_token_s = Histograms::new_with_constructor(|| Histogram::new(FIRST_TOKEN_S));
        let help = "From the request read to its first token";
        let name = "time_to_first_token";
        registry.register_with_unit(name, help, Unit::Seconds, first_token_s.clone());
        let per_token_s = Histograms::new_with_constructor(|| Histogram::new(PER_TOKEN_S));
        let help = "Between two tokens of one sequence";
        let name = "inter_token_latency";
        registry.register_with_unit(name, help, Unit::Seconds, per_token_s.clone());
        let duration_s = Histograms::new_with_constructor(|| Histogram::new(DURATION_S));
        let help = "From the request read to its last byte";
        registry.register_with_unit("request_duration", help, Unit::Seconds, duration_s.clone());
        let overhead_s = Histograms::new_with_constructor(|| Histogram::new(OVERHEAD_S));
        let help = "Of a request's duration, all but its time at the lead";
        registry.register_with_unit("request_overhead", help, Unit::Seconds, overhead_s.clone());
        registry.register_collector(Box::new(Groups(groups)));
        registry.register_collector(Box::new(Spans(tracer)));
        registry.register_collector(Box::new(Process));
        Self {
            registry: Arc::new(registry),
            requests,
            running,
            prompt_tokens,
            generation_tokens,
            resumptions,
            first_token_s,
            per_token_s,
            duration_s,
            overhead_s,
        }
    }

    /// Starts to observe one request; it is `cancelled` unless told otherwise before it is dropped.
    #[must_use]
    pub fn observe(&self, endpoint: Endpoint) -> Observation {
        self.running.inc();
        let started = Instant::now();
        let (metrics, ended) = (self.clone(), AtomicBool::new(false));
        let (model, span) = (OnceLock::new(), OnceLock::new());
        Observation { inner: Arc::new(Inner { metrics, endpoint, model, span, started, ended }) }
    }

    pub fn resumed(&self) {
        self.resumptions.inc();
    }

    /// What sequences of a model count.
    #[must_use]
    pub fn tokens(&self, model: &str) -> Tokens {
        let labels = OfModel { model: model.into() };
        Tokens {
            generated: self.generation_tokens.get_or_create_owned(&labels),
            per_token_s: self.per_token_s.get_or_create_owned(&labels),
        }
    }

    /// In Prometheus' text format.
    ///
    /// # Errors
    /// None that a `String` could raise.
    pub fn text(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// The counters of one model's sequences, looked up once.
#[derive(Debug, Clone)]
pub struct Tokens {
    generated: Counter,
    per_token_s: Histogram,
}

impl Tokens {
    /// A sequence got tokens: `n` at once, `since_s` after the ones before (or none before).
    pub fn generated(&self, n: u64, since_s: Option<f64>) {
        self.generated.inc_by(n);
        if let Some(since_s) = since_s
            && n > 0
        {
            for _ in 0..n {
                self.per_token_s.observe(since_s / n as f64);
            }
        }
    }
}

/// One request, from read to last byte.
#[derive(Clone)]
pub struct Observation {
    inner: Arc<Inner>,
}

struct Inner {
    metrics: Metrics,
    endpoint: Endpoint,
    model: OnceLock<Arc<str>>,
    span: OnceLock<Span>,
    started: Instant,
    ended: AtomicBool,
}

impl Observation {
    /// Says which deployed model it is for.
    pub fn model(&self, name: &str) {
        self.inner.model.get_or_init(|| name.into());
        if let Some(span) = self.span() {
            span.set("gen_ai.request.model", name.to_owned());
        }
    }

    /// Says what is known to the request's span, which lasts as long as this.
    pub fn trace(&self, span: &Span) {
        self.inner.span.get_or_init(|| span.clone());
    }

    /// Of a request that is traced.
    #[must_use]
    pub fn span(&self) -> Option<&Span> {
        self.inner.span.get()
    }

    /// The whole answer's, for its span.
    pub fn tokens(&self, n_prompt: u64, n_generated: u64) {
        if let Some(span) = self.span() {
            span.set("gen_ai.usage.input_tokens", n_prompt);
            span.set("gen_ai.usage.output_tokens", n_generated);
        }
    }

    pub fn prompt_tokens(&self, n: u64) {
        let inner = &self.inner;
        inner.metrics.prompt_tokens.get_or_create(&inner.of_model()).inc_by(n);
    }

    /// The first token of any of its sequences is here.
    pub fn first_token(&self) {
        let inner = &self.inner;
        let histogram = inner.metrics.first_token_s.get_or_create(&inner.of_model());
        histogram.observe(inner.started.elapsed().as_secs_f64());
    }

    /// Its last token is here. `lead_time`: since it arrived at the lead, as that told.
    pub fn overhead(&self, lead_time: Duration) {
        let inner = &self.inner;
        let overhead = inner.started.elapsed().saturating_sub(lead_time);
        let histogram = inner.metrics.overhead_s.get_or_create(&inner.of_model());
        histogram.observe(overhead.as_secs_f64());
    }

    /// Says how it ended; the first word counts.
    pub fn end(&self, outcome: Outcome) {
        self.inner.end(outcome);
    }
}

impl Inner {
    fn end(&self, outcome: Outcome) {
        if self.ended.swap(true, Ordering::Relaxed) {
            return;
        }
        if let Some(span) = self.span.get() {
            span.set("evener.outcome", format!("{outcome:?}"));
        }
        let labels = Labels { endpoint: self.endpoint, outcome };
        self.metrics.requests.get_or_create(&labels).inc();
        self.metrics.running.dec();
        let histogram = self.metrics.duration_s.get_or_create(&self.of_model());
        histogram.observe(self.started.elapsed().as_secs_f64());
    }

    fn of_model(&self) -> OfModel {
        OfModel { model: self.model.get().cloned().unwrap_or_else(|| "".into()) }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.end(Outcome::cancelled);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_request_counts_once_and_the_gauge_falls_back() {
        let metrics = Metrics::new(watch::channel(Arc::default()).1, Tracer::default());
        let observation = metrics.observe(Endpoint::completions);
        observation.model("m");
        assert!(metrics.text().unwrap().contains("evener_requests_running 1"));
        observation.end(Outcome::ok);
        observation.end(Outcome::failed);
        drop(observation);
        drop(metrics.observe(Endpoint::chat_completions));
        let text = metrics.text().unwrap();
        for line in [
            "evener_requests_total{endpoint=\"completions\",outcome=\"ok\"} 1",
            "evener_requests_total{endpoint=\"chat_completions\",outcome=\"cancelled\"} 1",
            "evener_requests_running 0",
            "evener_request_duration_seconds_count{model=\"m\"} 1",
            "evener_request_duration_seconds_count{model=\"\"} 1",
            "# UNIT evener_request_duration_seconds seconds",
        ] {
            assert!(text.contains(line), "{line} is missing in\n{text}");
        }
        assert!(!text.contains("failed"), "{text}");
    }
}
