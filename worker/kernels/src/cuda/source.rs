//! The text of the kernels: what a model's are compiled from, by NVRTC for a card and by the host's
//! compiler for the emulator.

use crate::attention::Format;

const DEVICE: &str = include_str!("../../cuda/device.cuh");
const EMULATOR: &str = include_str!("../../cuda/emulator.hpp");

/// In the order in which they build on each other.
const KERNELS: [(&str, &str); 10] = [
    ("common.cuh", include_str!("../../cuda/common.cuh")),
    ("activations.cu", include_str!("../../cuda/activations.cu")),
    ("rows.cu", include_str!("../../cuda/rows.cu")),
    ("stream.cu", include_str!("../../cuda/stream.cu")),
    ("quantised.cu", include_str!("../../cuda/quantised.cu")),
    ("dense.cu", include_str!("../../cuda/dense.cu")),
    ("fp8.cu", include_str!("../../cuda/fp8.cu")),
    ("cache.cu", include_str!("../../cuda/cache.cu")),
    ("attention.cu", include_str!("../../cuda/attention.cu")),
    ("tiles.cu", include_str!("../../cuda/tiles.cu")),
];

/// What the kernels are compiled for, beside the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Columns of a head: a multiple of 32, up to [`MAX_HEAD_DIM`].
    pub head_dim: usize,
    pub kv_format: Format,
}

/// The most columns that a head may have: more would not fit a thread's registers.
pub const MAX_HEAD_DIM: usize = 256;

impl Shape {
    /// The definitions that say so to the compiler.
    #[must_use]
    pub fn definitions(&self) -> [String; 2] {
        let kv_format = match self.kv_format {
            Format::F16 => 0,
            Format::F32 => 1,
            Format::Int8 => 2,
        };
        [format!("-DHEAD_DIM={}", self.head_dim), format!("-DKV_FORMAT={kv_format}")]
    }
}

/// For NVRTC.
#[must_use]
pub fn for_cards() -> String {
    joined("device.cuh", DEVICE)
}

/// For a C++ compiler.
#[must_use]
pub fn for_emulator() -> String {
    joined("emulator.hpp", EMULATOR)
}

/// `#line` names the files in what compilers say.
fn joined(vocabulary: &str, text: &str) -> String {
    let mut source = format!("#line 1 \"{vocabulary}\"\n{text}");
    for (name, text) in KERNELS {
        source.push_str(&format!("#line 1 \"{name}\"\n{text}"));
    }
    source
}
