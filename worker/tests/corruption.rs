//! Files that lie: truncated anywhere, with flipped bytes, with metadata that cannot be served.
//! Each is refused with its place; nothing panics, nothing allocates what a file says without
//! asking.

#![allow(clippy::unwrap_used)]

mod support;

use std::ops::ControlFlow;
use std::path::Path;

use candle_core::quantized::GgmlDType;
use evener_worker::backend::{self, Kind};
use evener_worker::checkpoint::fault::{Malformed, Region};
use evener_worker::checkpoint::{Checkpoint, Error, FileBytes};
use evener_worker::model::{families, shard};

use support::gguf_writer::{File, Tensor, Value, Written};
use support::tiny_model::TinyModel;

/// As small as a model can be, so that every byte of its tables can be tried.
fn smallest() -> TinyModel {
    TinyModel {
        hidden: 32,
        n_layers: 1,
        n_heads: 1,
        n_kv_heads: 1,
        head_dim: 32,
        ffn: 32,
        vocab: 260,
        format: GgmlDType::Q8_0,
        ..TinyModel::default()
    }
}

fn open(bytes: Vec<u8>) -> Result<Checkpoint, Error> {
    Checkpoint::from_bytes(FileBytes::Owned(bytes))
}

/// Most virtual memory this process ever had, in bytes: counts what was asked for, touched or not.
fn peak_virtual_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPeak:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// Runs `f` and fails if it asked for more memory than any honest reading of these tiny files.
fn without_huge_allocations(f: impl FnOnce()) {
    let before = peak_virtual_bytes();
    f();
    let grown = peak_virtual_bytes() - before;
    // Threads of tests beside this one bring their stacks and arenas, 64 MiB of address space each.
    assert!(grown < 1 << 30, "{grown} bytes of address space were asked for");
}

#[test]
fn a_whole_file_opens() {
    for format in [GgmlDType::F32, GgmlDType::Q4_1, GgmlDType::Q4K] {
        let model = TinyModel { format, hidden: 256, tied_head: false, ..TinyModel::default() };
        let checkpoint = open(model.bytes()).unwrap();
        assert_eq!(checkpoint.unused_tensors, [""; 0]);
        assert_eq!(checkpoint.description.eos_token_ids, [0, 2]);
    }
}

#[test]
fn a_file_truncated_anywhere_is_refused_at_or_before_the_cut() {
    let Written { bytes, header_end, metadata_end, table_end } = smallest().file().write();
    let sampled = (table_end..bytes.len()).step_by(997).chain([bytes.len() - 1]);
    without_huge_allocations(|| {
        for cut in (0..table_end).chain(sampled) {
            let error = open(bytes[..cut].to_vec()).unwrap_err();
            let Error::Malformed(Malformed { place, .. }) = &error else {
                panic!("cut at {cut}: {error}");
            };
            let allowed: &[Region] = match cut {
                _ if cut < header_end => &[Region::Header],
                // Counts and tensors that the rest cannot hold are noticed before the cut.
                _ if cut < metadata_end => &[Region::Header, Region::Metadata],
                _ if cut < table_end => &[Region::TensorTable],
                _ => &[Region::Data],
            };
            assert!(allowed.contains(&place.region), "cut at {cut}: {error}");
            if place.region != Region::Data {
                assert!(place.offset <= cut as u64, "cut at {cut}: {error}");
            }
            assert!(error.to_string().contains("byte "), "{error}");
        }
    });
}

#[test]
fn flipped_bytes_never_panic_and_never_allocate_what_they_say() {
    let Written { bytes, table_end, .. } = smallest().file().write();
    without_huge_allocations(|| {
        let mut n_refused = 0;
        for at in 0..table_end {
            for flip in [0x01, 0x10, 0x80, 0xff] {
                let mut bytes = bytes.clone();
                bytes[at] ^= flip;
                let opened = std::panic::catch_unwind(|| open(bytes).err());
                let error = opened.unwrap_or_else(|_| panic!("byte {at} ^ {flip:#x} panics"));
                n_refused += usize::from(error.is_some_and(|error| !error.to_string().is_empty()));
            }
        }
        // Flips inside names of tokens, of the licence and the like change nothing that matters
        // here.
        assert!(n_refused > table_end, "only {n_refused} flips of {table_end} bytes were refused");
    });
}

/// Opens a tiny model's file after a change and expects a refusal that says these things.
fn check(change: impl FnOnce(&mut File), expected: &[&str]) {
    let mut file = smallest().file();
    change(&mut file);
    let error = open(file.write().bytes).unwrap_err().to_string();
    for part in expected {
        assert!(error.contains(part), "`{part}` is not in: {error}");
    }
}

fn set(key: &'static str, value: Value) -> impl FnOnce(&mut File) {
    move |file| file.set(key, value)
}

fn tensor<'a>(file: &'a mut File, name: &str) -> &'a mut Tensor {
    file.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap()
}

#[test]
fn experts_that_cannot_be_served_are_refused_by_key() {
    let experts = |n: u32, n_used: u32| {
        move |file: &mut File| {
            file.set("llama.expert_count", Value::U32(n));
            file.set("llama.expert_used_count", Value::U32(n_used));
        }
    };
    check(set("llama.expert_count", Value::U32(8)), &["`llama.expert_used_count` is missing"]);
    check(experts(8, 9), &["used experts is 9", "at most 8"]);
    check(experts(8, 0), &["used experts is 0"]);
    check(experts(1 << 20, 2), &["expert count", "at most 1024"]);
    check(set("llama.expert_shared_count", Value::U32(1)), &["expert_shared_count", "1"]);
    check(set("llama.expert_gating_func", Value::U32(2)), &["expert_gating_func", "softmax"]);
    check(set("llama.expert_weights_scale", Value::F32(2.5)), &["expert_weights_scale", "2.5"]);
    let renamed = |name: &'static str| {
        move |file: &mut File| name.clone_into(&mut tensor(file, "blk.0.ffn_up.weight").name)
    };
    check(renamed("blk.0.ffn_up_exps.weight"), &["ffn_up_exps", "without expert_count"]);
    check(renamed("blk.0.ffn_up_shexp.weight"), &["ffn_up_shexp", "all tokens"]);
}

#[test]
fn metadata_that_cannot_be_served_are_refused_by_key() {
    let text = |text: &str| Value::String(text.to_owned());
    check(|f| f.remove("general.architecture"), &["`general.architecture` is missing"]);
    check(set("general.architecture", text("gpt9")), &["gpt9", "supported: llama"]);
    check(|f| f.remove("llama.block_count"), &["`llama.block_count` is missing"]);
    check(
        set("llama.block_count", text("2")),
        &["llama.block_count", "a string", "a whole number"],
    );
    check(set("llama.block_count", Value::U32(0)), &["layer count is 0"]);
    check(set("llama.block_count", Value::U32(2)), &["blk.1.", "is missing"]);
    check(set("llama.block_count", Value::U32(1 << 30)), &["layer count", "at most"]);
    check(set("llama.embedding_length", Value::U32(33)), &["hidden size is 33", "multiple of 32"]);
    check(set("llama.embedding_length", Value::U32(64)), &["token_embd.weight", "[260, 64]"]);
    check(set("llama.attention.head_count", Value::U32(0)), &["head count is 0"]);
    check(set("llama.attention.head_count_kv", Value::U32(3)), &["head count", "multiple of 3"]);
    check(set("llama.attention.value_length", Value::U32(64)), &["value_length", "64"]);
    check(set("llama.vocab_size", Value::U32(261)), &["llama.vocab_size is 261", "260"]);
    check(set("llama.rope.freq_base", Value::F32(f32::NAN)), &["rope theta", "NaN"]);
    check(set("llama.rope.scaling.type", text("yarn")), &["rope.scaling.type", "yarn", "none"]);
    check(set("general.alignment", Value::U32(7)), &["general.alignment", "multiple of 8"]);
}

#[test]
fn tokenizers_that_cannot_be_served_are_refused_by_name() {
    let text = |text: &str| Value::String(text.to_owned());
    let texts = |all: &[&str]| Value::Strings(all.iter().map(|&text| text.to_owned()).collect());
    check(set("tokenizer.ggml.model", text("llama")), &["`llama` is not supported", "gpt2"]);
    check(set("tokenizer.ggml.pre", text("other")), &["`other` is not supported", "smollm"]);
    check(|f| f.remove("tokenizer.ggml.tokens"), &["`tokenizer.ggml.tokens` is missing"]);
    check(set("tokenizer.ggml.tokens", texts(&["a", "b", "a"])), &["tokens 0 and 2 are both `a`"]);
    check(set("tokenizer.ggml.tokens", texts(&["a", "b"])), &["260 types for 2 tokens"]);
    check(set("tokenizer.ggml.merges", texts(&["he"])), &["merge 0 `he`", "two tokens"]);
    check(
        set("tokenizer.ggml.merges", texts(&["h q"])),
        &["merge 0 `h q`", "not in the vocabulary"],
    );
    check(
        set("tokenizer.ggml.eos_token_id", Value::U32(260)),
        &["eos_token_id is 260", "260 tokens"],
    );
    let mut types = vec![1; 260];
    types[9] = 6;
    check(set("tokenizer.ggml.token_type", Value::I32s(types)), &["token 9 has type 6"]);
}

#[test]
fn tensor_tables_that_lie_are_refused_by_tensor() {
    let name = "blk.0.attn_k.weight";
    check(|f| tensor(f, name).name = "x\u{7}y".to_owned(), &[name, "is missing"]);
    check(|f| tensor(f, name).ggml_type = 99, &[name, "ggml type 99", "Q8_0"]);
    check(|f| tensor(f, name).dimensions = vec![], &[name, "0 dimensions"]);
    check(|f| tensor(f, name).dimensions = vec![1; 5], &[name, "5 dimensions"]);
    check(|f| tensor(f, name).dimensions[1] = 0, &[name, "dimension 1 is 0"]);
    check(|f| tensor(f, name).dimensions = vec![1 << 40; 4], &[name, "overflows"]);
    check(|f| tensor(f, name).dimensions = vec![1 << 32, 1 << 31], &[name, "overflows"]);
    check(|f| tensor(f, name).dimensions[0] = 33, &[name, "33 columns", "blocks of 32"]);
    check(|f| tensor(f, name).dimensions[1] = 1 << 30, &["data of tensor", name, "past the end"]);
    check(|f| tensor(f, name).dimensions[1] = 40, &["data of tensor", "overlaps that of", name]);
    check(|f| tensor(f, name).dimensions[0] = 64, &[]);
    check(|f| f.tensors[1].name = f.tensors[0].name.clone(), &["token_embd.weight", "twice"]);
    check(|f| f.tensors.retain(|t| t.name != name), &[name, "is missing"]);
    let harmful = |name: &'static str| {
        move |f: &mut File| tensor(f, "output_norm.weight").name = name.to_owned()
    };
    check(harmful("rope_freqs.weight"), &["rope_freqs.weight", "frequency factors"]);
    check(harmful("blk.0.attn_q.bias"), &["blk.0.attn_q.bias", "a bias"]);
}

/// Writes `new` over the file's bytes at `offset` and expects a refusal.
fn check_bytes(offset: usize, new: &[u8], expected: &[&str]) {
    let mut bytes = smallest().bytes();
    bytes[offset..offset + new.len()].copy_from_slice(new);
    let error = open(bytes).unwrap_err().to_string();
    for part in expected {
        assert!(error.contains(part), "`{part}` is not in: {error}");
    }
}

#[test]
fn lengths_and_counts_are_compared_with_the_bytes_left() {
    let huge = u64::MAX.to_le_bytes();
    let Written { bytes, header_end, metadata_end, .. } = smallest().file().write();
    check_bytes(0, b"PK\x03\x04", &["header, byte 0", "no GGUF file"]);
    check_bytes(4, &1u32.to_le_bytes(), &["header, byte 4", "version 1"]);
    check_bytes(8, &huge, &["header, byte 8", "18446744073709551615"]);
    check_bytes(16, &huge, &["header, byte 16", "18446744073709551615"]);
    check_bytes(header_end, &huge, &["metadata key #0, byte 24", "at most 65535"]);
    // Key, then the type of its value, then the value's length.
    let value = header_end + 8 + "general.architecture".len();
    check_bytes(value, &13u32.to_le_bytes(), &["`general.architecture`", "value type 13"]);
    check_bytes(value + 4, &huge, &["`general.architecture`", "a string of"]);
    check_bytes(value + 12, &[0xff], &["`general.architecture`", "not UTF-8"]);
    check_bytes(metadata_end, &huge, &["tensor table, tensor #0", "at most 1024"]);
    let tokens = find(&bytes, b"tokenizer.ggml.tokens") + "tokenizer.ggml.tokens".len();
    check_bytes(tokens + 4, &9u32.to_le_bytes(), &["`tokenizer.ggml.tokens`", "array of arrays"]);
    check_bytes(tokens + 8, &huge, &["`tokenizer.ggml.tokens`", "18446744073709551615"]);
    let bos = find(&bytes, b"tokenizer.ggml.add_bos_token") + "tokenizer.ggml.add_bos_token".len();
    check_bytes(bos + 4, &[2], &["`tokenizer.ggml.add_bos_token`", "boolean is 2"]);
    let eos = find(&bytes, b"tokenizer.ggml.eos_token_id");
    check_bytes(eos + 15, b"bos_token_id", &["`tokenizer.ggml.bos_token_id`", "twice"]);
    // The first tensor's offset comes after its name, two dimensions and its type.
    let offset = metadata_end + 8 + "token_embd.weight".len() + 4 + 16 + 4;
    check_bytes(offset, &8u64.to_le_bytes(), &["token_embd.weight", "not a multiple of 32"]);
    check_bytes(offset, &(u64::MAX - 31).to_le_bytes(), &["token_embd.weight", "past the end"]);
}

fn find(bytes: &[u8], text: &[u8]) -> usize {
    bytes.windows(text.len()).position(|window| window == text).unwrap()
}

#[test]
fn weights_that_are_not_finite_are_refused_at_load_by_tensor_row_and_block() {
    for kind in [Kind::Reference, Kind::Cpu] {
        let mut file = smallest().file();
        // The scale of the 5th row's one block of 34 bytes.
        let nan = half::f16::NAN.to_le_bytes();
        tensor(&mut file, "blk.0.ffn_up.weight").data[5 * 34..5 * 34 + 2].copy_from_slice(&nan);
        let checkpoint = open(file.write().bytes).unwrap();
        let split = shard::split(&checkpoint.config, &[1]).unwrap();
        let program = families::compile(&checkpoint.config, &split, 0);
        let options = backend::Options {
            threads: 1,
            max_batch_tokens: 1,
            max_sample_rows: 1,
            max_context: 1,
            kv_format: backend::KvFormat::F16,
            activations: backend::Activations::Int12,
            spin: false,
            cores: Vec::new(),
        };
        let go_on = &mut |_, _| ControlFlow::Continue(());
        let loaded = backend::load(kind, &checkpoint, program, &options, go_on);
        let error = loaded.err().unwrap().to_string();
        assert_eq!(error, "data of tensor `blk.0.ffn_up.weight`: block 0 of row 5 is not finite");
    }
}

#[test]
fn files_that_cannot_be_read_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let empty = folder.path().join("empty.gguf");
    std::fs::write(&empty, b"").unwrap();
    let refused = |path: &Path| Checkpoint::open(path).unwrap_err().to_string();
    assert!(refused(&empty).contains("empty.gguf: cannot be read: the file is empty"));
    assert!(refused(folder.path()).contains("not a regular file"));
    assert!(
        refused(&folder.path().join("gone.gguf")).contains("gone.gguf: cannot be read: No such")
    );
    let garbage = folder.path().join("garbage.gguf");
    std::fs::write(&garbage, b"hello, I am text").unwrap();
    assert!(refused(&garbage).contains("garbage.gguf: header, byte 0: the file begins with hell"));
}
