//! What became of this process's spans; nothing where none are recorded.

use std::fmt;

use evener_telemetry::Tracer;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::metrics::MetricType;

#[derive(Debug)]
pub(super) struct Spans(pub(super) Tracer);

impl Collector for Spans {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Some(counts) = self.0.counts() else { return Ok(()) };
        let help = "Spans recorded, and of those exported to the collector or failed to be.";
        let mut family = encoder.encode_descriptor("spans", help, None, MetricType::Counter)?;
        let results = [
            ("recorded", counts.recorded),
            ("exported", counts.exported),
            ("failed", counts.failed),
        ];
        for (result, n) in results {
            let labels = [("result", result)];
            let mut counter = family.encode_family(&labels)?;
            counter.encode_counter::<[(&str, &str); 1], u64, u64>(&n, None)?;
        }
        Ok(())
    }
}
