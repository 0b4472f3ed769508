//! Tokens in, the text of the answer out: decoding, stop strings, and which tokens each piece of
//! text is made of.
//!
//! Pure. A token is given out when text of it is, so that logprobs never show what a stop string
//! cut away. Called by generation.rs.

use std::collections::VecDeque;
use std::sync::Arc;

use super::decoder::Decoder;
use super::stop;
use super::tokenizer::Tokenizer;

/// A token that is part of the answer.
#[derive(Clone, PartialEq)]
pub struct Placed<T> {
    pub token: T,
    /// Characters of the answer before it.
    pub offset_chars: usize,
}

/// What may be shown.
#[derive(Clone)]
pub struct Piece<T> {
    pub text: String,
    pub tokens: Vec<Placed<T>>,
    /// A stop string was found; nothing may follow.
    pub stopped: bool,
}

/// The answer of one sequence as it grows. `T` is what the caller knows of a token.
pub struct Output<T> {
    decoder: Decoder,
    matcher: stop::Matcher,
    /// Stop strings end nothing before so many more tokens.
    n_unstoppable: u32,
    /// Not yet given out, each with (bytes, characters) of decoded text before it.
    pending: VecDeque<(usize, usize, T)>,
    n_decoded_bytes: usize,
    n_decoded_chars: usize,
    n_released_bytes: usize,
}

impl<T> Output<T> {
    #[must_use]
    pub fn new(tokenizer: &Arc<Tokenizer>, stops: Arc<[String]>, min_tokens: u32) -> Self {
        Self {
            decoder: tokenizer.decoder(true),
            matcher: stop::Matcher::new(stops),
            n_unstoppable: min_tokens,
            pending: VecDeque::new(),
            n_decoded_bytes: 0,
            n_decoded_chars: 0,
            n_released_bytes: 0,
        }
    }

    /// Takes the next token.
    pub fn push(&mut self, id: u32, token: T) -> Piece<T> {
        self.pending.push_back((self.n_decoded_bytes, self.n_decoded_chars, token));
        let text = self.decoder.push(id);
        self.n_decoded_bytes += text.len();
        self.n_decoded_chars += text.chars().count();
        let released = match self.n_unstoppable {
            0 => self.matcher.push(&text),
            _ => stop::Released { text, stopped: false },
        };
        self.n_unstoppable = self.n_unstoppable.saturating_sub(1);
        let all = !released.stopped && !self.matcher.holds() && !self.decoder.holds();
        self.release(released.text, released.stopped, all)
    }

    /// No more tokens come: gives out what was held.
    pub fn finish(&mut self) -> Piece<T> {
        let released = self.matcher.push(&self.decoder.flush());
        if released.stopped {
            return self.release(released.text, true, false);
        }
        let text = released.text + &self.matcher.flush();
        self.release(text, false, true)
    }

    fn release(&mut self, text: String, stopped: bool, all: bool) -> Piece<T> {
        self.n_released_bytes += text.len();
        let mut tokens = Vec::new();
        while let Some((bytes, _, _)) = self.pending.front()
            && (all || *bytes < self.n_released_bytes)
        {
            if let Some((_, offset_chars, token)) = self.pending.pop_front() {
                tokens.push(Placed { token, offset_chars });
            }
        }
        Piece { text, tokens, stopped }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::tiny;
    use super::*;

    /// Text of each piece with the ids of its tokens, and whether it stopped.
    fn run(text: &str, stops: &[&str]) -> (Vec<(String, Vec<u32>)>, bool) {
        run_from(0, text, stops)
    }

    /// The same where stop strings end nothing before `min_tokens`.
    fn run_from(min_tokens: u32, text: &str, stops: &[&str]) -> (Vec<(String, Vec<u32>)>, bool) {
        let tokenizer = Arc::new(Tokenizer::from_json(&tiny::tokenizer_json(), None).unwrap());
        let stops = stops.iter().map(|stop| (*stop).to_owned()).collect();
        let mut output = Output::new(&tokenizer, stops, min_tokens);
        let mut pieces = Vec::new();
        let show = |piece: Piece<u32>| {
            (piece.text, piece.tokens.into_iter().map(|placed| placed.token).collect::<Vec<_>>())
        };
        for byte in text.bytes() {
            let piece = output.push(byte.into(), byte.into());
            let stopped = piece.stopped;
            pieces.push(show(piece));
            if stopped {
                return (pieces, true);
            }
        }
        pieces.push(show(output.finish()));
        (pieces, false)
    }

    #[test]
    fn a_stop_string_among_the_first_tokens_ends_nothing() {
        let text = |min_tokens| -> (String, bool) {
            let (pieces, stopped) = run_from(min_tokens, "a. b. c. d", &[". "]);
            (pieces.into_iter().map(|(text, _)| text).collect(), stopped)
        };
        assert_eq!(text(0), ("a".to_owned(), true));
        assert_eq!(text(3), ("a. b".to_owned(), true));
        assert_eq!(text(7), ("a. b. c".to_owned(), true));
        assert_eq!(text(10), ("a. b. c. d".to_owned(), false));
    }

    #[test]
    fn tokens_come_with_their_text_and_not_before() {
        let (pieces, stopped) = run("aé", &["éx"]);
        assert!(!stopped);
        let expect = [("a", vec![97]), ("", vec![]), ("", vec![]), ("é", vec![0xc3, 0xa9])];
        let expect: Vec<_> = expect.map(|(text, ids)| (text.to_owned(), ids)).into();
        assert_eq!(pieces, expect);
    }

    #[test]
    fn tokens_of_a_stop_string_are_not_shown() {
        let (pieces, stopped) = run("abEND", &["END"]);
        assert!(stopped);
        let text: String = pieces.iter().map(|(text, _)| text.as_str()).collect();
        let ids: Vec<u32> = pieces.into_iter().flat_map(|(_, ids)| ids).collect();
        assert_eq!((text.as_str(), ids), ("ab", vec![97, 98]));
    }

    #[test]
    fn offsets_count_characters() {
        let tokenizer = Arc::new(Tokenizer::from_json(&tiny::tokenizer_json(), None).unwrap());
        let mut output = Output::new(&tokenizer, Arc::from([]), 0);
        let ids = "é!hello".bytes().take(3).map(u32::from).chain([259]);
        let offsets: Vec<usize> = ids
            .flat_map(|id| output.push(id, ()).tokens)
            .map(|placed| placed.offset_chars)
            .collect();
        assert_eq!(offsets, [0, 0, 1, 2]);
    }
}
