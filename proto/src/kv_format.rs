//! How a group keeps keys and values: a choice that all its ranks must share.

use std::fmt;

use crate::worker as pb;

/// In the KV cache of every rank of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum KvFormat {
    #[default]
    F16,
    F32,
    /// With a scale for each token and KV head.
    Int8,
}

/// A format this build does not know.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0} is not a format of the KV cache; there are f16 (1), f32 (2) and int8 (3)")]
pub struct Unknown(pub String);

impl KvFormat {
    pub const ALL: [Self; 3] = [Self::F16, Self::F32, Self::Int8];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::F32 => "f32",
            Self::Int8 => "int8",
        }
    }

    /// Bytes of a token's keys and values, of `n_heads` KV heads over all layers, from what they
    /// would be in f16.
    #[must_use]
    pub fn bytes_per_token(self, in_f16: u64, n_heads: u64) -> u64 {
        /// Of a head's keys and its values: a scale each, f32.
        const SCALES: u64 = 8;
        match self {
            Self::F16 => in_f16,
            Self::F32 => in_f16.saturating_mul(2),
            Self::Int8 => (in_f16 / 2).saturating_add(n_heads.saturating_mul(SCALES)),
        }
    }

    /// By [`Self::name`]; no name means the default.
    ///
    /// # Errors
    /// A name of no format.
    pub fn parse(name: &str) -> Result<Self, Unknown> {
        if name.is_empty() {
            return Ok(Self::default());
        }
        let mut all = Self::ALL.into_iter();
        all.find(|format| format.name() == name).ok_or_else(|| Unknown(name.to_owned()))
    }

    /// # Errors
    /// A number of no format.
    pub fn from_wire(number: i32) -> Result<Self, Unknown> {
        match pb::KvFormat::try_from(number).map_err(|_| Unknown(number.to_string()))? {
            pb::KvFormat::Unspecified | pb::KvFormat::F16 => Ok(Self::F16),
            pb::KvFormat::F32 => Ok(Self::F32),
            pb::KvFormat::Int8 => Ok(Self::Int8),
        }
    }

    #[must_use]
    pub fn to_wire(self) -> i32 {
        match self {
            Self::F16 => pb::KvFormat::F16.into(),
            Self::F32 => pb::KvFormat::F32.into(),
            Self::Int8 => pb::KvFormat::Int8.into(),
        }
    }
}

impl fmt::Display for KvFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_survive_the_wire_and_none_means_f16() {
        for format in KvFormat::ALL {
            assert_eq!(KvFormat::from_wire(format.to_wire()), Ok(format));
            assert_eq!(KvFormat::parse(format.name()), Ok(format));
        }
        assert_eq!(KvFormat::from_wire(0), Ok(KvFormat::F16));
        assert_eq!(KvFormat::parse(""), Ok(KvFormat::F16));
        assert!(KvFormat::parse("f8").is_err());
        assert_eq!(KvFormat::from_wire(9), Err(Unknown("9".to_owned())));
    }

    #[test]
    fn a_token_takes_two_four_or_one_byte_and_scales() {
        // 2 layers, 3 KV heads of 64 columns.
        let in_f16 = 2 * 2 * 3 * 64 * 2;
        let bytes = |format: KvFormat| format.bytes_per_token(in_f16, 6);
        assert_eq!(bytes(KvFormat::F16), in_f16);
        assert_eq!(bytes(KvFormat::F32), 2 * in_f16);
        assert_eq!(bytes(KvFormat::Int8), 2 * 2 * 3 * (64 + 4));
    }
}
