//! Where traces go: options that every process of a cluster has, with OpenTelemetry's own variables
//! as their defaults.

use std::time::Duration;

use anyhow::Context;
use clap::Args;
use evener_telemetry::Tracer;
use serde::Serialize;

/// For the last spans, when a process ends.
const CLOSING: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, Default, Args, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Tracing {
    /// Send traces of sampled requests to this OpenTelemetry collector (OTLP over gRPC), such as
    /// http://127.0.0.1:4317; default: OTEL_EXPORTER_OTLP_ENDPOINT, else nowhere.
    #[arg(long, env = "EVENER_OTLP_ENDPOINT", value_name = "URL")]
    pub otlp_endpoint: Option<String>,
    /// Part of the requests that is traced, 0 to 1, of those that come without a trace of their
    /// own; default: OTEL_TRACES_SAMPLER_ARG, else 0.01.
    #[arg(long, env = "EVENER_TRACE_SAMPLE", value_name = "RATIO")]
    pub trace_sample: Option<f64>,
}

impl Tracing {
    /// A tracer as these options want it; off if they name no collector.
    pub fn start(&self, service: &'static str, instance: String) -> anyhow::Result<Tracer> {
        let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        let endpoint =
            self.otlp_endpoint.clone().or_else(|| variable("OTEL_EXPORTER_OTLP_ENDPOINT"));
        let Some(endpoint) = endpoint else { return Ok(Tracer::default()) };
        let mut options = evener_telemetry::Options::to(endpoint, service, instance);
        let ratio = match (self.trace_sample, variable("OTEL_TRACES_SAMPLER_ARG")) {
            (Some(ratio), _) => Some(ratio),
            (None, Some(text)) => Some(
                text.parse()
                    .with_context(|| format!("OTEL_TRACES_SAMPLER_ARG: `{text}` is no number"))?,
            ),
            (None, None) => None,
        };
        options.ratio = ratio.unwrap_or(options.ratio);
        Ok(Tracer::start(options)?)
    }

    /// The same as flags, for a child process.
    pub fn flags(&self) -> Vec<(&'static str, String)> {
        let endpoint = self.otlp_endpoint.iter().map(|url| ("--otlp-endpoint", url.clone()));
        let sample = self.trace_sample.iter().map(|ratio| ("--trace-sample", ratio.to_string()));
        endpoint.chain(sample).collect()
    }
}

/// Sends what waits.
pub async fn finish(tracer: Tracer) {
    // A task that panicked has lost spans and nothing else.
    let _ = tokio::task::spawn_blocking(move || tracer.shut_down(CLOSING)).await;
}
