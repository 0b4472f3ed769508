//! Checked newtypes for what travels between processes: parse at the border, never check again.

use std::fmt;

/// Why a string or number is not an id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("{what} is empty")]
    Empty { what: &'static str },
    #[error("{what} has {len} characters; at most {max} are allowed")]
    TooLong { what: &'static str, len: usize, max: usize },
    #[error(
        "{what} `{text}` has the character {bad:?}; allowed are letters, digits and `.`, `_`, `-`, `:`"
    )]
    BadCharacter { what: &'static str, text: String, bad: char },
    #[error("epoch 0 does not exist; the first epoch is 1")]
    ZeroEpoch,
}

/// Longest id, in characters.
pub const MAX_ID_LEN: usize = 128;

fn check(what: &'static str, text: &str) -> Result<(), Error> {
    if text.is_empty() {
        return Err(Error::Empty { what });
    }
    let len = text.chars().count();
    if len > MAX_ID_LEN {
        return Err(Error::TooLong { what, len, max: MAX_ID_LEN });
    }
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | ':');
    match text.chars().find(|&c| !allowed(c)) {
        Some(bad) => Err(Error::BadCharacter { what, text: text.to_owned(), bad }),
        None => Ok(()),
    }
}

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(String);

        impl $name {
            /// Parses an id.
            ///
            /// # Errors
            /// Empty, longer than [`MAX_ID_LEN`], or a character that could not stand in a registry
            /// key.
            pub fn parse(text: &str) -> Result<Self, Error> {
                check($what, text)?;
                Ok(Self(text.to_owned()))
            }

            /// The id as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

text_id!(
    /// One worker process, for as long as it lives.
    WorkerId,
    "worker id"
);
text_id!(
    /// One wanted copy of a model; it outlives its epochs.
    GroupId,
    "group id"
);
text_id!(
    /// The name a model is served under.
    ModelName,
    "model name"
);

/// Number of a group's life, never reused, from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Epoch(u64);

impl Epoch {
    /// # Errors
    /// Zero.
    pub fn parse(n: u64) -> Result<Self, Error> {
        if n == 0 { Err(Error::ZeroEpoch) } else { Ok(Self(n)) }
    }

    #[must_use]
    pub fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_could_break_a_key_are_refused() {
        for bad in ["", "a/b", "a b", "ü", &"x".repeat(MAX_ID_LEN + 1)] {
            assert!(WorkerId::parse(bad).is_err(), "{bad:?} was accepted");
        }
        assert_eq!(
            ModelName::parse("SmolLM2-135M-Instruct.Q4_1").expect("valid").as_str(),
            "SmolLM2-135M-Instruct.Q4_1"
        );
    }

    #[test]
    fn epoch_zero_is_refused() {
        assert_eq!(Epoch::parse(0), Err(Error::ZeroEpoch));
        assert_eq!(Epoch::parse(7).expect("valid").get(), 7);
    }
}
