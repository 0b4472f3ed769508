//! What drafted rows add to a step's time, learnt from steps. Pure; `pace` knows what a step takes
//! without.
//!
//! Rows cost by the tile, and differently on each machine: nine may take half as long again as
//! eight. So few drafts have a figure for each number, many one for some; what has none lies on a
//! line between its neighbours, and beyond them the line goes on as prefill does. A figure that was
//! not renewed for long is forgotten, for a machine changes too.

use std::time::Duration;

use super::pace::{Pace, learn};

/// 1, 2-3, 4-7, ... sequences.
const N_SEQUENCE_BUCKETS: usize = 12;
/// So many drafts are told apart; then 4 of them, 8, 16, ... are taken together.
const N_EXACT: usize = 16;
const N_DRAFT_BUCKETS: usize = N_EXACT + 16;
/// What a row costs beside what it might, while nothing is known: little, so that it is tried.
const FIRST_GUESS: f64 = 0.25;
/// Steps with drafts, after which a figure is forgotten.
const LIFETIME: u32 = 512;

/// Of steps with drafts and nothing else beside decodes.
#[derive(Debug, Default)]
pub struct Costs {
    figures: [[Option<Figure>; N_DRAFT_BUCKETS]; N_SEQUENCE_BUCKETS],
}

/// Averages.
#[derive(Debug, Clone, Copy)]
struct Figure {
    n_sequences: f64,
    n_drafts: f64,
    s: f64,
    age: u32,
}

impl Costs {
    /// A step of `n_sequences` that decoded, with `n_drafts` in all, took so long.
    pub fn observe(&mut self, n_sequences: usize, n_drafts: usize, took: Duration) {
        let row = &mut self.figures[sequence_bucket(n_sequences)];
        for figure in row.iter_mut() {
            *figure = figure.map(|f| Figure { age: f.age + 1, ..f }).filter(|f| f.age < LIFETIME);
        }
        let [n_sequences, drafts, s] = [n_sequences as f64, n_drafts as f64, took.as_secs_f64()];
        let new = Figure { n_sequences, n_drafts: drafts, s, age: 0 };
        let known = &mut row[draft_bucket(n_drafts)];
        *known = Some(known.map_or(new, |old| Figure {
            n_sequences: learn(old.n_sequences, new.n_sequences),
            n_drafts: learn(old.n_drafts, new.n_drafts),
            s: learn(old.s, new.s),
            age: 0,
        }));
    }

    /// Seconds that such a step takes; none while nothing is known of one without drafts.
    #[must_use]
    pub fn step_s(&self, pace: &Pace, n_sequences: usize, n_drafts: usize) -> Option<f64> {
        let plain = pace.decode_s(n_sequences)?;
        let row = &self.figures[sequence_bucket(n_sequences)];
        let (wanted, mut below) = (n_drafts as f64, (0.0, plain));
        for figure in row.iter().flatten() {
            // As if it had had as many sequences.
            let was_plain = pace.decode_s(figure.n_sequences.round() as usize)?;
            let at = (figure.n_drafts, (figure.s + plain - was_plain).max(plain));
            if at.0 >= wanted {
                let part = (wanted - below.0) / (at.0 - below.0);
                return Some(below.1 + part * (at.1 - below.1));
            }
            below = at;
        }
        // A row more costs no more than those that are there.
        let row_s = pace.token_s().unwrap_or(0.0).min(plain / n_sequences.max(1) as f64);
        let is_new = below.0 == 0.0;
        let row_s = if is_new { FIRST_GUESS * row_s } else { row_s };
        Some(below.1 + (wanted - below.0) * row_s)
    }
}

fn sequence_bucket(n_sequences: usize) -> usize {
    (n_sequences.max(1).ilog2() as usize).min(N_SEQUENCE_BUCKETS - 1)
}

fn draft_bucket(n_drafts: usize) -> usize {
    let n = n_drafts.max(1) - 1;
    if n < N_EXACT {
        return n;
    }
    // Four for each doubling.
    let doublings = (n / N_EXACT).ilog2() as usize;
    let quarter = n / ((N_EXACT / 4) << doublings) - 4;
    (N_EXACT + 4 * doublings + quarter).min(N_DRAFT_BUCKETS - 1)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn ms(ms: f64) -> Duration {
        Duration::from_secs_f64(ms / 1e3)
    }

    fn pace() -> Pace {
        let mut pace = Pace::new(2.0);
        pace.observe(0, 100, ms(100.0)); // a millisecond a token
        pace.observe(1, 0, ms(10.0));
        pace.observe(4, 0, ms(12.0));
        pace
    }

    #[test]
    fn costs_are_on_lines_between_figures_and_go_on_as_prefill() {
        let (mut costs, pace) = (Costs::default(), pace());
        let check = |costs: &Costs, [n_sequences, n_drafts]: [usize; 2], expect: f64| {
            let got = costs.step_s(&pace, n_sequences, n_drafts).unwrap() * 1e3;
            assert!((got - expect).abs() < 1e-6, "{n_sequences} {n_drafts}: {got}, not {expect}");
        };
        check(&costs, [1, 0], 10.0);
        check(&costs, [1, 8], 12.0);
        costs.observe(1, 4, ms(11.0));
        costs.observe(1, 8, ms(19.0));
        check(&costs, [1, 0], 10.0);
        check(&costs, [1, 2], 10.5);
        check(&costs, [1, 4], 11.0);
        check(&costs, [1, 6], 15.0);
        check(&costs, [1, 9], 20.0);
        check(&costs, [4, 4], 13.0); // not learnt from another number of sequences
        costs.observe(4, 4, ms(9.0));
        check(&costs, [4, 4], 12.0); // no less than without
        check(&costs, [5, 4], 13.0);
    }

    #[test]
    fn more_drafts_are_told_apart_less_finely() {
        let buckets: Vec<usize> = (1..=16).map(draft_bucket).collect();
        assert_eq!(buckets, (0..16).collect::<Vec<_>>());
        let buckets = [17, 20, 21, 25, 32, 33, 40, 41, 64, 65, 256, 257, 9999].map(draft_bucket);
        assert_eq!(buckets, [16, 16, 17, 18, 19, 20, 20, 21, 23, 24, 31, 31, 31]);
    }

    #[test]
    fn an_old_figure_is_forgotten() {
        let (mut costs, pace) = (Costs::default(), pace());
        costs.observe(1, 8, ms(100.0));
        for _ in 0..LIFETIME {
            assert!(costs.step_s(&pace, 1, 8).unwrap() > 0.09);
            costs.observe(1, 1, ms(10.0));
        }
        assert!(costs.step_s(&pace, 1, 8).unwrap() < 0.018);
    }

    #[test]
    fn nothing_is_known_before_a_plain_step() {
        let pace = Pace::new(2.0);
        let mut costs = Costs::default();
        costs.observe(1, 8, ms(1.0));
        assert_eq!(costs.step_s(&pace, 1, 8), None);
    }
}
