//! How loading looks while one waits: a bar for each rank on a terminal, a line now and then
//! elsewhere.

use std::io::IsTerminal;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde_json::Value;

use super::preflight::Plan;
use crate::values::Bytes;
use crate::view::View;

/// A plain line for each this many parts of a rank's weights.
const PLAIN_STEPS: u64 = 4;

pub struct Progress {
    bars: Option<MultiProgress>,
    ranks: Vec<Rank>,
}

struct Rank {
    worker: String,
    bar: ProgressBar,
    total: u64,
    /// Last plain line, in parts of [`PLAIN_STEPS`].
    told: Option<u64>,
}

impl Progress {
    pub fn new(plan: &Plan) -> Self {
        let n = plan.shares.len();
        let weights = Bytes(plan.weight_bytes.iter().sum());
        eprintln!(
            "{}: {weights} of weights over {n} {}, shares {}, {} {} each",
            plan.name,
            if n == 1 { "worker" } else { "workers" },
            plan.shares.iter().map(u32::to_string).collect::<Vec<_>>().join(":"),
            plan.threads,
            if plan.threads == 1 { "thread" } else { "threads" },
        );
        let bars = std::io::stderr().is_terminal().then(MultiProgress::new);
        let style = ProgressStyle::with_template(
            "{prefix:>6} [{bar:30}] {bytes:>10}/{total_bytes:<10} {msg}",
        )
        .expect("the template is fixed")
        .progress_chars("=> ");
        let rank = |(rank, &total): (usize, &u64)| {
            let bar =
                ProgressBar::new(total).with_style(style.clone()).with_prefix(format!("w{rank}"));
            let bar = match &bars {
                Some(bars) => bars.add(bar),
                None => ProgressBar::hidden(),
            };
            bar.set_message("starting");
            Rank { worker: format!("w{rank}"), bar, total, told: None }
        };
        let ranks = plan.weight_bytes.iter().enumerate().map(rank).collect();
        Self { bars, ranks }
    }

    pub fn update(&mut self, status: &Value) {
        // A page that cannot be read costs the bars, not the start.
        let Ok(view) = View::read(status) else { return };
        for rank in &mut self.ranks {
            let Some(worker) = view.workers.iter().find(|w| w.id == rank.worker) else { continue };
            let member = view.member(&worker.id);
            let stage = member.and_then(|m| m.stage.as_deref()).unwrap_or(&worker.state);
            // The worker knows better than the plan what it loads, and says so only while it loads.
            if let Some(total) = member.and_then(|m| m.bytes_total).filter(|&total| total > 0) {
                rank.total = rank.total.max(total);
            }
            let total = rank.total;
            let done = match stage {
                "ready" | "warming" => total,
                _ => member.and_then(|m| m.bytes_done).unwrap_or(0).min(total),
            };
            rank.bar.set_length(total);
            rank.bar.set_position(done);
            rank.bar.set_message(stage.to_owned());
            rank.tell(self.bars.is_none(), done, total, stage);
        }
    }

    /// Everything is loaded.
    pub fn finish(&mut self) {
        let plain = self.bars.is_none();
        for rank in &mut self.ranks {
            rank.bar.set_position(rank.bar.length().unwrap_or(rank.total));
            rank.bar.finish_with_message("ready");
            rank.tell(plain, rank.total, rank.total, "ready");
        }
    }

    /// Makes room for an error.
    pub fn clear(&mut self) {
        if let Some(bars) = &self.bars {
            // The terminal may be gone; then there is nothing to clear.
            let _ = bars.clear();
        }
    }
}

impl Rank {
    fn tell(&mut self, plain: bool, done: u64, total: u64, state: &str) {
        let part = (done * PLAIN_STEPS).checked_div(total).unwrap_or(0);
        if plain && self.told.is_none_or(|told| part > told) {
            self.told = Some(part);
            eprintln!("{}: {state}, {} of {} loaded", self.worker, Bytes(done), Bytes(total));
        }
    }
}
