//! One row of logits, or a rank's part of one: its likeliest tokens without looking at all of it,
//! and the edits that stand between the model's logits and those that are chosen from.

use std::cmp::Ordering;

use evener_kernels::Isa;
use evener_kernels::peaks::{STRETCH, at_least, best};
use evener_kernels::softmax;

use super::sampler::Candidate;

/// The logit of a token that must not be chosen: it weighs nothing, and is no candidate.
pub const BANNED: f32 = f32::MIN;

/// A change to one token's logit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Edit {
    pub token: u32,
    /// Added first; -infinity bans the token.
    pub bias: f32,
    /// Then divides a logit that is positive, and multiplies another.
    pub repetition: f32,
    /// Then taken away: presence and frequency.
    pub penalty: f32,
}

impl Edit {
    #[must_use]
    pub fn ban(token: u32) -> Self {
        Self { token, bias: f32::NEG_INFINITY, repetition: 1.0, penalty: 0.0 }
    }

    #[must_use]
    pub fn apply(&self, logit: f32) -> f32 {
        let logit = logit + self.bias;
        let logit = if logit > 0.0 { logit / self.repetition } else { logit * self.repetition };
        (logit - self.penalty).clamp(BANNED, f32::MAX)
    }
}

/// Applies edits in order, then bans every token whose bit in `mask` (if there is one) is not set.
/// `logits` are those of the tokens from `first` on.
pub fn edit(logits: &mut [f32], first: u32, edits: &[Edit], mask: Option<&[u32]>) {
    for edit in edits {
        let at = edit.token.checked_sub(first).map(|at| at as usize);
        if let Some(logit) = at.and_then(|at| logits.get_mut(at)) {
            *logit = edit.apply(*logit);
        }
    }
    let Some(mask) = mask else { return };
    // A word's tokens at a time, for most words are all or nothing.
    let (mut token, mut logits) = (first, logits);
    while !logits.is_empty() {
        let n = (32 - token as usize % 32).min(logits.len());
        let (of_word, rest) = logits.split_at_mut(n);
        // A vocabulary may have rows that no token belongs to: beyond the mask nothing is allowed.
        let word = mask.get(token as usize / 32).copied().unwrap_or(0) >> (token % 32);
        match word {
            0 => of_word.fill(BANNED),
            u32::MAX => {}
            bits => (0u32..).zip(of_word).for_each(|(bit, logit)| {
                *logit = if bits >> bit & 1 == 1 { *logit } else { BANNED };
            }),
        }
        (token, logits) = (token + n as u32, rest);
    }
}

/// Why there is no token.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    #[error("the logit of token {token} is {value}; the model's numbers are broken")]
    NotFinite { token: usize, value: f32 },
}

/// Logits of the tokens from `first` on, all of them finite, and where the likeliest stands.
#[derive(Debug, Clone, Copy)]
pub struct Row<'a> {
    isa: Isa,
    first: u32,
    logits: &'a [f32],
    peaks: &'a [f32],
    best: usize,
}

impl<'a> Row<'a> {
    /// `logits`: not empty; `peaks`: their [`evener_kernels::peaks`].
    ///
    /// # Errors
    /// The first logit that is NaN or infinite, which no healthy model computes.
    ///
    /// # Panics
    /// If there are no logits.
    pub fn new(isa: Isa, first: u32, logits: &'a [f32], peaks: &'a [f32]) -> Result<Self, Error> {
        let (best, value) = best(isa, logits, peaks).expect("a row has logits");
        match value.is_finite() {
            true => Ok(Self { isa, first, logits, peaks, best }),
            false => Err(Error::NotFinite { token: first as usize + best, value }),
        }
    }

    /// The largest logit.
    #[must_use]
    pub fn highest(&self) -> f32 {
        self.logits[self.best]
    }

    /// The sum of all tokens' masses beside a logit that is no less than any of them.
    #[must_use]
    pub fn total(&self, highest: f32, scale: f32) -> u64 {
        softmax::total(self.isa, self.logits, highest, scale)
    }

    /// Going through the tokens that are not among `but`, in order: that at which the sum of their
    /// masses passes `at`; none if all of them do not.
    #[must_use]
    pub fn passing(&self, at: u64, but: &[Candidate], highest: f32, scale: f32) -> Option<u32> {
        let is_in = |token: u32| but.iter().any(|candidate| candidate.token == token);
        let (mut sum, mut first) = (0, self.first);
        for stretch in self.logits.chunks(STRETCH) {
            let end = first + stretch.len() as u32;
            let of_but = but.iter().filter(|candidate| (first..end).contains(&candidate.token));
            let of_but = of_but.map(|candidate| candidate.logit);
            let taken: u64 = softmax::masses(self.isa, of_but, highest, scale).sum();
            let mass = softmax::total(self.isa, stretch, highest, scale) - taken;
            if sum + mass > at {
                let logits = stretch.iter().copied();
                let masses = softmax::masses(self.isa, logits, highest, scale);
                for (token, mass) in (first..).zip(masses).filter(|&(token, _)| !is_in(token)) {
                    sum += mass;
                    if sum > at {
                        return Some(token);
                    }
                }
            }
            (sum, first) = (sum + mass, end);
        }
        None
    }

    /// Replaces `out` by the likeliest tokens that are not banned, best first: as many as make up
    /// this much mass at least, and hardly more; or all that weigh something.
    /// `keys` is only kept for its memory.
    pub fn reaching(
        &self,
        enough: u64,
        scale: f32,
        raw: &[f32],
        out: &mut Vec<Candidate>,
        keys: &mut Vec<u64>,
    ) {
        let highest = self.highest();
        let mut counts = [0u32; N_BINS];
        let steps = (scale * BINS_A_FOLD).min(f32::MAX);
        softmax::count(self.isa, self.logits, highest, steps, &mut counts);
        // What a bin weighs at least: each of its tokens as much as one where it ends.
        let (mut bin, mut mass) = (0, 0.0);
        while bin == 0 || (bin < N_BINS - 1 && mass < enough as f64) {
            let least = libm::exp(-(bin as f64 + 0.501) / f64::from(BINS_A_FOLD));
            mass += f64::from(counts[bin]) * least * softmax::ONE as f64;
            bin += 1;
        }
        let least = highest - (bin as f32 - 0.49) / (BINS_A_FOLD * scale);
        let least = if bin < N_BINS - 1 { least.max(BANNED.next_up()) } else { BANNED.next_up() };
        keys.clear();
        at_least(self.isa, self.logits, self.peaks, least, |at, logit| {
            keys.push(key(logit, at));
        });
        keys.sort_unstable();
        out.clear();
        out.extend(keys.iter().map(|key| {
            let at = *key as u32 as usize;
            Candidate { token: self.first + at as u32, logit: self.logits[at], raw: raw[at] }
        }));
    }

    /// Replaces `out` by the `n` likeliest tokens that are not banned, best first; of equals the
    /// lowest first. `raw`: the row before edits. `scratch` is only kept for its memory.
    pub fn likeliest(
        &self,
        n: usize,
        raw: &[f32],
        out: &mut Vec<Candidate>,
        scratch: &mut Vec<i32>,
    ) {
        out.clear();
        if n == 0 {
            return;
        }
        let mut take = |at: usize, logit: f32| {
            if logit > BANNED {
                out.push(Candidate { token: self.first + at as u32, logit, raw: raw[at] });
            }
        };
        if n == 1 {
            take(self.best, self.highest());
            return;
        }
        if n <= self.peaks.len() {
            scratch.clear();
            scratch.extend(self.peaks.iter().map(|peak| ordered(peak.to_bits() as i32)));
            // n logits are at least the n-th highest peak.
            let at = scratch.len() - n;
            let (_, &mut least, _) = scratch.select_nth_unstable(at);
            let least = f32::from_bits(ordered(least) as u32);
            // Where fewer may come than are asked for, the rest need not be looked at.
            let least = least.max(BANNED.next_up());
            at_least(self.isa, self.logits, self.peaks, least, take);
        } else {
            self.logits.iter().enumerate().for_each(|(at, &logit)| take(at, logit));
        }
        keep_likeliest(n, out);
    }
}

/// Bins of a row's logits below the largest, in steps of a 32nd of an e-fold, down to where a
/// token's mass is next to nothing.
const N_BINS: usize = 1024;
const BINS_A_FOLD: f32 = 32.0;

/// Sorts candidates and keeps the `n` likeliest.
pub fn keep_likeliest(n: usize, candidates: &mut Vec<Candidate>) {
    if n < candidates.len() {
        candidates.select_nth_unstable_by(n.saturating_sub(1), likelier);
        candidates.truncate(n);
    }
    candidates.sort_unstable_by(likelier);
}

/// The bits of a float as an integer in the order of `f32::total_cmp`, and back.
fn ordered(bits: i32) -> i32 {
    bits ^ ((bits >> 31) as u32 >> 1) as i32
}

/// A number for each token of a row, in the order of [`likelier`]; its low half is the index.
fn key(logit: f32, at: usize) -> u64 {
    // Adding 0 makes both zeros the same.
    let order = ordered((logit + 0.0).to_bits() as i32) ^ i32::MAX;
    u64::from(order as u32) << 32 | at as u64
}

/// By logit downwards, of equals the lower id first: a total order, so sorting has one result. The
/// two zeros are equal, as they are to whoever looks for the largest.
fn likelier(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.partial_cmp(&a.logit).unwrap_or(Ordering::Equal).then(a.token.cmp(&b.token))
}

/// The logarithm of a softmax's sum, so that log-probabilities of its tokens can be told.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Norm {
    highest: f32,
    ln: f64,
}

impl Norm {
    /// `total`: mass of all tokens beside `highest`, at scale 1.
    #[must_use]
    pub fn new(highest: f32, total: u64) -> Self {
        Self { highest, ln: libm::log(total as f64 / softmax::ONE as f64) }
    }

    /// Natural log-probability of a token with this logit.
    #[must_use]
    pub fn logprob(&self, logit: f32) -> f32 {
        (f64::from(logit) - f64::from(self.highest) - self.ln) as f32
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use evener_kernels::peaks::{n_peaks, peaks_of};

    fn peaks(logits: &[f32]) -> Vec<f32> {
        let mut peaks = vec![0.0; n_peaks(logits.len())];
        peaks_of(Isa::detect(), logits, &mut peaks);
        peaks
    }

    fn likeliest(logits: &[f32], n: usize) -> Vec<(u32, f32)> {
        let peaks = peaks(logits);
        let row = Row::new(Isa::detect(), 7, logits, &peaks).unwrap();
        let (mut out, mut scratch) = (Vec::new(), Vec::new());
        row.likeliest(n, logits, &mut out, &mut scratch);
        assert!(out.iter().all(|c| c.raw == c.logit));
        out.iter().map(|c| (c.token - 7, c.logit)).collect()
    }

    #[test]
    fn the_likeliest_are_those_that_sorting_all_gives() {
        // Few values, so that equals fall on both sides of the cut; and some that are banned.
        let logits: Vec<f32> = (0u32..20_000)
            .map(|i| if i % 10 == 3 { BANNED } else { (i * 7919 % 997) as f32 * 0.5 - 3.0 })
            .collect();
        let mut sorted: Vec<(u32, f32)> = (0u32..).zip(logits.iter().copied()).collect();
        sorted.retain(|(_, logit)| *logit > BANNED);
        sorted.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        for n in [0, 1, 2, 5, 20, 40, 319, 320, 321, 5000, 18_000, 20_000, 30_000] {
            assert_eq!(likeliest(&logits, n), sorted[..n.min(18_000)], "{n}");
        }
    }

    #[test]
    fn of_equals_the_lowest_comes_first_and_both_zeros_are_equal() {
        for n in [1, 2, 17] {
            assert_eq!(likeliest(&[1.0, 3.0, 3.0, 2.0], n)[0], (1, 3.0));
            assert_eq!(likeliest(&[-0.0, 0.0, -0.0], n)[0].0, 0);
            assert_eq!(likeliest(&[0.0, -0.0, 0.0], n)[0].0, 0);
            assert_eq!(likeliest(&[BANNED, BANNED], n), []);
        }
    }

    #[test]
    fn the_likeliest_that_reach_a_mass_are_a_beginning_of_the_sorted_row() {
        let logits: Vec<f32> = (0..9000)
            .map(|i| if i % 10 == 3 { BANNED } else { (i * 7919 % 8999) as f32 * -0.002 })
            .collect();
        let peaks = peaks(&logits);
        let row = Row::new(Isa::detect(), 0, &logits, &peaks).unwrap();
        let (mut sorted, mut out, mut scratch) = (Vec::new(), Vec::new(), Vec::new());
        let mut keys = Vec::new();
        row.likeliest(9000, &logits, &mut sorted, &mut scratch);
        for scale in [0.3, 1.0, 5.0] {
            let mass = |c: &Candidate| softmax::mass(c.logit, row.highest(), scale);
            let total: u64 = sorted.iter().map(mass).sum();
            for percent in [0, 1, 30, 95, 99, 100] {
                let enough = total / 100 * percent;
                row.reaching(enough, scale, &logits, &mut out, &mut keys);
                assert_eq!(out, sorted[..out.len()], "{scale} {percent}");
                let reached: u64 = out.iter().map(mass).sum();
                assert!(reached >= enough, "{scale} {percent}: {reached} of {enough}");
                let needless = out.len()
                    - (0..out.len())
                        .find(|&n| out[..n].iter().map(mass).sum::<u64>() >= enough)
                        .unwrap_or(out.len());
                // Bins count their tokens for a 32nd less than they may weigh.
                assert!(percent > 95 || needless < 900, "{scale} {percent}: {needless}");
            }
        }
    }

    #[test]
    fn a_place_in_the_mass_of_the_tail_is_the_token_it_falls_on() {
        let logits: Vec<f32> = (0..3000).map(|i| (i * 7919 % 13) as f32 * -0.7).collect();
        let peaks = peaks(&logits);
        let row = Row::new(Isa::detect(), 10, &logits, &peaks).unwrap();
        let (mut head, mut scratch) = (Vec::new(), Vec::new());
        row.likeliest(300, &logits, &mut head, &mut scratch);
        let but: Vec<u32> = head.iter().map(|candidate| candidate.token).collect();
        let mut sum = 0;
        for (token, &logit) in (10..).zip(&logits) {
            if but.contains(&token) {
                continue;
            }
            let mass = softmax::mass(logit, 0.0, 2.0);
            if token % 100 < 3 && mass > 0 {
                assert_eq!(row.passing(sum, &head, 0.0, 2.0), Some(token));
                assert_eq!(row.passing(sum + mass - 1, &head, 0.0, 2.0), Some(token));
            }
            sum += mass;
        }
        assert_eq!(row.passing(sum, &head, 0.0, 2.0), None);
    }

    #[test]
    fn broken_logits_are_named() {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let logits = [0.0, value];
            let error = Row::new(Isa::detect(), 40, &logits, &peaks(&logits)).unwrap_err();
            assert!(matches!(error, Error::NotFinite { token: 41, .. }), "{error}");
        }
        let extremes = [f32::MAX, f32::MIN];
        assert!(Row::new(Isa::detect(), 0, &extremes, &peaks(&extremes)).is_ok());
    }

    #[test]
    fn logprobs_are_those_of_the_softmax() {
        let odds = [2.0f32, 8.0, 1.0, 4.0, 1.0];
        let logits = odds.map(f32::ln);
        let peaks = peaks(&logits);
        let row = Row::new(Isa::detect(), 0, &logits, &peaks).unwrap();
        let norm = Norm::new(row.highest(), row.total(row.highest(), 1.0));
        for (logit, odds) in logits.into_iter().zip(odds) {
            assert!((norm.logprob(logit) - (odds / 16.0).ln()).abs() < 1e-6);
        }
        assert_eq!(Norm::new(1e30, softmax::ONE).logprob(0.0), -1e30);
    }
}
