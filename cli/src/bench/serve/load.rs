//! Drives sessions at an endpoint as the arrivals say, and collects what became of each request.

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use tokio::task::JoinSet;

use super::arrivals::Arrivals;
use super::request::Asker;
use super::statistics::Outcome;
use super::traffic::Traffic;

/// Most sessions at once of an open loop; beyond, it is late.
const MAX_RUNNING: usize = 4096;
const TICK: Duration = Duration::from_millis(250);

pub struct Load {
    pub asker: Asker,
    pub traffic: Traffic,
    pub arrivals: Arrivals,
    pub n_requests: usize,
    /// No session begins after it.
    pub duration: Option<Duration>,
    /// Number of the first session.
    pub first_session: u64,
    pub live: Arc<Live>,
}

/// What runs, for those who watch.
#[derive(Debug, Default)]
pub struct Live {
    n_ended: AtomicU64,
    n_failed: AtomicU64,
    n_tokens: AtomicU64,
}

/// Requests that ended, and those of them that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Ended {
    pub requests: u64,
    pub failed: u64,
}

impl Live {
    pub fn ended(&self) -> Ended {
        Ended { requests: self.n_ended.load(Relaxed), failed: self.n_failed.load(Relaxed) }
    }
}

impl Load {
    /// Runs to the end, or until it is stopped: then the outcomes are of what had ended. `what` is
    /// shown with what runs; without it nothing is.
    pub async fn run(
        mut self,
        what: Option<&str>,
        stop: impl Future<Output = ()>,
    ) -> anyhow::Result<Vec<Outcome>> {
        let start = Instant::now();
        let bar = what.map_or_else(ProgressBar::hidden, bar);
        let mut stop = std::pin::pin!(stop);
        let mut outcomes = Vec::new();
        let mut sessions = JoinSet::new();
        let (mut n_begun, mut nth) = (0, self.first_session);
        let mut tick = tokio::time::interval(TICK);
        loop {
            let more = n_begun < self.n_requests && sessions.len() < MAX_RUNNING;
            let now_s = start.elapsed().as_secs_f64();
            let next_s = self.arrivals.next_s(sessions.len(), now_s);
            let is_in_time = |s: &f64| self.duration.is_none_or(|d| *s < d.as_secs_f64());
            let next_s = next_s.filter(|s| more && is_in_time(s));
            if next_s.is_none() && sessions.is_empty() {
                break;
            }
            let begin = start + Duration::from_secs_f64(next_s.unwrap_or(0.0));
            tokio::select! {
                () = &mut stop => {
                    eprintln!("stopped; the figures are of the requests that had ended");
                    break;
                }
                () = tokio::time::sleep_until(begin.into()), if next_s.is_some() => {
                    let turns: Vec<String> = self.traffic.session(nth).into_iter()
                        .take(self.n_requests - n_begun).collect();
                    n_begun += turns.len();
                    nth += 1;
                    self.arrivals.began();
                    sessions.spawn(session(self.asker.clone(), turns, start, self.live.clone()));
                }
                Some(ended) = sessions.join_next() => {
                    outcomes.extend(ended.context("a session could not be run")?);
                }
                _ = tick.tick() => bar.set_message(line(&self.live, sessions.len(), start.elapsed())),
            }
        }
        bar.finish_and_clear();
        Ok(outcomes)
    }
}

/// One turn after another; a failed one ends it.
async fn session(
    asker: Asker,
    turns: Vec<String>,
    start: Instant,
    live: Arc<Live>,
) -> Vec<Outcome> {
    let (mut prompt, mut outcomes) = (String::new(), Vec::new());
    for turn in turns {
        prompt.push_str(&turn);
        let sent_s = start.elapsed().as_secs_f64();
        let heard = |n| {
            live.n_tokens.fetch_add(n, Relaxed);
        };
        let answer = asker.ask(&prompt, heard).await;
        let failed = answer.is_err();
        let end_s = start.elapsed().as_secs_f64();
        live.n_ended.fetch_add(1, Relaxed);
        let result = match answer {
            Ok((served, text)) => {
                prompt.push_str(&text);
                Ok(served)
            }
            Err(failure) => {
                // The first says why; the rest are counted.
                if live.n_failed.fetch_add(1, Relaxed) == 0 {
                    eprintln!("a request failed ({}): {}", failure.kind, failure.message);
                }
                Err(failure.kind)
            }
        };
        outcomes.push(Outcome { sent_s, end_s, result });
        if failed {
            break;
        }
    }
    outcomes
}

fn line(live: &Live, n_running: usize, elapsed: Duration) -> String {
    let (ended, failed) = (live.n_ended.load(Relaxed), live.n_failed.load(Relaxed));
    let seconds = elapsed.as_secs_f64();
    let tok_s = live.n_tokens.load(Relaxed) as f64 / seconds.max(1e-3);
    format!("{seconds:.0} s: {ended} ended, {n_running} run, {failed} failed, {tok_s:.1} tok/s")
}

/// A line on a terminal, nothing elsewhere.
fn bar(what: &str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{prefix} {msg}").expect("the template is fixed");
    ProgressBar::new_spinner().with_style(style).with_prefix(what.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_tells_what_ended_what_runs_and_how_fast() {
        let live = Live::default();
        live.n_ended.store(7, Relaxed);
        live.n_failed.store(2, Relaxed);
        live.n_tokens.store(150, Relaxed);
        let line = line(&live, 3, Duration::from_secs(4));
        assert_eq!(line, "4 s: 7 ended, 3 run, 2 failed, 37.5 tok/s");
        assert_eq!(live.ended(), Ended { requests: 7, failed: 2 });
    }
}
