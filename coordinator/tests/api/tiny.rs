//! A tiny byte-level BPE tokenizer and a chat template like those of real models. Also used by unit
//! tests.

/// Ids 0 to 255 are the bytes, then these merges in order, then the special tokens.
pub const MERGES: [(&str, &str); 8] = [
    ("h", "e"),
    ("l", "l"),
    ("he", "ll"),
    ("hell", "o"),
    ("Ċ", "Ċ"),
    ("Ġ", "w"),
    ("i", "m"),
    ("<", "|"),
];
pub const END_OF_TEXT: u32 = 264;
pub const IM_START: u32 = 265;
pub const IM_END: u32 = 266;
pub const VOCAB_SIZE: u32 = 267;
pub const TEMPLATE: &str = "\
    {%- for message in messages %}\n\
    {%- if message['role'] == 'user' and message['content'] == 'forbidden' %}\n\
    {{- raise_exception('this word is forbidden') }}\n\
    {%- endif %}\n\
    {{- '<|im_start|>' + message['role'] + '\\n' }}\n\
    {{- message['content'] | trim + '<|im_end|>' + '\\n' }}\n\
    {%- endfor %}\n\
    {%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}";

/// GPT-2's alphabet: the character that stands for a byte.
fn alias(byte: u8) -> char {
    let printable = |b: u8| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let nth = (0..byte).filter(|&b| !printable(b)).count() as u32;
    char::from_u32(0x100 + nth).expect("below U+0144")
}

/// A Hugging Face tokenizer.json.
pub fn tokenizer_json() -> Vec<u8> {
    let mut vocab = serde_json::Map::new();
    for byte in 0..=255u8 {
        vocab.insert(alias(byte).to_string(), byte.into());
    }
    for (idx, (left, right)) in MERGES.iter().enumerate() {
        vocab.insert(format!("{left}{right}"), (256 + idx).into());
    }
    let merges: Vec<String> = MERGES.iter().map(|(a, b)| format!("{a} {b}")).collect();
    let added: Vec<serde_json::Value> =
        [(END_OF_TEXT, "<|endoftext|>"), (IM_START, "<|im_start|>"), (IM_END, "<|im_end|>")]
            .into_iter()
            .map(|(id, content)| {
                serde_json::json!({
                    "id": id, "content": content, "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false, "special": true,
                })
            })
            .collect();
    let byte_level = serde_json::json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true,
    });
    let json = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "vocab": vocab, "merges": merges,
        },
    });
    json.to_string().into_bytes()
}
