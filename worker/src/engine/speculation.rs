//! How many tokens of each decoding sequence are drafted and verified with its next one: speculative
//! decoding (Leviathan et al. 2023) with drafts from the sequence's own text (`lookup`). Pure: the
//! lead tells it what steps took and which drafts were right. It never changes a token, only when
//! tokens come.
//!
//! A draft pays if a step with it brings more tokens a second than without. That takes what steps
//! cost (`draft_costs`), and how likely a draft is right: the longer the match behind it, the
//! likelier, and how much is learnt from the sequence itself, which begins with what others taught.
//! Where a sequence's drafts are wrong, matches of that length are let pass, each time twice as
//! many; where drafts do not seem to pay, one is tried now and then. Beside prefill nothing is
//! drafted: such a step is as long as it may be.
//!
//! Not drafted for are sequences with a grammar: the mask of each row would depend on the token of
//! the row before, which no thread could compute beside the forward pass.

use std::time::Duration;

use super::draft_costs::Costs;
use super::lookup::{Lookup, Match};
use super::pace::Pace;
use super::scheduler::Scheduler;
use super::sequence::{Sequence, SequenceId};

/// Most drafts of one sequence in one step.
pub const MAX_DRAFTS: usize = 8;

/// Matches of 2, 3-4, 5-8 and more tokens are counted apart.
const N_CLASSES: usize = 4;
/// How often a draft behind such a match is right, before anything was seen.
const FIRST_GUESS: [f64; N_CLASSES] = [0.25, 0.5, 0.7, 0.85];
/// Tests that the guess of a record weighs as much as.
const GUESS_WEIGHT: f64 = 4.0;
/// What a test is worth after the next, of the same sequence and of all.
const FADE: f64 = 0.9;
const FADE_OF_ALL: f64 = 0.99;
/// Less than this gain is not worth a guess.
const LEAST_GAIN: f64 = 1.03;
/// Where drafts do not seem to pay, one of so many matches is tried.
const TRY_AFTER: u32 = 16;
/// One of so many steps has a draft more or fewer than seems best, to learn what that costs.
const VARY_AFTER: u64 = 12;
/// Longest pause, in matches.
const MAX_PAUSE: u32 = 256;

/// Who drafts, on the lead of a group.
#[derive(Debug)]
pub struct Speculation {
    /// Of one sequence in one step; 0 is off.
    max_drafts: usize,
    costs: Costs,
    /// Steps with drafts.
    n_steps: u64,
    of_all: [Record; N_CLASSES],
    /// By slot.
    places: Vec<Place>,
    /// Matches of the step that is planned; kept for its memory, as is what follows.
    wishes: Vec<Wish>,
    /// Indexes of wishes: whose each further draft is.
    picks: Vec<usize>,
}

/// What is known of the sequence in a slot.
#[derive(Debug, Default)]
struct Place {
    id: Option<SequenceId>,
    lookup: Lookup,
    /// By class of the match.
    habits: [Habit; N_CLASSES],
    /// Tokens of the match behind the drafts in flight.
    match_len: usize,
}

/// What becomes of a sequence's drafts behind matches of one class.
#[derive(Debug, Default)]
struct Habit {
    record: Record,
    /// Times that nothing was right, since something was.
    n_misses: u32,
    /// Matches to let pass.
    pause: u32,
    /// Then one is tried, whatever it seems to be worth.
    is_trial: bool,
}

/// How often drafts were right, newer tests weighing more.
#[derive(Debug, Clone, Copy, Default)]
struct Record {
    n_tested: f64,
    n_right: f64,
}

#[derive(Debug)]
struct Wish {
    slot: usize,
    found: Match,
    /// Most that it can use.
    max: usize,
    n: usize,
    /// Chance that the next draft, and all before it, are right.
    chance: f64,
}

impl Speculation {
    /// `max_drafts`: of one sequence in one step; more than [`MAX_DRAFTS`] are as many.
    #[must_use]
    pub fn new(max_drafts: usize, n_slots: usize) -> Self {
        let n_places = if max_drafts > 0 { n_slots } else { 0 };
        Self {
            max_drafts: max_drafts.min(MAX_DRAFTS),
            costs: Costs::default(),
            n_steps: 0,
            of_all: Default::default(),
            places: (0..n_places).map(|_| Place::default()).collect(),
            wishes: Vec::with_capacity(n_places),
            picks: Vec::with_capacity(n_places * MAX_DRAFTS),
        }
    }

    /// Gives decoding sequences the drafts of the step that is planned next.
    pub fn draft(&mut self, scheduler: &mut Scheduler, pace: &Pace) {
        if self.max_drafts == 0 {
            return;
        }
        self.wishes.clear();
        let (room, mut n_decoding) = (scheduler.room_for_drafts(), 0);
        for (slot, sequence) in scheduler.decoding_mut() {
            n_decoding += 1;
            sequence.drafts.clear();
            if room == 0 {
                continue;
            }
            let n_left = sequence.max_tokens - sequence.n_generated();
            // The step brings one token more than there are drafts.
            let max = self.max_drafts.min(n_left - 1);
            if max > 0
                && sequence.sampling.grammar.is_none()
                && let Some(found) = self.places[slot].look(sequence)
            {
                self.wishes.push(Wish { slot, found, max, n: 0, chance: 1.0 });
            }
        }
        self.share(room, n_decoding, pace);
        for wish in &self.wishes {
            self.places[wish.slot].match_len = wish.found.len;
            let sequence = scheduler.running_mut(wish.slot);
            let Sequence { tokens, drafts, sampling, .. } = sequence;
            wish.found.draft(tokens, wish.n, drafts);
            // Nothing follows a stop token.
            let stop = drafts.iter().position(|draft| sampling.stop_token_ids.contains(draft));
            drafts.truncate(stop.unwrap_or(drafts.len()));
        }
    }

    /// Decides how many drafts each wish gets: always the likeliest next one, as many in all as
    /// bring most tokens a second.
    fn share(&mut self, room: usize, n_decoding: usize, pace: &Pace) {
        let Some(plain) = self.costs.step_s(pace, n_decoding, 0).filter(|&s| s > 0.0) else {
            self.wishes.clear(); // nothing to compare with
            return;
        };
        for wish in &mut self.wishes {
            wish.chance = self.places[wish.slot].chance(wish.found.len, &self.of_all);
        }
        self.picks.clear();
        let (mut n_tokens, mut n_best) = (n_decoding as f64, 0);
        let mut best = LEAST_GAIN * n_tokens / plain;
        while self.picks.len() < room {
            let open = self.wishes.iter().enumerate().filter(|(_, wish)| wish.n < wish.max);
            let likeliest = open.max_by(|(_, a), (_, b)| a.chance.total_cmp(&b.chance));
            let Some((idx, _)) = likeliest else { break };
            let wish = &mut self.wishes[idx];
            n_tokens += wish.chance;
            wish.n += 1;
            let place = &self.places[wish.slot];
            wish.chance *= place.chance(wish.found.len + wish.n, &self.of_all);
            self.picks.push(idx);
            let took = self.costs.step_s(pace, n_decoding, self.picks.len());
            let rate = n_tokens / took.unwrap_or(f64::INFINITY);
            if rate > best {
                (best, n_best) = (rate, self.picks.len());
            }
        }
        let n_best = self.vary(n_best);
        for &idx in &self.picks[n_best..] {
            self.wishes[idx].n -= 1;
        }
        let mut n_left = room - n_best;
        for wish in self.wishes.iter_mut().filter(|wish| wish.n == 0) {
            let habit = &mut self.places[wish.slot].habits[class(wish.found.len)];
            if habit.is_tried() && n_left > 0 {
                (wish.n, n_left) = (1, n_left - 1);
            }
        }
    }

    /// The best number of drafts, as far as is known, or now and then its neighbour.
    fn vary(&self, n_best: usize) -> usize {
        match self.n_steps % (2 * VARY_AFTER) {
            _ if n_best < 2 => n_best,
            0 => n_best - 1,
            VARY_AFTER => (n_best + 1).min(self.picks.len()),
            _ => n_best,
        }
    }

    /// A step of `n_decoding` sequences without prefill took so long.
    pub fn observe(&mut self, n_decoding: usize, n_drafts: usize, took: Duration) {
        self.n_steps += 1;
        self.costs.observe(n_decoding, n_drafts, took);
    }

    /// Of the drafts of a sequence the first `n_right` were right.
    pub fn verified(&mut self, slot: u32, sequence: &Sequence, n_right: usize) {
        let n_drafts = sequence.drafts.len();
        let Some(place) = self.places.get_mut(slot as usize).filter(|_| n_drafts > 0) else {
            return;
        };
        for nth in 0..n_drafts.min(n_right + 1) {
            let class = class(place.match_len + nth);
            place.habits[class].record.test(nth < n_right, FADE);
            self.of_all[class].test(nth < n_right, FADE_OF_ALL);
        }
        place.habits[class(place.match_len)].ended(n_right > 0);
    }
}

impl Place {
    /// A match of the sequence's end, if there is one and it is not to be let pass.
    fn look(&mut self, sequence: &Sequence) -> Option<Match> {
        if self.id != Some(sequence.id) {
            self.lookup.begin(sequence.prompt_len + sequence.max_tokens);
            self.id = Some(sequence.id);
            self.habits = Default::default();
        }
        self.lookup.extend(&sequence.tokens);
        let found = self.lookup.find(&sequence.tokens)?;
        let pause = &mut self.habits[class(found.len)].pause;
        let is_paused = *pause > 0;
        *pause = pause.saturating_sub(1);
        (!is_paused).then_some(found)
    }

    /// That a draft behind a match of so many tokens is right.
    fn chance(&self, match_len: usize, of_all: &[Record; N_CLASSES]) -> f64 {
        let class = class(match_len);
        self.habits[class].record.chance(of_all[class].chance(FIRST_GUESS[class]))
    }
}

impl Habit {
    /// A draft would not pay: whether it is tried all the same. If not, after a pause.
    fn is_tried(&mut self) -> bool {
        if !self.is_trial {
            self.is_trial = true;
            self.pause = (TRY_AFTER << self.n_misses.min(16)).min(MAX_PAUSE);
            return false;
        }
        true
    }

    /// Drafts were verified.
    fn ended(&mut self, is_any_right: bool) {
        self.is_trial = false;
        self.n_misses = if is_any_right { 0 } else { self.n_misses + 1 };
        // One miss is no reason yet.
        self.pause = match self.n_misses {
            0 | 1 => 0,
            n => (1 << (n - 1).min(16)).min(MAX_PAUSE),
        };
    }
}

impl Record {
    fn test(&mut self, is_right: bool, fade: f64) {
        self.n_tested = self.n_tested * fade + 1.0;
        self.n_right = self.n_right * fade + f64::from(u8::from(is_right));
    }

    fn chance(&self, guess: f64) -> f64 {
        (self.n_right + GUESS_WEIGHT * guess) / (self.n_tested + GUESS_WEIGHT)
    }
}

fn class(match_len: usize) -> usize {
    match match_len {
        0..=2 => 0,
        3..=4 => 1,
        5..=8 => 2,
        _ => 3,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
#[path = "speculation_tests.rs"]
mod tests;
