//! How finely a group's processors round what they multiply weights with: a choice that all its ranks
//! must share.

use std::fmt;

use crate::worker as pb;

/// Of the products of a group's CPU ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Activations {
    /// 12 bits with quantised weights, f32 with others.
    #[default]
    Int12,
    /// 8 bits with quantised weights, bf16 with those in bf16.
    Int8,
}

/// A rounding this build does not know.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0} is not a rounding of activations; there are int12 (1) and int8 (2)")]
pub struct Unknown(pub String);

impl Activations {
    pub const ALL: [Self; 2] = [Self::Int12, Self::Int8];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Int12 => "int12",
            Self::Int8 => "int8",
        }
    }

    /// By [`Self::name`]; no name means the default.
    ///
    /// # Errors
    /// A name of no rounding.
    pub fn parse(name: &str) -> Result<Self, Unknown> {
        if name.is_empty() {
            return Ok(Self::default());
        }
        let mut all = Self::ALL.into_iter();
        all.find(|rounding| rounding.name() == name).ok_or_else(|| Unknown(name.to_owned()))
    }

    /// # Errors
    /// A number of no rounding.
    pub fn from_wire(number: i32) -> Result<Self, Unknown> {
        match pb::Activations::try_from(number).map_err(|_| Unknown(number.to_string()))? {
            pb::Activations::Unspecified | pb::Activations::Int12 => Ok(Self::Int12),
            pb::Activations::Int8 => Ok(Self::Int8),
        }
    }

    #[must_use]
    pub fn to_wire(self) -> i32 {
        match self {
            Self::Int12 => pb::Activations::Int12.into(),
            Self::Int8 => pb::Activations::Int8.into(),
        }
    }
}

impl fmt::Display for Activations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roundings_survive_the_wire_and_none_means_twelve_bits() {
        for rounding in Activations::ALL {
            assert_eq!(Activations::from_wire(rounding.to_wire()), Ok(rounding));
            assert_eq!(Activations::parse(rounding.name()), Ok(rounding));
        }
        assert_eq!(Activations::from_wire(0), Ok(Activations::Int12));
        assert_eq!(Activations::parse(""), Ok(Activations::Int12));
        assert!(Activations::parse("int4").is_err());
        assert_eq!(Activations::from_wire(9), Err(Unknown("9".to_owned())));
    }
}
