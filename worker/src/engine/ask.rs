//! What the lead wants to know of a step's sampled rows beyond the likeliest token, and its form on
//! the wire.
//!
//! It goes out after the forward pass, when masks are known, and says all: a rank keeps nothing of a
//! sequence from one ask to the next, so preemption, prefix hits and resumption cannot leave it with
//! stale penalties. That costs 16 bytes a step for each different token that a penalty touches, and
//! an eighth of a byte of vocabulary for a mask.

use super::row::Edit;
use super::step::Limits;

const MAGIC: u32 = u32::from_le_bytes(*b"EvAK");
const HEAD_WORDS: usize = 4;
const ROW_WORDS: usize = 6;
const EDIT_WORDS: usize = 4;

const WANTS_TOTAL: u32 = 1;
const WANTS_RAW: u32 = 2;
const WANTS_TOKEN: u32 = 4;
const IS_MASKED: u32 = 8;

/// About all sampled rows of a step, in order.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Ask {
    pub rows: Vec<RowAsk>,
    /// Of all rows, one after the other.
    pub edits: Vec<Edit>,
    /// Of the masked rows, one after the other: a bit for each token that may come.
    pub masks: Vec<u32>,
}

/// About one row.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct RowAsk {
    /// So many of the likeliest tokens, after edits and mask.
    pub n_top: u32,
    /// The mass of all tokens after edits and mask, logits multiplied by this.
    pub total_scale: Option<f32>,
    /// For log-probabilities: the mass of all tokens before edits, and so many of the likeliest.
    pub n_raw: Option<u32>,
    /// The logit of this one before edits.
    pub token: Option<u32>,
    pub n_edits: u32,
    pub is_masked: bool,
}

/// Why bytes are no ask.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("an ask has {got} bytes; {expected} were due")]
    Length { got: usize, expected: usize },
    #[error("an ask has {what} {got}; {expected} was due")]
    Field { what: &'static str, got: u64, expected: u64 },
    #[error("an ask has {what} {got}; at most {max} is allowed")]
    Bound { what: &'static str, got: u64, max: u64 },
}

impl RowAsk {
    /// It is chosen from other logits than the model's.
    #[must_use]
    pub fn is_edited(&self) -> bool {
        self.n_edits > 0 || self.is_masked
    }
}

impl Ask {
    /// Words of a mask.
    #[must_use]
    pub fn mask_words(vocab: usize) -> usize {
        vocab.div_ceil(32)
    }

    /// Most bytes of an ask within `limits`: each row may touch every token twice.
    #[must_use]
    pub fn max_bytes(vocab: usize, n_rows: usize) -> usize {
        let row = ROW_WORDS + 2 * EDIT_WORDS * vocab + Self::mask_words(vocab);
        4 * (HEAD_WORDS + row * n_rows)
    }

    /// Empties it, keeping its memory.
    pub fn clear(&mut self) {
        self.rows.clear();
        self.edits.clear();
        self.masks.clear();
    }

    /// Whether ranks must agree on the largest logits first.
    #[must_use]
    pub fn wants_totals(&self) -> bool {
        self.rows.iter().any(|row| row.total_scale.is_some() || row.n_raw.is_some())
    }

    /// Each row with its edits and its mask.
    pub fn iter(&self, vocab: usize) -> impl Iterator<Item = (&RowAsk, &[Edit], Option<&[u32]>)> {
        let (mut edits, mut masks) = (self.edits.as_slice(), self.masks.as_slice());
        self.rows.iter().map(move |row| {
            let (of_row, rest) = edits.split_at(row.n_edits as usize);
            edits = rest;
            let mask = row.is_masked.then(|| {
                let (mask, rest) = masks.split_at(Self::mask_words(vocab));
                masks = rest;
                mask
            });
            (row, of_row, mask)
        })
    }

    /// Replaces `out` by the ask's bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.clear();
        let mut word = |n: u32| out.extend_from_slice(&n.to_le_bytes());
        [MAGIC, self.rows.len() as u32, self.edits.len() as u32, self.masks.len() as u32]
            .into_iter()
            .for_each(&mut word);
        for row in &self.rows {
            let flag = |is_set: bool, flag| if is_set { flag } else { 0 };
            word(
                flag(row.total_scale.is_some(), WANTS_TOTAL)
                    | flag(row.n_raw.is_some(), WANTS_RAW)
                    | flag(row.token.is_some(), WANTS_TOKEN)
                    | flag(row.is_masked, IS_MASKED),
            );
            word(row.n_top);
            word(row.total_scale.unwrap_or(0.0).to_bits());
            word(row.n_raw.unwrap_or(0));
            word(row.token.unwrap_or(0));
            word(row.n_edits);
        }
        for edit in &self.edits {
            word(edit.token);
            [edit.bias, edit.repetition, edit.penalty].iter().for_each(|x| word(x.to_bits()));
        }
        self.masks.iter().for_each(|&bits| word(bits));
    }

    /// Replaces the ask by what `bytes` say about `n_rows` rows. After an error its content means
    /// nothing.
    ///
    /// # Errors
    /// The first thing that no lead would send.
    pub fn decode(&mut self, bytes: &[u8], n_rows: usize, limits: &Limits) -> Result<(), Error> {
        self.clear();
        let vocab = limits.vocab as u64;
        let length = |expected| match bytes.len() == expected {
            true => Ok(()),
            false => Err(Error::Length { got: bytes.len(), expected }),
        };
        if bytes.len() < 4 * HEAD_WORDS {
            return length(4 * HEAD_WORDS);
        }
        let mut words = bytes.chunks_exact(4).map(|four| {
            u32::from_le_bytes(four.try_into().expect("chunks_exact gives four bytes"))
        });
        let mut word = || words.next().expect("the length was checked");
        equal("magic", word().into(), MAGIC.into())?;
        equal("number of rows", word().into(), n_rows as u64)?;
        let (n_edits, n_masks) = (word() as usize, word() as usize);
        at_most("number of edits", n_edits as u64, 2 * vocab * n_rows as u64)?;
        at_most("words of masks", n_masks as u64, vocab * n_rows as u64)?;
        length(4 * (HEAD_WORDS + ROW_WORDS * n_rows + EDIT_WORDS * n_edits + n_masks))?;
        let (mut n_edits_of_rows, mut n_masked) = (0, 0);
        for _ in 0..n_rows {
            let flags = word();
            let is_set = |flag| flags & flag != 0;
            let row = RowAsk {
                n_top: word(),
                total_scale: Some(f32::from_bits(word())).filter(|_| is_set(WANTS_TOTAL)),
                n_raw: Some(word()).filter(|_| is_set(WANTS_RAW)),
                token: Some(word()).filter(|_| is_set(WANTS_TOKEN)),
                n_edits: word(),
                is_masked: is_set(IS_MASKED),
            };
            at_most("candidates", row.n_top.max(row.n_raw.unwrap_or(0)).into(), vocab)?;
            at_most("token id", row.token.unwrap_or(0).into(), vocab - 1)?;
            n_edits_of_rows += u64::from(row.n_edits);
            n_masked += usize::from(row.is_masked);
            self.rows.push(row);
        }
        equal("sum of edits", n_edits_of_rows, n_edits as u64)?;
        let n_due = n_masked * Self::mask_words(limits.vocab);
        equal("sum of masks", n_masks as u64, n_due as u64)?;
        for _ in 0..n_edits {
            let [token, rest @ ..] = [word(), word(), word(), word()];
            at_most("edited token", token.into(), vocab - 1)?;
            let [bias, repetition, penalty] = rest.map(f32::from_bits);
            self.edits.push(Edit { token, bias, repetition, penalty });
        }
        self.masks.extend((0..n_masks).map(|_| word()));
        Ok(())
    }
}

fn equal(what: &'static str, got: u64, expected: u64) -> Result<(), Error> {
    if got == expected { Ok(()) } else { Err(Error::Field { what, got, expected }) }
}

fn at_most(what: &'static str, got: u64, max: u64) -> Result<(), Error> {
    if got <= max { Ok(()) } else { Err(Error::Bound { what, got, max }) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    const LIMITS: Limits = Limits {
        n_slots: 4,
        max_batch_tokens: 64,
        max_sample_rows: 16,
        max_context: 256,
        n_kv_blocks: 32,
        vocab: 70,
    };

    fn ask() -> Ask {
        let masked = RowAsk { is_masked: true, n_top: 1, ..RowAsk::default() };
        let edited = RowAsk {
            n_top: 64,
            total_scale: Some(1.25),
            n_raw: Some(0),
            n_edits: 2,
            ..RowAsk::default()
        };
        let known = RowAsk { token: Some(69), n_raw: Some(5), ..RowAsk::default() };
        let edits =
            vec![Edit::ban(3), Edit { token: 69, bias: 1.0, repetition: 1.5, penalty: -0.5 }];
        Ask { rows: vec![masked, edited, known], edits, masks: vec![7, 0, !0] }
    }

    fn round_trip(ask: &Ask) -> Result<Ask, Error> {
        let mut bytes = vec![9; 3];
        ask.encode(&mut bytes);
        let mut decoded = Ask { masks: vec![1], ..Ask::default() };
        decoded.decode(&bytes, 3, &LIMITS).map(|()| decoded)
    }

    #[test]
    fn an_ask_survives_the_wire_and_knows_what_is_whose() {
        assert_eq!(round_trip(&ask()).unwrap(), ask());
        let ask = ask();
        let parts: Vec<_> = ask.iter(70).map(|(_, edits, mask)| (edits.len(), mask)).collect();
        assert_eq!(parts, [(0, Some(&[7, 0, !0][..])), (2, None), (0, None)]);
    }

    #[test]
    fn an_ask_that_no_lead_would_send_is_refused_by_name() {
        let check = |change: fn(&mut Ask), expect: &str| {
            let mut ask = ask();
            change(&mut ask);
            let error = round_trip(&ask).unwrap_err().to_string();
            assert!(error.contains(expect), "`{error}` does not say `{expect}`");
        };
        check(|a| a.rows.truncate(2), "number of rows 2");
        check(|a| a.rows[0].n_top = 71, "candidates 71");
        check(|a| a.rows[2].n_raw = Some(u32::MAX), "candidates 4294967295");
        check(|a| a.rows[2].token = Some(70), "token id 70");
        check(|a| a.rows[0].n_edits = 1, "sum of edits 3");
        check(|a| a.rows[0].is_masked = false, "sum of masks 3");
        check(|a| a.masks.push(0), "sum of masks 4");
        check(|a| a.edits[0].token = 70, "edited token 70");
    }

    #[test]
    fn damaged_bytes_are_an_error_or_an_ask_that_adds_up() {
        let mut rng = StdRng::seed_from_u64(7);
        let (mut bytes, mut decoded) = (Vec::new(), Ask::default());
        for _ in 0..20_000 {
            ask().encode(&mut bytes);
            for _ in 0..rng.random_range(1..4) {
                let at = rng.random_range(0..bytes.len());
                bytes[at] = rng.random();
            }
            if rng.random_bool(0.2) {
                bytes.truncate(rng.random_range(0..bytes.len()));
            }
            if decoded.decode(&bytes, 3, &LIMITS).is_ok() {
                assert_eq!(decoded.iter(70).count(), 3);
            }
        }
    }
}
