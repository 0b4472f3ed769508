//! What a rank says about its part of the sampled rows, and what all parts say together.
//!
//! A rank edits a copy of its logits where the ask says so, and reports its likeliest tokens and the
//! masses of its part. Masses are integers beside the largest logit of all ranks, and lists are
//! sorted by one total order: what comes out does not depend on who held what.

use std::ops::Range;

use evener_kernels::Isa;
use evener_kernels::peaks::{n_peaks, peaks_of};

use super::ask::{Ask, RowAsk};
use super::row::{self, Norm, Row, edit, keep_likeliest};
use super::sampler::Candidate;

/// Largest logits of a row, after and before edits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Highest {
    pub edited: f32,
    pub raw: f32,
}

impl Highest {
    /// Of no logits at all.
    pub const NONE: Self = Self { edited: f32::NEG_INFINITY, raw: f32::NEG_INFINITY };

    pub fn raise(&mut self, other: Self) {
        self.edited = self.edited.max(other.edited);
        self.raw = self.raw.max(other.raw);
    }
}

/// One rank's part of the rows: working memory, kept between steps.
#[derive(Debug, Default)]
pub struct Part {
    /// Of the edited rows, one after the other; and their peaks.
    edited: Vec<f32>,
    edited_peaks: Vec<f32>,
    candidates: Vec<Candidate>,
    scratch: Vec<i32>,
}

/// The logits of a rank's vocabulary rows.
#[derive(Debug, Clone, Copy)]
pub struct Logits<'a> {
    pub isa: Isa,
    pub first: u32,
    pub n: usize,
    /// `[rows, n]`
    pub logits: &'a [f32],
    /// `[rows, n_peaks(n)]`
    pub peaks: &'a [f32],
}

impl<'a> Logits<'a> {
    #[must_use]
    pub fn new(isa: Isa, vocab: &Range<usize>, logits: &'a [f32], peaks: &'a [f32]) -> Self {
        Self { isa, first: vocab.start as u32, n: vocab.len(), logits, peaks }
    }

    fn values(&self, row_idx: usize) -> &'a [f32] {
        &self.logits[row_idx * self.n..][..self.n]
    }

    fn row(&self, row_idx: usize) -> Result<Row<'a>, row::Error> {
        let n_peaks = n_peaks(self.n);
        let peaks = &self.peaks[row_idx * n_peaks..][..n_peaks];
        Row::new(self.isa, self.first, self.values(row_idx), peaks)
    }
}

impl Part {
    /// Edits what is to be edited, and replaces `highest` by the largest logits of each row.
    ///
    /// # Errors
    /// Logits that are no numbers.
    pub fn prepare(
        &mut self,
        logits: &Logits<'_>,
        ask: &Ask,
        vocab: usize,
        highest: &mut Vec<Highest>,
    ) -> Result<(), row::Error> {
        self.edited.clear();
        self.edited_peaks.clear();
        highest.clear();
        if logits.n == 0 {
            highest.resize(ask.rows.len(), Highest::NONE);
            return Ok(());
        }
        for (row_idx, (asked, edits, mask)) in ask.iter(vocab).enumerate() {
            // Before edits: they would hide a logit that is no number.
            let raw = logits.row(row_idx)?.highest();
            let mut edited = raw;
            if asked.is_edited() {
                let (start, first_peak) = (self.edited.len(), self.edited_peaks.len());
                self.edited.extend_from_slice(logits.values(row_idx));
                edit(&mut self.edited[start..], logits.first, edits, mask);
                self.edited_peaks.resize(first_peak + n_peaks(logits.n), 0.0);
                let peaks = &mut self.edited_peaks[first_peak..];
                peaks_of(logits.isa, &self.edited[start..], peaks);
                edited =
                    Row::new(logits.isa, logits.first, &self.edited[start..], peaks)?.highest();
            }
            highest.push(Highest { edited, raw });
        }
        Ok(())
    }

    /// Replaces `out` by what there is to say, each row's words as [`Answers::take`] reads them.
    /// `highest`: by row, of all ranks if the ask wants totals.
    ///
    /// # Errors
    /// Logits that are no numbers.
    pub fn report(
        &mut self,
        logits: &Logits<'_>,
        ask: &Ask,
        highest: &[Highest],
        out: &mut Vec<f32>,
    ) -> Result<(), row::Error> {
        let Self { edited, edited_peaks, candidates, scratch } = self;
        let (n, n_peaks) = (logits.n, n_peaks(logits.n));
        let mut n_edited = 0;
        out.clear();
        for (row_idx, (asked, highest)) in ask.rows.iter().zip(highest).enumerate() {
            if n == 0 {
                put_nothing(asked, out);
                continue;
            }
            let (raw_row, raw) = (logits.row(row_idx)?, logits.values(row_idx));
            let mut row = raw_row;
            if asked.is_edited() {
                let values = &edited[n_edited * n..][..n];
                let peaks = &edited_peaks[n_edited * n_peaks..][..n_peaks];
                row = Row::new(logits.isa, logits.first, values, peaks)?;
                n_edited += 1;
            }
            row.likeliest(asked.n_top as usize, raw, candidates, scratch);
            put_candidates(candidates, out);
            if let Some(scale) = asked.total_scale {
                put_mass(row.total(highest.edited, scale), out);
            }
            if let Some(n_raw) = asked.n_raw {
                raw_row.likeliest(n_raw as usize, raw, candidates, scratch);
                put_candidates(candidates, out);
                put_mass(raw_row.total(highest.raw, 1.0), out);
            }
            if let Some(token) = asked.token {
                let at = token.checked_sub(logits.first).map(|at| at as usize);
                put_token(at.and_then(|at| raw.get(at)).copied(), out);
            }
        }
        Ok(())
    }
}

fn put_candidates(candidates: &[Candidate], out: &mut Vec<f32>) {
    out.push(f32::from_bits(candidates.len() as u32));
    for candidate in candidates {
        out.extend([f32::from_bits(candidate.token), candidate.logit, candidate.raw]);
    }
}

fn put_mass(mass: u64, out: &mut Vec<f32>) {
    out.extend([mass as u32, (mass >> 32) as u32].map(f32::from_bits));
}

fn put_token(logit: Option<f32>, out: &mut Vec<f32>) {
    out.extend([f32::from_bits(logit.is_some().into()), logit.unwrap_or(0.0)]);
}

/// A rank without vocabulary rows has nothing to say, in as many words.
fn put_nothing(asked: &RowAsk, out: &mut Vec<f32>) {
    put_candidates(&[], out);
    if asked.total_scale.is_some() {
        put_mass(0, out);
    }
    if asked.n_raw.is_some() {
        put_candidates(&[], out);
        put_mass(0, out);
    }
    if asked.token.is_some() {
        put_token(None, out);
    }
}

/// A rank's answer is not what was asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("rank {rank} sent {what} where its answer about row {row_idx} was due")]
pub struct Nonsense {
    rank: usize,
    row_idx: usize,
    what: &'static str,
}

/// All ranks' answers about one row, put together.
#[derive(Debug, Default)]
pub struct Answer {
    /// The likeliest after edits, best first: as many as were asked for, or all.
    pub candidates: Vec<Candidate>,
    /// No token is left out of them but banned ones.
    pub is_all: bool,
    /// Mass after edits, if asked for.
    pub total: u64,
    /// The likeliest before edits, if asked for.
    pub raw: Vec<Candidate>,
    /// If log-probabilities were asked for.
    pub norm: Option<Norm>,
    /// The logit before edits of the token that was asked for.
    pub token_logit: Option<f32>,
}

/// Reads the ranks' answers row by row.
#[derive(Debug, Default)]
pub struct Answers {
    /// By rank: words read.
    read: Vec<usize>,
    row_idx: usize,
}

impl Answers {
    pub fn begin(&mut self, world_size: usize) {
        self.read.clear();
        self.read.resize(world_size, 0);
        self.row_idx = 0;
    }

    /// The next row, put together in `out`. `vocab` and `words`: by rank.
    ///
    /// # Errors
    /// A rank sent something else.
    pub fn take<'a>(
        &mut self,
        asked: &RowAsk,
        highest: Highest,
        vocab: &[Range<usize>],
        words: impl Fn(usize) -> &'a [f32],
        out: &mut Answer,
    ) -> Result<(), Nonsense> {
        out.candidates.clear();
        out.raw.clear();
        (out.is_all, out.total, out.token_logit) = (true, 0, None);
        let mut raw_total = 0u64;
        for (rank, vocab) in vocab.iter().enumerate() {
            let mut words = Words { words: words(rank), read: &mut self.read[rank], vocab };
            let mut read = || -> Result<(), &'static str> {
                let n_got = words.candidates(asked.n_top, &mut out.candidates)?;
                out.is_all &= n_got < asked.n_top || n_got as usize == vocab.len();
                if asked.total_scale.is_some() {
                    out.total = out.total.checked_add(words.mass()?).ok_or("too large a mass")?;
                }
                if let Some(n_raw) = asked.n_raw {
                    words.candidates(n_raw, &mut out.raw)?;
                    raw_total = raw_total.checked_add(words.mass()?).ok_or("too large a mass")?;
                }
                if asked.token.is_some() && words.bits()? != 0 {
                    out.token_logit = Some(words.number()?);
                } else if asked.token.is_some() {
                    words.bits()?;
                }
                Ok(())
            };
            read().map_err(|what| Nonsense { rank, row_idx: self.row_idx, what })?;
        }
        self.row_idx += 1;
        // Beyond as many as each rank gave, another's next one may be likelier than what follows;
        // and where all gave all they have, what is kept must still not depend on the split.
        out.is_all &= out.candidates.len() <= asked.n_top as usize;
        keep_likeliest(asked.n_top as usize, &mut out.candidates);
        keep_likeliest(asked.n_raw.unwrap_or(0) as usize, &mut out.raw);
        out.norm = asked.n_raw.map(|_| Norm::new(highest.raw, raw_total));
        Ok(())
    }
}

/// What one rank sent, as far as it was not read yet.
struct Words<'a, 'b> {
    words: &'a [f32],
    read: &'b mut usize,
    vocab: &'a Range<usize>,
}

impl Words<'_, '_> {
    fn bits(&mut self) -> Result<u32, &'static str> {
        let word = self.words.get(*self.read).ok_or("too few words")?;
        *self.read += 1;
        Ok(word.to_bits())
    }

    fn number(&mut self) -> Result<f32, &'static str> {
        let number = f32::from_bits(self.bits()?);
        if number.is_finite() { Ok(number) } else { Err("a logit that is no number") }
    }

    fn mass(&mut self) -> Result<u64, &'static str> {
        Ok(u64::from(self.bits()?) | u64::from(self.bits()?) << 32)
    }

    fn candidates(&mut self, max: u32, out: &mut Vec<Candidate>) -> Result<u32, &'static str> {
        let n = self.bits()?;
        if n > max {
            return Err("too many candidates");
        }
        for _ in 0..n {
            let token = self.bits()?;
            if !self.vocab.contains(&(token as usize)) {
                return Err("a token that is another rank's");
            }
            out.push(Candidate { token, logit: self.number()?, raw: self.number()? });
        }
        Ok(n)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::row::{BANNED, Edit};
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    const VOCAB: usize = 3000;

    /// What ranks with these vocabulary rows say together about rows of logits.
    fn together(rows: &[Vec<f32>], ask: &Ask, vocab: &[Range<usize>]) -> Vec<Answer> {
        let isa = Isa::detect();
        let of_rank: Vec<(Vec<f32>, Vec<f32>)> = vocab
            .iter()
            .map(|part| {
                let n_peaks = n_peaks(part.len());
                let mut peaks = vec![0.0; rows.len() * n_peaks];
                for (row, peaks) in rows.iter().zip(peaks.chunks_mut(n_peaks.max(1))) {
                    peaks_of(isa, &row[part.clone()], peaks);
                }
                (rows.iter().flat_map(|row| &row[part.clone()]).copied().collect(), peaks)
            })
            .collect();
        let logits =
            |rank: usize| Logits::new(isa, &vocab[rank], &of_rank[rank].0, &of_rank[rank].1);
        let mut parts: Vec<Part> = vocab.iter().map(|_| Part::default()).collect();
        let mut highest = vec![Highest::NONE; rows.len()];
        for (rank, part) in parts.iter_mut().enumerate() {
            let mut own = Vec::new();
            part.prepare(&logits(rank), ask, VOCAB, &mut own).unwrap();
            highest.iter_mut().zip(own).for_each(|(highest, own)| highest.raise(own));
        }
        let reports: Vec<Vec<f32>> = parts
            .iter_mut()
            .enumerate()
            .map(|(rank, part)| {
                let mut report = Vec::new();
                part.report(&logits(rank), ask, &highest, &mut report).unwrap();
                report
            })
            .collect();
        let mut answers = Answers::default();
        answers.begin(vocab.len());
        let take = |(asked, highest): (&RowAsk, Highest)| {
            let mut answer = Answer::default();
            let words = |rank: usize| reports[rank].as_slice();
            answers.take(asked, highest, vocab, words, &mut answer).unwrap();
            answer
        };
        ask.rows.iter().zip(highest).map(take).collect()
    }

    #[test]
    fn answers_do_not_depend_on_who_holds_what() {
        let mut rng = StdRng::seed_from_u64(11);
        let rows: Vec<Vec<f32>> = (0..6)
            .map(|_| (0..VOCAB).map(|_| rng.random_range(-60..60) as f32 * 0.25).collect())
            .collect();
        let edits: Vec<Edit> = (0..500)
            .map(|_| Edit {
                token: rng.random_range(0..VOCAB as u32),
                bias: rng.random_range(-8..8) as f32,
                repetition: 1.3,
                penalty: 0.5,
            })
            .collect();
        let masks: Vec<u32> = (0..2 * Ask::mask_words(VOCAB)).map(|_| rng.random()).collect();
        let wants = RowAsk { n_top: 64, total_scale: Some(1.25), ..RowAsk::default() };
        let asked = vec![
            wants,
            RowAsk { n_edits: 250, n_raw: Some(5), ..wants },
            RowAsk { is_masked: true, ..wants },
            RowAsk { n_edits: 250, is_masked: true, n_raw: Some(0), ..wants },
            RowAsk { token: Some(2999), n_raw: Some(20), ..RowAsk::default() },
            RowAsk { n_top: VOCAB as u32, ..RowAsk::default() },
        ];
        let ask = Ask { rows: asked, edits, masks };
        let alone = together(&rows, &ask, std::slice::from_ref(&(0..VOCAB)));
        let halves = [0..1504, 1504..VOCAB];
        let uneven = [0..16, 16..16, 16..2992, 2992..VOCAB];
        for vocab in [&halves[..], &uneven[..]] {
            let split = together(&rows, &ask, vocab);
            for ((one, other), asked) in alone.iter().zip(&split).zip(&ask.rows) {
                assert_eq!(one.candidates, other.candidates);
                assert_eq!((one.is_all, one.total), (other.is_all, other.total));
                assert_eq!((&one.raw, one.norm), (&other.raw, other.norm));
                assert_eq!(one.token_logit, other.token_logit);
                assert_eq!(one.norm.is_some(), asked.n_raw.is_some());
            }
        }
        // And they are what a plain look at the whole row gives.
        for ((row, (asked, edits, mask)), answer) in rows.iter().zip(ask.iter(VOCAB)).zip(&alone) {
            let mut edited = row.clone();
            edit(&mut edited, 0, edits, mask);
            let mut sorted: Vec<u32> = (0..VOCAB as u32).collect();
            sorted.retain(|&token| edited[token as usize] > BANNED);
            let logit = |token: u32| edited[token as usize];
            sorted.sort_by(|&a, &b| logit(b).total_cmp(&logit(a)).then(a.cmp(&b)));
            sorted.truncate(asked.n_top as usize);
            assert!(answer.candidates.iter().map(|c| c.token).eq(sorted));
            assert!(answer.candidates.iter().all(|c| c.raw == row[c.token as usize]));
            assert_eq!(answer.token_logit, asked.token.map(|token| row[token as usize]));
            let highest = edited.iter().fold(f32::MIN, |a, &b| a.max(b));
            if let Some(scale) = asked.total_scale {
                let exp = |&x: &f32| (f64::from(x - highest) * f64::from(scale)).exp();
                let sum: f64 = edited.iter().map(exp).sum();
                let got = answer.total as f64 / evener_kernels::softmax::ONE as f64;
                assert!((got / sum - 1.0).abs() < 1e-5, "{got} {sum}");
            }
        }
    }

    #[test]
    fn nonsense_of_a_rank_is_refused() {
        let asked = RowAsk { n_top: 2, total_scale: Some(1.0), ..RowAsk::default() };
        let check = |words: &[f32], expect: &str| {
            let mut answers = Answers::default();
            answers.begin(1);
            let highest = Highest { edited: 0.0, raw: 0.0 };
            let mut out = Answer::default();
            let result =
                answers.take(&asked, highest, std::slice::from_ref(&(5..9)), |_| words, &mut out);
            let error = result.unwrap_err().to_string();
            assert!(error.contains(expect), "`{error}` does not say `{expect}`");
        };
        let bits = f32::from_bits;
        check(&[], "too few words");
        check(&[bits(3)], "too many candidates");
        check(&[bits(1), bits(9)], "another rank's");
        check(&[bits(1), bits(5), f32::NAN, 0.0], "no number");
        check(&[bits(1), bits(5), 1.0, 1.0, 0.0], "too few words");
    }
}
