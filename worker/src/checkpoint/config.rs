//! GGUF metadata to [`ModelConfig`]. What Evener does not know is refused by name, never guessed.

use crate::model::config::{self, Experts, Family, ModelConfig, Rope, RopePairs};

use super::gguf::Gguf;
use super::metadata::{self, Metadata, required};

/// Why the metadata describe no model that can be served.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Metadata(#[from] metadata::Error),
    #[error(
        "architecture `{got}` is not supported; supported: llama (Llama, Mistral, Mixtral, SmolLM2)"
    )]
    Architecture { got: String },
    #[error("{what} is not supported: {key} is {got}; supported: {supported}")]
    Unsupported { what: &'static str, key: String, got: String, supported: &'static str },
    #[error("tensor `{tensor}`: {what} is not supported")]
    UnsupportedTensor { tensor: String, what: &'static str },
    #[error("{key} is {got}, but the rest of the file says {expected}")]
    Contradiction { key: String, got: u64, expected: u64 },
    #[error(transparent)]
    Shape(#[from] config::Error),
}

/// # Errors
/// A missing key, a value of the wrong type, or something that is not supported.
pub(super) fn read(gguf: &Gguf) -> Result<ModelConfig, Error> {
    let metadata = gguf.metadata();
    let key = "general.architecture";
    let architecture = required(key, metadata.string(key)?)?;
    let config = match architecture {
        "llama" => llama(gguf, metadata)?,
        got => return Err(Error::Architecture { got: super::fault::printable(got) }),
    };
    config.check()?;
    Ok(config)
}

fn llama(gguf: &Gguf, metadata: Metadata<'_>) -> Result<ModelConfig, Error> {
    let read = Reader { metadata, prefix: "llama" };
    refuse_unsupported(&read)?;
    let hidden = read.size("embedding_length")?;
    let n_heads = read.size("attention.head_count")?;
    let n_kv_heads = read.optional("attention.head_count_kv")?.unwrap_or(n_heads);
    let head_dim = head_dim(&read, hidden, n_heads)?;
    let experts = experts(gguf, &read)?;
    refuse_tensors(gguf, experts.is_some())?;
    Ok(ModelConfig {
        family: if experts.is_some() { Family::Mixtral } else { Family::Llama },
        hidden,
        n_layers: read.size("block_count")?,
        n_heads,
        n_kv_heads,
        head_dim,
        ffn: read.size("feed_forward_length")?,
        vocab: vocab(gguf, &read)?,
        context_length: read.size("context_length")?,
        norm_eps: read.float("attention.layer_norm_rms_epsilon")?,
        rope: Rope {
            theta: read.optional_float("rope.freq_base")?.unwrap_or(10_000.0),
            dim: read.optional("rope.dimension_count")?.unwrap_or(head_dim),
            pairs: RopePairs::Adjacent,
        },
        tied_head: gguf.tensor("output.weight").is_none(),
        experts,
    })
}

/// Mixtral is a Llama with experts, in files too.
fn experts(gguf: &Gguf, read: &Reader<'_>) -> Result<Option<Experts>, Error> {
    let n = read.optional("expert_count")?.unwrap_or(0);
    if n == 0 {
        return Ok(None);
    }
    let n_used = read.size("expert_used_count")?;
    let are_stacked = gguf.tensor("blk.0.ffn_gate_exps.weight").is_some();
    Ok(Some(Experts { n, n_used, are_stacked }))
}

/// Metadata that would change the numbers of a Llama model in ways that are not implemented.
fn refuse_unsupported(read: &Reader<'_>) -> Result<(), Error> {
    let unsupported = |what, name: &str, got: String, supported| {
        Err(Error::Unsupported { what, key: read.key(name), got, supported })
    };
    let name = "rope.scaling.type";
    if let Some(got) = read.metadata.string(&read.key(name))?
        && got != "none"
    {
        let got = super::fault::printable(got);
        return unsupported("rope scaling", name, got, "none");
    }
    for name in ["rope.scale_linear", "rope.scaling.factor"] {
        if let Some(got) = read.optional_float(name)?
            && got != 1.0
        {
            return unsupported("rope scaling", name, got.to_string(), "1");
        }
    }
    for name in ["expert_shared_count", "expert_group_count", "leading_dense_block_count"] {
        if let Some(got) = read.optional(name)?
            && got > 0
        {
            return unsupported("this mixture of experts", name, got.to_string(), "0");
        }
    }
    let name = "expert_weights_scale";
    if let Some(got) = read.optional_float(name)?
        && got != 0.0
        && got != 1.0
    {
        return unsupported("a scale of experts", name, got.to_string(), "1");
    }
    let name = "expert_gating_func";
    if let Some(got) = read.optional(name)?
        && got > 1
    {
        return unsupported("this choice of experts", name, got.to_string(), "1, a softmax");
    }
    let name = "attention.sliding_window";
    if let Some(got) = read.optional(name)?
        && got < read.size("context_length")?
    {
        return unsupported("a sliding window", name, got.to_string(), "full attention");
    }
    Ok(())
}

/// Tensors that a Llama program would not read although they change its numbers.
fn refuse_tensors(gguf: &Gguf, has_experts: bool) -> Result<(), Error> {
    for tensor in gguf.tensors() {
        let what = match tensor.name.as_str() {
            "rope_freqs.weight" => "rope scaling by frequency factors (Llama 3.1 and later)",
            name if name.ends_with(".bias") => "a bias",
            name if name.contains("_shexp.") => "an expert that all tokens take",
            name if !has_experts && (name.contains("_exps.") || name.contains("_gate_inp")) => {
                "a mixture of experts without expert_count"
            }
            _ => continue,
        };
        let tensor = super::fault::printable(&tensor.name);
        return Err(Error::UnsupportedTensor { tensor, what });
    }
    Ok(())
}

fn head_dim(read: &Reader<'_>, hidden: usize, n_heads: usize) -> Result<usize, Error> {
    if n_heads == 0 {
        return Err(config::Error::Zero { what: "head count", got: 0 }.into());
    }
    let Some(key_length) = read.optional("attention.key_length")? else {
        if !hidden.is_multiple_of(n_heads) {
            let (what, of) = ("hidden size", n_heads);
            return Err(config::Error::NotMultiple { what, got: hidden, of }.into());
        }
        return Ok(hidden / n_heads);
    };
    let value_length = read.optional("attention.value_length")?.unwrap_or(key_length);
    if value_length != key_length {
        return Err(Error::Unsupported {
            what: "a value size other than the key size",
            key: read.key("attention.value_length"),
            got: value_length.to_string(),
            supported: "the value of attention.key_length",
        });
    }
    Ok(key_length)
}

/// Rows of the embedding; what the metadata say must agree.
fn vocab(gguf: &Gguf, read: &Reader<'_>) -> Result<usize, Error> {
    let stated = read.optional("vocab_size")?;
    let rows = gguf.tensor("token_embd.weight").map(|tensor| tensor.shape[0]);
    match (stated, rows) {
        (Some(got), Some(rows)) if got != rows => Err(Error::Contradiction {
            key: read.key("vocab_size"),
            got: got as u64,
            expected: rows as u64,
        }),
        (Some(vocab), _) | (None, Some(vocab)) => Ok(vocab),
        (None, None) => Err(metadata::Error::Missing { key: read.key("vocab_size") }.into()),
    }
}

/// Reads the keys of one architecture.
struct Reader<'a> {
    metadata: Metadata<'a>,
    prefix: &'static str,
}

impl Reader<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.prefix)
    }

    fn size(&self, name: &str) -> Result<usize, Error> {
        Ok(required(&self.key(name), self.optional(name)?)?)
    }

    fn optional(&self, name: &str) -> Result<Option<usize>, Error> {
        let key = self.key(name);
        let value = self.metadata.unsigned(&key)?;
        let narrow = |value: u64| {
            usize::try_from(value).map_err(|_| metadata::Error::OutOfRange {
                key: key.clone(),
                got: value.to_string(),
                wanted: "a size",
            })
        };
        Ok(value.map(narrow).transpose()?)
    }

    fn float(&self, name: &str) -> Result<f32, Error> {
        Ok(required(&self.key(name), self.optional_float(name)?)?)
    }

    fn optional_float(&self, name: &str) -> Result<Option<f32>, Error> {
        Ok(self.metadata.float(&self.key(name))?)
    }
}
