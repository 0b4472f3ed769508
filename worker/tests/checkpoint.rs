//! The checkpoint reader on the real demo model: configuration, description, tokenizer, slices.

#![allow(clippy::unwrap_used)]

mod support;

use evener_worker::checkpoint::{Checkpoint, FileBytes};
use evener_worker::model::config::{Family, ModelConfig, Rope, RopePairs};
use evener_worker::model::program::{Role, Weight};
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, Tokenizer};

use support::gguf_writer::{File, Value};
use support::real_model;
use support::tiny_model::TinyModel;

#[test]
fn the_demo_model_is_described_as_it_is() {
    let checkpoint = Checkpoint::open(&real_model()).unwrap();
    let expected = ModelConfig {
        family: Family::Llama,
        hidden: 576,
        n_layers: 30,
        n_heads: 9,
        n_kv_heads: 3,
        head_dim: 64,
        ffn: 1536,
        vocab: 49152,
        context_length: 8192,
        norm_eps: 1e-5,
        rope: Rope { theta: 1e5, dim: 64, pairs: RopePairs::Adjacent },
        tied_head: true,
        experts: None,
    };
    assert_eq!(checkpoint.config, expected);
    assert!(checkpoint.unused_tensors.is_empty(), "{:?}", checkpoint.unused_tensors);
    let d = checkpoint.description;
    assert_eq!((d.architecture.as_str(), d.quantization.as_str()), ("llama", "Q4_1"));
    assert_eq!(d.licence, "apache-2.0");
    assert_eq!(d.bos.map(|token| (token.id, token.text)), Some((1, "<|im_start|>".to_owned())));
    assert_eq!(d.eos.map(|token| (token.id, token.text)), Some((2, "<|im_end|>".to_owned())));
    assert!(!d.add_bos);
    assert_eq!(d.eos_token_ids, [0, 2]);
    assert!(d.chat_template.unwrap().contains("<|im_start|>"));
    assert_eq!(d.n_parameters, 134_515_008);
    assert_eq!(d.kv_bytes_per_token, 2 * 30 * 3 * 64 * 2);
    assert_eq!(d.fingerprint.len(), 64);
}

#[test]
fn the_demo_tokenizer_round_trips_and_knows_its_control_tokens() {
    let checkpoint = Checkpoint::open(&real_model()).unwrap();
    let tokenizer = Tokenizer::from_bytes(&checkpoint.description.tokenizer_json).unwrap();
    let texts = [
        "Hello, world!",
        "  two  spaces\n\nand lines\t\tand tabs ",
        "In 1984, 12,345.67 digits; x=3.14159e-10",
        "naïve café Straße Ελλάδα Москва 東京 🙂👩‍👩‍👧 \u{301}",
        "fn main() { println!(\"{}\", 1 << 20); }",
        "I'll we've don't it's they'd I'm you're",
        "",
    ];
    for text in texts {
        let encoding = tokenizer.encode(text, false).unwrap();
        assert_eq!(tokenizer.decode(encoding.get_ids(), false).unwrap(), text);
    }
    let ids = |text: &str| tokenizer.encode(text, false).unwrap().get_ids().to_vec();
    assert_eq!(ids("<|im_start|>user\n"), [1, 4093, 198]);
    assert_eq!(ids("<|im_end|><|endoftext|>"), [2, 0]);
    assert_eq!(ids("Hello, world!"), [19556, 28, 905, 17]);
    // Digits stand alone.
    let digits = tokenizer.encode("2024", false).unwrap();
    assert_eq!(digits.get_tokens(), ["2", "0", "2", "4"]);
    assert_eq!(tokenizer.decode(&[1, 19556, 2], true).unwrap(), "Hello");
}

#[test]
fn a_slice_of_rows_and_columns_is_the_part_of_the_whole() {
    let checkpoint = Checkpoint::open(&real_model()).unwrap();
    let weight = |rows, columns| Weight {
        tensor: "blk.7.ffn_down.weight".to_owned(),
        shape: [576, 1536],
        rows,
        columns,
        role: Role::Matrix,
    };
    let whole = checkpoint.slice(&weight(0..576, 0..1536)).unwrap();
    let part = checkpoint.slice(&weight(100..103, 64..224)).unwrap();
    assert_eq!((part.rows, part.columns, part.first_column), (3, 160, 0));
    part.check_finite(0..part.rows).unwrap();
    let (mut expected, mut got) = (vec![0.0; 1536], vec![0.0; 160]);
    for row in 0..3 {
        whole.dequantized_row(100 + row, &mut expected);
        part.dequantized_row(row, &mut got);
        assert_eq!(got, expected[64..224]);
    }
}

fn tiny(change: impl FnOnce(&mut File)) -> Checkpoint {
    let mut file = TinyModel::default().file();
    change(&mut file);
    Checkpoint::from_bytes(FileBytes::Owned(file.write().bytes)).unwrap()
}

#[test]
fn each_pre_tokenizer_cuts_words_its_own_way() {
    let text = "It's 2024,\n\n  x";
    let check = |pre: &str, add_bos: bool, expected: &[&str]| {
        let checkpoint = tiny(|file| {
            file.set("tokenizer.ggml.pre", Value::String(pre.to_owned()));
            file.remove("tokenizer.ggml.add_bos_token");
        });
        assert_eq!(checkpoint.description.add_bos, add_bos, "{pre}");
        let tokenizer = Tokenizer::from_bytes(&checkpoint.description.tokenizer_json).unwrap();
        let mut words = PreTokenizedString::from(text);
        tokenizer.get_pre_tokenizer().unwrap().pre_tokenize(&mut words).unwrap();
        let words = words.get_splits(OffsetReferential::Original, OffsetType::Byte);
        let words: Vec<&str> =
            words.iter().map(|(_, (start, end), _)| &text[*start..*end]).collect();
        assert_eq!(words, expected, "{pre}");
        let encoding = tokenizer.encode("he said: naïve 🙂", false).unwrap();
        assert_eq!(tokenizer.decode(encoding.get_ids(), false).unwrap(), "he said: naïve 🙂");
        assert_eq!(encoding.get_ids()[0], 259, "the one merge is used");
    };
    check("gpt-2", false, &["It", "'s", " 2024", ",", "\n\n ", " x"]);
    check("smollm", false, &["It", "'s", " ", "2", "0", "2", "4", ",", "\n\n ", " x"]);
    check("llama-bpe", true, &["It", "'s", " ", "202", "4", ",\n\n", " ", " x"]);
    check("qwen2", false, &["It", "'s", " ", "2", "0", "2", "4", ",\n\n", " ", " x"]);
}

#[test]
fn tensors_no_weight_uses_are_listed() {
    let checkpoint = tiny(|file| {
        let mut extra = file.tensors[0].clone();
        extra.name = "extra.weight".to_owned();
        file.tensors.push(extra);
    });
    assert_eq!(checkpoint.unused_tensors, ["extra.weight"]);
}

#[test]
fn fingerprints_tell_files_apart() {
    let fingerprint = |seed| {
        let bytes = TinyModel { seed, ..TinyModel::default() }.bytes();
        Checkpoint::from_bytes(FileBytes::Owned(bytes)).unwrap().description.fingerprint
    };
    assert_eq!(fingerprint(1), fingerprint(1));
    assert_ne!(fingerprint(1), fingerprint(2));
}
