//! Random-weight Llama and Mixtral models of any small shape and format, as GGUF files with a byte tokenizer.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor as CandleTensor};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::gguf_writer::{File, Tensor, Value};

/// The shape of a tiny model.
#[derive(Debug, Clone)]
pub struct TinyModel {
    pub seed: u64,
    pub hidden: usize,
    pub n_layers: usize,
    pub n_heads: usize,
    pub n_kv_heads: usize,
    pub head_dim: usize,
    pub ffn: usize,
    /// At least 260: 256 bytes, a merge and three control tokens.
    pub vocab: usize,
    pub context_length: usize,
    pub tied_head: bool,
    /// Of every matrix but the routers, which are f32.
    pub format: GgmlDType,
    pub experts: Option<Experts>,
}

/// Of a Mixtral model; `ffn` columns each.
#[derive(Debug, Clone, Copy)]
pub struct Experts {
    pub n: usize,
    pub n_used: usize,
    /// All experts' matrices of a kind in one tensor.
    pub are_stacked: bool,
}

impl Default for TinyModel {
    fn default() -> Self {
        Self {
            seed: 1,
            hidden: 96,
            n_layers: 2,
            n_heads: 6,
            n_kv_heads: 2,
            head_dim: 32,
            ffn: 160,
            vocab: 270,
            context_length: 128,
            tied_head: true,
            format: GgmlDType::F32,
            experts: None,
        }
    }
}

/// Bytes of the printable characters that byte-level BPE writes bytes as, in byte order.
fn byte_texts() -> Vec<String> {
    let printable = |byte: u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut next = 256;
    (0..256)
        .map(|byte| {
            let code = if printable(byte) {
                byte
            } else {
                next += 1;
                next - 1
            };
            char::from_u32(code).unwrap().to_string()
        })
        .collect()
}

impl TinyModel {
    /// Its file, not yet bytes: tests change it before they write it.
    pub fn file(&self) -> File {
        let mut file = File::default();
        self.put_metadata(&mut file);
        self.put_tokenizer(&mut file);
        self.put_tensors(&mut file);
        file
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.file().write().bytes
    }

    fn put_metadata(&self, file: &mut File) {
        let strings = [
            ("general.architecture", "llama"),
            ("general.name", "tiny"),
            ("general.license", "apache-2.0"),
        ];
        for (key, text) in strings {
            file.set(key, Value::String(text.to_owned()));
        }
        let sizes = [
            ("llama.block_count", self.n_layers),
            ("llama.context_length", self.context_length),
            ("llama.embedding_length", self.hidden),
            ("llama.feed_forward_length", self.ffn),
            ("llama.attention.head_count", self.n_heads),
            ("llama.attention.head_count_kv", self.n_kv_heads),
            ("llama.attention.key_length", self.head_dim),
            ("llama.attention.value_length", self.head_dim),
            ("llama.rope.dimension_count", self.head_dim),
            ("llama.vocab_size", self.vocab),
        ];
        for (key, size) in sizes {
            file.set(key, Value::U32(size as u32));
        }
        if let Some(experts) = self.experts {
            file.set("llama.expert_count", Value::U32(experts.n as u32));
            file.set("llama.expert_used_count", Value::U32(experts.n_used as u32));
        }
        file.set("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5));
        file.set("llama.rope.freq_base", Value::F32(10_000.0));
    }

    /// Ids 0 to 2 are control tokens, 3 to 258 the bytes, 259 the merge of "h" and "e".
    fn put_tokenizer(&self, file: &mut File) {
        assert!(self.vocab >= 260, "the tokenizer needs 260 ids");
        let mut tokens: Vec<String> =
            ["<|endoftext|>", "<|im_start|>", "<|im_end|>"].map(str::to_owned).into();
        tokens.extend(byte_texts());
        tokens.push("he".to_owned());
        tokens.extend((260..self.vocab).map(|id| format!("[unused{id}]")));
        let types = (0..self.vocab).map(|id| if id < 3 { 3 } else { 1 }).collect();
        file.set("tokenizer.ggml.model", Value::String("gpt2".to_owned()));
        file.set("tokenizer.ggml.pre", Value::String("smollm".to_owned()));
        file.set("tokenizer.ggml.tokens", Value::Strings(tokens));
        file.set("tokenizer.ggml.token_type", Value::I32s(types));
        file.set("tokenizer.ggml.merges", Value::Strings(vec!["h e".to_owned()]));
        file.set("tokenizer.ggml.bos_token_id", Value::U32(1));
        file.set("tokenizer.ggml.eos_token_id", Value::U32(2));
        file.set("tokenizer.ggml.add_bos_token", Value::Bool(false));
    }

    fn put_tensors(&self, file: &mut File) {
        let mut rng = StdRng::seed_from_u64(self.seed);
        let (q, kv) = (self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim);
        let mut matrix = |name: String, rows, columns| {
            file.tensors.push(self.matrix(&mut rng, name, rows, columns));
        };
        matrix("token_embd.weight".to_owned(), self.vocab, self.hidden);
        if !self.tied_head {
            matrix("output.weight".to_owned(), self.vocab, self.hidden);
        }
        for layer in 0..self.n_layers {
            let shapes = [
                ("attn_q", q, self.hidden),
                ("attn_k", kv, self.hidden),
                ("attn_v", kv, self.hidden),
                ("attn_output", self.hidden, q),
            ];
            for (name, rows, columns) in shapes.into_iter().chain(self.ffn_shapes()) {
                matrix(format!("blk.{layer}.{name}.weight"), rows, columns);
            }
        }
        if let Some(experts) = self.experts {
            (0..self.n_layers).for_each(|layer| self.put_experts(file, &mut rng, layer, experts));
        }
        for layer in 0..self.n_layers {
            for name in ["attn_norm", "ffn_norm"] {
                let name = format!("blk.{layer}.{name}.weight");
                file.tensors.push(vector(&mut rng, name, self.hidden));
            }
        }
        file.tensors.push(vector(&mut rng, "output_norm.weight".to_owned(), self.hidden));
    }

    /// Of a layer without experts; of one with, each has such matrices.
    fn ffn_shapes(&self) -> Vec<(&'static str, usize, usize)> {
        match self.experts {
            Some(_) => Vec::new(),
            None => self.expert_shapes().to_vec(),
        }
    }

    fn expert_shapes(&self) -> [(&'static str, usize, usize); 3] {
        let (hidden, ffn) = (self.hidden, self.ffn);
        [("ffn_gate", ffn, hidden), ("ffn_up", ffn, hidden), ("ffn_down", hidden, ffn)]
    }

    fn put_experts(&self, file: &mut File, rng: &mut StdRng, layer: usize, experts: Experts) {
        let router = format!("blk.{layer}.ffn_gate_inp.weight");
        // Spread far enough that the experts' weights differ.
        let spread = 4.0 * (3.0 / self.hidden as f32).sqrt();
        let values = (0..experts.n * self.hidden).map(|_| rng.random_range(-spread..spread));
        let router = quantized(router, values.collect(), experts.n, self.hidden, GgmlDType::F32);
        file.tensors.push(router);
        for (name, rows, columns) in self.expert_shapes() {
            let of = |e| format!("blk.{layer}.{name}.{e}.weight");
            let each: Vec<Tensor> =
                (0..experts.n).map(|e| self.matrix(rng, of(e), rows, columns)).collect();
            if !experts.are_stacked {
                file.tensors.extend(each);
                continue;
            }
            file.tensors.push(Tensor {
                name: format!("blk.{layer}.{name}_exps.weight"),
                dimensions: vec![columns as u64, rows as u64, experts.n as u64],
                ggml_type: each[0].ggml_type,
                data: each.into_iter().flat_map(|tensor| tensor.data).collect(),
            });
        }
    }

    /// Falls back to Q8_0 where the columns are no whole blocks of the format.
    fn matrix(&self, rng: &mut StdRng, name: String, rows: usize, columns: usize) -> Tensor {
        let fits = columns.is_multiple_of(self.format.block_size());
        let format = if fits { self.format } else { GgmlDType::Q8_0 };
        // Spread so that activations keep their size from layer to layer.
        let spread = (3.0 / columns as f32).sqrt();
        let values = (0..rows * columns).map(|_| rng.random_range(-spread..spread)).collect();
        quantized(name, values, rows, columns, format)
    }
}

/// A matrix in any format, by candle's quantisers.
pub fn quantized(
    name: String,
    values: Vec<f32>,
    rows: usize,
    columns: usize,
    format: GgmlDType,
) -> Tensor {
    let tensor = CandleTensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap();
    let data = QTensor::quantize(&tensor, format).unwrap().data().unwrap().into_owned();
    let dimensions = vec![columns as u64, rows as u64];
    Tensor { name, dimensions, ggml_type: ggml_type(format), data }
}

fn vector(rng: &mut StdRng, name: String, columns: usize) -> Tensor {
    let data = (0..columns).flat_map(|_| rng.random_range(0.5f32..1.5).to_le_bytes()).collect();
    Tensor { name, dimensions: vec![columns as u64], ggml_type: 0, data }
}

fn ggml_type(format: GgmlDType) -> u32 {
    match format {
        GgmlDType::F32 => 0,
        GgmlDType::F16 => 1,
        GgmlDType::Q4_0 => 2,
        GgmlDType::Q4_1 => 3,
        GgmlDType::Q5_0 => 6,
        GgmlDType::Q5_1 => 7,
        GgmlDType::Q8_0 => 8,
        GgmlDType::Q4K => 12,
        GgmlDType::Q5K => 13,
        GgmlDType::Q6K => 14,
        GgmlDType::BF16 => 30,
        other => panic!("{other:?} is not a format of Evener"),
    }
}
