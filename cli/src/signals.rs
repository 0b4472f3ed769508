//! Ctrl-C and SIGTERM: the first asks to finish, the second ends at once.

use anyhow::Context;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Exit code after a second signal, as shells use it for SIGINT.
const INTERRUPTED: i32 = 130;

/// Both signals as one source.
pub struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    /// Must be called within a runtime. From now on neither signal ends the process by itself.
    pub fn listen() -> anyhow::Result<Self> {
        let listen = |kind| signal(kind).context("signals cannot be listened to");
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
        })
    }

    /// The next of either.
    pub async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// A token that the first signal cancels; the second ends the process.
pub fn shutdown_token() -> anyhow::Result<CancellationToken> {
    let mut signals = Signals::listen()?;
    let token = CancellationToken::new();
    let cancelled = token.clone();
    // Lives as long as the process: its end is the process's end.
    tokio::spawn(async move {
        signals.next().await;
        tracing::info!("asked to stop; finishing what runs, a second signal ends at once");
        cancelled.cancel();
        signals.next().await;
        std::process::exit(INTERRUPTED);
    });
    Ok(token)
}
