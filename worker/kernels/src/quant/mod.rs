//! Weight formats: how a row of a checkpoint tensor is cut into blocks of bytes.

/// How the weights of a tensor are kept. Names, ids and layouts of what GGUF files have are ggml's
/// (`ggml.h`, `ggml-common.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4K,
    Q5K,
    Q6K,
    /// Of no file: [`fp8`].
    Fp8,
}

impl Format {
    /// All that files have, in reading order.
    pub const ALL: [Self; 11] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
    ];

    /// The format of a ggml type id, if Evener knows it.
    #[must_use]
    pub fn from_ggml(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.ggml_id() == Some(id))
    }

    /// None of what no file has.
    #[must_use]
    pub fn ggml_id(self) -> Option<u32> {
        Some(match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q5_0 => 6,
            Self::Q5_1 => 7,
            Self::Q8_0 => 8,
            Self::Q4K => 12,
            Self::Q5K => 13,
            Self::Q6K => 14,
            Self::Bf16 => 30,
            Self::Fp8 => return None,
        })
    }

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
            Self::Fp8 => "FP8",
        }
    }

    /// Weights of one block.
    #[must_use]
    pub fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 | Self::Fp8 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q4K | Self::Q5K | Self::Q6K => 256,
        }
    }

    /// Bytes of one block; of FP8 without the row's scale.
    #[must_use]
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
            Self::Fp8 => 1,
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
pub(crate) mod blocks;
pub mod fp8;
mod pack;
pub(crate) mod portable;
pub(crate) mod tiles;

mod q4_0;
mod q4_1;
mod q4_k;
mod q5_0;
mod q5_1;
mod q5_k;
mod q6_k;
mod q8_0;

pub(crate) use q4_0::Q4_0;
pub(crate) use q4_1::Q4_1;
pub(crate) use q4_k::Q4K;
pub(crate) use q5_0::Q5_0;
pub(crate) use q5_1::Q5_1;
pub(crate) use q5_k::Q5K;
pub(crate) use q6_k::Q6K;
pub(crate) use q8_0::Q8_0;

/// Runs one body for the [`blocks::Blocks`] of a format, or another for formats of floats.
macro_rules! with_blocks {
    ($format:expr, $B:ident => $body:expr, _ => $other:expr) => {
        match $format {
            $crate::quant::Format::Q4_0 => {
                type $B = $crate::quant::Q4_0;
                $body
            }
            $crate::quant::Format::Q4_1 => {
                type $B = $crate::quant::Q4_1;
                $body
            }
            $crate::quant::Format::Q5_0 => {
                type $B = $crate::quant::Q5_0;
                $body
            }
            $crate::quant::Format::Q5_1 => {
                type $B = $crate::quant::Q5_1;
                $body
            }
            $crate::quant::Format::Q8_0 => {
                type $B = $crate::quant::Q8_0;
                $body
            }
            $crate::quant::Format::Q4K => {
                type $B = $crate::quant::Q4K;
                $body
            }
            $crate::quant::Format::Q5K => {
                type $B = $crate::quant::Q5K;
                $body
            }
            $crate::quant::Format::Q6K => {
                type $B = $crate::quant::Q6K;
                $body
            }
            $crate::quant::Format::F32
            | $crate::quant::Format::F16
            | $crate::quant::Format::Bf16
            | $crate::quant::Format::Fp8 => $other,
        }
    };
}
pub(crate) use with_blocks;
