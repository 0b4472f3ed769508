//! Finds stop strings in text that arrives in pieces, and lets nothing of them out.
//!
//! Pure. The result depends on the text alone, not on how it was cut: the stop whose end comes
//! first wins, and of those that end together the one that began first. Called by output.rs.

use std::sync::Arc;

/// Watches one text.
#[derive(Debug, Clone)]
pub struct Matcher {
    stops: Arc<[String]>,
    /// The end of the text that could still become a stop string.
    held: String,
}

/// What a piece of text released.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Released {
    pub text: String,
    /// A stop string was found; the text ends before it and nothing may follow.
    pub stopped: bool,
}

impl Matcher {
    /// `stops` are not empty strings.
    #[must_use]
    pub fn new(stops: Arc<[String]>) -> Self {
        Self { stops, held: String::new() }
    }

    /// Whether some text waits to be told from a stop string.
    #[must_use]
    pub fn holds(&self) -> bool {
        !self.held.is_empty()
    }

    /// Takes the next piece, gives what surely belongs to the answer.
    pub fn push(&mut self, piece: &str) -> Released {
        self.held.push_str(piece);
        let first = self
            .stops
            .iter()
            .filter_map(|stop| self.held.find(stop.as_str()).map(|at| (at + stop.len(), at)))
            .min();
        if let Some((_, start)) = first {
            let mut text = std::mem::take(&mut self.held);
            text.truncate(start);
            return Released { text, stopped: true };
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let tail = self.held.split_off(self.held.len() - keep);
        Released { text: std::mem::replace(&mut self.held, tail), stopped: false }
    }

    /// The text ended: what was held is not a stop string.
    pub fn flush(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Bytes of the longest end of `text` that is a beginning of `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len().saturating_sub(1));
    (1..=longest)
        .rev()
        .find(|&n| stop.is_char_boundary(n) && text.as_bytes().ends_with(&stop.as_bytes()[..n]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds the text cut every `step` characters.
    fn run(stops: &[&str], text: &str, step: usize) -> (String, bool) {
        let stops: Arc<[String]> = stops.iter().map(|s| (*s).to_owned()).collect();
        let mut matcher = Matcher::new(stops);
        let chars: Vec<char> = text.chars().collect();
        let mut out = String::new();
        for piece in chars.chunks(step) {
            let released = matcher.push(&piece.iter().collect::<String>());
            out.push_str(&released.text);
            if released.stopped {
                return (out, true);
            }
        }
        out.push_str(&matcher.flush());
        (out, false)
    }

    #[test]
    fn however_the_text_is_cut_the_same_comes_out() {
        let table: &[(&[&str], &str, &str, bool)] = &[
            (&[], "hello", "hello", false),
            (&["x"], "hello", "hello", false),
            (&["lo"], "hello", "hel", true),
            (&["hello"], "hello", "", true),
            (&["lox"], "hello", "hello", false),
            (&["\n\n"], "a\nb\n\nc", "a\nb", true),
            // A false start inside a true one.
            (&["aab"], "aaab", "a", true),
            (&["abab"], "abaabab", "aba", true),
            // The end that comes first wins, then the longer one.
            (&["abc", "b"], "abc", "a", true),
            (&["bc", "abc"], "xabc", "x", true),
            (&["world", "wor"], "hello world", "hello ", true),
            // More than one byte a character.
            (&["é!"], "caf\u{e9} \u{e9}!x", "café ", true),
            (&["🦙🦙"], "a🦙b🦙🦙", "a🦙b", true),
            (&["ab", "cd", "ef", "gh"], "aacceeghab", "aaccee", true),
        ];
        for (stops, text, expect, stopped) in table {
            for step in 1..=text.chars().count() {
                let got = run(stops, text, step);
                assert_eq!(got, ((*expect).to_owned(), *stopped), "{stops:?} {text:?} by {step}");
            }
        }
    }

    #[test]
    fn text_that_cannot_become_a_stop_is_not_held() {
        let mut matcher = Matcher::new(Arc::from(["END".to_owned()]));
        assert_eq!(matcher.push("all E").text, "all ");
        assert!(matcher.holds());
        assert_eq!(matcher.push("x").text, "Ex");
        assert!(!matcher.holds());
    }
}
