//! Models of random weights, named instead of stored: `synthetic:llama-1b:q4_k`. For measuring and
//! tests, wherever a model file may stand.
//!
//! The bytes are a GGUF file's and go through the same checks; only they lie in memory, and blocks
//! of weights repeat every few MiB, so that a model of any size exists at once.

mod gguf;
mod pattern;

use std::fmt;
use std::str::FromStr;

use evener_kernels::quant::Format;

use super::Kept;
use super::bytes::{FileBytes, Piece};
use gguf::{Tensor, Writer};
use pattern::Patterns;

/// How every such name begins.
pub const SCHEME: &str = "synthetic:";

/// Bytes that every token can be written with, after two control tokens.
const N_BYTE_TOKENS: usize = 256;
const CONTROL_TOKENS: [&str; 2] = ["<|begin|>", "<|end|>"];
/// Tokens of one sequence at most; enough for measuring long contexts.
const CONTEXT_LENGTH: usize = 16_384;

/// The sizes of a Llama or Mixtral model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shape {
    pub name: &'static str,
    pub hidden: usize,
    pub n_layers: usize,
    pub n_heads: usize,
    pub n_kv_heads: usize,
    pub head_dim: usize,
    pub ffn: usize,
    /// At least 258: the bytes and two control tokens.
    pub vocab: usize,
    pub rope_theta: f32,
    /// How many, and how many a token takes.
    pub experts: Option<(usize, usize)>,
}

impl Shape {
    /// What can be asked for by name. All have a head of their own.
    pub const ALL: [Self; 6] = [
        Self {
            name: "llama-tiny",
            hidden: 256,
            n_layers: 2,
            n_heads: 4,
            n_kv_heads: 2,
            head_dim: 64,
            ffn: 512,
            vocab: 512,
            rope_theta: 10_000.0,
            experts: None,
        },
        Self {
            name: "llama-1b",
            hidden: 2048,
            n_layers: 16,
            n_heads: 32,
            n_kv_heads: 8,
            head_dim: 64,
            ffn: 8192,
            vocab: 49_152,
            rope_theta: 10_000.0,
            experts: None,
        },
        Self {
            name: "llama-8b",
            hidden: 4096,
            n_layers: 32,
            n_heads: 32,
            n_kv_heads: 8,
            head_dim: 128,
            ffn: 14_336,
            vocab: 128_256,
            rope_theta: 500_000.0,
            experts: None,
        },
        Self {
            name: "llama-70b",
            hidden: 8192,
            n_layers: 80,
            n_heads: 64,
            n_kv_heads: 8,
            head_dim: 128,
            ffn: 28_672,
            vocab: 128_256,
            rope_theta: 500_000.0,
            experts: None,
        },
        Self {
            name: "mixtral-tiny",
            hidden: 256,
            n_layers: 2,
            n_heads: 4,
            n_kv_heads: 2,
            head_dim: 64,
            ffn: 512,
            vocab: 512,
            rope_theta: 10_000.0,
            experts: Some((4, 2)),
        },
        Self {
            name: "mixtral-8x7b",
            hidden: 4096,
            n_layers: 32,
            n_heads: 32,
            n_kv_heads: 8,
            head_dim: 128,
            ffn: 14_336,
            vocab: 32_000,
            rope_theta: 1_000_000.0,
            experts: Some((8, 2)),
        },
    ];
}

/// The formats of a model's matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mix {
    /// All in one that files have.
    Plain(Format),
    /// BF16, of which the layers are kept in FP8.
    Fp8,
    /// As llama.cpp mixes Q4_K_M: Q4_K, but Q6_K for the head, the first and last eighth of the
    /// layers' attn_v and ffn_down and every third between.
    Q4KM,
}

/// A synthetic model, as its name says.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spec {
    pub shape: Shape,
    pub mix: Mix,
    /// At most the shape's own; fewer where memory does not hold them.
    pub n_layers: usize,
}

/// Why a name means no synthetic model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("`{got}` is not synthetic:SHAPE:FORMAT or synthetic:SHAPE:FORMAT:LAYERS")]
    Form { got: String },
    #[error("`{got}` is no synthetic shape; there are {}", shapes())]
    Shape { got: String },
    #[error("`{got}` is no format of a synthetic model; there are {}", formats())]
    Format { got: String },
    #[error("`{got}` layers of {shape} cannot be; it has 1 to {max}")]
    Layers { got: String, shape: &'static str, max: usize },
}

fn shapes() -> String {
    Shape::ALL.map(|shape| shape.name).join(", ")
}

fn formats() -> String {
    Mix::all().map(|mix| mix.to_string()).collect::<Vec<_>>().join(", ")
}

impl Mix {
    /// All that can be asked for by name.
    pub fn all() -> impl Iterator<Item = Self> {
        Format::ALL.into_iter().map(Self::Plain).chain([Self::Fp8, Self::Q4KM])
    }

    fn of_layer(self, name: &str, layer: usize, n_layers: usize) -> Format {
        match self {
            Self::Plain(format) => format,
            Self::Fp8 => Format::Bf16,
            Self::Q4KM => {
                let eighth = n_layers / 8;
                let is_more = layer < eighth
                    || layer >= 7 * n_layers / 8
                    || (layer - eighth.min(layer)) % 3 == 2;
                let is_sensitive = matches!(name, "attn_v" | "ffn_down");
                if is_more && is_sensitive { Format::Q6K } else { Format::Q4K }
            }
        }
    }

    fn of_head(self) -> Format {
        match self {
            Self::Plain(format) => format,
            Self::Fp8 => Format::Bf16,
            Self::Q4KM => Format::Q6K,
        }
    }

    fn of_table(self) -> Format {
        match self {
            Self::Plain(format) => format,
            Self::Fp8 => Format::Bf16,
            Self::Q4KM => Format::Q4K,
        }
    }

    /// What becomes of its weights when they are loaded.
    pub(super) fn kept(self) -> Kept {
        match self {
            Self::Fp8 => Kept::Fp8,
            Self::Plain(_) | Self::Q4KM => Kept::AsStored,
        }
    }

    /// llama.cpp's id of a file of this mixture, if it has one that says no more.
    fn file_type(self) -> Option<u32> {
        match self {
            Self::Q4KM => Some(15),
            Self::Plain(Format::F32) => Some(0),
            Self::Plain(Format::F16) => Some(1),
            Self::Plain(Format::Q4_0) => Some(2),
            Self::Plain(Format::Q4_1) => Some(3),
            Self::Plain(Format::Q8_0) => Some(7),
            Self::Plain(Format::Q5_0) => Some(8),
            Self::Plain(Format::Q5_1) => Some(9),
            Self::Plain(Format::Q6K) => Some(18),
            Self::Plain(Format::Bf16) | Self::Fp8 => Some(32),
            Self::Plain(Format::Q4K | Format::Q5K | Format::Fp8) => None,
        }
    }
}

impl fmt::Display for Mix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain(format) => f.write_str(&format.name().to_lowercase()),
            Self::Fp8 => f.write_str("fp8"),
            Self::Q4KM => f.write_str("q4_k_m"),
        }
    }
}

impl FromStr for Mix {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let same = |mix: &Self| mix.to_string().eq_ignore_ascii_case(text);
        Self::all().find(same).ok_or_else(|| Error::Format { got: text.to_owned() })
    }
}

impl FromStr for Shape {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let found = Self::ALL.into_iter().find(|shape| shape.name.eq_ignore_ascii_case(text));
        found.ok_or_else(|| Error::Shape { got: text.to_owned() })
    }
}

/// `synthetic:llama-8b:q4_k:12`; without layers, all of them.
impl FromStr for Spec {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let form = || Error::Form { got: text.to_owned() };
        let parts: Vec<&str> = text.strip_prefix(SCHEME).ok_or_else(form)?.split(':').collect();
        let (shape, mix, layers) = match parts.as_slice() {
            [shape, mix] => (shape, mix, None),
            [shape, mix, layers] => (shape, mix, Some(layers)),
            _ => return Err(form()),
        };
        let shape: Shape = shape.parse()?;
        let max = shape.n_layers;
        let n_layers = match layers {
            None => max,
            Some(got) => got
                .parse()
                .ok()
                .filter(|n| (1..=max).contains(n))
                .ok_or_else(|| Error::Layers { got: (*got).to_owned(), shape: shape.name, max })?,
        };
        Ok(Self { shape, mix: mix.parse()?, n_layers })
    }
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}:{}", self.shape.name, self.mix)?;
        if self.n_layers == self.shape.n_layers { Ok(()) } else { write!(f, ":{}", self.n_layers) }
    }
}

impl Spec {
    /// Bytes of all its tensors.
    #[must_use]
    pub fn weight_bytes(&self) -> u64 {
        self.tensors().iter().map(|tensor| tensor.n_bytes() as u64).sum()
    }

    /// The bytes that a file of it would have.
    ///
    /// # Errors
    /// The system has no memory or address space for it.
    pub(super) fn bytes(&self) -> std::io::Result<FileBytes> {
        let mut writer = Writer::default();
        self.put_metadata(&mut writer);
        let tensors = self.tensors();
        let head = writer.finish(&tensors);
        let mut patterns = Patterns::default();
        let pieces: Vec<Piece> =
            tensors.iter().enumerate().map(|(i, tensor)| patterns.piece(i, tensor)).collect();
        FileBytes::repeated(&head, &patterns.into_bytes(), &pieces)
    }

    fn put_metadata(&self, writer: &mut Writer) {
        let shape = &self.shape;
        writer.string("general.architecture", "llama");
        writer.string("general.name", &format!("{} of random weights", shape.name));
        if let Some(id) = self.mix.file_type() {
            writer.u32("general.file_type", id);
        }
        writer.u32("general.alignment", gguf::ALIGNMENT as u32);
        let sizes = [
            ("llama.block_count", self.n_layers),
            ("llama.context_length", CONTEXT_LENGTH),
            ("llama.embedding_length", shape.hidden),
            ("llama.feed_forward_length", shape.ffn),
            ("llama.attention.head_count", shape.n_heads),
            ("llama.attention.head_count_kv", shape.n_kv_heads),
            ("llama.attention.key_length", shape.head_dim),
            ("llama.attention.value_length", shape.head_dim),
            ("llama.rope.dimension_count", shape.head_dim),
            ("llama.vocab_size", shape.vocab),
        ];
        sizes.into_iter().for_each(|(key, size)| writer.u32(key, size as u32));
        if let Some((n, n_used)) = shape.experts {
            writer.u32("llama.expert_count", n as u32);
            writer.u32("llama.expert_used_count", n_used as u32);
        }
        writer.f32("llama.attention.layer_norm_rms_epsilon", 1e-5);
        writer.f32("llama.rope.freq_base", shape.rope_theta);
        self.put_tokenizer(writer);
    }

    /// Two control tokens, a token for each byte, a merge, and words nobody types. Nothing ends an
    /// answer but its length.
    fn put_tokenizer(&self, writer: &mut Writer) {
        let mut tokens: Vec<String> = CONTROL_TOKENS.map(str::to_owned).into();
        tokens.extend(byte_texts());
        tokens.push("he".to_owned());
        tokens.extend((tokens.len()..self.shape.vocab).map(|id| format!("\u{120}w{id}")));
        tokens.truncate(self.shape.vocab);
        let is_control = |id: usize| id < CONTROL_TOKENS.len();
        let types: Vec<i32> =
            (0..tokens.len()).map(|id| if is_control(id) { 3 } else { 1 }).collect();
        writer.string("tokenizer.ggml.model", "gpt2");
        writer.string("tokenizer.ggml.pre", "gpt-2");
        writer.strings("tokenizer.ggml.tokens", &tokens);
        writer.i32s("tokenizer.ggml.token_type", &types);
        writer.strings("tokenizer.ggml.merges", &["h e".to_owned()]);
        writer.u32("tokenizer.ggml.bos_token_id", 0);
        writer.bool("tokenizer.ggml.add_bos_token", false);
    }

    fn tensors(&self) -> Vec<Tensor> {
        let Shape { hidden, n_heads, n_kv_heads, head_dim, ffn, vocab, .. } = self.shape;
        let (q, kv) = (n_heads * head_dim, n_kv_heads * head_dim);
        let mut tensors =
            vec![Tensor::matrix("token_embd".to_owned(), self.mix.of_table(), vocab, hidden)];
        for layer in 0..self.n_layers {
            tensors.push(Tensor::vector(format!("blk.{layer}.attn_norm"), hidden));
            tensors.push(Tensor::vector(format!("blk.{layer}.ffn_norm"), hidden));
            let n_experts = self.shape.experts.map(|(n, _)| n);
            if let Some(n) = n_experts {
                let name = format!("blk.{layer}.ffn_gate_inp");
                tensors.push(Tensor::matrix(name, Format::F32, n, hidden));
            }
            // Experts lie below each other.
            let (suffix, n) = n_experts.map_or(("", 1), |n| ("_exps", n));
            let shapes = [
                ("attn_q", "", 1, q, hidden),
                ("attn_k", "", 1, kv, hidden),
                ("attn_v", "", 1, kv, hidden),
                ("attn_output", "", 1, hidden, q),
                ("ffn_gate", suffix, n, ffn, hidden),
                ("ffn_up", suffix, n, ffn, hidden),
                ("ffn_down", suffix, n, hidden, ffn),
            ];
            for (name, suffix, n, rows, columns) in shapes {
                let format = self.mix.of_layer(name, layer, self.n_layers);
                let name = format!("blk.{layer}.{name}{suffix}");
                tensors.push(Tensor::stack(name, format, n, n * rows, columns));
            }
        }
        tensors.push(Tensor::vector("output_norm".to_owned(), hidden));
        tensors.push(Tensor::matrix("output".to_owned(), self.mix.of_head(), vocab, hidden));
        tensors
    }
}

/// The printable characters that byte-level BPE writes bytes as, in byte order.
fn byte_texts() -> impl Iterator<Item = String> {
    let mut next = 256;
    (0..N_BYTE_TOKENS as u32).map(move |byte| {
        let is_printable = matches!(byte, 33..=126 | 161..=172 | 174..=255);
        let code = if is_printable { byte } else { next };
        next += u32::from(!is_printable);
        char::from_u32(code).expect("codes below 512 are characters").to_string()
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_written_as_it_is_read() {
        for name in ["synthetic:llama-1b:q4_k", "synthetic:llama-70b:q4_k_m:3"] {
            assert_eq!(name.parse::<Spec>().unwrap().to_string(), name);
        }
        let all: Spec = "synthetic:LLAMA-1B:Q4_0:16".parse().unwrap();
        assert_eq!(all.to_string(), "synthetic:llama-1b:q4_0");
    }

    #[test]
    fn what_a_name_cannot_mean_is_refused_with_what_it_could() {
        let error = |name: &str| name.parse::<Spec>().unwrap_err().to_string();
        assert!(error("synthetic:llama-1b").contains("SHAPE:FORMAT:LAYERS"));
        assert!(
            error("synthetic:gpt:q4_k")
                .contains("llama-tiny, llama-1b, llama-8b, llama-70b, mixtral-tiny")
        );
        assert!(error("synthetic:llama-1b:q3").contains("q4_k_m"));
        assert!(error("synthetic:llama-1b:q4_k:17").contains("1 to 16"));
        assert!(error("synthetic:llama-1b:q4_k:0").contains("1 to 16"));
    }

    #[test]
    fn the_mixture_gives_more_bits_to_half_of_the_sensitive_tensors() {
        let spec: Spec = "synthetic:llama-1b:q4_k_m".parse().unwrap();
        let more = spec.tensors().iter().filter(|t| t.format == Format::Q6K).count();
        assert_eq!(more, 2 * 8 + 1);
    }
}
