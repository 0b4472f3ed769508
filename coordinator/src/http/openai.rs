//! The wire types of OpenAI's API as answers carry them; the only ones.

use serde::Serialize;

/// What a request used, over all of its choices.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    pub total_tokens: u64,
    pub prompt_tokens_details: PromptTokensDetails,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct PromptTokensDetails {
    /// Not computed for this request: their keys and values were cached. Counted once for all
    /// choices of a prompt, like the prompt.
    pub cached_tokens: u64,
}

impl Usage {
    #[must_use]
    pub fn new(prompt_tokens: u64, completion_tokens: u64, cached_tokens: u64) -> Self {
        let total_tokens = prompt_tokens + completion_tokens;
        let prompt_tokens_details = PromptTokensDetails { cached_tokens };
        Self { prompt_tokens, completion_tokens, total_tokens, prompt_tokens_details }
    }
}

/// What stands at the head of every object of one answer.
#[derive(Debug, Clone, Serialize)]
pub struct Head {
    pub id: String,
    pub object: &'static str,
    pub created: u64,
    pub model: String,
    /// Of the model's file: equal fingerprints give equal answers to equal seeds.
    pub system_fingerprint: String,
}

/// `chat.completion`, `chat.completion.chunk` and `text_completion`.
#[derive(Serialize)]
pub struct Object<C> {
    #[serde(flatten)]
    pub head: Head,
    pub choices: Vec<C>,
    /// In a chunk: null, but in the last; left out where the request did not ask for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Option<Usage>>,
}

#[derive(Serialize)]
pub struct ChatChoice {
    pub index: u32,
    pub message: ChatMessage,
    pub logprobs: Option<ChatLogprobs>,
    pub finish_reason: &'static str,
}

#[derive(Serialize)]
pub struct ChatMessage {
    pub role: &'static str,
    pub content: String,
    pub refusal: Option<String>,
}

#[derive(Serialize)]
pub struct ChatChunkChoice {
    pub index: u32,
    pub delta: ChatDelta,
    pub logprobs: Option<ChatLogprobs>,
    pub finish_reason: Option<&'static str>,
}

#[derive(Default, Serialize)]
pub struct ChatDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    /// Null beside the role, text after it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<Option<String>>,
}

#[derive(Default, Serialize)]
pub struct ChatLogprobs {
    pub content: Vec<ChatLogprob>,
    pub refusal: Option<Vec<ChatLogprob>>,
}

#[derive(Serialize)]
pub struct ChatLogprob {
    #[serde(flatten)]
    pub token: ChatToken,
    pub top_logprobs: Vec<ChatToken>,
}

#[derive(Serialize)]
pub struct ChatToken {
    pub token: String,
    pub logprob: f32,
    pub bytes: Vec<u8>,
}

/// In a whole answer and, its reason null until the end, in a chunk.
#[derive(Serialize)]
pub struct CompletionChoice {
    pub index: u32,
    pub text: String,
    pub logprobs: Option<CompletionLogprobs>,
    pub finish_reason: Option<&'static str>,
}

/// Four lists of one length, one item a token.
#[derive(Default, Serialize)]
pub struct CompletionLogprobs {
    pub tokens: Vec<String>,
    /// Null for the first token of an echoed prompt: nothing stands before it.
    pub token_logprobs: Vec<Option<f32>>,
    pub top_logprobs: Vec<Option<serde_json::Map<String, serde_json::Value>>>,
    /// Characters of the choice's text before the token.
    pub text_offset: Vec<usize>,
}

#[derive(Serialize)]
pub struct ModelList {
    pub object: &'static str,
    pub data: Vec<ModelObject>,
}

#[derive(Serialize)]
pub struct ModelObject {
    pub id: String,
    pub object: &'static str,
    pub created: u64,
    pub owned_by: &'static str,
    /// Evener's own, from here.
    pub context_length: u32,
    pub architecture: String,
    pub quantization: String,
    /// As stated in the file.
    pub licence: Option<String>,
    pub n_parameters: u64,
    pub fingerprint: String,
    /// A group serves it now.
    pub ready: bool,
    /// Same bits whatever the batch and the split; null while no group serves it.
    pub deterministic: Option<bool>,
}
