//! GGUF tokenizer metadata to a Hugging Face `tokenizer.json`, which the coordinator reads. It
//! encodes nothing itself.
//!
//! Byte-level BPE (Radford et al. 2019, GPT-2, section 2.2) with the pre-tokenizers listed below;
//! the file adds no tokens on its own: whether a prompt starts with bos is said beside it.

use std::collections::HashMap;

use serde::{Serialize, Serializer};
use serde_json::{Value, json};

use super::fault::printable;
use super::metadata::{self, Metadata, required};

/// Why the tokenizer cannot be served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Metadata(#[from] metadata::Error),
    #[error("tokenizer model `{got}` is not supported; supported: gpt2 (byte-level BPE)")]
    Model { got: String },
    #[error(
        "pre-tokenizer `{got}` is not supported; supported: default, gpt-2, smollm, llama-bpe, \
         qwen2"
    )]
    Pre { got: String },
    #[error("tokenizer.ggml.tokens: {got} tokens; the model has rows for {vocab}")]
    TooManyTokens { got: usize, vocab: usize },
    #[error("tokenizer.ggml.tokens: tokens {first} and {second} are both `{text}`")]
    DuplicateToken { first: u32, second: u32, text: String },
    #[error("tokenizer.ggml.token_type: {got} types for {expected} tokens")]
    TypeCount { got: usize, expected: usize },
    #[error("tokenizer.ggml.token_type: token {id} has type {got}, which is not supported")]
    TokenType { id: u32, got: i64 },
    #[error("tokenizer.ggml.merges: merge {index} `{text}` {what}")]
    Merge { index: usize, text: String, what: &'static str },
    #[error("{key} is {id}; there are {n_tokens} tokens")]
    TokenId { key: String, id: u64, n_tokens: usize },
}

/// ggml's token types, as far as they occur in byte-level BPE.
const UNKNOWN: i64 = 2;
const NORMAL: i64 = 1;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;
const UNUSED: i64 = 5;

/// A token's id and text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    pub id: u32,
    pub text: String,
}

/// What the metadata say about tokens, checked.
pub(super) struct Tokenizer<'a> {
    tokens: Vec<&'a str>,
    types: Vec<i64>, // as many as tokens
    ids: HashMap<&'a str, u32>,
    merges: Vec<(&'a str, &'a str)>,
    pre: Pre,
    metadata: Metadata<'a>,
}

/// How text is cut into words before merges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pre {
    Gpt2,
    SmolLm,
    Llama3,
    Qwen2,
}

impl<'a> Tokenizer<'a> {
    /// # Errors
    /// What is missing, contradictory or not supported.
    pub(super) fn read(metadata: Metadata<'a>, vocab: usize) -> Result<Self, Error> {
        let key = "tokenizer.ggml.model";
        let model = required(key, metadata.string(key)?)?;
        if model != "gpt2" {
            return Err(Error::Model { got: printable(model) });
        }
        let pre = match metadata.string("tokenizer.ggml.pre")? {
            None | Some("default" | "gpt-2") => Pre::Gpt2,
            Some("smollm") => Pre::SmolLm,
            Some("llama-bpe" | "llama3" | "llama-v3") => Pre::Llama3,
            Some("qwen2") => Pre::Qwen2,
            Some(got) => return Err(Error::Pre { got: printable(got) }),
        };
        let key = "tokenizer.ggml.tokens";
        let tokens = required(key, metadata.strings(key)?)?;
        if tokens.len() > vocab {
            return Err(Error::TooManyTokens { got: tokens.len(), vocab });
        }
        let ids = ids(&tokens)?;
        let types = types(metadata, tokens.len())?;
        let key = "tokenizer.ggml.merges";
        let merges = merges(&required(key, metadata.strings(key)?)?, &ids)?;
        Ok(Self { tokens, types, ids, merges, pre, metadata })
    }

    /// The token whose id stands under `tokenizer.ggml.<name>`.
    pub(super) fn named(&self, name: &str) -> Result<Option<Token>, Error> {
        let key = format!("tokenizer.ggml.{name}");
        let Some(id) = self.metadata.unsigned(&key)? else { return Ok(None) };
        let text = usize::try_from(id).ok().and_then(|index| self.tokens.get(index));
        match text {
            Some(text) => Ok(Some(Token { id: id as u32, text: (*text).to_owned() })),
            None => Err(Error::TokenId { key, id, n_tokens: self.tokens.len() }),
        }
    }

    /// The id of a control token with this text.
    pub(super) fn control(&self, text: &str) -> Option<u32> {
        self.ids.get(text).copied().filter(|&id| self.types[id as usize] == CONTROL)
    }

    /// Whether an encoded prompt starts with bos.
    pub(super) fn add_bos(&self) -> Result<bool, Error> {
        let stated = self.metadata.bool("tokenizer.ggml.add_bos_token")?;
        Ok(stated.unwrap_or(self.pre == Pre::Llama3))
    }

    pub(super) fn to_json(&self) -> Vec<u8> {
        let document = Document {
            version: "1.0",
            truncation: (),
            padding: (),
            added_tokens: self.added_tokens(),
            normalizer: match self.pre {
                Pre::Qwen2 => json!({"type": "NFC"}),
                Pre::Gpt2 | Pre::SmolLm | Pre::Llama3 => Value::Null,
            },
            pre_tokenizer: self.pre.to_json(),
            post_processor: (),
            decoder: byte_level(true),
            model: Model {
                kind: "BPE",
                dropout: (),
                unk_token: (),
                continuing_subword_prefix: (),
                end_of_word_suffix: (),
                fuse_unk: false,
                byte_fallback: false,
                ignore_merges: self.pre == Pre::Llama3,
                vocab: Vocab(&self.tokens),
                merges: &self.merges,
            },
        };
        serde_json::to_vec(&document).expect("strings and numbers make a document")
    }

    fn added_tokens(&self) -> Vec<Value> {
        let added = |(id, kind): (usize, &i64)| {
            matches!(*kind, CONTROL | USER_DEFINED).then(|| {
                json!({
                    "id": id,
                    "content": self.tokens[id],
                    "single_word": false,
                    "lstrip": false,
                    "rstrip": false,
                    "normalized": false,
                    "special": *kind == CONTROL,
                })
            })
        };
        self.types.iter().enumerate().filter_map(added).collect()
    }
}

/// A `tokenizer.json`. Borrowed, since a vocabulary as a tree of values takes longer to build than a
/// small model takes to load.
#[derive(Serialize)]
struct Document<'a> {
    version: &'static str,
    truncation: (),
    padding: (),
    added_tokens: Vec<Value>,
    normalizer: Value,
    pre_tokenizer: Value,
    post_processor: (),
    decoder: Value,
    model: Model<'a>,
}

#[derive(Serialize)]
struct Model<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    dropout: (),
    unk_token: (),
    continuing_subword_prefix: (),
    end_of_word_suffix: (),
    fuse_unk: bool,
    byte_fallback: bool,
    /// A word that is a token needs no merges to become one (Llama 3's own setting).
    ignore_merges: bool,
    vocab: Vocab<'a>,
    merges: &'a [(&'a str, &'a str)],
}

/// Texts to ids, which are their places.
struct Vocab<'a>(&'a [&'a str]);

impl Serialize for Vocab<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().zip(0u32..))
    }
}

impl Pre {
    fn to_json(self) -> Value {
        match self {
            Self::Gpt2 => byte_level(true),
            Self::SmolLm => json!({
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Digits", "individual_digits": true},
                    byte_level(true),
                ],
            }),
            Self::Llama3 => split_then_bytes(r"\p{N}{1,3}"),
            Self::Qwen2 => split_then_bytes(r"\p{N}"),
        }
    }
}

/// Each byte as one printable character; `use_regex` cuts words as GPT-2 does first.
fn byte_level(use_regex: bool) -> Value {
    json!({
        "type": "ByteLevel",
        "add_prefix_space": false,
        "trim_offsets": true,
        "use_regex": use_regex,
    })
}

/// The cut that Llama 3 and Qwen2 share, but for how many digits stay together.
fn split_then_bytes(digits: &str) -> Value {
    let pattern = [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        digits,
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
    .join("|");
    let split = json!({
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": false,
    });
    json!({"type": "Sequence", "pretokenizers": [split, byte_level(false)]})
}

fn ids<'a>(tokens: &[&'a str]) -> Result<HashMap<&'a str, u32>, Error> {
    let mut ids = HashMap::with_capacity(tokens.len());
    for (&text, second) in tokens.iter().zip(0u32..) {
        if let Some(first) = ids.insert(text, second) {
            return Err(Error::DuplicateToken { first, second, text: printable(text) });
        }
    }
    Ok(ids)
}

fn types(metadata: Metadata<'_>, n_tokens: usize) -> Result<Vec<i64>, Error> {
    let Some(types) = metadata.integers("tokenizer.ggml.token_type")? else {
        return Ok(vec![NORMAL; n_tokens]);
    };
    if types.len() != n_tokens {
        return Err(Error::TypeCount { got: types.len(), expected: n_tokens });
    }
    let known = |kind: &i64| [NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED].contains(kind);
    match types.iter().position(|kind| !known(kind)) {
        Some(index) => Err(Error::TokenType { id: index as u32, got: types[index] }),
        None => Ok(types),
    }
}

fn merges<'a>(
    merges: &[&'a str],
    ids: &HashMap<&'a str, u32>,
) -> Result<Vec<(&'a str, &'a str)>, Error> {
    let mut pairs = Vec::with_capacity(merges.len());
    let mut joined = String::new();
    for (index, &text) in merges.iter().enumerate() {
        let fail = |what| Error::Merge { index, text: printable(text), what };
        let (left, right) = text.split_once(' ').ok_or_else(|| fail("is not two tokens"))?;
        joined.clear();
        joined.extend([left, right]);
        if ![left, right, joined.as_str()].iter().all(|part| ids.contains_key(part)) {
            return Err(fail("names a token that is not in the vocabulary"));
        }
        pairs.push((left, right));
    }
    Ok(pairs)
}
