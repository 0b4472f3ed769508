//! Logits to a token, and to log-probabilities. Pure: a token depends on (logits, sampling,
//! position).
//!
//! Random numbers come from a counter, not from a state, so that a sequence resumed elsewhere with
//! its tokens so far goes on with the tokens it would have had. Exponentials are our own or `libm`'s
//! and sums are f64 in a fixed order, so that two machines agree.

use std::cmp::Ordering;

use evener_kernels::Isa;
use evener_kernels::peaks::{STRETCH, at_least, best};
use evener_kernels::softmax::weigh;

/// How tokens are chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 takes the likeliest token.
    pub temperature: f32,
    /// Only the k likeliest; 0: all.
    pub top_k: u32,
    /// Only the likeliest that make up this much probability; 1: all.
    pub top_p: f32,
    pub seed: u64,
    /// Any of these ends the sequence and is its last token.
    pub stop_token_ids: Vec<u32>,
    /// None: report no log-probabilities; else of the chosen token and of the n likeliest.
    pub n_logprobs: Option<u32>,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            seed: 0,
            stop_token_ids: Vec::new(),
            n_logprobs: None,
        }
    }
}

/// Most alternatives reported with a token.
pub const MAX_LOGPROBS: u32 = 20;

/// Why there is no token.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    #[error("the logit of token {token} is {value}; the model's numbers are broken")]
    NotFinite { token: usize, value: f32 },
}

/// Working memory, kept between calls.
#[derive(Debug, Default)]
pub struct Scratch {
    candidates: Vec<Candidate>,
    /// As integers of the same order.
    peaks: Vec<i32>,
    /// Logits of the candidates.
    chosen: Vec<f32>,
    /// Of a whole row, or of the candidates, and their sum by stretch.
    weights: Vec<f32>,
    sums: Vec<f64>,
}

/// One row of logits, all of them finite, and where the likeliest stand.
#[derive(Debug, Clone, Copy)]
pub struct Row<'a> {
    isa: Isa,
    logits: &'a [f32],
    peaks: &'a [f32],
    best: usize,
}

impl Sampling {
    /// The likeliest token, whatever the seed.
    #[must_use]
    pub fn is_greedy(&self) -> bool {
        self.temperature <= 0.0 || self.top_k == 1
    }
}

impl<'a> Row<'a> {
    /// `logits`: `[vocab]`, not empty; `peaks`: its [`evener_kernels::peaks`].
    ///
    /// # Errors
    /// The first logit that is NaN or infinite, which no healthy model computes.
    ///
    /// # Panics
    /// If there are no logits.
    pub fn new(isa: Isa, logits: &'a [f32], peaks: &'a [f32]) -> Result<Self, Error> {
        let (best, value) = best(isa, logits, peaks).expect("a row has logits");
        match value.is_finite() {
            true => Ok(Self { isa, logits, peaks, best }),
            false => Err(Error::NotFinite { token: best, value }),
        }
    }

    /// Replaces the candidates by the `n` likeliest tokens, best first; of equals the lowest first.
    fn likeliest(&self, n: usize, scratch: &mut Scratch) {
        let Scratch { candidates, peaks, .. } = scratch;
        candidates.clear();
        let candidate = |token, logit| Candidate { token, logit, weight: 0.0 };
        if n == 0 {
            return;
        }
        if n <= self.peaks.len() {
            peaks.clear();
            peaks.extend(self.peaks.iter().map(|peak| ordered(peak.to_bits() as i32)));
            // n logits are at least the n-th highest peak.
            let at = peaks.len() - n;
            let (_, &mut least, _) = peaks.select_nth_unstable(at);
            let least = f32::from_bits(ordered(least) as u32);
            at_least(self.isa, self.logits, self.peaks, least, |token, logit| {
                candidates.push(candidate(token as u32, logit));
            });
        } else {
            candidates.extend((0u32..).zip(self.logits).map(|(t, &logit)| candidate(t, logit)));
        }
        if n < candidates.len() {
            candidates.select_nth_unstable_by(n - 1, likelier);
            candidates.truncate(n);
        }
        candidates.sort_unstable_by(likelier);
    }

    /// Replaces the candidates by the likeliest tokens whose weights, which are there, reach
    /// `enough` together, and returns their sum.
    fn nucleus(&self, enough: f64, scratch: &mut Scratch) -> f64 {
        // Usually a few tokens: a short head first, and longer ones only if need be.
        let mut n = 64;
        loop {
            self.likeliest(n, scratch);
            let Scratch { candidates, weights, .. } = &mut *scratch;
            for candidate in candidates.iter_mut() {
                candidate.weight = weights[candidate.token as usize].into();
            }
            if let Some(sum) = keep_top_p(candidates, enough) {
                return sum;
            }
            if n >= self.logits.len() {
                return candidates.iter().map(|candidate| candidate.weight).sum();
            }
            n *= 8;
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Candidate {
    token: u32,
    logit: f32,
    weight: f64,
}

/// The token at `position` of its sequence.
#[must_use]
pub fn sample(row: &Row<'_>, sampling: &Sampling, position: u32, scratch: &mut Scratch) -> u32 {
    if sampling.is_greedy() {
        return row.best as u32;
    }
    let scale = (1.0 / sampling.temperature).min(f32::MAX);
    let highest = row.logits[row.best];
    let (n, top_k, top_p) = (row.logits.len(), sampling.top_k as usize, f64::from(sampling.top_p));
    let uniform = uniform(sampling.seed, position);
    if top_k > 0 && top_k < n {
        row.likeliest(top_k, scratch);
        let Scratch { candidates, chosen, weights, sums, .. } = scratch;
        chosen.clear();
        chosen.extend(candidates.iter().map(|candidate| candidate.logit));
        weights.resize(top_k, 0.0);
        sums.resize(top_k.div_ceil(STRETCH), 0.0);
        weigh(row.isa, chosen, highest, scale, weights, sums);
        let mut total = 0.0;
        for (candidate, &weight) in candidates.iter_mut().zip(&*weights) {
            candidate.weight = weight.into();
            total += candidate.weight;
        }
        if top_p < 1.0 {
            total = keep_top_p(candidates, top_p * total).unwrap_or(total);
        }
        return draw(candidates, uniform * total);
    }
    let Scratch { weights, sums, .. } = scratch;
    weights.resize(n, 0.0);
    sums.resize(n.div_ceil(STRETCH), 0.0);
    weigh(row.isa, row.logits, highest, scale, weights, sums);
    let total: f64 = sums.iter().sum();
    if top_p < 1.0 {
        let total = row.nucleus(top_p * total, scratch);
        return draw(&scratch.candidates, uniform * total);
    }
    draw_of_all(weights, sums, uniform * total)
}

/// The bits of a float as an integer in the order of `f32::total_cmp`, and back.
fn ordered(bits: i32) -> i32 {
    bits ^ ((bits >> 31) as u32 >> 1) as i32
}

/// By logit downwards, of equals the lower id first: a total order, so sorting has one result.
fn likelier(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.total_cmp(&a.logit).then(a.token.cmp(&b.token))
}

/// Keeps of candidates in order those whose weights reach `enough` together, at least one, and
/// returns their sum (Holtzman et al. 2020, section 3.1); none if all of them do not.
fn keep_top_p(candidates: &mut Vec<Candidate>, enough: f64) -> Option<f64> {
    let mut sum = 0.0;
    for n in 0..candidates.len() {
        sum += candidates[n].weight;
        if sum >= enough {
            candidates.truncate(n + 1);
            return Some(sum);
        }
    }
    None
}

/// The token in whose stretch of the summed weights `at` falls, all tokens in order of their ids.
fn draw_of_all(weights: &[f32], sums: &[f64], at: f64) -> u32 {
    let (mut first, mut before, mut end) = (0, 0.0, 0.0);
    for (stretch, sum) in sums.iter().enumerate().filter(|(_, sum)| **sum > 0.0) {
        (first, before) = (stretch * STRETCH, end);
        end += sum;
        if at < end {
            break;
        }
    }
    let mut drawn = first;
    for (token, &weight) in (first..).zip(&weights[first..]).take(STRETCH) {
        if weight > 0.0 {
            drawn = token; // rounding may leave `at` at the very end: the last that has any weight
            before += f64::from(weight);
            if at < before {
                break;
            }
        }
    }
    drawn as u32
}

/// The candidate in whose stretch of the summed weights `at` falls.
fn draw(candidates: &[Candidate], at: f64) -> u32 {
    let mut sum = 0.0;
    for candidate in candidates {
        sum += candidate.weight;
        if at < sum {
            return candidate.token;
        }
    }
    // Rounding left `at` at the very end: the last one that has any weight.
    let last = candidates.iter().rev().find(|candidate| candidate.weight > 0.0);
    last.expect("the likeliest candidate weighs 1").token
}

/// Log-probabilities of one row of logits, of the unmodified distribution.
#[derive(Debug, Clone, Copy)]
pub struct LogSoftmax<'a> {
    row: Row<'a>,
    /// ln of the sum of exp(logit).
    norm: f64,
}

impl<'a> LogSoftmax<'a> {
    #[must_use]
    pub fn new(row: Row<'a>) -> Self {
        let max = f64::from(row.logits[row.best]);
        let sum: f64 = row.logits.iter().map(|&logit| libm::exp(f64::from(logit) - max)).sum();
        Self { row, norm: max + libm::log(sum) }
    }

    #[must_use]
    pub fn of(&self, token: u32) -> f32 {
        (f64::from(self.row.logits[token as usize]) - self.norm) as f32
    }

    /// The `n` likeliest tokens, best first; of equals the lowest id first.
    #[must_use]
    pub fn top(&self, n: usize, scratch: &mut Scratch) -> Vec<(u32, f32)> {
        self.row.likeliest(n, scratch);
        let candidates = &scratch.candidates;
        candidates.iter().map(|candidate| (candidate.token, self.of(candidate.token))).collect()
    }
}

/// A number in [0, 1) that depends on (seed, position) only.
#[must_use]
pub fn uniform(seed: u64, position: u32) -> f64 {
    let [a, b, ..] = philox([position, 0, 0, 0], [seed as u32, (seed >> 32) as u32]);
    let bits = u64::from(a) << 32 | u64::from(b);
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3).
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..10 {
        if round > 0 {
            key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
        }
        let [low, high] =
            [u64::from(counter[0]) * 0xD251_1F53, u64::from(counter[2]) * 0xCD9E_8D57];
        counter = [
            (high >> 32) as u32 ^ counter[1] ^ key[0],
            high as u32,
            (low >> 32) as u32 ^ counter[3] ^ key[1],
            low as u32,
        ];
    }
    counter
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use evener_kernels::peaks::{n_peaks, peaks_of};
    use evener_kernels::softmax::weight;

    fn peaks(logits: &[f32]) -> Vec<f32> {
        let mut peaks = vec![0.0; n_peaks(logits.len())];
        peaks_of(Isa::detect(), logits, &mut peaks);
        peaks
    }

    fn sample(logits: &[f32], sampling: &Sampling, position: u32, scratch: &mut Scratch) -> u32 {
        let peaks = peaks(logits);
        let row = Row::new(Isa::detect(), logits, &peaks).unwrap();
        super::sample(&row, sampling, position, scratch)
    }

    /// Odds 8 : 4 : 2 : 1 : 1, not in order.
    fn logits() -> Vec<f32> {
        [2.0f32, 8.0, 1.0, 4.0, 1.0].iter().map(|odds| odds.ln()).collect()
    }

    fn sampling(temperature: f32, top_k: u32, top_p: f32) -> Sampling {
        Sampling { temperature, top_k, top_p, seed: 42, ..Sampling::default() }
    }

    fn counts(sampling: &Sampling, n: u32) -> [u32; 5] {
        let mut scratch = Scratch::default();
        let mut counts = [0; 5];
        for position in 0..n {
            counts[sample(&logits(), sampling, position, &mut scratch) as usize] += 1;
        }
        counts
    }

    #[test]
    fn philox_gives_the_published_vectors() {
        let cases = [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([!0; 4], [!0; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, expect) in cases {
            assert_eq!(philox(counter, key), expect);
        }
    }

    #[test]
    fn greedy_takes_the_lowest_of_equals() {
        let mut scratch = Scratch::default();
        let mut greedy = |logits: &[f32]| sample(logits, &Sampling::default(), 0, &mut scratch);
        assert_eq!(greedy(&[1.0, 3.0, 3.0, 2.0]), 1);
        assert_eq!(greedy(&[-1.0, -1.0]), 0);
        assert_eq!(greedy(&[0.0, -0.0, 0.0]), 0);
        assert_eq!(greedy(&[-5.0]), 0);
    }

    #[test]
    fn frequencies_follow_the_distribution() {
        // Chi-square of 4 degrees of freedom passes 18.47 once in a thousand seeds; ours is fixed.
        const LIMIT: f64 = 18.47;
        let check = |sampling: Sampling, odds: [f64; 5]| {
            let n = 40_000;
            let counts = counts(&sampling, n);
            let total: f64 = odds.iter().sum();
            let mut chi_square = 0.0;
            for (&count, odds) in counts.iter().zip(odds) {
                let expected = f64::from(n) * odds / total;
                if expected == 0.0 {
                    assert_eq!(count, 0, "{sampling:?} {counts:?}");
                } else {
                    chi_square += (f64::from(count) - expected).powi(2) / expected;
                }
            }
            assert!(chi_square < LIMIT, "{chi_square} {sampling:?} {counts:?}");
        };
        check(sampling(1.0, 0, 1.0), [2.0, 8.0, 1.0, 4.0, 1.0]);
        check(sampling(0.5, 0, 1.0), [4.0, 64.0, 1.0, 16.0, 1.0]);
        check(sampling(2.0, 0, 1.0), [2f64.sqrt(), 8f64.sqrt(), 1.0, 2.0, 1.0]);
        check(sampling(1.0, 2, 1.0), [0.0, 8.0, 0.0, 4.0, 0.0]);
        check(sampling(1.0, 4, 1.0), [2.0, 8.0, 1.0, 4.0, 0.0]);
        check(sampling(1.0, 0, 0.74), [0.0, 8.0, 0.0, 4.0, 0.0]);
        check(sampling(1.0, 0, 0.76), [2.0, 8.0, 0.0, 4.0, 0.0]);
        check(sampling(1.0, 2, 0.6), [0.0, 8.0, 0.0, 0.0, 0.0]);
        check(sampling(1.0, 2, 0.7), [0.0, 8.0, 0.0, 4.0, 0.0]);
        check(sampling(1.0, 0, 0.0), [0.0, 8.0, 0.0, 0.0, 0.0]);
        check(sampling(1.0, 9, 1.0), [2.0, 8.0, 1.0, 4.0, 1.0]);
    }

    #[test]
    fn a_token_depends_on_seed_and_position_only() {
        let at = |seed, position| {
            let sampling = Sampling { seed, ..sampling(1.0, 0, 1.0) };
            // Other draws before it change nothing.
            let mut scratch = Scratch::default();
            let _ = sample(&[0.0; 9], &sampling, position + 1, &mut scratch);
            sample(&logits(), &sampling, position, &mut scratch)
        };
        let run = |seed| (0..200).map(|position| at(seed, position)).collect::<Vec<_>>();
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
        assert_ne!(run(1), run(1 << 32), "all 64 bits of the seed count");
    }

    #[test]
    fn a_wide_nucleus_is_the_same_as_sorting_all() {
        let logits: Vec<f32> = (0..5000).map(|i| ((i * 7919 % 5000) as f32) * 1e-4).collect();
        let mut scratch = Scratch::default();
        let peaks = peaks(&logits);
        let row = Row::new(Isa::detect(), &logits, &peaks).unwrap();
        let highest = logits[row.best];
        scratch.weights = logits.iter().map(|&logit| weight(logit, highest, 1.0)).collect();
        let mut sorted: Vec<u32> = (0..5000).collect();
        sorted.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
        let total: f64 = scratch.weights.iter().map(|&weight| f64::from(weight)).sum();
        for top_p in [0.001, 0.02, 0.3, 0.9, 1.1] {
            let sum = row.nucleus(top_p * total, &mut scratch);
            let kept = &scratch.candidates;
            assert!(kept.iter().map(|c| c.token).eq(sorted[..kept.len()].iter().copied()));
            let less: f64 = sum - kept.last().unwrap().weight;
            let is_whole = kept.len() == 5000;
            assert!((is_whole || sum >= top_p * total) && less < top_p * total + 1e-9, "{top_p}");
            assert_eq!(is_whole, top_p > 1.0);
        }
        let sampling = Sampling { temperature: 1.0, top_p: 0.9999, ..Sampling::default() };
        assert!(sample(&logits, &sampling, 3, &mut scratch) < 5000);
    }

    #[test]
    fn a_draw_of_all_falls_where_the_weights_say() {
        let weights: Vec<f32> = (0..3000).map(|i| if i % 7 == 3 { 0.5 } else { 0.0 }).collect();
        let sums: Vec<f64> =
            weights.chunks(STRETCH).map(|s| s.iter().map(|&w| f64::from(w)).sum()).collect();
        let n = weights.iter().filter(|&&weight| weight > 0.0).count();
        for i in 0..n {
            let token = draw_of_all(&weights, &sums, 0.5 * i as f64 + 0.25);
            assert_eq!(token as usize, 7 * i + 3);
        }
        let last = 7 * (n as u32 - 1) + 3;
        assert_eq!(draw_of_all(&weights, &sums, 1e9), last, "past the end by rounding");
        let mut one = vec![0.0f32; 2100];
        one[1030] = 1.0;
        assert_eq!(draw_of_all(&one, &[0.0, 1.0, 0.0], 1.0), 1030);
        let two = [0.5f32, 0.25, 0.0];
        assert_eq!(draw_of_all(&two, &[0.75], 0.75), 1);
    }

    #[test]
    fn extreme_temperatures_stay_in_the_vocabulary() {
        let mut scratch = Scratch::default();
        let logits = [-3e38, 3e38, 0.0];
        for (temperature, top_p) in [(1e-30, 1.0), (1e30, 1.0), (f32::MIN_POSITIVE, 0.5)] {
            let sampling = Sampling { temperature, top_p, ..Sampling::default() };
            for position in 0..50 {
                assert!(sample(&logits, &sampling, position, &mut scratch) < 3);
            }
        }
        let cold = Sampling { temperature: 1e-30, ..Sampling::default() };
        assert_eq!(sample(&logits, &cold, 0, &mut scratch), 1);
    }

    #[test]
    fn logprobs_are_of_the_unmodified_distribution() {
        let logits = logits();
        let mut scratch = Scratch::default();
        let peaks_of_row = peaks(&logits);
        let row = LogSoftmax::new(Row::new(Isa::detect(), &logits, &peaks_of_row).unwrap());
        assert!((row.of(1) - 0.5f32.ln()).abs() < 1e-6);
        let top = row.top(4, &mut scratch);
        assert_eq!(top.iter().map(|(token, _)| *token).collect::<Vec<_>>(), [1, 3, 0, 2]);
        assert_eq!(top[2].1, row.of(0));
        assert_eq!(row.top(0, &mut scratch), []);
        assert_eq!(row.top(20, &mut scratch).len(), 5);
        let far = [1e30, 0.0];
        let peaks_of_far = peaks(&far);
        let row = Row::new(Isa::detect(), &far, &peaks_of_far).unwrap();
        assert_eq!(LogSoftmax::new(row).of(0), 0.0);
    }

    #[test]
    fn broken_logits_are_named() {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let logits = [0.0, value];
            let error = Row::new(Isa::detect(), &logits, &peaks(&logits)).unwrap_err();
            assert!(matches!(error, Error::NotFinite { token: 1, .. }), "{error}");
        }
        let extremes = [f32::MAX, f32::MIN];
        assert!(Row::new(Isa::detect(), &extremes, &peaks(&extremes)).is_ok());
    }

    #[test]
    fn the_likeliest_are_those_that_sorting_all_gives() {
        // Few values, so that equals fall on both sides of the cut.
        let logits: Vec<f32> =
            (0u32..20_000).map(|i| (i * 7919 % 997) as f32 * 0.5 - 3.0).collect();
        let mut sorted: Vec<(u32, f32)> = (0u32..).zip(logits.iter().copied()).collect();
        sorted.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let peaks = peaks(&logits);
        let row = Row::new(Isa::detect(), &logits, &peaks).unwrap();
        let mut scratch = Scratch::default();
        for n in [0, 1, 5, 20, 40, 319, 320, 321, 5000, 20_000, 30_000] {
            row.likeliest(n, &mut scratch);
            let got = scratch.candidates.iter().map(|c| (c.token, c.logit));
            assert!(got.eq(sorted.iter().copied().take(n)), "{n}");
        }
    }
}
