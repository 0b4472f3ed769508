//! Spans of sampled requests, for an OpenTelemetry collector: off unless an endpoint is named.
//!
//! Spans are recorded when they are over, with times that were measured elsewhere, so the engine's
//! thread can give them too. Nothing here waits: the queue is bounded, and what a collector does
//! not take is dropped and counted. Of requests only names, numbers and ids go out; never text.

mod context;
mod export;
mod span;

pub use context::{Context, Incoming};
pub use export::Counts;
pub use span::{Kind, Span, Value};

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use opentelemetry::trace::SpanId;
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, SpanData, SpanEvents, SpanLinks, SpanProcessor,
};

use export::Counting;

/// What is to be sent where.
#[derive(Debug, Clone)]
pub struct Options {
    /// `http://HOST:PORT` of a collector that speaks OTLP over gRPC.
    pub endpoint: String,
    /// Of the requests that come without a trace of their own, this part is sampled; 0 to 1.
    pub ratio: f64,
    /// "evener-coordinator", "evener-worker".
    pub service: &'static str,
    /// Tells processes of one service apart.
    pub instance: String,
    /// Spans that may wait; more are dropped.
    pub max_queued: usize,
    /// Between two batches.
    pub interval: Duration,
    /// For a collector to take a batch.
    pub export_timeout: Duration,
}

impl Options {
    /// The defaults, to `endpoint`.
    #[must_use]
    pub fn to(endpoint: String, service: &'static str, instance: String) -> Self {
        Self {
            endpoint,
            ratio: 0.01,
            service,
            instance,
            max_queued: 4096,
            interval: Duration::from_secs(1),
            export_timeout: Duration::from_secs(5),
        }
    }
}

/// Why nothing can be traced.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("`{endpoint}` is no collector; expected http://HOST:PORT of one that speaks OTLP/gRPC")]
    BadEndpoint { endpoint: String },
    #[error("a sampling ratio of {ratio} is none; expected 0 to 1")]
    BadRatio { ratio: f64 },
    #[error("the exporter of traces cannot be built: {0}")]
    Exporter(#[from] opentelemetry_otlp::ExporterBuildError),
}

/// Takes spans. Cheap to clone; off by default, and then costs a look at a pointer.
#[derive(Debug, Clone, Default)]
pub struct Tracer(Option<Arc<Inner>>);

#[derive(Debug)]
struct Inner {
    processor: BatchSpanProcessor,
    scope: InstrumentationScope,
    ratio: f64,
    counts: Arc<export::Shared>,
}

/// A span that is over.
#[derive(Debug)]
pub struct Finished {
    pub name: &'static str,
    pub context: Context,
    pub parent: Option<Context>,
    pub kind: Kind,
    pub start: SystemTime,
    pub end: SystemTime,
    pub failed: bool,
    pub attributes: Vec<(&'static str, Value)>,
}

impl Tracer {
    /// Starts a thread that sends batches. Call it on a Tokio runtime, whose tasks hold the
    /// connection; the collector need not be there.
    ///
    /// # Errors
    /// An endpoint or a ratio that cannot be.
    pub fn start(options: Options) -> Result<Self, Error> {
        let Options { endpoint, ratio, service, instance, .. } = options;
        if !(0.0..=1.0).contains(&ratio) {
            return Err(Error::BadRatio { ratio });
        }
        let has_host = endpoint.strip_prefix("http://").is_some_and(|host| !host.is_empty());
        if !has_host {
            return Err(Error::BadEndpoint { endpoint });
        }
        let exporter = SpanExporter::builder()
            .with_tonic()
            .with_endpoint(endpoint)
            .with_timeout(options.export_timeout)
            .build()?;
        let counts = Arc::<export::Shared>::default();
        let config = BatchConfigBuilder::default()
            .with_max_queue_size(options.max_queued)
            .with_max_export_batch_size(options.max_queued.min(512))
            .with_scheduled_delay(options.interval)
            .build();
        let exporter = Counting::new(exporter, Arc::clone(&counts));
        let mut processor = BatchSpanProcessor::new(exporter, config);
        let about = [
            KeyValue::new("service.name", service),
            KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
            KeyValue::new("service.instance.id", instance),
        ];
        let resource = Resource::builder_empty().with_attributes(about).build();
        processor.set_resource(&resource);
        let scope = InstrumentationScope::builder("evener").build();
        Ok(Self(Some(Arc::new(Inner { processor, scope, ratio, counts }))))
    }

    #[must_use]
    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Begins the span of a request that came from outside, if it is sampled: as whoever sent it
    /// decided, or by the ratio.
    #[must_use]
    pub fn request(&self, name: &'static str, traceparent: Option<&str>) -> Option<Span> {
        let inner = self.0.as_ref()?;
        let (context, parent) = match traceparent.and_then(Incoming::parse) {
            Some(Incoming { sampled: false, .. }) => return None,
            Some(Incoming { context, .. }) => (context.child(), Some(context)),
            None if rand::random::<f64>() < inner.ratio => (Context::root(), None),
            None => return None,
        };
        Some(Span::begin(self.clone(), name, context, parent, Kind::Server))
    }

    /// Takes a span; drops it if too many wait.
    pub fn record(&self, finished: Finished) {
        let Some(inner) = &self.0 else { return };
        let Finished { name, context, parent, kind, start, end, failed, attributes } = finished;
        inner.counts.recorded();
        let attribute = |(key, value): (&'static str, Value)| KeyValue::new(key, value.0);
        inner.processor.on_end(SpanData {
            span_context: context.to_sdk(),
            parent_span_id: parent.map_or(SpanId::INVALID, |parent| parent.span_id()),
            parent_span_is_remote: kind == Kind::Server && parent.is_some(),
            span_kind: kind.to_sdk(),
            name: name.into(),
            start_time: start,
            end_time: end.max(start),
            attributes: attributes.into_iter().map(attribute).collect(),
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: SpanLinks::default(),
            status: span::status(failed),
            instrumentation_scope: inner.scope.clone(),
        });
    }

    /// What became of the spans so far; none if it is off.
    #[must_use]
    pub fn counts(&self) -> Option<Counts> {
        Some(self.0.as_ref()?.counts.read())
    }

    /// Sends what waits, for at most so long. Blocks: not for a thread of the runtime.
    pub fn shut_down(&self, at_most: Duration) {
        let Some(inner) = &self.0 else { return };
        if let Err(error) = inner.processor.shutdown_with_timeout(at_most) {
            tracing::warn!(%error, "the last spans were not sent");
        }
    }
}
