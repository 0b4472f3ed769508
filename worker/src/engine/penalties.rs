//! What bias and penalties do to the next token of a sequence: one edit for each token they touch,
//! brought up to date token by token. Only the lead has them.

use std::collections::HashMap;

use super::row::Edit;
use super::sampler::{Penalties, Sampling};

/// Edits of one sequence, as of the tokens seen so far.
#[derive(Debug, Default)]
pub struct Edits {
    edits: Vec<Edit>,
    /// As many: how often each stands in the output.
    counts: Vec<u32>,
    places: HashMap<u32, usize>,
    /// Tokens of the sequence that are counted.
    n_seen: usize,
}

impl Edits {
    /// Of a sequence of which nothing was seen yet.
    #[must_use]
    pub fn new(sampling: &Sampling) -> Self {
        let mut edits = Self::default();
        for &(token, bias) in &sampling.logit_bias {
            let place = edits.place(token);
            edits.edits[place].bias = bias;
        }
        edits
    }

    /// Brings it up to `tokens`, of which the first `n_prompt` are the prompt.
    pub fn take_in(&mut self, tokens: &[u32], n_prompt: usize, penalties: &Penalties) {
        let &Penalties { repetition, presence, frequency } = penalties;
        let is_output_alone = repetition == 1.0;
        if is_output_alone && presence == 0.0 && frequency == 0.0 {
            return;
        }
        for (at, &token) in tokens.iter().enumerate().skip(self.n_seen) {
            let is_output = at >= n_prompt;
            if !is_output && is_output_alone {
                continue;
            }
            let place = self.place(token);
            self.edits[place].repetition = repetition;
            if is_output {
                self.counts[place] += 1;
                self.edits[place].penalty = presence + frequency * self.counts[place] as f32;
            }
        }
        self.n_seen = tokens.len();
    }

    /// Appends to `out` what to change for the token after those taken in and these drafts, which
    /// may be wrong.
    pub fn ahead(&self, drafts: &[u32], penalties: &Penalties, out: &mut Vec<Edit>) {
        let start = out.len();
        out.extend_from_slice(&self.edits);
        if *penalties == Penalties::default() {
            return;
        }
        for (nth, &draft) in drafts.iter().enumerate() {
            let counted = self.places.get(&draft).map_or(0, |&place| self.counts[place]);
            let n = drafts[..=nth].iter().filter(|&&other| other == draft).count() as u32;
            let new = || out[start + self.edits.len()..].iter().position(|e| e.token == draft);
            let known = self.places.get(&draft).copied();
            let place = known.or_else(|| new().map(|place| self.edits.len() + place));
            let penalty = penalties.presence + penalties.frequency * (counted + n) as f32;
            let edit = Edit { token: draft, bias: 0.0, repetition: penalties.repetition, penalty };
            match place {
                Some(place) => {
                    let bias = out[start + place].bias;
                    out[start + place] = Edit { bias, ..edit };
                }
                None => out.push(edit),
            }
        }
    }

    fn place(&mut self, token: u32) -> usize {
        *self.places.entry(token).or_insert_with(|| {
            self.edits.push(Edit { token, bias: 0.0, repetition: 1.0, penalty: 0.0 });
            self.counts.push(0);
            self.edits.len() - 1
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::row::{BANNED, edit};

    /// Logits after edits, of tokens 0 to 4 whose logits are 2, -2, 1, 0 and 5; the prompt is
    /// 0 1, the output 1 2 2.
    fn edited(penalties: Penalties, logit_bias: &[(u32, f32)]) -> [f32; 5] {
        let sampling =
            Sampling { penalties, logit_bias: logit_bias.to_vec(), ..Sampling::default() };
        let mut edits = Edits::new(&sampling);
        let tokens = [0, 1, 1, 2, 2];
        // Token by token, as they come, or all at once as after a resumption: the same.
        (2..=5).for_each(|n| edits.take_in(&tokens[..n], 2, &penalties));
        let mut at_once = Edits::new(&sampling);
        at_once.take_in(&tokens, 2, &penalties);
        assert_eq!(edits.edits, at_once.edits);
        let mut logits = [2.0, -2.0, 1.0, 0.0, 5.0];
        edit(&mut logits, 0, &at_once.edits, None);
        // And with the last ones as drafts.
        for n_known in 2..=5 {
            let mut edits = Edits::new(&sampling);
            edits.take_in(&tokens[..n_known], 2, &penalties);
            let mut ahead = vec![Edit::ban(0)];
            edits.ahead(&tokens[n_known..], &penalties, &mut ahead);
            let mut same = [2.0, -2.0, 1.0, 0.0, 5.0];
            edit(&mut same, 0, &ahead[1..], None);
            assert_eq!(same, logits, "{n_known}");
        }
        logits
    }

    #[test]
    fn each_penalty_is_vllms() {
        let check = |[repetition, presence, frequency]: [f32; 3], bias: &[(u32, f32)], expect| {
            let penalties = Penalties { repetition, presence, frequency };
            assert_eq!(edited(penalties, bias), expect, "{penalties:?} {bias:?}");
        };
        check([1.0, 0.0, 0.0], &[], [2.0, -2.0, 1.0, 0.0, 5.0]);
        check([2.0, 0.0, 0.0], &[], [1.0, -4.0, 0.5, 0.0, 5.0]);
        check([0.5, 0.0, 0.0], &[], [4.0, -1.0, 2.0, 0.0, 5.0]);
        check([1.0, 0.5, 0.0], &[], [2.0, -2.5, 0.5, 0.0, 5.0]);
        check([1.0, 0.0, 0.5], &[], [2.0, -2.5, 0.0, 0.0, 5.0]);
        check([1.0, -0.5, -1.0], &[], [2.0, -0.5, 3.5, 0.0, 5.0]);
        check([1.0, 0.0, 0.0], &[(3, 7.0), (4, -100.0)], [2.0, -2.0, 1.0, 7.0, -95.0]);
        // Bias, then repetition, then the others.
        check([2.0, 0.25, 0.5], &[(1, 4.0)], [1.0, 0.25, -0.75, 0.0, 5.0]);
    }

    #[test]
    fn what_is_banned_stays_banned_and_numbers_stay_finite() {
        let mut logits = [1.0, f32::MAX, f32::MIN, -1.0];
        let grow = |token, repetition| Edit { token, bias: 100.0, repetition, penalty: -2.0 };
        let edits = [Edit::ban(10), grow(11, 1e-30), grow(12, 1e30), Edit::ban(13), Edit::ban(14)];
        edit(&mut logits, 10, &edits, None);
        assert_eq!(logits, [BANNED, f32::MAX, BANNED, BANNED]);
    }

    #[test]
    fn a_mask_bans_all_but_its_own_and_whatever_lies_beyond_it() {
        let mut logits = [1.0; 40];
        edit(&mut logits, 30, &[], Some(&[1 << 31, 1 << 1 | 1 << 3]));
        for (token, logit) in (30..).zip(logits) {
            assert_eq!(logit == 1.0, [31, 33, 35].contains(&token), "{token}");
        }
    }
}
