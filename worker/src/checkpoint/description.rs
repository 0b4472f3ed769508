//! What a checkpoint says about itself to those who never see a tensor: the coordinator, people.

use crate::model::config::ModelConfig;

use super::gguf::Gguf;
use super::tokenizer::{Token, Tokenizer};
use super::{Error, fingerprint};

/// Of a KV entry in f16, by which the formats of the KV cache are measured.
const KV_BYTES: u64 = 2;

/// Everything of a model that is not its weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// "llama", ...
    pub architecture: String,
    /// What the file calls its mixture of formats: "Q4_1", "Q4_K_M", ...; "FP8" of what is rounded.
    pub quantization: String,
    /// As stated in the file; empty if it states none.
    pub licence: String,
    /// A Hugging Face `tokenizer.json`.
    pub tokenizer_json: Vec<u8>,
    /// Jinja source.
    pub chat_template: Option<String>,
    pub bos: Option<Token>,
    pub eos: Option<Token>,
    /// Whether an encoded prompt starts with bos.
    pub add_bos: bool,
    /// Generation ends on any of these. Ascending.
    pub eos_token_ids: Vec<u32>,
    /// Tokens.
    pub context_length: usize,
    pub vocab: usize,
    pub n_layers: usize,
    pub n_heads: usize,
    pub n_kv_heads: usize,
    pub n_parameters: u64,
    /// Of the whole model, as it is kept.
    pub weight_bytes: u64,
    /// Of the whole model, over all layers, in f16.
    pub kv_bytes_per_token: u64,
    /// Hex; equal for equal files that are kept alike.
    pub fingerprint: String,
}

/// Control tokens that end a turn or a document wherever they exist, whatever the metadata name.
const END_TOKENS: [&str; 6] =
    ["<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>"];

/// # Errors
/// A tokenizer that cannot be served, or metadata of the wrong type.
pub(super) fn read(gguf: &Gguf, config: &ModelConfig) -> Result<Description, Error> {
    let metadata = gguf.metadata();
    let string = |key| metadata.string(key).map(|text| text.map(str::to_owned));
    let tokenizer = Tokenizer::read(metadata, config.vocab)?;
    let eos = tokenizer.named("eos_token_id")?;
    Ok(Description {
        architecture: string("general.architecture")?.unwrap_or_default(),
        quantization: quantization(gguf)?,
        licence: string("general.license")?.unwrap_or_default(),
        tokenizer_json: tokenizer.to_json(),
        chat_template: string("tokenizer.chat_template")?,
        bos: tokenizer.named("bos_token_id")?,
        add_bos: tokenizer.add_bos()?,
        eos_token_ids: eos_token_ids(&tokenizer, eos.as_ref())?,
        eos,
        context_length: config.context_length,
        vocab: config.vocab,
        n_layers: config.n_layers,
        n_heads: config.n_heads,
        n_kv_heads: config.n_kv_heads,
        n_parameters: gguf.tensors().iter().map(|t| (t.shape[0] * t.shape[1]) as u64).sum(),
        weight_bytes: gguf.tensors().iter().map(|t| t.bytes.len() as u64).sum(),
        kv_bytes_per_token: (2 * config.n_layers * config.n_kv_heads * config.head_dim) as u64
            * KV_BYTES,
        fingerprint: fingerprint::of(gguf),
    })
}

fn eos_token_ids(tokenizer: &Tokenizer<'_>, eos: Option<&Token>) -> Result<Vec<u32>, Error> {
    let mut ids: Vec<u32> = eos.iter().map(|token| token.id).collect();
    for name in ["eot_token_id", "eom_token_id"] {
        ids.extend(tokenizer.named(name)?.map(|token| token.id));
    }
    ids.extend(END_TOKENS.iter().filter_map(|text| tokenizer.control(text)));
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

/// ggml's file types (`llama.h`), by id; else the format that holds the most bytes.
fn quantization(gguf: &Gguf) -> Result<String, Error> {
    let stated = match gguf.metadata().unsigned("general.file_type")? {
        Some(0) => Some("F32"),
        Some(1) => Some("F16"),
        Some(2) => Some("Q4_0"),
        Some(3) => Some("Q4_1"),
        Some(7) => Some("Q8_0"),
        Some(8) => Some("Q5_0"),
        Some(9) => Some("Q5_1"),
        Some(14) => Some("Q4_K_S"),
        Some(15) => Some("Q4_K_M"),
        Some(16) => Some("Q5_K_S"),
        Some(17) => Some("Q5_K_M"),
        Some(18) => Some("Q6_K"),
        Some(32) => Some("BF16"),
        Some(_) | None => None,
    };
    let by_bytes = || {
        let bytes_of = |format| {
            gguf.tensors().iter().filter(|t| t.format == format).map(|t| t.bytes.len()).sum()
        };
        let most = evener_kernels::quant::Format::ALL
            .into_iter()
            .max_by_key(|&f| -> usize { bytes_of(f) });
        most.map_or("", evener_kernels::quant::Format::name)
    };
    Ok(stated.unwrap_or_else(by_bytes).to_owned())
}
