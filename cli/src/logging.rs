//! Where log lines go: stderr, as text or JSON. Standard output belongs to what people asked for.

use anyhow::Context;
use serde::Serialize;
use tracing_subscriber::EnvFilter;

/// Shape of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    Text,
    Json,
}

/// Starts logging; `filter` is a level or `target=level,...`.
pub fn start(filter: &str, format: Format) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(filter).with_context(|| {
        format!(
            "`{filter}` is not a log filter; write error, warn, info, debug, trace or target=level"
        )
    })?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        Format::Text => builder.with_ansi(false).init(),
        Format::Json => builder.json().init(),
    }
    Ok(())
}
