//! Random blocks of weights: some MiB for each format and width, which tensors share, each from
//! another place on.
//!
//! Weights are spread by one over the square root of the columns, so that activations keep their
//! size from layer to layer. The same on every machine.

use evener_kernels::quant::Format;
use half::{bf16, f16};

use super::gguf::{ALIGNMENT, Tensor};
use crate::checkpoint::bytes::Piece;

/// About how long a pattern is: hundreds of tiles of any format, and more than a core's caches.
const PATTERN_BYTES: usize = 16 << 20;
/// Tensors begin this many units further into the pattern than the one before.
const STRIDE: usize = 29;

/// What a pattern holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Kind {
    format: Format,
    columns: usize,
    is_vector: bool,
}

/// The patterns of one model, each made when first asked for.
#[derive(Debug, Default)]
pub(super) struct Patterns {
    kinds: Vec<Kind>,
    bytes: Vec<Vec<u8>>,
}

impl Patterns {
    /// Where the data of the model's `index`-th tensor are.
    pub(super) fn piece(&mut self, index: usize, tensor: &Tensor) -> Piece {
        let Tensor { format, columns, is_vector, .. } = *tensor;
        let kind = Kind { format, columns, is_vector };
        let pattern = self.kinds.iter().position(|&known| known == kind).unwrap_or_else(|| {
            self.bytes.push(kind.bytes(self.kinds.len() as u64));
            self.kinds.push(kind);
            self.kinds.len() - 1
        });
        let unit = kind.unit();
        let n_units = self.bytes[pattern].len() / unit;
        Piece { pattern, first: index * STRIDE % n_units * unit, len: tensor.n_bytes() }
    }

    pub(super) fn into_bytes(self) -> Vec<Vec<u8>> {
        self.bytes
    }
}

impl Kind {
    /// Whole blocks and whole pages.
    fn unit(self) -> usize {
        let block = self.format.block_bytes();
        (1..).map(|n| n * ALIGNMENT).find(|bytes| bytes % block == 0).expect("at block * alignment")
    }

    fn bytes(self, seed: u64) -> Vec<u8> {
        let unit = self.unit();
        if self.is_vector {
            let n = (4 * self.columns).next_multiple_of(unit) / 4;
            let near_one = |random: u64| 1.0 + (random as f32 / u64::MAX as f32 - 0.5) / 8.0;
            return (0..n as u64).flat_map(|i| near_one(mix(seed, i)).to_le_bytes()).collect();
        }
        let mut bytes = vec![0; PATTERN_BYTES / unit * unit];
        let mut words = 0..;
        for chunk in bytes.chunks_mut(8) {
            let word = mix(seed, words.next().unwrap_or(u64::MAX)).to_le_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
        for block in bytes.chunks_exact_mut(self.format.block_bytes()) {
            tame(self.format, block, 1.0 / (self.columns as f32).sqrt());
        }
        bytes
    }
}

/// A counter's random number (Steele et al. 2014, SplitMix).
fn mix(seed: u64, counter: u64) -> u64 {
    let mut z = (seed << 48).wrapping_add(counter).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Makes a block of random bytes one of weights with this standard deviation. The divisors are
/// the deviations of the format's integers: of u - 8 over 0 to 15, of sc * u - 7.5 * mc, and so on.
fn tame(format: Format, block: &mut [u8], deviation: f32) {
    // A quarter up or down, so that scales differ; of two bytes that a scale overwrites.
    let vary = |at: [u8; 2]| 0.75 + f32::from(u16::from_le_bytes(at)) / 131_072.0;
    let number = || (f32::from(block_u16(block)) / 65_536.0 - 0.5) * 12f32.sqrt() * deviation;
    match format {
        Format::F32 => {
            let value = number().to_le_bytes();
            block.copy_from_slice(&value);
        }
        Format::F16 => block.copy_from_slice(&f16::from_f32(number()).to_le_bytes()),
        Format::Bf16 => block.copy_from_slice(&bf16::from_f32(number()).to_le_bytes()),
        Format::Q4_0 => scale(block, 0, deviation / 4.61, 0.0, &vary),
        Format::Q4_1 => scale(block, 0, deviation / 4.61, -7.5, &vary),
        Format::Q5_0 => scale(block, 0, deviation / 9.23, 0.0, &vary),
        Format::Q5_1 => scale(block, 0, deviation / 9.23, -15.5, &vary),
        Format::Q8_0 => scale(block, 0, deviation / 73.9, 0.0, &vary),
        Format::Q4K => scale(block, 0, deviation / 258.0, 7.5, &vary),
        Format::Q5K => scale(block, 0, deviation / 527.0, 15.5, &vary),
        Format::Q6K => {
            // Scales of -32 to 31: all 8 bits would make d too small for an f16 of full precision.
            block[192..208].iter_mut().for_each(|scale| *scale = (*scale as i8 >> 2) as u8);
            scale(block, 208, deviation / 341.0, 0.0, &vary);
        }
        Format::Fp8 => unreachable!("no file has it"),
    }
}

fn block_u16(block: &[u8]) -> u16 {
    u16::from_le_bytes([block[0], block[1]])
}

/// Writes an f16 scale at `at` and, if `min` is not 0, that many times it after it. Without a minimum
/// integers reach one further down than up, so every other scale is negative: even a small mean of all
/// weights would grow from layer to layer until all tokens were alike.
fn scale(block: &mut [u8], at: usize, d: f32, min: f32, vary: &dyn Fn([u8; 2]) -> f32) {
    let is_turned = min == 0.0 && block[at] & 1 == 1;
    let d = if is_turned { -d } else { d } * vary([block[at], block[at + 1]]);
    block[at..at + 2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    if min != 0.0 {
        block[at + 2..at + 4].copy_from_slice(&f16::from_f32(d * min).to_le_bytes());
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::checkpoint::dequantize::{dequantize, first_not_finite};

    #[test]
    fn weights_of_every_format_are_finite_and_spread_as_their_width_asks() {
        for format in Format::ALL {
            for columns in [256, 28_672] {
                let bytes = Kind { format, columns, is_vector: false }.bytes(3);
                let blocks = &bytes[..65_536 / format.block_len() * format.block_bytes()];
                assert_eq!(first_not_finite(format, blocks), None, "{format:?}");
                let mut values = vec![0.0; 65_536];
                dequantize(format, blocks, &mut values);
                let n = values.len() as f32;
                let mean = values.iter().sum::<f32>() / n;
                let square = values.iter().map(|v| v * v).sum::<f32>() / n;
                let spread = (square * columns as f32).sqrt();
                assert!((0.8..1.2).contains(&spread), "{format:?} {columns}: {spread}");
                assert!(mean.abs() < 0.03 * square.sqrt(), "{format:?} {columns}: {mean}");
            }
        }
    }

    #[test]
    fn tensors_of_one_kind_begin_at_different_places() {
        let mut patterns = Patterns::default();
        let tensor = |name: &str| Tensor::matrix(name.to_owned(), Format::Q4K, 16, 2048);
        let [a, b] = [patterns.piece(0, &tensor("a")), patterns.piece(1, &tensor("b"))];
        assert_eq!(a.pattern, b.pattern);
        assert_ne!(a.first, b.first);
        assert_eq!(patterns.into_bytes().len(), 1);
    }
}
