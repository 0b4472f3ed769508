//! What the cluster side publishes and the request side reads: models, ready groups, and what is
//! missing.
//!
//! The supervisor writes one [`Directory`] after each change into a watch channel; router and HTTP
//! only read it.

use std::collections::BTreeMap;
use std::sync::Arc;

use evener_proto::ids::{Epoch, GroupId, ModelName};

/// A snapshot of what can be asked of this cluster.
#[derive(Debug, Clone, Default)]
pub struct Directory {
    /// Every deployed model whose description is known, ready or not.
    pub models: BTreeMap<ModelName, Arc<Model>>,
    /// Groups that accept requests now.
    pub groups: Vec<Arc<ReadyGroup>>,
    /// What stands between now and ready, one sentence each; empty when every deployment is served.
    pub missing: Vec<String>,
}

/// A model as its workers describe it.
#[derive(Debug, Clone)]
pub struct Model {
    pub name: ModelName,
    pub architecture: String,
    pub quantization: String,
    /// As stated in the file; empty if it states none.
    pub licence: String,
    /// A Hugging Face tokenizer.json.
    pub tokenizer_json: Vec<u8>,
    /// Jinja source.
    pub chat_template: Option<String>,
    pub bos_token_id: Option<u32>,
    pub add_bos_token: bool,
    pub bos_token: String,
    pub eos_token: String,
    pub eos_token_ids: Vec<u32>,
    /// Tokens.
    pub context_length: u32,
    pub vocab_size: u32,
    pub n_parameters: u64,
    pub weight_bytes: u64,
    /// Hex; equal wherever the same file is held.
    pub fingerprint: String,
    /// Seconds; when this coordinator first saw the model.
    pub created_unix_s: u64,
}

/// A group that accepts requests.
#[derive(Debug, Clone)]
pub struct ReadyGroup {
    pub id: GroupId,
    pub epoch: Epoch,
    pub model: ModelName,
    /// gRPC host:port of rank 0.
    pub lead_address: String,
    pub world_size: usize,
    pub kv_blocks: u32,
    /// Tokens per block.
    pub kv_block_len: u32,
    /// Same bits whatever the batch and the split.
    pub deterministic: bool,
}
