//! Keeps what users wrote from becoming special tokens, and with that from forging roles.
//!
//! A chat template prints special tokens (`<|im_start|>`) around what users wrote. If a user writes
//! one, it must stay plain text, or the user could forge a role. So: before rendering, each special
//! token inside users' text is broken by a *mark*, a private character found in none of the texts
//! ([`Guard`]). The template sees the text otherwise as it is, so its `trim`, `in` or `split` work.
//! After rendering, special tokens still whole are the template's own; the text is cut there, marks
//! are removed, and each stretch between two special tokens is encoded in one go with special
//! tokens switched off. The joints of template text and user text lie inside such a stretch, so
//! pre-tokenisation and merges across them are those of the whole text. Where no text needed a
//! mark, the rendered text is encoded at once.
//!
//! Pure. Called by tokenizer.rs and text/mod.rs.

use std::collections::HashSet;

use tokenizers::AddedToken;

/// Characters of private use, of which one not in the texts becomes the mark.
const MARKS: std::ops::RangeInclusive<char> = '\u{F0000}'..='\u{FFFFD}';

/// A token that has a meaning of its own, such as the beginning of a turn.
struct Special {
    text: String,
    id: u32,
    /// Takes the blanks before it with it.
    lstrip: bool,
    /// And those after it.
    rstrip: bool,
}

/// The special tokens of a vocabulary.
pub struct Specials {
    /// Longest first.
    list: Vec<Special>,
    ids: HashSet<u32>,
    /// By byte: whether one begins with it.
    starts: [bool; 256],
}

impl Specials {
    /// Those of the added tokens that are special, by id.
    pub fn new(added: impl IntoIterator<Item = (u32, AddedToken)>) -> Self {
        let mut list: Vec<Special> = added
            .into_iter()
            .filter(|(_, token)| token.special && !token.content.is_empty())
            .map(|(id, AddedToken { content, lstrip, rstrip, .. })| Special {
                text: content,
                id,
                lstrip,
                rstrip,
            })
            .collect();
        list.sort_by(|a, b| b.text.len().cmp(&a.text.len()).then(a.id.cmp(&b.id)));
        let mut starts = [false; 256];
        for special in &list {
            starts[usize::from(special.text.as_bytes()[0])] = true;
        }
        let ids = list.iter().map(|special| special.id).collect();
        Self { list, ids, starts }
    }

    pub fn contains(&self, id: u32) -> bool {
        self.ids.contains(&id)
    }

    /// Whether some of them swallow the blanks beside them.
    pub fn strip(&self) -> bool {
        self.list.iter().any(|special| special.lstrip || special.rstrip)
    }

    /// The leftmost of a text, the longest of those that begin there.
    fn find(&self, text: &str) -> Option<(usize, &Special)> {
        text.bytes().enumerate().filter(|(_, byte)| self.starts[usize::from(*byte)]).find_map(
            |(at, _)| {
                let here = &text.as_bytes()[at..];
                let special = self.list.iter().find(|s| here.starts_with(s.text.as_bytes()))?;
                Some((at, special))
            },
        )
    }
}

/// A stretch of rendered text.
#[derive(Debug, PartialEq, Eq)]
pub enum Part {
    /// A special token of the template.
    Special(u32),
    /// Plain text, whatever stands in it.
    Plain(String),
}

/// The mark for the texts of one conversation, and what it is for.
pub struct Guard<'a> {
    specials: &'a Specials,
    mark: char,
}

impl<'a> Guard<'a> {
    /// Chooses a mark for these texts; none if they hold all of the possible ones.
    pub fn new<'t>(specials: &'a Specials, texts: impl Iterator<Item = &'t str>) -> Option<Self> {
        let mut used = HashSet::new();
        for text in texts {
            used.extend(text.chars().filter(|c| MARKS.contains(c)));
        }
        let mark = MARKS.clone().find(|c| !used.contains(c))?;
        Some(Self { specials, mark })
    }

    /// Cuts rendered text at the template's special tokens and takes the marks out; none if there
    /// are no marks, so that the text can be encoded as it is.
    #[must_use]
    pub fn split(&self, rendered: &str) -> Option<Vec<Part>> {
        if !rendered.contains(self.mark) {
            return None;
        }
        let mut parts = Vec::new();
        let mut rest = rendered;
        loop {
            let found = self.specials.find(rest);
            let stretch = found.map_or(rest, |(at, special)| {
                let before = &rest[..at];
                if special.lstrip { before.trim_end() } else { before }
            });
            let plain: String = stretch.chars().filter(|&c| c != self.mark).collect();
            if !plain.is_empty() {
                parts.push(Part::Plain(plain));
            }
            let Some((at, special)) = found else {
                return Some(parts);
            };
            parts.push(Part::Special(special.id));
            rest = &rest[at + special.text.len()..];
            if special.rstrip {
                rest = rest.trim_start();
            }
        }
    }

    /// Bytes of a text, marks aside.
    #[must_use]
    pub fn n_bytes(&self, text: &str) -> usize {
        text.len() - text.matches(self.mark).count() * self.mark.len_utf8()
    }

    /// The text with a mark inside each special token, and at an edge where it could become one
    /// together with its neighbour in the template.
    #[must_use]
    pub fn protect(&self, text: &str) -> String {
        let mut out = String::with_capacity(text.len());
        let start = text.len() - text.trim_start().len();
        let (blank, mut rest) = text.split_at(start);
        out.push_str(blank);
        if self.specials.list.iter().any(|special| begins_with_an_end_of(rest, &special.text)) {
            out.push(self.mark);
        }
        while let Some((at, special)) = self.specials.find(rest) {
            let cut = at + special.text.chars().next().map_or(0, char::len_utf8);
            out.push_str(&rest[..cut]);
            out.push(self.mark);
            rest = &rest[cut..];
        }
        let (body, blank) = rest.split_at(rest.trim_end().len());
        out.push_str(body);
        if self.specials.list.iter().any(|special| ends_with_a_start_of(body, &special.text)) {
            out.push(self.mark);
        }
        out.push_str(blank);
        out
    }
}

fn ends_with_a_start_of(text: &str, special: &str) -> bool {
    let special = special.as_bytes();
    (1..special.len()).any(|n| text.as_bytes().ends_with(&special[..n]))
}

fn begins_with_an_end_of(text: &str, special: &str) -> bool {
    let special = special.as_bytes();
    (1..special.len()).any(|n| text.as_bytes().starts_with(&special[n..]))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn specials() -> Specials {
        let token = |text: &str| AddedToken::from(text, true);
        Specials::new([
            (1, token("<s>")),
            (2, token("<s>x")),
            (3, token("<l>").lstrip(true)),
            (4, token("<r>").rstrip(true)),
            (5, AddedToken::from("<plain>", false)),
        ])
    }

    #[test]
    fn rendered_text_is_cut_at_the_templates_tokens_only() {
        use Part::{Plain, Special};
        let plain = |text: &str| Plain(text.to_owned());
        let specials = specials();
        let table = [
            ("<s>", "a<s>b", "<s>", vec![Special(1), plain("a<s>b"), Special(1)]),
            // The longest of those that begin at one place.
            ("<s>x", "<s>", "<s>xy", vec![Special(2), plain("<s>"), Special(2), plain("y")]),
            ("<s>  ", "<r>", "  <l>", vec![Special(1), plain("  <r>"), Special(3)]),
            ("<r>  ", "<s>", "", vec![Special(4), plain("<s>")]),
            ("<plain>", "<s>", "", vec![plain("<plain><s>")]),
        ];
        for (before, text, after, expect) in table {
            let guard = Guard::new(&specials, [text].into_iter()).unwrap();
            let rendered = format!("{before}{}{after}", guard.protect(text));
            assert_eq!(guard.split(&rendered).unwrap(), expect, "{before}{text}{after}");
            assert_eq!(guard.n_bytes(&rendered), before.len() + text.len() + after.len());
        }
    }

    #[test]
    fn harmless_text_is_left_as_it_is() {
        let specials = specials();
        for text in ["", "hello", " hello ", "<b>", "a > b < c."] {
            let guard = Guard::new(&specials, [text].into_iter()).unwrap();
            assert_eq!(guard.protect(text), text);
            assert_eq!(guard.split(text), None);
        }
    }

    #[test]
    fn the_mark_is_a_character_that_nobody_wrote() {
        let specials = specials();
        let all: String = MARKS.clone().collect();
        assert!(Guard::new(&specials, [all.as_str()].into_iter()).is_none());
        let (last, others) = (*MARKS.end(), &all[..all.len() - MARKS.end().len_utf8()]);
        assert_eq!(Guard::new(&specials, [others].into_iter()).unwrap().mark, last);
    }
}
