//! How much prefill a step may carry while sequences decode, so that those who already read do not
//! wait for those who arrive (Agrawal et al. 2024, Sarathi-Serve). Pure: the lead tells it what
//! steps took.
//!
//! The bound is a time: a mixed step may last `stretch` times as long as the same step without
//! prefill. Where most of those present still wait for their first token, it is measured by a step
//! in which half of them decode: the few who read would soon share steps with all the others, and
//! short steps of their own now would only keep those waiting. Both costs are learnt from the steps
//! themselves. Where no step without prefill was
//! seen with as many sequences, those beyond are taken to cost as much as prefilled tokens. A wrong
//! guess costs time only; tokens do not depend on how prompts are cut.

use std::time::Duration;

/// Prefill that a step may always carry, so that prompts end.
const LEAST: usize = 4;
/// Before anything was measured.
const FIRST_GUESS: usize = 64;
/// Weight of the newest measurement.
const NEWEST: f64 = 0.2;
/// A measurement counts at most as this many times the average: a step that the system
/// interrupted says little.
const MOST: f64 = 2.0;
/// Steps of 1, 2-3, 4-7, ... decoding sequences are averaged apart.
const N_BUCKETS: usize = 12;

/// What steps cost.
#[derive(Debug)]
pub struct Pace {
    stretch: f64,
    /// Of steps without prefill, by the bits of the number of sequences.
    decodes: [Option<Decodes>; N_BUCKETS],
    /// Of a prefilled token, seconds.
    token_s: Option<f64>,
}

/// Averages.
#[derive(Debug, Clone, Copy)]
struct Decodes {
    n: f64,
    s: f64,
}

impl Pace {
    /// # Panics
    /// `stretch` is not more than 1.
    #[must_use]
    pub fn new(stretch: f64) -> Self {
        assert!(stretch > 1.0, "prefill needs some time");
        Self { stretch, decodes: [None; N_BUCKETS], token_s: None }
    }

    /// A step of `n_decodes` sequences that decoded and `n_prefill` tokens of others took so long.
    pub fn observe(&mut self, n_decodes: usize, n_prefill: usize, took: Duration) {
        let took = took.as_secs_f64();
        if n_prefill == 0 {
            let new = Decodes { n: n_decodes as f64, s: took };
            let known = &mut self.decodes[bucket(n_decodes)];
            *known = Some(
                known.map_or(new, |old| Decodes { n: learn(old.n, new.n), s: learn(old.s, new.s) }),
            );
            return;
        }
        let decode = match n_decodes {
            0 => Some(0.0),
            n => self.decode_s(n),
        };
        if let Some(decode) = decode {
            // Not less than a tenth of the step: the estimate of the other part may be old.
            let prefill = (took - decode).max(0.1 * took);
            let new = prefill / n_prefill as f64;
            self.token_s = Some(self.token_s.map_or(new, |old| learn(old, new)));
        }
    }

    /// Tokens of prefill for a step in which `n_decodes` of `n_present` sequences decode: those
    /// that run, and those that wait for a place that is there.
    #[must_use]
    pub fn max_prefill(&self, n_decodes: usize, n_present: usize) -> usize {
        let measure = n_decodes.max(n_present / 2);
        match (self.decode_s(n_decodes), self.decode_s(measure), self.token_s) {
            (Some(decode), Some(measure), Some(token)) => {
                let room = (self.stretch * measure - decode) / token.max(f64::MIN_POSITIVE);
                (room as usize).max(LEAST)
            }
            _ => FIRST_GUESS,
        }
    }

    /// Of a step of `n_decodes` sequences without prefill.
    #[must_use]
    pub fn decode_s(&self, n_decodes: usize) -> Option<f64> {
        let (fewer, more) = self.decodes.split_at(bucket(n_decodes) + 1);
        let nearest = fewer.iter().rev().chain(more).find_map(|&known| known)?;
        let n_beyond = (n_decodes as f64 - nearest.n).max(0.0);
        Some(nearest.s + n_beyond * self.token_s.unwrap_or(0.0))
    }

    /// Of a prefilled token.
    #[must_use]
    pub fn token_s(&self) -> Option<f64> {
        self.token_s
    }
}

fn bucket(n_decodes: usize) -> usize {
    ((n_decodes.max(1).ilog2()) as usize).min(N_BUCKETS - 1)
}

/// A new average.
pub fn learn(old: f64, new: f64) -> f64 {
    old + NEWEST * (new.min(MOST * old) - old)
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_step_is_stretched_as_far_as_it_may_be() {
        let mut pace = Pace::new(2.5);
        assert_eq!(pace.max_prefill(1, 1), FIRST_GUESS);
        pace.observe(0, 100, ms(50)); // half a millisecond a token
        assert_eq!(pace.max_prefill(1, 1), FIRST_GUESS, "nothing to compare with");
        for _ in 0..50 {
            pace.observe(4, 0, ms(20));
            pace.observe(4, 60, ms(50));
        }
        let check = |pace: &Pace, n_decodes, expect: usize| {
            let n = pace.max_prefill(n_decodes, n_decodes + 1);
            assert!(n.abs_diff(expect) <= 1, "{n} beside {n_decodes}, not {expect}");
        };
        check(&pace, 4, 60); // 1.5 times 20 ms, at 0.5 ms a token
        check(&pace, 1, 60); // nothing nearer is known
        check(&pace, 32, 102); // 28 more at 0.5 ms each: 1.5 times 34 ms
        for _ in 0..50 {
            pace.observe(32, 0, ms(100));
        }
        check(&pace, 4, 60);
        check(&pace, 32, 300);
    }

    #[test]
    fn where_most_wait_for_their_first_token_half_of_all_are_the_measure() {
        let mut pace = Pace::new(2.0);
        pace.observe(0, 100, ms(100)); // a millisecond a token
        for (n_decodes, took) in [(1, 4), (16, 20)] {
            pace.observe(n_decodes, 0, ms(took));
        }
        for (n_decodes, n_present, expect) in [
            (1, 1, 4),
            (1, 3, 4),
            (1, 32, 36),  // twice 20 ms, less the 4 that the one takes
            (16, 32, 20), // from here on those who read are the measure
            (16, 17, 20),
        ] {
            assert_eq!(pace.max_prefill(n_decodes, n_present), expect, "{n_decodes} {n_present}");
        }
    }

    #[test]
    fn an_interrupted_step_changes_little_and_a_lasting_change_is_learnt() {
        let mut pace = Pace::new(2.0);
        pace.observe(0, 100, ms(100));
        pace.observe(1, 0, ms(100));
        assert_eq!(pace.max_prefill(1, 1), 100);
        pace.observe(1, 0, ms(60_000));
        assert!(pace.max_prefill(1, 1) <= 120);
        for _ in 0..100 {
            pace.observe(1, 0, ms(2));
        }
        assert_eq!(pace.max_prefill(1, 1), LEAST, "though two would do");
    }
}
