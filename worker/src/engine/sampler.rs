//! The likeliest tokens of a row to the next token. Pure: a token depends on (logits, sampling,
//! position).
//!
//! A token is drawn from the likeliest downwards (where nothing is cut off, beyond the first of them
//! in order of ids), so that a few usually decide, and whether they do is known: see [`choose`]. Masses are integers, and random numbers come from a counter,
//! not from a state: neither the split of the vocabulary nor a resumption elsewhere changes a token.

use evener_kernels::Isa;
use evener_kernels::softmax::{ONE, masses};

use super::grammar::Grammar;

/// How tokens are chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 takes the likeliest token.
    pub temperature: f32,
    /// Only the k likeliest; 0: all.
    pub top_k: u32,
    /// Only the likeliest that make up this much probability; 1: all.
    pub top_p: f32,
    /// Only those at least so likely, measured by the likeliest; 0: all.
    pub min_p: f32,
    pub penalties: Penalties,
    /// Added to the logits of these tokens, before penalties.
    pub logit_bias: Vec<(u32, f32)>,
    pub seed: u64,
    /// Any of these ends the sequence and is its last token.
    pub stop_token_ids: Vec<u32>,
    /// None of those before so many tokens were generated.
    pub min_tokens: u32,
    /// So many of the prompt's last tokens were generated before an interruption: penalties and
    /// `min_tokens` count them as generated.
    pub n_resumed: u32,
    /// What the output must be; stop tokens come only where it is complete.
    pub grammar: Option<Grammar>,
    /// None: report no log-probabilities; else of the chosen token and of the n likeliest.
    pub n_logprobs: Option<u32>,
}

/// What tokens that are there already cost; defined as in vLLM.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Penalties {
    /// Of tokens in prompt and output: a positive logit is divided by it, another multiplied. 1 is
    /// off; positive.
    pub repetition: f32,
    /// Taken from the logits of tokens in the output. 0 is off.
    pub presence: f32,
    /// Taken from them once for each time. 0 is off.
    pub frequency: f32,
}

impl Default for Penalties {
    fn default() -> Self {
        Self { repetition: 1.0, presence: 0.0, frequency: 0.0 }
    }
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            penalties: Penalties::default(),
            logit_bias: Vec::new(),
            seed: 0,
            stop_token_ids: Vec::new(),
            min_tokens: 0,
            n_resumed: 0,
            grammar: None,
            n_logprobs: None,
        }
    }
}

/// Most alternatives reported with a token.
pub const MAX_LOGPROBS: u32 = 20;
/// Highest temperature: beyond it, a banned token's logit would no longer weigh nothing.
pub const MAX_TEMPERATURE: f32 = 100.0;
/// Candidates that usually decide where nothing says how many do.
const USUAL_HEAD: u32 = 128;
/// Most candidates asked of a rank.
const MAX_HEAD: u32 = 1024;

impl Sampling {
    /// The likeliest token, whatever the seed.
    #[must_use]
    pub fn is_greedy(&self) -> bool {
        self.temperature <= 0.0 || self.top_k == 1
    }

    /// Its tokens cannot be chosen, or told about, by the likeliest of the model's logits alone.
    #[must_use]
    pub fn asks(&self) -> bool {
        let edits = self.has_edits() || self.min_tokens > 0 || self.grammar.is_some();
        !self.is_greedy() || self.n_logprobs.is_some() || edits
    }

    /// Bias or penalties.
    #[must_use]
    pub fn has_edits(&self) -> bool {
        self.penalties != Penalties::default() || !self.logit_bias.is_empty()
    }

    /// What logits are multiplied by: a temperature's inverse.
    #[must_use]
    pub fn scale(&self) -> f32 {
        (1.0 / self.temperature).min(f32::MAX)
    }

    /// Candidates that are likely to decide.
    #[must_use]
    pub fn n_head(&self) -> u32 {
        match (self.is_greedy(), self.top_k) {
            (true, _) => 1,
            (false, 0) => USUAL_HEAD,
            (false, k) => k.min(MAX_HEAD),
        }
    }

    /// How much of this mass the likeliest are to make up.
    #[must_use]
    pub fn nucleus(&self, total: u64) -> u64 {
        (f64::from(self.top_p) * total as f64).ceil() as u64
    }

    /// No token is cut off, so that what is beyond the candidates has no order of its own.
    #[must_use]
    pub fn wants_tail(&self) -> bool {
        self.wants_total() && self.top_p >= 1.0
    }

    /// Whether [`Head::total`] is looked at.
    #[must_use]
    pub fn wants_total(&self) -> bool {
        !self.is_greedy() && self.top_k == 0 && self.min_p <= 0.0
    }
}

/// A token that may be chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    pub token: u32,
    /// After bias, penalties and mask.
    pub logit: f32,
    /// As the model gave it.
    pub raw: f32,
}

/// The likeliest tokens of a row, and what is known of the rest.
#[derive(Debug, Clone, Copy)]
pub struct Head<'a> {
    pub isa: Isa,
    /// Best first, of equals the lowest id first.
    pub candidates: &'a [Candidate],
    /// They are all tokens that may be chosen.
    pub is_all: bool,
    /// Mass of all tokens at the sampling's scale, if [`Sampling::wants_total`].
    pub total: u64,
}

/// Where [`choose`] gave none and `wants_tail`: how much of the mass beyond the candidates is to be
/// passed, taken in order of ids.
#[must_use]
pub fn beyond(head: &Head<'_>, sampling: &Sampling, position: u32) -> u64 {
    let highest = head.candidates.first().map_or(0.0, |candidate| candidate.logit);
    let of_head = masses_of(head.isa, head.candidates, highest, sampling.scale()).sum();
    drawn(head.total, sampling, position).saturating_sub(of_head)
}

fn masses_of(
    isa: Isa,
    candidates: &[Candidate],
    highest: f32,
    scale: f32,
) -> impl Iterator<Item = u64> {
    masses(isa, candidates.iter().map(|candidate| candidate.logit), highest, scale)
}

/// A place in this much mass.
fn drawn(total: u64, sampling: &Sampling, position: u32) -> u64 {
    let product = u128::from(random(sampling.seed, position)) * u128::from(total);
    (product >> RANDOM_BITS) as u64
}

/// Which candidate is the token at `position` of its sequence; none if they are too few to tell.
/// More candidates than these never change the answer; where [`Sampling::wants_tail`], they are as
/// many as [`Sampling::n_head`] says, and [`beyond`] goes on.
#[must_use]
pub fn choose(head: &Head<'_>, sampling: &Sampling, position: u32) -> Option<usize> {
    let &Head { isa, mut candidates, mut is_all, mut total } = head;
    let highest = candidates.first()?.logit;
    if sampling.is_greedy() {
        return Some(0);
    }
    let masses_of = |candidates| masses_of(isa, candidates, highest, sampling.scale());
    if sampling.min_p > 0.0 {
        let least = (f64::from(sampling.min_p) * ONE as f64).ceil() as u64;
        if let Some(n) = masses_of(candidates).position(|mass| mass < least) {
            (candidates, is_all) = (&candidates[..n], true);
        }
    }
    let top_k = sampling.top_k as usize;
    if top_k > 0 && candidates.len() >= top_k {
        (candidates, is_all) = (&candidates[..top_k], true);
    }
    if is_all {
        total = masses_of(candidates).sum();
    } else if !sampling.wants_total() {
        return None; // where the cut is has not been seen
    }
    if sampling.top_p < 1.0 {
        // Holtzman et al. 2020, section 3.1; at least one token.
        let enough = sampling.nucleus(total);
        match reach(masses_of(candidates), |sum| sum >= enough) {
            Some((_, sum)) => total = sum,
            None if is_all => {}
            None => return None,
        }
    }
    let at = drawn(total, sampling, position);
    reach(masses_of(candidates), |sum| sum > at).map(|(idx, _)| idx)
}

/// The first item at which the sum so far is enough, and that sum.
fn reach(
    masses: impl Iterator<Item = u64>,
    is_enough: impl Fn(u64) -> bool,
) -> Option<(usize, u64)> {
    let mut sum = 0;
    for (idx, mass) in masses.enumerate() {
        sum += mass;
        if is_enough(sum) {
            return Some((idx, sum));
        }
    }
    None
}

const RANDOM_BITS: u32 = 53;

/// An integer below 2^53 that depends on (seed, position) only.
fn random(seed: u64, position: u32) -> u64 {
    let [a, b, ..] = philox([position, 0, 0, 0], [seed as u32, (seed >> 32) as u32]);
    (u64::from(a) << 32 | u64::from(b)) >> (64 - RANDOM_BITS)
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

    /// Candidates with these odds, best first as they must come.
    fn candidates(odds: &[f64]) -> Vec<Candidate> {
        let candidate = |(token, odds): (usize, &f64)| {
            let logit = odds.ln() as f32;
            Candidate { token: token as u32, logit, raw: logit }
        };
        odds.iter().enumerate().map(candidate).collect()
    }

    const ODDS: [f64; 5] = [8.0, 4.0, 2.0, 1.0, 1.0];

    fn sampling(temperature: f32, top_k: u32, top_p: f32, min_p: f32) -> Sampling {
        Sampling { temperature, top_k, top_p, min_p, seed: 42, ..Sampling::default() }
    }

    fn all(candidates: &[Candidate]) -> Head<'_> {
        Head { isa: Isa::detect(), candidates, is_all: true, total: 0 }
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
    fn greedy_takes_the_first() {
        let candidates = candidates(&ODDS);
        for position in 0..20 {
            assert_eq!(choose(&all(&candidates), &Sampling::default(), position), Some(0));
            assert_eq!(choose(&all(&candidates), &sampling(1.0, 1, 1.0, 0.0), position), Some(0));
        }
        assert_eq!(choose(&all(&[]), &Sampling::default(), 0), None);
    }

    #[test]
    fn frequencies_follow_the_distribution() {
        // Chi-square of 4 degrees of freedom passes 18.47 once in a thousand seeds; ours is fixed.
        const LIMIT: f64 = 18.47;
        const N: u32 = 40_000;
        let candidates = candidates(&ODDS);
        let check = |sampling: Sampling, odds: [f64; 5]| {
            let mut counts = [0; 5];
            for position in 0..N {
                counts[choose(&all(&candidates), &sampling, position).unwrap()] += 1;
            }
            let total: f64 = odds.iter().sum();
            let mut chi_square = 0.0;
            for (&count, odds) in counts.iter().zip(odds) {
                let expected = f64::from(N) * odds / total;
                if expected == 0.0 {
                    assert_eq!(count, 0, "{sampling:?} {counts:?}");
                } else {
                    chi_square += (f64::from(count) - expected).powi(2) / expected;
                }
            }
            assert!(chi_square < LIMIT, "{chi_square} {sampling:?} {counts:?}");
        };
        let half = |odds: f64| odds.sqrt();
        check(sampling(1.0, 0, 1.0, 0.0), ODDS);
        check(sampling(0.5, 0, 1.0, 0.0), [64.0, 16.0, 4.0, 1.0, 1.0]);
        check(sampling(2.0, 0, 1.0, 0.0), ODDS.map(half));
        check(sampling(1.0, 2, 1.0, 0.0), [8.0, 4.0, 0.0, 0.0, 0.0]);
        check(sampling(1.0, 4, 1.0, 0.0), [8.0, 4.0, 2.0, 1.0, 0.0]);
        check(sampling(1.0, 0, 0.74, 0.0), [8.0, 4.0, 0.0, 0.0, 0.0]);
        check(sampling(1.0, 0, 0.76, 0.0), [8.0, 4.0, 2.0, 0.0, 0.0]);
        check(sampling(1.0, 2, 0.6, 0.0), [8.0, 0.0, 0.0, 0.0, 0.0]);
        check(sampling(1.0, 2, 0.7, 0.0), [8.0, 4.0, 0.0, 0.0, 0.0]);
        check(sampling(1.0, 0, 0.0, 0.0), [8.0, 0.0, 0.0, 0.0, 0.0]);
        check(sampling(1.0, 9, 1.0, 0.0), ODDS);
        check(sampling(1.0, 0, 1.0, 0.24), [8.0, 4.0, 2.0, 0.0, 0.0]);
        check(sampling(1.0, 0, 1.0, 0.26), [8.0, 4.0, 0.0, 0.0, 0.0]);
        check(sampling(1.0, 0, 1.0, 1.0), [8.0, 0.0, 0.0, 0.0, 0.0]);
        check(sampling(2.0, 0, 1.0, 0.49), [8.0, 4.0, 2.0, 0.0, 0.0].map(half));
        // The nucleus is of what the others leave: 8 of 14 are 57 %, 12 are 86 %.
        check(sampling(1.0, 0, 0.57, 0.24), [8.0, 0.0, 0.0, 0.0, 0.0]);
        check(sampling(1.0, 3, 0.58, 0.01), [8.0, 4.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn a_token_depends_on_seed_and_position_only() {
        let candidates = candidates(&ODDS);
        let run = |seed| {
            let sampling = Sampling { seed, ..sampling(1.0, 0, 1.0, 0.0) };
            let at = |position| choose(&all(&candidates), &sampling, position).unwrap();
            (0..200).map(at).collect::<Vec<_>>()
        };
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
        assert_ne!(run(1), run(1 << 32), "all 64 bits of the seed count");
    }

    #[test]
    fn too_few_candidates_say_so_and_more_never_change_a_token() {
        let odds: Vec<f64> = (0..600).map(|i| 0.99f64.powi(i)).collect();
        let candidates = candidates(&odds);
        let highest = candidates[0].logit;
        let samplings = [
            sampling(1.0, 0, 1.0, 0.0),
            sampling(0.7, 0, 0.9, 0.0),
            sampling(1.3, 0, 0.3, 0.0),
            sampling(1.0, 50, 1.0, 0.0),
            sampling(1.0, 300, 0.5, 0.0),
            sampling(1.0, 0, 1.0, 0.2),
            sampling(1.0, 100, 0.8, 0.3),
            Sampling::default(),
        ];
        for sampling in samplings {
            let scale = sampling.scale();
            let isa = Isa::detect();
            let total = masses_of(isa, &candidates, highest, scale).sum();
            let (mut n_told, mut n_open) = (0, 0);
            for position in 0..50 {
                let whole = choose(&all(&candidates), &sampling, position).unwrap();
                for n in [1, 5, 40, 64, 200, 599] {
                    let head = Head { isa, candidates: &candidates[..n], is_all: false, total };
                    match choose(&head, &sampling, position) {
                        Some(chosen) => assert_eq!(chosen, whole, "{n} {sampling:?}"),
                        None => n_open += 1,
                    }
                    n_told += u32::from(choose(&head, &sampling, position).is_some());
                }
            }
            let never_open = sampling.is_greedy();
            assert!(n_told > 0 && (never_open || n_open > 0), "{n_told} {n_open} {sampling:?}");
        }
    }

    #[test]
    fn extreme_temperatures_stay_among_the_candidates() {
        let extreme = |logit: f32| Candidate { token: 0, logit, raw: logit };
        let candidates = [extreme(3e38), extreme(0.0), extreme(-3e38)];
        for (temperature, top_p) in [(1e-30, 1.0), (MAX_TEMPERATURE, 1.0), (1e-38, 0.5)] {
            for position in 0..50 {
                let sampling = sampling(temperature, 0, top_p, 0.0);
                assert_eq!(choose(&all(&candidates), &sampling, position), Some(0));
            }
        }
        let hot = sampling(MAX_TEMPERATURE, 0, 1.0, 0.0);
        let flat = [extreme(1.0), extreme(0.5), extreme(0.0)];
        let drawn: Vec<_> = (0..50).map(|at| choose(&all(&flat), &hot, at).unwrap()).collect();
        assert!((0..3).all(|idx| drawn.contains(&idx)), "{drawn:?}");
    }
}
