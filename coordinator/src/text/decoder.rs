//! Text of tokens that come one by one: never half a character, and in all the very text of
//! decoding at once.
//!
//! Pure. Called by output.rs, and by http for the tokens of a prompt.

use std::sync::Arc;

use super::tokenizer::Tokenizer;

/// The text of one sequence of tokens, as far as it is decided.
pub struct Decoder {
    tokenizer: Arc<Tokenizer>,
    skip_special: bool,
    /// Byte-level: the beginning of a character whose end is still to come.
    bytes: Vec<u8>,
    /// Otherwise: tokens whose text depends on what follows, after `n_emitted` that give them their
    /// context.
    ids: Vec<u32>,
    n_emitted: usize,
}

impl Decoder {
    #[must_use]
    pub fn new(tokenizer: Arc<Tokenizer>, skip_special: bool) -> Self {
        Self { tokenizer, skip_special, bytes: Vec::new(), ids: Vec::new(), n_emitted: 0 }
    }

    /// The text that this token completes; may be empty.
    pub fn push(&mut self, id: u32) -> String {
        if self.skip_special && self.tokenizer.is_special(id) {
            return String::new();
        }
        if self.tokenizer.is_byte_level() {
            self.bytes.extend(self.tokenizer.token_bytes(id));
            return take_characters(&mut self.bytes);
        }
        self.ids.push(id);
        self.window(false)
    }

    /// Whether a character waits for its end.
    #[must_use]
    pub fn holds(&self) -> bool {
        !self.bytes.is_empty() || self.n_emitted < self.ids.len()
    }

    /// What is left when no more tokens come.
    pub fn flush(&mut self) -> String {
        let bytes = std::mem::take(&mut self.bytes);
        if !bytes.is_empty() {
            return String::from_utf8_lossy(&bytes).into_owned();
        }
        self.window(true)
    }

    /// Decodes the tokens not yet emitted, with those before them as context.
    fn window(&mut self, last: bool) -> String {
        let decode = |ids: &[u32]| self.tokenizer.decode(ids, false).unwrap_or_default();
        let before = decode(&self.ids[..self.n_emitted]);
        let all = decode(&self.ids);
        let Some(new) = all.strip_prefix(before.as_str()) else {
            return String::new(); // the newest token changed the text before it: wait for more
        };
        if new.ends_with(char::REPLACEMENT_CHARACTER) && !last {
            return String::new();
        }
        let new = new.to_owned();
        self.ids.drain(..self.n_emitted);
        self.n_emitted = self.ids.len();
        new
    }
}

/// Takes from `bytes` all that is decided: whole characters, and U+FFFD for what can never become
/// one.
fn take_characters(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut taken = 0;
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        taken += chunk.valid().len();
        let invalid = chunk.invalid();
        let at_end = taken + invalid.len() == bytes.len();
        if at_end && is_unfinished(invalid) {
            break;
        }
        if !invalid.is_empty() {
            text.push(char::REPLACEMENT_CHARACTER);
            taken += invalid.len();
        }
    }
    bytes.drain(..taken);
    text
}

/// Whether more bytes could make this a character.
fn is_unfinished(bytes: &[u8]) -> bool {
    matches!(std::str::from_utf8(bytes), Err(e) if e.valid_up_to() == 0 && e.error_len().is_none())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::tiny;
    use super::*;

    fn tokenizer() -> Arc<Tokenizer> {
        Arc::new(Tokenizer::from_json(&tiny::tokenizer_json(), None).unwrap())
    }

    #[test]
    fn decoding_one_by_one_is_decoding_at_once() {
        let tokenizer = tokenizer();
        let mut bytes: Vec<Vec<u32>> = vec![
            "héllo wörld 🦙🦙 日本語".bytes().map(u32::from).collect(),
            tokenizer.encode_prompt("hello world <|im_end|> x").unwrap(),
            vec![0xff, 0xfe, 0x41],
            vec![0xf0, 0x9f, 0xa6],             // three quarters of a llama
            vec![0xf0, 0x9f, 0x41, 0xa6, 0x99], // a llama with an A inside
            vec![0xe6, 0x97, 0xe6, 0x97, 0xa5],
            vec![0xed, 0xa0, 0x80, 0x41], // a lone surrogate
            vec![0xc0, 0xaf, 0xf5, 0x80, 0x80],
            vec![],
        ];
        // And noise: a fixed generator, so that a failure can be repeated.
        let mut state = 0x2545_f491_4f6c_dd1du64;
        for _ in 0..200 {
            let mut noise = Vec::new();
            for _ in 0..24 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                noise.push((state >> 33) as u32 % 256);
            }
            bytes.push(noise);
        }
        for ids in bytes {
            for skip in [true, false] {
                let whole = tokenizer.decode(&ids, skip).unwrap();
                let mut decoder = tokenizer.decoder(skip);
                let mut text: String = ids.iter().map(|&id| decoder.push(id)).collect();
                text.push_str(&decoder.flush());
                assert_eq!(text, whole, "{ids:?}");
            }
        }
    }

    #[test]
    fn a_character_comes_whole_and_as_soon_as_it_is_whole() {
        let mut decoder = tokenizer().decoder(true);
        let pieces: Vec<String> =
            "é🦙a".bytes().map(|byte| decoder.push(u32::from(byte))).collect();
        assert_eq!(pieces, ["", "é", "", "", "", "🦙", "a"]);
        assert!(!decoder.holds());
    }

    #[test]
    fn sentencepiece_tokens_decode_with_their_neighbours() {
        let vocab = ["<unk>", "▁hello", "▁world", "!", "<0xF0>", "<0x9F>", "<0xA6>", "<0x99>"];
        let vocab: serde_json::Map<String, serde_json::Value> =
            (0..).zip(vocab).map(|(id, token)| (token.to_owned(), id.into())).collect();
        let json = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
            "normalizer": null, "pre_tokenizer": null, "post_processor": null,
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ]},
            "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>",
                "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true,
                "byte_fallback": true, "vocab": vocab, "merges": []},
        });
        let tokenizer = Tokenizer::from_json(json.to_string().as_bytes(), None).unwrap();
        let tokenizer = Arc::new(tokenizer);
        let mut decoder = tokenizer.decoder(true);
        let pieces: Vec<String> =
            [1, 2, 3, 4, 5, 6, 7, 2].into_iter().map(|id| decoder.push(id)).collect();
        assert_eq!(pieces, ["hello", " world", "!", "", "", "", "🦙", " world"]);
        assert_eq!(tokenizer.token_bytes(2), b" world");
        assert_eq!(tokenizer.token_bytes(5), [0x9f]);
    }
}
