//! How a rank keeps the weights of a file: as they are, or rounded while they are loaded.

use std::fmt;

use evener_kernels::quant::Format;
use sha2::{Digest, Sha256};

use super::gguf::TensorInfo;
use crate::model::program::Role;

/// Bytes of a row's scale in FP8.
const SCALE_BYTES: usize = 4;

/// What becomes of weights when they are loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Kept {
    #[default]
    AsStored,
    /// Matrices in floats are rounded to e4m3, with a scale for each row
    /// ([`evener_kernels::quant::fp8`]). Embedding and head stay as they are.
    Fp8,
}

impl Kept {
    /// What a rank keeps of a tensor that has this role.
    pub(super) fn format_of(self, stored: Format, role: Role) -> Format {
        let is_float = matches!(stored, Format::F32 | Format::F16 | Format::Bf16);
        match self {
            Self::Fp8 if is_float && role == Role::Matrix => Format::Fp8,
            Self::Fp8 | Self::AsStored => stored,
        }
    }

    /// Of the model made of a file with this fingerprint: ranks of a group must keep the same.
    pub(super) fn fingerprint(self, of_file: &str) -> String {
        match self {
            Self::AsStored => of_file.to_owned(),
            Self::Fp8 => {
                let hash = Sha256::new().chain_update(of_file).chain_update(self.to_string());
                hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
            }
        }
    }
}

impl fmt::Display for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AsStored => "as stored",
            Self::Fp8 => "fp8",
        })
    }
}

/// Bytes of a whole tensor that is kept in a format.
pub(super) fn bytes_in(format: Format, tensor: &TensorInfo) -> usize {
    let [rows, columns] = tensor.shape;
    if format == tensor.format { tensor.bytes.len() } else { rows * row_bytes(format, columns) }
}

/// Bytes of a row that is made at load.
pub(super) fn row_bytes(format: Format, columns: usize) -> usize {
    let scale = if format == Format::Fp8 { SCALE_BYTES } else { 0 };
    columns / format.block_len() * format.block_bytes() + scale
}
