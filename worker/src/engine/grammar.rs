//! Structured output: a schema, regular expression or grammar to a matcher that knows, after some
//! tokens, which may come next. The work is llguidance's; here are its limits and its vocabulary.
//!
//! Compiling is bounded by fuel, not by time, and may still take long: it belongs on a thread that
//! can be left alone. Called by the service; masks.rs runs the matchers.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde::Deserialize;

/// Longest source.
const MAX_SOURCE_BYTES: usize = 256 << 10;
/// Compiled grammars that are kept: the choices of one request, and a client's next one.
const N_KEPT: usize = 16;
/// Of what a compiler has to say about a source, in characters.
const MAX_REASON_CHARS: usize = 400;
/// Fuel of one mask: about 7 ms of lexing and 1 ms of parsing at the worst, half of llguidance's
/// own, for a mask may hold up a step of everybody.
const STEP_LEXER_FUEL: u64 = 100_000;
const STEP_MAX_ITEMS: usize = 25_000;
/// One or two kilobytes each.
const MAX_LEXER_STATES: usize = 50_000;

/// What an answer must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// JSON that fits this schema.
    JsonSchema(String),
    /// Text that this matches as a whole.
    Regex(String),
    /// Text of this language, in llguidance's variant of Lark.
    Lark(String),
}

/// Why there is no grammar.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("the schema or grammar has {got} bytes; at most {MAX_SOURCE_BYTES} are taken")]
    TooLong { got: usize },
    #[error("the schema or grammar cannot be used: {reason}")]
    Source { reason: String },
    #[error("the model's tokenizer cannot serve grammars: {reason}")]
    Tokenizer { reason: String },
}

/// A compiled source, before any token. Cheap to clone.
#[derive(Clone)]
pub struct Grammar(Arc<Mutex<Matcher>>);

impl Grammar {
    /// A matcher of its own.
    #[must_use]
    pub fn matcher(&self) -> Matcher {
        // A deep clone: limits on what a lexer builds up are each sequence's own.
        self.0.lock().unwrap_or_else(PoisonError::into_inner).deep_clone()
    }
}

impl PartialEq for Grammar {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Grammar")
    }
}

/// Compiles for one vocabulary.
pub struct Compiler {
    factory: ParserFactory,
    /// The last used in front.
    kept: Mutex<VecDeque<(Source, Grammar)>>,
}

impl fmt::Debug for Compiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Compiler")
    }
}

impl Compiler {
    /// `tokenizer_json`: a Hugging Face tokenizer.json of byte-level tokens; `eos`: the tokens that
    /// may come where an answer is complete.
    ///
    /// # Errors
    /// Another kind of tokenizer, or no end token.
    pub fn new(tokenizer_json: &[u8], eos: &[u32]) -> Result<Self, Error> {
        let fail = |reason: &dyn fmt::Display| Error::Tokenizer { reason: reason.to_string() };
        let words = token_bytes(tokenizer_json)?;
        if eos.is_empty() || eos.iter().any(|&id| id as usize >= words.len()) {
            return Err(fail(&"the model has no end token"));
        }
        let info = TokRxInfo::new(words.len() as u32, eos[0]);
        let trie = TokTrie::from(&info, &words).with_eos_tokens(eos);
        let vocabulary: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&vocabulary).map_err(|e| fail(&e))?;
        factory.quiet();
        let limits = factory.limits_mut();
        limits.step_lexer_fuel = STEP_LEXER_FUEL;
        limits.step_max_items = STEP_MAX_ITEMS;
        limits.max_lexer_states = MAX_LEXER_STATES;
        limits.verbose_errors = false;
        Ok(Self { factory, kept: Mutex::default() })
    }

    /// # Errors
    /// The source is too long, wrong, or takes more fuel than it may.
    pub fn compile(&self, source: &Source) -> Result<Grammar, Error> {
        let (Source::JsonSchema(text) | Source::Regex(text) | Source::Lark(text)) = source;
        if text.len() > MAX_SOURCE_BYTES {
            return Err(Error::TooLong { got: text.len() });
        }
        if let Some(grammar) = self.kept(source) {
            return Ok(grammar);
        }
        let grammar = match source {
            Source::JsonSchema(text) => {
                TopLevelGrammar::from_json_schema(serde_json::from_str(text).map_err(refuse)?)
            }
            Source::Regex(text) => TopLevelGrammar::from_regex(text),
            Source::Lark(text) => TopLevelGrammar::from_lark(text.clone()),
        };
        let parser = self.factory.create_parser(grammar).map_err(refuse)?;
        let mut matcher = Matcher::new(Ok(parser)).into_cancellable();
        // What is wrong with a grammar may show with its first mask only.
        let mask = matcher.compute_mask_or_eos().map_err(refuse)?;
        if mask.is_zero() {
            return Err(refuse("no text fits it"));
        }
        let grammar = Grammar(Arc::new(Mutex::new(matcher)));
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.truncate(N_KEPT - 1);
        kept.push_front((source.clone(), grammar.clone()));
        Ok(grammar)
    }

    fn kept(&self, source: &Source) -> Option<Grammar> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let at = kept.iter().position(|(known, _)| known == source)?;
        let found = kept.remove(at)?;
        let grammar = found.1.clone();
        kept.push_front(found);
        Some(grammar)
    }
}

fn refuse(reason: impl fmt::Display) -> Error {
    Error::Source { reason: plain(&reason) }
}

/// What llguidance says, for people: short, and without what it says of itself.
pub(super) fn plain(reason: &dyn fmt::Display) -> String {
    let reason = reason.to_string();
    let reason = reason.split("<non-verbose/>").next().unwrap_or_default().trim();
    match reason.starts_with("NoExtension") {
        true => "no text fits it".to_owned(),
        false => reason.chars().take(MAX_REASON_CHARS).collect(),
    }
}

/// As much of a tokenizer.json as says what tokens stand for.
#[derive(Deserialize)]
struct Document {
    #[serde(default)]
    added_tokens: Vec<Added>,
    decoder: Decoder,
    model: Model,
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    content: String,
    special: bool,
}

#[derive(Deserialize)]
struct Decoder {
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
struct Model {
    vocab: HashMap<String, u32>,
}

/// Most tokens of a vocabulary.
const MAX_VOCAB: usize = 1 << 20;

/// By id: what a token stands for; nothing for an id that is no token's.
fn token_bytes(tokenizer_json: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
    let fail = |reason: String| Error::Tokenizer { reason };
    let Document { added_tokens, decoder, model } =
        serde_json::from_slice(tokenizer_json).map_err(|e| fail(e.to_string()))?;
    if decoder.kind != "ByteLevel" {
        return Err(fail(format!("its tokens are {}, not ByteLevel", decoder.kind)));
    }
    let ids = added_tokens.iter().map(|added| added.id).chain(model.vocab.values().copied());
    let n = ids.max().map_or(0, |id| id as usize + 1);
    if n > MAX_VOCAB {
        return Err(fail(format!("it has {n} tokens")));
    }
    let mut words = vec![Vec::new(); n];
    let bytes: HashMap<char, u8> = (0..=255).map(|byte| (alias(byte), byte)).collect();
    for (text, id) in &model.vocab {
        let word: Option<Vec<u8>> = text.chars().map(|c| bytes.get(&c).copied()).collect();
        words[*id as usize] = word.unwrap_or_else(|| text.clone().into_bytes());
    }
    for Added { id, content, special } in added_tokens {
        // The marker keeps a special token from being taken for the text it is written as.
        let marker = special.then_some(TokTrie::SPECIAL_TOKEN_MARKER);
        words[id as usize] = marker.into_iter().chain(content.into_bytes()).collect();
    }
    Ok(words)
}

/// The character that GPT-2's alphabet writes a byte as: printable Latin-1 stands for itself, the
/// other 68 bytes are in order the characters from U+0100.
fn alias(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let nth = (0..byte).filter(|&before| !printable(before)).count() as u32;
    char::from_u32(0x100 + nth).expect("68 characters from U+0100 on")
}
