//! The text of the kernels: what a model's are compiled from, by NVRTC for a card and by the host's
//! compiler for the emulator.

use crate::attention;
use crate::quant::Format;

const DEVICE: &str = include_str!("../../cuda/device.cuh");
const EMULATOR: &str = include_str!("../../cuda/emulator.hpp");

/// In the order in which they build on each other.
const KERNELS: [(&str, &str); 11] = [
    ("common.cuh", include_str!("../../cuda/common.cuh")),
    ("activations.cu", include_str!("../../cuda/activations.cu")),
    ("rows.cu", include_str!("../../cuda/rows.cu")),
    ("routing.cu", include_str!("../../cuda/routing.cu")),
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
    pub kv_format: attention::Format,
    /// Of weights.
    pub formats: Formats,
}

/// Weight formats that there shall be kernels for: each takes a second to compile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Formats(u16);

impl Formats {
    /// Each that is kept on a device.
    pub const EACH: [Format; 12] = {
        let [a, b, c, d, e, f, g, h, i, j, k] = Format::ALL;
        [a, b, c, d, e, f, g, h, i, j, k, Format::Fp8]
    };
    pub const ALL: Self = Self((1 << Self::EACH.len()) - 1);

    #[must_use]
    pub fn has(self, format: Format) -> bool {
        self.0 >> format as u16 & 1 == 1
    }
}

impl FromIterator<Format> for Formats {
    fn from_iter<I: IntoIterator<Item = Format>>(formats: I) -> Self {
        Self(formats.into_iter().fold(0, |all, format| all | 1 << format as u16))
    }
}

/// The most columns that a head may have: more would not fit a thread's registers.
pub const MAX_HEAD_DIM: usize = 256;

impl Shape {
    /// The definitions that say so to the compiler.
    #[must_use]
    pub fn definitions(&self) -> Vec<String> {
        let kv_format = match self.kv_format {
            attention::Format::F16 => 0,
            attention::Format::F32 => 1,
            attention::Format::Int8 => 2,
        };
        let mut definitions =
            vec![format!("-DHEAD_DIM={}", self.head_dim), format!("-DKV_FORMAT={kv_format}")];
        let formats = Formats::EACH.into_iter().filter(|&format| self.formats.has(format));
        definitions.extend(formats.map(|format| format!("-DHAS_{}", format.name())));
        definitions
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
