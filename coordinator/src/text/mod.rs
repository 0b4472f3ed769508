//! Text of a model: tokens to and from text, chat templates, stop strings. Knows no group and no
//! HTTP.
//!
//! [`Cache`] keeps what is built from a model's description, by fingerprint. Called by
//! generation.rs and http.

pub mod chat_template;
pub mod decoder;
pub mod guard;
pub mod output;
pub mod stop;
pub mod tokenizer;

#[cfg(test)]
#[allow(dead_code, clippy::unwrap_used)]
#[path = "../../tests/api/tiny.rs"]
mod tiny;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::OnceCell;

use crate::group::handle::Model;
use chat_template::{ChatTemplate, Message};
use tokenizer::Tokenizer;

/// Why text cannot become tokens.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Tokenizer(#[from] tokenizer::Error),
    #[error(transparent)]
    Template(#[from] chat_template::Error),
    #[error(
        "the model {model} has no chat template; send the whole prompt to /v1/completions instead"
    )]
    NoTemplate { model: String },
    #[error(
        "This model's maximum context length is {context} tokens. However, your prompt has at \
         least {least} tokens. Shorten it."
    )]
    TooLong { context: usize, least: usize },
    #[error("the thread that prepared the text of {model} died")]
    Died { model: String },
}

/// Built once from a model's description.
pub struct ModelText {
    model: Arc<Model>,
    pub tokenizer: Arc<Tokenizer>,
    /// A template that does not compile spoils chat, not completions.
    template: Option<Result<ChatTemplate, chat_template::Error>>,
}

impl ModelText {
    /// # Errors
    /// The tokenizer cannot be read.
    pub fn build(model: Arc<Model>) -> Result<Self, Error> {
        let bos = model.bos_token_id.filter(|_| model.add_bos_token);
        let tokenizer = Arc::new(Tokenizer::from_json(&model.tokenizer_json, bos)?);
        let template = model.chat_template.as_deref().map(ChatTemplate::new);
        Ok(Self { model, tokenizer, template })
    }

    /// A raw prompt: whoever sends one writes the special tokens too.
    ///
    /// # Errors
    /// It can never fit the context, or the tokenizer refuses it.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, Error> {
        self.check_length(text.len())?;
        Ok(self.tokenizer.encode_prompt(text)?)
    }

    /// Encoding takes about a hundred times the text's memory: what can never fit is not encoded.
    fn check_length(&self, n_bytes: usize) -> Result<(), Error> {
        let context = self.model.context_length as usize;
        let least = self.tokenizer.least_tokens(n_bytes);
        if least > context { Err(Error::TooLong { context, least }) } else { Ok(()) }
    }

    /// The prompt of a conversation. What users wrote never becomes a special token.
    ///
    /// # Errors
    /// No template, or the template refuses these messages.
    pub fn encode_chat(&self, messages: &[Message]) -> Result<Vec<u32>, Error> {
        let model = &self.model;
        let template = match &self.template {
            Some(Ok(template)) => template,
            Some(Err(error)) => return Err(error.clone().into()),
            None => return Err(Error::NoTemplate { model: model.name.to_string() }),
        };
        let texts = messages.iter().flat_map(|message| {
            [Some(message.content.as_str()), message.name.as_deref()].into_iter().flatten()
        });
        let guard = self.tokenizer.guard(texts)?;
        let guarded: Vec<Message> = messages
            .iter()
            .map(|message| Message {
                role: message.role,
                content: guard.protect(&message.content),
                name: message.name.as_deref().map(|name| guard.protect(name)),
            })
            .collect();
        let rendered = template.render(&guarded, &model.bos_token, &model.eos_token)?;
        self.check_length(guard.n_bytes(&rendered))?;
        Ok(self.tokenizer.encode_guarded(&rendered, &guard)?)
    }
}

/// [`ModelText`]s by fingerprint; cheap to clone.
#[derive(Clone, Default)]
pub struct Cache {
    built: Arc<Mutex<HashMap<String, Slot>>>,
}

type Slot = Arc<OnceCell<Arc<ModelText>>>;

impl Cache {
    /// Built on first use, off the runtime; `known` are the models whose texts are kept.
    ///
    /// # Errors
    /// The tokenizer cannot be read.
    pub async fn get<'a>(
        &self,
        model: &Arc<Model>,
        known: impl Iterator<Item = &'a Arc<Model>>,
    ) -> Result<Arc<ModelText>, Error> {
        let slot = {
            let mut built = self.built.lock().unwrap_or_else(PoisonError::into_inner);
            match built.get(&model.fingerprint) {
                Some(slot) => slot.clone(),
                None => {
                    let known: Vec<&str> = known.map(|model| model.fingerprint.as_str()).collect();
                    built.retain(|fingerprint, _| known.contains(&fingerprint.as_str()));
                    built.entry(model.fingerprint.clone()).or_default().clone()
                }
            }
        };
        let build = || async {
            let name = model.name.to_string();
            let model = model.clone();
            tokio::task::spawn_blocking(move || ModelText::build(model).map(Arc::new))
                .await
                .unwrap_or(Err(Error::Died { model: name }))
        };
        slot.get_or_try_init(build).await.cloned()
    }
}
