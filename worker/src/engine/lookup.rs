//! Prompt lookup (Saxena 2023, "Prompt Lookup Decoding"): where the last tokens of a sequence stood
//! before, for what followed them there may follow again. Pure; knows tokens, and nothing of
//! whether a draft pays (`speculation`).
//!
//! Chains of hashes as in LZ77: each position points back to the last one that ends with an equal
//! pair of tokens. A token costs one entry, a look a bounded walk, however long the text is and
//! whoever chose it.

use std::mem::replace;

/// Shortest match: after one common token, too little is right.
const MIN_MATCH: usize = 2;
/// Matches are not told apart beyond this.
const MAX_MATCH: usize = 16;
/// Earlier places that are compared.
const MAX_LOOKS: usize = 16;

/// Pairs of tokens of one sequence, by hash.
#[derive(Debug, Default)]
pub struct Lookup {
    /// By hash of a pair: one more than where it last ended; 0 if nowhere.
    heads: Vec<u32>,
    /// By position: what `heads` said before it.
    before: Vec<u32>,
}

/// An earlier place that ends like the sequence does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Match {
    /// The position after it.
    pub next: usize,
    /// Equal tokens before that, at most [`MAX_MATCH`] of them.
    pub len: usize,
}

impl Lookup {
    /// Begins with another sequence, that may come to `n_tokens`.
    pub fn begin(&mut self, n_tokens: usize) {
        self.heads.clear();
        self.heads.resize(n_tokens.next_power_of_two(), 0);
        self.before.clear();
        self.before.reserve(n_tokens);
    }

    /// Takes in what `tokens`, all of the sequence, have more than those known.
    pub fn extend(&mut self, tokens: &[u32]) {
        for at in self.before.len()..tokens.len() {
            let before = match at.checked_sub(1) {
                Some(first) => {
                    let hash = hash([tokens[first], tokens[at]], self.heads.len());
                    replace(&mut self.heads[hash], at as u32 + 1)
                }
                None => 0,
            };
            self.before.push(before);
        }
    }

    /// The longest match of the end of `tokens`, all of which are known; of equals the latest.
    #[must_use]
    pub fn find(&self, tokens: &[u32]) -> Option<Match> {
        let mut next = *self.before.last()? as usize;
        let mut best: Option<Match> = None;
        for _ in 0..MAX_LOOKS {
            if next == 0 {
                break;
            }
            let len = common_end(&tokens[..next], tokens);
            if len >= MIN_MATCH && best.is_none_or(|best| len > best.len) {
                best = Some(Match { next, len });
                if len == MAX_MATCH {
                    break;
                }
            }
            next = self.before[next - 1] as usize;
        }
        best
    }
}

impl Match {
    /// Replaces `out` by the `n` tokens that would follow `tokens` if they went on like this; what
    /// repeats itself is taken to go on repeating.
    pub fn draft(&self, tokens: &[u32], n: usize, out: &mut Vec<u32>) {
        out.clear();
        for at in self.next..self.next + n {
            let token = tokens.get(at).or_else(|| out.get(at - tokens.len()));
            out.push(*token.expect("a match ends before the last token"));
        }
    }
}

fn common_end(one: &[u32], other: &[u32]) -> usize {
    let pairs = one.iter().rev().zip(other.iter().rev());
    pairs.take(MAX_MATCH).take_while(|(one, other)| one == other).count()
}

/// Below `n`, a power of two.
fn hash([first, second]: [u32; 2], n: usize) -> usize {
    let pair = u64::from(first) << 32 | u64::from(second);
    // Fibonacci hashing (Knuth, volume 3, section 6.4): the upper bits are the good ones.
    let mixed = (pair ^ pair >> 29).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> 32) as usize & (n - 1)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    fn lookup(tokens: &[u32]) -> Lookup {
        let mut lookup = Lookup::default();
        lookup.begin(tokens.len());
        lookup.extend(tokens);
        lookup
    }

    fn draft(tokens: &[u32], n: usize) -> Option<(usize, Vec<u32>)> {
        let found = lookup(tokens).find(tokens)?;
        let mut out = vec![99];
        found.draft(tokens, n, &mut out);
        Some((found.len, out))
    }

    #[test]
    fn the_longest_match_is_found_and_of_equals_the_latest() {
        let check = |tokens: &[u32], expect: Option<(usize, &[u32])>| {
            let got = draft(tokens, 3);
            let expect = expect.map(|(len, drafts)| (len, drafts.to_vec()));
            assert_eq!(got, expect, "{tokens:?}");
        };
        check(&[], None);
        check(&[1], None);
        check(&[1, 2], None);
        check(&[1, 2, 1], None); // one token is no match
        check(&[1, 2, 3, 4, 1, 2], Some((2, &[3, 4, 1])));
        check(&[1, 2, 3, 1, 2, 4, 1, 2], Some((2, &[4, 1, 2])));
        check(&[9, 1, 2, 3, 8, 1, 2, 4, 9, 1, 2], Some((3, &[3, 8, 1])));
        check(&[7, 7, 7, 7], Some((3, &[7, 7, 7])));
        check(&[5, 6, 5, 6], Some((2, &[5, 6, 5])));
    }

    #[test]
    fn a_loop_is_taken_to_go_on() {
        assert_eq!(draft(&[1, 2, 3, 1, 2, 3], 8), Some((3, vec![1, 2, 3, 1, 2, 3, 1, 2])));
    }

    #[test]
    fn token_by_token_or_at_once_is_the_same_and_memory_is_bounded() {
        let mut rng = StdRng::seed_from_u64(5);
        let tokens: Vec<u32> = (0..2000).map(|_| rng.random_range(0..12)).collect();
        let mut grown = Lookup::default();
        grown.begin(tokens.len());
        let capacity = grown.before.capacity();
        for n in 1..=tokens.len() {
            grown.extend(&tokens[..n]);
            if n % 97 == 0 {
                assert_eq!(grown.find(&tokens[..n]), lookup(&tokens[..n]).find(&tokens[..n]));
            }
        }
        assert_eq!((grown.before.capacity(), grown.heads.len()), (capacity, 2048));
    }

    #[test]
    fn what_is_found_is_there() {
        let mut rng = StdRng::seed_from_u64(6);
        let mut n_found = 0;
        for _ in 0..500 {
            let n = rng.random_range(2..200);
            let tokens: Vec<u32> = (0..n).map(|_| rng.random_range(0..9)).collect();
            let Some(Match { next, len }) = lookup(&tokens).find(&tokens) else { continue };
            assert!(next < tokens.len() && (MIN_MATCH..=MAX_MATCH).contains(&len));
            assert!(tokens[..next].ends_with(&tokens[tokens.len() - len..]));
            n_found += 1;
        }
        assert!(n_found > 300, "{n_found}");
    }

    #[test]
    fn another_sequence_finds_nothing_of_the_one_before() {
        let mut lookup = lookup(&[1, 2, 3, 4]);
        lookup.begin(4);
        lookup.extend(&[9, 9, 1, 2]);
        assert_eq!(lookup.find(&[9, 9, 1, 2]), None);
    }
}
