//! What is asked: prompts of seeded words, alone, behind a common beginning, or as the turns of
//! conversations. Pure: session `n` of a seed is always the same text.

use clap::ValueEnum;
use serde::Serialize;

use super::random::Random;

/// Stream of random numbers of the common beginning; sessions use theirs from 0.
const PREFIX_STREAM: u64 = u64::MAX - 1;
/// Words that are one token, with the space before them, for most tokenizers.
const WORDS: [&str; 64] = [
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "student",
    "group",
    "country",
    "problem",
    "hand",
    "part",
    "place",
    "case",
    "week",
    "company",
    "system",
    "program",
    "question",
    "work",
    "government",
    "number",
    "night",
    "point",
    "home",
    "water",
    "room",
    "mother",
    "area",
    "money",
    "story",
    "fact",
    "month",
    "lot",
    "right",
    "study",
    "book",
    "eye",
    "job",
    "word",
    "business",
    "issue",
    "side",
    "kind",
    "head",
    "house",
    "service",
    "friend",
    "father",
    "power",
    "hour",
    "game",
    "line",
    "end",
    "member",
    "law",
];

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Every prompt is another.
    Random,
    /// All prompts begin alike.
    SharedPrefix,
    /// Turns that each bring all that was said before.
    Conversation,
}

/// Sizes in words: how many make a token is measured at the endpoint.
#[derive(Debug, Clone, Copy)]
pub struct Traffic {
    pub kind: Kind,
    pub seed: u64,
    /// Of a prompt; in a conversation, what each turn adds.
    pub n_words: usize,
    /// Of them, the common beginning.
    pub n_prefix_words: usize,
    /// Requests of a conversation.
    pub n_turns: usize,
}

impl Traffic {
    /// Requests of each session.
    pub fn n_turns(&self) -> usize {
        match self.kind {
            Kind::Random | Kind::SharedPrefix => 1,
            Kind::Conversation => self.n_turns,
        }
    }

    /// What is said in each turn of session `nth`. A prompt is all turns up to it, with the answers
    /// between them.
    pub fn session(&self, nth: u64) -> Vec<String> {
        let mut random = Random::new(self.seed, nth);
        if self.kind == Kind::SharedPrefix {
            let n_prefix = self.n_prefix_words.min(self.n_words);
            let mut text = words(&mut Random::new(self.seed, PREFIX_STREAM), n_prefix);
            text.push_str(&words(&mut random, self.n_words - n_prefix));
            return vec![text];
        }
        (0..self.n_turns()).map(|_| words(&mut random, self.n_words)).collect()
    }
}

/// `n` words, each behind a space.
pub fn words(random: &mut Random, n: usize) -> String {
    let mut text = String::with_capacity(n * 8);
    for _ in 0..n {
        text.push(' ');
        text.push_str(WORDS[(random.next() % WORDS.len() as u64) as usize]);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn traffic(kind: Kind, seed: u64) -> Traffic {
        Traffic { kind, seed, n_words: 20, n_prefix_words: 12, n_turns: 3 }
    }

    fn n_common_words(a: &str, b: &str) -> usize {
        a.split(' ').zip(b.split(' ')).skip(1).take_while(|(a, b)| a == b).count()
    }

    #[test]
    fn sessions_have_their_size_and_repeat_with_their_seed() {
        for (kind, n_turns) in [(Kind::Random, 1), (Kind::SharedPrefix, 1), (Kind::Conversation, 3)]
        {
            let session = traffic(kind, 1).session(5);
            assert_eq!(session.len(), n_turns);
            assert!(session.iter().all(|turn| turn.split_whitespace().count() == 20));
            assert_eq!(session, traffic(kind, 1).session(5));
            assert_ne!(session, traffic(kind, 2).session(5));
            assert_ne!(session, traffic(kind, 1).session(6));
        }
    }

    #[test]
    fn only_shared_prefixes_are_shared() {
        for (kind, least, most) in [(Kind::Random, 0, 4), (Kind::SharedPrefix, 12, 16)] {
            let traffic = traffic(kind, 3);
            let n = n_common_words(&traffic.session(0)[0], &traffic.session(1)[0]);
            assert!((least..=most).contains(&n), "{kind:?} begin with {n} common words");
        }
    }
}
